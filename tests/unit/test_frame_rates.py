"""How many messages without work a peer may send, alone and with others behind one address."""

from __future__ import annotations

import pytest

from node.serving.sessions import frame_rates, session_table
from node.serving.sessions.frame_rates import FrameRates
from node.serving.sessions.session_table import EndedSessions
from tensor_codec.errors import RemoteProtocolError
from tensor_codec.limits import Limits

LIMITS = Limits(where_per_second=10.0, frame_burst_seconds=4.0, frame_rate_peers_per_prefix=8)


def spent(rates: FrameRates, peer: str, now: float, *, prefix: str = "", sessions: int = 0) -> int:
    """Messages that are taken at once."""
    for count in range(10_000):
        try:
            rates.spend("where", peer, prefix, now, sessions)
        except RemoteProtocolError:
            return count
    raise AssertionError("there is no end")


def test_a_peer_has_a_burst_and_then_its_rate():
    rates = FrameRates(LIMITS)
    assert spent(rates, "a", 0.0) == 40
    assert spent(rates, "a", 1.2) == 11, "12 of them, less the one too many"
    assert spent(rates, "b", 1.2) == 40, "another peer has its own"
    assert spent(rates, "a", 100.0) == 40, "no more than a burst is saved up"
    for tenth in range(1000):
        rates.spend("where", "c", "", 200.0 + tenth / 10)


def test_a_peer_with_more_sessions_may_ask_more():
    rates = FrameRates(LIMITS)
    assert spent(rates, "a", 0.0, sessions=1) == 48
    assert spent(rates, "b", 0.0, sessions=64) == 552


def test_a_hop_that_passes_on_steps_of_many_clients_has_their_rates():
    rates = FrameRates(LIMITS)
    for _ in range(8 * 40):
        assert rates.spend("where", "hop", "192.0.2.7/32", 0.0, hop=True) == 0.0
    with pytest.raises(RemoteProtocolError):
        rates.spend("where", "hop", "192.0.2.7/32", 0.0, hop=True)


def test_each_kind_of_message_has_a_rate_of_its_own():
    rates = FrameRates(LIMITS)
    assert spent(rates, "a", 0.0) == 40
    assert rates.spend("relink", "a", "", 0.0) == 0.0
    assert rates.spend("idle step", "a", "", 0.0) == 0.0


def test_many_peers_of_one_prefix_wait_and_are_not_at_fault():
    rates, waits = FrameRates(LIMITS), []
    for number in range(20):
        waits += [rates.spend("where", f"peer{number}", "192.0.2.7/32", 0.0) for _ in range(40)]
    assert waits[:320] == [0.0] * 320
    assert waits[320] == pytest.approx(1 / 80)
    assert waits[-1] == pytest.approx((800 - 320) / 80), "each waits for those before it"
    assert rates.spend("where", "elsewhere", "198.51.100.1/32", 0.0) == 0.0
    assert rates.spend("where", "peer0", "192.0.2.7/32", 20.0) == 0.0


def test_made_up_peers_fill_no_memory_and_do_not_refill_the_bucket_of_their_prefix():
    rates = FrameRates(LIMITS)
    for number in range(3 * frame_rates.MAX_BUCKETS):
        last = rates.spend("where", f"peer{number}", "192.0.2.7/32", 0.0)
        assert len(rates._buckets) <= frame_rates.MAX_BUCKETS + 1
    assert last > 100


# Sessions that have ended


def test_a_feeders_late_steps_are_forgiven_for_a_minute_and_no_more_than_may_be_on_the_way():
    ended = EndedSessions()
    ended.add("feeder", b"s", 0.0)
    assert not ended.forgives("another", b"s", 1.0)
    assert not ended.forgives("feeder", b"t", 1.0)
    assert all(ended.forgives("feeder", b"s", 60.0) for _ in range(session_table.STEPS_FORGIVEN))
    assert not ended.forgives("feeder", b"s", 60.0)
    ended.add("feeder", b"s", 100.0)
    assert not ended.forgives("feeder", b"s", 161.0)
    assert ended._left == {}


def test_a_bounded_number_of_ended_sessions_is_remembered():
    ended = EndedSessions()
    for number in range(2 * session_table.MAX_REMEMBERED):
        ended.add("feeder", b"%d" % number, 0.0)
    assert len(ended._left) == session_table.MAX_REMEMBERED
    assert ended.forgives("feeder", b"%d" % (2 * session_table.MAX_REMEMBERED - 1), 1.0)
    assert not ended.forgives("feeder", b"0", 1.0)
