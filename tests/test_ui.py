"""The painter page's server over real sockets: who is let in, what is refused, and what it does with paintings."""

from __future__ import annotations

import gc
import io
import json
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_mask, make_picture
from page_server import PICTURE, Server, serving
from PIL import Image
from torch import Tensor

from minpaint.cli.main import main
from minpaint.painter import Painter
from minpaint.settings import Settings

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
from minpaint.ui.studio import Studio

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("kept"), "--budget", "1GiB") as started:
        yield started


@pytest.fixture(scope="module")
def picture_id(server: Server) -> str:
    told = server.ask("pictures?name=holiday.png", PICTURE.read_bytes())
    assert (told["width"], told["height"], told["name"]) == (128, 128, "holiday.png")
    return str(told["id"])


def as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def settings(**given: object) -> bytes:
    return json.dumps({"prompt": "a red tower", "steps": 2, **given}).encode()


# Who is let in --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "begin", "orders", "pictures/00001/view", "pictures/00001/mask", "nowhere"])
@pytest.mark.parametrize("token", ["", "wrong", "Ã¼"])
def test_nothing_is_answered_without_the_token(server: Server, path: str, token: str) -> None:
    code, told = server.answer(path, X_Token=token)
    assert (code, b"token" in told) == (403, True)


def test_the_token_may_stand_in_the_url(server: Server) -> None:
    code, told = server.answer(f"?token={server.token}", X_Token="")
    assert code == 200
    assert told.startswith(b"<!doctype html>")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "10.0.0.1:{port}"])
def test_a_foreign_host_is_refused(server: Server, host: str) -> None:
    assert server.answer("begin", Host=host.format(port=server.port))[0] == 421


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_its_own_names_are_served(server: Server, name: str) -> None:
    assert server.answer("begin", Host=f"{name}:{server.port}")[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "https://127.0.0.1:{port}"])
def test_a_request_from_another_site_is_refused(server: Server, origin: str) -> None:
    before = server.ask("begin")["pictures"]
    code, _ = server.answer("pictures", PICTURE.read_bytes(), Origin=origin.format(port=server.port))
    assert code == 403
    assert server.ask("begin")["pictures"] == before


def test_answers_say_nothing_to_other_sites(server: Server) -> None:
    request = f"GET /begin?token={server.token} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nConnection: close\r\n\r\n"
    told = raw(server, request.encode()).lower()
    assert b"access-control" not in told
    assert b"referrer-policy: no-referrer" in told
    assert b"content-security-policy: default-src 'none'" in told


@pytest.mark.parametrize(
    "path",
    [
        "pictures/../../etc/passwd/view",
        "pictures/..%2f..%2f..%2fetc/view",
        "pictures/%2e%2e/view",
        "pictures/{id}/..%2f{id}%2fabout.json/download",
        "pictures/{id}/about.json/download",
        "pictures/{id}/%2fetc%2fpasswd/download",
        "pictures/%D9%A1/view",
        "pictures/99999/view",
    ],
)
def test_a_path_leads_nowhere(server: Server, picture_id: str, path: str) -> None:
    assert server.answer(path.format(id=picture_id))[0] == 404


def test_a_name_from_the_client_is_no_path(server: Server) -> None:
    told = server.ask("pictures?name=..%2F..%2Fevil.png", PICTURE.read_bytes())
    assert told["name"] == "../../evil.png"
    assert told["file"] == "picture.png"


# What is too much ---------------------------------------------------------------------------------


def raw(server: Server, head: bytes, blocks: Iterable[bytes] = ()) -> bytes:
    """What the server answers to bytes that are sent until it does."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as opened:
        opened.sendall(head)
        try:
            for block in blocks:
                opened.sendall(block)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server has heard enough
        answer = b""
        try:
            while block := opened.recv(2**16):
                answer += block
        except ConnectionResetError:
            pass
    return answer


def _upload(server: Server, header: str, path: str = "pictures") -> bytes:
    name = f"127.0.0.1:{server.port}"
    return f"POST /{path} HTTP/1.1\r\nHost: {name}\r\nX-Token: {server.token}\r\n{header}\r\n\r\n".encode()


def test_ten_gigabytes_are_refused_by_their_declared_length(server: Server) -> None:
    assert raw(server, _upload(server, "Content-Length: 10737418240")).startswith(b"HTTP/1.1 413")


def test_ten_gigabytes_are_refused_while_they_stream_in(server: Server) -> None:
    sent, block = 0, b"%x\r\n%s\r\n" % (2**20, bytes(2**20))

    def blocks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(10 * 2**10):
            sent += 2**20
            yield block

    raw(server, _upload(server, "Transfer-Encoding: chunked"), blocks())
    assert sent < 300 * 2**20
    assert server.answer("orders")[0] == 200  # it lives on


def test_settings_of_a_megabyte_are_refused(server: Server, picture_id: str) -> None:
    head = _upload(server, "Content-Length: 1048576", f"pictures/{picture_id}/paint")
    assert raw(server, head).startswith(b"HTTP/1.1 413")


def test_a_bomb_is_refused(server: Server) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(10**6))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    code, told = server.answer("pictures", bomb)
    assert (code, b"too many pixels" in told) == (400, True)


@pytest.mark.parametrize("content", [b"", b"no picture", PICTURE.read_bytes()[:500]], ids=["empty", "text", "cut"])
def test_what_is_no_picture_is_refused_and_leaves_nothing(server: Server, content: bytes) -> None:
    before = server.ask("begin")["pictures"]
    assert server.answer("pictures", content)[0] == 400
    assert server.ask("begin")["pictures"] == before


def test_a_mask_of_another_size_is_refused(server: Server, picture_id: str) -> None:
    code, told = server.answer(f"pictures/{picture_id}/mask", as_png(make_mask(64, 64)), "PUT")
    assert (code, b"64x64" in told) == (400, True)


@pytest.mark.parametrize(
    ("content", "culprit"),
    [
        (b"{", "settings"),
        (b"[1]", "settings"),
        (b'{"promt": "x"}', "promt"),
        (settings(steps="many"), "many"),
        (settings(strength=0), "strength"),
        (settings(context="near"), "context"),
        (b"[" * 100_000, "settings"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_settings_are_named(server: Server, picture_id: str, content: bytes, culprit: str) -> None:
    code, told = server.answer(f"pictures/{picture_id}/plan", content)
    assert code == 400
    assert culprit in json.loads(told)["error"]


# Painting -----------------------------------------------------------------------------------------


def test_a_painting_is_what_the_command_line_paints(server: Server, picture_id: str, tmp_path: Path) -> None:
    mask = make_mask(128, 128)
    server.ask(f"pictures/{picture_id}/mask", as_png(mask), "PUT")
    plan = server.ask(f"pictures/{picture_id}/plan", settings(count=2))
    assert "2 steps at 128 x 128" in plan["text"]
    assert plan["cells"].startswith("data:image/png")
    order = server.ask(f"pictures/{picture_id}/paint", settings(count=2, context="96", feather=2))
    done = server.wait(order["order"], "done", "failed")
    assert done["state"] == "done", done
    painting = next(each for each in server.ask("begin")["pictures"] if each["id"] == picture_id)["paintings"][-1]
    assert [result["seed"] for result in painting["results"]] == [0, 1]
    mask.save(tmp_path / "mask.png")
    files = ["--image", str(PICTURE), "--mask", str(tmp_path / "mask.png"), "-o", str(tmp_path / "out.png")]
    options = ["--steps", "2", "--count", "2", "--context", "96", "--feather", "2", "--device", "cpu", "--quiet"]
    environment = ["-m", "minpaint", "paint", "--prompt", "a red tower", *files, *options]
    subprocess.run([sys.executable, *environment], check=True, cwd=Path(__file__).parent.parent)
    for result in painting["results"]:
        assert result["receipt"].startswith("changed pixels outside: 0 of")
        downloaded = tmp_path / f"downloaded-{result['seed']}.png"
        downloaded.write_bytes(server.answer(f"pictures/{picture_id}/{result['file']}/download")[1])
        with Image.open(downloaded) as ours, Image.open(tmp_path / f"out-{result['seed']}.png") as theirs:
            assert ours.tobytes() == theirs.tobytes()
        again = tmp_path / f"again-{result['seed']}.png"
        assert main(["paint", "--like", str(downloaded), "-o", str(again), "--quiet"]) == 0
        with Image.open(downloaded) as ours, Image.open(again) as repeated:
            assert ours.info["minpaint"] == repeated.info["minpaint"]
    taken = server.ask(f"pictures/{picture_id}/{painting['results'][1]['file']}/take", b"")
    assert taken["paintings"] == []


def test_an_empty_mask_paints_the_transparent_part(server: Server) -> None:
    clear = make_picture().convert("RGBA")
    clear.paste((0, 0, 0, 0), (10, 10, 30, 30))
    told = server.ask("pictures", as_png(clear))
    assert told["alpha"] is True
    order = server.ask(f"pictures/{told['id']}/paint", settings())
    assert server.wait(order["order"], "done", "failed")["state"] == "done"
    nothing = server.ask("pictures", as_png(make_picture()))
    order = server.ask(f"pictures/{nothing['id']}/paint", settings())
    failed = server.wait(order["order"], "done", "failed")
    assert "no transparent part" in failed["error"]


def test_one_paints_the_others_wait_and_a_cancelled_one_ends_at_once(server: Server, picture_id: str) -> None:
    server.ask(f"pictures/{picture_id}/mask", as_png(make_mask(128, 128)), "PUT")
    long, waits, follows = (
        server.ask(f"pictures/{picture_id}/paint", settings(steps=steps))["order"] for steps in (900, 900, 1)
    )
    while not server.wait(long, "painting").get("preview"):
        pass
    assert server.order(waits)["state"] == server.order(follows)["state"] == "waiting"
    seen = server.order(long)
    assert seen["total"] == 900
    assert seen["preview"]["urls"][0].startswith("data:image/png")
    assert "its turn" in server.ask(f"pictures/{picture_id}/plan", settings())["text"]
    server.ask(f"orders/{waits}/cancel", b"")
    start = time.monotonic()
    server.ask(f"orders/{long}/cancel", b"")
    server.wait(long, "cancelled")
    assert time.monotonic() - start < 5  # asked: a step and a second; a machine that others use gets some more
    assert server.wait(follows, "done", "failed")["state"] == "done"
    assert server.order(waits)["state"] == "cancelled"


def test_what_the_budget_cannot_hold_is_said_and_the_server_lives_on(server: Server, picture_id: str) -> None:
    server.ask(f"pictures/{picture_id}/mask", as_png(make_mask(128, 128)), "PUT")
    code, told = server.answer(f"pictures/{picture_id}/plan", settings(count=20_000))
    assert (code, b"budget" in told) == (400, True)
    order = server.ask(f"pictures/{picture_id}/paint", settings(count=20_000))["order"]
    assert "budget" in server.wait(order, "failed")["error"]
    order = server.ask(f"pictures/{picture_id}/paint", settings(steps=1))["order"]
    assert server.wait(order, "done", "failed")["state"] == "done"


def test_all_is_there_again_after_a_restart(tmp_path: Path) -> None:
    with serving(tmp_path) as first:
        told = first.ask("pictures?name=a.png", PICTURE.read_bytes())
        first.ask(f"pictures/{told['id']}/mask", as_png(make_mask(128, 128)), "PUT")
        first.wait(first.ask(f"pictures/{told['id']}/paint", settings())["order"], "done")
        pictures, running = (
            first.ask("begin")["pictures"],
            first.ask(f"pictures/{told['id']}/paint", settings(steps=900)),
        )
        first.wait(running["order"], "painting")
        code, out, err = first.stop()
        assert (code, out, "Traceback" in err) == (0, "", False)
    assert not list(tmp_path.rglob(".*"))  # nothing half-written
    with serving(tmp_path) as second:
        assert second.ask("begin")["pictures"] == pictures
        assert pictures[0]["mask"] is True
        with Image.open(io.BytesIO(second.answer(f"pictures/{told['id']}/mask")[1])) as kept:
            assert kept.tobytes() == make_mask(128, 128).tobytes()
        assert second.answer("begin", X_Token=first.token)[0] == 403  # a new run has a new token


# The studio by itself -------------------------------------------------------------------------------


@pytest.fixture
def studio(painter: Callable[[str], Painter], tmp_path: Path) -> Iterator[tuple[Studio, Path]]:
    made = Studio(painter("small-sd1"), tmp_path, lambda settings, image, mask: {"minpaint": "test"})
    place = tmp_path / made.add(as_png(make_picture()), "a.png")["id"]
    made.keep_mask(place, as_png(make_mask()))
    yield made, place
    made.close()


def ended(studio: Studio, order: dict[str, Any]) -> str:
    while order["state"] in ("waiting", "painting"):
        time.sleep(0.01)
    with studio.turn:
        return str(order["state"])


def tensors() -> int:
    gc.collect()
    return sum(isinstance(each, Tensor) for each in gc.get_objects())


def test_a_cancelled_painting_frees_its_memory(studio: tuple[Studio, Path]) -> None:
    made, place = studio
    assert ended(made, made.order(place, Settings("a dog", steps=1))) == "done"
    before = tensors()
    order = made.order(place, Settings("a dog", steps=500))
    while not order.get("step"):
        time.sleep(0.01)
    made.orders[-1].wanted = False
    assert ended(made, order) == "cancelled"
    assert tensors() <= before
    assert not list(place.glob("0002-0.png"))


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("no memory"), OSError("disk full")], ids=repr)
def test_a_painting_that_fails_is_said_and_the_next_is_painted(
    studio: tuple[Studio, Path], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, place = studio

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(made, "record", fail)
        order = made.order(place, Settings("a dog", steps=1))
        assert ended(made, order) == "failed"
        assert order["error"] in (str(error), "MemoryError")
    assert ended(made, made.order(place, Settings("a dog", steps=1))) == "done"
    assert made.painter.around is not None
    assert threading.active_count() < 50


# The command ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        (["--host", "0.0.0.0"], "--listen-to-everyone"),
        (["--host", "192.0.2.1"], "--listen-to-everyone"),
        (["--host", "::"], "--listen-to-everyone"),
        (["--host", "example.org"], "no IP address"),
        (["--port", "99999"], "--port"),
        (["--port", "-1"], "--port"),
        (["--model", "no-such-model"], "no-such-model"),
        (["-o", "/dev/null/x"], "/dev/null"),
    ],
    ids=" ".join,
)
def test_bad_usage_is_one_line(
    options: list[str], culprit: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["ui", "-o", str(tmp_path / "kept"), *options]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert culprit in err


def test_a_taken_port_is_said(server: Server, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["ui", "-o", str(tmp_path), "--port", str(server.port)]) == 2
    assert "choose another --port" in capsys.readouterr().err


def test_everyone_is_listened_to_only_when_asked(tmp_path: Path) -> None:
    with serving(tmp_path, "--host", "0.0.0.0", "--listen-to-everyone") as server:
        server.base = f"http://127.0.0.1:{server.port}/"
        assert server.answer("begin", Host=f"10.1.2.3:{server.port}")[0] == 200
        assert server.answer("begin", Host=f"evil.example:{server.port}")[0] == 421
        assert server.answer("begin", X_Token="")[0] == 403
        code, out, err = server.stop()
    assert (code, out) == (0, "")
    assert "lets other machines in" in err


def test_without_the_extra_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minpaint.cli.ui.find_spec", lambda name: None)
    assert main(["ui"]) == 2
    assert 'pip install "minpaint[ui]"' in capsys.readouterr().err
