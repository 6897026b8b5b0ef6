"""Forward and backward through a run of blocks, without a session and without a cache.

The whole model's own arithmetic on whole sequences, positions from 0, as a trainer needs it: the
weights are frozen, and backward runs the blocks once more with gradients on, in the way of Petals
(arXiv:2312.08361).  Both go in parts of a few blocks.  Between two parts nothing is under way, so
that whoever runs them may do something else first, and only one part's activations are held at a
time: each part but the last is run twice by `backward`, once for its output alone.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TypeVar, cast

import torch
from torch import Tensor

from node.model.blocks.span import Span

T = TypeVar("T")

# Positions of all rows times blocks of one part: a prefill step of 512 positions through eight blocks.
# Backward holds about 16 times the hidden states of every block for it (measured on a llama), so
# 0.5 GiB in bfloat16 at hidden size 4096.
PART_POSITIONS = 4096


def forward(span: Span, hidden: Tensor, start: int, stop: int) -> Tensor:
    """Blocks [start, stop) on hidden states [batch, tokens, hidden]: the same shape, in the span's dtype.

    Positions count from 0 in every row, and every row is whole: nothing is padded.
    """
    return finish(forward_in_parts(span, hidden, start, stop))


def backward(span: Span, hidden: Tensor, grad: Tensor, start: int, stop: int) -> Tensor:
    """The gradient with respect to `hidden` of a loss whose gradient is `grad` at the output.

    hidden, grad: [batch, tokens, hidden], the input of block `start` and the gradient of the loss
    with respect to the output of block `stop` - 1.  Answers the same shape, in the span's dtype.
    """
    return finish(backward_in_parts(span, hidden, grad, start, stop))


def forward_in_parts(span: Span, hidden: Tensor, start: int, stop: int) -> Generator[None, None, Tensor]:
    """`forward`, a part at each `next`; its return value is the answer."""
    for begin, end in parts(hidden, start, stop):
        hidden = _without_grad(span, hidden, begin, end)
        if end < stop:
            yield
    return hidden


def backward_in_parts(
    span: Span, hidden: Tensor, grad: Tensor, start: int, stop: int
) -> Generator[None, None, Tensor]:
    """`backward`, a part at each `next`; its return value is the answer."""
    inputs: list[tuple[Tensor, int, int]] = []
    for begin, end in parts(hidden, start, stop):
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
    """Run all parts one after the other; what the last one answers."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return cast(T, end.value)


def parts(hidden: Tensor, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The runs of blocks that [start, stop) is done in, for hidden states [batch, tokens, hidden]."""
    blocks = max(1, PART_POSITIONS // (hidden.shape[0] * hidden.shape[1]))
    for begin in range(start, stop, blocks):
        yield begin, min(begin + blocks, stop)


def _without_grad(span: Span, hidden: Tensor, start: int, stop: int) -> Tensor:
    with torch.inference_mode():
        return _run(span, hidden.to(span.device, span.dtype), start, stop)


def _with_grad(span: Span, hidden: Tensor, start: int, stop: int, grad: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        given = hidden.to(span.device, span.dtype).detach()
        if given.is_inference():
            given = given.clone()  # tensors made in inference mode can never take part in autograd
        given.requires_grad_()
        output = _run(span, given, start, stop)
        grad = grad.to(output.device, output.dtype)
        (found,) = torch.autograd.grad(output, given, grad.clone() if grad.is_inference() else grad)
    return found


def _run(span: Span, hidden: Tensor, start: int, stop: int) -> Tensor:
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
