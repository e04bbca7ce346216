"""What tests hold of a local Hub: a process, its folder, and its switches."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.local_hub.exchange import TOKENS
from tests.local_hub.store import Missing, Store

ROOT = Path(__file__).resolve().parents[2]


class HubFaults:
    """The fault switches; tests/local_hub/faults.py has the table of kinds."""

    def __init__(self, hub: LocalHub) -> None:
        self._hub = hub

    def add(self, kind: str, path_glob: str, times: int = 1, **args: Any) -> None:
        """Let the next `times` requests that fit fail (-1: all). Globs name `owner/model/path`, `path` or a URL's path."""
        self._hub.control("fault", {"kind": kind, "path_glob": path_glob, "times": times} | args)

    def clear(self) -> None:
        """Take all faults back, and let go on what they hold."""
        self._hub.control("clear")

    def held(self, process: subprocess.Popen[Any], count: int = 1) -> bool:
        """Wait until `count` requests in all are kept by the fault `hold`; False where the process ends before that."""
        while self._hub.control("held", {"count": count, "patience": 0.5})["held"] < count:
            if process.poll() is not None:
                return False
        return True


class LocalHub:
    """A Hub on loopback in a process of its own. Faults and counters start afresh with `restart`; repos stay."""

    def __init__(self, root: Path, part_size: int = 16 << 20, page_size: int = 1000) -> None:
        self.root = root
        self.store = Store(root / "hub")
        self.token, self.reader_token = TOKENS
        self.faults = HubFaults(self)
        self._sizes = ["--part-size", str(part_size), "--page-size", str(page_size)]
        self._ports = {"port": 0, "cdn_port": 0, "mirror_port": 0}
        self._start()

    def _start(self) -> None:
        ports = [word for k, v in self._ports.items() for word in (f"--{k.replace('_', '-')}", str(v))]
        command = [sys.executable, "-m", "tests.local_hub", str(self.store.root), *ports, *self._sizes]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the local Hub did not start; its message stands above"
        self._ports = json.loads(line)
        self.url, self.mirror_url = (f"http://127.0.0.1:{self._ports[k]}" for k in ("port", "mirror_port"))

    def control(self, action: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"X-Control": (self.store.root / "secret").read_text(), "Content-Type": "application/json"}
        request = urllib.request.Request(
            f"{self.url}/__control__/{action}", json.dumps(body or {}).encode(), headers, method="POST"
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as e:
            raise ValueError(json.load(e)["error"]) from None

    def environment(self, token: str | None = None) -> dict[str, str]:
        """Return what a client's process needs to talk to this Hub and to nothing else. `token` "" is none."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token if token is None else token,
            "HF_HOME": str(self.root / "hf_home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def add_repo(self, name: str, folder: Path, private: bool = False, gated: bool = False) -> str:
        """Make a repo of a folder's files, by hard link (do not change them in place); return the commit's id."""
        self.store.create(name, private, gated)
        return self._commit(
            name, {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        )

    def put(self, name: str, files: dict[str, bytes | Path], branch: str = "main") -> str:
        """Commit files as somebody else would; names are not checked, so hostile ones can be planted."""
        return self._commit(name, files, branch)

    def _commit(self, name: str, files: dict[str, Any], branch: str = "main") -> str:
        store = self.store
        hashes = {k: store.add_bytes(v) if isinstance(v, bytes) else store.add_file(v) for k, v in files.items()}
        with store.lock():
            repo = store.repo(name)
            before = store.commit_of(repo, branch).files if branch in repo.branches else {}
            new = {k: store.entry(k, sha256) for k, sha256 in hashes.items()}
            return store.commit(name, branch, before | new, "put by the test").oid

    def files(self, name: str, revision: str = "main") -> dict[str, Path]:
        """Return the tree of a revision: name to a path that holds the content (read only)."""
        commit = self.store.commit_of(self.store.repo(name), revision)
        return {k: self.store.blob(v.sha256) for k, v in commit.files.items()}

    def has_repo(self, name: str) -> bool:
        try:
            return bool(self.store.repo(name))
        except Missing:
            return False

    def counters(self) -> dict[str, Any]:
        """Return `requests` per kind and per method and kind, `sent` and `received` bytes per path, sums, and `log`."""
        return dict(self.control("counters"))

    def reset_counters(self) -> None:
        self.control("reset")

    def kill(self) -> None:
        """End the server as kill -9 does."""
        self.process.kill()
        self._reap()

    def _reap(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.wait(timeout=60)

    def restart(self) -> None:
        """Kill the server and start it on the same ports and folder."""
        self.kill()
        self._start()

    def close(self) -> None:
        self.kill()
