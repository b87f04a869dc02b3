"""Every message that the program can give, to be read side by side: `python -m tests.messages [FILE]`.

A message is the text of an error, a warning or a note, as the source writes it: what it quotes stands in
braces. FILE: what the tests have raised, as `MINPAINT_MESSAGES=FILE python -m pytest` writes it; then an
exclamation mark stands before each error and warning that no test in that process has provoked.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import minpaint

PACKAGE = Path(minpaint.__file__).parent
WARNING, NOTE = {"warn", "_tell"}, {"note", "_say", "error"}  # functions whose first argument is a message


def messages(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, kind ("InputError", "warn", ...) and text of each message in a module."""
    tree = ast.parse(source)
    held: dict[str, list[str]] = {}  # by variable: messages that are put together before they are given
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and (text := written(node.value)):
            held.setdefault(node.targets[0].id, []).append(text)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        kind, first = ast.unparse(node.func).rpartition(".")[2], node.args[0]
        if kind in WARNING | NOTE or kind.endswith("Error"):
            for text in held.get(first.id, []) if isinstance(first, ast.Name) else [written(first)]:
                if text:
                    yield node.lineno, kind, text


def written(node: ast.expr) -> str:
    """The text of a string, with what an f-string quotes in braces; nothing for other expressions."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(written(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return f"{{{ast.unparse(node.value)}}}"
    return f"{written(node.left)}{written(node.right)}" if isinstance(node, ast.BinOp) else ""


def is_provoked(text: str, given: str) -> bool:
    """Whether a line of `given` is this message with something in the place of the braces."""
    pieces = re.split(r"\{.*?\}(?![^{]*\})", " ".join(text.split()))
    return re.search(".*".join(map(re.escape, pieces)), given) is not None


if __name__ == "__main__":
    given = Path(sys.argv[1]).read_text(encoding="utf-8") if sys.argv[1:] else None
    for path in sorted(PACKAGE.rglob("*.py")):
        for line, kind, text in messages(path.read_text(encoding="utf-8")):
            missed = given is not None and kind not in NOTE and not is_provoked(text, given)
            print(f"{'!' if missed else ' '} {path.relative_to(PACKAGE)}:{line}: {kind}: {text}")
