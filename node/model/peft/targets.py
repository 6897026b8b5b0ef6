"""The modules that a LoRA config names in a model, with their ranks and scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from node.config import ConfigError
from node.model.adapters.sites import EXPERTS
from node.model.peft.config import ALL_LINEAR, USUAL_TARGETS, LoraSettings
from node.model.peft.modules import ModelModules, ModuleShape
from tensor_codec.adapters import LoraSite


@dataclass(frozen=True, slots=True)
class Targets:
    """Low-rank matrices by their places.

    blocks: the sites of each block, in the order of their names.  paths: the modules of these sites.
    ends: rank and scale at modules of the client by their paths.  saved: modules that are replaced.
    """

    blocks: tuple[tuple[LoraSite, ...], ...]
    paths: tuple[tuple[str, ...], ...]
    ends: Mapping[str, LoraSite]
    saved: tuple[str, ...]


def settled(settings: LoraSettings, model: ModelModules, where: str) -> LoraSettings:
    """The settings with names for targets in place of "all-linear" and of none.

    Raises ConfigError where a config names none and the family has no usual ones.
    """
    if settings.targets is None:
        usual = USUAL_TARGETS.get(model.architecture.model_type)
        if usual is None:
            raise ConfigError(
                f"{where}: target_modules is not given, and {model.architecture.model_type} has no usual"
                f" ones: {_choice(model)}"
            )
        return replace(settings, targets=usual)
    if settings.targets != ALL_LINEAR:
        return settings
    linears = [
        module.path
        for module in model.modules.values()
        if module.site is not None or (module.kind in ("linear", "conv1d") and module.block is None)
    ]
    return replace(settings, targets=tuple(path for path in linears if path != model.head))


def find_targets(settings: LoraSettings, model: ModelModules, where: str, *, bare: bool = False) -> Targets:
    """The modules that settled settings name.

    bare: the config was made for the library's class without a head, whose paths are shorter.
    Raises ConfigError for a module that cannot have low-rank matrices, and where none is named.
    """
    prefix = f"{model.architecture.prefix}." if bare else ""
    sites: list[dict[str, tuple[LoraSite, str]]] = [{} for _ in range(model.blocks)]
    ends: dict[str, LoraSite] = {}
    saved: list[str] = []
    for path, module in model.modules.items():
        known = path.removeprefix(prefix)
        if settings.saves_module(known):
            if module.block is not None or model.holds_blocks(path):
                raise ConfigError(f"{where}: modules_to_save names {path}: blocks stay as they are")
            saved.append(path)
        elif settings.targets_module(known):
            site = _site_at(settings, module, known, where)
            if module.block is None:
                ends[path] = site
            else:
                sites[module.block][site.name] = site, path
    if not ends and not saved and not any(sites):
        raise ConfigError(f"{where}: target_modules names no module of the model: {_choice(model)}")
    ordered = [[block[name] for name in sorted(block)] for block in sites]
    return Targets(
        tuple(tuple(site for site, _ in block) for block in ordered),
        tuple(tuple(path for _, path in block) for block in ordered),
        ends,
        tuple(saved),
    )


def _site_at(settings: LoraSettings, module: ModuleShape, path: str, where: str) -> LoraSite:
    """Rank and scale at a module.  path: its name as the config's patterns see it.

    Raises ConfigError for a module that cannot have low-rank matrices.
    """
    if module.block is not None and module.site is None:
        raise ConfigError(f"{where}: target_modules names {path}: {_why(module)}")
    if module.kind == "other":
        raise ConfigError(f"{where}: target_modules names {path}: it is no linear and no embedding")
    if settings.fan_in_fan_out and module.kind == "linear":
        raise ConfigError(f"{where}: fan_in_fan_out is true: {path} is no Conv1D; false is allowed")
    rank = settings.rank_of(path)
    if rank > min(module.ins, module.outs):
        raise ConfigError(f"{where}: rank {rank} at {path} of {module.ins} x {module.outs}")
    return LoraSite(module.site or path.rpartition(".")[2], rank, settings.scale_of(path, rank))


def _why(module: ModuleShape) -> str:
    if EXPERTS in module.path.split("."):
        return "an expert sees some tokens alone, so servers have no low-rank matrices there"
    if module.kind == "other":
        return "linears of blocks may have low-rank matrices"
    return "it chooses experts"


def _choice(model: ModelModules) -> str:
    names = sorted({name for shapes in model.shapes for name in shapes})
    return f"{', '.join(names)} or {ALL_LINEAR!r} is allowed"
