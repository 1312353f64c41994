"""DROP TABLE, CREATE OR REPLACE and ingest mode "replace": what they end, what goes on after them, and who is told."""

import datetime
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import adbc_driver_flightsql.dbapi as adbc
import pyarrow as pa
import pytest
from conftest import ServerProcess, ask, eventually, put, rows
from deltalake import DeltaTable
from pyarrow import flight
from test_follow import Tail, ticket
from test_server import message, refused

from flight_oplog import Config, OpLog, Origin
from flight_oplog.appends import Receipt, end_of
from flight_oplog.errors import OplogError, OutOfOrder, RequestError, SchemaMismatch, TooLarge
from flight_oplog.flightsql import wire
from flight_oplog.sql.engine import Engine
from flight_oplog.sql.statements import Statements

Query = Callable[..., list[dict[str, Any]]]
Execute = Callable[[str], int]

ENTRIES = "SELECT _offset, a FROM log.t ORDER BY _offset"


def data(**columns: Any) -> pa.RecordBatch:
    return pa.record_batch(columns)


def times(unit: str, *values: int) -> pa.Array:
    return pa.array(values, pa.int64()).cast(pa.timestamp(unit))


def moments(*each: datetime.datetime) -> pa.Array:
    return pa.array(each, pa.timestamp("us", "UTC"))


def begun_anew(log: OpLog, *entries: Any) -> None:
    """Append numbers, drop the topic, and begin it again with other entries."""
    log.append("t", data(a=[1]))
    log.drop("t")
    log.append("t", data(a=list(entries)))


def reopened(folder: Path, engine: Engine, sql: str = ENTRIES) -> list[dict[str, Any]]:
    with OpLog.open(str(folder)) as again:
        assert again.verify() == []
        return rows(engine, again.snapshot(), sql)


def refusal(kind: type[OplogError], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def replace(server: ServerProcess, entries: dict[str, list[Any]], **headers: str) -> int:
    """Replace `t` as stock ADBC does."""
    options = {f"adbc.flight.sql.rpc.call_header.oplog-{name}": text for name, text in headers.items()}
    with adbc.connect(server.uri, db_kwargs=options, autocommit=True) as connected, connected.cursor() as cursor:
        count: int = cursor.adbc_ingest("t", pa.table(entries), mode="replace")
        return count


@pytest.fixture
def execute(log: OpLog, engine: Engine) -> Execute:
    return Statements(log, engine, log.config).execute


# CREATE after DROP


@pytest.mark.parametrize(
    ("sql", "entries"),
    [
        ("CREATE TABLE t (a VARCHAR)", []),
        ("CREATE TABLE IF NOT EXISTS t (a VARCHAR)", []),
        ("CREATE TABLE t AS SELECT 'x' AS a", ["x"]),
        ("CREATE TABLE IF NOT EXISTS t AS SELECT 'x' AS a", ["x"]),
        ("CREATE OR REPLACE TABLE t AS SELECT 'x' AS a", ["x"]),
    ],
)
def test_a_table_that_had_entries_is_created_again_after_a_drop(
    log: OpLog, engine: Engine, folder: Path, execute: Execute, query: Query, sql: str, entries: list[str]
) -> None:
    log.append("t", data(a=[1, 2, 3]))
    execute("DROP TABLE t")
    assert execute(sql) == len(entries)
    assert execute("INSERT INTO t VALUES ('y')") == 1
    expected = [{"_offset": 3 + place, "a": a} for place, a in enumerate([*entries, "y"])]
    assert query(ENTRIES) == reopened(folder, engine) == expected
    exists = "table 't' exists already; nothing was written; INSERT into it, or say IF NOT EXISTS"
    assert refusal(RequestError, lambda: execute("CREATE TABLE t (a VARCHAR)")) == exists
    assert log.verify() == []


def test_what_cannot_be_there_is_dropped_if_it_exists(log: OpLog, execute: Execute) -> None:
    assert execute('DROP TABLE IF EXISTS "no such name"') == 0
    assert execute('DROP VIEW IF EXISTS "no such name"') == 0
    no_name = "topic 'no such name' is not a topic name: a letter, then letters, digits and _, at most 128"
    assert refusal(RequestError, lambda: execute('DROP TABLE "no such name"')) == no_name
    assert log.snapshot().table_version == 0
    assert log.verify() == []


def test_a_full_log_replaces_what_it_has_and_takes_another_for_what_is_dropped(folder: Path, engine: Engine) -> None:
    config = Config(topics_max=2)
    with OpLog.open(str(folder), config) as log:
        execute = Statements(log, engine, config).execute
        log.append("t", data(a=[1]))
        log.append("u", data(a=[1]))
        assert execute("CREATE OR REPLACE TABLE t AS SELECT 'x' AS a") == 1
        assert rows(engine, log.snapshot(), ENTRIES) == [{"_offset": 1, "a": "x"}]
        over = "topic 'v' would be one more than topics_max (2); nothing was written"
        assert refusal(TooLarge, lambda: log.append("v", data(a=[1]))) == over
        log.drop("t")
        assert log.append("v", data(a=[1])).first_offset == 0
        over = "topic 't' would be one more than topics_max (2); nothing was written"
        assert refusal(TooLarge, lambda: execute("CREATE OR REPLACE TABLE t AS SELECT 'x' AS a")) == over


# Producers across a drop


def test_a_replace_sent_again_is_a_duplicate_and_ends_nothing(start: Callable[..., ServerProcess]) -> None:
    def again(server: ServerProcess, *expected: int) -> None:
        assert replace(server, {"a": [10, 20]}, producer="p", sequence="0") == 2
        with adbc.connect(server.uri, autocommit=True) as connected:
            assert [tuple(row.values()) for row in ask(connected, ENTRIES)] == list(enumerate(expected, 1))

    server = start()
    with flight.connect(server.uri) as client:
        put(client, "t", data(a=[1]))
        again(server, 10, 20)
        again(server, 10, 20)
        put(client, "t", data(a=[30]))
        again(server, 10, 20, 30)
    server.stop()
    again(start(), 10, 20, 30)


def test_a_producer_that_counts_anew_after_a_drop_is_told_instead_of_losing_entries(log: OpLog, engine: Engine, folder: Path) -> None:
    def send(log: OpLog, epoch: int, sequence: int) -> Receipt:
        return log.append("t", data(a=[f"{epoch}/{sequence}"]), Origin("p", epoch, sequence))

    def assert_told(log: OpLog, sequence: int) -> None:
        assert refusal(OutOfOrder, lambda: send(log, 0, sequence)) == (
            f"topic 't' was dropped or replaced after producer 'p' had sent sequence {sequence}; "
            "nothing was written; go on counting, or count from 0 in a higher epoch"
        )

    for sequence in range(3):
        log.append("t", data(a=[sequence]), Origin("p", 0, sequence))
    log.drop("t")
    with OpLog.open(str(folder)) as other:
        for each in (log, other):
            assert_told(each, 0)
            assert_told(each, 2)
        log.append("t", data(a=["another's"]))
        for each in (log, other):
            assert_told(each, 0)
        assert send(other, 0, 3).first_offset == 4
        assert send(log, 1, 0).first_offset == 5
        assert [(receipt.duplicate, receipt.first_offset) for receipt in (send(log, 1, 0), send(other, 1, 0))] == [(True, 5)] * 2
    assert [row["a"] for row in reopened(folder, engine)] == ["another's", "0/3", "1/0"]
    assert log.verify() == []


# What other programs do to the table


def test_a_compaction_after_a_drop_changes_nothing(log: OpLog, engine: Engine, folder: Path) -> None:
    with OpLog.open(str(folder)) as other:
        begun_anew(log, "x")
        other.snapshot()
        DeltaTable(str(folder)).optimize.compact()
        for each in (log, other):
            assert rows(engine, each.snapshot(), ENTRIES) == [{"_offset": 1, "a": "x"}]
            assert each.verify() == []
        assert other.append("t", data(a=["y"])).first_offset == 2
        assert log.append("u", data(a=[1])).first_offset == 0
    assert reopened(folder, engine) == [{"_offset": 1, "a": "x"}, {"_offset": 2, "a": "y"}]


@pytest.mark.parametrize("entry", [2, "x"])
def test_a_compaction_begun_before_a_topic_began_anew_changes_nothing(
    log: OpLog, engine: Engine, folder: Path, query: Query, entry: int | str
) -> None:
    log.append("t", data(a=[1]))
    log.drop("t")
    begun = DeltaTable(str(folder))
    log.append("t", data(a=[entry]))
    begun.optimize.compact()
    assert query(ENTRIES) == reopened(folder, engine) == [{"_offset": 1, "a": entry}]
    kind = data(a=[entry]).schema.field("a").type
    assert refusal(SchemaMismatch, lambda: log.append("t", data(a=[1.5]))) == (
        f"topic 't': column 'a' is {kind} in the topic and double in this append; "
        "the additive rule allows only widening that keeps every value exact; nothing was written"
    )
    log.append("t", data(a=[entry], more=[1.5]))
    expected = [{"_offset": 1, "a": entry, "more": None}, {"_offset": 2, "a": entry, "more": 1.5}]
    everything = "SELECT _offset, a, more FROM log.t ORDER BY _offset"
    assert query(everything) == reopened(folder, engine, everything) == expected
    assert log.verify() == []


def test_the_system_tables_leave_out_what_was_dropped_though_it_shares_a_file(log: OpLog, folder: Path, query: Query) -> None:
    before, after = datetime.datetime(1999, 1, 1, tzinfo=datetime.UTC), datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    log.append("t", data(at=moments(before)))
    log.drop("t")
    log.append("t", data(at=moments(after)))
    for compacted in (False, True):
        if compacted:
            DeltaTable(str(folder)).optimize.compact(partition_filters=[("topic", "=", "t")])
        found = query("SELECT entries, files, records, min_time, max_time FROM system.topics WHERE topic = 't'")
        assert found == [{"entries": 1, "files": 1, "records": 1, "min_time": after, "max_time": after}]
        assert query("SELECT count(*) AS n FROM records.t") == [{"n": 1}]
    assert log.verify() == []


def remove_files(folder: Path, topic: str) -> None:
    """Take a topic's files out of the table, as another program gives room back."""
    table = DeltaTable(str(folder))
    paths = [add["path"] for add in pa.table(table.get_add_actions(flatten=True)).to_pylist() if add["partition.topic"] == topic]
    now = int(time.time() * 1000)
    actions: list[dict[str, Any]] = [{"commitInfo": {"timestamp": now, "operation": "DELETE"}}]
    actions += [{"remove": {"path": path, "deletionTimestamp": now, "dataChange": True}} for path in paths]
    entry = folder / "_delta_log" / f"{table.version() + 1:020}.json"
    entry.write_text("".join(json.dumps(action) + "\n" for action in actions))


def test_offsets_go_on_when_the_files_of_a_dropped_topic_are_gone(folder: Path, engine: Engine) -> None:
    with OpLog.open(str(folder)) as log:
        log.append("t", data(a=[1, 2, 3, 4, 5]))
        log.drop("t")
        remove_files(folder, "t")
        assert log.snapshot().ended["t"].next_offset == 5
    with OpLog.open(str(folder)) as log:
        assert log.append("t", data(a=["x", "y"])).first_offset == 5
        assert rows(engine, log.snapshot(), ENTRIES) == [{"_offset": 5, "a": "x"}, {"_offset": 6, "a": "y"}]
    assert reopened(folder, engine) == [{"_offset": 5, "a": "x"}, {"_offset": 6, "a": "y"}]


# A server that is behind


def test_a_server_that_is_behind_looks_before_it_refuses_a_schema(folder: Path, engine: Engine) -> None:
    with OpLog.open(str(folder)) as first, OpLog.open(str(folder)) as second:
        second.append("t", data(a=[1]))
        first.drop("t")
        first.append("t", data(a=["x"]))
        assert second.append("t", data(a=["y"])).first_offset == 2
    assert reopened(folder, engine) == [{"_offset": 1, "a": "x"}, {"_offset": 2, "a": "y"}]


def test_a_server_that_is_behind_looks_before_it_calls_the_log_full(folder: Path) -> None:
    config = Config(topics_max=1)
    with OpLog.open(str(folder), config) as first, OpLog.open(str(folder), config) as second:
        second.append("t", data(a=[1]))
        first.drop("t")
        assert second.append("u", data(a=[1])).first_offset == 0
        over = "topic 't' would be one more than topics_max (1); nothing was written"
        assert refusal(TooLarge, lambda: first.append("t", data(a=[1]))) == over


# Many in one commit


def test_replaces_in_one_transaction_leave_the_last_ones_rows(server: ServerProcess, connection: adbc.Connection) -> None:
    with adbc.connect(server.uri) as transacting, transacting.cursor() as cursor:
        for a in (1, 2, 3):
            cursor.adbc_ingest("t", pa.table({"a": [a, a]}), mode="replace")
        transacting.commit()
    assert ask(connection, ENTRIES) == [{"_offset": 4, "a": 3}, {"_offset": 5, "a": 3}]
    assert ask(connection, "SELECT count(*) AS n FROM records.t") == [{"n": 1}]


@pytest.mark.parametrize("other", [99, "other"])
def test_a_replace_ends_what_another_created_meanwhile(
    server: ServerProcess, client: flight.FlightClient, connection: adbc.Connection, other: int | str
) -> None:
    with adbc.connect(server.uri) as transacting, transacting.cursor() as cursor:
        cursor.adbc_ingest("t", pa.table({"a": [1]}), mode="replace")
        put(client, "t", data(a=[other]))
        transacting.commit()
    assert ask(connection, ENTRIES) == [{"_offset": 1, "a": 1}]


@pytest.mark.parametrize(
    "old", [pa.array(["abc"]), pa.array([datetime.date(2020, 1, 1)]), times("s", -(10**11))], ids=["text", "date", "old"]
)
def test_a_column_is_widened_whatever_was_dropped_in_the_same_commit(
    log: OpLog, query: Query, monkeypatch: pytest.MonkeyPatch, old: pa.Array
) -> None:
    entered, going_on = threading.Event(), threading.Event()
    real = log._committer._commit_waiting

    def commit(waiting: Any) -> None:
        entered.set()
        assert going_on.wait(10)
        real(waiting)

    def submit(topic: str, entries: pa.RecordBatch) -> Future[Receipt]:
        writer = log.writer(topic, entries.schema)
        writer.write(entries)
        return writer.submit()

    monkeypatch.setattr(log._committer, "_commit_waiting", commit)
    first = submit("other", data(n=[1]))
    assert entered.wait(10)
    together = [submit("t", data(at=old)), *log._committer.submit([end_of("t")])]
    together += [submit("t", data(at=times(unit, value))) for unit, value in (("s", 1), ("ns", 2))]
    going_on.set()
    assert first.result(10).table_version == 1
    assert [(receipt.result(10).table_version, receipt.result().first_offset) for receipt in together] == [(2, 0), (2, 1), (2, 1), (2, 2)]
    found = query("SELECT _offset, CAST(at AS BIGINT) AS at FROM log.t ORDER BY _offset")
    assert found == [{"_offset": 1, "at": 10**9}, {"_offset": 2, "at": 2}]
    assert log.verify() == []


# Who reads across a drop


def test_the_tickets_of_a_topic_that_began_anew_read_it_from_where_it_begins(
    client: flight.FlightClient, connection: adbc.Connection
) -> None:
    put(client, "t", data(a=[1, 2]))
    ask(connection, "CREATE OR REPLACE TABLE t AS SELECT 'x' AS a")
    [listed] = [info for info in client.list_flights() if info.descriptor.path == [b"t"]]
    asked = client.get_flight_info(flight.FlightDescriptor.for_path("t"))
    for info in (listed, asked):
        assert info.total_records == 1
        assert client.do_get(info.endpoints[0].ticket).read_all().to_pydict() == {"a": ["x"]}
    assert client.do_get(ticket(topic="t")).read_all().to_pydict() == {"a": ["x"]}
    with refused(pa.ArrowKeyError, "topic 't': offset 0 has been removed; the first one left is 2"):
        client.do_get(ticket(topic="t", **{"from": 0}))


@pytest.mark.parametrize("asked", [{"columns": ["a"]}, {"where": "a > 0"}], ids=["columns", "where"])
def test_a_follower_is_told_where_to_come_back_when_its_column_is_gone(
    client: flight.FlightClient, connection: adbc.Connection, asked: dict[str, Any]
) -> None:
    put(client, "t", data(a=[1, 2]))
    tail = Tail(client.do_get(ticket(topic="t", follow=True, **asked)))
    assert eventually(lambda: tail.found == [([1, 2], 2)])
    ask(connection, "CREATE OR REPLACE TABLE t AS SELECT 'x' AS other")
    assert eventually(lambda: tail.error is not None)
    assert isinstance(tail.error, flight.FlightUnavailableError)
    assert message(tail.error) == "topic 't': its schema has changed; come back from offset 2"
    assert client.do_get(ticket(topic="t", **{"from": 2})).read_all().to_pydict() == {"other": ["x"]}


def test_a_followed_statement_planned_before_its_column_got_another_type_is_refused(
    client: flight.FlightClient, connection: adbc.Connection
) -> None:
    options = flight.FlightCallOptions(headers=[(b"oplog-follow", b"true")])
    command = flight.FlightDescriptor.for_command(wire.pack(wire.CommandStatementQuery("SELECT a FROM t")))

    def first(info: flight.FlightInfo) -> list[Any]:
        reader = client.do_get(info.endpoints[0].ticket)
        assert reader.schema == info.schema
        found: list[Any] = reader.read_chunk().data.column(0).to_pylist()
        reader.cancel()
        return found

    put(client, "t", data(a=[1]))
    planned = client.get_flight_info(command, options)
    ask(connection, "CREATE OR REPLACE TABLE t AS SELECT 2 AS a")
    assert first(planned) == [2], "with the same type, it is as good as before"
    ask(connection, "CREATE OR REPLACE TABLE t AS SELECT 'x' AS a")
    with refused(flight.FlightUnavailableError, "topic 't': its schema has changed since the statement was planned; plan it again"):
        client.do_get(planned.endpoints[0].ticket)
    assert first(client.get_flight_info(command, options)) == ["x"]


# Pruning, found on the way


def test_runs_of_records_that_begin_alike_are_pruned_apart(folder: Path, engine: Engine) -> None:
    hours = [datetime.datetime(2026, 1, 1, hour, tzinfo=datetime.UTC) for hour in range(4)]
    with OpLog.open(str(folder), Config(record_entries_max=2)) as log:
        for hour, at in enumerate(hours):
            log.append("t", data(at=moments(*[at] * 42), n=[hour] * 42))
        for hour in (1, 3, 2, 1):
            low, high = (f"TIMESTAMP '2026-01-01T0{number}:30:00Z'" for number in (hour - 1, hour))
            within = f"at < TIMESTAMP '2026-01-01T00:30:00Z' OR at > {low} AND at < {high}"
            found = rows(engine, log.snapshot(), f"SELECT count(*) AS c FROM t WHERE ({within}) AND n = {hour}")
            assert found == [{"c": 42}]
