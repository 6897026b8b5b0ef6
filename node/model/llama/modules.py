"""Llama (arXiv:2302.13971) and its relatives as modules of torch, named and built as the library's are.

Steps of sessions go through `node.model.blocks.fused`, which takes these modules' weights.  What is computed
here is a pass without a session, for training, in the library's operations and order: the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from node.model.llama.config import LlamaConfig

Angles = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv:1910.07467), in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> the same shape and dtype."""
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class Rotary(nn.Module):
    """Angles of positions (arXiv:2104.09864)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.rope_type = config.rope_parameters["rope_type"]
        self.inv_freq = nn.Buffer(_frequencies(config), persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> Angles:
        """cos and sin [rows, tokens, head_dim] of positions [rows, tokens], in the dtype of x."""
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        both = torch.cat((angles, angles), dim=-1)
        return both.cos().to(dtype=x.dtype), both.sin().to(dtype=x.dtype)


def _frequencies(config: LlamaConfig) -> Tensor:
    """Radians a position of each pair of a head, float32 [head_dim / 2]; of llama3 in Llama 3.1's way."""
    rope, size = config.rope_parameters, config.head_dim
    steps = torch.arange(0, size, 2, dtype=torch.float, device="cpu")
    found: Tensor = 1.0 / (rope["rope_theta"] ** (steps / size))
    if rope["rope_type"] == "default":
        return found
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    trained = rope["original_max_position_embeddings"]
    lengths = 2 * math.pi / found
    stretched = torch.where(lengths > trained / low, found / factor, found)
    smooth = (trained / lengths - low) / (high - low)
    between = (1 - smooth) * stretched / factor + smooth * stretched
    is_between = ~(lengths < trained / high) * ~(lengths > trained / low)
    return torch.where(is_between, between, stretched)


class Attention(nn.Module):
    """Attention with grouped key heads (arXiv:2305.13245), causal."""

    def __init__(self, config: LlamaConfig, block: int) -> None:
        super().__init__()
        self.block = block
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        hidden, keys = config.hidden_size, config.num_key_value_heads * config.head_dim
        queries = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, hidden, bias=config.output_bias)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.head_norms:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, hidden: Tensor, angles: Angles, mask: Tensor | None, cache: Any) -> Tensor:
        """[rows, tokens, hidden_size] -> the same shape.  cache: with the library's `update`, or None."""
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        query, key = self.q_proj(hidden).view(shape), self.k_proj(hidden).view(shape)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)  # [rows, heads, tokens, head_dim]
        value = self.v_proj(hidden).view(shape).transpose(1, 2)
        query, key = _rotated(query, angles), _rotated(key, angles)
        if cache is not None:
            key, value = cache.update(key, value, self.block)
        answer = self._attended(query, key, value, mask)
        return cast(Tensor, self.o_proj(answer.transpose(1, 2).reshape(*hidden.shape[:-1], -1)))

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """torch's attention, with the choices of the library: a mask wants each query's own keys."""
        by_group = self.groups > 1 and mask is None and self.head_dim <= 256
        if self.groups > 1 and not by_group:
            key, value = _repeated(key, self.groups), _repeated(value, self.groups)
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=self.scaling,
            is_causal=mask is None and query.shape[2] > 1, enable_gqa=by_group,
        )  # fmt: skip


class MLP(nn.Module):
    """The gated MLP (SwiGLU, arXiv:2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape."""
        return cast(Tensor, self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x)))


class Block(nn.Module):
    """One transformer layer."""

    def __init__(self, config: LlamaConfig, block: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, block)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, angles: Angles, mask: Tensor | None, cache: Any) -> Tensor:
        """[rows, tokens, hidden_size] -> the same shape."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), angles, mask, cache)
        return hidden + cast(Tensor, self.mlp(self.post_attention_layernorm(hidden)))


@dataclass(frozen=True, slots=True)
class Answer:
    """The part of the library's answer that is used."""

    last_hidden_state: Tensor


class LlamaModel(nn.Module):
    """The model without a head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        # Without random numbers: on the meta device they would import a second and a half of torch.
        numbers = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=numbers)
        self.layers = nn.ModuleList([Block(config, block) for block in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = Rotary(config)

    def forward(
        self,
        *,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Any = None,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> Answer:
        """Hidden states [rows, tokens, hidden_size] through all blocks and the norm.

        position_ids: int64 [rows or 1, tokens].  attention_mask: bool [rows, 1, tokens, positions], as it is
        or under "full_attention"; None: causal.  past_key_values: a cache of the library's kind.
        """
        mask = attention_mask["full_attention"] if isinstance(attention_mask, dict) else attention_mask
        before = 0 if past_key_values is None else past_key_values.get_seq_length()
        tokens = inputs_embeds.shape[1]
        if mask is None and before and tokens > 1:
            mask = _after(before, tokens, inputs_embeds.device)
        angles = self.rotary_emb(inputs_embeds, position_ids)
        hidden = inputs_embeds
        for block in self.layers:
            hidden = block(hidden, angles, mask, past_key_values)
        return Answer(self.norm(hidden))


class LlamaForCausalLM(nn.Module):
    """The model with its head.  Only its ends are called, each by itself."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        """Under the library's name."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """Under the library's name."""
        return self.lm_head


def _rotated(x: Tensor, angles: Angles) -> Tensor:
    """x [rows, heads, tokens, head_dim] by the angles of its positions: halves, not neighbours."""
    cos, sin = (each.unsqueeze(1) for each in angles)
    one, two = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return (x * cos) + (torch.cat((-two, one), dim=-1) * sin)


def _repeated(keys: Tensor, times: int) -> Tensor:
    """[rows, key heads, length, head_dim] -> [rows, key heads * times, length, head_dim]."""
    return keys.repeat_interleave(times, dim=1)


def _after(before: int, tokens: int, device: torch.device) -> Tensor:
    """The causal mask of `tokens` positions after `before` ones: bool [1, 1, tokens, before + tokens]."""
    keys = torch.arange(before + tokens, device=device)
    return (keys <= keys[before:, None])[None, None]
