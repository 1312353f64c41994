"""One Parquet data file of records: written provisionally, numbered, made durable; read back record by record.

Data files are immutable once a commit names them. Before that they carry offsets counted from 0, because a long append
is written while others commit; `StagedFile.finish` then puts the real first offset in its place. That works because
the column `first_offset` is written PLAIN, uncompressed, without nulls and without statistics: its values are the last
8·n bytes of its column chunk.
"""

from __future__ import annotations

import datetime
import itertools
import json
import logging
import mmap
import os
import struct
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flight_oplog import codec, parquet
from flight_oplog.errors import CorruptLog, OplogError, TooLarge, TryAgain
from flight_oplog.files import LARGE_BYTES, OutputFile, allocate, is_refusal, reading_error, storage_error
from flight_oplog.parts import Parts
from flight_oplog.schema import APPENDS, FORMAT_VERSION, RECORD_SCHEMA
from flight_oplog.storage import ALIGNED_BYTES, Storage

log = logging.getLogger("flight_oplog.datafile")

CREATED_BY = f"flight_oplog version {FORMAT_VERSION} (build format_version {FORMAT_VERSION})"
ROW_GROUP_BYTES = 16 << 20
# Keeps the `first_offset` chunk of a row group in one Parquet page, as patching it needs.
ROW_GROUP_RECORDS = 4096

# A Parquet page counts its bytes in 32 bits, its header and the value's length among them.
CONTENT_BYTES_MAX = parquet.PAGE_BYTES_MAX - 4

# A page's header, and the length of its only value.
_PAGE_HEAD_BYTES_MAX = 64

# Content of so many small records of a file is kept in memory until its commit.
FRESH_RECORDS_MAX = 16

# A file that was published so long ago may have been taken for an orphan: it is published again before a commit names it.
PUBLISHED_SECONDS = 60

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_FILE_SCHEMA = pa.schema([f for f in RECORD_SCHEMA if f.name != "topic"])
_OWNER_COLUMNS = [child.name for child in APPENDS.value_type]
_META_COLUMNS = [name for name in _FILE_SCHEMA.names if name not in ("filters", "content")]


@dataclass(frozen=True, slots=True)
class Record:
    """One row of the outer table, before it is written. `first_offset` counts from the file's first entry."""

    entries: int
    schema_id: str
    appends: list[dict[str, Any]]
    bounds: codec.Bounds
    min_time: datetime.datetime | None
    max_time: datetime.datetime | None
    digest: str
    parts: str | None
    filters: bytes | None
    content: pa.Buffer


@dataclass(frozen=True, slots=True)
class RecordMeta:
    """One row of the outer table without its content, and where the content is."""

    file: DataFile
    row: int
    row_group: int
    span: tuple[int, int] | None
    first_offset: int
    entries: int
    schema_id: str
    appends: list[dict[str, Any]]
    min_time: datetime.datetime | None
    max_time: datetime.datetime | None
    bounds: codec.Bounds
    digest: str
    parts: str | None
    key: str = field(init=False, repr=False)  # names this record among all records ever

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", f"{self.file.path}#{self.row}")

    @property
    def where(self) -> str:
        return f"topic {self.file.topic!r}, file {os.path.basename(self.file.path)}, offset {self.first_offset}"


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


# Reading


def read_records(storage: Storage, file: DataFile) -> tuple[RecordMeta, ...]:
    with _parquet(storage, file) as opened:
        try:
            rows = opened.read(columns=_META_COLUMNS).to_pylist()
            spans = [span for g in range(opened.num_row_groups) for span in _spans(opened.metadata.row_group(g), g)]
            ours = opened.metadata.created_by == CREATED_BY
        except Exception as error:  # damaged bytes surface as errors of many kinds
            raise _unreadable(file, error) from error
    try:
        metas = tuple(sorted(_metas_of(file, rows, spans), key=lambda meta: meta.first_offset))
        adds_up = _adds_up(metas, file.first_offset, ours)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CorruptLog(f"{_name(file)} does not hold records; restore it") from error
    if not adds_up:
        raise CorruptLog(f"{_name(file)} holds records that do not add up; restore it")
    if len(metas) != file.records:
        raise CorruptLog(f"{_name(file)} holds {len(metas)} of {file.records} records; restore it")
    return metas


def _adds_up(metas: Sequence[RecordMeta], expected: int, ours: bool) -> bool:
    for meta in metas:
        # A file that another program's compaction made may hold runs from here and there.
        follows = meta.first_offset == expected if ours else meta.first_offset >= expected
        if not follows or meta.entries != sum(owner["entries"] for owner in meta.appends):
            return False
        expected = meta.first_offset + meta.entries
    return True


def _unreadable(file: DataFile, error: Exception) -> OplogError:
    if isinstance(error, FileNotFoundError):
        return CorruptLog(f"{_name(file)} is missing; restore it")
    if is_refusal(error):
        return reading_error(_name(file), error)
    return CorruptLog(f"{_name(file)} is not readable Parquet; restore it")


def _metas_of(
    file: DataFile, rows: Sequence[dict[str, Any]], spans: Sequence[tuple[int, tuple[int, int] | None]]
) -> tuple[RecordMeta, ...]:
    return tuple(
        RecordMeta(
            file=file,
            row=number,
            row_group=group,
            span=span,
            first_offset=row["first_offset"],
            entries=row["entries"],
            schema_id=row["schema_id"],
            appends=row["appends"],
            min_time=row["min_time"],
            max_time=row["max_time"],
            bounds=json.loads(row["bounds"]) if row["bounds"] else {},
            digest=row["digest"],
            parts=row.get("parts"),
        )
        for number, (row, (group, span)) in enumerate(zip(rows, spans, strict=True))
    )


def read_content(storage: Storage, record: RecordMeta) -> pa.Buffer:
    """Return a record's content, checked against its digest. Raises CorruptLog naming topic, file and offset."""
    content = _content(storage, record)
    if record.parts is None:
        is_whole = codec.has_digest(content, record.digest)
    else:
        is_whole = _parts(record).check(content)
    if not is_whole:
        raise _altered(record)
    return content


def read_columns(storage: Storage, record: RecordMeta, names: Sequence[str]) -> tuple[pa.Buffer, int]:
    """Return content of which only the frame and some columns are there, checked; and how many bytes of it were read.

    The rest of it is memory that was never touched. Content without parts is read whole.
    """
    if record.parts is None or record.span is None:
        content = read_content(storage, record)
        return content, content.size
    parts = _parts(record)
    start = record.span[1] - parts.size
    if not 0 < start - record.span[0] <= _PAGE_HEAD_BYTES_MAX:
        raise _altered(record)
    spans = parts.spans(names, storage.gap_bytes)
    memory = mmap.mmap(-1, parts.size)
    try:
        is_there = storage.scatter(record.file.path, start, spans, memoryview(memory))
    except OSError as error:
        raise _unreadable(record.file, error) from error
    content = pa.py_buffer(memory)
    if not is_there or not parts.check(content, names):
        raise _altered(record)
    return content, sum(end - first for first, end in spans)


def read_filters(storage: Storage, file: DataFile, records: Sequence[RecordMeta]) -> dict[str, bytes]:
    """Return the filters of records of one file that have some, by the records' keys. Raises CorruptLog where one is not there."""
    groups = sorted({record.row_group for record in records})
    with _parquet(storage, file) as opened:
        try:
            firsts = list(itertools.accumulate((opened.metadata.row_group(g).num_rows for g in range(opened.num_row_groups)), initial=0))
            columns = {group: opened.read_row_group(group, columns=["filters"]).column(0) for group in groups}
            found = {record.key: columns[record.row_group][record.row - firsts[record.row_group]].as_py() for record in records}
        except Exception as error:  # damaged bytes surface as errors of many kinds
            raise _unreadable(file, error) from error
    if not all(isinstance(each, bytes) for each in found.values()):
        raise CorruptLog(f"{_name(file)} lacks a filter that its bounds name; restore it")
    return found


def _parts(record: RecordMeta) -> Parts:
    assert record.parts is not None
    if not codec.has_digest(pa.py_buffer(record.parts.encode()), record.digest):
        raise _altered(record)
    try:
        return Parts.read(record.parts)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptLog(f"{record.where}: its parts do not add up; restore the file") from error


def _altered(record: RecordMeta) -> CorruptLog:
    return CorruptLog(f"{record.where}: content does not match its digest; restore the file")


def _content(storage: Storage, record: RecordMeta) -> pa.Buffer:
    if record.span is not None:
        return _read_span(storage, record, *record.span)
    with _parquet(storage, record.file) as opened:
        try:
            column = opened.read_row_group(record.row_group, columns=["content"]).column(0)
            first = sum(opened.metadata.row_group(g).num_rows for g in range(record.row_group))
            scalar = column[record.row - first]
        except Exception as error:  # damaged bytes surface as errors of many kinds
            if is_refusal(error) or isinstance(error, FileNotFoundError):
                raise _unreadable(record.file, error) from error
            raise CorruptLog(f"{record.where}: content is not readable; restore the file") from error
        if not (pa.types.is_binary(scalar.type) or pa.types.is_large_binary(scalar.type)) or not scalar.is_valid:
            raise CorruptLog(f"{record.where}: content is {scalar.type}, not binary; restore the file")
        return scalar.as_buffer()


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


def _spans(metadata: pq.RowGroupMetaData, group: int) -> list[tuple[int, tuple[int, int] | None]]:
    """Return (row group, byte span of its content or None) for each row of a row group."""
    chunk = metadata.column(metadata.num_columns - 1)
    plain = chunk.path_in_schema == "content" and chunk.compression == "UNCOMPRESSED" and not chunk.has_dictionary_page
    if metadata.num_rows != 1 or not plain:
        return [(group, None)] * metadata.num_rows
    return [(group, (chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size))]


def outer_row(record: Record | RecordMeta, first_offset: int) -> dict[str, Any]:
    """Return the columns of a record's row, but for its topic and its content."""
    return {
        "first_offset": first_offset,
        "entries": record.entries,
        "schema_id": record.schema_id,
        "appends": record.appends,
        "min_time": record.min_time,
        "max_time": record.max_time,
        "bounds": codec.bounds_json(record.bounds),
        "digest": record.digest,
        "parts": record.parts,
    }


def binary_array(contents: Sequence[pa.Buffer]) -> pa.Array:
    """Return the contents as one binary array; a single one is not copied."""
    if len(contents) == 1:
        offsets = pa.py_buffer(struct.pack("<ii", 0, contents[0].size))
        return pa.Array.from_buffers(pa.binary(), 1, [None, offsets, contents[0]])
    return pa.array([content.to_pybytes() for content in contents], pa.binary())


def _name(file: DataFile) -> str:
    return f"topic {file.topic!r}: file {os.path.basename(file.path)}"


# Writing

_SHAPE = parquet.shape_of(_FILE_SCHEMA)


def _columns(records: Sequence[Record], offsets: Sequence[int]) -> list[parquet.Values]:
    """Return the leaf columns of a row group of `records`, in the order of the file's schema."""
    rows = len(records)
    owners = [owner for record in records for owner in record.appends]
    starts = [place > 0 for record in records for place in range(len(record.appends))]
    repetition = parquet.levels(starts, 1)

    def plain(data: bytes, compress: bool = False) -> parquet.Values:
        return parquet.Values(rows, [data], compress=compress)

    def optional(values: Sequence[str | None]) -> parquet.Values:
        known = [value for value in values if value is not None]
        return parquet.Values(rows, [parquet.texts(known)], parquet.levels([value is not None for value in values], 1), compress=True)

    def times(values: Sequence[datetime.datetime | None]) -> parquet.Values:
        known = [microseconds(time) for time in values if time is not None]
        return parquet.Values(rows, [parquet.int64s(known)], parquet.levels([time is not None for time in values], 1))

    def of_owners(child: pa.Field) -> parquet.Values:
        values = [owner.get(child.name) for owner in owners]
        known: list[Any] = [microseconds(value) if pa.types.is_timestamp(child.type) else value for value in values if value is not None]
        data = parquet.texts(known) if pa.types.is_string(child.type) else parquet.int64s(known)
        present = parquet.levels([2 if value is None else 3 for value in values], 3)
        return parquet.Values(len(owners), [data], repetition + present, compress=True)

    def filters() -> parquet.Values:
        present = [record.filters for record in records if record.filters is not None]
        parts = [part for each in present for part in (len(each).to_bytes(4, "little"), each)]
        return parquet.Values(rows, parts, parquet.levels([record.filters is not None for record in records], 1))

    contents = [part for record in records for part in (record.content.size.to_bytes(4, "little"), record.content)]
    return [
        parquet.Values(rows, [parquet.int64s(offsets)], checked=False),  # `StagedFile.finish` changes them
        plain(parquet.int64s(record.entries for record in records)),
        plain(parquet.texts(record.schema_id for record in records), compress=True),
        *(of_owners(child) for child in APPENDS.value_type),
        times([record.min_time for record in records]),
        times([record.max_time for record in records]),
        optional([codec.bounds_json(record.bounds) for record in records]),
        plain(parquet.texts(record.digest for record in records)),
        optional([record.parts for record in records]),
        filters(),
        parquet.Values(rows, contents, checked=False),  # each has its digest
    ]


def microseconds(time: datetime.datetime) -> int:
    return (time - _EPOCH) // datetime.timedelta(microseconds=1)


class StagedFile:
    """A data file being written: `add` records, then `finish` it for a commit or `abandon` it. For one thread."""

    def __init__(self, storage: Storage, topic: str) -> None:
        self.topic = topic
        self.entries = 0
        self.bounds: list[codec.Bounds] = []
        self.fresh: dict[int, pa.Buffer] = {}  # content of small records, by their row
        self._records = 0
        self._storage = storage
        self._path = _new_path(topic)
        self._strays: list[str] = []
        self._published = 0.0
        self._pending: list[Record] = []
        self._pending_bytes = 0
        self._writer: parquet.Writer | None = None
        self._file: OutputFile | None = None
        self._runs: list[tuple[int, int]] = []
        self._offset_places: list[tuple[int, int]] = []
        self._metas: list[dict[str, Any]] = []
        self._lows: list[datetime.datetime] = []
        self._highs: list[datetime.datetime] = []
        self._time_known = True
        self._is_broken = self._is_published = False
        self._first_offset = 0
        self._done: DataFile | None = None

    @property
    def done(self) -> DataFile:
        assert self._done is not None, "finish() comes before commit()"
        return self._done

    def add(self, record: Record) -> None:
        """Write one record after those before it. Raises TryAgain when the disk refuses; abandon the file then."""
        if record.content.size > CONTENT_BYTES_MAX:
            size = f"{record.entries} entries take {record.content.size} bytes"
            raise TooLarge(f"topic {self.topic!r}: {size}, a record holds 2 GiB; nothing was written")
        full = self._pending_bytes + record.content.size > ROW_GROUP_BYTES or len(self._pending) >= ROW_GROUP_RECORDS
        if self._pending and full:
            self._flush()
        self.bounds.append(record.bounds)
        if record.content.size < LARGE_BYTES and len(self.fresh) < FRESH_RECORDS_MAX:
            self.fresh[self._records] = record.content
        self._records += 1
        self._pending.append(record)
        self._pending_bytes += record.content.size
        if record.min_time is None or record.max_time is None:
            self._time_known = False
        else:
            self._lows.append(record.min_time)
            self._highs.append(record.max_time)
        if self._pending_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def flush(self, bytes_min: int = 0) -> None:
        """Write what was added and waits for company, when it is so much, so that it is no longer held in memory."""
        if self._pending and self._pending_bytes >= bytes_min:
            self._flush()

    def _flush(self) -> None:
        first = len(self._runs)
        self._is_broken = True  # until all of it is written
        for record in self._pending:
            self._runs.append((self.entries, record.entries))
            self.entries += record.entries
        records, self._pending, self._pending_bytes = self._pending, [], 0
        try:
            if self._writer is None:
                self._writer = self._create()
            place, span = self._writer.row_group(len(records), _columns(records, [offset for offset, _ in self._runs[first:]]))
        except OSError as error:
            raise storage_error("writing a data file", error) from error
        group = len(self._offset_places)
        self._is_broken = False
        self._offset_places.append((place, first))
        for record, (offset, _) in zip(records, self._runs[first:], strict=True):
            row = {name: getattr(record, name) for name in ("entries", "schema_id", "min_time", "max_time", "bounds", "digest", "parts")}
            row["appends"] = [{name: owner.get(name) for name in _OWNER_COLUMNS} for owner in record.appends]
            self._metas.append(row | {"first_offset": offset, "row_group": group, "span": span if len(records) == 1 else None})

    def _create(self) -> parquet.Writer:
        self._file = self._storage.stage(self._path)
        return parquet.Writer(self._file, _SHAPE, CREATED_BY)

    def finish(self, first_offset: int) -> DataFile:
        """Number the file's entries from `first_offset` and make its bytes durable. May be called again to renumber."""
        is_fresh = time.monotonic() - self._published < PUBLISHED_SECONDS
        if self._done is not None and first_offset == self._done.first_offset and is_fresh:
            return self._done
        try:
            if self._done is None:
                self.flush()
                if self._is_broken:
                    raise TryAgain("a data file could not be written whole; nothing was written; try again")
                assert self._writer is not None, "a data file holds at least one record"
                self._writer.close()
            assert self._file is not None
            if self._is_published and not self._storage.is_local:
                # A put that timed out may be carried out yet: an object is put once, under a name of its own.
                self._strays.append(self._path)
                self._path = _new_path(self.topic)
            if first_offset != self._first_offset:
                self._renumber(self._file, first_offset)
            self._is_published = True  # perhaps
            self._storage.publish(self._path, self._file)
            self._published = time.monotonic()
            self._file.rest()
        except OSError as error:
            raise storage_error("writing a data file", error) from error
        self._done = DataFile(
            path=self._path,
            topic=self.topic,
            size=self._file.tell(),
            records=len(self._runs),
            first_offset=first_offset,
            last_record=first_offset + self._runs[-1][0],
            min_time=min(self._lows) if self._time_known else None,
            max_time=max(self._highs) if self._time_known else None,
        )
        return self._done

    def _renumber(self, file: OutputFile, first_offset: int) -> None:
        ends = [first for _, first in self._offset_places[1:]] + [len(self._runs)]
        for (place, first), end in zip(self._offset_places, ends, strict=True):
            file.patch(place, parquet.int64s(first_offset + offset for offset, _ in self._runs[first:end]))
        self._first_offset = first_offset

    def metas(self) -> tuple[RecordMeta, ...]:
        """Return what `read_records` would find in the finished file, without reading it."""
        shift = self.done.first_offset
        rows = [row | {"first_offset": shift + row["first_offset"]} for row in self._metas]
        return tuple(RecordMeta(file=self.done, row=number, **row) for number, row in enumerate(rows))

    def stats(self) -> str:
        """Return the statistics of the file's `add` action, as Delta writes them: without them nothing can skip it."""
        low: dict[str, Any] = {"first_offset": self.done.first_offset, "entries": min(n for _, n in self._runs)}
        last = self.done.first_offset + self._runs[-1][0]
        high: dict[str, Any] = {"first_offset": last, "entries": max(n for _, n in self._runs)}
        nulls = {"first_offset": 0, "entries": 0}
        if self.done.min_time is not None and self.done.max_time is not None:
            low["min_time"] = _stat_time(min(self._lows))
            low["max_time"] = _stat_time(min(self._highs))
            high["min_time"] = _stat_time(max(self._lows))
            high["max_time"] = _stat_time(max(self._highs))
            nulls |= {"min_time": 0, "max_time": 0}
        return json.dumps({"numRecords": len(self._runs), "minValues": low, "maxValues": high, "nullCount": nulls})

    def close(self) -> None:
        """Let go of the file when its outcome is decided; it stays where it was published."""
        if self._file is not None:
            self._file.close()
        self._remove(self._strays)

    def abandon(self) -> None:
        """Remove the file. Never raises: what cannot be removed stays an orphan that `verify` lists."""
        if self._file is None:
            return
        self.close()
        if self._storage.is_local or self._is_published:
            self._remove([self._path])

    def _remove(self, paths: list[str]) -> None:
        for path in paths:
            try:
                self._storage.delete(path)
            except FileNotFoundError:
                pass
            except OSError as error:
                log.warning("removing an abandoned file: %s", error)
        paths.clear()


def _new_path(topic: str) -> str:
    return f"topic={topic}/{uuid.uuid4()}.parquet"


def _stat_time(time: datetime.datetime) -> str:
    return time.isoformat(timespec="microseconds").replace("+00:00", "Z")
