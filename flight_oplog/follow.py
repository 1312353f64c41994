"""A topic as it grows: what is there from an offset on, in order, and then every commit as it lands.

A follower is nothing but an offset. It reads a run of entries, says which offset comes next, and waits for a commit
when there are no more; so it misses and repeats nothing, whatever happens between two runs, and holds nothing of the
log while it waits or while its client is slow.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import pyarrow as pa

from flight_oplog import codec
from flight_oplog.cache import ColumnCache
from flight_oplog.config import Config
from flight_oplog.errors import SHUTTING_DOWN, Cancelled, NotFound, OplogError, RequestError, TryAgain
from flight_oplog.oplog import OpLog
from flight_oplog.provider import topic_batches
from flight_oplog.schema import TOPIC_PATTERN
from flight_oplog.sql.engine import Engine
from flight_oplog.sql.stream import Stopped
from flight_oplog.store import Snapshot
from flight_oplog.topics import Topic

RUN_ENTRIES = 65_536
RUN_BYTES = 2_500_000
SAMPLE_FILES = 16
TAIL_BYTES = 32 << 20
# How often a waiting follower looks whether its client is still there, and all of them together for others' commits.
CHECK_SECONDS = 3.0
LOOK_SECONDS = 0.1

Place = int | str
"""Where to begin: an offset, "earliest" or "latest"."""


@dataclass(frozen=True)
class TopicRead:
    """What a plain Flight ticket asks for: `{"topic", "from", "follow", "columns", "where"}`, all but the first optional."""

    topic: str
    start: Place = "earliest"
    follow: bool = False
    columns: tuple[str, ...] | None = None
    where: str | None = None

    @classmethod
    def parse(cls, ticket: bytes) -> TopicRead:
        """Raises RequestError when the bytes are no such ticket, NotFound for a topic of the log's own."""
        try:
            body = json.loads(ticket)
            name, start, follow = body.pop("topic"), body.pop("from", "earliest"), body.pop("follow", False)
            columns, where = body.pop("columns", None), body.pop("where", None)
        except (ValueError, KeyError, AttributeError, RecursionError):
            raise RequestError(_FORM) from None
        fits = type(name) is str and TOPIC_PATTERN.fullmatch(name) and type(follow) is bool and not body
        named = columns is None or (type(columns) is list and columns and all(type(column) is str for column in columns))
        if not (fits and named and is_place(start) and (where is None or type(where) is str)):
            raise RequestError(_FORM)
        if name.startswith("_"):
            raise NotFound(f"topic {name!r} is the log's own; read it with SQL as log.{name}")
        return cls(name, start, follow, None if columns is None else tuple(columns), where)

    @property
    def sql(self) -> str | None:
        """The statement that each run of entries goes through; None when every entry is wanted."""
        if self.where is None:
            return None
        columns = "*" if self.columns is None else ", ".join(map(_quoted, self.columns))
        return f"SELECT {columns} FROM {_quoted(self.topic)}" + (f" WHERE ({self.where}\n)" if self.where is not None else "")


_FORM = (
    'the ticket is not of the form {"topic": name, "from": offset or "earliest" or "latest", "follow": true or false, '
    '"columns": [name, ...], "where": SQL condition}'
)


def is_place(start: object) -> bool:
    return start in ("earliest", "latest") or (type(start) is int and start >= 0)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


Seen: TypeAlias = Callable[[Snapshot], Snapshot]


@dataclass(frozen=True)
class Run:
    """Some entries, or what a statement made of them, and the offset that comes after them.

    `next_offset` is None for a batch whose run goes on with the next one: a consumer begins again before it.
    """

    batch: pa.RecordBatch
    next_offset: int | None


class Follower:
    """Reads topics in offset order. Thread-safe."""

    def __init__(self, oplog: OpLog, engine: Engine, config: Config) -> None:
        self._oplog = oplog
        self._engine = engine
        self._config = config
        self._tail = ColumnCache(TAIL_BYTES)
        self._waiting = 0
        self._is_over = False
        self._looking = threading.Condition()

    def end(self) -> None:
        """Let everybody go who has what there is: they would wait for as long as this server lasts."""
        self._is_over = True
        self._oplog.wake()

    def schema(self, request: TopicRead, snapshot: Snapshot, sql: str | None = None) -> pa.Schema:
        """Return what the batches of a read will look like; its entries pass through `sql`, or what the request says.

        Raises NotFound for an unknown topic, RequestError for unknown columns or a statement that cannot be followed.
        """
        topic, sql = snapshot.topic(request.topic), sql or request.sql
        return _selected(topic, request.columns) if sql is None else self._engine.prepare_run(sql, snapshot)[0].schema

    def _schema_now(self, request: TopicRead, snapshot: Snapshot, sql: str | None) -> pa.Schema | None:
        """Return what the batches look like by now, None when they cannot be made any more: the topic has begun anew."""
        try:
            return self.schema(request, snapshot, sql)
        except RequestError:
            return None

    def read(
        self, request: TopicRead, stopped: Stopped, sql: str | None = None, seen: Seen = lambda snapshot: snapshot
    ) -> tuple[pa.Schema, Iterator[Run]]:
        """Return the schema and the runs of a topic; `seen` gives of each snapshot what the reader may see by then.

        Raises what `schema` does, NotFound for an offset that is gone, RequestError for one that is not there yet.
        """
        snapshot = seen(self._oplog.snapshot())
        schema = self.schema(request, snapshot, sql)
        topic, start = request.topic, request.start
        found = snapshot.topic(topic)
        place = {"earliest": found.first_offset, "latest": found.next_offset}.get(start, start) if isinstance(start, str) else start
        assert isinstance(place, int)
        if place > found.next_offset:
            raise RequestError(f"topic {topic!r} ends at offset {found.next_offset}; offset {place} is not there yet")
        _check_there(found, place)
        runs = self._runs(snapshot, request, sql or request.sql, schema, place, stopped, seen)
        if request.follow and start == "latest":  # the place, before anything else: whoever is cut off now can come back to it
            runs = itertools.chain([Run(codec.empty(schema), place)], runs)
        return schema, runs

    def _runs(
        self, snapshot: Snapshot, request: TopicRead, sql: str | None, schema: pa.Schema, place: int, stopped: Stopped, seen: Seen
    ) -> Iterator[Run]:
        quiet_since, told = time.monotonic(), place
        topic, shown = request.topic, snapshot.topic(request.topic).schema
        while True:
            if snapshot.topic(topic).schema is not shown:
                shown = snapshot.topic(topic).schema
                if self._schema_now(request, snapshot, sql) != schema:
                    raise TryAgain(f"topic {topic!r}: its schema has changed; come back from offset {place}")
            for run in self._present(snapshot, request, sql, schema, place, stopped):
                place = place if run.next_offset is None else run.next_offset
                if run.batch.num_rows or run.next_offset is None or time.monotonic() - quiet_since > self._config.keep_alive_seconds:
                    yield run
                    quiet_since, told = time.monotonic(), place
            if not request.follow:
                if told != place:  # what came last was not for this reader: it need not be read again
                    yield Run(codec.empty(schema), place)
                return
            if time.monotonic() - quiet_since >= self._config.keep_alive_seconds:
                yield Run(codec.empty(schema), place)
                quiet_since = time.monotonic()
            snapshot = seen(self._newer(snapshot, topic, stopped))

    def _present(
        self, snapshot: Snapshot, request: TopicRead, sql: str | None, schema: pa.Schema, place: int, stopped: Stopped
    ) -> Iterator[Run]:
        """Yield the runs from `place` to the end of the snapshot."""
        topic = request.topic
        found = snapshot.topic(topic)
        _check_there(found, place)
        if place == found.next_offset:
            return
        if sql is None:
            # Who follows the end shares what is decoded there; who reads all of a topic must not drive that out.
            cache = self._tail if found.next_offset - place <= RUN_ENTRIES else None
            for batch in topic_batches(snapshot, found, place, self._config.message_bytes_max, stopped, schema.names, cache):
                place += batch.num_rows
                yield Run(batch, place)
            return
        step = _step(found)
        while place < found.next_offset:
            end = min(found.next_offset, place + step)
            running = self._engine.run(sql, snapshot, stopped, (place, end))
            batches = list(codec.gather(running.batches, self._config.message_bytes_max)) or [codec.empty(schema)]
            for batch in batches[:-1]:
                yield Run(batch, None)
            place = end
            yield Run(batches[-1], place)

    def _newer(self, snapshot: Snapshot, topic: str, stopped: Stopped) -> Snapshot:
        """Wait for entries after the snapshot's, or until a keep-alive may be due."""
        if self._is_over:
            raise TryAgain(SHUTTING_DOWN)
        before = snapshot.topic(topic).next_offset
        with self._looking:
            self._waiting += 1
            if self._waiting == 1:
                threading.Thread(target=self._look, name="follow", daemon=True).start()
        try:
            if stopped():
                raise Cancelled("the read was stopped")
            return self._oplog.wait_for(
                lambda newest: newest.topic(topic).next_offset > before or self._is_over or stopped(), CHECK_SECONDS
            )
        finally:
            with self._looking:
                self._waiting -= 1

    def _look(self) -> None:
        """Notice other processes' commits, for all that wait: this process's own need no looking."""
        while True:
            time.sleep(LOOK_SECONDS)
            with self._looking:
                if not self._waiting:
                    return
            with contextlib.suppress(OplogError):  # whoever reads next is told
                self._oplog.snapshot()


def _step(topic: Topic) -> int:
    """How many entries make a run: about as many bytes as travel well in one batch."""
    sample = topic.files[-SAMPLE_FILES:]
    entries = max(1, topic.next_offset - sample[0].first_offset)
    each = max(1, sum(file.size for file in sample) // entries)
    return max(1, min(RUN_ENTRIES, RUN_BYTES // each))


def _selected(topic: Topic, columns: Sequence[str] | None) -> pa.Schema:
    """Return the schema of some of a topic's columns, in the order asked for. Raises RequestError for what are none."""
    if columns is None:
        return topic.schema
    for place, name in enumerate(columns):
        if name not in topic.schema.names:
            raise RequestError(f"topic {topic.name!r} has no column {name[:200]!r}")
        if name in columns[:place]:
            raise RequestError(f"topic {topic.name!r}: column {name[:200]!r} is asked for twice")
    return pa.schema([topic.schema.field(name) for name in columns])


def _check_there(topic: Topic, place: int) -> None:
    if place < topic.first_offset:
        raise NotFound(f"topic {topic.name!r}: offset {place} has been removed; the first one left is {topic.first_offset}")


def words(run: Run) -> bytes:
    """Return the app_metadata of a batch."""
    return b"" if run.next_offset is None else json.dumps({"next_offset": run.next_offset}).encode()
