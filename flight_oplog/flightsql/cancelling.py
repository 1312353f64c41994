"""Statements under way by their tickets' ids, and those that were cancelled before they began."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from flight_oplog.errors import Cancelled
from flight_oplog.kept import remember

CANCELLED_KEPT = 10_000


class UnderWay:
    """Which statements run here, have ended, or are not to begin. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, list[threading.Event]] = {}
        self._cancelled: OrderedDict[str, None] = OrderedDict()
        self._ended: OrderedDict[str, None] = OrderedDict()

    @contextmanager
    def run(self, name: str) -> Iterator[threading.Event]:
        """Hold the place of a statement that runs; yield what is set when it is cancelled. Raises Cancelled when it was before."""
        with self._lock:
            if name in self._cancelled:
                raise Cancelled("the query was cancelled")
            event = threading.Event()
            self._running.setdefault(name, []).append(event)
        try:
            yield event
        finally:
            with self._lock:
                self._running[name].remove(event)
                if not self._running[name]:
                    del self._running[name]
                    remember(self._ended, name, None, CANCELLED_KEPT)

    def cancel(self, names: Sequence[str]) -> tuple[bool, bool]:
        """Stop statements; one that has not begun here will not begin. Return whether one ran, and whether one was never seen."""
        with self._lock:
            running = [event for name in names for event in self._running.get(name, ())]
            for event in running:
                event.set()
            unknown = [name for name in names if name not in self._running and name not in self._ended]
            for name in (*unknown, *(name for name in names if name in self._running)):
                remember(self._cancelled, name, None, CANCELLED_KEPT)
        return bool(running), bool(unknown)
