"""The compiled function of adapters, made ready before the first step that needs it."""

from __future__ import annotations

from node.model.weights.quantize import kernels


def prepare() -> bool:
    """Compile it, or read it from the cache; whether there is one here.

    The first time on a machine takes seconds, in which no other Python code runs: at a node's start.
    """
    if kernels() is None:
        return False
    from node.model.weights import low_rank_kernel

    return bool(low_rank_kernel.function().address)
