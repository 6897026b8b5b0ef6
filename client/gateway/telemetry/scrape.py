"""GET /metrics of a gateway."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from client.gateway.gateway import Gateway
from client.gateway.monitor import Monitor
from client.gateway.telemetry.metrics import GatewayMetrics, ScrapedGateway
from routing.view.description import describe

FRESH_SECONDS = 2.0  # of a swarm's description: the page has one made as often


def routes(gateway: Gateway) -> list[BaseRoute]:
    """The route, unless the gateway counts nothing."""
    metrics = gateway.metrics
    if not isinstance(metrics, GatewayMetrics):
        return []

    async def scrape(request: Request) -> Response:
        state = await present(gateway)
        accept = request.headers.get("accept", "")
        content_type, body = metrics.scrape(state, accept)  # a few milliseconds: see `benchmarks scrape`
        return Response(body, headers={"content-type": content_type})

    return [Route("/metrics", scrape, methods=["GET"])]


async def present(gateway: Gateway) -> ScrapedGateway:
    """The state of this moment."""
    swarm, admission = gateway.swarm, gateway.admission.state
    if isinstance(gateway.monitor, Monitor):
        facts = await gateway.monitor.description(FRESH_SECONDS)
    else:
        facts = describe(swarm.view(), await swarm.rtts())
    return ScrapedGateway(
        active=len(gateway.active) - admission.waiting,
        queued=admission.waiting,
        ready=gateway.is_ready and not gateway.is_draining and not gateway.missing_blocks(),
        model=swarm.info.name,
        revision=swarm.info.revision,
        facts=facts,
    )
