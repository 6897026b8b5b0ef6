"""How hidden states travel in each epoch of a session."""

from __future__ import annotations

from dataclasses import replace

import pytest

from client.chains.chooser import HopTerms
from client.session.actions import Lost
from client.session.repair.contracts import NEAR_SECONDS, Contracts, Outliers, outliers_over
from tensor_codec.errors import PeerGone
from tensor_codec.messages.contract import Contract
from tests.session_world import Peers, change_route, sound_session

NARROW, EXACT = "bfloat16", "float32"


def contracts(codec: str = "auto") -> Contracts:
    kept = "fp32" if codec == "auto" else codec
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


def fast(outliers: Outliers = "pay", hidden: int = 64) -> Contracts:
    agreed = Contracts("fast", Contract(bytes(16), 0, 6, 1, 64, hidden, "fp32", 2048))
    agreed.agree(1, [NARROW], kept=False, outliers=outliers)
    return agreed


@pytest.mark.parametrize("wanted", ["auto", "exact", "fp32", "bf16"])
def test_without_the_user_s_word_nothing_is_ever_sent_in_int8o(wanted):
    agreed = Contracts(wanted, Contract(bytes(16), 0, 6, 1, 64, 64, "fp32", 2048))
    assert agreed.agree(1, [NARROW], kept=False, outliers="pay").codec in ("bf16", "fp32")


def test_fast_takes_int8o_where_it_pays_and_else_loses_nothing():
    assert fast().current.codec == "int8o"
    assert fast("read").current.codec == "bf16"
    assert fast("none").current.codec == "bf16"
    assert fast(hidden=1).current.codec == "bf16"  # no bytes would be saved


def test_a_session_stays_in_int8o_while_every_hop_reads_it_and_goes_on_in_fp32_else():
    agreed = fast()
    agreed.sent()
    assert agreed.agree(2, [NARROW], kept=True, outliers="read").codec == "int8o"
    assert agreed.agree(3, [NARROW], kept=True, outliers="none").codec == "fp32"
    for kept in (True, False):  # bf16 would round what was sent
        assert agreed.agree(4 + kept, [NARROW], kept=kept, outliers="pay").codec == "fp32"


def test_before_anything_was_sent_a_session_leaves_int8o_for_the_codec_of_its_hops():
    agreed = fast()
    assert agreed.agree(2, [NARROW], kept=False, outliers="none").codec == "bf16"
    assert agreed.agree(3, [NARROW], kept=False, outliers="pay").codec == "bf16"


def test_what_int8o_is_to_a_chain_follows_from_what_its_hops_read_and_from_its_slowest_link():
    reads = HopTerms(NARROW, ("int8o",), 0.0)
    slow = replace(reads, link_seconds=NEAR_SECONDS)
    assert outliers_over([reads, slow]) == "pay"
    assert outliers_over([reads, reads]) == "read"
    assert outliers_over([slow, HopTerms(NARROW, ("int9",), 1.0)]) == "none"
    assert outliers_over([slow, None]) == "pay"  # its opening fails anyway


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
