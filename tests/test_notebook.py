"""The notebook runs from its first cell to its last, and is committed with what it printed and drew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "minpaint.ipynb"


def opened() -> Any:
    return nbformat.read(NOTEBOOK, 4)


def outputs(notebook: Any) -> list[list[str]]:
    """The kinds of output of each cell of code: "text" or "picture"; what goes to stderr is none."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [
        [
            "picture" if "image/png" in each.get("data", {}) else "text"
            for each in cell.outputs
            if each.get("name") != "stderr"
        ]
        for cell in cells
    ]


@pytest.mark.slow
def test_every_cell_runs_and_shows_what_was_committed(tmp_path: Path) -> None:
    notebook = opened()
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()  # raises if a cell does
    assert outputs(notebook) == outputs(opened())
    assert (tmp_path / "trace.html").stat().st_size > 10**5


def test_it_is_committed_with_its_outputs() -> None:
    kinds = outputs(opened())
    assert all(kinds)
    assert sum(kind == ["picture"] for kind in kinds) == 4
    assert NOTEBOOK.stat().st_size < 10**6


def test_one_switch_at_its_top_selects_the_model() -> None:
    code = [cell.source for cell in opened().cells if cell.cell_type == "code"]
    assert 'MODEL = "sd15" if torch.cuda.is_available() else "tiny"' in code[0]
    assert not any(line.startswith("MODEL =") for source in code[1:] for line in source.splitlines())
