"""Log lines for people or for machines, on standard error."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from node.runtime.console import harmless, one_line


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


class Handler(logging.StreamHandler[TextIO]):
    """Writes to a stream; the node works on if the stream fails (a full disk, no reader)."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore a failed write, unless the error is a bug."""
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


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
