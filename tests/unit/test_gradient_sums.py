"""Sums of gradients: added once, whole, exact in any order, within a budget, and gone when idle."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from node.serving.adapters.sums import GradientSum, GradientSums, sum_size
from tensor_codec.adapters import AdapterManifest, LoraSite
from tensor_codec.blocks import Blocks
from tensor_codec.errors import PeerGone, Refused, RemoteProtocolError, TooManyStreams
from tensor_codec.limits import Limits

SITES = (LoraSite("q_proj", 2, 1.0), LoraSite("v_proj", 1, 1.0))
MANIFEST = AdapterManifest("r", "fp32", (SITES, (), SITES[:1]))
SHAPES = {block: {"q_proj": (4, 6), "v_proj": (4, 2)} for block in range(3)}
RUN = Blocks(0, 3)
NAME = bytes(16)
Gradients = dict[int, dict[str, tuple[Tensor, Tensor]]]
CROWD = "198.51.100.1/32"


VALUES = 2 * (4 + 6) + 1 * (4 + 2) + 2 * (4 + 6)


def wanted(peer: str = "a", size: int = 8 * VALUES, now: float = 0.0, prefix: str = "") -> GradientSum:
    return GradientSum(peer, prefix, "f" * 64, RUN, MANIFEST, size, now)


def some(seed: int) -> Gradients:
    generator = torch.Generator().manual_seed(seed)

    def random_pair(site: LoraSite) -> tuple[Tensor, Tensor]:
        ins, outs = SHAPES[0][site.name]
        scale = 10.0 ** torch.randint(-4, 3, (1,), generator=generator)
        a, b = (
            torch.randn(site.rank, ins, generator=generator),
            torch.randn(outs, site.rank, generator=generator),
        )
        return a * scale, b * scale

    return {
        block: {site.name: random_pair(site) for site in sites}
        for block, sites in enumerate(MANIFEST.blocks)
        if sites
    }


def test_the_size_of_a_sum_is_that_of_its_values_in_float64():
    assert sum_size(MANIFEST, RUN, SHAPES) == 8 * VALUES
    own = wanted()
    own.add(0, some(0))
    assert len(own.encoded("fp64")) == sum_size(MANIFEST, RUN, SHAPES) == 2 * len(own.encoded("fp32"))


def test_a_request_is_added_once_however_often_it_comes():
    own = wanted()
    own.add(3, some(3))
    once = own.encoded("fp32")
    own.add(3, some(3))
    assert own.encoded("fp32") == once
    assert own.numbers == {3}


def test_a_request_that_comes_while_a_sum_is_collected_is_not_in_it():
    own = wanted()
    own.add(1, some(1))
    once = own.encoded("fp64")
    assert own.freeze() == {1}
    own.add(2, some(2))
    assert (own.numbers, own.encoded("fp64")) == ({1}, once)


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_a_sum_is_made_in_parts_of_any_size(dtype: str):
    own = wanted()
    own.add(0, some(0))
    whole, item = own.encoded(dtype), len(own.encoded(dtype)) // (own.size // 8)
    assert len(whole) == own.encoded_size(dtype)
    for step in (item, 3 * item, 7 * item, len(whole)):
        ranges = [(at, min(at + step, len(whole))) for at in range(0, len(whole), step)]
        assert b"".join(own.encoded(dtype, *each) for each in ranges) == whole


def test_a_sum_of_one_request_is_its_gradients_site_after_site():
    own, given = wanted(), some(1)
    own.add(0, given)
    parts = [given[block][site.name] for block, sites in enumerate(MANIFEST.blocks) for site in sites]
    flat = torch.cat([each.flatten() for pair in parts for each in pair])
    assert torch.equal(torch.frombuffer(bytearray(own.encoded("fp32")), dtype=torch.float32), flat)


def test_a_sum_has_the_same_bits_in_any_order():
    orders = [list(range(24)) for _ in range(4)]
    for number, order in enumerate(orders):
        random.Random(number).shuffle(order)
    found = set()
    for order in orders:
        own = wanted()
        for number in order:
            own.add(number, some(number))
        found.add(own.encoded("fp32"))
    assert len(found) == 1
    plain = {
        sum((some(n)[0]["q_proj"][0] for n in order), torch.zeros(2, 4)).numpy().tobytes() for order in orders
    }
    assert len(plain) > 1  # float32 alone would differ


def sums(limits: Limits | None = None, capacity: int = 1000) -> GradientSums:
    return GradientSums(limits or Limits(sum_share_per_peer=0.5), capacity)


def test_a_sum_belongs_to_its_peer_one_adapter_and_one_run():
    all_sums = sums()
    first = all_sums.begin(NAME, wanted("a"))
    assert all_sums.begin(NAME, wanted("a")) is first
    assert all_sums.begin(NAME, wanted("b")) is not first
    other = wanted("a")
    other.run = Blocks(0, 2)
    with pytest.raises(RemoteProtocolError, match="of another adapter, or of other blocks"):
        all_sums.begin(NAME, other)
    assert len(all_sums._sums) == 2


def test_a_sum_is_collected_once_at_a_time_and_counts_until_then():
    all_sums, used = sums(), wanted().size
    own = all_sums.begin(NAME, wanted())
    with pytest.raises(Refused, match="no such sum of gradients is here"):
        collect(all_sums, "a")  # no request has ended
    own.add(0, some(0))
    all_sums.end(own, 0.0)
    with pytest.raises(Refused, match="no such sum of gradients is here"):
        collect(all_sums, "b")
    collecting = all_sums.collecting("a", NAME, now)
    assert collecting.__enter__() is own
    with pytest.raises(TooManyStreams):
        collect(all_sums, "a")
    with pytest.raises(Refused, match="is being collected"):
        all_sums.begin(NAME, wanted())
    all_sums.expire(10_000.0)
    assert all_sums.used == used
    gone = PeerGone("in the middle")
    assert not collecting.__exit__(PeerGone, gone, None)
    assert all_sums.used == used  # it is still there
    collect(all_sums, "a")
    assert all_sums.used == 0


def collect(all_sums: GradientSums, peer: str) -> None:
    with all_sums.collecting(peer, NAME, now):
        assert all_sums.used


def now() -> float:
    return 0.0


def test_the_sums_keep_within_their_budget_and_each_peer_within_its_share():
    all_sums = sums()
    all_sums.begin(b"1" * 16, wanted("a", 400))
    with pytest.raises(TooManyStreams, match="a sum of 200 bytes of gradients, 100 are free"):
        all_sums.begin(b"2" * 16, wanted("a", 200))
    all_sums.begin(b"1" * 16, wanted("b", 500))
    with pytest.raises(TooManyStreams, match="a sum of 200 bytes of gradients, 100 are free"):
        all_sums.begin(b"1" * 16, wanted("c", 200))
    assert all_sums.used == 900


def test_a_peer_has_a_number_of_sums_and_a_public_address_a_share():
    limits = Limits(max_sums_per_peer=2, adapter_share_per_prefix=0.5)
    all_sums = sums(limits)
    for number in range(2):
        all_sums.begin(bytes([number]) * 16, wanted("a", 1))
    with pytest.raises(TooManyStreams, match="2 sums of gradients of yours are open"):
        all_sums.begin(b"x" * 16, wanted("a", 1))
    all_sums = sums(replace(limits, sum_share_per_peer=1.0))
    all_sums.begin(NAME, wanted("a", 400, prefix=CROWD))
    with pytest.raises(TooManyStreams, match="100 are free"):
        all_sums.begin(NAME, wanted("b", 200, prefix=CROWD))
    all_sums.begin(NAME, wanted("c", 200, prefix="192.0.2.1/32"))


def test_a_sum_that_nobody_uses_is_gone_and_one_in_use_stays():
    all_sums = sums()
    own = all_sums.begin(NAME, wanted())
    all_sums.expire(1000)
    assert all_sums.used == own.size
    all_sums.end(own, 1000)
    all_sums.expire(1000 + Limits().sum_idle_seconds)
    assert all_sums.used == own.size
    all_sums.expire(1001 + Limits().sum_idle_seconds)
    assert all_sums.used == 0
