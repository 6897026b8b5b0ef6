"""What `status` says a swarm can do, and the moves that `status --watch` has seen."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
from rich.console import Console
from rich.table import Table

from node.__main__ import main
from node.monitor.status import _reach, tables
from node.monitor.watch import Changes, change_lines
from routing.names import PeerId
from routing.view.answers import Liveness
from routing.view.description import describe, worth_asking
from routing.view.records import Record
from routing.view.view import Entry, SwarmView


def span(name: str, start: int, stop: int, seconds: float = 0.01) -> Record:
    return Record(
        peer=PeerId(name), role="serve", model="m", revision="r", blocks=6, start=start, stop=stop,
        seconds_per_block=seconds,
    )  # fmt: skip


def view_of(*records: Record, silent: str = "") -> SwarmView:
    entries = {record.peer: Entry(record, b"", 0.0) for record in records}
    return SwarmView("public", entries=entries, silent=frozenset(map(PeerId, silent)))


def facts(*records: Record, chains: int = 0, silent: str = "", direct: Sequence[str] = ()) -> dict[str, Any]:
    view = view_of(*records, silent=silent)
    found: dict[str, Any] = json.loads(
        json.dumps(describe(view, {}, chains, direct=set(map(PeerId, direct))))
    )
    return found


def test_capacity_bound_and_bottleneck_are_shown():
    found = facts(span("a", 0, 3), span("b", 0, 3), span("c", 3, 6))
    (model,) = found["models"]
    assert model["capacity_tokens_per_s"] == pytest.approx(100 / 3, abs=0.01)
    assert model["bound_tokens_per_s"] == 50
    assert (model["bottleneck_blocks"], model["bottleneck_peers"]) == ([3, 4, 5], ["c"])
    assert tables(found)[-1] == "  capacity 33.3 of at most 50.0 tokens/s, limited by blocks 3:6 (…c)"


def test_a_swarm_with_a_hole_has_no_capacity():
    assert tables(facts(span("a", 0, 3)))[-1] == "  capacity 0.0 of at most 16.7 tokens/s"


def test_blocks_whose_only_server_might_go_are_named():
    found = facts(span("a", 0, 3), span("b", 0, 3), span("c", 3, 6))
    assert tables(found)[-2] == "  served by one server only: blocks 3:6"
    (model,) = found["models"]
    assert not model["survives_any_loss"]
    (model,) = facts(span("a", 0, 6), span("b", 0, 6))["models"]
    assert model["survives_any_loss"]


def test_the_best_chains_are_shown_with_what_they_share():
    found = facts(span("a", 0, 3), span("b", 0, 3, 0.02), span("c", 3, 6), chains=2)
    assert tables(found)[-2:] == [
        "  chain 1, 210.0 ms a token from here: …a 0:3, …c 3:6",
        "  chain 2, 240.0 ms a token from here: …b 0:3, …c 3:6 (again)",
    ]
    (model,) = found["models"]
    assert model["chains"][0]["hops"][1] == {"peer": "c", "blocks": [3, 6]}
    (model,) = facts(span("a", 0, 3), chains=2)["models"]
    assert model["chains"] == []


def test_who_does_not_answer_covers_no_block():
    found = facts(span("a", 0, 3), span("b", 3, 6), span("c", 3, 6), silent="b", chains=1)
    assert found["servers"] == {"online": 2, "joining": 0, "draining": 0, "unreachable": 1}
    states = {peer["peer"]: (peer["state"], peer["announced_state"]) for peer in found["peers"]}
    assert states["b"] == ("unreachable", "online")
    assert states["c"] == ("online", "online")
    (model,) = found["models"]
    assert (model["coverage"], model["complete"], model["unreachable"]) == ([1] * 6, True, ["b"])
    assert model["chains"][0]["hops"][1]["peer"] == "c"
    assert "  no answer from …b: not counted" in tables(found)
    (model,) = facts(span("a", 0, 3), span("b", 3, 6), silent="b", chains=1)["models"]
    assert (model["holes"], model["complete"], model["chains"]) == ([[3, 6]], False, [])
    lines = tables(facts(span("a", 0, 3), span("b", 3, 6), silent="b"))
    assert "m (r), 6 blocks: served by nobody: blocks 3:6" in lines
    assert "public: 1 online, 1 unreachable" in str(lines[0].title)


def test_a_program_that_watches_sees_who_answers_and_for_how_long_others_are_silent():
    view = view_of(span("a", 0, 3), span("b", 3, 6), span("c", 3, 6), silent="bc")
    a, b, c = map(PeerId, "abc")
    liveness = {a: Liveness("yes", None, 0.002), b: Liveness("silent", 3.04)}
    peers = {peer["peer"]: peer for peer in describe(view, {a: 0.002}, liveness=liveness)["peers"]}
    assert [(each["answers"], each["silent_s"]) for each in peers.values()] == [
        ("yes", None),
        ("silent", 3.0),
        ("silent", None),  # the view knows it, and the answers have been forgotten
    ]
    assert [peers[each]["revision"] for each in (a, b, c)] == ["r"] * 3
    (table, *_) = tables(describe(view, {}, liveness=liveness))
    assert "unreachable 3 s" in list(cast(Table, table).columns[2].cells)
    late = describe(view_of(span("b", 3, 6)), {}, liveness=liveness)["peers"][0]
    assert (late["state"], late["answers"]) == ("online", "unknown")  # never two words for one peer
    plain = describe(view, {})["peers"][0]
    assert not {"answers", "silent_s", "revision"} & plain.keys()


def test_a_model_of_which_nobody_answers_is_shown_as_such():
    (model,) = facts(span("a", 0, 6), silent="a")["models"]
    assert (model["holes"], model["unreachable"], model["survives_any_loss"]) == ([[0, 6]], ["a"], False)


def test_those_are_asked_first_whose_blocks_have_the_fewest_servers():
    records = [replace(span(name, 0, 3), addresses=("/ip4/10.0.0.1/tcp/1",)) for name in "abc"]
    alone = replace(span("z", 3, 6), addresses=("/ip4/10.0.0.1/tcp/1",))
    way_in = Record(peer=PeerId("boot"), role="bootstrap", addresses=("/ip4/10.0.0.1/tcp/1",))
    client = Record(peer=PeerId("client"), role="client")
    view = view_of(*records, alone, way_in, client, span("no address", 3, 6))
    asked = worth_asking(view, PeerId("a"))
    assert asked[0] == "z"
    assert set(asked) == {"b", "c", "z", "boot"}
    assert asked[-1] == "boot"
    assert worth_asking(view, PeerId("a"), 1) == ["z"]


def test_servers_are_counted_by_state_and_shown_with_their_queue():
    found = facts(
        replace(span("a", 0, 3), queue=7, quantize="int8", dtype="float32"),
        replace(span("b", 3, 6, 0.0), state="joining"),
    )
    assert found["servers"] == {"online": 1, "joining": 1, "draining": 0, "unreachable": 0}
    console = Console(width=120, record=True, file=io.StringIO())
    for part in tables(found):
        console.print(part)
    shown = [line.split() for line in console.export_text().splitlines()]
    assert ["swarm", "public:", "1", "online,", "1", "joining"] in shown
    assert ["…a", "online", "0:3", "float32", "int8", "10.00", "0", "0", "7", "?"] in shown
    assert ["…b", "joining", "3:6", "?"] in shown


def test_rates_and_round_trips_are_in_the_units_of_their_names():
    served = replace(span("a", 2, 5, 0.01), prefill_seconds_per_token=0.001)  # of one block
    (peer,) = describe(view_of(served), {PeerId("a"): 0.0125})["peers"]
    assert peer["prefill_tokens_per_s"] == 333.3  # through its three blocks
    assert peer["decode_ms_per_block"] == 10
    assert peer["rtt_ms"] == 12.5
    (unmeasured,) = describe(view_of(span("a", 2, 5)), {})["peers"]
    assert (unmeasured["prefill_tokens_per_s"], unmeasured["rtt_ms"]) == (0, None)


def test_a_move_is_counted_when_it_has_been_made():
    changes, one = Changes(), span("a", 0, 3)
    changes.look([one], 0)
    changes.look([replace(one, start=3, stop=6, state="joining")], 1)
    assert (changes.moves, changes.moving) == (0, (("a", (0, 3), (3, 6)),))
    assert change_lines({"seconds": 1, **changes.facts()}) == [
        "in 1 s: 0 joined, 0 left, 0 moved; moving now: …a 0:3 -> 3:6"
    ]
    changes.look([replace(one, start=3, stop=6)], 2)
    changes.look([replace(one, start=3, stop=6)], 4)
    assert change_lines({"seconds": 4.0, **changes.facts()}) == [
        "in 4 s: 0 joined, 0 left, 1 moved",
        "  after 2 s: …a from 0:3 to 3:6",
    ]


def test_a_move_of_which_a_part_is_served_on_is_one_move():
    changes, one = Changes(), span("a", 0, 3)
    changes.look([one], 0)
    for at in (1, 2):
        changes.look([replace(one, start=at - 1, next_start=1, next_stop=4)], at)
        assert (changes.moves, changes.moving) == (0, (("a", (0, 3), (1, 4)),))
    changes.look([span("a", 1, 4)], 3)
    assert (changes.moves, changes.moving) == (1, ())
    assert changes.last_moves == [{"seconds": 3, "peer": "a", "from": [0, 3], "to": [1, 4]}]


def test_of_one_that_moves_both_spans_are_shown_and_what_it_still_serves_counts():
    moving = replace(span("a", 0, 3), next_start=1, next_stop=4)
    found = facts(moving, span("b", 3, 6))
    assert found["peers"][0]["next_blocks"] == [1, 4]
    assert found["models"][0]["capacity_tokens_per_s"] == pytest.approx(100 / 3, abs=0.01)
    console = Console(width=120, record=True, file=io.StringIO())
    for part in tables(found):
        console.print(part)
    assert "0:3 -> 1:4" in console.export_text()


def test_who_came_and_who_left_while_somebody_watched_is_counted():
    changes, one, two = Changes(), span("a", 0, 3), span("b", 3, 6)
    changes.look([one], 0)
    changes.look([one, replace(two, state="joining")], 2)
    assert (changes.joined, changes.moving) == (0, ())
    changes.look([one, two], 4)
    changes.look([two], 6)
    changes.look([two], 8)
    assert (changes.joined, changes.left, changes.moves) == (1, 1, 0)


def test_who_watches_an_empty_swarm_sees_the_first_server_join():
    changes = Changes()
    changes.look([], 0)
    changes.look([span("a", 0, 3)], 2)
    assert changes.joined == 1


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--balance-quality", "1.5"], "--balance-quality is 1.5, 0 to 1 is allowed"),
        (["--balance-quality", "nan"], "--balance-quality is nan, 0 to 1 is allowed"),
        (["--min-replicas", "0"], "--min-replicas is 0, 1 to 1000 are allowed"),
        (["--balance-seconds", "0"], "--balance-seconds is 0, 1 to 86400 are allowed"),
    ],
)
def test_what_a_balancer_cannot_do_is_said_in_one_line(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err == f"error: {complaint}\n"


def test_how_each_server_is_reached_is_a_column_and_blocks_behind_relays_are_named():
    relay = PeerId("12D3KooW3KVD8B")
    found = facts(
        replace(span("a", 0, 3), reach="public", addresses=("/ip4/203.0.113.7/tcp/1",)),
        replace(span("b", 0, 3), reach="public", addresses=("/ip6/2606:4700::7/tcp/1",)),
        replace(span("c", 2, 6), reach="relayed", relays=(relay,)),
        replace(span("d", 0, 6), reach="none", unreached="timed out"),
        span("e", 0, 1),
        replace(span("f", 3, 4), reach="relayed", relays=(relay,), unreached="refused"),
        replace(span("g", 0, 6), reach="none"),
        direct=("f", "a"),
    )
    peers = {peer["peer"]: peer for peer in found["peers"]}
    assert [_reach(peers[name]) for name in "abcdefg"] == [
        "public", "v6", "via …3KVD8B", "no: timed out", "", "punch", "no",
    ]  # fmt: skip
    assert (peers["c"]["reach"], peers["c"]["relays"]) == ("relayed", [relay])
    assert (peers["d"]["state"], peers["d"]["announced_state"]) == ("unreachable", "online")
    (model,) = found["models"]
    assert (model["coverage"], model["unreachable"]) == ([3, 2, 3, 2, 1, 1], ["d", "g"])
    assert (model["relayed"], model["relayed_blocks"]) == (["c", "f"], [[3, 6]])
    lines = tables(found)
    assert "  no answer from …d, …g: not counted" in lines
    assert "  2 of 5 servers are relayed; blocks 3:6 only by relayed ones" in lines
