"""The fields of a request for a response, and the same fields as the response repeats them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from client.gateway.formats.errors import FormatError
from client.gateway.formats.requests import (
    MAX_DESCRIPTION,
    MAX_TOOLS,
    AllowedTools,
    AllowedToolsChoice,
    Function,
    FunctionName,
    JsonObject,
    JsonSchema,
    JsonSchemaFormat,
    Name,
    NamedTool,
    Part,
    ResponseFormat,
    Schema,
    Text,
    Tool,
    ToolChoice,
)


class SchemaFormat(Part):
    """JSON that a schema describes; chat's `json_schema`, without a level."""

    type: Literal["json_schema"]
    name: Name
    schema_: Annotated[Schema, Field(alias="schema")]
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION)] | None = None
    strict: bool | None = None


class TextOptions(Part):
    """`text`: the form of the text.  verbosity: taken and ignored."""

    format: Annotated[Text | JsonObject | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class FunctionTool(Part):
    """A function; chat's tool, without a level."""

    type: Literal["function"]
    name: Name
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION)] | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class ToolName(Part):
    """One function by its name."""

    type: Literal["function"]
    name: Name


class SomeTools(Part):
    """Some of the functions."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolName], Field(min_length=1, max_length=MAX_TOOLS)]


Choice = Literal["none", "auto", "required"] | Annotated[ToolName | SomeTools, Field(discriminator="type")]
FunctionTools = Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)]


def chat_format(text: TextOptions | None) -> ResponseFormat | None:
    """Chat's `response_format`."""
    wanted = None if text is None else text.format
    if not isinstance(wanted, SchemaFormat):
        return wanted
    schema = JsonSchema.model_validate(wanted.model_dump(by_alias=True, exclude={"type"}))
    return JsonSchemaFormat(type="json_schema", json_schema=schema)


def chat_tools(tools: list[FunctionTool] | None) -> list[Tool] | None:
    """Chat's `tools`."""
    if tools is None:
        return None
    return [
        Tool(
            type="function",
            function=Function(
                name=tool.name,
                description=tool.description,
                parameters=tool.parameters,
                strict=tool.strict,
            ),
        )
        for tool in tools
    ]


def chat_choice(choice: Choice | None) -> ToolChoice | None:
    """Chat's `tool_choice`."""
    match choice:
        case ToolName():
            return _named(choice)
        case SomeTools():
            allowed = AllowedTools(mode=choice.mode, tools=[_named(tool) for tool in choice.tools])
            return AllowedToolsChoice(type="allowed_tools", allowed_tools=allowed)
        case _:
            return choice


def _named(tool: ToolName) -> NamedTool:
    return NamedTool(type="function", function=FunctionName(name=tool.name))


_PATHS = (  # of chat's fields, and here
    ("response_format.json_schema.schema", "text.format.schema"),
    ("response_format", "text.format"),
    ("messages", "input"),
)


def own_error(error: FormatError) -> FormatError:
    """An error about a chat's field, with the path of the field that a response has in its place."""
    param = error.param
    if param is not None:
        param = param.replace(".function.", ".").replace(".allowed_tools.tools.", ".tools.")
        for theirs, ours in _PATHS:
            if param == theirs or param.startswith(f"{theirs}."):
                # A message is not the item that it came from.
                param = ours if ours == "input" else ours + param[len(theirs) :]
                break
    return FormatError(error.message, param, error.code)


def repeated(
    tools: list[FunctionTool] | None, choice: Choice | None, text: TextOptions | None
) -> dict[str, Any]:
    """The fields of forms and tools as a response has them."""
    wanted = None if text is None else text.format
    form = {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True, exclude_none=True)
    return {
        "tools": [
            {
                "type": "function",
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters,
                "strict": tool.strict,
            }
            for tool in tools or ()
        ],
        "tool_choice": choice.model_dump() if isinstance(choice, ToolName | SomeTools) else choice or "auto",
        "text": {"format": form, **({"verbosity": text.verbosity} if text and text.verbosity else {})},
    }
