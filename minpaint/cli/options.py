"""The command line's options: the parser, made from the fields of Settings, and the checks of files and streams.

Nothing heavy is imported here, so that `--help` and bad usage are answered at once.
`python -m minpaint.cli.options` prints the table of options that README holds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import MISSING, fields
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from minpaint import __version__
from minpaint.errors import InputError
from minpaint.settings import HOLE, MACHINE, MODEL, WHAT, Settings

STREAM = "-"  # stdin as an input, stdout as the output
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")  # of the files that can be written
MODELS = "tiny, sd15, sd2, owner/name[@revision] of the hub, a folder or a .safetensors file (default: tiny)"
DTYPES = ("auto", "fp32", "bf16", "fp16")
REPEATED = {"model", "config", "image", "mask", "dtype", *(field.name for field in fields(Settings))}  # by --like


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def make_parser(repeated: dict[str, Any] | None = None) -> argparse.ArgumentParser:
    """The parser of all verbs; `repeated` are other defaults for `paint`."""
    text = "Stable Diffusion inpainting. Without a verb: repaint the bundled example."
    parser = _Parser(prog="python -m minpaint", description=text)
    parser.add_argument("--version", action="version", version=f"minpaint {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    text = "Repaint the white part of a mask from a prompt."
    paint = verbs.add_parser("paint", help="repaint the white part of a mask from a prompt", description=text)
    _add_paint(paint)
    paint.set_defaults(**(repeated or {}))
    summary = "say what a run will take, and how it will keep within a budget"
    text = "Predict the memory of a run from a checkpoint's shapes; no weights are read, none fetched."
    add = verbs.add_parser("plan", help=summary, description=text).add_argument
    add("--model", default="tiny", help=MODELS)
    add("--config", metavar="FOLDER", help="configurations of a single-file model")
    add("--size", default="512x512", metavar="WxH", help="what the network paints (default: 512x512)")
    add("--count", type=int, default=1, help="pictures at once (default: 1)")
    add("--guidance", type=float, default=7.5, help="1 or less needs half the batch (default: 7.5)")
    add("--device", default="auto", help="auto, cpu, cuda; one that this machine lacks is planned for too")
    add("--dtype", default="auto", choices=DTYPES, help="default: auto")
    add("--budget", metavar="SIZE", help="default: 15GiB")
    add("--json", action="store_true", help="print one JSON object")
    text = "Print the record that minpaint left in a file."
    add = verbs.add_parser("info", help="print how a picture was painted", description=text).add_argument
    add("file", metavar="FILE", help="a picture that minpaint wrote; - reads stdin")
    add("--json", action="store_true", help="print it as one JSON object")
    return parser


def _add_paint(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(WHAT)
    add = group.add_argument
    add("--image", metavar="FILE", help="the picture; - reads stdin")
    add("--mask", metavar="FILE", help="white where to repaint (default: where the picture is transparent)")
    _add_settings(group)
    written = f"{', '.join(SUFFIXES)}; {{seed}} stands for the seed; - is stdout"
    add("-o", "--output", required=True, metavar="FILE", help=written)
    add("--like", metavar="FILE", help="repeat the run that painted FILE; options given here take precedence")
    group = parser.add_argument_group(MODEL)
    add = group.add_argument
    add("--model", help=MODELS)
    add("--config", metavar="FOLDER", help="configurations and tokenizer of a single-file model")
    _add_settings(group)
    add("--best", action="store_true", help="of --count pictures, write the one whose seam shows least")
    group = parser.add_argument_group(HOLE)
    _add_settings(group)
    group.add_argument("--explain-mask", metavar="FILE", help="draw every stage of the mask side by side")
    group = parser.add_argument_group(MACHINE)
    add = group.add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--dtype", default="auto", choices=DTYPES, help="of the networks (default: auto)")
    add("--budget", metavar="SIZE", help="memory the run may take, or is refused at once (default: 15GiB)")
    _add_settings(group)
    add("--json", action="store_true", help="print one JSON object on stdout")
    add("--quiet", action="store_true", help="no progress and no messages but errors")
    add("--overwrite", action="store_true", help="replace outputs that exist")
    record = add("--record", action=argparse.BooleanOptionalAction, default=True)
    record.help = "keep what repeats the run in the file (default: on)"


def _add_settings(group: argparse._ArgumentGroup) -> None:
    """Add the fields of Settings that belong under the group's heading; the help text ends with the default."""
    for field in fields(Settings):
        if field.metadata["group"] != group.title:
            continue
        default = None if field.default is MISSING else field.default
        kind: dict[str, Any] = {}
        if isinstance(default, bool):
            kind["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, (int, float)):
            kind["type"] = type(default)
        option = f"--{field.name.replace('_', '-')}"
        action = group.add_argument(option, default=default, **kind, **field.metadata["arguments"])
        shown = "on" if default is True else f"{default:g}" if "type" in kind else default
        # set afterwards, because argparse of Python 3.10 adds its own "(default: True)" to a switch's help
        action.help = field.metadata["help"] + (f" (default: {shown})" if shown else "")


def markdown() -> str:
    """README's table of the options of `paint`."""
    parser = argparse.ArgumentParser(add_help=False)
    _add_paint(parser)
    lines = ["| option | |", "| --- | --- |"]
    for group in parser._action_groups[2:]:  # behind argparse's own two groups
        lines.append(f"| **{group.title}** | |")
        for action in group._group_actions:
            value = action.metavar or "\\|".join(action.choices or ()) or action.dest.upper()
            names = ", ".join(action.option_strings)
            lines.append(f"| `{names}{'' if action.nargs == 0 else f' {value}'}` | {action.help} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of a verb, as attributes.

    For `paint` also `settings`, the Settings; `targets`, where each painting goes; and `repeats`, the
    record of the file that --like names or None: that run's options replace the defaults.

    Raises:
        InputError: options that are unknown, missing, wrong or contradict each other.
    """
    options = make_parser().parse_args(arguments)
    if options.verb != "paint":
        return options
    options.repeats = None
    if options.like is not None:
        from minpaint.picture.saving import read_record

        record = read_record(source(options.like))
        known = {key: value for key, value in record.items() if key in REPEATED}
        options = make_parser(known).parse_args(arguments)
        options.repeats = record
    for name in ("image", "prompt"):
        if getattr(options, name) is None:
            raise InputError(f"--{name} is missing; see python -m minpaint paint --help")
    options.settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    options.targets = _targets(options, options.settings.seeds)
    if [options.image, options.mask, options.like].count(STREAM) > 1:
        raise InputError("stdin holds one picture; use - for only one of --image, --mask and --like")
    if options.output == STREAM and options.json:
        raise InputError("output -: stdout cannot take the picture and the object of --json; name a file")
    return options


def source(file: str) -> str | BytesIO:
    """A file to read, or the content of stdin."""
    return BytesIO(sys.stdin.buffer.read()) if file == STREAM else file


def _targets(options: argparse.Namespace, seeds: range) -> list[Path | BinaryIO]:
    """Where each seed's painting goes; InputError if it cannot be written there."""
    pattern, several = options.output, len(seeds) > 1 and not options.best
    explained = None if options.explain_mask is None else Path(options.explain_mask)
    if explained is not None:
        _check_writable(explained, options.overwrite)
    if pattern == STREAM:
        if several:
            raise InputError("output -: stdout takes one picture; leave out --count, add --best, or name a file")
        return [sys.stdout.buffer] * len(seeds)
    if several and "{seed}" not in pattern:
        plain = Path(pattern)
        pattern = str(plain.with_name(f"{plain.stem}-{{seed}}{plain.suffix}"))
    targets = [Path(pattern.replace("{seed}", str(seed))) for seed in seeds]
    for target in targets:
        _check_writable(target, options.overwrite)
        if explained is not None and target.resolve() == explained.resolve():
            raise InputError(f"output {target} is also the file of --explain-mask; name another")
    return [*targets]


def _check_writable(target: Path, overwrite: bool) -> None:
    if target.suffix.lower() not in SUFFIXES:
        raise InputError(f"output {target}: unknown kind of file; use {', '.join(SUFFIXES)}")
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


if __name__ == "__main__":
    print(markdown())
