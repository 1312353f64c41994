"""The log in process: appends whole or not at all, numbered densely, evolving by rule."""

import datetime
import os
import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import SEED, eventually, rows

from flight_oplog import Config, OpLog, Receipt, codec
from flight_oplog.errors import RequestError, SchemaMismatch, TooLarge, TryAgain
from flight_oplog.sql.engine import Engine
from flight_oplog.store import Store

Query = Callable[..., list[dict[str, Any]]]


def everything_in(folder: Path) -> list[str]:
    return sorted(os.path.join(where, name) for where, _, names in os.walk(folder) for name in names)


def test_receipts_give_dense_offsets_and_each_commit_is_visible_at_once(log: OpLog, query: Query) -> None:
    assert log.append("events", SEED) == Receipt("events", 0, 2, 1)
    assert log.append("events", pa.Table.from_batches([SEED, SEED])) == Receipt("events", 2, 4, 2)
    assert log.append("other", SEED) == Receipt("other", 0, 2, 3)
    assert query("SELECT count(*) AS n FROM events") == [{"n": 6}]
    assert query("SELECT min(_offset) AS low, max(_offset) AS high, count(DISTINCT _offset) AS n FROM log.events") == [
        {"low": 0, "high": 5, "n": 6}
    ]


@pytest.mark.parametrize(
    "entries", [pa.table({"a": pa.array([], pa.int64())}), pa.RecordBatchReader.from_batches(pa.schema([("a", pa.int64())]), [])]
)
def test_an_append_of_nothing_makes_the_topic_known_and_takes_no_offset(log: OpLog, query: Query, entries: Any) -> None:
    assert log.append("empty", entries) == Receipt("empty", 0, 0, 1)
    assert query("SELECT * FROM empty") == []
    assert query("SELECT count(*) AS n FROM log.empty") == [{"n": 0}]
    assert log.append("empty", pa.table({"a": pa.array([], pa.int64())})) == Receipt("empty", 0, 0, 1)
    assert log.append("empty", pa.table({"a": [7]})) == Receipt("empty", 0, 1, 2)


def test_three_writers_with_compatible_schemas_read_as_one_table(log: OpLog, query: Query) -> None:
    log.append("m", pa.record_batch({"id": pa.array([1], pa.int32()), "v": pa.array([0.5], pa.float32())}))
    log.append("m", pa.record_batch({"v": pa.array([0.1], pa.float64()), "host": ["a"], "id": pa.array([2**40], pa.int64())}))
    log.append("m", pa.record_batch({"id": pa.array([3], pa.uint8()), "tags": [["x", "y"]]}))
    assert query("SELECT * FROM m ORDER BY id") == [
        {"id": 1, "v": 0.5, "host": None, "tags": None},
        {"id": 3, "v": None, "host": None, "tags": ["x", "y"]},
        {"id": 2**40, "v": 0.1, "host": "a", "tags": None},
    ]
    assert query("SELECT id FROM m WHERE host IS NULL AND id < 10 ORDER BY id") == [{"id": 1}, {"id": 3}]
    assert log.snapshot().topic("m").schema == pa.schema(
        [("id", pa.int64()), ("v", pa.float64()), ("host", pa.string()), ("tags", pa.list_(pa.string()))]
    )


def test_a_refused_append_leaves_nothing_behind(log: OpLog, folder: Path, query: Query) -> None:
    log.append("events", SEED)
    before = everything_in(folder)
    with pytest.raises(SchemaMismatch) as caught:
        log.append("events", pa.record_batch({"name": [1], "extra": [2]}))
    assert str(caught.value) == (
        "topic 'events': column 'name' is string in the topic and int64 in this append; "
        "the additive rule allows only widening that keeps every value exact; nothing was written"
    )
    assert everything_in(folder) == before
    assert log.append("events", SEED) == Receipt("events", 2, 2, 2)
    assert query("SELECT * FROM events LIMIT 1")[0].keys() == {"name", "node_id"}


def test_two_incompatible_writers_at_once_get_one_winner(folder: Path) -> None:
    """Both pass the first check; the committer's own check, on the newest schema, decides."""
    with OpLog.open(str(folder)) as log:
        text, number = log.writer("t", pa.schema([("a", pa.string())])), log.writer("t", pa.schema([("a", pa.int64())]))
        text.write(pa.record_batch({"a": ["x"]}))
        number.write(pa.record_batch({"a": [1]}))
        assert text.commit() == Receipt("t", 0, 1, 1)
        with pytest.raises(SchemaMismatch, match="column 'a' is string in the topic and int64 in this append"):
            number.commit()
        assert log.append("t", pa.record_batch({"a": ["y"]})).first_offset == 1


def test_the_strict_rule_holds_for_a_log_that_asks_for_it(folder: Path) -> None:
    with OpLog.open(str(folder), Config(schema_rule="strict")) as log:
        log.append("t", pa.record_batch({"a": [1]}))
        with pytest.raises(SchemaMismatch, match="the strict rule allows no new columns"):
            log.append("t", pa.record_batch({"a": [1], "b": [2]}))


def test_a_time_unit_changes_only_while_every_value_survives(log: OpLog, query: Query) -> None:
    far = pa.array([datetime.datetime(9999, 1, 1)], pa.timestamp("s"))
    near = pa.array([datetime.datetime(2024, 1, 1)], pa.timestamp("s"))
    fine = pa.array([datetime.datetime(2024, 1, 1, 0, 0, 0, 5)], pa.timestamp("ns"))
    log.append("far", pa.record_batch({"t": far}))
    with pytest.raises(SchemaMismatch) as caught:
        log.append("far", pa.record_batch({"t": fine}))
    assert str(caught.value) == (
        "topic 'far': column 't' would become timestamp[ns], which cannot hold all of its timestamp[s] values; "
        "the additive rule allows only widening that keeps every value exact; nothing was written"
    )
    log.append("near", pa.record_batch({"t": near}))
    log.append("near", pa.record_batch({"t": fine}))
    with pytest.raises(SchemaMismatch):
        log.append("near", pa.record_batch({"t": far}))
    assert query("SELECT count(*) AS n, count(t) AS t FROM near") == [{"n": 2, "t": 2}]


def test_long_appends_go_through_the_disk_and_stay_whole(folder: Path, engine: Engine) -> None:
    with OpLog.open(str(folder), Config(record_bytes_max=10_000, queue_bytes_max=5_000)) as log:
        writer = log.writer("t", pa.schema([("a", pa.int64())]))
        for start in range(0, 100_000, 1000):
            writer.write(pa.record_batch({"a": list(range(start, start + 1000))}))
        assert rows(engine, log.snapshot(), "SELECT count(*) AS n FROM system.topics") == [{"n": 0}]
        assert writer.commit() == Receipt("t", 0, 100_000, 1)
        assert rows(engine, log.snapshot(), "SELECT count(*) AS n, sum(a) AS s FROM t") == [{"n": 100_000, "s": 4999950000}]
        abandoned = log.writer("b", pa.schema([("a", pa.binary())]))
        committed = everything_in(folder)
        abandoned.write(pa.record_batch({"a": [os.urandom(17 << 20)]}))
        abandoned.write(pa.record_batch({"a": [b""]}))
        assert eventually(lambda: len(everything_in(folder)) == len(committed) + 1)
        abandoned.abandon()
        abandoned.abandon()
        assert everything_in(folder) == committed


def test_limits_are_passed_by_one_and_no_more(folder: Path) -> None:
    batch = pa.record_batch({"a": pa.array(range(100), pa.int64())})
    with OpLog.open(str(folder), Config(batch_bytes_max=800, append_bytes_max=1600, topics_max=2)) as log:
        log.append("a", batch)
        log.append("a", pa.Table.from_batches([batch, batch]))
        with pytest.raises(TooLarge) as caught:
            log.append("a", pa.record_batch({"a": pa.array(range(101), pa.int64())}))
        assert str(caught.value) == (
            "topic 'a': a batch of 808 bytes is over batch_bytes_max (800); send smaller batches; nothing was written"
        )
        with pytest.raises(TooLarge) as caught:
            log.append("a", pa.Table.from_batches([batch, batch, batch.slice(0, 1)]))
        assert str(caught.value) == "topic 'a': the append is over append_bytes_max (1600); send it as several; nothing was written"
        log.append("b", batch)
        with pytest.raises(TooLarge) as caught:
            log.append("c", batch)
        assert str(caught.value) == "topic 'c' would be one more than topics_max (2); nothing was written"
        assert [(topic.name, topic.entries) for topic in log.topics()] == [("_schemas", 2), ("a", 300), ("b", 100)]


def test_bytes_that_are_no_text_are_refused(log: OpLog) -> None:
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    with pytest.raises(RequestError, match="a batch is not valid Arrow data"):
        log.append("t", pa.RecordBatch.from_arrays([bad], ["s"]))
    assert log.topics() == []


def _large(ends: list[int], data: bytes) -> pa.RecordBatch:
    """Texts as a hostile client may send them: pyarrow refuses to make some of them, and reads them all."""
    good = pa.record_batch({"s": pa.array(["0123456789"] * (len(ends) - 1))})
    wire = good.serialize().to_pybytes()
    offsets = array("i", _ends(len(ends) - 1)).tobytes()
    assert wire.count(offsets) == wire.count(good["s"].buffers()[2].to_pybytes()) == 1
    wire = wire.replace(offsets, array("i", ends).tobytes()).replace(good["s"].buffers()[2].to_pybytes(), data)
    return pa.ipc.read_record_batch(pa.py_buffer(wire), good.schema)


def _ends(rows: int) -> list[int]:
    return [10 * row for row in range(rows + 1)]


HOSTILE = {
    "no text": (_ends(100_000), b"0123456789" * 99_999 + b"01234567\xff9"),
    "no text, before the last eight bytes": (_ends(100_000), b"0123456789" * 50_000 + b"\xc3" + b"x" * 499_999),
    "text cut within a character": (_ends(100_000), b"012345678\xc3\xa9123456789" * 50_000),
    "offsets beyond the data": ([*_ends(99_998), 2_000_000_000, 1_000_000], b"0123456789" * 100_000),
    "offsets that go back": ([*_ends(99_998), 5, 1_000_000], b"0123456789" * 100_000),
    "offsets that end beyond the data": ([*_ends(99_999), 2_000_000_000], b"0123456789" * 100_000),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("batches", [1, 2, 40])
def test_a_large_batch_is_looked_at_wherever_it_goes(log: OpLog, kind: str, batches: int) -> None:
    ends, data = HOSTILE[kind]
    hostile = _large(ends, data)
    good = pa.record_batch({"s": ["0123456789"] * 100_000})
    with pytest.raises(RequestError, match=r"^topic 't': a batch is not valid Arrow data .*; nothing was written$"):
        log.append("t", pa.RecordBatchReader.from_batches(good.schema, [good] * (batches - 1) + [hostile]))
    assert log.topics() == []
    assert log._memory._left == log.config.queue_bytes_max


def test_offsets_that_point_nowhere_are_refused_before_anything_follows_them(log: OpLog) -> None:
    batch = pa.record_batch({"s": pa.array([["a", "b"], ["c"]])})
    good, bad = (b"".join(number.to_bytes(4, "little") for number in numbers) for numbers in ((0, 2, 3), (5, 10, 2_000_000_000)))
    wire = batch.serialize().to_pybytes()
    assert wire.count(good) == 1
    hostile = pa.ipc.read_record_batch(pa.py_buffer(wire.replace(good, bad)), batch.schema)
    with pytest.raises(RequestError, match="a batch is not valid Arrow data"):
        log.append("t", hostile)
    assert log.topics() == []


def test_the_next_group_is_encoded_while_this_one_is_committed(log: OpLog, monkeypatch: pytest.MonkeyPatch) -> None:
    is_committing, going_on, encoded = threading.Event(), threading.Event(), threading.Event()
    real_commit, real_encode = log._store.commit, codec.encode

    def commit(*args: Any) -> int:
        is_committing.set()
        assert going_on.wait(10)
        return real_commit(*args)

    def encode(batches: list[pa.RecordBatch], *args: Any) -> pa.Buffer:
        content = real_encode(batches, *args)
        if sum(batch.num_rows for batch in batches) == 400_000:
            encoded.set()
        return content

    monkeypatch.setattr(log._store, "commit", commit)
    monkeypatch.setattr(codec, "encode", encode)
    start = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
    large = pa.record_batch({"at": pa.array([start] * 400_000, pa.timestamp("us", "UTC")), "n": range(400_000)})
    receipts = []
    for batch in (large.slice(0, 1), large, large.slice(0, 2)):
        writer = log.writer("t", batch.schema)
        writer.write(batch)
        receipts.append(writer.submit())
        assert is_committing.wait(10)
    assert encoded.wait(10)
    assert not any(receipt.done() for receipt in receipts)
    going_on.set()
    assert [receipt.result(10).first_offset for receipt in receipts] == [0, 1, 400_001]
    records = list(log.snapshot().records("t", 0))
    assert [(record.entries, record.min_time, record.max_time) for record in records] == [(n, start, start) for n in (1, 400_000, 2)]
    assert log.verify() == []


def test_a_committed_append_keeps_its_receipt_whatever_happens_next(log: OpLog, monkeypatch: pytest.MonkeyPatch) -> None:
    log.append("t", pa.record_batch({"a": [1]}))
    monkeypatch.setattr(Store, "_follow", lambda *_: 1 / 0)
    assert log.append("t", pa.record_batch({"a": [2]})) == Receipt("t", 1, 1, 2)
    monkeypatch.undo()
    assert log.append("t", pa.record_batch({"a": [3]})) == Receipt("t", 2, 1, 3)
    assert log.verify() == []


def test_a_topic_never_outgrows_columns_max(folder: Path) -> None:
    with OpLog.open(str(folder), Config(columns_max=3)) as log:
        log.append("t", pa.record_batch({"a": [1], "b": [1]}))
        log.append("t", pa.record_batch({"c": [1]}))
        with pytest.raises(SchemaMismatch) as caught:
            log.append("t", pa.record_batch({"d": [1]}))
        assert str(caught.value) == "topic 't' would have 4 fields, nested ones counted; columns_max is 3; nothing was written"


def test_many_threads_get_disjoint_dense_runs(folder: Path, engine: Engine) -> None:
    with OpLog.open(str(folder)) as log:
        receipts: list[tuple[Receipt, int]] = []

        def work(worker: int) -> None:
            for turn in range(10):
                mark = worker * 100 + turn
                batch = pa.record_batch({"mark": [mark] * (turn + 1)})
                receipts.append((log.append("even" if turn % 2 else "odd", batch), mark))

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for topic in ("even", "odd"):
            runs = sorted((r.first_offset, r.entries, mark) for r, mark in receipts if r.topic == topic)
            expected = [(offset, mark) for first, entries, mark in runs for offset in range(first, first + entries)]
            assert [offset for offset, _ in expected] == list(range(len(expected)))
            stored = rows(engine, log.snapshot(), f"SELECT _offset, mark FROM log.{topic} ORDER BY _offset")
            assert [(row["_offset"], row["mark"]) for row in stored] == expected
        assert log.snapshot().table_version < 80, "appends that wait together share a commit"


def test_two_logs_on_one_folder_stay_dense_and_ordered(folder: Path, engine: Engine) -> None:
    with OpLog.open(str(folder)) as one, OpLog.open(str(folder)) as two:
        receipts: list[tuple[int, int]] = []

        def work(log: OpLog, mark: int) -> None:
            for turn in range(12):
                receipts.append((log.append("t", pa.record_batch({"mark": [mark + turn]})).first_offset, mark + turn))

        threads = [threading.Thread(target=work, args=(log, mark)) for log, mark in ((one, 0), (two, 100))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stored = rows(engine, one.snapshot(), "SELECT _offset, mark FROM log.t ORDER BY _offset")
        assert [(row["_offset"], row["mark"]) for row in stored] == sorted(receipts)
        assert [row["_offset"] for row in stored] == list(range(24))
        assert rows(engine, two.snapshot(), "SELECT count(*) AS n FROM t") == [{"n": 24}]


def test_a_closed_log_takes_no_more_appends(folder: Path) -> None:
    log = OpLog.open(str(folder))
    writer = log.writer("t", SEED.schema)
    writer.write(SEED)
    log.close()
    log.close()
    with pytest.raises(TryAgain) as caught:
        writer.commit()
    assert str(caught.value) == "the log is closed; nothing was written; try again when the server is back"


def test_verify_finds_a_gap(tmp_path: Path) -> None:
    import json

    folder = tmp_path / "gap"
    with OpLog.open(str(folder)) as log:
        for _ in range(3):
            log.append("t", pa.record_batch({"a": [1]}))
    path = folder / "_delta_log" / f"{2:020}.json"
    lines = [line for line in path.read_text().splitlines() if "add" not in json.loads(line)]
    path.write_text("\n".join(lines))
    with OpLog.open(str(folder)) as log:
        assert [problem.what for problem in log.verify() if problem.severity == "error"] == [
            "expected offset 1: runs overlap or leave a gap",
        ]


def test_a_few_bytes_that_stand_for_many_count_as_many(folder: Path) -> None:
    """Dictionaries, run ends and views are written out as values: their limits are those of the values."""
    million = "x" * 1_000_000
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([100], pa.int32()), pa.array([million]))
    words = pa.array([million], pa.string_view()).buffers()
    view = pa.Array.from_buffers(pa.string_view(), 100, [None, pa.py_buffer(words[1].to_pybytes()[:16] * 100), words[2]])
    lists = pa.ListViewArray.from_arrays(pa.array([0] * 100, pa.int32()), pa.array([1000] * 100, pa.int32()), pa.array(range(1000)))
    hostile = {
        "run ends": runs,
        "dictionary": pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int8()), pa.array([million])),
        "view": view,
        "list view": lists,
        "inside a struct": pa.StructArray.from_arrays([view], ["inner"]),
        "inside a list": pa.ListArray.from_arrays(pa.array([0, 100], pa.int32()), view),
    }
    with OpLog.open(str(folder), Config(batch_bytes_max=799_999)) as log:
        for name, array in hostile.items():
            assert array.nbytes < 2_500_000, name
            with pytest.raises(TooLarge, match="is over batch_bytes_max"):
                log.append("t", pa.record_batch({"a": array}))
    with OpLog.open(str(folder), Config(batch_entries_max=10)) as log:
        log.append("t", pa.record_batch({"a": pa.nulls(10)}))
        with pytest.raises(TooLarge) as caught:
            log.append("t", pa.record_batch({"a": pa.nulls(11)}))
    assert str(caught.value) == "topic 't': a batch of 11 entries is over batch_entries_max (10); send smaller batches; nothing was written"


def test_small_appends_are_looked_at_together_and_refused_alone(log: OpLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets that point beyond the data: what its neighbours in the group wrote is committed all the same."""
    bad = pa.RecordBatch.from_arrays(
        [pa.Array.from_buffers(pa.string(), 2, [None, pa.array([0, 1 << 30, 5], pa.int32()).buffers()[1], pa.py_buffer(b"hello")])], ["a"]
    )
    good = pa.record_batch({"a": ["fine"]})
    going_on = threading.Event()
    real = log._committer._commit_waiting
    monkeypatch.setattr(log._committer, "_commit_waiting", lambda waiting: going_on.wait(10) and real(waiting))
    receipts = []
    for batch in (good, good, bad, good, pa.record_batch({"b": [1]})):
        writer = log.writer("t", batch.schema)
        writer.write(batch)
        receipts.append(writer.submit())
    together = []
    for topic, batch in (("x", good), ("y", bad), ("z", good)):
        writer = log.writer(topic, batch.schema)
        writer.write(batch)
        together.append(writer.hand_over())
    bundle = log._committer.submit(together)
    going_on.set()
    for receipt in (receipts[2], *bundle):
        with pytest.raises(RequestError, match=r"^topic '[ty]': a batch is not valid Arrow data .*; nothing was written$"):
            receipt.result(10)
    assert [receipts[n].result(10).first_offset for n in (0, 1, 3, 4)] == [0, 1, 2, 3]
    assert [topic.name for topic in log.topics()] == ["_schemas", "t"]
    assert log._memory._left == log.config.queue_bytes_max
