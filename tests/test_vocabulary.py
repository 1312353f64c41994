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

from flight_oplog import Config, OpLog, cache, provider, vocabulary
from flight_oplog.errors import TooLarge
from flight_oplog.sql import repeated
from flight_oplog.sql.aggregates import Aggregation
from flight_oplog.sql.engine import Engine
from flight_oplog.sql.planner import Planner
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
        by_numbers, start = repeated.Repeated._by_numbers, Planner.start_by_numbers

        def spied(*arguments: Any, **how: Any) -> pa.Table | None:
            found = by_numbers(*arguments, **how)
            self.gave += found is not None
            return found

        def started(*arguments: Any) -> Any:
            self.tried += 1
            return start(*arguments)

        monkeypatch.setattr(repeated.Repeated, "_by_numbers", spied)
        monkeypatch.setattr(Planner, "start_by_numbers", started)


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
            for label in range(4):
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


def test_numbers_are_made_for_what_is_slow_in_memory(log: OpLog, spied: Spied, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(Config())
    log.append("t", pa.record_batch({"s": ["a", "b", "a"]}))

    def ask(number: int, sql: str = "SELECT s, count(*) + {0} AS c FROM t WHERE s <> '{0}' GROUP BY s") -> int:
        rows(engine, log.snapshot(), sql.format(number))
        return spied.gave

    assert [ask(0), ask(1)] == [0, 0], "once from the disk, and once from memory"
    assert ask(2) == 1, "the same but for its values was slow"
    monkeypatch.setattr(repeated, "NUMBERED_SECONDS", 1e9)
    assert [ask(3), ask(4)] == [2, 2], "it was quick"
    assert [ask(number, "SELECT s, max(s) FROM t WHERE s < '{}' GROUP BY s") for number in range(4)] == [2] * 4


def test_few_entries_make_no_numbers_and_more_of_them_do_later(log: OpLog, spied: Spied, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "NUMBERED_ENTRIES", 10)
    engine, sql = Engine(Config()), "SELECT s, count(*) + {0} AS c FROM t WHERE n >= {0} GROUP BY s ORDER BY s"
    for size, gives in ((3, False), (30, True)):
        log.append("t", pa.record_batch({"s": ["a"] * size, "n": [size] * size}))
        for number in range(4):
            total = size if size == 3 else 33
            assert rows(engine, log.snapshot(), sql.format(number)) == [{"s": "a", "c": total + number}]
        assert (spied.gave > 0) == gives
    gave = spied.gave
    assert rows(engine, log.snapshot(), sql.format(40)) == []
    assert spied.gave == gave, "no record has any"


def test_a_limit_that_may_end_it_early_does_without(log: OpLog, spied: Spied) -> None:
    engine = Engine(Config())
    log.append("t", pa.record_batch({"s": ["a", "b", "a"], "n": [1, 2, 3]}))
    for number in range(4):
        assert len(rows(engine, log.snapshot(), f"SELECT DISTINCT s FROM t WHERE n > -{number} LIMIT 1")) == 1
    assert spied.tried == 0


@pytest.mark.parametrize("db_schema", ["records", "system"])
def test_names_of_other_schemas_are_not_taken_for_topics(log: OpLog, spied: Spied, db_schema: str) -> None:
    engine = Engine(Config())
    for number in range(4):
        for topic in ("t", "topics"):
            log.append(topic, pa.record_batch({"topic": ["a", "b", "c"], "entries": [1, 2, 3]}))
        table = "t" if db_schema == "records" else "topics"
        for sql in (
            f"SELECT topic, count(*) AS c, sum(entries) AS e FROM {table} WHERE topic = 't' GROUP BY topic",
            f"SELECT count(*) AS c, max(entries) AS e FROM {table} WHERE topic = 't'",
            f"SELECT count(*) AS c FROM {table}",
        ):
            fresh = Engine(Config(state_bytes_max=0))
            expected = rows(fresh, log.snapshot(), sql.replace(f"FROM {table}", f"FROM {db_schema}.{table}"))
            for _ in range(3):
                running = engine.run(sql, log.snapshot(), db_schema=db_schema)
                assert [row for batch in running.batches for row in batch.to_pylist()] == expected, (number, sql)
    assert spied.tried == 0


def test_without_states_what_is_made_by_numbers_is_not_thrown_away(log: OpLog, spied: Spied) -> None:
    engine = Engine(Config(state_bytes_max=0))
    log.append("t", pa.record_batch({"s": ["a", "b", "a"], "n": [1, 2, 3]}))
    for number in range(6):
        assert len(rows(engine, log.snapshot(), f"SELECT s, sum(n + {number}) AS total FROM t GROUP BY s")) == 2
    assert spied.tried == spied.gave > 2


def test_vocabularies_come_and_go_with_their_numbers(log: OpLog, spied: Spied, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "VOCABULARIES_KEPT", 3)
    engine = Engine(Config())
    columns = [f"c{n}" for n in range(5)]
    log.append("t", pa.record_batch({name: ["a", name] for name in columns}))
    kept = engine._planner.cache
    for number in range(4):
        for name in columns:
            sql = f"SELECT {name}, count(*) + {number} AS c, max(length({name}) + {number}) AS m FROM t GROUP BY {name}"
            assert len(rows(engine, log.snapshot(), sql)) == 2
        held = {id(item.of) for item in kept._together.values() if item.of is not None}
        assert held == {id(each) for each in kept._vocabularies.values() if each.bytes_counted}
        assert len(kept._vocabularies) <= 3
    assert spied.gave > 5
    parts = [*kept._together.values(), *kept._records.values()]
    assert kept._bytes == sum(each.nbytes for each in parts) + sum(each.bytes_counted for each in kept._vocabularies.values())


def test_numbers_of_files_that_are_gone_are_let_go(log: OpLog, folder: Path, spied: Spied) -> None:
    engine = Engine(Config())
    for _ in range(3):
        log.append("t", pa.record_batch({"s": ["a", "b", "a"]}))
    for label in range(6):
        if label == 3:
            DeltaTable(str(folder)).optimize.compact()
        found = rows(engine, log.snapshot(), f"SELECT s, sum(length(s) + {label}) AS c FROM t GROUP BY s ORDER BY s")
        assert found == [{"s": "a", "c": 6 * (1 + label)}, {"s": "b", "c": 3 * (1 + label)}]
        kept = [key for key, item in engine._planner.cache._together.items() if item.of is not None]
        assert len(kept) == (0 if label < 1 else 3 if label < 3 else 1), "of the files that are"
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
