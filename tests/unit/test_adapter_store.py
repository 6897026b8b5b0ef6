"""The adapters of a node: shares, pins, what makes room, and what a peer can find out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.serving.adapters.store import MAX_HOPS, AdapterStore
from tensor_codec.adapters import AdapterManifest
from tensor_codec.blocks import Blocks
from tensor_codec.errors import NoAdapter, Refused, TooManyStreams, WrongRevision
from tensor_codec.limits import Limits

MANIFEST = AdapterManifest("r", "fp32", ((), ()))
RUN = Blocks(0, 2)
HOME, CROWD = "192.0.2.1/32", "198.51.100.1/32"
LIMITS = Limits(adapter_share_per_peer=0.5)


def name(number: int) -> str:
    return f"{number:064x}"


def made(adapter: str, blocks: Mapping[int, object]) -> tuple[str, Mapping[int, object]]:
    return adapter, blocks


def store(capacity: int = 100, limits: Limits = LIMITS) -> AdapterStore:
    return AdapterStore(limits, capacity, made)


def bring(
    at: AdapterStore, peer: str, number: int, size: int = 10, now: float = 0.0, prefix: str = ""
) -> None:
    """A peer uploads both blocks of an adapter, `size` bytes together."""
    at.reserve(peer, prefix, name(number), MANIFEST, size, now)
    at.add(peer, name(number), 0, f"{peer} {number} 0", size // 2)
    at.add(peer, name(number), 1, f"{peer} {number} 1", size - size // 2)
    at.release(peer, name(number), 0, now)


def holds(at: AdapterStore, peer: str, number: int) -> bool:
    return not at.missing(peer, name(number), range(*RUN))


@contextmanager
def in_use(at: AdapterStore, peer: str, number: int, now: float = 0.0) -> Iterator[object]:
    with at.using(peer, name(number), RUN, lambda: now) as hop:
        yield hop


def test_an_adapter_that_was_brought_can_be_used_by_its_peer_and_no_other():
    one = store()
    bring(one, "a", 1)
    with in_use(one, "a", 1) as hop:
        assert hop == (name(1), {0: "a 1 0", 1: "a 1 1"})
    with pytest.raises(NoAdapter, match="is not held here for blocks 0:2: offer it"):
        one.using("b", name(1), RUN, lambda: 0.0).__enter__()
    assert one.missing("b", name(1), range(*RUN)) == [0, 1]  # as if nobody had it


def test_equal_adapters_of_two_peers_share_their_memory_and_outlive_each_other():
    one = store()
    bring(one, "a", 1)
    bring(one, "b", 1)
    with in_use(one, "b", 1) as hop, in_use(one, "a", 1) as other:
        assert hop is other  # the blocks of the first
    one.drop("a", name(1))
    assert not holds(one, "a", 1)
    with in_use(one, "b", 1) as hop:
        assert hop == (name(1), {0: "a 1 0", 1: "a 1 1"})


def test_a_session_finds_the_same_object_again_so_that_rows_share_a_group():
    one = store()
    bring(one, "a", 1)
    with in_use(one, "a", 1) as first, in_use(one, "a", 1) as second:
        assert first is second
    with one.using("a", name(1), Blocks(1, 2), lambda: 0.0) as part:
        assert part == (name(1), {1: "a 1 1"})


def test_of_an_adapter_few_runs_of_blocks_are_kept_made():
    one, blocks = store(), 2 * MAX_HOPS
    manifest = AdapterManifest("r", "fp32", ((),) * blocks)
    one.reserve("a", "", name(1), manifest, 10, 0.0)
    for block in range(blocks):
        one.add("a", name(1), block, f"{block}", 0)
    one.release("a", name(1), 10, 0.0)

    def hop(start: int) -> object:
        with one.using("a", name(1), Blocks(start, blocks), lambda: 0.0) as found:
            return found

    first = hop(0)
    for start in range(1, blocks):
        hop(start)
        assert hop(0) is first  # the one that is used again and again stays
    assert len(one._contents[name(1)].hops) == MAX_HOPS


def test_a_claim_counts_with_what_is_kept_besides_its_blocks_once():
    one = store()
    one.reserve("a", "", name(1), MANIFEST, 10, 0.0, 7)
    one.add("a", name(1), 0, "zero", 5)
    one.release("a", name(1), 5, 0.0)
    assert one.claims.used == 5 + 7
    one.reserve("a", "", name(1), MANIFEST, 5, 0.0, 7)  # the rest of it
    assert one.claims.used == 10 + 7
    with pytest.raises(Refused, match="an adapter of 51 bytes"):
        one.reserve("b", "", name(2), MANIFEST, 44, 0.0, 7)


def test_only_the_blocks_that_came_can_be_used():
    one = store()
    one.reserve("a", "", name(1), MANIFEST, 10, 0.0)
    one.add("a", name(1), 0, "zero", 5)
    one.release("a", name(1), 5, 0.0)
    assert one.missing("a", name(1), range(*RUN)) == [1]
    with one.using("a", name(1), Blocks(0, 1), lambda: 0.0):
        pass
    with pytest.raises(NoAdapter):
        one.using("a", name(1), RUN, lambda: 0.0).__enter__()


def test_an_upload_that_brought_nothing_leaves_nothing():
    one = store()
    one.reserve("a", "", name(1), MANIFEST, 10, 0.0)
    assert one.claims.used == 10
    one.release("a", name(1), 10, 0.0)
    assert (one.claims.used, one._contents) == (0, {})


def test_an_upload_of_nothing_is_not_forgotten_before_its_end():
    one = store(limits=replace(LIMITS, max_adapters_per_peer=1))
    one.reserve("a", "", name(1), MANIFEST, 0, 0.0)
    with pytest.raises(TooManyStreams):
        bring(one, "a", 2)
    one.drop("a", name(1))
    one.claims.expire(10_000)
    one.add("a", name(1), 0, "zero", 0)
    one.add("a", name(1), 1, "one", 0)
    one.release("a", name(1), 0, 0.0)
    assert holds(one, "a", 1)


def test_the_oldest_makes_room_and_those_in_use_stay():
    one = store(100, replace(LIMITS, adapter_share_per_peer=1.0))
    for number in range(4):
        bring(one, "a", number, 25, now=number)
    with in_use(one, "a", 0):
        bring(one, "a", 4, 25, now=10)
        assert [holds(one, "a", number) for number in range(5)] == [True, False, True, True, True]


def test_a_peer_gets_room_out_of_its_own_share_first():
    one = store()
    bring(one, "b", 9, 40)
    bring(one, "a", 1, 25, now=1)
    bring(one, "a", 2, 25, now=2)
    bring(one, "a", 3, 25, now=3)
    assert [holds(one, "a", number) for number in (1, 2, 3)] == [False, True, True]
    assert holds(one, "b", 9)


def test_where_everything_is_in_use_a_peer_is_asked_to_come_back():
    one = store(100, replace(LIMITS, adapter_share_per_peer=1.0))
    bring(one, "a", 1, 60)
    with (
        in_use(one, "a", 1),
        pytest.raises(TooManyStreams, match="no room for an adapter of 50 bytes") as said,
    ):
        bring(one, "b", 2, 50)
    assert said.value.retry_after_seconds == 5.0
    bring(one, "b", 2, 50)


def test_an_adapter_larger_than_a_share_is_refused_before_anything_makes_room():
    one = store()
    bring(one, "a", 1, 50)
    with pytest.raises(Refused, match="an adapter of 51 bytes for these blocks, 50 are allowed"):
        bring(one, "a", 2, 51)
    assert holds(one, "a", 1)


def test_a_peer_has_a_number_of_adapters():
    one = store(1000, replace(LIMITS, max_adapters_per_peer=2))
    for number in range(3):
        bring(one, "a", number, now=number)
    assert [holds(one, "a", number) for number in range(3)] == [False, True, True]
    with in_use(one, "a", 1), in_use(one, "a", 2), pytest.raises(TooManyStreams, match="2 adapters of yours"):
        bring(one, "a", 3)


def test_the_prefix_that_holds_most_makes_room_and_a_small_one_never_for_it():
    limits = replace(LIMITS, adapter_share_per_prefix=1.0)
    one = store(100, limits)
    for number in range(4):
        bring(one, f"crowd{number}", number, 20, now=10, prefix=CROWD)
    bring(one, "home", 9, 20, now=0, prefix=HOME)  # used longer ago than all others
    bring(one, "crowd4", 4, 20, now=20, prefix=CROWD)
    assert holds(one, "home", 9)
    bring(one, "home", 8, 20, now=30, prefix=HOME)
    assert holds(one, "home", 9)
    assert one.claims.used == 100


def test_a_public_address_has_a_share():
    one = store(100, replace(LIMITS, adapter_share_per_prefix=0.5))
    for number in range(4):
        bring(one, f"crowd{number}", number, 25, now=number, prefix=CROWD)
    assert one.claims.used == 50
    for number in range(4):
        bring(one, f"near{number}", number, 25, now=number, prefix="127.0.0.1/32")
    assert one.claims.used == 100  # on one machine all peers have one address


def test_what_nobody_uses_is_forgotten_after_its_time():
    one = store()
    bring(one, "a", 1, now=0)
    bring(one, "a", 2, now=500)
    with in_use(one, "a", 1, now=700):
        one.claims.expire(1050)
        assert holds(one, "a", 1)
        assert holds(one, "a", 2)
    one.claims.expire(1101)
    assert holds(one, "a", 1)
    assert not holds(one, "a", 2)
    one.claims.expire(1301)
    assert not holds(one, "a", 1)
    assert one._contents == {}


def test_an_adapter_of_the_operator_is_everybody_s_by_name_by_id_and_by_both():
    one = store()
    one.keep("poems", name(7), MANIFEST)
    with pytest.raises(WrongRevision, match="adapter poems is not loaded for blocks 0:2"):
        one.using("a", "poems", RUN, lambda: 0.0).__enter__()
    for block in range(*RUN):
        one.put(name(7), block, f"own {block}")
    assert one.announced == (f"poems#{name(7)[:16]}",)
    for asked in ("poems", name(7), one.announced[0]):
        with one.using("a", asked, RUN, lambda: 0.0) as hop:
            assert hop == (name(7), {0: "own 0", 1: "own 1"})
    assert one.missing("a", name(7), range(*RUN)) == []
    with pytest.raises(WrongRevision, match="adapter prose was asked for, poems is served here"):
        one.using("a", "prose", RUN, lambda: 0.0).__enter__()
    one.forget_other_blocks(Blocks(1, 2))
    assert one.own_missing(name(7), range(*RUN)) == [0]


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["bring", "use", "end", "drop", "later"]),
        st.sampled_from(["a", "b", "c"]),
        st.integers(0, 3),
        st.integers(1, 60),
    ),
    max_size=40,
)


@given(OPERATIONS)
def test_whatever_peers_do_the_budget_holds_and_what_is_in_use_stays(operations):
    one, now = store(100), 0.0
    used: list[tuple[str, int, Callable[..., object]]] = []
    for what, peer, number, size in operations:
        if what == "bring" and not holds(one, peer, number):
            with suppress(Refused):
                bring(one, peer, number, size, now, prefix={"a": HOME, "b": CROWD, "c": ""}[peer])
        elif what == "use" and holds(one, peer, number):
            context = one.using(peer, name(number), RUN, partial(float, now))
            context.__enter__()
            used.append((peer, number, context.__exit__))
        elif what == "end" and used:
            used.pop()[2](None, None, None)
        elif what == "drop":
            one.drop(peer, name(number))
        else:
            now += size * 20
            one.claims.expire(now)
        assert 0 <= one.claims.used <= 100
        for owner, prefix in (("a", HOME), ("b", CROWD)):
            mine = [claim for claim in one.claims._claims.values() if claim.peer == owner]
            assert sum(claim.size for claim in mine) <= 50, prefix
        assert all(holds(one, owner, kept) for owner, kept, _ in used)
    for *_, end in used:
        end(None, None, None)
    one.claims.expire(now + 601)
    assert (one.claims.used, one._contents) == (0, {})
