import codecs
import contextlib
import stat
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.config import ConfigError
from node.network.transport.membership import (
    MembershipProof,
    load_swarm_key,
    new_swarm_key,
    parse_swarm_key,
    swarm_id,
)
from tensor_codec.errors import LocalProtocolError, NotAMember
from tests.fakes import ALICE, BOB

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
CAROL = "12D3KooWCarol"


def ends(**changes):
    """Alice's and Bob's end of one connection; `alice_` or `bob_` before a field's name changes it."""
    alice: dict[str, Any] = {"key": KEY, "role": "initiator", "ours": ALICE.peer_id, "theirs": BOB.peer_id}
    bob: dict[str, Any] = {"key": KEY, "role": "responder", "ours": BOB.peer_id, "theirs": ALICE.peer_id}
    for who, fields, challenge in (("alice_", alice, b"1"), ("bob_", bob, b"2")):
        fields |= {"channel": b"h" * 32, "challenge": challenge * 32}
        fields |= {name.removeprefix(who): value for name, value in changes.items() if name.startswith(who)}
    return MembershipProof(**alice), MembershipProof(**bob)


def exchange(alice, bob):
    """Whether Alice accepts Bob, and Bob Alice."""
    from_alice, from_bob = alice.answer(bob.challenge), bob.answer(alice.challenge)
    return accepts(alice, from_bob), accepts(bob, from_alice)


def accepts(end, proof):
    try:
        end.verify(proof)
    except NotAMember:
        return False
    return True


def test_two_ends_with_the_same_key_accept_each_other():
    assert exchange(*ends()) == (True, True)


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_two_ends_accept_each_other_if_and_only_if_their_keys_are_the_same(key, other):
    assert exchange(*ends(alice_key=key, bob_key=other)) == (key == other, key == other)


@pytest.mark.parametrize(
    "changes",
    [
        {"bob_channel": b"x" * 32},  # two connections, joined by somebody in the middle
        {"bob_role": "initiator"},  # both dialled
        {"bob_theirs": CAROL},
        {"bob_ours": CAROL},
        {"alice_theirs": CAROL},
        {"alice_ours": CAROL},
    ],
)
def test_an_answer_made_for_another_connection_is_refused(changes):
    assert exchange(*ends(**changes)) == (False, False)


@given(st.integers(0, 255))
def test_an_answer_with_any_bit_flipped_is_refused(bit):
    alice, bob = ends()
    bob_answer = bytearray(bob.answer(alice.challenge))
    alice.answer(bob.challenge)
    bob_answer[bit // 8] ^= 1 << bit % 8
    assert not accepts(alice, bytes(bob_answer))


def test_an_answer_to_an_earlier_challenge_is_refused():
    alice, bob = ends()
    recorded = bob.answer(alice.challenge)
    alice_again, _ = ends(alice_challenge=b"9" * 32)
    alice_again.answer(bob.challenge)
    assert not accepts(alice_again, recorded)


def test_our_own_challenge_and_answer_sent_back_are_refused():
    alice, _ = ends()
    with pytest.raises(NotAMember, match="no challenge of its own"):
        alice.answer(alice.challenge)
    alice, bob = ends()
    assert not accepts(alice, alice.answer(bob.challenge))


def test_a_proof_before_the_challenge_is_our_own_bug():
    with pytest.raises(LocalProtocolError):
        ends()[0].verify(b"p" * 32)


def test_the_key_is_never_sent():
    alice, bob = ends()
    sent = alice.challenge + alice.answer(bob.challenge)
    assert KEY not in sent
    assert repr(KEY) not in repr(alice)


def test_a_swarm_id_tells_swarms_apart_and_not_the_key():
    assert swarm_id(None) == "public"
    assert swarm_id(KEY) == swarm_id(bytes(KEY)) != swarm_id(OTHER_KEY)
    assert len(swarm_id(KEY)) == 32
    assert KEY.hex()[:8] not in swarm_id(KEY)


def test_a_new_key_file_is_private_and_loads_again(tmp_path):
    path = tmp_path / "swarm.key"
    key = new_swarm_key(path)
    assert len(key) == 32
    assert load_swarm_key(path) == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="exists already"):
        new_swarm_key(path)
    assert load_swarm_key(path) == key


def test_a_key_survives_comments_empty_lines_and_windows():
    content = b"# ours\r\n\r\nraceme-swarm-key-1\r\n" + KEY.hex().upper().encode() + b"\r\n# end"
    assert parse_swarm_key(content) == KEY


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the first line is not 'raceme-swarm-key-1'"),
        (KEY, "the first line is not"),
        (b"\xff\xfe", "UTF-16"),
        (codecs.BOM_UTF8 + b"raceme-swarm-key-1\n", "UTF-8 without BOM is needed"),
        ("raceme-swarm-key-1\n".encode("utf-16"), "UTF-8 without BOM is needed"),
        ("raceme-swarm-key-1\n".encode("utf-16-le"), "UTF-8 without BOM is needed"),
        (b"raceme-swarm-key-1\n\xe9", "UTF-8 without BOM is needed"),
        (b"raceme-swarm-key-1\n", "0 lines after"),
        (b"raceme-swarm-key-1\n" + b"ab" * 31, "a key of 31 bytes, expected 32"),
        (b"raceme-swarm-key-1\n" + b"zz" * 32, "not in hexadecimal digits"),
        (b"raceme-swarm-key-1\n" + b"ab" * 32 + b"\n" + b"ab" * 32, "2 lines after"),
    ],
)
def test_a_damaged_key_file_is_named_with_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "swarm.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=message) as caught:
        load_swarm_key(path)
    assert str(path) in str(caught.value)


def test_a_key_file_that_others_can_read_is_refused(tmp_path):
    path = tmp_path / "swarm.key"
    new_swarm_key(path)
    path.chmod(0o604)
    with pytest.raises(ConfigError, match="others can read it"):
        load_swarm_key(path)


def test_a_missing_key_file_says_how_to_make_one(tmp_path):
    with pytest.raises(ConfigError, match="new-swarm-key"):
        load_swarm_key(tmp_path / "swarm.key")


@given(st.binary(max_size=120))
def test_no_content_of_a_key_file_does_worse_than_a_clear_error(content):
    with contextlib.suppress(ValueError):
        assert len(parse_swarm_key(content)) == 32
