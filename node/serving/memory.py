"""The span that fits on this machine: pure arithmetic on two readings, free memory and the process's own."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, fields, replace

import psutil

from node.config import ConfigError
from node.devices import free_device_bytes, has_own_memory
from node.model.blocks.parts import PART_POSITIONS
from node.model.checkpoint.architecture import architecture_of
from node.model.checkpoint.info import UNBOUNDED_POSITIONS, ModelInfo, memory_needed
from node.network.budgets.large_frames import SMALL_FRAME
from node.network.directory.kademlia.contact import KEY_BITS, NEAREST
from node.serving.executor.batcher import CHUNK_POSITIONS, policy_for
from node.serving.sessions.step_room import SMALL_STEP
from tensor_codec.limits import KIB, MIB, Limits

USUAL = Limits()
MEMORY_SHARE = 0.8  # of the memory that is free now; other programs keep the rest
CACHE_SHARE = 0.25  # for KV caches, of the rest after weights and workspace; a GPU's memory is taken whole
MIN_CACHE_TOKENS = 2048
USUAL_CACHE_TOKENS = USUAL.least_share_tokens  # so one peer can fill a cache of the usual size
MAX_CACHE_TOKENS = 65_536  # on a CPU more only for a peer's share as long as the model's longest session
# Of a GPU's free memory nothing takes these: they are for kernels that are loaded at their first use, holes
# between tensors, and another program's window.
GPU_RESERVE_BYTES = 1024 * MIB
GPU_RESERVE_SHARE = 0.05
CUBLAS_BYTES = 2 * 32 * MIB  # its workspace on Hopper, for the stream of the steps and for that of recordings

MAX_TRAINING_BYTES = (
    4096 * MIB
)  # of the activations that one backward holds; a longer one holds parts of them
TRAINING_SHARE = 0.5  # for activations, of the memory that is free when a backward comes
DEVICE_TRAINING_SHARE = 1 / 16  # of a device's memory: its cache would take all of it
TRAINED_VALUES = 16  # numbers that `backward` holds for each position and block of a part, in hidden sizes
LARGEST_TRAINED_VALUES = 32  # of all architectures (benchmarks backward)
TRAINED_COPIES = 4  # of an adapter's bytes in bfloat16: its values in float32, and their gradients
MIN_ADAPTER_BYTES = 128 * MIB  # of guests: three small models' largest, a quarter of it for each
MIN_HEAD_DIM = 64  # a smaller head dimension means more heads, and more scores than are counted here
READ_BYTES = 512 * KIB  # of a connection: what one read brought, sealed and opened
OUTGOING_BYTES = 128 * KIB  # of a stream: one chunk that is sealed, and one that waits
STEP_BYTES = 8 * KIB  # of a step besides its body: header, objects
STEP_COPIES = 3  # of a step that is computed: its body, its tensor, the outputs of its chunks
RECORD_BYTES = 5 * KIB  # of a record of the largest size, as bytes and as a value: 3 to 4 KiB
CONTACT_BYTES = 4 * KIB  # of a contact or an entry of the Kademlia table with eight addresses
TABLE_CONTACTS = KEY_BITS * NEAREST
LIBP2P_PROTOCOLS = 4  # Kademlia, identify, identify/push, ping
OTHER_BYTES = 256 * MIB  # queues, sessions, compiled kernels, the allocator's waste


@dataclass(frozen=True, slots=True)
class Precision:
    """The formats of a span's numbers, in memory and in computing: the bytes of the span follow from them.

    dtype: of the weights, as loaded.  quantize: how matrices are kept.  activations: the dtype of hidden
    states; "": the same as `dtype`.  product: how they are multiplied, where `quantize` leaves a choice:
    "llm_int8".  cache: the dtype of keys and values; "": the same as that of hidden states.
    packs: whether hidden states may travel to and from it in int8o, where a client asks for it.
    """

    dtype: str
    quantize: str = "none"
    activations: str = ""
    product: str = ""
    packs: bool = True
    cache: str = ""

    @property
    def packing(self) -> str:
        """What `packing_for` takes: how matrices are kept and multiplied."""
        return self.product or self.quantize

    @property
    def computes(self) -> str:
        """The dtype of hidden states."""
        return self.activations or self.dtype

    @property
    def caches(self) -> str:
        """The dtype of keys and values in caches."""
        return self.cache or self.computes


@dataclass(frozen=True, slots=True)
class PeerBytes:
    """The most bytes that peers can make a node hold, by their use (`peer_bytes`).

    connections: that wait unread in the muxer or in frames that are small, and buffers.  handshakes: buffers
    of those under way.  small_frames: in the hands of their readers.  large_frames: that arrive or are in
    hand, a request's while it is computed.  steps: that wait at sessions or are computed, with their tensors.
    requests: answers to those without a session.  prompts: of sessions, and of those that make way for
    others.  outgoing: what a slow peer has not taken of each stream.  directory: records, the Kademlia table,
    and libp2p's streams.
    """

    connections: int
    handshakes: int
    small_frames: int
    large_frames: int
    steps: int
    requests: int
    prompts: int
    outgoing: int
    directory: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(getattr(self, each.name) for each in fields(self))


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory that a serving node takes, in bytes, by its use.

    weights, cache: of the span, the cache when it is full.  workspace: taken by computing besides them, for
    a moment.  process: resident memory before anything was loaded.  network: the most that peers can make
    the node hold (`PeerBytes`).  journal: outputs kept for replays, when it is full.  answers: of positions
    in the cache, to the last step of each session, kept and on their way to a slow peer.  on_device: whether
    weights, cache, workspace, training and adapters are in a device's own memory.  training: activations
    that a long backward holds besides those in the workspace.  adapters: of guests.  sums: of the gradients
    of these, always in the machine's memory.  trained: what one request at a time holds besides for the
    adapter that it trains.  reserve: of a device's memory, see `reserved_bytes`.
    """

    weights: int
    cache: int
    workspace: int
    process: int
    network: int
    journal: int = 0
    on_device: bool = False
    training: int = 0
    answers: int = 0
    adapters: int = 0
    sums: int = 0
    trained: int = 0
    reserve: int = 0

    @property
    def needed(self) -> int:
        """On the device that computes, without the adapters of guests."""
        return self.weights + self.cache + self.workspace + self.training

    @property
    def resident_bound(self) -> int:
        """The process's resident memory stays below this, whatever peers send."""
        guests = self.sums + self.trained + (0 if self.on_device else self.adapters)
        always = self.process + self.network + self.journal + self.answers + OTHER_BYTES
        return always + guests + (0 if self.on_device else self.needed)

    def bound_after_loading(self, resident: int) -> int:
        """`resident_bound`, and as much more as the process took in loading beyond what was expected.

        resident: bytes once the span is loaded.  A device's libraries may take gigabytes here.
        """
        expected = self.process + OTHER_BYTES + (0 if self.on_device else self.weights)
        return self.resident_bound + max(0, resident - expected)


def free_bytes(device: str = "cpu") -> int:
    """Free memory of a device, in bytes, with what torch holds of a GPU and does not use.

    Imports torch for a GPU.
    """
    return free_device_bytes(device) if has_own_memory(device) else int(psutil.virtual_memory().available)


def free_for_training(device: str = "cpu") -> int:
    """Memory that the activations of a backward may take now, in bytes: a share of the free memory."""
    return int(TRAINING_SHARE * free_bytes(device))


def process_bytes() -> int:
    """Resident memory of this process now: torch, transformers and other imports."""
    return int(psutil.Process().memory_info().rss)


def reserved_bytes(info: ModelInfo, precision: Precision, device: str, free: int) -> int:
    """Bytes of a GPU's memory that neither weights nor caches nor activations may take; 0 elsewhere.

    A reserve, the workspaces of cuBLAS, the outputs of a recorded batch of the most rows, those of a chunk
    beyond the one of `workspace_bytes`, and one block's matrices as a product without a kernel unpacks them.
    The context is in place before free memory is read.
    """
    if not has_own_memory(device):
        return 0
    policy, item = policy_for(device), _item_bytes(info, precision)
    rows = policy.max_rows + policy.chunk_positions - CHUNK_POSITIONS
    unpacked = max(info.matrix_values, default=0) if precision.quantize != "none" else 0
    reserve = GPU_RESERVE_BYTES + int(GPU_RESERVE_SHARE * free)
    return reserve + CUBLAS_BYTES + int(item * (rows * _outputs(info) + unpacked))


def usable_bytes(info: ModelInfo, precision: Precision, device: str, free: int) -> float:
    """The part of a device's free memory that a span may take with all that it computes."""
    if has_own_memory(device):
        return max(0, free - reserved_bytes(info, precision, device, free))
    return MEMORY_SHARE * free


def _item_bytes(info: ModelInfo, precision: Precision) -> float:
    """Of a number in hidden states."""
    return info.kv_bytes_per_token_per_block(precision.computes) / max(info.kv_values, 1)


def _outputs(info: ModelInfo) -> int:
    """Numbers that a block computes for each position, in all its matrices and between them."""
    return max(info.matrix_rows, default=8 * info.hidden_size) + 4 * info.hidden_size


def workspace_bytes(
    info: ModelInfo,
    precision: Precision,
    cache_tokens: int,
    step_tokens: int = USUAL.max_step_tokens,
    device: str = "cpu",
) -> int:
    """Memory for a moment of computing, in bytes: an estimate from above, the largest of three.

    Loading: a block's weights in float32, while they are quantised.  A chunk of a prefill: the outputs of
    all matrices of a block, attention's scores, and a copy of one block's keys and values for a batch.
    Training: the activations that `backward` holds of the blocks that it computes again.
    step_tokens: of a request without a session; above the usual limit its scores are counted too.
    On a GPU the attention of blocks that are our own keeps no scores of a chunk (flash attention,
    arXiv:2205.14135), and copies one session's keys and values at the most.
    """
    item = _item_bytes(info, precision)
    loading = 4 * max(info.block_values) if precision.quantize not in ("none", info.quantize) else 0
    heads = -(-info.hidden_size // MIN_HEAD_DIM)
    longest = min(info.max_position, cache_tokens)
    flash = has_own_memory(device) and architecture_of(info.architecture).fused
    scores = 0 if flash else CHUNK_POSITIONS * longest * heads * 4
    copied = cache_tokens * info.kv_bytes_per_token_per_block(precision.computes)
    if precision.caches != precision.computes:  # gathered, then widened
        copied += cache_tokens * info.kv_bytes_per_token_per_block(precision.caches)
    if flash:  # which has no float32: there keys and values are repeated for all heads
        heads_bytes = 2 * 4 * info.hidden_size if precision.computes == "float32" else 0
        copied = longest * max(info.kv_bytes_per_token_per_block(precision.computes), heads_bytes)
    chunk = int(CHUNK_POSITIONS * _outputs(info) * item) + scores + copied
    training = part_bytes(info, precision, step_tokens)
    row = min(step_tokens, info.max_position)
    if row > USUAL.max_step_tokens:
        training += row * row * heads * 4
    return max(loading, chunk, training)


def part_bytes(info: ModelInfo, precision: Precision, step_tokens: int = USUAL.max_step_tokens) -> int:
    """Bytes of the activations of one part of a backward: room for them is always kept."""
    item = _item_bytes(info, precision)
    return int(max(PART_POSITIONS, step_tokens) * TRAINED_VALUES * info.hidden_size * item)


def training_bytes_that_fit(
    info: ModelInfo,
    blocks: int,
    precision: Precision,
    cache_tokens: int,
    free: int,
    *,
    device: str = "cpu",
    step_tokens: int = USUAL.max_step_tokens,
) -> int:
    """Bytes for activations of a backward besides those of one part: fewer parts run forward twice then.

    At most those of the largest request through all blocks, and MAX_TRAINING_BYTES; on a CPU a share of the
    memory that the span leaves, on a device all of it.
    """
    used = memory_of(
        info, blocks, precision, cache_tokens,
        device=device, limits=replace(USUAL, max_step_tokens=step_tokens),
    )  # fmt: skip
    on_cpu = not has_own_memory(device)
    room = (
        usable_bytes(info, precision, device, free)
        - used.needed
        - (used.journal if on_cpu else used.adapters)
    )
    most = min(MAX_TRAINING_BYTES, _largest_training(info, blocks, precision, step_tokens))
    return max(0, min(most, int((TRAINING_SHARE if on_cpu else 1.0) * room)))


def tape_bytes_of(training: int, limits: Limits) -> int:
    """The part of the memory for activations (`training_bytes_that_fit`) that tapes may take.

    At most half: a backward without a tape keeps the rest.
    """
    return min(limits.tape_bytes, training // 2)


def _largest_training(info: ModelInfo, blocks: int, precision: Precision, step_tokens: int) -> int:
    item = _item_bytes(info, precision)
    return int(step_tokens * blocks * LARGEST_TRAINED_VALUES * info.hidden_size * item)


def memory_of(
    info: ModelInfo,
    blocks: int,
    precision: Precision,
    cache_tokens: int,
    *,
    device: str = "cpu",
    limits: Limits | None = None,
    process: int = 0,
    journal_tokens: int | None = None,
) -> Memory:
    """The memory that a span of `blocks` takes, with caches for `cache_tokens` tokens.

    process: bytes of `process_bytes`, before anything is loaded.  journal_tokens: None for as many as the
    caches hold.  Activations of a long backward (`training_bytes_that_fit`) and a device's reserve
    (`reserved_bytes`) are not in it.
    """
    limits = limits or Limits()
    token_bytes = info.kv_bytes_per_token_per_block(precision.caches)
    adapters = adapter_bytes(info, blocks, precision, limits)
    return Memory(
        weights=blocks * info.block_bytes(precision.dtype, precision.quantize),
        cache=blocks * cache_tokens * token_bytes,
        workspace=workspace_bytes(info, precision, cache_tokens, limits.max_step_tokens, device),
        process=process,
        network=peer_bytes(limits).total,
        answers=2 * cache_tokens * _journal_bytes(info),
        journal=(cache_tokens if journal_tokens is None else journal_tokens) * _journal_bytes(info),
        on_device=has_own_memory(device),
        adapters=adapters,
        sums=sum_bytes(adapters, limits),
        trained=trained_bytes(info.hidden_size, adapters, limits),
    )


def adapter_bytes(info: ModelInfo, blocks: int, precision: Precision, limits: Limits) -> int:
    """Bytes for the adapters of guests: an eighth of the weights, within bounds."""
    weights = blocks * info.block_bytes(precision.dtype, precision.quantize)
    return min(limits.adapter_bytes, max(MIN_ADAPTER_BYTES, weights // 8))


def sum_bytes(adapters: int, limits: Limits) -> int:
    """Bytes for sums of gradients: in float64 they take two to four times the bytes of their adapters."""
    return min(limits.sum_bytes, 2 * adapters)


def trained_bytes(hidden: int, adapters: int, limits: Limits) -> int:
    """Bytes for the adapter that a request trains: of one peer, and one request is under way at a time.

    Copies and gradients of all that a peer may have, whatever its share; and in float32, for one part of a
    backward, the inputs of the linears (see `SpanAdapter.kept_bytes`).  hidden: values of a hidden state.
    """
    share = max(limits.adapter_share_per_peer, *limits.own_shares.values(), 0.0)
    copies = TRAINED_COPIES * int(share * adapters)
    return copies + max(PART_POSITIONS, limits.max_step_tokens) * TRAINED_VALUES * hidden * 4


def peer_bytes(limits: Limits) -> PeerBytes:
    """The most bytes that peers can make a node hold, whatever they send."""
    frame = limits.max_frame_bytes
    waiting = (limits.max_steps_in_flight + 1) * (SMALL_STEP + STEP_BYTES)  # and the one that is computed
    small_steps = limits.max_streams * (waiting + (STEP_COPIES - 1) * SMALL_STEP)
    libp2p_streams = LIBP2P_PROTOCOLS * limits.max_libp2p_streams
    return PeerBytes(
        connections=limits.max_connections * (limits.max_unread_bytes_per_connection + READ_BYTES),
        handshakes=limits.max_unauthenticated_connections * READ_BYTES,
        small_frames=limits.max_streams * SMALL_FRAME,
        large_frames=limits.max_large_frames * frame,
        steps=STEP_COPIES * limits.max_large_steps * frame + small_steps,
        requests=limits.max_compute_streams * frame,
        prompts=2 * limits.max_prompt_bytes,
        outgoing=limits.max_streams * OUTGOING_BYTES,
        directory=2 * limits.max_records * RECORD_BYTES  # live ones, and those that ended
        + (limits.max_providers + TABLE_CONTACTS) * CONTACT_BYTES
        + libp2p_streams * 2 * limits.max_libp2p_bytes_per_stream,
    )


def in_one_line(memory: Memory, info: ModelInfo, blocks: int, cache_tokens: int, free: int) -> str:
    """The number of blocks served and the uses of the memory, for the log."""
    guests = memory.adapters + memory.sums + memory.trained
    reserve = f", kept free {_gib(memory.reserve)}" if memory.reserve else ""
    return (
        f"{blocks} of {info.blocks} blocks: weights {_gib(memory.weights)},"
        f" KV cache {_gib(memory.cache)} for {cache_tokens:,} tokens,"
        f" journal {_gib(memory.journal)}, workspace {_gib(memory.workspace)},"
        f" gradients {_gib(memory.training)}, adapters {_gib(guests)}{reserve};"
        f" bound {_gib(memory.resident_bound)} resident; {_gib(free)} free"
    )


def cache_tokens_that_fit(
    info: ModelInfo,
    blocks: int,
    precision: Precision,
    free: int,
    device: str = "cpu",
) -> int:
    """Cache tokens for a span of `blocks` when `free` bytes are free: on a CPU 2,048 to 65,536, or four times
    the model's positions, so that one session of full length is within a peer's share; on a GPU all that its
    memory has room for.

    On a CPU caches get a share of the memory that the weights leave, so that they do not fill a machine; but
    at least the usual number of tokens where these fit.  The workspace for so many tokens fits too, and on a
    CPU their journal.
    """
    on_gpu, most = has_own_memory(device), MAX_CACHE_TOKENS
    if info.max_position < UNBOUNDED_POSITIONS:
        most = max(most, int(info.max_position / USUAL.cache_share_per_peer))
    token_bytes = info.kv_bytes_per_token_per_block(precision.caches) * blocks
    if not token_bytes:
        return most  # convolutions alone: nothing grows with the tokens
    weights = blocks * info.block_bytes(precision.dtype, precision.quantize)
    usable = usable_bytes(info, precision, device, free)
    training = _besides_cache(info, blocks, precision, free) if on_gpu else 0
    usual = workspace_bytes(info, precision, USUAL_CACHE_TOKENS, device=device)
    room = usable - weights - training - usual
    share = 1.0 if on_gpu else CACHE_SHARE
    tokens = int(max(share * room, min(room, USUAL_CACHE_TOKENS * token_bytes)) // token_bytes)

    def fits(tokens: int) -> bool:
        workspace = workspace_bytes(info, precision, tokens, device=device)
        needed = weights + training + tokens * token_bytes + workspace
        journal = 0 if on_gpu else tokens * _journal_bytes(info)
        return needed + journal <= usable

    most = max(most, tokens) if on_gpu else most
    least = min(USUAL_CACHE_TOKENS, tokens)
    candidates = range(least, min(most, tokens) + 1)
    fitting = bisect.bisect_left(candidates, True, key=lambda tokens: not fits(tokens))
    return max(MIN_CACHE_TOKENS, min(most, least + max(0, fitting - 1)))


def _besides_cache(info: ModelInfo, blocks: int, precision: Precision, free: int) -> int:
    """Bytes of a GPU's memory for activations of long backwards and for the adapters of guests."""
    largest = _largest_training(info, blocks, precision, USUAL.max_step_tokens)
    training = min(MAX_TRAINING_BYTES, largest, int(DEVICE_TRAINING_SHARE * free))
    return training + adapter_bytes(info, blocks, precision, USUAL)


def journal_tokens_that_fit(info: ModelInfo, cache_tokens: int, device: str, free: int) -> int:
    """The default size of the journal, in tokens: as many as the cache holds.

    free: bytes of the machine's memory.  Where the cache is in a device's memory, the journal takes no larger
    share of the machine's memory than a cache would.
    """
    if not has_own_memory(device):
        return cache_tokens
    fitting = int(MEMORY_SHARE * CACHE_SHARE * free) // _journal_bytes(info)
    return max(MIN_CACHE_TOKENS, min(cache_tokens, fitting))


def _journal_bytes(info: ModelInfo) -> int:
    """Bytes of one token, in fp32."""
    return info.hidden_size * 4


def blocks_that_fit(
    info: ModelInfo, precision: Precision, cache_tokens: int | None, free: int, device: str = "cpu"
) -> int:
    """The largest number of blocks that fits with its caches, up to the whole model; 0 if none does.

    cache_tokens: None for the usual number, or for the smallest where no block would fit with that.
    """
    if cache_tokens is None:
        usual = blocks_that_fit(info, precision, USUAL_CACHE_TOKENS, free, device)
        return usual or blocks_that_fit(info, precision, MIN_CACHE_TOKENS, free, device)
    usable = usable_bytes(info, precision, device, free)
    left = usable - workspace_bytes(info, precision, cache_tokens, device=device)
    if has_own_memory(device):
        left -= _besides_cache(info, info.blocks, precision, free)
    one = memory_needed(info, 1, precision.dtype, cache_tokens, precision.quantize, precision.caches)
    return max(0, min(info.blocks, int(left // one)))


def check_fits(
    info: ModelInfo,
    blocks: int,
    precision: Precision,
    cache_tokens: int,
    free: int,
    step_tokens: int = USUAL.max_step_tokens,
    device: str = "cpu",
) -> int:
    """The bytes that a span needs, its caches and workspace included.

    Raises ConfigError if `free` bytes are too few; on a GPU if they leave no reserve (`reserved_bytes`).
    """
    dtype, quantize = precision.dtype, precision.quantize
    needed = memory_needed(info, blocks, dtype, cache_tokens, quantize, precision.caches)
    needed += workspace_bytes(info, precision, cache_tokens, step_tokens, device)
    reserve = reserved_bytes(info, precision, device, free)
    if needed + reserve > free:
        fit = blocks_that_fit(info, precision, cache_tokens, free, device)
        kept = dtype if quantize == "none" else quantize
        beside = f" and {_gib(reserve)} beside them" if reserve else ""
        raise ConfigError(
            f"{blocks} blocks of {info.name} as {kept} with {cache_tokens} cache tokens need"
            f" {_gib(needed)}{beside}, {_gib(free)} are free: {fit} blocks would fit"
        )
    return needed


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
