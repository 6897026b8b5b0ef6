"""The codec of hidden states in each epoch of a session.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from client.chains.chooser import HopTerms
from routing.chains.link_speeds import least_rows
from tensor_codec.messages.contract import (
    OUTLIER_CODEC,
    WHOLE_CODECS,
    Contract,
    codec_for,
    vector_bytes,
)


def packs_over(hops: Sequence[HopTerms | None], contract: Contract) -> list[int]:
    """For the link to each hop the least rows of a step that travels in int8o, as in `Open.pack`.

    The user has allowed it.  0: a hop that does not read int8o, or a link that is faster than the computing.
    """
    exact, packed = (vector_bytes(codec, contract.hidden) for codec in (contract.codec, OUTLIER_CODEC))
    return [
        least_rows(exact, packed, contract.hidden, hop.link_speed, hop.link_seconds)
        if hop is not None and OUTLIER_CODEC in hop.codecs
        else 0
        for hop in hops
    ]


def way_of(hops: Sequence[HopTerms | None], contract: Contract, packs: Sequence[int]) -> tuple[float, float]:
    """`delay_seconds` and `line_seconds` of a chain of these hops.  packs: see `packs_over`."""
    delay, line, home = 0.0, 0.0, 0.0
    for hop, pack in zip(hops, packs, strict=True):
        if hop is None:
            continue
        delay, home = delay + hop.link_seconds / 2, hop.home_seconds / 2
        if hop.link_speed:
            size = contract.packed_row_bytes if pack else contract.row_bytes
            line = max(line, size / hop.link_speed)
    return delay + home, line


@dataclass(slots=True)
class Contracts:
    """The contracts of the present epoch and of earlier epochs, in which late answers come.

    Promises, checked by tests/unit/test_contracts.py:
      * with "auto" the codec fits the hops of the new route, at every change of it;
      * hops that go on never get a narrower codec once anything was sent;
      * a codec that the user chose stays.

    wanted: see `Terms.codec`.  current: of the present epoch.
    """

    wanted: str
    current: Contract
    anything_sent: bool = False
    _since: list[tuple[int, Contract]] = field(default_factory=list)  # its first epoch

    def sent(self) -> None:
        """A hop was given hidden states."""
        self.anything_sent = True

    def agree(self, epoch: int, dtypes: Sequence[str | None], *, kept: bool) -> Contract:
        """The contract from `epoch` on.  dtypes: of the hops; None for a hop that has just left.

        kept: some hops go on.  These have hidden states in the codec until now: a narrower codec would save
        bytes and lose digits of kept states.
        """
        codec = self.wanted
        if codec not in WHOLE_CODECS:
            codec = codec_for(frozenset(dtype for dtype in dtypes if dtype is not None))
            if kept and self.anything_sent and self.current.codec == "fp32":
                codec = "fp32"
        if not self._since or codec != self.current.codec:
            self.current = replace(self.current, codec=codec)
            self._since.append((epoch, self.current))
        return self.current

    def in_epoch(self, epoch: int) -> Contract:
        """The contract of an epoch."""
        for since, contract in reversed(self._since):
            if since <= epoch:
                return contract
        return self.current
