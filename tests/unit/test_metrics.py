"""Histograms, sheets of samples, and where metrics may be asked for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest as plain_text
from prometheus_client.openmetrics.exposition import generate_latest as open_text
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_open
from prometheus_client.parser import text_string_to_metric_families as read_text
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from node.monitor.metrics import families as of
from node.monitor.metrics.address import MetricsAddress
from node.monitor.metrics.exposition import exposition
from node.monitor.metrics.families import Family, Sheet, text
from node.monitor.metrics.histogram import ROWS, SECONDS, Histogram
from node.monitor.metrics.meters import KINDS, REASONS, BatchMeters, reason_of
from node.monitor.metrics.swarm import MAX_PEERS, put_servers, put_swarm
from tensor_codec.errors import CacheFull, Draining, NoAdapter, Refused, TooManyStreams, WrongRevision

OPEN = "application/openmetrics-text; version=1.0.0"
GAUGE = Family("raceme_test_things", "gauge", "Things.", labels={"kind": "a, b"})


@given(st.lists(st.floats(0, 100)))
def test_a_histogram_has_every_observation_in_the_buckets_that_reach_it(values):
    histogram = Histogram()
    for value in values:
        histogram.observe(value)
    *buckets, everything = histogram.cumulative()
    assert buckets == [sum(value <= bound for value in values) for bound in SECONDS]
    assert everything == histogram.count == len(values)
    assert histogram.total == pytest.approx(sum(values))


def test_no_bucket_of_seconds_is_wider_than_a_factor_of_two_and_a_half():
    assert (SECONDS[0], SECONDS[-1]) == (0.001, 60.0)
    assert all(after / before <= 2.5 + 1e-9 for before, after in pairwise(SECONDS))
    assert ROWS[-1] == 64


def test_one_batch_is_one_observation_of_rows_and_of_seconds():
    meters = BatchMeters()
    meters.computed("decode", 5, 5, 0.02)
    meters.computed("prefill", 1, 128, 0.2)
    assert {kind: meters.rows[kind].count for kind in KINDS} == {"decode": 1, "prefill": 1, "stateless": 0}
    assert meters.seconds["prefill"].total == 0.2
    assert meters.positions == {"decode": 5, "prefill": 128, "stateless": 0}


def test_a_refusal_counts_under_its_class_and_an_unknown_one_as_other():
    kinds = (CacheFull, TooManyStreams, Draining, WrongRevision, NoAdapter)
    assert [reason_of(kind("no")) for kind in kinds] == [kind.__name__ for kind in kinds]

    class Newer(Refused):
        """Of a later version."""

    assert reason_of(Refused("no")) == reason_of(Newer("no")) == "other"
    assert {reason_of(kind("no")) for kind in kinds} < set(REASONS)


def scraped(sheet: Sheet, accept: str = "") -> dict[str, float]:
    _, body = exposition(sheet, accept)
    read = read_open if accept == OPEN else read_text
    return {
        f"{sample.name}{sample.labels or ''}": sample.value
        for family in read(body.decode())
        for sample in family.samples
        if sample.name.startswith("raceme")
    }


@pytest.mark.parametrize("accept", ["", OPEN])
def test_a_scrape_in_either_format_has_the_values_that_were_put(accept):
    sheet = Sheet()
    sheet.put(GAUGE, 3, kind="a")
    sheet.put(of.NODE_MOVES, 2)
    sheet.put(of.NODE_QUEUE, None)
    waits = Histogram()
    waits.observe(0.02)
    sheet.histogram(of.NODE_STEP_WAIT, waits)
    found = scraped(sheet, accept)
    assert found["raceme_test_things{'kind': 'a'}"] == 3
    assert found["raceme_node_moves_total"] == 2
    assert found["raceme_node_step_wait_seconds_bucket{'le': '0.025'}"] == 1
    assert found["raceme_node_step_wait_seconds_bucket{'le': '0.01'}"] == 0
    assert found["raceme_node_step_wait_seconds_count"] == 1
    assert not any("queue" in name for name in found)


def test_the_format_follows_the_accept_header():
    assert exposition(Sheet(), "")[0].startswith("text/plain; version=")
    assert exposition(Sheet(), OPEN)[0].startswith("application/openmetrics-text; version=1.0.0")
    assert exposition(Sheet(), OPEN)[1].endswith(b"# EOF\n")
    assert exposition(Sheet(), OPEN)[1].count(b"# EOF") == 1


class Given(Collector):
    def __init__(self, *metrics: Metric) -> None:
        self.metrics = metrics

    def collect(self):
        return self.metrics


@given(st.text(), st.floats(), st.lists(st.floats(0, 100), max_size=5))
def test_a_scrape_is_what_the_library_writes(label, value, observed):
    histogram = Histogram()
    for each in observed:
        histogram.observe(each)
    shown = text(label)
    sheet = Sheet()
    sheet.put(GAUGE, value, kind=shown)
    sheet.put(of.NODE_SENT, 5)
    sheet.histogram(of.NODE_BATCH_SECONDS, histogram, kind=shown)
    gauge = Metric(GAUGE.name, GAUGE.help, "gauge")
    gauge.add_sample(GAUGE.name, {"kind": shown}, value)
    counter = Metric(of.NODE_SENT.name, of.NODE_SENT.help, "counter", "bytes")
    counter.add_sample(of.NODE_SENT.shown, {}, 5)
    name = of.NODE_BATCH_SECONDS.name
    times = Metric(name, of.NODE_BATCH_SECONDS.help, "histogram", "seconds")
    bounds = [*map(floatToGoString, SECONDS), "+Inf"]
    for bound, count in zip(bounds, histogram.cumulative(), strict=True):
        times.add_sample(f"{name}_bucket", {"kind": shown, "le": bound}, count)
    times.add_sample(f"{name}_count", {"kind": shown}, histogram.count)
    times.add_sample(f"{name}_sum", {"kind": shown}, histogram.total)
    registry = CollectorRegistry()
    registry.register(Given(gauge, counter, times))
    assert sheet.text(is_open=True) + "# EOF\n" == open_text(registry).decode()
    assert sheet.text(is_open=False) == plain_text(registry).decode()


def test_two_samples_of_equal_labels_are_one_and_other_labels_are_a_bug():
    sheet = Sheet()
    sheet.put(GAUGE, 1, kind="a")
    sheet.put(GAUGE, 2, kind="a")
    assert scraped(sheet) == {"raceme_test_things{'kind': 'a'}": 1}
    with pytest.raises(AssertionError, match="has the labels"):
        sheet.put(GAUGE, 1, colour="red")


FAMILIES = (*of.NODE_FAMILIES, *of.SWARM_FAMILIES, *of.SERVER_FAMILIES)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_names_follow_the_rules_of_prometheus(family: Family):
    assert family.name.startswith("raceme_")
    assert not family.name.endswith(("_total", "_count", "_sum", "_bucket"))
    assert family.help.endswith(".")
    if family.unit in ("seconds", "bytes", "ratio"):
        assert family.name.endswith(f"_{family.unit}")
    assert not {"milliseconds", "ms", "us", "mb", "kb"} & set(family.name.split("_"))


# The swarm


def peer(number: int, **others: Any) -> dict[str, Any]:
    return {
        "peer": f"12D3KooW{number:08}",
        "name": f"n{number}",
        "blocks": [0, 4],
        "state": "online",
        "rtt_ms": 2.0,
        "queue": 0.5,
        "decode_ms_per_block": 4.0,
        **others,
    }


def facts(*peers: dict[str, Any], **model: Any) -> dict[str, Any]:
    return {
        "servers": {"online": len(peers), "joining": 0, "draining": 0, "unreachable": 0},
        "peers": list(peers),
        "models": [
            {
                "model": "tiny", "revision": "r1", "coverage": [1, 0, 0, 2], "holes": [[1, 3]],
                "capacity_tokens_per_s": 5.0, "bound_tokens_per_s": 7.0, **model,
            }
        ],
    }  # fmt: skip


def test_a_hole_in_the_coverage_is_in_the_scrape():
    sheet = Sheet()
    put_swarm(sheet, facts(peer(1)))
    found = scraped(sheet)
    labels = "{'model': 'tiny', 'revision': 'r1'}"
    assert found[f"raceme_swarm_blocks_missing{labels}"] == 2
    assert found[f"raceme_swarm_block_servers_min{labels}"] == 0
    assert found[f"raceme_swarm_capacity_tokens_per_second{labels}"] == 5
    assert found["raceme_swarm_servers{'state': 'online'}"] == 1


def test_servers_have_series_of_their_own_in_base_units():
    sheet = Sheet()
    put_servers(sheet, facts(peer(1), peer(2, state="unreachable", rtt_ms=None), peer(3, blocks=None)))
    found = scraped(sheet)
    assert found["raceme_swarm_server_up{'peer': '00000001', 'name': 'n1'}"] == 1
    assert found["raceme_swarm_server_up{'peer': '00000002', 'name': 'n2'}"] == 0
    assert found["raceme_swarm_server_rtt_seconds{'peer': '00000001', 'name': 'n1'}"] == 0.002
    assert found["raceme_swarm_server_seconds_per_block{'peer': '00000001', 'name': 'n1'}"] == 0.004
    assert not any("00000003" in name for name in found), "it serves nothing"
    assert "raceme_swarm_server_rtt_seconds{'peer': '00000002', 'name': 'n2'}" not in found


def test_beyond_256_servers_only_their_number_is_scraped():
    sheet = Sheet()
    put_servers(sheet, facts(*map(peer, range(MAX_PEERS + 44))))
    found = scraped(sheet)
    assert sum("server_up" in name for name in found) == MAX_PEERS == 256
    assert found["raceme_swarm_servers_untracked"] == 44


@given(st.text(max_size=80), st.text(max_size=80))
def test_no_text_of_a_stranger_breaks_a_scrape(name, model):
    sheet = Sheet()
    other = {**facts(model=model)["models"][0], "bound_tokens_per_s": 9.0}
    given_facts = facts(peer(1, name=name), peer(1, name=name), model=model)
    given_facts["models"].append(other)
    put_swarm(sheet, given_facts)
    put_servers(sheet, given_facts)
    for accept in ("", OPEN):
        found = scraped(sheet, accept)
        assert sum("server_up" in each for each in found) == 1
        assert sum("bound_tokens" in each for each in found) == 1


# Where metrics may be asked for


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:9464", "127.0.0.1", 9464),
        ("localhost:0", "localhost", 0),
        ("[::1]:9464", "::1", 9464),
        ("127.9.8.7:65535", "127.9.8.7", 65535),
    ],
)
def test_an_address_of_this_machine_needs_nothing_else(text, host, port):
    address = MetricsAddress.parse(text)
    assert (address.host, address.port) == (host, port)
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    ["", "9464", ":9464", "127.0.0.1", "127.0.0.1:65536", "127.0.0.1:x", "::1:9464", "a b:1", "1:2:3", 9464],
)
def test_what_is_not_host_and_port_is_refused(text):
    with pytest.raises(ValueError, match="HOST:PORT is needed"):
        MetricsAddress.parse(text)


@pytest.mark.parametrize("text", ["0.0.0.0:9464", "[::]:9464", "10.0.0.5:1", "node1:9464"])
def test_an_address_that_others_reach_needs_names(text):
    with pytest.raises(ValueError, match="--metrics-host NAME"):
        MetricsAddress.parse(text)
    assert MetricsAddress.parse(text, ["node1"]).names == ("node1",)


def test_a_name_is_a_name():
    with pytest.raises(ValueError, match="is not a name of a host"):
        MetricsAddress.parse("127.0.0.1:1", ["http://x"])


def test_names_that_nobody_gave_are_refused_and_addresses_pass():
    local = MetricsAddress.parse("127.0.0.1:9464")
    for host in (
        "127.0.0.1:9464",
        "localhost",
        "LOCALHOST:9464",
        "localhost.:1",
        "[::1]:9464",
        "10.1.2.3:9464",
    ):
        assert local.admits(host), host
    for host in (
        "",
        "evil.example",
        "evil.example:9464",
        "localhost.evil.example",
        "node1:9464",
        "[::1",
        "a:b:c",
    ):
        assert not local.admits(host), host
    named = MetricsAddress.parse("0.0.0.0:9464", ["Node1"])
    assert named.admits("node1:9464")
    assert not named.admits("node2:9464")
    assert MetricsAddress.parse("0.0.0.0:9464", ["*"]).admits("anything.example")
