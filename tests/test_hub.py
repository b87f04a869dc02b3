"""The hub: what is asked of it, what is kept of it, and what happens when it refuses.

The real download code talks to a tiny hub on loopback. huggingface_hub reads its environment
when it is imported, so whatever uses it runs in a process of its own.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import tiny_hub as tiny_hub_module
import torch
from conftest import largest_level_difference, make_mask, make_picture
from lora_files import write
from PIL import Image
from safetensors.torch import load_file, save_file
from single_file import write_single_file
from tiny_hub import FIRST, NAME, SECOND, Fault, Files, TinyHub, sha256

import minpaint
from minpaint.checkpoint import hub
from minpaint.checkpoint.load import HUB_ID
from minpaint.cli.main import main
from minpaint.errors import CheckpointError
from minpaint.painter import Painter
from weights.random_checkpoint import FAMILIES, write_checkpoint, write_tokenizer

T = TypeVar("T")

OFFICIAL = Path(__file__).parents[2] / "shared" / "official" / "README.md"

SETTINGS = (
    *hub.CONFIGS,
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
)
PLAIN = tuple(f"{component}/{base}.safetensors" for component, base in hub.COMPONENTS.items())
HALF = tuple(f"{component}/{base}.fp16.safetensors" for component, base in hub.COMPONENTS.items())
UNWANTED: Files = {  # what official repositories hold beside what a run needs
    ".gitattributes": b"*.safetensors filter=lfs",
    "README.md": b"# A model",
    "feature_extractor/preprocessor_config.json": b"{}",
    "model_index.json": b"{}",
    "safety_checker/config.json": b"{}",
    "safety_checker/model.safetensors": b"not needed",
    "safety_checker/pytorch_model.bin": pickle.dumps("not needed"),
    "sd-v1-5-inpainting.ckpt": pickle.dumps("not needed"),
    "small-inpainting.safetensors": b"not needed",
    "text_encoder/pytorch_model.bin": pickle.dumps("not needed"),
    "unet/diffusion_pytorch_model.bin": pickle.dumps("not needed"),
    "unet/diffusion_pytorch_model.fp16.bin": pickle.dumps("not needed"),
    "unet/diffusion_pytorch_model.non_ema.safetensors": b"not needed",
    "vae/diffusion_pytorch_model.bin": pickle.dumps("not needed"),
}


@pytest.fixture
def tiny_hub() -> Iterator[TinyHub]:
    served = TinyHub()
    yield served
    served.close()


# ---- whoever uses it ----

# What takes long to import and does not import huggingface_hub; most of transformers is the second.
PRELOADED = ["torch", "torch.distributed.tensor", "minpaint.painter", "pytest"]


@dataclass
class User:
    """Somebody with a cache of their own; every call is a fresh process that knows one hub."""

    environment: dict[str, str]

    def run(self, task: Callable[..., T], *arguments: Any, **environment: str) -> T:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_in_environment, self.environment | environment, task, arguments).result(120)

    def fetch(self, *arguments: Any, **environment: str) -> set[str]:
        return self.run(_fetch, *arguments, **environment)

    def paint(self, *arguments: Any, **environment: str) -> Image.Image:
        return Image.frombytes("RGB", (64, 64), self.run(_paint, *arguments, **environment))

    def refused(self, model: str, folder: Path, **environment: str) -> str:
        """What the command line says of a model that it cannot load: one line, exit code 2."""
        code, said = self.run(_command, _arguments(model, folder), **environment)
        lines = said.splitlines()
        assert code == 2
        assert len(lines) == 1, said
        assert lines[0].startswith("minpaint: error: ")
        assert not (folder / "out.png").exists()
        return lines[0]


@pytest.fixture
def user(tiny_hub: TinyHub, tmp_path: Path) -> User:
    return User(_environment(tiny_hub.endpoint, tmp_path))


def _environment(endpoint: str, home: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home / "hub"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "XDG_CACHE_HOME": str(home / "cache"),
    }


def _others() -> dict[str, str]:
    """The environment without what concerns the hub."""
    concerned = ("HF_", "HUGGING", "TRANSFORMERS_", "NO_PROXY", "no_proxy")
    return {name: value for name, value in os.environ.items() if not name.startswith(concerned)}


def _in_environment(environment: dict[str, str], task: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    assert "huggingface_hub" not in sys.modules, "it would not see the environment"
    kept = _others()
    os.environ.clear()
    os.environ.update(kept | environment)
    torch.set_num_threads(1)  # faster for something small
    return task(*arguments)


def _fetch(
    repository: str, revision: str | None = None, half: bool = False, known: hub.Known | None = None
) -> set[str]:
    folder = hub.fetch(repository, revision, half, known)
    assert revision is None or len(revision) != 40 or folder.name == revision
    return hub.file_names(folder)


def _paint(model: str, dtype: str = "fp32", config: str | None = None) -> bytes:
    return _painted(minpaint.load(model, device="cpu", dtype=dtype, config=config)).tobytes()


def _painted(painter: Painter) -> Image.Image:
    return painter(make_picture(), make_mask(), "two dogs", steps=2)[0].image


def _command(arguments: list[str]) -> tuple[int, str]:
    with redirect_stderr(io.StringIO()) as said:
        code = main(arguments)
    return code, said.getvalue()


def _fill_cache_as_diffusers_does(names: list[str]) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(NAME, allow_patterns=names)


def _arguments(model: str, folder: Path) -> list[str]:
    """A short run of the command line, in a folder for its files."""
    folder.mkdir(exist_ok=True)
    make_picture().save(folder / "image.png")
    make_mask().save(folder / "mask.png")
    files = ["--image", str(folder / "image.png"), "--mask", str(folder / "mask.png"), "-o", str(folder / "out.png")]
    return ["paint", "--model", model, *files, "--prompt", "two dogs", "--steps", "2", "--device", "cpu"]


# ---- what is served ----


def _read(folder: Path) -> Files:
    return {name: (folder / name).read_bytes() for name in hub.file_names(folder)}


@pytest.fixture(scope="module")
def plain(checkpoint: Callable[[str], Path]) -> Files:
    """A checkpoint that paints, in fp32."""
    return _read(checkpoint("small-sd1"))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The same in fp16 files, as most repositories have them."""
    folder = tmp_path_factory.mktemp("half")
    return _read(write_checkpoint(folder, FAMILIES["small-sd1"], dtype=torch.float16, variant="fp16"))


@pytest.fixture(scope="module")
def reference(painter: Callable[[str], Painter]) -> Image.Image:
    """What the checkpoint paints from a folder."""
    return _painted(painter("small-sd1"))


# Where only the download is looked at, no file has to mean anything.
FAKE: Files = {name: f"content of {name}".encode() * 20 for name in SETTINGS}
FAKE_PLAIN: Files = FAKE | {name: f"plain {name}".encode() * 100 for name in PLAIN}
FAKE_HALF: Files = FAKE | {name: f"half {name}".encode() * 50 for name in HALF}


# ---- downloading and painting ----


@pytest.mark.slow
def test_a_run_downloads_only_what_it_needs_and_the_next_is_the_same_offline(
    tiny_hub: TinyHub, user: User, plain: Files, half: Files, reference: Image.Image
) -> None:
    tiny_hub.publish(plain | half | UNWANTED)
    painted = user.paint(NAME)
    assert sorted(tiny_hub.fetched()) == sorted([*SETTINGS, *PLAIN])
    assert all(NAME in request.path or request.path.startswith("/cdn/") for request in tiny_hub.requests)
    assert largest_level_difference(painted, reference) <= 1

    tiny_hub.requests.clear()
    assert user.paint(NAME, HF_HUB_OFFLINE="1").tobytes() == painted.tobytes()
    assert tiny_hub.requests == []


def test_a_run_in_fp16_downloads_the_fp16_files_of_the_revision_asked_for(tiny_hub: TinyHub, user: User) -> None:
    tiny_hub.publish(FAKE_PLAIN | FAKE_HALF | UNWANTED)
    tiny_hub.publish(FAKE_PLAIN, commit=SECOND)
    assert user.fetch(NAME, FIRST, True) == {*SETTINGS, *HALF}
    assert sorted(tiny_hub.fetched()) == sorted([*SETTINGS, *HALF])


@pytest.mark.parametrize(
    ("files", "half_wanted"),
    [(FAKE_PLAIN, False), (FAKE_PLAIN, True), (FAKE_HALF, False), (FAKE_PLAIN | FAKE_HALF, True)],
    ids=["plain for fp32", "plain for fp16", "half for fp32", "both for fp16"],
)
def test_a_pinned_commit_is_asked_for_once(tiny_hub: TinyHub, user: User, files: Files, half_wanted: bool) -> None:
    tiny_hub.publish(files | UNWANTED)
    names = user.fetch(NAME, FIRST, half_wanted)
    tiny_hub.requests.clear()
    assert user.fetch(NAME, FIRST, half_wanted) == names
    assert tiny_hub.requests == []


def test_a_branch_is_asked_for_again_but_not_its_files(tiny_hub: TinyHub, user: User) -> None:
    tiny_hub.publish(FAKE_PLAIN)
    tiny_hub.repositories[NAME].branches["refs/pr/1"] = FIRST
    user.fetch(NAME, "refs/pr/1")
    tiny_hub.requests.clear()
    assert user.fetch(NAME, "refs/pr/1") == {*SETTINGS, *PLAIN}
    assert tiny_hub.requests
    assert tiny_hub.fetched() == []


@pytest.mark.slow
def test_the_command_line_paints_from_a_revision_with_half_precision_weights_only_in_shards(
    tiny_hub: TinyHub, user: User, half: Files, tmp_path: Path
) -> None:
    tiny_hub.publish(_sharded(half, tmp_path) | UNWANTED)
    tiny_hub.publish(FAKE_PLAIN, commit=SECOND)
    model = f"{NAME}@{FIRST}"
    command = [sys.executable, "-m", "minpaint", *_arguments(model, tmp_path / "run"), "--json", "--dtype", "fp32"]
    root, environment = Path(__file__).parents[1], _others() | user.environment
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == model
    # the same rounded weights from a folder, whole: what rounding them changes is no part of it
    for name, content in half.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    expected = _painted(minpaint.load(tmp_path / "folder", device="cpu", dtype="fp32"))
    assert largest_level_difference(Image.open(tmp_path / "run" / "out.png"), expected) <= 1

    names = set(_sharded(half, tmp_path)) - {"model_index.json"}
    assert set(tiny_hub.fetched()) == names
    tiny_hub.close()
    assert user.fetch(NAME, FIRST) == names


def _sharded(files: Files, folder: Path) -> Files:
    """The same checkpoint with the UNet in two files, as diffusers writes them."""
    base = "diffusion_pytorch_model"
    (folder / "whole").write_bytes(files[HALF[0]])
    whole = load_file(folder / "whole")
    shards = {f"{base}.fp16-0000{k + 1}-of-00002.safetensors": sorted(whole)[k::2] for k in range(2)}
    weight_map = {key: name for name, keys in shards.items() for key in keys}
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    sharded = {name: content for name, content in files.items() if name != HALF[0]}
    sharded[f"unet/{base}.safetensors.index.fp16.json"] = index
    for name, keys in shards.items():
        save_file({key: whole[key] for key in keys}, folder / name)
        sharded[f"unet/{name}"] = (folder / name).read_bytes()
    return sharded


@pytest.mark.parametrize("shard", ["diffusion_pytorch_model.bin", "../../secret.safetensors", "/etc/x.safetensors", 5])
def test_an_index_brings_nothing_but_safetensors_beside_it(tiny_hub: TinyHub, user: User, shard: object) -> None:
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    files = {name: content for name, content in FAKE_PLAIN.items() if name != PLAIN[0]}
    tiny_hub.publish(files | UNWANTED | {index: json.dumps({"weight_map": {"a": shard}}).encode()})
    with pytest.raises(CheckpointError, match=re.escape(index)):
        user.fetch(NAME)
    assert set(tiny_hub.fetched()) == {*SETTINGS, index, *PLAIN[1:]}


def test_a_repository_without_what_a_run_needs_is_refused_before_anything_is_downloaded(
    tiny_hub: TinyHub, user: User
) -> None:
    tiny_hub.publish(FAKE | UNWANTED | {PLAIN[0]: b"weights", "vae/another.safetensors": b"weights"})
    tiny_hub.publish({"model.gguf": b"weights"}, "someone/else")
    with pytest.raises(CheckpointError, match=r"missing: vae/\*\.safetensors, text_encoder/\*\.safetensors"):
        user.fetch(NAME)
    with pytest.raises(CheckpointError, match=r"someone/else.*unet/config.json.*tokenizer/vocab.json"):
        user.fetch("someone/else")
    assert tiny_hub.fetched() == []


# ---- one cache for many runs ----


def test_fp32_does_not_make_do_with_the_fp16_weights_of_an_earlier_run(tiny_hub: TinyHub, user: User) -> None:
    tiny_hub.publish(FAKE_PLAIN | FAKE_HALF)
    assert user.fetch(NAME, FIRST, True) == {*SETTINGS, *HALF}
    assert user.fetch(NAME, FIRST, False) == {*SETTINGS, *HALF, *PLAIN}


def test_files_that_diffusers_has_fetched_are_used(tiny_hub: TinyHub, user: User) -> None:
    tiny_hub.publish(FAKE_PLAIN | UNWANTED)
    user.run(_fill_cache_as_diffusers_does, [*SETTINGS, *PLAIN])
    tiny_hub.requests.clear()
    assert user.fetch(NAME, HF_HUB_OFFLINE="1") == {*SETTINGS, *PLAIN}
    assert user.fetch(NAME) == {*SETTINGS, *PLAIN}
    assert tiny_hub.fetched() == []


def test_offline_a_branch_is_what_was_last_fetched_whole(tiny_hub: TinyHub, user: User) -> None:
    tiny_hub.publish(FAKE_PLAIN)
    user.fetch(NAME)
    tiny_hub.publish({name: b"newer " + content for name, content in FAKE_PLAIN.items()}, commit=SECOND)
    tiny_hub.breaks.add(PLAIN[2])
    with pytest.raises(CheckpointError, match=PLAIN[2]):
        user.fetch(NAME)
    folder = user.run(hub.fetch, NAME, None, False, HF_HUB_OFFLINE="1")
    assert folder.name == FIRST
    assert _read(folder) == FAKE_PLAIN
    tiny_hub.breaks.clear()
    user.fetch(NAME)
    assert user.run(hub.fetch, NAME, None, False, HF_HUB_OFFLINE="1").name == SECOND


def test_a_repository_that_was_removed_since_runs_from_the_cache(tiny_hub: TinyHub, user: User) -> None:
    tiny_hub.publish(FAKE_PLAIN)
    user.fetch(NAME)
    del tiny_hub.repositories[NAME]
    assert user.fetch(NAME) == {*SETTINGS, *PLAIN}


# ---- refusals ----


def test_a_token_goes_to_the_hub_and_nowhere_else(tiny_hub: TinyHub, user: User) -> None:
    tiny_hub.publish(FAKE_PLAIN)
    user.fetch(NAME, HF_TOKEN="hf_secret")
    for request in tiny_hub.requests:
        assert request.token == (None if request.path.startswith("/cdn/") else "Bearer hf_secret")
    assert any(request.path.startswith("/cdn/") for request in tiny_hub.requests)


@pytest.mark.parametrize(
    ("model", "beginning", "status", "code", "message"),
    [
        (NAME, f"/api/models/{NAME}", 403, "GatedRepo", f"{NAME}: access must be asked for"),
        (NAME, f"/{NAME}/resolve", 403, "GatedRepo", f"{NAME}: access must be asked for"),
        (NAME, f"/api/models/{NAME}", 404, "RepoNotFound", f"{NAME}: the hub has no such repository"),
        ("no/body", "/nothing", 401, "", "no/body: the hub has no such repository"),
        ("no/--body", "/nothing", 401, "", "no/--body: the hub has no such repository"),
        (f"{NAME}@v2", "/nothing", 404, "", f"{NAME}@v2: the hub has no such revision"),
        (f"{NAME}@{SECOND}", "/nothing", 404, "", f"{NAME}@{SECOND}: the hub has no such revision"),
        (NAME, "/api", 500, "", f"{NAME}: not complete in the cache, and the hub cannot be reached"),
        (NAME, f"/{NAME}/resolve/{FIRST}/vae", 404, "EntryNotFound", f"{NAME}: vae/config.json"),
    ],
    ids=["gated", "gated files", "404", "401", "no name", "revision", "commit", "broken hub", "no such file"],
)
def test_a_refusal_is_one_line_that_says_why(
    tiny_hub: TinyHub, user: User, tmp_path: Path, model: str, beginning: str, status: int, code: str, message: str
) -> None:
    tiny_hub.publish(FAKE_PLAIN)
    tiny_hub.refusals[beginning] = status, code
    assert message in user.refused(model, tmp_path / "run")


@pytest.mark.parametrize("offline", ["0", "1"], ids=["no network", "offline mode"])
def test_without_network_and_cache_the_way_out_is_named(
    tiny_hub: TinyHub, user: User, tmp_path: Path, offline: str
) -> None:
    tiny_hub.close()
    line = user.refused(NAME, tmp_path / "run", HF_HUB_OFFLINE=offline)
    assert f"{NAME}: not complete in the cache" in line
    assert "go online once, or give a folder" in line


def test_a_download_that_breaks_off_leaves_nothing_that_is_used(tiny_hub: TinyHub, user: User, tmp_path: Path) -> None:
    tiny_hub.publish(FAKE_PLAIN)
    tiny_hub.breaks.add(PLAIN[1])
    code, said = user.run(_command, _arguments(NAME, tmp_path / "run"))
    assert code == 2
    assert "Traceback" not in said
    assert re.search(rf"minpaint: error: {NAME}: .*{PLAIN[1]}.* cannot be fetched", said.splitlines()[-1])
    for revision in (None, FIRST):
        with pytest.raises(CheckpointError, match="not complete in the cache"):
            user.fetch(NAME, revision, HF_HUB_OFFLINE="1")

    tiny_hub.breaks.clear()
    tiny_hub.requests.clear()
    folder = user.run(hub.fetch, NAME, None, False)
    assert _read(folder) == FAKE_PLAIN
    again = set(tiny_hub.fetched())  # files are fetched several at a time, and PLAIN[2] may have come before
    assert PLAIN[1] in again
    assert again <= {PLAIN[1], PLAIN[2]}


# ---- a hub, or a network before it, that misbehaves ----

PLACES = {
    "model": f"/api/models/{NAME}",
    "tree": f"/api/models/{NAME}/tree",
    "small file": f"/{NAME}/resolve/{FIRST}/vae/config.json",
    "weights": f"/cdn/{sha256(FAKE_PLAIN[PLAIN[1]])}",
}
FAULTS: dict[str, Fault] = {
    "stall": tiny_hub_module.stall,
    "stall halfway": tiny_hub_module.stall_halfway,
    "reset": tiny_hub_module.reset,
    "too little": tiny_hub_module.too_little,
    "too much": tiny_hub_module.too_much,
    "a web page": tiny_hub_module.web_page,
    "other content": tiny_hub_module.other_content,
    "redirect to a file": tiny_hub_module.redirect("file:///etc/passwd"),
    "redirect to nowhere": tiny_hub_module.redirect("http://127.0.0.1:1/nothing"),
    "redirect in a circle": lambda handler, *_: tiny_hub_module.redirect(handler.path)(handler, b"", {}),
    **{str(code): tiny_hub_module.status(code) for code in (401, 403, 404, 500, 503)},
    "429": tiny_hub_module.status(429, Retry_After="3600"),
    "429 of a kind": tiny_hub_module.status(429, RateLimit='"api";r=0;t=290'),
}
FAST = {("model", "stall"), ("weights", "other content"), ("weights", "429"), ("tree", "403")}
# Small files carry no hash to compare with. What huggingface_hub tries again takes 24 s in a list of files: one of it.
LEFT_OUT = {("small file", "other content")}
LEFT_OUT |= {("tree", fault) for fault in ("stall", "reset", "redirect to nowhere", "redirect in a circle", "500")}
ALL = [(place, fault) for place in PLACES for fault in FAULTS if (place, fault) not in LEFT_OUT]


@pytest.mark.parametrize(
    ("place", "fault"),
    [pytest.param(*pair, marks=[] if pair in FAST else [pytest.mark.slow], id=" ".join(pair)) for pair in ALL],
)
def test_a_fault_of_the_hub_is_one_line_in_bounded_time_and_the_next_run_heals_it(
    tiny_hub: TinyHub, user: User, tmp_path: Path, place: str, fault: str
) -> None:
    tiny_hub.publish(FAKE_PLAIN)
    tiny_hub.faults[PLACES[place]] = FAULTS[fault]
    started = time.monotonic()
    limits = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_VERBOSITY": "error"}
    line = user.refused(NAME, tmp_path / "run", **limits)
    assert time.monotonic() - started < 60
    assert NAME in line
    assert len(line) < 600
    if fault.startswith("429"):
        assert "wait some minutes" in line
    with pytest.raises(CheckpointError):
        user.fetch(NAME, HF_HUB_OFFLINE="1")  # nothing passes for complete

    tiny_hub.faults.clear()
    assert _read(user.run(hub.fetch, NAME, None, False)) == FAKE_PLAIN


# ---- single files, VAEs and LoRAs in repositories ----


def _single(model: str, *more: str) -> bytes:
    painter = minpaint.load(model, device="cpu", dtype="fp32", vae=more[0] or None, lora=more[1:] or None)
    return _painted(painter).tobytes()


@pytest.mark.slow
def test_a_file_of_a_repository_paints(
    tiny_hub: TinyHub,
    user: User,
    copy: Callable[[str], Path],
    tmp_path: Path,
    reference: Image.Image,
) -> None:
    folder = copy("small-sd1")
    path = write_single_file(folder, tmp_path / "one.safetensors", False)
    tiny_hub.publish({"inpainting/model v1.safetensors": path.read_bytes(), "README.md": b"# A model"})
    model = f"{NAME}/inpainting/model v1.safetensors"
    for place in (model, f"{model}@main", f"{model}@{FIRST}"):
        assert user.paint(place, "fp32", str(folder)).tobytes() == reference.tobytes()
    assert tiny_hub.fetched().count("inpainting/model v1.safetensors") == 1
    line = user.refused(f"{NAME}/no such.safetensors", tmp_path / "run")
    assert f"{NAME}: has no no such.safetensors; look at its list of files" in line
    assert "the hub has no such revision" in user.refused(f"{model}@no-such", tmp_path / "run")


@pytest.mark.slow
def test_vaes_loras_and_safety_checkers_of_repositories(
    tiny_hub: TinyHub,
    user: User,
    plain: Files,
    copy: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    lora = write(tmp_path / "pytorch_lora_weights.safetensors", folder := copy("small-sd1"), "kohya")
    names = {"config.json": "vae/config.json", "diffusion_pytorch_model.safetensors": PLAIN[1]}
    tiny_hub.publish(plain)
    tiny_hub.publish({name: plain[file] for name, file in names.items()}, "who/vae")
    tiny_hub.publish({lora.name: lora.read_bytes(), "sub/other.safetensors": lora.read_bytes()}, "who/lora")
    tiny_hub.repositories[NAME].branches["refs/pr/3"] = tiny_hub.repositories[NAME].branches["main"]
    local = minpaint.load(folder, device="cpu", dtype="fp32", lora=f"{lora}:0.5")
    expected = _painted(local).tobytes()
    for entry in ("who/lora:0.5", "who/lora/sub/other.safetensors:0.5"):
        assert user.run(_single, f"{NAME}@refs/pr/3", "who/vae", entry) == expected
    model = f"{NAME}@refs/pr/3"
    assert user.run(_single, model, "who/vae", "who/lora:0.5", HF_HUB_OFFLINE="1") == expected
    code, said = user.run(_command, [*_arguments(NAME, tmp_path / "run"), "--safety", "--quiet"])
    assert code == 2
    assert "has no safety_checker/config.json or safety_checker/model.safetensors" in said


# ---- the catalogue and its checksums ----


def _known(**changed: str) -> hub.Known:
    digests = {name: sha256(FAKE_PLAIN[name]) for name in PLAIN} | dict.fromkeys(HALF, "0" * 64)
    return hub.Known(NAME, FIRST, digests | {PLAIN[0]: changed.get("unet", digests[PLAIN[0]])})


def test_files_of_the_catalogue_are_compared_with_what_was_published(tiny_hub: TinyHub, user: User) -> None:
    tiny_hub.publish(FAKE_PLAIN)
    assert user.fetch(NAME, FIRST, False, _known()) == {*SETTINGS, *PLAIN}
    with pytest.raises(CheckpointError, match=rf"{PLAIN[0]}: differs from the published file"):
        user.fetch(NAME, FIRST, False, _known(unet="1" * 64))


def test_a_damaged_file_is_fetched_again_once_the_named_one_is_deleted(
    tiny_hub: TinyHub, user: User, tmp_path: Path
) -> None:
    tiny_hub.publish(FAKE_PLAIN)
    folder = user.run(hub.fetch, NAME, FIRST, False)
    (folder / PLAIN[0]).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"delete .* and fetch it again") as caught:
        user.fetch(NAME, FIRST, False, _known())
    found = re.search("delete (.*) and fetch it again", str(caught.value))
    assert found is not None
    Path(found[1]).unlink()
    user.fetch(NAME, FIRST, False, _known())
    assert _read(folder) == FAKE_PLAIN


def test_a_verified_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"published")
    hub.verify(path, sha256(b"published"))
    state = path.stat()
    path.write_bytes(b"different")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    hub.verify(path, sha256(b"published"))  # nothing tells that it changed, unless it is read

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty cache"))
    with pytest.raises(CheckpointError, match="weights: differs from the published file"):
        hub.verify(path, sha256(b"published"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))
    with pytest.raises(CheckpointError, match="weights: differs from the published file"):
        hub.verify(path, sha256(b"published"))
    with pytest.raises(CheckpointError, match="weights: differs from the published file"):
        hub.verify(path, sha256(b"another"))


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    (tmp_path / "weights").write_bytes(b"published")
    for _ in range(2):
        hub.verify(tmp_path / "weights", sha256(b"published"))
    with pytest.raises(CheckpointError):
        hub.verify(tmp_path / "weights", sha256(b"another"))


@pytest.mark.parametrize("name", hub.catalogue())
def test_a_name_of_the_catalogue_takes_the_published_weights_only(
    tiny_hub: TinyHub, user: User, tmp_path: Path, name: str
) -> None:
    entry = hub.catalogue()[name]
    tiny_hub.publish(FAKE_HALF, entry.repository, entry.revision)
    line = user.refused(name, tmp_path / "run")
    assert f"{HALF[0]}: differs from the published file" in line


@pytest.mark.parametrize("name", hub.catalogue())
def test_an_entry_of_the_catalogue_is_well_formed(name: str) -> None:
    entry = hub.catalogue()[name]
    assert HUB_ID.fullmatch(entry.repository)
    assert "@" not in entry.repository
    assert re.fullmatch("[0-9a-f]{40}", entry.revision)
    for file, digest in entry.sha256.items():
        assert file in PLAIN + HALF
        assert re.fullmatch("[0-9a-f]{64}", digest)


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("sd15", "stable-diffusion-v1-5/stable-diffusion-inpainting"),
        ("sd2", "stabilityai/stable-diffusion-2-inpainting"),
    ],
)
def test_the_catalogue_says_what_the_publishers_say(name: str, section: str) -> None:
    if not OFFICIAL.is_file():
        pytest.skip("the facts about the official checkpoints are not beside this checkout")
    sections = {text.split("\n")[0]: text for text in OFFICIAL.read_text(encoding="utf-8").split("\n## ")}
    (heading,) = [heading for heading in sections if heading.startswith(section)]
    rows = re.findall(r"\| (\S+/\S+) \| [^|]* \| ([0-9a-f]{64}) \|", sections[heading])
    entry = hub.catalogue()[name]
    assert dict(entry.sha256) == dict(rows)
    if "revision" in heading:
        assert heading == f"{entry.repository}, revision {entry.revision}"


# ---- choices ----


@pytest.mark.parametrize(
    ("names", "half_wanted", "chosen"),
    [
        (["model.safetensors", "model.fp16.safetensors"], False, "model.safetensors"),
        (["model.safetensors", "model.fp16.safetensors"], True, "model.fp16.safetensors"),
        (["model.fp16.safetensors", "model.bin"], False, "model.fp16.safetensors"),
        (["model.safetensors", "model.non_ema.safetensors"], True, "model.safetensors"),
        (["model.safetensors.index.json", "model.fp16.safetensors"], False, "model.safetensors.index.json"),
        (["model.safetensors", "model.safetensors.index.fp16.json"], True, "model.safetensors.index.fp16.json"),
        (["model.bf16.safetensors"], False, "model.bf16.safetensors"),
        (["model.a.safetensors", "model.b.safetensors"], False, None),
        (["model.bin", "pytorch_model.bin", "other.safetensors"], False, None),
    ],
)
def test_one_file_of_each_component_is_chosen(names: list[str], half_wanted: bool, chosen: str | None) -> None:
    found = hub.choose_weights({f"text_encoder/{name}" for name in names}, "text_encoder", half_wanted)
    assert found == (chosen and f"text_encoder/{chosen}")


# ---- the tokenizer of a single file ----


@pytest.mark.slow
def test_a_single_file_without_tokenizer_takes_clips_from_the_hub_once(
    tiny_hub: TinyHub, user: User, checkpoint: Callable[[str], Path], reference: Image.Image, tmp_path: Path
) -> None:
    path, config = tmp_path / "weights.safetensors", tmp_path / "config"
    write_single_file(checkpoint("small-sd1"), path, open_clip=False)
    shutil.copytree(checkpoint("small-sd1"), config, ignore=shutil.ignore_patterns("tokenizer", "*.safetensors"))
    write_tokenizer(tmp_path / "clip", 514, "<|endoftext|>")
    tiny_hub.publish(_read(tmp_path / "clip") | {"pytorch_model.bin": b"not needed"}, hub.CLIP_TOKENIZER)

    painted = user.paint(str(path), "fp32", str(config))
    assert largest_level_difference(painted, reference) <= 1
    assert sorted(tiny_hub.fetched()) == ["merges.txt", "vocab.json"]
    tiny_hub.requests.clear()
    user.run(hub.fetch_tokenizer)
    assert tiny_hub.requests == []


def test_without_clips_tokenizer_the_way_out_is_named(tiny_hub: TinyHub, user: User) -> None:
    for offline in ("0", "1"):  # the hub has no such repository, or is not asked
        with pytest.raises(CheckpointError, match=rf"{hub.CLIP_TOKENIZER}: .*put vocab.json and merges.txt beside"):
            user.run(hub.fetch_tokenizer, HF_HUB_OFFLINE=offline)
