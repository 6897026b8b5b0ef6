"""Every limit that a peer can run into, in one place.

Each has its unit in its name.  Where the number comes from stands beside it; docs/protocol.md
prints the same table for users.  One frozen value is built in `main` and handed down.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import index

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
LEAST_SHARE = 0.01  # that a peer may be given: below it one session has no room
MAX_SHARES = 64  # peers with a share of their own: gateways, of which a fleet has a few
MAX_HEADER_BYTES = 4 * KIB  # 1 MiB of msgpack can become 72 MiB of objects
# What an operator or a program may choose, least and most.  What every client may count on is not lowered.
CHOICES: dict[str, tuple[int, int]] = {
    "max_session_tokens": (16, 1 << 40),
    "max_step_tokens": (2048, 1 << 20),
    "max_frame_bytes": (16 * MIB, 1 * GIB),
    "session_life_seconds": (60, 30 * 86_400),
    "session_idle_seconds": (5, 86_400),
    "tape_bytes": (0, 1 << 40),
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a node allows its peers.  The defaults suit a 2-core machine with 24 GiB."""

    # Frames and messages
    max_header_bytes: int = MAX_HEADER_BYTES  # of the protocol, not to be changed
    max_frame_bytes: int = 16 * MIB
    frame_start_seconds: float = 5.0  # first frame of a stream
    frame_floor_bytes_per_second: int = 256 * KIB  # whole frame: 5 s + size / this
    reply_taken_seconds: float = 10.0  # a reply that the peer does not read

    # Connections (go-libp2p's figures where it has one)
    max_connections: int = 128
    max_inbound_connections: int = 64
    max_connections_per_peer: int = 3  # one of each family of IP, and one from the port that it listens on
    max_connections_per_prefix: int = 8  # of one public address, where places are scarce
    suspect_connections_per_prefix: int = 2  # of an address with several banned ids
    known_good_connection_share: float = 0.25  # of the inbound places, for peers that did useful work
    idle_connection_seconds: float = 90.0  # without a stream; servers next to each other ping once a minute
    sockets_per_prefix_per_second: float = 20.0  # accepted; a silent one costs 0.3 ms, one that waits 1 ms
    sockets_per_prefix_burst: int = 128  # those that wait for a handshake, too
    handshakes_per_prefix_per_second: float = 4.0  # a handshake and what follows cost 12 ms: 5 % of a core
    handshakes_per_prefix_burst: int = 6  # more at once lengthen the steps of others; 30 on one machine
    scarce_connections_per_second: float = 1.0  # of one public address, where places are scarce
    scarce_connections_burst: int = 16
    max_unauthenticated_connections: int = 32
    handshake_seconds: float = 5.0  # TCP accept to a muxed connection, the whole
    membership_seconds: float = 1.0  # proof of the swarm key, inside the handshake
    negotiation_seconds: float = 3.0  # protocol of a stream
    dial_seconds: float = 5.0
    max_dials: int = 8  # at once for each purpose: sessions, pings, records with the Kademlia table
    first_dial_pause_seconds: float = 1.0  # after a failed dial, to a peer and to an address; doubles
    dial_pause_seconds: float = 60.0  # the longest pause
    reached_dial_pause_seconds: float = 4.0  # the same, where a dial has worked: it may be back
    failed_dials_per_host_per_second: float = 1.0  # to one IP address, whatever the ports and peers
    failed_dials_per_host_burst: int = 64  # servers of one machine that end at once
    max_successor_addresses: int = 2  # dialled for a client that names the next hop
    successor_dials_per_client_per_second: float = 1.0  # to hops without a link
    successor_dials_per_client_burst: int = 8
    tcp_user_timeout_seconds: float = 10.0  # the kernel's own default is a quarter of an hour
    max_unread_bytes_per_connection: int = 8 * MIB
    # Frames above 128 KiB that arrive; smaller ones wait unread in their stream's window
    large_bytes_per_connection: int = 4 * MIB  # those up to 1 MiB; larger ones come one at a time
    max_large_frames: int = 32  # of all peers, in frames of `max_frame_bytes`: 512 MiB

    # Relaying (circuit relay v2)
    max_reservations: int = 16  # peers that this node relays to; go-libp2p has 128 for a public relay
    max_bootstrap_reservations: int = 128  # the same, of a bootstrap node, which computes nothing
    max_reservations_per_prefix: int = 8  # of one public address, as in go-libp2p
    reservation_seconds: float = 1800.0  # without a refresh; go-libp2p has an hour
    max_circuits: int = 64
    max_circuits_from_peer: int = 8  # a client with a chain of eight relayed hops
    max_circuits_to_peer: int = 16  # as in go-libp2p
    max_circuits_from_prefix: int = 16  # of one public address, a quarter of all
    circuits_per_prefix_per_second: float = 2.0  # each costs the target a handshake, and dials of a punch
    circuits_per_prefix_burst: int = 32  # two gateways with eight relayed hops, that lose them and come again
    circuit_open_seconds: float = 5.0  # from the question to the answer; a handshake over it has as long
    circuit_idle_seconds: float = 120.0  # without a byte either way; go-libp2p ends every circuit then
    circuit_bytes_in_hand: int = 64 * KIB  # each way, between two streams: a frame of the muxer
    relay_bytes_per_second: int = 6_250_000  # 50 Mbit/s, of all circuits: a tenth of a core
    relay_burst_bytes: int = 1 * MIB  # a prompt of 128 positions of a large model
    max_circuits_per_peer: int = 2  # connections through relays, next to direct ones: one each way
    max_circuit_handshakes: int = 8  # under way, of peers that come through relays
    max_relay_message_bytes: int = 4 * KIB  # circuit v2's own bound
    max_punches: int = 4  # at once; each dials two addresses that a peer has named
    punch_seconds: float = 5.0  # of dials to these; DCUtR over TCP succeeds in the first of them, or never
    punch_dial_seconds: float = 1.5  # of one dial: a SYN is repeated after a second

    # Bans, of what a peer does of its own accord
    faults_before_ban: int = 3  # within the window
    fault_window_seconds: float = 60.0
    ban_seconds: float = 15.0  # the first; each further one twice as long
    grave_fault_ban_seconds: float = 60.0  # for one fault that no honest peer commits: `PeerFault.is_grave`
    longest_ban_seconds: float = 3600.0
    bans_before_suspect: int = 3  # of ids of one address, within the window
    suspect_seconds: float = 60.0  # the first time; each further time twice as long

    # Streams
    max_streams_per_connection: int = 80
    max_streams_per_peer: int = 80  # a session each, and the directory's
    max_streams: int = 512
    # Opened by all peers of an address; a connection alone opens 20/s, in bursts of 64 (yamux)
    streams_per_prefix_per_second: float = 160.0  # one costs 0.2 ms: 3 % of a core
    streams_per_prefix_burst: int = 512  # as many as there are
    streams_per_peer_per_second: float = 2.0  # that a peer opens whatever others at its address do
    streams_per_peer_burst: int = 16  # a client that arrives: pings, records, sessions
    # py-libp2p's own protocols: Kademlia, identify, ping
    libp2p_stream_seconds: float = 10.0  # of one stream, for all its questions
    max_libp2p_bytes_per_stream: int = 64 * KIB  # that the peer sends; twenty peers with addresses take 16
    max_libp2p_streams_per_peer: int = 2  # of each protocol
    max_libp2p_streams: int = 8  # of each, all peers; py-libp2p's Kademlia stops at 12

    # Sessions
    max_sessions_per_peer: int = 64  # a client process may be a gateway; what they hold is bounded below
    max_session_tokens: int | None = None  # batch * max_length; None: as many as the cache holds
    max_step_tokens: int = 2048  # batch * tokens of one step; longer prefill comes in chunks
    max_steps_in_flight: int = 8  # chunks of one prefill on their way through a hop
    max_steps_per_frame: int = 64  # a decode batch on a CPU (`BatchPolicy.max_rows`)
    max_large_steps: int = 16  # above 32 KiB, waiting or computed, in frames of `max_frame_bytes`: 256 MiB
    max_waiting_steps: int = 256  # waiting for compute, of all peers
    max_waiting_steps_per_peer: int = 64
    step_wait_seconds: float = (
        120.0  # for compute, before a step begins: our clients wait no longer by default
    )
    session_first_step_seconds: float = 10.0
    session_idle_seconds: float = 60.0
    session_detached_seconds: float = (
        15.0  # the kernel gives a silent connection up after 10 s, and then a dial
    )
    session_life_seconds: float = 1800.0
    session_position_seconds: float = 0.25  # of life more for each position that it was opened for
    cache_share_per_peer: float = 0.25
    # Peers with a share of their own, each with it, in place of the bounds for one peer: of the cache,
    # streams, sessions, waiting steps and requests, prompts, tapes, adapters and sums.  An operator names the
    # gateways of a private swarm here: each is one peer, and has many users.
    peer_shares: tuple[tuple[str, float], ...] | None = None
    least_share_tokens: int = 8192  # a peer's share is never less, where the cache has so many
    max_prompt_bytes: int = 64 * MIB  # deep prompts that sessions hold
    max_prompt_bytes_per_peer: int = 16 * MIB  # those of one frame
    # Messages without work, of one peer: our clients ask once a second and session, while a step is late
    where_per_second: float = 10.0
    relinks_per_second: float = 5.0
    idle_steps_per_second: float = 100.0  # for no session, of another route, or answered from memory
    frame_rate_session_share: float = 0.2  # of each rate more for every session of the peer
    frame_burst_seconds: float = 4.0  # so many seconds' messages at once
    frame_rate_peers_per_prefix: int = 8  # peers of one address have together as many times the rate
    successor_seconds: float = 2.0  # for a hop to connect to the next one, while its client waits
    cache_wait_seconds: float = 2.0  # for room in the cache, at the opening and in mid-session

    # Requests without a session, forward and backward: an idle stream of theirs holds a place
    max_compute_streams_per_peer: int = 4
    max_compute_streams: int = 32  # with a frame each in hand: 512 MiB
    compute_idle_seconds: float = 10.0  # a new stream costs no round trip
    # Of requests that were refused, by network prefix: one of 512 positions of a large model has 8 MiB.
    refused_compute_bytes_per_second: int = 4 << 20
    refused_compute_bytes_burst: int = 16 << 20
    max_compute_seconds: float = 60.0  # of one peer's requests that wait or run: our clients wait 90 s
    tape_bytes: int = 2 * GIB  # half of a long backward's activations; 8 x 128 positions of SmolLM2 take 0.84
    tape_idle_seconds: float = 30.0  # without a request of its client, which computes a loss meanwhile

    # Adapters of guests
    max_adapter_rank: int = 64  # vLLM's default is 16, its largest 512; QLoRA trains 64
    max_adapter_sites: int = 16  # of a block; the most linears that a supported block has are 11
    max_adapter_virtual_tokens: int = (
        2048  # peft's examples have 8 to 128; Cartridges (arXiv:2506.06266) 2048
    )
    max_adapter_manifest_bytes: int = 64 * KIB  # 200 blocks of 7 sites, all different, take 16 KiB
    adapter_bytes: int = 1 * GIB  # of all guests, where an eighth of the weights is as much
    adapter_share_per_peer: float = 0.25
    adapter_share_per_prefix: float = 0.5  # of a public address
    max_adapters_per_peer: int = 8
    adapter_idle_seconds: float = 600.0  # a break between two conversations
    max_adapter_uploads_per_peer: int = 2
    max_adapter_uploads: int = 8
    adapter_upload_seconds: float = 30.0  # and the time of its size at the slowest rate allowed
    adapter_upload_bytes_per_second: int = 32 * MIB  # of all uploads: 5 % of a core for hashes and copies
    adapter_upload_burst_bytes: int = 64 * MIB
    # While others decode: on two cores 32 MiB/s beside them took a fifth of their speed, 8 MiB/s little.
    adapter_upload_bytes_per_second_beside_steps: int = 8 * MIB
    adapter_upload_burst_bytes_beside_steps: int = 4 * MIB  # a small adapter, in the time of some steps
    adapter_offers_per_second: float = 4.0  # of one peer: a step of training has one
    adapter_offers_burst: int = 32
    # Adapters that are shared
    max_adapter_card_bytes: int = 1 * KIB  # as a record: 200 characters of text and 16 sites fit
    max_adapter_cards_per_page: int = 64  # a page is half of the frames that need no place
    max_adapter_cards_per_seeder: int = 256  # that a client takes: four pages, checked at 0.3 ms each
    max_adapter_seeders: int = 24  # that a client asks in one look: a look for servers meets as many
    max_adapter_downloads_per_peer: int = 2
    max_adapter_downloads: int = 8  # with a piece of 120 KiB each in hand
    adapter_seed_bytes_per_second: int = 8 * MIB  # of all downloads: steps of sessions need the link too
    adapter_seed_burst_bytes: int = 16 * MIB
    adapter_seed_share_per_prefix: float = 0.5  # of both, for a public address
    sum_bytes: int = 512 * MIB  # gradients of adapters in float64; a large adapter of 8 blocks takes 84
    sum_share_per_peer: float = 0.25
    max_sums_per_peer: int = 4
    sum_idle_seconds: float = 60.0  # between two requests of a sum: twice what one may take

    # Records
    max_record_bytes: int = 1 * KIB
    max_records: int = 10_000
    record_life_seconds: float = 90.0  # from our receipt, whatever its peer says: three announcements
    records_per_peer_per_second: float = 100.0  # verified at 0.3 to 0.6 ms each: 3 to 6 % of a core
    records_idle_seconds: float = 90.0  # every server is heard of three times in it
    records_per_peer_burst: int = 1_000  # a tenth of a view; a bootstrap peer may send a whole one
    records_per_network_per_second: float = 100.0  # peers of one public /24 or /48 together: 3,000 servers
    records_per_network_burst: int = 1_000
    new_peers_per_neighbour_per_second: float = 2.0  # unmet, and passed on: 180 within the life of a record
    new_peers_per_neighbour_burst: int = 64
    record_ttl_seconds: float = 90.0
    announce_seconds: float = 30.0

    # Questions whether a peer can be reached, each of which has this node dial
    reach_question_seconds: float = 20.0  # between two of a peer; a node asks once in a quarter of an hour
    reach_questions_burst: int = (
        3  # of a peer: at its start it finds a mapped port a moment later, or a relay
    )
    max_reach_addresses: int = 4  # that are dialled for one question
    max_reach_questions: int = 8  # dialled for at once, of all peers; each dials the asking machine alone
    reach_dial_seconds: float = 3.0  # of one address: twice the round trips of a slow satellite
    # The local network, where anybody may announce anything by multicast
    max_lan_announcement_bytes: int = 1300  # RFC 6763, section 6.2: it fits a packet; ours have up to 500
    max_lan_peers: int = 256  # remembered, to be dialled again ever more rarely; some 100 KiB
    lan_dials_per_second: float = 1.0
    lan_dials_burst: int = 16  # a room of laptops

    # The node itself
    descriptor_share: float = 0.8  # of RLIMIT_NOFILE: the rest is for files, pushes and our own dials
    memory_share: float = 0.9  # of the stated bound of resident memory
    memory_end_share: float = 1.0
    memory_retry_seconds: float = 5.0
    watermark_seconds: float = 1.0  # a reading takes 0.1 ms
    min_free_disk_bytes: int = 2 * GIB  # of a disk smaller than 20 GiB a tenth
    max_metrics_connections: int = 16  # to `--metrics`: two Prometheus servers, probes, and a person
    max_metrics_request_bytes: int = 8 * KIB  # line and headers; a scrape of Prometheus has 300 bytes
    metrics_seconds: float = 5.0  # of a request and its answer: half of Prometheus' usual timeout
    log_lines_per_peer_per_second: int = 5  # of one kind; the others of the second are counted
    log_lines_per_second: int = 20  # of one kind, of all peers: ids are free, and a line is 100 to 300 bytes

    # The Kademlia table: names of peers, and no values
    kademlia_message_bytes: int = 16 * KIB  # 40 peers with 8 addresses each
    kademlia_questions_per_peer_per_second: float = 10.0  # a lookup asks each peer once
    kademlia_questions_per_peer_burst: int = 50
    max_table_peers_per_network: int = 8  # a bucket takes a quarter, as py-libp2p's does
    max_providers: int = 2048  # 1 KiB each
    max_providers_per_key: int = 64
    max_providers_per_network: int = 8  # of a key
    max_provider_keys_per_peer: int = 8  # two revisions, their shared adapters, and four adapters
    provider_life_seconds: float = 300.0  # written again every minute

    # Leaving
    drain_seconds: float = 10.0
    drain_idle_seconds: float = 2.0  # a session that is silent so long will not move before it goes on

    def step_tokens(self, token_bytes: int) -> int:
        """Positions of all rows that one step may carry, each of so many bytes; 0 where none fits."""
        room = self.max_frame_bytes - 2 * self.max_header_bytes
        return max(0, min(self.max_step_tokens, room // token_bytes))

    def own_share(self, peer: str) -> float | None:
        """The share that the operator has given a peer; None for a peer with the usual bounds."""
        return None if self.peer_shares is None else dict(self.peer_shares).get(peer)

    @property
    def own_shares(self) -> dict[str, float]:
        """The peers with a share of their own, and their shares."""
        return dict(self.peer_shares or ())

    def share_of(self, peer: str, usual: float) -> float:
        """The part of something that a peer may have, where others may have `usual`."""
        share = self.own_share(peer)
        return usual if share is None else share

    def number_of(self, peer: str, usual: int, usual_share: float) -> int:
        """How many things a peer may have, where others may have `usual` of them in `usual_share`."""
        return self.part_of(peer, int(usual / usual_share), usual)

    def streams_of(self, peer: str) -> int:
        """Streams that a peer may have open."""
        return self.part_of(peer, self.max_streams, self.max_streams_per_peer)

    def streams_on_a_connection_of(self, peer: str) -> int:
        """The same, on one connection."""
        return self.part_of(peer, self.max_streams, self.max_streams_per_connection)

    def sessions_of(self, peer: str) -> int:
        """Sessions that a peer may have open; each has a stream."""
        return self.part_of(peer, self.max_streams, self.max_sessions_per_peer)

    def waiting_steps_of(self, peer: str) -> int:
        """Steps of a peer that may wait for compute."""
        return self.part_of(peer, self.max_waiting_steps, self.max_waiting_steps_per_peer)

    def prefix_of(self, peer: str, prefix: str) -> str:
        """The network prefix with which a peer shares what it uses; "" for one with a share of its own."""
        return prefix if self.own_share(peer) is None else ""

    def part_of(self, peer: str, total: int, usual: int) -> int:
        """Places of `total` that a peer may have, where others may have `usual`; at least one."""
        share = self.own_share(peer)
        return usual if share is None else max(1, int(share * total))


def share_of_a_peer(text: str) -> tuple[str, float]:
    """PEER=SHARE, as an operator writes it: a peer and its part of what all peers may have.

    Raises ValueError for another form, or a share outside LEAST_SHARE to 1.
    """
    peer, mark, number = text.partition("=")
    try:
        share = float(number) if mark and peer else math.nan
    except ValueError:
        share = math.nan
    if not LEAST_SHARE <= share <= 1:
        raise ValueError(f"{text[:80]!r} is not PEER=SHARE with a share of {LEAST_SHARE:g} to 1")
    return peer, share


def with_shares(limits: Limits, shares: Sequence[tuple[str, float]]) -> Limits:
    """The limits with shares of these peers.  Raises ValueError, which begins with `share`."""
    if not shares:
        return limits
    twice = [peer for peer, count in Counter(peer for peer, _ in shares).items() if count > 1]
    if twice:
        raise ValueError(f"share names {twice[0]} more than once")
    if len(shares) > MAX_SHARES:
        raise ValueError(f"share names {len(shares)} peers, {MAX_SHARES} are allowed")
    return replace(limits, peer_shares=tuple(shares))


def limits_with(limits: Limits | None = None, **chosen: float | None) -> Limits:
    """The limits with those that somebody chose; None leaves one as it is.

    Raises ValueError for one that is out of range (`CHOICES`), which begins with its name.
    """
    limits = limits or Limits()
    given = {name: _checked(name, value) for name, value in chosen.items() if value is not None}
    return replace(limits, **given)  # type: ignore[arg-type]  # by their names


def _checked(name: str, value: object) -> float:
    """A whole number, for seconds any; numpy's and torch's too.  Raises ValueError."""
    least, most = CHOICES[name]
    number: float | None = None
    if not isinstance(value, bool):
        with suppress(TypeError):
            number = float(value) if name.endswith("_seconds") else index(value)  # type: ignore[arg-type]
    if number is None or not least <= number <= most:
        raise ValueError(f"{name} is {value!r}, {least} to {most} are allowed")
    return number
