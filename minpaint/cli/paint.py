"""`paint`: one run, from files to files."""

from __future__ import annotations

import gc
import hashlib
import json
import time
from argparse import Namespace
from contextlib import closing
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from minpaint import __version__
from minpaint.checkpoint.hub import fingerprint, sha256
from minpaint.cli.options import STREAM, source
from minpaint.cli.terminal import Note, Progress
from minpaint.engine.budget import format_size
from minpaint.engine.device import dtype_name
from minpaint.painter import Painter, Painting, open_painter
from minpaint.picture.explain import explain
from minpaint.picture.frame import Frame, open_frame
from minpaint.picture.saving import check_target, save
from minpaint.samplers import Step


def run(options: Namespace, note: Note) -> None:
    """Paint, write the files, and say what was done."""
    settings = options.settings
    image, mask = source(options.image), None if options.mask is None else source(options.mask)
    frame = open_frame(image, mask, settings)
    for target in options.targets:
        if isinstance(target, Path):
            check_target(target, frame.original.size)
    # up to here everything was cheap to check; now come the weights
    painter = open_painter(options.model or "tiny", options.device, options.dtype, options.budget, options.config)
    note(f"{painter.name} on {painter.device}, {dtype_name(painter.dtype)}")
    if options.explain_mask is not None:
        _explain(painter, frame, options, note)

    with closing(Progress(options.quiet)) as progress:

        def on_step(step: Step) -> None:
            progress(step)
            if not gc.isenabled():  # see __main__
                gc.freeze()
                gc.enable()

        paintings = painter.paint(frame, settings, on_step)
    record = _record(options, painter, image, mask) if options.record or options.repeats else {}
    if options.repeats:
        _compare_records(options.repeats, record, note)
    outputs = _write(options, frame, paintings, record, note)
    last = painter.last_run
    assert last is not None
    memory = {"budget": last.plan.budget, "planned": last.plan.peak, "measured": last.measured}
    note("memory: " + ", ".join(f"{name} {format_size(size)}" for name, size in memory.items()))
    seconds = time.perf_counter() - options.started
    note(f"done in {seconds:.1f} s")
    if options.json:
        report: dict[str, Any] = {"version": __version__, "model": painter.name, "device": str(painter.device)}
        report |= {"dtype": dtype_name(painter.dtype), "memory": memory, **asdict(settings)}
        report |= {"sampler": settings.sampler or painter.scheduler_config.sampler, "steps_run": paintings[0].steps}
        print(json.dumps(report | {"seconds": round(seconds, 3), "outputs": outputs}))


def _explain(painter: Painter, frame: Frame, options: Namespace, note: Note) -> None:
    """Draw the stages of the mask into the file of --explain-mask."""
    views = painter.views(frame, options.settings)
    if len(views) > 1:
        note(f"the picture is painted in {len(views)} parts; {options.explain_mask} explains the first")
    save(explain(frame, views[0]), None, None, Path(options.explain_mask))
    note(f"wrote {options.explain_mask}")


def _write(
    options: Namespace, frame: Frame, paintings: list[Painting], record: dict[str, Any], note: Note
) -> list[dict[str, Any]]:
    """Save the paintings, of which --best chooses one; returns what --json says of them."""
    chosen = list(zip(paintings, options.targets, strict=True))
    if options.best:
        note("seam errors: " + ", ".join(f"{painting.seam:.2f} (seed {painting.seed})" for painting in paintings))
        chosen = [min(chosen, key=lambda pair: pair[0].seam)]
    outputs = []
    for painting, target in chosen:
        kept = frame if options.profile == "minpaint" else None
        receipt = save(painting.image, kept, record | {"seed": painting.seed} if options.record else None, target)
        name = str(target) if isinstance(target, Path) else STREAM
        note(f"wrote {name} (seed {painting.seed}, {painting.steps} network calls)")
        note(f"seam error: {painting.seam:.2f} levels" + (f"; receipt: {receipt}" if receipt else ""))
        width, height = painting.image.size
        output = {"path": name, "seed": painting.seed, "width": width, "height": height}
        outputs.append(output | {"seam": round(painting.seam, 3), "receipt": asdict(receipt) if receipt else None})
    return outputs


def _record(options: Namespace, painter: Painter, image: str | BytesIO, mask: str | BytesIO | None) -> dict[str, Any]:
    """All that is needed to paint the pictures again, except for the seed of each."""

    def digest(file: str | BytesIO | None) -> str | None:
        if isinstance(file, BytesIO):
            return hashlib.sha256(file.getvalue()).hexdigest()
        return None if file is None else sha256(Path(file))

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
        **asdict(options.settings),
        "count": 1,
    }


def _compare_records(before: dict[str, Any], now: dict[str, Any], note: Note) -> None:
    """Say what differs from the run that is repeated."""
    for name in ("model", "image", "mask"):
        key = f"{name}_sha256"
        if before.get(name) == now[name] and before.get(key) != now[key]:
            note(f"note: {name} {now[name]} is not what it was when the picture was painted first")
    if before.get("minpaint") != now["minpaint"]:
        note(f"note: painted first by version {before.get('minpaint')}, now by {now['minpaint']}")
