"""Swarms in simulated time: placement, routing and clients on the real code of `routing`."""
