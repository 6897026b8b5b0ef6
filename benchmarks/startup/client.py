"""The clients of `benchmarks startup --black-holed`: a new one for each question, and its first token."""

from __future__ import annotations

import time
from typing import Any

import trio

from benchmarks.lib.processes import answer_lines
from client.connect import connect


async def _first_token(model: str | None, peers: list[str], threads: int) -> dict[str, Any]:
    """servers: the announced ones.  first_token_s: seconds from the request of a client in the swarm;
    chain_s: the part until a chain is chosen.
    """
    async with connect(model, peers=peers, threads=threads) as swarm:
        servers = sum(record.role == "serve" for record in swarm.view().records())
        asked = time.perf_counter()
        await swarm.route()
        chosen = time.perf_counter()
        async for _ in swarm.generate("Once upon a time", max_new_tokens=2):
            break
        now = time.perf_counter()
        return {"servers": servers, "first_token_s": now - asked, "chain_s": chosen - asked}


if __name__ == "__main__":
    answer_lines(lambda question: trio.run(_first_token, *question))
