"""The outer rows of a topic, `records.<topic>`, as a table that DataFusion scans."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from flight_oplog import codec
from flight_oplog.filters import Filter
from flight_oplog.records import DataFile, RecordMeta, binary_array, outer_row
from flight_oplog.scans import Fragment, ScanContext, Table
from flight_oplog.schema import RECORD_SCHEMA
from flight_oplog.store import Snapshot
from flight_oplog.topics import Topic

_ROWS_PER_RECORDS_BATCH = 1024
# The rows of a file of so many are read column by column, but for those columns that take looking into each.
_ROWS_FROM = 64
_MADE = frozenset(("filters", "content"))


class RecordsTable(Table):
    """The outer rows of a topic. Content is fetched only when the query asks for it."""

    def __init__(self, snapshot: Snapshot, topic: Topic, context: ScanContext) -> None:
        super().__init__(snapshot, topic, RECORD_SCHEMA, context, "records")

    def get_fragments(self, filter: pc.Expression | None = None) -> Iterator[Fragment]:
        try:
            wanted = None if filter is None else Filter.of(filter, self._schema)
        except Exception as error:
            self.context.failures.append(error)
            raise
        rows = sum(file.records for file in self._topic.files)
        self.context.entries += rows
        self.counts.files += len(self._topic.files)
        self.counts.records += rows
        return iter([Fragment(self, self._topic.files, wanted)])

    def scan(self, files: Sequence[DataFile], projected: pa.Schema, filter: Filter | None) -> Iterator[pa.RecordBatch]:
        wanted = [*projected.names, *(name for name in (filter.keys if filter else ()) if name not in projected.names)]
        for batch in self._batches(files, pa.schema([self._schema.field(name) for name in wanted]), filter):
            if self.context.stopped.is_set():
                return
            passed = batch if filter is None else batch.filter(filter.expression)
            if passed.num_rows:
                yield codec.with_rows([passed.column(name) for name in projected.names], projected, passed.num_rows)

    def _batches(self, files: Sequence[DataFile], schema: pa.Schema, filter: Filter | None) -> Iterator[pa.RecordBatch]:
        """Yield the rows of files, those that pass at least: of small files from what is in memory of them, of others from the disk."""
        are_one_by_one = not _MADE.isdisjoint(schema.names)

        def is_small(file: DataFile) -> bool:
            return are_one_by_one or file.records < _ROWS_FROM

        for small, some in itertools.groupby(files, is_small):
            if small:
                yield from self._one_by_one(list(some), schema, filter)
            else:
                for file in some:
                    yield from self._together(file, schema)

    def _together(self, file: DataFile, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        names = {"first_offset", *schema.names} - {"topic"}
        for found in self._snapshot.store.reader.columns_of_rows(file, sorted(names)):
            ours = found if file.first_offset >= self._topic.start else found.filter(pc.field("first_offset") >= self._topic.start)
            for batch in ours.to_batches():
                topics = pa.repeat(pa.scalar(self._topic.name), batch.num_rows)
                yield codec.with_rows([topics if f.name == "topic" else batch.column(f.name) for f in schema], schema, batch.num_rows)

    def _one_by_one(self, files: Sequence[DataFile], schema: pa.Schema, filter: Filter | None) -> Iterator[pa.RecordBatch]:
        self._snapshot.store.reader.prefetch(files)
        records = [record for file in files for record in self._snapshot.records_of(self._topic, file, each=True)]
        for start in range(0, len(records), _ROWS_PER_RECORDS_BATCH):
            some = records[start : start + _ROWS_PER_RECORDS_BATCH]
            if filter is not None and _MADE.isdisjoint(filter.keys):  # content is fetched of those that pass
                looked_at = self._rows(some, pa.schema([self._schema.field(name) for name in filter.keys]), iter(()))
                passing = filter.passing([looked_at])
                some = some if passing is None else [some[place] for place in passing.tolist()]
            contents, step = self._snapshot.store.reader.contents(some), 1 if "content" in schema.names else _ROWS_PER_RECORDS_BATCH
            for first in range(0, len(some), step):
                yield self._rows(some[first : first + step], schema, contents)

    def _rows(self, records: Sequence[RecordMeta], schema: pa.Schema, contents: Iterator[pa.Buffer]) -> pa.RecordBatch:
        rows = [self._row(record, schema.names, contents) for record in records]
        arrays = [
            binary_array([row["content"] for row in rows]) if f.name == "content" else pa.array([row[f.name] for row in rows], f.type)
            for f in schema
        ]
        return codec.with_rows(arrays, schema, len(rows))

    def _row(self, record: RecordMeta, wanted: Sequence[str], contents: Iterator[pa.Buffer]) -> dict[str, Any]:
        row = {"topic": self._topic.name} | outer_row(record, wanted)
        if "filters" in wanted:
            has_some = any("filter" in limits for limits in record.bounds.values())
            row["filters"] = self._snapshot.store.reader.filters([record])[0] if has_some else None
        if "content" in wanted:
            self.counts.records_read += 1
            content = next(contents)
            self.counts.content_bytes += content.size
            row["content"] = content
        return row
