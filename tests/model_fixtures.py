"""Tiny random models of every supported architecture, written as real checkpoints."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

VOCAB = 96
BLOCKS = 6

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FUSED = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # their blocks are our own
_EVERY_OTHER = ["sliding_attention", "full_attention"] * (BLOCKS // 2)
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": BLOCKS,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Sliding windows and chunks are shorter than the tests' sequences, so that they matter.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _LLAMA),
    "mistral": ("MistralForCausalLM", _LLAMA | {"sliding_window": 5}),
    "qwen2": (
        "Qwen2ForCausalLM",
        _LLAMA | {"use_sliding_window": True, "sliding_window": 5, "layer_types": _EVERY_OTHER},
    ),
    "qwen3": ("Qwen3ForCausalLM", _LLAMA | {"head_dim": 16}),
    "gemma": ("GemmaForCausalLM", _LLAMA | {"head_dim": 16}),
    "gemma2": (
        "Gemma2ForCausalLM",
        _LLAMA | {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16},
    ),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        _LLAMA
        | {
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 2,
        },
    ),
    "phi3": ("Phi3ForCausalLM", _LLAMA | {"sliding_window": 5}),
    "phi": ("PhiForCausalLM", _LLAMA | {"num_key_value_heads": 4}),
    "falcon": (
        "FalconForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 4,
            "multi_query": True,
            "parallel_attn": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "falcon_new": (
        "FalconForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "falcon_alibi": (
        "FalconForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 4,
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "bloom": (
        "BloomForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "n_layer": BLOCKS,
            "n_head": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "mixtral": ("MixtralForCausalLM", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        _LLAMA | _EXPERTS | {"head_dim": 16, "num_experts": 4, "mlp_only_layers": [1]},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        _LLAMA
        | {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
            "layer_types": _EVERY_OTHER,
        },
    ),
    "olmo2": ("Olmo2ForCausalLM", _LLAMA),
    "smollm3": ("SmolLM3ForCausalLM", _LLAMA | {"no_rope_layers": [1, 1, 0, 1, 1, 0]}),
    "gpt2": ("GPT2LMHeadModel", _GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": ("GPTNeoXForCausalLM", {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}),
    "opt": (
        "OPTForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "opt_projected": (
        "OPTForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 16,
            "do_layer_norm_before": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "mpt": (
        "MptForCausalLM",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "n_layers": BLOCKS,
            "n_heads": 4,
            "max_seq_len": 128,
            "expansion_ratio": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "granite": (
        "GraniteForCausalLM",
        _LLAMA
        | {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.2,
        },
    ),
    "cohere2": (
        "Cohere2ForCausalLM",
        _LLAMA | {"sliding_window": 5, "logit_scale": 0.25, "layer_types": _EVERY_OTHER},
    ),
    "stablelm": ("StableLmForCausalLM", _LLAMA),
    "starcoder2": ("Starcoder2ForCausalLM", _LLAMA | {"sliding_window": 5}),
    "glm4": ("Glm4ForCausalLM", _LLAMA | {"head_dim": 16}),
    "nemotron": ("NemotronForCausalLM", _LLAMA | {"head_dim": 8}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        _LLAMA
        | _EXPERTS
        | {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 2,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "llama4_text": (
        "Llama4ForCausalLM",
        _LLAMA
        | {
            "intermediate_size_mlp": 48,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 1, 0, 1, 1, 0],
            "attention_chunk_size": 8,
            "attn_temperature_tuning": True,
            "floor_scale": 4,
        },
    ),
    "gptj": ("GPTJForCausalLM", _GPT2 | {"rotary_dim": 4}),
    "lfm2": (
        "Lfm2ForCausalLM",
        _LLAMA | {"layer_types": ["conv", "conv", "full_attention", "conv", "full_attention", "conv"]},
    ),
}


def tiny_model(variant: str) -> Any:
    """A random model of the library, with every norm and bias away from its neutral value."""
    import torch
    import transformers

    name, settings = TINY[variant]
    whole = getattr(transformers, name)
    torch.manual_seed(sum(map(ord, variant)))
    model = whole(whole.config_class(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def save_tiny(variant: str, path: Path, max_shard_size: str = "40KB") -> Any:
    """Write a tiny model as a sharded checkpoint; the model as the library opens it again."""
    import torch

    files, opened = _saved(variant, max_shard_size, repr(TINY[variant]))
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    torch.manual_seed(sum(map(ord, variant)))  # whether it was made just now or before
    model = copy.deepcopy(opened)
    model.name_or_path = model.config.name_or_path = str(path)
    return model


@cache
def _saved(variant: str, max_shard_size: str, settings: str) -> tuple[dict[str, bytes], Any]:
    """The files of a tiny model, and what the library makes of them: once in a process, for all its tests.

    settings: of the variant in `TINY`, which a test may have changed.
    """
    model = tiny_model(variant)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        files = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
        return files, type(model).from_pretrained(folder)


# Small enough to convert at once; the names of the tensors are those of the real file.
GGUF_BLOCKS, GGUF_HIDDEN, GGUF_HEADS, _KV_HEADS, _WIDE = 2, 32, 2, 1, 64
_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "1", "2", "ab"]


def saved(variant: str, path: Path, **changes: object) -> Any:
    """A tiny model as a folder (`ModelFolder`), with other values in its config."""
    from node.model.checkpoint.folder import HashMemo, open_folder

    save_tiny(variant, path / "model")
    config = path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return open_folder(path / "model", memo=HashMemo(path / "hashes.json"))


def assert_close(got: Any, expected: Any, tolerance: float = 5e-6) -> None:
    """tolerance: of the largest value; sums are taken in another order."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def write_gguf(path: Path) -> dict[str, Any]:
    """A tiny GGUF of the built-in's make; its tensors as they come out of quantisation."""
    import gguf
    import numpy as np

    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(_TOKENS), GGUF_HIDDEN), "output_norm": (GGUF_HIDDEN,)}
    for block in range(GGUF_BLOCKS):
        shapes |= {
            f"blk.{block}.attn_norm": (GGUF_HIDDEN,),
            f"blk.{block}.attn_q": (GGUF_HIDDEN, GGUF_HIDDEN),
            f"blk.{block}.attn_k": (GGUF_HIDDEN // 2, GGUF_HIDDEN),
            f"blk.{block}.attn_v": (GGUF_HIDDEN // 2, GGUF_HIDDEN),
            f"blk.{block}.attn_output": (GGUF_HIDDEN, GGUF_HIDDEN),
            f"blk.{block}.ffn_norm": (GGUF_HIDDEN,),
            f"blk.{block}.ffn_gate": (_WIDE, GGUF_HIDDEN),
            f"blk.{block}.ffn_up": (_WIDE, GGUF_HIDDEN),
            f"blk.{block}.ffn_down": (GGUF_HIDDEN, _WIDE),
        }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(_TOKENS)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    values = {}
    for name, shape in shapes.items():
        array = random.standard_normal(shape, dtype=np.float32)
        kind = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else gguf.GGMLQuantizationType.Q4_1
        packed = gguf.quantize(array, kind)
        values[f"{name}.weight"] = gguf.dequantize(packed, kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def shrink(patch: Any, gguf_file: Path) -> None:
    """Let node.model.checkpoint.builtin expect the tiny model instead of the real one."""
    from node.model.checkpoint import builtin

    config = builtin._CONFIG | {
        "num_hidden_layers": GGUF_BLOCKS,
        "hidden_size": GGUF_HIDDEN,
        "num_attention_heads": GGUF_HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": GGUF_HIDDEN // GGUF_HEADS,
        "intermediate_size": _WIDE,
        "vocab_size": len(_TOKENS),
    }
    for name, value in {
        "_CONFIG": config,
        "_BLOCKS": GGUF_BLOCKS,
        "_BLOCKS_PER_SHARD": 1,
        "_HEADS": GGUF_HEADS,
        "_KV_HEADS": _KV_HEADS,
        "PINNED_SHA256": {},
        "GGUF_SHA256": hashlib.sha256(gguf_file.read_bytes()).hexdigest(),
        "GGUF_BYTES": gguf_file.stat().st_size,
        "CHECKPOINT_BYTES": 1 << 20,
        "WHEEL_BYTES": 1 << 20,
    }.items():
        patch.setattr(builtin, name, value)


def save_tiny_tokenizer(path: Path) -> None:
    """A tokenizer whose tokens are single characters, for a vocabulary of VOCAB."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    characters = [chr(code) for code in range(32, 32 + VOCAB - len(special) - 1)]
    vocabulary = {token: index for index, token in enumerate([*special, "<unk>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(path)
