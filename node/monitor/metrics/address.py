"""Where metrics may be asked for: an address to listen on, and the host names that a request may carry."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

ANY = "*"
_HOST_PORT = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[\w.-]+)):(?P<port>\d{1,5})", re.ASCII)
_NAME = re.compile(r"[\w-]+(\.[\w-]+)*\.?", re.ASCII)


@dataclass(frozen=True, slots=True)
class MetricsAddress:
    """An address of HTTP.  names: hosts, besides this one, that requests may name; `*` for any.

    A page of the web can have a browser ask an address of this machine under a name of its own (DNS
    rebinding), so names are checked: `localhost`, `names` and IP addresses pass.
    """

    host: str
    port: int
    names: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str, names: Sequence[str] = ()) -> MetricsAddress:
        """Read "HOST:PORT", with an IPv6 address in brackets.

        Raises ValueError; also for an address that other machines reach, where no names are given.
        """
        found = _HOST_PORT.fullmatch(text) if isinstance(text, str) else None
        if found is None or int(found["port"]) > 65535:
            raise ValueError(f"metrics is {text!r}, HOST:PORT is needed, for instance 127.0.0.1:9464")
        for name in names:
            if name != ANY and not _NAME.fullmatch(name):
                raise ValueError(f"metrics host {name!r} is not a name of a host")
        address = cls(found["six"] or found["host"], int(found["port"]), tuple(map(_plain, names)))
        if not names and not address.is_local:
            raise ValueError(
                f"metrics is {text}, which other machines reach: say with --metrics-host NAME under which"
                f" names they may ask, or {ANY} for any"
            )
        return address

    @property
    def is_local(self) -> bool:
        """Whether this machine alone reaches it."""
        address = _ip(self.host)
        return self.host.lower() == "localhost" if address is None else address.is_loopback

    def admits(self, host: str) -> bool:
        """Whether a request may carry this Host header."""
        six = re.fullmatch(r"\[([0-9A-Fa-f:.]+)\](:\d*)?", host)
        name = six[1] if six else _plain(host.partition(":")[0])
        if _ip(name) is not None:
            return True
        return bool(name) and (name in ("localhost", self.host.lower(), *self.names) or ANY in self.names)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def _plain(name: str) -> str:
    return name.lower().removesuffix(".")


def _ip(text: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(text)
    except ValueError:
        return None
