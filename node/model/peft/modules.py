"""The modules of a whole model, by their names and shapes, without its weights.

Made from the config alone: the library's class on the meta device takes no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import nn

from node.model.adapters.prefix import why_no_prefix
from node.model.adapters.sites import site_paths
from node.model.blocks.span import library_class, library_config
from node.model.checkpoint.architecture import Architecture, architecture_of
from node.model.checkpoint.folder import ModelFolder

Kind = Literal["linear", "conv1d", "embedding", "other"]


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """A module of the model.

    path: its name in the library's class with the head.  ins, outs: features of a linear; rows and columns of
    an embedding; else 0.  block: of the model, None for a module outside blocks.
    site: the name by which a block knows a linear that may have low-rank matrices; None for all others.
    parameters: names and shapes of its own.
    """

    path: str
    kind: Kind
    ins: int = 0
    outs: int = 0
    block: int | None = None
    site: str | None = None
    parameters: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True, eq=False)
class ModelModules:
    """All modules of a model.  Made by `model_modules`.

    head: the path of the output embedding.  hidden: of a position.  kv_heads, head_dim: of attention, as they
    are cached.  no_prefix: why blocks can have no prefix; None where they can.
    """

    architecture: Architecture
    modules: Mapping[str, ModuleShape]
    blocks: int
    head: str | None
    hidden: int
    kv_heads: int
    head_dim: int
    revision: str = ""
    no_prefix: str | None = None

    @cached_property
    def shapes(self) -> tuple[Mapping[str, tuple[int, int]], ...]:
        """For each block the (in, out) of its linears that may have low-rank matrices, by their names."""
        found: list[dict[str, tuple[int, int]]] = [{} for _ in range(self.blocks)]
        for module in self.modules.values():
            if module.site is not None and module.block is not None:
                found[module.block][module.site] = (module.ins, module.outs)
        return tuple(found)

    def place(self, path: str) -> str:
        """The path in the class with the head, of a path in it or in the class without one."""
        bare = f"{self.architecture.prefix}.{path}"
        return path if path in self.modules or bare not in self.modules else bare

    def holds_blocks(self, path: str) -> bool:
        """Whether blocks lie in the module of this path."""
        return any(
            name.startswith(f"{path}.") and one.block is not None for name, one in self.modules.items()
        )

    def block_of(self, path: str) -> int | None:
        """The block that the module of this path lies in, None for a module outside blocks."""
        found = self.architecture.block_of(f"{path}.")
        return None if found is None else found[0]


def model_modules(folder: ModelFolder) -> ModelModules:
    """The modules of a folder's model.  Raises ConfigError for a config that the library refuses."""
    architecture = architecture_of(folder.config.get("model_type"))
    whole = library_class(architecture, architecture.whole)
    config = cast(Any, library_config(whole, folder))
    with torch.device("meta"):
        model = whole(config)
    found = {module.path: module for module in _modules(model, architecture)}
    output = cast(Any, model).get_output_embeddings()
    head = next((name for name, module in model.named_modules() if module is output), None)
    heads = _first(config, "num_attention_heads", "n_head", "n_heads")
    return ModelModules(
        architecture=architecture,
        modules=found,
        blocks=config.num_hidden_layers,
        head=head,
        hidden=config.hidden_size,
        kv_heads=_kv_heads(config, heads),
        head_dim=_first(config, "head_dim", default=config.hidden_size // heads),
        revision=folder.revision,
        no_prefix=why_no_prefix(config),
    )


def _kv_heads(config: Any, heads: int) -> int:  # Any: the library's config
    """Heads of the cached keys.  falcon has one for all queries, or repeats them before it caches them."""
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    return _first(config, "num_key_value_heads", default=heads)


def _first(config: Any, *names: str, default: int = 1) -> int:  # Any: the library's config
    return next((value for name in names if type(value := getattr(config, name, None)) is int), default)


def _modules(model: nn.Module, architecture: Architecture) -> Iterator[ModuleShape]:
    blocks = ".".join(
        part for part in (architecture.prefix, architecture.container, architecture.blocks) if part
    )
    places: dict[str, tuple[int, str | None]] = {}
    for number, block in enumerate(model.get_submodule(blocks).children()):
        sites = {path: name for name, path in site_paths(block).items()}
        for path, _ in block.named_modules():
            places[f"{blocks}.{number}.{path}".removesuffix(".")] = number, sites.get(path)
    for path, module in model.named_modules():
        if path:
            kind = _kind(module)
            own = tuple((name, tuple(one.shape)) for name, one in module.named_parameters(recurse=False))
            ins, outs = _features(module, kind)
            in_block, site = places.get(path, (None, None))
            yield ModuleShape(path, kind, ins, outs, in_block, site, own)


def _kind(module: nn.Module) -> Kind:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    return "embedding" if isinstance(module, nn.Embedding) else "other"


def _features(module: nn.Module, kind: Kind) -> tuple[int, int]:
    if kind == "embedding":
        embedding = cast(nn.Embedding, module)
        return embedding.num_embeddings, embedding.embedding_dim
    if kind == "other":
        return 0, 0
    rows, columns = cast(Any, module).weight.shape
    return (rows, columns) if kind == "conv1d" else (columns, rows)
