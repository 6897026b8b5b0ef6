"""Which of Triton's kernels are used on a device: those that give the numbers of torch's own operations.

Triton compiles with a C compiler and Python's headers of this machine, which a volunteer's machine may lack,
and for cards that nobody has tried.  So every kernel is run once in a small size before it is used
(node/model/cuda/probe.py), and a kernel that later fails in another size is given up.  A node serves in
either case, and its log has one line.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from node.devices import is_out_of_memory
from node.model.cuda.launches import INTERPRETED, Kernel, on, reason_of

log = logging.getLogger("raceme")

LEAST_CAPABILITY = (8, 0)  # of NVIDIA's cards: Triton has no older ones among those that it supports

_found: dict[torch.device, dict[str, Kernel]] = {}


def kernel_of(name: str, device: torch.device) -> Kernel | None:
    """Triton's kernel of an operation of node/model/cuda/ops.py on a device; None where torch's own is used.

    Found out once for each device of a process: seconds, where the kernels have to be compiled.  On a CPU
    they run in Triton's interpreter alone.
    """
    found = _found.get(device)
    if found is None:
        _found[device] = {}  # while they are tried
        found = _found[device] = _tried(device)
    return found.get(name)


def usable(device: torch.device | str) -> bool:
    """Whether any of Triton's kernels is used on tensors of this device."""
    device = torch.device(device)
    kernel_of("", device)
    return bool(_found[device])


def give_up(name: str, device: torch.device, error: Exception) -> None:
    """Use torch's own operation from now on: the kernel failed in a size in which it had not been tried."""
    if _found.get(device, {}).pop(name, None) is not None:
        log.warning("%s on %s is torch's own from now on: %s", name, device, reason_of(error))


def _tried(device: torch.device) -> dict[str, Kernel]:
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return {}
    try:
        kernels, wrong = _probed(device)
    except Exception as error:  # a compiler may fail in any way, and there is another way to compute
        if is_out_of_memory(error):  # says nothing about the kernels
            del _found[device]
            raise
        log.warning("no Triton on %s, torch's own operations are slower: %s", device, reason_of(error))
        return {}
    for name, reason in wrong.items():
        log.warning("%s on %s is torch's own and not Triton's: %s", name, device, reason)
    return {name: kernel for name, kernel in kernels.items() if name not in wrong}


def _probed(device: torch.device) -> tuple[Mapping[str, Kernel], Mapping[str, str]]:
    """All kernels, and why some cannot be used.  Raises what a compiler or a driver raises."""
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            raise RuntimeError(f"compute capability {capability[0]}.{capability[1]} is below 8.0")
    from node.model.cuda import probe

    with on(device):
        return probe.KERNELS, probe.wrong_on(device)
