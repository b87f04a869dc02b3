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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 60  # seconds that an answer may take
BUTTONS = {"left": 1, "right": 2, "middle": 4}

Point = tuple[float, ...]  # x and y in the window


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

    def open(self, file: Path | str, width: int = 1280, height: int = 900, mobile: bool = False) -> None:
        """Load a file or a URL into a window of this size, and wait until all is loaded."""
        self.complaints.clear()
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        self.call("Emulation.setTouchEmulationEnabled", enabled=mobile)
        self.call("Page.navigate", url=file if isinstance(file, str) else file.resolve().as_uri())
        until = time.monotonic() + PATIENCE
        while self.run("document.readyState") != "complete" or self.run("location.href") == "about:blank":
            assert time.monotonic() < until, f"{file} is not loaded after {PATIENCE} s"
            time.sleep(0.05)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, script: str, patience: float = PATIENCE) -> None:
        """Wait until a JavaScript expression is true."""
        until = time.monotonic() + patience
        while not self.run(script):
            assert time.monotonic() < until, f"not after {patience} s: {script}"
            time.sleep(0.02)

    def drag(self, *points: Point, button: str = "left") -> None:
        """Press the mouse at the first point, move it over the others, and let it go."""
        held = {"button": button, "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=points[0][0], y=points[0][1], **held)
        for x, y in points[1:]:
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, button=button, buttons=BUTTONS[button])
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=points[-1][0], y=points[-1][1], **held)

    def wheel(self, at: Point, down: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseWheel", x=at[0], y=at[1], deltaX=0, deltaY=down)

    def touch(self, *fingers: Sequence[Point]) -> None:
        """Put fingers down, each at its first point, move them over the others together, and lift them."""
        places = list(zip(*fingers, strict=True))
        for number, points in enumerate(places):
            told = [{"x": x, "y": y, "id": finger} for finger, (x, y) in enumerate(points)]
            self.call("Input.dispatchTouchEvent", type="touchMove" if number else "touchStart", touchPoints=told)
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def key(self, key: str, kinds: Sequence[str] = ("keyDown", "keyUp"), modifiers: int = 0) -> None:
        """Press and release a key; modifiers: 2 is Ctrl, 8 is Shift."""
        for kind in kinds:
            self.call("Input.dispatchKeyEvent", type=kind, key=key, modifiers=modifiers)

    def click(self, selector: str) -> None:
        """Click the middle of an element with the mouse."""
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        self.drag(tuple(self.run(f"(box => [box.x + box.width / 2, box.y + box.height / 2])({box})")))

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
    """A browser with a profile of its own in a folder, and no network: it knows no host but this one."""
    program = find_browser()
    assert program is not None, "no Chromium is installed"
    (into, to), (back, out) = os.pipe(), os.pipe()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += [
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "--hide-scrollbars",
    ]
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
