"""The values of an adapter as tensors, and the bytes that servers get of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tensor_codec.adapters import MAX_VALUE, AdapterContent, AdapterDtype, AdapterManifest, LoraSite

ADAPTER_TORCH: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(slots=True, eq=False)
class EndTensors:
    """The change of a module of the client: an embedding, a norm, a head.

    site, a, b: low-rank matrices, a [rank, in], b [out, rank]; None where there are none.
    values: the module's parameters by their names, where they are replaced.
    is_embedding: a [rank, rows of the embedding], b [hidden, rank].
    """

    site: LoraSite | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    is_embedding: bool = False


@dataclass(slots=True, eq=False)
class AdapterTensors:
    """An adapter of one model.

    fields: its config in the words of peft.  revision: of the model.  dtype: of the bytes for servers.
    sites, paths: of each block, and the names of their modules in the library's class with the head.
    blocks: for each block and site (a [rank, in], b [out, rank]).
    ends: by the path of the module.  prompt: [n, hidden] in front of the text, for prompt tuning.
    prefix: [blocks, 2, n, kv_heads, head_dim], keys and values in front of each block's own.
    """

    fields: dict[str, Any]  # Any: JSON
    revision: str
    dtype: AdapterDtype
    sites: tuple[tuple[LoraSite, ...], ...]
    paths: tuple[tuple[str, ...], ...]
    blocks: tuple[Mapping[str, tuple[Tensor, Tensor]], ...]
    ends: dict[str, EndTensors] = field(default_factory=dict)
    prompt: Tensor | None = None
    prefix: Tensor | None = None

    @property
    def manifest(self) -> AdapterManifest:
        """What servers are told of it."""
        if self.prefix is None:
            return AdapterManifest(self.revision, self.dtype, self.sites)
        return AdapterManifest(self.revision, self.dtype, self.sites, "prefix", self.prefix.shape[2])

    @property
    def is_in_blocks(self) -> bool:
        """Whether servers have a part of it."""
        return self.prefix is not None or any(self.sites)

    @property
    def is_at_ends(self) -> bool:
        """Whether the client has a part of it: embedding, norm, head, or a prompt in front of the text."""
        return bool(self.ends) or self.prompt is not None

    def content(self) -> AdapterContent:
        """The bytes of this moment.  Raises ValueError for values that no server takes."""
        if self.prefix is not None:
            parts: list[Sequence[Tensor]] = [list(block) for block in self.prefix]
        else:
            parts = [
                [one for site in sites for one in block[site.name]]
                for sites, block in zip(self.sites, self.blocks, strict=True)
            ]
        return AdapterContent(self.manifest, tuple(blob_of(each, self.dtype) for each in parts))


def blob_of(tensors: Sequence[Tensor], dtype: str) -> bytes:
    """The blob of a block: its tensors one after the other.

    Raises ValueError for values that are not finite or above MAX_VALUE.
    """
    if not tensors:
        return b""
    flat = torch.cat([one.detach().reshape(-1).to("cpu", torch.float32) for one in tensors])
    largest = float(flat.abs().max()) if flat.numel() else 0.0
    if not largest <= MAX_VALUE:  # NaN is not
        raise ValueError(f"an adapter holds {largest}, finite values up to {MAX_VALUE:g} are allowed")
    whole = flat.to(ADAPTER_TORCH[dtype]).contiguous()
    return whole.view(torch.uint8).numpy().tobytes()
