"""What Flight SQL clients ask for beyond a query: parameters, updates, sessions, time travel, cancelling; over the wire."""

import base64
import datetime
import decimal
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adbc_driver_flightsql.dbapi as adbc
import pyarrow as pa
import pytest
from conftest import SEED, ServerProcess, ask, eventually, put
from deltalake import DeltaTable
from pyarrow import flight

from flight_oplog import OpLog
from flight_oplog.errors import NotFound
from flight_oplog.flightsql import wire

ENDLESS = "SELECT count(*) FROM generate_series(1, 100000000000)"
COOKIES = {"adbc.flight.sql.rpc.with_cookie_middleware": "true"}


@pytest.fixture
def cursor(connection: adbc.Connection) -> Iterator[adbc.Cursor]:
    with connection.cursor() as opened:
        yield opened


def run(cursor: adbc.Cursor, sql: str, parameters: Any = None) -> list[tuple[Any, ...]]:
    cursor.execute(sql, parameters)
    found: list[tuple[Any, ...]] = cursor.fetchall() if cursor.description else []
    return found


def command(message: object) -> flight.FlightDescriptor:
    return flight.FlightDescriptor.for_command(wire.pack(message))


def act(client: flight.FlightClient, kind: str, message: object, is_sql: bool = True) -> bytes:
    body = wire.pack(message) if is_sql else wire.encode(message)
    results = list(client.do_action(flight.Action(kind, body)))
    return results[0].body.to_pybytes() if results else b""


def prepare(client: flight.FlightClient, sql: str) -> wire.ActionCreatePreparedStatementResult:
    found = wire.unpack(act(client, "CreatePreparedStatement", wire.ActionCreatePreparedStatementRequest(sql)))
    assert isinstance(found, wire.ActionCreatePreparedStatementResult)
    return found


def send(client: flight.FlightClient, message: object, values: pa.RecordBatch | None = None) -> bytes:
    """Send a command by DoPut, with values or with none as drivers send none; return the server's answer."""
    values = pa.RecordBatch.from_pylist([], pa.schema([])) if values is None else values
    writer, answers = client.do_put(command(message), values.schema)
    writer.write_batch(values)
    writer.done_writing()
    answer = answers.read()
    writer.close()
    return answer.to_pybytes() if answer is not None else b""


def fetch(client: flight.FlightClient, info: flight.FlightInfo) -> list[dict[str, Any]]:
    return client.do_get(info.endpoints[0].ticket).read_all().to_pylist()


# Parameters


def test_values_are_bound_by_place_number_or_name(cursor: adbc.Cursor) -> None:
    run(cursor, "CREATE TABLE t (a BIGINT, s VARCHAR)")
    run(cursor, "INSERT INTO t VALUES (1, 'x'), (2, 'y'), (3, NULL)")
    assert run(cursor, "SELECT s FROM t WHERE a = ? AND s <> ?", (2, "x")) == [("y",)]
    assert run(cursor, "SELECT s FROM t WHERE a = $2 OR s = $1 ORDER BY a", ("x", 2)) == [("x",), ("y",)]
    assert run(cursor, "SELECT a FROM t WHERE a >= $low AND a < $low + 2 ORDER BY a", (2,)) == [(2,), (3,)]
    assert run(cursor, "SELECT a FROM t WHERE s = ?", (None,)) == []
    assert run(cursor, "SELECT a FROM t ORDER BY a LIMIT ?", (2,)) == [(1,), (2,)]
    assert run(cursor, "SELECT '?' AS q, a FROM t WHERE a = ? -- ?", (1,)) == [("?", 1)]
    with pytest.raises(adbc.ProgrammingError, match="the statement has 1 parameter, 2 are bound"):
        run(cursor, "SELECT a FROM t WHERE a = ?", (1, 2))


NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, 678900, tzinfo=datetime.UTC)
VALUES = {
    "int8": pa.array([-5], pa.int8()),
    "uint64": pa.array([2**64 - 1], pa.uint64()),
    "float32": pa.array([0.5], pa.float32()),
    "float64": pa.array([1e300]),
    "bool": pa.array([True]),
    "string": pa.array(["é"]),
    "large string": pa.array(["x"], pa.large_string()),
    "string view": pa.array(["a text of more than twelve bytes"], pa.string_view()),
    "binary": pa.array([b"\0\xff"]),
    "decimal": pa.array([decimal.Decimal("12345678901234567890.12")], pa.decimal128(38, 2)),
    "date": pa.array([NOW.date()]),
    "time": pa.array([NOW.time()], pa.time64("us")),
    "timestamp": pa.array([NOW.replace(tzinfo=None)], pa.timestamp("us")),
    "timestamp with zone": pa.array([NOW], pa.timestamp("us", "UTC")),
    "duration": pa.array([datetime.timedelta(seconds=3)], pa.duration("us")),
    "list": pa.array([[1, None, 3]]),
    "struct": pa.array([{"a": 1, "b": "x"}]),
    "dictionary": pa.array(["k"]).dictionary_encode(),
    "null": pa.nulls(1),
}


@pytest.mark.parametrize("kind", VALUES)
def test_a_value_of_every_type_comes_back_as_it_was(cursor: adbc.Cursor, kind: str) -> None:
    batch = pa.RecordBatch.from_arrays([VALUES[kind]], ["0"])
    cursor.adbc_statement.set_sql_query("SELECT ? AS v")
    cursor.adbc_statement.prepare()
    cursor.adbc_statement.bind(batch)
    stream, _ = cursor.adbc_statement.execute_query()
    found = pa.RecordBatchReader._import_from_c(stream.address).read_all()
    plain = VALUES[kind].dictionary_decode() if kind == "dictionary" else VALUES[kind]
    assert found["v"].to_pylist() == plain.to_pylist()
    if kind not in ("dictionary", "string view"):
        assert found.schema.field("v").type == plain.type


def test_a_query_runs_once_for_each_row_of_values(cursor: adbc.Cursor) -> None:
    run(cursor, "CREATE TABLE t AS SELECT value AS a FROM generate_series(1, 10)")
    cursor.adbc_statement.set_sql_query("SELECT a, ? AS tag FROM t WHERE a <= ? ORDER BY a")
    cursor.adbc_statement.prepare()
    cursor.adbc_statement.bind(pa.record_batch({"0": ["x", "y", "z"], "1": [1, 0, 2]}))
    stream, _ = cursor.adbc_statement.execute_query()
    found = pa.RecordBatchReader._import_from_c(stream.address).read_all().to_pylist()
    assert [tuple(row.values()) for row in found] == [(1, "x"), (1, "z"), (2, "z")]


def test_many_rows_are_inserted_as_one_append(server: ServerProcess, cursor: adbc.Cursor, connection: adbc.Connection) -> None:
    run(cursor, "CREATE TABLE t (a BIGINT, s VARCHAR)")
    cursor.executemany("INSERT INTO t VALUES (?, upper(?))", [(n, f"v{n}") for n in range(5000)])
    assert cursor.rowcount == 5000
    assert run(cursor, "SELECT count(*), min(a), max(a), max(s) FROM t") == [(5000, 0, 4999, "V999")]
    assert ask(connection, "SELECT entries FROM records.t") == [{"entries": 5000}]


def test_a_statement_says_what_its_parameters_and_its_result_are(client: flight.FlightClient) -> None:
    put(client, "t", pa.record_batch({"a": [1], "s": ["x"]}))
    query = prepare(client, "SELECT s, a + 1 AS b FROM t WHERE a = ? AND s LIKE ?")
    assert pa.ipc.read_schema(pa.py_buffer(query.parameter_schema)) == pa.schema([("1", pa.int64()), ("2", pa.string())])
    assert pa.ipc.read_schema(pa.py_buffer(query.dataset_schema)) == pa.schema([("s", pa.string()), ("b", pa.int64())])
    update = prepare(client, "INSERT INTO t VALUES ($1, $2)")
    assert pa.ipc.read_schema(pa.py_buffer(update.parameter_schema)) == pa.schema([("1", pa.int64()), ("2", pa.string())])
    assert (query.is_update, update.is_update, update.dataset_schema) == (False, True, b"")
    named = prepare(client, "SELECT * FROM t WHERE a = $low OR a > $low OR s = $word")
    assert pa.ipc.read_schema(pa.py_buffer(named.parameter_schema)) == pa.schema([("low", pa.int64()), ("word", pa.string())])


def test_parameters_are_asked_for_in_types_that_jdbc_can_bind(client: flight.FlightClient) -> None:
    put(client, "t", pa.record_batch({"at": pa.array([0], pa.timestamp("ns", "UTC")), "of": pa.array([0], pa.time64("us"))}))
    asked = prepare(client, "SELECT ? AS v FROM t WHERE at > ? AND of > ? LIMIT ?")
    assert pa.ipc.read_schema(pa.py_buffer(asked.parameter_schema)).types == [
        *(pa.string(), pa.timestamp("ms", "UTC"), pa.time32("ms"), pa.int64()),
    ]
    with pytest.raises(pa.ArrowInvalid, match="the statement has parameters and none is bound"):
        client.get_flight_info(command(wire.CommandStatementQuery("SELECT ? AS v")))
    with pytest.raises(pa.ArrowInvalid, match="the statement has parameters and none is bound"):
        client.get_flight_info(command(wire.CommandPreparedStatementQuery(asked.prepared_statement_handle)))


@pytest.mark.parametrize("follows", [True, False])
def test_values_ride_in_the_handle_and_are_kept_for_who_ignores_it(client: flight.FlightClient, follows: bool) -> None:
    put(client, "t", pa.record_batch({"a": [1, 2, 3]}))
    handle = prepare(client, "SELECT a FROM t WHERE a >= ? ORDER BY a").prepared_statement_handle
    for low in (2, 3):
        answer = wire.decode(
            send(client, wire.CommandPreparedStatementQuery(handle), pa.record_batch({"0": [low]})), wire.DoPutPreparedStatementResult
        )
        assert answer.prepared_statement_handle
        used = answer.prepared_statement_handle if follows else handle
        info = client.get_flight_info(command(wire.CommandPreparedStatementQuery(used)))
        assert fetch(client, info) == [{"a": n} for n in range(low, 4)]


def test_bound_values_are_limited(start: Callable[..., ServerProcess]) -> None:
    server = start("--parameter-rows-max", "3", "--parameter-bytes-max", "100")
    with flight.connect(server.uri) as client:
        handle = prepare(client, "SELECT ? AS a").prepared_statement_handle
        bind = wire.CommandPreparedStatementQuery(handle)
        send(client, bind, pa.record_batch({"0": [1, 2, 3]}))
        with pytest.raises(pa.ArrowInvalid, match="4 rows of values are bound to a query; parameter_rows_max is 3"):
            send(client, bind, pa.record_batch({"0": [1, 2, 3, 4]}))
        send(client, bind, pa.record_batch({"0": ["x" * 92]}))
        with pytest.raises(pa.ArrowInvalid, match=r"are more than parameter_bytes_max \(100\) bytes"):
            send(client, bind, pa.record_batch({"0": ["x" * 101]}))


# Updates


def test_what_changes_something_is_carried_out_once_whichever_way_it_comes(client: flight.FlightClient) -> None:
    put(client, "t", pa.record_batch({"a": [0]}))

    def count() -> int:
        info = client.get_flight_info(command(wire.CommandStatementQuery("SELECT count(*) AS n FROM t")))
        found: int = fetch(client, info)[0]["n"]
        return found

    insert = "INSERT INTO t VALUES (1), (2)"
    assert client.get_schema(command(wire.CommandStatementQuery(insert))).schema == pa.schema([("count", pa.int64())])
    handle = prepare(client, insert).prepared_statement_handle
    assert client.get_schema(command(wire.CommandPreparedStatementQuery(handle))).schema == pa.schema([("count", pa.int64())])
    assert count() == 1

    info = client.get_flight_info(command(wire.CommandStatementQuery(insert)))
    assert count() == 3
    assert fetch(client, info) == fetch(client, info) == [{"count": 2}]
    assert info.schema == pa.schema([("count", pa.int64())])
    assert count() == 3

    info = client.get_flight_info(command(wire.CommandPreparedStatementQuery(handle)))
    assert fetch(client, info) == [{"count": 2}]
    assert count() == 5
    for message in (wire.CommandStatementUpdate(insert), wire.CommandPreparedStatementUpdate(handle)):
        assert wire.decode(send(client, message), wire.DoPutUpdateResult) == wire.DoPutUpdateResult(2)
    assert count() == 9
    with pytest.raises(pa.ArrowInvalid, match="the statement is a query: send it as one"):
        send(client, wire.CommandStatementUpdate("SELECT 1"))


def test_an_insert_with_a_producer_in_its_headers_is_written_once(server: ServerProcess) -> None:
    headers = {"oplog-producer": "p", "oplog-sequence": "0"}
    settings = {f"adbc.flight.sql.rpc.call_header.{name}": value for name, value in headers.items()}
    with adbc.connect(server.uri, autocommit=True) as plain, adbc.connect(server.uri, db_kwargs=settings, autocommit=True) as connection:
        with plain.cursor() as cursor:
            run(cursor, "CREATE TABLE t (a BIGINT)")
        for _ in range(3):
            with connection.cursor() as cursor:
                cursor.execute("INSERT INTO t VALUES (7)")
                assert cursor.rowcount == 1
        assert ask(plain, "SELECT count(*) AS n FROM t") == [{"n": 1}]


def test_inserts_belong_to_their_transaction(server: ServerProcess, connection: adbc.Connection) -> None:
    with connection.cursor() as cursor:
        run(cursor, "CREATE TABLE t (a BIGINT)")
    with adbc.connect(server.uri) as transactional, transactional.cursor() as cursor:
        cursor.execute("INSERT INTO t VALUES (1)")
        cursor.executemany("INSERT INTO t VALUES (?)", [(2,), (3,)])
        assert ask(connection, "SELECT count(*) AS n FROM t") == [{"n": 0}]
        transactional.rollback()
        cursor.execute("INSERT INTO t VALUES (4)")
        with pytest.raises(adbc.NotSupportedError, match="CREATE TABLE is not served within a transaction"):
            cursor.execute("CREATE TABLE other (a INT)")
        transactional.commit()
        assert ask(connection, "SELECT a FROM t") == [{"a": 4}]


# Handles


def test_any_server_of_the_log_redeems_a_handle_also_after_a_restart(start: Callable[..., ServerProcess]) -> None:
    first = start()
    with flight.connect(first.uri) as client:
        put(client, "t", pa.record_batch({"a": [1, 2, 3]}))
        info = client.get_flight_info(command(wire.CommandStatementQuery("SELECT sum(a) AS s FROM t")))
        handle = prepare(client, "SELECT a FROM t WHERE a > ?").prepared_statement_handle
        bound = wire.decode(
            send(client, wire.CommandPreparedStatementQuery(handle), pa.record_batch({"0": [2]})), wire.DoPutPreparedStatementResult
        )
        put(client, "t", pa.record_batch({"a": [10]}))
    second = start(folder=first.folder)
    first.stop()
    third = start(folder=first.folder)
    for server in (second, third):
        with flight.connect(server.uri) as client:
            assert fetch(client, info) == [{"s": 6}]  # of the snapshot it was planned on
            again = client.get_flight_info(command(wire.CommandPreparedStatementQuery(bound.prepared_statement_handle or b"")))
            assert sorted(row["a"] for row in fetch(client, again)) == [3, 10]


def test_expired_altered_and_foreign_handles_are_refused(start: Callable[..., ServerProcess], tmp_path: Path) -> None:
    server, other = start("--ticket-seconds-max", "1"), start(folder=tmp_path / "other")
    with flight.connect(server.uri) as client, flight.connect(other.uri) as stranger:
        put(stranger, "t", pa.record_batch({"a": [1]}))
        info = stranger.get_flight_info(command(wire.CommandStatementQuery("SELECT 1")))
        with pytest.raises(pa.ArrowInvalid, match="was not made by a server of this log for you, or was altered"):
            fetch(client, info)
        mine = client.get_flight_info(command(wire.CommandStatementQuery("SELECT 1")))
        ticket = bytearray(mine.endpoints[0].ticket.ticket)
        ticket[-20] ^= 1
        with pytest.raises(pa.ArrowInvalid, match="handle was not made by a server of this log for you, or was altered"):
            client.do_get(flight.Ticket(bytes(ticket))).read_all()
        handle = prepare(client, "SELECT 1").prepared_statement_handle
        time.sleep(1.1)
        with pytest.raises(KeyError, match="the statement handle has expired; ask for a new one"):
            fetch(client, mine)
        with pytest.raises(KeyError, match="the prepared statement handle has expired; ask for a new one"):
            client.get_flight_info(command(wire.CommandPreparedStatementQuery(handle)))


def test_a_renewed_endpoint_lasts_longer(start: Callable[..., ServerProcess]) -> None:
    server = start("--ticket-seconds-max", "2")
    with flight.connect(server.uri) as client:
        info = client.get_flight_info(command(wire.CommandStatementQuery("SELECT 7 AS a")))
        endpoint = wire.FlightEndpoint(wire.Ticket(info.endpoints[0].ticket.ticket), app_metadata=b"kept")
        renewed = endpoint
        for _ in range(2):
            time.sleep(1.2)
            answer = act(client, "RenewFlightEndpoint", wire.RenewFlightEndpointRequest(renewed), is_sql=False)
            renewed = wire.decode(answer, wire.FlightEndpoint)
            assert renewed.expiration_time is not None
            assert abs(renewed.expiration_time.seconds - time.time() - 2) < 1.5
            assert renewed.app_metadata == b"kept"
        assert renewed.ticket is not None
        assert client.do_get(flight.Ticket(renewed.ticket.ticket)).read_all().to_pylist() == [{"a": 7}]
        with pytest.raises(KeyError, match="has expired"):
            fetch(client, info)
        with pytest.raises(KeyError, match="has expired"):
            act(client, "RenewFlightEndpoint", wire.RenewFlightEndpointRequest(endpoint), is_sql=False)


def test_cancelling_a_statement_reaches_its_renewed_ticket(start: Callable[..., ServerProcess]) -> None:
    with flight.connect(start().uri) as client:
        info = client.get_flight_info(command(wire.CommandStatementQuery("SELECT 7 AS a")))
        endpoint = wire.FlightEndpoint(wire.Ticket(info.endpoints[0].ticket.ticket))
        answer = act(client, "RenewFlightEndpoint", wire.RenewFlightEndpointRequest(endpoint), is_sql=False)
        renewed = wire.decode(answer, wire.FlightEndpoint)
        act(client, "CancelFlightInfo", wire.CancelFlightInfoRequest(wire.FlightInfo(endpoint=(endpoint,))), is_sql=False)
        assert renewed.ticket is not None
        with pytest.raises(flight.FlightCancelledError, match="the query was cancelled"):
            client.do_get(flight.Ticket(renewed.ticket.ticket))


# Time travel


def test_a_statement_sees_the_log_as_of_a_version_or_a_time(server: ServerProcess, cursor: adbc.Cursor) -> None:
    run(cursor, "CREATE TABLE t (a BIGINT)")
    run(cursor, "INSERT INTO t VALUES (1)")
    run(cursor, "CREATE VIEW v AS SELECT a * 10 AS b FROM t")
    time.sleep(0.05)
    now = datetime.datetime.now(datetime.UTC).isoformat()
    time.sleep(0.05)
    run(cursor, "INSERT INTO t VALUES (2)")
    run(cursor, "DROP VIEW v")
    assert run(cursor, "SELECT a FROM at_version('t', 2)") == run(cursor, f"SELECT a FROM at_time('t', '{now}')") == [(1,)]
    assert run(cursor, "SELECT count(*) FROM at_version('t', 2) AS before JOIN t ON t.a = before.a + 1") == [(1,)]
    for headers in ({"oplog-at-version": "3"}, {"oplog-at-timestamp": now}):
        settings = {f"adbc.flight.sql.rpc.call_header.{name}": value for name, value in headers.items()}
        with adbc.connect(server.uri, db_kwargs=settings, autocommit=True) as connection, connection.cursor() as past:
            assert run(past, "SELECT b FROM v") == [(10,)]
            with pytest.raises(adbc.ProgrammingError, match="the past is not changed"):
                run(past, "INSERT INTO t VALUES (3)")
    with adbc.connect(server.uri, db_kwargs=COOKIES, autocommit=True) as connection, connection.cursor() as past:
        connection.adbc_connection.set_options(**{"adbc.flight.sql.session.option.oplog-at-version": "3"})
        assert run(past, "SELECT b FROM v") == [(10,)]
    assert run(cursor, "SELECT a FROM t ORDER BY a") == [(1,), (2,)]


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT * FROM at_version('t', 99)", "table_version 99 is not committed yet"),
        ("SELECT * FROM at_version('nowhere', 1)", "topic 'nowhere' does not exist"),
        ("SELECT * FROM at_version('t', -1)", "at_version takes a table_version"),
        ("SELECT * FROM at_version('t')", "time travel takes a topic's name in quotes and a table_version"),
        ("SELECT * FROM at_version(t, 1)", "time travel takes a topic"),
        ("SELECT * FROM at_time('t', 'yesterday')", "'yesterday' is not a time such as 2026-01-01T00:00:00Z"),
        ("SELECT * FROM at_time('t', 5)", "'5' is not a time"),
    ],
)
def test_a_time_that_never_was_is_an_error(cursor: adbc.Cursor, sql: str, message: str) -> None:
    run(cursor, "CREATE TABLE t (a BIGINT)")
    with pytest.raises(adbc.ProgrammingError, match=message):
        run(cursor, sql)


# Sessions


def test_a_session_has_a_catalog_and_a_schema(server: ServerProcess, client: flight.FlightClient) -> None:
    put(client, "t", SEED)
    with adbc.connect(server.uri, db_kwargs=COOKIES, autocommit=True) as connection, connection.cursor() as cursor:
        assert (connection.adbc_current_catalog, connection.adbc_current_db_schema) == ("oplog", "public")
        connection.adbc_current_db_schema = "log"
        assert connection.adbc_current_db_schema == "log"
        assert run(cursor, "SELECT _offset, name FROM t ORDER BY _offset") == [(0, "hello"), (1, "world")]
        connection.adbc_current_db_schema = "public"
        with pytest.raises(adbc.ProgrammingError, match="_offset"):
            run(cursor, "SELECT _offset FROM t")
        connection.adbc_current_catalog = "oplog"
        for name, value in (("schema", "nowhere"), ("catalog", "other"), ("unheard_of", "x"), ("oplog-at-version", "soon")):
            with pytest.raises(adbc.Error, match="Could not set option"):
                connection.adbc_connection.set_options(**{f"adbc.flight.sql.session.option.{name}": value})


def test_a_client_without_cookies_is_told_so(connection: adbc.Connection) -> None:
    with pytest.raises(adbc.ProgrammingError, match=r"set adbc\.flight\.sql\.rpc\.with_cookie_middleware to true"):
        connection.adbc_current_db_schema = "log"


def test_session_options_nobody_sealed_are_refused(server: ServerProcess) -> None:
    body = json.dumps({"kind": "session", "expires": 9e9, "options": {}}).encode()
    forged = base64.urlsafe_b64encode(b"\x01" + bytes(32) + body).decode()
    options = flight.FlightCallOptions(headers=[(b"cookie", f"oplog-options={forged}".encode())])
    with flight.connect(server.uri) as client:
        with pytest.raises(pa.ArrowInvalid, match="the session's options are not readable any more"):
            client.get_flight_info(command(wire.CommandStatementQuery("SELECT 1")), options)
        [answer] = client.do_action(flight.Action("CloseSession", b""), options)
        closed = answer.body.to_pybytes()
        assert wire.decode(closed, wire.CloseSessionResult).status == 1


class Jar(flight.ClientMiddlewareFactory):
    """Brings the cookies it was given, and takes new ones unless told to lose them, as Go's client does now and then."""

    def __init__(self) -> None:
        self.cookies = {"oplog-session": secrets.token_hex(16)}  # the first thing that ADBC is given, and not by an action
        self.loses = False

    def start_call(self, info: Any) -> flight.ClientMiddleware:
        jar = self

        class Cookies(flight.ClientMiddleware):
            def sending_headers(self) -> dict[str, str]:
                return {"cookie": ";".join(f"{name}={value}" for name, value in jar.cookies.items())}

            def received_headers(self, headers: dict[str, list[str]]) -> None:
                if not jar.loses:
                    jar.cookies |= dict(text.split("=", 1) for text in headers.get("set-cookie", []))

        return Cookies()


def set_schema(client: flight.FlightClient, db_schema: str) -> None:
    value = wire.SessionOptionValue(string_value=db_schema)
    answer = act(client, "SetSessionOptions", wire.SetSessionOptionsRequest((wire.SessionOption("schema", value),)), is_sql=False)
    assert wire.decode(answer, wire.SetSessionOptionsResult).errors == ()


def get_schema(client: flight.FlightClient) -> str | None:
    answer = act(client, "GetSessionOptions", wire.GetSessionOptionsRequest(), is_sql=False)
    options = wire.decode(answer, wire.GetSessionOptionsResult).session_options
    [schema] = [option.value for option in options if option.key == "schema"]
    return schema and schema.string_value


def test_options_whose_cookie_the_client_lost_are_given_again(server: ServerProcess, client: flight.FlightClient) -> None:
    put(client, "t", SEED)
    jar = Jar()
    with flight.FlightClient(server.uri, middleware=[jar]) as session, flight.FlightClient(server.uri, middleware=[Jar()]) as other:
        jar.loses = True
        set_schema(session, "log")
        assert jar.cookies.keys() == {"oplog-session"}
        assert (get_schema(session), get_schema(other)) == ("log", "public")
        offset = command(wire.CommandStatementQuery("SELECT _offset FROM t"))
        session.get_flight_info(offset)
        with pytest.raises(pa.ArrowInvalid, match="_offset"):
            other.get_flight_info(offset)
        jar.loses = False
        assert get_schema(session) == "log"
        first = jar.cookies["oplog-options"]
        jar.loses = True
        set_schema(session, "system")
        assert (jar.cookies["oplog-options"], get_schema(session)) == (first, "system")  # the newer one, not the one it has
        act(session, "CloseSession", wire.CloseSessionRequest(), is_sql=False)
        assert get_schema(session) == "public"


def test_newer_options_of_another_server_count(start: Callable[..., ServerProcess]) -> None:
    jar = Jar()
    with flight.FlightClient(start().uri, middleware=[jar]) as here, flight.FlightClient(start().uri, middleware=[jar]) as there:
        jar.loses = True
        set_schema(here, "log")
        assert (get_schema(here), get_schema(there)) == ("log", "public")
        jar.loses = False
        set_schema(there, "system")
        assert get_schema(here) == "system"


# Answers in hand


def plan(client: flight.FlightClient, sql: str, headers: dict[str, str] | None = None) -> flight.FlightInfo:
    options = flight.FlightCallOptions(headers=[(name.encode(), value.encode()) for name, value in (headers or {}).items()])
    return client.get_flight_info(command(wire.CommandStatementQuery(sql)), options)


def in_hand(client: flight.FlightClient, sql: str) -> flight.FlightInfo:
    """Ask until the answer is in hand: then the ticket is that of before."""
    infos = [plan(client, sql)]
    for _ in range(4):
        fetch(client, infos[-1])
        infos.append(plan(client, sql))
    assert infos[-1].endpoints == infos[-2].endpoints
    assert infos[0].endpoints != infos[1].endpoints
    return infos[-1]


@pytest.mark.parametrize("sql", ["SELECT 1 AS n", "SELECT count(*) AS n FROM t", "SELECT max(id) AS n FROM t WHERE id < 2"])
def test_what_is_asked_again_is_answered_at_once(server: ServerProcess, client: flight.FlightClient, cursor: adbc.Cursor, sql: str) -> None:
    run(cursor, "CREATE TABLE t AS SELECT 1 AS id")
    info = in_hand(client, sql) if "WHERE" not in sql else plan(client, sql)  # that one is too quick to be kept
    assert fetch(client, info) == [{"n": 1}]
    assert info.schema == plan(client, sql).schema == client.get_schema(command(wire.CommandStatementQuery(sql))).schema
    asked = run(cursor, f"SELECT status, rows FROM system.queries WHERE sql = '{sql}'")
    assert len(asked) == (5 if "WHERE" not in sql else 1)
    assert {*asked} == {("done", 1)}
    run(cursor, "INSERT INTO t VALUES (2)")
    later = plan(client, sql)
    assert later.endpoints != info.endpoints
    assert fetch(client, later) == [{"n": 2 if "count" in sql else 1}]
    assert fetch(client, info) == [{"n": 1}], "a ticket is of the log as it was"


def test_answers_in_hand_are_of_now_and_of_no_session(server: ServerProcess, client: flight.FlightClient, cursor: adbc.Cursor) -> None:
    run(cursor, "CREATE TABLE t AS SELECT 1 AS id")
    run(cursor, "INSERT INTO t VALUES (2)")
    sql = "SELECT count(*) AS n FROM t"
    info = in_hand(client, sql)
    assert fetch(client, plan(client, sql, {"oplog-at-version": "1"})) == [{"n": 1}]
    jar = Jar()
    with flight.FlightClient(server.uri, middleware=[jar]) as session:
        assert plan(session, sql).endpoints == info.endpoints
        set_schema(session, "log")
        assert plan(session, sql).endpoints != info.endpoints
    with pytest.raises(pa.ArrowInvalid, match="the statement cannot be followed"):
        client.get_flight_info(command(wire.CommandStatementQuery(sql)), flight.FlightCallOptions(headers=[(b"oplog-follow", b"true")]))


def test_an_answer_in_hand_is_not_cancelled_and_lasts_as_long_as_a_ticket(start: Callable[..., ServerProcess]) -> None:
    server = start("--ticket-seconds-max", "1")
    with flight.connect(server.uri) as client:
        info = in_hand(client, "SELECT 1 AS n")
        assert cancel(client, info) == 3
        assert fetch(client, info) == [{"n": 1}]
        time.sleep(0.2)
        assert plan(client, "SELECT 1 AS n").endpoints != info.endpoints, "tickets given out again have most of their time left"
        time.sleep(1)
        with pytest.raises(KeyError, match="the statement handle has expired"):
            fetch(client, info)


# Stopping, and taking turns


def cancel(client: flight.FlightClient, info: flight.FlightInfo) -> int:
    request = wire.CancelFlightInfoRequest(wire.decode(info.serialize(), wire.FlightInfo))
    return wire.decode(act(client, "CancelFlightInfo", request, is_sql=False), wire.CancelFlightInfoResult).status


def read_elsewhere(server: ServerProcess, info: flight.FlightInfo) -> tuple[threading.Thread, list[object]]:
    """Read with another client: an answer of CANCELLED makes a pyarrow client interrupt its process's main thread."""
    outcome: list[object] = []

    def read() -> None:
        with adbc.connect(server.uri, autocommit=True) as connection, connection.cursor() as cursor:
            try:
                cursor.adbc_read_partition(info.serialize())
                outcome.append(cursor.fetchall())
            except adbc.Error as error:
                outcome.append(str(error))

    thread = threading.Thread(target=read)
    thread.start()
    return thread, outcome


@pytest.mark.parametrize("is_old_action", [False, True])
def test_a_running_query_is_cancelled_within_a_second(server: ServerProcess, client: flight.FlightClient, is_old_action: bool) -> None:
    info = client.get_flight_info(command(wire.CommandStatementQuery(ENDLESS)))
    thread, outcome = read_elsewhere(server, info)
    before = server.cpu_seconds()
    assert eventually(lambda: server.cpu_seconds() > before + 0.5, 20)
    began = time.monotonic()
    if is_old_action:
        answer = wire.unpack(act(client, "CancelQuery", wire.ActionCancelQueryRequest(info.serialize())))
        assert answer == wire.ActionCancelQueryResult(1)
    else:
        assert cancel(client, info) == 1
    thread.join(5)
    assert time.monotonic() - began < 1
    assert "the query was stopped" in str(outcome[0])
    assert cancel(client, info) == 3  # it has ended


def test_a_query_cancelled_before_it_begins_does_not_begin(server: ServerProcess, client: flight.FlightClient) -> None:
    info = client.get_flight_info(command(wire.CommandStatementQuery("SELECT 1 AS a")))
    assert cancel(client, info) == 2
    thread, outcome = read_elsewhere(server, info)
    thread.join(5)
    assert "the query was cancelled" in str(outcome[0])
    with pytest.raises(pa.ArrowInvalid, match="the FlightInfo to cancel has no ticket"):
        act(client, "CancelFlightInfo", wire.CancelFlightInfoRequest(wire.FlightInfo()), is_sql=False)
    for handle in (b"", b"\x03" + bytes(60)):
        ticket = wire.Ticket(wire.pack(wire.TicketStatementQuery(handle)))
        with pytest.raises(pa.ArrowInvalid, match="was not made by a server of this log for you, or was altered"):
            act(client, "CancelFlightInfo", wire.CancelFlightInfoRequest(wire.FlightInfo(endpoint=(wire.FlightEndpoint(ticket),))), False)


def test_statements_take_turns_and_one_too_many_is_refused(start: Callable[..., ServerProcess]) -> None:
    server = start("--statements-max", "1", "--statements-waiting-max", "1", "--statement-wait-seconds-max", "2")
    with flight.connect(server.uri) as client:
        running, waiting, refused = (client.get_flight_info(command(wire.CommandStatementQuery(ENDLESS))) for _ in range(3))
        first, _ = read_elsewhere(server, running)
        time.sleep(0.5)
        second, late = read_elsewhere(server, waiting)
        time.sleep(0.5)
        third, outcome = read_elsewhere(server, refused)
        third.join(5)
        assert "statements_max (1) statements run and 1 wait; nothing was done; try again" in str(outcome[0])
        second.join(5)
        assert "statements_max (1) statements have run for 2 seconds; nothing was done; try again" in str(late[0])
        assert cancel(client, running) == 1
        first.join(5)
        turn = client.get_flight_info(command(wire.CommandStatementQuery("SELECT 1 AS a")))
        assert fetch(client, turn) == [{"a": 1}]


def test_who_does_not_read_gives_its_turn_away(start: Callable[..., ServerProcess]) -> None:
    server = start("--statements-max", "1")
    with flight.connect(server.uri) as client:
        put(client, "t", pa.record_batch({"s": ["x" * 1000] * 100_000}))
        lazy = client.do_get(
            client.get_flight_info(command(wire.CommandStatementQuery("SELECT * FROM t, generate_series(1, 20)"))).endpoints[0].ticket
        )
        lazy.read_chunk()
        assert fetch(client, client.get_flight_info(command(wire.CommandStatementQuery("SELECT 1 AS a")))) == [{"a": 1}]
        assert sum(chunk.data.num_rows for chunk in lazy) > 1_000_000  # it goes on where it was


def test_cancelling_ends_every_reader_of_a_ticket(server: ServerProcess, client: flight.FlightClient) -> None:
    info = client.get_flight_info(command(wire.CommandStatementQuery(ENDLESS)))
    readers = [read_elsewhere(server, info) for _ in range(2)]
    time.sleep(1)
    assert cancel(client, info) == 1
    for thread, outcome in readers:
        thread.join(5)
        assert "the query was stopped" in str(outcome[0])


def test_a_time_whose_entries_are_gone_is_an_error(start: Callable[..., ServerProcess], tmp_path: Path) -> None:
    with OpLog.open(str(tmp_path / "log")) as log:
        log.append("t", pa.record_batch({"a": [1]}))
        time.sleep(0.01)
        then = datetime.datetime.now(datetime.UTC)
        time.sleep(0.01)
        for _ in range(3):
            log.append("t", pa.record_batch({"a": [1]}))
        assert log.snapshot_as_of(then).topic("t").entries == 1
        DeltaTable(log.config.data).create_checkpoint()
        for version in range(3):
            (tmp_path / "log" / "_delta_log" / f"{version:020}.json").unlink()
        with pytest.raises(NotFound, match="can no longer be read"):
            log.snapshot_as_of(then)
        with pytest.raises(NotFound, match="can no longer be read"):
            log.snapshot_as_of(then - datetime.timedelta(days=400))


REFUSED = [
    ("BeginSavepoint", wire.ActionBeginSavepointRequest(b"t", "s"), "savepoints are not served"),
    ("EndSavepoint", wire.ActionEndSavepointRequest(b"s", 1), "savepoints are not served"),
    (
        "CreatePreparedSubstraitPlan",
        wire.ActionCreatePreparedSubstraitPlanRequest(),
        "Substrait plans are not served: send it as SQL",
    ),
]


@pytest.mark.parametrize(("kind", "message", "sentence"), REFUSED)
def test_what_is_not_served_says_so_in_one_sentence(client: flight.FlightClient, kind: str, message: object, sentence: str) -> None:
    with pytest.raises(NotImplementedError, match=sentence):
        act(client, kind, message)
    with pytest.raises(NotImplementedError, match="Substrait plans are not served"):
        client.get_flight_info(command(wire.CommandStatementSubstraitPlan(wire.SubstraitPlan(b"p", "1"))))
