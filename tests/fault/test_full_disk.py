"""A disk that is full: under a node that serves, and under one that starts."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from benchmarks.lib.processes import LocalSwarm, local_swarm
from tests.fault.test_processes import wait_until
from tests.forked import Forked, forked_run

pytestmark = pytest.mark.process

COMMON = ["--threads", "1", "--dtype", "float32", "--device", "cpu", "--cache-tokens", "1024"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Write until nothing more fits; the file."""
    path = disk / "filler"
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        for size in (1 << 16, 1 << 12, 1):
            while True:
                try:
                    os.write(file, bytes(size))
                except OSError:
                    break
    finally:
        os.close(file)
    assert os.statvfs(disk).f_bavail == 0
    return path


def generated(swarm: LocalSwarm, model: Path) -> list[int]:
    """The tokens that a client gets."""
    done = forked_run(
        *("client", "generate", "--peers", *swarm.peers, "--model", model, "--json", "--greedy"),
        *("--max-new-tokens", "8", "hello"),
    )
    assert done.returncode == 0, done.stderr
    tokens: list[int] = json.loads(done.stdout)["tokens"]
    return tokens


def names(disk: Path) -> set[str]:
    return {path.name for path in disk.rglob("*") if path.is_file()}


def test_a_node_whose_disk_fills_up_serves_on_and_leaves_nothing_half_written(
    disk: Path, tiny_llama: Path
) -> None:
    files = ["--identity", str(disk / "identity"), "--vitals-file", str(disk / "vitals.json")]

    def spawn(command: Sequence[str], environment: Mapping[str, str], output: Path) -> Forked:
        return Forked(command, environment, disk / "log")

    with local_swarm([*COMMON, *files], environment={"RACEME_CACHE": str(disk)}, spawn=spawn) as swarm:
        swarm.folder = disk  # for its ready file
        node = swarm.start(str(tiny_llama), "--blocks", "0:6")
        node.wait_online()
        before = generated(swarm, tiny_llama)
        expected = {"identity", "vitals.json", "log", "node-0.json", "hashes.json", "rates.json"}
        wait_until(lambda: expected <= names(disk), 30)  # vitals are written once a second
        written = {name for name in names(disk) if not name.endswith(".node")}  # it says that a node runs
        fill(disk)
        assert generated(swarm, tiny_llama) == before
        assert generated(swarm, tiny_llama) == before
        assert node.process.poll() is None
        assert node.stop() == 0
        assert names(disk) == {*written, "filler"}
        for name in ("node-0.json", "vitals.json", "hashes.json", "rates.json"):
            json.loads((disk / name).read_text())
        assert (disk / "identity").stat().st_size == 32


@pytest.mark.parametrize(
    ("flag", "what"),
    [("--identity", "identity {path} (32 bytes)"), ("--ready-file", "the ready file {path}")],
)
def test_a_start_that_needs_a_full_disk_ends_in_one_line_with_the_path_and_the_bytes(
    disk: Path, flag: str, what: str
) -> None:
    fill(disk)
    done = forked_run("node", "bootstrap", flag, disk / "file")
    assert done.returncode == 2
    said = f"cannot write {what.format(path=disk / 'file')}: No space left on device, 0 bytes are free"
    assert done.stderr.splitlines()[-1] == f"error: {said}"
    assert "Traceback" not in done.stderr
    assert names(disk) == {"filler"}


def test_a_node_with_a_full_cache_folder_measures_anew_and_serves(disk: Path, tiny_llama: Path) -> None:
    fill(disk)
    with local_swarm(COMMON, environment={"RACEME_CACHE": str(disk / "cache")}, spawn=Forked) as swarm:
        node = swarm.start(str(tiny_llama), "--blocks", "0:6")
        node.wait_online()
        assert generated(swarm, tiny_llama)
        assert "the measured rates are not kept: cannot write" in node.tail()
        assert "No space left on device" in node.tail()
    assert names(disk) == {"filler"}
