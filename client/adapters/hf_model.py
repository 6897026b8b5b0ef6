"""Adapters of a model of `client.hf`, by the library's own methods: `add_adapter`, `load_adapter`, ...

The library's methods put peft's layers into the model; here the blocks are at servers, so the values go there
with each request, and gradients come back into `nn.Parameter`s of the model.  Low-rank matrices and modules
of `modules_to_save` outside blocks, and soft prompts, are applied here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from client.adapters.adapter import Adapter
from client.adapters.ends import apply_ends, remove_ends
from client.adapters.folder import load_adapter, new_adapter, save_adapter
from client.adapters.prompts import Prompts
from client.hf.access import SwarmAccess
from node.runtime.values import shown

if TYPE_CHECKING:
    from node.model.embed_and_head import EmbedAndHead
    from tensor_codec.adapters import AdapterDtype

DEFAULT = "default"  # the name of an adapter without one, as in peft
NONE_LOADED = "No adapter loaded. Please load an adapter first."  # the library's words


class AdapterParameters(nn.Module):
    """The parameters of one adapter, as a module of the model."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter
        for name, parameter in adapter.named_parameters().items():
            self.register_parameter(name.replace(".", "/"), cast(nn.Parameter, parameter))


class Adapters(nn.Module):
    """All adapters of a model, and the one that is in use.

    model: the outermost one; not registered here.  prefix: of its base model.
    """

    def __init__(self, model: nn.Module, swarm: SwarmAccess) -> None:
        super().__init__()
        self.kept = nn.ModuleDict()
        self.active: str | None = None
        self.is_enabled = True
        vars(self).update(_model=model, _swarm=swarm, _before={}, _prompted=None)

    def __getitem__(self, name: str) -> Adapter:
        """The adapter of this name.  Raises ValueError."""
        if name not in self.kept:
            known = ", ".join(self.kept) or "none"
            raise ValueError(
                f"Adapter with name {name} not found. Please pass an existing adapter name: {known}"
            )
        return cast(AdapterParameters, self.kept[name]).adapter

    def add(self, name: str | None, make: Any) -> None:  # Any: a function that makes an Adapter
        """Keep a new adapter under a name and use it.  Raises ValueError for a name that is taken."""
        name = DEFAULT if name is None else name
        if name in self.kept or not name or "." in name:
            raise ValueError(f"Adapter with name {name} already exists. Please use a different name.")
        self.kept[name] = AdapterParameters(make())
        try:
            self.use(name)
        except ValueError:
            del self.kept[name]
            raise

    def use(self, name: str | None) -> None:
        """Use this adapter from now on, or none."""
        adapter = None if name is None else self[name]
        before = self.active
        self._take_off()
        try:
            self._put_on(adapter)
        except ValueError:
            self._put_on(None if before is None else self[before])
            raise
        self.active, self.is_enabled = name, True

    def enable(self, wanted: bool) -> None:
        """Compute with the active adapter, or without any."""
        self._take_off()
        if wanted and self.active is not None:
            self._put_on(self[self.active])
        self.is_enabled = wanted

    def remove(self, name: str) -> None:
        """Forget an adapter.  Raises ValueError for a name that is not known."""
        _ = self[name]
        if name == self.active:
            self.use(None)
        del self.kept[name]

    @property
    def _ends(self) -> EmbedAndHead:
        return cast("EmbedAndHead", vars(self)["_swarm"].swarm.local_model)

    def __deepcopy__(self, memo: object) -> Adapters:
        raise TypeError("a model with adapters cannot be copied: load them into the other model")

    def _put_on(self, adapter: Adapter | None) -> None:
        if adapter is None:
            return
        state = vars(self)
        model, swarm = state["_model"], state["_swarm"]
        served = swarm.swarm.info.revision
        if adapter.revision != served:
            raise ValueError(f"the adapter is for revision {adapter.revision}, the swarm serves {served}")
        if adapter.virtual_tokens and self._ends.architecture.positions:
            raise ValueError("a prefix before learned positions: compute with it by swarm.generate")
        if adapter.tensors.prompt is not None:
            base = _prompted(model)
            if base.prompts is not None:
                raise ValueError("the model has a soft prompt of its own (tuning_mode)")
            base.register_module("prompts", Prompts.of(cast(nn.Parameter, adapter.tensors.prompt)))
            state["_prompted"] = base
        state["_before"] = apply_ends(model, adapter, self._ends.architecture.prefix)
        swarm.use(adapter)

    def _take_off(self) -> None:
        state = vars(self)
        remove_ends(state["_model"], state["_before"])
        if state["_prompted"] is not None:
            state["_prompted"].register_module("prompts", None)
        state["_swarm"].use(None)
        state.update(_before={}, _prompted=None)


class RemoteAdapters:
    """Mixed into every model over a swarm: the library's methods for adapters, over servers.

    The library documents them in `transformers.integrations.PeftAdapterMixin`.
    """

    swarm: SwarmAccess

    def add_adapter(
        self,
        adapter_config: Any,  # Any: a config of peft or a dict
        adapter_name: str | None = None,
        *,
        dtype: AdapterDtype = "bf16",
    ) -> None:
        """A new adapter that changes nothing yet; it is used, and its parameters can be trained.

        adapter_config: a `peft.LoraConfig`, `PromptTuningConfig` or `PrefixTuningConfig`, or a dict of its
        fields.  dtype: in which servers get its values, "bf16" or "fp32".
        Raises ConfigError that names the field, ValueError for a name that is taken.
        """
        ends = self.swarm.swarm.local_model
        self._adapters().add(adapter_name, lambda: new_adapter(adapter_config, ends, dtype=dtype))

    def load_adapter(
        self,
        peft_model_id: Any = None,  # Any: a path, or an Adapter
        adapter_name: str | None = None,
        *,
        is_trainable: bool = False,
        revision: str | None = None,
        dtype: AdapterDtype | None = None,
        **arguments: Any,  # Any: the library's
    ) -> None:
        """An adapter out of a folder of peft, or one that the program has; it is used.

        peft_model_id: the folder, a name of the hub, or a `client.adapters.adapter.Adapter`.
        dtype: in which servers get its values; None: that of the folder.
        Raises ConfigError that names the file or the field, ValueError for a name that is taken.
        """
        if unknown := [name for name, value in arguments.items() if value]:
            raise ValueError(f"load_adapter over a swarm has no {', '.join(unknown)}: a folder is read")
        kept = self._adapters()
        if isinstance(peft_model_id, Adapter):
            kept.add(adapter_name, lambda: peft_model_id)
            return
        if not isinstance(peft_model_id, str | Path):
            raise ValueError(
                f"peft_model_id is {shown(peft_model_id)}, a folder or a name of the hub is needed"
            )
        ends = self.swarm.swarm.local_model

        def loaded() -> Adapter:
            found = load_adapter(peft_model_id, ends, revision=revision, dtype=dtype)
            return found.requires_grad_(is_trainable)

        kept.add(adapter_name, loaded)

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Use this adapter alone.  Raises ValueError for an unknown name, and for several."""
        names = adapter_name if isinstance(adapter_name, list) else [adapter_name]
        if len(names) != 1:
            raise ValueError(f"{len(names)} adapters at a time: a request has one")
        self._loaded().use(names[0])

    def disable_adapters(self) -> None:
        """Compute without an adapter until `enable_adapters`."""
        self._loaded().enable(False)

    def enable_adapters(self) -> None:
        """Compute with the active adapter again."""
        self._loaded().enable(True)

    def active_adapters(self) -> list[str]:
        """The name of the adapter in use, in a list."""
        active = self._loaded().active
        return [] if active is None else [active]

    def active_adapter(self) -> str:
        """The name of the adapter in use."""
        return self.active_adapters()[0]

    def delete_adapter(self, adapter_names: str | list[str]) -> None:
        """Forget adapters by name.  Raises ValueError for an unknown name."""
        for name in adapter_names if isinstance(adapter_names, list) else [adapter_names]:
            self._loaded().remove(name)

    def get_adapter(self, adapter_name: str | None = None) -> Adapter:
        """The adapter of this name, or the one in use, for `Swarm.generate`, `client.train` and folders."""
        return self._loaded()[adapter_name or self.active_adapter()]

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Any = None
    ) -> dict[str, Tensor]:
        """The values of an adapter by their names in a folder of peft."""
        return {name: one.detach() for name, one in self.get_adapter(adapter_name).named_parameters().items()}

    def enable_peft_hotswap(self, *args: Any, **arguments: Any) -> None:
        """Nothing to do: no model is compiled here."""

    def _adapters(self) -> Adapters:
        model = cast(nn.Module, self)
        found = model._modules.get("adapters")
        if found is None:
            found = Adapters(model, self.swarm)
            model.register_module("adapters", found)
        return cast(Adapters, found)

    def _loaded(self) -> Adapters:
        found = self._adapters()
        if not len(found.kept):
            raise ValueError(NONE_LOADED)
        return found


def save_adapter_of(model: nn.Module, folder: Path) -> bool:
    """Write the adapter in use as a folder of peft; False without one."""
    kept = cast("Adapters | None", model._modules.get("adapters"))
    if kept is None or kept.active is None:
        return False
    save_adapter(kept[kept.active], folder)
    return True


def adapter_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters that adapters of a model hold."""
    kept = model._modules.get("adapters")
    return set() if kept is None else {id(each) for each in kept.parameters()}


def _prompted(model: nn.Module) -> Any:
    """The module that puts a soft prompt in front of its input."""
    return next(each for each in model.modules() if "prompts" in each._modules)
