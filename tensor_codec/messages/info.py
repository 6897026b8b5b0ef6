"""The state of a serving peer on request: one question, one answer, no session."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tensor_codec.blocks import MAX_BLOCKS, Blocks
from tensor_codec.frame import Buffer
from tensor_codec.header import pack_header
from tensor_codec.limits import MAX_HEADER_BYTES
from tensor_codec.messages.contract import MAX_CACHE_TOKENS, MAX_QUEUE, MAX_RATE_SECONDS
from tensor_codec.messages.fields import Failed, no_body, read_failed, read_message
from tensor_codec.span_spec import DTYPES, QUANTIZE

INFO_PROTOCOL = "/raceme/info/1"  # any node and a serving peer
INFO_FRAME_BYTES = 2 + MAX_HEADER_BYTES  # the messages have no body
MAX_SESSIONS = 1 << 20
MAX_THREADS = 1 << 16
_DTYPES, _QUANTIZE = frozenset(DTYPES), frozenset(QUANTIZE)
_STATES = frozenset(("online", "draining"))


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """A serving peer at the moment of its answer, by its own word.

    state: "online", or "draining" where it takes nothing new.
    blocks: of the whole model; the peer serves [start, stop) of them.
    sessions: open now.
    cache_tokens: free now, rows times positions; cache_size: free when no session is open.  Rows take pages
    of `page_tokens` positions, so a row of n positions takes n rounded up to whole pages.
    session_tokens, step_tokens: of the longest session and the largest step that the peer takes.
    queue: wait of a decode step, in times of its own computing; the mean of the last seconds.
    seconds_per_block: one decode step through one block.  prefill_seconds_per_token: one token of a prefill
    through one block, in seconds.
    name, version: for people.
    threads: that compute, in each process of the peer; 0: not said, by an older version.
    """

    state: str
    model: str
    revision: str
    blocks: int
    start: int
    stop: int
    dtype: str
    quantize: str
    sessions: int
    cache_tokens: int
    cache_size: int
    page_tokens: int
    session_tokens: int
    step_tokens: int
    queue: float
    seconds_per_block: float
    prefill_seconds_per_token: float
    name: str
    version: str
    threads: int = 0

    @property
    def span(self) -> Blocks:
        """The blocks that the peer serves."""
        return Blocks(self.start, self.stop)


def encode_describe() -> list[Buffer]:
    """The question: the parts of a frame."""
    return [pack_header({"k": "describe"})]


def decode_describe(frame: Buffer) -> None:
    """Read the question.  Raises MessageError for anything else."""
    no_body(read_message(frame, frozenset({"describe"})))


def encode_info(info: PeerInfo) -> list[Buffer]:
    """The answer: the parts of a frame."""
    said = asdict(info)
    if not info.threads:
        del said["threads"]
    return [pack_header({"k": "info", **said})]


def decode_info(frame: Buffer) -> PeerInfo | Failed:
    """Read the answer.  Raises MessageError."""
    message = read_message(frame, frozenset({"info", "failed"}))
    if message.kind == "failed":
        return read_failed(message)
    no_body(message)
    header = message.header
    blocks = header.integer("blocks", 1, MAX_BLOCKS)
    start = header.integer("start", 0, blocks - 1)
    cache_size = header.integer("cache_size", 0, MAX_CACHE_TOKENS)
    return PeerInfo(
        state=header.choice("state", _STATES),
        model=header.text("model"),
        revision=header.text("revision", 128),
        blocks=blocks,
        start=start,
        stop=header.integer("stop", start + 1, blocks),
        dtype=header.choice("dtype", _DTYPES),
        quantize=header.choice("quantize", _QUANTIZE),
        sessions=header.integer("sessions", 0, MAX_SESSIONS),
        cache_tokens=header.integer("cache_tokens", 0, cache_size),
        cache_size=cache_size,
        page_tokens=header.integer("page_tokens", 1, MAX_CACHE_TOKENS),
        session_tokens=header.integer("session_tokens", 0, MAX_CACHE_TOKENS),
        step_tokens=header.integer("step_tokens", 0, MAX_CACHE_TOKENS),
        queue=header.number("queue", 0.0, MAX_QUEUE),
        seconds_per_block=header.number("seconds_per_block", 0.0, MAX_RATE_SECONDS),
        prefill_seconds_per_token=header.number("prefill_seconds_per_token", 0.0, MAX_RATE_SECONDS),
        name=header.text("name", 64, empty=True),
        version=header.text("version", 32, empty=True),
        threads=header.integer("threads", 0, MAX_THREADS, absent=0),
    )
