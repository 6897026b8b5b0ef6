"""Messages of forward and backward requests: no session, each request after the answer to the one before."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tensor_codec.errors import MessageError
from tensor_codec.frame import Buffer
from tensor_codec.header import pack_header
from tensor_codec.messages.contract import MAX_TOKENS, VALUE_BYTES, WHOLE_CODECS, Contract, vector_bytes
from tensor_codec.messages.fields import Failed, no_body, read_failed, read_message, read_spec, read_timings
from tensor_codec.messages.gradients import Collect, Summed, read_collect, read_summed
from tensor_codec.span_spec import SpanSpec

COMPUTE_PROTOCOL = "/raceme/compute/1"  # a client and a peer, without a session
TAPE_ID_BYTES = 16  # of a tape's id


@dataclass(frozen=True, slots=True)
class Run:
    """What a stateless request asks for: the blocks of `spec`, on `batch` rows of equal length.

    codec: how all tensors of the request and its answer travel.
    prompts: positions of the deep prompts, 0 without them: every block adds a row of its own to its input at
    the first `prompts` positions.
    tape: the id of a tape, TAPE_ID_BYTES chosen by the client; b"" without one.  A Forward asks the peer to
    keep the graph of its computing under this id, and a Backward goes back through that graph.
    summed: where a Backward's gradients of its adapter are added; None: they are not computed.
    """

    spec: SpanSpec
    batch: int
    codec: str
    prompts: int = 0
    tape: bytes = b""
    summed: Summed | None = None


@dataclass(frozen=True, slots=True)
class Forward:
    """Asks for what the blocks make of `hidden`: [batch, tokens, hidden], positions from 0.

    prompts: [blocks, run.prompts, hidden], the same for all rows.
    """

    run: Run
    hidden: Buffer
    prompts: Buffer = b""


@dataclass(frozen=True, slots=True)
class Backward:
    """Asks for the gradient of a loss with respect to `hidden`, the blocks' input.

    grad: its gradient with respect to their output, [batch, tokens, hidden] like `hidden`.
    prompts: as in Forward; their gradient, summed over the rows, is a part of the answer.
    With a tape `hidden` and `prompts` are empty: the peer has them.
    """

    run: Run
    hidden: Buffer
    grad: Buffer
    prompts: Buffer = b""

    @property
    def of_tape(self) -> bool:
        """Whether it goes back through the graph of a Forward."""
        return bool(self.run.tape)


@dataclass(frozen=True, slots=True)
class Request:
    """A Forward or a Backward as it came: `divided` makes it one, where the model is known."""

    run: Run
    backward: bool
    body: Buffer

    def divided(self, hidden: int) -> Forward | Backward:
        """The request with its tensors apart.  hidden: values per position in the model.

        Raises MessageError where the body has no room for its prompts, or is not two tensors of one size.
        """
        if self.backward and self.run.tape:
            return Backward(self.run, b"", self.body)
        prompts = prompts_bytes(self.run, hidden)
        rest = len(self.body) - prompts
        if rest < 0:
            raise MessageError(
                f"{len(self.body)} body bytes, prompts of {self.run.prompts} positions take {prompts}"
            )
        if not self.backward:
            return Forward(self.run, self.body[:rest], self.body[rest:])
        half, odd = divmod(rest, 2)
        if odd:
            raise MessageError(f"{rest} body bytes are not two tensors of one size")
        return Backward(
            self.run, self.body[:half], self.body[half + prompts :], self.body[half : half + prompts]
        )


@dataclass(frozen=True, slots=True)
class Output:
    """The answer to Forward or Backward: hidden states or gradients, in the shape of what came.

    timings: microseconds (in the peer's hands, computing), one pair or none.
    prompts: the gradient of a Backward's prompts, in their shape.
    taped: the peer keeps the tape that a Forward asked for, for a while.
    """

    body: Buffer
    timings: tuple[tuple[int, int], ...] = ()
    prompts: Buffer = b""
    taped: bool = False


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
    if run.prompts:
        fields["prompts"] = run.prompts
    if run.tape:
        fields["tape"] = run.tape
    if run.summed is not None:
        fields |= {"sum": run.summed.name, "n": run.summed.number}
    if isinstance(message, Backward) and message.of_tape:
        return [pack_header(fields), message.grad]
    bodies = [message.hidden, *([message.prompts] if run.prompts else [])]
    if isinstance(message, Backward):
        bodies.append(message.grad)
    return [pack_header(fields), *bodies]


def decode_request(frame: Buffer) -> Request | Collect:
    """Read a stateless request.  Raises MessageError.

    The body may still be of any size: `Request.divided` and `request_contract` check that, once the model is
    known to be the right one.
    """
    message = read_message(frame, frozenset({"forward", "backward", "collect"}))
    header = message.header
    if message.kind == "collect":
        no_body(message)
        return read_collect(header)
    run = Run(
        read_spec(header),
        header.integer("batch", 1, MAX_TOKENS),
        header.choice("codec", WHOLE_CODECS),
        header.integer("prompts", 1, MAX_TOKENS) if "prompts" in header else 0,
        header.binary("tape", TAPE_ID_BYTES) if "tape" in header else b"",
        read_summed(header) if message.kind == "backward" else None,
    )
    return Request(run, message.kind == "backward", message.body)


def prompts_bytes(run: Run, hidden: int) -> int:
    """Bytes of a request's prompts.  hidden: values per position in the model."""
    return run.spec.blocks.size * run.prompts * hidden * VALUE_BYTES[run.codec]


def prompts_contract(contract: Contract, prompts: int) -> Contract:
    """What the prompts of a request with this contract are read against: [blocks, prompts, hidden]."""
    return replace(contract, batch=contract.stop - contract.start, max_length=prompts)


def request_contract(message: Forward | Backward, hidden: int, max_step_tokens: int) -> Contract:
    """What a request's tensors and its answer are read against; `max_length` is the number of tokens.

    hidden: values per position in the model.  Raises MessageError unless the hidden states are 1 position or
    more, and the positions of the prompts, and batch * tokens at most max_step_tokens.
    """
    run = message.run
    given, what = message.hidden, "hidden states"
    if isinstance(message, Backward) and message.of_tape:
        given, what = message.grad, "a gradient"
    row_bytes = run.batch * vector_bytes(run.codec, hidden)
    tokens, rest = divmod(len(given), row_bytes)
    room = max_step_tokens // run.batch
    if rest or not 0 < tokens <= room:
        raise MessageError(
            f"{len(given)} bytes of {what} in {run.batch} rows, 1..{room} positions of"
            f" {row_bytes} bytes are allowed"
        )
    if run.prompts > tokens:
        raise MessageError(f"prompts of {run.prompts} positions for rows of {tokens}")
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
    if message.taped:
        fields["tape"] = True
    parts: list[Buffer] = [pack_header(fields), message.body]
    return [*parts, message.prompts] if message.prompts else parts


def decode_output(frame: Buffer, contract: Contract, prompts: int = 0) -> Output | Failed:
    """Read the answer to a stateless request with this contract.  Raises MessageError.

    prompts: positions of prompts whose gradient comes too, 0 for none.
    """
    message = read_message(frame, frozenset({"output", "failed"}))
    if message.kind == "failed":
        return read_failed(message)
    first = contract.max_length * contract.row_bytes
    expected = first + (prompts * prompts_contract(contract, prompts).row_bytes if prompts else 0)
    if len(message.body) != expected:
        raise MessageError(f"{len(message.body)} body bytes came back, {expected} were asked for")
    return Output(
        message.body[:first],
        read_timings(message.header, 1),
        message.body[first:],
        message.header.flag("tape", absent=False),
    )
