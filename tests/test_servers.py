"""Several servers on one log, in a folder and on an object store: one order, every append once, seen by all."""

import errno
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

from flight_oplog import Config, OpLog, Origin, datafile, storage, store
from flight_oplog.errors import CorruptLog, OutcomeUnknown, OutOfOrder, TryAgain
from flight_oplog.provider import topic_batches
from flight_oplog.rows import Record
from flight_oplog.sql.engine import Engine
from flight_oplog.storage import Bucket, Folder


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
        newest = 0

        def produce(log: OpLog, number: int) -> None:
            nonlocal newest
            for sequence in range(12):
                mark = 1000 * number + sequence
                receipt = log.append("t" if number < 3 else f"t{number}", batch(mark, mark), Origin(f"p{number}", 0, sequence))
                newest = max(newest, receipt.table_version)
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
            log.at_least(newest)
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
        copied = record.digest, record.parts, None, log._store.reader.content(record)
        staged.add(Record(1, record.schema_id, record.appends, {}, None, None, *copied))
        orphan = staged.finish(0).path
        staged.close()
        assert [(problem.severity, problem.where) for problem in log.verify()] == [("note", orphan)]
        assert log.remove_orphans(3600) == []
        assert log.remove_orphans(0) == [orphan]
        assert log.verify() == []


def left_behind(where: str, first: OpLog, second: OpLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `second` sleep while the log goes on and drops the entries that it would have to follow."""
    monkeypatch.setattr(store, "CHECKPOINT_INTERVAL", 10)
    for mark in range(12):
        first.append("t", batch(mark))
        if first._store._checkpointing is not None:
            first._store._checkpointing.join()
    for version in range(10):
        first._store._storage.delete(f"_delta_log/{version:020}.json")
    second._store._looked -= store.RELOAD_SECONDS + 1


@pytest.mark.parametrize("asked", ["snapshot", "at_least", "append", "orphans"])
def test_who_slept_through_the_retention_reads_the_table_afresh(where: str, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    """No next entry, and yet not the newest: what is committed there would be lost, what is not known removed."""
    with OpLog.open(where) as first, OpLog.open(where, Config(refresh_ms=1 << 30)) as second:
        left_behind(where, first, second, monkeypatch)
        if asked == "snapshot":
            with monkeypatch.context() as failing:
                failing.setattr(store, "_opened", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "")))
                with pytest.raises(TryAgain, match=r"^the table cannot be read: input/output error; try again when that is mended"):
                    second.snapshot()
            assert second.snapshot().table_version == 12
        elif asked == "at_least":
            assert second.at_least(12).table_version == 12
        elif asked == "orphans":
            assert second.remove_orphans(0) == []
        assert second.append("t", batch(12)).first_offset == 12
        assert marks(first) == list(range(13)) or where.startswith("s3")
        assert first.at_least(13).topic("t").next_offset == 13


def test_a_folder_shows_at_once_that_the_newest_entry_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = str(tmp_path / "log")
    with OpLog.open(where) as first, OpLog.open(where) as second:
        left_behind(where, first, second, monkeypatch)
        second._store._looked = time.time()
        assert second.append("t", batch(12)).first_offset == 12


def test_a_renumbered_object_gets_a_name_of_its_own(bucket: str) -> None:
    """A put that timed out may be carried out later: over what a commit names, it would be damage."""
    with OpLog.open(bucket, Config(record_entries_max=1)) as log:
        long = log.writer("t", batch().schema)
        for mark in range(5):
            long.write(batch(mark))
        long.complete()
        [early] = log._store.orphans()
        log.append("t", batch(100))
        assert long.submit().result().first_offset == 1
        paths = [file.path for file in log.snapshot().topic("t").files]
        assert early.path not in paths
        assert log._store.orphans() == [], "and the first one is removed"


@pytest.mark.parametrize("complete", [False, True])
def test_what_was_taken_for_an_orphan_is_not_committed(tmp_path: Path, complete: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datafile, "PUBLISHED_SECONDS", 0)
    where = str(tmp_path / "log")
    with OpLog.open(where, Config(record_entries_max=200_000)) as log:
        long = log.writer("t", batch().schema)
        for _ in range(3):
            long.write(batch(*range(200_000)))
        if complete:
            long.complete()
        long._settle()
        assert len(log.remove_orphans(0)) == 1
        with pytest.raises(TryAgain, match=r"a file was removed that was being written; nothing was written"):
            long.commit()
        long.abandon()
        assert log.topics() == []


def test_publishing_saves_a_file_that_is_about_to_be_removed(tmp_path: Path, s3: ObjectStore) -> None:
    for place in (Folder(str(tmp_path)), Bucket(s3.new_log())):
        file = place.stage("topic=t/a.parquet")
        file.write(b"x")
        file.settle()
        before = time.time() - 2
        place.publish("topic=t/a.parquet", file)
        file.close()
        assert not place.delete_old("topic=t/a.parquet", before)
        assert [found.path for found in place.walk()] == ["topic=t/a.parquet"]
        assert place.delete_old("topic=t/a.parquet", time.time() + 2)
        assert list(place.walk()) == []


def test_nobody_who_knows_enough_waits_for_a_commit_that_hangs(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with OpLog.open(bucket) as log:
        log.append("t", batch(0))
        hanging, going_on = threading.Event(), threading.Event()
        real = Bucket.create

        def hang(*args: Any) -> None:
            hanging.set()
            going_on.wait(20)
            real(*args)

        monkeypatch.setattr(Bucket, "create", hang)
        append = log.writer("t", batch().schema)
        append.write(batch(1))
        receipt = append.submit()
        hanging.wait(20)
        since = time.monotonic()
        assert (log.snapshot().table_version, log.snapshot_at(1).table_version, marks(log)) == (1, 1, [0])
        assert time.monotonic() - since < 5
        going_on.set()
        assert receipt.result().first_offset == 1


def test_a_store_that_is_down_is_not_taken_for_damage(bucket: str, s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRY_SECONDS", 1)
    with OpLog.open(bucket) as log:
        log.append("t", batch(0))
    with OpLog.open(bucket) as log:
        s3.misbehave(every=1, method="GET", done=False)
        for read in (lambda: marks(log), log.verify, lambda: log.snapshot_at(0), lambda: log.remove_orphans(0)):
            with pytest.raises(TryAgain, match=r"cannot be read: .*; try again when that is mended$"):
                read()
        s3.misbehave()
        assert marks(log) == [0]
        [file] = log.snapshot().topic("t").files
        log._store._storage.delete(file.path)
    with OpLog.open(bucket) as log, pytest.raises(CorruptLog, match=r"^topic 't': file .* is missing; restore it$"):
        marks(log)


def test_what_could_not_be_followed_after_a_commit_is_looked_for_at_once(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with OpLog.open(bucket, Config(refresh_ms=1 << 30)) as log:
        monkeypatch.setattr(log._store, "_follow", lambda *_: 1 / 0)
        assert log.append("t", batch(0)).first_offset == 0
        monkeypatch.undo()
        assert marks(log) == [0]


def test_two_servers_may_make_one_log_at_once(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = store.Store._create

    def create_after_another(place: Any) -> None:
        monkeypatch.setattr(store.Store, "_create", staticmethod(real))
        with OpLog.open(where) as other:
            other.append("t", batch(0))
        real(place)

    monkeypatch.setattr(store.Store, "_create", staticmethod(create_after_another))
    with OpLog.open(where) as log:
        assert marks(log) == [0]


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
