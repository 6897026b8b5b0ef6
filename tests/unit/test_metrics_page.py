"""The page of metrics, the board and the alerts name what a scrape has, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from node.monitor.metrics.families import Family
from tests.markdown import ROOT
from tests.scrapes import (
    GATEWAY_FAMILIES,
    NODE_FAMILIES,
    families_of,
    gateway_scrape,
    names_in_queries,
    node_scrape,
    samples_of,
)

PAGE = ROOT / "docs" / "metrics.md"
BOARD = ROOT / "deploy" / "grafana" / "raceme.json"
RULES = ROOT / "deploy" / "prometheus" / "alerts.yml"
OUTSIDE = {
    "up": frozenset(),
    "process_resident_memory_bytes": frozenset(),
}  # Prometheus' own, and a process's
ADDED = {"instance", "job"}  # labels of every series, by Prometheus
KEYWORDS = {"by", "without", "on", "ignoring", "and", "or", "unless", "offset", "bool"}


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("metrics_page", ROOT / "scripts" / "metrics_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["metrics_page"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def samples() -> set[str]:
    return samples_of(node_scrape()) | samples_of(gateway_scrape())


@pytest.mark.parametrize(
    ("scrape", "families"), [(node_scrape, NODE_FAMILIES), (gateway_scrape, GATEWAY_FAMILIES)]
)
def test_a_scrape_has_the_metrics_of_the_code_and_no_others_of_ours(
    scrape: Any, families: tuple[Family, ...]
):
    declared = {name for name in families_of(scrape()) if name.startswith("raceme_")}
    assert declared == {family.shown for family in families}


def test_the_tables_of_the_page_are_those_of_the_code():
    page = PAGE.read_text()
    assert script().with_tables(page) == page, "python scripts/metrics_page.py writes them"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_every_name_in_a_page_is_in_a_scrape(page: Path, samples: set[str]):
    histograms = {name.removesuffix("_bucket") for name in samples if name.endswith("_bucket")}
    others = {"raceme_card"}  # the file of an adapter's card
    assert names_in_queries(page.read_text()) - others <= samples | histograms


def expressions(value: Any) -> list[str]:
    """Every query of a board, those of its variables and annotations included."""
    if isinstance(value, list):
        return [found for each in value for found in expressions(each)]
    if not isinstance(value, dict):
        return []
    own = [value[key] for key in ("expr", "query") if isinstance(value.get(key), str)]
    return own + [found for each in value.values() for found in expressions(each)]


def parts_of(query: str) -> tuple[set[str], set[str]]:
    """The names of metrics and of labels in a query of PromQL, or of a variable of Grafana."""
    bare = re.sub(r'"[^"]*"', '""', query)
    labels: set[str] = set()

    def names(found: re.Match[str]) -> str:
        labels.update(re.findall(r"[a-zA-Z_]\w*", re.sub(r"^(by|without|on|ignoring)\b", "", found[0])))
        return " "

    if variable := re.fullmatch(r"label_values\((.+), *(\w+)\)", bare):
        bare = variable[1]
        labels.add(variable[2])
    bare = re.sub(r"\{[^}]*\}", names, bare)
    bare = re.sub(r"\b(?:by|without|on|ignoring) *\([^)]*\)", names, bare)
    bare = re.sub(r"\[[^\]]*\]|\$\w+|\b\d[\w.]*", " ", bare)
    metrics = set(re.findall(r"\b[a-zA-Z_:][\w:]*\b(?! *\()", bare)) - KEYWORDS
    return metrics, labels


def faults_of(query: str, known: Mapping[str, frozenset[str]]) -> set[str]:
    """Names in a query that no scrape has: of a metric, or of a label of these metrics."""
    metrics, labels = parts_of(query)
    allowed = ADDED.union(*(known.get(metric, frozenset()) for metric in metrics))
    return (metrics - set(known)) | (labels - allowed)


@pytest.fixture(scope="module")
def known() -> dict[str, frozenset[str]]:
    """The names of all samples, and the labels of each."""
    found: dict[str, frozenset[str]] = dict(OUTSIDE)
    for scrape in (node_scrape(), gateway_scrape()):
        for name, labels in re.findall(r"^([a-z_]+)(?:\{(.*)\})? \S+$", scrape, re.MULTILINE):
            found[name] = found.get(name, frozenset()).union(re.findall(r'(\w+)="', labels))
    return found


@pytest.mark.parametrize(
    ("query", "metrics", "labels"),
    [
        ('sum by (why) (increase(a_total{kind="b"}[5m])) > 0', {"a_total"}, {"why", "kind"}),
        ("max(a) < 0.6 * min without (x, y) (b)", {"a", "b"}, {"x", "y"}),
        ("histogram_quantile(0.95, sum by (le) (rate(a_bucket[$__rate_interval])))", {"a_bucket"}, {"le"}),
        ('1 - a{instance=~"$instance"} / on (job) b and c', {"a", "b", "c"}, {"instance", "job"}),
        ("label_values(a, model)", {"a"}, {"model"}),
        ('a{why!="not_a_name"} offset 5m', {"a"}, {"why"}),
        ('a{why!~"not_a_name|nor_this"}', {"a"}, {"why"}),
    ],
)
def test_names_are_found_in_a_query(query: str, metrics: set[str], labels: set[str]):
    assert parts_of(query) == (metrics, labels)


def test_a_name_that_no_scrape_has_is_a_fault(known: dict[str, frozenset[str]]):
    assert faults_of("sum(rate(raceme_node_token_total[1m]))", known) == {"raceme_node_token_total"}
    assert faults_of("sum(rate(racem_node_tokens_total[1m]))", known) == {"racem_node_tokens_total"}
    assert faults_of("sum by (kinds) (raceme_node_tokens_total)", known) == {"kinds"}
    assert faults_of('sum by (kind) (raceme_node_tokens_total{job="x"})', known) == set()


def test_every_name_on_the_board_is_in_a_scrape(known: dict[str, frozenset[str]]):
    board = json.loads(BOARD.read_text())
    found = [query for query in expressions(board) if query != "prometheus"]  # the kind of the source
    assert len(found) > 40
    assert {query: faults_of(query, known) for query in found if faults_of(query, known)} == {}
    places = [panel["gridPos"] for panel in board["panels"]]
    assert len({panel["id"] for panel in board["panels"]}) == len(places)
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)), "two panels overlap"
    assert max(x for x, _ in cells) < 24


def test_every_metric_of_a_node_and_a_gateway_is_on_the_board_or_in_a_rule(samples: set[str]):
    used = names_in_queries(BOARD.read_text() + RULES.read_text())
    left_out = {
        "raceme_build_info",
        "raceme_node_state",
        "raceme_node_batches_total",
        "raceme_scrape_seconds",
        "raceme_client_replayed_bytes_total",
        "raceme_swarm_servers_untracked",
    }
    plain = {re.sub(r"_(bucket|sum|count)$", "", name) for name in samples if name.startswith("raceme_")}
    assert plain - {re.sub(r"_(bucket|sum|count)$", "", name) for name in used} == left_out


def test_every_name_in_a_rule_is_in_a_scrape(known: dict[str, frozenset[str]]):
    rules = RULES.read_text()
    assert names_in_queries(rules) <= set(known) | {name.removesuffix("_bucket") for name in known}
    for rule in [rule for group in yaml.safe_load(rules)["groups"] for rule in group["rules"]]:
        assert faults_of(rule["expr"], known) == set(), rule["alert"]
        shown = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
        _, labels = parts_of(rule["expr"])
        has_all = not re.search(r"\b(sum|max|min|avg|count)\b", rule["expr"])
        assert shown <= (labels | ADDED if has_all else labels), f"{rule['alert']} shows a label that is gone"
    alerts = re.findall(r"- alert: (\w+)", rules)
    assert len(alerts) == len(set(alerts)) >= 10
    assert rules.count("summary:") == rules.count("description:") == rules.count("severity:") == len(alerts)


def test_the_ports_that_prometheus_asks_are_those_of_the_page():
    config = (ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text()
    assert set(re.findall(r":(\d{4})\b", config)) == {"9464", "8000"}
    assert "--metrics 127.0.0.1:9464" in PAGE.read_text()
