"""The safety checker that comes with Stable Diffusion 1: does a picture look like one of some unwanted concepts?

CLIP's vision model makes a vector of the picture. The checkpoint holds a vector and a threshold for each concept,
and a concept is found where the cosine between the two vectors is above its threshold. Where one of a few concepts
that deserve special care is found, the other thresholds are lowered a little (diffusers,
pipelines/stable_diffusion/safety_checker.py).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from minpaint.checkpoint.rows import TEXT_LAYERS, Json, check, choice, count, number, read_rows
from minpaint.checkpoint.tensorfile import (
    FLOATS,
    assign,
    empty_pages,
    piece_buffer,
    read_directory,
    read_into,
    read_json,
    some,
)
from minpaint.errors import CheckpointError, InputError

FILES = ("model.safetensors", "model.fp16.safetensors")
CONFIG = "safety_checker/config.json"
CARE = 0.01  # by how much the thresholds are lowered
# of CLIP's training (transformers/image_utils.py, OPENAI_CLIP_MEAN and OPENAI_CLIP_STD)
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

VISION_FIELDS = {  # of its CLIP vision model: transformers/models/clip/configuration_clip.py, CLIPVisionConfig
    "hidden_act": choice("hidden_act", "quick_gelu", "quick_gelu", "gelu"),
    "hidden_size": count("hidden_size", 768),
    "image_size": count("image_size", 224, most=2048),
    "intermediate_size": count("intermediate_size", 3072),
    "layer_norm_eps": number("layer_norm_eps", 1e-5),
    "num_attention_heads": count("num_attention_heads", 12),
    "num_hidden_layers": count("num_hidden_layers", 12, TEXT_LAYERS),
    "patch_size": count("patch_size", 32, most=2048),
    "projection_dim": count("projection_dim", 512),
}


class Verdict(NamedTuple):
    """flagged: whether a concept was found. scores: for each concept the cosine less its threshold."""

    flagged: bool
    scores: list[float]


class SafetyChecker:
    """The checker in a checkpoint's folder `safety_checker`; made without its weights, which `load` reads.

    size: bytes that the weights take. Raises InputError if there is no checker, CheckpointError for
    one that is damaged or not supported.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        file = next((folder / name for name in FILES if (folder / name).is_file()), None)
        if file is None:
            raise InputError(f"safety: no {FILES[0]} in {folder}; name a model that has one, or leave out --safety")
        config = vision_config(read_json(folder / "config.json", CONFIG))
        stored = {_common_name(key): stored for key, stored in read_directory(file).items()}
        with torch.device("meta"):
            self.model: nn.Module = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
            for kind in ("concept", "special_care"):
                vectors = stored.get(f"{kind}_embeds")
                concepts = vectors.shape[0] if vectors and vectors.shape else 1
                self.model.register_buffer(f"{kind}_embeds", torch.empty(concepts, config["projection_dim"]))
                self.model.register_buffer(f"{kind}_embeds_weights", torch.empty(concepts))
        self.model.requires_grad_(False).train(False)
        state = {key: value for key, value in self.model.state_dict().items() if not key.endswith("position_ids")}
        names = {_common_name(key): key for key in state}
        self.stored = {names[name]: tensor for name, tensor in stored.items() if name in names}
        shapes = {key: tensor.shape for key, tensor in self.stored.items() if tensor.kind in FLOATS}
        unlike = [key for key in state if shapes.get(key) != state[key].shape]
        unlike += [name for name in stored if name not in names and not name.endswith("position_ids")]
        if unlike:
            raise CheckpointError(
                f"{file}: tensors do not fit the configuration beside it: {some(unlike)}; fetch both again"
            )
        self.side: int = config["image_size"]
        self.size = 4 * sum(math.prod(value.shape) for value in state.values())

    def load(self) -> None:
        """Read the weights into memory, in float32."""
        buffer = piece_buffer(self.stored.values(), torch.float32)
        for key, stored in self.stored.items():
            weight = empty_pages(stored.shape, torch.float32)
            read_into(stored, weight, buffer)
            if not bool(weight.isfinite().all()):  # no comparison with NaN would ever flag anything
                raise CheckpointError(f"{stored.file}: {stored.key} holds NaN or infinity; fetch it again")
            assign(self.model, key, weight)
        for name, ids in list(self.model.named_buffers()):
            if name.endswith("position_ids"):
                assign(self.model, name, torch.arange(ids.shape[-1])[None])

    def check(self, picture: Image.Image) -> Verdict:
        """Whether a picture is flagged, and its scores."""
        found = self.model(self._pixels(picture)).image_embeds
        care, scores = (
            nn.functional.cosine_similarity(found, self.model.get_buffer(f"{kind}_embeds"))
            - self.model.get_buffer(f"{kind}_embeds_weights")
            for kind in ("special_care", "concept")
        )
        if any(round(score, 3) > 0 for score in care.tolist()):
            scores = scores + CARE
        return Verdict(any(round(score, 3) > 0 for score in scores.tolist()), scores.tolist())

    def _pixels(self, picture: Image.Image) -> Tensor:
        """The middle square of a picture, as CLIP was trained on it (transformers, CLIPImageProcessor)."""
        width, height = (self.side * length // min(picture.size) for length in picture.size)
        scaled = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.side) // 2, (height - self.side) // 2
        square = scaled.crop((left, top, left + self.side, top + self.side))
        numbers = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(self.side, self.side, 3) / 255
        return ((numbers - torch.tensor(MEAN)) / torch.tensor(DEVIATION)).permute(2, 0, 1)[None]


def vision_config(source: Json) -> dict[str, Any]:
    """The fields of transformers' CLIPVisionConfig, from a safety checker's JSON; CheckpointError for a bad one."""
    vision = source.get("vision_config")
    if not isinstance(vision, dict):
        raise CheckpointError(f"{CONFIG}: vision_config is missing; fetch the file again")
    size = source.get("projection_dim")
    values = read_rows(
        CONFIG, vision | ({} if size is None else {"projection_dim": size}), VISION_FIELDS, {}, others=True
    )
    for large, small in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
        check(values[large] % values[small] == 0, CONFIG, small, values[small], f"must divide {large}")
    return values | {"layer_norm_eps": float(values["layer_norm_eps"])}


def _common_name(key: str) -> str:
    """One name for a tensor of CLIP's vision model, which versions of transformers wrap in more or fewer modules."""
    return key.replace("vision_model.", "")
