"""Grammars that make a model write what a request asks for: calls of tools, JSON, thoughts before either."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from client.gateway.formats.errors import FormatError
from client.gateway.formats.families import LLAMA3, Family
from client.gateway.formats.grammars import Constraint, Grammars, json_value
from client.gateway.formats.requests import Function

Thinking = Literal["none", "optional", "open"]  # open: the prompt has begun a thought
THINK, THOUGHT_ENDS = "<think>", "</think>"
ANY_TEXT = "(?s:.*)"
MAX_COUNTED = 1000  # characters: a longer text is not counted, for a state of the lexer each


@dataclass(frozen=True, slots=True)
class Calls:
    """The calls that an answer may have, or must have.

    places: of the functions in the request's `tools`, for error messages.
    many: several calls are allowed.  forced: one at least.
    """

    family: Family
    functions: Sequence[Function]
    places: Sequence[int]
    many: bool
    forced: bool


def compile_answer(
    grammars: Grammars,
    *,
    schema: Mapping[str, Any] | None,
    calls: Calls | None,
    thinking: Thinking,
) -> Constraint:
    """The grammar of an answer: JSON by `schema`, calls, or either; text or calls where there is no schema.

    Raises FormatError, which names the schema at fault.
    """
    if calls is None:
        assert schema is not None
        grammar = _grammar(grammars, json_value(schema), "", thinking)
        return grammars.compile(grammar, param="response_format.json_schema.schema")
    if schema is not None and not calls.forced:
        if not calls.family.trigger:
            raise FormatError(
                "this model writes calls of tools as JSON, which a schema beside them would hide: leave out"
                ' response_format or tools, or set tool_choice to "required" or "none"',
                "response_format",
            )
        grammars.compile(f"start: {json_value(schema)}", param="response_format.json_schema.schema")
    try:
        return grammars.compile(_with_calls(grammars, schema, calls, calls.functions, thinking))
    except FormatError:
        held = _sound_functions(grammars, calls)
        return grammars.compile(_with_calls(grammars, schema, calls, held, thinking), param="tools")


def _with_calls(
    grammars: Grammars,
    schema: Mapping[str, Any] | None,
    calls: Calls,
    functions: Sequence[Function],
    thinking: Thinking,
) -> str:
    rules = _call_rules(grammars, calls, functions)
    if calls.forced:
        return _grammar(grammars, "calls", rules, thinking)
    if schema is not None:
        return _grammar(grammars, f"calls | {json_value(schema)}", rules, thinking)
    # A thought is text as well.
    return f"start: {_text_and_calls(grammars, calls)}\n{rules}\n{_text_rules(grammars, calls.family)}"


def _grammar(grammars: Grammars, answer: str, rules: str, thinking: Thinking) -> str:
    """An answer after a thought, where the model thinks."""
    if thinking == "none":
        return f"start: answer\nanswer: {answer}\n{rules}"
    thought = "thought" if thinking == "open" else f"({grammars.literal(THINK)} thought)?"
    if grammars.is_token(THOUGHT_ENDS):
        end = f"thought: (/(?s:.+)/)? {grammars.literal(THOUGHT_ENDS)} blank?"
    else:
        end = f"thought: thought_text blank?\nthought_text[lazy]: {_regex(ANY_TEXT + THOUGHT_ENDS)}"
    return f"start: {thought} answer\nanswer: {answer}\n{end}\nblank: /\\s{{1,8}}/\n{rules}"


def _call_rules(grammars: Grammars, calls: Calls, functions: Sequence[Function]) -> str:
    """Rules of which `calls` is the whole of the calls, and `rest` all of one call but its trigger."""
    family = calls.family
    many = calls.many and family.many
    names = [f"call_{place}" for place in range(len(functions))]
    rules: list[str] = []
    for name, function in zip(names, functions, strict=True):
        body, more = _BODIES[family.body](family, function, grammars, name)
        rules += [f"{name}: {body}", *more]
    rules.append(f"call: {' | '.join(names)}")
    trigger, gap = (f"{grammars.literal(text)} " if text else "" for text in (family.trigger, family.gap))
    if family.body == "json list":
        more_calls = ' ("," " "? call)*' if many else ""
        rules.append(f'rest: {gap}"[" call{more_calls} "]"')
        rules.append(f"calls: {trigger}rest")
    else:
        closing = f" {grammars.literal(family.closing)}" if family.closing else ""
        rules.append(f"rest: {gap}call{closing}")
        more_calls = f' ("\\n" {trigger}rest)*' if many else ""
        rules.append(f"calls: {trigger}rest{more_calls}")
    return "\n".join(rules)


def _text_and_calls(grammars: Grammars, calls: Calls) -> str:
    """Text in which a trigger leads to a call."""
    if calls.family is LLAMA3:
        return "(calls | PLAIN)?"
    trigger = grammars.literal(calls.family.trigger) if grammars.is_token(calls.family.trigger) else ""
    one = f"text {trigger} rest" if trigger else "text led rest"
    many = calls.many and calls.family.many and calls.family.body != "json list"
    return f"({one})* text" if many else f"({one})? text"


def _text_rules(grammars: Grammars, family: Family) -> str:
    """Rules of text without a trigger (`text`), and with one at its end (`led`)."""
    if family is LLAMA3:
        return r"PLAIN: /[ \t\n]*[^{ \t\n](?s:.*)/"
    trigger = family.trigger
    others = grammars.added_tokens(without=[trigger])
    rules = [f"TEXT: /(?s:.+)/ & ~{_regex(ANY_TEXT + _escaped(trigger) + ANY_TEXT)}"]
    if others:
        rules.append(f"text: TEXT? (<[{','.join(map(str, others))}]> TEXT?)*")
    else:
        rules.append("text: TEXT?")
    if not grammars.is_token(trigger):
        rules.append(f"led[lazy]: {_regex(ANY_TEXT + _escaped(trigger))}")
    return "\n".join(rules)


def _sound_functions(grammars: Grammars, calls: Calls) -> list[Function]:
    """The functions; one whose schema no grammar can hold to takes any object, unless it is strict.

    Raises FormatError for a strict one.
    """
    sound = []
    for place, function in zip(calls.places, calls.functions, strict=True):
        rules = _call_rules(grammars, calls, [function])
        try:
            grammars.compile(f"start: calls\n{rules}", param=f"tools.{place}.function.parameters")
        except FormatError:
            if function.strict:
                raise
            function = function.model_copy(update={"parameters": None})
        sound.append(function)
    return sound


def argument_schema(function: Function) -> dict[str, Any]:
    """The schema of a function's arguments; without one any object."""
    return {"type": "object", **(function.parameters or {})}


Body = tuple[str, list[str]]  # an expression, and the rules that it needs


def _json_body(family: Family, function: Function, grammars: Grammars, name: str) -> Body:
    """`{"name": ..., "arguments": {...}}`."""
    before = grammars.literal(f'{{"name": "{function.name}", "{family.arguments}": ')
    arguments = json_value(argument_schema(function), lenient=not function.strict)
    return f'{before} {name}_value "}}"', [f"{name}_value: {arguments}"]


def _xml_body(family: Family, function: Function, grammars: Grammars, name: str) -> Body:
    """`<function=...>` with `<parameter=...>` in it, each at most once, in the schema's order."""
    schema = argument_schema(function)
    properties = schema.get("properties")
    required = schema.get("required") or ()
    shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    parts, rules = [grammars.literal(f"<function={function.name}>\n")], []
    end = "\n</parameter>\n"
    for place, (key, each) in enumerate(properties.items() if isinstance(properties, Mapping) else ()):
        own = f"{name}_{place}"
        begin = grammars.literal(f"<parameter={key}>\n")
        found: Mapping[str, Any] = each if isinstance(each, Mapping) else {}
        if _only_texts(found.get("enum")):
            choices = " | ".join(grammars.literal(choice) for choice in found["enum"])
            rules.append(f"{own}: ({choices}) {grammars.literal(end)}")
        elif found.get("type") == "string":
            rules.append(f"{own}[lazy]: {_regex(_text_of(found) + _escaped(end))}")  # up to the tag's end
        else:
            value = json_value({**found, **shared}, lenient=not function.strict)
            rules.append(f"{own}: {own}_value {grammars.literal(end)}\n{own}_value: {value}")
        parts.append(f"({begin} {own}){'' if key in required else '?'}")
    parts.append(grammars.literal("</function>"))
    return " ".join(parts), rules


def _text_of(schema: Mapping[str, Any]) -> str:
    """A pattern of any text, of the schema's lengths."""
    least, most = schema.get("minLength"), schema.get("maxLength")
    if type(most) is int and 0 <= most <= MAX_COUNTED and type(least or 0) is int:
        return f"(?s:.{{{max(0, min(least or 0, most))},{most}}})"
    return ANY_TEXT


def _only_texts(values: Any) -> bool:  # Any: of a client's schema
    return isinstance(values, list) and bool(values) and all(isinstance(each, str) for each in values)


_BODIES: dict[str, Callable[[Family, Function, Grammars, str], Body]] = {
    "json": _json_body,
    "json list": _json_body,
    "xml": _xml_body,
}


def _regex(pattern: str) -> str:
    return "/" + pattern.replace("/", r"\/").replace("\n", r"\n") + "/"


def _escaped(text: str) -> str:
    """A text for a regex of Rust."""
    return "".join(f"\\{each}" if each in r"\.+*?()|[]{}^$#&-~" else each for each in text)
