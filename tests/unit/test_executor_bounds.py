"""Queues of jobs and active peers at their edges: the last job that is taken, the moment of a deadline."""

from __future__ import annotations

import math

import pytest

from node.serving.executor.active_peers import ActivePeers
from node.serving.executor.job_queues import JobQueues
from node.serving.executor.jobs import Job, Kind, Piece, size_of
from tensor_codec.errors import LocalProtocolError, TooManyStreams
from tensor_codec.limits import Limits


def job(number: int, peer: str = "a", kind: Kind = Kind.DECODE, deadline: float = math.inf) -> Job:
    return Job(number, peer, kind, 1, 1, 0, 4, deadline)


def queues(steps: int = 5, of_a_peer: int = 3) -> JobQueues:
    limits = Limits(max_waiting_steps=steps, max_waiting_steps_per_peer=of_a_peer)
    return JobQueues(limits, max_stateless=3, max_stateless_per_peer=2)


def test_steps_of_both_kinds_count_together_and_stateless_requests_apart():
    waiting = queues()
    for number, kind in enumerate((Kind.DECODE, Kind.PREFILL, Kind.DECODE)):
        waiting.add(job(number, kind=kind))
    with pytest.raises(TooManyStreams, match="3 steps of yours wait for compute here, 3 may") as refusal:
        waiting.add(job(3, kind=Kind.PREFILL))
    assert refusal.value.retry_after_seconds == 1.0
    waiting.add(job(3, "b"))
    waiting.add(job(4, "b"))
    with pytest.raises(TooManyStreams, match="5 steps wait for compute here, 5 may") as refusal:
        waiting.add(job(5, "b"))
    assert refusal.value.retry_after_seconds == 1.0
    waiting.add(job(5, "a", Kind.STATELESS))
    waiting.add(job(6, "a", Kind.STATELESS))
    with pytest.raises(TooManyStreams, match="2 stateless requests of yours wait for compute here, 2 may"):
        waiting.add(job(7, "a", Kind.STATELESS))
    waiting.add(job(7, "b", Kind.STATELESS))
    with pytest.raises(TooManyStreams, match="3 stateless requests wait for compute here, 3 may"):
        waiting.add(job(8, "c", Kind.STATELESS))
    assert (waiting.waiting_of("a"), waiting.waiting_of("b"), waiting.waiting_of("c")) == (5, 3, 0)
    assert set(waiting.jobs) == set(waiting.done) == set(range(8))


def test_a_refused_job_leaves_nothing_behind_and_room_is_there_after_one_has_ended():
    waiting = queues(steps=1)
    first = job(0, deadline=9.0)
    waiting.add(first)
    with pytest.raises(TooManyStreams):
        waiting.add(job(1, "b", deadline=3.0))
    assert (waiting.next_deadline, list(waiting.jobs), waiting.lanes[Kind.DECODE].keys()) == (9.0, [0], {"a"})
    waiting.remove(first)
    assert (waiting.jobs, waiting.done, waiting.lanes[Kind.DECODE]) == ({}, {}, {})
    waiting.add(job(1, "b"))


def test_a_stateless_request_that_has_ended_makes_room():
    waiting = queues()
    for number in range(2):
        waiting.add(job(number, kind=Kind.STATELESS))
    waiting.remove(waiting.jobs[0])
    waiting.add(job(2, kind=Kind.STATELESS))
    assert [one.number for one in waiting.in_rounds(Kind.STATELESS)] == [1, 2]


def test_a_number_twice_is_our_own_bug():
    waiting = queues()
    waiting.add(job(0))
    with pytest.raises(LocalProtocolError, match="job 0 was submitted twice"):
        waiting.add(job(0, "b"))


def test_jobs_come_in_rounds_of_one_for_each_peer():
    waiting = queues()
    for number, peer in enumerate("aabac"):
        waiting.add(job(number, peer))
    assert [one.number for one in waiting.in_rounds(Kind.DECODE)] == [0, 2, 4, 1, 3]
    waiting.remove(waiting.jobs[1])
    assert [one.number for one in waiting.in_rounds(Kind.DECODE)] == [0, 2, 4, 3]
    assert waiting.in_rounds(Kind.PREFILL) == []
    alone = queues()
    for number in range(3):
        alone.add(job(number))
    assert [one.number for one in alone.in_rounds(Kind.DECODE)] == [0, 1, 2]


def test_a_job_expires_at_its_deadline_unless_it_has_begun():
    waiting = queues()
    for number, deadline in enumerate((5.0, 5.0, 5.0, 5.5, 7.0)):
        waiting.add(job(number, "ab"[number % 2], deadline=deadline))
    assert waiting.next_deadline == 5.0
    waiting.expire(4.9, ())
    assert (waiting.expired, waiting.next_deadline) == ([], 5.0)
    waiting.done[1] = 1  # a part of it has run
    waiting.expire(5.0, {2})  # it runs now
    assert [one.number for one in waiting.expired] == [0]
    assert (set(waiting.jobs), waiting.next_deadline) == ({1, 2, 3, 4}, 5.5)
    waiting.expire(8.0, {2})
    assert [one.number for one in waiting.expired] == [0, 3, 4]
    assert waiting.next_deadline == math.inf


def test_a_piece_counts_its_own_blocks_and_knows_whether_it_is_the_last():
    whole = Job(0, "a", Kind.PREFILL, 1, 10, 2, 6)
    assert (Piece(whole, 0, 9).last, Piece(whole, 0, 10).last, Piece(whole, 9, 1).last) == (False, True, True)
    assert size_of((Piece(whole, 3, 2),)) == (4, 2, [8])
    parts = Job(1, "a", Kind.STATELESS, 1, 10, 2, 6, parts=((4, 6), (2, 4)))
    assert (Piece(parts, 0, 10, 0).last, Piece(parts, 0, 10, 1).last) == (False, True)
    assert size_of((Piece(parts, 0, 10, 0),)) == size_of((Piece(parts, 0, 10, 1),)) == (2, 10, [20])


def test_a_peer_is_active_for_as_long_as_it_is_said_after_its_last_job():
    peers = ActivePeers(2.0)
    assert peers.look_at == math.inf
    peers.touch("a", 10.0, short_decode=True)
    peers.touch("b", 10.5, short_decode=False)
    assert peers.look_at == 12.0
    assert peers.short_decoders(11.9) == {"a"}
    assert peers.short_decoders(12.0) == set()
    peers.forget(12.0, {}.__contains__)
    assert set(peers.by_name) == {"a", "b"}
    peers.forget(12.1, {"a": 1, "b": 1}.__getitem__)
    assert set(peers.by_name) == {"a", "b"}, "it has jobs"
    peers.forget(12.1, {"a": 0, "b": 0}.__getitem__)
    assert (set(peers.by_name), peers.look_at) == ({"b"}, 12.5)
    peers.forget(13.0, {"b": 0}.__getitem__)
    assert (peers.by_name, peers.look_at) == ({}, math.inf)


def test_another_job_makes_a_peer_active_for_longer_and_not_a_short_decoder():
    peers = ActivePeers(2.0)
    first = peers.touch("a", 10.0, short_decode=True)
    assert peers.touch("a", 11.0, short_decode=False) is first
    assert (first.last_active_at, first.last_short_decode_at, peers.look_at) == (11.0, 10.0, 12.0)


def test_a_newcomer_begins_at_the_smallest_figure_of_the_others_and_never_lower_than_its_own():
    peers = ActivePeers(2.0)
    peers.touch("a", 0.0, short_decode=True)
    peers.charge_as_newcomer("a")
    assert peers.by_name["a"].compute_seconds == 0.0
    peers.by_name["a"].compute_seconds = 3.0
    peers.touch("b", 0.0, short_decode=True).compute_seconds = 5.0
    peers.touch("c", 0.0, short_decode=True)
    peers.charge_as_newcomer("c")
    assert peers.by_name["c"].compute_seconds == 3.0
    peers.charge_as_newcomer("b")
    assert peers.by_name["b"].compute_seconds == 5.0
