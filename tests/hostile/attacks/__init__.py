"""The attacks by name, grouped by what they turn against."""

from __future__ import annotations

from collections.abc import Mapping

from tests.hostile.attack import CONNECTIONS, SHARED, UPLOADS, Attack
from tests.hostile.attacks import adapters, connections, directory, frames, hops, kademlia, sessions, streams

TWO_COPIES, TWO_HOPS = ((0, 30), (0, 30)), ((0, 15), (15, 30))
_ALL = (
    Attack(connections.connection_flood, CONNECTIONS),
    Attack(connections.half_handshakes, CONNECTIONS),
    Attack(connections.byte_a_second, CONNECTIONS),
    Attack(connections.idle_connections, CONNECTIONS),
    Attack(connections.id_churn, CONNECTIONS),
    Attack(streams.stream_hold),
    Attack(streams.stream_flood),
    Attack(streams.open_and_reset),
    Attack(streams.window_violation),
    Attack(streams.ping_flood),
    Attack(streams.pong_flood),
    Attack(streams.control_flood),
    Attack(streams.stray_bytes),
    Attack(frames.giant_frames),
    Attack(frames.giant_first_frames),
    Attack(frames.many_frames),
    Attack(frames.header_bombs),
    Attack(sessions.where_flood),
    Attack(sessions.unknown_steps),
    Attack(sessions.session_holding, SHARED),
    Attack(sessions.greedy_prefills, SHARED),
    Attack(sessions.junk_uploads),
    Attack(adapters.junk_adapters, UPLOADS, check=adapters.blobs_sent),
    Attack(sessions.giant_backward),
    Attack(sessions.many_backwards, SHARED),
    Attack(directory.record_flood, check=directory.seen_by_all, announces=True),
    Attack(directory.sybil_servers, check=directory.found_fast),
    Attack(directory.dial_amplification, check=directory.few_dials),
    Attack(kademlia.kademlia_put, check=kademlia.none_taken),
    Attack(kademlia.kademlia_hold, check=kademlia.all_answered),
    Attack(kademlia.kademlia_poison, spans=TWO_COPIES, check=kademlia.servers_named),
    Attack(hops.lie_frame, spans=TWO_HOPS, stretch=3),
    Attack(hops.lie_stall, stretch=3),
    Attack(hops.lie_garbage, stretch=3),
    Attack(hops.lie_drip, stretch=3),
    Attack(hops.lie_refuse, stretch=3),
    Attack(hops.lie_rates, stretch=3),
)
ATTACKS: Mapping[str, Attack] = {attack.name: attack for attack in _ALL}
