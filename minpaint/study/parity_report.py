"""What a comparison has found, as a table for the terminal, an object for programs, and a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

MOST = 20  # layers beyond their tolerance that the table lists
NETWORKS = ("text_encoder", "vae.encode", "unet", "vae.decode")
STYLE = """
body { font: 15px sans-serif; margin: 2em auto; max-width: 60em } td, th { padding: .15em .8em; text-align: right }
td:first-child, th:first-child { text-align: left; font-family: monospace } .differs { background: #fbb }
"""


@dataclass(frozen=True)
class Row:
    """One layer or part of a run, with the figures that parity.py explains. remark: what else there is to say."""

    name: str
    drift: float
    own: float
    tolerance: float
    remark: str = ""

    @property
    def agrees(self) -> bool:
        return self.own <= self.tolerance


@dataclass(frozen=True)
class Report:
    """The rows in the order of execution, and the first that does not agree."""

    rows: list[Row]

    @property
    def cause(self) -> Row | None:
        return next((row for row in self.rows if not row.agrees), None)

    def as_json(self) -> dict[str, Any]:
        """The object of --json: agree, first_cause, why, layers."""
        cause = self.cause
        layers = [
            {"name": row.name, "drift": row.drift, "own": row.own, "tolerance": row.tolerance} for row in self.rows
        ]
        why = cause and (cause.remark or f"own error {cause.own:.1e}, tolerance {cause.tolerance:.1e}")
        return {"agree": cause is None, "first_cause": cause and cause.name, "why": why, "layers": layers}

    def verdict(self) -> str:
        """One line."""
        cause = self.cause
        if cause is None:
            return f"agree: all {len(self.rows)} layers and parts of a run are within the noise of rounding"
        return f"differ: the first cause is {cause.name} ({self.as_json()['why']})"

    def table(self) -> str:
        """The networks as a whole and the run, and the first layers that do not agree."""
        wrong = [row for row in self.rows if not row.agrees]
        shown = [row for row in self.rows if row.name in NETWORKS or "." not in row.name or row in wrong[:MOST]]
        width = max(len(row.name) for row in shown)
        lines = [f"{'':{width}}    drift own error tolerance"]
        for row in shown:
            figures = f"{row.drift:9.1e} {row.own:9.1e} {row.tolerance:9.1e}"
            lines.append(f"{row.name:{width}} {figures}{'' if row.agrees else '  differs'}")
        if len(wrong) > MOST:
            lines.append(f"... and {len(wrong) - MOST} more that differ; see --json or --html")
        return "\n".join(lines)

    def page(self, facts: Mapping[str, object]) -> str:
        """All rows as a page of HTML that needs no other file; facts: what was compared, by name."""
        cells = []
        for row in self.rows:
            figures = "".join(f"<td>{value:.1e}</td>" for value in (row.drift, row.own, row.tolerance))
            kind = "" if row.agrees else ' class="differs"'
            told = "" if row.agrees else row.remark
            cells.append(f"<tr{kind}><td>{escape(row.name)}</td>{figures}<td>{escape(told)}</td></tr>")
        told = "; ".join(f"{name} {value}" for name, value in facts.items())
        head = "<tr><th>layer</th><th>drift</th><th>own error</th><th>tolerance</th><th></th></tr>"
        return (
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>minpaint parity</title>'
            f"<style>{STYLE}</style></head>\n<body><h1>{escape(self.verdict())}</h1>\n<p>{escape(told)}</p>\n"
            f"<p>Relative errors. Drift: each side on its own input. Own error: on the reference's input.</p>\n"
            f"<table>{head}\n" + "\n".join(cells) + "\n</table></body></html>\n"
        )
