"""Files of a local disk as the system's page cache has them: mapped, not copied.

Reading a file copies it into memory of this process, and on a virtual machine touching new memory takes several times as
long as the copy. A map shows the pages that the system has anyway, and the system may take them back when it is short. They count as this
process's memory all the same, so they are given back when they are many: whoever looks again finds them in the page cache.

Touching a mapped page that cannot be read kills a process (SIGBUS). So pages are read in before anybody looks at them, by a
call that says when it fails (MADV_POPULATE_READ, Linux 5.14; https://man7.org/linux/man-pages/man2/madvise.2.html), and
file systems over a network are not mapped: what another machine removes there is gone under a map.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import pyarrow as pa

from flight_oplog.kept import remember

# A map of a removed file keeps its bytes on the disk: no more than these are kept for the next record of the same file.
MAPS_KEPT = 64
# The system gives a process 65,530 maps as a rule, its threads' stacks among them.
MAPS_MAX = 1 << 14
MAPPED_BYTES_MAX = 384 << 20
# So often at most it is looked how many pages of files there are; and giving them back takes no more than this part of the processor time
# that this process takes: mapping them again is two to twelve times as much, and a question has to wait for that, however long nobody asked
# one. Where the page cache has them in pieces of 4 KiB instead of 2 MiB, both take a hundred times as long.
TRIM_SECONDS = 0.02
TRIM_PART = 1 / 400
# Past so many times what is to stay, whoever is done with all of a record gives its pages back, whatever that takes: else all of a log
# would be in memory when all of it is read. What was read before that stays, and whoever reads all again finds it.
FAR_TOO_MANY = 2.25
# Past so many times all are given back, whatever that takes: half at most of what mapping them took. Libraries are never given back, so
# that there are so many is not enough: there must be more by what is to stay than were left the last time.
MOST = 2.5
# Of a page that it is not told to read, the system reads what is around too: up to some MiB, which takes longer than so few bytes.
FEW_BYTES = 1 << 20
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

_LOCAL = frozenset(("bcachefs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"))
_MADV_WILLNEED, _MADV_DONTNEED, _MADV_POPULATE_READ = 3, 4, 22
_LIBC = ctypes.CDLL(None, use_errno=True)


def resident() -> tuple[int, int]:
    """Return the bytes of memory that are this process's alone, and those of files that it shares; 0 where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/self/statm", "rb") as stream:
        _, pages, shared = map(int, stream.read().split()[:3])
        return (pages - shared) * PAGE_BYTES, shared * PAGE_BYTES
    return 0, 0


class _Map:
    """A file's map, for as long as somebody has a part of it. `number` names the file whatever its path."""

    __slots__ = ("__weakref__", "number", "of_file")

    def __init__(self, of_file: pa.Buffer, number: int) -> None:
        self.of_file = of_file
        self.number = number


class Maps:
    """Maps of the files below one folder, of which about `bytes_max` are in this process's memory. Thread-safe."""

    def __init__(self, root: str, bytes_max: int) -> None:
        self._root = root
        self._bytes_max = bytes_max
        self._next_look = 0.0  # in monotonic seconds
        self._next_trim = 0.0  # in seconds of processor time
        self._are_far_too_many = False
        self._left = 0  # that could not be given back
        self._all = weakref.WeakSet[_Map]()
        self._lock = threading.Lock()
        self._by_path = weakref.WeakValueDictionary[str, _Map]()  # the newest of each
        self._kept: OrderedDict[str, _Map] = OrderedDict()
        self._can_map: bool | None = None

    def view(self, path: str, start: int, size: int, spans: Sequence[tuple[int, int]]) -> pa.Buffer | None:
        """Return `size` bytes of a file from `start` on, of which `spans`, counted from there, are read in.

        None where that cannot be had from a map: then the file has to be read, which tells what is wrong, if anything is.
        """
        found = self._part(path, start, size)
        if found is None:
            return None
        self.trim()
        ranges = [_pages(found.address + low, high - low) for low, high in spans]
        if len(ranges) > 1 or sum(high - low for low, high in spans) <= FEW_BYTES:
            for pages in ranges:  # all are begun before the first is waited for
                _LIBC.madvise(*pages, _MADV_WILLNEED)
        return found if all(_LIBC.madvise(*pages, _MADV_POPULATE_READ) == 0 for pages in ranges) else None

    def begin(self, path: str, start: int, size: int, spans: Sequence[tuple[int, int]]) -> bool:
        """Have the system read what is about to be viewed, and do not wait for it; False where there is no map to view it by."""
        found = self._part(path, start, size)
        if found is None:
            return False
        for low, high in spans:
            _LIBC.madvise(*_pages(found.address + low, high - low), _MADV_WILLNEED)
        return True

    def _part(self, path: str, start: int, size: int) -> pa.Buffer | None:
        if self._can_map is None:
            self._can_map = sys.platform == "linux" and _file_system(self._root) in _LOCAL
        whole = self._whole(path) if self._can_map else None
        return None if whole is None or start + size > whole.size else whole.slice(start, size)

    def trim(self) -> None:
        """Give the maps' pages back, if there are too many and it costs little; what is looked at again comes from the page cache."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + TRIM_SECONDS
        shown = resident()[1]
        self._are_far_too_many = shown > FAR_TOO_MANY * self._bytes_max
        are_too_many_again = shown > MOST * self._bytes_max and shown - self._left > self._bytes_max
        if shown > self._bytes_max and (time.process_time() >= self._next_trim or are_too_many_again):
            with self._lock:
                maps = list(self._all)
            for each in maps:
                _LIBC.madvise(*_pages(each.of_file.address, each.of_file.size), _MADV_DONTNEED)
            self._next_trim = time.process_time() + (time.monotonic() - now) / TRIM_PART
            self._left = resident()[1]
            self._are_far_too_many = False

    def give_back(self, path: str, start: int, size: int) -> None:
        """Give the pages of a part of a file back that somebody is done with, if there are far too many."""
        self.trim()
        with self._lock:
            found = self._by_path.get(path) if self._are_far_too_many else None
        if found is not None and start + size <= found.of_file.size:
            _LIBC.madvise(*_pages(found.of_file.address + start, size), _MADV_DONTNEED)

    def let_go(self, paths: Iterable[str] | None) -> None:
        """Let go of some files, or of all."""
        with self._lock:
            for path in list(self._kept) if paths is None else paths:
                self._kept.pop(path, None)
                self._by_path.pop(path, None)

    def _whole(self, path: str) -> pa.Buffer | None:
        """Return a file's map, the one that there is if it is still of the file that has this name."""
        try:
            status = os.stat(path)
            with self._lock:
                found = self._by_path.get(path)
                if found is None or found.number != status.st_ino:
                    if len(self._all) >= MAPS_MAX:
                        return None
                    found = _Map(_mapped(path), status.st_ino)
                    self._all.add(found)
                    self._by_path[path] = found
                remember(self._kept, path, found, MAPS_KEPT)
                return pa.foreign_buffer(found.of_file.address, found.of_file.size, found)
        except OSError:
            return None


def _mapped(path: str) -> pa.Buffer:
    """Return a file's map. Arrow has the system read what it is asked for, as much as that reads ahead at once: it is asked for a byte."""
    with pa.memory_map(path) as file:  # what was read outlives it, without a handle of the system's
        size = file.size()
        first = file.read_buffer(min(1, size))
        return pa.foreign_buffer(first.address, size, first) if size else first


def _pages(address: int, size: int) -> tuple[ctypes.c_void_p, ctypes.c_size_t]:
    lead = address % PAGE_BYTES
    return ctypes.c_void_p(address - lead), ctypes.c_size_t(size + lead)


def _file_system(folder: str) -> str | None:
    """Return the type of the file system that a folder is on, None where it cannot be told."""
    try:
        device = os.stat(folder).st_dev
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            mounts = [line.split() for line in file]
    except OSError:
        return None
    name = f"{os.major(device)}:{os.minor(device)}"
    return next((fields[fields.index("-") + 1] for fields in mounts if fields[2] == name), None)
