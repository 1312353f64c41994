"""What is known of very many files and records, in columns: a question asks it of all of them at once.

What is known of a file or a record never changes, and a topic's files only get more as a rule. So what was found out of
them is kept from one snapshot to the next, and only what was added is looked at: planning costs by what a question wants.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from flight_oplog.growing import Growing
from flight_oplog.kept import remember
from flight_oplog.neighbours import ranges
from flight_oplog.records import RecordMeta, joined

COLUMNS_KEPT = 64
# Small neighbours of which at least this part is wanted are one where that is in memory.
HELD_PART = 16

Item = TypeVar("Item")


class Listed(Generic[Item]):
    """Items, and columns of what is known of them. One that grows out of it, or is its beginning, shares both."""

    __slots__ = ("_columns", "items")

    def __init__(self, items: Growing[Item], columns: Iterable[tuple[Hashable, Any]] = ()) -> None:
        self.items = items
        self._columns: OrderedDict[Hashable, Any] = OrderedDict(columns)  # some may be of fewer items

    def column(self, name: Hashable, of: Callable[[Sequence[Item]], Any]) -> Any:
        """Return a column of that name, an array; `of` makes it of items, of each by itself."""
        known = self._columns.get(name)
        if known is None or len(known) < len(self.items):
            added = of(self.items[0 if known is None else len(known) :])
            known = added if known is None else _behind(known, added)
            remember(self._columns, name, known, COLUMNS_KEPT)
        return known

    def grown(self, added: Iterable[Item]) -> Listed[Item]:
        return self.as_of(self.items.grown(added))

    def as_of(self, items: Growing[Item]) -> Listed[Item]:
        """Return items with what is known of these, where they grew out of these."""
        return Listed(items, self._columns.copy().items() if items.shares(self.items) else ())

    def upto(self, count: int) -> Listed[Item]:
        if count >= len(self.items):
            return self
        return Listed(self.items.upto(count), ((name, column[:count]) for name, column in self._columns.copy().items()))


@dataclass(frozen=True, slots=True)
class _Whole:
    """Small neighbours, from one place to another, that are read as one."""

    start: int
    end: int
    record: RecordMeta


class Overview:
    """The records of some files of a topic, in the files' order, and which of them are read as one where all of them are wanted."""

    def __init__(self, ends: Listed[int], records: Listed[RecordMeta], wholes: Listed[_Whole], settled: int, next_offset: int) -> None:
        self.records = records
        self._ends = ends  # where the records of each file end
        self._wholes = wholes
        # From which place on it is not settled which records are one, and the offset behind those before it.
        self._settled, self._next_offset = settled, next_offset
        self._all: tuple[Sequence[RecordMeta], np.ndarray] | None = None

    @classmethod
    def of(cls, records_of_files: Sequence[Sequence[RecordMeta]], first_offset: int) -> Overview:
        """Return an overview of the records of each of some files; the topic begins at `first_offset`."""
        return cls(Listed(Growing()), Listed(Growing()), Listed(Growing()), 0, first_offset).grown(records_of_files)

    def __len__(self) -> int:
        """How many files it is of."""
        return len(self._ends.items)

    def grown(self, records_of_files: Sequence[Sequence[RecordMeta]]) -> Overview:
        """Return an overview of more files. One thread at a time may grow one or another that it shares with."""
        count, ends, added = len(self.records.items), [], list[RecordMeta]()
        for records in records_of_files:
            added += records
            ends.append(count + len(added))
        all_records = self.records.grown(added)
        unsettled, settled, next_offset = all_records.items[self._settled :], self._settled, self._next_offset
        found = []
        for start, end, are_one in ranges(unsettled, self._next_offset):
            if are_one:
                found.append(_Whole(self._settled + start, self._settled + end, joined(unsettled[start:end])))
            if start:
                settled, next_offset = self._settled + start, unsettled[start - 1].first_offset + unsettled[start - 1].entries
        return Overview(self._ends.grown(ends), all_records, self._wholes.grown(found), settled, next_offset)

    def upto(self, files: int) -> Overview:
        """Return an overview of the first files alone; it must not grow."""
        if files >= len(self):
            return self
        count = self._ends.items[files - 1] if files else 0
        ends = self._wholes.column("ends", _ends_of)
        wholes = self._wholes.upto(int(np.searchsorted(ends, count, "right")))
        return Overview(self._ends.upto(files), self.records.upto(count), wholes, count, 0)

    def taken(self, places: np.ndarray | None, is_held: Callable[[RecordMeta], bool]) -> tuple[Sequence[RecordMeta], np.ndarray]:
        """Return the records at rising places, or all, and the entries of each; small neighbours as one.

        That is where all of them are wanted, and where a part of them is and what is made of them all `is_held` in memory.
        """
        if not len(self._wholes.items):
            return self.alone(places)
        if places is not None:
            return self._together(places, is_held)
        if self._all is None:
            self._all = self._together(np.arange(len(self.records.items)), is_held)
        return self._all

    def alone(self, places: np.ndarray | None) -> tuple[Sequence[RecordMeta], np.ndarray]:
        """Return the records at some places, or all, as they are, and the entries of each."""
        if places is None:
            return self.records.items, self.entries
        return [self.records.items[place] for place in places.tolist()], self.entries[places]

    def _together(self, places: np.ndarray, is_held: Callable[[RecordMeta], bool]) -> tuple[Sequence[RecordMeta], np.ndarray]:
        records, wholes = self.records.items, self._wholes.items
        starts, ends = self._wholes.column("starts", _starts_of), self._wholes.column("ends", _ends_of)
        # Of each whole: the first of the places in it, how many are, and whether it is to be one.
        firsts = np.searchsorted(places, starts)
        wanted = np.searchsorted(places, ends) - firsts
        are_one = wanted == ends - starts
        for of in np.flatnonzero(~are_one & (wanted * HELD_PART >= ends - starts)).tolist():
            are_one[of] = is_held(wholes[of].record)
        # Of each place: the last whole that begins at it or before, and whether it goes up in that.
        last = np.searchsorted(starts, places, "right") - 1
        are_in = (last >= 0) & (places < ends[last]) & are_one[last]
        kept = ~are_in | (np.arange(len(places)) == firsts[last])
        places, last, are_in = places[kept], last[kept], are_in[kept]
        found = [
            wholes[of].record if is_in else records[place]
            for place, of, is_in in zip(places.tolist(), last.tolist(), are_in.tolist(), strict=True)
        ]
        return found, np.where(are_in, self._wholes.column("entries", _entries_of_wholes)[last], self.entries[places])

    @property
    def entries(self) -> np.ndarray:
        """The entries of each record."""
        return self.records.column("entries", _entries_of)  # type: ignore[no-any-return]

    def rows(self, places: np.ndarray | None) -> int:
        """Return how many rows of the outer table the records at some places are, or all."""
        rows = self.records.column("rows", _rows_of)
        return int(rows.sum() if places is None else rows[places].sum())

    def places_of(self, files: Sequence[int]) -> np.ndarray:
        """Return the places of the records of some files."""
        ends = self._ends.column("ends", _int64s)
        if isinstance(files, range):
            return np.arange(ends[files.start - 1] if files.start else 0, ends[files.stop - 1] if files.stop else 0)
        are_wanted = np.zeros(len(ends), bool)
        are_wanted[files] = True
        return np.flatnonzero(np.repeat(are_wanted, np.diff(ends, prepend=0)))


_int64s = functools.partial(np.array, dtype=np.int64)


def _behind(known: Any, added: Any) -> Any:
    return np.concatenate([known, added]) if isinstance(known, np.ndarray) else pa.concat_arrays([known, added])


def _starts_of(wholes: Sequence[_Whole]) -> np.ndarray:
    return _int64s([each.start for each in wholes])


def _ends_of(wholes: Sequence[_Whole]) -> np.ndarray:
    return _int64s([each.end for each in wholes])


def _entries_of_wholes(wholes: Sequence[_Whole]) -> np.ndarray:
    return _int64s([each.record.entries for each in wholes])


def _entries_of(records: Sequence[RecordMeta]) -> np.ndarray:
    return _int64s([record.entries for record in records])


def _rows_of(records: Sequence[RecordMeta]) -> np.ndarray:
    return _int64s([record.rows for record in records])
