"""The outer layer: one Delta table of records in a local folder. The only importer of deltalake.

Invariants
  * A data file is written, fsynced, named in a Delta commit, and the commit file is fsynced; only then does `commit`
    return. delta-rs itself never calls fsync, so a receipt would not survive a power cut without this.
  * The next offset of a topic is the Delta `txn` action `topic/<topic>` of the commit that wrote it. Two processes that
    race for a version or a topic conflict in Delta itself; the loser gets `Conflict`, refreshes and numbers again.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, CommitProperties, Transaction

from flight_oplog import codec
from flight_oplog.datafile import DataFile, RecordMeta, StagedFile, read_content, read_records
from flight_oplog.errors import CorruptLog, NotALog, NotFound, OplogError, OutcomeUnknown
from flight_oplog.files import fsync_file, fsync_folder, reason, storage_error
from flight_oplog.schema import (
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

SNAPSHOTS_KEPT = 64
FORMAT_KEY = "oplog.formatVersion"


class Conflict(OplogError):
    """Another process committed first. Nothing of this commit is visible; refresh, number again, retry."""

    status = "UNAVAILABLE"


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
            raise storage_error("opening the log", error) from error
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
                raise storage_error("reading the table", error) from error
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
            found = self._metas[file.path] = read_records(self.root, file)
        return found

    def content(self, record: RecordMeta) -> pa.Buffer:
        """Return a record's content, checked against its digest. Raises CorruptLog naming topic, file and offset."""
        content = read_content(self.root, record)
        if codec.digest(content) != record.digest:
            raise CorruptLog(f"{record.where}: content does not match its digest; restore the file")
        return content

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
                    raise storage_error("the commit", error) from error
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


def _commit_delta(table: DeltaTable, staged: Sequence[StagedFile], next_offsets: Mapping[str, int]) -> None:
    table.create_write_transaction(
        [_add_action(file) for file in staged],
        mode="append",
        schema=table.schema(),
        partition_by=["topic"],
        commit_properties=CommitProperties(
            app_transactions=[Transaction(f"topic/{topic}", offset) for topic, offset in next_offsets.items()],
            # A retry inside delta-rs could land on a later version than the receipts name.
            max_commit_retries=0,
        ),
    )


def _add_action(staged: StagedFile) -> AddAction:
    return AddAction(
        path=staged.done.path,
        size=staged.done.size,
        partition_values={"topic": staged.topic},
        modification_time=int(time.time() * 1000),
        data_change=True,
        stats=staged.stats(),
    )


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
