"""Paint the rows of a manifest, and do only what is not done yet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from minpaint.batch.together import alike, paint_together
from minpaint.errors import InputError, MinpaintError, one_line
from minpaint.painter import Job, Painter, Painting
from minpaint.picture.frame import Frame, open_frame
from minpaint.picture.saving import FORMATS, SAVING, Record, read_record, save
from minpaint.settings import Settings

# Of a record: what a painting does not depend on, and the names of files whose SHA-256 stands beside them.
NO_MATTER = ("minpaint", "torch", "device", "image", "mask")
Outcome = dict[str, Any]  # of a row: its number, output and seed; then what the receipt says, or the error


@dataclass(frozen=True)
class Task:
    """A row that has been checked, ready to be painted.

    row: its number. image, mask: files. settings: complete. target: where the painting goes.
    record: what it will hold, so that a later run can tell whether it is what is asked then.
    done: it is there already, and is painted only as a part of its batch.
    """

    row: int
    image: str
    mask: str | None
    settings: Settings
    target: Path
    record: Record
    done: bool = False

    def is_done(self) -> bool:
        """Whether the target is there, whole, and painted as is asked now."""
        try:
            found = read_record(self.target)
        except InputError:
            return False
        asked = json.loads(json.dumps(self.record))
        return all(key in NO_MATTER or (key in found and found[key] == value) for key, value in asked.items())

    def open(self) -> Frame:
        """Its picture and mask, which must still be those that were checked."""
        content: list[BytesIO | None] = []
        for what, file in (("image", self.image), ("mask", self.mask)):
            content.append(None if file is None else BytesIO(Path(file).read_bytes()))
            if content[-1] and hashlib.sha256(content[-1].getbuffer()).hexdigest() != self.record[f"{what}_sha256"]:
                raise InputError(f"{what} {file} has changed since the run began; start it again")
        return open_frame(content[0] or "", content[1], self.settings)

    def save(self, frame: Frame, painting: Painting) -> Outcome:
        kept = frame if self.settings.profile == "minpaint" else None
        receipt = save(painting.image, kept, self.record, self.target)
        return self.outcome(seam=round(painting.seam, 3), receipt=asdict(receipt) if receipt else None)

    def outcome(self, **more: object) -> Outcome:
        return {"row": self.row, "path": str(self.target), "seed": self.settings.seed, **more}


def attempt(work: Callable[..., Any], *given: Any) -> Any:
    """What the work gives, or the exception it ends with; one that is given comes through."""
    try:
        return next((each for each in given if isinstance(each, Exception)), None) or work(*given)
    except Exception as error:
        return error


# The three stages that a block of rows goes through. One row's exception takes the place of its frame or painting.


def open_all(block: list[Task]) -> list[Any]:
    return [attempt(task.open) for task in block]


def paint_all(painter: Painter, block: list[Task], frames: list[Any]) -> list[Any]:
    """Paint frames, those of equal size together."""

    def job_of(task: Task, frame: Frame) -> Job:
        return painter.job(frame, task.settings, SAVING[FORMATS[task.target.suffix.lower()]])

    def paint_alone(job: Job) -> Painting:
        return painter.paint(job.frame, job.settings, saving=job.request.saving)[0]

    made = [attempt(job_of, *pair) for pair in zip(block, frames, strict=True)]
    groups: dict[Hashable, list[int]] = {}
    for number, job in enumerate(made):
        if isinstance(job, Job):
            groups.setdefault(alike(job), []).append(number)
    for group in groups.values():
        jobs = [made[number] for number in group]
        together = attempt(paint_together, painter, jobs) if len(group) > 1 else None
        if not isinstance(together, list):  # a group that fails is painted one by one: the fault may be one row's
            together = [attempt(paint_alone, job) for job in jobs]
        for number, painting in zip(group, together, strict=True):
            made[number] = painting
    return made


def save_all(block: list[Task], frames: list[Any], painted: list[Any]) -> list[Outcome]:
    """Write the paintings; says of each row what became of it."""
    outcomes = []
    for task, *made in zip(block, frames, painted, strict=True):
        if not task.done:
            outcome = attempt(task.save, *made)
            if isinstance(outcome, Exception):
                name = "" if isinstance(outcome, MinpaintError) else f"{type(outcome).__name__}: "
                outcome = task.outcome(error=one_line(f"{name}{outcome}"))
            outcomes.append(outcome)
    return outcomes


def run_here(painter: Painter, blocks: list[list[Task]]) -> Iterator[list[Outcome]]:
    """Paint block after block; while the network works, the next is opened and the last one saved."""
    with ThreadPoolExecutor(2) as threads:
        opening, saving = threads.submit(open_all, blocks[0]), None
        for block, following in zip(blocks, [*blocks[1:], []], strict=True):
            frames = opening.result()
            opening = threads.submit(open_all, following)
            painted = paint_all(painter, block, frames)
            if saving is not None:
                yield saving.result()
            saving = threads.submit(save_all, block, frames, painted)
            del frames, painted  # or they would be in memory for as long as the next block is painted
        if saving is not None:
            yield saving.result()
