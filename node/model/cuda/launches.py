"""What a launch of a kernel asks: the device that it goes to, its processors, the use of the interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

Kernel = Callable[..., object]

# Kernels run as Python, on a CPU's tensors: for tests.  Triton itself reads this variable.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETERS_PROCESSORS = 4  # so that sums are split there too


def on(device: torch.device) -> AbstractContextManager[object]:
    """Launches go to this device: Triton's go to the thread's current one, wherever the tensors lie."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return INTERPRETERS_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where graphs are recorded, one for each device: cuBLAS keeps a workspace for every stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def check_stores(keys: torch.Tensor, values: torch.Tensor) -> None:
    """Raise ValueError unless keys and values, [slots, heads, dim], lie alike, with whole slots."""
    if keys.stride() != values.stride() or keys.stride()[1:] != (keys.shape[2], 1):
        raise ValueError(
            f"strides of keys {keys.stride()} and values {values.stride()} are not of whole slots"
        )


def reason_of(error: Exception) -> str:
    """The last line of an error: compilers put all that they read before it."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[-1]
