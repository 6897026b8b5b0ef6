"""The part of a chat that still fits into the model's context: pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Message = dict[str, str]  # role and content, as chat templates take them

# Of the context, after turns were dropped.  The caches are then filled anew, so not at every turn.
FREE_SHARE = 0.25


class MessageTooLong(ValueError):
    """The newest message does not fit, even alone."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """history: the rest of the chat.  ids: its tokens, the answer's opening included.

    dropped: the number of oldest turns that were left out.
    """

    history: list[Message]
    ids: list[int]
    dropped: int


def fit_history(
    history: Sequence[Message],
    tokens_of: Callable[[list[Message]], list[int]],
    max_length: int,
    max_new_tokens: int,
) -> Fitted:
    """Drop the oldest turns where the chat leaves no room for an answer; the system message stays.

    history: ends with the message to answer; a turn is a user's message and its answer.
    tokens_of: the model's chat template.  max_length: of chat and answer, in tokens.
    Raises MessageTooLong.
    """
    answer = min(max_new_tokens, max(1, int(FREE_SHARE * max_length)))
    kept, dropped = list(history), 0
    ids = tokens_of(kept)
    free = answer
    while len(ids) > max_length - free and (following := _second_turn(kept)) is not None:
        free = max(answer, int(FREE_SHARE * max_length))
        kept = [message for message in kept[:following] if message["role"] == "system"] + kept[following:]
        ids = tokens_of(kept)
        dropped += 1
    if len(ids) >= max_length:
        raise MessageTooLong(
            f"this message takes {len(ids)} tokens with what goes before it, {max_length - 1} are allowed"
        )
    return Fitted(kept, ids, dropped)


def _second_turn(history: Sequence[Message]) -> int | None:
    """Where the second turn begins; None where there is one alone."""
    users = [index for index, message in enumerate(history) if message["role"] == "user"]
    return users[1] if len(users) > 1 else None
