"""The attacks by name, grouped by what they turn against."""

from __future__ import annotations

from collections.abc import Mapping

from tests.hostile.attack import CONNECTIONS, Attack
from tests.hostile.attacks import connections, frames, sessions, streams

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
    Attack(sessions.session_holding),
    Attack(sessions.greedy_prefills),
    Attack(sessions.junk_uploads),
    Attack(sessions.giant_backward),
)
ATTACKS: Mapping[str, Attack] = {attack.name: attack for attack in _ALL}
