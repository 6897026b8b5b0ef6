"""Chat with a swarm through transformers: its TextStreamer, and several turns on one cache.

python examples/chat_transformers.py --peers /ip4/.../p2p/12D3... "Name a river." "Name another one."

Without turns on the command line it reads them from the standard input, one a line.  --tuned takes a folder
of prompt_tuning.py: the chat then has the trained prompt in front of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from client.hf import AutoDistributedModelForCausalLM, RemoteCache


def tokens_of(tokenizer: Any, messages: list[dict[str, str]]) -> torch.Tensor:
    """The messages as the model's template writes them, int64 [1, tokens]."""
    if tokenizer.chat_template is None:
        text = "\n".join(message["content"] for message in messages)
        found = tokenizer(text, return_tensors="pt")
    else:
        found = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    ids: torch.Tensor = found["input_ids"]
    return ids


def chat(model: Any, turns: Iterable[str], max_length: int, max_new_tokens: int) -> None:
    """Answer one turn after the other, each token as it comes."""
    tokenizer = model.swarm.handle.local_model.tokenizer
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    cache = RemoteCache(model.swarm, max_length)
    messages: list[dict[str, str]] = []
    before = torch.zeros(1, 0, dtype=torch.long)
    for turn in turns:
        print(f"> {turn}")
        messages.append({"role": "user", "content": turn})
        ids = tokens_of(tokenizer, messages)
        # A template may write an earlier answer in other tokens: the cache keeps their common beginning.
        both = min(ids.shape[1] - 1, before.shape[1])
        common = int((ids[0, :both] == before[0, :both]).long().cumprod(0).sum())
        cache.crop(min(0, common - cache.get_seq_length()))
        before = model.generate(
            ids, past_key_values=cache, streamer=streamer, max_new_tokens=max_new_tokens, do_sample=False
        )
        answer = tokenizer.decode(before[0, ids.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
    cache.close()


def main() -> None:
    """Read the command line and chat."""
    parser = argparse.ArgumentParser(description="Chat with a swarm through transformers.")
    parser.add_argument("turns", nargs="*", help="what you say, an argument a turn (default: standard input)")
    parser.add_argument("--peers", action="append", required=True, help="address of a node; may come again")
    parser.add_argument("--swarm-key", type=Path, help="the key file of a private swarm")
    parser.add_argument("--model", help="the model that the swarm serves (default: the built-in one)")
    parser.add_argument("--tuned", type=Path, help="a folder with a trained prompt, in place of --model")
    parser.add_argument("--max-length", type=int, default=1024, help="positions of the whole chat")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens of one answer")
    flags = parser.parse_args()
    turns = flags.turns or (line.strip() for line in sys.stdin)
    name, joining = flags.tuned or flags.model, {"peers": flags.peers, "swarm_key": flags.swarm_key}
    with AutoDistributedModelForCausalLM.from_pretrained(name, **joining) as model:
        chat(model, turns, flags.max_length, flags.max_new_tokens)


if __name__ == "__main__":
    main()
