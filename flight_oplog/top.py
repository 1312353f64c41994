"""The first rows by some column, out of very many: what a scan can leave out of an ORDER BY ... LIMIT.

Whoever sorts afterwards gets a superset of the rows that come first: from each record those that are among its own first,
ties included, and that are not behind what the records before have given. Records whose bounds lie behind that are not
looked at; those that may hold the very first ones are looked at first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from flight_oplog import codec
from flight_oplog.datafile import RecordMeta

LIMIT_MAX = 10_000


class Top:
    """What an ORDER BY ... LIMIT asks for, and behind which value nothing is wanted by now. Shared by a scan's partitions."""

    def __init__(self, column: str, limit: int, descends: bool, nulls_first: bool) -> None:
        self.column = column
        self._limit, self._descends, self._nulls_first = limit, descends, nulls_first
        self._bar: Any = None  # at least `limit` rows have this value or come before it

    def takes(self, schema: pa.Schema) -> bool:
        """Whether the column is of a type that can be looked at like this."""
        return self.column in schema.names and is_number(schema.field(self.column).type)

    def in_order(
        self, records: Sequence[RecordMeta], schema: pa.Schema, stored: Callable[[RecordMeta], pa.Schema]
    ) -> list[tuple[RecordMeta, Any]]:
        """Return records with the first value each can have, None where that is not known; those first that may have the first."""
        with_best = [(record, self._best(record, schema, stored(record))) for record in records]
        known = [pair for pair in with_best if pair[1] is not None]
        return [pair for pair in with_best if pair[1] is None] + sorted(known, key=lambda pair: pair[1], reverse=self._descends)

    def _best(self, record: RecordMeta, schema: pa.Schema, stored: pa.Schema) -> Any:
        if self.column not in stored.names:
            return record.first_offset + (record.entries - 1 if self._descends else 0) if self.column == "_offset" else None
        found = record.bounds.get(self.column, {})
        if "min" not in found or (self._nulls_first and found["nulls"]):
            return None
        best = codec.bound_scalar(found["max" if self._descends else "min"], stored.field(self.column).type)
        return numbers(pa.array([best]).cast(schema.field(self.column).type))[0].item()

    def is_behind(self, best: Any) -> bool:
        """Whether nothing of a record is wanted whose first value is `best`."""
        return best is not None and self._bar is not None and (best < self._bar if self._descends else best > self._bar)

    def narrowed(self, column: pa.ChunkedArray, rows: np.ndarray | None) -> np.ndarray | None:
        """Return those of a record's rows (None: all of them) that may come first, going by the column's values in it."""
        values = numbers(column)
        places = np.arange(len(values)) if rows is None else rows
        nulls = places[:0]
        if column.null_count:
            is_null = column.is_null().to_numpy()[places]
            nulls, places = places[is_null], places[~is_null]
        here = values[places]
        if here.dtype.kind == "f" and np.isnan(here).any():
            return rows  # SQL's NaN is the greatest number, numpy's none
        if (bar := self._bar) is not None:
            kept = here >= bar if self._descends else here <= bar
            places, here = places[kept], here[kept]
        if len(here) > self._limit:
            rank = len(here) - self._limit if self._descends else self._limit - 1
            last = np.partition(here, rank)[rank]
            places = places[here >= last if self._descends else here <= last]
            if self._bar is None or (last > self._bar if self._descends else last < self._bar):
                self._bar = last.item()  # another partition may set it now: whichever stays, enough rows are not behind it
        if len(nulls) and (self._nulls_first or self._bar is None):
            places = np.sort(np.concatenate([places, nulls]))
        return places


_NUMBERS = (pa.types.is_integer, pa.types.is_float32, pa.types.is_float64, pa.types.is_timestamp, pa.types.is_date32)


def is_number(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in _NUMBERS)


def numbers(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return the values of a column of numbers or times as numbers; anything where it is null."""
    kind = column.type
    if pa.types.is_timestamp(kind):
        column = column.cast(pa.int64())
    elif pa.types.is_date32(kind):
        column = column.cast(pa.int32())
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    plain = [pa.Array.from_buffers(chunk.type, len(chunk), [None, chunk.buffers()[1]], 0, chunk.offset) for chunk in chunks if len(chunk)]
    parts = [chunk.to_numpy() for chunk in plain]
    return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0)])
