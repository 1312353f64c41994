"""Statements that take more memory than DataFusion counts are stopped.

Its limit of a statement's memory covers sorts, joins and most aggregates, and neither window functions, which keep whole
partitions, nor `array_agg`. So the process itself is watched while statements run: together they may grow it by twice
`statement_bytes_max` each and a little more. When they have, the youngest of those under which it grew by so much is stopped:
the others have seen the same, and more that was not its doing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flight_oplog.maps import resident

SLACK_BYTES = 256 << 20
# What a statement that was stopped held takes a moment to be given back.
BETWEEN_SECONDS = 0.5


def own_bytes() -> int:
    """Return the bytes of memory that are this process's alone, mapped files aside; 0 where the system does not tell."""
    return resident()[0]


@dataclass(eq=False)
class Watched:
    """A statement under way: when it began, and how large the process was."""

    watch: Watch
    bytes_before: int
    began: float = field(default_factory=time.monotonic)

    def is_to_stop(self) -> bool:
        """Whether the process has grown too large and this statement is the one to be stopped for it."""
        return self.watch.chosen() is self

    def stop(self) -> None:
        """Say that it is being stopped: no other is chosen until what it held had time to be given back."""
        self.watch.end(self, is_stopped=True)

    def end(self) -> None:
        self.watch.end(self)


class Watch:
    """All statements under way. Thread-safe."""

    def __init__(self, statement_bytes_max: int, own_bytes: Callable[[], int] = own_bytes) -> None:
        self._bytes_max = statement_bytes_max
        self._own_bytes = own_bytes
        self._lock = threading.Lock()
        self._running: set[Watched] = set()
        self._stopped = 0.0

    def begin(self) -> Watched:
        watched = Watched(self, self._own_bytes())
        with self._lock:
            self._running.add(watched)
        return watched

    def end(self, watched: Watched, is_stopped: bool = False) -> None:
        with self._lock:
            self._running.discard(watched)
            if is_stopped:
                self._stopped = time.monotonic()

    def chosen(self) -> Watched | None:
        """Return the statement to be stopped now, if there is one."""
        now = self._own_bytes()
        with self._lock:
            allowed = SLACK_BYTES + 2 * self._bytes_max * len(self._running)
            grown = [each for each in self._running if now - each.bytes_before > allowed]
            if not grown or time.monotonic() - self._stopped < BETWEEN_SECONDS:
                return None
            return max(grown, key=lambda each: each.began)
