"""The health check of a container: 0 where its process does its work, 1 with one line where it does not.

A gateway is asked at /health.  A node or a bootstrap node has written its ready file since it started.  The
port and the file are those of the process's own command line, environment and configuration.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

ANSWER_SECONDS = 5.0
MAIN_PROCESS = 1


def main(process: int = MAIN_PROCESS) -> int:
    """Check the container's first process; the exit code."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
        fault = fault_of(words, process)
    except (OSError, ValueError) as error:
        fault = str(error)
    if fault:
        print(fault)
    return 1 if fault else 0


def fault_of(words: Sequence[str], process: int) -> str:
    """What is wrong with a process that was started with these words; empty: nothing."""
    found = [word for word in words if word]
    program, *rest = (
        found[found.index("-m") + 1 :] if "-m" in found[:-1] else found[:1] or ["a process that ended"]
    )
    if program not in ("node", "client"):
        return f"{program} is no program of Raceme"
    from node.runtime.arguments import one_address_each

    parsers = {
        parser.command: parser
        for each in importlib.import_module(f"{program}.__main__").parsers()
        for parser in each.commands()
    }
    command = (program, *rest[:1]) if (program, *rest[:1]) in parsers else (program,)
    if command not in parsers:
        return ""  # a client that ends by itself
    flags: argparse.Namespace = parsers[command].parse_args(one_address_each(rest[len(command) - 1 :]))
    if command == ("client", "gateway"):
        return _gateway_fault(flags.host, flags.port)
    ready_file: Path | None = getattr(flags, "ready_file", None)
    return "" if ready_file is None else _node_fault(ready_file, process)


def _gateway_fault(host: str, port: int) -> str:
    host = {"0.0.0.0": "127.0.0.1", "localhost": "127.0.0.1", "::": "::1"}.get(
        host.strip("[]"), host.strip("[]")
    )
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/health"
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:
            return "" if answer.status == 200 else f"{url} answers {answer.status}"
    except (urllib.error.URLError, OSError) as error:
        return f"{url}: {error}"


def _node_fault(ready_file: Path, process: int) -> str:
    import psutil

    try:
        written = os.stat(ready_file).st_mtime
    except OSError as error:
        return f"{ready_file}: {error.strerror}: not ready yet"
    # The clock of /proc counts hundredths of a second.
    if written + 0.1 < psutil.Process(process).create_time():
        return f"{ready_file} is from an earlier run: not ready yet"
    return ""


if __name__ == "__main__":
    sys.exit(main())
