"""Texts numbered in memory: what is grouped by numbers is what would be grouped by texts, and costs what is said."""

import logging
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import SEED, rows
from deltalake import DeltaTable
from test_reads import bag, plain, reference

from flight_oplog import Config, OpLog, vocabulary
from flight_oplog.errors import TooLarge
from flight_oplog.sql import repeated
from flight_oplog.sql.aggregates import Aggregation
from flight_oplog.sql.engine import Engine
from flight_oplog.vocabulary import Vocabulary

TEXTS = ["", "a", "a\0", "abcdefgh", "abcdefghi", "äöü", "日本語", "it's", "x" * 40]

pytestmark = pytest.mark.usefixtures("eager")


# Numbers


@pytest.mark.parametrize("seed", range(5))
def test_a_number_stands_for_its_text_for_ever(seed: int) -> None:
    chance, known = random.Random(f"{SEED}-{seed}"), Vocabulary()
    before: list[tuple[pa.Array, pa.Array]] = []
    for _ in range(20):
        texts = pa.array([chance.choice([None, *TEXTS, str(chance.randrange(100))]) for _ in range(chance.randrange(30))], pa.string())
        texts = texts.slice(chance.randrange(len(texts) + 1))
        before.append((texts, known.numbers(texts)))
        for old, numbers in before:
            assert known.texts(pa.chunked_array([numbers])).combine_chunks() == old
            assert known.numbers(old).equals(numbers)


def test_one_text_too_many_is_refused_and_the_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "TEXTS_MAX", 3)
    known = Vocabulary()
    numbers = known.numbers(pa.array(["a", "b", "c", None, "a"]))
    with pytest.raises(TooLarge, match="more than 3 different texts"):
        known.numbers(pa.array(["a", "d"]))
    assert known.is_full
    assert len(known) == 3
    assert known.texts(pa.chunked_array([numbers])).to_pylist() == ["a", "b", "c", None, "a"]


def test_all_numbers_there_are_can_be_given() -> None:
    known = Vocabulary()
    texts = pa.array(map(str, range(vocabulary.TEXTS_MAX)))
    assert known.texts(pa.chunked_array([known.numbers(texts)])).combine_chunks() == texts
    with pytest.raises(TooLarge):
        known.numbers(pa.array(["another"]))


def test_a_byte_too_many_of_texts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = pa.array(["abc", "def"])
    monkeypatch.setattr(vocabulary, "TEXTS_BYTES_MAX", texts.nbytes)
    assert Vocabulary().numbers(texts).to_pylist() == [0, 1]
    with pytest.raises(TooLarge):
        Vocabulary().numbers(pa.array(["abc", "defg"]))


# Grouping by them


class Spied:
    """How often grouping by numbers was tried, and how often it gave something."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tried = self.gave = 0
        by_numbers = repeated.Repeated._by_numbers

        def spied(*arguments: Any, **how: Any) -> pa.Table | None:
            found = by_numbers(*arguments, **how)
            self.tried, self.gave = self.tried + 1, self.gave + (found is not None)
            return found

        monkeypatch.setattr(repeated.Repeated, "_by_numbers", spied)


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Spied:
    return Spied(monkeypatch)


def some(chance: random.Random, count: int, has_u: bool) -> pa.Table:
    """Entries with nulls; `u` is a column that some appends lack."""

    def text() -> str | None:
        return chance.choice([None, *TEXTS[: chance.randrange(1, 9)], str(chance.randrange(20))])

    columns = {
        "n": pa.array([chance.choice([None, *range(9)]) for _ in range(count)], pa.int64()),
        "s": pa.array([text() for _ in range(count)], pa.string()),
    }
    return pa.table(columns | ({"u": pa.array([text() for _ in range(count)], pa.string())} if has_u else {}))


def statement(chance: random.Random) -> str:
    number = chance.randrange(100)
    where = chance.choice(
        ["", "", f"WHERE n <> {number}", "WHERE n > 3", "WHERE s LIKE 'a%'", "WHERE s = 'a'", "WHERE u IS NOT NULL AND n < 7"]
    )
    by = chance.choice(["s", "u", "s, u", "u, s", "t.s"])
    return chance.choice(
        [
            f"SELECT {by}, count(*) AS c, sum(n + {number}) AS total FROM t {where} GROUP BY {by}",
            f"SELECT {by}, avg(n + {number}) AS mean, min(u) AS least FROM t {where} GROUP BY {by} HAVING count(*) > 1",
            f"SELECT DISTINCT {by}, {number} AS label FROM t {where}",
            f"SELECT count(DISTINCT s) AS different, {number} AS label FROM t {where}",
            f"SELECT count(*) AS c, max(n + {number}) AS most FROM t {where} GROUP BY {by} ORDER BY c, most",
            f"SELECT s AS renamed, count(u) AS c FROM t {where} GROUP BY s ORDER BY s DESC NULLS LAST LIMIT {number}",
            f"SELECT s, count(DISTINCT u) + {number} AS different, max(n) AS most FROM t {where} GROUP BY s",
            f"SELECT sum(DISTINCT n + {number}) AS total, count(*) AS c FROM t {where} GROUP BY {by}",
            f"SELECT upper(s) AS loud, count(*) + {number} AS c FROM t {where} GROUP BY s",
            f"SELECT count(*) AS groups FROM (SELECT s, u FROM t {where} GROUP BY s, u) AS inner_one",
        ]
    )


@pytest.mark.parametrize("seed", range(4))
def test_answers_are_those_of_texts(folder: Path, spied: Spied, seed: int) -> None:
    chance = random.Random(f"{SEED}-{seed}")
    engines = [Engine(Config(cache_bytes_max=size, state_bytes_max=size)) for size in (1 << 26, 5000, 0)]
    parts: list[pa.Table] = []
    with OpLog.open(str(folder), Config(record_entries_max=chance.choice([40, 1000]))) as log:
        for has_u in (False, True, False, True):
            parts.append(some(chance, chance.randrange(1, 200), has_u))
            log.append("t", parts[-1])
            if "u" not in log.snapshot().topics["t"].schema.names:
                continue
            session = plain(*parts)
            for sql in [statement(chance) for _ in range(25)]:
                expected = bag(reference(session, sql))
                for engine in engines:
                    for _ in range(2):
                        assert bag(rows(engine, log.snapshot(), sql)) == expected, sql
    assert spied.gave > 30, "else it shows nothing"


def test_a_state_by_numbers_grows_with_its_topic(log: OpLog, spied: Spied) -> None:
    engine, sql = Engine(Config()), "SELECT s, count(*) AS c FROM t GROUP BY s ORDER BY s"
    for number in range(1, 5):
        log.append("t", pa.record_batch({"s": ["a", "b", str(number)]}))
        expected = [{"s": str(n), "c": 1} for n in range(1, number + 1)] + [{"s": "a", "c": number}, {"s": "b", "c": number}]
        for _ in range(3):
            assert rows(engine, log.snapshot(), sql) == expected
    assert spied.gave == 1, "then only what is new is aggregated, and merged"


def test_a_column_of_too_many_texts_is_grouped_as_it_is(
    log: OpLog, spied: Spied, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vocabulary, "TEXTS_MAX", 100)
    engine = Engine(Config())
    for start in (0, 60, 120):
        log.append("t", pa.record_batch({"s": [str(n) for n in range(start, start + 60)]}))
    with caplog.at_level(logging.WARNING):
        for label in range(4):
            assert rows(engine, log.snapshot(), f"SELECT count(DISTINCT s) AS n, {label} AS label FROM t") == [{"n": 180, "label": label}]
    assert (spied.tried > 0, spied.gave, caplog.records) == (True, 0, [])


def test_numbers_take_two_bytes_an_entry_and_only_what_room_there_is(folder: Path, spied: Spied) -> None:
    entries = 50_000
    with OpLog.open(str(folder), Config(compression="none")) as log:
        log.append("t", pa.record_batch({"s": [str(n % 7) for n in range(entries)], "n": range(entries)}))
    with OpLog.open(str(folder)) as log:
        for room, does in ((3 * entries, True), (entries, False)):
            engine, gave = Engine(Config(cache_bytes_max=room)), spied.gave
            for label in range(3):
                assert len(rows(engine, log.snapshot(), f"SELECT s, sum(n + {label}) AS total FROM t GROUP BY s")) == 7
                assert engine._planner.cache.metrics()["cache_bytes"] <= room
            assert (spied.gave > gave) == does
            if does:
                assert 2 * entries <= engine._planner.cache.metrics()["cache_bytes"] < 2.2 * entries


def test_a_column_that_is_called_as_numbers_are_is_no_matter(log: OpLog, spied: Spied) -> None:
    log.append("t", pa.record_batch({"_number0": ["a", "b", "a"], "s": ["x", "x", "y"]}))
    for label in range(3):
        found = rows(Engine(Config()), log.snapshot(), f'SELECT s, count("_number0") + {label} AS c FROM t GROUP BY s ORDER BY s')
        assert found == [{"s": "x", "c": 2 + label}, {"s": "y", "c": 1 + label}]


def test_what_is_asked_once_makes_no_numbers(log: OpLog, spied: Spied, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(Config())
    log.append("t", pa.record_batch({"s": ["a", "b", "a"]}))
    sql = "SELECT s, count(*) + {} AS c FROM t WHERE s <> '{}' GROUP BY s"
    rows(engine, log.snapshot(), sql.format(1, "c"))
    assert spied.gave == 0
    rows(engine, log.snapshot(), sql.format(2, "d"))
    assert spied.gave == 1, "the same but for its values was slow"
    monkeypatch.setattr(repeated, "NUMBERED_SECONDS", 1e9)
    rows(engine, log.snapshot(), sql.format(3, "e"))
    assert spied.gave == 2
    rows(engine, log.snapshot(), sql.format(4, "f"))
    assert spied.gave == 2, "it was quick"
    rows(engine, log.snapshot(), "SELECT s, max(s) FROM t WHERE s < 'b' GROUP BY s")
    rows(engine, log.snapshot(), "SELECT s, max(s) FROM t WHERE s < 'c' GROUP BY s")
    assert spied.gave == 2


def test_numbers_of_files_that_are_gone_are_let_go(log: OpLog, folder: Path, spied: Spied) -> None:
    engine = Engine(Config())
    for _ in range(3):
        log.append("t", pa.record_batch({"s": ["a", "b", "a"]}))
    for label in range(6):
        if label == 3:
            DeltaTable(str(folder)).optimize.compact()
        found = rows(engine, log.snapshot(), f"SELECT s, sum(length(s) + {label}) AS c FROM t GROUP BY s ORDER BY s")
        assert found == [{"s": "a", "c": 6 * (1 + label)}, {"s": "b", "c": 3 * (1 + label)}]
        known = engine._planner.cache.vocabulary(log.snapshot().topics["t"], "s", may_make=True)
        assert known is not None
        assert known.rows_kept == (0 if label == 0 else 9)
    assert spied.gave == 5


def test_what_cannot_be_put_together_is_not_tried_again(log: OpLog, spied: Spied, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("DataFusion knows no such name")

    monkeypatch.setattr(Aggregation, "rest", fail)
    engine = Engine(Config())
    log.append("t", pa.record_batch({"s": ["a", "b", "a"], "n": [1, 2, 2]}))
    for label in range(5):
        found = rows(engine, log.snapshot(), f"SELECT s, max(n + {label}) AS most FROM t GROUP BY s ORDER BY s")
        assert found == [{"s": "a", "most": 2 + label}, {"s": "b", "most": 2 + label}]
    assert spied.tried <= 2
