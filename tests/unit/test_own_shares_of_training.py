"""Peers with a share of their own: of adapters, sums of gradients, tapes, prompts, uploads and requests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.network.admission.shares import places_of_most
from node.network.sharing.downloads import Downloads
from node.serving.adapters.claims import Claim, Claims
from node.serving.adapters.sums import GradientSum, GradientSums
from node.serving.adapters.uploads import Upload, Uploads
from node.serving.executor.job_queues import JobQueues
from node.serving.executor.jobs import Job, Kind
from node.serving.fair_shares import counted, party_of
from node.serving.memory import trained_bytes
from node.serving.sessions.prompt_budget import HeldPrompts, PromptBudget
from node.serving.training.tapes import KeptTape, TapeBudget
from tensor_codec.adapters import AdapterManifest
from tensor_codec.blocks import Blocks
from tensor_codec.errors import CacheFull, Refused, TooManyStreams
from tensor_codec.limits import Limits
from tensor_codec.messages.contract import Contract
from tensor_codec.messages.forward_backward import Run
from tensor_codec.span_spec import SpanSpec

HOME, CROWD, PUBLIC = "192.0.2.1/32", "198.51.100.1/32", "8.8.8.8/32"
OWN = (("gateway", 0.75),)
MANIFEST = AdapterManifest("r", "fp32", ((), ()))


def test_parts_count_for_a_prefix_or_for_a_peer_and_then_beyond_its_share():
    own = {"gateway": 0.75}
    assert party_of("gateway", HOME, own) == "gateway"
    assert party_of("a", HOME, own) == HOME
    assert counted(HOME, 80, 100, own) == 80
    assert counted("gateway", 75, 100, own) == 0
    assert counted("gateway", 80, 100, own) == 5


def test_numbers_grow_with_the_share():
    limits = Limits(max_adapters_per_peer=8, adapter_share_per_peer=0.25, peer_shares=OWN)
    assert limits.number_of("gateway", 8, 0.25) == 24
    assert limits.number_of("a", 8, 0.25) == 8
    assert limits.share_of("gateway", 0.25) == 0.75
    assert limits.share_of("a", 0.25) == 0.25


# adapters


def claims(**limits: object) -> Claims:
    return Claims(Limits(peer_shares=OWN, **limits), 100, lambda claim: None)  # type: ignore[arg-type]


def bring(at: Claims, peer: str, number: int, size: int, prefix: str, now: float = 0.0) -> Claim:
    claim = at.reserve(peer, prefix, f"adapter {number}", size, now)
    claim.pins -= 1
    return claim


def holders(at: Claims) -> list[tuple[str, str]]:
    return sorted(at._claims)


def test_a_gateway_may_hold_its_share_of_the_room_for_adapters_and_others_the_usual_one():
    at = claims()
    assert (at.room_of("gateway"), at.room_of("a")) == (75, 25)
    bring(at, "gateway", 1, 75, HOME)
    with pytest.raises(Refused, match="an adapter of 76 bytes for these blocks, 75 are allowed here"):
        bring(at, "gateway", 2, 76, HOME)
    with pytest.raises(Refused, match="an adapter of 26 bytes for these blocks, 25 are allowed here"):
        bring(at, "a", 2, 26, HOME)


def test_the_share_of_a_public_address_is_not_that_of_a_gateway_behind_it():
    at = claims(adapter_share_per_prefix=0.5)
    for number in range(3):
        bring(at, "gateway", number, 25, PUBLIC, now=number)
    bring(at, "neighbour", 9, 25, PUBLIC, now=9)  # the gateway's claims are none of its address
    assert holders(at) == [
        *[("gateway", f"adapter {number}") for number in range(3)],
        ("neighbour", "adapter 9"),
    ]


def test_a_gateway_has_more_adapters_as_its_share_is_larger():
    at = claims(max_adapters_per_peer=2)
    for number in range(7):
        bring(at, "gateway", number, 1, HOME, now=number)
    assert len(at._claims) == 6  # three times as many, and its own oldest has made room
    assert ("gateway", "adapter 0") not in at._claims


def test_up_to_its_share_no_adapter_of_a_gateway_makes_room_for_others():
    at = claims()
    bring(at, "gateway", 1, 75, HOME)
    bring(at, "a", 2, 25, CROWD, now=1)
    bring(at, "a2", 3, 25, CROWD, now=2)
    assert holders(at) == [("a2", "adapter 3"), ("gateway", "adapter 1")]
    with used(at, "a2", 3), pytest.raises(TooManyStreams, match="no room for an adapter of 20 bytes"):
        bring(at, "b", 4, 20, HOME, now=3)
    assert ("gateway", "adapter 1") in at._claims


@contextmanager
def used(at: Claims, peer: str, number: int) -> Iterator[None]:
    claim = at.get(peer, f"adapter {number}")
    assert claim is not None
    claim.pins += 1
    yield
    claim.pins -= 1


def test_a_gateway_within_its_share_gets_room_of_prefixes_that_hold_less():
    at = claims()
    bring(at, "gateway", 1, 60, HOME)
    bring(at, "a", 2, 20, CROWD, now=1)
    bring(at, "b", 3, 20, HOME, now=0)
    bring(at, "gateway", 4, 15, HOME, now=5)  # with 60 of 100 it held more than anybody
    assert ("gateway", "adapter 1") in at._claims
    assert len(at._claims) == 3


def test_two_gateways_take_nothing_from_each_other():
    at = Claims(Limits(peer_shares=(("one", 0.75), ("two", 0.75))), 100, lambda claim: None)
    bring(at, "one", 1, 70, HOME)
    with pytest.raises(TooManyStreams, match="no room for an adapter of 40 bytes"):
        bring(at, "two", 2, 40, CROWD)
    bring(at, "two", 2, 30, CROWD)
    assert holders(at) == [("one", "adapter 1"), ("two", "adapter 2")]


ASKS = st.lists(
    st.tuples(
        st.sampled_from(["gateway", "a", "b"]), st.sampled_from([HOME, CROWD, PUBLIC, ""]),
        st.integers(1, 30), st.integers(0, 8),
    ),
    max_size=40,
)  # fmt: skip


@given(ASKS)
def test_a_gateway_s_adapters_are_given_up_by_itself_alone_and_the_capacity_holds(
    asks: list[tuple[str, str, int, int]],
):
    at = claims()
    for now, (peer, prefix, size, number) in enumerate(asks):
        before = {key for key in at._claims if key[0] == "gateway"}
        with suppress(Refused, TooManyStreams):
            bring(at, peer, number, size, prefix, now=now)
        assert at.used <= at.capacity
        if peer != "gateway":
            assert before <= set(at._claims)


def test_what_a_request_trains_is_counted_for_the_largest_share():
    usual, shared = Limits(), Limits(peer_shares=(*OWN, ("small", 0.01)))
    difference = trained_bytes(64, 1 << 20, shared) - trained_bytes(64, 1 << 20, usual)
    assert difference == 2 * (trained_bytes(64, 1 << 20, usual) - trained_bytes(64, 0, usual))


# sums of gradients


def a_sum(peer: str, size: int, prefix: str = "", now: float = 0.0) -> GradientSum:
    return GradientSum(peer, prefix, "x", Blocks(0, 1), MANIFEST, size, now)


def begin(at: GradientSums, name: int, wanted: GradientSum, *, busy: bool = False) -> None:
    found = at.begin(bytes([name]) * 16, wanted)
    if not busy:
        at.end(found, wanted.used_at)


def sums_of(at: GradientSums) -> list[str]:
    return sorted(each.peer for each in at._sums.values())


def test_a_gateway_may_have_its_share_of_the_room_for_sums_and_more_of_them():
    at = GradientSums(Limits(peer_shares=OWN, max_sums_per_peer=2), 100)
    begin(at, 1, a_sum("gateway", 70))
    with pytest.raises(TooManyStreams, match="a sum of 6 bytes of gradients, 5 are free"):
        begin(at, 2, a_sum("gateway", 6))
    for name in range(2, 7):
        begin(at, name, a_sum("gateway", 1))
    with pytest.raises(TooManyStreams, match="6 sums of gradients of yours are open"):
        begin(at, 8, a_sum("gateway", 0))
    with pytest.raises(TooManyStreams, match="a sum of 26 bytes of gradients, 25 are free"):
        begin(at, 1, a_sum("a", 26))


def test_a_gateway_does_not_share_the_part_of_its_public_address():
    at = GradientSums(Limits(peer_shares=OWN, adapter_share_per_prefix=0.5), 100)
    begin(at, 1, a_sum("gateway", 60, PUBLIC))
    begin(at, 1, a_sum("neighbour", 25, PUBLIC))
    assert sums_of(at) == ["gateway", "neighbour"]


def test_for_a_gateway_sums_without_a_request_make_room_of_the_largest_prefix_and_the_oldest_first():
    at = GradientSums(Limits(peer_shares=OWN), 100)
    begin(at, 1, a_sum("a", 20, CROWD, now=1))
    begin(at, 1, a_sum("b", 20, CROWD, now=0))
    begin(at, 1, a_sum("c", 20, HOME, now=0))
    begin(at, 1, a_sum("d", 20, "", now=0), busy=True)
    begin(at, 1, a_sum("gateway", 30, HOME, now=2))
    assert sums_of(at) == ["a", "c", "d", "gateway"]  # b's was the oldest of the largest
    begin(at, 2, a_sum("gateway", 45, HOME, now=3))
    assert sums_of(at) == ["d", "gateway", "gateway"]
    assert at.used <= 100


def test_for_a_gateway_nothing_is_forgotten_where_it_would_not_help_and_for_others_nothing_ever():
    at = GradientSums(Limits(peer_shares=OWN), 100)
    for peer in "abcd":
        begin(at, 1, a_sum(peer, 25), busy=peer != "a")
    with pytest.raises(TooManyStreams, match="a sum of 26 bytes of gradients, 25 are free"):
        begin(at, 1, a_sum("gateway", 26))
    with pytest.raises(TooManyStreams, match="a sum of 1 bytes of gradients, 0 are free"):
        begin(at, 1, a_sum("e", 1))
    assert sums_of(at) == ["a", "b", "c", "d"]


# tapes


RUN = Run(SpanSpec("m", "r", Blocks(2, 5), "float32"), 2, "fp32")
CONTRACT = Contract(b"", 2, 5, 2, 8, 4, "fp32", 64)


def tape(peer: str, number: int, size: int, prefix: str = "") -> KeptTape:
    run = Run(RUN.spec, RUN.batch, RUN.codec, tape=bytes([number]) * 16)
    return KeptTape(peer, run, CONTRACT, size, prefix, 0.0)


def kept(at: TapeBudget, one: KeptTape) -> bool:
    if not at.open(one):
        return False
    at.keep(one)
    return True


def tapes_of(at: TapeBudget) -> list[str]:
    return sorted(peer for peer, _ in at._tapes)


def test_up_to_its_share_a_gateway_loses_no_tape_and_others_make_room_for_it():
    at = TapeBudget(100, 30, {"gateway": 0.75})
    for number in range(3):
        assert kept(at, tape("gateway", number, 25, HOME))
    assert kept(at, tape("a", 1, 25, CROWD))
    assert not kept(at, tape("b", 1, 26, HOME))  # nothing is dropped for one that does not fit
    assert kept(at, tape("a", 2, 10, CROWD))
    assert tapes_of(at) == ["a", "gateway", "gateway", "gateway"]
    at = TapeBudget(100, 30, {"gateway": 0.75})
    assert kept(at, tape("gateway", 0, 50, HOME))
    assert kept(at, tape("a", 1, 50, CROWD))
    assert kept(at, tape("gateway", 1, 25, HOME))  # it holds more than the crowd then
    assert tapes_of(at) == ["gateway", "gateway"]


def test_beyond_its_share_a_gateway_gives_tapes_up_as_others_do():
    at = TapeBudget(100, 30, {"gateway": 0.5})
    for number in range(4):
        assert kept(at, tape("gateway", number, 25, HOME))
    assert kept(at, tape("a", 1, 25, CROWD))  # 50 beyond its share, and 25
    assert tapes_of(at) == ["a", *["gateway"] * 3]
    assert not kept(at, tape("b", 1, 25, CROWD))  # 25 beyond its share, and 50 with it


# deep prompts


def test_a_gateway_s_prompts_have_its_share_and_the_largest_prefix_makes_way():
    budget = PromptBudget(Limits(max_prompt_bytes=100, max_prompt_bytes_per_peer=25, peer_shares=OWN))
    gone: list[str] = []

    def held(peer: str, size: int, prefix: str) -> HeldPrompts:
        return HeldPrompts(peer, prefix, size, lambda _: gone.append(peer))

    with ExitStack() as stack:
        stack.enter_context(budget.hold(held("gateway", 50, HOME)))
        stack.enter_context(budget.hold(held("a", 25, CROWD)))
        stack.enter_context(budget.hold(held("b", 25, HOME)))
        with pytest.raises(CacheFull, match="prompts of 26 bytes, 25 of 75 are free"):
            budget.check(held("gateway", 26, HOME))
        with pytest.raises(CacheFull):
            budget.check(held("c", 10, HOME))  # its neighbour the gateway gives nothing up
        stack.enter_context(budget.hold(held("gateway", 20, HOME)))
        assert gone in (["a"], ["b"])
        assert budget.used <= 100


# places: uploads, downloads, requests


def test_places_go_to_a_newcomer_of_a_smaller_prefix_and_to_one_with_its_own_share():
    held = [Upload("a", CROWD), Upload("b", HOME), Upload("c", CROWD), Upload("gateway", "")]
    assert places_of_most(held, PUBLIC) == [held[2], held[0]]
    assert places_of_most(held, HOME) == []  # it would have two as well
    assert places_of_most(held, "") == []
    assert places_of_most(held, HOME, own_share=True) == [held[2], held[0]]
    assert places_of_most([Upload("gateway", "")], "", own_share=True) == []


def test_a_gateway_has_its_share_of_uploads_and_no_upload_of_it_gives_way():
    at = Uploads(Limits(max_adapter_uploads=4, max_adapter_uploads_per_peer=1, peer_shares=OWN))
    crowd = [at.begin(f"crowd {number}", CROWD) for number in range(4)]
    mine = [at.begin("gateway", CROWD) for _ in range(3)]
    assert [each.yields for each in crowd] == [False, True, True, True]
    with pytest.raises(TooManyStreams, match="3 adapters of yours are on their way"):
        at.begin("gateway", CROWD)
    with pytest.raises(TooManyStreams, match="adapters are on their way here"):
        at.begin("home", HOME)
    assert not any(each.yields for each in mine)


def test_a_gateway_has_its_share_of_downloads_and_of_their_rate():
    limits = Limits(max_adapter_downloads=4, max_adapter_downloads_per_peer=1, peer_shares=OWN)
    at, ended = Downloads(limits), list[str]()
    for number in range(4):
        at.begin(f"crowd {number}", PUBLIC, partial(ended.append, f"crowd {number}"))
    for _ in range(3):
        at.begin("gateway", PUBLIC, partial(ended.append, "gateway"))
    assert ended == ["crowd 3", "crowd 2", "crowd 1"]
    with pytest.raises(TooManyStreams, match="3 downloads of yours"):
        at.begin("gateway", PUBLIC, lambda: None)
    rate, burst = limits.adapter_seed_bytes_per_second, limits.adapter_seed_burst_bytes
    at = Downloads(limits)
    assert at.pause(PUBLIC, int(0.75 * burst), 0.0, "gateway") == 0.0
    assert at.pause(PUBLIC, int(0.25 * burst), 0.0, "neighbour") == 0.0  # the gateway's bytes are its own
    assert at.pause(PUBLIC, int(0.75 * rate), 0.0, "gateway") == pytest.approx(1.0)


def test_a_gateway_has_its_share_of_waiting_requests():
    queues = JobQueues(Limits(peer_shares=OWN), max_stateless=8, max_stateless_per_peer=2)

    def job(number: int, peer: str, prefix: str) -> Job:
        return Job(number, peer, Kind.STATELESS, 1, 1, 0, 4, prefix=prefix)

    for number in range(8):
        queues.add(job(number, f"crowd {number // 2}", CROWD))
    for number in range(8, 14):
        queues.add(job(number, "gateway", ""))
    assert [each.number for each in queues.expired] == [7, 6, 5, 4, 3, 2]
    with pytest.raises(TooManyStreams, match="8 stateless requests wait for compute here, 8 may"):
        queues.add(job(14, "gateway", ""))
    with pytest.raises(TooManyStreams, match="8 stateless requests wait"):
        queues.add(job(15, "nobody", ""))
