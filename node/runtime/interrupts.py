"""Ctrl-C while a command starts: the imports take seconds, and nothing needs a cleanup yet.

Imports almost nothing, so that it is in force early.
"""

from __future__ import annotations

import os
import signal
import sys
import threading


def end_at_once_on_interrupt() -> None:
    """Until `let_interrupts_through` Ctrl-C ends the process with code 130, without a word.

    A KeyboardInterrupt in the middle of an import may come out as any other error.  If the signal has a
    handler already (a shell ignores it for background commands) nothing changes.
    """
    ours = threading.current_thread() is threading.main_thread()
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)


def let_interrupts_through() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt again, where it ended the process at once."""
    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def is_command(package: str) -> bool:
    """Whether `python -m package` is starting: Python imports the package, then its __main__."""
    words = sys.orig_argv
    return sys.argv[:1] == ["-m"] and "-m" in words and words[words.index("-m") + 1 :][:1] == [package]


def _end_at_once(signum: int, frame: object) -> None:
    os._exit(128 + signum)
