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
# Top to bottom: a file imports only from files above it.
ORDER = [
    "errors",
    "config",
    "schedule",
    "samplers",
    "attention",
    "layers",
    "unet",
    "vae",
    "banded",
    "text",
    "image",
    "fill",
    "mask",
    "seam",
    "canvas",
    "settings",
    "frame",
    "memory",
    "fast",
    "measure",
    "tensorfile",
    "residency",
    "plan",
    "ldm",
    "hub",
    "example",
    "checkpoint",
    "machine",
    "inpaint",
    "saving",
    "__init__",
    "__main__",
]
MODEL_FILES = ("attention", "layers", "unet", "vae")


def tree(name: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))


def imports(node: ast.AST) -> set[str]:
    """Modules that a file imports anywhere, `minpaint.x` as x."""
    found = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom) and child.module == "minpaint":
            found |= {f"minpaint.{alias.name}" for alias in child.names}
        elif isinstance(child, ast.ImportFrom) and child.module:
            found.add(child.module)
    return found


def test_every_file_has_its_place_in_the_order() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ORDER)


@pytest.mark.parametrize("name", ORDER[:-2])
def test_a_file_imports_only_from_files_above_it(name: str) -> None:
    inside = {module.split(".")[1] for module in imports(tree(name)) if module.startswith("minpaint.")}
    assert inside <= set(ORDER[: ORDER.index(name)])


@pytest.mark.parametrize("name", ORDER)
def test_only_the_command_line_prints(name: str) -> None:
    assert name == "__main__" or "print" not in names_used(name)


@pytest.mark.parametrize("name", ORDER)
def test_nothing_can_open_a_pickle(name: str) -> None:
    modules = {module.split(".")[0] for module in imports(tree(name))}
    assert not modules & {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "numpy"}
    source = ast.unparse(tree(name))  # code and strings, without comments
    assert not re.search(r"torch\.load\b|torch\.hub|allow_pickle|(?<![.])\b(eval|exec)\(", source)


@pytest.mark.parametrize("name", ORDER)
def test_diffusers_is_for_tests_and_bench_only(name: str) -> None:
    assert not any(module.split(".")[0] == "diffusers" for module in imports(tree(name)))


def names_used(name: str) -> set[str]:
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found.add(node.id)
    return found


@pytest.mark.parametrize("name", [name for name in ORDER if name != "memory"])
def test_devices_and_inference_mode_are_the_business_of_memory_py(name: str) -> None:
    forbidden = {"cuda", "inference_mode", "no_grad", "offload", "autocast", "empty_cache", "backends"}
    assert not names_used(name) & forbidden


@pytest.mark.parametrize("name", MODEL_FILES)
def test_model_files_hold_the_model_and_nothing_else(name: str) -> None:
    outside = {module.split(".")[0] for module in imports(tree(name))}
    assert outside <= {"__future__", "math", "torch", "einops", "minpaint"}
    assert not names_used(name) & {"to_device", "tqdm", "warn", "offload", "tile", "is_available"}
    # the only device named is that of a tensor at hand
    devices = [ast.unparse(k.value) for k in ast.walk(tree(name)) if isinstance(k, ast.keyword) and k.arg == "device"]
    assert all(device.endswith(".device") for device in devices)


def test_importing_the_package_has_no_effects_and_needs_nothing_heavy() -> None:
    code = (
        "import os, sys, random; state = dict(os.environ), random.getstate(); import minpaint, minpaint.__main__;"
        "assert (dict(os.environ), random.getstate()) == state;"
        "heavy = {'torch', 'transformers', 'PIL', 'numpy', 'huggingface_hub', 'einops', 'safetensors', 'tqdm'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_model_files_import_no_library_that_takes_long() -> None:
    slow = "{'transformers', 'diffusers', 'huggingface_hub'}"
    code = f"import sys, minpaint.inpaint; assert not {slow} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
