"""What a node's connections tell of its reach: when it asks anew."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from node.network.reachability.link_watch import (
    PAUSE_SECONDS,
    SILENCE_SECONDS,
    STEADY_SECONDS,
    LinkWatch,
)

Links = tuple[Collection[int], Collection[int]]
NONE: Links = ((), ())


def dues(looks: Iterable[Links]) -> list[int]:
    """The seconds at which the node asks; looks: inbound and outbound connections at each second."""
    watch = LinkWatch()
    return [now for now, links in enumerate(looks) if watch.why_ask(*links, float(now)) is not None]


def test_a_silence_is_due_some_seconds_after_its_beginning_and_not_again() -> None:
    looks: list[Links] = [((1,), (8, 9))] * 30 + [((), (8, 9))] * 600
    assert dues(looks) == [30 + SILENCE_SECONDS]


def test_two_silences_have_a_pause_between_them() -> None:
    one: list[Links] = [((1,), (9,))] * 25 + [((), (9,))] * 20
    first, *others = dues(one * 10)
    assert first == 25 + SILENCE_SECONDS
    assert others
    assert all(
        after - before >= PAUSE_SECONDS for before, after in zip([first, *others], others, strict=False)
    )


def test_a_pause_between_two_inbound_connections_is_no_silence() -> None:
    assert dues(([((1,), (9,))] * 30 + [((), (9,))] * 10) * 10) == []


def test_dials_back_and_visits_are_no_connections_of_others() -> None:
    visits: list[Links] = [((n,), (9,)) if n % 20 < 5 else ((), (9,)) for n in range(600)]
    assert dues(visits) == []


def test_without_a_peer_that_came_or_one_that_is_reached_nothing_is_due() -> None:
    assert dues([((), (7, 8))] * 100) == []
    assert dues([((1,), ())] * 50 + [NONE] * 100) == []


def test_a_node_whose_connections_have_all_ended_asks_as_soon_as_it_has_another() -> None:
    """A router with another address: the old connections end within seconds of each other."""
    looks: list[Links] = [((), (1, 2))] * 50 + [((), (2,))] * 4 + [NONE] * 6 + [((), (3,))] * 50
    assert dues(looks) == [60]
    idle: list[Links] = [((7,), each[1]) for each in looks]  # nobody has sent anything over that one
    assert dues(idle) == [60]
    mixed: list[Links] = [((), (1, 2))] * 50 + [((), (2, 3))] * 10 + [((), (3,))] * 50
    assert dues(mixed) == [60]  # others began before the last one ended


def test_connections_that_follow_each_other_mean_nothing() -> None:
    seconds = int(2 * STEADY_SECONDS)
    relay_race: list[Links] = [((), (n // seconds, n // seconds + 1)) for n in range(20 * seconds)]
    assert dues(relay_race) == []
