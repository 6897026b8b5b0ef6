"""The memory that a model takes to serve, from its config and its tensors' headers: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from node.config import ConfigError
from node.model.blocks.rope import check_rope, stretched
from node.model.checkpoint.architecture import architecture_of
from node.model.checkpoint.folder import ModelFolder
from node.model.checkpoint.packed import packing_of, values_of
from routing.names import ModelId, Revision
from tensor_codec.blocks import MAX_BLOCKS
from tensor_codec.span_spec import QUANTIZE

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

MOST = 1 << 31  # of a size in a config; a sanity bound
_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "n_embed")
_MAX_POSITION = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
UNSAID_POSITIONS = 2048  # where a config names no length, and its positions have an end
UNBOUNDED_POSITIONS = 1 << 24  # alibi has no end, only caches have: the most that a message can name

SCALE_SUFFIX = "_scale"  # of the name of the tensor that has the scales of an int8 matrix
TRANSPOSED = ("gpt2",)  # keep their matrices as [in, out] (transformers' Conv1D), unless they are prepared
_GATES = ("gate", "router")  # choose experts: small, and an error can change the choice

_FUSED = ("query_key_value", "c_attn", "Wqkv", "qkv_proj")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model's sizes.

    block_values: numbers in each block's weights.  kv_values: numbers that the cache of the largest block
    keeps for a token.  end_values: numbers in embedding, norm and head.
    matrix_values, matrix_rows: in each block, the numbers that are quantised, and the number of their rows.
    quantize: "int8" for a prepared model, else "none".
    """

    name: ModelId
    revision: Revision
    architecture: str
    blocks: int
    hidden_size: int
    vocab_size: int
    max_position: int
    block_values: tuple[int, ...]
    kv_values: int
    end_values: int
    matrix_values: tuple[int, ...] = ()
    matrix_rows: tuple[int, ...] = ()
    quantize: str = "none"

    def block_bytes(self, dtype: str = "float32", quantize: str = "none") -> int:
        """Bytes of the largest block's weights.  dtype: of values that are not quantised."""
        item = _item_bytes(dtype)
        kept = self.quantize if quantize == "none" else quantize
        if kept not in QUANTIZE:
            raise ConfigError(f"quantization {kept!r} is not one of {', '.join(QUANTIZE)}")
        if kept == "none" or not self.matrix_values:
            return max(self.block_values) * item
        return max(
            (values - packed) * item + _packed_bytes(kept, packed, rows)
            for values, packed, rows in zip(
                self.block_values, self.matrix_values, self.matrix_rows, strict=True
            )
        )

    def kv_bytes_per_token_per_block(self, dtype: str = "float32") -> int:
        """Bytes that a block's cache takes for each token.  dtype: of the cache."""
        return self.kv_values * _item_bytes(dtype)


def _packed_bytes(quantize: str, values: int, rows: int) -> int:
    """Bytes of matrices: int8 with a float32 for each row; nf4 with a byte and a little for every 64."""
    if quantize == "int8":
        return values + 4 * rows
    return values // 2 + values // 64 + values // 4096


def is_matrix(rest: str, shape: tuple[int, ...]) -> bool:
    """Whether this tensor of a block is quantised: it is the matrix of a linear layer.

    rest: its name after the block's number.
    """
    parts = rest.split(".")
    return len(shape) == 2 and len(parts) > 1 and parts[-1] == "weight" and parts[-2] not in _GATES


def read_info(folder: ModelFolder) -> ModelInfo:
    """The sizes of a model.  Raises ConfigError for an unknown architecture or a config without them."""
    config = folder.config
    architecture = architecture_of(config.get("model_type"))
    check_rope(config, folder.path / "config.json")
    blocks = _integer(folder, _BLOCKS, most=MAX_BLOCKS)
    hidden = _integer(folder, _HIDDEN)
    packing = packing_of(folder)
    turned = architecture.model_type in TRANSPOSED and folder.quantize == "none"
    shapes: list[dict[str, tuple[int, ...]]] = [{} for _ in range(blocks)]
    values, matrices, rows, ends = [0] * blocks, [0] * blocks, [0] * blocks, 0
    for name, entry in folder.tensors.items():
        place = architecture.block_of(name)
        if place is None:
            ends += values_of(name, entry, packing)
        elif place[0] < blocks and not place[1].endswith(SCALE_SUFFIX):
            values[place[0]] += values_of(name, entry, packing)
            shapes[place[0]][place[1]] = entry.shape
            if is_matrix(place[1], entry.shape):
                matrices[place[0]] += entry.values
                rows[place[0]] += entry.shape[1 if turned else 0]
    if not all(values):
        raise ConfigError(f"{folder.path} has no tensor of block {values.index(0)}")
    return ModelInfo(
        folder.name,
        folder.revision,
        architecture.model_type,
        blocks,
        hidden,
        _integer(folder, ("vocab_size",)),
        stretched(config, _max_position(folder, architecture.model_type)),
        tuple(values),
        max(_kv_values(block, config, hidden) for block in shapes),
        ends,
        tuple(matrices),
        tuple(rows),
        folder.quantize,
    )


def memory_needed(
    info: ModelInfo,
    n_blocks: int,
    dtype: str,
    cache_tokens: int,
    quantize: str = "none",
    cache: str | None = None,
) -> int:
    """Bytes for the weights of `n_blocks` blocks and a cache of `cache_tokens` tokens in each.

    cache: the dtype of caches, where it is not `dtype` (see `cache_dtype_for` in
    node/model/weights/quantize.py).  The process's own memory (about 400 MiB with torch, transformers and
    libp2p) comes on top.
    """
    a_token = info.kv_bytes_per_token_per_block(cache or dtype)
    return n_blocks * (info.block_bytes(dtype, quantize) + cache_tokens * a_token)


def _kv_values(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], hidden: int) -> int:
    """Numbers that one block caches for a token, from the shapes of its projections.

    The shapes are right even if a config omits a default.  0 for a block without attention.
    """
    attention = {
        name.split(".")[-2]: shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and "att" in name.split(".")[0]
    }
    if "kv_a_proj_with_mqa" in attention:  # multi-head latent attention caches the latents
        return attention["kv_a_proj_with_mqa"][0]
    if "k_proj" in attention and "v_proj" in attention:
        return attention["k_proj"][0] + attention["v_proj"][0]
    if config.get("new_decoder_architecture"):  # falcon repeats keys for each query head, then caches
        return 2 * hidden
    for name in _FUSED:
        if name in attention:
            queries = attention["o_proj"][1] if "o_proj" in attention else hidden
            return max(attention[name]) - queries  # gpt2 keeps its matrices transposed
    return 0


def _max_position(folder: ModelFolder, model_type: str) -> int:
    """Positions that the model can compute with; with alibi, a config's number is only the trained length.

    MPT's number is a bound: the library makes a bias of that length.
    """
    if model_type == "bloom" or (model_type == "falcon" and folder.config.get("alibi")):
        return UNBOUNDED_POSITIONS
    return _integer(folder, _MAX_POSITION, UNSAID_POSITIONS)


def _integer(folder: ModelFolder, keys: tuple[str, ...], default: int | None = None, most: int = MOST) -> int:
    """The first of these keys that the config has, 1 to `most`."""
    for key in keys:
        value = folder.config.get(key)
        if value is None:
            continue
        if type(value) is not int or not 0 < value <= most:
            shown = repr(value) if len(repr(value)) <= 40 else repr(value)[:37] + "..."
            raise ConfigError(
                f"{folder.path / 'config.json'}: {key} is {shown}, a whole number from 1 to {most} is allowed"
            )
        return value
    if default is None:
        raise ConfigError(f"{folder.path / 'config.json'} has no {keys[0]}")
    return default


def _item_bytes(dtype: str) -> int:
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]
