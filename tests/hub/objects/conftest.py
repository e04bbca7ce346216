"""A server that speaks S3 on loopback (moto), with faults and a log of requests in front of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests import support_run

pytest.importorskip("obstore", reason="the extra `objects` is not installed")
pytest.importorskip("moto", reason="moto, the S3 server of these tests, is not installed")

Answer = tuple[str, str] | None
SLOW_DOWN = ("503 Slow Down", "SlowDown")
DENIED = ("403 Forbidden", "AccessDenied")


@dataclass
class S3:
    """The server. `fault` may answer a request in its place, by method and path; `seen` are (path, range, if-match)."""

    port: int = 0
    fault: Callable[[str, str], Answer] = lambda method, path: None
    seen: list[tuple[str, str, str]] = field(default_factory=list)

    def wrapped(self, app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        """Return moto's application with the faults in front of it."""

        def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            path = environ["PATH_INFO"]
            self.seen.append((path, environ.get("HTTP_RANGE", ""), environ.get("HTTP_IF_MATCH", "")))
            if (found := self.fault(environ["REQUEST_METHOD"], path)) is None:
                return app(environ, start)
            body = f"<Error><Code>{found[1]}</Code><Message>{found[1]}</Message></Error>".encode()
            start(found[0], [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]

        return answer

    def request(self, method: str, path: str, body: bytes = b"") -> int:
        """Send a request of the tests' own; return the status."""
        connection = HTTPConnection("127.0.0.1", self.port)
        connection.request(method, path, body, {"Authorization": "AWS4-HMAC-SHA256 Credential=test/x/us-east-1/s3/y"})
        status = connection.getresponse().status
        connection.close()
        return status

    def put(self, folder: Path, where: str) -> None:
        """Put the files of a folder into the store."""
        for path in sorted(p for p in folder.iterdir() if p.is_file()):
            assert self.request("PUT", f"/models/{where}/{path.name}", path.read_bytes()) == 200


@pytest.fixture(scope="package")
def server() -> Iterator[S3]:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    s3 = S3()
    app = s3.wrapped(DomainDispatcherApplication(create_backend_app))
    running = make_server("127.0.0.1", 0, app, threaded=True)
    s3.port = running.server_port
    threading.Thread(target=running.serve_forever, daemon=True).start()
    assert s3.request("PUT", "/models") == 200
    yield s3
    running.shutdown()
    running.server_close()


@pytest.fixture(scope="package")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support_run.tiny(tmp_path_factory.mktemp("objects") / "source", experts=4)


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
    }.items():
        monkeypatch.setenv(name, value)
    server.seen.clear()
    yield server
    server.fault = lambda method, path: None
