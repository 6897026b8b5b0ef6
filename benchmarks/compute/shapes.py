"""Random weights in the shapes of real models, for measurements that need no words; the speed of memory.

A floor for a decode step: it reads every weight of its blocks once, so it takes at least their bytes divided
by the rate at which the same machine reads memory, measured in the same run.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from node.devices import synchronize

if TYPE_CHECKING:
    from node.model.checkpoint.folder import ModelFolder


VOCABULARY = 256  # the ends are not measured


def llama(hidden_size: int, heads: int, key_heads: int, inner: int, blocks: int) -> dict[str, Any]:
    """A config of llama's family.  Any: JSON."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": hidden_size // heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 16_384,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def bloom(hidden_size: int, heads: int, blocks: int) -> dict[str, Any]:
    """A config of bloom's family.  Any: JSON."""
    return {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "hidden_size": hidden_size,
        "n_head": heads,
        "n_layer": blocks,
        "vocab_size": VOCABULARY,
        "layer_norm_epsilon": 1e-5,
        "torch_dtype": "bfloat16",
    }


# Name -> blocks that are measured, and the config of so many.
SHAPES: Mapping[str, tuple[int, Callable[[int], dict[str, Any]]]] = {
    "llama-3-8b": (8, lambda blocks: llama(4096, 32, 8, 14_336, blocks)),
    "bloom-176b": (1, lambda blocks: bloom(14_336, 112, blocks)),
    "small-llama": (2, lambda blocks: llama(256, 8, 2, 512, blocks)),
    "small-bloom": (2, lambda blocks: bloom(256, 8, blocks)),
}


def shape_folder(name: str, blocks: int | None = None, device: str = "cpu") -> ModelFolder:
    """A folder with random weights in bfloat16, made at its first use in the folder of temporary files.

    name: of SHAPES.  blocks: None for the usual number.  device: where the numbers are drawn.
    """
    from node.model.checkpoint.folder import HashMemo, open_folder

    usual, config_of = SHAPES[name]
    count = usual if blocks is None else blocks
    path = Path(tempfile.gettempdir()) / f"raceme-{name}-{count}"
    if not (path / "config.json").is_file():
        path.mkdir(exist_ok=True)
        save_random(path, config_of(count), device)
    return open_folder(path, memo=HashMemo(Path(tempfile.gettempdir()) / "raceme-hashes.json"))


def save_random(path: Path, config: dict[str, Any], device: str) -> None:
    """Write a model of the library with these sizes; the config comes last, so a folder with one is whole."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    known = {key: value for key, value in config.items() if key not in ("architectures", "torch_dtype")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**known))
    generator = torch.Generator(device).manual_seed(0)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config["model_type"] == "bloom" else set()
    tensors = {}
    for name, like in model.state_dict().items():
        if name in tied:
            continue
        if like.ndim == 1:
            tensors[name] = torch.full(like.shape, float("norm" in name and "bias" not in name))
        else:
            drawn = torch.randn(like.shape, generator=generator, device=device)
            tensors[name] = (drawn / like.shape[-1] ** 0.5).to(torch.bfloat16).cpu()
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=1))


def timed(work: Callable[[], object], device: object) -> float:
    """Seconds of one call, until the device has computed everything."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began
