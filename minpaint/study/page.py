"""A run as one HTML page that needs nothing beside it: pictures and plots lie in the file, its script is in page.html.

Plots are matplotlib's (in SVG); the sliders show frames of sprites, single pictures in which the maps of all steps
lie side by side.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from minpaint.errors import InputError
from minpaint.picture.image import to_image, to_levels

LARGEST = 512  # pixels on the longer side of a picture in the page

Line = tuple[Sequence[float], Sequence[float]]  # x and y
Panel = tuple[str, str, Mapping[str, Line]]  # of a plot: title, label of the x axis, lines by name


class Page:
    """Pieces of HTML, written one after the other. Pictures that a script uses have names of their own."""

    def __init__(self, title: str) -> None:
        self.title, self.pieces = title, [f"<h1>{html.escape(title)}</h1>"]
        self.new_name = partial(next, (f"picture-{number}" for number in itertools.count()))

    def add(self, piece: str) -> None:
        self.pieces.append(piece)

    def heading(self, text: str, note: str = "", level: int = 2) -> None:
        self.add(f"<h{level}>{html.escape(text)}</h{level}>")
        if note:
            self.note(note)

    def note(self, text: str) -> None:
        self.add(f'<p class="note">{html.escape(text)}</p>')

    def pictures(self, named: Iterable[tuple[str, Image.Image]]) -> None:
        """Pictures side by side, each with its caption."""
        figures = (f"<figure>{self.image(picture)}{caption(name)}</figure>" for name, picture in named)
        self.add(f'<div class="row">{"".join(figures)}</div>')

    def image(self, picture: Image.Image, name: str | None = None) -> str:
        """An img of a picture, scaled down to what the page shows."""
        shown = picture.convert("RGB")
        shown.thumbnail((LARGEST, LARGEST))
        return f'<img alt="" {f"id={name} " if name else ""}src="{as_url(shown, "JPEG", quality=88)}">'

    def sprite(self, frames: Tensor, name: str | None = None) -> str:
        """Add frames [n, 3 or 1, y, x] in [-1, 1] or, of one channel, [0, 1]; returns the name for `canvas`."""
        name = name or self.new_name()
        count, channels, y, x = frames.shape
        columns = math.ceil(math.sqrt(count * y / x))
        rows = -(-count // columns)
        padded = F.pad(frames, (0, 0, 0, 0, 0, 0, 0, columns * rows - count))
        sheet = rearrange(padded, "(rows columns) c y x -> c (rows y) (columns x)", rows=rows)
        picture = to_image(sheet) if channels == 3 else to_levels(sheet[0])
        url = as_url(picture, "PNG", optimize=True) if channels == 3 else as_url(picture, "WEBP", quality=80)
        places = f'data-width="{x}" data-height="{y}" data-columns="{columns}"'
        self.add(f'<img class="sprites" alt="" id="{name}" {places} src="{url}">')
        return name

    def finish(self) -> str:
        template = files("minpaint.study").joinpath("page.html").read_text(encoding="utf-8")
        return template.replace("{title}", html.escape(self.title)).replace("{body}", "\n".join(self.pieces))


def caption(text: str) -> str:
    return f"<figcaption>{html.escape(text)}</figcaption>"


def canvas(sprite: str, text: str, **data: str | int) -> str:
    """A figure that shows the slider's frame of a sprite."""
    more = "".join(f' data-{name}="{value}"' for name, value in data.items())
    return f'<figure><canvas data-sprite="{sprite}"{more}></canvas>{caption(text)}</figure>'


def slider(names: Sequence[str]) -> str:
    """The slider of a section, with what it says at each position."""
    told = html.escape(json.dumps(list(names)))
    value = len(names) - 1
    return (
        f'<div class="stepper"><label>step</label><input type="range" aria-label="step" min="0" max="{value}" '
        f'value="{value}" data-names="{told}"><output></output></div>'
    )


def table(rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    """Rows as a table; what is a number stands at the right."""

    def cell(value: object) -> str:
        return f"<td{' class=number' if isinstance(value, (int, float)) else ''}>{html.escape(str(value))}</td>"

    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in head)] if head else []
    lines += ["".join(cell(value) for value in row) for row in rows]
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def as_url(picture: Image.Image, kind: str, **options: Any) -> str:
    """A picture as a data URL."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def require_plots() -> None:
    """InputError if matplotlib, which draws the plots, is not installed."""
    if find_spec("matplotlib") is None:
        raise InputError('plots need matplotlib, which is not installed; pip install "minpaint[study]"')


def plot(*panels: Panel, log: Sequence[str] = ()) -> str:
    """Panels side by side as SVG.

    log: titles of the panels whose y axis is logarithmic. A line whose name begins with a dot is drawn as dots.
    """
    import matplotlib
    from matplotlib.figure import Figure

    drawn = []
    for title, label, lines in panels:
        file = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}):
            figure = Figure(figsize=(3.6, 2.6), layout="constrained")
            axes = figure.add_subplot(title=title, xlabel=label, yscale="log" if title in log else "linear")
            for name, (x, y) in lines.items():
                axes.plot(x, y, "." if name.startswith(".") else "-", markersize=4, label=name.lstrip("."))
            if len(lines) > 1:
                axes.legend(frameon=False)
            figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
        drawn.append(file.getvalue()[file.getvalue().index("<svg") :])
    return f'<div class="row">{"".join(drawn)}</div>'
