"""The messages of sessions, and the only code that reads them from the wire.

    client -> hop      Open, then Step..., then Close (or the end of the stream)
    hop -> client      Opened or Failed, then Result... and Failed
    hop -> next hop    Step..., each naming its session

When hops of a session are replaced, and to find out which of them must be:

    client -> hop      Relink and then Resume; Feed; Where
    hop -> client      Relinked; Here

Shapes follow from the contract that was agreed at open and the size of the body; they are never read from
the wire.  Bodies stay bytes here: `codecs` makes tensors of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256

from tensor_codec.errors import MessageError
from tensor_codec.frame import Buffer
from tensor_codec.header import Header, pack_header
from tensor_codec.messages.contract import (
    MAX_EPOCH,
    MAX_HOPS,
    MAX_QUEUE,
    MAX_STEP,
    MAX_TOKENS,
    OUTLIER_CODEC,
    REPLIES,
    REPLY_CODES,
    SESSION_ID_BYTES,
    VALUE_BYTES,
    WHOLE_CODECS,
    Contract,
    Reply,
)
from tensor_codec.messages.fields import (
    Failed,
    Message,
    no_body,
    optional_codec,
    optional_peer,
    optional_step,
    read_failed,
    read_message,
    read_spec,
    read_speeds,
    read_timings,
)
from tensor_codec.rows.row_order import MAX_ORDERED_ROWS, ROW_BYTES, decode_rows, encode_rows
from tensor_codec.span_spec import SpanSpec

SESSION_PROTOCOL = "/raceme/session/1"  # a client and a hop
PUSH_PROTOCOL = "/raceme/push/1"  # a hop and the next one
GATHER_BYTES = 8  # of the id of a stream that gathers results
OWNER_BYTES = 8  # of an owner's tag: too many to find another peer id with that tag


@dataclass(frozen=True, slots=True)
class Open:
    """Opens a session at one hop, for blocks of its span.

    predecessor: the peer that will push steps, or None where the client itself sends them;
    successor: the peer to push outputs to, or None where they go back to the client.
    relay: the client carries them on to a next hop, so the session does not end here.
    epoch: of the session's route; grows with every change of it.
    held: steps are to wait for a Resume.
    prompts: positions of deep prompts, 0 without them: each block adds its own to its input there.
    body: the prompts, [blocks, prompts, hidden] in the codec of the opening, the same for all rows.
    pack: steps of at least so many rows (batch * tokens) go to the successor in int8o; 0: none does.
    gather: the id of a stream of the client on which results may come together with those of other sessions
    (`tensor_codec.messages.steps`); b"": there is none.
    follows: a standby of a hop: it is filled with the hop's inputs, and passes nothing on before a Relink.
    """

    session: bytes
    spec: SpanSpec
    batch: int
    max_length: int
    codec: str
    predecessor: str | None = None
    successor: str | None = None
    relay: bool = False
    epoch: int = 0
    held: bool = False
    prompts: int = 0
    body: Buffer = b""
    pack: int = 0
    gather: bytes = b""
    follows: bool = False


@dataclass(frozen=True, slots=True)
class Opened:
    """The hop took the session.

    push: it has a stream to the successor (else relay).  cut: its caches can go back to a lower
    position; where not, only to none.  queue: the wait of a decode step there now, as a multiple of its
    computing, as in the hop's record, which may be older.  rows: it can reorder the session's rows.
    moves: the session may go on over another stream (`tensor_codec.messages.attach`).
    """

    push: bool
    cut: bool = True
    queue: float = 0.0
    rows: bool = False
    moves: bool = False


@dataclass(frozen=True, slots=True)
class Relink:
    """The session's route has changed: new neighbours.  Steps of older epochs are to be forgotten.

    The hop answers with Relinked, and takes no step before Resume.
    codec: how hidden states travel from this epoch on, where that changes; the hop brings its kept outputs
    into it.  Only to a wider one, once the cache holds anything.
    pack, follows: see `Open`, from this epoch on.
    """

    epoch: int
    predecessor: str | None = None
    successor: str | None = None
    relay: bool = False
    codec: str | None = None
    pack: int = 0
    follows: bool = False


@dataclass(frozen=True, slots=True)
class Relinked:
    """The progress of a hop.

    push, cut: as in Opened.  length: positions in its cache.  step: the last one that it computed,
    or None.  kept: of its outputs, those of positions [kept, length) can be sent again.
    codec: in which hidden states travel now, where Relink named one.
    orders: its cache has the orders of rows of all steps below this number, and of no other step.
    follows: its cache was filled as a standby's; `step` is then the last one that its sender knew.
    """

    epoch: int
    push: bool
    length: int
    kept: int
    step: int | None = None
    cut: bool = True
    codec: str | None = None
    orders: int = 0
    follows: bool = False


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on in this epoch.

    length: of the cache; later positions are to be forgotten.
    has: positions that the successor has; the hop forwards no replayed position below it.
    stop: outputs of [has, stop) are to be sent to the successor again.
    step: where rows were reordered, the first step that comes after the replay: replayed rows stand in the
    order before it.
    """

    epoch: int
    length: int
    has: int = 0
    stop: int = 0
    step: int | None = None


@dataclass(frozen=True, slots=True)
class Feed:
    """Send the outputs from `position` on, and all later ones, to a standby of the next hop too.

    peer: of the standby.  It gets them in the background, until a Relink or another Feed.
    """

    epoch: int
    peer: str
    position: int


@dataclass(frozen=True, slots=True)
class Where:
    """Asks a hop for its progress, and so whether it lives at all."""


@dataclass(frozen=True, slots=True)
class Here:
    """The answer: the last step that was computed, or None; positions cached; steps that wait."""

    length: int
    waiting: int
    step: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """Hidden states for the next positions of a session.

    step: a number that only grows; the same one again is a retry.  Of what a standby gets: the last step that
    its sender knew.
    position: of the first token in the session; lower than the cache's length cuts it there.
    reply: which positions the last hop sends back to the client; "replay": none.  A replay has no number; it
    fills a new hop's cache with the inputs of the hop that it replaces.
    timings: for each hop passed so far, microseconds (in its hands, computing).
    body: [batch, tokens, hidden] in the contract's codec, or packed: in int8o.
    speeds: for each hop passed so far, bytes per second of the link to it, 0: unknown; fewer where unknown.
    epoch: of its route.  bulk: it does not travel with other sessions' single tokens.
    rope_length, rows: see `StepRange`.
    owner: tag of the peer that opened the session, on the way from hop to hop: `step_session` reads it.
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
    rows: tuple[int, ...] = ()
    owner: bytes = b""
    packed: bool = False
    speeds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """A hop's answer to a step: the positions asked for, or none.

    position: of the first token of the body in the session.
    epoch: of the route.  replay: no answer to a step of the client; the client carries it to the next hop.
    rope_length: of a replay, see `StepRange`.  speeds: see `Step`.
    """

    step: int
    position: int
    body: Buffer
    timings: tuple[tuple[int, int], ...] = ()
    epoch: int = 0
    replay: bool = False
    rope_length: int = 0
    speeds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Close:
    """The client needs the session no more."""


def encode_open(message: Open) -> list[Buffer]:
    """The parts of a frame."""
    spec = message.spec
    fields: dict[str, object] = {
        "k": "open",
        "s": message.session,
        "model": spec.model,
        "revision": spec.revision,
        "start": spec.blocks.start,
        "stop": spec.blocks.stop,
        "batch": message.batch,
        "max_length": message.max_length,
        "dtype": spec.dtype,
        "codec": message.codec,
    }
    named = {"predecessor": message.predecessor, "successor": message.successor, "adapter": spec.adapter}
    fields |= {name: value for name, value in named.items() if value is not None}
    for name in ("relay", "epoch", "held", "pack", "prompts", "gather", "follows"):
        if value := getattr(message, name):
            fields[name] = value
    return [pack_header(fields), message.body] if message.prompts else [pack_header(fields)]


def decode_open(frame: Buffer) -> Open:
    """Read the first message of a session stream.  Raises MessageError.

    Prompts are whole numbers; `check_prompts` compares them with the size of the model.
    """
    return read_open(read_message(frame, frozenset({"open"})))


def read_open(message: Message) -> Open:
    """As `decode_open`."""
    opened = _read_open(message)
    _check_body(opened, len(opened.body))
    return opened


def peek_open(beginning: Buffer, size: int) -> tuple[Open, int]:
    """The first message of a session stream from its beginning, which holds the header, without its body.

    size: of the frame.  Returns the size of the body too.  Raises MessageError.
    """
    opened = _read_open(read_message(beginning, frozenset({"open"})))
    body_bytes = size - len(beginning) + len(opened.body)
    _check_body(opened, body_bytes)
    return replace(opened, body=b""), body_bytes


def _read_open(message: Message) -> Open:
    header = message.header
    return Open(
        session=header.binary("s", SESSION_ID_BYTES),
        spec=read_spec(header),
        batch=header.integer("batch", 1, MAX_TOKENS),
        max_length=header.integer("max_length", 1, MAX_TOKENS),
        codec=header.choice("codec", WHOLE_CODECS),
        predecessor=optional_peer(header, "predecessor"),
        successor=optional_peer(header, "successor"),
        relay=header.flag("relay", absent=False),
        epoch=header.integer("epoch", 0, MAX_EPOCH, absent=0),
        held=header.flag("held", absent=False),
        prompts=header.integer("prompts", 1, MAX_TOKENS) if "prompts" in header else 0,
        body=message.body,
        pack=header.integer("pack", 0, MAX_TOKENS, absent=0),
        gather=header.binary("gather", GATHER_BYTES) if "gather" in header else b"",
        follows=header.flag("follows", absent=False),
    )


def _check_body(opened: Open, body_bytes: int) -> None:
    if not opened.prompts:
        if body_bytes:
            raise MessageError(f"{body_bytes} body bytes after 'open', which has none")
        return
    vectors = opened.spec.blocks.size * opened.prompts * VALUE_BYTES[opened.codec]
    if not body_bytes or body_bytes % vectors:
        raise MessageError(f"{body_bytes} body bytes are not prompts of {opened.prompts} positions")


def check_prompts(opened: Open, hidden: int, body_bytes: int | None = None) -> None:
    """Raise MessageError unless the body of an Open holds its prompts.

    hidden: values per position in the model.  body_bytes: of a body that has not come yet.
    """
    size = opened.spec.blocks.size * opened.prompts * hidden * VALUE_BYTES[opened.codec]
    found = len(opened.body) if body_bytes is None else body_bytes
    if found != size:
        raise MessageError(f"{found} body bytes, prompts of {opened.prompts} positions take {size}")
    if opened.prompts > opened.max_length:
        raise MessageError(f"prompts of {opened.prompts} positions for a session of {opened.max_length}")


def encode_opened(message: Opened) -> list[Buffer]:
    """The parts of a frame."""
    fields = {"k": "opened", "push": message.push, "cut": message.cut, "q": float(message.queue)}
    if message.rows:
        fields["w"] = True
    if message.moves:
        fields["m"] = True
    return [pack_header(fields)]


def decode_open_reply(frame: Buffer) -> Opened | Failed:
    """Read a hop's answer to Open.  Raises MessageError."""
    message = read_message(frame, frozenset({"opened", "failed"}))
    if message.kind == "failed":
        return read_failed(message)
    no_body(message)
    header = message.header
    queue = header.number("q", 0.0, MAX_QUEUE) if "q" in header else 0.0
    rows, moves = header.flag("w", absent=False), header.flag("m", absent=False)
    return Opened(header.flag("push"), header.flag("cut", absent=True), queue, rows, moves)


def encode_relink(message: Relink) -> list[Buffer]:
    """The parts of a frame."""
    fields: dict[str, object] = {"k": "relink", "e": message.epoch}
    for name in ("predecessor", "successor", "relay", "codec", "pack", "follows"):
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
    if message.orders:
        fields["w"] = message.orders
    if message.follows:
        fields["follows"] = True
    return [pack_header(fields)]


def encode_resume(message: Resume) -> list[Buffer]:
    """The parts of a frame."""
    fields: dict[str, object] = {
        "k": "resume",
        "e": message.epoch,
        "p": message.length,
        "has": message.has,
        "stop": message.stop,
    }
    if message.step is not None:
        fields["n"] = message.step
    return [pack_header(fields)]


def encode_feed(message: Feed) -> list[Buffer]:
    """The parts of a frame."""
    fields: dict[str, object] = {"k": "feed", "e": message.epoch, "peer": message.peer, "p": message.position}
    return [pack_header(fields)]


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
        "r": REPLY_CODES[message.reply],
    }
    if message.timings:
        fields["t"] = message.timings
    if message.epoch:
        fields["e"] = message.epoch
    if message.bulk:
        fields["b"] = True
    if message.rope_length:
        fields["l"] = message.rope_length
    if message.rows:
        fields["w"] = encode_rows(message.rows)
    if message.owner:
        fields["o"] = message.owner
    if message.packed:
        fields["c"] = OUTLIER_CODEC
    if message.speeds:
        fields["v"] = message.speeds
    return [pack_header(fields), message.body]


def begins_step(frame: Buffer) -> bool:
    """Whether a frame is a Step, by its first bytes; False also for one that another encoder wrote."""
    return bytes(frame[_KIND]) == _STEP_KIND


def begins_result(frame: Buffer) -> bool:
    """The same of a Result."""
    return bytes(frame[_KIND]) == _RESULT_KIND


def owner_tag(owner: str) -> bytes:
    """The tag of a session's owner: two peers may have sessions under one id, fed by the same hop."""
    return sha256(b"raceme-owner-1\0" + owner.encode()).digest()[:OWNER_BYTES]


def step_session(message: Message) -> tuple[bytes, bytes]:
    """The session of a Step, and its owner's tag, b"" where the sender gives none.

    The rest is read against that session's contract.
    """
    header = message.header
    owner = header.binary("o", OWNER_BYTES) if "o" in header.names else b""
    return header.binary("s", SESSION_ID_BYTES), owner


def step_epoch(message: Message) -> int:
    """The epoch of a Step, without reading the rest of it."""
    return message.header.integer("e", 0, MAX_EPOCH, absent=0)


def read_step(message: Message, contract: Contract) -> Step:
    """Read a Step against its contract.  Raises MessageError.

    The position may be anywhere below max_length; whether it continues the cache is for the
    session to say.
    """
    if (token := _read_token(message, contract)) is not None:
        return token
    header = message.header
    session = header.binary("s", SESSION_ID_BYTES)
    if session != contract.session:
        raise MessageError("a step of another session")
    position = header.integer("p", 0, contract.max_length - 1)
    packed = "c" in header.names and _is_packed(header, contract)
    row_bytes = contract.packed_row_bytes if packed else contract.row_bytes
    tokens, rest = divmod(len(message.body), row_bytes)
    room = min(contract.max_tokens, contract.max_length - position)
    if rest or not 0 < tokens <= room:
        raise MessageError(
            f"{len(message.body)} body bytes at position {position}, 1..{room} positions of"
            f" {row_bytes} bytes are allowed"
        )
    reply = REPLIES[header.integer("r", 0, len(REPLIES) - 1)]
    rows: tuple[int, ...] = ()
    if "w" in header.names:
        if reply == "replay":
            raise MessageError("a part of a replay with an order of rows, which only other steps may have")
        if contract.batch > MAX_ORDERED_ROWS:
            raise MessageError(f"an order of {contract.batch} rows, {MAX_ORDERED_ROWS} at most are allowed")
        rows = decode_rows(header.binary("w", ROW_BYTES * contract.batch))
    return Step(
        session=session,
        step=header.integer("n", 0, MAX_STEP),
        position=position,
        reply=reply,
        body=message.body,
        timings=read_timings(header),
        epoch=header.integer("e", 0, MAX_EPOCH, absent=0),
        bulk=header.flag("b", absent=False),
        rope_length=header.integer("l", 0, contract.max_length, absent=0),
        rows=rows,
        packed=packed,
        speeds=read_speeds(header) if "v" in header.names else (),
    )


def _read_token(message: Message, contract: Contract) -> Step | None:
    """A Step of one position with the usual fields alone, read in one pass; None for every other one.

    `read_step` would read the same: this is the way of every token, and calls nothing for each field.
    """
    fields = message.header.fields
    number, position, reply = fields.get("n", -1), fields.get("p", -1), fields.get("r", -1)
    epoch, timings = fields.get("e", 0), fields.get("t", _NO_TIMINGS)
    usual = (
        fields.keys() <= _TOKEN_FIELDS
        and len(message.body) == contract.row_bytes
        and fields.get("s") == contract.session
        and type(number) is type(position) is type(reply) is type(epoch) is int
        and 0 <= number <= MAX_STEP
        and 0 <= position < contract.max_length
        and reply in REPLIES
        and 0 <= epoch <= MAX_EPOCH
        and type(timings) is list
        and len(timings) <= MAX_HOPS
    )
    if not usual:
        return None
    found = []
    for pair in timings:
        if type(pair) is not list or len(pair) != 2:
            return None
        held, computing = pair
        if type(held) is not int or type(computing) is not int or held < 0 or computing < 0:
            return None
        found.append((held, computing))
    return Step(contract.session, number, position, REPLIES[reply], message.body, tuple(found), epoch)


def _is_packed(header: Header, contract: Contract) -> bool:
    """Of a step that names a codec other than its contract's.  Raises MessageError where none is taken."""
    codec = header.choice("c", _STEP_CODECS)
    if not contract.packs:
        raise MessageError(f"a step in {codec}, which this node does not take (--codec exact)")
    return True


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
    if message.speeds:
        fields["v"] = message.speeds
    return [pack_header(fields), message.body]


def encode_close() -> list[Buffer]:
    """The parts of a frame."""
    return [pack_header({"k": "close"})]


FromClient = Step | Close | Relink | Resume | Feed | Where
FromHop = Result | Failed | Relinked | Here
_FROM_CLIENT = frozenset({"step", "close", "relink", "resume", "feed", "where"})
_FROM_HOP = frozenset({"result", "failed", "relinked", "here"})
_TOKEN_FIELDS = frozenset({"k", "s", "n", "p", "r", "t", "e", "o"})
_NO_TIMINGS: list[object] = []
_KIND = slice(3, 10)  # after the header's length and the map's first byte, as msgpack writes a first field
_STEP_KIND, _RESULT_KIND = b"\xa1k\xa4step", b"\xa1k\xa6resu"
_STEP_CODECS = frozenset({OUTLIER_CODEC})


def decode_from_client(frame: Buffer, contract: Contract) -> FromClient:
    """Read what a client sends after Open.  Raises MessageError."""
    message = read_message(frame, _FROM_CLIENT)
    if message.kind == "step":
        return read_step(message, contract)
    no_body(message)
    if message.kind == "relink":
        return _read_relink(message.header)
    if message.kind == "resume":
        return _read_resume(message.header, contract)
    if message.kind == "feed":
        return _read_feed(message.header, contract)
    return Where() if message.kind == "where" else Close()


def decode_from_hop(
    frame: Buffer, contract: Contract, contract_in: Callable[[int], Contract] | None = None
) -> FromHop:
    """Read what a hop sends after Opened.  Raises MessageError.

    contract_in: the contract of an epoch, where epochs differ.
    """
    message = read_message(frame, _FROM_HOP)
    if message.kind == "result":
        epoch = message.header.integer("e", 0, MAX_EPOCH, absent=0)
        return _read_result(message, contract if contract_in is None else contract_in(epoch), epoch)
    if message.kind == "failed":
        return read_failed(message)
    no_body(message)
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
        read_timings(message.header),
        epoch,
        message.header.flag("replay", absent=False),
        message.header.integer("l", 0, contract.max_length, absent=0),
        read_speeds(message.header) if "v" in message.header.names else (),
    )


def _read_relink(header: Header) -> Relink:
    return Relink(
        header.integer("e", 0, MAX_EPOCH, absent=0),
        optional_peer(header, "predecessor"),
        optional_peer(header, "successor"),
        header.flag("relay", absent=False),
        optional_codec(header),
        header.integer("pack", 0, MAX_TOKENS, absent=0),
        header.flag("follows", absent=False),
    )


def _read_feed(header: Header, contract: Contract) -> Feed:
    epoch, peer = header.integer("e", 0, MAX_EPOCH, absent=0), optional_peer(header, "peer")
    if peer is None:
        raise MessageError("'feed' without the peer that is to be fed")
    return Feed(epoch, peer, header.integer("p", 0, contract.max_length))


def _read_resume(header: Header, contract: Contract) -> Resume:
    length, has, stop = (header.integer(name, 0, contract.max_length) for name in ("p", "has", "stop"))
    if stop > length:
        raise MessageError(f"outputs up to {stop} are to be sent again, the cache is to hold {length}")
    return Resume(header.integer("e", 0, MAX_EPOCH, absent=0), length, has, stop, optional_step(header))


def _read_relinked(header: Header, contract: Contract) -> Relinked:
    length = header.integer("p", 0, contract.max_length)
    return Relinked(
        header.integer("e", 0, MAX_EPOCH, absent=0),
        header.flag("push"),
        length,
        header.integer("kept", 0, length),
        optional_step(header),
        header.flag("cut"),
        optional_codec(header),
        header.integer("w", 0, MAX_STEP + 1, absent=0),
        header.flag("follows", absent=False),
    )


def _read_here(header: Header, contract: Contract) -> Here:
    length = header.integer("p", 0, contract.max_length)
    return Here(length, header.integer("waiting", 0, MAX_TOKENS), optional_step(header))
