"""What is known of very many files and records, in columns: a question asks it of all of them at once.

What is known of a file or a record never changes, and a topic's files only get more as a rule. So what was found out of
them is kept from one snapshot to the next, and only what was added is looked at: planning costs by what a question wants.
"""

from __future__ import annotations

import contextlib
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
from flight_oplog.numbers import Places
from flight_oplog.records import RecordMeta, joined

# Columns that are kept: so many, and no more bytes an item than half of what is kept of a record anyway.
COLUMNS_KEPT = 64
ITEM_BYTES = 512
COLUMNS_BYTES_LEAST = 1 << 20
# Small neighbours of which at least this part is wanted are one where that is in memory.
HELD_PART = 16
# Neighbours of so many records are looked at together first.
RUN_RECORDS = 512

Item = TypeVar("Item")


class Listed(Generic[Item]):
    """Items, and columns of what is known of them, which all share that grew out of each other. Thread-safe."""

    __slots__ = ("_columns", "items")

    def __init__(self, items: Growing[Item], columns: OrderedDict[Hashable, Any] | None = None) -> None:
        self.items = items
        self._columns: OrderedDict[Hashable, Any] = OrderedDict() if columns is None else columns  # of more items, or of fewer

    def column(self, name: Hashable, of: Callable[[Sequence[Item]], Any]) -> Any:
        """Return a column of that name, an array; `of` makes it of items, of each by itself."""
        known, count = self._columns.get(name), len(self.items)
        if known is None or len(known) < count:
            added = of(self.items[0 if known is None else len(known) :])
            known = added if known is None else _behind(known, added)
            remember(self._columns, name, known, COLUMNS_KEPT)
            bytes_max = max(COLUMNS_BYTES_LEAST, ITEM_BYTES * count)
            with contextlib.suppress(KeyError):  # another thread may have been here
                while len(self._columns) > 1 and sum(each.nbytes for each in list(self._columns.values())) > bytes_max:
                    self._columns.popitem(last=False)
        return known if len(known) == count else known[:count]

    def grown(self, added: Iterable[Item]) -> Listed[Item]:
        return self.as_of(self.items.grown(added))

    def upto(self, count: int) -> Listed[Item]:
        return self.as_of(self.items.upto(count))

    def as_of(self, items: Growing[Item]) -> Listed[Item]:
        """Return items with what is known of these, where one grew out of the other."""
        return Listed(items, self._columns if items.shares(self.items) else None)


@dataclass(frozen=True, slots=True)
class _Whole:
    """Small neighbours, from one place to another, that are read as one."""

    start: int
    end: int
    record: RecordMeta


class Overview:
    """The records of some files of a topic, in the files' order, and which of them are read as one where all of them are wanted."""

    def __init__(
        self, ends: Listed[int], records: Listed[RecordMeta], runs: Listed[int], wholes: Listed[_Whole], settled: int, next_offset: int
    ) -> None:
        self.records = records
        self.runs = runs  # the numbers of those of RUN_RECORDS that are full
        self._ends = ends  # where the records of each file end
        self._wholes = wholes
        # From which place on it is not settled which records are one, and the offset behind those before it.
        self._settled, self._next_offset = settled, next_offset
        self._all: tuple[Sequence[RecordMeta], np.ndarray] | None = None

    @classmethod
    def of(cls, records_of_files: Sequence[Sequence[RecordMeta]], first_offset: int) -> Overview:
        """Return an overview of the records of each of some files; the topic begins at `first_offset`."""
        return cls(Listed(Growing()), Listed(Growing()), Listed(Growing()), Listed(Growing()), 0, first_offset).grown(records_of_files)

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
        runs = self.runs.grown(range(len(self.runs.items), len(all_records.items) // RUN_RECORDS))
        return Overview(self._ends.grown(ends), all_records, runs, self._wholes.grown(found), settled, next_offset)

    def upto(self, files: int) -> Overview:
        """Return an overview of the first files alone; it must not grow."""
        if files >= len(self):
            return self
        count = self._ends.items[files - 1] if files else 0
        ends = self._wholes.column("ends", _ends_of)
        wholes = self._wholes.upto(int(np.searchsorted(ends, count, "right")))
        return Overview(self._ends.upto(files), self.records.upto(count), self.runs.upto(count // RUN_RECORDS), wholes, count, 0)

    def alone(self, places: np.ndarray | None) -> tuple[Sequence[RecordMeta], np.ndarray]:
        """Return the records at some places, or all, as they are, and the entries of each."""
        if places is None:
            return self.records.items, self.entries
        return self.records.items.taken(places.tolist()), self.entries[places]

    def together(self, places: np.ndarray | None) -> tuple[Sequence[RecordMeta], np.ndarray]:
        """Return the records at rising places, or all, and the entries of each: small neighbours that are all among them as one."""
        if not len(self._wholes.items):
            return self.alone(places)
        if places is not None:
            return self._joined(places)
        if self._all is None:
            self._all = self._joined(np.arange(len(self.records.items)))
        return self._all

    def widened(self, places: np.ndarray, is_held: Callable[[RecordMeta], bool]) -> np.ndarray:
        """Return rising places, and with a part of small neighbours the rest of them where, as one, they are held in memory."""
        starts, ends = self._wholes.column("starts", _starts_of), self._wholes.column("ends", _ends_of)
        wanted = np.searchsorted(places, ends) - np.searchsorted(places, starts)
        partly = np.flatnonzero((wanted < ends - starts) & (wanted * HELD_PART >= ends - starts)).tolist()
        held = [np.arange(starts[of], ends[of]) for of in partly if is_held(self._wholes.items[of].record)]
        return np.union1d(places, np.concatenate(held)) if held else places

    def _joined(self, places: np.ndarray) -> tuple[Sequence[RecordMeta], np.ndarray]:
        starts, ends = self._wholes.column("starts", _starts_of), self._wholes.column("ends", _ends_of)
        # Of each whole: the first of the places in it, and whether all of it is wanted; of each place: whether it is in such a one.
        firsts = np.searchsorted(places, starts)
        is_whole = np.searchsorted(places, ends) - firsts == ends - starts
        edges = np.zeros(len(places) + 1, np.int64)
        edges[firsts[is_whole]] += 1
        edges[(firsts + ends - starts)[is_whole]] -= 1
        is_alone = np.cumsum(edges[:-1]) == 0
        wholes = np.flatnonzero(is_whole)
        at = np.sort(np.concatenate([np.flatnonzero(is_alone), firsts[wholes]]))
        records, entries = self.alone(places[at])
        found = list(records)
        for number, of in zip(np.searchsorted(at, firsts[wholes]).tolist(), wholes.tolist(), strict=True):
            found[number] = self._wholes.items[of].record
            entries[number] = found[number].entries
        return found, entries

    @property
    def entries(self) -> np.ndarray:
        """The entries of each record."""
        return self.records.column("entries", _entries_of)  # type: ignore[no-any-return]

    def rows(self, places: np.ndarray | None) -> int:
        """Return how many rows of the outer table the records at some places are, or all."""
        rows = self.records.column("rows", _rows_of)
        return int(rows.sum() if places is None else rows[places].sum())

    def files_of(self, places: np.ndarray) -> np.ndarray:
        """Return the places of the files that the records at some places are in."""
        return np.unique(np.searchsorted(self._ends.column("ends", _int64s), places, "right"))

    def places_of(self, files: Places) -> np.ndarray:
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


def _entries_of(records: Sequence[RecordMeta]) -> np.ndarray:
    return _int64s([record.entries for record in records])


def _rows_of(records: Sequence[RecordMeta]) -> np.ndarray:
    return _int64s([record.rows for record in records])
