"""What `system` tells of topics and of the server: what was asked of late and what it cost, as EXPLAIN does, metrics and settings."""

from __future__ import annotations

import datetime
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields

import pyarrow as pa

from flight_oplog.cache import ScanCounts
from flight_oplog.config import SETTINGS, Config
from flight_oplog.errors import Cancelled, OplogError
from flight_oplog.grants import Principal
from flight_oplog.store import Snapshot

QUERIES_KEPT = 1000
TEXT_CHARACTERS = 1000

_COUNTED = [each.name for each in fields(ScanCounts)]
SCHEMA = pa.schema(
    [
        ("started", pa.timestamp("us", "UTC")),
        ("principal", pa.string()),
        ("sql", pa.string()),
        ("status", pa.string()),
        ("seconds", pa.float64()),
        ("rows", pa.int64()),
        ("error", pa.string()),
        *((name, pa.int64()) for name in _COUNTED),
    ]
)


@dataclass
class Query:
    """One statement: when it began, how it went, and what its scans have looked at so far, by table."""

    sql: str
    principal: str | None
    started: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))
    status: str = "running"  # then done, failed or stopped
    seconds: float | None = None
    rows: int = 0
    error: str | None = None
    counts: Mapping[str, ScanCounts] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)

    def end(self, status: str, error: BaseException | None = None) -> None:
        if self.seconds is None:
            self.seconds, self.status = time.monotonic() - self._began, status
            self.error = str(error)[:TEXT_CHARACTERS] if isinstance(error, OplogError) else None

    def watched(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return _Watched(self, batches)


class _Watched:
    """The batches of a query, which is over when they end, fail, or nobody holds them any more."""

    def __init__(self, query: Query, batches: Iterator[pa.RecordBatch]) -> None:
        self._query, self._batches = query, batches

    def __iter__(self) -> _Watched:
        return self

    def __next__(self) -> pa.RecordBatch:
        try:
            batch = next(self._batches)
        except StopIteration:
            self._query.end("done")
            raise
        except BaseException as error:
            self._query.end("stopped" if isinstance(error, Cancelled) else "failed", error)
            raise
        self._query.rows += batch.num_rows
        return batch

    def __del__(self) -> None:
        self._query.end("stopped")


class Queries:
    """The newest statements of this server. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: deque[Query] = deque(maxlen=QUERIES_KEPT)
        self.begun = 0

    def begin(self, sql: str, principal: str | None) -> Query:
        query = Query(sql[:TEXT_CHARACTERS], principal)
        with self._lock:
            self._kept.append(query)
            self.begun += 1
        return query

    def table(self, viewer: Principal) -> pa.RecordBatch:
        """`system.queries`, the newest first: a principal's own, or everybody's for who oversees the server."""
        with self._lock:
            kept = [query for query in reversed(self._kept) if viewer.rights.oversees or query.principal == viewer.name]
        rows = []
        for query in kept:
            counts = list(query.counts.values())
            row = {name: getattr(query, name) for name in SCHEMA.names if name not in _COUNTED}
            rows.append(row | {name: sum(getattr(each, name) for each in counts) for name in _COUNTED})
        return pa.RecordBatch.from_pylist(rows, SCHEMA)


def topics_table(snapshot: Snapshot) -> pa.RecordBatch:
    """`system.topics`: one row a topic, from the Delta log alone."""
    rows = []
    for topic in sorted(snapshot.topics.values(), key=lambda topic: topic.name):
        # Another program may have put records that were dropped beside those that count: such files are looked into.
        whole = [file for file in topic.files if file.first_offset >= topic.start]
        mixed = [file for file in topic.files if file.first_offset < topic.start]
        parts = [record for file in mixed for record in snapshot.records_of(topic, file)]
        times = [(f.min_time, f.max_time) for f in whole] + [(r.min_time, r.max_time) for r in parts]
        known = bool(times) and all(low is not None and high is not None for low, high in times)
        rows.append(
            {
                "topic": topic.name,
                "entries": topic.entries,
                "first_offset": topic.first_offset,
                "next_offset": topic.next_offset,
                "columns": len(topic.schema),
                "keys": ", ".join(topic.keys) or None,
                "schemas": len(topic.schemas),
                "files": len(topic.files),
                "records": sum(file.records for file in whole) + len(parts),
                "file_bytes": sum(f.size for f in topic.files),
                "min_time": min(low for low, _ in times if low is not None) if known else None,
                "max_time": max(high for _, high in times if high is not None) if known else None,
            }
        )
    return pa.RecordBatch.from_pylist(rows, _TOPICS_SCHEMA)


def metrics_table(values: Mapping[str, int]) -> pa.RecordBatch:
    """`system.metrics`: what this server counts since it was started, and how much of something there is now."""
    rows = [{"metric": name, "value": value, "meaning": _METRICS[name]} for name, value in values.items()]
    return pa.RecordBatch.from_pylist(rows, _METRICS_SCHEMA)


def settings_table(config: Config) -> pa.RecordBatch:
    """`system.settings`: every setting in force; of places on the server's disk, whether one is set."""
    rows = []
    for each in SETTINGS:
        value = str(getattr(config, each.name))
        shown = ("set" if value else "") if each.metadata["is_place"] else value
        rows.append({"setting": each.name, "value": shown, "default": str(each.default), "meaning": each.metadata["help"]})
    return pa.RecordBatch.from_pylist(rows, _SETTINGS_SCHEMA)


_TOPICS_SCHEMA = pa.schema(
    [
        ("topic", pa.string()),
        ("entries", pa.int64()),
        ("first_offset", pa.int64()),
        ("next_offset", pa.int64()),
        ("columns", pa.int64()),
        ("keys", pa.string()),
        ("schemas", pa.int64()),
        ("files", pa.int64()),
        ("records", pa.int64()),
        ("file_bytes", pa.int64()),
        ("min_time", pa.timestamp("us", "UTC")),
        ("max_time", pa.timestamp("us", "UTC")),
    ]
)
_SETTINGS_SCHEMA = pa.schema([(name, pa.string()) for name in ("setting", "value", "default", "meaning")])
_METRICS_SCHEMA = pa.schema([("metric", pa.string()), ("value", pa.int64()), ("meaning", pa.string())])
_METRICS = {
    "cache_hits": "records whose columns a query found in memory",
    "cache_misses": "records whose columns a query had to read, some of them at least",
    "cache_bytes": "decoded columns, indexes and filters in memory now",
    "cache_bytes_max": "the most there may be: the setting cache_bytes_max",
    "queries": "statements begun",
}


def explained(counts: Mapping[str, ScanCounts], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield what an EXPLAIN says last: for each table, what its scan has to look at."""
    if counts and len(schema) == 2:
        words = [
            f"files: {c.files}, pruned: {c.files_pruned}; records: {c.records}, pruned: {c.records_pruned}; "
            f"records read: {c.records_read}, in memory: {c.cache_hits}; "
            f"bytes read of content: {c.content_bytes}, of filters: {c.filter_bytes}"
            for c in counts.values()
        ]
        yield pa.RecordBatch.from_arrays([pa.array([f"scan of {table}" for table in counts]), pa.array(words)], schema=schema)
