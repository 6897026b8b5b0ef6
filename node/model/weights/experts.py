"""Products of a block's experts on a device, where a choice that the host reads is a wait for the device.

Few rows take their experts' matrices by index on the device, and nobody waits: int8 rows with scales, as
`PackedLinear` keeps them, are copied and written out for one product of batches.  Many rows are sorted by
their experts first, and the host waits once for the numbers of rows: then each expert is a layer of its own.
The library has both ways for experts without quantisation (transformers' batched_mm and grouped_mm).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Weights that are copied at a time: 192 MiB in int8 and bfloat16.  Eight experts of Qwen3-30B-A3B have 38 M;
# two of Mixtral-8x7B have 352 M, whose copy takes longer than the wait.
GATHERED_VALUES = 1 << 26

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Stacked:
    """One matrix of every expert: int8 [experts, out, in] and scales float32 [experts, out]."""

    weight: Tensor
    scale: Tensor

    def product(self, x: Tensor, experts: Tensor) -> Tensor:
        """x [rows, in] times each row's expert, int64 [rows]: [rows, out] in x's dtype."""
        codes, scale = self.weight.index_select(0, experts), self.scale.index_select(0, experts)
        written = torch.empty(codes.shape, dtype=x.dtype, device=x.device)
        torch.mul(codes, scale[..., None], out=written)
        return torch.bmm(written, x[..., None])[..., 0]


def chosen(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up: Stacked, down: Stacked, activation: Activation
) -> Tensor:
    """The sum of each row's experts without a wait: [rows, hidden] in x's dtype.

    x: [rows, hidden].  experts, weights: of each row's choices, [rows, k]; a number after the last expert's
    is none.
    """
    rows, choices = experts.shape
    flat = experts.reshape(-1)
    absent = flat >= len(down.weight)
    flat = flat.clamp(max=len(down.weight) - 1)
    gate, up = gate_up.product(x.repeat_interleave(choices, 0), flat).chunk(2, -1)
    answer = down.product(activation(gate) * up, flat)
    answer = answer * weights.reshape(-1, 1).masked_fill(absent[:, None], 0.0)
    return answer.view(rows, choices, x.shape[1]).sum(1).to(x.dtype)


def sorted_by_expert(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Sequence[nn.Module],
    down: Sequence[nn.Module],
    activation: Activation,
) -> Tensor:
    """As `chosen`, with any layers, one wait, and a derivative with respect to x."""
    rows, choices = experts.shape
    ordered, order = experts.reshape(-1).sort(stable=True)
    numbers = torch.arange(len(down), device=x.device)
    ends = torch.searchsorted(ordered, numbers, right=True).cpu().tolist()
    given = x.index_select(0, order // choices)
    parts, first = [], 0
    for own_gate_up, own_down, last in zip(gate_up, down, ends, strict=True):
        if last > first:
            gate, up = own_gate_up(given[first:last]).chunk(2, -1)
            parts.append(own_down(activation(gate) * up))
        first = last
    if first < len(given):  # choices of no expert
        parts.append(torch.zeros_like(given[first:]))
    answer = torch.cat(parts).index_select(0, order.argsort()) * weights.reshape(-1, 1)
    return answer.view(rows, choices, x.shape[1]).sum(1).to(x.dtype)
