"""Three nodes, one client and a real model on this machine: the program of `make demo`.

Everything lives in one temporary folder and ends with this program: after the text, after Ctrl-C, after
SIGTERM, after a failure, and on Linux also after `kill -9`, because each child asks the kernel for its own
end with its parent.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, cast

import httpx
import psutil
from rich.console import Console
from rich.markup import escape

from node.network.transport.identity import load_or_create_identity
from node.runtime.console import OutputText, harmless, prepare_streams, run_command

ROOT = Path(__file__).resolve().parent.parent
SPANS = ((0, 10), (10, 20), (20, 30))  # SmolLM2-135M has 30 blocks
SPARE = (10, 20)  # of a demo that stays up: the blocks of the server that people kill
SPAN_OF = {**{f"demo-{number}": span for number, span in enumerate(SPANS, 1)}, "spare": SPARE}
PAGE_PORT = 8000  # any free one where this is taken
GATEWAY = "gateway"
STATE = "demo.json"  # in the demo's folder: the nodes by name, for --kill
KEPT_VARIABLES = ("RACEME_CACHE", "RACEME_TORCH")  # others would change the demo's nodes
ONLINE_SECONDS = 120.0  # importing torch, reading ten blocks and measuring them take about 8 s on two cores
STOP_SECONDS = 12.0  # a node finishes its steps in flight; this exceeds its own limit
LOG_LINES = 20

prepare_streams()
console = Console(file=cast("IO[str]", OutputText()), highlight=False, soft_wrap=True)


class DemoError(Exception):
    """An error, in one line."""


@dataclass(frozen=True, slots=True)
class Child:
    """A process of ours, the leader of its own process group."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path | None  # None: it writes to our terminal


@dataclass(frozen=True, slots=True)
class DemoNode:
    """One node of the demo: its command line, and its ready-file."""

    name: str
    start: int
    stop: int
    port: int
    identity: Path
    ready_file: Path
    log: Path

    @property
    def listen(self) -> str:
        """Its multiaddr, without the peer id."""
        return f"/ip4/127.0.0.1/tcp/{self.port}"


def main() -> int:
    """Run the demo; the exit code: 0, 1 after a failure, 128 + signal after a signal.

    Raises OutputError.
    """
    options = parse_options()
    if options.kill is not None:
        return kill_node(options.kill)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, stop_running)
    children: list[Child] = []
    with tempfile.TemporaryDirectory(prefix="raceme-demo-") as folder:
        try:
            run_demo(options, Path(folder), children)
            code = 0
        except DemoError as error:
            console.print(f"[red]demo: {escape(str(error))}[/red]")
            show_logs(children)
            code = 1
        except Stopped as stopped:
            console.print()
            code = 128 + stopped.signum
        finally:
            # From here on every exit must end the processes that we started.
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(signum, signal.SIG_IGN)
            stubborn = stop_all(children)
        if stubborn and code == 0:
            console.print(f"[red]demo: {', '.join(stubborn)} did not end cleanly[/red]")
            show_logs(children)
            code = 1
    return code


def parse_options() -> argparse.Namespace:
    """The command line; the defaults are the demo."""
    parser = argparse.ArgumentParser(
        prog="demo", description="Let text come out of three nodes on this machine."
    )
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", help="a model of 30 blocks (%(default)s)")
    parser.add_argument("--prompt", default="Once upon a time, in a small village by the sea,")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="length of the text (%(default)s)")
    parser.add_argument(
        "--keep", action="store_true", help="leave the nodes up until Ctrl-C, with a spare node and a page"
    )
    parser.add_argument(
        "--kill",
        nargs="?",
        const="",
        metavar="NODE",
        help="kill -9 a node of the demo that runs: 1, 2, 3 or a name (default: the middle one in use)",
    )
    return parser.parse_args()


def run_demo(options: argparse.Namespace, folder: Path, children: list[Child]) -> None:
    """The whole demo, a stage at a time.  Raises DemoError; appends each started process to `children`."""
    swarm_key = folder / "swarm.key"
    node = [sys.executable, "-m", "node"]
    started = time.monotonic()

    with stage("the model is in the cache"):
        run_to_the_end(children, "models", [*node, "models", "--fetch", options.model])
    with stage("a swarm key, which keeps strangers out"):
        run_to_the_end(children, "new-swarm-key", [*node, "new-swarm-key", str(swarm_key)])
    with stage("three nodes, ten blocks each, are online"):
        nodes = [planned_node(folder, f"demo-{number}", span) for number, span in enumerate(SPANS, 1)]
        bootstrap = f"{nodes[0].listen}/p2p/{load_or_create_identity(nodes[0].identity).peer_id}"
        join = ["--peers", bootstrap, "--swarm-key", str(swarm_key)]
        for each in nodes:
            # The first node founds the swarm. Its address is known before it runs, and the others keep
            # dialling it until it listens, so all three load their blocks at once.
            flags = join if each is not nodes[0] else ["--swarm-key", str(swarm_key)]
            start(children, each.name, [*node, options.model, *node_flags(each), *flags], each.log)
        wait_until_online(nodes, children)
    with stage("a client finds the route and generates"):
        console.print()
        generate = [
            sys.executable,
            "-m",
            "client",
            "generate",
            *join,
            "--model",
            options.model,
            "--show-route",
            "--greedy",
        ]
        generate += ["--max-new-tokens", str(options.max_new_tokens), options.prompt]
        console.print(f"the prompt: {escape(options.prompt)}", style="bold")
        run_to_the_end(children, "client", generate)
    console.print(f"\nFrom nothing to here: {time.monotonic() - started:.1f} s.")

    if not options.keep:
        console.print("The nodes end now. To keep them up and talk to them: [bold]make demo KEEP=1[/bold]")
        return
    with stage("a spare for the blocks in the middle, and a gateway with a page"):
        spare = planned_node(folder, "spare", SPARE)
        start(children, spare.name, [*node, options.model, *node_flags(spare), *join], spare.log)
        url = start_gateway(folder, [*join, "--model", options.model], children)
        wait_until_online([spare], children)
        wait_until_ready(url, children)
    write_state(folder, children, url)
    tell_what_next(options, join, url)
    with suppress(Stopped):  # Ctrl-C ends the demo here
        keep_up(children)


def tell_what_next(options: argparse.Namespace, join: Sequence[str], url: str) -> None:
    """Print the commands for a swarm that stays up, and at last the address of its page."""
    console.print("\nThe swarm stays up until Ctrl-C. In another terminal, in this folder:")
    inside = Path(sys.executable).is_relative_to(ROOT)
    python = os.path.relpath(sys.executable, ROOT) if inside else sys.executable
    for what, words in (
        ("see who serves what", ["-m", "node", "status", *join]),
        ("generate", ["-m", "client", "generate", *join, "--model", options.model, "Once upon a time"]),
        ("talk", ["-m", "client", "chat", *join, "--model", options.model]),
        ("add a node", ["-m", "node", options.model, "--num-blocks", "10", *join]),
        ("kill a server while the page's chat answers: the text goes on", ["scripts/demo.py", "--kill"]),
    ):
        console.print(f"\n# {what}", style="dim")
        console.print(escape(shlex.join([python, *words])))
    console.print(f"\nopen [bold]{url}[/bold]")


# The gateway


def start_gateway(folder: Path, flags: Sequence[str], children: list[Child]) -> str:
    """Start a gateway; the address of its page, which answers later."""
    port = page_port()
    command = [sys.executable, "-m", "client", "gateway", *flags, "--port", str(port)]
    start(children, GATEWAY, command, folder / f"{GATEWAY}.log")
    return f"http://127.0.0.1:{port}"


def page_port() -> int:
    """The usual port of a gateway, or a free one."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", PAGE_PORT))
        except OSError:
            return free_port()
    return PAGE_PORT


def wait_until_ready(url: str, children: Sequence[Child]) -> None:
    """Return when the gateway has computed its first token.  Raises DemoError."""
    deadline = time.monotonic() + ONLINE_SECONDS
    while time.monotonic() < deadline:
        check_alive(children)
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        time.sleep(0.1)
    raise DemoError(f"the gateway was not ready after {ONLINE_SECONDS:.0f} s")


# The kill of a node


def write_state(folder: Path, children: Sequence[Child], url: str) -> None:
    """Leave the names and process ids of the nodes, and the gateway's address, for `--kill`."""
    nodes = {child.name: child.process.pid for child in children if child.name != GATEWAY}
    (folder / STATE).write_text(json.dumps({"nodes": nodes, "gateway": url}))


def kill_node(wanted: str) -> int:
    """kill -9 a node of the newest demo of this user; the exit code.

    wanted: a number, a name, or "" for one of the two nodes of the blocks in the middle: the one in use.
    """
    for url, running in demos_that_run():
        middle = [name for name in running if SPAN_OF.get(name) == SPARE]
        if wanted:
            name = f"demo-{wanted}" if wanted.isdigit() else wanted
        elif middle:
            name = middle_in_use(url, middle)
        else:
            left = ", ".join(running)
            console.print(f"demo: no node of {blocks_of(SPARE)} is left to be killed; there are {left}")
            return 2
        if name not in running:
            console.print(f"demo: no node {escape(wanted)} runs; there are {', '.join(running)}")
            return 2
        with suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(running[name], signal.SIGKILL)
        console.print(
            f"{name} is killed; the page shows it silent in a few seconds{hole_after(name, running)}"
        )
        return 0
    console.print(
        "demo: no demo runs that stays up: start one with `make demo KEEP=1`, and wait for its address"
    )
    return 2


def demos_that_run() -> Iterator[tuple[str, dict[str, int]]]:
    """The demos of this user, the newest first: the gateway's address, the ids of the nodes that run."""
    states = []
    for path in Path(tempfile.gettempdir()).glob(f"raceme-demo-*/{STATE}"):
        with suppress(OSError):  # a demo that ends removes its folder
            if is_ours(path):
                states.append((path.stat().st_mtime, path))
    for _, path in sorted(states, reverse=True):
        try:
            facts = json.loads(path.read_text())
        except (OSError, ValueError):  # it ends now, or is half written
            continue
        nodes: dict[str, int] = facts["nodes"]
        running = {name: pid for name, pid in nodes.items() if is_node(pid, path.parent, name)}
        if running:  # else a demo that was itself killed has left it
            yield facts["gateway"], running


def hole_after(name: str, running: Iterable[str]) -> str:
    """What to say of blocks that no node of the demo serves after a node's end; empty where one does."""
    span = SPAN_OF.get(name)
    if span is None or any(SPAN_OF.get(other) == span for other in running if other != name):
        return ""
    return f". No other node of the demo has {blocks_of(span)}: the page shows how to add one"


def blocks_of(span: tuple[int, int]) -> str:
    """A span in words."""
    return f"blocks {span[0]}:{span[1]}"


def middle_in_use(url: str, middle: Sequence[str]) -> str:
    """The node of the middle blocks through which an answer of the gateway runs; the first without any."""
    with suppress(httpx.HTTPError, ValueError, KeyError, TypeError):
        for session in httpx.get(f"{url}/api/sessions", timeout=5).json()["sessions"]:
            for hop in session["hops"]:
                if hop["name"] in middle:
                    return str(hop["name"])
    return middle[0]


def is_ours(path: Path) -> bool:
    """Whether a file and its folder belong to this user; others may write into a shared folder.

    Raises OSError where they have gone.
    """
    return all(each.lstat().st_uid == os.getuid() for each in (path, path.parent))


def is_node(pid: int, folder: Path, name: str) -> bool:
    """Whether this process is that node of the demo in `folder`: ids come again after an end."""
    try:
        return str(folder / f"{name}.identity") in psutil.Process(pid).cmdline()
    except psutil.Error:
        return False


# The nodes


def planned_node(folder: Path, name: str, span: tuple[int, int]) -> DemoNode:
    """Choose the command line of a node."""
    return DemoNode(
        name=name,
        start=span[0],
        stop=span[1],
        port=free_port(),
        identity=folder / f"{name}.identity",
        ready_file=folder / f"{name}.json",
        log=folder / f"{name}.log",
    )


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def node_flags(node: DemoNode) -> list[str]:
    """The flags of `python -m node` that make this node."""
    return [
        *("--blocks", f"{node.start}:{node.stop}"),
        *("--name", node.name),
        *("--listen", node.listen),
        *("--identity", str(node.identity)),
        *("--ready-file", str(node.ready_file)),
        *("--threads", "1"),
    ]


def wait_until_online(nodes: Sequence[DemoNode], children: Sequence[Child]) -> None:
    """Return when each node has written its ready-file; print a line for each.  Raises DemoError."""
    started = time.monotonic()
    waiting = list(nodes)
    while waiting:
        check_alive(children)
        if time.monotonic() - started > ONLINE_SECONDS:
            names = ", ".join(node.name for node in waiting)
            raise DemoError(f"not online after {ONLINE_SECONDS:.0f} s: {names}")
        for node in [node for node in waiting if node.ready_file.exists()]:
            ready = json.loads(node.ready_file.read_text())
            first, last = ready["blocks"]
            seconds = time.monotonic() - started
            console.print(
                f"    {node.name}  {ready['peer_id']}  blocks {first}:{last}  after {seconds:.1f} s"
            )
            waiting.remove(node)
        time.sleep(0.05)


# Processes


class Stopped(Exception):
    """A signal asks the demo to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.strsignal(signum))
        self.signum = signum


def stop_running(signum: int, frame: FrameType | None) -> None:
    """Turn a signal into an exception, so that all signals take one path."""
    raise Stopped(signum)


def start(children: list[Child], name: str, command: Sequence[str], log: Path | None = None) -> Child:
    """Start a child in a process group of its own: Ctrl-C is then ours to pass on, in our order."""
    output = None if log is None else log.open("wb")
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**plain_environment(os.environ), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,
            preexec_fn=end_with_parent(),
        )
    finally:
        if output is not None:
            output.close()
    children.append(Child(name, process, log))
    return children[-1]


def plain_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without settings of other nodes, which the demo's would take too."""
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith("RACEME_") or name in KEPT_VARIABLES
    }


def end_with_parent() -> Callable[[], None] | None:
    """A child's first action, before it becomes the program: on Linux, ask for its death with ours."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()  # looked up here: a forked child should do little
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h

    def ask() -> None:
        prctl(set_parent_death_signal, int(signal.SIGKILL))
        if os.getppid() != parent:  # we died in between
            os._exit(1)

    return ask


def run_to_the_end(children: list[Child], name: str, command: Sequence[str]) -> None:
    """Run a command that writes to our terminal.  Raises DemoError if it fails, or if a node does."""
    child = start(children, name, command)
    while child.process.poll() is None:
        check_alive(children)
        time.sleep(0.02)
    children.remove(child)
    if child.process.returncode:
        raise DemoError(f"{name} failed with exit code {child.process.returncode}")


def check_alive(children: Sequence[Child]) -> None:
    """Raise DemoError if a node ended unasked."""
    for child in children:
        if child.log is not None and child.process.poll() is not None:
            raise DemoError(f"{child.name} ended with exit code {child.process.returncode}")


def keep_up(children: list[Child]) -> None:
    """Wait for Ctrl-C; print a line when a node ends: the others go on.

    Raises DemoError when none is left.
    """
    while any(child.name != GATEWAY for child in children):
        for child in [child for child in children if child.process.poll() is not None]:
            code = child.process.returncode
            seen = "" if child.name == GATEWAY else "; the page shows it silent, and gone at last after 90 s"
            console.print(f"{child.name} ended (exit code {code}){seen}")
            children.remove(child)
        time.sleep(0.5)
    raise DemoError("no node is left")


def stop_all(children: Sequence[Child]) -> list[str]:
    """End every child, politely for STOP_SECONDS; the names of children that did not end with code 0."""
    for child in children:
        signal_group(child, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    stubborn = []
    for child in children:
        try:
            code = child.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            signal_group(child, signal.SIGKILL)
            code = child.process.wait()
        if code:
            stubborn.append(f"{child.name} (exit code {code})")
    return stubborn


def signal_group(child: Child, signum: int) -> None:
    """Send a signal to a child and its own children, unless it has ended."""
    if child.process.poll() is None:
        os.killpg(child.process.pid, signum)


# Telling


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Print the stage, and then its time."""
    console.print(f"[bold]{what}[/bold] ...")
    started = time.monotonic()
    yield
    console.print(f"    {time.monotonic() - started:.1f} s", style="green")


def show_logs(children: Sequence[Child]) -> None:
    """Print the end of each node's log."""
    for child in children:
        if child.log is not None and child.log.exists():
            console.rule(f"{child.name}, last lines of its log")
            lines = child.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            console.print(harmless("\n".join(lines)) or "(nothing)", markup=False, emoji=False)


if __name__ == "__main__":
    sys.exit(run_command(main))
