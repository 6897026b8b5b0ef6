"""Messages of forward and backward requests: no session, each request after the answer to the last one."""

from __future__ import annotations

from dataclasses import dataclass

from tensor_codec.errors import (
    MessageError,
)
from tensor_codec.frame import Buffer
from tensor_codec.header import pack_header
from tensor_codec.messages.contract import CODEC_BYTES, CODECS, DTYPES, MAX_BLOCKS, MAX_TOKENS, Contract
from tensor_codec.messages.fields import Failed, read_failed, read_message, read_timings

COMPUTE_PROTOCOL = "/raceme/compute/1"  # a client and a peer, without a session


@dataclass(frozen=True, slots=True)
class Run:
    """What a stateless request is about: blocks [start, stop) on `batch` rows of equal length.

    dtype: what the peer is to compute in.  codec: how all tensors of the request and its answer travel.
    """

    model: str
    revision: str
    start: int
    stop: int
    batch: int
    dtype: str
    codec: str
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Forward:
    """Asks for what the blocks make of `hidden`: [batch, tokens, hidden], positions from 0."""

    run: Run
    hidden: Buffer


@dataclass(frozen=True, slots=True)
class Backward:
    """Asks for the gradient of a loss with respect to `hidden`, the blocks' input.

    grad: its gradient with respect to their output, [batch, tokens, hidden] like `hidden`.
    """

    run: Run
    hidden: Buffer
    grad: Buffer


@dataclass(frozen=True, slots=True)
class Output:
    """The answer to Forward or Backward: hidden states or gradients, in the shape of what came.

    timings: microseconds (in the peer's hands, computing), one pair or none.
    """

    body: Buffer
    timings: tuple[tuple[int, int], ...] = ()


def encode_request(message: Forward | Backward) -> list[Buffer]:
    """The parts of a frame."""
    run = message.run
    fields: dict[str, object] = {
        "k": "forward" if isinstance(message, Forward) else "backward",
        "model": run.model,
        "revision": run.revision,
        "start": run.start,
        "stop": run.stop,
        "batch": run.batch,
        "dtype": run.dtype,
        "codec": run.codec,
    }
    if run.adapter is not None:
        fields["adapter"] = run.adapter
    bodies = [message.hidden] if isinstance(message, Forward) else [message.hidden, message.grad]
    return [pack_header(fields), *bodies]


def decode_request(frame: Buffer) -> Forward | Backward:
    """Read a stateless request.  Raises MessageError.

    Its tensors are still of any size: `request_contract` checks that, once it is known whether the
    model is the right one.
    """
    message = read_message(frame, frozenset({"forward", "backward"}))
    header = message.header
    start = header.integer("start", 0, MAX_BLOCKS - 1)
    run = Run(
        model=header.text("model"),
        revision=header.text("revision", 128),
        start=start,
        stop=header.integer("stop", start + 1, MAX_BLOCKS),
        batch=header.integer("batch", 1, MAX_TOKENS),
        dtype=header.choice("dtype", DTYPES),
        codec=header.choice("codec", CODECS),
        adapter=header.text("adapter") if "adapter" in header else None,
    )
    if message.kind == "forward":
        return Forward(run, message.body)
    half, rest = divmod(len(message.body), 2)
    if rest:
        raise MessageError(f"{len(message.body)} body bytes are not two tensors of one size")
    return Backward(run, message.body[:half], message.body[half:])


def request_contract(message: Forward | Backward, hidden: int, max_step_tokens: int) -> Contract:
    """What a request's tensors and its answer are read against; its tokens stand as `max_length`.

    hidden: values per position in the model.  Raises MessageError unless the body is 1 position or
    more, and batch * tokens at most max_step_tokens.
    """
    run = message.run
    row_bytes = run.batch * hidden * CODEC_BYTES[run.codec]
    tokens, rest = divmod(len(message.hidden), row_bytes)
    room = max_step_tokens // run.batch
    if rest or not 0 < tokens <= room:
        raise MessageError(
            f"{len(message.hidden)} bytes of hidden states in {run.batch} rows, 1..{room} positions of"
            f" {row_bytes} bytes are allowed"
        )
    return Contract(
        session=b"",
        start=run.start,
        stop=run.stop,
        batch=run.batch,
        max_length=tokens,
        hidden=hidden,
        codec=run.codec,
        max_step_tokens=max_step_tokens,
    )


def encode_output(message: Output) -> list[Buffer]:
    """The parts of a frame."""
    fields: dict[str, object] = {"k": "output"}
    if message.timings:
        fields["t"] = message.timings
    return [pack_header(fields), message.body]


def decode_output(frame: Buffer, contract: Contract) -> Output | Failed:
    """Read the answer to a stateless request with this contract.  Raises MessageError."""
    message = read_message(frame, frozenset({"output", "failed"}))
    if message.kind == "failed":
        return read_failed(message)
    expected = contract.max_length * contract.row_bytes
    if len(message.body) != expected:
        raise MessageError(f"{len(message.body)} body bytes came back, {expected} were asked for")
    return Output(message.body, read_timings(message.header, 1))
