"""Which steps run next, together: every promise of the batcher, and a server simulated on a virtual clock."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from node.serving.executor.active_peers import MAX_PASSED_OVER
from node.serving.executor.batch_cost import Cost
from node.serving.executor.batcher import Batcher, BatchPolicy
from node.serving.executor.jobs import Batch, Job, Kind, Piece, segments, size_of
from tensor_codec.errors import LocalProtocolError, Refused, TooManyStreams
from tensor_codec.limits import Limits

DECODE, PREFILL, STATELESS = Kind
BLOCKS = 10
# One row takes 11 ms through all blocks: 8 ms, and 3 ms for each position.
DECODE_SECONDS_PER_BLOCK, SECONDS_PER_BLOCK_TOKEN = 0.0011, 0.0003
NO_LIMIT = Limits(max_waiting_steps=10_000, max_waiting_steps_per_peer=10_000)


def batcher_of(limits: Limits = NO_LIMIT, **tunables: Any) -> Batcher:
    policy = BatchPolicy(**tunables)
    return Batcher(DECODE_SECONDS_PER_BLOCK, SECONDS_PER_BLOCK_TOKEN, limits, policy)


numbers = itertools.count()


def job(
    peer: str = "p",
    kind: Kind = DECODE,
    tokens: int = 1,
    rows: int = 1,
    blocks: tuple[int, int] = (0, BLOCKS),
    deadline: float = math.inf,
    parts: tuple[tuple[int, int], ...] = (),
    prefix: str = "",
) -> Job:
    return Job(next(numbers), peer, kind, rows, tokens, *blocks, deadline, parts, prefix)


def submit(batcher: Batcher, *jobs: Job, now: float = 0.0) -> None:
    for each in jobs:
        batcher.submit(each, now)


def predicted(batch: Batch) -> float:
    """What the batcher was told at the start that this batch costs; whole spans only."""
    positions = sum(piece.job.rows * piece.tokens for piece in batch)
    fixed = DECODE_SECONDS_PER_BLOCK - SECONDS_PER_BLOCK_TOKEN
    return BLOCKS * (fixed + SECONDS_PER_BLOCK_TOKEN * positions)


def run(batcher: Batcher, now: float = 0.0) -> Batch:
    """One batch that takes the predicted seconds; the clock stands still."""
    batch = batcher.next(now)
    assert batch is not None
    batcher.finished(batch, predicted(batch), now)
    return batch


def peers_of(batch: Batch) -> list[str]:
    return [piece.job.peer for piece in batch]


def kinds(batches: Sequence[Batch]) -> str:
    return "".join(batch[0].job.kind.name[0] for batch in batches)


def test_a_prefix_that_decodes_is_seen_by_others_for_a_moment():
    batcher = batcher_of()

    def others_decode(party: str, now: float) -> bool:
        return bool(batcher.parties.short_decoders(now) - {party})

    submit(batcher, job("a", prefix="192.0.2.1/32"))
    run(batcher)
    assert others_decode("198.51.100.1/32", 0.5)
    assert others_decode("b", 0.5)
    assert not others_decode("192.0.2.1/32", 0.5)
    submit(batcher, job("b", PREFILL), now=0.5)
    assert not others_decode("192.0.2.1/32", 0.5)
    submit(batcher, job("b"), now=0.5)
    assert others_decode("192.0.2.1/32", 0.5)
    assert not others_decode("c", 0.5 + batcher.policy.recently_active_seconds)


# Decode


def test_ready_decode_steps_of_all_sessions_run_in_one_batch_whatever_blocks_each_of_them_uses():
    batcher = batcher_of()
    jobs = [job("a"), job("b", blocks=(3, 7)), job("c", blocks=(8, 9)), job("d", tokens=3)]
    submit(batcher, *jobs)
    assert run(batcher) == tuple(Piece(each, 0, each.tokens) for each in jobs)
    assert batcher.next(0.0) is None


def test_segments_name_the_pieces_that_are_active_in_each_run_of_blocks():
    spans = [(0, 6), (2, 4), (4, 9), (20, 21)]
    assert segments([job(blocks=span) for span in spans]) == [
        (0, 2, (0,)),
        (2, 4, (0, 1)),
        (4, 6, (0, 2)),
        (6, 9, (2,)),
        (20, 21, (3,)),
    ]
    assert segments([]) == []


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 12)), max_size=6))
def test_segments_give_every_piece_each_of_its_blocks_once_and_in_order(spans: list[tuple[int, int]]):
    jobs = [job(blocks=(start, start + length)) for start, length in spans]
    seen: list[list[int]] = [[] for _ in jobs]
    last = 0
    for start, stop, active in segments(jobs):
        assert last <= start < stop
        assert active
        last = stop
        for index in active:
            seen[index] += range(start, stop)
    assert seen == [list(range(one.start, one.stop)) for one in jobs]


def test_one_peer_alone_gets_batches_as_large_as_the_rows_allow():
    batcher = batcher_of(max_rows=10)
    submit(batcher, *(job(rows=2) for _ in range(8)))
    assert [len(run(batcher)), len(run(batcher))] == [5, 3]


def test_a_sessions_rows_are_never_split_and_a_job_of_more_than_max_rows_runs_alone():
    batcher = batcher_of(max_rows=8)
    jobs = [job(rows=6), job(rows=20), job(rows=1)]
    submit(batcher, *jobs)
    assert [[piece.job for piece in run(batcher)] for _ in jobs] == [[each] for each in jobs]


def test_each_token_of_a_step_is_a_row_of_its_decode_batch():
    batcher = batcher_of(max_rows=16)
    submit(batcher, job(tokens=8), job(tokens=7), job(tokens=2), job(), job(tokens=16), job())
    assert [sum(piece.tokens for piece in run(batcher)) for _ in range(4)] == [15, 3, 16, 1]
    batcher = batcher_of()
    submit(batcher, job("a", tokens=4), job("b"))
    batch = batcher.next(0.0)
    assert batch is not None
    compute = {name: peer.compute_seconds for name, peer in batcher._peers.by_name.items()}
    assert batcher.finished(batch, 1.0, 0.0) == (BLOCKS, 5)
    now = batcher._peers.by_name
    charged = [now[peer].compute_seconds - compute[peer] for peer in ("a", "b")]
    assert charged == pytest.approx([0.8, 0.2]), "peers are charged by their tokens"


def test_every_peers_first_step_is_in_the_next_batch_and_who_did_not_fit_comes_first_then():
    batcher = batcher_of(max_rows=3)
    submit(batcher, *(job(peer) for peer in "aaabbcdd"))
    assert [peers_of(run(batcher)) for _ in range(3)] == [["a", "b", "c"], ["d", "a", "b"], ["d", "a"]]


def test_a_step_that_does_not_fit_is_not_overtaken_by_later_ones_of_its_peer():
    batcher = batcher_of(max_rows=8, joint_slowdown=100.0, absent_slowdown=100.0)
    submit(batcher, job("a", rows=5), job("b", rows=6), job("b", rows=1), job("c", rows=1))
    assert peers_of(run(batcher)) == ["a", "c"]
    assert peers_of(run(batcher)) == ["b", "b"]


def test_sixteen_equal_peers_are_in_one_batch():
    batcher = batcher_of()
    submit(batcher, *(job(f"peer {i}") for i in range(16)))
    assert len(run(batcher)) == 16


def test_while_others_are_active_further_steps_join_only_while_the_batch_stays_short():
    batcher = batcher_of()
    submit(batcher, *(job("flood") for _ in range(32)), job("honest"))
    assert Counter(peers_of(run(batcher))) == {"flood": 1, "honest": 1}  # 8 + 2 * 3 ms <= 1.5 * 11 ms
    # The honest one will be back: what it may have to wait for is as short as can be.
    assert Counter(peers_of(run(batcher))) == {"flood": 1}  # 8 + 2 * 3 ms > 1.25 * 11 ms
    away = batcher.policy.recently_active_seconds + 0.1
    assert Counter(peers_of(run(batcher, now=away))) == {"flood": 30}  # alone again


def test_where_rows_cost_next_to_nothing_batches_stay_large_beside_others():
    batcher = Batcher(0.0003, 0.000002, NO_LIMIT)
    submit(batcher, *(job("flood") for _ in range(32)), job("honest"))
    assert len(run(batcher)) == 33


# Prefill


def test_a_prefill_runs_in_chunks_in_order():
    batcher = batcher_of(chunk_positions=10)
    long, wide = job(kind=PREFILL, tokens=25), job(kind=PREFILL, rows=4, tokens=5)
    submit(batcher, long, wide)
    assert [run(batcher)[0] for _ in range(3)] == [
        Piece(long, 0, 10),
        Piece(long, 10, 10),
        Piece(long, 20, 5),
    ]
    assert [run(batcher)[0] for _ in range(3)] == [Piece(wide, 0, 2), Piece(wide, 2, 2), Piece(wide, 4, 1)]
    assert Piece(wide, 4, 1).last
    assert not Piece(wide, 2, 2).last
    assert batcher.waiting == 0


def test_short_prefills_of_a_peer_share_a_batch_of_one_chunk():
    batcher = batcher_of(chunk_positions=10)
    first, second, wide, third = (
        job(kind=PREFILL, tokens=3), job(kind=PREFILL, tokens=4), job(kind=PREFILL, rows=2, tokens=2),
        job(kind=PREFILL, tokens=3),
    )  # fmt: skip
    other = job("other", PREFILL, 1)
    submit(batcher, first, second, wide, third, other)
    # The wide one would make it eleven; the next batch is for the other peer that waits.
    assert run(batcher) == (Piece(first, 0, 3), Piece(second, 0, 4), Piece(third, 0, 3))
    assert run(batcher) == (Piece(other, 0, 1),)
    assert run(batcher) == (Piece(wide, 0, 2),)
    assert batcher.waiting == 0


def test_the_end_of_a_long_prefill_leaves_room_for_a_short_one():
    batcher = batcher_of(chunk_positions=10)
    long, short = job(kind=PREFILL, tokens=14), job(kind=PREFILL, tokens=6)
    submit(batcher, long, short)
    assert run(batcher) == (Piece(long, 0, 10),)
    assert run(batcher) == (Piece(long, 10, 4), Piece(short, 0, 6))


def test_a_chunk_has_at_least_one_token_of_each_row():
    batcher = batcher_of(chunk_positions=10)
    submit(batcher, job(kind=PREFILL, rows=30, tokens=2))
    assert [run(batcher)[0].tokens for _ in range(2)] == [1, 1]


def test_a_chunk_is_short_while_another_peer_decodes_and_long_when_it_has_gone():
    batcher = batcher_of()
    submit(batcher, job("honest"), job("flood", PREFILL, 512))
    assert kinds([run(batcher)]) == "D"
    chunk = run(batcher)
    # Of 2.75 rows' time the next decode batch takes 14 / 11, with the row that may still come.
    assert chunk[0].tokens == int((1.5 + 1.25 - 1) * 11 / 3 - 8 / 3)
    assert run(batcher, now=batcher.policy.recently_active_seconds + 0.1)[0].tokens == 256


def test_peers_that_all_prefill_and_do_not_decode_need_no_short_chunks():
    batcher = batcher_of()
    submit(batcher, job("a", PREFILL, 300), job("b", PREFILL, 300))
    batches = [run(batcher)[0] for _ in range(4)]
    assert [(piece.job.peer, piece.tokens) for piece in batches] == [
        ("a", 256),
        ("b", 256),
        ("a", 44),
        ("b", 44),
    ]


def test_a_decode_step_waits_for_one_chunk_at_most_and_the_batch_it_just_missed():
    batcher = batcher_of(chunk_positions=16)
    submit(
        batcher, *(job(kind=PREFILL, tokens=64) for _ in range(2)), *(job(kind=STATELESS) for _ in range(2))
    )
    batches = []
    for _ in range(14):
        submit(batcher, job(), job())
        batches.append(run(batcher))
    assert kinds(batches) == "DPDSDPDSDPDPDP"


def test_a_step_of_a_peer_that_missed_the_last_batch_does_not_wait_for_the_chunk():
    batcher = batcher_of()
    submit(batcher, job("a"), job("a", PREFILL, 512))
    missed = batcher.next(0.0)
    assert missed is not None
    submit(batcher, job("a"), job("b"))
    batcher.finished(missed, 0.011, 0.0)
    assert peers_of(run(batcher)) == ["a", "b"]
    submit(batcher, job("c"))  # one batch goes ahead, not one after the other
    assert kinds([run(batcher), run(batcher)]) == "PD"


def test_the_peer_that_had_the_least_compute_prefills_next():
    batcher = batcher_of()
    submit(
        batcher,
        job("a", PREFILL, 512), job("a", PREFILL, 10), job("b", PREFILL, 130), job("b", PREFILL, 130),
    )  # fmt: skip
    assert [run(batcher)[0].job.peer for _ in range(4)] == ["a", "b", "b", "a"]


def test_time_away_earns_no_compute():
    batcher = batcher_of(recently_active_seconds=1000.0)
    submit(batcher, job("away", PREFILL, 1))
    run(batcher)
    submit(batcher, *(job("here", PREFILL, 256) for _ in range(10)))
    for _ in range(8):
        run(batcher)
    submit(batcher, *(job("away", PREFILL, 256) for _ in range(2)))
    assert [run(batcher)[0].job.peer for _ in range(3)] == ["here", "away", "here"]


@pytest.mark.parametrize("seed", range(20))
def test_nobody_is_passed_over_for_ever(seed: int):
    """Whatever the others submit, the first job of a peer in each class runs soon."""
    peers = "abcd"
    batcher = batcher_of(chunk_positions=4, max_stateless=100)
    decodes_between = 2  # one that let the chunk wait, and one that always comes between two others
    bound = 2 * (1 + decodes_between) * (MAX_PASSED_OVER + len(peers))
    since: dict[tuple[Kind, str], int] = {}
    rng = random.Random(seed)
    most_tokens = {DECODE: 1, PREFILL: 40, STATELESS: 2}  # none so long that it must rest
    for turn in range(200):
        for kind, peer in itertools.product(Kind, peers):
            if (kind, peer) not in since and rng.random() < 0.75:
                submit(batcher, job(peer, kind, rng.randint(1, most_tokens[kind])))
                since[kind, peer] = turn
        if not since:
            continue
        for piece in run(batcher):
            key = (piece.job.kind, piece.job.peer)
            since[key] = turn
            if piece.last:
                del since[key]
        assert all(turn - first <= bound for first in since.values())


# Stateless, and what cannot be short


def test_stateless_requests_and_prefills_alternate_when_both_wait():
    batcher = batcher_of(chunk_positions=16)
    submit(batcher, job("a", PREFILL, 64), *(job("b", STATELESS, 16) for _ in range(3)))
    assert kinds([run(batcher) for _ in range(7)]) == "PSPSPSP"


def test_stateless_requests_run_alone_and_those_without_parts_whole():
    batcher = batcher_of(chunk_positions=16)
    jobs = [job(kind=STATELESS, rows=2, tokens=500), job(kind=STATELESS)]
    submit(batcher, *jobs)
    assert [run(batcher) for _ in jobs] == [(Piece(each, 0, each.tokens),) for each in jobs]


PARTS = ((0, 4), (4, 8), (8, 10), (4, 8), (0, 4))


def test_a_stateless_request_runs_in_its_parts_in_order():
    batcher = batcher_of()
    long = job(kind=STATELESS, tokens=500, parts=PARTS)
    submit(batcher, long)
    pieces = [run(batcher)[0] for _ in PARTS]
    assert [(piece.part, piece.job.parts[piece.part], piece.last) for piece in pieces] == [
        (index, part, index == len(PARTS) - 1) for index, part in enumerate(PARTS)
    ]
    assert batcher.waiting == 0


def test_a_decode_step_waits_for_one_part_of_a_stateless_request_at_most():
    batcher = batcher_of()
    submit(batcher, job(kind=STATELESS, tokens=2, parts=PARTS))
    batches = []
    for _ in range(2 * len(PARTS)):
        submit(batcher, job())
        batches.append(run(batcher))
    assert kinds(batches) == "DS" * len(PARTS)


def test_a_request_that_has_begun_ends_before_another_one_begins_whoever_had_less_compute():
    batcher = batcher_of()
    first, second = job("a", STATELESS, 500, parts=PARTS), job("b", STATELESS, 500, parts=PARTS)
    submit(batcher, first)
    batches = [run(batcher)]
    submit(batcher, second, job("c", STATELESS))
    batches += [run(batcher) for _ in range(2 * len(PARTS))]
    jobs = [batch[0].job for batch in batches]
    assert jobs[: len(PARTS)] == [first] * len(PARTS)
    assert [one for one in jobs if one is second] == jobs[jobs.index(second) :][: len(PARTS)]
    assert batcher.waiting == 0


def test_a_long_part_starts_a_cool_down_and_the_next_one_waits_for_its_end():
    batcher = batcher_of(stateless_rest=1.0)
    submit(batcher, job("honest"))
    run(batcher)
    submit(batcher, job("trainer", STATELESS, 500, parts=PARTS))
    batch = batcher.next(0.1)
    assert batch is not None
    batcher.finished(batch, 0.3, 0.4)
    assert batcher.next(0.4) is None
    assert batcher.resume_at(0.4) == pytest.approx(0.7)
    assert run(batcher, now=0.7)[0].part == 1


@pytest.mark.parametrize("long", [(STATELESS, 100, 1), (DECODE, 1, 30), (PREFILL, 9, 30)])
def test_what_cannot_be_short_starts_a_cool_down_as_long_as_it_took_if_others_decode(
    long: tuple[Kind, int, int],
):
    kind, tokens, rows = long
    batcher = batcher_of(stateless_rest=1.0, prefill_rest=1.0)
    submit(batcher, job("honest"), now=0.0)
    run(batcher)
    submit(batcher, *(job("flood", kind, tokens, rows) for _ in range(2)))
    batch = batcher.next(0.1)
    assert batch is not None
    batcher.finished(batch, 0.3, 0.4)
    assert batcher.next(0.4) is None
    assert batcher.resume_at(0.4) == pytest.approx(0.7)
    submit(batcher, job("honest"), now=0.5)
    assert peers_of(run(batcher, now=0.5)) == ["honest"]
    assert batcher.next(0.69) is None
    assert peers_of(run(batcher, now=0.7)) == ["flood"]


def test_after_a_long_part_of_a_request_others_that_decode_have_the_server_seven_times_as_long():
    batcher = batcher_of()
    submit(batcher, job("honest"))
    run(batcher)
    submit(batcher, job("trainer", STATELESS, 500, parts=PARTS))
    batch = batcher.next(0.1)
    assert batch is not None
    batcher.finished(batch, 0.3, 0.4)
    submit(batcher, job("honest"), now=1.0)
    assert peers_of(run(batcher, now=1.0)) == ["honest"]
    assert batcher.next(2.49) is None
    assert batcher.resume_at(2.49) == pytest.approx(2.5)
    assert run(batcher, now=2.5)[0].part == 1


def test_a_prompt_of_the_only_peer_that_decodes_is_not_cut_for_a_peer_with_a_request():
    batcher = batcher_of()
    submit(batcher, job("honest"))
    run(batcher)
    submit(batcher, job("trainer", STATELESS, 500, parts=PARTS), job("honest", PREFILL, 10))
    pieces = [piece for batch in (run(batcher), run(batcher, now=0.1)) for piece in batch]
    assert [piece.tokens for piece in pieces if piece.job.kind is PREFILL] == [10]


def test_a_chunk_beside_a_decoder_is_as_long_as_the_pass_over_the_weights_and_starts_a_cool_down():
    def next_chunk(per_position: float) -> tuple[int, float]:
        batcher = Batcher(0.008, per_position)  # of a block: a step, and a position of a prefill
        submit(batcher, job("honest"))
        run(batcher)
        submit(batcher, job("flood", PREFILL, 200))
        batch = batcher.next(0.1)
        assert batch is not None
        batcher.finished(batch, 0.2, 0.3)
        submit(batcher, job("honest"), now=0.3)
        assert peers_of(run(batcher, now=0.3)) == ["honest"]
        return batch[0].tokens, batcher.resume_at(0.3)

    tokens, resume_at = next_chunk(0.0007)
    assert tokens == 10
    assert resume_at == pytest.approx(0.6)
    tokens, resume_at = next_chunk(0.0001)  # so cheap that sixteen are short
    assert tokens > 16
    assert resume_at == math.inf


def test_a_cool_down_ends_when_nobody_decodes_any_more():
    batcher = batcher_of()
    submit(batcher, job("honest"))
    run(batcher)
    submit(batcher, job("trainer", STATELESS, 500, parts=PARTS))
    batch = batcher.next(0.1)
    assert batch is not None
    batcher.finished(batch, 3.0, 3.1)
    assert run(batcher, now=3.1)[0].part == 1, "honest has not decoded for so long"
    submit(batcher, job("honest"), now=3.2)
    assert peers_of(run(batcher, now=3.2)) == ["honest"]
    assert batcher.next(3.3) is None
    resume_at = batcher.resume_at(3.3)
    assert resume_at == pytest.approx(5.2, abs=0.01)
    assert run(batcher, now=resume_at)[0].part == 2


def test_a_cool_down_holds_nobody_back_where_all_requests_are_long_or_a_peer_is_alone():
    for others in ([], ["another"]):
        batcher = batcher_of()
        submit(batcher, *(job(peer, STATELESS, 500) for peer in ["trainer", "trainer", *others]))
        for _ in range(2 + len(others)):
            run(batcher)
        assert batcher.waiting == 0


def test_only_long_steps_of_a_peer_wait_for_the_cool_down_and_not_short_ones_after_them():
    batcher = batcher_of()
    submit(batcher, job("honest"), *(job("mixed", rows=30) for _ in range(2)), job("mixed"))
    assert peers_of(run(batcher)) == ["honest", "mixed"]
    assert [piece.job.rows for piece in run(batcher)] == [1]
    assert batcher.next(0.0) is None


# Adapters


def adapted(one: Job, weight: float, adapter: str) -> Job:
    return replace(one, weight=weight, adapter=adapter)


def test_an_adapter_s_values_count_once_for_all_jobs_that_have_it():
    plain = [Piece(job(), 0, 1) for _ in range(3)]
    assert size_of(tuple(plain)) == (BLOCKS, 3, [BLOCKS] * 3)
    own = [Piece(adapted(job(), 1.5, name), 0, 1) for name in "aab"]
    assert size_of(tuple(own)) == (2 * BLOCKS, 3, [1.5 * BLOCKS] * 3)
    half = Piece(adapted(job(blocks=(0, BLOCKS // 2)), 1.5, "c"), 0, 1)
    assert size_of((*plain, half)) == (1.25 * BLOCKS, 4, [*[BLOCKS] * 3, 0.75 * BLOCKS])


def test_a_peer_is_charged_for_the_time_that_its_adapter_adds():
    batcher = batcher_of()
    submit(batcher, job("plain"), adapted(job("guest"), 1.5, "a"), job("other"))
    batch = run(batcher)
    assert len(batch) == 3
    spent = {name: peer.compute_seconds for name, peer in batcher._peers.by_name.items()}
    assert sum(spent.values()) == pytest.approx(predicted(batch))
    assert spent["plain"] == pytest.approx(spent["other"])
    cost = Cost(DECODE_SECONDS_PER_BLOCK - SECONDS_PER_BLOCK_TOKEN, SECONDS_PER_BLOCK_TOKEN)
    # Half a block's reading for every block, and half more for its own position.
    added = cost.seconds(BLOCKS / 2, BLOCKS / 2)
    assert spent["guest"] - spent["plain"] > 0.9 * added


def test_further_rows_with_other_adapters_join_only_while_the_batch_is_short():
    def joined(weight: float, names: str) -> int:
        batcher = batcher_of(joint_slowdown=3.0)
        submit(batcher, job("watcher"))
        run(batcher)
        steps = [adapted(job("guest"), weight, name) for name in names]
        submit(batcher, job("watcher"), *steps)
        return len(run(batcher)) - 1

    assert joined(1.2, "abcdefgh") < joined(1.2, "aaaaaaaa") < joined(1, "aaaaaaaa") < 8


def test_a_chunk_and_a_request_with_an_adapter_count_as_much_longer():
    batcher = batcher_of()
    submit(batcher, job("short"))
    run(batcher)
    submit(batcher, job("plain", PREFILL, 200))
    plain = run(batcher)[0].tokens
    other = batcher_of()
    submit(other, job("short"))
    run(other)
    submit(other, adapted(job("guest", PREFILL, 200), 2.0, "a"))
    assert 1 <= run(other)[0].tokens < plain
    costs = batcher.costs
    request = job(kind=STATELESS, tokens=500, parts=PARTS)
    assert costs.stateless_seconds(adapted(request, 1.5, "a")) == 1.5 * costs.stateless_seconds(request)


# Bounds, cancelling, deadlines


def test_queues_are_bounded_for_all_and_for_each_peer_and_apart_for_stateless_requests():
    limits = Limits(max_waiting_steps=4, max_waiting_steps_per_peer=2)
    batcher = batcher_of(limits, max_stateless=3, max_stateless_per_peer=2)
    submit(batcher, job("a"), job("a", PREFILL, 5))
    with pytest.raises(TooManyStreams, match="2 steps of yours wait for compute here, 2 may") as refusal:
        submit(batcher, job("a"))
    assert refusal.value.retry_after_seconds is not None
    submit(batcher, job("a", STATELESS), job("a", STATELESS))
    with pytest.raises(TooManyStreams, match="2 stateless requests of yours"):
        submit(batcher, job("a", STATELESS))
    submit(batcher, job("b"), job("b"), job("b", STATELESS))
    with pytest.raises(TooManyStreams, match="4 steps wait for compute here, 4 may"):
        submit(batcher, job("c"))
    with pytest.raises(TooManyStreams, match="3 stateless requests wait for compute here, 3 may"):
        submit(batcher, job("c", STATELESS))
    assert (batcher.waiting, batcher._queues.waiting_of("a"), batcher._queues.waiting_of("c")) == (7, 4, 0)


def test_what_is_cancelled_is_not_begun_and_makes_room_at_once():
    batcher = batcher_of(Limits(max_waiting_steps=1))
    first, second = job(), job()
    submit(batcher, first)
    batcher.cancel(first.number)
    submit(batcher, second)
    assert [piece.job for piece in run(batcher)] == [second]
    batcher.cancel(second.number)  # it is done: nothing happens
    assert batcher.next(0.0) is None


def test_a_prefill_that_is_cancelled_in_mid_chunk_runs_no_further():
    batcher = batcher_of(chunk_positions=8)
    long, other = job(kind=PREFILL, tokens=64), job(kind=PREFILL, tokens=8)
    submit(batcher, long, other)
    batch = batcher.next(0.0)
    assert batch == (Piece(long, 0, 8),)
    batcher.cancel(long.number)
    batcher.finished(batch, 0.03, 0.0)
    assert run(batcher) == (Piece(other, 0, 8),)
    assert batcher.waiting == 0


def test_an_expired_job_is_never_begun_and_returned_once():
    batcher = batcher_of()
    late, never_returned, good = job(deadline=1.0), job(deadline=1.0), job(deadline=1.1)
    submit(batcher, late, never_returned, good)
    batch = batcher.next(1.0)
    assert batch == (Piece(good, 0, 1),)
    batcher.cancel(never_returned.number)
    assert batcher.waiting == 1
    assert batcher.expired(2.0) == [late]  # what runs is not late any more
    assert batcher.expired(2.0) == []
    batcher.finished(batch, 1.0, 2.0)
    assert batcher.waiting == 0


def test_a_prefill_that_has_begun_by_its_deadline_goes_on():
    batcher = batcher_of(chunk_positions=8)
    long, late = job(kind=PREFILL, tokens=16, deadline=5.0), job(kind=PREFILL, tokens=16, deadline=5.0)
    submit(batcher, long, late)
    assert run(batcher, now=4.9) == (Piece(long, 0, 8),)
    assert batcher.expired(4.95) == []
    assert run(batcher, now=5.0) == (Piece(long, 8, 8),)
    assert batcher.expired(5.0) == [late]
    assert batcher.waiting == 0


def test_our_own_mistakes_are_bugs():
    batcher = batcher_of()
    first = job()
    submit(batcher, first)
    with pytest.raises(LocalProtocolError, match="twice"):
        submit(batcher, first)
    batch = batcher.next(0.0)
    assert batch is not None
    with pytest.raises(LocalProtocolError, match="while one is running"):
        batcher.next(0.0)
    with pytest.raises(LocalProtocolError, match="not running"):
        batcher.finished((), 1.0, 0.0)
    batcher.finished(batch, 1.0, 0.0)
    with pytest.raises(LocalProtocolError, match="not running"):
        batcher.finished(batch, 1.0, 0.0)


# Costs


def test_a_cost_is_learned_from_what_batches_took():
    cost = Cost(per_block=1e-3, per_position=1e-3)
    for _ in range(300):
        for rows in (1, 3, 8):
            cost.learn(BLOCKS, BLOCKS * rows, BLOCKS * (4e-3 + 2e-4 * rows))
    assert cost.per_block == pytest.approx(4e-3, rel=1e-3)
    assert cost.per_position == pytest.approx(2e-4, rel=1e-2)


def test_one_hiccup_does_not_change_a_cost_much():
    cost = Cost(per_block=8e-4, per_position=3e-4)
    before = cost.seconds(BLOCKS, BLOCKS)
    cost.learn(BLOCKS, BLOCKS, 100.0)
    assert cost.seconds(BLOCKS, BLOCKS) < 2 * before


positive = st.floats(1e-6, 1.0)


@given(
    positive,
    positive,
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 512), st.floats(0, 100)), max_size=20),
)
def test_a_prediction_is_never_zero_and_grows_with_the_work(
    per_block: float, per_position: float, batches: list[tuple[int, int, float]]
):
    cost = Cost(per_block, per_position)
    for blocks, positions, seconds in batches:
        cost.learn(blocks, blocks * positions, seconds)
        assert 0 < cost.seconds(1, 1) < cost.seconds(1, 2) < cost.seconds(2, 2)


# A server on a virtual clock


@dataclass(frozen=True, slots=True)
class Client:
    """Submits one job after the other, `think` seconds after each answer."""

    peer: str
    kind: Kind = DECODE
    tokens: int = 1
    rows: int = 1
    think: float = 0.0
    prefix: str = ""


def small(batch: Batch) -> float:
    """8 ms a decode batch and 3 ms a row; 3 ms a token of anything else."""
    positions = sum(piece.job.rows * piece.tokens for piece in batch)
    return 0.003 * positions + (0.008 if batch[0].job.kind is DECODE else 0.0)


def big(batch: Batch) -> float:
    """9 ms a batch and next to nothing a row."""
    return 0.009 + 0.00008 * sum(piece.job.rows * piece.tokens for piece in batch)


def answers(clients: Sequence[Client], server: Callable[[Batch], float], seconds: float = 8.0) -> list[int]:
    """How many answers each client gets in so many seconds."""
    batcher = batcher_of(max_stateless=1000, max_stateless_per_peer=1000)
    arrivals = [(i * 1e-6, i) for i in range(len(clients))]
    owners: dict[int, int] = {}
    done = [0] * len(clients)
    now = 0.0

    def arrive(until: float) -> None:
        while arrivals and arrivals[0][0] <= until:
            at, index = heapq.heappop(arrivals)
            client = clients[index]
            new = job(client.peer, client.kind, client.tokens, client.rows, prefix=client.prefix)
            owners[new.number] = index
            batcher.submit(new, at)

    while now < seconds:
        arrive(now)
        batch = batcher.next(now)
        if batch is None:
            now = min(arrivals[0][0] if arrivals else math.inf, batcher.resume_at(now))
            continue
        took = server(batch)
        arrive(now + took)
        now += took
        batcher.finished(batch, took, now)
        for piece in batch:
            if piece.last:
                index = owners[piece.job.number]
                done[index] += 1
                heapq.heappush(arrivals, (now + clients[index].think, index))
    return done


SHORT_FLOOD = [Client("flood")] * 32 + [Client("flood", PREFILL, 512)] * 32
LONG_FLOODS = {
    "sessions of many rows": [Client("flood", rows=64)] * 8,
    "drafts": [Client("flood", tokens=16)] * 8,
    "prefills of many rows": [Client("flood", PREFILL, 64, rows=64)] * 8,
    "large stateless requests": [Client("flood", STATELESS, 256)] * 8,
}


@pytest.mark.parametrize("think", [0.010, 0.015, 0.020, 0.025, 0.040])
def test_a_peer_with_one_session_keeps_half_of_its_speed_beside_one_that_floods(think: float):
    honest = Client("honest", think=think)
    alone = answers([honest], small)[0]
    assert answers([honest, *SHORT_FLOOD], small)[0] >= 0.5 * alone


@pytest.mark.parametrize("flood", LONG_FLOODS)
@pytest.mark.parametrize("think", [0.015, 0.040])
def test_it_keeps_half_of_its_speed_beside_batches_that_cannot_be_short(think: float, flood: str):
    honest = Client("honest", think=think)
    alone = answers([honest], small)[0]
    # Less the step that the end of each rest catches.
    assert answers([honest, *LONG_FLOODS[flood]], small)[0] >= 0.48 * alone


@pytest.mark.parametrize(
    "flood", [[Client("flood", PREFILL, 512)] * 8, LONG_FLOODS["large stateless requests"]]
)
def test_drafts_wait_for_no_longer_chunks_and_parts_than_single_tokens(flood: list[Client]):
    single, drafts = (Client("honest", tokens=tokens, think=0.02) for tokens in (1, 8))
    kept = [answers([one, *flood], small)[0] / answers([one], small)[0] for one in (single, drafts)]
    assert kept[1] >= 0.9 * kept[0]


def test_drafts_do_not_wait_for_each_other():
    drafts = [Client(f"p{number}", tokens=8, think=0.02) for number in range(4)]
    done = answers(drafts, small)
    cycle = 0.02 + 0.008 + 4 * 8 * 0.003  # all four in one batch, without a rest after it
    assert min(done) >= 0.9 * 8.0 / cycle
    assert max(done) - min(done) <= 2


def test_drafts_leave_others_their_speed_and_are_not_starved():
    honest = Client("honest", think=0.02)
    alone = answers([honest], small)[0]
    beside = answers([honest, *(Client("drafts", tokens=8, think=0.02),) * 3], small)
    assert beside[0] >= 0.48 * alone
    assert min(beside[1:]) >= 0.2 * answers([Client("drafts", tokens=8, think=0.02)], small)[0]


@pytest.mark.parametrize("think", [0.015, 0.020, 0.040])
def test_a_peer_with_one_session_keeps_half_of_its_speed_where_rows_cost_next_to_nothing(think: float):
    honest = Client("honest", think=think)
    alone = answers([honest], big)[0]
    beside = answers([honest, *SHORT_FLOOD], big)
    assert beside[0] >= 0.5 * alone
    assert sum(beside[1:33]) > 4 * beside[0]  # and the flood still has large batches


def stepwise(batch: Batch) -> float:
    """A row alone takes half of what any batch takes."""
    return 0.030 if sum(piece.job.rows * piece.job.tokens for piece in batch) == 1 else 0.060


@pytest.mark.parametrize("think", [0.05, 3.0])
def test_a_peer_keeps_its_speed_beside_a_crowd_where_two_rows_take_twice_as_long_as_one(think: float):
    honest = Client("honest", think=0.013, prefix=HOME)
    crowd = [Client(f"id {number % 4}", think=think, prefix=CROWD) for number in range(256)]
    alone = answers([honest], stepwise)[0]
    beside = answers([honest, *crowd], stepwise)
    assert beside[0] >= 0.8 * alone
    assert sum(beside[1:]) >= 0.4 * beside[0]


def test_a_peer_keeps_its_speed_beside_the_prompts_of_a_crowd():
    honest = Client("honest", think=0.015, prefix=HOME)
    crowd = [Client(f"id {number % 4}", PREFILL, 12, prefix=CROWD) for number in range(32)]
    alone = answers([honest], small, 24.0)[0]
    beside = answers([honest, *crowd], small, 24.0)
    assert beside[0] >= 0.75 * alone
    assert min(beside[1:]) > 0


def test_the_prompts_of_a_crowd_do_not_cut_the_prompt_of_another_prefix():
    batcher = batcher_of()
    submit(batcher, *(job(f"id {number % 4}", PREFILL, 200, prefix=CROWD) for number in range(32)))
    submit(batcher, job("honest", prefix=HOME))
    assert peers_of(run(batcher)) == ["honest"]
    submit(batcher, job("honest", PREFILL, 10, prefix=HOME))
    pieces = [piece for _ in range(2) for piece in run(batcher, now=0.1)]
    assert [piece.tokens for piece in pieces if piece.job.peer == "honest"] == [10]


def test_equal_crowds_do_not_rest():
    one = [Client(f"near {number}", think=0.015, prefix=HOME) for number in range(20)]
    other = [Client(f"far {number}", think=0.015, prefix=CROWD) for number in range(20)]
    done = answers([*one, *other], small)
    assert min(done) > 0.8 * max(done)
    assert sum(done) > 8.0 / 0.006  # ten rows a batch: 38 ms


def test_a_rest_ends_when_those_it_is_for_have_gone():
    batcher = batcher_of()
    submit(batcher, *(job("flood", prefix=CROWD) for _ in range(32)), job("honest", prefix=HOME))
    batch = batcher.next(0.0)
    assert batch is not None
    batcher.finished(batch, 3.0, 3.0)  # as slow as that once
    away = batcher.policy.recently_active_seconds
    submit(batcher, job("honest", prefix=HOME), now=3.0)
    run(batcher, now=3.0)
    assert batcher.next(3.1) is None
    assert batcher.resume_at(3.1) == pytest.approx(3.0 + away, abs=0.01)
    assert run(batcher, now=batcher.resume_at(3.1))


def test_a_flood_is_not_starved_either():
    beside = answers([Client("honest", think=0.015), *SHORT_FLOOD], small, 20.0)
    assert min(beside[1:33]) > 0
    assert sum(beside[33:]) > 0


def test_sixteen_equal_peers_stay_together_and_are_served_equally():
    done = answers([Client(f"peer {i}", think=0.015) for i in range(16)], small)
    assert min(done) > 0.95 * max(done)
    one_by_one = 8.0 / 0.011
    assert sum(done) > 2 * one_by_one


# Many peers behind one address

HOME, CROWD = "192.0.2.1/32", "198.51.100.1/32"


@pytest.mark.parametrize("think", [0.015, 0.040])
@pytest.mark.parametrize(
    "flood",
    [(DECODE, 1, 1), (PREFILL, 512, 1), (DECODE, 1, 64), (STATELESS, 256, 1)],
    ids=["steps", "prefills", "many rows", "requests"],
)
def test_a_peer_keeps_its_speed_beside_a_crowd_behind_one_address_as_beside_one_peer(
    flood: tuple[Kind, int, int], think: float
):
    honest = Client("honest", think=think, prefix=HOME)
    crowd = [Client(f"id {number}", *flood, prefix=CROWD) for number in range(64)]
    alone = answers([honest], small)[0]
    assert answers([honest, *crowd], small)[0] >= 0.42 * alone


def test_a_crowd_behind_the_only_address_is_served_as_peers_of_many_addresses_are():
    near = [Client(f"peer {i}", think=0.015, prefix=CROWD) for i in range(16)]
    far = [Client(f"peer {i}", think=0.015, prefix=f"192.0.2.{i}/32") for i in range(16)]
    assert answers(near, small) == answers(far, small)
    prefills = [Client(f"peer {i}", PREFILL, 100, prefix=CROWD) for i in range(5)]
    unknown = [Client(f"peer {i}", PREFILL, 100) for i in range(5)]
    assert answers(prefills, small) == answers(unknown, small)


def test_a_crowd_shares_its_part_equally():
    crowd = [Client(f"id {number}", prefix=CROWD) for number in range(12)]
    done = answers([Client("honest", think=0.015, prefix=HOME), *crowd], small, 20.0)
    assert min(done[1:]) > 0.7 * max(done[1:])


def test_prefills_alternate_between_addresses_however_many_peers_one_has():
    done = answers(
        [Client("honest", PREFILL, 100, prefix=HOME)]
        + [Client(f"id {number}", PREFILL, 100, prefix=CROWD) for number in range(8)],
        small,
        20.0,
    )
    assert done[0] >= 0.45 * sum(done)


def test_where_the_queue_is_full_the_address_with_the_most_jobs_makes_room_for_others():
    limits = Limits(max_waiting_steps=8, max_waiting_steps_per_peer=4)
    batcher = batcher_of(limits)
    crowd = [job(f"id {number // 4}", prefix=CROWD) for number in range(8)]
    submit(batcher, *crowd)
    batch = batcher.next(0.0)
    assert batch is not None
    submit(batcher, job("honest", prefix=HOME), job("honest", PREFILL, 3, prefix=HOME))
    running = {piece.job.number for piece in batch}
    (first, second) = batcher.expired(0.0)
    assert {first.prefix, second.prefix} == {CROWD}
    assert not running & {first.number, second.number}
    assert batcher.waiting == 8
    with pytest.raises(TooManyStreams, match="8 steps wait"):
        submit(batcher, job("id 9", prefix=CROWD))
    with pytest.raises(TooManyStreams, match="8 steps wait"):
        submit(batcher, job("no address"))
    batcher.finished(batch, 0.01, 0.01)


def test_of_requests_without_a_session_too_the_address_with_the_most_makes_room():
    batcher = batcher_of()
    submit(batcher, *(job(f"id {number // 4}", STATELESS, prefix=CROWD) for number in range(16)))
    submit(batcher, job("honest", STATELESS, prefix=HOME))
    (gone,) = batcher.expired(0.0)
    assert gone.prefix == CROWD
    assert gone.deadline > 0.0


# Requests that take long


def test_a_request_that_would_take_too_long_is_refused_unless_it_is_short():
    """A position takes 3 ms through all blocks."""
    batcher = batcher_of(Limits(max_compute_seconds=3.0))
    with pytest.raises(Refused, match="split it into requests of 512 positions") as refusal:
        submit(batcher, job("a", STATELESS, 1100))
    assert type(refusal.value) is Refused
    again = tuple((start, start + 1) for start in (*range(BLOCKS), *reversed(range(BLOCKS))))
    with pytest.raises(Refused, match="takes about 4 s"):
        submit(batcher, job("a", STATELESS, 600, parts=again))
    assert batcher.waiting == 0
    submit(batcher, job("a", STATELESS, 900))
    with pytest.raises(TooManyStreams, match="about 3 s wait here") as busy:
        submit(batcher, job("a", STATELESS, 200))
    assert busy.value.retry_after_seconds == pytest.approx(2.7, abs=0.1)
    submit(batcher, job("b", STATELESS, 200))
    submit(batcher, job("decoder"))
    with pytest.raises(Refused, match="takes about 14 s here now, 3 s are allowed"):
        submit(batcher, job("c", STATELESS, 600))
    slow = batcher_of(Limits(max_compute_seconds=0.1))
    submit(slow, job("a", STATELESS, 512))
    assert slow.waiting == 1, "clients send no shorter ones"


def test_the_seconds_of_a_request_are_learned_from_the_parts_that_ran():
    batcher = batcher_of(Limits(max_compute_seconds=30.0))
    for _ in range(100):
        try:
            submit(batcher, job("a", STATELESS, 1000))
        except Refused:
            return
        batch = batcher.next(0.0)
        assert batch is not None
        batcher.finished(batch, 60.0, 0.0)
    raise AssertionError("a minute each time, and half of one is allowed")


def test_two_peers_that_prefill_and_decode_share_the_prefills():
    done = answers(
        [Client(peer, kind, size) for peer in "ab" for kind, size in ((DECODE, 1), (PREFILL, 64))], small
    )
    assert min(done) > 0
    assert done[1] == pytest.approx(done[3], abs=2)


class Serving(RuleBasedStateMachine):
    """Jobs come, run, are cancelled and expire; what became of each is kept beside."""

    @initialize(
        chunk=st.integers(1, 16), rows=st.integers(1, 8), all_=st.integers(1, 12), each=st.integers(1, 6)
    )
    def begin(self, chunk: int, rows: int, all_: int, each: int) -> None:
        self.limits = Limits(max_waiting_steps=all_, max_waiting_steps_per_peer=each)
        self.batcher = batcher_of(
            self.limits, chunk_positions=chunk, max_rows=rows, max_stateless=all_, max_stateless_per_peer=each
        )
        self.now = 0.0
        self.waiting: dict[int, tuple[Job, int]] = {}  # and the positions that have run
        self.gone: Counter[int] = Counter()
        self.submitted = 0
        self.running: Batch | None = None

    @rule(
        peer=st.sampled_from("abc"),
        kind=st.sampled_from(Kind),
        tokens=st.integers(1, 40),
        rows=st.integers(1, 10),
        span=st.tuples(st.integers(0, 5), st.integers(6, 10)),
        patience=st.sampled_from([0.0, 0.05, 1.0, math.inf]),
    )
    def submit(
        self, peer: str, kind: Kind, tokens: int, rows: int, span: tuple[int, int], patience: float
    ) -> None:
        new = job(peer, kind, 1 if kind is DECODE else tokens, rows, span, self.now + patience)
        queue = [one for one, _ in self.waiting.values() if (one.kind is STATELESS) == (kind is STATELESS)]
        mine = [one for one in queue if one.peer == peer]
        fits = (
            len(queue) < self.limits.max_waiting_steps and len(mine) < self.limits.max_waiting_steps_per_peer
        )
        try:
            self.batcher.submit(new, self.now)
        except TooManyStreams:
            assert not fits, "refused although there was room"
            return
        assert fits
        self.waiting[new.number] = (new, 0)
        self.submitted += 1

    @rule(seconds=st.sampled_from([0.001, 0.1, 3.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.collect_expired()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(list(self.waiting)))
        self.batcher.cancel(number)
        self.end(number)

    @precondition(lambda self: self.running is None)
    @rule()
    def next(self) -> None:
        batch = self.batcher.next(self.now)
        self.collect_expired()
        if batch is None:
            assert not self.waiting or self.now < self.batcher.resume_at(self.now) < math.inf
            return
        self.running = batch
        assert len({piece.job.kind for piece in batch}) == 1
        assert len({piece.job.number for piece in batch}) == len(batch)
        if batch[0].job.kind is DECODE:
            assert len(batch) == 1 or sum(piece.job.rows for piece in batch) <= self.batcher.policy.max_rows
        elif batch[0].job.kind is PREFILL:
            assert len({piece.job.peer for piece in batch}) == 1
            assert all(piece.last for piece in batch[1:])
        else:
            assert len(batch) == 1
        positions = sum(piece.tokens * piece.job.rows for piece in batch)
        for piece in batch:
            one, ran = self.waiting[piece.job.number]
            assert (one, ran) == (piece.job, piece.offset)
            assert ran or one.deadline > self.now
            assert 1 <= piece.tokens <= one.tokens - ran
            if one.kind is PREFILL:
                alone = piece.tokens == 1 and len(batch) == 1
                assert alone or positions <= self.batcher.policy.chunk_positions
            else:
                assert piece.last

    @precondition(lambda self: self.running is not None)
    @rule(slower=st.sampled_from([0.1, 1.0, 10.0]))
    def finish(self, slower: float) -> None:
        batch, self.running = self.running, None
        assert batch is not None
        seconds = predicted(batch) * slower
        self.now += seconds
        self.batcher.finished(batch, seconds, self.now)
        for piece in batch:
            if piece.job.number not in self.waiting:
                continue  # cancelled meanwhile
            if piece.last:
                self.end(piece.job.number)
            else:
                self.waiting[piece.job.number] = (piece.job, piece.offset + piece.tokens)
        self.collect_expired()

    def collect_expired(self) -> None:
        running = {piece.job.number for piece in self.running or ()}
        for one in self.batcher.expired(self.now):
            assert one.deadline <= self.now
            assert one.number not in running
            assert not self.waiting[one.number][1], "it had begun"
            self.end(one.number)

    def end(self, number: int) -> None:
        del self.waiting[number]
        self.gone[number] += 1

    @invariant()
    def what_waits_is_counted(self) -> None:
        assert self.batcher.waiting == len(self.waiting)
        for peer in "abc":
            mine = sum(one.peer == peer for one, _ in self.waiting.values())
            assert self.batcher._queues.waiting_of(peer) == mine

    def teardown(self) -> None:
        if not hasattr(self, "batcher"):
            return
        left = sum(one.tokens - ran for one, ran in self.waiting.values())
        batches = 0
        while self.running is not None or self.waiting:
            if self.running is None:
                self.next()
                batches += 1
            if self.running is not None:
                self.finish(1.0)
            elif self.waiting:
                self.now = self.batcher.resume_at(self.now)
        assert batches <= 2 * left  # each one runs a token at least, or ends a cool-down
        assert len(self.gone) == self.submitted
        assert set(self.gone.values()) <= {1}
        self.now += 2 * self.batcher.policy.recently_active_seconds
        assert self.batcher.next(self.now) is None
        assert self.batcher.resume_at(self.now) == math.inf
        queues = self.batcher._queues
        assert not any([*queues.lanes.values(), queues.jobs, queues.done, self.batcher._peers.by_name])


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(
    st.lists(
        st.tuples(st.sampled_from("pqr"), st.integers(1, BLOCKS), st.floats(1e-4, 1e-2), st.floats(0, 4)),
        max_size=12,
    )
)
def test_a_step_outside_the_queues_is_charged_and_teaches_as_if_it_had_been_queued(steps):
    queued, alone, now = batcher_of(), batcher_of(), 0.0
    for peer, blocks, seconds, pause in steps:
        now += pause
        each = job(peer, blocks=(0, blocks), prefix="prefix")
        submit(queued, each, now=now)
        batch = queued.next(now)
        assert batch is not None
        now += seconds
        queued.finished(batch, seconds, now)
        alone.ran_alone(peer, "prefix", blocks, seconds, now)
        assert (alone.costs, alone.waiting) == (queued.costs, queued.waiting) == (alone.costs, 0)
        assert alone._kinds_in_order() == queued._kinds_in_order()
        if alone._peers.by_name.keys() != queued._peers.by_name.keys():
            return  # one forgot a peer that has gone a step earlier: newcomers begin at the others' figures
        for name, its in queued._peers.by_name.items():
            assert alone._peers.by_name[name].compute_seconds == its.compute_seconds
            assert alone._peers.by_name[name].last_active_at == its.last_active_at
