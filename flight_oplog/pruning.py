"""Which files and records of a topic a scan has to look at: those that may hold what its filter wants.

Each step is cheaper than the next, and goes by less: files by the event-time range in the Delta log, records by the bounds
beside their content, then by the filters of their keys. No content is read.
"""

from __future__ import annotations

import functools
import hashlib
import math
import operator
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flight_oplog import codec
from flight_oplog.cache import ColumnCache, ScanCounts
from flight_oplog.filters import Filter, fragment, passing
from flight_oplog.keys import hashes_of, is_key, may_hold
from flight_oplog.neighbours import SMALL_ENTRIES
from flight_oplog.numbers import Places
from flight_oplog.overview import RUN_RECORDS, Listed, Overview
from flight_oplog.records import DataFile, RecordMeta
from flight_oplog.rows import microseconds
from flight_oplog.store import Snapshot
from flight_oplog.topics import Topic

_TIME = pa.timestamp("us", "UTC")
_RUNS_FROM = 16
_SPANS_FROM = 32
# Of more than these, none is asked about alone: Arrow takes 20 µs for each.
ALONE_MAX = 4096
_NOTHING: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring records, pruned together before each alone: a fragment costs Arrow 20 µs."""

    records: tuple[RecordMeta, ...]

    @property
    def key(self) -> str:
        return hashlib.blake2b("+".join(record.key for record in self.records).encode(), digest_size=16).hexdigest()


class Pruner:
    """Narrows files and records of a topic by what one filter wants of its entries, which are seen as `schema` says."""

    def __init__(self, snapshot: Snapshot, topic: Topic, schema: pa.Schema, filter: Filter, cache: ColumnCache, counts: ScanCounts) -> None:
        self._snapshot, self._topic, self._schema, self._filter = snapshot, topic, schema, filter
        self._cache, self._counts = cache, counts

    def files(self, places: range) -> Places:
        """Prune files, given by their places in the topic, by what the Delta log says of them: all at once, then one by one."""
        if len(places) == len(self._topic.files) and "_offset" in self._filter.keys:
            low, high = self._spans.get("_offset", (None, None))
            places = self._topic.places_within(0 if low is None else low, None if high is None else high + 1)
        name = self._event_time
        if name is None or name not in self._filter.keys:
            return places  # the Delta log knows nothing of the filter's columns
        kept: Places = places
        if len(places) >= _SPANS_FROM:
            listed, (low, high) = self._cache.files(self._topic), self._spans.get(name, (None, None))
            meets = np.ones(len(places), bool)
            if low is not None:
                meets &= listed.column("latest", _latest)[places.start : places.stop] >= low
            if high is not None:
                meets &= listed.column("earliest", _earliest)[places.start : places.stop] <= high
            kept = np.flatnonzero(meets) + places.start
        if len(kept) > ALONE_MAX:
            return kept
        return np.array(kept, np.int64)[self._prune([self._topic.files[place] for place in kept], self._file_guarantee)]

    def records(self, overview: Overview, places: np.ndarray | None) -> np.ndarray | None:
        """Return the places of those records that may hold what the filter wants; None stands for all of them.

        Raises CannotFilter where Arrow would answer of them otherwise than SQL does.
        """
        is_told = False
        if len(overview.records.items if places is None else places) >= _SPANS_FROM:
            places, is_told = self._within_bounds(overview.records, places), self._bounds_tell()
        if not is_told:
            places = self._prune_records(overview, places)
        places = self._prune_keys(overview.records.items, places)
        if places is not None and len(places) == len(overview.records.items):
            places = None
        self._filter.check(self._schema, functools.partial(self._may_hold_nan, overview.records, places))
        return places

    def _may_hold_nan(self, records: Listed[RecordMeta], places: np.ndarray | None, name: str) -> bool:
        """Whether a column of some of the records may hold a NaN: those with one have no bounds."""
        having = {number for number, stored in self._topic.schemas.items() if name in stored.names}
        may_be = records.column((name, "nan"), functools.partial(_nan_in, name=name, having=having))
        return bool(may_be.any() if places is None else may_be[places].any())

    def _prune_records(self, overview: Overview, places: np.ndarray | None) -> np.ndarray:
        """Prune runs of neighbours by what holds for all of them, then the records of those that are left."""
        if places is None:
            places = np.arange(len(overview.records.items))
        if len(places) > ALONE_MAX:
            places = self._prune_runs(overview, places)
        if len(places) > ALONE_MAX and overview.entries[places].sum() < SMALL_ENTRIES * len(places):
            return places  # asking of each would take longer than reading them
        records = overview.records.items.taken(places.tolist())
        if len(records) >= _RUNS_FROM:
            size = 1 << len(records).bit_length() // 2  # about as many runs as records in one
            runs = [_Run(tuple(records[start : start + size])) for start in range(0, len(records), size)]
            kept = np.array(self._prune(runs, self._run_guarantee), np.int64)
            left = (kept[:, None] * size + np.arange(size)).ravel()
            left = left[left < len(records)]
            places, records = places[left], [records[place] for place in left.tolist()]
        return places[self._prune(records, self._record_guarantee)]

    def _prune_runs(self, overview: Overview, places: np.ndarray) -> np.ndarray:
        """Prune the same runs of records at each question, so that what holds for them is found out once."""
        names, records = self._filter.keys, overview.records.items

        def of(numbers: Sequence[int]) -> np.ndarray:
            found = np.empty(len(numbers), object)
            for place, number in enumerate(numbers):
                run = _Run(tuple(records[number * RUN_RECORDS : (number + 1) * RUN_RECORDS]))
                found[place] = fragment(str(number), self._run_guarantee(run, names))
            return found

        fragments = overview.runs.column(("runs", *self._shape), of)
        runs = places // RUN_RECORDS
        full = np.unique(runs[runs < len(fragments)])
        kept = [int(each.path) for each in passing(fragments[full].tolist(), self._schema, self._filter.expression)]
        return places[np.isin(runs, kept) | (runs >= len(fragments))]

    def _prune(self, items: Sequence[Any], guarantee: Callable[..., Any]) -> list[int]:
        """Return the places of the items whose guarantee does not rule out the filter."""
        names, by_key = self._filter.keys, {item.key: place for place, item in enumerate(items)}
        fragments = [self._cache.fragment(self._shape, item.key, functools.partial(guarantee, item, names)) for item in items]
        return [by_key[each.path] for each in passing(fragments, self._schema, self._filter.expression)]

    @functools.cached_property
    def _shape(self) -> tuple[str, ...]:
        """The columns and types that a guarantee speaks of."""
        return (*self._filter.keys, *(str(self._schema.field(name).type) for name in self._filter.keys))

    @property
    def _event_time(self) -> str | None:
        """The column that the Delta log has the bounds of, if it has them of one."""
        name = self._topic.event_time
        # The Delta log keeps microseconds; other units are pruned by the records' own bounds.
        return name if name is not None and self._schema.field(name).type.unit == "us" else None

    @functools.cached_property
    def _spans(self) -> Mapping[str, tuple[Any, Any]]:
        return self._filter.spans(self._schema)

    def _within_bounds(self, records: Listed[RecordMeta], places: np.ndarray | None) -> np.ndarray:
        """Return the places of those records whose bounds let the filter pass: its numbers and the text that it wants, of all at once."""
        conditions: list[tuple[Any, Callable[[Any, Any], Any], Any]] = []
        for name, (low, high) in self._spans.items():
            if (kind := self._schema.field(name).type) == pa.uint64():
                continue  # its bounds do not fit the numbers below
            if low is not None:
                conditions.append((limits(records, self._topic, name, kind, "max"), operator.ge, low))
            if high is not None:
                conditions.append((limits(records, self._topic, name, kind, "min"), operator.le, high))
        if self._filter.wanted is not None:
            name, text = self._filter.wanted
            conditions.append((limits(records, self._topic, name, pa.string(), "max"), functools.partial(_may_be, pc.greater_equal), text))
            conditions.append((limits(records, self._topic, name, pa.string(), "min"), functools.partial(_may_be, pc.less_equal), text))
        places = np.arange(len(records.items)) if places is None else places
        for known, meets, end in conditions:
            places = places[meets(known if len(places) == len(known) else known.take(places), end)]
        return places

    def _bounds_tell(self) -> bool:
        """Whether `_within_bounds` leaves no more to be pruned by bounds."""
        if not self._filter.range and (self._filter.wanted is None or len(self._filter.keys) > 1):
            return False
        [name] = self._filter.keys
        stored = {schema.field(name).type for schema in self._topic.schemas.values() if name in schema.names}
        return stored <= {self._schema.field(name).type} and stored != {pa.uint64()}

    def _prune_keys(self, records: Sequence[RecordMeta], places: np.ndarray | None) -> np.ndarray | None:
        """Prune records by the filters of their keys: those that cannot hold what the filter wants."""
        for name in (name for name in self._topic.keys if name in self._filter.keys and is_key(self._schema.field(name).type)):
            values = self._filter.among(self._schema, name)
            if values is not None:
                places = np.arange(len(records)) if places is None else places
                of_these = [records[place] for place in places.tolist()]
                kinds = [self._kind(record, name) for record in of_these]
                hashes = {kind: None if kind is None else hashes_of(values, kind) for kind in {*kinds}}
                filters = self._cache.filters(self._snapshot, of_these, name, self._counts)
                places = places[[_may_hold(bits, hashes[kind]) for kind, bits in zip(kinds, filters, strict=True)]]
        return places

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
            end = max(record.first_offset + record.entries for record in records)
            parts.append((offset >= min(record.first_offset for record in records)) & (offset < end))
        return functools.reduce(operator.and_, parts) if parts else None


def limits(records: Listed[RecordMeta], topic: Topic, name: str, kind: pa.DataType, end: str) -> Any:
    """Return the least or the greatest value (`end`) that each record can have in a column; of texts null where it is not known."""
    same = {number for number, stored in topic.schemas.items() if name in stored.names and stored.field(name).type == kind}
    return records.column((name, str(kind), end), functools.partial(_limits_of, name=name, kind=kind, end=end, same=same))


def _limits_of(records: Sequence[RecordMeta], name: str, kind: pa.DataType, end: str, same: Container[str]) -> Any:
    if kind == pa.string():
        unknown: Any = None
    elif pa.types.is_floating(kind):
        unknown = -math.inf if end == "min" else math.inf
    else:
        unknown = -(1 << 63) if end == "min" else (1 << 63) - 1
    if name == "_offset":
        found = [record.first_offset + (0 if end == "min" else record.entries - 1) for record in records]
    else:
        found = [record.bounds.get(name, _NOTHING).get(end, unknown) if record.schema_id in same else unknown for record in records]
    return pa.array(found, kind) if kind == pa.string() else np.array(found, np.float64 if pa.types.is_floating(kind) else np.int64)


def _may_be(compare: Callable[[pa.Array, str], pa.Array], texts: pa.Array, text: str) -> np.ndarray:
    return pc.fill_null(compare(texts, text), True).to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]


def _nan_in(records: Sequence[RecordMeta], name: str, having: Container[str]) -> np.ndarray:
    of_each = ((record, record.bounds.get(name, _NOTHING)) for record in records)
    return np.array(
        [record.schema_id in having and "min" not in found and found.get("nulls") != record.entries for record, found in of_each], bool
    )


def _earliest(files: Sequence[DataFile]) -> np.ndarray:
    return np.array([-(1 << 63) if file.min_time is None else microseconds(file.min_time) for file in files], np.int64)


def _latest(files: Sequence[DataFile]) -> np.ndarray:
    return np.array([(1 << 63) - 1 if file.max_time is None else microseconds(file.max_time) for file in files], np.int64)


def _may_hold(bits: memoryview | None, hashes: Sequence[int] | None) -> bool:
    return bits is None or hashes is None or any(may_hold(bits, hash) for hash in hashes)


def _between(name: str, low: pa.Scalar, high: pa.Scalar) -> pc.Expression:
    """A column's guarantee: within [low, high] or null, in the form that Arrow's simplification understands."""
    column = pc.field(name)
    return ((column >= low) | column.is_null()) & ((column <= high) | column.is_null())
