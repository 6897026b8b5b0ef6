"""Reading a request's body into a checked value; what is wrong becomes OpenAI's error with a dotted path."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from client.gateway.openai.errors import RequestError, invalid

SHOWN_CHARACTERS = 60  # of a value in a message
MISSING = "missing_required_parameter"
_FIELD = re.compile(r"[a-z][a-z_]*")
# What is no word of JSON in pydantic's messages.
_AN_OBJECT = re.compile(r"a valid dictionary(?: or instance of \w+| or object to extract fields from)?")
# Of a kind of a union that the value is not at all: another kind's error says more.
_OTHER_KIND = frozenset({"string_type", "list_type", "int_type", "dict_type", "model_type", "bool_type"})


class Fields(BaseModel):
    """A body, or a part of one.  A field that is unknown is refused; a string is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _integral(value: Any) -> Any:  # Any: to be checked
    """2.0 is an integer in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


Whole = Annotated[int, BeforeValidator(_integral)]
Real = Annotated[float, Field(allow_inf_nan=False)]
F = TypeVar("F", bound=BaseModel)


def parse(
    model: type[F],
    body: Mapping[str, Any],
    *,
    unsupported: Mapping[str, str] | None = None,
    harmless: Mapping[str, object] | None = None,
) -> F:  # Any: JSON
    """The body as a value of `model`; null is a field that is absent.

    unsupported: fields that OpenAI has and the gateway does not do, each with the reason or what to use.
    harmless: the value of such a field that says what happens anyway.
    Raises RequestError: nothing that is given is left out.
    """
    given = {name: value for name, value in body.items() if value is not None}
    known = {field.alias or name for name, field in model.model_fields.items()}
    for name in given:
        if name in known:
            continue
        if unsupported is not None and name in unsupported:
            if harmless is not None and name in harmless and _is_equal(given[name], harmless[name]):
                continue
            raise RequestError(
                400,
                f"{name} is not supported here: {unsupported[name]}",
                param=name,
                code="unsupported_parameter",
            )
        raise invalid(f"{_shown(name)} is not a field of this request", name[:100], "unknown_parameter")
    try:
        return model.model_validate({name: value for name, value in given.items() if name in known})
    except ValidationError as error:
        raise field_error(error, given) from None


def field_error(error: ValidationError, body: Mapping[str, Any]) -> RequestError:  # Any: JSON
    """The error of the field that is wrong; of the kinds of a union that of the one which fits best."""
    found = error.errors(include_url=False, include_context=False)
    worst = max(found, key=lambda each: (each["type"] not in _OTHER_KIND, len(each["loc"])))
    path = path_of(worst["loc"], body, absent=worst["type"] == "missing")
    message = _AN_OBJECT.sub("an object", worst["msg"].removeprefix("Value error, "))
    if worst["type"] == "missing":
        return invalid(f"{path} is needed", path, MISSING)
    if worst["type"] == "extra_forbidden":
        return invalid(f"{path} is not a field of this request", path, "unknown_parameter")
    if worst["type"] == "value_error":  # ours: it begins with the field
        name = message.partition(" ")[0]
        where = f"{path}." if path else ""
        param = f"{where}{name}" if _FIELD.fullmatch(name) else path or None
        return invalid(
            f"{where}{message}", param, MISSING if message.startswith(f"{name} is needed") else None
        )
    return invalid(f"{path or 'the request'} is {_shown(worst['input'])}: {message}", path or None)


def path_of(loc: Sequence[int | str], body: Any, *, absent: bool) -> str:  # Any: JSON
    """A path such as messages.0.content: of pydantic's path the parts that are in the body.

    The others name kinds of a union.  absent: the last part is a field that is missing.
    """
    parts: list[str] = []
    value = body
    for place, part in enumerate(loc):
        if isinstance(value, Mapping):
            if part not in value and not (absent and place == len(loc) - 1):
                continue
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            continue
        parts.append(str(part))
    return ".".join(parts)[:200]


def _is_equal(one: object, other: object) -> bool:
    return type(one) is type(other) and one == other  # 0 is not false


def _shown(value: object) -> str:
    """A value as JSON has it; one that came of JSON is cut."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
