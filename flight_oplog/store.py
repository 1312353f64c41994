"""The outer layer: one Delta table of records, in a folder or an object store. The only importer of deltalake.

Invariants
  * A data file is durable before a Delta commit names it, and the commit's entry before `commit` returns. delta-rs
    itself never calls fsync, so a receipt would not survive a power cut without this.
  * The next offset of a topic is the Delta `txn` action `topic/<topic>` of the commit that wrote it. Two processes that
    race for a table version conflict; the loser gets `Conflict`, refreshes and numbers again.
  * In a folder, `snapshot` looks for what others committed every time. An object store is asked every
    `refresh_seconds` at most: what another server acknowledged is seen that much later, or as soon as
    somebody asks `at_least` for it.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import logging
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from flight_oplog import codec, deltalog
from flight_oplog.datafile import StagedFile
from flight_oplog.deltalog import Changes
from flight_oplog.errors import CorruptLog, NotALog, NotFound, OplogError, TryAgain, Unsupported
from flight_oplog.files import reading_error, storage_error
from flight_oplog.grants import ANYBODY, Principal
from flight_oplog.growing import Growing
from flight_oplog.kept import remember
from flight_oplog.maps import MAPPED_BYTES_MAX
from flight_oplog.reader import Reader
from flight_oplog.records import DataFile, RecordMeta
from flight_oplog.schema import (
    FORMAT_VERSION,
    RECORD_SCHEMA,
    SCHEMAS_SCHEMA,
    SCHEMAS_TOPIC,
    schema_id,
)
from flight_oplog.storage import Found, Storage, storage_at
from flight_oplog.topics import Topic, first_offset

log = logging.getLogger("flight_oplog.store")

SNAPSHOTS_KEPT = 64
# Earlier snapshots that somebody asked for, so many and of no more files and columns together; and moments whose snapshot was found out.
PAST_KEPT = 64
PAST_WEIGHT_MAX = 100_000
MOMENTS_KEPT = 1000
# Principals for whom a snapshot remembers what they see of it.
VIEWERS_KEPT = 64
# The key that the servers of a log share. Delta passes over names that begin with _.
SECRET_PATH = "_oplog_key"
# A checkpoint names every file, so a log of many has one when it has grown by a part of them: each commit bears a share. And
# whoever opens the log reads each entry after it, which takes as long as twenty files of it.
CHECKPOINT_INTERVAL = 100
CHECKPOINT_PART = 20
RELOAD_SECONDS = 3600
OPENS_MAX = 20
# Entries followed one by one, before the table is read afresh instead.
FOLLOWED_MAX = 200
REFRESH_SECONDS = 0.5
# The Delta protocol of the tables made here, for readers and for writers.
PROTOCOL = (1, 2)
FORMAT_KEY = "oplog.formatVersion"


_NUMBERS = itertools.count()  # tells stores apart for as long as the process lives, as their ids do not


class Conflict(OplogError):
    """Another process committed first. Nothing of this commit is visible; refresh, number again, retry."""

    status = "UNAVAILABLE"


class _Some(Mapping[str, Topic]):
    """Those of some topics whose names pass."""

    def __init__(self, topics: Mapping[str, Topic], passes: Callable[[str], bool]) -> None:
        self._topics = topics
        self._passes = passes

    def __getitem__(self, name: str) -> Topic:
        if not self._passes(name):
            raise KeyError(name)
        return self._topics[name]

    def __iter__(self) -> Iterator[str]:
        return filter(self._passes, self._topics)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True)
class Snapshot:
    """The log as of one commit. Immutable; safe to share between threads; pins nothing but its own small metadata."""

    table_version: int
    topics: Mapping[str, Topic]
    store: Store = field(repr=False, compare=False)
    ended: Mapping[str, Topic] = field(default_factory=dict)  # dropped, and not begun again
    viewer: Principal = ANYBODY
    writable: Mapping[str, Topic] = field(default_factory=dict, repr=False)  # not to be read, but to be appended to
    _whole: Snapshot | None = field(default=None, repr=False, compare=False)
    _seen: OrderedDict[Principal, Snapshot] = field(default_factory=OrderedDict, repr=False, compare=False)

    @property
    def whole(self) -> Snapshot:
        """The same with all its topics, whoever looks at it."""
        return self if self._whole is None else self._whole

    def seen_by(self, viewer: Principal) -> Snapshot:
        """Return the same with only those topics that a principal may read."""
        if viewer is self.viewer:
            return self
        whole = self.whole
        found = whole._seen.get(viewer)
        if found is None:
            shown = _Some(whole.topics, lambda name: viewer.may("read", name))
            writable = _Some(whole.topics, lambda name: viewer.may("append", name) and name not in shown)
            found = Snapshot(whole.table_version, shown, whole.store, {}, viewer, writable, whole)
            remember(whole._seen, viewer, found, VIEWERS_KEPT)
        return found

    def topic(self, name: str) -> Topic:
        """Raises NotFound when the log has no such topic."""
        try:
            return self.topics[name]
        except KeyError:
            raise NotFound(f"topic {name!r} does not exist; append to it to create it") from None

    def records(self, topic: str, start: int = 0) -> Iterator[RecordMeta]:
        """Yield the topic's records in offset order, without their content, leaving out files that end before `start`."""
        found = self.topic(topic)
        records = (record for file in found.files_within(start) for record in self.records_of(found, file))
        yield from sorted(records, key=first_offset) if found.overlaps else records

    def records_of(self, topic: Topic, file: DataFile, each: bool = False) -> Sequence[RecordMeta]:
        """Return those of a file's records that are the topic's; with `each`, small ones one by one.

        Another program may have put dropped ones beside them: then all are looked at one by one.
        """
        if file.first_offset >= topic.start:
            return self.store.reader.rows(file) if each else self.store.reader.records(file)
        return [record for record in self.store.reader.rows(file) if record.first_offset >= topic.start]


class Store:
    """The Delta table of one log. `commit` is for one thread; everything else is thread-safe."""

    def __init__(self, storage: Storage, table: DeltaTable, refresh_seconds: float = REFRESH_SECONDS) -> None:
        self.number = next(_NUMBERS)
        self.reader = Reader(storage)
        self._storage = storage
        self._refresh_seconds = 0.0 if storage.is_local else refresh_seconds
        self._moving = threading.RLock()  # held by who moves to a newer snapshot, for as long as that takes
        self._lock = threading.Lock()  # of what can be read at any time
        self._news = threading.Condition()
        self._registry: dict[str, list[dict[str, Any]]] = {}
        self._recent: OrderedDict[int, Snapshot] = OrderedDict()
        self._past: OrderedDict[int, tuple[Snapshot, int]] = OrderedDict()
        self._moments: OrderedDict[datetime.datetime, int] = OrderedDict()
        self._checkpointing: threading.Thread | None = None
        # When the newest snapshot was last known to be the newest. By the clock on the wall: others stand still in a
        # machine that is asleep, and after a long pause "there is no next entry" may mean that it is gone already.
        self._looked = time.time()
        self._start_from(table)

    def _start_from(self, table: DeltaTable) -> None:
        """Take over what a table read by delta-rs holds; from there on, each entry of its log is followed here."""
        numbers, snapshot = deltalog.numbers(self._storage, table.version()), self._load(table)
        with self._lock:
            self._numbers, self._protocol = numbers, table.protocol()
            self._past.clear()
            self._moments.clear()
        self._storage.let_go()
        self._remember(snapshot)

    # Opening

    @classmethod
    def open(
        cls, uri: str, create: bool = True, refresh_seconds: float = REFRESH_SECONDS, mapped_bytes_max: int = MAPPED_BYTES_MAX
    ) -> Store:
        """Open the log in a folder or at an object store's URI; with `create`, make one there when nothing is there.

        Raises NotALog when something else is there or a newer format, TryAgain when it cannot be reached.
        """
        storage = storage_at(uri, mapped_bytes_max)
        where = storage.uri
        try:
            if not deltalog.is_there(storage):
                if not create:
                    raise NotALog(f"{where}: there is no log here")
                cls._create(storage)
            table = _opened(storage)
        except TableNotFoundError:
            raise NotALog(f"{where}: cannot be opened as a Delta table") from None
        except (OSError, DeltaError) as error:
            raise storage_error("opening the log", error) from error
        version = table.metadata().configuration.get(FORMAT_KEY)
        if version is None:
            raise NotALog(f"{where}: is a Delta table, but not a flight_oplog log; choose another folder")
        if not version.isdigit() or int(version) > FORMAT_VERSION:
            raise NotALog(f"{where}: has format_version {version}, this program reads up to {FORMAT_VERSION}; upgrade it")
        with _reading("the log"):
            return cls(storage, table, refresh_seconds)

    @staticmethod
    def _create(storage: Storage) -> None:
        # A crash while creating may have left an empty `_delta_log`: such a folder is still new.
        if not storage.is_new():
            if deltalog.is_there(storage):  # another process has created it just now
                return
            raise NotALog(f"{storage.uri}: exists and is not a flight_oplog log; choose an empty or a new folder")
        storage.prepare()
        try:
            DeltaTable.create(
                storage.uri,
                RECORD_SCHEMA,
                partition_by=["topic"],
                name="flight_oplog",
                description="An append-only operation log; each row holds a run of entries as an Arrow IPC stream",
                configuration={
                    FORMAT_KEY: str(FORMAT_VERSION),
                    "delta.appendOnly": "true",
                    "delta.dataSkippingStatsColumns": "first_offset,entries,min_time,max_time",
                    "delta.checkpointInterval": str(CHECKPOINT_INTERVAL),
                    "delta.logRetentionDuration": "interval 7 days",
                },
                raise_if_key_not_exists=False,
                storage_options=storage.options,
            )
        except DeltaError:
            if not deltalog.is_there(storage):  # another process may have created it a moment earlier
                raise
        storage.sync([deltalog.entry_path(0), deltalog.FOLDER, "", ".."])

    # Snapshots

    def snapshot(self) -> Snapshot:
        """Return the newest snapshot: everything committed by this process, and by others as this module's top says."""
        now = time.time()
        if 0 <= now - self._looked < min(self._refresh_seconds, RELOAD_SECONDS):
            return self._current
        if self._is_behind() or self._has_next():
            return self.refresh()
        self._looked = now
        return self._current

    def at_least(self, table_version: int) -> Snapshot:
        """Return the newest snapshot, looking for it at once. Raises TryAgain when that version is not committed yet."""
        if self._current.table_version < table_version:
            self.refresh()
        if self._current.table_version < table_version:
            raise TryAgain(f"table_version {table_version} is not committed, the log is at {self._current.table_version}; try again")
        return self._current

    def _is_behind(self) -> bool:
        """Whether nobody has looked for so long that the entries to follow may be gone.

        The newest entry never goes: where that is asked for nothing, it is.
        """
        if not -RELOAD_SECONDS <= time.time() - self._looked <= RELOAD_SECONDS:
            return True
        return self._storage.is_local and not self._storage.exists(deltalog.entry_path(self._current.table_version))

    def _has_next(self) -> bool:
        with _reading("the table"):
            return self._storage.exists(deltalog.entry_path(self._current.table_version + 1))

    @property
    def latest(self) -> Snapshot:
        """The newest snapshot this process knows, without looking for a newer one."""
        return self._current

    def refresh(self) -> Snapshot:
        """Follow the entries that came after the newest snapshot. Raises CorruptLog for a damaged one."""
        with self._moving, _reading("the table"):
            if self._is_behind():
                return self.reload()
            for followed in itertools.count():
                now = time.time()
                changes = deltalog.read(self._storage, self._current.table_version + 1)
                if changes is None:
                    self._looked = now
                    break
                if changes.upgrades or followed == FOLLOWED_MAX:
                    return self.reload()
                self._follow(self._current, changes)
            return self._current

    def reload(self) -> Snapshot:
        """Read the table afresh: after a long pause, the entries that would have to be followed may be gone."""
        with self._moving, _reading("the table"):
            now = time.time()
            table = _opened(self._storage)
            if table.version() > self._current.table_version:
                self._start_from(table)
            self._looked = now
            return self._current

    def snapshot_at(self, table_version: int) -> Snapshot:
        """Return the log as of an earlier commit. Raises NotFound when its log entries are gone or never were."""
        with self._lock:
            found = self._recent.get(table_version)
            if found is None and table_version in self._past:
                self._past.move_to_end(table_version)
                found, _ = self._past[table_version]
        if found is not None:
            return found
        if table_version > self.snapshot().table_version:
            raise NotFound(f"table_version {table_version} is not committed yet")
        if self._current.table_version == table_version:
            return self._current
        try:
            found = self._load(DeltaTable(self._storage.uri, version=table_version, storage_options=self._storage.options))
        except (OSError, DeltaError) as error:
            with _reading(f"table_version {table_version}"):
                if self._storage.exists(deltalog.entry_path(table_version)) and not isinstance(error, TableNotFoundError):
                    raise error
            log.warning("table version %d: %s", table_version, error)
            raise NotFound(f"table_version {table_version} can no longer be read; query a newer one") from error
        self._keep_past(found)
        return found

    def _keep_past(self, snapshot: Snapshot) -> None:
        topics = snapshot.topics.values()
        weight = len(snapshot.ended) + sum(len(topic.files) + sum(map(len, topic.schemas.values())) for topic in topics)
        if weight > PAST_WEIGHT_MAX:
            return
        with self._lock:
            self._past[snapshot.table_version] = snapshot, weight
            total = sum(weight for _, weight in self._past.values())
            while len(self._past) > PAST_KEPT or total > PAST_WEIGHT_MAX:
                total -= self._past.popitem(last=False)[1][1]

    def snapshot_as_of(self, moment: datetime.datetime) -> Snapshot:
        """Return the log as of the newest commit made until `moment`, going by the times of the log's files."""
        with _reading("the table"):
            version = self._moments.get(moment)
            if version is None or deltalog.made(self._storage, version) is None:
                version = self._version_as_of(moment)
        return self.snapshot_at(version)

    def _version_as_of(self, moment: datetime.datetime) -> int:
        try:
            table = DeltaTable(self._storage.uri, storage_options=self._storage.options)
            table.load_as_version(moment.astimezone(datetime.UTC))
            found = table.version()
            # A file's time may be a little less than that of its commit. And where the entries of that time are gone, the oldest
            # that can be read would be taken.
            while (made := deltalog.made(self._storage, found)) is not None and made > moment.timestamp() + 0.001 and found > 0:
                found -= 1
            if made is None or made > moment.timestamp() + 0.001:
                raise NotFound(f"the log as of {moment.isoformat()} can no longer be read, or was not yet; ask for a later time")
        except (DeltaError, ValueError) as error:
            log.warning("the log as of %s: %s", moment, error)
            raise NotFound(f"the log as of {moment.isoformat()} can no longer be read; ask for a later time") from error
        if (deltalog.made(self._storage, found + 1) or 0) > moment.timestamp() + 0.001:  # else a commit yet to come may be of that time
            remember(self._moments, moment, found, MOMENTS_KEPT)
        return found

    def numbers(self, base: Snapshot, *names: str) -> list[int | None]:
        """Return the numbers of application ids, as `txn` actions carry them, as of the newest snapshot `base`.

        Raises Conflict when `base` is no longer the newest.
        """
        with self._lock:
            if self._current is not base:
                raise Conflict("the table has moved on; nothing was written")
            return [self._numbers.get(name) for name in names]

    def _remember(self, snapshot: Snapshot) -> None:
        with self._lock:
            self._current = snapshot
            remember(self._recent, snapshot.table_version, snapshot, SNAPSHOTS_KEPT)
        with self._news:
            self._news.notify_all()

    def wait_for(self, condition: Callable[[Snapshot], bool], seconds: float) -> Snapshot:
        """Wait until the newest snapshot known meets a condition, at most so long; return it."""
        with self._news:
            self._news.wait_for(lambda: condition(self._current), seconds)
        return self._current

    def wake(self) -> None:
        """Let everyone who waits look at their condition."""
        with self._news:
            self._news.notify_all()

    def _follow(self, base: Snapshot, changes: Changes) -> None:
        snapshot = self._after(base, base.table_version + 1, changes)
        with self._lock:
            self._numbers.update(changes.numbers)
        self.reader.let_go(changes.removed)
        self._remember(snapshot)

    def _load(self, table: DeltaTable) -> Snapshot:
        adds = pa.table(table.get_add_actions(flatten=True))
        files = [
            DataFile(
                path=add["path"],
                topic=add["partition.topic"],
                size=add["size_bytes"],
                records=add["num_records"],
                first_offset=add["min.first_offset"],
                last_record=add["max.first_offset"],
                **_times_of(add),
            )
            for add in (adds.to_pylist() if adds.num_rows else ())
        ]
        registries = [file for file in files if file.topic == SCHEMAS_TOPIC]
        known = {file.topic for file in files} | {row["topic"] for file in registries for row in self._registry_rows(file)}
        names = [f"{what}/{topic}" for topic in known for what in ("topic", "start")]
        numbers = {name: table.transaction_version(name) or 0 for name in names}
        return self._after(Snapshot(0, {}, self), table.version(), Changes(files, numbers=numbers))

    def _after(self, base: Snapshot, table_version: int, changes: Changes) -> Snapshot:
        """Return the snapshot that `changes` make of `base`; what they do not touch is shared."""
        added: dict[str, list[DataFile]] = {}
        for file in changes.added:
            added.setdefault(file.topic, []).append(file)
        registry: dict[str, list[dict[str, Any]]] = {}
        for row in (row for file in added.get(SCHEMAS_TOPIC, ()) for row in self._registry_rows(file)):
            registry.setdefault(row["topic"], []).append(row)
        topics, ended = dict(base.topics), dict(base.ended)
        for name in {*added, *registry, *(topic_of(path) for path in changes.removed)}:
            before = topics.pop(name, None) or ended.pop(name, None) or Topic(name, pa.schema([]), {}, Growing(), 0)
            topic = before.with_schemas(sorted(registry.get(name, ()), key=_number))
            if name == SCHEMAS_TOPIC:
                topic = replace(topic, schema=SCHEMAS_SCHEMA, schemas={schema_id(SCHEMAS_SCHEMA): SCHEMAS_SCHEMA}, event_time="first_seen")
            topic = topic.with_files(added.get(name, ()), changes.removed, changes.numbers.get(f"start/{name}", topic.start))
            topic = replace(topic, next_offset=changes.numbers.get(f"topic/{name}", topic.next_offset))
            if topic.schemas:
                topics[name] = topic
            elif topic.registered:
                ended[name] = topic
            else:
                raise CorruptLog(f"topic {name!r}: its schema is not in {SCHEMAS_TOPIC}; restore that topic's files")
        return Snapshot(table_version, topics, self, ended)

    def _registry_rows(self, file: DataFile) -> list[dict[str, Any]]:
        """Return the entries of one `_schemas` file; decoded once, since files never change."""
        if file.path not in self._registry:
            rows = []
            for record in self.reader.records(file):
                for batch in codec.decode(self.reader.content(record), record.entries, record.where):
                    rows.extend(batch.to_pylist())
            self._registry[file.path] = rows
        return self._registry[file.path]

    @property
    def is_local(self) -> bool:
        return self._storage.is_local

    # Writing

    def stage(self, topic: str) -> StagedFile:
        """Begin a data file that nobody sees until `commit` names it."""
        return StagedFile(self._storage, topic)

    def finish(self, files: Sequence[tuple[StagedFile, int]]) -> None:
        """Make files durable, each numbered from its first offset. Raises TryAgain when the storage refuses."""
        for _ in self._storage.each(lambda each: each[0].finish(each[1]), files):
            pass

    def commit(self, base: Snapshot, staged: Sequence[StagedFile], numbers: Mapping[str, int]) -> int:
        """Commit finished files as the table version after `base`, atomically and durably; return that version.

        `numbers` holds the new number of each application id that changes, the next offset of each topic among them.
        Raises Conflict when another process took that version, TryAgain when nothing was written, OutcomeUnknown when
        it cannot be told; the files must be kept then.
        """
        table_version = base.table_version + 1
        with self._moving:
            if self._current.table_version != base.table_version or self._is_behind():
                raise Conflict("the table has moved on; nothing was written")
            if (self._protocol.min_reader_version, self._protocol.min_writer_version) != PROTOCOL:
                raise Unsupported(
                    "another program has upgraded the table to a Delta protocol that this one does not write "
                    f"(reader {self._protocol.min_reader_version}, writer {self._protocol.min_writer_version}); nothing was written"
                )
            try:
                deltalog.write(self._storage, table_version, staged, numbers)
            except FileExistsError as error:
                raise Conflict("another process committed first; nothing was written") from error
            except OSError as error:
                raise storage_error("the commit", error) from error
            self._looked = time.time()
            try:
                for file in staged:
                    self.reader.take(file)
                self._follow(base, Changes([file.done for file in staged], numbers=numbers))
                if table_version % CHECKPOINT_INTERVAL == 0 and (self._checkpointing is None or not self._checkpointing.is_alive()):
                    self._checkpointing = None
                    thread = threading.Thread(target=self._checkpoint, name="checkpoint")
                    thread.start()
                    self._checkpointing = thread
            except Exception:  # it is committed and durable, whatever happens now; the next snapshot() reads it again
                log.exception("after table version %d", table_version)
                self._looked -= self._refresh_seconds
            return table_version

    def _checkpoint(self) -> None:
        """Sum up the Delta log in a checkpoint, unless its last one names most files; drop entries past their retention."""
        try:
            snapshot = self._current
            files = sum(len(topic.files) for topic in snapshot.topics.values())
            version = snapshot.table_version
            if version - deltalog.checkpointed(self._storage) < files // CHECKPOINT_PART:
                return
            # delta-rs lists the folder, and gives up where entries came while it did: in a large one some always do.
            with self._storage.still(deltalog.up_to(self._storage, version)) as root:
                table = DeltaTable(root, version=version, storage_options=self._storage.options)
                table.create_checkpoint()
                self._storage.adopt(root, [deltalog.checkpoint_path(version), deltalog.LAST_CHECKPOINT])
            # Entries may only go when what replaces them is durable, as it is now. Where others come meanwhile, they go another time.
            with contextlib.suppress(DeltaError):
                DeltaTable(self._storage.uri, storage_options=self._storage.options).cleanup_metadata()
            self._storage.sweep()
        except Exception as error:  # a log without this checkpoint is whole; it is tried again soon
            log.warning("the checkpoint failed: %s", error)

    def close(self) -> None:
        """Wait for a checkpoint under way."""
        if self._checkpointing is not None:
            self._checkpointing.join()

    def damaged_commits(self) -> list[int]:
        with _reading("the table"):
            return deltalog.damaged(self._storage)

    def secret(self) -> bytes:
        """Return the key that every server of this log seals handles with; the first one to ask makes it.

        A log that cannot be written to has none; then it is a new one each time, and handles end with the process.
        """
        key = secrets.token_hex(32)
        with _reading("the log's key"):
            try:
                if not self._storage.exists(SECRET_PATH):
                    self._storage.create(SECRET_PATH, key.encode(), key, private=True)
                key = self._storage.read(SECRET_PATH).to_pybytes().decode()
            except FileExistsError:
                key = self._storage.read(SECRET_PATH).to_pybytes().decode()
            except OSError as error:
                if self._storage.exists(SECRET_PATH):
                    raise
                log.warning("handles will not outlive this process: %s", error)
        if not re.fullmatch(r"[0-9a-f]{64}", key):
            raise CorruptLog(f"{SECRET_PATH}: is not a key; remove it, and a new one is made")
        return bytes.fromhex(key)

    def orphans(self) -> list[Found]:
        """Return data files that no snapshot names: what a crash or a failed append left behind."""
        with _reading("the log"):
            files = [file for file in self._storage.walk() if file.path.endswith(".parquet") and not file.path.startswith(deltalog.FOLDER)]
            # Read afresh, after the listing: what is not in the table now was not in it then.
            live = {add["path"] for add in pa.table(_opened(self._storage).get_add_actions()).to_pylist()}
            found = [file for file in files if file.path not in live]
            gone = deltalog.removed(self._storage) if found else set()
        return sorted((file for file in found if file.path not in gone), key=lambda file: file.path)

    def remove_orphans(self, seconds: float) -> list[str]:
        """Remove orphans that nobody has written to for so long; return their paths."""
        removed = []
        for file in self.orphans():
            try:
                before = time.time() - seconds
                if file.modified <= before and self._storage.delete_old(file.path, before):
                    removed.append(file.path)
            except FileNotFoundError:  # an append gave it up meanwhile
                continue
            except OSError as error:
                raise storage_error("removing orphans", error) from error
        return removed


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    """Say what could not be read when the storage, or delta-rs on top of it, refuses."""
    try:
        yield
    except (OSError, DeltaError, pa.ArrowException) as error:
        raise reading_error(what, error) from error


def _opened(storage: Storage) -> DeltaTable:
    """Open the table with delta-rs, which lists the log's folder and gives up when entries came while it did."""
    for _ in range(OPENS_MAX):
        try:
            return DeltaTable(storage.uri, storage_options=storage.options)
        except DeltaError as error:
            if "contiguous" not in str(error):
                raise
    return DeltaTable(storage.uri, storage_options=storage.options)


def _times_of(add: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bounds of a file's event times, where they are known for all of it."""
    low, high = add.get("min.min_time"), add.get("max.max_time")
    if low is None or high is None or add.get("null_count.min_time") or add.get("null_count.max_time"):
        return {}
    return {"min_time": low, "max_time": deltalog.end_of_millisecond(high)}


def topic_of(path: str) -> str:
    """Return the topic that a data file's path names: topic=<name>/<file>."""
    return path.partition("/")[0].removeprefix("topic=")


def _number(row: dict[str, Any]) -> int:
    number: int = row["number"]
    return number
