"""Small records that follow each other, whichever files they are in, read as one: what each costs alone is more than its entries do.

Which ones are put together must not change from one question to the next, or nothing that is kept of them would be found
again: those of 8,192 offsets, where all of them are wanted. Where a topic ends, and where a filter has left some out,
records are read one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from flight_oplog.records import RecordMeta

# What is put together: the records of so many offsets, if they are so many, each has fewer entries and all no more bytes.
RANGE_ENTRIES = 1 << 13
RECORDS_LEAST = 16
SMALL_ENTRIES = 1024
BYTES_MAX = 8 << 20


def ranges(records: Sequence[RecordMeta], first_offset: int) -> Iterator[tuple[int, int, bool]]:
    """Yield where in some records, in offset order, those of each range of offsets begin and end, and whether they are to be one.

    Those before them, if there are any, end at `first_offset`. Nobody knows whether more of the last range is yet to come.
    """
    if not records:
        return
    firsts, entries, sizes = np.array([(r.first_offset, r.entries, _size(r)) for r in records], np.int64).T
    # Whether each begins where the one before ends, or the topic does; nobody knows what comes after the last.
    follows = np.concatenate([[firsts[0] == first_offset], firsts[1:] == firsts[:-1] + entries[:-1], [False]])
    changes = np.array([one.schema_id != other.schema_id for one, other in itertools.pairwise(records)], bool)
    parted, large, nbytes = map(_added_up, (~follows[1:-1] | changes, (entries >= SMALL_ENTRIES) | (sizes > BYTES_MAX), sizes))
    edges = np.flatnonzero(np.diff(firsts // RANGE_ENTRIES)) + 1
    for first, last in itertools.pairwise([0, *edges.tolist(), len(records)]):
        is_whole = follows[first] and follows[last] and parted[last - 1] == parted[first]
        is_small = large[last] == large[first] and nbytes[last] - nbytes[first] <= BYTES_MAX
        yield first, last, bool(is_whole and is_small and last - first >= RECORDS_LEAST)


def _added_up(each: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(each)])


def _size(record: RecordMeta) -> int:
    """The bytes of a record's content, as far as they are its own: too many where they are not, or where it is read by columns."""
    return BYTES_MAX + 1 if record.span is None or record.parts is not None else record.span[1] - record.span[0]
