"""Which device is chosen, what is said of one, and that one of any maker, or one that is absent, is no traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import minpaint
from minpaint.cli.main import main
from minpaint.engine.budget import (
    capped,
    choose_budget,
    free_memory,
    is_out_of_memory,
    peak_memory,
    release_cached,
    reset_peak,
    used_memory,
)
from minpaint.engine.cuda import attention_is_fused, exact_float32
from minpaint.engine.device import choose_arithmetic, choose_device, choose_dtype

GPUS = ("cuda", "xpu:1", "mps")


def attach(monkeypatch: pytest.MonkeyPatch, **counts: int) -> None:
    """Let PyTorch see so many devices of each kind."""
    for kind in ("cuda", "xpu"):
        count = counts.get(kind, 0)
        monkeypatch.setattr(getattr(torch, kind), "is_available", lambda count=count: count > 0)
        monkeypatch.setattr(getattr(torch, kind), "device_count", lambda count=count: count)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in counts)


@pytest.mark.parametrize(
    ("counts", "chosen"),
    [
        ({"cuda": 1, "xpu": 1, "mps": 1}, "cuda"),
        ({"xpu": 2, "mps": 1}, "xpu"),
        ({"mps": 1}, "mps"),
        ({}, "cpu"),
    ],
)
def test_auto_is_the_first_gpu_there_is(monkeypatch: pytest.MonkeyPatch, counts: dict[str, int], chosen: str) -> None:
    attach(monkeypatch, **counts)
    device = choose_device("auto")
    assert device == torch.device(chosen)
    assert choose_dtype("auto", device) == (torch.float32 if chosen == "cpu" else torch.float16)
    assert choose_arithmetic(torch.device("xpu"), torch.bfloat16) == torch.bfloat16


def test_a_device_beyond_those_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    attach(monkeypatch, cuda=1, xpu=2)
    assert choose_device("xpu:1") == torch.device("xpu", 1)
    for name in ("cuda:1", "xpu:2", "mps"):
        with pytest.raises(minpaint.InputError, match=f"device {name}: PyTorch sees"):
            choose_device(name)
        assert str(choose_device(name, absent=True)) == name


@pytest.mark.parametrize("name", ["tpu", "mps:1", "xpu:x", "xpu:", "cuda:-1", "cpu:0", "cuda:12345678901", " cuda", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(minpaint.InputError, match="unknown; use auto, cpu, cuda"):
        choose_device(name, absent=True)


@pytest.mark.parametrize("name", GPUS)
def test_painting_on_an_absent_gpu_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    picture: Image.Image,
    mask: Image.Image,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    attach(monkeypatch)
    for file, image in (("image", picture), ("mask", mask)):
        image.save(tmp_path / f"{file}.png")
    files = [
        "--image",
        str(tmp_path / "image.png"),
        "--mask",
        str(tmp_path / "mask.png"),
        "-o",
        str(tmp_path / "o.png"),
    ]
    model = ["--model", str(checkpoint("small-sd1"))]
    assert main(["paint", *files, *model, "--prompt", "a dog", "--device", name, "--quiet"]) == 2
    kind = f"minpaint: error: device {name}: PyTorch sees no such device(s); use --device cpu\n"
    assert capsys.readouterr().err == kind


@pytest.mark.parametrize(
    ("name", "hip", "says", "never"),
    [
        pytest.param("cuda", None, ["CUDA context"], ["ROCm"], marks=pytest.mark.slow),
        ("cuda", "6.2", ["driver of ROCm"], ["CUDA context"]),
        pytest.param("xpu", None, ["driver of xpu", "nothing enforces it"], ["CUDA"], marks=pytest.mark.slow),
        ("mps", None, ["driver of mps", "nothing enforces it", "does not measure peaks on mps"], ["CUDA"]),
        pytest.param("cpu", None, ["the interpreter"], ["driver"], marks=pytest.mark.slow),
    ],
)
def test_a_plan_says_what_it_cannot_promise(
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    name: str,
    hip: str | None,
    says: list[str],
    never: list[str],
) -> None:
    attach(monkeypatch)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert (
        main(["plan", "--model", str(checkpoint("small-sd1")), "--size", "64x64", "--budget", "1GiB", "--device", name])
        == 0
    )
    out = capsys.readouterr().out
    assert all(words in out for words in says)
    assert not any(words in out for words in never)
    assert "accelerated" not in out or name == "cpu"


def test_fast_shows_in_the_plan_for_cuda_alone(
    checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cuda", "mps"):
        model = ["--model", str(checkpoint("small-sd1"))]
        assert main(["plan", *model, "--size", "64x64", "--budget", "64MiB", "--device", name, "--fast"]) == 0
        assert ("accelerated" in capsys.readouterr().out) == (name == "cuda")


def test_attention_is_trusted_to_be_fused_where_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = {name: attention_is_fused(torch.device(name), torch.float16) for name in ("cpu", "cuda", "xpu", "mps")}
    assert fused == {"cpu": True, "cuda": True, "xpu": False, "mps": False}
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert not attention_is_fused(torch.device("cuda"), torch.float16)


OLD_XPU = {"is_available": lambda: True, "device_count": lambda: 1}
STAND_INS: dict[str, tuple[str, dict[str, Any]]] = {
    "torch 2.4 on xpu": ("xpu", {**OLD_XPU, "get_device_properties": lambda _: SimpleNamespace(total_memory=2**33)}),
    "torch 2.6 on xpu": (
        "xpu",
        {
            **OLD_XPU,
            "init": lambda: None,
            "reset_peak_memory_stats": lambda _: None,
            "max_memory_allocated": lambda _: 3 * 2**30,
            "memory_allocated": lambda _: 2 * 2**30,
            "memory_reserved": lambda _: 3 * 2**30,
            "mem_get_info": lambda _: (4 * 2**30, 2**33),
            "empty_cache": lambda: None,
        },
    ),
    "mps": (
        "mps",
        {
            "current_allocated_memory": lambda: 2 * 2**30,
            "driver_allocated_memory": lambda: 3 * 2**30,
            "recommended_max_memory": lambda: 2**33,
            "empty_cache": lambda: None,
        },
    ),
    "torch 2.4 on mps": (
        "mps",
        {"current_allocated_memory": lambda: 0, "driver_allocated_memory": lambda: 0, "empty_cache": lambda: None},
    ),
}
FIGURES = {  # in GiB: used, free, peak
    "torch 2.4 on xpu": (0, 8, 0),
    "torch 2.6 on xpu": (2, 5, 3),
    "mps": (2, 5, 3),
    "torch 2.4 on mps": (0, 2**30, 0),
}


@pytest.mark.parametrize("which", STAND_INS)
def test_memory_is_asked_for_as_far_as_pytorch_can_tell(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    kind, functions = STAND_INS[which]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, kind, SimpleNamespace(**functions))
    device = torch.device(kind)
    reset_peak(device)
    release_cached(device)
    with capped(device, 2**30), exact_float32(device, torch.float32):
        figures = used_memory(device), free_memory(device), peak_memory(device)
    assert figures == tuple(gib * 2**30 for gib in FIGURES[which])
    assert choose_budget("1GiB", device) == 2**30


def test_every_makers_refusal_of_memory_is_known() -> None:
    for message in ("MPS backend out of memory (MPS allocated: 9 GB)", "XPU out of memory. Tried to allocate 2 GiB"):
        assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(RuntimeError("MPS backend does not support float64"))
