"""Codes of a record's texts: each different text of a column once, and for each entry which one it has.

They say nothing that the texts do not. Whoever groups by texts, or looks for one, reads two bytes an entry instead of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flight_oplog.errors import CorruptLog

CODED = pa.dictionary(pa.uint16(), pa.string())
CODE_BYTES = 2
TEXTS_MAX = 1 << 8 * CODE_BYTES
TEXTS_BYTES_MAX = 2 << 20
# They are made where they take no more than this part of what the texts take. A sample of so many tells whether that may be; what
# it says of how many different texts there are may be wrong by a factor.
PART = 3
SAMPLED, WRONG_BY = 2048, 2
# Where texts of more than this part of the entries were not known before, those that were are left behind.
NEW_PART = 8
COLUMNS_MAX = 64


@dataclass(frozen=True, slots=True)
class CodesOf:
    """Names the codes of a column of texts, where names of columns are asked for."""

    column: str


Name = str | CodesOf
# The texts that a column has had in the records of an append so far; None where a record said that they hardly repeat.
Known = dict[str, pa.Array | None]


def codes_of(batches: Sequence[pa.RecordBatch], schema: pa.Schema, known: Known | None = None) -> dict[str, pa.DictionaryArray]:
    """Return the codes of those columns whose texts repeat much: one array for all of the batches, null for null.

    Texts that are `known` keep their codes, new ones get the next; then these are known too. So the codes of one record of an append
    mean the same in others.
    """
    found: dict[str, pa.DictionaryArray] = {}
    known = {} if known is None else known
    for place, field in enumerate(schema):
        texts = known.get(field.name)
        if field.type != pa.string() or len(found) == COLUMNS_MAX or (texts is None and field.name in known):
            continue
        column = pa.chunked_array([batch.column(place) for batch in batches])
        if column.null_count < len(column):
            coded = _coded(column, texts)
            if coded is not None:
                found[field.name] = coded
            known[field.name] = None if coded is None else coded.dictionary
    return found


def occurring(coded: pa.DictionaryArray) -> pa.Array:
    """Return the texts that some entry has."""
    occurs = np.bincount(coded.indices.drop_null().to_numpy(), minlength=len(coded.dictionary)) > 0
    return coded.dictionary.filter(pa.array(occurs))


def singly(coded: pa.DictionaryArray, rows: np.ndarray) -> list[pa.Array]:
    """Return the texts of a few entries, each in an array of its own; they are not copied."""
    texts, codes = coded.dictionary, coded.indices
    if coded.null_count:
        return [texts.take(codes.slice(row, 1)) for row in rows.tolist()]
    of_rows = codes.to_numpy()[rows].tolist()
    found = {code: texts.slice(code, 1) for code in {*of_rows}}
    return [found[code] for code in of_rows]


def _coded(column: pa.ChunkedArray, known: pa.Array | None) -> pa.DictionaryArray | None:
    if known is None:
        if not _may_repeat(column):
            return None
        coded = column.dictionary_encode().combine_chunks()
        texts, codes = coded.dictionary, coded.indices
    else:
        texts, codes = known, pc.index_in(column, value_set=known).combine_chunks()
        if new := codes.null_count - column.null_count:
            if NEW_PART * new > len(column):
                return _coded(column, None)
            texts = pa.concat_arrays([known, column.filter(pc.is_null(codes)).unique().drop_null()])
            if not _are_worth(texts, column):
                return _coded(column, None)  # there were others before
            codes = pc.index_in(column, value_set=texts).combine_chunks()
    return pa.DictionaryArray.from_arrays(codes.cast(pa.uint16()), texts) if _are_worth(texts, column) else None


def _may_repeat(column: pa.ChunkedArray) -> bool:
    """Whether a sample of the texts says that there are few enough different ones, as Chao estimates their number.

    https://www.jstor.org/stable/4615964: by how many were seen once, and how many twice.
    """
    longest = max(column.chunks, key=len)
    places = np.unique(np.random.default_rng(len(longest)).integers(0, max(1, len(longest)), SAMPLED))  # by chance: ids may come in turns
    sample = longest.take(pa.array(places[: len(longest)])).drop_null()
    if not len(sample):
        return False
    times = sample.value_counts().field("counts").to_numpy()
    once, twice = np.count_nonzero(times == 1), np.count_nonzero(times == 2)
    different = len(times) + once * (once - 1) / (2 * (twice + 1))
    return bool(PART * (different * sample.nbytes / len(sample) / WRONG_BY + _bytes_of_codes(column)) <= column.nbytes)


def _are_worth(texts: pa.Array, column: pa.ChunkedArray) -> bool:
    fit = 0 < len(texts) <= TEXTS_MAX and texts.nbytes <= TEXTS_BYTES_MAX
    return fit and PART * (texts.nbytes + _bytes_of_codes(column)) <= column.nbytes


def _bytes_of_codes(column: pa.ChunkedArray) -> int:
    return CODE_BYTES * len(column) + (len(column) // 8 if column.null_count else 0)


def written(coded: pa.DictionaryArray, compression: str = "none") -> pa.Buffer:
    """Return codes as an Arrow IPC stream of one batch, its buffers compressed as content's are."""
    sink = pa.BufferOutputStream()
    batch = pa.RecordBatch.from_arrays([coded], ["codes"])
    options = pa.ipc.IpcWriteOptions(compression=None if compression == "none" else compression, use_threads=False)
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def read(stream: pa.Buffer, entries: int, where: str) -> pa.DictionaryArray:
    """Return codes that were written, of so many entries. Raises CorruptLog naming `where` when they are nothing of the kind."""
    try:
        with pa.ipc.open_stream(stream) as reader:
            [batch] = reader
        [coded] = batch.columns
        is_whole = coded.type == CODED and len(coded) == entries and not coded.dictionary.null_count
        is_whole = is_whole and (pc.max(coded.indices).as_py() or 0) < max(1, len(coded.dictionary))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptLog(f"{where}: codes of texts are not readable ({type(error).__name__}); restore the file") from error
    if not is_whole:
        raise CorruptLog(f"{where}: codes of texts do not fit its {entries} entries; restore the file")
    return coded
