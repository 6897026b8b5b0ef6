"""Two real hosts on loopback, and strangers made of py-libp2p alone."""

import contextlib
import gc
import os
import random
import socket
import struct
import time
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.host.exceptions import StreamFailure
from libp2p.host.ping import ID as LIBP2P_PING
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.kad_dht.common import PROTOCOL_ID as KADEMLIA
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as StockNoise
from multiaddr import Multiaddr

from node.config import ConfigError
from node.network.directory.kademlia.kademlia import PROTOCOL, Knowledge, open_kademlia
from node.network.host import PING_PROTOCOL, open_host
from node.network.streams import FramedStream
from node.network.transport.connection import Connection
from node.network.transport.identity import load_or_create_identity
from node.network.transport.link import SocketLink
from node.network.transport.noise import PRIVATE_PROTOCOL
from node.network.transport.upgrade import Upgrade
from node.network.transport.yamux import HEADER as YAMUX_HEADER
from node.network.transport.yamux import SYN, WINDOW_UPDATE
from node.network.transport.yamux_limits import YamuxError
from tensor_codec.errors import BadResult, MessageError, NotAMember, PeerGone, RemoteProtocolError, SlowPeer
from tensor_codec.limits import Limits

ECHO = "/raceme/test-echo/1"
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
KEY, OTHER_KEY = b"k" * 32, b"o" * 32
PATIENT_SECONDS = 30.0  # on a busy machine, for what comes at once
LATE = Limits(  # deadlines after that: what happens before has another reason
    dial_seconds=90.0, handshake_seconds=90.0, negotiation_seconds=90.0, libp2p_stream_seconds=90.0
)


async def echo(stream):
    while (frame := await stream.receive()) is not None:
        await stream.send(frame)


@asynccontextmanager
async def host(swarm_key=None, listen=(LOOPBACK,), **options):
    identity = load_or_create_identity(None)
    async with open_host(identity=identity, listen=listen, swarm_key=swarm_key, **options) as opened:
        opened.handle(ECHO, echo)
        yield opened


def stock_host(**options):
    """py-libp2p as a stranger has it: TCP, Noise, its own yamux."""
    key_pair = create_new_key_pair()
    noise = StockNoise(key_pair, noise_privkey=create_noise_key_pair().private_key)
    return new_host(key_pair=key_pair, sec_opt={NOISE: noise}, **options)


@pytest.fixture(autouse=True)
def _quick_dials_of_the_stranger(monkeypatch):
    monkeypatch.setattr("libp2p.network.swarm._HAPPY_EYEBALLS_DELAY", 0.0)


def info(ours):
    return PeerInfo(ID.from_base58(ours.peer_id), [Multiaddr(address) for address in ours.addresses])


async def eventually(condition):
    with trio.fail_after(PATIENT_SECONDS):
        while not condition():  # noqa: ASYNC110  # what is waited for happens behind a socket
            await trio.sleep(0.01)


async def disconnect(host, peer):
    for connection in host.connections.of(peer):
        await connection.close()


# --- between members ---


@pytest.mark.parametrize("key", [None, KEY])
async def test_frames_go_there_and_back(key):
    async with host(key) as alice, host(key) as bob:
        stream = await alice.open_stream(bob.peer_id, bob.addresses, ECHO, seconds=PATIENT_SECONDS)
        for size in (0, 1, 70_000, 3_000_000):
            await stream.send(bytes(size))
            assert await stream.receive(PATIENT_SECONDS) == bytes(size)
        assert stream.peer == bob.peer_id
        assert alice.traffic.sent == alice.traffic.received == bob.traffic.received == 3_070_001
        assert alice.connected() == {bob.peer_id}
        assert bob.connected() == {alice.peer_id}
        assert alice.swarm_id == bob.swarm_id
        await stream.aclose()
        assert not alice.faults.counts()
        assert not bob.faults.counts()


async def test_a_dial_takes_no_longer_than_its_round_trips():
    async with host() as alice, host() as bob:
        for _ in range(20):  # on a busy machine most may be late
            started = time.perf_counter()
            await alice.connect(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS)
            if time.perf_counter() - started < 0.15:  # py-libp2p's own dial waits 250 ms after it succeeded
                return
            await disconnect(alice, bob.peer_id)
            await eventually(lambda: not bob.connected())
        raise AssertionError("no dial took less")


async def test_a_ping_is_measured_in_microseconds():
    async with host() as alice, host() as bob:
        seconds = min([await alice.ping(bob.peer_id, bob.addresses) for _ in range(10)])
        assert 1e-5 < seconds < 0.5


async def test_every_address_is_tried_and_a_peer_that_failed_once_is_dialled_again():
    async with host() as alice, host() as bob:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            dead = f"/ip4/127.0.0.1/tcp/{nobody.getsockname()[1]}"
            with pytest.raises(PeerGone, match=r"cannot be reached: .* refused; nonsense: 'nonsense' is"):
                await alice.connect(bob.peer_id, [dead, "nonsense"], seconds=PATIENT_SECONDS)
            await alice.connect(bob.peer_id, [dead, *bob.addresses], seconds=PATIENT_SECONDS)
        assert alice.connected() == {bob.peer_id}


async def test_addresses_that_answer_nothing_hide_nobody():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dead = [
            f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}",
            f"/dns/localhost/tcp/{silent.getsockname()[1]}",
        ]
        async with host() as alice, host() as bob, host(KEY) as member_of_another:
            alice.configure_peers([*dead, *member_of_another.addresses])  # no pause after a failed dial
            addresses = [*dead, *member_of_another.addresses, *bob.addresses]
            await alice.connect(bob.peer_id, addresses, seconds=PATIENT_SECONDS)
            assert alice.connected() == {bob.peer_id}
            await eventually(lambda: len(bob.connections) == 1)
            carol = load_or_create_identity(None).peer_id
            with pytest.raises(NotAMember, match="belongs to a private swarm"):
                await alice.connect(
                    carol, [*member_of_another.addresses, *bob.addresses], seconds=PATIENT_SECONDS
                )
            with pytest.raises(SlowPeer, match=rf"within 0\.1 s: not a word from {dead[0]}"):
                await alice.connect(carol, dead, seconds=0.1)


async def test_all_addresses_together_have_the_time_of_one_dial():
    limits = Limits(dial_seconds=0.3)
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        dead = [f"/ip4/127.0.0.1/tcp/{each.getsockname()[1]}" for each in (one, two)]
        async with host(limits=limits) as alice:
            said = rf"{dead[0]}: no answer within 0\.3 s; {dead[1]}: no answer"
            with trio.fail_after(PATIENT_SECONDS), pytest.raises(PeerGone, match=said):
                await alice.connect(load_or_create_identity(None).peer_id, dead, seconds=2 * PATIENT_SECONDS)


async def test_places_are_given_back_when_connections_end():
    limits = Limits(max_inbound_connections=2, max_connections=3)
    async with host(limits=limits) as bob, host() as alice, host() as carol, host() as dave:
        for _ in range(3):  # a peer that comes and goes takes no place from a later peer
            for each in (alice, carol):
                await each.connect(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS)
            with pytest.raises(PeerGone):
                await dave.ping(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS)
            await bob.connect(dave.peer_id, dave.addresses, seconds=PATIENT_SECONDS)  # nobody's inbound place
            for each in (alice, carol, dave):
                await disconnect(each, bob.peer_id)
            await eventually(lambda: len(bob.connections) == 0)
            await eventually(lambda: not alice.connected() | carol.connected() | dave.connected())


async def test_without_an_address_nobody_can_be_reached():
    async with host() as alice:
        with pytest.raises(PeerGone, match="none of its addresses is known"):
            await alice.open_stream(load_or_create_identity(None).peer_id, [], ECHO, seconds=1)
        with pytest.raises(PeerGone, match="does not dial itself"):
            await alice.connect(alice.peer_id, alice.addresses, seconds=1)


async def test_a_listener_that_never_answers_costs_its_deadline_and_no_more():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}"
        async with host() as alice, host() as bob:
            with trio.fail_after(PATIENT_SECONDS), pytest.raises(SlowPeer, match=r"within 0\.3 s"):
                await alice.connect(bob.peer_id, [address], seconds=0.3)


async def test_another_peer_at_the_address_is_not_taken_for_the_one_we_want():
    async with host() as alice, host() as bob:
        other = load_or_create_identity(None).peer_id
        with pytest.raises(PeerGone, match="cannot be reached"):
            await alice.connect(other, bob.addresses, seconds=PATIENT_SECONDS)
        assert alice.connected() == set()


async def test_simultaneous_calls_share_one_connection():
    async with host() as alice, host() as bob:
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(alice.ping, bob.peer_id, bob.addresses)
        assert len(alice.connections) == 1


async def test_a_protocol_that_the_peer_does_not_speak_is_found_out_by_the_first_receive():
    async with host() as alice, host() as bob:
        stream = await alice.open_stream(
            bob.peer_id, bob.addresses, "/raceme/nonsense/1", seconds=PATIENT_SECONDS
        )
        await stream.send(b"x")
        with pytest.raises(RemoteProtocolError, match="does not speak /raceme/nonsense/1"):
            await stream.receive(PATIENT_SECONDS)
        await eventually(lambda: bob.faults.counts())
        assert bob.faults.counts() == {(alice.peer_id, "RemoteProtocolError"): 1}


async def test_a_protocol_of_short_frames_takes_no_longer_ones():
    async with host() as alice, host() as bob:
        bob.handle("/raceme/test-short/1", echo, max_frame_bytes=10)
        stream = await alice.open_stream(
            bob.peer_id, bob.addresses, "/raceme/test-short/1", seconds=PATIENT_SECONDS
        )
        await stream.send(bytes(10))
        assert await stream.receive(PATIENT_SECONDS) == bytes(10)
        await stream.send(bytes(11))
        with pytest.raises(PeerGone):
            await stream.receive(PATIENT_SECONDS)
        await eventually(lambda: bob.faults.counts())
        assert bob.faults.counts() == {(alice.peer_id, "FrameError"): 1}


@pytest.mark.parametrize("in_a_group", [False, True])
async def test_a_fault_in_a_handler_is_counted_and_resets_that_stream_alone(in_a_group):
    async def handler(stream):
        await stream.receive()
        if in_a_group:
            raise ExceptionGroup("a nursery of the handler's", [BadResult("NaN")])
        raise BadResult("NaN")

    async with host() as alice, host() as bob:
        bob.handle("/raceme/bad/1", handler)
        bad = await alice.open_stream(bob.peer_id, bob.addresses, "/raceme/bad/1", seconds=PATIENT_SECONDS)
        good = await alice.open_stream(bob.peer_id, bob.addresses, ECHO, seconds=PATIENT_SECONDS)
        await bad.send(b"x")
        with pytest.raises(PeerGone, match="reset"):
            await bad.receive(PATIENT_SECONDS)
        await good.send(b"y")
        assert await good.receive(PATIENT_SECONDS) == b"y"
        assert bob.faults.counts() == {(alice.peer_id, "BadResult"): 1}


async def test_our_own_bug_in_a_handler_ends_the_host():
    async def handler(stream):
        await stream.receive()
        raise ZeroDivisionError

    async def run():
        async with host() as bob:
            bob.handle("/raceme/bug/1", handler)
            stream = await alice.open_stream(
                bob.peer_id, bob.addresses, "/raceme/bug/1", seconds=PATIENT_SECONDS
            )
            await stream.send(b"x")
            await trio.sleep_forever()

    async with host() as alice:
        with pytest.raises(BaseExceptionGroup) as caught, trio.fail_after(PATIENT_SECONDS):
            await run()
        assert caught.group_contains(ZeroDivisionError)


async def test_an_error_inside_the_block_comes_out_as_it_is():
    with pytest.raises(KeyError):
        async with host():
            raise KeyError("mine")


# --- strangers ---


async def refused_stranger(ours, protocols=(IDENTIFY, LIBP2P_PING, KADEMLIA, ECHO, PING_PROTOCOL)):
    """A stock peer asks for everything and gets nothing."""
    stranger = stock_host()
    async with stranger.run([]):
        with trio.fail_after(PATIENT_SECONDS), pytest.raises(SwarmException):
            await stranger.connect(info(ours))
        for protocol in protocols:
            stranger.get_network()._negative_peer_cache.clear()
            with pytest.raises((SwarmException, StreamFailure)):
                await stranger.new_stream(info(ours).peer_id, [protocol])
        assert stranger.get_network().get_connections() == []


async def test_a_stranger_without_the_swarm_key_gets_nothing_from_any_protocol_at_once(monkeypatch):
    # one attempt of the stranger's, where it would make three with pauses between
    monkeypatch.setattr("libp2p.network.swarm.RetryConfig.__init__.__defaults__", (0, 0.1, 30.0, 2.0, 0.1))
    async with host(KEY, limits=LATE) as bob:
        await refused_stranger(bob)
        assert bob.connected() == set()
        assert bob.faults.count("127.0.0.1", NotAMember) >= 6
        assert bob.raw.get_network().get_connections() == []


async def test_a_stranger_with_a_wrong_key_gets_nothing_at_once_and_is_told():
    async with host(KEY, limits=LATE) as bob, host(OTHER_KEY, limits=LATE) as mallory:
        with (
            trio.fail_after(PATIENT_SECONDS),
            pytest.raises(NotAMember, match="does not accept this swarm key"),
        ):
            await mallory.open_stream(bob.peer_id, bob.addresses, ECHO, seconds=2 * PATIENT_SECONDS)
        await eventually(lambda: bob.faults.counts())
        assert [kind for _, kind in bob.faults.counts()] == ["NotAMember"]
        assert bob.connected() == mallory.connected() == set()
        assert bob.raw.get_network().get_connections() == []


async def test_a_node_without_a_key_is_told_that_the_swarm_is_private():
    async with host(KEY) as bob, host(None) as mallory:
        with pytest.raises(NotAMember, match="belongs to a private swarm"):
            await mallory.connect(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS)


async def test_a_member_is_told_that_the_peer_is_public():
    async with host(None) as bob, host(KEY) as alice:
        with pytest.raises(NotAMember, match="does not belong to a private swarm"):
            await alice.connect(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS)


async def test_plaintext_and_tls_are_offered_to_nobody():
    async with host() as bob:
        port = int(bob.addresses[0].rpartition("/")[2])
        for name in ("/plaintext/2.0.0", "/secio/1.0.0", "/tls/1.0.0", PRIVATE_PROTOCOL):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                line = f"{name}\n".encode()
                await stream.send_all(b"\x13/multistream/1.0.0\n" + bytes([len(line)]) + line)
                answer = b""
                with trio.fail_after(PATIENT_SECONDS):
                    while not answer.endswith(b"\x03na\n"):
                        answer += await stream.receive_some()
                assert answer == b"\x13/multistream/1.0.0\n\x03na\n"


async def test_a_stock_peer_reaches_us_and_we_reach_it_where_there_is_no_swarm_key():
    stock = stock_host()
    async with host() as ours, stock.run([Multiaddr(LOOPBACK)]):

        async def stock_echo(stream):
            await stream.write(await stream.read(9))
            await stream.close()

        stock.set_stream_handler(ECHO, stock_echo)
        await stock.connect(info(ours))
        theirs = await stock.new_stream(info(ours).peer_id, [ECHO])
        payload = os.urandom(600_000)  # more than two windows

        async def send():
            await theirs.write(struct.pack(">I", len(payload)) + payload)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            got = b""
            with trio.fail_after(20):
                while len(got) < 4 + len(payload):
                    got += await theirs.read(64 * 1024)
        assert got[4:] == payload
        await theirs.close()

        # identify and libp2p's ping are answered, too
        await eventually(lambda: stock.get_peerstore().supports_protocols(info(ours).peer_id, [LIBP2P_PING]))
        ping = await stock.new_stream(info(ours).peer_id, [LIBP2P_PING])
        await ping.write(bytes(32))
        assert await ping.read(32) == bytes(32)

        # and the other way round, over a connection that we dial
        peer, address = stock.get_id().to_base58(), str(stock.get_addrs()[0]).partition("/p2p/")[0]
        await disconnect(ours, peer)
        await eventually(lambda: not ours.connected())
        stream = await ours.open_stream(peer, [address], ECHO, seconds=PATIENT_SECONDS)
        await stream.send(b"hello")
        assert await stream.receive(PATIENT_SECONDS) == b"hello"
        await stream.aclose()


# --- floods ---


ELSEWHERE = "127.0.0.66"  # another address of this machine


async def knock(victim, source=None):
    """A socket at a host's door, from another address if `source` says so."""
    return await trio.open_tcp_stream("127.0.0.1", _port(victim), local_address=source)


@asynccontextmanager
async def hostile_channel(victim, source=None):
    """A secured channel to a host, without a muxer that keeps yamux's rules on it."""
    link = SocketLink(await knock(victim, source), 10)
    yield await Upgrade(load_or_create_identity(None), None, Limits()).outbound(link, victim.peer_id, "there")
    link.close()


@asynccontextmanager
async def hostile_connection(victim, source=None):
    """A connection to a host whose credit its holder can lie about."""
    async with hostile_channel(victim, source) as channel, trio.open_nursery() as nursery:
        connection = Connection(channel)
        nursery.start_soon(connection.run)
        await connection.started.wait()
        yield connection
        connection.close_now("enough")
        nursery.cancel_scope.cancel()


async def test_a_peer_that_ignores_its_window_is_closed_at_the_bound_and_banned():
    held = []

    async def reads_nothing(stream):
        held.append(stream)
        await trio.sleep_forever()

    async with host() as bob:
        bob.handle("/raceme/idle/1", reads_nothing)
        async with hostile_connection(bob) as connection:
            stream = connection.open()
            stream.propose("/raceme/idle/1")
            stream.state.send_credit = 2**31
            with pytest.raises(PeerGone), trio.fail_after(PATIENT_SECONDS):
                await stream.send_all(bytes(64 * 1024 * 1024))
            await eventually(lambda: not bob.connected())
            assert [kind for _, kind in bob.faults.counts()] == ["YamuxError"]
            assert held[0]._stream.connection.core.unread_bytes <= 256 * 1024


async def test_a_banned_peer_is_not_let_in_again():
    async with host() as alice, host() as bob:
        await alice.connect(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS)
        (connection,) = alice.connections.of(bob.peer_id)
        await connection.channel.send(YAMUX_HEADER.pack(7, 0, 0, 0, 0))
        await eventually(lambda: (alice.peer_id, "YamuxError") in bob.faults.counts())
        await eventually(lambda: not alice.connected())
        with pytest.raises(PeerGone):
            await alice.ping(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS)
        assert bob.connected() == set()


async def test_a_ban_ends(monkeypatch):
    async with host() as alice, host() as bob:
        now, real = [0.0], trio.current_time
        monkeypatch.setattr("node.network.host.trio.current_time", lambda: real() + now[0])
        await alice.connect(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS)
        bob._on_fault(alice.peer_id, YamuxError("it broke a rule"))
        await disconnect(bob, alice.peer_id)
        await eventually(lambda: not alice.connected())
        for passed, let_in in ((0.0, False), (59.0, False), (61.0, True)):
            now[0] = passed
            with contextlib.nullcontext() if let_in else pytest.raises(PeerGone):
                await alice.ping(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS)
            await eventually(lambda let_in=let_in: (alice.peer_id in bob.connected()) == let_in)


@pytest.mark.parametrize("fault", [SlowPeer("slow"), RemoteProtocolError("wrong"), BadResult("NaN")])
async def test_one_fault_bans_only_where_it_is_a_broken_rule_of_the_muxer(fault):
    async with host() as alice, host() as bob:
        bob._on_fault(alice.peer_id, fault)
        bob.charge(alice.peer_id, fault)
        assert await alice.ping(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS) > 0
        assert bob.faults.count(alice.peer_id, type(fault)) == 2


async def test_streams_beyond_the_caps_are_reset_and_honest_peers_notice_nothing():
    limits = Limits(max_streams_per_connection=8)
    async with host(limits=limits) as bob, host() as honest, hostile_channel(bob) as channel:
        wire = b"".join(YAMUX_HEADER.pack(0, WINDOW_UPDATE, SYN, 1 + 2 * i, 0) for i in range(60))
        await channel.send(wire)
        await eventually(lambda: len(bob.connections))
        (theirs,) = bob.connections
        await eventually(lambda: len(theirs.served_streams()) >= 8)
        assert len(theirs.served_streams()) == 8
        assert await honest.ping(bob.peer_id, bob.addresses) > 0


@pytest.mark.parametrize("limits", [Limits(max_streams_per_peer=3), Limits(max_streams=3)])
async def test_the_streams_of_a_peer_and_those_of_the_node_are_capped(limits):
    async with host(limits=limits) as bob, host() as alice:
        await alice.connect(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS)
        await eventually(lambda: identified(alice, bob))
        (connection,) = bob.connections.of(alice.peer_id)
        await eventually(lambda: not connection.served_streams())
        streams = []
        for _ in range(4):
            streams.append(await alice.open_stream(bob.peer_id, bob.addresses, ECHO, seconds=PATIENT_SECONDS))
            await streams[-1].send(b"x")
        for stream in streams[:3]:
            assert await stream.receive(PATIENT_SECONDS) == b"x"
        with pytest.raises(PeerGone, match="reset"):
            await streams[3].receive(PATIENT_SECONDS)


def identified(ours, other):
    """Whether libp2p's identify, which takes a stream for a moment, is done."""
    return ID.from_base58(other.peer_id) in ours.raw._identified_peers


async def test_connections_beyond_the_caps_are_closed():
    limits = Limits(max_inbound_connections=2, max_connections_per_peer=1)
    async with host(limits=limits) as bob, host() as alice, host() as carol, host() as dave:
        await alice.connect(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS)
        link = SocketLink(await trio.open_tcp_stream("127.0.0.1", _port(bob)), 10)
        second = await alice.dialler._upgrade.outbound(link, bob.peer_id, "there")
        with trio.fail_after(PATIENT_SECONDS):
            assert await second.receive() == b""  # one per peer
        link.close()
        await carol.connect(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS)
        with pytest.raises(PeerGone):
            await dave.connect(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS)
        assert bob.connected() == {alice.peer_id, carol.peer_id}


async def test_a_node_short_of_descriptors_keeps_its_connections_and_accepts_no_other():
    async with host() as bob, host() as alice, host() as carol:
        carol.configure_peers(bob.addresses)  # which have no pause after a failed dial
        await alice.connect(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS)
        bob.connections.accepting = False
        with pytest.raises(PeerGone):
            await carol.connect(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS)
        await alice.ping(bob.peer_id, bob.addresses)
        bob.connections.accepting = True
        await carol.ping(bob.peer_id, bob.addresses)


def _port(ours):
    return int(ours.addresses[0].rpartition("/")[2])


async def test_connections_that_do_not_finish_the_handshake_are_closed_and_hold_nobody_up():
    limits = Limits(max_unauthenticated_connections=2, handshake_seconds=2.0)
    async with host(limits=limits) as bob, host() as alice:
        silent = [await knock(bob) for _ in range(3)]
        with trio.fail_after(PATIENT_SECONDS):
            assert await silent[0].receive_some() == b""  # the first at once: the third has its place
            assert bob.faults.count("127.0.0.1", SlowPeer) == 0
            for stream in silent[1:]:
                assert await stream.receive_some() == b""  # the others at the deadline
        for stream in silent:
            await stream.aclose()
        await alice.ping(bob.peer_id, bob.addresses)
        assert bob.faults.count("127.0.0.1", SlowPeer) == 2
        assert bob.faults.count("127.0.0.1", PeerGone) == 1


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("source", [None, ELSEWHERE])
async def test_silent_sockets_keep_nobody_out(key, source):
    async with host(key) as bob, host(key) as alice:
        silent = [await knock(bob, source) for _ in range(100)]
        assert await alice.ping(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS) > 0
        assert len(bob.connections.handshakes) <= Limits().max_unauthenticated_connections
        for stream in silent:
            await trio.aclose_forcefully(stream)


async def test_sockets_that_drip_bytes_from_another_address_keep_nobody_out():
    async with host() as bob, host() as alice, trio.open_nursery() as nursery:

        async def drip():
            with contextlib.suppress(trio.BrokenResourceError):
                async with await knock(bob, ELSEWHERE) as stream:
                    for each in b"\x13/multistream/1.0.0\n":
                        await stream.send_all(bytes([each]))
                        await trio.sleep(0.05)

        for _ in range(60):
            nursery.start_soon(drip)
        await eventually(lambda: len(bob.connections.handshakes) == 32)
        assert await alice.ping(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS) > 0
        nursery.cancel_scope.cancel()


async def test_connections_without_a_word_keep_no_newcomer_out():
    limits = Limits(max_inbound_connections=8)
    async with host(limits=limits) as bob, contextlib.AsyncExitStack() as stack, host() as alice:
        for _ in range(7):
            await stack.enter_async_context(hostile_channel(bob, ELSEWHERE))
        await eventually(lambda: len(bob.connections) == 6)
        for _ in range(3):
            assert await alice.ping(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS) > 0
            await disconnect(alice, bob.peer_id)
            await eventually(lambda: not alice.connected())
        # on the address of the idle ones, too, once they have been idle for a moment
        await trio.sleep(1.1)
        async with hostile_connection(bob, ELSEWHERE) as newcomer:
            stream = newcomer.open()
            stream.propose(PING_PROTOCOL)
            framed = FramedStream(stream, bob.peer_id, PING_PROTOCOL)
            await framed.send(b"a ping!!")
            assert await framed.receive(PATIENT_SECONDS) == b"a ping!!"
            assert len(bob.connections) == 6


async def test_a_connection_without_a_stream_is_closed_after_its_time(monkeypatch):
    monkeypatch.setattr("node.network.admission.reception._UNUSED_SECONDS", 0.05)
    async with host(limits=Limits(idle_connection_seconds=0.3)) as bob, host() as alice, host() as carol:
        stream = await alice.open_stream(bob.peer_id, bob.addresses, ECHO, seconds=PATIENT_SECONDS)
        await stream.send(b"x")
        assert await stream.receive(PATIENT_SECONDS) == b"x"
        await carol.connect(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS)
        await eventually(lambda: bob.connected() == {alice.peer_id, carol.peer_id})
        await eventually(lambda: bob.connected() == {alice.peer_id})
        await eventually(lambda: not carol.connected())
        await stream.send(b"y")
        assert await stream.receive(PATIENT_SECONDS) == b"y"
        assert alice.connected() == {bob.peer_id}
        assert bob.faults.counts() == {}


async def test_idle_streams_of_one_peer_keep_no_newcomer_out():
    limits = Limits(max_streams=20)
    async with host(limits=limits) as bob, host() as alice, hostile_connection(bob, ELSEWHERE) as evil:
        bob.handle("/raceme/idle/1", lambda stream: stream.receive())
        held = []
        for _ in range(20):
            held.append(evil.open())
            held[-1].propose("/raceme/idle/1")
            evil.flush_now()
        (theirs,) = bob.connections
        await eventually(lambda: len(theirs.served_streams()) == 20)
        assert await alice.ping(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS) > 0
        assert 0 < len(theirs.served_streams()) < 20


async def test_three_messages_that_cannot_be_read_end_the_connection_and_ban_the_peer():
    async with host() as bob, host() as alice:

        async def refuses(stream):
            await stream.receive()
            raise MessageError("nonsense")

        bob.handle("/raceme/strict/1", refuses)
        for faults in (1, 2, 3):
            stream = await alice.open_stream(
                bob.peer_id, bob.addresses, "/raceme/strict/1", seconds=PATIENT_SECONDS
            )
            await stream.send(b"x")
            with pytest.raises(PeerGone):
                await stream.receive(PATIENT_SECONDS)
            assert bob.faults.count(alice.peer_id, MessageError) == faults
        await eventually(lambda: not bob.connected())
        assert bob.faults.banned().keys() == {alice.peer_id}
        with pytest.raises(PeerGone):
            await alice.ping(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS)
        with pytest.raises(PeerGone, match=r"is let in again in 1\d s"):
            await bob.connect(alice.peer_id, alice.addresses, seconds=PATIENT_SECONDS)


async def test_asking_for_protocols_of_another_version_bans_nobody():
    async with host() as bob, host() as alice:
        for _ in range(5):
            stream = await alice.open_stream(
                bob.peer_id, bob.addresses, "/raceme/session/99", seconds=PATIENT_SECONDS
            )
            with pytest.raises(RemoteProtocolError, match="does not speak /raceme/session/99"):
                await stream.receive(PATIENT_SECONDS)
        assert await alice.ping(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS) > 0
        await eventually(lambda: bob.faults.count(alice.peer_id, RemoteProtocolError) == 5)


async def test_bytes_that_the_network_has_changed_ban_nobody():
    async with host() as bob, host() as alice:
        for _ in range(4):
            await alice.connect(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS)
            (connection,) = alice.connections.of(bob.peer_id)
            await connection.channel.link.send(memoryview(b"\x00\x20" + bytes(32)))
            await eventually(lambda: not alice.connected())
        assert bob.faults.count(alice.peer_id, RemoteProtocolError) == 4
        assert await alice.ping(bob.peer_id, bob.addresses, seconds=PATIENT_SECONDS) > 0


async def test_a_stream_that_names_no_protocol_is_reset():
    async with host(limits=Limits(negotiation_seconds=0.2)) as bob, hostile_connection(bob) as connection:
        stream = connection.open()
        await stream.send_all(b"\x13/multistream/1.0.0\n\x20")
        assert await stream.receive_some() == b"\x13/multistream/1.0.0\n"
        with trio.fail_after(PATIENT_SECONDS), pytest.raises(PeerGone):
            await stream.receive_some()
        assert [kind for _, kind in bob.faults.counts()] == ["SlowPeer"]


def table(of, limits=None):
    return open_kademlia(of, Knowledge("public"), limits or Limits(), random.Random(1), serves=True)


async def ask_kademlia(host, peer):
    """A question to a peer's Kademlia table, answered."""
    stream = await host.open_bytes(peer.peer_id, peer.addresses, PROTOCOL, seconds=2)
    question = Message(type=Message.MessageType.FIND_NODE, key=b"any").SerializeToString()
    await stream.send_all(bytes([len(question)]) + question)
    answer = await stream.receive_some(1)
    stream.reset_now()
    return len(answer)


async def test_idle_streams_of_kademlia_stop_nobody_else():
    async with host() as bob, table(bob), hostile_connection(bob) as connection, host() as alice:
        streams = [connection.open() for _ in range(14)]
        for stream in streams:
            stream.propose(PROTOCOL)
            await stream.send_all(b"\x05")  # the first byte of a message
        most = Limits().max_libp2p_streams_per_peer
        await eventually(lambda: sum(stream.is_closed() for stream in streams) == 14 - most)
        with trio.fail_after(PATIENT_SECONDS):
            assert await ask_kademlia(alice, bob) == 1


async def test_a_stream_of_kademlia_ends_at_its_deadline_and_at_a_message_that_is_too_long():
    for data, limits, fault in (
        (b"\x05", Limits(libp2p_stream_seconds=0.3), "SlowPeer"),
        (b"\xff\xff\x03", LATE, "FrameError"),
    ):
        async with host() as bob, table(bob, limits), hostile_connection(bob) as connection:
            stream = connection.open()
            stream.propose(PROTOCOL)
            await stream.send_all(data)
            with trio.fail_after(PATIENT_SECONDS), pytest.raises(PeerGone):
                await stream.receive_some()
            assert {kind for _, kind in bob.faults.counts()} == {fault}


async def test_a_ping_is_eight_bytes_and_nothing_longer_is_waited_for():
    async with host() as bob, hostile_connection(bob) as connection:
        stream = connection.open()
        stream.propose(PING_PROTOCOL)
        await stream.send_all(struct.pack(">I", 9))
        with trio.fail_after(PATIENT_SECONDS), pytest.raises(PeerGone):
            await stream.receive_some()
        assert [kind for _, kind in bob.faults.counts()] == ["FrameError"]


# --- what py-libp2p must go on doing as we rely on it ---


async def test_libp2p_runs_with_our_resource_manager():
    async with host() as bob:
        swarm = bob.raw.get_network()
        assert swarm._resource_manager is not None
        assert swarm._resource_manager.limits.max_streams == Limits().max_streams


async def test_libp2p_dials_nobody_and_uses_the_connections_that_there_are():
    async with host() as alice, host() as bob:
        peer = info(bob)
        alice.raw.get_peerstore().add_addrs(peer.peer_id, peer.addrs, 600)
        await alice.raw.get_network().auto_connector.maybe_connect()
        alice.raw.get_network()._schedule_auto_connect()
        await trio.sleep(0.1)
        with pytest.raises(Exception, match="no connection to"):
            await alice.raw.new_stream(peer.peer_id, [LIBP2P_PING])
        assert alice.connected() == set()
        await alice.ping(bob.peer_id, bob.addresses)
        stream = await alice.raw.new_stream(peer.peer_id, [LIBP2P_PING])
        await stream.write(bytes(32))
        assert await stream.read(32) == bytes(32)
        await stream.reset()
        assert alice.connected() == {bob.peer_id}


async def test_sockets_of_both_ends_notice_a_dead_peer_in_seconds():
    async with host() as alice, host() as bob:
        await alice.ping(bob.peer_id, bob.addresses)
        for connections in (alice.connections.of(bob.peer_id), bob.connections.of(alice.peer_id)):
            sock = connections[0].channel.link._socket
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


# --- addresses ---


@pytest.mark.parametrize(
    ("listen", "message"),
    [
        ("nonsense", "bad listen address: 'nonsense' is not a TCP multiaddr"),
        ("/dns/localhost/tcp/0", "cannot listen on /dns/localhost/tcp/0: give an IP address"),
        ("/ip4/192.0.2.1/tcp/0", "cannot listen on /ip4/192.0.2.1/tcp/0: Cannot assign"),
        ("/ip4/127.0.0.1/udp/0/quic-v1", "is not a TCP multiaddr"),
    ],
)
async def test_an_address_that_cannot_be_listened_on_is_one_clear_line(listen, message):
    with pytest.raises(ConfigError) as caught:
        async with host(listen=[listen]):
            pass
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_a_swarm_key_of_another_size_is_one_clear_line():
    with pytest.raises(ConfigError, match="a swarm key of 5 bytes, it has 32"):
        async with host(b"short"):
            pass


async def test_a_port_in_use_is_one_clear_line_and_leaves_no_socket():
    before = _descriptors()
    async with host() as bob:
        inside = _descriptors()
        with pytest.raises(ConfigError, match=f"cannot listen on {bob.addresses[0]}: the port is in use"):
            async with host(listen=[LOOPBACK, bob.addresses[0]]):
                pass
        assert _descriptors() == inside
    assert _descriptors() == before


async def test_a_wildcard_is_announced_by_addresses_that_can_be_dialled():
    async with host(listen=["/ip4/0.0.0.0/tcp/0"]) as bob, host() as alice:
        assert bob.addresses
        assert not any("0.0.0.0" in address for address in bob.addresses)
        assert await alice.ping(bob.peer_id, bob.addresses[-1:]) > 0


async def test_announced_addresses_replace_those_listened_on():
    announced = ["/dns/node.example.org/tcp/4001"]
    async with host(announce=announced) as bob:
        assert bob.addresses == tuple(announced)
    with pytest.raises(ConfigError, match="bad announce address"):
        async with host(announce=["nonsense"]):
            pass


async def test_names_and_ipv6_can_be_dialled():
    async with host(listen=["/ip6/::1/tcp/0", LOOPBACK]) as bob, host(listen=[]) as alice:
        six, four = bob.addresses
        assert alice.addresses == ()
        port = four.rpartition("/")[2]
        for address in (six, f"/dns/localhost/tcp/{port}", f"/dns4/localhost/tcp/{port}"):
            await alice.connect(bob.peer_id, [address], seconds=PATIENT_SECONDS)
            await disconnect(alice, bob.peer_id)


# --- the end ---


def _descriptors():
    return len(os.listdir("/proc/self/fd"))


async def test_at_the_end_no_task_and_no_socket_stays_and_it_takes_no_time():
    gc.collect()
    before, tasks = _descriptors(), _tasks()
    async with host(KEY) as alice:
        async with host(KEY, limits=LATE) as bob:
            stream = await alice.open_stream(bob.peer_id, bob.addresses, ECHO, seconds=PATIENT_SECONDS)
            await stream.send(b"x")
            await stream.receive(PATIENT_SECONDS)
            began = trio.current_time()
        assert trio.current_time() - began < PATIENT_SECONDS
        with pytest.raises(PeerGone):
            await stream.receive(PATIENT_SECONDS)
        await eventually(lambda: not alice.connected())
    await trio.sleep(0.15)  # py-libp2p waits 100 ms before it tells that a connection closed
    gc.collect()
    assert _descriptors() == before
    assert _tasks() == tasks


def _tasks():
    return trio.lowlevel.current_statistics().tasks_living
