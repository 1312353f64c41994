"""Decoded columns of records, kept in memory: data files never change, so what is kept can never be stale.

Something new takes the place of what was not used since the new was asked for before: how long one was not used is held
against the time between two uses of the other, as in LIRS (https://dl.acm.org/doi/10.1145/511399.511340). A dashboard that reads
twice as much as there is room for, again and again, finds half of it so. If the least recently used went, it would find
nothing, as each goes just before it is wanted.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from flight_oplog import codec, codes
from flight_oplog.codes import CodesOf, Name
from flight_oplog.errors import CorruptLog
from flight_oplog.filters import TextIndex, fragment
from flight_oplog.kept import remember
from flight_oplog.keys import is_filter
from flight_oplog.numbers import Noted
from flight_oplog.overview import Listed, Overview
from flight_oplog.records import DataFile, RecordMeta
from flight_oplog.store import Snapshot
from flight_oplog.topics import Topic
from flight_oplog.vocabulary import Vocabulary

FRAGMENTS_MAX = 100_000
USES_KEPT = 1 << 16
TOPICS_KEPT = 64
VOCABULARIES_KEPT = 64
READERS = 16
ARRAY_BYTES = 1024  # what an array takes that shows pages of a file
_FILTERS = ""  # in the place of a column's name


@dataclass
class ScanCounts:
    """What a statement's scans of a table looked at. Filled while they run; exact once they have ended."""

    began = 0  # by the clock of uses; no count
    files: int = 0
    files_pruned: int = 0
    records: int = 0
    records_pruned: int = 0
    filter_bytes: int = 0
    records_read: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    content_bytes: int = 0


class ColumnCache:
    """Decoded columns of records, never more than `bytes_max`; pages of mapped files count next to nothing. Thread-safe."""

    def __init__(self, bytes_max: int) -> None:
        self.hits = self.misses = 0
        self.readers = ThreadPoolExecutor(READERS, "reader")
        self._bytes_max = bytes_max
        self._bytes = 0
        self._lock = threading.Lock()
        self._fragments: dict[tuple[tuple[str, ...], str], ds.Fragment] = {}
        self._files: dict[str, tuple[int, Sequence[DataFile]]] = {}
        self._records: OrderedDict[tuple[Any, ...], Decoded | TextIndex | Filters] = OrderedDict()
        self._together: OrderedDict[tuple[Any, ...], Together] = OrderedDict()
        self._vocabularies: OrderedDict[tuple[str, str], Vocabulary] = OrderedDict()
        self._topics: OrderedDict[tuple[str, int], _Known] = OrderedDict()
        self._uses: OrderedDict[tuple[Any, ...], _Use] = OrderedDict()
        self._clock = itertools.count(1)

    def columns(
        self,
        snapshot: Snapshot,
        record: RecordMeta,
        names: Sequence[Name],
        counts: ScanCounts,
        held: Decoded | None = None,
        stopped: threading.Event | None = None,
    ) -> Decoded:
        """Return at least `names` of the record's stored columns, or codes of some: from those `held`, from memory, or freshly decoded.

        Raises Cancelled when it was `stopped` before much of it was read.
        """
        if held is not None and held.has(names):
            return held
        key = (record.key,)
        with self._lock:
            if held is None:  # a statement that asks more than once uses it once
                self._used(key, counts)
            known: Any = self._records.get(key, held)
            missing = [name for name in names if known is None or name not in known.columns]
            if not missing:
                self.hits += 1
                counts.cache_hits += 1
                return known  # type: ignore[no-any-return]
            self.misses += 1
            counts.cache_misses += 1
        decoded, read = _decode(snapshot, record, missing, stopped)
        if known is not None:
            lengths = decoded.lengths if any(isinstance(name, str) for name in missing) else known.lengths
            decoded = Decoded(lengths, known.columns | decoded.columns, known.nbytes + decoded.nbytes, known.noted)
        with self._lock:
            counts.content_bytes += read
            self._keep(key, decoded, is_fresh=read == 0)
        return decoded

    def let_go(self, topic: str, table_version: int, files: Sequence[DataFile]) -> None:
        """Keep nothing of files that a topic has no more as of a newer version: while it is kept, their place on the disk may be taken."""
        known_version, known = self._files.get(topic, (-1, ()))
        if table_version <= known_version or files is known:
            return
        self._files[topic] = table_version, files
        if not known or (len(files) >= len(known) and files[0] is known[0] and files[len(known) - 1] is known[-1]):
            return  # files were added, and that was all
        gone = {file.path for file in known} - {file.path for file in files}
        with self._lock:
            for kept in (self._records, self._together):
                for key in [key for key in kept if key[0].rpartition("#")[0] in gone]:
                    self._bytes -= kept.pop(key).nbytes

    def metrics(self) -> dict[str, int]:
        """Return how often it was asked and how full it is, by the names that `system.metrics` explains."""
        return {
            "cache_hits": self.hits,
            "cache_misses": self.misses,
            "cache_bytes": self._bytes,
            "cache_bytes_max": self._bytes_max,
        }

    def holds(self, record: RecordMeta, names: Sequence[Name]) -> bool:
        """Whether columns of a record are in memory."""
        with self._lock:
            known: Any = self._records.get((record.key,))
        return known is not None and bool(known.has(names))

    def index(self, record: RecordMeta, name: str, texts: Sequence[pa.Array], may_make: bool) -> TextIndex | None:
        """Return the index of a record's texts, or codes of them; it is made when it is wanted for the second time, and `may_make`."""
        key = (record.key, name)
        with self._lock:
            use = self._used(key, None)
            found: Any = self._records.get(key)
        if found is not None or not (use.is_worth and may_make and self._bytes_max):
            return found  # type: ignore[no-any-return]
        made = TextIndex.of(texts)
        with self._lock:
            if made is None:
                use.has_none = True
            else:
                self._keep(key, made)
        return made

    def together(
        self, record: RecordMeta, columns: pa.Schema, rows: int, counts: ScanCounts, make: Callable[[str, pa.DataType], list[pa.Array]]
    ) -> list[Sequence[pa.Array]] | None:
        """Return columns of a record in as few pieces of up to `rows` as can be; None where one of them is not kept so.

        What is stored so is shown as it is. The rest, as `make` makes it, is made when it is wanted for the second time, while there
        is room: it goes before anything else does.
        """
        with self._lock:
            known: Any = self._records.get((record.key,))
            found: dict[str, Sequence[pa.Array]] = {} if known is None else known.shown(columns, rows)
            keys = {f.name: (record.key, f.name, str(f.type)) for f in columns if f.name not in found}
            uses = {name: self._used(key, counts) for name, key in keys.items()}
            found |= {name: self._together[key].pieces for name, key in keys.items() if key in self._together}
            if len(found) == len(columns):
                self.hits += 1
                counts.cache_hits += 1
        for name, key in keys.items():
            kind = columns.field(name).type
            if name not in found and uses[name].is_worth and self._bytes + record.entries * _width(kind) <= self._bytes_max:
                made = Together(make(name, kind))
                found[name] = made.pieces
                with self._lock:
                    if key not in self._together and self._bytes + made.nbytes <= self._bytes_max:
                        self._together[key] = made
                        self._bytes += made.nbytes
        return [found[name] for name in columns.names] if len(found) == len(columns) else None

    def vocabulary(self, topic: Topic, column: str, may_make: bool) -> Vocabulary | None:
        """Return the numbers of a column's texts; None where there are none yet and this `may_make` none."""
        key = (topic.name, column)
        with self._lock:
            found = self._vocabularies.get(key)
            if found is None and not may_make:
                return None
            if found is None:
                found = self._vocabularies[key] = Vocabulary()
            self._vocabularies.move_to_end(key)
            if len(self._vocabularies) > VOCABULARIES_KEPT:
                self._let_go_of(next(iter(self._vocabularies)))
            return found

    def _let_go_of(self, column: tuple[str, str]) -> None:
        """Let go of a column's vocabulary, and of all numbers of it."""
        vocabulary = self._vocabularies.pop(column)
        self._bytes -= vocabulary.bytes_counted
        for key in [key for key, item in self._together.items() if item.of is vocabulary]:
            self._bytes -= self._together.pop(key).nbytes

    def has_room(self, nbytes: int) -> bool:
        """Whether so much more can be kept, and nothing goes for it."""
        return nbytes <= self._bytes_max - self._bytes

    def has_numbers(self, record: RecordMeta, column: str, vocabulary: Vocabulary) -> bool:
        """Whether the numbers of a record's texts are in memory."""
        with self._lock:
            return (record.key, column, id(vocabulary)) in self._together

    def numbers(
        self, record: RecordMeta, column: str, vocabulary: Vocabulary, counts: ScanCounts, texts: Callable[[], list[pa.Array]]
    ) -> pa.Array:
        """Return the numbers of a record's texts, from memory or made now. Raises TooLarge where they are too many."""
        key = (record.key, column, id(vocabulary))
        with self._lock:
            self._used(key, counts)
            known = self._together.get(key)
        if known is not None:
            return known.pieces[0]
        numbers = [vocabulary.numbers(piece) for piece in texts()]
        made = Together(numbers if len(numbers) == 1 else [pa.concat_arrays(numbers)], vocabulary)
        with self._lock:
            if vocabulary in self._vocabularies.values():  # else nobody asks for them again
                of_texts = vocabulary.nbytes  # which may grow meanwhile
                room = self._bytes_max - self._bytes - (of_texts - vocabulary.bytes_counted)
                if room < 0:
                    self._let_go_of((record.file.topic, column))
                    return made.pieces[0]
                self._bytes += of_texts - vocabulary.bytes_counted
                vocabulary.bytes_counted = of_texts
                if key not in self._together and made.nbytes <= room:
                    self._together[key] = made
                    self._bytes += made.nbytes
        return made.pieces[0]

    def _used(self, key: tuple[Any, ...], counts: ScanCounts | None) -> _Use:
        """Take note that something is asked for, whether it is kept or not; whoever asks again within a statement uses it once."""
        use = self._uses.get(key)
        if use is None:
            use = _Use()
            remember(self._uses, key, use, USES_KEPT + len(self._records) + len(self._together))
        for kept in (self._uses, self._records, self._together):
            if key in kept:
                kept.move_to_end(key)
        if counts is not None:
            counts.began = counts.began or next(self._clock)
        if counts is None or use.last < counts.began:
            use.before, use.last = use.last, next(self._clock)
        return use

    def filters(self, snapshot: Snapshot, records: Sequence[RecordMeta], name: str, counts: ScanCounts) -> Iterator[memoryview | None]:
        """Yield the filter of a key of each record; None where it has none, or where its column is in memory and its filter is not."""
        keys = [(record.key, _FILTERS) for record in records]
        with self._lock:
            for key, record in zip(keys, records, strict=True):
                if "filter" in record.bounds.get(name, ()):
                    self._used(key, counts)
            known: dict[Any, Any] = {key: self._records.get(key) for key in keys}
        missing = [
            (key, record)
            for key, record in zip(keys, records, strict=True)
            if known[key] is None and "filter" in record.bounds.get(name, ()) and not self.holds(record, [name])
        ]
        for (key, _), read in zip(missing, snapshot.store.reader.filters([record for _, record in missing]), strict=True):
            counts.filter_bytes += len(read)
            known[key] = Filters(read)
            with self._lock:
                self._keep(key, known[key])
        for key, record in zip(keys, records, strict=True):
            place = record.bounds.get(name, {}).get("filter")
            if known[key] is None or place is None:
                yield None
                continue
            bits = memoryview(known[key].of_keys)[place[0] : sum(place)]
            if not is_filter(bits, place[1]):
                raise CorruptLog(f"{record.where}: the filter of column {name!r} is not whole; restore the file")
            yield bits

    def files(self, topic: Topic) -> Listed[DataFile]:
        """Return a topic's files, and what was found out of them before."""
        return self._known(topic).files.as_of(topic.files)

    def lacks(self, topic: Topic) -> int:
        """Return how many files `overview` would have to look into."""
        return max(0, len(topic.files) - len(self._known(topic).overview))

    def overview(self, snapshot: Snapshot, topic: Topic) -> Overview:
        """Return the overview of all of a topic's files, which grows with the topic. Raises CorruptLog where one is damaged."""
        known = self._known(topic)
        while len(base := known.overview) < len(topic.files):
            added = topic.files[len(base) :]
            snapshot.store.reader.prefetch(added)
            records = [snapshot.records_of(topic, file) for file in added]
            with known.growing:
                if known.overview is base:  # else another thread was faster
                    known.overview = base.grown(records)
        return base.upto(len(topic.files))

    def _known(self, topic: Topic) -> _Known:
        """Return what is kept of a topic's files, and of all that they grew out of or that grew out of them."""
        key = (topic.name, topic.files.root)
        with self._lock:
            found = self._topics.get(key)
            if found is None:
                for other in [other for other in self._topics if other[0] == topic.name][:-1]:  # at most one more: the past, or the present
                    del self._topics[other]
                found = _Known(Listed(topic.files), Overview.of([], topic.first_offset))
            remember(self._topics, key, found, TOPICS_KEPT)
        return found

    def fragment(self, shape: tuple[str, ...], key: str, guarantee: Callable[[], pc.Expression | None]) -> ds.Fragment:
        """Return a fragment that stands for a file or record in pruning; made once, since a guarantee never changes."""
        found = self._fragments.get((shape, key))
        if found is None:
            if len(self._fragments) >= FRAGMENTS_MAX:
                self._fragments.clear()
            found = self._fragments[shape, key] = fragment(key, guarantee())
        return found

    def _keep(self, key: tuple[Any, ...], decoded: Decoded | TextIndex | Filters, is_fresh: bool = False) -> None:
        """Keep something if there is room, or as much that was used less; what was committed just now is kept in any case.

        Columns in large pieces go first, as they can be made of what is kept; but not for what is asked for once.
        """
        if decoded.nbytes > self._bytes_max:
            return
        known = self._records.get(key)
        added = decoded.nbytes - (known.nbytes if known is not None else 0)
        wanted_since = next(self._clock) if is_fresh else self._uses.get(key, _NEVER).before
        goes: list[tuple[OrderedDict[Any, Any], Any]] = []
        missing = self._bytes + added - self._bytes_max
        for kept, is_to_stay in (
            (self._together, lambda used: not wanted_since),
            (self._records, lambda used: used >= max(1, wanted_since)),
        ):
            for each, item in kept.items():
                if missing <= 0:
                    break
                if each == key:
                    continue
                if is_to_stay(self._uses.get(each, _NEVER).last):
                    return  # and nothing else goes in vain
                goes.append((kept, each))
                missing -= item.nbytes
        for kept, each in goes:
            self._bytes -= kept.pop(each).nbytes
        while missing > 0 and self._vocabularies:  # all else has gone; of these, the numbers too
            column = next(iter(self._vocabularies))
            missing -= self._vocabularies[column].bytes_counted
            self._let_go_of(column)
        self._records[key] = decoded
        self._records.move_to_end(key)
        self._bytes += added


@dataclass(slots=True)
class _Use:
    """When something was asked for last, and before that; by a clock that counts."""

    before: int = 0
    last: int = 0
    has_none: bool = False

    @property
    def is_worth(self) -> bool:
        """Whether something that takes long is to be made: it was asked for before, and can be made."""
        return self.before > 0 and not self.has_none


_NEVER = _Use()


@dataclass
class _Known:
    """What is known of a topic's files."""

    files: Listed[DataFile]
    overview: Overview
    growing: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True)
class Decoded:
    """Stored columns of one record, each as a list of arrays of `lengths` rows; codes of some of them as one array."""

    lengths: list[int]
    columns: dict[Name, list[pa.Array]]
    nbytes: int
    noted: Noted = field(default_factory=Noted)

    def has(self, names: Sequence[Name]) -> bool:
        return all(name in self.columns for name in names)

    def shown(self, columns: pa.Schema, rows: int) -> dict[str, Sequence[pa.Array]]:
        """Return those columns that are stored as they are to be shown, if no two of the pieces have up to `rows` together."""
        if any(one + other <= rows for one, other in itertools.pairwise(self.lengths)):
            return {}
        stored = ((f.name, f.type, self.columns.get(f.name)) for f in columns)
        return {name: arrays for name, kind, arrays in stored if arrays and arrays[0].type == kind}


@dataclass(frozen=True, slots=True)
class Together:
    """A column of a record in few pieces, or the numbers of its texts."""

    pieces: list[pa.Array]
    of: Vocabulary | None = None

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Filters:
    """The filters of a record's keys, one after the other."""

    of_keys: bytes

    @property
    def nbytes(self) -> int:
        return len(self.of_keys)


def _decode(snapshot: Snapshot, record: RecordMeta, names: Sequence[Name], stopped: threading.Event | None) -> tuple[Decoded, int]:
    """Return columns of a record, codes of some, and how many bytes of its content were read for them."""
    read = snapshot.store.reader.columns(record, names, stopped)
    content, nbytes_read = read.buffer, read.nbytes
    if record.rows > 1:  # all of their content was read: so all of their columns are kept
        batches = codec.decode(content, record.entries, record.where)
        if not {*itertools.accumulate(record.entries_of_each)} <= {*itertools.accumulate(batch.num_rows for batch in batches)}:
            raise CorruptLog(f"{record.where}: content has other entries than the records say; restore the file")
        batches = pa.Table.from_batches(batches).combine_chunks().to_batches()
        columns = {name: [batch.column(name) for batch in batches] for name in batches[0].schema.names}
        return Decoded([batch.num_rows for batch in batches], columns, sum(batch.nbytes for batch in batches)), nbytes_read
    stored = [name for name in names if isinstance(name, str)]
    # Without the frame, which is not read for codes alone, content is not to be looked at.
    batches = (
        codec.decode(content, record.entries, record.where, stored) if stored else [codec.with_rows([], pa.schema([]), record.entries)]
    )
    coded = {CodesOf(name): [codes.read(stream, record.entries, record.where)] for name, stream in read.codes.items()}
    arrays = [array for batch in batches for array in batch.columns]
    if read.is_mapped:
        # The system keeps the pages of files, and takes them back when it is short: only what was decompressed takes memory here.
        nbytes = sum(_array_bytes(array) if _inside(content, array) else array.nbytes for array in arrays)
    elif nbytes_read in (0, content.size) and all(_inside(content, array) for array in arrays):  # 0: it was in memory
        # Uncompressed content: every column is a view into the same bytes, so all of them cost no more than one.
        batches = codec.decode(content, record.entries, record.where)
        nbytes = content.size
    else:
        nbytes = sum(array.nbytes for array in arrays)
    for [array] in coded.values():
        nbytes += ARRAY_BYTES if read.is_mapped and _inside(content, array.indices) else array.nbytes
    columns = {name: [batch.column(name) for batch in batches] for name in batches[0].schema.names} if batches else {}
    return Decoded([batch.num_rows for batch in batches], columns | coded, nbytes), nbytes_read


def _array_bytes(array: pa.Array) -> int:
    """About what an array takes beside its values, those within it counted."""
    return ARRAY_BYTES * max(1, len(array.buffers()) // 2)


def _width(kind: pa.DataType) -> int:
    """About how many bytes a value takes."""
    return int(kind.bit_width) // 8 + 1 if pa.types.is_primitive(kind) else 17


def _inside(content: pa.Buffer, array: pa.Array) -> bool:
    return all(
        content.address <= buffer.address < content.address + content.size
        for buffer in array.buffers()
        if buffer is not None and buffer.size
    )
