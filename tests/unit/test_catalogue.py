"""Cards of many seeders as one list, and the one adapter that a name means."""

from __future__ import annotations

import pytest

from routing.names import PeerId
from routing.sharing.cards import Card
from routing.sharing.catalogue import SignedCard, chosen, last_id, listed, parse_name
from tensor_codec.errors import MessageError

A, B, C = PeerId("A"), PeerId("B"), PeerId("C")
ANNA, BERT = PeerId("anna"), PeerId("bert")


def signed(number: int, name: str = "story", author: PeerId = ANNA, text: str = "") -> SignedCard:
    card = Card(f"{number:064x}", "lora", name, "MIT", "m", "r", 1, text=text, author=author)
    return SignedCard(card, repr(card).encode())


def test_an_adapter_stands_once_with_all_of_its_seeders():
    found = listed({B: [signed(1), signed(2, "b")], A: [signed(1)], C: []})
    assert [(each.card.name, each.seeders) for each in found] == [("b", (B,)), ("story", (A, B))]


def test_of_an_author_s_cards_for_one_adapter_the_one_that_most_give_counts():
    usual, rare = signed(1, text="usual"), signed(1, text="a rare one")
    found = listed({A: [usual], B: [rare], C: [usual]})
    assert [each.signed for each in found] == [usual]
    assert found[0].seeders == (A, B, C)
    tied = listed({A: [usual], B: [rare]})
    assert [each.signed for each in tied] == [rare]  # the first by its bytes, for everybody


def test_cards_of_two_authors_for_one_content_both_stand():
    found = listed({A: [signed(1), signed(1, author=BERT)]})
    assert [each.card.author for each in found] == [ANNA, BERT]


def test_a_name_alone_is_good_while_one_adapter_has_it():
    found = listed({A: [signed(1), signed(2, "other")]})
    assert chosen(found, "story").card.id.endswith("1")
    assert chosen(found, "#" + "0" * 63 + "2").card.name == "other"


def test_a_name_of_two_adapters_is_one_error_that_lists_them():
    ids = (1 << 252, 2 << 252)
    found = listed({A: [signed(ids[0]), signed(ids[1], author=BERT)]})
    with pytest.raises(
        LookupError, match=r"names 2 adapters.*NAME#DIGITS: story#1000000000000000 by anna, "
    ) as error:
        chosen(found, "story")
    assert "story#2000000000000000 by bert" in str(error.value)
    assert chosen(found, "story#2").card.author == BERT
    assert chosen(found, "story", "anna").card.author == ANNA


def test_two_cards_of_one_content_are_told_apart_by_the_author():
    found = listed({A: [signed(1), signed(1, author=BERT)]})
    with pytest.raises(LookupError, match="--author"):
        chosen(found, "story#" + "0" * 16)
    assert chosen(found, "story", "bert").card.author == BERT


def test_an_error_lists_a_few_candidates_and_counts_the_others():
    with pytest.raises(LookupError, match="names 20 adapters") as error:
        chosen(listed({A: [signed(n) for n in range(20)]}), "story")
    assert str(error.value).endswith("and 12 more")


@pytest.mark.parametrize("wanted", ["stor", "story#f", "other"])
def test_what_nobody_shares_is_said(wanted: str):
    with pytest.raises(LookupError, match=f"no adapter {wanted} is shared"):
        chosen(listed({A: [signed(1)]}), wanted)


@pytest.mark.parametrize(
    ("text", "parts"),
    [("a", ("a", "")), ("a#0F", ("a", "0f")), ("#00", ("", "00")), ("a.b-c#1", ("a.b-c", "1"))],
)
def test_a_name_has_digits_after_a_mark(text: str, parts: tuple[str, str]):
    assert parse_name(text) == parts


@pytest.mark.parametrize("text", ["", "#", "a#", "a#xyz", "a#" + "0" * 65, "a#1#2"])
def test_other_names_are_refused(text: str):
    with pytest.raises(ValueError, match=r"NAME#DIGITS"):
        parse_name(text)


def test_ids_of_pages_grow():
    cards = [signed(n).card for n in (1, 2)]
    assert last_id(cards, "") == cards[1].id
    assert last_id([], "a") == "a"
    for after, page in ((cards[1].id, cards), (cards[1].id, cards[1:]), ("", [cards[1], cards[0]])):
        with pytest.raises(MessageError, match="ids grow"):
            last_id(page, after)
