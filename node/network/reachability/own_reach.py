"""What a node's record says of its reach, and what its log says; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from node.network.addresses import Reach as AddressReach
from node.network.addresses import parse_address
from node.network.own_addresses import OwnAddresses
from node.network.reachability.candidates import is_asked_about, reach_of_address
from node.network.reachability.state import Verdict
from routing.names import PeerId
from routing.view.records import MAX_LAN, MAX_RELAYS, Reach


@dataclass(frozen=True, slots=True)
class OwnReach:
    """The keys of a record that say how its peer is reached; see `routing.view.records.Record`."""

    reach: Reach
    addresses: tuple[str, ...]
    relays: tuple[PeerId, ...] = ()
    lan: tuple[str, ...] = ()
    seen: str = ""
    helps: bool = False

    @property
    def is_there(self) -> bool:
        """Whether anybody can dial this node, as far as is known."""
        return self.reach != "none" or bool(self.lan)


def own_reach(
    verdict: Verdict, own: OwnAddresses, relays: Sequence[PeerId] = (), *, helps: bool = False
) -> OwnReach:
    """What the record says after this verdict.

    Verified addresses alone are announced, once it is known which; until then all are, as older versions do.
    Addresses that the operator has chosen are announced in any case.  relays: that hold a reservation for it.
    helps: it relays, which a public node alone can.
    """
    seen = verdict.seen[0] if verdict.seen else ""
    private = [t for t in own.found if reach_of_address(parse_address(t)) is AddressReach.PRIVATE]
    lan = tuple(private[:MAX_LAN]) if seen else ()
    relays = tuple(relays[:MAX_RELAYS])
    if verdict.reach == "public":
        kept = [*own.announced, *verdict.verified] if own.chosen else verdict.verified
        outside = tuple(address for address in lan if address not in kept)
        return OwnReach("public", tuple(dict.fromkeys(kept)), (), outside, seen, helps)
    if own.chosen:
        return OwnReach("unknown", own.announced, relays, lan, seen)
    if verdict.reach == "none":
        return OwnReach("relayed" if relays else "none", (), relays, lan, seen)
    return OwnReach("unknown", own.announced, relays, (), seen)


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
    where = ", ".join(f"{_place(address)}: {reason}" for address, reason in verdict.failures.items())
    line = f"not reachable ({where}; {peers})"
    if reach.relays:
        line += f"; relayed by {', '.join('…' + peer[-6:] for peer in reach.relays)}"
    return line + _advice(verdict, own)


def _place(text: str) -> str:
    address = parse_address(text)
    return f"[{address.host}]:{address.port}" if address.kind == "ip6" else f"{address.host}:{address.port}"


def _advice(verdict: Verdict, own: OwnAddresses) -> str:
    """What an operator can do: behind a router something else than with a public address."""
    inside = [a for a in map(parse_address, own.found) if is_asked_about(a)]
    private = [a for a in inside if reach_of_address(a) is AddressReach.PRIVATE]
    if own.chosen:
        return ". The announced addresses stay in its record: check --announce"
    if private and verdict.seen and private[0].host not in verdict.seen:
        first = private[0]
        return (
            f". To be reached directly: forward TCP {first.port} to {first.host} on the router,"
            " or allow port mapping (UPnP, NAT-PMP) there"
        )
    ports = ", ".join(dict.fromkeys(str(a.port) for a in inside))
    return f". To be reached: let TCP {ports} in through this machine's firewall"
