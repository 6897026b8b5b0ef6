"""Forward and backward through a run of blocks, without a session and without a cache.

The whole model's own arithmetic on whole sequences, positions from 0, for training.  The weights
are frozen, and backward runs the blocks once more with gradients on, in the way of Petals
(arXiv:2312.08361).  Both go in parts of a few blocks (`node.model.blocks.parts`).  Between two parts nothing
is computed, so the executor runs other batches there.  `backward` holds the activations of as many parts as
there is memory for; it runs the other parts forward twice, once for their output alone.

A forward may keep its activations on a `Tape`: one backward goes back through them and computes nothing
again.  The operations are those of a backward that runs the blocks forward itself, so all bits are equal.

Deep prompts (Petals' deep_ptune) are trained tensors that every block adds to its own input.  An adapter
comes as an `AdaptedSpan`, which also takes the gradients of the adapter's matrices, part by part.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from node.model.adapters.adapted import AdaptedSpan
from node.model.blocks.parts import Run, backward_groups, forward_parts
from node.model.weights.quantize import training_products

T = TypeVar("T")

MEASURED_TOKENS = 16, 48  # of the two rows that activations are measured with


class Gradients(NamedTuple):
    """The answer of a backward.  prompts: of the deep prompts, summed over rows; None without them."""

    hidden: Tensor
    prompts: Tensor | None


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes that a backward holds of one position in one block: `base`, and more for each token of its row.

    per_token: of attention that keeps its scores.
    """

    base: float
    per_token: float

    @classmethod
    def most(cls, kinds: Iterable[Activations]) -> Activations:
        """At least those of each of these kinds of blocks."""
        of = list(kinds)
        return cls(max(each.base for each in of), max(each.per_token for each in of))

    def of_a_position(self, tokens: int) -> float:
        """In a row of `tokens` tokens."""
        return self.base + self.per_token * tokens


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


def forward(
    span: StatelessSpan, hidden: Tensor, start: int, stop: int, prompts: Tensor | None = None
) -> Tensor:
    """Blocks [start, stop) on hidden states [batch, tokens, hidden]: the same shape, in the span's dtype.

    Positions count from 0 in every row, and every row is whole: nothing is padded.
    prompts: [stop - start, n, hidden], n at most `tokens`: each block adds its own to the first n positions
    of its input, in every row.
    """
    return finish(forward_in_parts(span, hidden, start, stop, prompts))


def backward(span: StatelessSpan, hidden: Tensor, grad: Tensor, start: int, stop: int) -> Tensor:
    """The gradient with respect to `hidden` of a loss whose gradient is `grad` at the output.

    hidden, grad: [batch, tokens, hidden], the input of block `start` and the gradient of the loss
    with respect to the output of block `stop` - 1.  Answers the same shape, in the span's dtype.
    """
    return finish(backward_in_parts(span, hidden, grad, start, stop)).hidden


def forward_in_parts(
    span: StatelessSpan,
    hidden: Tensor,
    start: int,
    stop: int,
    prompts: Tensor | None = None,
    most: int | None = None,
) -> Generator[None, None, Tensor]:
    """`forward`, one of `forward_parts` at each `next`; its return value is the answer.

    most: see `forward_parts`.
    """
    for begin, end in forward_parts(_positions(span, hidden), start, stop, most):
        hidden = _without_grad(span, hidden, begin, end, _of(prompts, begin - start, end - start))
        if end < stop:
            yield
    return hidden


def backward_in_parts(
    span: StatelessSpan,
    hidden: Tensor,
    grad: Tensor,
    start: int,
    stop: int,
    prompts: Tensor | None = None,
    held: int = 0,
    most: int | None = None,
) -> Generator[None, None, Gradients]:
    """`backward`, one of `backward_parts` at each `next`; its return value is the answer.

    prompts: see `forward`.  held, most: see `backward_groups`.
    """
    groups = backward_groups(_positions(span, hidden), start, stop, held, most)
    inputs: list[Tensor] = []
    for group in groups[:-1]:
        inputs.append(hidden)
        for begin, end in group:
            hidden = _without_grad(span, hidden, begin, end, _of(prompts, begin - start, end - start))
            yield
    found: list[Tensor] = []
    while groups:
        graphs: list[_Graph] = []
        for begin, end in groups.pop():
            graphs.append(_with_grad(span, hidden, begin, end, _of(prompts, begin - start, end - start)))
            hidden = graphs[-1].output
            yield
        while graphs:
            grad, own = graphs.pop().back(grad)
            found[:0] = [] if own is None else [own]
            if graphs or groups:
                yield
        if groups:
            hidden = inputs.pop()
    return Gradients(grad, torch.cat(found) if found else None)


@dataclass(slots=True)
class Tape:
    """The graphs of a forward, part by part, for one backward.

    runs: the blocks [start, stop) of each part, in order.  span: that the forward went through.
    """

    runs: list[tuple[int, int]] = field(default_factory=list)
    span: StatelessSpan | None = None
    _graphs: list[_Graph] = field(default_factory=list)

    def forward_in_parts(
        self,
        span: StatelessSpan,
        hidden: Tensor,
        start: int,
        stop: int,
        prompts: Tensor | None = None,
        most: int | None = None,
    ) -> Generator[None, None, Tensor]:
        """`forward_in_parts` that keeps its graphs here: the same values."""
        for begin, end in forward_parts(_positions(span, hidden), start, stop, most):
            graph = _with_grad(span, hidden, begin, end, _of(prompts, begin - start, end - start))
            self.runs.append((begin, end))
            self._graphs.append(graph)
            hidden = graph.output
            if end < stop:
                yield
        return hidden.detach()

    def backward_in_parts(self, grad: Tensor) -> Generator[None, None, Gradients]:
        """`backward` without its forward, one of `runs` at each `next`, the last one first.

        grad: see `backward`.  Each graph is given up when it was used.
        """
        found: list[Tensor] = []
        while self._graphs:
            grad, own = self._graphs.pop().back(grad)
            found[:0] = [] if own is None else [own]
            if self._graphs:
                yield
        return Gradients(grad, torch.cat(found) if found else None)


def kinds_of_blocks(span: Any) -> list[int]:  # Any: a Span; a backward alone needs less of it
    """The first block of each kind: blocks of one kind have tensors of the same names, shapes and dtypes.

    The layer types of the config make kinds, too.
    """
    types = getattr(span.model.config, "layer_types", None) or ()
    kinds: dict[object, int] = {}
    for block in range(span.start, span.stop):
        _, entry = span._view(block, block + 1)
        modules = tuple((name, type(module)) for name, module in entry.named_modules())
        tensors = (*entry.named_parameters(), *entry.named_buffers())
        shapes = tuple((name, each.shape, each.dtype) for name, each in tensors)
        kinds.setdefault((modules, shapes, tuple(types[block : block + 1])), block)
    return list(kinds.values())


def measure_activations(span: Any, block: int) -> Activations:  # Any: a Span
    """Run a block forward on a short row and on a longer one, and count what autograd keeps.

    Weights are left out.  Runs in the torch thread, as long as a prefill of MEASURED_TOKENS tokens through
    one block.
    """
    weights = {
        each.untyped_storage().data_ptr() for each in (*span.model.parameters(), *span.model.buffers())
    }

    def kept(tokens: int) -> float:
        found: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        hidden = torch.zeros(1, tokens, span.hidden_size)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            pack(_with_grad(span, hidden, block, block + 1, None).output)
        own = [each for address, each in found.items() if address not in weights]
        return sum(each.untyped_storage().nbytes() for each in own) / tokens

    short, long = map(kept, MEASURED_TOKENS)
    more = max(0.0, (long - short) / (MEASURED_TOKENS[1] - MEASURED_TOKENS[0]))
    return Activations(max(short, long) - more * MEASURED_TOKENS[0], more)


def finish(work: Generator[None, None, T]) -> T:
    """Run all parts one after the other; the answer of the last one."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return cast(T, end.value)


def with_prompt(hidden: Tensor, prompt: Tensor) -> Tensor:
    """The input of a block with its deep prompt: [batch, tokens, hidden], [n, hidden] -> the first shape."""
    return torch.cat([hidden[:, : len(prompt)] + prompt, hidden[:, len(prompt) :]], 1)


@dataclass(slots=True)
class _Graph:
    """A run of blocks that went forward with its activations: autograd can go back through it, once."""

    given: list[Tensor]  # the run's hidden states, and its prompts where there are any
    output: Tensor
    span: StatelessSpan
    run: Run

    def back(self, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradient with respect to the hidden states, and to the prompts."""
        with torch.inference_mode(False), torch.enable_grad():
            grad = grad.to(self.output.device, self.output.dtype)
            grad = grad.clone() if grad.is_inference() else grad
            low = _matrices(self.span, *self.run)
            # A linear that the library did not call has no gradient.
            found = torch.autograd.grad(self.output, [*self.given, *low], grad, allow_unused=bool(low))
        count = len(self.given)
        if isinstance(self.span, AdaptedSpan):
            self.span.learn(*self.run, list(found[count:]))
        return found[0], found[1] if count > 1 else None


def _matrices(span: StatelessSpan, start: int, stop: int) -> list[Tensor]:
    """The adapter's tensors whose gradients are wanted: A and B of each linear, or a prefix."""
    if not isinstance(span, AdaptedSpan):
        return []
    return [each for _, _, pair in span.leaves(start, stop) for each in pair]


def _positions(span: StatelessSpan, hidden: Tensor) -> int:
    """Of hidden states [batch, tokens, hidden], with the places of a prefix in every row."""
    first = span.adapter.virtual_tokens if isinstance(span, AdaptedSpan) else 0
    return hidden.shape[0] * (first + hidden.shape[1])


def _of(prompts: Tensor | None, first: int, last: int) -> Tensor | None:
    return None if prompts is None else prompts[first:last]


def _without_grad(
    span: StatelessSpan, hidden: Tensor, start: int, stop: int, prompts: Tensor | None
) -> Tensor:
    with torch.inference_mode():
        moved = None if prompts is None else prompts.to(span.device, span.dtype)
        return _run(span, hidden.to(span.device, span.dtype), start, stop, moved)


def _with_grad(span: StatelessSpan, hidden: Tensor, start: int, stop: int, prompts: Tensor | None) -> _Graph:
    with torch.inference_mode(False), torch.enable_grad():
        given = [_leaf(span, each) for each in (hidden, prompts) if each is not None]
        output = _run(span, given[0], start, stop, given[1] if len(given) > 1 else None)
        return _Graph(given, output, span, (start, stop))


def _leaf(span: StatelessSpan, tensor: Tensor) -> Tensor:
    """The tensor on the span's device and in its dtype, as autograd's input."""
    leaf = tensor.to(span.device, span.dtype).detach()
    if leaf.is_inference():
        leaf = leaf.clone()  # tensors made in inference mode can never take part in autograd
    return leaf.requires_grad_()


def _run(span: StatelessSpan, hidden: Tensor, start: int, stop: int, prompts: Tensor | None) -> Tensor:
    if prompts is None:
        return through(span, hidden, start, stop)
    for block, prompt in zip(range(start, stop), prompts, strict=True):
        own = prompt.to(hidden.device)  # the device of the block before, where a span has several
        hidden = through(span, with_prompt(hidden, own), block, block + 1)
    return hidden


def through(span: StatelessSpan, hidden: Tensor, start: int, stop: int) -> Tensor:
    """Blocks [start, stop) on hidden states on the span's device and in its dtype, for autograd or not."""
    model, entry = span._view(start, stop)
    entry.given = hidden
    try:
        with training_products():
            answer = model(
                inputs_embeds=hidden,
                position_ids=torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0),
                use_cache=False,
            )
    finally:
        entry.given = None
    return cast(Tensor, answer.last_hidden_state)
