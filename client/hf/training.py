"""The files of what is trained over a swarm, prompts, heads and adapters: with the revision of the model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from client.adapters.hf_model import RemoteAdapters, adapter_parameters, save_adapter_of
from client.hf.access import SwarmAccess

KEY = "raceme"  # in config.json
WEIGHTS = "model.safetensors"


class RemoteSaving(RemoteAdapters):
    """Mixed into every model over a swarm: saves what it trains, and ends with its swarm.

    swarm: of the model.  owns_swarm: whether `close` leaves it.
    """

    swarm: SwarmAccess
    owns_swarm: bool = False

    def save_pretrained(self, save_directory: Any, state_dict: Any = None, **arguments: Any) -> None:
        """Write the trained parameters and buffers, and the config with the model and its revision.

        An adapter that is in use is written in the form of peft.
        Nothing of the frozen model is written.  Other arguments of the library's method (push_to_hub, ...)
        are followed.  Raises ValueError where nothing is trainable.
        """
        model = cast(nn.Module, self)
        has_adapter = save_adapter_of(model, Path(save_directory))
        adapted = adapter_parameters(model)
        trained = {
            name: one
            for name, one in model.named_parameters()
            if one.requires_grad and id(one) not in adapted
        }
        if not trained and has_adapter:
            return
        if not trained:
            raise ValueError(
                "nothing to save: no parameter requires a gradient; tuning_mode='ptune' trains prompts"
            )
        states = model.state_dict() if state_dict is None else state_dict
        wanted = {name: _own(states[name]) for name in trained if name in states}
        config = cast(Any, self).config
        swarm = self.swarm.swarm
        name = swarm.config.model or swarm.info.name
        about = {"model": name, "revision": swarm.info.revision, **vars(self).get("tuning", {})}
        config.update({KEY: about})
        vars(self)["_keys_to_ignore_on_save"] = None
        super().save_pretrained(  # type: ignore[misc]  # the library's class
            save_directory, state_dict=wanted, **arguments
        )

    def activation_checkpointing_enable(self, *args: Any, **arguments: Any) -> None:
        """Nothing to do: the blocks' activations are never held here."""

    def activation_checkpointing_disable(self, *args: Any, **arguments: Any) -> None:
        """Nothing to do."""

    gradient_checkpointing_enable = activation_checkpointing_enable  # the library's older name
    gradient_checkpointing_disable = activation_checkpointing_disable

    def __deepcopy__(self, memo: Any) -> Any:
        """A copy with parameters of its own, over the same swarm."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a model of a swarm cannot be pickled: save_pretrained saves what was trained")

    def own_swarm(self) -> None:
        """`close` leaves the swarm too."""
        self.owns_swarm = True

    def close(self) -> None:
        """Leave the swarm, where the model has joined it."""
        if self.owns_swarm:
            cast(Any, self.swarm.handle).close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def read_about(folder: Path) -> dict[str, Any] | None:
    """What a folder of `save_pretrained` says about itself; None for any other folder."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text()).get(KEY)
    except (ValueError, AttributeError):
        return None
    return found if isinstance(found, dict) else None


def load_trained(model: nn.Module, folder: Path, about: dict[str, Any], revision: str) -> None:
    """Put the trained tensors of a folder into the model.

    Raises ValueError for another revision of the model, and for tensors that are missing or do not fit.
    """
    from safetensors.torch import load_file

    if about.get("revision") != revision:
        raise ValueError(
            f"{folder} was trained on revision {about.get('revision')} of {about.get('model')}, the swarm"
            f" serves {revision}"
        )
    saved = load_file(folder / WEIGHTS)
    own = dict(model.named_parameters())
    missing = sorted({name for name, one in own.items() if one.requires_grad} - set(saved))
    unknown = sorted(set(saved) - set(own))
    if missing or unknown:
        raise ValueError(
            f"{folder / WEIGHTS}: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}"
        )
    for name, tensor in saved.items():
        if own[name].shape != tensor.shape:
            raise ValueError(
                f"{folder / WEIGHTS}: {name} is {list(tensor.shape)}, {list(own[name].shape)} is needed"
            )
        own[name].data.copy_(tensor)
