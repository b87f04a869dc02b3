"""The plain modules of a checkpoint, loaded without the engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folders import FILES, ROOT, Folders, as_single_file, edit, load
from safetensors.torch import save_file
from torch import nn

import minpaint
from minpaint.checkpoint.load import Checkpoint, load_checkpoint
from minpaint.checkpoint.tensorfile import PIECE, piece_buffer, read_directory, read_into
from minpaint.painter import Painter
from weights.random_checkpoint import FAMILIES, write_checkpoint


def modules(source: Checkpoint | Painter) -> dict[str, nn.Module]:
    return {"unet": source.unet, "vae": source.vae, "text_encoder": source.text_encoder}


def assert_same_weights(found: Checkpoint, expected: Painter) -> None:
    """Every parameter and buffer bit for bit, in modules that are ready to be called."""
    for component, model in modules(expected).items():
        ours, theirs = modules(found)[component].state_dict(), model.state_dict()
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), name
    for model in modules(found).values():
        assert not model.training
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_all_weights_are_those_of_a_painter_whatever_their_kind_in_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, FAMILIES["small-sd1"], dtype=dtype)
    assert_same_weights(load_checkpoint(folder), load(folder))


def test_a_single_file_is_loaded_with_its_configuration(copy: Folders) -> None:
    source = as_single_file(copy("small-sd2"), "small-sd2")
    found, painter = load_checkpoint(**source), load(**source)
    assert_same_weights(found, painter)
    assert found.architecture.unet == painter.unet_config
    assert found.scheduler_config == painter.scheduler_config
    assert found.files == (source["model"],)
    assert found.tokenizer("two dogs").input_ids == painter.tokenizer("two dogs").input_ids


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(("component", "key"), [("unet", "conv_in.bias"), ("vae", "decoder.conv_out.bias")])
def test_a_weight_that_is_not_finite_is_refused_by_name(component: str, key: str, value: float, broken: Path) -> None:
    edit(broken / FILES[component], lambda tensors: tensors[key][:1].fill_(value))
    with pytest.raises(minpaint.CheckpointError, match=rf"{Path(FILES[component]).name}\): {key} holds NaN"):
        load_checkpoint(broken)


def test_a_weight_beyond_float32_is_refused(broken: Path) -> None:
    key = "conv_in.bias"
    edit(broken / FILES["unet"], lambda tensors: tensors.update({key: tensors[key].double().fill_(1e300)}))
    with pytest.raises(minpaint.CheckpointError, match=f"unet .*{key} holds NaN or infinity in float32"):
        load_checkpoint(broken)


def test_a_student_needs_no_engine(checkpoint: Folders) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['minpaint.engine', 'minpaint.picture', 'minpaint.cli']));"
        "from minpaint.checkpoint.load import load_checkpoint; import torch;"
        "models = load_checkpoint(sys.argv[1]);"
        "print(*models.unet(torch.zeros(1, 9, 8, 8), torch.tensor([1]), torch.zeros(1, 77, 64)).shape)"
    )
    command = [sys.executable, "-c", code, str(checkpoint("small-sd1"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "4", "8", "8"], done.stderr


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_weight_of_several_pieces_is_converted_as_pytorch_converts_it(
    kind: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    weight = torch.randn(2 * PIECE + 3, generator=torch.Generator().manual_seed(0)).to(kind)
    save_file({"weight": weight}, tmp_path / "file.safetensors")
    stored = read_directory(tmp_path / "file.safetensors")["weight"]
    target = torch.empty(stored.shape, dtype=dtype)
    read_into(stored, target, piece_buffer([stored], dtype))
    assert torch.equal(target, weight.to(dtype))
