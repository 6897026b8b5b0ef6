"""Hidden states to bytes and back, with the error that each codec adds.

The residual stream of a language model has outliers beyond fp16's range (98,561 in Gemma-3-270m),
so fp16 never travels.  fp32 is exact; bf16 adds a relative error of at most 2^-8 per value, which
is 6e-6 to 2e-5 of KL divergence in the logits of small models, and nothing where the sender
computes in bf16.  The length of a row of values is known to both sides from the contract.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tensor_codec.errors import BadResult, LocalProtocolError
from tensor_codec.frame import Buffer
from tensor_codec.messages.contract import Contract

WIRE_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def encode_hidden(hidden: Tensor, codec: str) -> memoryview:
    """Encode hidden states [batch, tokens, hidden] of any float dtype and device for the wire.

    Raises BadResult if a value is NaN or infinite: it must not leave this machine.
    """
    wire = hidden.detach().to(device="cpu", dtype=WIRE_DTYPES[codec]).contiguous()
    if not _all_finite(wire):
        raise BadResult("computed hidden states hold NaN or infinity")
    return _bytes_of(wire)


def decode_hidden(body: Buffer, contract: Contract) -> Tensor:
    """Decode a body to a float tensor [batch, tokens, hidden] in the codec's dtype, in memory of its own.

    The body's size was checked by `messages`.  Raises BadResult if a value is NaN or infinite.
    """
    tokens, rest = divmod(len(body), contract.row_bytes)
    if rest:
        raise LocalProtocolError(f"a body of {len(body)} bytes reached the codec unchecked")
    shape = (contract.batch, tokens, contract.hidden)
    hidden = torch.empty(shape, dtype=WIRE_DTYPES[contract.codec])
    # A copy, because the body starts anywhere in its frame: kernels want aligned memory.
    _bytes_of(hidden)[:] = memoryview(body)
    if not _all_finite(hidden):
        raise BadResult("received hidden states hold NaN or infinity")
    return hidden


def check_finite(body: Buffer, codec: str) -> None:
    """Raises BadResult if a value of an encoded body is NaN or infinite."""
    if len(body) and not _all_finite(_values(body, codec)):
        raise BadResult("received hidden states hold NaN or infinity")


def recode(body: Buffer, codec: str, to: str) -> Buffer:
    """Equal values, in equal order, in another codec; the body itself where `to` is its codec.

    To fp32 no value changes; to bf16 every value is rounded to the nearest, as `encode_hidden` does.
    """
    if codec == to:
        return body
    return _bytes_of(_values(body, codec).to(WIRE_DTYPES[to]))


def _values(body: Buffer, codec: str) -> Tensor:
    """The values of a body, in memory of their own."""
    return torch.from_numpy(np.frombuffer(body, np.uint8).copy()).view(WIRE_DTYPES[codec])


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, shared with it."""
    return memoryview(tensor.view(torch.uint8).reshape(-1).numpy().data)


def _all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; one reduction, since x * 0 is NaN exactly for these."""
    return bool((values * 0).sum(dtype=torch.float32) == 0)
