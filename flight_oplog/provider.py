"""A topic's entries as a table that DataFusion scans.

A scan narrows in steps: files and records that the filter rules out (`pruning.py`), columns by the projection; only then is
content fetched, checked and decoded. Decoded columns are kept in a cache bounded in bytes (`cache.py`).
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flight_oplog import codec
from flight_oplog.cache import ColumnCache, Decoded
from flight_oplog.codes import CodesOf, Name
from flight_oplog.errors import Cancelled
from flight_oplog.filters import Filter, candidates
from flight_oplog.gathering import LOG_FIELDS, LOG_NAMES, TOGETHER_ROWS, Columns, Few, as_type, log_columns
from flight_oplog.numbers import Places
from flight_oplog.overview import Overview
from flight_oplog.pruning import ALONE_MAX, Pruner
from flight_oplog.records import RecordMeta
from flight_oplog.scans import Fragment, ScanContext, Table
from flight_oplog.store import Snapshot
from flight_oplog.top import Top
from flight_oplog.topics import Topic
from flight_oplog.vocabulary import NUMBER, NUMBER_BYTES

# How long one statement may spend on making indexes of texts that are looked for again and again.
INDEXING_SECONDS = 0.1
VIEW_BYTES = 12
# Records of fewer entries on average are not dealt out over the cores; nor are texts of files with fewer shown as views.
SHARED_ENTRIES = 4096
ALONE_ENTRIES = 1 << 18  # so few in all neither
# Nor do other threads read them where they are in so few records: asking one takes as long.
ALONE_RECORDS = 4
# So many records tell whether a column is in memory.
SAMPLED_RECORDS = 8
# Texts of fewer entries are not shown by numbers: planning once more would take as long as they save.
NUMBERED_ENTRIES = 1 << 19
# A run of a record's entries is cut out of its large pieces where it is at least this part of them.
RUN_PART = 8
# An overview of all of a topic's files is made where it looks into no more than so many for each that is wanted.
READ_TOO = 2


class NotWorthIt(Exception):
    """What a statement tried to be faster by would make it slower; plan it as it is."""


class _Later:
    """What is read when it is asked for, as the system reads it in meanwhile: threads of our own would wait for each other.

    It counts as there when it is asked about for the second time: another record was looked at since.
    """

    def __init__(self, read: Callable[[], Decoded]) -> None:
        self.result = read
        self._is_there = False

    def done(self) -> bool:
        was_there, self._is_there = self._is_there, True
        return was_there

    def cancel(self) -> bool:
        return True


_Fetched = Future[Decoded] | _Later


class EntriesTable(Table):
    """A topic's entries: exactly the clients' columns, or with the log's own beside them."""

    def __init__(self, snapshot: Snapshot, topic: Topic, context: ScanContext, with_log_columns: bool) -> None:
        own = [*(LOG_FIELDS if with_log_columns else ()), *(pa.field(name, NUMBER) for name in context.numbered)]
        schema = pa.schema([*topic.schema, *own]) if own else topic.schema
        super().__init__(snapshot, topic, schema, context, "log" if with_log_columns else "public")
        self._read: set[str] = set()
        self._stored: dict[str, frozenset[str]] = {}  # the names of columns in content of each schema
        self._reads_alone = False  # whoever scans: threads that read for it would wait for it, or there is too little to read
        self._are_ordered = False  # the records that partitions look at: those first that may have the statement's first rows
        self._held: dict[str, Decoded | None] = {}  # what is known of the records that partitions look at just now
        if context.views and topic.entries >= SHARED_ENTRIES * len(topic.files):  # showing a small file's texts so costs more than it saves
            self._schema = pa.schema([f.with_type(pa.string_view()) if self._looks_short(f) else f for f in schema])

    def get_fragments(self, filter: pc.Expression | None = None) -> Iterator[Fragment]:
        try:
            # A filter on a text shown as a view does not bind to the plain text: the statement is planned without views.
            return self.fragments(None if filter is None else Filter.of(filter, self._plain))
        except Exception as error:
            self.context.failures.append(error)
            raise

    def fragments(self, wanted: Filter | None) -> Iterator[Fragment]:
        """Return what has to be scanned for what passes a filter."""
        records, of_each = self._surviving(wanted)
        before = np.cumsum(of_each)
        entries = int(before[-1]) if len(records) else 0
        self.context.entries += entries
        if self.context.numbered and not self._are_worth_numbers(records, entries):
            raise NotWorthIt("the numbers of texts")
        # Small records are a Python thread's work, not a core's, as are few entries of many in memory: two would wait for each other.
        # Few entries in all are not worth another.
        are_shared = entries > ALONE_ENTRIES and entries >= SHARED_ENTRIES * len(records) and not self._are_found_in_memory(wanted, records)
        dealt = _deal(records, before, self.context.partitions if are_shared else 1)
        self._reads_alone = len(dealt) > 1 or (entries <= ALONE_ENTRIES and len(records) <= ALONE_RECORDS)
        return iter([Fragment(self, some, wanted) for some in dealt])

    def _are_found_in_memory(self, filter: Filter | None, records: Sequence[RecordMeta]) -> bool:
        """Whether a text, or the first of an order and maybe a range, is looked for in what is in memory, going by a few of the records."""
        top = self._top(filter)
        if filter is not None and filter.wanted is not None:
            names: Sequence[str] = filter.wanted[:1]
        elif top is not None and (filter is None or filter.range):
            names = [top.column, *(filter.keys if filter else ())]
        else:
            return False  # any other condition is Arrow's work on all entries
        few = records[:: len(records) // SAMPLED_RECORDS + 1]
        return all(self.context.cache.holds(record, self._of_entries(record, names, by_codes=top is None)) for record in few)

    def _top(self, filter: Filter | None) -> Top | None:
        """What of the statement's first rows tells which entries it wants."""
        top = self.context.top
        return None if top is None or not top.takes(self._plain) or (filter is not None and filter.wanted is not None) else top

    def _surviving(self, filter: Filter | None) -> tuple[Sequence[RecordMeta], np.ndarray]:
        """Return the records that the scan has to look at, in offset order, and the entries of each."""
        topic, offsets, cache = self._topic, self.context.offsets, self.context.cache
        cache.let_go(topic.name, self._snapshot.table_version, topic.files)
        among = offsets
        if among is None and filter is None and self.context.top is not None:
            among = self.context.top.offsets(topic.first_offset, topic.next_offset)
        files = range(len(topic.files)) if among is None else topic.places_within(*among)
        pruner = None if filter is None else Pruner(self._snapshot, topic, self._plain, filter, cache, self.counts)
        kept: Places = files if pruner is None or len(files) == 1 else pruner.files(files)
        overview, of_files = self._of_files(kept)
        places = of_files if pruner is None else pruner.records(overview, of_files)
        top = self._top(filter)
        if top is not None and offsets is None:
            found = overview.alone(self._best_first(top, overview, places))
        elif self.context.reads_all and offsets is None and not topic.overlaps:
            if places is not None:
                keys = () if filter is None else filter.keys
                wider = overview.widened(places, lambda record: cache.holds(record, self._of_entries(record, keys)))
                if of_files is not None and wider is not places:
                    kept = np.union1d(kept, overview.files_of(wider))
                    of_files = overview.places_of(kept)
                places = wider
            found = overview.together(places)
        else:
            found = overview.alone(places)
        self.counts.files += len(topic.files)
        self.counts.files_pruned += len(topic.files) - len(kept)
        considered = overview.rows(of_files)
        self.counts.records += considered
        self.counts.records_pruned += considered - overview.rows(places)
        return found

    def _best_first(self, top: Top, overview: Overview, places: np.ndarray | None) -> np.ndarray | None:
        """Return the places of very many records so that those come first that may have the first rows; of others as they are."""
        of_all = top.order(overview.records, self._plain, self._topic) if len(overview.records.items) > ALONE_MAX else None
        if of_all is None:
            return places
        self._are_ordered = True
        order = np.argsort(of_all if places is None else of_all[places], kind="stable")
        return order if places is None else places[order]

    def _of_files(self, places: Places) -> tuple[Overview, np.ndarray | None]:
        """Return an overview, and where in it the records of some of the topic's files are, None for all that is in it.

        Where offsets are asked for, it is of those within them.
        """
        topic, offsets, cache = self._topic, self.context.offsets, self.context.cache
        if offsets is None and cache.lacks(topic) <= READ_TOO * len(places):
            overview = cache.overview(self._snapshot, topic)
            return overview, None if len(places) == len(topic.files) else overview.places_of(places)
        files = [topic.files[place] for place in places]
        self._snapshot.store.reader.prefetch(files)
        found = [self._snapshot.records_of(topic, file) for file in files]
        if offsets is not None:
            first, last = offsets
            records = itertools.chain.from_iterable(found)
            found = [sorted((r for r in records if r.first_offset < last and r.first_offset + r.entries > first), key=_by_offset)]
        return Overview.of(found, topic.first_offset), None

    def _looks_short(self, column: pa.Field) -> bool:
        """Whether a column holds texts of at most 12 bytes, going by one record's bounds: views keep such texts inline.

        Only speed hangs on it, so a guess will do.
        """
        if column.type != pa.string() or not self._topic.files:
            return False
        limits = self._snapshot.store.reader.records(self._topic.files[-1])[-1].bounds.get(column.name, {})
        return "min" in limits and max(len(limits["min"].encode()), len(limits["max"].encode())) <= VIEW_BYTES

    def scan(self, records: Sequence[RecordMeta], projected: pa.Schema, filter: Filter | None) -> Iterator[pa.RecordBatch]:
        if filter is None and not projected.names and self.context.offsets is None:  # COUNT(*): the records' numbers are enough
            yield codec.with_rows([], projected, sum(record.entries for record in records))
            return
        top = self._top(filter)
        few = Few(projected, self._plain, filter if filter is not None and filter.wanted is not None else None)
        coming = self._looked_at(records, projected, filter, top)
        if filter is not None or top is not None:  # else all that is wanted is read ahead there
            coming = self._with_columns(coming, projected.names, few.names)
        for record, rows in coming:
            if self.context.stopped.is_set():
                return
            if rows is None:
                yield from few.taken()
                for batch in self._together(record, projected) or self._apart(record, projected):
                    if self.context.stopped.is_set():
                        return
                    yield batch
                if not self.context.sums_up:
                    self._snapshot.store.reader.give_back(record)
            elif few.are_all and self._is_run(rows, record) and (found := self._together(record, projected)):
                yield from few.taken()
                yield from _run_of(found, int(rows[0]), len(rows))
            elif len(rows):
                yield from few.add(self.columns(record, few.names, by_codes=True), rows)
            self._held.pop(record.key, None)
        yield from few.taken()

    def _looked_at(
        self, records: Sequence[RecordMeta], projected: pa.Schema, filter: Filter | None, top: Top | None
    ) -> Iterator[tuple[RecordMeta, np.ndarray | None]]:
        """Yield each record with the places of what is wanted of it, None for all of it."""
        names = projected.names if filter is None else _looked_for(filter)
        if top is None:
            coming = self._ahead(records, names, by_codes=filter is not None and len(names) == 1)
        else:
            coming = top.in_order(records, self._plain, self._topic.stored, self._are_ordered)
        for record, best in coming:
            if self.context.stopped.is_set():
                return
            self._snapshot.store.reader.trim()
            self._held.setdefault(record.key, None)
            rows = self._within(record, None if filter is None else self._matching(record, filter))
            if top is not None and (rows is None or len(rows)):
                rows = top.narrowed(self.columns(record, [top.column]).arrays(top.column), rows, may_be_nan=best is None)
            yield record, rows

    def _with_columns(
        self, coming: Iterator[tuple[RecordMeta, np.ndarray | None]], of_all: Sequence[str], of_some: Sequence[str]
    ) -> Iterator[tuple[RecordMeta, np.ndarray | None]]:
        """Yield the records of which something is wanted; while columns of one are read, those after it are looked at.

        A record whose columns are there does not wait: a LIMIT may be content with it. If there is one, no more wait than it took before.
        """
        waiting = deque[tuple[RecordMeta, np.ndarray | None, _Fetched | None]]()
        most = self._snapshot.store.reader.reads_ahead
        room = most if self.context.reads_all else 0
        failure: Exception | None = None
        try:
            while True:
                try:
                    record, rows = next(coming)
                except StopIteration:
                    break
                except Exception as error:  # what was found before comes first: it may be all that is wanted
                    failure = error
                    break
                if rows is None or len(rows):
                    of_record = self._fetch(record, of_all) if rows is None else self._fetch(record, of_some, by_codes=True)
                    waiting.append((record, rows, of_record))
                else:
                    self._held.pop(record.key, None)
                while waiting and (len(waiting) > room or waiting[0][2] is None or waiting[0][2].done()):
                    yield self._arrived(*waiting.popleft())
                    room = min(room + 1, most)
            while waiting:
                yield self._arrived(*waiting.popleft())
        finally:
            for *_, fetched in waiting:
                if fetched is not None:
                    fetched.cancel()
        if failure is not None:
            raise failure

    def _arrived(self, record: RecordMeta, rows: np.ndarray | None, fetched: _Fetched | None) -> tuple[RecordMeta, np.ndarray | None]:
        if fetched is not None:
            self._held[record.key] = fetched.result()
        return record, rows

    def _ahead(self, records: Sequence[RecordMeta], names: Sequence[str], by_codes: bool) -> Iterator[tuple[RecordMeta, None]]:
        """Yield records; while one is looked at, columns of those after it are read.

        Where a LIMIT may be content with the first, not before the second is asked for, and then twice as many each time.
        """
        coming, waiting = iter(records), deque[tuple[RecordMeta, _Fetched | None]]()
        most = self._snapshot.store.reader.reads_ahead + 1
        depth = most if self.context.reads_all else 1
        if not self.context.begins_with_several or len(records) == 1:
            yield from ((record, None) for record in itertools.islice(coming, 1))
        try:
            while True:
                depth = min(2 * depth, most)
                for record in itertools.islice(coming, depth - len(waiting)):
                    waiting.append((record, self._fetch(record, names, by_codes)))
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

    def _fetch(self, record: RecordMeta, names: Sequence[str], by_codes: bool = False) -> _Fetched | None:
        """Begin to read columns of a record, texts as codes if they may be, unless they are in memory."""
        cache, held = self.context.cache, self._held.get(record.key)
        numbered = [self.context.numbered[name] for name in names if name in self.context.numbered]
        of_entries: list[Name] = [*self._of_entries(record, names, by_codes)]
        for of in numbered:
            if not cache.has_numbers(record, *of):
                of_entries += self._of_entries(record, [of[0]], by_codes=True)
        if not of_entries or (held is not None and held.has(of_entries)) or cache.holds(record, of_entries):
            return None
        if self._snapshot.store.reader.reads_at_once(record):
            return None
        read = functools.partial(cache.columns, self._snapshot, record, of_entries, self.counts, held, self.context.stopped)
        if self._reads_alone and self._snapshot.store.reader.begin(record, of_entries):
            return _Later(read)
        return cache.readers.submit(read)

    def _codes(self, record: RecordMeta, name: str) -> pa.DictionaryArray | None:
        """Return the codes of a record's texts, if it has them."""
        return self._decoded(record, [CodesOf(name)]).columns[CodesOf(name)][0] if record.has_codes(name) else None

    def _matching(self, record: RecordMeta, filter: Filter) -> np.ndarray | None:
        """Return the places of the record's entries that pass, or None for all; decodes only the filter's columns.

        Where the filter wants a text, of those that begin like it: few are left then, and looked at later, together.
        """
        names = _looked_for(filter)
        coded = self._codes(record, names[0]) if len(names) == 1 else None
        if filter.wanted is None:
            found: np.ndarray | None
            if filter.range:
                columns = self.columns(record, filter.keys)
                found = filter.within(columns.arrays(filter.keys[0]), columns.ends(filter.keys[0]))
            elif coded is not None:
                found = filter.passing_codes(coded, self._plain.field(names[0]).type)
            else:
                found = filter.passing(self.batches(record, filter.keys))
            return None if found is None or len(found) == record.entries else found
        name, text = filter.wanted
        texts = self.columns(record, [name]).arrays(name) if coded is None else [coded]
        began = time.monotonic()
        index = self.context.cache.index(record, name, texts, may_make=self.context.indexing_seconds < INDEXING_SECONDS)
        self.context.indexing_seconds += time.monotonic() - began
        return candidates(texts, text) if index is None else index.candidates(text)

    def _is_run(self, rows: np.ndarray, record: RecordMeta) -> bool:
        """Whether rows are neighbours, and enough of a record."""
        return len(rows) * RUN_PART >= record.entries and bool(rows[-1] - rows[0] == len(rows) - 1)

    def _within(self, record: RecordMeta, rows: np.ndarray | None) -> np.ndarray | None:
        """Return those of the record's places (None: all of them) that lie within the offsets asked for."""
        if self.context.offsets is None:
            return rows
        first, last = (offset - record.first_offset for offset in self.context.offsets)
        if rows is None:
            return None if first <= 0 and last >= record.entries else np.arange(max(0, first), min(record.entries, last))
        return rows[(rows >= first) & (rows < last)]

    def batches(self, record: RecordMeta, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        schema = pa.schema([self._plain.field(name) for name in names])
        if not names:
            yield codec.with_rows([], schema, record.entries)
            return
        columns = self.columns(record, names)
        for place in range(len(columns.lengths)):
            yield pa.RecordBatch.from_arrays([columns.array(name, place) for name in names], schema=schema)

    def _apart(self, record: RecordMeta, projected: pa.Schema) -> Iterator[pa.RecordBatch]:
        """Yield a record's entries in the pieces that they are stored in."""
        return (_shown(batch, projected) for batch in self.batches(record, projected.names))

    def _together(self, record: RecordMeta, projected: pa.Schema) -> list[pa.RecordBatch] | None:
        """Return a record's entries in few large pieces, where their columns are kept so."""
        if not self.context.sums_up or record.entries < SHARED_ENTRIES:
            return None
        stored = pa.schema([f for f in projected if f.name not in self.context.numbered])
        if len(self._of_entries(record, stored.names)) < max(1, len(stored)):
            return None

        def make(name: str, kind: pa.DataType) -> list[pa.Array]:
            return self.columns(record, projected.names).together(name, kind)

        pieces = self.context.cache.together(record, stored, TOGETHER_ROWS, self.counts, make)
        if pieces is None:
            return None
        self._count(record)
        found = dict(zip(stored.names, pieces, strict=True))
        ends = list(itertools.accumulate(map(len, pieces[0]), initial=0))
        for name, numbers in self._numbers(record, projected.names).items():
            found[name] = [numbers.slice(start, end - start) for start, end in itertools.pairwise(ends)]
        return [pa.RecordBatch.from_arrays(list(each), schema=projected) for each in zip(*map(found.get, projected.names), strict=True)]

    def _count(self, record: RecordMeta) -> None:
        """Count a record as read, once."""
        if record.key not in self._read:
            self._read.add(record.key)
            self.counts.records_read += record.rows

    def _of_entries(self, record: RecordMeta, names: Sequence[str], by_codes: bool = False) -> Sequence[Name]:
        """Return those of some columns that a record's content has; with `by_codes`, texts as codes where they are."""
        stored = self._stored.get(record.schema_id)
        if stored is None:
            stored = self._stored[record.schema_id] = frozenset(self._topic.stored(record).names) - LOG_NAMES
        found = [name for name in names if name in stored]
        return [CodesOf(name) if record.has_codes(name) else name for name in found] if by_codes else found

    def _decoded(self, record: RecordMeta, names: Sequence[Name]) -> Decoded:
        """Return what is stored of a record, at least so much, from memory or decoded now."""
        self._count(record)
        decoded = self.context.cache.columns(self._snapshot, record, names, self.counts, self._held.get(record.key), self.context.stopped)
        if record.key in self._held:
            self._held[record.key] = decoded
        return decoded

    def columns(self, record: RecordMeta, names: Sequence[str], by_codes: bool = False) -> Columns:
        """Return columns of a record, from memory or decoded now; with `by_codes`, for a few of their rows, texts as codes."""
        of_entries = self._of_entries(record, names, by_codes)
        own = log_columns(record, names) | self._numbers(record, names)
        if not of_entries:
            return Columns(self._plain, [record.entries], {}, own)
        decoded = self._decoded(record, of_entries)
        own |= {name.column: decoded.columns[name][0] for name in of_entries if isinstance(name, CodesOf)}
        return Columns(self._plain, decoded.lengths, decoded.columns, own, decoded.noted)

    def _are_worth_numbers(self, records: Sequence[RecordMeta], entries: int) -> bool:
        """Whether texts are to be shown by their numbers: those of many entries, and most are in memory or all that are missing can be."""
        if entries < NUMBERED_ENTRIES:
            return False
        cache, numbered = self.context.cache, self.context.numbered.values()
        missing = sum(
            record.entries for record in records for of in numbered if not record.has_codes(of[0]) and not cache.has_numbers(record, *of)
        )
        return (self.context.makes_numbers or 8 * missing <= entries) and cache.has_room(missing * NUMBER_BYTES * 9 // 8)

    def _numbers(self, record: RecordMeta, names: Sequence[str]) -> dict[str, pa.Array]:
        """Return those of some columns that show the numbers of another's texts."""
        found = {}
        for name in names:
            if name in self.context.numbered:
                column, vocabulary = self.context.numbered[name]

                def texts(column: str = column) -> list[pa.Array]:
                    coded = self._codes(record, column)
                    return self.columns(record, [column]).arrays(column) if coded is None else [coded]

                self._count(record)
                found[name] = self.context.cache.numbers(record, column, vocabulary, self.counts, texts)
        return found


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
        snapshot.store.reader.give_back(record)


def codes_kept(snapshot: Snapshot, topic: Topic, column: str) -> int:
    """Return how many texts a topic's records have codes of, 0 for none, going by the first and the last: only speed hangs on it."""
    ends = [snapshot.store.reader.records(file)[end] for file, end in ((topic.files[0], 0), (topic.files[-1], -1))]
    return max(record.bounds[column]["codes"] if record.has_codes(column) else 0 for record in ends)


def _looked_for(filter: Filter) -> Sequence[str]:
    """Return the columns that are looked at first."""
    return filter.keys if filter.wanted is None else filter.wanted[:1]


def _shown(batch: pa.RecordBatch, projected: pa.Schema) -> pa.RecordBatch:
    """Return a batch in the types DataFusion was told; only plain texts may have to become views."""
    if batch.schema.equals(projected) or not projected.names:
        return batch
    return pa.RecordBatch.from_arrays([as_type(c, f.type) for c, f in zip(batch.columns, projected, strict=True)], schema=projected)


def _run_of(batches: Sequence[pa.RecordBatch], start: int, rows: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows from `start` on of some batches, counted through; nothing is copied."""
    for batch in batches:
        found = batch.slice(max(start, 0), max(0, min(rows, start + rows, batch.num_rows - start)))
        if found.num_rows:
            yield found
        start -= batch.num_rows


def _by_offset(record: RecordMeta) -> int:
    return record.first_offset


def _deal(records: Sequence[RecordMeta], before: np.ndarray, partitions: int) -> list[Sequence[RecordMeta]]:
    """Split records into at most `partitions` runs of neighbours with about the same number of entries; `before` adds these up."""
    if partitions <= 1 or len(records) <= 1:
        return [records]
    shares = [before[-1] * part / partitions for part in range(1, partitions)]
    cuts = [0, *(np.searchsorted(before, shares) + 1).tolist(), len(records)]
    return [records[start:end] for start, end in itertools.pairwise(cuts) if end > start]
