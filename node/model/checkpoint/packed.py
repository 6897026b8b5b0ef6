"""Checkpoints in foreign quantisations: the layouts that are read, and the content of their tensors.

Two layouts are unpacked into floats when blocks are loaded, as the library does without a kernel for them;
`--quantize` may then pack the floats anew.

* `fp8`: a matrix `X` of 8-bit floats with a scale for each tile of it, `X_scale_inv`;
* `mxfp4`: experts `X_blocks` of 4-bit floats, two in a byte and 32 in a row, with a power of two for each
  32, `X_scales` (the Open Compute Project's MX formats).

All others are refused by name, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from node.config import ConfigError
from node.model.checkpoint.folder import CONFIG_FILE, ModelFolder, TensorEntry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

METHODS = ("fp8", "mxfp4")
PACKING_KEYS = ("quantization_config", "compression_config")
_FP8 = ("F8_E4M3", "F8_E5M2")
_TILE = "_scale_inv"
_BLOCKS, _SCALES = "_blocks", "_scales"
_STATIC = (".input_scale", ".activation_scale")  # of activations, which are not quantised here


def packing_of(folder: ModelFolder) -> str | None:
    """The layout that a folder's tensors are packed in, None for plain floats.

    Raises ConfigError for a layout that is not read, and for tensors outside the layout.
    """
    settings = next((folder.config[key] for key in PACKING_KEYS if folder.config.get(key) is not None), None)
    if settings is None:
        return None
    where = folder.path / CONFIG_FILE
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{where}: quantization_config is {settings!r}, an object is expected")
    method = _method(settings)
    if method not in METHODS:
        raise ConfigError(
            f"{folder.path} was quantised by {method!r}, which cannot be read; {' and '.join(METHODS)} can,"
            " and any model in floats (see --quantize)"
        )
    for name, entry in folder.tensors.items():
        _check_partner(folder, name, entry, method)
    return method


def _method(settings: Mapping[str, Any]) -> str:
    if isinstance(named := settings.get("quant_method"), str):
        return named
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    return "an unnamed method"


def _check_partner(folder: ModelFolder, name: str, entry: TensorEntry, method: str) -> None:
    """Check that each packed tensor has its scales, and each tensor of scales has its packed tensor."""
    partner = None
    if method == "fp8" and entry.dtype in _FP8:
        partner = name + _TILE
    elif method == "fp8" and name.endswith(_TILE):
        partner = name.removesuffix(_TILE)
    elif method == "mxfp4" and name.endswith(_BLOCKS):
        partner = name.removesuffix(_BLOCKS) + _SCALES
    elif method == "mxfp4" and name.endswith(_SCALES):
        partner = name.removesuffix(_SCALES) + _BLOCKS
    if partner is not None and partner not in folder.tensors:
        raise ConfigError(f"{folder.path}: tensor {name} ({entry.dtype}) is without its {partner}")


def values_of(name: str, entry: TensorEntry, packing: str | None) -> int:
    """The number of values of an unpacked tensor."""
    if packing == "fp8" and name.endswith((_TILE, *_STATIC)):
        return 0
    if packing == "mxfp4" and name.endswith(_SCALES):
        return 0
    if packing == "mxfp4" and name.endswith(_BLOCKS):
        return 2 * entry.values
    return entry.values


def unpacked(
    tensors: dict[str, Tensor], packing: str | None, config: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors as plain floats under the library's names.  dtype: of unpacked tensors.

    `tensors` is emptied on the way, so that at most one tensor is in memory twice.  Raises ConfigError.
    """
    if packing is None:
        return tensors
    found: dict[str, Tensor] = {}
    for name in sorted(tensors):
        if name not in tensors or (packing == "fp8" and name.endswith(_STATIC)):
            continue
        if packing == "fp8" and name + _TILE in tensors:
            packed, scales = tensors.pop(name), tensors.pop(name + _TILE)
            found[name] = _from_fp8(name, packed, scales, _tile(config), dtype)
        elif packing == "mxfp4" and name.endswith(_BLOCKS):
            plain = name.removesuffix(_BLOCKS)
            packed, scales = tensors.pop(name), tensors.pop(plain + _SCALES)
            found[plain] = _from_mxfp4(name, packed, scales, dtype)
        else:
            found[name] = tensors.pop(name)
    return found


def _tile(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, as the config has it."""
    settings = config.get("quantization_config")
    size = settings.get("weight_block_size") if isinstance(settings, Mapping) else None
    if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return size[0], size[1]
    return None


def _from_fp8(
    name: str, packed: Tensor, scales: Tensor, tile: tuple[int, int] | None, dtype: torch.dtype
) -> Tensor:
    """[..., rows, columns] with scales [..., tiles down, tiles across], or one for all."""
    import torch

    if scales.dtype == torch.uint8:  # exponents
        wide = (scales.to(torch.float32) - 127.0).exp2()
    else:
        wide = scales.to(torch.float32)
    values = packed.to(torch.float32)
    if wide.numel() == 1:
        return (values * wide.reshape(())).to(dtype)
    if packed.ndim < 2 or wide.ndim < 2:
        raise ConfigError(
            f"tensor {name} of {tuple(packed.shape)} has scales of {tuple(scales.shape)}: no tiles"
        )
    for axis in (-2, -1):
        size, tiles = packed.shape[axis], wide.shape[axis]
        length = tile[axis] if tile is not None and -(-size // tile[axis]) == tiles else None
        if length is None and size % tiles == 0:
            length = size // tiles
        if length is None:
            raise ConfigError(
                f"tensor {name} of {tuple(packed.shape)} has scales of {tuple(scales.shape)}, which do not"
                " make tiles of one size"
            )
        wide = wide.repeat_interleave(length, axis).narrow(axis, 0, size)
    return values.mul_(wide).to(dtype)


def _from_mxfp4(name: str, packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[experts, outputs, groups, 16] bytes, [experts, outputs, groups] scales: [experts, inputs, outputs]."""
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    sound = packed.dtype == scales.dtype == torch.uint8
    if not sound or packed.ndim != 4 or packed.shape[:-1] != scales.shape or packed.shape[-1] != 16:
        raise ConfigError(
            f"tensor {name} of {tuple(packed.shape)} {packed.dtype} with scales of {tuple(scales.shape)}"
            f" {scales.dtype} is not mxfp4"
        )
    found: Tensor = convert_moe_packed_tensors(packed, scales, dtype=dtype)
    return found
