"""A step that failed and comes again, where a convolution keeps a state that is not positional."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from node.model.blocks.kv_pages import SpanCache
from node.model.blocks.library_cache import ConvolutionState
from node.model.blocks.span import Span, load_span
from tensor_codec.errors import LocalProtocolError
from tests.model_fixtures import BLOCKS, saved

torch.set_num_threads(1)
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture(scope="module")
def span(tmp_path_factory) -> Span:
    return load_span(saved("lfm2", tmp_path_factory.mktemp("lfm2")), 0, BLOCKS)


def opened(span: Span, batch: int = 1) -> SpanCache:
    """A cache as on a device."""
    cache = span.new_arena(400).open(batch, 64)
    cache.keeps_last_states = True
    return cache


def failing(span: Span, block: int, times: int = 1):
    """Memory ends in this block, so many times."""
    left = [times]

    def fail(module, args, kwargs) -> None:
        if left[0]:
            left[0] -= 1
            raise OUT_OF_MEMORY

    blocks = span.architecture.blocks_of(span.model)
    return blocks[block].register_forward_pre_hook(fail, with_kwargs=True)


def decoded(span: Span, caches: list[SpanCache], rows: Tensor) -> Tensor:
    for cache in caches:
        cache.reserve(cache.length + 1)
    answer = span.decode(rows, caches, 0, BLOCKS)
    for cache in caches:
        cache.length += 1
    return answer


@pytest.mark.parametrize("block", [0, 1, 3, 5])
def test_a_step_that_comes_again_is_the_step(block, span):
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randn(1, length, span.hidden_size, generator=generator) for length in (7, 2)]
    rows = torch.randn(3, 2, span.hidden_size, generator=generator)
    right, tried = ([opened(span) for _ in range(2)] for _ in range(2))
    for caches in (right, tried):
        for cache, prompt in zip(caches, prompts, strict=True):
            span.forward(prompt, cache, 0)
    for row in rows:
        expected = decoded(span, right, row)
        hook = failing(span, block, times=2)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                decoded(span, tried, row)
        hook.remove()
        # and in halves, as an engine does
        got = torch.cat([decoded(span, tried[i : i + 1], row[i : i + 1]) for i in range(2)])
        assert torch.equal(got, expected)


def test_a_prompt_that_comes_again_in_smaller_chunks_is_the_prompt(span):
    prompt = torch.randn(2, 12, span.hidden_size, generator=torch.Generator().manual_seed(2))
    right, tried = opened(span, 2), opened(span, 2)
    expected = torch.cat([span.forward(part, right, at) for at, part in
                          zip((0, 4, 8), prompt.split(4, 1), strict=True)], 1)  # fmt: skip
    hook = failing(span, 4)
    with pytest.raises(torch.OutOfMemoryError):
        span.forward(prompt, tried, 0)
    hook.remove()
    first = span.forward(prompt[:, :4], tried, 0)
    hook = failing(span, 4)
    with pytest.raises(torch.OutOfMemoryError):
        span.forward(prompt[:, 4:], tried, 4)
    hook.remove()
    rest = [span.forward(prompt[:, 4:8], tried, 4), span.forward(prompt[:, 8:], tried, 8)]
    assert torch.equal(torch.cat([first, *rest], 1), expected)


def test_rows_are_reordered_as_they_were_before_the_step_that_failed(span):
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randn(2, 5, span.hidden_size, generator=generator)
    row = torch.randn(2, span.hidden_size, generator=generator)
    right, tried = opened(span, 2), opened(span, 2)
    for cache in (right, tried):
        span.forward(prompt, cache, 0)
    hook = failing(span, 4)
    with pytest.raises(torch.OutOfMemoryError):
        decoded(span, [tried], row)
    hook.remove()
    for cache in (right, tried):
        cache.select([1, 1])
    assert torch.equal(decoded(span, [tried], row), decoded(span, [right], row))


def test_a_session_may_begin_anew_after_a_step_that_failed(span):
    prompt = torch.randn(1, 5, span.hidden_size, generator=torch.Generator().manual_seed(4))
    cache = opened(span)
    expected = span.forward(prompt, cache, 0)
    hook = failing(span, 2)
    with pytest.raises(torch.OutOfMemoryError):
        decoded(span, [cache], prompt[:, 0])
    hook.remove()
    cache.cut(0)
    assert torch.equal(span.forward(prompt, cache, 0), expected)


def test_a_state_takes_the_next_step_or_the_last_one_again():
    state = ConvolutionState()
    state.begin(0, 5)
    state.begin(0, 3)
    state.begin(3, 1)
    with pytest.raises(LocalProtocolError, match="a step at 7, a convolution's state is at 4"):
        state.begin(7, 1)
    with pytest.raises(LocalProtocolError, match="a step at 0"):
        state.begin(0, 1)


def test_a_span_of_a_cpu_says_that_its_steps_cannot_come_again(span):
    assert not span.repeats
    cache = span.new_cache(1, 16)
    assert not cache.keeps_last_states
    state = cache.states
    span.forward(torch.zeros(1, 2, span.hidden_size), cache, 0)
    own = next(iter(state.values())).conv_states[0]
    decoded(span, [cache], torch.zeros(1, span.hidden_size))
    assert next(iter(state.values())).conv_states[0] is own, "nothing is copied there"
