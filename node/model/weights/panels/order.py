"""The order of int8 weights in stripes, which node/model/weights/panels/stripes.py multiplies.

OUTS rows of a matrix [outs, k] are a stripe.  It has the bytes of its rows, and holds for each GROUP of k in
turn the weights of all its outputs.  A matrix in stripes can be cut between any two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

STRIPES = torch.uint8  # a tensor [outs, k] of this dtype holds the bytes of int8 codes in stripes
OUTS, GROUP = 32, 4
LONGEST = 1 << 16  # k: so many products of an unsigned and a signed byte fit 32 bits
PIECE_VALUES = 1 << 22  # that are put into order at a time


def has_whole_stripes(weights: Iterable[Tensor]) -> bool:
    """Whether each of these matrices [outs, k] can be put into stripes, and there is one at all."""
    shapes = [weight.shape for weight in weights]
    return bool(shapes) and all(
        outs % OUTS == 0 and k % GROUP == 0 and 0 < k <= LONGEST for outs, k in shapes
    )


def put_in_stripes(codes: Tensor) -> Tensor:
    """Put int8 rows [outs, k] of whole stripes into order, in their own memory: [outs, k] of STRIPES."""
    _, k = codes.shape
    step = max(1, PIECE_VALUES // (k * OUTS)) * OUTS
    for piece in torch.split(codes, step):
        stripes = piece.view(-1, OUTS, k // GROUP, GROUP).transpose(1, 2).contiguous()
        piece.copy_(stripes.view(len(piece), k))
    return codes.view(STRIPES)


def rows_of(stripes: Tensor) -> Tensor:
    """A copy of a matrix in STRIPES [outs, k] as int8 rows [outs, k]."""
    outs, k = stripes.shape
    codes = stripes.view(torch.int8).view(-1, k // GROUP, OUTS, GROUP)
    return codes.transpose(1, 2).reshape(outs, k)


def striped(join: Callable[[list[Tensor]], Tensor]) -> Callable[[list[Tensor]], Tensor]:
    """A function that joins tensors as `join` does, int8 rows of whole stripes in STRIPES."""

    def joined(parts: list[Tensor]) -> Tensor:
        whole = join(parts)
        return put_in_stripes(whole) if whole.dtype == torch.int8 and whole.is_cpu else whole

    return joined
