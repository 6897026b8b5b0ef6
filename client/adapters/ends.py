"""An adapter at the client's own modules: embedding, norm, head.  No server knows of them.

Low-rank matrices are added to a module's output, as peft does; a module of `modules_to_save` computes with
the adapter's parameters in place of its own.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from node.model.peft.tensors import EndTensors

if TYPE_CHECKING:
    from client.adapters.adapter import Adapter
    from node.model.embed_and_head import EmbedAndHead


class AdaptedModule(nn.Module):
    """A module of the client with an adapter.

    base: the module itself; its attributes can be read here.  end: the adapter's values.
    """

    def __init__(self, base: nn.Module, end: EndTensors) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = cast(Any, end.a), cast(Any, end.b)
        self.values = nn.ParameterDict(dict(end.values))
        self.scale = 0.0 if end.site is None else end.site.scale
        self.is_embedding = end.is_embedding

    def forward(self, *args: Any, **arguments: Any) -> Any:  # Any: the module's own signature
        """The module's arguments and answer."""
        if self.values:
            like = dict(self.base.named_parameters())
            values = {name: value.to(like[name].dtype) for name, value in self.values.items()}
            output = functional_call(self.base, values, args, arguments)
        else:
            output = self.base(*args, **arguments)
        if self.a is None:
            return output
        return output + self._added(args[0] if args else next(iter(arguments.values()))).to(output.dtype)

    def _added(self, given: Tensor) -> Tensor:
        if self.is_embedding:
            low = functional.embedding(given, self.a.T) @ self.b.T * self.scale
            own = getattr(self.base, "embed_scale", None)  # of gemma: the library scales the answer
            return cast(Tensor, low if own is None else low * own)
        low = functional.linear(functional.linear(given.to(self.a.dtype), self.a), self.b)
        return low * self.scale

    def __getattr__(self, name: str) -> Any:  # Any: an attribute of the module
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


def apply_ends(model: nn.Module, adapter: Adapter, prefix: str) -> dict[str, nn.Module]:
    """Put an adapter on the modules of a model; the modules that stood there, by their paths in the model.

    prefix: of the base model in the class with the head; a base model alone has shorter paths.
    Raises ValueError for a module that the model lacks, for instance a head of another task, or that does not
    fit, and leaves the model as it was.
    """
    before: dict[str, nn.Module] = {}
    for name, end in adapter.tensors.ends.items():
        path = next((each for each in (name, name.removeprefix(f"{prefix}.")) if _has(model, each)), None)
        if path is None:
            remove_ends(model, before)
            raise ValueError(f"the adapter has values for {name}, which {type(model).__name__} does not have")
        base = model.get_submodule(path)
        shapes = {key: value.shape for key, value in base.named_parameters()}
        wrong = next((key for key, value in end.values.items() if shapes.get(key) != value.shape), None)
        if wrong is not None:
            remove_ends(model, before)
            raise ValueError(
                f"the adapter's {name}.{wrong} is {list(end.values[wrong].shape)}, the model's"
                f" {list(shapes.get(wrong, []))}"
            )
        before[path] = base
        _put(model, path, AdaptedModule(base, end))
    return before


def remove_ends(model: nn.Module, before: dict[str, nn.Module]) -> None:
    """Put the modules of `apply_ends` back."""
    for path, module in before.items():
        _put(model, path, module)


def ends_with(ends: EmbedAndHead, adapter: Adapter) -> EmbedAndHead:
    """Embedding and head with an adapter on them; the same object where the adapter has nothing for them.

    The weights are shared, and the adapter's values are those of this moment.  Raises ValueError as
    `apply_ends`, and for a soft prompt: it takes positions in front of the text, see `client.hf`.
    """
    from client.adapters.adapter import Adapter
    from node.model.embed_and_head import EmbedAndHead

    if adapter.tensors.prompt is not None:
        raise ValueError("a soft prompt stands in front of a text: client.hf generates with it")
    if not adapter.tensors.ends:
        return ends
    model = sharing(ends.model)
    frozen = Adapter(replace(adapter.tensors, sites=(), paths=(), blocks=())).requires_grad_(False)
    if ends.device.type != "cpu":
        frozen = copy.deepcopy(frozen)  # the adapter itself stays where it is
    apply_ends(model, frozen, ends.architecture.prefix)
    model.to(ends.device)
    adapted = EmbedAndHead(model, ends.architecture, ends.folder)
    vars(adapted)["tokenizer"] = ends.tokenizer
    return adapted


def sharing(model: nn.Module) -> nn.Module:
    """A copy of a model with parameters of its own on the same memory."""
    memo: dict[int, Any] = {
        id(one): nn.Parameter(one.detach(), requires_grad=False) for one in model.parameters()
    }
    memo |= {id(one): one for one in model.buffers()}
    return copy.deepcopy(model, memo)


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent).register_module(name, module)
