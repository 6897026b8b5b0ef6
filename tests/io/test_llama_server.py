"""A llama-server of `benchmarks peers` is started, asked and ended; a small program stands in for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from benchmarks.lib.processes import ProcessError
from benchmarks.peers.contenders import LLAMA, Contender, Threads
from benchmarks.peers.llama_server import Need, llama_contender, round_of

STAND_IN = """#!{python}
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200, b"{{}}")

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["prompt"] == [500]:
            return self.answer(500, b"no such token")
        if asked["prompt"] == [60]:
            time.sleep(60)
        events = [{{"tokens": [asked["prompt"][0] + step]}} for step in range(asked["n_predict"])]
        self.answer(200, b"".join(b"data: " + json.dumps(each).encode() + b"\\n\\n" for each in events))

    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

port = int(sys.argv[sys.argv.index("--port") + 1])
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
ENDS = "#!{python}\nprint('unknown argument'); raise SystemExit(1)\n"
NEED = Need(2, 3)


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], str]:
    """Programs that stand in for llama.cpp's, by their names."""

    def path(name: str) -> str:
        file = tmp_path / name
        if not file.exists():
            file.write_text(STAND_IN.format(python=sys.executable))
            file.chmod(0o700)
        return str(file)

    return path


def children() -> int:
    return len(psutil.Process().children(recursive=True))


def test_all_clients_are_answered_and_every_process_ends(tmp_path: Path, program: Callable[[str], str]):
    before = children()
    row = Contender(LLAMA, "int8", 2, clients=3)
    with llama_contender(program, tmp_path / "w.gguf", row, Threads(1, 1), NEED, tmp_path) as port:
        assert children() == before + 3
        found = round_of(port, [[10, 1], [20, 1], [30, 1]], 3, seconds=60)
        with pytest.raises(ProcessError, match=r"answered \[b'500'\] .*no such token"):
            round_of(port, [[500]], 3, seconds=60)
        with pytest.raises(ProcessError, match="did not answer within 0 s"):
            round_of(port, [[60]], 3, seconds=0.3)
    assert [each.tokens for each in found.generations] == [(10, 11, 12), (20, 21, 22), (30, 31, 32)]
    assert all(0 < each.at[0] <= each.at[-1] <= found.seconds for each in found.generations)
    assert children() == before


def test_a_server_that_ends_at_once_is_an_error_with_its_last_words(
    tmp_path: Path, program: Callable[[str], str]
):
    (tmp_path / "llama-server").write_text(ENDS.format(python=sys.executable))
    (tmp_path / "llama-server").chmod(0o700)
    before = children()
    row = Contender(LLAMA, "int8", 1)
    with (
        pytest.raises(ProcessError, match="llama-server is not ready: unknown argument"),
        llama_contender(program, tmp_path / "w.gguf", row, Threads(1, 1), NEED, tmp_path),
    ):
        pass
    assert children() == before
