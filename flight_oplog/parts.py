"""Where each column's bytes are in content, each with a digest of its own: so that a few columns can be read alone.

A column's buffers lie side by side in the body of each batch of an Arrow IPC stream: that is a part. So are the codes of a
column of texts, after the stream. What is no part is the frame: the schema, the batches' metadata and the end of the stream.
Every byte of content belongs to a part or to the frame, so all of them are checked, whichever are read.

The metadata of a message is a flatbuffer; what is read of it follows
https://github.com/apache/arrow/blob/main/format/Message.fbs.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import xxhash

from flight_oplog.codec import ALIGNED
from flight_oplog.codes import CodesOf, Name

# Content is read whole up to here, and where it has more parts than this.
PARTS_FROM_BYTES = 1 << 20
PARTS_MAX = 1024

_CONTINUATION = 0xFFFFFFFF
_RECORD_BATCH = 3  # of the union MessageHeader

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Part:
    """The bytes [start, end) of content, and their digest."""

    start: int
    end: int
    digest: str


@dataclass(frozen=True, slots=True)
class Parts:
    """All of a record's content: `size` bytes, the digest of its frame, and each column's parts, one for each batch."""

    size: int
    frame: str
    columns: dict[str, list[Part]]
    codes: dict[str, Part] = field(default_factory=dict)  # of columns of texts, after the stream

    @classmethod
    def of(cls, content: pa.Buffer, schema: pa.Schema, codes: dict[str, int] | None = None) -> Parts | None:
        """Return the parts of content that holds batches of `schema`; None where it is small, or they are too many.

        `codes` are the bytes of each column's codes, in the order that they come in.
        """
        spans = _located(content, schema) if content.size >= PARTS_FROM_BYTES else {}
        if not 0 < sum(map(len, spans.values())) <= PARTS_MAX:
            return None
        columns = {
            name: [Part(low, high, _digest([content.slice(low, high - low)])) for low, high in of_one] for name, of_one in spans.items()
        }
        coded: dict[str, Part] = {}
        start = content.size
        for name, size in reversed((codes or {}).items()):
            start = (start - size) // ALIGNED * ALIGNED  # as `codec.encode` puts them
            coded[name] = Part(start, start + size, _digest([content.slice(start, size)]))
        found = cls(content.size, "", columns, coded)
        return replace(found, frame=_digest(content.slice(low, high - low) for low, high in found.gaps()))

    @classmethod
    def read(cls, text: str) -> Parts:
        """Read what `written` wrote. Raises ValueError, TypeError or KeyError when it is nothing of the kind."""
        row = json.loads(text)
        columns = {name: [Part(*part) for part in parts] for name, parts in row["columns"].items()}
        found = cls(row["bytes"], row["frame"], columns, {name: Part(*part) for name, part in row.get("codes", {}).items()})
        ends = [0, *itertools.chain.from_iterable(found._edges()), found.size]
        if any(later < earlier for earlier, later in itertools.pairwise(ends)):
            raise ValueError("parts overlap")
        return found

    def written(self) -> str:
        row: dict[str, Any] = {"bytes": self.size, "frame": self.frame}
        row["columns"] = {name: [[part.start, part.end, part.digest] for part in parts] for name, parts in self.columns.items()}
        if self.codes:
            row["codes"] = {name: [part.start, part.end, part.digest] for name, part in self.codes.items()}
        return json.dumps(row, ensure_ascii=False, separators=(",", ":"))

    def _edges(self) -> list[Span]:
        return sorted((part.start, part.end) for part in itertools.chain(*self.columns.values(), self.codes.values()))

    def gaps(self) -> list[Span]:
        """Return the spans of the frame, in order."""
        edges = [0, *itertools.chain.from_iterable(self._edges()), self.size]
        return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if end > start]

    def _parts(self, name: Name) -> Sequence[Part]:
        return self.columns.get(name, ()) if isinstance(name, str) else [self.codes[name.column]] if name.column in self.codes else ()

    def spans(self, names: Sequence[Name], gap_max: int) -> list[Span]:
        """Return what has to be read for some columns, in order; spans that lie no farther apart than `gap_max` as one.

        The frame is not needed for codes alone.
        """
        frame = self.gaps() if _need_frame(names) else []
        wanted = sorted([*frame, *((part.start, part.end) for name in names for part in self._parts(name))])
        found: list[Span] = []
        for start, end in wanted:
            if found and start - found[-1][1] <= gap_max:
                found[-1] = (found[-1][0], end)
            elif end > start:
                found.append((start, end))
        return found

    def check(self, content: pa.Buffer, names: Sequence[Name] | None = None) -> bool:
        """Whether content's frame and the parts of some columns, or of all, are what they were when they were written."""
        if content.size != self.size:
            return False
        if _need_frame(names) and _digest(content.slice(start, end - start) for start, end in self.gaps()) != self.frame:
            return False
        looked_at: Sequence[Name] = [*self.columns, *map(CodesOf, self.codes)] if names is None else names
        parts = (part for name in looked_at for part in self._parts(name))
        return all(_digest([content.slice(part.start, part.end - part.start)]) == part.digest for part in parts)

    def codes_in(self, content: pa.Buffer, column: str) -> pa.Buffer | None:
        """Return the codes of a column as they were written; None where it has none."""
        part = self.codes.get(column)
        return None if part is None else content.slice(part.start, part.end - part.start)

    def fit(self, content: pa.Buffer, schema: pa.Schema) -> bool:
        """Whether the columns of content are where the parts say."""
        return {name: [(part.start, part.end) for part in parts] for name, parts in self.columns.items()} == _located(content, schema)


def _need_frame(names: Sequence[Name] | None) -> bool:
    return not names or any(isinstance(name, str) for name in names)


def stored_bytes(content: pa.Buffer, schema: pa.Schema) -> dict[str, int]:
    """Return how many bytes each column takes in content that holds batches of `schema`."""
    return {name: sum(end - start for start, end in spans) for name, spans in _located(content, schema).items()}


def _located(content: pa.Buffer, schema: pa.Schema) -> dict[str, list[Span]]:
    """Return where in content each column of a schema is, batch by batch."""
    firsts = [0, *itertools.accumulate(_buffers(field.type) for field in schema)]
    found: dict[str, list[Span]] = {field.name: [] for field in schema}
    for start, end, offsets in _bodies(content):
        edges = [start + offsets[first] if first < len(offsets) else end for first in firsts[:-1]]
        for spans, span in zip(found.values(), itertools.pairwise([*edges, end]), strict=True):
            spans.append(span)
    return found


def _digest(pieces: Iterable[pa.Buffer]) -> str:
    found = xxhash.xxh3_64()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()


def _buffers(kind: pa.DataType) -> int:
    """Return how many buffers a column of a stored type has in a batch, those of its children counted."""
    types = pa.types
    if types.is_null(kind):
        return 0
    children = sum(_buffers(kind.field(place).type) for place in range(kind.num_fields))
    if types.is_struct(kind) or types.is_fixed_size_list(kind):
        return 1 + children
    if types.is_string(kind) or types.is_binary(kind) or types.is_large_string(kind) or types.is_large_binary(kind):
        return 3
    return 2 + children


def _bodies(content: pa.Buffer) -> Iterator[tuple[int, int, Sequence[int]]]:
    """Yield start and end of each batch's body in content, and where in it each buffer begins."""
    view, place = memoryview(content), 0
    while place + 8 <= len(view):
        continuation, size = struct.unpack_from("<Ii", view, place)
        if continuation != _CONTINUATION or size == 0:
            return
        message = _Table.root(view, place + 8)
        start = place + 8 + size
        place = start + message.number(3, "q")
        if message.number(1, "B") == _RECORD_BATCH:
            at, count = message.table(2).vector(2)
            buffers = struct.unpack_from(f"<{2 * count}q", view, at)
            yield start, place, buffers[::2]


@dataclass(frozen=True, slots=True)
class _Table:
    """A table of a flatbuffer, whose fields are numbered as its schema lists them."""

    view: memoryview
    at: int

    @classmethod
    def root(cls, view: memoryview, at: int) -> _Table:
        return cls(view, at + struct.unpack_from("<I", view, at)[0])

    def _field(self, number: int) -> int | None:
        table = self.at - struct.unpack_from("<i", self.view, self.at)[0]
        size = struct.unpack_from("<H", self.view, table)[0]
        offset = struct.unpack_from("<H", self.view, table + 4 + 2 * number)[0] if 4 + 2 * number < size else 0
        return self.at + offset if offset else None

    def number(self, field: int, kind: str) -> int:
        at = self._field(field)
        return 0 if at is None else int(struct.unpack_from(f"<{kind}", self.view, at)[0])

    def table(self, field: int) -> _Table:
        at = self._field(field)
        assert at is not None, "a message has a header"
        return _Table.root(self.view, at)

    def vector(self, field: int) -> tuple[int, int]:
        """Return where a vector's items are, and how many."""
        at = self._field(field)
        if at is None:
            return 0, 0
        at += struct.unpack_from("<I", self.view, at)[0]
        return at + 4, struct.unpack_from("<I", self.view, at)[0]
