"""docs/gateway.md says the codes, the paths and the numbers of the code."""

from __future__ import annotations

import re
from pathlib import Path

from client.gateway.door.limits import HttpLimits, PrefixLimits, QueueLimits, RequestLimits
from client.gateway.formats.families import FAMILIES
from client.gateway.formats.grammars import GrammarLimits
from client.gateway.formats.requests import MAX_TOOLS
from tests.markdown import in_one_line

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "gateway.md").read_text()
CODE = "".join(path.read_text() for path in sorted((ROOT / "client" / "gateway").rglob("*.py")))


def test_every_code_of_an_error_is_on_the_page():
    codes = set(re.findall(r'code="(\w+)"', CODE))
    codes |= set(re.findall(r'_refuse\(\d+, "(\w+)"', CODE))
    assert {"no_chain", "headers_too_large", "invalid_http"} <= codes
    assert {code for code in codes if f"`{code}`" not in PAGE} == set()


def test_the_numbers_of_the_page_are_those_of_the_code():
    http, queue, kept, request = HttpLimits(), QueueLimits(), PrefixLimits(), RequestLimits()
    grammars = GrammarLimits()
    text = in_one_line("docs/gateway.md")
    for sentence in (
        f"`--max-concurrent` answers ({queue.max_concurrent}) are computed at a time",
        f"`--max-queued` requests ({queue.max_queued}) wait for `--queue-seconds` ({queue.queue_seconds:g})",
        f"`--max-kept` ({kept.max_conversations}) of them, {kept.max_tokens:,} tokens together,",
        f"for {kept.idle_seconds:g} s, and less where the servers' caches are small or full. A prompt of the"
        f" same key that begins with the same tokens, {kept.least_tokens} at least",
        f"A reader that takes nothing for {http.reader_seconds:g} s",
        f"headers not whole within {http.header_seconds:g} s, a body not within {http.body_seconds:g} s",
        f"a body above `--max-body` ({http.max_body_bytes >> 20} MiB)",
        f"headers and URL above {http.max_header_bytes >> 10} KiB",
        f"or {http.max_connections:,} connections are open, or {http.max_connections_per_address} of one"
        f" address, or bodies of {http.max_bodies_bytes >> 20} MiB",
        f"{http.max_connections:,} connections are open at a time, {http.max_connections_per_address} of one",
        f"waits for its first token, {http.first_token_seconds:g} s at most",
        f"After {http.keep_alive_seconds:g} s of silence",
        f"those under way have {http.drain_seconds:g} s",
        f"up to {request.max_stops} texts of up to {request.max_stop_characters} characters",
        f"| `n` | 1 to {request.max_choices};",
        f"up to {request.max_prompts} prompts",
        f"of a chat, up to {request.max_top_logprobs}; of completions `logprobs` up to"
        f" {request.max_completion_logprobs}",
        f"up to {request.max_biases} tokens, -100 to 100",
        f"{request.default_new_tokens:,} at most",
        f"a grammar of {grammars.max_grammar_bytes >> 10} KiB (`max_grammar_bytes`; 400 beyond),"
        f" {grammars.max_grammar_symbols:,} symbols",
        f"{grammars.max_lexer_states:,} states of its lexer",
        f"{grammars.max_grammars_kept} grammars are kept",
        f"functions are the only kind of tool, {MAX_TOOLS} at most",
    ):
        assert sentence in text, sentence


def test_every_path_of_the_page_is_served_and_the_other_way_round():
    shown = set(re.findall(r"(?:GET|POST) (/[\w/]+)`", PAGE))
    for path in shown:
        assert f'"{path}"' in CODE, path


def test_the_families_of_the_page_are_those_of_the_code():
    shown = re.findall(r"^\| `([\w-]+)` \| (?:`<tool|`\[TOOL|JSON with)", PAGE, re.MULTILINE)
    assert sorted(shown) == sorted(family.name for family in FAMILIES)
