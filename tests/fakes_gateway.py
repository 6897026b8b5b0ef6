"""A swarm for the tests of the gateway: texts by a script, in asyncio, over nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from client.config import ClientConfig
from client.gateway.app import create_app
from client.gateway.door.keys import KeyRing
from client.gateway.gateway import Gateway
from client.gateway.language import Language
from client.gateway.served import served_models
from client.gateway.settings import GatewaySettings
from client.generation.generate import Token
from client.generation.options import GenerateOptions, options_of
from client.generation.text import TextStream
from client.session.trace import Trace
from routing.blocks import Blocks
from routing.chains.alternatives import Constraints
from routing.names import PeerId
from routing.view.records import Record
from routing.view.view import Entry, SwarmView
from tests.model_fixtures import VOCAB, save_tiny_tokenizer

PEER = PeerId("12D3KooWKnDdG3iXw9eTFijk3EWSunZcFi54Zka4wmtqtt6rPxc8")
REVISION = "0123456789abcdef" * 4
BLOCKS, END = 6, 2
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def record(start: int = 0, stop: int = BLOCKS, **more: Any) -> Record:
    return Record(
        peer=PEER, seq=1, swarm="public", role="serve", state="online", model="tiny", revision=REVISION,
        blocks=BLOCKS, start=start, stop=stop, dtype="float32", cache_tokens=65_536, **more,
    )  # fmt: skip


def view_of(*records: Record) -> SwarmView:
    return SwarmView("public", entries={each.peer: Entry(each, b"", 0.0) for each in records})


@dataclass
class FakeConversation:
    max_length: int
    adapter: Any
    trace: Trace
    constraints: Constraints | None
    tokens: list[int] = field(default_factory=list)
    closed: int = 0

    def close(self) -> None:
        self.closed += 1


@dataclass
class Generated:
    """One call of `generate`: what it was given, and how it went."""

    prompt: list[int]
    options: GenerateOptions
    conversation: FakeConversation
    tokens: int = 0
    ended: bool = False


@dataclass
class FakeSwarm:
    """`SwarmLike` as far as a gateway needs it.

    script: the text of the answer to a prompt's text; it ends there with the end token.
    step: awaited before each token; it may wait, or raise.
    """

    tokenizer: Any
    script: Callable[[str], str] = lambda _: "hello world"
    step: Callable[[int], Any] | None = None
    seen: SwarmView = field(default_factory=lambda: view_of(record()))
    max_position: int = 512
    calls: list[Generated] = field(default_factory=list)
    conversations: list[FakeConversation] = field(default_factory=list)
    config: ClientConfig = field(default_factory=lambda: ClientConfig(peers=("nobody",)))
    news: asyncio.Event | None = None

    @property
    def info(self) -> Any:
        return SimpleNamespace(
            name="tiny", revision=REVISION, blocks=BLOCKS, max_position=self.max_position, vocab_size=VOCAB
        )

    @property
    def local_model(self) -> Any:
        return SimpleNamespace(tokenizer=self.tokenizer, eos_ids=frozenset({END}))

    def view(self) -> SwarmView:
        return self.seen

    async def rtts(self) -> dict[PeerId, float]:
        return {each.peer: 0.002 for each in self.seen.records()}

    def change(self, view: SwarmView) -> None:
        self.seen = view
        if self.news is not None:
            self.news.set()

    async def changed(self, since: SwarmView) -> None:
        while self.seen is since:
            self.news = asyncio.Event()
            await self.news.wait()

    def usual_length(self, batch: int = 1) -> int:
        return self.max_position

    def conversation(self, max_length=None, *, adapter=None, trace=None, constraints=None):
        made = FakeConversation(max_length, adapter, trace or Trace(), constraints)
        self.conversations.append(made)
        return made

    def generate(self, prompt, options=None, *, conversation=None, adapter=None, trace=None, **arguments):
        checked = options_of(options, arguments)
        assert conversation is None or len(prompt) + checked.max_new_tokens <= conversation.max_length
        call = Generated(list(prompt), checked, conversation)
        self.calls.append(call)
        return self._tokens(call)

    async def _tokens(self, call: Generated):
        options = call.options
        text = self.script(str(self.tokenizer.decode(call.prompt)))
        ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], END][: options.max_new_tokens]
        stream = TextStream(self.tokenizer, options.stop or (), prompt=call.prompt)
        try:
            for number, token in enumerate(ids):
                if self.step is not None and (waiting := self.step(number)) is not None:
                    await waiting
                await asyncio.sleep(0)
                call.tokens += 1
                token_ = self._token(stream, options, token, last=number == options.max_new_tokens - 1)
                yield token_
                if token_.finish_reason is not None:
                    return
        finally:
            call.ended = True

    def _token(self, stream: TextStream, options: GenerateOptions, token: int, *, last: bool) -> Token:
        if token == END:
            text, reason = stream.finish(), cast(Any, "end")
        else:
            text = stream.push(token)
            text += stream.finish() if last and not stream.found else ""
            reason = cast(Any, "stop" if stream.found else "length" if last else None)
        logprob = top = None
        if options.logprobs or options.top_logprobs:
            logprob = -0.25
            top = {token: -0.25, 10: -1.5, 11: float("-inf")}
            top = dict(list(top.items())[: options.top_logprobs or 0])
        return Token(token, text, 0.01, reason, logprob, top)


class InlineLanguage(Language):
    """Its thread is the test's own: a clock that jumps would not wait for another one."""

    async def run(self, function, *, slow=False):
        return function()


def tiny_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    save_tiny_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@asynccontextmanager
async def gateway_of(
    swarm: FakeSwarm,
    settings: GatewaySettings | None = None,
    *,
    adapters: dict[str, Any] | None = None,
    ready: bool = True,
    **more: Any,
) -> AsyncIterator[tuple[Gateway, Any]]:
    """A gateway and its application."""
    settings = settings or GatewaySettings()
    served = served_models(cast(Any, swarm), settings.served_name, adapters or {}, 1_700_000_000)
    language = InlineLanguage(swarm.local_model, VOCAB)
    gateway = Gateway(cast(Any, swarm), settings, served, KeyRing(settings.key_file), language, **more)
    if ready:
        gateway.warmed_up()
    async with gateway.background():
        yield gateway, create_app(gateway)


def hole() -> SwarmView:
    """A view in which the last blocks have no server."""
    return view_of(record(0, 4))


def all_of(items: Iterable[Any]) -> list[Any]:
    return list(items)


MISSING = [[Blocks(4, 6).start, Blocks(4, 6).stop]]
