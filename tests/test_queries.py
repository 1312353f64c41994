"""`system.queries` and EXPLAIN: what statements cost, as an operator sees it."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from flight_oplog import Config, OpLog
from flight_oplog.config import SETTINGS
from flight_oplog.errors import CorruptLog, RequestError
from flight_oplog.sql import queries
from flight_oplog.sql.engine import Engine

Rows = list[dict[str, object]]


@pytest.fixture
def engine() -> Engine:
    """One that nobody else asks."""
    return Engine(Config())


@pytest.fixture
def ask(log: OpLog, engine: Engine) -> Callable[[str], Rows]:
    return lambda sql: [row for batch in engine.run(sql, log.snapshot()).batches for row in batch.to_pylist()]


@pytest.fixture
def log(folder: Path) -> OpLog:
    with OpLog.open(str(folder), Config(record_entries_max=100)) as opened:
        for start in range(0, 1000, 200):
            opened.append("t", pa.record_batch({"a": list(range(start, start + 200)), "b": [f"text {n}" for n in range(200)]}))
        yield opened  # type: ignore[misc]
        assert opened.verify() == []


def test_a_statement_tells_what_it_looked_at(log: OpLog, ask: Callable[[str], Rows]) -> None:
    log._store.reader._fresh.clear()  # as after a restart
    ask("SELECT b FROM t WHERE a BETWEEN 250 AND 349")
    [row] = ask("SELECT * FROM system.queries WHERE status = 'done'")
    assert row["sql"] == "SELECT b FROM t WHERE a BETWEEN 250 AND 349"
    assert (row["rows"], row["error"]) == (100, None)
    assert (row["files"], row["records"], row["records_pruned"], row["records_read"]) == (5, 10, 8, 2)
    assert isinstance(row["content_bytes"], int)
    assert row["content_bytes"] > 0
    assert isinstance(row["seconds"], float)
    assert 0 < row["seconds"] < 60


def test_explain_ends_with_what_the_scan_has_to_look_at(ask: Callable[[str], Rows]) -> None:
    last = ask("EXPLAIN SELECT b FROM t WHERE a BETWEEN 250 AND 349")[-1]
    assert last == {
        "plan_type": "scan of public.t",
        "plan": "files: 5, pruned: 0; records: 10, pruned: 8; records read: 0, in memory: 0; bytes read of content: 0, of filters: 0",
    }
    last = ask("EXPLAIN ANALYZE SELECT b FROM t WHERE a BETWEEN 250 AND 349")[-1]
    assert str(last["plan"]).startswith("files: 5, pruned: 0; records: 10, pruned: 8; records read: 2, in memory: ")


def test_how_a_statement_went_is_told(log: OpLog, engine: Engine, ask: Callable[[str], Rows]) -> None:
    with pytest.raises(RequestError):
        ask("SELECT nothing FROM t")
    with pytest.raises(RequestError):
        ask("SELECT CAST(b AS INT) FROM t")
    running = engine.run("SELECT * FROM t", log.snapshot())
    next(running.batches)
    found = {row["sql"]: row for row in ask("SELECT * FROM system.queries")}
    assert found["SELECT * FROM t"]["status"] == "running"
    assert found["SELECT nothing FROM t"]["status"] == found["SELECT CAST(b AS INT) FROM t"]["status"] == "failed"
    assert "No field named nothing" in str(found["SELECT nothing FROM t"]["error"])
    del running
    [row] = ask("SELECT status, rows FROM system.queries WHERE sql = 'SELECT * FROM t'")
    assert row["status"] == "stopped"


def test_only_the_newest_statements_are_kept(ask: Callable[[str], Rows]) -> None:
    for number in range(queries.QUERIES_KEPT + 1):
        ask(f"SELECT {number} AS n")
    found = ask("SELECT sql FROM system.queries")
    assert len(found) == queries.QUERIES_KEPT
    assert found[1] == {"sql": f"SELECT {queries.QUERIES_KEPT} AS n"}
    assert found[-1] == {"sql": "SELECT 2 AS n"}
    ask(f"SELECT '{'x' * 2000}' AS n")
    assert max(len(str(row["sql"])) for row in ask("SELECT sql FROM system.queries")) == queries.TEXT_CHARACTERS


def test_the_caches_hit_rate_is_told(log: OpLog, ask: Callable[[str], Rows]) -> None:
    def metrics() -> dict[str, int]:
        return {str(row["metric"]): int(str(row["value"])) for row in ask("SELECT * FROM system.metrics WHERE meaning > ''")}

    before = metrics()
    assert before["cache_bytes_max"] == Config().cache_bytes_max
    ask("SELECT sum(a) FROM t")
    middle = metrics()
    assert (middle["cache_hits"], middle["cache_misses"]) == (before["cache_hits"], before["cache_misses"] + 5)
    assert middle["cache_bytes"] > before["cache_bytes"]
    ask("SELECT max(a + 1) FROM t")
    after = metrics()
    assert (after["cache_hits"], after["cache_misses"]) == (middle["cache_hits"] + 5, middle["cache_misses"])
    assert after["queries"] == before["queries"] + 4


@pytest.mark.parametrize("where", ["k = 'a' OR k = 'b'", "k NOT IN ('a', 'b', 'c', 'd', 'e')"])
def test_explain_plans_again_where_arrow_cannot_filter(log: OpLog, ask: Callable[[str], Rows], where: str) -> None:
    log.append("u", pa.table({"k": ["a", "b"]}))
    for explain in ("EXPLAIN", "EXPLAIN ANALYZE", "EXPLAIN VERBOSE"):
        shown = ask(f"{explain} SELECT k, count(*) FROM u WHERE {where} GROUP BY k")
        assert not any("error" in str(row["plan_type"]) or "Traceback" in str(row["plan"]) for row in shown)
        assert shown[-1]["plan_type"] == "scan of public.u"


def test_explain_of_a_damaged_log_is_its_error(tmp_path: Path, engine: Engine) -> None:
    with OpLog.open(str(tmp_path / "damaged")) as log:
        log.append("u", pa.table({"k": ["a", "b"]}))
    [path] = (tmp_path / "damaged" / "topic=u").glob("*.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with OpLog.open(str(tmp_path / "damaged")) as log, pytest.raises(CorruptLog, match="is not readable Parquet; restore it"):
        list(engine.run("EXPLAIN SELECT k FROM u WHERE k = 'a'", log.snapshot()).batches)


def test_settings_are_those_in_force_but_for_places_on_the_disk(log: OpLog) -> None:
    engine = Engine(Config(data="/somewhere/secret", calls_max=7))
    found = {
        row["setting"]: row for batch in engine.run("SELECT * FROM system.settings", log.snapshot()).batches for row in batch.to_pylist()
    }
    assert found.keys() == {field.name for field in SETTINGS}
    assert (found["calls_max"]["value"], found["calls_max"]["default"]) == ("7", "256")
    assert (found["data"]["value"], found["grants"]["value"]) == ("set", "")
    assert "/somewhere" not in str(found)
