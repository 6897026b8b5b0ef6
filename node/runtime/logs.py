"""Log lines for people or for machines, on standard error."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TextIO

from node.runtime.console import harmless, one_line
from tensor_codec.limits import Limits

USUAL = Limits()
WINDOW_SECONDS = 1.0
SHOWN_CHARACTERS = 100  # of the last line that was left out
_PEER_ID = re.compile(r"12D3KooW[1-9A-HJ-NP-Za-km-z]{44}")


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class TextLines(logging.Formatter):
    """The time and the message, in one line for any text of peers; the traceback follows."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line itself."""
        record.message = one_line(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # Any: as the library passes it
        """The traceback."""
        return harmless(super().formatException(ei))


@dataclass(slots=True)
class LineRate:
    """The lines that a log takes within a second, so that no peer fills a disk.

    Promises, checked by tests/unit/test_logs.py:
      * of one kind at most `most_per_peer` lines of one peer, and `most` of all peers;
      * lines that were left out are counted, and the count is said once when the second is over;
      * memory is bounded: a second knows no more peers than lines.
    """

    most_per_peer: int = USUAL.log_lines_per_peer_per_second
    most: int = USUAL.log_lines_per_second
    _began: float = -WINDOW_SECONDS
    _taken: dict[Hashable, int] = field(default_factory=dict)  # of each kind, and of each kind and peer
    _left_out: dict[Hashable, tuple[int, str]] = field(default_factory=dict)  # with the last line's text

    def over(self, now: float) -> list[tuple[int, str]]:
        """The counts of the second before, once it is over, each with the text of its last line."""
        if now - self._began < WINDOW_SECONDS:
            return []
        counts = list(self._left_out.values())
        self._began = now
        self._taken.clear()
        self._left_out.clear()
        return counts

    def takes(self, kind: Hashable, peer: str, text: Callable[[], str]) -> bool:
        """Whether one more line is written; else it is counted."""
        of_kind, of_peer = self._taken.get(kind, 0), self._taken.get((kind, peer), 0)
        if of_kind >= self.most or (peer and of_peer >= self.most_per_peer):
            self._left_out[kind] = self._left_out.get(kind, (0, ""))[0] + 1, text()
            return False
        self._taken[kind] = of_kind + 1
        self._taken[kind, peer] = of_peer + 1
        return True


class Handler(logging.StreamHandler[TextIO]):
    """Writes to a stream; the node works on if the stream fails (a full disk, no reader).

    Lines beyond a rate are left out and counted.  Lines of one place in the code are of one kind.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds, which never go back."""
        super().__init__(stream)
        self._clock = clock
        self._rate = LineRate()

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line, or count it.  The library holds the handler's lock meanwhile."""
        for count, last in self._rate.over(self._clock()):
            text = f"... {count} more like this: {last}"
            super().emit(logging.LogRecord(record.name, logging.WARNING, "", 0, "%s", (text,), None))
        kind = (record.pathname, record.lineno, record.levelno)
        if self._rate.takes(kind, _peer_of(record), lambda: _shown(record)):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore a failed write, unless the error is a bug."""
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


def _peer_of(record: logging.LogRecord) -> str:
    """The first peer id among the values of a line; "" if there is none."""
    values = record.args if isinstance(record.args, tuple) else ()
    found = (_PEER_ID.search(value) for value in values if isinstance(value, str))
    return next((match[0] for match in found if match is not None), "")


def _shown(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()[:SHOWN_CHARACTERS]
    except (TypeError, ValueError):  # as the library does with a format and values that do not fit
        return str(record.msg)[:SHOWN_CHARACTERS]


def set_up_logging(kind: str, level: int = logging.INFO) -> None:
    """Send our own log lines to standard error; of the libraries' lines only errors.

    kind: "text" or "json".
    """
    handler = Handler(sys.stderr)
    handler.setFormatter(JsonLines() if kind == "json" else TextLines())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.ERROR)
    for ours in ("raceme", "node", "client", "routing"):
        logging.getLogger(ours).setLevel(level)
