"""Fuzzing of all that a checkpoint's files can say: headers, configurations, tokenizers, indices, records.

    nice python -m tests.fuzz_checkpoints --headers 100000 --files 5000 --records 5000

From sound files, seeded random mutations make others, which go through the functions that a run reads them
with. Whatever they hold must end in success or in a MinpaintError of the right class, in one line of at most
600 characters, within ten seconds of processor time and the memory limit; a panic of the libraries in Rust is
no Exception and counts as a crash. The program prints every find with its seed and how often each message came.
`test_fuzz.py` runs the first few hundred.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from folders import alone, hollow_single_file
from PIL import Image, PngImagePlugin

from minpaint.checkpoint.configs import FILES as CONFIGS
from minpaint.checkpoint.load import describe
from minpaint.checkpoint.single_file import open_single_file
from minpaint.checkpoint.tensorfile import FLOATS, piece_buffer, read_directory, read_into, read_tensors
from minpaint.cli.options import parse
from minpaint.engine.device import choose_dtype
from minpaint.errors import BudgetError, CheckpointError, InputError, MinpaintError
from minpaint.models.text import build_text_encoder, encode_prompt
from minpaint.samplers import SAMPLERS
from minpaint.schedule import make_schedule
from weights.random_checkpoint import FAMILIES, write_checkpoint

LONGEST, SECONDS, MEMORY = 600, 10, 6 << 30  # of a message, of a case, of the process
Case = Callable[[random.Random], object]

NUMBERS = [0, 1, -1, 2, 3, 7, 8, 77, 255, 2**16, 2**20, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, -(2**63)]
FLOATING = [0.0, -0.0, 0.5, -1.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"), 1e5]
STRINGS = ["", "0", "F32", "I64", "BF16", "F4", "F8_E4M3", "C64", "x" * 3000, "two\nlines", "\x1b[2J", "\u2028", "\0"]
STRINGS += ["\ud800", "..", "../../x", "/etc/passwd", "CrossAttnDownBlock2D", "DDIMScheduler", "{}", "<|endoftext|>"]


def value(rng: random.Random, depth: int = 0) -> Any:
    """Anything that JSON can say, and some of what it cannot."""
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind < 2:
        return rng.choice(NUMBERS) + rng.choice((0, 0, 0, 1, -1))
    if kind < 6:
        return rng.choice((rng.choice(FLOATING), rng.choice(STRINGS), rng.choice((None, True, False)), rng.random()))
    if kind == 6:
        return [value(rng, depth + 1) for _ in range(rng.choice((0, 1, 2, 4, 9)))]
    return {rng.choice(STRINGS): value(rng, depth + 1) for _ in range(rng.choice((0, 1, 3)))}


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every container in a JSON value with each of its keys."""
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [place for key, child in inside for place in ((content, key), *places(child))]


def mutate(content: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one to four places changed, dropped, doubled or exchanged."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        found = places(content)
        if not found or rng.random() < 0.01:
            return value(rng)
        holder, key = rng.choice(found)
        how = rng.randrange(6)
        if how < 3:
            old = holder[key]
            whole = type(old) is int and rng.random() < 0.5
            holder[key] = old + rng.choice((1, -1, 8, -8, old, -old // 2)) if whole else value(rng)
        elif how == 3:
            del holder[key]
        elif how == 4:
            other, there = rng.choice(found)
            holder[key] = copy.deepcopy(other.get(there) if isinstance(other, dict) else (other or [0])[0])
        elif isinstance(holder, dict):
            holder[rng.choice((*STRINGS, *holder))] = holder[key]
    return content


def text_of(content: Any, rng: random.Random) -> bytes:
    """A JSON value as bytes, in one case of five with damage to the bytes themselves."""
    written = bytearray(json.dumps(content, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass"))
    if rng.random() < 0.2:
        for _ in range(rng.choice((1, 1, 3, 20))):
            at = rng.randrange(len(written) + 1)
            how = rng.randrange(6)
            if how == 0:
                written[at : at + 1] = bytes([rng.randrange(256)])
            elif how == 1:
                del written[at : at + rng.choice((1, 2, 50))]
            elif how == 2:
                written[at:at] = rng.choice((b"\xff", b"\0", b'"', b"{", b"[" * 300, b"9" * 400, b",", b"\xed\xa0\x80"))
            elif how == 3:
                start = rng.randrange(len(written) + 1)
                written[at:at] = written[start : start + 60]
            elif how == 4:
                number = rng.choice([*NUMBERS, "1e999", "-0", "1e3", "NaN", "01", "1.5"])
                written[:] = re.sub(rb"\d+", str(number).encode(), bytes(written[:at]), count=1) + written[at:]
            else:
                del written[at:]
    return bytes(written)


# ---- safetensors headers ----

PLAIN = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b.weight": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "BF16", "shape": [1, 2, 2], "data_offsets": [32, 40]},
    "d": {"dtype": "F64", "shape": [], "data_offsets": [40, 48]},
    "e": {"dtype": "I64", "shape": [1], "data_offsets": [48, 56]},
}
SIZES = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2, "BOOL": 1, "F8_E4M3": 1, "U16": 2, "C64": 8}


def reshape(header: Any, rng: random.Random) -> Any:
    """A sound header of other shapes, kinds and names, so that what comes after the library's own checks is tried."""
    header = copy.deepcopy(header)
    for _ in range(rng.choice((1, 1, 2, 5, 40))):
        key = rng.choice([key for key in header if key != "__metadata__"] or ["a"])
        entry = header.get(key) or {"dtype": "F32", "shape": [1]}
        how = rng.randrange(7)
        if how == 0:
            entry["dtype"] = rng.choice([*SIZES, "BOOL", "F8_E4M3", "U16", "C64"])
        elif how < 3:
            entry["shape"] = [
                rng.choice((0, 1, 2, 3, 8, 31, 64, 2**20)) for _ in range(rng.choice((0, 1, 1, 2, 3, 4, 9)))
            ]
        elif how == 3:
            header.pop(key, None)
        elif how == 4:
            header[re.sub(r"\d+", lambda match: str(rng.choice((0, 1, 2, 11, 999, 10**30))), key)] = entry
        elif how == 5:
            header[rng.choice([*STRINGS[7:-9], f"{key}.{key}", key[::-1], key.upper()])] = entry
        else:
            header[rng.choice(list(header) or ["a"])] = entry
    return lay_out({key: dict(entry) for key, entry in header.items()})


def lay_out(header: Any) -> Any:
    """The header with offsets that fit its shapes, where those can be understood; so that more is read than offsets."""
    end = 0
    for entry in header.values() if isinstance(header, dict) else ():
        try:
            size = SIZES[entry["dtype"]]
            for side in entry["shape"]:
                size *= side
            entry["data_offsets"] = [end, end + size]
            end += size
        except (KeyError, TypeError, AttributeError, IndexError):
            continue
    return header


def header_case(folder: Path) -> Case:
    """A mutated header in a file, read in every way; one in eight is that of a whole single file."""
    path = folder / "fuzz.safetensors"
    models = alone([32, 64], 9, linear=False, layers=1), alone([64, 128], 4, linear=True, layers=1)
    whole = [_header(hollow_single_file(model, folder / f"whole {n}")) for n, model in enumerate(models)]

    def run(rng: random.Random) -> None:
        single = rng.random() < 0.125
        header = rng.choice(whole) if single else PLAIN
        if rng.random() < 0.5:
            header = reshape(header, rng)
            content = json.dumps(header).encode()
        else:
            header = mutate(header, rng)
            content = text_of(header, rng)
        length = rng.choice([*NUMBERS, len(content) + 1, 0]) if rng.random() < 0.05 else len(content)
        ends = [entry["data_offsets"][1] for entry in _entries(header) if _is_offset(entry)]
        size = max([56, *ends]) + (rng.choice((1, -1, 8)) if rng.random() < 0.05 else 0)
        with path.open("wb") as file:
            file.write((length % 2**64).to_bytes(8, "little") + content)
            file.truncate(8 + len(content) + max(min(size, 2**40), 0))  # hollow
        directory = read_directory(path)
        if single:
            open_single_file(path, None)
            describe(path)
            return
        floats = {key: stored for key, stored in directory.items() if stored.kind in FLOATS and stored.size < 2**24}
        for _, tensor in read_tensors(floats):
            tensor.sum()
        for stored in floats.values():
            for dtype in (torch.float32, torch.float16):
                read_into(stored, torch.empty(stored.shape, dtype=dtype), piece_buffer([stored], dtype))

    return run


def _header(path: Path) -> Any:
    with path.open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def _entries(header: Any) -> Iterable[Any]:
    return header.values() if isinstance(header, dict) else ()


def _is_offset(entry: Any) -> bool:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return isinstance(offsets, list) and len(offsets) == 2 and type(offsets[1]) is int


# ---- configurations, tokenizers, indices ----


def file_case(folder: Path) -> Case:
    """A checkpoint with one file mutated: described, its schedules made, its tokenizer used."""
    families = ("small-sd1", "small-v")
    sources = {family: write_checkpoint(folder / "sound" / family, FAMILIES[family]) for family in families}
    # the tokenizer as transformers 5 writes it, too
    whole = folder / "sound" / "small-v" / "tokenizer"
    from transformers import CLIPTokenizer

    CLIPTokenizer.from_pretrained(whole).save_pretrained(whole)
    encoders = {}
    for family, source in sources.items():
        described = describe(source)
        encoders[family] = build_text_encoder(described.architecture.text).eval().requires_grad_(False)
        index = {"metadata": {"total_size": 1}, "weight_map": {}}
        name = "diffusion_pytorch_model.safetensors"
        index["weight_map"] = dict.fromkeys(read_directory(source / "vae" / name), name)
        (source / "vae" / f"{name}.index.json").write_text(json.dumps(index))
    here = folder / "mutated"

    def run(rng: random.Random) -> None:
        family = rng.choice(list(sources))
        source = sources[family]
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(source, here, copy_function=os.link)
        tokenizers = [f"tokenizer/{path.name}" for path in sorted((source / "tokenizer").iterdir())]
        index = "vae/diffusion_pytorch_model.safetensors.index.json"
        name = rng.choice([*CONFIGS, *CONFIGS, *tokenizers, index])
        content = (source / name).read_bytes()
        (here / name).unlink()
        if name.endswith(".json"):
            content = text_of(mutate(json.loads(content), rng), rng)
        else:
            content = text_of("", rng) + bytes(rng.choice((b"", content[: rng.randrange(len(content) + 1)])))
        if rng.random() < 0.9 or name == index:
            (here / name).write_bytes(content)
        if name == index:
            (here / "vae" / "diffusion_pytorch_model.safetensors").rename(here / "vae" / "x.safetensors")
        checkpoint = describe(here)
        for sampler in SAMPLERS:
            for steps in (1, 7, 50):
                with suppress(InputError):  # more steps than timesteps: the argument's fault
                    make_schedule(checkpoint.scheduler_config, sampler, steps, rng.choice((1.0, 0.5)))
        tokenizer = checkpoint.tokenizer()
        for prompt in ("", "two dogs", "\u1e9e \U0001f415 <|endoftext|> " * 60):
            encode_prompt(tokenizer, encoders[family], prompt)

    return run


# ---- records ----


def record_case(folder: Path) -> Case:
    """A picture whose record is mutated, in the parser of the command line as --like."""
    painted, out = folder / "like.png", folder / "out.png"
    record = {"minpaint": "1.0", "model": "tiny", "model_sha256": "0" * 64, "config": None, "image": str(painted)}
    record |= {"mask": str(painted), "mask_sha256": None, "image_sha256": "0" * 64, "dtype": "fp32", "device": "cpu"}
    record |= {"torch": "2.0", "prompt": "two dogs", "negative_prompt": "", "steps": 2, "strength": 1.0}
    record |= {"sampler": None, "eta": 0.0, "seed": 0, "count": 1, "profile": "minpaint", "grow": 0, "feather": 0}
    record |= {"soft": False, "context": "auto", "separate": False, "expand": None, "fill": "blur", "guidance": 3.5}
    record |= {"color_match": True}

    def run(rng: random.Random) -> None:
        text = PngImagePlugin.PngInfo()
        text.add(b"tEXt", b"minpaint\0" + text_of(mutate(record, rng), rng))
        Image.new("RGB", (2, 2)).save(painted, pnginfo=text)
        options = parse(["paint", "--like", str(painted), "-o", str(out)])
        choose_dtype(options.dtype, torch.device("cpu"))
        if options.image is not None and not isinstance(options.image, str):
            raise AssertionError(f"image {options.image!r}")
        for name in ("model", "mask", "config"):
            given = getattr(options, name)
            if given is not None and not isinstance(given, str):
                raise AssertionError(f"{name} {given!r}")

    return run


# ---- running them ----


@dataclass
class Report:
    """What came of the cases: how many, what was refused how, and what must not be."""

    count: int = 0
    sound: int = 0
    messages: Counter[str] = field(default_factory=Counter)
    finds: list[str] = field(default_factory=list)
    slowest: float = 0.0


WANTED = {"headers": CheckpointError, "files": CheckpointError, "records": InputError}


def run_cases(kind: str, seeds: Iterable[int], folder: Path, report: Callable[[str], object] = len) -> Report:
    """Run the cases of a kind ("headers", "files", "records") for some seeds."""
    made = {"headers": header_case, "files": file_case, "records": record_case}[kind](folder)
    result = Report()

    def late(*_: object) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, late)  # of processor time, which other work on the machine does not use up
    try:
        for seed in seeds:
            find, started = "", time.process_time()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    made(random.Random(f"{kind} {seed}"))
                result.sound += 1
            except MinpaintError as error:
                message = str(error)
                result.messages[re.sub(r"['\"].*['\"]|\d+|/\S+", "*", message)[:60]] += 1
                if len(message.splitlines()) != 1 or len(message) > LONGEST or isinstance(error, BudgetError):
                    find = f"message {message!r}"
                elif not isinstance(error, WANTED[kind]):
                    find = f"class {type(error).__name__}: {message}"
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a panic in Rust is one, and no Exception
                last = traceback.extract_tb(error.__traceback__)[-1]
                find = f"{type(error).__name__}: {str(error)[:200]!r} at {last.filename}:{last.lineno}"
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            result.count += 1
            result.slowest = max(result.slowest, time.process_time() - started)
            if find:
                result.finds.append(f"{kind} {seed}: {find}")
                report(result.finds[-1])
    finally:
        signal.signal(signal.SIGPROF, before)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in WANTED:
        parser.add_argument(f"--{kind}", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    options = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for kind in WANTED:
        count = getattr(options, kind)
        if count:
            with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
                seeds = range(options.first, options.first + count)
                result = run_cases(kind, seeds, Path(place), lambda find: print(find, flush=True))
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            print(f"{kind}: {result.count} cases, {result.sound} sound, {len(result.finds)} finds,", end=" ")
            print(f"slowest {result.slowest:.2f} s, largest memory {memory} MiB")
            for message, often in result.messages.most_common(60):
                print(f"  {often:6} {message}")


if __name__ == "__main__":
    main()
