"""Two implementations on one checkpoint: do they agree, and if not, where does the difference begin?

Every layer has two figures, relative errors in the Euclidean norm. Drift compares its outputs where each
implementation gave it its own input: it grows along the network, and shows symptoms. Its own error compares
them where both got the reference's input: it shows causes. The first layer whose own error is beyond its
tolerance is the first cause; the parts of a layer come before it, so a layer is named only if all of its
parts are right and what it does with them is not.

The tolerance is measured: FACTOR times the noise floor, which is how far the reference is from itself when
its inputs are perturbed by rounding and laid out the other way in memory. A layer of many parts has at least
the floor that the rounding of its parts adds up to, and none is under LEAST roundings of the number format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from minpaint.checkpoint.load import Checkpoint
from minpaint.engine.device import without_gradients
from minpaint.errors import InputError
from minpaint.models.networks import PlainNetworks
from minpaint.picture.image import to_image, to_unit
from minpaint.study.parity_record import UNLIKE, Call, Stage, noise_floor, record, relative_error, replay, roundoff
from minpaint.study.parity_report import Report, Row
from minpaint.study.parity_sides import (
    Case,
    Side,
    Tensors,
    Watched,
    count_steps,
    nearest_encoded,
    open_schedule,
    run_minpaint,
)

FACTOR = 4.0  # times the noise floor that is still rounding
LEAST = 8.0  # roundings of the number format that are always allowed


@without_gradients
def compare(
    reference: Iterable[Stage],
    side: Side,
    checkpoint: Checkpoint,
    case: Case,
    painted: Callable[[], Tensor] | None = None,
) -> Report:
    """Run every stage of the reference on minpaint's side too.

    side, checkpoint: minpaint's. painted: gives the final latents [1, 4, y, x] that a user gets, by the
    engine; compared with those of the plain modules.

    Raises:
        InputError: a stage that this model cannot run, or nothing to compare.
    """
    rows: dict[str, Row] = {}
    ends: list[Tensor] = []
    for stage in reference:
        if stage.layers:
            found: Iterable[Row] = compare_layers(stage, side, case)
        else:
            found = compare_run(stage, side, checkpoint, case, rows, ends)
        for row in found:
            before = rows.get(row.name)
            if before is None:
                rows[row.name] = row
            else:  # the UNet is called more than once
                worse = max(before, row, key=lambda each: each.own / each.tolerance)
                rows[row.name] = replace(worse, drift=max(before.drift, row.drift))
    if not rows:
        raise InputError("the dump has no layer of this model; see minpaint/study/parity_dump.py for the names")
    if painted is not None and ends:  # now that the reference is no longer in memory
        ours, theirs = ends
        latents, told = painted(), "the engine paints something else than the plain modules"
        drift, error = (relative_error(latents, each) for each in (theirs, ours))
        rows["engine"] = Row("engine", drift, error, rows["run"].tolerance, told)
    return Report(list(rows.values()))


def compare_layers(stage: Stage, side: Side, case: Case) -> list[Row]:
    """The rows of one call of a network."""
    calls: list[Call] = []
    root, failed = stage.layers[-1], ""
    try:
        record(side.modules, lambda: side.call(stage.name, root.inputs, case.prompt), calls)
    except RuntimeError as misfit:  # a layer gave the next one what it cannot take
        failed = str(misfit)
    own = {call.name: call for call in calls}
    rows, leaves, least = list[Row](), dict[str, float](), LEAST * roundoff(side.dtype)
    if stage.name == "text" and root.name in own:
        ours, theirs = (each["x"] for each in (own[root.name].inputs, root.inputs))
        assert isinstance(ours, Tensor)
        error = relative_error(ours, theirs) if isinstance(theirs, Tensor) else UNLIKE
        rows.append(Row("tokens", error, error, least, "the prompt is read as other tokens"))
    for layer in stage.layers:
        call = own.get(layer.name)
        if call is None:
            continue
        try:
            output = replay(call, layer.inputs)
            error, remark = relative_error(output, layer.output), ""
            floor = layer.floor if layer.floor is not None else noise_floor(call, layer.inputs, output, side.dtype)
        except RuntimeError as misfit:
            error, floor, remark = UNLIKE, 0.0, f"cannot take the reference's input: {misfit}"
        parts = [part for name, part in leaves.items() if layer is root or name.startswith(f"{layer.name}.")]
        floor = max(floor, roundoff(side.dtype), math.sqrt(sum(part**2 for part in parts)))
        if not parts:
            leaves[layer.name] = floor
        drift = relative_error(call.output, layer.output)
        rows.append(Row(layer.name, drift, error, max(FACTOR * floor, least), remark))
    if failed:
        rows.append(Row(root.name, UNLIKE, UNLIKE, least, f"fails here: {failed}"))
    return rows


def compare_run(
    stage: Stage, side: Side, checkpoint: Checkpoint, case: Case, before: Mapping[str, Row], ends: list[Tensor]
) -> Iterator[Row]:
    """The rows of a whole run.

    minpaint's algorithm runs twice: with its own networks, for the drift, and with the reference's answers
    in place of the networks', each step starting where the reference's did, for the errors of its own.
    before: the rows so far. ends: gets the final latents of minpaint and of the reference.
    """
    theirs, least = stage.tensors, LEAST * roundoff(side.dtype)
    networks = PlainNetworks(side.modules["unet"], checkpoint.vae, side.modules["text_encoder"], checkpoint.tokenizer)

    def run(answers: Tensors | None, jitter: bool = False) -> Tensors:
        watched = Watched(networks, side.device, side.dtype, case, answers, jitter, draws=theirs)
        return run_minpaint(checkpoint, case, watched)

    calls, wanted = len(open_schedule(checkpoint, case)[1].timesteps), count_steps(theirs)
    steps = (f"step.{k}.{part}" for k in range(wanted) for part in ("x", "t", "context", "output", "guided", "latents"))
    if lacking := [name for name in ("embeddings", "encode.0.pixels", "picture", *steps) if name not in theirs]:
        raise InputError(f"the recorded run has no {lacking[0]}; see minpaint/study/parity_dump.py for what it needs")
    if calls != wanted:
        yield Row("timesteps", UNLIKE, UNLIKE, least, f"{calls} calls of the UNet, the reference has {wanted}")
        return
    try:
        own, noisy, ours = run(theirs), run(theirs, jitter=True), run(None)
    except RuntimeError as misfit:
        yield Row("run", UNLIKE, UNLIKE, least, f"fails: {misfit}")
        return

    def tolerance(name: str, *parts: str) -> float:
        measured = [relative_error(noisy[part], own[part]) for part in parts]
        return max(FACTOR * max([stage.floors.get(name, 0.0), *measured]), least)

    def row(name: str, key: str, part: Callable[[Tensor], Tensor] = lambda tensor: tensor, remark: str = "") -> Row:
        reference = part(theirs[key])
        drift, error = (relative_error(part(run_[key]), reference) for run_ in (ours, own))
        return Row(name, drift, error, tolerance(name, key), remark)

    embedded = relative_error(ours["embeddings"], theirs["embeddings"])
    text = max(least, before["text_encoder"].tolerance if "text_encoder" in before else least)
    yield Row("text", embedded, embedded, text, "the prompts' embeddings differ")
    for number in range(sum(name.endswith(".pixels") for name in own)):
        pixels = own[f"encode.{number}.pixels"]
        error = relative_error(pixels, theirs[f"{nearest_encoded(theirs, pixels)}.pixels"])
        yield Row("canvas", error, error, least, "other pixels are encoded")
    draws = [name for name in own if name.startswith("draw.") and name in theirs]
    start = row("draws", "step.0.x", lambda x: x[:, :4])
    error = max([start.own, *(relative_error(own[name], theirs[name]) for name in draws)])
    yield replace(start, own=error, remark="the noise that the run starts from differs")
    if own["step.0.x"].shape[1] > 4:
        yield row(
            "conditioning", "step.0.x", lambda x: x[:, 4:], "the mask or the latents of the masked picture differ"
        )
    guided = [f"step.{k}.guided" for k in range(calls)]
    errors = [relative_error(own[name], theirs[name]) for name in guided]
    errors.append(relative_error(own["step.0.context"], theirs["step.0.context"]))
    drift = max(relative_error(ours[name], theirs[name]) for name in guided)
    yield Row(
        "guidance", drift, max(errors), tolerance("guidance", *guided), "guidance combines the outputs differently"
    )
    for k in range(calls):
        t, reference_t = (round(float(tensors[f"step.{k}.t"])) for tensors in (own, theirs))
        step = row(f"step {k}", f"step.{k}.latents")
        if t != reference_t:
            told = f"the UNet is called at timestep {t}, the reference's at {reference_t}"
            step = replace(step, own=max(step.own, abs(t - reference_t) / 1000, 2 * step.tolerance), remark=told)
        yield step
    last = f"step.{wanted - 1}.latents"
    latents = theirs[last].float() / checkpoint.architecture.vae.scaling_factor
    picture = to_unit(to_image(Watched(networks, side.device, side.dtype, case).decode(latents.to(side.device))[0]))
    level = (1 / 255) * math.sqrt(theirs["picture"].numel()) / max(float(theirs["picture"].norm()), 1 / 255)
    decode = before["vae.decode"].tolerance if "vae.decode" in before else least
    drift, error = (relative_error(each, theirs["picture"]) for each in (ours["picture"], picture))
    yield Row("picture", drift, error, level + decode)
    run_floor = stage.floors.get("run")
    if run_floor is None:
        run_floor = relative_error(run(None, jitter=True)[last], ours[last])
    allowed = max(FACTOR * run_floor, least)
    end = relative_error(ours[last], theirs[last])
    yield Row("run", end, end, allowed, "every part agrees by itself, but not the whole run")
    ends += [ours[last], theirs[last]]
