"""Producers, in process: next, duplicate, gap, epoch, expected offset; across restarts, compaction and other servers."""

import datetime
import errno
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import rows
from deltalake import DeltaTable
from hypothesis import given, settings
from hypothesis import strategies as st

from flight_oplog import Config, OpLog, Origin, Receipt, appends, deltalog, producers, store
from flight_oplog.errors import OutOfOrder, RequestError, SchemaMismatch, TryAgain
from flight_oplog.files import OutputFile
from flight_oplog.parquet import Writer
from flight_oplog.rows import Record
from flight_oplog.sql.engine import Engine


def batch(*marks: int) -> pa.RecordBatch:
    return pa.record_batch({"mark": pa.array(marks, pa.int64())})


def test_the_next_is_taken_a_duplicate_gets_its_first_receipt_and_a_gap_names_what_is_missing(log: OpLog, engine: Engine) -> None:
    first = log.append("t", batch(1, 2), Origin("p", sequence=0))
    assert first == Receipt("t", 0, 2, 1, sequence=0, duplicate=False)
    second = log.append("t", batch(3), Origin("p", sequence=1))
    assert log.append("t", batch(9, 9, 9), Origin("p", sequence=0)) == Receipt("t", 0, 2, 1, sequence=0, duplicate=True)
    assert log.append("t", batch(3), Origin("p", sequence=1)) == Receipt("t", 2, 1, 2, sequence=1, duplicate=True)
    with pytest.raises(OutOfOrder) as caught:
        log.append("t", batch(4), Origin("p", sequence=3))
    assert str(caught.value) == "topic 't': producer 'p' sent sequence 3, expected 2; nothing was written; send what is missing first"
    with pytest.raises(OutOfOrder, match="producer 'q' sent sequence 1, expected 0"):
        log.append("t", batch(4), Origin("q", sequence=1))
    assert log.append("other", batch(1), Origin("p", sequence=0)).duplicate is False, "each topic has its own count"
    assert second.table_version == 2
    assert rows(engine, log.snapshot(), "SELECT mark, _producer, _sequence FROM log.t ORDER BY _offset") == [
        {"mark": 1, "_producer": "p", "_sequence": 0},
        {"mark": 2, "_producer": "p", "_sequence": 0},
        {"mark": 3, "_producer": "p", "_sequence": 1},
    ]


def test_a_newer_epoch_counts_afresh_and_fences_the_older_off(log: OpLog) -> None:
    log.append("t", batch(1), Origin("p", 0, 0))
    log.append("t", batch(2), Origin("p", 0, 1))
    with pytest.raises(OutOfOrder, match="sent sequence 2, expected 0"):
        log.append("t", batch(3), Origin("p", 4, 2))
    assert log.append("t", batch(3), Origin("p", 4, 0)).first_offset == 2
    with pytest.raises(OutOfOrder) as caught:
        log.append("t", batch(4), Origin("p", 3, 0))
    assert str(caught.value) == (
        "topic 't': epoch 3 of producer 'p' is fenced off by epoch 4; nothing was written; another process has taken over"
    )
    assert log.append("t", batch(3), Origin("p", 4, 0)) == Receipt("t", 2, 1, 3, 0, duplicate=True)


def test_a_topic_that_ends_elsewhere_refuses_the_append(log: OpLog) -> None:
    assert log.append("t", batch(1), Origin(expected_offset=0)).first_offset == 0
    with pytest.raises(OutOfOrder) as caught:
        log.append("t", batch(2), Origin(expected_offset=0))
    assert str(caught.value) == "topic 't' ends at offset 1, not at 0; nothing was written"
    assert log.append("t", batch(2), Origin("p", 0, 0, expected_offset=1)).first_offset == 1
    again = log.append("t", batch(2), Origin("p", 0, 0, expected_offset=1))
    assert (again.first_offset, again.duplicate) == (1, True), "a retry is a duplicate, whatever came after it"


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (Origin("p"), "producer 'p' sends no sequence"),
        (Origin("", sequence=0), "the producer's name '' is not 1 to 128 printable ASCII characters"),
        (Origin("p" * 129, sequence=0), "is not 1 to 128 printable ASCII characters"),
        (Origin("a b", sequence=0), "is not 1 to 128 printable ASCII characters"),
        (Origin("p", sequence=-1), "sequence '-1' is not a number from 0 to 2^63 - 1"),
        (Origin("p", sequence=1 << 63), "sequence '9223372036854775808' is not a number from 0 to 2^63 - 1"),
        (Origin("p", epoch=True, sequence=0), "epoch 'True' is not a number"),
        (Origin(expected_offset="1"), "expected_offset '1' is not a number"),  # type: ignore[arg-type]
    ],
)
def test_names_and_numbers_that_cannot_be_are_refused(log: OpLog, origin: Origin, expected: str) -> None:
    with pytest.raises(RequestError) as caught:
        log.append("t", batch(1), origin)
    assert expected in str(caught.value)
    assert str(caught.value).endswith("; nothing was written")
    log.append("t", batch(1), Origin("p" * 128, sequence=0))


def test_an_append_without_entries_counts_too(folder: Path) -> None:
    with OpLog.open(str(folder)) as log:
        assert log.append("t", batch(), Origin("p", sequence=0)) == Receipt("t", 0, 0, 1, 0)
        assert log.append("t", batch(), Origin("p", sequence=1)).table_version == 2
    with OpLog.open(str(folder)) as log:
        assert log.append("t", batch(), Origin("p", sequence=1)).duplicate
        assert log.append("t", batch(5), Origin("p", sequence=2)).first_offset == 0


def test_a_refused_append_is_not_counted(log: OpLog) -> None:
    log.append("t", batch(1), Origin("p", sequence=0))
    with pytest.raises(SchemaMismatch):
        log.append("t", pa.record_batch({"mark": ["text"]}), Origin("p", sequence=1))
    assert log.append("t", batch(2), Origin("p", sequence=1)).duplicate is False


def test_a_long_append_is_one_to_its_producer(folder: Path) -> None:
    origin = Origin("p", sequence=0)
    with OpLog.open(str(folder), Config(record_bytes_max=800)) as log:
        log.append("t", batch(0))
        for duplicate in (False, True):
            writer = log.writer("t", batch().schema, origin)
            for start in range(0, 1000, 100):
                writer.write(batch(*range(start, start + 100)))
            assert writer.commit() == Receipt("t", 1, 1000, 2, 0, duplicate)
        assert sum(record.rows for record in log.snapshot().records("t")) == 11
    with OpLog.open(str(folder)) as log:
        assert log.append("t", batch(1), origin) == Receipt("t", 1, 1000, 2, 0, duplicate=True)


def test_receipts_survive_a_restart_another_server_and_a_compaction(folder: Path) -> None:
    with OpLog.open(str(folder)) as log, OpLog.open(str(folder)) as other:
        for sequence in range(6):
            (log, other)[sequence % 2].append("t", batch(sequence, sequence), Origin("p", 1, sequence))
            (log, other)[sequence % 2].append("t", batch(100 + sequence), Origin(f"q{sequence % 2}", sequence=sequence // 2))
        DeltaTable(str(folder)).optimize.compact()
        assert [other.append("t", batch(0), Origin("p", 1, sequence)).first_offset for sequence in range(6)] == [0, 3, 6, 9, 12, 15]
        assert log.append("t", batch(7), Origin("p", 1, 6)).first_offset == 18
    with OpLog.open(str(folder)) as log:
        assert log.append("t", batch(0), Origin("p", 1, 3)) == Receipt("t", 9, 2, log.snapshot().table_version, 3, duplicate=True)
        assert log.append("t", batch(0), Origin("q1", sequence=2)).first_offset == 17
        table = DeltaTable(str(folder))
        table.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)


def test_a_duplicate_older_than_what_is_remembered_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producers, "RECORDS_SEARCHED_MAX", 3)
    with OpLog.open(str(folder)) as log:
        for sequence in range(5):
            log.append("t", batch(sequence), Origin("p", sequence=sequence))
    with OpLog.open(str(folder)) as log:
        assert log.append("t", batch(2), Origin("p", sequence=2)) == Receipt("t", 2, 1, 5, 2, duplicate=True)
        assert log.append("t", batch(1), Origin("p", sequence=1)) == Receipt("t", None, None, 5, 1, duplicate=True)


def test_receipts_are_forgotten_one_by_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producers, "RECEIPTS_KEPT", 2)
    with OpLog.open(str(folder)) as log:
        for sequence in range(4):
            log.append("t", batch(sequence), Origin("p", sequence=sequence))
        assert list(log._committer._producers._receipts) == [("t", "p", 0, 2), ("t", "p", 0, 3)]
        assert log.append("t", batch(0), Origin("p", sequence=0)).first_offset == 0


def test_producers_that_retry_at_two_servers_are_written_once(folder: Path, engine: Engine) -> None:
    """Each of four producers sends everything to both servers at once: as a client does that lost a connection."""
    with OpLog.open(str(folder)) as one, OpLog.open(str(folder)) as two:
        found: dict[tuple[str, int], set[int | None]] = {}

        def work(log: OpLog, producer: str) -> None:
            for sequence in range(12):
                while True:
                    try:
                        receipt = log.append("t", batch(sequence), Origin(producer, sequence=sequence))
                        break
                    except OutOfOrder:  # the other thread's append of the number before is not committed yet
                        continue
                found.setdefault((producer, sequence), set()).add(receipt.first_offset)

        threads = [threading.Thread(target=work, args=(log, f"p{number}")) for log in (one, two) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stored = rows(engine, one.snapshot(), "SELECT _offset, _producer, _sequence, mark FROM log.t ORDER BY _offset")
        assert [row["_offset"] for row in stored] == list(range(48))
        assert {(row["_producer"], row["_sequence"]): {row["_offset"]} for row in stored} == found
        assert all(row["mark"] == row["_sequence"] for row in stored)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("pq"), st.integers(0, 2), st.integers(0, 4), st.booleans()), max_size=25))
def test_any_order_of_sends_follows_the_rules(tmp_path_factory: pytest.TempPathFactory, sends: list[tuple[str, int, int, bool]]) -> None:
    """Against a model: the newest (epoch, sequence) of each producer, and the offset each append got."""
    folder = str(tmp_path_factory.mktemp("logs") / "log")
    last: dict[str, tuple[int, int]] = {}
    offsets: dict[tuple[str, int, int], int] = {}
    log = OpLog.open(folder)
    for producer, epoch, sequence, reopen in sends:
        if reopen:
            log.close()
            log = OpLog.open(folder)
        newest_epoch, newest = last.get(producer, (0, -1))
        newest = newest if epoch == newest_epoch else -1
        key = (producer, epoch, sequence)
        if epoch < newest_epoch or sequence > newest + 1:
            with pytest.raises(OutOfOrder):
                log.append("t", batch(0), Origin(producer, epoch, sequence))
        else:
            receipt = log.append("t", batch(0), Origin(producer, epoch, sequence))
            assert (receipt.duplicate, receipt.first_offset) == (key in offsets, offsets.setdefault(key, len(offsets)))
            if not receipt.duplicate:
                last[producer] = epoch, sequence
    assert log.verify() == []
    log.close()


def test_the_record_says_who_wrote_which_run(log: OpLog) -> None:
    futures = []
    for sequence in range(3):
        writer = log.writer("t", batch().schema, Origin("p", 2, sequence))
        writer.write(batch(*range(sequence)))
        futures.append(writer.submit())
    assert [future.result().first_offset for future in futures] == [0, 0, 1]
    owners = [owner for record in log.snapshot().records("t") for owner in record.appends]
    assert [(owner["entries"], owner["producer"], owner["epoch"], owner["sequence"]) for owner in owners] == [
        (1, "p", 2, 1),
        (2, "p", 2, 2),
    ]
    assert all(owner["timestamp"] <= datetime.datetime.now(datetime.UTC) for owner in owners)


def waiting_group(log: OpLog, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Commit the entry 1, then hold the committer until the event is set: what is submitted meanwhile shares a group."""
    gate = threading.Event()
    real = log._committer._commit_group

    def held(appends: list[appends.Append]) -> None:
        real(appends)
        gate.wait(20)

    monkeypatch.setattr(log._committer, "_commit_group", held)
    log.append("t", batch(1))
    return gate


def submit(log: OpLog, *marks: int, origin: Origin = Origin(), rows: int = 0) -> Future[Receipt]:  # noqa: B008
    writer = log.writer("t", batch().schema, origin)
    for start in range(0, max(1, rows), 100):
        writer.write(batch(*(marks or range(start, start + 100))))
    return writer.submit()


def test_a_disk_that_refuses_between_two_appends_of_a_group_loses_nothing_acknowledged(
    folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long append makes the small ones before it be written first; when that fails, all of them are told."""
    with OpLog.open(str(folder), Config(record_bytes_max=800)) as log:
        gate = waiting_group(log, monkeypatch)
        futures = [submit(log, 2), submit(log, rows=500), submit(log, 3)]
        real, left = OutputFile.write, [1]

        def failing(self: OutputFile, data: Any) -> int:
            if left:
                left.pop()
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(self, data)

        monkeypatch.setattr(OutputFile, "write", failing)
        gate.set()
        for future in futures:
            with pytest.raises(TryAgain, match="the disk is full; nothing was written"):
                future.result(20)
        assert rows(engine, log.snapshot(), "SELECT mark FROM t") == [{"mark": 1}]
        assert log.append("t", batch(2)).first_offset == 1
        assert log.verify() == []


def test_a_file_that_could_not_be_written_whole_is_never_finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with OpLog.open(str(folder)) as log:
        log.append("t", batch(1))
        staged = log._store.stage("t")
        record = next(log.snapshot().records("t"))
        content = log._store.reader.content(record)
        whole = Record(1, record.schema_id, record.appends, {}, None, None, record.digest, record.parts, None, content)
        staged.add(whole)
        staged.flush()
        staged.add(whole)
        monkeypatch.setattr(Writer, "row_group", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "")))
        with pytest.raises(TryAgain):
            staged.flush()
        monkeypatch.undo()
        with pytest.raises(TryAgain, match="could not be written whole; nothing was written"):
            staged.finish(5)
        staged.abandon()


def test_nobody_is_refused_for_a_neighbour_that_was_not_committed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with OpLog.open(str(folder)) as log:
        gate = waiting_group(log, monkeypatch)
        futures = [
            submit(log, 2, origin=Origin("p", 1, 0)),
            submit(log, 3, origin=Origin("p", 0, 0)),
            submit(log, 4, origin=Origin(expected_offset=1)),
        ]
        monkeypatch.setattr(deltalog, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "")))
        gate.set()
        for future in futures:
            with pytest.raises(TryAgain, match="the disk is full"):
                future.result(20)
        monkeypatch.undo()
        assert log.append("t", batch(4), Origin(expected_offset=1)).first_offset == 1


def test_whatever_happens_after_a_commit_its_files_stay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with OpLog.open(str(folder)) as log:
        monkeypatch.setattr(store, "CHECKPOINT_INTERVAL", 1)
        monkeypatch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("can't start new thread")))
        assert log.append("t", batch(1)).first_offset == 0
        monkeypatch.undo()
        future = submit(log, 2)
        assert not future.cancel(), "whoever waits may go away, the append may not"
        assert future.result(20).first_offset == 1
        assert log.verify() == []


def test_a_writer_is_used_once(log: OpLog) -> None:
    writer = log.writer("t", batch().schema)
    writer.write(batch(1))
    assert writer.commit().first_offset == 0
    for again in (writer.submit, writer.commit, lambda: writer.write(batch(2))):
        with pytest.raises(ValueError, match="submitted or abandoned already"):
            again()
    assert log.snapshot().topic("t").next_offset == 1


def test_a_refused_append_registers_no_schema(folder: Path) -> None:
    """A long append wrote its bounds by a column that is not the topic's event time after all."""
    with OpLog.open(str(folder), Config(record_bytes_max=100)) as log:
        other = pa.record_batch({"tb": pa.array([1, 2, 3] * 10, pa.timestamp("us"))})
        writer = log.writer("t", other.schema)
        for _ in range(5):
            writer.write(other)
        log.append("t", pa.record_batch({"ta": pa.array([1], pa.timestamp("us"))}))
        with pytest.raises(TryAgain, match="its event-time column was settled meanwhile"):
            writer.commit()
        assert log.snapshot().topic("t").schema.names == ["ta"]
