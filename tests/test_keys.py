"""Equalities on key columns prune records by filters, and never lose an entry."""

import datetime
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import flip, rows
from datafusion import SessionContext
from hypothesis import given, settings
from hypothesis import strategies as st

from flight_oplog import Config, OpLog, keys, records
from flight_oplog.errors import CorruptLog, OplogError, RequestError
from flight_oplog.sql import lexer
from flight_oplog.sql.engine import Engine
from flight_oplog.sql.statements import Statements

SCHEMA = pa.schema([("id", pa.string()), ("n", pa.int64()), ("at", pa.timestamp("us", "UTC")), ("day", pa.date32()), ("x", pa.float64())])
KEYS = "id, n, at, day"
RECORDS = 20
ENTRIES = 40
EPOCH = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def entry(chance: random.Random, number: int) -> dict[str, Any]:
    """Values far apart, so that bounds tell nothing."""
    return {
        "id": None if number % 11 == 0 else f"{chance.getrandbits(64):016x}" * chance.choice([1, 1, 5]),
        "n": None if number % 13 == 0 else chance.randrange(-(1 << 60), 1 << 60),
        "at": EPOCH + datetime.timedelta(microseconds=chance.randrange(1 << 50)),
        "day": EPOCH.date() + datetime.timedelta(days=chance.randrange(-10_000, 10_000)),
        "x": chance.choice([0.0, -0.0, float("nan"), 1.5]),
    }


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A topic of twenty records with keys, and all of its entries."""
    chance = random.Random(5)
    batches = [
        pa.RecordBatch.from_pylist([entry(chance, number) for number in range(start, start + ENTRIES)], SCHEMA)
        for start in range(0, RECORDS * ENTRIES, ENTRIES)
    ]
    with OpLog.open(str(tmp_path_factory.mktemp("keyed") / "log")) as log:
        execute(log, f"CREATE TABLE t (id VARCHAR, n BIGINT, at TIMESTAMPTZ, day DATE, x DOUBLE) WITH (keys = '{KEYS}')")
        schema = log.snapshot().topics["t"].schema
        for batch in batches:
            log.append("t", batch.cast(schema))
        yield log, pa.Table.from_batches(batches).cast(schema)


def execute(log: OpLog, sql: str) -> int:
    return Statements(log, Engine(Config()), Config()).execute(sql)


def counts(log: OpLog, sql: str, engine: Engine | None = None) -> Any:
    running = (engine or Engine(Config())).run(sql, log.snapshot())
    list(running.batches)
    [found] = running.counts.values()
    return found


def literal(name: str, value: Any) -> str:
    if name == "at":
        return f"CAST('{value.isoformat()}' AS TIMESTAMP WITH TIME ZONE)"
    return f"DATE '{value}'" if name == "day" else f"'{value}'" if name == "id" else str(value)


@pytest.mark.parametrize("name", ["id", "n", "at", "day"])
def test_an_equality_on_a_key_reads_few_records(keyed: Any, name: str) -> None:
    log, everything = keyed
    some = [row[name] for row in everything.slice(300, 10).to_pylist() if row[name] is not None]
    for value in some[:3]:
        found = counts(log, f"SELECT * FROM t WHERE {name} = {literal(name, value)}")
        assert found.records == RECORDS
        assert 1 <= RECORDS - found.records_pruned <= 3
        assert found.filter_bytes > 0
    # Longer lists of times DataFusion keeps to itself.
    listed = ", ".join(literal(name, value) for value in some[: 5 if name in ("id", "n") else 3])
    found = counts(log, f"SELECT * FROM t WHERE {name} IN ({listed})")
    assert RECORDS - found.records_pruned <= 5
    assert counts(log, f"SELECT * FROM t WHERE {name} <> {literal(name, some[0])}").records_pruned == 0


def test_what_nobody_wrote_is_found_missing_without_reading(keyed: Any) -> None:
    log, _ = keyed
    assert counts(log, "SELECT * FROM t WHERE id = '7777777777777777'").records_read <= 2
    assert counts(log, "SELECT * FROM t WHERE id = '7777777777777777' AND x = 1.5").records_read <= 2


def condition(chance: random.Random, everything: pa.Table) -> str:
    name = chance.choice(["id", "n", "at", "day", "x"])
    row = chance.choice(everything.to_pylist())
    other = chance.choice(everything.to_pylist())
    if name == "x":
        return f"x {chance.choice(['=', '>', '<='])} {chance.choice(['0.0', '-0.0', '1.5'])}"
    if row[name] is None:
        return f"{name} IS NULL"
    compared = chance.choice(["=", "=", "=", "<>", "<", ">=", "IN", "NOT IN", "IS DISTINCT FROM"])
    value = literal(name, row[name])
    if compared in ("IN", "NOT IN"):
        more = [literal(name, each[name]) for each in chance.choices(everything.to_pylist(), k=4) if each[name] is not None]
        value = f"({', '.join([value, *more])})"
    elif name == "n" and chance.random() < 0.3 and other["n"] is not None:
        return f"n + 0 = {other['n']}"
    return f"{name} {compared} {value}"


@pytest.mark.parametrize("seed", range(120))
def test_a_pruned_answer_is_the_unpruned_answer(keyed: Any, engine: Engine, seed: int) -> None:
    log, everything = keyed
    chance = random.Random(seed)
    where = f"({condition(chance, everything)})"
    for _ in range(chance.randrange(3)):
        where = f"{chance.choice(['', '', 'NOT '])}({where} {chance.choice(['AND', 'OR'])} ({condition(chance, everything)}))"
    plain = SessionContext()
    plain.register_record_batches("t", [everything.to_batches()])
    sql = f"SELECT id, n, at FROM t WHERE {where} ORDER BY at, n"
    expected = [row for batch in plain.sql(sql).collect() for row in batch.to_pylist()]
    assert rows(engine, log.snapshot(), sql) == expected


VALUES = {
    pa.string(): st.text(max_size=90),
    pa.large_string(): st.text(max_size=20),
    pa.int8(): st.integers(-128, 127),
    pa.int64(): st.integers(-(1 << 63), (1 << 63) - 1),
    pa.uint16(): st.integers(0, 65535),
    pa.uint64(): st.integers(0, (1 << 64) - 1),
    pa.date32(): st.integers(-(1 << 31), (1 << 31) - 1),
    pa.timestamp("ns", "UTC"): st.integers(-(1 << 63), (1 << 63) - 1),
}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_filter_holds_every_value_it_was_made_of(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(VALUES)))
    values = data.draw(st.lists(st.none() | VALUES[kind], min_size=1, max_size=50))
    number = pa.int32() if kind == pa.date32() else pa.int64() if pa.types.is_timestamp(kind) else kind
    column = pa.array(values, number).cast(kind)
    bounds: dict[str, Any] = {"k": {}}
    made = keys.filters_of([pa.record_batch({"k": column})], ("k",), bounds)
    present = column.drop_null()
    if not len(present):
        assert (made, bounds) == (None, {"k": {}})
        return
    assert made is not None
    assert bounds["k"]["filter"] == [0, len(made)]
    assert keys.is_filter(memoryview(made), len(made))
    for hash in keys.hashes_of(list(present), kind) or ():
        assert keys.may_hold(memoryview(made), hash)


def test_one_in_a_hundred_is_mistaken() -> None:
    column = pa.array([f"{number:032x}" for number in range(20_000)])
    made = keys.filters_of([pa.record_batch({"k": column})], ("k",), {"k": {}})
    assert made is not None
    others = keys.hashes_of([pa.scalar(f"other {number}") for number in range(20_000)], pa.string()) or []
    assert sum(keys.may_hold(memoryview(made), hash) for hash in others) < 0.02 * 20_000
    assert len(made) <= 20_000 * 20 / 8


def test_a_filter_is_what_parquet_says_it_is() -> None:
    """By https://parquet.apache.org/docs/file-format/bloomfilter/, written out: another program can read it."""
    made = keys.filters_of([pa.record_batch({"k": pa.array([1, 2, 3])})], ("k",), {"k": {}})
    assert made is not None
    words = np.frombuffer(made, "<u4").reshape(-1, 8)
    assert words.any(axis=1).sum() <= 3
    assert 8 <= sum(int(word).bit_count() for word in words.ravel()) <= 24


def test_keys_stay_while_columns_evolve(tmp_path: Path, engine: Engine) -> None:
    with OpLog.open(str(tmp_path / "log")) as log:
        execute(log, "CREATE TABLE t (k INT, at TIMESTAMP(0)) WITH (keys = 'k, at')")
        first = pa.schema([("k", pa.int32()), ("at", pa.timestamp("s"))])
        log.append("t", pa.table([[7, 900], [1, 5]], schema=first))
        wider = pa.schema([("k", pa.int64()), ("at", pa.timestamp("us"))])
        log.append("t", pa.table([[1 << 40, 7, 1], [1_000_000, 2_500_000, 9]], schema=wider))
        log.append("t", pa.table([["x"]], names=["other"]))
        for sql, expected in (
            ("k = 7", 2),
            ("k = 900", 1),
            (f"k = {1 << 40}", 1),
            ("k IN (900, 1)", 2),
            ("k = 8", 0),
            ("k IS NULL", 1),
            ("at = TIMESTAMP '1970-01-01T00:00:01'", 2),
            ("at = TIMESTAMP '1970-01-01T00:00:02.5'", 1),
        ):
            assert rows(engine, log.snapshot(), f"SELECT count(*) AS n FROM t WHERE {sql}") == [{"n": expected}], sql
        assert log.snapshot().topics["t"].keys == ("k", "at")
        [topic] = rows(engine, log.snapshot(), "SELECT keys FROM system.topics WHERE topic = 't'")
        assert topic == {"keys": "k, at"}
    with OpLog.open(str(tmp_path / "log")) as log:
        assert log.snapshot().topics["t"].keys == ("k", "at")
        assert log.verify() == []


def test_keys_go_with_the_topic_and_come_with_its_next(tmp_path: Path) -> None:
    with OpLog.open(str(tmp_path / "log")) as log:
        execute(log, "CREATE TABLE t (k INT) WITH (keys = 'k')")
        execute(log, "CREATE OR REPLACE TABLE t WITH (keys = 'name') AS SELECT 'a' AS name, 1 AS k")
        assert log.snapshot().topics["t"].keys == ("name",)
        [record] = log.snapshot().records("t")
        assert "filter" in record.bounds["name"]
        assert "filter" not in record.bounds["k"]
        log.drop("t")
        log.append("t", pa.table({"name": ["a"]}))
        assert log.snapshot().topics["t"].keys == ()


def test_long_appends_have_filters_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are written before they are committed."""
    monkeypatch.setattr(records, "TOGETHER_ENTRIES_MAX", 0)
    with OpLog.open(str(tmp_path / "log"), Config(record_entries_max=1000)) as log:
        execute(log, "CREATE TABLE t (k VARCHAR) WITH (keys = 'k')")
        log.append("t", pa.table({"k": [f"{random.Random(n).getrandbits(64):x}" for n in range(10_000)]}))
        wanted = f"{random.Random(5_500).getrandbits(64):x}"
        found = counts(log, f"SELECT * FROM t WHERE k = '{wanted}'")
        assert found.records == 10
        assert found.records_pruned >= 8


def test_filters_are_kept_and_a_column_in_memory_needs_none(keyed: Any) -> None:
    log, everything = keyed
    engine = Engine(Config())
    sql = f"SELECT * FROM t WHERE id = '{everything['id'][5]}'"
    assert counts(log, sql, engine).filter_bytes > 0
    assert counts(log, sql, engine).filter_bytes == 0
    engine = Engine(Config())
    rows(engine, log.snapshot(), "SELECT min(id || '') FROM t")
    assert counts(log, sql, engine).filter_bytes == 0
    for size in (0, 1000):
        assert counts(log, sql, Engine(Config(cache_bytes_max=size))).records_pruned >= RECORDS - 3


def test_a_damaged_filter_is_an_error_and_never_a_missing_entry(tmp_path: Path) -> None:
    with OpLog.open(str(tmp_path / "log")) as log:
        execute(log, "CREATE TABLE t (k VARCHAR) WITH (keys = 'k')")
        log.append("t", pa.table({"k": ["hello"]}))
        bits = log._store.reader.filters(list(log.snapshot().records("t")))[0]
        [path] = [path for path in (tmp_path / "log" / "topic=t").glob("*.parquet") if bits in path.read_bytes()]
        flip(path, path.read_bytes().index(bits) + next(place for place, byte in enumerate(bits) if byte))
        with pytest.raises(CorruptLog, match=r"topic 't': file .* is not readable Parquet; restore it"):
            counts(log, "SELECT * FROM t WHERE k = 'hello'")
        [problem] = log.verify()
        assert problem.what.endswith("is not readable Parquet; restore it")


def test_verify_finds_a_key_that_its_filter_lacks(tmp_path: Path) -> None:
    with OpLog.open(str(tmp_path / "log")) as log, pytest.MonkeyPatch.context() as patch:
        execute(log, "CREATE TABLE t (k VARCHAR) WITH (keys = 'k')")
        made = keys._filter_of
        patch.setattr(keys, "_filter_of", lambda values: made(values.slice(1)))
        log.append("t", pa.table({"k": ["hello", "world"]}))
        patch.undo()
        [problem] = log.verify()
        assert problem.what == "its filters lack a key"


def test_another_writers_larger_filters_are_as_good(tmp_path: Path) -> None:
    with OpLog.open(str(tmp_path / "log")) as log, pytest.MonkeyPatch.context() as patch:
        execute(log, "CREATE TABLE t (k VARCHAR) WITH (keys = 'k')")
        patch.setattr(keys, "MISTAKEN", 1e-6)
        log.append("t", pa.table({"k": [f"{number}" for number in range(1000)]}))
        patch.undo()
        assert log.verify() == []
        assert counts(log, "SELECT * FROM t WHERE k = '77'").records_read == 1


@pytest.mark.parametrize("place", [[0, 31], [0, 64], [32, 32], [0, 0], [0, -32]])
def test_bounds_that_lie_about_filters_are_not_believed(tmp_path: Path, place: list[int]) -> None:
    with OpLog.open(str(tmp_path / "log")) as log:
        execute(log, "CREATE TABLE t (k VARCHAR) WITH (keys = 'k')")
        log.append("t", pa.table({"k": ["hello"]}))
        [record] = log.snapshot().records("t")
        record.bounds["k"]["filter"] = place
        with pytest.raises(CorruptLog, match="the filter of column 'k' is not whole; restore the file"):
            counts(log, "SELECT * FROM t WHERE k = 'hello'")


REFUSED = {
    "CREATE TABLE t (k INT) WITH (keys = 'nope')": "key 'nope' is none of its columns",
    "CREATE TABLE t (k DOUBLE) WITH (keys = 'k')": "column 'k' is double; keys are texts, integers, dates or timestamps",
    "CREATE TABLE t (k INT) WITH (key = 'k')": "option 'key' is not known; nothing was written; a table has WITH (keys = 'column, ...')",
    "CREATE TABLE t (k INT) WITH (keys = k)": "a table's options are written WITH (name = 'value', ...)",
    "CREATE TABLE t (k INT) WITH (keys)": "a table's options are written WITH (name = 'value', ...)",
    "CREATE TABLE t (k INT) WITH (keys = 'k' keys = 'k')": "a table's options are written WITH (name = 'value', ...)",
}


@pytest.mark.parametrize("sql", REFUSED)
def test_keys_that_cannot_be_are_refused(log: OpLog, sql: str) -> None:
    with pytest.raises(RequestError) as caught:
        execute(log, sql)
    assert REFUSED[sql] in str(caught.value)
    assert "nothing was written" in str(caught.value)
    assert log.snapshot().topics.keys() <= {"_schemas"}


def test_one_key_too_many_is_refused(log: OpLog) -> None:
    columns = [f"k{number}" for number in range(keys.KEYS_MAX + 1)]
    declared = ", ".join(f"{name} INT" for name in columns)
    with pytest.raises(RequestError, match="9 keys, a topic has 8 at most; nothing was written"):
        execute(log, f"CREATE TABLE t ({declared}) WITH (keys = '{','.join(columns)}')")
    execute(log, f"CREATE TABLE t ({declared}) WITH (keys = '{','.join(columns[1:])}')")
    assert log.snapshot().topics["t"].keys == tuple(columns[1:])


def test_options_are_those_of_a_table_alone(log: OpLog) -> None:
    for sql in ("SELECT 1", "CREATE TABLE t AS WITH x AS (SELECT 1 AS a) SELECT * FROM x", "CREATE TABLE with_ (a INT)"):
        assert lexer.table_options(sql) == (sql, {})
    assert lexer.table_options("/* c */ CREATE TABLE t (a INT) WITH (KEYS='it''s', b = '') AS SELECT 1") == (
        "/* c */ CREATE TABLE t (a INT)  AS SELECT 1",
        {"keys": "it's", "b": ""},
    )
    with pytest.raises(OplogError):
        execute(log, "CREATE VIEW v WITH (keys = 'a') AS SELECT 1 AS a")
