"""The page for everybody: axe-core, keyboard, screen readers, phones, themes, motion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.api_contract import peer, session, silent, swarm
from tests.browser.fake_gateway import AT, Answer, FakeGateway, Part, tokens
from tests.browser.test_page_chat import DEMO, SPARE, STORY, ask, said

PHONE = {"width": 360, "height": 740}


def open_page(new_page: Callable[..., Any], gateway: FakeGateway, **options: Any) -> Any:
    page = new_page(**options)
    page.goto(gateway.url)
    page.locator(".facts", has_text="5ef7a469").wait_for()
    return page


def busy(gateway: FakeGateway) -> None:
    """A swarm in which a lot happens: silent, moving, joining servers, sessions, traffic, a past."""
    moving = peer(5, "mover", (0, 10), next_blocks=[20, 30])
    joining = peer(6, "new", (20, 30), state="joining")
    gateway.swarm = swarm([DEMO[0], silent(DEMO[1]), DEMO[2], SPARE, moving, joining, peer(7, "first", None)])
    gateway.sessions = [session(1, [DEMO[0], SPARE, DEMO[2]]), session(2, DEMO, state="recovering")]
    for number in range(20):
        rates = {"tokens_per_second": 10.0 + number, "step_ms_p50": 18.0, "step_ms_p95": 50.0}
        gateway.publish("traffic", {"at": AT + 2 * number, "active": 2, "queued": 0, **rates})
    gone = {"at": AT, "peer": DEMO[1]["peer"], "name": "demo-2", "blocks": [10, 20], "what": "silent"}
    gateway.publish("peer", gone)


def with_answers(page: Any, gateway: FakeGateway) -> None:
    gateway.answers.append(Answer(STORY))
    ask(page)
    answer = said(page, "there was")
    answer.locator(".figures").wait_for()
    answer.locator(".token").nth(4).click()
    error = {"message": "the caches are full", "code": "overloaded"}
    gateway.answers.append(Answer(status=503, error=error, headers={"retry-after": "9"}))
    ask(page, "And then?")
    page.get_by_role("alert").filter(has_text="the caches are full").wait_for()
    page.locator(".settings summary").click()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [{"width": 1280, "height": 900}, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("state", ["busy", "hole", "empty", "lost", "key"])
def test_axe_finds_nothing(new_page, gateway, axe, state, size, scheme):
    gateway.swarm = swarm([] if state == "empty" else [DEMO[0], DEMO[2]])
    if state == "key":
        gateway.keys = {"sesame"}
        page = new_page(viewport=size, color_scheme=scheme)
        page.goto(gateway.url)
        page.get_by_role("dialog").wait_for()
        assert axe(page) == []
        page.keyboard.press("Escape")
    elif state == "busy":
        busy(gateway)
        page = open_page(new_page, gateway, viewport=size, color_scheme=scheme)
        with_answers(page, gateway)
        page.locator("#sessions tbody tr").nth(1).wait_for()
    else:
        page = open_page(new_page, gateway, viewport=size, color_scheme=scheme)
        if state == "lost":
            gateway.stop()
            page.locator(".banner.lost").wait_for()
            page.wait_for_timeout(300)  # the banner's appearance is over
    assert axe(page) == []
    assert page.evaluate("() => document.documentElement.scrollWidth") <= size["width"]


def test_the_colours_of_tokens_can_be_read_in_both_themes(new_page, gateway, axe):
    times = (17.0, 17.0, 17.0, 30.0, 50.0, 170.0)
    parts = [part for held in times for part in tokens("word ", hops=[(DEMO[0]["peer"], held)])]
    gateway.swarm = swarm(DEMO)
    for scheme in ("light", "dark"):
        gateway.answers.append(Answer(parts))
        page = open_page(new_page, gateway, color_scheme=scheme)
        ask(page)
        said(page, "word").locator(".figures").wait_for()
        grades = {page.locator(".token").nth(i).get_attribute("class") for i in range(6)}
        assert grades == {f"token grade-{grade}" for grade in range(4)}
        assert axe(page) == []


# Keyboard


def focused(page: Any) -> str:
    """The name of what has the focus."""
    name: str = page.evaluate(
        "() => { const e = document.activeElement;"
        " return e.getAttribute('aria-label') ?? e.labels?.[0]?.textContent.trim() ?? e.textContent.trim(); }"
    )
    return " ".join(name.split())


def test_the_first_stop_of_the_keyboard_leads_to_the_chat(new_page, gateway):
    gateway.swarm = swarm(DEMO)
    page = open_page(new_page, gateway)
    page.keyboard.press("Tab")
    assert focused(page) == "Skip to the chat"
    box = page.get_by_text("Skip to the chat").bounding_box()
    assert box["y"] >= 0
    page.keyboard.press("Enter")
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    said(page, "Hello.")


def test_everything_can_be_reached_by_keyboard_and_shows_that_it_is(new_page, gateway):
    gateway.swarm = swarm([DEMO[0], DEMO[2]])
    gateway.answers.append(Answer(STORY))
    page = open_page(new_page, gateway)
    ask(page)
    said(page, "there was").locator(".figures").wait_for()
    page.locator(".settings summary").click()
    page.locator(".skip").focus()
    reached, invisible = [focused(page)], []
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement === document.body"):
            break
        reached.append(focused(page))
        shown = page.evaluate(
            "() => { const s = getComputedStyle(document.activeElement);"
            " return s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2; }"
        )
        if not shown:
            invisible.append(reached[-1])
    assert invisible == []
    for name in (
        "Theme", "Copy the command", "table of servers", "Copy the conversation", "New chat",
        "conversation", "Once", "Copy the answer", "Message", "Settings", "System message", "Enter a key",
    ):  # fmt: skip
        assert any(name in each for each in reached), (name, reached)


# Screen readers


def test_the_page_has_landmarks_and_headings(new_page, gateway):
    gateway.swarm = swarm(DEMO)
    page = open_page(new_page, gateway)
    for role in ("banner", "main"):
        assert page.get_by_role(role).count() == 1
    names = ("Blocks", "Servers", "Sessions", "Traffic, ten minutes", "Chat", "Events")
    for name in names:
        assert page.get_by_role("region", name=name, exact=True).count() == 1
        assert page.get_by_role("heading", level=2, name=name, exact=True).count() == 1
    assert page.get_by_role("heading", level=1).inner_text() == "Raceme"


def test_an_answer_is_said_once_and_not_token_by_token(new_page, gateway):
    gateway.swarm = swarm(DEMO)
    gateway.answers.append(Answer([*STORY[:2], Part(waits=True), *STORY[2:]]))
    page = open_page(new_page, gateway)
    page.evaluate(
        "() => { window.spoken = []; const region = document.querySelector('#chat > [role=status]');"
        " new MutationObserver(() => window.spoken.push(region.textContent.trim()))"
        ".observe(region, {subtree: true, childList: true, characterData: true}); }"
    )
    ask(page)
    said(page, "Once upon")
    gateway.go_on()
    page.wait_for_function("() => window.spoken.length >= 2")
    assert page.evaluate("() => window.spoken") == [
        "The answer begins.",
        "The answer is complete. Once upon a time there was",
    ]
    inside = "() => document.querySelectorAll('.answer .text [aria-live], .turns[aria-live]').length"
    assert page.evaluate(inside) == 0


def test_the_log_is_silent_while_the_past_is_read(new_page, gateway):
    gateway.swarm = swarm(DEMO)
    page = open_page(new_page, gateway)
    log = page.locator("[role=log]")
    assert log.get_attribute("aria-live") == "off"
    page.wait_for_function(
        "() => document.querySelector('[role=log]').getAttribute('aria-live') === 'polite'"
    )


# Phones, themes, motion


@pytest.mark.parametrize("width", [320, 360, 768, 900, 1920])
def test_nothing_is_wider_than_the_screen(new_page, gateway, width):
    busy(gateway)
    gateway.swarm["peers"][0]["name"] = "W" * 200
    page = open_page(new_page, gateway, viewport={"width": width, "height": 700})
    with_answers(page, gateway)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width


def test_a_tap_shows_the_hops_of_a_token(new_page, gateway):
    gateway.swarm = swarm([*DEMO, SPARE])
    gateway.answers.append(Answer(STORY))
    page = open_page(new_page, gateway, viewport=PHONE, has_touch=True)
    page.get_by_label("Message", exact=True).fill("Tell")
    page.get_by_role("button", name="Send").tap()
    answer = said(page, "there was")
    page.locator("article.answer[aria-busy='false']").wait_for()  # its last line has its place
    answer.locator(".token").nth(4).tap()
    answer.get_by_text("token 5 “there”: demo-1 17 ms → spare 24 ms").wait_for()


def ground(page: Any) -> str:
    colour: str = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    return colour


LIGHT, DARK = "rgb(243, 245, 248)", "rgb(15, 18, 22)"


def test_the_theme_is_the_system_s_until_one_is_chosen(new_page, gateway):
    gateway.swarm = swarm(DEMO)
    page = open_page(new_page, gateway, color_scheme="dark")
    assert ground(page) == DARK
    page.emulate_media(color_scheme="light")
    assert ground(page) == LIGHT
    page.get_by_label("Theme").select_option("dark")
    assert ground(page) == DARK
    page.reload()
    page.locator(".facts", has_text="5ef7a469").wait_for()
    assert ground(page) == DARK
    assert page.get_by_label("Theme").input_value() == "dark"
    page.get_by_label("Theme").select_option("system")
    assert ground(page) == LIGHT
    assert page.evaluate("() => localStorage.length") == 0


def test_nothing_moves_where_motion_is_reduced(new_page, gateway):
    gateway.swarm = swarm(DEMO)
    moving = (
        "() => [...document.querySelectorAll('*')].filter((e) => { const s = getComputedStyle(e);"
        " return parseFloat(s.transitionDuration) > 0 || s.animationName !== 'none'; }).length"
    )
    page = open_page(new_page, gateway, reduced_motion="reduce")
    assert page.evaluate(moving) == 0
    assert open_page(new_page, gateway, reduced_motion="no-preference").evaluate(moving) > 0


def test_without_scripts_the_page_says_what_it_needs(new_page, gateway):
    page = new_page(java_script_enabled=False)
    page.goto(gateway.url)
    assert "needs JavaScript" in page.locator("noscript").inner_text()
