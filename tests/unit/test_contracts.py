"""How hidden states travel in each epoch of a session."""

from __future__ import annotations

from dataclasses import replace

import pytest

from client.chains.chooser import HopTerms
from client.session.actions import Lost
from client.session.repair.contracts import Contracts, packs_over, way_of
from tensor_codec.errors import PeerGone
from tensor_codec.messages.contract import Contract
from tests.session_world import Peers, change_route, sound_session

NARROW, EXACT = "bfloat16", "float32"


def contracts(codec: str = "auto") -> Contracts:
    kept = codec if codec in ("fp32", "bf16") else "fp32"
    return Contracts(codec, Contract(bytes(16), 0, 6, 1, 64, 4, kept, 2048))


def test_the_codec_is_that_of_the_hops_of_each_new_route():
    agreed = contracts()
    assert agreed.agree(1, [NARROW, NARROW], kept=False).codec == "bf16"
    agreed.sent()
    assert agreed.agree(2, [NARROW, EXACT], kept=True).codec == "fp32"


def test_hops_that_go_on_never_get_a_narrower_codec_once_anything_was_sent():
    for sent, kept, codec in ((True, True, "fp32"), (False, True, "bf16"), (True, False, "bf16")):
        agreed = contracts()
        agreed.agree(1, [EXACT, NARROW], kept=False)
        if sent:
            agreed.sent()
        assert agreed.agree(2, [NARROW, NARROW], kept=kept).codec == codec


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_a_codec_that_the_user_chose_stays(codec):
    agreed = contracts(codec)
    found = [agreed.agree(epoch, [dtype], kept=False).codec for epoch, dtype in enumerate((NARROW, EXACT), 1)]
    assert found == [codec, codec]


@pytest.mark.parametrize("wanted", ["auto", "exact", "fast"])
def test_the_codec_of_a_session_loses_nothing_of_the_hops_that_it_was_opened_with(wanted):
    agreed = contracts(wanted)
    assert agreed.agree(1, [NARROW], kept=False).codec == "bf16"
    assert agreed.agree(2, [NARROW, EXACT], kept=False).codec == "fp32"


SLOW = 1.25e6  # bytes per second: 10 Mbit/s


def test_a_step_is_packed_over_those_links_alone_that_are_slow_and_whose_hop_reads_it():
    reads = HopTerms(NARROW, ("int8o",), 0.05, SLOW)
    terms = Contract(bytes(16), 0, 6, 1, 64, 576, "bf16", 2048)
    fast, old = replace(reads, link_speed=1e9), replace(reads, codecs=("int9",))
    unknown, near = replace(reads, link_speed=0.0), replace(reads, link_speed=0.0, link_seconds=1e-4)
    found = packs_over([reads, fast, old, None, unknown, near], terms)
    assert found == [3, 0, 0, 0, 28, 0]


def test_the_way_of_a_chain_is_its_delays_and_its_slowest_link_that_was_timed():
    terms = Contract(bytes(16), 0, 6, 1, 64, 576, "bf16", 2048)
    hops = [
        HopTerms(NARROW, (), 0.02, SLOW, 0.02),
        None,
        HopTerms(NARROW, ("int8o",), 0.06, SLOW, 0.1),
        HopTerms(NARROW, ("int8o",), 0.04, 0.0, 0.08),
    ]
    assert way_of(hops, terms, [0, 0, 3, 3]) == (pytest.approx(0.06 + 0.04), 1152 / SLOW)
    assert way_of(hops[2:], terms, [3, 3]) == (pytest.approx(0.05 + 0.04), 612 / SLOW)


def chain_of(codec: str) -> list[tuple[int, int]]:
    """For the route of a session: `pack` of the line-up, and of each place."""
    peers = Peers({"a": (0, 3), "b": (3, 6)})
    peers.codecs, peers.link_seconds, peers.link_speed = {"a": ("int8o",), "b": ("int8o",)}, 0.05, 1e3
    session = sound_session(peers, codec=codec)
    line_up, _ = session.route.line_up(session.route.chain, 0)
    return [(line_up.pack, 0), *[(0, place.pack) for place in line_up.places]]


def test_each_hop_is_told_of_the_link_to_the_next_one_and_the_last_answers_exactly():
    assert chain_of("fast") == [(1, 0), (0, 1), (0, 0)]


@pytest.mark.parametrize("codec", ["auto", "exact", "fp32", "bf16"])
def test_without_the_user_s_word_nothing_is_ever_packed(codec):
    assert chain_of(codec) == [(0, 0), (0, 0), (0, 0)]


def test_an_answer_is_read_in_the_codec_of_its_epoch():
    agreed = contracts()
    agreed.agree(1, [NARROW], kept=False)
    agreed.agree(2, [NARROW], kept=False)
    agreed.agree(3, [EXACT], kept=False)
    assert [agreed.in_epoch(epoch).codec for epoch in range(5)] == ["fp32", "bf16", "bf16", "fp32", "fp32"]


def test_a_session_of_bfloat16_hops_goes_on_exactly_when_a_float32_hop_takes_over():
    """One of two hops in bfloat16 dies, and the only other holder of its blocks computes in float32."""
    peers = Peers({"a": (0, 3), "b": (3, 6), "c": (3, 6)}, c=2.0)
    peers.dtypes = {"a": NARROW, "b": NARROW}
    session = sound_session(peers, codec="auto")
    assert session.route.contracts.current.codec == "bf16"
    session.route.contracts.sent()
    session.receive(Lost(session.route.hops[1], PeerGone("gone")), 1.0)
    change_route(session, 2.0)
    assert [hop.hop.peer for hop in session.route.hops] == ["a", "c"]
    assert session.route.contracts.current.codec == "fp32"
    assert {hop.codec for hop in session.route.hops} == {"fp32"}
