"""What is kept of one question does not change the answer to another, and is bounded."""

import operator
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import rows
from deltalake import DeltaTable
from test_reads import APPENDS, LITERALS, TIME, bag, entries, plain, reference

from flight_oplog import Config, OpLog, Snapshot
from flight_oplog.errors import Cancelled, NotFound, TooLarge
from flight_oplog.filters import TextIndex
from flight_oplog.growing import Growing
from flight_oplog.schema import VIEWS_SCHEMA
from flight_oplog.sql import repeated
from flight_oplog.sql.aggregates import Known, State, States
from flight_oplog.sql.engine import Engine
from flight_oplog.sql.statements import Statements
from flight_oplog.sql.stream import at_once

pytestmark = pytest.mark.usefixtures("eager")


# What is kept of one question, and the next one


def data(**columns: list[Any]) -> pa.RecordBatch:
    return pa.record_batch(columns)


def define(log: OpLog, name: str, definition: str) -> None:
    known = log.snapshot().topics.get("_views")
    row = {"view": name, "definition": f"CREATE VIEW {name} AS {definition}", "defined": TIME}
    log.append_own("_views", pa.RecordBatch.from_pylist([row], VIEWS_SCHEMA), known.next_offset if known else 0)


def ask(engine: Engine, snapshot: Snapshot, sql: str, times: int = 3, **how: Any) -> list[tuple[Any, ...]]:
    """Return the rows of a statement, the same however often it is asked."""
    found = []
    for _ in range(times):
        running = engine.run(sql, snapshot, **how)
        found.append([tuple(row.values()) for row in pa.Table.from_batches(list(running.batches), running.schema).to_pylist()])
    assert all(repr(each) == repr(found[0]) for each in found), (sql, found)
    return found[0]


@pytest.fixture
def fresh() -> Engine:
    return Engine(Config())


ENDLESS = "SELECT count(*) AS n FROM t p JOIN t q ON p.a * q.a % 7 <> 11 JOIN t r ON r.a * q.a % 7 <> 11"


@pytest.mark.parametrize("sql", ["SELECT n FROM v", "SELECT n FROM w WHERE n > 0", "SELECT sum(n) AS s FROM v"])
def test_a_short_text_over_a_view_of_much_is_ended_by_the_limit(log: OpLog, sql: str) -> None:
    log.append("t", data(a=list(range(5000))))
    define(log, "v", ENDLESS)
    define(log, "w", "SELECT n FROM v")
    with pytest.raises(TooLarge, match=r"statement_seconds_max \(1\)"):
        list(Engine(Config(statement_seconds_max=1)).run(sql, log.snapshot()).batches)


def test_what_follows_a_state_can_be_stopped_unless_it_is_plain(log: OpLog, fresh: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    log.append("t", data(a=[1, 2, 3], s=["x", "y", "x"]))
    define(log, "v", "SELECT s, count(*) AS n, repeat(s, 5) AS r FROM t GROUP BY s")
    made: list[str] = []
    monkeypatch.setattr(repeated, "at_once", lambda *given: made.append("at once") or at_once(*given))
    for sql, at_once_too in (("SELECT s, count(*) FROM t GROUP BY s", True), ("SELECT s, n, r FROM v", False)):
        made.clear()
        for new in range(3):
            rows(fresh, log.snapshot(), f"{sql} LIMIT {new + 1}")
        assert bool(made) == at_once_too


SUMS = "SELECT count(*) AS n, sum(a) AS s, max(a) AS m FROM t WHERE s = 'x'"


def test_an_older_snapshot_is_answered_as_it_was(log: OpLog, fresh: Engine) -> None:
    seen = []
    for number in range(4):
        log.append("t", data(a=[number, 10], s=["x", "y"]))
        seen.append(log.snapshot())
        assert ask(fresh, seen[-1], SUMS) == [(number + 1, sum(range(number + 1)), number)]
    for number in (1, 3, 0, 2):
        assert ask(fresh, seen[number], SUMS) == [(number + 1, sum(range(number + 1)), number)]
        assert ask(fresh, seen[number], "SELECT count(*), max(a) FROM t") == [(2 * number + 2, 10)]
        assert ask(fresh, log.snapshot(), f"SELECT count(*) FROM at_version('t', {seen[number].table_version})") == [(2 * number + 2,)]


@pytest.mark.parametrize("again", [data(a=[7], s=["x"]), data(a=[7.5], s=["x"]), data(s=["x", "x"], a=["b", "c"])])
def test_a_topic_begun_again_is_another_topic(log: OpLog, fresh: Engine, again: pa.RecordBatch) -> None:
    asked = [
        "SELECT count(*), min(a), max(a) FROM t",
        "SELECT s, count(a), max(a) FROM t WHERE s = 'x' GROUP BY s",
        "SELECT a FROM t ORDER BY a LIMIT 1",
    ]
    log.append("t", data(a=[1], s=["x"]))
    before = log.snapshot()
    old = [ask(fresh, before, sql) for sql in asked]
    log.drop("t")
    with pytest.raises(NotFound):
        ask(fresh, log.snapshot(), asked[0])
    log.append("t", again)
    values = sorted(again.column("a").to_pylist())
    assert [ask(fresh, log.snapshot(), sql) for sql in asked] == [
        [(len(values), values[0], values[-1])],
        [("x", len(values), values[-1])],
        [(values[0],)],
    ]
    assert [fresh.prepare(sql, log.snapshot()).schema.types[-1] for sql in asked] == [again.schema.field("a").type] * 3
    assert [ask(fresh, before, sql) for sql in asked] == old


def test_entries_that_were_removed_are_not_counted_from_memory(log: OpLog, fresh: Engine) -> None:
    for number in range(3):
        log.append("t", data(a=[number, number], s=["x", "y"]))
    snapshot = log.snapshot()
    topic = snapshot.topic("t")
    kept = replace(snapshot, topics={**snapshot.topics, "t": replace(topic, files=Growing(topic.files[1:]))})
    for each, numbers in ((snapshot, [0, 1, 2]), (kept, [1, 2]), (snapshot, [0, 1, 2])):
        assert ask(fresh, each, SUMS) == [(len(numbers), sum(numbers), 2)]
        assert ask(fresh, each, "SELECT count(*), min(a) FROM t") == [(2 * len(numbers), numbers[0])]


def test_a_state_goes_on_after_another_program_compacted(log: OpLog, fresh: Engine, folder: Path) -> None:
    for number in range(6):
        log.append("t", data(a=[number, 10], s=["x", "y"]))
        if number % 2:
            log.append("u", data(a=[number]))
        if number in (2, 4):
            DeltaTable(str(folder)).optimize.compact()
        assert ask(fresh, log.snapshot(), SUMS) == [(number + 1, sum(range(number + 1)), number)]
        assert ask(fresh, log.snapshot(), "SELECT s, count(*) FROM t GROUP BY s ORDER BY s") == [("x", number + 1), ("y", number + 1)]
        assert ask(fresh, log.snapshot(), "SELECT a FROM t WHERE s = 'x' ORDER BY a DESC LIMIT 1") == [(number,)]


def test_a_view_of_the_same_name_means_what_it_means_now(log: OpLog, fresh: Engine) -> None:
    log.append("t", data(a=[1, 2, 3], s=["x", "y", "x"]))
    for number, definition in enumerate(
        ["SELECT a FROM t", "SELECT -a AS a FROM t", "SELECT a FROM t WHERE s = 'x'", "SELECT s AS a FROM t"]
    ):
        define(log, "v", definition)
        assert ask(fresh, log.snapshot(), "SELECT count(*), min(a) FROM v") == [[(3, 1)], [(3, -3)], [(2, 1)], [(3, "x")]][number]
        assert ask(fresh, log.snapshot(), "SELECT a FROM v ORDER BY a LIMIT 1") == [[(1,)], [(-3,)], [(1,)], [("x",)]][number]


def test_names_without_a_schema_are_looked_up_where_the_client_is(log: OpLog, fresh: Engine) -> None:
    log.append("t", data(a=[1]))
    define(log, "v", "SELECT 5 AS a FROM t")
    for db_schema, width in (("public", 1), ("log", 6), ("public", 1)):
        assert len(fresh.prepare("SELECT * FROM t", log.snapshot(), db_schema=db_schema).schema) == width
        assert ask(fresh, log.snapshot(), "SELECT count(*), max(a) FROM t", db_schema=db_schema) == [(1, 1)]
    assert ask(fresh, log.snapshot(), "SELECT max(a) FROM v") == [(5,)]
    with pytest.raises(NotFound):
        ask(fresh, log.snapshot(), "SELECT max(a) FROM v", db_schema="log")
    assert ask(fresh, log.snapshot(), "SELECT count(*), sum(entries) FROM t", db_schema="records") == [(1, 1)]


SAME_SHAPE = [
    "SELECT s, count(*) AS n, avg(a) AS m FROM t GROUP BY s ORDER BY s",
    "SELECT s, count(*) AS n, avg(a) AS m, 7 AS seven FROM t GROUP BY s ORDER BY s",
    'SELECT count(*) * 2 AS "twice as many", s AS "The s", avg(a) FROM t GROUP BY s ORDER BY 2 DESC',
    "/* a tool's own words */ select s, count(*), avg(a) from t group by 1 having count(*) > 1 order by s",
    "SELECT max(n), min(m) FROM (SELECT s, count(*) AS n, avg(a) AS m FROM t GROUP BY s)",
    "SELECT * FROM (SELECT s, count(*) AS n, avg(a) AS m FROM t GROUP BY s) ORDER BY m DESC, s LIMIT 1",
]
OTHER_SHAPES = [
    "SELECT s, count(*) AS n, avg(a + 1) AS m FROM t GROUP BY s ORDER BY s",
    "SELECT s, count(*) AS n, avg(a + 2) AS m FROM t GROUP BY s ORDER BY s",
    "SELECT s, count(*) AS n, avg(a + 0.30000000000000004) AS m FROM t GROUP BY s ORDER BY s",
    "SELECT s, count(*) AS n, avg(a + 0.3) AS m FROM t GROUP BY s ORDER BY s",
    "SELECT s, count(*) AS n, avg(f + 1) AS m FROM t GROUP BY s ORDER BY s",  # renamed by the optimizer
    "SELECT s, count(a) AS n, avg(a) AS m FROM t GROUP BY s ORDER BY s",
    "SELECT s, count(*) FILTER (WHERE a > 1) AS n, avg(a) AS m FROM t GROUP BY s ORDER BY s",
    "SELECT s, count(*) AS n, avg(a) AS m FROM t WHERE a > 1 GROUP BY s ORDER BY s",
    "SELECT s, count(*) AS n, avg(a) AS m FROM t WHERE a >= 1 GROUP BY s ORDER BY s",
    "SELECT s, count(*) AS n, avg(a) AS m FROM (SELECT s, -a AS a FROM t) AS t GROUP BY s ORDER BY s",
    "SELECT s, count(*) AS n, avg(a) AS m FROM log.t GROUP BY s ORDER BY s",
    'SELECT s, count(*) AS n, avg("a + t.b") AS m FROM t GROUP BY s ORDER BY s',
    "SELECT s, count(*) AS n, avg(a + t.b) AS m FROM t GROUP BY s ORDER BY s",
    "SELECT max(s = 'q\") OR s = Utf8(\"x') AS m, count(*) FROM t",
    "SELECT max(s = 'q' OR s = 'x') AS m, count(*) FROM t",
    "SELECT count(*) FILTER (WHERE k = X'00010203040506070809FF') AS n, sum(a) FROM t",
    "SELECT count(*) FILTER (WHERE k = X'00010203040506070809FE') AS n, sum(a) FROM t",
    "SELECT b, count(*) AS n, avg(a) AS m FROM t GROUP BY b ORDER BY b",
    "SELECT s, b, count(*) AS n, avg(a) AS m FROM t GROUP BY s, b ORDER BY s, b",
    "SELECT date_trunc('day', w) AS d, count(*) AS n FROM t GROUP BY 1 ORDER BY 1",
    "SELECT date_trunc('hour', w) AS d, count(*) AS n FROM t GROUP BY 1 ORDER BY 1",
]


def shapes(number: int) -> pa.RecordBatch:
    keys = [bytes([*range(10), end]) for end in (254, 255, 255, 255)]
    columns = {
        "a": [number, 2, 3, None],
        "f": [0.5, number, None, 2.0],
        "s": ["x", "y", "x", "q"],
        "b": [5, 5, 6, number],
        "a + t.b": [100, 0, 0, 0],
        "k": keys,
    }
    return pa.record_batch(columns | {"w": [TIME, TIME, TIME.replace(hour=(TIME.hour + 1) % 24), TIME]})


def test_other_words_of_the_same_shape_are_answered_from_its_state(log: OpLog, fresh: Engine) -> None:
    nothing_kept = Engine(Config(state_bytes_max=0))
    for number in range(3):
        log.append("t", shapes(number))
        for place, sql in enumerate(SAME_SHAPE):
            running = fresh.run(sql, log.snapshot())
            found = pa.Table.from_batches(list(running.batches), running.schema)
            assert found.to_pylist() == rows(nothing_kept, log.snapshot(), sql)
            assert found.schema == nothing_kept.prepare(sql, log.snapshot()).schema
            # The first time the statement is run as it is, then its state is made; of later appends, only what is new is read.
            read = sum(counts.records_read for counts in running.counts.values())
            assert read == (1 if place == 0 or (place, number) == (1, 0) else 0), (place, number)


def test_different_values_within_a_group_have_a_state(log: OpLog, fresh: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """DataFusion makes two aggregates of it, and makes names up for what is between them."""
    brought = []
    brought_up = repeated.Repeated._brought_up
    monkeypatch.setattr(repeated.Repeated, "_brought_up", lambda *given: brought.append(brought_up(*given)) or brought[-1])
    sql = "SELECT s, count(DISTINCT a) AS d, max(a) AS m FROM t GROUP BY s ORDER BY s"
    for number in range(4):
        log.append("t", data(a=[number // 2, 10], s=["x", "y"]))
        assert ask(fresh, log.snapshot(), sql) == [("x", number // 2 + 1, number // 2), ("y", 1, 10)]
    assert len(brought) >= 4
    assert None not in brought


def test_other_shapes_have_states_of_their_own(log: OpLog, fresh: Engine) -> None:
    nothing_kept = Engine(Config(state_bytes_max=0))
    for number in range(3):
        log.append("t", shapes(number))
        for sql in (*SAME_SHAPE[:1], *OTHER_SHAPES):
            expected = [tuple(row.values()) for row in rows(nothing_kept, log.snapshot(), sql)]
            assert repr(ask(fresh, log.snapshot(), sql)) == repr(expected), sql
    states = [known.state for known in fresh._repeated._states._known.values()]
    assert len([state for state in states if state is not None]) == len(OTHER_SHAPES) + 1


@pytest.mark.parametrize(("entries", "is_looked_at"), [(9, False), (10, True)])
def test_a_text_that_was_never_asked_is_looked_at_where_its_topic_is_large(
    log: OpLog, fresh: Engine, monkeypatch: pytest.MonkeyPatch, entries: int, is_looked_at: bool
) -> None:
    monkeypatch.setattr(repeated, "LARGE_ENTRIES", 10)
    log.append("T", data(a=list(range(entries)), s=["x"] * entries))
    for sql in ('SELECT s, sum(a) FROM "T" GROUP BY s', 'SELECT s, sum(a), 1 FROM "T" GROUP BY s'):
        ask(fresh, log.snapshot(), sql, times=1)
    assert any(known.state is not None for known in fresh._repeated._states._known.values()) == is_looked_at


def test_what_changes_from_call_to_call_is_asked_again(log: OpLog, fresh: Engine) -> None:
    log.append("t", data(a=[1]))
    define(log, "v", "SELECT now() AS at, random() AS r FROM t")
    for sql in ("SELECT max(now()) FROM t", "SELECT max(at) FROM v", "SELECT max(r) FROM v", "SELECT random(), count(*) FROM t GROUP BY a"):
        assert len({repr(ask(fresh, log.snapshot(), sql, 1)) for _ in range(4)}) == 4, sql


def told(engine: Engine, snapshot: Snapshot, sql: str, **how: Any) -> tuple[list[tuple[Any, ...]], bool]:
    """Return the rows of a statement, and whether it read anything for them."""
    running = engine.run(sql, snapshot, **how)
    found = [tuple(row.values()) for batch in running.batches for row in batch.to_pylist()]
    return found, bool(running.counts)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT a, s FROM t ORDER BY a DESC LIMIT 2",
        "SELECT s, a + 1 AS b FROM public.t AS x WHERE a > 1 ORDER BY b DESC LIMIT 2",
        "SELECT _offset, a FROM log.t ORDER BY _offset DESC LIMIT 2",
        "SELECT DISTINCT s FROM (SELECT s FROM t WHERE a <> 0) AS u ORDER BY s",
        "SELECT a FROM t WHERE s = 'x' ORDER BY a",
        "SELECT s, count(DISTINCT a) AS n, sum(a) AS m FROM t GROUP BY s ORDER BY n, s",
        "SELECT a FROM v ORDER BY a LIMIT 3",
    ],
)
def test_a_small_answer_is_given_again_until_the_topic_grows(log: OpLog, fresh: Engine, sql: str) -> None:
    define(log, "v", "SELECT a FROM t WHERE a > 0")
    log.append("t", data(a=[1, 2, 3], s=["x", "y", "x"]))
    log.append("other", data(a=[1]))
    for number in range(3):
        seen = log.snapshot()
        answers = [told(fresh, seen, sql) for _ in range(4)]
        assert all(found == answers[0][0] for found, _ in answers)
        assert [has_read for _, has_read in answers[-2:]] == [False, False]
        log.append("other", data(a=[1]))
        assert told(fresh, log.snapshot(), sql) == (answers[0][0], False), "another topic is no matter"
        log.append("t", data(a=[10 + number], s=[f"z{number}"]))
        found, has_read = told(fresh, log.snapshot(), sql)
        assert has_read
        assert found == ask(Engine(Config(state_bytes_max=0)), log.snapshot(), sql)
        assert told(fresh, seen, sql)[0] == answers[0][0]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT a, random() AS r FROM t ORDER BY a LIMIT 1",
        "SELECT a FROM t WHERE now() > TIMESTAMP '2026-01-01' ORDER BY a LIMIT 1",
        "SELECT t.a FROM t JOIN other ON t.a = other.a ORDER BY t.a LIMIT 1",
        "SELECT a FROM t WHERE a IN (SELECT a FROM other) ORDER BY a LIMIT 1",
        "SELECT topic FROM system.topics ORDER BY topic LIMIT 1",
        "SELECT entries FROM records.t ORDER BY entries LIMIT 1",
        "SELECT a FROM at_version('t', 2) ORDER BY a LIMIT 1",
        "EXPLAIN SELECT a FROM t ORDER BY a LIMIT 1",
    ],
)
def test_what_may_be_another_answer_is_made_anew(log: OpLog, fresh: Engine, sql: str) -> None:
    log.append("t", data(a=[1, 2, 3]))
    log.append("other", data(a=[1, 2]))
    for _ in range(4):
        list(fresh.run(sql, log.snapshot()).batches)
    assert not any(known.answer for known in fresh._repeated._states._known.values())


def test_how_large_an_answer_is_given_again(log: OpLog, fresh: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    log.append("t", data(a=list(range(10_000))))
    sql = "SELECT a FROM t WHERE a >= 0 ORDER BY a LIMIT {}"
    size = 8 * 100
    monkeypatch.setattr(repeated, "ANSWER_BYTES_MAX", size)
    for limit, is_read in ((100, False), (101, True)):
        for _ in range(3):
            found = told(fresh, log.snapshot(), sql.format(limit))
        assert found == ([(a,) for a in range(limit)], is_read)
    [answer] = [known.answer for known in fresh._repeated._states._known.values() if known.answer]
    held = sum(buffer.size for batch in answer.batches for buffer in batch.column(0).buffers() if buffer is not None)
    assert held < 2 * size, "and not what it was cut out of"
    nothing = Engine(Config(state_bytes_max=0))
    assert [told(nothing, log.snapshot(), sql.format(1)) for _ in range(3)] == [([(0,)], True)] * 3


def test_an_answer_that_is_given_again_comes_in_pieces_as_small(log: OpLog) -> None:
    log.append("t", data(a=list(range(10_000))))
    engine = Engine(Config(message_bytes_max=20_000))
    for time in range(4):
        running = engine.run("SELECT a FROM t WHERE a >= 0 ORDER BY a", log.snapshot())
        batches = list(running.batches)
        assert bool(running.counts) == (time < 2)
        assert sum(batch.num_rows for batch in batches) == 10_000
        assert max(batch.nbytes for batch in batches) <= 20_000


def test_rows_that_weigh_nothing_count_all_the_same(log: OpLog, fresh: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    log.append("t", data(a=list(range(100))))
    monkeypatch.setattr(repeated, "ANSWER_BYTES_MAX", 99)
    assert [told(fresh, log.snapshot(), "SELECT NULL AS x FROM t WHERE a >= 0")[1] for _ in range(4)] == [True] * 4


def test_texts_that_never_come_again_drive_no_state_out(log: OpLog, fresh: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    log.append("t", data(a=[1, 2, 3], s=["x", "y", "x"]))
    monkeypatch.setattr(repeated, "SLOW_KEPT", 10)
    assert ask(fresh, log.snapshot(), "SELECT s, sum(a) AS n FROM t GROUP BY s ORDER BY s") == [("x", 4), ("y", 2)]
    before = len(fresh._repeated._states._known)
    for number in range(11):
        assert told(fresh, log.snapshot(), f"SELECT a FROM t WHERE a > {number}")[1]
    assert len(fresh._repeated._states._known) == before
    assert len(fresh._repeated._slow) == 10


def test_values_bound_to_a_statement_are_part_of_what_is_asked(log: OpLog, fresh: Engine) -> None:
    log.append("t", data(a=[1, 2, 3]))
    for _ in range(3):
        for value in (1, 2):
            how = {"parameters": pa.record_batch({"$1": [value]})}
            assert told(fresh, log.snapshot(), "SELECT a FROM t WHERE a > $1 ORDER BY a", **how)[0] == [(a,) for a in range(value + 1, 4)]


def test_a_state_that_would_be_too_large_is_none(log: OpLog, fresh: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated, "STATE_ROWS_MAX", 5)
    log.append("t", data(a=list(range(9))))
    assert len(ask(fresh, log.snapshot(), "SELECT a, count(*) FROM t GROUP BY a ORDER BY a")) == 9
    assert [(known.is_unfit, known.state) for known in fresh._repeated._states._known.values()] == [(True, None)] * 2  # shape and text


@pytest.mark.parametrize("sizes", [{}, {"cache_bytes_max": 0, "state_bytes_max": 0}, {"cache_bytes_max": 3000, "state_bytes_max": 300}])
def test_many_who_ask_while_others_append_see_each_their_snapshot(folder: Path, sizes: Any) -> None:
    engine = Engine(Config(**sizes))
    failures: list[BaseException] = []

    def asks(number: int) -> None:
        try:
            for turn in range(15):
                snapshot = log.snapshot()
                n = snapshot.topic("t").next_offset
                assert ask(engine, snapshot, "SELECT count(*), max(a), sum(a) FROM t", 1) == [(n, n - 1, n * (n - 1) // 2)]
                assert ask(engine, snapshot, "SELECT count(*), max(a) FROM t", 1) == [(n, n - 1)]
                assert ask(engine, snapshot, "SELECT a FROM t ORDER BY a DESC LIMIT 3", 1) == [(n - 1,), (n - 2,), (n - 3,)]
                place = (number * 7 + turn) % n
                assert ask(engine, snapshot, f"SELECT a FROM t WHERE k = '{place % 50:016}'", 1).count((place,)) == 1
                found = ask(engine, snapshot, "SELECT a % 3 AS g, count(*) FROM t GROUP BY a % 3 ORDER BY g", 1)
                assert found == [(g, len(range(g, n, 3))) for g in range(3)]
        except BaseException as error:
            failures.append(error)

    with OpLog.open(str(folder), Config(record_entries_max=40)) as log:
        for turn in range(15):
            place = turn * 60
            log.append("t", data(a=list(range(place, place + 60)), k=[f"{each % 50:016}" for each in range(place, place + 60)]))
            if turn == 0:
                threads = [threading.Thread(target=asks, args=(number,)) for number in range(4)]
                for thread in threads:
                    thread.start()
        for thread in threads:
            thread.join()
    assert not failures, failures[0]
    assert engine._repeated._states._bytes <= engine._repeated._states._bytes_max
    assert engine._planner.cache._bytes <= engine._planner.cache._bytes_max
    kept = [*engine._planner.cache._records.values(), *engine._planner.cache._together.values()]
    assert engine._planner.cache._bytes == sum(each.nbytes for each in kept)
    assert engine._repeated._states._bytes == sum(each.nbytes for each in engine._repeated._states._known.values())


def test_a_text_is_found_by_its_beginning_within_some_offsets(folder: Path, fresh: Engine) -> None:
    with OpLog.open(str(folder), Config(record_entries_max=64)) as log:
        log.append("t", data(k=[f"{place % 40:03}-{place % 7:020}" for place in range(200)], a=list(range(200))))
        for first, last in ((0, 200), (70, 75), (63, 65), (199, 200), (5, 180)):
            for place in (3, 64, 71, 199):
                wanted = f"{place % 40:03}-{place % 7:020}"
                expected = [(each,) for each in range(first, last) if f"{each % 40:03}-{each % 7:020}" == wanted]
                assert ask(fresh, log.snapshot(), f"SELECT a FROM t WHERE k = '{wanted}'", offsets=(first, last)) == expected
        assert any(isinstance(each, TextIndex) for each in fresh._planner.cache._records.values())


# What records' bounds tell


def test_bounds_tell_what_the_entries_do(log: OpLog, fresh: Engine, folder: Path) -> None:
    expected = None
    session = plain(*(entries(number, *each) for number, each in enumerate(APPENDS)))
    for number, (count, schema, strange) in enumerate(APPENDS):
        log.append("t", entries(number, count, schema, strange))
        log.append("nothing", pa.table({"a": pa.nulls(2, pa.int64()), "n": pa.nulls(2), "s": pa.nulls(2, pa.string())}))
    log.append("empty", pa.record_batch({"a": [1]}).slice(1))
    for compacted in (False, True):
        if compacted:
            DeltaTable(str(folder)).optimize.compact()
        snapshot = log.snapshot()
        for name in LITERALS:
            for sql in (f"SELECT count({name}), min({name}), max({name}) FROM t", f"SELECT count(*), count(1), max({name}) FROM t"):
                assert bag(rows(fresh, snapshot, sql)) == bag(reference(session, sql)), sql
        found = [ask(fresh, snapshot, f"SELECT count(*), count({n}), min({n}), max({n}) FROM nothing") for n in ("a", "n", "s")]
        assert found == [[(10, 0, None, None)]] * 3
        assert expected in (None, found)
        expected = found
        if "empty" in snapshot.topics:
            assert ask(fresh, snapshot, "SELECT count(*), count(a), min(a), max(a) FROM empty") == [(0, 0, None, None)]


# Limits


def test_states_and_indexes_stay_within_their_bytes(folder: Path) -> None:
    states = States(1000)
    for number in range(5):
        states.keep_state(number, State(0, 1, pa.table({"k0": range(50)})))
    assert ([*states._known], states._bytes) == ([3, 4], 800)
    assert states.asked(0) == Known()
    states.asked(3)
    states.keep_state(5, State(0, 1, pa.table({"k0": range(50)})))
    assert [*states._known] == [3, 5], "the one that was asked for stays"
    with OpLog.open(str(folder), Config(record_entries_max=500, compression="lz4")) as log:
        log.append("t", data(k=[f"{place * 7919 % 6000:016}" for place in range(6000)], a=list(range(6000))))
        engine = Engine(Config(cache_bytes_max=60_000))
        for turn in range(60):
            assert len(ask(engine, log.snapshot(), f"SELECT a FROM t WHERE k >= '' AND k = '{turn * 31:016}'", 1)) == 1
            assert engine._planner.cache._bytes <= 60_000
            assert engine._planner.cache._bytes == sum(each.nbytes for each in engine._planner.cache._records.values())


# Known to be wrong


def bound(value: Any, kind: pa.DataType) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([value], kind)], ["1"])


def test_an_aggregate_has_parameters(log: OpLog, fresh: Engine) -> None:
    log.append("t", data(a=[1, 2, 3]))
    for value in (0, 1, 2, 1):
        assert ask(fresh, log.snapshot(), "SELECT count(*) FROM t WHERE a > $1", parameters=bound(value, pa.int64())) == [(3 - value,)]


def test_a_parameter_of_another_type_is_another_parameter(log: OpLog, fresh: Engine) -> None:
    log.append("t", data(a=[1, 2, 3]))
    for kind in (pa.int64(), pa.timestamp("s"), pa.duration("ms")):
        [(_, found)] = ask(fresh, log.snapshot(), "SELECT count(*), $1 FROM t", parameters=bound(5, kind))
        assert pa.array([found]).cast(kind) == pa.array([5], kind)


@pytest.mark.parametrize("shown", ["count(*)", "count(a)", "max(a)", "min(a)"])
def test_a_filtered_aggregate_is_not_told_by_bounds(log: OpLog, fresh: Engine, shown: str) -> None:
    log.append("t", data(a=[1, 2, 3, None]))
    assert ask(fresh, log.snapshot(), f"SELECT {shown} FILTER (WHERE a = 2) FROM t") == [
        (2 if "a)" in shown and "count" not in shown else 1,)
    ]


def test_nulls_are_not_counted(log: OpLog, fresh: Engine) -> None:
    log.append("t", data(a=[1, 2]))
    assert ask(fresh, log.snapshot(), "SELECT count(NULL) FROM t") == [(0,)]


def test_two_logs_of_one_engine_are_told_apart(tmp_path: Path, fresh: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated, "id", lambda each: 1, raising=False)  # as it happens once in some thirty times
    for number in range(2):
        with OpLog.open(str(tmp_path / f"log{number}")) as log:
            log.append("t", data(a=[number]))
            assert ask(fresh, log.snapshot(), "SELECT max(a) FROM t") == [(number,)]


def test_one_large_state_leaves_the_others(fresh: Engine) -> None:
    states = States(1000)
    states.keep_state("small", State(0, 1, pa.table({"k0": range(50)})))
    states.keep_state("large", State(0, 1, pa.table({"k0": range(500)})))
    assert {name: known.is_unfit for name, known in states._known.items()} == {"small": False, "large": True}


def test_a_state_does_not_grow_past_its_limit(log: OpLog, fresh: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated, "STATE_ROWS_MAX", 10)
    for number in range(4):
        log.append("t", data(a=list(range(number * 8, number * 8 + 8))))
        assert len(ask(fresh, log.snapshot(), "SELECT a, count(*) FROM t GROUP BY a ORDER BY a")) == number * 8 + 8
    assert all(known.state is None or known.state.rows.num_rows <= 10 for known in fresh._repeated._states._known.values())


def test_a_state_of_many_bytes_is_given_up_early(log: OpLog, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, gathered = Engine(Config(state_bytes_max=1 << 20)), []
    monkeypatch.setattr(engine._repeated._states, "keep_state", lambda key, state: gathered.append(state.rows.nbytes))
    log.append("t", data(a=list(range(400))))
    assert len(ask(engine, log.snapshot(), "SELECT a, max(repeat(CAST(a AS VARCHAR), 40000)) FROM t GROUP BY a ORDER BY a", 2)) == 400
    assert all(size <= 4 << 20 for size in gathered)


def test_a_large_answer_of_a_state_comes_piece_by_piece(log: OpLog) -> None:
    engine = Engine(Config(message_bytes_max=1 << 20))
    log.append("t", data(a=list(range(40_000))))
    for _ in range(2):
        running = engine.run(
            "SELECT repeat(CAST(a AS VARCHAR), 200) AS big FROM (SELECT a, count(*) AS n FROM t GROUP BY a)", log.snapshot()
        )
        assert operator.length_hint(running.batches) <= 4
        assert sum(batch.num_rows for batch in running.batches) == 40_000


def test_a_remembered_schema_holds_no_snapshot(log: OpLog, fresh: Engine) -> None:
    log.append("t", data(a=[1]))
    fresh.prepare("SELECT a FROM t", log.snapshot())
    assert len(fresh._prepared) == 1
    assert not any(isinstance(part, Snapshot) for found in fresh._prepared.values() for part in found)


def test_what_follows_a_state_can_be_stopped(log: OpLog, fresh: Engine) -> None:
    log.append("t", data(a=list(range(20_000))))
    sql = "SELECT md5(repeat(CAST(a AS VARCHAR), 20)) AS x FROM (SELECT DISTINCT a FROM t)"
    for _ in range(2):
        assert len(ask(fresh, log.snapshot(), sql, 1)) == 20_000
    with pytest.raises(Cancelled):
        ask(fresh, log.snapshot(), sql, 1, stopped=lambda: True)


def test_what_was_asked_with_is_counted_too(log: OpLog) -> None:
    engine = Engine(Config(state_bytes_max=100_000))
    log.append("t", data(a=[1, 2, 3]))
    for number in range(20):
        ask(engine, log.snapshot(), "SELECT count(*) FROM t WHERE $1 > 'b'", 2, parameters=bound(f"{number}" + "x" * 50_000, pa.string()))
    assert sum(len(part) for key in engine._repeated._states._known for part in key if isinstance(part, bytes | str)) <= 100_000


@pytest.mark.parametrize("where", ["f > 0", "k NOT IN ('A', 'Z', 'Y', 'X', 'W')"])
def test_an_insert_selects_what_a_query_does(log: OpLog, fresh: Engine, where: str) -> None:
    log.append("t", data(k=["A", "B", None], f=[1.0, float("nan"), None]))
    expected = ["A", "B"] if where == "f > 0" else ["B"]
    Statements(log, fresh, log.config).execute(f"CREATE TABLE c AS SELECT k FROM t WHERE {where}")
    assert ask(fresh, log.snapshot(), "SELECT k FROM c ORDER BY k") == [(each,) for each in expected]
