"""Writes requirements/*.lock: for each pin of constraints.txt the SHA-256 of every file of that version.

    python scripts/lock.py                after a change of constraints.txt
    python scripts/lock.py --cpu FILE...  also wheels of torch's build for CPUs, which the index does not have

Needs uv (`pip install uv`, in any environment), which asks the package index for the versions' files.  Each
pin is in one of the files; scripts/set_up.py installs from them, and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.markers import Marker

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = "constraints.txt"
LOCKS = "requirements"
BUILD, TORCH, CPU, ALL = "build.lock", "torch.lock", "torch-cpu.lock", "all.lock"
NOTES = {
    BUILD: "To compile the packages that are published as source.",
    TORCH: "The general build of torch, and under Linux the CUDA libraries that it brings.",
    CPU: "The build of torch for CPUs, which another index has.",
    ALL: "Everything besides.",
}
PYTHONS, MACHINES = ("3.11", "3.12", "3.13"), ("x86_64", "aarch64", "arm64")
_PIN = re.compile(r"^([A-Za-z0-9][\w.-]*)==([^\s;\\]+)(?: ; ([^\\\n]+?))?(?: \\)?$", re.MULTILINE)


def main(words: Sequence[str] | None = None) -> int:
    """Write the files.  0, or 1 with the lines that constraints.txt lacks or has for nothing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cpu", type=Path, nargs="*", default=(), help="wheels of torch's build for CPUs")
    flags = parser.parse_args(words)
    uv = shutil.which("uv")
    if uv is None:
        print("lock: uv is not here: pip install uv", file=sys.stderr)
        return 1
    entries = used(entries_of(compiled(uv, ["pyproject.toml", "--all-extras", "-c", CONSTRAINTS])))
    pins = pins_of((ROOT / CONSTRAINTS).read_text())
    if wrong := differences(pins, {name: version_of(entry) for name, entry in entries.items()}):
        print("\n".join(wrong), file=sys.stderr)
        return 1
    files: dict[str, list[str]] = {name: [] for name in NOTES}
    for name, entry in entries.items():
        files[file_of(name)].append(entry)
    folder = ROOT / LOCKS
    folder.mkdir(exist_ok=True)
    cpu = f"{pins['torch']}+cpu"
    before = (folder / CPU).read_text() if (folder / CPU).exists() else ""
    known = hashes_of(before) if f"=={cpu} " in before else set()
    files[CPU] = [with_hashes(f"torch=={cpu}", known | hashes(flags.cpu))]
    for name, found in files.items():
        (folder / name).write_text(f"# Written by scripts/lock.py.  {NOTES[name]}\n" + "".join(found))
    return 0


def compiled(uv: str, words: Sequence[str]) -> str:
    """uv's answer: requirements with the hashes of all their files, for every platform."""
    command = [
        uv,
        "pip",
        "compile",
        "--quiet",
        "--universal",
        "--generate-hashes",
        "--python-version",
        PYTHONS[0],
    ]
    command += ["--no-header", "--no-annotate", "--no-emit-index-url", *words]
    ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return ran.stdout


def hashes(wheels: Sequence[Path]) -> set[str]:
    """SHA-256 of these files."""
    return {hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels}


def hashes_of(entry: str) -> set[str]:
    """The hashes in the lines of a package."""
    return set(re.findall(r"--hash=sha256:([0-9a-f]{64})", entry))


def with_hashes(pin: str, known: set[str]) -> str:
    """The lines of a package."""
    return " \\\n    ".join([pin, *(f"--hash=sha256:{each}" for each in sorted(known))]) + "\n"


def entries_of(text: str) -> dict[str, str]:
    """Name -> its lines of a lock."""
    starts = [match.start() for match in _PIN.finditer(text)]
    parts = [text[start:stop] for start, stop in zip(starts, [*starts[1:], len(text)], strict=True)]
    return {part.partition("==")[0]: part for part in parts}


def version_of(entry: str) -> str:
    """The version in the lines of a package."""
    match = _PIN.match(entry)
    assert match is not None, entry
    return match[2]


def used(entries: Mapping[str, str]) -> dict[str, str]:
    """Without the packages that no machine of ours installs."""
    return {name: entry for name, entry in entries.items() if _is_used(entry)}


def _is_used(entry: str) -> bool:
    match = _PIN.match(entry)
    assert match is not None, entry
    if match[3] is None:
        return True
    marker = Marker(match[3])
    return any(
        marker.evaluate(
            {
                "python_version": python,
                "python_full_version": f"{python}.1",
                "sys_platform": platform,
                "platform_system": platform.capitalize(),
                "platform_machine": machine,
                "platform_python_implementation": "CPython",
                "implementation_name": "cpython",
                "os_name": "posix",
            }
        )
        for python in PYTHONS
        for platform in ("linux", "darwin")
        for machine in MACHINES
    )


def file_of(name: str) -> str:
    """The lock that a package belongs to."""
    if name == "setuptools":
        return BUILD
    return TORCH if name in ("torch", "triton") or name.startswith(("nvidia-", "cuda-")) else ALL


def pins_of(text: str) -> dict[str, str]:
    """Name -> version of constraints.txt."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return dict(line.split("==", 1) for line in lines)


def differences(pins: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """What to change in constraints.txt; empty where it has every package that is installed, and no other."""
    lacks = [f"{CONSTRAINTS} lacks {name}=={found[name]}" for name in sorted(found.keys() - pins.keys())]
    idle = [f"{CONSTRAINTS} pins {name}, which nothing needs" for name in sorted(pins.keys() - found.keys())]
    return lacks + idle


if __name__ == "__main__":
    sys.exit(main())
