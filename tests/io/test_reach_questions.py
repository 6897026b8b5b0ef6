"""What a host's connections say to the questions of reach, over loopback."""

from __future__ import annotations

from node.network.host import open_host
from node.network.reachability.asking import Questions
from node.network.transport.identity import load_or_create_identity
from tensor_codec.limits import Limits

LISTEN = ["/ip4/127.0.0.1/tcp/0"]


async def test_a_peer_that_dialled_the_listener_does_not_count_as_met_from_its_port() -> None:
    async with (
        open_host(identity=load_or_create_identity(None), listen=LISTEN) as relay,
        open_host(identity=load_or_create_identity(None), listen=LISTEN) as home,
    ):
        await home.dialler.connect_to_relay(relay.peer_id, relay.addresses)
        await relay.dialler.connect(home.peer_id, home.addresses, 5.0)
        assert Questions(home, Limits()).met_from_own_port(relay.peer_id)
        assert not Questions(relay, Limits()).met_from_own_port(home.peer_id)
