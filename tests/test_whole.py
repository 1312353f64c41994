"""`SELECT * FROM topic` is read without DataFusion, and says what DataFusion would."""

import time
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import SEED, flip, rows

from flight_oplog import Config, OpLog
from flight_oplog.errors import Cancelled, CorruptLog, TooLarge
from flight_oplog.sql.engine import Engine
from flight_oplog.sql.planner import Asked
from flight_oplog.sql.statements import Statements
from flight_oplog.sql.stream import POLL_SECONDS


def is_whole(engine: Engine, log: OpLog, sql: str, db_schema: str = "public") -> bool:
    return engine._planner.whole(Asked(sql, log.snapshot(), lambda: False, 1e18, None, db_schema)) is not None


@pytest.fixture
def filled(log: OpLog) -> OpLog:
    for number in range(3):
        log.append("events", pa.table({"n": range(100 * number, 100 * number + 100), "s": [None, "x"] * 50}))
    log.append("events", pa.table({"n": [300], "at": pa.array([1], pa.timestamp("ns"))}))
    Statements(log, Engine(Config()), Config()).execute("CREATE VIEW seen AS SELECT * FROM events")
    return log


@pytest.mark.parametrize("sql", ["SELECT * FROM events", "select *\nfrom public.events ;", 'SELECT * FROM oplog.log."events"'])
def test_all_of_a_topic_is_what_its_columns_are(filled: OpLog, sql: str) -> None:
    engine = Engine(Config())
    assert is_whole(engine, filled, sql)
    running = engine.run(sql, filled.snapshot())
    found = pa.Table.from_batches(list(running.batches), running.schema)
    assert found.schema == engine.prepare(sql, filled.snapshot()).schema
    table = "log.events" if "log" in sql else "events"
    assert found.to_pylist() == rows(engine, filled.snapshot(), f"SELECT {', '.join(found.column_names)} FROM {table} ORDER BY n")
    [counted] = running.counts.values()
    assert (counted.records, counted.records_read) == (4, 4)
    assert rows(engine, filled.snapshot(), "SELECT rows, records_read FROM system.queries WHERE sql LIKE '%*%' AND status = 'done'") == [
        {"rows": 301, "records_read": 4}
    ]


def test_the_schema_of_the_session_counts(filled: OpLog) -> None:
    engine = Engine(Config())
    assert is_whole(engine, filled, "SELECT * FROM events", "log")
    assert "_offset" in engine.run("SELECT * FROM events", filled.snapshot(), db_schema="log").schema.names


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM events WHERE n > 5",
        "SELECT * FROM events LIMIT 5",
        "SELECT * FROM events, events AS other",
        "SELECT * FROM at_version('events', 2)",
        "SELECT * FROM seen",
        "SELECT * FROM records.events",
        "SELECT * FROM system.topics",
        "SELECT * FROM information_schema.tables",
        "SELECT n FROM events",
    ],
)
def test_anything_else_is_datafusions(filled: OpLog, sql: str) -> None:
    engine = Engine(Config())
    assert not is_whole(engine, filled, sql)
    assert rows(engine, filled.snapshot(), sql)


def test_it_can_be_stopped_and_has_its_time(filled: OpLog) -> None:
    stop: list[bool] = []
    running = Engine(Config(message_bytes_max=65_536)).run("SELECT * FROM events", filled.snapshot(), lambda: bool(stop))
    stop.append(True)
    with pytest.raises(Cancelled):
        list(running.batches)
    running = Engine(Config(statement_seconds_max=1)).run("SELECT * FROM events", filled.snapshot())
    time.sleep(1.1)
    with pytest.raises(TooLarge, match="statement_seconds_max"):
        list(running.batches)


def test_it_can_be_stopped_and_has_its_time_once_it_has_begun(log: OpLog) -> None:
    for _ in range(10):
        log.append("events", pa.table({"n": range(1000)}))
    stop: list[bool] = []
    running = Engine(Config()).run("SELECT * FROM events", log.snapshot(), lambda: bool(stop))
    next(running.batches)
    stop.append(True)
    time.sleep(1.5 * POLL_SECONDS)
    with pytest.raises(Cancelled):
        list(running.batches)
    running = Engine(Config(statement_seconds_max=1)).run("SELECT * FROM events", log.snapshot())
    next(running.batches)
    time.sleep(1.1)
    with pytest.raises(TooLarge, match="statement_seconds_max"):
        list(running.batches)


def test_batches_travel_well(log: OpLog) -> None:
    log.append("events", pa.table({"s": ["x" * 100] * 100_000}))
    engine = Engine(Config(message_bytes_max=1_000_000))
    batches = list(engine.run("SELECT * FROM events", log.snapshot()).batches)
    assert sum(batch.num_rows for batch in batches) == 100_000
    assert all(batch.nbytes <= 1_000_000 for batch in batches)


def test_damage_is_its_error(tmp_path: Path) -> None:
    with OpLog.open(str(tmp_path / "log"), Config(compression="none")) as log:
        log.append("events", SEED)
    [path] = (tmp_path / "log" / "topic=events").glob("*.parquet")
    flip(path, path.read_bytes().rindex(b"hello"))
    with OpLog.open(str(tmp_path / "log")) as log, pytest.raises(CorruptLog, match="content does not match its digest"):
        list(Engine(Config()).run("SELECT * FROM events", log.snapshot()).batches)
