"""`--require-reach`: a node that nobody reaches ends with one line; one that nobody can judge goes on."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from node.__main__ import main
from node.config import ConfigError, NetworkConfig
from node.main import (
    REACH_SECONDS,
    UNREACHED_SECONDS,
    Node,
    Stopping,
    check_reach,
    keep_telling,
    leave_unreached,
)
from node.network.reachability.own_reach import OwnReach
from routing.names import PeerId

LINE = "not reachable at 203.0.113.7:31330 (3 peers: timed out)"


class Reach:
    """A watch that knows this after `seconds`."""

    summary = LINE

    def __init__(self, own: OwnReach, seconds: float = 0.0) -> None:
        self.own, self.seconds = own, seconds
        self.news = trio.Event()

    async def changed(self) -> None:
        await self.news.wait()

    def learn(self, own: OwnReach) -> None:
        self.own = own
        self.news.set()
        self.news = trio.Event()

    async def lost(self, seconds: float) -> None:
        await trio.sleep(self.seconds + seconds)

    async def known(self, seconds: float) -> OwnReach:
        await trio.sleep(min(self.seconds, seconds))
        return self.own


def node(reach: Reach, *, required: bool = True) -> Node:
    nothing = cast(Any, None)
    return Node(NetworkConfig(require_reach=required), nothing, nothing, nothing, cast(Any, reach))


async def test_a_node_that_nobody_reaches_ends_with_the_line_of_its_log(autojump_clock: object) -> None:
    began = trio.current_time()
    with pytest.raises(ConfigError) as error:
        await check_reach(node(Reach(OwnReach("none", ()), seconds=1e9)))
    assert str(error.value) == LINE
    assert trio.current_time() - began == REACH_SECONDS


@pytest.mark.parametrize(
    "reach", [OwnReach("public", ("/ip4/203.0.113.7/tcp/1",)), OwnReach("relayed", (), (PeerId("r"),))]
)
async def test_a_node_that_is_reached_or_relayed_goes_on_at_once(
    autojump_clock: object, reach: OwnReach
) -> None:
    began = trio.current_time()
    await check_reach(node(Reach(reach)))
    assert trio.current_time() == began


async def test_a_node_of_which_nothing_is_known_goes_on_and_says_so(
    autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    await check_reach(node(Reach(OwnReach("unknown", ()))))
    assert [(each.levelno, LINE in each.getMessage()) for each in caplog.records] == [(logging.WARNING, True)]


async def test_a_node_that_loses_its_reach_leaves_after_a_minute(autojump_clock: object) -> None:
    stopping = Stopping(trio.Event(), trio.CancelScope())
    began = trio.current_time()
    await leave_unreached(node(Reach(OwnReach("none", ()), seconds=100.0), required=False), stopping)
    assert not stopping.requested.is_set()
    await leave_unreached(node(Reach(OwnReach("none", ()), seconds=100.0)), stopping)
    assert trio.current_time() - began == 100.0 + UNREACHED_SECONDS
    assert stopping.requested.is_set()
    with pytest.raises(ConfigError, match=re.escape(LINE)):
        stopping.check()


def test_others_are_told_to_join_where_they_can() -> None:
    host = SimpleNamespace(addresses=("/ip4/192.168.1.11/tcp/1",), peer_id="me")
    boot = "/ip4/203.0.113.1/tcp/1/p2p/boot"
    verified = "/ip4/203.0.113.7/tcp/1"
    for own, peers, found in (
        (OwnReach("public", (verified,)), (boot,), f"{verified}/p2p/me"),
        (OwnReach("relayed", (), (PeerId("r"),)), (boot,), boot),
        (OwnReach("none", ()), (), f"{host.addresses[0]}/p2p/me"),
        (OwnReach("unknown", host.addresses), (boot,), f"{host.addresses[0]}/p2p/me"),
    ):
        config = NetworkConfig(peers=peers)
        made = Node(config, cast(Any, host), cast(Any, None), cast(Any, None), cast(Any, Reach(own)))
        assert made.joining_address == found


async def test_the_address_for_others_is_said_again_when_peers_have_found_the_right_one(
    autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "raceme")
    private, public = "/ip4/192.168.1.11/tcp/1", "/ip4/203.0.113.7/tcp/1"
    host = SimpleNamespace(addresses=(private,), peer_id="me")
    reach = Reach(OwnReach("unknown", (private,)))
    made = Node(NetworkConfig(), cast(Any, host), cast(Any, None), cast(Any, None), cast(Any, reach))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_telling, made)
        for own in (OwnReach("unknown", (private,)), *2 * [OwnReach("public", (public,))]):
            await trio.sleep(1)
            reach.learn(own)
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert caplog.messages == [f"others join with: --peers {public}/p2p/me"]


async def test_without_the_flag_nobody_waits(autojump_clock: object) -> None:
    await check_reach(node(Reach(OwnReach("none", ()), seconds=1e9), required=False))


@pytest.mark.parametrize("command", [[], ["bootstrap"]])
def test_the_flag_is_the_network_s(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[NetworkConfig] = []

    async def take(config: Any) -> None:
        await trio.lowlevel.checkpoint()
        seen.append(getattr(config, "network", config))

    monkeypatch.setattr("node.main.serve", take)
    monkeypatch.setattr("node.main.run_bootstrap", take)
    assert main([*command, "--require-reach"]) == 0
    assert main(command) == 0
    assert [each.require_reach for each in seen] == [True, False]
