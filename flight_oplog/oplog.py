"""The log, usable in process without a server: append, snapshot, topics, verify, close.

Threads. Any number of threads append. Each append gathers its batches in an `AppendWriter`: what fits in one record
stays in memory, the rest is encoded and written to a data file of its own that nobody sees yet. Closing it hands the
append to the one committer thread, which takes everything that waits, numbers it, and makes one Delta commit of it.
While that commit is on its way the next group gathers: a quiet log answers at once, a busy one makes bigger commits.

An append is whole or nothing: an error before its receipt means that none of its entries will ever be visible, except
OutcomeUnknown, which says so.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pyarrow as pa

from flight_oplog import codec
from flight_oplog.config import Config
from flight_oplog.datafile import Record, RecordMeta, StagedFile
from flight_oplog.errors import CorruptLog, OplogError, OutcomeUnknown, RequestError, SchemaMismatch, TooLarge, TryAgain
from flight_oplog.schema import SCHEMAS_SCHEMA, SCHEMAS_TOPIC, check_topic, evolve, first_time, normal_schema, schema_id
from flight_oplog.store import Conflict, Snapshot, Store, Topic

log = logging.getLogger("flight_oplog.oplog")

CONFLICTS_MAX = 50
SPILLS_UNDER_WAY = 2
NORMALS_KEPT = 256
_CLOSED = "the log is closed; nothing was written; try again when the server is back"

Appendable: TypeAlias = pa.RecordBatch | pa.Table | pa.RecordBatchReader


@dataclass(frozen=True, slots=True)
class Receipt:
    """What an append returns once it is durable and visible: its run is [first_offset, first_offset + entries)."""

    topic: str
    first_offset: int
    entries: int
    table_version: int


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding of `verify`: `severity` is "error" for damage, "note" for what is known and harmless."""

    severity: str
    where: str
    what: str


class OpLog:
    """An open log. Thread-safe. Close it, or use it as a context manager, so that waiting appends are committed."""

    def __init__(self, store: Store, config: Config) -> None:
        self.config = config
        self._store = store
        self._memory = _Budget(config.queue_bytes_max)
        self._encoders = ThreadPoolExecutor(max(2, os.cpu_count() or 1), "encoder")
        self._writers = ThreadPoolExecutor(max(4, os.cpu_count() or 1), "writer")
        self._committer = _Committer(store, config)
        self._normals: dict[bytes, tuple[pa.Schema, str]] = {}

    @classmethod
    def open(cls, uri: str, config: Config | None = None) -> OpLog:
        """Open the log in a folder (a path or file:// URI), creating it when the folder is missing or empty.

        Raises NotALog when the folder holds something else or a newer format_version.
        """
        return cls(Store.open(uri), config or Config(data=uri))

    def append(self, topic: str, entries: Appendable) -> Receipt:
        """Append all of `entries` as one append and return its receipt: durable, whole, visible to the next snapshot.

        Raises RequestError, SchemaMismatch or TooLarge when the entries must change, TryAgain when the storage
        refused; in each case nothing was written.
        """
        writer = self.writer(topic, entries.schema)
        try:
            for batch in entries.to_batches() if isinstance(entries, pa.Table) else _batches(entries):
                writer.write(batch)
            return writer.commit()
        finally:
            writer.abandon()

    def writer(self, topic: str, schema: pa.Schema) -> AppendWriter:
        """Begin an append whose batches come one by one. Raises before anything is sent when the schema cannot be."""
        check_topic(topic)
        normal, fingerprint = self._normal(schema)
        snapshot = self._store.snapshot()
        current = snapshot.topics.get(topic)
        if current is None:
            check_room(topic, sum(not name.startswith("_") for name in snapshot.topics), self.config)
        merge(topic, current, None, normal, fingerprint, self.config)
        event_time = current.event_time if current else None
        return AppendWriter(self, topic, normal, fingerprint, event_time or first_time(normal))

    def _normal(self, schema: pa.Schema) -> tuple[pa.Schema, str]:
        """Return the normal form of a schema and its schema_id. Producers send the same few over and over."""
        key = schema.serialize().to_pybytes()
        found = self._normals.get(key)
        if found is None:
            normal = normal_schema(schema, self.config.columns_max)
            found = normal, schema_id(normal)
            if len(self._normals) >= NORMALS_KEPT:
                self._normals.clear()
            self._normals[key] = found
        return found

    def snapshot(self) -> Snapshot:
        """Return the log as of the newest commit, this process's or another's."""
        return self._store.snapshot()

    def snapshot_at(self, table_version: int) -> Snapshot:
        """Return the log as of an earlier commit. Raises NotFound when it cannot be read any more."""
        return self._store.snapshot_at(table_version)

    def topics(self) -> list[Topic]:
        """Return the topics of the newest snapshot, by name; the log's own begin with _."""
        return sorted(self.snapshot().topics.values(), key=lambda topic: topic.name)

    def verify(self) -> list[Problem]:
        """Read everything and return what is wrong; an empty list means every byte is as it was acknowledged."""
        snapshot = self._store.refresh()
        problems = [problem for topic in snapshot.topics.values() for problem in _verify_topic(snapshot, topic)]
        for version in self._store.damaged_commits():
            problems.append(Problem("error", f"table_version {version}", "its commit file is damaged; restore it"))
        # A file that is staged right now looks like an orphan; it is a note, not damage, either way.
        problems += [
            Problem("note", path, "no commit names this data file: left by a crash, or being written right now")
            for path in self._store.orphans()
        ]
        return problems

    def close(self) -> None:
        """Commit what waits, then stop. Appends after this raise TryAgain."""
        self._committer.stop()
        self._encoders.shutdown()
        self._writers.shutdown()
        self._store.close()

    def __enter__(self) -> OpLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def check_room(topic: str, topics: int, config: Config) -> None:
    """Raise TooLarge when a log of `topics` topics has no room for one more."""
    if topics >= config.topics_max:
        raise TooLarge(f"topic {topic!r} would be one more than topics_max ({config.topics_max}); nothing was written")


def merge(topic: str, known: Topic | None, current: pa.Schema | None, incoming: pa.Schema, fingerprint: str, config: Config) -> pa.Schema:
    """Return the topic's schema after an append; `current` is it so far when it differs from the snapshot's.

    Raises SchemaMismatch naming the column, both types and the rule.
    """
    if current is None and known is not None:
        if config.schema_rule == "additive" and fingerprint in known.schemas:
            return known.schema
        current = known.schema
    return evolve(topic, current, incoming, config.schema_rule, config.columns_max)


def _batches(entries: pa.RecordBatch | pa.RecordBatchReader) -> Iterable[pa.RecordBatch]:
    return [entries] if isinstance(entries, pa.RecordBatch) else entries


class AppendWriter:
    """One append under way: `write` its batches, then `commit` or `abandon` it. For one thread."""

    def __init__(self, oplog: OpLog, topic: str, schema: pa.Schema, fingerprint: str, event_time: str | None) -> None:
        self.topic = topic
        self._event_time = event_time
        self._oplog = oplog
        self._config = oplog.config
        self._schema = schema
        self._schema_id = fingerprint
        self._started = datetime.datetime.now(datetime.UTC)
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_bytes = self._waiting_entries = self._reserved = 0
        self._bytes = self._entries = 0
        self._staged: StagedFile | None = None
        self._spilling: deque[Future[None]] = deque()
        self._owned = True

    def write(self, batch: pa.RecordBatch) -> None:
        """Take one batch. Raises RequestError or TooLarge for a batch that cannot be stored; abandon the append then."""
        try:
            # Before anything else looks at the batch: even its size is read through offsets that a client made up.
            batch.validate(full=True)
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise RequestError(f"topic {self.topic!r}: a batch is not valid Arrow data ({_line(error)}); nothing was written") from error
        if batch.nbytes > self._config.batch_bytes_max:
            raise TooLarge(
                f"topic {self.topic!r}: a batch of {batch.nbytes} bytes is over batch_bytes_max ({self._config.batch_bytes_max}); "
                "send smaller batches; nothing was written"
            )
        self._bytes += batch.nbytes
        if self._bytes > self._config.append_bytes_max:
            raise TooLarge(
                f"topic {self.topic!r}: the append is over append_bytes_max ({self._config.append_bytes_max}); "
                "send it as several; nothing was written"
            )
        try:
            plain = codec.conform(batch, self._schema)
        except pa.ArrowException as error:
            raise RequestError(f"topic {self.topic!r}: a batch cannot be stored ({_line(error)}); nothing was written") from error
        for piece in codec.cut(plain, self._config.record_bytes_max, self._config.record_entries_max):
            self._take(piece)

    def _take(self, piece: pa.RecordBatch) -> None:
        full = self._waiting_bytes + piece.nbytes > self._config.record_bytes_max
        if self._waiting and (full or self._waiting_entries + piece.num_rows > self._config.record_entries_max):
            self._spill()
        if not self._oplog._memory.take(piece.nbytes):
            # Memory is used up by other appends: this one holds none and goes on through the disk.
            self._waiting.append(piece)
            self._waiting_entries += piece.num_rows
            self._spill()
            return
        self._reserved += piece.nbytes
        self._waiting.append(piece)
        self._waiting_bytes += piece.nbytes
        self._waiting_entries += piece.num_rows

    def _spill(self) -> None:
        """Hand the waiting batches on, to become one record of this append's own data file.

        Records are encoded side by side and written in order, while the next batches are received. Two are under way
        at most; an error comes up at a later spill or at the end.
        """
        while len(self._spilling) >= SPILLS_UNDER_WAY:
            self._spilling.popleft().result()
        if self._staged is None:
            self._staged = self._oplog._store.stage(self.topic)
        try:
            record = self._oplog._encoders.submit(self._encode, self._waiting, self._waiting_entries)
            before = self._spilling[-1] if self._spilling else None
            self._spilling.append(self._oplog._writers.submit(self._add, self._staged, before, record, self._reserved))
        except RuntimeError:
            raise TryAgain(_CLOSED) from None
        self._entries += self._waiting_entries
        self._waiting, self._waiting_bytes, self._waiting_entries, self._reserved = [], 0, 0, 0

    def _encode(self, batches: list[pa.RecordBatch], entries: int) -> Record:
        owner = {"entries": entries, "timestamp": self._started}
        return make_record(batches, self._schema, self._schema_id, [owner], self._event_time, self._config.compression)

    def _add(self, staged: StagedFile, before: Future[None] | None, record: Future[Record], reserved: int) -> None:
        """Write a record after the one before it. Waits only for earlier work, so the pools cannot lock each other."""
        try:
            encoded = record.result()
            if before is not None:
                before.result()
            staged.add(encoded)
        finally:
            self._oplog._memory.give_back(reserved)

    def _settle(self) -> None:
        """Wait until nothing is being written; raise what went wrong with it."""
        while self._spilling:
            self._spilling.popleft().result()

    def _release(self) -> None:
        self._oplog._memory.give_back(self._reserved)
        self._waiting, self._waiting_bytes, self._waiting_entries, self._reserved = [], 0, 0, 0

    def commit(self) -> Receipt:
        """Make the append durable and visible, whole, and return its receipt. Blocks until then."""
        if self._staged is not None and self._waiting:
            self._spill()
        self._settle()
        append = _Append(self.topic, self._schema, self._schema_id, self._event_time, self._started, self._waiting, self._staged)
        append.entries = self._entries + self._waiting_entries
        self._owned = False
        try:
            return self._oplog._committer.submit(append).result()
        finally:
            self._release()

    def abandon(self) -> None:
        """Drop the append if it was not handed to the committer. Safe to call at any time, any number of times."""
        if self._owned:
            self._owned = False
            self._release()
            wait(self._spilling)  # the append is dropped, whatever became of it
            if self._staged is not None:
                self._staged.abandon()


@dataclass(slots=True, eq=False)
class _Append:
    """An append handed to the committer: small ones as batches in memory, long ones as a staged file."""

    topic: str
    schema: pa.Schema
    schema_id: str
    event_time: str | None
    started: datetime.datetime
    batches: list[pa.RecordBatch]
    staged: StagedFile | None
    entries: int = 0
    receipt: Future[Receipt] = field(default_factory=Future)

    @property
    def nbytes(self) -> int:
        return sum(batch.nbytes for batch in self.batches)

    def bounds(self) -> list[codec.Bounds]:
        return self.staged.bounds if self.staged is not None else [codec.bounds(self.batches, self.schema)]


class _Committer:
    """The one thread that commits. Strategy at the top of this module."""

    def __init__(self, store: Store, config: Config) -> None:
        self._store = store
        self._config = config
        self._queue: queue.SimpleQueue[_Append | None] = queue.SimpleQueue()
        self._gate = threading.Lock()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
        self._thread.start()

    def submit(self, append: _Append) -> Future[Receipt]:
        with self._gate:
            if self._stopped:
                if append.staged is not None:
                    append.staged.abandon()
                raise TryAgain(_CLOSED)
            self._queue.put(append)
        return append.receipt

    def stop(self) -> None:
        with self._gate:
            if not self._stopped:
                self._stopped = True
                self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        open_ = True
        while open_:
            group = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    group.append(self._queue.get_nowait())
            open_ = None not in group
            appends = [append for append in group if append is not None]
            if appends:
                self._commit_group(appends)

    def _commit_group(self, appends: list[_Append]) -> None:
        """Give every append of the group its receipt or its error; never raises."""
        try:
            for _ in range(CONFLICTS_MAX):
                try:
                    self._try_commit(appends)
                    return
                except Conflict:
                    self._store.refresh()
            raise TryAgain(f"other servers committed first {CONFLICTS_MAX} times; nothing was written; try again")
        except BaseException as error:
            if not isinstance(error, OplogError):
                log.exception("committing a group of %d appends", len(appends))
                error = TryAgain("the commit failed, see the server's log; nothing was written; try again")
            for append in appends:
                if not append.receipt.done():
                    if append.staged is not None and not isinstance(error, OutcomeUnknown):
                        append.staged.abandon()
                    append.receipt.set_exception(error)

    def _try_commit(self, appends: list[_Append]) -> None:
        """Number the appends after the newest snapshot and commit them as its next version."""
        group = _Group(self._store, self._config)
        try:
            for append in appends:
                if not append.receipt.done():
                    group.place(append)
            staged = group.finish()
            version = group.base.table_version
            if staged:
                numbers = {f"topic/{topic}": offset for topic, offset in group.next_offsets.items()}
                version = self._store.commit(group.base, staged, numbers)
        except BaseException as error:
            if not isinstance(error, OutcomeUnknown):
                group.abandon()
            raise
        for append, first_offset in group.placed:
            append.receipt.set_result(Receipt(append.topic, first_offset, append.entries, version))


class _Group:
    """Appends that share a commit, numbered from one snapshot. Built again from scratch after a conflict."""

    def __init__(self, store: Store, config: Config) -> None:
        self.base = store.snapshot()
        self.placed: list[tuple[_Append, int]] = []
        self.next_offsets: dict[str, int] = {}
        self._store = store
        self._config = config
        self._schemas: dict[str, pa.Schema] = {}
        self._event_times: dict[str, str | None] = {}
        self._new_schemas: dict[tuple[str, str], pa.Schema] = {}
        self._gathering: dict[str, list[_Append]] = {}
        self._files: list[tuple[StagedFile, int]] = []
        self._ours: list[StagedFile] = []

    def place(self, append: _Append) -> None:
        """Give the append its offsets, or its receipt the error that its schema earns."""
        topic = append.topic
        known = self.base.topics.get(topic)
        current = self._schemas.get(topic) or (known.schema if known else None)
        event_time = self._event_times.get(topic) or (known.event_time if known else None) or first_time(append.schema)
        try:
            if current is None:
                check_room(topic, sum(not name.startswith("_") for name in {*self.base.topics, *self._schemas}), self._config)
            merged = merge(topic, known, self._schemas.get(topic), append.schema, append.schema_id, self._config)
            self._check_widening(topic, current, append, merged)
            if append.staged is not None and append.event_time != event_time:
                raise TryAgain(f"topic {topic!r}: its event-time column was settled meanwhile; nothing was written; try again")
        except OplogError as error:
            if append.staged is not None:
                append.staged.abandon()
            append.receipt.set_exception(error)
            return
        self._schemas[topic], self._event_times[topic] = merged, event_time
        if topic not in self.base.topics or append.schema_id not in self.base.topics[topic].schemas:
            self._new_schemas.setdefault((topic, append.schema_id), append.schema)
        first_offset = self._next(topic)
        self.placed.append((append, first_offset))
        if append.staged is not None:
            self._flush(topic)
            self._files.append((append.staged, first_offset))
        elif append.entries:
            self._gathering.setdefault(topic, []).append(append)
        if append.entries:
            self.next_offsets[topic] = first_offset + append.entries

    def _next(self, topic: str) -> int:
        known = self.base.topics.get(topic)
        return self.next_offsets.get(topic, known.next_offset if known else 0)

    def _check_widening(self, topic: str, current: pa.Schema | None, append: _Append, merged: pa.Schema) -> None:
        """Refuse a change of time unit that some value, old or new, would not survive: reading must never fail later."""
        for name in _rescaled(append.schema, merged):
            for found in append.bounds():
                _check_rescale(topic, name, found, append.schema, merged)
        if current is None or not (rescaled := _rescaled(current, merged)):
            return
        earlier = [(other.schema, found) for other, _ in self.placed if other.topic == topic for found in other.bounds()]
        for name in rescaled:
            for schema, found in earlier:
                _check_rescale(topic, name, found, schema, merged)
            for record in self.base.records(topic) if topic in self.base.topics else ():
                _check_rescale(topic, name, record.bounds, self.base.topics[topic].schemas[record.schema_id], merged)

    def _flush(self, topic: str) -> None:
        """Write the topic's gathered small appends as one file, a record for each run of one schema."""
        gathered = self._gathering.pop(topic, [])
        if not gathered:
            return
        staged = self._store.stage(topic)
        self._ours.append(staged)
        first = next(offset for append, offset in self.placed if append is gathered[0])
        self._files.append((staged, first))
        for run in _runs(gathered, self._config):
            batches = [batch for append in run for batch in append.batches]
            owners = [{"entries": append.entries, "timestamp": append.started} for append in run]
            event_time, compression = self._event_times[topic], self._config.compression
            staged.add(make_record(batches, run[0].schema, run[0].schema_id, owners, event_time, compression))

    def finish(self) -> list[StagedFile]:
        """Write what is still in memory, register new schemas, number every file and make it durable."""
        for topic in list(self._gathering):
            self._flush(topic)
        if self._new_schemas:
            self._register()
        for staged, first_offset in self._files:
            staged.finish(first_offset)
        return [staged for staged, _ in self._files]

    def _register(self) -> None:
        now = datetime.datetime.now(datetime.UTC)
        rows = []
        counts = {name: len(topic.schemas) for name, topic in self.base.topics.items()}
        for (topic, fingerprint), schema in self._new_schemas.items():
            number = counts[topic] = counts.get(topic, 0) + 1
            rows.append(
                {
                    "topic": topic,
                    "schema_id": fingerprint,
                    "number": number,
                    "schema": schema.serialize().to_pybytes(),
                    "first_seen": now,
                }
            )
        batch = pa.RecordBatch.from_pylist(rows, SCHEMAS_SCHEMA)
        staged = self._store.stage(SCHEMAS_TOPIC)
        self._ours.append(staged)
        owner = {"entries": len(rows), "timestamp": now}
        staged.add(make_record([batch], SCHEMAS_SCHEMA, schema_id(SCHEMAS_SCHEMA), [owner], "first_seen", self._config.compression))
        first = self._next(SCHEMAS_TOPIC)
        self._files.append((staged, first))
        self.next_offsets[SCHEMAS_TOPIC] = first + len(rows)

    def abandon(self) -> None:
        """Remove the files this group made; the appends' own files stay for another try."""
        for staged in self._ours:
            staged.abandon()


def _runs(appends: list[_Append], config: Config) -> Iterator[list[_Append]]:
    """Split appends into neighbours that one record can hold: same schema, within the record limits."""
    run: list[_Append] = []
    size = entries = 0
    for append in appends:
        over = size + append.nbytes > config.record_bytes_max or entries + append.entries > config.record_entries_max
        if run and (append.schema_id != run[0].schema_id or over):
            yield run
            run, size, entries = [], 0, 0
        run.append(append)
        size, entries = size + append.nbytes, entries + append.entries
    if run:
        yield run


def make_record(
    batches: list[pa.RecordBatch],
    schema: pa.Schema,
    fingerprint: str,
    appends: list[dict[str, Any]],
    event_time: str | None,
    compression: str,
) -> Record:
    """Encode batches of one schema as one record."""
    found = codec.bounds(batches, schema)
    known = event_time in schema.names and pa.types.is_timestamp(schema.field(event_time).type)
    low, high = codec.time_range(found, schema, event_time if known else None)
    entries = sum(batch.num_rows for batch in batches)
    content = codec.encode(batches, schema, compression)
    return Record(entries, fingerprint, appends, found, low, high, codec.digest(content), content)


def _rescaled(narrow: pa.Schema, wide: pa.Schema) -> list[str]:
    """Columns whose time unit the wide schema changes, at the top level."""
    return [f.name for f in narrow if pa.types.is_timestamp(f.type) and wide.field(f.name).type != f.type]


def _check_rescale(topic: str, column: str, found: codec.Bounds, schema: pa.Schema, wide: pa.Schema) -> None:
    limits = found.get(column, {})
    if "min" not in limits or column not in schema.names:
        return
    narrow, target = schema.field(column).type, wide.field(column).type
    try:
        pa.array([limits["min"], limits["max"]], pa.int64()).cast(narrow).cast(target)
    except pa.ArrowInvalid:
        raise SchemaMismatch(
            f"topic {topic!r}: column {column!r} would become {target}, which cannot hold all of its {narrow} values; "
            "the additive rule allows only widening that keeps every value exact; nothing was written"
        ) from None


def _verify_topic(snapshot: Snapshot, topic: Topic) -> Iterator[Problem]:
    runs: list[RecordMeta] = []
    whole = True
    for file in topic.files:
        try:
            for record in snapshot.store.records(file, afresh=True):
                runs.append(record)
                if record.schema_id not in topic.schemas:
                    yield Problem("error", record.where, f"schema_id {record.schema_id} is not registered")
                for batch in codec.decode(snapshot.store.content(record), record.entries, record.where):
                    if record.schema_id in topic.schemas and batch.schema != topic.schemas[record.schema_id]:
                        yield Problem("error", record.where, "the content's schema is not the registered one")
        except CorruptLog as error:
            yield Problem("error", f"topic {topic.name!r}", str(error))
            whole = False  # what an unreadable file held is not a gap
    expected = topic.first_offset
    for record in sorted(runs, key=lambda record: record.first_offset) if whole else ():
        if record.first_offset != expected:
            yield Problem("error", record.where, f"expected offset {expected}: runs overlap or leave a gap")
        expected = record.first_offset + record.entries
    if whole and expected != topic.next_offset:
        yield Problem("error", f"topic {topic.name!r}", f"records end at offset {expected}, the log says {topic.next_offset}")


class _Budget:
    """Bytes that appends under way may hold in memory together. `take` never blocks, so nobody waits on a slow client."""

    def __init__(self, bytes_max: int) -> None:
        self._left = bytes_max
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        with self._lock:
            if size > self._left:
                return False
            self._left -= size
            return True

    def give_back(self, size: int) -> None:
        with self._lock:
            self._left += size


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
