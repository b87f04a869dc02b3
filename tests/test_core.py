"""The core runs without the rest: README's script, with the engine and the command line made impossible to import."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_mask, make_picture, relative_error
from diffusers import StableDiffusionInpaintPipeline
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
ABSENT = ("minpaint.engine", "minpaint.cli", "minpaint.painter", "minpaint.study", "minpaint.picture.saving")
PROMPT, STEPS = "a red tower", 20  # as in the script


def script() -> str:
    """The script in the README."""
    found = re.search(r"<!-- script -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert found
    return found[1]


@pytest.mark.parametrize(
    "family",
    ["small-sd1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("small-sd2", "small-sd1-4ch", "small-v"))],
)
def test_the_core_alone_gives_the_latents_of_the_reference(
    checkpoint: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    make_picture().save(tmp_path / "picture.png")
    make_mask().save(tmp_path / "mask.png")
    code = script().replace('"tiny"', repr(str(checkpoint(family)))).replace('"weights/example/"', '""')
    assert code.count(str(checkpoint(family))) == code.count('example = ""') == 1
    (tmp_path / "script.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))  # None: an import of it fails\n{code}\n"
        "from safetensors.torch import save_file\nsave_file({'latents': step.x.clone()}, 'latents.safetensors')\n"
    )
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, check=True)
    ours = load_file(tmp_path / "latents.safetensors")["latents"]
    reference = StableDiffusionInpaintPipeline.from_pretrained(checkpoint(family))
    expected = reference(
        prompt=PROMPT,
        image=make_picture(),
        mask_image=make_mask(),
        width=64,
        height=64,
        num_inference_steps=STEPS,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="latent",
    ).images
    assert relative_error(ours, expected) < 1e-4
    assert (tmp_path / "painted.png").is_file()


def test_what_is_absent_is_not_found() -> None:
    """The test above would prove nothing if its imports went through."""
    code = f"import sys; sys.modules.update(dict.fromkeys({ABSENT})); import minpaint.engine.run"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT).returncode == 1
