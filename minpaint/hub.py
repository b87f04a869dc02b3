"""Where checkpoints come from: the catalogue, the Hugging Face hub and its cache.

Tokens, mirrors (HF_ENDPOINT), the cache's place (HF_HOME) and offline mode (HF_HUB_OFFLINE)
are huggingface_hub's own business.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from minpaint.errors import CheckpointError
from minpaint.text import TOKENIZER_FILES

COMPONENTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
CONFIGS = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
)
CLIP_TOKENIZER = "openai/clip-vit-large-patch14"  # SD 1.x and 2.x share its vocabulary


@dataclass(frozen=True)
class Known:
    """A checkpoint of the catalogue: where it is, and the SHA-256 of its files as published."""

    repository: str
    revision: str
    sha256: Mapping[str, str]


def weights_folder() -> Path:
    """The folder of the catalogue, in an installation or in a checkout."""
    inside = Path(__file__).parent / "weights"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "weights"


def catalogue() -> dict[str, Known]:
    """The checkpoints known by a short name."""
    entries = json.loads((weights_folder() / "catalogue.json").read_text(encoding="utf-8"))
    return {name: Known(**entry) for name, entry in entries.items()}


def choose_weights(names: Collection[str], component: str, half: bool) -> str | None:
    """The safetensors file or index of a component among a repository's file names.

    The plain file first, or the fp16 one for a run in fp16; whichever exists otherwise.
    """
    base = f"{component}/{COMPONENTS[component]}"
    plain = [f"{base}.safetensors", f"{base}.safetensors.index.json"]
    small = [f"{base}.fp16.safetensors", f"{base}.safetensors.index.fp16.json"]
    for name in small + plain if half else plain + small:
        if name in names:
            return name
    others = [name for name in sorted(names) if re.fullmatch(rf"{re.escape(base)}\.\w+\.safetensors", name)]
    return others[0] if len(others) == 1 else None


def fetch(repository: str, revision: str | None, half: bool, known: Known | None = None) -> Path:
    """The folder in the cache that holds what a run needs of a repository; downloads the rest.

    A pinned commit that is complete in the cache is used without asking the hub. Files of the
    catalogue are compared with their published SHA-256.

    Raises:
        CheckpointError: no such repository or revision, no network and nothing cached, or a
            file that differs from the published one.
    """
    pinned = revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None
    folder = _cached(repository, revision)
    if not (pinned and folder and _complete(folder, half)):
        folder = _download(repository, revision, half, folder)
    if known is not None:
        for name, digest in known.sha256.items():
            if (folder / name).is_file():
                verify(folder / name, digest)
    return folder


def fetch_tokenizer() -> Path:
    """The folder with CLIP's vocabulary, from the cache or the hub."""
    folder = _cached(CLIP_TOKENIZER, None)
    if folder and all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        return folder
    return _get(CLIP_TOKENIZER, "main", ["vocab.json", "merges.txt"])


def verify(path: Path, digest: str) -> None:
    """Compare a file with a known SHA-256, once: success is remembered beside the hub's cache.

    CheckpointError if it differs.
    """
    state = path.stat()
    mark = {"path": str(path.resolve()), "size": state.st_size, "time": state.st_mtime_ns, "sha256": digest}
    receipt = _receipts() / hashlib.sha256(json.dumps(mark).encode()).hexdigest()
    if receipt.exists():
        return
    with path.open("rb") as file:
        found = hashlib.sha256()
        while block := file.read(1 << 22):
            found.update(block)
    if found.hexdigest() != digest:
        raise CheckpointError(
            f"{path}: differs from the published file (SHA-256 {found.hexdigest()[:12]}..., expected "
            f"{digest[:12]}...); delete it and fetch it again"
        )
    try:
        receipt.parent.mkdir(parents=True, exist_ok=True)
        receipt.touch()
    except OSError:
        pass  # a read-only home: the file is verified again next time


def _receipts() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "minpaint" / "verified"


def file_names(folder: Path) -> set[str]:
    """The files in a folder and in its folders, as names with slashes."""
    inside = [*folder.glob("*"), *folder.glob("*/*")]
    return {path.relative_to(folder).as_posix() for path in inside if path.is_file()}


def _complete(folder: Path, half: bool) -> bool:
    names = file_names(folder)
    chosen = [choose_weights(names, component, half) for component in COMPONENTS]
    if None in chosen or not set(CONFIGS) <= names:
        return False
    shards = [f"{Path(index).parent}/{name}" for index in chosen if index for name in _shards(folder / index)]
    return set(shards) <= names and "tokenizer/vocab.json" in names


def _shards(path: Path) -> list[str]:
    """The files an index names; none for a file that is no index."""
    if path.suffix != ".json":
        return []
    try:
        return sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: not a readable index of weight files") from None


def _cached(repository: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # LocalEntryNotFoundError is both
        return None


def _download(repository: str, revision: str | None, half: bool, cached: Path | None) -> Path:
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    place = f"{repository}{f'@{revision}' if revision else ''}"
    try:
        info = HfApi().model_info(repository, revision=revision)
    except hub.GatedRepoError:
        raise CheckpointError(f"{place}: access must be asked for on the hub, then log in with `hf auth login`") from None
    except hub.RevisionNotFoundError:
        raise CheckpointError(f"{place}: the hub has no such revision") from None
    except (hub.RepositoryNotFoundError, hub.HFValidationError):
        raise CheckpointError(f"{place}: the hub has no such repository, or it is private") from None
    except Exception as error:  # every way a network can fail
        if cached and _complete(cached, half):
            return cached
        raise CheckpointError(
            f"{place}: not complete in the cache, and the hub cannot be reached "
            f"({type(error).__name__}: {error}); go online once, or give a folder"
        ) from None
    names = {file.rfilename for file in info.siblings or []}
    chosen = [choose_weights(names, component, half) for component in COMPONENTS]
    wanted = [name for name in (*CONFIGS, *(f"tokenizer/{n}" for n in TOKENIZER_FILES)) if name in names]
    commit = info.sha or revision or "main"
    folder = _get(repository, commit, [*wanted, *(name for name in chosen if name)])
    shards = [f"{Path(index).parent}/{name}" for index in chosen if index for name in _shards(folder / index)]
    return _get(repository, commit, shards) if shards else folder


def _get(repository: str, revision: str, names: Collection[str]) -> Path:
    """Download files of a repository into the cache; the folder they are in."""
    from huggingface_hub import hf_hub_download

    folder = None
    for name in names:
        try:
            path = Path(hf_hub_download(repository, name, revision=revision))
        except Exception as error:  # every way a network can fail
            raise CheckpointError(
                f"{repository}: {name} cannot be fetched ({type(error).__name__}: {error}); try again online"
            ) from None
        folder = path.parents[name.count("/")]
    if folder is None:
        raise CheckpointError(f"{repository}: holds no Stable Diffusion checkpoint in diffusers layout")
    return folder
