"""Cards: what the author of an adapter says about it, signed.

On the wire a card is the msgpack array `[payload, public_key, signature]`, as a record is; the domain is
`raceme-card-1`.  The author is the peer id of the public key.  A card names an adapter by its id, which is a
hash of its content: whoever carries the card and whoever gives the content can change neither.  Everything
else in it is the author's word.  Unknown keys are ignored, since a later version may add some.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from routing.names import PeerId, peer_id_of
from routing.signed import packed, signed, verified
from routing.view.records import MAX_RANK, NOBODY
from tensor_codec.adapters import AdapterManifest, is_adapter_id
from tensor_codec.errors import MessageError
from tensor_codec.header import Header, unpack_map
from tensor_codec.limits import Limits

CardKind = Literal["lora", "prompt", "head", "prefix"]

DOMAIN = b"raceme-card-1"
KINDS = frozenset(get_args(CardKind))
MAX_NAME, MAX_TAG, MAX_LICENCE, MAX_TEXT = 48, 32, 96, 200  # characters
MAX_MODEL, MAX_REVISION = 128, 64  # as in a record
MAX_LISTED = 16  # ranks and sites, each
MAX_BYTES = 1 << 40
SHORT_ID = 16  # hexadecimal digits of an id behind a name
NO_LICENCE = "NOASSERTION"  # SPDX's word where nobody has said one
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SITE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:-]*\+?")
_OPERATORS = ("AND", "OR", "WITH")


@dataclass(frozen=True, slots=True)
class Card:
    """An author's word about an adapter; `verify_card` returns checked values.

    id: 64 hexadecimal digits.  kind: of most of it.  name: the author's, and nobody else is bound by it.
    licence: an SPDX expression.  model, revision: that it was made for.  size: bytes of its blobs.
    ranks, sites: of its low-rank matrices, without a rank or a name twice.  tag: of a version.
    text: for people, one line.  author: the signer.
    """

    id: str
    kind: CardKind
    name: str
    licence: str
    model: str
    revision: str
    size: int
    ranks: tuple[int, ...] = ()
    sites: tuple[str, ...] = ()
    tag: str = ""
    text: str = ""
    author: PeerId = NOBODY

    @property
    def full_name(self) -> str:
        """The name and the first digits of the id, which pin the content."""
        return f"{self.name}#{self.id[:SHORT_ID]}"

    def check(self, manifest: AdapterManifest) -> None:
        """Raise MessageError where a manifest, which the id stands for, is another than the card says."""
        for what, said, found in (
            ("revision", self.revision, manifest.revision),
            ("kind", self.kind, manifest.kind),
            ("ranks", self.ranks, ranks_of(manifest)),
            ("sites", self.sites, sites_of(manifest)),
        ):
            if said != found:
                raise MessageError(
                    f"the card of {self.full_name} says {what} {said}, its content has {found}"
                )


def card_of(
    manifest: AdapterManifest, adapter: str, size: int, *, name: str, licence: str, model: str, tag: str = "",
    text: str = "",
) -> Card:  # fmt: skip
    """The card of an adapter inside blocks, without its author.

    adapter: the id.  size: bytes of all blobs.
    """
    return Card(
        adapter, manifest.kind, name, licence, model, manifest.revision, size, ranks_of(manifest),
        sites_of(manifest), tag, text,
    )  # fmt: skip


def ranks_of(manifest: AdapterManifest) -> tuple[int, ...]:
    """The ranks of an adapter, from the least on, the first ones that a card has room for."""
    found = {site.rank for block in manifest.blocks for site in block}
    return tuple(sorted(found))[:MAX_LISTED]


def sites_of(manifest: AdapterManifest) -> tuple[str, ...]:
    """The names of an adapter's sites in their order, the first ones that a card has room for."""
    found = {site.name for block in manifest.blocks for site in block}
    return tuple(sorted(found))[:MAX_LISTED]


def sign_card(card: Card, private_key: bytes, limits: Limits) -> bytes:
    """The wire form of a card, whose author is the holder of the key.

    private_key: 32 raw bytes of Ed25519.  Raises ValueError for a card that no peer would accept.
    """
    wire = signed(DOMAIN, packed(_to_wire(card)), private_key)
    try:
        verify_card(wire, limits)
    except MessageError as error:
        raise ValueError(str(error)) from None
    return wire


def verify_card(wire: bytes, limits: Limits) -> Card:
    """Check a card from the wire: size, signature, every field.  Raises MessageError."""
    if len(wire) > limits.max_adapter_card_bytes:
        raise MessageError(
            f"a card of {len(wire)} bytes, at most {limits.max_adapter_card_bytes} are allowed"
        )
    payload, public_key = verified(DOMAIN, wire, "a card")
    return _from_wire(Header(unpack_map(payload)), peer_id_of(public_key))


def check_licence(text: str) -> None:
    """Raise MessageError unless the text has the form of an SPDX licence expression (ISO/IEC 5962, annex D).

    The names of the licences are not looked up: a later list has more.
    """
    fault = MessageError(f"licence is {text!r:.60}, an SPDX expression such as Apache-2.0 is allowed")
    depth, wants_name = 0, True
    for token in re.findall(r"[()]|[^\s()]+", text):
        if token == "(":
            depth += 1
        elif token == ")":
            depth -= 1
        elif token not in _OPERATORS and not _LICENCE.fullmatch(token):
            raise fault
        opens = token == "(" or token not in (*_OPERATORS, ")")
        if opens != wants_name or depth < 0:
            raise fault
        wants_name = token in ("(", *_OPERATORS)
    if wants_name or depth:
        raise fault


def _to_wire(card: Card) -> dict[str, object]:
    fields: dict[str, object] = {
        "bytes": card.size,
        "id": bytes.fromhex(card.id),
        "kind": card.kind,
        "licence": card.licence,
        "model": card.model,
        "name": card.name,
        "ranks": list(card.ranks),
        "revision": card.revision,
        "sites": list(card.sites),
        "tag": card.tag,
        "text": card.text,
    }
    return dict(sorted(fields.items()))


def _from_wire(fields: Header, author: PeerId) -> Card:
    kind: Any = fields.choice("kind", KINDS)  # Any: mypy cannot see that the choice is a Literal
    name, licence = fields.text("name", MAX_NAME), fields.text("licence", MAX_LICENCE)
    if not _NAME.fullmatch(name):
        raise MessageError(f"name is {name!r}, letters, digits, dots, dashes and underscores are allowed")
    check_licence(licence)
    ranks, sites = fields.items("ranks", MAX_LISTED), fields.items("sites", MAX_LISTED)
    if any(type(rank) is not int or not 0 < rank <= MAX_RANK for rank in ranks) or _has_twins(ranks):
        raise MessageError(f"ranks are not numbers from 1 to {MAX_RANK}, each once")
    if any(type(site) is not str or not _SITE.fullmatch(site) for site in sites) or _has_twins(sites):
        raise MessageError("sites are not names of linears, each once")
    adapter = fields.binary("id", 32).hex()
    assert is_adapter_id(adapter)
    return Card(
        id=adapter,
        kind=kind,
        name=name,
        licence=licence,
        model=fields.text("model", MAX_MODEL),
        revision=fields.text("revision", MAX_REVISION),
        size=fields.integer("bytes", 0, MAX_BYTES),
        ranks=tuple(ranks),
        sites=tuple(sites),
        tag=fields.text("tag", MAX_TAG, empty=True),
        text=fields.text("text", MAX_TEXT, empty=True),
        author=author,
    )


def _has_twins(items: Sequence[object]) -> bool:
    return len(set(items)) < len(items)
