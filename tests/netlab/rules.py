"""What a home's router lets through and rewrites, as rules of nftables."""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal["cone", "rejecting", "symmetric", "open", "firewall"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TABLES = ("ip lab", "inet lab")

_REWRITES: dict[Kind, str] = {
    "cone": "masquerade",
    "rejecting": "masquerade",
    "symmetric": "masquerade fully-random",
    "firewall": "accept",
}


def has_nat(kind: Kind) -> bool:
    """Whether the hosts of such a home have private IPv4 addresses."""
    return kind not in ("open", "firewall")


def rules(kind: Kind) -> str:
    """The rules of a router, whose device to the Internet is `wan`; "" where it filters nothing.

    cone: the mapping keeps the port, whatever the destination (Linux's masquerade, most home routers).
    rejecting: as cone, and the unsolicited is answered with a reset in place of silence.
    symmetric: each connection gets a random port (some carriers and companies).
    firewall: public addresses behind a stateful filter.
    open: public addresses, and no filter.
    """
    if kind == "open":
        return ""
    refuse = "reject with tcp reset" if kind == "rejecting" else "drop"
    # The unsolicited is refused in `input`, before the router's own stack answers it: connection tracking
    # would remember it, and give another port to the host's own SYN, which comes a moment later.
    filters = "\n".join(
        f"""    chain {hook} {{
        type filter hook {hook} priority filter; policy accept;
        iifname "wan" ct state established,related accept
        iifname "wan" meta l4proto tcp {refuse}
        iifname "wan" meta l4proto udp drop
    }}"""
        for hook in ("input", "forward")
    )
    return f"""table ip lab {{
    chain post {{ type nat hook postrouting priority srcnat; oifname "wan" {_REWRITES[kind]}; }}
}}
table inet lab {{
{filters}
}}
"""


def forwarding(port: int, host: str) -> str:
    """Rules that forward a TCP port of the router to the same port of a host's private IPv4 address."""
    return f"""add chain ip lab pre {{ type nat hook prerouting priority dstnat; }}
add rule ip lab pre iifname wan tcp dport {port} dnat to {host}:{port}
insert rule inet lab forward ct status dnat accept
"""
