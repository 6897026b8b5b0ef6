"""The gateway's benchmark is fair: the sides take turns, and both lose a server in the same way."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks.gateway import gateway
from benchmarks.gateway.gateway import KILL_AFTER, Setting, direct_kill, extra, longest_pause
from benchmarks.lib.processes import LocalSwarm, NodeProcess, Worker
from node.serving.executor.batcher import BatchPolicy


class Direct:
    """A client in Python that answers with the hops of each token, and then with its generation."""

    def __init__(self, tokens: int) -> None:
        self.asked: list[dict[str, Any]] = []  # Any: JSON
        seconds = [9.0] * KILL_AFTER + [0.02, 0.4, 0.02] + [0.02] * (tokens - KILL_AFTER - 3)
        self.lines: list[dict[str, Any]] = [{"hops": ["first", "middle", "last"]} for _ in range(tokens)]
        self.lines.append({"generations": [{"seconds": seconds, "text": "told"}]})

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """A question, and the first line of its answer."""
        self.asked.append(question)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """A further line."""
        return self.lines.pop(0)


class Node:
    """A node that notes at which line of the client it is killed."""

    def __init__(self, direct: Direct) -> None:
        self.direct = direct
        self.killed_at: int | None = None

    def kill(self) -> None:
        """Its end."""
        self.killed_at = len(self.direct.lines)


def setting_of(direct: Direct | None = None, **nodes: Node) -> Setting:
    """A setting without processes."""
    made = Setting(cast(LocalSwarm, None), cast(Worker, direct), 0, [(0, 10), (10, 20), (20, 30)], [])
    made.nodes.update(cast(dict[str, NodeProcess], nodes))
    made.metrics.update(dict.fromkeys(nodes, 0))
    return made


def test_the_side_that_goes_first_is_the_other_one_each_time_after_a_pause(monkeypatch: pytest.MonkeyPatch):
    setting, order = setting_of(), list[str]()

    async def side(name: str) -> str:
        order.append(name)
        return name

    async def pause(seconds: float) -> None:
        assert seconds > BatchPolicy().recently_active_seconds
        order.append("pause")

    async def pairs() -> None:
        for _ in range(4):
            assert await setting.pair(lambda: side("direct"), lambda: side("ours")) == ("direct", "ours")

    monkeypatch.setattr(gateway, "asyncio", SimpleNamespace(sleep=pause))
    asyncio.run(pairs())
    sides = ["ours", "direct", "direct", "ours"] * 2
    assert order == [each for name in sides for each in ("pause", name)]


def test_the_client_in_python_loses_the_middle_of_its_chain_and_its_pause_is_the_longest_afterwards(
    monkeypatch: pytest.MonkeyPatch,
):
    started: list[tuple[int, int]] = []
    monkeypatch.setattr(gateway.Setting, "start", lambda _, span: started.append(span))
    direct = Direct(KILL_AFTER + 10)
    nodes = {name: Node(direct) for name in ("first", "middle", "last", "spare")}
    setting = setting_of(direct, **nodes)

    assert direct_kill(setting, [1, 2], KILL_AFTER + 10) == (0.4, "told")

    assert direct.asked == [{"prompts": [[1, 2]], "tokens": KILL_AFTER + 10, "tell": True}]
    assert nodes["middle"].killed_at == 10 + 1  # lines that were left: after the 24th token
    assert [name for name, node in nodes.items() if node.killed_at is not None] == ["middle"]
    assert set(setting.nodes) == set(setting.metrics) == {"first", "last", "spare"}
    assert started == [(10, 20)]


def test_a_pause_before_the_kill_does_not_count():
    assert longest_pause([0.0, 5.0, 5.1, 5.6, 5.7], since=5.0) == pytest.approx(0.5)
    assert longest_pause([0.0, 5.0, 5.1], since=5.1) == 0.0


def test_what_the_gateway_takes_more_is_the_median_of_pairs_and_one_bad_pair_does_not_decide():
    assert extra([(0.10, 0.11), (0.10, 0.12), (0.90, 0.10), (0.10, 5.0)]) == pytest.approx(0.015)
