"""Reading a topic as it grows: by plain ticket and by SQL, resumed at every place, by slow and by idle followers."""

import contextlib
import json
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adbc_driver_flightsql.dbapi as adbc
import pyarrow as pa
import pytest
from conftest import ServerProcess, eventually, put
from pyarrow import flight
from test_server import message, refused

from flight_oplog import Config, OpLog
from flight_oplog.errors import NotFound, RequestError
from flight_oplog.flightsql import wire
from flight_oplog.follow import CHECK_SECONDS, Follower, TopicRead, _check_there
from flight_oplog.reader import Reader
from flight_oplog.sql.engine import Engine
from flight_oplog.topics import Topic


def batch(*marks: int) -> pa.RecordBatch:
    return pa.record_batch({"mark": pa.array(marks, pa.int64()), "text": pa.array([f"entry {mark}" for mark in marks], pa.string())})


def ticket(**words: Any) -> flight.Ticket:
    return flight.Ticket(json.dumps(words).encode())


Pieces = list[tuple[list[int], int | None]]


def pieces(reader: Iterator[Any]) -> Iterator[tuple[list[int], int | None]]:
    """Yield the marks of each batch, and the offset it says comes next."""
    for chunk in reader:
        words = json.loads(chunk.app_metadata.to_pybytes()) if chunk.app_metadata is not None and chunk.app_metadata.size else {}
        yield chunk.data.column(0).to_pylist(), words.get("next_offset")


class Tail:
    """A follower in a thread of its own."""

    def __init__(self, reader: flight.FlightStreamReader) -> None:
        self.found: Pieces = []
        self.error: BaseException | None = None
        self._reader = reader
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for piece in pieces(self._reader):
                self.found.append(piece)
        except (pa.ArrowException, OSError, KeyboardInterrupt) as error:
            self.error = error

    @property
    def marks(self) -> list[int]:
        return [mark for marks, _ in list(self.found) for mark in marks]

    def stop(self) -> None:
        with contextlib.suppress(pa.ArrowException, OSError):
            self._reader.cancel()
        self._thread.join(10)
        assert not self._thread.is_alive()


def test_a_ticket_reads_what_is_there_and_says_what_comes_next(client: flight.FlightClient) -> None:
    for start in (0, 3, 6):
        put(client, "t", batch(start, start + 1, start + 2))
    assert list(pieces(client.do_get(ticket(topic="t")))) == [([0, 1, 2], 3), ([3, 4, 5], 6), ([6, 7, 8], 9)]
    assert list(pieces(client.do_get(ticket(topic="t", **{"from": 5})))) == [([5], 6), ([6, 7, 8], 9)]
    assert list(pieces(client.do_get(ticket(topic="t", **{"from": "latest"})))) == []
    found = list(pieces(client.do_get(ticket(topic="t", columns=["mark"], where="mark % 2 = 1 OR text = 'entry 8'"))))
    assert found == [([1, 3, 5, 7, 8], 9)]


def test_a_follower_gets_each_commit_as_it_lands(client: flight.FlightClient) -> None:
    put(client, "t", batch(0, 1))
    tail = Tail(client.do_get(ticket(topic="t", follow=True)))
    late = Tail(client.do_get(ticket(topic="t", follow=True, **{"from": "latest"})))
    some = Tail(client.do_get(ticket(topic="t", follow=True, columns=["mark"], where="mark >= 4")))
    assert eventually(lambda: tail.found == [([0, 1], 2)])
    for mark in (2, 4, 6):
        put(client, "t", batch(mark, mark + 1))
        assert eventually(lambda end=mark + 1: tail.marks[-1] == end, 5), "it comes by itself"
    assert tail.found[1:] == [([2, 3], 4), ([4, 5], 6), ([6, 7], 8)]
    assert eventually(lambda: late.marks == [2, 3, 4, 5, 6, 7])
    assert eventually(lambda: [piece for piece in some.found if piece[0]] == [([4, 5], 6), ([6, 7], 8)])
    for one in (tail, late, some):
        one.stop()


def test_a_select_is_followed_by_a_header(client: flight.FlightClient, server: ServerProcess) -> None:
    put(client, "t", batch(0, 1, 2))
    sql = "SELECT mark * 10 AS tenfold, upper(text) FROM t WHERE mark <> 1"
    options = flight.FlightCallOptions(headers=[(b"oplog-follow", b"true"), (b"oplog-from", b"1")])
    info = client.get_flight_info(flight.FlightDescriptor.for_command(wire.pack(wire.CommandStatementQuery(sql))), options)
    tail = Tail(client.do_get(info.endpoints[0].ticket))
    assert eventually(lambda: tail.found == [([20], 3)])
    put(client, "t", batch(3))
    assert eventually(lambda: tail.found == [([20], 3), ([30], 4)])
    tail.stop()
    with adbc.connect(server.uri, autocommit=True) as connection, connection.cursor() as cursor:
        cursor.adbc_statement.set_options(**{"adbc.flight.sql.rpc.call_header.oplog-follow": "true"})
        cursor.execute(sql)
        reader = cursor.fetch_record_batch()
        assert reader.read_next_batch().column(0).to_pylist() == [0, 20, 30]
        put(client, "t", batch(7))
        assert reader.read_next_batch().column(0).to_pylist() == [70]
        cursor.adbc_cancel()


REFUSED = {
    "SELECT count(*) FROM t": "Aggregate needs more than one entry at a time; use columns and WHERE alone",
    "SELECT mark FROM t ORDER BY mark": "Sort needs more than one entry at a time; use columns and WHERE alone",
    "SELECT mark FROM t LIMIT 3": "Limit needs more than one entry at a time; use columns and WHERE alone",
    "SELECT DISTINCT mark FROM t": "Distinct needs more than one entry at a time; use columns and WHERE alone",
    "SELECT row_number() OVER () FROM t": "WindowExpr needs more than one entry at a time; use columns and WHERE alone",
    "SELECT a.mark FROM t a JOIN t b ON a.mark = b.mark": "Join needs more than one entry at a time; use columns and WHERE alone",
    "SELECT mark FROM t UNION ALL SELECT 1": "Union needs more than one entry at a time; use columns and WHERE alone",
    "SELECT mark FROM t WHERE mark IN (SELECT mark FROM t)": "it has to read one topic, once",
    "SELECT (SELECT max(mark) FROM t) FROM t": "it has to read one topic, once",
    "SELECT 1": "it has to read one topic, once",
    "SELECT * FROM system.topics": "system.topics is no topic's entries",
    "SELECT first_offset FROM records.t": "records.t is no topic's entries",
}


@pytest.mark.parametrize("sql", REFUSED)
def test_a_statement_that_cannot_be_followed_says_why(log: OpLog, engine: Engine, sql: str) -> None:
    log.append("t", batch(0))
    with pytest.raises(RequestError) as caught:
        engine.prepare_run(sql, log.snapshot())
    assert str(caught.value).startswith("the statement cannot be followed: ")
    assert str(caught.value).endswith(REFUSED[sql])


@pytest.mark.parametrize("where", ["1 = 1) UNION SELECT * FROM t WHERE (1 = 1", "mark IN (SELECT mark FROM t)", "count(*) > 1", "true) --"])
def test_a_condition_stays_one(client: flight.FlightClient, where: str) -> None:
    put(client, "t", batch(0))
    with pytest.raises(pa.ArrowInvalid):
        list(pieces(client.do_get(ticket(topic="t", where=where))))


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"topic": "t", "from": -1},
        {"topic": "t", "from": "now"},
        {"topic": "t", "from": True},
        {"topic": "t", "follow": 1},
        {"topic": "t", "columns": []},
        {"topic": "t", "columns": [1]},
        {"topic": "t", "where": 1},
        {"topic": "t", "more": 1},
        {"topic": "../t"},
    ],
)
def test_tickets_that_say_something_else_are_refused(client: flight.FlightClient, words: dict[str, Any]) -> None:
    with pytest.raises(pa.ArrowInvalid, match="the ticket is not of the form"):
        client.do_get(ticket(**words)).read_all()
    with pytest.raises(pa.ArrowInvalid, match="the ticket is not of the form"):
        client.get_flight_info(flight.FlightDescriptor.for_command(json.dumps(words).encode()))


def test_flight_info_gives_a_topics_ticket_its_schema(client: flight.FlightClient) -> None:
    put(client, "t", batch(0))
    words = json.dumps({"topic": "t", "columns": ["text"]}).encode()
    info = client.get_flight_info(flight.FlightDescriptor.for_command(words))
    assert (info.schema, info.endpoints[0].ticket.ticket) == (pa.schema([("text", pa.string())]), words)
    assert client.get_schema(flight.FlightDescriptor.for_command(words)).schema == info.schema
    assert client.do_get(info.endpoints[0].ticket).read_all().to_pydict() == {"text": ["entry 0"]}


def test_a_place_that_is_not_there_is_refused(client: flight.FlightClient) -> None:
    put(client, "t", batch(0, 1))
    with refused(pa.ArrowInvalid, "topic 't' ends at offset 2; offset 3 is not there yet"):
        client.do_get(ticket(topic="t", **{"from": 3}))
    with pytest.raises(NotFound, match=r"^topic 't': offset 4 has been removed; the first one left is 5$"):
        file: Any = type("File", (), {"first_offset": 5})
        _check_there(Topic("t", pa.schema([]), {}, (file,), 9), 4)


def test_a_consumer_that_comes_back_misses_and_repeats_nothing(start: Callable[..., ServerProcess]) -> None:
    """It breaks off at random, also while servers are killed, and reads at either of two servers."""
    chance = random.Random(5)
    servers = [start("--record-entries-max", "50"), start()]
    total = 2000

    def produce() -> None:
        mark = 0
        while mark < total:
            time.sleep(0.03)  # slower than the consumer, so that it waits as well as catches up
            step = min(total - mark, chance.choice([1, 7, 60]))
            with contextlib.suppress(pa.ArrowException), flight.connect(servers[1].uri) as client:
                expected = [(b"oplog-expected-offset", str(mark).encode())]
                writer, _ = client.do_put(flight.FlightDescriptor.for_path("t"), batch().schema, flight.FlightCallOptions(headers=expected))
                writer.write_batch(batch(*range(mark, mark + step)))
                writer.close()
                mark += step

    with flight.connect(servers[1].uri) as client:
        put(client, "t", batch().slice(0, 0))
    producer = threading.Thread(target=produce)
    producer.start()
    marks: list[int] = []
    place, rounds = 0, 0
    while place < total:
        rounds += 1
        asked = {"columns": ["mark"], "where": "mark % 3 <> 0"} if rounds % 2 else {}
        with contextlib.suppress(pa.ArrowException, OSError), flight.connect(servers[rounds % 2].uri) as client:
            reader = client.do_get(ticket(topic="t", follow=True, **{"from": place}, **asked))
            for found, following in pieces(reader):
                kept = [mark for mark in found if mark % 3]
                assert following is not None
                marks += kept
                place = following
                if chance.random() < 0.5 or place >= total:
                    reader.cancel()
                    break
        if rounds in (3, 6):
            servers[0].stop(signal.SIGKILL)
            servers[0] = start(folder=servers[0].folder)
    producer.join()
    assert marks == [mark for mark in range(total) if mark % 3]
    assert rounds > 5


def test_a_quiet_topic_says_so_and_a_drain_says_come_back(start: Callable[..., ServerProcess]) -> None:
    server = start("--keep-alive-seconds", "1")
    with flight.connect(server.uri) as client:
        put(client, "t", batch(0, 1))
        tail = Tail(client.do_get(ticket(topic="t", follow=True)))
        none = Tail(client.do_get(ticket(topic="t", follow=True, where="mark > 5")))
        assert eventually(lambda: tail.found[:3] == [([0, 1], 2), ([], 2), ([], 2)], 8)
        assert eventually(lambda: none.found[:1] == [([], 2)], 8)
        began = time.monotonic()
        assert server.stop(signal.SIGTERM, seconds=10) == 0, "it does not wait drain_seconds_max for who never ends"
        assert time.monotonic() - began < CHECK_SECONDS / 2, "nor until they look around the next time"
        for each in (tail, none):
            assert eventually(lambda each=each: each.error is not None)
            assert isinstance(each.error, flight.FlightUnavailableError)
            assert message(each.error) == "the server is shutting down; try again when it is back"


def test_what_is_committed_while_a_server_drains_is_followed(start: Callable[..., ServerProcess]) -> None:
    server = start()
    with flight.connect(server.uri) as client:
        put(client, "t", batch(0))
        writer, _ = client.do_put(flight.FlightDescriptor.for_path("t"), batch(0).schema)
        writer.write_batch(batch(1))
        time.sleep(1.0)
        tail = Tail(client.do_get(ticket(topic="t", follow=True)))
        assert eventually(lambda: tail.marks == [0])
        server.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: tail.error is not None)
        writer.close()
        assert server.process.wait(10) == 0
    again = start(folder=server.folder)
    with flight.connect(again.uri) as client:
        assert [marks for marks, _ in pieces(client.do_get(ticket(topic="t", **{"from": tail.found[-1][1]})))] == [[1]]


def test_a_change_of_schema_ends_the_stream_with_the_place_to_come_back_to(client: flight.FlightClient) -> None:
    put(client, "t", batch(0))
    tail = Tail(client.do_get(ticket(topic="t", follow=True)))
    narrow = Tail(client.do_get(ticket(topic="t", follow=True, columns=["mark"])))
    assert eventually(lambda: tail.marks == narrow.marks == [0])
    put(client, "t", pa.record_batch({"mark": [1], "more": [True]}))
    assert eventually(lambda: tail.error is not None)
    assert tail.error is not None
    assert message(tail.error) == "topic 't': its schema has changed; come back from offset 1"
    assert eventually(lambda: narrow.marks == [0, 1])
    narrow.stop()


def test_columns_are_chosen_without_sql(client: flight.FlightClient) -> None:
    put(client, "t", batch(0, 1))
    some = client.do_get(ticket(topic="t", columns=["text", "mark"])).read_all()
    assert some.schema.names == ["text", "mark"]
    assert some["mark"].to_pylist() == [0, 1]
    with refused(pa.ArrowInvalid, "topic 't' has no column 'Mark'"):
        client.do_get(ticket(topic="t", columns=["Mark"]))
    with refused(pa.ArrowInvalid, "topic 't': column 'mark' is asked for twice"):
        client.do_get(ticket(topic="t", columns=["mark", "text", "mark"]))


def test_a_run_at_the_end_looks_at_the_last_files_only(folder: Path, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    with OpLog.open(str(folder)) as log:
        for mark in range(30):
            log.append("t", batch(mark))
        looked: list[int] = []
        real = Reader.records
        monkeypatch.setattr(Reader, "records", lambda store, file, *more: looked.append(file.first_offset) or real(store, file, *more))
        follower = Follower(log, engine, Config())
        for where in ({}, {"where": "mark >= 0"}):
            request = TopicRead.parse(json.dumps({"topic": "t", "from": 28, **where}).encode())
            _, runs = follower.read(request, lambda: False)
            assert [mark for run in runs for mark in run.batch["mark"].to_pylist()] == [28, 29]
            assert set(looked) <= {28, 29}
            looked.clear()


def test_a_thousand_idle_followers_cost_little(start: Callable[..., ServerProcess]) -> None:
    server = start("--calls-max", "1100")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(flight.connect(server.uri)) for _ in range(5)]
        put(clients[0], "t", batch(0))
        before = server.memory()
        tails = [Tail(clients[number % 5].do_get(ticket(topic="t", follow=True))) for number in range(1000)]
        assert eventually(lambda: all(tail.marks == [0] for tail in tails), 60)
        time.sleep(1)
        began, cpu = time.monotonic(), server.cpu_seconds()
        time.sleep(3)
        assert (server.cpu_seconds() - cpu) / (time.monotonic() - began) < 0.3, "of one core"
        assert server.memory() - before < 500 << 20
        put(clients[0], "t", batch(1))
        assert eventually(lambda: all(tail.marks == [0, 1] for tail in tails), 30)
        for tail in tails:
            tail.stop()


def test_a_slow_consumer_holds_nothing_up(server: ServerProcess, client: flight.FlightClient) -> None:
    payload = pa.record_batch({"payload": [bytes(1 << 20)] * 8})
    for _ in range(10):
        put(client, "t", payload)
    with flight.connect(server.uri) as slow:
        reader = slow.do_get(ticket(topic="t", follow=True))
        reader.read_chunk()
        before = server.memory()
        for _ in range(40):
            put(client, "t", payload)
        assert server.memory() - before < 200 << 20
        read = 1 + sum(1 for _ in zip(reader, range(100), strict=False))
        assert read == 101
        reader.cancel()


def test_runs_are_cut_to_what_travels_well_and_say_when_they_go_on(folder: Path, engine: Engine) -> None:
    with OpLog.open(str(folder)) as log:
        log.append("t", pa.table({"mark": list(range(10)), "text": ["x" * 1000] * 10}))
        config = Config(message_bytes_max=3000)
        follower = Follower(log, Engine(config), config)
        request = TopicRead.parse(b'{"topic": "t", "columns": ["mark", "text"], "where": "true"}')
        _, runs = follower.read(request, lambda: False)
        found = [(run.batch["mark"].to_pylist(), run.next_offset) for run in runs]
        assert [mark for marks, _ in found for mark in marks] == list(range(10))
        assert [following for _, following in found][-1] == 10
        assert {following for _, following in found[:-1]} == {None}
        assert len(found) > 3
