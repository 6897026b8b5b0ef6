"""What a model would cost to serve, from its config and its tensors' headers: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from node.config import ConfigError
from node.model.architecture import architecture_of
from node.model.folder import ModelFolder
from routing.names import ModelId, Revision

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}

_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "n_embed")
_MAX_POSITION = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_UNBOUNDED_POSITIONS = 2048  # alibi has no limit; its models were trained at this length

_FUSED = ("query_key_value", "c_attn", "Wqkv", "qkv_proj")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model's sizes.

    block_values: numbers in each block's weights.  kv_values: numbers that a block's cache keeps
    for a token, in the block that keeps most.  end_values: numbers in embedding, norm and head.
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

    def block_bytes(self, dtype: str = "float32") -> int:
        """Bytes of the largest block's weights."""
        return max(self.block_values) * _item_bytes(dtype)

    def kv_bytes_per_token_per_block(self, dtype: str = "float32") -> int:
        """Bytes that a block's cache takes for each token; int8 weights have a bfloat16 cache."""
        return self.kv_values * _item_bytes("bfloat16" if dtype == "int8" else dtype)


def read_info(folder: ModelFolder) -> ModelInfo:
    """The sizes of a model.  Raises ConfigError for an unknown architecture or a config without them."""
    config = folder.config
    architecture = architecture_of(config.get("model_type"))
    blocks = _integer(folder, _BLOCKS)
    hidden = _integer(folder, _HIDDEN)
    shapes: list[dict[str, tuple[int, ...]]] = [{} for _ in range(blocks)]
    values, ends = [0] * blocks, 0
    for name, entry in folder.tensors.items():
        place = architecture.block_of(name)
        if place is None:
            ends += entry.values
        elif place[0] < blocks:
            values[place[0]] += entry.values
            shapes[place[0]][place[1]] = entry.shape
    if not all(values):
        raise ConfigError(f"{folder.path} has no tensor of block {values.index(0)}")
    return ModelInfo(
        folder.name,
        folder.revision,
        architecture.model_type,
        blocks,
        hidden,
        _integer(folder, ("vocab_size",)),
        _integer(folder, _MAX_POSITION, _UNBOUNDED_POSITIONS),
        tuple(values),
        max(_kv_values(block, config, hidden) for block in shapes),
        ends,
    )


def memory_needed(info: ModelInfo, n_blocks: int, dtype: str, cache_tokens: int) -> int:
    """Bytes for the weights of `n_blocks` blocks and a cache of `cache_tokens` tokens in each.

    What the process takes without them (about 400 MiB with torch, transformers and libp2p) comes on top.
    """
    return n_blocks * (info.block_bytes(dtype) + cache_tokens * info.kv_bytes_per_token_per_block(dtype))


def _kv_values(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], hidden: int) -> int:
    """Numbers that one block caches for a token, from the shapes of its projections.

    The shapes are right where a config leaves a default unsaid.  0 for a block without attention.
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


def _integer(folder: ModelFolder, keys: tuple[str, ...], default: int | None = None) -> int:
    """The first of these keys that the config has."""
    for key in keys:
        value = folder.config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    if default is None:
        raise ConfigError(f"{folder.path / 'config.json'} has no {keys[0]}")
    return default


def _item_bytes(dtype: str) -> int:
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]
