"""Batches of entries ⇄ content: pure functions between record batches and the bytes inside a record.

Content is one complete Arrow IPC stream, schema message included, so a record can be read without anything else; codes of its
texts may come after it (`codes.py`).
Inside it batches have up to 65,536 entries and 8 MB: the values of a column then lie in pieces of half a megabyte, which a
disk reads in one go. A message takes less: on their way out they are cut, which copies nothing.
"""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from pyarrow import lib

from flight_oplog.errors import CorruptLog
from flight_oplog.files import allocate
from flight_oplog.schema import plain_field

BATCH_BYTES = 8_000_000
BATCH_ENTRIES = 65_536
ALIGNED = 64
# What is larger is not copied to be joined with others, unless something smaller came before it.
JOINED_BYTES_MAX = 1_250_000
SAMPLE_ENTRIES = 2048
# Types of texts, and the letters that `memoryview` has for their offsets.
_OFFSETS: dict[int, Literal["i", "q"]] = {
    lib.Type_STRING: "i",
    lib.Type_BINARY: "i",
    lib.Type_LARGE_STRING: "q",
    lib.Type_LARGE_BINARY: "q",
}
_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
BOUND_STRING_CHARACTERS = 64
# The least of fewer texts than this is found as fast one by one.
OUTER_TEXTS_FROM = 1024

Bounds = dict[str, dict[str, Any]]


# Into normal form, and to a wider schema


def conform(batch: pa.RecordBatch, target: pa.Schema) -> pa.RecordBatch:
    """Return `batch` with exactly the columns and types of `target`: reordered, widened, missing columns null.

    Values are kept exactly or ArrowInvalid is raised (a timestamp that does not fit the finer unit, for instance).
    """
    if batch.schema.equals(target, check_metadata=True):
        return batch
    columns = []
    for field in target:
        place = batch.schema.get_field_index(field.name)
        columns.append(pa.nulls(batch.num_rows, field.type) if place < 0 else recast(batch.column(place), field.type))
    return with_rows(columns, target, batch.num_rows)


def with_rows(columns: Sequence[pa.Array], schema: pa.Schema, rows: int) -> pa.RecordBatch:
    """Build a batch that keeps its row count even when it has no columns, as COUNT(*) asks for."""
    if columns:
        return pa.RecordBatch.from_arrays(columns, schema=schema)
    return pa.RecordBatch.from_struct_array(pa.Array.from_buffers(pa.struct([]), rows, [None], null_count=0))


def recast(array: pa.Array, target: pa.DataType) -> pa.Array:
    """Cast to a normal or wider type, by hand where Arrow's cast has no kernel or a wrong one.

    pyarrow 26 casts list views to lists with too short an offsets buffer, and has no cast from dictionaries of nested
    values, from run ends or from extension types inside other types.
    """
    if isinstance(array.type, pa.BaseExtensionType):
        return recast(array.storage, target)
    if array.type == target:
        return array
    for applies, rebuild in _BY_HAND:
        if applies(array.type):
            return rebuild(array, target)
    return array.cast(target)


def fitted(array: pa.Array, target: pa.DataType) -> pa.Array:
    """Cast values to what they are to be stored as: the same values, or ArrowInvalid is raised.

    Text becomes whatever it says; else kinds are kept apart, and a value has to come back from its new type as it was. But
    numbers round to the nearest float.
    """
    if array.type == target or pa.types.is_null(array.type):
        return array.cast(target)
    if _is_text(array.type) or (_is_text(target) and _kind(array.type) == "number"):
        return array.cast(target)
    if _kind(array.type) != _kind(target) and not (pa.types.is_date(array.type) and pa.types.is_timestamp(target)):
        raise pa.ArrowInvalid(f"{array.type} is not stored as {target}")
    cast = recast(array, target)
    if pa.types.is_floating(array.type) and pa.types.is_floating(target):
        same = pc.all(pc.equal(pc.is_finite(array), pc.is_finite(cast))).as_py() is not False
    else:
        same = cast.cast(array.type).equals(array) if not pa.types.is_nested(target) else True
    if not same:
        raise pa.ArrowInvalid(f"a value is not the same as {target}")
    return cast


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _kind(kind: pa.DataType) -> str:
    types = pa.types
    if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        return "number"
    for name in ("boolean", "date", "timestamp", "time", "duration", "interval", "struct", "map"):
        if getattr(types, f"is_{name}")(kind):
            return name
    return "list" if types.is_nested(kind) else "bytes"


def _lacks_cast(kind: pa.DataType) -> bool:
    types = pa.types
    return (
        isinstance(kind, pa.BaseExtensionType)
        or types.is_run_end_encoded(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
        or types.is_dictionary(kind)
        or any(_lacks_cast(kind.field(i).type) for i in range(kind.num_fields))
    )


def _recast_dictionary(array: pa.Array, target: pa.DataType) -> pa.Array:
    return recast(array.dictionary, target).take(array.indices)


def _recast_run_ends(array: pa.Array, target: pa.DataType) -> pa.Array:
    """Decode the runs' places instead of their values: pyarrow decodes runs of few types, and takes from any."""
    values = recast(array.values, target)
    kind = pa.run_end_encoded(array.type.run_end_type, pa.int64())
    children = [array.run_ends, pa.array(range(len(values)), pa.int64())]
    return values.take(pc.run_end_decode(pa.Array.from_buffers(kind, len(array), [None], 0, array.offset, children)))


def _recast_list(array: pa.Array, target: pa.DataType) -> pa.Array:
    lengths = pc.fill_null(pc.list_value_length(array), 0)
    kind, width = (pa.LargeListArray, "int64") if pa.types.is_large_list(target) else (pa.ListArray, "int32")
    values = recast(array.flatten(), target.value_type)
    return kind.from_arrays(pa.array(_running_sum(lengths, width)), values, type=target, mask=array.is_null())


def _running_sum(lengths: pa.Array, width: str) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, width)
    np.cumsum(lengths.to_numpy(zero_copy_only=False), out=offsets[1:])
    return offsets


def _recast_fixed_size_list(array: pa.Array, target: pa.DataType) -> pa.Array:
    size = target.list_size
    values = recast(array.values.slice(array.offset * size, len(array) * size), target.value_type)
    return pa.FixedSizeListArray.from_arrays(values, type=target, mask=array.is_null())


def _recast_map(array: pa.Array, target: pa.DataType) -> pa.Array:
    offsets = array.offsets.to_numpy()
    first, last = int(offsets[0]), int(offsets[-1])
    keys = recast(array.keys.slice(first, last - first), target.key_type)
    items = recast(array.items.slice(first, last - first), target.item_type)
    return pa.MapArray.from_arrays(pa.array(offsets - first, pa.int32()), keys, items, type=target, mask=array.is_null())


def _recast_struct(array: pa.Array, target: pa.DataType) -> pa.Array:
    children = []
    for field in target:
        place = array.type.get_field_index(field.name)
        children.append(pa.nulls(len(array), field.type) if place < 0 else recast(array.field(place), field.type))
    return pa.StructArray.from_arrays(children, fields=list(target), mask=array.is_null())


def expanded_nbytes(array: pa.Array) -> int:
    """Return how many bytes an array may take in its normal form, at most: a few bytes can stand for many."""
    types, kind = pa.types, array.type
    if isinstance(kind, pa.BaseExtensionType):
        return expanded_nbytes(array.storage)
    if types.is_dictionary(kind):
        return len(array) * _widest(array.dictionary)
    if types.is_run_end_encoded(kind):
        return len(array) * _widest(array.values)
    if kind in (pa.string_view(), pa.binary_view()):
        # A view is 16 bytes, the first four of them its length; Arrow has no kernel to tell.
        lengths = np.frombuffer(array.buffers()[1], "<i4").reshape(-1, 4)[array.offset : array.offset + len(array), 0]
        return int(lengths[array.is_valid().to_numpy(zero_copy_only=False)].sum(dtype=np.int64))
    if types.is_list_view(kind) or types.is_large_list_view(kind):
        return (pc.sum(pc.list_value_length(array)).as_py() or 0) * _widest(array.values)
    if types.is_struct(kind):
        return sum(expanded_nbytes(array.field(place)) for place in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return array.nbytes + expanded_nbytes(array.values)
    if types.is_map(kind):
        return array.nbytes + expanded_nbytes(array.keys) + expanded_nbytes(array.items)
    nbytes: int = array.nbytes
    return nbytes


def expanded_nbytes_of(batch: pa.RecordBatch) -> int:
    """Return how many bytes a batch may take in its normal form, at most."""
    return sum(map(expanded_nbytes, batch.columns))


def _widest(values: pa.Array) -> int:
    """Return the bytes of the largest of some values, or of all of them where that takes too long to tell."""
    kind = values.type
    if pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
        return pc.max(pc.binary_length(values)).as_py() or 0
    return max(1, kind.bit_width // 8) if pa.types.is_primitive(kind) else expanded_nbytes(values)


_BY_HAND: tuple[tuple[Callable[[pa.DataType], bool], Callable[[pa.Array, pa.DataType], pa.Array]], ...] = (
    (pa.types.is_run_end_encoded, _recast_run_ends),
    (lambda kind: pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind), _recast_list),
    (pa.types.is_dictionary, _recast_dictionary),
    (lambda kind: pa.types.is_fixed_size_list(kind) and _lacks_cast(kind), _recast_fixed_size_list),
    (lambda kind: (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _lacks_cast(kind), _recast_list),
    (lambda kind: pa.types.is_map(kind) and _lacks_cast(kind), _recast_map),
    (lambda kind: pa.types.is_struct(kind) and _lacks_cast(kind), _recast_struct),
)


def texts_as_bytes(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the batch with texts that are ASCII throughout as binary: Arrow validates only their offsets then.

    It looks at texts one by one, which for short ones takes many times as long as looking at all their bytes at once.
    """
    columns = [column.view(pa.binary()) if pa.types.is_string(column.type) and _is_ascii(column) else column for column in batch.columns]
    return with_rows(columns, pa.schema([pa.field(f.name, c.type) for f, c in zip(batch.schema, columns, strict=True)]), batch.num_rows)


def _is_ascii(column: pa.Array) -> bool:
    data = column.buffers()[2]
    if data is None:
        return True
    words = np.frombuffer(data, np.uint64, data.size // 8)
    rest = np.frombuffer(data, np.uint8)[words.nbytes :]
    return not (np.bitwise_or.reduce(words) & 0x8080808080808080 or np.bitwise_or.reduce(rest) & 0x80)


# Content


class Sizes:
    """How many bytes any rows of a batch take. Arrow looks at all columns anew each time it is asked; here offsets of texts are enough."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch
        self._bytes = 0  # of a row, in columns of fixed width and for where each text ends
        self._bits = 0  # of a row, for whether values are there, and in columns of truths
        self._ends: list[tuple[memoryview, int]] = []  # offsets of texts, and where those of the batch begin
        self._are_known = batch.num_rows > 0
        for column in batch.columns if self._are_known else ():
            kind = column.type
            form = _OFFSETS.get(kind.id)
            if form is not None:
                offsets, width = column.buffers()[1], struct.calcsize(form)
                self._ends.append((memoryview(offsets)[: offsets.size // width * width].cast(form), column.offset))
                self._bytes += width
            elif pa.types.is_primitive(kind) or pa.types.is_decimal(kind):
                self._bytes += kind.bit_width // 8
                self._bits += kind.bit_width == 1
            else:
                self._are_known = False
            self._bits += column.null_count > 0

    def of(self, start: int, rows: int) -> int:
        """Return the bytes of so many rows from `start` on."""
        if not self._are_known:
            nbytes: int = self._batch.slice(start, rows).nbytes
            return nbytes
        end = start + rows
        return (
            rows * self._bytes + (rows + 7) // 8 * self._bits + sum(ends[first + end] - ends[first + start] for ends, first in self._ends)
        )


def cut(
    batch: pa.RecordBatch, bytes_max: int = BATCH_BYTES, entries_max: int = BATCH_ENTRIES, sizes: Sizes | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield slices of at most `bytes_max` bytes and `entries_max` rows; a row that is larger goes alone. No copy."""
    rows = batch.num_rows
    if rows == 0:
        return
    sizes = Sizes(batch) if sizes is None else sizes
    pieces = max(math.ceil(sizes.of(0, rows) / bytes_max), math.ceil(rows / entries_max))
    if rows == 1 or pieces <= 1:
        yield batch
        return
    step = math.ceil(rows / pieces)
    for start in range(0, rows, step):
        some = batch.slice(start, step)
        if sizes.of(start, some.num_rows) <= bytes_max:
            yield some
        else:  # rows may differ in size
            yield from cut(some, bytes_max, entries_max)


def gather(batches: Iterable[pa.RecordBatch], bytes_max: int = BATCH_BYTES, entries_max: int = BATCH_ENTRIES) -> Iterator[pa.RecordBatch]:
    """Yield batches of up to `bytes_max`: small ones joined, those that are larger cut. Rows keep their order."""
    waiting: list[pa.RecordBatch] = []
    size = rows = 0
    for batch in batches:
        sizes, more_rows = Sizes(batch), batch.num_rows
        more = sizes.of(0, more_rows)
        if waiting and (size + more > bytes_max or rows + more_rows > entries_max):
            yield joined(waiting)
            waiting, size, rows = [], 0, 0
        if not waiting and (more > min(bytes_max, JOINED_BYTES_MAX) or more_rows > entries_max):
            yield from cut(batch, bytes_max, entries_max, sizes)
        elif more_rows:
            waiting.append(batch)
            size, rows = size + more, rows + more_rows
    if waiting:
        yield joined(waiting)


def empty(schema: pa.Schema) -> pa.RecordBatch:
    """Return a batch of no rows."""
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)


def joined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    """Return batches of one schema as one; a single one is not copied."""
    return batches[0] if len(batches) == 1 else pa.concat_batches(batches)


def encode(batches: Sequence[pa.RecordBatch], schema: pa.Schema, compression: str, after: Sequence[pa.Buffer] = ()) -> pa.Buffer:
    """Return the content of one record: an Arrow IPC stream of `batches`, all of `schema`, and what comes `after` it.

    Each of these begins at the next multiple of ALIGNED bytes; the last ends where content does. For `compression` see `chosen`.
    """
    return _written(list(gather(batches)), schema, chosen(batches, schema, compression), after)


def chosen(batches: Sequence[pa.RecordBatch], schema: pa.Schema, compression: str) -> str:
    """Return how the buffers of a record are compressed: none, lz4 or zstd.

    auto is lz4 where a sample of the entries shrinks by a fifth at least. Text and counters do; random keys and numbers do not, and
    would only cost time on the way in and out.
    """
    if compression != "auto":
        return compression
    pieces, rows = [], 0
    for batch in batches:
        if batch.num_rows and rows < SAMPLE_ENTRIES:
            pieces.append(batch.slice(0, SAMPLE_ENTRIES - rows))
            rows += pieces[-1].num_rows
    sample = joined(pieces) if pieces else None
    return "lz4" if sample and _written([sample], schema, "lz4").size < 0.8 * sample.nbytes else "none"


def _written(batches: Sequence[pa.RecordBatch], schema: pa.Schema, compression: str, after: Sequence[pa.Buffer] = ()) -> pa.Buffer:
    if compression == "none":  # the size is known: no growing, no copying of what was written
        size = schema.serialize().size + sum(pa.ipc.get_record_batch_size(batch) for batch in batches) + len(_END)
        buffer = allocate(size + sum(ALIGNED - 1 + each.size for each in after))
        sink, options = pa.FixedSizeBufferWriter(buffer), pa.ipc.IpcWriteOptions()
    else:
        # Records are encoded side by side; threads within one cost more than they save.
        sink, options = pa.BufferOutputStream(), pa.ipc.IpcWriteOptions(compression=compression, use_threads=False)
    with pa.ipc.new_stream(sink, schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    _follow(sink, after)
    return buffer.slice(0, sink.tell()) if compression == "none" else sink.getvalue()


def followed(content: pa.Buffer, after: Sequence[pa.Buffer]) -> pa.Buffer:
    """Return encoded content with what comes `after` it, as `encode` puts it there."""
    if not after:
        return content
    sink = pa.BufferOutputStream()
    sink.write(content)
    _follow(sink, after)
    return sink.getvalue()


def _follow(sink: pa.NativeFile, after: Sequence[pa.Buffer]) -> None:
    for each in after:
        sink.write(bytes(-sink.tell() % ALIGNED))
        sink.write(each)


def decode(content: pa.Buffer, entries: int, where: str, columns: Sequence[str] | None = None) -> list[pa.RecordBatch]:
    """Return the batches of a record's content, in their stored types; only `columns` are decompressed when given.

    Raises CorruptLog naming `where` when the bytes are no whole IPC stream or do not hold exactly `entries` rows:
    a damaged record is never read as fewer rows.
    """
    try:
        options = pa.ipc.IpcReadOptions()
        if columns is not None:
            names = pa.ipc.read_schema(content).names
            options = pa.ipc.IpcReadOptions(included_fields=[i for i, name in enumerate(names) if name in columns])
            # included_fields=[] means every field, so a record that has none of the columns is not opened at all.
            if not options.included_fields:
                return [with_rows([], pa.schema([]), entries)]
        source = pa.BufferReader(content)
        with pa.ipc.open_stream(source, options=options) as reader:
            batches = [_plain(batch) for batch in reader]
            whole = _ends_cleanly(content, source.tell())
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptLog(f"{where}: content is not a readable Arrow IPC stream ({type(error).__name__}); restore the file") from error
    rows = sum(batch.num_rows for batch in batches)
    if rows != entries or not whole:
        raise CorruptLog(f"{where}: content holds {rows} of {entries} entries; restore the file")
    return batches


def as_one(contents: Sequence[pa.Buffer], entries: Sequence[int], where: str) -> pa.Buffer:
    """Return contents of one schema, of so many entries each, as one: as a rule their schema messages are the same, and needed once."""
    size = 8 + int.from_bytes(contents[0].slice(4, 4), "little")
    schema = contents[0].slice(0, size)
    if all(content.slice(0, size).equals(schema) and _ends_cleanly(content, content.size) for content in contents):
        return pa.py_buffer(b"".join([schema, *(content.slice(size, content.size - size - len(_END)) for content in contents), _END]))
    batches = [batch for content, rows in zip(contents, entries, strict=True) for batch in decode(content, rows, where)]
    return encode(batches, batches[0].schema, "none")


def _ends_cleanly(content: pa.Buffer, end: int) -> bool:
    """An IPC stream that was cut between two messages reads without an error; only the end-of-stream marker tells."""
    return end >= len(_END) and content.slice(end - len(_END), len(_END)).to_pybytes() == _END


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Undo pyarrow's revival of registered extension types: inside the log they are their storage type and a name."""
    if not any(_lacks_cast(field.type) for field in batch.schema):
        return batch
    fields = [plain_field(field) for field in batch.schema]
    columns = [recast(column, field.type) for column, field in zip(batch.columns, fields, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))


def digest(content: pa.Buffer) -> str:
    """XXH3-128 of content, in hex. It finds damage; whoever can alter content on purpose can alter its digest too."""
    return xxhash.xxh3_128_hexdigest(content)


def has_digest(content: pa.Buffer, expected: str) -> bool:
    """Whether content has this digest, which another program may have written as SHA-256: that one is twice as long."""
    return (hashlib.sha256(content).hexdigest() if len(expected) == 64 else digest(content)) == expected


# Bounds


def bounds(batches: Sequence[pa.RecordBatch], schema: pa.Schema, different: Mapping[str, pa.Array] | None = None) -> Bounds:
    """Return, for each top-level column, {"nulls": n} and, where they are known, "min" and "max" as JSON values.

    Sound, not tight: every non-null value lies within [min, max]. A column with a NaN or an infinity has none.
    Of those columns whose `different` values are known these are looked at.
    """
    found: Bounds = {}
    for place, field in enumerate(schema):
        column = pa.chunked_array([batch.column(place) for batch in batches], type=field.type)
        values = different.get(field.name) if different else None
        found[field.name] = {"nulls": column.null_count} | _limits(column if values is None else pa.chunked_array([values]), field)
    return found


def _limits(column: pa.ChunkedArray, field: pa.Field) -> dict[str, Any]:
    write = _bound_writer(field.type)
    if write is None or column.null_count == len(column):
        return {}
    if pa.types.is_floating(field.type):
        return _float_limits(column)
    if pa.types.is_string(field.type):
        column = pa.chunked_array([_outer_texts(chunk) for chunk in column.chunks], type=field.type)
    limits = pc.min_max(column)
    low, high = write(limits["min"], False), write(limits["max"], True)
    return {} if low is None or high is None else {"min": low, "max": high}


def _float_limits(column: pa.ChunkedArray) -> dict[str, Any]:
    """Return the limits of numbers. numpy takes a tenth of Arrow's time, and a NaN for the least and the greatest."""
    chunks = [chunk.drop_null().to_numpy() for chunk in column.chunks if len(chunk) > chunk.null_count]
    low = float(np.min([chunk.min() for chunk in chunks]))
    high = float(np.max([chunk.max() for chunk in chunks]))
    return {"min": low, "max": high} if math.isfinite(low) and math.isfinite(high) else {}


def _outer_texts(texts: pa.Array) -> pa.Array:
    """Return a part of the texts that holds the least and the greatest of them; all of them where that is no less work.

    Texts of one length, such as ids, are told apart by their first eight bytes, as numbers: a tenth of the time.
    """
    rows = len(texts)
    if texts.null_count or rows < OUTER_TEXTS_FROM:
        return texts
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int32, rows + 1, texts.offset * 4)
    width = int(ends[1] - ends[0])
    if width < 8 or (np.diff(ends) != width).any():
        return texts
    heads = np.ndarray((rows,), ">u8", data, int(ends[0]), (width,)).astype(np.uint64)
    places = np.flatnonzero((heads == heads.min()) | (heads == heads.max()))
    return texts if len(places) > rows // 8 else texts.take(pa.array(places))


def _bound_writer(kind: pa.DataType) -> Callable[[pa.Scalar, bool], Any] | None:
    types = pa.types
    if types.is_boolean(kind) or types.is_integer(kind) or types.is_float32(kind) or types.is_float64(kind):
        return lambda scalar, upper: scalar.as_py()
    if types.is_decimal128(kind) or types.is_decimal256(kind):
        return lambda scalar, upper: str(scalar.as_py())
    if types.is_date32(kind) or types.is_time32(kind):
        return lambda scalar, upper: scalar.cast(pa.int32()).as_py()
    if types.is_timestamp(kind) or types.is_time64(kind) or types.is_date64(kind):
        return lambda scalar, upper: scalar.cast(pa.int64()).as_py()
    if types.is_string(kind) or types.is_large_string(kind):
        return lambda scalar, upper: _truncated(scalar.as_py(), upper)
    return None


def _truncated(text: str, upper: bool) -> str | None:
    """Cut a string bound soundly: a lower one to its prefix, an upper one to the next string after the prefix."""
    if len(text) <= BOUND_STRING_CHARACTERS:
        return text
    prefix = text[:BOUND_STRING_CHARACTERS]
    if not upper:
        return prefix
    for place in range(len(prefix) - 1, -1, -1):
        following = ord(prefix[place]) + 1
        if 0xD800 <= following <= 0xDFFF:  # surrogates are no characters; the next one above them is
            following = 0xE000
        if following <= 0x10FFFF:
            return prefix[:place] + chr(following)
    return None


def bound_scalar(value: Any, kind: pa.DataType) -> pa.Scalar:
    """Read back one bound that `bounds` wrote for a column of type `kind`."""
    if pa.types.is_decimal(kind):
        return pa.scalar(decimal.Decimal(value), kind)
    if pa.types.is_date32(kind) or pa.types.is_time32(kind):
        return pa.scalar(value, pa.int32()).cast(kind)
    if pa.types.is_timestamp(kind) or pa.types.is_time64(kind) or pa.types.is_date64(kind):
        return pa.scalar(value, pa.int64()).cast(kind)
    return pa.scalar(value, kind)


def outermost(limits: Iterable[dict[str, Any]], end: str, kind: pa.DataType) -> Any:
    """Return the least "min" or the greatest "max" of several bounds of a column of type `kind`."""
    choose = min if end == "min" else max
    return choose((of_run[end] for of_run in limits), key=decimal.Decimal if pa.types.is_decimal(kind) else None)


def bounds_json(found: Bounds) -> str:
    return json.dumps(found, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def time_range(found: Bounds, schema: pa.Schema, column: str | None) -> tuple[datetime.datetime | None, datetime.datetime | None]:
    """Return (min_time, max_time) of the event-time column in UTC, widened to whole microseconds; None = unknown.

    Times outside the years 1 to 9999 are unknown: other readers of the outer table could not show them.
    """
    limits = found.get(column, {}) if column else {}
    if "min" not in limits:
        return None, None
    unit = schema.field(column).type.unit
    scale = {"s": 1_000_000, "ms": 1_000, "us": 1, "ns": 1}[unit]
    low, high = limits["min"] * scale, limits["max"] * scale
    if unit == "ns":
        low, high = low // 1000, -(-high // 1000)
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    try:
        return epoch + datetime.timedelta(microseconds=low), epoch + datetime.timedelta(microseconds=high)
    except OverflowError:
        return None, None
