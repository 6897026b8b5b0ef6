"""Fine-tune the servers' blocks by LoRA on a text, save the adapter as a folder of peft, generate with it.

python examples/lora.py --peers /ip4/.../p2p/12D3... --steps 20 --save my-adapter

The adapter is this program's; the servers compute with copies of it.  End one of several servers in the
middle: the next one gets its part of the adapter, and the losses stay the same.  The text is the beginning of
Alice's Adventures in Wonderland (Lewis Carroll, 1865, in the public domain), or that of `--text FILE`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import client
from client.hf import from_swarm

TEXT = Path(__file__).with_name("alice.txt")


def rows_of(tokenizer: Any, text: str, tokens: int) -> torch.Tensor:
    """The text in rows of so many tokens, int64 [rows, tokens]; a rest at the end is left out."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    if len(ids) < tokens:
        raise SystemExit(f"error: the text has {len(ids)} tokens, a row of --tokens {tokens} is needed")
    return ids[: len(ids) // tokens * tokens].view(-1, tokens)


def tune(model: Any, ids: torch.Tensor, steps: int) -> None:
    """Train the adapter in use on all rows of `ids`."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=2e-3)
    for step in range(steps + 1):
        loss = model(ids, labels=ids).loss
        print(f"loss after {step} steps: {loss.item():.3f}", flush=True)
        if step < steps:
            optimizer.zero_grad()
            loss.backward()  # through the servers' blocks
            optimizer.step()


def main() -> None:
    """Read the command line, train, save, load and generate."""
    parser = argparse.ArgumentParser(description="Fine-tune by LoRA over a swarm.")
    parser.add_argument("--peers", action="append", required=True, help="address of a node; may come again")
    parser.add_argument("--swarm-key", type=Path, help="the key file of a private swarm")
    parser.add_argument("--model", help="the model that the swarm serves (default: the built-in one)")
    parser.add_argument("--text", type=Path, default=TEXT, help="a file with the text (default: a story)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save", type=Path, default=Path("my-adapter"), help="the folder for the adapter")
    flags = parser.parse_args()
    with client.connect_sync(flags.model, peers=flags.peers, swarm_key=flags.swarm_key) as swarm:
        ids = rows_of(swarm.local_model.tokenizer, flags.text.read_text(), flags.tokens)
        torch.manual_seed(0)
        model = from_swarm(swarm)
        config = {"r": flags.rank, "lora_alpha": 2 * flags.rank, "target_modules": ["q_proj", "v_proj"]}
        model.add_adapter(config)
        tune(model, ids, flags.steps)
        model.save_pretrained(flags.save)
        adapter = client.load_adapter(flags.save, swarm)
        start = [int(each) for each in ids[0, :8]]
        print(swarm.local_model.tokenizer.decode(start), end="")
        for token in swarm.generate(start, adapter=adapter, max_new_tokens=24):
            print(token.text, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
