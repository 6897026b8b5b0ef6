"""The configs whose model `node.model.llama.modules` computes.

transformers, without which a node starts two seconds sooner, knows many settings and their defaults.
`config_of` takes a config only where each setting that counts is said and is a usual one; of every other
one it answers None, and the library computes the model or says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

# Biases of queries, keys and values; of the output; norms of queries and keys.
# None: as `attention_bias` says.
_KINDS: dict[str, tuple[bool | None, bool | None, bool]] = {
    "llama": (None, None, False),
    "mistral": (False, False, False),
    "qwen2": (True, False, False),
    "qwen3": (None, None, True),
}
_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip
_ROPE: dict[str, tuple[str, ...]] = {
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass
class LlamaConfig:
    """A model's sizes and settings, under the library's names."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: dict[str, Any]
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_norms: bool
    layer_types: list[str] | None
    hidden_act: str = "silu"
    sliding_window: int | None = None
    gradient_checkpointing: bool = False
    attribute_map: ClassVar[Mapping[str, str]] = {}
    _attn_implementation: ClassVar[str] = "sdpa"


def config_of(config: Mapping[str, Any]) -> LlamaConfig | None:
    """The config.json of a model that our own modules compute; None: the library must."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _KINDS:
        return None
    sizes = {name: config.get(name) for name in _SIZES}
    if not all(type(size) is int and 0 < size < 1 << 31 for size in sizes.values()):
        return None
    hidden, heads, key_heads = (
        config[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    head_dim = config.get("head_dim") or (None if kind == "qwen3" else hidden // heads)
    flags = {name: config.get(name, False) for name in ("tie_word_embeddings", "attention_bias", "mlp_bias")}
    eps, rope = config.get("rms_norm_eps"), _rope_of(config)
    usual = (
        type(head_dim) is int and 0 < head_dim < 1 << 16 and head_dim % 2 == 0
        and hidden % heads == 0 and heads % key_heads == 0
        and type(eps) is float and 0 < eps < 1
        and config.get("hidden_act") == "silu"
        and all(type(flag) is bool for flag in flags.values())
        and "_attn_implementation" not in config and "attn_implementation" not in config
        and _sees_all(config, kind)
    )  # fmt: skip
    if not usual or rope is None:
        return None
    into, out, norms = _KINDS[kind]
    bias = flags["attention_bias"]
    return LlamaConfig(
        model_type=kind,
        **{name: config[name] for name in _SIZES},
        head_dim=cast(int, head_dim),
        rms_norm_eps=cast(float, eps),
        rope_parameters=rope,
        tie_word_embeddings=flags["tie_word_embeddings"],
        qkv_bias=bias if into is None else into,
        output_bias=bias if out is None else out,
        mlp_bias=flags["mlp_bias"] if kind == "llama" else False,
        head_norms=norms,
        layer_types=["full_attention"] * config["num_hidden_layers"] if kind.startswith("qwen") else None,
    )


def _sees_all(config: Mapping[str, Any], kind: str) -> bool:
    """Whether each position sees all before it, in every block."""
    if kind == "mistral":
        return "sliding_window" in config and config["sliding_window"] is None
    types = config.get("layer_types")
    if kind == "llama" and config.get("sliding_window") is not None:
        return False
    if types is not None:
        whole = ["full_attention"] * config["num_hidden_layers"]
        if types != whole or not kind.startswith("qwen"):
            return False
    return config.get("use_sliding_window", False) is False


def _rope_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rotary settings (arXiv:2104.09864) as the library keeps them; None for others than _ROPE's."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or (config.get("rope_scaling") and config.get("rope_parameters")):
        return None
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE:
        return None
    values = {"rope_theta": given.get("rope_theta", config.get("rope_theta"))}
    values |= {name: given.get(name) for name in _ROPE[kind]}
    if not given.keys() <= {*values, "rope_type", "type"} or "partial_rotary_factor" in config:
        return None
    if not all(type(value) in (int, float) and 0 < value < float("inf") for value in values.values()):
        return None
    return {"rope_type": kind, **values}
