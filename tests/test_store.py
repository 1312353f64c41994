"""The outer table: what lies on disk, when it is durable, and how damage is told."""

import datetime
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from conftest import SEED, flip, rows
from deltalake import DeltaTable, write_deltalake

from flight_oplog import Config, OpLog, reader, store
from flight_oplog.errors import CorruptLog, NotALog, NotFound, TryAgain
from flight_oplog.schema import RECORD_SCHEMA
from flight_oplog.sql.engine import Engine


def only_file(folder: Path, topic: str = "events") -> Path:
    [path] = (folder / f"topic={topic}").glob("*.parquet")
    return path


def test_a_record_holds_what_the_format_says(log: OpLog, folder: Path) -> None:
    log.append("events", SEED)
    table = DeltaTable(str(folder)).to_pyarrow_table(filters=[("topic", "=", "events")])
    assert set(table.schema.names) == set(RECORD_SCHEMA.names)
    [row] = table.to_pylist()
    content = row.pop("content")
    [append] = row.pop("appends")
    assert append.pop("timestamp").tzinfo is not None
    assert append == {"entries": 2, "producer": None, "epoch": None, "sequence": None, "principal": None}
    schema_id = row.pop("schema_id")
    assert json.loads(row.pop("bounds")) == {
        "name": {"nulls": 0, "min": "hello", "max": "world"},
        "node_id": {"nulls": 0, "min": "00000000000004d2", "max": "000000000000162e"},
    }
    assert row == {
        "topic": "events",
        "first_offset": 0,
        "entries": 2,
        "min_time": None,
        "max_time": None,
        "digest": xxhash.xxh3_128_hexdigest(content),
        "parts": None,
        "filters": None,
    }
    assert pa.ipc.open_stream(content).read_all().to_pylist() == SEED.to_pylist()
    registered = DeltaTable(str(folder)).to_pyarrow_table(filters=[("topic", "=", "_schemas")])
    [entry] = pa.ipc.open_stream(registered["content"][0].as_buffer()).read_all().to_pylist()
    assert (entry["topic"], entry["schema_id"], entry["number"]) == ("events", schema_id, 1)
    assert pa.ipc.read_schema(pa.py_buffer(entry["schema"])) == SEED.schema


def test_add_actions_carry_real_statistics_and_the_next_offset_rides_along(log: OpLog, folder: Path) -> None:
    times = pa.array([datetime.datetime(2024, 1, day, tzinfo=datetime.UTC) for day in (3, 1, 2)], pa.timestamp("us", "UTC"))
    log.append("events", pa.record_batch({"at": times}))
    log.append("events", pa.record_batch({"at": times.slice(1)}))
    table = DeltaTable(str(folder))
    adds = {
        add["min.first_offset"]: add
        for add in pa.table(table.get_add_actions(flatten=True)).to_pylist()
        if add["partition.topic"] == "events"
    }
    first, second = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC), datetime.datetime(2024, 1, 3, tzinfo=datetime.UTC)
    assert (adds[0]["num_records"], adds[0]["max.first_offset"], adds[0]["min.entries"], adds[0]["max.entries"]) == (1, 0, 3, 3)
    assert (adds[0]["min.min_time"], adds[0]["max.max_time"]) == (first, second)
    assert (adds[3]["min.first_offset"], adds[3]["min.entries"]) == (3, 2)
    assert table.transaction_version("topic/events") == 5


def test_the_content_column_is_plain_and_a_large_record_has_a_row_group_of_its_own(folder: Path) -> None:
    config = Config(record_entries_max=1000, compression="none")
    with OpLog.open(str(folder), config) as log:
        log.append("events", pa.record_batch({"payload": [os.urandom(20_000) for _ in range(2500)]}))
    metadata = pq.read_metadata(only_file(folder))
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [1, 1, 1]
    chunk = metadata.row_group(0).column(metadata.num_columns - 1)
    assert chunk.path_in_schema == "content"
    assert (chunk.compression, chunk.has_dictionary_page, chunk.is_stats_set) == ("UNCOMPRESSED", False, False)


def test_small_records_share_a_row_group_and_read_back(folder: Path) -> None:
    with OpLog.open(str(folder), Config(record_entries_max=10)) as log:
        log.append("events", pa.record_batch({"a": list(range(95))}))
        metadata = pq.read_metadata(only_file(folder))
        assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [10]
        assert rows(Engine(Config()), log.snapshot(), "SELECT sum(a) AS s, count(*) AS n FROM events") == [{"s": 4465, "n": 95}]


def test_a_long_append_written_meanwhile_gets_its_offsets_at_commit(folder: Path) -> None:
    """The long append's file was written with offsets from 0; committing moves them behind what came in between."""
    with OpLog.open(str(folder), Config(record_entries_max=10)) as log:
        long = log.writer("events", SEED.schema)
        for _ in range(25):
            long.write(SEED)
        log.append("events", SEED)
        log.append("events", SEED)
        assert long.commit().first_offset == 4
        records = [row for file in log.snapshot().topics["events"].files for row in log._store.reader.rows(file)]
        assert [(record.first_offset, record.entries) for record in records] == [(0, 2), (2, 2), *((4 + 10 * i, 10) for i in range(5))]
        assert DeltaTable(str(folder)).transaction_version("topic/events") == 54


def test_everything_is_fsynced_before_the_receipt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with OpLog.open(str(folder)) as log:
        log.append("events", SEED)
        synced: list[str] = []
        real = os.fsync

        def spy(handle: int) -> None:
            synced.append(os.readlink(f"/proc/self/fd/{handle}"))
            real(handle)

        monkeypatch.setattr(os, "fsync", spy)
        receipt = log.append("events", SEED)
        done = list(synced)
        data = log.snapshot().topic("events").files[-1].path
        commit = folder / "_delta_log" / f"{receipt.table_version:020}.json"
        # The entry gets its name after its bytes are durable; a spy sees the name it had before.
        assert [path for path in done if not path.endswith(".tmp")] == [str(folder / data), str((folder / data).parent), str(commit.parent)]
        [entry] = [path for path in done if path.endswith(".tmp")]
        assert Path(entry).parent == commit.parent
        assert done.index(entry) == 2


def test_opening_twice_and_reopening_finds_the_same_log(folder: Path, engine: Engine) -> None:
    with OpLog.open(str(folder)) as log:
        log.append("events", SEED)
        with OpLog.open(f"file://{folder}") as other:
            assert rows(engine, other.snapshot(), "SELECT * FROM events") == SEED.to_pylist()
            assert other.append("events", SEED).first_offset == 2
            assert log.append("events", SEED).first_offset == 4
        assert log.topics()[1].entries == 6


@pytest.fixture
def not_a_log(tmp_path: Path) -> Path:
    return tmp_path / "elsewhere"


def test_a_folder_with_other_files_is_left_alone(not_a_log: Path) -> None:
    not_a_log.mkdir()
    (not_a_log / "notes.txt").write_text("mine")
    with pytest.raises(NotALog) as caught:
        OpLog.open(str(not_a_log))
    assert str(caught.value) == f"{not_a_log}: exists and is not a flight_oplog log; choose an empty or a new folder"
    assert os.listdir(not_a_log) == ["notes.txt"]


def test_a_file_in_place_of_the_folder_is_refused(not_a_log: Path) -> None:
    not_a_log.write_text("mine")
    with pytest.raises(NotALog, match="is a file, not a folder; choose an empty or a new folder"):
        OpLog.open(str(not_a_log))


def test_somebody_elses_delta_table_is_refused(not_a_log: Path) -> None:
    write_deltalake(str(not_a_log), pa.table({"a": [1]}))
    with pytest.raises(NotALog) as caught:
        OpLog.open(str(not_a_log))
    assert str(caught.value) == f"{not_a_log}: is a Delta table, but not a flight_oplog log; choose another folder"


def test_a_newer_format_version_is_refused(not_a_log: Path) -> None:
    OpLog.open(str(not_a_log)).close()
    first = not_a_log / "_delta_log" / f"{0:020}.json"
    first.write_text(first.read_text().replace('"oplog.formatVersion":"1"', '"oplog.formatVersion":"2"'))
    with pytest.raises(NotALog) as caught:
        OpLog.open(str(not_a_log))
    assert str(caught.value) == f"{not_a_log}: has format_version 2, this program reads up to 1; upgrade it"


def test_an_earlier_snapshot_stays_readable_and_a_future_one_is_not_found(log: OpLog, engine: Engine, folder: Path) -> None:
    for _ in range(3):
        log.append("events", SEED)
    assert rows(engine, log.snapshot_at(1), "SELECT count(*) AS n FROM events") == [{"n": 2}]
    with OpLog.open(str(folder)) as reopened:
        assert rows(engine, reopened.snapshot_at(2), "SELECT count(*) AS n FROM events") == [{"n": 4}]
    with pytest.raises(NotFound) as caught:
        log.snapshot_at(4)
    assert str(caught.value) == "table_version 4 is not committed yet"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The versions of the table that delta-rs was asked for."""
    asked: list[int] = []

    class Watched(DeltaTable):
        def __init__(self, *given: Any, version: int | None = None, **named: Any) -> None:
            asked.append(-1 if version is None else version)
            super().__init__(*given, version=version, **named)

    monkeypatch.setattr(store, "DeltaTable", Watched)
    return asked


def test_an_earlier_snapshot_is_loaded_once_while_there_is_room(
    log: OpLog, folder: Path, loads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PAST_WEIGHT_MAX", 21)  # seven columns each, and files
    for _ in range(5):
        log.append("events", SEED)
    with OpLog.open(str(folder)) as reopened:
        loads.clear()

        def files(version: int) -> int:
            return sum(len(topic.files) for topic in reopened.snapshot_at(version).topics.values())

        assert [files(version) for version in (2, 3, 2, 3, 2)] == [3, 4, 3, 4, 3]
        assert loads == [2, 3], "seven files and fourteen columns"
        assert [files(version) for version in (1, 2, 1, 3)] == [2, 3, 2, 4]
        assert loads == [2, 3, 1, 3], "those of 1 take the place of 3, which was asked for before 2"
        assert [files(version) for version in (4, 4, 1, 4)] == [5, 5, 2, 5]
        assert loads == [2, 3, 1, 3, 4, 1], "4 takes the place of both"
        monkeypatch.setattr(store, "PAST_KEPT", 1)
        loads.clear()
        assert [files(version) for version in (1, 1, 2, 2, 1)] == [2, 2, 3, 3, 2]
        assert loads == [2, 1]
        monkeypatch.setattr(store, "PAST_WEIGHT_MAX", 10)
        loads.clear()
        assert [files(version) for version in (1, 3, 3, 1)] == [2, 4, 4, 2]
        assert loads == [3, 3], "what is too heavy takes nobody's place"


def test_the_snapshot_of_a_moment_is_found_out_once_and_one_yet_to_come_is_not_remembered(
    log: OpLog, loads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    log.append("events", SEED)
    time.sleep(0.01)
    then = datetime.datetime.now(datetime.UTC)
    time.sleep(0.01)
    later = then + datetime.timedelta(hours=1)
    entries = [log.snapshot_as_of(moment).topic("events").entries for moment in (then, later)]
    for _ in range(2):
        log.append("events", SEED)
        entries += [log.snapshot_as_of(moment).topic("events").entries for moment in (then, later)]
    assert entries == [2, 2, 2, 4, 2, 6]
    loads.clear()
    assert log.snapshot_as_of(then).topic("events").entries == 2
    assert loads == []


def test_a_moment_just_before_a_commit_is_found(log: OpLog) -> None:
    """The system writes down a file's time by a clock that ticks every few milliseconds: it may be before the commit was begun."""
    moments = []
    for _ in range(20):
        log.append("events", SEED)
        moments.append(datetime.datetime.now(datetime.UTC))
        time.sleep(0.003)
    assert [log.snapshot_as_of(moment).topic("events").entries for moment in moments] == [2 * n for n in range(1, 21)]


def flip_content(path: Path) -> None:
    flip(path, path.read_bytes().rindex(b"hello"))


def flip_bound(path: Path) -> None:
    flip(path, path.read_bytes().index(b"hello"))


def flip_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def replace_content_by_text(path: Path) -> None:
    table = pq.read_table(path)
    place = table.schema.get_field_index("content")
    pq.write_table(table.set_column(place, "content", pa.array(["not bytes"])), path)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit": (flip_content, "content does not match its digest; restore the file"),
    "a flipped bit beside the content": (flip_bound, "is not readable Parquet; restore it"),
    "a lost end": (flip_end, "is not readable Parquet; restore it"),
    "a lost file": (lambda path: path.unlink(), "is missing; restore it"),
    "content of another type": (replace_content_by_text, "content is string, not binary; restore the file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_an_error_that_names_topic_and_file_never_fewer_rows(tmp_path: Path, engine: Engine, kind: str) -> None:
    harm, expected = DAMAGE[kind]
    folder = tmp_path / "damaged"
    with OpLog.open(str(folder), Config(compression="none")) as log:
        log.append("events", SEED)
        log.append("other", SEED)
    path = only_file(folder)
    harm(path)
    with OpLog.open(str(folder)) as log:
        with pytest.raises(CorruptLog) as caught:
            rows(engine, log.snapshot(), "SELECT * FROM events")
        assert "topic 'events'" in str(caught.value)
        assert path.name in str(caught.value)
        assert str(caught.value).endswith(expected)
        assert str(folder) not in str(caught.value)
        assert rows(engine, log.snapshot(), "SELECT * FROM other") == SEED.to_pylist()
        [problem] = [problem for problem in log.verify() if problem.severity == "error"]
        assert problem.what.endswith(expected)


def test_a_file_nobody_names_is_a_note_not_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "orphaned"
    with OpLog.open(str(folder)) as log:
        log.append("events", SEED)
        shutil.copy(only_file(folder), folder / "topic=events" / "left-behind.parquet")
        [problem] = log.verify()
    assert (problem.severity, problem.where) == ("note", "topic=events/left-behind.parquet")
    assert problem.what == "no commit names this data file: left by a crash, or being written right now"


def test_a_full_disk_loses_nothing_and_leaves_nothing(small_disk: Path) -> None:
    with OpLog.open(str(small_disk / "log"), Config(compression="none")) as log:
        log.append("events", SEED)
        for size in (20_000_000, 6_000_000):
            with pytest.raises(TryAgain) as caught:
                while True:
                    log.append("events", pa.record_batch({"name": [os.urandom(500).hex() for _ in range(size // 1000)]}))
            assert "failed: the disk is full; nothing was written; try again when that is mended" in str(caught.value)
        assert log.verify() == []
        before = log.snapshot().topic("events").next_offset
        filler = small_disk / "filler"
        with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with pytest.raises(TryAgain):
            log.append("events", SEED)
        filler.unlink()
        assert log.append("events", SEED).first_offset == before
        assert log.verify() == []


def test_what_was_committed_just_now_is_not_read_again(log: OpLog, folder: Path, engine: Engine) -> None:
    log.append("events", SEED)
    path = only_file(folder)
    path.rename(path.with_suffix(".away"))
    running = engine.run("SELECT * FROM events", log.snapshot())
    assert pa.Table.from_batches(list(running.batches)).to_pylist() == SEED.to_pylist()
    [found] = running.counts.values()
    assert (found.records_read, found.content_bytes) == (1, 0)
    [problem] = [problem for problem in log.verify() if problem.severity == "error"]
    assert problem.what.endswith("is missing; restore it")
    path.with_suffix(".away").rename(path)


def test_fresh_content_is_kept_within_its_limit(log: OpLog, monkeypatch: pytest.MonkeyPatch) -> None:
    log.append("events", SEED)
    [record] = log.snapshot().records("events")
    size = log._store.reader.content(record).size
    monkeypatch.setattr(reader, "FRESH_BYTES", log._store.reader._fresh_bytes + size)
    log.append("events", SEED)
    assert record.key in log._store.reader._fresh
    log.append("events", SEED)
    log.append("events", SEED)
    assert record.key not in log._store.reader._fresh
    assert log._store.reader._fresh_bytes == sum(content.size for content in log._store.reader._fresh.values()) <= reader.FRESH_BYTES
