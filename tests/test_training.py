"""How the tiny checkpoint was made: training that can be stopped at any time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from weights import world
from weights.train_tiny import TINY, Examples, Optimizer, Training, generator, main, prompt_for

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="training needs torch 2.9 or newer")


def train(work: Path, stop_at: int | None = None) -> tuple[nn.Module, str]:
    """Fit a small convolution and a linear layer; the averaged model and the log."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(6 * 4, 3))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = Optimizer([model], 0.02, 1e-3, 300)

    def loss_at(step: int) -> dict[str, Tensor]:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 2, 4, 4, generator=generator(step, 0))
        return {"loss": (model(x) - x.flatten(1)[:, :3]).square().mean()}

    log = work / "log.jsonl"
    [average] = Training("fit", [model], optimizer, 300, work, log).run(loss_at)
    return average, log.read_text()


@pytest.mark.slow
def test_a_stopped_training_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole, log = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", stop_at=290)
    resumed, second = train(tmp_path / "stopped")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert len(log.splitlines()) == len(second.splitlines()) == 3


def test_training_fits(tmp_path: Path) -> None:
    _, log = train(tmp_path)
    losses = [float(line.split('"loss": ')[1].rstrip("}")) for line in log.splitlines()]
    assert losses[-1] < 0.5 * losses[0]


@dataclass(frozen=True)
class Alone(Examples):
    """Examples of a single scene."""

    only: world.Scene

    def scene(self, mask: int) -> world.Scene:
        return self.only


def test_prompts_name_all_that_is_hidden_or_say_nothing() -> None:
    empty = 0
    for seed in range(300):
        rng = Random(seed)
        scene = world.scene(rng)
        hidden = tuple(rng.random() < 0.5 for _ in scene.things)
        prompt = prompt_for(rng, scene, hidden)
        empty += prompt == ""
        for thing, gone in zip(scene.things, hidden, strict=True):
            assert not gone or prompt == "" or thing.kind in prompt
    assert 10 <= empty <= 60


def test_what_a_hole_only_cuts_mostly_goes_unnamed() -> None:
    """It is to be gone on with, though the prompt asks for something else."""
    left, whole, named = torch.zeros(1, 1, 16, 16), torch.ones(1, 1, 16, 16), list[bool]()
    left[..., :8] = 1
    for seed in range(300):
        scene = world.scene(Random(seed), things=1)
        scene = replace(scene, things=(replace(scene.things[0], x=0.5),))
        named.append(scene.things[0].kind in Alone(left, left, left, scene).prompt(Random(seed), 0))
        hidden = Alone(whole, whole, whole, scene).prompt(Random(seed), 0)
        assert not hidden or scene.things[0].kind in hidden
    assert 0.15 < sum(named) / len(named) < 0.4


def test_prompts_name_a_sun_or_moon_that_is_hidden() -> None:
    """Where a caption names none, none is to be painted."""
    rng, sky, nothing = Random(0), torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)
    sky[:, :, :8] = 1
    named: dict[bool, list[bool]] = {True: [], False: []}
    for seed in range(300):
        scene = world.scene(rng, things=0)
        if scene.disc is None:
            continue
        for hides, hole in ((True, sky), (False, nothing)):
            prompt = Alone(hole, hole, hole, scene).prompt(Random(seed), 0)
            if prompt:
                named[hides].append("sun" in prompt or "moon" in prompt)
    assert all(named[True])
    assert 0.35 < sum(named[False]) / len(named[False]) < 0.65


def test_where_nothing_stands_most_prompts_name_the_place() -> None:
    """What a hole over all the ground becomes is not to be seen from the rest."""
    scenes = [world.scene(Random(seed), things=0) for seed in range(300)]
    named = [scene.place in prompt_for(Random(seed), scene, ()) for seed, scene in enumerate(scenes)]
    assert 0.75 < sum(named) / len(named) < 0.95


def train_on(folder: Path, *options: str) -> Path:
    """Train the bundled model a little further; the new checkpoint's folder."""
    out = folder / "out"
    call = ["train_tiny", "--start", str(TINY), "--out", str(out), "--work", str(folder / "work"), "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [*call, *options])
        main()
    return out


@pytest.mark.slow
def test_of_what_training_changes_in_the_unet_a_share_can_be_kept(tmp_path: Path) -> None:
    def unet(share: str) -> dict[str, Tensor]:
        few = ["--vae-steps", "0", "--unet-steps", "1", "--scenes", "2", "--batch", "2", "--rate", "20"]
        out = train_on(tmp_path, *few, "--share", share)  # later calls find all steps taken
        return load_file(out / "unet" / "diffusion_pytorch_model.safetensors")

    before = load_file(TINY / "unet" / "diffusion_pytorch_model.safetensors")
    none, half, whole = (unet(share) for share in ("0", "0.5", "1"))
    moved = 0
    for name, old in before.items():
        assert torch.equal(none[name], old)
        moved += not torch.equal(whole[name], old)
        torch.testing.assert_close(half[name].float(), (old.float() + whole[name].float()) / 2, rtol=1e-3, atol=1e-4)
    assert moved > 0.9 * len(before)


@pytest.mark.slow
def test_without_steps_of_the_unet_only_the_decoder_is_trained(tmp_path: Path) -> None:
    out, changed = train_on(tmp_path, "--unet-steps", "0", "--vae-steps", "3"), set()
    for file in TINY.glob("*/*"):
        made = out / file.relative_to(TINY)
        if file.suffix != ".safetensors":
            assert made.read_bytes() == file.read_bytes()
            continue
        old, new = load_file(file), load_file(made)
        assert old.keys() == new.keys()
        changed |= {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_without_steps_of_the_unet_a_start_must_be_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train_tiny", "--unet-steps", "0"])
    with pytest.raises(SystemExit):
        main()
    assert "--start" in capsys.readouterr().err
