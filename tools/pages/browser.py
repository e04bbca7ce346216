"""A headless Chromium over its debugging pipe (file descriptors 3 and 4): no driver, no port, no other library.

Methods and events are those of the Chrome DevTools Protocol (chromedevtools.github.io/devtools-protocol).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip

TOP = 12_000
"""The most CSS pixels of a page that a picture of all of it has."""


def program() -> str | None:
    """Return the path of a Chromium, None where none is installed."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page of one Chromium; what it asked for is in `requests`, what went wrong on it in `errors`."""

    def __init__(self, profile: Path) -> None:
        (read_ours, write_theirs), (read_theirs, write_ours) = os.pipe(), os.pipe()
        command = [str(program()), *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        shell = f'exec "$@" 3<&{read_theirs} 4>&{write_theirs}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=(read_theirs, write_theirs),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_theirs)
        os.close(write_theirs)
        self.reader, self.writer = os.fdopen(read_ours, "rb", buffering=0), os.fdopen(write_ours, "wb", buffering=0)
        self.buffer, self.count = b"", 0
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.loads = 0
        self.session: str | None = None
        pages = self.call("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in pages if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Network", "Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            part = self.reader.read(65536)
            assert part, "the browser has ended"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        self._note(found.get("method"), found.get("params", {}))
        return found

    def _note(self, method: str | None, told: dict[str, Any]) -> None:
        """Keep what a page asked for, and what it complained of."""
        if method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in told["args"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.errors.append(told["entry"]["text"])
        elif method == "Page.loadEventFired":
            self.loads += 1

    def call(self, method: str, **params: Any) -> Any:
        """Call a method of the protocol; returns its result."""
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.writer.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.count:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def value(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript on the page; of a promise, what it comes to."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> Any:
        """Wait until an expression is true; returns its value."""
        until = time.monotonic() + seconds
        while not (found := self.value(expression)):
            assert time.monotonic() < until, f"never true: {expression}; page: {self.value('document.body.innerText')}"
            time.sleep(0.1)
        return found

    def open(self, url: str) -> None:
        """Open a page, and wait until it is loaded."""
        loads = self.loads
        self.call("Page.navigate", url=url)
        while self.loads == loads:
            self._read()

    def press(self, key: str, code: int, modifiers: int = 0, text: str = "") -> None:
        """Press a key as a person does: `modifiers` 1 Alt, 2 Ctrl, 4 Cmd, 8 Shift; `code` is that of Windows."""
        told = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **told)
        self.call("Input.dispatchKeyEvent", type="keyUp", **told)

    def show(self, width: int, height: int = 900, scheme: str = "light", scale: float = 1.0) -> None:
        """Make the window so wide and high, in CSS pixels, and its colours light or dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.scheme(scheme)

    def scheme(self, scheme: str, media: str = "") -> None:
        """Make the colours light or dark, and the page as on `media`: "print", or a screen."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", media=media, features=[feature])

    def picture(self, height: int | None = None, top: float = 0) -> bytes:
        """Return a PNG of the page from `top` on: `height` CSS pixels, or all of it."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        tall = min(size["height"] - top, height or TOP)
        clip = {"x": 0, "y": top, "width": size["width"], "height": tall, "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(shot["data"])

    def close(self) -> None:
        """End the browser."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(20)
        self.reader.close()
        self.writer.close()
