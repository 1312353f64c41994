"""Files of a local disk are mapped: the same bytes as read, no handle and no removed file kept, no death by a short file."""

import ctypes
import math
import mmap
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from conftest import flip, rows
from deltalake import DeltaTable
from test_parts import ENTRIES, wide

from flight_oplog import Config, OpLog, maps
from flight_oplog.cache import ColumnCache
from flight_oplog.errors import CorruptLog
from flight_oplog.maps import MAPPED_BYTES_MAX, MAPS_KEPT, PAGE_BYTES, Maps, resident
from flight_oplog.provider import topic_batches
from flight_oplog.sql.engine import Engine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: elsewhere files are read")

SUM = "SELECT sum(n) AS s, count(*) AS c FROM wide"


def written(folder: Path, name: str, size: int = 5 * PAGE_BYTES) -> tuple[str, bytes]:
    data = os.urandom(size)
    (folder / name).write_bytes(data)
    return str(folder / name), data


def evicted(path: str) -> None:
    """Have the system forget what it has of a file in memory."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def pages_in_memory(path: str) -> int:
    """How many pages of a file the system has in memory, whoever maps them."""
    size = os.path.getsize(path)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE) as shown:
        start = ctypes.c_char.from_buffer(shown)
        found = (ctypes.c_ubyte * (size // PAGE_BYTES))()
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), found) == 0
        del start
        return sum(each & 1 for each in found)


def mapped(folder: Path) -> set[str]:
    """The files of a folder that this process has mapped; a removed one with "(deleted)" after its name."""
    names = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    return {name for name in names if name.startswith(str(folder))}


def test_a_view_shows_the_bytes_of_the_file(tmp_path: Path) -> None:
    path, data = written(tmp_path, "one")
    found = Maps(str(tmp_path), MAPPED_BYTES_MAX).view(path, 64, 3 * PAGE_BYTES, [(0, 1), (PAGE_BYTES - 1, 2 * PAGE_BYTES + 1)])
    assert found is not None, "this test needs a folder on a local disk, as a temporary one is"
    assert found.to_pybytes() == data[64 : 64 + 3 * PAGE_BYTES]


@pytest.mark.parametrize("spans", [[(0, 1)], [(0, PAGE_BYTES), (5 * PAGE_BYTES, 6 * PAGE_BYTES)]], ids=["one span", "two spans"])
def test_no_more_is_read_than_is_looked_at(tmp_path: Path, spans: list[tuple[int, int]]) -> None:
    path, _ = written(tmp_path, "one", 16 << 20)
    evicted(path)
    if pages_in_memory(path):
        pytest.skip("needs a folder whose file system forgets what it has read when told to")
    found = Maps(str(tmp_path), MAPPED_BYTES_MAX).view(path, 8 << 20, 4 << 20, spans)
    assert found is not None
    looked_at = sum(math.ceil((high - low) / PAGE_BYTES) for low, high in spans)
    assert looked_at <= pages_in_memory(path) <= looked_at + 1, "mapping a file has its first page read, sooner or later"


def test_a_file_that_ends_before_is_not_mapped(tmp_path: Path) -> None:
    path, _ = written(tmp_path, "one")
    some = Maps(str(tmp_path), MAPPED_BYTES_MAX)
    assert some.view(path, 64, 5 * PAGE_BYTES - 64, []) is not None
    assert some.view(path, 64, 5 * PAGE_BYTES - 63, []) is None
    os.truncate(path, 2 * PAGE_BYTES)  # behind the map's back: touching its third page would end this process
    assert some.view(path, 64, 3 * PAGE_BYTES, [(0, PAGE_BYTES)]) is not None
    assert some.view(path, 64, 3 * PAGE_BYTES, [(0, 3 * PAGE_BYTES)]) is None
    assert some.view(str(tmp_path / "none"), 0, 1, []) is None


def test_maps_take_no_handles_and_few_are_kept(tmp_path: Path) -> None:
    some, before = Maps(str(tmp_path), MAPPED_BYTES_MAX), len(os.listdir("/proc/self/fd"))
    views = [some.view(written(tmp_path, f"{number}")[0], 0, PAGE_BYTES, [(0, PAGE_BYTES)]) for number in range(MAPS_KEPT + 1)]
    assert all(views)
    assert len(os.listdir("/proc/self/fd")) == before
    views.clear()
    assert len(mapped(tmp_path)) == MAPS_KEPT


def test_there_are_no_more_maps_than_the_system_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "MAPS_MAX", 2)
    some = Maps(str(tmp_path), MAPPED_BYTES_MAX)
    paths = [written(tmp_path, name)[0] for name in ("one", "two", "three")]
    views = [some.view(path, 0, PAGE_BYTES, []) for path in paths]
    assert [view is None for view in views] == [False, False, True]
    some.let_go([paths[0]])
    assert some.view(paths[2], 0, PAGE_BYTES, []) is None, "somebody has a part of it still"
    views.clear()
    assert some.view(paths[2], 0, PAGE_BYTES, []) is not None


@pytest.mark.parametrize("what", ["another file system", "an older kernel", "told not to"])
def test_what_cannot_be_mapped_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    if what == "another file system":
        monkeypatch.setattr(maps, "_LOCAL", frozenset())
    elif what == "an older kernel":
        monkeypatch.setattr(maps, "_MADV_POPULATE_READ", 9999)
    with OpLog.open(
        str(tmp_path / "log"), Config(compression="none", mapped_bytes_max=0 if what == "told not to" else MAPPED_BYTES_MAX)
    ) as log:
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
        found = log._store.reader.columns(next(iter(log.snapshot().records("wide"))), ["n"])
        assert found.nbytes < found.buffer.size
        assert pa.total_allocated_bytes() - before < found.nbytes, "nothing was copied"


def shown(buffer: pa.Buffer) -> int:
    """Touch each page of a buffer; return the bytes of files in this process's memory then."""
    assert buffer.size == len(bytes(memoryview(buffer)[::PAGE_BYTES])) * PAGE_BYTES
    return resident()[1]


@pytest.mark.parametrize("kept", ["kept", "not kept"])
def test_pages_of_maps_are_given_back_when_they_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str) -> None:
    monkeypatch.setattr(maps, "TRIM_SECONDS", 0.0)
    monkeypatch.setattr(maps, "TRIM_PART", math.inf)
    size = 32 << 20
    some = Maps(str(tmp_path), resident()[1] + size + size // 2)
    views = []
    for name in ("one", "two"):
        path, data = written(tmp_path, name, size)
        found = some.view(path, 0, size, [])
        assert found is not None
        views.append(found)
        if kept == "not kept":
            some.let_go([path])  # its place on the disk may be wanted; who looks at it does so all the same
    shown(views[0])
    some.trim()
    assert shown(views[0]) - resident()[1] == 0, "as many as that may be"
    before = shown(views[1])
    some.trim()
    assert before - resident()[1] >= 2 * size
    assert views[1].to_pybytes() == data, "who looks again gets the same"


def test_pages_are_given_back_for_little_of_the_processor_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "MOST", math.inf)
    size, clock, worked, took = 8 << 20, [100.0], [50.0], [0.0]

    def slowly(*given: Any) -> int:
        if given[-1] == maps._MADV_DONTNEED:
            clock[0] += took[0]
            worked[0] += took[0]
        return int(madvise(*given))

    madvise = maps._LIBC.madvise
    monkeypatch.setattr(maps, "_LIBC", SimpleNamespace(madvise=slowly))
    monkeypatch.setattr(maps, "time", SimpleNamespace(monotonic=lambda: clock[0], process_time=lambda: worked[0]))
    some = Maps(str(tmp_path), 1)
    found = some.view(written(tmp_path, "one", size)[0], 0, size, [(0, size)])
    assert found is not None

    def is_given_back(seconds: float, of_work: float) -> bool:
        clock[0] += seconds
        worked[0] += of_work
        before = shown(found)
        some.trim()
        return before - resident()[1] >= size

    for took[0], pause in ((0.0, 0.0), (0.01, 4.0), (1e-6, 4e-4)):
        assert is_given_back(1000, 1000)
        assert not is_given_back(0.4 * maps.TRIM_SECONDS, 1000), "it was looked at just now"
        assert is_given_back(0.7 * maps.TRIM_SECONDS, 0)
        assert is_given_back(1000, 0.9 * pause) == (pause == 0), "nobody asked anything meanwhile"
        assert is_given_back(1000, 0.2 * pause)


def keeps_half_and_gives_all_back(some: Maps, folder: Path, size: int) -> bool:
    """Whether one half of a file stays in memory and all of it goes when the other comes, though giving back has cost too much already."""
    some._next_trim = math.inf
    found = some.view(written(folder, "one", 2 * size)[0], 0, 2 * size, [(0, size)])
    assert found is not None
    before = shown(found[:size])
    some.trim()
    is_kept = resident()[1] >= before
    before = shown(found)
    some.trim()
    return is_kept and before - resident()[1] >= 2 * size


def test_past_the_most_all_pages_are_given_back_whatever_that_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "TRIM_SECONDS", 0.0)
    monkeypatch.setattr(maps, "MOST", 2)
    size = 8 << 20
    some = Maps(str(tmp_path), (resident()[1] + size + size // 2) // 2)
    assert keeps_half_and_gives_all_back(some, tmp_path, size)
    assert some._next_trim < math.inf, "the time it takes counts"


def test_libraries_alone_are_no_reason_to_give_pages_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "TRIM_SECONDS", 0.0)
    size = 8 << 20
    some = Maps(str(tmp_path), size + size // 2)
    assert resident()[1] > maps.MOST * 2 * size
    some.trim()
    assert keeps_half_and_gives_all_back(some, tmp_path, size), "not until more than is to stay came since"


def test_a_question_over_all_keeps_few_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "TRIM_SECONDS", 0.0)
    monkeypatch.setattr(maps, "TRIM_PART", math.inf)
    folder, few = str(tmp_path / "log"), Config(compression="none", mapped_bytes_max=1)
    with OpLog.open(folder, few) as log:
        for number in range(3):
            log.append("wide", wide(number * ENTRIES))
        engine, whole, summed = Engine(few), "SELECT * FROM wide", []
        for _ in range(3):  # decoded, then from memory, whose pages come and go
            assert sum(batch.num_rows for batch in engine.run(whole, log.snapshot()).batches) == 3 * ENTRIES
            summed += rows(engine, log.snapshot(), SUM + " WHERE half >= 0")
        assert summed == [{"s": 3 * ENTRIES * (3 * ENTRIES - 1) // 2, "c": 3 * ENTRIES}] * 3


@pytest.mark.parametrize("of_file", ["kept", "not kept"])
def test_who_is_done_gives_pages_back_when_there_are_far_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_file: str) -> None:
    monkeypatch.setattr(maps, "TRIM_SECONDS", 0.0)
    monkeypatch.setattr(maps, "FAR_TOO_MANY", 2)
    monkeypatch.setattr(maps, "MOST", math.inf)
    size = 8 << 20
    path, _ = written(tmp_path, "one", 2 * size)
    some = Maps(str(tmp_path), (resident()[1] + size + size // 2) // 2)
    some._next_trim = math.inf  # giving all of them back has cost too much already
    found = some.view(path, 0, 2 * size, [(0, size)])
    assert found is not None
    if of_file == "not kept":  # by so many others
        for number in range(MAPS_KEPT):
            some.view(written(tmp_path, f"other {number}")[0], 0, 1, [])
    before = shown(found[:size])
    some.give_back(path, 0, size)
    assert resident()[1] >= before, "as many as that may be"
    before = shown(found)
    some.give_back(path, size, size)
    assert before - size <= resident()[1] + PAGE_BYTES < before, "those, and no others"


@pytest.mark.parametrize("how", ["by SQL", "by offset"])
def test_reading_all_of_a_log_does_not_bring_it_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(maps, "TRIM_SECONDS", 0.0)
    monkeypatch.setattr(maps, "TRIM_PART", 1e-12)  # so that all of them are given back once at most
    monkeypatch.setattr(maps, "MOST", math.inf)
    with OpLog.open(str(tmp_path / "log"), Config(compression="none")) as log:
        for number in range(10):
            log.append("wide", wide(number * ENTRIES))
    started, of_record = resident()[1], wide(0).nbytes
    config = Config(compression="none", mapped_bytes_max=int((started + 4 * of_record) / maps.FAR_TOO_MANY))
    with OpLog.open(str(tmp_path / "log"), config) as log:
        engine, cache, most = Engine(config), ColumnCache(config.cache_bytes_max), 0
        for _ in range(2):
            snapshot = log.snapshot()
            by_offset = topic_batches(snapshot, snapshot.topic("wide"), 0, 1 << 20, cache=cache)
            for batch in engine.run("SELECT * FROM wide", snapshot).batches if how == "by SQL" else by_offset:
                for column in batch.columns:
                    pc.max(column.cast(pa.binary()) if pa.types.is_fixed_size_binary(column.type) else column)
                most = max(most, resident()[1] - started)
        assert 3 * of_record < most < 7 * of_record
