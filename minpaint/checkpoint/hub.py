"""Where checkpoints come from: the catalogue, the Hugging Face hub and its cache.

Tokens, mirrors (HF_ENDPOINT), the cache's place (HF_HOME) and offline mode (HF_HUB_OFFLINE)
are huggingface_hub's own business.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minpaint.errors import CheckpointError
from minpaint.models.text import TOKENIZER_FILES

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
PACKAGE = Path(__file__).parent.parent
CLIP_TOKENIZER = "openai/clip-vit-large-patch14"  # SD 1.x and 2.x share its vocabulary


@dataclass(frozen=True)
class Known:
    """A checkpoint of the catalogue: where it is, and the SHA-256 of its files as published."""

    repository: str
    revision: str
    sha256: Mapping[str, str]


def weights_folder() -> Path:
    """The folder of the catalogue, in an installation or in a checkout."""
    inside = PACKAGE / "weights"
    return inside if inside.is_dir() else PACKAGE.parent / "weights"


def catalogue() -> dict[str, Known]:
    """The checkpoints known by a short name."""
    entries = json.loads((weights_folder() / "catalogue.json").read_text(encoding="utf-8"))
    return {name: Known(**entry) for name, entry in entries.items()}


def choose_weights(names: Collection[str], component: str, half: bool) -> str | None:
    """The safetensors file or index of a component among a repository's file names.

    The plain file first, or the fp16 one for a run in fp16; whichever exists otherwise. The
    index of fp16 shards has two names, of which diffusers 0.30 wrote the second.
    """
    base = f"{component}/{COMPONENTS[component]}"
    plain = [f"{base}.safetensors", f"{base}.safetensors.index.json"]
    small = [f"{base}.fp16.safetensors", f"{base}.safetensors.index.fp16.json", f"{base}.safetensors.fp16.index.json"]
    for name in small + plain if half else plain + small:
        if name in names:
            return name
    others = [name for name in sorted(names) if re.fullmatch(rf"{re.escape(base)}\.\w+\.safetensors", name)]
    return others[0] if len(others) == 1 else None


def fetch(repository: str, revision: str | None, half: bool, known: Known | None = None) -> Path:
    """The folder in the cache that holds what a run needs of a repository; downloads the rest.

    A pinned commit that was fetched before is used without asking the hub, and whatever is
    complete in the cache where the hub does not answer. Files of the catalogue are compared with
    their published SHA-256.

    Raises:
        CheckpointError: no such repository or revision, no Stable Diffusion in it, no network
            and nothing cached, or a file that differs from the published one.
    """
    pinned = revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None
    folder = _cached(repository, CONFIGS[0], revision)
    if not (pinned and folder and _complete(folder, half) and _choice(folder, file_names(folder), half).exists()):
        folder = _download(repository, revision, half, folder)
    if known is not None:
        for name, digest in known.sha256.items():
            if (folder / name).is_file():
                verify(folder / name, digest)
    return folder


def fetch_configs(repository: str, revision: str | None) -> Path:
    """The folder in the cache with a repository's configurations; nothing else is fetched."""
    return _get(repository, revision or "main", CONFIGS)


def fetch_tokenizer() -> Path:
    """The folder with CLIP's vocabulary, from the cache or the hub."""
    names = ["vocab.json", "merges.txt"]
    folder = _cached(CLIP_TOKENIZER, names[0], None)
    if folder and all((folder / name).is_file() for name in names):
        return folder
    try:
        return _get(CLIP_TOKENIZER, "main", names)
    except CheckpointError as error:
        raise CheckpointError(f"{error}, or put {' and '.join(names)} beside the weights") from None


def verify(path: Path, digest: str) -> None:
    """Compare a file with a known SHA-256, once: success is remembered beside the hub's cache.

    CheckpointError if it differs.
    """
    state = path.stat()
    mark = {"path": str(path.resolve()), "size": state.st_size, "time": state.st_mtime_ns, "sha256": digest}
    receipt = _receipt(mark)
    if receipt.exists():
        return
    found = sha256(path)
    if found != digest:
        raise CheckpointError(
            f"{path}: differs from the published file (SHA-256 {found[:12]}..., expected "
            f"{digest[:12]}...); delete {path.resolve()} and fetch it again"
        )
    _remember(receipt)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            found.update(block)
    return found.hexdigest()


def fingerprint(files: Iterable[Path]) -> str:
    """One SHA-256 for the weights of a checkpoint: that of its file, or of its files' SHA-256 in order."""
    digests = []
    for path in files:
        blob = path.resolve().name  # the hub's cache names large files by their SHA-256
        digests.append(blob if re.fullmatch("[0-9a-f]{64}", blob) else sha256(path))
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _receipt(mark: Mapping[str, object]) -> Path:
    """The empty file that says, if it exists, that what `mark` describes was found true."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "minpaint" / "verified" / hashlib.sha256(json.dumps(mark).encode()).hexdigest()


def _choice(folder: Path, names: Collection[str], half: bool) -> Path:
    """The receipt for the weights chosen among `names` being those chosen among all the repository's."""
    chosen = [choose_weights(names, component, half) for component in COMPONENTS]
    return _receipt({"path": str(folder.resolve()), "half": half, "weights": chosen})


def _remember(receipt: Path) -> None:
    try:
        receipt.parent.mkdir(parents=True, exist_ok=True)
        receipt.touch()
    except OSError:
        pass  # a read-only home: found out again next time


def file_names(folder: Path) -> set[str]:
    """The files in a folder and in its folders, as names with slashes."""
    inside = [*folder.glob("*"), *folder.glob("*/*")]
    return {path.relative_to(folder).as_posix() for path in inside if path.is_file()}


def _complete(folder: Path, half: bool) -> bool:
    names = file_names(folder)
    chosen = [choose_weights(names, component, half) for component in COMPONENTS]
    if None in chosen or not set(CONFIGS) <= names or not _has_tokenizer(names):
        return False
    shards = [f"{Path(index).parent}/{name}" for index in chosen if index for name in _shards(folder / index)]
    return set(shards) <= names


def _has_tokenizer(names: Collection[str]) -> bool:
    """Whether text.load_tokenizer finds what it needs."""
    return {"tokenizer/vocab.json", "tokenizer/merges.txt"} <= set(names) or "tokenizer/tokenizer.json" in names


def _shards(path: Path) -> list[str]:
    """The files an index names; none for a file that is no index."""
    if path.suffix != ".json":
        return []
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        foreign = [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: not a readable index of weight files") from None
    if foreign:
        raise CheckpointError(f"{path}: {foreign[0]!r} is not a safetensors file beside it")
    return names


def _cached(repository: str, name: str, revision: str | None) -> Path | None:
    """The folder in the cache that holds a file of a repository, complete or not."""
    from huggingface_hub import try_to_load_from_cache

    try:
        path = try_to_load_from_cache(repository, name, revision=revision)
    except ValueError:  # not even the name of a repository
        return None
    return Path(path).parents[name.count("/")] if isinstance(path, str) else None


def _download(repository: str, revision: str | None, half: bool, cached: Path | None) -> Path:
    from huggingface_hub import HfApi

    place = f"{repository}{f'@{revision}' if revision else ''}"
    try:
        info = HfApi().model_info(repository, revision=revision)
    except Exception as error:  # a refusal, or one of the ways a network can fail
        if cached and _complete(cached, half):
            return cached
        trouble = (
            f"not complete in the cache, and the hub cannot be reached "
            f"({type(error).__name__}: {error}); go online once, or give a folder"
        )
        raise CheckpointError(f"{place}: {_refusal(error) or trouble}") from None
    names = {file.rfilename for file in info.siblings or []}
    weights = {component: choose_weights(names, component, half) for component in COMPONENTS}
    missing = [name for name in CONFIGS if name not in names]
    missing += [f"{component}/*.safetensors" for component, name in weights.items() if name is None]
    missing += [] if _has_tokenizer(names) else ["tokenizer/vocab.json"]
    if missing:
        raise CheckpointError(
            f"{place}: no Stable Diffusion checkpoint in diffusers layout with safetensors weights, the only kind "
            f"that is opened (missing: {', '.join(missing)})"
        )
    wanted = [name for name in (*CONFIGS, *(f"tokenizer/{n}" for n in TOKENIZER_FILES)) if name in names]
    chosen = [name for name in weights.values() if name]
    commit = info.sha or revision or "main"
    folder = _get(repository, commit, wanted + chosen)
    shards = [f"{Path(index).parent}/{name}" for index in chosen for name in _shards(folder / index)]
    if shards:
        _get(repository, commit, shards)
    _get(repository, revision or "main", wanted[:1])  # now the cache knows offline which commit a branch is
    _remember(_choice(folder, names, half))
    return folder


def _get(repository: str, revision: str, names: Sequence[str]) -> Path:
    """Download files of a repository into the cache; the folder they are in."""
    from huggingface_hub import hf_hub_download

    for name in names:
        try:
            path = Path(hf_hub_download(repository, name, revision=revision))
        except Exception as error:  # a refusal, or one of the ways a network can fail
            trouble = f"{name} cannot be fetched ({type(error).__name__}: {error}); try again online"
            raise CheckpointError(f"{repository}: {_refusal(error) or trouble}") from None
    return path.parents[name.count("/")]


def _refusal(error: Exception) -> str | None:
    """What the hub means by an error, and the way out; None for other errors."""
    # huggingface_hub.errors has them from 0.25 on only
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return "access must be asked for on the hub, then log in with `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return "the hub has no such revision"
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return "the hub has no such repository, or it is private; look for a mirror, or log in with `hf auth login`"
    return None
