"""The one error of this folder: a request that cannot be served as it is."""

from __future__ import annotations

MAX_TEXT = 300  # characters of a library's message that a client sees


class FormatError(ValueError):
    """A request is wrong.  param: the dotted path of the field; code: OpenAI's, or None."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


def one_line(error: object) -> str:
    """A library's message for a client: one line, not too long."""
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
