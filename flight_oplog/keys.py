"""Filters of key columns: which records cannot hold an entry with a given key, told without reading the column.

A topic declares its keys; each of its records then has a Bloom filter for each of them: the split block Bloom filter of
https://parquet.apache.org/docs/file-format/bloomfilter/, made by Arrow's Parquet writer. A text is hashed as its UTF-8,
anything else as a 64-bit little-endian integer in the column's own unit; nulls are in no filter.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from flight_oplog.codec import Bounds
from flight_oplog.errors import RequestError

KEYS_MAX = 8
# Of so many records that do not hold a key, one is read in vain. Costs 10 to 20 bits for each different key of a record.
MISTAKEN = 0.01

_BLOCK_BYTES = 32
# One bit in each of a block's eight words.
_SALTS = (0x47B6137B, 0x44974D91, 0x8824AD5B, 0xA2B7289D, 0x705495C7, 0x2DF1424B, 0x9EFC4947, 0x5C6BFB31)


def check_keys(topic: str, keys: tuple[str, ...], schema: pa.Schema) -> None:
    """Raise RequestError for what cannot be the keys of a topic."""
    if len(keys) > KEYS_MAX:
        raise RequestError(f"topic {topic!r}: {len(keys)} keys, a topic has {KEYS_MAX} at most; nothing was written")
    for name in keys:
        if name not in schema.names:
            raise RequestError(f"topic {topic!r}: key {name[:80]!r} is none of its columns; nothing was written")
        if not is_key(schema.field(name).type):
            raise RequestError(
                f"topic {topic!r}: column {name!r} is {schema.field(name).type}; keys are texts, integers, dates or timestamps; "
                "nothing was written"
            )


def is_key(kind: pa.DataType) -> bool:
    types = pa.types
    return any(is_kind(kind) for is_kind in (types.is_string, types.is_large_string, types.is_integer, types.is_date32, types.is_timestamp))


def filters_of(
    batches: list[pa.RecordBatch], keys: tuple[str, ...], found: Bounds, different: Mapping[str, pa.Array] | None = None
) -> bytes | None:
    """Return the filters of a record's keys, one after the other; note in its bounds where each is: [start, bytes].

    Of those whose `different` values are known these are looked at.
    """
    made = b""
    schema = batches[0].schema
    for name in (name for name in keys if name in schema.names and is_key(schema.field(name).type)):
        known = different.get(name) if different else None
        columns = [batch.column(name) for batch in batches] if known is None else [known]
        values = pa.chunked_array(map(_hashed, columns)).unique().drop_null()
        if len(values):
            filter = _filter_of(values)
            found[name]["filter"] = [len(made), len(filter)]
            made += filter
    return made or None


def holds(bits: memoryview, columns: list[pa.Array]) -> bool:
    """Whether a filter is whole and has every value of a column."""
    hashes = hashes_of(list(pa.chunked_array(columns).unique().drop_null()), columns[0].type) or []
    return is_filter(bits, len(bits)) and all(may_hold(bits, hash) for hash in hashes)


def _hashed(column: pa.Array) -> pa.Array:
    """Return the values as they are hashed."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return column
    if kind == pa.uint64() or pa.types.is_timestamp(kind):
        return column.view(pa.int64())
    return (column.view(pa.int32()) if pa.types.is_date32(kind) else column).cast(pa.int64())


def _filter_of(values: pa.Array) -> bytes:
    sink = pa.BufferOutputStream()
    options = {"key": {"ndv": len(values), "fpp": MISTAKEN}}
    plain = {"use_dictionary": False, "compression": "none", "write_statistics": False, "store_schema": False}
    pq.write_table(pa.table({"key": values}), sink, row_group_size=len(values), bloom_filter_options=options, **plain)
    made = sink.getvalue()
    chunk = pq.ParquetFile(pa.BufferReader(made)).metadata.row_group(0).column(0)
    # A header, then the bits: a power of two of bytes, which is the most of it.
    bits = 1 << chunk.bloom_filter_length.bit_length() - 1
    return made.slice(chunk.bloom_filter_offset + chunk.bloom_filter_length - bits, bits).to_pybytes()


def hashes_of(values: Sequence[pa.Scalar], kind: pa.DataType) -> list[int] | None:
    """Return the hashes of keys that are not null in a column of type `kind`; None where one is not exactly that."""
    try:
        hashed = _hashed(pa.array(values, values[0].type).cast(kind)).to_pylist()
    except pa.ArrowInvalid:
        return None
    return [xxhash.xxh64_intdigest(each.encode() if isinstance(each, str) else struct.pack("<q", each)) for each in hashed]


def is_filter(bits: memoryview, size: int) -> bool:
    """Whether the bits are a whole filter, of so many bytes."""
    return len(bits) == size and size > 0 and size % _BLOCK_BYTES == 0


def may_hold(bits: memoryview, hash: int) -> bool:
    """Whether something with this hash may be among what a filter was made of."""
    start = ((hash >> 32) * (len(bits) // _BLOCK_BYTES) >> 32) * _BLOCK_BYTES
    words = struct.unpack_from("<8I", bits, start)
    low = hash & 0xFFFFFFFF
    return all(word >> ((low * salt & 0xFFFFFFFF) >> 27) & 1 for word, salt in zip(words, _SALTS, strict=True))
