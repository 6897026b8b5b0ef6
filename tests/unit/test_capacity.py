"""What fits on a machine, and how it is shared, are sums."""

from __future__ import annotations

import pytest

from node import capacity
from node.config import ConfigError
from node.model.info import ModelInfo
from routing.names import ModelId, Revision

MIB = 2**20


def model(blocks: int = 10) -> ModelInfo:
    """Blocks of 1 MiB in float32, and 1 KiB of cache for each token and block."""
    return ModelInfo(ModelId("m"), Revision("r"), "llama", blocks, 64, 96, 2048, (MIB // 4,) * blocks, 256, 0)


@pytest.mark.parametrize(
    ("words", "serves"),
    [
        (["python", "-m", "node"], True),
        (["/usr/bin/python3.11", "-X", "dev", "-m", "node", "some/model", "--blocks", "0:2"], True),
        (["python", "-m", "node", "bootstrap"], False),
        (["python", "-m", "node", "status", "--peers", "x"], False),
        (["python", "-m", "node", "--name", "status"], True),
        (["timeout", "40", "python", "-m", "node"], False),
        (["python", "-m", "client", "generate"], False),
        (["python", "-m"], False),
        ([], False),
    ],
)
def test_a_serving_node_is_known_by_its_command_line(words, serves):
    assert capacity.serves_blocks(words) is serves


def test_cores_are_divided_by_the_servers_on_the_machine(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    for servers, threads in ((1, 8), (3, 2), (9, 1)):
        monkeypatch.setattr(capacity, "servers_on_this_machine", lambda servers=servers: servers)
        assert capacity.threads_for_this_node() == threads


def test_as_many_blocks_fit_as_their_weights_and_caches_leave_room_for():
    # 2,048 cache tokens of 1 KiB make 2 MiB a block beside its 1 MiB; 80 % of the memory is used
    assert capacity.blocks_that_fit(model(), "float32", 2048, 30 * MIB) == 8
    assert capacity.blocks_that_fit(model(), "float32", 2048, 1000 * MIB) == 10
    assert capacity.blocks_that_fit(model(), "float32", 2048, 3 * MIB) == 0


def test_a_span_that_does_not_fit_says_how_many_blocks_would():
    with pytest.raises(ConfigError, match=r"10 blocks of m .* 2 blocks would fit"):
        capacity.check_fits(model(), 10, "float32", 2048, 8 * MIB)
    assert capacity.check_fits(model(), 2, "float32", 2048, 8 * MIB) == 6 * MIB


def test_cache_tokens_follow_the_free_memory_between_two_bounds():
    assert capacity.cache_tokens_that_fit(model(), 10, "float32", 0) == capacity.LEAST_CACHE_TOKENS
    assert capacity.cache_tokens_that_fit(model(), 10, "float32", 500 * MIB) == 10_240
    assert capacity.cache_tokens_that_fit(model(), 1, "float32", 10**12) == capacity.MOST_CACHE_TOKENS
