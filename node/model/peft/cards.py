"""The author's card beside the files of an adapter: `raceme_card.json`."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from node.config import ConfigError
from node.model.checkpoint.folder import read_json
from node.runtime.files import disk_errors, write_atomically
from routing.sharing.cards import Card, verify_card
from routing.sharing.catalogue import SignedCard
from tensor_codec.errors import MessageError
from tensor_codec.limits import Limits

CARD_NAME = "raceme_card.json"
SIGNED = "signed"  # the key of the signed bytes; the others are for people


def facts_of(card: Card) -> dict[str, Any]:  # Any: JSON
    """A card as JSON, with the author and the full name."""
    facts = asdict(card)
    facts["bytes"] = facts.pop("size")
    return {**facts, "full_name": card.full_name}


def write_card(path: Path, signed: SignedCard) -> None:
    """Write a card into a folder.  Raises ConfigError where the disk refuses."""
    content = {**facts_of(signed.card), SIGNED: base64.b64encode(signed.wire).decode()}
    with disk_errors(path):
        write_atomically(path / CARD_NAME, (json.dumps(content, indent=2) + "\n").encode())


def read_card(path: Path, limits: Limits) -> SignedCard | None:
    """The card in a folder, None without one.  What is signed counts alone.  Raises ConfigError."""
    file = path / CARD_NAME
    if not file.is_file():
        return None
    text = read_json(file).get(SIGNED)
    try:
        if type(text) is not str:
            raise MessageError(f"{SIGNED} is missing")
        wire = base64.b64decode(text, validate=True)
        return SignedCard(verify_card(wire, limits), wire)
    except (binascii.Error, ValueError, MessageError) as error:
        raise ConfigError(f"{file} holds no signed card: {error}") from None
