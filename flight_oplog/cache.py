"""Decoded columns of records, kept in memory: data files never change, so what is kept can never be stale."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow.fs import LocalFileSystem

from flight_oplog import codec
from flight_oplog.datafile import RecordMeta
from flight_oplog.filters import TextIndex
from flight_oplog.store import Snapshot

FRAGMENTS_MAX = 100_000

_FORMAT = ds.IpcFileFormat()
_FILESYSTEM = LocalFileSystem()


@dataclass
class ScanCounts:
    """What one scan looked at. Filled while it runs; exact once it has ended."""

    files: int = 0
    files_pruned: int = 0
    records: int = 0
    records_pruned: int = 0
    records_read: int = 0
    content_bytes: int = 0


class ColumnCache:
    """Decoded columns of records, least recently used out first, never more than `bytes_max`. Thread-safe."""

    def __init__(self, bytes_max: int) -> None:
        self.hits = self.misses = 0
        self._bytes_max = bytes_max
        self._bytes = 0
        self._lock = threading.Lock()
        self._fragments: dict[tuple[tuple[str, ...], str], ds.Fragment] = {}
        self._records: OrderedDict[tuple[Any, ...], Decoded | TextIndex] = OrderedDict()
        self._asked: OrderedDict[tuple[Any, ...], bool] = OrderedDict()  # what an index was wanted of, and whether it has none

    def columns(self, snapshot: Snapshot, record: RecordMeta, names: Sequence[str], counts: ScanCounts) -> Decoded:
        """Return at least `names` of the record's stored columns, from memory or freshly decoded."""
        key = (record.file.path, record.row)
        with self._lock:
            known: Any = self._records.get(key)
            if known is not None and all(name in known.columns for name in names):
                self._records.move_to_end(key)
                self.hits += 1
                return known  # type: ignore[no-any-return]
            self.misses += 1
        decoded = _decode(snapshot, record, names if known is None else [n for n in names if n not in known.columns], counts)
        if known is not None:
            decoded = Decoded(known.lengths, known.columns | decoded.columns, known.nbytes + decoded.nbytes)
        self._keep(key, decoded)
        return decoded

    def index(self, record: RecordMeta, name: str, texts: Sequence[pa.Array], may_make: bool) -> TextIndex | None:
        """Return the index of a record's texts; it is made when it is wanted for the second time, and `may_make`."""
        key = (record.file.path, record.row, name)
        with self._lock:
            found: Any = self._records.get(key)
            if found is not None:
                self._records.move_to_end(key)
                return found  # type: ignore[no-any-return]
            was_asked, has_none = key in self._asked, self._asked.get(key, False)
            if not was_asked:
                self._asked[key] = False
                if len(self._asked) > FRAGMENTS_MAX:
                    self._asked.popitem(last=False)
        if not was_asked or has_none or not may_make or not self._bytes_max:
            return None
        made = TextIndex.of(texts)
        if made is None:
            self._asked[key] = True
        else:
            self._keep(key, made)
        return made

    def fragment(self, shape: tuple[str, ...], key: str, guarantee: Callable[[], pc.Expression | None]) -> ds.Fragment:
        """Return a fragment that stands for a file or record in pruning; made once, since a guarantee never changes."""
        found = self._fragments.get((shape, key))
        if found is None:
            expression = guarantee()
            found = _FORMAT.make_fragment(key, _FILESYSTEM, pc.scalar(True) if expression is None else expression)
            if len(self._fragments) >= FRAGMENTS_MAX:
                self._fragments.clear()
            self._fragments[shape, key] = found
        return found

    def _keep(self, key: tuple[Any, ...], decoded: Decoded | TextIndex) -> None:
        with self._lock:
            if (before := self._records.pop(key, None)) is not None:
                self._bytes -= before.nbytes
            if decoded.nbytes > self._bytes_max:
                return
            self._records[key] = decoded
            self._bytes += decoded.nbytes
            while self._bytes > self._bytes_max:
                self._bytes -= self._records.popitem(last=False)[1].nbytes


@dataclass(frozen=True, slots=True)
class Decoded:
    """Stored columns of one record, each as a list of arrays of `lengths` rows."""

    lengths: list[int]
    columns: dict[str, list[pa.Array]]
    nbytes: int


def _decode(snapshot: Snapshot, record: RecordMeta, names: Sequence[str], counts: ScanCounts) -> Decoded:
    content = snapshot.store.content(record)
    counts.content_bytes += content.size
    batches = codec.decode(content, record.entries, record.where, names)
    if all(_inside(content, array) for batch in batches for array in batch.columns):
        # Uncompressed content: every column is a view into the same bytes, so all of them cost no more than one.
        batches = codec.decode(content, record.entries, record.where)
        nbytes = content.size
    else:
        nbytes = sum(batch.nbytes for batch in batches)
    columns = {name: [batch.column(name) for batch in batches] for name in batches[0].schema.names} if batches else {}
    return Decoded([batch.num_rows for batch in batches], columns, nbytes)


def _inside(content: pa.Buffer, array: pa.Array) -> bool:
    return all(
        content.address <= buffer.address < content.address + content.size
        for buffer in array.buffers()
        if buffer is not None and buffer.size
    )
