"""The stated bound of a node's memory covers what each of its parts lets peers fill, filled to the brim."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.model.adapters.adapted import AdaptedSpan
from node.model.adapters.low_rank import LowRank, SpanAdapter
from node.model.blocks.parts import PART_POSITIONS
from node.network.admission.half_open import HalfOpen, Handshake
from node.network.budgets.large_frames import SMALL_FRAME, FramePlace, LargeFrames
from node.network.budgets.libp2p_streams import Libp2pStreams, ServedStream
from node.network.directory.kademlia.contact import Contact
from node.network.directory.kademlia.providers import Providers
from node.network.transport.noise import ReadBuffer
from node.network.transport.yamux import CHUNK, DATA, HEADER, SYN, Yamux
from node.network.transport.yamux_limits import YamuxError, YamuxLimits
from node.serving.memory import TRAINED_COPIES, PeerBytes, peer_bytes, trained_bytes
from node.serving.sessions.inbox import Arrived, Inbox
from node.serving.sessions.prompt_budget import HeldPrompts, PromptBudget
from node.serving.sessions.step_room import SMALL_STEP, StepRoom
from routing.names import PeerId, peer_id_of
from routing.view.records import Record, fit_record, sign_record, verify_record
from routing.view.view import Arrival, SwarmView, expire, merge
from tensor_codec.errors import PeerFault, Refused
from tensor_codec.journal import JournalBudget
from tensor_codec.limits import KIB, MIB, Limits
from tensor_codec.messages.session import Step

LIMITS = replace(
    Limits(), max_connections=3, max_unread_bytes_per_connection=MIB, max_unauthenticated_connections=5,
    max_streams=6, max_steps_in_flight=3, max_frame_bytes=MIB, max_large_frames=4, max_large_steps=3,
    max_compute_streams=2, max_prompt_bytes=MIB, max_prompt_bytes_per_peer=MIB // 4, max_records=40,
    max_providers=50,
)  # fmt: skip


def unread_of_a_connection() -> int:
    """The most bytes that wait in a muxer for readers that do not come, at any moment."""
    core = Yamux(
        False, YamuxLimits(max_unread_bytes=LIMITS.max_unread_bytes_per_connection, max_inbound_streams=80)
    )
    most, stream = 0, 1
    body = bytes(64 * KIB)
    try:
        while True:
            for part in range(4):
                core.receive(HEADER.pack(0, DATA, 0 if part else SYN, stream, len(body)) + body, 0.0)
                most = max(most, core.unread_bytes)
            stream += 2
    except YamuxError:
        return most


def unread() -> int:
    return LIMITS.max_connections * unread_of_a_connection()


def handshakes() -> int:
    """Buffers of handshakes that have all begun."""
    half_open = HalfOpen(LIMITS.max_unauthenticated_connections)
    for number in range(50):
        half_open.begin(Handshake(f"192.0.2.{number}/32", lambda: None, spoke=True))
    link: Any = None
    return len(half_open) * len(ReadBuffer(link)._memory)


def filled(frames: LargeFrames, size: int) -> int:
    """Bytes of places after many peers have asked for one."""
    for number in range(100):
        place = FramePlace(object(), f"p{number}", f"192.0.{number}.1/32", size, lambda: None, lambda: None)
        frames.ask(place)
    return frames.bytes


def large_frames() -> int:
    return filled(LargeFrames.of(LIMITS), MIB // 8)


def steps() -> int:
    """Bodies in the inboxes of as many sessions as there are streams, and the step that each computes."""
    room, held = StepRoom(LIMITS), 0
    for size in (SMALL_STEP, MIB // 8):
        for number in range(LIMITS.max_streams):
            session = room.of_session(PeerId(f"p{number}"), f"192.0.{number}.1/32")
            inbox = Inbox(LIMITS.max_steps_in_flight, held=False, room=session)
            held += 3 * SMALL_STEP  # being computed: its body, its tensor, its output
            try:
                while True:
                    inbox.put(Arrived(Step(bytes(16), 1, 0, "all", bytes(size)), PeerId("p"), 0.0))
                    held += size
            except (PeerFault, Refused):
                continue
    assert room.bytes > 2 * LIMITS.max_frame_bytes
    return held


def prompts() -> int:
    """Those of open sessions, and those of sessions that others have just ended."""
    size, ended = LIMITS.max_prompt_bytes_per_peer, list[int]()
    budget = PromptBudget(LIMITS)

    def held(peer: str, prefix: str, size: int) -> HeldPrompts:
        return HeldPrompts(peer, prefix, size, lambda _: ended.append(size))

    with ExitStack() as stack:
        for number in range(LIMITS.max_prompt_bytes // size):
            stack.enter_context(budget.hold(held(f"p{number}", "A", size)))
        for number in range(50):
            with suppress(Refused):
                stack.enter_context(budget.hold(held(f"q{number}", f"B{number}", size // 2)))
        assert ended
        return budget.used + sum(ended)


def outgoing() -> int:
    """A chunk of every stream that waits for the kernel, and the one before, sealed."""
    core = Yamux(True, YamuxLimits())
    sent = 0
    for _ in range(LIMITS.max_streams):
        sent += core.send(core.open(), memoryview(bytes(MIB)))
    assert sent == LIMITS.max_streams * CHUNK
    return 2 * len(core.data_to_send())


def small_frames() -> int:
    return LIMITS.max_streams * SMALL_FRAME


def record(number: int, *, far: bool) -> bytes:
    """A record of the largest size: of addresses, or of distances."""
    key = number.to_bytes(32, "big")
    public = Ed25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw()
    rtt = {peer_id_of(bytes([each, number % 256]) * 16): 0.01 * each for each in range(1, 17)}
    whole = Record(
        peer=peer_id_of(public),
        addresses=tuple(f"/ip4/8.8.{number % 250}.{port}/tcp/4001" for port in range(1 if far else 8)),
        role="serve", model="m" * 60, revision="a" * 64, blocks=30, stop=20, dtype="float32",
        seconds_per_block=0.001, prefill_seconds_per_token=0.001, cache_tokens=8192, seq=10**15,
        rtt=MappingProxyType(rtt), name="n" * 60, version="0.1.0",
    )  # fmt: skip
    return sign_record(fit_record(whole, LIMITS), key)


def directory() -> int:
    """Records, live and ended; entries of the Kademlia table; what libp2p's streams hold."""
    wires = [record(number, far=number % 2 == 0) for number in range(1, 4 * LIMITS.max_records)]
    assert max(map(len, wires)) > LIMITS.max_record_bytes - 100
    providers = Providers(LIMITS.max_providers, 64, 4, 8, 300.0)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        view = SwarmView("public", LIMITS.max_records)
        for now, wave in ((0.0, wires[: 2 * LIMITS.max_records]), (100.0, wires[2 * LIMITS.max_records :])):
            arrivals = [
                Arrival(
                    verify_record(bytes(bytearray(wire)), swarm="public", limits=LIMITS),
                    bytes(bytearray(wire)),
                )
                for wire in wave
            ]
            view = merge(expire(view, now), arrivals, now).view
            del arrivals
        assert len(view.entries) == len(view.ended) == LIMITS.max_records
        for number in range(4 * LIMITS.max_providers):
            peer = peer_id_of(number.to_bytes(32, "big"))
            name = f"{'n' * 60}.{'m' * 60}.{number}.example"
            contact = Contact(peer, tuple(f"/dns4/{name}/tcp/{port}" for port in range(4001, 4009)))
            providers.add(number.to_bytes(2, "big") * 17, contact, 0.0)
        assert providers.size == LIMITS.max_providers
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    streams, served = Libp2pStreams(LIMITS), 0
    for kind in ("/ipfs/kad/1.0.0", "/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0", "/ipfs/ping/1.0.0"):
        for number in range(50):
            served += streams.enter(ServedStream(kind, f"p{number}", f"9.9.{number}.9/32", 0.0, lambda: None))
    return held + len(streams._streams) * LIMITS.max_libp2p_bytes_per_stream


KINDS: dict[str, Callable[[], int]] = {
    "connections": unread,
    "handshakes": handshakes,
    "small_frames": small_frames,
    "large_frames": large_frames,
    "steps": steps,
    "prompts": prompts,
    "outgoing": outgoing,
    "directory": directory,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_covers_the_worst_that_peers_can_fill(kind: str):
    held = KINDS[kind]()
    assert held > 0
    assert held <= getattr(peer_bytes(LIMITS), kind), kind


def test_every_kind_is_filled_here_or_counted_by_its_places():
    assert asdict(peer_bytes(LIMITS)).keys() == {*KINDS, "requests"}
    # an answer of the largest size at each place of a request; the request itself is a large frame in hand
    assert peer_bytes(LIMITS).requests == LIMITS.max_compute_streams * LIMITS.max_frame_bytes
    assert LIMITS.max_large_frames >= LIMITS.max_compute_streams


def test_the_sum_of_all_kinds_is_in_the_bound():
    together = peer_bytes(LIMITS)
    assert isinstance(together, PeerBytes)
    assert sum(fill() for fill in KINDS.values()) + together.requests <= together.total


def test_every_limit_that_lets_peers_hold_bytes_raises_the_bound():
    before = peer_bytes(Limits()).total
    for name in (
        "max_connections", "max_unread_bytes_per_connection", "max_unauthenticated_connections",
        "max_frame_bytes", "max_large_frames", "max_large_steps", "max_steps_in_flight", "max_streams",
        "max_compute_streams", "max_prompt_bytes", "max_records", "max_providers", "max_libp2p_streams",
        "max_libp2p_bytes_per_stream",
    ):  # fmt: skip
        changes: Any = {name: 2 * getattr(Limits(), name)}
        assert peer_bytes(replace(Limits(), **changes)).total > before, name


def test_an_adapter_that_is_trained_takes_no_more_than_the_bound_counts():
    """All that a peer may have, in bfloat16: its copies and their gradients; and what a part of it keeps."""
    capacity, hidden, rank = 4 * MIB, 512, 8
    room = int(capacity * Limits().adapter_share_per_peer)
    sites = room // (2 * rank * 2 * hidden)
    a, b = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((rank, hidden), (hidden, rank)))
    low = LowRank(a, b, 1.0)
    adapter = SpanAdapter("a", {0: {str(number): low for number in range(sites)}})
    assert adapter.nbytes == room
    base = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cpu"))
    span = AdaptedSpan(base, adapter, trains=True)
    leaves = [each for _, _, pair in span.leaves(0, 1) for each in pair]
    span.learn(0, 1, [torch.ones_like(each) for each in leaves])
    gradients = [each for pair in span.gradients[0].values() for each in pair]
    held = sum(each.nbytes for each in (*leaves, *gradients))
    assert held == TRAINED_COPIES * room
    few = SpanAdapter("a", {0: {str(number): low for number in range(7)}})
    kept = few.kept_bytes * PART_POSITIONS  # of a block with seven linears, in one part of a backward
    assert held + kept <= trained_bytes(hidden, capacity, Limits())


def test_journals_hold_no_more_than_the_bound_counts():
    row, tokens = 64 * 4, 500
    budget = JournalBudget(tokens)
    journals = [budget.open(number, 1, row, 400) for number in range(4)]
    for position in range(400):
        for journal in journals:
            budget.append(journal, position, 1, bytes(row))
            assert sum((each.stop - each.start) * row for each in journals) <= tokens * row
    assert budget.held <= tokens
