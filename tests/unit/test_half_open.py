"""Handshakes share few places, and nobody is kept out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node.network.admission.half_open import HalfOpen, Handshake
from node.network.admission.shares import Shares

LOOPBACK, OTHER, PUBLIC = "127.0.0.1/32", "127.0.0.2/32", "8.8.8.8/32"


def shake(prefix: str, *, spoke: bool = False) -> Handshake:
    return Handshake(prefix, lambda: None, spoke)


def test_five_hundred_silent_sockets_of_one_address_keep_no_other_address_out():
    table = HalfOpen(32)
    silent = [shake(PUBLIC) for _ in range(500)]
    for each in silent:
        table.begin(each)
    honest = shake(LOOPBACK)
    assert table.begin(honest) is silent[468]
    for _ in range(500):
        assert table.begin(shake(PUBLIC)) is not honest
    assert len(table) == 32


def test_on_one_address_silence_makes_way_before_a_handshake_that_has_begun():
    table = HalfOpen(4)
    begun, silent = shake(LOOPBACK, spoke=True), [shake(LOOPBACK) for _ in range(9)]
    table.begin(begun)
    lost = [table.begin(each) for each in silent]
    assert lost == [None, None, None, *silent[:6]]


def test_where_all_have_begun_the_oldest_makes_way():
    table = HalfOpen(2)
    one, two, three = (shake(LOOPBACK, spoke=True) for _ in range(3))
    assert [table.begin(each) for each in (one, two, three)] == [None, None, one]


def test_the_address_with_most_gives_way_and_then_the_network_with_most():
    table = HalfOpen(4)
    held = [shake(prefix, spoke=True) for prefix in ("8.8.8.8/32", "8.8.8.9/32", "9.9.9.9/32", "9.9.9.9/32")]
    for each in held:
        table.begin(each)
    assert table.begin(shake(LOOPBACK)) is held[2], "one address with two before two with one each"
    held = [shake(prefix) for prefix in ("8.8.8.8/32", "8.8.8.9/32", "8.8.8.10/32", "9.9.9.9/32")]
    table = HalfOpen(4)
    for each in held:
        table.begin(each)
    assert table.begin(shake("9.9.9.8/32")) is held[0]


def test_a_place_that_was_given_back_is_free():
    table = HalfOpen(1)
    one = shake(LOOPBACK)
    table.begin(one)
    table.end(one)
    table.end(one)
    assert len(table) == 0
    assert table.begin(shake(OTHER)) is None


PREFIXES = st.sampled_from([LOOPBACK, OTHER, PUBLIC, "8.8.8.9/32", "9.9.9.9/32", "2606:4700::/64"])


@given(st.lists(st.tuples(PREFIXES, st.booleans(), st.booleans()), max_size=80), st.integers(1, 6))
def test_nobody_makes_way_for_an_address_with_a_larger_share(steps: list[tuple[str, bool, bool]], most: int):
    table, held = HalfOpen(most), list[Handshake]()
    for prefix, spoke, ends in steps:
        newcomer = shake(prefix, spoke=spoke)
        before = [*held, newcomer]
        loser = table.begin(newcomer)
        held.append(newcomer)
        if loser is not None:
            assert len(held) > most
            held.remove(loser)
            shares = Shares((each.prefix, "") for each in before)
            larger = shares.rank(loser.prefix, "") >= shares.rank(prefix, "")
            assert larger or loser.prefix == prefix
            assert loser is not newcomer
        if ends:
            table.end(held.pop(0))
        assert len(table) == len(held) <= most
