"""The rules of the house, checked on the source itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minpaint"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

# What each wing, or file on the top level, may import of the others.
CORE = {"errors", "schedule", "samplers", "models"}
MAY_IMPORT = {
    "errors": set[str](),
    "settings": {"errors"},
    "schedule": {"errors"},
    "samplers": {"errors", "schedule"},
    "models": {"errors"},
    "picture": {"errors", "settings"},
    "checkpoint": {"errors", "schedule", "models"},
    "engine": {"errors", "models", "checkpoint"},
    "inpaint": {"schedule", "samplers", "models", "picture"},
    "painter": {*CORE, "settings", "inpaint", "picture", "checkpoint", "engine", "study"},  # study only in watch()
    "study": {*CORE, "settings", "inpaint", "picture", "checkpoint", "engine", "painter", "__init__"},
    "ui": {"errors", "settings", "samplers", "models", "picture", "engine", "painter", "study"},
    "batch": {*CORE, "settings", "inpaint", "picture", "engine", "painter"},
    "cli": {
        *CORE,
        "settings",
        "inpaint",
        "picture",
        "checkpoint",
        "engine",
        "painter",
        "study",
        "ui",
        "batch",
        "__init__",
    },
    "__init__": {"errors", "painter"},
    "__main__": {"cli"},
}

# The most lines, with comments and blank ones, that a part of the house may have; the core is all that stands on the
# top level and models/, but for the painter. A change that adds lines takes others away.
BUDGETS = {
    "core": 1562,
    "painter": 338,
    "picture": 1128,
    "checkpoint": 2044,
    "engine": 2328,
    "study": 3193,
    "ui": 460,
    "batch": 301,
    "cli": 1379,
}
LONGEST = 350


def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def wing(name: str) -> str:
    """Of a file such as "models/unet.py" or "painter.py"."""
    return name.partition("/")[0].removesuffix(".py")


def imports(name: str) -> set[str]:
    """Modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module}
            if node.module == "minpaint":
                found |= {f"minpaint.{alias.name}" for alias in node.names if alias.name in MAY_IMPORT}
    return found


def names_used(name: str) -> set[str]:
    nodes = list(ast.walk(tree(name)))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute)} | {
        node.id for node in nodes if isinstance(node, ast.Name)
    }


def test_every_file_belongs_to_a_wing() -> None:
    assert {wing(name) for name in FILES} == set(MAY_IMPORT)


def test_the_house_stays_within_its_line_budget(capsys: pytest.CaptureFixture[str]) -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    sums = dict.fromkeys(BUDGETS, 0)
    for name, count in lines.items():
        sums[wing(name) if wing(name) in BUDGETS else "core"] += count
    with capsys.disabled():
        print("\n" + "\n".join(f"{part:10} {count:5} of {BUDGETS[part]:5} lines" for part, count in sums.items()))
    assert {part: count for part, count in sums.items() if count > BUDGETS[part]} == {}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}


def test_the_algorithm_sees_of_the_pictures_only_the_canvas() -> None:
    assert {module for module in imports("inpaint.py") if "picture" in module} == {"minpaint.picture.canvas"}
    source = FILES["inpaint.py"].read_text(encoding="utf-8")
    assert not re.findall(r"(?i)memory|device|cuda|warn|profile|budget|dtype", source)


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_from_wings_that_its_own_may_use(name: str) -> None:
    used = {([*module.split("."), "__init__"])[1] for module in imports(name) if module.split(".")[0] == "minpaint"}
    assert used - {wing(name)} <= MAY_IMPORT[wing(name)]


@pytest.mark.parametrize("name", [name for name in FILES if name != "study/exercises/__main__.py"])
def test_only_the_command_lines_print(name: str) -> None:
    assert wing(name) == "cli" or "print" not in names_used(name)


@pytest.mark.parametrize("name", FILES)
def test_nothing_can_open_a_pickle(name: str) -> None:
    modules = {module.split(".")[0] for module in imports(name)}
    assert not modules & {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "numpy"}
    source = ast.unparse(tree(name))  # code and strings, without comments
    assert not re.search(r"torch\.load\b|torch\.hub|allow_pickle|(?<![.])\b(eval|exec)\(", source)


@pytest.mark.parametrize("name", [name for name in FILES if name != "study/parity_diffusers.py"])
def test_diffusers_is_for_tests_bench_and_parity_only(name: str) -> None:
    assert not any(module.split(".")[0] == "diffusers" for module in imports(name))


@pytest.mark.parametrize("name", [name for name in FILES if wing(name) != "engine"])
def test_devices_are_the_business_of_the_engine(name: str) -> None:
    assert not names_used(name) & {"cuda", "no_grad", "inference_mode", "autocast", "empty_cache", "backends"}
    compared = [node for node in ast.walk(tree(name)) if isinstance(node, ast.Compare)]
    strings = {node.value for each in compared for node in ast.walk(each) if isinstance(node, ast.Constant)}
    assert not strings & {"cuda", "cpu"}


@pytest.mark.parametrize("name", [name for name in FILES if wing(name) == "models"])
def test_model_files_hold_the_model_and_nothing_else(name: str) -> None:
    outside = {module.split(".")[0] for module in imports(name)}
    assert outside - {"transformers"} <= {"__future__", "math", "torch", "einops", "minpaint"} | sys.stdlib_module_names
    assert not names_used(name) & {"to_device", "tqdm", "offload", "tile", "is_available"}
    # the only device named is that of a tensor at hand, or none at all
    devices = [ast.unparse(k.value) for k in ast.walk(tree(name)) if isinstance(k, ast.keyword) and k.arg == "device"]
    assert all(re.fullmatch(r"\w+|.*\.device", device) for device in devices)


def test_importing_the_package_has_no_effects_and_needs_nothing_heavy() -> None:
    code = (
        "import os, sys, random; state = dict(os.environ), random.getstate(); import minpaint, minpaint.__main__;"
        "assert (dict(os.environ), random.getstate()) == state;"
        "heavy = {'torch', 'transformers', 'PIL', 'numpy', 'huggingface_hub', 'einops', 'safetensors', 'tqdm'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("from minpaint.models import UNet, VAE", "minpaint.engine transformers PIL huggingface_hub"),
        ("from minpaint.samplers import ddim", "minpaint.engine minpaint.models transformers PIL huggingface_hub"),
        ("import minpaint.painter", "minpaint.cli minpaint.study transformers diffusers huggingface_hub"),
        ("import minpaint.cli.study, minpaint.cli.parity", "matplotlib diffusers"),
        ("import minpaint.cli.ui", "minpaint.ui starlette uvicorn"),
        ("import minpaint.cli.batch", "ray diffusers matplotlib"),
    ],
)
def test_an_import_brings_in_no_more_than_it_needs(statement: str, absent: str) -> None:
    code = f"import sys; {statement}; assert not set('{absent}'.split()) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
