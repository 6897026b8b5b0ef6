"""Folders of peft: `adapter_config.json` and `adapter_model.safetensors`, read and written.

A folder is read against the modules of its model.  Nothing is executed: pickles are not opened, and names in
the files are compared, never followed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from node.config import ConfigError
from node.model.checkpoint.disk.model_cache import ModelCache
from node.model.checkpoint.disk.plan import Key
from node.model.checkpoint.folder import read_json
from node.model.checkpoint.hub import Hub, Unreachable
from node.model.checkpoint.source import HUB_NAME, cache_dir
from node.model.peft.config import LoraSettings, lora_settings
from node.model.peft.modules import ModelModules
from node.model.peft.prompts import PREFIX_TUNING, PROMPT_TUNING, read_prefix, read_prompt
from node.model.peft.targets import Targets, find_targets, settled
from node.model.peft.tensors import ADAPTER_TORCH, AdapterTensors, EndTensors
from node.runtime.files import disk_errors, write_atomically
from node.runtime.values import shown
from tensor_codec.adapters import AdapterDtype, LoraSite

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
PREFIX = "base_model.model."
# The ends of the names of low-rank tensors: A and B of a linear, and of an embedding in their own form.
_A, _B, _EMBEDDING_A, _EMBEDDING_B = (
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_embedding_A",
    ".lora_embedding_B",
)
_BASE = ".base_layer"  # the model's own weights at such a module, which peft saves for embeddings
# Tensors of other methods, and the field of the config that stands for each.
_FOREIGN = {
    ".lora_magnitude_vector": "use_dora",
    ".lora_B.bias": "lora_bias",
    ".token_adapter": "trainable_token_indices",
    ".lora_diag": "kasa_config",
}


@dataclass(slots=True)
class _Found:
    """The tensors of one module in a file."""

    a: Tensor | None = None
    b: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)


def read_adapter(path: Path, model: ModelModules, dtype: AdapterDtype | None = None) -> AdapterTensors:
    """An adapter out of a folder, for this model.

    dtype: of the bytes for servers; None: bf16 where all of the file in blocks is, else fp32, which loses
    nothing.
    Raises ConfigError that names the file or the field.
    """
    fields = read_fields(path)
    tensors = _read_tensors(path)
    kind = fields.get("peft_type")
    in_blocks = [
        each for name, each in tensors.items() if model.block_of(name.removeprefix(PREFIX)) is not None
    ]
    own = all(each.dtype == torch.bfloat16 for each in in_blocks or tensors.values())
    chosen: AdapterDtype = dtype or ("bf16" if own else "fp32")
    if kind == PROMPT_TUNING:
        return read_prompt(fields, tensors, model, chosen, str(path))
    if kind == PREFIX_TUNING:
        return read_prefix(fields, tensors, model, chosen, str(path))
    if kind != "LORA":
        raise ConfigError(
            f"{path / CONFIG_NAME}: peft_type is {shown(kind)}, LORA, {PROMPT_TUNING} or {PREFIX_TUNING} is"
            " allowed"
        )
    return _read_lora(fields, tensors, model, chosen, path)


def adapter_folder(name: str | Path, revision: str | None = None, hub: Hub | None = None) -> Path:
    """The folder of an adapter: one of this machine, or a copy of the hub's "org/name".

    Config and safetensors alone are fetched.  revision: a branch, tag or commit of the hub.
    Raises ConfigError.
    """
    try:
        path = Path(name).expanduser()
        is_folder = path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, no such user
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot open {shown(str(name))} as an adapter's folder: {why}") from None
    if is_folder or not HUB_NAME.fullmatch(str(name)):
        if revision is not None:
            raise ConfigError(f"a revision can be chosen for an adapter of the hub only, and {name} is none")
        return path
    try:
        found = (hub or Hub()).adapter(str(name), revision, (CONFIG_NAME, WEIGHTS_NAME))
    except Unreachable as error:
        raise ConfigError(f"{name} is not in the hub's cache, and the hub: {error}") from None
    if hub is None:
        with suppress(ConfigError):  # without a cache of ours nothing is counted
            ModelCache(cache_dir()).hold(Key("hub", str(name).replace("/", "--"), found.name), found).close()
    return found


def read_fields(path: Path) -> dict[str, Any]:  # Any: JSON
    """The config in a folder.  Raises ConfigError."""
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder of an adapter")
    if not (path / CONFIG_NAME).is_file():
        raise ConfigError(f"{path} has no {CONFIG_NAME}: it is no folder of an adapter")
    return read_json(path / CONFIG_NAME)


def write_adapter(adapter: AdapterTensors, path: Path, dtype: AdapterDtype | None = None) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` loads; files of these names are replaced.

    dtype: of the values in the file; None: as they are computed with, in blocks as servers get them, at
    embedding, norm and head in float32.  Raises ConfigError where the disk refuses.
    """
    from safetensors.torch import save

    ends = tuple(f"{PREFIX}{path}." for path in adapter.ends)

    def kind(name: str) -> torch.dtype:
        if dtype is None and name.startswith(ends):
            return torch.float32
        return ADAPTER_TORCH[dtype or adapter.dtype]

    tensors = {
        name: tensor.detach().to("cpu", kind(name)).contiguous().clone()
        for name, tensor in file_tensors(adapter).items()
    }
    config = json.dumps({**adapter.fields, "inference_mode": True}, indent=2, sort_keys=True) + "\n"
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / WEIGHTS_NAME, save(tensors, metadata={"format": "pt"}))
        write_atomically(path / CONFIG_NAME, config.encode())


def file_tensors(adapter: AdapterTensors) -> dict[str, Tensor]:
    """The tensors of an adapter by their names in a file."""
    if adapter.prompt is not None:
        return {"prompt_embeddings": adapter.prompt}
    if adapter.prefix is not None:
        blocks, _, tokens, heads, size = adapter.prefix.shape
        rows = adapter.prefix.permute(2, 0, 1, 3, 4)  # [n, blocks, 2, kv_heads, head_dim]
        return {"prompt_embeddings": rows.reshape(tokens, blocks * 2 * heads * size)}
    found: dict[str, Tensor] = {}
    for paths, sites, block in zip(adapter.paths, adapter.sites, adapter.blocks, strict=True):
        for path, site in zip(paths, sites, strict=True):
            a, b = block[site.name]
            found |= {f"{PREFIX}{path}{_A}": a, f"{PREFIX}{path}{_B}": b}
    for path, end in adapter.ends.items():
        found |= {f"{PREFIX}{path}.{name}": one for name, one in end.values.items() if end.site is None}
        if end.a is not None and end.b is not None:
            names = (_EMBEDDING_A, _EMBEDDING_B) if end.is_embedding else (_A, _B)
            found |= {f"{PREFIX}{path}{name}": one for name, one in zip(names, (end.a, end.b), strict=True)}
            found |= {f"{PREFIX}{path}{_BASE}.{name}": one for name, one in end.values.items()}
    return found


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / WEIGHTS_NAME
    if not file.is_file():
        if (path / PICKLE_NAME).exists():
            raise ConfigError(
                f"{path} has {PICKLE_NAME}, a pickle, which can run code and is never opened:"
                f" {WEIGHTS_NAME} is needed (peft's save_pretrained writes it)"
            )
        raise ConfigError(f"{path} has no {WEIGHTS_NAME}")
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ConfigError(f"{file}: {name} holds {tensor.dtype}, a float dtype is needed")
        if not bool(torch.isfinite(tensor).all()):
            raise ConfigError(f"{file}: {name} holds NaN or infinity")
    return tensors


def _read_lora(
    fields: dict[str, Any],  # Any: JSON
    tensors: Mapping[str, Tensor],
    model: ModelModules,
    dtype: AdapterDtype,
    path: Path,
) -> AdapterTensors:
    where = str(path / CONFIG_NAME)
    found = _by_module(tensors, path / WEIGHTS_NAME)
    # A folder of the library's class without a head has shorter names.
    bare = any(model.place(name) != name for name in found)
    settings = settled(lora_settings(fields, where), model, where)
    targets = find_targets(settings, model, where, bare=bare)
    placed = {model.place(name): each for name, each in found.items()}
    blocks = []
    for sites, paths in zip(targets.blocks, targets.paths, strict=True):
        pairs = zip(sites, paths, strict=True)
        blocks.append({site.name: _pair(site, placed.pop(at, None), model, at, path) for site, at in pairs})
    ends = {at: _end(site, placed.pop(at, None), model, at, path) for at, site in targets.ends.items()}
    ends |= _saved(settings, targets, placed, model, path)
    if placed:
        raise ConfigError(
            f"{path / WEIGHTS_NAME} has tensors of {min(placed)}: neither target_modules nor modules_to_save"
            f" of {CONFIG_NAME} names it, or the model has no such module"
        )
    return AdapterTensors(fields, model.revision, dtype, targets.blocks, targets.paths, tuple(blocks), ends)


def _by_module(tensors: Mapping[str, Tensor], file: Path) -> dict[str, _Found]:
    found: dict[str, _Found] = {}
    for name, tensor in tensors.items():
        if not name.startswith(PREFIX):
            raise ConfigError(f"{file}: {name} is no tensor of peft's LoRA: {PREFIX}... is needed")
        path = name.removeprefix(PREFIX)
        for end, option in _FOREIGN.items():
            if end in path:
                raise ConfigError(f"{file} has {name}: {option} is not supported")
        value = tensor.to(torch.float32)
        if path.endswith((_A, _EMBEDDING_A)):
            found.setdefault(path.removesuffix(_A).removesuffix(_EMBEDDING_A), _Found()).a = value
        elif path.endswith((_B, _EMBEDDING_B)):
            found.setdefault(path.removesuffix(_B).removesuffix(_EMBEDDING_B), _Found()).b = value
        else:
            module, _, parameter = path.rpartition(".")
            found.setdefault(module.removesuffix(_BASE), _Found()).values[parameter] = value
    return found


def _pair(
    site: LoraSite, found: _Found | None, model: ModelModules, path: str, folder: Path
) -> tuple[Tensor, Tensor]:
    """A and B of a module, in the shapes that it needs.  Raises ConfigError."""
    module, file = model.modules[path], folder / WEIGHTS_NAME
    if found is None or found.a is None or found.b is None:
        raise ConfigError(f"{file} has no lora_A and lora_B of {path}, which {CONFIG_NAME} names")
    for name, tensor, shape in (
        ("lora_A", found.a, (site.rank, module.ins)),
        ("lora_B", found.b, (module.outs, site.rank)),
    ):
        if tuple(tensor.shape) != shape:
            raise ConfigError(f"{file}: {name} of {path} is {list(tensor.shape)}, {list(shape)} is needed")
    return found.a, found.b


def _end(site: LoraSite, found: _Found | None, model: ModelModules, path: str, folder: Path) -> EndTensors:
    a, b = _pair(site, found, model, path, folder)
    assert found is not None
    is_embedding = model.modules[path].kind == "embedding"
    return EndTensors(site, a, b, found.values, is_embedding)


def _saved(
    settings: LoraSettings, targets: Targets, placed: dict[str, _Found], model: ModelModules, folder: Path
) -> dict[str, EndTensors]:
    """The modules that are replaced as a whole; a head that the causal model lacks is one too."""
    found: dict[str, EndTensors] = {}
    roots = [*targets.saved]
    for path in [*placed]:
        root = next((each for each in roots if path == each or path.startswith(f"{each}.")), None)
        foreign = path not in model.modules and model.block_of(path) is None
        if root is None and not (foreign and settings.saves_module(path)):
            continue
        each = placed.pop(path)
        if each.a is not None or each.b is not None:
            raise ConfigError(f"{folder / WEIGHTS_NAME} has low-rank matrices of {path}, which is replaced")
        _check_values(each.values, model, path, folder / WEIGHTS_NAME)
        found[path] = EndTensors(values=each.values)
    missing = [
        root for root in roots if not any(path == root or path.startswith(f"{root}.") for path in found)
    ]
    if missing:
        raise ConfigError(
            f"{folder / WEIGHTS_NAME} has no tensor of {missing[0]}, which modules_to_save names"
        )
    return found


def _check_values(values: Mapping[str, Tensor], model: ModelModules, path: str, file: Path) -> None:
    if path not in model.modules:
        return  # a head of a task, which the model for the task checks
    shapes = dict(model.modules[path].parameters)
    for name, tensor in values.items():
        if name not in shapes or tuple(tensor.shape) != shapes[name]:
            allowed = list(shapes[name]) if name in shapes else "no such tensor"
            raise ConfigError(f"{file}: {path}.{name} is {list(tensor.shape)}, {allowed} is needed")
    if missing := sorted(set(shapes) - set(values)):
        raise ConfigError(f"{file} has no {path}.{missing[0]}")
