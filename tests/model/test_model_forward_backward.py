"""Gradients and outputs of spans without sessions, against autograd through the library's whole model."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from node.model.blocks import parts
from node.model.blocks.forward_backward import (
    Activations,
    Tape,
    backward,
    backward_in_parts,
    finish,
    forward,
    forward_in_parts,
    kinds_of_blocks,
    measure_activations,
)
from node.model.blocks.span import Span, load_span
from node.model.checkpoint.folder import HashMemo, ModelFolder, open_folder
from node.model.weights import quantize as quantize_code
from tests.model_fixtures import _LLAMA, BLOCKS, TINY, VOCAB, save_tiny

torch.set_num_threads(1)

# Relative to the largest value.  The operations are the same, but products of fewer rows may be summed
# in another order; 3.5e-7 was the worst seen.
TOLERANCE = 5e-6
SPANS = ((0, 1), (1, 4), (4, BLOCKS))
ROWS, TOKENS = 3, 24


@dataclass(frozen=True)
class Case:
    whole: Any  # the library's model
    spans: tuple[Span, ...]
    inputs: Tensor  # what the first block of the whole model is given
    output: Tensor  # and what the last one makes of it
    direction: Tensor  # gradient of the loss with respect to that
    gradient: Tensor  # and with respect to the inputs


def blocks_of(whole: Any) -> list[torch.nn.Module]:
    """The blocks of a library's model: the one list that has as many."""
    lists = [m for m in whole.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == BLOCKS]
    return list(lists[0])


def through_the_whole(whole: Any, ids: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Input of the first block, output of the last one, and the gradient with respect to the input.

    The whole model runs from token ids; hooks make what enters the first block a leaf of autograd
    and take what leaves the last one.
    """
    blocks, seen = blocks_of(whole), {}

    def enter(block: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = args[0] if args else kwargs["hidden_states"]
        seen["input"] = given.detach().clone().requires_grad_()
        return (
            ((seen["input"], *args[1:]), kwargs)
            if args
            else (args, kwargs | {"hidden_states": seen["input"]})
        )

    def leave(block: Any, args: tuple, output: Any) -> None:
        seen["output"] = output[0] if isinstance(output, tuple) else output

    hooks = [
        blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
        blocks[-1].register_forward_hook(leave),
    ]
    with torch.enable_grad():
        whole(ids, use_cache=False)
        (gradient,) = torch.autograd.grad(seen["output"], seen["input"], direction)
    for hook in hooks:
        hook.remove()
    return seen["input"].detach(), seen["output"].detach(), gradient


def case_of(whole: Any, folder: ModelFolder) -> Case:
    ids = torch.randint(0, VOCAB, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    direction = torch.randn(ROWS, TOKENS, 32, generator=torch.Generator().manual_seed(1))
    inputs, output, gradient = through_the_whole(whole, ids, direction)
    spans = tuple(load_span(folder, start, stop) for start, stop in SPANS)
    return Case(whole, spans, inputs, output, direction, gradient)


@pytest.fixture(scope="module", params=sorted(TINY))
def case(request, tmp_path_factory) -> Case:
    path = tmp_path_factory.mktemp(request.param)
    whole = save_tiny(request.param, path / "model")
    return case_of(whole, open_folder(path / "model", memo=HashMemo(path / "hashes.json")))


def decode_some(case: Case) -> None:
    """Let every span decode in inference mode first: whatever the library keeps is made there."""
    hidden = case.inputs[:1, :2]
    for span in case.spans:
        with torch.inference_mode():
            span.forward(hidden, span.new_cache(1, TOKENS), 0, span.start, span.stop)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


def chained(case: Case) -> tuple[Tensor, Tensor]:
    """Output and gradient of the three spans one after the other."""
    hidden, inputs, grad = case.inputs, [], case.direction
    for span in case.spans:
        inputs.append(hidden)
        hidden = forward(span, hidden, span.start, span.stop)
    for span, given in reversed(list(zip(case.spans, inputs, strict=True))):
        grad = backward(span, given, grad, span.start, span.stop)
    return hidden, grad


def test_three_spans_give_the_whole_models_output_and_gradient_after_decoding(case):
    decode_some(case)
    output, gradient = chained(case)
    assert error(output, case.output) <= TOLERANCE
    assert error(gradient, case.gradient) <= TOLERANCE
    assert case.gradient.abs().max() > 0


def test_parts_of_one_block_give_the_same(case, monkeypatch):
    monkeypatch.setattr(parts, "PART_POSITIONS", 1)
    output, gradient = chained(case)
    assert error(output, case.output) <= TOLERANCE
    assert error(gradient, case.gradient) <= TOLERANCE


def test_any_run_inside_a_span_is_that_part_of_the_model(case):
    middle = case.spans[1]
    hidden = forward(case.spans[0], case.inputs, 0, 1)
    whole_span = forward(middle, hidden, 1, 4)
    first = forward(middle, hidden, 1, 2)
    assert error(forward(middle, first, 2, 4), whole_span) <= TOLERANCE
    grad = backward(middle, first, case.direction, 2, 4)
    expected = backward(middle, hidden, case.direction, 1, 4)
    assert error(backward(middle, hidden, grad, 1, 2), expected) <= TOLERANCE


def assert_a_tape_changes_no_bit(span: Span, hidden: Tensor, grad: Tensor, most: int | None = None) -> None:
    """Of the output, of the gradient and of that of deep prompts."""
    run, trained = (span.start, span.stop), torch.randn(span.stop - span.start, 2, 32, generator=seeded(5))
    for prompts in (None, trained):
        tape = Tape()
        output = finish(tape.forward_in_parts(span, hidden, *run, prompts, most))
        assert not output.requires_grad
        assert torch.equal(output, forward(span, hidden, *run, prompts))
        found = finish(tape.backward_in_parts(grad))
        expected = finish(backward_in_parts(span, hidden, grad, *run, prompts, most=most))
        assert torch.equal(found.hidden, expected.hidden)
        assert (found.prompts is None) == (prompts is None)
        assert prompts is None or torch.equal(found.prompts, expected.prompts)


def test_a_tape_gives_the_bits_of_a_backward_that_computes_again(case):
    for span in case.spans:
        assert_a_tape_changes_no_bit(span, case.inputs, case.direction)
        assert_a_tape_changes_no_bit(span, case.inputs, case.direction, most=2 * ROWS * TOKENS)


def test_rows_do_not_see_each_other(case):
    span = case.spans[1]
    for row in range(ROWS):
        alone = case.inputs[row : row + 1], case.direction[row : row + 1]
        together = backward(span, case.inputs, case.direction, 1, 4)[row : row + 1]
        assert error(backward(span, *alone, 1, 4), together) <= TOLERANCE


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Case:
    path = tmp_path_factory.mktemp("llama")
    whole = save_tiny("llama", path / "model")
    return case_of(whole, open_folder(path / "model", memo=HashMemo(path / "hashes.json")))


@pytest.mark.parametrize(
    "rope", [{"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}]
)
def test_rotary_tables_that_the_library_recomputes_while_decoding_do_not_stop_backward(
    rope, tmp_path, monkeypatch
):
    # The dynamic table is made anew for every length beyond the trained one, in whatever mode that runs.
    settings = _LLAMA | {"max_position_embeddings": 16, "rope_parameters": rope | {"rope_theta": 10000.0}}
    monkeypatch.setitem(TINY, "stretched", ("LlamaForCausalLM", settings))
    whole = save_tiny("stretched", tmp_path / "model")
    case = case_of(whole, open_folder(tmp_path / "model", memo=HashMemo(tmp_path / "hashes.json")))
    with torch.inference_mode():
        hidden = case.inputs
        for span in case.spans:
            hidden = span.forward(hidden, span.new_cache(ROWS, 64), 0, span.start, span.stop)
    assert error(chained(case)[1], case.gradient) <= TOLERANCE


def test_tensors_from_inference_mode_may_come_in_and_may_be_asked_for_in_it(llama):
    with torch.inference_mode():
        inputs, direction = llama.inputs.clone(), llama.direction.clone()
        inside = backward(llama.spans[0], inputs, direction, 0, 1)
    expected = backward(llama.spans[0], llama.inputs, llama.direction, 0, 1)
    assert torch.equal(inside, expected)
    assert torch.equal(backward(llama.spans[0], inputs, direction, 0, 1), expected)


def test_no_weight_gets_a_gradient_and_what_comes_in_is_left_alone(llama):
    inputs = llama.inputs.clone()
    output, gradient = (
        forward(llama.spans[0], inputs, 0, 1),
        backward(llama.spans[0], inputs, output := llama.direction, 0, 1),
    )
    assert not inputs.requires_grad
    assert torch.equal(inputs, llama.inputs)
    assert not output.requires_grad
    assert not gradient.requires_grad
    assert all(weight.grad is None for weight in llama.spans[0].model.parameters())


@pytest.mark.parametrize(
    ("dtype", "quantize", "most"),
    [
        (torch.float16, "none", 0.01),  # eleven bits of mantissa through two blocks
        (torch.bfloat16, "none", 0.05),  # eight
        (torch.float32, "int8", 0.1),  # eight bits of a row's largest weight
    ],
)
def test_fewer_bits_give_about_the_same_gradient_in_the_spans_own_dtype(dtype, quantize, most, tmp_path):
    save_tiny("llama", tmp_path / "model")
    folder = open_folder(tmp_path / "model", memo=HashMemo(tmp_path / "hashes.json"))
    span = load_span(folder, 0, 2, dtype=dtype, quantize=quantize)
    hidden, grad = torch.randn(2, 1, 5, 32, generator=torch.Generator().manual_seed(2))
    found = forward(span, hidden, 0, 2), backward(span, hidden, grad, 0, 2)
    exact = load_span(folder, 0, 2)
    expected = forward(exact, hidden, 0, 2), backward(exact, hidden, grad, 0, 2)
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == span.dtype
        assert 0 < error(got.float(), wanted) < most


@pytest.mark.parametrize(
    ("dtype", "quantize"), [(torch.bfloat16, "none"), (torch.float16, "none"), (torch.float32, "int8")]
)
@pytest.mark.parametrize("rounds", [False, True])
def test_a_tape_changes_no_bit_where_weights_are_packed(dtype, quantize, rounds, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize_code, "multiplies_bfloat16", lambda: rounds)
    save_tiny("llama", tmp_path / "model")
    folder = open_folder(tmp_path / "model", memo=HashMemo(tmp_path / "hashes.json"))
    span = load_span(folder, 0, 2, dtype=dtype, quantize=quantize)
    hidden, grad = torch.randn(2, 1, 5, 32, generator=seeded(2))
    assert_a_tape_changes_no_bit(span, hidden, grad)


def test_a_part_of_a_tape_at_a_time_and_each_is_given_up_after_its_use(llama):
    span, tape = llama.spans[1], Tape()
    work = tape.forward_in_parts(span, llama.inputs, 1, 4, most=2 * ROWS * TOKENS)
    assert next(work) is None
    finish(work)
    assert tape.runs == [(1, 3), (3, 4)]
    kept = weakref.ref(tape._graphs[-1].output)
    back = tape.backward_in_parts(llama.direction)
    assert next(back) is None
    assert kept() is None
    assert torch.equal(finish(back).hidden, backward(span, llama.inputs, llama.direction, 1, 4))


@pytest.mark.parametrize(
    ("rows", "tokens", "expected"),
    [
        (1, 1, [(2, 30)]),
        (1, 128, [(2, 30)]),
        (4, 512, [(block, block + 2) for block in range(2, 30, 2)]),
        (2, 1024, [(block, block + 2) for block in range(2, 30, 2)]),
        (1, 256, [(2, 18), (18, 30)]),
        (1, 100_000, [(block, block + 1) for block in range(2, 30)]),
    ],
)
def test_a_part_has_as_many_blocks_as_its_positions_allow(rows, tokens, expected):
    assert parts.forward_parts(rows * tokens, 2, 30) == expected
    twice = [run for run in reversed(expected) for _ in range(2)]
    assert parts.backward_parts(rows * tokens, 2, 30) == [*expected[:-1], *twice]


def test_a_part_at_a_time_and_the_last_one_answers(llama, monkeypatch):
    span = llama.spans[1]
    monkeypatch.setattr(parts, "PART_POSITIONS", 2 * ROWS * TOKENS)  # three blocks: two parts
    work = forward_in_parts(span, llama.inputs, 1, 4)
    assert next(work) is None
    assert torch.equal(finish(work), forward(span, llama.inputs, 1, 4))
    back = backward_in_parts(span, llama.inputs, llama.direction, 1, 4)
    # forward through both, the second with its activations, and backward through that one
    assert [next(back), next(back), next(back)] == [None] * 3
    found = finish(back).hidden
    monkeypatch.setattr(parts, "PART_POSITIONS", 10**9)
    assert error(found, backward(span, llama.inputs, llama.direction, 1, 4)) <= TOLERANCE


def with_prompts(case: Case, prompts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient and the prompts' gradient of the whole model, whose blocks' hooks add the prompts."""
    trained = prompts.clone().requires_grad_()

    def adds(number: int) -> Any:
        def add(block: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            given = args[0] if args else kwargs["hidden_states"]
            changed = given + functional.pad(trained[number], (0, 0, 0, given.shape[1] - prompts.shape[1]))
            return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})

        return add

    blocks = blocks_of(case.whole)
    leaf = case.inputs.clone().requires_grad_()

    def enter(block: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return ((leaf, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": leaf})

    seen = {}

    def leave(block: Any, args: tuple, output: Any) -> None:
        seen["output"] = output[0] if isinstance(output, tuple) else output

    hooks = [blocks[0].register_forward_pre_hook(enter, with_kwargs=True)]
    hooks += [
        block.register_forward_pre_hook(adds(number), with_kwargs=True) for number, block in enumerate(blocks)
    ]
    hooks.append(blocks[-1].register_forward_hook(leave))
    with torch.enable_grad():
        case.whole(torch.zeros(ROWS, TOKENS, dtype=torch.long), use_cache=False)
        of_hidden, of_prompts = torch.autograd.grad(seen["output"], [leaf, trained], case.direction)
    for hook in hooks:
        hook.remove()
    return seen["output"].detach(), of_hidden, of_prompts


@pytest.mark.parametrize("held", [0, 10**9])
def test_deep_prompts_are_those_of_hooks_on_the_whole_model(case, held, monkeypatch):
    if held:
        monkeypatch.setattr(parts, "PART_POSITIONS", ROWS * TOKENS * 2)  # several runs, held at one time
    prompts = torch.randn(BLOCKS, 5, 32, generator=torch.Generator().manual_seed(4))
    output, gradient, of_prompts = with_prompts(case, prompts)
    hidden, inputs, grad = case.inputs, [], case.direction
    for span in case.spans:
        inputs.append(hidden)
        hidden = forward(span, hidden, span.start, span.stop, prompts[span.start : span.stop])
    assert error(hidden, output) <= TOLERANCE
    found: list[Tensor] = []
    for span, given in reversed(list(zip(case.spans, inputs, strict=True))):
        own = prompts[span.start : span.stop]
        grad, each = finish(backward_in_parts(span, given, grad, span.start, span.stop, own, held))
        assert each is not None
        found[:0] = [each]
    assert error(grad, gradient) <= TOLERANCE
    assert error(torch.cat(found), of_prompts) <= TOLERANCE
    assert error(hidden, case.output) > 0.01, "the prompts change the output"


def test_a_session_with_deep_prompts_equals_a_pass_without_a_cache(case):
    prompts = torch.randn(BLOCKS, 5, 32, generator=torch.Generator().manual_seed(4))
    for span in case.spans:
        own = prompts[span.start : span.stop]
        expected = forward(span, case.inputs, span.start, span.stop, own)
        cache, found = span.new_cache(ROWS, TOKENS), []
        for start, stop in ((0, 3), (3, 4), (4, 12), (12, 13), (13, TOKENS)):
            found.append(span.forward(case.inputs[:, start:stop], cache, start, prompts=own))
        assert error(torch.cat(found, 1), expected) <= 10 * TOLERANCE


def test_activations_that_are_held_give_the_gradient_of_those_that_are_not(case, monkeypatch):
    monkeypatch.setattr(parts, "PART_POSITIONS", ROWS * TOKENS)  # runs of one block
    span, positions = case.spans[1], ROWS * TOKENS
    expected = finish(backward_in_parts(span, case.inputs, case.direction, 1, 4)).hidden
    for blocks in (1, 2, 3):
        work = backward_in_parts(span, case.inputs, case.direction, 1, 4, held=blocks * positions)
        for _ in parts.backward_parts(positions, 1, 4, blocks * positions)[:-1]:
            assert next(work) is None
        assert error(finish(work).hidden, expected) <= TOLERANCE


def test_the_measured_activations_are_those_of_a_backward(case):
    span = case.spans[1]
    figures = Activations.most(measure_activations(span, kind) for kind in kinds_of_blocks(span))
    weights = {
        each.untyped_storage().data_ptr() for each in (*span.model.parameters(), *span.model.buffers())
    }
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)  # its address stays taken
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work = backward_in_parts(span, case.inputs, case.direction, 1, 4, held=10**9)
        next(work)
    really = sum(size for address, size in found.items() if address not in weights)
    predicted = figures.of_a_position(TOKENS) * ROWS * TOKENS * 3
    assert 0.4 * predicted <= really <= 1.05 * predicted


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        (0, [[(0, 2)], [(2, 4)], [(4, 5)]]),
        (4, [[(0, 2)], [(2, 4)], [(4, 5)]]),
        (5, [[(0, 2)], [(2, 4)], [(4, 5)]]),
        (6, [[(0, 2)], [(2, 4), (4, 5)]]),
        (9, [[(0, 2)], [(2, 4), (4, 5)]]),
        (10, [[(0, 2), (2, 4), (4, 5)]]),
    ],
)
def test_a_group_has_as_many_blocks_as_there_is_memory_for_and_one_run_at_least(held, expected, monkeypatch):
    monkeypatch.setattr(parts, "PART_POSITIONS", 4)
    assert parts.backward_groups(2, 0, 5, held) == expected
    again = [run for group in expected[:-1] for run in group]
    for group in reversed(expected):
        again += [*group, *reversed(group)]
    assert parts.backward_parts(2, 0, 5, held) == again
