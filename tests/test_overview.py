"""What is known of all of a topic's records: kept while it grows, and nobody can tell by the answers."""

import datetime
import itertools
import json
import math
import random
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import rows
from datafusion import SessionConfig, SessionContext
from test_engine import counts
from test_neighbours import record

from flight_oplog import Config, OpLog, neighbours, overview, provider, pruning
from flight_oplog.cache import ColumnCache
from flight_oplog.errors import CorruptLog
from flight_oplog.growing import Growing
from flight_oplog.overview import Listed, Overview
from flight_oplog.records import DataFile, RecordMeta
from flight_oplog.sql import engine as engine_module
from flight_oplog.sql.engine import Engine
from flight_oplog.store import Snapshot
from flight_oplog.topics import Topic


def squares(items: list[int]) -> np.ndarray:
    return np.array([item * item for item in items], np.int64)


def words(items: list[int]) -> pa.Array:
    return pa.array([None if item % 3 else str(item) for item in items], pa.string())


@pytest.mark.parametrize("seed", range(10))
def test_columns_are_those_of_the_items(seed: int) -> None:
    chance = random.Random(seed)
    states = [Listed(Growing(range(3)))]
    for _ in range(40):
        listed = chance.choice(states)
        if chance.random() < 0.3:
            listed = listed.upto(chance.randrange(len(listed.items) + 2))
        else:
            listed = listed.grown(chance.randrange(100) for _ in range(chance.randrange(5)))
        states.append(listed)
        for name, of in chance.sample([("squares", squares), ("words", words)], chance.randrange(3)):
            assert listed.column(name, of).tolist() == of(list(listed.items)).tolist()


def test_a_column_is_made_once_and_then_of_what_was_added() -> None:
    looked_at: list[int] = []

    def noted(items: list[int]) -> np.ndarray:
        looked_at.extend(items)
        return squares(items)

    listed = Listed(Growing(range(10)))
    for added in ([], [10], [11, 12], []):
        listed = listed.grown(added)
        listed.column("squares", noted)
        listed.upto(4).column("squares", noted)
    assert looked_at == list(range(13))
    listed.upto(5).column("words", words)
    assert listed.column("words", lambda items: words(looked_at.extend(items) or items))[3:6].to_pylist() == ["3", None, None]
    assert looked_at[13:] == list(range(5, 13)), "what a shorter one found out serves the longer one"
    for number in range(overview.COLUMNS_KEPT):
        listed.column(number, squares)
    assert len(listed._columns) == overview.COLUMNS_KEPT
    assert "squares" not in listed._columns, "no more are kept"
    assert listed.column("squares", noted).tolist() == squares(list(range(13))).tolist()
    assert listed.as_of(Growing(range(5)))._columns == {}, "of other items nothing is known"


def test_columns_take_no_more_than_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "COLUMNS_BYTES_LEAST", 0)
    listed = Listed(Growing(range(1000)))
    for number in range(80):
        assert listed.column(number, squares).tolist() == squares(list(range(1000))).tolist()
        assert sum(each.nbytes for each in listed._columns.values()) <= overview.ITEM_BYTES * 1000
    assert len(listed._columns) == overview.ITEM_BYTES // 8
    monkeypatch.setattr(overview, "ITEM_BYTES", 1)
    listed.column("large", words)
    assert [*listed._columns] == ["large"], "the newest stays, whatever it takes"


def flat(found: tuple[list[RecordMeta], np.ndarray]) -> list[RecordMeta]:
    assert [one.entries for one in found[0]] == found[1].tolist()
    return list(itertools.chain.from_iterable(one.members or [one] for one in found[0]))


@pytest.mark.parametrize("seed", range(20))
def test_it_grows_into_what_it_would_be_of_all(seed: int, small: None) -> None:
    chance, files, first = random.Random(seed), list[list[RecordMeta]](), 0
    for place in range(200):
        files.append([])
        for _ in range(chance.choice([0, 1, 1, 1, 1, 3])):
            files[-1].append(record(place, first, chance.choice([1, 1, 2, 9]), schema=chance.choice("aaaaaaaaaaaaaaab")))
            first += files[-1][-1].entries
    growing, start, states = Overview.of([], 0), 0, []
    while start < len(files):
        end = min(len(files), start + chance.choice([1, 1, 2, 30]))
        growing = growing.grown(files[start:end])
        states.append((end, growing))
        start = end
    for end, state in [*states, *((end, growing.upto(end)) for end, _ in states)]:
        whole = Overview.of(files[:end], 0)
        records = list(itertools.chain.from_iterable(files[:end]))
        assert list(state.records.items) == records
        assert len(state) == end
        taken = state.together(None)
        assert flat(taken) == records
        # A shorter one may know more: what came afterwards tells that its last range is whole.
        assert {one.key for one in whole.together(None)[0]} - {one.key for one in taken[0]} <= {
            each.key for one in taken[0] for each in one.members
        }
        some = np.array([place for place in range(len(records)) if chance.random() < 0.9], np.int64)
        assert flat(state.together(some)) == [records[place] for place in some]
        assert state.widened(some, is_held=lambda found: False) is some
        wider = state.widened(some, is_held=lambda found: True)
        assert {*some.tolist()} <= {*wider.tolist()}
        assert wider.tolist() == sorted({*wider.tolist()})
        assert flat(state.together(wider)) == [records[place] for place in wider]
        of_places = [place for place in range(end) if {id(each) for each in files[place]} & {id(records[one]) for one in some}]
        assert state.files_of(some).tolist() == of_places
        some_files = sorted(chance.sample(range(end), chance.randrange(end)))
        of_files = list(itertools.chain.from_iterable(files[place] for place in some_files))
        assert flat(state.alone(state.places_of(some_files))) == of_files
        assert (state.rows(None), state.rows(some)) == (len(records), len(some))


def test_a_part_is_read_with_the_rest_where_all_of_it_is_in_memory(small: None) -> None:
    found = Overview.of([[record(place, place, 1) for place in range(40)]], 0)
    for part, held, members in (
        (range(16), False, [16]),
        (range(15), False, []),
        (range(15), True, [16]),
        ([20], True, [16]),
        ([0, 40 - 1], True, [16]),
        ([32], True, []),
    ):
        taken = found.together(found.widened(np.array(part), is_held=lambda whole, held=held: held))[0]
        assert [len(one.members) for one in taken if one.members] == members
    least = -(-neighbours.RANGE_ENTRIES // overview.HELD_PART)
    assert least == 1


def test_too_small_a_part_is_read_alone() -> None:
    count = neighbours.RANGE_ENTRIES // 8
    found = Overview.of([[record(place, place * 8, 8) for place in range(count + 1)]], 0)
    for wanted in (count // overview.HELD_PART - 1, count // overview.HELD_PART):
        taken = found.together(found.widened(np.arange(5, 5 + wanted), is_held=lambda whole: True))[0]
        assert (len(taken) == 1) == (wanted * overview.HELD_PART >= count)


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files of which somebody asks for the records."""
    found: list[str] = []
    records_of = Snapshot.records_of

    def noted(snapshot: Snapshot, topic: Topic, file: DataFile) -> Sequence[RecordMeta]:
        found.append(file.path)
        return records_of(snapshot, topic, file)

    monkeypatch.setattr(Snapshot, "records_of", noted)
    return found


def test_planning_looks_at_what_was_added_alone(folder: Path, looked_at: list[str]) -> None:
    engine, first = Engine(Config(state_bytes_max=0)), None
    with OpLog.open(str(folder)) as log:
        for n in range(100):
            log.append("t", pa.record_batch({"n": [n], "s": [f"{n:03}"]}))
        for more in range(5):
            snapshot = log.snapshot()
            first = snapshot if first is None else first
            for sql, expected in (
                ("SELECT count(*) AS c, sum(n) AS s FROM t WHERE n >= 0", [(100 + more, sum(range(100 + more)))]),
                ("SELECT n FROM t WHERE s = '042'", [(42,)]),
                ("SELECT n FROM t WHERE n > 40 AND n <= 42 ORDER BY n", [(41,), (42,)]),
                ("SELECT n FROM log.t WHERE _offset = 7", [(7,)]),
            ):
                assert [tuple(row.values()) for row in rows(engine, snapshot, sql)] == expected
            assert [tuple(row.values()) for row in rows(engine, first, "SELECT max(n) AS m FROM t WHERE n >= 0")] == [(99,)]
            assert len(looked_at) == (100 if more == 0 else 1), "of each file once, whatever is asked"
            looked_at.clear()
            log.append("t", pa.record_batch({"n": [100 + more], "s": [f"{100 + more:03}"]}))


def test_the_present_and_the_past_in_turn(folder: Path, looked_at: list[str]) -> None:
    engine, sql = Engine(Config(state_bytes_max=0)), "SELECT count(*) AS c FROM t WHERE n >= 0"
    with OpLog.open(str(folder)) as log:
        for n in range(20):
            log.append("t", pa.record_batch({"n": [n]}))
    with OpLog.open(str(folder)) as log:
        present, past = log.snapshot(), log._store.snapshot_at(11)
        assert not past.topics["t"].files.shares(present.topics["t"].files)
        expected = [[{"c": each.topics["t"].entries}] for each in (present, past)]
        assert [rows(engine, each, sql) for each in (present, past)] == expected
        looked_at.clear()
        assert [rows(engine, each, sql) for each in (present, past)] == expected
        assert looked_at == []
        for version in range(5, 9):
            rows(engine, log._store.snapshot_at(version), sql)
            assert rows(engine, present, sql) == expected[0]
        assert len(engine._planner.cache._topics) == 2, "of one topic no more are kept"


def hours(n: int) -> datetime.datetime:
    return datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(hours=n)


def test_counts_are_of_what_is_looked_at(folder: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(Config(state_bytes_max=0))
    narrow = f"SELECT n FROM t WHERE at >= '{hours(2).isoformat()}' AND at < '{hours(3).isoformat()}'"
    with OpLog.open(str(folder)) as log:
        for n in range(40):
            log.append("t", pa.record_batch({"n": [n], "at": pa.array([hours(n)], pa.timestamp("us", "UTC"))}))
        found = counts(engine, log, narrow)
        assert (found.files_pruned, found.records, found.records_pruned, found.records_read) == (39, 1, 0, 1)
        rows(engine, log.snapshot(), "SELECT sum(n) AS s, max(at) AS m FROM t WHERE n + 1 > 0")
        found = counts(engine, log, narrow)  # now 16 of them are in memory as one
        assert (found.files_pruned, found.records, found.records_pruned, found.records_read) == (24, 16, 0, 16)
        assert found.cache_misses == found.content_bytes == 0
        # A question of most files has the overview grow by those that it lacks; one of few does without.
        lacking = []
        monkeypatch.setattr(
            ColumnCache, "overview", lambda cache, *of, whole=ColumnCache.overview: (lacking.append(1), whole(cache, *of))[1]
        )
        with OpLog.open(str(folder)) as other:
            rows(Engine(Config()), other.snapshot(), narrow)
            assert not lacking
            rows(Engine(Config()), other.snapshot(), f"SELECT n FROM t WHERE at >= '{hours(20).isoformat()}'")
            assert lacking


def test_files_that_do_not_lie_together_any_more(folder: Path) -> None:
    """Another program may make one file of any: then a topic's files overlap, and its records are in no order."""
    with OpLog.open(str(folder)) as log:
        for n in range(40):
            log.append("t", pa.record_batch({"n": [n], "x": [n / 2]}))
        files = [log.snapshot().topics["t"].files[place] for place in range(0, 40, 2)]
        anew = pa.concat_tables(pq.ParquetFile(folder / file.path).read() for file in files)
        bounds = anew["bounds"].to_pylist()
        bounds[3] = None  # as the outer schema lets it
        anew = anew.set_column(anew.column_names.index("bounds"), "bounds", pa.array(bounds, pa.string()))
        pq.write_table(anew, folder / "topic=t" / "anew.parquet")
        of_all = {"partitionValues": {"topic": "t"}, "dataChange": False}
        ends = {"minValues": {"first_offset": 0, "entries": 1}, "maxValues": {"first_offset": 38, "entries": 1}, "nullCount": {}}
        size = (folder / "topic=t" / "anew.parquet").stat().st_size
        add = {"path": "topic=t/anew.parquet", "size": size, "modificationTime": 0, "stats": json.dumps({"numRecords": 20} | ends)}
        actions = [{"remove": of_all | {"path": file.path, "deletionTimestamp": 0}} for file in files] + [{"add": of_all | add}]
        entry = folder / "_delta_log" / f"{log.snapshot().table_version + 1:020}.json"
        entry.write_text("".join(json.dumps(action) + "\n" for action in actions))
        snapshot, engine = log.snapshot(), Engine(Config(state_bytes_max=0))
        assert snapshot.topics["t"].overlaps
        for n in range(40):
            assert rows(engine, snapshot, f"SELECT n FROM log.t WHERE _offset = {n} OR n = -1") == [{"n": n}]
            assert rows(engine, snapshot, f"SELECT count(*) AS c FROM log.t WHERE NOT (_offset >= {n} AND n < 100)") == [{"c": n}]
            assert rows(engine, snapshot, f"SELECT n FROM t WHERE x = {n / 2} AND n > -1") == [{"n": n}]


def test_many_who_ask_while_it_grows(folder: Path, small: None) -> None:
    engine, wrong, stop = Engine(Config(state_bytes_max=0)), list[object](), threading.Event()
    with OpLog.open(str(folder)) as log:
        log.append("t", pa.record_batch({"n": [0]}))

        def ask() -> None:
            while not stop.is_set():
                snapshot = log.snapshot()
                count = snapshot.topics["t"].entries
                [found] = rows(engine, snapshot, "SELECT count(*) AS c, sum(n) AS s FROM t WHERE n >= 0")
                if found != {"c": count, "s": sum(range(count))}:
                    wrong.append((count, found))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for n in range(1, 150):
            log.append("t", pa.record_batch({"n": [n]}))
        stop.set()
        for thread in threads:
            thread.join()
        assert wrong == []
        [kept] = [known.overview for known in engine._planner.cache._topics.values()]
        assert [each.first_offset for each in kept.records.items] == list(range(len(kept.records.items)))


def test_topics_that_are_remembered_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flight_oplog.cache.TOPICS_KEPT", 2)
    engine = Engine(Config(state_bytes_max=0))
    with OpLog.open(str(folder)) as log:
        for name in "abc":
            log.append(name, pa.record_batch({"n": [1]}))
        for name in "abcabc":
            assert rows(engine, log.snapshot(), f"SELECT sum(n) AS s FROM {name} WHERE n > 0") == [{"s": 1}]
        assert [name for name, _ in engine._planner.cache._topics] == ["b", "c"]


@pytest.mark.parametrize(("rows_each", "most", "left"), [(1, 7, 4), (1, 5, 6), (neighbours.SMALL_ENTRIES, 5, 4)])
def test_very_many_small_records_are_not_asked_about_one_by_one(
    folder: Path, rows_each: int, most: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "ALONE_MAX", most)
    for module in (overview, pruning):
        monkeypatch.setattr(module, "RUN_RECORDS", 8)
    with OpLog.open(str(folder)) as log:
        for n in range(96):
            log.append("t", pa.record_batch({"n": [n] * rows_each, "s": [f"{n:03}"] * rows_each}))
        # All from 10 on by numbers, then six of the run from 8 on by texts, of which four may have what is wanted.
        sql = "SELECT DISTINCT n FROM t WHERE n > 10 AND s < '015'"
        engine = Engine(Config(state_bytes_max=0))
        assert 96 - counts(engine, log, sql).records_pruned == left
        assert sorted(row["n"] for row in rows(engine, log.snapshot(), sql)) == [11, 12, 13, 14]
        runs = engine._planner.cache.overview(log.snapshot(), log.snapshot().topics["t"]).runs
        assert [len(column) for column in runs._columns.values()] == [96 // 8]
        log.append("t", pa.record_batch({"n": [12] * rows_each, "s": ["012"] * rows_each}))
        assert sorted(row["n"] for row in rows(engine, log.snapshot(), sql)) == [11, 12, 13, 14]
        assert 97 - counts(engine, log, sql).records_pruned == left + 1, "it is in no full run yet"
        assert all(len(key) < 200 for _, key in engine._planner.cache._fragments)


def test_an_overview_of_no_files_is_empty(log: OpLog) -> None:
    log.append("t", pa.record_batch({"n": [1]}))
    snapshot = log.snapshot()
    topic = snapshot.topics["t"]
    none = ColumnCache(0).overview(snapshot, type(topic)(**{name: getattr(topic, name) for name in topic.__slots__} | {"files": Growing()}))
    assert (len(none), none.rows(None), none.together(None)[0][:]) == (0, 0, [])


ORDERED = [
    "SELECT n FROM t ORDER BY n {} LIMIT {}",
    "SELECT n, s FROM t WHERE n > -3 ORDER BY n {} LIMIT {}",
    "SELECT x FROM t ORDER BY x {} LIMIT {}",
    "SELECT s FROM t ORDER BY s {} LIMIT {}",
    "SELECT at FROM t WHERE x < 2 ORDER BY at {} LIMIT {}",
    "SELECT late FROM t ORDER BY late {} LIMIT {}",
    "SELECT u FROM t ORDER BY u {} LIMIT {}",
]


@pytest.mark.parametrize("seed", range(6))
def test_the_first_rows_of_very_many_records(folder: Path, small: None, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pruning, provider):
        monkeypatch.setattr(module, "ALONE_MAX", 4)
    for module in (overview, pruning):
        monkeypatch.setattr(module, "RUN_RECORDS", 8)
    chance, parts = random.Random(seed), list[pa.Table]()
    with OpLog.open(str(folder)) as log:
        for number in range(60):
            count = chance.choice([1, 1, 2, 3])
            values: dict[str, list[object]] = {
                "n": [chance.choice([None, number % 17, -number, (1 << 63) - 1, -(1 << 63)]) for _ in range(count)],
                "x": [chance.choice([None, 0.5, -0.0, float(number), math.inf, -math.inf, math.nan]) for _ in range(count)],
                "s": [chance.choice([None, "", "a", "b" * number]) for _ in range(count)],
                "at": [chance.choice([None, number, -number]) for _ in range(count)],
                "u": [chance.choice([None, number, (1 << 64) - 1]) for _ in range(count)],
            }
            types = {"n": pa.int64(), "x": pa.float64(), "s": pa.string(), "at": pa.timestamp("us", "UTC"), "u": pa.uint64()}
            if number >= 20:
                values["late"] = [chance.choice([None, number]) for _ in range(count)]
                types["late"] = pa.int32() if number < 40 else pa.int64()
            parts.append(pa.table({name: pa.array(each, types[name]) for name, each in values.items()}))
            log.append("t", parts[-1])
        snapshot = log.snapshot()
        plain = SessionContext(SessionConfig({"datafusion.sql_parser.map_string_types_to_utf8view": "false"}))
        plain.register_record_batches("t", [pa.concat_tables(parts, promote_options="permissive").to_batches()])
        engine = Engine(Config(state_bytes_max=0))
        for _ in range(60):
            order = " ".join([chance.choice(["", "DESC"]), chance.choice(["", "NULLS FIRST", "NULLS LAST"])])
            sql = chance.choice(ORDERED).format(order, chance.choice([1, 2, 5, 50]))
            first = sql.split()[1].strip(",")
            expected = [row[first] for batch in plain.sql(sql).collect() for row in batch.to_pylist()]
            assert [*map(str, (row[first] for row in rows(engine, snapshot, sql)))] == [*map(str, expected)], sql


def test_the_first_rows_are_looked_for_where_they_may_be(folder: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "ALONE_MAX", 4)
    with OpLog.open(str(folder)) as log:
        for n in range(100):
            log.append("t", pa.record_batch({"n": [n * 37 % 100], "s": [f"{n:03}"]}))
        for sql, read in (
            ("SELECT n FROM t ORDER BY n DESC LIMIT 3", 3),
            ("SELECT n FROM t ORDER BY n LIMIT 1", 1),
            ("SELECT n FROM t WHERE n < 50 ORDER BY n DESC LIMIT 2", 2),
        ):
            found = counts(Engine(Config()), log, sql)
            assert found.records_read == read, sql
        # By a text nothing tells where they are: all are read, small neighbours as one.
        found = counts(Engine(Config()), log, "SELECT s FROM t ORDER BY s LIMIT 1")
        assert (found.records_read, found.cache_misses) == (100, 6 + 4)


# Before anybody asks


def test_files_are_looked_into_before_anybody_asks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "WARMED_FILES", 5)
    with OpLog.open(str(folder)) as log:
        for topic, files in {"few": 2, "many": 4}.items():
            for number in range(files):
                log.append(topic, pa.record_batch({"n": [number]}))
    with OpLog.open(str(folder)) as log:
        engine, snapshot = Engine(Config()), log.snapshot()
        engine.warm(snapshot)
        assert {name: engine._planner.cache.lacks(snapshot.topics[name]) for name in ("few", "many")} == {"few": 0, "many": 4}
        assert rows(engine, snapshot, "SELECT count(*) AS queries FROM system.queries") == [{"queries": 1}], "it is no query of anybody's"


def test_what_is_damaged_is_told_to_whoever_asks(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    with OpLog.open(str(folder)) as log:
        for topic in "tu":
            log.append(topic, pa.record_batch({"n": [1]}))
        [file] = log.snapshot().topics["t"].files
    (folder / file.path).write_bytes(bytes(file.size))
    with OpLog.open(str(folder)) as log:
        engine, snapshot = Engine(Config()), log.snapshot()
        engine.warm(snapshot)
        assert engine._planner.cache.lacks(snapshot.topics["u"]) == 0, "another topic is none the worse"
        with pytest.raises(CorruptLog, match="topic 't'"):
            rows(engine, snapshot, "SELECT n FROM t")
