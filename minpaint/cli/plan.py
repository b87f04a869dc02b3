"""`plan`: say what a run will take and how it keeps within a budget, before any weight is read."""

from __future__ import annotations

import json
import re
from argparse import Namespace

from minpaint.checkpoint.load import outline
from minpaint.cli.options import Note
from minpaint.engine.additions import loaded
from minpaint.engine.budget import choose_budget, format_size, release_cached, used_memory
from minpaint.engine.calls import Request
from minpaint.engine.device import choose_device, choose_dtype, dtype_name, remarks
from minpaint.engine.plan import Planner, round_up
from minpaint.errors import InputError
from minpaint.picture.saving import SAVING
from minpaint.picture.view import WHOLE
from minpaint.settings import Settings


def plan(options: Namespace, note: Note) -> None:
    """Print the plan, the smallest budget for this picture and the largest picture in this budget."""
    size = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", options.size)
    if not size:
        raise InputError(f"size {options.size!r} is not WIDTHxHEIGHT in pixels; write it like 768x512")
    settings = Settings("", count=options.count, guidance=options.guidance)
    device = choose_device(options.device, absent=True)
    dtype = choose_dtype(options.dtype, device)
    budget = choose_budget(options.budget, device)
    architecture = outline(
        options.model, dtype_name(dtype) == "fp16", options.config, vae=options.vae, lora=options.lora
    )
    planner = Planner(architecture, device, dtype, fast=options.fast)
    factor, native = planner.architecture.vae.factor, planner.architecture.unet.sample_size
    width, height = (-(-int(side) // factor) * factor for side in size.groups())
    guided, saving = settings.guidance > 1, max(SAVING.values())
    request = Request(width, height, settings.count, guided, again=False, saving=saving, opened=False)
    release_cached(device)
    base = used_memory(device) + (0 if planner.on_gpu else loaded(planner.architecture.text.vocab_size))
    plan = planner.choose(request, budget, base)
    smallest, largest = planner.least(request, base), planner.largest(request, budget, base)
    if options.json:
        report = {"model": options.model, "width": width, "height": height, "count": settings.count}
        report |= {"device": str(device), "dtype": dtype_name(dtype), **plan.report()}
        print(json.dumps(report | {"smallest_budget": smallest, "largest_picture": largest}))
        return
    print(f"{options.model} at {width}x{height}, count {settings.count}, {dtype_name(dtype)} on {device}\n")
    print(f"{plan.table()}\n\npredicted peak: {format_size(plan.peak)} of {format_size(budget)}")
    print(f"smallest budget for this: {round_up(smallest)}")
    if largest is not None:
        print(f"largest picture of this shape in {format_size(budget)}: {largest[0]}x{largest[1]}")
    for line in remarks(device):
        print(line)
    if not planner.on_gpu:
        print(f"{format_size(base)} of it are the interpreter, the libraries and the tokenizer")
    if width * height > WHOLE * (native * factor) ** 2:
        print("paint shows the network a crop of a picture of this size, unless told --context whole")
