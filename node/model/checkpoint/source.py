"""The sources of a model: a local folder, the hub, or the built-in model; each gives a ModelFolder."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from node.config import ConfigError
from node.model.checkpoint.builtin import BUILTIN_MODEL, BUILTIN_VERSION, builtin_folder
from node.model.checkpoint.disk.model_cache import ModelCache
from node.model.checkpoint.disk.plan import Key
from node.model.checkpoint.disk.uses import Lease
from node.model.checkpoint.folder import HashMemo, ModelFolder, open_folder
from node.model.checkpoint.hub import Hub, resolve_hub
from node.model.checkpoint.progress import Progress, silent

_NEEDED = "a model is named by its folder, with config.json, weights as safetensors and a tokenizer"
_KINDS = {
    ".gguf": "a GGUF file, of which the built-in model alone is read",
    ".safetensors": "a file of weights and not a folder",
    ".bin": "a file of weights in PyTorch's format and not a folder",
    ".pt": "a file of weights in PyTorch's format and not a folder",
    ".pth": "a file of weights in PyTorch's format and not a folder",
    ".onnx": "an ONNX file and not a folder",
}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of fetched models: RACEME_CACHE, else XDG_CACHE_HOME/raceme, else ~/.cache/raceme.

    Raises ConfigError where the home folder is not known.
    """
    if ours := environ.get("RACEME_CACHE"):
        return _of_home(ours)
    if (shared := environ.get("XDG_CACHE_HOME")) and Path(shared).is_absolute():
        return Path(shared) / "raceme"
    return _of_home("~/.cache/raceme")


def _of_home(path: str) -> Path:
    """The path with its ~ resolved.  Raises ConfigError where the home folder is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"the home folder in {path} is not known; set HOME, or RACEME_CACHE") from None


def resolve(
    model: str | Path | None = None,
    *,
    cache_dir: Path,
    revision: str | None = None,
    progress: Progress = silent,
    hub: Hub | None = None,
    max_disk_bytes: int | None = None,
) -> ModelFolder:
    """The model's folder, with its revision; the weights of a hub's model are left to `need`.

    model: a folder, a hub's "org/name", or the built-in model's name (None means that).
    revision: a branch, tag or commit of the hub.  max_disk_bytes: of all models in the cache; those unused
    for longest make room.  The model stays in the cache while the result lives.  Raises ConfigError.
    """
    cache = ModelCache(cache_dir, max_disk_bytes)
    memo = HashMemo(cache_dir / "hashes.json")
    named = BUILTIN_MODEL if model is None else str(model)
    try:
        path = Path(named).expanduser()
        is_folder, is_file = path.is_dir(), path.exists() and not path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, no such user
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot open {brief(named)} as a model's folder: {why}") from None
    if is_file and named != BUILTIN_MODEL:
        raise ConfigError(f"{brief(named)} is {_kind_of(path)}: {_NEEDED}")
    from_hub = named != BUILTIN_MODEL and not is_folder and HUB_NAME.fullmatch(named)
    if revision is not None and not from_hub:
        raise ConfigError(f"a revision can be chosen for a model of the hub only, and {named} is none")
    if named == BUILTIN_MODEL:
        return _resolve_builtin(cache, memo, progress)
    if is_folder:
        held = _held(path, cache)
        return replace(open_folder(path, memo=memo, progress=progress), lease=held)
    if from_hub:
        return resolve_hub(named, revision, cache=cache, memo=memo, hub=hub, progress=progress)
    raise ConfigError(
        f"there is no folder {brief(named)}; the hub's are org/name, built in is {BUILTIN_MODEL}"
    )


def _resolve_builtin(cache: ModelCache, memo: HashMemo, progress: Progress) -> ModelFolder:
    key = Key("models", BUILTIN_MODEL, BUILTIN_VERSION)
    lease = cache.hold(key)

    def make_room(needed: int) -> None:
        cache.make_room(key, lease, {"what is fetched and converted": needed})

    folder = builtin_folder(cache.root, memo=memo, make_room=make_room, progress=progress)
    cache.make_room(key, lease, {})
    found = open_folder(folder, memo=memo, name=BUILTIN_MODEL, progress=progress)
    return replace(found, lease=lease)


def _held(path: Path, cache: ModelCache) -> Lease | None:
    """The lease of a folder inside the cache; None for a folder elsewhere.  Raises ConfigError."""
    try:
        folder, revision = path.resolve().relative_to(cache.root.resolve() / "models").parts
    except (OSError, ValueError):
        return None
    return cache.hold(Key("models", folder, revision))


def _kind_of(path: Path) -> str:
    return _KINDS.get(path.suffix.lower(), "a file and not a folder")


def brief(text: str) -> str:
    """The given text for a line that people read, shortened where it is long."""
    printable = "".join(character if character.isprintable() else "?" for character in text)
    return printable if len(printable) <= 120 else printable[:117] + "..."


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that can be named.

    path: None where it is not there.  size: bytes on disk.  revision: a commit of the hub, a version of ours.
    last_used: Unix seconds, 0 where unknown.  in_use: by a process of this machine.
    """

    name: str
    path: Path | None
    size: int
    revision: str = ""
    last_used: float = 0.0
    in_use: bool = False


def list_models(cache_dir: Path) -> list[KnownModel]:
    """The built-in model, then the prepared and fetched ones by name and revision.

    Of the hub's cache those count that Raceme has used.
    """
    cache = ModelCache(cache_dir)
    builtin = Key("models", BUILTIN_MODEL, BUILTIN_VERSION)
    found = {model.key: model for model in cache.known()}
    known = [] if builtin in found else [KnownModel(BUILTIN_MODEL, None, 0)]
    for key in sorted(found, key=lambda each: (each != builtin, each.kind == "hub", each)):
        model = found[key]
        known.append(
            KnownModel(
                key.name, cache.path_of(key), model.nbytes, key.revision, model.last_used, model.in_use
            )
        )
    return known
