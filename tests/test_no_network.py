"""No network is touched unless a model of the hub is named, nor for one that is cached and pinned.

A hook that no library can get around ends the process that asks for a name or a connection.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import make_mask, make_picture
from single_file import write_single_file
from tiny_hub import FIRST, NAME, TinyHub

from minpaint.checkpoint import hub

ROOT = Path(__file__).parents[1]
FORBID = """
import os, sys
def forbid(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.bind") or event.startswith("socket.get"):
        os.write(2, f"NETWORK: {event} {arguments}".encode())
        os._exit(99)
sys.addaudithook(forbid)
"""
COMMAND = FORBID + "from minpaint.cli.main import main\nsys.exit(main(sys.argv[1:]))"
LOAD = FORBID + "import minpaint\nminpaint.load(sys.argv[1], device='cpu', dtype='fp32', budget=None)"


def run(code: str, *arguments: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code without a network, although the hub may be asked."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    known |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "hub")} | environment
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=known, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def files(tmp_path: Path) -> list[object]:
    make_picture().save(tmp_path / "image.png")
    make_mask().save(tmp_path / "mask.png")
    return ["--image", "image.png", "--mask", "mask.png", "--prompt", "two dogs", "--steps", "1", "--dtype", "fp32"]


def test_the_hook_of_these_tests_ends_whoever_asks_the_hub(tmp_path: Path) -> None:
    assert run(COMMAND, "plan", "--model", NAME, folder=tmp_path).returncode == 99


def test_the_bundled_model_needs_no_network(tmp_path: Path, files: list[object]) -> None:
    done = run(COMMAND, "paint", *files, "-o", "out.png", folder=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["", "plan", "--help", "--version", "paint --help"])
def test_a_verb_needs_no_network(verb: str, tmp_path: Path) -> None:
    done = run(COMMAND, *verb.split(), folder=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_model_on_the_disk_needs_no_network(
    kind: str, tmp_path: Path, files: list[object], checkpoint: Callable[[str], Path]
) -> None:
    more: list[object] = ["--model", checkpoint("small-sd1")]
    if kind == "file":
        model = write_single_file(checkpoint("small-sd1"), tmp_path / "model.safetensors", open_clip=False)
        more = ["--model", model, "--config", checkpoint("small-sd1")]
    done = run(COMMAND, "paint", *files, *more, "-o", "out.png", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert run(COMMAND, "info", "out.png", folder=tmp_path).returncode == 0
    assert run(COMMAND, "plan", *more, folder=tmp_path).returncode == 0
    done = run(LOAD, checkpoint("small-sd1"), folder=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_pinned_model_that_is_cached_needs_no_network(
    tmp_path: Path, files: list[object], checkpoint: Callable[[str], Path]
) -> None:
    folder, served = checkpoint("small-sd1"), TinyHub()
    served.publish({name: (folder / name).read_bytes() for name in hub.file_names(folder)})
    places = {"HF_ENDPOINT": served.endpoint, "HF_HUB_DISABLE_XET": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    code = "import sys\nfrom minpaint.checkpoint import hub\nhub.fetch(*sys.argv[1:3], False)"
    fetched = run(code, NAME, FIRST, folder=tmp_path, **places)
    served.close()
    assert fetched.returncode == 0, fetched.stderr
    more = ["--model", f"{NAME}@{FIRST}", "-o", "out.png", "--json"]
    done = run(COMMAND, "paint", *files, *more, folder=tmp_path, **places)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == f"{NAME}@{FIRST}"
    assert run(COMMAND, "plan", "--model", f"{NAME}@{FIRST}", folder=tmp_path, **places).returncode == 0
