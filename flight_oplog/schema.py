"""The format in code: what a record's row looks like, which names and types entries may have, how a topic evolves.

Entries keep the client's columns, but one meaning has one type on disk (FORMAT.md, "Entries"): dictionaries, views,
list-views and run-ends are layouts, not types, and are stored as the plain type; every field is nullable, because the
next writer may leave it out. So two schemas are the same schema exactly when their normal forms are equal.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import zoneinfo

import pyarrow as pa

from flight_oplog.errors import RequestError, SchemaMismatch

FORMAT_VERSION = 1
SCHEMAS_TOPIC = "_schemas"
TOPIC_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)
COLUMN_NAME_BYTES_MAX = 255
NESTING_MAX = 32
# SQL shows these beside the entries' own columns in `log.<topic>`.
RESERVED_COLUMNS = ("_offset", "_timestamp", "_producer", "_sequence", "_schema_id")

_TIME = pa.timestamp("us", "UTC")

APPENDS = pa.list_(
    pa.field(
        "element",
        pa.struct(
            [
                ("entries", pa.int64()),
                ("timestamp", _TIME),
                ("producer", pa.string()),
                ("epoch", pa.int64()),
                ("sequence", pa.int64()),
                ("principal", pa.string()),
            ]
        ),
    )
)

RECORD_SCHEMA = pa.schema(
    [
        pa.field("topic", pa.string(), nullable=False),
        pa.field("first_offset", pa.int64(), nullable=False),
        pa.field("entries", pa.int64(), nullable=False),
        pa.field("schema_id", pa.string(), nullable=False),
        pa.field("appends", APPENDS, nullable=False),
        pa.field("min_time", _TIME),
        pa.field("max_time", _TIME),
        pa.field("bounds", pa.string()),
        pa.field("digest", pa.string(), nullable=False),
        pa.field("parts", pa.string()),
        pa.field("filters", pa.binary()),
        pa.field("content", pa.binary(), nullable=False),
    ]
)

# Entries of the topic `_schemas`: which schema a `schema_id` stands for.
SCHEMAS_SCHEMA = pa.schema(
    [
        ("topic", pa.string()),
        ("schema_id", pa.string()),
        ("number", pa.int64()),
        ("schema", pa.binary()),
        ("first_seen", _TIME),
    ]
)

# In the metadata of a registered schema: a JSON list of the columns that are the topic's keys.
KEYS_METADATA = b"oplog.keys"

VIEWS_TOPIC = "_views"
# One entry for each CREATE VIEW and DROP VIEW: a view's newest entry counts, and one without a definition ends it.
VIEWS_SCHEMA = pa.schema([("view", pa.string()), ("definition", pa.string()), ("defined", _TIME)])


def check_topic(name: str) -> str:
    """Return `name` when a client may append to it; raise RequestError otherwise."""
    if not TOPIC_PATTERN.fullmatch(name):
        raise RequestError(f"topic {name[:200]!r} is not a topic name: a letter, then letters, digits and _, at most 128")
    if name.startswith("_"):
        raise RequestError(f"topic {name!r} is reserved: names that begin with _ belong to the log itself")
    return name


def schema_id(schema: pa.Schema) -> str:
    """Fingerprint of a normal schema: 32 hex digits of the SHA-256 of its IPC schema message."""
    return hashlib.sha256(schema.serialize().to_pybytes()).hexdigest()[:32]


# Normal form


def normal_schema(schema: pa.Schema, columns_max: int = 2000) -> pa.Schema:
    """Return the normal form of a client's schema: plain types, all nullable, no metadata but Arrow extension names.

    Raises RequestError for no columns, a repeated or reserved name, too many fields or nesting deeper than 32.
    """
    try:
        names = schema.names
    except UnicodeDecodeError:
        raise RequestError("a column's name is not UTF-8 text") from None
    if not names:
        raise RequestError("the schema has no columns: send at least one")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise RequestError(f"column {name!r} appears twice: SQL could not tell them apart")
        if name in RESERVED_COLUMNS:
            raise RequestError(f"column {name!r} is reserved: the log adds {', '.join(RESERVED_COLUMNS)} itself")
        if not name or len(name.encode()) > COLUMN_NAME_BYTES_MAX or "\0" in name:
            raise RequestError(f"column {name[:80]!r}: a name has 1 to {COLUMN_NAME_BYTES_MAX} bytes, none of them NUL")
        seen.add(name)
    normal = pa.schema([plain_field(field, 1) for field in schema])
    if (fields := sum(_count(field.type) for field in normal)) > columns_max:
        raise RequestError(f"the schema has {fields} fields, nested ones counted; columns_max is {columns_max}")
    return normal


def plain_field(field: pa.Field, depth: int = 1) -> pa.Field:
    """Return the normal form of one field."""
    if depth > NESTING_MAX:
        raise RequestError(f"column types may nest {NESTING_MAX} deep")
    try:
        kind, metadata, _ = field.type, field.metadata or {}, field.name
    except UnicodeDecodeError:
        raise RequestError("a nested field's name is not UTF-8 text") from None
    if isinstance(kind, pa.BaseExtensionType):
        kind, metadata = kind.storage_type, _exported_metadata(field)
    metadata = {key: value for key, value in metadata.items() if key.startswith(b"ARROW:extension:")}
    return pa.field(field.name, _normal_type(kind, depth), metadata=metadata or None)


class _ArrowSchema(ctypes.Structure):
    """The head of struct ArrowSchema of the Arrow C data interface."""

    _fields_ = (("format", ctypes.c_char_p), ("name", ctypes.c_char_p), ("metadata", ctypes.c_void_p))


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


def _exported_metadata(field: pa.Field) -> dict[bytes, bytes]:
    """Return a field's metadata as it leaves pyarrow, extension name and parameters included.

    pyarrow shows the parameters of its built-in extension types (uuid, opaque, …) nowhere in Python; the C data
    interface carries them: a count, then a length and the bytes of each key and each value.
    """
    capsule = field.__arrow_c_schema__()
    place = _ArrowSchema.from_address(_capsule_pointer(capsule, b"arrow_schema")).metadata

    def number() -> int:
        nonlocal place
        value = ctypes.c_int32.from_address(place).value
        place += 4
        return value

    def text() -> bytes:
        nonlocal place
        length = number()
        value = ctypes.string_at(place, length)
        place += length
        return value

    return {text(): text() for _ in range(number())} if place else {}


def _normal_type(kind: pa.DataType, depth: int) -> pa.DataType:
    def child(field: pa.Field) -> pa.Field:
        return plain_field(field, depth + 1)

    types = pa.types
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return plain_field(pa.field("", kind.value_type), depth + 1).type
    if types.is_timestamp(kind):
        _check_zone(kind)
        return kind
    if types.is_string_view(kind):
        return pa.string()
    if types.is_binary_view(kind):
        return pa.binary()
    if types.is_decimal32(kind) or types.is_decimal64(kind):
        return pa.decimal128(kind.precision, kind.scale)
    if types.is_list(kind) or types.is_list_view(kind):
        return pa.list_(child(kind.value_field).with_name("item"))
    if types.is_large_list(kind) or types.is_large_list_view(kind):
        return pa.large_list(child(kind.value_field).with_name("item"))
    if types.is_fixed_size_list(kind):
        return pa.list_(child(kind.value_field).with_name("item"), kind.list_size)
    if types.is_struct(kind):
        fields = [child(field) for field in kind]
        if len({field.name for field in fields}) != len(fields):
            raise RequestError("a struct has two fields of one name: SQL could not tell them apart")
        return pa.struct(fields)
    if types.is_map(kind):
        return pa.map_(child(kind.key_field).with_name("key").with_nullable(False), child(kind.item_field).with_name("value"))
    if types.is_union(kind):
        raise RequestError(f"type {kind} cannot be stored: send a struct with one field per case")
    return kind


def first_time(schema: pa.Schema) -> str | None:
    """Return the first top-level timestamp column."""
    return next((field.name for field in schema if pa.types.is_timestamp(field.type)), None)


def _check_zone(kind: pa.DataType) -> None:
    """Refuse a time zone that readers could not resolve: one such column would break every listing of columns."""
    try:
        zone = kind.tz
        if zone is not None and not _ZONE_OFFSET.fullmatch(zone):
            zoneinfo.ZoneInfo(zone)
    except (UnicodeDecodeError, ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
        raise RequestError("a timestamp's time zone is neither a known name nor an offset like +01:00") from None


_ZONE_OFFSET = re.compile(r"[+-](0\d|1[0-4]):?[0-5]\d", re.ASCII)


def _count(kind: pa.DataType) -> int:
    return 1 + sum(_count(kind.field(i).type) for i in range(kind.num_fields))


# Evolution


def evolve(topic: str, current: pa.Schema | None, incoming: pa.Schema, rule: str, columns_max: int = 1 << 40) -> pa.Schema:
    """Return the topic's schema after an append with `incoming`; both are normal, `current` is None for a new topic.

    `additive`: new columns are added at the end, types widen exactly, missing columns read as null, order does not
    matter. `strict`: the first schema is the only one. The result holds every value of both sides exactly.

    Raises SchemaMismatch naming the column, both types and the rule.
    """
    if current is None:
        return incoming
    merged = list(current)
    places = {field.name: place for place, field in enumerate(current)}
    for field in incoming:
        place = places.get(field.name)
        if place is None:
            if rule == "strict":
                raise SchemaMismatch(
                    f"topic {topic!r}: column {field.name!r} ({field.type}) is not in the topic; "
                    "the strict rule allows no new columns; nothing was written"
                )
            merged.append(field)
            continue
        mine = merged[place]
        joined = _join_field(mine, field)
        if joined is None or (rule == "strict" and field.type != mine.type):
            raise SchemaMismatch(
                f"topic {topic!r}: column {field.name!r} is {_describe(mine)} in the topic and {_describe(field)} in this append; "
                f"{_RULES[rule]}; nothing was written"
            )
        merged[place] = joined
    if (fields := sum(_count(field.type) for field in merged)) > columns_max:
        raise SchemaMismatch(
            f"topic {topic!r} would have {fields} fields, nested ones counted; columns_max is {columns_max}; nothing was written"
        )
    if rule == "strict" and len(incoming) < len(current):
        missing = next(field for field in current if field.name not in incoming.names)
        raise SchemaMismatch(
            f"topic {topic!r}: column {missing.name!r} ({missing.type}) is missing from this append; "
            "the strict rule wants every column; nothing was written"
        )
    return pa.schema(merged)


_RULES = {
    "additive": "the additive rule allows only widening that keeps every value exact",
    "strict": "the strict rule allows no change of type",
}


def _describe(field: pa.Field) -> str:
    name = (field.metadata or {}).get(b"ARROW:extension:name")
    return f"{field.type} ({name.decode()})" if name else str(field.type)


def _join_child(mine: pa.Field, other: pa.Field) -> pa.Field | None:
    """Join fields inside a nested type. Time units are not rescaled there: no bounds tell whether old values would fit."""
    if pa.types.is_timestamp(mine.type) and pa.types.is_timestamp(other.type) and mine.type != other.type:
        return None
    return _join_field(mine, other)


def _join_field(mine: pa.Field, other: pa.Field) -> pa.Field | None:
    if mine.metadata != other.metadata and not (pa.types.is_null(mine.type) or pa.types.is_null(other.type)):
        return None
    joined = join_types(mine.type, other.type)
    return None if joined is None else pa.field(mine.name, joined, metadata=mine.metadata or other.metadata)


def join_types(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """Return the least type that holds every value of `a` and of `b` exactly, or None when there is none."""
    types = pa.types
    if a.equals(b, check_metadata=True) or types.is_null(b):
        return a
    if types.is_null(a):
        return b
    if (numeric := _join_numbers(a, b)) is not None:
        return numeric
    if types.is_timestamp(a) and types.is_timestamp(b) and a.tz == b.tz:
        return max(a, b, key=lambda kind: ("s", "ms", "us", "ns").index(kind.unit))
    if types.is_decimal(a) and types.is_decimal(b):
        return _join_decimals(a, b)
    if {a, b} == {pa.string(), pa.large_string()}:
        return pa.large_string()
    if {a, b} == {pa.binary(), pa.large_binary()}:
        return pa.large_binary()
    return _join_nested(a, b)


def _join_numbers(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """Integers widen to the least integer that holds both; an integer joins a float only when the float is exact for it."""
    types = pa.types
    if types.is_integer(a) and types.is_integer(b):
        signed = types.is_signed_integer(a) or types.is_signed_integer(b)
        bits = max(2 * kind.bit_width if signed and types.is_unsigned_integer(kind) else kind.bit_width for kind in (a, b))
        return {(True, 8): pa.int8(), (True, 16): pa.int16(), (True, 32): pa.int32(), (True, 64): pa.int64(),
                (False, 16): pa.uint16(), (False, 32): pa.uint32(), (False, 64): pa.uint64()}.get((signed, bits))  # fmt: skip
    if (types.is_floating(a) or types.is_integer(a)) and (types.is_floating(b) or types.is_integer(b)):
        needed = max(_significant_bits(a), _significant_bits(b))
        return next((kind for bits, kind in ((11, pa.float16()), (24, pa.float32()), (53, pa.float64())) if needed <= bits), None)
    return None


def _significant_bits(kind: pa.DataType) -> int:
    if pa.types.is_floating(kind):
        return {16: 11, 32: 24, 64: 53}[kind.bit_width]
    return kind.bit_width - (1 if pa.types.is_signed_integer(kind) else 0)


def _join_decimals(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    scale = max(a.scale, b.scale)
    precision = max(a.precision - a.scale, b.precision - b.scale) + scale
    if precision <= 38 and pa.types.is_decimal128(a) and pa.types.is_decimal128(b):
        return pa.decimal128(precision, scale)
    return pa.decimal256(precision, scale) if precision <= 76 else None


def _join_nested(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    types = pa.types
    if types.is_list(a) and types.is_list(b):
        item = _join_child(a.value_field, b.value_field)
        return None if item is None else pa.list_(item)
    if types.is_large_list(a) and types.is_large_list(b):
        item = _join_child(a.value_field, b.value_field)
        return None if item is None else pa.large_list(item)
    if types.is_fixed_size_list(a) and types.is_fixed_size_list(b) and a.list_size == b.list_size:
        item = _join_child(a.value_field, b.value_field)
        return None if item is None else pa.list_(item, a.list_size)
    if types.is_map(a) and types.is_map(b) and a.key_type == b.key_type:
        item = _join_child(a.item_field, b.item_field)
        return None if item is None else pa.map_(a.key_field, item)
    if types.is_struct(a) and types.is_struct(b):
        return _join_structs(a, b)
    return None


def _join_structs(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    fields = {field.name: field for field in a}
    for field in b:
        joined = _join_child(fields[field.name], field) if field.name in fields else field
        if joined is None:
            return None
        fields[field.name] = joined
    return pa.struct(list(fields.values()))
