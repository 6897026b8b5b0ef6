"""The page of metrics, the board and the alerts name what a scrape has, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from types import ModuleType
from typing import Any

import pytest

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
OUTSIDE = {"up", "process_resident_memory_bytes"}  # Prometheus' own, and a process's


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


def test_every_name_in_the_page_is_in_a_scrape(samples: set[str]):
    histograms = {name.removesuffix("_bucket") for name in samples if name.endswith("_bucket")}
    assert names_in_queries(PAGE.read_text()) <= samples | histograms


def expressions(value: Any) -> list[str]:
    """Every query of a board, those of its variables and annotations included."""
    if isinstance(value, list):
        return [found for each in value for found in expressions(each)]
    if not isinstance(value, dict):
        return []
    own = [value[key] for key in ("expr", "query") if isinstance(value.get(key), str)]
    return own + [found for each in value.values() for found in expressions(each)]


def unknown_names(query: str, samples: set[str]) -> set[str]:
    """Names of metrics in a query that no scrape has; label values are left out."""
    bare = re.sub(r'"[^"]*"', "", query)
    words = set(re.findall(r"\b(?:raceme|process|go)_[a-z_]+\b|\bup\b", bare))
    return words - samples - OUTSIDE


def test_every_name_on_the_board_is_in_a_scrape(samples: set[str]):
    board = json.loads(BOARD.read_text())
    found = expressions(board)
    assert len(found) > 40
    assert {query: unknown_names(query, samples) for query in found if unknown_names(query, samples)} == {}
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


def test_every_name_in_a_rule_is_in_a_scrape(samples: set[str]):
    rules = RULES.read_text()
    assert unknown_names(rules, samples) == set()
    alerts = re.findall(r"- alert: (\w+)", rules)
    assert len(alerts) == len(set(alerts)) >= 10
    assert rules.count("summary:") == rules.count("description:") == rules.count("severity:") == len(alerts)


def test_the_ports_that_prometheus_asks_are_those_of_the_page():
    config = (ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text()
    assert set(re.findall(r":(\d{4})\b", config)) == {"9464", "8000"}
    assert "--metrics 127.0.0.1:9464" in PAGE.read_text()
