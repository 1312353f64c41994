"""What every storage promises: a folder and an object store, side by side."""

import contextlib
import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ObjectStore

from flight_oplog import deltalog, storage
from flight_oplog.errors import NotALog, OutcomeUnknown
from flight_oplog.files import reason
from flight_oplog.storage import PART_BYTES, WHOLE_BYTES, Bucket, Folder, Storage, Unsure, storage_at

ENTRY = "_delta_log/00000000000000000007.json"


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "folder":
        (tmp_path / "log" / "_delta_log").mkdir(parents=True)
        yield Folder(str(tmp_path / "log"))
    else:
        yield Bucket(request.getfixturevalue("s3").new_log())


def write(place: Storage, path: str, data: bytes) -> None:
    file = place.stage(path)
    file.write(data)
    file.settle()
    place.publish(path, file)
    file.close()


def test_a_name_is_given_to_one_caller_only(place: Storage) -> None:
    won: list[int] = []
    start = threading.Barrier(8)

    def race(number: int) -> None:
        start.wait()
        try:
            place.create(ENTRY, b"mark-%d" % number, f"mark-{number}")
        except FileExistsError:
            return
        won.append(number)

    threads = [threading.Thread(target=race, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert place.read(ENTRY).to_pybytes() == b"mark-%d" % won[0]
    assert place.names("_delta_log") == [ENTRY.rpartition("/")[2]], "nothing else is left"


def test_names_walk_and_delete(place: Storage) -> None:
    assert place.is_new()
    assert (place.names("_delta_log"), place.exists(ENTRY)) == ([], False)
    before = time.time()
    place.create(ENTRY, b"{}", "{}")
    write(place, "topic=t/a.parquet", b"12345")
    assert (place.is_new(), place.exists(ENTRY)) == (False, True)
    found = sorted(place.walk(), key=lambda file: file.path)
    assert [(file.path, file.size) for file in found] == [(ENTRY, 2), ("topic=t/a.parquet", 5)]
    assert all(before - 2 < file.modified < time.time() + 2 for file in found)
    assert list(place.read_each([ENTRY, "none", "topic=t/a.parquet"])) == [b"{}", None, b"12345"]
    place.delete("topic=t/a.parquet")
    assert [file.path for file in place.walk()] == [ENTRY]
    for missing in ("topic=t/a.parquet", "_delta_log/none"):
        with pytest.raises(FileNotFoundError):
            place.read(missing)


@pytest.mark.parametrize("size", [0, 1, WHOLE_BYTES, WHOLE_BYTES + 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES + 4095])
def test_published_bytes_are_read_back(place: Storage, size: int) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    data = data[:size]
    write(place, "topic=t/a.parquet", data)
    assert place.read("topic=t/a.parquet").to_pybytes() == data
    for start, end in ((0, size), (size // 3, size // 2), (max(0, size - 7), size)):
        if start < end:
            assert place.read("topic=t/a.parquet", start, end).to_pybytes() == data[start:end]
    with place.open("topic=t/a.parquet", size) as file:
        assert file.size() == size
        file.seek(size // 2)
        assert file.read(10) == data[size // 2 : size // 2 + 10]
        assert file.read_at(5, size // 4) == data[size // 4 : size // 4 + 5]


def test_a_file_can_be_changed_and_published_again(place: Storage) -> None:
    file = place.stage("topic=t/a.parquet")
    file.write(b"0123456789")
    file.settle()
    place.publish("topic=t/a.parquet", file)
    file.patch(3, b"abc")
    place.publish("topic=t/a.parquet", file)
    file.close()
    assert place.read("topic=t/a.parquet").to_pybytes() == b"012abc6789"


def test_parquet_is_read_in_pieces(place: Storage) -> None:
    table = pa.table({"a": range(100_000), "b": ["x" * 40] * 100_000})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, use_dictionary=False, compression="none")
    data = sink.getvalue().to_pybytes()
    assert len(data) > WHOLE_BYTES
    write(place, "topic=t/a.parquet", data)
    assert pq.ParquetFile(place.open("topic=t/a.parquet", len(data))).read(columns=["a"]) == table.select(["a"])


def test_a_staged_object_is_nobodys_before_it_is_published(s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bucket = Bucket(s3.new_log())
    file = bucket.stage("topic=t/a.parquet")
    file.write(b"x")
    assert list(tmp_path.iterdir()) == [], "a crash leaves nothing on this machine"
    assert list(bucket.walk()) == []
    file.close()


def test_an_entry_that_was_made_though_an_error_came_back_is_made(s3: ObjectStore) -> None:
    bucket = Bucket(s3.new_log())
    s3.misbehave(every=2, method="PUT", done=True)
    for number in range(20):
        bucket.create(f"_delta_log/{number:020}.json", b"mark-%d" % number, f"mark-{number}")
    with pytest.raises(FileExistsError):
        bucket.create(f"_delta_log/{3:020}.json", b"other", "other")
    s3.misbehave()
    assert [bucket.read(f"_delta_log/{number:020}.json").to_pybytes() for number in range(20)] == [b"mark-%d" % n for n in range(20)]


def test_a_store_that_errs_now_and_then_is_asked_again(s3: ObjectStore) -> None:
    bucket = Bucket(s3.new_log())
    for method in ("PUT", "GET", "HEAD"):
        s3.misbehave(every=3, method=method, done=False)
        for number in range(10):
            path = f"{method}/{number}"
            bucket.create(path, b"x", "x")
            assert bucket.exists(path)
            assert bucket.read(path).to_pybytes() == b"x"


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch, s3: ObjectStore) -> Bucket:
    """A bucket at an address where nothing listens."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(storage, "RETRY_SECONDS", 1)
    monkeypatch.setattr(storage, "CREATE_SECONDS", 1)
    return Bucket("s3://logs/nowhere")


def test_a_store_that_does_not_answer_leaves_the_outcome_open(deaf: Bucket) -> None:
    with pytest.raises(Unsure) as caught:
        deaf.create(ENTRY, b"mark", "mark")
    assert reason(caught.value) == "the object store does not answer"
    for request in (lambda: deaf.read(ENTRY), lambda: deaf.exists(ENTRY), lambda: list(deaf.walk()), lambda: deaf.names("_delta_log")):
        with pytest.raises(OSError, match="Error") as caught_again:
            request()
        assert caught_again.value.errno == errno.EHOSTUNREACH


def test_a_refused_put_wrote_nothing(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise storage.obstore.exceptions.PermissionDeniedError("denied")

    monkeypatch.setattr(storage.obstore, "put", refuse)
    with pytest.raises(PermissionError) as caught:
        Bucket(s3.new_log()).create(ENTRY, b"mark", "mark")
    assert reason(caught.value) == "permission denied"


def answers(monkeypatch: pytest.MonkeyPatch, *errors: Exception, done: bool) -> None:
    """Let the first puts fail, each after it was carried out or instead."""
    real, left = storage.obstore.put, list(errors)

    def put(*args: Any, **kwargs: Any) -> Any:
        if not left:
            return real(*args, **kwargs)
        if done:
            with contextlib.suppress(Exception):
                real(*args, **kwargs)
        raise left.pop(0)

    monkeypatch.setattr(storage.obstore, "put", put)


GENERIC = storage.obstore.exceptions.GenericError("reset")
DENIED = storage.obstore.exceptions.PermissionDeniedError("denied")
CONFLICT = storage.obstore.exceptions.AlreadyExistsError("409 ConditionalRequestConflict")


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("errors", [[GENERIC, DENIED], [GENERIC, FileNotFoundError()], [CONFLICT], [GENERIC, CONFLICT, GENERIC]])
def test_only_a_first_answer_is_a_refusal(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch, errors: list[Exception], done: bool) -> None:
    """A later one may be the answer to another try than the one that made it."""
    bucket = Bucket(s3.new_log())
    answers(monkeypatch, *errors, done=done)
    bucket.create(ENTRY, b"mark", "mark")
    assert bucket.read(ENTRY).to_pybytes() == b"mark"


def test_whatever_else_goes_wrong_leaves_the_outcome_open(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket(s3.new_log())
    answers(monkeypatch, MemoryError(), done=True)
    with pytest.raises(OutcomeUnknown, match="the commit of table_version 7 may or may not be durable"):
        deltalog.write(bucket, 7, [], {})


def test_a_store_without_conditional_puts_is_refused(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = storage.obstore.put
    monkeypatch.setattr(storage.obstore, "put", lambda store, path, content, **mode: real(store, path, content))
    bucket = Bucket(s3.new_log())
    with pytest.raises(NotALog, match="the object store does not know conditional puts"):
        bucket.prepare()
    assert bucket.is_new()


@pytest.mark.parametrize("uri", ["http://127.0.0.1/x", "ftp://host/log", "memory://log"])
def test_other_places_are_refused(uri: str) -> None:
    with pytest.raises(NotALog, match="is not a folder, nor on an object store that is known here"):
        storage_at(uri)
