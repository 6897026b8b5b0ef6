"""Log lines for people or for machines, on standard error."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime


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
        return json.dumps(fields, ensure_ascii=False)


def set_up_logging(kind: str, level: int = logging.INFO) -> None:
    """Send our own log lines to standard error; of the libraries' only what is serious.

    kind: "text" or "json".
    """
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonLines() if kind == "json" else text)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.ERROR)
    for ours in ("raceme", "node", "client", "routing"):
        logging.getLogger(ours).setLevel(level)
