"""From the fields of a request to the arguments of `generate`: pure."""

from __future__ import annotations

from client.gateway.door.limits import RequestLimits
from client.gateway.jobs import Servers
from client.gateway.openai.errors import RequestError, invalid
from client.gateway.openai.requests import Raceme, SamplingFields
from client.generation.options import GenerateArguments
from routing.chains.alternatives import Constraints
from routing.names import PeerId

SMALLEST_TOP_P = 1e-9  # 0 of OpenAI's: the likeliest token alone
SEEDS = 2**64


def sampling_arguments(
    fields: SamplingFields, *, default_temperature: float, vocabulary: int, choice: int = 0
) -> GenerateArguments:
    """The arguments of one answer.  choice: of the answers to a prompt; each has a seed of its own.

    OpenAI's defaults hold, not those of the model's generation_config.json: a request without a field means
    here what it means there.  Raises RequestError.
    """
    made: GenerateArguments = {
        "generation_config": False,
        "temperature": default_temperature if fields.temperature is None else fields.temperature,
        "top_k": max(0, fields.top_k or 0),
    }
    if fields.top_p is not None:
        made["top_p"] = max(fields.top_p, SMALLEST_TOP_P)
    if fields.min_p is not None:
        made["min_p"] = fields.min_p
    if fields.repetition_penalty is not None:
        made["repetition_penalty"] = fields.repetition_penalty
    if fields.presence_penalty:
        made["presence_penalty"] = fields.presence_penalty
    if fields.frequency_penalty:
        made["frequency_penalty"] = fields.frequency_penalty
    if fields.logit_bias:
        made["logit_bias"] = {_token(key, vocabulary): bias for key, bias in fields.logit_bias.items()}
    if fields.stop:
        made["stop"] = fields.stop
    if fields.seed is not None:
        made["seed"] = (fields.seed + choice) % SEEDS
    return made


def _token(key: str, vocabulary: int) -> int:
    if not key.isascii() or not key.isdigit() or len(key) > 9 or int(key) >= vocabulary:
        param = f"logit_bias.{key[:40]}"
        raise invalid(f"{param} is no token of this model, 0 to {vocabulary - 1} are", param)
    return int(key)


def new_tokens(prompt: int, asked: int | None, longest: int, param: str) -> int:
    """The most tokens of an answer.  prompt: its tokens; asked: by the request; param: of the prompt.

    Raises RequestError where prompt and answer are longer than `longest`; its text is OpenAI's, by which
    programs know it.
    """
    if prompt >= longest or (asked is not None and prompt + asked > longest):
        answer = f"{asked} in the completion" if asked is not None else "1 in the completion at least"
        raise RequestError(
            400,
            f"This model's maximum context length is {longest} tokens. However, you requested"
            f" {prompt + (asked or 1)} tokens ({prompt} in the {param}, {answer}). Please reduce the length"
            f" of the {param} or completion.",
            param=param,
            code="context_length_exceeded",
        )
    return min(longest - prompt, RequestLimits().default_new_tokens) if asked is None else asked


def servers_of(raceme: Raceme | None) -> Servers | None:
    """The servers that a request may use; None: all of the gateway's.  Raises RequestError."""
    if raceme is None or (raceme.max_hops is None and not raceme.block_peers):
        return None
    servers = Servers(frozenset(PeerId(each) for each in raceme.block_peers or ()), raceme.max_hops)
    try:
        servers.within(Constraints()).check()
    except ValueError as error:
        raise invalid(f"raceme.block_peers: {error}", "raceme.block_peers") from None
    return servers
