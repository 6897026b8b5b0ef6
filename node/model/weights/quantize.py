"""Weights in 8 bits, or in 16 bits on CPUs without arithmetic for them: storage and products.

A matrix of a block is kept as int8 rows, each with a scale of its own, its largest value / 127 (row-wise
absmax, the weights of LLM.int8(), arXiv:2208.07339).  bitsandbytes keeps equal rows, so one checkpoint
serves a CPU and CUDA.  On a CPU activations are rounded to 16 bits a row, or not at all (see
node/model/weights/kernels.py); on CUDA bitsandbytes rounds them to int8, but for the columns with outliers.

bfloat16 rows without scales take half of float32's memory and reading time, with activations in float32.  A
CPU computes with bfloat16 in this way unless it has hardware for tiles of bfloat16.  Where it has AVX-512
BF16, rows of a prompt are rounded for the products (node/model/weights/panels/bfloat16_panels.py).

"nf4" is bitsandbytes' 4 bits a weight, in blocks of 64 (QLoRA, arXiv:2305.14314).

Norms, biases and the gates of experts are not quantised: they are small, and their errors are large.
Experts in one tensor with three dimensions (gpt_oss, llama4_text) are not quantised either, and loading
says so.  Experts with a matrix each are quantised, and become layers of their own.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from node.config import ConfigError
from node.model.checkpoint.info import SCALE_SUFFIX, is_matrix
from node.model.checkpoint.progress import Progress, silent
from node.model.cuda import measured, ops, torch_ops
from node.model.weights import experts as of_experts
from node.model.weights.panels.order import STRIPES, has_whole_stripes, rows_of, striped
from node.model.weights.plans import Plan, Way, choose_plan
from tensor_codec.span_spec import QUANTIZE

if TYPE_CHECKING:
    from node.model.parallel.shard import Shard

log = logging.getLogger("raceme")

CODES = 127  # the largest code: -128 is not used, so that a row and its negative have the same codes
PIECE_VALUES = 1 << 22  # weights that are quantised at a time: 16 MiB of float32
MEASURED_ROWS = (1, 16, 64, 256)
MEASURED_WEIGHTS = 1 << 20
LEAST_MEASURED = 1 << 16  # weights of a layer: of smaller ones the measurement shows the calls' own time
PREFERENCE = 1.15  # the compiled way keeps a row's bits in any batch: others must be so much faster
LLM_INT8_THRESHOLD = 6.0  # activations above it are multiplied in 16 bits, as in the paper


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [out, in] of floats -> int8 codes [out, in] and float32 scales [out].

    scale = the row's largest absolute value / 127; code = round(value / scale), ties to even.  A
    row of zeros has scale 0.  Works through the rows in pieces: the matrix may be mapped from a file.
    Raises ValueError for NaN and infinity.
    """
    outs, width = weight.shape
    codes = torch.empty(outs, width, dtype=torch.int8)
    scales = torch.empty(outs)
    step = max(1, PIECE_VALUES // max(width, 1))
    for first in range(0, outs, step):
        piece = weight[first : first + step].float()
        scale = piece.abs().amax(dim=1) / CODES
        if not torch.isfinite(scale).all():
            raise ValueError("NaN or infinity among the weights")
        divisor = torch.where(scale > 0, scale, 1.0)
        codes[first : first + step] = (piece / divisor[:, None]).round_().clamp_(-CODES, CODES)
        scales[first : first + step] = scale
    return codes, scales


def dequantize_rows(codes: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """int8 codes [..., out, in] * float32 scales [..., out] -> `dtype`; without scales a cast."""
    if scale is None:
        return codes.to(dtype)
    return (codes.to(scale.dtype) * scale[..., None]).to(dtype)


class PackedLinear(nn.Module):
    """A linear layer whose weights are kept in int8 rows with scales, or in bfloat16.

    weight: int8 or bfloat16 [out, in], or int8 codes in STRIPES.  scale: float32 [out], None for bfloat16.
    bias: [out] or None.  Takes x [..., in] of any float dtype and answers [..., out] in x's dtype.  Has a
    derivative with respect to x; the weights are frozen.

    A row of float32 has the same result alone and in any batch that goes the "compiled" way (see
    node/model/weights/kernels.py); torch's own products, for the other ways, do not promise it.
    On other devices than the CPU a product is one operation (node/model/cuda/ops.py).
    """

    weight: Tensor
    scale: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> None:
        super().__init__()
        if (scale is not None) != (weight.dtype in (torch.int8, STRIPES)) or weight.dtype not in _PACKED:
            raise ValueError(f"int8 rows have scales and bfloat16 rows have none, not {weight.dtype}")
        self.out_features, self.in_features = weight.shape
        self._is_here = True
        self.plan = _first_plan(self._is_here)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_buffer("weight", None)
        self.register_buffer("scale", None)
        self.keep(weight, scale)

    def keep(self, weight: Tensor, scale: Tensor | None) -> None:
        """Compute with these weights from now on; their shape and kind are unchanged."""
        # A tensor that is mapped from a file stays there, unless torch's own product could not take it.
        aligned = weight.data_ptr() % 16 == 0
        self.weight = weight.contiguous() if aligned else weight.clone()
        self.scale = None if scale is None else scale.float().contiguous()
        self._prepare()

    def _prepare(self) -> None:
        """Put the kernels' arguments into plain attributes: a module's own cost 2 us each."""
        self._rows: Any = None  # Any: `Rows` of a module that is imported only when it is used
        self._pack_scale: Tensor | None = None
        is_here = self.weight.device.type == "cpu"
        if self.weight.dtype == STRIPES and not is_here:
            self.weight = rows_of(self.weight)
        if is_here is not self._is_here:
            self._is_here, self.plan = is_here, _first_plan(is_here)
        found = kernels()
        if found is not None and self.weight.device.type == "cpu":
            bias = None if self.bias is None else self.bias.detach().float()
            self._rows = found.Rows(self.weight, self.scale, bias)

    def extra_repr(self) -> str:
        """The text of `print`."""
        return f"{self.in_features}, {self.out_features}, {self.weight.dtype}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in x's dtype."""
        if x.requires_grad and torch.is_grad_enabled():
            return cast(Tensor, _Product.apply(x, self))  # type: ignore[no-untyped-call]
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """`forward` without a derivative."""
        if not self._is_here:
            return self._there(x)
        if _IN_TRAINING.get() and self.scale is None and self._rounds():
            return self._rounded(x)
        return _WAYS[self.plan.way(x.numel() // self.in_features)](self, x)

    def back(self, gradient: Tensor) -> Tensor:
        """The derivative of `forward`: gradient [..., out] -> [..., in], in its dtype.

        On a CPU scales are applied to the gradient, and the codes are only cast.  A CPU with products of
        bfloat16 rounds the gradient to it, by at most 2^-9 of each value; int8 codes are exact in it.
        On a device the weights are written out, rounded: a gradient of float16 has no digits for scales.
        """
        if not self._is_here:
            return gradient @ self.dequantized(gradient.dtype)
        scaled = gradient if self.scale is None else gradient * self.scale
        dtype = torch.bfloat16 if self._rounds() else gradient.dtype
        return (scaled.to(dtype) @ self._codes().to(dtype)).to(gradient.dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weights [out, in] as `dtype`."""
        if self.scale is not None and not self._is_here:
            return torch_ops.dequantised(self.weight, self.scale, dtype)
        return dequantize_rows(self._codes(), self.scale, dtype)

    def _codes(self) -> Tensor:
        """The weights as rows."""
        return rows_of(self.weight) if self.weight.dtype == STRIPES else self.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """`.to(dtype)` leaves the weights as they are: their dtype is their storage."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            if new.dtype == tensor.dtype:
                return new
            return tensor.to(new.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        self._prepare()
        return self

    def _there(self, x: Tensor) -> Tensor:
        """`product` on a device."""
        if self.scale is None:
            return self._dequantise(x)
        rows = x.reshape(-1, self.in_features)
        way = cast(ops.Int8Way, self.plan.way(len(rows)))
        flat = ops.int8_linear(rows, self.weight, self.scale, self.bias, way)
        return flat.view(*x.shape[:-1], self.out_features)

    def _compiled(self, x: Tensor) -> Tensor:
        if self._rows is None:
            return self._dequantise(x)
        if x.dtype is torch.float32:
            return cast(Tensor, self._rows(x, torch.get_num_threads()))
        return cast(Tensor, self._rows(x.float(), torch.get_num_threads())).to(x.dtype)

    def _dequantise(self, x: Tensor) -> Tensor:
        bias: Tensor | None = self.bias
        if bias is not None and bias.dtype is not x.dtype:
            bias = bias.to(x.dtype)
        return functional.linear(x, self.dequantized(x.dtype), bias)

    def _rounds(self) -> bool:
        return self.weight.device.type == "cpu" and multiplies_bfloat16()

    def _rounded(self, x: Tensor) -> Tensor:
        """x and the answer rounded to bfloat16, as in a model of that dtype."""
        bias: Tensor | None = self.bias
        bias = None if bias is None else bias.to(torch.bfloat16)
        return functional.linear(x.to(torch.bfloat16), self.weight, bias).to(x.dtype)

    def _int8pack(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if rows.data_ptr() % 32 or not rows.is_contiguous():
            rows = rows.clone(memory_format=torch.contiguous_format)
        if not fits_int8pack(rows, self.weight):
            return self._dequantise(x)
        if self._pack_scale is None:
            assert self.scale is not None
            self._pack_scale = self.scale.to(torch.bfloat16)
        out = torch._weight_int8pack_mm(rows, self.weight, self._pack_scale)
        out = out if self.bias is None else out.add_(self.bias)
        return out.view(*x.shape[:-1], self.out_features)


def _first_plan(is_here: bool) -> Plan:
    """Until the ways have been timed.  is_here: on the CPU."""
    if not is_here:
        return Plan(((1, "auto"),))
    return Plan(((1, "compiled" if kernels() else "dequantise"),))


class _Product(torch.autograd.Function):
    """x @ weight.T with its derivative with respect to x: torch has none for weights of integers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: PackedLinear) -> Tensor:
        """Keeps the module and no activations: the derivative does not depend on x."""
        ctx.linear = linear
        answer = linear.product(x)
        # A block may write into the answer (falcon), which autograd forbids for a view made in here.
        return torch.ops.aten._unsafe_view(answer, answer.shape) if answer._is_view() else answer

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """grad [..., out] -> grad [..., in]."""
        (gradient,) = gradients
        return ctx.linear.back(gradient), None


_WAYS: dict[Way, Callable[[PackedLinear, Tensor], Tensor]] = {
    "compiled": PackedLinear._compiled,
    "int8pack": PackedLinear._int8pack,
    "dequantise": PackedLinear._dequantise,
}
_PACKED = (torch.int8, STRIPES, torch.bfloat16)


def fits_int8pack(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's own product of bfloat16 rows [rows, k] with int8 weights [out, k] may be called.

    It ends the process where x is not aligned to 32 bytes, the weights not to 16, or k is no multiple of 16.
    """
    return (
        x.dtype is torch.bfloat16
        and weight.dtype is torch.int8
        and x.is_contiguous()
        and weight.is_contiguous()
        and x.data_ptr() % 32 == 0
        and weight.data_ptr() % 16 == 0
        and weight.shape[1] % 16 == 0
    )


class SideBySide(nn.Module):
    """Layers with one input whose outputs stand side by side, where their weights cannot: bitsandbytes'."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., the outputs of all]."""
        return torch.cat([part(x) for part in self.parts], -1)


Join = Callable[[list[Tensor]], Tensor]  # a copy of tensors, one after the other


def merge_linears(parts: Sequence[nn.Module], join: Join = torch.cat) -> nn.Module | None:
    """One linear layer with the outputs of these layers side by side; None where it cannot be made.

    parts: of one kind (nn.Linear, PackedLinear, or bitsandbytes' on a device), for the same input.  They
    still work, on parts of the merged layer's memory, so nothing is kept twice.
    join: makes the merged weights.
    """
    kinds = {type(part) for part in parts}
    if all(_is_of_bitsandbytes(part) for part in parts):
        return SideBySide(parts)
    if len(kinds) != 1 or kinds.isdisjoint((nn.Linear, PackedLinear)):
        return None
    linears = cast("Sequence[nn.Linear | PackedLinear]", parts)
    weights = [linear.weight for linear in linears]
    if len({(weight.dtype, weight.device, weight.shape[1]) for weight in weights}) != 1:
        return None
    if any(weight.requires_grad for weight in weights):
        return None
    bias = _merged_bias(linears)
    weight = join([each.detach() for each in weights])
    merged: nn.Module
    if kinds == {PackedLinear}:
        packed = cast("Sequence[PackedLinear]", parts)
        scales = [each.scale for each in packed if each.scale is not None]
        merged = PackedLinear(weight, torch.cat(scales) if scales else None, bias)
        merged.plan = packed[0].plan
    else:
        merged = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        merged.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            merged.bias = nn.Parameter(bias, requires_grad=False)
    views = torch.split(weight, [each.shape[0] for each in weights])
    for part, view in zip(linears, views, strict=True):
        if isinstance(part, PackedLinear):
            part.keep(view, part.scale)
        else:
            part.weight = nn.Parameter(view, requires_grad=False)
    return merged.train(parts[0].training)


def matrices_of(block: nn.Module) -> list[Tensor]:
    """The matrices of a block's layers that lie in the CPU's memory."""
    weights = [getattr(layer, "weight", None) for layer in block.modules()]
    return [each for each in weights if isinstance(each, Tensor) and each.dim() == 2 and each.is_cpu]


def ordered(join: Join, weights: Sequence[Tensor]) -> Join:
    """`join` for `merge_linears` and `move_weights` of layers with these weights: in the kernels' own order.

    Of int8 weights on CPUs with instructions for bytes: all of a span, or none, so that they have one kind.
    """
    found = kernels()
    packed = [weight for weight in weights if weight.dtype == torch.int8]
    if found is not None and found.IN_STRIPES and has_whole_stripes(packed):
        return striped(join)
    return join


def move_weights(layer: nn.Module, join: Join) -> None:
    """Compute with a copy of a layer's weights from now on, where they lie in the CPU's memory.

    Layers of other kinds than `merge_linears` takes stay as they are.
    """
    if isinstance(layer, PackedLinear) and layer.weight.is_cpu:
        layer.keep(join([layer.weight]), layer.scale)
    elif type(layer) is nn.Linear and layer.weight.is_cpu and not layer.weight.requires_grad:
        layer.weight = nn.Parameter(join([layer.weight.detach()]), requires_grad=False)


def _is_of_bitsandbytes(layer: nn.Module) -> bool:
    """Whether bitsandbytes computes a layer on a device; on the CPU the library calls its layers."""
    weight = getattr(layer, "weight", None)
    known = type(layer).__module__.startswith("bitsandbytes.") and isinstance(weight, Tensor)
    return known and cast(Tensor, weight).device.type != "cpu"


def _merged_bias(linears: Sequence[nn.Linear | PackedLinear]) -> Tensor | None:
    """The biases side by side, zeros for a part without one, None where no part has one."""
    biases = [linear.bias for linear in linears]
    found = next((bias for bias in biases if bias is not None), None)
    if found is None:
        return None
    return torch.cat(
        [
            found.new_zeros(linear.weight.shape[0]) if bias is None else bias.detach()
            for linear, bias in zip(linears, biases, strict=True)
        ]
    )


@cache
def kernels() -> ModuleType | None:
    """node/model/weights/kernels.py; None, with a warning, where numba cannot be imported."""
    try:
        from node.model.weights import kernels
        from node.model.weights.panels import stripes
    except ImportError as error:
        log.warning("no kernels for packed weights, torch's own products are slower: %s", error)
        return None
    stripes.offer()
    return kernels


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16: of many rows they are the fastest.

    [512, 1536] @ [1536, 576] on one thread with AVX-512's: 1.9 ms, 8.3 ms in float32; without them they are
    slower than float32.  A rule and no measurement, so that servers of one kind give equal bits.
    """
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


_IN_TRAINING: ContextVar[bool] = ContextVar("_IN_TRAINING", default=False)


@contextmanager
def training_products() -> Iterator[None]:
    """For forwards without a session: weights in bfloat16 are multiplied in bfloat16 where that is fast.

    As a model of that dtype does everywhere.  Sessions keep activations in float32: their rows have the same
    bits alone and in any batch.
    """
    token = _IN_TRAINING.set(True)
    try:
        yield
    finally:
        _IN_TRAINING.reset(token)


def has_bfloat16() -> bool:
    """Whether spans compute in bfloat16 on this CPU.

    Without support in the CPU torch's products in it are very slow; with AVX-512's they are slower than
    our kernels with float32 rows.  AMX, which should be faster than both, was not measured.
    """
    supported = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return supported and (kernels() is None or bool(torch.cpu._is_amx_tile_supported()))


def ways_for(weight: torch.dtype, activations: torch.dtype) -> tuple[Way, ...]:
    """The ways that are worth a measurement for these weights and activations here."""
    ways: list[Way] = ["compiled"] if kernels() else []
    if weight == torch.int8 and activations == torch.bfloat16 and has_bfloat16():
        ways.append("int8pack")
    return (*ways, "dequantise")


_plans: dict[tuple[torch.dtype, torch.dtype, int, int], Plan] = {}


def measured_plan(linear: PackedLinear | nn.Linear, activations: torch.dtype) -> Plan:
    """The plan for layers of this kind, measured by each way on a part of the layer; about 0.1 s, once.

    The time of compilation does not count.  Small layers are not measured: nothing is gained there.
    linear: an nn.Linear has float32 weights; its way "dequantise" is torch's own product.
    """
    key = linear.weight.dtype, activations, linear.in_features, torch.get_num_threads()
    if key not in _plans:
        ways = ways_for(linear.weight.dtype, activations)
        outs = max(1, min(linear.out_features, MEASURED_WEIGHTS // linear.in_features))
        if len(ways) == 1 or outs * linear.in_features < LEAST_MEASURED:
            _plans[key] = Plan(((1, ways[0]),))
        else:
            part = _part(linear, outs)
            _plans[key] = choose_plan({way: _timed(part, way, activations) for way in ways}, PREFERENCE)
    return _plans[key]


def _part(linear: PackedLinear | nn.Linear, outs: int) -> PackedLinear | nn.Linear:
    """A layer with the first outputs of a layer, without bias."""
    if isinstance(linear, PackedLinear):
        return PackedLinear(linear.weight[:outs], None if linear.scale is None else linear.scale[:outs])
    part = nn.Linear(linear.in_features, outs, bias=False, device="meta")
    part.weight = nn.Parameter(linear.weight.detach()[:outs], requires_grad=False)
    return part


def plan_on_device(layers: Iterable[nn.Module], activations: torch.dtype) -> None:
    """Time the ways of int8 layers on a device, and keep the fastest for each shape; nothing on a CPU.

    layers: of a span, those that compute its steps.
    """
    alike: dict[tuple[int, ...], list[PackedLinear]] = {}
    for layer in layers:
        if isinstance(layer, PackedLinear) and layer.scale is not None and not layer._is_here:
            alike.setdefault(tuple(layer.weight.shape), []).append(layer)
    for same in alike.values():
        weights = [(layer.weight, cast(Tensor, layer.scale)) for layer in same]
        plan = measured.measured_plan(weights, activations)
        for layer in same:
            layer.plan = plan


def _timed(linear: PackedLinear | nn.Linear, way: Way, activations: torch.dtype) -> dict[int, float]:
    """Seconds of one way, the least of three, for each of MEASURED_ROWS."""
    seconds = {}
    run = _runner(linear, way)
    run(torch.zeros(1, linear.in_features, dtype=activations))  # compiles
    for rows in MEASURED_ROWS:
        x = torch.ones(rows, linear.in_features, dtype=activations)
        taken = []
        for _ in range(3):
            began = time.perf_counter()
            run(x)
            taken.append(time.perf_counter() - began)
        seconds[rows] = min(taken)
    return seconds


def _runner(linear: PackedLinear | nn.Linear, way: Way) -> Callable[[Tensor], Tensor]:
    """The product of a layer by one way."""
    if isinstance(linear, PackedLinear):
        return partial(_WAYS[way], linear)
    if way == "dequantise":
        return linear
    found = kernels()
    assert found is not None
    rows = found.Rows(linear.weight, None, None)
    return lambda x: cast(Tensor, rows(x, torch.get_num_threads()))


LLM_INT8 = "llm_int8"
Maker = Callable[["Matrix", "nn.Parameter | None"], nn.Module]
Kind = Literal["plain", "int8", "bfloat16", "llm_int8", "nf4"]


@dataclass(frozen=True, slots=True)
class Packing:
    """The storage of a span's matrices, and the dtype of everything else: activations, norms, caches.

    kind: "plain" as the library does; "int8" and "bfloat16" as PackedLinear; "llm_int8" and "nf4" as
    bitsandbytes does.
    """

    kind: Kind
    dtype: torch.dtype


def cache_dtype_for(chosen: str, packing: Packing, device: str, *, fused: bool) -> torch.dtype:
    """The dtype of keys and values in a cache, as in vLLM's --kv-cache-dtype.  Raises ConfigError.

    chosen: "auto", "bfloat16" or "float32".  device: "cpu", "cuda" or another type.  fused: whether
    attention may be our own compiled code, which reads both.
    "auto" is the dtype of activations, but bfloat16 where these are float32 and matrices have fewer bits:
    half the memory and half the reading.  A span of float32 matrices keeps a float32 cache, so that it
    gives the library's tokens.
    """
    if device != "cpu":
        name = str(packing.dtype).removeprefix("torch.")
        if chosen not in ("auto", name):
            raise ConfigError(f"a cache in {chosen} is for cpu; on {device} it is in {name}, as activations")
        return packing.dtype
    if chosen != "auto":
        return cast(torch.dtype, getattr(torch, chosen))
    smaller = packing.kind in ("int8", "bfloat16") and packing.dtype == torch.float32
    return torch.bfloat16 if smaller and fused else packing.dtype


def packing_for(quantize: str, dtype: torch.dtype, device: str, *, bfloat16: bool) -> Packing:
    """The packing for the operator's options on this device.  Raises ConfigError.

    device: "cpu", "cuda" or another type.  bfloat16: whether the CPU computes in it.
    "int8" is rows with scales and activations in `dtype`; LLM_INT8 is bitsandbytes' (arXiv:2208.07339).
    A CPU without fast bfloat16 arithmetic keeps the weights in bfloat16 and computes in float32.  No CPU
    has fast float16 arithmetic.
    """
    if quantize not in (*QUANTIZE, LLM_INT8):
        raise ConfigError(f"quantization {quantize!r} is not one of {', '.join(QUANTIZE)}")
    if quantize != "none" and device not in ("cpu", "cuda"):
        raise ConfigError(f"{quantize} works on cpu and cuda, not on {device}")
    if device != "cpu":
        return Packing("plain" if quantize == "none" else cast(Kind, quantize), dtype)
    if quantize == LLM_INT8:
        raise ConfigError(f"{quantize} works on cuda, not on {device}")
    if quantize == "none":
        rows = dtype == torch.bfloat16 and not bfloat16
        return Packing("bfloat16", torch.float32) if rows else Packing("plain", dtype)
    computes = dtype if dtype == torch.bfloat16 and bfloat16 else torch.float32
    return Packing("int8" if quantize == "int8" else "nf4", computes)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix on its way into a layer: [out, in], int8 with scales float32 [out], or floats without."""

    weight: Tensor
    scale: Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return tuple(self.weight.shape)


@dataclass(frozen=True, slots=True)
class Experts:
    """The matrices of a block's experts by the expert's number, as in checkpoints of most families."""

    gate: dict[int, Matrix]
    up: dict[int, Matrix]
    down: dict[int, Matrix]

    @property
    def shape(self) -> tuple[int, ...]:
        """(experts, 2 * width of one, in), as the library keeps gate and up; () where one is missing."""
        count = len(self.down)
        if not all(sorted(part) == list(range(count)) for part in (self.gate, self.up, self.down)):
            return ()
        shapes = {(self.gate[each].shape, self.up[each].shape, self.down[each].shape) for each in self.down}
        if len(shapes) != 1:
            return ()
        ((gate, up, down),) = shapes
        return (count, 2 * gate[0], gate[1]) if gate == up == (down[1], down[0]) else ()


# Mixtral's checkpoints name the parts w1, w3 and w2, and their module differs from the library's.
_EXPERT = re.compile(
    r"(?P<owner>.*\.experts)\.(?P<expert>\d+)\.(?P<part>w1|w2|w3|gate_proj|up_proj|down_proj)"
)
_RENAMED = ("block_sparse_moe", "mlp")


def take_matrices(
    tensors: dict[str, Tensor],
    kind: Kind,
    *,
    transposed: bool,
    what: str,
    progress: Progress = silent,
    shard: Shard | None = None,
) -> dict[str, Matrix | Experts]:
    """Take the matrices out of a span's tensors, packed; path of the layer in the model -> matrix.

    tensors: by name in the model; int8 ones come with their scales.  Each is removed as it is taken, so at
    most one original matrix is in memory at a time.
    transposed: floats are kept as [in, out] (gpt2).  what: for errors and the progress.
    shard: the rows and columns to keep.  Raises ConfigError.
    """
    names = [name for name, tensor in tensors.items() if is_matrix(name, tuple(tensor.shape))]
    total = sum(tensors[name].nbytes for name in names)
    taken, done = {}, 0
    for name in names:
        weight = tensors.pop(name)
        scale = tensors.pop(name + SCALE_SUFFIX, None)
        done += weight.nbytes
        if shard is not None:
            weight = shard.rows(name, weight).clone()  # or the whole matrix stays in memory
            scale = None if scale is None else shard.rows(name, scale).clone()
        if weight.dtype == torch.int8:
            if scale is None or scale.dtype != torch.float32 or scale.shape != weight.shape[:1]:
                raise ConfigError(f"{what}: the int8 tensor {name} has no {weight.shape[0]} float32 scales")
            if kind not in ("int8", "llm_int8"):
                raise ConfigError(f"{what}: {name} is kept in int8, which cannot be made {kind}")
        else:
            weight = weight.t() if transposed else weight
            if kind in ("int8", "llm_int8"):
                weight, scale = _quantised(weight, f"{what}: {name}")
            elif kind == "bfloat16":
                weight = weight.to(torch.bfloat16)
        if shard is not None:
            weight = shard.columns(name, weight)
        taken[name.removesuffix(".weight")] = Matrix(weight, scale)
        if kind not in ("bfloat16", "plain"):
            progress(f"quantising {what}", done, total)
    return _with_experts(taken)


def _with_experts(matrices: Mapping[str, Matrix]) -> dict[str, Matrix | Experts]:
    """The matrices of single experts put together, under the path of the module that holds them all."""
    result: dict[str, Matrix | Experts] = {}
    for path, matrix in matrices.items():
        found = _EXPERT.fullmatch(path)
        if found is None:
            result[path] = matrix
            continue
        owner = found["owner"].replace(*_RENAMED)
        experts = result.setdefault(owner, Experts({}, {}, {}))
        assert isinstance(experts, Experts)
        part = {"w1": experts.gate, "gate_proj": experts.gate, "w3": experts.up, "up_proj": experts.up}
        part.get(found["part"], experts.down)[int(found["expert"])] = matrix
    return result


def _quantised(weight: Tensor, what: str) -> tuple[Tensor, Tensor]:
    try:
        return quantize_rows(weight)
    except ValueError as error:
        raise ConfigError(f"{what}: {error}") from None


class Awaiting(nn.Module):
    """Takes a layer's place while the library loads the other tensors: its bias."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer_name = type(layer).__name__
        self.bias = cast("nn.Parameter | None", getattr(layer, "bias", None))
        self.activation = getattr(layer, "act_fn", None)
        self.shape = _shape(layer)
        self.weight = torch.empty(0)  # the library would initialise it


def _shape(layer: nn.Module) -> tuple[int, ...]:
    """[out, in] of a linear layer, [experts, out, in] of the first matrix of experts.

    transformers' Conv1D, gpt2's linear layer, keeps its weights as [in, out].
    """
    if isinstance(layer, nn.Linear):
        return tuple(layer.weight.shape)
    if isinstance(found := getattr(layer, "gate_up_proj", None), Tensor):
        return tuple(found.shape)
    return tuple(reversed(cast(Tensor, layer.weight).shape))


def await_matrices(model: nn.Module, matrices: Mapping[str, Matrix | Experts]) -> None:
    """Put an Awaiting in place of each layer that has a matrix.  A path without a layer is left alone."""
    layers = dict(model.named_modules())
    for path in matrices:
        if (layer := layers.get(path)) is not None:
            _replace(model, path, Awaiting(layer))


def misplaced(
    model: nn.Module, matrices: Mapping[str, Matrix | Experts]
) -> tuple[list[str], list[tuple[str, tuple[int, ...], tuple[int, ...]]]]:
    """Names of matrices that no layer awaits, and (name, shape, shape awaited) of misfits."""
    awaiting = {path: each for path, each in model.named_modules() if isinstance(each, Awaiting)}
    homeless = [f"{path}.weight" for path in matrices if path not in awaiting]
    wrong = [
        (f"{path}.weight", matrices[path].shape, layer.shape)
        for path, layer in awaiting.items()
        if matrices[path].shape != layer.shape
    ]
    return homeless, wrong


def fill(
    model: nn.Module, matrices: dict[str, Matrix | Experts], packing: Packing, device: torch.device
) -> None:
    """Replace each Awaiting by a layer with its matrix; `matrices` is emptied on the way.

    Raises ConfigError for a matrix that cannot be multiplied in this packing.
    """
    make = partial(_MAKERS[packing.kind], dtype=packing.dtype, device=device) if matrices else None
    for path in list(matrices):
        matrix = matrices.pop(path)
        awaiting = cast(Awaiting, model.get_submodule(path))
        assert make is not None
        try:
            if isinstance(matrix, Experts):
                layer: nn.Module = PackedExperts(matrix, cast(Any, awaiting.activation), make)
            else:
                layer = make(matrix, awaiting.bias)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        _replace(model, path, layer.eval())
    packed = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    if packed and device.type == "cpu":
        plan = measured_plan(max(packed, key=lambda layer: layer.weight.numel()), packing.dtype)
        for layer in packed:
            layer.plan = plan
    together = [
        each.nbytes for name, each in model.named_parameters() if each.dim() == 3 and ".experts." in name
    ]
    if packing.kind != "plain" and together:
        log.warning(
            "the experts stay in %s, %.0f MiB: this model keeps all of a block in one tensor",
            str(packing.dtype).removeprefix("torch."), sum(together) / 2**20,
        )  # fmt: skip


class PackedExperts(nn.Module):
    """The experts of a block as layers of their own: only chosen experts are computed.

    Replaces the library's module with all experts in one tensor: neither we nor bitsandbytes can quantise
    that tensor.
    """

    def __init__(self, experts: Experts, activation: Callable[[Tensor], Tensor], make: Maker) -> None:
        super().__init__()
        numbers = range(len(experts.down))
        self.gate_up = nn.ModuleList(
            make(_joined(experts.gate.pop(each), experts.up.pop(each)), None) for each in numbers
        )
        self.down = nn.ModuleList(make(experts.down.pop(each), None) for each in numbers)
        self.activation = activation
        self._stacked: tuple[of_experts.Stacked, of_experts.Stacked] | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden].  The others: experts and weights of tokens, [tokens, k]."""
        if not hidden_states.is_cpu:
            return self.on_device(hidden_states, top_k_index, top_k_weights)
        result = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            if expert >= len(self.down):  # the library's number for "none"
                continue
            token, place = torch.where(top_k_index == expert)
            gate, up = self.gate_up[expert](hidden_states[token]).chunk(2, dim=-1)
            answer = self.down[expert](self.activation(gate) * up)
            answer = answer * top_k_weights[token, place, None]
            result = result.index_add(0, token, answer.to(result.dtype))
        return result

    def on_device(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """`forward` where the host should not read which experts are chosen."""
        stacked = None if x.requires_grad and torch.is_grad_enabled() else self._in_one_tensor(x.device)
        if stacked is not None:
            values = sum(math.prod(each.weight.shape[1:]) for each in stacked)
            if experts.numel() * values <= of_experts.GATHERED_VALUES:
                return of_experts.chosen(x, experts, weights, *stacked, self.activation)
        layers = [*self.gate_up], [*self.down]
        return of_experts.sorted_by_expert(x, experts, weights, *layers, self.activation)

    def _in_one_tensor(self, device: torch.device) -> tuple[of_experts.Stacked, of_experts.Stacked] | None:
        """The matrices of all experts, whose layers share their memory; None where they are no int8 rows."""
        if self._stacked is None or self._stacked[0].weight.device != device:
            both = _stacked(self.gate_up), _stacked(self.down)
            if both[0] is None or both[1] is None:
                return None
            self._stacked = both[0], both[1]
        return self._stacked


def _stacked(layers: nn.ModuleList) -> of_experts.Stacked | None:
    packed = [layer for layer in layers if isinstance(layer, PackedLinear) and layer.scale is not None]
    if len(packed) < len(layers):
        return None
    weight = torch.stack([layer.weight for layer in packed])
    scale = torch.stack([cast(Tensor, layer.scale) for layer in packed])
    for layer, own, own_scale in zip(packed, weight, scale, strict=True):
        layer.keep(own, own_scale)
    return of_experts.Stacked(weight, scale)


def _joined(gate: Matrix, up: Matrix) -> Matrix:
    """Two matrices with their rows below each other."""
    scale = None
    if gate.scale is not None and up.scale is not None:
        scale = torch.cat([gate.scale, up.scale])
    return Matrix(torch.cat([gate.weight, up.weight]), scale)


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


def _packed_linear(
    matrix: Matrix, bias: nn.Parameter | None, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    scale = None if matrix.scale is None else matrix.scale.to(device)
    return PackedLinear(matrix.weight.to(device), scale, bias)


def _llm_int8_linear(
    matrix: Matrix, bias: nn.Parameter | None, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """bitsandbytes' layer out of codes and scales: its own way would quantise again, from float16."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    assert matrix.scale is not None
    outs, width = matrix.weight.shape
    check_sums(matrix, bias)
    layer = Linear8bitLt(
        width, outs, bias=False, has_fp16_weights=False, threshold=LLM_INT8_THRESHOLD, device="meta"
    )
    codes = matrix.weight.to(device)
    largest = (matrix.scale * CODES).to(device)
    layer.weight = Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=largest)
    layer.bias = bias
    return cast(nn.Module, layer)


def check_sums(matrix: Matrix, bias: Tensor | None) -> None:
    """Raise ConfigError for int8 weights whose sums bitsandbytes could not keep.

    It keeps the sums of activations below the threshold in float16, and what is above is multiplied and
    added in the activations' dtype.  The largest sum is that of activations at the threshold with the
    weights' signs.
    """
    assert matrix.scale is not None
    step = max(1, PIECE_VALUES // matrix.weight.shape[1])
    sums = torch.cat([piece.short().abs().sum(1) for piece in torch.split(matrix.weight, step)])
    largest = LLM_INT8_THRESHOLD * float((sums * matrix.scale.abs()).amax())
    largest += 0.0 if bias is None else float(bias.detach().abs().amax())
    if not largest <= torch.finfo(torch.float16).max:
        raise ConfigError(
            f"a sum of {LLM_INT8} may be {largest:.0f} here, and bitsandbytes keeps sums in float16, 65504"
            " at most; --quantize int8 keeps them in float32"
        )


def _nf4_linear(
    matrix: Matrix, bias: nn.Parameter | None, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    outs, width = matrix.weight.shape
    layer = Linear4bit(width, outs, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    # On CPUs with AVX-512 and bfloat16 it would repack the weights at the first step, for a kernel that is
    # a download of its own; shapes that do not fit end in an assertion, and scales lose half of their bits.
    layer.support_avx512bf16_for_cpu = False
    weight = matrix.weight.to(device).to(dtype).contiguous()
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer).to(device)
    layer.bias = bias
    return cast(nn.Module, layer)


_MAKERS: dict[Kind, Callable[..., nn.Module]] = {
    "int8": _packed_linear,
    "bfloat16": _packed_linear,
    "llm_int8": _llm_int8_linear,
    "nf4": _nf4_linear,
}
