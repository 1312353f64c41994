"""Producers over the wire: pipelined appends, receipts, refusals in their place, stock ADBC, clients that misbehave."""

import contextlib
import json
import signal
import threading
from collections.abc import Callable
from typing import Any

import adbc_driver_flightsql.dbapi as adbc
import adbc_driver_manager
import pyarrow as pa
import pytest
from conftest import SEED, ServerProcess, ask, eventually, put
from pyarrow import flight
from test_server import refused

from flight_oplog import OpLog

path = flight.FlightDescriptor.for_path


def batch(*marks: int) -> pa.RecordBatch:
    return pa.record_batch({"mark": pa.array(marks, pa.int64())})


class Stream:
    """One do_put stream with many appends, as a producer keeps it open."""

    def __init__(self, client: flight.FlightClient, **headers: str) -> None:
        options = flight.FlightCallOptions(
            headers=[(f"oplog-{name.replace('_', '-')}".encode(), text.encode()) for name, text in headers.items()]
        )
        self.writer, self.acks = client.do_put(path("t"), batch().schema, options)

    def send(self, sequence: Any, *marks: int, **words: Any) -> None:
        self.writer.write_with_metadata(batch(*marks), json.dumps({"sequence": sequence, **words}).encode())

    def ack(self) -> dict[str, Any]:
        found = self.acks.read()
        assert found is not None, "the stream ended without an ack"
        answer: dict[str, Any] = json.loads(found.to_pybytes())
        return answer

    def end(self) -> None:
        self.writer.done_writing()
        assert self.acks.read() is None
        self.writer.close()


def test_an_ack_comes_while_the_stream_is_open(client: flight.FlightClient, connection: adbc.Connection) -> None:
    stream = Stream(client, producer="p")
    for sequence in range(5):
        stream.send(sequence, sequence, sequence)
        receipt = {"topic": "t", "first_offset": 2 * sequence, "entries": 2, "table_version": sequence + 1}
        assert stream.ack() == receipt | {"sequence": sequence, "duplicate": False}
        assert ask(connection, "SELECT count(*) AS n FROM t") == [{"n": 2 * sequence + 2}]
    stream.send(3, 9)
    receipt = {"topic": "t", "first_offset": 6, "entries": 2, "table_version": 4, "sequence": 3, "duplicate": True}
    assert stream.ack() == receipt
    stream.end()


def test_many_appends_under_way_share_commits_and_are_acknowledged_in_order(client: flight.FlightClient) -> None:
    stream = Stream(client, producer="p")
    receipts: list[dict[str, Any]] = []
    reading = threading.Thread(target=lambda: receipts.extend(stream.ack() for _ in range(3000)))
    reading.start()
    for sequence in range(3000):
        stream.send(sequence, sequence)
    reading.join(60)
    stream.end()
    assert [receipt["sequence"] for receipt in receipts] == [receipt["first_offset"] for receipt in receipts] == list(range(3000))
    assert receipts[-1]["table_version"] < 1500


def test_a_client_that_never_reads_its_acks_holds_up_nobody(start: Callable[..., ServerProcess]) -> None:
    server = start("--appends-in-flight-max", "10", "--drain-seconds-max", "1")
    with flight.connect(server.uri) as deaf, flight.connect(server.uri) as other:
        stream = Stream(deaf, producer="deaf")
        sent = [0]

        def send() -> None:
            with contextlib.suppress(pa.ArrowException, OSError):  # the server stops at the end
                for sequence in range(200_000):
                    stream.send(sequence, sequence)
                    sent[0] = sequence

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        before = -1

        def stands_still() -> bool:
            nonlocal before
            before, now = sent[0], before
            return now == sent[0] > 10

        assert eventually(stands_still, 60), "gRPC holds the client once nobody reads"
        assert put(other, "t", batch(7))["entries"] == 1
        assert server.process.poll() is None
        server.stop(signal.SIGTERM)


def test_a_gap_is_answered_in_its_place_and_ends_the_stream(client: flight.FlightClient) -> None:
    stream = Stream(client, producer="p")
    stream.send(0, 1)
    stream.send(2, 2)
    assert stream.ack()["first_offset"] == 0
    gap = "topic 't': producer 'p' sent sequence 2, expected 1; nothing was written; send what is missing first"
    assert stream.ack() == {"sequence": 2, "status": "INVALID_ARGUMENT", "error": gap}
    with refused(pa.ArrowInvalid, gap):
        stream.writer.close()
    again = Stream(client, producer="p")
    again.send(1, 3)
    assert again.ack()["first_offset"] == 1
    again.end()


def test_appends_without_a_producer_are_told_apart_but_not_remembered(client: flight.FlightClient) -> None:
    stream = Stream(client)
    for sequence in (7, 7):
        stream.send(sequence, 1)
    assert [(ack["sequence"], ack["first_offset"], ack["duplicate"]) for ack in (stream.ack(), stream.ack())] == [
        (7, 0, False),
        (7, 1, False),
    ]
    stream.end()


def test_a_conditional_append_is_refused_when_the_topic_ends_elsewhere(client: flight.FlightClient) -> None:
    stream = Stream(client)
    stream.send(0, 1, 2, expected_offset=0)
    stream.send(1, 3, expected_offset=2)
    stream.send(2, 4, expected_offset=2)
    assert [stream.ack()["first_offset"], stream.ack()["first_offset"]] == [0, 2]
    words = "topic 't' ends at offset 3, not at 2; nothing was written"
    assert stream.ack() == {"sequence": 2, "status": "INVALID_ARGUMENT", "error": words}
    with refused(pa.ArrowInvalid, words):
        stream.writer.close()
    headers = flight.FlightCallOptions(headers=[(b"oplog-expected-offset", b"1")])
    writer, _ = client.do_put(path("t"), batch().schema, headers)
    writer.write_batch(batch(9))
    with refused(pa.ArrowInvalid, "topic 't' ends at offset 3, not at 1; nothing was written"):
        writer.close()


def test_one_stream_as_one_append_takes_its_number_from_the_headers(client: flight.FlightClient) -> None:
    for duplicate in (False, True):
        headers = [(b"oplog-producer", b"p"), (b"oplog-epoch", b"3"), (b"oplog-sequence", b"0"), (b"oplog-acks", b"true")]
        writer, acks = client.do_put(path("t"), batch().schema, flight.FlightCallOptions(headers=headers))
        writer.write_batch(batch(1))
        writer.write_batch(batch(2))
        writer.done_writing()
        receipt = json.loads(acks.read().to_pybytes())
        writer.close()
        assert (receipt["first_offset"], receipt["entries"], receipt["duplicate"]) == (0, 2, duplicate)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"producer": "p"}, "topic 't': producer 'p' sends no sequence; nothing was written"),
        ({"producer": "p", "sequence": "one"}, "topic 't': header oplog-sequence is not a number: 'one'; nothing was written"),
        ({"epoch": "-1"}, "topic 't': header oplog-epoch is not a number: '-1'; nothing was written"),
        ({"expected_offset": "9" * 20}, f"topic 't': header oplog-expected-offset is not a number: '{'9' * 20}'; nothing was written"),
        (
            {"producer": "p", "sequence": "9" * 19},
            "topic 't': sequence '9999999999999999999' is not a number from 0 to 2^63 - 1; nothing was written",
        ),
        (
            {"producer": "p" * 129, "sequence": "0"},
            f"topic 't': the producer's name '{'p' * 80}' is not 1 to 128 printable ASCII characters; nothing was written",
        ),
    ],
)
def test_headers_that_say_nothing_are_refused(client: flight.FlightClient, headers: dict[str, str], expected: str) -> None:
    stream = Stream(client, **headers)
    with refused(pa.ArrowInvalid, expected):
        stream.writer.write_batch(batch(1))
        stream.writer.close()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"sequence": "1"}, "topic 't': sequence '1' is not a number from 0 to 2^63 - 1; nothing was written"),
        ({"sequence": True}, "topic 't': sequence 'True' is not a number from 0 to 2^63 - 1; nothing was written"),
        ({"sequence": None}, "topic 't': producer 'p' sends no sequence; nothing was written"),
        ({"sequence": 0, "topic": "u"}, "topic 't': after a batch with a sequence, each message is a batch with {\"sequence\": n}"),
        ({"sequence": 1 << 70}, f"topic 't': sequence '{1 << 70}' is not a number from 0 to 2^63 - 1; nothing was written"),
    ],
)
def test_words_that_say_nothing_are_refused(client: flight.FlightClient, words: dict[str, Any], expected: str) -> None:
    stream = Stream(client, producer="p")
    stream.writer.write_with_metadata(batch(1), json.dumps(words).encode())
    with refused(pa.ArrowInvalid, expected):
        stream.writer.close()


def test_a_stream_is_one_append_or_many_not_both(client: flight.FlightClient) -> None:
    stream = Stream(client)
    stream.send(0, 1)
    assert stream.ack()["first_offset"] == 0
    stream.writer.write_batch(batch(2))
    with refused(pa.ArrowInvalid, "topic 't': after a batch with a sequence, each message is a batch with {\"sequence\": n}"):
        stream.writer.close()
    stream = Stream(client)
    stream.writer.write_batch(batch(2))
    stream.send(0, 3)
    with refused(pa.ArrowInvalid, "topic 't': a batch has a sequence where the first had none; nothing was written"):
        stream.writer.close()
    assert put(client, "t", batch(4))["first_offset"] == 1


def test_stock_adbc_ingests_exactly_once_with_call_headers(connection: adbc.Connection) -> None:
    prefix = "adbc.flight.sql.rpc.call_header."
    table = pa.Table.from_batches([SEED])
    for _ in range(3):
        with connection.cursor() as cursor:
            cursor.adbc_statement.set_options(**{f"{prefix}oplog-producer": "loader", f"{prefix}oplog-sequence": "0"})
            assert cursor.adbc_ingest("events", table, mode="create_append") == 2
    assert ask(connection, "SELECT * FROM events") == SEED.to_pylist()
    with connection.cursor() as cursor:
        cursor.adbc_statement.set_options(**{f"{prefix}oplog-producer": "loader", f"{prefix}oplog-sequence": "2"})
        with pytest.raises(adbc_driver_manager.ProgrammingError, match="producer 'loader' sent sequence 2, expected 1"):
            cursor.adbc_ingest("events", table, mode="append")


INGESTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "create what exists": ({"mode": "create"}, adbc_driver_manager.ProgrammingError, "topic 'events' exists already"),
    "another schema": ({"mode": "append", "db_schema_name": "log"}, adbc_driver_manager.ProgrammingError, "entries go to oplog.public"),
    "another catalog": ({"mode": "append", "catalog_name": "x"}, adbc_driver_manager.ProgrammingError, "entries go to oplog.public"),
    "temporary": ({"mode": "append", "temporary": True}, adbc_driver_manager.NotSupportedError, "temporary tables are not served"),
    "append to what does not exist": (
        {"mode": "append", "table_name": "none"},
        adbc_driver_manager.ProgrammingError,
        "topic 'none' does not exist",
    ),
    "a name that is none": ({"mode": "append", "table_name": "a b"}, adbc_driver_manager.ProgrammingError, "a b"),
    "the log's own": ({"mode": "append", "table_name": "_schemas"}, adbc_driver_manager.ProgrammingError, "_schemas"),
}


@pytest.mark.parametrize("kind", INGESTS)
def test_ingests_that_cannot_be_are_refused_in_a_sentence(connection: adbc.Connection, kind: str) -> None:
    options, error, expected = INGESTS[kind]
    table = pa.Table.from_batches([SEED])
    with connection.cursor() as cursor:
        assert cursor.adbc_ingest("events", table, mode="create", catalog_name="oplog", db_schema_name="public") == 2
        with pytest.raises(error) as caught:
            cursor.adbc_ingest(**{"table_name": "events", "data": table} | options)
    assert expected in str(caught.value)
    assert ask(connection, "SELECT count(*) AS n FROM events") == [{"n": 2}]


def test_an_ingest_replaces_a_topic_in_one_commit(server: ServerProcess, connection: adbc.Connection) -> None:
    with connection.cursor() as cursor:
        cursor.adbc_ingest("events", pa.Table.from_batches([SEED]), mode="replace")
        assert cursor.adbc_ingest("events", pa.table({"name": [7]}), mode="replace") == 1
    assert ask(connection, "SELECT _offset, name FROM log.events") == [{"_offset": 2, "name": 7}]
    with adbc.connect(server.uri) as transactional, transactional.cursor() as cursor:
        cursor.adbc_ingest("events", pa.table({"other": [1.5, 2.5]}), mode="replace")
        assert ask(connection, "SELECT name FROM events") == [{"name": 7}]
        transactional.rollback()
        cursor.adbc_ingest("events", pa.table({"other": [1.5, 2.5]}), mode="replace")
        transactional.commit()
    assert ask(connection, "SELECT _offset, other FROM log.events ORDER BY 1") == [
        {"_offset": 3, "other": 1.5},
        {"_offset": 4, "other": 2.5},
    ]


def test_an_ack_that_never_came_is_made_good_by_sending_again(start: Callable[..., ServerProcess]) -> None:
    """The server is killed while appends are under way; the producer sends everything without a receipt again."""
    server = start()
    acked: dict[int, int] = {}
    for round_ in range(4):
        with flight.connect(server.uri) as client:
            stream = Stream(client, producer="p")
            first = len(acked)
            try:
                killer = threading.Timer(0.3, server.process.kill)
                if round_ < 3:
                    killer.start()
                for sequence in range(first, first + 400):
                    stream.send(sequence, sequence)
                    if sequence % 7 == 0 or round_ == 3:
                        for _ in range(sequence + 1 - len(acked)):
                            ack = stream.ack()
                            acked[ack["sequence"]] = ack["first_offset"]
                stream.writer.close()
            except (pa.ArrowException, OSError, AssertionError):
                if round_ == 3:
                    raise
        if round_ < 3:
            killer.join()
            server.process.wait()
            server = start(folder=server.folder)
    assert acked == {sequence: sequence for sequence in range(len(acked))}
    with adbc.connect(server.uri, autocommit=True) as connection:
        found = ask(connection, "SELECT _offset, mark, _sequence FROM log.t ORDER BY _offset")
    assert [(row["_offset"], row["mark"], row["_sequence"]) for row in found] == [(n, n, n) for n in range(len(found))]
    assert len(found) == len(acked)
    server.stop()
    with OpLog.open(str(server.folder)) as log:  # a killed server leaves the file it was about to commit
        notes = [problem.where for problem in log.verify()]
        assert log.remove_orphans(3600) == []
        assert log.remove_orphans(0) == notes
