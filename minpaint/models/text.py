"""From a prompt to its embeddings, with transformers' CLIP text encoder and tokenizer."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from minpaint.errors import CheckpointError, MinpaintWarning
from minpaint.models.config import TextConfig


def build_text_encoder(config: TextConfig) -> nn.Module:
    """A CLIPTextModel with random weights, on torch's default device."""
    from transformers import CLIPTextConfig, CLIPTextModel

    # The numbers of special tokens in the official files are those of another vocabulary;
    # they concern a pooled output that is not used here.
    return CLIPTextModel(CLIPTextConfig(**asdict(config), bos_token_id=0, eos_token_id=0, pad_token_id=0))


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
        told = f"tokenizer: token {max(ids)} is not among the {known} that the text encoder knows"
        raise CheckpointError(f"{told}; take both from one checkpoint")
    whole = tokenizer(prompt, truncation=False, verbose=False).input_ids
    if len(whole) > length:
        lost = tokenizer.decode(whole[length - 1 : -1])
        told = f"the prompt is longer than {length - 2} tokens; cut off: {lost[:80]!r}{'...' * (len(lost) > 80)}"
        warnings.warn(told, MinpaintWarning, stacklevel=2)
    device = next(text_encoder.parameters()).device
    mask = None
    if getattr(text_encoder.config, "use_attention_mask", False):
        mask = torch.tensor([[1] * min(len(whole), length) + [0] * (length - len(whole))], device=device)
    hidden: Tensor = text_encoder(torch.tensor([ids], device=device), attention_mask=mask)[0]
    return hidden
