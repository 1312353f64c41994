"""A topic of a snapshot as a table that DataFusion scans.

DataFusion takes any Python subclass of `pyarrow.dataset.Dataset` as a table. While planning it hands over the columns
it needs and the filters it could translate, and asks for fragments; each fragment becomes one partition of the scan
and is pulled batch by batch. Filters arrive with the promise that the table applies them fully, so every batch is
filtered here.

A scan narrows in steps, each cheaper than the next: files by the event-time range in the Delta log, records by the
bounds beside their content, columns by the projection; only then is content fetched, checked and decoded. Decoded
columns are kept in a cache bounded in bytes: data files never change, so an entry can never be stale.
"""

from __future__ import annotations

import functools
import itertools
import operator
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow.fs import LocalFileSystem

from flight_oplog import codec
from flight_oplog.cache import ColumnCache, Decoded, ScanCounts
from flight_oplog.errors import Cancelled, CorruptLog
from flight_oplog.filters import Filter, candidates
from flight_oplog.keys import hashes_of, is_key, may_hold
from flight_oplog.records import DataFile, RecordMeta, binary_array, outer_row
from flight_oplog.schema import RECORD_SCHEMA
from flight_oplog.store import Snapshot, Topic
from flight_oplog.top import Top

_TIME = pa.timestamp("us", "UTC")
LOG_FIELDS = (
    pa.field("_offset", pa.int64()),
    pa.field("_timestamp", _TIME),
    pa.field("_producer", pa.string()),
    pa.field("_sequence", pa.int64()),
    pa.field("_schema_id", pa.string()),
)
_LOG_NAMES = frozenset(f.name for f in LOG_FIELDS)
_ROWS_PER_RECORDS_BATCH = 1024
# What a filter leaves of a record is joined up to this: a batch has its price, however small; copying has one too.
_JOINED_ROWS = 32_768
_JOINED_BYTES = 1 << 18
# So few rows of a record are cut out one by one; and few rows wait this long for company.
_SINGLE_ROWS = 64
_GATHERING_SECONDS = 0.005
# How long one statement may spend on making indexes of texts that are looked for again and again.
INDEXING_SECONDS = 0.03
_RUNS_FROM = 16
_SPANS_FROM = 32
VIEW_BYTES = 12
# Records of fewer entries on average are not dealt out over the cores; nor are texts of files with fewer shown as views.
SHARED_ENTRIES = 4096

_FORMAT = ds.IpcFileFormat()
_FILESYSTEM = LocalFileSystem()


@dataclass
class ScanContext:
    """What the scans of one statement share: how wide to run, when to stop, what went wrong, what was touched."""

    cache: ColumnCache
    partitions: int
    views: bool = False  # show short texts as string views, which DataFusion groups twice as fast
    offsets: tuple[int, int] | None = None  # show only entries within [first, last)
    top: Top | None = None  # the statement wants no more than these, of its only table
    indexing_seconds: float = 0.0
    looks_into: bool = True  # its optimized plan may be asked for: it is small
    tables: int = 1  # that it reads
    entries: int = 0  # of the records that its scans have to look at
    stopped: threading.Event = field(default_factory=threading.Event)
    failures: list[Exception] = field(default_factory=list)
    counts: dict[str, ScanCounts] = field(default_factory=dict)

    def begin_anew(self) -> None:
        """Forget what was counted: the statement is planned once more."""
        self.entries = 0
        for counts in self.counts.values():
            vars(counts).update(vars(ScanCounts()))


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring records, pruned together before each alone: a fragment costs Arrow 20 µs."""

    records: tuple[RecordMeta, ...]

    @property
    def key(self) -> str:
        return "+".join(record.key for record in self.records)


class _Columns:
    """Columns of one record as a query sees them, in the pieces of `lengths` rows that they are stored in."""

    def __init__(self, schema: pa.Schema, lengths: Sequence[int], stored: dict[str, list[pa.Array]], own: dict[str, pa.Array]) -> None:
        self.lengths = lengths
        self._schema, self._stored, self._own = schema, stored, own

    def array(self, name: str, place: int) -> pa.Array:
        return codec.recast(self._piece(name, place), self._schema.field(name).type)

    def arrays(self, name: str) -> list[pa.Array]:
        return [self.array(name, place) for place in range(len(self.lengths))]

    def some(self, name: str, place: int, rows: np.ndarray) -> pa.Array:
        """Return some values of a piece, whose places in it rise; neighbours are not copied."""
        piece, first = self._piece(name, place), int(rows[0])
        found = piece.slice(first, len(rows)) if rows[-1] - first == len(rows) - 1 else piece.take(pa.array(rows))
        return codec.recast(found, self._schema.field(name).type)

    def singly(self, name: str, places: list[int], rows: list[int]) -> list[pa.Array]:
        """Return single values, each by its piece and its place in that."""
        pieces = {place: self._piece(name, place) for place in {*places}}
        found = [pieces[place].slice(row, 1) for place, row in zip(places, rows, strict=True)]
        kind = self._schema.field(name).type
        return found if found[0].type == kind else [codec.recast(value, kind) for value in found]

    def _piece(self, name: str, place: int) -> pa.Array:
        if name in self._own:
            return self._own[name].slice(sum(self.lengths[:place]), self.lengths[place])
        found = self._stored.get(name)
        return pa.nulls(self.lengths[place], self._schema.field(name).type) if found is None else found[place]


class _Few:
    """Gathers rows from here and there into batches: a batch has its price, however small; copying has one too.

    With a filter, only those of them that pass it come out.
    """

    def __init__(self, projected: pa.Schema, schema: pa.Schema, filter: Filter | None) -> None:
        self.names = [*projected.names, *(key for key in (filter.keys if filter else ()) if key not in projected.names)]
        self._projected, self._filter = projected, filter
        self._gathered_schema = pa.schema([schema.field(name) for name in self.names])
        self._since = time.monotonic()
        self._clear()

    def _clear(self) -> None:
        self._gathered: dict[str, list[pa.Array]] = {name: [] for name in self.names}
        self._rows = self._bytes = 0

    def add(self, columns: _Columns, rows: np.ndarray) -> Iterator[pa.RecordBatch]:
        """Take rows of a record, whose places rise; yield what is enough for a batch."""
        ends = np.cumsum(columns.lengths)
        if len(rows) <= _SINGLE_ROWS:
            places = np.searchsorted(ends, rows, "right")
            local = (rows - (ends - columns.lengths)[places]).tolist()
            for name, gathered in self._gathered.items():
                gathered.extend(columns.singly(name, places.tolist(), local))
            self._rows += len(rows)
        else:
            yield from self._add_many(columns, rows, ends)
        if self._rows >= _JOINED_ROWS or time.monotonic() - self._since > _GATHERING_SECONDS:
            yield from self.taken()

    def _add_many(self, columns: _Columns, rows: np.ndarray, ends: np.ndarray) -> Iterator[pa.RecordBatch]:
        cuts = [0, *np.searchsorted(rows, ends).tolist()]
        for place, end in enumerate(ends.tolist()):
            if cuts[place + 1] > cuts[place]:
                local = rows[cuts[place] : cuts[place + 1]] - (end - columns.lengths[place])
                for name, gathered in self._gathered.items():
                    gathered.append(columns.some(name, place, local))
                    self._bytes += gathered[-1].nbytes
                self._rows += len(local)
                if self._rows >= _JOINED_ROWS or self._bytes >= _JOINED_BYTES:
                    yield from self.taken()

    def taken(self) -> Iterator[pa.RecordBatch]:
        """Yield what was gathered."""
        if self._rows:
            arrays = [pa.concat_arrays(gathered) for gathered in self._gathered.values()]
            batch = codec.with_rows(arrays, self._gathered_schema, self._rows)
            if self._filter is not None:
                batch = batch.take(pa.array(self._filter.passing([batch])))
            if batch.num_rows:
                shown = [_as(batch.column(f.name), f.type) for f in self._projected]
                yield codec.with_rows(shown, self._projected, batch.num_rows)
            self._clear()
        self._since = time.monotonic()


class _Scanner:
    """The part of a pyarrow Scanner that DataFusion uses."""

    def __init__(self, schema: pa.Schema, columns: Sequence[str] | None, batches: Callable[[pa.Schema], Iterator[pa.RecordBatch]]) -> None:
        self.projected_schema = schema if columns is None else pa.schema([schema.field(name) for name in columns])
        self._batches = batches

    def to_batches(self) -> Iterator[pa.RecordBatch]:
        return self._batches(self.projected_schema)


class _Fragment:
    """One partition of a scan."""

    def __init__(self, table: _Table | RowsTable, records: Sequence[RecordMeta], filter: Filter | None = None) -> None:
        self._table = table
        self._records = records
        self._filter = filter

    def scanner(self, schema: Any = None, columns: Any = None, filter: Any = None, batch_size: Any = None, **_: Any) -> _Scanner:
        def batches(projected: pa.Schema) -> Iterator[pa.RecordBatch]:
            try:
                found = self._table.scan(self._records, projected, self._filter)
                if batch_size is None or batch_size >= _JOINED_ROWS:
                    yield from found
                else:  # the statement makes large values of them
                    for batch in found:
                        yield from (batch.slice(row, batch_size) for row in range(0, batch.num_rows, batch_size))
            except Exception as error:
                self._table.context.failures.append(error)
                raise

        return _Scanner(self._table.schema, columns, batches)


class RowsTable(ds.Dataset):
    """A small table of the log's own, as `system` shows them. pyarrow's own in-memory dataset cannot be empty here."""

    def __init__(self, rows: pa.RecordBatch, context: ScanContext) -> None:
        self._rows = rows
        self.context = context

    @property
    def schema(self) -> pa.Schema:
        return self._rows.schema

    def scanner(self, columns: Sequence[str] | None = None, filter: Any = None, **_: Any) -> _Scanner:
        return _Scanner(self.schema, columns, lambda projected: iter(()))

    def get_fragments(self, filter: pc.Expression | None = None) -> Iterator[_Fragment]:
        return iter([_Fragment(self, [], None if filter is None else Filter(filter, ()))])

    def scan(self, records: Sequence[RecordMeta], projected: pa.Schema, filter: Filter | None) -> Iterator[pa.RecordBatch]:
        rows = self._rows if filter is None else self._rows.filter(filter.expression)
        yield codec.with_rows([rows.column(name) for name in projected.names], projected, rows.num_rows)


class _Table(ds.Dataset):
    """Base of the tables over a topic: `schema`, and batches of it for a run of records."""

    _shows_rows = False  # of the outer table, and not entries

    def __init__(self, snapshot: Snapshot, topic: Topic, schema: pa.Schema, context: ScanContext, label: str) -> None:
        # pyarrow's own __init__ refuses subclasses; nothing of it is needed.
        self._snapshot = snapshot
        self._topic = topic
        self._plain = self._schema = schema  # as stored and filtered; as shown to DataFusion
        self.context = context
        self.counts = context.counts.setdefault(f"{label}.{topic.name}", ScanCounts())

    @property
    def schema(self) -> pa.Schema:
        return self._schema

    def scanner(self, columns: Sequence[str] | None = None, filter: Any = None, **_: Any) -> _Scanner:
        return _Scanner(self._schema, columns, lambda projected: iter(()))

    def get_fragments(self, filter: pc.Expression | None = None) -> Iterator[_Fragment]:
        try:
            # A filter on a text shown as a view does not bind to the plain text: the statement is planned without views.
            wanted = None if filter is None else Filter.of(filter, self._plain)
            records = self._surviving(wanted)
            if wanted is not None:
                wanted.check(self._plain, records)
        except Exception as error:
            self.context.failures.append(error)
            raise
        before = np.cumsum([record.entries for record in records])
        entries = int(before[-1]) if len(records) else 0
        self.context.entries += entries
        # Small records are a Python thread's work, not a core's: two would wait for each other.
        partitions = self.context.partitions if entries >= SHARED_ENTRIES * len(records) else 1
        return iter([_Fragment(self, dealt, wanted) for dealt in _deal(records, before, partitions)])

    def _surviving(self, filter: Filter | None) -> Sequence[RecordMeta]:
        offsets = self.context.offsets
        self.context.cache.let_go(self._topic.name, self._snapshot.table_version, self._topic.files)
        files = self._topic.files if offsets is None else self._topic.files_within(*offsets)
        kept = files if filter is None or len(files) == 1 else self._prune_files(filter, files)
        self._snapshot.store.prefetch(kept)
        found = [self._snapshot.records_of(self._topic, file, self._shows_rows) for file in kept]
        records: Sequence[RecordMeta] = list(itertools.chain.from_iterable(found))
        if offsets is not None:
            first, last = offsets
            records = sorted((r for r in records if r.first_offset < last and r.first_offset + r.entries > first), key=_by_offset)
        survivors = records
        if filter is not None:
            if offsets is None and len(records) >= _SPANS_FROM:
                survivors = self._within_spans(filter, files if len(kept) == len(files) else kept, found, records)
            if survivors is records or not self._spans_tell(filter):
                survivors = self._prune_records(filter, survivors)
            survivors = self._prune_keys(filter, survivors)
        self.counts.files += len(self._topic.files)
        self.counts.files_pruned += len(self._topic.files) - len(kept)
        considered = sum(map(_rows, records))
        self.counts.records += considered
        self.counts.records_pruned += considered - sum(map(_rows, survivors))
        return survivors

    def _prune_files(self, filter: Filter, files: Sequence[DataFile]) -> Sequence[DataFile]:
        """Prune files by what the Delta log says of them: all at once where there are many, then one by one."""
        name = self._event_time
        if name is None or name not in filter.keys:
            return files  # the Delta log knows nothing of the filter's columns
        if len(files) >= _SPANS_FROM:
            low, high = filter.spans(self._plain).get(name, (None, None))
            earliest, latest = self.context.cache.times(files)
            meets = np.ones(len(files), bool)
            if low is not None:
                meets &= latest >= low
            if high is not None:
                meets &= earliest <= high
            files = [files[place] for place in np.flatnonzero(meets).tolist()]
        return self._prune(filter, files, self._file_guarantee)

    @property
    def _event_time(self) -> str | None:
        """The column that the Delta log has the bounds of, if it has them of one."""
        return None

    def _prune(self, filter: Filter, items: Sequence[Any], guarantee: Callable[..., Any]) -> list[Any]:
        """Return the items whose guarantee does not rule out `filter`, by Arrow's own simplification of expressions.

        Arrow offers it only through the fragments of a file system dataset; these fragments name no real files.
        """
        names = filter.keys
        shape = (*names, *(str(self._plain.field(name).type) for name in names))
        by_key = {item.key: item for item in items}
        fragments = [self.context.cache.fragment(shape, key, functools.partial(guarantee, item, names)) for key, item in by_key.items()]
        dataset = ds.FileSystemDataset(fragments, self._plain, _FORMAT, _FILESYSTEM)
        return [by_key[fragment.path] for fragment in dataset.get_fragments(filter.expression)]

    def _prune_records(self, filter: Filter, records: Sequence[RecordMeta]) -> list[RecordMeta]:
        """Prune runs of neighbours by what holds for all of them, then the records of those that are left."""
        if len(records) >= _RUNS_FROM:
            size = 1 << len(records).bit_length() // 2  # about as many runs as records in one
            runs = [_Run(tuple(records[start : start + size])) for start in range(0, len(records), size)]
            records = [record for run in self._prune(filter, runs, self._run_guarantee) for record in run.records]
        return self._prune(filter, records, self._record_guarantee)

    def _within_spans(
        self, filter: Filter, files: Sequence[DataFile], found: Sequence[Sequence[RecordMeta]], records: Sequence[RecordMeta]
    ) -> Sequence[RecordMeta]:
        """Return the records, here of each file, whose numbers the filter may pass: all at once, before each is looked at."""
        return records

    def _prune_keys(self, filter: Filter, records: Sequence[RecordMeta]) -> Sequence[RecordMeta]:
        """Prune records by the filters of their keys: those that cannot hold what the filter wants."""
        return records

    def _spans_tell(self, filter: Filter) -> bool:
        """Whether `_within_spans` leaves no more to be pruned."""
        return False

    def _file_guarantee(self, file: DataFile, names: Sequence[str]) -> pc.Expression | None:
        """What holds for every entry of a file, said of the columns `names`; None when nothing is known."""
        return None

    def _run_guarantee(self, run: _Run, names: Sequence[str]) -> pc.Expression | None:
        return None

    def _record_guarantee(self, record: RecordMeta, names: Sequence[str]) -> pc.Expression | None:
        return None

    def scan(self, records: Sequence[RecordMeta], projected: pa.Schema, filter: Filter | None) -> Iterator[pa.RecordBatch]:
        """Yield filtered batches of exactly the projected columns."""
        raise NotImplementedError


class EntriesTable(_Table):
    """A topic's entries: exactly the clients' columns, or with the log's own beside them."""

    def __init__(self, snapshot: Snapshot, topic: Topic, context: ScanContext, with_log_columns: bool) -> None:
        schema = pa.schema([*topic.schema, *LOG_FIELDS]) if with_log_columns else topic.schema
        super().__init__(snapshot, topic, schema, context, "log" if with_log_columns else "public")
        self._read: set[str] = set()
        self._held: dict[str, Decoded | None] = {}  # what is known of the records that partitions look at just now
        if context.views and topic.entries >= SHARED_ENTRIES * len(topic.files):  # showing a small file's texts so costs more than it saves
            self._schema = pa.schema([f.with_type(pa.string_view()) if self._looks_short(f) else f for f in schema])

    @property
    def _event_time(self) -> str | None:
        name = self._topic.event_time
        # The Delta log keeps microseconds; other units are pruned by the records' own bounds.
        return name if name is not None and self._plain.field(name).type.unit == "us" else None

    def _looks_short(self, column: pa.Field) -> bool:
        """Whether a column holds texts of at most 12 bytes, going by one record's bounds: views keep such texts inline.

        Only speed hangs on it, so a guess will do.
        """
        if column.type != pa.string() or not self._topic.files:
            return False
        limits = self._snapshot.store.records(self._topic.files[-1])[-1].bounds.get(column.name, {})
        return "min" in limits and max(len(limits["min"].encode()), len(limits["max"].encode())) <= VIEW_BYTES

    def _within_spans(
        self, filter: Filter, files: Sequence[DataFile], found: Sequence[Sequence[RecordMeta]], records: Sequence[RecordMeta]
    ) -> Sequence[RecordMeta]:
        meets = np.ones(len(records), bool)
        for name, (low, high) in filter.spans(self._plain).items():
            if (kind := self._plain.field(name).type) == pa.uint64():
                continue  # its bounds do not fit the numbers below
            lows, highs = self.context.cache.limits_of_all(files, found, name, kind, self._topic.schemas)
            if low is not None:
                meets &= highs >= low
            if high is not None:
                meets &= lows <= high
        return [records[place] for place in np.flatnonzero(meets).tolist()]

    def _spans_tell(self, filter: Filter) -> bool:
        if not filter.range:
            return False
        [name] = filter.keys
        stored = {schema.field(name).type for schema in self._topic.schemas.values() if name in schema.names}
        return stored <= {self._plain.field(name).type} and stored != {pa.uint64()}

    def _prune_keys(self, filter: Filter, records: Sequence[RecordMeta]) -> Sequence[RecordMeta]:
        for name in (name for name in self._topic.keys if name in filter.keys and is_key(self._plain.field(name).type)):
            values = filter.among(self._plain, name)
            if values is not None:
                kinds = [self._kind(record, name) for record in records]
                hashes = {kind: None if kind is None else hashes_of(values, kind) for kind in {*kinds}}
                filters = self.context.cache.filters(self._snapshot, records, name, self.counts)
                records = [r for r, kind, bits in zip(records, kinds, filters, strict=True) if _may_hold(bits, hashes[kind])]
        return records

    def _kind(self, record: RecordMeta, name: str) -> pa.DataType | None:
        """Return the type that a column has in a record, if it is there."""
        stored = self._stored(record)
        return stored.field(name).type if name in stored.names else None

    def _file_guarantee(self, file: DataFile, names: Sequence[str]) -> pc.Expression | None:
        name = self._event_time
        if name is None or name not in names or file.min_time is None or file.max_time is None:
            return None
        kind = self._plain.field(name).type
        low, high = (pa.scalar(time, _TIME).cast(pa.int64()).cast(kind) for time in (file.min_time, file.max_time))
        return _between(name, low, high)

    def _record_guarantee(self, record: RecordMeta, names: Sequence[str]) -> pc.Expression | None:
        return self._guarantee([record], self._stored(record), names)

    def _run_guarantee(self, run: _Run, names: Sequence[str]) -> pc.Expression | None:
        stored = {record.schema_id: self._stored(record) for record in run.records}
        return self._guarantee(run.records, next(iter(stored.values())), names) if len(stored) == 1 else None

    def _guarantee(self, records: Sequence[RecordMeta], stored: pa.Schema, names: Sequence[str]) -> pc.Expression | None:
        """What holds for every entry of neighbouring records of one stored schema."""
        parts = []
        for name in names:
            limits = [record.bounds.get(name, {}) for record in records]
            if any("min" not in of_record for of_record in limits):
                continue
            kind, target = stored.field(name).type, self._plain.field(name).type
            low, high = (codec.bound_scalar(codec.outermost(limits, end, kind), kind).cast(target) for end in ("min", "max"))
            nulls = any(of_record["nulls"] for of_record in limits)
            parts.append(_between(name, low, high) if nulls else (pc.field(name) >= low) & (pc.field(name) <= high))
        if "_offset" in names and "_offset" not in stored.names:
            offset = pc.field("_offset")
            parts.append((offset >= records[0].first_offset) & (offset < records[-1].first_offset + records[-1].entries))
        return functools.reduce(operator.and_, parts) if parts else None

    def scan(self, records: Sequence[RecordMeta], projected: pa.Schema, filter: Filter | None) -> Iterator[pa.RecordBatch]:
        if filter is None and not projected.names and self.context.offsets is None:  # COUNT(*): the records' numbers are enough
            yield codec.with_rows([], projected, sum(record.entries for record in records))
            return
        top = self.context.top
        if top is not None and (not top.takes(self._plain) or (filter is not None and filter.wanted is not None)):
            top = None
        few = _Few(projected, self._plain, filter if filter is not None and filter.wanted is not None else None)
        names = projected.names if filter is None else filter.keys if filter.wanted is None else filter.wanted[:1]
        for record, best in self._ahead(records, names) if top is None else top.in_order(records, self._plain, self._stored):
            if self.context.stopped.is_set():
                return
            if top is not None and top.is_behind(best):
                continue
            self._held.setdefault(record.key, None)
            rows = self._within(record, None if filter is None else self._matching(record, filter))
            if top is not None and (rows is None or len(rows)):
                rows = top.narrowed(self.columns(record, [top.column]).arrays(top.column), rows, may_be_nan=best is None)
            if rows is None:
                yield from few.taken()
                for batch in self.batches(record, projected.names):
                    if self.context.stopped.is_set():
                        return
                    yield _shown(batch, projected)
            elif len(rows):
                yield from few.add(self.columns(record, few.names), rows)
            self._held.pop(record.key, None)
        yield from few.taken()

    def _ahead(self, records: Sequence[RecordMeta], names: Sequence[str]) -> Iterator[tuple[RecordMeta, None]]:
        """Yield records; while one is looked at, columns of those after it are read.

        Not before the second is asked for: a LIMIT may be content with the first.
        """
        coming, waiting = iter(records), deque[tuple[RecordMeta, Future[Decoded] | None]]()
        yield from ((record, None) for record in itertools.islice(coming, 1))
        try:
            while True:
                for record in itertools.islice(coming, self._snapshot.store.reads_ahead + 1 - len(waiting)):
                    waiting.append((record, self._fetch(record, names)))
                if not waiting:
                    return
                record, fetched = waiting.popleft()
                if fetched is not None:
                    self._held[record.key] = fetched.result()
                yield record, None
        finally:
            for _, fetched in waiting:
                if fetched is not None:
                    fetched.cancel()

    def _fetch(self, record: RecordMeta, names: Sequence[str]) -> Future[Decoded] | None:
        """Begin to read columns of a record, unless they are in memory."""
        of_entries, cache = self._of_entries(record, names), self.context.cache
        if not of_entries or cache.holds(record, of_entries) or self._snapshot.store.reads_at_once(record):
            return None
        return cache.readers.submit(cache.columns, self._snapshot, record, of_entries, self.counts)

    def _matching(self, record: RecordMeta, filter: Filter) -> np.ndarray | None:
        """Return the places of the record's entries that pass, or None for all; decodes only the filter's columns.

        Where the filter wants a text, of those that begin like it: few are left then, and looked at later, together.
        """
        if filter.wanted is None:
            if filter.range:
                found = filter.within(self.columns(record, filter.keys).arrays(filter.keys[0]))
            else:
                found = filter.passing(self.batches(record, filter.keys))
            return None if len(found) == record.entries else found
        name, text = filter.wanted
        texts = self.columns(record, [name]).arrays(name)
        began = time.monotonic()
        index = self.context.cache.index(record, name, texts, may_make=self.context.indexing_seconds < INDEXING_SECONDS)
        self.context.indexing_seconds += time.monotonic() - began
        return candidates(texts, text) if index is None else index.candidates(text)

    def _within(self, record: RecordMeta, rows: np.ndarray | None) -> np.ndarray | None:
        """Return those of the record's places (None: all of them) that lie within the offsets asked for."""
        if self.context.offsets is None:
            return rows
        first, last = (offset - record.first_offset for offset in self.context.offsets)
        if rows is None:
            return None if first <= 0 and last >= record.entries else np.arange(max(0, first), min(record.entries, last))
        return rows[(rows >= first) & (rows < last)]

    def _stored(self, record: RecordMeta) -> pa.Schema:
        try:
            return self._topic.schemas[record.schema_id]
        except KeyError:
            raise CorruptLog(f"{record.where}: its schema_id is not registered; restore the file") from None

    def batches(self, record: RecordMeta, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        schema = pa.schema([self._plain.field(name) for name in names])
        if not names:
            yield codec.with_rows([], schema, record.entries)
            return
        columns = self.columns(record, names)
        for place in range(len(columns.lengths)):
            yield pa.RecordBatch.from_arrays([columns.array(name, place) for name in names], schema=schema)

    def _of_entries(self, record: RecordMeta, names: Sequence[str]) -> list[str]:
        """Return those of some columns that a record's content has."""
        stored = self._stored(record)
        return [name for name in names if name in stored.names and name not in _LOG_NAMES]

    def columns(self, record: RecordMeta, names: Sequence[str]) -> _Columns:
        """Return columns of a record, from memory or decoded now."""
        of_entries = self._of_entries(record, names)
        if not of_entries:
            return _Columns(self._plain, [record.entries], {}, _log_columns(record, names))
        if record.key not in self._read:
            self._read.add(record.key)
            self.counts.records_read += record.rows
        decoded = self.context.cache.columns(self._snapshot, record, of_entries, self.counts, self._held.get(record.key))
        if record.key in self._held:
            self._held[record.key] = decoded
        return _Columns(self._plain, decoded.lengths, decoded.columns, _log_columns(record, names))


class RecordsTable(_Table):
    """The outer rows of a topic. Content is fetched only when the query asks for it."""

    _shows_rows = True

    def __init__(self, snapshot: Snapshot, topic: Topic, context: ScanContext) -> None:
        super().__init__(snapshot, topic, RECORD_SCHEMA, context, "records")

    def scan(self, records: Sequence[RecordMeta], projected: pa.Schema, filter: Filter | None) -> Iterator[pa.RecordBatch]:
        names = list(projected.names)
        wanted = names + [name for name in (filter.keys if filter else ()) if name not in names]
        step = 1 if "content" in wanted else _ROWS_PER_RECORDS_BATCH
        schema = pa.schema([self._schema.field(name) for name in wanted])
        contents = self._snapshot.store.contents(records)
        for start in range(0, len(records), step):
            if self.context.stopped.is_set():
                return
            rows = [self._row(record, wanted, contents) for record in records[start : start + step]]
            arrays = [
                binary_array([row["content"] for row in rows]) if f.name == "content" else pa.array([row[f.name] for row in rows], f.type)
                for f in schema
            ]
            batch = codec.with_rows(arrays, schema, len(rows))
            if filter is not None:
                batch = batch.filter(filter.expression)
            if batch.num_rows:
                yield codec.with_rows([batch.column(name) for name in names], projected, batch.num_rows)

    def _row(self, record: RecordMeta, wanted: Sequence[str], contents: Iterator[pa.Buffer]) -> dict[str, Any]:
        row = {"topic": self._topic.name} | outer_row(record)
        if "filters" in wanted:
            has_some = any("filter" in limits for limits in record.bounds.values())
            row["filters"] = self._snapshot.store.filters([record])[0] if has_some else None
        if "content" in wanted:
            self.counts.records_read += 1
            content = next(contents)
            self.counts.content_bytes += content.size
            row["content"] = content
        return row


def topic_batches(
    snapshot: Snapshot,
    topic: Topic,
    start: int,
    bytes_max: int,
    stopped: Callable[[], bool] = lambda: False,
    columns: Sequence[str] | None = None,
    cache: ColumnCache | None = None,
) -> Iterator[pa.RecordBatch]:
    """Yield a topic's entries from offset `start` on, all columns or some, in offset order and without SQL."""
    table = EntriesTable(snapshot, topic, ScanContext(cache or ColumnCache(0), 1), with_log_columns=False)
    for record in snapshot.records(topic.name, start):
        if record.first_offset + record.entries <= start:
            continue
        skip = max(0, start - record.first_offset)
        for batch in table.batches(record, topic.schema.names if columns is None else columns):
            if stopped():
                raise Cancelled("the read was stopped")
            if skip < batch.num_rows:
                yield from codec.cut(batch.slice(skip), bytes_max, batch.num_rows)
            skip = max(0, skip - batch.num_rows)


def whole_of(snapshot: Snapshot, topic: Topic, function: str, column: str | None) -> pa.Scalar | None:
    """Return the count, min or max of a column of all of a topic, going by its records alone; None when they do not tell.

    Without a column, the count of its entries. Bounds of numbers and times are values that occur; those of texts are cut.
    """
    if column is None:
        return pa.scalar(topic.entries)
    if column not in topic.schema.names:
        return None
    kind = topic.schema.field(column).type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return None
    limits, present = [], 0
    for file in topic.files:
        for record in snapshot.records_of(topic, file):
            stored = topic.schemas.get(record.schema_id)
            if stored is None:
                return None
            found = record.bounds.get(column, {"nulls": record.entries} if column not in stored.names else {})
            if "nulls" not in found:
                return None
            present += record.entries - found["nulls"]
            if found["nulls"] < record.entries:
                if function != "count" and "min" not in found:
                    return None
                limits.append((stored.field(column).type, found))
    if function == "count":
        return pa.scalar(present)
    values = [codec.bound_scalar(found[function], stored).cast(kind) for stored, found in limits]
    if not values:
        return pa.scalar(None, kind)
    return pc.min_max(pa.array(values, kind))[function]


def topics_table(snapshot: Snapshot) -> pa.RecordBatch:
    """`system.topics`: one row a topic, from the Delta log alone."""
    rows = []
    for topic in sorted(snapshot.topics.values(), key=lambda topic: topic.name):
        # Another program may have put records that were dropped beside those that count: such files are looked into.
        whole = [file for file in topic.files if file.first_offset >= topic.start]
        mixed = [file for file in topic.files if file.first_offset < topic.start]
        parts = [record for file in mixed for record in snapshot.records_of(topic, file)]
        times = [(f.min_time, f.max_time) for f in whole] + [(r.min_time, r.max_time) for r in parts]
        known = bool(times) and all(low is not None and high is not None for low, high in times)
        rows.append(
            {
                "topic": topic.name,
                "entries": topic.entries,
                "first_offset": topic.first_offset,
                "next_offset": topic.next_offset,
                "columns": len(topic.schema),
                "keys": ", ".join(topic.keys) or None,
                "schemas": len(topic.schemas),
                "files": len(topic.files),
                "records": sum(file.records for file in whole) + len(parts),
                "file_bytes": sum(f.size for f in topic.files),
                "min_time": min(low for low, _ in times if low is not None) if known else None,
                "max_time": max(high for _, high in times if high is not None) if known else None,
            }
        )
    return pa.RecordBatch.from_pylist(rows, _TOPICS_SCHEMA)


_TOPICS_SCHEMA = pa.schema(
    [
        ("topic", pa.string()),
        ("entries", pa.int64()),
        ("first_offset", pa.int64()),
        ("next_offset", pa.int64()),
        ("columns", pa.int64()),
        ("keys", pa.string()),
        ("schemas", pa.int64()),
        ("files", pa.int64()),
        ("records", pa.int64()),
        ("file_bytes", pa.int64()),
        ("min_time", _TIME),
        ("max_time", _TIME),
    ]
)


def _log_columns(record: RecordMeta, names: Sequence[str]) -> dict[str, pa.Array]:
    """Return the log's own columns for all entries of a record."""
    if _LOG_NAMES.isdisjoint(names):
        return {}
    counts = [owner["entries"] for owner in record.appends]
    found: dict[str, pa.Array] = {}
    for name in (name for name in names if name in _LOG_NAMES):
        if name == "_offset":
            found[name] = pa.array(np.arange(record.first_offset, record.first_offset + record.entries))
        elif name == "_schema_id":
            found[name] = pa.repeat(pa.scalar(record.schema_id), record.entries)
        else:
            kind = next(f.type for f in LOG_FIELDS if f.name == name)
            values = pa.array([owner[name.removeprefix("_")] for owner in record.appends], kind)
            found[name] = values.take(pa.array(np.repeat(np.arange(len(counts)), counts)))
    return found


def _shown(batch: pa.RecordBatch, projected: pa.Schema) -> pa.RecordBatch:
    """Return a batch in the types DataFusion was told; only plain texts may have to become views."""
    if batch.schema.equals(projected) or not projected.names:
        return batch
    return pa.RecordBatch.from_arrays([_as(c, f.type) for c, f in zip(batch.columns, projected, strict=True)], schema=projected)


def _as(array: pa.Array, kind: pa.DataType) -> pa.Array:
    return array if array.type == kind else array.cast(kind)


def _may_hold(bits: memoryview | None, hashes: Sequence[int] | None) -> bool:
    return bits is None or hashes is None or any(may_hold(bits, hash) for hash in hashes)


_rows = operator.attrgetter("rows")


def _by_offset(record: RecordMeta) -> int:
    return record.first_offset


def _between(name: str, low: pa.Scalar, high: pa.Scalar) -> pc.Expression:
    """A column's guarantee: within [low, high] or null, in the form that Arrow's simplification understands."""
    column = pc.field(name)
    return ((column >= low) | column.is_null()) & ((column <= high) | column.is_null())


def _deal(records: Sequence[RecordMeta], before: np.ndarray, partitions: int) -> list[Sequence[RecordMeta]]:
    """Split records into at most `partitions` runs of neighbours with about the same number of entries; `before` adds these up."""
    if partitions <= 1 or len(records) <= 1:
        return [records]
    shares = [before[-1] * part / partitions for part in range(1, partitions)]
    cuts = [0, *(np.searchsorted(before, shares) + 1).tolist(), len(records)]
    return [records[start:end] for start, end in itertools.pairwise(cuts) if end > start]
