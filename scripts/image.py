"""Builds the image of Raceme with Docker or buildah: `make image` and `make image-base`.

    python3 scripts/image.py build [--tag NAME] [--base IMAGE] [--torch cpu|cuda] [words for the builder]
    python3 scripts/image.py base [--suite bookworm] [--tag NAME]

`base` makes a small Debian with Python by mmdebstrap or debootstrap, for machines that reach Debian's
packages and no registry of images.  Uses the standard library alone.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUITE = "bookworm"
BASE = f"localhost/raceme-base:{SUITE}"
PACKAGES = ("ca-certificates", "python3", "python3-venv")
# Debian's own Python has its headers in a package, the official images of Python have them already.
BUILD_PACKAGES = "gcc libc6-dev libgmp-dev python3-dev"
NO_BUILDER = (
    "neither a Docker daemon answers nor is buildah here: start Docker, or install buildah"
    " (Debian, Ubuntu: apt-get install buildah)"
)
NO_BOOTSTRAP = "neither mmdebstrap nor debootstrap is here (Debian, Ubuntu: apt-get install mmdebstrap)"


class ImageError(Exception):
    """An error that the reader must fix; the message is one clear line."""


def main(words: Sequence[str] | None = None) -> int:
    """Build; 0, 1 where a program failed, 2 where one is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    steps = parser.add_subparsers(dest="step", required=True)
    build = steps.add_parser("build", help="build the image; further words go to docker build or buildah bud")
    build.add_argument("--tag", default=f"raceme:{version()}", help="(default: %(default)s)")
    build.add_argument("--base", help="an image with Python (default: the one of Dockerfile)")
    build.add_argument("--torch", default="cpu", help="cpu, cuda, or a requirement of pip (default: cpu)")
    base = steps.add_parser("base", help="make a base image of Debian's packages")
    base.add_argument("--tag", default=BASE, help="(default: %(default)s)")
    base.add_argument("--suite", default=SUITE, help="of Debian (default: %(default)s)")
    flags, more = parser.parse_known_args(words)
    try:
        builder = find_builder(shutil.which, answers)
        if flags.step == "build":
            run(build_command(builder, flags.tag, flags.base, flags.torch, more))
        elif more:
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        else:
            make_base(builder, flags.suite, flags.tag)
    except ImageError as error:
        print(f"image: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"image: {error.cmd[0]} failed with exit code {error.returncode}", file=sys.stderr)
        return 1
    print(f"image: {flags.tag} is there")
    return 0


def version() -> str:
    """The version of Raceme in pyproject.toml."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return str(tomllib.load(file)["project"]["version"])


def answers(command: Sequence[str]) -> bool:
    """Whether a command succeeds within some seconds."""
    try:
        return subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def find_builder(which: Callable[[str], str | None], answers: Callable[[Sequence[str]], bool]) -> str:
    """ "docker" where its daemon answers, else "buildah".  Raises ImageError for neither."""
    if which("docker") and answers(["docker", "info"]):
        return "docker"
    if which("buildah"):
        return "buildah"
    raise ImageError(NO_BUILDER)


def build_command(builder: str, tag: str, base: str | None, torch: str, more: Sequence[str]) -> list[str]:
    """The words that build the image.

    buildah's usual format has no health check, so it writes Docker's.
    """
    command = ["docker", "build"] if builder == "docker" else ["buildah", "bud", "--format", "docker"]
    command += ["--tag", tag, "--build-arg", f"TORCH={torch}"]
    if base is not None:
        command += ["--build-arg", f"BASE={base}"]
        if base.startswith("localhost/"):
            command += ["--build-arg", f"BUILD_PACKAGES={BUILD_PACKAGES}"]
    return [*command, *more, str(ROOT)]


def make_base(builder: str, suite: str, tag: str) -> None:
    """Make a root file system of Debian's packages and import it.  Raises ImageError, CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder, "root.tar")
        if shutil.which("mmdebstrap"):
            run(["mmdebstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", suite, str(archive)])
        elif shutil.which("debootstrap"):
            root = Path(folder, "root")
            run(["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", suite, str(root)])
            shutil.rmtree(root / "var" / "cache" / "apt" / "archives", ignore_errors=True)
            run(["tar", "--create", "--file", str(archive), "--directory", str(root), "--numeric-owner", "."])
        else:
            raise ImageError(NO_BOOTSTRAP)
        if builder == "docker":
            run(["docker", "import", str(archive), tag])
            return
        made = subprocess.run(["buildah", "from", "scratch"], check=True, stdout=subprocess.PIPE, text=True)
        container = made.stdout.strip()
        try:
            run(["buildah", "add", "--quiet", container, str(archive), "/"])
            run(["buildah", "commit", "--quiet", "--format", "docker", container, tag])
        finally:
            run(["buildah", "rm", container])


def run(command: Sequence[str]) -> None:
    """Run a program, its output on the terminal.  Raises CalledProcessError."""
    print(f"image: {' '.join(command)}", flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
