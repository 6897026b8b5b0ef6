"""Where a node's blocks lie: on one device, on several one after the other, or each block on all of them.

Everything of a node that asks how many devices there are asks here: loading, free memory, measured rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from node.config import VERSION
from node.devices import has_own_memory
from node.model.checkpoint.info import ModelInfo
from node.model.checkpoint.source import cache_dir
from node.model.parallel.shares import places_of
from node.serving import memory
from node.serving.executor.rates import RatesFile, device_name, rates_key
from node.serving.memory import Precision
from node.serving.placement.room import Room, sized_for
from routing.blocks import Blocks
from routing.names import Revision

if TYPE_CHECKING:
    from node.model.blocks.span import Span
    from node.model.checkpoint.folder import ModelFolder
    from node.model.parallel.team import Team


@dataclass(frozen=True, slots=True)
class Placement:
    """The devices of a node.

    devices: by their names.  team: the ranks, where each block is divided among the devices; None: whole
    blocks lie on them one after the other.  key_share: of a block's key heads, the share of a rank.
    """

    devices: tuple[str, ...]
    team: Team | None = None
    key_share: float = 1.0

    @property
    def device(self) -> str:
        """The first one: hidden states enter there."""
        return self.devices[0]

    @property
    def takes_adapters(self) -> bool:
        """Whether guests may bring adapters, and the operator keep some."""
        return self.team is None

    def __str__(self) -> str:
        """For the log and for metrics."""
        return ",".join(self.devices) + ("" if self.team is None else " in parallel")

    def sized(self, info: ModelInfo) -> ModelInfo:
        """The model as a device has it: with its shards, where blocks are divided."""
        return info if self.team is None else sized_for(info, len(self.devices), self.key_share)

    def room(self) -> Room:
        """The memory that is free now.  Runs in the torch thread.  Raises SpanLost.

        The CPU is one memory, whatever number of devices it stands for: each has an equal part.
        """
        if not has_own_memory(self.device):
            free, count = memory.free_bytes(self.device), len(self.devices)
            return Room(self.devices, (free // count,) * (1 if self.team is not None else count))
        if self.team is None:
            return Room(self.devices, tuple(memory.free_bytes(device) for device in self.devices))
        # Asked of the ranks: the question alone would make a context of this process on their devices.
        return Room(self.devices, (min(memory.free_bytes(self.device), *self.team.free_bytes()),))

    def free_for_training(self) -> int:
        """See `memory.free_for_training`: at the device with the least.  From any thread.

        Ranks have equal activations, and the first has more besides than the others.
        """
        if not has_own_memory(self.device):
            return memory.free_for_training(self.device) // len(self.devices)
        devices = self.devices if self.team is None else self.devices[:1]
        return min(memory.free_for_training(device) for device in devices)

    def places(self, blocks: int) -> list[int]:
        """The device of each of these blocks that are to be loaded.  Runs in the torch thread."""
        if len(self.devices) == 1 or self.team is not None:
            return [0] * blocks
        return places_of(self.room().counts(blocks))

    def load(
        self, folder: ModelFolder, blocks: Blocks, precision: Precision, places: Sequence[int] | None = None
    ) -> Span:
        """Load these blocks.  places: of each, see `places`; None: found here.  Runs in the torch thread.

        Raises as `load_span`, and SpanLost.
        """
        from node.model.blocks.span import DTYPES, load_span

        dtype, quantize = DTYPES[precision.dtype], precision.packing
        if self.team is not None:
            from node.model.parallel.sharded import load_sharded

            return load_sharded(self.team, folder, *blocks, dtype=dtype, quantize=quantize)
        if len(self.devices) == 1:
            return load_span(folder, *blocks, dtype=dtype, device=self.device, quantize=quantize)
        import torch

        from node.model.parallel.split import load_split

        devices = [torch.device(each) for each in self.devices]
        where = self.places(blocks.size) if places is None else places
        return load_split(folder, blocks.start, where, devices, dtype=dtype, quantize=quantize)

    def kept_rates(self, revision: Revision, precision: Precision, threads: int) -> tuple[RatesFile, str]:
        """The file with figures of earlier runs, and the key of the figures of a run like this one."""
        name = " + ".join(device_name(each) for each in self.devices)
        if self.team is not None:
            name += " in parallel"
        key = rates_key(revision, name, precision.dtype, precision.packing, threads, VERSION)
        return RatesFile(cache_dir() / "rates.json"), key
