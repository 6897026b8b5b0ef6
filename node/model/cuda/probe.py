"""Every kernel once in a small size, next to torch's own operation: a first use that can fail without harm.

Sizes are such that sums are split into parts and put together, the ways that a compiler may get wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from node.devices import is_out_of_memory
from node.model.cuda import attention, elementwise, product, torch_ops
from node.model.cuda.launches import Kernel, reason_of

TOLERANCE = 3e-2  # of the largest number: a few roundings of bfloat16, 2^-9 each

KERNELS: Mapping[str, Kernel] = {
    "int8_linear": product.int8_linear,
    "norm": elementwise.norm,
    "add_norm": elementwise.add_norm,
    "rope_and_write": elementwise.rope_and_write,
    "paged_attention": attention.paged_attention,
    "silu_mul": elementwise.silu_mul,
}


def wrong_on(device: torch.device) -> dict[str, str]:
    """The kernels that are not right on a device, each with a reason.  Waits for the device.

    Raises what the first of them raises, if none can be compiled.
    """
    wrong, errors = {}, []
    for name, given in _examples(device):
        own = [each.clone() if isinstance(each, Tensor) else each for each in given]
        expected = [*_tensors(getattr(torch_ops, name)(*own)), *_tensors(own)]
        try:
            got = [*_tensors(KERNELS[name](*given)), *_tensors(given)]
        except Exception as error:  # a compiler may fail in any way
            if is_out_of_memory(error):
                raise
            wrong[name] = reason_of(error)
            errors.append(error)
            continue
        if not all(_alike(*pair) for pair in zip(got, expected, strict=True)):
            wrong[name] = "its numbers are wrong"
    if len(errors) == len(KERNELS):
        raise errors[0]
    return wrong


def _tensors(of: object) -> list[Tensor]:
    return [each for each in (of if isinstance(of, tuple | list) else (of,)) if isinstance(each, Tensor)]


def _alike(got: Tensor, expected: Tensor) -> bool:
    """Equal but for some roundings; no number, as the answer of a broken kernel, is alike to none."""
    one, other = got.double(), expected.double()
    return one.shape == other.shape and bool(((one - other).abs() <= TOLERANCE * other.abs().amax()).all())


def _examples(device: torch.device) -> Iterator[tuple[str, list[object]]]:
    """An operation's name and its arguments."""
    dtype = torch.bfloat16
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        dtype = torch.float16
    numbers = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers).to(device, dtype)

    def integers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32).to(device)

    codes = torch.randint(-127, 128, (80, 1024), dtype=torch.int8, generator=numbers).to(device)
    scale = torch.rand(80, generator=numbers).to(device)
    yield "int8_linear", [randn(3, 1024), codes, scale, randn(80)]
    yield "norm", [randn(3, 80), randn(80), 1e-5]
    yield "add_norm", [randn(3, 80), randn(3, 80), randn(80), 1e-5]
    places, keys, values = integers(0, 5), randn(64, 2, 64), randn(64, 2, 64)
    table = integers(0, 2, 3, 1, 0, 0).view(2, 3)
    yield (
        "rope_and_write",
        [
            randn(2, 512), 4, 2, randn(6, 64), randn(6, 64), places, integers(7, 40), keys, values,
            randn(64), randn(64), 1e-5, True,
        ],
    )  # fmt: skip
    pages = table.repeat_interleave(8, 1)  # long enough for parts
    yield "paged_attention", [randn(2, 4, 64), keys, values, pages, integers(380, 1), 0.125, 0, 16]
    yield "silu_mul", [randn(3, 160)]
