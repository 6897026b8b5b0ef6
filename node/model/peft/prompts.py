"""Prompt tuning and prefix tuning in the form of peft.

PROMPT_TUNING (Lester et al., arXiv:2104.08691) is embeddings in front of the text, a matter of the client.
PREFIX_TUNING (Li and Liang, arXiv:2101.00190) is keys and values in front of every block's own, as they lie
in a cache: they take no rotary embedding, and the text begins at the position after them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from node.config import ConfigError
from node.model.peft.modules import ModelModules
from node.model.peft.tensors import AdapterTensors
from node.runtime.values import shown
from tensor_codec.adapters import MAX_VIRTUAL_TOKENS, AdapterDtype

PROMPT_TUNING, PREFIX_TUNING = "PROMPT_TUNING", "PREFIX_TUNING"
TENSOR = "prompt_embeddings"
NEW = "the adapter's config"  # where there is no folder yet


def read_prompt(
    fields: dict[str, Any],  # Any: JSON
    tensors: Mapping[str, Tensor],
    model: ModelModules,
    dtype: AdapterDtype,
    where: str,
) -> AdapterTensors:
    """A soft prompt.  Raises ConfigError."""
    tokens = _tokens(fields, where)
    prompt = _tensor(tensors, where, (tokens, model.hidden))
    return _without_sites(fields, model, dtype, prompt=prompt)


def read_prefix(
    fields: dict[str, Any],  # Any: JSON
    tensors: Mapping[str, Tensor],
    model: ModelModules,
    dtype: AdapterDtype,
    where: str,
) -> AdapterTensors:
    """A prefix.  Raises ConfigError.

    A folder has the keys and values themselves: peft writes the answers of its `prefix_projection`, and reads
    them so.
    """
    _check_takes_prefix(model, where)
    tokens, heads, size = _tokens(fields, where), model.kv_heads, model.head_dim
    for name, own in (
        ("num_attention_heads", heads),
        ("token_dim", heads * size),
        ("num_layers", model.blocks),
    ):
        if (found := fields.get(name)) is not None and found != own:
            raise ConfigError(f"{where}: {name} is {shown(found)}, the model's cache has {own}")
    flat = _tensor(tensors, where, (tokens, model.blocks * 2 * heads * size))
    prefix = flat.view(tokens, model.blocks, 2, heads, size).permute(1, 2, 0, 3, 4).contiguous()
    return _without_sites({**fields, "prefix_projection": False}, model, dtype, prefix=prefix)


def new_prompt(model: ModelModules, tokens: int, scale: float) -> AdapterTensors:
    """A soft prompt with random values.  scale: their standard deviation."""
    fields = {
        **_usual(PROMPT_TUNING, tokens, model),
        "token_dim": model.hidden,
        "prompt_tuning_init": "RANDOM",
    }
    return _without_sites(fields, model, "fp32", prompt=torch.randn(tokens, model.hidden) * scale)


def new_prefix(model: ModelModules, tokens: int, dtype: AdapterDtype = "bf16") -> AdapterTensors:
    """A prefix with random values, as peft begins: of a standard normal distribution.  Raises ConfigError."""
    _check_takes_prefix(model, NEW)
    shape = (model.blocks, 2, tokens, model.kv_heads, model.head_dim)
    return prefix_of(model, torch.randn(*shape), dtype)


def prefix_of(model: ModelModules, prefix: Tensor, dtype: AdapterDtype) -> AdapterTensors:
    """A prefix of these keys and values [blocks, 2, n, kv_heads, head_dim]."""
    tokens, size = prefix.shape[2], model.kv_heads * model.head_dim
    fields = {
        **_usual(PREFIX_TUNING, tokens, model),
        "token_dim": size,
        "num_attention_heads": model.kv_heads,
        "encoder_hidden_size": size,
        "prefix_projection": False,
    }
    return _without_sites(fields, model, dtype, prefix=prefix)


def _check_takes_prefix(model: ModelModules, where: str) -> None:
    if model.no_prefix is not None:
        raise ConfigError(f"{where}: the model takes no prefix: {model.no_prefix}")


def _usual(kind: str, tokens: int, model: ModelModules) -> dict[str, Any]:  # Any: JSON
    return {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": tokens,
        "num_layers": model.blocks,
        "num_transformer_submodules": 1,
    }


def _without_sites(
    fields: dict[str, Any],  # Any: JSON
    model: ModelModules,
    dtype: AdapterDtype,
    *,
    prompt: Tensor | None = None,
    prefix: Tensor | None = None,
) -> AdapterTensors:
    none = ((),) * model.blocks
    blocks = tuple[dict[str, tuple[Tensor, Tensor]], ...]({} for _ in none)
    return AdapterTensors(fields, model.revision, dtype, none, none, blocks, prompt=prompt, prefix=prefix)


def _tokens(fields: Mapping[str, Any], where: str) -> int:  # Any: JSON
    tokens = fields.get("num_virtual_tokens")
    if type(tokens) is not int or not 1 <= tokens <= MAX_VIRTUAL_TOKENS:
        raise ConfigError(
            f"{where}: num_virtual_tokens is {shown(tokens)}, 1 to {MAX_VIRTUAL_TOKENS} is allowed"
        )
    if (submodules := fields.get("num_transformer_submodules")) not in (None, 1):
        raise ConfigError(
            f"{where}: num_transformer_submodules is {shown(submodules)}: the model has a decoder alone"
        )
    return tokens


def _tensor(tensors: Mapping[str, Tensor], where: str, shape: tuple[int, ...]) -> Tensor:
    if set(tensors) != {TENSOR}:
        raise ConfigError(f"{where} holds {', '.join(sorted(tensors)[:3]) or 'nothing'}, {TENSOR} is needed")
    found = tensors[TENSOR]
    if tuple(found.shape) != shape:
        raise ConfigError(f"{where}: {TENSOR} is {list(found.shape)}, {list(shape)} is needed")
    return found.to(torch.float32)
