"""Small records of a row group are read as one, and say the same as each of them."""

import datetime
import decimal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import flip, rows
from deltalake import DeltaTable

from flight_oplog import Config, OpLog, codec, outer, provider, records, summary
from flight_oplog.appends import Origin
from flight_oplog.cache import ColumnCache
from flight_oplog.errors import CorruptLog
from flight_oplog.reader import FEW_FILES
from flight_oplog.records import DataFile, RecordMeta, _Bounds, _Rows, read_records
from flight_oplog.sql.engine import Engine
from flight_oplog.storage import Storage

SMALL = Config(record_entries_max=10, compression="none")


def numbered(first: int, entries: int) -> pa.Table:
    return pa.table({"n": range(first, first + entries), "s": [f"entry {n}" for n in range(first, first + entries)]})


def all_of(log: OpLog) -> list[RecordMeta]:
    return list(log.snapshot().records("t"))


def test_neighbours_are_one_and_read_at_once(folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    read_group = records._read_group
    monkeypatch.setattr(records, "_read_group", lambda *arguments: reads.append(arguments) or read_group(*arguments))
    with OpLog.open(str(folder), SMALL) as log:
        log.append("t", numbered(0, 1000))
        [record] = all_of(log)
        assert (record.rows, record.first_offset, record.entries) == (100, 0, 1000)
        assert rows(engine, log.snapshot(), "SELECT sum(n) AS s, count(DISTINCT s) AS d FROM t") == [{"s": 499_500, "d": 1000}]
        assert len(reads) == 1
        assert rows(engine, log.snapshot(), "SELECT count(*) AS n, sum(entries) AS e FROM records.t") == [{"n": 100, "e": 1000}]
        assert rows(engine, log.snapshot(), "SELECT count(content) AS n FROM records.t") == [{"n": 100}]
        assert len(reads) <= 1 + engine._planner._partitions, "the row group is read once for all of a partition's rows"
        assert rows(engine, log.snapshot(), "SELECT records FROM system.topics WHERE topic = 't'") == [{"records": 100}]


OF_RECORDS = [
    "SELECT topic, first_offset, entries, schema_id, appends, min_time, max_time, bounds, digest, parts FROM records.t ORDER BY 2",
    "SELECT count(*) AS n, sum(entries) AS e FROM records.t",
    "SELECT count(*) AS n FROM records.t WHERE topic = 't' AND first_offset >= 200",
    "SELECT max(entries) AS n FROM records.t WHERE bounds LIKE '%entry 7%'",
    "SELECT topic FROM records.t WHERE first_offset < 0",
    "SELECT first_offset, octet_length(encode(content, 'hex')) AS size FROM records.t ORDER BY 1",
    "SELECT appends[1]['producer'] AS p, count(*) AS n FROM records.t GROUP BY 1 ORDER BY 1",
    "SELECT first_offset FROM records.t ORDER BY first_offset DESC LIMIT 3",
]


@pytest.mark.parametrize("happened", ["nothing", "a compaction", "a drop and a compaction"])
def test_rows_are_the_same_one_by_one_and_together(tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, happened: str) -> None:
    with OpLog.open(str(tmp_path / "log"), SMALL) as log:
        log.append("t", numbered(0, 300), Origin("p", sequence=0))
        if "drop" in happened:
            log.drop("t")
        log.append("t", numbered(300, 205))
        log.append("t", numbered(505, 4), Origin("q", sequence=0, principal="ann"))
        if "compaction" in happened:
            DeltaTable(str(tmp_path / "log")).optimize.compact(partition_filters=[("topic", "=", "t")])
        files = log.snapshot().topic("t").files
        assert len(files) == (1 if "compaction" in happened else 3)
        assert ("drop" in happened) == (files[0].first_offset < log.snapshot().topic("t").start)
        found = []
        for rows_from in (1, 1 << 30):
            monkeypatch.setattr(outer, "_ROWS_FROM", rows_from)
            found.append([rows(engine, log.snapshot(), sql) for sql in OF_RECORDS])
        assert found[0] == found[1]
        assert found[0][1] == [{"n": 22, "e": 209} if "drop" in happened else {"n": 52, "e": 509}]


@pytest.mark.parametrize(("records_of_it", "is_read"), [(63, False), (64, True)])
def test_the_rows_of_a_file_of_many_are_not_looked_at_one_by_one(
    folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, records_of_it: int, is_read: bool
) -> None:
    read = []
    real = records.read_rows
    monkeypatch.setattr("flight_oplog.reader.read_rows", lambda *given: read.append(given[2]) or real(*given))
    with OpLog.open(str(folder), SMALL) as log:
        log.append("t", numbered(0, 10 * records_of_it))
        assert rows(engine, log.snapshot(), "SELECT sum(entries) AS e FROM records.t") == [{"e": 10 * records_of_it}]
        assert read == ([["entries", "first_offset"]] if is_read else [])
        assert rows(engine, log.snapshot(), "SELECT count(content) AS c FROM records.t") == [{"c": records_of_it}]
        assert len(read) == is_read
        running = engine.run("SELECT content FROM records.t WHERE first_offset < 50 AND entries = 10", log.snapshot())
        assert sum(batch.num_rows for batch in running.batches) == running.counts["records.t"].records_read == 5


def test_damaged_rows_are_an_error(tmp_path: Path, engine: Engine) -> None:
    with OpLog.open(str(tmp_path / "log"), SMALL) as log:
        log.append("t", numbered(0, 1000))
    [path] = (tmp_path / "log" / "topic=t").glob("*.parquet")
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    flip(path, column.data_page_offset + column.total_compressed_size - 3)
    with OpLog.open(str(tmp_path / "log")) as log, pytest.raises(CorruptLog, match="is not readable Parquet; restore it"):
        rows(engine, log.snapshot(), "SELECT sum(entries) AS e FROM records.t")


def test_the_logs_own_columns_are_those_of_each(folder: Path, engine: Engine) -> None:
    with OpLog.open(str(folder), SMALL) as log:
        for sequence in range(3):
            log.append("t", numbered(25 * sequence, 25), Origin("p", 0, sequence))
        log.append("t", numbered(75, 25))
        found = rows(engine, log.snapshot(), "SELECT n, _offset, _producer, _sequence FROM log.t ORDER BY n")
        assert found == [
            {"n": n, "_offset": n, "_producer": "p" if n < 75 else None, "_sequence": n // 25 if n < 75 else None} for n in range(100)
        ]
        assert [row["n"] for row in rows(engine, log.snapshot(), "SELECT n FROM log.t WHERE _offset BETWEEN 33 AND 57 ORDER BY n")] == [
            *range(33, 58)
        ]


def test_up_to_so_many_entries_are_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with OpLog.open(str(folder), SMALL) as log:
        log.append("t", numbered(0, 95))
    for most, expected in ((1, [1] * 10), (29, [2, 2, 2, 2, 2]), (30, [3, 3, 3, 1]), (94, [9, 1]), (95, [10])):
        monkeypatch.setattr(records, "TOGETHER_ENTRIES_MAX", most)
        with OpLog.open(str(folder)) as log:
            found = all_of(log)
            assert [record.rows for record in found] == expected
            assert sum(record.entries for record in found) == 95
    monkeypatch.undo()
    for most, expected in ((1 << 20, [10]), (3_500, [5, 5]), (1, [1] * 10)):
        monkeypatch.setattr(records, "TOGETHER_BYTES_MAX", most)
        with OpLog.open(str(folder)) as log:
            assert [record.rows for record in all_of(log)] == expected


def test_schemas_are_kept_apart(folder: Path, engine: Engine) -> None:
    with OpLog.open(str(folder), SMALL) as log:
        with_more = numbered(20, 20).append_column("extra", pa.array(range(20)))
        log.commit_together([_append(log, numbered(0, 20)), _append(log, with_more), _append(log, numbered(40, 20))])
        sql = "SELECT count(*) AS n, count(extra) AS e, sum(n) AS s FROM t"
        assert rows(engine, log.snapshot(), sql) == [{"n": 60, "e": 20, "s": 1770}]
        assert sum(record.rows for record in all_of(log)) >= 3


def _append(log: OpLog, entries: pa.Table) -> Any:
    writer = log.writer("t", entries.schema)
    for batch in entries.to_batches():
        writer.write(batch)
    writer.complete()
    return writer.hand_over()


def test_damage_in_one_of_them_is_found(tmp_path: Path, engine: Engine) -> None:
    with OpLog.open(str(tmp_path / "log"), SMALL) as log:
        log.append("t", numbered(0, 100))
    [path] = (tmp_path / "log" / "topic=t").glob("*.parquet")
    flip(path, path.read_bytes().index(b"entry 58"))
    with OpLog.open(str(tmp_path / "log")) as log:
        with pytest.raises(CorruptLog, match="content does not match its digest; restore the file"):
            rows(engine, log.snapshot(), "SELECT max(s) FROM t")
        [problem] = [problem for problem in log.verify() if problem.severity == "error"]
        assert "offset 50: content does not match its digest" in problem.what


def without_a_row(table: pa.Table) -> pa.Table:
    return table.slice(0, 9)


def with_a_null(table: pa.Table) -> pa.Table:
    place = table.schema.get_field_index("content")
    return table.set_column(place, "content", pa.array([*table["content"].to_pylist()[:9], None], pa.binary()))


def with_other_entries(table: pa.Table) -> pa.Table:
    place = table.schema.get_field_index("entries")
    return table.set_column(place, "entries", pa.array([9, 11, *[10] * 8]))


def with_texts_for_entries(table: pa.Table) -> pa.Table:
    place = table.schema.get_field_index("entries")
    return table.set_column(place, "entries", pa.array(["x"] * 10))


def without_appends(table: pa.Table) -> pa.Table:
    return table.drop_columns(["appends"])


@pytest.mark.parametrize("change", [without_a_row, with_a_null, with_other_entries, with_texts_for_entries, without_appends])
def test_rows_that_another_program_spoiled_are_refused(tmp_path: Path, engine: Engine, change: Callable[[pa.Table], pa.Table]) -> None:
    with OpLog.open(str(tmp_path / "log"), SMALL) as log:
        log.append("t", numbered(0, 100))
    [path] = (tmp_path / "log" / "topic=t").glob("*.parquet")
    pq.write_table(change(pq.ParquetFile(path).read()), path)
    with OpLog.open(str(tmp_path / "log")) as log:
        with pytest.raises(CorruptLog, match="topic 't'"):
            rows(engine, log.snapshot(), "SELECT max(s) FROM t")
        assert any(problem.severity == "error" for problem in log.verify())


def test_contents_become_one_even_where_their_schema_messages_differ() -> None:
    batch = pa.record_batch({"n": [1, 2], "s": ["x", "y"]})
    same = [codec.encode([batch.slice(place, 1)], batch.schema, "none") for place in range(2)]
    other = codec.encode([batch], batch.schema.with_metadata({"written": "by another"}), "zstd")
    for contents, entries in ((same, [1, 1]), ([*same, other], [1, 1, 2]), ([other], [2])):
        found = codec.decode(codec.as_one(contents, entries, "here"), sum(entries), "here")
        assert pa.Table.from_batches(found).to_pylist() == [{"n": 1, "s": "x"}, {"n": 2, "s": "y"}] * (sum(entries) // 2)
    with pytest.raises(CorruptLog):
        codec.as_one([*same, other], [1, 1, 3], "here")
    with pytest.raises(CorruptLog):
        codec.as_one([same[0], same[1].slice(0, same[1].size - 8)], [1, 1], "here")


COLUMNS: dict[str, list[Any]] = {
    "numbers": [[1, None], [None, None], [-5, 3]],
    "texts": [["b", "abc"], [None, None], ["a" * 80, "é"]],
    "texts like numbers": [["10", "9"], ["100"], ["1E5", "-7"]],
    "decimals": [[decimal.Decimal("9.50")], [None], [decimal.Decimal("-10.25"), decimal.Decimal("10.00")]],
    "nothing": [[None], [None, None], [None]],
    "not a number": [[1.5], [float("nan")], [2.5]],
    "times": [[datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)], [None], [datetime.datetime(1969, 1, 1, tzinfo=datetime.UTC)]],
}


@pytest.mark.parametrize("name", COLUMNS)
def test_bounds_of_several_are_bounds_of_all(name: str) -> None:
    kind = pa.array([value for part in COLUMNS[name] for value in part]).type
    kind = pa.decimal128(9, 2) if name == "decimals" else pa.string() if name == "nothing" else kind
    schema = pa.schema([("c", kind)])
    batches = [pa.record_batch([pa.array(part, kind)], schema=schema) for part in COLUMNS[name]]
    texts = pa.array([codec.bounds_json(codec.bounds([batch], schema)) for batch in batches])
    found = _Bounds(texts, np.array([batch.num_rows for batch in batches])).together()
    whole = codec.bounds(batches, schema)
    assert found["c"]["nulls"] == whole["c"]["nulls"]
    if name in ("decimals", "texts like numbers"):
        assert "min" not in found["c"], "what is text orders otherwise than what is a number, and bounds do not tell them apart"
    else:
        assert found == whole


def test_a_log_that_another_program_compacted_is_read_at_once(tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with OpLog.open(str(tmp_path / "log")) as log:
        for number in range(40):
            log.append("t", numbered(10 * number, 10))
    DeltaTable(str(tmp_path / "log")).optimize.compact()
    reads = []
    read_group = records._read_group
    monkeypatch.setattr(records, "_read_group", lambda *arguments: reads.append(arguments) or read_group(*arguments))
    with OpLog.open(str(tmp_path / "log")) as log:
        assert [record.rows for record in all_of(log)] == [40]
        assert rows(engine, log.snapshot(), "SELECT count(*) AS n, sum(n) AS s FROM t WHERE s <> ''") == [{"n": 400, "s": 79_800}]
        assert len(reads) == 1
        assert log.verify() == []


# Many small files


def test_the_only_record_of_a_file_is_read_as_one_of_many_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with OpLog.open(str(tmp_path / "log")) as log:
        log.append("t", numbered(0, 10))
        log.append("u", pa.record_batch({"at": pa.array([1, None], pa.timestamp("us", "UTC")), "x": ["a", None]}), Origin("p", 0, 0))
        files = [file for topic in log.snapshot().topics.values() for file in topic.files]
        storage = log._store._storage
        found = [read_records(storage, file) for file in files]
        monkeypatch.setattr(records, "SMALL_FILE_BYTES", 0)
        by_library = [read_records(storage, file) for file in files]
        opened = [pq.ParquetFile(tmp_path / "log" / file.path) for file in files]
        tables = [file.read(columns=summary.SCHEMA.names) for file in opened]
        groups = [records._groups(file.metadata) for file in opened]
        of_many = [tuple(_Rows(*given).records(True)) for given in zip(files, tables, groups, strict=True)]
        assert len(found) >= 2
        for (one,), *others in zip(found, by_library, of_many, strict=True):
            for (other,) in others:
                assert [getattr(one, name) for name in SHOWN] == [getattr(other, name) for name in SHOWN]


def test_small_files_are_read_without_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    parquet = records._parquet

    def noted(storage: Storage, file: DataFile) -> pq.ParquetFile:
        opened.append(file.topic)
        return parquet(storage, file)

    with OpLog.open(str(tmp_path / "log"), Config(compression="none")) as log:
        log.append("t", numbered(0, 10))
        log.append("u", pa.record_batch({"x": ["x" * 1000] * 64}))
        log.append("v", pa.record_batch({"x": ["x" * 1000] * 65}))
        [small], [_], [large] = (log.snapshot().topics[name].files for name in "tuv")
        assert small.size < large.size
    with OpLog.open(str(tmp_path / "log")) as log:
        monkeypatch.setattr(records, "_parquet", noted)
        monkeypatch.setattr(records, "SMALL_FILE_BYTES", large.size - 1)
        for topic in "tuv":
            list(log.snapshot().records(topic))
        assert opened == ["v"]
        assert log.verify() == []
        assert {*opened} >= {"t", "u", "v"}, "all of a file is looked at to verify it"
        # A damaged one is the library's to speak of.
        path = tmp_path / "log" / small.path
        whole = path.read_bytes()
        flip(path, whole.index(b"\x15", 60))
        opened.clear()
        with pytest.raises(CorruptLog, match=r"topic 't': file .* (is not readable|does not hold|holds records)"):
            read_records(log._store._storage, small)
        assert opened == ["t"]
        path.unlink()
        with pytest.raises(CorruptLog, match=r"topic 't': file .* is missing; restore it"):
            read_records(log._store._storage, small)


SHOWN = ("key", "row", "row_group", "place", "span", "first_offset", "entries", "schema_id", "min_time", "max_time", "digest", "parts")
SHOWN += ("rows", "each", "appends", "bounds")


@pytest.mark.parametrize("change", [{"first_offset": 1}, {"first_offset": -1}, {"entries": 9}, {"entries": None}, {"appends": None}])
def test_an_only_record_that_does_not_add_up_is_damage(tmp_path: Path, change: dict[str, Any]) -> None:
    with OpLog.open(str(tmp_path / "log")) as log:
        log.append("t", numbered(0, 10))
        [file] = log.snapshot().topics["t"].files
        storage, path = log._store._storage, tmp_path / "log" / file.path
        table = pq.ParquetFile(path).read()
        row = table.to_pylist()[0] | change
        pq.write_table(pa.Table.from_pylist([row], pa.schema([f.with_nullable(True) for f in table.schema])), path)
        if change == {"first_offset": 1}:
            [found] = read_records(storage, file)
            assert found.first_offset == 1, "another program's compaction leaves gaps"
        else:
            with pytest.raises(CorruptLog, match=r"file .* (holds records that do not add up|does not hold records); restore it"):
                read_records(storage, file)


def test_small_records_are_one_threads_work(tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    dealt: list[int] = []
    deal = provider._deal
    monkeypatch.setattr(provider, "_deal", lambda *given: dealt.append(given[-1]) or deal(*given))
    monkeypatch.setattr(
        ColumnCache, "readers", property(lambda cache: pytest.fail("no thread is asked"), lambda cache, readers: None), False
    )
    alone = Engine(Config())
    alone._planner._partitions = 4
    with OpLog.open(str(tmp_path / "log")) as log:
        for number in range(FEW_FILES + 2):  # the records of more files than a few are read side by side
            log.append("t", numbered(10 * number, 10))
    with OpLog.open(str(tmp_path / "log")) as log:
        total = 10 * (FEW_FILES + 2)
        assert rows(alone, log.snapshot(), "SELECT sum(n) AS s FROM t WHERE s <> ''") == [{"s": total * (total - 1) // 2}]
        monkeypatch.setattr(provider, "SHARED_ENTRIES", 10)
        assert rows(alone, log.snapshot(), "SELECT sum(n) AS s FROM t WHERE s <> ' '") == [{"s": total * (total - 1) // 2}]
        monkeypatch.setattr(provider, "ALONE_ENTRIES", total - 1)
        assert rows(alone, log.snapshot(), "SELECT sum(n) AS s FROM t WHERE s <> '  '") == [{"s": total * (total - 1) // 2}]
        words = rows(alone, log.snapshot(), "SELECT s, count(*) AS c FROM t GROUP BY s")
        monkeypatch.setattr(provider, "SHARED_ENTRIES", 4096)
        assert len(words) == total
        assert sorted(words, key=str) == sorted(
            rows(alone, log.snapshot(), "SELECT s, count(*) AS c FROM t GROUP BY s -- as texts"), key=str
        )
    assert dealt[:3] == [1, 1, 4]
