"""Our entries of the Delta log and other people's: all agree on every version, whoever wrote it."""

import datetime
import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import SEED, rows
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, CommitProperties, Transaction

from flight_oplog import Config, OpLog, Origin, deltalog
from flight_oplog.errors import CorruptLog, OutcomeUnknown, TryAgain, Unsupported
from flight_oplog.oplog import make_record
from flight_oplog.schema import schema_id
from flight_oplog.sql.engine import Engine
from flight_oplog.storage import Folder


def foreign_append(folder: Path, mark: int) -> int:
    """Append one entry to the topic `shared` with delta-rs alone, as another implementation of FORMAT.md would."""
    batch = pa.record_batch({"mark": [mark]})
    with OpLog.open(str(folder)) as log:
        staged = log._store.stage("shared")
        owner = {"entries": 1, "timestamp": None}
        staged.add(make_record([batch], batch.schema, schema_id(batch.schema), [owner], None, "none"))
    while True:
        table = DeltaTable(str(folder))
        offset = table.transaction_version("topic/shared") or 0
        done = staged.finish(offset)
        add = AddAction(done.path, done.size, {"topic": "shared"}, int(time.time() * 1000), True, staged.stats())
        properties = CommitProperties(app_transactions=[Transaction("topic/shared", offset + 1)], max_commit_retries=0)
        try:
            table.create_write_transaction([add], "append", table.schema(), partition_by=["topic"], commit_properties=properties)
            return offset
        except CommitFailedError:
            continue


def test_writers_of_both_kinds_race_and_every_reader_agrees_on_every_version(folder: Path, engine: Engine) -> None:
    with OpLog.open(str(folder)) as log:
        log.append("shared", pa.record_batch({"mark": pa.array([], pa.int64())}))
        placed: list[tuple[int, int]] = []

        def ours() -> None:
            for mark in range(40):
                placed.append((log.append("shared", pa.record_batch({"mark": [mark]})).first_offset, mark))

        def theirs() -> None:
            for mark in range(100, 112):
                placed.append((foreign_append(folder, mark), mark))

        threads = [threading.Thread(target=work) for work in (ours, theirs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = [(row["_offset"], row["mark"]) for row in rows(engine, log.snapshot(), "SELECT _offset, mark FROM log.shared ORDER BY 1")]
        assert found == sorted(placed)
        assert [offset for offset, _ in found] == list(range(52))
        newest = log.snapshot().table_version
        assert newest == 53
        with OpLog.open(str(folder)) as fresh:
            for version in range(1, newest + 1, 4):
                table = DeltaTable(str(folder), version=version)
                by_delta = {add["path"] for add in pa.table(table.get_add_actions(flatten=True)).to_pylist()}
                for reader in (log, fresh):
                    snapshot = reader.snapshot_at(version)
                    assert {file.path for topic in snapshot.topics.values() for file in topic.files} == by_delta
                    shared = snapshot.topics["shared"].next_offset if "shared" in snapshot.topics else 0
                    assert shared == (table.transaction_version("topic/shared") or 0)


def test_another_programs_compaction_changes_no_answer(folder: Path, engine: Engine) -> None:
    with OpLog.open(str(folder), Config(record_entries_max=7)) as log:
        for start in range(0, 120, 12):
            log.append("t", pa.record_batch({"n": list(range(start, start + 12))}))
        before = rows(engine, log.snapshot(), "SELECT _offset, n FROM log.t ORDER BY 1")
        table = DeltaTable(str(folder))
        assert table.optimize.compact()["numFilesRemoved"] == 10
        assert len(log.snapshot().topic("t").files) == 1
        assert rows(engine, log.snapshot(), "SELECT _offset, n FROM log.t ORDER BY 1") == before
        assert [record.first_offset for record in log.snapshot().records("t")] == sorted(
            r.first_offset for r in log.snapshot().records("t")
        )
        assert log.append("t", pa.record_batch({"n": [120]})).first_offset == 120
        assert log.verify() == []
        assert log.remove_orphans(0) == [], "the files it replaced are an older version's"
        assert rows(engine, log.snapshot_at(5), "SELECT count(*) AS n FROM t") == [{"n": 60}]
        table.update_incremental()
        table.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)


@pytest.mark.parametrize("unknown", [False, True])
def test_another_programs_compaction_loses_no_row_to_a_question_of_time(folder: Path, engine: Engine, unknown: bool) -> None:
    """delta-rs cuts the statistics of times to milliseconds, and they leave out what is null."""
    start = datetime.datetime(2026, 1, 1, 0, 0, 0, 999, datetime.UTC)
    times = [start, datetime.datetime(2026, 1, 1, 1, 0, 0, 123_999, datetime.UTC)]
    kind = pa.timestamp("us", "UTC")
    sql = "SELECT count(*) AS n FROM t WHERE at >= TIMESTAMP '2026-01-01T01:00:00.123500Z'"
    with OpLog.open(str(folder)) as log:
        log.append("t", pa.record_batch({"at": pa.array(times, kind)}))
        if unknown:
            log.append("t", pa.record_batch({"at": pa.array([None], kind)}))
        log.append("t", pa.record_batch({"at": pa.array(times[:1], kind)}))
        assert rows(engine, log.snapshot(), sql) == [{"n": 1}]
        DeltaTable(str(folder)).optimize.compact()
        assert rows(engine, log.snapshot(), sql) == [{"n": 1}]
        with OpLog.open(str(folder)) as fresh:
            assert rows(engine, fresh.snapshot(), sql) == [{"n": 1}]
            files = fresh.snapshot().topic("t").files
            assert (files[0].max_time is None) == unknown
            assert list(files) == list(log.snapshot().topic("t").files)
    DeltaTable(str(folder)).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)


def test_producers_are_known_when_the_entries_that_named_them_are_gone(folder: Path) -> None:
    with OpLog.open(str(folder)) as log:
        log.append("t", pa.record_batch({"n": [0]}), Origin("early", 3, 0))
        for number in range(105):
            log.append("t", pa.record_batch({"n": [number]}))
        log._store.close()
        for version in range(1, 90):
            (folder / "_delta_log" / f"{version:020}.json").unlink()
        assert log.append("t", pa.record_batch({"n": [0]}), Origin("early", 3, 0)).duplicate
        assert log.append("t", pa.record_batch({"n": [0]}), Origin("other", sequence=0)).first_offset == 106
        with OpLog.open(str(folder)) as fresh:
            assert fresh.append("t", pa.record_batch({"n": [1]}), Origin("early", 3, 1)).first_offset == 107
            assert fresh.append("t", pa.record_batch({"n": [0]}), Origin("other", sequence=0)).duplicate


def test_checkpoints_come_by_themselves_and_the_log_opens_from_them(folder: Path) -> None:
    with OpLog.open(str(folder)) as log:
        for number in range(205):
            log.append("t", pa.record_batch({"n": [number]}))
            if number == 150 and log._store._checkpointing is not None:
                log._store._checkpointing.join()  # there is one at a time: a slow first one would be in the place of the second
    last = json.loads((folder / "_delta_log" / "_last_checkpoint").read_text())
    assert last["version"] >= 200
    for version in range(last["version"]):
        (folder / "_delta_log" / f"{version:020}.json").unlink()
    with OpLog.open(str(folder)) as log:
        assert (log.snapshot().table_version, log.snapshot().topic("t").next_offset) == (205, 205)
        assert log.append("t", pa.record_batch({"n": [205]})).first_offset == 205


def test_checkpoints_of_many_files_come_seldom(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each names all files, so together they cost as much for each commit however many there are."""
    monkeypatch.setattr("flight_oplog.store.CHECKPOINT_INTERVAL", 10)
    monkeypatch.setattr("flight_oplog.store.CHECKPOINT_PART", 2)
    with OpLog.open(str(folder)) as log:
        for number in range(170):
            log.append("t", pa.record_batch({"n": [number]}))
            log._store.close()  # which waits for the checkpoint that it may have begun
        for damaged in ('{"version": 1e999}', '{"version": "x"}', "[]", "\xff", ""):
            (folder / "_delta_log" / "_last_checkpoint").write_bytes(damaged.encode("latin-1"))
            assert deltalog.checkpointed(log._store._storage) == -1
    made = sorted(int(path.name[:20]) for path in (folder / "_delta_log").glob("*.checkpoint.parquet"))
    assert made == [10, 20, 40, 80, 160]
    with OpLog.open(str(folder)) as log:
        assert log.append("t", pa.record_batch({"n": [170]})).first_offset == 170


def test_a_checkpoint_is_made_while_entries_come(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """delta-rs lists the folder, which shows some of the entries that come meanwhile and not those before them."""
    with OpLog.open(str(folder)) as log:
        for number in range(5):
            log.append("t", pa.record_batch({"n": [number]}))
        later = folder / "_delta_log" / f"{99:020}.json"
        later.write_text((folder / "_delta_log" / f"{5:020}.json").read_text())
        with pytest.raises(DeltaError, match="contiguous"):
            DeltaTable(str(folder))
        log._store._checkpoint()
        later.unlink()
        assert not caplog.records, "what is past its retention goes another time"
        assert json.loads((folder / "_delta_log" / "_last_checkpoint").read_text())["version"] == 5
        for version in range(5):
            (folder / "_delta_log" / f"{version:020}.json").unlink()
        for number in (5, 6):
            log.append("t", pa.record_batch({"n": [number]}))
        log._store._checkpoint()  # from the one before
        for version in (5, 6):  # the newest entry never goes
            (folder / "_delta_log" / f"{version:020}.json").unlink()
    with OpLog.open(str(folder)) as log:
        assert rows(Engine(Config()), log.snapshot(), "SELECT sum(n) AS n FROM t") == [{"n": 21}]
        assert log.append("t", pa.record_batch({"n": [7]})).first_offset == 7


def test_after_a_long_pause_the_table_is_read_afresh(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries that would have to be followed one by one may be past their retention by then."""
    with OpLog.open(str(folder)) as idle, OpLog.open(str(folder)) as busy:
        for number in range(101):
            busy.append("t", pa.record_batch({"n": [number]}))
        busy._store.close()
        for version in range(1, 90):
            (folder / "_delta_log" / f"{version:020}.json").unlink()
        assert idle.snapshot().table_version == 0
        monkeypatch.setattr("flight_oplog.store.RELOAD_SECONDS", -1)
        assert idle.snapshot().topic("t").next_offset == 101


def test_a_table_upgraded_by_another_program_is_read_and_not_written(folder: Path, engine: Engine) -> None:
    with OpLog.open(str(folder)) as log:
        log.append("t", SEED)
        entry = folder / "_delta_log" / f"{2:020}.json"
        entry.write_text(json.dumps({"protocol": {"minReaderVersion": 1, "minWriterVersion": 4}}) + "\n")
        assert rows(engine, log.snapshot(), "SELECT count(*) AS n FROM t") == [{"n": 2}]
        with pytest.raises(Unsupported) as caught:
            log.append("t", SEED)
        assert str(caught.value) == (
            "another program has upgraded the table to a Delta protocol that this one does not write (reader 1, writer 4); "
            "nothing was written"
        )
    entry.unlink()


def test_a_damaged_entry_of_another_writer_is_an_error_that_names_it(tmp_path: Path) -> None:
    with OpLog.open(str(tmp_path / "log")) as log:
        log.append("t", SEED)
        (tmp_path / "log" / "_delta_log" / f"{2:020}.json").write_text('{"add": {"path"')
        with pytest.raises(CorruptLog, match=r"^table_version 2: its commit file is damaged; restore it$"):
            log.snapshot()


FAULTS: dict[str, tuple[str, bool, type[Exception], str]] = {
    # what fails, after it was done or instead, what the caller gets, how the message begins
    "writing the entry fails": ("fsync:.tmp", False, TryAgain, "the commit failed: input/output error; nothing was written"),
    "naming the entry fails": ("link", False, TryAgain, "the commit failed: input/output error; nothing was written"),
    "the folder cannot be synced": ("fsync:_delta_log", False, OutcomeUnknown, "the commit of table_version 2 may or may not be durable"),
}


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bool], None]:
    """Make one system call fail once with EIO, after it was done or instead of it."""

    def inject(call: str, done: bool) -> None:
        name, _, suffix = call.partition(":")
        real, left = getattr(os, name), [1]

        def failing(*args: Any, **kwargs: Any) -> Any:
            subject = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else ""
            if not left or not subject.endswith(suffix):
                return real(*args, **kwargs)
            left.pop()
            if done:
                real(*args, **kwargs)
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, name, failing)

    return inject


@pytest.mark.parametrize("kind", FAULTS)
def test_a_failing_commit_says_whether_anything_was_written(folder: Path, fault: Callable[[str, bool], None], kind: str) -> None:
    call, done, expected, message = FAULTS[kind]
    with OpLog.open(str(folder)) as log:
        log.append("t", SEED)
        fault(call, done)
        with pytest.raises(expected) as caught:
            log.append("t", SEED)
        assert str(caught.value).startswith(message)
        written = isinstance(caught.value, OutcomeUnknown)
        assert log.append("t", SEED).first_offset == (4 if written else 2)
    assert not [name for name in os.listdir(folder / "_delta_log") if name.endswith(".tmp")]


def test_an_error_after_the_entry_got_its_name_is_no_error(folder: Path, fault: Callable[[str, bool], None]) -> None:
    with OpLog.open(str(folder)) as log:
        log.append("t", SEED)
        fault("link", True)
        assert log.append("t", SEED).first_offset == 2
        assert log.append("t", SEED).first_offset == 4


def test_what_a_crash_left_between_writing_and_naming_is_swept(folder: Path) -> None:
    with OpLog.open(str(folder)) as log:
        log.append("t", SEED)
    old, new = (folder / "_delta_log" / f".{name}.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.write_text("")
    os.utime(old, (0, 0))
    Folder(str(folder)).sweep()
    assert (old.exists(), new.exists()) == (False, True)
    new.unlink()
