"""The messages of sessions and of stateless requests, and the only code that reads them from the wire.

    client -> hop      Open, then Step..., then Close (or the end of the stream)
    hop -> client      Opened or Failed, then Result... and Failed
    hop -> next hop    Step..., each naming its session

When hops of a session are replaced, and to find out who has to be:

    client -> hop      Relink and then Resume; Where
    hop -> client      Relinked; Here

    client -> peer     Forward or Backward: without a session, each after the answer to the last one
    peer -> client     Output or Failed

Shapes are worked out from the contract that was agreed at open (a stateless request brings its own)
and the size of the body; they are never read from the wire.  Bodies stay bytes here: `compression`
makes tensors of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from tensor_codec.errors import (
    REFUSALS,
    BadResult,
    MessageError,
    PeerFault,
    PeerGone,
    Refused,
    RemoteProtocolError,
    SlowPeer,
)
from tensor_codec.frame import Buffer
from tensor_codec.header import Header, pack_header, split_message

SESSION_PROTOCOL = "/raceme/session/1"  # a client and a hop
PUSH_PROTOCOL = "/raceme/push/1"  # a hop and the next one
COMPUTE_PROTOCOL = "/raceme/compute/1"  # a client and a peer, without a session
SESSION_ID_BYTES = 16
CODEC_BYTES: dict[str, int] = {"fp32": 4, "bf16": 2}  # bytes per value on the wire
DTYPES = frozenset({"float32", "bfloat16", "float16"})
CODECS = frozenset(CODEC_BYTES)
MAX_BLOCKS = 4096
MAX_TOKENS = 1 << 24  # a sanity bound; the real ones are the contract and the limits
MAX_HOPS = 64
MAX_QUEUE = 1e6  # times a step's computing, that it waits

Reply = Literal["all", "last", "none", "replay"]
REPLIES: dict[int, Reply] = {0: "all", 1: "last", 2: "none", 3: "replay"}
_REPLY_CODES: dict[Reply, int] = {name: code for code, name in REPLIES.items()}

# What a Failed can say besides the refusals, and what it means for whoever reads it.
FAULTS: dict[str, type[PeerFault]] = {
    "protocol": RemoteProtocolError,  # you sent what must not come now
    "message": MessageError,  # you sent what cannot be read
    "bad_values": BadResult,  # NaN or infinity, found at the door or after computing
    "cannot_push": PeerGone,  # the next hop is gone or slow; `peer` names it
    "ended": PeerGone,  # the session is over here: idle, too old, or shut down
    "leaving": PeerGone,  # the session goes on for a while, but this node is about to leave
}
MAX_STEP = 1 << 53
MAX_EPOCH = 1 << 31


@dataclass(frozen=True, slots=True)
class Contract:
    """What both ends of a session agreed on; every later message is read against it.

    batch: rows; hidden: values per position; max_length: positions the cache may hold per row;
    codec: how hidden states travel; max_step_tokens: batch * tokens of one step, but never less than one
    position of all rows.
    """

    session: bytes
    start: int
    stop: int
    batch: int
    max_length: int
    hidden: int
    codec: str
    max_step_tokens: int

    @property
    def row_bytes(self) -> int:
        """Wire bytes of one position of all rows."""
        return self.batch * self.hidden * CODEC_BYTES[self.codec]

    @property
    def max_tokens(self) -> int:
        """Positions that one step may carry."""
        return min(self.max_length, max(1, self.max_step_tokens // self.batch))


@dataclass(frozen=True, slots=True)
class Open:
    """Opens a session at one hop, for blocks [start, stop) of its span.

    predecessor: the peer that will push steps, or None where the client itself sends them;
    successor: the peer to push outputs to, or None where they go back to the client.
    relay: the client carries them on to a next hop, so the session does not end here.
    epoch: of the session's route; grows with every change of it.
    held: steps are to wait for a Resume.
    """

    session: bytes
    model: str
    revision: str
    start: int
    stop: int
    batch: int
    max_length: int
    dtype: str
    codec: str
    predecessor: str | None = None
    successor: str | None = None
    adapter: str | None = None
    relay: bool = False
    epoch: int = 0
    held: bool = False


@dataclass(frozen=True, slots=True)
class Opened:
    """The hop took the session.

    push: it has a stream to the successor (else relay).  cut: its caches can go back to a lower
    position; where not, only to none.  queue: how long a decode step waits there now, in times of its own
    computing, as in the hop's record, which may be older.
    """

    push: bool
    cut: bool = True
    queue: float = 0.0


@dataclass(frozen=True, slots=True)
class Relink:
    """The session's route has changed: new neighbours.  Steps of older epochs are to be forgotten.

    The hop answers with Relinked, and takes no step before Resume.
    codec: how hidden states travel in this epoch and later, where that changes; the hop brings the outputs
    that it keeps into it.  Only to a wider one, once the cache holds anything.
    """

    epoch: int
    predecessor: str | None = None
    successor: str | None = None
    relay: bool = False
    codec: str | None = None


@dataclass(frozen=True, slots=True)
class Relinked:
    """Where a hop stands.

    push, cut: as in Opened.  length: positions in its cache.  step: the last one that it computed,
    or None.  kept: of its outputs, those of positions [kept, length) can be sent again.
    codec: in which hidden states travel now, where Relink named one.
    """

    epoch: int
    push: bool
    length: int
    kept: int
    step: int | None = None
    cut: bool = True
    codec: str | None = None


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on in this epoch.

    length: of the cache: what comes behind is to be forgotten.
    has: positions that the successor has.  stop: outputs of [has, stop) are to be sent again to it;
    of what is replayed to this hop it needs nothing below `has`.
    """

    epoch: int
    length: int
    has: int = 0
    stop: int = 0


@dataclass(frozen=True, slots=True)
class Where:
    """Asks a hop how far it is, and so whether it lives at all."""


@dataclass(frozen=True, slots=True)
class Here:
    """The answer: the last step that was computed, or None; positions cached; steps that wait."""

    length: int
    waiting: int
    step: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """Hidden states for the next positions of a session.

    step: a number that only grows; the same one again is a retry.
    position: of the first token in the session; lower than the cache's length cuts it there.
    reply: which positions the last hop sends back to the client; "replay": none, and the step, which
    has no number, fills a new hop's cache with what the hop that it replaces was given.
    timings: for each hop passed so far, microseconds (in its hands, computing).
    body: [batch, tokens, hidden] in the contract's codec.
    epoch: of the route that it takes.  bulk: it does not travel with other sessions' single tokens.
    rope_length: see `StepRange`.
    """

    session: bytes
    step: int
    position: int
    reply: Reply
    body: Buffer
    timings: tuple[tuple[int, int], ...] = ()
    epoch: int = 0
    bulk: bool = False
    rope_length: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """A hop's answer to a step: the positions asked for, or none.

    position: of the first token of the body in the session.
    epoch: of the route.  replay: to be carried on, no answer to a step of the client's.
    rope_length: of a replay, see `StepRange`.
    """

    step: int
    position: int
    body: Buffer
    timings: tuple[tuple[int, int], ...] = ()
    epoch: int = 0
    replay: bool = False
    rope_length: int = 0


@dataclass(frozen=True, slots=True)
class Close:
    """The client needs the session no more."""


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


@dataclass(frozen=True, slots=True)
class Failed:
    """A session could not be opened, or a step or a stateless request could not be done.

    code: a key of REFUSALS or FAULTS.  peer: whom the fault concerns, if not the sender.
    """

    code: str
    message: str
    retry_after_seconds: float | None = None
    step: int | None = None
    peer: str | None = None

    def error(self) -> Refused | PeerFault:
        """The exception that says the same."""
        if self.code in REFUSALS:
            return REFUSALS[self.code](self.message, self.retry_after_seconds)
        return FAULTS[self.code](self.message)

    @staticmethod
    def of(error: Refused | PeerFault, step: int | None = None, peer: str | None = None) -> Failed:
        """The message that says what `error` says."""
        text = "".join(c if c.isprintable() else " " for c in str(error))[:300] or type(error).__name__
        if isinstance(error, Refused):
            known = error.code if error.code in REFUSALS else Refused.code
            return Failed(known, text, error.retry_after_seconds, step, peer)
        if isinstance(error, PeerGone | SlowPeer):
            return Failed("ended", text, None, step, peer)
        code = next((code for code, kind in FAULTS.items() if isinstance(error, kind)), "message")
        return Failed(code, text, None, step, peer)


_FAILURE_CODES = frozenset(REFUSALS) | frozenset(FAULTS)


@dataclass(frozen=True, slots=True)
class Message:
    """A frame split into kind, header and body; `read_*` makes it a value."""

    kind: str
    header: Header
    body: memoryview


def read_message(frame: Buffer, allowed: frozenset[str]) -> Message:
    """Split a frame and check its kind.  Raises MessageError."""
    header, body = split_message(frame)
    return Message(header.choice("k", allowed), header, body)


def encode_open(message: Open) -> list[Buffer]:
    """The parts of a frame."""
    fields: dict[str, object] = {
        "k": "open",
        "s": message.session,
        "model": message.model,
        "revision": message.revision,
        "start": message.start,
        "stop": message.stop,
        "batch": message.batch,
        "max_length": message.max_length,
        "dtype": message.dtype,
        "codec": message.codec,
    }
    for name in ("predecessor", "successor", "adapter"):
        if (value := getattr(message, name)) is not None:
            fields[name] = value
    for name in ("relay", "epoch", "held"):
        if value := getattr(message, name):
            fields[name] = value
    return [pack_header(fields)]


def decode_open(frame: Buffer) -> Open:
    """Read the first message of a session stream.  Raises MessageError."""
    message = read_message(frame, frozenset({"open"}))
    _no_body(message)
    header = message.header
    start = header.integer("start", 0, MAX_BLOCKS - 1)
    return Open(
        session=header.binary("s", SESSION_ID_BYTES),
        model=header.text("model"),
        revision=header.text("revision", 128),
        start=start,
        stop=header.integer("stop", start + 1, MAX_BLOCKS),
        batch=header.integer("batch", 1, MAX_TOKENS),
        max_length=header.integer("max_length", 1, MAX_TOKENS),
        dtype=header.choice("dtype", DTYPES),
        codec=header.choice("codec", CODECS),
        predecessor=_peer(header, "predecessor"),
        successor=_peer(header, "successor"),
        adapter=header.text("adapter") if "adapter" in header else None,
        relay=_flag(header, "relay"),
        epoch=_epoch(header, "epoch"),
        held=_flag(header, "held"),
    )


def encode_opened(message: Opened) -> list[Buffer]:
    """The parts of a frame."""
    fields = {"k": "opened", "push": message.push, "cut": message.cut, "q": float(message.queue)}
    return [pack_header(fields)]


def decode_open_reply(frame: Buffer) -> Opened | Failed:
    """Read a hop's answer to Open.  Raises MessageError."""
    message = read_message(frame, frozenset({"opened", "failed"}))
    if message.kind == "failed":
        return _read_failed(message)
    _no_body(message)
    header = message.header
    queue = header.number("q", 0.0, MAX_QUEUE) if "q" in header else 0.0
    return Opened(header.flag("push"), _flag(header, "cut", absent=True), queue)


def encode_relink(message: Relink) -> list[Buffer]:
    """The parts of a frame."""
    fields: dict[str, object] = {"k": "relink", "e": message.epoch}
    for name in ("predecessor", "successor", "relay", "codec"):
        if value := getattr(message, name):
            fields[name] = value
    return [pack_header(fields)]


def encode_relinked(message: Relinked) -> list[Buffer]:
    """The parts of a frame."""
    fields: dict[str, object] = {
        "k": "relinked",
        "e": message.epoch,
        "push": message.push,
        "cut": message.cut,
        "p": message.length,
        "kept": message.kept,
    }
    if message.step is not None:
        fields["n"] = message.step
    if message.codec is not None:
        fields["codec"] = message.codec
    return [pack_header(fields)]


def encode_resume(message: Resume) -> list[Buffer]:
    """The parts of a frame."""
    return [
        pack_header(
            {"k": "resume", "e": message.epoch, "p": message.length, "has": message.has, "stop": message.stop}
        )
    ]


def encode_where() -> list[Buffer]:
    """The parts of a frame."""
    return [pack_header({"k": "where"})]


def encode_here(message: Here) -> list[Buffer]:
    """The parts of a frame."""
    fields: dict[str, object] = {"k": "here", "p": message.length, "waiting": message.waiting}
    if message.step is not None:
        fields["n"] = message.step
    return [pack_header(fields)]


def encode_step(message: Step) -> list[Buffer]:
    """The parts of a frame."""
    fields: dict[str, object] = {
        "k": "step",
        "s": message.session,
        "n": message.step,
        "p": message.position,
        "r": _REPLY_CODES[message.reply],
    }
    if message.timings:
        fields["t"] = message.timings
    if message.epoch:
        fields["e"] = message.epoch
    if message.bulk:
        fields["b"] = True
    if message.rope_length:
        fields["l"] = message.rope_length
    return [pack_header(fields), message.body]


def step_session(message: Message) -> bytes:
    """The session that a Step belongs to: needed to find the contract it is read against."""
    return message.header.binary("s", SESSION_ID_BYTES)


def step_epoch(message: Message) -> int:
    """The epoch of a Step that is not for us to read."""
    return _epoch(message.header, "e")


def read_step(message: Message, contract: Contract) -> Step:
    """Read a Step against its contract.  Raises MessageError.

    The position may be anywhere below max_length; whether it continues the cache is for the
    session to say.
    """
    header = message.header
    session = step_session(message)
    if session != contract.session:
        raise MessageError("a step of another session")
    position = header.integer("p", 0, contract.max_length - 1)
    tokens, rest = divmod(len(message.body), contract.row_bytes)
    room = min(contract.max_tokens, contract.max_length - position)
    if rest or not 0 < tokens <= room:
        raise MessageError(
            f"{len(message.body)} body bytes at position {position}, 1..{room} positions of"
            f" {contract.row_bytes} bytes are allowed"
        )
    return Step(
        session=session,
        step=header.integer("n", 0, MAX_STEP),
        position=position,
        reply=REPLIES[header.integer("r", 0, len(REPLIES) - 1)],
        body=message.body,
        timings=_read_timings(header),
        epoch=_epoch(header, "e"),
        bulk=_flag(header, "b"),
        rope_length=_rope_length(header, contract),
    )


def encode_result(message: Result) -> list[Buffer]:
    """The parts of a frame."""
    fields: dict[str, object] = {"k": "result", "n": message.step, "p": message.position}
    if message.timings:
        fields["t"] = message.timings
    if message.epoch:
        fields["e"] = message.epoch
    if message.replay:
        fields["replay"] = True
    if message.rope_length:
        fields["l"] = message.rope_length
    return [pack_header(fields), message.body]


def encode_failed(message: Failed) -> list[Buffer]:
    """The parts of a frame."""
    fields: Mapping[str, object] = {
        "k": "failed",
        "code": message.code,
        "message": message.message,
        "retry": message.retry_after_seconds,
        "n": message.step,
        "peer": message.peer,
    }
    return [pack_header({name: value for name, value in fields.items() if value is not None})]


def encode_close() -> list[Buffer]:
    """The parts of a frame."""
    return [pack_header({"k": "close"})]


FromClient = Step | Close | Relink | Resume | Where
FromHop = Result | Failed | Relinked | Here
_FROM_CLIENT = frozenset({"step", "close", "relink", "resume", "where"})
_FROM_HOP = frozenset({"result", "failed", "relinked", "here"})


def decode_from_client(frame: Buffer, contract: Contract) -> FromClient:
    """Read what a client sends after Open.  Raises MessageError."""
    message = read_message(frame, _FROM_CLIENT)
    if message.kind == "step":
        return read_step(message, contract)
    _no_body(message)
    if message.kind == "relink":
        return _read_relink(message.header)
    if message.kind == "resume":
        return _read_resume(message.header, contract)
    return Where() if message.kind == "where" else Close()


def decode_from_hop(
    frame: Buffer, contract: Contract, contract_in: Callable[[int], Contract] | None = None
) -> FromHop:
    """Read what a hop sends after Opened.  Raises MessageError.

    contract_in: what was agreed on in an epoch, where that is not the same for all.
    """
    message = read_message(frame, _FROM_HOP)
    if message.kind == "result":
        epoch = _epoch(message.header, "e")
        return _read_result(message, contract if contract_in is None else contract_in(epoch), epoch)
    if message.kind == "failed":
        return _read_failed(message)
    _no_body(message)
    return (_read_relinked if message.kind == "relinked" else _read_here)(message.header, contract)


def _read_result(message: Message, contract: Contract, epoch: int) -> Result:
    tokens, rest = divmod(len(message.body), contract.row_bytes)
    position = message.header.integer("p", 0, contract.max_length)
    if rest or tokens > min(contract.max_tokens, contract.max_length - position):
        raise MessageError(f"{len(message.body)} body bytes are not whole rows of {contract.row_bytes}")
    return Result(
        message.header.integer("n", 0, MAX_STEP),
        position,
        message.body,
        _read_timings(message.header),
        epoch,
        _flag(message.header, "replay"),
        _rope_length(message.header, contract),
    )


def _read_relink(header: Header) -> Relink:
    return Relink(
        _epoch(header, "e"),
        _peer(header, "predecessor"),
        _peer(header, "successor"),
        _flag(header, "relay"),
        _codec(header),
    )


def _read_resume(header: Header, contract: Contract) -> Resume:
    length, has, stop = (header.integer(name, 0, contract.max_length) for name in ("p", "has", "stop"))
    if stop > length:
        raise MessageError(f"outputs up to {stop} are to be sent again, the cache is to hold {length}")
    return Resume(_epoch(header, "e"), length, has, stop)


def _read_relinked(header: Header, contract: Contract) -> Relinked:
    length = header.integer("p", 0, contract.max_length)
    return Relinked(
        _epoch(header, "e"),
        header.flag("push"),
        length,
        header.integer("kept", 0, length),
        _last_step(header),
        header.flag("cut"),
        _codec(header),
    )


def _read_here(header: Header, contract: Contract) -> Here:
    length = header.integer("p", 0, contract.max_length)
    return Here(length, header.integer("waiting", 0, MAX_TOKENS), _last_step(header))


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
        return _read_failed(message)
    expected = contract.max_length * contract.row_bytes
    if len(message.body) != expected:
        raise MessageError(f"{len(message.body)} body bytes came back, {expected} were asked for")
    return Output(message.body, _read_timings(message.header, 1))


def _read_failed(message: Message) -> Failed:
    _no_body(message)
    header = message.header
    return Failed(
        code=header.choice("code", _FAILURE_CODES),
        message=header.text("message", 300),
        retry_after_seconds=header.number("retry", 0.0, 3600.0) if "retry" in header else None,
        step=_last_step(header),
        peer=_peer(header, "peer"),
    )


def _codec(header: Header) -> str | None:
    return header.choice("codec", CODECS) if "codec" in header else None


def _last_step(header: Header) -> int | None:
    return header.integer("n", 0, MAX_STEP) if "n" in header else None


def _epoch(header: Header, name: str) -> int:
    return header.integer(name, 0, MAX_EPOCH) if name in header else 0


def _rope_length(header: Header, contract: Contract) -> int:
    return header.integer("l", 0, contract.max_length) if "l" in header else 0


def _flag(header: Header, name: str, *, absent: bool = False) -> bool:
    return header.flag(name) if name in header else absent


def _peer(header: Header, name: str) -> str | None:
    return header.text(name, 128) if name in header else None


def _read_timings(header: Header, most: int = MAX_HOPS) -> tuple[tuple[int, int], ...]:
    if "t" not in header:
        return ()
    pairs = header.items("t", most)
    for pair in pairs:
        if type(pair) is not list or len(pair) != 2 or any(type(n) is not int or n < 0 for n in pair):
            raise MessageError("timings are pairs of microseconds")
    return tuple((held, computing) for held, computing in pairs)


def _no_body(message: Message) -> None:
    if len(message.body):
        raise MessageError(f"{len(message.body)} body bytes behind {message.kind!r}, which has none")


@dataclass(frozen=True, slots=True)
class StepRange:
    """Positions [position, position + tokens) of a step; what a reply covers is worked out here.

    rope_length: for models whose rotary angles depend on the length.  A position takes those of a
    sequence of so many positions, or of one that ends with it, whichever is longer.
    """

    position: int
    tokens: int
    reply: Reply = field(default="all")
    rope_length: int = 0

    @property
    def reply_position(self) -> int:
        """Position of the first token that is sent back."""
        return self.position + self.tokens - self.reply_tokens

    @property
    def reply_tokens(self) -> int:
        """How many positions are sent back."""
        return {"all": self.tokens, "last": 1, "none": 0, "replay": 0}[self.reply]
