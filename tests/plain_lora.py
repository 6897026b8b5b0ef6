"""LoRA in plain torch on the library's own model: what peft computes, for tests without peft."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from client.adapters.adapter import Adapter

PREFIX = "base_model.model."


class PlainLora(nn.Module):
    """A model of one process with the values of an adapter, as parameters of its own.

    `parameters` of this module are those that the adapter trains, by the same names.
    rounded: the blocks compute with values of bfloat16, as servers do that get these.
    """

    model: Any  # the library's own class

    def __init__(self, model: Any, adapter: Adapter, *, rounded: bool = False) -> None:
        super().__init__()
        vars(self)["model"] = model.requires_grad_(False)
        self.rounded = rounded
        self.values = {
            name: nn.Parameter(value.detach().clone()) for name, value in adapter.named_parameters().items()
        }
        for name, value in self.values.items():
            self.register_parameter(name.replace(".", "/"), value)
        for paths, sites in zip(adapter.tensors.paths, adapter.manifest.blocks, strict=True):
            for path, site in zip(paths, sites, strict=True):
                self._hook(path, site.scale, in_blocks=True)
        for path, end in adapter.tensors.ends.items():
            if end.site is not None:
                self._hook(path, end.site.scale, in_blocks=False)
            else:
                self._replace(path)

    def _hook(self, path: str, scale: float, *, in_blocks: bool) -> None:
        module = self.model.get_submodule(path)
        if isinstance(module, nn.Embedding):
            a, b = (self.values[f"{PREFIX}{path}.lora_embedding_{side}"] for side in "AB")
            module.register_forward_hook(lambda _, args, out: out + scale * (a.T[args[0]] @ b.T))
            return
        a, b = (self.values[f"{PREFIX}{path}.lora_{side}.weight"] for side in "AB")

        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            used = [_rounded(one) if self.rounded and in_blocks else one for one in (a, b)]
            return output + scale * functional.linear(functional.linear(args[0], used[0]), used[1])

        module.register_forward_hook(add)

    def _replace(self, path: str) -> None:
        module = self.model.get_submodule(path)
        for name, _ in list(module.named_parameters()):
            del module._parameters[name]
            vars(module)[name] = self.values[f"{PREFIX}{path}.{name}"]

    def forward(self, *args: Any, **arguments: Any) -> Any:
        return self.model(*args, **arguments)


def _rounded(value: Tensor) -> Tensor:
    """The value in bfloat16; the gradient goes through as it is."""
    return value + (value.detach().to(torch.bfloat16).float() - value.detach())
