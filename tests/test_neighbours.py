"""Small records of many files are read as one: which ones, and that nobody can tell by the answers."""

import json
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import flip, rows
from datafusion import SessionConfig, SessionContext

from flight_oplog import Config, OpLog, neighbours
from flight_oplog.cache import ColumnCache, ScanCounts
from flight_oplog.errors import Cancelled, CorruptLog
from flight_oplog.overview import Overview
from flight_oplog.records import DataFile, RecordMeta, read_columns
from flight_oplog.sql.engine import Engine

QUESTIONS = [
    "SELECT count(*) AS c, sum(n) AS s, count(more) AS m FROM t WHERE n >= {}",
    "SELECT k, count(*) AS c, max(n) AS m, min(more) AS l FROM t WHERE n <> {} GROUP BY k ORDER BY k",
    "SELECT n, k, more FROM t WHERE k = 'b' AND n > {} ORDER BY n",
    "SELECT n, more FROM t WHERE n BETWEEN {} AND 77 ORDER BY n",
    "SELECT n FROM t WHERE n <> {} ORDER BY n DESC LIMIT 7",
    "SELECT k, n FROM t WHERE n > {}",
]


def test_answers_are_the_same_while_a_topic_grows(folder: Path, small: None) -> None:
    chance, parts = random.Random(7), []
    engines = [Engine(Config(cache_bytes_max=size, state_bytes_max=0)) for size in (1 << 26, 3000, 0)]
    with OpLog.open(str(folder)) as log:
        for number in range(60):
            count, first = chance.choice([1, 2, 3, 5]), sum(map(len, parts))
            columns = {"n": list(range(first, first + count)), "k": [chance.choice(["a", "b", None]) for _ in range(count)]}
            if number >= 25:
                columns["more"] = [chance.choice([None, 1.5, float(n)]) for n in range(count)]
            parts.append(pa.table(columns))
            log.append("t", parts[-1])
            if number % 9 == 8:
                plain = SessionContext(SessionConfig({"datafusion.sql_parser.map_string_types_to_utf8view": "false"}))
                plain.register_record_batches("t", [pa.concat_tables(parts, promote_options="default").to_batches()])
                for question in QUESTIONS if number >= 25 else [each for each in QUESTIONS if "more" not in each]:
                    sql = question.format(chance.randrange(-1, 60))
                    expected = [row for batch in plain.sql(sql).collect() for row in batch.to_pylist()]
                    for engine in engines * 2:
                        assert sorted(map(str, rows(engine, log.snapshot(), sql))) == sorted(map(str, expected)), sql
        assert any("*" in key[0] for key in engines[0]._planner.cache._records), "some were put together"


def together(records: Sequence[RecordMeta], first_offset: int) -> Sequence[RecordMeta]:
    return Overview.of([records], first_offset).together(None)[0]


def scan(engine: Engine, log: OpLog, sql: str) -> ScanCounts:
    running = engine.run(sql, log.snapshot())
    list(running.batches)
    [counts] = running.counts.values()
    return counts


def test_what_was_read_stays_in_memory_while_a_topic_grows(folder: Path, small: None) -> None:
    engine = Engine(Config(state_bytes_max=0))
    with OpLog.open(str(folder)) as log:
        for n in range(100):
            log.append("t", pa.record_batch({"n": [n]}))
        found = []
        for more in range(30):
            counts = scan(engine, log, f"SELECT sum(n + {more}) AS s FROM t")
            assert counts.records_read == counts.records == counts.files == 100 + more
            found.append((counts.cache_hits, counts.cache_misses))
            log.append("t", pa.record_batch({"n": [100 + more]}))
        # Six times 16, and the others one by one; the 16 from 96 are whole once there is one behind them.
        assert found[0] == (0, 6 + 4)
        assert found[1:13] == [(6 + 4 + more, 1) for more in range(12)]
        assert found[13:15] == [(6, 1 + 1), (7 + 1, 1)]
        # A narrow question reads what is whole within it.
        log.append("t", pa.record_batch({"n": [1000]}))
        counts = scan(Engine(Config()), log, "SELECT sum(n) AS s FROM t WHERE n >= 10 AND n < 40")
        assert (counts.records_read, counts.cache_misses) == (30, 6 + 1 + 8)


def test_a_limit_reads_no_more_than_it_wants(folder: Path, small: None) -> None:
    with OpLog.open(str(folder)) as log:
        for n in range(40):
            log.append("t", pa.record_batch({"n": [n]}))
        assert scan(Engine(Config()), log, "SELECT n FROM t LIMIT 1").records_read <= 2
        assert scan(Engine(Config()), log, "SELECT n FROM t ORDER BY n DESC LIMIT 1").records_read <= 2
        assert scan(Engine(Config()), log, "SELECT n, count(*) AS c FROM t GROUP BY n LIMIT 1").cache_misses == 2 + 8


def test_offsets_tell_which_files_are_looked_at(folder: Path) -> None:
    with OpLog.open(str(folder)) as log:
        for n in range(0, 120, 3):
            log.append("t", pa.record_batch({"n": [n, n + 1, n + 2]}))
    for sql, files, expected in (
        ("SELECT _offset, n FROM log.t ORDER BY _offset DESC LIMIT 4", 2, [(n, n) for n in (119, 118, 117, 116)]),
        ("SELECT _offset, n FROM log.t ORDER BY _offset LIMIT 3", 1, [(n, n) for n in (0, 1, 2)]),
        ("SELECT _offset, n FROM log.t ORDER BY _offset LIMIT 3 OFFSET 1", 2, [(n, n) for n in (1, 2, 3)]),
        ("SELECT n AS _offset, n FROM log.t ORDER BY _offset DESC LIMIT 1", 40, [(119, 119)]),
        ("SELECT _offset, n FROM log.t WHERE n < 9 ORDER BY _offset DESC LIMIT 1", 40, [(8, 8)]),
        ("SELECT _offset, n FROM log.t WHERE _offset >= 5 AND _offset < 7", 2, [(5, 5), (6, 6)]),
        ("SELECT _offset, n FROM log.t WHERE _offset = 50 AND n > 2", 1, [(50, 50)]),
        ("SELECT _offset, n FROM log.t WHERE _offset > 1000", 1, []),
        ("SELECT _offset, n FROM log.t WHERE _offset < 0", 0, []),
        ("SELECT _offset, n FROM log.t WHERE _offset < 2 OR n = 119", 40, [(0, 0), (1, 1), (119, 119)]),
    ):
        with OpLog.open(str(folder)) as log:
            running = Engine(Config()).run(sql, log.snapshot())
            found = [tuple(row.values()) for batch in running.batches for row in batch.to_pylist()]
            [counts] = running.counts.values()
            looked_at = [path for path in log._store.reader._known if path.startswith("topic=t")]
            assert (found, len(looked_at)) == (expected, files), sql
            assert (counts.files, counts.files - counts.files_pruned) == (40, files), sql


def test_damage_names_the_file_that_has_it(folder: Path, small: None) -> None:
    with OpLog.open(str(folder)) as log:
        for n in range(40):
            log.append("t", pa.record_batch({"n": [n]}))
    with OpLog.open(str(folder)) as log:
        bad = list(log.snapshot().records("t"))[21]
        assert bad.span is not None
        flip(folder / bad.file.path, bad.span[1] - 40)
        with pytest.raises(CorruptLog, match=rf"topic 't', file {Path(bad.file.path).name}, offset 21: content does not match its digest"):
            rows(Engine(Config()), log.snapshot(), "SELECT sum(n) AS s FROM t")
        flip(folder / bad.file.path, bad.span[1] - 40)


def test_a_topic_that_began_again_and_a_compacted_one(folder: Path, small: None) -> None:
    from deltalake import DeltaTable

    engine = Engine(Config(state_bytes_max=0))
    with OpLog.open(str(folder)) as log:
        for n in range(70):
            log.append("t", pa.record_batch({"n": [n]}))
        expected = [{"s": sum(range(70)), "c": 70}]
        sql = "SELECT sum(n) AS s, count(*) AS c FROM t WHERE n >= 0"
        assert rows(engine, log.snapshot(), sql) == expected
        DeltaTable(str(folder)).optimize.compact(partition_filters=[("topic", "=", "t")])
        for more in range(3):
            log.append("t", pa.record_batch({"n": [0]}))
            assert rows(engine, log.snapshot(), sql) == [{"s": sum(range(70)), "c": 71 + more}]


def test_a_member_that_another_program_wrote_anew_is_read_anew(folder: Path, small: None) -> None:
    engine, sql = Engine(Config(state_bytes_max=0)), "SELECT sum(n) AS s FROM t WHERE n >= 0"
    with OpLog.open(str(folder)) as log:
        for n in range(33):
            log.append("t", pa.record_batch({"n": [n]}))
    with OpLog.open(str(folder)) as log:
        assert rows(engine, log.snapshot(), sql) == [{"s": sum(range(33))}]
        topic = log.snapshot().topics["t"]
        moved = topic.files[7]
        (folder / moved.path).rename(folder / "topic=t" / "anew.parquet")
        version = log.snapshot().table_version + 1
        low_high = {"first_offset": 7, "entries": 1}
        stats = json.dumps({"numRecords": 1, "minValues": low_high, "maxValues": low_high, "nullCount": {}})
        of_both = {"partitionValues": {"topic": "t"}, "dataChange": False}
        add = of_both | {"path": "topic=t/anew.parquet", "size": moved.size, "modificationTime": 0, "stats": stats}
        remove = of_both | {"path": moved.path, "deletionTimestamp": 0}
        entry = folder / "_delta_log" / f"{version:020}.json"
        entry.write_text("".join(json.dumps(action) + "\n" for action in ({"remove": remove}, {"add": add})))
        found = engine._planner.cache.overview(log.snapshot(), log.snapshot().topics["t"]).together(None)[0]
        assert [len(one.members) for one in found] == [16, 16, 0]
        assert found[0].members[7].file.path == "topic=t/anew.parquet"
        assert rows(Engine(Config(state_bytes_max=0)), log.snapshot(), sql) == [{"s": sum(range(33))}]
        assert rows(engine, log.snapshot(), sql) == [{"s": sum(range(33))}]


def test_reading_many_records_ends_when_it_is_stopped(folder: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with OpLog.open(str(folder)) as log:
        for n in range(33):
            log.append("t", pa.record_batch({"n": [n]}))
    with OpLog.open(str(folder)) as log:
        store, stopped, read = log._store, threading.Event(), []
        [one, *_] = together(list(log.snapshot().records("t")), 0)
        whole = store.reader.columns(one, ["n"])
        monkeypatch.setattr(
            "flight_oplog.reader.read_columns", lambda *given: (read.append(1), len(read) == 3 and stopped.set(), read_columns(*given))[2]
        )
        with pytest.raises(Cancelled):
            store.reader.columns(one, ["n"], stopped)
        assert len(read) == 3
        stopped.clear()
        assert store.reader.columns(one, ["n"], stopped).buffer.equals(whole.buffer)


def test_bytes_that_were_read_are_told(folder: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(log: OpLog) -> int:
        return scan(Engine(Config(state_bytes_max=0)), log, "SELECT sum(n + 1) AS s FROM t").content_bytes

    with OpLog.open(str(folder)) as log:
        for n in range(33):
            log.append("t", pa.record_batch({"n": [n]}))
        assert told(log) == 0, "they were in memory"
    with OpLog.open(str(folder)) as log:
        found = told(log)
        monkeypatch.setattr(neighbours, "RECORDS_LEAST", 100)
        assert found == told(log) > 0


def test_content_of_other_entries_than_its_record_says_is_damage(log: OpLog, small: None) -> None:
    for n in range(17):
        log.append("t", pa.record_batch({"n": [n, n]}))
    records = list(log.snapshot().records("t"))
    [one, *_] = together(records, 0)
    assert one.entries == 16
    one.members[0].entries, one.members[1].entries = 1, 3
    with pytest.raises(CorruptLog, match=r"topic 't', file .*, offset 0: content has other entries than the records say; restore the file"):
        ColumnCache(0).columns(log.snapshot(), one, ["n"], ScanCounts())
    one.members[0].entries, one.members[1].entries = 2, 2


# Which ones


def record(place: int, first: int, entries: int, nbytes: int = 100, schema: str = "a", **more: Any) -> RecordMeta:
    file = DataFile(f"{place}.parquet", "t", 3000, 1, first, first)
    given: dict[str, Any] = {"span": (0, nbytes), "parts": None} | more
    given |= {"min_time": None, "max_time": None, "digest": "", "known_appends": [], "known_bounds": {}}
    return RecordMeta(file, 0, 0, 0, first_offset=first, entries=entries, schema_id=schema, **given)


def sizes(records: list[RecordMeta], first: int = 0) -> list[int]:
    found = together(records, first)
    assert [each for one in found for each in one.members or [one]] == records
    return [len(one.members) for one in found if one.members]


def line(count: int, entries: int = 10, start: int = 0) -> list[RecordMeta]:
    return [record(place, start + place * entries, entries) for place in range(count)]


def test_whole_ranges_of_offsets_are_put_together() -> None:
    assert sizes(line(3000)) == [820, 819, 819]
    assert sizes(line(820)) == [], "nobody knows whether another of the same range is yet to come"
    assert sizes(line(821)) == [820]
    assert sizes(line(1700)[1:]) == [819], "one of the first range is left out"
    assert sizes(line(1000, start=8192), 8192) == [820]
    assert sizes(line(1000, start=8200), 8200) == [819], "where a topic begins nothing is left out"


@pytest.mark.parametrize("spoiled", [{"schema": "b"}, {"span": None}, {"parts": "{}"}, {"nbytes": neighbours.BYTES_MAX - 819 * 100 + 1}])
def test_what_does_not_fit_is_read_as_it_is(spoiled: dict[str, Any]) -> None:
    records = line(1640)
    records[100] = record(100, 1000, 10, **spoiled)
    assert sizes(records) == [819]
    if "nbytes" in spoiled:
        records[100] = record(100, 1000, 10, nbytes=neighbours.BYTES_MAX - 819 * 100)
        assert sizes(records) == [820, 819], "that many bytes fit"


def test_few_and_large_records_stay_as_they_are() -> None:
    least, small = neighbours.RECORDS_LEAST, neighbours.SMALL_ENTRIES
    assert sizes(line(least + 1, neighbours.RANGE_ENTRIES // least)) == [least]
    assert sizes(line(least + 1, -(-neighbours.RANGE_ENTRIES // (least - 1)))) == []
    first = line(700)
    assert sizes([*first, record(700, 7000, small - 1), *line(100, 10, 7000 + small - 1)]) == [718]
    assert sizes([*first, record(700, 7000, small), *line(100, 10, 7000 + small)]) == []


def test_a_gap_is_no_neighbour() -> None:
    records = line(1640)
    del records[100]
    assert sizes(records) == [819]


@pytest.mark.parametrize("seed", range(30))
def test_any_part_of_a_topic_is_cut_the_same_way(seed: int, small: None) -> None:
    chance, records, first = random.Random(seed), [], 0
    for place in range(300):
        records.append(record(place, first, chance.choice([1, 1, 2, 9]), schema=chance.choice("aaaaaaaaaaaaaaab")))
        first += records[-1].entries
    whole = {one.key: [each.key for each in one.members] for one in together(records, 0) if one.members}
    for _ in range(20):
        some = [each for each in records[chance.randrange(100) : chance.randrange(150, 300)] if chance.random() < 0.97]
        for one in together(some, 0):
            if one.members and one.key in whole:
                assert whole[one.key] == [each.key for each in one.members]
            if one.members:
                ends = [each.first_offset + each.entries for each in one.members]
                assert [each.first_offset for each in one.members[1:]] == ends[:-1]
                assert len({each.schema_id for each in one.members}) == 1
