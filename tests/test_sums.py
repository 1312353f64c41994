"""Sums over a range of time are answered without a plan: with what DataFusion says, and only where it would say so."""

import datetime
import decimal
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import flip, rows

from flight_oplog import Config, OpLog
from flight_oplog.errors import CorruptLog, NotFound, OplogError
from flight_oplog.grants import Principal, Rights
from flight_oplog.sql import planner, sums
from flight_oplog.sql.engine import Engine

START = datetime.datetime(2024, 2, 28, 23, 59, 50, tzinfo=datetime.UTC)
ENTRIES = 500
TIMES = {"us": pa.timestamp("us", "UTC"), "ns": pa.timestamp("ns", "UTC"), "ms": pa.timestamp("ms", "+00:00"), "s": pa.timestamp("s")}


def entries(seed: int, first: int, rises: bool = True) -> pa.RecordBatch:
    drawn = np.random.default_rng(seed)
    micros = int(START.timestamp()) * 1_000_000 + 33_000 * np.arange(first, first + ENTRIES)
    if not rises:
        drawn.shuffle(micros)
    absent = drawn.random(ENTRIES) < 0.1
    floats = np.where(drawn.random(ENTRIES) < 0.002, np.nan, drawn.normal(size=ENTRIES))
    scaled = {"us": micros, "ns": micros * 1000, "ms": micros // 1000, "s": micros // 1_000_000}
    return pa.record_batch(
        {
            **{unit: pa.array(scaled[unit], mask=absent if unit == "ns" else None).cast(kind) for unit, kind in TIMES.items()},
            "f": pa.array(floats, mask=absent),
            "i": pa.array(drawn.integers(-(1 << 62), 1 << 62, ENTRIES), mask=absent),
            "u": pa.array(drawn.integers(0, 1 << 63, ENTRIES, dtype=np.uint64)),
            "small": pa.array(drawn.integers(-100, 100, ENTRIES, dtype=np.int16)),
            "d": pa.array([decimal.Decimal(value) for value in range(ENTRIES)], pa.decimal128(9, 2)),
            "day": pa.array(drawn.integers(0, 20_000, ENTRIES, dtype=np.int32), pa.date32()),
            "text": pa.array([None if none else f"t{value}" for none, value in zip(absent, drawn.integers(0, 9, ENTRIES), strict=True)]),
        }
    )


@pytest.fixture
def topics(folder: Path) -> Iterator[OpLog]:
    """Topics of several records: times that rise, that do not, and times with a zone."""
    with OpLog.open(str(folder), Config(compression="none")) as log:
        for number in range(4):
            log.append("risen", entries(number, number * ENTRIES))
            log.append("mixed", entries(number, number * ENTRIES, rises=False))
        days = pa.array([START + datetime.timedelta(days=number) for number in range(300)], pa.timestamp("us", "Europe/Lisbon"))
        log.append("zoned", pa.record_batch({"t": days}))  # UTC in winter
        yield log


def is_same(one: Any, other: Any) -> bool:
    """Whether two values are equal, but for the last digits of sums."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9) or (math.isnan(one) and math.isnan(other))
    return bool(one == other)


class Twice:
    """An engine and one that plans everything, asked the same."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.planned = Engine(Config()), Engine(Config())
        monkeypatch.setattr(self.planned._sums, "note", lambda asked, schema: None)
        self._plans = 0
        frame = planner.Planner.frame

        def counted(asked: planner.Planner, *arguments: Any) -> Any:
            self._plans += asked is self.engine._planner
            return frame(asked, *arguments)

        monkeypatch.setattr(planner.Planner, "frame", counted)

    def ask(self, log: OpLog, sql: str) -> bool:
        """Ask both; whether the first did without a plan."""
        before, found = self._plans, []
        for engine in (self.engine, self.planned):
            try:
                snapshot = log.snapshot()
                prepared = engine.prepare(sql, snapshot).schema
                running = engine.run(sql, snapshot)
                assert prepared.equals(running.schema, check_metadata=True)
                found.append((prepared, pa.Table.from_batches(list(running.batches), running.schema)))
            except OplogError as error:
                found.append((type(error), str(error)))
        (one, values), (other, expected) = found
        assert one == other
        if isinstance(values, str):
            assert values == expected
        else:
            assert values.schema == expected.schema
            for mine, theirs in zip(values.to_pylist(), expected.to_pylist(), strict=True):
                assert mine.keys() == theirs.keys()
                assert all(is_same(mine[name], theirs[name]) for name in mine), (sql, mine, theirs)
        return self._plans == before


@pytest.fixture
def twice(monkeypatch: pytest.MonkeyPatch) -> Twice:
    return Twice(monkeypatch)


def written(micros: int, digits: int = 6, between: str = " ", zone: str = "+00:00") -> str:
    moment = START + datetime.timedelta(microseconds=micros)
    fraction = f".{moment.microsecond:06}"[: digits + 1] if digits else ""
    return f"'{moment:%Y-%m-%d}{between}{moment:%H:%M:%S}{fraction}{zone}'"


CASTS = ["CAST({} AS TIMESTAMP WITH TIME ZONE)", "TIMESTAMP {}", "CAST({} AS TIMESTAMP)", "{}", "({})"]
MADE = "count(*) count(1) count(f) count(text) sum(f) sum(i) sum(u) avg(f) min(i) max(u) min(us) max(day)".split()  # noqa: SIM905
COMPARED = ["{t} >= {a} AND {t} < {b}", "{t} > {a}", "{t} <= {a}", "{t} BETWEEN {a} AND {b}", "{a} <= {t}", "{t} = {a}"]
SPAN = ENTRIES * 4 * 33_000


@pytest.mark.parametrize("topic", ["risen", "mixed"])
@pytest.mark.parametrize("seed", range(4))
def test_answers_are_those_of_a_plan(topics: OpLog, twice: Twice, topic: str, seed: int) -> None:
    drawn, unplanned = random.Random(seed), 0
    for _ in range(12):
        unit, cast = drawn.choice([*TIMES]), drawn.choice(CASTS)
        digits, between, zone = drawn.choice([0, 1, 3, 6]), drawn.choice(" T"), drawn.choice(["+00:00", "Z", ""])
        made = ", ".join(f"{each} AS c{place}" for place, each in enumerate(drawn.sample(MADE, drawn.randint(1, 4))))
        schema = drawn.choice(["", "public.", "log."])
        compared = drawn.choice(COMPARED)
        asked = []
        for _ in range(5):
            a, b = (cast.format(written(drawn.randrange(-SPAN // 8, SPAN), digits, between, zone)) for _ in range(2))
            sql = f"SELECT {made} FROM {schema}{topic} WHERE {compared.format(t=unit, a=a, b=b)}"
            asked.append(twice.ask(topics, sql))
        unplanned += sum(asked)
    assert unplanned > 6, "most are of a form"


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT count(*) FROM risen WHERE us >= CAST({} AS DATE)",
        "SELECT count(*) FROM risen WHERE us >= CAST({} AS TIMESTAMP(0))",
        "SELECT count(*) FROM risen WHERE us >= CAST({} AS TIMESTAMP(3))",
        "SELECT count(*) FROM risen WHERE us >= CASE WHEN small = 1 THEN TIMESTAMP {} END",
        "SELECT count(*) FROM risen WHERE us >= TIMESTAMP {} AND i > 0",
        "SELECT count(*) FROM risen WHERE us >= TIMESTAMP {} OR us IS NULL",
        "SELECT count(*) FROM risen WHERE NOT us >= TIMESTAMP {} AND us < TIMESTAMP {}",
        "SELECT count(*) FROM risen WHERE us >= TIMESTAMP {} AND us >= TIMESTAMP {}",
        "SELECT count(*) FROM risen WHERE us <> TIMESTAMP {}",
        "SELECT count(*) FROM risen WHERE us IN (TIMESTAMP {}, TIMESTAMP {})",
        "SELECT count(*) FROM risen WHERE us >= TIMESTAMP {} AND TIMESTAMP {} < '2030-01-01'",
        "SELECT count(*) FROM risen WHERE us >= TIMESTAMP {} AND us < now()",
        "SELECT count(*) FROM risen WHERE us >= TIMESTAMP {} AND current_date > '2020-01-01'",
        "SELECT count(*) FROM risen WHERE us - INTERVAL '1' HOUR >= TIMESTAMP {}",
        "SELECT count(*) FROM risen WHERE us >= TIMESTAMP {} - INTERVAL '1' HOUR",
        "SELECT count(*) FROM risen WHERE day >= CAST({} AS DATE)",
        "SELECT count(*) FROM risen WHERE CAST(us AS DATE) >= TIMESTAMP {}",
        "SELECT count(*), TIMESTAMP {} FROM risen WHERE us >= TIMESTAMP {}",
        "SELECT count(*) + 1 FROM risen WHERE us >= TIMESTAMP {}",
        "SELECT count(*), small FROM risen WHERE us >= TIMESTAMP {} GROUP BY small ORDER BY small",
        "SELECT count(*) FROM risen WHERE us >= TIMESTAMP {} HAVING count(*) > 3",
        "SELECT count(*) FROM risen WHERE us >= TIMESTAMP {} LIMIT 0",
        "SELECT count(DISTINCT small) FROM risen WHERE us >= TIMESTAMP {}",
        "SELECT count(*) FILTER (WHERE small > 0) FROM risen WHERE us >= TIMESTAMP {}",
        "SELECT count(*) FROM risen WHERE us >= TIMESTAMP {} AND CAST(current_date AS INT) < 99999",
        "SELECT sum(d) FROM risen WHERE us >= TIMESTAMP {}",
        "SELECT avg(d) FROM risen WHERE us >= TIMESTAMP {}",
        "SELECT max(text) FROM risen WHERE us >= TIMESTAMP {}",
        "SELECT sum(small) FROM risen WHERE us >= TIMESTAMP {}",
        "SELECT avg(i) FROM risen WHERE us >= TIMESTAMP {}",
        "SELECT sum(f + 1) FROM risen WHERE us >= TIMESTAMP {}",
        "SELECT min(f), max(f) FROM risen WHERE us >= TIMESTAMP {}",
        'SELECT count(*) FROM risen WHERE "us" >= TIMESTAMP {}',
        "SELECT count(*) FROM risen -- it's\nWHERE us >= TIMESTAMP {}",
        "SELECT count(*) FROM zoned WHERE t >= {}",
        "SELECT count(*) FROM risen WHERE us >= TIMESTAMP {} AT TIME ZONE 'Europe/Lisbon'",
        "SELECT count(*) FROM risen WHERE us >= CAST({} AS TIMESTAMP) at  time zone 'Africa/Casablanca'",
        "SELECT count(*) FROM risen WHERE ms >= TIMESTAMP {}",
        "SELECT count(*) FROM risen WHERE s > {}",
        "SELECT count(*) FROM records.risen WHERE min_time >= TIMESTAMP {}",
        "SELECT count(*) FROM system.queries WHERE started >= TIMESTAMP {}",
        "SELECT count(*) FROM (SELECT us FROM risen LIMIT 9) WHERE us >= TIMESTAMP {}",
        "SELECT count(*) FROM risen, mixed WHERE risen.us >= TIMESTAMP {}",
    ],
)
def test_what_is_no_such_sum_is_planned(topics: OpLog, twice: Twice, sql: str) -> None:
    for round_part in (1_000_000, 86_400_000_000 * 60, 123_456):  # a second, midnights in summer, and not at all
        for number in range(1, 4):
            times = [written(10_000_000 + round_part * (number + place), zone="") for place in range(sql.count("{}"))]
            assert not twice.ask(topics, sql.format(*times))


def known(topics: OpLog, twice: Twice, sql: str, digits: int = 6, zone: str = "+00:00") -> None:
    """Make the form of a text known."""
    for micros in (0, 10_000, 700_000):
        assert twice.ask(topics, sql.format(written(micros, digits, zone=zone))) == (micros == 700_000)


ASKED = "SELECT count(*) AS n, sum(f) AS total FROM risen WHERE us >= CAST({} AS TIMESTAMP WITH TIME ZONE)"


@pytest.mark.parametrize(
    "time",
    [
        "'2024-02-30 00:00:00.000000+00:00'",
        "'2024-02-29 24:00:00.000000+00:00'",
        "'2024-02-29 23:59:60.000000+00:00'",
        "'2024-02-29 23:59:59.000000+01:00'",
        "'2024-02-29 23:59:59.000000-00:00'",
        "'0000-02-29 23:59:59.000000+00:00'",
        "'0001-01-01 00:00:00.000000+00:00'",
        "'1677-09-21 00:12:43.145224+00:00'",
        "'2262-04-11 23:47:16.854775+00:00'",
        "'2262-04-11 23:47:16.854776+00:00'",
        "'9999-12-31 23:59:59.999999+00:00'",
        "'2024-02-29-23:59:59.000000+00:00'",
        "'2024-02-29 23:59:59.000000 00:00'",
        "'0000000000000000000000000000000'",
    ],
)
def test_other_times_of_a_known_form_mean_what_they_do_to_datafusion(topics: OpLog, twice: Twice, time: str) -> None:
    known(topics, twice, ASKED)
    twice.ask(topics, ASKED.format(time))


def test_what_comes_and_goes_is_seen(topics: OpLog, twice: Twice) -> None:
    known(topics, twice, ASKED)
    before = rows(twice.engine, topics.snapshot(), ASKED.format(written(0)))[0]["n"]
    topics.append("risen", entries(5, 4 * ENTRIES))
    assert twice.ask(topics, ASKED.format(written(1)))
    assert rows(twice.engine, topics.snapshot(), ASKED.format(written(0)))[0]["n"] == before + ENTRIES
    topics.append("risen", entries(6, 5 * ENTRIES).append_column("new", pa.array(range(ENTRIES))))
    assert not twice.ask(topics, ASKED.format(written(2))), "names may mean something else"
    assert not twice.ask(topics, ASKED.format(written(3)))
    assert twice.ask(topics, ASKED.format(written(4)))
    at_first = topics._store.snapshot_at(topics.snapshot().table_version - 1)
    assert rows(twice.engine, at_first, ASKED.format(written(0)))[0]["n"] == before + ENTRIES


def test_a_form_is_known_to_whoever_may_read_alone(topics: OpLog, twice: Twice) -> None:
    known(topics, twice, ASKED)
    stranger = topics.snapshot().seen_by(Principal("stranger", rights=Rights(read=frozenset({"mixed"}))))
    for sql in (ASKED.format(written(0)), ASKED.format(written(700_000)), ASKED.format(written(5))):
        with pytest.raises(NotFound):
            twice.engine.prepare(sql, stranger)
        with pytest.raises(NotFound):
            twice.engine.run(sql, stranger)


def test_a_long_range_is_planned(topics: OpLog, twice: Twice, monkeypatch: pytest.MonkeyPatch) -> None:
    known(topics, twice, ASKED)
    monkeypatch.setattr(sums, "SHORT_ENTRIES", 4 * ENTRIES)
    assert twice.ask(topics, ASKED.format(written(1)))
    monkeypatch.setattr(sums, "SHORT_ENTRIES", 4 * ENTRIES - 1)
    assert not twice.ask(topics, ASKED.format(written(2)))


def test_no_more_forms_are_kept_than_are_to_be(topics: OpLog, twice: Twice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "FORMS_KEPT", 3)
    for number in range(5):
        for micros in (1, 2):
            twice.ask(topics, f"SELECT count(*) AS n{number} FROM risen WHERE us >= TIMESTAMP {written(micros, zone='')}")
    assert len(twice.engine._sums._forms) == len(twice.engine._sums._once) == 3


def test_what_was_read_is_counted_and_what_is_damaged_is_named(topics: OpLog, twice: Twice, folder: Path) -> None:
    known(topics, twice, ASKED)
    running = twice.engine.run(ASKED.format(written(2 * ENTRIES * 33_000)), topics.snapshot())
    assert sum(batch.num_rows for batch in running.batches) == 1
    [counts] = running.counts.values()
    assert (counts.files, counts.records_read) == (4, 2)
    assert counts.files_pruned + counts.records_pruned == 2 or counts.files_pruned == 2
    engine = Engine(Config(cache_bytes_max=0))
    for micros in (0, 1):
        rows(engine, topics.snapshot(), ASKED.format(written(micros)))
    record = next(iter(topics.snapshot().records("risen")))
    assert record.span is not None
    place = sum(record.span) // 2
    flip(folder / record.file.path, place)
    with OpLog.open(str(folder)) as log:
        running = engine.run(ASKED.format(written(2)), log.snapshot())
        with pytest.raises(CorruptLog, match=r"topic 'risen', file .*, offset 0: content does not match its digest; restore the file"):
            list(running.batches)
    flip(folder / record.file.path, place)
