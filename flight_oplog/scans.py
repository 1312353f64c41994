"""What a statement's scans share, and what DataFusion sees of a table.

DataFusion takes any Python subclass of `pyarrow.dataset.Dataset` as a table. While planning it hands over the columns
it needs and the filters it could translate, and asks for fragments; each fragment becomes one partition of the scan
and is pulled batch by batch. Filters arrive with the promise that the table applies them fully, so every batch is
filtered here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from flight_oplog import codec
from flight_oplog.cache import ColumnCache, ScanCounts
from flight_oplog.filters import Filter
from flight_oplog.gathering import JOINED_ROWS
from flight_oplog.store import Snapshot
from flight_oplog.threads import stay
from flight_oplog.top import Top
from flight_oplog.topics import Topic
from flight_oplog.vocabulary import Vocabulary


@dataclass
class ScanContext:
    """What the scans of one statement share: how wide to run, when to stop, what went wrong, what was touched."""

    cache: ColumnCache
    partitions: int
    views: bool = False  # show short texts as string views, which DataFusion groups twice as fast
    offsets: tuple[int, int] | None = None  # show only entries within [first, last)
    top: Top | None = None  # the statement wants no more than these, of its only table
    sums_up: bool = False  # makes little of many entries: large batches suit it
    reads_all: bool = True  # that may be among what is wanted: no LIMIT ends it before
    begins_with_several: bool = True  # there is no LIMIT at all, in what it is made of neither
    indexing_seconds: float = 0.0
    looks_into: bool = True  # its optimized plan may be asked for: it is small
    tables: int = 1  # that it reads
    is_plain: bool = False  # asks nothing of an entry that could take long, its views included
    numbered: dict[str, tuple[str, Vocabulary]] = field(default_factory=dict)  # columns that show the numbers of another's texts
    makes_numbers: bool = False  # where they are not in memory
    entries: int = 0  # of the records that its scans have to look at
    stopped: threading.Event = field(default_factory=threading.Event)
    failures: list[Exception] = field(default_factory=list)
    counts: dict[str, ScanCounts] = field(default_factory=dict)

    def begin_anew(self) -> None:
        """Forget what was counted: the statement is planned once more."""
        self.entries = 0
        for counts in self.counts.values():
            vars(counts).update(vars(ScanCounts()))


class Scanner:
    """The part of a pyarrow Scanner that DataFusion uses."""

    def __init__(self, schema: pa.Schema, columns: Sequence[str] | None, batches: Callable[[pa.Schema], Iterator[pa.RecordBatch]]) -> None:
        self.projected_schema = schema if columns is None else pa.schema([schema.field(name) for name in columns])
        self._batches = batches

    def to_batches(self) -> Iterator[pa.RecordBatch]:
        return self._batches(self.projected_schema)


class Fragment:
    """One partition of a scan."""

    def __init__(self, table: Table | RowsTable, of: Sequence[Any], filter: Filter | None = None) -> None:
        self._table = table
        self._of = of  # records, or files
        self._filter = filter

    def scanner(self, schema: Any = None, columns: Any = None, filter: Any = None, batch_size: Any = None, **_: Any) -> Scanner:
        def batches(projected: pa.Schema) -> Iterator[pa.RecordBatch]:
            stay()
            try:
                found = self._table.scan(self._of, projected, self._filter)
                if batch_size is None or batch_size >= JOINED_ROWS:
                    yield from found
                else:  # the statement makes large values of them
                    for batch in found:
                        yield from (batch.slice(row, batch_size) for row in range(0, batch.num_rows, batch_size))
            except Exception as error:
                self._table.context.failures.append(error)
                raise

        return Scanner(self._table.schema, columns, batches)


class RowsTable(ds.Dataset):
    """A small table of the log's own, as `system` shows them. pyarrow's own in-memory dataset cannot be empty here."""

    def __init__(self, rows: pa.RecordBatch, context: ScanContext) -> None:
        self._rows = rows
        self.context = context

    @property
    def schema(self) -> pa.Schema:
        return self._rows.schema

    def scanner(self, columns: Sequence[str] | None = None, filter: Any = None, **_: Any) -> Scanner:
        return Scanner(self.schema, columns, lambda projected: iter(()))

    def get_fragments(self, filter: pc.Expression | None = None) -> Iterator[Fragment]:
        return iter([Fragment(self, [], None if filter is None else Filter(filter, ()))])

    def scan(self, records: Sequence[Any], projected: pa.Schema, filter: Filter | None) -> Iterator[pa.RecordBatch]:
        rows = self._rows if filter is None else self._rows.filter(filter.expression)
        yield codec.with_rows([rows.column(name) for name in projected.names], projected, rows.num_rows)


class Table(ds.Dataset):
    """Base of the tables over a topic: `schema`, and batches of it for a run of records or files."""

    def __init__(self, snapshot: Snapshot, topic: Topic, schema: pa.Schema, context: ScanContext, label: str) -> None:
        # pyarrow's own __init__ refuses subclasses; nothing of it is needed.
        self._snapshot = snapshot
        self._topic = topic
        self._plain = self._schema = schema  # as stored and filtered; as shown to DataFusion
        self.context = context
        self.counts = context.counts.setdefault(f"{label}.{topic.name}", ScanCounts())

    @property
    def schema(self) -> pa.Schema:
        return self._schema

    def scanner(self, columns: Sequence[str] | None = None, filter: Any = None, **_: Any) -> Scanner:
        return Scanner(self._schema, columns, lambda projected: iter(()))

    def scan(self, of: Sequence[Any], projected: pa.Schema, filter: Filter | None) -> Iterator[pa.RecordBatch]:
        """Yield filtered batches of exactly the projected columns."""
        raise NotImplementedError
