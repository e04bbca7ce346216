"""What went wrong on the Hub, in our words: exceptions of huggingface_hub and of HTTP as errors with exit codes.

Messages name the repo and the next step. They never quote a URL, a header or a token: a signed address is a secret.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ds4convert.errors import Ds4Error, EnvironmentFault, UsageError

AGAIN = "What is finished is safe: run the same command again, it goes on from there"


def _table() -> list[tuple[type[BaseException], type[Ds4Error], str]]:
    """Return (exception, error of ours, message), narrow kinds first."""
    from huggingface_hub import errors

    return [
        (errors.OfflineModeIsEnabled, EnvironmentFault,
         "offline mode is on (HF_HUB_OFFLINE); unset it, or name a local folder"),
        (errors.HFValidationError, UsageError, "is not a repo name; expected owner/name"),
        (errors.GatedRepoError, EnvironmentFault,
         "the repo is gated: ask for access on its page, then log in with `hf auth login` or give --token"),
        (errors.RevisionNotFoundError, EnvironmentFault, "has no such revision; check the name after @ or --revision"),
        (errors.RepositoryNotFoundError, EnvironmentFault,
         "no such repo, or it is private and no token that may read it was given (`hf auth login`, HF_TOKEN, --token)"),
        (errors.EntryNotFoundError, EnvironmentFault, "a file of the repo is not there; the repo has been changed"),
        (errors.LocalTokenNotFoundError, EnvironmentFault, "needs a token: `hf auth login`, HF_TOKEN or --token"),
    ]  # fmt: skip


def translate(error: BaseException, repo: str) -> Ds4Error | None:
    """Return our error for an exception that came from the Hub's client or from HTTP; None where it is neither."""
    from huggingface_hub import errors

    error = _inner(error)
    for kind, ours, text in _table():
        if isinstance(error, kind):
            return ours(f"{repo}: {text}")
    cause = error.__cause__
    if isinstance(error, errors.LocalEntryNotFoundError | errors.FileMetadataError):
        return (translate(cause, repo) if cause else None) or EnvironmentFault(
            f"{repo}: the Hub cannot be reached or did not describe a file. {AGAIN}"
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status == 403 and "authorization" not in error.response.request.headers:  # storage, which takes no token
            return EnvironmentFault(f"{repo}: the address of a file had expired (HTTP 403). {AGAIN}")
        if status in {401, 403}:
            return EnvironmentFault(f"{repo}: the Hub refused the token (HTTP {status}); give one that may read it")
        return EnvironmentFault(f"{repo}: the Hub answered HTTP {status}. {AGAIN}")
    if isinstance(error, errors.HTTPError):  # type: ignore[attr-defined,unused-ignore]
        return EnvironmentFault(f"{repo}: the Hub cannot be reached ({type(error).__name__}). {AGAIN}")
    return None


def _inner(error: BaseException) -> BaseException:
    """Return what the client's uploads wrap into a RuntimeError."""
    return error.__cause__ if type(error) is RuntimeError and error.__cause__ is not None else error


PASSING = {408, 409, 412, 429, 500, 502, 503, 504}
"""Answers that may be better next time; 409 and 412: somebody else committed meanwhile."""


def is_passing(error: BaseException) -> float | None:
    """Return the seconds to wait before another try where a failure may pass, None where it will not."""
    from huggingface_hub import errors

    error = _inner(error)
    if isinstance(error, errors.HfHubHTTPError):
        answer = error.response
        expired = answer.status_code == 403 and "authorization" not in answer.request.headers
        if answer.status_code not in PASSING and not expired:
            return None
        try:
            return max(0.0, float(answer.headers.get("retry-after") or 0))
        except ValueError:
            return 0.0
    if isinstance(error, errors.OfflineModeIsEnabled):
        return None
    return 0.0 if isinstance(error, errors.HTTPError) else None  # type: ignore[attr-defined,unused-ignore]


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn what the Hub's client raises into errors of ours, which name `repo`."""
    try:
        yield
    except Ds4Error:
        raise
    except Exception as e:
        found = translate(e, repo)
        if found is None:
            raise
        raise found from e
