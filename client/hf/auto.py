"""From a name and peers to a model: the Auto classes, with Petals' names and arguments."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from client.adapters.adapter import Adapter
from client.adapters.folder import is_to_be_read
from client.config import client_config
from client.connect import connect_sync
from client.hf.access import SwarmAccess
from client.hf.model import base_model, task_model
from client.hf.training import load_trained, read_about
from node.devices import kind_of
from node.model.blocks.span import DTYPES, library_class, library_config
from node.runtime.values import shown
from routing.chains.alternatives import Constraints

if TYPE_CHECKING:
    from client.api import SwarmLike, SyncSwarm

TUNING_MODES = (None, "ptune", "deep_ptune")
AT_SERVERS = {  # arguments of the library's from_pretrained that have no meaning here, and why
    "device_map": "blocks are at the servers; device= places embedding and head",
    "max_memory": "blocks are at the servers",
    "offload_folder": "blocks are at the servers",
    "quantization_config": "each server chooses its own kind of weights",
    "load_in_8bit": "each server chooses its own kind of weights",
    "load_in_4bit": "each server chooses its own kind of weights",
    "attn_implementation": "attention is at the servers",
    "trust_remote_code": "no code of a model's folder is run",
    "revision": "peers= and the name of the model say which revision is served",
}
OF_BLOCKS = {  # entries of a config that the blocks at the servers are made by
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "max_position_embeddings", "rope_parameters", "sliding_window", "layer_types",
}  # fmt: skip
WITHOUT_EFFECT = {"low_cpu_mem_usage", "use_safetensors", "tp_plan"}  # how weights of the blocks are loaded
OF_HEADS = {"loss_type", "classifier_dropout", "hidden_dropout"}  # entries that a config may lack


@dataclass(frozen=True, slots=True)
class Tuning:
    """What is trained beside the heads.  Raises ValueError for a mode or a length that cannot be."""

    tuning_mode: str | None = None
    pre_seq_len: int = 0

    def __post_init__(self) -> None:
        if self.tuning_mode not in TUNING_MODES:
            raise ValueError(
                f"tuning_mode is {shown(self.tuning_mode)}, ptune, deep_ptune or None is allowed"
            )
        if self.tuning_mode is None and self.pre_seq_len:
            raise ValueError(
                f"pre_seq_len is {self.pre_seq_len}: it needs tuning_mode='ptune' or 'deep_ptune'"
            )
        if self.tuning_mode is not None and self.pre_seq_len < 1:
            raise ValueError(f"pre_seq_len is {shown(self.pre_seq_len)}, 1 or more is needed for tuning")


def from_swarm(
    swarm: SyncSwarm | SwarmLike,
    *,
    task: type[AutoDistributedModel] | None = None,
    tuning_mode: str | None = None,
    pre_seq_len: int = 0,
    num_labels: int | None = None,
    active_adapter: str | Path | Adapter | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    **config_overrides: Any,
) -> Any:  # Any: the library's own classes
    """A model over a swarm that the program has joined already.

    swarm: of `connect_sync`, or of `connect` under trio or asyncio; then the model is used in other threads.
    task: one of the Auto classes here; None: the causal language model.
    tuning_mode: "ptune" trains a soft prompt of `pre_seq_len`, "deep_ptune" one at each block too.
    active_adapter: an adapter, a folder of peft or a name of the hub (org/name), as for `load_adapter`;
    another text is the name of an adapter that servers keep.
    dtype, device: of embedding, norm, head and prompts; the servers have their own.  None: those with which
    the swarm was joined.  dtype "auto": that of the checkpoint.
    config_overrides: entries of the model's config.
    Raises ValueError for values that are not allowed.
    """
    kind = task or AutoDistributedModelForCausalLM
    tuning = Tuning(tuning_mode, pre_seq_len)
    access = SwarmAccess(swarm)
    ends = access.swarm.local_model
    overrides = checked_overrides(config_overrides, ends)
    causal = base_model(
        access,
        ends,
        dtype=dtype_of(ends.dtype if dtype is None else dtype, ends),
        device=ends.device if device is None else device,
        pre_seq_len=tuning.pre_seq_len,
        deep=tuning.tuning_mode == "deep_ptune",
        overrides=overrides,
    )
    model = kind.of_causal(causal, ends, num_labels)
    vars(model)["tuning"] = {
        "tuning_mode": tuning.tuning_mode,
        "pre_seq_len": tuning.pre_seq_len,
        "num_labels": num_labels,
        "overrides": overrides,
    }
    if active_adapter is None:
        return model
    if isinstance(active_adapter, Adapter) or is_to_be_read(active_adapter):
        cast(Any, model).load_adapter(active_adapter)
    else:
        access.use(str(active_adapter))
    return model


def _ends_of(device: torch.device | str, dtype: torch.dtype | str) -> dict[str, Any]:
    """The arguments of `client.connect` for ends like this on a GPU; none where it knows no such ends."""
    kind = str(dtype).removeprefix("torch.")
    if kind not in DTYPES or kind_of(device) not in ("cuda", "mps"):
        return {}
    return {"device": str(device), "dtype": kind}


def dtype_of(dtype: torch.dtype | str, ends: Any) -> torch.dtype:
    """A torch dtype or the library's names of them; "auto" is the checkpoint's.  Raises ValueError."""
    name = dtype
    if dtype == "auto":
        dtype = _config_of(ends).dtype or torch.float32
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"dtype is {shown(name)}: float32, bfloat16, float16, float64 or auto is allowed")
    return dtype


def checked_overrides(overrides: dict[str, Any], ends: Any) -> dict[str, Any]:
    """The overrides of the config.  Raises ValueError for a name that it lacks, and for what servers have."""
    config, found = _config_of(ends), {}
    for name, value in overrides.items():
        if name in AT_SERVERS and value not in (None, False):
            raise ValueError(f"{name} has no meaning over a swarm: {AT_SERVERS[name]}")
        if name in AT_SERVERS or name in WITHOUT_EFFECT:
            continue
        if not hasattr(config, name) and name not in OF_HEADS:
            raise ValueError(f"{name} is no argument, and no entry of the config of {config.model_type}")
        if name in OF_BLOCKS and value != (served := getattr(config, name)):
            raise ValueError(f"{name} is {shown(value)}: the blocks of the swarm have {shown(served)}")
        found[name] = value
    return found


def _config_of(ends: Any) -> Any:  # Any: the library's config of the family
    return library_config(library_class(ends.architecture, ends.architecture.whole), ends.folder)


class AutoDistributedModel:
    """The base model: hidden states after the final norm.  Made by `from_pretrained`."""

    auto: ClassVar[str | None] = None  # the library's Auto class of the task

    def __init__(self) -> None:
        raise OSError(f"{type(self).__name__} is made by from_pretrained or from_swarm")

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | None = None,
        *,
        peers: Sequence[str] = (),
        initial_peers: Sequence[str] = (),
        allowed_servers: Sequence[str] | None = None,
        blocked_servers: Sequence[str] | None = None,
        active_adapter: str | Path | Adapter | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        tuning_mode: str | None = None,
        pre_seq_len: int = 0,
        num_labels: int | None = None,
        **others: Any,
    ) -> Any:  # Any: the library's own classes
        """Join a swarm and return the library's model over it; `model.close()` leaves.

        name: as in `client.connect`; or a folder of `save_pretrained`, whose prompts and heads are loaded
        over the swarm's model of the same revision.  peers: multiaddrs; initial_peers is Petals' name.
        allowed_servers, blocked_servers: peer ids, into `constraints`.  active_adapter: see `from_swarm`.
        device, dtype: see `from_swarm`; on a GPU the swarm is joined with them, so that the weights are
        loaded once.
        Every other argument of `client.connect` goes there; what is none overrides the model's config.
        Raises ConfigError as `connect_sync`, ValueError for values that are not allowed.
        """
        known = set(inspect.signature(client_config).parameters)
        joining = {key: others.pop(key) for key in sorted(set(others) & known)}
        about = None if name is None else read_about(Path(name))
        if about is not None:
            folder, name = Path(cast(str, name)), about["model"]
            tuning_mode = about.get("tuning_mode") if tuning_mode is None else tuning_mode
            pre_seq_len = pre_seq_len or about.get("pre_seq_len") or 0
            num_labels = num_labels or about.get("num_labels")
            others = {**about.get("overrides", {}), **others}
        if allowed_servers is not None or blocked_servers is not None:
            constraints = joining.get("constraints") or Constraints()
            given = {"allowed": allowed_servers, "blocked": blocked_servers}
            fields = {key: frozenset(map(str, value)) for key, value in given.items() if value is not None}
            joining["constraints"] = replace(constraints, **cast(Any, fields))
        dtype = dtype or torch_dtype or torch.float32
        joining |= _ends_of(device, dtype)
        swarm = connect_sync(model=joining.pop("model", name), peers=[*peers, *initial_peers], **joining)
        try:
            model = from_swarm(
                swarm,
                task=cls,
                tuning_mode=tuning_mode,
                pre_seq_len=pre_seq_len,
                num_labels=num_labels,
                active_adapter=active_adapter,
                dtype=dtype,
                device=device,
                **others,
            )
            if about is not None:
                load_trained(model, folder, about, swarm.info.revision)
        except BaseException:
            swarm.close()
            raise
        model.own_swarm()
        return model

    @classmethod
    def of_causal(cls, causal: nn.Module, ends: Any, num_labels: int | None) -> nn.Module:
        """The model of this class on the base of a causal language model."""
        if cls.auto is None:
            return causal.get_submodule(ends.architecture.prefix)
        import transformers

        auto = getattr(transformers, cls.auto)
        return task_model(causal, ends.architecture, auto, num_labels)


class AutoDistributedModelForCausalLM(AutoDistributedModel):
    """The causal language model: logits, `generate`.  Made by `from_pretrained`."""

    @classmethod
    def of_causal(cls, causal: nn.Module, ends: Any, num_labels: int | None) -> nn.Module:
        """The causal language model itself."""
        return causal


class AutoDistributedModelForSequenceClassification(AutoDistributedModel):
    """A label for a text, by a trainable head.  Made by `from_pretrained`."""

    auto = "AutoModelForSequenceClassification"


class AutoDistributedModelForTokenClassification(AutoDistributedModel):
    """A label for each token, by a trainable head.  Made by `from_pretrained`."""

    auto = "AutoModelForTokenClassification"
