"""Serve a swarm's text over HTTP: Starlette and uvicorn on uvloop, an asyncio program.

    pip install "raceme[gateway]"
    python examples/web_app.py --peers /ip4/.../p2p/12D3...
    curl -N "http://127.0.0.1:8000/generate?prompt=The+capital+of+France+is"

The answer is a stream of server-sent events, one for each token: data: {"text": " Paris"}
"""

from __future__ import annotations

import argparse
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

import client


async def generate(request: Request) -> Response:
    """GET /generate?prompt=...&max_new_tokens=..."""
    swarm: client.SwarmLike = request.app.state.swarm
    try:
        count = int(request.query_params.get("max_new_tokens", 32))
        tokens = swarm.generate(request.query_params.get("prompt", ""), max_new_tokens=count)
    except ValueError as error:  # an empty prompt, too many tokens: refused before anything is sent
        return PlainTextResponse(str(error), status_code=400)
    return StreamingResponse(events(tokens), media_type="text/event-stream")


async def events(tokens: AsyncGenerator[client.Token, None]) -> AsyncIterator[str]:
    """Each token as an event.  When the browser goes away the generation ends, on the servers too."""
    try:
        async with aclosing(tokens):
            async for token in tokens:
                yield f"data: {json.dumps({'text': token.text, 'finish_reason': token.finish_reason})}\n\n"
    except (client.NoChain, client.PeerFault, client.Refused) as error:  # the status has been sent already
        yield f"event: error\ndata: {json.dumps({'error': str(error)})}\n\n"


@asynccontextmanager
async def joined(app: Starlette, flags: argparse.Namespace) -> AsyncIterator[None]:
    """Stay in the swarm while the application runs: all requests share it."""
    # trio runs in a thread of its own; the handle can be used like any other asyncio object.
    async with client.connect(flags.model, peers=flags.peers, swarm_key=flags.swarm_key) as swarm:
        app.state.swarm = swarm
        yield


def main() -> None:
    """Read the command line and serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Serve a swarm's text over HTTP.")
    parser.add_argument("--peers", action="append", required=True, help="address of a node; may come again")
    parser.add_argument("--swarm-key", type=Path, help="the key file of a private swarm")
    parser.add_argument("--model", help="the model that the swarm serves (default: the built-in one)")
    parser.add_argument("--port", type=int, default=8000)
    flags = parser.parse_args()
    app = Starlette(routes=[Route("/generate", generate)], lifespan=partial(joined, flags=flags))
    uvicorn.run(app, port=flags.port, loop="uvloop", timeout_graceful_shutdown=5)


if __name__ == "__main__":
    main()
