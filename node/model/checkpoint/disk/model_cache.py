"""The cache's models as they lie on the disk, and their removal within a bound.

Two folders count: our own (`models/NAME/VERSION`), and the revisions in the hub's cache that Raceme has used.
Revisions there that other programs have fetched are neither counted nor removed.

A removal that is interrupted does no harm.  A folder of ours is renamed first, and the rest under the other
name is removed later.  For the hub's cache its own library chooses the order; a revision that was begun is
noted, and removed before any other.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from node.config import ConfigError
from node.model.checkpoint.disk.plan import (
    PARTIAL,
    CachedModel,
    DoesNotFit,
    FileId,
    Key,
    evictions,
    in_units,
    total_bytes,
)
from node.model.checkpoint.disk.uses import Lease, Uses
from node.runtime.files import disk_errors

log = logging.getLogger(__name__)

ANY = "any"  # the revision of a use that does not know its commit yet
FRESH_SECONDS = 600.0  # since the last bytes of a download: a slow mirror sends some every minute
_REMOVED = ".removed"


@dataclass(frozen=True, slots=True)
class ModelCache:
    """The models of a cache.

    root: the cache's folder.  max_bytes: of all models together; None: no bound.
    """

    root: Path
    max_bytes: int | None = None
    _uses: Uses = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_uses", Uses(self.root / "uses"))

    def hold(self, key: Key, path: Path | None = None) -> Lease:
        """Keep a model in the cache for as long as the lease lives.  path: its folder, where it is known.

        A cache that cannot be written has no leases; then only a bound is an error.  Raises ConfigError.
        """
        try:
            with self._uses.alone():
                return self._uses.take(key, path)
        except OSError:
            if self.max_bytes is None:
                return Lease()
            with disk_errors(self.root):
                raise

    def make_room(self, key: Key, lease: Lease, files: Mapping[str, int]) -> None:
        """Remove models until these files of a held model fit too; they count from now on.

        files: bytes by name.  Raises ConfigError where the bound is too small.
        """
        if self.max_bytes is None:
            with suppress(OSError):  # for processes with a bound
                lease.expect(files)
            return
        with disk_errors(self.root), self._uses.alone():
            lease.expect(files)
            try:
                self._remove_down_to(self.max_bytes, key)
            except DoesNotFit as error:
                lease.expect({})
                raise ConfigError(str(error)) from None

    def trim(self) -> None:
        """Remove models until the others fit into the bound.  Raises ConfigError."""
        if self.max_bytes is not None:
            with disk_errors(self.root), self._uses.alone():
                self._remove_down_to(self.max_bytes, None)

    def known(self) -> list[CachedModel]:
        """The models that are there or noted, by name, and what downloads that ended early have left."""
        return [model for model in self._all_models() if model.key.revision != PARTIAL or model.files]

    @property
    def nbytes(self) -> int:
        """Bytes of all models, shared files once."""
        return total_bytes(self._all_models())

    def path_of(self, key: Key) -> Path | None:
        """The folder of a model; None where there is none."""
        path = self._place(key)
        return path if path.is_dir() else None

    def _place(self, key: Key) -> Path:
        """The folder of a model, or its place in the hub's cache where it is not there."""
        if key.kind == "models":
            return self.root.joinpath(*key)
        usual = _hub_folder() / f"models--{key.folder}" / "snapshots" / key.revision
        return self._uses.path_of(key) or usual

    def _all_models(self) -> list[CachedModel]:
        own = self.root.glob("models/*/[!.]*")
        noted = self.root.glob("hub/*--*/*.json")
        keys = {Key("models", path.parent.name, path.name) for path in own if path.is_dir()}
        keys |= {Key("hub", path.parent.name, path.stem) for path in noted}
        keys |= {key for key in self._uses.keys() if key.revision not in (ANY, PARTIAL)}  # noqa: SIM118
        found = [self._model(key) for key in sorted(keys) if key.kind == "models"]
        for folder in sorted({key.folder for key in keys if key.kind == "hub"}):
            found += self._of_hub([self._model(key) for key in sorted(keys) if key[:2] == ("hub", folder)])
        return found

    def _model(self, key: Key) -> CachedModel:
        now = time.time()
        path = self.path_of(key)
        files = {} if path is None else dict(_files(path))
        names = set() if path is None else {each.name for each in path.iterdir()}
        known = self._uses.last_used(key, now)
        return CachedModel(
            key,
            last_used=known if known is not None else _last_touched(path),
            in_use=self._uses.is_used(key) or self._uses.is_used(key._replace(revision=ANY)),
            files=files,
            coming=sum(size for name, size in self._uses.coming(key).items() if name not in names),
            interrupted=self._uses.is_leaving(key),
        )

    def _of_hub(self, revisions: list[CachedModel]) -> list[CachedModel]:
        """The revisions of a hub's model, and the files that no revision has: of downloads that ended early.

        While a process fetches, the bytes that it has announced count in their place.  A download that was
        written to lately, maybe by another program, keeps all of the model.
        """
        repositories = self._repositories(revisions)
        files: dict[FileId, int] = {}
        if not any(each.coming for each in revisions):
            for repository in repositories:
                files |= _unclaimed(repository)
        if any(_is_fetched(repository) for repository in repositories):
            revisions = [replace(each, in_use=True) for each in revisions]
        last = max(each.last_used for each in revisions)
        in_use = any(each.in_use for each in revisions)
        key = revisions[0].key._replace(revision=PARTIAL)
        return [*revisions, CachedModel(key, last, in_use, files)]

    def _repositories(self, revisions: list[CachedModel]) -> set[Path]:
        """The folders of the hub's cache that hold these revisions."""
        return {self._place(each.key).parent.parent for each in revisions if each.key.kind == "hub"}

    def _remove_down_to(self, most: int, own: Key | None) -> None:
        """Alone: remove the models that must go.  Raises DoesNotFit, ConfigError, OSError."""
        for left in self.root.glob(f"models/*/.*{_REMOVED}"):  # of a process that was killed meanwhile
            shutil.rmtree(left, ignore_errors=True)
        models = self._all_models()
        by_key = {model.key: model for model in models}
        for key in evictions(models, most, own):
            model = by_key[key]
            log.info("removing %s (%s) from the cache: %s", key.name, key.revision, in_units(model.nbytes))
            self._remove(model, [each for each in models if each.key.folder == key.folder])
        if (left_bytes := total_bytes(self._all_models())) > most:
            log.warning(
                "the models in use have %s, more than --max-disk of %s", in_units(left_bytes), in_units(most)
            )

    def _remove(self, model: CachedModel, siblings: list[CachedModel]) -> None:
        key = model.key
        if key.revision == PARTIAL:
            for repository in self._repositories(siblings):
                for file in repository.glob("blobs/*"):
                    if (found := _file(file)) is not None and found[0] in model.files:
                        file.unlink(missing_ok=True)
            return
        self._uses.leave(key)
        path = self._place(key)
        if key.kind == "hub":
            _remove_from_hub(path, key)
            (self.root / "hub" / key.folder / f"{key.revision}.json").unlink(missing_ok=True)
            with suppress(OSError):
                (self.root / "hub" / key.folder).rmdir()  # unless it has other revisions
        elif path.is_dir():
            away = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_REMOVED}")
            path.rename(away)
            shutil.rmtree(away)
        if path.exists():
            raise ConfigError(f"{path} could not be removed, and --max-disk needs its room")
        self._uses.forget(key)


def _remove_from_hub(snapshot: Path, key: Key) -> None:
    """Remove one revision by the hub's own library, and what an interrupted removal of it has left.

    snapshot: CACHE/models--NAME/snapshots/COMMIT; a folder of another form is left alone.
    """
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    repository = snapshot.parent.parent
    if (repository.name, snapshot.name) != (f"models--{key.folder}", key.revision):
        return
    if snapshot.is_dir():
        with suppress(CacheNotFound):
            found = scan_cache_dir(repository.parent)
            # A copy of a repository has the same commits: the library would remove those of any.
            this = frozenset(each for each in found.repos if each.repo_path.name == repository.name)
            replace(found, repos=this).delete_revisions(key.revision).execute()
    shutil.rmtree(snapshot, ignore_errors=True)
    if repository.is_dir() and not any(path.is_dir() for path in repository.glob("snapshots/*")):
        shutil.rmtree(repository, ignore_errors=True)


def _hub_folder() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _files(folder: Path) -> Iterator[tuple[FileId, int]]:
    """The files below a folder, links followed, with their bytes."""
    for path in folder.rglob("*"):
        if (found := _file(path)) is not None:
            yield found


def _file(path: Path) -> tuple[FileId, int] | None:
    try:
        found = path.stat()
    except OSError:  # gone since, or a link to nothing
        return None
    return ((found.st_dev, found.st_ino), found.st_size) if stat.S_ISREG(found.st_mode) else None


def _unclaimed(repository: Path) -> dict[FileId, int]:
    """The files of a model in the hub's cache that none of its revisions links to."""
    files = dict(_files(repository / "blobs"))
    for claimed, _ in _files(repository / "snapshots"):
        files.pop(claimed, None)
    return files


def _is_fetched(repository: Path) -> bool:
    """Whether a download into this folder of the hub's cache was written to lately."""
    for file in repository.glob("blobs/*.incomplete"):
        with suppress(OSError):
            if time.time() - file.stat().st_mtime < FRESH_SECONDS:
                return True
    return False


def _last_touched(path: Path | None) -> float:
    """Unix seconds at which a model was last written or read, as far as the disk knows."""
    if path is None:
        return 0.0
    times = [0.0]
    for file in path.iterdir():
        with suppress(OSError):
            found = file.stat()
            times.append(max(found.st_mtime, found.st_atime))
    return max(times)
