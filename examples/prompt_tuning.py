"""Tune a soft prompt on a poem over a swarm, save it, load it again, and generate with it.

python examples/prompt_tuning.py --peers /ip4/.../p2p/12D3... --steps 20 --save tuned

The model stays frozen at the servers; a few vectors in front of the text are trained here.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import client
from client.hf import AutoDistributedModelForCausalLM, from_swarm

# William Blake, The Tyger (1794).
POEM = """Tyger Tyger, burning bright, In the forests of the night; What immortal hand or eye, Could frame thy
fearful symmetry? In what distant deeps or skies, Burnt the fire of thine eyes? On what wings dare he aspire?
What the hand, dare seize the fire? And what shoulder, and what art, Could twist the sinews of thy heart? And
when thy heart began to beat, What dread hand? and what dread feet?""".replace("\n", " ")


def rows_of(tokenizer: Any, tokens: int) -> torch.Tensor:
    """The poem in rows of so many tokens, int64 [rows, tokens]; what is left at the end is left out."""
    ids = torch.tensor(tokenizer(POEM)["input_ids"])
    return ids[: len(ids) // tokens * tokens].view(-1, tokens)


def tune(swarm: client.SyncSwarm, length: int, tokens: int, steps: int, folder: Path) -> None:
    """Train a soft prompt of `length` vectors and save it."""
    torch.manual_seed(0)
    model = from_swarm(swarm, tuning_mode="ptune", pre_seq_len=length)
    ids = rows_of(swarm.local_model.tokenizer, tokens)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.05)
    for step in range(steps + 1):
        loss = model(ids, labels=ids).loss
        if step in (0, steps):
            print(f"loss after {step} steps: {loss.item():.3f}")
        if step < steps:
            optimizer.zero_grad()
            loss.backward()  # through the servers' blocks
            optimizer.step()
    model.save_pretrained(folder)


def main() -> None:
    """Read the command line, train, and generate with what was saved."""
    parser = argparse.ArgumentParser(description="Tune a soft prompt over a swarm.")
    parser.add_argument("--peers", action="append", required=True, help="address of a node; may come again")
    parser.add_argument("--swarm-key", type=Path, help="the key file of a private swarm")
    parser.add_argument("--model", help="the model that the swarm serves (default: the built-in one)")
    parser.add_argument("--length", type=int, default=8, help="vectors of the prompt")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save", type=Path, default=Path("tuned"), help="the folder for the prompt")
    flags = parser.parse_args()
    joining = {"peers": flags.peers, "swarm_key": flags.swarm_key}
    with client.connect_sync(flags.model, **joining) as swarm:
        tune(swarm, flags.length, flags.tokens, flags.steps, flags.save)
    # The folder names its model and revision; a swarm of another revision is refused.
    with AutoDistributedModelForCausalLM.from_pretrained(flags.save, **joining) as model:
        tokenizer = model.swarm.handle.local_model.tokenizer
        ids = rows_of(tokenizer, flags.tokens)
        with torch.no_grad():
            print(f"loss as loaded: {model(ids, labels=ids).loss.item():.3f}")
        text = model.generate(ids[:1, :5], max_new_tokens=12, do_sample=False)
        print(tokenizer.decode(text[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
