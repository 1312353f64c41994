"""SQL over a snapshot: names, isolation, projection and filters that reach the provider, refusals."""

import functools
import math
import operator
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from conftest import SEED, rows
from datafusion import SessionContext
from test_states import define

from flight_oplog import Config, OpLog, filters, gathering, provider
from flight_oplog.cache import ColumnCache, Decoded, ScanCounts
from flight_oplog.errors import Cancelled, NotFound, OplogError, RequestError, TooLarge, TryAgain, Unsupported
from flight_oplog.filters import Filter
from flight_oplog.numbers import ends, numbers
from flight_oplog.provider import EntriesTable
from flight_oplog.scans import ScanContext
from flight_oplog.sql.engine import Engine

Query = Callable[..., list[dict[str, Any]]]

COMPARES = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
ARROWS = {">": pc.greater, ">=": pc.greater_equal, "<": pc.less, "<=": pc.less_equal, "==": pc.equal}


def counts(engine: Engine, log: OpLog, sql: str) -> Any:
    """Run `sql` and return what its only scan touched."""
    running = engine.run(sql, log.snapshot())
    for _ in running.batches:
        pass
    [found] = running.counts.values()
    return found


def test_namespaces_show_entries_log_columns_records_and_topics(log: OpLog, query: Query) -> None:
    log.append("events", SEED)
    assert query("SELECT * FROM events") == query("SELECT * FROM oplog.public.events") == SEED.to_pylist()
    [first, second] = query("SELECT * FROM log.events ORDER BY _offset")
    assert list(first) == ["name", "node_id", "_offset", "_timestamp", "_producer", "_sequence", "_schema_id"]
    assert (first["_offset"], second["_offset"], first["_producer"], first["_sequence"]) == (0, 1, None, None)
    assert query("SELECT first_offset, entries, octet_length(encode(content, 'hex')) > 500 AS big FROM records.events") == [
        {"first_offset": 0, "entries": 2, "big": True}
    ]
    assert query("SELECT topic, entries, next_offset, columns, schemas, files, records FROM system.topics ORDER BY topic") == [
        {"topic": "_schemas", "entries": 1, "next_offset": 1, "columns": 5, "schemas": 1, "files": 1, "records": 1},
        {"topic": "events", "entries": 2, "next_offset": 2, "columns": 2, "schemas": 1, "files": 1, "records": 1},
    ]
    assert query("SELECT topic, number FROM log._schemas") == [{"topic": "events", "number": 1}]
    with pytest.raises(NotFound):
        query("SELECT * FROM _schemas")


def test_information_schema_lists_tables_and_columns(log: OpLog, query: Query) -> None:
    log.append("events", SEED)
    named = query("SELECT table_schema, table_name FROM information_schema.tables WHERE table_schema <> 'information_schema' ORDER BY 1, 2")
    assert [(row["table_schema"], row["table_name"]) for row in named] == [
        ("log", "_schemas"),
        ("log", "events"),
        ("public", "events"),
        ("records", "_schemas"),
        ("records", "events"),
        ("system", "metrics"),
        ("system", "queries"),
        ("system", "settings"),
        ("system", "topics"),
    ]
    columns = query(
        "SELECT column_name, data_type, is_nullable FROM information_schema.columns WHERE table_schema = 'public' ORDER BY ordinal_position"
    )
    assert columns == [
        {"column_name": "name", "data_type": "Utf8", "is_nullable": "YES"},
        {"column_name": "node_id", "data_type": "Utf8", "is_nullable": "YES"},
    ]
    assert [row["column_name"] for row in query("DESCRIBE events")] == ["name", "node_id"]
    assert ("public", "events") in {(row["table_schema"], row["table_name"]) for row in query("SHOW TABLES")}


def test_a_query_is_pinned_to_its_snapshot(log: OpLog, engine: Engine) -> None:
    log.append("events", SEED)
    snapshot = log.snapshot()
    running = engine.run("SELECT count(*) AS n FROM events AS a, events AS b", snapshot)
    later = engine.run("SELECT * FROM events", snapshot)
    log.append("events", SEED)
    log.append("more", SEED)
    assert pa.Table.from_batches(running.batches).to_pylist() == [{"n": 4}], "both scans see the same two entries"
    assert pa.Table.from_batches(later.batches).num_rows == 2
    assert rows(engine, log.snapshot(), "SELECT count(*) AS n FROM events AS a, events AS b") == [{"n": 16}]
    with pytest.raises(NotFound):
        rows(engine, snapshot, "SELECT * FROM more")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/fd to see what is open")
def test_engines_leave_nothing_open(log: OpLog) -> None:
    """Whoever embeds the log may make an engine for each of many logs."""

    def used() -> None:
        engine = Engine(Config())
        assert rows(engine, log.snapshot(), "SELECT count(*) AS n FROM system.settings GROUP BY true")[0]["n"] > 1

    used()
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(10):
        used()
    assert len(set(os.listdir("/proc/self/fd")) - before) < 10


def test_count_reads_no_content(log: OpLog, engine: Engine) -> None:
    log.append("t", pa.record_batch({"a": list(range(1000))}))
    log.append("t", pa.record_batch({"a": list(range(500))}))
    found = counts(engine, log, "SELECT count(*) FROM t")
    assert (found.records, found.records_read, found.content_bytes) == (2, 0, 0)
    found = counts(engine, log, "SELECT count(*) FROM log.t WHERE _offset >= 1200")
    assert (found.files_pruned, found.records, found.records_pruned, found.content_bytes) == (1, 1, 0, 0)


def test_filters_prune_files_and_records_before_content_is_read(log: OpLog, engine: Engine) -> None:
    day = 86_400_000_000
    for number in range(5):
        times = pa.array([number * day + i for i in range(10)], pa.timestamp("us", "UTC"))
        log.append(
            "t", pa.record_batch({"at": times, "n": [number * 10 + i for i in range(10)], "s": [f"k{number}-{i}" for i in range(10)]})
        )
    found = counts(engine, log, "SELECT * FROM t WHERE at >= '1970-01-04T00:00:00Z' AND at < '1970-01-05T00:00:00Z'")
    assert (found.files, found.files_pruned, found.records_read) == (5, 4, 1)
    found = counts(engine, log, "SELECT at FROM t WHERE n IN (7, 33)")
    assert (found.records, found.records_pruned, found.records_read) == (5, 3, 2)
    found = counts(engine, log, "SELECT at FROM t WHERE s = 'k2-3' OR n = 49")
    assert (found.records_pruned, found.records_read) == (3, 2)
    found = counts(engine, log, "SELECT at FROM t WHERE s > 'k9'")
    assert (found.records_pruned, found.records_read) == (5, 0)
    found = counts(engine, log, "SELECT at FROM t WHERE n IS NULL")
    assert (found.records_pruned, found.records_read) == (5, 0)


def test_only_the_columns_a_query_needs_are_decoded(folder: Any) -> None:
    engine = Engine(Config())
    with OpLog.open(str(folder), Config(compression="lz4")) as log:
        log.append("t", pa.record_batch({"a": [1, 2], "b": ["x", "y"], "c": [[1], [2]]}))
        rows(engine, log.snapshot(), "SELECT a FROM t WHERE b = 'x'")
        [decoded] = engine._planner.cache._records.values()
        assert set(decoded.columns) == {"a", "b"}


def test_the_cache_never_changes_an_answer(folder: Any) -> None:
    with OpLog.open(str(folder)) as log:
        for number in range(4):
            log.append("t", pa.record_batch({"a": list(range(number, 1000, 4)), "s": [str(i) * 10 for i in range(number, 1000, 4)]}))
        expected = None
        for size in (0, 20_000, 1 << 30):
            engine = Engine(Config(cache_bytes_max=size))
            for _ in range(2):
                found = [
                    rows(engine, log.snapshot(), sql)
                    for sql in (
                        "SELECT * FROM t ORDER BY a",
                        "SELECT sum(a) AS x FROM t WHERE s LIKE '1%'",
                        "SELECT count(*) AS n, max(s) AS m FROM t WHERE a % 7 = 0",
                    )
                ]
                expected = expected or found
                assert found == expected
            assert engine._planner.cache._bytes <= size
            assert (engine._planner.cache.hits > 0) == (size > 100_000)


def test_columns_that_are_summed_up_again_are_kept_in_large_pieces(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[list[int] | None] = []
    together = EntriesTable._together

    def noted(*given: Any) -> list[pa.RecordBatch] | None:
        found = together(*given)
        handed.append(found and [batch.num_rows for batch in found])
        return found

    monkeypatch.setattr(EntriesTable, "_together", noted)
    for module in (gathering, provider):
        monkeypatch.setattr(module, "TOGETHER_ROWS", 125_000)
    with OpLog.open(str(folder)) as log:
        numbers = list(range(150_000))
        many = pa.record_batch({"a": numbers, "s": [f"s{i % 7}" for i in numbers], "pad": ["x" * 22] * len(numbers)})
        log.append("t", many)  # three messages
        log.append("t", pa.record_batch({"a": [1]}))  # columns less: it is read as it is
        plain = SessionContext()
        plain.register_record_batches("t", [[many.select(["a", "s"]), pa.record_batch({"a": [1], "s": pa.nulls(1, pa.string())})]])
        [content] = log._store.reader.contents([next(iter(log.snapshot().records("t")))])
        for size, kept in ((1 << 27, True), (content.size + 1000, False), (0, False)):
            engine = Engine(Config(cache_bytes_max=size, state_bytes_max=0))
            for time in range(3):
                sql = f"SELECT s, sum(a + {time}) AS total, count(*) AS n FROM t GROUP BY s ORDER BY s"
                handed.clear()
                assert rows(engine, log.snapshot(), sql) == plain.sql(sql).to_pylist()
                assert sorted(handed, key=bool) == [None, [100_000, 50_000] if kept and time else None]
            assert engine._planner.cache._bytes <= size
        handed.clear()
        for _ in range(3):  # entries themselves are handed on as they are
            assert len(rows(engine, log.snapshot(), "SELECT a, s FROM t WHERE a >= 0")) == 150_001
        assert handed == [None] * len(handed)


def test_columns_that_are_stored_in_large_pieces_are_shown_as_they_are(folder: Any) -> None:
    with OpLog.open(str(folder), Config(compression="none")) as log:
        numbers = np.arange(150_000)
        log.append("t", pa.record_batch({"a": numbers, "s": [f"s{n % 7}" for n in numbers]}))
        engine = Engine(Config(cache_bytes_max=5_000_000, state_bytes_max=0))
        for time in range(3):
            found = rows(engine, log.snapshot(), f"SELECT s, sum(a + {time}) AS total FROM t GROUP BY s ORDER BY s")
            assert sum(row["total"] for row in found) == int(numbers.sum()) + time * len(numbers)
        cache = engine._planner.cache
        [record] = log.snapshot().records("t")
        assert [key[1:] for key in cache._together] == [("s", "string_view")], "texts are made into views, and numbers are not copied"
        stored = cache._records[(record.key,)]
        assert isinstance(stored, Decoded)
        shown = cache.together(record, pa.schema([("a", pa.int64())]), gathering.TOGETHER_ROWS, ScanCounts(), pytest.fail)
        assert shown is not None
        assert [id(piece) for piece in shown[0]] == [id(piece) for piece in stored.columns["a"]]


def test_a_run_of_a_record_is_cut_out_of_its_large_pieces(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []

    def noted(column: Sequence[pa.Array]) -> np.ndarray:
        compared.append(len(column[0]))
        return numbers(column)

    monkeypatch.setattr(filters, "numbers", noted)
    with OpLog.open(str(folder)) as log:
        for n in (np.arange(200_000), np.arange(200_000, 400_000)):
            log.append("t", pa.record_batch({"n": n, "v": n * 3}))
        table = EntriesTable(log.snapshot(), log.snapshot().topic("t"), ScanContext(ColumnCache(0), 1), with_log_columns=False)
        assert {len(list(table.batches(record, ["n"]))) for record in log.snapshot().records("t")} == {4}
        engine, batches = Engine(Config(state_bytes_max=0)), []
        run_of = provider._run_of
        monkeypatch.setattr(provider, "_run_of", lambda *given: (batches.append(each) or each for each in run_of(*given)))
        spans = [(160_000, 305_000), (150_000, 250_001), (7, 199_999), (170_000, 235_000), (0, 399_999)]
        for first, last in spans:
            compared.clear()
            found = rows(engine, log.snapshot(), f"SELECT count(*) AS c, sum(v) AS s, min(v) AS m FROM t WHERE n >= {first} AND n < {last}")
            assert found == [{"c": last - first, "s": sum(range(3 * first, 3 * last, 3)), "m": 3 * first}]
            assert compared.count(2) == 1, "the ends of what is asked for"
            assert len(compared) - 1 <= 2, "of the pieces only those that an end is in"
            assert batches
            batches.clear()


@pytest.mark.parametrize("entries", [100, 9000])
def test_texts_that_only_begin_alike_are_no_run(folder: Any, entries: int) -> None:
    n, one, other = 9000, "customer-000001", "customer-000002"
    whole = pa.table({"s": [other if i % 2 else one for i in range(n)], "v": range(n)})
    with OpLog.open(str(folder)) as log:
        for start in range(0, n, entries):
            log.append("t", whole.slice(start, entries))
        engine = Engine(Config(state_bytes_max=0))
        for _ in range(4):
            for where, count in (("", n // 2), (" AND v < 10", 5), (" AND v >= 10 AND v < 8000", 3995)):
                matching = f"FROM t WHERE s = '{one}'{where}"
                assert rows(engine, log.snapshot(), f"SELECT count(v) AS c {matching}") == [{"c": count}]
                assert rows(engine, log.snapshot(), f"SELECT s, count(v) AS c {matching} GROUP BY s") == [{"s": one, "c": count}]
                assert rows(engine, log.snapshot(), f"SELECT DISTINCT s {matching}") == [{"s": one}]


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint64(), pa.int8(), pa.float32(), pa.timestamp("ns"), pa.date32()])
def test_a_range_of_numbers_is_what_comparing_each_says(kind: pa.DataType) -> None:
    chance = random.Random(str(kind))
    extremes = [0, 127] if not pa.types.is_signed_integer(kind) else [-(1 << kind.bit_width - 1), (1 << kind.bit_width - 1) - 1]
    for _ in range(300):
        middle, parts = chance.randrange(0, 100), []
        for _ in range(chance.randrange(4)):
            values = [chance.choice([*extremes, *range(middle, middle + 20)]) for _ in range(chance.choice([0, 1, 5]))]
            if pa.types.is_floating(kind):
                values += chance.choice([[], [math.inf], [-math.inf, 0.5]])
            if chance.random() < 0.5:
                values.sort()
            parts.append(pa.array(values, kind, mask=np.array([chance.random() < 0.1 for _ in values], bool)))
            if pa.types.is_floating(kind) and chance.random() < 0.3:  # a value that nobody sees
                hidden = np.array([math.nan, 5.0], np.float32)
                parts.append(pa.array(hidden, kind, mask=np.array([True, False])))
        column = pa.chunked_array(parts, kind)
        compared = [
            (chance.choice(words), chance.randrange(0, 120))
            for words in chance.sample(((">", ">="), ("<", "<=")) * 2 + (("==",),), chance.choice([1, 2, 3]))
        ]
        parsed = [(word, pa.array([value], kind)[0]) for word, value in compared]
        compares = COMPARES | {"==": operator.eq}
        expression = functools.reduce(operator.and_, (compares[word](pc.field("x"), value) for word, value in parsed))
        filter = Filter.of(expression, pa.schema([("x", kind), ("y", pa.string())]))
        assert (filter.keys, len(filter.range)) == (("x",), sum(2 if word == "==" else 1 for word, _ in compared))
        expected = pc.fill_null(functools.reduce(pc.and_, (ARROWS[word](column, value) for word, value in parsed)), False)
        found = filter.within(parts, [ends(part) for part in parts])
        assert found.tolist() == [place for place, passes in enumerate(expected.to_pylist()) if passes], (parts, expression)


def test_columns_kept_for_a_wider_schema_are_not_taken_for_those_of_before(folder: Any) -> None:
    engine = Engine(Config(state_bytes_max=0))
    with OpLog.open(str(folder)) as log:
        log.append("t", pa.record_batch({"s": pa.array([{"x": i, "y": None} for i in range(10_000)])}))
        before = log.snapshot()
        log.append("t", pa.record_batch({"s": pa.array([{"x": 1, "y": 2}])}))
        for snapshot, total in [(log.snapshot(), 49_995_001), (before, 49_995_000)] * 3:
            assert rows(engine, snapshot, "SELECT sum(s['x']) AS total FROM t") == [{"total": total}]


def test_columns_kept_together_go_before_any_other(folder: Any) -> None:
    room = 5_000_000  # texts of 0.6 MB a column, and of 1.6 as views
    with OpLog.open(str(folder)) as log:
        for topic in ("t", "u"):
            log.append(topic, pa.record_batch({name: [f"{name}{n % 7}" for n in range(100_000)] for name in "ab"}))
        engine = Engine(Config(cache_bytes_max=room, state_bytes_max=0))
        cache = engine._planner.cache

        def ask(topic: str, number: int) -> list[int]:
            before = cache.misses
            rows(engine, log.snapshot(), f"SELECT a, b, count(*) + {number} AS n FROM {topic} GROUP BY a, b")
            return [cache.misses - before, len(cache._together)]

        assert [ask("t", number) for number in range(3)] == [[1, 0], [0, 2], [0, 2]]
        assert ask("u", 3) == [1, 1]
        assert [ask(topic, 4) for topic in ("t", "u", "t", "u")] == [[0, 1]] * 4
        assert cache._bytes <= room


def test_an_unqualified_name_that_does_not_exist_is_not_found(query: Query) -> None:
    with pytest.raises(NotFound) as caught:
        query("SELECT * FROM nope")
    assert str(caught.value) == (
        "table 'oplog.public.nope' does not exist; SELECT topic FROM system.topics lists them, quote names with capital letters"
    )


SERVED = "is not served: statements may read (SELECT, EXPLAIN, SHOW, DESCRIBE), INSERT, and define tables and views (CREATE, DROP)"
READING_ONLY = "is not served here: it may only read: SELECT, SHOW, DESCRIBE"
APPEND_ONLY = "the log is append-only: rows are never updated, deleted, merged or truncated"
REFUSED = {
    "EXPLAIN INSERT INTO events VALUES ('a', 'b')": READING_ONLY,
    "EXPLAIN ANALYZE INSERT INTO events VALUES ('a', 'b')": READING_ONLY,
    "EXPLAIN ANALYZE CREATE TABLE x AS SELECT 1": READING_ONLY,
    "DELETE FROM events": APPEND_ONLY,
    "UPDATE events SET name = 'x'": APPEND_ONLY,
    "TRUNCATE TABLE events": APPEND_ONLY,
    "COPY events TO '/tmp/flight_oplog_copy.parquet'": SERVED,
    "COPY (SELECT 1) TO '/tmp/flight_oplog_copy' STORED AS CSV": SERVED,
    "SET datafusion.execution.batch_size = 1": SERVED,
    "PREPARE p AS SELECT 1": SERVED,
}


@pytest.mark.parametrize("sql", REFUSED)
def test_statements_that_do_more_than_read_are_refused(log: OpLog, query: Query, sql: str) -> None:
    log.append("events", SEED)
    with pytest.raises(Unsupported) as caught:
        query(sql)
    assert str(caught.value).endswith(REFUSED[sql])
    assert query("SELECT * FROM events") == SEED.to_pylist()


@pytest.mark.parametrize("name", ["/etc/passwd", "file:///etc/passwd", "/etc/hostname.csv", "s3://bucket/x.parquet"])
def test_a_path_is_never_a_table(query: Query, name: str) -> None:
    with pytest.raises(NotFound, match="does not exist"):
        query(f"SELECT * FROM '{name}'")
    for function in ("read_csv", "read_parquet", "parquet_metadata", "list_files_cache"):
        with pytest.raises(OplogError):
            query(f"SELECT * FROM {function}('{name}')")


@pytest.mark.parametrize("sql", ["", ";", "SELEC 1", "SELECT 1; SELECT 2", "SELECT nope FROM events", "SELECT $1", "SELECT 1/0"])
def test_bad_sql_is_the_callers_to_change(log: OpLog, query: Query, sql: str) -> None:
    log.append("events", SEED)
    with pytest.raises((RequestError, Unsupported)) as caught:
        query(sql)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_sql_text_one_byte_over_the_limit_is_refused(log: OpLog) -> None:
    engine = Engine(Config(sql_bytes_max=10))
    assert rows(engine, log.snapshot(), "SELECT 1 a") == [{"a": 1}]
    with pytest.raises(TooLarge) as caught:
        engine.prepare("SELECT 1 ab", log.snapshot())
    assert str(caught.value) == "the SQL text has 11 bytes; sql_bytes_max is 10"


ENDLESS = "SELECT sum(value % 7) AS n FROM generate_series(1, 1000000000000)"


def test_a_query_that_is_stopped_ends_soon(log: OpLog, engine: Engine) -> None:
    stop_at = time.monotonic() + 0.3
    running = engine.run(ENDLESS, log.snapshot(), lambda: time.monotonic() > stop_at)
    with pytest.raises(Cancelled):
        list(running.batches)
    assert time.monotonic() - stop_at < 2


def test_a_query_over_its_time_is_ended_with_the_limits_name(log: OpLog) -> None:
    engine = Engine(Config(statement_seconds_max=1))
    with pytest.raises(TooLarge) as caught:
        list(engine.run(ENDLESS, log.snapshot()).batches)
    assert str(caught.value) == "the query ran longer than statement_seconds_max (1); ask for less"


def test_a_sort_larger_than_its_memory_spills_and_still_answers(log: OpLog) -> None:
    engine = Engine(Config(statement_bytes_max=20 << 20))
    sql = "SELECT value FROM generate_series(1, 5000000) ORDER BY value * 7919 % 5000011"
    assert sum(batch.num_rows for batch in engine.run(sql, log.snapshot()).batches) == 5_000_000


SPILLING = [
    "SELECT value FROM generate_series(1, 5000000) ORDER BY value * 7919 % 5000011",
    "SELECT value * 7919 % 5000011 AS k, count(*) AS n FROM generate_series(1, 5000000) GROUP BY k",
    "SELECT n FROM v",
]


def spilled(config: Config, log: OpLog, sql: str) -> int:
    return sum(batch.num_rows for batch in Engine(config).run(sql, log.snapshot()).batches)


@pytest.mark.parametrize("sql", SPILLING)
def test_a_query_that_spills_too_much_is_refused_with_the_limits_name(log: OpLog, sql: str) -> None:
    define(log, "v", "SELECT DISTINCT value * 7919 % 5000011 AS n FROM generate_series(1, 5000000)")
    config = Config(statement_bytes_max=20 << 20, spill_bytes_max=1 << 30)
    assert spilled(config, log, sql) == 5_000_000
    for most in (1 << 20, 0):
        with pytest.raises(TooLarge) as caught:
            spilled(replace(config, spill_bytes_max=most), log, sql)
        assert str(caught.value) == "the query would spill more than spill_bytes_max to disk; ask for less or raise it"


@pytest.mark.parametrize("sql", SPILLING[:2])
def test_a_query_that_cannot_spill_says_why(log: OpLog, sql: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, before[1]))
    try:
        with pytest.raises(TryAgain) as caught:
            spilled(Config(statement_bytes_max=20 << 20), log, sql)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = "the query could not spill to the system's temporary folder: File too large; make room there, or ask for less"
    assert str(caught.value) == said


def test_result_batches_fit_a_message_and_match_the_planned_schema(log: OpLog, engine: Engine) -> None:
    log.append("t", pa.record_batch({"s": ["x" * 1000] * 20_000, "i": list(range(20_000))}))
    for sql in (
        "SELECT * FROM t",
        "SELECT s FROM t WHERE i % 2 = 0",
        "SELECT t.* FROM t, t AS u WHERE t.i = u.i",
        "SELECT i FROM t LIMIT 0",
    ):
        statement = engine.prepare(sql, log.snapshot())
        running = engine.run(sql, log.snapshot())
        for batch in running.batches:
            assert batch.schema.equals(statement.schema, check_metadata=True)
            assert 0 < batch.nbytes <= 3 << 20


RESULTS = [
    "SELECT arrow_cast('a', 'Utf8View') AS v, arrow_cast('a', 'Dictionary(Int32, Utf8)') AS d",
    "SELECT [1, 2] AS l, struct(1 AS x, 'a' AS y) AS s",
    "SELECT interval '1 day' AS i, arrow_cast(5, 'Duration(Second)') AS d",
    "SELECT 1.5::decimal(10, 2) AS d, NULL AS n, true AS b",
    "SELECT arrow_cast('2024-01-01T00:00:00', 'Timestamp(Nanosecond, Some(\"UTC\"))') AS t, date '2024-01-01' AS d, time '01:02:03' AS t2",
    "EXPLAIN SELECT 1",
    "EXPLAIN ANALYZE SELECT 1",
]


@pytest.mark.parametrize("sql", RESULTS)
def test_results_of_any_type_come_as_clients_can_read_them(log: OpLog, engine: Engine, sql: str) -> None:
    statement = engine.prepare(sql, log.snapshot())
    running = engine.run(sql, log.snapshot())
    batches = list(running.batches)
    assert sum(batch.num_rows for batch in batches) >= 1
    assert all(batch.schema.equals(statement.schema, check_metadata=True) for batch in batches)
    for field in statement.schema:
        assert field.nullable
        assert not pa.types.is_dictionary(field.type)
        assert "view" not in str(field.type)


def test_operators_and_tables_one_over_their_limits_are_refused(log: OpLog) -> None:
    engine = Engine(Config(sql_operators_max=3, sql_tables_max=2))
    log.append("t", pa.record_batch({"a": [1]}))
    assert rows(engine, log.snapshot(), "SELECT 1 + 1 + 1 - 1 AS a -- + + + +") == [{"a": 2}]
    assert rows(engine, log.snapshot(), "SELECT '+ + + + +' AS \"+ + + +\", a FROM t") == [{"+ + + +": "+ + + + +", "a": 1}]
    with pytest.raises(TooLarge, match="the SQL text has 4 operators; sql_operators_max is 3"):
        engine.prepare("SELECT 1 + 1 + 1 - 1::int AS a", log.snapshot())
    engine.prepare("SELECT 1, 2, 3 FROM t AS x, t AS y", log.snapshot())
    for sql in (
        "SELECT 1 FROM t AS x, t AS y, t AS z",
        "SELECT 1 FROM t JOIN t AS y ON abs(x.a, 1) CROSS JOIN t",
        "SELECT (SELECT a FROM t), 1 FROM t AS x, (t)",
    ):
        with pytest.raises(TooLarge, match="the SQL text reads 3 tables; sql_tables_max is 2"):
            engine.prepare(sql, log.snapshot())


@pytest.mark.parametrize(
    "sql",
    [
        " UNION ALL ".join(["SELECT 1"] * 900),
        "SELECT 1 WHERE " + " OR ".join(f"'{i}' = 'a'" for i in range(450)),
        "SELECT 1" + "::int" * 900,
        "SELECT " + "+".join(["1"] * 900),
        "SELECT " + "(" * 5000 + "1" + ")" * 5000,
        "SELECT 1 WHERE 1 IN (" + ",".join(map(str, range(5000))) + ")",
        "SELECT " + "a." * 5000 + "a FROM t",
    ],
)
def test_deep_texts_within_the_limits_do_not_overflow_a_threads_stack(log: OpLog, engine: Engine, sql: str) -> None:
    import threading

    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(sum(batch.num_rows for batch in engine.run(sql, log.snapshot()).batches))
        except OplogError as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert len(outcome) == 1


def test_filters_answer_as_sql_does_where_arrow_would_not(log: OpLog, query: Query) -> None:
    nan = float("nan")
    log.append("t", pa.record_batch({"x": [1, 2, None, 4, 5, 6, 7], "f": [1.0, nan, None, 0.5, -1.0, 2.0, float("inf")]}))
    assert query("SELECT x FROM t WHERE x NOT IN (1, 2, 4, 5, 6)") == [{"x": 7}]
    assert query("SELECT x FROM t WHERE NOT (x IN (1, 2, 4, 5, 6) AND x > 0)") == [{"x": 7}]
    assert query("SELECT x FROM t WHERE f > 1 ORDER BY x") == [{"x": 2}, {"x": 6}, {"x": 7}]
    assert query("SELECT x FROM t WHERE f = 'NaN'::double") == [{"x": 2}]
    assert query("SELECT x FROM t WHERE x IN (NULL)") == []
    assert query("SELECT x FROM t WHERE x > 5 OR f < 0 ORDER BY x") == [{"x": 5}, {"x": 6}, {"x": 7}]


def test_filters_on_types_without_an_arrow_kernel_are_answered(log: OpLog, query: Query) -> None:
    batch = pa.record_batch(
        {
            "n": [1, 2],
            "h": pa.array([1.5, 0.5], pa.float16()),
            "i": pa.array([(0, 1, 0), (0, 2, 0)], pa.month_day_nano_interval()),
            "l": [[1], [2]],
            "d": pa.array([1, 2], pa.duration("s")),
        }
    )
    log.append("t", batch)
    for condition in ("h > 1", "i = interval '1 day'", "l = [1]", "d = arrow_cast(1, 'Duration(Second)')"):
        assert query(f"SELECT n FROM t WHERE {condition}") == [{"n": 1}], condition


def test_event_time_is_settled_once_so_bounds_never_speak_of_another_column(log: OpLog, query: Query) -> None:
    day = pa.timestamp("us", "UTC")
    log.append("t", pa.record_batch({"t": pa.nulls(1), "u": pa.array([0], day)}))
    log.append("t", pa.record_batch({"t": pa.array([10**15], day), "u": pa.array([5], day)}))
    assert log.snapshot().topic("t").event_time == "u"
    assert query("SELECT count(*) AS n FROM t WHERE t > TIMESTAMP '2000-01-01T00:00:00Z'") == [{"n": 1}]
    [topic] = query("SELECT max_time FROM system.topics WHERE topic = 't'")
    assert topic["max_time"].microsecond == 5


def test_short_texts_group_as_views_and_answer_the_same(log: OpLog, query: Query, engine: Engine) -> None:
    kinds = ["put", "get", None, "scan", "put", ""] * 50
    log.append("t", pa.record_batch({"kind": kinds, "key": [f"{i:020}" for i in range(300)], "n": list(range(300))}))
    log.append("t", pa.record_batch({"kind": ["a text that is not short at all"], "n": [300]}))
    log.append("t", pa.record_batch({"kind": ["put"], "n": [301]}))
    expected = [
        {"kind": "", "c": 50},
        {"kind": "a text that is not short at all", "c": 1},
        {"kind": "get", "c": 50},
        {"kind": "put", "c": 101},
        {"kind": "scan", "c": 50},
        {"kind": None, "c": 50},
    ]
    sql = "SELECT kind, count(*) AS c FROM t GROUP BY kind ORDER BY kind NULLS LAST"
    assert query(sql) == expected
    assert engine.prepare(sql, log.snapshot()).schema == pa.schema([("kind", pa.string()), ("c", pa.int64())])
    assert query("SELECT DISTINCT kind FROM t WHERE n > 299 ORDER BY kind") == [
        {"kind": "a text that is not short at all"},
        {"kind": "put"},
    ]
    assert query("SELECT kind, count(*) AS c FROM t WHERE kind = 'get' AND n < 60 GROUP BY kind") == [{"kind": "get", "c": 10}]
    assert query("SELECT max(key) AS k, count(DISTINCT kind) AS c FROM t WHERE n % 2 = 0") == [{"k": f"{298:020}", "c": 2}]
    running = engine.run("SELECT kind, count(*) FROM t WHERE kind = 'zzz' AND n > 1000 GROUP BY kind", log.snapshot())
    assert list(running.batches) == []
    assert running.counts["public.t"].records_pruned == 3, "a filter on the grouped text still prunes"


def test_a_query_that_keeps_producing_is_ended_too(log: OpLog) -> None:
    engine = Engine(Config(statement_seconds_max=1))
    running = engine.run("SELECT value FROM generate_series(1, 1000000000000)", log.snapshot())
    began = time.monotonic()
    with pytest.raises(TooLarge, match=r"statement_seconds_max \(1\)"):
        for _ in running.batches:
            pass
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("words", ["Resources exhausted", "Internal error panicked", "table x not found", "DML not supported: Delete"])
def test_words_in_the_data_do_not_choose_the_status(query: Query, words: str) -> None:
    with pytest.raises(RequestError, match="the query cannot be answered"):
        query(f"SELECT cast('{words}' AS int)")
