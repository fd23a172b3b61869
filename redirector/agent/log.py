"""The agent's log: a line for each change, as text or as JSON."""

import json
import logging
import sys
import time
from enum import StrEnum
from typing import TextIO

#: The attribute of a log record that holds its fields.
_FIELDS = "fields"
LOG = logging.getLogger("redirector.agent")


class Format(StrEnum):
    """How a line looks."""

    TEXT = "text"
    JSON = "json"


class _Formatter(logging.Formatter):
    def __init__(self, shape: Format) -> None:
        super().__init__()
        self._shape = shape

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {
            "time": f"{stamp}.{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        if self._shape is Format.JSON:
            return json.dumps(fields, default=str)
        return " ".join(f"{key}={_quoted(str(value))}" for key, value in fields.items())


def _quoted(text: str) -> str:
    plain = text and not any(c in ' "=\\' or not c.isprintable() for c in text)
    return text if plain else json.dumps(text)


def set_up(style: Format, out: TextIO | None = None) -> None:
    """Send the log to `out`, by default standard error."""
    handler = logging.StreamHandler(out or sys.stderr)
    handler.setFormatter(_Formatter(style))
    LOG.handlers[:] = [handler]
    LOG.propagate = False
    LOG.setLevel(logging.INFO)


def say(level: int, message: str, **fields: object) -> None:
    """Write one line."""
    LOG.log(level, message, extra={_FIELDS: fields})
