"""python -m minpaint.study.exercises [NUMBER [FILE]]: the list, one exercise, or whether your answer is right.

Write the function that an exercise asks for into a Python file, answers.py in the current folder unless another is
named, and run the same command again. Everything runs offline on the bundled tiny model.
Exit codes: 0 right, 1 wrong, 2 nothing to check.
"""

from __future__ import annotations

import runpy
import sys
import warnings
from pathlib import Path

from minpaint.errors import one_line
from minpaint.study.exercises import engine, networks, sampling  # noqa: F401, which add their exercises
from minpaint.study.exercises.lab import EXERCISES, Exercise, Lab

NUMBERED = dict(enumerate(sorted(EXERCISES, key=lambda each: each.chapter), start=1))


def main(arguments: list[str]) -> int:
    if not arguments:
        print(__doc__)
        for number, each in NUMBERED.items():
            print(f"{number:3}  {each.name:20} {each.chapter}")
        return 0
    known = {str(number): each for number, each in NUMBERED.items()}
    if arguments[0] not in known or len(arguments) > 2:
        print(f"exercise {arguments[0]!r} is unknown; use a number from 1 to {len(known)}", file=sys.stderr)
        return 2
    return check(known[arguments[0]], Path(arguments[1] if len(arguments) > 1 else "answers.py"))


def check(exercise: Exercise, file: Path) -> int:
    """Try the answer in a file, and say right or wrong; without one, say what is asked."""
    try:
        answers = runpy.run_path(str(file)) if file.exists() else {}
    except Exception as error:
        print(f"wrong: {file} cannot be run ({type(error).__name__}: {one_line(str(error))})")
        return 1
    if exercise.name not in answers:
        print(f"Chapter {exercise.chapter}: {exercise.name}\n\n{exercise.task}\n")
        print(f"Write {exercise.name} into {file}, and run this again.")
        return 2
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = exercise.check(Lab(), answers[exercise.name])
    except Exception as error:
        print(f"wrong: {exercise.name} fails ({type(error).__name__}: {one_line(str(error))})")
        return 1
    print(f"{'right' if result.right else 'wrong'}: {result}")
    return 0 if result.right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
