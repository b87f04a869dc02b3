"""`batch`: the paintings of a manifest or a folder, on this machine or a cluster."""

from __future__ import annotations

import gc
import json
import re
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from minpaint import __version__
from minpaint.batch.on_ray import run_on_ray
from minpaint.batch.run import Outcome, Task, run_here
from minpaint.cli.manifest import read_rows, words
from minpaint.cli.options import SUFFIXES, Note, identity, make_parser, parse, source, without_chatter
from minpaint.cli.paint import OF_PAINTER, open_for, record_of, run_of
from minpaint.engine.calls import Request
from minpaint.engine.device import dtype_name
from minpaint.errors import InputError, MinpaintError, MinpaintWarning
from minpaint.painter import Painter
from minpaint.picture.frame import open_frame
from minpaint.picture.saving import FORMATS, SAVING, check_target, new_file, read_record


def batch(options: Namespace, note: Note) -> None:
    """Check all rows, paint those that are not done yet, and say what became of them."""
    folder, (shard, shards) = Path(options.output), _shard(options.shard)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output {folder}: cannot be made a folder ({error}); name another one") from None
    if options.together < 1:
        raise InputError(f"together {options.together} must be at least 1")
    with warnings.catch_warnings():
        warnings.simplefilter("once", MinpaintWarning)  # what holds for many rows is said once
        faults: list[str] = []
        rows = _rows(options, folder, faults)
        blocks = [rows[start : start + options.together] for start in range(0, len(rows), options.together)]
        mine = blocks[shard - 1 :: shards]
        painter = open_for(options)
        tasks = list(_tasks([row for block in mine for row in block], painter, faults, note))
        if faults:
            print(*(f"minpaint: {options.manifest}: {fault}" for fault in faults), sep="\n", file=sys.stderr)
            told = f"nothing is painted before what is said above is mended (faults: {len(faults)})"
            raise InputError(f"{options.manifest}: {told}")
        if not rows:
            raise InputError(
                f"{options.manifest} holds no row; it needs an image, a mask and a prompt for each painting"
            )
        left = iter(tasks)
        _paint(options, painter, [[next(left) for _ in block] for block in mine], folder, note)


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,8})/([1-9]\d{0,8})", text)
    if not found or int(found[1]) > int(found[2]):
        raise InputError(f"shard {text!r} is not I/N with I from 1 to N; write it like 2/8")
    return int(found[1]), int(found[2])


def _rows(options: Namespace, folder: Path, faults: list[str]) -> list[Namespace]:
    """The options of `paint` for each row; what its text alone shows to be wrong is added to the faults."""
    where, masks = Path(options.manifest), None if options.masks is None else Path(options.masks)
    for_all = None if masks is None or masks.is_dir() else str(masks)
    parser, found = make_parser(vars(options) | {"mask": for_all}), list[Namespace]()
    taken, inputs = dict[object, int](), set[object]()
    for number, row in read_rows(where, masks, SUFFIXES, faults.append):
        try:
            target = folder / str(row.pop("output", f"{Path(str(row.get('image'))).stem}.png"))
            if target.resolve().parent != folder.resolve():
                raise InputError(f"output {target} is not a file in {folder} itself")
            given = words(row, where if where.is_dir() else where.parent)
            one = parse(["paint", *given, "--overwrite", f"--output={target}"], parser)
            one.repeats, one.lora, one.row, target = None, options.lora, number, one.targets[0]
            if one.settings.count != 1:
                raise InputError(f"count {one.settings.count}: a row is one painting; write a row for each seed")
            if not options.overwrite and target.exists() and not _has_record(target):
                raise InputError(f"output {target} exists and is no painting; add --overwrite to replace it")
            if (before := taken.setdefault(identity(target), number)) != number:
                raise InputError(f"output {target} is that of row {before}, too; give one of them another output")
            inputs |= {identity(file) for file in (one.image, one.mask) if file is not None}
            found.append(one)
        except (ValueError, OSError) as error:  # some words are no names of files
            faults.append(f"row {number}: {error}")
    for one in found:
        if identity(one.targets[0]) in inputs:
            faults.append(f"row {one.row}: output {one.targets[0]} is an input; choose another folder or output")
    return found


def _has_record(file: Path) -> bool:
    try:
        return bool(read_record(file))
    except InputError:
        return False


def _tasks(rows: list[Namespace], painter: Painter, faults: list[str], note: Note) -> Iterator[Task]:
    """What is to be painted; whatever the painter would refuse of a row's pictures is added to the faults."""
    of_run, planned = run_of(painter, note), set[Request]()
    for one in rows:
        try:
            image, mask = source(one.image, "image"), None if one.mask is None else source(one.mask, "mask")
            with without_chatter():
                frame, record = open_frame(image, mask, one.settings), record_of(one, image, mask)
            target, settings = one.targets[0], painter.complete(one.settings)
            record |= {"steps": settings.steps, "eta": settings.eta, "ignored": painter.ignored(settings), **of_run}
            check_target(target, frame, record, settings.profile == "minpaint")
            request = painter.job(frame, settings, SAVING[FORMATS[target.suffix.lower()]]).request
            if request not in planned:
                planned.add(request)
                painter.engine.planner().choose(request, painter.engine.budget, painter.engine.base)
            yield Task(one.row, one.image, one.mask, settings, target, record)
        except MinpaintError as error:
            faults.append(f"row {one.row}: {error}")


def _paint(options: Namespace, painter: Painter, blocks: list[list[Task]], folder: Path, note: Note) -> None:
    """Paint what is not done, write down what fails, and tell of both; MinpaintError if a row has failed."""
    # a block is painted as a whole, however much of it is done: the size of a batch shows in a painting's last bits
    blocks = [[replace(task, done=task.is_done()) for task in block] for block in blocks]
    outcomes: list[Outcome] = [task.outcome(done="before") for block in blocks for task in block if task.done]
    before, total = len(outcomes), sum(map(len, blocks))
    blocks = [block for block in blocks if not all(task.done for task in block)]
    note(f"{painter.name} on {painter.device}, {dtype_name(painter.dtype)}; {before} of {total} paintings are there")
    failed = folder / (
        "failures.jsonl" if options.shard == "1/1" else f"failures-{options.shard.replace('/', '-of-')}.jsonl"
    )
    failed.unlink(missing_ok=True)
    failures: list[Outcome] = []
    gc.freeze()  # see __main__
    gc.enable()
    painting: Iterator[list[Outcome]] = iter(())
    if blocks and options.ray is not None:
        chosen = (options.model, *(getattr(options, name) for name in OF_PAINTER[1:]))
        painting = run_on_ray(options.ray, chosen, blocks)
    elif blocks:
        painter.engine.keep_loaded()
        painting = run_here(painter, blocks)
    began, layout = time.perf_counter(), "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]"
    with tqdm(total=total - before, unit="picture", bar_format=layout, disable=options.quiet or None) as bar:
        for finished in painting:
            outcomes += finished
            if new := [outcome for outcome in finished if "error" in outcome]:
                failures += new
                with new_file(failed, overwrite=True) as file:
                    file.write("".join(f"{json.dumps(failure)}\n" for failure in failures).encode())
            bar.set_postfix_str(f"{_hourly(len(outcomes) - before, began)} pictures an hour", refresh=False)
            bar.update(len(finished))
    painted, seconds = len(outcomes) - before - len(failures), time.perf_counter() - options.started
    speed = _hourly(len(outcomes) - before, began)
    note(f"painted {painted} in {folder}, {speed} an hour; done in {seconds:.1f} s")
    if options.json:
        report: Outcome = {"version": __version__, "model": painter.name, "device": str(painter.device)}
        report |= {"dtype": dtype_name(painter.dtype), "rows": total, "painted": painted, "before": before}
        report |= {"failed": len(failures), "pictures_per_hour": speed, "seconds": round(seconds, 3)}
        print(json.dumps(report | {"outputs": outcomes}))
    if failures:
        told = f"{len(failures)} of {total} rows failed: {failed} says why; the same command tries them again"
        raise MinpaintError(told)


def _hourly(count: int, began: float) -> int:
    return round(3600 * count / max(time.perf_counter() - began, 1e-9))
