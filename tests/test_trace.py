"""What a trace keeps of a run, and the page it becomes; what a browser makes of that page is in test_pages.py."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_mask, make_picture, relative_error
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file

import minpaint
from minpaint.cli.main import main
from minpaint.errors import MinpaintWarning
from minpaint.painter import Painter
from minpaint.picture.frame import open_frame
from minpaint.settings import Settings
from minpaint.study.attention import attention_weights, positions_of, word_positions
from minpaint.study.trace import Trace, save_raw, spread, trace_run
from minpaint.study.trace_page import trace_page

Painters = Callable[[str], Painter]
EXAMPLE = Path(__file__).parent.parent / "weights" / "example"


def traced(
    painter: Painter, image: Image.Image, mask: Image.Image, prompt: str, inside: bool = True, **options: object
) -> Trace:
    settings = painter.complete(Settings(prompt, **options))  # type: ignore[arg-type]
    return trace_run(painter, open_frame(image, mask, settings), settings, inside=inside)


def example(painter: Painter, prompt: str = "a red tower", **options: object) -> Trace:
    image, mask = (Image.open(EXAMPLE / name) for name in ("picture.png", "mask.png"))
    return traced(painter, image, mask, prompt, **{"steps": 6, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tiny() -> Painter:
    return minpaint.load("tiny", device="cpu", dtype="fp32")


def two_holes(width: int, height: int) -> Image.Image:
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    draw.rectangle((2, 2, 20, 20), fill=255)
    draw.rectangle((width - 20, height - 18, width - 4, height - 4), fill=255)
    return mask


@pytest.mark.parametrize("family", ["small-sd1", "small-sd1-4ch", "small-v"])
@pytest.mark.parametrize("options", [{}, {"strength": 0.6, "count": 2, "sampler": "dpmpp"}, {"guidance": 1.0}])
def test_the_tensors_of_a_trace_are_those_of_the_run(
    painter: Painters, family: str, options: dict[str, object]
) -> None:
    """Without looking inside, to the last bit; and each step begins with what the step before ended with."""
    image, mask, painter_ = make_picture(), make_mask(), painter(family)
    trace = traced(painter_, image, mask, "two dogs", inside=False, steps=5, **options)
    paintings = painter_(image, mask, "two dogs", steps=5, **options)
    [part] = trace.parts
    assert len(part.steps) == len(part.inputs) == paintings[0].steps
    for painting, of_trace in zip(paintings, trace.paintings, strict=True):
        assert torch.equal(painting.latents, of_trace.latents)
        assert painting.image.tobytes() == of_trace.image.tobytes()
    assert torch.equal(part.steps[-1].x, torch.stack([painting.latents for painting in paintings]))
    for before, inputs in zip(part.steps, part.inputs[1:], strict=False):
        assert torch.equal(before.x, inputs)
    for i, (step, inputs) in enumerate(zip(part.steps, part.inputs, strict=True)):
        alpha_bar = trace.job.schedule.level(trace.job.schedule.timesteps[i])
        noised = math.sqrt(alpha_bar) * step.x0 + math.sqrt(1 - alpha_bar) * step.eps
        assert relative_error(noised, inputs) < 1e-5
    assert (part.conditioning is None) == (family == "small-sd1-4ch")


def test_looking_inside_changes_a_run_by_rounding_only(tiny: Painter) -> None:
    plain, inside = example(tiny, inside=False, steps=20), example(tiny, steps=20)
    assert relative_error(inside.paintings[0].latents, plain.paintings[0].latents) < 1e-5
    assert plain.parts[0].attention == {}
    assert plain.parts[0].decoded == {}


@pytest.mark.parametrize("options", [{}, {"count": 2}, {"guidance": 1.0}, {"count": 2, "guidance": 1.0}])
def test_attention_maps_are_the_mean_of_the_models_own_weights(tiny: Painter, options: dict[str, object]) -> None:
    """Computed again from the queries and keys that a hook sees, in another way."""
    count, guided = int(str(options.get("count", 1))), "guidance" not in options
    seen: dict[tuple[int, str], torch.Tensor] = {}

    def attend(name: str, step: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attend: object) -> None:
        if name.endswith("attn2"):
            of_prompt = attention_weights(q, k)[count:] if guided else attention_weights(q, k)
            seen[step, name] = of_prompt.mean(1)  # [count, cells, tokens]

    image, mask = (Image.open(EXAMPLE / name) for name in ("picture.png", "mask.png"))
    with tiny.watch(attend=attend):
        tiny(image, mask, "a red tower", steps=6, **options)
    [part] = example(tiny, **options).parts
    position = positions_of(tiny.tokenizer, "a red tower", "tower")
    assert sum(len(maps) for maps in part.attention.values()) == 6 * len(part.attention) > 0
    for (y, x), maps in part.attention.items():
        for step in range(6):
            same_size = [each for (at, _), each in seen.items() if at == step and each.shape[1] == y * x]
            expected = torch.stack([each[:, :, position].sum(2) for each in same_size]).mean(0).view(count, y, x)
            assert relative_error(maps[step][:, 2], expected) < 1e-4


def test_a_words_positions_are_those_of_its_tokens(tiny: Painter) -> None:
    prompt = "two purple-ish trees, and unbelievablyfarfetched clouds"
    ids = tiny.tokenizer(prompt).input_ids
    found = word_positions(tiny.tokenizer, prompt)
    assert [word for word, _ in found] == prompt.split()
    assert [position for _, positions in found for position in positions] == list(range(1, len(ids) - 1))
    for word, positions in found:
        pieces = [ids[position] for position in positions]
        assert tiny.tokenizer.decode(pieces).replace(" ", "") == word
    longest = word_positions(tiny.tokenizer, "tree " * 200)
    assert longest[-1][1][-1] == tiny.tokenizer.model_max_length - 2
    with pytest.raises(minpaint.InputError, match="no word 'boat'"):
        positions_of(tiny.tokenizer, prompt, "boat")


def test_the_map_to_colours_shows_what_the_vae_shows(tiny: Painter) -> None:
    """It explains most of the decoded picture's colours, where a constant explains none."""
    trace = example(tiny, steps=20)
    pixels = tiny.vae.decode(trace.paintings[0].latents[None] / tiny.vae_config.scaling_factor)
    colours = torch.nn.functional.adaptive_avg_pool2d(pixels, trace.paintings[0].latents.shape[1:])
    shown = trace.colours(trace.paintings[0].latents[None])
    unexplained = (shown - colours).square().mean() / (colours - colours.mean((2, 3), keepdim=True)).square().mean()
    assert unexplained < 0.15  # seen: 0.07


@pytest.mark.parametrize(
    ("size", "options", "parts"),
    [
        ((100, 60), {"count": 2}, 1),
        ((180, 140), {"separate": True, "context": 8}, 2),
        ((180, 140), {"separate": True, "count": 2, "expand": "left=24"}, 2),
        ((97, 71), {"profile": "diffusers"}, 1),
        ((64, 64), {"guidance": 0.0, "steps": 1}, 1),
    ],
)
def test_the_page_of_any_run_holds_all_of_it(
    painter: Painters, size: tuple[int, int], options: dict[str, object], parts: int
) -> None:
    trace = traced(
        painter("small-sd1"), make_picture(*size), two_holes(*size), "two red dogs", **{"steps": 3, **options}
    )
    assert len(trace.parts) == parts
    page, count = trace_page(trace), trace.job.settings.count
    assert page.count("<section class=steps>") == parts
    latents = 4 if trace.job.settings.guided else 3
    assert page.count("<canvas") == parts * count * (latents + 3)  # and three words
    for canvas in re.findall(r'<canvas data-sprite="([^"]+)"(?: data-word="[^"]*" data-under="([^"]+)")?', page):
        assert all(f'id="{name}"' in page or f"id={name} " in page for name in canvas if name)
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "http" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.S)  # the plots name their format's namespace
    assert [len(part.decoded) for part in trace.parts] == [min(3, len(trace.parts[0].steps))] * parts
    for part, view in zip(trace.parts, trace.job.views, strict=True):
        assert all(picture.size == view.extent for pictures in part.decoded.values() for picture in pictures)


def test_a_prompt_is_text_in_the_page_and_nothing_else(painter: Painters) -> None:
    page = trace_page(example(painter("small-sd1"), prompt='<script>alert(1)</script> & "tree" {body}', steps=1))
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; " in page


def test_raw_files_hold_every_tensor(painter: Painters, tmp_path: Path) -> None:
    image, mask = make_picture(180, 140), two_holes(180, 140)
    options = {"steps": 4, "separate": True, "count": 2}
    trace = traced(painter("small-sd1"), image, mask, "two dogs", **options)
    files = save_raw(trace, tmp_path / "new" / "raw")
    assert [file.name for file in files] == ["part-0.safetensors", "part-1.safetensors"]
    assert {file.name for file in (tmp_path / "new" / "raw").iterdir()} == {file.name for file in files}
    for file, part in zip(files, trace.parts, strict=True):
        raw = load_file(file)
        y, x = part.inputs[0].shape[2:]
        assert {raw[name].shape for name in ("inputs", "x", "x0", "eps", "eps_cond", "eps_uncond")} == {(4, 2, 4, y, x)}
        assert torch.equal(raw["x"][-1], part.steps[-1].x)
        assert raw["timesteps"].tolist() == [step.t for step in part.steps]
        assert raw["conditioning"].shape == (5, y, x)
        assert raw["to_rgb"].shape == (5, 3)
        assert {name for name in raw if name.startswith("embeddings")} == {
            "embeddings.prompt",
            "embeddings.negative_prompt",
        }
        for (rows, columns), maps in part.attention.items():
            assert torch.equal(raw[f"attention.{rows}x{columns}"], torch.stack(maps))
            assert raw[f"attention.{rows}x{columns}"].shape == (4, 2, 2, rows, columns)
        with safe_open(file, "pt") as opened:
            assert json.loads(opened.metadata()["words"]) == ["two", "dogs"]
            assert json.loads(opened.metadata()["settings"])["steps"] == 4


@pytest.mark.slow
def test_a_page_of_fifty_steps_at_512_pixels_is_small(tiny: Painter) -> None:
    """At most 15 MB, with a prompt of many words."""
    prompt = "a very old red brick house with a green door and a small garden under a pale winter sky at dusk"
    image, mask = (Image.open(EXAMPLE / name).resize((512, 512)) for name in ("picture.png", "mask.png"))
    with pytest.warns(MinpaintWarning, match="has no words for"):
        trace = traced(tiny, image, mask, prompt, steps=50, context="whole")
    assert trace.parts[0].inputs[0].shape[2:] == (64, 64)
    size = len(trace_page(trace).encode())
    print(f"{size / 1e6:.1f} MB")
    assert 2e6 < size < 15e6


def test_of_many_steps_the_page_shows_some() -> None:
    assert spread(3, 5) == [0, 1, 2]
    assert spread(1000, 5) == [0, 250, 500, 749, 999]
    assert spread(0, 5) == []


def test_the_painter_is_as_before_also_after_a_fault(tiny: Painter) -> None:
    before = tiny.around

    def stop(step: object) -> None:
        raise RuntimeError("enough")

    settings = tiny.complete(Settings("a red tower", steps=4))
    frame = open_frame(EXAMPLE / "picture.png", EXAMPLE / "mask.png", settings)
    with pytest.raises(RuntimeError, match="enough"):
        trace_run(tiny, frame, settings, stop)
    assert tiny.around is before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.unet.modules())


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    files = ["--image", str(EXAMPLE / "picture.png"), "--mask", str(EXAMPLE / "mask.png")]
    return ["trace", *files, "--prompt", "a red tower", "--steps", "3", "-o", str(tmp_path / "page.html")]


def test_trace_writes_a_page_and_the_tensors(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--raw", str(tmp_path / "raw"), "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["output"], report["raw"]) == (
        str(tmp_path / "page.html"),
        [str(tmp_path / "raw/part-0.safetensors")],
    )
    assert f"wrote {tmp_path / 'page.html'}" in err
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "raw"}


def test_trace_against_other_options_says_where_the_runs_part(
    command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*command, "--json", "--versus", "--eta 1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["options"] == {"eta": ["0.0", "1.0"]}
    assert (report["beyond_rounding"]["when"], report["beyond_rounding"]["what"]) == (
        "in step 1",
        "where the sampler goes",
    )
    assert main([*command, "--json", "--overwrite", "--versus=--seed 0"]) == 0
    assert json.loads(capsys.readouterr().out)["same"] is True


@pytest.mark.parametrize(
    ("more", "culprit"),
    [
        (["--versus", "--etta 1"], "versus '--etta 1': unrecognized arguments: --etta"),
        (["--versus", '"'], "versus '\"': No closing quotation"),
        (["--versus", "--eta 3"], "eta must be a number from 0 to 1"),
        (["-o", "page.png"], "output page.png: unknown kind of file; use .html"),
        (["-o", "nowhere/page.html"], "does not exist; create it first"),
        (["--raw", __file__], "exists; name a new folder"),
        (["--best"], "unrecognized arguments: --best"),
        (["--model", "nowhere/"], "nowhere"),
    ],
)
def test_what_cannot_be_traced_is_refused_in_one_line(
    command: list[str], more: list[str], culprit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *more]) == 2
    out, err = capsys.readouterr()
    [line] = [line for line in err.splitlines() if line.startswith("minpaint: error: ")]
    assert culprit in line
    assert (out, list(tmp_path.iterdir())) == ("", [])


def test_an_existing_page_is_kept_unless_told_otherwise(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page.html").write_text("precious")
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "page.html").read_text() == "precious"
    assert main([*command, "--overwrite"]) == 0


def test_without_matplotlib_one_line_says_what_to_install(
    command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(command) == 2
    assert 'pip install "minpaint[study]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_painting_imports_nothing_of_it(tmp_path: Path) -> None:
    """Nor does bad usage or --help of the verbs import anything heavy."""
    paint = "main(['paint', '--image', p, '--mask', m, '--prompt', 'a tree', '--steps', '1', '-o', 'out.png'])"
    code = (
        f"import sys; from minpaint.cli.main import main; p, m = {str(EXAMPLE / 'picture.png')!r}, "
        f"{str(EXAMPLE / 'mask.png')!r}; assert {paint} == 0; "
        "assert not [name for name in sys.modules if name.startswith(('minpaint.study', 'matplotlib'))]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
