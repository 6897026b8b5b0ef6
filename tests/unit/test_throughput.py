"""What a placement can do: the fast way and the linear programme agree."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.sparse import coo_array

from routing.names import PeerId
from routing.placement.throughput import Holder, bottleneck, bound, capacity

BLOCKS = 9
spans = st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS), st.sampled_from([1.0, 2.5, 7.0, 40.0]))
swarms = st.lists(spans.filter(lambda span: span[0] < span[1]), max_size=9)


def holders(found):
    return [Holder(PeerId(str(number)), *span) for number, span in enumerate(found)]


def shares(servers, blocks):
    """The capacity by linear programming, and the work that each server then does for each block.

    Returns tokens per second, and block-tokens per second of shape (servers, blocks).
    """
    pairs = [(i, b) for i, s in enumerate(servers) for b in range(s.start, min(s.stop, blocks))]
    if not pairs:
        return 0.0, np.zeros((len(servers), blocks))
    who, what = (np.array(side) for side in zip(*pairs, strict=True))
    columns, demand = np.arange(len(pairs)), np.arange(blocks)
    rows = np.concatenate([who, len(servers) + what, len(servers) + demand])
    at = np.concatenate([columns, columns, np.full(blocks, len(pairs))])
    values = np.concatenate([np.ones(len(pairs)), -np.ones(len(pairs)), np.ones(blocks)])
    shape = (len(servers) + blocks, len(pairs) + 1)
    limits = np.array([*(server.rate for server in servers), *([0.0] * blocks)])
    objective = np.zeros(len(pairs) + 1)
    objective[-1] = -1.0
    matrix = coo_array((values, (rows, at)), shape).tocsc()
    found = linprog(objective, A_ub=matrix, b_ub=limits, method="highs")
    assert found.status == 0, found.message
    done = np.zeros((len(servers), blocks))
    done[who, what] = found.x[:-1]
    return float(found.x[-1]), done


@settings(deadline=None)
@given(swarms)
def test_the_capacity_is_that_of_the_linear_programme(found):
    servers = holders(found)
    expected, done = shares(servers, BLOCKS)
    assert capacity(servers, BLOCKS) == pytest.approx(expected, abs=1e-6)
    assert all(done[i].sum() <= server.rate + 1e-6 for i, server in enumerate(servers))
    assert done.sum(axis=0).min() == pytest.approx(expected, abs=1e-6)


@given(swarms)
def test_the_bottleneck_is_a_proof_of_the_capacity(found):
    servers = holders(found)
    most, limiting = bottleneck(servers, BLOCKS)
    there = [s for s in servers if any(s.start <= block < s.stop for block in limiting)]
    assert most == pytest.approx(sum(s.rate for s in there) / len(limiting))
    assert most <= bound(servers, BLOCKS) * (1 + 1e-9)


def test_blocks_that_are_short_together_need_not_be_neighbours():
    servers = holders([(0, 3, 2.0), (1, 2, 100.0)])
    assert bottleneck(servers, 3) == (1.0, (0, 2))


def test_without_a_holder_there_is_no_capacity():
    assert bottleneck(holders([(0, 1, 5.0), (2, 3, 5.0)]), 3) == (0.0, (1,))
    assert bottleneck([], 3).capacity == 0.0
