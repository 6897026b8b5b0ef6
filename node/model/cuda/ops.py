"""A block's operations on a device: each is one call, by Triton's kernel or in torch's own operations.

They are registered with torch, so that each of them is one operation wherever torch counts or records
operations, and has a shape on the meta device.  None waits for the device or reads a value from it, so a
CUDA graph can record all of them.  None has a derivative.

All tensors of a call lie on one device.  "rows" are positions of any sessions.  Integers are int32 or int64.
Without Triton (node/model/cuda/available.py) torch's operations give equal answers within rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor

from node.devices import is_out_of_memory
from node.model.cuda import torch_ops
from node.model.cuda.available import give_up, kernel_of, usable
from node.model.cuda.launches import on

__all__ = ["add_norm", "int8_linear", "paged_attention", "rope_and_write", "silu_mul", "usable"]

Int8Way = Literal["auto", "triton", "dequantise"]
PAGE_TOKENS = 16
# Above these rows a product takes longer than a cast of the weights, and cuBLAS's products are faster.
MOST_TRITON_ROWS = 256

_SCHEMAS = (
    "int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, str way) -> Tensor",
    "norm(Tensor hidden, Tensor weight, float eps) -> Tensor",
    "add_norm(Tensor hidden, Tensor addend, Tensor weight, float eps) -> (Tensor, Tensor)",
    "rope_and_write(Tensor qkv, int heads, int key_heads, Tensor cos, Tensor sin, Tensor places,"
    " Tensor slots, Tensor(a!) keys, Tensor(b!) values, Tensor? query_norm, Tensor? key_norm, float eps,"
    " bool rotary) -> Tensor",
    "paged_attention(Tensor q, Tensor keys, Tensor values, Tensor pages, Tensor lengths, float scale,"
    " int window, int page_tokens) -> Tensor",
    "silu_mul(Tensor gate_up) -> Tensor",
)
_library = torch.library.Library("raceme", "DEF")  # type: ignore[no-untyped-call]
for _schema in _SCHEMAS:
    _library.define(_schema)  # type: ignore[no-untyped-call]


def int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, way: Int8Way = "auto"
) -> Tensor:
    """x @ (weight * scale).T + bias: [rows, in] -> [rows, out] in x's dtype, accumulated in float32.

    x: bfloat16, float16 or float32.  weight: int8 [out, in].  scale: float32 [out].  bias: [out] of any
    float dtype.
    way: "triton" reads int8 and casts it in registers, exactly; "dequantise" writes the weights out in x's
    dtype, rounded, for cuBLAS.  "auto" takes the first for up to MOST_TRITON_ROWS, where it can be used.
    """
    return cast(Tensor, torch.ops.raceme.int8_linear(x, weight, scale, bias, way))


def add_norm(hidden: Tensor, addend: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """hidden + addend, and the RMS norm of it times weight (arXiv:1910.07467), rounded as the library does.

    hidden, addend: [rows, hidden].  weight: [hidden].  Without an addend the first answer is `hidden`.
    """
    if addend is None:
        return hidden, cast(Tensor, torch.ops.raceme.norm(hidden, weight, eps))
    return cast("tuple[Tensor, Tensor]", torch.ops.raceme.add_norm(hidden, addend, weight, eps))


def rope_and_write(
    qkv: Tensor,
    heads: int,
    key_heads: int,
    cos: Tensor,
    sin: Tensor,
    places: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
    rotary: bool = True,
) -> Tensor:
    """Rotate queries and keys (arXiv:2104.09864), and write keys and values into their slots.

    qkv: [rows, (heads + 2 * key_heads) * dim].  cos, sin: tables [positions, dim].  places: [rows], into the
    tables.  slots: [rows], into keys and values [slots, key_heads, dim].  Rows with one slot write either.
    query_norm, key_norm: [dim], weights of the RMS norm of each head before it is rotated.
    Answers the queries, [rows, heads, dim].
    """
    return cast(
        Tensor,
        torch.ops.raceme.rope_and_write(
            qkv, heads, key_heads, cos, sin, places, slots, keys, values, query_norm, key_norm, eps, rotary
        ),
    )


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    lengths: Tensor,
    scale: float,
    window: int = 0,
    page_tokens: int = PAGE_TOKENS,
) -> Tensor:
    """Attention of one new position of each row over pages (arXiv:2309.06180): [rows, heads * dim].

    q: [rows, heads, dim].  keys, values: [slots, key_heads, dim], page p has the slots from p * page_tokens
    on.  pages: [rows, most pages], each row's pages in order; behind a row's last one stands any page.
    lengths: [rows], positions of a row with the new one, at least 1.  window: positions that are seen, the
    new one among them; 0 for all.
    The lengths are read on the device: a recorded call serves all lengths up to most pages * page_tokens.
    """
    return cast(
        Tensor,
        torch.ops.raceme.paged_attention(q, keys, values, pages, lengths, scale, window, page_tokens),
    )


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [rows, 2 * inner] -> [rows, inner]."""
    return cast(Tensor, torch.ops.raceme.silu_mul(gate_up))


# By Triton where it can be used, else by torch's operations


def _int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, way: Int8Way) -> Tensor:
    if way == "dequantise" or (way == "auto" and len(x) > MOST_TRITON_ROWS):
        return torch_ops.int8_linear(x, weight, scale, bias)
    return cast(Tensor, _computed("int8_linear", x, weight, scale, bias))


def _computed(name: str, first: Tensor, *others: object) -> object:
    """An operation on the device of its first tensor."""
    device = first.device
    kernel = kernel_of(name, device)
    if kernel is not None:
        try:
            with on(device):
                return kernel(first, *others)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            give_up(name, device, error)
    return getattr(torch_ops, name)(first, *others)


# Shapes, for the meta device


def _int8_linear_shape(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, way: str) -> Tensor:
    return x.new_empty(len(x), len(weight))


def _norm_shape(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(hidden)


def _add_norm_shape(hidden: Tensor, addend: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(hidden)


def _rope_and_write_shape(qkv: Tensor, heads: int, key_heads: int, *others: object) -> Tensor:
    return qkv.new_empty(len(qkv), heads, qkv.shape[1] // (heads + 2 * key_heads))


def _paged_attention_shape(q: Tensor, *others: object) -> Tensor:
    return q.new_empty(len(q), q.shape[1] * q.shape[2])


def _silu_mul_shape(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)


_SHAPES: dict[str, Callable[..., object]] = {
    "int8_linear": _int8_linear_shape,
    "norm": _norm_shape,
    "add_norm": _add_norm_shape,
    "rope_and_write": _rope_and_write_shape,
    "paged_attention": _paged_attention_shape,
    "silu_mul": _silu_mul_shape,
}
for _name, _shape in _SHAPES.items():
    _function = _int8_linear if _name == "int8_linear" else partial(_computed, _name)
    _library.impl(_name, _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    _library.impl(_name, _shape, "Meta")  # type: ignore[no-untyped-call]
