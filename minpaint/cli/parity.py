"""`parity`: say whether minpaint and another implementation agree on a checkpoint, and where they first differ."""

from __future__ import annotations

import json
import re
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from torch import Tensor

from minpaint import __version__
from minpaint.checkpoint.load import load_checkpoint
from minpaint.cli.options import PAGES, Note, check_writable
from minpaint.cli.study import write_page
from minpaint.engine.budget import format_size
from minpaint.engine.device import DTYPES, choose_device, choose_dtype, dtype_name, threads_for
from minpaint.errors import InputError
from minpaint.painter import open_painter
from minpaint.settings import Settings
from minpaint.study.parity import compare
from minpaint.study.parity_diffusers import diffusers_side, library
from minpaint.study.parity_dump import check_target, open_dump, read_stages, refuse_other, write_dump
from minpaint.study.parity_sides import Case, minpaint_side, open_canvas, open_schedule, pictures, stages

LARGEST = 256  # pixels of a side, unless another size is asked for


def parity(options: Namespace, note: Note) -> int:
    """Compare, print the table or the object of --json, and return 0 if both agree, 1 if not; or write a dump."""
    if options.dump and options.against:
        raise InputError("--dump writes a dump and --against reads one; leave one of them out")
    if options.side and not options.dump:
        raise InputError("--side says whose tensors --dump writes; add --dump DIR, or leave it out")
    page = None if options.html is None else Path(options.html)
    if page is not None:
        check_writable(page, options.overwrite, PAGES)
    size = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", options.size or "512x512")
    if not size:
        raise InputError(f"size {options.size!r} is not WIDTHxHEIGHT in pixels; write it like 256x256")
    Settings("", steps=options.steps, seed=options.seed or 0)  # checks them
    device = choose_device(options.device)
    dump = open_dump(Path(options.against)) if options.against else None
    dtype = DTYPES[dump.case.dtype] if dump and options.dtype == "auto" else choose_dtype(options.dtype, device)
    theirs = options.side == "diffusers" or not (options.dump or dump)
    if theirs:
        library()
    if options.dump:
        check_target(Path(options.dump))
    half, lora = dtype_name(dtype) == "fp16", options.lora or []
    checkpoint = load_checkpoint(options.model, half=half, config=options.config, vae=options.vae, lora=lora)
    architecture = checkpoint.architecture
    if dump:
        asked = {"size": options.size, "dtype": None if options.dtype == "auto" else options.dtype}
        asked |= {name: getattr(options, name) for name in ("steps", "sampler", "seed")}
        refuse_other(dump, architecture, asked)
        case = dump.case
    else:
        native = min(architecture.unet.sample_size * architecture.vae.factor, LARGEST)
        width, height = (int(side) for side in size.groups()) if options.size else (native, native)
        case = Case(width, height, options.steps or 4, options.sampler, options.seed or 0, dtype_name(dtype))
    open_canvas(checkpoint, case), open_schedule(checkpoint, case)  # both check the case
    note(f"{options.model} at {case.width}x{case.height}, {case.steps} steps, {case.dtype} on {device}")
    # of the top of the UNet, so that small models do without threads
    work = 2 * 9 * architecture.unet.channels[0] ** 2 * case.width * case.height // architecture.vae.factor**2
    with threads_for(work):
        side = minpaint_side(checkpoint, case, device, dtype)
        reference = diffusers_side if theirs else None
        if reference:
            built = reference(checkpoint, case, device, dtype, side.modules, options.config, options.vae, lora)
            recorded = stages(built, checkpoint, case)
            del built
        elif dump:
            recorded = read_stages(dump)
        if options.dump:
            recorded = recorded if reference else stages(side, checkpoint, case)
            name = options.side or "minpaint"
            written = write_dump(Path(options.dump), f"{name} {__version__}", case, architecture, recorded)
            note(f"wrote {options.dump} ({format_size(written)}), the tensors of {name}")
            if options.json:
                print(json.dumps({"dump": options.dump, "side": name, "bytes": written}))
            return 0

        def painted() -> Tensor:
            painter = open_painter(options.model, device, dtype, None, options.config, False, options.vae, options.lora)
            settings: dict[str, Any] = {"negative_prompt": case.negative_prompt, "steps": case.steps, "seed": case.seed}
            settings |= {"guidance": case.guidance, "sampler": case.sampler, "profile": "diffusers"}
            return painter(*pictures(case), case.prompt, **settings)[0].latents[None]

        report = compare(recorded, side, checkpoint, case, painted if case.noise == "torch" else None)
        facts = {"model": options.model, "with": dump.side if dump else "diffusers", "dtype": case.dtype}
        facts |= {"device": str(device), "size": f"{case.width}x{case.height}", "steps": case.steps, "seed": case.seed}
        facts |= {"sampler": open_schedule(checkpoint, case)[0], "version": __version__}
        seconds = round(time.perf_counter() - options.started, 1)
        if page:
            write_page(page, report.page(facts), options.overwrite)
            note(f"wrote {page}")
        if options.json:
            print(json.dumps(report.as_json() | facts | {"seconds": seconds}))
        else:
            print(f"{report.table()}\n\n{report.verdict()}")
        note(f"done in {seconds} s")
        return 0 if report.cause is None else 1
