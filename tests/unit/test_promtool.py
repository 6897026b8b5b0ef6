"""Prometheus' own tool finds nothing to object to: in both scrapes, in the configuration, in the rules."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.markdown import ROOT
from tests.scrapes import gateway_scrape, node_scrape

DEPLOY = ROOT / "deploy" / "prometheus"
UNPACKED = ROOT / ".promtool" / "usr" / "bin" / "promtool"
PROMTOOL = shutil.which("promtool") or (str(UNPACKED) if UNPACKED.exists() else None)
pytestmark = pytest.mark.skipif(PROMTOOL is None, reason="there is no promtool: make test-metrics brings it")


def promtool(*words: str, given: str = "") -> str:
    """Run it; its output.  Fails where it objects."""
    assert PROMTOOL is not None
    ran = subprocess.run(
        [PROMTOOL, *words], input=given, capture_output=True, text=True, cwd=DEPLOY, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


@pytest.mark.parametrize("scrape", [node_scrape, gateway_scrape])
def test_a_scrape_is_clean(scrape: Callable[[], str]):
    assert promtool("check", "metrics", given=scrape()) == ""


def test_the_tool_objects_to_a_bad_scrape():
    with pytest.raises(AssertionError, match="total"):
        promtool("check", "metrics", given="# HELP x y\n# TYPE x counter\nx 1\n")


@pytest.mark.parametrize(
    ("words", "file"),
    [
        (("check", "config"), "prometheus.yml"),
        (("check", "rules"), "alerts.yml"),
        (("test", "rules"), "alerts_test.yml"),
    ],
)
def test_the_configuration_and_the_rules_are_clean(words: Sequence[str], file: str):
    assert "SUCCESS" in promtool(*words, str(Path(file)))
