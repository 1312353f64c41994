"""Which files and records of a topic a scan has to look at: those that may hold what its filter wants.

Each step is cheaper than the next, and goes by less: files by the event-time range in the Delta log, records by the bounds
beside their content, then by the filters of their keys. No content is read.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow.fs import LocalFileSystem

from flight_oplog import codec
from flight_oplog.cache import ColumnCache, ScanCounts
from flight_oplog.filters import Filter
from flight_oplog.keys import hashes_of, is_key, may_hold
from flight_oplog.records import DataFile, RecordMeta
from flight_oplog.store import Snapshot
from flight_oplog.topics import Topic

_TIME = pa.timestamp("us", "UTC")
_RUNS_FROM = 16
_SPANS_FROM = 32

_FORMAT = ds.IpcFileFormat()
_FILESYSTEM = LocalFileSystem()


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring records, pruned together before each alone: a fragment costs Arrow 20 µs."""

    records: tuple[RecordMeta, ...]

    @property
    def key(self) -> str:
        return "+".join(record.key for record in self.records)


class Pruner:
    """Narrows files and records of a topic by what one filter wants of its entries, which are seen as `schema` says."""

    def __init__(self, snapshot: Snapshot, topic: Topic, schema: pa.Schema, filter: Filter, cache: ColumnCache, counts: ScanCounts) -> None:
        self._snapshot, self._topic, self._schema, self._filter = snapshot, topic, schema, filter
        self._cache, self._counts = cache, counts

    def files(self, files: Sequence[DataFile]) -> Sequence[DataFile]:
        """Prune files by what the Delta log says of them: all at once where there are many, then one by one."""
        if files is self._topic.files and "_offset" in self._filter.keys:
            low, high = self._filter.spans(self._schema).get("_offset", (None, None))
            files = self._topic.files_within(0 if low is None else low, None if high is None else high + 1)
        name = self._event_time
        if name is None or name not in self._filter.keys:
            return files  # the Delta log knows nothing of the filter's columns
        if len(files) >= _SPANS_FROM:
            low, high = self._filter.spans(self._schema).get(name, (None, None))
            earliest, latest = self._cache.times(files)
            meets = np.ones(len(files), bool)
            if low is not None:
                meets &= latest >= low
            if high is not None:
                meets &= earliest <= high
            files = [files[place] for place in np.flatnonzero(meets).tolist()]
        return self._prune(files, self._file_guarantee)

    def records(
        self, records: Sequence[RecordMeta], found: tuple[Sequence[DataFile], Sequence[Sequence[RecordMeta]]] | None
    ) -> Sequence[RecordMeta]:
        """Return the records that may hold what the filter wants; `found` are the files they are all the records of, and those of each."""
        survivors = records
        if found is not None and len(records) >= _SPANS_FROM:
            survivors = self._within_spans(*found, records)
        if self._filter.wanted is not None and len(survivors) >= _SPANS_FROM:
            survivors = [record for record in survivors if self._may_have_text(record, *self._filter.wanted)]
        if survivors is records or not self._spans_tell():
            survivors = self._prune_records(survivors)
        return self._prune_keys(survivors)

    def _prune_records(self, records: Sequence[RecordMeta]) -> list[RecordMeta]:
        """Prune runs of neighbours by what holds for all of them, then the records of those that are left."""
        if len(records) >= _RUNS_FROM:
            size = 1 << len(records).bit_length() // 2  # about as many runs as records in one
            runs = [_Run(tuple(records[start : start + size])) for start in range(0, len(records), size)]
            records = [record for run in self._prune(runs, self._run_guarantee) for record in run.records]
        return self._prune(records, self._record_guarantee)

    def _prune(self, items: Sequence[Any], guarantee: Callable[..., Any]) -> list[Any]:
        """Return the items whose guarantee does not rule out `filter`, by Arrow's own simplification of expressions.

        Arrow offers it only through the fragments of a file system dataset; these fragments name no real files.
        """
        names = self._filter.keys
        shape = (*names, *(str(self._schema.field(name).type) for name in names))
        by_key = {item.key: item for item in items}
        fragments = [self._cache.fragment(shape, key, functools.partial(guarantee, item, names)) for key, item in by_key.items()]
        dataset = ds.FileSystemDataset(fragments, self._schema, _FORMAT, _FILESYSTEM)
        return [by_key[fragment.path] for fragment in dataset.get_fragments(self._filter.expression)]

    @property
    def _event_time(self) -> str | None:
        """The column that the Delta log has the bounds of, if it has them of one."""
        name = self._topic.event_time
        # The Delta log keeps microseconds; other units are pruned by the records' own bounds.
        return name if name is not None and self._schema.field(name).type.unit == "us" else None

    def _within_spans(
        self, files: Sequence[DataFile], found: Sequence[Sequence[RecordMeta]], records: Sequence[RecordMeta]
    ) -> Sequence[RecordMeta]:
        """Return the records, here of each file, whose numbers the filter may pass: all at once, before each is looked at."""
        meets = np.ones(len(records), bool)
        for name, (low, high) in self._filter.spans(self._schema).items():
            if (kind := self._schema.field(name).type) == pa.uint64():
                continue  # its bounds do not fit the numbers below
            lows, highs = self._cache.limits_of_all(files, found, name, kind, self._topic.schemas)
            if low is not None:
                meets &= highs >= low
            if high is not None:
                meets &= lows <= high
        return [records[place] for place in np.flatnonzero(meets).tolist()]

    def _may_have_text(self, record: RecordMeta, name: str, text: str) -> bool:
        """Whether a record's bounds let a column have a text; Arrow takes 20 µs to say so. Texts order as their UTF-8 does."""
        limits = record.bounds.get(name)
        if limits is None or self._kind(record, name) != pa.string() or "min" not in limits:
            return True
        return bool(limits["min"] <= text <= limits["max"])

    def _spans_tell(self) -> bool:
        """Whether `_within_spans` leaves no more to be pruned."""
        if not self._filter.range:
            return False
        [name] = self._filter.keys
        stored = {schema.field(name).type for schema in self._topic.schemas.values() if name in schema.names}
        return stored <= {self._schema.field(name).type} and stored != {pa.uint64()}

    def _prune_keys(self, records: Sequence[RecordMeta]) -> Sequence[RecordMeta]:
        """Prune records by the filters of their keys: those that cannot hold what the filter wants."""
        for name in (name for name in self._topic.keys if name in self._filter.keys and is_key(self._schema.field(name).type)):
            values = self._filter.among(self._schema, name)
            if values is not None:
                kinds = [self._kind(record, name) for record in records]
                hashes = {kind: None if kind is None else hashes_of(values, kind) for kind in {*kinds}}
                filters = self._cache.filters(self._snapshot, records, name, self._counts)
                records = [r for r, kind, bits in zip(records, kinds, filters, strict=True) if _may_hold(bits, hashes[kind])]
        return records

    def _kind(self, record: RecordMeta, name: str) -> pa.DataType | None:
        """Return the type that a column has in a record, if it is there."""
        stored = self._topic.stored(record)
        return stored.field(name).type if name in stored.names else None

    def _file_guarantee(self, file: DataFile, names: Sequence[str]) -> pc.Expression | None:
        """What holds for every entry of a file, said of the columns `names`; None when nothing is known."""
        name = self._event_time
        if name is None or name not in names or file.min_time is None or file.max_time is None:
            return None
        kind = self._schema.field(name).type
        low, high = (pa.scalar(time, _TIME).cast(pa.int64()).cast(kind) for time in (file.min_time, file.max_time))
        return _between(name, low, high)

    def _record_guarantee(self, record: RecordMeta, names: Sequence[str]) -> pc.Expression | None:
        return self._guarantee([record], self._topic.stored(record), names)

    def _run_guarantee(self, run: _Run, names: Sequence[str]) -> pc.Expression | None:
        stored = {record.schema_id: self._topic.stored(record) for record in run.records}
        return self._guarantee(run.records, next(iter(stored.values())), names) if len(stored) == 1 else None

    def _guarantee(self, records: Sequence[RecordMeta], stored: pa.Schema, names: Sequence[str]) -> pc.Expression | None:
        """What holds for every entry of neighbouring records of one stored schema."""
        parts = []
        for name in names:
            limits = [record.bounds.get(name, {}) for record in records]
            if any("min" not in of_record for of_record in limits):
                continue
            kind, target = stored.field(name).type, self._schema.field(name).type
            low, high = (codec.bound_scalar(codec.outermost(limits, end, kind), kind).cast(target) for end in ("min", "max"))
            nulls = any(of_record["nulls"] for of_record in limits)
            parts.append(_between(name, low, high) if nulls else (pc.field(name) >= low) & (pc.field(name) <= high))
        if "_offset" in names and "_offset" not in stored.names:
            offset = pc.field("_offset")
            parts.append((offset >= records[0].first_offset) & (offset < records[-1].first_offset + records[-1].entries))
        return functools.reduce(operator.and_, parts) if parts else None


def _may_hold(bits: memoryview | None, hashes: Sequence[int] | None) -> bool:
    return bits is None or hashes is None or any(may_hold(bits, hash) for hash in hashes)


def _between(name: str, low: pa.Scalar, high: pa.Scalar) -> pc.Expression:
    """A column's guarantee: within [low, high] or null, in the form that Arrow's simplification understands."""
    column = pc.field(name)
    return ((column >= low) | column.is_null()) & ((column <= high) | column.is_null())
