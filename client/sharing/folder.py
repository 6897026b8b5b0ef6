"""Shared adapters in folders: those of peft, with the author's card beside the files."""

from __future__ import annotations

from pathlib import Path

from node.config import ConfigError
from node.model.peft.cards import write_card
from node.model.peft.content import tensors_of
from node.model.peft.folder import read_adapter, write_adapter
from node.model.peft.modules import ModelModules
from node.runtime.files import check_free_disk
from routing.sharing.catalogue import SignedCard
from tensor_codec.adapters import AdapterContent


def read_shareable(path: Path, modules: ModelModules) -> AdapterContent:
    """The content of a folder that can be shared whole.  Raises ConfigError."""
    found = read_adapter(path, modules)
    if found.is_at_ends or not found.is_in_blocks:
        raise ConfigError(
            f"{path} has parts outside of the blocks (a prompt, embedding or head), which are not shared yet"
        )
    try:
        return found.content()
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def check_new_folder(path: Path) -> None:
    """Raise ConfigError unless the folder is empty or not there: nothing is written over."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} exists and is not an empty folder")


def write_shared(
    path: Path, content: AdapterContent, signed: SignedCard, modules: ModelModules, model: str
) -> None:
    """Write a fetched adapter as a folder of peft, with its card.

    The names of all files are ours.  model: its name, for the config.  Raises ConfigError; then there may be
    a folder without a card.
    """
    tensors = tensors_of(content, modules, model)
    check_free_disk(path, 2 * content.nbytes, "the adapter")
    write_adapter(tensors, path)
    found = read_adapter(path, modules).content().id
    if found != signed.card.id:
        raise ConfigError(f"{path} holds {found} and not {signed.card.id}: no folder of peft has the same")
    write_card(path, signed)
