"""Which hops a session keeps, which it takes in their place, and what they are told of each other."""

from __future__ import annotations

import pytest

from client.session.hop_state import HopState, Neighbours
from client.session.repair.replacement import MAX_REFUSED_SECONDS, Replacement
from client.session.terms import Terms
from routing.blocks import Blocks
from routing.chains.hops import Hop, NoChain
from routing.names import PeerId
from tensor_codec.errors import CacheFull, Draining, PeerGone, Refused, TooManyStreams
from tensor_codec.messages.session import Opened
from tests.session_world import HELD, HIDDEN, MAX_LENGTH, WHOLE, Peers


def replacement(peers: Peers | None = None, run: Blocks = WHOLE) -> Replacement:
    terms = Terms("m", "r", run, HIDDEN, 2, MAX_LENGTH, "fp32")
    return Replacement(terms, peers or Peers(HELD))


def some_hops(names: str = "ABC") -> list[HopState]:
    return [HopState(Hop(PeerId(name), *HELD[name]), "float32", "fp32") for name in names]


def names(chain) -> str:
    return "".join(hop.peer for hop in chain.hops)


def test_hops_that_live_stay_and_only_the_gaps_are_filled():
    peers = Peers(HELD)
    hops = some_hops()
    hops[1].fail(PeerGone("gone"), blame=True)
    assert names(replacement(peers).best_chain(hops, last_resort=False)) == "AbC"
    (asked,) = peers.asked
    assert (asked["start"], asked["stop"], asked["others"]) == (2, 4, 2)
    assert asked["tokens"] == 2 * MAX_LENGTH


@pytest.mark.parametrize("why", ["leaving", "refused", "blamed"])
def test_a_hop_that_is_avoided_is_kept_only_as_a_last_resort(why):
    hops = some_hops()
    act = {"leaving": hops[0].set_leaving, "refused": hops[0].refuse}
    act.get(why, lambda: hops[0].fail(PeerGone("gone"), blame=True))()
    assert names(replacement().best_chain(hops, last_resort=False)) == "aBC"
    alone = Peers({name: HELD[name] for name in "ABC"})
    with pytest.raises(NoChain):
        replacement(alone).best_chain(hops, last_resort=False)
    assert names(replacement(alone).best_chain(hops, last_resort=True)) == "ABC"


def test_where_the_gaps_cannot_be_filled_the_whole_chain_is_another_one():
    peers = Peers({"A": (2, 4), "w": (0, 6)}, A=0.1)
    hops = [HopState(Hop(PeerId("A"), 2, 4), "float32", "fp32")]
    assert names(replacement(peers).best_chain(hops, last_resort=False)) == "w", "w serves a session once"


def test_over_a_run_of_blocks_its_gaps_alone_are_filled():
    peers = Peers({"B": (2, 4), "b": (2, 4), "c": (3, 6)})
    chosen = replacement(peers, Blocks(3, 5))
    hops = [HopState(Hop(PeerId("B"), 3, 4), "float32", "fp32")]
    assert chosen.best_chain(hops, last_resort=False).hops == (Hop(PeerId("B"), 3, 4), Hop(PeerId("c"), 4, 5))
    hops[0].fail(PeerGone("gone"), blame=True)
    assert chosen.best_chain(hops, last_resort=False).hops == (Hop(PeerId("b"), 3, 4), Hop(PeerId("c"), 4, 5))
    with pytest.raises(NoChain) as none:
        replacement(Peers({"B": (2, 4)}), Blocks(3, 5)).best_chain([], last_resort=False)
    assert none.value.missing == (Blocks(4, 5),)


@pytest.mark.parametrize("error", [Refused("no"), CacheFull("too long")])
def test_a_peer_that_cannot_serve_the_session_at_all_is_never_chosen_again(error):
    chosen = replacement()
    assert chosen.refused(PeerId("A"), error) is None
    assert names(chosen.best_chain([], last_resort=True))[0] == "a"


@pytest.mark.parametrize("error", [CacheFull("full", 2.0), Draining("soon"), TooManyStreams("busy", 1.0)])
def test_a_peer_that_may_serve_it_later_may_be_chosen_again(error):
    chosen = replacement()
    chosen.refused(PeerId("A"), error)
    assert names(chosen.best_chain([], last_resort=True)) == "ABC"


def test_a_peer_that_refuses_again_and_again_is_left_alone_for_twice_as_long_each_time():
    chosen = replacement()
    waits = [chosen.refused(PeerId("A"), CacheFull("full", 2.0)) for _ in range(6)]
    assert waits == [2.0, 4.0, 8.0, MAX_REFUSED_SECONDS, MAX_REFUSED_SECONDS, MAX_REFUSED_SECONDS]
    assert chosen.refused(PeerId("B"), CacheFull("full", 2.0)) == 2.0


def test_a_last_resort_asks_a_hop_again_and_others_where_it_goes_on_refusing():
    chosen, hops = replacement(Peers(HELD, a=0.1)), some_hops()
    for names_of_chain in ("ABC", "aBC"):
        hops[0].refuse()
        chosen.refused(PeerId("A"), CacheFull("full", 2.0))
        assert names(chosen.best_chain(hops, last_resort=True)) == names_of_chain


@pytest.mark.parametrize("last_resort", [False, True])
def test_a_gap_is_filled_by_peers_of_the_kinds_that_served_until_now(last_resort):
    peers = Peers(HELD)
    peers.dtypes["A"] = "bfloat16"
    chosen, hops = replacement(peers), some_hops()
    chosen.adopt([hop.hop for hop in hops])
    hops[1].fail(PeerGone("gone"), blame=True)
    chain = chosen.best_chain(hops, last_resort=last_resort)
    (asked,) = peers.asked
    assert asked["kinds"] == {"bfloat16", "float32"}
    assert asked["last_resort"] is last_resort
    assert chain.expected_seconds == 0.0


def test_hops_that_cannot_reach_each_other_are_not_told_of_each_other():
    chosen = replacement()
    hops = [hop.hop for hop in some_hops()]
    assert chosen.neighbours(hops, 1) == Neighbours(PeerId("A"), PeerId("C"), relay=False)
    chosen.separate([(PeerId("A"), PeerId("B"))])
    found = [chosen.neighbours(hops, index) for index in range(3)]
    assert found == [
        Neighbours(None, None, relay=True),
        Neighbours(None, PeerId("C"), relay=False),
        Neighbours(PeerId("B"), None, relay=False),
    ]
    chosen.separate([(PeerId("C"), PeerId("B"))])
    assert chosen.neighbours(hops, 1).successor == "C", "the other way round says nothing"


def test_a_pair_is_noted_once_as_carried_by_the_client():
    chosen, pair = replacement(), (PeerId("A"), PeerId("B"))
    assert chosen.newly_relayed([pair]) == [pair]
    assert chosen.newly_relayed([pair]) == []


@pytest.mark.parametrize("cut", [True, False])
def test_a_new_hop_says_whether_its_caches_can_go_back(cut):
    (hop,) = some_hops("A")
    hop.opened(Opened(push=True, cut=cut, queue=1.5))
    assert (hop.progress.cut, hop.push, hop.queue) == (cut, True, 1.5)
