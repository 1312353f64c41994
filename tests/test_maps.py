"""Files of a local disk are mapped: the same bytes as read, no handle and no removed file kept, no death by a short file."""

import os
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import flip, rows
from deltalake import DeltaTable
from test_parts import ENTRIES, wide

from flight_oplog import Config, OpLog, maps
from flight_oplog.errors import CorruptLog
from flight_oplog.maps import MAPS_KEPT, PAGE_BYTES, Maps
from flight_oplog.sql.engine import Engine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: elsewhere files are read")

SUM = "SELECT sum(n) AS s, count(*) AS c FROM wide"


def written(folder: Path, name: str, size: int = 5 * PAGE_BYTES) -> tuple[str, bytes]:
    data = os.urandom(size)
    (folder / name).write_bytes(data)
    return str(folder / name), data


def mapped(folder: Path) -> set[str]:
    """The files of a folder that this process has mapped; a removed one with "(deleted)" after its name."""
    names = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    return {name for name in names if name.startswith(str(folder))}


def test_a_view_shows_the_bytes_of_the_file(tmp_path: Path) -> None:
    path, data = written(tmp_path, "one")
    found = Maps(str(tmp_path)).view(path, 64, 3 * PAGE_BYTES, [(0, 1), (PAGE_BYTES - 1, 2 * PAGE_BYTES + 1)])
    assert found is not None, "this test needs a folder on a local disk, as a temporary one is"
    assert found.to_pybytes() == data[64 : 64 + 3 * PAGE_BYTES]


def test_a_file_that_ends_before_is_not_mapped(tmp_path: Path) -> None:
    path, _ = written(tmp_path, "one")
    some = Maps(str(tmp_path))
    assert some.view(path, 64, 5 * PAGE_BYTES - 64, []) is not None
    assert some.view(path, 64, 5 * PAGE_BYTES - 63, []) is None
    os.truncate(path, 2 * PAGE_BYTES)  # behind the map's back: touching its third page would end this process
    assert some.view(path, 64, 3 * PAGE_BYTES, [(0, PAGE_BYTES)]) is not None
    assert some.view(path, 64, 3 * PAGE_BYTES, [(0, 3 * PAGE_BYTES)]) is None
    assert some.view(str(tmp_path / "none"), 0, 1, []) is None


def test_maps_take_no_handles_and_few_are_kept(tmp_path: Path) -> None:
    some, before = Maps(str(tmp_path)), len(os.listdir("/proc/self/fd"))
    views = [some.view(written(tmp_path, f"{number}")[0], 0, PAGE_BYTES, [(0, PAGE_BYTES)]) for number in range(MAPS_KEPT + 1)]
    assert all(views)
    assert len(os.listdir("/proc/self/fd")) == before
    views.clear()
    assert len(mapped(tmp_path)) == MAPS_KEPT


@pytest.mark.parametrize("what", ["another file system", "an older kernel", "told not to"])
def test_what_cannot_be_mapped_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    if what == "another file system":
        monkeypatch.setattr(maps, "_LOCAL", frozenset())
    elif what == "an older kernel":
        monkeypatch.setattr(maps, "_MADV_POPULATE_READ", 9999)
    with OpLog.open(str(tmp_path / "log"), Config(compression="none", map_files=what != "told not to")) as log:
        log.append("wide", wide(0))
        assert rows(Engine(Config()), log.snapshot(), SUM) == [{"s": ENTRIES * (ENTRIES - 1) // 2, "c": ENTRIES}]
        assert what == "an older kernel" or not mapped(tmp_path)


def test_a_file_cut_short_is_an_error(tmp_path: Path) -> None:
    with OpLog.open(str(tmp_path / "log"), Config(compression="none")) as log:
        log.append("wide", wide(0))
        assert rows(Engine(Config()), log.snapshot(), "SELECT sum(half) AS s FROM wide")  # the file is mapped by now
        [record] = log.snapshot().records("wide")
        os.truncate(tmp_path / "log" / record.file.path, PAGE_BYTES)
        with pytest.raises(CorruptLog, match=r"topic 'wide', file .*, offset 0: content does not match its digest; restore the file"):
            rows(Engine(Config()), log.snapshot(), "SELECT min(payload) AS p FROM wide")


def test_a_file_that_is_restored_is_read(tmp_path: Path) -> None:
    with OpLog.open(str(tmp_path / "log"), Config(compression="none")) as log:
        log.append("wide", wide(0))
        [record] = log.snapshot().records("wide")
        path = tmp_path / "log" / record.file.path
        whole = path.read_bytes()
        flip(path, record.span[1] - PAGE_BYTES if record.span else 0)
        engine, sql = Engine(Config()), "SELECT count(half) AS c, count(payload) AS p FROM wide WHERE half >= 0 AND payload <> X'00'"
        with pytest.raises(CorruptLog):
            rows(engine, log.snapshot(), sql)
        (tmp_path / "backup").write_bytes(whole)
        (tmp_path / "backup").rename(path)
        assert rows(engine, log.snapshot(), sql) == [{"c": ENTRIES, "p": ENTRIES}]


def test_the_place_of_removed_files_is_given_back(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    with OpLog.open(str(folder), Config(compression="none", refresh_ms=0)) as log:
        for number in range(3):
            log.append("wide", wide(number * ENTRIES))
        engine, expected = Engine(Config()), [{"s": 3 * ENTRIES * (3 * ENTRIES - 1) // 2, "c": 3 * ENTRIES}]
        assert rows(engine, log.snapshot(), SUM) == expected
        assert len(mapped(folder)) == 3
        table = DeltaTable(str(folder))
        table.optimize.compact(partition_filters=[("topic", "=", "wide")])
        table.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
        assert sum(name.endswith("(deleted)") for name in mapped(folder)) == 3, "nobody has looked at the log yet"
        assert rows(engine, log.snapshot(), SUM + " WHERE n >= 0") == expected
        assert not [name for name in mapped(folder) if name.endswith("(deleted)")]


def test_columns_are_views_of_the_file(tmp_path: Path) -> None:
    with OpLog.open(str(tmp_path / "log"), Config(compression="none")) as log:
        log.append("wide", wide(0))
        before = pa.total_allocated_bytes()
        content, read = log._store.columns(next(iter(log.snapshot().records("wide"))), ["n"])
        assert read < content.size
        assert pa.total_allocated_bytes() - before < read, "nothing was copied"
