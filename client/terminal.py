"""Generating and chatting in a terminal."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from client.api import ConversationLike, SwarmLike
from client.arguments import constraints_of
from client.connect import connect
from client.generation.generate import Token
from client.generation.generation_config import Settings
from client.generation.history import Fitted, Message, MessageTooLong, fit_history
from client.generation.options import GenerateOptions
from client.session.trace import Trace
from node.config import ConfigError
from node.runtime.console import one_line, put, put_line, read_text, say, text_for
from routing.chains.hops import Chain, NoChain

if TYPE_CHECKING:
    from client.adapters.upload import AnyAdapter


@dataclass(slots=True)
class Measured:
    """Speed of one generation, from its tokens."""

    tokens: list[Token] = field(default_factory=list)

    @property
    def first_seconds(self) -> float:
        """Time to the first token, the session's opening included."""
        return self.tokens[0].seconds if self.tokens else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first."""
        rest = sum(token.seconds for token in self.tokens[1:])
        return (len(self.tokens) - 1) / rest if rest else 0.0

    def line(self) -> str:
        """For people."""
        return (
            f"{len(self.tokens)} tokens, {self.tokens_per_second:.1f} tokens/s,"
            f" time to first token {self.first_seconds * 1e3:.0f} ms"
        )


async def run_generate(flags: argparse.Namespace) -> None:
    """`python -m client generate`."""
    prompt = read_text("the prompt") if flags.prompt == "-" else flags.prompt
    if not prompt:
        raise ValueError("the prompt is empty")
    options = options_of_flags(flags)
    async with _connect(flags) as swarm:
        route = await wait_for_route(swarm, flags.wait)
        if flags.show_route:
            say(describe_route(swarm, route))
        measured, texts, trace = Measured(), [], Trace()
        adapter = await adapter_of_flags(flags, swarm)
        settings = swarm.settings(prompt, options)
        _say_settings(settings)
        tokens = swarm.generate(prompt, options, adapter=adapter, trace=trace)
        with traced(trace, flags.trace):
            async with aclosing(tokens):
                async for token in tokens:
                    measured.tokens.append(token)
                    texts.append(token.text)
                    if not flags.json:
                        put(text_for(sys.stdout, token.text))
            if flags.json:
                put_line(json.dumps(_result(swarm, route, measured, "".join(texts), settings)))
            else:
                put("\n")
                say(measured.line())
        if flags.show_route:
            say("\n".join(describe_events(trace)))


async def run_chat(flags: argparse.Namespace) -> None:
    """`python -m client chat`: a line in, an answer out, until the end of the input."""
    options = options_of_flags(flags)
    async with _connect(flags) as swarm:
        tokenizer = swarm.local_model.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"{swarm.info.name} has no chat template: use generate")
        await wait_for_route(swarm, flags.wait)
        _say_settings(swarm.settings([0], options))
        from client.adapters.adapter import Adapter

        adapter = await adapter_of_flags(flags, swarm)
        taken = adapter.virtual_tokens if isinstance(adapter, Adapter) else 0
        length = max(1, swarm.usual_length() - taken) if flags.max_length is None else flags.max_length
        chat = Chat(swarm, swarm.conversation(length, adapter=adapter), length, options)
        if flags.system:
            chat.history.append({"role": "system", "content": flags.system})
        say(f"{swarm.info.name}; an empty line or Ctrl-D ends the chat")
        try:
            while line := await _ask_for_text("> "):
                await chat.answer(line)
        finally:
            chat.conversation.close()
            with traced(chat.conversation.trace, flags.trace):
                pass


@dataclass(slots=True)
class Chat:
    """One chat in a terminal.  length: tokens that its history and an answer may have together."""

    swarm: SwarmLike
    conversation: ConversationLike
    length: int
    options: GenerateOptions
    history: list[Message] = field(default_factory=list)

    async def answer(self, line: str) -> None:
        """Print the answer to a line; a line that is too long is left out."""
        fitted = self._fit(line)
        if fitted is None:
            return
        self.history = fitted.history
        measured, answer = Measured(), ""
        options = self._options(self.length - len(fitted.ids))
        tokens = self.swarm.generate(fitted.ids, options, conversation=self.conversation)
        async with aclosing(tokens):
            async for token in tokens:
                measured.tokens.append(token)
                answer += token.text
                put(text_for(sys.stdout, token.text))
        put("\n")
        say(measured.line())
        self.history.append({"role": "assistant", "content": answer})

    def _fit(self, line: str) -> Fitted | None:
        """History and line, without the oldest turns where that is full; None: the line is too long."""
        template = partial(_template, self.swarm.local_model.tokenizer)
        history = [*self.history, {"role": "user", "content": line}]
        try:
            fitted = fit_history(history, template, self.length, self.options.max_new_tokens or 1)
        except MessageTooLong as error:
            say(f"{error} (--max-length): it was left out")
            return None
        if fitted.dropped:
            turns = "oldest turn" if fitted.dropped == 1 else f"{fitted.dropped} oldest turns"
            full = f"the chat has reached its {self.length} tokens (--max-length)"
            say(f"{full}: it goes on without its {turns}")
        return fitted

    def _options(self, room: int) -> GenerateOptions:
        """The options of an answer.  room: tokens that are left for it."""
        new_tokens = min(self.options.max_new_tokens or room, room)
        shortest = self.options.min_new_tokens
        return replace(
            self.options,
            max_new_tokens=new_tokens,
            min_new_tokens=None if shortest is None else min(shortest, new_tokens),
        )


def _template(tokenizer: Any, history: list[Message]) -> list[int]:  # Any: the library's own class
    """The tokens of a chat and of an answer's opening; the template's text has the special ones already."""
    try:
        made = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=True)
    except Exception as error:  # a template may end with anything
        what = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path} cannot be used: {what}; use generate"
        ) from error
    return list(made["input_ids"])


@contextmanager
def traced(trace: Trace, path: Path | None) -> Iterator[None]:
    """Write the trace at any end of the block.  Raises ConfigError where it cannot."""
    try:
        yield
    finally:
        if path is not None:
            try:
                trace.write(path)
            except OSError as error:
                raise ConfigError(f"cannot write the trace {path}: {error.strerror or error}") from None


def describe_events(trace: Trace) -> list[str]:
    """The events of the route, for people: a line for each."""
    lines = []
    for event in trace.of("fault", "rerouted", "replayed", "recovered", "relayed"):
        data = event.data
        match event.kind:
            case "fault":
                lines.append(f"  {data['peer']} failed: {one_line(data['error'])}")
            case "rerouted":
                hops = ", ".join(
                    f"{hop['peer']} {hop['blocks'][0]}:{hop['blocks'][1]}" for hop in data["hops"]
                )
                lines.append(
                    f"  new route after {data['seconds'] * 1e3:.0f} ms ({one_line(data['why'])}): {hops}"
                )
            case "replayed":
                count = data["stop"] - data["start"]
                lines.append(f"  {data['sender']} sent {count} positions again to {data['peer']}")
            case "recovered":
                lines.append(f"  went on {data['seconds'] * 1e3:.0f} ms after the fault")
            case "relayed":
                lines.append(f"  {data['sender']} cannot reach {data['peer']}: this client is between them")
    return lines or ["  nothing happened to the route"]


async def wait_for_route(swarm: SwarmLike, seconds: float) -> Chain:
    """The route, once the swarm is complete.  Raises NoChain after `seconds`."""
    deadline, announced = trio.current_time() + seconds, False
    while True:
        seen = swarm.view()
        try:
            return await swarm.route()
        except NoChain as missing:
            if trio.current_time() >= deadline:
                raise
            if not announced:
                say(f"waiting up to {seconds:.0f} s: {missing}")
                announced = True
        with trio.move_on_at(deadline):
            await swarm.changed(seen)


def describe_route(swarm: SwarmLike, chain: Chain) -> str:
    """The route for people: peer, blocks, expected milliseconds."""
    view = swarm.view()
    lines = [f"route, {chain.expected_seconds * 1e3:.1f} ms a token expected:"]
    for hop in chain.hops:
        record = view.get(hop.peer)
        compute = (record.seconds_per_block if record else 0.0) * (hop.stop - hop.start)
        name = f" ({one_line(record.name)})" if record and record.name else ""
        lines.append(f"  {hop.peer}{name}  blocks {hop.start}:{hop.stop}  {compute * 1e3:.1f} ms")
    return "\n".join(lines)


async def adapter_of_flags(flags: argparse.Namespace, swarm: SwarmLike) -> AnyAdapter | None:
    """The adapter of --adapter: out of a folder or of the hub, or the name of one that servers keep.

    Raises ConfigError.
    """
    named: str | None = flags.adapter
    if named is None:
        return None
    from client.adapters.folder import is_to_be_read, load_adapter

    if not is_to_be_read(named):
        return named
    return await trio.to_thread.run_sync(load_adapter, named, swarm)


def _connect(flags: argparse.Namespace) -> AbstractAsyncContextManager[SwarmLike]:
    return connect(
        flags.model,
        peers=flags.peers,
        swarm_key=flags.swarm_key,
        max_disk_bytes=flags.max_disk,
        threads=flags.threads,
        device=flags.device,
        dtype=flags.dtype,
        wait_seconds=flags.wait,
        give_up_seconds=max(flags.wait, 1.0),
        codec=flags.codec,
        max_session_tokens=flags.max_session_tokens,
        constraints=constraints_of(flags),
        standby=flags.standby,
    )


def options_of_flags(flags: argparse.Namespace) -> GenerateOptions:
    """The options that the flags give, checked before anybody is connected to.  Raises ValueError."""
    return GenerateOptions(
        max_new_tokens=flags.max_new_tokens,
        stop=getattr(flags, "stop", None),
        do_sample=False if flags.greedy else None,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        min_p=flags.min_p,
        repetition_penalty=flags.repetition_penalty,
        presence_penalty=flags.presence_penalty,
        frequency_penalty=flags.frequency_penalty,
        no_repeat_ngram_size=flags.no_repeat_ngram_size,
        min_new_tokens=flags.min_new_tokens,
        bad_words=flags.bad_word,
        stop_token_ids=flags.stop_token_id,
        skip_special_tokens=False if flags.show_special_tokens else None,
        top_logprobs=getattr(flags, "top_logprobs", None),
        seed=flags.seed,
        generation_config=False if flags.no_generation_config else None,
        speculate=flags.speculate,
    )


def _say_settings(settings: Settings) -> None:
    """Print the settings that the model's own file decides, if any."""
    if not settings.from_file:
        return
    in_force = settings.as_dict()
    values = [f"{name} {in_force[name]}" for name in settings.from_file if in_force.get(name) is not None]
    hint = "; --greedy for the likeliest tokens" if in_force["do_sample"] else ""
    say(f"by the model's generation_config.json: {', '.join(values)}{hint}")


def _log_probabilities(tokens: list[Token]) -> dict[str, Any]:  # Any: JSON
    if not tokens or tokens[0].logprob is None:
        return {}
    return {
        "logprobs": [token.logprob for token in tokens],
        "top_logprobs": [dict(token.top_logprobs or {}) for token in tokens],
    }


def _result(
    swarm: SwarmLike, route: Chain, measured: Measured, text: str, settings: Settings
) -> dict[str, Any]:  # Any: JSON
    return {
        "text": text,
        "tokens": [token.id for token in measured.tokens],
        "finish_reason": measured.tokens[-1].finish_reason,
        "sampling": settings.as_dict(),
        **_log_probabilities(measured.tokens),
        "tokens_per_s": measured.tokens_per_second,
        "ttft_s": measured.first_seconds,
        "model": swarm.info.name,
        "revision": swarm.info.revision,
        "route": [{"peer": hop.peer, "blocks": [hop.start, hop.stop]} for hop in route.hops],
        "expected_s": route.expected_seconds,
    }


async def _ask(prompt: str) -> str:
    """A line of standard input; empty at its end.  Raises ValueError for bytes that are no text."""
    put(prompt)
    read = partial(read_text, "the line", sys.stdin.readline)
    line: str = await trio.to_thread.run_sync(read, abandon_on_cancel=True)
    return line.strip()


async def _ask_for_text(prompt: str) -> str:
    """`_ask` until a line is text."""
    while True:
        try:
            return await _ask(prompt)
        except ValueError as error:
            say(f"error: {error}")
