"""An author's card of an adapter: signed, small, strict, and compared with the content."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest

from node.network.transport.identity import identity_of
from routing.sharing.cards import (
    DOMAIN,
    MAX_TEXT,
    Card,
    card_of,
    check_licence,
    sign_card,
    verify_card,
)
from routing.signed import packed, signed
from routing.view import records
from tensor_codec.adapters import LoraSite
from tensor_codec.errors import MessageError
from tensor_codec.limits import Limits
from tests.adapter_fixtures import content

LIMITS = Limits()
AUTHOR, OTHER = identity_of(bytes(31) + b"\1"), identity_of(bytes(31) + b"\2")
OWN = content(2, names=("q_proj", "v_proj"))
CARD = card_of(
    OWN.manifest, OWN.id, OWN.nbytes, name="story", licence="Apache-2.0", model="m", tag="v1", text="a text"
)
WIRE = sign_card(CARD, AUTHOR.private_key, LIMITS)
FIELDS: dict[str, Any] = msgpack.unpackb(msgpack.unpackb(WIRE)[0])


def card(**fields: object) -> bytes:
    """A card with these fields, well signed."""
    return signed(DOMAIN, packed({**FIELDS, **fields}), AUTHOR.private_key)


def test_a_card_comes_back_with_its_author():
    found = verify_card(WIRE, LIMITS)
    assert found == replace(CARD, author=AUTHOR.peer_id)
    assert found.full_name == f"story#{OWN.id[:16]}"
    assert (found.ranks, found.sites) == ((2,), ("q_proj", "v_proj"))
    assert found.size == sum(map(len, OWN.blobs))


def test_keys_of_a_later_version_are_ignored():
    assert verify_card(card(later=[1, 2]), LIMITS) == verify_card(WIRE, LIMITS)


def test_a_card_that_its_author_has_not_signed_is_refused():
    payload, key, signature = msgpack.unpackb(WIRE)
    changed = payload.replace(b"Apache-2.0", b"Apache-3.0")
    assert changed != payload
    for forged in (
        [changed, key, signature],
        [payload, OTHER.public_key, signature],
        [payload, key, signature[:-1] + bytes([signature[-1] ^ 1])],
    ):
        with pytest.raises(MessageError, match="signature"):
            verify_card(msgpack.packb(forged), LIMITS)


def test_a_signature_for_another_purpose_does_not_count():
    with pytest.raises(MessageError, match="signature"):
        verify_card(signed(records.DOMAIN, packed(FIELDS), AUTHOR.private_key), LIMITS)


@pytest.mark.parametrize("wire", [b"", b"\x93", bytes(200), WIRE[:-1], WIRE + b"\0", packed([b"", b"", b""])])
def test_bytes_that_are_no_card_are_refused(wire: bytes):
    with pytest.raises(MessageError):
        verify_card(wire, LIMITS)


def test_a_card_of_more_than_a_kibibyte_is_refused_before_its_signature():
    size = len(card(later=b""))
    room = LIMITS.max_adapter_card_bytes - size - 3  # longer headers of the payload and of this value
    most = card(later=bytes(room))
    assert len(most) <= LIMITS.max_adapter_card_bytes < len(card(later=bytes(room + 8)))
    verify_card(most, LIMITS)
    with pytest.raises(MessageError, match="1024 are allowed"):
        verify_card(card(later=bytes(room + 8)), LIMITS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            ("name", name)
            for name in ("", "../story", "a/b", "a\\b", ".hidden", "-o", "a b", "x" * 49, "é", 7)
        ),
        *(("text", text) for text in ("\x1b[31mred", "two\nlines", "\u202eright", "\0", "x" * 201, None)),
        *(("tag", tag) for tag in ("v\n1", "x" * 33)),
        *(("licence", each) for each in ("", "Apache 2.0", "MIT OR", "(MIT", "MIT)", "a;b", "x" * 97, None)),
        *(("kind", kind) for kind in ("pickle", "", None)),
        *(("ranks", ranks) for ranks in ([0], [8, 8], [True], [5000], ["8"], list(range(1, 18)), None)),
        *(("sites", sites) for sites in (["a b"], ["q", "q"], [""], [1], [f"s{n}" for n in range(17)])),
        *(("bytes", size) for size in (-1, 2.0, (1 << 40) + 1, None)),
        *(("id", adapter) for adapter in (bytes(31), bytes(33), "0" * 64, None)),
        *(("revision", each) for each in ("", "r" * 65, "r\n")),
        *(("model", each) for each in ("", "m" * 129, "\x1b]0;title\x07")),
    ],
)
def test_a_field_that_breaks_its_rule_is_refused_by_its_name(field: str, value: object):
    with pytest.raises(MessageError, match=field):
        verify_card(card(**{field: value}), LIMITS)


def test_the_longest_text_fits_with_everything_else_at_its_most():
    sites = tuple(f"site_{number:02}" for number in range(16))
    full = replace(
        CARD, name="n" * 48, tag="t" * 32, licence="L" * 96, model="m" * 128, revision="r" * 64,
        ranks=tuple(range(1, 17)), sites=sites, text="x" * MAX_TEXT,
    )  # fmt: skip
    assert verify_card(sign_card(full, AUTHOR.private_key, LIMITS), LIMITS).text == "x" * MAX_TEXT


def test_a_card_that_nobody_would_accept_is_not_signed():
    with pytest.raises(ValueError, match="licence"):
        sign_card(replace(CARD, licence="do what you want"), AUTHOR.private_key, LIMITS)


@pytest.mark.parametrize(
    "text",
    [
        "Apache-2.0",
        "MIT OR Apache-2.0",
        "GPL-2.0-only WITH Classpath-exception-2.0",
        "(LGPL-2.1+ AND (MIT OR BSD-3-Clause))",
        "LicenseRef-llama-3",
        "DocumentRef-a:LicenseRef-b",
        "NOASSERTION",
    ],
)
def test_a_licence_is_an_expression_of_spdx(text: str):
    check_licence(text)


@pytest.mark.parametrize(
    "text", ["AND", "MIT MIT", "MIT AND OR Zlib", "()", "MIT ()", ")(", "MIT/Apache", "+"]
)
def test_what_is_no_expression_is_no_licence(text: str):
    with pytest.raises(MessageError, match="licence"):
        check_licence(text)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"revision": "other"}, "revision"),
        ({"kind": "prefix"}, "kind"),
        ({"ranks": (4,)}, "ranks"),
        ({"sites": ("q_proj",)}, "sites"),
    ],
)
def test_a_card_that_says_something_else_than_its_content_is_refused(changed: dict[str, Any], what: str):
    CARD.check(OWN.manifest)
    with pytest.raises(MessageError, match=what):
        replace(CARD, **changed).check(OWN.manifest)


def test_ranks_and_sites_of_a_card_are_in_order_each_once():
    blocks = (
        (LoraSite("v", 8, 1.0), LoraSite("q", 4, 1.0)),
        (LoraSite("q", 8, 1.0),),
        (),
    )
    made = card_of(replace(OWN.manifest, blocks=blocks), OWN.id, 1, name="n", licence="MIT", model="m")
    assert isinstance(made, Card)
    assert (made.ranks, made.sites) == ((4, 8), ("q", "v"))
