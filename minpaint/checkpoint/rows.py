"""Reading a configuration by a table: for each field a row says which key becomes it, and what it may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from minpaint.errors import CheckpointError

# The most of each that a file may ask for: more than any checkpoint has, and blank models are still made in seconds.
LEVELS, LAYERS, TEXT_LAYERS, WIDTH, ENTRIES = 8, 16, 256, 2**16, 2**20
REQUIRED = object()  # as a default: the file must say it
ANY = object()  # as the one value of a key: whatever the file says changes nothing

Json = Mapping[str, Any]
Row = tuple[str, Any, Callable[[Any], bool], str]  # a key, its default, a check of its value, what the check wants


def count(key: str, default: Any, most: int = WIDTH, least: int = 1) -> Row:
    return key, default, lambda n: type(n) is int and least <= n <= most, f"must be {least} to {most}"


def counts(key: str, default: Any) -> Row:
    """A list of counts, one a level; with a default that is one count, also one count for all levels."""

    def accepts(value: Any) -> bool:
        entries = [value] if isinstance(default, int) and not isinstance(value, list) else value
        return isinstance(entries, list) and 0 < len(entries) <= LEVELS and all(map(count(key, 1)[2], entries))

    return key, default, accepts, f"must be counts of 1 to {WIDTH}, one for each of 1 to {LEVELS} levels"


def number(key: str, default: float, limit: float = 1e6) -> Row:
    wanted = f"must be more than 0 and less than {limit:g}"
    return key, default, lambda x: type(x) in (int, float) and 0 < x < limit, wanted


def choice(key: str, default: Any, *supported: Any) -> Row:
    alike = [(type(value), value) for value in supported]  # 1 and 1.0 and true are three values
    return key, default, lambda x: (type(x), x) in alike, f"only {', '.join(map(str, supported))}"


def flag(key: str, default: bool | None) -> Row:
    return choice(key, default, False, True)


def types(key: str, default: Any, *supported: str) -> Row:
    wanted = f"must be a list of {' or '.join(supported)}"
    return key, default, lambda x: isinstance(x, list) and all(name in supported for name in x), wanted


def read_rows(file: str, source: Json, rows: Mapping[str, Row], fixed: Json, others: bool = False) -> dict[str, Any]:
    """The value of each field, lists as tuples; CheckpointError names a missing key or an unsupported value.

    fixed: the keys that can have one value only. others: whether keys beside these are allowed;
    otherwise one is refused unless it is null or false, and so asks for nothing.
    """
    values = {}
    for field, (key, default, accepts, wanted) in rows.items():
        value = default if source.get(key) is None else source[key]
        if value is REQUIRED:
            raise CheckpointError(f"{file}: {key} is missing; fetch the file again")
        check(value is None or accepts(value), file, key, value, wanted)
        values[field] = tuple(value) if isinstance(value, list) else value
    known = {key for key, *_ in rows.values()}
    for key, found in source.items():
        if key in fixed:
            # null asks for the default, and a list of the value says it once a level
            entries = found if isinstance(found, list) and found else [found]
            alike = fixed[key] is ANY or all(entry is None or entry == fixed[key] for entry in entries)
            check(alike, file, key, found, f"only {fixed[key]!r}")
        elif not others and key not in known and not key.startswith("_"):
            check(found is None or found is False, file, key, found, "a setting this version does not know")
    return values


def check(supported: bool, file: str, key: str, value: object, wanted: str) -> None:
    """CheckpointError that names the file, the key and what is wanted, unless the value is supported."""
    if not supported:
        shown = repr(value) if len(repr(value)) < 200 else f"{repr(value)[:200]}..."
        raise CheckpointError(f"{file}: {key} {shown} is not supported ({wanted})")
