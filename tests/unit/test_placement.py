"""Where blocks lie on several devices, and what fits there: sums over the memory of each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from node.config import ConfigError
from node.serving import memory
from node.serving.memory import Precision
from node.serving.placement import placement as placement_module
from node.serving.placement.placement import Placement
from node.serving.placement.room import Room, sized_for
from routing.names import Revision
from tests.unit.test_memory import MIB, PLAIN, model

GIB = 1024 * MIB
HALF = Precision("bfloat16")


def gpus(*free: int) -> Room:
    return Room(tuple(f"cuda:{index}" for index in range(len(free))), free)


def test_one_device_is_what_it_was():
    room = Room(("cpu",), (GIB,))
    fitting = memory.blocks_that_fit(model(), PLAIN, None, GIB, "cpu")
    assert room.blocks_that_fit(model(), PLAIN, None) == fitting
    tokens = memory.cache_tokens_that_fit(model(), fitting, PLAIN, GIB, "cpu")
    assert room.cache_tokens_that_fit(model(), fitting, PLAIN) == tokens
    expected = memory.training_bytes_that_fit(model(), fitting, PLAIN, tokens, GIB, step_tokens=2048)
    assert room.training_bytes_that_fit(model(), fitting, PLAIN, tokens, 2048) == expected
    room.check_fits(model(), fitting, PLAIN, tokens)
    with pytest.raises(ConfigError) as alone:
        memory.check_fits(model(), 10, PLAIN, 1 << 20, GIB)
    with pytest.raises(ConfigError) as room_s:
        room.check_fits(model(), 10, PLAIN, 1 << 20)
    assert str(room_s.value) == str(alone.value)


@pytest.mark.parametrize("free", [(8 * GIB, 8 * GIB), (3 * GIB, 10 * GIB), (6 * GIB, 3 * GIB, 4 * GIB)])
def test_the_blocks_that_fit_have_room_at_every_device(free):
    info, room = model(12_000), gpus(*free)
    blocks = room.blocks_that_fit(info, HALF, 2048)
    assert 10 < blocks < 12_000
    for device, count in zip(room.devices, room.counts(blocks), strict=True):
        index = int(device[-1])
        assert count <= memory.blocks_that_fit(info, HALF, 2048, free[index], device)
    room.check_fits(info, blocks, HALF, 2048)
    tokens = room.cache_tokens_that_fit(info, blocks, HALF)
    room.check_fits(info, blocks, HALF, tokens)


def test_two_devices_hold_about_twice_the_blocks_and_the_cache_of_one():
    info = model(12_000)
    one, two = gpus(8 * GIB), gpus(8 * GIB, 8 * GIB)
    assert two.blocks_that_fit(info, HALF, 2048) == 2 * one.blocks_that_fit(info, HALF, 2048)
    assert two.cache_tokens_that_fit(info, 20, HALF) == one.cache_tokens_that_fit(info, 10, HALF)


def test_the_device_without_room_is_named_with_its_blocks():
    with pytest.raises(
        ConfigError, match=r"^of 1000 blocks cuda:0 would get 500: 500 blocks of m as bfloat16"
    ):
        gpus(2 * GIB, 2 * GIB).check_fits(model(1000), 1000, HALF, 4096)


def test_a_device_without_free_memory_gets_no_block():
    room = gpus(8 * GIB, 0)
    assert room.counts(7) == [7, 0]
    room.check_fits(model(), 7, HALF, 2048)


def test_a_rank_has_its_part_of_matrices_and_keys_and_all_of_the_norms():
    info = model()
    norms = 128
    info = replace(info, block_values=tuple(each + norms for each in info.matrix_values), kv_values=256)
    two = sized_for(info, 2, 0.5)
    assert two.matrix_values == tuple(each // 2 for each in info.matrix_values)
    assert two.block_values == tuple(each // 2 + norms for each in info.matrix_values)
    assert two.kv_values == 128
    four = sized_for(info, 4, 0.5)  # two key heads: each is at two ranks
    keys = 256 * info.hidden_size
    assert four.matrix_values[0] == (info.matrix_values[0] - keys) // 4 + keys // 2
    assert four.kv_values == 128


class FakeTeam:
    """Ranks 1 and 2 with so many free bytes."""

    def free_bytes(self) -> list[int]:
        return [5 * GIB, 3 * GIB]


def test_the_rank_with_the_least_memory_bounds_all(monkeypatch):
    monkeypatch.setattr(
        memory, "free_bytes", lambda device: {"cuda:0": 4 * GIB}[device]
    )  # others are not asked
    team: Any = FakeTeam()
    placement = Placement(("cuda:0", "cuda:1", "cuda:2"), team, 1 / 3)
    assert placement.room().free == (3 * GIB,)
    assert placement.free_for_training() == 2 * GIB
    assert placement.places(4) == [0, 0, 0, 0]
    assert not placement.takes_adapters
    assert str(placement) == "cuda:0,cuda:1,cuda:2 in parallel"


def test_the_memory_of_a_cpu_is_counted_once(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 8 * GIB)
    assert Placement(("cpu",)).room().free == (8 * GIB,)
    assert Placement(("cpu", "cpu")).room().free == (4 * GIB, 4 * GIB)
    team: Any = FakeTeam()
    assert Placement(("cpu", "cpu"), team, 0.5).room().free == (4 * GIB,)
    assert Placement(("cpu", "cpu")).free_for_training() == 2 * GIB


def test_new_blocks_go_where_memory_is_free(monkeypatch):
    free = {"cuda:0": 2 * GIB, "cuda:1": 6 * GIB}
    monkeypatch.setattr(memory, "free_bytes", lambda device: free[device])
    placement = Placement(("cuda:0", "cuda:1"))
    assert placement.places(4) == [0, 1, 1, 1]
    assert placement.places(8) == [0, *[1] * 7]  # not two of eight: a GiB is kept free at each
    assert placement.places(1) == [1]
    assert Placement(("cuda:1",)).places(3) == [0, 0, 0]


def test_rates_are_kept_by_the_devices_and_how_they_share(monkeypatch, tmp_path):
    monkeypatch.setenv("RACEME_CACHE", str(tmp_path))
    monkeypatch.setattr(placement_module, "device_name", lambda device: f"card of {device}")
    team: Any = FakeTeam()
    two = ("cuda:0", "cuda:1")
    ways = Placement(two[:1]), Placement(two), Placement(two, team, 0.5)
    keys = [each.kept_rates(Revision("r"), HALF, 1)[1] for each in ways]
    assert len(set(keys)) == 3
    assert "card of cuda:0" in keys[0]
