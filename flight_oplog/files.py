"""Bytes on their way to disk: large files past the page cache, and what the operating system says when it refuses."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import weakref
from typing import Any

import numpy as np
import pyarrow as pa

from flight_oplog.errors import TryAgain

log = logging.getLogger("flight_oplog.files")

BLOCK_BYTES = 4096
STAGING_BYTES = 1 << 20
LARGE_BYTES = 1 << 20
POOLED_BYTES = 20 << 20
POOLED_BLOCKS = 4


_free_blocks: list[mmap.mmap] = []


def allocate(size: int) -> pa.Buffer:
    """Return memory to write `size` bytes into. A large piece is page-aligned, as `OutputFile` likes it.

    Large pieces are used again once nobody holds them: on a virtual machine, touching new memory is slower than the disk.
    """
    if not LARGE_BYTES <= size <= POOLED_BYTES:
        return pa.allocate_buffer(size)
    try:
        block = _free_blocks.pop()
    except IndexError:
        block = mmap.mmap(-1, POOLED_BYTES)
    lease = np.frombuffer(block, np.uint8, size)  # dies with the last buffer that shows its memory
    weakref.finalize(lease, _give_back, block).atexit = False
    return pa.py_buffer(lease)


def _give_back(block: mmap.mmap) -> None:
    if len(_free_blocks) < POOLED_BLOCKS:
        _free_blocks.append(block)


class OutputFile:
    """A new file, written from its beginning; for one thread. Its bytes are durable after `settle` and `sync`.

    Large pieces go to the disk directly (O_DIRECT) where the file system can: a log is written once and decoded into a
    cache of its own, and through the page cache each page is found, zeroed and copied first. On a virtual machine whose
    memory is backed on first touch, that made direct writing three times as fast. A large piece from `allocate` that
    begins at a block of the disk is not copied at all.
    """

    def __init__(self, path: str, nameless: bool = False) -> None:
        """Make a file; a nameless one is gone when it is closed, or when the process dies."""
        self.closed = False
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._path = None if nameless else path
        if nameless:
            os.unlink(path)
        self._staging = memoryview(mmap.mmap(-1, STAGING_BYTES))  # page-aligned, as direct writing wants
        self._staged = self._written = 0
        self._is_direct = False

    def write(self, data: Any) -> int:
        """Take bytes, or anything that shows its bytes as a memoryview; return how many."""
        view = memoryview(data).cast("B")
        if self.closed:
            raise ValueError("the file is closed")  # its handle may be another file's by now
        place = 0
        if len(view) >= LARGE_BYTES and self.tell() % BLOCK_BYTES == 0 and pa.py_buffer(view).address % BLOCK_BYTES == 0:
            self._go_direct(True)
            self._drain()
            place = len(view) - len(view) % BLOCK_BYTES
            self._put(view[:place])
        while place < len(view):
            size = min(STAGING_BYTES - self._staged, len(view) - place)
            self._staging[self._staged : self._staged + size] = view[place : place + size]
            self._staged += size
            place += size
            if self._staged == STAGING_BYTES:
                self._go_direct(True)
                self._drain()
        return len(view)

    def _go_direct(self, direct: bool) -> None:
        flag = getattr(os, "O_DIRECT", 0)
        if flag and direct != self._is_direct:
            with contextlib.suppress(OSError):  # a file system that cannot is written through the page cache
                flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
                fcntl.fcntl(self._handle, fcntl.F_SETFL, flags | flag if direct else flags & ~flag)
                self._is_direct = direct

    def _drain(self) -> None:
        self._put(self._staging[: self._staged])
        self._staged = 0

    def _put(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += os.write(self._handle, view[done:])
            if done % BLOCK_BYTES:  # a short write left the disk's grid
                self._go_direct(False)
        self._written += done

    def tell(self) -> int:
        return self._written + self._staged

    def settle(self) -> None:
        """Write out what is still in memory; the file takes nothing more."""
        self.closed = True
        self._go_direct(False)
        self._drain()
        self._staging = memoryview(b"")

    def patch(self, place: int, data: bytes) -> None:
        """Write over a part of the settled file."""
        self._resume()
        if os.pwrite(self._handle, data, place) != len(data):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def rest(self) -> None:
        """Hold no handle until the settled file is needed again; many may wait for their commit at once."""
        if self._path is not None:
            self.close()

    def _resume(self) -> None:
        if self._handle < 0 and self._path is not None:
            try:
                self._handle = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise OSError(errno.ESTALE, "the file was taken for an orphan and removed") from error

    def touch(self) -> None:
        self._resume()
        os.utime(self._handle)

    def sync(self) -> None:
        os.fsync(self._handle)

    def read(self, place: int, size: int) -> bytes:
        """Return a part of the settled file, less at its end."""
        return os.pread(self._handle, size, place)

    def close(self) -> None:
        """Give the file up, without writing what is still in memory. May be called again; never raises."""
        self.closed = True
        handle, self._handle = self._handle, -1  # whatever comes of it, the number is not ours any more
        if handle >= 0:
            try:
                os.close(handle)
            except OSError as error:  # what had to be durable was synced before
                log.warning("closing a file: %s", error)


_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the system allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EIO: "input/output error",
    errno.EMFILE: "too many open files",
    errno.ESTALE: "a file was removed that was being written",
    errno.EHOSTUNREACH: "the object store does not answer",
}


def reason(error: BaseException) -> str:
    """Say what the operating system refused, without its paths; delta-rs and pyarrow keep the number only in their text."""
    number = getattr(error, "errno", None)
    if number in _REASONS:
        return _REASONS[number]
    text = str(error).lower()
    for number, words in _REASONS.items():
        if f"os error {number})" in text or f"[errno {number}]" in text:
            return words
    return "storage error, see the server's log"


def reading_error(what: str, error: BaseException) -> TryAgain:
    """Return what to raise when storage does not give what it holds; the details go to the server's log."""
    log.warning("%s: %s", what, error)
    return TryAgain(f"{what} cannot be read: {reason(error)}; try again when that is mended")


def is_refusal(error: BaseException) -> bool:
    """Whether the system or the object store refused to read, rather than gave bytes that make no sense, or none."""
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError)


def storage_error(doing: str, error: BaseException) -> TryAgain:
    """Return what to raise when storage refused before anything was written; the details go to the server's log."""
    log.warning("%s failed: %s", doing, error)
    return TryAgain(f"{doing} failed: {reason(error)}; nothing was written; try again when that is mended")
