"""What fits on several devices: the arithmetic of `node.serving.memory` over the memory of each of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from node.config import ConfigError
from node.devices import has_own_memory
from node.model.checkpoint.info import ModelInfo
from node.model.parallel.shares import shares
from node.serving import memory
from node.serving.memory import USUAL, Precision


@dataclass(frozen=True, slots=True)
class Room:
    """The memory of a node's devices, all of one kind.

    devices: their names.  free: bytes at each; where devices divide each block only one number, of the device
    that has the least.
    """

    devices: tuple[str, ...]
    free: tuple[int, ...]

    @property
    def device(self) -> str:
        """The first one, which says what kind of memory it is."""
        return self.devices[0]

    @property
    def free_bytes(self) -> int:
        """Of all devices together, or of one rank."""
        return sum(self.free)

    def counts(self, blocks: int) -> list[int]:
        """The number of blocks at each device: in proportion to what is free beyond a GPU's reserve."""
        if not has_own_memory(self.device):
            return shares(self.free, blocks)
        kept = 1 - memory.GPU_RESERVE_SHARE
        usable = [max(0, int(kept * free) - memory.GPU_RESERVE_BYTES) for free in self.free]
        return shares(usable if any(usable) else self.free, blocks)

    def blocks_that_fit(self, info: ModelInfo, precision: Precision, cache_tokens: int | None) -> int:
        """See `memory.blocks_that_fit`: the most that divide so that each device has room for its own."""
        fitting = [
            memory.blocks_that_fit(info, precision, cache_tokens, free, self.device) for free in self.free
        ]
        for blocks in range(min(info.blocks, sum(fitting)), 0, -1):
            if all(own <= most for own, most in zip(self.counts(blocks), fitting, strict=True)):
                return blocks
        return 0

    def cache_tokens_that_fit(self, info: ModelInfo, blocks: int, precision: Precision) -> int:
        """See `memory.cache_tokens_that_fit`: at the device with the least room for them."""
        return min(
            memory.cache_tokens_that_fit(info, count, precision, free, self.device)
            for _, count, free in self._used(blocks)
        )

    def check_fits(
        self,
        info: ModelInfo,
        blocks: int,
        precision: Precision,
        cache_tokens: int,
        step_tokens: int = USUAL.max_step_tokens,
    ) -> None:
        """See `memory.check_fits`: at each device.  Raises ConfigError."""
        for device, count, free in self._used(blocks):
            try:
                memory.check_fits(info, count, precision, cache_tokens, free, step_tokens, device)
            except ConfigError as error:
                if len(self.free) == 1:
                    raise
                raise ConfigError(f"of {blocks} blocks {device} would get {count}: {error}") from None

    def training_bytes_that_fit(
        self, info: ModelInfo, blocks: int, precision: Precision, cache_tokens: int, step_tokens: int
    ) -> int:
        """See `memory.training_bytes_that_fit`: at the device with the least room for them."""
        return min(
            memory.training_bytes_that_fit(
                info, count, precision, cache_tokens, free, device=device, step_tokens=step_tokens
            )
            for device, count, free in self._used(blocks)
        )

    def reserved_bytes(self, info: ModelInfo, precision: Precision) -> int:
        """See `memory.reserved_bytes`: of all devices together."""
        return sum(memory.reserved_bytes(info, precision, self.device, free) for free in self.free)

    def _used(self, blocks: int) -> Iterator[tuple[str, int, int]]:
        """(device, blocks, free bytes) of each device that has blocks."""
        for device, count, free in zip(self.devices, self.counts(blocks), self.free, strict=False):
            if count:
                yield device, count, free


def sized_for(info: ModelInfo, ranks: int, key_share: float) -> ModelInfo:
    """The model as one of several ranks has it.  key_share: of a block's key heads, the share of a rank.

    Norms are whole at every rank, and so are key heads that several ranks have.
    """

    kept = info.kv_values * info.hidden_size  # numbers in the matrices of keys and values

    def part(matrices: int) -> int:
        return -(-max(0, matrices - kept) // ranks) + math.ceil(min(kept, matrices) * key_share)

    matrices = info.matrix_values or info.block_values
    return replace(
        info,
        block_values=tuple(
            part(own) + whole - own for whole, own in zip(info.block_values, matrices, strict=True)
        ),
        matrix_values=tuple(map(part, info.matrix_values)),
        kv_values=math.ceil(info.kv_values * key_share),
    )
