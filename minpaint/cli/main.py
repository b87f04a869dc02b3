"""The command line: `python -m minpaint`. The only file that prints.

Messages and progress go to stderr; stdout carries the JSON object of --json and nothing else.
Exit codes: 0 done; 2 bad usage or bad input; 3 the budget cannot hold; 1 anything else.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, fields
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from minpaint import __version__
from minpaint.errors import BudgetError, CheckpointError, InputError, MinpaintWarning
from minpaint.settings import FILLS, PROFILES, SAMPLERS, Settings

if TYPE_CHECKING:
    from tqdm import tqdm

    from minpaint.samplers import Step

SUFFIXES = ".png, .jpg, .jpeg, .webp, .tif, .tiff"
MODELS = "tiny, sd15, sd2, owner/name[@revision] of the hub, a folder or a .safetensors file"
REPEATED = ("model", "config", "image", "mask", "dtype")  # of a record, beside the settings
STREAM = "-"  # stdin as an input, stdout as the output
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


def _parser(repeated: dict[str, Any] | None = None) -> argparse.ArgumentParser:
    """The command line's grammar; `repeated` are other defaults for `paint`."""
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
    on_or_off = argparse.BooleanOptionalAction
    add = paint.add_argument_group("what to paint").add_argument
    add("--image", metavar="FILE", help="the picture; - reads stdin")
    add("--mask", metavar="FILE", help="white where to repaint (default: where the picture is transparent)")
    add("--prompt", metavar="TEXT", help="what to paint")
    add("--negative-prompt", default="", metavar="TEXT", help="what to stay away from")
    add("-o", "--output", required=True, metavar="FILE", help=f"{SUFFIXES}; {{seed}} stands for the seed; - is stdout")
    add("--like", metavar="FILE", help="repeat the run that painted FILE; options given here take precedence")
    add = paint.add_argument_group("the model and its sampler").add_argument
    add("--model", default=None, help=f"{MODELS} (default: tiny)")
    add("--config", default=None, metavar="FOLDER", help="configurations and tokenizer of a single-file model")
    add("--steps", type=int, default=50, help="sampler steps (default: 50)")
    add("--guidance", type=float, default=7.5, help="weight of the prompt; 1 or less turns guidance off (default: 7.5)")
    add("--strength", type=float, default=1.0, help="how much noise the hole starts from, over 0 up to 1 (default: 1)")
    add("--fill", default="original", metavar="KIND", choices=FILLS,
        help="what the hole starts from at a strength under 1 (default: original)")  # fmt: skip
    add("--sampler", default=None, choices=SAMPLERS, help="default: what the checkpoint names")
    add("--eta", type=float, default=0.0, help="randomness of ddim, 0 to 1 (default: 0)")
    add("--seed", type=int, default=0, help="one seed gives one picture (default: 0)")
    add("--count", type=int, default=1, help="pictures to paint, with seeds from --seed up (default: 1)")
    add("--best", action="store_true", help="of --count pictures, write the one whose seam shows least")
    add = paint.add_argument_group("the hole and its seam").add_argument
    add("--grow", type=int, default=0, metavar="N", help="pixels by which the hole grows outward (default: 0)")
    add("--feather", type=int, default=0, metavar="N", help="pixels outside over which the painting fades (default: 0)")
    add("--soft", action=on_or_off, default=False, help="grey in the mask means: repaint partly")
    add("--context", default="auto", metavar="N", type=lambda text: int(text) if text.isdecimal() else text,
        help="pixels around the hole for the network to see; whole: all; auto: all, or a crop if large")  # fmt: skip
    add("--separate", action=on_or_off, default=False, help="paint parts that are far apart one after the other")
    add("--expand", metavar="left=N,top=N,...", help="add pixels at the sides and paint them")
    add("--color-match", action=on_or_off, default=True, help="take the colour step out of the seam (default: on)")
    add("--explain-mask", metavar="FILE", help="draw every stage of the mask side by side")
    add = paint.add_argument_group("the machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="of the networks (default: auto)")
    add("--budget", default=None, metavar="SIZE", help="memory the run may take (default: 15GiB)")
    add(
        "--profile",
        default="minpaint",
        choices=PROFILES,
        help="diffusers: what its pipeline gives (default: minpaint)",
    )
    add("--json", action="store_true", help="print one JSON object on stdout")
    add("--quiet", action="store_true", help="no progress and no messages but errors")
    add("--overwrite", action="store_true", help="replace outputs that exist")
    add("--record", action=on_or_off, default=True, help="keep what repeats the run in the file (default: on)")
    paint.set_defaults(**(repeated or {}))
    plan = verbs.add_parser(
        "plan",
        help="say what a run will take, and how it will keep within a budget",
        description="Predict the memory of a run from a checkpoint's shapes; no weights are read, none fetched.",
    )
    plan.add_argument("--model", default="tiny", help=f"{MODELS} (default: tiny)")
    plan.add_argument("--config", default=None, metavar="FOLDER", help="configurations of a single-file model")
    plan.add_argument("--size", default="512x512", metavar="WxH", help="what the network paints (default: 512x512)")
    plan.add_argument("--count", type=int, default=1, help="pictures at once (default: 1)")
    plan.add_argument("--guidance", type=float, default=7.5, help="1 or less needs half the batch (default: 7.5)")
    plan.add_argument(
        "--device", default="auto", help="auto, cpu, cuda; one that this machine lacks is planned for too"
    )
    plan.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="default: auto")
    plan.add_argument("--budget", default=None, metavar="SIZE", help="default: 15GiB")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    info = verbs.add_parser(
        "info", help="print how a picture was painted", description="Print the record that minpaint left in a file."
    )
    info.add_argument("file", metavar="FILE", help="a picture that minpaint wrote; - reads stdin")
    info.add_argument("--json", action="store_true", help="print it as one JSON object")
    return parser


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options; those of a file to repeat stand in for the ones not given."""
    options = _parser().parse_args(arguments)
    if options.verb != "paint":
        return options
    if options.like is not None:
        record = _record_of(options.like)
        repeated = {*REPEATED, *(field.name for field in fields(Settings))}
        known = {key: value for key, value in record.items() if key in repeated}
        options = _parser(known).parse_args(arguments)
        options.repeats = record
    for name in ("image", "prompt"):
        if getattr(options, name) is None:
            raise InputError(f"--{name} is missing; see python -m minpaint paint --help")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    try:
        options = _parse(arguments)
        if options.verb is None:
            _demo()
        elif options.verb == "info":
            _info(options)
        elif options.verb == "plan":
            _plan(options)
        else:
            _paint(options)
    except BudgetError as error:
        return _fail(error, 3)
    except (InputError, CheckpointError) as error:
        return _fail(error, 2)
    except BrokenPipeError:  # whoever read stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
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


def _note(line: str) -> None:
    _say(f"minpaint: {line}")


def _quieten() -> None:
    """Keep the libraries' own chatter off the terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")


@contextmanager
def _no_collection() -> Iterator[Callable[[], None]]:
    """Without looking for garbage until what is given is called, and then not among what is there by now.

    What is imported and loaded is a great many objects, nearly all of which stay.
    """

    def begin() -> None:
        gc.freeze()
        gc.enable()

    gc.disable()
    try:
        yield begin
    finally:
        gc.unfreeze()
        gc.enable()


@contextmanager
def _told(note: Callable[[str], None]) -> Iterator[None]:
    """Our warnings as one line each, and nobody else's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", MinpaintWarning)
        warnings.showwarning = lambda message, *_: note(f"note: {message}")
        yield


def _demo() -> None:
    """Repaint the bundled example with the tiny model, into the current folder."""
    from minpaint.cli.example import bundled
    from minpaint.picture.image import open_image, strip
    from minpaint.picture.saving import save

    example = bundled()
    target = _free(Path("minpaint-example.png"))
    beside = target.with_name(f"{target.stem}-strip.png")
    image, mask = example.picture, example.mask
    options = ["--image", str(image), "--mask", str(mask), "--prompt", example.prompt, "--model", "tiny"]
    _paint(_parse(["paint", *options, *example.options, "-o", str(target)]))
    save(strip([open_image(file) for file in (image, mask, target)]), None, None, beside)
    _say(f"minpaint: wrote {beside} (before, mask, after)\n")
    _say(WHAT_NEXT.format(picture=image, mask=mask))


def _info(options: argparse.Namespace) -> None:
    """Print the record of a painting."""
    record = _record_of(options.file)
    if options.json:
        print(json.dumps(record))
        return
    for key, value in record.items():
        print(f"{key}: {value if isinstance(value, str) else json.dumps(value)}")


def _plan(options: argparse.Namespace) -> None:
    """Print what a run will take."""
    _quieten()
    from minpaint.checkpoint.load import outline
    from minpaint.engine.budget import choose_budget, format_size, used_memory
    from minpaint.engine.device import choose_device, choose_dtype, dtype_name
    from minpaint.engine.plan import Planner, Request, round_up
    from minpaint.picture.view import WHOLE

    size = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", options.size)
    if not size:
        raise InputError(f"size {options.size!r} is not WIDTHxHEIGHT in pixels; write it like 768x512")
    settings = Settings("", count=options.count, guidance=options.guidance)
    device = choose_device(options.device, absent=True)
    dtype = choose_dtype(options.dtype, device)
    with _told(_note):
        budget = choose_budget(options.budget, device)
        planner = Planner(outline(options.model, dtype_name(dtype) == "fp16", options.config), device, dtype)
    factor, native = planner.architecture.vae.factor, planner.architecture.unet.sample_size
    width, height = (-(-int(side) // factor) * factor for side in size.groups())
    request = Request(width, height, settings.count, settings.guidance > 1, again=False)
    base = used_memory(device)
    plan = planner.choose(request, budget, base)
    smallest, largest = planner.least(request, base), planner.largest(request, budget, base)
    if options.json:
        report = {"model": options.model, "width": width, "height": height, "count": settings.count}
        report |= {"device": str(device), "dtype": dtype_name(dtype), **plan.report()}
        print(json.dumps(report | {"smallest_budget": smallest, "largest_picture": largest}))
        return
    print(f"{options.model} at {width}x{height}, count {settings.count}, {dtype_name(dtype)} on {device}\n")
    print(f"{plan.table()}\n")
    print(f"predicted peak: {format_size(plan.peak)} of {format_size(budget)}")
    print(f"smallest budget for this: {round_up(smallest)}")
    if largest is not None:
        print(f"largest picture of this shape in {format_size(budget)}: {largest[0]}x{largest[1]}")
    if device.type == "cuda":
        print("the driver's CUDA context, 0.3 to 0.6 GiB, comes on top and is not in the budget")
    else:
        print(f"{format_size(base)} of it are the interpreter and the libraries")
    if width * height > WHOLE * (native * factor) ** 2:
        print("paint shows the network a crop of a picture of this size, unless told --context whole")


def _record_of(file: str) -> dict[str, Any]:
    from minpaint.picture.saving import read_record

    return read_record(_source(file))


def _source(file: str) -> str | BytesIO:
    """A file to read, or what comes on stdin."""
    return BytesIO(sys.stdin.buffer.read()) if file == STREAM else file


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
            _note(line)

    if options.model is None:
        note("no --model given: using tiny, the bundled toy model")

    _quieten()
    if options.quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with _told(note), _Progress(options.quiet) as progress, ThreadPoolExecutor(1) as beside, _no_collection() as loaded:
        from minpaint.engine.budget import format_size
        from minpaint.engine.device import dtype_name
        from minpaint.painter import open_painter
        from minpaint.picture.explain import explain
        from minpaint.picture.frame import open_frame
        from minpaint.picture.saving import check_target, save

        # all that is cheap to find out comes before the weights
        settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
        targets = _targets(options)
        _check_streams(options)
        image, mask = _source(options.image), None if options.mask is None else _source(options.mask)
        frame = open_frame(image, mask, settings)
        for target in targets:
            if isinstance(target, Path):
                check_target(target, frame.original.size)

        painter = open_painter(options.model or "tiny", options.device, options.dtype, options.budget, options.config)
        note(f"{painter.name} on {painter.device}, {dtype_name(painter.dtype)}")
        if options.explain_mask is not None:
            views = painter.views(frame, settings)
            if len(views) > 1:
                note(f"the picture is painted in {len(views)} parts; {options.explain_mask} explains the first")
            save(explain(frame, views[0]), None, None, Path(options.explain_mask))
            note(f"wrote {options.explain_mask}")
        records: list[Future[dict[str, Any]]] = []

        def on_step(step: Step) -> None:
            progress(step)
            if not records:
                loaded()
                # hashing the weights takes seconds of a core, and would have held up the first step
                records.append(beside.submit(_record, options, settings, painter, image, mask))

        paintings = painter.paint(frame, settings, on_step)
        [record] = records
        if hasattr(options, "repeats"):
            _compare_records(options.repeats, record.result(), note)

    seams = ", ".join(f"{painting.seam:.2f} (seed {painting.seed})" for painting in paintings)
    if options.best:
        note(f"seam errors: {seams}")
        best = min(range(len(paintings)), key=lambda number: paintings[number].seam)
        paintings, targets = [paintings[best]], [targets[best]]
    outputs = []
    for painting, target in zip(paintings, targets, strict=True):
        own = record.result() | {"seed": painting.seed} if options.record else None
        kept = frame if settings.profile == "minpaint" else None
        receipt = save(painting.image, kept, own, target)
        name = str(target) if isinstance(target, Path) else STREAM
        note(f"wrote {name} (seed {painting.seed}, {painting.steps} network calls)")
        note(f"seam error: {painting.seam:.2f} levels" + (f"; receipt: {receipt}" if receipt else ""))
        outputs.append(
            {
                "path": name,
                "seed": painting.seed,
                "width": painting.image.width,
                "height": painting.image.height,
                "seam": round(painting.seam, 3),
                "receipt": asdict(receipt) if receipt else None,
            }
        )
    run = painter.last_run
    assert run is not None
    memory = {"budget": run.plan.budget, "planned": run.plan.peak, "measured": run.measured}
    note("memory: " + ", ".join(f"{name} {format_size(size)}" for name, size in memory.items()))
    seconds = time.perf_counter() - started
    note(f"done in {seconds:.1f} s")
    if options.json:
        report = {
            "version": __version__,
            "model": painter.name,
            "device": str(painter.device),
            "dtype": str(painter.dtype).removeprefix("torch."),
            "memory": memory,
            **asdict(settings),
            "sampler": settings.sampler or painter.scheduler_config.sampler,
            "steps_run": paintings[0].steps,
            "seconds": round(seconds, 3),
            "outputs": outputs,
        }
        print(json.dumps(report))


def _record(options: argparse.Namespace, settings: Any, painter: Any, image: Any, mask: Any) -> dict[str, Any]:
    """All that is needed to paint the picture again, but for the seed of each."""
    import hashlib

    import torch

    from minpaint.checkpoint.hub import fingerprint, sha256
    from minpaint.engine.device import dtype_name

    def digest(source: str | BytesIO | None) -> str | None:
        if isinstance(source, BytesIO):
            return hashlib.sha256(source.getvalue()).hexdigest()
        return None if source is None else sha256(Path(source))

    return {
        "minpaint": __version__,
        "model": options.model or "tiny",
        "model_sha256": fingerprint(painter.files),
        "config": options.config,
        "image": options.image,
        "image_sha256": digest(image),
        "mask": options.mask,
        "mask_sha256": digest(mask),
        "dtype": dtype_name(painter.dtype),
        "device": painter.device.type,
        "torch": torch.__version__,
        **asdict(settings),
        "count": 1,
    }


def _compare_records(before: dict[str, Any], now: dict[str, Any], note: Any) -> None:
    """Say what is not as it was in the run that is repeated."""
    for name in ("model", "image", "mask"):
        key = f"{name}_sha256"
        if before.get(name) == now[name] and before.get(key) != now[key]:
            note(f"note: {name} {now[name]} is not what it was when the picture was painted first")
    if before.get("minpaint") != now["minpaint"]:
        note(f"note: painted first by version {before.get('minpaint')}, now by {now['minpaint']}")


class _Progress:
    """A bar on stderr, one tick a network call; silent when nobody watches."""

    def __init__(self, quiet: bool) -> None:
        self.silent = quiet or not sys.stderr.isatty()
        self.bar: tqdm[NoReturn] | None = None

    def __enter__(self) -> _Progress:
        return self

    def __call__(self, step: Step) -> None:
        from tqdm import tqdm

        if self.bar is None or step.i == 0:  # a bar for each part of the picture
            self.__exit__()
            self.bar = tqdm(total=step.total, unit="step", disable=self.silent, leave=False)
        self.bar.update()

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def _targets(options: argparse.Namespace) -> list[Path | BinaryIO]:
    """Where each painting goes, known to be writable; InputError if one is not."""
    pattern, seeds = options.output, range(options.seed, options.seed + options.count)
    explained = None if options.explain_mask is None else Path(options.explain_mask)
    if explained is not None:
        _check_writable(explained, options.overwrite)
    if pattern == STREAM:
        if len(seeds) > 1 and not options.best:
            raise InputError("output -: stdout takes one picture; leave out --count, add --best, or name a file")
        return [sys.stdout.buffer] * len(seeds)
    if len(seeds) > 1 and not options.best and "{seed}" not in pattern:
        plain = Path(pattern)
        pattern = str(plain.with_name(f"{plain.stem}-{{seed}}{plain.suffix}"))
    targets = [Path(pattern.replace("{seed}", str(seed))) for seed in seeds]
    for target in targets:
        _check_writable(target, options.overwrite)
        if explained is not None and target.resolve() == explained.resolve():
            raise InputError(f"output {target} is also the file of --explain-mask; name another")
    return [*targets]


def _check_writable(target: Path, overwrite: bool) -> None:
    from minpaint.picture.saving import FORMATS

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


def _check_streams(options: argparse.Namespace) -> None:
    if [options.image, options.mask, options.like].count(STREAM) > 1:
        raise InputError("stdin holds one picture; use - for only one of --image, --mask and --like")
    if options.output == STREAM and options.json:
        raise InputError("output -: stdout cannot take the picture and the object of --json; name a file")
