"""Train a classifier of sentences over a swarm: a head and a soft prompt here, the blocks at the servers.

python examples/classify.py --peers /ip4/.../p2p/12D3... --steps 15
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import client
from client.hf import AutoDistributedModelForSequenceClassification, from_swarm

LABELS = ("bad", "good")
SENTENCES = [
    ("The soup was warm and full of flavour.", 1),
    ("We waited for an hour and left hungry.", 0),
    ("A friendly room, and the best bread in town.", 1),
    ("The fish was cold and the plates were dirty.", 0),
    ("I will come again with all my friends.", 1),
    ("Nobody should have to pay for such a meal.", 0),
    ("Fresh, quick, and kind people.", 1),
    ("The noise was terrible and so was the tea.", 0),
]


def train(swarm: client.SyncSwarm, steps: int) -> None:
    """Train on all sentences and print the model's class of each."""
    torch.manual_seed(0)
    tokenizer = swarm.local_model.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = from_swarm(
        swarm,
        task=AutoDistributedModelForSequenceClassification,
        num_labels=len(LABELS),
        pad_token_id=tokenizer.pad_token_id,  # the library's head looks for the last token before it
        tuning_mode="ptune",
        pre_seq_len=4,
    )
    inputs = tokenizer([text for text, _ in SENTENCES], padding=True, return_tensors="pt")
    batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    labels = torch.tensor([label for _, label in SENTENCES])
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.02)
    for step in range(steps + 1):
        output = model(**batch, labels=labels)
        if step in (0, steps):
            print(f"loss after {step} steps: {output.loss.item():.3f}")
        if step < steps:
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
    for (text, label), found in zip(SENTENCES, output.logits.argmax(-1).tolist(), strict=True):
        print(f"{LABELS[found]} ({LABELS[label]} was said): {text}")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train a classifier of sentences over a swarm.")
    parser.add_argument("--peers", action="append", required=True, help="address of a node; may come again")
    parser.add_argument("--swarm-key", type=Path, help="the key file of a private swarm")
    parser.add_argument("--model", help="the model that the swarm serves (default: the built-in one)")
    parser.add_argument("--steps", type=int, default=15)
    flags = parser.parse_args()
    with client.connect_sync(flags.model, peers=flags.peers, swarm_key=flags.swarm_key) as swarm:
        train(swarm, flags.steps)


if __name__ == "__main__":
    main()
