"""From an adapter's manifest and blobs back to tensors and a config of peft.

The config is made here, out of the manifest alone: nothing of it comes from the peer that gave the adapter.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from node.config import ConfigError
from node.model.adapters.blobs import read_lora
from node.model.peft.config import lora_settings
from node.model.peft.modules import ModelModules
from node.model.peft.prompts import prefix_of
from node.model.peft.targets import find_targets
from node.model.peft.tensors import ADAPTER_TORCH, AdapterTensors
from tensor_codec.adapters import PREFIX, AdapterContent, AdapterManifest, LoraSite, blob_bytes
from tensor_codec.errors import MessageError

WHERE = "the adapter"
Paths = tuple[tuple[str, ...], ...]


def blob_sizes(manifest: AdapterManifest, model: ModelModules) -> list[int]:
    """Bytes of the blob of every block.  Raises ConfigError for an adapter that does not fit the model."""
    if manifest.revision != model.revision or len(manifest.blocks) != model.blocks:
        raise ConfigError(
            f"{WHERE} is for {len(manifest.blocks)} blocks of revision {manifest.revision}, the model has"
            f" {model.blocks} of revision {model.revision}"
        )
    if manifest.kind == "prefix":
        values = model.kv_heads * model.head_dim
        shapes = {PREFIX: (values, values)}
        return [blob_bytes(manifest.parts(block), shapes, manifest.dtype) for block in range(model.blocks)]
    try:
        pairs = zip(manifest.blocks, model.shapes, strict=True)
        return [blob_bytes(sites, shapes, manifest.dtype) for sites, shapes in pairs]
    except MessageError as error:
        raise ConfigError(f"{WHERE} does not fit the model: {error}") from None


def tensors_of(content: AdapterContent, model: ModelModules, name: str) -> AdapterTensors:
    """The adapter as `write_adapter` takes it.  name: of the model, for the config.

    Raises ConfigError for an adapter that does not fit the model, that no config of peft describes, or with
    values that no server takes.
    """
    manifest = content.manifest
    blob_sizes(manifest, model)
    if manifest.kind == "prefix":
        return _prefix(content, model, name)
    places = {(one.block, one.site): path for path, one in model.modules.items() if one.site is not None}
    paths = tuple(
        tuple(places[block, site.name] for site in sites) for block, sites in enumerate(manifest.blocks)
    )
    fields = _fields(manifest, paths, model, name)
    blocks = []
    try:
        for sites, shapes, blob in zip(manifest.blocks, model.shapes, content.blobs, strict=True):
            found = read_lora(sites, shapes, manifest.dtype, blob)
            blocks.append({site: (low.a.float(), low.b.float()) for site, low in found.items()})
    except MessageError as error:
        raise ConfigError(f"{WHERE}: {error}") from None
    return AdapterTensors(fields, model.revision, manifest.dtype, manifest.blocks, paths, tuple(blocks))


def _prefix(content: AdapterContent, model: ModelModules, name: str) -> AdapterTensors:
    manifest = content.manifest
    shape = (2, manifest.virtual_tokens, model.kv_heads, model.head_dim)
    dtype = ADAPTER_TORCH[manifest.dtype]
    parts: list[Tensor] = []
    for blob in content.blobs:
        values = torch.frombuffer(bytearray(blob), dtype=dtype).float()
        if not bool(torch.isfinite(values).all()):
            raise ConfigError(f"{WHERE} holds NaN or infinity")
        parts.append(values.view(shape))
    found = prefix_of(model, torch.stack(parts), manifest.dtype)
    found.fields["base_model_name_or_path"] = name
    return found


def _fields(
    manifest: AdapterManifest, paths: Paths, model: ModelModules, name: str
) -> dict[str, Any]:  # Any: JSON
    """The fields of a config that names these sites, ranks and scales, and no others.  Raises ConfigError."""
    sites = {
        path: site
        for own, block in zip(paths, manifest.blocks, strict=True)
        for path, site in zip(own, block, strict=True)
    }
    short = sorted({path.rpartition(".")[2] for path in sites})
    for is_stabilised in (False, True):
        alphas = {path: _alpha(site, is_stabilised) for path, site in sites.items()}
        ranks = {path: site.rank for path, site in sites.items()}
        for targets in (short, sorted(sites)):
            fields = {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": name,
                "bias": "none",
                "use_rslora": is_stabilised,
                "target_modules": targets,
                "r": next(iter(ranks.values()), 8),
                "lora_alpha": next(iter(alphas.values()), 8),
                "rank_pattern": _pattern(ranks),
                "alpha_pattern": _pattern(alphas),
            }
            if sites and _names(fields, manifest, model):
                return fields
    raise ConfigError(f"{WHERE} has sites, ranks or scales that no config of peft describes")


def _names(fields: Mapping[str, Any], manifest: AdapterManifest, model: ModelModules) -> bool:  # Any: JSON
    try:
        found = find_targets(lora_settings(fields, WHERE), model, WHERE)
    except ConfigError:
        return False
    return found.blocks == manifest.blocks and not found.ends and not found.saved


def _alpha(site: LoraSite, is_stabilised: bool) -> float | int:
    """The alpha that gives exactly the scale of a site, where there is one: else the nearest."""
    size = math.sqrt(site.rank) if is_stabilised else site.rank
    about = site.scale * size
    near = (about, math.nextafter(about, math.inf), math.nextafter(about, -math.inf))
    alpha = next((each for each in near if each / size == site.scale), about)
    return int(alpha) if alpha.is_integer() else alpha


def _pattern(values: Mapping[str, Any]) -> dict[str, Any]:  # Any: numbers
    """The values that differ from the first one, by the last part of the paths where that says them all."""
    usual = next(iter(values.values()), None)
    by_end: dict[str, set[Any]] = defaultdict(set)
    for path, value in values.items():
        by_end[path.rpartition(".")[2]].add(value)
    found = {}
    for path, value in values.items():
        end = path.rpartition(".")[2]
        if len(by_end[end]) > 1:
            found[re.escape(path)] = value
        elif value != usual:
            found[end] = value
    return found
