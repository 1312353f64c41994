"""What keeps its place in memory where not all has room. That answers do not depend on it, test_engine.py and test_model.py show."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from test_parts import wide

from flight_oplog import Config, OpLog, cache
from flight_oplog.cache import ScanCounts
from flight_oplog.sql.engine import Engine

ENTRIES, RECORDS = 10_000, 8
RECORD_BYTES = 8 * ENTRIES


@pytest.fixture
def log(folder: Path) -> Iterator[OpLog]:
    """Topics of eight records in files of their own, compressed, so that they take memory; none of them fresh."""
    with OpLog.open(str(folder), Config(compression="lz4")) as log:
        for number in range(RECORDS):
            numbers = range(number * ENTRIES, (number + 1) * ENTRIES)
            for topic in ("t", "u"):
                log.append(topic, pa.record_batch({"n": numbers}))
            log.append("both", pa.record_batch({"n": numbers, "m": range(ENTRIES)}))
    with OpLog.open(str(folder), Config(compression="lz4")) as log:
        yield log


def engine_of(records: float) -> Engine:
    """An engine with room for so many records."""
    return Engine(Config(cache_bytes_max=int(records * RECORD_BYTES), state_bytes_max=0))


def asked(engine: Engine, log: OpLog, sql: str) -> ScanCounts:
    """Ask something of one topic; return what its scan counted."""
    running = engine.run(sql, log.snapshot())
    list(running.batches)
    [found] = running.counts.values()
    assert isinstance(found, ScanCounts)
    return found


def hits(engine: Engine, log: OpLog, topic: str = "t", where: str = "n % 2 = 0") -> int:
    """Ask for a topic's entries; return how many of its records were in memory."""
    return asked(engine, log, f"SELECT n FROM {topic} WHERE {where}").cache_hits


def test_half_of_what_is_read_again_and_again_is_found_in_half_the_room(log: OpLog) -> None:
    engine = engine_of(RECORDS / 2 + 0.5)
    assert [hits(engine, log) for _ in range(6)] == [0] + [RECORDS // 2] * 5
    engine = engine_of(RECORDS + 0.5)
    assert [hits(engine, log, topic) for topic in "tututu"] == [0, 0, *[RECORDS, 0] * 2], "one finds all that it reads, not both nothing"


def test_who_reads_much_once_takes_the_place_of_nobody(log: OpLog) -> None:
    engine = engine_of(RECORDS + 1.5)
    assert [hits(engine, log) for _ in range(2)] == [0, RECORDS]
    assert hits(engine, log, "u") == 0
    assert hits(engine, log) == RECORDS


def test_what_is_asked_for_no_more_gives_way(log: OpLog) -> None:
    engine = engine_of(RECORDS + 0.5)
    for _ in range(20):
        hits(engine, log)
    assert [hits(engine, log, "u") for _ in range(3)] == [0, 0, RECORDS], "however often it was asked for"


def test_what_was_committed_just_now_has_a_place(log: OpLog) -> None:
    engine = engine_of(RECORDS)
    for _ in range(3):
        assert hits(engine, log) in (0, RECORDS)
    log.append("u", pa.record_batch({"n": range(RECORDS * ENTRIES, (RECORDS + 1) * ENTRIES)}))
    newest = f"n >= {RECORDS * ENTRIES}"
    assert [hits(engine, log, "u", newest) for _ in range(2)] == [0, 1]


def test_a_statement_that_reads_a_record_twice_uses_it_once(log: OpLog) -> None:
    """The condition's column is read, then the others: that is no second use, for which something else would have to go."""
    engine, few = engine_of(RECORDS + 0.5), " OR ".join(f"n = {number * ENTRIES}" for number in range(RECORDS))
    misses = [asked(engine, log, f"SELECT m FROM both WHERE {few}").cache_misses for _ in range(4)]
    assert misses == [2 * RECORDS] + [RECORDS] * 3, "half of the columns are found"


def test_uses_are_remembered_up_to_a_limit(log: OpLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "USES_KEPT", RECORDS)
    engine = engine_of(3.5)
    for _ in range(3):
        assert [hits(engine, log, topic) for topic in ("t", "u")] in ([0, 0], [3, 0])
    assert len(engine._planner.cache._uses) == RECORDS + 3, "of what is kept, and of others"


def test_what_nobody_remembers_gives_way(log: OpLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "USES_KEPT", 0)
    engine = engine_of(RECORDS + 0.5)
    assert hits(engine, log) == 0
    engine._planner.cache._uses.clear()
    assert [hits(engine, log, "u") for _ in range(2)] == [0, RECORDS]


def test_a_statement_that_scans_a_topic_twice_uses_it_once(log: OpLog) -> None:
    engine = engine_of(RECORDS + 0.5)
    assert [hits(engine, log) for _ in range(2)] == [0, RECORDS]
    list(engine.run("SELECT count(*) AS c FROM u a JOIN u b ON a.n = b.n WHERE a.n % 2 = 0 AND b.n % 3 = 0", log.snapshot()).batches)
    assert hits(engine, log) == RECORDS


def test_nothing_goes_in_vain(folder: Path) -> None:
    """What would have to take the place of something in use takes the place of nothing else either."""
    with OpLog.open(str(folder), Config(compression="lz4")) as log:
        for topic, entries in [("small", 1_000), ("used", 8_000), ("large", 9_000)]:
            log.append(topic, pa.record_batch({"n": range(entries)}))
    with OpLog.open(str(folder)) as log:
        engine = Engine(Config(cache_bytes_max=8 * 9_500, state_bytes_max=0))
        for topic in ("small", "large", "used", "used", "large"):
            hits(engine, log, topic)
        assert [hits(engine, log, topic) for topic in ("small", "used", "large")] == [1, 1, 0]


def test_what_lies_within_an_array_is_counted(folder: Path) -> None:
    wide = pa.StructArray.from_arrays([pa.array(np.random.default_rng(n).random(1_000)) for n in range(200)], [f"c{n}" for n in range(200)])
    with OpLog.open(str(folder), Config(compression="none")) as log:
        log.append("t", pa.record_batch({"s": wide}))
    with OpLog.open(str(folder)) as log:
        engine = Engine(Config(state_bytes_max=0))
        asked(engine, log, "SELECT s FROM t")
        assert engine._planner.cache._bytes >= 200 * cache.ARRAY_BYTES


def test_pages_of_mapped_files_need_no_room(folder: Path) -> None:
    with OpLog.open(str(folder), Config(compression="none")) as log:
        for number in range(3):
            log.append("wide", wide(number * 60_000))
    with OpLog.open(str(folder), Config(compression="none")) as log:
        engine = Engine(Config(cache_bytes_max=1 << 20, state_bytes_max=0))
        found = [engine.run("SELECT * FROM wide", log.snapshot()) for _ in range(2)]
        read = [(sum(batch.nbytes for batch in each.batches), *(c.content_bytes for c in each.counts.values())) for each in found]
        assert read[0][0] == read[1][0] > 10 << 20
        assert read[0][1] > 10 << 20
        assert read[1][1] == 0
