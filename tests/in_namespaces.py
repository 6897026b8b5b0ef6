"""The benchmark of recovery over links of its own, with forked nodes: run by `command_inside` of the lab."""

from __future__ import annotations

import argparse
import json
import sys

import torch
from transformers import AutoModelForCausalLM

from benchmarks.recovery.recovery import measure, parse
from benchmarks.recovery.watched import prompt_ids
from node.model.checkpoint.source import cache_dir, resolve
from tests.forked import Forked

PROMPT_TOKENS = 32


def reference(flags: argparse.Namespace) -> tuple[list[int], list[int]]:
    """The prompt, and the tokens of the whole model in this process."""
    ids = prompt_ids(flags.model, PROMPT_TOKENS)
    folder = resolve(flags.model, cache_dir=cache_dir())
    whole = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32)
    prompt = torch.tensor([ids])
    out = whole.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=flags.tokens[0], do_sample=False
    )
    return ids, out[0, len(ids) :].tolist()


if __name__ == "__main__":
    json.dump(measure(parse(sys.argv[1:]), Forked, reference), sys.stdout)
