"""Places and rates of downloads of shared adapters, and what a seeder gives in one page."""

from __future__ import annotations

from dataclasses import replace

import pytest

from node.network.sharing.downloads import AGAIN_SECONDS, MAX_BUCKETS, Downloads
from node.network.sharing.seeds import Seed, Seeds
from routing.sharing.cards import card_of
from tensor_codec.errors import Refused, TooManyStreams
from tensor_codec.limits import Limits
from tests.adapter_fixtures import content

LIMITS = Limits()


def begin(downloads: Downloads, peer: str, prefix: str = "") -> list[str]:
    """Begin one; the list gets a word when it has to end."""
    ended: list[str] = []
    downloads.begin(peer, prefix, lambda: ended.append(peer))
    return ended


def test_downloads_never_exceed_the_places_of_all_and_of_a_peer():
    downloads = Downloads(replace(LIMITS, max_adapter_downloads=5, max_adapter_downloads_per_peer=2))
    for peer in ("a", "a", "b", "b", "c"):
        begin(downloads, peer)
    with pytest.raises(TooManyStreams, match="of yours") as refusal:
        begin(downloads, "a")
    assert refusal.value.retry_after_seconds == AGAIN_SECONDS
    with pytest.raises(TooManyStreams, match="5 downloads"):
        begin(downloads, "d")
    one = downloads._under_way[0]
    downloads.finish(one)
    begin(downloads, "d")
    assert downloads.count == 5


def test_a_prefix_that_has_most_gives_a_place_up_for_one_that_has_fewer():
    downloads = Downloads(replace(LIMITS, max_adapter_downloads=4))
    first, last = begin(downloads, "a", "1.0.0.1/32"), begin(downloads, "b", "1.0.0.1/32")
    begin(downloads, "c", "2.0.0.1/32")
    third = begin(downloads, "d", "1.0.0.1/32")
    assert begin(downloads, "e", "3.0.0.1/32") == []
    assert (first, last, third) == ([], [], ["d"])
    with pytest.raises(TooManyStreams):
        begin(downloads, "f", "1.0.0.1/32")


def test_bytes_keep_to_the_rate_of_all():
    downloads = Downloads(LIMITS)
    rate, burst = LIMITS.adapter_seed_bytes_per_second, LIMITS.adapter_seed_burst_bytes
    assert downloads.pause("", burst, 0.0) == 0.0
    assert downloads.pause("", rate, 0.0) == pytest.approx(1.0)
    assert downloads.pause("", rate, 1.0) == pytest.approx(1.0)


def test_bytes_of_a_public_address_keep_to_its_share():
    downloads = Downloads(LIMITS)
    rate, burst = LIMITS.adapter_seed_bytes_per_second, LIMITS.adapter_seed_burst_bytes
    share = LIMITS.adapter_seed_share_per_prefix
    assert downloads.pause("8.8.8.8/32", int(burst * share), 0.0) == 0.0
    assert downloads.pause("8.8.8.8/32", int(rate * share), 0.0) == pytest.approx(1.0)
    assert downloads.pause("9.9.9.9/32", 1, 0.0) == 0.0
    assert downloads.pause("127.0.0.1/32", 1, 0.0) == 0.0


def test_a_peer_that_asks_for_ever_waits_and_is_refused_where_it_asks_on_many_streams():
    downloads = Downloads(LIMITS)
    rate, burst = LIMITS.adapter_offers_per_second, LIMITS.adapter_offers_burst
    waits = [downloads.asked("a", 0.0) for _ in range(burst + 1)]
    assert waits == [0.0] * burst + [pytest.approx(1 / rate)]
    for _ in range(7):
        downloads.asked("a", 0.0)
    with pytest.raises(TooManyStreams, match="4 questions"):
        downloads.asked("a", 0.0)
    assert downloads.asked("b", 0.0) == 0.0


def test_the_memory_of_peers_is_bounded():
    downloads = Downloads(LIMITS)
    for number in range(3 * MAX_BUCKETS):
        downloads.asked(f"p{number}", 0.0)
        downloads.pause(f"8.{number // 250}.{number % 250}.1/32", 1, 0.0)
    assert len(downloads._questions) == len(downloads._prefixes) == MAX_BUCKETS


def seeds(count: int, revision: str = "r") -> list[Seed]:
    found = []
    for number in range(count):
        own = content(seed=number, revision=revision)
        card = card_of(own.manifest, own.id, own.nbytes, name=f"a{number}", licence="MIT", model="m")
        found.append(Seed.of(card, f"wire {revision} {number}".encode(), own.manifest, own.blobs))
    return found


def test_pages_give_every_card_of_a_revision_once_by_growing_ids():
    own = Seeds([*seeds(5), *seeds(2, "other")])
    ids = [each for each in own.ids if own.get(each).card.revision == "r"]
    found: list[bytes] = []
    after, has_more = "", True
    while has_more:
        page = own.page("r", after, 2)
        found += page.cards
        after, has_more = ids[len(found) - 1], page.has_more
        assert len(page.cards) <= 2
    assert found == [own.get(each).wire for each in ids]
    assert own.page("r", ids[-1], 2).cards == ()
    assert own.page("nobody's", "", 2).cards == ()
    assert set(own.revisions) == {"r", "other"}


def test_of_two_seeds_with_one_id_the_first_counts():
    one = seeds(1)[0]
    own = Seeds([one, replace(one, wire=b"second")])
    assert len(own) == 1
    assert own.get(one.card.id) is one


def test_an_adapter_that_is_not_given_is_refused():
    with pytest.raises(Refused, match="not given here"):
        Seeds().get("0" * 64)
