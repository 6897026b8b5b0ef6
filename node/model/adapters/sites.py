"""The linears of a block that low-rank matrices can be added to, by name.

A linear's name is the last part of its path in the library's block ("q_proj").  Where two linears of a block
share it (gpt2's attn.c_proj and mlp.c_proj), it is the shortest end of the path that they do not share, with
"_" for "." ("attn_c_proj").  Fused linears (query_key_value, qkv_proj) are one site, as in peft.

Experts see the tokens that are routed to them, and the router's answer is a choice: both are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import nn

from node.model.weights.quantize import PackedLinear

ROUTERS = frozenset({"gate", "router"})  # of the library's mixtures of experts
EXPERTS = "experts"  # the module that holds them
_sites: WeakKeyDictionary[nn.Module, Mapping[str, nn.Module]] = WeakKeyDictionary()


def site_paths(block: nn.Module) -> dict[str, str]:
    """The paths of a block's sites by their names, in its order; of one on the meta device too."""
    paths = [path for path, _ in _linears(block)]
    shared = Counter(end for path in paths for end in _ends(path))
    return {next(end for end in _ends(path) if shared[end] == 1).replace(".", "_"): path for path in paths}


def sites_of(block: nn.Module) -> Mapping[str, nn.Module]:
    """A loaded block's sites by their names; looked for once, as every step of a block asks for them."""
    found = _sites.get(block)
    if found is None:
        found = {name: block.get_submodule(path) for name, path in site_paths(block).items()}
        _sites[block] = found
    return found


def shapes_of(block: nn.Module) -> dict[str, tuple[int, int]]:
    """(in, out) of a block's sites by their names."""
    return {name: _shape(block.get_submodule(path)) for name, path in site_paths(block).items()}


def site_shapes(span: Any) -> Mapping[int, Mapping[str, tuple[int, int]]]:
    """(in, out) of the sites of each block of a span.  Any: a `node.model.blocks.span.Span`."""
    return {
        block: shapes_of(module) for block, module in numbered_blocks(span, span.start, span.stop).items()
    }


def numbered_blocks(span: Any, start: int, stop: int) -> dict[int, nn.Module]:
    """The library's modules of a span's blocks [start, stop), by their numbers in the model."""
    blocks = span.architecture.blocks_of(span.model)[start - span.start : stop - span.start]
    return dict(enumerate(blocks, start))


def _linears(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in block.named_modules():
        *outer, leaf = path.split(".")
        if EXPERTS not in outer and leaf not in ROUTERS and _is_linear(module):
            yield path, module


def _is_linear(module: nn.Module) -> bool:
    """A linear of torch, of bitsandbytes (a class of torch's), of ours, or transformers' Conv1D."""
    return isinstance(module, nn.Linear | PackedLinear) or type(module).__name__ == "Conv1D"


def _shape(linear: nn.Module) -> tuple[int, int]:
    found = cast(Any, linear)
    if isinstance(linear, nn.Linear | PackedLinear):
        return int(found.in_features), int(found.out_features)
    ins, outs = found.weight.shape  # Conv1D keeps its weights as [in, out]
    return int(ins), int(outs)


def _ends(path: str) -> Iterator[str]:
    """The ends of a path, from the last part on: "b.c.d" -> "d", "c.d", "b.c.d"."""
    parts = path.split(".")
    for first in reversed(range(len(parts))):
        yield ".".join(parts[first:])
