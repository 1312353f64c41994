"""What is known of all of a topic's records: kept while it grows, and nobody can tell by the answers."""

import itertools
import math
import random
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import rows
from datafusion import SessionConfig, SessionContext
from test_engine import counts
from test_neighbours import record

from flight_oplog import Config, OpLog, neighbours, overview, provider, pruning
from flight_oplog.cache import ColumnCache
from flight_oplog.growing import Growing
from flight_oplog.overview import Listed, Overview
from flight_oplog.records import RecordMeta
from flight_oplog.sql.engine import Engine
from flight_oplog.store import Snapshot


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "RECORDS_LEAST", 3)
    monkeypatch.setattr(neighbours, "RANGE_ENTRIES", 16)


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
    for number in range(overview.COLUMNS_KEPT):
        listed.column(number, squares)
    assert "squares" not in listed._columns, "no more are kept"
    assert listed.column("squares", noted).tolist() == squares(list(range(13))).tolist()
    assert listed.as_of(Growing(range(5)))._columns == {}, "of other items nothing is known"


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
        taken = state.taken(None, is_held=lambda found: False)
        assert flat(taken) == records
        # A shorter one may know more: what came afterwards tells that its last range is whole.
        assert {one.key for one in whole.taken(None, is_held=lambda found: False)[0]} - {one.key for one in taken[0]} <= {
            each.key for one in taken[0] for each in one.members
        }
        some = np.array([place for place in range(len(records)) if chance.random() < 0.9], np.int64)
        assert flat(state.taken(some, is_held=lambda found: False)) == [records[place] for place in some]
        held = flat(state.taken(some, is_held=lambda found: True))
        assert {*some.tolist()} <= {records.index(each) for each in held}
        assert held == sorted(held, key=lambda each: each.first_offset)
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
        taken = found.taken(np.array(part), is_held=lambda whole, held=held: held)[0]
        assert [len(one.members) for one in taken if one.members] == members
    least = -(-neighbours.RANGE_ENTRIES // overview.HELD_PART)
    assert least == 1


def test_too_small_a_part_is_read_alone() -> None:
    count = neighbours.RANGE_ENTRIES // 8
    found = Overview.of([[record(place, place * 8, 8) for place in range(count + 1)]], 0)
    for wanted in (count // overview.HELD_PART - 1, count // overview.HELD_PART):
        taken = found.taken(np.arange(5, 5 + wanted), is_held=lambda whole: True)[0]
        assert (len(taken) == 1) == (wanted * overview.HELD_PART >= count)


def test_planning_looks_at_what_was_added_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str] = []
    records_of = Snapshot.records_of
    monkeypatch.setattr(
        Snapshot,
        "records_of",
        lambda snapshot, topic, file, **more: (looked_at.append(file.path), records_of(snapshot, topic, file, **more))[1],
    )
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
        kept = engine._planner.cache._overviews["t"][1]
        assert [each.first_offset for each in kept.records.items] == list(range(len(kept.records.items)))


def test_topics_that_are_remembered_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flight_oplog.cache.TOPICS_KEPT", 2)
    engine = Engine(Config(state_bytes_max=0))
    with OpLog.open(str(folder)) as log:
        for name in "abc":
            log.append(name, pa.record_batch({"n": [1]}))
        for name in "abcabc":
            assert rows(engine, log.snapshot(), f"SELECT sum(n) AS s FROM {name} WHERE n > 0") == [{"s": 1}]
        assert [*engine._planner.cache._overviews] == ["b", "c"]


@pytest.mark.parametrize(("rows_each", "most", "left"), [(1, 8, 4), (1, 7, 8), (neighbours.SMALL_ENTRIES, 7, 4)])
def test_very_many_small_records_are_not_asked_about_one_by_one(
    folder: Path, rows_each: int, most: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "ALONE_MAX", most)
    with OpLog.open(str(folder)) as log:
        for n in range(100):
            log.append("t", pa.record_batch({"n": [n] * rows_each, "s": [f"{n:03}"] * rows_each}))
        # 89 of them by numbers, then eight that lie together by texts, of which four may have what is wanted.
        sql = "SELECT DISTINCT n FROM t WHERE n > 10 AND s < '015'"
        assert 100 - counts(Engine(Config()), log, sql).records_pruned == left
        assert sorted(row["n"] for row in rows(Engine(Config()), log.snapshot(), sql)) == [11, 12, 13, 14]


def test_an_overview_of_no_files_is_empty(log: OpLog) -> None:
    log.append("t", pa.record_batch({"n": [1]}))
    snapshot = log.snapshot()
    topic = snapshot.topics["t"]
    none = ColumnCache(0).overview(snapshot, type(topic)(**{name: getattr(topic, name) for name in topic.__slots__} | {"files": Growing()}))
    assert (len(none), none.rows(None), none.taken(None, is_held=lambda found: False)[0][:]) == (0, 0, [])


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
