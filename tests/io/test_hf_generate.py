"""`generate` of a model in a swarm: the library's calls give the library's tokens, scores and errors."""

from __future__ import annotations

import asyncio
import copy
import pickle
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StoppingCriteria

from client.bridges.proxy import target_of
from client.hf import RemoteCache, from_swarm
from client.hf.native import NativeRun
from tests.hf_swarm import Nodes, nodes_of
from tests.model_fixtures import save_tiny, save_tiny_tokenizer

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
IDS = torch.tensor([[83, 33, 80, 48, 61, 57, 82]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "llama"
    save_tiny("llama", path)
    save_tiny_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def local(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def nodes(folder: Path) -> Iterator[Nodes]:
    with nodes_of(folder, [(0, 3), (3, 6)]) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def model(nodes: Nodes) -> Any:
    return from_swarm(nodes.swarm)


def padded() -> dict[str, Tensor]:
    """Three rows, the first two of them with padding on the left."""
    ids = torch.arange(3, 30).view(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, :1] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


class Plus(LogitsProcessor):  # type: ignore[misc]  # the library is untyped
    """Favours one token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, 40] += 2.0
        return scores


class AfterFour(StoppingCriteria):  # type: ignore[misc]  # the library is untyped
    """Ends each row four tokens after the prompt."""

    def __call__(self, input_ids: Tensor, scores: Any, **arguments: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= IDS.shape[1] + 4)


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 8},
    "max_length": {"max_length": 12},
    "default length": {},
    "repetition": {"max_new_tokens": 8, "repetition_penalty": 1.4},
    "ngrams": {"max_new_tokens": 8, "no_repeat_ngram_size": 2},
    "least": {"max_new_tokens": 8, "min_new_tokens": 6, "eos_token_id": 48},
    "no end": {"max_new_tokens": 12, "min_new_tokens": 12, "eos_token_id": None},
    "end": {"max_new_tokens": 12, "eos_token_id": [7, 23, 48, 61]},
    "bans": {"max_new_tokens": 8, "bad_words_ids": [[23], [48]], "suppress_tokens": [61]},
    "processor": {"max_new_tokens": 8, "logits_processor": [Plus()]},
    "criteria": {"max_new_tokens": 8, "stopping_criteria": [AfterFour()]},
    "prefix": {"max_new_tokens": 8, "prefix_allowed_tokens_fn": lambda batch, ids: [3, 5, 8, 13, 21]},
    "lookup": {"max_new_tokens": 8, "prompt_lookup_num_tokens": 3},
    "config": {"generation_config": GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)},
    "no cache": {"max_new_tokens": 6, "use_cache": False},
    "chunks": {"max_new_tokens": 6, "prefill_chunk_size": 3},
    "sampled": {"max_new_tokens": 8, "do_sample": True, "temperature": 1.7, "top_k": 0},
    "filtered": {"max_new_tokens": 8, "do_sample": True, "top_k": 12, "top_p": 0.9, "min_p": 0.01},
    "several": {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.filterwarnings("ignore:.*max_length.*|.*generation_config.*")
def test_each_option_gives_the_library_s_tokens(model: Any, local: Any, options: dict[str, Any]) -> None:
    given = options if "generation_config" in options else {**GREEDY, **options}
    found = []
    for each in (model, local):
        torch.manual_seed(5)
        found.append(each.generate(IDS, **given))
    assert torch.equal(*found)


@pytest.mark.parametrize("batch", ["one", "padded"])
def test_scores_and_logits_are_the_library_s(model: Any, local: Any, batch: str) -> None:
    inputs = {"input_ids": IDS} if batch == "one" else padded()
    options = {"max_new_tokens": 5, "output_scores": True, "output_logits": True, **GREEDY}
    mine, theirs = (
        each.generate(**inputs, return_dict_in_generate=True, **options) for each in (model, local)
    )
    assert torch.equal(mine.sequences, theirs.sequences)
    torch.testing.assert_close(mine.scores, theirs.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine.logits, theirs.logits, rtol=1e-4, atol=1e-5)


def test_a_call_without_a_cache_of_its_own_leaves_no_session(model: Any, nodes: Nodes) -> None:
    for options in ({}, {"output_scores": True, "return_dict_in_generate": True}):
        found = model.generate(IDS, max_new_tokens=3, **options, **GREEDY)
        if options:
            found.past_key_values.close()
    with pytest.raises(RuntimeError, match="on purpose"):
        model.generate(IDS, max_new_tokens=3, prefix_allowed_tokens_fn=_fails, **GREEDY)


def _fails(batch: int, ids: Tensor) -> list[int]:
    raise RuntimeError("on purpose")


def test_a_streamer_hears_what_the_library_tells_it(model: Any, local: Any) -> None:
    class Heard:
        def __init__(self) -> None:
            self.said: list[Any] = []

        def put(self, value: Tensor) -> None:
            self.said.append(value.flatten().tolist())

        def end(self) -> None:
            self.said.append("end")

    for options in ({}, {"stopping_criteria": [AfterFour()]}):
        mine, theirs = Heard(), Heard()
        model.generate(IDS, max_new_tokens=4, streamer=mine, **options, **GREEDY)
        local.generate(IDS, max_new_tokens=4, streamer=theirs, **options, **GREEDY)
        assert mine.said == theirs.said


def test_stop_strings_and_a_tokenizer_end_the_text(model: Any, local: Any, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    whole = local.generate(IDS, max_new_tokens=8, **GREEDY)
    stop = tokenizer.decode(whole[0, 9:11])
    options = {"max_new_tokens": 8, "stop_strings": [stop], "tokenizer": tokenizer, **GREEDY}
    assert torch.equal(model.generate(IDS, **options), local.generate(IDS, **options))


def test_an_assistant_s_tokens_are_checked_by_the_swarm(model: Any, local: Any) -> None:
    noisy = copy.deepcopy(local)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    theirs = local.generate(IDS, max_new_tokens=24, **GREEDY)
    assert torch.equal(model.generate(IDS, max_new_tokens=24, assistant_model=noisy, **GREEDY), theirs)


@pytest.mark.parametrize("how", ["prompt_lookup_num_tokens", "assistant_model"])
def test_guessed_tokens_go_through_the_client_s_own_loop_unless_tokens_are_drawn(
    model: Any, local: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    run = NativeRun.run

    def counted(native: NativeRun, *given: Any) -> list[int]:
        runs.append(native)
        return run(native, *given)

    monkeypatch.setattr(NativeRun, "run", counted)
    prompt = IDS.repeat(1, 4)
    options = {how: 4 if how == "prompt_lookup_num_tokens" else local, "max_new_tokens": 24, **GREEDY}
    assert torch.equal(model.generate(prompt, **options), local.generate(prompt, **options))
    assert len(runs) == 1
    torch.manual_seed(5)
    mine = model.generate(prompt, **(options | {"do_sample": True}))
    torch.manual_seed(5)
    assert torch.equal(mine, local.generate(prompt, **(options | {"do_sample": True})))
    assert len(runs) == 1


def test_embeddings_in_the_place_of_tokens(model: Any, local: Any) -> None:
    embeds = local.get_input_embeddings()(IDS).detach()
    mine, theirs = (
        each.generate(inputs_embeds=embeds, max_new_tokens=6, **GREEDY) for each in (model, local)
    )
    assert torch.equal(mine, theirs)


def test_hidden_states_of_a_generation(model: Any, local: Any) -> None:
    options = {"max_new_tokens": 3, "output_hidden_states": True, "return_dict_in_generate": True, **GREEDY}
    mine, theirs = (each.generate(**padded(), **options) for each in (model, local))
    assert torch.equal(mine.sequences, theirs.sequences)
    real = padded()["attention_mask"].bool()
    for step, (my_states, states) in enumerate(zip(mine.hidden_states, theirs.hidden_states, strict=True)):
        for my_state, state in zip(my_states, states, strict=True):
            if step == 0:
                my_state, state = my_state[real], state[real]
            torch.testing.assert_close(my_state, state, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_chosen_hidden_states_alone(model: Any, local: Any) -> None:
    mine, theirs = (each(IDS, output_hidden_states=[2, -1]).hidden_states for each in (model, local))
    assert [each is None for each in mine] == [each is None for each in theirs]
    torch.testing.assert_close(mine[2], theirs[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine[-1], theirs[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 5},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
        {"num_beams": 3, "early_stopping": True, "eos_token_id": [7, 23]},
        {"num_beams": 3, "do_sample": True, "temperature": 1.5},
        {"num_beams": 3, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", ["one", "padded"])
def test_beams_are_the_library_s(model: Any, local: Any, options: dict[str, Any], batch: str) -> None:
    inputs = {"input_ids": IDS} if batch == "one" else padded()
    found = []
    for each in (model, local):
        torch.manual_seed(3)
        found.append(each.generate(**inputs, max_new_tokens=10, **{**GREEDY, **options}))
    assert torch.equal(*found)


# Several calls on one text


def test_a_cache_goes_on_where_it_was_by_either_loop(model: Any, local: Any) -> None:
    cache = RemoteCache(model.swarm, 64)
    text = IDS
    for options in (
        {},
        {"stopping_criteria": [lambda ids, scores, **_: torch.zeros(1, dtype=torch.bool)]},
        {},
    ):
        text = model.generate(text, past_key_values=cache, max_new_tokens=4, **options, **GREEDY)
        assert cache.get_seq_length() == text.shape[1] - 1
    assert torch.equal(text, local.generate(IDS, max_new_tokens=12, **GREEDY))
    cache.close()


def test_a_session_in_petals_words(model: Any, local: Any) -> None:
    theirs = local.generate(IDS, max_new_tokens=9, **GREEDY)
    with model.inference_session(max_length=40) as session:
        first = model.generate(IDS, max_new_tokens=3, **GREEDY)
        second = model.generate(None, max_new_tokens=3, session=session, **GREEDY)
        third = model.generate(max_new_tokens=3, **GREEDY)
        assert torch.equal(torch.cat([first, second, third], dim=1), theirs)
        with pytest.raises(ValueError, match="the session has 40 positions"):
            model.generate(None, max_new_tokens=40, **GREEDY)
    assert model.active_session is None
    with pytest.raises(RuntimeError, match="was closed"):
        session.step(torch.zeros(1, 1, 32))


@torch.no_grad()
def test_forward_in_a_session_uses_its_caches(model: Any, local: Any) -> None:
    with model.inference_session(max_length=20) as session:
        parts = [model(IDS[:, :4]).logits, model(IDS[:, 4:]).logits]
        assert session.position == 7
    torch.testing.assert_close(torch.cat(parts, dim=1), local(IDS).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_blocks_are_a_sequence_of_modules(model: Any) -> None:
    hidden = torch.randn(2, 5, 32)
    whole = model.blocks(hidden)
    torch.testing.assert_close(model.blocks[3:](model.blocks[:3](hidden)), whole)
    step = hidden
    for block in model.blocks:
        step = block(step)
    torch.testing.assert_close(step, whole)
    assert len(model.blocks) == 6
    for wrong, error in ((slice(0, 6, 2), ValueError), (slice(3, 3), ValueError), (6, IndexError)):
        with pytest.raises(error):
            model.blocks[wrong]


@torch.no_grad()
def test_a_session_over_some_blocks_is_cut_by_its_position(model: Any) -> None:
    blocks, hidden = model.blocks[2:3], torch.randn(1, 9, 32)
    whole = blocks(hidden)
    with blocks.inference_session(max_length=16) as session:
        assert blocks(hidden[:, :0]).shape == (1, 0, 32)
        first = blocks(hidden[:, :6])
        session.position = 2
        again = blocks(hidden[:, 2:])
        with pytest.raises(ValueError, match="0 to 9 are in the caches"):
            session.position = 10
    torch.testing.assert_close(first, whole[:, :6], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, whole[:, 2:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_of_a_session_change_their_order(model: Any) -> None:
    hidden = torch.randn(2, 6, 32)
    swapped = torch.cat([hidden[[1, 0], :4], hidden[:, 4:]], dim=1)
    with model.blocks.inference_session(max_length=16, batch=2) as session:
        session.step(hidden[:, :4])
        found = session.step(hidden[:, 4:], rows=[1, 0])
    torch.testing.assert_close(found, model.blocks(swapped)[:, 4:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_first_step_of_a_session_gives_its_deep_prompts(model: Any) -> None:
    torch.manual_seed(3)
    blocks, hidden, prompts = model.blocks[1:4], torch.randn(1, 6, 32), torch.randn(3, 2, 32)
    whole = blocks(hidden, prompts)
    assert not torch.allclose(whole, blocks(hidden), atol=1e-2)
    with blocks.inference_session(max_length=16) as session:
        first = session.step(hidden[:, :3], prompts=prompts)
        second = blocks(hidden[:, 3:5], prompts)  # the same ones again, as Petals' programs give them
        third = session.step(hidden[:, 5:])
        with pytest.raises(ValueError, match="other prompts inside a session"):
            session.step(hidden[:, :1], prompts=prompts + 1)
    torch.testing.assert_close(torch.cat([first, second, third], 1), whole, rtol=1e-4, atol=1e-5)
    with (
        blocks.inference_session(max_length=16) as session,
        pytest.raises(ValueError, match="for 3 blocks"),
    ):
        session.step(hidden, prompts=prompts[:2])


# What cannot be


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m(IDS, attention_mask=torch.tensor([[1, 0] + [1] * 5])), ValueError, "holes"),
        (lambda m: m(IDS, attention_mask=torch.ones(1, 1, 7, 7)), ValueError, "4 dimensions"),
        (lambda m: m(IDS, position_ids=torch.arange(7)[None] + 2), ValueError, "packed"),
        (lambda m: m(IDS, past_key_values=DynamicCache()), TypeError, "RemoteCache is needed"),
        (lambda m: m(IDS, output_attentions=True), ValueError, "output_attentions"),
        (lambda m: m(), ValueError, "one of input_ids and inputs_embeds"),
        (lambda m: m.generate(IDS, past_key_values=DynamicCache(), max_length=9), TypeError, "RemoteCache"),
        (lambda m: m.generate(IDS, cache_implementation="static", max_new_tokens=2), ValueError, "static"),
        (lambda m: m.generate(IDS, max_new_tokens=100_000), ValueError, "128 are allowed"),
        (
            lambda m: m.generate(IDS, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True),
            ValueError,
            "output_attentions",
        ),
        (
            lambda m: m.generate(
                torch.tensor([[5, 6, 0], [5, 6, 7]]), attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]]),
                max_new_tokens=2, **GREEDY,
            ),
            ValueError,
            "pad on the left",
        ),
    ],
)  # fmt: skip
def test_what_servers_cannot_do_is_one_clear_error(model: Any, call: Any, error: type, words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        call(model)
    assert "\n" not in str(caught.value)


def test_rows_of_a_cache_stay_those_of_its_first_step(model: Any) -> None:
    cache = RemoteCache(model.swarm, 32)
    with torch.no_grad():
        model(IDS.expand(2, -1), past_key_values=cache)
        with pytest.raises(ValueError, match="3 rows, the cache has 2"):
            model(IDS.expand(3, -1)[:, :1], past_key_values=cache)
    for change in (
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([1])),
    ):
        with pytest.raises(ValueError, match="are those of its first step"):
            change()
    with pytest.raises(ValueError, match=r"crop\(-8\)"):
        cache.crop(-8)
    with pytest.raises(RuntimeError, match="at the servers"):
        cache.update()
    cache.close()


# The handle


def test_a_copied_model_shares_the_swarm_and_a_pickled_one_says_why_not(model: Any, local: Any) -> None:
    twin = copy.deepcopy(model)
    theirs = local.generate(IDS, max_new_tokens=4, **GREEDY)
    assert torch.equal(twin.generate(IDS, max_new_tokens=4, **GREEDY), theirs)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(model)


def test_several_threads_use_one_model(model: Any, local: Any) -> None:
    theirs = local.generate(IDS, max_new_tokens=6, **GREEDY)
    found: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.append(model.generate(IDS, max_new_tokens=6, **GREEDY)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, theirs) for each in found)
    assert len(found) == 4


def test_a_notebook_s_running_loop_is_no_hindrance(model: Any, local: Any) -> None:
    async def cell() -> Tensor:
        return model.generate(IDS, max_new_tokens=4, **GREEDY)

    assert torch.equal(asyncio.run(cell()), local.generate(IDS, max_new_tokens=4, **GREEDY))


def test_the_library_sees_its_own_class(model: Any, local: Any) -> None:
    assert type(model).__name__ == "LlamaForCausalLM"
    assert isinstance(model, type(local))
    assert model.config.num_hidden_layers == 6
    assert model.can_generate()
    assert sum(each.numel() for each in model.parameters()) < sum(each.numel() for each in local.parameters())
    model.activation_checkpointing_enable()


def test_ctrl_c_in_a_generation_leaves_model_and_cache_usable(model: Any, local: Any) -> None:
    cache = RemoteCache(model.swarm, 120)
    main = threading.get_ident()
    interrupt = threading.Timer(0.001, signal.pthread_kill, (main, signal.SIGINT))

    def count(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if ids.shape[1] == IDS.shape[1] + 3:
            interrupt.start()
        return torch.zeros(len(ids), dtype=torch.bool)

    with pytest.raises(KeyboardInterrupt):
        model.generate(IDS, past_key_values=cache, max_new_tokens=110, stopping_criteria=[count], **GREEDY)
    cache.crop(-cache.get_seq_length())
    found = model.generate(IDS, past_key_values=cache, max_new_tokens=6, **GREEDY)
    assert torch.equal(found, local.generate(IDS, max_new_tokens=6, **GREEDY))
    cache.close()


def test_a_method_that_an_adapter_replaces_is_called(nodes: Nodes, local: Any) -> None:
    """As peft's prompt tuning does: other inputs at the first step."""
    found = []
    for each in (from_swarm(nodes.swarm), copy.deepcopy(local)):
        plain = each.prepare_inputs_for_generation

        def replaced(ids: Tensor, *args: Any, plain: Any = plain, **arguments: Any) -> Any:
            return plain((ids + 1) % 90, *args, **arguments)

        each.prepare_inputs_for_generation = replaced
        found.append(each.generate(IDS, max_new_tokens=5, **GREEDY))
    assert torch.equal(*found)


def test_a_forked_process_is_told_to_join_by_itself(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.bridges.sync.os.getpid", lambda: 1)
    with pytest.raises(RuntimeError, match="forked"):
        model(IDS)


def test_a_handle_of_a_running_loop_serves_its_other_threads(nodes: Nodes, local: Any) -> None:
    handle = target_of(nodes.swarm)  # what `async with client.connect(...)` gives under trio
    model = from_swarm(handle)
    theirs = local.generate(IDS, max_new_tokens=4, **GREEDY)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, **GREEDY), theirs)

    async def within(swarm: Any) -> None:
        with pytest.raises(RuntimeError, match="own thread"):
            model(IDS)
        found = await trio.to_thread.run_sync(lambda: model.generate(IDS, max_new_tokens=4, **GREEDY))
        assert torch.equal(found, theirs)

    nodes.swarm.run(within)


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_gives_the_library_s_texts(model: Any, local: Any, folder: Path) -> None:
    from transformers import AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    prompts, options = ["HELLO", "A LONGER WORLD"], {"max_new_tokens": 5, "do_sample": False, "batch_size": 2}
    found = [
        pipeline("text-generation", model=each, tokenizer=tokenizer)(prompts, **options)
        for each in (model, local)
    ]
    assert found[0] == found[1]
