import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from node.network.transport.connection import Connection
from node.network.transport.identity import identity_of
from node.network.transport.membership import MembershipProof
from node.network.transport.multistream import HEADER, Dialogue, encode_lines, proposal
from node.network.transport.noise import PRIVATE_PROTOCOL, PROTOCOL, HandshakeConnection, Noise
from node.network.transport.upgrade import Upgrade
from node.network.transport.yamux_limits import FAR_WINDOW
from tensor_codec.errors import NotAMember, PeerFault, PeerGone, RemoteProtocolError
from tensor_codec.limits import Limits
from tests.fakes import ALICE, BOB, memory_link_pair

KEY, OTHER_KEY = b"k" * 32, b"o" * 32


class SlowLink:
    """A link whose bytes arrive so long after they were sent, at the other one's end."""

    def __init__(self, link, seconds):
        self.link, self.seconds, self.remote, self.close = link, seconds, link.remote, link.close
        self.other, self.arrives_at, self.relayed_by = self, 0.0, None

    async def receive_into(self, buffer):
        size = await self.link.receive_into(buffer)
        await trio.sleep_until(self.arrives_at)
        return size

    def send_now(self, data):
        self.other.arrives_at = trio.current_time() + self.seconds
        return self.link.send_now(data)

    async def send(self, data):
        self.other.arrives_at = trio.current_time() + self.seconds
        await self.link.send(data)


async def upgraded(alice_key, bob_key, *, expected=BOB.peer_id, one_way_seconds=0.0):
    """What becomes of Alice's dial and of Bob's accept: a channel or the error."""
    to_bob, to_alice = (SlowLink(link, one_way_seconds) for link in memory_link_pair())
    to_bob.other, to_alice.other = to_alice, to_bob
    outcome = {}

    async def run(who, link, upgrade):
        try:
            outcome[who] = await upgrade
        except PeerFault as fault:
            outcome[who] = fault
            link.close()

    async with trio.open_nursery() as nursery:
        alice, bob = Upgrade(ALICE, alice_key, Limits()), Upgrade(BOB, bob_key, Limits())
        nursery.start_soon(run, "alice", to_bob, alice.outbound(to_bob, expected, "/ip4/192.0.2.1/tcp/1"))
        nursery.start_soon(run, "bob", to_alice, bob.inbound(to_alice))
    return outcome["alice"], outcome["bob"]


@pytest.mark.parametrize("key", [None, KEY])
async def test_two_peers_of_one_swarm_know_each_other_afterwards(autojump_clock, key):
    alice, bob = await upgraded(key, key)
    assert (alice.remote, bob.remote) == (BOB.peer_id, ALICE.peer_id)
    assert alice.handshake_hash == bob.handshake_hash
    await alice.send(b"x" * 200_000)
    got = b""
    while len(got) < 200_000:
        got += await bob.receive()
    assert got == b"x" * 200_000


@pytest.mark.parametrize("key", [None, KEY])
async def test_the_handshake_measures_the_round_trip_at_both_ends(autojump_clock, key):
    alice, bob = await upgraded(key, key, one_way_seconds=0.08)
    assert alice.round_trip_seconds == pytest.approx(0.16)
    assert bob.round_trip_seconds == pytest.approx(0.16)
    async with trio.open_nursery() as nursery:
        ours, theirs = Connection(alice), Connection(bob)
        nursery.start_soon(ours.run)
        nursery.start_soon(theirs.run)
        stream = ours.open()
        await stream.send_all(b"x")  # before any ping has come back
        window = (await theirs.accept()).state.window
        await ours.close()
    assert window == FAR_WINDOW


async def test_a_wrong_swarm_key_is_refused_at_once_and_both_sides_are_told(autojump_clock):
    started = trio.current_time()
    alice, bob = await upgraded(KEY, OTHER_KEY)
    assert trio.current_time() == started
    assert isinstance(alice, NotAMember)
    assert str(alice) == "the swarm at /ip4/192.0.2.1/tcp/1 does not accept this swarm key"
    assert isinstance(bob, NotAMember)
    assert "could not prove that it holds the swarm key" in str(bob)


async def test_a_peer_without_the_key_is_turned_away_in_its_first_packet(autojump_clock):
    alice, bob = await upgraded(None, KEY)
    assert isinstance(alice, NotAMember)
    assert "belongs to a private swarm" in str(alice)
    assert isinstance(bob, NotAMember)


async def test_a_member_that_dials_a_public_peer_is_told_so(autojump_clock):
    alice, bob = await upgraded(KEY, None)
    assert isinstance(alice, NotAMember)
    assert "does not belong to a private swarm" in str(alice)
    assert isinstance(bob, RemoteProtocolError)


async def test_whoever_answers_in_the_place_of_the_peer_that_was_dialled_is_refused(autojump_clock):
    alice, _ = await upgraded(KEY, KEY, expected=identity_of(b"c" * 32).peer_id)
    assert isinstance(alice, RemoteProtocolError)


async def test_a_stranger_that_knows_the_private_name_and_says_nothing_has_one_second(autojump_clock):
    to_bob, to_alice = memory_link_pair()

    async def stranger():
        connection = HandshakeConnection(to_bob)
        await connection.write(proposal(PRIVATE_PROTOCOL))
        assert await connection.dialogue.read_line() == HEADER
        assert await connection.dialogue.read_line() == PRIVATE_PROTOCOL
        channel = await Noise(ALICE).secure(to_bob, connection, _id(BOB))
        assert len(await channel.receive()) == 32  # the challenge, and nothing more
        with pytest.raises(PeerGone, match="broke"):
            await channel.receive()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stranger)
        started = trio.current_time()
        with pytest.raises(NotAMember, match=r"no proof of the swarm key .* within 1 s"):
            await Upgrade(BOB, KEY, Limits()).inbound(to_alice)
        assert trio.current_time() - started == pytest.approx(1.0)
        nursery.cancel_scope.cancel()


async def test_a_stranger_that_sends_our_own_proof_back_is_refused(autojump_clock):
    to_bob, to_alice = memory_link_pair()

    async def stranger():
        connection = HandshakeConnection(to_bob)
        await connection.write(proposal(PRIVATE_PROTOCOL))
        await connection.dialogue.read_line()
        await connection.dialogue.read_line()
        channel = await Noise(ALICE).secure(to_bob, connection, _id(BOB))
        dialogue = Dialogue(channel.receive_some, channel.send)
        proof = MembershipProof(OTHER_KEY, "initiator", ALICE.peer_id, BOB.peer_id, channel.handshake_hash)
        await dialogue.write(proof.challenge)
        await dialogue.read(32)
        await dialogue.write(await dialogue.read(32))
        await dialogue.flush()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stranger)
        with pytest.raises(NotAMember):
            await Upgrade(BOB, KEY, Limits()).inbound(to_alice)


def _id(identity):
    from libp2p.peer.id import ID

    return ID.from_base58(identity.peer_id)


@given(st.lists(st.binary(max_size=200), max_size=5), st.booleans())
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_random_bytes_in_a_handshake_do_no_worse_than_a_fault(pieces, begin_well):
    async def attempt():
        to_bob, to_alice = memory_link_pair()
        if begin_well:
            await to_bob.send(memoryview(proposal(PROTOCOL)))
        for piece in pieces:
            await to_bob.send(memoryview(piece))
        to_bob._stream.send_stream.close()
        with pytest.raises(PeerFault):
            await Upgrade(BOB, None, Limits()).inbound(to_alice)

    trio.run(attempt)


@pytest.mark.parametrize(
    "wire",
    [
        encode_lines("/multistream/9"),
        b"\xff\xff\xff\x7f",
        b"\x00",
        b"\x05abcde",
        b"\x03\xff\xff\n",
        encode_lines(HEADER, *["/tls/1.0.0"] * 16),
    ],
)
async def test_a_broken_negotiation_is_a_fault(wire):
    to_bob, to_alice = memory_link_pair()
    await to_bob.send(memoryview(wire))
    with pytest.raises(RemoteProtocolError):
        await Upgrade(BOB, None, Limits()).inbound(to_alice)
