"""The log, usable in process without a server: append, snapshot, topics, verify, close.

Threads. Any number of threads append. Each append gathers its batches in an `AppendWriter`: what fits in one record
stays in memory, the rest is encoded and written to a data file of its own that nobody sees yet. Submitting it hands
the append to the one committer thread (`committer.py`).

An append is whole or nothing: an error before its receipt means that none of its entries will ever be visible, except
OutcomeUnknown, which says so.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeAlias

import pyarrow as pa

from flight_oplog import codec, codes
from flight_oplog.appends import Append, Origin, Receipt, Role, check_data, end_of, make_record, one_line, owner_of
from flight_oplog.committer import CLOSED, Committer
from flight_oplog.config import Config
from flight_oplog.datafile import StagedFile
from flight_oplog.errors import CorruptLog, RequestError, TooLarge, TryAgain
from flight_oplog.group import check_room, merge
from flight_oplog.keys import check_keys, filters_of, holds
from flight_oplog.parts import Parts
from flight_oplog.records import RecordMeta
from flight_oplog.rows import Record
from flight_oplog.schema import check_topic, first_time, normal_schema, schema_id
from flight_oplog.store import Snapshot, Store
from flight_oplog.topics import Topic

log = logging.getLogger("flight_oplog.oplog")

SPILLS_UNDER_WAY = 3
FLUSH_BYTES = 1 << 20
SMALL_BYTES = 256 << 10
ENCODED_BYTES = 4 << 20
NORMALS_KEPT = 256
_ANONYMOUS = Origin()

Appendable: TypeAlias = pa.RecordBatch | pa.Table | pa.RecordBatchReader


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
        self._committer = Committer(store, config)
        self._normals: dict[bytes, tuple[pa.Schema, str]] = {}
        self._known: dict[int, tuple[pa.Schema, tuple[pa.Schema, str]]] = {}  # by the very object: a stream's has one

    @classmethod
    def open(cls, uri: str, config: Config | None = None) -> OpLog:
        """Open the log in a folder (a path or file:// URI) or on an object store (s3://bucket/prefix), creating it when nothing is there.

        Raises NotALog when something else is there or a newer format_version.
        """
        config = config or Config(data=uri)
        return cls(Store.open(uri, refresh_seconds=config.refresh_ms / 1000, mapped_bytes_max=config.mapped_bytes_max), config)

    def append(self, topic: str, entries: Appendable, origin: Origin = _ANONYMOUS) -> Receipt:
        """Append all of `entries` as one append and return its receipt: durable, whole, visible to the next snapshot.

        With a producer and a sequence in `origin` it is written exactly once, however often it is sent.

        Raises RequestError, SchemaMismatch or TooLarge when the entries must change, OutOfOrder when they do not
        follow what is there, TryAgain when the storage refused; in each case nothing was written.
        """
        writer = self.writer(topic, entries.schema, origin)
        try:
            for batch in entries.to_batches() if isinstance(entries, pa.Table) else _batches(entries):
                writer.write(batch)
            return writer.commit()
        finally:
            writer.abandon()

    def writer(
        self, topic: str, schema: pa.Schema, origin: Origin = _ANONYMOUS, role: Role = Role.APPENDS, keys: tuple[str, ...] = ()
    ) -> AppendWriter:
        """Begin an append whose batches come one by one. Raises before anything is sent when the schema cannot be.

        One that replaces ends the topic as it is, in the same commit; a duplicate of it ends nothing. `keys` are the
        columns by which entries are looked up, when it begins the topic.
        """
        check_topic(topic)
        return self._writer(topic, schema, origin, role, keys)

    def append_own(self, topic: str, entries: pa.RecordBatch, expected_offset: int) -> Receipt:
        """Append to a topic of the log's own, which clients cannot; raises OutOfOrder when it does not end at `expected_offset`."""
        writer = self._writer(topic, entries.schema, Origin(expected_offset=expected_offset))
        try:
            writer.write(entries)
            return writer.commit()
        finally:
            writer.abandon()

    def _writer(
        self, topic: str, schema: pa.Schema, origin: Origin, role: Role = Role.APPENDS, declared: tuple[str, ...] = ()
    ) -> AppendWriter:
        origin.check(topic)
        normal, fingerprint = self._normal(schema)
        check_keys(topic, declared, normal)
        snapshot = self._store.latest  # the committer looks again, at the newest
        while True:
            current = None if role is Role.REPLACES else snapshot.topics.get(topic)
            try:
                if topic not in snapshot.topics:
                    check_room(topic, sum(not name.startswith("_") for name in snapshot.topics), self.config)
                merge(topic, current, None, normal, fingerprint, self.config)
                break
            except RequestError:  # another server may have dropped since what stands in its way
                before, snapshot = snapshot, self._store.refresh()
                if snapshot is before:
                    raise
        event_time = current.event_time if current else None
        keys = current.keys if current else declared
        return AppendWriter(self, topic, normal, fingerprint, event_time or first_time(normal), origin, role, keys, declared)

    def _normal(self, schema: pa.Schema) -> tuple[pa.Schema, str]:
        """Return the normal form of a schema and its schema_id. Producers send the same few over and over."""
        if (known := self._known.get(id(schema))) is not None and known[0] is schema:
            return known[1]
        key = hashlib.sha256(schema.serialize()).digest()
        found = self._normals.get(key)
        if found is None:
            normal = normal_schema(schema, self.config.columns_max)
            found = normal, schema_id(normal)
            if len(self._normals) >= NORMALS_KEPT:
                self._normals.clear()
            self._normals[key] = found
        if len(self._known) >= NORMALS_KEPT:
            self._known.clear()
        self._known[id(schema)] = schema, found
        return found

    def drop(self, topic: str) -> Receipt:
        """End a topic: its entries are no more seen, but in snapshots of before. Raises NotFound when there is none.

        What is appended to a topic of its name later begins at the offset where this one ended, with a schema of its own.
        """
        check_topic(topic)
        return self._committer.submit([end_of(topic)])[0].result()

    def commit_together(self, appends: Sequence[Append]) -> list[Receipt]:
        """Commit complete appends, to whatever topics, as one: all of them in one table version, or none.

        Raises what one of them is refused for.
        """
        return [receipt.result() for receipt in self._committer.submit(list(appends))]

    def snapshot(self) -> Snapshot:
        """Return the log as of the newest commit, this process's or another's."""
        return self._store.snapshot()

    def knows(self, topic: str) -> bool:
        """Whether there was such a topic when this process last looked at the log; it does not look now."""
        return topic in self._store.latest.topics

    def at_least(self, table_version: int) -> Snapshot:
        """Return a snapshot that shows what was acknowledged with this table_version, by whichever server."""
        return self._store.at_least(table_version)

    def wait_for(self, condition: Callable[[Snapshot], bool], seconds: float) -> Snapshot:
        """Wait until the newest snapshot that this process knows meets a condition, at most so long; return it."""
        return self._store.wait_for(condition, seconds)

    def wake(self) -> None:
        """Let everyone who waits look at their condition."""
        self._store.wake()

    def snapshot_at(self, table_version: int) -> Snapshot:
        """Return the log as of an earlier commit. Raises NotFound when it cannot be read any more."""
        return self._store.snapshot_at(table_version)

    def snapshot_as_of(self, moment: datetime.datetime) -> Snapshot:
        """Return the log as of the newest commit made until `moment`. Raises NotFound when it cannot be read any more."""
        return self._store.snapshot_as_of(moment)

    def secret(self) -> bytes:
        """Return the key that every server of this log shares."""
        return self._store.secret()

    def topics(self) -> list[Topic]:
        """Return the topics of the newest snapshot, by name; the log's own begin with _."""
        return sorted(self.snapshot().topics.values(), key=lambda topic: topic.name)

    def verify(self) -> list[Problem]:
        """Read everything and return what is wrong; an empty list means every byte is as it was acknowledged.

        What was dropped is not looked at, though it can still be read as of an earlier snapshot.
        """
        snapshot = self._store.refresh()
        problems = [problem for topic in snapshot.topics.values() for problem in _verify_topic(snapshot, topic)]
        for version in self._store.damaged_commits():
            problems.append(Problem("error", f"table_version {version}", "its commit file is damaged; restore it"))
        # A file that is staged right now looks like an orphan; it is a note, not damage, either way.
        problems += [
            Problem("note", file.path, "no commit names this data file: left by a crash, or being written right now")
            for file in self._store.orphans()
        ]
        return problems

    def remove_orphans(self, seconds: float) -> list[str]:
        """Remove data files that no commit names and nobody has written to for so long; return their paths.

        A crash or a failed append leaves such files. So does an append under way until it commits: choose `seconds`
        longer than any client pauses within a stream.
        """
        return self._store.remove_orphans(seconds)

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


def _batches(entries: pa.RecordBatch | pa.RecordBatchReader) -> Iterable[pa.RecordBatch]:
    return [entries] if isinstance(entries, pa.RecordBatch) else entries


class AppendWriter:
    """One append under way: `write` its batches, then `commit` or `abandon` it. For one thread."""

    def __init__(
        self,
        oplog: OpLog,
        topic: str,
        schema: pa.Schema,
        fingerprint: str,
        event_time: str | None,
        origin: Origin,
        role: Role,
        keys: tuple[str, ...],
        declared: tuple[str, ...],
    ) -> None:
        self.topic = topic
        self._keys = keys
        self._declared = declared
        self._role = role
        self._event_time = event_time
        self._origin = origin
        self._oplog = oplog
        self._config = oplog.config
        self._schema = schema
        self._schema_id = fingerprint
        self._started = datetime.datetime.now(datetime.UTC)
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_bytes = self._waiting_entries = self._reserved = 0
        self._bytes = self._entries = 0
        self._unchecked = False
        self._record: Record | None = None
        self._staged: StagedFile | None = None
        self._spilling: deque[Future[None]] = deque()
        self._texts: codes.Known = {}  # that its records have had
        self._owned = True

    def write(self, batch: pa.RecordBatch) -> None:
        """Take one batch. Raises RequestError or TooLarge for a batch that cannot be stored; abandon the append then."""
        self._check_owned()
        size = batch.get_total_buffer_size()
        if self._is_small(batch, size):
            self._bytes += size
            self._unchecked = True
            self._take(batch, size)
            return
        # Before anything else looks at the batch: even its size is read through offsets that a client made up. A batch
        # that goes on as it is only has its ends looked at here; what is in it, whoever encodes it looks at.
        as_sent = batch.schema.equals(self._schema)
        check_data(self.topic, [batch], full=not as_sent)
        if batch.num_rows > self._config.batch_entries_max:
            raise TooLarge(
                f"topic {self.topic!r}: a batch of {batch.num_rows} entries is over batch_entries_max ({self._config.batch_entries_max}); "
                "send smaller batches; nothing was written"
            )
        # Encoded columns are written out: it is their size as values that counts.
        size = batch.nbytes if as_sent else codec.expanded_nbytes_of(batch)
        if size > self._config.batch_bytes_max:
            raise TooLarge(
                f"topic {self.topic!r}: a batch of {size} bytes is over batch_bytes_max ({self._config.batch_bytes_max}); "
                "send smaller batches; nothing was written"
            )
        self._bytes += size
        if self._bytes > self._config.append_bytes_max:
            raise TooLarge(
                f"topic {self.topic!r}: the append is over append_bytes_max ({self._config.append_bytes_max}); "
                "send it as several; nothing was written"
            )
        if as_sent and size <= self._config.record_bytes_max and batch.num_rows <= self._config.record_entries_max:
            self._unchecked = True
            self._take(batch, size)
            return
        if as_sent:
            check_data(self.topic, [batch])
        try:
            plain = codec.conform(batch, self._schema)
        except pa.ArrowException as error:
            raise RequestError(f"topic {self.topic!r}: a batch cannot be stored ({one_line(error)}); nothing was written") from error
        for piece in codec.cut(plain, self._config.record_bytes_max, self._config.record_entries_max):
            self._take(piece, piece.nbytes)

    def _is_small(self, batch: pa.RecordBatch, size: int) -> bool:
        """Whether a batch can go on as it is, unlooked at. Small ones are looked at together, by the committer: each
        look lets go of the interpreter, and with many streams it is switching threads that costs."""
        limit = min(SMALL_BYTES, self._config.record_bytes_max, self._config.batch_bytes_max, self._config.append_bytes_max - self._bytes)
        entries = min(self._config.record_entries_max, self._config.batch_entries_max)
        return size <= limit and batch.num_rows <= entries and batch.schema == self._schema

    def _take(self, piece: pa.RecordBatch, size: int) -> None:
        if not piece.num_rows:
            return
        full = self._waiting_bytes + size > self._config.record_bytes_max
        if self._waiting and (full or self._waiting_entries + piece.num_rows > self._config.record_entries_max):
            self._spill()
        if not self._oplog._memory.take(size):
            # Memory is used up by other appends: this one holds none and goes on through the disk.
            self._waiting.append(piece)
            self._waiting_entries += piece.num_rows
            self._spill()
            return
        self._reserved += size
        self._waiting.append(piece)
        self._waiting_bytes += size
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
            record = self._oplog._encoders.submit(self._encode, self._waiting, self._waiting_entries, self._unchecked)
            before = self._spilling[-1] if self._spilling else None
            self._spilling.append(self._oplog._writers.submit(self._add, self._staged, before, record, self._reserved))
        except RuntimeError:
            raise TryAgain(CLOSED) from None
        self._entries += self._waiting_entries
        self._waiting, self._waiting_bytes, self._waiting_entries, self._reserved = [], 0, 0, 0
        self._unchecked = False

    def _encode(self, batches: list[pa.RecordBatch], entries: int, unchecked: bool) -> Record:
        if unchecked:
            check_data(self.topic, batches)
        owner = owner_of(self._origin, entries, self._started)
        config, texts = self._config, self._texts
        return make_record(batches, self._schema, self._schema_id, [owner], self._event_time, config.compression, self._keys, texts)

    def _add(self, staged: StagedFile, before: Future[None] | None, record: Future[Record], reserved: int) -> None:
        """Write a record after the one before it. Waits only for earlier work, so the pools cannot lock each other."""
        try:
            encoded = record.result()
            if before is not None:
                before.result()
            staged.add(encoded)
            # Its memory is given back now: only a little may wait for company.
            staged.flush(FLUSH_BYTES if reserved else 0)
        finally:
            self._oplog._memory.give_back(reserved)

    def _settle(self) -> None:
        """Wait until nothing is being written; raise what went wrong with it."""
        while self._spilling:
            self._spilling.popleft().result()

    def _check_owned(self) -> None:
        if not self._owned:
            raise ValueError("the append was submitted or abandoned already")

    def _release(self) -> None:
        self._oplog._memory.give_back(self._reserved)
        self._waiting, self._waiting_bytes, self._waiting_entries, self._reserved = [], 0, 0, 0

    def commit(self) -> Receipt:
        """Make the append durable and visible, whole, and return its receipt. Blocks until then."""
        return self.submit().result()

    def submit(self) -> Future[Receipt]:
        """Hand the append to the committer and return its receipt to come. Appends are committed in this order."""
        self.complete()
        return self._oplog._committer.submit([self.hand_over()])[0]

    def complete(self) -> int:
        """Wait until everything is stored that goes to the disk before the commit; return the append's entries.

        Raises what went wrong with it; abandon the append then.
        """
        self._check_owned()
        if self._staged is not None and self._waiting:
            self._spill()
        if self._waiting and self._waiting_bytes > ENCODED_BYTES:
            # Here, while the committer commits others: everybody waits on it.
            self._record = self._encode(self._waiting, self._waiting_entries, self._unchecked)
            self._waiting, self._unchecked = [], False
        self._settle()
        if self._staged is not None:
            # Most likely these are its offsets: then the committer, on whom everybody waits, has no more to write of it.
            found = self._oplog._store.latest.topics.get(self.topic)
            self._staged.finish(found.next_offset if found else 0)
        return self._entries + self._waiting_entries

    def check(self) -> None:
        """Look at what is in memory now, instead of when it is committed. Raises RequestError for what is not valid."""
        if self._unchecked:
            check_data(self.topic, self._waiting)
            self._unchecked = False

    def hand_over(self) -> Append:
        """Return the complete append: to commit it, or to refuse it, is the caller's."""
        append = Append(
            self.topic,
            self._schema,
            self._schema_id,
            self._event_time,
            self._started,
            self._waiting,
            self._record,
            self._staged,
            self._entries + self._waiting_entries,
            self._waiting_bytes,
            self._origin,
            self._role,
            self._declared,
            unchecked=self._unchecked and self._staged is None,
        )
        self._owned = False
        append.receipt.add_done_callback(lambda receipt: self._release())
        return append

    def abandon(self) -> None:
        """Drop the append if it was not handed to the committer. Safe to call at any time, any number of times."""
        if self._owned:
            self._owned = False
            self._release()
            wait(self._spilling)  # the append is dropped, whatever became of it
            if self._staged is not None:
                self._staged.abandon()


def _verify_topic(snapshot: Snapshot, topic: Topic) -> Iterator[Problem]:
    runs: list[RecordMeta] = []
    whole = True
    for file in topic.files:
        try:
            records = [record for record in snapshot.store.reader.rows(file, afresh=True) if record.first_offset >= topic.start]
            with_filters = [record for record in records if any("filter" in limits for limits in record.bounds.values())]
            filters = dict(zip(with_filters, snapshot.store.reader.filters(with_filters), strict=True))
            for record, content in zip(records, snapshot.store.reader.contents(records), strict=True):
                runs.append(record)
                if record.schema_id not in topic.schemas:
                    yield Problem("error", record.where, f"schema_id {record.schema_id} is not registered")
                schema = topic.schemas.get(record.schema_id)
                parts = None if record.parts is None else Parts.read(record.parts)
                if parts is not None and schema is not None and not parts.fit(content, schema):
                    yield Problem("error", record.where, "its parts are not where its columns are")
                batches = codec.decode(content, record.entries, record.where)
                if parts is not None and not _codes_agree(parts, content, record, batches):
                    yield Problem("error", record.where, "the codes of a column are not those of its texts")
                if record in filters and not _filters_hold(filters[record], record.bounds, batches):
                    yield Problem("error", record.where, "its filters lack a key")
                for batch in batches:
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


def _filters_hold(found: bytes, bounds: codec.Bounds, batches: list[pa.RecordBatch]) -> bool:
    """Whether each key of a record is in the filter that its bounds name."""
    places = {name: limits["filter"] for name, limits in bounds.items() if "filter" in limits}
    if found == filters_of(batches, tuple(places), {name: {} for name in places}):
        return True
    bits = memoryview(found)
    return all(holds(bits[start : start + size], [batch.column(name) for batch in batches]) for name, (start, size) in places.items())


def _codes_agree(parts: Parts, content: pa.Buffer, record: RecordMeta, batches: list[pa.RecordBatch]) -> bool:
    """Whether the codes that a record's bounds name are there, and stand for the same texts as its columns hold."""
    if {name for name, limits in record.bounds.items() if "codes" in limits} != parts.codes.keys():
        return False
    for name in parts.codes:
        stream = parts.codes_in(content, name)
        if stream is None or name not in batches[0].schema.names:
            return False
        coded, different = codes.read(stream, record.entries, record.where), record.bounds[name]["codes"]
        texts = pa.chunked_array([batch.column(name) for batch in batches]).combine_chunks()
        if not different == len(coded.dictionary) == len(coded.dictionary.unique()) or coded.dictionary_decode() != texts:
            return False
    return True


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
