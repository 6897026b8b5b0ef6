"""Carries out a lookup: asks the peers that it chooses, a few at once on each path."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from node.network.directory.kademlia.contact import Contact
from node.network.directory.kademlia.lookup import Lookup
from node.network.directory.kademlia.messages import Message

ASKED_AT_ONCE = 2  # by each path of a lookup, besides its first peers, which are asked all at once
LATE_SECONDS = 0.5  # without an answer: the path asks another peer as well

Ask = Callable[[Contact], Awaitable[Message | None]]


async def walk(lookup: Lookup, ask: Ask, answered: Callable[[Contact, Message], None]) -> None:
    """Walk along all paths of a lookup until each has ended.

    ask: gives a peer's answer, None without one, within a time of its own.
    answered: called with each answer.
    """
    async with trio.open_nursery() as nursery:
        for number in range(lookup.paths):
            nursery.start_soon(_walk, lookup, number, ask, answered)


async def _walk(lookup: Lookup, number: int, ask: Ask, answered: Callable[[Contact, Message], None]) -> None:
    asked, late = set[Contact](), set[Contact]()
    news = trio.Event()

    async def put(contact: Contact) -> None:
        nonlocal news
        nursery.start_soon(wait, contact)
        answer = await ask(contact)
        if answer is not None:
            lookup.answered(number, contact, answer.closer)
            answered(contact, answer)
        asked.discard(contact)
        news.set()

    async def wait(contact: Contact) -> None:
        await trio.sleep(LATE_SECONDS)
        late.add(contact)
        news.set()

    async with trio.open_nursery() as nursery:
        while True:
            news = trio.Event()
            while lookup.has_first(number) or len(asked - late) < ASKED_AT_ONCE:
                if (contact := lookup.next(number)) is None:
                    break
                asked.add(contact)
                nursery.start_soon(put, contact)
            if not asked:
                break
            await news.wait()
        nursery.cancel_scope.cancel()
