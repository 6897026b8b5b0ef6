"""Compare texts by their meaning over HTTP: hidden states of a swarm, in an asyncio program on uvloop.

    pip install ".[gateway]"
    python examples/web_app.py --peers /ip4/.../p2p/12D3...
    curl "http://127.0.0.1:8000/nearest?text=a+ship+at+sea&among=a+small+boat&among=the+price+of+bread"

The answer is {"nearest": [["a small boat", 0.83], ["the price of bread", 0.71]]}.  For a program that wants
texts of a swarm there is `python -m client gateway`, with OpenAI's API.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import client

MAX_TEXTS = 16  # of one request: each is a request to the swarm


async def nearest(request: Request) -> Response:
    """GET /nearest?text=...&among=...&among=...: the texts of `among`, the most similar one first."""
    swarm: client.SwarmLike = request.app.state.swarm
    texts = [request.query_params.get("text", ""), *request.query_params.getlist("among")]
    try:
        if not 2 <= len(texts) <= MAX_TEXTS:
            raise ValueError(f"{len(texts) - 1} texts to compare with, 1 to {MAX_TEXTS - 1} are allowed")
        asked, *others = await asyncio.gather(*(meaning(swarm, text) for text in texts))
    except ValueError as error:
        return JSONResponse({"error": str(error)}, 400)
    except (client.NoChain, client.PeerFault, client.Refused) as error:
        return JSONResponse({"error": str(error)}, 503)
    found = [(text, round(float(asked @ other), 3)) for text, other in zip(texts[1:], others, strict=True)]
    return JSONResponse({"nearest": sorted(found, key=lambda each: -each[1])})


async def meaning(swarm: client.SwarmLike, text: str) -> torch.Tensor:
    """The mean hidden state of a text after half of the blocks, float32 [hidden], of length 1."""
    ids = swarm.local_model.tokenizer(text)["input_ids"]
    if len(ids) < 2:
        raise ValueError(f"{text!r} has {len(ids)} tokens, at least 2 are needed")
    hidden = await swarm.forward(
        swarm.local_model.embed(torch.tensor([ids]), 0), stop=max(1, swarm.info.blocks // 2)
    )
    # The first position's state is much larger than all others, whatever the text is (arXiv:2309.17453).
    return torch.nn.functional.normalize(hidden[0, 1:].float().mean(0), dim=0)  # [1, tokens, hidden] before


@asynccontextmanager
async def joined(app: Starlette, flags: argparse.Namespace) -> AsyncIterator[None]:
    """Stay in the swarm while the application runs: all requests share it."""
    # trio runs in a thread of its own; the handle can be used like any other asyncio object.
    async with client.connect(flags.model, peers=flags.peers, swarm_key=flags.swarm_key) as swarm:
        app.state.swarm = swarm
        yield


def main() -> None:
    """Read the command line and serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Compare texts by hidden states of a swarm, over HTTP.")
    parser.add_argument("--peers", action="append", required=True, help="address of a node; may come again")
    parser.add_argument("--swarm-key", type=Path, help="the key file of a private swarm")
    parser.add_argument("--model", help="the model that the swarm serves (default: the built-in one)")
    parser.add_argument("--port", type=int, default=8000)
    flags = parser.parse_args()
    app = Starlette(routes=[Route("/nearest", nearest)], lifespan=partial(joined, flags=flags))
    uvicorn.run(app, port=flags.port, loop="uvloop", timeout_graceful_shutdown=5)


if __name__ == "__main__":
    main()
