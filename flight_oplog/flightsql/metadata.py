"""Results with schemas the protocol fixes: catalogs, schemas, tables, table types, keys, type info, SqlInfo.

Types and nullability are those of the reference implementations, field for field: Go's driver compares them exactly.
Where the comments of FlightSql.proto say otherwise (the order of a primary key's columns, the legs of SqlInfo's union),
the implementations agree with each other and clients are built on them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa

from flight_oplog.flightsql import dialect
from flight_oplog.flightsql.wire import CommandGetDbSchemas, CommandGetSqlInfo, CommandGetTables, CommandGetXdbcTypeInfo
from flight_oplog.schema import COLUMN_NAME_BYTES_MAX
from flight_oplog.sql.refusals import CATALOG, PUBLIC

CATALOGS = pa.schema([pa.field("catalog_name", pa.string(), nullable=False)])
DB_SCHEMAS = pa.schema([pa.field("catalog_name", pa.string()), pa.field("db_schema_name", pa.string(), nullable=False)])
TABLES = pa.schema(
    [
        pa.field("catalog_name", pa.string()),
        pa.field("db_schema_name", pa.string()),
        pa.field("table_name", pa.string(), nullable=False),
        pa.field("table_type", pa.string(), nullable=False),
    ]
)
TABLES_WITH_SCHEMA = TABLES.append(pa.field("table_schema", pa.binary(), nullable=False))
TABLE_TYPES = pa.schema([pa.field("table_type", pa.string(), nullable=False)])

PRIMARY_KEYS = pa.schema(
    [
        pa.field("catalog_name", pa.string()),
        pa.field("db_schema_name", pa.string()),
        pa.field("table_name", pa.string(), nullable=False),
        pa.field("column_name", pa.string(), nullable=False),
        pa.field("key_sequence", pa.int32(), nullable=False),
        pa.field("key_name", pa.string()),
    ]
)
FOREIGN_KEYS = pa.schema(
    [
        pa.field("pk_catalog_name", pa.string()),
        pa.field("pk_db_schema_name", pa.string()),
        pa.field("pk_table_name", pa.string(), nullable=False),
        pa.field("pk_column_name", pa.string(), nullable=False),
        pa.field("fk_catalog_name", pa.string()),
        pa.field("fk_db_schema_name", pa.string()),
        pa.field("fk_table_name", pa.string(), nullable=False),
        pa.field("fk_column_name", pa.string(), nullable=False),
        pa.field("key_sequence", pa.int32(), nullable=False),
        pa.field("fk_key_name", pa.string()),
        pa.field("pk_key_name", pa.string()),
        pa.field("update_rule", pa.uint8(), nullable=False),
        pa.field("delete_rule", pa.uint8(), nullable=False),
    ]
)
XDBC_TYPE_INFO = pa.schema(
    [
        pa.field("type_name", pa.string(), nullable=False),
        pa.field("data_type", pa.int32(), nullable=False),
        pa.field("column_size", pa.int32()),
        pa.field("literal_prefix", pa.string()),
        pa.field("literal_suffix", pa.string()),
        pa.field("create_params", pa.list_(pa.field("item", pa.string(), nullable=False))),
        pa.field("nullable", pa.int32(), nullable=False),
        pa.field("case_sensitive", pa.bool_(), nullable=False),
        pa.field("searchable", pa.int32(), nullable=False),
        pa.field("unsigned_attribute", pa.bool_()),
        pa.field("fixed_prec_scale", pa.bool_(), nullable=False),
        pa.field("auto_increment", pa.bool_()),
        pa.field("local_type_name", pa.string()),
        pa.field("minimum_scale", pa.int32()),
        pa.field("maximum_scale", pa.int32()),
        pa.field("sql_data_type", pa.int32(), nullable=False),
        pa.field("datetime_subcode", pa.int32()),
        pa.field("num_prec_radix", pa.int32()),
        pa.field("interval_precision", pa.int32()),
    ]
)

_INFO_VALUE = pa.dense_union(
    [
        pa.field("string_value", pa.string(), nullable=False),
        pa.field("bool_value", pa.bool_(), nullable=False),
        pa.field("bigint_value", pa.int64(), nullable=False),
        pa.field("int32_bitmask", pa.int32(), nullable=False),
        pa.field("string_list", pa.list_(pa.string()), nullable=False),
        pa.field("int32_to_int32_list_map", pa.map_(pa.int32(), pa.list_(pa.int32())), nullable=False),
    ],
    type_codes=[0, 1, 2, 3, 4, 5],
)
SQL_INFO = pa.schema([pa.field("info_name", pa.uint32(), nullable=False), pa.field("value", _INFO_VALUE, nullable=False)])

# The types a table can have here, in the order the protocol wants, and the names clients use for them.
_TYPE_NAMES = {"SYSTEM TABLE": {"system table"}, "TABLE": {"table", "base table"}, "VIEW": {"view"}}

_TABLE_NAME_LENGTH_MAX = 128  # what TOPIC_PATTERN allows

Names = Iterable[tuple[str, str, str]]


def catalogs() -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([{"catalog_name": CATALOG}], CATALOGS)


def table_types() -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([{"table_type": name} for name in _TYPE_NAMES], TABLE_TYPES)


def db_schemas(command: CommandGetDbSchemas, names: Iterable[str]) -> pa.RecordBatch:
    rows: list[dict[str, Any]] = []
    if _is_our_catalog(command.catalog):
        wanted = like(command.db_schema_filter_pattern)
        rows = [{"catalog_name": CATALOG, "db_schema_name": name} for name in sorted(names) if wanted(name)]
    return pa.RecordBatch.from_pylist(rows, DB_SCHEMAS)


def tables(command: CommandGetTables, names: Names, schema_of: Callable[[str, str], pa.Schema]) -> pa.RecordBatch:
    """Return the tables a GetTables command asks for; `names` yields (db_schema, table, type).

    They keep the order of `names`, which begins with the default schema: ADBC's get_table_schema takes the first match.
    """
    rows: list[dict[str, Any]] = []
    types = {kind.lower() for kind in command.table_types}
    of_schema, of_name = like(command.db_schema_filter_pattern), like(command.table_name_filter_pattern)
    for db_schema, name, kind in names if _is_our_catalog(command.catalog) else ():
        if not (of_schema(db_schema) and of_name(name)) or (types and not types & _TYPE_NAMES[kind]):
            continue
        row = {"catalog_name": CATALOG, "db_schema_name": db_schema, "table_name": name, "table_type": kind}
        if command.include_schema:
            read_only = kind != "TABLE" or db_schema != PUBLIC
            row["table_schema"] = described(schema_of(db_schema, name), db_schema, name, read_only).serialize().to_pybytes()
        rows.append(row)
    return pa.RecordBatch.from_pylist(rows, TABLES_WITH_SCHEMA if command.include_schema else TABLES)


def described(schema: pa.Schema, db_schema: str, table: str, read_only: bool) -> pa.Schema:
    """Return a table's schema with what JDBC, ODBC and ADBC read about each column in its field's metadata.

    Metadata that is there stays. The key of the SQL schema is the implementations' one, not the one of the proto's comment.
    """

    def described_field(field: pa.Field) -> pa.Field:
        sql = dialect.sql_type(field.type)
        words = {
            **{"CATALOG_NAME": CATALOG, "SCHEMA_NAME": db_schema, "TABLE_NAME": table, "TYPE_NAME": sql.type_name},
            **_digits(field.type),
            **{"IS_AUTO_INCREMENT": "0", "IS_CASE_SENSITIVE": str(int(sql.case_sensitive))},
            **{"IS_READ_ONLY": str(int(read_only)), "IS_SEARCHABLE": "1"},
        }
        return _with_words(field, words)

    return pa.schema([described_field(field) for field in schema], schema.metadata)


def described_result(schema: pa.Schema) -> pa.Schema:
    """Return a query's schema with the digits of its decimals, which JDBC reads in field metadata alone."""
    if not any(map(pa.types.is_decimal, schema.types)):
        return schema
    return pa.schema([_with_words(f, _digits(f.type)) if pa.types.is_decimal(f.type) else f for f in schema], schema.metadata)


def _digits(kind: pa.DataType) -> dict[str, str]:
    precision, scale = dialect.precision_and_scale(kind)
    return {key: str(number) for key, number in (("PRECISION", precision), ("SCALE", scale)) if number is not None}


def _with_words(field: pa.Field, words: dict[str, str]) -> pa.Field:
    ours = {f"ARROW:FLIGHT:SQL:{key}".encode(): word.encode() for key, word in words.items()}
    return field.with_metadata({**(field.metadata or {}), **ours})


def _is_our_catalog(catalog: str | None) -> bool:
    return catalog is None or catalog == CATALOG


def like(pattern: str | None) -> Callable[[str], bool]:
    """Return a test for a SQL LIKE pattern: % any run, _ any one character, \\ takes the next one as it is."""
    if pattern is None:
        return lambda name: True
    # Each % begins a new piece. All pieces but the first may start anywhere, so the leftmost fit of each is enough:
    # no backtracking, whatever pattern a client sends.
    pieces: list[list[str | None]] = [[]]
    for part in re.findall(r"\\.|.", pattern, re.DOTALL):
        if part == "%":
            pieces.append([])
        else:
            pieces[-1].append(None if part == "_" else part[-1])
    return lambda name: _fits(pieces, name)


def _fits(pieces: list[list[str | None]], name: str) -> bool:
    def here(piece: list[str | None], place: int) -> bool:
        found = name[place : place + len(piece)]
        return len(found) == len(piece) and all(wanted in (None, got) for wanted, got in zip(piece, found, strict=True))

    first, *middle = pieces
    if not middle:
        return len(first) == len(name) and here(first, 0)
    last = middle.pop()
    place = len(first)
    if not here(first, 0):
        return False
    for piece in middle:
        found = next((start for start in range(place, len(name) - len(piece) + 1) if here(piece, start)), None)
        if found is None:
            return False
        place = found + len(piece)
    return len(name) - len(last) >= place and here(last, len(name) - len(last))


def primary_keys() -> pa.RecordBatch:
    """Return no keys: an entry is known by its offset, which no table declares."""
    return pa.RecordBatch.from_pylist([], PRIMARY_KEYS)


def foreign_keys() -> pa.RecordBatch:
    """Return no keys; the answer to GetImportedKeys, GetExportedKeys and GetCrossReference alike."""
    return pa.RecordBatch.from_pylist([], FOREIGN_KEYS)


def xdbc_type_info(command: CommandGetXdbcTypeInfo) -> pa.RecordBatch:
    """Return the SQL types by code and name, or those of one code. ODBC reads the columns by their places."""
    wanted = [row for row in dialect.TYPES if command.data_type in (None, row.data_type)]
    return pa.RecordBatch.from_pylist([dataclasses.asdict(row) for row in wanted], XDBC_TYPE_INFO)


def sql_info(
    command: CommandGetSqlInfo,
    server_version: str,
    transaction_seconds: int,
    *,
    ticket_seconds: int = 0,
    sql_bytes: int = 0,
    sql_tables: int = 0,
    columns: int = 0,
) -> pa.RecordBatch:
    """Return the codes asked for, once each, all of them when none are named; unknown codes are left out.

    The numbers are the limits in force; to a client, 0 means that there is none or that it is not known.
    """
    values = _sql_info_values(server_version)
    values |= {code: (3, min(seconds * 1000, (1 << 31) - 1)) for code, seconds in ((100, ticket_seconds), (101, transaction_seconds))}
    # ODBC cuts limits to 16 bits, but for the length of a statement.
    values |= {code: (2, min(limit, 0xFFFF)) for code, limit in ((548, columns), (560, sql_tables))} | {557: (2, sql_bytes)}
    codes = [code for code in (dict.fromkeys(command.info) or sorted(values)) if code in values]
    children: list[list[Any]] = [[] for _ in range(6)]
    types, offsets = [], []
    for code in codes:
        leg, value = values[code]
        types.append(leg)
        offsets.append(len(children[leg]))
        children[leg].append(value)
    arrays = [pa.array(child, _INFO_VALUE.field(leg).type) for leg, child in enumerate(children)]
    # from_dense would rename the legs and make them nullable; the buffers say exactly what the protocol wants.
    buffers = [None, pa.py_buffer(bytes(types)), pa.array(offsets, pa.int32()).buffers()[1]]
    union = pa.Array.from_buffers(_INFO_VALUE, len(codes), buffers, children=arrays)
    return pa.RecordBatch.from_arrays([pa.array(codes, pa.uint32()), union], schema=SQL_INFO)


def _sql_info_values(server_version: str) -> dict[int, tuple[int, Any]]:
    """Code → (leg of the union, value), by the numbers of SqlInfo in FlightSql.proto; without those that are limits.

    The leg of each code is the one that JDBC and ODBC cast to without asking: a wrong one is an exception there, or worse.
    """
    strings = {
        0: "flight_oplog",
        1: server_version,
        2: pa.__version__,
        6: "",  # versions of Substrait: none, and this leg has no null
        7: "",
        504: '"',
        513: "\\",
        514: "$#@",  # in names without quotes
        529: "schema",
        530: "procedure",
        531: "catalog",  # an empty one would tell ODBC that there are no catalogs
    }
    flags = {
        3: False,  # not read only
        4: True,  # SQL is served
        5: False,  # Substrait is not
        9: True,  # queries can be cancelled
        10: True,  # bulk ingestion,
        11: True,  # in transactions too
        500: False,  # CREATE and DROP of catalogs,
        501: False,  # of schemas,
        502: True,  # of tables
        506: True,  # every table can be read
        515: True,  # AS
        516: True,  # NULL || 'a' is null
        518: True,  # a table can have another name in a query,
        519: False,  # which does not have to differ from the table's
        520: True,  # ORDER BY takes expressions
        521: True,  # and columns that are not selected
        523: False,  # LIKE … ESCAPE takes the backslash alone, which escapes without it
        524: False,  # any column of the log can be null
        527: False,  # no constraints
        532: True,  # the catalog comes first in a full name
        536: False,  # FOR UPDATE locks nothing
        537: False,  # no stored procedures
        539: True,  # subqueries may be correlated
        556: False,
        563: True,  # transactions,
        565: False,  # which DDL neither commits
        566: False,  # nor is ignored in
        572: True,  # batches of updates
        573: False,  # no savepoints
        574: True,  # named parameters
        575: False,  # no locators
        576: False,  # no calls of functions as of procedures
    }
    numbers = {
        503: 3,  # names are lower-cased,
        505: 0,  # quoted ones stay as they are: ODBC takes "unknown" for case-sensitive, and no other value says it
        507: 0,  # nulls sort as the highest value
        **dict.fromkeys((*range(541, 556), *range(557, 562)), 0),  # 0 is no limit, but for:
        543: COLUMN_NAME_BYTES_MAX,
        559: _TABLE_NAME_LENGTH_MAX,
        562: 2,  # READ COMMITTED as an ordinal, which JDBC takes; ODBC takes bits and reads READ UNCOMMITTED
    }
    bits = {
        8: 1,  # transactions, without savepoints; not bits, but this leg
        522: 1 << 1,  # GROUP BY may go beyond what is selected; ODBC takes bit 0 for selecting what is not grouped
        525: 1 << 0,  # minimum grammar
        526: 1 << 0,  # SQL-92, entry level
        528: 1 << 1 | 1 << 2,  # outer joins, full ones too: an ordinal in the proto, bits in Java, JDBC and ODBC
        533: 0,  # no procedure calls, indexes or privileges for schemas to stand in,
        534: 0,  # nor for catalogs
        535: 0,  # no cursors to update at
        538: 0b1111,  # subqueries in comparisons, EXISTS, IN, and with ANY and ALL
        540: 0b11,  # UNION, UNION ALL
        564: 1 << 2,  # READ COMMITTED and no other
        567: 1 << 1,  # results are read forward only,
        568: 0,
        569: 1 << 1,  # and read only
        570: 0,
        571: 0,
    }
    lists = {
        508: dialect.KEYWORDS,
        509: dialect.NUMERIC_FUNCTIONS,
        510: dialect.STRING_FUNCTIONS,
        511: dialect.SYSTEM_FUNCTIONS,
        512: dialect.DATETIME_FUNCTIONS,
    }
    maps = {517: [(key, sorted(dialect.CONVERSIONS[key])) for key in sorted(dialect.CONVERSIONS)]}
    legs: tuple[dict[int, Any], ...] = (strings, flags, numbers, bits, lists, maps)
    return {code: (leg, value) for leg, values in enumerate(legs) for code, value in values.items()}
