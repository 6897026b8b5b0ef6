"""Forward and backward through a run of blocks, without a session and without a cache.

The whole model's own arithmetic on whole sequences, positions from 0, for training.  The weights
are frozen, and backward runs the blocks once more with gradients on, in the way of Petals
(arXiv:2312.08361).  Both go in parts of a few blocks (`node.model.blocks.parts`).  Between two parts nothing
is computed, so the executor runs other batches there, and only one part's activations are held at a time.
`backward` runs each part but the last twice, once for its output alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from node.model.blocks.parts import forward_parts

T = TypeVar("T")


class StatelessSpan(Protocol):
    """The part of `node.model.blocks.span.Span` that a pass without a cache needs."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states inside."""

    @property
    def device(self) -> torch.device:
        """Of the weights."""

    def _view(self, start: int, stop: int) -> tuple[Callable[..., Any], Any]:
        """The library's model of blocks [start, stop), and the entry that gives it hidden states.

        Any: the library's output, and the entry's own type.
        """


def forward(span: StatelessSpan, hidden: Tensor, start: int, stop: int) -> Tensor:
    """Blocks [start, stop) on hidden states [batch, tokens, hidden]: the same shape, in the span's dtype.

    Positions count from 0 in every row, and every row is whole: nothing is padded.
    """
    return finish(forward_in_parts(span, hidden, start, stop))


def backward(span: StatelessSpan, hidden: Tensor, grad: Tensor, start: int, stop: int) -> Tensor:
    """The gradient with respect to `hidden` of a loss whose gradient is `grad` at the output.

    hidden, grad: [batch, tokens, hidden], the input of block `start` and the gradient of the loss
    with respect to the output of block `stop` - 1.  Answers the same shape, in the span's dtype.
    """
    return finish(backward_in_parts(span, hidden, grad, start, stop))


def forward_in_parts(
    span: StatelessSpan, hidden: Tensor, start: int, stop: int
) -> Generator[None, None, Tensor]:
    """`forward`, one of `forward_parts` at each `next`; its return value is the answer."""
    for begin, end in _parts(hidden, start, stop):
        hidden = _without_grad(span, hidden, begin, end)
        if end < stop:
            yield
    return hidden


def backward_in_parts(
    span: StatelessSpan, hidden: Tensor, grad: Tensor, start: int, stop: int
) -> Generator[None, None, Tensor]:
    """`backward`, one of `backward_parts` at each `next`; its return value is the answer."""
    inputs: list[tuple[Tensor, int, int]] = []
    for begin, end in _parts(hidden, start, stop):
        inputs.append((hidden, begin, end))
        if end < stop:
            hidden = _without_grad(span, hidden, begin, end)
            yield
    while inputs:
        grad = _with_grad(span, *inputs.pop(), grad)
        if inputs:
            yield
    return grad


def finish(work: Generator[None, None, T]) -> T:
    """Run all parts one after the other; the answer of the last one."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return cast(T, end.value)


def _parts(hidden: Tensor, start: int, stop: int) -> list[tuple[int, int]]:
    return forward_parts(hidden.shape[0] * hidden.shape[1], start, stop)


def _without_grad(span: StatelessSpan, hidden: Tensor, start: int, stop: int) -> Tensor:
    with torch.inference_mode():
        return _run(span, hidden.to(span.device, span.dtype), start, stop)


def _with_grad(span: StatelessSpan, hidden: Tensor, start: int, stop: int, grad: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        given = hidden.to(span.device, span.dtype).detach()
        if given.is_inference():
            given = given.clone()  # tensors made in inference mode can never take part in autograd
        given.requires_grad_()
        output = _run(span, given, start, stop)
        grad = grad.to(output.device, output.dtype)
        (found,) = torch.autograd.grad(output, given, grad.clone() if grad.is_inference() else grad)
    return found


def _run(span: StatelessSpan, hidden: Tensor, start: int, stop: int) -> Tensor:
    model, entry = span._view(start, stop)
    entry.given = hidden
    try:
        answer = model(
            inputs_embeds=hidden,
            position_ids=torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0),
            use_cache=False,
        )
    finally:
        entry.given = None
    return cast(Tensor, answer.last_hidden_state)
