"""What a node's record says of its reach, and what its log says; pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

from node.network.addresses import Reach as AddressReach
from node.network.addresses import parse_address
from node.network.own_addresses import OwnAddresses
from node.network.reachability.candidates import is_asked_about, reach_of_address
from node.network.reachability.state import Verdict
from routing.names import PeerId
from routing.view.records import MAX_LAN, MAX_RELAYS, MAX_THROUGH, Reach, Unreached, peers_of


@dataclass(frozen=True, slots=True)
class OwnReach:
    """The keys of a record that say how its peer is reached; see `routing.view.records.Record`."""

    reach: Reach
    addresses: tuple[str, ...]
    relays: tuple[PeerId, ...] = ()
    lan: tuple[str, ...] = ()
    seen: str = ""
    relay_mbit: int = 0
    unreached: Unreached = ""
    through: tuple[str, ...] = ()

    @property
    def every_relay(self) -> tuple[PeerId, ...]:
        """The peers that relay for it, each once."""
        return tuple(dict.fromkeys((*self.relays, *peers_of(self.through))))

    @property
    def helps(self) -> bool:
        """Whether it relays for others."""
        return self.relay_mbit > 0

    @property
    def is_there(self) -> bool:
        """Whether anybody can dial this node, as far as is known."""
        return self.reach != "none" or bool(self.lan)


def own_reach(
    verdict: Verdict,
    own: OwnAddresses,
    relays: Sequence[PeerId] = (),
    through: Sequence[str] = (),
    *,
    relay_mbit: int = 0,
) -> OwnReach:
    """What the record says after this verdict.

    Verified addresses alone are announced, once it is known which; until then all are, as older versions do.
    Addresses that the operator has chosen are announced in any case.  relays: that hold a reservation for it.
    through: the multiaddrs, with /p2p/ID, of those that the operator has named.
    relay_mbit: it relays at this rate, which a public node alone can; 0: it does not.
    A node that is public over IPv6 alone may have relays too, for peers without IPv6.
    """
    seen = min(verdict.seen, key=lambda host: ":" in host, default="")  # IPv4 first: a house has one of it
    private = [t for t in own.found if reach_of_address(parse_address(t)) is AddressReach.PRIVATE]
    lan = tuple(private[:MAX_LAN]) if seen else ()
    said = partial(
        OwnReach, relays=tuple(relays[:MAX_RELAYS]), seen=seen, through=tuple(through[:MAX_THROUGH])
    )
    if verdict.reach == "public":
        kept = [*own.announced, *verdict.verified] if own.chosen else verdict.verified
        outside = tuple(address for address in lan if address not in kept)
        return said("public", tuple(dict.fromkeys(kept)), lan=outside, relay_mbit=relay_mbit)
    if own.chosen:
        return said("unknown", own.announced, lan=lan)
    if verdict.reach == "none":
        why = Counter(verdict.failures.values()).most_common(1)
        reason = cast("Unreached", why[0][0]) if why else ""
        return said("relayed" if relays or through else "none", (), lan=lan, unreached=reason)
    return said("unknown", own.announced)


def report(verdict: Verdict, reach: OwnReach, own: OwnAddresses) -> str:
    """One line for the operator: whether the node is reached, and what would help."""
    peers = f"{verdict.answers} peer{'s' * (verdict.answers != 1)}"
    if verdict.reach == "public":
        best = verdict.verified[0]
        line = f"reachable at {best} ({verdict.reached_by.get(best, 0)} of {peers})"
        failed = [address for address in own.announced if own.chosen and address in verdict.failures]
        return line + "".join(f"; the announced {a} is not: {verdict.failures[a]}" for a in failed)
    if verdict.reach != "none":
        return "whether others reach this node is not known: no peer could tell"
    where, why = ", ".join(map(_place, verdict.failures)), ", ".join(dict.fromkeys(verdict.failures.values()))
    line = f"not reachable at {where} ({peers}: {why})"
    if not where:
        line = f"not known to be reachable from outside ({peers} of this network answered, and nobody else)"
    if reach.every_relay:
        line += f"; relayed by {', '.join('…' + peer[-6:] for peer in reach.every_relay)}"
    return line + _advice(verdict, reach, own)


def _place(text: str) -> str:
    address = parse_address(text)
    return f"[{address.host}]:{address.port}" if address.kind == "ip6" else f"{address.host}:{address.port}"


def _advice(verdict: Verdict, reach: OwnReach, own: OwnAddresses) -> str:
    """What an operator can do: behind a router something else than with a public address."""
    inside = [a for a in map(parse_address, own.found) if is_asked_about(a)]
    private = [a for a in inside if reach_of_address(a) is AddressReach.PRIVATE]
    if own.chosen:
        return ". The announced addresses stay in its record: check --announce"
    aim = "To be faster" if reach.every_relay else "To be reached"
    if private and verdict.seen and private[0].host not in verdict.seen:
        first = private[0]
        return (
            f". {aim}: forward TCP {first.port} to {first.host} on the router,"
            " or allow port mapping (UPnP, NAT-PMP) there"
        )
    ports = ", ".join(dict.fromkeys(str(a.port) for a in inside))
    return f". {aim}: let TCP {ports} in through this machine's firewall"
