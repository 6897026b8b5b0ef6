"""The adapters that an operator keeps for everybody: `--adapter`, a folder of peft or a name of the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from node.config import ConfigError
from node.model.checkpoint.folder import ModelFolder
from node.model.checkpoint.hub import Hub, Unreachable
from node.model.checkpoint.source import HUB_NAME
from node.model.peft.folder import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from node.model.peft.modules import model_modules
from node.serving.adapters.desk import OwnAdapter

MAX_OWN = 4  # that a record has room for
MAX_NAME = 28  # characters, so that a record still has its round-trip times


def own_adapters(named: Sequence[str], model: ModelFolder, hub: Hub | None = None) -> list[OwnAdapter]:
    """Read the adapters for a model.  Runs in the torch thread.  Raises ConfigError."""
    if len(named) > MAX_OWN:
        raise ConfigError(f"{len(named)} adapters, a node announces {MAX_OWN} at most")
    if not named:
        return []
    modules, found = model_modules(model), list[OwnAdapter]()
    for each in named:
        path = _folder(each, hub or Hub())
        adapter = read_adapter(path, modules)
        if adapter.is_at_ends or not adapter.is_in_blocks:
            raise ConfigError(
                f"--adapter {each} has parts outside of the blocks, which a client computes: clients bring it"
            )
        content = adapter.content()
        if content.manifest.kind != "lora":
            raise ConfigError(f"--adapter {each} is of kind {content.manifest.kind}, servers compute lora")
        found.append(OwnAdapter(name_of(each), content.id, content.manifest, content.blobs))
    if len({own.name for own in found}) < len(found):
        raise ConfigError(f"two of the adapters have one name: {', '.join(own.name for own in found)}")
    return found


def name_of(named: str) -> str:
    """The name in records: the end of a path or of a hub's name, in letters that need no quotes."""
    end = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(named).name)[:MAX_NAME].strip("-.")
    if not end:
        raise ConfigError(f"--adapter {named} has no name: give its folder one with letters or digits")
    return end


def _folder(named: str, hub: Hub) -> Path:
    """The folder of an adapter; one of the hub is fetched.  Raises ConfigError."""
    path = Path(named).expanduser()
    if path.is_dir():
        return path
    if not HUB_NAME.fullmatch(named):
        raise ConfigError(f"--adapter {named} is neither a folder nor a name of the hub (org/name)")
    try:
        return hub.files(named, (CONFIG_NAME, WEIGHTS_NAME))
    except Unreachable as error:
        raise ConfigError(f"--adapter {named} cannot be fetched from the hub: {error}") from None
