"""A linear probe of a layer: on the hidden states behind the first k blocks of a model in a swarm.

python examples/linear_probe.py --peers /ip4/.../p2p/12D3... --layer 10

The servers give the hidden states; the probe, a line between questions and statements, is fitted here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

import client
from client.hf import AutoDistributedModel, from_swarm

QUESTIONS = [
    "where does the river begin", "who wrote this letter", "why is the night dark", "when do the shops close",
    "how far is the next village", "what do horses eat", "which road leads home", "whose boat is this",
]  # fmt: skip
STATEMENTS = [
    "the river begins in the hills", "my sister wrote this letter", "the night is dark in winter",
    "the shops close at noon", "the next village is near", "horses eat grass and hay", "this road leads home",
    "the boat is ours",
]  # fmt: skip


def states_of(swarm: client.SyncSwarm, texts: list[str], layer: int) -> torch.Tensor:
    """The mean hidden state of each text behind `layer` blocks, float32 [texts, hidden]."""
    tokenizer = swarm.local_model.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    model = from_swarm(swarm, task=AutoDistributedModel)
    with torch.no_grad():
        # A list asks for these states alone; True would ask for all of them.
        hidden = model(ids, attention_mask=mask, output_hidden_states=[layer]).hidden_states[layer]
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def accuracy(states: torch.Tensor, labels: torch.Tensor, held: torch.Tensor) -> tuple[float, float]:
    """Fit a line to the states that are not held back; its accuracy on these and on those held back."""
    torch.manual_seed(0)
    states = (states - states[~held].mean(0)) / (states[~held].std(0) + 1e-6)
    probe = nn.Linear(states.shape[1], 1)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(200):
        loss = nn.functional.binary_cross_entropy_with_logits(probe(states[~held])[:, 0], labels[~held])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = ((probe(states)[:, 0] > 0) == (labels > 0)).float()
    return float(right[~held].mean()), float(right[held].mean())


def main() -> None:
    """Read the command line and fit the probe."""
    parser = argparse.ArgumentParser(description="Fit a linear probe on hidden states of a swarm.")
    parser.add_argument("--peers", action="append", required=True, help="address of a node; may come again")
    parser.add_argument("--swarm-key", type=Path, help="the key file of a private swarm")
    parser.add_argument("--model", help="the model that the swarm serves (default: the built-in one)")
    parser.add_argument("--layer", type=int, default=1, help="0: the embedding; the last one: after the norm")
    flags = parser.parse_args()
    with client.connect_sync(flags.model, peers=flags.peers, swarm_key=flags.swarm_key) as swarm:
        if not 0 <= flags.layer <= swarm.info.blocks:
            parser.error(f"--layer is {flags.layer}, 0 to {swarm.info.blocks} are there")
        states = states_of(swarm, QUESTIONS + STATEMENTS, flags.layer)
    labels = torch.tensor([1.0] * len(QUESTIONS) + [0.0] * len(STATEMENTS))
    held = torch.arange(len(labels)) % 4 == 3  # every fourth text
    fitted, other = accuracy(states, labels, held)
    print(f"layer {flags.layer}: {fitted:.0%} of the fitted texts, {other:.0%} of the others")


if __name__ == "__main__":
    main()
