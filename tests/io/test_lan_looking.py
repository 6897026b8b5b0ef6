"""A client finds the nodes of its local network by --lan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

import client.__main__
import client.gateway.arguments
import client.sharing.arguments
import node.__main__
from node.config import ConfigError
from node.network.lan import looking
from node.network.lan.announcement import write_announcement
from node.network.lan.looking import MAX_PEERS, find_peers
from node.network.lan.multicast import LanError
from node.network.transport.identity import identity_of
from tests.fakes import ALICE, BOB

HOSTS = ("192.168.1.13",)
HOME = "/ip4/192.168.1.11/tcp/31330"
NEXT_DOOR = "/ip4/192.168.1.12/tcp/31330"


class FakeMulticast:
    """A local network in which these texts are heard at once.  fault: why nothing can be heard."""

    def __init__(self, texts: Sequence[bytes] = (), fault: str | None = None) -> None:
        self.texts = texts
        self.fault = fault
        self.closed = 0

    def open(self, hosts: Sequence[str], heard: Callable[[bytes], None]) -> None:
        assert hosts == HOSTS
        if self.fault is not None:
            raise LanError(self.fault)
        for text in self.texts:
            heard(text)

    def announce(self, hosts: Sequence[str], port: int, text: bytes) -> None:
        raise AssertionError("a client is not announced")

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(looking, "MORE_SECONDS", 0.0)


def find(room: FakeMulticast) -> tuple[str, ...]:
    try:
        return find_peers(None, lambda: HOSTS, lambda: room)
    finally:
        assert room.closed == 1


def test_the_nodes_of_the_swarm_are_found_and_no_other_program_s():
    room = FakeMulticast(
        [
            b"nonsense",
            write_announcement(ALICE.peer_id, "0123456789abcdef0123456789abcdef", [HOME]),
            write_announcement(ALICE.peer_id, "public", [HOME]),
            write_announcement(BOB.peer_id, "public", [NEXT_DOOR]),
            write_announcement(ALICE.peer_id, "public", [HOME]),
        ]
    )
    assert find(room) == (f"{HOME}/p2p/{ALICE.peer_id}", f"{NEXT_DOOR}/p2p/{BOB.peer_id}")


def test_a_flood_of_names_gives_a_few_peers():
    ids = [identity_of(number.to_bytes(32, "big")).peer_id for number in range(1, 100)]
    assert len(find(FakeMulticast([write_announcement(peer, "public", [HOME]) for peer in ids]))) == MAX_PEERS


@pytest.mark.parametrize(
    ("room", "line"),
    [
        (FakeMulticast(), r"no node of the swarm 'public' answers in the local network \(192\.168\.1\.13\)"),
        (FakeMulticast(fault="no multicast here"), "--lan finds nobody: no multicast here"),
    ],
)
def test_nobody_is_found_in_one_line(room: FakeMulticast, line: str):
    with pytest.raises(ConfigError, match=line):
        find(room)


def test_a_machine_without_a_network_looks_nowhere():
    with pytest.raises(ConfigError, match="no private network"):
        find_peers(None, tuple, lambda: FakeMulticast(fault="not asked"))


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (client.__main__, ["generate", "hello"]),
        (client.__main__, ["adapters", "list"]),
        (client.__main__, ["gateway"]),
        (node.__main__, ["status"]),
    ],
    ids=str,
)
def test_each_command_of_a_client_needs_peers_or_lan_and_with_lan_it_looks(
    program, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    asked = []

    def nobody(swarm_key: object) -> tuple[str, ...]:
        asked.append(swarm_key)
        raise ConfigError("nobody answers here")

    monkeypatch.setattr(looking, "find_peers", nobody)
    for module in (client.__main__, client.gateway.arguments, client.sharing.arguments, node.__main__):
        monkeypatch.setattr(module, "set_up_logging", lambda *_arguments: None)  # of this whole process
    with pytest.raises(SystemExit) as ended:
        program.main(words)
    assert ended.value.code == 2
    assert "one of the arguments --peers --lan is required" in capsys.readouterr().err
    assert program.main([*words, "--lan"]) == 2
    assert capsys.readouterr().err.strip().endswith("nobody answers here")
    assert asked == [None]
