"""Cards for the adapters of an operator whose folder has none: signed by the node itself."""

from __future__ import annotations

from node.network.transport.identity import Identity
from node.serving.adapters.desk import OwnAdapter
from routing.sharing.cards import NO_LICENCE, card_of, sign_card
from tensor_codec.limits import Limits


def sign_own(identity: Identity, model: str, limits: Limits, own: OwnAdapter) -> bytes:
    """The card of an operator's adapter.  Nobody has stated its licence.  model: the name of its model."""
    size = sum(map(len, own.blobs))
    name = own.name.lstrip("._-") or "adapter"
    card = card_of(own.manifest, own.id, size, name=name, licence=NO_LICENCE, model=model)
    return sign_card(card, identity.private_key, limits)
