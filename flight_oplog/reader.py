"""What data files hold: records, their content, columns of it. Read when somebody asks, and some of it kept: files never change."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa

from flight_oplog import codec
from flight_oplog.codes import CodesOf, Name
from flight_oplog.datafile import StagedFile
from flight_oplog.errors import Cancelled
from flight_oplog.parts import PARTS_FROM_BYTES
from flight_oplog.records import (
    DataFile,
    ReadColumns,
    RecordMeta,
    begin_columns,
    read_columns,
    read_content,
    read_contents,
    read_filters,
    read_records,
    read_rows,
)
from flight_oplog.storage import Storage

# Content that was committed here just now, small records only: the next query need not read it.
FRESH_BYTES = 32 << 20
# The records of more files than a few are read by so many threads: Arrow does more than half of it without Python's lock.
READERS = 3
FEW_FILES = 8


class Reader:
    """Reads the data files of one log. Thread-safe, but for `take`."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._known: dict[str, tuple[RecordMeta, ...]] = {}
        self._fresh: OrderedDict[str, pa.Buffer] = OrderedDict()  # by the records' keys
        self._fresh_bytes = 0

    def take(self, file: StagedFile) -> None:
        """Keep what a file holds that was committed just now."""
        records = file.metas()
        if records is None:
            return
        self._known[file.done.path] = records
        for row, content in file.fresh.items():
            self._fresh[records[row].key] = content
            self._fresh_bytes += content.size
        while self._fresh_bytes > FRESH_BYTES:
            self._fresh_bytes -= self._fresh.popitem(last=False)[1].size

    def let_go(self, paths: Iterable[str]) -> None:
        """Let go of files that the log has no more."""
        self._storage.let_go(paths)
        for path in paths:
            self._known.pop(path, None)

    def records(self, file: DataFile) -> tuple[RecordMeta, ...]:
        """Return the records of a data file without their content, from memory or read now; small neighbours are one."""
        found = self._known.get(file.path)
        if found is None:
            found = self._known[file.path] = read_records(self._storage, file)
        return found

    def prefetch(self, files: Sequence[DataFile]) -> None:
        """Read the records of files that are not in memory, as many at once as the storage takes."""
        missing = [file for file in files if file.path not in self._known]
        if len(missing) > 1:
            found = self._storage.each(lambda file: read_records(self._storage, file), missing, READERS if len(missing) > FEW_FILES else 1)
            for file, records in zip(missing, found, strict=True):
                self._known[file.path] = records

    def rows(self, file: DataFile, afresh: bool = False) -> tuple[RecordMeta, ...]:
        """Return the rows of a data file without their content, each as it is; from memory, if they are, unless `afresh`."""
        known = self._known.get(file.path, ())
        is_known = known and not afresh and all(record.rows == 1 for record in known)
        return known if is_known else read_records(self._storage, file, each=True)

    def columns_of_rows(self, file: DataFile, names: Sequence[str]) -> Iterator[pa.Table]:
        """Yield some columns of a data file's rows, as they are on the disk. Raises CorruptLog where they are damaged."""
        return read_rows(self._storage, file, names)

    def content(self, record: RecordMeta) -> pa.Buffer:
        """Return a record's content, checked against its digest. Raises CorruptLog naming topic, file and offset."""
        found = self._fresh.get(record.key)
        return read_content(self._storage, record) if found is None else found

    def contents(self, records: Sequence[RecordMeta]) -> Iterator[pa.Buffer]:
        """Yield the content of records as it is on disk, checked. Raises CorruptLog as `content`."""
        return read_contents(self._storage, records)

    @property
    def reads_ahead(self) -> int:
        """How many records are best read while another is looked at."""
        return self._storage.reads_ahead

    def trim(self) -> None:
        """Keep no more of the log's files in memory than was said; a reader says so now and then."""
        self._storage.trim()

    def give_back(self, record: RecordMeta) -> None:
        """Be told that somebody is done with all of a record: if there is too much of the log's files in memory, that need not stay."""
        if record.span is not None:
            self._storage.give_back(record.file.path, record.span[0], record.span[1] - record.span[0])

    def reads_at_once(self, record: RecordMeta) -> bool:
        """Whether reading a record takes less than asking another thread for it."""
        return self._storage.is_local and record.span is not None and record.span[1] - record.span[0] < PARTS_FROM_BYTES

    def begin(self, record: RecordMeta, names: Sequence[Name]) -> bool:
        """Have the system read what `columns` is about to be asked for; False where that has to wait for it."""
        return not record.members and begin_columns(self._storage, record, names)

    def columns(self, record: RecordMeta, names: Sequence[Name], stopped: threading.Event | None = None) -> ReadColumns:
        """Return content of which some columns can be decoded, checked, and the codes of some.

        No bytes are read for what was committed just now.
        Raises Cancelled when it was `stopped` while the content of many records was read.
        """
        if record.members:

            def one(member: RecordMeta) -> ReadColumns:
                if stopped is not None and stopped.is_set():
                    raise Cancelled("the read was stopped")
                return self.columns(member, names)

            found = list(self._storage.each(one, record.members))
            content = codec.as_one([each.buffer for each in found], record.entries_of_each, record.where)
            return ReadColumns(content, sum(each.nbytes for each in found))
        fresh = self._fresh.get(record.key)
        is_there = fresh is not None and not any(isinstance(name, CodesOf) for name in names)
        return ReadColumns(fresh, 0) if is_there else read_columns(self._storage, record, names)

    def filters(self, records: Sequence[RecordMeta]) -> list[bytes]:
        """Return the filters of records that have some."""
        of_files: dict[str, list[RecordMeta]] = {}
        for record in records:
            of_files.setdefault(record.file.path, []).append(record)
        by_key: dict[str, bytes] = {}
        for found in self._storage.each(lambda some: read_filters(self._storage, some[0].file, some), of_files.values()):
            by_key |= found
        return [by_key[record.key] for record in records]
