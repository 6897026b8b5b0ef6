"""The input, output and end of a command line, for any streams, locale and text.

Python's own standard streams are None if they were closed.  They refuse characters that their encoding
lacks, and they raise again at the interpreter's end if they could not write.  Only this module handles
these cases.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, TextIO

from node.config import ConfigError
from node.runtime.interrupts import end_at_once_on_interrupt
from node.runtime.settings.origins import with_origins

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))  # by their file descriptors
INTERRUPTED = 130
MAX_CHARACTERS = 1 << 25  # of a prompt: longer than any model's
ERRORS = "raceme"  # the name of the handler for characters that an encoding lacks
_ASCII = {"…": "..."}
_PLAIN = re.compile(r"[\x20-\x7e\n\t]*")
_DIRECTIONS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


class OutputError(Exception):
    """Standard output takes no more."""


class NobodyReads(OutputError):
    """The reader of standard output has gone: that is no error."""


def run_command(command: Callable[[], int]) -> int:
    """Run a command; the exit code: its own, 2 for an error that the operator must fix, 130 after Ctrl-C.

    An output without a reader counts as success.  Raises SystemExit of argparse, and bugs.
    """
    prepare_streams()
    try:
        try:
            code = command()
        except SystemExit:  # argparse has printed its message
            flush()
            raise
        flush()
        return code
    except NobodyReads:
        return 0
    except (ConfigError, OutputError) as error:
        return fail(error, 2)
    except OSError as error:  # a full disk, too many open files: the machine's fault, and so the operator's
        where = f": {error.filename}" if error.filename is not None else ""
        return fail(f"{error.strerror or error}{where}", 2)
    except KeyboardInterrupt:
        return INTERRUPTED


def fail(error: Exception | str, code: int) -> int:
    """Say an error in one line, with the file or variable that a setting in it came from; `code`."""
    with suppress(OutputError):
        flush()
    say("error: " + one_line(with_origins(str(error)) or type(error).__name__))
    return code


def run_process(main: Callable[[], int]) -> NoReturn:
    """Run the process of a command: end with the code of `main`, also in the middle of an import.

    A thread that still imports torch, downloads or waits for a line is abandoned: the interpreter would
    wait for it, or remove its modules under it.
    """
    end_at_once_on_interrupt()
    _be_somewhere()
    code: int | str | None = 1
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            _discard(number)
    busy = any(thread.name == "torch" for thread in threading.enumerate())
    if code == INTERRUPTED and sys.stderr.isatty():
        with suppress(OSError):
            sys.stderr.write("\x1b[?25h")  # an abandoned progress bar has hidden the cursor
            sys.stderr.flush()
    if isinstance(code, int) and (busy or code == INTERRUPTED):
        os._exit(code)
    sys.exit(code)


def _be_somewhere() -> None:
    """Leave a working folder that was removed: oneMKL would end the process over it."""
    try:
        os.getcwd()
    except OSError:
        os.chdir("/")
        os.environ["PWD"] = "/"


def prepare_streams() -> None:
    """Make the standard streams usable in any environment of the process.

    A closed stream reads as empty and takes all text.  Its descriptor is taken, so that no socket gets the
    descriptor and the printed text.  A character outside the encoding is written as \\xe9 or \\U0001f600.
    Bytes that are no text are read as lone surrogates, for `read_text` to judge, and written unchanged.
    """
    for name, mode in _STREAMS:
        if getattr(sys, name) is None:
            # Descriptors are given out from the lowest: 0, 1 and 2 in this order.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  for good
    for name, mode in _STREAMS:
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if mode == "r" else ERRORS)


def _what_cannot_be_said(error: UnicodeError) -> tuple[str | bytes, int]:
    """The escape of one character that the encoding lacks, for `codecs.register_error`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if _has_bytes(character):
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return _ASCII.get(character) or _escaped(character), error.start + 1


codecs.register_error(ERRORS, _what_cannot_be_said)


def put(text: str) -> None:
    """Write to standard output, as it is, and at once.  Raises OutputError."""
    try:
        sys.stdout.write(text)
    except OSError as error:
        raise _gone(error) from None
    flush()


def put_line(text: str) -> None:
    """`put` with an end of line, and harmless on a terminal."""
    put(text_for(sys.stdout, text) + "\n")


def flush() -> None:
    """Flush standard output.  Raises OutputError."""
    try:
        sys.stdout.flush()
    except OSError as error:
        raise _gone(error) from None


def say(text: str) -> None:
    """Write a line to standard error, harmless on a terminal; an error there is dropped."""
    with suppress(OSError):
        sys.stderr.write(text_for(sys.stderr, text) + "\n")
        sys.stderr.flush()


def text_for(stream: TextIO, text: str) -> str:
    """The text, harmless where it is shown to people; a file or a pipe gets it exactly."""
    return harmless(text) if stream.isatty() else text


def harmless(text: str) -> str:
    """Escape the characters that a terminal would act on, as Python writes them: \\x1b.

    These are the control characters except end of line and tab, the marks that change the direction of
    writing (CVE-2021-42574), the separators of lines, and lone surrogates.
    """
    if _PLAIN.fullmatch(text):
        return text
    return "".join(_escaped(each) if _acts(each) else each for each in text)


def one_line(text: str) -> str:
    """`harmless`, and ends of line and tabs written likewise."""
    return harmless(text).replace("\n", "\\n").replace("\t", "\\t")


def _acts(character: str) -> bool:
    return character not in "\n\t" and (
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(character) in _DIRECTIONS
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def argument_text(word: str, what: str) -> str:
    """The text of a command-line argument, whose bytes are UTF-8 where the locale knows no better.

    Raises ValueError for bytes that are none.
    """
    return _as_utf8(word, os.fsencode(word), what) if _has_bytes(word) else word


def read_text(what: str, read: Callable[[int], str] | None = None) -> str:
    """The text of standard input, or the part that `read` takes, as `argument_text`.

    read: called with the largest number of characters.  Raises ValueError for more, and for bytes that are
    no text.
    """
    stream = sys.stdin
    try:
        text = (read or stream.read)(MAX_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not {stream.encoding}: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise ConfigError(f"cannot read standard input: {error.strerror}") from None
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{what} has more than {MAX_CHARACTERS} characters")
    if not _has_bytes(text):
        return text
    return _as_utf8(text, text.encode(stream.encoding, "surrogateescape"), what)


def _has_bytes(text: str) -> bool:
    return any("\udc80" <= each <= "\udcff" for each in text)


def _as_utf8(text: str, content: bytes, what: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise ValueError(f"{what} is not UTF-8: byte {error.start + 1} is 0x{byte:02x}") from None


def _gone(error: OSError) -> OutputError:
    _discard(1)
    if isinstance(error, BrokenPipeError):
        return NobodyReads("nobody reads standard output")
    return OutputError(f"cannot write to standard output: {error.strerror}")


def _discard(number: int) -> None:
    """Drop the bytes buffered for this descriptor: the interpreter's end would write them again."""
    stream = (sys.stdin, sys.stdout, sys.stderr)[number]
    with suppress(OSError, ValueError):  # a stand-in may have no descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


class QuietText(io.TextIOBase):
    """A stream that drops text that it cannot write: for progress bars and notes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a property of the library's too
        """The encoding of the stream."""
        return self._stream.encoding or "utf-8"

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Its descriptor."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write the text if it can be written."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        with suppress(OSError):
            self._stream.flush()

    def close(self) -> None:
        """Leave the stream to its opener: Python 3.13 reports a flush that fails at the end."""


class OutputText(QuietText):
    """Standard output for rich: a failed write raises OutputError."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)  # this stream, even while a live table replaces it

    def write(self, text: str) -> int:
        """Write it.  Raises OutputError."""
        try:
            return self._stream.write(text)
        except OSError as error:
            raise _gone(error) from None

    def flush(self) -> None:
        """Send it on.  Raises OutputError."""
        try:
            self._stream.flush()
        except OSError as error:
            raise _gone(error) from None
