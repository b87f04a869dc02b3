"""A second writer of latent diffusion's single files, for tests: official names to LDM names.

It goes the other way than minpaint/checkpoint/single_file.py and shares nothing with it. Sources:
CompVis/stable-diffusion, ldm/modules/diffusionmodules/{openaimodel,model}.py and
ldm/models/diffusion/ddpm.py; mlfoundations/open_clip, src/open_clip/transformer.py.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]

KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
UNET_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
SCHEDULE_BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "logvar",
)


def unet_to_ldm(tensors: Mapping[str, Tensor], layers: int) -> Tensors:
    """The UNet's tensors without their prefix; `layers` residual blocks a level on the way down."""
    attended = {name.split(".")[1] for name in tensors if re.match(r"up_blocks\.\d+\.attentions\.", name)}

    def place(name: str) -> str:
        for official, ldm in UNET_ENDS.items():
            if name.startswith(f"{official}."):
                return ldm + name[len(official) :]
        kinds = "resnets|attentions|downsamplers|upsamplers"
        match = re.fullmatch(rf"(down|up)_blocks\.(\d+)\.({kinds})\.(\d+)\.(.*)", name)
        assert match, name
        way, level, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if kind == "downsamplers":
            return f"input_blocks.{(level + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            return f"output_blocks.{level * (layers + 1) + layers}.{2 if str(level) in attended else 1}.{rest}"
        number = level * (layers + 1) + index
        block = f"input_blocks.{1 + number}" if way == "down" else f"output_blocks.{number}"
        return f"{block}.{('resnets', 'attentions').index(kind)}.{rest}"

    def inside(name: str) -> str:
        for official, ldm in UNET_RESIDUAL.items():
            name = re.sub(rf"^((?:in|out)put_blocks\.\d+\.0|middle_block\.[02])\.{official}\.", rf"\1.{ldm}.", name)
        return name

    return {inside(place(name)): tensor for name, tensor in tensors.items()}


def vae_to_ldm(tensors: Mapping[str, Tensor]) -> Tensors:
    """The VAE's tensors without their prefix; its attention becomes 1x1 convolutions."""
    levels = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("decoder.up_blocks."))
    written = {}
    for name, tensor in tensors.items():
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
        match = re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.*)\.(weight|bias)", name)
        if match:
            name = f"{match[1]}mid.attn_1.{VAE_ATTENTION[match[2]]}.{match[3]}"
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        written[name] = tensor
    return written


def text_to_open_clip(tensors: Mapping[str, Tensor], with_last_layer: bool = True) -> Tensors:
    """CLIP's tensors in OpenCLIP's names, q, k and v fused, with the last layer that SD 2 does not run."""
    written = {OPEN_CLIP_ENDS[name]: tensor for name, tensor in tensors.items() if name in OPEN_CLIP_ENDS}
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layers."))
    for layer in range(layers):
        source, place = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for leaf in ("weight", "bias"):
            fused = [tensors[f"{source}.self_attn.{letter}_proj.{leaf}"] for letter in "qkv"]
            written[f"{place}.attn.in_proj_{leaf}"] = torch.cat(fused)
            for official, open_clip in OPEN_CLIP_LAYER.items():
                written[f"{place}.{open_clip}.{leaf}"] = tensors[f"{source}.{official}.{leaf}"]
    if with_last_layer:
        last = f"transformer.resblocks.{layers - 1}."
        more = {name: tensor for name, tensor in written.items() if name.startswith(last)}
        written |= {name.replace(last, f"transformer.resblocks.{layers}."): 1 - 2 * t for name, t in more.items()}
        width = written["ln_final.weight"].shape[0]
        device = written["ln_final.weight"].device
        written["logit_scale"] = torch.tensor(4.6, device=device)
        written["text_projection"] = torch.ones(width, width, device=device)
    return written


def what_training_left(unet: Mapping[str, Tensor]) -> Tensors:
    """Averaged weights unlike the real ones, and the buffers of the noise schedule."""
    averaged = {f"model_ema.diffusion_model{name.replace('.', '')}": 1 - tensor for name, tensor in unet.items()}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(440000)}
    return averaged | counters | {name: torch.rand(1000) for name in SCHEDULE_BUFFERS}


def to_ldm(unet: Tensors, vae: Tensors, text: Tensors, layers: int, open_clip: bool, extras: bool = True) -> Tensors:
    """The tensors of a single file. `extras`: with everything a run has no use for."""
    plain = {name.removeprefix("text_model."): tensor for name, tensor in text.items()}
    positions = plain.pop("embeddings.position_ids", None)
    old_unet = unet_to_ldm(unet, layers)
    written = {f"model.diffusion_model.{name}": tensor for name, tensor in old_unet.items()}
    written |= {f"first_stage_model.{name}": tensor for name, tensor in vae_to_ldm(vae).items()}
    if open_clip:
        named = text_to_open_clip(plain, with_last_layer=extras)
        written |= {f"cond_stage_model.model.{name}": tensor for name, tensor in named.items()}
    else:
        written |= {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in plain.items()}
        if extras and positions is not None:
            written["cond_stage_model.transformer.text_model.embeddings.position_ids"] = positions
    return written | (what_training_left(old_unet) if extras else {})


def write_single_file(folder: Path, path: Path, open_clip: bool, extras: bool = True) -> Path:
    """A checkpoint in diffusers layout again as one file in latent diffusion's names; the file."""
    files = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
    unet, vae, text = (load_file(folder / f"{name}.safetensors") for name in files)
    layers = json.loads((folder / "unet/config.json").read_text())["layers_per_block"]
    tensors = to_ldm(unet, vae, text, layers, open_clip, extras)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def header_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The header of a safetensors file that holds the tensors one after another."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    return header


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_raw(path: Path, header: bytes, data: bytes, length: int | None = None) -> Path:
    """A safetensors file from its pieces, sound or not; `length` is what it says of its header."""
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def write_unaligned(tensors: Mapping[str, Tensor], path: Path) -> Path:
    """A sound safetensors file whose header has an odd length and no padding."""
    header = json.dumps(header_of(tensors)).encode()
    header += b" " * (len(header) % 2 == 0)
    return write_raw(path, header, b"".join(map(bytes_of, tensors.values())))


def write_aligned(tensors: Mapping[str, Tensor], path: Path) -> Path:
    """A sound safetensors file in which every tensor begins at a multiple of 64 bytes while their sizes allow it."""
    ordered = dict(sorted(tensors.items(), key=lambda item: item[1].nbytes % 64 > 0))
    header = json.dumps(header_of(ordered)).encode()
    header += b" " * (-(8 + len(header)) % 64)
    return write_raw(path, header, b"".join(map(bytes_of, ordered.values())))


def write_hollow(tensors: Mapping[str, Tensor], path: Path) -> Path:
    """A safetensors file with the shapes of the tensors (which may be meta) and no bytes on disk."""
    header = header_of(tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_raw(path, json.dumps(header).encode(), b"")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + max(entry["data_offsets"][1] for entry in header.values()))
    return path
