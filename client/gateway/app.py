"""The ASGI application: every route of a gateway, behind its door."""

from __future__ import annotations

from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from client.gateway.door.body import Bodies
from client.gateway.door.middleware import Door
from client.gateway.gateway import Gateway
from client.gateway.monitor import routes as monitor_routes
from client.gateway.openai import models
from client.gateway.openai.chat import chat
from client.gateway.openai.completions import completions
from client.gateway.openai.endpoints import Endpoint
from client.gateway.openai.errors import RequestError
from client.gateway.openai.responses.endpoint import responses
from client.gateway.openai.tokenization import detokenize, tokenize
from client.gateway.page import routes as page_routes
from client.gateway.telemetry import scrape


def create_app(gateway: Gateway) -> Starlette:
    """The application of a gateway; for uvicorn, and for programs that mount it.

    The caller keeps `gateway.background()` open around it.
    """
    routes: list[BaseRoute] = [
        *_health(gateway),
        *models.routes(gateway),
        *monitor_routes(gateway),
        *scrape.routes(gateway),
        *_texts(gateway),
        *(page_routes() if gateway.settings.has_page else ()),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Door, rules=gateway.rules)],
        exception_handlers={HTTPException: _http_error},
    )
    vars(app.router)["redirect_slashes"] = False  # an unknown path is 404, not another path
    return app


def _texts(gateway: Gateway) -> list[BaseRoute]:
    """The endpoints that take a body."""
    handlers = {
        "/v1/chat/completions": chat,
        "/v1/completions": completions,
        "/v1/responses": responses,
        "/tokenize": tokenize,
        "/detokenize": detokenize,
    }
    bodies = Bodies(gateway.settings.http.max_bodies_bytes)
    return [
        Route(path, Endpoint(gateway, partial(handler, gateway), bodies), methods=["POST"])
        for path, handler in handlers.items()
    ]


def _health(gateway: Gateway) -> list[BaseRoute]:
    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> Response:
        missing = gateway.missing_blocks()
        is_ready = gateway.is_ready and not missing and not gateway.is_draining
        state = "draining" if gateway.is_draining else "incomplete" if missing else "starting"
        body = {
            "status": "ready" if is_ready else state,
            "missing_blocks": [[run.start, run.stop] for run in missing],
        }
        return JSONResponse(body, 200 if is_ready else 503, {} if is_ready else {"retry-after": "5"})

    return [Route("/health", health, methods=["GET"]), Route("/ready", ready, methods=["GET"])]


async def _http_error(request: Request, error: Exception) -> Response:
    """404 and 405 in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"[:200]
    known = {
        404: (f"{what} does not exist: see docs/gateway.md for the paths", "unknown_url"),
        405: (
            f"{what}: this path takes {(error.headers or {}).get('Allow', 'other methods')}",
            "method_not_allowed",
        ),
    }
    message, code = known.get(error.status_code, (str(error.detail), "http_error"))
    return RequestError(error.status_code, message, code=code, headers=error.headers or {}).response()
