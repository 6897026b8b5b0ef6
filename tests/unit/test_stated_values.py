"""Numbers within the sentences of the documents are those of the code.

Each entry is a piece of a sentence as a pattern, and what its groups must be.  The tables of docs/protocol.md
are compared in tests/unit/test_protocol_page.py and test_docs.py.
"""

from __future__ import annotations

import re

import pytest

from client import batch_parts, forward_backward, request_streams
from client.chains import avoided_peers
from client.chains.chain_wait import PINGED_PEERS
from client.config import ClientConfig
from client.session import inputs
from client.session.repair import watchdog
from node.config import BalanceConfig
from node.model.blocks import kv_pages
from node.network import addresses, connection_table, host
from node.network.admission import places, rates
from node.network.dialling import race as dialling
from node.network.directory import announcer, intake, neighbours
from node.network.transport import yamux_limits
from node.network.transport.yamux_limits import YamuxLimits
from node.runtime import bans
from node.serving import balancer, memory
from node.serving.executor.batcher import CHUNK_POSITIONS
from node.serving.training import tapes
from routing.chains import measured
from routing.placement import cover_gaps
from routing.view import exchange, records, view
from tensor_codec.header import MAX_ITEMS
from tensor_codec.limits import KIB, MIB, Limits
from tests.markdown import in_one_line

LIMITS, YAMUX, BALANCE = Limits(), YamuxLimits(), BalanceConfig()
CLIENT = ClientConfig(peers=())
PROTOCOL, OPERATING, PATH = "docs/protocol.md", "docs/operating.md", "docs/path-of-a-token.md"
NUMBERS = {
    "twice": 2, "two": 2, "three": 3, "third": 3, "four": 4, "five": 5, "six": 6, "eight": 8, "ten": 10,
    "quarter": 0.25, "fifth": 0.2, "second": 1, "minute": 60, "an hour": 3600,
}  # fmt: skip
N = rf"([\d,.]*\d|{'|'.join(NUMBERS)})"  # a number, in figures or as a word

CLAIMS: list[tuple[str, str, tuple[float, ...]]] = [
    (PROTOCOL, "before anything else \\| N s", (LIMITS.membership_seconds,)),
    (PROTOCOL, "all of this \\| \\| N s", (LIMITS.handshake_seconds,)),
    (
        PROTOCOL,
        "credit of a stream \\| N KiB at first, or the bytes of a round trip at N Mbit/s \\(at most N MiB,",
        (
            yamux_limits.INITIAL_WINDOW / KIB,
            yamux_limits.FAR_BYTES_PER_SECOND * 8 / 1e6,
            yamux_limits.FAR_WINDOW / MIB,
        ),
    ),
    (PROTOCOL, "that are not whole \\| N MiB \\| close", (LIMITS.max_unread_bytes_per_connection / MIB,)),
    (
        PROTOCOL,
        "has open \\| N a connection, N a peer, N for the node",
        (LIMITS.max_streams_per_connection, LIMITS.max_streams_per_peer, LIMITS.max_streams),
    ),
    (
        PROTOCOL,
        "opening streams \\| N/s, bursts of N \\| reset the new one; more than N a minute, or N of them",
        (YAMUX.opens_per_second, YAMUX.open_burst, YAMUX.breaches_allowed, YAMUX.refusals_allowed),
    ),
    (
        PROTOCOL,
        "at least N opens within N s",
        (YAMUX.reset_floor, YAMUX.reset_window_seconds),
    ),
    (PROTOCOL, "resets, credit\\) \\| N KiB", (YAMUX.max_control_bytes / KIB,)),
    (PROTOCOL, "and the peer does not \\| N s", (YAMUX.linger_seconds,)),
    (PROTOCOL, "ban N s", (LIMITS.grave_fault_ban_seconds,)),
    (
        PROTOCOL,
        "their connection for N minutes without a pause",
        (connection_table.PROVEN_SECONDS / 60,),
    ),
    (PROTOCOL, "makes way, after N s, for a peer of its own address", (places.REST_SECONDS,)),
    (
        PROTOCOL,
        "bring N sockets a second and begin N handshakes a second, in bursts of N and N;",
        (
            LIMITS.sockets_per_prefix_per_second,
            LIMITS.handshakes_per_prefix_per_second,
            LIMITS.sockets_per_prefix_burst,
            LIMITS.handshakes_per_prefix_burst,
        ),
    ),
    (
        PROTOCOL,
        "a public address has N connections and brings one a second, with bursts of N",
        (LIMITS.max_connections_per_prefix, LIMITS.scarce_connections_burst),
    ),
    (
        PROTOCOL,
        "faults within N s ban a peer for N s, each further ban lasts twice as long, up to N;"
        " N minutes without a fault",
        (
            LIMITS.fault_window_seconds,
            LIMITS.ban_seconds,
            LIMITS.longest_ban_seconds,
            bans.FORGIVEN_SECONDS / 60,
        ),
    ),
    (
        PROTOCOL,
        "have N connections there, and bring one in N s",
        (LIMITS.suspect_connections_per_prefix, rates.SUSPECT_COST / LIMITS.scarce_connections_per_second),
    ),
    (PROTOCOL, "the peer is not let in for N s", (LIMITS.grave_fault_ban_seconds,)),
    (
        PROTOCOL,
        "\\| N bytes there and the same N bytes back, up to N times",
        (host._PING_BYTES, host._PING_BYTES, host._MAX_PINGS_PER_STREAM),
    ),
    (PROTOCOL, "`max_frame_bytes`, N MiB", (LIMITS.max_frame_bytes / MIB,)),
    (
        PROTOCOL,
        "whole within N s plus its size at N KiB/s",
        (LIMITS.frame_start_seconds, LIMITS.frame_floor_bytes_per_second / KIB),
    ),
    (
        PROTOCOL,
        "text keys, at most N KiB, with at most N items",
        (LIMITS.max_header_bytes / KIB, MAX_ITEMS),
    ),
    (PROTOCOL, "it comes while N others", (LIMITS.max_steps_in_flight,)),
    (
        PROTOCOL,
        "chunks of at most N positions, N under way",
        (inputs.PREFILL_TOKENS, inputs.CHUNKS_UNDER_WAY),
    ),
    (
        PROTOCOL,
        "one hop that announces N positions in N s or less",
        (inputs.LONG_PREFILL_TOKENS, inputs.LONG_CHUNK_SECONDS),
    ),
    (
        PROTOCOL,
        "requests of about N positions, up to N at a time and N to one peer",
        (batch_parts.REQUEST_POSITIONS, forward_backward.UNDER_WAY, forward_backward.UNDER_WAY_PER_PEER),
    ),
    (PROTOCOL, "requests of N to N positions", (batch_parts.LEAST_POSITIONS, batch_parts.MOST_POSITIONS)),
    (
        PROTOCOL,
        "as N KiB a block at least and as a Nth of the memory",
        (tapes.GRAPH_BYTES / KIB, tapes.MAX_TAPES),
    ),
    (PROTOCOL, "speak for another. At most N KiB", (LIMITS.max_record_bytes / KIB,)),
    (PROTOCOL, "`addresses` \\| up to N multiaddrs", (records.MAX_ADDRESSES,)),
    (PROTOCOL, "up to N pairs \\(public key, seconds\\)", (records.MAX_RTTS,)),
    (
        PROTOCOL,
        "`ttl_seconds` \\| N to N",
        (records.MIN_TTL_SECONDS, records.MAX_TTL_SECONDS),
    ),
    (PROTOCOL, "better than N times the median of all", (view.MAX_CLAIMED_SPEED,)),
    (PROTOCOL, "against the claim halves every N minutes", (measured.HALF_SECONDS / 60,)),
    (PROTOCOL, "more than N times slower than it claims", (measured.DOUBTED,)),
    (PROTOCOL, "which halves every N minutes\\.", (measured.DOUBTED_HALF_SECONDS / 60,)),
    (PROTOCOL, "more than a N of a step unexplained", (measured.UNEXPLAINED,)),
    (
        PROTOCOL,
        "up to N entries of N bytes, public key \\(N\\) and `seq` \\(N, big-endian\\)",
        (exchange.DIGEST_ENTRIES, exchange._ENTRY.size, 32, 8),
    ),
    (
        PROTOCOL,
        "up to N KiB: for each record its size \\(N bytes\\), its age in milliseconds \\(N bytes\\)",
        (exchange.RECORDS_BYTES / KIB, 2, 4),
    ),
    (PROTOCOL, "every N seconds one random neighbour", (neighbours.HEAL_SECONDS,)),
    (
        PROTOCOL,
        "keeps N of these streams of its own, N of them to bootstrap peers",
        (neighbours.NEIGHBOURS, neighbours.BOOTSTRAP_NEIGHBOURS),
    ),
    (PROTOCOL, "client's side: N s for a chain", (CLIENT.wait_seconds,)),
    (
        PROTOCOL,
        "N s for a forward or backward request at one hop",
        (request_streams.REQUEST_STEPS * CLIENT.step_seconds,),
    ),
    (PROTOCOL, "N s for one token, or for one hop's part", (CLIENT.give_up_seconds,)),
    (
        PROTOCOL,
        "silent for N times the 95th percentile of the session's recent steps, but at least N s and at most"
        " N s; one that says that it is busy has N s",
        (
            watchdog.DEADLINE_FACTOR,
            watchdog.MIN_HOP_SECONDS,
            watchdog.MAX_HOP_SECONDS,
            watchdog.MAX_HOP_SECONDS,
        ),
    ),
    (
        PROTOCOL,
        "dialled N ms apart, or as soon as one fails, at most N at once; with more than N, one that has been"
        " silent for N s",
        (
            dialling.STAGGER_SECONDS * 1000,
            dialling.TRIED_AT_ONCE,
            dialling.TRIED_AT_ONCE,
            dialling.TURN_SECONDS,
        ),
    ),
    (PROTOCOL, "A node dials at most N peers at once for each purpose", (LIMITS.max_dials,)),
    (PROTOCOL, "counted; the N on a stream ends it", (intake.FAULTS_BEFORE_DROP,)),
    (
        PROTOCOL,
        "at fault is avoided for N s, doubling with each further fault up to N;",
        (avoided_peers.AVOID_SECONDS, avoided_peers.MAX_AVOID_SECONDS),
    ),
    (
        PROTOCOL,
        "others are asked for N s, or for twelve times as long as it had the step, N s at most",
        (avoided_peers.AVOID_SECONDS, avoided_peers.MAX_BUSY_SECONDS),
    ),
    (
        OPERATING,
        "announces up to N of the machine's addresses",
        (addresses.MAX_ANNOUNCED,),
    ),
    (
        OPERATING,
        "read again every N s, and when neighbours are lost",
        (announcer.ADDRESSES_SECONDS,),
    ),
    (
        OPERATING,
        "the next one N ms after the last, or as soon as one fails, at most N at once",
        (dialling.STAGGER_SECONDS * 1000, dialling.TRIED_AT_ONCE),
    ),
    (OPERATING, "each further one waits N s longer", (balancer.RANK_SECONDS,)),
    (OPERATING, "It looks every N s on average", (BALANCE.seconds,)),
    (OPERATING, "the swarm has N of the capacity that its servers could have", (BALANCE.quality,)),
    (OPERATING, "`--min-replicas` \\(N\\)", (BALANCE.min_replicas,)),
    (OPERATING, "still serves\\); N seconds later", (balancer.SETTLE_SECONDS,)),
    (OPERATING, "as if it left \\(N s at most\\)", (LIMITS.drain_seconds,)),
    (OPERATING, "no further move for a N, doubling", (balancer.BACK_OFF_SECONDS,)),
    (
        OPERATING,
        "asks up to N peers, those whose blocks have the fewest other servers, every N to N s",
        (cover_gaps.MAX_WATCHED, balancer.WATCH_SECONDS / 2, balancer.WATCH_SECONDS),
    ),
    (
        OPERATING,
        "it gets N % of the memory that the weights leave of N % of free memory: N to N tokens,"
        " and N at least",
        (
            100 * memory.CACHE_SHARE,
            100 * memory.MEMORY_SHARE,
            memory.MIN_CACHE_TOKENS,
            memory.MAX_CACHE_TOKENS,
            memory.USUAL_CACHE_TOKENS,
        ),
    ),
    (
        OPERATING,
        "of one client together hold a N of the cache at most \\(N tokens in a small one",
        (LIMITS.cache_share_per_peer, LIMITS.least_share_tokens),
    ),
    (OPERATING, "Each of up to N requests may hold a frame", (LIMITS.max_compute_streams,)),
    (OPERATING, "one arena of pages of N positions", (kv_pages.PAGE_TOKENS,)),
    (OPERATING, "refused after N seconds", (LIMITS.cache_wait_seconds,)),
    (OPERATING, "prompts in chunks of at most N positions", (CHUNK_POSITIONS,)),
    (OPERATING, "record is repeated every N s", (LIMITS.announce_seconds,)),
    (
        OPERATING,
        "moved to another server \\(N s at most, N s for a session without steps\\)",
        (LIMITS.drain_seconds, LIMITS.drain_idle_seconds),
    ),
    (OPERATING, "forgotten after its TTL, N s", (LIMITS.record_ttl_seconds,)),
    (
        OPERATING,
        "silent for N times their usual step \\(N s at least\\)",
        (watchdog.DEADLINE_FACTOR, watchdog.MIN_HOP_SECONDS),
    ),
    (PATH, "asks up to N of them how far they are", (PINGED_PEERS,)),
    (PATH, "waits up to N seconds for a place in the cache", (LIMITS.cache_wait_seconds,)),
    (PATH, "`Inbox.put`\\), which holds N steps", (LIMITS.max_steps_in_flight,)),
    (PATH, "and waits N seconds at most", (LIMITS.cache_wait_seconds,)),
    (
        PATH,
        "after a N of its deadline \\(N times the 95th percentile of recent steps, between N and N s\\)",
        (
            watchdog.ASK_AT,
            watchdog.DEADLINE_FACTOR,
            watchdog.MIN_HOP_SECONDS,
            watchdog.MAX_HOP_SECONDS,
        ),
    ),
]


def value(word: str) -> float:
    return NUMBERS[word] if word in NUMBERS else float(word.replace(",", ""))


@pytest.mark.parametrize(("name", "sentence", "expected"), CLAIMS, ids=[claim[1][:60] for claim in CLAIMS])
def test_a_number_in_a_sentence_is_the_code_s(name: str, sentence: str, expected: tuple[float, ...]):
    found = [match.groups() for match in re.finditer(sentence.replace("N", N), in_one_line(name))]
    assert found, "no sentence says so any more: say it, or take the entry out"
    for groups in found:
        assert tuple(value(word) for word in groups) == pytest.approx(expected)
