"""A real server process and real clients: streams in, results out, errors, limits, shutdown."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adbc_driver_flightsql.dbapi as adbc
import adbc_driver_manager
import pyarrow as pa
import pytest
from conftest import SEED, ServerProcess, ask, eventually, put
from pyarrow import flight

from flight_oplog import Config, OpLog
from flight_oplog.auth import Gate
from flight_oplog.calls import Call, Calls, rpc, streamed
from flight_oplog.client import Client
from flight_oplog.errors import RequestError
from flight_oplog.flightsql import wire
from flight_oplog.follow import CHECK_SECONDS
from flight_oplog.server import Server

Start = Callable[..., ServerProcess]
path = flight.FlightDescriptor.for_path
command = flight.FlightDescriptor.for_command


def message(error: BaseException) -> str:
    """What the server said, without what pyarrow adds."""
    return str(error.args[0]).split(". Detail: ")[0].split(". gRPC client debug")[0]


@contextlib.contextmanager
def refused(kind: type[BaseException], expected: str) -> Iterator[None]:
    """The block fails with this class and sentence, and shows nothing of the server's inside."""
    with pytest.raises(kind) as caught:
        yield
    assert message(caught.value) == expected
    for secret in ("Traceback", ".py", "/tmp", "line "):
        assert secret not in str(caught.value)


# Streaming in


def receipt(first_offset: int, entries: int, table_version: int) -> dict[str, Any]:
    """What the server answers an append to `t` that names no producer."""
    return {
        "topic": "t",
        "first_offset": first_offset,
        "entries": entries,
        "table_version": table_version,
        "sequence": None,
        "duplicate": False,
    }


def test_one_stream_of_many_batches_is_one_append(client: flight.FlightClient, connection: adbc.Connection) -> None:
    sizes = ((0, 1), (1, 999), (1000, 0), (1000, 100_000))
    batches = [pa.record_batch({"n": pa.array(range(start, start + size), pa.int64())}) for start, size in sizes]
    assert put(client, "t", *batches) == receipt(0, 101_000, 1)
    assert ask(connection, "SELECT count(*) AS n, sum(n) AS s FROM t") == [{"n": 101_000, "s": 101_000 * 100_999 // 2}]


def test_a_batch_of_a_million_rows_and_a_stream_of_no_batches(client: flight.FlightClient, connection: adbc.Connection) -> None:
    schema = pa.schema([("n", pa.int64())])
    assert put(client, "t", schema=schema) == receipt(0, 0, 1)
    assert put(client, "t", pa.record_batch({"n": pa.array(range(1_000_000))}))["entries"] == 1_000_000
    assert ask(connection, "SELECT max(n) AS m, count(*) AS n FROM t") == [{"m": 999_999, "n": 1_000_000}]


def test_a_client_that_wants_no_receipt_knows_by_the_close(client: flight.FlightClient, connection: adbc.Connection) -> None:
    writer, acks = client.do_put(path("events"), SEED.schema)
    writer.write_batch(SEED)
    writer.done_writing()
    assert acks.read() is None
    writer.close()
    assert ask(connection, "SELECT * FROM events") == SEED.to_pylist()


def test_a_client_that_breaks_off_leaves_nothing(client: flight.FlightClient, connection: adbc.Connection, server: ServerProcess) -> None:
    put(client, "events", SEED)
    script = f"""
import os, sys, pyarrow as pa, pyarrow.flight as flight
batch = pa.record_batch({{"name": ["x" * 1000] * 1000, "node_id": ["y"] * 1000}})
writer, _ = flight.connect({server.uri!r}).do_put(flight.FlightDescriptor.for_path("events"), batch.schema)
for _ in range(60):
    writer.write_batch(batch)
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert eventually(lambda: len(list((server.folder / "topic=events").glob("*.parquet"))) == 1)
    assert ask(connection, "SELECT count(*) AS n FROM events") == [{"n": 2}]
    assert put(client, "events", SEED)["first_offset"] == 2


def test_a_client_whose_source_fails_midway_leaves_nothing(server: ServerProcess, connection: adbc.Connection) -> None:
    """pyarrow ends every stream in good order, so its user says when an append is complete: oplog-commit: explicit."""

    def failing() -> Iterator[pa.RecordBatch]:
        yield SEED
        raise ValueError("the source broke")

    with Client(server.uri) as ours:
        assert ours.append("events", SEED.schema, [SEED]).entries == 2
        with pytest.raises(ValueError, match="the source broke"):
            ours.append("events", SEED.schema, failing())
        assert [(batch.num_rows, following) for batch, following in ours.follow("events", follow=False)] == [(2, 2)]
        assert ours.append("events", SEED.schema, [SEED]).first_offset == 2
    assert ask(connection, "SELECT count(*) AS n FROM events") == [{"n": 4}]


def test_even_a_panic_in_rust_leaves_as_one_clear_sentence() -> None:
    class PanicException(BaseException):  # as pyo3's: no Exception, so that nobody catches it by accident
        pass

    def panic(*arguments: Any) -> None:
        raise PanicException("index out of bounds at src/lib.rs:7")

    class Context:
        def get_middleware(self, name: str) -> Call:
            return call

    call = Call(Calls(Gate(Config(), b"secret"), Config()), flight.FlightMethod.DO_GET, {})

    with pytest.raises(flight.FlightInternalError, match=r"internal error [0-9a-f]{8}; the server's log says more") as caught:
        rpc(panic)(None, Context())
    assert "lib.rs" not in str(caught.value)
    with pytest.raises(flight.FlightInternalError):
        list(streamed((panic() for _ in range(1)), threading.Event(), call))


def test_what_was_sent_comes_back_by_plain_ticket_in_offset_order(client: flight.FlightClient) -> None:
    for start in range(0, 50, 10):
        put(client, "t", pa.record_batch({"n": list(range(start, start + 10))}))
    read = client.do_get(flight.Ticket(json.dumps({"topic": "t"}))).read_all()
    assert read["n"].to_pylist() == list(range(50))
    read = client.do_get(flight.Ticket(json.dumps({"topic": "t", "from": 33}))).read_all()
    assert read["n"].to_pylist() == list(range(33, 50))
    assert client.do_get(flight.Ticket(json.dumps({"topic": "t", "from": 50}))).read_all().num_rows == 0


def test_list_flights_and_path_descriptors_describe_topics(client: flight.FlightClient) -> None:
    put(client, "events", SEED)
    put(client, "other", pa.record_batch({"a": [1]}))
    flights = {info.descriptor.path[0]: info for info in client.list_flights()}
    assert sorted(flights) == [b"events", b"other"]
    assert flights[b"events"].total_records == 2
    info = client.get_flight_info(path("events"))
    assert info.schema == client.get_schema(path("events")).schema == SEED.schema
    [endpoint] = info.endpoints
    assert endpoint.locations == []
    assert client.do_get(endpoint.ticket).read_all().to_pylist() == SEED.to_pylist()


# Flight SQL


def test_a_statement_through_get_flight_info_get_schema_and_do_get(client: flight.FlightClient) -> None:
    put(client, "events", SEED)
    descriptor = command(wire.pack(wire.CommandStatementQuery("SELECT name, count(*) AS n FROM events GROUP BY name ORDER BY name")))
    info = client.get_flight_info(descriptor)
    [endpoint] = info.endpoints
    assert (info.total_records, endpoint.locations) == (-1, [])
    put(client, "events", SEED)  # after planning: must not show
    reader = client.do_get(endpoint.ticket)
    assert reader.schema == info.schema == client.get_schema(descriptor).schema
    assert reader.read_all().to_pylist() == [{"name": "hello", "n": 1}, {"name": "world", "n": 1}]


def test_adbc_sees_catalogs_schemas_tables_and_columns(client: flight.FlightClient, connection: adbc.Connection) -> None:
    put(client, "events", SEED)
    [catalog] = connection.adbc_get_objects(depth="all", db_schema_filter="public").read_all().to_pylist()
    assert catalog["catalog_name"] == "oplog"
    [schema] = catalog["catalog_db_schemas"]
    [table] = schema["db_schema_tables"]
    assert (schema["db_schema_name"], table["table_name"], table["table_type"]) == ("public", "events", "TABLE")
    assert [column["column_name"] for column in table["table_columns"]] == ["name", "node_id"]
    assert connection.adbc_get_table_schema("events") == SEED.schema
    assert connection.adbc_get_table_types() == ["SYSTEM TABLE", "TABLE", "VIEW"]
    assert connection.adbc_get_info()["vendor_name"] == "flight_oplog"


def test_adbc_tells_the_kind_of_an_error(client: flight.FlightClient, connection: adbc.Connection) -> None:
    put(client, "events", SEED)
    with connection.cursor() as cursor:
        with pytest.raises(adbc_driver_manager.ProgrammingError, match="NOT_FOUND"):
            cursor.execute("SELECT * FROM nope")
        with pytest.raises(adbc_driver_manager.ProgrammingError, match="INVALID_ARGUMENT"):
            cursor.execute("SELEC")
        with pytest.raises(adbc_driver_manager.NotSupportedError, match="the log is append-only"):
            cursor.execute("DELETE FROM events")
        cursor.execute("SELECT 1 AS a")
        assert cursor.fetchall() == [(1,)]


# Bad input


def test_bad_descriptors_topics_and_schemas_are_refused_and_the_server_goes_on(client: flight.FlightClient) -> None:
    put(client, "events", SEED)

    def append(descriptor: flight.FlightDescriptor, batch: pa.RecordBatch = SEED) -> None:
        writer, acks = client.do_put(descriptor, batch.schema)
        with writer:
            writer.write_batch(batch)
            writer.done_writing()
            acks.read()

    with refused(pa.ArrowInvalid, "topic '_own' is reserved: names that begin with _ belong to the log itself"):
        append(path("_own"))
    with refused(pa.ArrowInvalid, "topic 'a-b' is not a topic name: a letter, then letters, digits and _, at most 128"):
        append(path("a-b"))
    with refused(pa.ArrowInvalid, "the descriptor's path has 2 parts: send one, the topic"):
        append(path("a", "b"))
    with refused(pa.ArrowInvalid, "the descriptor's path has 0 parts: send one, the topic"):
        append(path())
    with refused(pa.ArrowInvalid, "the descriptor is empty: send a path with one topic"):
        append(command(b""))
    with refused(
        pa.ArrowInvalid,
        "topic 'events': column 'name' is string in the topic and int64 in this append; "
        "the additive rule allows only widening that keeps every value exact; nothing was written",
    ):
        append(path("events"), pa.record_batch({"name": [1]}))
    with refused(pa.ArrowKeyError, "topic 'nope' does not exist; append to it to create it"):
        client.get_flight_info(path("nope"))
    with refused(pa.ArrowKeyError, "topic 'nope' does not exist; append to it to create it"):
        client.get_schema(path("nope"))
    assert put(client, "events", SEED)["first_offset"] == 2
    assert [info.descriptor.path for info in client.list_flights()] == [[b"events"]]


GARBAGE = [
    b"",
    b"x",
    b"\0" * 100,
    b"{",
    b'{"topic": 1}',
    b'{"topic": "t", "from": -1}',
    b"[" * 100_000,
    os.urandom(1000),
    b"\x0a\xff\xff\xff\xff\x0f",
]


@pytest.mark.parametrize("garbage", range(len(GARBAGE)))
def test_garbage_tickets_commands_and_actions_are_refused(client: flight.FlightClient, garbage: int) -> None:
    data = GARBAGE[garbage]
    for call in (
        lambda: client.do_get(flight.Ticket(data)).read_all(),
        lambda: client.get_flight_info(command(data)),
        lambda: client.get_schema(command(data)),
        lambda: list(client.do_action(flight.Action("CreatePreparedStatement", data))),
    ):
        with pytest.raises(pa.ArrowInvalid) as caught:
            call()
        assert "Traceback" not in str(caught.value)


def test_altered_and_unknown_messages_are_refused(client: flight.FlightClient) -> None:
    info = client.get_flight_info(command(wire.pack(wire.CommandStatementQuery("SELECT 1"))))
    ticket = bytearray(info.endpoints[0].ticket.ticket)
    ticket[-3] ^= 1
    with refused(pa.ArrowInvalid, "the statement handle was not made by a server of this log for you, or was altered; ask for a new one"):
        client.do_get(flight.Ticket(bytes(ticket))).read_all()
    other = wire.pack(wire.CommandStatementQuery("")).replace(b"CommandStatementQuery", b"CommandStatementQuory")
    with refused(pa.ArrowNotImplementedError, "the Flight SQL message 'CommandStatementQuory' is not served"):
        client.get_flight_info(command(other))
    with refused(pa.ArrowNotImplementedError, "the action 'NoSuchAction' is not served"):
        list(client.do_action(flight.Action("NoSuchAction", b"")))
    with refused(pa.ArrowNotImplementedError, "CommandStatementQuery is not served here"):
        client.do_get(flight.Ticket(wire.pack(wire.CommandStatementQuery("SELECT 1")))).read_all()


def test_a_batch_one_byte_over_the_limit_is_refused_whole(start: Start) -> None:
    server = start("--batch-bytes-max", "8000", "--append-bytes-max", "16000")
    client = flight.connect(server.uri)
    exact = pa.record_batch({"n": pa.array(range(1000))})
    assert put(client, "t", exact, exact)["entries"] == 2000
    with pytest.raises(pa.ArrowInvalid, match=r"a batch of 8008 bytes is over batch_bytes_max \(8000\)"):
        put(client, "t", exact, pa.record_batch({"n": pa.array(range(1001))}))
    with pytest.raises(pa.ArrowInvalid, match=r"the append is over append_bytes_max \(16000\)"):
        put(client, "t", exact, exact, exact.slice(0, 1))
    assert put(client, "t", exact)["first_offset"] == 2000


def test_a_full_disk_is_unavailable_and_the_server_goes_on(small_disk: Path, start: Start) -> None:
    server = start("--compression", "none", folder=small_disk / "log")
    with flight.connect(server.uri) as client, adbc.connect(server.uri, autocommit=True) as connection:
        put(client, "events", SEED)
        large = pa.record_batch({"name": [os.urandom(500).hex() for _ in range(20_000)]})
        with refused(
            flight.FlightUnavailableError,
            "writing a data file failed: the disk is full; nothing was written; try again when that is mended",
        ):
            put(client, "events", large)
        assert ask(connection, "SELECT count(*) AS n FROM events") == [{"n": 2}]
        assert put(client, "events", SEED)["first_offset"] == 2


def test_one_call_too_many_is_unavailable_and_the_next_ones_are_served(start: Start) -> None:
    server = start("--calls-max", "3")
    client = flight.connect(server.uri)
    endless = command(wire.pack(wire.CommandStatementQuery("SELECT value FROM generate_series(1, 1000000000000)")))
    streams = []
    for _ in range(3):
        stream = client.do_get(client.get_flight_info(endless).endpoints[0].ticket)
        stream.read_chunk()  # it is under way
        streams.append(stream)
    with refused(flight.FlightUnavailableError, "the server is busy: calls_max (3) calls are under way; try again"):
        list(client.list_flights())
    for stream in streams:
        stream.cancel()

    def served() -> bool:
        try:
            return list(client.list_flights()) == []
        except flight.FlightUnavailableError:
            return False

    assert eventually(served)
    for _ in range(10):  # refusals give their place back
        with contextlib.suppress(pa.ArrowKeyError):
            client.get_flight_info(path("nope"))
    assert served()


# Streaming out


def test_a_result_of_gigabytes_neither_waits_nor_grows_the_server(start: Start) -> None:
    server = start()
    client = flight.connect(server.uri)
    payload = pa.array([os.urandom(500).hex() for _ in range(2000)])
    for _ in range(4):
        put(client, "wide", *[pa.record_batch({"payload": payload})] * 20)
    put(client, "factor", pa.record_batch({"n": list(range(33))}))
    sql = "SELECT payload, n FROM factor, wide"  # 160,000 × 33 rows of 1 KB: 5.3 GB
    info = client.get_flight_info(command(wire.pack(wire.CommandStatementQuery(sql))))
    before = server.memory()
    began = time.monotonic()
    reader = client.do_get(info.endpoints[0].ticket)
    size, largest, first = 0, 0, 0.0
    for chunk in reader:
        first = first or time.monotonic() - began
        size += chunk.data.nbytes
        largest = max(largest, chunk.data.nbytes)
    whole = time.monotonic() - began
    assert size > 5_000_000_000
    assert server.memory_peak() - before < 500_000_000
    assert first < whole / 5, "the first batch came before the scan ended"
    assert largest < 4 << 20


def test_a_scan_of_stored_gigabytes_does_not_grow_the_server(start: Start) -> None:
    """1.2 GB of entries through the log's own scan: memory stays with the cache's and the stream's limits."""
    server = start("--cache-bytes-max", str(1 << 27))
    client = flight.connect(server.uri)
    payload = pa.record_batch({"payload": pa.array([os.urandom(100).hex() * 5 for _ in range(2000)])})
    for _ in range(6):
        put(client, "wide", *[payload] * 100)
    before = server.memory()
    info = client.get_flight_info(command(wire.pack(wire.CommandStatementQuery("SELECT * FROM wide"))))
    size = sum(chunk.data.nbytes for chunk in client.do_get(info.endpoints[0].ticket))
    assert size > 1_200_000_000
    assert server.memory_peak() - before < 500_000_000


ENDLESS = "SELECT sum(value % 7) AS n FROM generate_series(1, 1000000000000)"


def test_work_stops_when_the_client_goes_away(client: flight.FlightClient, server: ServerProcess) -> None:
    script = f"""
import adbc_driver_flightsql.dbapi as adbc
with adbc.connect({server.uri!r}, autocommit=True) as connection, connection.cursor() as cursor:
    cursor.execute({ENDLESS!r})
    cursor.fetchall()
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    began = server.cpu_seconds()
    assert eventually(lambda: server.cpu_seconds() > began + 0.5, 30), "the query runs"
    process.kill()
    process.wait()

    def idle() -> bool:
        before = server.cpu_seconds()
        time.sleep(0.5)
        return server.cpu_seconds() - before < 0.1

    assert eventually(idle, 5)
    assert list(client.list_flights()) == []


def test_work_stops_when_the_client_cancels(connection: adbc.Connection, server: ServerProcess) -> None:
    began = server.cpu_seconds()
    cursor = connection.cursor()
    cancel = threading.Timer(1.0, cursor.adbc_cancel)
    cancel.start()
    with pytest.raises(adbc_driver_manager.OperationalError, match=r"(?i)cancel"):
        cursor.execute(ENDLESS)
        cursor.fetchall()
    cursor.close()
    assert server.cpu_seconds() > began + 0.2
    time.sleep(0.5)
    before = server.cpu_seconds()
    time.sleep(0.5)
    assert server.cpu_seconds() - before < 0.1


def test_a_query_that_never_pauses_does_not_hold_up_others(connection: adbc.Connection, server: ServerProcess) -> None:
    """DataFusion cannot stop a nested-loop join in its inner loop; more such queries than cores must not matter."""
    join = "SELECT count(*) FROM generate_series(1, 3000000) AS a, generate_series(1, 3000000) AS b WHERE a.value * b.value % 7 = 11"
    for _ in range((os.cpu_count() or 1) + 1):
        stuck = adbc.connect(server.uri, autocommit=True)
        cursor = stuck.cursor()
        threading.Timer(2.0, cursor.adbc_cancel).start()
        with contextlib.suppress(adbc_driver_manager.Error):
            cursor.execute(join)
            cursor.fetchall()
        cursor.close()
        stuck.close()
    assert ask(connection, "SELECT 1 AS a") == [{"a": 1}]


# Starting and stopping


_FOLLOWS = """
import sys
from pyarrow import flight
reader = flight.connect(sys.argv[1]).do_get(flight.Ticket(b'{"topic": "events", "follow": true}'))
print(reader.read_chunk(), flush=True)
reader.read_chunk()
"""
_ASKS = """
import sys
import adbc_driver_flightsql.dbapi as adbc
cursor = adbc.connect(sys.argv[1], autocommit=True).cursor()
print("asks", flush=True)
cursor.execute(sys.argv[2])
cursor.fetchall()
"""
_STALLS = """
import sys, time
import adbc_driver_flightsql.dbapi as adbc
cursor = adbc.connect(sys.argv[1], autocommit=True).cursor()
cursor.execute(sys.argv[2])
print(cursor.fetchone(), flush=True)
time.sleep(100)
"""
_A, _B = (f"generate_series(1, 3000000) AS {name}" for name in "ab")


def test_sigterm_lets_the_append_under_way_finish_and_takes_no_new_call(start: Start) -> None:
    server = start()
    client = flight.connect(server.uri)
    options = flight.FlightCallOptions(headers=[(b"oplog-acks", b"true")])
    writer, acks = client.do_put(path("events"), SEED.schema, options)
    writer.write_batch(SEED)
    time.sleep(1.0)
    server.process.send_signal(signal.SIGTERM)

    def refuses() -> bool:
        try:
            list(flight.connect(server.uri).list_flights())
        except flight.FlightUnavailableError:
            return True
        except KeyboardInterrupt:  # pyarrow's word for CANCELLED, which gRPC says to a call that comes just as it begins to shut down
            return False
        return False

    assert eventually(refuses)
    writer.write_batch(SEED)
    writer.done_writing()
    assert json.loads(acks.read().to_pybytes())["entries"] == 4
    writer.close()
    assert server.process.wait(10) == 0
    with OpLog.open(str(server.folder)) as log:
        assert log.snapshot().topic("events").entries == 4


def test_a_stalled_client_cannot_stop_the_shutdown(start: Start) -> None:
    server = start("--drain-seconds-max", "1")
    client = flight.connect(server.uri)
    writer, _ = client.do_put(path("events"), SEED.schema)
    writer.write_batch(SEED)
    time.sleep(1.0)
    assert server.stop(seconds=10) == 0
    assert "stopped before every call had ended; nothing acknowledged was lost" in server.errors.read_text()
    with OpLog.open(str(server.folder)) as log:
        assert log.topics() == []


@pytest.mark.parametrize(
    ("does", "sql"),
    [
        (_FOLLOWS, ""),
        (_ASKS, f"SELECT count(*) FROM {_A}, {_B} WHERE a.value * b.value % 7 = 11"),
        (_ASKS, f"SELECT a.value FROM {_A}, {_B}"),
        (_STALLS, "SELECT * FROM large"),
    ],
    ids=["a follower", "a query", "a query that streams", "a read that it did not take"],
)
def test_nobody_waits_for_a_client_that_has_gone(start: Start, does: str, sql: str) -> None:
    server = start()
    with flight.connect(server.uri) as client:
        put(client, "events", SEED)
        for number in range(4):
            put(client, "large", pa.record_batch({"n": pa.array([number] * 2_000_000, pa.int64())}))
    with subprocess.Popen([sys.executable, "-c", does, server.uri, sql], stdout=subprocess.PIPE, text=True) as gone:
        assert gone.stdout is not None
        assert gone.stdout.readline()
        time.sleep(1.0)
        gone.kill()
    time.sleep(0.5)
    assert server.stop(seconds=10) == 0
    assert "stopped before every call had ended" not in server.errors.read_text()


def test_the_call_of_a_follower_that_has_gone_ends(start: Start) -> None:
    server = start("--calls-max", "1")
    with flight.connect(server.uri) as client:
        put(client, "events", SEED)
        with subprocess.Popen([sys.executable, "-c", _FOLLOWS, server.uri], stdout=subprocess.PIPE, text=True) as gone:
            assert gone.stdout is not None
            assert gone.stdout.readline()
            with pytest.raises(flight.FlightUnavailableError, match="calls_max"):
                list(client.list_flights())
            gone.kill()

        def is_free() -> bool:
            with contextlib.suppress(flight.FlightUnavailableError):
                return len(list(client.list_flights())) == 1
            return False

        assert eventually(is_free, 2 * CHECK_SECONDS + 2), "long before a keep-alive would tell that nobody is there"


def test_a_second_signal_ends_at_once(start: Start) -> None:
    server = start()
    client = flight.connect(server.uri)
    put(client, "events", SEED)
    writer, _ = client.do_put(path("events"), SEED.schema)
    writer.write_batch(SEED)
    time.sleep(1.0)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.7)
    assert server.process.poll() is None, "it waits for the open append"
    assert server.stop(signal.SIGTERM, seconds=3) == 128 + signal.SIGTERM


def test_acknowledged_appends_survive_sigkill(start: Start) -> None:
    server = start()
    client = flight.connect(server.uri)
    receipts = [put(client, "events", SEED) for _ in range(20)]
    server.stop(signal.SIGKILL)
    with OpLog.open(str(server.folder)) as log:
        assert log.snapshot().topic("events").next_offset == receipts[-1]["first_offset"] + 2 == 40


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "flight_oplog", *flags], capture_output=True, text=True, timeout=60, check=False)


def test_a_port_in_use_is_said_in_one_line(server: ServerProcess, tmp_path: Path) -> None:
    uri = server.uri
    done = run("serve", "--data", str(tmp_path / "second"), "--listen", uri)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr.splitlines()[-1]
        == f"flight-oplog: error: cannot listen on {uri}: the address is in use or is not one of this machine's"
    )


@pytest.mark.parametrize("listen", ["127.0.0.1:1", "grpc://127.0.0.1", "http://127.0.0.1:1", "grpc://127.0.0.1:99999", "grpc://a b:1"])
def test_a_malformed_address_is_refused(tmp_path: Path, listen: str) -> None:
    with OpLog.open(str(tmp_path / "log")) as log, pytest.raises(RequestError) as caught:
        Server(log, Config(listen=listen))
    assert str(caught.value) == f"setting listen: {listen!r} is not of the form grpc://host:port or grpc+tls://host:port"


def test_nothing_listens_beyond_loopback_unless_told_to(tmp_path: Path) -> None:
    with OpLog.open(str(tmp_path / "log")) as log:
        for listen in ("grpc://0.0.0.0:0", "grpc://[::]:0", "grpc://example.com:0"):
            with pytest.raises(
                RequestError, match="is reachable from other machines and there is no authentication and no TLS; add --insecure"
            ):
                Server(log, Config(listen=listen))
        server = Server(log, Config(listen="grpc://0.0.0.0:0", insecure=True))
        with socket.create_connection(("127.0.0.1", server.port), 5):
            pass
        assert server.drain(5)


def test_two_servers_on_one_folder_see_each_others_appends(start: Start, tmp_path: Path) -> None:
    one, two = start(), start()
    first, second = flight.connect(one.uri), flight.connect(two.uri)
    assert put(first, "events", SEED)["first_offset"] == 0
    assert put(second, "events", SEED)["first_offset"] == 2
    assert put(first, "events", SEED)["first_offset"] == 4
    for server in (one, two):
        with adbc.connect(server.uri, autocommit=True) as connection:
            assert ask(connection, "SELECT count(*) AS n FROM events") == [{"n": 6}]
