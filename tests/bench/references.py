"""What our server is asked beside its peers although it is no server of their kind: the same answers without a wire, and
the same wire without a query. They say what is possible; no mean and no chart counts them.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from datafusion import SessionConfig, SessionContext
from deltalake import DeltaTable, QueryBuilder
from peers import ALL, HOST, ONE, TABLE, Asked, Query, free_port, running

# The least ratio that we want, by question and reference.
MARKS = {("SELECT *", "pyarrow.flight"): 0.95}


@dataclass(frozen=True)
class InProcess:
    """A library that answers in this process."""

    name: str
    ask: Query
    statements: frozenset[str] | None = None

    @contextlib.contextmanager
    def connect(self) -> Iterator[Query]:
        yield self.ask


def datafusion_over(table: Path) -> SessionContext:
    """Return DataFusion with its own Parquet reader over the files of a Delta table that holds no others."""
    assert {Path(uri.removeprefix("file://")) for uri in DeltaTable(str(table)).file_uris()} == {*table.rglob("*.parquet")}
    settings = {"datafusion.execution.parquet.pushdown_filters": "true"}
    context = SessionContext(SessionConfig(settings).with_target_partitions(os.cpu_count() or 1))
    context.register_parquet(TABLE, str(table))
    return context


@contextlib.contextmanager
def datafusion_in_process(table: Path) -> Iterator[Asked]:
    context = datafusion_over(table)

    def ask(sql: str) -> pa.Table:
        return pa.Table.from_batches([batch.to_pyarrow() for batch in context.sql(sql).execute_stream()])

    yield InProcess("DataFusion in process", ask)


@contextlib.contextmanager
def deltalake_in_process(table: Path) -> Iterator[Asked]:
    """deltalake's provider in the DataFusion it brings: its table in ours, across two versions, is slower."""
    builder = QueryBuilder().register(TABLE, DeltaTable(str(table)))
    yield InProcess("deltalake in process", lambda sql: pa.table(builder.execute(sql)))


def pyarrow_flight(table: Path, folder: Path) -> contextlib.AbstractContextManager[Asked]:
    """The two statements of `memory_server.py`."""
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("memory_server.py")), str(table), f"grpc://{HOST}:{port}"]
    return running("pyarrow.flight", command, folder, port, statements=frozenset({ONE, ALL}))


def all_references(table: Path, folder: Path) -> list[Callable[[], contextlib.AbstractContextManager[Asked]]]:
    return [
        lambda: datafusion_in_process(table),
        lambda: deltalake_in_process(table),
        lambda: pyarrow_flight(table, folder / "memory"),
    ]
