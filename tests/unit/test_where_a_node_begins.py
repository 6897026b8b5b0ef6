"""Which blocks a node takes: what it knows of its own speed counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from node.config import NetworkConfig, NodeConfig
from node.main import _choose_blocks, known_seconds_per_block
from node.model.checkpoint.info import ModelInfo
from node.serving.executor.rates import Rates
from node.serving.memory import Precision
from node.serving.placement.placement import Placement
from node.serving.placement.room import Room
from routing.names import ModelId, Revision
from routing.view.view import Entry, SwarmView
from tests.unit.test_chain_search import span

INFO = ModelInfo(ModelId("m"), Revision("r"), "fake", 6, 64, 96, 4096, (1,) * 6, 1, 1)
PRECISION = Precision("float32", "none", "float32")
CPU = Placement(("cpu",))
SWARM = (span(0, 0, 3, 0.01), span(1, 3, 6, 0.1), span(2, 1, 4, 0.01))


async def chosen(seconds_per_block: float) -> tuple[int, int]:
    view = SwarmView("public", entries={record.peer: Entry(record, b"", 0.0) for record in SWARM})
    node: Any = SimpleNamespace(directory=SimpleNamespace(view=lambda: view), lan=None)
    config = NodeConfig(NetworkConfig(), num_blocks=3)
    return await _choose_blocks(config, node, INFO, PRECISION, Room(("cpu",), (0,)), seconds_per_block)


def test_a_node_knows_its_speed_from_an_earlier_run_of_the_same_kind(tmp_path, monkeypatch):
    monkeypatch.setenv("RACEME_CACHE", str(tmp_path))
    assert known_seconds_per_block(INFO, CPU, PRECISION, 2) == 0.0
    file, key = CPU.kept_rates(INFO.revision, PRECISION, 2)
    file.put(key, Rates(0.004, 0.001))
    assert known_seconds_per_block(INFO, CPU, PRECISION, 2) == 0.004
    assert known_seconds_per_block(INFO, CPU, PRECISION, 1) == 0.0


@pytest.mark.parametrize(("seconds", "blocks"), [(1e-4, (2, 5)), (1.0, (3, 6)), (0.0, (3, 6))])
async def test_a_fast_node_goes_where_it_carries_more_than_a_slow_one_would(seconds, blocks):
    assert await chosen(seconds) == blocks
