"""Compiles the kernels of the usual nodes on this CPU: python -m node.model.weights.precompile

A node compiles what it lacks at its start.  Many nodes that start at once, as in the tests, or a container's
image, have it done beforehand.
"""

from __future__ import annotations

import sys

import torch

from node.model.weights.quantize import kernels

USUAL_HEAD = 64  # numbers: of all sizes that consist of whole vectors


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
