"""What fits on this machine: pure arithmetic, and the two readings that it starts from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import psutil

from node.config import ConfigError
from node.model.info import ModelInfo, memory_needed

MEMORY_SHARE = 0.8  # of what is free now; the rest is for activations and for others
CACHE_SHARE = 0.25  # of that, for KV caches
LEAST_CACHE_TOKENS = 2048
MOST_CACHE_TOKENS = 65_536
DIRECTORY_COMMANDS = {"bootstrap", "status", "models", "new-swarm-key"}


def free_bytes(device: str = "cpu") -> int:
    """Free memory of a device, in bytes.  Imports torch for devices other than the CPU."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def servers_on_this_machine() -> int:
    """Running `python -m node` processes that serve blocks, this one included."""
    found = sum(serves_blocks(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    return max(found, 1)


def serves_blocks(words: Sequence[str]) -> bool:
    """Whether this command line is that of a serving node, and not of a program that started one."""
    if not words or not Path(words[0]).name.startswith("python") or "-m" not in words:
        return False
    after = words[words.index("-m") + 1 :]
    return after[:1] == ["node"] and not DIRECTORY_COMMANDS.intersection(after[1:2])


def threads_for_this_node() -> int:
    """The cores that we may use, divided by the servers on this machine.

    Two OpenMP threads lose five to twenty times their speed when another process takes a core.
    """
    return max(1, len(os.sched_getaffinity(0)) // servers_on_this_machine())


def cache_tokens_that_fit(info: ModelInfo, blocks: int, dtype: str, free: int) -> int:
    """Cache tokens for a span of `blocks` when `free` bytes are free: 2,048 to 65,536."""
    for_caches = MEMORY_SHARE * CACHE_SHARE * free
    a_token = info.kv_bytes_per_token_per_block(dtype) * blocks
    return int(max(LEAST_CACHE_TOKENS, min(MOST_CACHE_TOKENS, for_caches // a_token)))


def blocks_that_fit(info: ModelInfo, dtype: str, cache_tokens: int | None, free: int) -> int:
    """The largest number of blocks that fits with its caches, up to the whole model; 0 if none does."""
    usable = MEMORY_SHARE * free
    return max(
        (
            count
            for count in range(1, info.blocks + 1)
            if memory_needed(info, count, dtype, cache_tokens or LEAST_CACHE_TOKENS) <= usable
        ),
        default=0,
    )


def check_fits(info: ModelInfo, blocks: int, dtype: str, cache_tokens: int, free: int) -> int:
    """The bytes that a span and its caches need.  Raises ConfigError if `free` bytes are too few."""
    needed = memory_needed(info, blocks, dtype, cache_tokens)
    if needed > free:
        fit = blocks_that_fit(info, dtype, cache_tokens, free)
        raise ConfigError(
            f"{blocks} blocks of {info.name} as {dtype} with {cache_tokens} cache tokens need"
            f" {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free: {fit} blocks would fit"
        )
    return needed
