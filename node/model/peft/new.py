"""A new adapter for a model, with the first values of peft."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from node.config import ConfigError
from node.model.peft.config import ALL_LINEAR, LoraSettings, fields_of, lora_settings
from node.model.peft.modules import ModelModules, ModuleShape
from node.model.peft.prompts import PREFIX_TUNING, PROMPT_TUNING, new_prefix, new_prompt
from node.model.peft.targets import Targets, find_targets, settled
from node.model.peft.tensors import AdapterTensors, EndTensors
from node.runtime.values import shown
from tensor_codec.adapters import AdapterDtype, LoraSite

WHERE = "the adapter's config"
NEW_INITS = (True, False, "gaussian")  # those without a look at the model's weights or data
PROMPT_SCALE = 0.02  # of a soft prompt, as the library's embeddings begin
Values = Callable[[str], Mapping[str, Tensor]]


def new_adapter(
    config: Any,  # Any: a config of peft or a dict
    model: ModelModules,
    *,
    values: Values,
    dtype: AdapterDtype = "bf16",
) -> AdapterTensors:
    """An adapter that changes nothing yet: A as torch's linears begin, B zero (LoRA, arXiv:2106.09685).

    config: a `peft.LoraConfig`, `PromptTuningConfig` or `PrefixTuningConfig`, or a dict of its fields.
    values: the parameters of a module outside blocks, by its path: `modules_to_save` begins with them.
    Raises ConfigError that names the field.
    """
    fields = fields_of(config)
    kind = fields.get("peft_type") or "LORA"
    if kind in (PROMPT_TUNING, PREFIX_TUNING):
        tokens = fields.get("num_virtual_tokens")
        if type(tokens) is not int or tokens < 1:
            raise ConfigError(f"{WHERE}: num_virtual_tokens is {shown(tokens)}, a number from 1 is needed")
        if fields.get("prefix_projection"):
            raise ConfigError(
                f"{WHERE}: prefix_projection is true: keys and values are trained themselves (folders of peft"
                " that were trained so are read)"
            )
        if kind == PREFIX_TUNING:
            return new_prefix(model, tokens, dtype)
        return new_prompt(model, tokens, PROMPT_SCALE)
    if kind != "LORA":
        raise ConfigError(f"{WHERE}: peft_type is {shown(kind)}, LORA is allowed")
    settings = settled(lora_settings(fields, WHERE), model, WHERE)
    if settings.init not in NEW_INITS:
        raise ConfigError(
            f'{WHERE}: init_lora_weights is {settings.init!r}, true, false or "gaussian" is allowed'
        )
    targets = find_targets(settings, model, WHERE)
    blocks = tuple(
        {site.name: _pair(site, model.modules[path], settings.init) for site, path in zip(*each, strict=True)}
        for each in zip(targets.blocks, targets.paths, strict=True)
    )
    ends = {path: _end(site, model.modules[path], settings.init) for path, site in targets.ends.items()}
    ends |= {path: EndTensors(values=_copied(values(path))) for path in targets.saved}
    written = _written(fields, settings, targets, model)
    return AdapterTensors(written, model.revision, dtype, targets.blocks, targets.paths, blocks, ends)


def _pair(site: LoraSite, module: ModuleShape, init: bool | str) -> tuple[Tensor, Tensor]:
    a, b = torch.empty(site.rank, module.ins), torch.zeros(module.outs, site.rank)
    if init == "gaussian":
        nn.init.normal_(a, std=1 / site.rank)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    if init is False:  # not neutral, for tests
        nn.init.kaiming_uniform_(b, a=math.sqrt(5))
    return a, b


def _end(site: LoraSite, module: ModuleShape, init: bool | str) -> EndTensors:
    if module.kind != "embedding":
        return EndTensors(site, *_pair(site, module, init))
    # The other way round: an embedding of LoRA begins with A zero.
    b = torch.randn(module.outs, site.rank)
    a = torch.randn(site.rank, module.ins) if init is False else torch.zeros(site.rank, module.ins)
    return EndTensors(site, a, b, is_embedding=True)


def _copied(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in values.items()}


def _written(
    fields: dict[str, Any],  # Any: JSON
    settings: LoraSettings,
    targets: Targets,
    model: ModelModules,
) -> dict[str, Any]:  # Any: JSON
    """The fields for a folder, with targets that name these modules and no others.

    "all-linear" means other modules in peft for some families, so names stand in its place.
    """
    known = {**fields, "peft_type": "LORA", "bias": "none"}
    chosen = fields.get("target_modules")
    if chosen is not None and not (isinstance(chosen, str) and chosen.lower() == ALL_LINEAR):
        return known
    paths = [*(path for block in targets.paths for path in block), *targets.ends]
    short = sorted({path.rpartition(".")[2] for path in paths})
    same = find_targets(replace(settings, targets=tuple(short)), model, WHERE) == targets
    return {**known, "target_modules": short if same else sorted(paths)}
