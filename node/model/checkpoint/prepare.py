"""Write a model's checkpoint once more with its blocks' matrices in int8: a node then opens it at once.

The folder has the files that the original has, each matrix `X.weight` of a block as int8 [out, in] with
its scales `X.weight_scale`, float32 [out], next to it (see node/model/weights/quantize.py).  Everything
else, embeddings and head included, stays as it is, so clients can use the folder too.  The config names the
quantisation and the original's revision.  A node that serves the folder announces the original's revision:
quantising the original at start would give equal weights (docs/decisions/0008).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from node.config import ConfigError
from node.model.checkpoint.architecture import Architecture, architecture_of
from node.model.checkpoint.folder import (
    CONFIG_FILE,
    INDEX_FILE,
    ITEM_BYTES,
    MANIFEST_FILE,
    QUANTIZE_KEY,
    SOURCE_KEY,
    HashMemo,
    ModelFolder,
    TensorEntry,
    sha256_of,
)
from node.model.checkpoint.info import SCALE_SUFFIX, TRANSPOSED, is_matrix
from node.model.checkpoint.packed import packing_of
from node.model.checkpoint.progress import Progress, silent
from node.model.checkpoint.shards import ALIGNMENT, Entry, write_file
from node.model.weights.quantize import quantize_rows
from node.runtime.files import check_free_disk, disk_errors, part_name, write_atomically

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_OURS = (CONFIG_FILE, INDEX_FILE, MANIFEST_FILE)


@dataclass(frozen=True, slots=True)
class Written:
    """A tensor of the new checkpoint.  source: in the original; scales: whether it is the source's scales."""

    source: str
    dtype: str
    shape: tuple[int, ...]
    matrix: bool = False
    scales: bool = False

    @property
    def nbytes(self) -> int:
        """The tensor's bytes in the file."""
        return TensorEntry("", self.dtype, self.shape).values * ITEM_BYTES[self.dtype]


def plan_files(
    tensors: Mapping[str, TensorEntry], architecture: Architecture, dtype: torch.dtype | None
) -> dict[str, dict[str, Written]]:
    """The tensors of each file of the new checkpoint, in order: file -> tensor -> its source.

    dtype: of tensors that stay floats; None keeps their own.  Files keep their names and their tensors.
    Raises ConfigError for a matrix of a dtype that cannot be quantised.
    """
    turned = architecture.model_type in TRANSPOSED
    files: dict[str, dict[str, Written]] = {}
    for name, entry in sorted(tensors.items()):
        file = files.setdefault(entry.file, {})
        place = architecture.block_of(name)
        if place is None or not is_matrix(place[1], entry.shape):
            kind = _NAMES[dtype] if dtype is not None and entry.dtype in _FLOATS else entry.dtype
            if kind not in ITEM_BYTES:
                raise ConfigError(f"tensor {name} is {kind}, which cannot be copied")
            file[name] = Written(name, kind, entry.shape)
            continue
        if entry.dtype not in _FLOATS:
            raise ConfigError(f"tensor {name} is {entry.dtype}, only {', '.join(_FLOATS)} can be quantised")
        outs, width = reversed(entry.shape) if turned else entry.shape
        file[name] = Written(name, "I8", (outs, width), matrix=True)
        file[name + SCALE_SUFFIX] = Written(name, "F32", (outs,), scales=True)
    return {file: _in_order(made) for file, made in files.items()}


def _in_order(made: Mapping[str, Written]) -> dict[str, Written]:
    """Matrices first, scales after them; tensors of even sizes first, so that all these are aligned."""
    return dict(
        sorted(
            made.items(),
            key=lambda item: (item[1].scales, item[1].nbytes % ALIGNMENT != 0, not item[1].matrix, item[0]),
        )
    )


def prepare(
    folder: ModelFolder,
    out: Path,
    *,
    memo: HashMemo,
    dtype: torch.dtype | None = None,
    progress: Progress = silent,
) -> None:
    """Write the model in int8 into the folder `out`, which must be empty or not there yet.

    dtype: float32 or bfloat16 for tensors that are not quantised; None keeps their own.  Tensor by tensor,
    so no more than one is in memory.  `out` appears under its name when it is whole.  Raises ConfigError.
    """
    if folder.quantize != "none":
        raise ConfigError(f"{folder.path} is prepared already, in {folder.quantize}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already; name a folder that is empty or not there yet")
    if (packing := packing_of(folder)) is not None:
        raise ConfigError(f"{folder.path} is quantised already, in {packing}; a model in floats is needed")
    architecture = architecture_of(folder.config.get("model_type"))
    files = plan_files(folder.tensors, architecture, dtype)
    needed = sum(tensor.nbytes for made in files.values() for tensor in made.values())
    folder.need(files, progress)
    with disk_errors(out.absolute().parent):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        check_free_disk(out.absolute().parent, needed, out.name)
        part = part_name(out.absolute())
        try:
            part.mkdir()
            digests = _write(folder, files, part, needed, architecture, progress)
            part.replace(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    memo.remember({out / name: digest for name, digest in digests.items()})


def _write(
    folder: ModelFolder,
    files: Mapping[str, Mapping[str, Written]],
    part: Path,
    total: int,
    architecture: Architecture,
    progress: Progress,
) -> dict[str, str]:
    """Fill the new folder; SHA-256 of each file but the manifest.  Raises OSError, ConfigError."""
    digests: dict[str, str] = {}
    what, done = f"preparing {folder.name}", 0
    for file, made in sorted(files.items()):

        def written(count: int) -> None:
            nonlocal done
            done += count
            progress(what, done, total)

        tensors = _converted(folder, file, made, architecture)
        digests[file] = write_tensors(part / file, made, tensors, written)
    config = {**folder.config, QUANTIZE_KEY: "int8", SOURCE_KEY: folder.revision}
    write_atomically(part / CONFIG_FILE, _json(config))
    if len(files) > 1 or (folder.path / INDEX_FILE).is_file():
        weight_map = {name: file for file, made in sorted(files.items()) for name in made}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomically(part / INDEX_FILE, _json(index))
    for path in sorted(folder.path.iterdir()):
        if _is_small_file(path):
            shutil.copyfile(path, part / path.name)
    digests |= {path.name: sha256_of(path) for path in sorted(part.iterdir()) if path.name not in digests}
    listed = {
        name: {"sha256": digests[name], "size": (part / name).stat().st_size} for name in sorted(digests)
    }
    manifest = {
        "format": 1,
        "name": folder.name,
        "source": f"{folder.name} {folder.revision}",
        "files": listed,
    }
    write_atomically(part / MANIFEST_FILE, _json(manifest))
    return digests


def _is_small_file(path: Path) -> bool:
    """Tokenizer, generation config, licence: all files except weights and the files that we write."""
    return (
        path.is_file()
        and path.name not in _OURS
        and not path.name.startswith(".")
        and path.suffix not in _WEIGHTS
        and not path.name.endswith(".index.json")
    )


def _converted(
    folder: ModelFolder, file: str, made: Mapping[str, Written], architecture: Architecture
) -> Iterator[Tensor]:
    """The tensors of one new file, one after the other.  Raises ConfigError."""
    from safetensors import SafetensorError, safe_open

    scales: dict[str, Tensor] = {}
    path = folder.path / file
    try:
        with safe_open(path, framework="pt") as opened:
            for name, tensor in made.items():
                if tensor.scales:
                    yield scales.pop(tensor.source)
                    continue
                found: Tensor = opened.get_tensor(tensor.source)
                if tensor.matrix:
                    found = found.t() if architecture.model_type in TRANSPOSED else found
                    try:
                        found, scales[name] = quantize_rows(found)
                    except ValueError as error:
                        raise ConfigError(f"{path}: {name}: {error}") from None
                elif tensor.dtype in _FLOATS:
                    found = found.to(_FLOATS[tensor.dtype])
                yield found
    except SafetensorError as error:
        raise ConfigError(f"cannot read {path}: {error}") from None


def write_tensors(
    path: Path, made: Mapping[str, Written], tensors: Iterator[Tensor], written: Callable[[int], None]
) -> str:
    """Write one safetensors file; its SHA-256.  Raises OSError.

    written: called with the bytes of each tensor.
    """
    entries = {name: Entry(tensor.dtype, tensor.shape, tensor.nbytes) for name, tensor in made.items()}
    values = (each.contiguous().flatten().view(torch.uint8).numpy().data for each in tensors)
    return write_file(path, entries, values, metadata={"format": "pt"}, written=written)


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def size_of(path: Path) -> int:
    """Bytes of a folder's files."""
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
