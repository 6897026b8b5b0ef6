"""The chat of the page: answers token by token, their hops, the loss of a server, every refusal."""

from __future__ import annotations

import os
import re
import subprocess
from typing import Any

import pytest

from tests.api_contract import peer, session, swarm
from tests.browser.fake_gateway import AT, Answer, FakeGateway, Part, tokens

DEMO = [peer(1, "demo-1", (0, 10)), peer(2, "demo-2", (10, 20)), peer(3, "demo-3", (20, 30))]
SPARE = peer(4, "spare", (10, 20))
ROUTE = [(each["peer"], 17.0) for each in DEMO]
NEW_ROUTE = [(DEMO[0]["peer"], 17.0), (SPARE["peer"], 24.0), (DEMO[2]["peer"], 18.0)]
LOSS = [
    {"kind": "fault", "at": AT, "peer": DEMO[1]["peer"], "error": "PeerGone: the connection ended"},
    {
        "kind": "rerouted",
        "at": AT,
        "opened": [SPARE["peer"]],
        "kept": [DEMO[0]["peer"], DEMO[2]["peer"]],
        "hops": [each for each, _ in NEW_ROUTE],
    },
    {"kind": "replayed", "at": AT, "peer": SPARE["peer"], "positions": 41},
    {"kind": "recovered", "at": AT, "seconds": 0.131},
]
STORY = [
    *tokens("Once", " upon", " a", " time", hops=ROUTE),
    Part(" there", NEW_ROUTE, LOSS),
    *tokens(" was", hops=NEW_ROUTE),
]


@pytest.fixture
def chat(new_page: Any, gateway: FakeGateway) -> Any:
    gateway.swarm = swarm([*DEMO, SPARE])
    page = new_page(permissions=["clipboard-read", "clipboard-write"])
    page.goto(gateway.url)
    page.locator(".facts", has_text="5ef7a469").wait_for()
    return page


def ask(page: Any, text: str = "Tell me a story") -> None:
    page.get_by_role("button", name="Send").wait_for()
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def said(page: Any, words: str, number: int = 0) -> Any:
    """Wait until answer `number` has the words."""
    answer = page.get_by_role("article", name="answer").nth(number)
    answer.filter(has_text=words).wait_for()
    return answer


def clipboard(page: Any) -> str:
    text: str = page.evaluate("() => navigator.clipboard.readText()")
    return text


# Answers


def test_an_answer_comes_with_its_figures(chat, gateway):
    gateway.answers.append(Answer(STORY))
    ask(chat)
    answer = said(chat, "Once upon a time⟲ there was")
    figures = answer.locator(".figures").inner_text()
    assert re.search(r"6 tokens · [\d.]+ tok/s · first \d+(\.\d)? ms", figures)
    body = gateway.bodies[0]
    assert body["messages"] == [{"role": "user", "content": "Tell me a story"}]
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert body["raceme"] == {"trace": True}
    assert body["model"] in ("", "SmolLM2-135M-Instruct")


def test_a_token_shows_its_hops_to_a_pointer(chat, gateway):
    gateway.answers.append(Answer(STORY))
    ask(chat)
    answer = said(chat, "was")
    answer.locator(".token").nth(1).hover()
    answer.get_by_text("token 2 “upon”: demo-1 17 ms → demo-2 17 ms → demo-3 17 ms").wait_for()
    answer.locator(".token").nth(4).hover()
    answer.get_by_text("token 5 “there”: demo-1 17 ms → spare 24 ms → demo-3 18 ms").wait_for()


def test_a_token_shows_its_hops_to_the_keyboard(chat, gateway):
    gateway.answers.append(Answer(STORY))
    ask(chat)
    answer = said(chat, "was")
    assert answer.locator(".token[tabindex='0']").count() == 1
    answer.locator(".token[tabindex='0']").focus()
    for _ in range(2):
        chat.keyboard.press("ArrowRight")
    answer.get_by_text("token 3 “a”: demo-1 17 ms").wait_for()
    chat.keyboard.press("End")
    answer.get_by_text("token 6 “was”").wait_for()
    chat.keyboard.press("ArrowRight")
    chat.keyboard.press("Home")
    answer.get_by_text("token 1 “Once”").wait_for()
    assert answer.locator(".token[tabindex='0']").count() == 1


def test_the_loss_of_a_server_is_a_mark_in_the_text_with_what_happened(chat, gateway):
    gateway.answers.append(Answer(STORY))
    ask(chat)
    answer = said(chat, "was")
    what = "demo-2 gone · spare took over · 41 positions replayed · pause 131 ms"
    assert answer.get_by_role("img", name=f"route changed: {what}").count() == 1
    assert answer.locator(".changes li").inner_text() == f"⟲ token 5: {what}"
    answer.locator(".mark").click()
    answer.locator(".detail", has_text=what).wait_for()


def test_a_loss_is_said_before_the_next_token(chat, gateway):
    gateway.answers.append(Answer([*STORY[:4], Part(waits=True), *STORY[4:]]))
    gateway.sessions = [session(1, DEMO)]
    ask(chat)
    answer = said(chat, "Once upon a time")
    chat.locator("#sessions", has_text="this chat").wait_for()
    gateway.publish("session", {"at": AT, "id": "req-000001", "what": "fault", "peer": DEMO[1]["peer"]})
    answer.get_by_text("A server is gone; another one takes over.").wait_for()
    gateway.go_on()
    said(chat, "there was")


def test_slow_tokens_are_coloured_and_the_first_one_is_no_measure(chat, gateway):
    slow = [(each["peer"], 170.0) for each in DEMO]
    parts = [
        *tokens("a", hops=slow),
        *tokens(*"bcdef", hops=ROUTE),
        *tokens("g", hops=slow),
        *tokens("h", hops=ROUTE),
    ]
    gateway.answers.append(Answer(parts))
    ask(chat)
    answer = said(chat, "abcdefgh")
    answer.locator(".figures").wait_for()
    grades = [answer.locator(".token").nth(i).get_attribute("class") for i in range(8)]
    assert grades[0] == "token grade-0"
    assert grades[6] == "token grade-3"
    assert set(grades[1:6]) | {grades[7]} == {"token grade-0"}


def test_thoughts_are_shown_and_are_no_part_of_the_answer(chat, gateway):
    gateway.answers.append(Answer([Part("Hmm. ", ROUTE, thinks=True), *tokens("Yes", hops=ROUTE)]))
    ask(chat)
    said(chat, "Hmm. Yes").locator(".figures").wait_for()
    ask(chat, "Sure?")
    said(chat, "Hello.", 1)
    assert gateway.bodies[1]["messages"][1] == {"role": "assistant", "content": "Yes"}


def test_text_of_a_model_is_text(chat, gateway):
    gateway.answers.append(Answer(tokens("<img src=x onerror=alert(1)>", "\n<b>", "&amp;")))
    ask(chat, "<script>alert(1)</script>")
    said(chat, "<img src=x onerror=alert(1)>")
    said(chat, "&amp;")
    assert chat.evaluate("() => document.querySelectorAll('#chat img, #chat b, #chat script').length") == 0


def test_a_chat_goes_on_and_a_new_one_forgets(chat, gateway):
    ask(chat, "One")
    said(chat, "Hello.").locator(".figures").wait_for()
    chat.get_by_role("button", name="Send").wait_for()
    ask(chat, "Two")
    said(chat, "Hello.", 1)
    assert [each["content"] for each in gateway.bodies[1]["messages"]] == ["One", "Hello.", "Two"]
    chat.get_by_role("button", name="Send").wait_for()
    chat.get_by_role("button", name="New chat").click()
    chat.get_by_role("article").first.wait_for(state="detached")
    ask(chat, "Three")
    said(chat, "Hello.")
    assert [each["content"] for each in gateway.bodies[2]["messages"]] == ["Three"]


def test_shift_enter_begins_a_line(chat, gateway):
    box = chat.get_by_label("Message", exact=True)
    box.fill("one")
    chat.keyboard.press("Shift+Enter")
    chat.keyboard.type("two")
    chat.keyboard.press("Enter")
    said(chat, "Hello.")
    assert gateway.bodies[0]["messages"][0]["content"] == "one\ntwo"


# Stop


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_an_answer_can_be_stopped(chat, gateway, way):
    gateway.answers.append(Answer([*tokens("Once", " upon"), Part(waits=True), *tokens(" never")]))
    ask(chat)
    answer = said(chat, "Once upon")
    if way == "button":
        chat.get_by_role("button", name="Stop").click()
    else:
        chat.keyboard.press("Escape")
    answer.get_by_text("stopped").wait_for()
    chat.get_by_role("button", name="Send").wait_for()
    chat.wait_for_timeout(100)
    assert gateway.cancelled == 1
    assert "never" not in answer.inner_text()
    ask(chat, "Go on")
    said(chat, "Hello.", 1)
    assert gateway.bodies[1]["messages"][1]["content"] == "Once upon"


# Refusals


REFUSALS = {
    "no_chain": (503, "blocks 10:20 are served by nobody", {"retry-after": "5"}, "Start a node for them"),
    "overloaded": (
        503,
        "the caches are full",
        {"retry-after": "7"},
        "The servers are full. Try again in 7 s.",
    ),
    "rate_limit_exceeded": (429, "too many requests", {"retry-after": "3"}, "Try again in 3 s."),
    "peer_fault": (502, "a server failed", {}, "another one takes its place"),
    "context_length_exceeded": (400, "9000 tokens, at most 8192", {}, "Start a new chat"),
    "model_not_found": (404, "no such model", {}, "Choose another model"),
    "host_not_allowed": (403, "this host is not allowed", {}, "--allowed-host"),
    "request_too_large": (413, "the body is too large", {}, "Start a new chat"),
    "internal_error": (500, "something broke", {}, "The gateway's log has it under req-000001."),
}


@pytest.mark.parametrize("code", REFUSALS)
def test_a_refusal_says_what_happened_and_what_to_do(chat, gateway, code):
    status, message, headers, words = REFUSALS[code]
    error = {"message": message, "type": "x", "code": code, "param": None}
    gateway.answers.append(Answer(status=status, error=error, headers=headers))
    ask(chat)
    alert = chat.get_by_role("alert").filter(has_text=message)
    alert.wait_for()
    assert words in alert.inner_text()
    again = alert.get_by_role("button", name=re.compile("Try again"))
    assert again.count() == (status >= 429)
    if headers:
        assert again.is_disabled()  # not before the time that the gateway named


def test_an_answer_is_asked_for_again(chat, gateway):
    error = {"message": "a server failed", "code": "peer_fault"}
    gateway.answers.append(Answer(status=502, error=error))
    ask(chat)
    chat.get_by_role("button", name="Try again").click()
    said(chat, "Hello.")
    assert gateway.bodies[0] == gateway.bodies[1]
    assert chat.get_by_role("alert").count() == 0


def test_an_error_within_the_stream_keeps_the_text_before_it(chat, gateway):
    error = {"message": "the gateway ends", "type": "server_error", "code": "shutting_down"}
    gateway.answers.append(Answer(tokens("Once", " upon"), error=error))
    ask(chat)
    answer = said(chat, "Once upon")
    answer.get_by_text("Try again when it is back.").wait_for()


def test_a_connection_that_breaks_is_no_whole_answer(chat, gateway):
    gateway.answers.append(Answer(tokens("Once"), breaks=True))
    ask(chat)
    said(chat, "Once").get_by_text("the connection ended before the answer was whole").wait_for()


@pytest.mark.parametrize("error", [None, 3, {}, {"message": 3, "code": []}])
def test_a_refusal_in_no_known_form_is_still_said(chat, gateway, error):
    gateway.answers.append(Answer(status=502, error=error))
    ask(chat)
    chat.get_by_role("alert").filter(has_text="the gateway gave no reason").wait_for()


def test_a_key_that_no_longer_holds_is_asked_for_in_the_chat(chat, gateway):
    gateway.keys = {"sesame-2"}
    ask(chat)
    chat.get_by_role("alert").get_by_role("button", name="Enter a key").click()
    chat.get_by_role("dialog").get_by_label("Key").fill("sesame-2")
    chat.keyboard.press("Enter")
    chat.get_by_role("button", name="Try again").click()
    said(chat, "Hello.")


# Settings and copies


def test_settings_are_sent_and_kept_for_the_tab(chat, gateway):
    gateway.models.append("SmolLM2-135M-Instruct:pirate")
    chat.reload()
    chat.locator(".settings summary").click()
    chat.locator("#chat select").select_option("SmolLM2-135M-Instruct:pirate")
    for label, value in (("Temperature", "0.25"), ("Top p", "0.5"), ("Most tokens", "33"), ("Seed", "7")):
        chat.get_by_label(label).fill(value)
    chat.get_by_label("System message").fill("Be brief.")
    for _ in range(2):
        ask(chat)
        said(chat, "Hello.").locator(".figures").wait_for()
        body = gateway.bodies[-1]
        assert (body["temperature"], body["top_p"], body["max_completion_tokens"], body["seed"]) == (
            0.25,
            0.5,
            33,
            7,
        )
        assert body["model"] == "SmolLM2-135M-Instruct:pirate"
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        chat.reload()
        chat.locator(".facts", has_text="5ef7a469").wait_for()


@pytest.mark.parametrize(
    ("label", "value"), [("Temperature", "2.5"), ("Temperature", ""), ("Most tokens", "1.5"), ("Seed", "-1")]
)
def test_a_number_out_of_range_is_flagged_and_not_sent(chat, gateway, label, value):
    chat.locator(".settings summary").click()
    chat.get_by_label(label).fill(value)
    chat.locator(".field", has_text=label).locator("[aria-invalid='true']").wait_for()
    ask(chat)
    said(chat, "Hello.")
    assert gateway.bodies[0]["temperature"] == 0.7
    assert gateway.bodies[0]["max_completion_tokens"] == 512
    assert "seed" not in gateway.bodies[0]


def test_copies(chat, gateway):
    gateway.keys = {"sesame-3"}
    chat.evaluate("() => sessionStorage.setItem('raceme-key', 'sesame-3')")
    gateway.answers.append(Answer(STORY))
    ask(chat, "It's a story")
    said(chat, "there was").locator(".figures").wait_for()
    chat.get_by_role("button", name="Copy the answer").click()
    chat.get_by_role("button", name="Copied: Copy the answer").wait_for()
    assert clipboard(chat) == "Once upon a time there was"
    chat.get_by_role("button", name="Copy your message").click()
    chat.get_by_role("button", name="Copied: Copy your message").wait_for()
    assert clipboard(chat) == "It's a story"
    chat.get_by_role("button", name="Copy the conversation").click()
    chat.get_by_role("button", name="Copied: Copy the conversation").wait_for()
    assert clipboard(chat) == "You:\nIt's a story\n\nAnswer:\nOnce upon a time there was"
    chat.get_by_role("button", name="Copy as a curl command").click()
    chat.get_by_role("button", name="Copied: Copy as a curl command").wait_for()
    command = clipboard(chat)
    assert "sesame-3" not in command
    ran = subprocess.run(
        ["sh", "-c", command],
        env={**os.environ, "RACEME_API_KEY": "sesame-3"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ran.stdout.endswith("data: [DONE]\n\n"), ran.stderr
    assert gateway.bodies[1]["messages"] == [{"role": "user", "content": "It's a story"}]
