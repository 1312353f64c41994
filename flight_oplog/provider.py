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
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow.fs import LocalFileSystem

from flight_oplog import codec
from flight_oplog.cache import ColumnCache, Decoded, ScanCounts
from flight_oplog.datafile import DataFile, RecordMeta, binary_array, outer_row
from flight_oplog.errors import Cancelled, CorruptLog
from flight_oplog.filters import Filter
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
_RUNS_FROM = 16
VIEW_BYTES = 12

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
    stopped: threading.Event = field(default_factory=threading.Event)
    failures: list[Exception] = field(default_factory=list)
    counts: dict[str, ScanCounts] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring records, pruned together before each alone: a fragment costs Arrow 20 µs."""

    records: tuple[RecordMeta, ...]

    @property
    def key(self) -> str:
        return "+".join(record.key for record in self.records)


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
                yield from self._table.scan(self._records, projected, self._filter)
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
        return iter([_Fragment(self, dealt, wanted) for dealt in _deal(records, self.context.partitions)])

    def _surviving(self, filter: Filter | None) -> list[RecordMeta]:
        offsets = self.context.offsets
        files = self._topic.files if offsets is None else self._topic.files_within(*offsets)
        kept = files if filter is None or len(files) == 1 else self._prune(filter, files, self._file_guarantee)
        records = [record for file in kept for record in self._snapshot.records_of(self._topic, file)]
        if offsets is not None:
            first, last = offsets
            records = sorted((r for r in records if r.first_offset < last and r.first_offset + r.entries > first), key=_by_offset)
        survivors = records if filter is None else self._prune_records(filter, records)
        self.counts.files += len(self._topic.files)
        self.counts.files_pruned += len(self._topic.files) - len(kept)
        self.counts.records += len(records)
        self.counts.records_pruned += len(records) - len(survivors)
        return survivors

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
        if context.views:
            self._schema = pa.schema([f.with_type(pa.string_view()) if self._looks_short(f) else f for f in schema])

    def _looks_short(self, column: pa.Field) -> bool:
        """Whether a column holds texts of at most 12 bytes, going by one record's bounds: views keep such texts inline.

        Only speed hangs on it, so a guess will do.
        """
        if column.type != pa.string() or not self._topic.files:
            return False
        limits = self._snapshot.store.records(self._topic.files[-1])[-1].bounds.get(column.name, {})
        return "min" in limits and max(len(limits["min"].encode()), len(limits["max"].encode())) <= VIEW_BYTES

    def _file_guarantee(self, file: DataFile, names: Sequence[str]) -> pc.Expression | None:
        name = self._topic.event_time
        if name is None or name not in names or file.min_time is None or file.max_time is None:
            return None
        kind = self._plain.field(name).type
        if kind.unit != "us":  # the Delta log keeps microseconds; other units are pruned by the records' own bounds
            return None
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
        top = self.context.top if self.context.top is not None and self.context.top.takes(self._plain) else None
        for record, best in ((r, None) for r in records) if top is None else top.in_order(records, self._plain, self._stored):
            if top is not None and top.is_behind(best):
                continue
            rows = self._within(record, None if filter is None else self._matching(record, filter))
            if top is not None:
                column = pa.chunked_array([batch.column(0) for batch in self.batches(record, [top.column])])
                rows = top.narrowed(column, rows)
            if rows is not None and not len(rows):
                continue
            for batch in self._chosen(record, projected, rows):
                if self.context.stopped.is_set():
                    return
                yield _shown(batch, projected)

    def _matching(self, record: RecordMeta, filter: Filter) -> np.ndarray | None:
        """Return the places of the record's entries that pass, or None for all; decodes only the filter's columns."""
        found = filter.places(self.batches(record, filter.keys))
        return None if len(found) == record.entries else found

    def _within(self, record: RecordMeta, rows: np.ndarray | None) -> np.ndarray | None:
        """Return those of the record's places (None: all of them) that lie within the offsets asked for."""
        if self.context.offsets is None:
            return rows
        first, last = (offset - record.first_offset for offset in self.context.offsets)
        if rows is None:
            return None if first <= 0 and last >= record.entries else np.arange(max(0, first), min(record.entries, last))
        return rows[(rows >= first) & (rows < last)]

    def _chosen(self, record: RecordMeta, projected: pa.Schema, rows: np.ndarray | None) -> Iterator[pa.RecordBatch]:
        if rows is None:
            yield from self.batches(record, projected.names)
            return
        if not projected.names:
            yield codec.with_rows([], projected, len(rows))
            return
        start, few = 0, []
        for batch in self.batches(record, projected.names):
            end = start + batch.num_rows
            first, last = np.searchsorted(rows, (start, end))
            if last > first:
                few.append(_taken(batch, rows[first:last] - start))
                if sum(part.num_rows for part in few) >= _JOINED_ROWS or few[-1].nbytes >= _JOINED_BYTES:
                    yield codec.joined(few)
                    few = []
            start = end
        if few:
            yield codec.joined(few)

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
        stored = self._stored(record)
        of_entries = [name for name in names if name in stored.names and name not in _LOG_NAMES]
        if of_entries:
            self._read.add(record.key)
            self.counts.records_read = len(self._read)
            decoded = self.context.cache.columns(self._snapshot, record, of_entries, self.counts)
        else:
            decoded = Decoded([record.entries], {}, 0)
        own = _log_columns(record, [name for name in names if name in _LOG_NAMES])
        start = 0
        for place, rows in enumerate(decoded.lengths):
            columns = []
            for out in schema:
                if out.name in own:
                    columns.append(own[out.name].slice(start, rows))
                elif out.name in of_entries:
                    columns.append(codec.recast(decoded.columns[out.name][place], out.type))
                else:
                    columns.append(pa.nulls(rows, out.type))
            start += rows
            yield pa.RecordBatch.from_arrays(columns, schema=schema)


class RecordsTable(_Table):
    """The outer rows of a topic. Content is fetched only when the query asks for it."""

    def __init__(self, snapshot: Snapshot, topic: Topic, context: ScanContext) -> None:
        super().__init__(snapshot, topic, RECORD_SCHEMA, context, "records")

    def scan(self, records: Sequence[RecordMeta], projected: pa.Schema, filter: Filter | None) -> Iterator[pa.RecordBatch]:
        names = list(projected.names)
        wanted = names + [name for name in (filter.keys if filter else ()) if name not in names]
        step = 1 if "content" in wanted else _ROWS_PER_RECORDS_BATCH
        schema = pa.schema([self._schema.field(name) for name in wanted])
        for start in range(0, len(records), step):
            if self.context.stopped.is_set():
                return
            rows = [self._row(record, "content" in wanted) for record in records[start : start + step]]
            arrays = [
                binary_array([row["content"] for row in rows]) if f.name == "content" else pa.array([row[f.name] for row in rows], f.type)
                for f in schema
            ]
            batch = codec.with_rows(arrays, schema, len(rows))
            if filter is not None:
                batch = batch.filter(filter.expression)
            if batch.num_rows:
                yield codec.with_rows([batch.column(name) for name in names], projected, batch.num_rows)

    def _row(self, record: RecordMeta, with_content: bool) -> dict[str, Any]:
        row = {"topic": self._topic.name} | outer_row(record, record.first_offset)
        if with_content:
            self.counts.records_read += 1
            content = self._snapshot.store.content(record)
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
    counts = [owner["entries"] for owner in record.appends]
    found: dict[str, pa.Array] = {}
    for name in names:
        if name == "_offset":
            found[name] = pa.array(np.arange(record.first_offset, record.first_offset + record.entries))
        elif name == "_schema_id":
            found[name] = pa.repeat(pa.scalar(record.schema_id), record.entries)
        else:
            kind = next(f.type for f in LOG_FIELDS if f.name == name)
            values = pa.array([owner[name.removeprefix("_")] for owner in record.appends], kind)
            found[name] = values.take(pa.array(np.repeat(np.arange(len(counts)), counts)))
    return found


def _taken(batch: pa.RecordBatch, places: np.ndarray) -> pa.RecordBatch:
    """Return the rows at `places`, which rise; neighbours are not copied."""
    first, last = int(places[0]), int(places[-1])
    return batch.slice(first, len(places)) if last - first == len(places) - 1 else batch.take(pa.array(places))


def _shown(batch: pa.RecordBatch, projected: pa.Schema) -> pa.RecordBatch:
    """Return a batch in the types DataFusion was told; only plain texts may have to become views."""
    if batch.schema.equals(projected) or not projected.names:
        return batch
    columns = [c if c.type == f.type else c.cast(f.type) for c, f in zip(batch.columns, projected, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=projected)


def _by_offset(record: RecordMeta) -> int:
    return record.first_offset


def _between(name: str, low: pa.Scalar, high: pa.Scalar) -> pc.Expression:
    """A column's guarantee: within [low, high] or null, in the form that Arrow's simplification understands."""
    column = pc.field(name)
    return ((column >= low) | column.is_null()) & ((column <= high) | column.is_null())


def _deal(records: Sequence[RecordMeta], partitions: int) -> list[Sequence[RecordMeta]]:
    """Split records into at most `partitions` runs of neighbours with about the same number of entries."""
    total = sum(record.entries for record in records)
    if partitions <= 1 or len(records) <= 1:
        return [records]
    dealt: list[list[RecordMeta]] = [[]]
    given = 0
    for record in records:
        if given >= total * len(dealt) / partitions and len(dealt) < partitions:
            dealt.append([])
        dealt[-1].append(record)
        given += record.entries
    return list(dealt)
