"""Whose turn it is: how many statements run at once, and how the next ones wait."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import pyarrow as pa

from flight_oplog.errors import Cancelled, TryAgain
from flight_oplog.shares import Shares
from flight_oplog.sql.stream import Stopped

# A statement whose client has not read for so long gives its turn to one that waits.
IDLE_SECONDS = 2


class Turns:
    """How many statements run at once. The next ones wait their turn, so many and so long; whoever comes after is refused.

    Slots are shared out (`Shares`); the last eighth of the places to wait in is for principals who have nothing here, too.
    """

    def __init__(self, slots: int, waiting_max: int, seconds: float) -> None:
        self._slots, self._waiting_max, self._seconds = slots, waiting_max, seconds
        self._taken = Shares(slots)
        self._turns: set[Turn] = set()
        self._waiting: dict[object, str | None] = {}  # the principals of those that wait, in the order they came
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def turn(self, stopped: Stopped, principal: str | None = None) -> Iterator[Turn]:
        """Hold a slot for a principal's statement. Raises TryAgain when none comes free in time, Cancelled when the caller gives up."""
        ticket = object()
        deadline = time.monotonic() + self._seconds
        with self._changed:
            self._end_idle()
            places = self._waiting_max - (self._waiting_max // 8 if self._is_known(principal) else 0)
            if not self._taken.is_free(principal) and len(self._waiting) >= places:
                raise TryAgain(f"statements_max ({self._slots}) statements run and {len(self._waiting)} wait; nothing was done; try again")
            self._waiting[ticket] = principal
            try:
                while not self._taken.is_free(principal) or not self._is_first(ticket):
                    if stopped():
                        raise Cancelled("the statement was stopped before its turn came")
                    if time.monotonic() > deadline:
                        raise TryAgain(
                            f"statements_max ({self._slots}) statements have run for {self._seconds} seconds; nothing was done; try again"
                        )
                    self._changed.wait(0.1)
                    self._end_idle()
                self._taken.take(principal)
                turn = Turn(lambda: self._free(principal))
                self._turns.add(turn)
            finally:
                del self._waiting[ticket]
                self._changed.notify_all()
        try:
            yield turn
        finally:
            with self._changed:
                self._turns.discard(turn)
            turn.end()

    def _is_known(self, principal: str | None) -> bool:
        """Whether a principal has a slot already, or waits for one."""
        return principal is not None and (self._taken.has(principal) or principal in self._waiting.values())

    def _is_first(self, ticket: object) -> bool:
        """Whether nobody who could go waits before this one."""
        return next(each for each, principal in self._waiting.items() if each is ticket or self._taken.is_free(principal)) is ticket

    def _end_idle(self) -> None:
        if self._taken.all >= self._slots - self._slots // 8:
            for turn in list(self._turns):
                turn.end_if_idle(time.monotonic() - IDLE_SECONDS)

    def _free(self, principal: str | None) -> None:
        with self._changed:
            self._taken.give(principal)
            self._changed.notify_all()


class Turn:
    """One statement's slot, given back when it ends, or when its client has not asked for the next batch for a while."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back = give_back
        self._lock = threading.Lock()
        self._awaited: float | None = None
        self._over = False

    def is_awaited(self) -> None:
        self._awaited = time.monotonic()

    def is_used(self) -> None:
        self._awaited = None

    def end_if_idle(self, before: float) -> None:
        awaited = self._awaited
        if awaited is not None and awaited < before:
            self.end()

    def end(self) -> None:
        with self._lock:
            is_first, self._over = not self._over, True
        if is_first:
            self._give_back()


class Held:
    """Batches that hold something until they end, or until nobody wants them any more.

    While a client does not read, its statement's turn is over: little is computed ahead of it, and others may go on.
    """

    def __init__(self, batches: Iterator[pa.RecordBatch], held: contextlib.ExitStack, turn: Turn) -> None:
        self._batches = batches
        self._held = held
        self._turn = turn
        turn.is_awaited()

    def __iter__(self) -> Held:
        return self

    def __next__(self) -> tuple[pa.RecordBatch, bytes | None]:
        self._turn.is_used()
        try:
            batch = next(self._batches)
        except BaseException:
            self.close()
            raise
        self._turn.is_awaited()
        return batch, None

    def close(self) -> None:
        self._batches = iter(())
        self._held.close()

    def __del__(self) -> None:
        self.close()
