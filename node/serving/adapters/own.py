"""The adapters that an operator keeps for everybody: `--adapter`, a folder of peft or a name of the hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from node.config import ConfigError
from node.model.checkpoint.folder import ModelFolder
from node.model.checkpoint.hub import Hub
from node.model.peft.cards import read_card
from node.model.peft.folder import adapter_folder, read_adapter
from node.model.peft.modules import ModelModules, model_modules
from node.serving.adapters.desk import OwnAdapter
from node.serving.adapters.store import SHORT_ID
from tensor_codec.adapters import AdapterContent, blob_bytes, decode_manifest, encode_manifest
from tensor_codec.errors import MessageError
from tensor_codec.limits import Limits

log = logging.getLogger("raceme")

MAX_OWN = 4  # names and digits of four take 180 of a record's 1024 bytes, beside eight round-trip times
MAX_NAME = 28  # characters, for the same reason


def own_adapters(
    named: Sequence[str], model: ModelFolder, limits: Limits, hub: Hub | None = None
) -> list[OwnAdapter]:
    """Read the adapters for a model: LoRA inside its blocks, within the limits of guests' adapters.

    Runs in the torch thread.  Raises ConfigError.
    """
    if len(named) > MAX_OWN:
        raise ConfigError(f"{len(named)} times --adapter, {MAX_OWN} are allowed: a record names no more")
    if not named:
        return []
    modules = model_modules(model)
    found = [_read(each, modules, limits, hub) for each in named]
    names = [own.name for own in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two adapters have the name {twice}: clients know an adapter by its folder's name")
    return found


def name_of(named: str) -> str:
    """The name in records: the end of a path or of a hub's name, in letters that need no quotes.

    Raises ConfigError where nothing is left.
    """
    path = Path(named)
    last = path.name if path.name not in ("", "..", "~") else path.expanduser().resolve().name
    end = re.sub(r"[^A-Za-z0-9._-]+", "-", last)[:MAX_NAME].strip("-.")
    if not end:
        raise ConfigError(f"--adapter {named} has no name: its folder's name needs letters or digits")
    return end


def _read(named: str, modules: ModelModules, limits: Limits, hub: Hub | None) -> OwnAdapter:
    folder = adapter_folder(named, hub=hub)
    adapter = read_adapter(folder, modules)
    name, signed = name_of(named), read_card(folder, limits)
    if adapter.is_at_ends or not adapter.is_in_blocks:
        raise ConfigError(
            f"--adapter {named} has parts outside of the blocks, which a client computes: clients bring it"
        )
    try:
        content = adapter.content()
        _check(content, modules, limits)
    except (ValueError, MessageError) as error:
        raise ConfigError(f"--adapter {named}: {error}") from None
    log.info("adapter %s#%s for everybody: %d bytes", name, content.id[:SHORT_ID], content.nbytes)
    card = signed.wire if signed is not None and signed.card.id == content.id else b""
    return OwnAdapter(name, content.id, content.manifest, content.blobs, card)


def _check(content: AdapterContent, modules: ModelModules, limits: Limits) -> None:
    """What a client's adapter must fulfil too.  Raises ValueError, MessageError."""
    manifest = decode_manifest(encode_manifest(content.manifest), limits)
    if manifest.kind != "lora":
        raise ValueError(f"it is of kind {manifest.kind}, servers compute lora")
    for sites, shapes in zip(manifest.blocks, modules.shapes, strict=True):
        blob_bytes(sites, shapes, manifest.dtype)
