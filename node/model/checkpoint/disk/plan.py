"""The choice of the models that leave the cache: the longest unused first, never one in use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

FileId = tuple[int, int]  # device and inode: a file that two revisions share counts once
PARTIAL = "partial"  # the revision that stands for downloads which ended early


class Key(NamedTuple):
    """A model of the cache at one revision.

    kind: "models" for a folder of our own cache, "hub" for one in the hub's.  folder: the name, of the
    hub's with `--` between organisation and model.  revision: a version of ours, or a commit.
    """

    kind: str
    folder: str
    revision: str

    @property
    def name(self) -> str:
        """The name by which people know the model."""
        return self.folder.replace("--", "/", 1) if self.kind == "hub" else self.folder


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model's part of the disk.

    last_used: Unix seconds.  in_use: by any process of the machine.  files: bytes of each.  coming: bytes
    that processes are about to write.  interrupted: its removal was begun, and did not end.
    """

    key: Key
    last_used: float
    in_use: bool = False
    files: Mapping[FileId, int] = field(default_factory=dict)
    coming: int = 0
    interrupted: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes on the disk once everything has come."""
        return sum(self.files.values()) + self.coming


class DoesNotFit(ValueError):
    """The bound is too small, whatever is removed."""


def total_bytes(models: Collection[CachedModel]) -> int:
    """Bytes of all models, shared files once."""
    files: dict[FileId, int] = {}
    for model in models:
        files.update(model.files)
    return sum(files.values()) + sum(model.coming for model in models)


def evictions(models: Sequence[CachedModel], most: int, own: Key | None = None) -> list[Key]:
    """The models to remove so that at most `most` bytes remain, in this order.

    The longest unused comes first; ties break on the name, after the files of no revision.  Those whose
    removal was interrupted are always removed.  Where the rest is in use and still too large all others are
    chosen.

    own: the model that the caller needs.  Raises DoesNotFit where its bytes alone are above the bound, or
    where those to come do not fit beside what other processes use.
    O(models * log(models) + files).
    """
    mine = next((model for model in models if model.key == own), None)
    if mine is not None and mine.nbytes > most:
        raise DoesNotFit(
            f"--max-disk of {in_units(most)} is too small for {mine.key.name}:"
            f" its files need {in_units(mine.nbytes)}"
        )
    shares = Counter(file for model in models for file in model.files)
    left = total_bytes(models)
    chosen = []
    free = [model for model in models if not model.in_use and model.key != own]
    for model in sorted(free, key=_order):
        if left <= most and not model.interrupted:
            break
        chosen.append(model.key)
        left -= model.coming
        for file, size in model.files.items():
            shares[file] -= 1
            left -= size if shares[file] == 0 else 0
    if left > most and mine is not None and mine.coming:
        others = [model for model in models if model.in_use and model.key != own]
        named = ", ".join(sorted({model.key.name for model in others}))
        raise DoesNotFit(
            f"--max-disk of {in_units(most)} leaves no room for {mine.key.name}: its files need"
            f" {in_units(mine.nbytes)}, and {in_units(left - mine.nbytes)} are in use"
            f" ({named or 'by files that it shares'})"
        )
    return chosen


def _order(model: CachedModel) -> tuple[bool, float, bool, Key]:
    return not model.interrupted, model.last_used, model.key.revision != PARTIAL, model.key


def in_units(count: int) -> str:
    """Bytes for people, in units of 1024."""
    size, units = float(count), ("bytes", "KiB", "MiB", "GiB", "TiB")
    for unit in units[:-1]:
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} {units[-1]}"
