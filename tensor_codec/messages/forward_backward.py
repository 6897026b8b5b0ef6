"""Messages of forward and backward requests: no session, each request after the answer to the one before."""

from __future__ import annotations

from dataclasses import dataclass

from tensor_codec.errors import MessageError
from tensor_codec.frame import Buffer
from tensor_codec.header import pack_header
from tensor_codec.messages.contract import CODEC_BYTES, CODECS, MAX_TOKENS, Contract
from tensor_codec.messages.fields import Failed, read_failed, read_message, read_spec, read_timings
from tensor_codec.span_spec import SpanSpec

COMPUTE_PROTOCOL = "/raceme/compute/1"  # a client and a peer, without a session


@dataclass(frozen=True, slots=True)
class Run:
    """What a stateless request asks for: the blocks of `spec`, on `batch` rows of equal length.

    codec: how all tensors of the request and its answer travel.
    """

    spec: SpanSpec
    batch: int
    codec: str


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
    run, spec = message.run, message.run.spec
    fields: dict[str, object] = {
        "k": "forward" if isinstance(message, Forward) else "backward",
        "model": spec.model,
        "revision": spec.revision,
        "start": spec.blocks.start,
        "stop": spec.blocks.stop,
        "batch": run.batch,
        "dtype": spec.dtype,
        "codec": run.codec,
    }
    if spec.adapter is not None:
        fields["adapter"] = spec.adapter
    bodies = [message.hidden] if isinstance(message, Forward) else [message.hidden, message.grad]
    return [pack_header(fields), *bodies]


def decode_request(frame: Buffer) -> Forward | Backward:
    """Read a stateless request.  Raises MessageError.

    The tensors may still be of any size: `request_contract` checks that, once the model is known to be the
    right one.
    """
    message = read_message(frame, frozenset({"forward", "backward"}))
    header = message.header
    run = Run(read_spec(header), header.integer("batch", 1, MAX_TOKENS), header.choice("codec", CODECS))
    if message.kind == "forward":
        return Forward(run, message.body)
    half, rest = divmod(len(message.body), 2)
    if rest:
        raise MessageError(f"{len(message.body)} body bytes are not two tensors of one size")
    return Backward(run, message.body[:half], message.body[half:])


def request_contract(message: Forward | Backward, hidden: int, max_step_tokens: int) -> Contract:
    """What a request's tensors and its answer are read against; `max_length` is the number of tokens.

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
        start=run.spec.blocks.start,
        stop=run.spec.blocks.stop,
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
