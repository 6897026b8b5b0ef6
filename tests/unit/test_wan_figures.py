"""What `benchmarks wan` makes of what it has measured."""

from __future__ import annotations

import os
import socket

import pytest

from benchmarks.lib.processes import ProcessError
from benchmarks.network.wan import (
    Links,
    check_all_proxied,
    decode_figures,
    parse,
    prefill_figures,
    prefill_limit,
)

LINKS = Links(rtt_ms=100, mbit=8)  # a megabyte a second


def token(seconds, *steps, network=0.0):
    """steps: of each, (held, computing) of each hop."""
    return {"id": 1, "seconds": seconds, "ends": 0.005, "network": network, "hops": steps}


ROUND = {
    "open_seconds": 0.3,
    "tokens": [
        token(1.25, ((0.2, 0.2), (0.1, 0.1)), ((0.5, 0.2), (0.1, 0.1))),
        *[token(0.25, ((0.03, 0.02), (0.04, 0.03)), network=0.17)] * 3,
    ],
}


def test_the_limit_of_a_step_is_its_delays_its_bytes_and_what_computes():
    figures = decode_figures([ROUND], LINKS, step_bytes=[5000] * 3)
    least = 3 * (0.05 + 0.005) + 0.02 + 0.03 + 0.005
    assert figures["limit_steps_per_s"] == pytest.approx(1 / least)
    assert figures["steps_per_s"] == pytest.approx(4)
    assert figures["share_of_limit"] == pytest.approx(least / 0.25)
    assert figures["outside_ms"] == pytest.approx(250 - least * 1e3)
    assert figures["queue_ms"] == pytest.approx(20)
    assert figures["network_ms"] == pytest.approx(170)


def test_a_prompts_ratio_is_its_time_less_opening_and_delays_to_what_the_slowest_hop_computed():
    figures = prefill_figures([ROUND], LINKS, servers=2, tokens=95)
    assert figures["prefill_seconds"] == pytest.approx(0.95)
    assert figures["prefill_slowest_hop_s"] == pytest.approx(0.4)
    assert figures["prefill_ratio"] == pytest.approx((0.95 - 0.15) / 0.4)
    assert figures["prefill_tokens_per_s"] == pytest.approx(100)
    assert figures["prefill_steps"] == 2


def test_links_without_a_bound_take_no_time_for_bytes():
    figures = decode_figures([ROUND], Links(0, None), step_bytes=[5000] * 3)
    assert figures["limit_steps_per_s"] == pytest.approx(1 / 0.055)


def test_a_rate_goes_with_a_round_trip():
    with pytest.raises(SystemExit):
        parse(["--mbit", "100"])


def test_a_connection_past_the_links_is_found():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        check_all_proxied([os.getpid()], os.getpid())  # this process is both
        with pytest.raises(ProcessError, match="not all are a link's"):
            check_all_proxied([os.getpid()], os.getppid())


def test_a_prompt_takes_its_delays_and_its_bytes_over_the_slowest_link_at_least():
    assert prefill_limit([1000, 2000, 4000], LINKS, tokens=500) == pytest.approx(3 * 0.05 + 500 * 0.002)
    assert prefill_limit([1000, 1000], Links(0, None), tokens=500) == 0
