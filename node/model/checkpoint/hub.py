"""A model of the Hugging Face hub: small files at once, weights when a span needs them.

Everything goes through the hub's own client and cache, so earlier downloads are used and the hub's
environment variables (offline mode, mirror, token) hold.  The SHA-256 of each weight file, which names a
revision, is in the hub's listing.  The header of each weight file, which a node plans with, is read by
range.  Both are kept in our cache, so a node that was online once can start offline with the shards of its
own span alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from node.config import ConfigError
from node.model.checkpoint.disk.model_cache import ANY, ModelCache
from node.model.checkpoint.disk.plan import Key
from node.model.checkpoint.folder import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    HashMemo,
    ModelFolder,
    TensorEntry,
    model_name,
    read_json,
    read_tensors,
    revision_of,
    stated_revision,
    weight_files,
)
from node.model.checkpoint.progress import Progress, silent
from node.runtime.files import check_free_disk, disk_errors, write_atomically

T = TypeVar("T")

_SMALL_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
_ANSWER_SECONDS = 10.0


class Unreachable(Exception):
    """The hub does not answer, or offline mode forbids requests."""


@dataclass(frozen=True, slots=True)
class Listing:
    """The hub's entry of a model: the commit, and the SHA-256 of each of its large files."""

    commit: str
    hashes: Mapping[str, str]


class Hub:
    """The part of the hub's client that we use.  Its methods raise Unreachable and ConfigError."""

    def listing(self, model: str, revision: str | None) -> Listing:
        """The files of a model at a branch, tag or commit."""
        from huggingface_hub import HfApi

        info = _answer(
            model,
            lambda: HfApi().model_info(
                model, revision=revision, files_metadata=True, timeout=_ANSWER_SECONDS
            ),
        )
        hashes = {file.rfilename: file.lfs.sha256 for file in info.siblings or () if file.lfs is not None}
        return Listing(str(info.sha), hashes)

    def small_files(self, model: str, commit: str) -> Path:
        """Fetch config, tokenizer and index; the folder they lie in."""
        from huggingface_hub import snapshot_download

        return Path(
            _answer(
                model,
                lambda: snapshot_download(model, revision=commit, allow_patterns=list(_SMALL_FILES)),
            )
        )

    def tensors(self, model: str, commit: str) -> dict[str, TensorEntry]:
        """The headers of all weight files, without their content."""
        from huggingface_hub import HfApi

        found = _answer(model, lambda: HfApi().get_safetensors_metadata(model, revision=commit))
        return {
            name: TensorEntry(file, str(tensor.dtype), tuple(tensor.shape))
            for file, metadata in found.files_metadata.items()
            for name, tensor in metadata.tensors.items()
        }

    def fetch(self, model: str, commit: str, file: str) -> None:
        """Fetch one file into the folder of `small_files`; the hub's client shows its own bar."""
        from huggingface_hub import hf_hub_download

        _answer(model, lambda: hf_hub_download(model, file, revision=commit))

    def local(self, model: str, revision: str | None) -> Path | None:
        """The folder of a model that was fetched before, without asking the hub."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(
                snapshot_download(
                    model, revision=revision, allow_patterns=[CONFIG_FILE], local_files_only=True
                )
            )
        except LocalEntryNotFoundError:
            return None

    def adapter(self, name: str, revision: str | None, files: Collection[str]) -> Path:
        """Fetch these files of an adapter; the folder they lie in.  Without the hub, an earlier copy."""
        from huggingface_hub import snapshot_download

        wanted = list(files)
        try:
            return Path(
                _answer(name, lambda: snapshot_download(name, revision=revision, allow_patterns=wanted))
            )
        except Unreachable:
            if (found := self.local_adapter(name, revision, wanted)) is None:
                raise
            return found

    def local_adapter(self, name: str, revision: str | None, files: list[str]) -> Path | None:
        """The folder of an adapter that was fetched before, without asking the hub."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(
                snapshot_download(name, revision=revision, allow_patterns=files, local_files_only=True)
            )
        except LocalEntryNotFoundError:
            return None


def _answer(model: str, ask: Callable[[], T]) -> T:
    """Ask the hub, and sort the errors by the party that must act."""
    import httpx
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return ask()
    except GatedRepoError:
        raise ConfigError(f"the hub asks for a login with access to {model}") from None
    except RepositoryNotFoundError:
        raise ConfigError(f"the hub has no model {model}, or only for those who log in") from None
    except (RevisionNotFoundError, HFValidationError, NotASafetensorsRepoError) as error:
        raise ConfigError(f"{model}: {str(error).strip().splitlines()[-1]}") from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError) as error:
        raise Unreachable(str(error).strip().splitlines()[0]) from error


def resolve_hub(
    model: str,
    revision: str | None,
    *,
    cache: ModelCache,
    memo: HashMemo,
    hub: Hub | None = None,
    progress: Progress = silent,
) -> ModelFolder:
    """A model "org/name" of the hub, or the copy of it in the hub's cache.  Raises ConfigError."""
    hub = hub or Hub()
    key = Key("hub", model.replace("/", "--"), ANY)
    any_revision = cache.hold(key)
    with disk_errors(cache.root):
        try:
            listing = hub.listing(model, revision)
            path = hub.small_files(model, listing.commit)
        except Unreachable as error:
            found = hub.local(model, revision)
            if found is None:
                raise ConfigError(f"{model} is not in the hub's cache, and the hub: {error}") from None
            path, listing = found, None
        key = key._replace(revision=path.name)
        lease = cache.hold(key, path)
        any_revision.close()
        cache.make_room(key, lease, {})
        notes = cache.root / "hub" / key.folder / f"{path.name}.json"
        kept = _read_notes(notes)
        if kept is None and listing is not None:
            files = _files(model, path, listing.hashes)
            hashes = {CONFIG_FILE: memo.sha256(path / CONFIG_FILE)}
            hashes |= {name: listing.hashes[name] for name in files}
            try:
                tensors = hub.tensors(model, listing.commit)
            except Unreachable as error:
                raise ConfigError(f"the hub did not describe the weights of {model}: {error}") from None
            kept = hashes, {name: entry for name, entry in tensors.items() if entry.file in files}
            _write_notes(notes, *kept)
        if kept is None:
            kept = _from_whole_copy(model, path, memo, progress)
    hashes, tensors = kept

    def fetch(files: Collection[str], progress: Progress) -> None:
        sizes = dict.fromkeys(files, 0)
        for entry in tensors.values():
            if entry.file in sizes:
                sizes[entry.file] += entry.nbytes
        with disk_errors(path):
            cache.make_room(key, lease, sizes)
            for file, needed in sizes.items():
                check_free_disk(path, needed, file)
                try:
                    hub.fetch(model, path.name, file)
                except Unreachable as error:
                    raise ConfigError(f"the hub did not send {file} of {model}: {error}") from None
                if (digest := memo.sha256(path / file, progress)) != hashes[file]:
                    raise ConfigError(
                        f"{path / file} is not the file that the hub lists: "
                        f"SHA-256 {digest[:16]}..., expected {hashes[file][:16]}..."
                    )

    config = read_json(path / CONFIG_FILE)
    named = stated_revision(path, config) or revision_of(hashes)
    return ModelFolder(path, model_name(model), named, config, tensors, fetch, lease)


def _files(model: str, path: Path, hashes: Mapping[str, str]) -> tuple[str, ...]:
    """The weight files of a listing.  Raises ConfigError if none of them can be read."""
    if (path / INDEX_FILE).is_file():
        files = weight_files(path)
    elif SINGLE_FILE in hashes:
        files = (SINGLE_FILE,)
    else:
        raise ConfigError(f"{model} has no weights as safetensors")
    for name in files:
        if name not in hashes:
            raise ConfigError(f"{model} has no {name}, which its {INDEX_FILE} names")
    return files


def _from_whole_copy(
    model: str, path: Path, memo: HashMemo, progress: Progress
) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    """Hashes and headers out of the hub's cache alone, which must hold all weights.

    The cache names the content of each large file by its SHA-256, so nothing is read to hash it.
    """
    files = weight_files(path)
    for name in files:
        if not (path / name).is_file():
            raise ConfigError(
                f"the hub's cache has {model} without {name}; once online, a node fetches what it needs"
            )
    hashes = {CONFIG_FILE: memo.sha256(path / CONFIG_FILE)}
    for name in files:
        blob = (path / name).resolve().name
        hashes[name] = blob if re.fullmatch("[0-9a-f]{64}", blob) else memo.sha256(path / name, progress)
    return hashes, read_tensors(path, files)


def _read_notes(path: Path) -> tuple[dict[str, str], dict[str, TensorEntry]] | None:
    """Our cache's entry of a commit; None where it is missing or cannot be read."""
    try:
        notes = json.loads(path.read_bytes())
        tensors = {
            name: TensorEntry(entry["file"], entry["dtype"], tuple(entry["shape"]))
            for name, entry in notes["tensors"].items()
        }
        return dict(notes["hashes"]), tensors
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write_notes(path: Path, hashes: Mapping[str, str], tensors: Mapping[str, TensorEntry]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = {"hashes": dict(hashes), "tensors": {name: asdict(entry) for name, entry in tensors.items()}}
    write_atomically(path, json.dumps(notes).encode())
