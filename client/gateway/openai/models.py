"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from client.gateway.gateway import Gateway


def routes(gateway: Gateway) -> list[Route]:
    """The list of the models, and each of them."""
    served = gateway.served

    async def list_models(request: Request) -> JSONResponse:
        return JSONResponse(
            {"object": "list", "data": [served.body(model) for model in served.models.values()]}
        )

    async def one_model(request: Request) -> JSONResponse:
        name = request.path_params["name"]
        if not name:
            raise HTTPException(404)
        return JSONResponse(served.body(served.find(name)))

    return [
        Route("/v1/models", list_models, methods=["GET"]),
        Route("/v1/models/{name:path}", one_model, methods=["GET"]),
    ]
