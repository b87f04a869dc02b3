"""The reference's side: diffusers' StableDiffusionInpaintPipeline on the same files, watched as it runs.

Nothing else in the package imports diffusers, and this does so only when it is called.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minpaint.checkpoint.load import Checkpoint
from minpaint.checkpoint.lora import split_weight
from minpaint.checkpoint.tensorfile import read_json
from minpaint.engine.device import without_gradients
from minpaint.errors import CheckpointError, InputError, MinpaintError
from minpaint.picture.image import to_unit
from minpaint.study.parity_record import Function, named_modules, perturbed
from minpaint.study.parity_sides import Case, Side, Tensors, open_schedule, pictures

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "dpmpp": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}
VARIANT = re.compile(r"\.(\w+?)(-\d+-of-\d+)?\.safetensors$")
MISSING = 'parity compares with diffusers, which is not installed; pip install "minpaint[test]", or use --against DIR'


def library() -> Any:
    """The module diffusers; InputError if it is not installed."""
    try:
        import diffusers
        import transformers
        from diffusers import StableDiffusionInpaintPipeline  # noqa: F401  what it is made of may be missing, too
    except (ImportError, RuntimeError) as error:
        raise InputError(MISSING if "diffusers" in str(error) else f"{MISSING} ({error})") from None
    for each in (diffusers, transformers):
        each.utils.logging.set_verbosity_error()
        each.utils.logging.disable_progress_bar()
    return diffusers


def diffusers_side(
    checkpoint: Checkpoint,
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    names: Iterable[str],
    config: str | Path | None = None,
    vae: str | Path | None = None,
    lora: Iterable[str] = (),
) -> Side:
    """The pipeline on the files that minpaint has found, with its layers of these names.

    Raises:
        InputError: no diffusers. CheckpointError: it cannot open the files.
    """
    diffusers, names = library(), set(names)
    try:
        pipe = _open(diffusers, checkpoint, config, vae, torch.float32 if lora else dtype)
        _add_loras(pipe, lora, checkpoint)
    except MinpaintError:
        raise
    except Exception as error:  # of many kinds, for files that it cannot open
        raise CheckpointError(f"diffusers cannot open this model: {type(error).__name__}: {error}") from None
    pipe.to(device, dtype)
    pipe.set_progress_bar_config(disable=True)
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        model.eval()
    pipe.scheduler = _scheduler(diffusers, checkpoint, case, pipe)

    def encode(x: Tensor) -> Tensor:
        posterior = pipe.vae.encode(x).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    modules = {
        **named_modules(pipe.text_encoder, "text_encoder", names),
        **named_modules(pipe.unet, "unet", names),
        **{name: module for name, module in named_modules(pipe.vae, "vae", names).items() if name != "vae"},
        "vae.encode": Function(encode),
        "vae.decode": Function(lambda x: pipe.vae.decode(x).sample),
    }

    def embed(prompt: str) -> Tensor:
        hidden: Tensor = pipe.encode_prompt(prompt, device, 1, False)[0]
        return hidden

    def unet(x: Tensor, t: Tensor, context: Tensor) -> object:
        return pipe.unet(x, t, encoder_hidden_states=context)

    eta = open_schedule(checkpoint, case)[2]
    return Side(
        f"diffusers {diffusers.__version__}",
        dtype,
        device,
        modules,
        embed,
        unet,
        lambda jitter: _run(pipe, case, eta, dtype, jitter),
    )


def _open(diffusers: Any, checkpoint: Checkpoint, config: Any, vae: Any, dtype: torch.dtype) -> Any:
    """The pipeline, from the folder or the single file that minpaint reads."""
    from transformers import CLIPTextModel, CLIPTokenizer

    directories = checkpoint.architecture.directories
    file = next(iter(directories["unet"].values())).file
    folder = file.parent.parent
    parts: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    vae_file = next(iter(directories["encoder"].values())).file
    if vae is not None and (vae_file.parent / "config.json").is_file():
        parts["vae"] = _from_folder(diffusers.AutoencoderKL, vae_file, dtype)
    elif vae is not None:  # one file in latent diffusion's names
        built = {"config": str(folder), "subfolder": "vae"} if (folder / "vae" / "config.json").is_file() else {}
        parts["vae"] = diffusers.AutoencoderKL.from_single_file(str(vae_file), torch_dtype=dtype, **built)
    if file.parent.name != "unet" or not (file.parent / "config.json").is_file():
        where = {} if config is None else {"config": str(config)}
        return diffusers.StableDiffusionInpaintPipeline.from_single_file(str(file), torch_dtype=dtype, **where, **parts)

    parts["unet"] = _from_folder(diffusers.UNet2DConditionModel, file, dtype)
    text_file = next(iter(directories["text_encoder"].values())).file
    parts["text_encoder"] = _from_folder(CLIPTextModel, text_file, dtype)
    if vae is None:
        parts["vae"] = _from_folder(diffusers.AutoencoderKL, vae_file, dtype)
    parts["tokenizer"] = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    parts["scheduler"] = diffusers.DDIMScheduler()  # until _scheduler makes the one that is used
    return diffusers.StableDiffusionInpaintPipeline(feature_extractor=None, **parts)


def _from_folder(kind: Any, file: Path, dtype: torch.dtype) -> Any:
    """A model from the folder of the file that minpaint reads, and from the same variant, as `fp16`."""
    found = VARIANT.search(file.name)
    options = {"variant": found[1] if found else None, "torch_dtype": dtype, "use_safetensors": True}
    return kind.from_pretrained(file.parent, **options)


def _add_loras(pipe: Any, lora: Iterable[str], checkpoint: Checkpoint) -> None:
    """Add LoRAs to the weights for good, in float32, so that layers keep their names."""
    for entry, path in zip(lora, checkpoint.loras, strict=True):
        try:
            pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="lora")
        except (ImportError, ValueError) as error:
            raise CheckpointError(f"diffusers cannot add the LoRA {path.name}: {error}") from None
        pipe.fuse_lora(components=["unet", "text_encoder"], lora_scale=split_weight(entry)[1], adapter_names=["lora"])
        pipe.unload_lora_weights()


def _scheduler(diffusers: Any, checkpoint: Checkpoint, case: Case, pipe: Any) -> Any:
    """The scheduler of the run's sampler, with the settings in the checkpoint's file."""
    sampler, schedule, _ = open_schedule(checkpoint, case)
    file = next(iter(checkpoint.architecture.directories["unet"].values())).file
    path = file.parent.parent / "scheduler" / "scheduler_config.json"
    settings = (
        read_json(path, path.name) if file.parent.name == "unet" and path.is_file() else dict(pipe.scheduler.config)
    )
    if sampler == "pndm" and not schedule.warm_up:
        settings["skip_prk_steps"] = True
    return getattr(diffusers, SCHEDULERS[sampler]).from_config(settings)


@contextmanager
def _drawing(change: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Make every random draw of the library in float32 on the CPU, as minpaint draws; gives the list of them."""
    drawn: list[Tensor] = []

    def randn_tensor(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, **_: Any) -> Tensor:
        drawn.append(torch.randn(tuple(shape), generator=generator, dtype=torch.float32))
        return change(drawn[-1]).to(device, dtype)

    modules = [module for name, module in list(sys.modules.items()) if name.startswith("diffusers.")]
    places = [vars(module) for module in modules if "randn_tensor" in vars(module)]
    before = [place["randn_tensor"] for place in places]
    try:
        for place in places:
            place["randn_tensor"] = randn_tensor
        yield drawn
    finally:
        for place, function in zip(places, before, strict=True):
            place["randn_tensor"] = function


@without_gradients
def _run(pipe: Any, case: Case, eta: float, dtype: torch.dtype, jitter: bool) -> Tensors:
    """A whole run of the pipeline, as parity_dump describes it; with jitter its weights are laid out channels last."""
    seen: Tensors = {}
    encode, step, steps = pipe.vae.encode, pipe.scheduler.step, [0, 0]

    def encoded(pixels: Tensor, *args: Any, **kwargs: Any) -> Any:
        output, name = encode(pixels, *args, **kwargs), f"encode.{steps[1]}"
        steps[1] += 1
        posterior = output.latent_dist if hasattr(output, "latent_dist") else output[0]
        seen.update({f"{name}.pixels": pixels, f"{name}.mean": posterior.mean, f"{name}.logvar": posterior.logvar})
        return output

    def called(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x, t = args[:2]
        name, context = f"step.{steps[0]}", kwargs["encoder_hidden_states"]
        seen.update({f"{name}.x": x, f"{name}.t": torch.as_tensor(t).reshape(1).float(), f"{name}.context": context})
        seen.update({f"{name}.output": output[0], "embeddings": context})

    def stepped(output: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen[f"step.{steps[0]}.guided"] = output
        return step(output, *args, **kwargs)

    def ended(_pipe: Any, number: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen[f"step.{number}.latents"] = values["latents"]
        steps[0] = number + 1
        return values

    stepped.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]  # the pipeline asks for eta and generator
    image, mask = pictures(case)
    if jitter:
        for model in (pipe.unet, pipe.vae):
            model.to(memory_format=torch.channels_last)
    handle = pipe.unet.register_forward_hook(called, with_kwargs=True)
    pipe.vae.encode, pipe.scheduler.step = encoded, stepped
    try:
        with _drawing((lambda tensor: perturbed(tensor, dtype)) if jitter else (lambda tensor: tensor)) as drawn:
            picture = pipe(
                prompt=case.prompt,
                negative_prompt=case.negative_prompt,
                image=image,
                mask_image=mask,
                width=case.width,
                height=case.height,
                strength=1.0,
                num_inference_steps=case.steps,
                guidance_scale=case.guidance,
                eta=eta,
                generator=torch.Generator("cpu").manual_seed(case.seed),
                callback_on_step_end=ended,
            ).images[0]
    finally:
        handle.remove()
        del pipe.vae.encode, pipe.scheduler.step
        if jitter:
            for model in (pipe.unet, pipe.vae):
                model.to(memory_format=torch.contiguous_format)
    seen |= {f"draw.{number}": draw for number, draw in enumerate(drawn)}
    return seen | {"picture": to_unit(picture)}
