"""The codec of hidden states in each epoch of a session.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from client.chains.chooser import HopTerms
from tensor_codec.messages.contract import (
    OUTLIER_CODEC,
    WHOLE_CODECS,
    Contract,
    codec_for,
    vector_bytes,
)

# A round trip that no local network exceeds.  A row of 4096 values takes about 50 us to encode and decode; a
# link of 1 Gbit/s sends the 4 KiB that int8o saves in 33 us, so on a local network it would cost time.
NEAR_SECONDS = 0.002

Outliers = Literal["none", "read", "pay"]


def outliers_over(hops: Sequence[HopTerms | None]) -> Outliers:
    """What int8o would be to a chain of these hops.

    "none": a hop cannot read it.  "read": all can, and all links are those of a local network.  "pay": all
    can, and a link takes longer for the bytes that it saves than the hops for encoding.
    """
    known = [hop for hop in hops if hop is not None]
    if not all(OUTLIER_CODEC in hop.codecs for hop in known):
        return "none"
    return "pay" if any(hop.link_seconds >= NEAR_SECONDS for hop in known) else "read"


@dataclass(slots=True)
class Contracts:
    """The contracts of the present epoch and of earlier epochs, in which late answers come.

    Promises, checked by tests/unit/test_contracts.py:
      * with "auto" the codec fits the hops of the new route, at every change of it;
      * hops that go on never get a narrower codec once anything was sent;
      * a codec that the user chose stays;
      * int8o is taken at the first agreement or never, where the user allows it ("fast"), a link is slow and
        every hop reads it; once anything was sent in it, fp32 alone may follow, which keeps every value.

    wanted: see `Terms.codec`.  current: of the present epoch.
    """

    wanted: str
    current: Contract
    anything_sent: bool = False
    _since: list[tuple[int, Contract]] = field(default_factory=list)  # its first epoch

    def sent(self) -> None:
        """A hop was given hidden states."""
        self.anything_sent = True

    def agree(
        self, epoch: int, dtypes: Sequence[str | None], *, kept: bool, outliers: Outliers = "none"
    ) -> Contract:
        """The contract from `epoch` on.  dtypes: of the hops; None for a hop that has just left.

        kept: some hops go on.  These have hidden states in the codec until now: a narrower codec would save
        bytes and lose digits of kept states.
        outliers: see `outliers_over`.
        """
        codec = self.wanted
        if codec not in WHOLE_CODECS:
            codec = codec_for(frozenset(dtype for dtype in dtypes if dtype is not None))
            if kept and self.anything_sent and self.current.codec == "fp32":
                codec = "fp32"
            if self._is_outlier_codec_fit(outliers, codec):
                codec = OUTLIER_CODEC
            elif self.anything_sent and any(old.codec == OUTLIER_CODEC for _, old in self._since):
                codec = "fp32"
        if not self._since or codec != self.current.codec:
            self.current = replace(self.current, codec=codec)
            self._since.append((epoch, self.current))
        return self.current

    def _is_outlier_codec_fit(self, outliers: Outliers, exact: str) -> bool:
        """Whether the next epoch has int8o.  exact: the codec without it."""
        if self._since:
            return self.current.codec == OUTLIER_CODEC and outliers != "none"
        hidden = self.current.hidden
        saves = vector_bytes(OUTLIER_CODEC, hidden) < vector_bytes(exact, hidden)
        return self.wanted == "fast" and outliers == "pay" and saves

    def in_epoch(self, epoch: int) -> Contract:
        """The contract of an epoch."""
        for since, contract in reversed(self._since):
            if since <= epoch:
                return contract
        return self.current
