"""The library's own models with their blocks in a swarm: the class is the library's, and so is its name.

Embedding, norm and head are modules here.  One `RemoteLayer` stands where the blocks were, so every loop,
loss, pipeline and trainer of the library runs as it is.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from client.adapters.ends import sharing
from client.adapters.prompts import Prompts
from client.hf.base import LAST_ONLY, RemoteBase
from client.hf.blocks import RemoteSequential
from client.hf.generation import RemoteGeneration
from client.hf.layers import RemoteLayer
from client.hf.training import RemoteSaving
from node.model.blocks.span import library_class, library_config
from node.model.checkpoint.architecture import Architecture

if TYPE_CHECKING:
    from client.hf.access import SwarmAccess
    from node.model.embed_and_head import EmbedAndHead

PROMPT_SCALE = 0.02  # of the first values of a soft prompt, as the library's embeddings begin


class FastLinear(nn.Linear):
    """A head by the client's own kernel, where no gradient is wanted and the weight is as it was loaded.

    The kernel takes a third of the time of torch's product for one row; results differ by rounding.
    """

    _product: Callable[..., Tensor]
    _loaded: int  # the version of the weight that the kernel read
    _place: int  # and its address: an adapter may put another one in its place

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        wants_grad = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        plain = input.dtype == self.weight.dtype == torch.float32 and input.device.type == "cpu"
        if wants_grad or not plain or not self.as_loaded:
            return super().forward(input)
        return self._product(input.contiguous(), torch.get_num_threads())

    @property
    def as_loaded(self) -> bool:
        """Whether the weight is that of the checkpoint."""
        return self.weight._version == self._loaded and self.weight.data_ptr() == self._place


class RemoteCausal(RemoteSaving, RemoteGeneration):
    """Mixed into the library's causal language model."""

    def forward(self, *args: Any, **arguments: Any) -> Any:  # Any, here and below: the library's own types
        """The library's arguments and output."""
        last_only = arguments.get("logits_to_keep")
        token = LAST_ONLY.set(isinstance(last_only, int) and last_only == 1)
        try:
            return super().forward(*args, **arguments)  # type: ignore[misc]  # the library's class
        finally:
            LAST_ONLY.reset(token)


class RemoteTask(RemoteSaving):
    """Mixed into the library's models for classification."""


def base_model(
    swarm: SwarmAccess,
    ends: EmbedAndHead,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    pre_seq_len: int = 0,
    deep: bool = False,
    overrides: dict[str, Any] | None = None,
) -> nn.Module:
    """A causal language model over the swarm, with what its base needs.

    ends: of the client; the weights are shared where dtype and device are the same.  overrides: of config.
    """
    folder, architecture = ends.folder, ends.architecture
    whole = library_class(architecture, architecture.whole)
    model = sharing(ends.library_model)
    base = model.get_submodule(architecture.prefix)
    container = base.get_submodule(architecture.container)
    layers = nn.ModuleList([RemoteLayer(architecture.answers_tuple)])
    container.register_module(architecture.blocks, layers)
    config = cast(Any, library_config(whole, folder))
    attention = {"_attn_implementation": cast(Any, model).config._attn_implementation}
    config.update({**attention, **(overrides or {})})
    model.to(device=device, dtype=dtype).requires_grad_(False)
    blocks = RemoteSequential(swarm)
    prompts = None
    if pre_seq_len:
        prompts = Prompts(pre_seq_len, swarm.hidden_size, swarm.blocks if deep else None, PROMPT_SCALE)
        prompts.to(device)
    container.register_module("prompts", prompts)
    known = {"swarm": swarm, "config": config}
    remote = _mixed(container, RemoteBase, {**known, "remote": blocks, "architecture": architecture})
    if architecture.container:
        base.register_module(architecture.container, remote)
        model.register_module(architecture.prefix, _mixed(base, RemoteSaving, known))
    else:
        model.register_module(architecture.prefix, remote)
    causal = cast(Any, _mixed(model, RemoteCausal, {**known, "blocks": blocks}))
    if (fast := _compiled(causal.get_output_embeddings(), ends)) is not None:
        causal.set_output_embeddings(fast)
    return cast(nn.Module, causal.eval())


def task_model(causal: nn.Module, architecture: Architecture, auto: Any, num_labels: int | None) -> nn.Module:
    """The library's model for a task on the base of `causal`; its new modules are trainable.

    auto: the library's Auto class of the task.  Raises ValueError where the family has no such model.
    """
    config = copy.deepcopy(cast(Any, causal).config)
    if num_labels is not None:
        config.update({"num_labels": num_labels})
    try:
        cls = auto._model_mapping[type(config)]
    except KeyError:
        raise ValueError(f"{auto.__name__}: transformers has none for {config.model_type}") from None
    short = copy.copy(config)
    vars(short)[(config.attribute_map or {}).get("num_hidden_layers", "num_hidden_layers")] = 0
    with torch.device("meta"):
        model = cls(short)
    name = architecture.prefix
    base = causal.get_submodule(name)
    if not hasattr(model, name):
        raise ValueError(f"{cls.__name__} has no {name!r} for the blocks of {config.model_type}")
    model.register_module(name, base)
    parameter = next(causal.parameters())
    for child_name, child in model.named_children():
        if child_name != name:
            child.to_empty(device=parameter.device).to(parameter.dtype)
            child.apply(model._init_weights)
            child.requires_grad_(True)
    for module in (base, base.get_submodule(architecture.container)):
        vars(module).update(config=config)
    known = {"swarm": vars(causal)["swarm"], "blocks": vars(causal)["blocks"], "config": config}
    return _mixed(model, RemoteTask, known).eval()


def _mixed(model: nn.Module, mixin: type, attributes: dict[str, Any]) -> nn.Module:
    """The same model as an object of the library's class with a mixin, and with these attributes.

    The class keeps its name and module: the library looks classes up by them.  attributes: past torch's
    registration, so that none of them is a module of the model.
    """
    whole = next(cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers.models."))
    body: dict[str, Any] = {"__module__": whole.__module__}
    if (forward := getattr(mixin, "forward", None)) is not None:
        body["forward"] = _signed(forward, cast(Any, whole).forward)
    made = type(whole.__name__, (mixin, whole), body)
    mixed = cast(Any, made).__new__(made)
    vars(mixed).update({**vars(model), **attributes})
    return cast(nn.Module, mixed)


def _signed(forward: Callable[..., Any], like: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` with the signature of the library's: `generate` and trainers read it."""

    def signed(self: Any, *args: Any, **arguments: Any) -> Any:
        return forward(self, *args, **arguments)

    vars(signed)["__signature__"] = inspect.signature(like)
    return signed


def _compiled(head: nn.Module | None, ends: EmbedAndHead) -> FastLinear | None:
    """The head as a FastLinear; None where there is no kernel for it."""
    if type(head) is not nn.Linear or ends.product is None or head.weight.dtype != torch.float32:
        return None
    fast = FastLinear.__new__(FastLinear)
    weight = head.weight
    known = {"_product": ends.product, "_loaded": weight._version, "_place": weight.data_ptr()}
    vars(fast).update({**vars(head), **known})
    return fast
