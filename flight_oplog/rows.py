"""Rows of the outer table as pages of a data file, and the only row of a small file back."""

from __future__ import annotations

import datetime
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from flight_oplog import codec, parquet
from flight_oplog.schema import APPENDS, FORMAT_VERSION, RECORD_SCHEMA

CREATED_BY = f"flight_oplog version {FORMAT_VERSION} (build format_version {FORMAT_VERSION})"
FILE_SCHEMA = pa.schema([f for f in RECORD_SCHEMA if f.name != "topic"])

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True, slots=True)
class Record:
    """One row of the outer table, before it is written. `first_offset` counts from the file's first entry."""

    entries: int
    schema_id: str
    appends: list[dict[str, Any]]
    bounds: codec.Bounds
    min_time: datetime.datetime | None
    max_time: datetime.datetime | None
    digest: str
    parts: str | None
    filters: bytes | None
    content: pa.Buffer


SHAPE = parquet.shape_of(FILE_SCHEMA)


def columns(records: Sequence[Record], offsets: Sequence[int]) -> list[parquet.Values]:
    """Return the leaf columns of a row group of `records`, in the order of the file's schema."""
    rows = len(records)
    owners = [owner for record in records for owner in record.appends]
    starts = [place > 0 for record in records for place in range(len(record.appends))]
    repetition = parquet.levels(starts, 1)

    def plain(data: bytes, compress: bool = False) -> parquet.Values:
        return parquet.Values(rows, [data], compress=compress)

    def optional(values: Sequence[str | None]) -> parquet.Values:
        known = [value for value in values if value is not None]
        return parquet.Values(rows, [parquet.texts(known)], parquet.levels([value is not None for value in values], 1), compress=True)

    def times(values: Sequence[datetime.datetime | None]) -> parquet.Values:
        known = [microseconds(time) for time in values if time is not None]
        return parquet.Values(rows, [parquet.int64s(known)], parquet.levels([time is not None for time in values], 1))

    def of_owners(child: pa.Field) -> parquet.Values:
        values = [owner.get(child.name) for owner in owners]
        known: list[Any] = [microseconds(value) if pa.types.is_timestamp(child.type) else value for value in values if value is not None]
        data = parquet.texts(known) if pa.types.is_string(child.type) else parquet.int64s(known)
        present = parquet.levels([2 if value is None else 3 for value in values], 3)
        return parquet.Values(len(owners), [data], repetition + present, compress=True)

    def filters() -> parquet.Values:
        present = [record.filters for record in records if record.filters is not None]
        parts = [part for each in present for part in (len(each).to_bytes(4, "little"), each)]
        return parquet.Values(rows, parts, parquet.levels([record.filters is not None for record in records], 1))

    contents = [part for record in records for part in (record.content.size.to_bytes(4, "little"), record.content)]
    return [
        parquet.Values(rows, [parquet.int64s(offsets)], checked=False),  # `StagedFile.finish` changes them
        plain(parquet.int64s(record.entries for record in records)),
        plain(parquet.texts(record.schema_id for record in records), compress=True),
        *(of_owners(child) for child in APPENDS.value_type),
        times([record.min_time for record in records]),
        times([record.max_time for record in records]),
        optional([codec.bounds_json(record.bounds) for record in records]),
        plain(parquet.texts(record.digest for record in records)),
        optional([record.parts for record in records]),
        filters(),
        parquet.Values(rows, contents, checked=False),  # each has its digest
    ]


def microseconds(time: datetime.datetime) -> int:
    return (time - _EPOCH) // datetime.timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A column of a file: where its values belong, the level of those that are not null, and what they are of their bytes."""

    name: str
    is_of_appends: bool
    level: int
    values_in: Callable[[bytes], Iterable[Any]]


def _leaf(path: Sequence[str]) -> _Leaf:
    is_of_appends = path[0] == "appends"
    field: pa.Field = APPENDS.value_type.field(path[-1]) if is_of_appends else FILE_SCHEMA.field(path[0])
    values_in: Callable[[bytes], Iterable[Any]] = parquet.texts_in if pa.types.is_string(field.type) else parquet.int64s_in
    if pa.types.is_timestamp(field.type):
        values_in = _times_in
    return _Leaf(field.name, is_of_appends, 3 if is_of_appends else int(field.nullable), values_in)


def _times_in(data: bytes) -> list[datetime.datetime]:
    return [_EPOCH + datetime.timedelta(microseconds=value) for value in parquet.int64s_in(data)]


_LEAVES = [_leaf(leaf.path) for leaf in SHAPE.leaves if leaf.path[0] not in ("filters", "content")]


def only_row_of(file: bytes) -> tuple[dict[str, Any], tuple[int, int]] | None:
    """Return the row of a whole file that has one, without filters and content, and where its content's chunk is.

    None of a file that is not as `columns` and `parquet.Writer` make it, or damaged: a general reader says what it is.
    """
    try:
        pages = parquet.pages_of(file, SHAPE, CREATED_BY)
        if pages is None:
            return None
        row: dict[str, Any] = {}
        owners: list[dict[str, Any]] | None = None
        for leaf, page in zip(_LEAVES, pages, strict=False):
            values = _values(leaf, page)
            if leaf.is_of_appends:
                owners = owners or [{} for _ in range(page.count)]
                for owner, value in zip(owners, values, strict=True):
                    owner[leaf.name] = value
            else:
                [row[leaf.name]] = values
        return row | {"appends": owners}, pages[-1].span
    except (ValueError, IndexError, StopIteration, RuntimeError, OverflowError, struct.error, pa.ArrowException, OSError):
        return None


def _values(leaf: _Leaf, page: parquet.Page) -> list[Any]:
    place, present = 0, [leaf.level] * page.count
    if leaf.is_of_appends:  # where each row's begin comes first
        _, place = parquet.levels_in(page.data, page.count)
    if leaf.level:
        present, place = parquet.levels_in(page.data, page.count, place)
    found = iter(leaf.values_in(page.data[place:]))
    values = [next(found) if level == leaf.level else None for level in present]
    if next(found, None) is not None:
        raise ValueError("a page has more values than it says")
    return values
