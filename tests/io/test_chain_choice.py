"""The grounds of a client's choices of chains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from client.adapters.upload import Needs
from client.chains.chain_choice import chooser_for
from client.chains.chain_wait import PINGED_PEERS, choose_among_the_living
from routing.blocks import Blocks
from routing.chains.alternatives import Constraints
from routing.chains.hops import Hop, NoChain
from routing.names import PeerId
from tests.fakes_serving import some_hidden, swarm, whole_model


async def test_chains_have_nobody_in_common_where_there_are_others(autojump_clock):
    async with swarm() as world:
        for name, start, stop in (("A", 0, 3), ("a", 0, 3), ("B", 3, 6), ("b", 3, 6), ("c", 3, 6)):
            world.add(name, start, stop)
        routes = world.routes(constraints=Constraints(blocked={PeerId("c")}))
        one, two = (["".join(hop.peer for hop in chain.hops)] for chain in routes.chains(2))
        assert (one, two) == (["AB"], ["ab"])
        world.out_of_sight |= {PeerId("A"), PeerId("a")}
        with pytest.raises(NoChain):
            routes.chains(2)


async def test_every_decode_step_of_a_session_teaches_how_fast_its_hops_are(autojump_clock):
    async with swarm() as world:
        world.add("A", 0, 3, seconds=0.3)
        world.add("B", 3, 6, seconds=0.6)
        routes = world.routes()
        session = await world.open(routes=routes)
        await session.step(some_hidden(4))
        assert routes.measured.decode == {}, "four positions at once say nothing of one"
        await session.step(some_hidden(1))
        seen = {peer: figure.seconds for peer, figure in routes.measured.decode.items()}
        (a, _), (b, _) = session.times.hops
        assert seen == {"A": pytest.approx(a / 3), "B": pytest.approx(b / 3)}
        session.close()


async def test_a_hop_that_hides_how_long_it_had_a_step_is_found_out(autojump_clock):
    async with swarm() as world:
        world.add("A", 0, 3, seconds=0.3)
        world.add("B", 3, 6, seconds=0.3)
        routes = world.routes()
        routes.choose()
        hops = (Hop(PeerId("A"), 0, 3), Hop(PeerId("B"), 3, 6))
        routes.observe_step(hops, [0.0001, 0.3], 0.61)
        seen = {peer: figure.seconds for peer, figure in routes.measured.decode.items()}
        assert seen == {"A": pytest.approx(0.1, rel=0.05), "B": pytest.approx(0.1, rel=0.05)}


async def test_a_session_of_many_rows_teaches_nothing(autojump_clock):
    async with swarm() as world:
        world.add("A", 0, 3, seconds=0.3)
        routes = world.routes()
        session = await world.open(routes=routes, batch=2)
        await session.step(some_hidden(1, batch=2))
        assert routes.measured.decode == {}
        session.close()


async def test_servers_that_give_one_model_different_names_make_one_chain(autojump_clock):
    async with swarm() as world:
        world.add("A", 0, 3, model="a-folder")
        world.add("B", 3, 6, model="another-folder")
        session = await world.open(max_length=4)
        hidden = some_hidden(4)
        assert torch.equal(await session.step(hidden), whole_model(hidden, 0, 6))
        session.close()


async def test_a_session_goes_only_to_those_that_take_one_so_long(autojump_clock):
    async with swarm() as world:
        world.add("quick", 0, 6, seconds=0.06, tokens=8192)
        world.add("roomy", 0, 6, seconds=0.6, tokens=65_536)
        routes = world.routes()
        assert [hop.peer for hop in routes.choose(tokens=8192).hops] == ["quick"]
        assert [hop.peer for hop in routes.choose(tokens=8193).hops] == ["roomy"]
        with pytest.raises(NoChain) as none:
            routes.choose(tokens=65_537)
        assert "of 65537 tokens was asked for, servers of these blocks take 65536 at most" in str(none.value)


async def test_where_blocks_have_no_server_the_length_is_not_blamed(autojump_clock):
    async with swarm() as world:
        world.add("a", 0, 6, tokens=8192)
        with pytest.raises(NoChain) as none:
            world.routes(constraints=Constraints(blocked={PeerId("a")})).choose(tokens=9000)
        assert "asked for" not in str(none.value)


async def test_prompts_go_only_to_peers_that_say_that_they_take_them(autojump_clock):
    async with swarm() as world:
        world.add("old", 0, 6)
        world.add("new", 0, 6, seconds=9)
        routes = world.routes()
        view = world.view()
        entries = {
            peer: replace(entry, record=replace(entry.record, prompts=peer == "new"))
            for peer, entry in view.entries.items()
        }
        routes.view = lambda: replace(view, entries=entries)
        assert names(routes.choose()) == "old"
        prompted = chooser_for(routes, Needs(prompts=True))
        assert names(prompted.choose()) == "new"
        assert names(prompted.choose_for_throughput(0, 6, positions=9, waiting={})) == "new"
        assert prompted.blame is routes.blame, "one memory of peers"
        del entries[PeerId("new")]
        with pytest.raises(NoChain, match="constraints"):
            prompted.choose()


async def test_an_adapter_that_no_server_keeps_is_named(autojump_clock):
    async with swarm() as world:
        world.add("a", 0, 6)
        view = world.view()
        entries = {
            peer: replace(entry, record=replace(entry.record, adapters=("poems#0123456789abcdef",)))
            for peer, entry in view.entries.items()
        }
        for name, kept in (("poems", True), ("poems#0123456789abcdef", True), ("prose", False)):
            routes = world.routes(constraints=Constraints(adapter=name))
            routes.view = lambda: replace(view, entries=entries)
            if kept:
                assert names(routes.choose()) == "a"
                continue
            with pytest.raises(NoChain, match="none of these keeps an adapter 'prose'"):
                routes.choose()


def silent(world, *names):
    """What the view says of peers that do not answer."""
    return lambda: replace(world.view(), silent=frozenset(map(PeerId, names)))


def names(chain):
    return "".join(hop.peer for hop in chain.hops)


async def test_who_does_not_answer_holds_no_block_as_long_as_there_is_hope(autojump_clock):
    async with swarm() as world:
        for name, start, stop in (("A", 0, 6), ("B", 0, 3), ("C", 3, 6)):
            world.add(name, start, stop)
        routes = world.routes()
        assert names(routes.choose()) == "A"
        routes.view = silent(world, "A")
        assert names(routes.choose()) == names(routes.choose(last_resort=True)) == "BC"
        assert names(routes.choose_for_throughput(0, 6, positions=9, waiting={})) == "BC"
        routes.view = silent(world, "A", "C")
        with pytest.raises(NoChain, match=r"blocks 3:6 .* nobody; no answer from 2 peers that serve"):
            routes.choose()
        assert names(routes.choose(last_resort=True)) == "A"


async def test_a_peer_that_failed_and_answers_is_tried_before_one_that_does_not_answer(autojump_clock):
    async with swarm() as world:
        world.add("A", 0, 6)
        world.add("B", 0, 6, seconds=1.0)
        routes = world.routes()
        routes.view = silent(world, "A")
        routes.refused(PeerId("B"), 60.0)
        assert names(routes.choose(last_resort=True)) == "B"


async def test_a_last_resort_takes_no_more_peers_that_failed_than_it_needs(autojump_clock):
    async with swarm() as world:
        world.add("B", 0, 3)
        world.add("C", 3, 6, seconds=1.0)
        world.add("D", 3, 6)
        routes = world.routes()
        assert names(routes.choose()) == "BD"
        routes.refused(PeerId("D"), 30.0)  # sooner forgiven than B, and not needed
        routes.refused(PeerId("B"), 60.0)
        with pytest.raises(NoChain):
            routes.choose()
        assert names(routes.choose(last_resort=True)) == "BC"


async def test_who_has_not_answered_yet_is_used_only_where_nobody_else_can_be(autojump_clock):
    async with swarm() as world:
        for name, start, stop in (("A", 0, 6), ("B", 0, 3), ("C", 3, 6)):
            world.add(name, start, stop)
        routes = world.routes()
        routes.late = lambda: {PeerId("A")}
        assert names(routes.choose()) == "BC"
        routes.late = lambda: {PeerId("A"), PeerId("C")}
        assert names(routes.choose()) == "A"


async def test_some_peers_are_enough_when_they_hold_what_all_hold(autojump_clock):
    async with swarm() as world:
        for name, start, stop in (("A", 0, 4), ("B", 0, 3), ("C", 2, 6)):
            world.add(name, start, stop)
        routes = world.routes()
        for peers, covered in (
            ("BC", True),
            ("AC", True),
            ("ABC", True),
            ("AB", False),
            ("A", False),
            ("", False),
        ):
            assert routes.is_covered_by(set(map(PeerId, peers)), Blocks(0, 6)) == covered
        assert routes.is_covered_by({PeerId("A")}, Blocks(1, 4)), "what others hold besides is not asked for"
        routes.view = silent(world, "C")
        assert routes.is_covered_by({PeerId("A")}, Blocks(0, 6))


async def test_for_a_run_of_blocks_only_its_servers_are_measured(autojump_clock):
    async with swarm() as world:
        for name, start, stop in (("A", 0, 2), ("B", 2, 4), ("C", 3, 6)):
            world.add(name, start, stop)
        routes = world.routes()
        routes.pings = Asked(routes, "ABC")
        chain = await routes.choose_measured(lambda: routes.choose(3, 4), Blocks(3, 4))
        assert set(routes.pings.asked) == {"B", "C"}
        assert [hop.blocks for hop in chain.hops] == [(3, 4)]


class Asked:
    """A directory: these peers answer at once, these never, and all other peers were not asked yet."""

    def __init__(self, routes, answering, silent=()):
        self.routes, self.answering, self.never = routes, set(answering), set(silent)
        self.asked, self.known = [], set()
        routes.late = lambda: self.never & set(self.asked)

    def unknown(self, peers):
        return [peer for peer in peers if peer not in self.known]

    async def measure(self, peers, seconds, enough):
        self.asked += peers
        self.known |= self.answering & set(peers)


async def test_who_is_chosen_and_was_never_asked_is_asked_before_he_is_used(autojump_clock):
    async with swarm() as world:
        for name, start, stop in (("A", 0, 6), ("B", 0, 3), ("C", 3, 6)):
            world.add(name, start, stop)
        routes = world.routes()
        pings = Asked(routes, "BC", "A")
        assert names(await choose_among_the_living(pings, routes.choose)) == "BC"
        assert pings.asked == ["A", "B", "C"]
        pings = Asked(routes, "ABC")
        assert names(await choose_among_the_living(pings, routes.choose)) == "A"
        assert pings.asked == ["A"]


async def test_who_alone_holds_a_block_is_chosen_although_nothing_is_known_of_him(autojump_clock):
    async with swarm() as world:
        world.add("A", 0, 6)
        routes = world.routes()
        assert names(await choose_among_the_living(Asked(routes, "", "A"), routes.choose)) == "A"


async def test_of_many_servers_each_client_measures_a_few_of_its_own(autojump_clock):
    async with swarm() as world:
        for number in range(40):
            world.add(f"{number:02}", 0, 6)
        asked = []
        for client in ("one", "other"):
            routes = world.routes()
            routes.spread = client
            routes.pings = Asked(routes, [node.peer for node in world.nodes.values()])
            await routes.choose_measured(routes.choose)
            asked.append(set(routes.pings.asked))
        assert {len(some) for some in asked} <= {PINGED_PEERS, PINGED_PEERS + 1}, "and who was chosen"
        assert asked[0] != asked[1]


async def test_the_link_to_a_relayed_server_is_as_slow_as_its_relay_says_until_a_step_has_timed_it(
    autojump_clock,
):
    async with swarm() as world:
        for name in "AB":
            world.add(name, *{"A": (0, 3), "B": (3, 6)}[name])
        plain = world.view()

        def view():
            records: dict[str, dict[str, Any]] = {
                "A": {"relay_mbit": 8},
                "B": {"reach": "relayed", "relays": (PeerId("A"),)},
            }
            entries = {
                peer: replace(entry, record=replace(entry.record, **records[peer]))
                for peer, entry in plain.entries.items()
            }
            return replace(plain, entries=entries)

        hops = (Hop(PeerId("A"), 0, 3), Hop(PeerId("B"), 3, 6))
        routes = replace(world.routes(), view=view)
        routes.choose()
        assert [terms.link_speed for terms in routes.terms_of(hops)] == [0, 1e6]
        routes.measured.speeds.learn([PeerId("A"), PeerId("B")], [5000])
        assert [terms.link_speed for terms in routes.terms_of(hops)] == [0, pytest.approx(5000)]
