"""What fits on a machine, and how it is shared, are sums."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from node.config import ConfigError
from node.model.blocks.parts import PART_POSITIONS
from node.model.checkpoint.info import UNBOUNDED_POSITIONS, ModelInfo
from node.serving import memory
from node.serving.memory import Precision
from routing.names import ModelId, Revision
from tensor_codec.limits import Limits

MIB = 2**20
PLAIN = Precision("float32")
INT8 = Precision("float32", "int8")


def model(blocks: int = 10) -> ModelInfo:
    """Blocks of 1 MiB in float32, all of it in 1,024 rows, and 1 KiB of cache for each token and block."""
    values, rows = (MIB // 4,) * blocks, (1024,) * blocks
    return ModelInfo(ModelId("m"), Revision("r"), "llama", blocks, 64, 96, 2048, values, 256, 0, values, rows)


def test_as_many_blocks_fit_as_their_weights_caches_and_workspace_leave_room_for():
    # 2,048 cache tokens of 1 KiB make 2 MiB a block beside its 1 MiB; 80 % of the memory is used
    room = memory.workspace_bytes(model(), PLAIN, 2048)
    free = int((24 * MIB + room) / memory.MEMORY_SHARE) + 1
    assert memory.blocks_that_fit(model(), PLAIN, 2048, free) == 8
    assert memory.blocks_that_fit(model(), PLAIN, 2048, free - MIB) == 7
    assert memory.blocks_that_fit(model(), PLAIN, 2048, 1000 * MIB) == 10
    assert memory.blocks_that_fit(model(), PLAIN, 2048, 3 * MIB) == 0


def test_blocks_leave_room_for_the_usual_cache_and_a_small_machine_for_the_least():
    for tokens in (memory.USUAL_CACHE_TOKENS, memory.MIN_CACHE_TOKENS):
        room = memory.workspace_bytes(model(), PLAIN, tokens)
        free = int((MIB + tokens * 1024 + room) / memory.MEMORY_SHARE) + 1
        assert memory.blocks_that_fit(model(), PLAIN, None, free) == 1
    assert memory.blocks_that_fit(model(), PLAIN, None, 3 * MIB) == 0


def test_in_eight_bits_more_blocks_fit_and_the_cache_is_as_large_as_before():
    info, free = model(40), 40 * MIB
    plain = memory.blocks_that_fit(info, PLAIN, 2048, free)
    packed = memory.blocks_that_fit(info, INT8, 2048, free)
    assert packed > plain > 0
    # a quarter of the weights and four bytes for each of 1,024 rows
    assert memory.memory_of(info, 4, INT8, 2048).weights == 4 * (MIB // 4 + 4096)
    assert memory.memory_of(info, 4, INT8, 2048).cache == 8 * MIB
    assert memory.memory_of(info, 4, Precision("bfloat16", activations="float32"), 2048).cache == 8 * MIB
    assert memory.memory_of(info, 4, Precision("bfloat16"), 2048).cache == 4 * MIB


def test_a_smaller_cache_has_room_for_more_tokens():
    info, small = model(40), replace(INT8, cache="bfloat16")
    assert memory.memory_of(info, 4, small, 2048).cache == 4 * MIB
    tokens = [memory.cache_tokens_that_fit(info, 40, each, 3000 * MIB) for each in (INT8, small)]
    assert tokens[1] > 1.9 * tokens[0]
    assert memory.check_fits(info, 4, small, 2048, 1000 * MIB) < memory.check_fits(
        info, 4, INT8, 2048, 1000 * MIB
    )
    blocks = [memory.blocks_that_fit(info, each, 8192, 250 * MIB) for each in (INT8, small)]
    assert blocks[1] > blocks[0]


def test_a_span_that_does_not_fit_says_how_many_blocks_would():
    room = memory.workspace_bytes(model(), PLAIN, 2048)
    free = room + 12 * MIB
    with pytest.raises(ConfigError, match=r"10 blocks of m as float32 .* 2 blocks would fit"):
        memory.check_fits(model(), 10, PLAIN, 2048, int((8 * MIB + room) / memory.MEMORY_SHARE))
    with pytest.raises(ConfigError, match=r"10 blocks of m as int8 "):
        memory.check_fits(model(), 10, INT8, 2048, free)
    assert memory.check_fits(model(), 4, PLAIN, 2048, free) == free


def test_cache_tokens_follow_the_memory_that_the_weights_leave_between_two_bounds():
    # 10 KiB a token; a quarter of what is left, but the usual number where that fits
    room = memory.workspace_bytes(model(), PLAIN, memory.USUAL_CACHE_TOKENS)
    weights = 10 * MIB

    def fits(left: int, device: str = "cpu") -> int:
        free = int((left + weights + room) / memory.MEMORY_SHARE) + 1
        return memory.cache_tokens_that_fit(model(), 10, PLAIN, free, device=device)

    assert memory.cache_tokens_that_fit(model(), 10, PLAIN, 0) == memory.MIN_CACHE_TOKENS
    assert fits(50 * MIB) == 5120
    assert fits(200 * MIB) == memory.USUAL_CACHE_TOKENS
    assert fits(400 * MIB) == 10_240
    assert fits(10**12) == memory.MAX_CACHE_TOKENS


GIB = 2**30


def llama_3_8b() -> ModelInfo:
    """The sizes of its blocks: 218 million numbers in 28,672 + 6,144 + 2 * 4,096 rows."""
    matrices, rows = 218_103_808, 28_672 + 6_144 + 2 * 4_096
    return ModelInfo(
        ModelId("llama-3-8b"), Revision("r"), "llama", 32, 4096, 128_256, 8192, (matrices + 8192,) * 32, 2048,
        0, (matrices,) * 32, (rows,) * 32,
    )  # fmt: skip


@pytest.mark.parametrize("free", [16 * GIB, 24 * GIB, 40 * GIB, 80 * GIB, 141 * GIB])
@pytest.mark.parametrize(
    "precision", [Precision("bfloat16", "int8"), Precision("bfloat16"), Precision("float16")]
)
def test_a_gpu_s_cache_takes_what_the_card_has_and_leaves_a_reserve(free, precision):
    info = llama_3_8b()
    blocks = memory.blocks_that_fit(info, precision, None, free, "cuda:1")
    tokens = memory.cache_tokens_that_fit(info, blocks, precision, free, "cuda:1")
    bound = memory.memory_of(info, blocks, precision, tokens, device="cuda:1")
    training = memory.training_bytes_that_fit(info, blocks, precision, tokens, free, device="cuda:1")
    reserve = memory.reserved_bytes(info, precision, "cuda:1", free)
    assert reserve >= GIB + free // 20
    taken = bound.needed + bound.adapters + training + reserve
    assert taken <= free
    if blocks == 32 and free >= 40 * GIB:
        assert tokens > memory.MAX_CACHE_TOKENS
        more = memory.memory_of(info, blocks, precision, tokens + 1024, device="cuda:1")
        largest = memory.training_bytes_that_fit(info, blocks, precision, 2048, free, device="cuda:1")
        assert more.needed + bound.adapters + min(largest, free // 16) + reserve > free
    memory.check_fits(info, blocks, precision, tokens, free, device="cuda:1")


def test_a_span_that_leaves_a_gpu_no_reserve_does_not_fit_and_the_line_says_so():
    info, precision = llama_3_8b(), Precision("bfloat16", "int8")
    free = 12 * GIB
    needed = memory.check_fits(info, 32, precision, 16_384, 2 * free)
    memory.check_fits(info, 32, precision, 16_384, needed)  # the CPU takes it to the last byte
    with pytest.raises(ConfigError, match=r"need [\d.]+ GiB and 2\.\d+ GiB beside them, .* blocks would fit"):
        memory.check_fits(info, 32, precision, 16_384, needed, device="cuda")
    reserve = memory.reserved_bytes(info, precision, "cuda", needed)
    assert reserve > memory.reserved_bytes(info, precision, "cuda", 0) >= GIB
    assert memory.reserved_bytes(info, precision, "cpu", free) == 0


def test_what_a_kernel_less_product_unpacks_is_a_part_of_the_reserve():
    info = llama_3_8b()
    plain = memory.reserved_bytes(info, Precision("bfloat16"), "cuda", 0)
    assert memory.reserved_bytes(info, Precision("bfloat16", "int8"), "cuda", 0) == plain + 2 * 218_103_808


def test_scores_of_a_chunk_take_no_memory_where_attention_keeps_none():
    info = replace(llama_3_8b(), max_position=131_072)
    half = Precision("bfloat16")
    here, there = (memory.workspace_bytes(info, half, 131_072, device=device) for device in ("cpu", "cuda"))
    assert here - there == 256 * 131_072 * 64 * 4
    # Copied are one session's keys and values; attention in float32 has them for all heads.
    more = [memory.workspace_bytes(info, half, tokens, device="cuda") for tokens in (2**17, 2**20)]
    assert more[0] == more[1]
    wide = memory.workspace_bytes(info, PLAIN, 131_072, device="cuda")
    assert wide - 2 * there == 131_072 * 2 * 4 * (4096 - 1024)
    library = replace(info, architecture="gemma2")  # its blocks are the library's
    assert memory.workspace_bytes(library, half, 131_072, device="cuda") == here


def test_on_a_large_machine_the_cache_is_as_large_as_makes_a_whole_session_a_peer_s_share():
    for positions, tokens in ((16_384, 65_536), (131_072, 524_288)):
        info = replace(model(), max_position=positions)
        assert memory.cache_tokens_that_fit(info, 10, PLAIN, 10**12) == tokens
    unbounded = replace(model(), max_position=UNBOUNDED_POSITIONS)
    assert memory.cache_tokens_that_fit(unbounded, 10, PLAIN, 10**12) == memory.MAX_CACHE_TOKENS


@pytest.mark.parametrize("blocks", [1, 4, 60])
@pytest.mark.parametrize("free", [2 * 10**9, 3 * 10**9, 10**11])
def test_a_cache_for_long_sessions_leaves_room_for_their_scores_and_for_the_journal(free, blocks):
    info = replace(model(60), max_position=131_072, hidden_size=1024)
    tokens = memory.cache_tokens_that_fit(info, blocks, PLAIN, free)
    bound = memory.memory_of(info, blocks, PLAIN, tokens)
    assert tokens >= memory.USUAL_CACHE_TOKENS
    assert bound.needed == memory.check_fits(info, blocks, PLAIN, tokens, free)
    assert bound.needed + bound.journal <= memory.MEMORY_SHARE * free
    if blocks == 1 and free < 10**10:  # what ends it here is the scores, not the cache's own share
        more = memory.memory_of(info, blocks, PLAIN, tokens + 1)
        assert more.needed + more.journal > memory.MEMORY_SHARE * free


def test_a_journal_beside_a_gpu_follows_the_memory_of_the_host():
    info = replace(model(), hidden_size=4096)
    assert memory.journal_tokens_that_fit(info, 524_288, "cpu", 0) == 524_288
    assert memory.journal_tokens_that_fit(info, 524_288, "cuda", 2**30) == 13_107  # a fifth at 16 KiB
    assert memory.journal_tokens_that_fit(info, 524_288, "cuda", 0) == memory.MIN_CACHE_TOKENS
    assert memory.journal_tokens_that_fit(info, 4096, "cuda", 2**40) == 4096


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("free", [10**8, 10**9, 10**10, 10**12])
def test_activations_of_a_backward_take_what_the_span_leaves_and_no_more_than_they_can_use(free, device):
    info = model(60)
    blocks = memory.blocks_that_fit(info, PLAIN, None, free)
    tokens = memory.cache_tokens_that_fit(info, blocks, PLAIN, free, device)
    found = memory.training_bytes_that_fit(info, blocks, PLAIN, tokens, free, device=device)
    bound = replace(memory.memory_of(info, blocks, PLAIN, tokens, device=device), training=found)
    assert 0 <= found <= memory.MAX_TRAINING_BYTES
    assert found <= 2048 * blocks * memory.LARGEST_TRAINED_VALUES * info.hidden_size * 4
    if found:
        assert bound.needed + (bound.journal if device == "cpu" else 0) <= memory.usable_bytes(
            info, PLAIN, device, free
        )
    assert bound.needed == memory.memory_of(info, blocks, PLAIN, tokens, device=device).needed + found
    if free >= 10**9 and device == "cpu":
        assert found > 0
    if free == 10**12:
        assert found == 2048 * 60 * memory.LARGEST_TRAINED_VALUES * info.hidden_size * 4


def test_a_large_model_holds_no_more_activations_than_the_limit():
    info = replace(model(60), hidden_size=8192)
    assert memory.training_bytes_that_fit(info, 60, PLAIN, 2048, 10**12) == memory.MAX_TRAINING_BYTES
    assert memory.training_bytes_that_fit(info, 60, PLAIN, 2048, 10**9) == 0


def test_requests_that_are_longer_than_usual_have_room_for_their_scores():
    info = replace(model(), max_position=131_072)
    usual = memory.workspace_bytes(info, PLAIN, 2048)
    assert memory.workspace_bytes(info, PLAIN, 2048, step_tokens=2048) == usual
    training = 8192 * memory.TRAINED_VALUES * 64 * 4
    assert memory.workspace_bytes(info, PLAIN, 2048, step_tokens=8192) == training + 8192 * 8192 * 4


@pytest.mark.parametrize("free", [10**8, 3 * 10**8, 10**9, 10**10])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_what_is_chosen_fits(free, device, quantize):
    info, precision = model(60), Precision("float32", quantize)
    blocks = memory.blocks_that_fit(info, precision, None, free)
    tokens = memory.cache_tokens_that_fit(info, blocks, precision, free, device)
    assert blocks > 0
    assert tokens >= memory.MIN_CACHE_TOKENS
    assert memory.check_fits(info, blocks, precision, tokens, free) <= free


def test_the_workspace_holds_the_largest_of_what_is_done_one_after_the_other():
    info = replace(model(), max_position=4096)
    trained = PART_POSITIONS * memory.TRAINED_VALUES * 64
    assert memory.workspace_bytes(info, PLAIN, 2048) == 4 * trained
    assert memory.workspace_bytes(info, Precision("bfloat16"), 2048) == 2 * trained
    copied, scores = 1024 * 100_000, 256 * 4096 * 1 * 4
    answers = 256 * (1024 + 4 * 64) * 4
    assert memory.workspace_bytes(info, PLAIN, 100_000) == copied + scores + answers
    large = replace(info, block_values=(10**8,) * 10)
    assert memory.workspace_bytes(large, INT8, 2048) == 4 * 10**8  # while it is quantised
    assert memory.workspace_bytes(large, PLAIN, 2048) < 10**8
    prepared = replace(large, quantize="int8")
    assert memory.workspace_bytes(prepared, INT8, 2048) < 10**8


def test_the_bound_on_resident_memory_counts_everything_that_peers_can_fill():
    limits = replace(
        Limits(), max_connections=10, max_unread_bytes_per_connection=MIB, max_compute_streams=3,
        max_frame_bytes=2 * MIB, max_prompt_bytes=MIB, max_large_frames=2, max_large_steps=1,
        max_streams=16, max_steps_in_flight=2, adapter_bytes=16 * MIB, sum_bytes=24 * MIB,
    )  # fmt: skip
    bound = memory.memory_of(model(), 4, PLAIN, 2048, limits=limits, process=400 * MIB)
    room = memory.workspace_bytes(model(), PLAIN, 2048)
    assert (bound.weights, bound.cache, bound.workspace) == (4 * MIB, 8 * MIB, room)
    held = memory.peer_bytes(limits)
    assert bound.network == held.total == sum(asdict(held).values())
    assert held.connections == 10 * (MIB + MIB // 2)
    assert (held.large_frames, held.requests, held.prompts) == (4 * MIB, 6 * MIB, 2 * MIB)
    assert bound.needed == memory.check_fits(model(), 4, PLAIN, 2048, 10**9)
    journal = 2048 * model().hidden_size * 4
    assert (bound.journal, bound.answers) == (journal, 2 * journal)
    # Four times a quarter of the adapters, and the inputs of a part's linears.
    trained = 16 * MIB + 4 * PART_POSITIONS * memory.TRAINED_VALUES * 64
    assert bound.trained == trained
    guests = (16 + 24) * MIB + trained  # their adapters, and the sums of gradients
    assert bound.resident_bound == (400 + 256 + 4 + 8) * MIB + guests + room + 3 * journal + held.total
    on_gpu = memory.memory_of(model(), 4, PLAIN, 2048, limits=limits, process=400 * MIB, device="cuda")
    assert on_gpu.needed == bound.needed
    assert on_gpu.resident_bound == (400 + 256 + 24) * MIB + trained + 3 * journal + held.total
    none = memory.memory_of(model(), 4, PLAIN, 2048, journal_tokens=0)
    assert none.journal == 0


def test_adapters_of_guests_get_an_eighth_of_the_weights_within_bounds_and_sums_twice_that():
    info, limits = model(), Limits()
    least = memory.adapter_bytes(info, 4, PLAIN, limits)
    assert least == memory.MIN_ADAPTER_BYTES
    assert memory.adapter_bytes(info, 4, PLAIN, replace(limits, adapter_bytes=MIB)) == MIB
    many = 8 * 8 * least // info.block_bytes("float32", "none")
    assert memory.adapter_bytes(info, many, PLAIN, limits) == limits.adapter_bytes
    assert memory.adapter_bytes(info, many // 4, PLAIN, limits) == 2 * least
    assert memory.sum_bytes(least, limits) == 2 * least
    assert memory.sum_bytes(limits.adapter_bytes, limits) == limits.sum_bytes


def test_tapes_get_half_of_the_memory_for_activations_and_no_more_than_their_limit():
    for training, tapes in ((0, 0), (1001, 500), (8 * MIB, 4 * MIB), (80 * MIB, 10 * MIB)):
        assert memory.tape_bytes_of(training, Limits(tape_bytes=10 * MIB)) == tapes
    assert memory.tape_bytes_of(80 * MIB, Limits(tape_bytes=0)) == 0


def test_the_start_log_says_it_in_one_line():
    bound = memory.Memory(
        2**30 // 8, 2**29, 2**28, 2**29, 2**30, 2**27, training=2**28, adapters=2**27, sums=2**28
    )
    assert memory.in_one_line(bound, model(), 7, 16_384, 20 * 2**30) == (
        "7 of 10 blocks: weights 0.12 GiB, KV cache 0.50 GiB for 16,384 tokens, journal 0.12 GiB,"
        " workspace 0.25 GiB, gradients 0.25 GiB, adapters 0.38 GiB; bound 3.38 GiB resident; 20.00 GiB free"
    )


def test_a_process_knows_what_it_takes():
    assert 10 * MIB < memory.process_bytes() < 10**11
