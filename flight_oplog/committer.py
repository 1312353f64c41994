"""The one thread that commits: takes every append that waits, numbers them, makes one Delta commit of them all.

While that commit is on its way the next group gathers: a quiet log answers at once, a busy one makes bigger commits.

Producers. A producer names itself and counts its appends to a topic: 0, 1, 2, ... The rules are Kafka's: the next
number is accepted; one already committed is answered again with the original receipt and writes nothing; a gap is an
error that names the number expected; a number from an older epoch is fenced off; a newer epoch begins again at 0. The
last number and epoch ride in the same Delta commit as the entries (`txn` actions), so they survive whatever the
entries survive, and racing servers agree on them. Original receipts are remembered for a while, and found again in the
records themselves after that.
"""

from __future__ import annotations

import contextlib
import datetime
import enum
import itertools
import json
import logging
import queue
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from flight_oplog import codec
from flight_oplog.config import Config
from flight_oplog.datafile import Record, StagedFile
from flight_oplog.errors import NotFound, OplogError, OutcomeUnknown, OutOfOrder, RequestError, SchemaMismatch, TooLarge, TryAgain
from flight_oplog.kept import remember
from flight_oplog.keys import filters_of
from flight_oplog.parts import Parts
from flight_oplog.schema import KEYS_METADATA, SCHEMAS_SCHEMA, SCHEMAS_TOPIC, evolve, first_time, schema_id
from flight_oplog.store import Conflict, Snapshot, Store, Topic

log = logging.getLogger("flight_oplog.committer")

CONFLICTS_MAX = 50
RECEIPTS_KEPT = 65_536
# How far back in a topic an original receipt is looked for when it is no longer remembered.
RECORDS_SEARCHED_MAX = 256
# Batches this small on average are joined before they are encoded.
JOINED_ENTRIES = 8192
NUMBER_MAX = (1 << 63) - 1
PRODUCER_PATTERN = re.compile(r"[!-~]{1,128}")
CLOSED = "the log is closed; nothing was written; try again when the server is back"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an append comes from, so that it can be told from another, and what must hold for it to be taken."""

    producer: str | None = None
    epoch: int = 0
    sequence: int | None = None
    expected_offset: int | None = None
    principal: str | None = None

    def check(self, topic: str) -> None:
        """Raise RequestError for a name or number that cannot be one."""
        for name in ("epoch", "sequence", "expected_offset"):
            number = getattr(self, name)
            if number is not None and not (type(number) is int and 0 <= number <= NUMBER_MAX):
                raise RequestError(f"topic {topic!r}: {name} {str(number)[:80]!r} is not a number from 0 to 2^63 - 1; nothing was written")
        if self.producer is None:
            return
        if not PRODUCER_PATTERN.fullmatch(self.producer):
            raise RequestError(
                f"topic {topic!r}: the producer's name {self.producer[:80]!r} is not 1 to 128 printable ASCII characters; "
                "nothing was written"
            )
        if self.sequence is None:
            raise RequestError(f"topic {topic!r}: producer {self.producer!r} sends no sequence; nothing was written")


class Role(enum.Enum):
    """What an append is to its topic."""

    APPENDS = "goes on, or begins it"
    BEGINS = "begins it: there must be none yet"
    REPLACES = "ends it as it is, if there is one, and begins it again"
    ENDS = "is no append, but its end"


@dataclass(frozen=True, slots=True)
class Receipt:
    """What an append returns once it is durable and visible: its run is [first_offset, first_offset + entries).

    A duplicate has the original's run, or none where that is no longer remembered. Its entries are visible at
    `table_version` in any case: a duplicate of what was dropped since is refused.
    """

    topic: str
    first_offset: int | None
    entries: int | None
    table_version: int
    sequence: int | None = None
    duplicate: bool = False


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


@dataclass(slots=True, eq=False)
class Append:
    """An append handed to the committer: small ones as batches in memory, larger ones encoded, long ones as a staged file."""

    topic: str
    schema: pa.Schema
    schema_id: str
    event_time: str | None
    started: datetime.datetime
    batches: list[pa.RecordBatch]
    record: Record | None
    staged: StagedFile | None
    entries: int
    nbytes: int
    origin: Origin
    role: Role = Role.APPENDS
    keys: tuple[str, ...] = ()  # that it declares
    unchecked: bool = False  # its batches came from a client, and nobody has looked at what is in them
    receipt: Future[Receipt] = field(default_factory=Future)

    @property
    def owner(self) -> dict[str, Any]:
        """The append's part in the `appends` of a record that holds all of it."""
        return owner_of(self.origin, self.entries, self.started)

    @property
    def key(self) -> tuple[str, str, int, int] | None:
        """What a duplicate of it has in common with it."""
        origin = self.origin
        return None if origin.producer is None or origin.sequence is None else (self.topic, origin.producer, origin.epoch, origin.sequence)

    def drop(self) -> None:
        if self.staged is not None:
            self.staged.abandon()

    def keep(self) -> None:
        if self.staged is not None:
            self.staged.close()

    def refuse(self, error: BaseException) -> None:
        self.drop()
        self.receipt.set_exception(error)

    def bounds(self) -> list[codec.Bounds]:
        if self.staged is not None:
            return self.staged.bounds
        return [codec.bounds(self.batches, self.schema) if self.record is None else self.record.bounds]


def end_of(topic: str) -> Append:
    """Return the end of a topic, to be committed as appends are."""
    now = datetime.datetime.now(datetime.UTC)
    return Append(topic, pa.schema([]), "", None, now, [], None, None, 0, 0, Origin(), Role.ENDS)


def _schema_id(append: Append) -> str:
    return append.schema_id


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def check_data(topic: str, batches: Sequence[pa.RecordBatch], full: bool = True) -> None:
    """Raise RequestError unless the batches, all of one schema, are valid throughout: the network is hostile.

    Without `full`, only that their buffers are as long as their ends say: enough to ask for their size.
    """
    try:
        if sum(batch.num_rows for batch in batches) < JOINED_ENTRIES * len(batches) and len(batches) > 1:
            pa.Table.from_batches(batches).validate(full=full)
            return
        for batch in batches:
            (codec.texts_as_bytes(batch) if full and batch.num_rows >= JOINED_ENTRIES else batch).validate(full=full)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise RequestError(f"topic {topic!r}: a batch is not valid Arrow data ({one_line(error)}); nothing was written") from error


def owner_of(origin: Origin, entries: int, started: datetime.datetime) -> dict[str, Any]:
    """Return one element of a record's `appends`."""
    owner: dict[str, Any] = {"entries": entries, "timestamp": started}
    if origin.principal is not None:
        owner["principal"] = origin.principal
    if origin.producer is not None:
        owner |= {"producer": origin.producer, "epoch": origin.epoch, "sequence": origin.sequence}
    return owner


class Committer:
    """The one thread that commits. Strategy at the top of this module."""

    def __init__(self, store: Store, config: Config) -> None:
        self._store = store
        self._config = config
        self._producers = _Producers(store)
        self._queue: queue.SimpleQueue[list[Append] | None] = queue.SimpleQueue()
        self._gate = threading.Lock()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
        self._thread.start()

    def submit(self, appends: list[Append]) -> list[Future[Receipt]]:
        """Take appends that are to be committed together, all or none; return their receipts to come."""
        for append in appends:
            append.receipt.set_running_or_notify_cancel()  # whoever waits may go away, the append may not
        with self._gate:
            if not self._stopped:
                self._queue.put(appends)
                return [append.receipt for append in appends]
        for append in appends:
            append.refuse(TryAgain(CLOSED))
        raise TryAgain(CLOSED)

    def stop(self) -> None:
        with self._gate:
            if not self._stopped:
                self._stopped = True
                self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        open_ = True
        while open_:
            waiting = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    waiting.append(self._queue.get_nowait())
            open_ = None not in waiting
            self._commit_waiting([bundle for bundle in waiting if bundle])
            del waiting  # an idle log holds on to nothing

    def _commit_waiting(self, waiting: list[list[Append]]) -> None:
        wrong = self._invalid([append for bundle in waiting for append in bundle if append.unchecked])
        for bundle in waiting if wrong else ():
            if (error := next((wrong[append] for append in bundle if append in wrong), None)) is not None:
                for append in bundle:
                    append.refuse(error)
        waiting = [bundle for bundle in waiting if not bundle[0].receipt.done()]
        for is_single, bundles in itertools.groupby(waiting, lambda bundle: len(bundle) == 1):
            if is_single:
                self._commit_group([append for bundle in bundles for append in bundle])
            else:
                for bundle in bundles:
                    self._commit_group(bundle, as_one=True)

    def _invalid(self, appends: list[Append]) -> dict[Append, Exception]:
        """Look at the data of many small appends at once; return those whose data is not valid, and why."""
        found: dict[Append, Exception] = {}
        for _, of_schema in itertools.groupby(sorted(appends, key=_schema_id), key=_schema_id):
            together = list(of_schema)
            try:
                check_data("", [batch for append in together for batch in append.batches])
            except Exception:
                for append in together:
                    try:
                        check_data(append.topic, append.batches)
                    except RequestError as error:
                        found[append] = error
                    except Exception:
                        log.exception("looking at an append to topic %r", append.topic)
                        found[append] = TryAgain("the append failed, see the server's log; nothing was written; try again")
        return found

    def _commit_group(self, appends: list[Append], as_one: bool = False) -> None:
        """Give every append of the group its receipt or its error; never raises."""
        try:
            for _ in range(CONFLICTS_MAX):
                try:
                    self._try_commit(appends, as_one)
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
                    if isinstance(error, OutcomeUnknown):
                        append.keep()
                    else:
                        append.drop()
                    append.receipt.set_exception(error)

    def _try_commit(self, appends: list[Append], as_one: bool) -> None:
        """Number the appends after the newest snapshot and commit them as its next version; none of them when one is refused `as_one`."""
        group = _Group(self._store, self._config, self._producers)
        refused: list[tuple[Append, Exception]] = []
        try:
            for append in appends:
                try:
                    takes = group.check(append)
                except (RequestError, NotFound, TryAgain) as error:
                    # It may be refused for what came before it in this group: it is told when that is committed.
                    refused.append((append, error))
                    continue
                if takes:
                    group.place(append)
            staged = [] if refused and as_one else group.finish()
            version = group.base.table_version
            if staged or (group.numbers and not (refused and as_one)):
                version = self._store.commit(group.base, staged, group.numbers)
            elif refused and self._store.refresh() is not group.base:
                raise Conflict("another server has committed meanwhile")  # which may be just what was missing
            elif refused and as_one:
                raise refused[0][1]
        except BaseException as error:
            if isinstance(error, OutcomeUnknown):
                for append in group.duplicates:
                    append.drop()
            else:
                group.abandon()
            raise
        try:
            self._answer(group, version, refused)
        except Exception as error:  # everything is durable, and no file may go
            log.exception("answering appends of table version %d", version)
            raise OutcomeUnknown(f"the commit of table_version {version} was made; its receipts are lost") from error

    def _answer(self, group: _Group, version: int, refused: list[tuple[Append, Exception]]) -> None:
        for append, first_offset in group.placed:
            append.keep()
            receipt = Receipt(append.topic, first_offset, append.entries, version, append.origin.sequence)
            if append.key is not None:
                self._producers.remember(append.key, receipt, append.origin.principal)
            append.receipt.set_result(receipt)
        for append in group.duplicates:
            append.drop()
            try:
                append.receipt.set_result(self._producers.original(append, group.base, version))
            except OutOfOrder as error:
                append.receipt.set_exception(error)
        for append, reason in refused:
            append.refuse(reason)


class _Producers:
    """What the log knows of its producers. The newest number and epoch are the table's; receipts are remembered here."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._receipts: OrderedDict[tuple[str, str, int, int], tuple[Receipt, str | None]] = OrderedDict()

    def last(self, base: Snapshot, topic: str, producer: str) -> tuple[int, int]:
        """Return (epoch, sequence) of the producer's newest append to the topic; the sequence is -1 before the first."""
        epoch, sequence = self._store.numbers(base, f"epoch/{topic}/{producer}", f"producer/{topic}/{producer}")
        return epoch or 0, -1 if sequence is None else sequence

    def remember(self, key: tuple[str, str, int, int], receipt: Receipt, principal: str | None) -> None:
        remember(self._receipts, key, (receipt, principal), RECEIPTS_KEPT)

    def original(self, append: Append, snapshot: Snapshot, table_version: int) -> Receipt:
        """Return the receipt of the append that this one repeats, as far as it can still be told.

        Raises OutOfOrder when another principal wrote it under the producer's name: then it is no repetition, and is not written.
        """
        assert append.key is not None
        receipt, principal = self._receipts.get(append.key, (None, None))
        if receipt is None:
            first_offset, entries = None, None
            with contextlib.suppress(OplogError):  # that it is a duplicate stands, whatever can be read of it
                first_offset, entries, principal = _find_run(append.key, snapshot) or (None, None, None)
            receipt = Receipt(append.topic, first_offset, entries, table_version, append.origin.sequence)
        if principal is not None and principal != append.origin.principal:
            raise OutOfOrder(
                f"topic {append.topic!r}: sequence {append.origin.sequence} of producer {append.origin.producer!r} is another principal's; "
                "nothing was written; choose another name for the producer"
            )
        return replace(receipt, duplicate=True)


def _find_run(key: tuple[str, str, int, int], snapshot: Snapshot) -> tuple[int, int, str | None] | None:
    """Look the newest records through, backwards, for the run of entries that an append wrote: (first offset, entries, principal)."""
    topic, *wanted = key
    found: tuple[int, int, str | None] | None = None
    left = RECORDS_SEARCHED_MAX
    for file in reversed(snapshot.topics[topic].files if topic in snapshot.topics else ()):
        for record in reversed(snapshot.store.records(file)):
            end = record.first_offset + record.entries
            for owner in reversed(record.appends):
                start = end - owner["entries"]
                if [owner["producer"], owner["epoch"], owner["sequence"]] == wanted:
                    found = (start, (found[1] if found else 0) + owner["entries"], owner["principal"])
                elif found is not None:
                    return found
                end = start
            left -= 1
            if left == 0 and found is None:
                return None
    return found


class _Group:
    """Appends that share a commit, numbered from one snapshot. Built again from scratch after a conflict."""

    def __init__(self, store: Store, config: Config, producers: _Producers) -> None:
        self.base = store.snapshot()
        self.placed: list[tuple[Append, int]] = []
        self.duplicates: list[Append] = []
        self.numbers: dict[str, int] = {}
        self._producers = producers
        self._last: dict[tuple[str, str], tuple[int, int]] = {}
        self._next_offsets: dict[str, int] = {}
        self._store = store
        self._config = config
        self._schemas: dict[str, pa.Schema] = {}
        self._event_times: dict[str, str | None] = {}
        self._keys: dict[str, tuple[str, ...]] = {}
        self._fitting: dict[str, set[str]] = {}
        self._new_schemas: dict[tuple[str, str, int], pa.Schema | None] = {}
        self._ended: Counter[str] = Counter()
        self._begun: dict[str, int] = {}  # how many were placed before the topic ended in this group
        self._gathering: dict[str, list[Append]] = {}
        self._files: list[tuple[StagedFile, int]] = []
        self._ours: list[StagedFile] = []

    def check(self, append: Append) -> bool:
        """Whether the append is to be placed; a duplicate is not. Raises what is wrong with it: then it is not in the group."""
        topic = append.topic
        exists = topic in self._schemas or self._known(topic) is not None
        if append.role is Role.ENDS:
            if not exists:
                raise NotFound(f"topic {topic!r} does not exist; nothing was written")
            return True
        if self._is_duplicate(append):
            self._check_kept(append)
            self.duplicates.append(append)
            return False
        if append.role is Role.BEGINS and exists:
            raise OutOfOrder(f"topic {topic!r} exists already; nothing was written")
        expected = append.origin.expected_offset
        if expected is not None and expected != self._next(topic):
            raise OutOfOrder(f"topic {topic!r} ends at offset {self._next(topic)}, not at {expected}; nothing was written")
        if append.staged is not None and append.event_time != self._event_time(append):
            raise TryAgain(f"topic {topic!r}: its event-time column was settled meanwhile; nothing was written; try again")
        if append.role is Role.REPLACES:
            self._end(topic)  # nothing is left that it could be refused for, unless there was nothing to end
        if append.schema_id not in self._fitting.get(topic, ()):
            self._fit(append)
        return True

    def _event_time(self, append: Append) -> str | None:
        """Return the topic's event-time column, which this append may be the first to settle."""
        if append.role is Role.REPLACES:
            return first_time(append.schema)
        known = self._known(append.topic)
        return self._event_times.get(append.topic) or (known.event_time if known else None) or first_time(append.schema)

    def place(self, append: Append) -> None:
        """Give an append that was checked its offsets. Raises TryAgain when the storage refuses: then the group is lost."""
        topic = append.topic
        first_offset = self._next(topic)
        self.placed.append((append, first_offset))
        if append.role is Role.ENDS:
            self._end(topic)
            return
        if append.staged is not None:
            self._flush(topic)
            self._files.append((append.staged, first_offset))
        elif append.entries:
            self._gathering.setdefault(topic, []).append(append)
        if append.entries:
            self._advance(topic, first_offset + append.entries)
        if append.origin.producer is not None and append.origin.sequence is not None:
            self._count(topic, append.origin.producer, append.origin.epoch, append.origin.sequence)

    def _known(self, topic: str) -> Topic | None:
        """Return the topic as it was before this group, if it has not ended in it."""
        return None if topic in self._ended else self.base.topics.get(topic)

    def _end(self, topic: str) -> None:
        """End a topic where it is now; whatever comes after it in this group begins it anew."""
        if topic not in self._schemas and self._known(topic) is None:
            return
        self._flush(topic)
        self._ended[topic] += 1
        self._begun[topic] = len(self.placed)
        self.numbers[f"start/{topic}"] = self._next(topic)
        self.numbers[f"drops/{topic}"] = self._drops(topic) + 1
        self._new_schemas[topic, "", self._ended[topic]] = None
        for settled in (self._schemas, self._event_times, self._keys, self._fitting):
            settled.pop(topic, None)

    def _fit(self, append: Append) -> None:
        """Bring the topic's schema and the append's together. Raises SchemaMismatch, or TooLarge for one topic too many."""
        topic = append.topic
        known = self._known(topic)
        current = self._schemas.get(topic) or (known.schema if known else None)
        if current is None:
            others = (self.base.topics.keys() - self._ended.keys()) | self._schemas.keys()
            check_room(topic, sum(not name.startswith("_") for name in others), self._config)
        merged = merge(topic, known, self._schemas.get(topic), append.schema, append.schema_id, self._config)
        self._check_widening(topic, current, append, merged)
        self._schemas[topic], self._event_times[topic] = merged, self._event_time(append)
        self._keys[topic] = self._keys.get(topic) or (known.keys if known else ()) or append.keys
        if known is None or append.schema_id not in known.schemas:
            declared = append.schema.with_metadata({KEYS_METADATA: json.dumps(append.keys)}) if append.keys else append.schema
            self._new_schemas.setdefault((topic, append.schema_id, self._ended[topic]), declared)
        if merged != current:
            self._fitting[topic] = set()
        if not _rescaled(append.schema, merged):  # else every append's values have to be looked at
            self._fitting.setdefault(topic, set()).add(append.schema_id)

    def _is_duplicate(self, append: Append) -> bool:
        """Whether the append is committed already. Raises OutOfOrder when it is neither that nor the next one."""
        origin, topic = append.origin, append.topic
        if origin.producer is None or origin.sequence is None:
            return False
        epoch, last = self._last.get((topic, origin.producer)) or self._producers.last(self.base, topic, origin.producer)
        if origin.epoch < epoch:
            raise OutOfOrder(
                f"topic {topic!r}: epoch {origin.epoch} of producer {origin.producer!r} is fenced off by epoch {epoch}; "
                "nothing was written; another process has taken over"
            )
        if origin.epoch > epoch:
            last = -1
        if origin.sequence > last + 1:
            raise OutOfOrder(
                f"topic {topic!r}: producer {origin.producer!r} sent sequence {origin.sequence}, expected {last + 1}; nothing was written; "
                "send what is missing first"
            )
        return origin.sequence <= last

    def _check_kept(self, append: Append) -> None:
        """Raise OutOfOrder for a duplicate of a producer that has not appended since its topic was dropped.

        A producer's numbers go on when its topic ends; one that counts anew from 0 must not lose what it sends.
        """
        topic, origin = append.topic, append.origin
        if self._drops(topic) > self._number(f"era/{topic}/{origin.producer}"):
            raise OutOfOrder(
                f"topic {topic!r} was dropped or replaced after producer {origin.producer!r} had sent sequence {origin.sequence}; "
                "nothing was written; go on counting, or count from 0 in a higher epoch"
            )

    def _drops(self, topic: str) -> int:
        """Return how often a topic has ended so far."""
        return self._number(f"drops/{topic}")

    def _number(self, name: str) -> int:
        found = self.numbers.get(name)
        return (self._store.numbers(self.base, name)[0] or 0) if found is None else found

    def _count(self, topic: str, producer: str, epoch: int, sequence: int) -> None:
        before, _ = self._last.get((topic, producer)) or self._producers.last(self.base, topic, producer)
        self._last[topic, producer] = epoch, sequence
        self.numbers[f"producer/{topic}/{producer}"] = sequence
        if epoch != before:
            self.numbers[f"epoch/{topic}/{producer}"] = epoch
        if drops := self._drops(topic):
            self.numbers[f"era/{topic}/{producer}"] = drops

    def _next(self, topic: str) -> int:
        known = self.base.topics.get(topic) or self.base.ended.get(topic)
        return self._next_offsets.get(topic, known.next_offset if known else 0)

    def _advance(self, topic: str, next_offset: int) -> None:
        self._next_offsets[topic] = self.numbers[f"topic/{topic}"] = next_offset

    def _check_widening(self, topic: str, current: pa.Schema | None, append: Append, merged: pa.Schema) -> None:
        """Refuse a change of time unit that some value, old or new, would not survive: reading must never fail later."""
        for name in _rescaled(append.schema, merged):
            for found in append.bounds():
                _check_rescale(topic, name, found, append.schema, merged)
        if current is None or not (rescaled := _rescaled(current, merged)):
            return
        placed = self.placed[self._begun.get(topic, 0) :]
        earlier = [(other.schema, found) for other, _ in placed if other.topic == topic for found in other.bounds()]
        for name in rescaled:
            for schema, found in earlier:
                _check_rescale(topic, name, found, schema, merged)
            for record in self.base.records(topic) if self._known(topic) is not None else ():
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
            schema, event_time = run[0].schema, self._event_times[topic]
            if run[0].record is not None:
                staged.add(with_times(run[0].record, schema, event_time))
                continue
            batches = [batch for append in run for batch in append.batches]
            owners = [append.owner for append in run]
            made = make_record(batches, schema, run[0].schema_id, owners, event_time, self._config.compression, self._keys[topic])
            staged.add(made)

    def finish(self) -> list[StagedFile]:
        """Write what is still in memory, register new schemas, number every file and make it durable."""
        for topic in list(self._gathering):
            self._flush(topic)
        if self._new_schemas:
            self._register()
        self._store.finish(self._files)
        for staged in self._ours:
            staged.close()  # unlike an append's own file, it is never numbered again
        return [staged for staged, _ in self._files]

    def _register(self) -> None:
        now = datetime.datetime.now(datetime.UTC)
        rows = []
        counts = {name: topic.registered for name, topic in (*self.base.topics.items(), *self.base.ended.items())}
        for (topic, fingerprint, _), schema in self._new_schemas.items():
            number = counts[topic] = counts.get(topic, 0) + 1
            rows.append(
                {
                    "topic": topic,
                    "schema_id": fingerprint,
                    "number": number,
                    "schema": None if schema is None else schema.serialize().to_pybytes(),
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
        self._advance(SCHEMAS_TOPIC, first + len(rows))

    def abandon(self) -> None:
        """Remove the files this group made; the appends' own files stay for another try."""
        for staged in self._ours:
            staged.abandon()


def _runs(appends: list[Append], config: Config) -> Iterator[list[Append]]:
    """Split appends into neighbours that one record can hold: same schema, within the record limits, not encoded yet."""
    run: list[Append] = []
    size = entries = 0
    for append in appends:
        over = size + append.nbytes > config.record_bytes_max or entries + append.entries > config.record_entries_max
        is_alone = append.record is not None or (run and run[0].record is not None)
        if run and (append.schema_id != run[0].schema_id or over or is_alone):
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
    keys: tuple[str, ...] = (),
) -> Record:
    """Encode batches of one schema as one record, with filters of those columns that are keys."""
    entries = sum(batch.num_rows for batch in batches)
    if len(batches) > 2 and entries <= JOINED_ENTRIES * len(batches):
        batches = list(codec.cut(codec.joined(batches)))  # many small appends: everything below costs by the batch
    content = codec.encode(batches, schema, compression)
    found = Parts.of(content, schema)
    parts = None if found is None else found.written()
    digest = codec.digest(content if parts is None else pa.py_buffer(parts.encode()))
    bounds = codec.bounds(batches, schema)
    filters = filters_of(batches, keys, bounds)
    record = Record(entries, fingerprint, appends, bounds, None, None, digest, parts, filters, content)
    return with_times(record, schema, event_time)


def with_times(record: Record, schema: pa.Schema, event_time: str | None) -> Record:
    """Return the record with the bounds of its topic's event-time column."""
    known = event_time in schema.names and pa.types.is_timestamp(schema.field(event_time).type)
    low, high = codec.time_range(record.bounds, schema, event_time if known else None)
    return replace(record, min_time=low, max_time=high)


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
