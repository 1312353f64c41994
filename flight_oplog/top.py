"""The first rows by some column, out of very many: what a scan can leave out of an ORDER BY ... LIMIT.

Whoever sorts afterwards gets a superset of the rows that come first: from each record those that are among its own first,
ties included, and that are not behind what the records before have given. Records whose bounds lie behind that are not
looked at; those that may hold the very first ones are looked at first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from flight_oplog import codec
from flight_oplog.numbers import is_number, numbers
from flight_oplog.overview import Listed
from flight_oplog.pruning import limits
from flight_oplog.records import RecordMeta
from flight_oplog.topics import Topic

LIMIT_MAX = 10_000


class Top:
    """What an ORDER BY ... LIMIT asks for, and behind which value nothing is wanted by now. Shared by a scan's partitions."""

    def __init__(self, column: str, limit: int, descends: bool, nulls_first: bool) -> None:
        self.column = column
        self._limit, self._descends, self._nulls_first = limit, descends, nulls_first
        self._first = np.zeros(0)  # the first values so far, `limit` at most
        self._bar: Any = None  # the last of them, when there are so many
        self._lock = threading.Lock()

    def takes(self, schema: pa.Schema) -> bool:
        """Whether the column is of a type that can be looked at like this."""
        return self.column in schema.names and is_number(schema.field(self.column).type)

    def offsets(self, first: int, last: int) -> tuple[int, int] | None:
        """Return the offsets, of [first, last), that the first rows have where all rows pass; None where that is not told by offsets."""
        if self.column != "_offset":
            return None
        return (max(first, last - self._limit), last) if self._descends else (first, min(last, first + self._limit))

    def order(self, records: Listed[RecordMeta], schema: pa.Schema, topic: Topic) -> np.ndarray | None:
        """Return a number for each record: those with the least may have the first rows. None where the column's type changed."""
        kind = schema.field(self.column).type
        stored = {each.field(self.column).type for each in topic.schemas.values() if self.column in each.names}
        if not stored <= {kind} or kind == pa.uint64():
            return None
        found = limits(records, topic, self.column, kind, "max" if self._descends else "min")
        if self._descends:  # -x would not do: the least number has no other
            found = -found if found.dtype.kind == "f" else ~found
        if self._nulls_first:
            least = -np.inf if found.dtype.kind == "f" else np.iinfo(np.int64).min
            found = np.where(records.column((self.column, "nulls"), self._have_nulls), least, found)
        return found

    def _have_nulls(self, records: Sequence[RecordMeta]) -> np.ndarray:
        return np.array([bool(record.bounds.get(self.column, {}).get("nulls")) for record in records], bool)

    def in_order(
        self, records: Sequence[RecordMeta], schema: pa.Schema, stored: Callable[[RecordMeta], pa.Schema], are_ordered: bool
    ) -> Iterator[tuple[RecordMeta, Any]]:
        """Yield records with the first value each can have, None where that is not known; those first that may have the first."""
        with_best: Iterator[tuple[RecordMeta, Any]] = ((record, self._best(record, schema, stored(record))) for record in records)
        if not are_ordered:
            pairs = list(with_best)
            yield from (pair for pair in pairs if pair[1] is None)
            with_best = iter(sorted((pair for pair in pairs if pair[1] is not None), key=_best, reverse=self._descends))
        for record, best in with_best:
            if self.is_behind(best):
                return  # and so are all after it
            yield record, best

    def _best(self, record: RecordMeta, schema: pa.Schema, stored: pa.Schema) -> Any:
        place = stored.get_field_index(self.column)
        if place < 0:
            return record.first_offset + (record.entries - 1 if self._descends else 0) if self.column == "_offset" else None
        found = record.bounds.get(self.column, {})
        if "min" not in found or (self._nulls_first and found["nulls"]):
            return None
        best, kind, shown = found["max" if self._descends else "min"], stored.field(place).type, schema.field(self.column).type
        if kind == shown:
            return best  # bounds are written as `numbers` shows values
        return numbers([pa.array([codec.bound_scalar(best, kind)]).cast(shown)])[0].item()

    def is_behind(self, best: Any) -> bool:
        """Whether nothing of a record is wanted whose first value is `best`."""
        return best is not None and self._bar is not None and (best < self._bar if self._descends else best > self._bar)

    def narrowed(self, column: Sequence[pa.Array], rows: np.ndarray | None, may_be_nan: bool) -> np.ndarray | None:
        """Return those of a record's rows (None: all of them) that may come first, going by the column's values in it."""
        bar, has_nulls = self._bar, any(part.null_count for part in column)
        if bar is not None and rows is None and not has_nulls and not may_be_nan:
            rows = self._not_behind(column, bar)  # without a copy
        values = numbers(column) if rows is None or len(rows) else np.zeros(0)
        places = np.arange(len(values)) if rows is None else rows
        nulls = places[:0]
        if has_nulls:
            is_null = np.concatenate([part.is_null().to_numpy(zero_copy_only=False) for part in column])[places]
            nulls, places = places[is_null], places[~is_null]
        here = values if rows is None and not has_nulls else values[places]
        if may_be_nan and here.dtype.kind == "f" and np.isnan(here).any():
            return rows  # SQL's NaN is the greatest number, numpy's none
        if bar is not None:
            kept = here >= bar if self._descends else here <= bar
            places, here = places[kept], here[kept]
        if len(here) > self._limit:
            last = self._last(here)
            kept = here >= last if self._descends else here <= last
            places, here = places[kept], here[kept]
        with self._lock:
            first = np.concatenate([self._first.astype(here.dtype), here])
            if len(first) >= self._limit:
                last = self._last(first)
                first = first[first >= last if self._descends else first <= last][: self._limit]
                self._bar = last.item()
            self._first = first
        if len(nulls) and (self._nulls_first or self._bar is None):
            places = np.sort(np.concatenate([places, nulls]))
        return places

    def _last(self, values: np.ndarray) -> Any:
        """Return the last of the first `limit` values, out of as many at least."""
        rank = len(values) - self._limit if self._descends else self._limit - 1
        return np.partition(values, rank)[rank]

    def _not_behind(self, column: Sequence[pa.Array], bar: Any) -> np.ndarray:
        found, start = [], 0
        for part in column:
            values = numbers([part])
            found.append(np.flatnonzero(values >= bar if self._descends else values <= bar) + start)
            start += len(part)
        return np.concatenate(found) if found else np.zeros(0, np.int64)


def _best(pair: tuple[RecordMeta, Any]) -> Any:
    return pair[1]
