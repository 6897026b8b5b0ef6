"""One attack from its swarm to its row: nodes, an honest client, newcomers, the attacker, the burner."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.lib.machine import Elsewhere
from benchmarks.lib.processes import LocalSwarm, NodeProcess, local_swarm
from tests.hostile.attack import Attack
from tests.hostile.judgement import HELD, SEEN_SECONDS, Newcomer, Phases, Row, Seen, Vitals, Window, judged
from tests.hostile.places import Places
from tests.hostile.talking import ProcessEnded, Talking, talking

START_SECONDS = 120.0
WARM_TOKENS, WARM_NEWCOMERS = 30, 2
SETTLE_SECONDS = 5.0  # nothing may be left after these
LOOK_SECONDS = 4.0  # at what is left
PATIENCE_SECONDS = 4.0  # for newcomers that came at the end
WATCH_SECONDS = 0.05
# Of resident memory: the attacker is ended there, so that a node without bounds does not fill the machine.
MOST_RSS_BYTES = 8 * 2**30
NODE = ("--threads", "1", "--dtype", "float32", "--device", "cpu", "--cache-tokens", "16384")
BOUND = re.compile(r"bound ([\d.]+) GiB resident")


@dataclass(frozen=True, slots=True)
class Setting:
    """How attacks are run.  folder: of the logs."""

    seconds: float
    places: Places
    folder: Path


@dataclass(slots=True)
class Watched:
    """A node and what was seen of it.  Made by `watched`."""

    node: NodeProcess
    file: Path
    vitals: list[Vitals] = field(default_factory=list)
    rss: list[tuple[float, int]] = field(default_factory=list)
    too_large: threading.Event = field(default_factory=threading.Event)

    @property
    def bound(self) -> int:
        """Of its resident memory, as its log states it."""
        found = BOUND.search(self.node.log.read_text())
        return int(float(found[1]) * 2**30) if found else 0

    def look(self) -> None:
        """Take a sample."""
        try:
            size = psutil.Process(self.node.process.pid).memory_info().rss
            facts = json.loads(self.file.read_text())
        except (OSError, psutil.NoSuchProcess, json.JSONDecodeError):
            return
        self.rss.append((time.monotonic(), size))
        if size > MOST_RSS_BYTES:
            self.too_large.set()
        if not self.vitals or self.vitals[-1].at != facts["at"]:
            held = {name: facts[name] for name in HELD}
            self.vitals.append(Vitals(facts["at"], facts["rss"], held, tuple(facts["lags_ms"])))


@contextmanager
def watched(node: NodeProcess, file: Path) -> Iterator[Watched]:
    """Sample a node until the end of the block."""
    found, ended = Watched(node, file), threading.Event()

    def watch() -> None:
        while not ended.wait(WATCH_SECONDS):
            found.look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


@dataclass(frozen=True, slots=True)
class Bystanders:
    """The honest peers, each a process that says what it sees.

    client: decodes for ever.  newcomers: one a second.  announcers: newcomers that announce themselves, where
    the attack is against that.
    """

    client: Talking
    newcomers: Talking
    announcers: Talking | None

    def wait_warm(self) -> None:
        """Until each has begun.  Raises ProcessEnded."""
        self.client.wait_for("token", START_SECONDS, WARM_TOKENS)
        self.newcomers.wait_for("newcomer", START_SECONDS, WARM_NEWCOMERS)
        if self.announcers is not None:
            self.announcers.wait_for("announced", START_SECONDS)

    def figures(self, window: Window) -> dict[str, Any]:
        """Besides tokens and newcomers: the longest search, and new records that were seen in time."""
        found: dict[str, Any] = {}
        if searches := [seconds for at, seconds in self.client.all("search") if window.holds(at)]:
            found["search_ms"] = round(max(searches) * 1000, 1)
        if self.announcers is not None:
            told = [Newcomer(*each) for each in self.announcers.all("announced")]
            came = [each for each in told if window.holds(each.began)]
            seen = [each for each in came if each.seconds is not None and each.seconds <= SEEN_SECONDS]
            found["announced_seen"] = round(len(seen) / len(came), 3) if came else None
            found["announce_errors"] = sorted({each.error for each in came if each.error})[:3]
        return found


def run_attack(attack: Attack, setting: Setting) -> Row:
    """Run one attack against a fresh swarm.

    Raises ProcessError and ProcessEnded where an honest part fails.
    """
    log = setting.folder / f"{attack.name}.log"
    log.unlink(missing_ok=True)
    with local_swarm(NODE) as swarm, ExitStack() as stack:
        node = start(swarm, attack, setting.places)
        watch = stack.enter_context(watched(node, swarm.folder / "vitals.json"))
        addresses = [each.address for each in swarm.nodes]

        def begin(what: str, *words: str) -> Talking:
            return stack.enter_context(talking(f"tests.hostile.{what}", words, log))

        others = Bystanders(
            begin("honest", addresses[0]),
            begin("newcomers", addresses[0]),
            begin("announcers", addresses[0], setting.places.honest) if attack.announces else None,
        )
        places = setting.places
        where = ("--targets", *addresses, "--sources", *places.attacker, "--third", places.third)
        seconds = setting.seconds * attack.stretch
        attacker = begin("attacker", attack.name, *where, "--seconds", str(seconds))
        others.wait_warm()
        attacker.wait_for("ready", START_SECONDS)
        try:
            phases, over = act(attacker, watch, setting.seconds, seconds)
            elsewhere = Elsewhere()
            phases = replace(phases, burner=burn(over, setting, phases, log))
            over["others_burner"] = elsewhere.share()
            time.sleep(PATIENCE_SECONDS)
            return row_of(attack, phases, over, watch, others)
        finally:
            (setting.folder / f"{attack.name}.node.log").write_text(node.log.read_text())


def start(swarm: LocalSwarm, attack: Attack, places: Places) -> NodeProcess:
    """The nodes, online; the attacked one."""
    vitals = ("--vitals-file", str(swarm.folder / "vitals.json"))
    listen = ("--listen", f"/ip4/{places.node}/tcp/0")
    for number, (begin, end) in enumerate(attack.spans):
        swarm.start("--blocks", f"{begin}:{end}", *listen, *(vitals if number == 0 else ())).wait_online()
    return swarm.nodes[0]


def act(
    attacker: Talking, watch: Watched, before_seconds: float, seconds: float
) -> tuple[Phases, dict[str, Any]]:
    """Before, during and after; the burner's window is not known yet."""
    begin = time.monotonic()
    time.sleep(before_seconds)
    before = Window(begin, time.monotonic())
    elsewhere = Elsewhere()
    attacker.tell("go")
    began = attacker.wait_for("began", 10.0)
    deadline = time.monotonic() + seconds + 5.0
    while attacker.process.poll() is None and not watch.too_large.is_set() and time.monotonic() < deadline:
        time.sleep(0.02)
    attacker.process.kill()
    attacker.process.wait()
    during, load = Window(began, time.monotonic()), elsewhere.share()
    time.sleep(SETTLE_SECONDS)
    begin = time.monotonic()
    time.sleep(LOOK_SECONDS)
    left = Window(begin, time.monotonic())
    over = attacker.said[-1] if attacker.said else {}
    if "over" not in over:
        if not (watch.too_large.is_set() or during.seconds > seconds):
            raise ProcessEnded("the attacker failed; its log says why")
        ended = "too much memory" if watch.too_large.is_set() else "late"
        over = {"cpu": during.seconds, "got": {}, "facts": {"ended": ended}}
    return Phases(before, during, left, left), {**over, "others_during": load}


def burn(over: Mapping[str, Any], setting: Setting, phases: Phases, log: Path) -> Window:
    """Burn the attacker's share of a core for a phase."""
    share = min(1.0, over["cpu"] / phases.during.seconds)
    with talking("tests.hostile.burner", [f"{share:.3f}", str(setting.seconds)], log) as burner:
        burner.process.wait(setting.seconds + START_SECONDS)
    return Window(time.monotonic() - setting.seconds, time.monotonic())


def row_of(
    attack: Attack, phases: Phases, over: Mapping[str, Any], watch: Watched, others: Bystanders
) -> Row:
    """The verdict."""
    seen = Seen(
        others.client.all("token"),
        [Newcomer(*each) for each in others.newcomers.all("newcomer")],
        list(watch.vitals),
        list(watch.rss),
    )
    got = {**over["got"], **over["facts"], **others.figures(phases.during)}
    failed = attack.check(got)
    if watch.node.process.poll() is not None:
        failed = [*failed, f"the node ended with exit code {watch.node.process.returncode}"]
    if wrong := [at for at in others.client.all("wrong") if at < phases.left.end]:
        failed = [*failed, f"{len(wrong)} honest generations had other tokens than before"]
    row = judged(seen, phases, watch.bound, attack.thresholds, got, failed)
    row.values = {
        "attack": attack.name,
        **row.values,
        "attacker_cpu_share": round(over["cpu"] / phases.during.seconds, 2),
        "others_during": over["others_during"],
        "others_burner": over["others_burner"],
        "errors_of_the_honest": others.client.all("error")[:5],
    }
    return row


def run_all(attacks: Sequence[Attack], setting: Setting) -> Iterator[Row]:
    """The row of each attack, one after the other.  An attack whose honest parts fail is a row, too."""
    for attack in attacks:
        try:
            yield run_attack(attack, setting)
        except ProcessEnded as error:
            values = {"attack": attack.name, "failed": [str(error)], "passed": False}
            yield Row(values, [str(error)])
