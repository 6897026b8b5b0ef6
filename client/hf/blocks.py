"""The blocks of a model in a swarm as a torch module: `RemoteSequential`, differentiable and sliceable.

The name and the methods are those of Petals (`petals.client.remote_sequential`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Self, overload

import torch
from torch import Tensor, nn

from client.hf.access import SwarmAccess
from client.hf.cache import RemoteCache, send

if TYPE_CHECKING:
    from client.session.session import Session


class InferenceSession:
    """Caches at the servers for `batch` rows; hidden states in, hidden states out.

    Petals has the same class under this name (`petals.client.inference_session`).
    position: positions in the caches; setting it lower cuts them there before the next step.
    cache, output_ids: of a model that runs on this session, and of its `generate`.
    """

    def __init__(
        self, swarm: SwarmAccess, start: int, stop: int, batch: int = 1, max_length: int | None = None
    ) -> None:
        self.swarm = swarm
        self.batch = batch
        self.max_length = swarm.swarm.usual_length(batch) if max_length is None else max_length
        self.start, self.stop = start, stop
        self.output_ids: Tensor | None = None
        self.cache: RemoteCache | None = None
        self._session: Session | None = None
        self._prompts: Tensor | None = None
        self._position = 0
        self._closed = False
        self._finalizer: Any = None  # Any: of weakref.finalize

    @property
    def position(self) -> int:
        """Positions in the caches of each row."""
        return self._position if self.cache is None else self.cache.get_seq_length()

    @position.setter
    def position(self, value: int) -> None:
        if not 0 <= value <= self.position:
            raise ValueError(f"position is {value}, 0 to {self.position} are in the caches")
        if self.cache is not None:
            self.cache.crop(value - self.position)
        self._position = value
        if self.output_ids is not None:
            self.output_ids = self.output_ids[:, : value + 1]

    @property
    def session(self) -> Session:
        """The session of the client; opened by its first use."""
        if self._closed:
            raise RuntimeError("the session was closed")
        if self._session is None:
            self._session = self.swarm.open_session(
                self.batch, self.max_length, self.start, self.stop, self._prompts
            )
            self._finalizer = weakref.finalize(self, self.swarm.close_soon, self._session)
        return self._session

    def open_cache(self) -> RemoteCache:
        """The cache of a model that runs on this session."""
        if self._closed:
            raise RuntimeError("the session was closed")
        if self.cache is None:
            self.cache = RemoteCache(self.swarm, self.max_length)
        return self.cache

    def note(self, output_ids: Tensor) -> None:
        """The text of `generate` so far, int64 [rows, tokens]."""
        self.output_ids = output_ids

    @torch.no_grad()
    def step(
        self, hidden: Tensor, rows: Sequence[int] | None = None, prompts: Tensor | None = None
    ) -> Tensor:
        """Hidden states [batch, tokens, hidden] that follow the cached ones -> the same shape and dtype.

        rows: the cached row of which each row is the continuation; None: its own.
        prompts: [blocks, n, hidden], added to the first n positions of each block's input.  The first step
        gives them, and a later step none or the same ones.
        Raises ValueError (another shape, more positions than max_length, other prompts), NoChain, PeerFault,
        Refused.
        """
        if prompts is not None:
            self._take_prompts(prompts)
        session = self.session
        given = hidden.detach().to("cpu", torch.float32)
        found = self.swarm.call(partial(send, session, given, self._position, rows=rows))
        self._position += hidden.shape[1]
        return found.to(hidden.device, hidden.dtype)

    def _take_prompts(self, prompts: Tensor) -> None:
        given = prompts.detach().to("cpu", torch.float32)
        if self._prompts is None and self._session is None:
            self._prompts = given
        elif self._prompts is None or not torch.equal(self._prompts, given):
            raise ValueError("other prompts inside a session: it has those of its first step for good")

    def close(self) -> None:
        """End the session; returns at once."""
        self._closed = True
        if self._finalizer is not None:
            self._finalizer()
        if self.cache is not None:
            self.cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class RemoteSequential(nn.Module):
    """A run of blocks [start, stop) at the swarm's servers, as one module.

    `blocks(hidden)` runs them without a cache, and autograd passes through.  `blocks[i]` is one block,
    `blocks[i:j]` a run, `len` and iteration are by block.  The servers' weights are frozen.
    """

    def __init__(self, swarm: SwarmAccess, start: int = 0, stop: int | None = None) -> None:
        super().__init__()
        self.swarm = swarm
        self.start = start
        self.stop = swarm.blocks if stop is None else stop
        self._active: list[InferenceSession] = []

    def forward(self, hidden: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Hidden states [batch, tokens, hidden] of any float dtype and device -> the same of all three.

        prompts: [blocks, tokens of the prompt, hidden], added to the first positions of each block's input
        (deep prompt tuning).  Inside `inference_session` the caches of the session are used, without a
        gradient, and its first step gives the prompts.
        Raises ValueError for a shape that cannot be, NoChain, PeerFault, Refused.
        """
        if self._active:
            return self._active[-1].step(hidden, prompts=prompts)
        return self.swarm.run(hidden, self.start, self.stop, prompts)

    def __len__(self) -> int:
        return self.stop - self.start

    @overload
    def __getitem__(self, index: int) -> RemoteSequential: ...
    @overload
    def __getitem__(self, index: slice) -> RemoteSequential: ...

    def __getitem__(self, index: int | slice) -> RemoteSequential:
        """One block, or a run of them.  Raises IndexError, and ValueError for a run with gaps or none."""
        found = range(self.start, self.stop)[index]
        if isinstance(found, int):
            return RemoteSequential(self.swarm, found, found + 1)
        if found.step != 1 or not len(found):
            raise ValueError(f"blocks {index} of {len(self)}: a run of neighbours is allowed")
        return RemoteSequential(self.swarm, found.start, found.stop)

    def __iter__(self) -> Iterator[RemoteSequential]:
        return (self[index] for index in range(len(self)))

    @property
    def active_session(self) -> InferenceSession | None:
        """The session of the innermost `inference_session` or `use_session`."""
        return self._active[-1] if self._active else None

    @property
    def position(self) -> int:
        """Positions in the caches of the active session; 0 without one."""
        return self._active[-1].position if self._active else 0

    @contextmanager
    def inference_session(
        self, max_length: int | None = None, *, batch: int = 1, batch_size: int | None = None
    ) -> Iterator[InferenceSession]:
        """A session over these blocks, in use within the context: `blocks(hidden)` then fills its caches.

        max_length: positions of each row; None: the usual length of the swarm.  batch: rows; batch_size is
        Petals' name.
        """
        rows = batch if batch_size is None else batch_size
        made = InferenceSession(self.swarm, self.start, self.stop, rows, max_length)
        with made as session, self.use_session(session):
            yield session

    @contextmanager
    def use_session(self, session: InferenceSession | None) -> Iterator[InferenceSession | None]:
        """Use a session that exists within the context; None: none."""
        if session is None:
            yield None
            return
        self._active.append(session)
        try:
            yield session
        finally:
            self._active.remove(session)

    @contextmanager
    def without_session(self) -> Iterator[None]:
        """No session is in use within the context."""
        before, self._active = self._active, []
        try:
            yield
        finally:
            self._active = before

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"blocks {self.start}:{self.stop} of {self.swarm.model}"

    def __deepcopy__(self, memo: Any) -> RemoteSequential:
        return RemoteSequential(self.swarm, self.start, self.stop)

    def train(self, mode: bool = True) -> RemoteSequential:
        """Nothing changes: the servers run no dropout."""
        super().train(mode)
        return self
