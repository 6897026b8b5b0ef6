"""The shard of every block that one of several ranks computes: heads and inner values are divided.

Rows of the matrices for queries, keys, values, gate and up are divided among the ranks, and columns of the
matrices out of attention and out of the MLP (Megatron-LM, arXiv:1909.08053).  Each rank then has a block
with fewer heads, whose two products are parts of a sum over all ranks.  Norms are whole at every rank.  Where
there are more ranks than key heads, several ranks have the same key head.

An int8 row of a divided matrix keeps the scale of the whole row, so the parts of a sum have the codes that a
single device would have.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from node.config import ConfigError

# Of the families whose linears have these names, and in which nothing else depends on a head's number.
FAMILIES = (
    "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "qwen2", "qwen3", "smollm3",
)  # fmt: skip
_QUERIES, _KEYS, _INNER = ("q_proj",), ("k_proj", "v_proj"), ("gate_proj", "up_proj")
SUMMED = {"o_proj": "heads", "down_proj": "inner"}  # the linears whose columns are divided
_LARGEST_UNIT = 64  # values of the MLP that stay together, so that kernels find their tiles whole

Bounds = tuple[int, int]


def bounds(total: int, ranks: int, rank: int) -> Bounds:
    """One rank's values [first, last) of `total`, in units of a power of two where there are enough."""
    unit = _LARGEST_UNIT
    while unit > 1 and (total % unit or total // unit < ranks):
        unit //= 2
    units = total // unit
    return units * rank // ranks * unit, units * (rank + 1) // ranks * unit


def possible_ranks(heads: int, key_heads: int, inner: int) -> list[int]:
    """The numbers of ranks, from 2 on, that a block can be divided among."""
    return [
        ranks
        for ranks in range(2, heads + 1)
        if heads % ranks == 0 and (key_heads % ranks == 0 or ranks % key_heads == 0) and ranks <= inner
    ]


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of every block.

    heads, key_heads, inner: of the whole model, queries' and keys' heads and values inside the MLP.
    """

    rank: int
    ranks: int
    heads: int
    key_heads: int
    head_dim: int
    inner: int

    @classmethod
    def of(cls, config: Any, ranks: int, rank: int) -> Shard:  # Any: the library's config
        """The shard of a model with this config.  Raises ConfigError that says which numbers are possible."""
        family = getattr(config, "model_type", None)
        if family not in FAMILIES:
            raise ConfigError(
                f"the blocks of {family} cannot be divided among {ranks} ranks; those of"
                f" {', '.join(FAMILIES)} can"
            )
        heads, key_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        inner = int(config.intermediate_size)
        if ranks not in (possible := possible_ranks(heads, key_heads, inner)):
            numbers = ", ".join(map(str, possible)) or "no number"
            raise ConfigError(
                f"{heads} heads and {key_heads} key heads cannot be divided among {ranks} ranks:"
                f" the number of ranks can be {numbers}"
            )
        dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        return cls(rank, ranks, heads, key_heads, dim, inner)

    @property
    def own_heads(self) -> Bounds:
        """This rank's heads of queries [first, last)."""
        return self.heads * self.rank // self.ranks, self.heads * (self.rank + 1) // self.ranks

    @property
    def own_key_heads(self) -> Bounds:
        """This rank's heads of keys [first, last): at least one."""
        first = self.key_heads * self.rank // self.ranks
        return first, max(first + 1, self.key_heads * (self.rank + 1) // self.ranks)

    @property
    def own_inner(self) -> Bounds:
        """This rank's values inside the MLP [first, last)."""
        return bounds(self.inner, self.ranks, self.rank)

    def trimmed(self, config: Any) -> Any:
        """A copy of the library's config for this rank's blocks."""
        own = copy.copy(config)
        # Past the class's setters, which would refuse the state between two of these assignments.
        own.__dict__.update(
            num_attention_heads=_size(self.own_heads),
            num_key_value_heads=_size(self.own_key_heads),
            head_dim=self.head_dim,
            intermediate_size=_size(self.own_inner),
        )
        return own

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of a block [out, ...], with this rank's rows where rows are divided: a view.

        name: it ends with the linear's name and "weight", "bias" or the name of scales.
        """
        found = self._rows_of(_site(name))
        return tensor if found is None else tensor[found[0] : found[1]]

    def columns(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of a block, with this rank's columns where columns are divided: a copy then.

        The bias of a divided sum is added once: rank 0 keeps it, the others have zeros.
        """
        kind = SUMMED.get(_site(name))
        if kind is None:
            return tensor
        if tensor.dim() == 2:
            first, last = self._scaled(self.own_heads) if kind == "heads" else self.own_inner
            return tensor[:, first:last].contiguous()
        return tensor.new_zeros(tensor.shape) if name.endswith(".bias") and self.rank else tensor

    def of_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of each tensor."""
        return {name: self.columns(name, self.rows(name, each)) for name, each in tensors.items()}

    def _rows_of(self, site: str) -> Bounds | None:
        if site in _QUERIES:
            return self._scaled(self.own_heads)
        if site in _KEYS:
            return self._scaled(self.own_key_heads)
        return self.own_inner if site in _INNER else None

    def _scaled(self, heads: Bounds) -> Bounds:
        return heads[0] * self.head_dim, heads[1] * self.head_dim


def _size(of: Bounds) -> int:
    return of[1] - of[0]


def _site(name: str) -> str:
    """The linear that a tensor belongs to: "k_proj" of "layers.0.self_attn.k_proj.weight"."""
    return name.split(".")[-2] if "." in name else ""
