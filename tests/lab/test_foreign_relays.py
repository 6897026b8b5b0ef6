"""Relays of other implementations of libp2p carry a home's tokens: py-libp2p's, js-libp2p's where it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.reach.hosts import bytes_through
from tests.lab.nodes import expected, lab_swarm, prompt, until
from tests.netlab.lab import Lab
from tests.processes import ROOT

pytestmark = pytest.mark.process

TOKENS = 16
RELAYED_SECONDS = 30.0
PUNCHED_SECONDS = 5.0
JS_RELAY = ROOT / "tests" / "lab" / "js_relay.mjs"
JS_PACKAGES = Path(os.environ.get("JS_LIBP2P", ROOT / ".js-libp2p"))


def without_js() -> str | None:
    """The reason why no relay of js-libp2p can run here."""
    if shutil.which("node") is None:
        return "node is not installed"
    if not (JS_PACKAGES / "node_modules" / "libp2p").is_dir():
        return f"{JS_PACKAGES.name} is not there: `make test-js` makes it"
    return None


def command(relay: str, ip4: str) -> list[str]:
    if relay == "py-libp2p":
        return [sys.executable, "-m", "tests.lab.stock_relay", ip4]
    script = 'cd "$1" && exec node --input-type=module - "$2" < "$3"'
    return ["sh", "-c", script, "sh", str(JS_PACKAGES), ip4, str(JS_RELAY)]


@pytest.mark.parametrize("relay", ["py-libp2p", "js-libp2p"])
def test_a_home_reserves_at_a_foreign_relay_is_reached_through_it_and_punches(
    lab: Lab, tiny_llama: Path, relay: str, figure: Callable[[str], None]
) -> None:
    """The only member of the swarm on the Internet relays nothing, so the foreign relay is the only way."""
    if relay == "js-libp2p" and (reason := without_js()) is not None:
        pytest.skip(reason)
    for name in ("p1", "p2"):
        lab.public(name)
    for name in ("a", "b"):
        lab.home(name, "cone", ipv6=False)
    lab.home("s", "symmetric", ipv6=False)
    started = lab.popen("p2", command(relay, lab.hosts["p2"].ip4), stdout=subprocess.PIPE, text=True)
    address = json.loads(started.stdout.readline())
    with lab_swarm(lab, tiny_llama) as swarm:
        swarm.bootstrap("p1", "--no-relay")
        server = swarm.serve("a1", 0, 6, "--relay", address).facts["peer_id"]
        until(lambda: swarm.status("p1")[server]["reach"] == "relayed", RELAYED_SECONDS)
        ids, before = prompt(), bytes_through(lab, "p2")
        far, near = swarm.client("s1"), swarm.client("b1")
        began = time.monotonic()
        assert far.generate(ids, TOKENS) == expected(tiny_llama, ids, TOKENS)
        took = time.monotonic() - began
        assert far.ways()[server] == "circuit"
        carried = bytes_through(lab, "p2") - before
        assert near.generate(ids, TOKENS) == expected(tiny_llama, ids, TOKENS)
        punched = until(lambda: near.ways()[server] == "direct", PUNCHED_SECONDS)
        figure(
            f"through a relay of {relay}: {TOKENS} tokens in {took:.2f} s, {carried / 1024:.0f} KiB; "
            f"punched {punched:.2f} s after another generation"
        )
