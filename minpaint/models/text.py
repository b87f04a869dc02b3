"""Prompt to embeddings, through transformers' CLIP text encoder and tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minpaint.errors import CheckpointError, MinpaintWarning

TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
)
START, END = "<|startoftext|>", "<|endoftext|>"


def build_text_encoder(config: Mapping[str, Any]) -> nn.Module:
    """A CLIPTextModel from config.text_config's settings, on torch's default device."""
    from transformers import CLIPTextConfig, CLIPTextModel

    # The numbers of special tokens in the official files are those of another vocabulary;
    # they concern a pooled output that is not used here.
    return CLIPTextModel(CLIPTextConfig(**config, bos_token_id=0, eos_token_id=0, pad_token_id=0))


def load_tokenizer(folder: Path, pad_token: str | None = None) -> Any:
    """The CLIPTokenizer in a folder; `pad_token` overrides what the folder says.

    CheckpointError if the folder has no vocabulary or it cannot be read.
    """
    from transformers import CLIPTokenizer

    complete = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    if not complete and not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder}: no tokenizer here (vocab.json and merges.txt are needed)")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        if pad_token is not None:
            tokenizer.pad_token = pad_token
        length = int(tokenizer.model_max_length)
    except Exception as error:  # whatever the library meets in a damaged file
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({error})") from None
    if length < 3:
        raise CheckpointError(f"{folder}: the tokenizer's model_max_length {length} leaves no room for a prompt")
    return tokenizer


def encode_prompt(tokenizer: Any, text_encoder: nn.Module, prompt: str) -> Tensor:
    """The last hidden states [1, tokens, context_dim] for a prompt.

    A prompt longer than the model's 77 tokens (the start and the end included) is cut there,
    as in the reference, with a warning.
    """
    positions = int(text_encoder.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
    length = min(int(tokenizer.model_max_length), positions)
    ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True).input_ids
    known = int(text_encoder.config.vocab_size)  # type: ignore[union-attr, arg-type]
    if max(ids) >= known:
        raise CheckpointError(f"tokenizer: token {max(ids)} is not among the {known} that the text encoder knows")
    whole = tokenizer(prompt, truncation=False, verbose=False).input_ids
    if len(whole) > length:
        lost = tokenizer.decode(whole[length - 1 : -1])
        told = f"the prompt is longer than {length - 2} tokens; cut off: {lost!r}"
        warnings.warn(told, MinpaintWarning, stacklevel=2)
    device = next(text_encoder.parameters()).device
    mask = None
    if getattr(text_encoder.config, "use_attention_mask", False):
        mask = torch.tensor([[1] * min(len(whole), length) + [0] * (length - len(whole))], device=device)
    hidden: Tensor = text_encoder(torch.tensor([ids], device=device), attention_mask=mask)[0]
    return hidden
