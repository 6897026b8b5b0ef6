"""From a fresh TCP connection to a known peer: security, proof of membership, muxer.

In this order, so that a peer that fails at one step sees nothing of the next.  With a swarm key
the only security protocol offered is our private one: a peer of another network is refused in its first
packet, and a peer that knows the name must still prove the key.
"""

from __future__ import annotations

import trio
from libp2p.peer.id import ID

from node.network.transport import yamux
from node.network.transport.identity import Identity
from node.network.transport.link import Link
from node.network.transport.membership import CHALLENGE_BYTES, PROOF_BYTES, MembershipProof
from node.network.transport.multistream import Dialogue, negotiate, proposal, read_answer
from node.network.transport.noise import PRIVATE_PROTOCOL, PROTOCOL, HandshakeConnection, Noise, SecureChannel
from routing.names import PeerId
from tensor_codec.errors import NotAMember, PeerGone, RemoteProtocolError
from tensor_codec.limits import Limits


class Upgrade:
    """Turns links into secured channels on which yamux was agreed.  The caller sets the deadline."""

    def __init__(self, identity: Identity, swarm_key: bytes | None, limits: Limits) -> None:
        self._identity = identity
        self._swarm_key = swarm_key
        self._limits = limits
        self._noise = Noise(identity)
        self._security = PROTOCOL if swarm_key is None else PRIVATE_PROTOCOL

    async def outbound(self, link: Link, peer: PeerId, where: str) -> SecureChannel:
        """We dialled `peer` at `where`.  Raises PeerGone, RemoteProtocolError, NotAMember."""
        connection = HandshakeConnection(link)
        await connection.write(proposal(self._security))

        async def security_answer() -> None:
            if not await read_answer(connection.dialogue, self._security):
                raise NotAMember(self._turned_away(where))

        # The handshake's first message goes out with the proposal: the answer is read after that.
        connection.before_reading(security_answer)
        channel = await self._noise.secure(link, connection, ID.from_base58(peer))
        await self._prove(channel, where)
        dialogue = Dialogue(channel.receive_some, channel.send)
        await dialogue.write(proposal(yamux.PROTOCOL))
        if not await read_answer(dialogue, yamux.PROTOCOL):
            raise RemoteProtocolError(f"{where} does not speak {yamux.PROTOCOL}")
        return channel

    async def inbound(self, link: Link) -> SecureChannel:
        """A peer dialled us.  Raises PeerGone, RemoteProtocolError, NotAMember."""
        connection = HandshakeConnection(link)
        try:
            if await negotiate(connection.dialogue, lambda name: name == self._security) is None:
                raise RemoteProtocolError(f"it does not speak {self._security}")
        except RemoteProtocolError as error:
            if self._swarm_key is None:
                raise
            raise NotAMember("it knows nothing of swarm keys") from error
        channel = await self._noise.secure(link, connection, None)
        await self._prove(channel, None)
        dialogue = Dialogue(channel.receive_some, channel.send)
        if await negotiate(dialogue, lambda name: name == yamux.PROTOCOL) is None:
            raise RemoteProtocolError(f"{channel.remote} does not speak {yamux.PROTOCOL}")
        await dialogue.flush()
        return channel

    async def _prove(self, channel: SecureChannel, where: str | None) -> None:
        """Prove membership and check the peer's proof; nothing without a swarm key.  where: if we dialled."""
        if self._swarm_key is None:
            return
        proof = MembershipProof(
            self._swarm_key,
            "initiator" if channel.initiator else "responder",
            ours=self._identity.peer_id,
            theirs=channel.remote,
            channel=channel.handshake_hash,
        )
        dialogue = Dialogue(channel.receive_some, channel.send)
        seconds = self._limits.membership_seconds
        try:
            with trio.fail_after(seconds):
                await dialogue.write(proof.challenge)
                answer = proof.answer(await dialogue.read(CHALLENGE_BYTES))
                await dialogue.write(answer)
                proof.verify(await dialogue.read(PROOF_BYTES))
        except trio.TooSlowError:
            raise NotAMember(
                f"no proof of the swarm key from {channel.remote} within {seconds:g} s"
            ) from None
        except (NotAMember, PeerGone) as error:
            if where is None:
                raise NotAMember(f"{channel.remote} could not prove that it holds the swarm key") from error
            raise NotAMember(f"the swarm at {where} does not accept this swarm key") from error

    def _turned_away(self, where: str) -> str:
        if self._swarm_key is None:
            return (
                f"{where} belongs to a private swarm (it does not offer {PROTOCOL}): its swarm key is needed"
            )
        return f"{where} does not belong to a private swarm: it knows nothing of swarm keys"
