"""A model's folder: its files, their headers, and the revision that names their content.

Knows safetensors by its bytes (8 bytes little-endian header length, a JSON header, the tensors), so that a
node can plan a model's memory without importing torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from node.config import ConfigError
from node.model.checkpoint.disk.uses import Lease
from node.model.checkpoint.progress import Progress, silent
from node.runtime.files import write_atomically
from routing.names import ModelId, Revision

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MANIFEST_FILE = "raceme.json"

QUANTIZE_KEY = "raceme_quantize"  # in the config of a prepared model: the quantisation of its matrices
SOURCE_KEY = "raceme_source_revision"  # and the revision of the model that it was made from

_NAME_BYTES = 96  # of a model's name: it stands in records, which are short
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".safetensors")
_MAX_HEADER_BYTES = 100_000_000  # the format's own bound
_CHUNK_BYTES = 1 << 20

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint.

    file: name in the model's folder.  dtype: as safetensors spells it ("F32", "BF16").
    """

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def values(self) -> int:
        """The number of values in the tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes in the file; those of a dtype that is not known here count as 1."""
        return self.values * ITEM_BYTES.get(self.dtype, 1)


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model whose config, index and headers are present; `need` fetches the weights.

    path: the folder.  config: its config.json.  tensors: every tensor of the checkpoint by name.
    revision: 32 hex digits, equal for equal content from any source.  lease: keeps the model in the cache as
    long as this value lives.
    """

    path: Path
    name: ModelId
    revision: Revision
    config: Mapping[str, Any]  # Any: JSON that the library's config class reads
    tensors: Mapping[str, TensorEntry]
    fetch: Callable[[Collection[str], Progress], None] | None = field(default=None, compare=False)
    lease: Lease | None = field(default=None, compare=False, repr=False)

    @property
    def quantize(self) -> str:
        """The matrices' quantisation: "int8" where `checkpoint.prepare` made the folder, else "none"."""
        return "int8" if self.config.get(QUANTIZE_KEY) == "int8" else "none"

    def need(self, files: Collection[str], progress: Progress = silent) -> None:
        """Return once these files lie in `path`.  Raises ConfigError that names a file that cannot be had."""
        missing = [name for name in sorted(files) if not (self.path / name).is_file()]
        if missing and self.fetch is not None:
            self.fetch(missing, progress)
            missing = [name for name in missing if not (self.path / name).is_file()]
        if missing:
            raise ConfigError(f"{self.path} has no {missing[0]}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.  Raises ConfigError if it is missing, unreadable or not an object."""
    try:
        value = json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise ConfigError(f"{path.parent} has no {path.name}: it is not a model's folder") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is damaged: a JSON object is expected, not {type(value).__name__}")
    return value


def weight_files(path: Path) -> tuple[str, ...]:
    """The names of the files that hold the model's tensors, sorted.  Raises ConfigError for none."""
    if (path / INDEX_FILE).is_file():
        mapping = read_json(path / INDEX_FILE).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise ConfigError(f"{path / INDEX_FILE} is damaged: it has no weight_map")
        names = {str(name) for name in mapping.values()}
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ConfigError(
                    f"{path / INDEX_FILE} is damaged: {name!r} is not the name of a weight file"
                )
        return tuple(sorted(names))
    if (path / SINGLE_FILE).is_file():
        return (SINGLE_FILE,)
    others = sorted(file.name for file in path.iterdir() if file.suffix in _OTHER_WEIGHTS)
    found = (
        f"; it has {others[0]}, and weights as safetensors are needed, under these names" if others else ""
    )
    raise ConfigError(f"{path} has no weights: neither {INDEX_FILE} nor {SINGLE_FILE}{found}")


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file.

    Raises ConfigError for a file that is missing, unreadable, damaged or shorter than it says.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= _MAX_HEADER_BYTES:
                raise ConfigError(f"{path} is damaged: its header would have {length} bytes")
            if 8 + length > size:
                raise ConfigError(f"{path} is truncated: {size} bytes, its header alone has {8 + length}")
            raw = file.read(length)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise ValueError("not a JSON object")
        header.pop("__metadata__", None)
        entries, end = {}, 0
        for name, value in header.items():
            entries[name], stop = _entry(path.name, value)
            end = max(end, stop)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: its header cannot be read ({error})") from None
    if 8 + length + end > size:
        raise ConfigError(f"{path} is truncated: {size} bytes, its header promises {8 + length + end}")
    return entries


def _entry(file: str, value: dict[str, Any]) -> tuple[TensorEntry, int]:
    """A tensor's entry and where its bytes end.  Raises ValueError, KeyError or TypeError."""
    begin, end = value["data_offsets"]
    entry = TensorEntry(file, value["dtype"], tuple(value["shape"]))
    if any(type(size) is not int or size < 0 for size in (*entry.shape, begin, end)):
        raise ValueError("a size that is not a number of bytes")
    if entry.dtype in ITEM_BYTES and end - begin != entry.values * ITEM_BYTES[entry.dtype]:
        raise ValueError(f"{end - begin} bytes for a tensor of {entry.shape} {entry.dtype}")
    return entry, end


def read_tensors(path: Path, files: Iterable[str]) -> dict[str, TensorEntry]:
    """The tensors of all these files, by name.  Raises ConfigError, also for a missing file."""
    tensors: dict[str, TensorEntry] = {}
    for name in files:
        if not (path / name).is_file():
            raise ConfigError(f"{path} has no {name}")
        tensors |= read_header(path / name)
    if (path / INDEX_FILE).is_file():
        for tensor, file in read_json(path / INDEX_FILE)["weight_map"].items():
            if tensor not in tensors or tensors[tensor].file != file:
                raise ConfigError(
                    f"tensor {tensor} is missing from {path / file}, where {INDEX_FILE} places it"
                )
    return tensors


def revision_of(hashes: Mapping[str, str]) -> Revision:
    """The revision of a model: BLAKE2b (16 bytes, hex) over the sorted lines "file sha256".

    hashes: SHA-256, in hex, of config.json and of every weight file.
    """
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(hashes.items()))
    return Revision(hashlib.blake2b(lines.encode(), digest_size=16).hexdigest())


def stated_revision(path: Path, config: Mapping[str, Any]) -> Revision | None:
    """The revision of the original that a prepared model names; None for any other model.

    The prepared model serves in the original's swarm: quantising at load gives equal weights.  Raises
    ConfigError.
    """
    if (stated := config.get(SOURCE_KEY)) is None:
        return None
    if not isinstance(stated, str) or not re.fullmatch("[0-9a-f]{32}", stated):
        raise ConfigError(f"{path / CONFIG_FILE} is damaged: its {SOURCE_KEY} is {stated!r}")
    return Revision(stated)


def sha256_of(path: Path, progress: Progress = silent) -> str:
    """SHA-256 of a file, in hex.  Raises ConfigError where it cannot be read."""
    digest, done = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                done += len(chunk)
                progress(f"checking {path.name}", done, total)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class HashMemo:
    """Hashes of files already read, kept in a file: a model of many gigabytes is hashed once.

    A file counts as unchanged while its path, size, modification time and inode are unchanged.  Two
    processes that write at once may lose an entry, which costs one more hashing and nothing else.
    """

    path: Path

    def sha256(self, file: Path, progress: Progress = silent) -> str:
        """SHA-256 of a file, in hex.  Raises ConfigError where it cannot be read."""
        key, stamp = str(file.resolve()), _stamp(file)
        known = self._load().get(key)
        if isinstance(known, list) and known[:-1] == stamp:
            return str(known[-1])
        digest = sha256_of(file, progress)
        self.remember({file: digest})
        return digest

    def remember(self, digests: Mapping[Path, str]) -> None:
        """Keep hashes that the caller has just computed."""
        memo = self._load()
        memo |= {str(file.resolve()): [*_stamp(file), digest] for file, digest in digests.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(memo).encode())
        except OSError:
            return  # a cache that cannot be written costs time, not correctness

    def _load(self) -> dict[str, Any]:
        try:
            memo = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return {}
        return memo if isinstance(memo, dict) else {}


def _stamp(file: Path) -> list[int]:
    try:
        found = file.stat()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def check_manifest(path: Path, memo: HashMemo, progress: Progress = silent) -> None:
    """Compare every file with the folder's manifest, if it has one.

    Raises ConfigError for the first file that is missing or differs.
    """
    if not (path / MANIFEST_FILE).is_file():
        return
    files = read_json(path / MANIFEST_FILE).get("files")
    if not isinstance(files, dict):
        raise ConfigError(f"{path / MANIFEST_FILE} is damaged: it lists no files")
    for name, stated in sorted(files.items()):
        expected = stated.get("sha256") if isinstance(stated, dict) else None
        if Path(name).name != name or not isinstance(expected, str):
            raise ConfigError(f"{path / MANIFEST_FILE} is damaged: its entry for {name!r}")
        if not (path / name).is_file():
            raise ConfigError(f"{path} has no {name}, which {MANIFEST_FILE} lists")
        digest = memo.sha256(path / name, progress)
        if digest != expected:
            raise ConfigError(
                f"{path / name} is not the file that {MANIFEST_FILE} describes: "
                f"SHA-256 {digest[:16]}..., expected {expected[:16]}..."
            )


def open_folder(
    path: Path, *, memo: HashMemo, name: str | None = None, progress: Progress = silent
) -> ModelFolder:
    """A local folder with a whole model.  Raises ConfigError that names the fault."""
    if not path.is_dir():
        raise ConfigError(f"there is no folder {path}")
    config = read_json(path / CONFIG_FILE)
    files = weight_files(path)
    tensors = read_tensors(path, files)
    check_manifest(path, memo, progress)
    hashes = {name: memo.sha256(path / name, progress) for name in (CONFIG_FILE, *files)}
    named = model_name(name or _manifest_name(path) or path.resolve().name)
    revision = stated_revision(path, config) or revision_of(hashes)
    return ModelFolder(path, named, revision, config, tensors)


def model_name(text: str) -> ModelId:
    """A name for records out of a folder's: short, and printable.

    Servers and clients know a model by its revision, so the characters left out do not matter.
    """
    printable = "".join(character if character.isprintable() else "?" for character in text) or "model"
    if len(printable.encode()) > _NAME_BYTES:
        printable = printable.encode()[: _NAME_BYTES - 3].decode(errors="ignore") + "..."
    return ModelId(printable)


def _manifest_name(path: Path) -> str | None:
    """The model's name of its manifest: a copy under another folder's name keeps the name."""
    if not (path / MANIFEST_FILE).is_file():
        return None
    name = read_json(path / MANIFEST_FILE).get("name")
    return name if isinstance(name, str) and name else None
