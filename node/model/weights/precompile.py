"""Compiles the kernels of the usual nodes on this CPU: python -m node.model.weights.precompile

A node compiles what it lacks at its start.  Many nodes that start at once, as in the tests, or a container's
image, have it done beforehand.
"""

from __future__ import annotations

import sys
from functools import partial

import torch

from node.model.weights.quantize import kernels

USUAL_HEAD = 64  # numbers: of all sizes that consist of whole vectors


def compile_for(weights: torch.dtype, head_dim: int, threads: int) -> None:
    """Compile or read the kernels of a span whose matrices have this dtype, and cache and threads the usual.

    Nodes that start at once share the work.  Raises ImportError where numba cannot be imported.
    """
    from node.model.attention import decode, prefill
    from node.model.weights import decode_kernels
    from node.model.weights import kernels as products
    from node.model.weights.compiling import in_any_order
    from node.model.weights.panels import panel_kernels
    from node.model.weights.panels.order import STRIPES

    together, cache = threads > 1, torch.float32 if weights == torch.float32 else torch.bfloat16
    of_prompts = {(torch.float32, False), (cache, together)}  # the first is measured
    if head_dim % products.LANES:
        of_prompts.clear()
    panels = [] if weights == STRIPES else [partial(panel_kernels.product_of, weights)]
    in_any_order(
        [
            *(partial(prefill.attend_for, dtype, together=several) for dtype, several in of_prompts),
            partial(decode.attend_for, cache, head_dim),
            partial(decode_kernels.halves, weights, together=together),
            partial(products.kernel_for, weights),
            *panels,
            decode_kernels.run,
        ]
    )


def main() -> int:
    """Compile what the cache lacks; 0, also where there is nothing to compile with."""
    if (found := kernels()) is None:
        return 0
    from node.model.attention import decode, prefill
    from node.model.weights import argmax_head, decode_kernels, low_rank_kernel
    from node.model.weights.panels import panel_kernels
    from node.model.weights.panels.order import STRIPES

    for dtype in (torch.float32, torch.int8):
        found.kernel_for(dtype)
        panel_kernels.product_of(dtype)
    of_spans = STRIPES if found.IN_STRIPES else torch.int8
    found.kernel_for(of_spans)
    for dtype in (torch.float32, of_spans):
        decode_kernels.halves(dtype, together=False)
    decode_kernels.run()
    for stores in (torch.float32, torch.bfloat16):
        decode.attend_for(stores, USUAL_HEAD)
        prefill.attend_for(stores, together=False)
    low_rank_kernel.head(0)
    argmax_head.norm_kernel()
    argmax_head.screen_kernel()
    argmax_head.screen_rows_kernel()
    return 0


if __name__ == "__main__":
    sys.exit(main())
