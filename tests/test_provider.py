"""Scans: what is pruned, and that pruning never changes an answer."""

import datetime
import decimal
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import rows
from datafusion import SessionContext
from test_engine import counts

from flight_oplog import Config, OpLog, pruning, records
from flight_oplog.overview import Overview
from flight_oplog.sql.engine import Engine

TIME = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
NARROW = pa.schema(
    [
        ("place", pa.int64()),
        ("rising", pa.timestamp("us", "UTC")),
        ("number", pa.int32()),
        ("text", pa.string()),
        ("real", pa.float64()),
        ("price", pa.decimal128(9, 2)),
        ("flag", pa.bool_()),
        ("day", pa.date32()),
    ]
)
WIDE = pa.schema([("number", pa.int64()), *(field for field in NARROW if field.name != "number"), ("extra", pa.string())])


def table(chance: random.Random, entries: int, start: int, schema: pa.Schema) -> pa.Table:
    """Entries whose values drift slowly, so that bounds can tell records apart, with nulls and long texts."""

    def some(value: Any) -> Any:
        return None if chance.random() < 0.05 else value

    found = []
    for place in range(start, start + entries):
        drift = place // 10 + chance.randrange(4)
        found.append(
            {
                "place": place,
                "rising": TIME + datetime.timedelta(seconds=place),
                "number": some(drift - 20),
                "text": some(f"{drift:03}" + "x" * chance.choice([0, 70])),
                "real": some(drift / 4 - 5),
                "price": some(decimal.Decimal(drift * 25 - 600) / 100),
                "flag": some(place < 200),
                "day": some(datetime.date(2026, 1, 1) + datetime.timedelta(days=drift)),
                "extra": some(str(drift)),
            }
        )
    return pa.Table.from_pylist(found, schema)


def condition(chance: random.Random) -> str:
    value = chance.randrange(-5, 60)
    literals = {
        "place": str(value * 8),
        "rising": f"TIMESTAMP '{(TIME + datetime.timedelta(seconds=value * 8)).isoformat()}'",
        "number": str(value - 20),
        "text": f"'{value:03}" + "x" * chance.choice([0, 70]) + "'",
        "real": str(value / 4 - 5),
        "price": f"CAST({value / 4 - 6} AS DECIMAL(9, 2))",
        "flag": chance.choice(["true", "false"]),
        "day": f"DATE '{datetime.date(2026, 1, 1) + datetime.timedelta(days=value)}'",
        "extra": f"'{value}'",
    }
    column = chance.choice(list(literals))
    if chance.random() < 0.15:
        return f"{column} IS {chance.choice(['', 'NOT '])}NULL"
    if chance.random() < 0.15:
        return f"{column} {chance.choice(['', 'NOT '])}IN ({literals[column]}, NULL)"
    return f"{column} {chance.choice(['=', '<', '<=', '>', '>=', '<>'])} {literals[column]}"


@pytest.fixture(scope="module", params=["one by one", "as one"])
def long_log(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """A topic of 100 records in three files, with two schemas; read one by one, or the small ones of a row group as one."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "one by one":
            patch.setattr(records, "TOGETHER_ENTRIES_MAX", 0)
        yield from made_log(tmp_path_factory)


def made_log(tmp_path_factory: pytest.TempPathFactory) -> Any:
    chance = random.Random(1)
    parts = [table(chance, 200, 0, NARROW), table(chance, 200, 200, WIDE), table(chance, 100, 400, NARROW)]
    with OpLog.open(str(tmp_path_factory.mktemp("logs") / "log"), Config(record_entries_max=5)) as log:
        for part in parts:
            log.append("events", part)
        assert log.verify() == []
        yield log, pa.concat_tables(parts, promote_options="permissive")


@pytest.fixture(params=[pruning._SPANS_FROM, 1], ids=["few", "many"])
def spans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prune as where there are few files and records, and as where there are very many."""
    monkeypatch.setattr(pruning, "_SPANS_FROM", request.param)


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.usefixtures("spans")
def test_a_pruned_answer_is_the_unpruned_answer(long_log: Any, engine: Engine, seed: int) -> None:
    log, everything = long_log
    chance = random.Random(seed)
    where = condition(chance)
    for _ in range(chance.randrange(3)):
        where = f"{chance.choice(['', 'NOT '])}({where} {chance.choice(['AND', 'OR'])} {condition(chance)})"
    plain = SessionContext()
    plain.register_record_batches("events", [everything.to_batches()])
    sql = f"SELECT place FROM events WHERE {where} ORDER BY place"
    expected = [row["place"] for batch in plain.sql(sql).collect() for row in batch.to_pylist()]
    assert [row["place"] for row in rows(engine, log.snapshot(), sql)] == expected


def test_a_text_is_looked_for_in_bounds_before_arrow_is_asked(folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    prune = pruning.Pruner._prune_records

    def noted(pruner: pruning.Pruner, overview: Overview, places: np.ndarray | None) -> np.ndarray:
        asked.append(len(overview.records.items if places is None else places))
        return prune(pruner, overview, places)

    monkeypatch.setattr(pruning.Pruner, "_prune_records", noted)
    with OpLog.open(str(folder)) as log:
        for number in range(40):
            columns = (
                {} if number == 7 else {"s": [None] if number == 8 else [f"{number % 20:02}a", f"{number % 20:02}\U0001f600" + "x" * 80]}
            )
            log.append("t", pa.record_batch(columns | {"n": [number] * (1 if number in (7, 8) else 2)}))
        for text, expected in (
            ("05a", [5, 25]),
            ("05\uffff", []),
            ("05\U0001f600" + "x" * 80, [5, 25]),
            ("05\U0001f600y", []),
            ("zz", []),
            ("", []),
        ):
            asked.clear()
            sql = f"SELECT n FROM t WHERE s = '{text}'"
            assert sorted(row["n"] for row in rows(engine, log.snapshot(), sql)) == expected
            left = "those of which bounds say nothing, and those that may have it"
            assert 40 - counts(engine, log, sql).records_pruned <= 4, left
            assert sorted(row["n"] for row in rows(engine, log.snapshot(), f"{sql} AND n + 1 < 1000")) == expected
            assert all(each <= 4 for each in asked), left


@pytest.mark.usefixtures("spans")
def test_a_narrow_question_of_many_records_reads_few(long_log: Any, engine: Engine) -> None:
    log, _ = long_log
    are_alone = next(log.snapshot().records("events")).rows == 1
    one, others, of_file = (1, 99, 39) if are_alone else (40, 60, 0)
    found = counts(engine, log, "SELECT place FROM events WHERE place >= 250 AND place < 255")
    assert (found.files, found.files_pruned, found.records, found.records_pruned, found.records_read) == (3, 0, 100, others, one)
    found = counts(
        engine,
        log,
        "SELECT place FROM events WHERE rising >= TIMESTAMP '2026-01-01T00:04:10Z' AND rising < TIMESTAMP '2026-01-01T00:04:15Z'",
    )
    assert (found.files, found.files_pruned, found.records, found.records_pruned, found.records_read) == (3, 2, 40, of_file, one)
    found = counts(engine, log, "SELECT place FROM log.events WHERE _offset = 499")
    assert (found.files, found.files_pruned, found.records, found.records_read) == (3, 2, 20, 1 if are_alone else 20)


def test_a_fresh_append_is_in_the_next_scan(folder: Path, engine: Engine) -> None:
    """Runs of records are cached by their first record and their number; the last run grows."""
    with OpLog.open(str(folder)) as log:
        for number in range(40):
            log.append("events", pa.table({"n": [number]}))
            assert rows(engine, log.snapshot(), f"SELECT n FROM events WHERE n >= {number}") == [{"n": number}]
