"""A server of the painter page as a process of its own, and requests to it as a browser or a stranger makes them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "weights" / "example" / "picture.png"
PATIENCE = 120  # seconds


class Server:
    """`python -m minpaint ui`. folder: where it keeps pictures; url: what it printed; base: that without the token."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "minpaint", "ui", "-o", str(folder), "--device", "cpu", *options]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        self.base, _, self.token = self.url.partition("?token=")
        self.port = int(self.base.split(":")[2].strip("/"))

    def answer(
        self, path: str, content: bytes | None = None, method: str | None = None, **headers: str
    ) -> tuple[int, bytes]:
        """Status and content of the answer to a request, with the token unless a header replaces it."""
        named = {name.replace("_", "-"): value for name, value in ({"X_Token": self.token} | headers).items()}
        request = urllib.request.Request(self.base + path, content, named, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def ask(self, path: str, content: bytes | None = None, method: str | None = None) -> Any:
        """What a good request is told."""
        code, told = self.answer(path, content, method)
        assert code == 200, told
        return json.loads(told)

    def order(self, number: int) -> dict[str, Any]:
        return next(order for order in self.ask("orders") if order["order"] == number)

    def wait(self, number: int, *states: str) -> dict[str, Any]:
        """An order, once it has one of these states."""
        until = time.monotonic() + PATIENCE
        while (order := self.order(number))["state"] not in states:
            assert time.monotonic() < until, order
            time.sleep(0.02)
        return order

    def stop(self) -> tuple[int, str, str]:
        """Ctrl-C; returns exit code and what else was printed on stdout and stderr."""
        self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out, err


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[Server]:
    server = Server(folder, *options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.communicate()
