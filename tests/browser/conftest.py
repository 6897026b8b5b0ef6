"""A browser for tests of the page; `make test-browser` installs what they need.

Each page must come without a mistake in its console, and ask nobody but its gateway.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.fake_gateway import FakeGateway

CHROMIUMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
WAIT_MS = 30_000  # beside a swarm that starts, on two cores
SIZE = {"width": 1280, "height": 900}
# What a browser itself logs about an answer that is no success, or about a gateway that is gone.
OF_THE_NETWORK = re.compile(r"Failed to load resource|net::ERR_|ERR_INCOMPLETE_CHUNKED")
AXE = "axe.min.js"  # of axe-core, in the package that brings it


def chromium() -> str | None:
    """The path of a browser: $CHROMIUM, or the first that is installed."""
    chosen = os.environ.get("CHROMIUM")
    return chosen or next((path for name in CHROMIUMS if (path := shutil.which(name))), None)


def why_no_browser() -> str:
    """The reason to skip tests with a browser; "" where they can run."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed: `make test-browser` installs it"
    return "" if chromium() else "no chromium is installed: `make test-browser` says how to get one"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if reason := why_no_browser():
        here = Path(__file__).parent
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One for each module, since a module ends its processes."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # chromium's sandbox does not run as root
        browser = playwright.chromium.launch(executable_path=chromium(), args=flags)
        yield browser
        browser.close()


@pytest.fixture
def new_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages with the given options of a context; their consoles are read at the end."""
    contexts, faults, hosts = [], list[str](), set[str]()

    def note(said: Any) -> None:
        if said.type in ("error", "warning"):
            faults.append(said.text)

    def open_page(**options: Any) -> Any:
        context = browser.new_context(**{"viewport": SIZE, **options})
        context.set_default_timeout(WAIT_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(f"{error}\n{error.stack}"))
        page.on("console", note)
        page.on("request", lambda request: hosts.add(request.url.partition("://")[2].partition(":")[0]))
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [fault for fault in faults if not OF_THE_NETWORK.search(fault)] == []
    assert hosts <= {"127.0.0.1"}


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    fake = FakeGateway()
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture(scope="session")
def axe() -> Callable[[Any], list[str]]:
    """Checks a page with axe-core; one line for each violation."""
    package = importlib.util.find_spec("axe_playwright_python")
    assert package is not None
    assert package.origin is not None
    script = (Path(package.origin).parent / AXE).read_text()

    def check(page: Any) -> list[str]:
        page.evaluate(f"() => {{ if (!window.axe) {{ {script} }} }}")
        found = page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
        return [
            f"{violation['id']}: {violation['help']}: {node['html'][:200]} {node['failureSummary'][:300]}"
            for violation in found["violations"]
            for node in violation["nodes"]
        ]

    return check
