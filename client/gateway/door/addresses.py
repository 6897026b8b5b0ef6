"""How many connections each address has: one address cannot take all of a gateway's.  Pure."""

from __future__ import annotations

import ipaddress
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

NETWORK_BITS = 64  # of IPv6: a customer of a provider has as many addresses as they want within these
REFUSED_AT_ONCE = 16  # connections beyond a bound that are told why; further ones are closed

Verdict = Literal["taken", "refused", "closed"]


@dataclass(slots=True)
class Addresses:
    """The open connections of each address.  most: of one address.

    Promises, checked by tests/unit/test_gateway_addresses.py:
      * an address has `most` connections at most, besides REFUSED_AT_ONCE that hear why they are refused;
      * the loopback has no bound: a balancer on this machine stands for all its callers;
      * all addresses of an IPv6 network of NETWORK_BITS count together;
      * after as many `left` as `came` nothing is kept of an address.
    """

    most: int
    _open: Counter[str] = field(default_factory=Counter)

    def came(self, address: str | None) -> Verdict:
        """A connection was opened.  address: of its other end, None for a socket without one."""
        name = _counted(address)
        if name is None:
            return "taken"
        self._open[name] += 1
        beyond = self._open[name] - self.most
        return "taken" if beyond <= 0 else "refused" if beyond <= REFUSED_AT_ONCE else "closed"

    def left(self, address: str | None) -> None:
        """A connection has ended."""
        name = _counted(address)
        if name is not None:
            self._open[name] -= 1
            if self._open[name] <= 0:
                del self._open[name]

    def __len__(self) -> int:
        return len(self._open)


@lru_cache(maxsize=4096)
def _counted(address: str | None) -> str | None:
    """Under what the connections of an address are counted; None for those without a bound."""
    if address is None:
        return None
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address):
        found = found.ipv4_mapped or found
    if found.is_loopback:
        return None
    if found.version == 4:
        return str(found)
    return str(ipaddress.ip_network((found, NETWORK_BITS), strict=False))
