"""The page over a real swarm: nodes of the built-in model, a gateway, a browser, and a server that is killed.

With SCREENSHOTS=1 this test writes docs/page-dark.png and docs/page-light.png.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.lib.processes import LocalSwarm, NodeProcess, free_port, local_swarm
from node.model.checkpoint.folder import ModelFolder
from tests.api_contract import CONTRACTS, problems
from tests.processes import ROOT, python, running

pytestmark = [pytest.mark.process, pytest.mark.real_model]

MODEL = "SmolLM2-135M-Instruct"
SPANS = {"demo-1": (0, 10), "demo-2": (10, 20), "demo-3": (20, 30)}
UP_SECONDS = 180.0
LATE_MS = 60_000.0  # of a page on a busy machine; what it takes on a quiet one is printed
SHOT_BYTES = 300_000
SIZE = {"width": 1360, "height": 870}


@pytest.fixture(scope="module")
def servers(builtin_model: ModelFolder) -> Iterator[LocalSwarm]:
    with local_swarm(["--threads", "1", "--cache-tokens", "8192"]) as swarm:
        nodes = [start(swarm, name) for name in SPANS]
        for node in nodes[1:]:
            node.wait_online()
        yield swarm


def start(swarm: LocalSwarm, name: str, span: tuple[int, int] | None = None) -> NodeProcess:
    first, last = span or SPANS[name]
    node = swarm.start(MODEL, "--blocks", f"{first}:{last}", "--name", name)
    if len(swarm.nodes) == 1:
        node.wait_online()
    return node


@pytest.fixture(scope="module")
def url(servers: LocalSwarm) -> Iterator[str]:
    """The address of a gateway that is ready."""
    url = f"http://127.0.0.1:{free_port()}/"
    flags = ["--model", MODEL, "--port", url.rpartition(":")[2].strip("/"), "--threads", "1"]
    with running(python("client", "gateway", "--peers", *servers.peers, *flags)) as process:
        deadline = time.monotonic() + UP_SECONDS
        while not ready(url):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield url


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def shoot(page: Any, scheme: str, tmp_path: Path) -> None:
    """A picture of the page, in docs/ where pictures are asked for."""
    folder = ROOT / "docs" if os.environ.get("SCREENSHOTS") == "1" else tmp_path
    page.emulate_media(color_scheme=scheme)
    page.wait_for_timeout(400)  # the plots are drawn anew
    path = folder / f"page-{scheme}.png"
    page.screenshot(path=path)
    assert path.stat().st_size < SHOT_BYTES


def seconds_until(page: Any, selector: str, words: str) -> float:
    """The time until an element has the words."""
    began = time.monotonic()
    page.locator(selector, has_text=words).first.wait_for(timeout=LATE_MS)
    return time.monotonic() - began


def test_a_join_a_chat_and_the_loss_of_the_server_in_use(
    servers: LocalSwarm,
    url: str,
    new_page: Callable[..., Any],
    axe: Callable[[Any], list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = new_page(viewport=SIZE)
    page.goto(url)
    page.locator(".facts", has_text="complete").wait_for(timeout=LATE_MS)

    spare = start(servers, "spare", (10, 20))
    spare.wait_online()
    joined = seconds_until(page, "#blocks .rows li:not(.joining)", "spare")
    page.locator("#events li", has_text="spare joined 10:20").wait_for(timeout=LATE_MS)

    page.locator(".settings summary").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill("160")
    page.locator(".settings summary").click()
    page.get_by_label("Message", exact=True).fill("Tell me a long story about a lighthouse by the sea.")
    page.keyboard.press("Enter")
    answer = page.get_by_role("article", name="answer")
    page.wait_for_function("() => document.querySelectorAll('.token').length > 25", timeout=LATE_MS)
    session = page.locator("#sessions tbody tr", has_text="this chat")
    session.wait_for(timeout=LATE_MS)
    used = "spare" if "spare" in session.inner_text() else "demo-2"
    other = {"spare": "demo-2", "demo-2": "spare"}[used]

    {"spare": spare, "demo-2": servers.nodes[1]}[used].kill()
    before = page.locator(".token").count()
    silent = seconds_until(page, "#blocks .rows li.silent", used)
    answer.get_by_role("img", name=f"{used} gone").wait_for(timeout=LATE_MS)
    answer.locator(".changes", has_text=f"{other} took over").wait_for(timeout=LATE_MS)
    page.locator("#events li", has_text=f"{used} silent").wait_for(timeout=LATE_MS)
    page.wait_for_function(
        f"() => document.querySelectorAll('.token').length > {before + 20}", timeout=LATE_MS
    )
    answer.locator(".mark").first.click()
    assert f"→ {other} " in answer.locator(".detail").inner_text()
    page.mouse.move(0, 0)  # the pointer would choose whatever moves below it
    for scheme in ("light", "dark"):
        shoot(page, scheme, tmp_path)
    page.get_by_role("button", name="Send").wait_for(timeout=LATE_MS)
    assert answer.get_by_role("alert").count() == 0
    assert page.locator(".token").count() > before + 20
    page.locator("#traffic", has_text="now").wait_for(timeout=LATE_MS)
    assert axe(page) == []
    with capsys.disabled():
        sys.stdout.write(f"\n  seen: a join after {joined:.1f} s, a killed server after {silent:.1f} s\n")


def test_the_questions_of_the_page_and_the_answers_of_the_gateway_fit(url: str) -> None:
    for path, name in (("api/swarm", "swarm"), ("api/sessions", "sessions")):
        assert problems(httpx.get(url + path, timeout=30).json(), CONTRACTS[name]) == []
    page = httpx.get(url, timeout=30)
    assert "script-src 'self'" in page.headers["content-security-policy"]
