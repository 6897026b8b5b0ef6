"""`python -m client adapters`: what is printed, what is refused, and all four commands over loopback."""

from __future__ import annotations

import argparse
import json
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

import client.__main__
from client.adapters.folder import load_adapter, new_adapter, save_adapter
from client.sharing.commands import (
    check_fits,
    lines_of,
    name_of,
    own_card,
    run_get,
    run_list,
    run_seed,
    run_show,
    table_of,
)
from node.config import ConfigError
from node.model.checkpoint.folder import ModelFolder
from node.model.checkpoint.source import resolve
from node.model.embed_and_head import EmbedAndHead, load_embed_and_head
from node.model.peft.cards import CARD_NAME, read_card
from node.network.directory.directory import DirectoryConfig, open_directory
from node.network.host import open_host
from node.network.transport.identity import identity_of, load_or_create_identity
from routing.names import PeerId
from routing.sharing.catalogue import Listed, SignedCard
from routing.view.records import Record
from tests.adapter_fixtures import content
from tests.model_fixtures import save_tiny, save_tiny_tokenizer
from tests.sharing_fixtures import LIMITS, signed

PEER = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWPW5W3xqXDotptBwKmqM7tXNMVgcCVykq5vGqmiP1rh9M"
OWN = content(2)


# What is printed


def test_the_list_has_a_line_for_each_adapter():
    found = [Listed(signed(OWN), (PeerId("a"), PeerId("b"))), Listed(signed(content(3), "a-longer-name"))]
    head, *lines = table_of(found)
    assert head.split() == ["adapter", "kind", "licence", "bytes", "seeders", "author", "model"]
    assert lines[0].split()[:5] == [f"story#{OWN.id[:16]}", "lora", "MIT", str(OWN.nbytes), "2"]
    assert lines[1].split()[0].startswith("a-longer-name#")
    assert table_of([]) == []


def test_all_of_a_card_is_shown_and_the_licence_has_its_line():
    lines = lines_of(Listed(signed(OWN, text="a text", tag="v1"), (PeerId("a"),)))
    assert "licence: MIT" in lines
    assert {"text: a text", "tag: v1", "ranks: 2", "sites: q_proj", "seeders: a"} <= set(lines)
    assert f"id: {OWN.id}" in lines


def test_a_text_does_nothing_to_a_terminal_even_if_a_card_had_come_in():
    evil = replace(signed(OWN).card, text="\x1b[2J\nlicence: MIT", model="\u202em")
    one = Listed(SignedCard(evil, b""))
    for line in (*lines_of(one), *table_of([one])):
        assert line.isprintable()
    assert len([line for line in lines_of(one) if line.startswith("licence")]) == 1


# What is refused


@pytest.fixture
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command leaves the logs and the signals of the tests alone."""
    for name in ("set_up_logging", "let_interrupts_through"):
        monkeypatch.setattr(f"client.sharing.arguments.{name}", lambda *_: None)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["list", "--peers", "/ip4/1.2.3.4"], "/ip4/1.2.3.4"),
        (["show", "a#1", "--peers", "nonsense"], "nonsense"),
        (["get", "a#1", "-o", "{full}", "--peers", PEER], "not an empty folder"),
        (["get", "a#1", "-o", "new", "--model", "{full}", "--peers", PEER], "config.json"),
        (["seed", "{full}", "--model", "{full}", "--peers", PEER], "config.json"),
    ],
)
def test_what_is_wrong_is_one_line(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], as_it_was: None
):
    (tmp_path / "file").touch()
    given = [word.replace("{full}", str(tmp_path)) for word in words]
    assert client.__main__.main(["adapters", *given]) == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error: ")]
    assert says in line


@pytest.mark.parametrize(
    "words", [[], ["steal"], ["list"], ["get", "a#1", "--peers", PEER], ["seed", "--peers", PEER]]
)
def test_a_command_needs_its_arguments(words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        client.__main__.main(["adapters", *words])
    assert "usage: python -m client adapters" in capsys.readouterr().err


def test_adapters_of_another_model_or_kind_are_not_fetched():
    folder: Any = argparse.Namespace(name="mine", revision="r")
    check_fits(signed(OWN).card, folder)
    with pytest.raises(ConfigError, match=r"for m \(revision other\), not for mine \(revision r\): --model"):
        check_fits(signed(OWN, revision="other").card, folder)
    with pytest.raises(ConfigError, match="kind head"):
        check_fits(signed(OWN, kind="head").card, folder)


# The card of a folder


def seed_flags(**given: str) -> argparse.Namespace:
    return argparse.Namespace(**{"name": "", "licence": "", "tag": "", "text": "", **given})


ANNA, BERT = identity_of(bytes(31) + b"\1"), identity_of(bytes(31) + b"\2")


def test_a_card_is_signed_once_and_kept_in_the_folder(tmp_path: Path):
    first = own_card(seed_flags(licence="MIT", text="t"), tmp_path, OWN, "m", ANNA, LIMITS)
    assert (first.card.name, first.card.author, first.card.text) == (tmp_path.name[:48], ANNA.peer_id, "t")
    assert read_card(tmp_path, LIMITS) == first
    assert own_card(seed_flags(), tmp_path, OWN, "m", BERT, LIMITS) == first  # seeded on: Anna's
    other = own_card(seed_flags(licence="0BSD", name="x"), tmp_path, OWN, "m", BERT, LIMITS)
    assert (other.card.author, other.card.licence, other.card.name) == (BERT.peer_id, "0BSD", "x")


@pytest.mark.parametrize(
    ("folder", "name"), [("my story", "my-story"), ("..a..", "a"), ("x" * 60, "x" * 48), ("é", "adapter")]
)
def test_a_folder_of_any_name_gives_a_name(folder: str, name: str, tmp_path: Path):
    assert name_of(tmp_path / folder) == name


def test_a_licence_is_needed_for_a_new_content(tmp_path: Path):
    with pytest.raises(ConfigError, match="--licence SPDX"):
        own_card(seed_flags(), tmp_path, OWN, "m", ANNA, LIMITS)
    own_card(seed_flags(licence="MIT", name="a"), tmp_path, content(3), "m", ANNA, LIMITS)
    with pytest.raises(ConfigError, match="no card of this content"):
        own_card(seed_flags(), tmp_path, OWN, "m", ANNA, LIMITS)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"licence": "free for all"}, "licence"),
        ({"licence": "MIT", "name": "../x"}, "name"),
        ({"licence": "MIT", "text": "a\nb"}, "text"),
        ({"licence": "MIT", "text": "x" * 201}, "text"),
    ],
)
def test_what_a_card_cannot_say_is_one_error(given: dict[str, str], says: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=says):
        own_card(seed_flags(**{"name": "a", **given}), tmp_path, OWN, "m", ANNA, LIMITS)
    assert not (tmp_path / CARD_NAME).exists()


# All four over loopback


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelFolder, EmbedAndHead]:
    path = tmp_path_factory.mktemp("model") / "llama"
    save_tiny("llama", path)
    save_tiny_tokenizer(path)
    folder = resolve(str(path), cache_dir=path)
    return folder, load_embed_and_head(folder)


@asynccontextmanager
async def server(revision: str, blocks: int) -> Any:
    """A node that announces a server of the model, as far as a directory knows.  Gives its address."""
    identity = load_or_create_identity(None)
    record = Record(
        role="serve", model="llama", revision=revision, blocks=blocks, start=0, stop=blocks, dtype="float32",
        seconds_per_block=0.001, prefill_seconds_per_token=0.0001,
    )  # fmt: skip
    async with (
        open_host(identity=identity, listen=["/ip4/127.0.0.1/tcp/0"], limits=LIMITS) as host,
        open_directory(host, identity, DirectoryConfig(swarm=host.swarm_id, role="serve")) as directory,
    ):
        await directory.announce(record)
        yield f"{host.addresses[0]}/p2p/{host.peer_id}"


def flags(command: str, peer: str, **given: object) -> argparse.Namespace:
    usual = {
        "command": command, "peers": [peer], "swarm_key": None, "json": False, "author": None,
        "max_disk": None,
    }  # fmt: skip
    return argparse.Namespace(**usual, **given)


async def test_an_adapter_goes_from_a_folder_through_a_seeder_into_a_folder(
    model: tuple[ModelFolder, EmbedAndHead],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    folder, ends = model
    adapter = new_adapter({"r": 2}, ends)
    save_adapter(adapter, tmp_path / "story")
    place = str(folder.path)

    def printed() -> str:
        return capsys.readouterr().out

    async with server(folder.revision, ends.modules.blocks) as peer, trio.open_nursery() as nursery:
        given = seed_flags(licence="CC0-1.0", text="a story")
        nursery.start_soon(
            run_seed,
            flags(
                "seed", peer, folder=tmp_path / "story", identity=None, listen=[], announce=[], model=place,
                **vars(given),
            ),
        )  # fmt: skip
        found: list[dict[str, Any]] = []
        with trio.fail_after(60):
            while not found:
                capsys.readouterr()
                await run_list(argparse.Namespace(**{**vars(flags("list", peer)), "json": True}))
                said = printed()
                found = json.loads(said[said.index("[") :])
        (one,) = found
        name = f"story#{adapter.id[:16]}"
        assert (one["full_name"], one["licence"], len(one["seeders"])) == (name, "CC0-1.0", 1)
        await run_list(flags("list", peer))
        assert name in printed()
        await run_show(flags("show", peer, adapter="story"))
        assert "licence: CC0-1.0" in printed().splitlines()
        with pytest.raises(ConfigError, match="no adapter stor is shared"):
            await run_show(flags("show", peer, adapter="stor"))
        await run_get(flags("get", peer, adapter=name, out=tmp_path / "got", model=place))
        captured = capsys.readouterr()
        assert f"{name} is in" in captured.out
        assert "licence: CC0-1.0" in captured.err.splitlines()
        nursery.cancel_scope.cancel()
    again = load_adapter(tmp_path / "got", ends)
    assert again.id == adapter.id
    card = read_card(tmp_path / "got", LIMITS)
    assert card == read_card(tmp_path / "story", LIMITS)
    assert card is not None
    assert card.card.text == "a story"
