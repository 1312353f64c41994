"""Results with schemas the protocol fixes: catalogs, schemas, tables, table types, SqlInfo.

Types and nullability are those of the reference implementations, field for field: Go's driver compares them exactly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa

from flight_oplog.engine import CATALOG
from flight_oplog.flightsql.wire import CommandGetDbSchemas, CommandGetSqlInfo, CommandGetTables

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

_INFO_VALUE = pa.dense_union(
    [
        pa.field("string_value", pa.string()),
        pa.field("bool_value", pa.bool_()),
        pa.field("bigint_value", pa.int64()),
        pa.field("int32_bitmask", pa.int32()),
        pa.field("string_list", pa.list_(pa.string())),
        pa.field("int32_to_int32_list_map", pa.map_(pa.int32(), pa.list_(pa.int32()))),
    ],
    type_codes=[0, 1, 2, 3, 4, 5],
)
SQL_INFO = pa.schema([pa.field("info_name", pa.uint32(), nullable=False), pa.field("value", _INFO_VALUE, nullable=False)])

# The types a table can have here, and the names clients use for them.
_TYPE_NAMES = {"TABLE": {"table", "base table"}, "SYSTEM TABLE": {"system table"}}

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
            row["table_schema"] = schema_of(db_schema, name).serialize().to_pybytes()
        rows.append(row)
    return pa.RecordBatch.from_pylist(rows, TABLES_WITH_SCHEMA if command.include_schema else TABLES)


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


def sql_info(command: CommandGetSqlInfo, server_version: str, transaction_seconds: int) -> pa.RecordBatch:
    """Return the codes asked for, all of them when none are named; codes this server has no answer for are left out."""
    values = _sql_info_values(server_version) | {101: (3, min(transaction_seconds * 1000, (1 << 31) - 1))}  # milliseconds
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
    """Code → (leg of the union, value), by the numbers of SqlInfo in FlightSql.proto."""
    return {
        0: (0, "flight_oplog"),
        1: (0, server_version),
        2: (0, pa.__version__),
        3: (1, True),  # read only: statements only read; entries arrive over do_put
        4: (1, True),  # SQL is served
        5: (1, False),  # Substrait is not
        8: (3, 1),  # transactions, without savepoints
        9: (1, False),  # CancelFlightInfo is not served
        10: (1, True),  # bulk ingestion,
        11: (1, True),  # in transactions too
        504: (0, '"'),
        562: (3, 2),  # the isolation is READ COMMITTED
        563: (1, True),  # transactions
        564: (3, 1 << 2),  # READ COMMITTED and no other
    }
