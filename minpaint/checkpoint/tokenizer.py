"""The tokenizer of a checkpoint: the folder of files that transformers' CLIPTokenizer reads."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from minpaint.errors import CheckpointError

VOCABULARY = ("vocab.json", "merges.txt")
TOKENIZER_FILES = (*VOCABULARY, "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
TOY_WORLD = "a house, tree, boat, balloon, cloud or tower in eight colours"  # what the tiny model was trained on


def is_tokenizer(names: Collection[str]) -> bool:
    """Whether a folder with files of these names holds a vocabulary."""
    return set(VOCABULARY) <= set(names) or "tokenizer.json" in names


def load_tokenizer(folder: Path, pad_token: str | None = None) -> Any:
    """The CLIPTokenizer in a folder; `pad_token` overrides what the folder says.

    CheckpointError if the folder has no vocabulary or it cannot be read.
    """
    from transformers import CLIPTokenizer

    if not is_tokenizer([name for name in TOKENIZER_FILES if (folder / name).is_file()]):
        raise CheckpointError(f"{folder}: no tokenizer here ({' and '.join(VOCABULARY)} are needed)")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        if pad_token is not None:
            tokenizer.pad_token = pad_token
        length = int(tokenizer.model_max_length)
        tokenizer("a\U0001f415", padding="max_length", max_length=9, truncation=True)  # needs every special token
    except Exception as error:  # the library raises many kinds of error for a damaged file
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({error}); fetch it again") from None
    if length < 3:
        raise CheckpointError(f"{folder}: the tokenizer's model_max_length {length} leaves no room for a prompt")
    return tokenizer


def unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    """The words of a prompt that a vocabulary holds in pieces only, or as a single letter or digit."""
    words = dict.fromkeys(re.findall(r"\w+", prompt.lower()))
    return [word for word in words if word != "a" and (len(word) == 1 or len(tokenizer.tokenize(word)) > 1)]
