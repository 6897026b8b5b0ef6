"""What a node imports at its start: for llama's family no modelling code of transformers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.lib.processes import local_swarm
from tests.model_fixtures import save_tiny

pytestmark = pytest.mark.process
# Seconds of imports, for nothing that such a node does.
UNWANTED = ("transformers", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy")


def test_a_node_of_llama_s_family_starts_without_transformers(tmp_path: Path):
    save_tiny("llama", tmp_path / "tiny")
    flags = [str(tmp_path / "tiny"), "--threads", "1", "--dtype", "float32", "--cache-tokens", "2048"]
    with local_swarm(flags, environment={"PYTHONPROFILEIMPORTTIME": "1"}) as swarm:
        node = swarm.start("--blocks", "0:3")
        node.wait_online()
        log = node.log.read_text()
    imported = set(re.findall(r"^import time: .*\| +(\S+)$", log, re.MULTILINE))
    assert {"torch", "numba", "libp2p", "node.model.llama.modules"} <= imported, "what a node does need"
    assert [name for name in sorted(imported) if name.startswith(UNWANTED)] == []
