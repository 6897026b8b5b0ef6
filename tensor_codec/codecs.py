"""Hidden states to bytes and back, with the error that each codec adds.

The residual stream of a language model has outliers beyond fp16's range (98,561 in Gemma-3-270m),
so fp16 never travels.  fp32 is exact; bf16 adds a relative error of at most 2^-8 per value, which
is 6e-6 to 2e-5 of KL divergence in the logits of small models, and nothing where the sender
computes in bf16.  int8o (`outlier_rows`) takes half of bf16's bytes, and loses about ten times as much.
The length of a row of values is known to both sides from the contract.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tensor_codec.errors import BadResult, LocalProtocolError
from tensor_codec.frame import Buffer
from tensor_codec.messages.contract import OUTLIER_CODEC, Contract, vector_bytes
from tensor_codec.rows.outlier_rows import pack_rows, unpack_rows

# Of decoded values.  What int8o decodes to is exact in float32 alone.
WIRE_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    OUTLIER_CODEC: torch.float32,
}


def encode_hidden(hidden: Tensor, codec: str) -> memoryview:
    """Encode hidden states [batch, tokens, hidden] of any float dtype and device for the wire.

    Raises BadResult if a value is NaN or infinite: it must not leave this machine.
    """
    if codec == OUTLIER_CODEC:
        return _packed(hidden.detach().to("cpu").flatten(0, -2))
    wire = hidden.detach().to(device="cpu", dtype=WIRE_DTYPES[codec]).contiguous()
    if not _all_finite(wire):
        raise BadResult("computed hidden states hold NaN or infinity")
    return _bytes_of(wire)


def decode_hidden(body: Buffer, contract: Contract, *, packed: bool = False) -> Tensor:
    """Decode a body to a float tensor [batch, tokens, hidden] in the codec's dtype, in memory of its own.

    packed: the body is in int8o.  Its values are rounded to the contract's codec, as a sender keeps them.
    The body's size was checked by `messages`.  Raises BadResult if a value is NaN or infinite, and for a
    row that int8o cannot have.
    """
    tokens, rest = divmod(len(body), contract.packed_row_bytes if packed else contract.row_bytes)
    if rest:
        raise LocalProtocolError(f"a body of {len(body)} bytes reached the codec unchecked")
    shape = (contract.batch, tokens, contract.hidden)
    if packed:
        return _unpacked(body, contract.hidden).view(shape).to(WIRE_DTYPES[contract.codec])
    hidden = torch.empty(shape, dtype=WIRE_DTYPES[contract.codec])
    # A copy, because the body starts anywhere in its frame: kernels want aligned memory.
    _bytes_of(hidden)[:] = memoryview(body)
    if not _all_finite(hidden):
        raise BadResult("received hidden states hold NaN or infinity")
    return hidden


def decode_rows(body: Buffer, codec: str, hidden: int) -> Tensor:
    """Decode whole rows of `hidden` values to [rows, hidden] as `decode_hidden` does.  Raises BadResult."""
    if codec == OUTLIER_CODEC:
        return _unpacked(body, hidden)
    values = _values(body, codec)
    if not _all_finite(values):
        raise BadResult("received hidden states hold NaN or infinity")
    return values.view(-1, hidden)


def check_finite(body: Buffer, codec: str, hidden: int) -> None:
    """Raises BadResult for an encoded body that `decode_rows` would refuse."""
    if len(body):
        decode_rows(body, codec, hidden)


def recode(body: Buffer, codec: str, to: str, hidden: int) -> Buffer:
    """Equal values, in equal order, in another codec; the body itself where `to` is its codec.

    hidden: values of a row.  To fp32 no value changes; to bf16 and int8o every value is rounded as
    `encode_hidden` does.
    """
    if codec == to:
        return body
    values = _unpacked(body, hidden) if codec == OUTLIER_CODEC else _values(body, codec)
    if to == OUTLIER_CODEC:
        return _packed(values.view(-1, hidden))
    return _bytes_of(values.to(WIRE_DTYPES[to]))


@dataclass(frozen=True, slots=True)
class PackedBody:
    """Hidden states that travel in int8o.

    wire: in int8o.  kept: the values that arrive, in another codec: a replay sends these.
    """

    wire: Buffer
    kept: Buffer


def pack(body: Buffer, codec: str, hidden: int) -> PackedBody:
    """An encoded body in int8o, and the values that are left in its own codec.

    hidden: values of a row.  Raises BadResult for a value beyond bfloat16's range.
    """
    wire = recode(body, codec, OUTLIER_CODEC, hidden)
    return PackedBody(wire, recode(wire, OUTLIER_CODEC, codec, hidden))


def _packed(rows: Tensor) -> memoryview:
    return memoryview(pack_rows(rows).reshape(-1).data)


def _unpacked(body: Buffer, hidden: int) -> Tensor:
    if not len(body):
        return torch.empty(0, hidden)
    packed = np.frombuffer(body, np.uint8)
    return unpack_rows(packed.reshape(-1, vector_bytes(OUTLIER_CODEC, hidden)), hidden)


def _values(body: Buffer, codec: str) -> Tensor:
    """The values of a body, in memory of their own."""
    return torch.from_numpy(np.frombuffer(body, np.uint8).copy()).view(WIRE_DTYPES[codec])


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, shared with it."""
    return memoryview(tensor.view(torch.uint8).reshape(-1).numpy().data)


def _all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; one reduction, since x * 0 is NaN exactly for these."""
    return bool((values * 0).sum(dtype=torch.float32) == 0)
