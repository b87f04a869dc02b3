"""The command line: `python -m minpaint`. The only file that prints.

Messages and progress go to stderr; stdout carries the JSON object of --json and nothing else.
Exit codes: 0 done; 2 bad usage or bad input; 3 the budget cannot hold; 1 anything else.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from minpaint import __version__
from minpaint.errors import BudgetError, CheckpointError, InputError, MinpaintWarning

if TYPE_CHECKING:
    from PIL import Image
    from tqdm import tqdm

    from minpaint.samplers import Step

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
MODELS = "tiny, sd15, sd2, owner/name[@revision] of the hub, a folder or a .safetensors file"
WHAT_NEXT = """\
Try another prompt; the toy model knows a house, tree, boat, balloon, cloud and tower in eight colours:

  python -m minpaint paint --image {picture} --mask {mask} \\
      --prompt "a purple tree at night" -o tree.png

Your own photo, with Stable Diffusion 1.5 inpainting (2.1 GB, fetched once):

  python -m minpaint paint --model sd15 --image photo.png --mask mask.png \\
      --prompt "two dogs on a bench" -o out.png"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m minpaint",
        description="Stable Diffusion inpainting. Without a verb: repaint the bundled example.",
    )
    parser.add_argument("--version", action="version", version=f"minpaint {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    paint = verbs.add_parser(
        "paint",
        help="repaint the white part of a mask from a prompt",
        description="Repaint the white part of a mask from a prompt.",
    )
    add = paint.add_argument
    add("--image", required=True, metavar="FILE", help="the picture")
    add("--mask", required=True, metavar="FILE", help="white where to repaint")
    add("--prompt", required=True, metavar="TEXT", help="what to paint")
    add("-o", "--output", required=True, metavar="FILE", help=f"{', '.join(FORMATS)}; {{seed}} stands for the seed")
    add("--model", default=None, help=f"{MODELS} (default: tiny)")
    add("--config", default=None, metavar="FOLDER", help="configurations and tokenizer of a single-file model")
    add("--negative-prompt", default="", metavar="TEXT", help="what to stay away from")
    add("--steps", type=int, default=50, help="sampler steps (default: 50)")
    add("--guidance", type=float, default=7.5, help="weight of the prompt; 1 or less turns guidance off (default: 7.5)")
    add("--strength", type=float, default=1.0, help="how much noise the hole starts from, over 0 up to 1 (default: 1)")
    add("--sampler", default=None, choices=("ddim", "pndm", "dpmpp"), help="default: what the checkpoint names")
    add("--eta", type=float, default=0.0, help="randomness of ddim, 0 to 1 (default: 0)")
    add("--seed", type=int, default=0, help="one seed gives one picture (default: 0)")
    add("--count", type=int, default=1, help="pictures to paint, with seeds from --seed up (default: 1)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="of the networks (default: auto)")
    add("--budget", default=None, metavar="SIZE", help="memory the run may take (default: 15GiB)")
    add(
        "--profile",
        default="minpaint",
        choices=("minpaint", "diffusers"),
        help="diffusers: what its pipeline gives (default: minpaint)",
    )
    add("--json", action="store_true", help="print one JSON object on stdout")
    add("--quiet", action="store_true", help="no progress and no messages but errors")
    add("--overwrite", action="store_true", help="replace outputs that exist")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    try:
        options = _parser().parse_args(arguments)
        if options.verb is None:
            _demo()
        else:
            _paint(options)
    except BudgetError as error:
        return _fail(error, 3)
    except (InputError, CheckpointError) as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return _fail("stopped; nothing half-written is left", 1)
    except Exception as error:
        return _fail(str(error) or type(error).__name__, 1)
    return 0


def _fail(error: object, code: int) -> int:
    _say(f"minpaint: error: {' '.join(str(error).split())}")
    return code


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _demo() -> None:
    """Repaint the bundled example with the tiny model, into the current folder."""
    from minpaint.example import bundled, strip

    example = bundled()
    target = _free(Path("minpaint-example.png"))
    beside = target.with_name(f"{target.stem}-strip.png")
    image, mask = example.picture, example.mask
    options = ["--image", str(image), "--mask", str(mask), "--prompt", example.prompt, "--model", "tiny"]
    _paint(_parser().parse_args(["paint", *options, *example.options, "-o", str(target)]))
    _save(strip(image, mask, target), beside)
    _say(f"minpaint: wrote {beside} (before, mask, after)\n")
    _say(WHAT_NEXT.format(picture=image, mask=mask))


def _free(path: Path) -> Path:
    """The path, or the first numbered one beside it that nothing is called, nor its strip."""
    for number in itertools.count(1):
        found = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        if not found.exists() and not found.with_name(f"{found.stem}-strip.png").exists():
            return found
    raise AssertionError


def _paint(options: argparse.Namespace) -> None:
    started = time.perf_counter()

    def note(line: str) -> None:
        if not options.quiet:
            _say(f"minpaint: {line}")

    targets = _targets(options.output, options.seed, options.count, options.overwrite)
    if options.model is None:
        note("no --model given: using tiny, the bundled toy model")

    # the libraries' own chatter stays off the terminal; our warnings come as one line each
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if options.quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from minpaint import load
    from minpaint.image import open_image
    from minpaint.inpaint import Settings
    from minpaint.mask import check_mask

    # all that is cheap to find out comes before the weights
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    image, mask = open_image(options.image, "image"), open_image(options.mask, "mask")
    check_mask(image, mask)
    with warnings.catch_warnings(), _Progress(options.quiet) as progress:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", MinpaintWarning)
        warnings.showwarning = lambda message, *_: note(f"note: {message}")
        painter = load(options.model or "tiny", options.device, options.dtype, options.budget, options.config)
        note(f"{painter.name} on {painter.device}, {str(painter.dtype).removeprefix('torch.')}")
        paintings = painter.paint(image, mask, settings, progress)
    for painting, target in zip(paintings, targets, strict=True):
        _save(painting.image, target)
        note(f"wrote {target} (seed {painting.seed}, {painting.steps} network calls)")
    seconds = time.perf_counter() - started
    note(f"done in {seconds:.1f} s")
    if options.json:
        report = {
            "version": __version__,
            "model": painter.name,
            "device": str(painter.device),
            "dtype": str(painter.dtype).removeprefix("torch."),
            **asdict(settings),
            "sampler": settings.sampler or painter.scheduler_config.sampler,
            "steps_run": paintings[0].steps,
            "seconds": round(seconds, 3),
            "outputs": [
                {"path": str(target), "seed": p.seed, "width": p.image.width, "height": p.image.height}
                for p, target in zip(paintings, targets, strict=True)
            ],
        }
        print(json.dumps(report))


class _Progress:
    """A bar on stderr, one tick a network call; silent when nobody watches."""

    def __init__(self, quiet: bool) -> None:
        self.silent = quiet or not sys.stderr.isatty()
        self.bar: tqdm[NoReturn] | None = None

    def __enter__(self) -> _Progress:
        return self

    def __call__(self, step: Step) -> None:
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(total=step.total, unit="step", disable=self.silent, leave=False)
        self.bar.update()

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def _targets(pattern: str, seed: int, count: int, overwrite: bool) -> list[Path]:
    """The files to write, all of them known to be writable; InputError if one is not."""
    if count < 1:
        raise InputError(f"--count must be a whole number from 1 up, not {count}")
    if count > 1 and "{seed}" not in pattern:
        plain = Path(pattern)
        pattern = str(plain.with_name(f"{plain.stem}-{{seed}}{plain.suffix}"))
    targets = [Path(pattern.replace("{seed}", str(seed + k))) for k in range(count)]
    for target in targets:
        if target.suffix.lower() not in FORMATS:
            raise InputError(f"output {target}: unknown kind of file; use {', '.join(FORMATS)}")
        if target.is_dir():
            raise InputError(f"output {target} is a folder; name a file in it")
        if target.exists() and not overwrite:
            raise InputError(f"output {target} exists; add --overwrite to replace it")
        if not target.parent.is_dir():
            raise InputError(f"output {target}: the folder {target.parent} does not exist; create it first")
        try:
            tempfile.TemporaryFile(dir=target.parent).close()
        except OSError as error:
            raise InputError(f"output {target}: the folder {target.parent} is not writable ({error})") from None
    return targets


def _save(image: Image.Image, target: Path) -> None:
    """Write beside the target and rename, so that a killed run leaves no half picture."""
    kind = FORMATS[target.suffix.lower()]
    if kind == "JPEG" and image.mode in ("RGBA", "LA"):
        image = image.convert("RGB")  # JPEG has no transparency
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}-", suffix=target.suffix)
    try:
        with os.fdopen(handle, "wb") as file:
            image.save(file, kind, **({"quality": 95} if kind in ("JPEG", "WEBP") else {}))
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


if __name__ == "__main__":
    sys.exit(main())
