"""Codes of texts: they say what the texts say, are read in their place, and cost what is said."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from conftest import SEED, rows
from hypothesis import given
from hypothesis import strategies as st
from test_reads import bag, plain, reference
from test_vocabulary import some, statement

from flight_oplog import Config, OpLog, appends, codec, codes, gathering, parts, provider, reader
from flight_oplog.appends import make_record
from flight_oplog.cache import ColumnCache, ScanCounts
from flight_oplog.codes import CodesOf
from flight_oplog.errors import CorruptLog
from flight_oplog.parts import Parts
from flight_oplog.provider import EntriesTable
from flight_oplog.records import RecordMeta
from flight_oplog.scans import ScanContext
from flight_oplog.sql import repeated
from flight_oplog.sql.engine import Engine
from flight_oplog.sql.planner import Planner

TEXT = pa.schema([("s", pa.string())])


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small records have parts too, and any column of texts codes."""
    for module in (appends, parts, reader):
        monkeypatch.setattr(module, "PARTS_FROM_BYTES", 0)
    monkeypatch.setattr(codes, "PART", 0)


def batch_of(texts: Any) -> pa.RecordBatch:
    return pa.record_batch([pa.array(texts, pa.string())], TEXT)


def coded(*batches: pa.RecordBatch, known: codes.Known | None = None) -> pa.DictionaryArray | None:
    return codes.codes_of(batches, TEXT, known).get("s")


def texts_of(entries: int, different: int) -> list[str]:
    return [f"text {place * 7919 % different:06}" for place in range(entries)]


# Made


@given(st.lists(st.lists(st.lists(st.sampled_from([None, "", "a", "a\0", "äöü", "日本語", "x" * 40]), max_size=9), min_size=1), min_size=1))
def test_codes_stand_for_the_texts_in_one_record_after_the_other(records: list[list[list[str | None]]]) -> None:
    known: codes.Known = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codes, "PART", 0)
        for record in records:
            batches = [batch_of(texts) for texts in record if texts] or [batch_of([None])]
            found = coded(*batches, known=known)
            texts = pa.chunked_array([batch.column(0) for batch in batches]).combine_chunks()
            if texts.null_count == len(texts):
                assert found is None
                continue
            assert found is not None
            assert found.type == codes.CODED
            assert found.dictionary_decode() == texts
            assert {*codes.occurring(found).to_pylist()} == {*texts.drop_null().to_pylist()}
            assert len(found.dictionary.unique()) == len(found.dictionary)
            for compression in ("none", "lz4", "zstd"):
                assert codes.read(codes.written(found, compression), len(texts), "here").equals(found)
            assert [each.to_pylist() for each in codes.singly(found, np.arange(len(texts)))] == [[text] for text in texts.to_pylist()]


def test_records_of_the_same_texts_have_them_in_the_same_order() -> None:
    texts, known = texts_of(5000, 100), codes.Known()
    first = coded(batch_of(texts), known=known)
    assert first is not None
    random.Random(1).shuffle(texts)
    second = coded(batch_of(texts), known=known)
    assert second is not None
    assert second.dictionary.equals(first.dictionary)
    third = coded(batch_of([*texts, "another text"]), known=known)
    assert third is not None
    assert third.dictionary.to_pylist() == [*first.dictionary.to_pylist(), "another text"]


def test_texts_that_come_no_more_are_left_behind_once_they_are_too_many() -> None:
    known: codes.Known = {}
    for number in range(20):
        texts = [f"{number} {text}" for text in texts_of(4000, 400)]
        found = coded(batch_of(texts), known=known)
        assert found is not None
        assert found.dictionary_decode().to_pylist() == texts
        assert codes.PART * (found.dictionary.nbytes + 2 * len(texts)) <= batch_of(texts).nbytes


def test_there_are_none_of_texts_that_hardly_repeat() -> None:
    assert coded(batch_of(texts_of(20_000, 20_000))) is None
    assert coded(batch_of(texts_of(20_000, 19_000))) is None
    assert coded(batch_of([f"text {n:06}" if n % 10 else "unknown" for n in range(20_000)])) is None, "nine of ten do not"
    assert coded(batch_of([f"text {n:06}" if n % 4 else None for n in range(20_000)])) is None
    assert coded(batch_of([f"in turns {n % 7919:06}" for n in range(100_000)])) is not None
    assert coded(batch_of(["Y", "N"] * 10_000)) is None, "five bytes an entry, of which two would be left"
    assert coded(batch_of([None] * 20_000)) is None
    assert coded(batch_of(texts_of(20_000, 100))) is not None


def test_they_take_a_third_of_the_texts_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = batch_of(texts_of(10_000, 500))
    found = coded(texts)
    assert found is not None
    part = texts.nbytes / (found.dictionary.nbytes + 2 * len(texts))
    monkeypatch.setattr(codes, "PART", part)
    assert coded(texts) is not None
    monkeypatch.setattr(codes, "PART", part * 1.0001)
    assert coded(texts) is None


@pytest.mark.parametrize("known", [False, True])
def test_there_are_none_of_one_text_too_many(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    monkeypatch.setattr(codes, "TEXTS_MAX", 100)

    def before() -> codes.Known | None:
        return {"s": pa.array(texts_of(99, 99))} if known else None

    assert coded(batch_of(texts_of(5000, 100)), known=before()) is not None
    assert coded(batch_of(texts_of(5000, 101)), known=before()) is None


def test_every_code_there_is_can_be_given() -> None:
    many = batch_of([f"{'long' * 20} {place % codes.TEXTS_MAX:06}" for place in range(codes.TEXTS_MAX * 4)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codes, "TEXTS_BYTES_MAX", 1 << 30)
        found = coded(many)
        assert found is not None
        assert len(found.dictionary) == codes.TEXTS_MAX
        assert codes.read(codes.written(found), len(many), "here").dictionary_decode() == many.column(0)
        one_more = batch_of(["another", *many.column(0).to_pylist()])
        assert coded(one_more) is None


def test_there_are_none_of_one_byte_of_texts_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = batch_of(texts_of(5000, 100))
    found = coded(texts)
    assert found is not None
    monkeypatch.setattr(codes, "TEXTS_BYTES_MAX", found.dictionary.nbytes)
    assert coded(texts) is not None
    monkeypatch.setattr(codes, "TEXTS_BYTES_MAX", found.dictionary.nbytes - 1)
    assert coded(texts) is None


def test_one_column_too_many_has_none() -> None:
    texts = pa.array(texts_of(5000, 10))
    wide = pa.record_batch({f"s{place}": texts for place in range(codes.COLUMNS_MAX + 1)})
    assert [*codes.codes_of([wide], wide.schema)] == [f"s{place}" for place in range(codes.COLUMNS_MAX)]


def test_bounds_and_filters_are_of_the_texts_that_occur() -> None:
    known: codes.Known = {}

    def bounds_of(texts: list[str]) -> dict[str, Any]:
        return make_record([batch_of(texts)], TEXT, "x", [{"entries": len(texts)}], None, "none", ("s",), known).bounds["s"]

    texts = texts_of(100_000, 100)
    with_all = bounds_of(texts)
    assert (with_all["codes"], with_all["min"], with_all["max"]) == (100, "text 000000", "text 000099")
    without = [text for text in texts if text not in ("text 000000", "text 000099")]
    found = bounds_of(without)
    assert (found["codes"], found["min"], found["max"]) == (100, "text 000001", "text 000098")
    alone = make_record([batch_of(without)], TEXT, "x", [{"entries": len(without)}], None, "none", ("s",))
    again = make_record([batch_of(without)], TEXT, "x", [{"entries": len(without)}], None, "none", ("s",), known)
    assert again.filters == alone.filters
    assert again.bounds["s"]["filter"] == alone.bounds["s"]["filter"]


@pytest.mark.parametrize("compression", ["none", "lz4", "auto"])
def test_content_too_small_for_parts_or_of_too_many_has_no_codes(monkeypatch: pytest.MonkeyPatch, compression: str) -> None:
    batch = batch_of(texts_of(100_000, 10))
    assert batch.nbytes > parts.PARTS_FROM_BYTES
    monkeypatch.setattr(parts, "PARTS_MAX", 0)
    record = make_record([batch], TEXT, "x", [{"entries": len(batch)}], None, compression)
    assert record.parts is None
    assert "codes" not in record.bounds["s"]
    assert record.content.equals(codec.encode([batch], TEXT, compression))


def test_an_append_whose_texts_hardly_repeat_is_not_looked_at_again() -> None:
    known: codes.Known = {}
    assert coded(batch_of(texts_of(20_000, 19_000)), known=known) is None
    assert known == {"s": None}
    assert coded(batch_of(texts_of(20_000, 10)), known=known) is None
    assert coded(batch_of(texts_of(20_000, 10)), known={}) is not None


# Read


@pytest.mark.parametrize("compression", ["none", "lz4"])
def test_codes_are_parts_of_content_and_content_is_what_it_was(always: None, compression: str) -> None:
    batches = [batch_of(texts_of(1000, 7)), batch_of(["another", None] * 50)]
    record = make_record(batches, TEXT, "x", [{"entries": 1100}], None, compression)
    assert record.parts is not None
    found = Parts.read(record.parts)
    assert found.check(record.content)
    assert found.fit(record.content, TEXT)
    assert pa.ipc.open_stream(record.content).read_all().equals(pa.Table.from_batches(batches))
    assert [batch.num_rows for batch in codec.decode(record.content, 1100, "here")] == [1100]
    memory = bytearray(record.content.size)
    [(start, end)] = found.spans([CodesOf("s")], 0)
    memory[start:end] = record.content.to_pybytes()[start:end]
    assert found.check(pa.py_buffer(memory), [CodesOf("s")]), "the frame is not needed for codes alone"
    stream = found.codes_in(pa.py_buffer(memory), "s")
    assert stream is not None
    assert codes.read(stream, 1100, "here").dictionary_decode().to_pylist() == [*texts_of(1000, 7), *["another", None] * 50]
    memory[end - 20] ^= 1
    assert not found.check(pa.py_buffer(memory), [CodesOf("s")])


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        b"nothing of the kind",
        codes.written(pa.array(["a"]).dictionary_encode()).to_pybytes(),
        codes.written(pa.array(["a", "b"]).dictionary_encode().cast(codes.CODED)).to_pybytes()[:-200],
        codes.written(pa.array(["a", "b", "c"]).dictionary_encode().cast(codes.CODED)).to_pybytes(),
        codes.written(pa.DictionaryArray.from_arrays(pa.array([0, 2], pa.uint16()), pa.array(["a", "b"]), safe=False)).to_pybytes(),
    ],
)
def test_what_are_no_codes_of_so_many_entries_is_refused(stream: bytes) -> None:
    with pytest.raises(CorruptLog, match="here: codes of texts"):
        codes.read(pa.py_buffer(stream), 2, "here")


STATEMENTS = [
    "SELECT n, s, u FROM t WHERE s = 'a'",
    "SELECT n FROM t WHERE s = 'a' AND n > 3",
    "SELECT s, n FROM t WHERE s <> 'a'",
    "SELECT s FROM t WHERE s IS NULL",
    "SELECT u, s FROM t WHERE s IS NOT NULL AND u = 'abcdefgh'",
    "SELECT n, u FROM t WHERE s IN ('a', '', 'äöü')",
    "SELECT n, u FROM t WHERE s NOT IN ('a', '', 'äöü')",
    "SELECT s FROM t WHERE s LIKE 'a%'",
    "SELECT s, u FROM t WHERE s > 'abc' AND s < 'it'",
    "SELECT s FROM t WHERE s = 'abcdefghi' OR n = 3",
    "SELECT s, u FROM t WHERE s = u",
    "SELECT s, u FROM t WHERE n = 4",
    "SELECT s, n FROM t WHERE s = 'nothing like it'",
    "SELECT min(s) AS least, max(u) AS most FROM t WHERE s <> 'x'",
    "SELECT upper(s) AS loud FROM t WHERE u = '日本語'",
    "SELECT s, u FROM t ORDER BY n, s, u LIMIT 7",
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.usefixtures("eager", "always")
def test_answers_are_those_of_texts(folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    chance = random.Random(f"{SEED}-codes-{seed}")
    engines = [Engine(Config(cache_bytes_max=size, state_bytes_max=size)) for size in (1 << 26, 5000, 0)]
    asked: list[CodesOf] = []
    read = codes.read
    monkeypatch.setattr(codes, "read", lambda *arguments: (asked.append(CodesOf("")), read(*arguments))[1])
    tables: list[pa.Table] = []
    config = Config(record_entries_max=chance.choice([40, 1000]), compression=chance.choice(["none", "lz4"]))
    with OpLog.open(str(folder), config) as log:
        for has_u in (True, False, True):
            tables.append(some(chance, chance.randrange(1, 200), has_u))
            log.append("t", tables[-1])
            session = plain(*tables)
            for sql in [*STATEMENTS, *(statement(chance) for _ in range(15))]:
                expected = bag(reference(session, sql))
                for engine in engines:
                    for _ in range(2):
                        assert bag(rows(engine, log.snapshot(), sql)) == expected, sql
    assert len(asked) > 30, "else it shows nothing"


@pytest.mark.usefixtures("eager", "always")
def test_a_column_that_became_wider_is_read_by_its_codes(folder: Path) -> None:
    with OpLog.open(str(folder)) as log:
        log.append("t", pa.table({"s": ["a", None, "b"] * 5, "n": range(15)}))
        log.append("t", pa.table({"s": pa.array(["a", "c"], pa.large_string()), "n": [20, 21]}))
        engine = Engine(Config())
        assert log.snapshot().topics["t"].schema.field("s").type == pa.large_string()
        for _ in range(3):
            assert len(rows(engine, log.snapshot(), "SELECT s, n FROM t WHERE s = 'a'")) == 6
            assert len(rows(engine, log.snapshot(), "SELECT s, n FROM t WHERE s LIKE 'b%'")) == 5
            found = rows(engine, log.snapshot(), "SELECT s, count(*) AS c FROM t GROUP BY s ORDER BY s NULLS FIRST")
            assert [tuple(row.values()) for row in found] == [(None, 5), ("a", 6), ("b", 5), ("c", 1)]


# What is read


ENTRIES = 600_000


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpLog]:
    """A topic of three records and more: ids, kinds and numbers."""
    chance = np.random.default_rng(5)
    ids = pa.array([f"{number:016}" for number in chance.integers(0, 1 << 53, 3000)])
    with OpLog.open(str(tmp_path_factory.mktemp("large")), Config(compression="none", record_entries_max=200_000)) as log:
        table = {
            "id": ids.take(pa.array(chance.integers(0, 3000, ENTRIES))),
            "kind": pa.array(["get", "put", "delete"]).take(pa.array(chance.integers(0, 3, ENTRIES))),
            "n": pa.array(np.arange(ENTRIES)),
            "payload": pa.array([f"{number:040}" for number in chance.integers(0, 1 << 53, ENTRIES)]),
        }
        log.append("t", pa.table(table))
        yield log


def scanned(engine: Engine, log: OpLog, sql: str) -> tuple[ScanCounts, int]:
    running = engine.run(sql, log.snapshot())
    found = sum(batch.num_rows for batch in running.batches)
    [counts] = running.counts.values()
    return counts, found


def test_only_what_repeats_has_codes(large: OpLog) -> None:
    records = [*large.snapshot().records("t")]
    assert len(records) == 3
    assert all(record.has_codes("id") and record.has_codes("kind") for record in records)
    assert not any(record.has_codes("payload") or record.has_codes("n") for record in records)


@pytest.mark.parametrize(
    ("sql", "bytes_an_entry"),
    [
        ("SELECT count(DISTINCT id) AS c FROM t", 2),
        ("SELECT id, count(*) AS c FROM t GROUP BY id", 2),
        ("SELECT kind, id, sum(n) AS total FROM t GROUP BY kind, id", 2 + 2 + 8),
        ("SELECT kind, max(n) AS most FROM t GROUP BY kind", 2 + 8),
        ("SELECT n FROM t WHERE id = '{id}'", 2 + 8),
        ("SELECT id, n FROM t WHERE id <> '{id}'", 2 + 8),
        ("SELECT id, n FROM t WHERE id IN ('{id}', 'other', 'another', 'one')", 2 + 8),
        ("SELECT n FROM t WHERE kind IN ('one', 'other')", 2),
        ("SELECT count(*) AS c FROM t WHERE kind = 'put'", 2),
    ],
)
def test_two_bytes_are_read_of_a_text(large: OpLog, sql: str, bytes_an_entry: int) -> None:
    [one] = rows(Engine(Config()), large.snapshot(), "SELECT id FROM t LIMIT 1")
    text = sql.format(**one)
    counts, found = scanned(Engine(Config(state_bytes_max=0)), large, text)
    assert found or "other" in sql
    assert counts.content_bytes < (bytes_an_entry + 0.8) * ENTRIES, "beside the texts, each once in a record"
    assert counts.content_bytes >= bytes_an_entry * ENTRIES or "other" in sql


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_codes_are_compressed_where_content_is(folder: Path, compression: str) -> None:
    texts = pa.array([f"host-{number:04}.example.com" for number in range(50)]).take(pa.array(np.arange(ENTRIES) // 7 % 50))
    with OpLog.open(str(folder), Config(compression=compression)) as log:
        log.append("t", pa.table({"s": texts, "n": np.random.default_rng(1).random(ENTRIES)}))
        for record in log.snapshot().records("t"):
            assert record.parts is not None
            part = Parts.read(record.parts).codes["s"]
            assert part.end - part.start < 0.5 * record.entries, "a quarter of two bytes"
        engine = Engine(Config(state_bytes_max=0))
        counts, found = scanned(engine, log, "SELECT s, count(*) AS c FROM t GROUP BY s")
        assert (found, counts.content_bytes < 0.5 * ENTRIES) == (50, True)
        assert engine._planner.cache.metrics()["cache_bytes"] >= 2 * ENTRIES, "what was decompressed takes memory"


def test_what_was_read_is_kept(large: OpLog) -> None:
    engine = Engine(Config(state_bytes_max=0))
    for number in range(3):
        counts, _ = scanned(engine, large, f"SELECT id, n FROM t WHERE id IN ('0{number}', 'one', 'other', 'another') OR id < '0001'")
        assert (counts.content_bytes > 0, counts.cache_misses > 0) == (number == 0, number == 0)
    assert engine._planner.cache.metrics()["cache_bytes"] < 100_000, "pages of a file take next to nothing"


def test_the_first_aggregate_is_made_by_codes_and_kept_as_others_are(large: OpLog) -> None:
    engine = Engine(Config())
    sql = "SELECT kind, count(*) AS c, sum(n) AS total FROM t GROUP BY kind ORDER BY kind"
    first = rows(engine, large.snapshot(), sql)
    assert sum(row["total"] for row in first) == ENTRIES * (ENTRIES - 1) // 2
    assert rows(engine, large.snapshot(), sql) == first
    assert engine.run(sql, large.snapshot()).counts == {}, "the second answer was in hand"


def test_columns_of_a_mapped_log_are_read_by_whoever_wants_them(large: OpLog, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, asked = Engine(Config(state_bytes_max=0)), []
    begin = reader.Reader.begin

    def begun(self: reader.Reader, record: RecordMeta, names: Any) -> bool:
        asked.append((record.row, names))
        return begin(self, record, names)

    monkeypatch.setattr(reader.Reader, "begin", begun)
    scanned(engine, large, "SELECT kind, sum(n) AS total FROM t WHERE n >= 0 GROUP BY kind")
    assert {row for row, _ in asked} == {0, 1, 2}
    anew = Engine(Config(state_bytes_max=0))
    with pytest.MonkeyPatch.context() as alone:
        alone.setattr(provider, "ALONE_ENTRIES", ENTRIES - 1)
        alone.setattr(anew._planner.cache.readers, "submit", lambda read: pytest.fail("asked of another thread"))
        assert scanned(anew, large, "SELECT kind, n FROM t WHERE n < 10")[1] > 0, "so little that one thread reads it itself"
    with OpLog.open(large._store._storage.uri, Config(mapped_bytes_max=0)) as unmapped:
        record = next(iter(unmapped.snapshot().records("t")))
        assert not unmapped.snapshot().store.reader.begin(record, ["n"])
        assert large.snapshot().store.reader.begin(record, ["n"])
        assert scanned(engine, unmapped, "SELECT id FROM t WHERE kind = 'put'")[1] > 0


def test_codes_make_a_log_no_more_than_a_third_larger(tmp_path: Path) -> None:
    chance = np.random.default_rng(3)

    def sparse(part: float) -> pa.Array:
        texts = pa.array([f"a text of some length {number}" for number in range(200)])
        return texts.take(pa.array(chance.integers(0, 200, 200_000), mask=chance.random(200_000) > part))

    table = pa.table(
        {f"sparse{place}": sparse(0.01) for place in range(8)}
        | {f"dense{place}": sparse(0.9) for place in range(4)}
        | {"null": pa.nulls(200_000, pa.string()), "long": ["long" * 20_000, *[None] * 199_999]}
    )
    for compression in ("none", "lz4", "zstd", "auto"):
        sizes = []
        for columns_max in (codes.COLUMNS_MAX, 0):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(codes, "COLUMNS_MAX", columns_max)
                with OpLog.open(str(tmp_path / f"{compression}{columns_max}"), Config(compression=compression)) as log:
                    log.append("t", table)
                    sizes.append(sum(file.size for file in log.snapshot().topics["t"].files))
                    assert all(record.has_codes("dense0") == (columns_max > 0) for record in log.snapshot().records("t"))
                    assert not log.verify()
        assert sizes[1] < sizes[0] < (1 + 1 / codes.PART) * sizes[1], compression


def test_texts_of_what_is_grouped_by_take_of_the_cache(large: OpLog) -> None:
    for size, least, most in ((1 << 26, 3000 * 20, 2 << 20), (50_000, 0, 50_000)):
        engine = Engine(Config(cache_bytes_max=size, state_bytes_max=0))
        for number in range(2):
            sql = f"SELECT id, count(*) + {number} AS c FROM t GROUP BY id"
            assert len(rows(engine, large.snapshot(), sql)) == 3000
        cache = engine._planner.cache
        texts = sum(each.nbytes for each in cache._vocabularies.values())
        assert least <= texts <= cache.metrics()["cache_bytes"] <= most


def test_what_was_found_waits_for_one_more_record_to_be_looked_at_and_no_longer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapped log's records are read when they are asked for, and a LIMIT may be content with the first."""
    monkeypatch.setattr(gathering, "_GATHERING_SECONDS", -1.0)
    with OpLog.open(str(folder), Config(compression="none", record_entries_max=20_000)) as log:
        numbers = np.arange(600_000)
        log.append("t", pa.table({"n": numbers * 7919 % 1_000_003, "m": numbers, "p": numbers * 1.5, "payload": ["long" * 20] * 600_000}))
        snapshot = log.snapshot()
        for reads_all in (False, True):
            context = ScanContext(ColumnCache(1 << 26), 2, reads_all=reads_all, begins_with_several=reads_all)
            table = EntriesTable(snapshot, snapshot.topics["t"], context, with_log_columns=False)
            first, _ = table.get_fragments((pc.field("n") == 5 * 7919) | (pc.field("n") == 45_000 * 7919 % 1_000_003) | (pc.field("p") < 0))
            found = table.scan(first._of, pa.schema([table.schema.field(name) for name in ("m", "p")]), first._filter)
            assert next(found)["m"].to_pylist()[0] == 5
            assert table.counts.records_read <= 5
            assert table.counts.records == 30
            found.close()


# Damaged


def flip(log: Path, record: RecordMeta, name: str) -> None:
    assert record.parts is not None
    assert record.span is not None
    found = Parts.read(record.parts)
    place = record.span[1] - found.size + found.codes[name].end - 30
    with (log / record.file.path).open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))


def test_damaged_codes_are_never_read_and_harm_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    with OpLog.open(str(folder), Config(compression="none")) as log:
        log.append("t", pa.table({"s": texts_of(100_000, 9), "u": texts_of(100_000, 8), "n": range(100_000)}))
        [record] = log.snapshot().records("t")
    flip(folder, record, "s")
    with OpLog.open(str(folder)) as log:
        engine = Engine(Config())
        with pytest.raises(CorruptLog, match=r"topic 't', file .*, offset 0: content does not match its digest"):
            rows(engine, log.snapshot(), "SELECT n FROM t WHERE s = 'text 000001'")
        assert len(rows(engine, log.snapshot(), "SELECT n FROM t WHERE u = 'text 000001'")) == 12_500
        assert len({row["s"] for row in rows(engine, log.snapshot(), "SELECT s FROM t")}) == 9
        assert [problem.severity for problem in log.verify()] == ["error"]


@pytest.mark.parametrize("lie", ["another text", "fewer", "not named", "not there", "twice", "null", "more", "no column"])
def test_verify_finds_codes_that_are_not_those_of_the_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str) -> None:
    make = appends.make_record

    def lying(*arguments: Any) -> Any:
        record = make(*arguments)
        limits = record.bounds
        if "s" in limits and lie == "not named":
            limits = {"s": {key: value for key, value in limits["s"].items() if key != "codes"}, "n": limits["n"]}
        if "s" in limits and lie == "not there":
            limits = {"s": limits["s"], "n": limits["n"] | {"codes": 3}}
        if "s" in limits and lie == "more":
            limits = {"s": limits["s"] | {"codes": 17}, "n": limits["n"]}
        if lie == "no column":
            limits = limits | {"other": {"codes": 9}}
        return replace(record, bounds=limits)

    honest = codes.codes_of

    def others(batches: Any, schema: pa.Schema, known: Any = None) -> Any:
        found = honest(batches, schema, known)["s"]
        texts, indices = found.dictionary.to_pylist(), found.indices
        if lie == "fewer":
            indices = indices.slice(1)
        elif lie == "another text":
            texts[0] = "never there"
        else:
            texts.append(texts[0] if lie == "twice" else None)
        return {"s": pa.DictionaryArray.from_arrays(indices, pa.array(texts))}

    monkeypatch.setattr("flight_oplog.oplog.make_record", lying)
    monkeypatch.setattr("flight_oplog.group.make_record", lying)
    if lie in ("another text", "fewer", "twice", "null"):
        monkeypatch.setattr(codes, "codes_of", others)
    with OpLog.open(str(tmp_path / "log"), Config(compression="none")) as log:
        log.append("t", pa.table({"s": texts_of(100_000, 9), "n": range(100_000)}))
        [problem] = log.verify()
    assert "codes" in problem.what
    assert "offset 0" in problem.what + problem.where


def test_few_entries_are_not_grouped_by_codes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning once more would take longer than it saves."""
    with OpLog.open(str(folder), Config(compression="none")) as log:
        log.append("t", pa.table({"s": texts_of(100_000, 9)}))
        asked: list[Any] = []
        kept = repeated.codes_kept
        monkeypatch.setattr(repeated, "codes_kept", lambda *arguments: (asked.append(arguments), kept(*arguments))[1])
        for entries_min in (100_001, 100_000):
            monkeypatch.setattr(repeated, "LARGE_ENTRIES", entries_min)
            assert len(rows(Engine(Config()), log.snapshot(), "SELECT s, count(*) AS c FROM t GROUP BY s")) == 9
            assert bool(asked) == (entries_min == 100_000)


@pytest.mark.usefixtures("eager")
def test_more_groups_than_a_state_has_are_not_tried_by_codes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    start = Planner.start_by_numbers
    monkeypatch.setattr(Planner, "start_by_numbers", lambda *arguments: (started.append(arguments), start(*arguments))[1])
    with OpLog.open(str(folder), Config(compression="none")) as log:
        log.append("t", pa.table({"s": texts_of(100_000, 9), "u": texts_of(100_000, 8)}))
        for groups_max in (71, 72):
            monkeypatch.setattr(repeated, "STATE_ROWS_MAX", groups_max)
            assert len(rows(Engine(Config()), log.snapshot(), "SELECT s, u, count(*) AS c FROM t GROUP BY s, u")) == 72
            assert bool(started) == (groups_max == 72)


def test_a_column_that_is_null_throughout_has_none_and_is_looked_up(folder: Path) -> None:
    with OpLog.open(str(folder), Config(compression="none")) as log:
        log.append("t", pa.table({"u": ["a", "b", "c"] * 100_000, "n": range(300_000)}))
        log.append("t", pa.table({"u": pa.nulls(300_000, pa.string()), "n": range(300_000)}))
        assert [record.has_codes("u") for record in log.snapshot().records("t")] == [False, False]
        log.append("t", pa.table({"u": ["a longer text", None, "b"] * 100_000, "n": range(300_000)}))
        engine = Engine(Config())
        for text, count in (("b", 200_000), ("no", 0), ("a", 100_000), ("a longer text", 100_000)) * 2:
            assert len(rows(engine, log.snapshot(), f"SELECT n FROM t WHERE u = '{text}'")) == count


def test_a_scan_of_one_partition_reads_in_threads_unless_there_is_little_to_read(large: OpLog, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    monkeypatch.setattr(reader.Reader, "begin", lambda self, record, names: bool(begun.append(record.row)))
    for partitions, entries, records, is_read_alone in (
        (1, ENTRIES - 1, 3, False),
        (1, ENTRIES, 2, False),
        (1, ENTRIES, 3, True),
        (2, ENTRIES - 1, 3, True),
    ):
        monkeypatch.setattr(provider, "ALONE_ENTRIES", entries)
        monkeypatch.setattr(provider, "ALONE_RECORDS", records)
        engine = Engine(Config(state_bytes_max=0))
        engine._planner._partitions = partitions
        begun.clear()
        scanned(engine, large, "SELECT sum(n) AS total FROM t WHERE n > 1")
        assert bool(begun) == is_read_alone


def test_what_was_read_along_is_checked_before_it_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    with OpLog.open(str(folder), Config(compression="none")) as log:
        log.append("t", pa.table({"a": np.arange(150_000), "b": pa.array([n % 2 == 0 for n in range(150_000)])}))
        [record] = log.snapshot().records("t")
    assert record.parts is not None
    assert record.span is not None
    found = Parts.read(record.parts)
    with (folder / record.file.path).open("r+b") as file:
        file.seek(record.span[1] - found.size + found.columns["b"][0].start + 64)
        file.write(b"\xff\xff\xff")
    with OpLog.open(str(folder), Config(mapped_bytes_max=0)) as log:
        engine = Engine(Config(state_bytes_max=0, mapped_bytes_max=0))
        for sql in ("SELECT sum(a) AS total FROM t", "SELECT count(*) AS c FROM t WHERE b"):
            with pytest.raises(CorruptLog):
                rows(engine, log.snapshot(), sql)
