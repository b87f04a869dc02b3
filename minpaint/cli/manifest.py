"""What a manifest or a folder asks for: a row for each painting, as words of the command line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from minpaint.errors import InputError
from minpaint.settings import Settings

Row = dict[str, Any]  # the values of its columns; those that are left out keep their defaults
SWITCHES = {field.name for field in fields(Settings) if isinstance(field.default, bool)}
COLUMNS = ("image", "mask", "output", *(field.name for field in fields(Settings)))
ON, OFF = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
OF_MASK = "_mask"  # ends the stem of a mask that lies beside its picture


def words(row: Row, folder: Path) -> list[str]:
    """A row as options of `paint`, with its files found from a folder; InputError for what cannot be one."""
    options = []
    for column, value in row.items():
        if column not in COLUMNS:
            raise InputError(f"unknown column {column!r}; the columns are {', '.join(COLUMNS)}")
        text, option = str(value), column.replace("_", "-")
        if column in SWITCHES:
            if text.strip().lower() not in (*ON, *OFF):
                raise InputError(f"{column} {value!r} is neither true nor false")
            options.append(f"--{option}" if text.strip().lower() in ON else f"--no-{option}")
            continue
        if column == "expand" and isinstance(value, Mapping):
            text = ",".join(f"{side}={pixels}" for side, pixels in value.items())
        elif isinstance(value, bool) or not isinstance(value, str | int | float):
            raise InputError(f"{column} cannot be {json.dumps(value)}")
        options.append(f"--{option}={folder / text if column in ('image', 'mask') else text}")
    return options


def read_rows(
    source: Path, masks: Path | None, suffixes: Collection[str], fault: Callable[[str], None]
) -> list[tuple[int, Row]]:
    """The numbered rows of a manifest (JSONL or CSV), or of a folder of pictures.

    masks: the mask of all rows that name none; or, for a folder of pictures, a folder of masks with their stems.
    suffixes: of pictures. fault: is told what is wrong with single rows; those are left out here.

    Raises:
        InputError: there is no such manifest, or it cannot be read as a whole.
    """
    kinds = {".csv": _from_csv, ".jsonl": _from_jsonl}
    if masks is not None and not masks.exists():
        raise InputError(f"masks {masks}: no such file or folder")
    if masks is not None and masks.is_dir() and not source.is_dir():
        raise InputError(f"masks {masks} is a folder, which only a folder of pictures can have; name one file for all")
    try:
        if source.is_dir():
            return list(_in_folder(source, masks, suffixes, fault))
        if source.suffix.lower() not in kinds:
            raise InputError(f"manifest {source} is neither .jsonl nor .csv nor a folder that exists")
        return list(kinds[source.suffix.lower()](source, fault))
    except (OSError, UnicodeError, csv.Error) as error:
        told = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise InputError(f"manifest {source}: {told}") from None


def _from_jsonl(source: Path, fault: Callable[[str], None]) -> Iterator[tuple[int, Row]]:
    for number, text in enumerate(filter(str.strip, source.read_text(encoding="utf-8-sig").split("\n")), 1):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            row = error
        if isinstance(row, dict):
            yield number, {column: value for column, value in row.items() if value is not None}
        else:
            told = f" ({row})" if isinstance(row, Exception) else ""
            fault(f'row {number} is not a JSON object{told}; write {{"image": ..., "mask": ..., "prompt": ...}}')


def _from_csv(source: Path, fault: Callable[[str], None]) -> Iterator[tuple[int, Row]]:
    with source.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        columns = [column.strip() for column in next(reader, [])]
        if "image" not in columns or len(set(columns)) < len(columns):
            raise InputError(f"manifest {source}: its first line must name the columns, each once, among them image")
        for number, cells in enumerate(filter(None, reader), 1):
            if len(cells) > len(columns):
                fault(f"row {number} has {len(cells)} cells for {len(columns)} columns; quote cells that hold commas")
            else:
                yield number, {column: cell for column, cell in zip(columns, cells, strict=False) if cell.strip()}


def _in_folder(
    folder: Path, masks: Path | None, suffixes: Collection[str], fault: Callable[[str], None]
) -> Iterator[tuple[int, Row]]:
    """Pictures by name. The mask of name.png is name_mask.png, or the one of its stem in a folder of masks."""

    def inside(place: Path) -> list[Path]:
        return sorted(path for path in place.iterdir() if path.suffix.lower() in suffixes and path.is_file())

    pictures, apart = inside(folder), masks is not None and masks.is_dir()
    found = inside(masks) if masks is not None and apart else []
    if masks is None:
        found = [path for path in pictures if path.stem.endswith(OF_MASK)]
        pictures = [path for path in pictures if path not in found]
    of_stem: dict[str, list[Path]] = {}
    for path in found:
        of_stem.setdefault(path.stem if apart else path.stem.removesuffix(OF_MASK), []).append(path.absolute())
    for number, picture in enumerate(pictures, 1):
        own = of_stem.pop(picture.stem, [])
        if len(own) > 1 or (apart and not own):
            fault(f"row {number}: {picture.name} has {len(own)} masks of its name{f' in {masks}' if apart else ''}")
        else:
            yield number, {"image": picture.name} | ({"mask": str(own[0])} if own else {})
    for own in of_stem.values() if not apart else ():
        fault(f"{own[0].name} is the mask of no picture in {folder}")
