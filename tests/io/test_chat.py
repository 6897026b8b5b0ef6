"""`python -m client chat` whose conversation is full: the talk goes on."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

from client import terminal
from client.generation.generate import Token
from client.generation.generation_config import Settings
from client.generation.options import GenerateOptions, SamplingOptions
from client.session.trace import Trace


class Letters:
    """A tokenizer with a token for each letter, and one for each message's opening."""

    chat_template = "there is one"

    def apply_chat_template(self, history, *, add_generation_prompt, return_dict):
        assert add_generation_prompt
        assert return_dict
        return {"input_ids": [1] * (sum(len(one["content"]) + 1 for one in history) + 1)}


class Talker:
    """A swarm that answers with four letters."""

    def __init__(self, usual: int = 40) -> None:
        self.info = SimpleNamespace(name="M")
        self.local_model = SimpleNamespace(tokenizer=Letters())
        self.usual = usual
        self.asked: list[tuple[int, int]] = []

    def usual_length(self, batch: int = 1) -> int:
        return self.usual

    def conversation(self, max_length, *, adapter):
        self.opened_for, self.adapter = max_length, adapter
        return SimpleNamespace(trace=Trace(), close=lambda: None)

    async def route(self):
        return None

    def view(self):
        return None

    def settings(self, prompt, options):
        return Settings(SamplingOptions(), 8, (), ())

    def generate(self, ids, options, *, conversation):
        assert len(ids) + options.max_new_tokens <= self.opened_for
        assert (options.min_new_tokens or 0) <= options.max_new_tokens
        self.asked.append((len(ids), options.max_new_tokens))
        return self._tokens()

    async def _tokens(self) -> AsyncIterator[Token]:
        for _ in range(4):
            yield Token(1, "a", 0.1)


async def chat(
    monkeypatch, lines: list[str], swarm: Talker, max_length: int | None = None, **sampling: Any
) -> None:
    @asynccontextmanager
    async def connected(flags):
        yield swarm

    async def ask(prompt: str) -> str:
        return lines.pop(0) if lines else ""

    monkeypatch.setattr(terminal, "_connect", connected)
    options = GenerateOptions(max_new_tokens=8, **sampling)
    monkeypatch.setattr(terminal, "options_of_flags", lambda flags: options)
    monkeypatch.setattr(terminal, "_ask_for_text", ask)
    flags = argparse.Namespace(wait=1.0, system="be", max_length=max_length, trace=None, adapter="poems")
    await terminal.run_chat(flags)
    assert not lines


async def test_a_full_talk_drops_its_oldest_turns_says_so_and_goes_on(monkeypatch, capsys):
    swarm = Talker()
    await chat(monkeypatch, ["12345"] * 5, swarm)
    assert swarm.adapter == "poems", "the name of one that servers keep"
    assert swarm.opened_for == 40, "what the swarm says where nothing was asked for"
    told = capsys.readouterr().err
    # 4 for the system message and the opening, 11 a turn: the fourth message makes 43, and 30 of 40 may stay.
    assert [ids for ids, _ in swarm.asked] == [10, 21, 32, 21, 32]
    assert (
        told.count("the chat has reached its 40 tokens (--max-length): it goes on without its 2 oldest turns")
        == 1
    )


async def test_a_message_that_is_too_long_alone_is_left_out_and_the_talk_goes_on(monkeypatch, capsys):
    swarm = Talker()
    await chat(monkeypatch, ["12345", "x" * 40, "12345"], swarm, 40)
    told = capsys.readouterr().err
    assert "this message takes 45 tokens with what goes before it, 39 are allowed (--max-length)" in told
    assert [ids for ids, _ in swarm.asked] == [10, 21], "what was said before is still there"


async def test_the_least_length_of_an_answer_gives_way_where_there_is_less_room(monkeypatch):
    swarm = Talker()
    await chat(monkeypatch, ["x" * 32], swarm, 40, min_new_tokens=6)
    assert swarm.asked == [(37, 3)]
