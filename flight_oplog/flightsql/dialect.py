"""The SQL this server speaks, as data: types, keywords, functions and conversions of DataFusion 55. Pure.

Clients ask for these to write SQL of their own, so each entry is something DataFusion does: a test plans or runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

# Types. Codes are those of XdbcDataType and XdbcDatetimeSubcode in FlightSql.proto.

_DATETIME, _INTERVAL = 9, 10
_SEARCHABLE_BASIC, _SEARCHABLE_FULL = 2, 3  # in every comparison but LIKE; in LIKE too
_LENGTH_MAX = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class SqlType:
    """A type and what GetXdbcTypeInfo says about it, one field a column, in the protocol's order."""

    type_name: str
    data_type: int | None = None  # None: no XDBC code stands for it, GetXdbcTypeInfo leaves it out
    column_size: int | None = None
    literal_prefix: str | None = None
    literal_suffix: str | None = None
    create_params: tuple[str, ...] | None = None
    nullable: int = 1
    case_sensitive: bool = False
    searchable: int = _SEARCHABLE_BASIC
    unsigned_attribute: bool | None = None
    fixed_prec_scale: bool = False  # said of types like money
    auto_increment: bool | None = None
    local_type_name: str | None = None
    minimum_scale: int | None = None
    maximum_scale: int | None = None
    sql_data_type: int | None = None
    datetime_subcode: int | None = None
    num_prec_radix: int | None = None
    interval_precision: int | None = None


def _number(name: str, code: int, size: int, radix: int = 10, **more: object) -> SqlType:
    words = {"unsigned_attribute": False, "auto_increment": False, "sql_data_type": code, "num_prec_radix": radix} | more
    return SqlType(type_name=name, data_type=code, column_size=size, **words)  # type: ignore[arg-type]


def _whole(name: str, code: int, size: int, unsigned: bool = False) -> SqlType:
    return _number(name, code, size, minimum_scale=0, maximum_scale=0, unsigned_attribute=unsigned)


def _bytes(name: str, code: int, prefix: str, **more: object) -> SqlType:
    words = {"literal_prefix": prefix, "literal_suffix": "'", "sql_data_type": code} | more
    return SqlType(type_name=name, data_type=code, column_size=_LENGTH_MAX, **words)  # type: ignore[arg-type]


def _text(name: str, code: int, *params: str) -> SqlType:
    return _bytes(name, code, "'", create_params=params or None, case_sensitive=True, searchable=_SEARCHABLE_FULL)


def _moment(name: str, code: int, size: int | None, subcode: int, **more: object) -> SqlType:
    words = {"literal_prefix": f"{name} '", "literal_suffix": "'", "sql_data_type": _DATETIME, "datetime_subcode": subcode} | more
    return SqlType(type_name=name, data_type=code, column_size=size, **words)  # type: ignore[arg-type]


# DataFusion's one name for bytes is BYTEA, whatever their length. It has a row for each code that drivers give such
# columns (JDBC one for each kind of column, ODBC always -2), so that a client finds what it looks up. Likewise FLOAT
# beside REAL: JDBC, ODBC and ADBC report columns of four-byte floats as 6, and TEXT: JDBC reports long strings as -1.
_ROWS = (
    SqlType(type_name="BOOLEAN", data_type=-7, column_size=1, sql_data_type=-7),
    _whole("TINYINT", -6, 3),
    _whole("TINYINT UNSIGNED", -6, 3, unsigned=True),
    _whole("BIGINT", -5, 19),
    _whole("BIGINT UNSIGNED", -5, 20, unsigned=True),
    _bytes("BYTEA", -4, "X'"),
    _bytes("BYTEA", -3, "X'"),
    _bytes("BYTEA", -2, "X'"),
    _text("TEXT", -1),
    _number("DECIMAL", 3, 76, create_params=("precision", "scale"), minimum_scale=0, maximum_scale=76),
    _whole("INTEGER", 4, 10),
    _whole("INTEGER UNSIGNED", 4, 10, unsigned=True),
    _whole("SMALLINT", 5, 5),
    _whole("SMALLINT UNSIGNED", 5, 5, unsigned=True),
    _number("FLOAT", 6, 24, radix=2),
    _number("REAL", 7, 24, radix=2),
    _number("DOUBLE", 8, 53, radix=2),
    # Months, days and nanoseconds at once: no subcode covers that. Its leading field is 32 bits of months.
    _moment("INTERVAL", 10, None, 0, sql_data_type=_INTERVAL, interval_precision=10),
    _text("VARCHAR", 12, "length"),
    _moment("DATE", 91, len("2026-01-01"), 1),
    _moment("TIME", 92, len("00:00:00.000000000"), 2, minimum_scale=0, maximum_scale=9),
    _moment("TIMESTAMP", 93, len("2026-01-01 00:00:00.000000000"), 3, create_params=("precision",), minimum_scale=0, maximum_scale=9),
    _moment("TIMESTAMP WITH TIME ZONE", 93, len("2026-01-01 00:00:00.000000000+00:00"), 5, minimum_scale=0, maximum_scale=9),
)
TYPES = tuple(sorted(_ROWS, key=lambda row: (row.data_type, row.type_name)))


def _row(name: str, code: int | None = None) -> SqlType:
    return next(row for row in TYPES if row.type_name == name and code in (None, row.data_type))


_OF_KIND = {
    **{pa.bool_(): _row("BOOLEAN"), pa.float16(): _row("FLOAT"), pa.float32(): _row("FLOAT"), pa.float64(): _row("DOUBLE")},
    **{pa.int8(): _row("TINYINT"), pa.int16(): _row("SMALLINT"), pa.int32(): _row("INTEGER"), pa.int64(): _row("BIGINT")},
    **{pa.uint8(): _row("TINYINT UNSIGNED"), pa.uint16(): _row("SMALLINT UNSIGNED")},
    **{pa.uint32(): _row("INTEGER UNSIGNED"), pa.uint64(): _row("BIGINT UNSIGNED")},
    **{pa.string(): _row("VARCHAR"), pa.string_view(): _row("VARCHAR"), pa.large_string(): _row("TEXT")},
    **{pa.binary(): _row("BYTEA", -3), pa.binary_view(): _row("BYTEA", -3), pa.large_binary(): _row("BYTEA", -4)},
    **{pa.month_day_nano_interval(): _row("INTERVAL"), pa.null(): SqlType(type_name="NULL")},
}
_OF_FAMILY: tuple[tuple[Callable[[pa.DataType], bool], SqlType], ...] = (
    (pa.types.is_decimal, _row("DECIMAL")),
    (pa.types.is_fixed_size_binary, _row("BYTEA", -2)),
    (pa.types.is_date, _row("DATE")),
    (pa.types.is_time, _row("TIME")),
    (lambda kind: pa.types.is_timestamp(kind) and kind.tz is None, _row("TIMESTAMP")),
    (pa.types.is_timestamp, _row("TIMESTAMP WITH TIME ZONE")),
    (pa.types.is_duration, SqlType(type_name="DURATION")),
    (pa.types.is_map, SqlType(type_name="MAP")),
    (pa.types.is_struct, SqlType(type_name="STRUCT")),
    (pa.types.is_nested, SqlType(type_name="ARRAY")),
)
_DIGITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}


def sql_type(kind: pa.DataType) -> SqlType:
    """Return the SQL type of a column of this Arrow type."""
    kind = _plain(kind)
    return _OF_KIND.get(kind) or next((found for fits, found in _OF_FAMILY if fits(kind)), SqlType(type_name="OTHER"))


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return what an extension type or an encoding stores."""
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _plain(kind.value_type)
    return kind


def precision_and_scale(kind: pa.DataType) -> tuple[int | None, int | None]:
    """Return how many digits, characters or bytes a value takes at most and how many digits follow its point.

    None where there is no such bound, and for floats: ODBC would read bits there, JDBC decimal digits.
    """
    kind = _plain(kind)
    if pa.types.is_decimal(kind):
        return kind.precision, kind.scale
    if pa.types.is_integer(kind):
        return sql_type(kind).column_size, 0
    if pa.types.is_boolean(kind) or pa.types.is_date(kind):
        return sql_type(kind).column_size, None
    if pa.types.is_fixed_size_binary(kind):
        return kind.byte_width, None
    if pa.types.is_time(kind) or pa.types.is_timestamp(kind):
        longest, digits = sql_type(kind).column_size or 0, _DIGITS[kind.unit]
        return longest - 9 + digits - (digits == 0), digits  # the point goes with the last digit
    return None, None


# Keywords that cannot be a name everywhere a name can stand unless they are quoted, SQL-92's own left out: it is those
# that clients do not know. In upper case, as JDBC and ODBC want them.
KEYWORDS = (
    *("ANALYZE", "ANTI", "ARRAY", "ASOF", "CLUSTER", "CUBE", "CURRENT_CATALOG", "DISTRIBUTE", "DIV", "EXCLUDE", "EXPLAIN", "FORMAT"),
    *("ILIKE", "LATERAL", "LIMIT", "LOCALTIME", "LOCALTIMESTAMP", "MATCH_CONDITION", "MATCH_RECOGNIZE", "MEMBER", "MINUS", "OFFSET"),
    *("OPERATOR", "PARTITION", "PIVOT", "PREWHERE", "QUALIFY", "RECURSIVE", "REGEXP", "RETURNING", "RLIKE", "ROLLUP", "SAMPLE", "SEMI"),
    *("SETTINGS", "SIMILAR", "SORT", "START", "STRUCT", "TABLESAMPLE", "TOP", "UNNEST", "UNPIVOT", "WINDOW", "XOR"),
)

# Scalar functions by JDBC's four kinds; in upper case, because ODBC knows them by that alone.
NUMERIC_FUNCTIONS = (
    *("ABS", "ACOS", "ACOSH", "ASIN", "ASINH", "ATAN", "ATAN2", "ATANH", "CBRT", "CEIL", "COS", "COSH", "COT", "DEGREES", "EXP"),
    *("FACTORIAL", "FLOOR", "GCD", "ISNAN", "ISZERO", "LCM", "LN", "LOG", "LOG10", "LOG2", "NANVL", "PI", "POW", "POWER", "RADIANS"),
    *("RAND", "RANDOM", "ROUND", "SIGNUM", "SIN", "SINH", "SQRT", "TAN", "TANH", "TRUNC"),
)
STRING_FUNCTIONS = (
    *("ASCII", "BIT_LENGTH", "BTRIM", "CHARACTER_LENGTH", "CHAR_LENGTH", "CHR", "CONCAT", "CONCAT_WS", "CONTAINS", "DECODE", "DIGEST"),
    *("ENCODE", "ENDS_WITH", "FIND_IN_SET", "INITCAP", "INSTR", "LEFT", "LENGTH", "LEVENSHTEIN", "LOWER", "LPAD", "LTRIM", "MD5"),
    *("OCTET_LENGTH", "OVERLAY", "POSITION", "REGEXP_COUNT", "REGEXP_INSTR", "REGEXP_LIKE", "REGEXP_MATCH", "REGEXP_REPLACE", "REPEAT"),
    *("REPLACE", "REVERSE", "RIGHT", "RPAD", "RTRIM", "SHA224", "SHA256", "SHA384", "SHA512", "SPLIT_PART", "STARTS_WITH"),
    *("STRING_TO_ARRAY", "STRPOS", "SUBSTR", "SUBSTRING", "SUBSTRING_INDEX", "SUBSTR_INDEX", "TO_HEX", "TRANSLATE", "TRIM", "UPPER"),
)
SYSTEM_FUNCTIONS = (
    *("ARROW_CAST", "ARROW_TRY_CAST", "ARROW_TYPEOF", "COALESCE", "GREATEST", "IFNULL", "LEAST", "NULLIF", "NVL", "NVL2", "UUID"),
    "VERSION",
)
DATETIME_FUNCTIONS = (
    *("CURRENT_DATE", "CURRENT_TIME", "CURRENT_TIMESTAMP", "DATEPART", "DATETRUNC", "DATE_BIN", "DATE_FORMAT", "DATE_PART", "DATE_TRUNC"),
    *("FROM_UNIXTIME", "MAKE_DATE", "MAKE_TIME", "NOW", "TODAY", "TO_CHAR", "TO_DATE", "TO_LOCAL_TIME", "TO_TIME", "TO_TIMESTAMP"),
    *("TO_TIMESTAMP_MICROS", "TO_TIMESTAMP_MILLIS", "TO_TIMESTAMP_NANOS", "TO_TIMESTAMP_SECONDS", "TO_UNIXTIME"),
)

# What CAST turns into what, by the numbers of SqlSupportsConvert. The two interval types of the standard are not SQL
# here; CHAR is VARCHAR, NUMERIC is DECIMAL, FLOAT is REAL, the binary types are one.
_BIGINT, _BIT, _DATE, _INTEGER, _SMALLINT, _TIME, _TIMESTAMP, _TINYINT = 0, 2, 4, 7, 14, 15, 16, 17
_BINARIES, _TEXTS, _DECIMALS, _FLOATS = (1, 10, 18), (3, 11, 19), (5, 12), (6, 13)
_WHOLES = (_BIGINT, _INTEGER, _SMALLINT, _TINYINT)
_FROM_WHOLE = (*_WHOLES, *_DECIMALS, *_FLOATS, *_TEXTS, *_BINARIES, _BIT, _TIMESTAMP)
_FROM_DECIMAL = (*_WHOLES, *_DECIMALS, *_FLOATS, *_TEXTS, _TIMESTAMP)
_FROM_TEXT = (*_FROM_WHOLE, _DATE, _TIME)
CONVERSIONS = {
    _BIGINT: (*_FROM_WHOLE, _DATE, _TIME),
    _INTEGER: (*_FROM_WHOLE, _DATE),
    _SMALLINT: _FROM_WHOLE,
    _TINYINT: _FROM_WHOLE,
    _BIT: (*_WHOLES, *_FLOATS, *_TEXTS, _BIT),
    _DATE: (_BIGINT, _INTEGER, *_TEXTS, _DATE, _TIMESTAMP),
    _TIME: (_BIGINT, *_TEXTS, _TIME),
    _TIMESTAMP: (*_WHOLES, *_DECIMALS, *_FLOATS, *_TEXTS, _DATE, _TIME, _TIMESTAMP),
    **dict.fromkeys(_DECIMALS, _FROM_DECIMAL),
    **dict.fromkeys(_FLOATS, (*_FROM_DECIMAL, _BIT)),
    **dict.fromkeys(_TEXTS, _FROM_TEXT),
    **dict.fromkeys(_BINARIES, (*_TEXTS, *_BINARIES)),
}
