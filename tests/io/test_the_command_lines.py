"""One table of what command lines are started with, and how each ends: its code, and at most one line.

The commands run in this process with streams of the test's own, and with a swarm that is a stand-in: what
they do with a real one is tested elsewhere.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pytest
import trio

import client.__main__
import client.terminal
import node.__main__
import node.main
import node.monitor.watch
from client.generation.generate import Token
from client.session.trace import Trace
from node.config import NetworkConfig, NodeConfig
from node.runtime.console import OutputError, OutputText
from routing.blocks import Blocks
from routing.chains.hops import Chain, Hop, NoChain
from routing.names import PeerId
from routing.view.records import Record
from routing.view.view import Entry, SwarmView
from tensor_codec.errors import BadResult, CacheFull, PeerGone

ROOT = Path(__file__).resolve().parents[2]
PEER = PeerId("12D3KooWKnDdG3iXw9eTFijk3EWSunZcFi54Zka4wmtqtt6rPxc8")
JOIN = ("--peers", f"/ip4/127.0.0.1/tcp/9/p2p/{PEER}")
ASCII = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
EVIL = "\x1b[2J\x1b]0;title\x07\x9b31m\r\b\u202egnp.\u2066"
HARMLESS = r"\x1b[2J\x1b]0;title\x07\x9b31m\r\x08\u202egnp.\u2066"
CTRL_C = 130  # the code of a command that Ctrl-C ended
FULL = "error: cannot write to standard output: No space left on device"


class Terminal(io.BytesIO):
    """Bytes that people see at once."""

    def isatty(self) -> bool:
        return True


@dataclass
class Run:
    """What a command has done."""

    code: int | str | None
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if "error: " in line]


def opened(kind: str, encoding: str) -> TextIO | None:
    """Standard output of a kind: a pipe, a tty, one that nobody reads, a full disk, or a closed one."""
    if kind == "closed":
        return None
    if kind == "full":
        return open("/dev/full", "w", encoding=encoding)
    if kind == "unread":
        reader, writer = os.pipe()
        os.close(reader)
        return open(writer, "w", encoding=encoding)
    content = Terminal() if kind == "tty" else io.BytesIO()
    return io.TextIOWrapper(content, encoding=encoding, newline="\n")


def text_of(stream: TextIO | None) -> str:
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(stream.buffer, io.BytesIO):
        return ""
    stream.flush()
    return stream.buffer.getvalue().decode(stream.encoding)


@dataclass
class CommandLine:
    """Starts commands with streams of a test's own."""

    monkeypatch: pytest.MonkeyPatch
    opened: list[TextIO] = field(default_factory=list)

    def run(
        self,
        module: Any,  # Any: a module with a `main`
        *words: object,
        stdin: bytes | None = b"",
        stdout: str = "pipe",
        stderr: str = "pipe",
        encoding: str = "utf-8",
    ) -> Run:
        source = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), encoding=encoding)
        streams = {"stdin": source, "stdout": opened(stdout, encoding), "stderr": opened(stderr, "utf-8")}
        before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
        with self.monkeypatch.context() as patch:
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            try:
                code = module.main([str(word) for word in words])
            except SystemExit as stop:
                code = stop.code
            self.opened += [sys.stdin, sys.stdout, sys.stderr]
        assert {signum: signal.getsignal(signum) for signum in before} == before
        done = Run(code, text_of(streams["stdout"]), text_of(streams["stderr"]))
        assert "Traceback" not in done.err
        assert len(done.errors) == (code not in (0, CTRL_C)), done.err
        return done


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> Iterator[CommandLine]:
    command_line, root = CommandLine(monkeypatch), logging.getLogger()
    handlers, level = root.handlers, root.level
    yield command_line
    root.handlers, root.level = handlers, level
    for stream in command_line.opened:
        with suppress(OSError):  # what it could not write
            stream.close()


# Commands that need no swarm: what they are told, and what they say


def node_says(*words: object, says: str, code: int = 2, **streams: Any) -> Any:
    return pytest.param(node.__main__, words, code, says, streams, id=" ".join(map(ascii, words))[:60])


def client_says(*words: object, says: str, code: int = 2, **streams: Any) -> Any:
    shown = [word for word in words if word not in JOIN]
    return pytest.param(client.__main__, words, code, says, streams, id=" ".join(map(ascii, shown))[:60])


GENERATE = ("generate", *JOIN)
NUMBER = "is not a whole number of at least 1"
NO_SECONDS = "is not 0 to 1,000,000 seconds"


@pytest.mark.parametrize(
    ("module", "words", "code", "says", "streams"),
    [
        # numbers
        *(client_says(*GENERATE, "--wait", bad, "x", says=NO_SECONDS) for bad in ("nan", "-1", "inf", "now")),
        *(client_says(*GENERATE, "--threads", bad, "x", says=NUMBER) for bad in ("0", "-1", "1.5", "²")),
        client_says(*GENERATE, "--threads", "99999", "x", says="and 1024 at the most"),
        client_says(*GENERATE, "--max-new-tokens", "-3", "x", says=NUMBER),
        client_says(*GENERATE, "--max-new-tokens", "9" * 5000, "x", says="'9999"),
        client_says("chat", *JOIN, "--max-length", "0", says=NUMBER),
        client_says(*GENERATE, "--threads", "\x1b[31m", "x", says=r"'\x1b[31m'"),
        *(node_says("--threads", bad, says=NUMBER) for bad in ("0", "nan", "-2")),
        node_says("--num-blocks", "0", says=NUMBER),
        node_says("--cache-tokens", "inf", says=NUMBER),
        *(node_says("bootstrap", "--record-ttl", bad, says="1 to 90") for bad in ("nan", "inf", "-1")),
        node_says("--balance-quality", "nan", says="0 to 1 is allowed"),
        node_says("--balance-seconds", "inf", says="1 to 86400 are allowed"),
        node_says("status", *JOIN, "--chains", "-1", says=NUMBER),
        node_says("status", *JOIN, "--ask", "--watch", says="--ask goes without --watch"),
        # addresses
        node_says("bootstrap", "--listen", "/ip4/127.0.0.1/tcp/99999", says="allowed are 0 to 65535"),
        node_says("bootstrap", "--listen", "/ip4/127.0.0.1/tcp/-1", says="allowed are 0 to 65535"),
        node_says("bootstrap", "--peers", "", says="is not a TCP multiaddr"),
        node_says("status", "--peers", "/ip4/\x1b[31m\n", says=r"'/ip4/\x1b[31m\n'"),
        node_says("bootstrap", "--name", "a\x1b[31m", says="64 printable ones"),
        node_says("bootstrap", "--name", "a\udcff", says="--name is not UTF-8: byte 2 is 0xff"),
        node_says("status", *JOIN, "--\x1b[31m", says=r"unrecognized arguments: --\x1b[31m"),
        # files
        node_says("bootstrap", "--identity", "/", says="cannot read identity /: Is a directory"),
        node_says("bootstrap", "--identity", "/dev/zero", says="is not a regular file"),
        node_says("bootstrap", "--swarm-key", "/dev/null", says="is not a regular file"),
        node_says("bootstrap", "--ready-file", "", says="is a folder, a file is needed"),
        node_says("bootstrap", "--ready-file", "/dev/full/x", says="cannot write the ready file /dev/full/x"),
        node_says("new-swarm-key", "", says="is a folder, a file is needed"),
        node_says("new-swarm-key", "/", says="is a folder, a file is needed"),
        node_says("new-swarm-key", "/dev/null/key", says="cannot make the folder of swarm key /dev/null/key"),
        # prompts
        client_says(*GENERATE, "-", says="the prompt is empty"),
        client_says(*GENERATE, "-", stdin=None, says="the prompt is empty"),
        client_says(*GENERATE, "-", stdin=b"a\xff", says="the prompt is not UTF-8: byte 2 is 0xff"),
        client_says(*GENERATE, "-", stdin=b"a\xc3", says="the prompt is not UTF-8: byte 2 is 0xc3"),
        client_says(*GENERATE, "-", stdin=b"\xe9", encoding="ascii", says="the prompt is not UTF-8: byte 1"),
        client_says(*GENERATE, "-", stdin=b"abc", encoding="utf-16-le", says="the prompt is not utf-16-le"),
        client_says(*GENERATE, "-", stdin=b"a" * ((1 << 25) + 1), says="more than 33554432 characters"),
        client_says(*GENERATE, "a\udcff", says="the prompt is not UTF-8: byte 2 is 0xff"),
        client_says(*GENERATE, "a", "--stop", "\udcc3", says="--stop is not UTF-8: byte 1 is 0xc3"),
        client_says("chat", *JOIN, "--system", "\udcff", says="--system is not UTF-8: byte 1 is 0xff"),
        # streams
        node_says("--help", stdout="full", says=FULL),
        node_says("--help", stdout="unread", code=0, says=""),
        node_says("--help", stdout="closed", code=0, says=""),
        client_says("generate", "--help", stdout="full", says=FULL),
        client_says("generate", "--help", stdout="unread", code=0, says=""),
        node_says("models", stdout="full", says=FULL),
        node_says("models", stdout="unread", code=0, says=""),
        node_says("models", stdout="closed", stderr="closed", code=0, says=""),
        node_says("models", "--json", stdout="full", says=FULL),
        node_says("models", "--json", stdout="unread", code=0, says=""),
        node_says("models", encoding="utf-16", code=0, says=""),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(
    command_line: CommandLine,
    module: Any,
    words: Sequence[object],
    code: int,
    says: str,
    streams: dict[str, Any],
):
    done = command_line.run(module, *words, **streams)
    assert done.code == code
    assert says in "".join(done.errors) if says else not done.err


# Commands with a swarm, which is a stand-in


@dataclass
class FakeSwarm:
    """Gives these tokens to every prompt, and keeps what it was asked."""

    texts: Sequence[str]
    asked: list[Any] = field(default_factory=list)
    error: Exception | None = None
    name: str = "tiny"

    @property
    def info(self) -> Any:
        return SimpleNamespace(name="tiny", revision="r")

    @property
    def local_model(self) -> Any:
        def template(history: list[dict[str, str]], **options: object) -> dict[str, list[int]]:
            return {"input_ids": [len(turn["content"]) for turn in history]}

        return SimpleNamespace(tokenizer=SimpleNamespace(chat_template="...", apply_chat_template=template))

    def view(self) -> SwarmView:
        record = Record(peer=PEER, role="serve", name=self.name)
        return SwarmView("public", entries={PEER: Entry(record, b"", 0.0)})

    async def route(self) -> Chain:
        if self.error is not None:
            raise self.error
        return Chain((Hop(PEER, 0, 6),), 0.01)

    def settings(self, *prompt: object, **options: object) -> Any:
        return SimpleNamespace(from_file=(), as_dict=dict)

    def usual_length(self) -> int:
        return 100

    def conversation(self, *lengths: object, **options: object) -> Any:
        return SimpleNamespace(trace=Trace(), close=lambda: None)

    async def generate(self, prompt: object, given: object = None, **options: object) -> AsyncIterator[Token]:
        self.asked.append(prompt)
        if isinstance(trace := options.get("trace"), Trace):
            trace.add("ended")
        for number, text in enumerate(self.texts, 1):
            await trio.lowlevel.checkpoint()
            yield Token(number, text, 0.1, "length" if number == len(self.texts) else None)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeSwarm]:
    def serve(*texts: str, **facts: Any) -> FakeSwarm:
        swarm = FakeSwarm(texts, **facts)

        @asynccontextmanager
        async def connect(*words: object, **options: object) -> AsyncIterator[FakeSwarm]:
            yield swarm

        monkeypatch.setattr(client.terminal, "connect", connect)
        return swarm

    return serve


@pytest.mark.parametrize("as_json", [(), ("--json",)], ids=["text", "json"])
@pytest.mark.parametrize(
    ("stdout", "code", "says"),
    [("unread", 0, ""), ("full", 2, FULL), ("closed", 0, ""), ("pipe", 0, ""), ("tty", 0, "")],
)
def test_text_ends_quietly_where_nobody_reads_and_in_one_line_where_the_disk_is_full(
    command_line: CommandLine,
    serve: Callable[..., FakeSwarm],
    as_json: Sequence[str],
    stdout: str,
    code: int,
    says: str,
):
    serve("a", " b", " c")
    done = command_line.run(client.__main__, *GENERATE, *as_json, "x", stdout=stdout)
    assert done.code == code
    assert says in done.err
    assert ("tokens/s" in done.err) == (not as_json and code == 0 and stdout != "unread")


@pytest.mark.parametrize("stderr", ["unread", "full", "closed"])
def test_text_comes_where_standard_error_takes_nothing(
    command_line: CommandLine, serve: Callable[..., FakeSwarm], stderr: str
):
    serve("a", " b")
    done = command_line.run(client.__main__, *GENERATE, "--show-route", "x", stderr=stderr)
    assert (done.code, done.out) == (0, "a b\n")


@pytest.mark.parametrize(
    ("stdout", "encoding", "shown"),
    [
        ("pipe", "utf-8", EVIL + "é\n…"),
        ("tty", "utf-8", HARMLESS + "é\n…"),
        ("tty", "ascii", HARMLESS + r"\xe9" + "\n..."),
        ("pipe", "latin-1", EVIL.replace("\u202e", r"\u202e").replace("\u2066", r"\u2066") + "é\n..."),
        ("pipe", "utf-16-le", EVIL + "é\n…"),
    ],
)
def test_text_is_exact_in_a_pipe_and_harmless_on_a_terminal(
    command_line: CommandLine, serve: Callable[..., FakeSwarm], stdout: str, encoding: str, shown: str
):
    serve(*EVIL, "é", "\n", "…")
    done = command_line.run(client.__main__, *GENERATE, "x", stdout=stdout, encoding=encoding)
    assert (done.code, done.out) == (0, shown + "\n")


def test_json_is_the_same_in_every_locale(command_line: CommandLine, serve: Callable[..., FakeSwarm]):
    serve(EVIL + "é…")
    for encoding in ("utf-8", "ascii", "utf-16-le"):
        done = command_line.run(client.__main__, *GENERATE, "--json", "x", stdout="tty", encoding=encoding)
        assert json.loads(done.out)["text"] == EVIL + "é…"


@pytest.mark.parametrize(
    ("words", "stdin", "encoding"),
    [
        (["-"], "hëllo…".encode(), "ascii"),
        (["-"], "hëllo…".encode(), "utf-8"),
        (["-"], "hëllo…".encode("utf-16-le"), "utf-16-le"),
        (["hëllo…".encode().decode("ascii", "surrogateescape")], b"", "ascii"),
        (["hëllo…"], b"", "utf-8"),
    ],
)
def test_a_prompt_is_the_same_in_every_locale(
    command_line: CommandLine, serve: Callable[..., FakeSwarm], words: list[str], stdin: bytes, encoding: str
):
    swarm = serve("a")
    assert command_line.run(client.__main__, *GENERATE, *words, stdin=stdin, encoding=encoding).code == 0
    assert swarm.asked == ["hëllo…"]


def test_an_answer_in_a_chat_does_nothing_to_a_terminal(
    command_line: CommandLine, serve: Callable[..., FakeSwarm]
):
    serve(*EVIL)
    done = command_line.run(client.__main__, "chat", *JOIN, stdin=b"hello\n", stdout="tty")
    assert (done.code, done.out) == (0, f"> {HARMLESS}\n> ")


def test_a_chat_says_which_line_is_no_text_and_goes_on(
    command_line: CommandLine, serve: Callable[..., FakeSwarm]
):
    swarm = serve("a", " b")
    with pytest.raises(AssertionError, match="is not UTF-8"):  # one error, and yet it ends with 0
        command_line.run(client.__main__, "chat", *JOIN, stdin=b"hi\xff\nhello\n\xc3\nbye\n")
    assert swarm.asked == [[5], [5, 3, 3]]


@pytest.mark.parametrize(
    ("stdout", "code", "says"), [("unread", 0, ""), ("full", 2, FULL), ("closed", 0, "")]
)
def test_a_chat_ends_where_its_output_does(
    command_line: CommandLine, serve: Callable[..., FakeSwarm], stdout: str, code: int, says: str
):
    serve("a", " b")
    done = command_line.run(client.__main__, "chat", *JOIN, stdin=b"hello\n", stdout=stdout)
    assert done.code == code
    assert says in done.err


def test_a_chat_without_standard_input_ends_at_once(
    command_line: CommandLine, serve: Callable[..., FakeSwarm]
):
    swarm = serve("a")
    assert command_line.run(client.__main__, "chat", *JOIN, stdin=None).code == 0
    assert swarm.asked == []


@pytest.mark.parametrize("trace", ["/dev/full", "/dev/null/trace", "/"])
def test_a_trace_that_cannot_be_written_is_named_below_the_text(
    command_line: CommandLine, serve: Callable[..., FakeSwarm], trace: str
):
    serve("a", " b")
    done = command_line.run(client.__main__, *GENERATE, "--trace", trace, "x")
    assert (done.code, done.out) == (2, "a b\n")
    assert f"cannot write the trace {trace}: " in done.err


def test_a_trace_does_not_wait_for_the_other_end_of_a_fifo(
    command_line: CommandLine, serve: Callable[..., FakeSwarm], tmp_path: Path
):
    serve("a", " b")
    os.mkfifo(tmp_path / "fifo")
    done = command_line.run(client.__main__, *GENERATE, "--trace", tmp_path / "fifo", "x")
    assert (done.code, done.out) == (2, "a b\n")
    assert "cannot write the trace" in done.err


def test_a_route_is_one_line_a_hop_whatever_a_server_calls_itself(
    command_line: CommandLine, serve: Callable[..., FakeSwarm]
):
    serve("a", name="[red]" + EVIL + "\n\t")
    done = command_line.run(client.__main__, *GENERATE, "--show-route", "x", stderr="tty")
    assert f" ([red]{HARMLESS}\\n\\t)  blocks 0:6" in done.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NoChain([Blocks(0, 6)], 6, alone=True, instead=["a\nmodel"]), 3),
        (PeerGone("the last hop has gone"), 4),
        (BadResult("NaN or infinity"), 4),
        (CacheFull("no room", 3.0), 4),
        (OSError(24, "Too many open files", "/some/file"), 2),
        (KeyboardInterrupt(), CTRL_C),
    ],
)
def test_every_end_has_its_code(
    command_line: CommandLine, serve: Callable[..., FakeSwarm], error: BaseException, code: int
):
    serve("a", error=error)
    done = command_line.run(client.__main__, *GENERATE, "--wait", "0", "x")
    assert done.code == code


@pytest.mark.parametrize(
    "words", [("--blocks", "0:2"), ("bootstrap",), ("status", *JOIN)], ids=lambda words: words[0]
)
def test_ctrl_c_ends_each_command_of_a_node_with_130_and_nothing_said(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
):
    async def interrupted(*config: object, **options: object) -> None:
        raise KeyboardInterrupt

    for name in ("node.main.serve", "node.main.run_bootstrap", "node.monitor.status.show_status"):
        monkeypatch.setattr(name, interrupted)
    done = command_line.run(node.__main__, *words)
    assert (done.code, done.out, done.err) == (CTRL_C, "", "")


@pytest.mark.parametrize("words", [(), ("bootstrap",)], ids=["serve", "bootstrap"])
def test_a_record_is_repeated_three_times_in_its_ttl(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
):
    started: list[NetworkConfig] = []

    async def start(config: NodeConfig | NetworkConfig) -> None:
        started.append(config.network if isinstance(config, NodeConfig) else config)

    for name in ("node.main.serve", "node.main.run_bootstrap"):
        monkeypatch.setattr(name, start)
    command_line.run(node.__main__, *words, "--record-ttl", "12")
    (config,) = started
    assert (config.limits.record_ttl_seconds, config.limits.announce_seconds) == (12, 4)


# status


@pytest.fixture
def swarm_of_records(monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = Record(
        peer=PEER, role="serve", model="[/]:smile:\n\x1b[31m", revision="[red]r", blocks=6, start=0, stop=6,
        name="[link=http://x]n[/link]\n\u202e", dtype="[b]", seconds_per_block=0.01,
    )  # fmt: skip
    view = SwarmView("pub\nlic[/]", entries={PEER: Entry(hostile, b"", 0.0)})

    async def measure(*words: object) -> None:
        pass

    pings = SimpleNamespace(monitor=lambda *words: None, liveness=lambda peers: {})
    directory = SimpleNamespace(view=lambda: view, measure=measure, rtts=dict, pings=pings)

    @asynccontextmanager
    async def open_node(*words: object, **options: object) -> AsyncIterator[Any]:
        connections = SimpleNamespace(connected=set)
        host = SimpleNamespace(peer_id=PeerId("me"), connections=connections)
        yield SimpleNamespace(directory=directory, host=host)

    monkeypatch.setattr(node.main, "open_node", open_node)
    monkeypatch.setattr("node.monitor.status.SETTLE_SECONDS", 0)
    monkeypatch.setattr("node.monitor.watch.SETTLE_SECONDS", 0)


STATUS = ("status", *JOIN)


@pytest.mark.usefixtures("swarm_of_records")
@pytest.mark.parametrize("flags", [(), ("--json",), ("--watch",), ("--watch", "--json")], ids=" ".join)
@pytest.mark.parametrize(("stdout", "code", "says"), [("unread", 0, ""), ("full", 2, FULL)])
def test_status_ends_where_its_output_does(
    command_line: CommandLine, flags: Sequence[str], stdout: str, code: int, says: str
):
    done = command_line.run(node.__main__, *STATUS, *flags, stdout=stdout)
    assert done.code == code
    assert says in done.err


def test_what_stands_before_a_full_output_may_go_without_a_word(monkeypatch: pytest.MonkeyPatch):
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    output = OutputText()
    with pytest.raises(OutputError):
        output.flush()
    output.close()  # as the interpreter does; Python 3.13 would tell people what it raises


@pytest.mark.usefixtures("swarm_of_records")
@pytest.mark.parametrize("stdout", ["pipe", "tty"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "utf-16-le"])
@pytest.mark.parametrize(
    "environment", [{}, {"COLUMNS": "0"}, {"COLUMNS": "abc"}, {"TERM": "dumb"}, {"NO_COLOR": "1"}], ids=str
)
def test_status_shows_names_as_they_are_and_in_their_line(
    command_line: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    stdout: str,
    encoding: str,
    environment: dict[str, str],
):
    for name, value in {"COLUMNS": "200", "TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    done = command_line.run(node.__main__, *STATUS, stdout=stdout, encoding=encoding)
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in done.out.splitlines()]
    assert done.code == 0
    assert lines[0] == r"swarm pub\nlic[/]: 1 online"
    assert lines[3] == r"[/]:smile:\n\x1b[31m ([red]r), 6 blocks: every block is served"
    if stdout == "tty" and ("TERM" in environment or environment.get("COLUMNS") == "abc"):
        return  # 80 columns: names are cut
    assert ("..." if encoding in ("ascii", "latin-1") else "…") + PEER[-6:] in lines[2]
    assert r"[link=http://x]n[/link]\n\u202e" in lines[2]
    assert lines[-1].startswith("see it live: python -m client gateway --peers /ip4/")


@pytest.mark.usefixtures("swarm_of_records")
def test_a_dumb_terminal_gets_one_look_below_the_other(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
):
    looks = []

    async def stop(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) > 2:
            raise KeyboardInterrupt

    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(trio, "sleep", stop)
    done = command_line.run(node.__main__, *STATUS, "--watch", stdout="tty")
    assert (done.code, done.err) == (CTRL_C, "")
    assert len(looks) == 3


@pytest.mark.usefixtures("swarm_of_records")
def test_a_watch_shows_names_as_they_are(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch):
    looks = []

    async def stop(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) > 1:
            raise KeyboardInterrupt

    for name, value in {"TERM": "xterm", "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(trio, "sleep", stop)
    done = command_line.run(node.__main__, *STATUS, "--watch", stdout="tty")
    assert (done.code, done.err) == (CTRL_C, "")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", done.out)
    assert "\x1b" not in shown
    for name in (r"[link=http://x]n[/link]\n\u202e", r"[/]:smile:\n\x1b[31m ([red]r), 6 blocks", "[b]"):
        assert name in shown


# Processes: what only they show


def shell(line: str, **environment: str) -> tuple[int, str, str]:
    """Run a line of sh with $PYTHON; its exit code, standard output and standard error."""
    done = subprocess.run(
        ["bash", "-c", "set -o pipefail; " + line],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


@pytest.mark.parametrize(
    "line",
    [
        "$PYTHON -m node models >&-",
        "$PYTHON -m node models 2>&-",
        "$PYTHON -m node models <&- >&- 2>&-",
        "$PYTHON -m node --help | head -c 3",
        "$PYTHON -m client generate --help | head -1",
        "$PYTHON -m node models 2>/dev/full >/dev/null",
        "cd $(mktemp -d) && rmdir $PWD && PYTHONPATH=$OLDPWD $PYTHON -m node models",
    ],
)
def test_a_process_ends_quietly(line: str):
    code, _, err = shell(line)
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("$PYTHON -m node models >/dev/full", FULL),
        ("$PYTHON -m node --help >/dev/full", FULL),
        ("RACEME_CACHE=~nobody-of-this-name/x $PYTHON -m node models", "error: the home folder in ~nobody"),
        (f"$PYTHON -m client generate {' '.join(JOIN)} $'a\\xff'", "error: the prompt is not UTF-8: byte 2"),
    ],
)
def test_a_process_says_what_is_wrong_in_one_line(line: str, says: str):
    code, _, err = shell(line)
    assert code == 2
    assert err.startswith(says)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "environment",
    [ASCII, {**ASCII, "PYTHONIOENCODING": "latin-1"}, {"LANG": "xx_YY.UTF-8"}],
    ids=str,
)
def test_a_file_of_any_name_is_written_and_named_in_any_locale(tmp_path: Path, environment: dict[str, str]):
    script = "$PYTHON -m node new-swarm-key $'\\xc3\\xa9\\xff'"
    code, out, err = shell(f"cd {tmp_path} && PYTHONPATH={ROOT} {script}", **environment)
    assert (code, err) == (0, "")
    assert os.listdir(os.fsencode(tmp_path)) == [b"\xc3\xa9\xff"]
    assert out.startswith("wrote ")


STREAMS = """
import os, sys
from node.runtime.console import prepare_streams
prepare_streams()
sys.stdout.write("nobody sees this")
assert sys.stdin.read() == ""
os._exit(os.open(os.devnull, os.O_RDONLY))
"""


def test_no_socket_gets_the_descriptor_of_a_closed_stream():
    assert shell('$PYTHON -c "$CODE" <&- >&- 2>&-', CODE=STREAMS) == (3, "", "")


SOMEWHERE = (
    "import os; from node.runtime.console import run_process; run_process(lambda: print(os.getcwd()) or 0)"
)


def test_a_working_folder_that_was_removed_is_left():
    line = 'cd $(mktemp -d) && rmdir $PWD && PYTHONPATH=$OLDPWD $PYTHON -c "$CODE"'
    assert shell(line, CODE=SOMEWHERE) == (0, "/\n", "")


INTERRUPTED = """
import os, signal, sys, threading, time
from node.runtime.console import run_process
from node.runtime.interrupts import let_interrupts_through

def main():
    threading.Thread(target=time.sleep, args=(60,), name="torch", daemon=True).start()
    {ready}
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    except KeyboardInterrupt:
        return 130

run_process(main)
"""


@pytest.mark.parametrize("ready", ["pass", "let_interrupts_through()"])
def test_ctrl_c_ends_a_process_at_once_also_beside_a_busy_thread(ready: str):
    assert shell('$PYTHON -c "$CODE"', CODE=INTERRUPTED.format(ready=ready)) == (130, "", "")


@pytest.mark.parametrize("line", ["-m client generate x", "-m node status --peers x"])
def test_ctrl_c_in_the_middle_of_the_first_imports_is_no_traceback(tmp_path: Path, line: str):
    kill = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "trio.py").write_text(kill)  # found before the real one
    assert shell(f"$PYTHON {line}", PYTHONPATH=str(tmp_path)) == (130, "", "")


@pytest.mark.process
def test_a_node_works_on_where_its_log_takes_nothing_more(tmp_path: Path):
    ready = tmp_path / "ready.json"
    words = ["-m", "node", "bootstrap", "--ready-file", str(ready)]
    with open("/dev/full", "w") as full:
        node = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=full, stderr=full)
    with node:
        try:
            while not ready.exists():
                assert node.poll() is None
                time.sleep(0.01)
            node.send_signal(signal.SIGTERM)
            assert node.wait(30) == 0
        finally:
            node.kill()
