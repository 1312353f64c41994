"""Files on their way to disk: every byte, at every size around the disk's blocks."""

import errno
import fcntl
import os
import random
from pathlib import Path

import pyarrow as pa
import pytest

from flight_oplog.files import BLOCK_BYTES, LARGE_BYTES, STAGING_BYTES, OutputFile, allocate, reason

SIZES = [0, 1, 4095, 4096, 4097, STAGING_BYTES - 1, STAGING_BYTES, STAGING_BYTES + 1, 2 * STAGING_BYTES + 4096, 3 * STAGING_BYTES + 5]


@pytest.mark.parametrize("folder", ["disk", "memory"])
@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_is_what_is_read(tmp_path: Path, folder: str, size: int) -> None:
    path = tmp_path / "file" if folder == "disk" else Path(f"/dev/shm/flight-oplog-test-{os.getpid()}")
    data = random.Random(size).randbytes(size)
    pieces = random.Random(7)
    try:
        file = OutputFile(str(path))
        place = 0
        while place < size:
            step = pieces.choice([1, 100, 5000, 1 << 20, 5 << 20])
            assert file.write(data[place : place + step]) == len(data[place : place + step])
            place = min(size, place + step)
            assert file.tell() == place
        file.settle()
        file.close()
        file.close()
        assert path.read_bytes() == data
    finally:
        path.unlink()


def test_large_files_go_past_the_page_cache_where_the_file_system_can(tmp_path: Path) -> None:
    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("needs a temporary folder on a file system with O_DIRECT")
    file = OutputFile(str(tmp_path / "file"))
    file.write(bytes(STAGING_BYTES - 1))
    assert not fcntl.fcntl(file._handle, fcntl.F_GETFL) & os.O_DIRECT
    file.write(pa.py_buffer(bytes(2)))
    assert fcntl.fcntl(file._handle, fcntl.F_GETFL) & os.O_DIRECT
    file.settle()
    file.close()
    assert (tmp_path / "file").stat().st_size == STAGING_BYTES + 1


def test_a_file_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        OutputFile(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_reasons_name_the_cause_and_no_path() -> None:
    assert reason(OSError(errno.ENOSPC, "No space left on device", "/secret/path")) == "the disk is full"
    assert (
        reason(Exception("Generic LocalFileSystem error: Unable to copy /secret: No space left on device (os error 28)"))
        == "the disk is full"
    )
    assert reason(OSError("[Errno 30] Read-only file system: '/secret'")) == "the file system is read-only"
    assert reason(Exception("/secret")) == "storage error, see the server's log"


def test_a_closed_file_takes_nothing_more(tmp_path: Path) -> None:
    """A handle's number is given to the next file that opens: a late write must never reach it."""
    settled, closed = OutputFile(str(tmp_path / "settled")), OutputFile(str(tmp_path / "closed"))
    settled.settle()
    closed.write(b"early")
    closed.close()
    closed.close()
    other = OutputFile(str(tmp_path / "other"))
    for file in (settled, closed):
        with pytest.raises(ValueError, match="the file is closed"):
            file.write(b"late")
    settled.close()
    other.close()
    assert [(tmp_path / name).stat().st_size for name in ("settled", "closed", "other")] == [0, 0, 0]


def test_memory_is_page_aligned_and_used_again() -> None:
    first = allocate(LARGE_BYTES)
    place = first.address
    assert place % BLOCK_BYTES == 0
    assert first.size == LARGE_BYTES
    second = allocate(LARGE_BYTES)
    assert second.address != place, "memory that somebody holds is nobody else's"
    part = first.slice(100, 10)
    del first
    assert allocate(LARGE_BYTES).address != place, "a slice holds its memory too"
    del part
    assert allocate(LARGE_BYTES).address == place


@pytest.mark.parametrize("before", [0, 1, BLOCK_BYTES, STAGING_BYTES - BLOCK_BYTES])
@pytest.mark.parametrize("size", [LARGE_BYTES, LARGE_BYTES + 1, 5 * LARGE_BYTES + 4095])
def test_large_pieces_at_a_block_are_written_as_they_lie(tmp_path: Path, before: int, size: int) -> None:
    data = random.Random(size).randbytes(size)
    piece = allocate(size)
    pa.FixedSizeBufferWriter(piece).write(data)
    file = OutputFile(str(tmp_path / "file"))
    file.write(bytes(before))
    file.write(piece)
    file.write(b"end")
    file.settle()
    file.close()
    assert (tmp_path / "file").read_bytes() == bytes(before) + data + b"end"
