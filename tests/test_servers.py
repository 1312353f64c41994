"""Several servers on one log, in a folder and on an object store: one order, every append once, seen by all."""

import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adbc_driver_flightsql.dbapi as adbc
import duckdb
import pyarrow as pa
import pytest
from conftest import SEED, ObjectStore, ServerProcess, ask, assert_clean, put, rows
from deltalake import DeltaTable
from pyarrow import flight
from test_producers import Stream, batch
from test_server import refused

from flight_oplog import Config, OpLog, Origin, store
from flight_oplog.datafile import Record
from flight_oplog.engine import Engine
from flight_oplog.errors import OutcomeUnknown, OutOfOrder, TryAgain
from flight_oplog.provider import topic_batches


@pytest.fixture(params=["folder", "bucket"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "log") if request.param == "folder" else request.getfixturevalue("s3").new_log()


@pytest.fixture
def bucket(s3: ObjectStore) -> str:
    return s3.new_log()


def marks(log: OpLog, topic: str = "t") -> list[int]:
    snapshot = log.snapshot()
    batches = topic_batches(snapshot, snapshot.topic(topic), 0, 1 << 20, lambda: False)
    return [mark for each in batches for mark in each["mark"].to_pylist()]


def test_what_two_logs_append_at_once_is_one_dense_order(where: str) -> None:
    with OpLog.open(where) as first, OpLog.open(where) as second, OpLog.open(where) as third:
        receipts: dict[int, int] = {}

        def produce(log: OpLog, number: int) -> None:
            for sequence in range(12):
                mark = 1000 * number + sequence
                receipt = log.append("t" if number < 3 else f"t{number}", batch(mark, mark), Origin(f"p{number}", 0, sequence))
                if number < 3:
                    assert receipt.first_offset is not None
                    receipts[mark] = receipt.first_offset

        logs = [first, second, third, first]
        threads = [threading.Thread(target=produce, args=[log, number]) for number, log in enumerate(logs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(receipts) == 36
        for log in (first, second, third):
            log.at_least(48)
            found = marks(log)
            assert len(found) == 72
            assert {mark: found.index(mark) for mark in receipts} == receipts
            assert log.verify() == []


def test_a_producer_may_go_from_server_to_server(where: str) -> None:
    """The second log has not looked since: what it would refuse, it looks up first."""
    config = Config(refresh_ms=1 << 30)
    with OpLog.open(where, config) as first, OpLog.open(where, config) as second:
        for sequence in range(3):
            first.append("t", batch(sequence), Origin("p", 0, sequence))
        assert second.append("t", batch(3), Origin("p", 0, 3)).first_offset == 3
        assert first.append("t", batch(3), Origin("p", 0, 3)).duplicate
        assert second.append("t", batch(2), Origin("p", 0, 2)).first_offset == 2
        assert first.append("t", batch(4), Origin("p", 0, 4, expected_offset=4)).first_offset == 4
        with pytest.raises(OutOfOrder, match=r"producer 'p' sent sequence 9, expected 5"):
            second.append("t", batch(9), Origin("p", 0, 9))
        with pytest.raises(OutOfOrder, match=r"topic 't' ends at offset 5, not at 4"):
            second.append("t", batch(9), Origin(expected_offset=4))
        first.append("t", batch(5), Origin("p", 1, 0))
        with pytest.raises(OutOfOrder, match=r"epoch 0 of producer 'p' is fenced off by epoch 1"):
            second.append("t", batch(9), Origin("p", 0, 5))
        assert marks(first) == [0, 1, 2, 3, 4, 5]


def test_a_long_append_is_numbered_behind_what_others_wrote_meanwhile(where: str) -> None:
    config = Config(record_entries_max=10, refresh_ms=1 << 30)
    with OpLog.open(where, config) as first, OpLog.open(where, config) as second:
        first.append("t", batch(0))
        long = second.writer("t", batch().schema)
        for mark in range(100, 150):
            long.write(batch(mark))
        first.append("t", batch(1))
        assert long.commit().first_offset == 2
        assert marks(first) == [0, 1] if where.startswith("s3") else True
        assert first.at_least(3).table_version == 3
        assert marks(first) == [0, 1, *range(100, 150)]
        assert first.verify() == []


def test_many_entries_behind_the_table_is_read_afresh(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "FOLLOWED_MAX", 5)
    with OpLog.open(where, Config(refresh_ms=0)) as first, OpLog.open(where, Config(refresh_ms=0)) as second:
        for mark in range(12):
            first.append("t", batch(mark), Origin("p", 0, mark))
        assert marks(second) == list(range(12))
        assert second.append("t", batch(12), Origin("p", 0, 12)).first_offset == 12


def test_checkpoints_are_made_and_read_on_an_object_store(bucket: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CHECKPOINT_INTERVAL", 10)
    with OpLog.open(bucket) as log:
        for mark in range(25):
            log.append("t", batch(mark), Origin("p", 0, mark))
            if log._store._checkpointing is not None:
                log._store._checkpointing.join()
        assert "00000000000000000020.checkpoint.parquet" in log._store._storage.names("_delta_log")
    with OpLog.open(bucket) as log:
        assert marks(log) == list(range(25))
        assert log.append("t", batch(25), Origin("p", 0, 25)).first_offset == 25
        assert log.append("t", batch(7), Origin("p", 0, 7)).duplicate
        assert rows(engine, log.snapshot_at(5), "SELECT max(mark) AS m FROM t") == [{"m": 4}]


def test_other_readers_see_the_outer_table_on_an_object_store(bucket: str, s3: ObjectStore) -> None:
    with OpLog.open(bucket) as log:
        log.append("t", batch(1, 2, 3))
        log.append("t", batch(4))
    table = DeltaTable(bucket)
    outer = pa.table(table.to_pyarrow_dataset().to_table(columns=["topic", "first_offset", "entries", "content"]))
    assert duckdb.from_arrow(outer).filter("topic = 't'").sum("entries").fetchall() == [(4,)]
    found = [pa.ipc.open_stream(row["content"]).read_all() for row in outer.to_pylist() if row["topic"] == "t"]
    assert sorted(mark for each in found for mark in each["mark"].to_pylist()) == [1, 2, 3, 4]


def test_an_object_store_that_errs_loses_and_doubles_nothing(bucket: str, s3: ObjectStore) -> None:
    with OpLog.open(bucket, Config(refresh_ms=0)) as first, OpLog.open(bucket, Config(refresh_ms=0)) as second:
        for method, done in (("PUT", False), ("PUT", True), ("GET", False), ("HEAD", False)):
            s3.misbehave(every=4, method=method, done=done)
            for mark in range(20):
                log = (first, second)[mark % 2]
                topic = f"{method.lower()}_{str(done).lower()}"
                while True:
                    try:
                        log.append(topic, batch(mark), Origin("p", 0, mark))
                        break
                    except (TryAgain, OutcomeUnknown):  # sent again, it is written once all the same
                        continue
        s3.misbehave()
        for topic in ("put_false", "put_true", "get_false", "head_false"):
            assert marks(first, topic) == list(range(20)), topic
    assert [problem for problem in verified(bucket) if problem.severity == "error"] == []


def verified(uri: str) -> list[Any]:
    with OpLog.open(uri) as log:
        return log.verify()


def test_orphans_on_an_object_store_are_known_and_removable(bucket: str) -> None:
    with OpLog.open(bucket) as log:
        log.append("t", batch(1))
        staged = log._store.stage("t")
        record = next(log.snapshot().records("t"))
        staged.add(Record(1, record.schema_id, record.appends, {}, None, None, record.digest, log._store.content(record)))
        orphan = staged.finish(0).path
        staged.close()
        assert [(problem.severity, problem.where) for problem in log.verify()] == [("note", orphan)]
        assert log.remove_orphans(3600) == []
        assert log.remove_orphans(0) == [orphan]
        assert log.verify() == []


# Over the wire


def test_a_query_sees_what_another_server_acknowledged(start: Callable[..., ServerProcess], where: str) -> None:
    first, second, late = start(folder=where), start("--refresh-ms", "300", folder=where), start("--refresh-ms", "3600000", folder=where)
    with flight.connect(first.uri) as client:
        receipt = put(client, "t", SEED)
        for server in (second, late):
            header = {"adbc.flight.sql.rpc.call_header.oplog-min-version": str(receipt["table_version"])}
            with adbc.connect(server.uri, db_kwargs=header, autocommit=True) as at_once:
                assert ask(at_once, "SELECT count(*) AS n FROM t") == [{"n": 2}]
        receipt = put(client, "t", SEED)
        time.sleep(0.3)
        with adbc.connect(second.uri, autocommit=True) as soon:
            assert ask(soon, "SELECT count(*) AS n FROM t") == [{"n": 4}]
        with adbc.connect(late.uri, autocommit=True) as later:
            assert ask(later, "SELECT count(*) AS n FROM t") == [{"n": 2 if where.startswith("s3") else 4}]
    with flight.connect(late.uri) as client:
        options = flight.FlightCallOptions(headers=[(b"oplog-min-version", str(receipt["table_version"]).encode())])
        assert client.do_get(flight.Ticket(b'{"topic": "t", "from": 2}'), options).read_all().to_pylist() == SEED.to_pylist()
        future = flight.FlightCallOptions(headers=[(b"oplog-min-version", b"99")])
        with refused(flight.FlightUnavailableError, "table_version 99 is not committed, the log is at 2; try again"):
            client.get_flight_info(flight.FlightDescriptor.for_path("t"), future)
        wrong = flight.FlightCallOptions(headers=[(b"oplog-min-version", b"soon")])
        with refused(pa.ArrowInvalid, "header oplog-min-version is not a number: 'soon'"):
            client.get_flight_info(flight.FlightDescriptor.for_path("t"), wrong)


def test_a_follower_of_one_server_gets_what_another_takes(start: Callable[..., ServerProcess], where: str) -> None:
    first, second = start(folder=where), start(folder=where)
    with flight.connect(first.uri) as writing, flight.connect(second.uri) as reading:
        receipt = put(writing, "t", SEED)
        options = flight.FlightCallOptions(headers=[(b"oplog-min-version", str(receipt["table_version"]).encode())])
        reader = reading.do_get(flight.Ticket(b'{"topic": "t", "follow": true}'), options)
        found = [reader.read_chunk()]
        put(writing, "t", SEED)
        while sum(chunk.data.num_rows for chunk in found) < 4:
            found.append(reader.read_chunk())
        assert json.loads(found[-1].app_metadata.to_pybytes()) == {"next_offset": 4}
        reader.cancel()


def test_another_server_takes_over_from_one_that_was_killed(start: Callable[..., ServerProcess], where: str) -> None:
    first, second = start(folder=where), start(folder=where)
    with flight.connect(first.uri) as client:
        stream = Stream(client, producer="p")
        for sequence in range(30):
            stream.send(sequence, sequence)
        acknowledged = [stream.ack()["sequence"] for _ in range(10)]
        first.stop(signal.SIGKILL)
        assert acknowledged == list(range(10))
    with flight.connect(second.uri) as client:
        stream = Stream(client, producer="p")
        for sequence in range(10, 40):
            stream.send(sequence, sequence)
        receipts = [stream.ack() for _ in range(30)]
        assert [(receipt["sequence"], receipt["first_offset"]) for receipt in receipts] == [(n, n) for n in range(10, 40)]
        stream.end()
    with OpLog.open(where) as log:
        assert marks(log) == list(range(40))
        log.remove_orphans(0)
    assert_clean(where)
