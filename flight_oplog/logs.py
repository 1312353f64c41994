"""The server's log: what happened, in which call and for whom; a line for people, or a JSON object.

Nothing here is a secret: credentials, values of settings' files and entries are never logged. What a client chose, as a name,
cannot begin a line of its own.
"""

from __future__ import annotations

import contextvars
import datetime
import json
import logging
import sys
from dataclasses import dataclass


@dataclass(slots=True)
class Call:
    """What a line says of the call it is about."""

    request: str
    method: str
    principal: str | None = None


_CURRENT: contextvars.ContextVar[Call | None] = contextvars.ContextVar("call", default=None)


class during:
    """What is logged in the block, by this thread, is said to be of the call."""

    def __init__(self, call: Call) -> None:
        self._token = _CURRENT.set(call)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        _CURRENT.reset(self._token)


def begin(form: str) -> None:
    """Log to standard error, as "text" or as "json"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        call = _CURRENT.get()
        of_call = f" [{call.request} {call.method} {call.principal or '-'}]" if call else ""
        line = f"{self.formatTime(record)} {record.levelname} {record.name}{of_call}: {record.getMessage()}"
        if record.exc_info is None:
            return _on_one_line(line)
        # Indented, so that no text of an exception can pass for a line of its own.
        return "\n    ".join(map(_on_one_line, [line, *self.formatException(record.exc_info).split("\n")]))


def _on_one_line(text: str) -> str:
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        body: dict[str, object] = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (call := _CURRENT.get()) is not None:
            body |= {"request": call.request, "method": call.method, "principal": call.principal}
        body |= getattr(record, "fields", {})
        if record.exc_info is not None:
            body["exception"] = self.formatException(record.exc_info)
        return json.dumps(body, default=str)
