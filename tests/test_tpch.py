"""TPC-H over the log: eight topics, streamed in; 22 queries, asked through ADBC; the answers of DataFusion on Parquet.

At this scale every query has rows and none has a null among them: each tells something.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import adbc_driver_flightsql.dbapi as adbc
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tpch
from conftest import ServerProcess, assert_clean, put
from datafusion import SessionContext
from pyarrow import flight

SCALE = 0.05
BATCH_ENTRIES = 5_000
QUERIES = tpch.queries(SCALE)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tpch.generate(SCALE, tmp_path_factory.mktemp("tables"))


@pytest.fixture(scope="module")
def connection(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[adbc.Connection]:
    """A connection to a server that was sent every table, each as one append of several batches and records."""
    folder = tmp_path_factory.mktemp("tpch")
    server = ServerProcess(folder / "log", folder / "stderr", "--record-bytes-max", "2000000")
    try:
        with flight.connect(server.uri) as client:
            for table, file in files.items():
                put(client, table, *pq.ParquetFile(file).iter_batches(BATCH_ENTRIES))
        with adbc.connect(server.uri, autocommit=True) as connected:
            yield connected
    finally:
        server.stop()
    assert_clean(folder / "log")


@pytest.fixture(scope="module")
def parquet(files: dict[str, Path]) -> SessionContext:
    """DataFusion in process, on the generator's own files."""
    session = SessionContext()
    for table, file in files.items():
        session.register_parquet(table, str(file))
    return session


def asked(connection: adbc.Connection, sql: str) -> pa.Table:
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetch_arrow_table()


@pytest.mark.parametrize("table", tpch.TABLES)
def test_a_table_comes_back_as_it_went_in(connection: adbc.Connection, files: dict[str, Path], table: str) -> None:
    sent = pq.read_table(files[table])
    names = ", ".join(sent.column_names)
    found = asked(connection, f"SELECT {names} FROM log.{table} ORDER BY _offset")
    kinds = [pa.string() if kind == pa.string_view() else kind for kind in sent.schema.types]
    assert found.schema.types == kinds
    assert found.equals(sent.cast(found.schema))


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_is_answered_as_from_parquet_however_often(connection: adbc.Connection, parquet: SessionContext, query: str) -> None:
    expected = parquet.sql(QUERIES[query]).to_arrow_table()
    assert expected.num_rows > 0
    assert not any(column.null_count for column in expected.columns)
    for _ in range(3):  # a state is made the second time, and answers the third, where one can be
        assert tpch.difference(query, asked(connection, QUERIES[query]), expected) is None
