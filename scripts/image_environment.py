"""Fills the environment of the image, in the build stage of Dockerfile.

    python3 scripts/image_environment.py packages /opt/raceme --torch cpu
    python3 scripts/image_environment.py raceme /opt/raceme --extras gateway,metrics,otel

`packages` installs from requirements/*.lock, with hashes; `raceme` installs this source tree, and removes the
packages that neither it nor these extras need (tools of developers).  Uses the standard library alone.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKED = ("--no-deps", "--require-hashes", "--no-build-isolation")
EXTRAS = "gateway,metrics,otel"
NO_CPU_TORCH = """\
no index of pip's has {pin}+cpu.  Either give the address of PyTorch's index for CPUs (see CONTRIBUTING.md):
    --build-arg PIP_EXTRA_INDEX_URL=ADDRESS
or take the general build, which brings several gigabytes of CUDA libraries:
    --build-arg TORCH=cuda"""
UNNEEDED = """\
from importlib.metadata import distributions
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

found = {canonicalize_name(each.metadata["Name"]): each for each in distributions()}
needed, waiting = {"pip"}, [("raceme", frozenset(EXTRAS))]
seen = set()
while waiting:
    name, extras = waiting.pop()
    if (name, extras) in seen or name not in found:
        continue
    seen.add((name, extras))
    needed.add(name)
    for text in found[name].requires or ():
        each = Requirement(text)
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            waiting.append((canonicalize_name(each.name), frozenset(each.extras)))
print(" ".join(sorted(set(found) - needed)))
"""


def main(words: Sequence[str] | None = None) -> int:
    """Run one step; 0, or 1 after a failure, with what can be done about it on standard error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    steps = parser.add_subparsers(dest="step", required=True)
    for name in ("packages", "raceme"):
        step = steps.add_parser(name)
        step.add_argument("folder", type=Path, help="of the environment")
        if name == "packages":
            step.add_argument("--torch", default="cpu", help="cpu, cuda, or a requirement")
        else:
            step.add_argument("--extras", default=EXTRAS, help="of pyproject.toml (default: %(default)s)")
    flags = parser.parse_args(words)
    try:
        if flags.step == "packages":
            install_packages(flags.folder, flags.torch)
        else:
            install_raceme(flags.folder, extras_of(flags.extras, (ROOT / "pyproject.toml").read_text()))
    except subprocess.CalledProcessError as error:
        print(f"image: {' '.join(map(str, error.cmd))} failed", file=sys.stderr)
        return 1
    except LookupError as error:
        print(f"image: {error.args[0]}", file=sys.stderr)
        return 1
    return 0


def install_packages(folder: Path, torch: str) -> None:
    """Make the environment, and install torch and the other packages.

    Raises CalledProcessError, LookupError.
    """
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install_torch(folder, torch)
    for lock in ("build.lock", "all.lock"):
        pip(folder, "install", *CHECKED, "-r", ROOT / "requirements" / lock)


def install_torch(folder: Path, choice: str) -> None:
    """Install the pinned torch, or the one of a requirement of the caller's.

    The build for CPUs has hashes for some versions of Python; for others it is named by its version alone.
    Raises LookupError where there is none, CalledProcessError.
    """
    pin = torch_pin((ROOT / "constraints.txt").read_text())
    if choice == "cuda":
        pip(folder, "install", *CHECKED, "-r", ROOT / "requirements" / "torch.lock")
    elif choice != "cpu":
        pip(folder, "install", "--no-deps", choice)
    else:
        for words in (
            (*CHECKED, "-r", ROOT / "requirements" / "torch-cpu.lock"),
            ("--no-deps", f"{pin}+cpu"),
        ):
            try:
                pip(folder, "install", *words)
            except subprocess.CalledProcessError:
                continue
            return
        raise LookupError(NO_CPU_TORCH.format(pin=pin))


def torch_pin(constraints: str) -> str:
    """The line of constraints.txt for torch.  Raises LookupError."""
    found = re.search(r"^torch==\S+$", constraints, re.MULTILINE)
    if found is None:
        raise LookupError("constraints.txt pins no torch")
    return found[0]


def extras_of(text: str, project: str) -> tuple[str, ...]:
    """The extras that a text names, between commas or blanks.  Raises LookupError for one that is none."""
    names = tuple(dict.fromkeys(re.split(r"[,\s]+", text.strip()))) if text.strip() else ()
    known = tomllib.loads(project)["project"]["optional-dependencies"]
    if wrong := [name for name in names if name not in known]:
        raise LookupError(f"EXTRAS has {', '.join(map(repr, wrong))}, {', '.join(sorted(known))} are there")
    return names


def install_raceme(folder: Path, extras: Sequence[str]) -> None:
    """Install this source tree, and remove what it does not need.  Raises CalledProcessError."""
    pip(folder, "install", "--no-deps", "--no-build-isolation", ".")
    script = UNNEEDED.replace("EXTRAS", repr(tuple(extras)))
    ran = subprocess.run(
        [folder / "bin" / "python", "-c", script], check=True, stdout=subprocess.PIPE, text=True
    )
    if names := ran.stdout.split():
        pip(folder, "uninstall", "--yes", *names)
    pip(folder, "check")
    print(f"image: {folder} has raceme[{','.join(extras)}], without {len(names)} packages of the locks")


def pip(folder: Path, command: str, *words: str | Path) -> None:
    """Run the environment's pip.  Raises CalledProcessError."""
    quiet = ("--no-cache-dir", "--progress-bar", "off") if command == "install" else ()
    run = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", command, *quiet, *words]
    subprocess.run(run, check=True, cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
