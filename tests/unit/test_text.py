"""Text that comes piece by piece and yet is what the tokenizer makes of all tokens at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from client.generation.text import MIN_KEPT_TOKENS, PROMPT_TOKENS, TextStream

# Small tokenizers of every kind that there is.  The added tokens are one special one and one for
# which tokenizers look at the spaces around it.

WORDS = ["the", "end", "Paris", "t", "h", "e", "n", "d", "s", "ing", ".", ",", "'", "é", "😀", "\ufffd", "中"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def finished(tokenizer: Tokenizer, **options) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens([AddedToken("<both>", lstrip=True, rstrip=True, normalized=True)])
    tokenizer.add_special_tokens([AddedToken("<mid>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", **options)


@lru_cache
def byte_level() -> PreTrainedTokenizerFast:
    """Bytes with some merges, as GPT-2's and Llama 3's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("e", "n"), ("en", "d"), ("ð", "Ł"), ("Ċ", "Ċ")]
    vocabulary = {token: number for number, token in enumerate(alphabet + [a + b for a, b in merges])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return finished(tokenizer, clean_up_tokenization_spaces=True)  # which is ignored for BPE


@lru_cache
def metaspace() -> PreTrainedTokenizerFast:
    """Pieces that begin with a space which the first one of a text loses, as T5's."""
    pieces = ["▁the", "▁end", "▁", "▁a", "▁Paris", *WORDS, "<unk>"]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in pieces], unk_id=len(pieces) - 1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return finished(tokenizer, unk_token="<unk>")


def fallback(decoder) -> PreTrainedTokenizerFast:
    pieces = ["<unk>", "▁the", "▁end", "▁", "▁▁", "▁Paris", *WORDS, *BYTES]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.decoder = decoder
    return finished(tokenizer, unk_token="<unk>")


@lru_cache
def llama() -> PreTrainedTokenizerFast:
    """Byte fallback, and the space in front of a text is lost, as Llama 2's."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return fallback(decoders.Sequence(steps))


@lru_cache
def gemma() -> PreTrainedTokenizerFast:
    """Byte fallback, and no space is lost."""
    return fallback(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]))


@lru_cache
def word_pieces(cleans_up: bool = False) -> PreTrainedTokenizerFast:
    """Pieces that say where no space is, as BERT's."""
    pieces = ["[UNK]", "n't", "'m", "!", "do", *WORDS, *(f"##{word}" for word in WORDS)]
    tokenizer = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=not cleans_up)
    return finished(tokenizer, unk_token="[UNK]", clean_up_tokenization_spaces=cleans_up)


def word_pieces_cleaned_up() -> PreTrainedTokenizerFast:
    return word_pieces(cleans_up=True)


@lru_cache
def characters() -> PreTrainedTokenizerFast:
    """Single characters, and the library takes spaces out of the text afterwards."""
    vocabulary = {piece: number for number, piece in enumerate([*" '.,?ntsmvrex", "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return finished(tokenizer, unk_token="<unk>", clean_up_tokenization_spaces=True)


@lru_cache
def words() -> PreTrainedTokenizerFast:
    """Words, with no decoder: a space between any two."""
    vocabulary = {piece: number for number, piece in enumerate([*WORDS, "<unk>", ""])}
    return finished(Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")), unk_token="<unk>")


@lru_cache
def suffixes() -> PreTrainedTokenizerFast:
    """Pieces that say where a word ends, as CLIP's."""
    pieces = [*WORDS, *(f"{word}</w>" for word in WORDS), "<unk>"]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    return finished(tokenizer, unk_token="<unk>")


@lru_cache
def slow() -> ByT5Tokenizer:
    """Written in Python: bytes, of which the wrong ones are left out."""
    return ByT5Tokenizer(extra_ids=3)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte level": byte_level,
    "metaspace": metaspace,
    "byte fallback, space lost": llama,
    "byte fallback": gemma,
    "word pieces": word_pieces,
    "word pieces, cleaned up": word_pieces_cleaned_up,
    "characters, cleaned up": characters,
    "words": words,
    "suffixes": suffixes,
    "slow": slow,
}
tokenizers = pytest.mark.parametrize("name", TOKENIZERS)
# More where somebody looks for what is left: RACEME_TEXT_EXAMPLES=5000.
many = settings(max_examples=int(os.environ.get("RACEME_TEXT_EXAMPLES", "30")))


@st.composite
def token_lists(draw, tokenizer, longest: int = 80):
    """Tokens of real text, of noise, of one again and again; often more than the window."""
    texts = st.text(st.sampled_from("the endParis\né😀👩‍👩‍👧✓.,'𝕏 \ufffd中"), max_size=longest)
    # Some that only the model has; tokenizers written in Python do not take them.
    tokens = st.integers(0, len(tokenizer) + 2 * tokenizer.is_fast - 1)
    noise = st.lists(tokens, max_size=longest)
    some = st.lists(tokens, min_size=1, max_size=4).flatmap(lambda few: st.lists(st.sampled_from(few)))
    again = st.tuples(st.lists(tokens, max_size=3), st.integers(1, longest)).map(
        lambda pair: pair[0] * pair[1]
    )
    real = texts.map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    parts = draw(st.lists(noise | real | some | again, max_size=4))
    return [token for part in parts for token in part]


def behind(tokenizer, prompt: list[int], tokens: list[int], skip: bool = True) -> str:
    """The right text: what the text of all has beyond that of the prompt."""
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    text = tokenizer.decode(prompt + tokens, skip_special_tokens=skip)
    if text.startswith(before):
        return text[len(before) :]
    return text[next(at for at, char in enumerate(before) if text[at : at + 1] != char) :]


def streamed(
    tokenizer, tokens: list[int], stop: tuple[str, ...] = (), **options
) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stop, **options)
    shown = []
    for token in tokens:
        if stream.stopped:
            break
        shown.append(stream.push(token))
    shown.append(stream.finish())
    return shown, stream


@tokenizers
@given(data=st.data(), skip=st.booleans())
@many
def test_the_pieces_joined_are_the_text_and_at_every_token_its_beginning(name, data, skip):
    tokenizer = TOKENIZERS[name]()
    prompt, tokens = data.draw(token_lists(tokenizer)), data.draw(token_lists(tokenizer))
    shown, _ = streamed(tokenizer, tokens, prompt=prompt, skip_special_tokens=skip)
    assert "".join(shown) == behind(tokenizer, prompt, tokens, skip)
    text = ""
    for count, piece in enumerate(shown[:-1], 1):
        text += piece
        assert behind(tokenizer, prompt, tokens[:count], skip).startswith(text)


@tokenizers
@given(data=st.data(), skip=st.booleans())
@many
def test_the_pieces_joined_are_the_text_up_to_the_first_stop_string(name, data, skip):
    tokenizer = TOKENIZERS[name]()
    prompt, tokens = data.draw(token_lists(tokenizer, 30)), data.draw(token_lists(tokenizer))
    whole = behind(tokenizer, prompt, tokens, skip)
    inside = st.tuples(st.integers(0, len(whole)), st.integers(1, 6)).map(lambda at: whole[at[0] : sum(at)])
    known = st.sampled_from(["the end", "\n\n", "é", "zzz", "<mid>", " Paris"])
    stops = tuple(stop for stop in data.draw(st.lists(inside | known, max_size=3)) if stop)
    ends = [(whole.index(stop) + len(stop), whole.index(stop)) for stop in stops if stop in whole]
    expected = whole[: min(ends)[1]] if ends else whole
    shown, stream = streamed(tokenizer, tokens, stops, prompt=prompt, skip_special_tokens=skip)
    assert "".join(shown) == expected
    assert stream.stopped
    assert stream.push(0) == stream.finish() == ""


@tokenizers
def test_a_token_costs_the_same_after_many_others_whatever_they_are(name):
    tokenizer = TOKENIZERS[name]()
    decoded = 0

    class Counting:
        def __getattr__(self, attribute):
            return getattr(tokenizer, attribute)

        def decode(self, tokens, **options):
            nonlocal decoded
            decoded += len(tokens)
            return tokenizer.decode(tokens, **options)

    real = tokenizer.encode("the end Paris é😀\ufffd", add_special_tokens=False)
    for again in (
        *([token] for token in range(0, len(tokenizer), 40)),
        real,
        [len(tokenizer) - 1],
        real[-2:],
    ):
        tokens = (again * 1000)[:1000]
        decoded = 0
        shown, _ = streamed(Counting(), tokens, prompt=real)
        assert "".join(shown) == behind(tokenizer, real, tokens)
        assert decoded < 150 * len(tokens)


@tokenizers
def test_of_a_long_prompt_the_end_is_enough(name):
    tokenizer = TOKENIZERS[name]()
    again = (tokenizer.encode("the end Paris é😀. s", add_special_tokens=False) * 600)[:600]
    for rest in ("", "€", "é"):
        prompt = again + tokenizer.encode(rest, add_special_tokens=False)
        for cut in range(4):
            tokens = prompt[len(prompt) - cut :] + tokenizer.encode("é the end", add_special_tokens=False)
            before = prompt[: len(prompt) - cut]
            assert len(before) > PROMPT_TOKENS
            stream = TextStream(tokenizer, prompt=before)
            assert len(stream._pieces._tokens) < 2 * MIN_KEPT_TOKENS
            shown = [stream.push(token) for token in tokens] + [stream.finish()]
            assert "".join(shown) == behind(tokenizer, before, tokens)


def test_the_space_in_front_of_a_continuation_stays():
    for tokenizer in (llama(), metaspace()):
        prompt = tokenizer.convert_tokens_to_ids(["▁the"])
        tokens = tokenizer.convert_tokens_to_ids(["▁Paris", "."])
        assert streamed(tokenizer, tokens, prompt=prompt)[0] == [" Paris", ".", ""]
        assert "".join(streamed(tokenizer, tokens, (" Paris",), prompt=prompt)[0]) == ""


def test_characters_of_three_byte_tokens_stay_whole_however_many_there_are():
    tokenizer = llama()
    tokens = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in "€".encode()] * 100 + ["▁end"])
    assert "".join(streamed(tokenizer, tokens)[0]) == "€" * 100 + " end"


def test_wrong_bytes_are_shown_while_they_come_and_not_kept():
    for tokenizer, bad in ((llama(), "<0xFF>"), (byte_level(), "ÿ")):
        stream = TextStream(tokenizer)
        token = tokenizer.convert_tokens_to_ids(bad)
        shown = "".join(stream.push(token) for _ in range(1000))
        assert shown in ("\ufffd" * 997, "\ufffd" * 1000)
        assert shown + stream.finish() == "\ufffd" * 1000


@given(st.text(st.sampled_from("x ntsmvre'.,?"), max_size=40))
@settings(max_examples=300)
def test_spaces_that_the_library_takes_out_later_are_not_shown(text):
    tokenizer = characters()
    tokens = tokenizer.convert_tokens_to_ids(list(text))
    for cut in (0, len(tokens) // 2):
        shown, _ = streamed(tokenizer, tokens[cut:], prompt=tokens[:cut])
        assert "".join(shown) == behind(tokenizer, tokens[:cut], tokens[cut:])


@given(st.text(st.sampled_from("é😀👩‍👧✓𝕏"), min_size=1, max_size=100))
@example("😀" * 40)
def test_no_half_of_a_character_is_shown(text):
    tokenizer = byte_level()
    tokens = tokenizer.encode(text)
    assert len(tokens) > len(text) or len(text.encode()) == len(text)
    shown, _ = streamed(tokenizer, tokens)
    assert all("\ufffd" not in piece for piece in shown)
    assert "".join(shown) == text


def test_a_character_that_never_becomes_whole_is_shown_at_the_end():
    tokens = byte_level().encode("a😀")[:-1]
    shown, _ = streamed(byte_level(), tokens)
    assert shown[0] == "a"
    assert shown[-1] == "\ufffd"


def test_text_is_shown_as_soon_as_it_is_certain():
    tokenizer = byte_level()
    stream = TextStream(tokenizer, stop=("end.",))
    shown = [stream.push(token) for char in "an envy" for token in tokenizer.encode(char)]
    assert shown == ["a", "n", " ", "", "", "env", "y"]


def test_a_stop_string_over_many_tokens_is_found_and_nothing_of_it_is_shown():
    tokenizer = byte_level()
    stream = TextStream(tokenizer, stop=("the end", "😀"))
    shown = []
    for char in "x" * 100 + "the en" + "the end and more":
        shown += [stream.push(token) for token in tokenizer.encode(char)]
    assert stream.stopped
    assert "".join(shown) == "x" * 100 + "the en"


def test_a_stop_string_that_did_not_come_whole_is_shown_at_the_end():
    tokenizer = byte_level()
    shown, _ = streamed(tokenizer, tokenizer.encode("it is the en"), ("the end",))
    assert shown[-1] == "the en"
    assert "".join(shown) == "it is the en"


def test_special_tokens_have_no_text():
    tokenizer = byte_level()
    tokens = [*tokenizer.encode("a"), tokenizer.eos_token_id, *tokenizer.encode("b")]
    assert "".join(streamed(tokenizer, tokens)[0]) == "ab"
