"""Our Parquet files through other people's readers: pyarrow with checksums, polars, DuckDB."""

import datetime
import io
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flight_oplog import codec, datafile, parquet
from flight_oplog.datafile import StagedFile
from flight_oplog.errors import TooLarge
from flight_oplog.files import BLOCK_BYTES, LARGE_BYTES
from flight_oplog.rows import CREATED_BY, SHAPE, Record, only_row_of
from flight_oplog.storage import Folder

TIMES = st.none() | st.datetimes(datetime.datetime(1, 1, 2), datetime.datetime(9999, 1, 1)).map(lambda t: t.replace(tzinfo=datetime.UTC))
TEXTS = st.none() | st.text(st.characters(codec="utf-8"), max_size=300)
LONGS = st.none() | st.integers(-(1 << 63), (1 << 63) - 1)
OWNERS = st.fixed_dictionaries(
    {"entries": st.integers(0, 1 << 62), "timestamp": TIMES, "producer": TEXTS, "epoch": LONGS, "sequence": LONGS, "principal": TEXTS}
)
RECORDS = st.builds(
    Record,
    entries=st.integers(1, 1 << 40),
    schema_id=st.text("0123456789abcdef", min_size=1, max_size=64),
    appends=st.lists(OWNERS, min_size=1, max_size=20),
    bounds=st.dictionaries(st.text(st.characters(codec="utf-8")), st.just({"nulls": 1}), max_size=30),
    min_time=TIMES,
    max_time=TIMES,
    digest=st.text("0123456789abcdef", min_size=32, max_size=32),
    parts=TEXTS,
    filters=st.none() | st.binary(max_size=3000),
    content=st.binary(max_size=5000).map(pa.py_buffer),
)


def written(folder: Path, records: list[Record], first_offset: int) -> Path:
    staged = StagedFile(Folder(str(folder)), "events")
    for record in records:
        staged.add(record)
    path = folder / staged.finish(first_offset).path
    staged.close()
    return path


def expected(records: list[Record], first_offset: int) -> list[dict[str, Any]]:
    rows = []
    for record in records:
        names = ("entries", "schema_id", "appends", "min_time", "max_time", "digest", "parts", "filters")
        row = {name: getattr(record, name) for name in names}
        content, bounds = record.content.to_pybytes(), codec.bounds_json(record.bounds)
        rows.append({"first_offset": first_offset, **row, "bounds": bounds, "content": content})
        first_offset += record.entries
    return rows


def of_records(most: int, examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a test up to so many records of a file, and its first offset."""
    asked = given(records=st.lists(RECORDS, min_size=1, max_size=most), first_offset=st.integers(0, 1 << 40))
    return lambda test: settings(max_examples=examples, deadline=None)(asked(test))


@of_records(most=8, examples=60)
def test_pyarrow_reads_back_every_record_and_every_checksum_holds(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record], first_offset: int
) -> None:
    path = written(tmp_path_factory.mktemp("files"), records, first_offset)
    assert pq.ParquetFile(path, page_checksum_verification=True).read().to_pylist() == expected(records, first_offset)


@of_records(most=2, examples=150)
def test_the_only_row_of_a_file_is_read_without_a_library(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record], first_offset: int
) -> None:
    path = written(tmp_path_factory.mktemp("files"), records, first_offset)
    found = only_row_of(path.read_bytes())
    if len(records) > 1:
        assert found is None, "any other is a general reader's"
        return
    assert found is not None
    [row] = expected(records, first_offset)
    content, _ = row.pop("content"), row.pop("filters")
    assert found[0] == row
    assert path.read_bytes()[: found[1][1]].endswith(len(content).to_bytes(4, "little") + content)
    assert pq.ParquetFile(path).metadata.row_group(0).column(15).data_page_offset == found[1][0]


def test_a_damaged_row_is_left_to_a_general_reader(tmp_path: Path) -> None:
    path = written(tmp_path, [record(b"x" * 100)], 77)
    whole = path.read_bytes()
    true = only_row_of(whole)
    assert true is not None
    row, span = true
    offset = whole.index((77).to_bytes(8, "little"))
    unchecked = {*range(offset, offset + 8), *range(*span)}
    for place in range(len(whole)):
        for bit in (1, 64, 128):
            damaged = bytearray(whole)
            damaged[place] ^= bit
            found = only_row_of(bytes(damaged))
            if found is not None and found != true:  # what is no part of a checksum: the Delta log has the one, a digest is of the other
                assert place in unchecked, place
                assert (found[0] | {"first_offset": 77}, found[1]) == (row, span)
    for size in range(len(whole)):
        assert only_row_of(whole[:size]) is None
    assert only_row_of(whole + b"x") is None
    assert only_row_of(whole[:-8] + whole[-4:]) is None


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_what_is_no_such_file_is_no_error(data: st.DataObject) -> None:
    numbers, some = st.integers(-(1 << 33), 1 << 33), st.binary(max_size=40)
    parts = [parquet._page_header(*(data.draw(numbers) for _ in range(3)), None) + data.draw(some) for _ in range(16)]
    end = parquet._binary(CREATED_BY) + b"\0"
    body = parquet.MAGIC + b"".join(parts)
    assert only_row_of(body + end + len(end).to_bytes(4, "little") + parquet.MAGIC) is None
    pages = data.draw(st.lists(some, min_size=16, max_size=16))
    exact = [parquet._page_header(len(page), len(page), data.draw(st.integers(-1, 3)), zlib.crc32(page)) + page for page in pages]
    only_row_of(parquet.MAGIC + b"".join(exact) + end + len(end).to_bytes(4, "little") + parquet.MAGIC)


def altered(path: Path, column: str, data: bytes) -> bytes:
    """A whole file with another page for a column, as `Writer` would write it."""
    whole = path.read_bytes()
    pages = parquet.pages_of(whole, SHAPE, CREATED_BY)
    assert pages is not None
    start, end = pages[[leaf.path[0] for leaf in SHAPE.leaves].index(column)].span
    packed = parquet._ZSTD.compress(data, asbytes=True) if len(data) > 1000 else data
    return whole[:start] + parquet._page_header(len(data), len(packed), 1, zlib.crc32(packed)) + packed + whole[end:]


@pytest.mark.parametrize(
    ("column", "page"),
    [
        ("min_time", b"\2\0\0\0\2\1" + ((1 << 63) - 1).to_bytes(8, "little")),
        ("bounds", (1_000_002).to_bytes(4, "little") + b"\x80" * 1_000_000 + b"\1\1"),
        ("bounds", (1_000_000).to_bytes(4, "little") + b"\0\1" * 500_000),
        ("bounds", (4).to_bytes(4, "little") + b"\xfe\xff\x7f\1"),
        ("bounds", b"\2\0\0\0\2\1" + (2).to_bytes(4, "little") + b"\xff\xfe"),
        ("digest", (900).to_bytes(4, "little") + b"short"),
        ("schema_id", (1).to_bytes(4, "little") + b"a" + (1).to_bytes(4, "little") + b"b"),
        ("bounds", bytes(parquet.READ_PAGE_BYTES_MAX + 1)),
    ],
)
def test_a_page_that_cannot_be_is_left_to_a_general_reader(tmp_path: Path, column: str, page: bytes) -> None:
    began = time.monotonic()
    assert only_row_of(altered(written(tmp_path, [record(b"x")], 0), column, page)) is None
    assert time.monotonic() - began < 1


def record(content: bytes, entries: int = 2) -> Record:
    time = datetime.datetime(2026, 11, 22, 3, 4, 5, 6, datetime.UTC)
    owners = [{"entries": 1, "timestamp": time}, {"entries": entries - 1, "timestamp": time, "producer": "p", "sequence": 7}]
    return Record(entries, "abc", owners, {"é": {"nulls": 0, "min": 1, "max": 2}}, time, None, "d" * 64, None, None, pa.py_buffer(content))


@pytest.mark.parametrize("sizes", [[0], [10, 0, 300], [LARGE_BYTES], [5, 3 * LARGE_BYTES + 17, 9], [16 << 20, 16 << 20, 1]])
def test_duckdb_and_polars_read_the_same_rows(tmp_path: Path, sizes: list[int]) -> None:
    records = [record(bytes([number]) * size) for number, size in enumerate(sizes)]
    path = written(tmp_path, records, 1000)
    offsets = [1000 + 2 * number for number in range(len(sizes))]
    columns = "first_offset, entries, octet_length(content), appends[2].producer, epoch_us(min_time), max_time, bounds"
    found = duckdb.sql(f"SELECT {columns} FROM read_parquet('{path}')").fetchall()
    micros = 1795316645000006
    bounds = '{"é":{"nulls":0,"min":1,"max":2}}'
    assert found == [(offset, 2, size, "p", micros, None, bounds) for offset, size in zip(offsets, sizes, strict=True)]
    frame = polars.read_parquet(path, hive_partitioning=False)
    assert frame["first_offset"].to_list() == offsets
    assert frame["content"].to_list() == [record.content.to_pybytes() for record in records]
    assert [owners[1]["sequence"] for owners in frame["appends"].to_list()] == [7] * len(sizes)


def test_large_content_begins_at_a_block_of_the_disk(tmp_path: Path) -> None:
    path = written(tmp_path, [record(b"x" * size) for size in (10, 16 << 20, LARGE_BYTES, 16 << 20)], 0)
    data = path.read_bytes()
    places = [data.index(size.to_bytes(4, "little") + b"xxxx") + 4 for size in (16 << 20, LARGE_BYTES)]
    assert [place % BLOCK_BYTES for place in places] == [0, 0]


def test_content_past_what_a_page_can_count_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert datafile.CONTENT_BYTES_MAX == (1 << 31) - 5, "a page holds 2 GiB - 1, of which 4 are the length"
    monkeypatch.setattr(datafile, "CONTENT_BYTES_MAX", 100)
    staged = StagedFile(Folder(str(tmp_path)), "events")
    staged.add(record(bytes(100)))
    with pytest.raises(TooLarge, match=r"^topic 'events': 2 entries take 101 bytes, a record holds 2 GiB; nothing was written"):
        staged.add(record(bytes(101)))
    staged.abandon()


@given(st.lists(st.integers(0, 3), max_size=50))
def test_levels_are_runs_with_their_length_before_them(values: list[int]) -> None:
    data = io.BytesIO(parquet.levels(values, 3))
    assert int.from_bytes(data.read(4), "little") == len(data.getvalue()) - 4
    found: list[int] = []
    while head := data.read(1):
        found += [data.read(1)[0]] * (head[0] >> 1)  # fewer than 64 of one kind: the count is one byte
    assert found == values
