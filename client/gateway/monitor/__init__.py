"""The gateway's sight of its swarm: the feed of events, the sessions, the traces, and /api."""

from client.gateway.monitor.api import routes
from client.gateway.monitor.monitor import Monitor, RequestWatch

__all__ = ["Monitor", "RequestWatch", "routes"]
