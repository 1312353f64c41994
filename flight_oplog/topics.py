"""A topic as of one snapshot: its schema, its files, and what commits make of both. Pure."""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from flight_oplog.errors import CorruptLog
from flight_oplog.growing import Growing
from flight_oplog.records import DataFile, RecordMeta
from flight_oplog.schema import KEYS_METADATA, evolve, first_time, plain_field


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as of one snapshot: its merged schema, every schema its records use, its files in offset order.

    `event_time` is the event-time column: the first timestamp column of the first registered schema that has one. It
    never changes, so the time bounds of all the topic's files and records speak of the same column.
    """

    name: str
    schema: pa.Schema
    schemas: Mapping[str, pa.Schema]
    files: Growing[DataFile]
    next_offset: int
    event_time: str | None = None
    keys: tuple[str, ...] = ()  # columns whose records have filters
    start: int = 0  # where the topic began again when it was dropped last: entries before do not count
    registered: int = 0  # the number of its newest entry in the registry
    overlaps: bool = False  # whether a file has records after a later one's first: only what another program's compaction made has

    @property
    def first_offset(self) -> int:
        return max(self.start, self.files[0].first_offset) if self.files else self.next_offset

    @property
    def entries(self) -> int:
        return self.next_offset - self.first_offset

    def places_within(self, first: int, last: int | None = None) -> range:
        """Return the places of the files that may hold entries with offsets in [first, last), or from `first` on."""
        start = 0 if self.overlaps else max(0, bisect.bisect_right(self.files, first, key=first_offset) - 1)
        end = len(self.files) if last is None else bisect.bisect_left(self.files, last, key=first_offset)
        return range(start, max(start, end))

    def files_within(self, first: int, last: int | None = None) -> Sequence[DataFile]:
        """Return the files that may hold entries with offsets in [first, last), or from `first` on."""
        places = self.places_within(first, last)
        return self.files[places.start : places.stop]

    def stored(self, record: RecordMeta) -> pa.Schema:
        """Return the schema of a record's content. Raises CorruptLog where it is not registered."""
        try:
            return self.schemas[record.schema_id]
        except KeyError:
            raise CorruptLog(f"{record.where}: its schema_id is not registered; restore the file") from None

    def with_files(self, added: Sequence[DataFile], removed: frozenset[str], start: int) -> Topic:
        """Return the topic after some files were added and removed, and after it began again at `start`, if it did."""
        kept, more = self.files, [file for file in added if file.last_record >= start]
        if start != self.start:
            kept = Growing(file for file in kept if file.last_record >= start)
        if not removed and not self.overlaps:
            files, new = kept.grown(more), [*kept[-1:], *more]
        else:
            files = Growing((*(file for file in kept if file.path not in removed), *more))
            new = files[:]
        if any(first.first_offset > second.first_offset for first, second in itertools.pairwise(new)):
            new = sorted(files, key=first_offset)
            files = Growing(new)
        overlaps = any(first.last_record > second.first_offset for first, second in itertools.pairwise(new))
        return replace(self, files=files, start=start, overlaps=overlaps)

    def with_schemas(self, rows: Sequence[dict[str, Any]]) -> Topic:
        """Return the topic with what its rows in the registry, in order, make of its schema; one without a schema ends it."""
        merged, event_time, keys, schemas = self.schema if self.schemas else None, self.event_time, self.keys, dict(self.schemas)
        rows = [row for row in rows if row["number"] > self.registered]  # another program's compaction shows them again
        for row in rows:
            if row["schema"] is None:
                merged, event_time, keys, schemas = None, None, (), {}
            elif row["schema_id"] not in schemas:
                registered = pa.ipc.read_schema(pa.py_buffer(row["schema"]))
                keys = keys or tuple(json.loads((registered.metadata or {}).get(KEYS_METADATA, b"[]")))
                schema = pa.schema([plain_field(field) for field in registered])
                merged = evolve(self.name, merged, schema, "additive")
                event_time = event_time or first_time(schema)
                schemas[row["schema_id"]] = schema
        if not rows:
            return self
        schema = merged if merged is not None else pa.schema([])
        return replace(self, schema=schema, schemas=schemas, event_time=event_time, keys=keys, registered=rows[-1]["number"])


def first_offset(of: DataFile | RecordMeta) -> int:
    return of.first_offset
