"""`info`: print the record of a painting."""

from __future__ import annotations

import json
from argparse import Namespace

from minpaint.cli.options import source
from minpaint.cli.terminal import Note
from minpaint.picture.saving import read_record


def run(options: Namespace, note: Note) -> None:
    record = read_record(source(options.file))
    if options.json:
        print(json.dumps(record))
        return
    for key, value in record.items():
        print(f"{key}: {value if isinstance(value, str) else json.dumps(value)}")
