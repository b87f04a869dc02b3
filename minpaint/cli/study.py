"""`trace`: what happens in a run, as a page; `compare`: where two runs part."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from PIL import ImageChops

from minpaint import __version__
from minpaint.cli.options import Note, parse, source, without_chatter
from minpaint.cli.paint import OF_PAINTER, open_for, progress
from minpaint.engine.device import dtype_name
from minpaint.errors import InputError, MinpaintError
from minpaint.painter import Painter
from minpaint.picture.frame import open_frame
from minpaint.picture.image import open_image
from minpaint.picture.saving import new_file
from minpaint.study.compare import Difference, compare_page, judge, options_apart
from minpaint.study.page import require_plots
from minpaint.study.parity_record import UNLIKE
from minpaint.study.trace import Trace, save_raw, trace_run
from minpaint.study.trace_page import trace_page


def trace(options: Namespace, note: Note) -> None:
    """Paint, and write the page of the run, or, with --versus, of two runs."""
    require_plots()
    raw = None if options.raw is None else Path(options.raw)
    if raw is not None and raw.exists() and not (raw.is_dir() and (options.overwrite or not any(raw.iterdir()))):
        raise InputError(f"raw {raw} exists; name a new folder, or add --overwrite to write into it")
    one = _run(options, note, inside=options.other is None or raw is not None)
    report: dict[str, Any] = {"version": __version__, "model": one.painter.name, "output": options.output, "raw": []}
    if raw is not None:
        try:
            report["raw"] = [str(file) for file in save_raw(one, raw)]
        except OSError as error:
            raise MinpaintError(f"raw {raw} cannot be written ({error}); name another folder") from None
        note(f"wrote {', '.join(report['raw'])}")
    if options.other is None:
        page = trace_page(one)
    else:
        other = _run(options.other, note, inside=False, painter=one.painter if _alike(options, options.other) else None)
        page, found = _compared(one, other, ("as given", options.versus), note)
        report |= found
    _finish(options, page, report, note)


def compare(options: Namespace, note: Note) -> None:
    """Repeat the runs of two files, and write the page that shows where they part."""
    require_plots()
    both = []
    for file in options.files:
        try:
            both.append(parse(["trace", "--like", file, "-o", options.output, "--overwrite"]))
        except InputError as error:
            raise InputError(f"{file} cannot be repeated: {error}") from None
        both[-1].quiet = options.quiet
    one = _run(both[0], note, inside=False)
    other = _run(both[1], note, inside=False, painter=one.painter if _alike(*both) else None)
    for file, run in zip(options.files, (one, other), strict=True):
        if ImageChops.difference(run.paintings[0].image.convert("RGB"), open_image(file).convert("RGB")).getbbox():
            note(f"note: {file} is not exactly what its run gives here and now")
    page, found = _compared(one, other, (options.files[0], options.files[1]), note)
    _finish(options, page, {"version": __version__, "output": options.output, **found}, note)


def _alike(a: Namespace, b: Namespace) -> bool:
    """Whether one painter can do both runs."""
    return all(getattr(a, name) == getattr(b, name) for name in OF_PAINTER)


def _run(options: Namespace, note: Note, inside: bool, painter: Painter | None = None) -> Trace:
    """The traced run that options ask for, with this painter or one made for it."""
    image, mask = source(options.image, "image"), None if options.mask is None else source(options.mask, "mask")
    with without_chatter():
        frame = open_frame(image, mask, options.settings)
    painter = painter or open_for(options)
    note(f"{painter.name} on {painter.device}, {dtype_name(painter.dtype)}")
    with progress(options.quiet) as on_step:
        return trace_run(painter, frame, painter.complete(options.settings), on_step, inside)


def _compared(one: Trace, other: Trace, names: tuple[str, str], note: Note) -> tuple[str, dict[str, Any]]:
    """The page of two runs, and what --json says of them."""
    verdict = judge(one, other)
    note(str(verdict))

    def told(found: Difference | None) -> dict[str, Any] | None:
        if found is None:
            return None
        return {"when": found.when, "what": found.what, "size": found.size if found.size < UNLIKE else None}

    report: dict[str, Any] = {
        "same": verdict.first is None,
        "first": told(verdict.first),
        "beyond_rounding": told(verdict.beyond),
    }
    report |= {"apart_from_step": None if verdict.apart is None else verdict.apart + 1}
    report |= {"final": verdict.final if verdict.final < UNLIKE else None}
    report |= {"options": {name: values for name, *values in options_apart(one, other)}}
    return compare_page(one, other, names), report


def _finish(options: Namespace, page: str, report: dict[str, Any], note: Note) -> None:
    """Write the page, and say so."""
    write_page(Path(options.output), page, options.overwrite)
    seconds = time.perf_counter() - options.started
    note(f"wrote {options.output} ({len(page.encode()) / 2**20:.1f} MiB)")
    note(f"done in {seconds:.1f} s")
    if options.json:
        print(json.dumps(report | {"seconds": round(seconds, 3)}))


def write_page(target: Path, page: str, overwrite: bool) -> None:
    """Write a page beside its target and rename it, so that no half page is left."""
    try:
        with new_file(target.resolve(), overwrite) as file:
            file.write(page.encode())
    except (OSError, MinpaintError) as error:
        raise MinpaintError(f"output {target}: {error}") from None
