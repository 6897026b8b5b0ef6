"""The names under which a gateway may be asked, and the web pages that may ask: pure.

A web page of a stranger reaches a gateway on its reader's machine: by its address (cross-origin requests),
or under the page's own name, which it lets point there (DNS rebinding).  Browsers say the page's origin in
Origin and the name in Host, so both are checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import urlsplit

_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]{0,252}[a-z0-9_])?\.?")
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")
LOOPBACK_NAMES = frozenset({"localhost"})
MAX_ASKED_HEADERS = 64  # of a preflight
PREFLIGHT_SECONDS = 600
METHODS = "GET, HEAD, POST, OPTIONS"
EXPOSED = (
    "x-request-id, retry-after, x-ratelimit-limit-requests, x-ratelimit-remaining-requests,"
    " x-ratelimit-reset-requests, x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens,"
    " x-ratelimit-reset-tokens"
)


def host_of(value: str) -> str | None:
    """The name or address in a Host header or a URL's authority, in lower case; None where it is none."""
    value = value.strip().lower()
    if value.startswith("["):
        address, closed, rest = value[1:].partition("]")
        if not closed or not _is_port(rest) or _address(address) is None or ":" not in address:
            return None
        return address
    name, colon, port = value.partition(":")
    if (colon and not _is_port(f":{port}")) or not _NAME.fullmatch(name):
        return None
    return name.rstrip(".")


@dataclass(frozen=True, slots=True)
class Hosts:
    """The Host headers that are answered.

    listening: the address that the gateway listens at.  allowed: further names; "*" for any, ".example.org"
    or "*.example.org" for a domain and all names in it.
    On the loopback these are the loopback's names and addresses; elsewhere every address besides, since
    a name alone can be made to point to another machine.
    """

    listening: str = "127.0.0.1"
    allowed: tuple[str, ...] = ()

    def admits(self, header: str) -> bool:
        """Whether a request with this Host header is answered."""
        if "*" in self.allowed:
            return True
        host = host_of(header)
        if host is None:
            return False
        address = _address(host)
        if (
            host in LOOPBACK_NAMES
            or host.endswith(".localhost")
            or (address is not None and address.is_loopback)
        ):
            return True
        own = self.listening.strip("[]").lower()
        if host == own or any(_matches(host, each.strip("[]").lower()) for each in self.allowed):
            return True
        own_address = _address(own)
        is_loopback = own in LOOPBACK_NAMES or (own_address is not None and own_address.is_loopback)
        return address is not None and not is_loopback


@dataclass(frozen=True, slots=True)
class Origins:
    """The web pages that may ask.  allowed: origins as browsers say them; "*" for all."""

    allowed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "allowed", tuple(each.rstrip("/").lower() for each in self.allowed))

    def admits(self, origin: str, host: str) -> bool:
        """Whether a page of this origin may ask.  host: the Host header; the gateway's own pages may."""
        if self.is_foreign(origin, host):
            return "*" in self.allowed or origin.lower() in self.allowed
        return True

    def is_foreign(self, origin: str, host: str) -> bool:
        """Whether the page is another site's."""
        try:
            parts = urlsplit(origin)
        except ValueError:
            return True
        return parts.scheme not in ("http", "https") or parts.netloc.lower() != host.strip().lower()

    def headers(self, origin: str) -> dict[str, str]:
        """The headers of an answer to a page that may ask."""
        named = "*" if "*" in self.allowed else origin
        return {
            "access-control-allow-origin": named,
            "access-control-expose-headers": EXPOSED,
            "vary": "Origin",
        }

    def preflight(self, asked: Mapping[str, str]) -> dict[str, str]:
        """The further headers of an answer to a browser's question beforehand.  asked: its headers."""
        wanted = [word.strip() for word in asked.get("access-control-request-headers", "").split(",")]
        sound = [word for word in wanted[:MAX_ASKED_HEADERS] if _HEADER.fullmatch(word)]
        return {
            "access-control-allow-methods": METHODS,
            "access-control-allow-headers": ", ".join(sound) or "authorization, content-type",
            "access-control-max-age": str(PREFLIGHT_SECONDS),
        }


def check_origins(origins: Sequence[str]) -> None:
    """Raise ValueError for a text that no browser sends as an origin."""
    for each in origins:
        parts = urlsplit(each.rstrip("/"))
        if each != "*" and (not parts.scheme or not parts.netloc or parts.path or parts.query):
            raise ValueError(f"--cors-origin {each[:80]!r}: https://example.org is allowed, or *")


def _matches(host: str, allowed: str) -> bool:
    domain = allowed.removeprefix("*")
    if domain.startswith("."):
        return host == domain[1:] or host.endswith(domain)
    return host == allowed


def _is_port(text: str) -> bool:
    return not text or (text[0] == ":" and (len(text) == 1 or (text[1:].isascii() and text[1:].isdigit())))


def _address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(text.partition("%")[0])
    except ValueError:
        return None
