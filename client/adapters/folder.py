"""Adapters out of folders and of the hub, into folders, and new ones: in the form of peft."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from client.adapters.adapter import Adapter
from node.config import ConfigError
from node.model.embed_and_head import EmbedAndHead
from node.model.peft.folder import adapter_folder, read_adapter, write_adapter
from node.model.peft.new import new_adapter as new_tensors
from tensor_codec.adapters import AdapterDtype

if TYPE_CHECKING:
    from client.api import SwarmFacts

log = logging.getLogger("raceme")


def load_adapter(
    path: str | Path,
    swarm: SwarmFacts | EmbedAndHead,
    *,
    revision: str | None = None,
    dtype: AdapterDtype | None = None,
) -> Adapter:
    """An adapter out of a folder of peft, or of the hub ("org/name"); not trained until `requires_grad_`.

    swarm: of the model that it was made for, or the client's part of that model.  revision: a branch, tag or
    commit of the hub.  dtype: in which servers get its values; None: "bf16" where the file has bfloat16, else
    "fp32", which loses nothing.
    Raises ConfigError that names the file or the field.
    """
    folder = adapter_folder(path, revision)
    return Adapter(read_adapter(folder, _ends(swarm).modules, dtype)).requires_grad_(False)


def is_to_be_read(named: str | Path) -> bool:
    """Whether this is an adapter's folder or its name at the hub; else it is a name that servers keep."""
    return isinstance(named, Path) or "/" in named or Path(named).is_dir()


def save_adapter(adapter: Adapter, path: str | Path, *, dtype: AdapterDtype | None = None) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` loads.

    dtype: of the values in the file; None: that in which servers compute with them.  "fp32" keeps what an
    optimizer needs to go on.  Raises ConfigError where the disk refuses.
    """
    write_adapter(adapter.tensors, Path(path), dtype)


def new_adapter(
    config: Any,  # Any: a config of peft or a dict
    swarm: SwarmFacts | EmbedAndHead,
    *,
    dtype: AdapterDtype = "bf16",
) -> Adapter:
    """A new adapter, to be trained: it changes nothing until its first step.

    config: a `peft.LoraConfig`, `PromptTuningConfig` or `PrefixTuningConfig`, or a dict of its fields.
    swarm: of the model, or the client's part of that model: `modules_to_save` begin with its values.
    dtype: in which servers get the adapter's values.
    Raises ConfigError that names the field.
    """
    ends = _ends(swarm)

    def values(path: str) -> dict[str, Tensor]:
        return dict(ends.model.get_submodule(path).named_parameters())

    made = Adapter(new_tensors(config, ends.modules, values=values, dtype=dtype))
    if dropout := made.tensors.fields.get("lora_dropout"):
        log.warning("lora_dropout %s has no effect: servers run no dropout", dropout)
    return made


def _ends(swarm: SwarmFacts | EmbedAndHead) -> EmbedAndHead:
    ends = swarm if isinstance(swarm, EmbedAndHead) else getattr(swarm, "local_model", None)
    if not isinstance(ends, EmbedAndHead):
        raise ConfigError(f"a {type(swarm).__name__} is no swarm: a handle of client.connect is needed")
    return ends
