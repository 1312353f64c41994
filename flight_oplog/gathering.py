"""Columns of a record as a query sees them, and rows from here and there gathered into batches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from flight_oplog import codec
from flight_oplog.codes import Name, singly
from flight_oplog.filters import Filter
from flight_oplog.numbers import Ends, Noted, ends, is_number, numbers
from flight_oplog.records import RecordMeta

# The log's own columns, beside those of the clients.
LOG_FIELDS = (
    pa.field("_offset", pa.int64()),
    pa.field("_timestamp", pa.timestamp("us", "UTC")),
    pa.field("_producer", pa.string()),
    pa.field("_sequence", pa.int64()),
    pa.field("_schema_id", pa.string()),
)
LOG_NAMES = frozenset(f.name for f in LOG_FIELDS)
# What a filter leaves of a record is joined up to this: a batch has its price, however small; copying has one too.
JOINED_ROWS = 32_768
_JOINED_BYTES = 1 << 18
# Columns that are summed up again and again are kept in pieces of so many rows: the fewer, the less they cost to hand over.
TOGETHER_ROWS = 1 << 16
# So few rows of a record are not taken by Arrow, which has its price: they are cut out one by one, numbers of more than a handful
# copied together. And few rows wait this long for company.
_FEW_ROWS, _HANDFUL = 64, 4
_GATHERING_SECONDS = 0.005


class Columns:
    """Columns of one record as a query sees them, in the pieces of `lengths` rows that they are stored in."""

    def __init__(
        self,
        schema: pa.Schema,
        lengths: Sequence[int],
        stored: dict[Name, list[pa.Array]],
        own: dict[str, pa.Array],
        noted: Noted | None = None,
    ) -> None:
        self.lengths = lengths
        self._schema, self._stored, self._own = schema, stored, own
        self._noted = Noted() if noted is None else noted

    def array(self, name: str, place: int) -> pa.Array:
        return codec.recast(self._piece(name, place), self._schema.field(name).type)

    def arrays(self, name: str) -> list[pa.Array]:
        return [self.array(name, place) for place in range(len(self.lengths))]

    def ends(self, name: str) -> list[Ends]:
        """Return the ends of the pieces of a column of numbers or times."""
        key = name, self._schema.field(name).type
        found = self._noted.ends.get(key)
        if found is None:
            found = [ends(piece) for piece in self.arrays(name)]
            if name in self._stored:
                self._noted.ends[key] = found
        return found

    def _numbers(self, name: str) -> list[np.ndarray] | None:
        """Return a stored column of numbers or times as numpy sees its pieces; None for another, or one with nulls."""
        if name in self._noted.numbers:
            return self._noted.numbers[name]
        pieces = self._stored.get(name)
        if pieces is None:
            return None
        are_numbers = is_number(pieces[0].type) and not any(piece.null_count for piece in pieces)
        found = self._noted.numbers[name] = [numbers([piece]) for piece in pieces] if are_numbers else None
        return found

    def together(self, name: str, kind: pa.DataType) -> list[pa.Array]:
        """Return a column as `kind`, in pieces of up to TOGETHER_ROWS rows; those of all columns are alike."""
        pieces, found = [as_type(piece, kind) for piece in self.arrays(name)], []
        first = rows = 0
        for place, length in enumerate([*self.lengths, TOGETHER_ROWS + 1]):
            if rows + length > TOGETHER_ROWS and place > first:
                found.append(pa.concat_arrays(pieces[first:place]))
                first, rows = place, 0
            rows += length
        return found

    def some(self, name: str, place: int, rows: np.ndarray) -> pa.Array:
        """Return some values of a piece, whose places in it rise; neighbours are not copied."""
        piece, first = self._piece(name, place), int(rows[0])
        found = piece.slice(first, len(rows)) if rows[-1] - first == len(rows) - 1 else piece.take(pa.array(rows))
        return codec.recast(found, self._schema.field(name).type)

    def few(self, name: str, rows: np.ndarray, within: Sequence[tuple[int, np.ndarray]]) -> list[pa.Array]:
        """Return values of a few rows, which rise; `within` has their pieces and their places in these."""
        kind = self._schema.field(name).type
        own = self._own.get(name)
        if own is not None:
            found = singly(own, rows) if pa.types.is_dictionary(own.type) else [own.slice(row, 1) for row in rows.tolist()]
        elif len(rows) > _HANDFUL and (pieces := self._numbers(name)) is not None:
            values = [pieces[place][local] for place, local in within]
            buffer = pa.py_buffer(values[0] if len(values) == 1 else np.concatenate(values))
            found = [pa.Array.from_buffers(self._stored[name][0].type, len(rows), [None, buffer])]
        else:
            found = [piece.slice(row, 1) for place, local in within for piece in [self._piece(name, place)] for row in local.tolist()]
        return found if found[0].type == kind else [codec.recast(value, kind) for value in found]

    def _piece(self, name: str, place: int) -> pa.Array:
        if name in self._own:
            return self._own[name].slice(sum(self.lengths[:place]), self.lengths[place])
        found = self._stored.get(name)
        return pa.nulls(self.lengths[place], self._schema.field(name).type) if found is None else found[place]


class Few:
    """Gathers rows from here and there into batches: a batch has its price, however small; copying has one too.

    With a filter, only those of them that pass it come out.
    """

    def __init__(self, projected: pa.Schema, schema: pa.Schema, filter: Filter | None) -> None:
        self.names = [*projected.names, *(key for key in (filter.keys if filter else ()) if key not in projected.names)]
        self._projected, self._filter = projected, filter
        self.are_all = filter is None  # all rows that it is given come out
        self._gathered_schema = pa.schema([schema.field(name) for name in self.names])
        self._since = time.monotonic()
        self._clear()

    def _clear(self) -> None:
        self._gathered: dict[str, list[pa.Array]] = {name: [] for name in self.names}
        self._rows = self._bytes = 0

    def add(self, columns: Columns, rows: np.ndarray) -> Iterator[pa.RecordBatch]:
        """Take rows of a record, whose places rise; yield what is enough for a batch."""
        within = list(_within(columns.lengths, rows))
        if len(rows) <= _FEW_ROWS:
            for name, gathered in self._gathered.items():
                gathered.extend(columns.few(name, rows, within))
            self._rows += len(rows)
        else:
            yield from self._add_many(columns, within)
        if self._rows >= JOINED_ROWS or time.monotonic() - self._since > _GATHERING_SECONDS:
            yield from self.taken()

    def _add_many(self, columns: Columns, within: Sequence[tuple[int, np.ndarray]]) -> Iterator[pa.RecordBatch]:
        for place, local in within:
            for name, gathered in self._gathered.items():
                gathered.append(columns.some(name, place, local))
                self._bytes += gathered[-1].nbytes
            self._rows += len(local)
            if self._rows >= JOINED_ROWS or self._bytes >= _JOINED_BYTES:
                yield from self.taken()

    def taken(self) -> Iterator[pa.RecordBatch]:
        """Yield what was gathered."""
        if self._rows:
            arrays = [pa.concat_arrays(gathered) for gathered in self._gathered.values()]
            batch = codec.with_rows(arrays, self._gathered_schema, self._rows)
            passing = None if self._filter is None else self._filter.passing([batch])
            if passing is not None:
                batch = batch.take(pa.array(passing))
            if batch.num_rows:
                shown = [as_type(batch.column(f.name), f.type) for f in self._projected]
                yield codec.with_rows(shown, self._projected, batch.num_rows)
            self._clear()
        self._since = time.monotonic()


def _within(lengths: Sequence[int], rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield in which of the pieces of such lengths some rows are, which rise, and their places in it."""
    ends = np.cumsum(lengths)
    cuts = [0, *np.searchsorted(rows, ends).tolist()]
    for place, end in enumerate(ends.tolist()):
        if cuts[place + 1] > cuts[place]:
            yield place, rows[cuts[place] : cuts[place + 1]] - (end - lengths[place])


def log_columns(record: RecordMeta, names: Sequence[str]) -> dict[str, pa.Array]:
    """Return the log's own columns for all entries of a record."""
    if LOG_NAMES.isdisjoint(names):
        return {}
    counts = [owner["entries"] for owner in record.appends]
    found: dict[str, pa.Array] = {}
    for name in (name for name in names if name in LOG_NAMES):
        if name == "_offset":
            found[name] = pa.array(np.arange(record.first_offset, record.first_offset + record.entries))
        elif name == "_schema_id":
            found[name] = pa.repeat(pa.scalar(record.schema_id), record.entries)
        else:
            kind = next(f.type for f in LOG_FIELDS if f.name == name)
            values = pa.array([owner[name.removeprefix("_")] for owner in record.appends], kind)
            found[name] = values.take(pa.array(np.repeat(np.arange(len(counts)), counts)))
    return found


def as_type(array: pa.Array, kind: pa.DataType) -> pa.Array:
    return array if array.type == kind else array.cast(kind)
