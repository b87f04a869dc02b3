"""The command line's options: one table, partly made from the fields of Settings, and the checks of files and streams.

Nothing heavy is imported here, so that `--help` and bad usage are answered at once.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import MISSING, fields
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from minpaint import __version__
from minpaint.errors import InputError
from minpaint.settings import HOLE, MACHINE, MODEL, WHAT, Settings

Note = Callable[[str], None]  # says one line on stderr; with --quiet it says nothing
STREAM = "-"  # stdin as an input, stdout as the output
LARGEST_FILE = 1 << 30  # bytes of an input that are read; the pixels that Pillow accepts take less, uncompressed
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")  # of the files that can be written
PAGES = (".html", ".htm")
WRITTEN = f"{', '.join(SUFFIXES)}; {{seed}} stands for the seed; - is stdout"
MODELS = "tiny, sd15, sd2, owner/name[/file.safetensors][@revision] of the hub, a folder or a file (default: tiny)"
FILE, DIR, AUTO, SWITCH = {"metavar": "FILE"}, {"metavar": "DIR"}, {"default": "auto"}, {"action": "store_true"}
SAFETY = {"nargs": "?", "const": "refuse", "choices": ("refuse", "report")}
ON_OFF = {"action": argparse.BooleanOptionalAction}
BATCH = {"metavar": "N", "type": int, "default": 4}
RAY = {"nargs": "?", "const": "local", "metavar": "ADDRESS"}


# the heading an option is listed under, its names, its help text, and what else argparse's add_argument takes
Option = tuple[str, str, str, dict[str, Any]]


def _settings(heading: str) -> list[Option]:
    """The fields of Settings under a heading; the help text ends with the default."""
    options = []
    for field in fields(Settings):
        default = None if field.default is MISSING else field.default
        number = isinstance(default, (int, float)) and not isinstance(default, bool)
        kind = {"type": type(default)} if number else ON_OFF if isinstance(default, bool) else {}
        shown = f"{default:g}" if number else "on" if default is True else default
        text = field.metadata["help"] + (f" (default: {shown})" if shown else "")
        arguments = {"default": default, **kind, **field.metadata["arguments"]}
        options.append((field.metadata["group"], f"--{field.name.replace('_', '-')}", text, arguments))
    return [option for option in options if option[0] == heading]


OPTIONS: list[Option] = [
    (WHAT, "--image", "the picture; - reads stdin", FILE),
    (WHAT, "--mask", "white where to repaint (default: where the picture is transparent)", FILE),
    *_settings(WHAT),
    (WHAT, "-o --output", WRITTEN, {**FILE, "required": True}),
    (WHAT, "--like", "repeat the run that painted FILE; options given here take precedence", FILE),
    (MODEL, "--model", MODELS, {}),
    (MODEL, "--vae", "take the VAE from a file, a folder or a hub id instead", {}),
    (
        MODEL,
        "--lora",
        "add a LoRA to the weights; may be given several times",
        {"metavar": "FILE[:WEIGHT]", "action": "append"},
    ),
    (MODEL, "--config", "configurations and tokenizer of a single-file model", {"metavar": "FOLDER"}),
    *_settings(MODEL),
    (MODEL, "--best", "of --count pictures, write the one whose seam shows least", SWITCH),
    (MODEL, "--safety", "have the checkpoint's safety checker look; refuse (exit code 4), or report and write", SAFETY),
    *_settings(HOLE),
    (HOLE, "--explain-mask", "draw every stage of the mask side by side", FILE),
    (MACHINE, "--device", "auto, cpu, cuda[:N], xpu[:N] or mps (default: auto)", AUTO),
    (MACHINE, "--fast", "on CUDA, also use graphs, fused layers and channels last, which no GPU has tested", SWITCH),
    (MACHINE, "--dtype", "of the networks (default: auto)", {**AUTO, "choices": ("auto", "fp32", "bf16", "fp16")}),
    (MACHINE, "--budget", "memory the run may take, or is refused at once (default: 15GiB)", {"metavar": "SIZE"}),
    *_settings(MACHINE),
    (MACHINE, "--json", "print one JSON object on stdout", SWITCH),
    (MACHINE, "--quiet", "no progress and no messages but errors", SWITCH),
    (MACHINE, "--overwrite", "replace outputs that exist, --image itself if named", SWITCH),
    (MACHINE, "--record", "keep what repeats the run in the file (default: on)", {**ON_OFF, "default": True}),
]
REPEATED = {"model", "vae", "config", "image", "mask", "dtype"} | {
    field.name for field in fields(Settings)
}  # by --like


class Verb(NamedTuple):
    """A verb of the command line: a line about it, a longer text, which of OPTIONS it takes, and options of its own."""

    summary: str
    text: str
    takes: set[str]
    own: list[Option]


def _taken(names: str) -> set[str]:
    return set(names.split())


PAINTED = {names for _, names, _, _ in OPTIONS}
VERBS = {
    "paint": Verb(
        "repaint the white part of a mask from a prompt",
        "Repaint the white part of a mask from a prompt.",
        PAINTED,
        [],
    ),
    "plan": Verb(
        "say what a run will take, and how it will keep within a budget",
        """Predict the memory of a run from a checkpoint's shapes; no weights are read, none fetched.
        A device that this machine lacks is planned for too.""",
        _taken("--model --vae --lora --config --guidance --count --device --fast --dtype --budget --json"),
        [(WHAT, "--size", "what the network paints (default: 512x512)", {"default": "512x512", "metavar": "WxH"})],
    ),
    "info": Verb(
        "print how a picture was painted",
        "Print the record that minpaint left in a file.",
        _taken("--json"),
        [(WHAT, "file", "a picture that minpaint wrote; - reads stdin", FILE)],
    ),
    "trace": Verb(
        "show what happens in a run, step by step",
        "Paint, and show in one HTML page what happens between the prompt and the picture.",
        PAINTED - {"-o --output", "--best", "--safety", "--explain-mask", "--record"},
        [
            (WHAT, "-o --output", "the page (default: trace.html)", {**FILE, "default": "trace.html"}),
            (WHAT, "--raw", "also write all tensors as safetensors into this folder", {"metavar": "FOLDER"}),
            (WHAT, "--versus", "compare with the same run with these options added", {"metavar": "'OPTIONS'"}),
        ],
    ),
    "compare": Verb(
        "show where two painted files' runs part",
        "Repeat the runs that painted two files, and show in one HTML page where they part and by how much.",
        _taken("--json --quiet --overwrite"),
        [
            (WHAT, "files", "a picture that minpaint wrote; its run is repeated", {**FILE, "nargs": 2}),
            (WHAT, "-o --output", "the page (default: compare.html)", {**FILE, "default": "compare.html"}),
        ],
    ),
    "parity": Verb(
        "say whether minpaint and diffusers agree on a checkpoint",
        """Run minpaint and diffusers (or a dump of another implementation) on one checkpoint, and name the first
        layer or step where they differ. Exit code 0: they agree, 1: they differ.""",
        _taken("--model --vae --lora --config --sampler --seed --device --dtype --json --quiet --overwrite"),
        [
            (WHAT, "--size", "what is painted (default: the model's own size, at most 256x256)", {"metavar": "WxH"}),
            (WHAT, "--steps", "sampler steps of the whole run (default: 4)", {"type": int}),
            (WHAT, "--html", "also write the whole table as a page", FILE),
            (WHAT, "--dump", "write the tensors of one side to a folder, and compare nothing", DIR),
            (WHAT, "--side", "whose tensors --dump writes (default: minpaint)", {"choices": ("minpaint", "diffusers")}),
            (WHAT, "--against", "compare with a dump in place of diffusers", DIR),
        ],
    ),
    "ui": Verb(
        "draw the mask and paint in a browser, on a page of this machine",
        "Serve the painter page, and print its URL. Ctrl-C stops it; pictures, masks and paintings stay in the folder.",
        _taken("--model --vae --lora --config --device --fast --dtype --budget --quiet"),
        [
            (WHAT, "-o --output", "where all is kept (default: minpaint-ui)", {**DIR, "default": "minpaint-ui"}),
            (MACHINE, "--port", "default: one that is free", {"type": int, "default": 0, "metavar": "N"}),
            (MACHINE, "--host", "address to listen on (default: 127.0.0.1)", {"default": "127.0.0.1"}),
            (MACHINE, "--listen-to-everyone", "let --host be an address that other machines can reach", SWITCH),
        ],
    ),
    "batch": Verb(
        "paint many pictures, and only what is not done yet",
        """Paint the rows of a manifest (.jsonl or .csv), or the pictures of a folder. A row has an image, a mask, a
        prompt, an output (a name in DIR) and what else an option here can say; the options are the rows' defaults.""",
        PAINTED - _taken("--image --mask --like --count --best --safety --explain-mask --record") - {"-o --output"},
        [
            (WHAT, "manifest", "a row for each painting, or a folder of name.png and name_mask.png", {}),
            (WHAT, "-o --output", "the folder of the paintings", {**DIR, "required": True}),
            (WHAT, "--masks", "a folder of masks with the pictures' names, or one mask for all", {"metavar": "MASKS"}),
            (MACHINE, "--shard", "paint only the I-th of N parts, such as 2/8", {"metavar": "I/N", "default": "1/1"}),
            (MACHINE, "--together", "rows that are painted in one batch if their sizes are equal (default: 4)", BATCH),
            (MACHINE, "--ray", "paint on a Ray cluster; without =ADDRESS, start one here", RAY),
        ],
    ),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if option := re.fullmatch(r"argument (?:-\w/)?(--[\w-]+): expected one argument", message):
            message += f" (one that begins with a dash is written {option[1]}=-...)"
        raise InputError(f"{message}; see {self.prog} --help")


def make_parser(record: dict[str, Any] | None = None) -> argparse.ArgumentParser:
    """The parser of all verbs; a record that --like repeats gives `paint` and `trace` their defaults."""
    text = "Stable Diffusion inpainting. Without a verb: repaint the bundled example."
    parser = _Parser(prog="python -m minpaint", description=text)
    parser.add_argument("--version", action="version", version=f"minpaint {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    for name, verb in VERBS.items():
        parsed = subparsers.add_parser(name, help=verb.summary, description=verb.text)
        groups = {heading: parsed.add_argument_group(heading) for heading in (WHAT, MODEL, HOLE, MACHINE)}
        for heading, names, text, more in [*verb.own, *OPTIONS]:
            if names in verb.takes or (heading, names, text, more) in verb.own:
                # help is set afterwards, because argparse of Python 3.10 adds its own "(default: True)" to a switch's
                groups[heading].add_argument(*names.split(), **more).help = text
        if "--like" in verb.takes:
            repeated = {name: value for name, value in (record or {}).items() if name in REPEATED}
            parsed.set_defaults(repeats=record, **repeated)
        elif "--model" in verb.takes:
            parsed.set_defaults(model="tiny")
        if name == "parity":
            parsed.set_defaults(seed=None)
    return parser


def parse(arguments: list[str] | None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """The options of a verb, as attributes; `parser` may be one of make_parser with other defaults.

    For `paint` and `trace` also `settings`, the Settings, and `repeats`, the record of the file that --like names or
    None: that run's options replace the defaults. For `paint` also `targets`, the file for each painting, or "-".
    For `trace` also `other`, the options of the run to compare with, or None.

    Raises:
        InputError: options that are unknown, missing, wrong or contradict each other.
    """
    options = (parser or make_parser()).parse_args(arguments)
    if options.verb == "compare":
        check_writable(Path(options.output), options.overwrite, PAGES)
    if options.verb not in ("paint", "trace"):
        return options
    if options.like is not None:
        from minpaint.picture.saving import read_record

        with without_chatter():
            record = read_record(source(options.like, "file"))
        options = make_parser(record).parse_args(arguments)
        options.lora = options.lora or record.get("lora")  # argparse would add to a default
    for name in ("image", "prompt"):
        if getattr(options, name) is None:
            raise InputError(f"--{name} is missing; see python -m minpaint {options.verb} --help")
    options.settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    if [options.image, options.mask, options.like].count(STREAM) > 1:
        raise InputError("stdin holds one picture; use - for only one of --image, --mask and --like")
    if options.verb == "paint":
        options.targets = _targets(options, options.settings.seeds)
        return options
    check_writable(Path(options.output), options.overwrite, PAGES)
    options.other = None
    if options.versus is not None:
        given = list(sys.argv[1:] if arguments is None else arguments)
        try:
            options.other = parse([*_without(given, "--versus"), *shlex.split(options.versus)])
        except (InputError, ValueError) as error:
            raise InputError(f"versus {options.versus!r}: {error}") from None
    return options


def _without(arguments: list[str], name: str) -> list[str]:
    """Arguments without an option and its value."""
    kept: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument != name and before != name and not argument.startswith(f"{name}="):
            kept.append(argument)
    return kept


def source(file: str, what: str) -> BytesIO:
    """The content of a file or of stdin, read once, so that the record tells the SHA-256 of what was painted in."""
    if file == STREAM and sys.stdin is None:
        raise InputError(f"{what} -: stdin is closed; name a file")
    try:
        with open(file, "rb") if file != STREAM else nullcontext(sys.stdin.buffer) as opened:
            content = BytesIO()
            while content.tell() < LARGEST_FILE and (block := opened.read(2**20)):  # more at once would be allocated
                content.write(block)
            content.seek(0)
    except (OSError, ValueError) as error:
        told = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise InputError(f"{what} {file}: {told}") from None
    content.name = file
    return content


@contextmanager
def without_chatter() -> Iterator[None]:
    """Keep off stderr what C libraries print there themselves, as libtiff does for a damaged file; warnings follow."""
    stderr = os.dup(2)
    with open(os.devnull) as nothing, warnings.catch_warnings(record=True) as held:
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
    for warning in held:
        warnings.warn(warning.message, stacklevel=3)


def _targets(options: argparse.Namespace, seeds: range) -> list[Path]:
    """Where each seed's painting goes; InputError if it cannot be written there."""
    pattern, several = options.output, len(seeds) > 1 and not options.best
    if pattern == STREAM and several:
        raise InputError("output -: stdout takes one picture; leave out --count, add --best, or name a file")
    if pattern == STREAM and options.json:
        raise InputError("output -: stdout cannot take the picture and the object of --json; name a file")
    plain = Path(pattern)
    if several and "{seed}" not in pattern:
        pattern = str(plain.with_name(f"{plain.stem}-{{seed}}{plain.suffix}"))
    targets = [Path(pattern.replace("{seed}", str(seed))) for seed in seeds]
    explained = [] if options.explain_mask is None else [Path(options.explain_mask)]
    # a painting may take the place of its own image, or of the painting that it repeats
    given = {identity(file) for file in (options.image, options.mask, options.like) if file is not None}
    taken = set() if options.mask is None else {identity(options.mask)}
    for file in [*explained, *(dict.fromkeys(targets) if pattern != STREAM else ())]:  # of --best, all are the same
        check_writable(file, options.overwrite)
        if (same := identity(file)) in (taken | given if file in explained else taken):
            raise InputError(f"output {file} is also another output, or an input; name another file")
        taken.add(same)
    return targets


def identity(file: str | Path) -> object:
    """The same for all names of one file, by links or, where a folder may not tell them apart, by case."""
    try:
        found = os.stat(file)
    except OSError:
        return os.path.realpath(file).casefold()
    except ValueError:  # no file can have this name
        return file
    return found.st_dev, found.st_ino


def check_writable(target: Path, overwrite: bool, suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """InputError if a file of this name and kind cannot be written, or exists and is not to be overwritten."""
    if target.suffix.lower() not in suffixes:
        raise InputError(f"output {target}: unknown kind of file; use {', '.join(suffixes)}")
    try:
        if target.is_dir():
            raise InputError(f"output {target} is a folder; name a file in it")
        if target.exists() and not overwrite:
            raise InputError(f"output {target} exists; add --overwrite to replace it")
        folder = target.resolve().parent  # of a symbolic link, the one of the file that will be written
        if not folder.is_dir():
            raise InputError(f"output {target}: the folder {folder} does not exist; create it first")
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:
        raise InputError(f"output {target} cannot be written ({error}); name a file in another folder") from None
