"""What `python -m client adapters` does: lists, shows and fetches shared adapters, and gives one's own."""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import trio

from client.sharing.catalogue import Sharing
from client.sharing.connection import open_sharing
from client.sharing.fetch import fetch
from client.sharing.folder import check_new_folder, read_shareable, write_shared
from node.config import DEFAULT_LISTEN, ConfigError, NetworkConfig
from node.model.checkpoint.folder import ModelFolder
from node.model.checkpoint.progress import progress_bar
from node.model.checkpoint.source import cache_dir, resolve
from node.model.peft.cards import facts_of, read_card, write_card
from node.model.peft.content import blob_sizes
from node.model.peft.modules import ModelModules, model_modules
from node.network.sharing.announcing import keep_announced, keys_of
from node.network.sharing.seeder import Seeder
from node.network.sharing.seeds import Seed, Seeds
from node.network.transport.identity import Identity, load_or_create_identity
from node.runtime.console import one_line, put_line, say
from routing.sharing.cards import MAX_NAME, Card, card_of, sign_card
from routing.sharing.catalogue import Listed, SignedCard, chosen
from tensor_codec.adapters import AdapterContent
from tensor_codec.limits import Limits
from tensor_codec.messages.adapter import ADAPTER_PROTOCOL

IN_BLOCKS = ("lora", "prefix")  # the kinds of adapters whose content is fetched


async def run_list(flags: argparse.Namespace) -> None:
    """Print the shared adapters.  Raises ConfigError."""
    async with open_sharing(_config(flags)) as joined:
        found = await all_shared(joined.sharing)
    if flags.json:
        put_line(json.dumps([_facts(each) for each in found], indent=2))
        return
    for line in table_of(found):
        put_line(line)
    if not found:
        say("no adapter is shared in this swarm now")


async def run_show(flags: argparse.Namespace) -> None:
    """Print all that the card of an adapter says.  Raises ConfigError."""
    async with open_sharing(_config(flags)) as joined:
        one = await named(joined.sharing, flags.adapter, flags.author)
    if flags.json:
        put_line(json.dumps(_facts(one), indent=2))
        return
    for line in lines_of(one):
        put_line(line)


async def run_get(flags: argparse.Namespace) -> None:
    """Fetch an adapter into a folder.  Raises ConfigError, PeerGone."""
    out: Path = flags.out
    check_new_folder(out)
    folder, modules = await trio.to_thread.run_sync(
        _model, flags.model, flags.max_disk, abandon_on_cancel=True
    )
    async with open_sharing(_config(flags)) as joined:
        one = await named(joined.sharing, flags.adapter, flags.author)
        check_fits(one.card, folder)
        for line in lines_of(one):
            say(line)
        content = await fetch(joined.sharing, one, partial(blob_sizes, model=modules))
    write = partial(write_shared, out, content, one.signed, modules, folder.name)
    await trio.to_thread.run_sync(write)
    put_line(f"{one.card.full_name} is in {out}: {content.nbytes} bytes, licence {one.card.licence}")


async def run_seed(flags: argparse.Namespace) -> None:
    """Give the adapter of a folder to others until the program is ended.  Raises ConfigError."""
    path: Path = flags.folder
    folder, modules = await trio.to_thread.run_sync(
        _model, flags.model, flags.max_disk, abandon_on_cancel=True
    )
    content = await trio.to_thread.run_sync(read_shareable, path, modules)
    config, limits = _config(flags), Limits()
    identity = load_or_create_identity(flags.identity)
    signed = own_card(flags, path, content, folder.name, identity, limits)
    seeds = Seeds([Seed.of(signed.card, signed.wire, content.manifest, content.blobs)])
    async with open_sharing(config) as joined:
        joined.host.handle(ADAPTER_PROTOCOL, Seeder(seeds, limits).serve)
        card = signed.card
        put_line(
            f"{card.full_name} by {card.author}, licence {card.licence}, is given by {joined.host.peer_id}"
        )
        put_line(
            f"others fetch it with: python -m client adapters get {card.full_name} -o FOLDER --peers ..."
        )
        if (table := joined.sharing.table) is None:
            raise ConfigError("without a Kademlia table nobody would find the adapter")
        await keep_announced(table, keys_of(seeds, joined.host.swarm_id), random.Random())


async def all_shared(sharing: Sharing) -> list[Listed]:
    """The shared adapters of all models that the swarm serves."""
    found: dict[str, list[Listed]] = {}

    async def look(revision: str) -> None:
        found[revision] = await sharing.catalogue(revision)

    async with trio.open_nursery() as nursery:
        for revision in sharing.revisions():
            nursery.start_soon(look, revision)
    return [each for revision in sorted(found) for each in found[revision]]


async def named(sharing: Sharing, wanted: str, author: str | None) -> Listed:
    """The shared adapter of this name.  Raises ConfigError that lists the candidates."""
    try:
        return chosen(await all_shared(sharing), wanted, author)
    except (LookupError, ValueError) as error:
        raise ConfigError(str(error.args[0])) from None


def own_card(
    flags: argparse.Namespace,
    path: Path,
    content: AdapterContent,
    model: str,
    identity: Identity,
    limits: Limits,
) -> SignedCard:
    """The card in the folder, where it is of this content and no flag says otherwise; else a new one.

    A new card stays in the folder.  Raises ConfigError.
    """
    old = read_card(path, limits)
    given = {name: value for name in ("name", "licence", "tag", "text") if (value := getattr(flags, name))}
    if old is not None and old.card.id == content.id and not given:
        return old
    if "licence" not in given:
        raise ConfigError(
            f"{path} has no card of this content: --licence SPDX says what others may do with it, for"
            " instance Apache-2.0"
        )
    chosen_name = given.pop("name", "") or name_of(path)
    try:
        card = card_of(content.manifest, content.id, content.nbytes, name=chosen_name, model=model, **given)
        wire = sign_card(card, identity.private_key, limits)
    except ValueError as error:
        raise ConfigError(f"the card of {path}: {error}") from None
    signed = SignedCard(replace(card, author=identity.peer_id), wire)
    write_card(path, signed)
    return signed


def name_of(path: Path) -> str:
    """A name for a card, out of the folder's."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name)[:MAX_NAME].strip("-._") or "adapter"


def check_fits(card: Card, folder: ModelFolder) -> None:
    """Raise ConfigError for an adapter of another model, or of a kind that is not fetched."""
    if card.kind not in IN_BLOCKS:
        raise ConfigError(f"{card.full_name} is of kind {card.kind}, {' or '.join(IN_BLOCKS)} is fetched")
    if card.revision != folder.revision:
        raise ConfigError(
            f"{card.full_name} is for {one_line(card.model)} (revision {card.revision}), not for"
            f" {folder.name} (revision {folder.revision}): --model names its model"
        )


def table_of(found: Sequence[Listed]) -> list[str]:
    """Shared adapters for people: a line of headings, and a line for each."""
    rows = [("adapter", "kind", "licence", "bytes", "seeders", "author", "model")]
    rows += [
        (
            each.card.full_name,
            each.card.kind,
            each.card.licence,
            str(each.card.size),
            str(len(each.seeders)),
            str(each.card.author),
            one_line(each.card.model),
        )
        for each in found
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [line.rstrip() for line in lines] if found else []


def lines_of(one: Listed) -> list[str]:
    """A shared adapter for people; the licence has a line of its own."""
    card = one.card
    said = {
        "adapter": card.full_name,
        "id": card.id,
        "licence": card.licence,
        "author": card.author,
        "kind": card.kind,
        "tag": card.tag,
        "model": card.model,
        "revision": card.revision,
        "bytes": card.size,
        "ranks": ", ".join(map(str, card.ranks)),
        "sites": ", ".join(card.sites),
        "text": card.text,
        "seeders": ", ".join(one.seeders),
    }
    return [f"{name}: {one_line(str(value))}" for name, value in said.items() if value != ""]


def _facts(one: Listed) -> dict[str, Any]:  # Any: JSON
    return {**facts_of(one.card), "seeders": list(one.seeders)}


def _config(flags: argparse.Namespace) -> NetworkConfig:
    return NetworkConfig(
        peers=tuple(flags.peers),
        swarm_key=flags.swarm_key,
        identity=getattr(flags, "identity", None),
        listen=(tuple(flags.listen) or (DEFAULT_LISTEN,)) if flags.command == "seed" else (),
        announce=tuple(getattr(flags, "announce", ())),
    )


def _model(model: str | None, max_disk_bytes: int | None = None) -> tuple[ModelFolder, ModelModules]:
    """A model's folder, and the shapes of its modules.  Raises ConfigError."""
    with progress_bar(sys.stderr) as progress:
        folder = resolve(model, cache_dir=cache_dir(), progress=progress, max_disk_bytes=max_disk_bytes)
    return folder, model_modules(folder)
