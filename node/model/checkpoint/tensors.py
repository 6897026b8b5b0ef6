"""The tensors that a span, or embedding and head, need; only these are read from the files.

Tensors stay mapped from their files, so that loading costs no memory until a page is used, and
processes on one machine share the pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from node.config import ConfigError
from node.model.checkpoint.architecture import Architecture, architecture_of
from node.model.checkpoint.folder import ModelFolder, read_header
from node.model.checkpoint.progress import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor

_HEADS = (
    "lm_head.",
    "embed_out.",
    "score.",
)  # the second in checkpoints of gpt_neox, the third in those of classifiers


def check_blocks(start: int, stop: int, blocks: int) -> None:
    """Raises ConfigError for a span [start, stop) that the model does not have."""
    if not 0 <= start < stop <= blocks:
        raise ConfigError(f"blocks {start}:{stop} are not within 0:{blocks}")


def block_tensors(folder: ModelFolder, start: int, stop: int) -> dict[str, str]:
    """Checkpoint name -> name in a base model that keeps only the blocks [start, stop).

    Raises ConfigError for a block without tensors in the checkpoint.
    """
    architecture = architecture_of(folder.config.get("model_type"))
    names: dict[str, str] = {}
    found = set()
    for tensor in folder.tensors:
        place = architecture.block_of(tensor)
        if place is not None and start <= place[0] < stop:
            found.add(place[0])
            names[tensor] = architecture.block_tensor(place[0] - start, place[1])
    missing = [block for block in range(start, stop) if block not in found]
    if missing:
        raise ConfigError(f"{folder.path} has no tensor of block {missing[0]}")
    return names


def end_tensors(folder: ModelFolder, architecture: Architecture) -> dict[str, str]:
    """Checkpoint name -> name in the whole model, for each tensor outside blocks.

    A head of the checkpoint is among them even if the config ties it to the embedding: the library uses the
    head where the two differ.
    """
    names = {}
    for tensor in folder.tensors:
        if architecture.block_of(tensor) is not None:
            continue
        if tensor.startswith(_HEADS):
            names[tensor] = tensor
        else:
            bare = tensor.removeprefix(f"{architecture.prefix}.")
            names[tensor] = f"{architecture.prefix}.{bare}"
    return names


def load_tensors(
    folder: ModelFolder, names: Mapping[str, str], progress: Progress = silent
) -> dict[str, Tensor]:
    """These tensors of the checkpoint, mapped from their files, under their new names.

    Fetches missing files first.  Raises ConfigError that names the fault.
    """
    from safetensors import SafetensorError, safe_open

    by_file: dict[str, list[str]] = {}
    for tensor in names:
        by_file.setdefault(folder.tensors[tensor].file, []).append(tensor)
    folder.need(by_file, progress)
    loaded: dict[str, Tensor] = {}
    for file, tensors in sorted(by_file.items()):
        path = folder.path / file
        header = read_header(path)  # once more: the file may have come, or changed, since
        for tensor in tensors:
            if header.get(tensor) != folder.tensors[tensor]:
                raise ConfigError(f"{path} no longer holds tensor {tensor} as its model describes it")
        try:
            with safe_open(path, framework="pt") as opened:
                for tensor in tensors:
                    loaded[names[tensor]] = opened.get_tensor(tensor)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from None
    return loaded


def check_loaded(
    folder: ModelFolder,
    what: str,
    *,
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[tuple[str, object, object]],
) -> None:
    """Refuse missing tensors: the library would fill them at random.  Raises ConfigError for the first."""
    for name, found, allowed in sorted(mismatched, key=lambda fault: fault[0]):
        raise ConfigError(
            f"{folder.path}: tensor {name} of {what} has the shape {_shape(found)}, "
            f"the config asks for {_shape(allowed)}"
        )
    for name in sorted(missing):
        raise ConfigError(f"{folder.path}: tensor {name} of {what} is missing")
    for name in sorted(unexpected):
        raise ConfigError(f"{folder.path}: tensor {name} of {what} has no place in the model")


def _shape(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, Iterable) else str(value)
