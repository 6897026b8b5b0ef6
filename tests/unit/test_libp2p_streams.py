"""Places for the streams of py-libp2p's own protocols."""

from __future__ import annotations

from node.network.budgets.libp2p_streams import LONG_SECONDS, Libp2pStreams, ServedStream
from tensor_codec.limits import Limits

LIMITS = Limits()
KAD = "/ipfs/kad/1.0.0"


class Places:
    def __init__(self) -> None:
        self.streams = Libp2pStreams(LIMITS)
        self.ended: list[ServedStream] = []

    def enter(
        self, peer: str, prefix: str = "one", now: float = 0.0, protocol: str = KAD
    ) -> ServedStream | None:
        stream = ServedStream(protocol, peer, prefix, now, lambda: self.ended.append(stream))
        return stream if self.streams.enter(stream) else None

    def fill(self, prefix: str = "one") -> list[ServedStream]:
        found = [self.enter(str(number), prefix) for number in range(LIMITS.max_libp2p_streams)]
        assert None not in found
        return [each for each in found if each is not None]


def test_a_peer_has_two_streams_of_a_protocol():
    places = Places()
    first, second = places.enter("a"), places.enter("a")
    assert first
    assert second
    assert not places.enter("a")
    assert places.enter("a", protocol="/ipfs/id/1.0.0")
    assert places.enter("b")
    places.streams.leave(first)
    places.streams.leave(first)
    assert places.enter("a")


def test_a_newcomer_takes_the_place_of_the_oldest_stream_of_a_prefix_that_has_more():
    places = Places()
    oldest, *_ = places.fill()
    assert places.enter("honest", "two")
    assert places.ended == [oldest]


def test_behind_one_address_it_takes_the_place_of_a_peer_that_has_more():
    places = Places()
    for number in range(LIMITS.max_libp2p_streams // 2):
        places.enter(str(number))
        places.enter(str(number))
    assert places.enter("honest")
    assert [stream.peer for stream in places.ended] == ["0"]


def test_where_all_have_one_the_oldest_goes_once_it_took_longer_than_a_question_takes():
    places = Places()
    oldest, *_ = places.fill()
    assert not places.enter("honest", now=LONG_SECONDS - 0.1)
    assert places.ended == []
    assert places.enter("honest", now=LONG_SECONDS)
    assert places.ended == [oldest]
