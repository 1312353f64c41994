"""Rows from here and there: the same as Arrow takes them, whatever their columns are, and how many threads look for them."""

import decimal
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import rows

from flight_oplog import Config, OpLog, gathering, provider
from flight_oplog.gathering import Columns, Few
from flight_oplog.numbers import Noted
from flight_oplog.scans import Fragment
from flight_oplog.sql.engine import Engine

VALUES: dict[pa.DataType, Any] = {
    pa.int8(): lambda n: n % 100,
    pa.uint16(): lambda n: n * 7 % 65_536,
    pa.int64(): lambda n: -n * 7919,
    pa.float16(): lambda n: np.float16(n % 13),
    pa.float32(): lambda n: n / 3,
    pa.float64(): lambda n: (n / 7, -0.0, float("inf"))[n % 3],
    pa.bool_(): lambda n: n % 3 == 0,
    pa.timestamp("us", "UTC"): lambda n: n * 1_000_003,
    pa.timestamp("s"): lambda n: n,
    pa.date32(): lambda n: n,
    pa.date64(): lambda n: n * 86_400_000,
    pa.time64("ns"): lambda n: n * 1000,
    pa.duration("ms"): lambda n: n,
    pa.decimal128(12, 3): lambda n: decimal.Decimal(n) / 8,
    pa.string(): lambda n: f"text {n}",
    pa.binary(3): lambda n: f"{n % 1000:03}".encode(),
    pa.list_(pa.int32()): lambda n: [n] * (n % 4),
    pa.null(): lambda n: None,
}


@pytest.mark.parametrize("nulls", [0, 1, 100], ids=["no nulls", "some nulls", "only nulls"])
@pytest.mark.parametrize("kind", VALUES, ids=str)
def test_a_few_rows_are_those_that_arrow_takes(kind: pa.DataType, nulls: int) -> None:
    chance, make, noted = random.Random(f"{kind} {nulls}"), VALUES[kind], Noted()
    whole = pa.array([None if chance.randrange(100) < nulls else make(n) for n in range(300)], kind)
    pieces = [whole[:7], whole[7:7], whole[7:150], whole[150:]]
    schema = pa.schema([("stored", kind), ("own", kind), ("coded", pa.string()), ("absent", kind)])
    texts = pa.array([None if chance.randrange(100) < nulls else f"text {n % 5}" for n in range(300)], pa.string())
    table = pa.table([whole, whole, texts, pa.nulls(300, kind)], schema)
    own = {"own": whole, "coded": texts.dictionary_encode()}
    for wanted in (*range(1, 12), 64, 65, 200):
        columns = Columns(schema, [len(piece) for piece in pieces], {"stored": pieces}, own, noted)  # type: ignore[arg-type]
        of = np.array(sorted(chance.sample(range(300), wanted)))
        few = Few(schema, schema, None)
        found = pa.Table.from_batches([*few.add(columns, of), *few.taken()], schema)
        found.validate(full=True)
        assert found.equals(table.take(of))


def test_a_column_that_is_shown_in_another_type_is_gathered_in_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "_HANDFUL", 0)
    schema, stored = pa.schema([("n", pa.int64())]), [pa.array(range(50), pa.int16())]
    few = Few(schema, schema, None)
    found = [*few.add(Columns(schema, [50], {"n": stored}, {}), np.array([3, 5, 49])), *few.taken()]  # type: ignore[dict-item]
    assert [batch.to_pydict() for batch in found] == [{"n": [3, 5, 49]}]
    assert found[0].schema == schema


def test_few_entries_of_many_in_memory_are_found_by_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several would wait for each other; from a disk, each has its own to wait for."""
    monkeypatch.setattr(provider, "ALONE_ENTRIES", 0)
    fragments: list[int] = []
    monkeypatch.setattr(provider, "Fragment", lambda *of: fragments.append(1) or Fragment(*of))
    with OpLog.open(str(tmp_path / "log"), Config()) as log:
        for start in range(0, 9 * 20_000, 20_000):
            entries = {"key": [f"key {n % 500:03}" for n in range(20_000)], "n": range(20_000), "m": range(start, start + 20_000)}
            log.append("t", pa.table(entries))
        engine = Engine(Config(state_bytes_max=0))
        engine._planner._partitions = 2

        def read_by(sql: str, found: int) -> int:
            fragments.clear()
            assert len(rows(engine, log.snapshot(), f"SELECT m FROM t {sql}")) == found
            return len(fragments)

        for sql, found in (("WHERE key = 'key 007'", 9 * 40), ("ORDER BY n DESC LIMIT 3", 3)):
            assert [read_by(sql, found) for _ in range(3)] == [2, 1, 1]
        assert read_by("WHERE key = 'key 008'", 9 * 40) == 1
        assert read_by("ORDER BY n LIMIT 4", 4) == 1
        assert read_by("WHERE n > 7 ORDER BY n LIMIT 5", 5) == 1
        assert [read_by("WHERE key > 'key 2' ORDER BY n LIMIT 6", 6) for _ in range(2)] == [2, 2], "Arrow compares all of them"
        assert [read_by("WHERE m > 7 ORDER BY n LIMIT 6", 6) for _ in range(2)][-1] == 1
        assert read_by("WHERE n % 500 = 7", 9 * 40) == 2
