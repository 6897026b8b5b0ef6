"""A LoRA config has the modules, ranks and scales of peft; a field that would change numbers is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import pytest

from node.config import ConfigError
from node.model.peft.config import REFUSED, fields_of, lora_settings

Q = "model.layers.3.self_attn.q_proj"
EXPERT = "model.layers.3.mlp.experts.7.gate_proj"


def settings(**fields: Any):
    return lora_settings({"target_modules": ["q_proj"], **fields}, "config")


@pytest.mark.parametrize(
    ("fields", "path", "named"),
    [
        ({"target_modules": ["q_proj"]}, Q, True),
        ({"target_modules": ["proj"]}, Q, False),  # whole parts of a name
        ({"target_modules": ["self_attn.q_proj"]}, Q, True),
        ({"target_modules": [Q]}, Q, True),
        ({"target_modules": ["model.layers"]}, Q, False),
        ({"target_modules": "q_proj"}, Q, False),  # a text is a pattern for the whole name
        ({"target_modules": r".*\.(q|v)_proj"}, Q, True),
        ({"target_modules": r".*layers\.[12]\..*"}, Q, False),
        ({"target_modules": []}, Q, False),
        ({"exclude_modules": ["layers.3.self_attn.q_proj"]}, Q, False),
        ({"exclude_modules": r".*\.3\..*"}, Q, False),
        ({"exclude_modules": ["v_proj"]}, Q, True),
        ({"modules_to_save": ["q_proj"]}, Q, False),
        ({"modules_to_save": ["self_attn"]}, Q, False),
        ({"modules_to_save": ["lm_head"]}, Q, True),
        ({"layers_to_transform": [1, 3]}, Q, True),
        ({"layers_to_transform": 3}, Q, True),
        ({"layers_to_transform": [0]}, Q, False),
        ({"layers_to_transform": []}, Q, True),
        ({"layers_to_transform": [3], "layers_pattern": "layers"}, Q, True),
        ({"layers_to_transform": [3], "layers_pattern": ["h", "layers"]}, Q, True),
        ({"layers_to_transform": [3], "layers_pattern": "h"}, Q, False),
        ({"layers_to_transform": [0], "target_modules": [Q]}, Q, True),  # a whole name needs no layer
        ({"layers_to_transform": [3], "target_modules": ["gate_proj"]}, EXPERT, True),  # not the expert's 7
        ({"layers_to_transform": [7], "target_modules": ["gate_proj"]}, EXPERT, False),
        ({"layers_to_transform": [0], "target_modules": ["lm_head"]}, "model.lm_head", False),
    ],
)
def test_the_modules_are_those_that_peft_takes(fields, path, named):
    assert settings(**fields).targets_module(path) is named


@pytest.mark.parametrize(
    ("fields", "rank", "scale"),
    [
        ({}, 8, 1.0),
        ({"r": 4, "lora_alpha": 16}, 4, 4.0),
        ({"r": 4, "lora_alpha": 16, "use_rslora": True}, 4, 8.0),
        ({"r": 4, "lora_alpha": 16, "rank_pattern": {"q_proj": 2}}, 2, 8.0),
        ({"r": 4, "lora_alpha": 16, "rank_pattern": {"proj": 2}}, 4, 4.0),
        ({"r": 4, "lora_alpha": 16, "rank_pattern": {r".*\.3\..*": 2}}, 2, 8.0),
        ({"r": 4, "lora_alpha": 16, "rank_pattern": {"layers.3.self_attn.q_proj": 2, "q_proj": 1}}, 2, 8.0),
        ({"r": 4, "lora_alpha": 16, "alpha_pattern": {"^model.layers.3.self_attn.q_proj": 2}}, 4, 0.5),
        ({"r": 3, "alpha_pattern": {"q_proj": 6.0}, "use_rslora": True}, 3, 6 / math.sqrt(3)),
    ],
)
def test_ranks_and_scales_are_those_of_peft(fields, rank, scale):
    found = settings(**fields)
    assert found.rank_of(Q) == rank
    assert found.scale_of(Q, rank) == scale


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_is_not_computed_is_refused_by_its_name(name):
    with pytest.raises(ConfigError, match=rf"^config: {name} is True: .+"):
        settings(**{name: True})
    settings(**{name: None})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bias": "all"}, "config: bias is 'all': biases of the model are not trained; \"none\" is allowed"),
        ({"init_lora_weights": "pissa"}, "config: init_lora_weights is 'pissa': it changes the weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"r": 0}, "config: r is 0: a whole number from 1 is allowed"),
        ({"r": 4.5}, "r is 4.5"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern"),
        ({"rank_pattern": ["q"]}, "rank_pattern"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q": None}}, "alpha_pattern"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes': true or false is allowed"),
        ({"target_modules": 7}, "target_modules is 7"),
        ({"target_modules": "(q"}, "target_modules"),
        ({"target_modules": [1]}, "target_modules"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform"),
        ({"layers_to_transform": [-1]}, "layers_to_transform"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [1]}, "layers_to_transform is [1]"),
        ({"target_modules": "all-linear", "layers_pattern": "h"}, "layers_pattern is 'h'"),
        ({"a_field_of_later": {"beta": 1}}, "a_field_of_later"),
    ],
)
def test_a_bad_value_is_refused_by_its_name(fields, message):
    with pytest.raises(ConfigError) as error:
        settings(**fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_later_field_without_a_value_is_no_fault():
    assert settings(a_field_of_later=None, another=[], third=False).rank == 8


class Kind(StrEnum):
    LORA = "LORA"


@dataclass
class LikePeft:
    r: int = 4
    target_modules: set = field(default_factory=lambda: {"v_proj", "q_proj"})
    peft_type: Kind = Kind.LORA
    _custom_modules: Any = None


def test_a_config_may_be_a_mapping_or_an_object():
    wanted = {"r": 4, "target_modules": ["q_proj", "v_proj"], "peft_type": "LORA"}
    assert fields_of(LikePeft()) == wanted
    assert fields_of(wanted) == wanted
    for wrong in (None, "q_proj", 8, object()):
        with pytest.raises(ConfigError, match="is no config of peft"):
            fields_of(wrong)
