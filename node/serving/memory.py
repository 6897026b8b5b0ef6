"""What fits on this machine: pure arithmetic, and the two readings that it starts from."""

from __future__ import annotations

import bisect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from node.config import ConfigError
from node.model.blocks.parts import PART_POSITIONS
from node.model.checkpoint.info import UNBOUNDED_POSITIONS, ModelInfo, memory_needed
from node.serving.executor.batcher import CHUNK_POSITIONS
from tensor_codec.limits import MIB, Limits

MEMORY_SHARE = 0.8  # of what is free now; the rest is for others
CACHE_SHARE = 0.25  # of what weights and workspace leave of it, for KV caches; a GPU is ours alone
MIN_CACHE_TOKENS = 2048
USUAL_CACHE_TOKENS = 8192  # a peer's share is not smaller (Limits.least_share_tokens)
MAX_CACHE_TOKENS = 65_536  # or as many as make a peer's share as long as the model allows
USUAL = Limits()
DIRECTORY_COMMANDS = {"bootstrap", "status", "models", "prepare", "new-swarm-key"}

TRAINED_VALUES = 16  # numbers that `backward` holds for each position and block of a part, in hidden sizes
MIN_HEAD_DIM = 64  # of the models that matter here; more heads than this gives have more scores
OTHER_BYTES = 256 * MIB  # queues, sessions, compiled kernels, the allocator's waste


@dataclass(frozen=True, slots=True)
class Memory:
    """What a serving node's memory goes into, in bytes.

    weights, cache: of the span, the cache when it is full.  workspace: what computing takes beside
    them for a moment.  process: what the process had before it loaded anything.  network: what peers
    can make it hold.  journal: outputs kept for replays, when it is full.  on_device: whether weights,
    cache and workspace are not in the process's memory.
    """

    weights: int
    cache: int
    workspace: int
    process: int
    network: int
    journal: int = 0
    on_device: bool = False

    @property
    def needed(self) -> int:
        """On the device that computes."""
        return self.weights + self.cache + self.workspace

    @property
    def resident_bound(self) -> int:
        """What the process's resident memory stays below, whatever peers send."""
        beside = self.process + self.network + self.journal + OTHER_BYTES
        return beside + (0 if self.on_device else self.needed)


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


def process_bytes() -> int:
    """Resident memory of this process now: torch, transformers and what else it has imported."""
    return int(psutil.Process().memory_info().rss)


def workspace_bytes(
    info: ModelInfo,
    dtype: str,
    cache_tokens: int,
    quantize: str = "none",
    activations: str | None = None,
    step_tokens: int = USUAL.max_step_tokens,
) -> int:
    """What is needed for a moment, whatever runs: an estimate from above, in bytes.

    Either a block's weights in float32, while they are quantised at start; or what every matrix of a
    block answers for a chunk of a prefill, the scores of its attention, and a copy of one block's
    keys and values for a batch; or what `backward` holds of the blocks that it runs again.
    step_tokens: of a request without a session; one that is longer than usual has scores of its own.
    """
    item = info.kv_bytes_per_token_per_block(activations or dtype) / max(info.kv_values, 1)
    loading = 4 * max(info.block_values) if quantize not in ("none", info.quantize) else 0
    outputs = max(info.matrix_rows, default=8 * info.hidden_size) + 4 * info.hidden_size
    heads = -(-info.hidden_size // MIN_HEAD_DIM)
    longest = min(info.max_position, cache_tokens)
    scores = CHUNK_POSITIONS * longest * heads * 4
    copied = cache_tokens * info.kv_bytes_per_token_per_block(activations or dtype)
    chunk = int(CHUNK_POSITIONS * outputs * item) + scores + copied
    training = int(max(PART_POSITIONS, step_tokens) * TRAINED_VALUES * info.hidden_size * item)
    row = min(step_tokens, info.max_position)
    if row > USUAL.max_step_tokens:
        training += row * row * heads * 4
    return max(loading, chunk, training)


def memory_of(
    info: ModelInfo,
    blocks: int,
    dtype: str,
    cache_tokens: int,
    *,
    quantize: str = "none",
    activations: str | None = None,
    device: str = "cpu",
    limits: Limits | None = None,
    process: int = 0,
    journal_tokens: int | None = None,
) -> Memory:
    """Where the memory goes for a span of `blocks` with caches for `cache_tokens` tokens.

    activations: what is computed and cached in, where that is not `dtype`.  process: bytes of
    `process_bytes`, before anything is loaded.  journal_tokens: None for as many as the caches hold.
    """
    limits = limits or Limits()
    a_token = info.kv_bytes_per_token_per_block(activations or dtype)
    return Memory(
        weights=blocks * info.block_bytes(dtype, quantize),
        cache=blocks * cache_tokens * a_token,
        workspace=workspace_bytes(info, dtype, cache_tokens, quantize, activations, limits.max_step_tokens),
        process=process,
        network=limits.max_connections * limits.max_unread_bytes_per_connection
        + limits.max_compute_streams * limits.max_frame_bytes,
        journal=(cache_tokens if journal_tokens is None else journal_tokens) * _journal_bytes(info),
        on_device=device not in ("cpu", "mps"),
    )


def in_one_line(memory: Memory, info: ModelInfo, blocks: int, cache_tokens: int, free: int) -> str:
    """How many blocks fit and where the memory goes, for the log."""
    return (
        f"{blocks} of {info.blocks} blocks: weights {_gib(memory.weights)},"
        f" KV cache {_gib(memory.cache)} for {cache_tokens:,} tokens,"
        f" journal {_gib(memory.journal)}, workspace {_gib(memory.workspace)};"
        f" bound {_gib(memory.resident_bound)} resident; {_gib(free)} free"
    )


def cache_tokens_that_fit(
    info: ModelInfo,
    blocks: int,
    dtype: str,
    free: int,
    quantize: str = "none",
    activations: str | None = None,
    device: str = "cpu",
) -> int:
    """Cache tokens for a span of `blocks` when `free` bytes are free: 2,048 to 65,536, or four times what
    the model has positions, so that a whole session is no more than a peer's share.

    A part of what the weights leave, so that a machine is not filled with caches; but where there is
    room for the usual number of tokens it is not less than that.  What computing with so many takes,
    and on a CPU a journal of as many, fits too.
    """
    most = MAX_CACHE_TOKENS
    if info.max_position < UNBOUNDED_POSITIONS:
        most = max(most, int(info.max_position / USUAL.cache_share_per_peer))
    a_token = info.kv_bytes_per_token_per_block(activations or dtype) * blocks
    if not a_token:
        return most  # convolutions alone: nothing grows with the tokens
    workspace = workspace_bytes(info, dtype, USUAL_CACHE_TOKENS, quantize, activations)
    room = MEMORY_SHARE * free - blocks * info.block_bytes(dtype, quantize) - workspace
    share = CACHE_SHARE if device in ("cpu", "mps") else 1.0
    tokens = int(max(share * room, min(room, USUAL_CACHE_TOKENS * a_token)) // a_token)

    def fits(tokens: int) -> bool:
        needed = blocks * info.block_bytes(dtype, quantize) + tokens * a_token
        needed += workspace_bytes(info, dtype, tokens, quantize, activations)
        journal = tokens * _journal_bytes(info) if device in ("cpu", "mps") else 0
        return needed + journal <= MEMORY_SHARE * free

    least = min(USUAL_CACHE_TOKENS, tokens)
    candidates = range(least, min(most, tokens) + 1)
    fitting = bisect.bisect_left(candidates, True, key=lambda tokens: not fits(tokens))
    return max(MIN_CACHE_TOKENS, min(most, least + max(0, fitting - 1)))


def journal_tokens_that_fit(info: ModelInfo, cache_tokens: int, device: str, free: int) -> int:
    """Tokens of the journal where nobody said how many: as many as the cache holds.

    free: bytes in the process's memory; beside a cache on another device it takes no more than a cache
    would here.
    """
    if device in ("cpu", "mps"):
        return cache_tokens
    fitting = int(MEMORY_SHARE * CACHE_SHARE * free) // _journal_bytes(info)
    return max(MIN_CACHE_TOKENS, min(cache_tokens, fitting))


def _journal_bytes(info: ModelInfo) -> int:
    """Of a token, in fp32."""
    return info.hidden_size * 4


def blocks_that_fit(
    info: ModelInfo,
    dtype: str,
    cache_tokens: int | None,
    free: int,
    quantize: str = "none",
    activations: str | None = None,
) -> int:
    """The largest number of blocks that fits with its caches, up to the whole model; 0 if none does.

    cache_tokens: None for the usual number, or for the least where no block would fit with that.
    """
    if cache_tokens is None:
        usual = blocks_that_fit(info, dtype, USUAL_CACHE_TOKENS, free, quantize, activations)
        return usual or blocks_that_fit(info, dtype, MIN_CACHE_TOKENS, free, quantize, activations)
    left = MEMORY_SHARE * free - workspace_bytes(info, dtype, cache_tokens, quantize, activations)
    one = memory_needed(info, 1, dtype, cache_tokens, quantize, activations)
    return max(0, min(info.blocks, int(left // one)))


def check_fits(
    info: ModelInfo,
    blocks: int,
    dtype: str,
    cache_tokens: int,
    free: int,
    quantize: str = "none",
    activations: str | None = None,
    step_tokens: int = USUAL.max_step_tokens,
) -> int:
    """The bytes that a span needs, its caches and workspace included.

    Raises ConfigError if `free` bytes are too few.
    """
    workspace = workspace_bytes(info, dtype, cache_tokens, quantize, activations, step_tokens)
    needed = memory_needed(info, blocks, dtype, cache_tokens, quantize, activations) + workspace
    if needed > free:
        fit = blocks_that_fit(info, dtype, cache_tokens, free, quantize, activations)
        kept = dtype if quantize == "none" else quantize
        raise ConfigError(
            f"{blocks} blocks of {info.name} as {kept} with {cache_tokens} cache tokens need"
            f" {_gib(needed)}, {_gib(free)} are free: {fit} blocks would fit"
        )
    return needed


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
