"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from client.gateway.gateway import Gateway
from client.gateway.openai.errors import invalid
from client.gateway.openai.fields import Fields, Whole, parse
from client.gateway.openai.requests import ChatMessage
from node.runtime.values import MAX_INT32

MAX_TOKENS = 1 << 20  # of one request; the body's bound is about there too


class TokenizeRequest(Fields):
    """A text or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Fields):
    """Tokens."""

    model: str | None = None
    tokens: Annotated[list[Annotated[Whole, Field(ge=0, le=MAX_INT32)]], Field(max_length=MAX_TOKENS)]


async def tokenize(gateway: Gateway, request: Request, body: dict[str, Any]) -> Response:  # Any: JSON
    """The tokens of a text, or of a chat with an answer's opening."""
    fields = parse(TokenizeRequest, body)
    model = gateway.served.find(fields.model)
    if (fields.prompt is None) == (fields.messages is None):
        raise invalid("one of prompt and messages is needed", "prompt", "missing_required_parameter")
    language = gateway.language
    if fields.messages is not None:
        messages = [message.for_template() for message in fields.messages]
        tokens = await language.run(partial(language.formats.prompt_ids, messages))
    else:
        special = fields.add_special_tokens is not False
        tokens = await language.run(partial(language.tokens_of, fields.prompt or "", special=special))
    made: dict[str, Any] = {
        "count": len(tokens),
        "max_model_len": gateway.served.max_length(model),
        "tokens": tokens,
    }
    if fields.return_token_strs:
        made["token_strs"] = [language.texts.text(token) for token in tokens]
    return JSONResponse(made)


async def detokenize(gateway: Gateway, request: Request, body: dict[str, Any]) -> Response:  # Any: JSON
    """The text of tokens."""
    fields = parse(DetokenizeRequest, body)
    gateway.served.find(fields.model)
    text = await gateway.language.run(partial(gateway.language.text_of, list(fields.tokens)))
    return JSONResponse({"prompt": text})
