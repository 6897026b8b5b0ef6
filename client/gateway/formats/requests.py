"""The fields of a request that say what its text should be, as OpenAI has them: pydantic models.

https://platform.openai.com/docs/api-reference/chat/create: `response_format`, `tools`, `tool_choice`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_TOOLS = 128  # OpenAI's number
MAX_DESCRIPTION = 64 * 1024  # characters; the prompt's length is the true bound

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]  # of a function or a schema
Schema = dict[str, Any]  # Any: a JSON schema; the compiler of grammars checks it


class Part(BaseModel):
    """A part of a request.  A field that is unknown is refused; a string is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Text(Part):
    """Any text."""

    type: Literal["text"]


class JsonObject(Part):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(Part):
    """JSON that a schema describes.  strict: taken, and true in any case: the grammar allows nothing else."""

    name: Name
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION)] | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None


class JsonSchemaFormat(Part):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[Text | JsonObject | JsonSchemaFormat, Field(discriminator="type")]


class Function(Part):
    """A function that a model may call.  parameters: a JSON schema of its arguments, an object.

    strict: the arguments follow the schema in any case, and a schema that cannot be held to is refused.
    """

    name: Name
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION)] | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Part):
    """A tool.  Functions are the only kind."""

    type: Literal["function"]
    function: Function


class FunctionName(Part):
    """The name of a function."""

    name: Name


class NamedTool(Part):
    """One tool by its name."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Part):
    """Some of the tools.  mode: whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolsChoice(Part):
    """Some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = (
    Literal["none", "auto", "required"]
    | Annotated[NamedTool | AllowedToolsChoice, Field(discriminator="type")]
)
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]
