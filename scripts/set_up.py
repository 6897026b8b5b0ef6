"""Makes `.venv`: from a bare machine to everything that `make demo` and `make test` need.

Started by scripts/setup.sh with a Python that is new enough; uses the standard library alone.  A stage
is one line on the terminal and the rest in `.venv/set-up.log`.  The stamp is written last, so an
interrupted set-up goes on from its last stage, and a finished one costs milliseconds.

From the environment: RACEME_TORCH, a requirement that replaces the choice of torch made here;
RACEME_NO_APT=1, which leaves system packages to you.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOG = VENV / "set-up.log"
MADE_FOR = VENV / "made-for"  # which interpreter and folder: an environment cannot be moved
STAMP = VENV / "set-up-stamp"
CONSTRAINTS = ROOT / "constraints.txt"
LOCKS = ROOT / "requirements"  # the same versions with the hashes of all their files, by scripts/lock.py

BASE_PYTHON: str = getattr(sys, "_base_executable", sys.executable)  # also if .venv's own python runs this
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


class SetUpError(Exception):
    """An error that the reader must fix; the message is one clear line."""


class CommandFailed(Exception):
    """A command ended with an error, which is in the log."""


def main() -> int:
    """Set up if anything changed since the last time.  0, 1 for a failed stage, 2 for an absent part."""
    with one_at_a_time():
        if STAMP.exists() and STAMP.read_text() == wanted_stamp():
            return 0
        say(f"set-up: Python {sys.version.split()[0]} ({BASE_PYTHON}), details in .venv/{LOG.name}")
        try:
            started = time.monotonic()
            set_up()
            say(f"set-up: done in {time.monotonic() - started:.0f} s")
            return 0
        except SetUpError as error:
            print(f"set-up: {error}", file=sys.stderr)
            return 2
        except CommandFailed as error:
            print(f"set-up: {error}; the end of .venv/{LOG.name}:", file=sys.stderr)
            for line in log_lines()[-20:]:
                print(f"    {line}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nset-up: interrupted; the next run goes on from here", file=sys.stderr)
            return 130


def set_up() -> None:
    """Run every stage; a finished stage does nothing."""
    STAMP.unlink(missing_ok=True)
    if VENV.exists() and not usable_environment():
        shutil.rmtree(VENV)
    VENV.mkdir(exist_ok=True)
    LOG.write_text("")
    install_system_packages()
    if not usable_environment():
        make_environment()
    install_torch()
    install_locked("setuptools", "build.lock")  # for packages in source: pip would fetch one without a hash
    install_locked("the dependencies", "all.lock")
    pip_install("Raceme", "--no-deps", "--no-build-isolation", "-e", ".")
    link_trio_types()
    compile_kernels()
    STAMP.write_text(wanted_stamp())


def wanted_stamp() -> str:
    """A digest of all inputs of the environment."""
    digest = hashlib.sha256(made_for().encode())
    for path in (ROOT / "pyproject.toml", CONSTRAINTS, *sorted(LOCKS.glob("*.lock"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def made_for() -> str:
    """The binding of an environment: the interpreter's version and the folder."""
    return f"{sys.version} {sys.platform} {VENV}"


def usable_environment() -> bool:
    """Whether .venv was made for this interpreter and folder, and to the end."""
    return MADE_FOR.exists() and MADE_FOR.read_text() == made_for()


# System packages: fastecdsa, which py-libp2p requires, is published as source only


def install_system_packages() -> None:
    """Install the missing packages for the environment and for fastecdsa, where we may."""
    needs_venv = not usable_environment() and importlib.util.find_spec("ensurepip") is None
    missing = [] if fastecdsa_is_built() else missing_build_parts()
    if not missing and not needs_venv:
        return
    packages = [APT_NAMES[part] for part in missing] + ([f"python{VERSION}-venv"] if needs_venv else [])
    if "C compiler" in missing:
        packages.append("libc6-dev")  # only recommended by gcc, and nothing links without it
    may = apt_prefix()
    if may is not None:
        apt_install(packages, may)
        missing = missing_build_parts()
    if missing:
        what = " and no ".join(missing)
        raise SetUpError(f"fastecdsa must be compiled here, but found no {what}: {remedy(packages)}")


APT_NAMES = {"C compiler": "gcc", "gmp.h": "libgmp-dev", "Python.h": f"python{VERSION}-dev"}


def missing_build_parts() -> list[str]:
    """The missing ones of a C compiler, gmp.h and this interpreter's Python.h, by a test compilation."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()
    if shutil.which(compiler[0]) is None:
        # Without a compiler, look for the headers in their usual folders.
        multiarch = str(sysconfig.get_config_var("MULTIARCH") or "")
        gmp = any(Path("/usr/include", folder, "gmp.h").exists() for folder in ("", multiarch))
        own = Path(sysconfig.get_path("include"), "Python.h").exists()
        return ["C compiler"] + ([] if gmp else ["gmp.h"]) + ([] if own else ["Python.h"])
    if not compiles(compiler, ""):
        return ["C compiler"]
    return [
        header
        for header, source, flags in (
            ("gmp.h", "#include <gmp.h>\n", ["-lgmp"]),
            ("Python.h", "#include <Python.h>\n", ["-I", sysconfig.get_path("include")]),
        )
        if not compiles(compiler, source, *flags)
    ]


def compiles(compiler: Sequence[str], source: str, *flags: str) -> bool:
    """Whether a program with these lines in front compiles and links, CFLAGS and LDFLAGS included."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "probe.c")
        program.write_text(f"{source}int main(void) {{ return 0; }}\n")
        extra = [*os.environ.get("CFLAGS", "").split(), *os.environ.get("LDFLAGS", "").split(), *flags]
        command = [*compiler, str(program), "-o", str(Path(folder, "probe")), *extra]
        return subprocess.run(command, capture_output=True).returncode == 0


def fastecdsa_is_built() -> bool:
    """Whether fastecdsa is installed in .venv, or pip kept the wheel of an earlier build."""
    if any(VENV.glob("lib/python*/site-packages/fastecdsa-*.dist-info")):
        return True
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    listed = kept_wheels("fastecdsa").splitlines()
    return any(pinned("fastecdsa") in line and f"-{tag}-" in line for line in listed)


def kept_wheels(distribution: str) -> str:
    """pip's list of the wheels that it built and kept."""
    pip = VENV / "bin" / "pip"
    command = [str(pip)] if pip.exists() else [BASE_PYTHON, "-m", "pip"]
    return subprocess.run([*command, "cache", "list", distribution], capture_output=True, text=True).stdout


def apt_prefix() -> list[str] | None:
    """The words before apt-get: none for root, sudo where it asks for no password; None: not allowed."""
    if shutil.which("apt-get") is None or os.environ.get("RACEME_NO_APT"):
        return None
    if os.geteuid() == 0:
        return ["env"]
    if shutil.which("sudo") and subprocess.run(["sudo", "-n", "true"], capture_output=True).returncode == 0:
        return ["sudo", "-n", "env"]
    return None


def apt_install(packages: Sequence[str], prefix: Sequence[str]) -> None:
    """Install Debian packages, with fresh package lists if the present lists fail."""
    apt = [*prefix, "DEBIAN_FRONTEND=noninteractive", "apt-get", "-o", "DPkg::Lock::Timeout=120"]
    install = [*apt, "install", "-y", "--no-install-recommends", *packages]
    with stage(f"installing system packages: {' '.join(packages)}"):
        try:
            run(install)
        except CommandFailed:
            run([*apt, "update"])
            run(install)


def remedy(packages: Sequence[str]) -> str:
    """The command that installs the missing packages, for this system."""
    if sys.platform == "darwin":
        return "xcode-select --install; brew install gmp (and point CFLAGS and LDFLAGS at it)"
    if shutil.which("dnf"):
        return "sudo dnf install gcc gmp-devel python3-devel"
    if shutil.which("pacman"):
        return "sudo pacman -S gcc gmp python"
    return f"sudo apt-get install {' '.join(packages)}"


# The environment


def make_environment() -> None:
    """Create .venv, with virtualenv where the interpreter came without ensurepip."""
    with stage("virtual environment"):
        if importlib.util.find_spec("ensurepip") is not None or ensurepip_was_just_installed():
            run([BASE_PYTHON, "-m", "venv", str(VENV)])
        else:
            make_environment_with_virtualenv()
        run([str(VENV / "bin" / "python"), "-m", "pip", "--version"])
    MADE_FOR.write_text(made_for())


def ensurepip_was_just_installed() -> bool:
    """Ask a new process: this process looked before apt ran."""
    return subprocess.run([BASE_PYTHON, "-c", "import ensurepip"], capture_output=True).returncode == 0


VIRTUALENV = {"virtualenv", "distlib", "filelock", "platformdirs", "python-discovery"}


def make_environment_with_virtualenv() -> None:
    """Put virtualenv into a temporary folder, so that the system's Python stays as it was."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            listed = Path(folder, "virtualenv.lock")
            listed.write_text("".join(lines_of("all.lock", VIRTUALENV)))
            target = ["--target", folder, *CHECKED, "-r", str(listed)]
            run([BASE_PYTHON, "-m", "pip", "install", *target], **pip_environment(BASE_PYTHON))
        except CommandFailed:
            raise SetUpError(
                f"{BASE_PYTHON} has neither venv nor pip: {remedy([f'python{VERSION}-venv'])}"
            ) from None
        run([BASE_PYTHON, "-m", "virtualenv", str(VENV)], PYTHONPATH=folder)


def install_torch() -> None:
    """Install the pinned torch first, so that nothing else can ask for another build of it.

    Without an NVIDIA GPU the build for CPUs alone is asked for first; the general build for Linux brings
    gigabytes of CUDA libraries that would never be used.  After any failure of the first choice the general
    build is tried: pip's messages differ with its configuration.  RACEME_TORCH is taken without a hash.
    """
    pin = f"torch=={pinned('torch')}"
    chosen = os.environ.get("RACEME_TORCH")
    if chosen:
        pip_install(chosen, "-c", str(CONSTRAINTS), chosen)
        return
    if sys.platform == "linux" and not has_nvidia_gpu():
        try:
            install_locked(f"{pin}, the build for CPUs", "torch-cpu.lock")
            return
        except CommandFailed:
            why = "pip's index offers no such build; see 'Torch without CUDA' in CONTRIBUTING.md"
            answer = LOG.read_text(errors="replace")
            if "DO NOT MATCH THE HASHES" in answer:
                why = f"its hash is not in {LOCKS.name}; see 'Torch without CUDA' in CONTRIBUTING.md"
            elif "No matching distribution" not in answer:
                why = f"pip could not install that build (its answer is in .venv/{LOG.name})"
            say_and_log(f"  {why}; the general build is tried")
    install_locked(pin, "torch.lock")


def has_nvidia_gpu() -> bool:
    """Whether a driver or its tool is there."""
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


CHECKED = ("--no-deps", "--require-hashes", "--no-build-isolation")


def install_locked(what: str, lock: str) -> None:
    """Install the packages of a lock into .venv, and no others that they ask for.  Raises CommandFailed."""
    pip_install(what, *CHECKED, "-r", str(LOCKS / lock))


def lines_of(lock: str, names: set[str]) -> list[str]:
    """The lines of some packages in a lock."""
    found, wanted = [], False
    for line in (LOCKS / lock).read_text().splitlines(keepends=True):
        if not line.startswith((" ", "#")):
            wanted = line.partition("==")[0] in names
        if wanted:
            found.append(line)
    return found


def pip_install(what: str, *words: str) -> None:
    """Let pip install into .venv, as one stage.  Raises CommandFailed."""
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--progress-bar", "off"]
    with stage(f"installing {what}"):
        run([*command, *words], **pip_environment(command[0]))


# Of pip's configuration: the sources of packages, and the network settings.  Everything else (constraints,
# --user, --target, hashes, ...) is meant for other environments; .venv has its own versions.
PIP_OPTIONS_KEPT = (
    "index-url",
    "extra-index-url",
    "find-links",
    "no-index",
    "trusted-host",
    "cert",
    "client-cert",
    "proxy",
    "timeout",
    "default-timeout",
    "retries",
    "resume-retries",
    "cache-dir",
    "no-cache-dir",
    "keyring-provider",
)


def pip_environment(python: str) -> dict[str, str]:
    """Environment variables that stand for all of pip's configuration, for a pip that `python` runs."""
    configured = read_pip_configuration(pip_configuration(python), os.environ)
    kept = {name: value for name, value in configured.items() if name in PIP_OPTIONS_KEPT}
    dropped = sorted(configured.keys() - kept.keys() - {"disable-pip-version-check", "no-input"})
    if dropped:
        log(f"# of pip's configuration, left out: {', '.join(dropped)}")
    return {
        # pip takes an empty variable for one that is not set.
        **{name: "" for name in os.environ if name.startswith("PIP_")},
        **{"PIP_" + name.upper().replace("-", "_"): value for name, value in kept.items()},
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INPUT": "1",
    }


def pip_configuration(python: str) -> str:
    """pip's report of its configuration; empty where its files cannot be read."""
    command = [python, "-m", "pip", "config", "list"]
    return subprocess.run(command, capture_output=True, text=True, errors="replace").stdout


def read_pip_configuration(listed: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Option -> value, as `pip install` would take them, from what `pip config list` printed.

    Each line is SECTION.OPTION=VALUE, the value quoted as in Python.  The section of a command overrides the
    global one, and the environment overrides both.  Several values of an option are one line here.
    """
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}}
    for line in listed.splitlines():
        name, _, quoted = line.partition("=")
        section, _, option = name.rpartition(".")
        try:
            value = str(ast.literal_eval(quoted))
        except (ValueError, SyntaxError):
            continue
        if section in sections:
            sections[section][option] = " ".join(value.split())
    variables = {
        name.removeprefix("PIP_").lower().replace("_", "-"): value
        for name, value in environment.items()
        if name.startswith("PIP_") and value and name != "PIP_CONFIG_FILE"
    }
    return {**sections["global"], **sections["install"], **variables}


def link_trio_types() -> None:
    """Put trio's own types before the old stubs that py-libp2p brings along (see pyproject.toml)."""
    link = VENV / "typing" / "trio"
    for installed in VENV.glob("lib/python*/site-packages/trio"):
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(installed)


def compile_kernels() -> None:
    """Compile the usual nodes' kernels into the user's cache, so that a first start takes less time."""
    with stage("compiling kernels"):
        try:
            run([str(VENV / "bin" / "python"), "-m", "node.model.weights.precompile"])
        except CommandFailed as error:  # a node compiles what it lacks, and says what it cannot
            log(f"# {error}")


def pinned(distribution: str) -> str:
    """The version of `distribution` in constraints.txt."""
    found = re.search(rf"^{re.escape(distribution)}==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE)
    if found is None:
        raise SetUpError(f"constraints.txt pins no {distribution}")
    return found.group(1)


# Running and telling


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold a lock on the repository's folder, so that two makes do not set up at once."""
    folder = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


@contextmanager
def stage(what: str) -> Iterator[None]:
    """One line for one stage: its action, and its time."""
    started = time.monotonic()
    say(f"  {what} ... ", end="")
    try:
        yield
    except BaseException:
        say("not done")
        raise
    say(f"{time.monotonic() - started:.1f} s")


def run(command: Sequence[str], **environment: str) -> None:
    """Run a command in the repository, its output into the log.  Raises CommandFailed."""
    merged: Mapping[str, str] = {**os.environ, **environment}
    with LOG.open("a") as log:
        print(f"$ {' '.join(command)}", file=log, flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=merged
        )
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code:
        raise CommandFailed(f"'{' '.join(command[:6])} ...' failed with exit code {code}")


def say(text: str, end: str = "\n") -> None:
    """Print at once, also into a pipe."""
    print(text, end=end, flush=True)


def log(line: str) -> None:
    """Add a line to the log."""
    with LOG.open("a") as file:
        print(line, file=file)


def say_and_log(text: str) -> None:
    """Print a line, and keep it in the log."""
    say(text)
    log(f"# {text.strip()}")


def log_lines() -> list[str]:
    """The log so far."""
    return LOG.read_text(errors="replace").splitlines() if LOG.exists() else []


def interrupt(signum: int, frame: object) -> None:
    """SIGTERM ends set-up the way that Ctrl-C does: children first."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    sys.exit(main())
