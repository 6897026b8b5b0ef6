"""Tune a soft prompt on a text over a swarm, save it, load it again, and generate with it.

python examples/prompt_tuning.py --peers /ip4/.../p2p/12D3... --steps 20 --save tuned

The model stays frozen at the servers; a few vectors in front of the text are trained here.  With
`--tuning-mode deep_ptune` each block gets its own vectors.  The text is a poem, or that of `--text FILE`.
chat_transformers.py talks to the tuned model with `--tuned FOLDER`.
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


def rows_of(tokenizer: Any, text: str, tokens: int) -> torch.Tensor:
    """The text in rows of so many tokens, int64 [rows, tokens]; a rest at the end is left out."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    if len(ids) < tokens:
        raise SystemExit(f"error: the text has {len(ids)} tokens, a row of --tokens {tokens} is needed")
    return ids[: len(ids) // tokens * tokens].view(-1, tokens)


def tune(model: Any, ids: torch.Tensor, steps: int, folder: Path) -> None:
    """Train the model's prompts on all rows of `ids`, and save them."""
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
    """Read the command line, train, and generate with the saved prompt."""
    parser = argparse.ArgumentParser(description="Tune a soft prompt over a swarm.")
    parser.add_argument("--peers", action="append", required=True, help="address of a node; may come again")
    parser.add_argument("--swarm-key", type=Path, help="the key file of a private swarm")
    parser.add_argument("--model", help="the model that the swarm serves (default: the built-in one)")
    parser.add_argument("--tuning-mode", choices=("ptune", "deep_ptune"), default="ptune")
    parser.add_argument("--text", type=Path, help="a file with the text (default: a poem)")
    parser.add_argument("--length", type=int, default=8, help="vectors of the prompt")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save", type=Path, default=Path("tuned"), help="the folder for the prompt")
    flags = parser.parse_args()
    joining = {"peers": flags.peers, "swarm_key": flags.swarm_key}
    text = POEM if flags.text is None else flags.text.read_text()
    with client.connect_sync(flags.model, **joining) as swarm:
        torch.manual_seed(0)
        model = from_swarm(swarm, tuning_mode=flags.tuning_mode, pre_seq_len=flags.length)
        ids = rows_of(swarm.local_model.tokenizer, text, flags.tokens)
        tune(model, ids, flags.steps, flags.save)
    # The folder names its model and revision; a swarm of another revision is refused.
    with AutoDistributedModelForCausalLM.from_pretrained(flags.save, **joining) as model:
        with torch.no_grad():
            print(f"loss as loaded: {model(ids, labels=ids).loss.item():.3f}")
        answer = model.generate(ids[:1, :5], max_new_tokens=12, do_sample=False)
        tokenizer = model.swarm.handle.local_model.tokenizer
        print(tokenizer.decode(answer[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
