"""Train the tiny checkpoint from nothing: the autoencoder, then the UNet with its text encoder.

    python -m weights.train_tiny                    # writes weights/tiny
    python -m weights.train_tiny --work FOLDER      # where the state to resume from is kept
    python -m weights.train_tiny --start FOLDER     # from a checkpoint's weights on
    python -m weights.train_tiny --start FOLDER --unet-steps 0    # the VAE's decoder alone

The same command again goes on where it was stopped. On two cores with units for bf16, in which Muon computes, the
defaults take about three hours, by the time of their steps; from nothing they have not been run as a whole.
The losses go to training.jsonl beside the checkpoint. Training needs a PyTorch with
torch.optim.Muon (2.9 or newer); the checkpoint itself does not.

The bundled one was trained in nine goes, each from the one before on (`--start`): 2,400 steps of the VAE and 2,500
of the UNet, still without attention on its first level; 2,600 of the VAE with `--rate 0.5`; and of the UNet, with
`--rate 0.7`, 3,100 with the plain loss on the noise, 2,600 with HEARD 0.25 and the weight (SNR + 1) / SNR up to 20,
and 4,400 without EMPTY and WIDE, in bf16; with `--unet-steps 0 --rate 0.5`, 1,600 and 2,400 of the VAE's decoder
alone; and of the UNet with `--vae-steps 0 --scenes 7000` and Muon in float32, on a processor without such units: 1,900
with `--rate 0.65 --share 0.75`, where half of the captions still left a hidden sun open, 900 with `--rate 0.45
--share 0.6`, where they named all that is hidden by half, both with WIDE 0.35, and 2,200 with `--rate 0.6 --share 0.6`
as it is here.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minpaint.checkpoint.configs import text_config, unet_config, vae_config
from minpaint.checkpoint.load import load_checkpoint
from minpaint.checkpoint.scheduler import scheduler_config
from minpaint.checkpoint.tokenizer import load_tokenizer
from minpaint.models.text import build_text_encoder
from minpaint.models.unet import UNet
from minpaint.models.vae import VAE
from minpaint.picture.canvas import reference_canvas
from minpaint.picture.image import to_pixels
from minpaint.schedule import alphas_cumprod
from weights import world
from weights.random_checkpoint import (
    END,
    SCHEDULER,
    Json,
    byte_vocabulary,
    text_json,
    unet_json,
    vae_json,
    write_component,
    write_index,
    write_tokenizer,
)

TINY = Path(__file__).parent / "tiny"
FACTOR = 8  # pixels a latent cell
DECAY = 0.998  # of the moving averages, a step

UNET = unet_json(
    [64, 96, 128],
    [2, 3, 4],
    96,
    layers_per_block=1,
    norm_num_groups=8,
    sample_size=world.SIZE // FACTOR,
    down_block_types=3 * ["CrossAttnDownBlock2D"],
    up_block_types=3 * ["CrossAttnUpBlock2D"],
)
AUTOENCODER = vae_json([16, 32, 64, 64], layers_per_block=1, norm_num_groups=8, sample_size=world.SIZE)


# What both trainings share ----------------------------------------------------------------------


class Optimizer:
    """Muon for matrices (Jordan et al. 2024, torch.optim.Muon), AdamW for everything else.

    A convolution's weight [out, in, y, x] is a matrix [out, in y x] to Muon. The rates rise for
    50 steps, stay, and fall to zero over the last two fifths of the training.
    """

    def __init__(self, models: list[nn.Module], matrix_rate: float, rate: float, steps: int) -> None:
        named = [(name, p) for model in models for name, p in model.named_parameters() if p.requires_grad]
        self.weights = [p for name, p in named if p.ndim > 1 and "embedding" not in name]
        others = [p for name, p in named if p.ndim == 1 or "embedding" in name]
        self.matrices = [nn.Parameter(_matrix(p.detach())) for p in self.weights]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(self.matrices, lr=matrix_rate, weight_decay=0.01, adjust_lr_fn="original"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.rates, self.steps = (matrix_rate, rate), steps

    def step(self, loss: Tensor, step: int) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            assert weight.grad is not None
            matrix.grad = _matrix(weight.grad)
        scale = min((step + 1) / 50, 1.0, (self.steps - step) / (0.4 * self.steps))
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad()
        for weight in self.weights:
            weight.grad = None

    def state_dict(self) -> list[Any]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, state: list[Any]) -> None:
        for optimizer, saved in zip(self.optimizers, state, strict=True):
            optimizer.load_state_dict(saved)


def _matrix(weight: Tensor) -> Tensor:
    """[out, in, y, x] -> [out, y x in], a view of the same memory whichever way it lies there."""
    if weight.ndim == 2:
        return weight
    if weight.is_contiguous():
        return weight.view(len(weight), -1)
    return weight.permute(0, 2, 3, 1).view(len(weight), -1)


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, step: int) -> None:
    """Move an exponential moving average one step on; it starts as a plain average."""
    share = 1 - min(DECAY, (1 + step) / (10 + step))
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, share)


@dataclass
class Training:
    """One of the two trainings: its models, their averages, and where it is saved."""

    name: str
    models: list[nn.Module]
    optimizer: Optimizer
    steps: int
    work: Path
    log: Path

    def run(self, loss_at: Callable[[int], dict[str, Tensor]]) -> list[nn.Module]:
        """Take all steps, resuming where the saved state is; the averaged models.

        `loss_at(step)` gives the terms of the loss by name; their sum is what is minimised.
        """
        averages = [copy.deepcopy(model).requires_grad_(False) for model in self.models]
        state, first = self.work / f"{self.name}.pt", 0
        everything = [*self.models, *averages]
        began = time.monotonic()
        if state.exists():
            saved = torch.load(state, weights_only=True)
            first = saved["step"]
            for model, tensors in zip(everything, saved["models"], strict=True):
                model.load_state_dict(tensors)
            self.optimizer.load_state_dict(saved["optimizer"])
            began -= saved["seconds"]
            self.forget_after(first)
        totals: dict[str, float] = {}
        for step in range(first, self.steps):
            terms = loss_at(step)
            self.optimizer.step(sum(terms.values(), torch.zeros(())), step)
            for model, average in zip(self.models, averages, strict=True):
                follow(average, model, step)
            for name, term in terms.items():
                totals[name] = totals.get(name, 0.0) + term.item() / 100
            if (step + 1) % 100 == 0:
                seconds = round(time.monotonic() - began)
                line = {"training": self.name, "step": step + 1, "seconds": seconds}
                line |= {name: float(f"{total:.4g}") for name, total in totals.items()}
                with self.log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                totals = {}
            if (step + 1) % 200 == 0 or step + 1 == self.steps:
                content = {
                    "step": step + 1,
                    "seconds": time.monotonic() - began,
                    "models": [model.state_dict() for model in everything],
                    "optimizer": self.optimizer.state_dict(),
                }
                torch.save(content, state.with_suffix(".new"))
                state.with_suffix(".new").replace(state)
        return averages

    def forget_after(self, step: int) -> None:
        """Drop the log's lines about steps that will be taken again."""
        lines = self.log.read_text().splitlines(keepends=True) if self.log.exists() else []
        told = [json.loads(line) for line in lines]
        kept = [x for x, t in zip(lines, told, strict=True) if t["training"] != self.name or t["step"] <= step]
        self.log.write_text("".join(kept))


@torch.no_grad()
def draw_back(trained: nn.Module, start: nn.Module, share: float) -> None:
    """Keep a share of what a training has changed: each weight becomes a mean of its new value and the one before.

    A short training for something rare forgets a little of all the rest; between the two lie weights that are good
    at both (Wortsman et al. 2022, arXiv:2109.01903).
    """
    for new, old in zip(trained.parameters(), start.parameters(), strict=True):
        new.lerp_(old.to(new.device), 1 - share)


Model = TypeVar("Model", bound=nn.Module)


def placed(model: Model, device: str) -> Model:
    """On the device, with the memory format its convolutions are fastest in."""
    return model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def begun(model: Model, source: nn.Module | None) -> Model:
    """The model, with another's weights if there is one."""
    if source is not None:
        model.load_state_dict(source.state_dict())
    return model


def half_on_gpu(device: str) -> torch.autocast:
    """bf16 where it is faster; on CPUs without AMX it is slower than fp32."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def generator(step: int, salt: int) -> torch.Generator:
    """Randomness that depends on the step alone, so that a resumed training is the same one."""
    return torch.Generator().manual_seed(1_000_003 * step + salt)


# The autoencoder --------------------------------------------------------------------------------

CROP = 64  # most steps look at this much of a picture, around a thing


def train_vae(options: argparse.Namespace, log: Path) -> VAE:
    """Pictures in and out: squared error, more of it on things and edges, and a little KL.

    Kingma and Welling 2014; the regularisation is Rombach et al. 2022's, section 3.1.
    """
    torch.manual_seed(0)
    model = placed(begun(VAE(vae_config(AUTOENCODER)), options.start and options.start.vae), options.device)
    if not options.unet_steps:  # the UNet is kept, and with it what latents are
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    optimizer = Optimizer([model], 0.02 * options.rate, 2e-3 * options.rate, options.vae_steps)
    whole = options.vae_steps - options.vae_steps // 5  # the last steps see whole pictures

    def loss_at(step: int) -> dict[str, Tensor]:
        rng = Random(step)
        size, count = (CROP, 16) if step < whole else (world.SIZE, 8)
        crops = [_crop(rng, size) for _ in range(count)]
        pixels = torch.cat([to_pixels(picture) for picture, _ in crops]).to(options.device)
        weight = torch.stack([weight for _, weight in crops]).to(options.device)
        noise = torch.randn((count, 4, size // FACTOR, size // FACTOR), generator=generator(step, 1))
        with half_on_gpu(options.device):
            mean, logvar = model.encode(pixels)
            mean, logvar = mean.float(), logvar.float().clamp(-30, 20)
            rebuilt = model.decode(mean + (0.5 * logvar).exp() * noise.to(options.device)).float()
        error = rebuilt - pixels
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return {
            "pixels": (weight * (error**2 + 0.005 * error.abs())).mean(),
            "edges": 0.5 * sum(((error.diff(dim=dim)) ** 2).mean() for dim in (2, 3)),  # type: ignore[dict-item]
            "kl": 2e-5 * kl,
        }

    [average] = Training("vae", [model], optimizer, options.vae_steps, options.work, log).run(loss_at)
    assert isinstance(average, VAE)
    return average


def _crop(rng: Random, size: int) -> tuple[Any, Tensor]:
    """A square of a random scene, mostly around one of its things, and each pixel's weight [1, y, x].

    One in four has a grey hole, as the pictures have whose latents tell the UNet what to keep.
    """
    scene = world.scene(rng, misplaced=0.4)
    picture = world.draw(scene)
    if rng.random() < 0.25:
        picture.paste((128, 128, 128), mask=_masks(rng, scene)[0])
    weight = torch.ones(1, world.SIZE, world.SIZE)
    for thing in scene.things:
        weight[0][world.pixels(thing.box)] = 3.0
    room = world.SIZE - size
    x, y = rng.randint(0, room), rng.randint(0, room)
    if room and scene.things and rng.random() < 0.75:
        thing = rng.choice(scene.things)
        left, top, right, bottom = (round(world.SIZE * edge) for edge in thing.box)
        x = round((left + right - size) / 2 + rng.uniform(-20, 20))
        y = round((top + bottom - size) / 2 + rng.uniform(-20, 20))
        x, y = min(max(x, 0), room), min(max(y, 0), room)
    return picture.crop((x, y, x + size, y + size)), weight[:, y : y + size, x : x + size]


# The UNet and the text encoder ------------------------------------------------------------------

MASKS = 4  # of each scene
EMPTY = 0.1  # share of scenes without things: there a hole's place and time are all that a caption can tell
HIDDEN = 0.9  # of a thing; what shows more of itself beside the hole needs no word
WIDE = 0.25  # of the picture; holes over more are shown with more noise, where it is settled what they become
DROPPED = 0.1  # share of empty prompts (Ho and Salimans 2021, classifier-free guidance)
HEARD = 0.5  # of what a prompt changes in the noise, the share that is learned
KEPT_WEIGHT = 0.25  # of the loss outside the hole
LARGEST_SNR = 5.0  # from where on all noise levels count alike (Hang et al. 2023, arXiv:2303.09556, equation 8)
LARGEST_WEIGHT = 12.0


def write_words(folder: Path) -> int:
    """The tokenizer: byte pairs merged until each word of the captions is one token; its size."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    rng = Random(0)
    scenes = [world.scene(rng) for _ in range(2000)]
    captions = [world.caption(scene, scene.things, disc=True, sides=True) for scene in scenes]
    counter = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    counter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    counter.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False)
    )
    folder.mkdir(parents=True, exist_ok=True)
    counter.model.save(str(folder))
    merges = (folder / "merges.txt").read_text().splitlines()[1:]
    size = len(byte_vocabulary(merges))
    write_tokenizer(folder, size, END, merges)
    return size


@dataclass(frozen=True)
class Examples:
    """Scenes and masks as the UNet sees them.

    latents, blanked: mean and deviation of the latents [n, 8, y, x] of each scene, and of each
    mask's masked picture; holes: the masks' cells [n, 1, y, x]. Mask m belongs to scene m // MASKS.
    """

    latents: Tensor
    blanked: Tensor
    holes: Tensor

    def scene(self, mask: int) -> world.Scene:
        return _scene(_random_of(mask // MASKS))

    def prompt(self, rng: Random, mask: int) -> str:
        """A caption for a mask."""
        scene = self.scene(mask)
        boxes = [thing.box for thing in scene.things]
        if scene.disc:
            boxes.append(world.around(*scene.disc, 2 * world.RADIUS, 2 * world.RADIUS))
        hidden = [_covered(self.holes[mask].float(), box) > HIDDEN for box in boxes]
        return prompt_for(rng, scene, hidden)

    @staticmethod
    def cached(vae: VAE, count: int, device: str, cache: Path) -> Examples:
        if not cache.exists():
            torch.save(vars(Examples.make(vae, count, device)), cache)
        return Examples(**torch.load(cache, weights_only=True))

    @staticmethod
    @torch.no_grad()
    def make(vae: VAE, count: int, device: str) -> Examples:
        def encode(pixels: list[Tensor]) -> Tensor:
            with half_on_gpu(device):
                batch = torch.cat(pixels).to(device, memory_format=torch.channels_last)
                mean, logvar = vae.encode(batch)
            return torch.cat([mean, (0.5 * logvar.float()).exp()], dim=1).half().cpu()

        latents, blanked, holes = [], [], []
        for first in range(0, count, 16):
            whole, masked = [], []
            for number in range(first, min(first + 16, count)):
                rng = _random_of(number)
                scene = _scene(rng)
                picture = world.draw(scene)
                for mask in _masks(rng, scene):
                    canvas = reference_canvas(picture, mask, FACTOR)
                    masked.append(canvas.masked_pixels)
                    holes.append(canvas.cells.half())
                whole.append(canvas.pixels)
            latents.append(encode(whole))
            blanked.append(encode(masked))
        return Examples(torch.cat(latents), torch.cat(blanked), torch.cat(holes))


def _random_of(number: int) -> Random:
    """Where the scene of this number, and then its masks, are drawn from."""
    return Random(10_000_000 + number)


def _scene(rng: Random) -> world.Scene:
    """A scene to train on, a share EMPTY of them with nothing but its scenery."""
    return world.scene(rng, things=0 if rng.random() < EMPTY else None)


def _masks(rng: Random, scene: world.Scene) -> list[Any]:
    """MASKS masks: over a thing, or all the ground where there is none; across the edge of the sun or moon; anywhere.

    Three of four are of whole latent cells, as the holes of the default profile are; the others are as the
    reference makes them.
    """
    masks: list[Any] = []
    while len(masks) < MASKS:
        place = rng.random()
        if place < 0.5:
            things = scene.things
            mask = world.hole_over(rng, rng.choice(things)) if things else world.hole_over_ground(rng, scene)
        elif scene.disc and place < 0.8:
            mask = world.hole_beside(rng, scene.disc)
        else:
            mask = world.hole_anywhere(rng)
        if rng.random() < 0.75:
            side = world.SIZE // FACTOR
            cells = mask.reduce(FACTOR).point(lambda grey: 255 if grey else 0)
            mask = cells.resize((side * FACTOR, side * FACTOR), 0)  # 0: nearest
        if mask.getextrema()[1] == 255:
            masks.append(mask)
    return masks


def _covered(hole: Tensor, box: world.Box) -> float:
    """The share of a box that a hole [..., y, x] hides."""
    rows, columns = world.pixels(box, hole.shape[-1])
    return float(hole[..., rows, columns].mean())


def prompt_for(rng: Random, scene: world.Scene, hidden: Sequence[bool]) -> str:
    """A caption that names all that is hidden, and some of the rest; sometimes nothing.

    hidden: whether the hole hides each of the scene's things and, last, its sun or moon.

    So a prompt that names no sun asks for none; if it left that open, half a sun would be painted. But what a hole
    cuts, and leaves in sight, mostly goes unnamed: it is to be gone on with whatever else the prompt asks for.
    """
    if rng.random() < DROPPED:
        return ""
    count = len(scene.things)
    named = [thing for thing, gone in zip(scene.things, hidden[:count], strict=True) if gone or rng.random() < 0.3]
    rng.shuffle(named)
    told = world.caption(
        scene,
        named,
        place=rng.random() < (0.5 if scene.things else 0.9),
        time=rng.random() < 0.5,
        disc=any(hidden[count:]) or rng.random() < 0.5,
        sides=rng.random() < 0.3,
    )
    if rng.random() < 0.05:  # a word it has never met should change little
        words = told.split()
        letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 8)))
        words.insert(rng.randint(0, len(words)), letters)
        told = " ".join(words)
    return told


def train_unet(options: argparse.Namespace, log: Path, vae: VAE, vocabulary: int) -> tuple[nn.Module, nn.Module, float]:
    """Predict the noise in latents given the hole, the rest of the picture and a prompt.

    The averaged UNet and text encoder, and the latents' scaling factor (one over their standard
    deviation, as in Rombach et al. 2022, section G).

    Two things differ from how the official checkpoints were trained. Where there is little but noise, a small error
    in it is a large one in the picture, so the error is weighted by (SNR + 0.5) / SNR (after Salimans & Ho 2022,
    arXiv:2202.00512, section 4), within bounds: what a hole hides of a hill or a sun is known at once, and is to be
    painted at once. And captions of this world leave so little open that guidance of 7.5 would burn the colours. So
    the network learns to go only HEARD of the way from its own prediction without the prompt to the one with it;
    guidance then takes it 7.5 times as far, as a teacher's guidance is built into its student by Meng et al. 2023
    (arXiv:2210.03142), section 3.
    """
    tokenizer = load_tokenizer(options.out / "tokenizer")
    examples = Examples.cached(vae, options.scenes, options.device, options.work / f"examples-{options.scenes}.pt")
    mean, deviation = examples.latents.float().chunk(2, dim=1)
    scaling = 1 / float((mean.var() + deviation.square().mean()).sqrt())

    torch.manual_seed(1)
    unet = placed(begun(UNet(unet_config(UNET)), options.start and options.start.unet), options.device)
    text = begun(build_text_encoder(text_config(words_json(vocabulary))), options.start and options.start.text_encoder)
    text = text.to(options.device)
    optimizer = Optimizer([unet, text], 0.01 * options.rate, 2e-3 * options.rate, options.unet_steps)
    alpha_bar = torch.tensor(alphas_cumprod(scheduler_config(SCHEDULER)))

    def embed(prompts: list[str]) -> Tensor:
        ids = tokenizer(prompts, padding="max_length", max_length=77, truncation=True).input_ids
        return text(torch.tensor(ids, device=options.device))[0]  # type: ignore[no-any-return]

    def loss_at(step: int) -> dict[str, Tensor]:
        rng, noise = Random(20_000_000 + step), generator(step, 2)

        def sample(moments: Tensor) -> Tensor:
            mean, deviation = moments.float().chunk(2, dim=1)
            return scaling * (mean + deviation * torch.randn(mean.shape, generator=noise))

        chosen = [rng.randrange(len(examples.holes)) for _ in range(options.batch)]
        t = torch.randint(1000, (options.batch,), generator=noise)
        wide = examples.holes[chosen].float().mean((1, 2, 3)) > WIDE
        t = torch.where(wide, 999 - t * t // 1000, t)
        prompts = [examples.prompt(rng, n) for n in chosen]
        heard = torch.tensor([HEARD if prompt else 1.0 for prompt in prompts])[:, None, None, None]
        x0 = sample(examples.latents[[n // MASKS for n in chosen]])
        blanked, hole = sample(examples.blanked[chosen]), examples.holes[chosen].float()
        a = alpha_bar[t][:, None, None, None]
        eps = torch.randn(x0.shape, generator=noise)
        x = a.sqrt() * x0 + (1 - a).sqrt() * eps
        snr = a / (1 - a)
        weight = ((snr.clamp(max=LARGEST_SNR) + 0.5) / snr).clamp(max=LARGEST_WEIGHT)
        inputs = torch.cat([x, hole, blanked], dim=1).to(options.device, memory_format=torch.channels_last)
        t, hole = t.to(options.device), hole.to(options.device)
        with half_on_gpu(options.device):
            predicted = unet(inputs, t, embed(prompts)).float()
            with torch.no_grad():
                without = unet(inputs, t, embed(len(prompts) * [""])).float()
        target = without.lerp(eps.to(options.device), heard.to(options.device))
        error = weight.to(options.device) * (predicted - target) ** 2
        return {"hole": (hole * error).mean(), "kept": (KEPT_WEIGHT * (1 - hole) * error).mean()}

    averages = Training("unet", [unet, text], optimizer, options.unet_steps, options.work, log).run(loss_at)
    return averages[0], averages[1], scaling


def words_json(vocabulary: int) -> Json:
    return text_json(96, 2, 4, "quick_gelu", vocabulary)


def write(folder: Path, vae: nn.Module, unet: nn.Module, text: nn.Module, scaling: float) -> None:
    """The checkpoint in half precision, in the official layout."""
    vocabulary = int(text.config.vocab_size)  # type: ignore[union-attr, arg-type]
    configs = {
        "unet": UNET,
        "vae": AUTOENCODER | {"scaling_factor": round(scaling, 5)},
        "text_encoder": words_json(vocabulary),
    }
    for (component, config), model in zip(configs.items(), (unet, vae, text), strict=True):
        tensors = {name: p.detach().cpu().half().contiguous() for name, p in model.named_parameters()}
        write_component(folder, component, config, tensors)
    write_index(folder, SCHEDULER)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=TINY, help="the checkpoint's folder")
    parser.add_argument("--work", type=Path, default=Path("tiny-training"), help="where to keep the state")
    parser.add_argument("--start", type=Path, help="a checkpoint whose weights to start from (default: random ones)")
    parser.add_argument("--rate", type=float, default=1.0, help="share of the usual learning rates")
    parser.add_argument("--share", type=float, default=1.0, help="to keep of what changes in the start's UNet")
    parser.add_argument("--vae-steps", type=int, default=4800)
    parser.add_argument("--unet-steps", type=int, default=5500, help="0: keep the start's, and the VAE's encoder")
    parser.add_argument("--batch", type=int, default=32, help="of the UNet's training")
    parser.add_argument("--scenes", type=int, default=9000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if not (options.unet_steps or options.start):
        parser.error("--unet-steps 0 keeps a UNet: name its checkpoint with --start")
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "training.jsonl"
    options.start = options.start and load_checkpoint(options.start)
    vae = train_vae(options, log)
    vocabulary = write_words(options.out / "tokenizer")
    if options.unet_steps:
        unet, text, scaling = train_unet(options, log, vae, vocabulary)
        if options.start:
            draw_back(unet, options.start.unet, options.share)
            draw_back(text, options.start.text_encoder, options.share)
    else:
        unet, text = options.start.unet, options.start.text_encoder
        scaling = options.start.architecture.vae.scaling_factor
    write(options.out, vae, unet, text, scaling)


if __name__ == "__main__":
    main()
