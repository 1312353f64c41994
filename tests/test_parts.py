"""A few columns of a large record are read alone, and checked alone."""

import json
import mmap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import SEED, flip, rows
from deltalake import DeltaTable
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codec import ARRAYS

from flight_oplog import Config, OpLog, codec, parts, provider
from flight_oplog.errors import CorruptLog
from flight_oplog.maps import MAPPED_BYTES_MAX
from flight_oplog.parts import Part, Parts
from flight_oplog.schema import normal_schema
from flight_oplog.sql.engine import Engine
from flight_oplog.storage import Folder

COLUMNS = [array for array in ARRAYS.values() if len(array) == 4]
COLUMNS += [pa.nulls(4), pa.array([True, None, False, True]), pa.array([b"abcd", None, b"efgh", b"ijkl"], pa.binary(4))]
ENTRIES = 60_000


def wide(first: int, entries: int = ENTRIES) -> pa.RecordBatch:
    """Entries of 4.4 MB, of which `n` is 8 bytes."""
    n = np.arange(first, first + entries)
    random = pa.py_buffer(np.random.default_rng(first).bytes(60 * entries))
    payload = pa.FixedSizeBinaryArray.from_buffers(pa.binary(60), entries, [None, random])
    return pa.record_batch({"n": n, "payload": payload, "half": n / 2})


@pytest.fixture
def wide_log(folder: Path) -> Iterator[OpLog]:
    """Six records in six files."""
    with OpLog.open(str(folder), Config(compression="none")) as log:
        for number in range(6):
            log.append("wide", wide(number * ENTRIES))
        yield log


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PARTS_FROM_BYTES", 0)


@pytest.mark.usefixtures("always")
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_columns_can_be_read_alone(data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=6))
    batch = pa.RecordBatch.from_arrays(chosen, [f"c{place}" for place in range(len(chosen))])
    schema = normal_schema(batch.schema)
    plain = codec.conform(batch, schema)
    batches = [plain.slice(*data.draw(st.sampled_from([(0, 4), (1, 2), (3, 1)]))) for _ in range(data.draw(st.integers(1, 3)))]
    content = codec._written(batches, schema, data.draw(st.sampled_from(["none", "lz4", "zstd"])))
    found = Parts.of(content, schema)
    assert found is not None
    assert found.check(content)
    assert Parts.read(found.written()) == found
    names = data.draw(st.lists(st.sampled_from(schema.names), min_size=1, unique=True))
    memory = mmap.mmap(-1, found.size)
    for start, end in found.spans(names, data.draw(st.sampled_from([0, 100]))):
        memory[start:end] = content.slice(start, end - start).to_pybytes()
    assert found.check(pa.py_buffer(memory), names)
    decoded = codec.decode(pa.py_buffer(memory), sum(part.num_rows for part in batches), "here", names)
    expected = [name for name in schema.names if name in names]
    assert pa.Table.from_batches(decoded).equals(pa.Table.from_batches(batches).select(expected))


@pytest.mark.usefixtures("always")
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_byte_of_content_is_checked(data: st.DataObject) -> None:
    batch = pa.record_batch({"a": [1, 2], "s": ["x", "y"]})
    content = codec.encode([batch], batch.schema, data.draw(st.sampled_from(["none", "zstd"])))
    found = Parts.of(content, batch.schema)
    assert found is not None
    damaged = bytearray(content)
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    assert not found.check(pa.py_buffer(damaged))
    assert not found.check(content.slice(0, content.size - 1))


def test_small_content_and_very_wide_content_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = wide(0)
    content = codec.encode([batch], batch.schema, "none")
    assert Parts.of(content, batch.schema) is not None
    many = codec.encode([SEED], SEED.schema, "none")
    assert Parts.of(many, SEED.schema) is None
    pieces = len(batch.schema) * len(codec.decode(content, ENTRIES, "here"))
    monkeypatch.setattr(parts, "PARTS_MAX", pieces)
    assert Parts.of(content, batch.schema) is not None
    monkeypatch.setattr(parts, "PARTS_MAX", pieces - 1)
    assert Parts.of(content, batch.schema) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"bytes":1}', '{"bytes":9,"frame":"","columns":{"a":[[0,5,""]],"b":[[4,9,""]]}}'])
def test_parts_that_do_not_add_up_are_refused(text: str) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Parts.read(text)


def counts(engine: Engine, log: OpLog, sql: str) -> Any:
    running = engine.run(sql, log.snapshot())
    list(running.batches)
    [found] = running.counts.values()
    return found


@pytest.mark.parametrize("compression", ["none", "lz4"])
def test_a_query_reads_the_bytes_of_its_columns(folder: Path, compression: str) -> None:
    with OpLog.open(str(folder), Config(compression=compression)) as log:
        log.append("wide", wide(0))
        whole = counts(Engine(Config()), log, "SELECT * FROM wide").content_bytes
        narrow = counts(Engine(Config()), log, "SELECT sum(n) FROM wide").content_bytes
        assert whole > 4_000_000
        assert 0 < narrow < 0.15 * whole
        engine = Engine(Config())
        assert counts(engine, log, "SELECT sum(n) FROM wide").content_bytes == narrow
        again = counts(engine, log, "SELECT max(n + 1) FROM wide")
        assert (again.content_bytes, again.cache_hits, again.cache_misses) == (0, 1, 0)
        other = counts(engine, log, "SELECT sum(half), sum(n) FROM wide")
        assert 0 < other.content_bytes < 0.15 * whole
        assert (other.cache_hits, other.cache_misses) == (0, 1)


@pytest.mark.parametrize(("compression", "mapped"), [("none", 0), ("lz4", 0), ("lz4", MAPPED_BYTES_MAX), ("none", MAPPED_BYTES_MAX)])
def test_the_bytes_kept_are_those_of_the_columns(tmp_path: Path, compression: str, mapped: int) -> None:
    config = Config(compression=compression, mapped_bytes_max=mapped)
    with OpLog.open(str(tmp_path / "log"), config) as log:
        for number in range(3):
            log.append("wide", wide(number * ENTRIES))
        engine, nbytes = Engine(config), 3 * 8 * ENTRIES
        rows(engine, log.snapshot(), "SELECT sum(n) FROM wide")
        if compression == "none" and mapped:  # pages of files are the system's
            assert 0 < engine._planner.cache._bytes < 0.01 * nbytes
        else:
            assert nbytes <= engine._planner.cache._bytes < 1.1 * nbytes


def place_of(log: OpLog, column: str) -> tuple[Path, int]:
    """Where in its file the second record has a column."""
    record = list(log.snapshot().records("wide"))[1]
    assert record.parts is not None
    assert record.span is not None
    found: Part = Parts.read(record.parts).columns[column][0]
    return Path(log._store._storage.uri) / record.file.path, record.span[1] - Parts.read(record.parts).size + found.start


def test_damage_is_found_where_it_is_read(tmp_path: Path) -> None:
    with OpLog.open(str(tmp_path / "log"), Config(compression="none")) as log:
        for number in range(2):
            log.append("wide", wide(number * ENTRIES))
        flip(*place_of(log, "payload"))
        assert rows(Engine(Config()), log.snapshot(), "SELECT max(n) AS m, sum(half) AS s FROM wide")[0]["m"] == 2 * ENTRIES - 1
        for sql in ("SELECT min(payload) FROM wide", "SELECT * FROM wide", "SELECT n FROM wide WHERE payload = X'00'"):
            with pytest.raises(CorruptLog) as caught:
                rows(Engine(Config()), log.snapshot(), sql)
            assert f"offset {ENTRIES}: content does not match its digest; restore the file" in str(caught.value)
        [problem] = log.verify()
        assert problem.what.endswith("content does not match its digest; restore the file")


def altered(log: OpLog, change: Callable[[dict[str, Any]], Any], resealed: bool) -> OpLog:
    """The log as if the second record's parts said something else."""
    store, record = log._store, list(log.snapshot().records("wide"))[1]
    assert record.parts is not None
    row = json.loads(record.parts)
    change(row)
    object.__setattr__(record, "parts", json.dumps(row))
    if resealed:
        object.__setattr__(record, "digest", codec.digest(pa.py_buffer(json.dumps(row).encode())))
    assert record in store.reader.records(record.file)
    return log


FORGED: dict[str, tuple[Callable[[dict[str, Any]], Any], bool, str]] = {
    "other parts": (lambda row: row.update(frame="0" * 16), False, "content does not match its digest"),
    "another frame": (lambda row: row.update(frame="0" * 16), True, "content does not match its digest"),
    "more bytes than there are": (lambda row: row.update(bytes=1 << 62), True, "content does not match its digest"),
    "fewer bytes": (lambda row: row.update(bytes=1), True, "its parts do not add up"),
    "parts that overlap": (lambda row: row["columns"]["n"][0].__setitem__(1, 1 << 21), True, "its parts do not add up"),
    "negative places": (lambda row: row["columns"]["n"][0].__setitem__(0, -8), True, "its parts do not add up"),
    "no places": (lambda row: row["columns"]["n"][0].__setitem__(0, "x"), True, "its parts do not add up"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_parts_are_not_believed(wide_log: OpLog, kind: str) -> None:
    change, resealed, expected = FORGED[kind]
    with pytest.raises(CorruptLog, match=expected):
        rows(Engine(Config()), altered(wide_log, change, resealed).snapshot(), "SELECT sum(n) FROM wide")


def test_verify_finds_parts_that_are_elsewhere(tmp_path: Path) -> None:
    with OpLog.open(str(tmp_path / "log"), Config(compression="none")) as log, pytest.MonkeyPatch.context() as patch:
        located = parts._located
        patch.setattr(
            parts, "_located", lambda content, schema: dict(zip(schema.names, reversed(located(content, schema).values()), strict=True))
        )
        log.append("wide", wide(0))
        patch.undo()
        [problem] = log.verify()
        assert problem.what == "its parts are not where its columns are"


def test_records_with_parts_that_another_program_compacted_are_read(wide_log: OpLog, folder: Path) -> None:
    wide_log.append("wide", wide(6 * ENTRIES, 10))  # and a small one beside them
    DeltaTable(str(folder)).optimize.compact(partition_filters=[("topic", "=", "wide")])
    with OpLog.open(str(folder)) as log:
        assert len(log.snapshot().topics["wide"].files) == 1
        total = 6 * ENTRIES + 10
        found = rows(Engine(Config()), log.snapshot(), "SELECT sum(n) AS s, count(payload) AS c FROM wide")
        assert found == [{"s": total * (total - 1) // 2, "c": total}]
        assert log.verify() == []


# Reading ahead


class Watched:
    """Counts how many reads are under way at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pause: float) -> None:
        self.now = self.most = self.total = 0
        self._lock = threading.Lock()
        some = Folder.some

        def watched(*arguments: Any) -> pa.Buffer | None:
            with self._lock:
                self.now, self.total = self.now + 1, self.total + 1
                self.most = max(self.most, self.now)
            time.sleep(pause)
            try:
                return some(*arguments)
            finally:
                with self._lock:
                    self.now -= 1

        monkeypatch.setattr(Folder, "some", watched)


def one_partition(cache: int = 1 << 30) -> Engine:
    engine = Engine(Config(cache_bytes_max=cache))
    engine._planner._partitions = 1
    return engine


def test_the_next_records_are_read_while_one_is_looked_at(wide_log: OpLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Folder, "reads_ahead", 3)
    watched = Watched(monkeypatch, 0.05)
    expected = 6 * ENTRIES * (6 * ENTRIES - 1) // 2
    assert rows(one_partition(), wide_log.snapshot(), "SELECT sum(n) AS s FROM wide") == [{"s": expected}]
    assert (watched.most, watched.total) == (4, 6)


def test_a_question_that_reads_all_does_not_wait_for_the_first_record(wide_log: OpLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "ALONE_ENTRIES", 0)  # so few are read by whoever scans
    watched = Watched(monkeypatch, 0.05)
    expected = ENTRIES * (2 * ENTRIES - 1)
    assert rows(one_partition(), wide_log.snapshot(), f"SELECT sum(n) AS s FROM wide WHERE n < {2 * ENTRIES}") == [{"s": expected}]
    assert (watched.most, watched.total) == (2, 2)


def test_a_limit_wherever_it_stands_begins_with_one(wide_log: OpLog, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, 0)
    for sql in (
        "SELECT max(n) AS n FROM (SELECT n FROM wide LIMIT 5) AS few",
        "SELECT n FROM (SELECT n FROM wide LIMIT 5) AS few ORDER BY n DESC LIMIT 1",
        "WITH few AS (SELECT n FROM wide LIMIT 5) SELECT max(n) AS n FROM few",
    ):
        watched.total = 0
        assert rows(one_partition(), wide_log.snapshot(), sql) == [{"n": 4}]
        assert watched.total == 1, sql


def test_without_a_cache_each_record_is_read_once(wide_log: OpLog, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, 0)
    found = counts(one_partition(0), wide_log, "SELECT n FROM wide WHERE n % 2 = 0 AND n >= 0")
    assert (watched.total, found.cache_misses, found.records_read) == (6, 6, 6)


@pytest.mark.parametrize("cache", [0, 1 << 30])
def test_the_rest_of_what_a_filter_found_is_read_while_it_looks_further(
    wide_log: OpLog, monkeypatch: pytest.MonkeyPatch, cache: int
) -> None:
    monkeypatch.setattr(Folder, "reads_ahead", 2)
    watched = Watched(monkeypatch, 0.05)
    seventh = "SELECT payload FROM wide WHERE n % 7 = 0 AND n >= 0"
    found = one_partition(cache).run(seventh, wide_log.snapshot())
    began = time.monotonic()
    assert sum(batch.num_rows for batch in found.batches) == -(-6 * ENTRIES // 7)
    assert time.monotonic() - began < 0.05 * 11, "as long as one read after the other"
    assert watched.total == 12
    assert watched.most > 3, "more than what the filter looks at"
    [of_scan] = found.counts.values()
    assert (of_scan.records_read, of_scan.cache_misses) == (6, 12)


@pytest.mark.parametrize("cache", [0, 1 << 30])
def test_a_limit_that_what_was_found_meets_looks_no_further(wide_log: OpLog, monkeypatch: pytest.MonkeyPatch, cache: int) -> None:
    monkeypatch.setattr(Folder, "reads_ahead", 1)
    watched = Watched(monkeypatch, 0.02)
    engine = one_partition(cache)
    few = f"SELECT payload FROM wide WHERE n % {ENTRIES} = 7"
    assert len(rows(engine, wide_log.snapshot(), f"{few} LIMIT 1")) == 1
    assert watched.total <= 3, "one is looked at, and perhaps the next one begun"
    watched.total = 0
    assert len(rows(one_partition(cache), wide_log.snapshot(), f"{few} AND n < {2 * ENTRIES} LIMIT 2")) == 2
    assert watched.total <= 4


def test_what_is_found_before_a_damaged_record_is_handed_out(wide_log: OpLog, folder: Path) -> None:
    damaged = wide_log.snapshot().topics["wide"].files[2]
    path = folder / damaged.path
    flip(path, path.stat().st_size // 2)
    [record] = wide_log._store.reader.records(damaged)
    assert record.first_offset == 2 * ENTRIES
    with OpLog.open(str(folder)) as log:
        every = "SELECT n, half, payload FROM wide WHERE n % 2 = 0"
        assert len(rows(one_partition(), log.snapshot(), f"{every} LIMIT {ENTRIES}")) == ENTRIES
        with pytest.raises(CorruptLog, match=f"offset {2 * ENTRIES}: content does not match its digest"):
            rows(one_partition(), log.snapshot(), f"{every} LIMIT {ENTRIES + 1}")
    flip(path, path.stat().st_size // 2)


def test_a_limit_that_the_first_record_meets_reads_no_other(wide_log: OpLog, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, 0)
    assert len(rows(one_partition(), wide_log.snapshot(), "SELECT n FROM wide LIMIT 10")) == 10
    assert watched.total == 1
    assert len(rows(one_partition(), wide_log.snapshot(), "SELECT n FROM wide WHERE n % 2 = 0 LIMIT 10")) == 10
    assert watched.total == 2


def test_the_last_entries_are_found_from_the_tail(wide_log: OpLog, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, 0)
    found = rows(one_partition(), wide_log.snapshot(), "SELECT _offset, n FROM log.wide ORDER BY _offset DESC LIMIT 3")
    assert found == [{"_offset": n, "n": n} for n in range(6 * ENTRIES - 1, 6 * ENTRIES - 4, -1)]
    assert watched.total == 1
