"""The few multiaddrs that we speak: /ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT[/p2p/PEER]."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from routing.names import PeerId, public_key_of

Kind = Literal["ip4", "ip6", "dns", "dns4", "dns6"]
_EXAMPLE = "/ip4/127.0.0.1/tcp/4001"
_MAX_CHARACTERS = 512
_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a peer listens.  peer: who is said to listen there, or None where nobody said."""

    kind: Kind
    host: str
    port: int
    peer: PeerId | None = None

    def __str__(self) -> str:
        """The multiaddr, without the peer."""
        return f"/{self.kind}/{self.host}/tcp/{self.port}"

    @property
    def is_wildcard(self) -> bool:
        """True for 0.0.0.0 and ::, which can be listened on and not be dialled."""
        return self.kind in ("ip4", "ip6") and ipaddress.ip_address(self.host).is_unspecified

    @property
    def is_loopback(self) -> bool:
        """True where only this machine can dial it."""
        return self.kind in ("ip4", "ip6") and ipaddress.ip_address(self.host).is_loopback


def parse_address(text: str) -> Address:
    """Read a multiaddr.  Raises ValueError that says what is wrong with it and shows a right one."""
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"a multiaddr of {len(text)} characters, at most {_MAX_CHARACTERS} are allowed")
    parts = text.split("/")
    if len(parts) not in (5, 7) or parts[0] or parts[3] != "tcp" or (len(parts) == 7 and parts[5] != "p2p"):
        raise ValueError(f"{text!r} is not a TCP multiaddr such as {_EXAMPLE} or {_EXAMPLE}/p2p/12D3KooW...")
    kind, host, port = parts[1], parts[2], parts[4]
    if kind not in get_args(Kind):
        known = ", ".join(f"/{each}" for each in get_args(Kind))
        raise ValueError(f"{text!r} begins with /{kind}, known are {known}")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise ValueError(f"{text!r} has port {port!r}, allowed are 0 to 65535")
    peer = None
    if len(parts) == 7:
        peer = PeerId(parts[6])
        try:
            public_key_of(peer)
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from None
    return Address(cast("Kind", kind), _check_host(kind, host, text), int(port), peer)


def _check_host(kind: str, host: str, text: str) -> str:
    if kind in ("ip4", "ip6"):
        try:
            return str((ipaddress.IPv4Address if kind == "ip4" else ipaddress.IPv6Address)(host))
        except ValueError:
            raise ValueError(f"{text!r}: {host!r} is not an {kind} address") from None
    if len(host) > 253 or not _HOST_NAME.fullmatch(host):
        raise ValueError(f"{text!r}: {host!r} is not a host name")
    return host
