"""The answer to a request that is not served: HTTP status, message, and the field at fault."""

from __future__ import annotations

from ds4convert.checkpoint.types import JSON


class Refused(Exception):
    """A request that is not answered: HTTP status, message, and the field at fault."""

    def __init__(self, status: int, message: str, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.code = status, message, field, code

    def as_json(self) -> JSON:
        """Return the body of the response, in OpenAI's form."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.field, "code": self.code}}
