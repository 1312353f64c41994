"""What commands are answered with; and answers in hand, for which nothing has to be planned or run."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from flight_oplog.flightsql.caller import Caller
from flight_oplog.grants import Principal
from flight_oplog.kept import remember
from flight_oplog.sql.stream import Running
from flight_oplog.store import Snapshot

# Answers of up to so many bytes are kept in hand, and their tickets given out again for so many seconds.
IN_HAND_KEPT = 1000
IN_HAND_BYTES = 1 << 14
IN_HAND_SECONDS = 10.0


@dataclass(frozen=True)
class Planned:
    """The answer to a command: the exact schema of its result, and the ticket that fetches it.

    `at_once` gives the result where it is in hand: for this viewer, and without asking as long as this is the newest table_version.
    """

    schema: pa.Schema
    ticket: bytes
    viewer: Principal | None = None
    table_version: int = 0
    at_once: Callable[[], Running] | None = None


@dataclass(frozen=True)
class Result:
    """A result on its way: batches of exactly `schema`, none over `message_bytes_max`, some with app_metadata.

    `whole` is all of one that is in hand; then `batches` are none.
    """

    schema: pa.Schema
    batches: Iterator[tuple[pa.RecordBatch, bytes | None]]
    whole: pa.Table | None = None


class Answers:
    """Answers in hand, by the commands that asked for them and by their tickets. Thread-safe.

    A question that comes again, of a log that has not moved and by the same principal with the same rights, is given the
    ticket of before; so nobody can cancel it, as it is somebody else's too, and there is nothing to stop.
    """

    def __init__(self, ticket_seconds_max: float) -> None:
        self._seconds = ticket_seconds_max
        self._planned: OrderedDict[tuple[bytes, str | None], tuple[float, Planned]] = OrderedDict()
        self._tickets: OrderedDict[bytes, tuple[float, Planned]] = OrderedDict()

    def keep(self, command: bytes, caller: Caller, planned: Planned) -> None:
        """Keep an answer that is in hand."""
        now = time.monotonic()
        remember(self._planned, (command, caller.name), (now + min(IN_HAND_SECONDS, self._seconds / 10), planned), IN_HAND_KEPT)
        remember(self._tickets, planned.ticket, (now + self._seconds, planned), IN_HAND_KEPT)

    def planned(self, command: bytes, caller: Caller, newest: Callable[[], Snapshot]) -> Planned | None:
        """Return what a command was answered with, if that is still so."""
        until, planned = self._planned.get((command, caller.name), (0.0, None))
        if planned is None or caller.at is not None or time.monotonic() > until or planned.viewer != caller.principal:
            return None
        return planned if newest().table_version == planned.table_version else None

    def result(self, ticket: bytes, caller: Caller) -> Result | None:
        """Return the result that a ticket stands for, if it is in hand and the caller's."""
        until, planned = self._tickets.get(ticket, (0.0, None))
        if planned is None or planned.at_once is None or time.monotonic() > until or planned.viewer != caller.principal:
            return None
        return Result(planned.schema, iter(()), pa.Table.from_batches(planned.at_once().batches, planned.schema))

    def has(self, ticket: bytes) -> bool:
        """Whether a ticket's result is in hand."""
        return ticket in self._tickets
