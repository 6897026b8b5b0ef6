"""The examples of the transformers API do what they say, against a tiny model in a swarm of two servers."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hf_swarm import nodes_of
from tests.markdown import ROOT
from tests.model_fixtures import save_tiny, save_tiny_tokenizer

LOSS = re.compile(r"loss (?:after \d+ steps|as loaded): ([\d.]+)")


@pytest.fixture(scope="module")
def joining(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The options with which an example joins the swarm."""
    path = tmp_path_factory.mktemp("hf") / "llama"
    save_tiny("llama", path)
    save_tiny_tokenizer(path)
    with nodes_of(path, [(0, 3), (3, 6)]) as nodes:
        yield ["--peers", nodes.addresses[0], "--model", str(path)]


@pytest.fixture
def output(
    joining: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """What an example prints, as lines."""

    def run(name: str, *arguments: str) -> list[str]:
        path = ROOT / "examples" / name
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [str(path), *joining, *arguments])
        module.main()
        return capsys.readouterr().out.splitlines()

    return run


def test_a_chat_of_several_turns_on_one_cache_says_what_new_chats_of_these_turns_say(
    output: Callable[..., list[str]],
) -> None:
    lengths = ["--max-length", "96", "--max-new-tokens", "6"]
    lines = output("chat_transformers.py", *lengths, "HELLO", "WORLD")
    assert [line for line in lines if line.startswith("> ")] == ["> HELLO", "> WORLD"]
    first, second = lines[1], lines[-1]
    assert len(first) > 3
    again = output("chat_transformers.py", *lengths, f"HELLO\n{first}\nWORLD")
    assert again[-1] == second


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_a_tuned_prompt_lowers_the_loss_is_the_same_when_it_is_loaded_and_chats(
    output: Callable[..., list[str]], tmp_path: Path, mode: str
) -> None:
    lines = output("prompt_tuning.py", "--steps", "5", "--save", str(tmp_path), "--tuning-mode", mode)
    before, after, loaded = map(float, LOSS.findall("\n".join(lines)))
    assert after < before
    assert loaded == after
    assert lines[-1].startswith("Tyger")
    assert len(lines[-1]) > 5
    lengths = ["--max-length", "96", "--max-new-tokens", "6"]
    tuned = output("chat_transformers.py", "--tuned", str(tmp_path), *lengths, "HELLO")
    assert tuned != output("chat_transformers.py", *lengths, "HELLO")


def test_lora_lowers_the_loss_and_is_saved_for_peft(output: Callable[..., list[str]], tmp_path: Path) -> None:
    lines = output("lora.py", "--steps", "4", "--save", str(tmp_path))
    losses = [float(each) for each in LOSS.findall("\n".join(lines))]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert lines[-1].startswith("Alice wa")
    assert len(lines[-1]) > 8


def test_a_text_that_is_too_short_to_tune_on_is_a_clear_error(
    output: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "short").write_text("a")
    with pytest.raises(SystemExit, match=r"a row of --tokens 24 is needed"):
        output("prompt_tuning.py", "--text", str(tmp_path / "short"), "--save", str(tmp_path / "tuned"))


def test_a_classifier_learns_its_sentences(output: Callable[..., list[str]]) -> None:
    lines = output("classify.py", "--steps", "15")
    before, after = map(float, LOSS.findall("\n".join(lines)))
    assert after < before
    right = [line for line in lines if re.match(r"(bad|good) \(\1 ", line)]
    assert len(right) > len(lines[2:]) / 2


def test_a_probe_fits_the_states_of_the_layer_that_it_is_asked_for(output: Callable[..., list[str]]) -> None:
    found = {layer: output("linear_probe.py", "--layer", layer)[-1] for layer in ("0", "3", "6")}
    for layer, line in found.items():
        match = re.fullmatch(rf"layer {layer}: (\d+)% of the fitted texts, (\d+)% of the others", line)
        assert match is not None
        assert int(match[1]) > 70
    with pytest.raises(SystemExit):
        output("linear_probe.py", "--layer", "7")
