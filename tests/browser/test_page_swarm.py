"""The page shows a swarm: whole, broken, empty, hostile, or out of reach, and says what to do."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.api_contract import peer, peer_id, session, silent, swarm
from tests.browser.fake_gateway import AT, FakeGateway

DEMO = [peer(1, "demo-1", (0, 10)), peer(2, "demo-2", (10, 20)), peer(3, "demo-3", (20, 30))]
SPARE = peer(4, "spare", (10, 20))
EVIL = "<img src=x onerror=alert(1)>"
HIDDEN = "a\u202eb\x00c\u200bd\u2066"


def text_of(page: Any, selector: str) -> str:
    """The text of the first match, each run of white space as one space."""
    return re.sub(r"\s+", " ", page.locator(selector).first.inner_text()).strip()


def eventually(page: Any, selector: str, words: str) -> None:
    """Wait until an element shows the words; each run of white space counts as one space."""
    shows = (
        "([selector, words]) => [...document.querySelectorAll(selector)]"
        ".some((each) => each.innerText.replace(/\\s+/g, ' ').includes(words))"
    )
    page.wait_for_function(shows, arg=[selector, words])


def opened(new_page: Any, gateway: FakeGateway, peers: list[dict[str, Any]], **options: Any) -> Any:
    gateway.swarm = swarm(peers)
    page = new_page(**options)
    page.goto(gateway.url)
    eventually(page, ".facts", "5ef7a469")
    return page


# What a swarm looks like


def test_a_whole_swarm(new_page, gateway):
    page = opened(new_page, gateway, [*DEMO, SPARE])
    facts = text_of(page, ".facts")
    for words in ("SmolLM2-135M-Instruct 9d661ea1", "complete", "43.1 of 44.4 tok/s", "12.5 tok/s"):
        assert words in facts
    assert "weakest 0:10, 20:30" in facts
    assert page.title() == "Raceme · SmolLM2-135M-Instruct · complete"
    assert page.locator("#blocks .rows li").count() == 4
    assert page.locator("#servers tbody tr").count() == 4
    row = text_of(page, "#servers tbody tr >> nth=1")
    assert re.match(r"(demo-2|spare) …\w{6} online 10:20 bfloat16 2.25 65536 0.0 0.8", row)
    assert page.locator(".hole").count() == 0
    spoken = page.get_by_text("blocks 0:10: 1 server, blocks 10:20: 2 servers, blocks 20:30: 1 server")
    assert spoken.count() == 1


def test_a_bar_stands_where_its_blocks_are(new_page, gateway):
    page = opened(new_page, gateway, DEMO)
    boxes = [page.locator("#blocks .rows .bar").nth(i).bounding_box() for i in range(3)]
    track = page.locator("#blocks .rows .track").first.bounding_box()
    for number, box in enumerate(boxes):
        assert box["x"] == pytest.approx(track["x"] + track["width"] * number / 3, abs=1.5)
        assert box["width"] == pytest.approx(track["width"] / 3, abs=1.5)


def test_a_hole_is_named_with_the_command_that_fills_it(new_page, gateway):
    page = opened(new_page, gateway, [DEMO[0], DEMO[2]])
    eventually(page, ".facts", "blocks 10:20 missing")
    assert "Blocks 10:20 have no server" in text_of(page, ".hole")
    assert text_of(page, ".hole code") == (
        "python -m node SmolLM2-135M-Instruct --blocks 10:20"
        f" --peers /ip4/10.0.0.1/tcp/31330/p2p/{peer_id(1)} /ip4/10.0.0.3/tcp/31330/p2p/{peer_id(3)}"
        " --swarm-key swarm.key"
    )
    assert page.locator(".run.held-0").count() == 1
    gateway.publish("swarm", swarm(DEMO))
    eventually(page, ".facts", "complete")
    assert page.locator(".hole").count() == 0


def test_a_swarm_without_servers_says_how_to_start_the_first(new_page, gateway):
    page = opened(new_page, gateway, [peer(9, "first", None)])
    eventually(page, ".facts", "no servers")
    command = text_of(page, ".hole code")
    assert command.startswith("python -m node SmolLM2-135M-Instruct --peers /ip4/10.0.0.9/tcp/31330/p2p/12D3")
    assert "--blocks" not in command


def test_a_gateway_that_knows_nobody_says_so(new_page, gateway):
    page = opened(new_page, gateway, [])
    eventually(page, "#servers", "No peer is known.")
    assert "--peers ADDRESS_OF_A_NODE" in text_of(page, ".hole code")


def test_a_server_that_is_silent_is_crossed_out_with_its_blocks(new_page, gateway):
    page = opened(new_page, gateway, DEMO)
    gateway.publish("swarm", swarm([DEMO[0], silent(DEMO[1], 3.0), DEMO[2]]))
    what = {"at": AT, "peer": DEMO[1]["peer"], "name": "demo-2", "blocks": [10, 20], "what": "silent"}
    gateway.publish("peer", what)
    eventually(page, "#blocks .rows li.silent", "silent 3 s")
    eventually(page, "#servers tr.silent", "✖ silent")
    eventually(page, "#events", "demo-2 silent 10:20")
    assert "Blocks 10:20 have no server" in text_of(page, ".hole")
    eventually(page, "#blocks .rows li.silent", "silent 5 s")  # the page counts on by itself


def test_a_server_that_joins_or_moves_is_shown_at_once(new_page, gateway):
    page = opened(new_page, gateway, DEMO)
    moving = SPARE | {"next_blocks": [0, 10]}
    gateway.publish("swarm", swarm([*DEMO, moving]))
    joined = {"at": AT, "peer": SPARE["peer"], "name": "spare", "blocks": [10, 20], "what": "joined"}
    gateway.publish("peer", joined)
    eventually(page, "#events li", "spare joined 10:20")
    eventually(page, "#servers", "10:20 → 0:10")
    assert page.locator(".bar.next").count() == 1


def test_sessions_are_shown_with_their_routes_live(new_page, gateway):
    gateway.sessions = [session(0xA91C00, DEMO)]
    page = opened(new_page, gateway, [*DEMO, SPARE])
    eventually(page, "#sessions tbody tr", "demo-1 → demo-2 → demo-3")
    assert text_of(page, "#sessions tbody tr") == "a91c00 demo-1 → demo-2 → demo-3 13.1 71/512 decode"
    say = {"at": AT, "id": gateway.sessions[0]["id"]}
    times = [[each["peer"], 17.0, 15.0] for each in DEMO]
    gateway.publish("session", say | {"what": "steps", "tokens": 4, "seconds": 0.25, "hops": times})
    eventually(page, "#sessions tbody tr", "16.0 75/512")
    gateway.publish("session", say | {"what": "fault", "peer": DEMO[1]["peer"], "error": "PeerGone: ended"})
    eventually(page, "#sessions tbody tr", "recovering")
    hops = [DEMO[0]["peer"], SPARE["peer"], DEMO[2]["peer"]]
    new = {"what": "rerouted", "opened": [SPARE["peer"]], "kept": [hops[0], hops[2]], "hops": hops}
    gateway.publish("session", say | new)
    gateway.publish("session", say | {"what": "replayed", "positions": 41, "peer": SPARE["peer"]})
    gateway.publish("session", say | {"what": "recovered", "seconds": 0.131})
    eventually(page, "#sessions tbody tr", "demo-1 → spare → demo-3")
    eventually(page, "#sessions tbody tr", "decode ⟲ 1")
    for words in (
        "demo-2 gone: PeerGone: ended",
        "rerouted, spare took over",
        "41 positions replayed to spare",
        "recovered, pause 131 ms",
    ):
        eventually(page, "#events li", words)
    gateway.sessions = []
    gateway.publish("session", say | {"what": "ended"})
    eventually(page, "#sessions tbody tr", "ended")
    eventually(page, "#sessions", "No request runs.")


def test_a_session_that_begins_is_asked_for(new_page, gateway):
    page = opened(new_page, gateway, DEMO)
    eventually(page, "#sessions", "No request runs.")
    gateway.sessions = [session(7, [], state="queued")]
    gateway.publish("session", {"at": AT, "id": gateway.sessions[0]["id"], "what": "queued"})
    eventually(page, "#sessions tbody tr", "queued")


def test_traffic_is_drawn_and_said(new_page, gateway):
    page = opened(new_page, gateway, DEMO)
    for step in range(20):
        rates = {"tokens_per_second": 10.0 + step, "step_ms_p50": 18.0, "step_ms_p95": 40.0 + step}
        gateway.publish("traffic", {"at": AT + 2 * step, "active": 1, "queued": 0, **rates})
    eventually(page, "#traffic", "now 29.0")
    assert page.get_by_role("img", name="tokens/s over ten minutes: now 29.0").count() == 1
    assert page.get_by_role("img", name="step over ten minutes: p50 18 ms, p95 (dashed) 59 ms").count() == 1
    drawn = page.evaluate(
        "() => [...document.querySelectorAll('#traffic canvas')].map((canvas) =>"
        " new Set(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data).size)"
    )
    assert len(drawn) == 2
    assert min(drawn) > 3


def test_three_hundred_servers_of_a_deep_model(new_page, gateway):
    many = [peer(number, f"s-{number:03}", (number % 121, number % 121 + 6)) for number in range(220)]
    gateway.swarm = swarm(many, blocks=126)
    page = new_page()
    page.goto(gateway.url)
    eventually(page, ".facts", "complete")
    assert page.locator("#blocks .rows li").count() == len({each["peer"] for each in many})
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


# Strangers


@pytest.mark.parametrize(
    "name", [EVIL, HIDDEN, "x" * 300, "&lt;b&gt;", "ا\u0301\u0301\u0301\u0301\u0301", "${alert(1)}", ""]
)
def test_names_of_strangers_are_inert(new_page, gateway, name):
    evil = peer(2, name, (10, 20), model="SmolLM2-135M-Instruct", dtype=EVIL, version=EVIL, quantize=EVIL)
    page = opened(new_page, gateway, [DEMO[0], evil, DEMO[2]])
    gateway.publish("peer", {"at": AT, "peer": evil["peer"], "name": name, "blocks": None, "what": "joined"})
    eventually(page, "#events", "joined")
    shown = page.locator("#blocks .rows .row-name").nth(1).inner_text()
    assert len(shown) <= 32
    assert not re.search(
        r"[\x00-\x1f\u200b-\u200f\u202a-\u202e\u2066-\u2069]",
        page.locator("body").inner_text().replace("\n", "").replace("\t", ""),
    )
    assert page.evaluate("() => document.querySelectorAll('#page img, #page b, #page script').length") == 0
    if name == EVIL:
        assert shown == EVIL
    if name == HIDDEN:
        assert shown == "a\\u{202e}b\\u{0}c\\u{200b}d…"
    if name == "x" * 300:
        assert shown == "x" * 31 + "…"
    if name == "":
        assert shown == "…" + evil["peer"][-6:]


def test_a_command_to_paste_holds_nothing_of_a_stranger_but_plain_words(new_page, gateway):
    bad = ["/ip4/1.2.3.4/tcp/1; rm -rf ~", "/ip4/$(id)/tcp/1", "/ip4/1.2.3.4/tcp/1\nid", "`id`"]
    evil = peer(1, "demo-1", (0, 10), addresses=bad)
    page = opened(new_page, gateway, [evil, peer(3, "demo-3", (20, 30), peer="$(id)")])
    command = text_of(page, ".hole code")
    assert command == (
        "python -m node SmolLM2-135M-Instruct --blocks 10:20 --peers ADDRESS_OF_A_NODE --swarm-key swarm.key"
    )
    gateway.swarm = swarm([evil]) | {"model": "a'; rm -rf ~; '", "models": []}
    gateway.publish("swarm", gateway.swarm)
    eventually(page, "#blocks", "has no server of a'; rm -rf")
    assert text_of(page, ".hole code").startswith("python -m node --peers ")


def test_two_servers_of_one_name_can_be_told_apart(new_page, gateway):
    gateway.sessions = [session(1, [DEMO[0], DEMO[1]])]
    twins = [DEMO[0], DEMO[1] | {"name": "demo-1"}, DEMO[2]]
    page = opened(new_page, gateway, twins)
    ends = [each["peer"][-6:] for each in twins[:2]]
    eventually(page, "#sessions", f"demo-1 …{ends[0]} → demo-1 …{ends[1]}")


@pytest.mark.parametrize(
    "data", ["", "{", "[]", "null", "3", '{"peers": 3, "models": {}}', '{"peers": [null, 3]}']
)
def test_an_event_that_is_no_description_breaks_nothing(new_page, gateway, data):
    page = opened(new_page, gateway, DEMO)
    for event in ("session", "traffic", "peer", "news"):
        gateway.say_raw(event, data)
    gateway.say_raw("swarm", data)
    gateway.publish("swarm", swarm([*DEMO, SPARE]))
    eventually(page, "#blocks .rows", "spare")


# The connection


def test_a_lost_gateway_is_said_and_found_again(new_page, gateway):
    page = opened(new_page, gateway, DEMO)
    gateway.publish(
        "peer", {"at": AT, "peer": SPARE["peer"], "name": "spare", "blocks": [10, 20], "what": "left"}
    )
    eventually(page, "#events", "spare left")
    gateway.stop()
    eventually(page, ".banner", "The gateway does not answer.")
    eventually(page, ".banner", "Next attempt in 4 s")  # the third one: the test is sooner
    assert page.locator("#blocks .rows li").count() == 3  # what was known stays in sight
    gateway.start()
    page.get_by_role("button", name="Try now").click()
    page.locator(".banner").wait_for(state="hidden")
    assert gateway.resumed_from == ["0", "1"]
    gateway.publish("swarm", swarm([*DEMO, SPARE]))
    eventually(page, "#blocks .rows", "spare")
    assert page.locator("#events li").count() == 1


def test_a_lost_gateway_is_found_without_a_hand(new_page, gateway):
    page = opened(new_page, gateway, DEMO)
    gateway.stop()
    eventually(page, ".banner", "The gateway does not answer.")
    gateway.start()
    page.locator(".banner").wait_for(state="hidden")


def test_the_past_is_there_when_the_page_opens(new_page, gateway):
    gateway.publish(
        "peer", {"at": AT, "peer": SPARE["peer"], "name": "spare", "blocks": [10, 20], "what": "joined"}
    )
    gateway.publish(
        "traffic",
        {
            "at": AT,
            "tokens_per_second": 9.5,
            "step_ms_p50": None,
            "step_ms_p95": None,
            "active": 0,
            "queued": 0,
        },
    )
    page = opened(new_page, gateway, DEMO)
    eventually(page, "#events", "spare joined 10:20")
    eventually(page, "#traffic", "now 9.5")


# Keys


def test_a_key_is_asked_for_kept_for_the_tab_and_never_shown(new_page, gateway):
    gateway.keys, gateway.swarm = {"sesame-1"}, swarm(DEMO)
    page = new_page()
    page.goto(gateway.url)
    dialog = page.get_by_role("dialog", name="Key of the gateway")
    dialog.wait_for()
    dialog.get_by_label("Key").fill("wrong")
    page.keyboard.press("Enter")
    dialog.get_by_text("The gateway refused this key.").wait_for()
    dialog.get_by_label("Key").fill("sesame-1")
    dialog.get_by_role("button", name="Use the key").click()
    eventually(page, ".facts", "5ef7a469")
    assert not dialog.is_visible()
    assert "sesame-1" not in page.content()
    assert page.evaluate("() => JSON.stringify({...localStorage}) + document.cookie") == "{}"
    page.reload()
    eventually(page, ".facts", "5ef7a469")
    assert page.get_by_role("dialog").count() == 0


def test_a_dialog_that_was_left_can_be_opened_again(new_page, gateway):
    gateway.keys = {"sesame-1"}
    page = new_page()
    page.goto(gateway.url)
    page.get_by_role("dialog").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="hidden")
    eventually(page, ".banner", "This gateway asks for a key.")
    page.get_by_role("button", name="Enter a key").first.click()
    page.get_by_role("dialog").wait_for()
