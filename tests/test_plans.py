"""What is kept of statements between being prepared and being run: a plan for one run, and answers that no data change."""

from typing import Any

import pyarrow as pa
import pytest
from conftest import rows

from flight_oplog import Config, OpLog
from flight_oplog.sql import engine as sql_engine
from flight_oplog.sql import planner
from flight_oplog.sql.engine import CONSTANT_CHARACTERS, CONSTANTS_KEPT, Engine
from flight_oplog.sql.planner import Planner
from flight_oplog.sql.statements import Statements


@pytest.fixture
def engine() -> Engine:
    """One that nobody else asks."""
    return Engine(Config())


def asked(engine: Engine, log: OpLog, sql: str) -> list[dict[str, Any]]:
    """The rows of a statement that is prepared and then run, as clients ask."""
    engine.prepare(sql, log.snapshot())
    return sorted(rows(engine, log.snapshot(), sql), key=str)


@pytest.fixture
def sessions(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The text of each statement, as often as it is planned."""
    found: list[str] = []
    session = Planner.session
    monkeypatch.setattr(Planner, "session", lambda self, sql, *rest, **more: found.append(sql) or session(self, sql, *rest, **more))
    return found


@pytest.mark.parametrize("sql", ["SELECT n FROM t WHERE n > 1", "SELECT n, count(*) AS c FROM t GROUP BY n", "SELECT * FROM t"])
def test_a_statement_is_planned_once(log: OpLog, engine: Engine, sessions: list[str], sql: str) -> None:
    log.append("t", pa.record_batch({"n": [1, 2, 3]}))
    first = asked(engine, log, sql)
    assert sessions == [sql]
    assert asked(engine, log, sql) == first
    assert len(sessions) > 1, "the plan was for one use"
    log.append("t", pa.record_batch({"n": [4]}))
    engine.prepare(sql + " ", log.snapshot())
    log.append("t", pa.record_batch({"n": [5]}))
    assert len(rows(engine, log.snapshot(), sql + " ")) == len(first) + 2, "a plan is for its snapshot"


def test_no_plan_is_kept_for_long(log: OpLog, engine: Engine, sessions: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "PLAN_SECONDS", -1.0)
    assert asked(engine, log, "SELECT 1 + 1 AS two") == [{"two": 2}]
    assert len(sessions) == 2
    assert not engine._planner._planned, "nor one that nobody came for"
    monkeypatch.undo()
    engine.prepare("SELECT now() AS t", log.snapshot())
    assert not any("now" in sql for sql, _ in engine._planner._planned), "its time is that of its making"


def test_no_plan_of_a_dated_view_is_kept(log: OpLog, engine: Engine) -> None:
    Statements(log, engine, Config()).execute("CREATE VIEW v AS SELECT now() AS t")
    engine.prepare("SELECT t FROM v", log.snapshot())
    assert not engine._planner._planned


def test_not_many_plans_are_kept(log: OpLog, engine: Engine) -> None:
    for number in range(planner.PLANS_KEPT + 1):
        engine.prepare(f"SELECT {number} + 1 AS n", log.snapshot())
    assert len(engine._planner._planned) == planner.PLANS_KEPT
    assert rows(engine, log.snapshot(), "SELECT 0 + 1 AS n") == [{"n": 1}]


def test_what_a_statement_says_itself_is_kept(log: OpLog, engine: Engine, sessions: list[str]) -> None:
    sql = "SELECT 1 AS one, 'x' AS x, NULL AS none, -2.5 AS m"
    first = asked(engine, log, sql)
    assert first == [{"one": 1, "x": "x", "none": None, "m": -2.5}]
    sessions.clear()
    assert asked(engine, log, sql) == first
    assert not sessions
    assert asked(engine, log, "SELECT random() AS r") != asked(engine, log, "SELECT random() AS r")
    assert asked(engine, log, "SELECT uuid() AS r") != asked(engine, log, "SELECT uuid() AS r")
    for number in range(CONSTANTS_KEPT + 1):
        asked(engine, log, f"SELECT {number} AS n")
    assert len(engine._constants) == CONSTANTS_KEPT
    asked(engine, log, f"SELECT '{'x' * CONSTANT_CHARACTERS}' AS n")
    assert len(engine._constants) == CONSTANTS_KEPT


def test_a_short_query_makes_no_detour(log: OpLog, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    log.append("t", pa.record_batch({"n": list(range(1000))}))
    monkeypatch.setattr(planner.Planner, "pulled", lambda *arguments: pytest.fail("it could be stopped"))
    sql = "SELECT n FROM t WHERE n < 3"
    expected = [{"n": 0}, {"n": 1}, {"n": 2}]
    assert asked(engine, log, sql) == expected
    monkeypatch.undo()
    pulled: list[str] = []
    real = planner.Planner.pulled
    monkeypatch.setattr(planner.Planner, "pulled", lambda *arguments: pulled.append("") or real(*arguments))
    assert asked(engine, log, "SELECT n FROM t WHERE n < 3 AND CAST(n AS VARCHAR) LIKE '%'") == expected
    monkeypatch.setattr(sql_engine, "SHORT_ENTRIES", 999)
    assert asked(engine, log, sql) == expected
    assert len(pulled) == 2
