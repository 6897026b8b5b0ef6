"""A step of training: gradients of all its passes, one step of the optimizer, or none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trio
from torch import Tensor

from client.adapters.adapter import Adapter
from client.adapters.trainer import train, train_sync
from client.forward_backward import Gradients
from node.model.peft.tensors import AdapterTensors
from tensor_codec.adapters import AdapterContent, LoraSite
from tensor_codec.errors import PeerGone

HIDDEN, RANK, BLOCKS = 4, 2, 3
SITE = LoraSite("q_proj", RANK, 0.5)


def adapter() -> Adapter:
    torch.manual_seed(0)
    blocks = tuple({"q_proj": (torch.randn(RANK, HIDDEN), torch.randn(HIDDEN, RANK))} for _ in range(BLOCKS))
    paths = tuple((f"model.layers.{block}.self_attn.q_proj",) for block in range(BLOCKS))
    return Adapter(AdapterTensors({}, "r1", "fp32", ((SITE,),) * BLOCKS, paths, blocks))


def values_of(content: AdapterContent) -> list[Tensor]:
    flat = torch.frombuffer(bytearray(b"".join(content.blobs)), dtype=torch.float32).clone()
    shapes = [(RANK, HIDDEN), (HIDDEN, RANK)] * BLOCKS
    parts = torch.split(flat, [a * b for a, b in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def through(hidden: Tensor, values: list[Tensor]) -> Tensor:
    for a, b in zip(values[::2], values[1::2], strict=True):
        hidden = torch.tanh(hidden + SITE.scale * (hidden @ a.T @ b.T))
    return hidden


@dataclass
class Kept:
    """What a forward of the fake keeps."""

    hidden: Tensor
    values: list[Tensor]
    released: bool = False

    def release(self) -> None:
        self.released = True


@dataclass
class FakeSwarm:
    """A swarm of plain torch.  fails: raises before a backward."""

    kept: list[Kept] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    fails: Callable[[], None] = lambda: None
    info: Any = field(default_factory=lambda: SimpleNamespace(revision="r1"))

    async def forward_kept(self, hidden: Tensor, *, adapter: AdapterContent) -> tuple[Tensor, Any]:
        await trio.lowlevel.checkpoint()
        kept = Kept(hidden.detach(), values_of(adapter))
        self.kept.append(kept)
        self.ids.append(adapter.id)
        return through(kept.hidden, kept.values), kept

    async def gradients(self, kept: Kept, grad: Tensor) -> Gradients:
        await trio.lowlevel.checkpoint()
        self.fails()
        assert not kept.released
        leaves = [one.clone().requires_grad_() for one in (kept.hidden, *kept.values)]
        hidden, *values = torch.autograd.grad(through(leaves[0], leaves[1:]), leaves, grad)
        pairs = zip(values[::2], values[1::2], strict=True)
        flat = {block: torch.cat([a.flatten(), b.flatten()]) for block, (a, b) in enumerate(pairs)}
        return Gradients(hidden, None, flat)


def for_swarm(fake: FakeSwarm) -> Any:
    """The fake has the part of a handle that a trainer uses."""
    return fake


def rows(seed: int) -> Tensor:
    return torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(seed))


def plain_steps(steps: int, batches: int) -> list[Tensor]:
    """The values after some steps in one process."""
    values = [each.detach().clone().requires_grad_() for each in adapter().parameters()]
    optimizer = torch.optim.AdamW(values, lr=0.1)
    for step in range(steps):
        for batch in range(batches):
            through(rows(step * batches + batch), values).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [each.detach() for each in values]


async def test_steps_over_a_swarm_are_those_of_one_process_in_every_bit():
    swarm, own = FakeSwarm(), adapter()
    trainer = train(for_swarm(swarm), own, torch.optim.AdamW(own.parameters(), lr=0.1))
    for number in range(4):
        async with trainer.step() as step:
            output = (await step.forward(rows(number))).requires_grad_()
            loss = output.square().sum()
            await step.backward(torch.autograd.grad(loss, output)[0])
            assert all(each.grad is not None for each in own.parameters())
    assert all(torch.equal(*pair) for pair in zip(own.parameters(), plain_steps(4, 1), strict=True))
    assert len(set(swarm.ids)) == 4  # every step has an adapter of its own
    assert trainer.steps == 4
    assert all(each.grad is None for each in own.parameters())


async def test_gradients_of_several_passes_add_up_in_one_step():
    swarm, own = FakeSwarm(), adapter()
    trainer = train(for_swarm(swarm), own, torch.optim.AdamW(own.parameters(), lr=0.1))
    for number in range(2):
        async with trainer.step() as step:
            outputs = [await step.forward(rows(2 * number + batch)) for batch in range(2)]
            with pytest.raises(ValueError, match="2 forwards without a backward"):
                await step.backward(2 * outputs[0])
            for output in outputs:
                await step.backward(2 * output, output)
            with pytest.raises(ValueError, match="no forward of this step"):
                await step.backward(2 * outputs[0], outputs[0])
            with pytest.raises(ValueError, match="0 forwards without a backward"):
                await step.backward(2 * outputs[0])
    assert all(torch.equal(*pair) for pair in zip(own.parameters(), plain_steps(2, 2), strict=True))
    assert swarm.ids[0] == swarm.ids[1] != swarm.ids[2]
    assert all(each.released for each in swarm.kept)


async def test_the_gradient_of_the_input_comes_back():
    own = adapter()
    given = rows(0).requires_grad_()
    output = through(given, list(own.parameters()))
    expected = torch.autograd.grad(output.sum(), given)[0]
    async with train(for_swarm(FakeSwarm()), own, torch.optim.SGD(own.parameters(), lr=0.1)).step() as step:
        found = await step.backward(torch.ones_like(await step.forward(rows(0))))
    assert torch.equal(found, expected)


async def test_a_step_that_fails_changes_nothing():
    def gone() -> None:
        raise PeerGone("gone")

    swarm, own = FakeSwarm(), adapter()
    optimizer = torch.optim.AdamW(own.parameters(), lr=0.1)
    trainer = train(for_swarm(swarm), own, optimizer)
    before = own.id

    async def failing_step() -> None:
        async with trainer.step() as step:
            outputs = [await step.forward(rows(batch)) for batch in range(2)]
            await step.backward(outputs[0], outputs[0])
            swarm.fails = gone
            await step.backward(outputs[1], outputs[1])

    with pytest.raises(PeerGone):
        await failing_step()
    assert own.id == before
    assert not optimizer.state
    assert trainer.steps == 0
    assert all(each.grad is None for each in own.parameters())
    assert all(each.released for each in swarm.kept)


async def test_a_backward_that_fails_may_be_asked_again_in_its_step():
    answers = iter([PeerGone("gone"), None])

    def once() -> None:
        if (error := next(answers)) is not None:
            raise error

    own = adapter()
    trainer = train(for_swarm(FakeSwarm(fails=once)), own, torch.optim.AdamW(own.parameters(), lr=0.1))
    async with trainer.step() as step:
        output = await step.forward(rows(0))
        with pytest.raises(PeerGone):
            await step.backward(2 * output)
        assert all(each.grad is None for each in own.parameters())
        await step.backward(2 * output)
    assert all(torch.equal(*pair) for pair in zip(own.parameters(), plain_steps(1, 1), strict=True))


async def test_a_step_without_a_backward_is_no_step():
    own = adapter()
    optimizer = torch.optim.AdamW(own.parameters(), lr=0.1, weight_decay=0.5)
    trainer = train(for_swarm(FakeSwarm()), own, optimizer)
    before = own.id
    async with trainer.step() as step:
        await step.forward(rows(0))
    assert own.id == before
    assert trainer.steps == 0


async def test_values_that_were_changed_past_torch_s_count_reach_the_servers():
    swarm, own = FakeSwarm(), adapter()
    trainer = train(for_swarm(swarm), own, torch.optim.SGD(own.parameters(), lr=0.1))
    for _ in range(2):
        async with trainer.step() as step:
            await step.forward(rows(0))
        own.parameters()[0].data.add_(1.0)
    assert len(set(swarm.ids)) == 2


async def test_frozen_parameters_get_no_gradient():
    own = adapter()
    frozen = own.parameters()[::2]
    for each in frozen:
        each.requires_grad_(False)
    async with train(
        for_swarm(FakeSwarm()), own, torch.optim.SGD(own.parameters()[1::2], lr=0.1)
    ).step() as step:
        await step.backward(await step.forward(rows(0)))
        assert all(each.grad is None for each in frozen)
        assert all(each.grad is not None for each in own.parameters()[1::2])


def test_a_blocking_program_has_the_same_steps():
    class Blocking(FakeSwarm):
        def forward_kept(self, hidden: Tensor, *, adapter: AdapterContent) -> Any:
            return trio.run(lambda: super(Blocking, self).forward_kept(hidden, adapter=adapter))

        def gradients(self, kept: Any, grad: Tensor) -> Any:
            return trio.run(lambda: super(Blocking, self).gradients(kept, grad))

    own = adapter()
    trainer = train_sync(for_swarm(Blocking()), own, torch.optim.AdamW(own.parameters(), lr=0.1))
    for number in range(2):
        with trainer.step() as step:
            step.backward(2 * step.forward(rows(number)))
    assert all(torch.equal(*pair) for pair in zip(own.parameters(), plain_steps(2, 1), strict=True))


def test_what_cannot_be_trained_is_refused_at_once():
    own, other = adapter(), adapter()
    swarm = FakeSwarm(info=SimpleNamespace(revision="r2"))
    with pytest.raises(ValueError, match="the adapter is for revision r1, the swarm serves r2"):
        train(for_swarm(swarm), own, torch.optim.SGD(own.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="the optimizer has no parameter of the adapter"):
        train(for_swarm(FakeSwarm()), own, torch.optim.SGD(other.parameters(), lr=0.1))
