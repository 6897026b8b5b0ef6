"""Places and pace of uploads, by prefix; and how often a peer may offer."""

from __future__ import annotations

import pytest

from node.serving.adapters.uploads import MAX_BUCKETS, Uploads
from tensor_codec.errors import TooManyStreams
from tensor_codec.limits import MIB, Limits

HOME, CROWD = "192.0.2.1/32", "198.51.100.1/32"
LIMITS = Limits(max_adapter_uploads=4, max_adapter_uploads_per_peer=2)


def test_a_peer_has_two_places_and_gets_them_back():
    one = Uploads(LIMITS)
    first, _ = one.begin("a", ""), one.begin("a", "")
    with pytest.raises(TooManyStreams, match="2 adapters of yours are on their way"):
        one.begin("a", "")
    one.end(first)
    one.begin("a", "")
    assert one.count == 2


def test_a_prefix_that_has_most_places_gives_its_newest_to_another():
    one = Uploads(LIMITS)
    crowd = [one.begin(f"crowd{number}", CROWD) for number in range(4)]
    mine = one.begin("home", HOME)
    assert [each.yields for each in crowd] == [False, False, False, True]
    assert crowd[-1].scope.cancel_called
    other = one.begin("home2", HOME)
    assert [each.yields for each in crowd] == [False, False, True, True]
    with pytest.raises(TooManyStreams, match="adapters are on their way here"):
        one.begin("home3", HOME)  # two and two now
    assert not mine.yields
    assert not other.yields


def test_peers_without_an_address_take_nobody_s_place():
    one = Uploads(LIMITS)
    for number in range(4):
        one.begin(f"crowd{number}", CROWD)
    with pytest.raises(TooManyStreams):
        one.begin("a", "")


def test_a_peer_that_offers_for_ever_waits():
    one = Uploads(LIMITS)
    assert [one.offered("a", 0.0) for _ in range(LIMITS.adapter_offers_burst)] == [0.0] * 32
    assert [one.offered("a", 0.0) for _ in range(8)] == [number / 4 for number in range(1, 9)]
    with pytest.raises(TooManyStreams, match="more than 4 offers of adapters a second, 32 at once") as said:
        one.offered("a", 0.0)
    assert said.value.retry_after_seconds == 2.25
    assert one.offered("b", 0.0) == 0.0
    assert one.offered("a", 0.25) == 2.0  # what was refused does not count
    assert one.offered("a", 2.5) == 0.0


def test_offers_of_made_up_peers_take_no_memory():
    one = Uploads(LIMITS)
    for number in range(2 * MAX_BUCKETS):
        one.offered(str(number), number / 1000)
    assert len(one._offers) <= MAX_BUCKETS


def test_beside_steps_of_others_uploads_have_a_lower_rate():
    one = Uploads(LIMITS)
    rate = LIMITS.adapter_upload_bytes_per_second_beside_steps
    assert one.pause(LIMITS.adapter_upload_burst_bytes_beside_steps, 0.0, beside_steps=True) == 0.0
    assert one.pause(16 * MIB, 0.0, beside_steps=True) == 16 * MIB / rate
    assert one.pause(32 * MIB, 0.0) == 0.0
    assert one.pause(16 * MIB, 0.0) == 0.125


def test_uploads_together_have_a_rate_beyond_a_burst():
    one = Uploads(LIMITS)
    assert one.pause(64 * MIB, 0.0) == 0.0
    assert one.pause(16 * MIB, 0.0) == 0.5
    assert one.pause(16 * MIB, 1.0) == 0.0
