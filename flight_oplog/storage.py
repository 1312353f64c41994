"""Where the files of a log are: a local folder, or a prefix of an object store. The only importer of obstore.

Both keep three promises that everything above rests on. What `publish` and `create` have returned from is durable,
name and bytes. `create` gives a name to one caller only, however many race for it: `link` in a folder, a conditional
put in an object store. And a file is seen whole or not at all.

Paths are relative to the log's root, with / between their parts. Errors are OSErrors whatever the storage, as
`files.reason` reads them.
"""

from __future__ import annotations

import abc
import contextlib
import datetime
import errno
import io
import mmap
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import obstore
import obstore.exceptions
import obstore.store
import pyarrow as pa

from flight_oplog.errors import NotALog
from flight_oplog.files import OutputFile, allocate
from flight_oplog.maps import MAPPED_BYTES_MAX, Maps

ALIGNED_BYTES = 64
LEFT_BEHIND_SECONDS = 3600
_STAGED_SUFFIX = ".tmp"

OBJECT_STORES = ("s3", "s3a", "gs", "az", "abfs", "abfss")
REQUESTS_AT_ONCE = 16
PART_BYTES = 8 << 20
PARTS_MAX = 10_000
# How long one request is tried again, and how long an entry of the Delta log is, until nobody can say what became of it.
RETRY_SECONDS = 20
CREATE_SECONDS = 60
# A file up to this size is fetched at once: one request costs as much as reading it.
WHOLE_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Read:
    """A part of a file: the bytes that were read for it, and whether they are pages that the system keeps, mapped."""

    buffer: pa.Buffer
    nbytes: int
    is_mapped: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """A file as a listing shows it; `modified` in seconds since 1970."""

    path: str
    size: int
    modified: float


class Unsure(OSError):
    """It cannot be told whether the write took place."""


class Storage(abc.ABC):
    """The files of one log. Thread-safe."""

    uri: str  # as delta-rs takes it
    options: dict[str, str]  # and what else it takes
    is_local: bool
    requests_at_once: int
    gap_bytes: int  # so much is read along with what lies on both sides of it, as another request costs more
    reads_ahead: int  # how many records are read while a query looks at one

    @abc.abstractmethod
    def is_new(self) -> bool:
        """Whether there is nothing yet, but perhaps the beginning of an empty log."""

    @abc.abstractmethod
    def prepare(self) -> None:
        """Make the root, where it is something that can be made. Raises NotALog where `create` cannot be relied upon."""

    @abc.abstractmethod
    def exists(self, path: str) -> bool: ...

    @abc.abstractmethod
    def names(self, folder: str) -> list[str]:
        """Return the names of the files right in a folder; none when there is no such folder."""

    @abc.abstractmethod
    def walk(self) -> Iterator[Found]:
        """Yield every file of the log."""

    @abc.abstractmethod
    def read(self, path: str, start: int = 0, end: int | None = None) -> pa.Buffer:
        """Return the bytes of a file from `start` to `end`, fewer where it ends before. Raises FileNotFoundError.

        The memory is aligned as the place in the file is, up to ALIGNED_BYTES, where that costs nothing.
        """

    @abc.abstractmethod
    def some(self, path: str, start: int, size: int, spans: Sequence[tuple[int, int]]) -> Read | None:
        """Return `size` bytes of a file from `start` on, of which only `spans`, counted from there, need to be there.

        None where they are not: the file ends before.
        """

    def begin(self, path: str, start: int, size: int, spans: Sequence[tuple[int, int]]) -> bool:
        """Have the system read what `some` is about to be asked for; False where somebody has to wait for it instead."""
        return False

    def read_each(self, paths: Iterable[str]) -> Iterator[bytes | None]:
        """Yield the bytes of each file, None for one that is not there."""

        def read(path: str) -> bytes | None:
            try:
                return self.read(path).to_pybytes()
            except FileNotFoundError:
                return None

        return self.each(read, paths)

    def each(self, request: Callable[[Any], Any], of: Iterable[Any], least: int = 1) -> Iterator[Any]:
        """Yield the answer of a request for each thing; as many at once as the storage takes, or as `least` says."""
        things = list(of)
        at_once = min(len(things), max(self.requests_at_once, least))
        if at_once < 2:
            yield from map(request, things)
            return
        with ThreadPoolExecutor(at_once, "storage") as pool:
            yield from pool.map(request, things)

    @abc.abstractmethod
    def open(self, path: str, size: int) -> Any:
        """Open a file of `size` bytes for reading at random. Raises FileNotFoundError."""

    @abc.abstractmethod
    def create(self, path: str, content: bytes, mark: str, private: bool = False) -> None:
        """Make a small new file. `mark` is a text in it that is in no other file. A private one, others on this machine cannot read.

        Raises FileExistsError when somebody else was first, Unsure when it cannot be told whether it was made, OSError
        when it was not.
        """

    @abc.abstractmethod
    def stage(self, path: str) -> OutputFile:
        """Begin a file that may become the one at `path`."""

    @abc.abstractmethod
    def publish(self, path: str, file: OutputFile) -> None:
        """Make a settled file the one at `path`. May be done again after it was patched, until something names it."""

    @abc.abstractmethod
    def delete(self, path: str) -> None:
        """Remove a file. May raise FileNotFoundError when there is none."""

    @abc.abstractmethod
    def delete_old(self, path: str, before: float) -> bool:
        """Remove a file last modified until `before` (seconds since 1970); whether it was. Publishing counts as modifying."""

    @abc.abstractmethod
    def sync(self, paths: Iterable[str]) -> None:
        """Make durable what another program has written: files, or folders for the names in them."""

    @abc.abstractmethod
    def still(self, paths: Iterable[str]) -> contextlib.AbstractContextManager[str]:
        """Give another program a root with some files of the log's, where no others come while it lists them."""

    @abc.abstractmethod
    def adopt(self, root: str, paths: Iterable[str]) -> None:
        """Take files that another program has made at such a root, durably; they replace those of their names."""

    @abc.abstractmethod
    def sweep(self) -> None:
        """Remove what a crash in `create` has left behind."""

    def give_back(self, path: str, start: int, size: int) -> None:
        """Be told that somebody is done with a part of a file, and does not expect to look at it soon."""
        return None

    @abc.abstractmethod
    def trim(self) -> None:
        """Keep no more of files in memory than was said. Costs nothing where there is nothing to do."""

    @abc.abstractmethod
    def let_go(self, paths: Iterable[str] | None = None) -> None:
        """Hold on to nothing of some files, or of any: somebody may want their place on the disk."""


def storage_at(uri: str, mapped_bytes_max: int = MAPPED_BYTES_MAX) -> Storage:
    """Return the storage at a folder's path, a file:// URI or an object store's URI. Raises NotALog for any other.

    Files on a local disk are mapped, unless `mapped_bytes_max` is 0.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if scheme is None or scheme[1] == "file":
        return Folder(uri.removeprefix("file://"), mapped_bytes_max)
    if scheme[1] not in OBJECT_STORES:
        raise NotALog(f"{uri}: is not a folder, nor on an object store that is known here ({', '.join(OBJECT_STORES)})")
    return Bucket(uri)


# A local folder


class Folder(Storage):
    is_local = True
    requests_at_once = 1
    gap_bytes = 32 << 10
    reads_ahead = 2

    def __init__(self, root: str, mapped_bytes_max: int = MAPPED_BYTES_MAX) -> None:
        self.uri, self.options = os.path.abspath(root), {}
        if os.path.exists(self.uri) and not os.path.isdir(self.uri):
            raise NotALog(f"{self.uri}: is a file, not a folder; choose an empty or a new folder")
        self._maps = Maps(self.uri, mapped_bytes_max) if mapped_bytes_max else None

    def _full(self, path: str) -> str:
        return os.path.join(self.uri, path)

    def is_new(self) -> bool:
        return not os.path.isdir(self.uri) or os.listdir(self.uri) in ([], ["_delta_log"])

    def prepare(self) -> None:
        os.makedirs(self.uri, exist_ok=True)

    def exists(self, path: str) -> bool:
        return os.access(self._full(path), os.F_OK)

    def names(self, folder: str) -> list[str]:
        try:
            return os.listdir(self._full(folder))
        except FileNotFoundError:
            return []

    def walk(self) -> Iterator[Found]:
        for folder, _, names in os.walk(self.uri):
            for name in names:
                full = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(full)
                    yield Found(os.path.relpath(full, self.uri), status.st_size, status.st_mtime)

    def read(self, path: str, start: int = 0, end: int | None = None) -> pa.Buffer:
        handle = os.open(self._full(path), os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = (os.fstat(handle).st_size if end is None else end) - start
            lead = start % ALIGNED_BYTES
            memory = allocate(lead + size)
            return memory.slice(lead, _fill(handle, memoryview(memory)[lead:], start))
        finally:
            os.close(handle)

    def some(self, path: str, start: int, size: int, spans: Sequence[tuple[int, int]]) -> Read | None:
        full, nbytes = self._full(path), sum(high - low for low, high in spans)
        mapped = self._maps.view(full, start, size, spans) if self._maps and start % ALIGNED_BYTES == 0 else None
        if mapped is not None:
            return Read(mapped, nbytes, is_mapped=True)
        memory = mmap.mmap(-1, size)  # of which only the spans are ever touched
        view = memoryview(memory)
        handle = os.open(full, os.O_RDONLY | os.O_CLOEXEC)
        try:
            is_there = all(_fill(handle, view[low:high], start + low) == high - low for low, high in spans)
        finally:
            os.close(handle)
        return Read(pa.py_buffer(memory), nbytes) if is_there else None

    def begin(self, path: str, start: int, size: int, spans: Sequence[tuple[int, int]]) -> bool:
        return self._maps is not None and start % ALIGNED_BYTES == 0 and self._maps.begin(self._full(path), start, size, spans)

    def open(self, path: str, size: int) -> Any:
        return pa.OSFile(self._full(path), "rb")

    def create(self, path: str, content: bytes, mark: str, private: bool = False) -> None:
        full = self._full(path)
        with _written_beside(full, content, 0o600 if private else 0o644) as before:
            try:
                os.link(before, full)  # whole or not at all, and only one can
            except OSError as error:
                # A file system over a network may report an error of its own for a link that was made.
                if not self._holds(path, mark, error):
                    raise
        try:
            _sync_folder(os.path.dirname(full))
        except OSError as error:
            raise Unsure(error.errno, str(error)) from error

    def _holds(self, path: str, mark: str, error: OSError) -> bool:
        """Whether the file at `path` is the one with `mark`."""
        try:
            with open(self._full(path), encoding="utf-8") as file:
                return mark in file.read()
        except FileNotFoundError:
            return False
        except OSError:
            raise Unsure(error.errno, str(error)) from error

    def stage(self, path: str) -> OutputFile:
        folder = os.path.dirname(self._full(path))
        if not os.path.isdir(folder):
            os.makedirs(folder, exist_ok=True)
            _sync_folder(self.uri)
        return OutputFile(self._full(path))

    def publish(self, path: str, file: OutputFile) -> None:
        file.touch()
        file.sync()
        _sync_folder(os.path.dirname(self._full(path)))
        if not os.path.exists(self._full(path)):
            raise OSError(errno.ESTALE, "the file was taken for an orphan and removed")

    def delete(self, path: str) -> None:
        self.let_go([path])
        os.unlink(self._full(path))

    def delete_old(self, path: str, before: float) -> bool:
        # Out of sight first: who publishes it meanwhile has either touched it, which shows now, or finds it gone.
        full, aside = self._full(path), self._full(f"{path}.removing")
        os.rename(full, aside)
        if os.stat(aside).st_mtime > before:
            os.rename(aside, full)
            return False
        self.let_go([path])
        os.unlink(aside)
        return True

    def sync(self, paths: Iterable[str]) -> None:
        for path in paths:
            full = self._full(path)
            if os.path.isdir(full):
                _sync_folder(full)
            else:
                with open(full, "rb") as file:
                    os.fsync(file.fileno())

    @contextlib.contextmanager
    def still(self, paths: Iterable[str]) -> Iterator[str]:
        with tempfile.TemporaryDirectory(prefix="flight-oplog-") as root:
            for path in paths:
                link = os.path.join(root, path)
                os.makedirs(os.path.dirname(link), exist_ok=True)
                os.symlink(self._full(path), link)
            yield root

    def adopt(self, root: str, paths: Iterable[str]) -> None:
        for path in paths:
            full = self._full(path)
            with open(os.path.join(root, path), "rb") as file, _written_beside(full, file.read()) as before:
                os.replace(before, full)
            _sync_folder(os.path.dirname(full))

    def sweep(self) -> None:
        for name in self.names("_delta_log"):
            full = self._full(f"_delta_log/{name}")
            with contextlib.suppress(OSError):
                if name.startswith(".") and name.endswith(_STAGED_SUFFIX) and os.path.getmtime(full) < time.time() - LEFT_BEHIND_SECONDS:
                    os.unlink(full)

    def give_back(self, path: str, start: int, size: int) -> None:
        if self._maps is not None:
            self._maps.give_back(self._full(path), start, size)

    def trim(self) -> None:
        if self._maps:
            self._maps.trim()

    def let_go(self, paths: Iterable[str] | None = None) -> None:
        if self._maps:
            self._maps.let_go(None if paths is None else map(self._full, paths))


def _fill(handle: int, memory: memoryview, start: int) -> int:
    """Read a file from `start` on until the memory is full; return how many bytes there were."""
    done = 0
    while done < len(memory) and (got := os.preadv(handle, [memory[done:]], start + done)):
        done += got
    return done


@contextlib.contextmanager
def _written_beside(path: str, content: bytes, mode: int = 0o644) -> Iterator[str]:
    """Write a file durably under another name in its folder, for the block to give it its own; the other name goes."""
    before = os.path.join(os.path.dirname(path), f".{uuid.uuid4()}{_STAGED_SUFFIX}")
    try:
        _write_durably(before, content, mode)
        yield before
    finally:
        with contextlib.suppress(OSError):
            os.unlink(before)


def _write_durably(path: str, content: bytes, mode: int = 0o644) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        done = 0
        while done < len(content):
            done += os.write(handle, content[done:])
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(path: str) -> None:
    """Make the names in a folder durable: a new file's bytes are lost with its name."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# An object store


class Bucket(Storage):
    """A prefix of an object store. Credentials and endpoint come from where that store's own tools take them.

    A file is staged on this machine, without a name, and uploaded when it is published: its first bytes are patched
    until then, and an object cannot be.
    """

    is_local = False
    requests_at_once = REQUESTS_AT_ONCE
    gap_bytes = 1 << 20
    reads_ahead = 6

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.options = {"max_retries": "10", "retry_timeout": f"{RETRY_SECONDS}s"}
        retry: Any = {"max_retries": 10, "retry_timeout": datetime.timedelta(seconds=RETRY_SECONDS)}
        try:
            self._store = obstore.store.from_url(self.uri, retry_config=retry)
            self._asking_once = obstore.store.from_url(self.uri, retry_config={"max_retries": 0})
        except (obstore.exceptions.BaseError, ValueError) as error:
            raise NotALog(f"{self.uri}: cannot be opened: {' '.join(str(error).split())[:300]}") from None

    def is_new(self) -> bool:
        return next(self.walk(), None) is None

    def prepare(self) -> None:
        path, mark = f"_probe-{uuid.uuid4()}", str(uuid.uuid4())
        self.create(path, mark.encode(), mark)
        try:
            self.create(path, b"", str(uuid.uuid4()))
        except FileExistsError:
            return
        finally:
            self.delete(path)
        raise NotALog(f"{self.uri}: the object store does not know conditional puts, which keep two writers apart; choose another")

    def exists(self, path: str) -> bool:
        try:
            with _as_oserror():
                obstore.head(self._store, path)
        except FileNotFoundError:
            return False
        return True

    def names(self, folder: str) -> list[str]:
        with _as_oserror():
            found = obstore.list_with_delimiter(self._store, folder)["objects"]
        return [each["path"].rpartition("/")[2] for each in found]

    def walk(self) -> Iterator[Found]:
        with _as_oserror():
            for batch in obstore.list(self._store):
                for each in batch:
                    yield Found(each["path"], each["size"], each["last_modified"].timestamp())

    def read(self, path: str, start: int = 0, end: int | None = None) -> pa.Buffer:
        with _as_oserror():
            if end is None:
                content = obstore.get(self._store, path).bytes()
                return pa.py_buffer(content).slice(start)
            return pa.py_buffer(obstore.get_range(self._store, path, start=start, end=end))

    def some(self, path: str, start: int, size: int, spans: Sequence[tuple[int, int]]) -> Read | None:
        starts, ends = [start + low for low, _ in spans], [start + high for _, high in spans]
        with _as_oserror():
            found = obstore.get_ranges(self._store, path, starts=starts, ends=ends)
        memory = mmap.mmap(-1, size)
        view = memoryview(memory)
        for (low, high), piece in zip(spans, found, strict=True):
            if len(piece) != high - low:
                return None
            view[low:high] = memoryview(piece).cast("B")
        return Read(pa.py_buffer(memory), sum(map(len, found)))

    def open(self, path: str, size: int) -> Any:
        if size <= WHOLE_BYTES:
            return pa.BufferReader(self.read(path))
        return pa.PythonFile(_Remote(self, path, size), mode="r")

    def create(self, path: str, content: bytes, mark: str, private: bool = False) -> None:
        deadline = time.monotonic() + CREATE_SECONDS
        pause, is_first = 0.1, True
        while True:
            try:
                with _as_oserror():
                    obstore.put(self._asking_once, path, content, mode="create")
                return
            except FileExistsError:
                # It may be this very put that made it: the answer to the first try was lost.
                holds = self._holds(path, mark)
                if holds is not None:
                    if holds:
                        return
                    raise
                error: OSError = OSError(errno.EBUSY, "the store was making up its mind")
            except (PermissionError, FileNotFoundError) as refusal:
                if is_first:  # else it may be the answer to this request, and not to the one before
                    raise
                error = refusal
            except OSError as failure:
                error = failure
            # The request may have been carried out, or be yet. Asked again, the store decides: whoever holds the
            # name then, it is certain.
            if time.monotonic() > deadline:
                raise Unsure(error.errno, str(error)) from error
            is_first = False
            time.sleep(pause)
            pause = min(2 * pause, 5)

    def _holds(self, path: str, mark: str) -> bool | None:
        """Whether the object at `path` is the one with `mark`; None when there is none after all."""
        try:
            return mark.encode() in self.read(path).to_pybytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Unsure(error.errno, str(error)) from error

    def stage(self, path: str) -> OutputFile:
        return OutputFile(os.path.join(tempfile.gettempdir(), f"flight-oplog-{uuid.uuid4()}"), nameless=True)

    def publish(self, path: str, file: OutputFile) -> None:
        size = file.tell()
        with _as_oserror():
            if size <= PART_BYTES:
                obstore.put(self._store, path, file.read(0, size))
                return
            step = max(PART_BYTES, -(-size // PARTS_MAX))
            parts = (file.read(place, step) for place in range(0, size, step))
            obstore.put(self._store, path, parts, chunk_size=step, max_concurrency=4)

    def delete(self, path: str) -> None:
        with _as_oserror():
            obstore.delete(self._store, path)

    def delete_old(self, path: str, before: float) -> bool:
        with _as_oserror():
            if obstore.head(self._store, path)["last_modified"].timestamp() > before:
                return False
            obstore.delete(self._store, path)
        return True

    def sync(self, paths: Iterable[str]) -> None:
        """Nothing to do: an object that was put is durable."""

    def still(self, paths: Iterable[str]) -> contextlib.AbstractContextManager[str]:
        """The log itself: a store lists objects by their names, and what comes meanwhile comes last."""
        return contextlib.nullcontext(self.uri)

    def adopt(self, root: str, paths: Iterable[str]) -> None:
        """Nothing to do: they are there."""

    def sweep(self) -> None:
        """Nothing to do: an object is put whole."""

    def trim(self) -> None:
        """Nothing to do: objects are not mapped."""

    def let_go(self, paths: Iterable[str] | None = None) -> None:
        """Nothing to do: what was fetched is a copy."""


class _Remote(io.RawIOBase):
    """An object as a file to read at random."""

    def __init__(self, bucket: Bucket, path: str, size: int) -> None:
        self._bucket, self._path, self._size, self._place = bucket, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = base + offset
        return self._place

    def read(self, size: int = -1) -> Any:
        end = self._size if size < 0 else min(self._size, self._place + size)
        if end <= self._place:
            return b""
        found = self._bucket.read(self._path, self._place, end)
        self._place += found.size
        return found


@contextlib.contextmanager
def _as_oserror() -> Iterator[None]:
    try:
        yield
    except obstore.exceptions.AlreadyExistsError as error:
        raise FileExistsError(errno.EEXIST, str(error)) from error
    except (obstore.exceptions.PermissionDeniedError, obstore.exceptions.UnauthenticatedError) as error:
        raise PermissionError(errno.EACCES, str(error)) from error
    except obstore.exceptions.BaseError as error:
        raise OSError(errno.EHOSTUNREACH, str(error)) from error
