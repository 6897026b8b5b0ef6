"""Room for large frames that arrive: shared by connection, peer and network prefix."""

from __future__ import annotations

import random

import pytest

from node.network.budgets.large_frames import FramePlace, LargeFrames
from tensor_codec.limits import MIB, Limits

ADDRESS = "192.0.2.1/32"


class Room:
    """LargeFrames, and what it told each place."""

    def __init__(self, max_bytes: int, beside_bytes: int = 4 * MIB) -> None:
        self.frames = LargeFrames(max_bytes, beside_bytes)
        self.granted: list[FramePlace] = []
        self.evicted: list[FramePlace] = []

    def ask(self, size: int, connection: str = "c", peer: str = "p", prefix: str = ADDRESS) -> FramePlace:
        place = FramePlace(
            connection,
            peer,
            prefix,
            size,
            granted=lambda: self.granted.append(place),
            evicted=lambda: self.evicted.append(place),
        )
        self.frames.ask(place)
        return place

    def has(self, place: FramePlace) -> bool:
        return place in self.granted and place not in self.evicted


def test_frames_of_up_to_a_mebibyte_share_four_of_them_and_larger_ones_come_one_after_the_other():
    room = Room(512 * MIB)
    small = [room.ask(MIB) for _ in range(5)]
    large = [room.ask(16 * MIB) for _ in range(3)]
    assert [room.has(place) for place in small] == [True] * 4 + [False]
    assert [room.has(place) for place in large] == [True, False, False]
    room.frames.leave(small[2])
    room.frames.leave(large[0])
    assert room.granted[-2:] == [small[4], large[1]]
    assert room.frames.bytes == 20 * MIB


def test_a_frame_in_hand_holds_up_no_other_of_its_connection_and_keeps_its_bytes():
    room = Room(40 * MIB)
    places = [room.ask(16 * MIB) for _ in range(3)]
    room.frames.arrived(places[0])
    assert [room.has(place) for place in places] == [True, True, False]
    room.frames.arrived(places[1])
    assert not room.has(places[2])  # for lack of the node's room
    room.frames.leave(places[0])
    assert room.has(places[2])
    assert room.frames.bytes == 32 * MIB


def test_nobody_is_dropped_for_a_frame_that_would_not_fit_even_then():
    room = Room(32 * MIB)
    for number, size in enumerate((12, 4, 12, 4)):
        room.ask(size * MIB, connection=str(number), peer=str(number), prefix=str(number // 2))
    assert not room.has(room.ask(14 * MIB, connection="4", peer="honest", prefix="honest"))
    assert room.evicted == []


def test_connections_do_not_wait_for_each_other_while_the_node_has_room():
    room = Room(64 * MIB)
    places = [room.ask(16 * MIB, connection=str(number)) for number in range(4)]
    assert room.granted == places


def test_a_frame_of_a_prefix_that_has_less_takes_the_place_of_the_youngest_of_the_prefix_that_has_most():
    room = Room(64 * MIB)
    greedy = [room.ask(16 * MIB, connection=str(number), peer=str(number)) for number in range(4)]
    honest = room.ask(16 * MIB, connection="h", peer="h", prefix="198.51.100.1/32")
    assert room.evicted == [greedy[3]]
    assert room.has(honest)
    again = room.ask(16 * MIB, connection="5", peer="5")
    assert not room.has(again)  # nobody has more than its own prefix
    room.frames.leave(honest)
    assert room.has(again)


def test_behind_one_address_the_same_holds_for_peers():
    room = Room(64 * MIB)
    greedy = [room.ask(16 * MIB, connection=str(number), peer="greedy") for number in range(4)]
    honest = room.ask(16 * MIB, connection="h", peer="honest")
    assert room.evicted == [greedy[3]]
    assert room.has(honest)


def test_who_stops_waiting_holds_nobody_up_and_leaving_twice_does_no_harm():
    room = Room(64 * MIB)
    first, second, third = (room.ask(16 * MIB) for _ in range(3))
    room.frames.leave(second)
    room.frames.leave(first)
    room.frames.leave(first)
    assert room.has(third)
    room.frames.leave(third)
    assert room.frames.bytes == 0


def test_a_frame_that_is_larger_than_all_the_room_waits_and_drops_nobody():
    room = Room(8 * MIB)
    one = room.ask(2 * MIB, connection="1", peer="1")
    assert not room.has(room.ask(9 * MIB, connection="2", peer="2"))
    assert room.has(one)


def test_the_usual_limits_leave_room_for_32_of_the_largest_frames():
    frames, limits = LargeFrames.of(Limits()), Limits()
    granted: list[int] = []
    for number in range(40):
        size, who = limits.max_frame_bytes, str(number)
        frames.ask(FramePlace(who, who, who, size, lambda: granted.append(1), lambda: None))
    assert len(granted) == 32
    assert frames.bytes == 512 * MIB


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_and_goes_no_bound_is_passed_and_nothing_waits_for_nothing(seed: int):
    rng = random.Random(seed)
    room, there = Room(40 * MIB), list[FramePlace]()
    for _ in range(300):
        if there and rng.random() < 0.5:
            room.frames.leave(there.pop(rng.randrange(len(there))))
        else:
            number = rng.randrange(6)
            size = rng.choice([MIB // 2, MIB, 2 * MIB, 16 * MIB])
            there.append(room.ask(size, str(number), str(number // 2), str(number // 4)))
        there = [place for place in there if place not in room.evicted]
        held = [place for place in there if room.has(place)]
        assert sum(place.size for place in held) == room.frames.bytes <= 40 * MIB
        for connection in map(str, range(6)):
            own = sorted(place.size for place in held if place.connection == connection)
            assert sum(size for size in own if size <= MIB) <= 4 * MIB
            assert sum(size > MIB for size in own) <= 1
        if not held:
            assert not there
