"""Plain TCP on a host of a lab, without Raceme.

python -m tests.netlab.tcp listen PORT              says "up", then the address of each dialler
python -m tests.netlab.tcp dial PORT FROM HOST...   says "connected" or the reason, for each host

FROM: the port to dial from, 0 for any.  All hosts are dialled at once.
"""

from __future__ import annotations

import socket
import sys
from concurrent.futures import ThreadPoolExecutor

DIAL_SECONDS = 1.0  # an answer takes milliseconds


def listen(port: int) -> None:
    """Take connections of both families, and keep them, until killed."""
    with socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        say("up")
        kept = []
        while True:
            connection, name = listener.accept()
            kept.append(connection)
            say(f"{name[0].removeprefix('::ffff:')} {name[1]}")


def dial(host: str, port: int, source_port: int) -> str:
    """The outcome, in words."""
    source = ("::" if ":" in host else "0.0.0.0", source_port)
    try:
        with socket.create_connection((host, port), DIAL_SECONDS, source):
            return "connected"
    except TimeoutError:
        return "timed out"
    except OSError as error:
        return "refused" if isinstance(error, ConnectionRefusedError) else str(error)


def say(text: str) -> None:
    """A line for the test."""
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "listen":
        listen(int(words[0]))
    else:
        port, source_port = int(words[0]), int(words[1])
        with ThreadPoolExecutor() as threads:
            for outcome in threads.map(lambda host: dial(host, port, source_port), words[2:]):
                say(outcome)
