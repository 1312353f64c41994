"""The outer layer: one Delta table of records in a local folder. The only importer of deltalake.

Invariants
  * A data file is written, fsynced, named in a Delta commit, and the commit file is fsynced; only then does `commit`
    return. delta-rs itself never calls fsync, so a receipt would not survive a power cut without this.
  * Data files are immutable once committed. Before that they carry offsets counted from 0, because a long append is
    written while others commit; `StagedFile.finish` then adds the real first offset in place. That works because the
    column `first_offset` is written PLAIN, uncompressed, without nulls and without statistics: its values are the last
    8·n bytes of its column chunk.
  * The next offset of a topic is the Delta `txn` action `topic/<topic>` of the commit that wrote it. Two processes that
    race for a version or a topic conflict in Delta itself; the loser gets `Conflict`, refreshes and numbers again.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
import struct
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, CommitProperties, Transaction

from flight_oplog import codec
from flight_oplog.errors import CorruptLog, NotALog, NotFound, OplogError, OutcomeUnknown, TryAgain
from flight_oplog.files import OutputFile, fsync_file, fsync_folder, reason
from flight_oplog.schema import (
    APPENDS,
    FORMAT_VERSION,
    RECORD_SCHEMA,
    SCHEMAS_SCHEMA,
    SCHEMAS_TOPIC,
    evolve,
    first_time,
    plain_field,
    schema_id,
)

log = logging.getLogger("flight_oplog.store")

ROW_GROUP_BYTES = 16 << 20
# Keeps the `first_offset` chunk of a row group in one Parquet page, as patching it needs.
ROW_GROUP_RECORDS = 4096
SNAPSHOTS_KEPT = 64
FORMAT_KEY = "oplog.formatVersion"

_FILE_SCHEMA = pa.schema([f for f in RECORD_SCHEMA if f.name != "topic"])
_META_COLUMNS = [name for name in _FILE_SCHEMA.names if name != "content"]


class Conflict(OplogError):
    """Another process committed first. Nothing of this commit is visible; refresh, number again, retry."""

    status = "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class Record:
    """One row of the outer table, before it is written. `first_offset` counts from the file's first entry."""

    entries: int
    schema_id: str
    appends: list[dict[str, Any]]
    bounds: codec.Bounds
    min_time: datetime.datetime | None
    max_time: datetime.datetime | None
    digest: str
    content: pa.Buffer


@dataclass(frozen=True, slots=True)
class RecordMeta:
    """One row of the outer table without its content, and where the content is."""

    file: DataFile
    row: int
    row_group: int
    span: tuple[int, int] | None
    first_offset: int
    entries: int
    schema_id: str
    appends: list[dict[str, Any]]
    min_time: datetime.datetime | None
    max_time: datetime.datetime | None
    bounds: codec.Bounds
    digest: str

    @property
    def key(self) -> str:
        """Names this record among all records ever."""
        return f"{self.file.path}#{self.row}"

    @property
    def where(self) -> str:
        return f"topic {self.file.topic!r}, file {os.path.basename(self.file.path)}, offset {self.first_offset}"


@dataclass(frozen=True, slots=True)
class DataFile:
    """One committed Parquet file of one topic, as its `add` action describes it."""

    path: str
    topic: str
    size: int
    records: int
    first_offset: int
    min_time: datetime.datetime | None = None
    max_time: datetime.datetime | None = None

    @property
    def key(self) -> str:
        """Names this file among all files ever."""
        return self.path


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as of one snapshot: its merged schema, every schema its records use, its files in offset order."""

    name: str
    schema: pa.Schema
    schemas: Mapping[str, pa.Schema]
    files: tuple[DataFile, ...]
    next_offset: int

    @property
    def first_offset(self) -> int:
        return self.files[0].first_offset if self.files else self.next_offset

    @property
    def entries(self) -> int:
        return self.next_offset - self.first_offset

    @property
    def event_time(self) -> str | None:
        """The event-time column: the first timestamp column of the first registered schema that has one.

        It never changes, so the time bounds of all the topic's files and records speak of the same column.
        """
        return next((name for schema in self.schemas.values() if (name := first_time(schema)) is not None), None)


@dataclass(frozen=True)
class Snapshot:
    """The log as of one commit. Immutable; safe to share between threads; pins nothing but its own small metadata."""

    table_version: int
    topics: Mapping[str, Topic]
    store: Store = field(repr=False, compare=False)

    def topic(self, name: str) -> Topic:
        """Raises NotFound when the log has no such topic."""
        try:
            return self.topics[name]
        except KeyError:
            raise NotFound(f"topic {name!r} does not exist; append to it to create it") from None

    def records(self, topic: str) -> Iterator[RecordMeta]:
        """Yield the topic's records in offset order, without their content."""
        for file in self.topic(topic).files:
            yield from self.store.records(file)


class Store:
    """The Delta table of one log. `commit` is for one thread; everything else is thread-safe."""

    def __init__(self, root: str, table: DeltaTable) -> None:
        self.root = root
        self._table = table
        self._lock = threading.RLock()
        self._metas: dict[str, tuple[RecordMeta, ...]] = {}
        self._registry: dict[str, list[dict[str, Any]]] = {}
        self._recent: OrderedDict[int, Snapshot] = OrderedDict()
        self._current = self._load(table)
        self._recent[self._current.table_version] = self._current

    # Opening

    @classmethod
    def open(cls, root: str, create: bool = True) -> Store:
        """Open the log in the folder `root`; with `create`, make one there when the folder is missing or empty.

        Raises NotALog when the folder holds something else or a newer format, TryAgain when it cannot be reached.
        """
        root = os.path.abspath(root.removeprefix("file://"))
        if os.path.exists(root) and not os.path.isdir(root):
            raise NotALog(f"{root}: is a file, not a folder; choose an empty or a new folder")
        try:
            if not DeltaTable.is_deltatable(root):
                if not create:
                    raise NotALog(f"{root}: there is no log here")
                cls._create(root)
            table = DeltaTable(root)
        except TableNotFoundError:
            raise NotALog(f"{root}: cannot be opened as a Delta table") from None
        except (OSError, DeltaError) as error:
            raise _storage_error("opening the log", error) from error
        version = table.metadata().configuration.get(FORMAT_KEY)
        if version is None:
            raise NotALog(f"{root}: is a Delta table, but not a flight_oplog log; choose another folder")
        if not version.isdigit() or int(version) > FORMAT_VERSION:
            raise NotALog(f"{root}: has format_version {version}, this program reads up to {FORMAT_VERSION}; upgrade it")
        return cls(root, table)

    @staticmethod
    def _create(root: str) -> None:
        # A crash while creating may have left an empty `_delta_log`: such a folder is still new.
        if os.path.isdir(root) and os.listdir(root) not in ([], ["_delta_log"]):
            raise NotALog(f"{root}: exists and is not a flight_oplog log; choose an empty or a new folder")
        os.makedirs(root, exist_ok=True)
        try:
            DeltaTable.create(
                root,
                RECORD_SCHEMA,
                partition_by=["topic"],
                name="flight_oplog",
                description="An append-only operation log; each row holds a run of entries as an Arrow IPC stream",
                configuration={
                    FORMAT_KEY: str(FORMAT_VERSION),
                    "delta.appendOnly": "true",
                    "delta.dataSkippingStatsColumns": "first_offset,entries,min_time,max_time",
                    "delta.checkpointInterval": "100",
                    "delta.logRetentionDuration": "interval 7 days",
                },
                raise_if_key_not_exists=False,
            )
        except DeltaError:
            if not DeltaTable.is_deltatable(root):  # another process may have created it a moment earlier
                raise
        fsync_file(_commit_path(root, 0))
        for folder in (_log_folder(root), root, os.path.dirname(root)):
            fsync_folder(folder)

    # Snapshots

    def snapshot(self) -> Snapshot:
        """Return the newest snapshot: everything committed before this call, by this process or another."""
        if os.path.exists(_commit_path(self.root, self._current.table_version + 1)):
            self.refresh()
        return self._current

    def refresh(self) -> Snapshot:
        with self._lock:
            try:
                self._table.update_incremental()
            except (OSError, DeltaError) as error:
                raise _storage_error("reading the table", error) from error
            if self._table.version() != self._current.table_version:
                self._remember(self._load(self._table))
            return self._current

    def snapshot_at(self, table_version: int) -> Snapshot:
        """Return the log as of an earlier commit. Raises NotFound when its log entries are gone or never were."""
        with self._lock:
            found = self._recent.get(table_version)
        if found is not None:
            return found
        if table_version > self.snapshot().table_version:
            raise NotFound(f"table_version {table_version} is not committed yet")
        if self._current.table_version == table_version:
            return self._current
        try:
            return self._load(DeltaTable(self.root, version=table_version))
        except (OSError, DeltaError) as error:
            log.warning("table version %d: %s", table_version, error)
            raise NotFound(f"table_version {table_version} can no longer be read; query a newer one") from error

    def _remember(self, snapshot: Snapshot) -> None:
        self._current = snapshot
        self._recent[snapshot.table_version] = snapshot
        while len(self._recent) > SNAPSHOTS_KEPT:
            self._recent.popitem(last=False)

    def _load(self, table: DeltaTable) -> Snapshot:
        adds = pa.table(table.get_add_actions(flatten=True))
        files: dict[str, list[DataFile]] = {}
        if adds.num_rows:
            for add in adds.to_pylist():
                file = DataFile(
                    path=add["path"],
                    topic=add["partition.topic"],
                    size=add["size_bytes"],
                    records=add["num_records"],
                    first_offset=add["min.first_offset"],
                    min_time=add.get("min.min_time"),
                    max_time=add.get("max.max_time"),
                )
                files.setdefault(file.topic, []).append(file)
        for of_topic in files.values():
            of_topic.sort(key=lambda file: file.first_offset)
        next_offsets = {topic: table.transaction_version(f"topic/{topic}") for topic in files}
        return self._assemble(table.version(), files, next_offsets)

    def _assemble(self, table_version: int, files: Mapping[str, Sequence[DataFile]], next_offsets: Mapping[str, int | None]) -> Snapshot:
        rows = [row for file in files.get(SCHEMAS_TOPIC, ()) for row in self._registry_rows(file)]
        by_topic = _schemas_by_topic(rows)
        if SCHEMAS_TOPIC in files:
            by_topic[SCHEMAS_TOPIC] = {schema_id(SCHEMAS_SCHEMA): SCHEMAS_SCHEMA}
        topics: dict[str, Topic] = {}
        for name, schemas in by_topic.items():
            merged: pa.Schema | None = None
            for schema in schemas.values():
                merged = evolve(name, merged, schema, "additive")
            assert merged is not None
            topics[name] = Topic(name, merged, schemas, tuple(files.get(name, ())), next_offsets.get(name) or 0)
        for name in files:
            if name not in topics:
                raise CorruptLog(f"topic {name!r}: its schema is not in {SCHEMAS_TOPIC}; restore that topic's files")
        return Snapshot(table_version, topics, self)

    def _registry_rows(self, file: DataFile) -> list[dict[str, Any]]:
        """Return the entries of one `_schemas` file; decoded once, since files never change."""
        if file.path not in self._registry:
            rows = []
            for record in self.records(file):
                for batch in codec.decode(self.content(record), record.entries, record.where):
                    rows.extend(batch.to_pylist())
            self._registry[file.path] = rows
        return self._registry[file.path]

    # Reading

    def records(self, file: DataFile) -> tuple[RecordMeta, ...]:
        """Return the rows of a data file without their content."""
        found = self._metas.get(file.path)
        if found is None:
            found = self._metas[file.path] = self._read_metas(file)
        return found

    def _read_metas(self, file: DataFile) -> tuple[RecordMeta, ...]:
        with self._parquet(file) as parquet:
            try:
                rows = parquet.read(columns=_META_COLUMNS).to_pylist()
                spans = [span for g in range(parquet.num_row_groups) for span in _spans(parquet.metadata.row_group(g), g)]
            except Exception as error:  # damaged bytes surface as errors of many kinds
                raise CorruptLog(f"{_name(file)} is not readable Parquet; restore it") from error
        try:
            metas = self._metas_of(file, rows, spans)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CorruptLog(f"{_name(file)} does not hold records; restore it") from error
        expected = file.first_offset
        for meta in metas:
            if meta.first_offset != expected or meta.entries != sum(owner["entries"] for owner in meta.appends):
                raise CorruptLog(f"{_name(file)} holds records that do not add up; restore it")
            expected += meta.entries
        if len(metas) != file.records:
            raise CorruptLog(f"{_name(file)} holds {len(metas)} of {file.records} records; restore it")
        return metas

    @staticmethod
    def _metas_of(
        file: DataFile, rows: Sequence[dict[str, Any]], spans: Sequence[tuple[int, tuple[int, int] | None]]
    ) -> tuple[RecordMeta, ...]:
        return tuple(
            RecordMeta(
                file=file,
                row=number,
                row_group=group,
                span=span,
                first_offset=row["first_offset"],
                entries=row["entries"],
                schema_id=row["schema_id"],
                appends=row["appends"],
                min_time=row["min_time"],
                max_time=row["max_time"],
                bounds=json.loads(row["bounds"]) if row["bounds"] else {},
                digest=row["digest"],
            )
            for number, (row, (group, span)) in enumerate(zip(rows, spans, strict=True))
        )

    def content(self, record: RecordMeta) -> pa.Buffer:
        """Return a record's content, checked against its digest. Raises CorruptLog naming topic, file and offset."""
        content = self._read_content(record)
        if codec.digest(content) != record.digest:
            raise CorruptLog(f"{record.where}: content does not match its digest; restore the file")
        return content

    def _read_content(self, record: RecordMeta) -> pa.Buffer:
        if record.span is not None:
            return self._read_span(record, *record.span)
        with self._parquet(record.file) as parquet:
            try:
                column = parquet.read_row_group(record.row_group, columns=["content"]).column(0)
                first = sum(parquet.metadata.row_group(g).num_rows for g in range(record.row_group))
                scalar = column[record.row - first]
            except Exception as error:  # damaged bytes surface as errors of many kinds
                raise CorruptLog(f"{record.where}: content is not readable; restore the file") from error
            if not (pa.types.is_binary(scalar.type) or pa.types.is_large_binary(scalar.type)) or not scalar.is_valid:
                raise CorruptLog(f"{record.where}: content is {scalar.type}, not binary; restore the file")
            return scalar.as_buffer()

    def _read_span(self, record: RecordMeta, start: int, end: int) -> pa.Buffer:
        """Read the only value of an uncompressed content chunk straight from the file, into aligned memory.

        The chunk is a Thrift page header (20 to 40 bytes), a 4-byte length and the bytes up to `end`.
        """
        try:
            with pa.OSFile(os.path.join(self.root, record.file.path), "rb") as source:
                head = source.read_at(min(64, end - start), start)
                for place in range(8, len(head) - 3):
                    size = int.from_bytes(head[place : place + 4], "little")
                    if start + place + 4 + size == end:
                        source.seek(end - size)
                        return source.read_buffer(size)
        except OSError as error:
            raise CorruptLog(f"{record.where}: the file cannot be read ({reason(error)}); restore it") from error
        raise CorruptLog(f"{record.where}: content has no length; restore the file")

    def _parquet(self, file: DataFile) -> pq.ParquetFile:
        path = os.path.join(self.root, file.path)
        try:
            return pq.ParquetFile(path)
        except FileNotFoundError:
            raise CorruptLog(f"{_name(file)} is missing; restore it") from None
        except (pa.ArrowException, OSError) as error:
            raise CorruptLog(f"{_name(file)} is not readable Parquet; restore it") from error

    # Writing

    def stage(self, topic: str) -> StagedFile:
        """Begin a data file that nobody sees until `commit` names it."""
        return StagedFile(self.root, topic)

    def commit(self, base: Snapshot, staged: Sequence[StagedFile], next_offsets: Mapping[str, int]) -> int:
        """Commit finished files as the table version after `base`, atomically and durably; return that version.

        `next_offsets` holds the offset after the last entry of each topic written.
        Raises Conflict when another process took that version, TryAgain when nothing was written, OutcomeUnknown when
        it cannot be told; the files must be kept then.
        """
        path = _commit_path(self.root, base.table_version + 1)
        with self._lock:
            if self._table.version() != base.table_version:
                raise Conflict("the table has moved on; nothing was written")
            try:
                _commit_delta(self._table, staged, next_offsets)
            except (OSError, DeltaError) as error:
                # The commit file itself is the only witness of what happened.
                if not os.path.exists(path):
                    raise _storage_error("the commit", error) from error
                if not self._outcome(path, staged[0].done):
                    raise Conflict("another process committed first; nothing was written") from error
            try:
                fsync_file(path)
                fsync_folder(_log_folder(self.root))
            except OSError as error:
                raise _unknown(base.table_version + 1, error) from error
            try:
                self._table.update_incremental()
                if self._table.version() == base.table_version + 1:
                    self._remember(self._advance(base, [file.done for file in staged], next_offsets))
                else:
                    self._remember(self._load(self._table))
            except Exception:  # it is committed and durable, whatever happens now; the next snapshot() reads it again
                log.exception("reading back table version %d", base.table_version + 1)
            return base.table_version + 1

    @staticmethod
    def _outcome(path: str, file: DataFile) -> bool:
        """Whether the commit file at `path` is the one that names `file`."""
        try:
            with open(path, encoding="utf-8") as lines:
                return any(file.path in line for line in lines)
        except OSError as error:
            raise _unknown(int(os.path.basename(path)[:20]), error) from error

    def _advance(self, base: Snapshot, done: Sequence[DataFile], next_offsets: Mapping[str, int]) -> Snapshot:
        """Return the snapshot after our own commit, without reading the table again."""
        files: dict[str, Sequence[DataFile]] = {name: topic.files for name, topic in base.topics.items()}
        for file in done:
            files[file.topic] = (*files.get(file.topic, ()), file)
        known = {name: topic.next_offset for name, topic in base.topics.items()}
        return self._assemble(base.table_version + 1, files, known | dict(next_offsets))

    def damaged_commits(self) -> list[int]:
        """Return the versions whose commit file is not whole: delta-rs reads an emptied one as a commit of nothing."""
        damaged = []
        for name in sorted(os.listdir(_log_folder(self.root))):
            if _COMMIT_NAME.fullmatch(name):
                with open(os.path.join(_log_folder(self.root), name), "rb") as file:
                    if not _is_commit(file.read()):
                        damaged.append(int(name[:20]))
        return damaged

    def orphans(self) -> list[str]:
        """Return data files in the folder that no snapshot names: what a crash or a failed append left behind."""
        live = {file.path for topic in self.snapshot().topics.values() for file in topic.files}
        found = []
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = os.path.relpath(os.path.join(folder, name), self.root)
                if name.endswith(".parquet") and not path.startswith("_delta_log") and path not in live:
                    found.append(path)
        return sorted(found)


class StagedFile:
    """A data file being written: `add` records, then `finish` it for a commit or `abandon` it. For one thread."""

    def __init__(self, root: str, topic: str) -> None:
        self.topic = topic
        self.entries = 0
        self.bounds: list[codec.Bounds] = []
        self._root = root
        self._path = f"topic={topic}/{uuid.uuid4()}.parquet"
        self._full_path = os.path.join(root, self._path)
        self._pending: list[Record] = []
        self._pending_bytes = 0
        self._writer: pq.ParquetWriter | None = None
        self._file: OutputFile | None = None
        self._runs: list[tuple[int, int]] = []
        self._lows: list[datetime.datetime] = []
        self._highs: list[datetime.datetime] = []
        self._time_known = True
        self._first_offset = 0
        self._done: DataFile | None = None

    @property
    def done(self) -> DataFile:
        assert self._done is not None, "finish() comes before commit()"
        return self._done

    def add(self, record: Record) -> None:
        """Write one record after those before it. Raises TryAgain when the disk refuses; abandon the file then."""
        full = self._pending_bytes + record.content.size > ROW_GROUP_BYTES or len(self._pending) >= ROW_GROUP_RECORDS
        if self._pending and full:
            self._flush()
        self.bounds.append(record.bounds)
        self._pending.append(record)
        self._pending_bytes += record.content.size
        if record.min_time is None or record.max_time is None:
            self._time_known = False
        else:
            self._lows.append(record.min_time)
            self._highs.append(record.max_time)
        if self._pending_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        rows = []
        for record in self._pending:
            self._runs.append((self.entries, record.entries))
            rows.append(
                {
                    "first_offset": self.entries,
                    "entries": record.entries,
                    "schema_id": record.schema_id,
                    "appends": record.appends,
                    "min_time": record.min_time,
                    "max_time": record.max_time,
                    "bounds": codec.bounds_json(record.bounds),
                    "digest": record.digest,
                }
            )
            self.entries += record.entries
        table = pa.Table.from_pylist(rows, pa.schema([f for f in _FILE_SCHEMA if f.name != "content"]))
        contents = binary_array([record.content for record in self._pending])
        self._pending, self._pending_bytes = [], 0
        try:
            if self._writer is None:
                self._writer = self._create()
            self._writer.write_table(table.append_column(_FILE_SCHEMA.field("content"), contents), row_group_size=len(rows))
        except OSError as error:
            raise _storage_error("writing a data file", error) from error

    def _create(self) -> pq.ParquetWriter:
        folder = os.path.dirname(self._full_path)
        if not os.path.isdir(folder):
            os.makedirs(folder, exist_ok=True)
            fsync_folder(self._root)
        plain = ("first_offset", "content")
        self._file = OutputFile(self._full_path)
        return pq.ParquetWriter(
            self._file,
            _FILE_SCHEMA,
            compression={name: "NONE" if name in plain else "ZSTD" for name in _leaf_paths(_FILE_SCHEMA)},
            use_dictionary=False,
            column_encoding=None,
            write_statistics=["entries", "min_time", "max_time"],
            store_schema=False,
        )

    def finish(self, first_offset: int) -> DataFile:
        """Number the file's entries from `first_offset` and make its bytes durable. May be called again to renumber."""
        try:
            if self._done is None:
                if self._pending:
                    self._flush()
                assert self._writer is not None, "a data file holds at least one record"
                assert self._file is not None
                self._writer.close()
                self._file.close()
            self._renumber(first_offset - self._first_offset)
            self._first_offset = first_offset
            fsync_file(self._full_path)
            fsync_folder(os.path.dirname(self._full_path))
        except OSError as error:
            raise _storage_error("writing a data file", error) from error
        self._done = DataFile(
            path=self._path,
            topic=self.topic,
            size=os.path.getsize(self._full_path),
            records=len(self._runs),
            first_offset=first_offset,
            min_time=min(self._lows) if self._time_known else None,
            max_time=max(self._highs) if self._time_known else None,
        )
        return self._done

    def add_action(self) -> AddAction:
        """Return the Delta action that names this file, with real statistics: without them nothing can skip it."""
        low: dict[str, Any] = {"first_offset": self.done.first_offset, "entries": min(n for _, n in self._runs)}
        last = self.done.first_offset + self._runs[-1][0]
        high: dict[str, Any] = {"first_offset": last, "entries": max(n for _, n in self._runs)}
        nulls = {"first_offset": 0, "entries": 0}
        if self.done.min_time is not None and self.done.max_time is not None:
            low["min_time"] = _stat_time(min(self._lows))
            low["max_time"] = _stat_time(min(self._highs))
            high["min_time"] = _stat_time(max(self._lows))
            high["max_time"] = _stat_time(max(self._highs))
            nulls |= {"min_time": 0, "max_time": 0}
        stats = {"numRecords": len(self._runs), "minValues": low, "maxValues": high, "nullCount": nulls}
        return AddAction(
            path=self.done.path,
            size=self.done.size,
            partition_values={"topic": self.topic},
            modification_time=int(time.time() * 1000),
            data_change=True,
            stats=json.dumps(stats),
        )

    def _renumber(self, shift: int) -> None:
        if shift == 0:
            return
        metadata = pq.read_metadata(self._full_path)
        with open(self._full_path, "r+b") as file:
            for group in range(metadata.num_row_groups):
                chunk, rows = metadata.row_group(group).column(0), metadata.row_group(group).num_rows
                assert (chunk.path_in_schema, chunk.compression) == ("first_offset", "UNCOMPRESSED")
                place = chunk.data_page_offset + chunk.total_compressed_size - 8 * rows
                file.seek(place)
                offsets = [int.from_bytes(file.read(8), "little") + shift for _ in range(rows)]
                file.seek(place)
                file.write(b"".join(offset.to_bytes(8, "little") for offset in offsets))

    def abandon(self) -> None:
        """Remove the file. Never raises: what cannot be removed stays an orphan that `verify` lists."""
        try:
            if self._writer is not None and self._done is None:
                self._writer.close()
        except (OSError, pa.ArrowException) as error:
            log.warning("closing an abandoned file: %s", error)
        try:
            if self._file is not None:
                self._file.close()
        except (OSError, pa.ArrowException) as error:
            log.warning("closing an abandoned file: %s", error)
        try:
            os.unlink(self._full_path)
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("removing an abandoned file: %s", error)


def _commit_delta(table: DeltaTable, staged: Sequence[StagedFile], next_offsets: Mapping[str, int]) -> None:
    table.create_write_transaction(
        [file.add_action() for file in staged],
        mode="append",
        schema=table.schema(),
        partition_by=["topic"],
        commit_properties=CommitProperties(
            app_transactions=[Transaction(f"topic/{topic}", offset) for topic, offset in next_offsets.items()],
            # A retry inside delta-rs could land on a later version than the receipts name.
            max_commit_retries=0,
        ),
    )


def _stat_time(time: datetime.datetime) -> str:
    return time.isoformat(timespec="microseconds").replace("+00:00", "Z")


_COMMIT_NAME = re.compile(r"\d{20}\.json")


def _is_commit(content: bytes) -> bool:
    try:
        actions = [json.loads(line) for line in content.splitlines() if line]
    except ValueError:
        return False
    return bool(actions) and all(isinstance(action, dict) for action in actions)


def _schemas_by_topic(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, pa.Schema]]:
    """Group the registry's rows: topic → schema_id → schema, in the order the topic took them."""
    found: dict[str, dict[str, pa.Schema]] = {}
    for row in sorted(rows, key=lambda row: (row["topic"], row["number"])):
        schema = pa.ipc.read_schema(pa.py_buffer(row["schema"]))
        plain = pa.schema([plain_field(field) for field in schema])
        found.setdefault(row["topic"], {})[row["schema_id"]] = plain
    return found


def _spans(metadata: pq.RowGroupMetaData, group: int) -> list[tuple[int, tuple[int, int] | None]]:
    """Return (row group, byte span of its content or None) for each row of a row group."""
    chunk = metadata.column(metadata.num_columns - 1)
    plain = chunk.path_in_schema == "content" and chunk.compression == "UNCOMPRESSED" and not chunk.has_dictionary_page
    if metadata.num_rows != 1 or not plain:
        return [(group, None)] * metadata.num_rows
    return [(group, (chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size))]


def binary_array(contents: Sequence[pa.Buffer]) -> pa.Array:
    """Return the contents as one binary array; a single one is not copied."""
    if len(contents) == 1:
        offsets = pa.py_buffer(struct.pack("<ii", 0, contents[0].size))
        return pa.Array.from_buffers(pa.binary(), 1, [None, offsets, contents[0]])
    return pa.array([content.to_pybytes() for content in contents], pa.binary())


def _leaf_paths(schema: pa.Schema) -> list[str]:
    """Return the Parquet path of every leaf column, as ParquetWriter's per-column options want it."""
    names = [f"appends.list.element.{child.name}" for child in APPENDS.value_type]
    return [name for field in schema for name in (names if field.name == "appends" else [field.name])]


def _name(file: DataFile) -> str:
    return f"topic {file.topic!r}: file {os.path.basename(file.path)}"


def _commit_path(root: str, table_version: int) -> str:
    return os.path.join(_log_folder(root), f"{table_version:020}.json")


def _log_folder(root: str) -> str:
    return os.path.join(root, "_delta_log")


def _unknown(table_version: int, error: BaseException) -> OutcomeUnknown:
    log.error("the commit of table version %d: %s", table_version, error)
    return OutcomeUnknown(
        f"the commit of table_version {table_version} may or may not be durable ({reason(error)}); "
        "look whether the entries are there before sending them again"
    )


def _storage_error(doing: str, error: BaseException) -> TryAgain:
    log.warning("%s failed: %s", doing, error)
    return TryAgain(f"{doing} failed: {reason(error)}; nothing was written; try again when that is mended")
