"""Products of float32 rows with a matrix of 8, 16 or 32 bit numbers, compiled for this CPU by numba.

A decode step reads every weight once and does little with it, so its time is that of the memory:
int8 weights take a quarter of float32's.  torch has no product of float32 rows with int8 weights
that is fast (`_weight_int8pack_mm` needs bfloat16 activations and hardware for them), hence these.

The work is cut into tiles of a few rows by a few outputs, the sums of one tile in registers.  Each
weight that is read is converted once for all rows of its tile.  The loops of a tile are written in
LLVM's own language, because a compiler that vectorises a sum by itself chooses another order for
every shape of tile.  Here each sum has one order, whatever the tile:

    eight partial sums, one for each k modulo 8, of the first K - K % 8 products, in ascending k;
    the eight added in pairs (i and i + 4, then i and i + 2, then the last two);
    then the remaining products in ascending k; then times the scale; then plus the bias.

So a row's result has the same bits alone, in a batch of any size and with any number of threads.

Rows of the matrix lie one behind the other, and a tile of four outputs reads four places at once,
which hardware prefetchers do not follow.  The tile asks for the memory in its own order instead, some
KiB ahead: for one row and 106 million weights that made 7 ms of 19.

Importing this module imports numba.  A kernel is compiled when it is first wanted (two to four
seconds), and kept in `__pycache__` or numba's own folder where one of them can be written.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.core.errors import NumbaError
from numba.extending import intrinsic
from torch import Tensor

LANES = 8  # float32 in a vector of AVX2; other widths are made of or cut from it
UNROLLED = 4  # vectors in one turn of the loop; more only takes longer to compile
AHEAD_BYTES = 4096  # how far ahead of its reading a tile asks for memory
PANEL_BYTES = 96 * 1024  # of weights that are used for all rows before the next: a part of the L2 cache
SLICE_WORK = 1 << 23  # products in the smallest slice that is worth handing to a thread, which takes 0.2 ms

_F32 = ir.FloatType()
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_VECTOR = ir.VectorType(_F32, LANES)


class _Tile:
    """Writes the code of one tile: `rows` rows of x times `outs` rows of the matrix.

    item: LLVM's type of a weight: i8, i16 for the upper half of a float32, or i32 for all of it.
    """

    def __init__(self, builder: Any, rows: int, outs: int, item: ir.IntType) -> None:
        self.build = builder
        self.rows, self.outs, self.item = rows, outs, item
        self.item_bytes = item.width // 8
        module = builder.module
        self.fma = {
            kind: cgutils.get_or_insert_function(module, ir.FunctionType(kind, [kind] * 3), name)
            for kind, name in ((_VECTOR, f"llvm.fmuladd.v{LANES}f32"), (_F32, "llvm.fmuladd.f32"))
        }
        self.prefetch = cgutils.get_or_insert_function(
            module,
            ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32]),
            "llvm.prefetch.p0i8",
        )

    def write(self, x: Any, w: Any, scale: Any, bias: Any, out: Any, stride: Any, k: Any) -> None:
        """All of it.  x, w, scale, bias, out: addresses as i64, scale and bias 0 for none.

        stride: numbers in a row of out.  k: numbers in a row of x and in a row of w.
        """
        build = self.build
        self.x, self.w, self.k = x, w, k
        zero = ir.Constant(_VECTOR, [0.0] * LANES)
        sums: list[Any] = [zero] * (self.rows * self.outs)
        turn = LANES * UNROLLED
        start: Any = _I64(0)
        for vectors in (UNROLLED, 1):
            step = LANES * vectors
            stop = build.sub(k, build.srem(k, _I64(step)))
            sums = self._loop(sums, start, stop, step, ahead=step == turn)
            start = stop
        singles = self._loop(self._added(sums), start, k, 1, ahead=False)
        self._finish(singles, scale, bias, out, stride)

    def _loop(self, sums: list[Any], start: Any, stop: Any, step: int, *, ahead: bool) -> list[Any]:
        """Go on with `sums` for k in [start, stop), `step` at a time."""
        build = self.build
        before = build.block
        head, body, after = (build.append_basic_block(name) for name in ("head", "body", "after"))
        build.branch(head)
        build.position_at_end(head)
        k = build.phi(_I64)
        k.add_incoming(start, before)
        phis = [build.phi(each.type) for each in sums]
        for phi, each in zip(phis, sums, strict=True):
            phi.add_incoming(each, before)
        build.cbranch(build.icmp_signed("<", k, stop), body, after)
        build.position_at_end(body)
        if ahead:
            self._ask_ahead(k, step)
        now: list[Any] = list(phis)
        width = LANES if step >= LANES else 1
        for offset in range(0, step, width):
            self._products(now, build.add(k, _I64(offset)), width)
        for phi, each in zip(phis, now, strict=True):
            phi.add_incoming(each, body)
        k.add_incoming(build.add(k, _I64(step)), body)
        build.branch(head)
        build.position_at_end(after)
        return list(phis)

    def _products(self, sums: list[Any], k: Any, width: int) -> None:
        """Add x[row, k] * w[out, k] to the sum of each pair, for `width` numbers at k."""
        number = _VECTOR if width > 1 else _F32
        item = ir.VectorType(self.item, width) if width > 1 else self.item
        weights = [self._converted(self._load(self.w, out, k, item), width) for out in range(self.outs)]
        for row in range(self.rows):
            x = self._load(self.x, row, k, number)
            for out, weight in enumerate(weights):
                pair = row * self.outs + out
                sums[pair] = self.build.call(self.fma[number], [x, weight, sums[pair]])

    def _load(self, base: Any, row: int, k: Any, kind: Any) -> Any:
        number = kind.element if isinstance(kind, ir.VectorType) else kind
        size = self.item_bytes if number is self.item else 4
        index = self.build.add(self.build.mul(_I64(row), self.k), k)
        address = self.build.add(base, self.build.mul(index, _I64(size)))
        # Tensors that are mapped from a file may begin anywhere.
        return self.build.load(self.build.inttoptr(address, kind.as_pointer()), align=1)

    def _converted(self, weights: Any, width: int) -> Any:
        """Weights as float32, exactly."""
        if self.item is _I32:
            return self.build.bitcast(weights, _VECTOR if width > 1 else _F32)
        wide = ir.VectorType(_I32, width) if width > 1 else _I32
        number = _VECTOR if width > 1 else _F32
        if self.item is _I8:
            return self.build.sitofp(self.build.sext(weights, wide), number)
        sixteen = ir.Constant(wide, [16] * width) if width > 1 else _I32(16)
        return self.build.bitcast(self.build.shl(self.build.zext(weights, wide), sixteen), number)

    def _ask_ahead(self, k: Any, step: int) -> None:
        """Ask for as many bytes as a turn of the loop reads.

        The rows of a tile lie one behind the other, so this walks through them, the next tile's
        and so on, in the order of the memory.
        """
        build = self.build
        begin = build.add(self.w, build.mul(k, _I64(self.outs * self.item_bytes)))
        for offset in range(0, step * self.outs * self.item_bytes, 64):
            address = build.add(begin, _I64(AHEAD_BYTES + offset))
            pointer = build.inttoptr(address, _I8.as_pointer())
            build.call(self.prefetch, [pointer, _I32(0), _I32(3), _I32(1)])  # to read, keep it, data

    def _added(self, sums: list[Any]) -> list[Any]:
        """The sum of each vector, as numbers.

        Two vectors are joined before each addition, so that it works for both; which lanes are added
        to which does not depend on that.
        """
        blocks = LANES  # lanes of a vector that belong to one sum
        vectors = list(sums)
        while blocks > 1:
            half = blocks // 2
            joined = []
            for first in range(0, len(vectors), 2):
                one, two = vectors[first], vectors[min(first + 1, len(vectors) - 1)]
                low = [lane for lane in range(2 * LANES) if lane % blocks < half]
                high = [lane + half for lane in low]
                joined.append(
                    self.build.fadd(*(self.build.shuffle_vector(one, two, _mask(m)) for m in (low, high)))
                )
            vectors, blocks = joined, half
        return [
            self.build.extract_element(vectors[pair // LANES], _I32(pair % LANES))
            for pair in range(len(sums))
        ]

    def _finish(self, sums: list[Any], scale: Any, bias: Any, out: Any, stride: Any) -> None:
        """out[row, out] = sum * scale[out] + bias[out]."""
        for address, combine in ((scale, self.build.fmul), (bias, self.build.fadd)):
            sums = self._with(sums, address, combine)
        for pair, value in enumerate(sums):
            row, column = divmod(pair, self.outs)
            index = self.build.add(self.build.mul(_I64(row), stride), _I64(column))
            self.build.store(value, self._float_at(out, index), align=1)

    def _with(self, sums: list[Any], address: Any, combine: Callable[[Any, Any], Any]) -> list[Any]:
        """The sums combined with a number of each output, unless `address` is 0."""
        build = self.build
        before = build.block
        there, after = build.append_basic_block("there"), build.append_basic_block("after")
        build.cbranch(build.icmp_signed("==", address, _I64(0)), after, there)
        build.position_at_end(there)
        numbers = [build.load(self._float_at(address, _I64(out)), align=1) for out in range(self.outs)]
        combined = [combine(each, numbers[pair % self.outs]) for pair, each in enumerate(sums)]
        build.branch(after)
        build.position_at_end(after)
        phis = []
        for each, other in zip(sums, combined, strict=True):
            phi = build.phi(_F32)
            phi.add_incoming(each, before)
            phi.add_incoming(other, there)
            phis.append(phi)
        return phis

    def _float_at(self, base: Any, index: Any) -> Any:
        address = self.build.add(base, self.build.mul(index, _I64(4)))
        return self.build.inttoptr(address, _F32.as_pointer())


def _mask(lanes: Sequence[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes))


def _tile(rows: int, outs: int) -> Any:
    """A function for compiled code: computes one tile.  item: tells by its type what weights are."""

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        context: Any, item: Any, x: Any, w: Any, scale: Any, bias: Any, out: Any, stride: Any, k: Any
    ) -> Any:
        def write(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
            kind = {types.int8: _I8, types.int16: _I16, types.int32: _I32}[signature.args[0]]
            _Tile(builder, rows, outs, kind).write(*arguments[1:])
            return context.get_dummy_value()

        return types.void(item, *[types.int64] * 7), write

    return tile


# As many sums as fit into 16 registers beside the weights and x; a sum waits four cycles for its last
# addition, so fewer than eight leave the CPU idle.  Measured best of their rows.
_tile_1x4, _tile_2x4, _tile_3x3, _tile_4x3, _tile_5x2, _tile_6x2 = (
    _tile(rows, outs) for rows, outs in ((1, 4), (2, 4), (3, 3), (4, 3), (5, 2), (6, 2))
)
_tile_1x1 = _tile(1, 1)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _rows(
    item: Any, size: int, x: int, w: int, scale: int, bias: int, out: int, m: int, n: int, k: int, stride: int
) -> None:
    """out [m, n] (rows `stride` numbers apart) = x [m, k] @ w [n, k].T * scale [n] + bias [n].

    item: a number of the weights' type; size: its bytes.  The others: addresses and lengths.
    """
    scaled = 4 if scale else 0
    biased = 4 if bias else 0
    panel = max(PANEL_BYTES // max(k * size, 1) // 12, 1) * 12
    for first in range(0, n, panel):
        last = min(first + panel, n)
        row = 0
        while row < m:
            left = m - row
            # Rows by sixes; what is left over by the pair of tiles that costs least.
            rows = 4 if left in (7, 8) else min(left, 6)
            outs = 4 if rows < 3 else 3 if rows < 5 else 2
            if last - first < outs:
                rows = outs = 1
            column = first
            while column < last:
                # The last tile is moved back over outputs that are there already: the same bits again.
                at = min(column, last - outs)
                x_at, w_at = x + row * k * 4, w + at * k * size
                scale_at, bias_at = scale + at * scaled, bias + at * biased
                out_at = out + (row * stride + at) * 4
                if outs == 1:
                    _tile_1x1(item, x_at, w_at, scale_at, bias_at, out_at, stride, k)
                elif rows == 1:
                    _tile_1x4(item, x_at, w_at, scale_at, bias_at, out_at, stride, k)
                elif rows == 2:
                    _tile_2x4(item, x_at, w_at, scale_at, bias_at, out_at, stride, k)
                elif rows == 3:
                    _tile_3x3(item, x_at, w_at, scale_at, bias_at, out_at, stride, k)
                elif rows == 4:
                    _tile_4x3(item, x_at, w_at, scale_at, bias_at, out_at, stride, k)
                elif rows == 5:
                    _tile_5x2(item, x_at, w_at, scale_at, bias_at, out_at, stride, k)
                else:
                    _tile_6x2(item, x_at, w_at, scale_at, bias_at, out_at, stride, k)
                column += outs
            row += rows


def _int8(
    x: int, w: int, scale: int, bias: int, out: int, m: int, n: int, k: int, stride: int, slices: int
) -> None:
    _rows(numba.int8(0), 1, x, w, scale, bias, out, m, n, k, stride)


def _bfloat16(
    x: int, w: int, scale: int, bias: int, out: int, m: int, n: int, k: int, stride: int, slices: int
) -> None:
    _rows(numba.int16(0), 2, x, w, scale, bias, out, m, n, k, stride)


def _float32(
    x: int, w: int, scale: int, bias: int, out: int, m: int, n: int, k: int, stride: int, slices: int
) -> None:
    _rows(numba.int32(0), 4, x, w, scale, bias, out, m, n, k, stride)


def _int8_in_slices(
    x: int, w: int, scale: int, bias: int, out: int, m: int, n: int, k: int, stride: int, slices: int
) -> None:
    for part in prange(slices):
        first, last = part * n // slices, (part + 1) * n // slices
        scale_at = scale + first * 4 if scale else 0
        bias_at = bias + first * 4 if bias else 0
        _rows(
            numba.int8(0), 1, x, w + first * k, scale_at, bias_at, out + first * 4, m, last - first, k, stride
        )


def _bfloat16_in_slices(
    x: int, w: int, scale: int, bias: int, out: int, m: int, n: int, k: int, stride: int, slices: int
) -> None:
    for part in prange(slices):
        first, last = part * n // slices, (part + 1) * n // slices
        scale_at = scale + first * 4 if scale else 0
        bias_at = bias + first * 4 if bias else 0
        _rows(
            numba.int16(0), 2, x, w + first * k * 2, scale_at, bias_at, out + first * 4, m, last - first, k,
            stride,
        )  # fmt: skip


def _float32_in_slices(
    x: int, w: int, scale: int, bias: int, out: int, m: int, n: int, k: int, stride: int, slices: int
) -> None:
    for part in prange(slices):
        first, last = part * n // slices, (part + 1) * n // slices
        scale_at = scale + first * 4 if scale else 0
        bias_at = bias + first * 4 if bias else 0
        _rows(
            numba.int32(0), 4, x, w + first * k * 4, scale_at, bias_at, out + first * 4, m, last - first, k,
            stride,
        )  # fmt: skip


Kernel = Callable[..., None]  # ten numbers, as `_int8` takes them

_WHOLE = {torch.int8: _int8, torch.bfloat16: _bfloat16, torch.float32: _float32}
_IN_SLICES = {
    torch.int8: _int8_in_slices,
    torch.bfloat16: _bfloat16_in_slices,
    torch.float32: _float32_in_slices,
}

_kernels: dict[tuple[torch.dtype, bool], Kernel] = {}
_compiling = threading.Lock()
_in_threads = threading.Lock()


def kernel_for(dtype: torch.dtype, *, parallel: bool = False) -> Kernel:
    """The kernel for weights of this dtype, compiled or read from the cache on the first call."""
    kernel = _kernels.get((dtype, parallel))
    if kernel is None:
        with _compiling:
            kernel = _kernels.get((dtype, parallel))
            if kernel is None:
                kernel = _compiled((_IN_SLICES if parallel else _WHOLE)[dtype], parallel=parallel)
                _kernels[dtype, parallel] = kernel
    return kernel


class Rows:
    """A matrix that rows are multiplied with: x [..., k] -> x @ weight.T * scale + bias [..., outs].

    weight: int8, bfloat16 or float32 [outs, k].  scale, bias: float32 [outs] or None.  All on the CPU, of any
    length and alignment.  A row's result has the same bits whatever the other rows and the threads
    are (see above).  Raises ValueError for other shapes, dtypes and devices: the kernels read what
    they are given as what it should be.
    """

    __slots__ = ("bias", "k", "outs", "scale", "weight")

    def __init__(self, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
        self.outs, self.k = weight.shape
        sound = weight.dtype in _WHOLE and weight.is_contiguous() and weight.is_cpu
        for each in (scale, bias):
            sound = sound and (each is None or _are_numbers(each, self.outs))
        if not sound:
            found = ", ".join(_described(each) for each in (weight, scale, bias) if each is not None)
            raise ValueError(
                f"contiguous int8, bfloat16 or float32 rows with float32 scales are allowed, not {found}"
            )
        self.weight, self.scale, self.bias = weight, scale, bias
        kernel_for(weight.dtype)

    def __call__(self, x: Tensor, threads: int = 1) -> Tensor:
        """x: float32 [..., k].  threads: at most so many are used, where there is enough to do."""
        # This runs for every matrix of every token: it does what it must, and little else.
        shape = x.shape
        if x.dtype is not torch.float32 or shape[-1] != self.k or not x.is_cpu:
            raise ValueError(f"float32 [..., {self.k}] on the CPU is multiplied, not {_described(x)}")
        if not x.is_contiguous():
            x = x.contiguous()
        outs, k, weight, scale, bias = self.outs, self.k, self.weight, self.scale, self.bias
        out = torch.empty((*shape[:-1], outs))
        rows = x.numel() // k if k else 0
        arguments = (
            x.data_ptr(),
            weight.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            rows,
            outs,
            k,
            outs,
        )
        if threads > 1:
            slices = slices_for(rows * outs * k, outs, threads)
            if slices > 1 and _run_in_slices(weight.dtype, arguments, slices):
                return out
        _kernels[weight.dtype, False](*arguments, 1)
        return out


def _are_numbers(tensor: Tensor, outs: int) -> bool:
    return (
        tensor.dtype is torch.float32 and tensor.shape == (outs,) and tensor.is_contiguous() and tensor.is_cpu
    )


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


def slices_for(products: int, outs: int, threads: int) -> int:
    """Into how many parts a product is cut: no part so small that handing it over costs more."""
    return max(1, min(threads, products // SLICE_WORK, outs // 64))


def _run_in_slices(dtype: torch.dtype, arguments: tuple[int, ...], slices: int) -> bool:
    """Compute with several threads; False if another thread is doing that now.

    numba's own threads end the process when two callers come at once.  Its other ways to make
    threads bring a second OpenMP beside torch's, or need libraries that are not there.
    """
    if not _in_threads.acquire(blocking=False):
        return False
    try:
        if (dtype, True) not in _kernels:
            numba.config.THREADING_LAYER = "workqueue"
        kernel = kernel_for(dtype, parallel=True)
        numba.set_num_threads(min(slices, numba.config.NUMBA_NUM_THREADS))
        kernel(*arguments, slices)
    finally:
        _in_threads.release()
    return True


def _compiled(function: Callable[..., None], *, parallel: bool) -> Kernel:
    """The function as machine code, from the cache if it is there and can be used."""
    signature = types.void(*[types.int64] * 10)
    try:
        kernel = njit(signature, nogil=True, parallel=parallel, cache=True)(function)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, NumbaError):
        # No folder that can be written, a full disk, a file that somebody cut short.
        kernel = njit(signature, nogil=True, parallel=parallel)(function)
    return kernel  # type: ignore[no-any-return]
