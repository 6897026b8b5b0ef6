"""The metrics of clients and gateways by name, kind, unit and labels; docs/metrics.md has the same table."""

from __future__ import annotations

from node.monitor.metrics.families import Family

MAX_HOPS = 8  # with series of their own; further hops count as the last of them
STEP_KINDS = ("decode", "prefill")
WHY = ("gone", "slow", "bad", "draining", "refused")
WHY_REROUTED = (*WHY, "moved")
ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/models",
    "/v1/models/{id}",
    "/tokenize",
    "/detokenize",
    "/api",
    "/health",
    "/ready",
    "/metrics",
    "page",
    "other",
)
REASONS = (
    "queue_full",
    "queue_time",
    "rate",
    "key",
    "host",
    "origin",
    "draining",
    "other",
)
CANCELLED_BY = ("client", "deadline", "shutdown")


def _of(*values: str) -> str:
    return ", ".join(values)


_ROUTE = {"route": _of(*ROUTES)}

SESSIONS_OPENED = Family(
    "raceme_client_sessions_opened", "counter", "Sessions that were opened along a chain."
)
OPEN_SECONDS = Family(
    "raceme_client_open_seconds", "histogram", "Time to open a session at all hops of its chain.", "seconds"
)
STEP_SECONDS = Family(
    "raceme_client_step_seconds", "histogram", "Time from a step's sending to its answer.", "seconds",
    {"kind": _of(*STEP_KINDS)},
)  # fmt: skip
HELD_SECONDS = Family(
    "raceme_client_hop_held_seconds", "histogram",
    "Time that a hop had a decode step in its hands, waiting and computing.", "seconds",
    {"hop": f"position in the chain, 0 to {MAX_HOPS - 1}"},
)  # fmt: skip
FAULTS = Family(
    "raceme_client_faults", "counter", "Hops that sessions have lost or left.", labels={"why": _of(*WHY)}
)
REROUTES = Family(
    "raceme_client_reroutes", "counter", "Changes of a session's chain; moved: without a fault.",
    labels={"why": _of(*WHY_REROUTED)},
)  # fmt: skip
RECOVERY_SECONDS = Family(
    "raceme_client_recovery_seconds",
    "histogram",
    "Time from the loss of a hop to the next answer.",
    "seconds",
)
REPLAYED = Family(
    "raceme_client_replayed_bytes",
    "counter",
    "Bytes of hidden states that were sent again for a replay.",
    "bytes",
)
RELAYED = Family(
    "raceme_client_relayed",
    "counter",
    "Pairs of hops that could not reach each other: the client carries for them.",
)

REQUESTS = Family(
    "raceme_gateway_requests", "counter", "Requests that were answered, by HTTP status.",
    labels={**_ROUTE, "status": "of HTTP"},
)  # fmt: skip
FIRST_TOKEN = Family(
    "raceme_gateway_time_to_first_token_seconds", "histogram",
    "Time from a request's arrival to its first token.", "seconds", _ROUTE,
)  # fmt: skip
OUTPUT_TOKEN = Family(
    "raceme_gateway_time_per_output_token_seconds", "histogram", "Time from a token to the next.",
    "seconds", _ROUTE,
)  # fmt: skip
REQUEST_SECONDS = Family(
    "raceme_gateway_request_seconds", "histogram", "Time from a request's arrival to the end of its answer.",
    "seconds", _ROUTE,
)  # fmt: skip
QUEUE_SECONDS = Family(
    "raceme_gateway_queue_seconds", "histogram", "Time that a request waited for admission.", "seconds"
)
PROMPT_TOKENS = Family("raceme_gateway_prompt_tokens", "counter", "Tokens of prompts.", "tokens")
CACHED_TOKENS = Family(
    "raceme_gateway_cached_prompt_tokens", "counter", "Tokens of prompts that the servers' caches held.",
    "tokens",
)  # fmt: skip
GENERATED_TOKENS = Family(
    "raceme_gateway_generated_tokens", "counter", "Tokens that were generated.", "tokens"
)
ACTIVE = Family("raceme_gateway_active", "gauge", "Requests that are served now.")
QUEUED = Family("raceme_gateway_queued", "gauge", "Requests that wait for admission.")
REJECTED = Family(
    "raceme_gateway_rejected", "counter", "Requests that were turned away.", labels={"reason": _of(*REASONS)}
)
CANCELLED = Family(
    "raceme_gateway_cancelled", "counter", "Requests that ended before their answer was complete.",
    labels={"by": _of(*CANCELLED_BY)},
)  # fmt: skip
READY = Family("raceme_gateway_ready", "gauge", "1 while /ready answers 200.")

CLIENT_FAMILIES = (
    SESSIONS_OPENED, OPEN_SECONDS, STEP_SECONDS, HELD_SECONDS, FAULTS, REROUTES, RECOVERY_SECONDS, REPLAYED,
    RELAYED,
)  # fmt: skip
GATEWAY_FAMILIES = (
    REQUESTS, FIRST_TOKEN, OUTPUT_TOKEN, REQUEST_SECONDS, QUEUE_SECONDS, PROMPT_TOKENS, CACHED_TOKENS,
    GENERATED_TOKENS, ACTIVE, QUEUED, REJECTED, CANCELLED, READY,
)  # fmt: skip
