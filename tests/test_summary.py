"""What a footer says of a file's rows is what the rows say; where it is not, the rows count."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from conftest import flip, rows
from test_parts import ENTRIES, wide

from flight_oplog import Config, OpLog, Origin, records, summary
from flight_oplog.errors import CorruptLog
from flight_oplog.sql.engine import Engine

ONE_EACH = Config(compression="none", record_bytes_max=5_000_000)
SUM = "SELECT sum(n) AS s, count(*) AS c FROM wide WHERE half > 10000"


def several(count: int, first: int = 0) -> pa.Table:
    return pa.Table.from_batches([wide(first + number * ENTRIES) for number in range(count)])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of four records, each in a row group of its own, that begins at offset `ENTRIES`."""
    with OpLog.open(str(tmp_path / "log"), ONE_EACH) as log:
        first = log.append("wide", wide(0))
        log.append("wide", several(4, ENTRIES), Origin("p", sequence=0, principal="ann"))
        [found] = [each.path for each in log.snapshot().topic("wide").files if each.first_offset == first.entries]
    return tmp_path / "log" / found


def footer(file: Path) -> dict[bytes, bytes]:
    return pq.ParquetFile(file).metadata.metadata or {}


def test_it_says_what_the_rows_do(file: Path) -> None:
    with OpLog.open(str(file.parent.parent)) as log:
        snapshot = log.snapshot()
        for each in snapshot.topic("wide").files:
            told, read = (records.read_records(log._store._storage, each, row_by_row) for row_by_row in (False, True))
            assert [records.outer_row(record) for record in told] == [records.outer_row(record) for record in read]
            assert [(record.row, record.row_group, record.place, record.span) for record in told] == [
                (record.row, record.row_group, record.place, record.span) for record in read
            ]
        assert read[0].appends[0]["principal"] == "ann"
        assert read[0].first_offset == ENTRIES
        assert log.verify() == []


def test_rows_are_not_read_where_it_says_them(file: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = 5 * ENTRIES * (5 * ENTRIES - 1) // 2 - 20_000 * 20_001 // 2
    read: list[int] = []
    real = pq.ParquetFile.read

    def counted(self: pq.ParquetFile, *args: Any, **options: Any) -> pa.Table:
        read.append(self.num_row_groups)
        return real(self, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "read", counted)
    with OpLog.open(str(file.parent.parent)) as log:
        assert rows(engine, log.snapshot(), SUM) == [{"s": expected, "c": 5 * ENTRIES - 20_001}]
    assert 4 not in read


@pytest.mark.parametrize(("groups", "is_there"), [(summary.GROUPS_LEAST - 1, False), (summary.GROUPS_LEAST, True)])
def test_a_file_of_few_row_groups_has_none(tmp_path: Path, groups: int, is_there: bool) -> None:
    with OpLog.open(str(tmp_path / "log"), ONE_EACH) as log:
        log.append("wide", several(groups))
        [file] = log.snapshot().topic("wide").files
    assert pq.ParquetFile(tmp_path / "log" / file.path).num_row_groups == groups
    assert (summary.KEY.encode() in footer(tmp_path / "log" / file.path)) == is_there


def test_one_that_would_be_too_large_is_left_out(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = summary.read(footer(file), 4)
    assert found is not None
    size = len(summary.written(found.to_pylist())[summary.KEY])
    monkeypatch.setattr(summary, "BYTES_MAX", size)
    assert summary.written(found.to_pylist())
    monkeypatch.setattr(summary, "BYTES_MAX", size - 1)
    assert summary.written(found.to_pylist()) == {}


def test_a_damaged_one_is_passed_over_and_told_by_verify(file: Path, engine: Engine) -> None:
    with OpLog.open(str(file.parent.parent)) as log:
        expected = rows(engine, log.snapshot(), SUM)
    flip(file, file.read_bytes().rindex(footer(file)[summary.KEY.encode()]) + 100)
    with OpLog.open(str(file.parent.parent)) as log:
        assert rows(Engine(Config()), log.snapshot(), SUM) == expected
        [problem] = log.verify()
        assert problem.severity == "error"
        assert "the summary in its footer is damaged; restore it" in problem.what


def test_one_that_says_something_else_is_told_by_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = summary.written
    monkeypatch.setattr(summary, "written", lambda rows: real([{**row, "schema_id": "0" * 32} for row in rows]))
    with OpLog.open(str(tmp_path / "log"), ONE_EACH) as log:
        log.append("wide", several(4))
    with OpLog.open(str(tmp_path / "log")) as log:
        [problem] = log.verify()
        assert problem.severity == "error"
        assert "the summary in its footer is not of its records; restore it" in problem.what


def encoded(data: bytes) -> bytes:
    return f"{xxhash.xxh3_64_hexdigest(data)}:".encode() + base64.b64encode(data)


def stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "text",
    [b"", b":", b"x", encoded(b""), encoded(b"nothing of the kind"), encoded(stream(summary.SCHEMA.empty_table())), b"0:!!!!"],
)
def test_what_is_no_summary_is_damage(text: bytes) -> None:
    with pytest.raises((ValueError, pa.ArrowException)):
        summary.read({summary.KEY.encode(): text}, 1)
    assert summary.read({}, 1) is None
    assert summary.read(None, 1) is None


def shorter(table: pa.Table) -> pa.Table:
    return table.slice(0, 3)


def with_other_bounds(table: pa.Table) -> pa.Table:
    bounds = [text.replace('"min":0', '"min":7') for text in table["bounds"].to_pylist()]
    return table.set_column(table.schema.get_field_index("bounds"), "bounds", pa.array(["{}", *bounds[1:]]))


@pytest.mark.parametrize("change", [shorter, with_other_bounds])
def test_another_program_that_takes_it_along_does_not_mislead(file: Path, engine: Engine, change: Callable[[pa.Table], pa.Table]) -> None:
    """pyarrow writes what a footer says into the footer of the next file."""
    changed = change(pq.read_table(file, partitioning=None))
    pq.write_table(changed, file, compression="none")
    assert summary.KEY.encode() in footer(file), "else this test shows nothing"
    with OpLog.open(str(file.parent.parent)) as log:
        if change is shorter:
            with pytest.raises(CorruptLog, match="holds 3 of 4 records"):
                rows(engine, log.snapshot(), SUM)
        else:
            assert rows(engine, log.snapshot(), "SELECT count(*) AS c FROM wide") == [{"c": 5 * ENTRIES}]
            assert next(iter(records.read_records(log._store._storage, log.snapshot().topic("wide").files[1]))).bounds == {}
