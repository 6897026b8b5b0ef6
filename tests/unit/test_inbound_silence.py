"""Inbound silence: when a node asks anew whether others reach it."""

from __future__ import annotations

from node.network.reachability.silence import SILENCE_SECONDS, InboundSilence


def dues(links: list[tuple[int, int]], step: float = 1.0) -> list[float]:
    """The times at which the node asks; links: inbound and outbound connections at each step."""
    silence = InboundSilence()
    return [
        n * step for n, (inbound, outbound) in enumerate(links) if silence.is_due(inbound, outbound, n * step)
    ]


def test_each_silence_is_due_once_some_seconds_after_its_beginning() -> None:
    links = [(1, 2)] * 5 + [(0, 2)] * 60
    assert dues(links) == [5 + SILENCE_SECONDS]
    assert dues(links + links) == [5 + SILENCE_SECONDS, 65 + 5 + SILENCE_SECONDS]


def test_a_pause_between_two_inbound_connections_is_no_silence() -> None:
    assert dues(([(1, 2)] + [(0, 2)] * 10) * 10) == []


def test_without_a_peer_that_came_or_one_that_is_reached_nothing_is_due() -> None:
    assert dues([(0, 3)] * 100) == []
    assert dues([(1, 0)] + [(0, 0)] * 100) == []
    offline = [(1, 2)] + [(0, 0)] * 30 + [(0, 2)] * 30  # asleep, or without a network
    assert dues(offline) == [31 + SILENCE_SECONDS]
