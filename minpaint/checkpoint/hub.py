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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minpaint.checkpoint.configs import FILES as CONFIGS
from minpaint.checkpoint.tensorfile import read_index
from minpaint.checkpoint.tokenizer import TOKENIZER_FILES, VOCABULARY, is_tokenizer
from minpaint.errors import CheckpointError

COMPONENTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
PACKAGE = Path(__file__).parent.parent
CLIP_TOKENIZER = "openai/clip-vit-large-patch14"  # SD 1.x and 2.x share its vocabulary
SHA256 = re.compile("[0-9a-f]{64}")  # how the hub's cache names large files
PATIENCE = 20  # seconds that the hub may ask to wait for
REFUSALS: dict[object, str] = {  # what the hub means by an error of huggingface_hub or a status, and the way out
    "GatedRepoError": "access must be asked for on the hub, then log in with `hf auth login`",
    "RevisionNotFoundError": "the hub has no such revision",
    403: "the hub forbids it; log in with `hf auth login`, with a token that may read it",
    429: "the hub has had too many requests; wait some minutes, or log in with `hf auth login`",
    **dict.fromkeys(
        ("RepositoryNotFoundError", "HFValidationError"),
        "the hub has no such repository, or it is private; look for a mirror, or log in with `hf auth login`",
    ),
}


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

    A pinned commit that was fetched before is used without asking the hub, and a complete cache
    where the hub does not answer. Files of the catalogue are compared with their published SHA-256.

    Raises:
        CheckpointError: no such repository or revision, no Stable Diffusion in it, no network
            and nothing cached, or a file that differs from the published one.
    """
    needed = _recall(_note("files", repository, revision, half))  # of a commit; there is no note of a branch
    folder = (needed and _cached(repository, revision, needed)) or _download(repository, revision, half)
    for name, digest in known.sha256.items() if known else ():
        if (folder / name).is_file():
            verify(folder / name, digest)
    return folder


def fetch_file(repository: str, revision: str | None, name: str) -> Path:
    """One file of a repository, from the hub or the cache."""
    return _fetch_some(repository, revision, [name]) / name


def fetch_vae(repository: str, revision: str | None) -> Path:
    """The folder in the cache with a repository's VAE, whether it holds that alone or a whole checkpoint."""
    names = ["config.json", *(f"{COMPONENTS['vae']}{kind}.safetensors" for kind in ("", ".fp16"))]
    return _fetch_some(repository, revision, [*names, *(f"vae/{name}" for name in names)])


def fetch_safety_checker(repository: str, revision: str | None) -> Path:
    """The folder in the cache with a repository's safety checker."""
    names = [f"safety_checker/{name}" for name in ("config.json", "model.safetensors", "model.fp16.safetensors")]
    folder = _fetch_some(repository, revision, names[:2])
    return folder if (folder / names[1]).is_file() else _fetch_some(repository, revision, names)


def fetch_configs(repository: str, revision: str | None) -> Path:
    """The folder in the cache with a repository's configurations; nothing else is fetched."""
    return _fetch_some(repository, revision, CONFIGS)


def _fetch_some(repository: str, revision: str | None, names: Sequence[str]) -> Path:
    """The folder in the cache with those of the files that a repository has; CheckpointError if it has none of them."""
    pinned = re.fullmatch(r"[0-9a-f]{40}", revision or "")  # a commit, which never changes
    folder = (pinned and _cached(repository, revision, names)) or _get(repository, revision, names)
    if not any((folder / name).is_file() for name in names):
        raise CheckpointError(f"{repository}: has no {' or '.join(names[:2])}; look at its list of files")
    return folder


def fetch_tokenizer() -> Path:
    """The folder with CLIP's vocabulary, from the cache or the hub."""
    try:
        return _cached(CLIP_TOKENIZER, None, VOCABULARY) or _get(CLIP_TOKENIZER, None, VOCABULARY)
    except CheckpointError as error:
        raise CheckpointError(f"{error}, or put {' and '.join(VOCABULARY)} beside the weights") from None


def verify(path: Path, digest: str) -> None:
    """Compare a file with a known SHA-256, once: a note remembers success while the file stays the same.

    CheckpointError if it differs.
    """
    state = path.stat()
    note = _note("verified", str(path.resolve()), state.st_size, state.st_mtime_ns, digest)
    if _recall(note):
        return
    found = sha256(path)
    if found != digest:
        raise CheckpointError(
            f"{path.parent.name}/{path.name}: differs from the published file (SHA-256 {found[:12]}..., expected "
            f"{digest[:12]}...); delete {path.resolve()} and fetch it again"
        )
    _remember(note, [found])


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
        blob = path.resolve().name
        digests.append(blob if SHA256.fullmatch(blob) else sha256(path))
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def file_names(folder: Path) -> set[str]:
    """The files in a folder and in its folders, as names with slashes."""
    inside = [*folder.glob("*"), *folder.glob("*/*")]
    return {path.relative_to(folder).as_posix() for path in inside if path.is_file()}


def _note(*subject: object) -> Path:
    """The file in which the program remembers what it found out about `subject`."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "minpaint" / "notes" / hashlib.sha256(json.dumps(subject).encode()).hexdigest()


def _remember(note: Path, found: list[str]) -> None:
    with suppress(OSError):  # a home that cannot be written: it is found out again next time
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(found), encoding="utf-8")


def _recall(note: Path) -> list[str]:
    """What a note says; nothing if there is none, or it was not written to its end."""
    try:
        return list(json.loads(note.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return []


def _needed(names: Collection[str], half: bool) -> tuple[list[str], list[str]]:
    """The files that a run needs among a repository's names, without shards; and what is missing there."""
    weights = {component: choose_weights(names, component, half) for component in COMPONENTS}
    missing = [name for name in CONFIGS if name not in names]
    missing += [f"{component}/*.safetensors" for component, name in weights.items() if name is None]
    if not is_tokenizer([name.removeprefix("tokenizer/") for name in names if name.startswith("tokenizer/")]):
        missing.append("tokenizer/vocab.json")
    needed = [name for name in (*CONFIGS, *(f"tokenizer/{name}" for name in TOKENIZER_FILES)) if name in names]
    return needed + [name for name in weights.values() if name], missing


def _shards(folder: Path, names: Iterable[str]) -> list[str]:
    """The files that the indices among `names` list, as names in the repository."""
    indices = [name for name in names if ".safetensors." in name and name.endswith(".json")]
    return [f"{Path(index).parent}/{shard}" for index in indices for shard in sorted(read_index(folder / index))]


def _cached(repository: str, revision: str | None, names: Sequence[str]) -> Path | None:
    """The folder in the hub's cache that holds these files of a repository; None if one of them is not there."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(repository, revision=revision, allow_patterns=list(names), local_files_only=True)
    except (OSError, ValueError):  # nothing of the repository is there, or this is not even the name of one
        return None
    return Path(found) if all((Path(found) / name).is_file() for name in names) else None


def _download(repository: str, revision: str | None, half: bool) -> Path:
    """The folder with what a run needs of a repository, from the hub or, if that does not answer, from the cache."""
    from huggingface_hub import HfApi

    place = f"{repository}{f'@{revision}' if revision else ''}"
    try:
        _limit_waiting()
        info = HfApi().model_info(repository, revision=revision)
    except Exception as error:  # a refusal, or one of the ways a network can fail
        if folder := _cached(repository, revision, CONFIGS):
            names = file_names(folder)
            needed, missing = _needed(names, half)
            if not missing and names.issuperset(_shards(folder, needed)):
                return folder
        trouble = (
            f"not complete in the cache, and the hub cannot be reached "
            f"({type(error).__name__}: {error}); go online once, or give a folder"
        )
        raise CheckpointError(f"{place}: {_refusal(error) or trouble}") from None
    needed, missing = _needed({file.rfilename for file in info.siblings or []}, half)
    if missing:
        raise CheckpointError(
            f"{place}: no Stable Diffusion checkpoint in diffusers layout with safetensors weights, the only kind "
            f"that is opened (missing: {', '.join(missing)})"
        )
    folder = _get(repository, info.sha, needed)
    if shards := _shards(folder, needed):
        _get(repository, info.sha, shards)
    _get(repository, revision, needed)  # all is there by now: the cache learns which commit a branch is
    _remember(_note("files", repository, info.sha, half), needed + shards)
    return folder


def _get(repository: str, revision: str | None, names: Sequence[str]) -> Path:
    """Download files of a repository into the cache, where they are not there yet; the folder they are in.

    What came otherwise than the hub had announced is deleted, so that the next run fetches it again.
    """
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    try:
        _limit_waiting()
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(names)))
    except Exception as error:  # a refusal, or one of the ways a network can fail
        told = _refusal(error)
        if told is None:
            cached = [try_to_load_from_cache(repository, name, revision=revision) for name in names]
            absent = [name for name, path in zip(names, cached, strict=True) if not isinstance(path, str)]
            shown = ", ".join(absent[:3]) + ", ..." * (len(absent) > 3)
            told = f"{shown} cannot be fetched ({type(error).__name__}: {error}); try again online"
        raise CheckpointError(f"{repository}: {told}") from None
    for name in names:
        blob = (folder / name).resolve()
        if SHA256.fullmatch(blob.name):
            try:
                verify(blob, blob.name)
            except CheckpointError:
                blob.unlink()
                raise CheckpointError(f"{repository}: {name} came damaged, and was deleted; run it again") from None
    return folder


def _limit_waiting() -> None:
    """Give every request of huggingface_hub a timeout, which some lack, and refuse long waits, which it would sleep."""
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT as LIMIT
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    def limit(request: Any) -> None:
        if not request.extensions.get("timeout", {}).get("read"):
            request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), LIMIT)

    def refuse_wait(response: Any) -> None:
        headers = response.headers
        waits = [headers.get("Retry-After", "0"), *re.findall(r"t=(\d+)", headers.get("RateLimit", ""))]
        if response.status_code == 429 and not all(wait.isdecimal() and int(wait) <= PATIENCE for wait in waits):
            response.raise_for_status()

    hooks = getattr(get_session(), "event_hooks", None)  # versions before 1.0 have none, and wait as long as they like
    if hooks is not None and not hooks["response"]:
        get_session().event_hooks = {"request": [*hooks["request"], limit], "response": [refuse_wait]}


def _refusal(error: Exception) -> str | None:
    """What a refusal of the hub means, and the way out; None if the trouble is another."""
    keys: list[object] = []
    for cause in (error, error.__cause__):
        keys += [type(cause).__name__, getattr(getattr(cause, "response", None), "status_code", None)]
    return next((REFUSALS[key] for key in keys if key in REFUSALS), None)
