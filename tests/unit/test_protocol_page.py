"""docs/protocol.md: messages, records and errors are the code's, key by key."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import routing.view.exchange
from node.config import ConfigError
from node.network import host
from node.network.directory import neighbours
from node.network.directory.kademlia.kademlia import provider_key
from node.network.transport import noise, yamux
from node.network.transport.identity import identity_of
from node.network.transport.yamux_limits import YamuxError
from routing.chains.hops import NoChain
from routing.view import records
from routing.view.records import Record, RecordError, sign_record, verify_record
from tensor_codec import errors
from tensor_codec.blocks import Blocks
from tensor_codec.errors import REFUSALS, MessageError, PeerFault
from tensor_codec.header import pack_header, split_message
from tensor_codec.limits import Limits
from tensor_codec.messages import (
    adapter,
    attach,
    fields,
    forward_backward,
    gradients,
    info,
    reach,
    session,
    sharing,
    steps,
)
from tensor_codec.messages.contract import (
    CODECS,
    REPLIES,
    WHOLE_CODECS,
    Contract,
    codec_for,
    vector_bytes,
)
from tensor_codec.messages.fields import FAULTS
from tensor_codec.span_spec import DTYPES, SpanSpec
from tests.adapter_fixtures import content
from tests.markdown import page, section, table, words

PAGE = page("docs/protocol.md")
LIMITS = Limits()


# Messages

CONTRACT = Contract(bytes(16), 0, 2, 1, 64, 4, "fp32", 64)
ROW = bytes(CONTRACT.row_bytes)
SPEC = SpanSpec("m", "r", Blocks(0, 2), "float32", "a")
ADAPTER = content(blocks=2)
OFFERED = SpanSpec("m", "r", Blocks(0, 2), "float32", ADAPTER.id)
OFFER = adapter.Offer(OFFERED, ADAPTER.manifest, ADAPTER.digests)
RUN = forward_backward.Run(SPEC, 1, "fp32", prompts=1, tape=bytes(16))
SUMMED = replace(RUN, summed=gradients.Summed(bytes(16), 3))
PROMPTS = ROW + ROW  # of two blocks
PACKED = bytes(CONTRACT.packed_row_bytes)
STEP = session.Step(bytes(16), 3, 5, "last", PACKED, ((1, 2),), 1, True, 9, (0,), bytes(8), True, (7,))
INFO = info.PeerInfo(
    "online", "m", "r", 6, 0, 3, "float32", "none", 1, 64, 96, 16, 64, 32, 1.0, 1e-3, 1e-4, "n", "0",
    4,
)  # fmt: skip
OPEN = session.Open(bytes(16), SPEC, 1, 64, "fp32", "p", "s", True, 1, True, 1, PROMPTS, 2, bytes(8), True)


@dataclass(frozen=True)
class Kind:
    """A message with every key that it may have: its frame's parts, and who reads it."""

    parts: list[Any]
    read: Callable[[bytes], object]


def from_client(frame: bytes) -> object:
    return session.decode_from_client(frame, CONTRACT)


def from_hop(frame: bytes) -> object:
    return session.decode_from_hop(frame, CONTRACT)


def answer(frame: bytes) -> object:
    return forward_backward.decode_output(
        frame, forward_backward.request_contract(forward_backward.Forward(RUN, ROW), 4, 64)
    )


def request(frame: bytes) -> object:
    asked = forward_backward.decode_request(frame).divided(4)
    forward_backward.request_contract(asked, 4, 64)
    return asked


def offer(frame: bytes) -> object:
    found = adapter.decode_offer(frame)
    blocks = len(ADAPTER.manifest.blocks)
    return found.checked(LIMITS, blocks) if isinstance(found, adapter.OfferFrame) else found


KINDS = {
    "open": Kind(session.encode_open(OPEN), session.decode_open),
    "opened": Kind(
        session.encode_opened(session.Opened(True, True, 1.5, True, True)), session.decode_open_reply
    ),
    "step": Kind(session.encode_step(STEP), from_client),
    "result": Kind(session.encode_result(session.Result(3, 5, ROW, ((1, 2),), 1, True, 9, (7,))), from_hop),
    "steps": Kind(
        steps.encode_steps([session.Step(bytes(16), 3, 5, "last", ROW, ((1, 2),), 1, owner=bytes(8))]),
        lambda frame: steps.read_steps(fields.read_message(frame, frozenset({"steps"})), 64),
    ),
    "results": Kind(
        steps.encode_results([(bytes(16), session.Result(3, 5, ROW, ((1, 2),), 1))]),
        lambda frame: steps.read_results(fields.read_message(frame, frozenset({"results"})), 64),
    ),
    "gather": Kind(
        steps.encode_gather(bytes(8)),
        lambda frame: steps.read_gather(fields.read_message(frame, frozenset({"gather"}))),
    ),
    "failed": Kind(fields.encode_failed(fields.Failed("ended", "idle", 1.0, 3, "p")), from_hop),
    "close": Kind(session.encode_close(), from_client),
    "attach": Kind(attach.encode_attach(attach.Attach(bytes(16))), attach.decode_first),
    "attached": Kind(attach.encode_attached(), attach.decode_attach_reply),
    "relink": Kind(session.encode_relink(session.Relink(1, "p", "s", True, "fp32", 2, True)), from_client),
    "relinked": Kind(
        session.encode_relinked(session.Relinked(1, True, 5, 2, 3, True, "fp32", 4, True)), from_hop
    ),
    "resume": Kind(session.encode_resume(session.Resume(1, 5, 2, 5, 4)), from_client),
    "feed": Kind(session.encode_feed(session.Feed(1, "p", 5)), from_client),
    "where": Kind(session.encode_where(), from_client),
    "here": Kind(session.encode_here(session.Here(5, 1, 3)), from_hop),
    "forward": Kind(forward_backward.encode_request(forward_backward.Forward(RUN, ROW, PROMPTS)), request),
    "backward": Kind(forward_backward.encode_request(forward_backward.Backward(SUMMED, b"", ROW)), request),
    "collect": Kind(
        gradients.encode_collect(gradients.Collect(bytes(16), "fp32")), forward_backward.decode_request
    ),
    "gradients": Kind(
        gradients.encode_gradients(frozenset({0, 9}), 0, b"1234"),
        lambda frame: gradients.decode_gradients(frame, 0, 4),
    ),
    "offer": Kind(adapter.encode_offer(OFFER), offer),
    "need": Kind(
        adapter.encode_need(adapter.Need((1,), 8), Blocks(0, 2)),
        lambda frame: adapter.decode_need_or_held(frame, Blocks(0, 2)),
    ),
    "block": Kind(
        adapter.encode_blob_part(adapter.BlobPart(1, 4, b"1234")),
        lambda frame: adapter.decode_blob_part(frame, 4),
    ),
    "held": Kind(adapter.encode_held(adapter.HeldAdapter(600.0)), adapter.decode_held),
    "drop": Kind(adapter.encode_drop(adapter.Drop(ADAPTER.id)), adapter.decode_offer),
    "cards": Kind(sharing.encode_question(sharing.AskCards("r", ADAPTER.id)), sharing.decode_question),
    "page": Kind(
        sharing.encode_page(sharing.CardsPage((b"card",), True)),
        lambda frame: sharing.decode_page(frame, LIMITS),
    ),
    "manifest": Kind(sharing.encode_question(sharing.AskManifest(ADAPTER.id)), sharing.decode_question),
    "content": Kind(
        sharing.encode_content(ADAPTER.manifest, ADAPTER.digests),
        lambda frame: sharing.decode_content(frame, ADAPTER.id, LIMITS),
    ),
    "blobs": Kind(
        sharing.encode_question(sharing.AskBlobs(ADAPTER.id, Blocks(0, 2))), sharing.decode_question
    ),
    "reach": Kind(
        reach.encode_reach(reach.ReachQuestion(("/ip4/192.0.2.1/tcp/1",), bytes(8))), reach.decode_reach
    ),
    "seen": Kind(reach.encode_seen(reach.Seen("/ip4/192.0.2.1/tcp/2", bytes(8))), reach.decode_seen),
    "reached": Kind(reach.encode_reached(reach.Reached({0: "reached"}, bytes(8))), reach.decode_reached),
    "describe": Kind(info.encode_describe(), info.decode_describe),
    "info": Kind(info.encode_info(INFO), info.decode_info),
    "output": Kind(
        forward_backward.encode_output(forward_backward.Output(ROW, ((1, 2),), taped=True)), answer
    ),
}
WITHOUT = {  # other bodies of messages without a key
    ("open", "prompts"): b"",
    ("backward", "tape"): ROW + PROMPTS + ROW,
    ("step", "c"): ROW,
}
MESSAGES = {row[0]: row[1:] for row in table(PAGE, "## 4. Sessions")}


def test_the_page_has_every_message():
    assert MESSAGES.keys() == KINDS.keys()
    every = re.findall(
        r'"k": "(\w+)"', "\n".join(path.read_text() for path in Path(session.__file__).parent.glob("*.py"))
    )
    assert set(every) | {"forward", "backward"} == KINDS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_has_the_keys_of_the_page_and_can_do_without_those_that_may_be_absent(kind: str):
    needed, optional = (set(words(cell)) for cell in MESSAGES[kind][:2])
    header, body = split_message(b"".join(KINDS[kind].parts))
    fields = header._fields
    assert fields.keys() == needed | optional
    for key in fields:
        alone = WITHOUT.get((kind, key), bytes(body))
        frame = pack_header({name: value for name, value in fields.items() if name != key}) + alone
        if key in optional:
            KINDS[kind].read(frame)
        else:
            with pytest.raises(MessageError):
                KINDS[kind].read(frame)


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_has_a_body_where_the_page_says_so_and_nowhere_else(kind: str):
    said = MESSAGES[kind][2]
    whole = b"".join(KINDS[kind].parts)
    assert (split_message(whole)[1].nbytes == 0) == (said == "none")
    with pytest.raises(MessageError):
        KINDS[kind].read(whole + b"\0")


@pytest.mark.parametrize(
    ("kind", "key", "most", "more"),
    [
        ("open", "model", "m" * 256, "m" * 257),
        ("open", "revision", "r" * 128, "r" * 129),
        ("open", "predecessor", "p" * 128, "p" * 129),
        ("open", "successor", "s" * 128, "s" * 129),
        ("failed", "message", "x" * 300, "x" * 301),
        ("failed", "retry", 3600, 3601),
    ],
)
def test_a_value_may_be_as_large_as_the_page_says(kind: str, key: str, most: Any, more: Any):
    size = len(most) if isinstance(most, str) else most
    sentences = re.findall(rf"[^\n]*`{key}`[^\n]*", PAGE)
    assert any(f"{size:,}" in sentence for sentence in sentences)
    header, body = split_message(b"".join(KINDS[kind].parts))
    KINDS[kind].read(pack_header(header._fields | {key: most}) + bytes(body))
    with pytest.raises(MessageError):
        KINDS[kind].read(pack_header(header._fields | {key: more}) + bytes(body))


@pytest.mark.parametrize("kind", ["open", "step"])
def test_the_keys_that_the_page_explains_are_those_of_the_message(kind: str):
    rows = table(PAGE, f"**`{kind}`** (" if kind == "step" else f"**`{kind}`** is")
    explained = {name: row[1] for row in rows for name in words(row[0])}
    needed, optional = MESSAGES[kind][0], MESSAGES[kind][1]
    assert list(explained) == [name for name in words(needed) + words(optional) if name in explained]
    assert explained.keys() == {*words(needed), *words(optional)}
    for name, what in explained.items():
        assert ("optional" in what) == (name in words(optional)), name


def test_the_codecs_and_dtypes_of_the_page_are_the_code_s():
    rows = table(PAGE, "**Bodies.**")
    assert {row[0] for row in rows} == CODECS
    for codec, formula, *_ in rows:
        for hidden in (1, 16, 576, 4096, 1 << 16):
            size = eval(formula, {"__builtins__": {}}, {"min": min, "hidden": hidden})
            assert size == vector_bytes(codec, hidden), (codec, hidden)
    keys = {row[0]: row for row in table(PAGE, "**`open`** is")}
    assert set(words(keys["dtype"][1])) == set(DTYPES)
    assert set(words(keys["codec"][1])) == WHOLE_CODECS
    assert codec_for(frozenset({"bfloat16"})) == "bf16"
    assert {codec_for(frozenset({"bfloat16", other})) for other in ("float32", "float16")} == {"fp32"}


def test_the_replies_of_the_page_are_the_code_s():
    keys = {row[0]: row for row in table(PAGE, "**`step`** (")}
    assert [int(word) for word in words(keys["r"][1])] == list(REPLIES)
    assert REPLIES == {0: "all", 1: "last", 2: "none", 3: "replay"}
    assert "all, the last one, none; 3: a part of a replay" in keys["r"][2]


# Streams


def test_the_protocols_of_the_page_are_the_code_s():
    ids = [row[0] for row in table(PAGE, "## 2. Streams")]
    ours = [
        session.SESSION_PROTOCOL, session.PUSH_PROTOCOL, forward_backward.COMPUTE_PROTOCOL,
        adapter.ADAPTER_PROTOCOL, info.INFO_PROTOCOL, neighbours.PROTOCOL, host.PING_PROTOCOL,
        reach.REACH_PROTOCOL,
    ]  # fmt: skip
    assert ids[: len(ours)] == ours
    first = PAGE[: PAGE.index("## 2. Streams")]
    for protocol in (noise.PROTOCOL, noise.PRIVATE_PROTOCOL, yamux.PROTOCOL):
        assert f"`{protocol}`" in first


# Records


def full_record() -> tuple[Record, bytes]:
    """A record with every field, and the private key of its peer."""
    key = Ed25519PrivateKey.generate().private_bytes_raw()
    record = Record(
        peer=identity_of(key).peer_id,
        addresses=("/ip4/10.0.0.5/tcp/1",), role="serve", model="m", revision="r", blocks=6, start=0, stop=3,
        next_start=3, next_stop=6, dtype="float32", adapters=("a",), seconds_per_block=1e-3,
        prefill_seconds_per_token=1e-3, cache_tokens=64, session_tokens=64, step_tokens=64, queue=1.0, seq=1,
        prompts=True, codecs=("int8o",), batches=True, lora=64, reach="relayed",
        relays=(identity_of(bytes(32)).peer_id,),
        through=("/ip4/192.0.2.1/tcp/1/p2p/QmNnooDu7bfjPFoTZYxMNLWUQJyrVwtbZg5gBMjTezGAJN",),
        lan=("/ip4/192.168.1.5/tcp/1",), seen="192.0.2.1", helps=True, relay_mbit=50, relayed_bytes=1,
        unreached="timed out", name="n", version="0",
    )  # fmt: skip
    return record, key


FIELDS = {name: row[1] for row in table(PAGE, "## 5. Records") for name in words(row[0])}


def test_a_record_has_the_fields_of_the_page_and_can_do_without_those_that_may_be_absent():
    record, private_key = full_record()
    wire = sign_record(record, private_key)
    fields = msgpack.unpackb(msgpack.unpackb(wire)[0])
    assert fields.keys() == FIELDS.keys()
    key = Ed25519PrivateKey.from_private_bytes(private_key)

    def signed(fields: dict[str, Any]) -> bytes:
        payload = msgpack.packb(fields)
        signature = key.sign(records.DOMAIN + payload)
        packed: bytes = msgpack.packb([payload, key.public_key().public_bytes_raw(), signature])
        return packed

    assert verify_record(signed(fields), swarm="public", limits=LIMITS) == record
    pairs = [name for name, what in FIELDS.items() if what.startswith(("only", "optional"))]
    assert pairs
    rest = {name: value for name, value in fields.items() if name not in pairs}
    verify_record(signed(rest), swarm="public", limits=LIMITS)
    for name in rest:
        lacking = {other: value for other, value in fields.items() if other != name}
        with pytest.raises(RecordError):
            verify_record(signed(lacking), swarm="public", limits=LIMITS)


def test_roles_and_states_are_those_of_the_page():
    assert set(words(FIELDS["role"])) == records.ROLES
    assert set(words(FIELDS["state"])) == records.STATES
    assert all(re.search(rf"\b{reach}\b", FIELDS["reach"]) for reach in records.REACHES)


@pytest.mark.parametrize(
    ("kind", "frame"),
    [
        ("digest", next(iter(routing.view.exchange.encode_digest({}, ask=True)))),
        ("records", pack_header({"type": "records"}) + b"x"),
    ],
)
def test_what_neighbours_say_has_the_keys_of_the_page(kind: str, frame: bytes):
    said = re.search(rf"^- \*\*`{kind}`\*\*: (.*?)\. Body", PAGE, re.MULTILINE | re.DOTALL)
    assert said
    assert set(re.findall(r"`(\w+)`", said[1])) == split_message(frame)[0]._fields.keys()


def test_the_provider_key_is_made_of_what_the_page_says():
    said = re.search(r"SHA-256 over `raceme-providers-1`, (\w+) and (\w+), separated by NUL", PAGE)
    assert said
    assert said.groups() == ("swarm", "revision")
    keys = {provider_key(swarm, revision) for swarm in ("a", "b") for revision in ("1", "2")}
    assert len(keys) == 4


# Errors


def test_what_a_breach_of_a_limit_is_answered_with_is_a_code_of_the_page():
    for name, _, _, breach in table(PAGE, "## 6. Limits"):
        code = breach.partition(",")[0]
        if re.fullmatch(r"[a-z_]+", code) and code not in ("close", "refuse"):
            assert code in {**REFUSALS, **FAULTS}, name


def test_the_exceptions_of_the_page_exist_and_blame_peers_where_the_page_says():
    known = {"RecordError": RecordError, "YamuxError": YamuxError, "NoChain": NoChain}
    known |= {"ConfigError": ConfigError}
    names = [name for row in table(PAGE, "Raised on the spot") for name in words(row[0])]
    kinds = [known.get(name) or getattr(errors, name) for name in names]
    assert "All but the last three (and `Refused` with its children, which blame nobody) are" in PAGE
    assert all(issubclass(kind, PeerFault) for kind in kinds[:-3])
    assert not any(issubclass(kind, PeerFault) for kind in [*kinds[-3:], *REFUSALS.values()])
    mentioned = {kind for kind in vars(errors).values() if isinstance(kind, type)}
    assert mentioned <= {*kinds, *REFUSALS.values(), PeerFault}


def test_the_contents_list_the_sections():
    listed = re.findall(r"^\d\. \[(.+?)\]", PAGE, re.MULTILINE)
    assert listed == re.findall(r"^## \d\. (.+)$", PAGE, re.MULTILINE)
    assert all(section(PAGE, f"## {number}. ") for number in range(1, len(listed) + 1))
