"""The studio: pictures in a folder, the masks drawn for them, and a worker that paints, one painting at a time.

A picture's folder holds `picture.*`, the file as it was given; `about.json`; `mask.png`, the mask as drawn so far; and
of every painting NUMBER-mask.png, NUMBER-SEED.png for each seed, and NUMBER.json, which says what came of it.
"""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

from PIL import Image
from torch import Tensor

from minpaint.engine.budget import format_size
from minpaint.errors import InputError, MinpaintWarning, one_line
from minpaint.models.networks import Networks
from minpaint.painter import Job, Painter
from minpaint.picture.frame import Frame, open_frame
from minpaint.picture.image import alpha_of, open_image, to_levels
from minpaint.picture.saving import FORMATS, SAVING, Record, new_file, save
from minpaint.samplers import Step
from minpaint.settings import Settings
from minpaint.study.page import as_url
from minpaint.study.preview import Pair, fit_rgb, pair, preview

TINT = (255, 40, 110, 150)  # of the latent cells that the network repaints
Told = dict[str, Any]  # what the page is told, as JSON


class CancelledError(Exception):
    """Somebody does not want the painting any more."""


@dataclass
class Order:
    """A painting that was asked for. told: its `state` (waiting, painting, done, failed, cancelled), how far it is."""

    told: Told
    settings: Settings
    wanted: bool = True


class Studio:
    """A painter and a folder. `record(settings, image, mask)` gives what repeats a run in these files."""

    def __init__(self, painter: Painter, folder: Path, record: Callable[[Settings, Path, Path | None], Record]) -> None:
        self.painter, self.folder, self.record = painter, folder, record
        self.orders: list[Order] = []  # since the start
        self.queue: SimpleQueue[Order | None] = SimpleQueue()
        self.turn = threading.Lock()  # held by whoever uses the painter
        self.rate = 0.0  # seconds for a pixel of one row of the UNet's batch, in the last painting
        self.worker = threading.Thread(target=self._work, daemon=True)
        self.worker.start()

    def close(self) -> None:
        """Cancel what is painted and what waits, and end the worker."""
        for order in self.orders:
            order.wanted = False
        self.queue.put(None)
        self.worker.join()

    def add(self, content: bytes, name: str) -> Told:
        """A new picture from a file's bytes; InputError if it is none."""
        file = BytesIO(content)
        file.name = name
        image = open_image(file)
        with Image.open(file) as opened:
            suffix = next((suffix for suffix, kind in FORMATS.items() if kind == opened.format), ".bin")
        number = 1 + max((int(place.name) for place in self.folder.iterdir() if place.name.isdecimal()), default=0)
        place = self.folder / f"{number:05}"
        place.mkdir()
        about = {"id": place.name, "name": name, "file": f"picture{suffix}", "alpha": alpha_of(image) is not None}
        _write(place / f"picture{suffix}", content)
        about |= {"width": image.width, "height": image.height}
        _write(place / "about.json", json.dumps(about).encode())
        return self.about(place)

    def about(self, place: Path) -> Told:
        """A picture and its paintings."""
        paintings = [json.loads(file.read_bytes()) for file in sorted(place.glob("[0-9]*.json"))]
        told = {"mask": (place / "mask.png").exists(), "paintings": paintings}
        return json.loads((place / "about.json").read_bytes()) | told  # type: ignore[no-any-return]

    def keep_mask(self, place: Path, content: bytes) -> None:
        """Keep the mask as it is drawn so far; without content there is none."""
        if not content:
            (place / "mask.png").unlink(missing_ok=True)
            return
        about, size = self.about(place), open_image(BytesIO(content), "mask").size
        if size != (about["width"], about["height"]):
            raise InputError(f"the mask is {size[0]}x{size[1]}, the picture is not; draw it on this picture")
        _write(place / "mask.png", content)

    def plan(self, place: Path, settings: Settings) -> Told:
        """What a painting would take, and the latent cells that the network would repaint, as a picture to lay over."""
        if not self.turn.acquire(blocking=False):
            return {"text": "It is planned when its turn comes."}
        try:
            with warnings.catch_warnings(record=True) as notes:
                warnings.simplefilter("always", MinpaintWarning)
                frame = self._frame(place, settings, place / "mask.png")
                job, engine = self.painter.job(frame, settings, SAVING["PNG"]), self.painter.engine
            plan = engine.planner().choose(job.request, engine.budget, engine.base)
            cells = _cells(job)
        finally:
            self.turn.release()
        calls = len(job.views) * len(job.schedule.timesteps)
        seconds = calls * self.rate * job.request.rows * job.request.area
        sizes = ", ".join(f"{width} x {height}" for width, height in (view.extent for view in job.views))
        told = f"{calls} steps at {sizes}; memory {format_size(plan.peak)} of {format_size(plan.budget)}; "
        told += f"about {max(seconds, 1):.0f} s" if self.rate else "the time is known after the first painting"
        return {"text": "\n".join([told, *_texts(notes)]), "table": plan.table(), "cells": as_url(cells, "PNG")}

    def order(self, place: Path, settings: Settings) -> Told:
        """Ask for a painting with the mask as it is now; it waits for its turn."""
        taken = [int(file.name.partition("-")[0]) for file in place.glob("[0-9]*-mask.png")]
        number, mask = f"{max(taken, default=0) + 1:04}", place / "mask.png"
        _write(place / f"{number}-mask.png", mask.read_bytes() if mask.exists() else b"")  # takes the number, too
        told = {"order": len(self.orders), "picture": place.name, "painting": number, "state": "waiting"}
        self.orders.append(Order(told | {"prompt": settings.prompt}, settings))
        self.queue.put(self.orders[-1])
        return self.orders[-1].told

    def _work(self) -> None:
        while (order := self.queue.get()) is not None:
            try:
                with self.turn, warnings.catch_warnings(record=True) as notes:
                    warnings.simplefilter("always", MinpaintWarning)
                    self._paint(order, notes)
            except CancelledError:
                order.told["state"] = "cancelled"
            except Exception as error:  # out of memory, a full disk: the next painting may go well
                order.told |= {"state": "failed", "error": one_line(str(error)) or type(error).__name__}
            order.told.pop("preview", None)

    def _paint(self, order: Order, notes: list[warnings.WarningMessage]) -> None:
        told, painter, place = order.told, self.painter, self.folder / order.told["picture"]
        settings, mask = painter.complete(order.settings), place / f"{told['painting']}-mask.png"
        frame = self._frame(place, settings, mask)
        views, view, started = painter.views(frame, settings), -1, 0.0
        request, pairs = painter.request(frame, settings, views), list[Pair]()  # what the preview is fitted to
        told |= {"state": "painting", "step": 0, "total": 0}

        def watched(networks: Networks) -> Any:
            """The run's networks, by which a cancelled order ends before their next call."""

            def unless_cancelled(call: Callable[..., Any]) -> Callable[..., Any]:
                def called(*given: Tensor | str) -> Any:
                    if not order.wanted:
                        raise CancelledError
                    return call(*given)

                return called

            def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
                mean, logvar = networks.encode(pixels)
                pairs.append(pair(painter.vae_config.scaling_factor * mean, pixels))
                return mean, logvar

            calls = {name: getattr(networks, name) for name in ("embed", "unet", "decode")} | {"encode": encode}
            return SimpleNamespace(**{name: unless_cancelled(call) for name, call in calls.items()})

        def on_step(step: Step) -> None:
            nonlocal started, view
            if step.i == 0:
                started, view = time.perf_counter(), view + 1
            else:
                self.rate = (time.perf_counter() - started) / step.i / request.rows / request.area
            told.update(step=view * step.total + step.i + 1, total=len(views) * step.total)
            told["left"] = self.rate * request.rows * request.area * (told["total"] - told["step"])
            shown, factor = views[view], painter.vae_config.factor
            width, height = (-(-side // factor) for side in getattr(shown, "size", shown.extent))
            small = [picture.crop((0, 0, width, height)) for picture in preview(step.x0, fit_rgb(pairs))]
            (left, top, *_), (x0, y0, x1, y1) = settings.margins, shown.box
            box, urls = (x0 - left, y0 - top, x1 - left, y1 - top), [as_url(picture, "PNG") for picture in small]
            told["preview"] = {"box": box, "urls": urls}

        before = painter.around
        painter.around = lambda networks: watched(before(networks))
        try:
            paintings = painter.paint(frame, settings, on_step, SAVING["PNG"])
        finally:
            painter.around = before
        record = self.record(settings, self._image(place), mask if mask.stat().st_size else None)
        results, kept = [], frame if settings.profile == "minpaint" else None
        for painting in paintings:
            file = place / f"{told['painting']}-{painting.seed}.png"
            receipt = str(save(painting.image, kept, record | {"seed": painting.seed}, file) or "nothing pasted back")
            result = {"file": file.name, "seed": painting.seed, "seam": round(painting.seam, 2), "receipt": receipt}
            results.append(result | {"margins": settings.margins})
        done = {"painting": told["painting"], "prompt": settings.prompt, "notes": _texts(notes), "results": results}
        _write(place / f"{told['painting']}.json", json.dumps(done).encode())
        told["state"] = "done"

    def _image(self, place: Path) -> Path:
        return place / str(self.about(place)["file"])

    def _frame(self, place: Path, settings: Settings, mask: Path) -> Frame:
        return open_frame(self._image(place), mask if mask.exists() and mask.stat().st_size else None, settings)


def _cells(job: Job) -> Image.Image:
    """Where the network repaints, cell by cell, as a picture of the frame's size with a clear ground."""
    sheet = Image.new("L", job.frame.original.size)
    for view in job.views:
        left, top, right, bottom = view.box
        cells = to_levels(view.canvas([job.start]).cells[0, 0].ceil()).resize(view.extent, Image.Resampling.NEAREST)
        inside = cells.crop((0, 0, *getattr(view, "size", view.extent)))
        shown = inside.resize((right - left, bottom - top), Image.Resampling.NEAREST)
        sheet.paste(1, view.box, shown)
    tinted = Image.frombytes("P", sheet.size, sheet.tobytes())
    tinted.putpalette([0, 0, 0, 0, *TINT], "RGBA")
    return tinted


def _texts(notes: list[warnings.WarningMessage]) -> list[str]:
    return [str(note.message) for note in notes if issubclass(note.category, MinpaintWarning)]


def _write(target: Path, content: bytes) -> None:
    with new_file(target, overwrite=True) as file:  # whole or not at all
        file.write(content)
