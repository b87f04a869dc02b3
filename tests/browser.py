"""A headless Chromium for tests of pages: opened on a file, asked by JavaScript, photographed.

It is driven by the browser's own DevTools protocol over two pipes, so that nothing has to be installed but the browser.
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 60  # seconds that an answer may take


def find_browser() -> str | None:
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


class Browser:
    """One page of a browser. complaints: errors and warnings of its console, and exceptions of its scripts."""

    def __init__(self, to: int, back: int) -> None:
        self.to, self.back = to, back
        self.buffer, self.numbers, self.session = b"", itertools.count(1), ""
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the DevTools protocol; returns its result."""
        number = next(self.numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])

    def open(self, file: Path, width: int = 1280, height: int = 900, mobile: bool = False) -> None:
        """Load a file into a window of this size, and wait until all is loaded."""
        self.complaints.clear()
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        self.call("Page.navigate", url=file.resolve().as_uri())
        until = time.monotonic() + PATIENCE
        while self.run("document.readyState") != "complete" or self.run("location.href") == "about:blank":
            assert time.monotonic() < until, f"{file} is not loaded after {PATIENCE} s"
            time.sleep(0.05)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def photograph(self, file: Path, whole: bool = False) -> Path:
        """A screenshot as PNG, of the window or of the whole page."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(taken["data"]))
        return file

    def _receive(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self.buffer:
            assert select.select([self.back], [], [], max(until - time.monotonic(), 0))[0], (
                "the browser does not answer"
            )
            received = os.read(self.back, 2**20)
            assert received, "the browser has ended"
            self.buffer += received
        line, _, self.buffer = self.buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        told = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(told["exceptionDetails"]))
        elif message.get("method") == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(told["args"]))
        elif message.get("method") == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(str(told["entry"]))
        return message


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with a profile of its own in a folder, and no network: it knows no host."""
    program = find_browser()
    assert program is not None, "no Chromium is installed"
    (into, to), (back, out) = os.pipe(), os.pipe()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars"]
    options += [f"--user-data-dir={folder}", "--remote-debugging-pipe", "about:blank"]
    # the browser reads its commands from descriptor 3 and answers on 4; above 9, none is in the way of these
    given = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (into, out)]
    places = [(os.POSIX_SPAWN_DUP2, end, place) for end, place in zip(given, (3, 4), strict=True)]
    silent = (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)
    process = os.posix_spawn(program, [program, *options], os.environ, file_actions=[*places, silent])
    for end in (into, out, *given):
        os.close(end)
    try:
        yield Browser(to, back)
    finally:
        os.kill(process, signal.SIGTERM)
        os.waitpid(process, 0)
        os.close(to)
        os.close(back)
