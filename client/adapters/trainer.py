"""Training of an adapter inside the servers' blocks, one optimizer step at a time.

    trainer = client.train(swarm, adapter, torch.optim.AdamW(adapter.parameters(), lr=1e-3))
    async with trainer.step() as step:
        output = await step.forward(hidden)
        loss = loss_of(output.requires_grad_())
        await step.backward(torch.autograd.grad(loss, output)[0])

This program holds everything that counts: the adapter, the optimizer's state, the inputs of every server.
Servers compute with a copy of the adapter's values of the step, and forget it.  A server that dies is
replaced, and its part without an answer is asked again.  A step that fails changes nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from client.adapters.adapter import Adapter

if TYPE_CHECKING:
    from client.api import SwarmLike, SyncSwarm
    from client.batch_parts import KeptInputs
    from client.forward_backward import Gradients
    from tensor_codec.adapters import AdapterContent


class Optimizer(Protocol):
    """The part of `torch.optim.Optimizer` that a step needs."""

    def step(self) -> Any:  # Any: torch's loss of a closure
        """Change the parameters by their gradients."""

    def zero_grad(self) -> Any:
        """Forget the gradients."""


class Passes:
    """The forwards of one step, each until its backward; pure bookkeeping.

    content: the adapter's values of this step, the same for all of its passes.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.content: AdapterContent = adapter.renew()  # an optimizer may write past torch's count
        self.backwards = 0
        self._open: list[tuple[Tensor, KeptInputs]] = []

    def add(self, output: Tensor, kept: KeptInputs) -> Tensor:
        """A forward was answered: its output."""
        self._open.append((output, kept))
        return output

    def find(self, output: Tensor | None) -> KeptInputs:
        """The kept inputs of the forward with this output; None: of the only one.  Raises ValueError."""
        if output is not None:
            kept = next((kept for each, kept in self._open if each is output), None)
            if kept is None:
                raise ValueError("no forward of this step without a backward has this output")
            return kept
        if len(self._open) != 1:
            raise ValueError(
                f"{len(self._open)} forwards without a backward: give the output of the one that is meant"
            )
        return self._open[0][1]

    def answered(self, kept: KeptInputs, gradients: Gradients) -> Tensor:
        """A backward was answered: into `.grad`; the gradient of its hidden states."""
        self._open = [each for each in self._open if each[1] is not kept]
        kept.release()
        if gradients.adapter is not None:
            self.adapter.add_gradients(gradients.adapter)
        self.backwards += 1
        return gradients.hidden

    def close(self) -> None:
        """Give the memory of forwards without a backward back."""
        for _, kept in self._open:
            kept.release()
        self._open = []


class TrainingStep:
    """One step of an optimizer, under way.  Made by `Trainer.step`."""

    def __init__(self, swarm: SwarmLike, passes: Passes) -> None:
        self._swarm = swarm
        self._passes = passes

    async def forward(self, hidden: Tensor) -> Tensor:
        """The output of all blocks with the adapter, for hidden states [batch, tokens, hidden].

        A leaf of autograd: it may require a gradient.  Its servers' inputs are kept until its backward, or
        until the step ends.  Raises as `Swarm.forward_kept`.
        """
        output, kept = await self._swarm.forward_kept(hidden, adapter=self._passes.content)
        return self._passes.add(output, kept)

    async def backward(self, grad: Tensor, output: Tensor | None = None) -> Tensor:
        """Add to `.grad` of the adapter's parameters; the gradient of the hidden states of the forward.

        grad: of the loss with respect to the output, in its shape.  output: of the forward that is meant,
        where several are without a backward.
        An error leaves `.grad` as it was, and the call may be repeated.  Raises as `Swarm.backward`.
        """
        kept = self._passes.find(output)
        return self._passes.answered(kept, await self._swarm.gradients(kept, grad))


class SyncTrainingStep:
    """`TrainingStep`, blocking.  Made by `SyncTrainer.step`."""

    def __init__(self, swarm: SyncSwarm, passes: Passes) -> None:
        self._swarm = swarm
        self._passes = passes

    def forward(self, hidden: Tensor) -> Tensor:
        """See `TrainingStep.forward`."""
        return self._passes.add(*self._swarm.forward_kept(hidden, adapter=self._passes.content))

    def backward(self, grad: Tensor, output: Tensor | None = None) -> Tensor:
        """See `TrainingStep.backward`."""
        kept = self._passes.find(output)
        return self._passes.answered(kept, self._swarm.gradients(kept, grad))


class _Steps:
    """What `Trainer` and `SyncTrainer` share.

    adapter, optimizer: as given.  steps: of the optimizer, done by this object.
    """

    def __init__(self, adapter: Adapter, optimizer: Optimizer, revision: str) -> None:
        """Raises ValueError for an adapter of another revision, and an optimizer without its parameters."""
        if adapter.revision != revision:
            raise ValueError(f"the adapter is for revision {adapter.revision}, the swarm serves {revision}")
        groups = getattr(optimizer, "param_groups", None)
        own = {id(each) for each in adapter.parameters() if each.requires_grad}
        if groups is not None and own.isdisjoint(id(each) for group in groups for each in group["params"]):
            raise ValueError("the optimizer has no parameter of the adapter that is trained")
        self.adapter = adapter
        self.optimizer = optimizer
        self.steps = 0

    @contextmanager
    def _step(self) -> Iterator[Passes]:
        """One step; without a backward, and after an error, nothing is changed."""
        self.optimizer.zero_grad()
        passes = Passes(self.adapter)
        try:
            yield passes
            if passes.backwards:
                self.optimizer.step()
                self.steps += 1
        finally:
            passes.close()
            self.optimizer.zero_grad()


class Trainer(_Steps):
    """Trains an adapter over a swarm, under trio or asyncio.  Made by `client.train`."""

    def __init__(self, swarm: SwarmLike, adapter: Adapter, optimizer: Optimizer) -> None:
        super().__init__(adapter, optimizer, swarm.info.revision)
        self._swarm = swarm

    @asynccontextmanager
    async def step(self) -> AsyncIterator[TrainingStep]:
        """One step of the optimizer, at the end of the block; gradients add up within it.

        `.grad` is there until the end of the block, for instance to be clipped.  An error, or no backward:
        the optimizer makes no step.
        """
        with self._step() as passes:
            yield TrainingStep(self._swarm, passes)


class SyncTrainer(_Steps):
    """`Trainer`, blocking.  Made by `client.train_sync`."""

    def __init__(self, swarm: SyncSwarm, adapter: Adapter, optimizer: Optimizer) -> None:
        super().__init__(adapter, optimizer, swarm.info.revision)
        self._swarm = swarm

    @contextmanager
    def step(self) -> Iterator[SyncTrainingStep]:
        """See `Trainer.step`."""
        with self._step() as passes:
            yield SyncTrainingStep(self._swarm, passes)


def train(swarm: SwarmLike, adapter: Adapter, optimizer: Optimizer) -> Trainer:
    """Train an adapter over a swarm, under trio or asyncio: `async with train(...).step() as step`.

    optimizer: any of torch, over `adapter.parameters()`.  Embeddings, heads and losses are the caller's.
    Raises ValueError for an adapter of another revision, and an optimizer without its parameters.
    """
    return Trainer(swarm, adapter, optimizer)


def train_sync(swarm: SyncSwarm, adapter: Adapter, optimizer: Optimizer) -> SyncTrainer:
    """`train` for a blocking program: `with train_sync(...).step() as step`."""
    return SyncTrainer(swarm, adapter, optimizer)
