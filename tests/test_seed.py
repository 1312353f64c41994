"""The example this project began with: two entries in over do_put, out by SQL and through the outer record."""

import datetime

import adbc_driver_flightsql.dbapi as adbc
import polars
import pyarrow as pa
from conftest import SEED, ServerProcess, ask, put
from deltalake import DeltaTable
from pyarrow import flight

HELLO = {"name": "hello", "node_id": "000000000000162e"}
WORLD = {"name": "world", "node_id": "00000000000004d2"}


def test_two_entries_stream_in_and_come_back_by_sql(client: flight.FlightClient, connection: adbc.Connection) -> None:
    receipt = put(client, "events", SEED)
    assert (receipt["topic"], receipt["first_offset"], receipt["entries"], receipt["table_version"]) == ("events", 0, 2, 1)
    assert ask(connection, "SELECT * FROM events") == [HELLO, WORLD]
    assert ask(connection, "SELECT * FROM events WHERE name = 'hello'") == [HELLO]
    assert ask(connection, "SELECT count(*) AS n FROM events") == [{"n": 2}]


def test_the_outer_record_names_the_topic_and_when_it_was_written(client: flight.FlightClient, connection: adbc.Connection) -> None:
    before = datetime.datetime.now(datetime.UTC)
    put(client, "events", SEED)
    after = datetime.datetime.now(datetime.UTC)
    [record] = ask(connection, "SELECT topic, first_offset, entries, appends FROM records.events")
    [append] = record.pop("appends")
    assert record == {"topic": "events", "first_offset": 0, "entries": 2}
    assert append["entries"] == 2
    assert append["timestamp"].utcoffset() == datetime.timedelta(0)
    assert before <= append["timestamp"] <= after
    timestamps = {row["_timestamp"] for row in ask(connection, "SELECT _timestamp FROM log.events")}
    assert timestamps == {append["timestamp"]}


def test_any_delta_reader_sees_the_records_while_the_server_runs(client: flight.FlightClient, server: ServerProcess) -> None:
    put(client, "events", SEED)
    frame = polars.read_delta(str(server.folder)).filter(polars.col("topic") == "events")
    entries = [row for content in frame["content"] for row in pa.ipc.open_stream(content).read_all().to_pylist()]
    assert entries == [HELLO, WORLD]

    table = DeltaTable(str(server.folder)).to_pyarrow_table(filters=[("topic", "=", "events")])
    assert pa.ipc.open_stream(table["content"][0].as_buffer()).read_all().to_pylist() == [HELLO, WORLD]
