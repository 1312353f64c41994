"""One Parquet data file of records: written provisionally, numbered, made durable.

Data files are immutable once a commit names them. Before that they carry offsets counted from 0, because a long append
is written while others commit; `StagedFile.finish` then puts the real first offset in its place. That works because
the column `first_offset` is written PLAIN, uncompressed, without nulls and without statistics: its values are the last
8·n bytes of its column chunk.
"""

from __future__ import annotations

import datetime
import json
import logging
import time
import uuid
from typing import Any

import pyarrow as pa

from flight_oplog import codec, parquet, summary
from flight_oplog.errors import TooLarge, TryAgain
from flight_oplog.files import LARGE_BYTES, OutputFile, storage_error
from flight_oplog.records import DataFile, RecordMeta
from flight_oplog.rows import CREATED_BY, SHAPE, Record, columns
from flight_oplog.schema import APPENDS
from flight_oplog.storage import Storage

log = logging.getLogger("flight_oplog.datafile")

ROW_GROUP_BYTES = 16 << 20
# Keeps the `first_offset` chunk of a row group in one Parquet page, as patching it needs.
ROW_GROUP_RECORDS = 4096

# A Parquet page counts its bytes in 32 bits, its header and the value's length among them.
CONTENT_BYTES_MAX = parquet.PAGE_BYTES_MAX - 4

# Content of so many small records of a file is kept in memory until its commit.
FRESH_RECORDS_MAX = 16

# A file that was published so long ago may have been taken for an orphan: it is published again before a commit names it.
PUBLISHED_SECONDS = 60

_OWNER_COLUMNS = [child.name for child in APPENDS.value_type]


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
        is_alone = record.parts is not None  # its columns are read alone, which takes a row group of its own
        if self._pending and (full or is_alone):
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
        if is_alone or self._pending_bytes >= ROW_GROUP_BYTES:
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
            place, span = self._writer.row_group(len(records), columns(records, [offset for offset, _ in self._runs[first:]]))
        except OSError as error:
            raise storage_error("writing a data file", error) from error
        group = len(self._offset_places)
        self._is_broken = False
        self._offset_places.append((place, first))
        for record, (offset, _) in zip(records, self._runs[first:], strict=True):
            row = {name: getattr(record, name) for name in ("entries", "schema_id", "min_time", "max_time", "digest", "parts")}
            row["known_bounds"] = record.bounds
            row["known_appends"] = [{name: owner.get(name) for name in _OWNER_COLUMNS} for owner in record.appends]
            self._metas.append(row | {"first_offset": offset, "row_group": group, "place": 0, "span": span if len(records) == 1 else None})

    def _create(self) -> parquet.Writer:
        self._file = self._storage.stage(self._path)
        return parquet.Writer(self._file, SHAPE, CREATED_BY)

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
                self._writer.close(self._summary())
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

    def _summary(self) -> dict[str, str]:
        if len(self._offset_places) < summary.GROUPS_LEAST:
            return {}
        also = ({"bounds": codec.bounds_json(row["known_bounds"]), "appends": row["known_appends"]} for row in self._metas)
        return summary.written([row | more for row, more in zip(self._metas, also, strict=True)])

    def _renumber(self, file: OutputFile, first_offset: int) -> None:
        ends = [first for _, first in self._offset_places[1:]] + [len(self._runs)]
        for (place, first), end in zip(self._offset_places, ends, strict=True):
            file.patch(place, parquet.int64s(first_offset + offset for offset, _ in self._runs[first:end]))
        self._first_offset = first_offset

    def metas(self) -> tuple[RecordMeta, ...] | None:
        """Return what `read_records` would find in the finished file, without reading it; None where it reads small records as one."""
        if any(row["span"] is None for row in self._metas):
            return None
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
