"""A session of 32,768 tokens with processes: the whole model's tokens, in the memory that was stated."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.lib.processes import local_swarm
from tests import model_fixtures
from tests.forked import forked_run

pytestmark = pytest.mark.process

LENGTH = 32_768
NEW = 4


def test_thirty_two_thousand_tokens_give_what_the_whole_model_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"max_position_embeddings": LENGTH, "num_hidden_layers": 1, "hidden_size": 16}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "eos_token_id": None}
    long = model_fixtures.TINY["llama"][1] | sizes | heads
    monkeypatch.setitem(model_fixtures.TINY, "long", ("LlamaForCausalLM", long))
    folder = tmp_path / "long-llama"
    whole = model_fixtures.save_tiny("long", folder)
    model_fixtures.save_tiny_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rng = random.Random(0)
    prompt = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=LENGTH))
    ids = tokenizer(prompt)["input_ids"][: LENGTH - NEW]
    prompt = tokenizer.decode(ids)
    assert tokenizer(prompt)["input_ids"] == ids
    with torch.inference_mode():
        tokens = torch.tensor([ids])
        expected = whole.generate(
            tokens, max_new_tokens=NEW, do_sample=False, attention_mask=torch.ones_like(tokens)
        )

    with local_swarm(["--threads", "1", "--dtype", "float32", "--device", "cpu"]) as swarm:
        node = swarm.start(str(folder), "--blocks", "0:1")
        node.wait_online()
        words = [
            "--peers",
            *swarm.peers,
            "--model",
            folder,
            "--json",
            "--max-new-tokens",
            NEW,
            "--threads",
            1,
        ]
        done = forked_run("client", "generate", *words, "-", text=prompt)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["tokens"] == expected[0, len(ids) :].tolist()
        bound = re.search(r"bound ([\d.]+) GiB resident", node.log.read_text())
        assert bound
        assert node.rss_mib() <= 1024 * float(bound[1])
