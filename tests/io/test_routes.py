"""What a client's choices of chains go by."""

from __future__ import annotations

import pytest

from routing.alternatives import Constraints
from routing.hops import NoChain
from routing.names import PeerId
from tests.fakes_serving import swarm


async def test_chains_have_nobody_in_common_where_there_are_others(autojump_clock):
    async with swarm() as world:
        for name, start, stop in (("A", 0, 3), ("a", 0, 3), ("B", 3, 6), ("b", 3, 6), ("c", 3, 6)):
            world.add(name, start, stop)
        routes = world.routes(constraints=Constraints(blocked={PeerId("c")}))
        one, two = (["".join(hop.peer for hop in chain.hops)] for chain in routes.chains(2))
        assert (one, two) == (["AB"], ["ab"])
        world.out_of_sight |= {PeerId("A"), PeerId("a")}
        with pytest.raises(NoChain):
            routes.chains(2)
