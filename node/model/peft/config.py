"""A LoRA config of peft: read with suspicion, and the same answers as peft's to the same questions.

The answers are those of peft 0.21: the modules that a config names (`check_target_module_exists`), their
ranks and their scales.  A field that changes numbers and is not computed here is refused by its name; so is a
field that this table does not know, unless it is empty.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NoReturn

from node.config import ConfigError
from node.runtime.values import shown

ALL_LINEAR = "all-linear"
# Fields that change numbers, and the reason why they must be empty.
REFUSED = {
    "use_dora": "the magnitudes of DoRA are not computed",
    "lora_bias": "biases of low-rank matrices are not computed",
    "target_parameters": "parameters of experts have no low-rank matrices",
    "layer_replication": "blocks are not repeated",
    "trainable_token_indices": "single rows of the embedding are not replaced; modules_to_save is allowed",
    "alora_invocation_tokens": "an adapter holds for all positions of a text",
    "use_qalora": "inputs of an adapter are not pooled",
    "megatron_config": "layers of Megatron are not known here",
    "velora_config": "its backward is not computed",
    "monteclora_config": "its sampling is not computed",
    "kasa_config": "it changes the weights of the model",
    "use_bdlora": "block-diagonal matrices are not computed",
    "arrow_config": "adapters are not routed by token",
    "ensure_weight_tying": "adapters of two modules are not tied",
}
# Fields without an effect on numbers, or without one where the fields above are empty.
WITHOUT_EFFECT = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "runtime_config", "lora_dropout",
}  # fmt: skip
READ = {
    "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "bias",
    "init_lora_weights",
}  # fmt: skip
# Ways to begin that leave the weights of the model alone; a folder holds the values themselves.
INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
# Where a config names no targets: those of peft, by the family.
USUAL_TARGETS: dict[str, tuple[str, ...]] = {
    "bloom": ("query_key_value",),
    "falcon": ("query_key_value",),
    "gpt_neox": ("query_key_value",),
    "gpt2": ("c_attn",),
    "gptj": ("q_proj", "v_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "mixtral",
            "opt",
            "stablelm",
            "gemma",
            "gemma2",
            "gemma3_text",
            "qwen2",
            "qwen3",
        ),
        ("q_proj", "v_proj"),
    ),
}


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """A checked config.

    rank, alpha: of modules that no pattern names.  ranks, alphas: by patterns.  is_rank_stabilised: scales
    are alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732) and not alpha / rank.
    targets: a pattern, or ends of names; None: the family's usual ones.  excluded: the same, of exceptions.
    layers: the blocks with an adapter, None: all.  layer_lists: names of the list of blocks.
    to_save: ends of names of modules that are replaced as a whole.
    init: of new matrices: True, False, "gaussian", or the way in which read ones began.
    """

    rank: int = 8
    alpha: float = 8.0
    is_rank_stabilised: bool = False
    targets: str | tuple[str, ...] | None = None
    excluded: str | tuple[str, ...] | None = None
    layers: frozenset[int] | None = None
    layer_lists: tuple[str, ...] = ()
    ranks: Mapping[str, int] | None = None
    alphas: Mapping[str, float] | None = None
    to_save: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    init: bool | str = True

    def targets_module(self, path: str) -> bool:
        """Whether low-rank matrices are added to the module of this name in the model."""
        if self._names(self.excluded, path) or self._is_saved_or_inside(path) or self.targets is None:
            return False
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, path) is not None
        if path in self.targets:
            return True
        if not self._names(self.targets, path):
            return False
        return self.layers is None or self._layer_of(path) in self.layers

    def saves_module(self, path: str) -> bool:
        """Whether the module of this name is replaced as a whole."""
        return any(path.endswith(name) for name in self.to_save)

    def rank_of(self, path: str) -> int:
        """The rank at the module of this name."""
        return int(_by_pattern(self.ranks or {}, path, self.rank))

    def scale_of(self, path: str, rank: int) -> float:
        """The scale at the module of this name."""
        alpha = float(_by_pattern(self.alphas or {}, path, self.alpha))
        return alpha / math.sqrt(rank) if self.is_rank_stabilised else alpha / rank

    def _is_saved_or_inside(self, path: str) -> bool:
        return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in self.to_save)

    def _layer_of(self, path: str) -> int | None:
        # The first number is the block's; a later one may be an expert's.
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layer_lists] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((each for each in (re.match(one, path) for one in patterns) if each), None)
        return None if found is None else int(found[1])

    @staticmethod
    def _names(names: str | tuple[str, ...] | None, path: str) -> bool:
        if names is None:
            return False
        if isinstance(names, str):
            return re.fullmatch(names, path) is not None
        return any(path == name or path.endswith(f".{name}") for name in names)


def fields_of(config: Any) -> dict[str, Any]:  # Any: a dict, or a config of peft
    """The fields of a config: of a mapping, of a `peft.LoraConfig`, or of an object that looks like one.

    Raises ConfigError for anything else.
    """
    if isinstance(config, Mapping):
        found = dict(config)
    elif callable(getattr(config, "to_dict", None)):
        found = dict(config.to_dict())
    elif hasattr(config, "r") and hasattr(config, "__dict__"):
        found = dict(vars(config))
    else:
        raise ConfigError(f"{shown(config)} is no config of peft: a LoraConfig or a dict is needed")
    return {str(name): _plain(value) for name, value in found.items() if not str(name).startswith("_")}


def lora_settings(fields: Mapping[str, Any], where: str) -> LoraSettings:
    """The settings in the fields of a LoRA config.  where: of the error's text.

    Raises ConfigError that names the field.
    """
    reader = _Fields(fields, where)
    for name, why in REFUSED.items():
        if not _is_empty(fields.get(name)):
            reader.refuse(name, why)
    for name, value in fields.items():
        if name not in READ | WITHOUT_EFFECT | REFUSED.keys() and not _is_empty(value):
            reader.refuse(name, "the field is not known here and may change numbers")
    if fields.get("bias", "none") != "none":
        reader.refuse("bias", 'biases of the model are not trained; "none" is allowed')
    targets, excluded = reader.names_or_pattern("target_modules"), reader.names_or_pattern("exclude_modules")
    layers = reader.layers("layers_to_transform")
    layer_lists = reader.names("layers_pattern")
    if isinstance(targets, str) and (layers is not None or layer_lists):
        name = "layers_to_transform" if layers is not None else "layers_pattern"
        reader.refuse(name, "target_modules is a pattern, which says the layers itself")
    init = fields.get("init_lora_weights", True)
    if init not in INITS:
        reader.refuse("init_lora_weights", "it changes the weights of the model")
    return LoraSettings(
        rank=reader.whole("r", fields.get("r", 8)),
        alpha=reader.number("lora_alpha", fields.get("lora_alpha", 8)),
        is_rank_stabilised=reader.flag("use_rslora"),
        targets=targets,
        excluded=excluded,
        layers=layers,
        layer_lists=layer_lists,
        ranks={key: reader.whole("rank_pattern", value) for key, value in reader.patterns("rank_pattern")},
        alphas={
            key: reader.number("alpha_pattern", value) for key, value in reader.patterns("alpha_pattern")
        },
        to_save=reader.names("modules_to_save"),
        fan_in_fan_out=reader.flag("fan_in_fan_out"),
        init=init,
    )


def _by_pattern(values: Mapping[str, Any], path: str, usual: Any) -> Any:  # Any: a rank or an alpha
    """The value of the first pattern that the end of a name matches."""
    return next((value for key, value in values.items() if re.match(rf"(.*\.)?({key})$", path)), usual)


def _is_empty(value: object) -> bool:
    return value is None or value is False or value == "" or (isinstance(value, list | dict) and not value)


def _plain(value: Any) -> Any:  # Any: a field
    """A field as JSON has it: sets as sorted lists, members of an enum as their values."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True, slots=True)
class _Fields:
    """Readers of a config's fields; each raises ConfigError that names the field."""

    fields: Mapping[str, Any]  # Any: JSON
    where: str

    def refuse(self, name: str, why: str) -> NoReturn:
        raise ConfigError(f"{self.where}: {name} is {shown(self.fields.get(name))}: {why}")

    def whole(self, name: str, value: object) -> int:
        if type(value) is not int or not 1 <= value <= 1 << 16:
            self.refuse(name, "a whole number from 1 is allowed")
        return value

    def number(self, name: str, value: object) -> float:
        if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]  # a number
            self.refuse(name, "a number is allowed")
        return float(value)  # type: ignore[arg-type]  # a number

    def flag(self, name: str) -> bool:
        value = self.fields.get(name, False)
        if type(value) is not bool:
            self.refuse(name, "true or false is allowed")
        return value

    def names(self, name: str) -> tuple[str, ...]:
        value = self.fields.get(name)
        if value is None:
            return ()
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            self.refuse(name, "a list of names is allowed")
        for each in found:
            self._check_pattern(name, each)
        return tuple(each for each in found if each)

    def names_or_pattern(self, name: str) -> str | tuple[str, ...] | None:
        value = self.fields.get(name)
        if not isinstance(value, str):
            return None if value is None else self.names(name)
        if value.lower() == ALL_LINEAR:
            return ALL_LINEAR
        self._check_pattern(name, value)
        return value

    def layers(self, name: str) -> frozenset[int] | None:
        value = self.fields.get(name)
        found = [value] if type(value) is int else value
        if found is None or found == []:
            return None
        if not isinstance(found, list) or not all(type(each) is int and each >= 0 for each in found):
            self.refuse(name, "numbers of blocks are allowed")
        return frozenset(found)

    def patterns(self, name: str) -> Iterable[tuple[str, Any]]:  # Any: JSON
        value = self.fields.get(name) or {}
        if not isinstance(value, Mapping):
            self.refuse(name, "a map from names to numbers is allowed")
        for key in value:
            self._check_pattern(name, key)
        return value.items()

    def _check_pattern(self, name: str, pattern: object) -> None:
        try:
            re.compile(str(pattern))
        except re.error as error:
            self.refuse(name, f"{shown(pattern)} is no regular expression ({error})")
