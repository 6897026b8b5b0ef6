"""Evaluate a swarm's model by lm-eval on questions of your own, without a data set from outside.

pip install lm-eval
python examples/lm_eval_questions.py --peers /ip4/.../p2p/12D3...

Each question has answers to choose from; the likeliest one counts.  `--questions FILE` reads others: a JSON
object a line with `question`, `answers` and `right` (the number of the right answer, from 0).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.hf import AutoDistributedModelForCausalLM


@dataclass(frozen=True, slots=True)
class Question:
    """A question, the answers to choose from, and the number of the right one."""

    question: str
    answers: tuple[str, ...]
    right: int


QUESTIONS = [
    Question("The capital of France is", (" London", " Paris", " Rome"), 1),
    Question("At night the sky is", (" dark", " green", " sour"), 0),
    Question("Two and two make", (" nine", " seven", " four"), 2),
    Question("Fish live in", (" water", " books", " fire"), 0),
]


def read(path: Path) -> list[Question]:
    """The questions of a file.  SystemExit names a line that is none."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
            each = Question(entry["question"], tuple(entry["answers"]), entry["right"])
            each.answers[each.right]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise SystemExit(f"error: {path}, line {number}: {error!r}") from None
        found.append(each)
    return found


def evaluate(model: Any, tokenizer: Any, questions: list[Question], batch_size: int = 4) -> list[list[float]]:
    """The log-likelihood of every answer of every question; all of them travel in batches."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    pairs = [(each.question, answer) for each in questions for answer in each.answers]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    evaluated = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = iter([value for value, _ in evaluated.loglikelihood(asked, disable_tqdm=True)])
    return [[next(found) for _ in each.answers] for each in questions]


def main() -> None:
    """Read the command line, evaluate, and print one line a question."""
    parser = argparse.ArgumentParser(description="Evaluate a swarm's model by lm-eval.")
    parser.add_argument("--peers", action="append", required=True, help="address of a node; may come again")
    parser.add_argument("--swarm-key", type=Path, help="the key file of a private swarm")
    parser.add_argument("--model", help="the model that the swarm serves (default: the built-in one)")
    parser.add_argument("--questions", type=Path, help="a file of questions (default: four built-in ones)")
    flags = parser.parse_args()
    questions = QUESTIONS if flags.questions is None else read(flags.questions)
    joining = {"peers": flags.peers, "swarm_key": flags.swarm_key}
    with AutoDistributedModelForCausalLM.from_pretrained(flags.model, **joining) as model:
        found = evaluate(model, model.swarm.handle.local_model.tokenizer, questions)
    chosen = [values.index(max(values)) for values in found]
    for each, values, choice in zip(questions, found, chosen, strict=True):
        print(f"{each.question}{each.answers[choice]} ({', '.join(f'{value:.2f}' for value in values)})")
    right = sum(each.right == choice for each, choice in zip(questions, chosen, strict=True))
    print(f"{right} of {len(questions)} right")


if __name__ == "__main__":
    main()
