"""The architectures that are tested: the places of the blocks, embedding and head in each.

The table is closed.  A model outside it might load and give wrong numbers without an error, as spans of
linear attention only, per-layer inputs and state-space models do.  A row is added with a tiny random model
in tests/model_fixtures.py that agrees with the whole model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from node.config import ConfigError

Merge = Literal["mask", "masks", "padding", "never"]


# Their hidden states reach 98,561 and more in the middle blocks; float16 ends at 65,504.
OVERFLOW_FLOAT16 = frozenset({"gemma", "gemma2", "gemma3_text"})


@dataclass(frozen=True, slots=True)
class Architecture:
    """The places of the parts in one of the library's model families.

    module: below `transformers.models`.
    base, whole: the class without and with the head.
    prefix: the attribute of `whole` that holds `base`, and the prefix of its tensors' names.
    container: the attribute of `base` that holds blocks, embedding and norm, "" where they lie in `base`
    itself.
    blocks: the list of blocks in the container.
    ends: modules of the container that belong to the client: embeddings, norms, projections.
    positions: those `ends` that take positions and whose answer is added to the embedding.
    answers_tuple: a block answers a tuple whose first item is the hidden states.
    plain_ends: the embedding is a lookup and the head is a norm and a matrix, without other operations, so
        that both may be called alone.
    merge: the mask for rows of different lengths in one call: one "mask" for all blocks, "masks" by the
        blocks' types, a mask of "padding" (alibi counts from it), or "never".
    fused: node/model/blocks/fused.py computes its blocks too.
    """

    model_type: str
    module: str
    base: str
    whole: str
    prefix: str = "model"
    container: str = ""
    blocks: str = "layers"
    ends: tuple[str, ...] = ("embed_tokens", "norm")
    positions: tuple[str, ...] = ()
    answers_tuple: bool = False
    plain_ends: bool = False
    merge: Merge = "mask"
    fused: bool = False

    def block_of(self, tensor: str) -> tuple[int, str] | None:
        """(block, rest of the name) of a checkpoint's tensor, None for a tensor of embedding, norm or head.

        Checkpoints of the base model alone omit the prefix; both spellings are read.
        """
        path = re.escape(f"{self.container}.{self.blocks}" if self.container else self.blocks)
        found = re.fullmatch(rf"(?:{re.escape(self.prefix)}\.)?{path}\.(\d+)\.(.+)", tensor)
        return (int(found[1]), found[2]) if found else None

    def blocks_of(self, model: Any) -> list[Any]:
        """The blocks of a base model, in order.  Any: torch's modules, of which this file knows nothing."""
        container = model.get_submodule(self.container)
        return list(container.get_submodule(self.blocks).children())

    def block_tensor(self, block: int, rest: str) -> str:
        """The name in the base model of the tensor `rest` of the kept block `block`."""
        return ".".join(part for part in (self.container, self.blocks, str(block), rest) if part)


def _like_llama(
    model_type: str, name: str, *, plain_ends: bool = True, merge: Merge = "mask", fused: bool = False
) -> Architecture:
    return Architecture(
        model_type,
        model_type,
        f"{name}Model",
        f"{name}ForCausalLM",
        plain_ends=plain_ends,
        merge=merge,
        fused=fused,
    )


_TABLE = (
    _like_llama("llama", "Llama", fused=True),
    _like_llama("mistral", "Mistral", fused=True),
    _like_llama("qwen2", "Qwen2", merge="masks", fused=True),
    _like_llama("qwen3", "Qwen3", merge="masks", fused=True),
    _like_llama("gemma", "Gemma"),
    _like_llama("gemma2", "Gemma2", plain_ends=False, merge="masks"),
    Architecture("gemma3_text", "gemma3", "Gemma3TextModel", "Gemma3ForCausalLM", merge="masks"),
    _like_llama("phi3", "Phi3"),
    Architecture("phi", "phi", "PhiModel", "PhiForCausalLM", ends=("embed_tokens", "final_layernorm")),
    Architecture(
        "falcon",
        "falcon",
        "FalconModel",
        "FalconForCausalLM",
        merge="padding",
        prefix="transformer",
        blocks="h",
        ends=("word_embeddings", "ln_f"),
        answers_tuple=True,
    ),
    Architecture(
        "bloom",
        "bloom",
        "BloomModel",
        "BloomForCausalLM",
        merge="padding",
        prefix="transformer",
        blocks="h",
        ends=("word_embeddings", "word_embeddings_layernorm", "ln_f"),
        answers_tuple=True,
    ),
    _like_llama("mixtral", "Mixtral"),
    _like_llama("qwen3_moe", "Qwen3Moe"),
    _like_llama("gpt_oss", "GptOss", merge="masks"),
    _like_llama("olmo2", "Olmo2"),
    _like_llama("smollm3", "SmolLM3", merge="masks", fused=True),
    Architecture(
        "gpt2",
        "gpt2",
        "GPT2Model",
        "GPT2LMHeadModel",
        prefix="transformer",
        blocks="h",
        ends=("wte", "wpe", "ln_f"),
        positions=("wpe",),
    ),
    Architecture(
        "gpt_neox",
        "gpt_neox",
        "GPTNeoXModel",
        "GPTNeoXForCausalLM",
        prefix="gpt_neox",
        ends=("embed_in", "final_layer_norm"),
    ),
    Architecture(
        "opt",
        "opt",
        "OPTModel",
        "OPTForCausalLM",
        container="decoder",
        ends=("embed_tokens", "embed_positions", "project_in", "project_out", "final_layer_norm"),
        positions=("embed_positions",),
    ),
    Architecture(
        "mpt",
        "mpt",
        "MptModel",
        "MptForCausalLM",
        merge="padding",
        prefix="transformer",
        blocks="blocks",
        ends=("wte", "norm_f"),
        answers_tuple=True,
    ),
    _like_llama("granite", "Granite", plain_ends=False),
    _like_llama("cohere2", "Cohere2", plain_ends=False, merge="masks"),
    _like_llama("stablelm", "StableLm"),
    _like_llama("starcoder2", "Starcoder2"),
    _like_llama("glm4", "Glm4"),
    _like_llama("nemotron", "Nemotron"),
    _like_llama("deepseek_v3", "DeepseekV3"),
    Architecture("llama4_text", "llama4", "Llama4TextModel", "Llama4ForCausalLM", merge="never"),
    Architecture(
        "gptj",
        "gptj",
        "GPTJModel",
        "GPTJForCausalLM",
        prefix="transformer",
        blocks="h",
        ends=("wte", "ln_f"),
        answers_tuple=True,
    ),
    Architecture(
        "lfm2", "lfm2", "Lfm2Model", "Lfm2ForCausalLM", ends=("embed_tokens", "embedding_norm"), merge="never"
    ),
)

ARCHITECTURES: dict[str, Architecture] = {row.model_type: row for row in _TABLE}


def architecture_of(model_type: object) -> Architecture:
    """The row for a config's `model_type`.  Raises ConfigError for an architecture that is not tested."""
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    raise ConfigError(
        f"model_type {model_type!r} is not supported; supported are {', '.join(sorted(ARCHITECTURES))}"
    )
