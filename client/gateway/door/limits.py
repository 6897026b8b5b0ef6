"""The limits of a gateway, each with its unit and the origin of its number."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Limits of one connection and one request.  docs/gateway.md says the answer to each breach."""

    max_body_bytes: int = 4 << 20  # a prompt of a million tokens, as text; more than any context here
    max_bodies_bytes: int = (
        256 << 20
    )  # of all requests that are read, wait or are answered: 64 of the largest
    # Lists and objects in one another: a schema of OpenAI's 10 levels has 30, and code that reads a body
    # calls itself at each level (Python's own bound is 1,000 calls).
    max_body_levels: int = 128
    max_header_bytes: int = 32 << 10  # of all headers and the URL: twice the usual limit of proxies
    header_seconds: float = 10.0  # from a connection, or from its last answer's end, to a whole header
    body_seconds: float = 30.0  # for a whole body
    reader_seconds: float = 30.0  # without a byte taken by a reader that has to take some
    max_connections: int = (
        1024  # streams, requests that wait, idle connections; of descriptors there are more
    )
    # Of one address (of IPv6: of one /64) besides the loopback's: more than a browser's six and a busy
    # program's pool of 100; eight such addresses fill all.
    max_connections_per_address: int = 128
    idle_seconds: float = 75.0  # of a connection between two requests: longer than balancers keep one (60 s)
    first_token_seconds: float = 2.0  # for an error to become a status, before a stream's status is sent
    keep_alive_seconds: float = 10.0  # of silence in a stream; balancers cut at 60
    drain_seconds: float = 30.0  # for the requests that run when the gateway ends


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Limits of the admission queue.  docs/gateway.md says the answer to each breach."""

    # A server takes 64 sessions of one peer: these and the kept conversations (`PrefixLimits`).
    max_concurrent: int = 48
    max_queued: int = 64  # at some seconds an answer this is all that fits into `queue_seconds`
    queue_seconds: float = 30.0  # balancers cut at 60


@dataclass(frozen=True, slots=True)
class PrefixLimits:
    """Limits of the conversations that are kept for the next turn."""

    max_conversations: int = 16  # with `max_concurrent` the 64 sessions that a server takes of one peer
    max_tokens: int = 8192  # of all of them: an eighth of a server's usual cache, half of a peer's share
    idle_seconds: float = 50.0  # servers end a session that is idle for 60 s
    least_tokens: int = 16  # of a common prefix: fewer cost no more than a step


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits of the fields of a request: OpenAI's where it has one."""

    max_stops: int = 4
    max_stop_characters: int = 256
    max_choices: int = 4  # each is a session of its own; OpenAI has 128
    max_prompts: int = 8  # of one request for completions
    max_top_logprobs: int = 20
    max_completion_logprobs: int = 5
    max_biases: int = 300
    max_tools: int = 128
    default_new_tokens: int = 1024  # without max_tokens, or what is left of the model's length
