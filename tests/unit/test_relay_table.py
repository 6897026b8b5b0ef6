"""The accounts of a relay: reservations, circuits, and what never happens."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from node.network.relaying.messages import Status
from node.network.relaying.reservations import MAX_PREFIXES, Circuit, RelayTable
from tensor_codec.limits import Limits

PUBLIC, OTHER, LOOPBACK = "8.8.8.8/32", "9.9.9.9/32", "127.0.0.1/32"
LIMITS = Limits()


def table(connected: set[str], most: int = LIMITS.max_reservations) -> RelayTable:
    return RelayTable(LIMITS, most, connected.__contains__)


def test_a_peer_has_one_reservation_however_often_it_asks():
    relay = table({"a"})
    assert [relay.reserve("a", PUBLIC, now) for now in range(5)] == [Status.OK] * 5
    assert len(relay) == 1
    assert "a" in relay


def test_without_a_connection_nobody_has_a_reservation():
    connected = {"a"}
    relay = table(connected)
    assert relay.reserve("b", PUBLIC, 0.0) is Status.PERMISSION_DENIED
    relay.reserve("a", PUBLIC, 0.0)
    connected.clear()
    assert relay.begin("c", "a", 1.0) is Status.NO_RESERVATION
    connected.add("a")
    assert relay.begin("c", "a", 2.0) is Status.NO_RESERVATION, "it ended with the connection"


def test_max_reservations_are_given_and_the_next_peer_is_refused_while_others_refresh():
    peers = [str(number) for number in range(LIMITS.max_reservations + 1)]
    relay = table(set(peers))
    answers = [relay.reserve(peer, LOOPBACK, 0.0) for peer in peers]
    assert answers == [Status.OK] * LIMITS.max_reservations + [Status.RESERVATION_REFUSED]
    assert relay.reserve(peers[0], LOOPBACK, 1.0) is Status.OK


def test_a_bootstrap_node_has_max_bootstrap_reservations():
    peers = [str(number) for number in range(LIMITS.max_bootstrap_reservations + 1)]
    relay = table(set(peers), LIMITS.max_bootstrap_reservations)
    answers = [relay.reserve(peer, LOOPBACK, 0.0) for peer in peers]
    assert answers.count(Status.OK) == 128


def test_a_public_address_has_max_reservations_per_prefix_and_another_one_its_own():
    peers = [str(number) for number in range(10)]
    relay = table(set(peers))
    answers = [relay.reserve(peer, PUBLIC, 0.0) for peer in peers[:9]]
    assert answers == [Status.OK] * 8 + [Status.RESERVATION_REFUSED]
    assert relay.reserve(peers[9], OTHER, 0.0) is Status.OK


def test_a_reservation_ends_after_reservation_seconds_unless_it_is_asked_for_again():
    relay = table({"a"})
    relay.reserve("a", PUBLIC, 0.0)
    assert isinstance(relay.begin("c", "a", 1799.0), Circuit)
    relay.reserve("a", PUBLIC, 1799.0)
    assert isinstance(relay.begin("c", "a", 3598.0), Circuit)
    assert relay.begin("c", "a", 3600.0) is Status.NO_RESERVATION


def test_a_source_has_max_circuits_from_peer_and_a_target_max_circuits_to_peer():
    relay = table({"a", "b"})
    relay.reserve("a", PUBLIC, 0.0)
    relay.reserve("b", PUBLIC, 0.0)
    made = [relay.begin("c", "a", 0.0) for _ in range(9)]
    assert made[8] is Status.RESOURCE_LIMIT_EXCEEDED
    assert relay.begin("c", "b", 0.0) is Status.RESOURCE_LIMIT_EXCEEDED, "over all of its targets"
    assert all(isinstance(relay.begin("d", "a", 0.0), Circuit) for _ in range(8))
    assert relay.begin("e", "a", 0.0) is Status.RESOURCE_LIMIT_EXCEEDED, "the seventeenth"
    assert isinstance(relay.begin("e", "b", 0.0), Circuit)
    assert isinstance(made[0], Circuit)
    relay.end(made[0])
    relay.end(made[0])
    assert isinstance(relay.begin("c", "a", 0.0), Circuit)


def test_there_are_max_circuits_and_no_more():
    targets = [f"t{number}" for number in range(8)]
    relay = table(set(targets))
    for each in targets:
        relay.reserve(each, LOOPBACK, 0.0)
    made = [relay.begin(f"s{number}", targets[number % 8], 0.0) for number in range(65)]
    assert all(isinstance(each, Circuit) for each in made[:64])
    assert made[64] is Status.RESOURCE_LIMIT_EXCEEDED


def test_a_public_address_has_max_circuits_from_prefix_and_of_one_target_as_many_as_a_peer():
    relay = table({"a", "b", "c"})
    for each in ("a", "b", "c"):
        relay.reserve(each, PUBLIC, 0.0)
    for target, most in (("a", 8), ("b", 8), ("c", 0)):
        made = [relay.begin(f"{target}{number}", target, 0.0, PUBLIC) for number in range(10)]
        assert [isinstance(each, Circuit) for each in made] == [number < most for number in range(10)]
    assert isinstance(relay.begin("else", "a", 0.0, OTHER), Circuit), "another address has its own"
    assert all(isinstance(relay.begin(f"h{n}", "c", 0.0, LOOPBACK), Circuit) for n in range(16))


def test_a_public_address_opens_circuits_per_prefix_burst_at_once_and_circuits_per_prefix_per_second_then():
    relay = table({"a"})
    relay.reserve("a", PUBLIC, 0.0)

    def opened(now: float) -> int:
        made = [relay.begin(f"s{number}", "a", now, PUBLIC) for number in range(100)]
        for each in made:
            if isinstance(each, Circuit):
                relay.end(each)
        return sum(isinstance(each, Circuit) for each in made)

    def opened_one_by_one(now: float) -> int:
        found = 0
        while isinstance(circuit := relay.begin("s", "a", now, PUBLIC), Circuit):
            relay.end(circuit)
            found += 1
        return found

    assert opened_one_by_one(0.0) == LIMITS.circuits_per_prefix_burst
    assert opened(1.0) == LIMITS.circuits_per_prefix_per_second
    assert opened_one_by_one(100.0) == LIMITS.circuits_per_prefix_burst


def test_the_rates_of_many_addresses_take_no_more_memory():
    relay = table({"a"})
    relay.reserve("a", PUBLIC, 0.0)
    for number in range(2 * MAX_PREFIXES):
        circuit = relay.begin("s", "a", 0.0, f"8.8.{number // 256}.{number % 256}/32")
        assert isinstance(circuit, Circuit)
        relay.end(circuit)
    assert len(relay._openings) == MAX_PREFIXES


def test_nobody_has_a_circuit_to_itself():
    relay = table({"a"})
    relay.reserve("a", PUBLIC, 0.0)
    assert relay.begin("a", "a", 0.0) is Status.PERMISSION_DENIED


def test_bytes_are_counted_also_those_of_circuits_that_have_ended():
    relay = table({"a"})
    relay.reserve("a", PUBLIC, 0.0)
    circuit = relay.begin("b", "a", 0.0)
    assert isinstance(circuit, Circuit)
    relay.carried(circuit, 5)
    relay.carried(circuit, 6)
    relay.end(circuit)
    assert (circuit.carried_bytes, relay.carried_bytes) == (11, 11)


PEERS = st.sampled_from([str(number) for number in range(40)])


class AnyOrder(RuleBasedStateMachine):
    """Whatever peers do, no bound is passed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.connected: set[str] = set()
        self.relay = table(self.connected)

    @rule(peer=PEERS)
    def comes_or_goes(self, peer: str) -> None:
        self.connected ^= {peer}

    @rule(peer=PEERS, prefix=st.sampled_from([PUBLIC, OTHER, LOOPBACK]))
    def reserves(self, peer: str, prefix: str) -> None:
        answer = self.relay.reserve(peer, prefix, self.now)
        assert answer is not Status.OK or peer in self.connected

    @rule(source=PEERS, whom=PEERS)
    def connects(self, source: str, whom: str) -> None:
        answer = self.relay.begin(source, whom, self.now)
        assert not isinstance(answer, Circuit) or whom in self.connected

    @rule(number=st.integers(0, 70))
    def ends(self, number: int) -> None:
        for circuit in list(self.relay)[number : number + 1]:
            self.relay.end(circuit)

    @rule(seconds=st.sampled_from([0.1, 60.0, 2000.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def no_bound_is_passed(self) -> None:
        circuits = list(self.relay)
        assert len(self.relay) <= LIMITS.max_reservations
        assert len(circuits) <= LIMITS.max_circuits
        for peer in {each.source for each in circuits} | {each.target for each in circuits}:
            assert sum(each.source == peer for each in circuits) <= LIMITS.max_circuits_from_peer
            assert sum(each.target == peer for each in circuits) <= LIMITS.max_circuits_to_peer


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=50, stateful_step_count=60, deadline=None)
