"""What this node knows about its own reach: whom it has asked, what they said, and when it asks again.

Pure: the time is passed in, and nobody is dialled here.  Three peers are asked in a round; where one gives no
answer another is asked in its place.  One peer may be wrong or lie, so an address counts as verified when two
peers have reached it, and the node as out of reach when two have failed at every address that they tried.
IPv4 and IPv6 have rounds of their own: a router may let in one and not the other.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from node.network.addresses import Address, Reach, dial_order, parse_address, reach_of
from node.network.reachability.candidates import reach_of_address
from routing.names import PeerId
from tensor_codec.messages.reach import Outcome

ASKED = 3  # answers of a round
AGREED = 2  # of these that decide
MAX_TRIED = 9  # peers of a round: those of an older version give no answer
CHECK_SECONDS = 900.0  # between two rounds
NEAR_SECONDS = 30.0  # the same, where neighbours alone have answered: somebody outside may have come
FIRST_PAUSE_SECONDS = 5.0  # before another round where one decided nothing; doubles up to CHECK_SECONDS
ALONE_SECONDS = 1.0  # before another look where there was nobody to ask, which costs nothing


@dataclass(frozen=True, slots=True)
class Told:
    """One peer's answer.  seen: this node's IP address.  outcomes: by multiaddr, of those dialled.

    house: of a neighbour in the same private network, where it is said to be: its own outer IP address.
    """

    seen: str
    outcomes: Mapping[str, Outcome]
    house: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether others can dial this node.

    reach: "public" with a verified address, "none" where all fail, else "unknown".
    verified: multiaddrs, the best first.  reached_by: of each, how many peers.
    failures: of each other address that was tried, the most frequent reason.
    answers: how many peers have said something.  seen: the node's IP addresses as the Internet sees them.
    """

    reach: str = "unknown"
    verified: tuple[str, ...] = ()
    reached_by: Mapping[str, int] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    answers: int = 0
    seen: tuple[str, ...] = ()


@dataclass(slots=True)
class Reachability:
    """The rounds of questions of one node over one family of IP, and their verdict.

    addresses: to ask about, all of that family.  rounds: that have ended, with these addresses.

    Promises, checked by tests/unit/test_reachability.py:
      * no peer alone makes a node public or unreachable where a second one could be asked;
      * at most ASKED peers are asked at once, and MAX_TRIED in a round;
      * what private neighbours say counts only where nobody on the Internet says anything, and makes nobody
        public whose neighbours are known outside;
      * new addresses end the round and begin another.
    """

    verdict: Verdict = field(default_factory=Verdict)
    addresses: tuple[str, ...] = ()
    rounds: int = 0
    _told: dict[PeerId, Told | None] = field(default_factory=dict)  # None: no answer
    _gone: set[PeerId] = field(default_factory=set)  # of these, the ones that could not be asked
    _under_way: set[PeerId] = field(default_factory=set)
    _due: float = 0.0  # of the next round; while one runs, of the present one
    _pause: float = FIRST_PAUSE_SECONDS

    def set_addresses(self, addresses: Sequence[str], now: float) -> bool:
        """The addresses to ask about; True where they differ: answers under way no longer count.

        The verdict stands until the next where addresses are only added.
        """
        if tuple(addresses) == self.addresses:
            return False
        if not set(self.addresses) <= set(addresses):
            self.verdict = Verdict()
        self.addresses, self.rounds = tuple(addresses), 0
        self._begin(now)
        return True

    def check_again(self, now: float) -> None:
        """Begin a round now; the verdict stands until it is over."""
        self._begin(now)

    def _begin(self, now: float) -> None:
        self._told, self._gone, self._under_way = {}, set(), set()
        self._due, self._pause = now, FIRST_PAUSE_SECONDS

    def to_ask(self, peers: Sequence[PeerId], now: float) -> list[PeerId]:
        """The peers to ask now, out of these, the best first; they count as under way.

        Ends the round where nobody is left to ask.
        """
        if not self.addresses or now < self._due:
            return []
        answers = sum(told is not None for told in self._told.values())
        tried = len(self._told) + len(self._under_way)
        missing = min(ASKED - answers - len(self._under_way), MAX_TRIED - tried)
        fresh = [p for p in peers if p not in self._told and p not in self._under_way]
        chosen = fresh[: max(0, missing)]
        self._under_way.update(chosen)
        if not self._under_way:
            self._end(now)
        return chosen

    def answered(self, peer: PeerId, told: Told | None, now: float) -> None:
        """A peer's answer; None: it gave none.  Ignored where the round that asked it is over."""
        if peer not in self._under_way:
            return
        self._under_way.discard(peer)
        self._told[peer] = told
        found = self._judge(over=False)
        if found.reach != "unknown":
            self.verdict = found

    def unreached(self, peer: PeerId, now: float) -> None:
        """A peer could not be asked: there is no connection to it.  It counts as if it were not there."""
        if peer in self._under_way:
            self._gone.add(peer)
            self.answered(peer, None, now)

    def _end(self, now: float) -> None:
        """The round is over: judge it, and say when the next one begins."""
        found = self._judge(over=True)
        tried = any(told is not None and told.outcomes for told in self._told.values())
        if (
            tried
            or found.reach != "unknown"
            or (self.verdict.reach == "unknown" and any(self._told.values()))
        ):
            self.verdict = found  # a round in which nobody could try anything changes nothing
        self.rounds += 1
        decided = self.verdict.reach != "unknown" and any(self._told.values())
        if not self._told:
            self._due, self._pause = now + ALONE_SECONDS, FIRST_PAUSE_SECONDS
        else:
            seen = [told.seen for told in self._told.values() if told is not None]
            again = CHECK_SECONDS if any(reach_of(host) is Reach.PUBLIC for host in seen) else NEAR_SECONDS
            self._due = now + (again if decided else self._pause)
            self._pause = FIRST_PAUSE_SECONDS if decided else min(CHECK_SECONDS, 2 * self._pause)
        self._told, self._gone = {}, set()

    @property
    def is_under_way(self) -> bool:
        """Whether peers are asked now."""
        return bool(self._under_way)

    def seconds_left(self, now: float) -> float:
        """Seconds until the next round; 0 within a round."""
        return max(0.0, self._due - now)

    def _judge(self, *, over: bool) -> Verdict:
        """The verdict of the answers so far; over: no others will come."""
        told = [each for each in self._told.values() if each is not None]
        far = [each for each in told if reach_of(each.seen) is Reach.PUBLIC]
        near = [each for each in told if reach_of(each.seen) is Reach.PRIVATE]
        counted = far or near
        if not far and (houses := dict.fromkeys(each.house for each in near if each.house)):
            # peers outside use this swarm too, and none of them has tried this node
            known = over or len(near) >= AGREED
            return Verdict("none" if known else "unknown", answers=len(near), seen=tuple(houses))
        reached, failed = Counter[str](), Counter[str]()
        reasons: dict[str, Counter[str]] = {}
        for each in counted:
            for address, outcome in each.outcomes.items():
                if outcome == "reached":
                    reached[address] += 1
                else:
                    failed[address] += 1
                    reasons.setdefault(address, Counter())[outcome] += 1
        enough = min(AGREED, len(counted)) if over else AGREED
        verified = [address for address in reached if reached[address] >= enough]
        # one peer is believed in bad news only where there was no second one to ask
        fatal = 1 if over and len(self._told) - len(self._gone) == 1 else AGREED
        tried = reached.keys() | failed.keys()
        refuted = tried and not verified and all(failed[address] >= fatal for address in tried)
        reach = "public" if verified else "none" if refuted and not self._untried(tried, far) else "unknown"
        return Verdict(
            reach,
            tuple(str(each) for each in dial_order(map(parse_address, verified))),
            dict(reached),
            {
                address: found.most_common(1)[0][0]
                for address, found in reasons.items()
                if address not in verified
            },
            len(counted),
            tuple(dict.fromkeys(each.seen for each in far)),
        )

    def _untried(self, tried: set[str], far: Sequence[Told]) -> bool:
        """Whether a public address is left that nobody could try, on another network than those tried."""
        networks = {_network(parse_address(text)) for text in tried}
        addresses: list[Address] = [parse_address(text) for text in self.addresses]
        public = [
            each for each in addresses if not each.is_wildcard and reach_of_address(each) is Reach.PUBLIC
        ]
        return bool(far) and any(_network(each) not in networks for each in public)


def together(states: Sequence[Reachability]) -> Verdict:
    """The verdict over all families, IPv4 first: public where one is.

    A family whose round is over without a verdict had nobody to ask, or nobody to tell: it leads nobody here.
    """
    verdicts = [each.verdict for each in states if each.addresses]
    reaches = [each.reach for each in verdicts]
    open_ones = [
        each for each in states if each.addresses and each.verdict.reach == "unknown" and not each.rounds
    ]
    reach = "unknown"
    if "public" in reaches:
        reach = "public"
    elif "none" in reaches and not open_ones:
        reach = "none"
    verified = chain.from_iterable(each.verified for each in verdicts)
    of_reach = [each for each in verdicts if each.reach == reach] or verdicts
    return Verdict(
        reach,
        tuple(str(each) for each in dial_order(map(parse_address, verified))),
        {address: count for each in verdicts for address, count in each.reached_by.items()},
        {address: reason for each in verdicts for address, reason in each.failures.items()},
        max((each.answers for each in of_reach), default=0),
        tuple(dict.fromkeys(chain.from_iterable(each.seen for each in verdicts))),
    )


def _network(address: Address) -> str:
    """An IPv4 address, or the 64 bits of an IPv6 address: a machine has several addresses in one network."""
    host = ipaddress.ip_address(address.host)
    if host.version == 4:
        return address.host
    return str(ipaddress.ip_network((host, 64), strict=False))
