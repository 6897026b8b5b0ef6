"""The devices that torch computes on, by the names of the command line: cpu, cuda, cuda:1, mps.

Everything that depends on the kind of a device or on its number asks here, so that the second GPU of a
machine is no other case than the first.  ROCm's builds of torch call their devices cuda too.  Nothing imports
torch before a device is asked.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from node.runtime.values import shown

DEVICES = ("auto", "cpu", "cuda", "mps")
MAX_DEVICES = 64  # of one node: no machine has more
_NAME = re.compile(r"auto|cpu|mps|cuda(?::(?:0|[1-9][0-9]{0,2}))?")

# Memory of a device that is reserved can grow in place, so sizes that change with each step leave no holes.
ALLOCATOR_SETTINGS = "expandable_segments:True"
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
RENAMED_IN = (2, 9)  # before this version torch reads the second of them and not the first

# The words of torch, CUDA, cuBLAS, cuDNN, HIP, MPS and of the CPU's allocator; all come as RuntimeError.
_SHORT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|STATUS_ALLOC_FAILED"
    r"|MemoryAllocation\b|HIPBLAS_STATUS_ALLOC",
    re.IGNORECASE,
)


def device_named(name: object) -> str:
    """A device's name as the command line takes it.  Raises ValueError for another name."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        allowed = f"one of {', '.join(DEVICES)} is allowed (cuda:1 for a second GPU)"
        raise ValueError(f"device is {shown(name)}, {allowed}")
    return name


def devices_named(names: object) -> tuple[str, ...]:
    """The devices of a list as the command line takes it: one name, or several with commas between them.

    Several are GPUs by their numbers, each once, or the CPU several times.  Raises ValueError for others.
    """
    if not isinstance(names, str) or "," not in names:
        return (device_named(names),)
    found = tuple(names.split(",", MAX_DEVICES))
    if len(found) <= MAX_DEVICES:
        kinds = {kind_of(device_named(each)) for each in found}
        if kinds == {"cpu"}:
            return found
        numbers = [index_of(each) or 0 for each in found]
        if kinds == {"cuda"} and len(set(numbers)) == len(numbers):
            return tuple(f"cuda:{number}" for number in numbers)
    allowed = f"up to {MAX_DEVICES} GPUs, each once (cuda:0,cuda:1), or cpu several times"
    raise ValueError(f"device is {shown(names)}, a list may have {allowed}")


def kind_of(device: object) -> str:
    """ "cuda" of "cuda:1"; of a name, or of a `torch.device`."""
    return str(device).partition(":")[0]


def index_of(device: object) -> int | None:
    """1 of "cuda:1"; None where the name has no number."""
    number = str(device).partition(":")[2]
    return int(number) if number else None


def has_own_memory(device: object) -> bool:
    """Whether the device's memory is not the machine's."""
    return kind_of(device) not in ("cpu", "mps")


def devices_here() -> list[str]:
    """The devices of this machine, the fastest kind first.  Imports torch."""
    import torch

    found = []
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        found += ["cuda"] if count < 2 else [f"cuda:{index}" for index in range(count)]
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, "cpu"]


def find_device(name: str) -> str:
    """The device that a name of the command line means; of auto the fastest.  Imports torch.

    Raises ValueError where this machine has no such device.
    """
    here = devices_here()
    if name == "auto":
        return kind_of(here[0])
    first = "cuda:0" if "cuda:0" in here else "cuda"
    alike = {"cuda": first, "cuda:0": first}.get(name, name)
    if alike not in here:
        raise ValueError(f"device {name} is not there; {', '.join(reversed(here))} would be")
    return name


def find_devices(names: tuple[str, ...], ranks: int = 1) -> tuple[str, ...]:
    """The devices that names of the command line mean.

    ranks: that divide each block among them: one name of a kind then stands for the first devices of it.
    Imports torch.  Raises ValueError where this machine has no such devices, or not as many.
    """
    if len(names) > 1 and ranks not in (1, len(names)):
        raise ValueError(
            f"{ranks} ranks are asked for, and {len(names)} devices are named ({','.join(names)})"
        )
    if len(names) > 1 or ranks == 1:
        return tuple(find_device(name) for name in names)
    name = find_device(names[0])
    if kind_of(name) == "cpu":
        return (name,) * ranks
    if index_of(names[0]) is not None or kind_of(name) != "cuda":
        raise ValueError(f"{ranks} ranks need {ranks} devices, {names[0]} is one")
    here = [each for each in devices_here() if kind_of(each) == "cuda"]
    if len(here) < ranks:
        raise ValueError(
            f"{ranks} ranks need {ranks} devices, {', '.join(here)} {'are' if len(here) > 1 else 'is'} there"
        )
    return tuple(here[:ranks])


def hardware(device: object) -> str:
    """ "NVIDIA H100, CUDA 13.0", for the log; a build of torch for ROCm says ROCm.  "" but for a GPU.

    Imports torch for a GPU.
    """
    if kind_of(device) != "cuda":
        return ""
    import torch

    hip = torch.version.hip
    platform = f"ROCm {hip}" if hip else f"CUDA {torch.version.cuda}"
    return f"{torch.cuda.get_device_name(index_of(device))}, {platform}"


def use_device(device: object) -> None:
    """Let streams, graphs and kernels of the calling thread be those of this device.

    Imports torch for a GPU.
    cuDNN's attention is switched off: it builds a plan for every new length, 0.4 s each, and lengths of
    sessions change with every step.  Its convolutions compute float32 as float32, as products do.
    """
    if kind_of(device) != "cuda":
        return
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.allow_tf32 = False
    if (index := index_of(device)) is not None:
        torch.cuda.set_device(index)


def set_up_allocator(environment: MutableMapping[str, str] = os.environ) -> None:
    """Choose the settings of torch's allocator for GPUs, unless the operator has.

    To be called before torch is imported: it reads them once.
    """
    if not any(environment.get(name) for name in ALLOCATOR_VARIABLES):
        from importlib.metadata import version

        major, minor = (int(part) for part in version("torch").split(".")[:2])
        environment[ALLOCATOR_VARIABLES[(major, minor) < RENAMED_IN]] = ALLOCATOR_SETTINGS


def best_dtype(device: object) -> str:
    """The smaller dtype, where the hardware computes in it.  Imports torch."""
    import torch

    kind = kind_of(device)
    if kind == "cuda":
        use_device(device)  # torch asks the thread's own
        # before Ampere torch emulates bfloat16, several times slower than float16
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if kind == "mps":
        return "float16"
    # without support in the CPU it is slower than float32
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def free_device_bytes(device: object) -> int:
    """Free memory of a GPU, with the memory that torch holds of it and does not use.  Imports torch."""
    import torch

    index = index_of(device)
    free = int(torch.cuda.mem_get_info(index)[0])
    return free + int(torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index))


def synchronize(device: object) -> None:
    """Return when the device has computed everything.  Imports torch for devices other than the CPU."""
    kind = kind_of(device)
    if kind == "cpu":
        return
    import torch

    if kind == "cuda":
        torch.cuda.synchronize(index_of(device))
    elif kind == "mps":
        torch.mps.synchronize()


def empty_cache() -> None:
    """Give memory that torch holds and does not use back to the GPUs.  Imports torch."""
    import torch

    torch.cuda.empty_cache()  # does nothing where none is in use
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python found no memory: an allocation failed and nothing else did.

    Only `torch.OutOfMemoryError` is a class of its own; cuBLAS, drivers, MPS and the CPU's allocator say it
    in the words of a RuntimeError.
    """
    if isinstance(error, MemoryError) or any(c.__name__ == "OutOfMemoryError" for c in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and _SHORT_OF_MEMORY.search(str(error)) is not None
