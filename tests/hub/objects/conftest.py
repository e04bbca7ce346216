"""A server that speaks S3 on loopback (moto), with faults and a log of requests in front of it."""

from __future__ import annotations

import hashlib
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
    """The server. `fault` may answer a request in its place, by method and path; `seen` are (path, range, if-match).

    `after` is called when a request has been carried out, and may answer it otherwise. `puts` are (path, if-none-match,
    status) of what was to be written. `ignores_conditions`: it writes whatever it is asked not to replace.
    `hides_digests`: its ETags are no MD5, as S3's are where objects are encrypted with a key of KMS.
    """

    port: int = 0
    fault: Callable[[str, str], Answer] = lambda method, path: None
    after: Callable[[str, str], Answer] = lambda method, path: None
    seen: list[tuple[str, str, str]] = field(default_factory=list)
    puts: list[tuple[str, str, str]] = field(default_factory=list)
    ignores_conditions: bool = False
    hides_digests: bool = False

    def wrapped(self, app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        """Return moto's application with the faults in front of it."""

        def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
            self.seen.append((path, environ.get("HTTP_RANGE", ""), environ.get("HTTP_IF_MATCH", "")))
            found, told, body = self.fault(method, path), [], []
            if found is None:
                told, body = self._carried_out(app, environ)
                found = self.after(method, path)
            if found is not None:
                body = [f"<Error><Code>{found[1]}</Code><Message>{found[1]}</Message></Error>".encode()]
                told = [found[0], [("Content-Type", "application/xml"), ("Content-Length", str(len(body[0])))]]
            start(*told)
            return body

        return answer

    def _carried_out(
        self, app: Callable[..., Iterable[bytes]], environ: dict[str, Any]
    ) -> tuple[list[Any], list[bytes]]:
        """Return what moto answers: status and headers, and the body."""
        wanted, told = environ.get("HTTP_IF_NONE_MATCH", ""), []
        if self.ignores_conditions:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        if self.hides_digests and "HTTP_IF_MATCH" in environ:
            environ["HTTP_IF_MATCH"] = environ["HTTP_IF_MATCH"][::-1]
        body = list(app(environ, lambda *words: told.extend(words)))
        if environ["REQUEST_METHOD"] == "PUT":
            self.puts.append((environ["PATH_INFO"], wanted, told[0]))
        if self.hides_digests:
            told[1] = [(k, v[::-1] if k.lower() == "etag" else v) for k, v in told[1]]
        return told, body

    def request(self, method: str, path: str, body: bytes = b"") -> int:
        """Send a request of the tests' own; return the status."""
        connection = HTTPConnection("127.0.0.1", self.port)
        connection.request(method, path, body, {"Authorization": "AWS4-HMAC-SHA256 Credential=test/x/us-east-1/s3/y"})
        status = connection.getresponse().status
        connection.close()
        return status

    def contents(self, where: str) -> dict[str, str]:
        """Return the sha256 of every object below a folder of the store, by name, as a reader of its own tells it."""
        import obstore
        from obstore import store

        bucket = store.S3Store("models", prefix=where, client_options={"allow_http": True})
        names = [m["path"] for batch in obstore.list(bucket) for m in batch]
        return {n: hashlib.sha256(bytes(obstore.get(bucket, n).bytes())).hexdigest() for n in sorted(names)}

    def get(self, where: str, to: Path) -> Path:
        """Copy the objects of a folder of the store into a folder here."""
        import obstore
        from obstore import store

        bucket = store.S3Store("models", prefix=where, client_options={"allow_http": True})
        for meta in [m for batch in obstore.list(bucket) for m in batch]:
            path = to / meta["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(obstore.get(bucket, meta["path"]).bytes()))
        return to

    def reset(self) -> None:
        """Be a store without faults again, and forget what was asked."""
        self.fault, self.after = (lambda method, path: None), (lambda method, path: None)
        self.ignores_conditions = self.hides_digests = False
        self.seen.clear()
        self.puts.clear()

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
    server.reset()
    yield server
    server.reset()
