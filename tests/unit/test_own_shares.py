"""Peers with a share of their own (`--share PEER=0.9`): of cache, streams, sessions and waiting steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.__main__ import _limits, _parser, _share
from node.config import ConfigError
from node.network.admission.streams import User, gives_way
from node.network.budgets.large_frames import FramePlace, LargeFrames
from node.serving.cache_budget import CacheBudget
from node.serving.executor.job_queues import JobQueues
from node.serving.executor.jobs import Job, Kind
from node.serving.fair_shares import who_yields
from tensor_codec.errors import CacheFull, TooManyStreams
from tensor_codec.limits import LEAST_SHARE, MAX_SHARES, Limits, share_of_a_peer, with_shares

GATEWAY = "12D3KooWPW5W3xqXDotptBwKmqM7tXNMVgcCVykq5vGqmiP1rh9M"
OTHER = "12D3KooWGRUfhUKd7MfsJ7sAhPSLq4kyS7yF6CqYMi4VEfzhZqGu"
HOME, CROWD = "192.0.2.1/32", "198.51.100.1/32"
SHARED = Limits(peer_shares=((GATEWAY, 0.9),))


# the limits


def test_a_named_peer_has_its_part_of_the_whole_and_others_have_the_usual_bounds():
    usual = Limits()
    assert SHARED.own_share(GATEWAY) == 0.9
    assert (SHARED.streams_of(GATEWAY), SHARED.sessions_of(GATEWAY)) == (460, 460)
    assert SHARED.streams_on_a_connection_of(GATEWAY) == 460
    assert SHARED.waiting_steps_of(GATEWAY) == 230
    assert SHARED.prefix_of(GATEWAY, HOME) == ""
    for limits, peer in ((SHARED, OTHER), (usual, GATEWAY)):
        assert limits.own_share(peer) is None
        assert limits.streams_of(peer) == limits.max_streams_per_peer
        assert limits.streams_on_a_connection_of(peer) == limits.max_streams_per_connection
        assert limits.sessions_of(peer) == limits.max_sessions_per_peer
        assert limits.waiting_steps_of(peer) == limits.max_waiting_steps_per_peer
        assert limits.prefix_of(peer, HOME) == HOME
    small = Limits(peer_shares=((GATEWAY, LEAST_SHARE),), max_streams=10)
    assert small.streams_of(GATEWAY) == 1


@pytest.mark.parametrize(
    "text",
    ["", "=", GATEWAY, "=0.5",
     *(f"{GATEWAY}={share}" for share in ("", "x", "0", "-1", "1.01", "nan", "inf", "0.5=0.5", "0.001"))],
)  # fmt: skip
def test_a_share_that_is_none_is_refused(text: str):
    with pytest.raises(ValueError, match=r"is not PEER=SHARE with a share of 0\.01 to 1"):
        share_of_a_peer(text)


def test_the_flag_takes_peers_once_each_and_a_few():
    assert _share(f"{GATEWAY}=0.9") == (GATEWAY, 0.9)
    with pytest.raises(Exception, match="PEER=SHARE"):
        _share(f"{GATEWAY}:0.9")
    with pytest.raises(Exception, match="peer"):
        _share("gateway=0.9")
    flags = _parser("", "").parse_args([])
    flags.share = [(GATEWAY, 0.5), (OTHER, 0.5)]
    assert _limits(flags).peer_shares == ((GATEWAY, 0.5), (OTHER, 0.5))
    flags.share = [(GATEWAY, 0.5), (GATEWAY, 0.6)]
    with pytest.raises(ConfigError, match=r"--share names .* more than once"):
        _limits(flags)
    flags.share = []
    assert _limits(flags) == Limits()
    with pytest.raises(ValueError, match=f"{MAX_SHARES} are allowed"):
        with_shares(Limits(), [(f"peer {number}", 0.5) for number in range(MAX_SHARES + 1)])


# the KV cache


def budget(**shares: float) -> CacheBudget:
    return CacheBudget(1000, 0.25, 0, 10, own_shares=shares)


def fill(cache: CacheBudget, peer: str, prefix: str, sessions: int, length: int = 100) -> int:
    """Open sessions and let each grow; the number of those that did."""
    done = 0
    for number in range(sessions):
        try:
            cache.admit((peer, number), peer, 1, length, prefix)
        except CacheFull:
            break
        try:
            cache.grow((peer, number), length)
        except CacheFull:
            cache.release((peer, number))
            break
        done += 1
    return done


def test_a_gateway_may_hold_its_share_of_the_cache_and_others_the_usual_one():
    assert fill(budget(gateway=0.9), "gateway", HOME, 20) == 9
    assert fill(budget(gateway=0.9), "somebody", HOME, 20) == 2
    assert fill(budget(), "gateway", HOME, 20) == 2
    assert fill(budget(gateway=0.1), "gateway", HOME, 20) == 1


def test_up_to_its_share_a_gateway_gives_no_session_up_and_others_make_room_for_it():
    cache = budget(gateway=0.6)
    assert fill(cache, "gateway", HOME, 6) == 6
    for number in range(2):
        assert fill(cache, f"crowd {number}", CROWD, 2) == 2
    assert cache.make_yield(HOME, "somebody") is not None  # the crowd's, which has more than half of the rest
    cache = budget(gateway=0.6)
    for number in range(5):
        assert fill(cache, f"crowd {number}", CROWD, 2) == 2
    for left in range(10, 4, -1):
        found = cache.make_yield(CROWD, "gateway")
        assert found in {(f"crowd {number}", each) for number in range(5) for each in range(2)}
        assert found is not None
        cache.release(found)
        assert cache.free_tokens == 100
        cache.admit(("gateway", left), "gateway", 1, 100, CROWD)  # behind the crowd's own address
        cache.grow(("gateway", left), 100)
    assert cache.make_yield(CROWD, "gateway") is None  # it has its share
    assert cache.make_yield(HOME, "somebody") is not None


@dataclass
class Part:
    prefix: str
    peer: str
    weight: int
    yields: bool = False


def test_beyond_its_share_a_gateway_gives_way_as_others_do():
    over = [Part(HOME, "gateway", 70), Part(CROWD, "a", 10)]
    assert who_yields(over, CROWD, 100, "b", {"gateway": 0.5}) is over[0]
    assert who_yields(over, CROWD, 100, "b", {"gateway": 0.8}) is None


def test_a_neighbour_of_a_gateway_does_not_pay_for_it():
    parts = [Part(HOME, "gateway", 60), Part(HOME, "neighbour", 10), Part(CROWD, "a", 30)]
    assert who_yields(parts, HOME, 100, "neighbour", {"gateway": 0.6}) is parts[2]
    assert who_yields(parts, HOME, 100, "neighbour") is None


shares = st.dictionaries(st.sampled_from("ab"), st.floats(0.05, 0.5))


@given(
    st.lists(
        st.tuples(st.sampled_from([HOME, CROWD]), st.sampled_from("abcd"), st.integers(1, 40)), max_size=12
    ),
    st.sampled_from([HOME, CROWD, ""]),
    st.sampled_from("abcd"),
    shares,
)
def test_nobody_within_its_own_share_ever_gives_way(
    parts: list[tuple[str, str, int]], prefix: str, peer: str, own: dict[str, float]
):
    holders = [Part(*each) for each in parts]
    found = who_yields(holders, prefix, 200, peer, own)
    if found is not None and found.peer in own:
        assert sum(each.weight for each in holders if each.peer == found.peer) > own[found.peer] * 200
    if found is not None and peer in own:
        assert sum(each.weight for each in holders if each.peer == peer) < own[peer] * 200
        assert found.peer != peer


# streams


def test_a_gateway_gives_up_no_stream_and_gets_one_of_the_largest_other():
    gateway = User("gateway", HOME, 400, own_share=True)
    users = [gateway, User("a", CROWD, 60), User("b", CROWD, 30), User("c", HOME, 22)]
    assert gives_way(User("new", "203.0.113.1/32", 0), users) == users[1]
    assert gives_way(gateway, users) == users[1]
    assert (
        gives_way(replace(gateway, own_share=False), [replace(gateway, own_share=False), *users[1:]]) is None
    )
    assert gives_way(User("c", HOME, 22), users) == users[1]  # its neighbour's streams are not its own
    assert gives_way(gateway, [gateway]) is None


# waiting steps


def job(number: int, peer: str, prefix: str) -> Job:
    return Job(number, peer, Kind.DECODE, 1, 1, 0, 4, prefix=prefix)


def test_a_gateway_s_steps_wait_up_to_its_share_and_the_largest_prefix_makes_room():
    limits = Limits(max_waiting_steps=10, max_waiting_steps_per_peer=3, peer_shares=(("gateway", 0.8),))
    queues = JobQueues(limits)
    for number in range(8):
        queues.add(job(number, "gateway", ""))
    with pytest.raises(TooManyStreams, match="8 steps of yours wait for compute here, 8 may"):
        queues.add(job(8, "gateway", ""))
    queues = JobQueues(limits)
    for number in range(9):
        queues.add(job(number, f"crowd {number // 3}", CROWD))
    queues.add(job(9, "home", HOME))
    for number in range(10, 18):
        queues.add(job(number, "gateway", ""))
    assert [each.number for each in queues.expired] == [8, 7, 6, 5, 4, 3, 2, 1]
    with pytest.raises(TooManyStreams, match="10 steps wait for compute here, 10 may"):
        queues.add(job(18, "nobody", ""))


def test_without_prefixes_nobody_makes_room_for_a_gateway():
    limits = Limits(max_waiting_steps=4, max_waiting_steps_per_peer=3, peer_shares=(("gateway", 0.8),))
    queues = JobQueues(limits)
    for number in range(4):
        queues.add(job(number, f"peer {number}", ""))
    with pytest.raises(TooManyStreams, match="4 steps wait"):
        queues.add(job(4, "gateway", ""))


# long steps, and large frames


def test_a_gateway_s_frames_stay_within_its_share_and_push_others_out():
    evicted: list[str] = []
    granted: list[str] = []
    frames = LargeFrames(100, 100, {"gateway": 0.5})

    def ask(name: str, peer: str, prefix: str, size: int) -> FramePlace:
        place = FramePlace(
            name, peer, prefix, size, lambda: granted.append(name), lambda: evicted.append(name)
        )
        frames.ask(place)
        return place

    for number in range(4):
        ask(f"home {number}", "neighbour", HOME, 25)
    ask("gateway 0", "gateway", HOME, 25)
    ask("gateway 1", "gateway", HOME, 25)
    assert evicted == ["home 3", "home 2"]
    ask("other", "a", CROWD, 25)
    assert evicted == ["home 3", "home 2", "home 1"]  # never the gateway's
    waits = ask("gateway 2", "gateway", HOME, 25)
    assert "gateway 2" not in granted  # beyond its share it is a peer as others are
    frames.leave(waits)
    assert frames.bytes == 100
