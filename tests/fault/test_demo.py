"""scripts/demo.py ends what it started, whatever ends it.  The nodes and the client are stand-ins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from tests.processes import ROOT, running

NODE = """
import json, os, pathlib, signal, socket, sys, time

arguments = sys.argv[1:]
if arguments[0] in ("models", "new-swarm-key"):
    sys.exit(0)

def value(flag):
    return arguments[arguments.index(flag) + 1]

name = value("--name")
wish = os.environ.get("WISH")
whole = pathlib.Path(name + ".part")  # renamed: whoever is killed here leaves no half of a file
whole.write_text(str(os.getpid()))
whole.rename(name + ".pid")
ours = sorted(variable for variable in os.environ if variable.startswith("RACEME_"))
pathlib.Path(name + ".variables").write_text(" ".join(ours))
if wish == "deaf" and name == "demo-2":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
if wish == "broken" and name == "demo-3":
    sys.exit("no such port")
listener = socket.create_server(("127.0.0.1", int(value("--listen").rpartition("/")[2])))
ready = {"peer_id": name, "blocks": [int(block) for block in value("--blocks").split(":")]}
part = pathlib.Path(value("--ready-file") + ".part")
part.write_text(json.dumps(ready))
part.rename(value("--ready-file"))
time.sleep(60)
"""

CLIENT = """
import http.server, os, pathlib, signal, sys, time

if sys.argv[1] == "gateway":
    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in ("/ready", "/api/sessions") else 404)
            self.end_headers()
            if self.path == "/api/sessions":  # an answer runs through the spare
                self.wfile.write(b'{"sessions": [{"hops": [{"name": "demo-1"}, {"name": "spare"}]}]}')

        def log_message(self, *words):
            pass

    pathlib.Path("gateway.part").write_text(str(os.getpid()))
    pathlib.Path("gateway.part").rename("gateway.pid")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    port = int(sys.argv[sys.argv.index("--port") + 1])
    http.server.HTTPServer(("127.0.0.1", port), Ready).serve_forever()
pathlib.Path("client.part").write_text(str(os.getpid()))
pathlib.Path("client.part").rename("client.pid")
print("a garden", flush=True)
time.sleep(60 if os.environ.get("WISH") == "endless" else 0)
"""


@dataclass
class Demo:
    folder: Path
    process: subprocess.Popen[str]

    def read_until(self, text: str) -> str:
        assert self.process.stdout is not None
        seen = ""
        for line in self.process.stdout:
            seen += line
            if text in line:
                return seen
        pytest.fail(f"ended without saying {text!r}:\n{seen}")

    def everything_ended(self, seconds: float) -> bool:
        """Whether each stand-in that ran is gone (or a zombie that init has not fetched) in time."""
        pids = [int(path.read_text()) for path in self.folder.glob("*.pid")]
        assert pids
        running = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
        deadline = time.monotonic() + seconds
        while running and time.monotonic() < deadline:
            time.sleep(0.02)
            running = [
                each for each in running if each.is_running() and each.status() != psutil.STATUS_ZOMBIE
            ]
        return not running

    def kill(self, word: str) -> tuple[int, str]:
        """Run `demo.py --kill WORD`; its exit code and output."""
        environment = {**os.environ, "TMPDIR": str(self.folder / "tmp"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "scripts/demo.py", "--kill", *filter(None, [word])]
        ran = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        return ran.returncode, ran.stdout

    def temporary_folders(self) -> list[Path]:
        return list((self.folder / "tmp").iterdir())


@pytest.fixture
def demo(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Demo]:
    for folder in ("scripts", "node", "client", "tmp"):
        (tmp_path / folder).mkdir()
    script = (ROOT / "scripts" / "demo.py").read_text()
    assert "STOP_SECONDS = 12.0" in script
    hasty = script.replace("STOP_SECONDS = 12.0", "STOP_SECONDS = 2.0")
    (tmp_path / "scripts" / "demo.py").write_text(hasty)
    for package, program in (("node", NODE), ("client", CLIENT)):
        (tmp_path / package / "__init__.py").touch()
        (tmp_path / package / "__main__.py").write_text(program)
    wish, *flags = request.param.split()
    environment = {**os.environ, "WISH": wish, "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(ROOT)}
    environment |= {
        "RACEME_PEERS": "/ip4/10.0.0.5/tcp/1",
        "RACEME_BLOCKS": "0:1",
        "RACEME_CACHE": str(tmp_path),
    }
    command = [sys.executable, "-u", "scripts/demo.py", *flags]
    with running(command, cwd=tmp_path, stderr=subprocess.STDOUT, environment=environment) as process:
        yield Demo(tmp_path, process)


pytestmark = pytest.mark.process
NO_DEMO = "demo: no demo runs that stays up: start one with `make demo KEEP=1`, and wait for its address\n"


@pytest.mark.parametrize("demo", ["none"], indirect=True)
def test_the_demo_ends_its_nodes_after_the_text(demo: Demo):
    said = demo.read_until("make demo KEEP=1")
    assert "blocks 20:30" in said
    assert "a garden" in said
    assert "\x1b" not in said
    assert demo.process.wait(10) == 0
    assert demo.everything_ended(0)
    assert demo.temporary_folders() == []


@pytest.mark.parametrize("demo", ["endless"], indirect=True)
@pytest.mark.parametrize(
    "signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda signum: signum.name
)
def test_a_signal_in_mid_text_ends_nodes_and_client(demo: Demo, signum: signal.Signals):
    demo.read_until("a garden")
    demo.process.send_signal(signum)
    assert demo.process.wait(10) == 128 + signum
    assert demo.everything_ended(0)
    assert demo.temporary_folders() == []


@pytest.mark.parametrize("demo", ["none"], indirect=True)
def test_a_demo_whose_output_nobody_reads_ends_its_nodes_and_is_no_failure(demo: Demo):
    demo.read_until("are online")
    assert demo.process.stdout is not None
    demo.process.stdout.close()
    assert demo.process.wait(10) == 0
    assert demo.everything_ended(0)
    assert demo.temporary_folders() == []


@pytest.mark.parametrize("demo", ["endless"], indirect=True)
def test_nothing_outlives_a_demo_that_was_killed(demo: Demo):
    demo.read_until("a garden")
    demo.process.kill()
    demo.process.wait(10)
    assert demo.everything_ended(5)


@pytest.mark.parametrize("demo", ["none --keep"], indirect=True)
def test_a_kept_swarm_stays_until_ctrl_c_and_has_a_page(demo: Demo):
    said = demo.read_until("open http://127.0.0.1:")
    assert "spare" in said
    assert "--kill" in said
    url = said.split()[-1]
    assert httpx.get(f"{url}/ready").status_code == 200
    assert not demo.everything_ended(0.2)
    demo.process.send_signal(signal.SIGINT)
    assert demo.process.wait(10) == 0
    assert demo.everything_ended(0)
    assert demo.temporary_folders() == []


@pytest.mark.parametrize("demo", ["none --keep"], indirect=True)
def test_a_node_of_a_kept_swarm_can_be_killed_by_its_number_or_because_it_is_in_use(demo: Demo):
    demo.read_until("open http://127.0.0.1:")
    assert demo.kill("9") == (2, "demo: no node 9 runs; there are demo-1, demo-2, demo-3, spare\n")
    hole = ". No other node of the demo has blocks 10:20: the page shows how to add one"
    for word, name, after in (("", "spare", ""), ("2", "demo-2", hole)):
        pid = int((demo.folder / f"{name}.pid").read_text())
        code, said = demo.kill(word)
        assert code == 0
        assert said == f"{name} is killed; the page shows it silent in a few seconds{after}\n"
        demo.read_until(f"{name} ended (exit code -9)")
        assert not psutil.pid_exists(pid)
    none_left = "demo: no node of blocks 10:20 is left to be killed; there are demo-1, demo-3\n"
    assert demo.kill("") == (2, none_left)
    assert demo.kill("spare") == (2, "demo: no node spare runs; there are demo-1, demo-3\n")
    assert demo.kill("gateway") == (2, "demo: no node gateway runs; there are demo-1, demo-3\n")
    assert demo.kill("2")[1] == "demo: no node 2 runs; there are demo-1, demo-3\n"
    demo.process.send_signal(signal.SIGINT)
    assert demo.process.wait(10) == 0
    assert demo.kill("") == (2, NO_DEMO)


@pytest.mark.parametrize("demo", ["none --keep"], indirect=True)
def test_nothing_is_killed_where_no_demo_runs(demo: Demo):
    demo.read_until("open http://127.0.0.1:")
    demo.process.kill()
    demo.process.wait(10)
    assert demo.everything_ended(5)
    assert demo.temporary_folders()  # what a killed demo leaves
    assert demo.kill("2") == (2, NO_DEMO)
    [folder] = demo.temporary_folders()
    (folder / "demo.json").write_text('{"nodes": {"de')
    assert demo.kill("2") == (2, NO_DEMO)


@pytest.mark.parametrize("demo", ["endless"], indirect=True)
def test_nothing_is_killed_of_a_demo_that_has_not_said_its_address(demo: Demo):
    demo.read_until("a garden")
    assert demo.kill("") == (2, NO_DEMO)
    demo.process.send_signal(signal.SIGINT)
    assert demo.process.wait(10) == 130


@pytest.mark.parametrize("demo", ["none"], indirect=True)
def test_settings_of_other_nodes_do_not_reach_the_demo_s(demo: Demo):
    demo.read_until("make demo KEEP=1")
    assert demo.process.wait(10) == 0
    [variables] = {path.read_text() for path in demo.folder.glob("*.variables")}
    assert variables == "RACEME_CACHE"


@pytest.mark.parametrize("demo", ["broken"], indirect=True)
def test_a_node_that_fails_shows_its_log_and_ends_the_rest(demo: Demo):
    demo.read_until("demo-3 ended with exit code 1")
    assert "no such port" in demo.read_until("no such port")
    assert demo.process.wait(10) == 1
    assert demo.everything_ended(0)


@pytest.mark.parametrize("demo", ["deaf"], indirect=True)
def test_a_node_that_ignores_sigterm_is_killed_and_named(demo: Demo):
    demo.read_until("demo-2 (exit code -9) did not end cleanly")
    assert demo.process.wait(10) == 1
    assert demo.everything_ended(0)
