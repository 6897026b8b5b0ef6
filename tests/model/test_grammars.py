"""Grammars hold a generation to a form, whatever the logits are."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

from client.gateway.formats.call_grammars import Calls, compile_answer
from client.gateway.formats.errors import FormatError
from client.gateway.formats.families import HERMES, LLAMA3, MISTRAL, QWEN_XML
from client.gateway.formats.grammars import GrammarLimits, Grammars, json_value
from client.gateway.formats.reader import MessageReader, Reading
from client.gateway.formats.requests import Function
from client.generation.options import GenerateOptions
from client.generation.sampling import Sampler
from tests.chat_fixtures import chat_tokenizer

TAGS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = Function(
    name="weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 6},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "unit": {"type": "string", "enum": ["C", "F"]},
        },
        "required": ["city", "days", "unit"],
        "additionalProperties": False,
    },
)
STOP = Function(name="stop", parameters={"type": "object", "properties": {}, "additionalProperties": False})


@cache
def tokenizer(added=()):
    return chat_tokenizer("hermes", added=added)


@cache
def grammars(added=()):
    own = tokenizer(added)
    return Grammars(own, vocabulary=len(own) + 3, end_ids=[own.eos_token_id])


def generate(constraint, *, added=(), seed=0, greedy=False, most=400, first="", bias=None):
    """A text of random logits under a constraint; `first` is forced where allowed.  None: it has no end."""
    own = tokenizer(added)
    width = len(own) + 3
    random = torch.Generator().manual_seed(seed)
    options = GenerateOptions(
        temperature=0 if greedy else 1.0, seed=seed, logits_processor=(constraint.processor(),)
    )
    prompt = [5, 6, 7]
    sampler = Sampler(options, end_ids=[own.eos_token_id], prompt_tokens=len(prompt))
    forced = own(first, add_special_tokens=False)["input_ids"]
    tokens = list(prompt)
    for place in range(most):
        logits = torch.randn(width, generator=random)
        logits[own.eos_token_id] += 2.0  # so that texts without an end of their own get one
        if bias is not None:
            logits[own.convert_tokens_to_ids(bias)] += 100.0
        if place < len(forced):
            logits[forced[place]] += 1e4
        token = sampler.pick(logits, tokens)
        if token == own.eos_token_id:
            return own.decode(tokens[len(prompt) :], skip_special_tokens=False)
        tokens.append(token)
    return None


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_a_text_that_ends_is_json_of_the_schema(seed, greedy):
    constraint = compile_answer(grammars(), schema=PERSON, calls=None, thinking="none")
    text = generate(constraint, seed=seed, greedy=greedy)
    assert text is not None
    found = json.loads(text)
    assert found.keys() == {"name", "age"}
    assert 0 <= found["age"] <= 99
    assert len(found["name"]) <= 8


@pytest.mark.parametrize("seed", range(8))
def test_any_object(seed):
    constraint = compile_answer(grammars(), schema={"type": "object"}, calls=None, thinking="none")
    text = generate(constraint, seed=seed, most=20_000 if seed == 0 else 400)
    if text is not None:
        assert isinstance(json.loads(text), dict)


def test_blanks_between_parts_have_an_end():
    constraint = compile_answer(grammars(), schema=PERSON, calls=None, thinking="none")
    text = generate(constraint, bias=["Ġ"])
    assert text is not None
    assert "   " not in json.dumps(text.split('"name"')[0])
    text = generate(constraint, bias=["Ċ"])
    assert text is not None
    assert "\n\n" not in text


@pytest.mark.parametrize("added", [(), TAGS])
@pytest.mark.parametrize("family", [HERMES, QWEN_XML, MISTRAL, LLAMA3], ids=lambda family: family.name)
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_forced_call_is_a_whole_call_of_a_function(family, added, many, seed):
    functions = (WEATHER, STOP)
    calls = Calls(family, functions, (0, 1), many=many, forced=True)
    constraint = compile_answer(grammars(added), schema=None, calls=calls, thinking="none")
    text = generate(constraint, added=added, seed=seed, most=3000)
    assert text is not None
    message = read(text, Reading(family=family, functions=functions))
    assert message.calls
    assert not message.content
    assert many or len(message.calls) == 1
    for call in message.calls:
        arguments = json.loads(call.arguments)
        assert call.name in ("weather", "stop")
        if call.name == "stop":
            assert arguments == {}
        else:
            assert 1 <= arguments["days"] <= 9
            assert arguments["unit"] in "CF"
            assert isinstance(arguments["city"], str)


def read(text, reading):
    from client.gateway.formats.deltas import Message

    message, reader = Message(), MessageReader(reading)
    for delta in [*reader.feed(text), *reader.finish()]:
        message.add(delta)
    return message


@pytest.mark.parametrize("added", [(), TAGS])
@pytest.mark.parametrize("thinking", ["open", "optional"])
@pytest.mark.parametrize("forced", [True, False])
def test_a_thought_may_come_first(added, thinking, forced):
    calls = Calls(HERMES, (STOP,), (0,), many=False, forced=True) if forced else None
    schema = None if forced else PERSON
    constraint = compile_answer(grammars(added), schema=schema, calls=calls, thinking=thinking)
    thought = "so it { is }</think>" if thinking == "open" else "<think>so it { is }</think>"
    text = generate(constraint, added=added, first=thought)
    assert text is not None
    message = read(text, Reading(thinking=thinking, family=HERMES, functions=(STOP,)))
    assert message.reasoning == "so it { is }"
    assert bool(message.calls) == forced
    if not forced:
        assert json.loads(message.content).keys() == {"name", "age"}


@pytest.mark.parametrize("added", [(), TAGS])
def test_text_is_free_until_a_call_begins_and_the_call_follows_its_schema(added):
    calls = Calls(HERMES, (WEATHER,), (0,), many=True, forced=False)
    constraint = compile_answer(grammars(added), schema=None, calls=calls, thinking="none")
    reading = Reading(family=HERMES, functions=(WEATHER,))
    free = "a <tool { b } </x> <"
    assert (generate(constraint, added=added, first=free + "!") or "").startswith(free + "!")
    for seed in range(4):
        text = generate(constraint, added=added, first=free + "<tool_call>", seed=seed, most=3000)
        assert text is not None
        message = read(text, reading)
        assert message.content.startswith(free)
        assert json.loads(message.calls[0].arguments)["unit"] in "CF"


@pytest.mark.parametrize("family", [HERMES, MISTRAL], ids=lambda family: family.name)
def test_json_or_a_call(family):
    calls = Calls(family, (STOP,), (0,), many=False, forced=False)
    constraint = compile_answer(grammars(), schema=PERSON, calls=calls, thinking="none")
    reading = Reading(family=family, functions=(STOP,))
    told = generate(constraint, first='{"name": "x", "age"')
    assert told is not None
    assert json.loads(read(told, reading).content)["name"] == "x"
    called = generate(constraint, first=family.trigger + family.gap)
    assert called is not None
    assert [call.name for call in read(called, reading).calls] == ["stop"]


def test_json_beside_calls_that_are_json_themselves_is_refused():
    calls = Calls(LLAMA3, (STOP,), (0,), many=False, forced=False)
    with pytest.raises(FormatError, match="tool_choice") as caught:
        compile_answer(grammars(), schema=PERSON, calls=calls, thinking="none")
    assert caught.value.param == "response_format"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"type": "object", "properties": 5},
        {"$ref": "https://example.com/schema.json"},
        {"type": "string", "pattern": "("},
        {"type": "string", "format": "no-such-format"},
        {"enum": []},
        {"type": "integer", "minimum": 5, "maximum": 2},
        {"not": {"type": "string"}},
    ],
)
def test_a_schema_that_cannot_be_held_to_is_refused_in_one_line(schema):
    with pytest.raises(FormatError) as caught:
        compile_answer(grammars(), schema=schema, calls=None, thinking="none")
    assert caught.value.param == "response_format.json_schema.schema"
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"$ref": "#"}, "no text can satisfy it"),
        ({"$ref": "#/nowhere"}, "failed to compile JSON schema: Pointer '/nowhere' does not exist"),
        ({"type": "string", "pattern": "("}, "JSON schema: regex parse error: ( ^ error: unclosed group"),
        ({"enum": []}, "failed to compile JSON schema: Unsatisfiable schema: anyOf is empty"),
    ],
)
def test_the_error_of_a_schema_is_about_the_schema_alone(schema, says):
    with pytest.raises(FormatError) as caught:
        compile_answer(grammars(), schema=schema, calls=None, thinking="none")
    assert caught.value.message.endswith(says)
    assert "x-guidance" not in caught.value.message  # ours


def test_a_grammar_larger_than_max_grammar_bytes_is_refused():
    own = tokenizer()
    small = Grammars(own, vocabulary=len(own), end_ids=[2], limits=GrammarLimits(max_grammar_bytes=1000))
    wide = {"type": "object", "properties": {f"key_{number}": {"type": "string"} for number in range(100)}}
    with pytest.raises(FormatError, match="1000 are allowed"):
        compile_answer(small, schema=wide, calls=None, thinking="none")


def test_a_grammar_of_more_than_max_grammar_symbols_is_refused():
    own = tokenizer()
    small = Grammars(own, vocabulary=len(own), end_ids=[2], limits=GrammarLimits(max_grammar_symbols=50))
    wide = {"type": "object", "properties": {f"key_{number}": {"type": "string"} for number in range(100)}}
    with pytest.raises(FormatError, match="schema cannot be used"):
        compile_answer(small, schema=wide, calls=None, thinking="none")


def test_a_lexer_of_more_than_max_lexer_states_ends_the_text_with_one_line():
    own = tokenizer()
    small = Grammars(own, vocabulary=len(own), end_ids=[2], limits=GrammarLimits(max_lexer_states=20))
    with pytest.raises(ValueError, match=r"form|schema") as caught:
        generate(compile_answer(small, schema=PERSON, calls=None, thinking="none"))
    assert "\n" not in str(caught.value)


def test_a_grammar_is_compiled_once_and_the_oldest_beyond_max_grammars_kept_goes():
    own = tokenizer()
    few = Grammars(own, vocabulary=len(own), end_ids=[2], limits=GrammarLimits(max_grammars_kept=2))
    texts = [f"start: {json_value({'const': number})}" for number in range(3)]
    first = few.compile(texts[0])
    assert few.compile(texts[0])._matcher is first._matcher
    few.compile(texts[1])
    few.compile(texts[2])
    assert few.compile(texts[0])._matcher is not first._matcher


def test_a_mask_that_is_asked_again_for_the_same_tokens_is_the_same():
    mask = compile_answer(grammars(), schema=PERSON, calls=None, thinking="none").processor()
    width = len(tokenizer()) + 3
    brace = tokenizer().convert_tokens_to_ids("{")
    scores = torch.zeros(1, width)
    first = mask(torch.tensor([[5, 6]]), scores)
    assert torch.equal(mask(torch.tensor([[5, 6]]), scores), first)
    assert first[0, brace] == 0
    assert torch.isinf(first[0, tokenizer().eos_token_id])
    second = mask(torch.tensor([[5, 6, brace]]), scores)
    assert torch.isinf(second[0, brace])
    assert torch.equal(mask(torch.tensor([[5, 6, brace]]), scores), second)


def test_texts_of_one_constraint_are_independent():
    constraint = compile_answer(grammars(), schema=PERSON, calls=None, thinking="none")
    first, second = constraint.processor(), constraint.processor()
    brace = tokenizer().convert_tokens_to_ids("{")
    scores = torch.zeros(1, len(tokenizer()) + 3)
    first(torch.tensor([[5]]), scores)
    first(torch.tensor([[5, brace]]), scores)
    assert second(torch.tensor([[5]]), scores)[0, brace] == 0


def test_a_strict_schema_that_cannot_be_held_to_is_refused_and_a_loose_one_allows_any_object():
    odd = {"type": "object", "properties": {"a": {"$ref": "https://example.com/a.json"}}}
    strict = Calls(HERMES, (STOP, Function(name="odd", parameters=odd, strict=True)), (0, 3), True, True)
    with pytest.raises(FormatError) as caught:
        compile_answer(grammars(), schema=None, calls=strict, thinking="none")
    assert caught.value.param == "tools.3.function.parameters"
    loose = Calls(HERMES, (Function(name="odd", parameters=odd),), (0,), many=False, forced=True)
    constraint = compile_answer(grammars(), schema=None, calls=loose, thinking="none")
    text = generate(constraint, first='<tool_call>\n{"name": "odd", "arguments": {"b": 1}}')
    assert text == '<tool_call>\n{"name": "odd", "arguments": {"b": 1}}\n</tool_call>'


def test_a_tokenizer_that_is_not_of_bytes_can_be_held_to_a_form(tmp_path):
    from transformers import AutoTokenizer

    from tests.model_fixtures import VOCAB, save_tiny_tokenizer

    save_tiny_tokenizer(tmp_path)
    own = AutoTokenizer.from_pretrained(tmp_path)
    plain = Grammars(own, vocabulary=VOCAB, end_ids=[own.eos_token_id])
    mask = compile_answer(plain, schema={"enum": ["ab", 7]}, calls=None, thinking="none").processor()
    tokens, text = [4], ""
    while True:
        scores = mask(torch.tensor([tokens]), torch.zeros(1, VOCAB))
        tokens.append(int(scores.argmax()))
        if tokens[-1] == own.eos_token_id:
            break
        text += own.decode(tokens[-1:])
    assert json.loads(text) in ("ab", 7)


def test_a_model_without_an_end_token_is_refused():
    with pytest.raises(FormatError, match="no end token"):
        Grammars(tokenizer(), vocabulary=len(tokenizer()), end_ids=[])
