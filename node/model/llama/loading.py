"""From tensors to our own modules of llama's family."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from node.model.llama.config import LlamaConfig
from node.model.llama.modules import LlamaForCausalLM, LlamaModel

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_ANGLES = "rotary_emb.inv_freq"  # in old checkpoints: computed here, as in the library


def load_own(
    whole: type[LlamaModel] | type[LlamaForCausalLM],
    config: LlamaConfig,
    trim: Callable[[nn.Module], None],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> nn.Module | None:
    """A model that `trim` has cut down, filled with these tensors; floating ones become `dtype`.

    A tensor in `dtype` is taken as it lies.  None unless each tensor has its place and its shape, and none is
    missing: the library then says what is wrong.
    """
    with torch.device("meta"):
        model = whole(config)
    trim(model)
    wanted = {name: each.shape for name, each in model.state_dict().items()}
    given = {
        name: each.to(dtype) if each.is_floating_point() else each
        for name, each in tensors.items()
        if not name.endswith(_ANGLES)
    }
    tied = config.tie_word_embeddings and _HEAD in wanted and _is_one(given)
    if tied:
        given[_HEAD] = given[_EMBEDDING]
    if wanted != {name: each.shape for name, each in given.items()}:
        return None
    model.load_state_dict(given, assign=True)
    if tied and isinstance(model, LlamaForCausalLM):
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def _is_one(given: Mapping[str, Tensor]) -> bool:
    """Whether the embedding is the head too: the file has no head, or the same numbers."""
    if _EMBEDDING not in given:
        return False
    return _HEAD not in given or torch.equal(given[_HEAD], given[_EMBEDDING])
