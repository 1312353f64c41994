"""Parquet files of records, as bytes: each column chunk is one PLAIN data page of version 1.

Written by hand because content is large and must not be copied: a general writer copied it four times, which cost more
than everything else an append does. What is here is the part of the format a file of records needs, after
parquet.thrift and https://parquet.apache.org/docs/file-format/; the footer is in Thrift's compact protocol. A small file that
`Writer` made is read here as well: a general reader takes several times as long to open it.
"""

from __future__ import annotations

import functools
import re
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from flight_oplog.files import BLOCK_BYTES, LARGE_BYTES, OutputFile

MAGIC = b"PAR1"
PAGE_BYTES_MAX = (1 << 31) - 1  # the format counts a page's bytes in 32 bits
# A page is compressed from here on; smaller ones are not worth a codec's own header.
_COMPRESSED_FROM = 256
_ZSTD = pa.Codec("zstd", 1)

_REQUIRED, _OPTIONAL, _REPEATED = 0, 1, 2
_INT64, _BYTE_ARRAY = 2, 6
_PLAIN, _RLE = 0, 3
_UNCOMPRESSED, _ZSTD_CODE = 0, 6
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

# Thrift's compact protocol: a struct is fields, each a header byte (step to its number, type) and a value, then 0.


def _varint(number: int) -> bytes:
    if number < 0x80:
        return bytes((number,))
    parts = bytearray()
    while number >= 0x80:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def _zigzag(number: int) -> bytes:
    return _varint(number << 1 if number >= 0 else (-number << 1) - 1)


def _binary(text: str) -> bytes:
    return _varint(len(text.encode())) + text.encode()


def _list(kind: int, items: Sequence[bytes]) -> bytes:
    head = bytes((len(items) << 4 | kind,)) if len(items) < 15 else bytes((0xF0 | kind,)) + _varint(len(items))
    return head + b"".join(items)


_TRUE, _I32, _I64, _BINARY, _LIST, _STRUCT = 1, 5, 6, 8, 9, 12


def _struct(*fields: tuple[int, int, bytes]) -> bytes:
    """Return a struct of (number, type, value), in the order of their numbers, which are less than 16 apart."""
    parts = []
    before = 0
    for number, kind, value in fields:
        parts.append(bytes((number - before << 4 | kind,)) + value)
        before = number
    return b"".join(parts) + b"\0"


# The schema


@dataclass(frozen=True)
class Leaf:
    """A column that holds values: its path and its type."""

    path: tuple[str, ...]
    kind: int


@dataclass(frozen=True)
class Shape:
    """A Parquet schema: its leaves in order, and its elements as the footer wants them."""

    leaves: tuple[Leaf, ...]
    elements: tuple[bytes, ...]


def shape_of(schema: pa.Schema) -> Shape:
    """Return the Parquet schema of a file; int64, timestamps of microseconds, string, binary, and lists of structs of them."""
    leaves: list[Leaf] = []
    elements = [_element("schema", None, None, children=len(schema))]
    for column in schema:
        _add_field(column, (), leaves, elements)
    return Shape(tuple(leaves), tuple(elements))


def _add_field(column: pa.Field, above: tuple[str, ...], leaves: list[Leaf], elements: list[bytes]) -> None:
    path = (*above, column.name)
    repetition = _OPTIONAL if column.nullable else _REQUIRED
    kind = column.type
    if pa.types.is_list(kind):
        elements.append(_element(column.name, None, repetition, 3, _struct((3, _STRUCT, b"\0")), children=1))
        elements.append(_element("list", None, _REPEATED, children=1))
        _add_field(kind.value_field, (*path, "list"), leaves, elements)
    elif pa.types.is_struct(kind):
        elements.append(_element(column.name, None, repetition, children=kind.num_fields))
        for child in kind:
            _add_field(child, path, leaves, elements)
    else:
        physical, converted, logical = _LEAF_TYPES[kind]
        elements.append(_element(column.name, physical, repetition, converted, logical))
        leaves.append(Leaf(path, physical))


# Arrow type → physical type, ConvertedType, LogicalType: STRING is 1; TIMESTAMP is 8, in UTC, in MICROS, which is 2.
_LEAF_TYPES: dict[pa.DataType, tuple[int, int | None, bytes | None]] = {
    pa.int64(): (_INT64, None, None),
    pa.string(): (_BYTE_ARRAY, 0, _struct((1, _STRUCT, b"\0"))),
    pa.binary(): (_BYTE_ARRAY, None, None),
    pa.timestamp("us", "UTC"): (_INT64, 10, _struct((8, _STRUCT, _struct((1, _TRUE, b""), (2, _STRUCT, _struct((2, _STRUCT, b"\0"))))))),
}


def _element(
    name: str, physical: int | None, repetition: int | None, converted: int | None = None, logical: bytes | None = None, children: int = 0
) -> bytes:
    fields: list[tuple[int, int, bytes]] = []
    if physical is not None:
        fields.append((1, _I32, _zigzag(physical)))
    if repetition is not None:
        fields.append((3, _I32, _zigzag(repetition)))
    fields.append((4, _BINARY, _binary(name)))
    if children:
        fields.append((5, _I32, _zigzag(children)))
    if converted is not None:
        fields.append((6, _I32, _zigzag(converted)))
    if logical is not None:
        fields.append((10, _STRUCT, logical))
    return _struct(*fields)


# Values


@dataclass
class Values:
    """What one leaf holds in one row group: PLAIN bytes in parts, so that large ones need no copy, and its levels."""

    count: int
    parts: list[Any]
    levels: bytes = b""
    compress: bool = False
    checked: bool = True  # with a checksum of the page, which every reader may verify


def int64s(values: Iterable[int]) -> bytes:
    numbers = list(values)
    return struct.pack(f"<{len(numbers)}q", *numbers)


def texts(values: Iterable[str]) -> bytes:
    parts = []
    for text in values:
        data = text.encode()
        parts += [len(data).to_bytes(4, "little"), data]
    return b"".join(parts)


def levels(of_values: Sequence[int], maximum: int) -> bytes:
    """Return repetition or definition levels as runs, with their length before them; nothing where all must be 0."""
    if not maximum:
        return b""
    parts = []
    start = 0
    for place in range(1, len(of_values) + 1):
        if place == len(of_values) or of_values[place] != of_values[start]:
            parts.append(_varint(place - start << 1) + bytes((of_values[start],)))  # levels here are below 256: one byte
            start = place
    runs = b"".join(parts)
    return len(runs).to_bytes(4, "little") + runs


# The file


@dataclass
class Writer:
    """Writes row groups one after another; `close` ends the file with its footer."""

    out: OutputFile
    shape: Shape
    created_by: str
    _groups: list[bytes] = field(default_factory=list)
    _rows: int = 0

    def __post_init__(self) -> None:
        self.out.write(MAGIC)

    def row_group(self, rows: int, columns: Sequence[Values]) -> tuple[int, tuple[int, int]]:
        """Write one row group; return where the first column's first value is in the file, and the last column's span.

        A large part at the end begins at a block of the disk, so that it can go there as it lies in memory.
        """
        pages: list[tuple[bytes, list[Any], int, int]] = []  # header and levels, values, bytes, codec
        for values in columns:
            size = len(values.levels) + sum(len(part) for part in values.parts)
            parts, codec, packed = [values.levels, *values.parts], _UNCOMPRESSED, size
            if values.compress and size >= _COMPRESSED_FROM:
                parts, codec = [_ZSTD.compress(b"".join(parts), asbytes=True)], _ZSTD_CODE
                packed = len(parts[0])
            check = zlib.crc32(b"".join(parts)) if values.checked else None
            header = _page_header(size, packed, values.count, check)
            pages.append((header, parts, len(header) + size, codec))
        last = columns[-1].parts[-1]
        before = sum(len(header) + sum(len(part) for part in parts) for header, parts, _, _ in pages) - len(last)
        if len(last) >= LARGE_BYTES:
            self.out.write(bytes(-(self.out.tell() + before) % BLOCK_BYTES))
        start = place = self.out.tell()
        chunks, raw, small = [], 0, []
        for leaf, values, (header, parts, size, codec) in zip(self.shape.leaves, columns, pages, strict=True):
            packed = len(header)
            small.append(header)
            for part in parts:
                packed += len(part)
                if len(part) < LARGE_BYTES:
                    small.append(part)
                else:
                    self.out.write(b"".join(small))
                    self.out.write(part)
                    small = []
            chunks.append(_chunk(leaf, codec, values.count, size, packed, place))
            place += packed
            raw += size
        self.out.write(b"".join(small))
        end = place
        self._groups.append(
            _struct(
                (1, _LIST, _list(_STRUCT, chunks)),
                (2, _I64, _zigzag(raw)),
                (3, _I64, _zigzag(rows)),
                (5, _I64, _zigzag(start)),
                (6, _I64, _zigzag(end - start)),
            )
        )
        self._rows += rows
        return start + len(pages[0][0]), (end - packed, end)

    def close(self, metadata: Mapping[str, str]) -> None:
        """End the file with its footer, in which is `metadata`."""
        pairs = [_struct((1, _BINARY, _binary(key)), (2, _BINARY, _binary(value))) for key, value in metadata.items()]
        footer = _struct(
            (1, _I32, _zigzag(2)),
            (2, _LIST, _list(_STRUCT, self.shape.elements)),
            (3, _I64, _zigzag(self._rows)),
            (4, _LIST, _list(_STRUCT, self._groups)),
            *([(5, _LIST, _list(_STRUCT, pairs))] if pairs else []),
            (6, _BINARY, _binary(self.created_by)),
        )
        self.out.write(footer + len(footer).to_bytes(4, "little") + MAGIC)
        self.out.settle()


def _page_header(size: int, packed: int, count: int, check: int | None) -> bytes:
    """PageHeader: type DATA_PAGE, both sizes, crc, and a DataPageHeader: count, PLAIN, levels in RLE."""
    parts = [b"\x15\0\x15", _zigzag(size), b"\x15", _zigzag(packed)]
    if check is None:
        parts.append(b"\x2c")
    else:
        parts += [b"\x15", _zigzag(check - (check >> 31 << 32)), b"\x1c"]  # the checksum counts as a signed number
    return b"".join((*parts, b"\x15", _zigzag(count), b"\x15\0\x15\x06\x15\x06\0\0"))


def _chunk(leaf: Leaf, codec: int, count: int, size: int, packed: int, place: int) -> bytes:
    """ColumnChunk: file_offset 0, and its ColumnMetaData."""
    numbers = (_zigzag(codec), b"\x16", _zigzag(count), b"\x16", _zigzag(size), b"\x16", _zigzag(packed), b"\x26", _zigzag(place))
    return b"".join((b"\x26\0\x1c", _chunk_head(leaf), b"\x15", *numbers, b"\0\0"))


@functools.cache
def _chunk_head(leaf: Leaf) -> bytes:
    encodings = _list(_I32, [_zigzag(_PLAIN), _zigzag(_RLE)])
    path = _list(_BINARY, [_binary(name) for name in leaf.path])
    return _struct((1, _I32, _zigzag(leaf.kind)), (2, _LIST, encodings), (3, _LIST, path))[:-1]


# Reading


@dataclass(frozen=True, slots=True)
class Page:
    """The only page of a column chunk: how many values, levels and values as in `Values`, and where the chunk is in the file."""

    count: int
    data: bytes
    span: tuple[int, int]


# A page that is read here has no more bytes, nor values.
READ_PAGE_BYTES_MAX = 4 << 20
READ_VALUES_MAX = 1 << 16

_VARINT_BYTES_MAX = 10
_VARINT = rb"([\x80-\xff]{0,9}[\x00-\x7f])"
_PAGE_HEADER = re.compile(  # as `_page_header` writes it: both sizes, checksum, count
    rb"\x15\x00\x15%b\x15%b(?:\x2c|\x15%b\x1c)\x15%b\x15\x00\x15\x06\x15\x06\x00\x00" % ((_VARINT,) * 4), re.DOTALL
)


def pages_of(file: bytes, shape: Shape, created_by: str) -> list[Page] | None:
    """Return the pages of a whole file of one row group that is as `Writer` makes it, checked; None of any other, or a damaged one."""
    footer = len(file) - 8 - int.from_bytes(file[-8:-4], "little")
    if not (file.startswith(MAGIC) and file.endswith(MAGIC) and file.endswith(_binary(created_by) + b"\0", 0, -8)):
        return None
    found, place = [], len(MAGIC)
    for _ in shape.leaves:
        header = _PAGE_HEADER.match(file, place)
        if header is None:
            return None
        sizes, begin = header.groups(), header.end()
        size, packed, count = _number(sizes[0]), _number(sizes[1]), _number(sizes[3])
        if not 0 <= size <= READ_PAGE_BYTES_MAX or not 0 <= count <= READ_VALUES_MAX:
            return None
        start, place = place, begin + packed
        data = file[begin:place]
        if len(data) != packed or (sizes[2] is not None and zlib.crc32(data) != _unzigzag(sizes[2]) & 0xFFFFFFFF):
            return None
        if size != packed or data.startswith(_ZSTD_MAGIC):
            data = _ZSTD.decompress(data, size, asbytes=True)
        found.append(Page(count, data, (start, place)))
    return found if place == footer else None


def levels_in(data: bytes, count: int, start: int = 0) -> tuple[list[int], int]:
    """Return so many levels that `levels` wrote into a page at `start`, and where what follows begins. Raises ValueError for others."""
    if count == 1 and data.startswith(b"\2\0\0\0\2", start):  # one run of one
        return [data[start + 5]], start + 6
    place, end = start + 4, start + 4 + int.from_bytes(data[start : start + 4], "little")
    found: list[int] = []
    while place < end:
        size = next(more for more in range(1, min(_VARINT_BYTES_MAX + 1, end - place)) if data[place + more - 1] < 0x80)
        values = _unvarint(data[place : place + size]) >> 1
        if not 0 < values <= count - len(found):
            break
        found += [data[place + size]] * values
        place += size + 1
    if len(found) != count or place != end:
        raise ValueError("a page has other levels than values")
    return found, end


def int64s_in(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // 8}q", data)


def texts_in(data: bytes) -> list[str]:
    found, place = [], 0
    while place < len(data):
        end = place + 4 + int.from_bytes(data[place : place + 4], "little")
        if end > len(data):
            raise ValueError("a text ends behind its page")
        found.append(data[place + 4 : end].decode())
        place = end
    return found


def _number(zigzag: bytes) -> int:
    """A number that is not negative, and as a rule small."""
    return zigzag[0] >> 1 if len(zigzag) == 1 else _unzigzag(zigzag)


def _unvarint(data: bytes) -> int:
    if len(data) == 5:  # as most checksums
        return data[0] & 0x7F | (data[1] & 0x7F) << 7 | (data[2] & 0x7F) << 14 | (data[3] & 0x7F) << 21 | data[4] << 28
    number = 0
    for byte in reversed(data):
        number = number << 7 | byte & 0x7F
    return number


def _unzigzag(data: bytes) -> int:
    number = _unvarint(data)
    return number >> 1 ^ -(number & 1)
