"""What a process writes to standard error."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys

from node.runtime.logs import Handler, JsonLines, TextLines

CODE = """
import logging
from node.runtime.logs import set_up_logging
set_up_logging("text")
import node.network.host, node.network.directory.kademlia
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
