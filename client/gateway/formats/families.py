"""How model families write a call of a tool, so that calls are found in a text.

A family is known by what its chat template holds.  The texts are those of the families' own chat templates
and of transformers' table for `transformers serve`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Family:
    """One way to write calls.

    marks: all of these texts are in the chat template of such a model.
    opens: a pattern of the text before a call; None: `trigger` alone.  gap: what usually follows the trigger.
    closes: the text after a call; None: it ends with the answer.  closing: the usual one, with blanks.
    body: "json": an object with `name` and the arguments; "json list": several in a list; "xml": tags.
    arguments: the key of the arguments.
    many: whether an answer may hold several calls.
    id_characters: of a call's id.
    """

    name: str
    marks: tuple[str, ...]
    trigger: str
    gap: str
    closes: str | None
    closing: str
    opens: str | None = None
    body: Literal["json", "json list", "xml"] = "json"
    arguments: str = "arguments"
    many: bool = True
    id_characters: int = 24


QWEN_XML = Family(  # Qwen 3.5 and Qwen3-Coder
    "qwen-xml",
    marks=("<tool_call>", "<function=", "<parameter="),
    trigger="<tool_call>",
    gap="\n",
    closes="</tool_call>",
    closing="\n</tool_call>",
    body="xml",
)
HERMES = Family(  # Hermes 2 and 3, Qwen 2.5 and 3, SmolLM3
    "hermes",
    marks=("<tool_call>",),
    trigger="<tool_call>",
    gap="\n",
    closes="</tool_call>",
    closing="\n</tool_call>",
)
MISTRAL = Family(  # Mistral 7B v0.3, Nemo, Small
    "mistral",
    marks=("[TOOL_CALLS]",),
    trigger="[TOOL_CALLS]",
    gap=" ",
    closes=None,
    closing="",
    body="json list",
    id_characters=9,  # the template refuses others
)
LLAMA3 = Family(  # Llama 3.1, 3.2 and 3.3: a call is the whole answer
    "llama3",
    marks=("<|start_header_id|>", '"parameters"'),
    trigger="",
    gap="",
    closes=None,
    closing="",
    opens=r'\A\s*(?:<\|python_tag\|>)?\s*(?=\{\s*"(?:name|type)")',
    arguments="parameters",
    many=False,
)
FAMILIES = (QWEN_XML, HERMES, MISTRAL, LLAMA3)  # the narrower first


def family_of(template: str) -> Family | None:
    """The family of a chat template; None: how its models write calls is not known."""
    return next(
        (family for family in FAMILIES if all(mark in template for mark in family.marks)),
        None,
    )
