"""A request for an answer, prepared: its prompt, what holds its text to a form, and how its text is read."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from client.gateway.formats.call_grammars import THINK, THOUGHT_ENDS, Calls, Thinking, compile_answer
from client.gateway.formats.errors import FormatError
from client.gateway.formats.families import FAMILIES, Family, family_of
from client.gateway.formats.grammars import Constraint, GrammarLimits, Grammars
from client.gateway.formats.reader import MessageReader, Reading
from client.gateway.formats.requests import (
    AllowedToolsChoice,
    Function,
    JsonObject,
    JsonSchemaFormat,
    NamedTool,
    ResponseFormat,
    Text,
    Tool,
    ToolChoice,
)
from client.gateway.formats.templates import ChatTemplate, Messages
from client.generation.options import GenerateArguments

TEXT = Text(type="text")


@dataclass(frozen=True)
class Prepared:
    """One request.  prompt_ids: with the opening of the answer."""

    prompt_ids: list[int]
    constraint: Constraint | None = None
    reading: Reading = field(default_factory=Reading)
    shows_special_tokens: bool = False

    def arguments(self) -> GenerateArguments:
        """The arguments of `generate` for one of the request's choices: new for each, they have a state."""
        made: GenerateArguments = {}
        if self.constraint is not None:
            made["logits_processor"] = [self.constraint.processor()]
        if self.shows_special_tokens:
            made["skip_special_tokens"] = False
        return made

    def reader(self) -> MessageReader:
        """A reader of one choice's text."""
        return MessageReader(self.reading)


@dataclass(frozen=True, slots=True)
class WantedCalls:
    """What a request wants of its tools.

    functions, places: that may be called, and where they stand in `tools`.  forced: one must be.
    many: several may be.
    """

    functions: tuple[Function, ...] = ()
    places: tuple[int, ...] = ()
    forced: bool = False
    many: bool = True


class ChatFormats:
    """The forms of a model's texts.  For any thread: `prepare` takes milliseconds, or a second."""

    def __init__(
        self,
        tokenizer: Any,  # of transformers, untyped
        *,
        vocabulary: int,
        end_ids: Iterable[int],
        limits: GrammarLimits | None = None,
    ) -> None:
        """vocabulary: tokens that the head knows.  end_ids: tokens that end a text."""
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._end_ids = frozenset(end_ids)
        self._limits = limits
        self._template = ChatTemplate(tokenizer)
        self._lock = threading.Lock()
        self._grammars: Grammars | None = None
        self._special = _special_texts(tokenizer)

    def prepare(
        self,
        messages: Messages,
        *,
        tools: Sequence[Tool] | None = None,
        tool_choice: ToolChoice | None = None,
        parallel_tool_calls: bool | None = None,
        response_format: ResponseFormat | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> Prepared:
        """A chat's next answer.  Raises FormatError.

        template_arguments: more variables of the chat template, as vLLM's `chat_template_kwargs`.
        """
        wanted = wanted_calls(tools or (), tool_choice, parallel_tool_calls)
        family = self._family(wanted) if wanted.functions else None
        # Tools that no call is wanted of are no part of the prompt, as in vLLM.
        shown = [tool for place, tool in enumerate(tools or ()) if place in wanted.places]
        prompt = self._template.render(messages, shown, _checked(template_arguments))
        thinking = self._template.thinking(prompt, with_tools=bool(shown))
        constraint = self._constraint(response_format or TEXT, wanted, family, thinking)
        delimiters = _delimiters(thinking, family)
        shows = not self._special.isdisjoint(delimiters)
        reading = Reading(
            thinking=thinking,
            family=family,
            functions=wanted.functions,
            many=wanted.many,
            hidden=self._special - delimiters if shows else (),
        )
        return Prepared(self._template.ids(prompt), constraint, reading, shows)

    def prepare_text(self, prompt_ids: list[int], response_format: ResponseFormat | None = None) -> Prepared:
        """A text's continuation.  Raises FormatError."""
        constraint = self._constraint(response_format or TEXT, WantedCalls(), None, "none")
        return Prepared(prompt_ids, constraint)

    def prompt_ids(self, messages: Messages, tools: Sequence[Tool] | None = None) -> list[int]:
        """The tokens of a chat's prompt alone.  Raises FormatError."""
        return self._template.ids(self._template.render(messages, tools or (), {}))

    def grammars(self) -> Grammars:
        """The grammars of the tokenizer; the first call takes a third of a second.  Raises FormatError."""
        with self._lock:
            if self._grammars is None:
                self._grammars = Grammars(
                    self._tokenizer,
                    vocabulary=self._vocabulary,
                    end_ids=self._end_ids,
                    limits=self._limits,
                )
            return self._grammars

    def _family(self, wanted: WantedCalls) -> Family:
        """How this model writes calls.  Raises FormatError where it knows none, or nobody knows how."""
        if not self._template.knows_tools():
            raise FormatError(
                'this model\'s chat template has no tools: only "tool_choice": "none" is possible', "tools"
            )
        family = family_of(self._template.text(with_tools=True))
        if family is None:
            known = ", ".join(family.name for family in FAMILIES)
            raise FormatError(
                f"how this model writes calls of tools is not known (known are {known}):"
                ' only "tool_choice": "none" is possible',
                "tools",
            )
        return family

    def _constraint(
        self,
        response_format: ResponseFormat,
        wanted: WantedCalls,
        family: Family | None,
        thinking: Thinking,
    ) -> Constraint | None:
        schema = _schema(response_format)
        strict = any(function.strict for function in wanted.functions)
        if family is None:
            calls = None
        else:
            calls = Calls(family, wanted.functions, wanted.places, wanted.many, wanted.forced)
        if schema is None and (calls is None or not (wanted.forced or strict)):
            return None
        return compile_answer(self.grammars(), schema=schema, calls=calls, thinking=thinking)


def wanted_calls(tools: Sequence[Tool], choice: ToolChoice | None, parallel: bool | None) -> WantedCalls:
    """What `tools`, `tool_choice` and `parallel_tool_calls` say together.  Raises FormatError."""
    names = [tool.function.name for tool in tools]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise FormatError(f"two tools have the name {name!r}", f"tools.{place}.function.name")
    for place, tool in enumerate(tools):
        kind = (tool.function.parameters or {}).get("type", "object")
        if kind != "object":
            raise FormatError(
                f"the schema of a function's arguments has type {kind!r}, object is allowed",
                f"tools.{place}.function.parameters.type",
            )
    if not tools:
        if choice not in (None, "none", "auto"):
            raise FormatError("tool_choice asks for a tool, and there are no tools", "tool_choice")
        if parallel is not None:
            raise FormatError("parallel_tool_calls is only allowed with tools", "parallel_tool_calls")
        return WantedCalls()
    if choice == "none":
        return WantedCalls()
    chosen, forced, many = _chosen(names, choice, many=parallel is not False)
    functions = tuple(tools[place].function for place in chosen)
    return WantedCalls(functions, tuple(chosen), forced, many)


def _chosen(names: list[str], choice: ToolChoice | None, *, many: bool) -> tuple[list[int], bool, bool]:
    """The places of the functions that may be called; whether one must be; whether several may be."""
    match choice:
        case NamedTool():
            return [_place(names, choice.function.name, "tool_choice.function.name")], True, False
        case AllowedToolsChoice():
            allowed = choice.allowed_tools
            places = {
                _place(names, tool.function.name, f"tool_choice.allowed_tools.tools.{number}.function.name")
                for number, tool in enumerate(allowed.tools)
            }
            return sorted(places), allowed.mode == "required", many
        case _:
            return list(range(len(names))), choice == "required", many


def _place(names: list[str], name: str, param: str) -> int:
    if name not in names:
        raise FormatError(f"tool_choice names {name!r}, which is none of the tools", param)
    return names.index(name)


def _schema(response_format: ResponseFormat) -> Mapping[str, Any] | None:
    match response_format:
        case JsonObject():
            return {"type": "object"}
        case JsonSchemaFormat():
            schema = response_format.json_schema.schema_
            return {"type": "object"} if schema is None else schema
        case _:
            return None


def _delimiters(thinking: Thinking, family: Family | None) -> frozenset[str]:
    """Texts that divide an answer, one of which a tokenizer may have as a special token."""
    thoughts = () if thinking == "none" else (THINK, THOUGHT_ENDS)
    calls = () if family is None else (family.trigger, family.closing.strip(), "<|python_tag|>")
    return frozenset(text for text in (*thoughts, *calls) if text)


def _special_texts(tokenizer: Any) -> frozenset[str]:
    """The texts of tokens that `skip_special_tokens` leaves out."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return frozenset(str(token) for token in added.values() if getattr(token, "special", False))


def _checked(arguments: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The variables of a template that a client may set.  Raises FormatError for others."""
    from transformers import PreTrainedTokenizerBase

    ours = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}
    for name in arguments or ():
        if name in ours or not name.isidentifier():
            raise FormatError(f"{name!r} is no variable that can be set", "chat_template_kwargs")
    return arguments or {}
