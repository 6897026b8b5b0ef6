"""The terms that both ends of a session agreed on, and the range of positions of a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tensor_codec.limits import MAX_HEADER_BYTES

SESSION_ID_BYTES = 16
HEADER_BYTES = 2 + MAX_HEADER_BYTES  # with its length
VALUE_BYTES: dict[str, int] = {"fp32": 4, "bf16": 2}  # of the codecs that keep every value by itself
WHOLE_CODECS = frozenset(VALUE_BYTES)  # of prompts, gradients and training too
OUTLIER_CODEC = "int8o"  # rows of int8, their largest values kept apart: `tensor_codec.rows.outlier_rows`
CODECS = WHOLE_CODECS | {OUTLIER_CODEC}
# What a user may ask for.  auto and exact: the smallest that loses nothing; fast: may lose on slow links.
CODEC_CHOICES = ("auto", "exact", "fast", *VALUE_BYTES)
SCALE_BYTES = 4  # float32
MAX_OUTLIERS, VALUES_PER_OUTLIER = 8, 16  # of a row; SmolLM2: KL 2e-4 over four boundaries
OUTLIER_BYTES = 2  # bfloat16, besides its place in the row
MAX_TOKENS = 1 << 24  # a sanity bound; the real ones are the contract and the limits
MAX_CACHE_TOKENS = 1 << 40  # of a server, rows times positions
MAX_RATE_SECONDS = 60.0  # one token through one block
MAX_HOPS = 64
MAX_SPEED = 1 << 40  # of a link, bytes per second
MAX_QUEUE = 1e6  # a step's wait, as a multiple of its computing
REPLAY_TOKENS = 256  # positions of one part of a replay
REPLAY_BYTES = 1 << 20  # of one part: small enough for hops to work on several parts at once

Reply = Literal["all", "last", "none", "replay"]
REPLIES: dict[int, Reply] = {0: "all", 1: "last", 2: "none", 3: "replay"}
REPLY_CODES: dict[Reply, int] = {name: code for code, name in REPLIES.items()}
MAX_STEP = 1 << 53
MAX_EPOCH = 1 << 31


@dataclass(frozen=True, slots=True)
class Contract:
    """The terms of a session, agreed at its opening; every later message is read against them.

    batch: rows.  hidden: values per position.  max_length: positions a row that the cache may hold.
    codec: how hidden states travel and are kept, one of WHOLE_CODECS.  packs: whether a step may also come in
    int8o.  max_step_tokens: batch * tokens of one step, but never less than one position of all rows.
    row_bytes: wire bytes of one position of all rows, packed_row_bytes: in int8o.  max_tokens: positions that
    one step may carry.
    frame_bytes: of the longest message of the session.
    """

    session: bytes
    start: int
    stop: int
    batch: int
    max_length: int
    hidden: int
    codec: str
    max_step_tokens: int
    packs: bool = True
    row_bytes: int = field(init=False, repr=False, compare=False)
    packed_row_bytes: int = field(init=False, repr=False, compare=False)
    max_tokens: int = field(init=False, repr=False, compare=False)
    frame_bytes: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        row_bytes = self.batch * vector_bytes(self.codec, self.hidden)
        max_tokens = min(self.max_length, max(1, self.max_step_tokens // self.batch))
        object.__setattr__(self, "row_bytes", row_bytes)  # the class is frozen
        packed = self.batch * vector_bytes(OUTLIER_CODEC, self.hidden)
        object.__setattr__(self, "packed_row_bytes", packed)
        object.__setattr__(self, "max_tokens", max_tokens)
        object.__setattr__(self, "frame_bytes", HEADER_BYTES + max_tokens * row_bytes)

    @property
    def replay_part(self) -> int:
        """Positions of one part of a replay from hop to hop."""
        return max(1, min(REPLAY_TOKENS, self.max_tokens, REPLAY_BYTES // self.row_bytes))


@dataclass(frozen=True, slots=True)
class StepRange:
    """Positions [position, position + tokens) of a step, and which of them a reply covers.

    rope_length: for models with rotary angles that depend on the length.  A position takes the angles of a
    sequence of `rope_length` positions, or of one that ends with it, whichever is longer.
    rows: before the step row i of positions [0, position) becomes the former row rows[i]; empty: all stay.
    """

    position: int
    tokens: int
    reply: Reply = field(default="all")
    rope_length: int = 0
    rows: tuple[int, ...] = ()

    @property
    def reply_position(self) -> int:
        """Position of the first token that is sent back."""
        return self.position + self.tokens - self.reply_tokens

    @property
    def reply_tokens(self) -> int:
        """How many positions are sent back."""
        return {"all": self.tokens, "last": 1, "none": 0, "replay": 0}[self.reply]


def outliers_of(hidden: int) -> int:
    """How many values of a row of `hidden` values int8o keeps apart."""
    return min(MAX_OUTLIERS, hidden // VALUES_PER_OUTLIER)


def place_bytes(hidden: int) -> int:
    """Of an outlier's place in a row of `hidden` values: a whole number, little-endian."""
    return 2 if hidden <= 1 << 16 else 4


def vector_bytes(codec: str, hidden: int) -> int:
    """Wire bytes of the hidden state of one position of one row, `hidden` values."""
    if codec != OUTLIER_CODEC:
        return hidden * VALUE_BYTES[codec]
    return hidden + outliers_of(hidden) * (place_bytes(hidden) + OUTLIER_BYTES) + SCALE_BYTES


def are_packed(rows: int, pack: int) -> bool:
    """Whether a step of so many rows of hidden states, batch * tokens, travels in int8o.

    pack: the least number of rows that do, over this link; 0: none.
    """
    return 0 < pack <= rows


def codec_for(dtypes: frozenset[str]) -> str:
    """The smallest codec that loses nothing of the outputs of hops that compute in `dtypes`.

    bfloat16 travels as it is; a chain with a float32 hop, or a float16 one (whose mantissa is
    longer than bfloat16's), needs fp32.
    """
    return "bf16" if dtypes == {"bfloat16"} else "fp32"
