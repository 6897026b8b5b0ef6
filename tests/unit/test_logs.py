"""What a process writes to standard error."""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from node.runtime.logs import Handler, JsonLines, TextLines

CODE = """
import logging
from node.runtime.logs import set_up_logging
set_up_logging("text")
import node.network.host, node.network.directory.kademlia.kademlia
logging.getLogger("libp2p.host.basic_host").error("a peer did something")
logging.getLogger("libp2p.kad_dht").error("and something else")
logging.getLogger("raceme").info("ours")
"""


def test_what_peers_do_to_libp2p_is_not_logged_although_it_is_imported_later():
    ran = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=60)
    assert [line.split(" ", 1)[1] for line in ran.stderr.splitlines()] == ["ours"]


def logged(formatter: logging.Formatter, message: str, error: Exception | None = None) -> str:
    stream = io.StringIO()
    handler = Handler(stream)
    handler.setFormatter(formatter)
    exc_info = (type(error), error, None) if error is not None else None
    handler.handle(logging.LogRecord("raceme", logging.INFO, "", 0, "%s", (message,), exc_info))
    return stream.getvalue()


def test_what_a_peer_calls_itself_stays_in_its_line_and_does_nothing_to_a_terminal():
    name = "a\n12:00:00 b\r\x1b[2J\u202e\x9b1m"
    (line,) = logged(TextLines(), name).splitlines()
    assert line.endswith(r" a\n12:00:00 b\r\x1b[2J\u202e\x9b1m")
    lines = logged(TextLines(), name, ValueError("\x1b[2J")).splitlines()
    assert lines[1:] == [r"ValueError: \x1b[2J"]
    line = logged(JsonLines(), name + "é")
    assert line.isascii()
    assert json.loads(line)["message"] == name + "é"


def test_a_log_that_takes_no_more_is_no_error(capsys):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    handler = Handler(Full())
    handler.handle(logging.LogRecord("raceme", logging.INFO, "", 0, "a", (), None))
    assert capsys.readouterr().err == ""
    handler.handle(logging.LogRecord("raceme", logging.INFO, "", 0, "%d", ("a bug",), None))
    assert "TypeError" in capsys.readouterr().err


SECRET = {"prompt", "prompts", "text", "texts", "token", "tokens", "ids", "hidden", "body", "frame", "step"}


def logged_names() -> Iterator[tuple[str, str]]:
    """Each name within the values of a line of our own logs, with its place."""
    root = Path(__file__).resolve().parents[2]
    for package in ("node", "client", "routing", "tensor_codec"):
        for path in (root / package).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text())):
                if isinstance(call, ast.Call) and re.match(r"log(ger)?\.\w+$", ast.unparse(call.func)):
                    for value in (each for argument in call.args[1:] for each in ast.walk(argument)):
                        name = getattr(value, "attr", getattr(value, "id", ""))
                        yield f"{path.relative_to(root)}:{call.lineno}", name


def test_no_line_holds_a_prompt_tokens_or_hidden_states():
    names = list(logged_names())
    assert len(names) > 30
    assert [(place, name) for place, name in names if name in SECRET] == []


PEER, OTHER = "12D3KooWPW5W3xqXDotptBwKmqM7tXNMVgcCVykq5vGqmiP1rh9M", "12D3KooW" + "a" * 44


class Log:
    """A handler with a clock that stands still until the test moves it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.stream = io.StringIO()
        self.handler = Handler(self.stream, lambda: self.now)
        self.handler.setFormatter(logging.Formatter("%(message)s"))

    def say(self, text: str, *values: object, line: int = 1) -> None:
        self.handler.handle(logging.LogRecord("raceme", logging.INFO, "a.py", line, text, values, None))

    def lines(self) -> list[str]:
        said = self.stream.getvalue().splitlines()
        self.stream.seek(0)
        self.stream.truncate()
        return said


def test_of_one_kind_a_peer_gets_five_lines_a_second_and_the_others_are_counted():
    log = Log()
    for number in range(100):
        log.say("%s did it, %d times", PEER, number)
    log.say("%s did it, %d times", OTHER, 1)
    log.say("%s did something else", PEER, line=2)
    assert log.lines() == [
        *(f"{PEER} did it, {number} times" for number in range(5)),
        f"{OTHER} did it, 1 times",
        f"{PEER} did something else",
    ]
    log.now = 1.0
    log.say("a word from another place", line=3)
    log.say("%s did it, %d times", PEER, 100)
    assert log.lines() == [
        f"... 95 more like this: {PEER} did it, 99 times",
        "a word from another place",
        f"{PEER} did it, 100 times",
    ]
    log.now = 2.0
    log.say("the end", line=3)
    assert log.lines() == ["the end"]


def test_ids_made_up_for_each_line_do_not_fill_the_log():
    log = Log()
    for number in range(1000):
        log.say("%s did it", f"12D3KooW{number + 1:0>44}".replace("0", "z"))
    assert len(log.lines()) == 20
    assert len(log.handler._rate._taken) <= 21
    log.now = 1.0
    log.say("on", line=2)
    assert log.lines()[0].startswith("... 980 more like this: 12D3KooW")


def test_lines_of_one_place_are_of_one_kind_also_where_the_text_was_made_before():
    log = Log()
    for number in range(100):
        log.say(f"a library says {number}")
    assert len(log.lines()) == 20


def test_a_line_that_does_not_fit_its_values_is_counted_as_others_are(capsys):
    log = Log()
    for _ in range(30):
        log.say("%d", PEER)
    log.now = 1.0
    log.say("on", line=2)
    assert log.lines() == ["... 25 more like this: %d", "on"]
    assert "TypeError" in capsys.readouterr().err
