"""llama.cpp out of its source package on PyPI, built once into the user's cache, and weights in its format.

    llama.cpp/VERSION/source            of the package llama-cpp-python, which has llama.cpp in it
                      build-<cpu>/bin   llama-server, ggml-rpc-server, llama-bench, llama-quantize
                      gguf/<revision>   F32.gguf, BF16.gguf, Q8_0.gguf
                      python            what the conversion imports, and cmake where the machine has none
                      *.log             each command and its output, one after the other

An interrupted build goes on where it stopped.  Programs are compiled for this CPU (GGML_NATIVE), so another
CPU has a folder of its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from node.config import ConfigError
from node.model.checkpoint.folder import ModelFolder

VERSION = "0.3.36"
REQUIREMENT = f"llama-cpp-python=={VERSION}"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"  # of the source package
CONVERSION = ("sentencepiece==0.2.3",)  # imported by its convert_hf_to_gguf.py for any tokenizer
TOOLS = ("cmake>=3.28", "ninja>=1.11")  # of PyPI, where the machine has no cmake
TARGETS = ("llama-server", "ggml-rpc-server", "llama-bench", "llama-quantize")
FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DGGML_RPC=ON",
    "-DGGML_OPENMP=OFF",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
DOWNLOAD_SECONDS = 1800.0  # 77 MB at 50 KB/s
BUILD_SECONDS = 3600.0  # 15 CPU minutes on one core of an EPYC of 2022
CONVERT_SECONDS = 900.0  # 4 s for 135M weights


class NotBuilt(Exception):
    """llama.cpp cannot be built or used here; the message is the reason, one line."""


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """llama.cpp's folder of one version, built."""

    folder: Path
    programs: Path

    def program(self, name: str) -> str:
        """The path of a program."""
        return str(self.programs / name)

    def weights(self, model: ModelFolder, kind: str) -> Path:
        """The model's weights in one of llama.cpp's kinds, made of the same files that a node loads.

        kind: F32, BF16, Q8_0; the latter two out of the first.  Raises NotBuilt.
        """
        folder = self.folder / "gguf" / str(model.revision)
        made = folder / f"{kind}.gguf"
        if made.exists():
            return made
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{kind}.{os.getpid()}.part"
        if kind == "F32":
            model.need({entry.file for entry in model.tensors.values()})
            script = self.folder / "source" / "convert_hf_to_gguf.py"
            words = [sys.executable, str(script), str(model.path), "--outtype", "f32", "--outfile", str(part)]
        else:
            words = [
                self.program("llama-quantize"), str(self.weights(model, "F32")), str(part), kind,
                str(os.cpu_count() or 1),
            ]  # fmt: skip
        try:
            run(words, self.folder / "convert.log", CONVERT_SECONDS, python=self.folder / "python")
            part.replace(made)
        finally:
            part.unlink(missing_ok=True)
        return made


def build(cache: Path, jobs: int) -> LlamaCpp:
    """llama.cpp, built where it is not yet.  cache: the user's folder; jobs: compilers at a time.

    Raises NotBuilt.
    """
    folder = cache / "llama.cpp" / VERSION
    built = LlamaCpp(folder, folder / f"build-{cpu_key()}" / "bin")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / ".lock"):
            _fetch_source(folder)
            _fetch_python(folder, CONVERSION, "sentencepiece")
            if not (built.programs.parent / "complete").exists():
                _compile(folder, built.programs.parent, jobs)
    except OSError as error:
        raise NotBuilt(f"{folder} cannot be used: {error}") from error
    return built


def cpu_key() -> str:
    """Eight hexadecimal digits for what the compilers know of this CPU."""
    about = platform.processor()
    with suppress(OSError):
        flags = re.search(r"^(?:flags|Features)\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        about = flags[1] if flags else about
    return hashlib.sha256(f"{platform.machine()} {about}".encode()).hexdigest()[:8]


def _fetch_source(folder: Path) -> None:
    source = folder / "source"
    if source.exists():
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix="source-") as part:
        wanted = Path(part) / "requirements.txt"
        wanted.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
        words = [
            *_pip("download"), "--no-deps", "--no-binary", ":all:", "--require-hashes",
            "--dest", part, "--requirement", str(wanted),
        ]  # fmt: skip
        run(words, folder / "download.log", DOWNLOAD_SECONDS)
        archives = list(Path(part).glob("*.tar.gz"))
        if len(archives) != 1:
            raise NotBuilt(f"pip fetched {len(archives)} archives of {REQUIREMENT}, not one")
        unpack(archives[0], Path(part) / "source")
        (Path(part) / "source").replace(source)


def unpack(archive: Path, target: Path) -> None:
    """Write llama.cpp's own files of a source package of llama-cpp-python.  Raises NotBuilt."""
    with tarfile.open(archive) as files:
        members = []
        for member in files.getmembers():
            parts = Path(member.name).parts
            if parts[1:3] == ("vendor", "llama.cpp") and len(parts) > 3:
                members.append(member.replace(name=str(Path(*parts[3:])), deep=False))
        if not members:
            raise NotBuilt(f"{archive.name} has no folder vendor/llama.cpp")
        files.extractall(target, members, filter="data")


def _fetch_python(folder: Path, packages: Sequence[str], module: str) -> None:
    """Install packages for the conversion or the build alone, outside of the environment of the project."""
    target = folder / "python"
    if (target / module).exists():
        return
    words = [*_pip("install"), "--no-deps", "--target", str(target), *packages]
    run(words, folder / "download.log", DOWNLOAD_SECONDS)


def _pip(command: str) -> list[str]:
    return [sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check"]


def _compile(folder: Path, target: Path, jobs: int) -> None:
    if shutil.which("cmake") is None:
        try:
            _fetch_python(folder, TOOLS, "cmake")
        except NotBuilt as error:
            raise NotBuilt(f"there is no cmake on this machine; {error}") from None
    log = folder / "build.log"
    if shutil.which("cmake") is None and not (folder / "python" / "bin" / "cmake").exists():
        raise NotBuilt("there is no cmake on this machine, and PyPI's did not install")
    configure = ["cmake", "-S", str(folder / "source"), "-B", str(target), *FLAGS]
    if not (target / "CMakeCache.txt").exists() and _has_ninja(folder):
        configure += ["-G", "Ninja"]
    print("llama.cpp is being built: minutes", file=sys.stderr)
    run(configure, log, CONVERT_SECONDS, python=folder / "python")
    words = ["cmake", "--build", str(target), "--parallel", str(jobs), "--target", *TARGETS]
    run(words, log, BUILD_SECONDS, python=folder / "python")
    if missing := [name for name in TARGETS if not (target / "bin" / name).exists()]:
        raise NotBuilt(f"the build made no {', '.join(missing)}")
    (target / "complete").touch()


def _has_ninja(folder: Path) -> bool:
    return shutil.which("ninja") is not None or (folder / "python" / "bin" / "ninja").exists()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time builds; another one waits, as long as a build may take.  Raises NotBuilt."""
    deadline = time.monotonic() + DOWNLOAD_SECONDS + BUILD_SECONDS
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise NotBuilt(f"another process has held {path} for too long") from None
                time.sleep(0.5)
        yield


def run(words: Sequence[str], log: Path, seconds: float, python: Path | None = None) -> None:
    """Run a command to its end, its output at a file's end, and end it with its children after `seconds`.

    python: a folder of packages and programs that it may use, after those of the environment.
    Raises NotBuilt with the last line of the output that tells why.
    """
    environment = dict(os.environ)
    if python is not None:
        environment["PATH"] = os.pathsep.join([environment.get("PATH", ""), str(python / "bin")])
        environment["PYTHONPATH"] = os.pathsep.join(
            [*filter(None, [environment.get("PYTHONPATH")]), str(python)]
        )
    name = next(Path(word).name for word in words if word not in (sys.executable, "-m"))
    with log.open("ab") as output:
        output.write(f"$ {shlex.join(words)}\n".encode())
        output.flush()
        begin = output.tell()
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,  # its children, compilers for instance, end with it
            )
        except FileNotFoundError:
            raise NotBuilt(f"there is no {name} on this machine") from None
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise NotBuilt(f"{name} did not end in {seconds:.0f} s; the log is {log}") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode != 0:
        said = log.read_bytes()[begin:].decode(errors="replace")
        raise NotBuilt(f"{name} failed: {fault_of(said)} (the log is {log})")


def fault_of(log: str) -> str:
    """The line of a log that tells the fault best: the first with "error" in it, else the last one.

    A line that ends with a colon goes on with the next three, as CMake's do.  A ninja's line of progress,
    "[1/219] Building error.cpp.o", tells none.
    """
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if not lines:
        return "it said nothing"
    faults = (
        number
        for number, line in enumerate(lines)
        if re.search(r"\berror\b", line, re.IGNORECASE) and not re.match(r"\[\d+/\d+\]", line)
    )
    first = next(faults, len(lines) - 1)
    fault = " ".join(lines[first : first + 4] if lines[first].endswith(":") else lines[first : first + 1])
    if any("connection broken by" in line for line in lines):  # pip, which then says that there is no package
        fault = f"pip cannot connect to its index; {fault}"
    return fault[:300]


def built(cache: Path, jobs: int) -> LlamaCpp | str:
    """What `build` makes, or the reason why there is nothing."""
    try:
        return build(cache, jobs)
    except (NotBuilt, ConfigError) as error:
        return str(error)
