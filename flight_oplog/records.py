"""Records as they are read: the rows of data files without their content, their content, and columns of it.

Small records of a row group that follow each other are read as one: what they cost alone is more than their entries
do. Such a record has the entries, appends and bounds of them all; `rows` says how many they are.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flight_oplog import codec, summary
from flight_oplog.codes import CodesOf, Name
from flight_oplog.errors import CorruptLog, OplogError
from flight_oplog.files import allocate, is_refusal, reading_error
from flight_oplog.parts import Parts, Span
from flight_oplog.rows import CREATED_BY, only_row_of
from flight_oplog.schema import RECORD_SCHEMA
from flight_oplog.storage import ALIGNED_BYTES, Read, Storage

# Records of a row group are read as one up to so many entries, and about so many bytes.
TOGETHER_ENTRIES_MAX = 1 << 20
TOGETHER_BYTES_MAX = 64 << 20
# A file up to this size is read at once.
SMALL_FILE_BYTES = 64 << 10
# The rows of so many row groups are read by several threads.
THREADS_FROM_GROUPS = 16

# The parts of so many records are kept, up to 300 KB each: what a scan begins to read it asks for again soon.
PARTS_KEPT = 64

# A page's header, and the length of its only value.
_PAGE_HEAD_BYTES_MAX = 64
_OF_FIRST = ("schema_id", "min_time", "max_time", "digest", "parts")
# Any decimal in bounds is written like this; a text may be.
_DECIMAL = re.compile(r"-?\d+(\.\d+)?(E[+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class DataFile:
    """One committed Parquet file of one topic, as its `add` action describes it."""

    path: str
    topic: str
    size: int
    records: int
    first_offset: int
    last_record: int  # the first offset of its last record
    min_time: datetime.datetime | None = None
    max_time: datetime.datetime | None = None

    @property
    def key(self) -> str:
        """Names this file among all files ever."""
        return self.path


@dataclass(slots=True, eq=False)
class RecordMeta:
    """A row of the outer table without its content, or several read as one, and where the content is."""

    file: DataFile
    row: int
    row_group: int
    place: int  # of its row, or of the first, in the row group
    span: Span | None
    first_offset: int
    entries: int
    schema_id: str
    min_time: datetime.datetime | None
    max_time: datetime.datetime | None
    digest: str
    parts: str | None
    known_appends: list[dict[str, Any]] | pa.Array
    known_bounds: codec.Bounds | _Bounds
    rows: int = 1
    each: tuple[pa.Array, list[int], list[int]] | None = None  # digest, entries and place of each row, where there are several
    members: Sequence[RecordMeta] = ()  # of one that was put together of several
    key: str = field(init=False, repr=False)  # names this record among all records ever

    def __post_init__(self) -> None:
        self.key = f"{self.file.path}#{self.row}"
        if self.members:
            self.key += f"*{len(self.members)}"
        if self.rows > 1:
            self.key += f"+{self.rows}"

    @property
    def appends(self) -> list[dict[str, Any]]:
        if self.members and not self.known_appends:
            self.known_appends = list(itertools.chain.from_iterable(member.appends for member in self.members))
        if isinstance(self.known_appends, pa.Array):
            self.known_appends = self.known_appends.flatten().to_pylist()
        return self.known_appends

    @property
    def bounds(self) -> codec.Bounds:
        if self.members and not self.known_bounds:
            self.known_bounds = _together([member.bounds for member in self.members], self.entries_of_each)
        if isinstance(self.known_bounds, _Bounds):
            self.known_bounds = self.known_bounds.together()
        return self.known_bounds

    def has_codes(self, column: str) -> bool:
        """Whether the texts of a column can be read as codes."""
        return self.span is not None and self.parts is not None and "codes" in self.bounds.get(column, ())

    @property
    def entries_of_each(self) -> Sequence[int]:
        """The entries of each row, or of each record that it was put together of."""
        if self.members:
            return [member.entries for member in self.members]
        return [self.entries] if self.each is None else self.each[1]

    @property
    def where(self) -> str:
        return f"topic {self.file.topic!r}, file {os.path.basename(self.file.path)}, offset {self.first_offset}"


@dataclass(frozen=True, slots=True)
class _Bounds:
    """Bounds of neighbouring rows, as they are written; looked at when somebody asks."""

    texts: pa.Array
    entries: np.ndarray

    def together(self) -> codec.Bounds:
        """Return bounds of them all."""
        return _together([json.loads(text) if text else {} for text in self.texts.to_pylist()], self.entries.tolist())


def _together(bounds: Sequence[codec.Bounds], entries: Sequence[int]) -> codec.Bounds:
    """Return the bounds of records, of so many entries each, as those of one."""
    if len(bounds) == 1:
        return bounds[0]
    return {name: _of_column([each.get(name, {}) for each in bounds], entries) for name in bounds[0]}


def _of_column(limits: Sequence[dict[str, Any]], entries: Sequence[int]) -> dict[str, Any]:
    if any("nulls" not in each for each in limits):
        return {}
    together: dict[str, Any] = {"nulls": sum(each["nulls"] for each in limits)}
    has_values = [each for each, rows in zip(limits, entries, strict=True) if each["nulls"] < rows]
    if has_values and all("min" in each for each in has_values):
        low, high = min(each["min"] for each in has_values), max(each["max"] for each in has_values)
        if not isinstance(low, str) or not all(_DECIMAL.fullmatch(each[end]) for each in has_values for end in ("min", "max")):
            together |= {"min": low, "max": high}  # decimals do not order as texts do
    return together


def joined(records: Sequence[RecordMeta]) -> RecordMeta:
    """Return records of one schema that follow each other as one."""
    first = records[0]
    return RecordMeta(
        file=first.file,
        row=first.row,
        row_group=first.row_group,
        place=first.place,
        span=None,
        first_offset=first.first_offset,
        entries=sum(record.entries for record in records),
        schema_id=first.schema_id,
        min_time=None,
        max_time=None,
        digest="",
        parts=None,
        known_appends=[],
        known_bounds={},
        rows=sum(record.rows for record in records),
        members=tuple(records),
    )


# Reading rows


def read_records(storage: Storage, file: DataFile, each: bool = False) -> tuple[RecordMeta, ...]:
    """Return the records of a file in offset order; with `each`, small ones one by one.

    Raises CorruptLog where they are damaged or do not add up.
    """
    if file.records == 1 and file.size <= SMALL_FILE_BYTES and not each and (found := _small(storage, file)) is not None:
        return (found,)
    with _parquet(storage, file) as opened:
        try:
            groups = _groups(opened.metadata)
            ours = opened.metadata.created_by == CREATED_BY
            # Another program that writes a file anew may take its summary along, for other rows.
            told = _summary(file, opened.metadata, must_be_whole=each) if ours else None
            table = told
            if table is None or each:
                # Files are small as a rule, and there may be very many.
                table = opened.read(columns=summary.SCHEMA.names, use_threads=opened.num_row_groups >= THREADS_FROM_GROUPS)
                if told is not None and told.to_pylist() != table.to_pylist():
                    raise CorruptLog(f"{_name(file)}: the summary in its footer is not of its records; restore it")
        except CorruptLog:
            raise
        except Exception as error:  # damaged bytes surface as errors of many kinds
            raise _unreadable(file, error) from error
    try:
        if len(table) == 1:
            row = {name: column[0].as_py() for name, column in zip(table.column_names, table.columns, strict=True)}
            only = _only(file, row, groups[0].span, ours)
            metas: tuple[RecordMeta, ...] = () if only is None else (only,)
        else:
            rows = _Rows(file, table, groups)
            metas = tuple(rows.records(each)) if rows.add_up(ours) else ()
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, IndexError, RecursionError, pa.ArrowException) as error:
        raise CorruptLog(f"{_name(file)} does not hold records; restore it") from error
    if not metas and len(table):
        raise CorruptLog(f"{_name(file)} holds records that do not add up; restore it")
    if len(table) != file.records:
        raise CorruptLog(f"{_name(file)} holds {len(table)} of {file.records} records; restore it")
    return metas


def _summary(file: DataFile, metadata: pq.FileMetaData, must_be_whole: bool) -> pa.Table | None:
    """Return the rows that a file's footer tells of. A damaged summary is passed over, unless it must be whole: the rows are there."""
    try:
        found = summary.read(metadata.metadata, metadata.num_rows)
    except (ValueError, pa.ArrowException) as error:
        if must_be_whole:
            raise CorruptLog(f"{_name(file)}: the summary in its footer is damaged; restore it") from error
        return None
    if found is None:
        return None
    offsets = pc.add(found["first_offset"], file.first_offset)
    return found.set_column(0, found.schema.field(0), offsets)


def read_rows(storage: Storage, file: DataFile, names: Sequence[str]) -> Iterator[pa.Table]:
    """Yield some columns of a file's rows, a few row groups at a time. Raises CorruptLog where they are damaged."""
    schema = pa.schema([RECORD_SCHEMA.field(name) for name in names])
    with _parquet(storage, file) as opened:
        if opened.metadata.num_rows != file.records:
            raise CorruptLog(f"{_name(file)} holds {opened.metadata.num_rows} of {file.records} records; restore it")
        for start in range(0, opened.num_row_groups, THREADS_FROM_GROUPS):
            groups = range(start, min(start + THREADS_FROM_GROUPS, opened.num_row_groups))
            try:
                yield opened.read_row_groups(groups, columns=list(names)).select(list(names)).cast(schema)
            except Exception as error:  # damaged bytes surface as errors of many kinds
                raise _unreadable(file, error) from error


@dataclass(frozen=True, slots=True)
class _Group:
    """A row group: its first row, how many it has, its content's bytes, and where the content of its only row is."""

    number: int
    first: int
    rows: int
    nbytes: int
    span: Span | None


def _groups(metadata: pq.FileMetaData) -> list[_Group]:
    found, first = [], 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunk = group.column(group.num_columns - 1)
        is_plain = chunk.path_in_schema == "content" and chunk.compression == "UNCOMPRESSED" and not chunk.has_dictionary_page
        span = (chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size) if group.num_rows == 1 and is_plain else None
        found.append(_Group(number, first, group.num_rows, chunk.total_uncompressed_size, span))
        first += group.num_rows
    return found


def _small(storage: Storage, file: DataFile) -> RecordMeta | None:
    """Return the record of a small file that has one, as a topic has many that is written slowly; None where a closer look is wanted."""
    try:
        found = only_row_of(storage.read(file.path, 0, file.size).to_pybytes())
    except OSError as error:
        raise _unreadable(file, error) from error
    try:
        return None if found is None else _only(file, *found, ours=True)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return None


def _only(file: DataFile, row: dict[str, Any], span: Span | None, ours: bool) -> RecordMeta | None:
    """Return the record of a file that has one; None where it does not add up."""
    gap, appends = row["first_offset"] - file.first_offset, row.pop("appends")
    if (gap != 0 if ours else gap < 0) or sum(owner["entries"] for owner in appends) != row["entries"]:
        return None
    row |= _times_of(row) | {"known_appends": appends, "known_bounds": json.loads(row.pop("bounds") or "{}"), "parts": row.get("parts")}
    return RecordMeta(file=file, row=0, row_group=0, place=0, span=span, **row)


def _times_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return the bounds of a row's times: both, or none."""
    times = {name: row[name] for name in ("min_time", "max_time")}
    return dict.fromkeys(times) if None in times.values() else times


class _Rows:
    """The rows of a file in offset order, column by column."""

    def __init__(self, file: DataFile, table: pa.Table, groups: Sequence[_Group]) -> None:
        self._file, self._groups = file, groups
        firsts = table["first_offset"].to_numpy()
        self._places = np.arange(len(table))
        if (np.diff(firsts) < 0).any():
            self._places = np.argsort(firsts, kind="stable")
            table = table.take(pa.array(self._places))
        self._group = np.repeat(np.arange(len(groups)), [group.rows for group in groups])[self._places]
        self._columns = {name: table[name].combine_chunks() for name in table.column_names}
        self._firsts, self._entries = (self._columns[name].to_numpy() for name in ("first_offset", "entries"))
        self._ends = self._firsts + self._entries

    def add_up(self, ours: bool) -> bool:
        """Whether the runs follow each other, and are as long as their appends say."""
        appends = self._columns["appends"]
        ends = np.concatenate([[0], np.cumsum(appends.flatten().field("entries").to_numpy())])
        places = np.concatenate([[0], np.cumsum(pc.list_value_length(appends).to_numpy())])
        gaps = self._firsts - np.concatenate([[self._file.first_offset], self._ends[:-1]])
        # A file that another program's compaction made may hold runs from here and there.
        follows = (gaps == 0) if ours else (gaps >= 0)
        return bool(follows.all() and (np.diff(ends[places]) == self._entries).all())

    def records(self, each: bool) -> Iterator[RecordMeta]:
        runs = list(itertools.pairwise(range(len(self._firsts) + 1)) if each else self._together())
        begins = pa.array([start for start, _ in runs], pa.int64())
        nothing = [None] * len(runs)
        of_first = {name: self._columns[name].take(begins).to_pylist() if name in self._columns else nothing for name in _OF_FIRST}
        for (start, end), *first in zip(runs, *of_first.values(), strict=True):
            yield self._record(start, end, dict(zip(of_first, first, strict=True)))

    def _together(self) -> Iterator[Span]:
        """Yield runs of rows that are read as one."""
        codes = self._columns["schema_id"].dictionary_encode().indices.to_numpy()
        follows = self._firsts[1:] == self._ends[:-1]
        cuts = ~follows | (np.diff(self._group) != 0) | (np.diff(codes) != 0)
        if "parts" in self._columns:  # the digest of such a row is of its parts, and it is large
            alone = self._columns["parts"].is_valid().to_numpy(zero_copy_only=False)
            cuts |= alone[1:] | alone[:-1]
        edges = [0, *(np.flatnonzero(cuts) + 1).tolist(), len(self._firsts)]
        for begin, end in itertools.pairwise(edges):
            start = begin
            while start < end:
                group = self._groups[self._group[start]]
                room = int(np.searchsorted(self._ends[start:end], self._firsts[start] + TOGETHER_ENTRIES_MAX, "right"))
                step = max(1, min(room, group.rows * TOGETHER_BYTES_MAX // max(1, group.nbytes)))
                yield start, min(end, start + step)
                start += step

    def _record(self, start: int, end: int, first: dict[str, Any]) -> RecordMeta:
        """Return rows as one record; of the first of them there are the values that do not have to be put together."""
        columns, rows = self._columns, end - start
        group = self._groups[self._group[start]]
        places = (self._places[start:end] - group.first).tolist()  # another program's compaction keeps no order
        if rows > 1:
            low, high = (columns[name].slice(start, rows) for name in ("min_time", "max_time"))
            is_timed = not low.null_count and not high.null_count
            first |= {"digest": "", "parts": None, "min_time": None, "max_time": None}
            first |= {"min_time": pc.min(low).as_py(), "max_time": pc.max(high).as_py()} if is_timed else {}
        else:
            first |= _times_of(first)
        return RecordMeta(
            file=self._file,
            row=int(self._places[start]),
            row_group=group.number,
            place=places[0],
            span=group.span,
            first_offset=int(self._firsts[start]),
            entries=int(self._ends[end - 1] - self._firsts[start]),
            **first,
            known_appends=columns["appends"].slice(start, rows),
            known_bounds=_Bounds(columns["bounds"].slice(start, rows), self._entries[start:end]),
            rows=rows,
            each=(columns["digest"].slice(start, rows), self._entries[start:end].tolist(), places) if rows > 1 else None,
        )


def _unreadable(file: DataFile, error: Exception) -> OplogError:
    if isinstance(error, FileNotFoundError):
        return CorruptLog(f"{_name(file)} is missing; restore it")
    if is_refusal(error):
        return reading_error(_name(file), error)
    return CorruptLog(f"{_name(file)} is not readable Parquet; restore it")


# Reading content


@dataclass(frozen=True, slots=True)
class ReadColumns(Read):
    """Content of which some columns are there, and the codes of some."""

    codes: Mapping[str, pa.Buffer] = field(default_factory=dict)


def read_content(storage: Storage, record: RecordMeta) -> pa.Buffer:
    """Return a record's content, checked against its digest. Raises CorruptLog naming topic, file and offset."""
    return next(read_contents(storage, [record]))


def read_contents(storage: Storage, records: Iterable[RecordMeta]) -> Iterator[pa.Buffer]:
    """Yield the content of records, as `read_content`; a row group that neighbours share is read once."""
    for _, of_group in itertools.groupby(records, lambda record: (record.file.path, record.row_group)):
        shared: pa.ChunkedArray | None = None
        for record in of_group:
            if record.span is not None:
                contents = [_read_span(storage, record, *record.span)]
            else:
                shared = _read_group(storage, record) if shared is None else shared
                contents = _of_group(shared, record)
            yield _checked(record, contents)


def _checked(record: RecordMeta, contents: list[pa.Buffer]) -> pa.Buffer:
    if record.parts is not None:
        is_whole = _parts(record).check(contents[0])
    else:
        digests, entries = ([record.digest], [record.entries]) if record.each is None else (record.each[0].to_pylist(), record.each[1])
        is_whole = all(codec.has_digest(content, digest) for content, digest in zip(contents, digests, strict=True))
    if not is_whole:
        raise _altered(record)
    return contents[0] if record.each is None else codec.as_one(contents, entries, record.where)


def read_columns(storage: Storage, record: RecordMeta, names: Sequence[Name]) -> ReadColumns:
    """Return content of which only the frame and some columns are there, checked, and codes of some.

    The rest of it is memory that was never touched. Content without parts is read whole.
    """
    if record.parts is None or record.span is None:
        content = read_content(storage, record)
        return ReadColumns(content, content.size)
    parts = _parts(record)
    try:
        found = storage.some(record.file.path, *_asked(storage, record, parts, names))
    except OSError as error:
        raise _unreadable(record.file, error) from error
    # Of what was read as a whole all may be kept.
    if found is None or not parts.check(found.buffer, None if found.nbytes == parts.size else names):
        raise _altered(record)
    coded = {}
    for name in names:
        if isinstance(name, CodesOf):
            stream = parts.codes_in(found.buffer, name.column)
            if stream is None:
                raise CorruptLog(f"{record.where}: lacks the codes of column {name.column!r} that its bounds name; restore the file")
            coded[name.column] = stream if found.is_mapped else pa.py_buffer(stream.to_pybytes())  # else all that was read would stay
    return ReadColumns(found.buffer, found.nbytes, found.is_mapped, coded)


def begin_columns(storage: Storage, record: RecordMeta, names: Sequence[Name]) -> bool:
    """Have the system read what `read_columns` is about to be asked for; False where that has to wait for it."""
    if record.parts is None or record.span is None:
        return False
    return storage.begin(record.file.path, *_asked(storage, record, _parts(record), names))


def _asked(storage: Storage, record: RecordMeta, parts: Parts, names: Sequence[Name]) -> tuple[int, int, list[Span]]:
    """Return where in its file a record's content begins, its size, and what of it has to be read for some columns."""
    assert record.span is not None
    start = record.span[1] - parts.size
    if not 0 < start - record.span[0] <= _PAGE_HEAD_BYTES_MAX:
        raise _altered(record)
    return start, parts.size, parts.spans(names, storage.gap_bytes)


def read_filters(storage: Storage, file: DataFile, records: Sequence[RecordMeta]) -> dict[str, bytes]:
    """Return the filters of records of one file that have some, by the records' keys. Raises CorruptLog where one is not there."""
    groups = sorted({record.row_group for record in records})
    with _parquet(storage, file) as opened:
        try:
            columns = {group: opened.read_row_group(group, columns=["filters"], use_threads=False).column(0) for group in groups}
            found = {record.key: columns[record.row_group][record.place].as_py() for record in records}
        except Exception as error:  # damaged bytes surface as errors of many kinds
            raise _unreadable(file, error) from error
    if not all(isinstance(each, bytes) for each in found.values()):
        raise CorruptLog(f"{_name(file)} lacks a filter that its bounds name; restore it")
    return found


def _parts(record: RecordMeta) -> Parts:
    assert record.parts is not None
    try:
        found = _parsed(record.parts, record.digest)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptLog(f"{record.where}: its parts do not add up; restore the file") from error
    if found is None:
        raise _altered(record)
    return found


@functools.lru_cache(PARTS_KEPT)
def _parsed(parts: str, digest: str) -> Parts | None:
    """Return parts as they are written; None where they do not have this digest."""
    return Parts.read(parts) if codec.has_digest(pa.py_buffer(parts.encode()), digest) else None


def _altered(record: RecordMeta) -> CorruptLog:
    return CorruptLog(f"{record.where}: content does not match its digest; restore the file")


def _read_group(storage: Storage, record: RecordMeta) -> pa.ChunkedArray:
    """Return the content of all rows of a record's row group."""
    with _parquet(storage, record.file) as opened:
        try:
            return opened.read_row_group(record.row_group, columns=["content"], use_threads=False).column(0)
        except Exception as error:  # damaged bytes surface as errors of many kinds
            if is_refusal(error) or isinstance(error, FileNotFoundError):
                raise _unreadable(record.file, error) from error
            raise CorruptLog(f"{record.where}: content is not readable; restore the file") from error


def _of_group(shared: pa.ChunkedArray, record: RecordMeta) -> list[pa.Buffer]:
    """Return the content of a record's rows, unchecked, out of that of its row group."""
    if not (pa.types.is_binary(shared.type) or pa.types.is_large_binary(shared.type)):
        raise CorruptLog(f"{record.where}: content is {shared.type}, not binary; restore the file")
    places = [record.place] if record.each is None else record.each[2]
    found = [shared[place].as_buffer() for place in places if place < len(shared)]
    if len(found) != record.rows or any(each is None for each in found):
        raise CorruptLog(f"{record.where}: content is not there; restore the file")
    return found


def _read_span(storage: Storage, record: RecordMeta, start: int, end: int) -> pa.Buffer:
    """Read the only value of an uncompressed content chunk straight from the file, into aligned memory.

    The chunk is a Thrift page header (20 to 40 bytes), a 4-byte length and the bytes up to `end`.
    """
    try:
        chunk = storage.read(record.file.path, start, end)
    except OSError as error:
        raise _unreadable(record.file, error) from error
    head = chunk.slice(0, min(_PAGE_HEAD_BYTES_MAX, chunk.size)).to_pybytes()
    for place in range(8, len(head) - 3):
        size = int.from_bytes(head[place : place + 4], "little")
        if place + 4 + size == chunk.size == end - start:
            content = chunk.slice(place + 4)
            return content if content.address % ALIGNED_BYTES == 0 else _aligned(content)
    raise CorruptLog(f"{record.where}: content has no length; restore the file")


def _aligned(content: pa.Buffer) -> pa.Buffer:
    memory = allocate(content.size)
    memoryview(memory)[:] = content
    return memory


def _parquet(storage: Storage, file: DataFile) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(storage.open(file.path, file.size), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error


_OUTER: dict[str, Callable[[RecordMeta], Any]] = {
    "first_offset": lambda record: record.first_offset,
    "entries": lambda record: record.entries,
    "schema_id": lambda record: record.schema_id,
    "appends": lambda record: record.appends,
    "min_time": lambda record: record.min_time,
    "max_time": lambda record: record.max_time,
    "bounds": lambda record: codec.bounds_json(record.bounds),
    "digest": lambda record: record.digest,
    "parts": lambda record: record.parts,
}


def outer_row(record: RecordMeta, names: Iterable[str] = _OUTER) -> dict[str, Any]:
    """Return those of some columns of a record's row that it says by itself: not its topic, its filters or its content."""
    return {name: _OUTER[name](record) for name in names if name in _OUTER}


def binary_array(contents: Sequence[pa.Buffer]) -> pa.Array:
    """Return the contents as one binary array; a single one is not copied."""
    if len(contents) == 1:
        offsets = pa.py_buffer(struct.pack("<ii", 0, contents[0].size))
        return pa.Array.from_buffers(pa.binary(), 1, [None, offsets, contents[0]])
    return pa.array([content.to_pybytes() for content in contents], pa.binary())


def _name(file: DataFile) -> str:
    return f"topic {file.topic!r}: file {os.path.basename(file.path)}"
