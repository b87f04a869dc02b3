"""`paint`: one run, from files to files; `info`: the record that it leaves in them."""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minpaint import __version__
from minpaint.checkpoint.hub import fingerprint, sha256
from minpaint.checkpoint.load import open_safety_checker
from minpaint.checkpoint.safety import SafetyChecker, Verdict
from minpaint.cli.options import STREAM, Note, source, without_chatter
from minpaint.engine.budget import format_size
from minpaint.engine.device import dtype_name
from minpaint.errors import MinpaintError, SafetyError
from minpaint.painter import Painter, Painting, open_painter
from minpaint.picture.explain import explain
from minpaint.picture.frame import Frame, open_frame
from minpaint.picture.saving import FORMATS, SAVING, Record, check_target, read_record, save
from minpaint.samplers import Step

OF_PAINTER = ("model", "device", "dtype", "budget", "config", "fast", "vae", "lora")  # options that choose one
BESIDE_CHECKER = 256 * 2**20  # bytes that a call of the safety checker and the paintings take beside its weights


def paint(options: Namespace, note: Note) -> None:
    """Paint, write the files, and say what was done."""
    settings = options.settings
    image, mask = source(options.image, "image"), None if options.mask is None else source(options.mask, "mask")
    with without_chatter():
        frame, record = open_frame(image, mask, settings), record_of(options, image, mask)
    del image, mask  # their files may be large
    told = record | {"seed": settings.seeds[-1]} if options.record else None
    check_target(options.targets[-1], frame, told, options.profile == "minpaint")
    # up to here everything was cheap to check; now come the weights
    checker = open_safety_checker(options.model or "tiny") if options.safety else None
    painter = open_for(options)
    settings = options.settings = painter.complete(settings)
    record |= {"steps": settings.steps, "eta": settings.eta, "ignored": painter.ignored(settings)}
    note(f"{painter.name} on {painter.device}, {dtype_name(painter.dtype)}")
    if options.explain_mask is not None:
        views = painter.views(frame, settings)
        if len(views) > 1:
            note(f"the picture is painted in {len(views)} parts; {options.explain_mask} explains the first")
        save(explain(frame, views[0]), None, None, Path(options.explain_mask))
        note(f"wrote {options.explain_mask}")
    if checker is not None:
        painter.engine.require("the safety checker", checker.size + BESIDE_CHECKER)
    saving = max(SAVING[FORMATS.get(target.suffix.lower(), "PNG")] for target in options.targets)  # "-" is PNG
    with progress(options.quiet) as on_step:
        paintings = painter.paint(frame, options.settings, on_step, saving)
    verdicts = [] if checker is None else _judge(checker, painter, paintings, options.safety, note)
    if options.record or options.repeats:
        _complete(record, options, painter, note)
    outputs = _write(options, frame, paintings, record, note)
    for output in outputs if verdicts else ():
        output["safety"] = verdicts[output["seed"] - settings.seed]._asdict()
    last = painter.last_run
    assert last is not None
    memory = {"budget": last.plan.budget, "planned": last.plan.peak, "measured": last.measured}
    note("memory: " + ", ".join(f"{name} {format_size(size)}" for name, size in memory.items()))
    seconds = time.perf_counter() - options.started
    note(f"done in {seconds:.1f} s")
    if options.json:
        report: dict[str, Any] = {"version": __version__, "model": painter.name, "device": str(painter.device)}
        report |= {"dtype": dtype_name(painter.dtype), "memory": memory, **asdict(settings)}
        report |= {"vae": options.vae, "lora": options.lora, "ignored": record["ignored"]}
        report |= {"sampler": settings.sampler or painter.scheduler_config.sampler, "steps_run": paintings[0].steps}
        print(json.dumps(report | {"seconds": round(seconds, 3), "outputs": outputs}))


def info(options: Namespace, note: Note) -> None:
    """Print the record of a painting."""
    with without_chatter():
        record = read_record(source(options.file, "file"))
    lines = [f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in record.items()]
    text = "\n".join(lines).encode(errors="backslashreplace").decode()  # names of files can be no text
    print(json.dumps(record) if options.json else text)


def open_for(options: Namespace) -> Painter:
    """The painter that the options of `paint` ask for."""
    return open_painter(options.model or "tiny", *(getattr(options, name) for name in OF_PAINTER[1:]))


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[Step], None]]:
    """A bar on stderr, if that is a terminal; gives what is to be called after each network call."""
    bar: tqdm[Any] = tqdm(disable=True)

    def on_step(step: Step) -> None:
        nonlocal bar
        if step.i == 0:  # each part of the picture has a bar of its own
            bar.close()
            bar = tqdm(total=step.total, unit="step", disable=quiet or None, leave=False)
        bar.update()
        if not gc.isenabled():  # see __main__
            gc.freeze()
            gc.enable()

    try:
        yield on_step
    finally:
        bar.close()


def _judge(checker: SafetyChecker, painter: Painter, paintings: list[Painting], way: str, note: Note) -> list[Verdict]:
    """What the safety checker says of each painting; SafetyError if one is flagged that is not to be written then."""
    painter.engine.offload()
    checker.load()
    verdicts = [checker.check(painting.image) for painting in paintings]
    for painting, verdict in zip(paintings, verdicts, strict=True):
        if verdict.flagged:
            told = f"the checkpoint's safety checker flags the painting with seed {painting.seed}"
            if way == "refuse":
                raise SafetyError(
                    f"{told}, and nothing is written; change the seed or the prompt, or use --safety=report"
                )
            note(f"note: {told}")
    return verdicts


def _write(options: Namespace, frame: Frame, paintings: list[Painting], record: Record, note: Note) -> list[Record]:
    """Save the paintings, of which --best chooses one; returns what --json says of them."""
    chosen = list(zip(paintings, options.targets, strict=True))
    if options.best:
        note("seam errors: " + ", ".join(f"{painting.seam:.2f} (seed {painting.seed})" for painting in paintings))
        chosen = [min(chosen, key=lambda pair: pair[0].seam)]
    outputs: list[Record] = []
    failures: list[str] = []
    for painting, target in chosen:
        kept = frame if options.profile == "minpaint" else None
        told = record | {"seed": painting.seed} if options.record else None
        try:
            place = sys.stdout.buffer if options.output == STREAM else target
            receipt = save(painting.image, kept, told, place, options.overwrite)
        except MinpaintError as error:  # the other paintings are still to be saved
            failures.append(str(error))
            continue
        note(f"wrote {target} (seed {painting.seed}, {painting.steps} network calls)")
        note(f"seam error: {painting.seam:.2f} levels" + (f"; receipt: {receipt}" if receipt else ""))
        width, height = painting.image.size
        output = {"path": str(target), "seed": painting.seed, "width": width, "height": height}
        outputs.append(output | {"seam": round(painting.seam, 3), "receipt": asdict(receipt) if receipt else None})
    if failures:
        message = "; ".join(failures)
        raise MinpaintError(message, longest=len(message))  # it names the place of each painting
    return outputs


def record_of(options: Namespace, image: BytesIO, mask: BytesIO | None) -> Record:
    """All that is needed to paint the pictures again, but for their seeds, as far as it is known before they are."""
    return {
        "minpaint": __version__,
        "model": options.model or "tiny",
        "model_sha256": "0" * 64,
        "vae": options.vae,
        "lora": options.lora,
        "lora_sha256": ["0" * 64 for _ in options.lora or ()],
        "config": options.config,
        "image": options.image,
        "image_sha256": hashlib.sha256(image.getbuffer()).hexdigest(),
        "mask": options.mask,
        "mask_sha256": None if mask is None else hashlib.sha256(mask.getbuffer()).hexdigest(),
        "dtype": "fp32",
        "device": "cuda",
        "torch": torch.__version__,
        **asdict(options.settings),
        "count": 1,
    }


def run_of(painter: Painter, note: Note) -> Record:
    """What a painter adds to the records of its paintings, whatever they are of."""
    found: Record = {"dtype": dtype_name(painter.dtype), "device": painter.device.type}
    found |= {"model_sha256": None, "lora_sha256": None}
    try:
        return found | {
            "model_sha256": fingerprint(painter.files),
            "lora_sha256": [sha256(file) for file in painter.loras],
        }
    except OSError as error:
        note(f"note: the record lacks the weights' SHA-256 ({error})")
    return found


def _complete(record: Record, options: Namespace, painter: Painter, note: Note) -> None:
    """Add to a record what the run has shown, and say what differs from the run repeated."""
    record |= run_of(painter, note)
    before = options.repeats or record
    for name in ("model", "lora", "image", "mask"):
        key = f"{name}_sha256"
        if before.get(name) == record[name] and before.get(key) != record[key]:
            note(f"note: {name} {record[name]} is not what it was when the picture was painted first")
    if before.get("minpaint") != __version__:
        note(f"note: painted first by version {before.get('minpaint')}, now by {__version__}")
