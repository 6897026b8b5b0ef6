"""peft, Trainer, trl, lm-eval and outlines get from a swarm the numbers of one process."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.markdown import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the packages

IDS = torch.arange(3, 35).view(4, 8)
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


def trained(model: Any, steps: int = 5) -> list[Tensor]:
    """The losses of some steps on one batch."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.05)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def test_pipelines_give_the_local_text(remote: Any, local: Any, tokenizer: Any) -> None:
    from transformers import pipeline

    prompts = ["once upon", "a", "the river is long"]
    mine, theirs = (
        pipeline("text-generation", model=model, tokenizer=tokenizer)(prompts, batch_size=3, **GREEDY)
        for model in (remote, local)
    )
    assert mine == theirs


def test_peft_trains_a_soft_prompt_as_locally(remote: Any, local: Any, tmp_path: Path) -> None:
    from peft import PeftModel, PromptTuningConfig, get_peft_model

    found = []
    for model in (remote, local):
        torch.manual_seed(2)
        tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
        losses = trained(tuned)
        tuned.eval()
        text = tuned.generate(input_ids=IDS[:1], attention_mask=torch.ones(1, 8), pad_token_id=0, **GREEDY)
        found.append((losses, text))
        tuned.save_pretrained(tmp_path)
    (mine, my_text), (theirs, text) = found
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert mine[-1] < mine[0]
    assert torch.equal(my_text, text)
    assert PeftModel.from_pretrained(local, tmp_path) is not None


def test_peft_trains_low_rank_matrices_of_the_head_as_locally(remote: Any, local: Any) -> None:
    from peft import LoraConfig, get_peft_model

    found = []
    for model in (remote, local):
        torch.manual_seed(3)
        tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], r=4))
        losses = trained(tuned)
        text = tuned.generate(input_ids=IDS[:1], attention_mask=torch.ones(1, 8), pad_token_id=0, **GREEDY)
        found.append((losses, text))
    (mine, my_text), (theirs, text) = found
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(my_text, text)


def test_peft_says_that_the_blocks_have_no_modules_here(remote: Any) -> None:
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match="q_proj"):
        get_peft_model(remote, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))


class Texts(torch.utils.data.Dataset[Any]):
    """Rows of one batch."""

    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": IDS[index], "labels": IDS[index]}


def test_trainer_trains_prompts_of_the_swarm_and_saves_them(nodes: Any, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from client.hf import from_swarm

    model = from_swarm(nodes.swarm, tuning_mode="ptune", pre_seq_len=4)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=2, learning_rate=0.05,
        logging_steps=1, save_steps=5, report_to=[], use_cpu=True, gradient_checkpointing=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Texts())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    saved = tmp_path / "checkpoint-5" / "model.safetensors"
    assert 0 < saved.stat().st_size < 4096


def test_trl_fine_tunes_by_peft(remote: Any, tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from peft import PromptTuningConfig
    from trl import SFTConfig, SFTTrainer

    texts = Dataset.from_dict({"text": ["once upon a time", "the river is long", "a clock", "a day"]})
    trainer = SFTTrainer(
        model=remote,
        args=SFTConfig(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            learning_rate=0.05, logging_steps=1, packing=False, max_length=32, dataloader_pin_memory=False,
        ),
        train_dataset=texts,
        processing_class=tokenizer,
        peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_lm_eval_finds_the_local_numbers(remote: Any, local: Any, tokenizer: Any) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    def asked(kind: str, *arguments: Any) -> list[Any]:
        return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]

    pairs = [("once upon", " a time"), ("a", " b c"), ("the river", " is long and wide")]
    until = {"until": ["zz"], "max_gen_toks": 5, "do_sample": False}
    found = []
    for model in (remote, local):
        evaluated = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
        found.append(
            (
                evaluated.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True),
                evaluated.generate_until(
                    asked("generate_until", *[(text, until) for text, _ in pairs]), disable_tqdm=True
                ),
            )
        )
    (mine, my_texts), (theirs, texts) = found
    torch.testing.assert_close([each for each, _ in mine], [each for each, _ in theirs], rtol=1e-4, atol=1e-4)
    assert [each for _, each in mine] == [each for _, each in theirs]
    assert my_texts == texts


def test_the_example_of_lm_eval_finds_the_local_numbers(
    nodes: Any, local: Any, tokenizer: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / "lm_eval_questions.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "example", example)
    spec.loader.exec_module(example)
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "once upon", "answers": [" a time", " the river is long"], "right": 0}\n')
    joining = ["--peers", nodes.addresses[0], "--model", str(local.name_or_path)]
    monkeypatch.setattr(sys, "argv", ["example", *joining, "--questions", str(file)])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    expected = example.evaluate(local, tokenizer, example.read(file))
    assert f"({', '.join(f'{value:.2f}' for value in expected[0])})" in lines[-2]
    assert re.fullmatch(r"[01] of 1 right", lines[-1])
    file.write_text('{"question": "once upon", "answers": ["a"], "right": 1}\n')
    with pytest.raises(SystemExit, match="line 1"):
        example.read(file)


def test_outlines_keeps_a_text_to_a_pattern(remote: Any, local: Any, tokenizer: Any) -> None:
    import outlines

    pattern = outlines.types.Regex(r"(yes|no), [0-9]{3}")
    texts = [
        outlines.from_transformers(model, tokenizer)("is it far?", pattern, **GREEDY | {"max_new_tokens": 12})
        for model in (remote, local)
    ]
    assert texts[0] == texts[1]
    assert texts[0].startswith(("yes, ", "no, "))
