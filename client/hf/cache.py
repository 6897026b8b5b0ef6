"""`RemoteCache`: the sessions at the servers, in the place of the library's caches of keys and values."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import trio
from torch import Tensor
from transformers import Cache

from client.adapters.prompts import Prompts

if TYPE_CHECKING:
    from client.hf.access import SwarmAccess
    from client.session.session import Session
    from tensor_codec.adapters import AdapterContent
    from tensor_codec.messages.contract import Reply


# Of the `generate` under way: where the library drops a cache (the angles of phi3), another one follows.
CURRENT: ContextVar[RemoteCache | None] = ContextVar("cache of a generate", default=None)


@dataclass(slots=True)
class Group:
    """Rows of a batch with one length of padding, which share a session.

    rows: their numbers in the batch, in order.  sessions: one for each run of blocks, see
    `RemoteCache.stops`.  orders: for the next step of each session, the row that each row continues; None:
    its own.  A step that fails has left the rows as they were (`Session.step`), so its order stays.
    """

    rows: list[int]
    pad: int
    sessions: list[Session]
    orders: list[list[int] | None] = field(default_factory=list)

    def add(self, session: Session) -> None:
        """The session of the next run of blocks."""
        self.sessions.append(session)
        self.orders.append(None)

    def reorder(self, order: list[int]) -> None:
        """Each row goes on from another one, at the next step of every session."""
        self.orders = [order if one is None else [one[at] for at in order] for one in self.orders]

    def sent(self, number: int) -> None:
        """A session has taken its order."""
        self.orders[number] = None


class RemoteCache(Cache):  # type: ignore[misc]  # the library is untyped
    """Stands for keys and values at the servers.  Made by `generate`, or by hand for several calls.

    One session serves all rows with the same length of left padding: no padding travels, and a server
    batches all sessions anyway.  Sessions open at the first step.

    max_length: positions of each row, padding included; None: the usual length of the swarm.
    stops: the blocks before which a session ends and the next one begins, so that hidden states in between
    can be seen; the last one is the number of blocks.
    """

    def __init__(self, swarm: SwarmAccess, max_length: int | None = None) -> None:
        super().__init__(layers=[])
        self.swarm = swarm
        self.max_length = max_length
        self.pads: Tensor | None = None  # int64 [rows], until and after the first step; None: no padding
        self.prefix = 0  # positions of a soft prompt in front of each row's tokens
        self.deep: Tensor | None = None  # prompts at each block, [blocks, prefix, hidden]
        self.stops: tuple[int, ...] = (swarm.blocks,)
        self._seen = 0  # tokens of each row, padding included and soft prompt not: as the library counts
        self._groups: list[Group] = []
        self._successor: RemoteCache | None = None
        self._finalizer: Any = None  # Any: of weakref.finalize
        self._adapter: AdapterContent | str | None = None  # of the sessions

    # --- what the library asks ---

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of each row, padding included."""
        return self._seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """The length of keys after the next step, and the first of them."""
        return self._seen + query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The position of the next token."""
        return self._seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the library knows no bound; the sessions refuse what is too long."""
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether there are cached positions."""
        return self._seen > 0

    def __len__(self) -> int:
        return 1  # the one layer that the library sees

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first step."""
        return sum(len(group.rows) for group in self._groups) if self._groups else -1

    @property
    def is_compileable(self) -> bool:
        """No: a step waits for servers."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether sessions are open."""
        return bool(self._groups)

    @property
    def is_croppable(self) -> bool:
        """Yes; a server with a convolution's state, which cannot go back, is filled again."""
        return True

    @property
    def is_sliding(self) -> list[bool]:
        """Of the one layer that the library sees."""
        return [False]

    @property
    def is_linear(self) -> list[bool]:
        """Of the one layer that the library sees."""
        return [False]

    @property
    def is_dummy(self) -> list[bool]:
        """Of the one layer that the library sees."""
        return [False]

    def activate_past_recording(self) -> None:
        """Servers can always go back."""

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        """Servers can always go back."""
        return True

    def update(self, *args: Any, **arguments: Any) -> Any:  # Any: the library's signature
        """Raises RuntimeError: keys and values are at the servers."""
        raise RuntimeError("keys and values of a RemoteCache are at the servers")

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions.  tokens_to_remove: 0 or negative, as in the library."""
        if tokens_to_remove > 0 or -tokens_to_remove > self._seen:
            raise ValueError(f"crop({tokens_to_remove}): 0 to {-self._seen} is allowed")
        self._seen += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes the former row beam_idx[i], for beams.  The order travels with the next step."""
        order = [int(each) for each in beam_idx]
        if order == list(range(len(order))):
            return
        for group in self._groups:
            place = {row: at for at, row in enumerate(group.rows)}
            try:
                local = [place[order[row]] for row in group.rows]
            except (KeyError, IndexError):
                raise ValueError("a row can only become one with the same length of padding") from None
            group.reorder(local)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Raises ValueError once there are rows: a session's rows do not grow."""
        if self._groups and repeats != 1:
            raise ValueError(
                f"{repeats} rows for each cached row: the rows of a RemoteCache are those of its first step"
            )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Raises ValueError once there are rows: a session's rows do not shrink."""
        chosen = [int(each) for each in torch.arange(max(self.batch_size, 0))[indices.cpu()]]
        if self._groups and chosen != list(range(self.batch_size)):
            raise ValueError(f"rows {chosen}: the rows of a RemoteCache are those of its first step")

    def reset(self) -> None:
        """Forget all positions; the sessions stay."""
        self._seen = 0

    # --- the steps ---

    def pad(self, pads: Tensor | None) -> None:
        """The left padding of each row, at the first step.  Raises ValueError for another one later."""
        if not self._groups:
            self.pads = pads
        elif (pads is None) != (self.pads is None) or (
            pads is not None and self.pads is not None and not torch.equal(pads, self.pads)
        ):
            was = "none" if self.pads is None else self.pads.tolist()
            now = "none" if pads is None else pads.tolist()
            raise ValueError(f"attention_mask pads the rows by {now}, the cache has {was}")

    def prepare(self, prompts: Prompts) -> None:
        """The prompts in front of each row, before the first step.  Raises ValueError after it."""
        if not self._groups:
            self.prefix = prompts.length
            self.deep = None if prompts.deep is None else prompts.deep.detach().to("cpu", torch.float32)
        elif self.prefix != prompts.length:
            raise ValueError(f"a soft prompt of {prompts.length}, the cache has one of {self.prefix}")

    def see(self, stops: Sequence[int]) -> None:
        """Let `step` answer the hidden states before these blocks too.  Raises ValueError if it is late."""
        wanted = tuple(sorted({*stops, self.swarm.blocks}))
        if not self._groups:
            self.stops = wanted
        elif not set(wanted) <= set(self.stops):
            raise ValueError(
                f"hidden states before blocks {list(wanted)}: a cache that was opened without them cannot"
                " give them later"
            )

    def step(self, hidden: Tensor, tokens: int, *, last_only: bool = False) -> list[Tensor]:
        """Hidden states that follow the cached ones, through all blocks: the states at each of `stops`.

        hidden: [rows, prefix + tokens, hidden] at the first step of a soft prompt, else
        [rows, tokens, hidden].
        last_only: answer the last position alone, [rows, 1, hidden]; else all of `hidden`'s positions.
        Answers float32 on the CPU; padding's positions are zero.
        """
        rows = hidden.shape[0]
        if not self._groups:
            self._open(rows, tokens)
        elif rows != self.batch_size:
            raise ValueError(f"{rows} rows, the cache has {self.batch_size}")
        check_adapter(self)
        given = hidden.detach().to("cpu", torch.float32)
        groups = self._groups
        if len(groups) == 1:
            answers = [self.swarm.call(partial(self._group_step, groups[0], given, last_only))]
        else:
            answers = self.swarm.call(partial(self._all, given, last_only))
        if len(groups) == 1 and not groups[0].pad:
            found = answers[0]
        else:
            ahead = hidden.shape[1] - tokens
            shape = (rows, 1 if last_only else hidden.shape[1], hidden.shape[2])
            found = [torch.zeros(shape) for _ in self.stops]
            for group, states in zip(groups, answers, strict=True):
                for out, state in zip(found, states, strict=True):
                    padded = shape[1] - state.shape[1]
                    begin = 0 if last_only else ahead
                    out[group.rows, :begin] = state[:, :begin]
                    out[group.rows, padded + begin :] = state[:, begin:]
        self._seen += tokens
        return found

    async def _all(self, hidden: Tensor, last_only: bool) -> list[list[Tensor]]:
        """Runs in trio: a step of each group, all at once."""
        found: dict[int, list[Tensor]] = {}
        failure: Exception | None = None

        async def run(at: int, group: Group) -> None:
            nonlocal failure
            try:
                found[at] = await self._group_step(group, hidden[group.rows], last_only)
            except Exception as error:  # noqa: BLE001  raised again below, outside the nursery
                failure = failure or error
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for at, group in enumerate(self._groups):
                nursery.start_soon(run, at, group)
        if failure is not None:
            raise failure
        return [found[at] for at in range(len(self._groups))]

    async def _group_step(self, group: Group, hidden: Tensor, last_only: bool) -> list[Tensor]:
        """Runs in trio.  hidden: of the group's rows, padding included."""
        ahead = self.prefix if self._seen == 0 else 0
        if padded := max(0, group.pad - self._seen):
            hidden = torch.cat([hidden[:, :ahead], hidden[:, ahead + padded :]], dim=1)
        position = (self.prefix if self._seen else 0) + max(0, self._seen - group.pad)
        whole = self._rope_length(position + hidden.shape[1], group)
        states = []
        for number, session in enumerate(group.sessions):
            reply: Reply = "last" if last_only and session is group.sessions[-1] else "all"
            order = group.orders[number] if position else None  # nothing is cached, nothing moves
            answer = await send(session, hidden, position, reply, rows=order, rope_length=whole)
            group.sent(number)
            hidden = answer.float()
            states.append(hidden)
        return states

    def _rope_length(self, stop: int, group: Group) -> int:
        """The length for angles that depend on it: as in the library, that of the longest row.

        stop: of the group's rows after this step.
        """
        if self.pads is None or self.swarm.swarm.local_model.rope is None:
            return stop
        return min(stop + group.pad - int(self.pads.min()), group.sessions[0].terms.max_length)

    def _open(self, rows: int, tokens: int) -> None:
        """Open the sessions for each length of padding."""
        pads = [0] * rows if self.pads is None else self.pads.tolist()
        usual = max(1, self.swarm.swarm.usual_length(rows) - self.swarm.virtual_tokens)
        length = max(usual, tokens) if self.max_length is None else self.max_length
        groups: list[Group] = []
        try:
            for pad in sorted(set(pads)):
                members = [row for row, one in enumerate(pads) if one == pad]
                groups.append(Group(members, pad, []))
                positions = length - (0 if self.swarm.swarm.local_model.rope else pad) + self.prefix
                for start, stop in pairwise((0, *self.stops)):
                    deep = None if self.deep is None else self.deep[start:stop]
                    session = self.swarm.open_session(len(members), positions, start, stop, deep)
                    groups[-1].add(session)
        except BaseException:
            _close(self.swarm, _sessions(groups))
            raise
        self.adopt(groups)

    def adopt(self, groups: Sequence[Group]) -> None:
        """Use these sessions; they end with the cache."""
        self._groups, self._adapter = list(groups), self.swarm.content
        self._finalizer = weakref.finalize(self, _close, self.swarm, _sessions(groups))

    @property
    def single(self) -> Session | None:
        """The session of a cache with one row without padding or prompts, over all blocks at once."""
        if len(self._groups) != 1 or self.prefix or self._groups[0].pad:
            return None
        group = self._groups[0]
        return group.sessions[0] if len(group.rows) == len(group.sessions) == 1 else None

    def successor(self) -> RemoteCache:
        """A cache in the place of this one, from position 0 on; ends with it."""
        self._successor = RemoteCache(self.swarm, self.max_length)
        return self._successor

    def keep(self) -> None:
        """It outlives the `generate` that uses it."""
        self._is_user_defined = True

    def follow(self, session: Session, tokens: int) -> None:
        """One row is in this session's caches, with so many tokens: another loop has filled them."""
        if self.single is not session:
            group = Group([0], 0, [])
            group.add(session)
            self.adopt([group])
        self._seen = tokens

    def close(self) -> None:
        """End the sessions; returns at once.  The cache is empty then."""
        if self._finalizer is not None:
            self._finalizer()
        if self._successor is not None:
            self._successor.close()
        self._groups, self._seen, self._finalizer, self._successor = [], 0, None, None

    def __deepcopy__(self, memo: Any) -> RemoteCache:
        raise TypeError("a RemoteCache cannot be copied: its keys and values are at the servers")

    def __repr__(self) -> str:
        return f"RemoteCache({self._seen} positions, {max(self.batch_size, 0)} rows)"


def check_adapter(cache: RemoteCache) -> None:
    """Raise ValueError where the cached positions have other values of an adapter than the model now."""
    was, now = cache._adapter, cache.swarm.content
    if not cache.is_initialized or was is now:
        return
    if getattr(was, "id", was) != getattr(now, "id", now):
        raise ValueError(
            "the cache was filled with another adapter, or with other values of it: a new one is needed"
        )


async def send(
    session: Session,
    hidden: Tensor,
    position: int,
    reply: Reply = "all",
    *,
    rows: Sequence[int] | None = None,
    rope_length: int | None = None,
) -> Tensor:
    """Runs in trio: any number of positions, or one step of them after an order of `rows`."""
    if rows is None:
        answer = await session.prefill(hidden, position, reply, rope_length=rope_length)
    else:
        answer = await session.step(hidden, position, reply, rows=rows, rope_length=rope_length)
    assert answer is not None
    return answer


def _sessions(groups: Sequence[Group]) -> list[Session]:
    return [session for group in groups for session in group.sessions]


def _close(swarm: SwarmAccess, sessions: Sequence[Session]) -> None:
    for session in sessions:
        swarm.close_soon(session)
