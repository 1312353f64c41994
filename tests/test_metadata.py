"""What clients are told about the server: schemas to the letter, and claims about SQL that are put to the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import adbc_driver_flightsql.dbapi as adbc
import pyarrow as pa
import pytest
from conftest import put
from pyarrow import flight

from flight_oplog import OpLog, __version__
from flight_oplog.errors import OplogError
from flight_oplog.flightsql import dialect, metadata, wire
from flight_oplog.schema import TOPIC_PATTERN
from flight_oplog.sql.engine import Engine

Query = Callable[[str], list[dict[str, Any]]]


def fields(schema: Any) -> list[str]:
    """Each field as the protocol's documents write it, `!` for one that is never null."""
    return [f"{field.name}: {field.type}{'' if field.nullable else '!'}" for field in schema]


@pytest.fixture
def works(engine: Engine, log: OpLog) -> Callable[[str], bool]:
    """Whether a statement runs to its end."""
    snapshot = log.snapshot()

    def run(sql: str) -> bool:
        try:
            list(engine.run(sql, snapshot).batches)
        except OplogError:
            return False
        return True

    return run


# Schemas


def test_key_schemas_are_the_reference_implementations() -> None:
    assert fields(metadata.primary_keys().schema) == [
        "catalog_name: string",
        "db_schema_name: string",
        "table_name: string!",
        "column_name: string!",
        "key_sequence: int32!",
        "key_name: string",
    ]
    assert fields(metadata.foreign_keys().schema) == [
        "pk_catalog_name: string",
        "pk_db_schema_name: string",
        "pk_table_name: string!",
        "pk_column_name: string!",
        "fk_catalog_name: string",
        "fk_db_schema_name: string",
        "fk_table_name: string!",
        "fk_column_name: string!",
        "key_sequence: int32!",
        "fk_key_name: string",
        "pk_key_name: string",
        "update_rule: uint8!",
        "delete_rule: uint8!",
    ]
    assert metadata.primary_keys().num_rows == metadata.foreign_keys().num_rows == 0


def test_the_schema_of_type_info_is_the_reference_implementations() -> None:
    assert fields(metadata.xdbc_type_info(wire.CommandGetXdbcTypeInfo()).schema) == [
        "type_name: string!",
        "data_type: int32!",
        "column_size: int32",
        "literal_prefix: string",
        "literal_suffix: string",
        "create_params: list<item: string not null>",
        "nullable: int32!",
        "case_sensitive: bool!",
        "searchable: int32!",
        "unsigned_attribute: bool",
        "fixed_prec_scale: bool!",
        "auto_increment: bool",
        "local_type_name: string",
        "minimum_scale: int32",
        "maximum_scale: int32",
        "sql_data_type: int32!",
        "datetime_subcode: int32",
        "num_prec_radix: int32",
        "interval_precision: int32",
    ]


def test_the_schemas_of_tables_and_infos_are_the_reference_implementations() -> None:
    assert fields(metadata.CATALOGS) == ["catalog_name: string!"]
    assert fields(metadata.DB_SCHEMAS) == ["catalog_name: string", "db_schema_name: string!"]
    tables = ["catalog_name: string", "db_schema_name: string", "table_name: string!", "table_type: string!"]
    assert fields(metadata.TABLES) == tables
    assert fields(metadata.TABLES_WITH_SCHEMA) == [*tables, "table_schema: binary!"]
    assert fields(metadata.TABLE_TYPES) == ["table_type: string!"]
    info_name, value = metadata.SQL_INFO
    assert (info_name.name, info_name.type, info_name.nullable) == ("info_name", pa.uint32(), False)
    assert (value.name, value.nullable, value.type.mode, value.type.type_codes) == ("value", False, "dense", [0, 1, 2, 3, 4, 5])
    assert fields(value.type) == [
        "string_value: string!",
        "bool_value: bool!",
        "bigint_value: int64!",
        "int32_bitmask: int32!",
        "string_list: list<item: string>!",
        "int32_to_int32_list_map: map<int32, list<item: int32>>!",
    ]


# Types

# type_name, data_type, column_size, unsigned, scales, sql_data_type, datetime_subcode, num_prec_radix
TYPE_INFO = [
    ("BOOLEAN", -7, 1, None, None, None, -7, None, None),
    ("TINYINT", -6, 3, False, 0, 0, -6, None, 10),
    ("TINYINT UNSIGNED", -6, 3, True, 0, 0, -6, None, 10),
    ("BIGINT", -5, 19, False, 0, 0, -5, None, 10),
    ("BIGINT UNSIGNED", -5, 20, True, 0, 0, -5, None, 10),
    ("BYTEA", -4, 2147483647, None, None, None, -4, None, None),
    ("BYTEA", -3, 2147483647, None, None, None, -3, None, None),
    ("BYTEA", -2, 2147483647, None, None, None, -2, None, None),
    ("TEXT", -1, 2147483647, None, None, None, -1, None, None),
    ("DECIMAL", 3, 76, False, 0, 76, 3, None, 10),
    ("INTEGER", 4, 10, False, 0, 0, 4, None, 10),
    ("INTEGER UNSIGNED", 4, 10, True, 0, 0, 4, None, 10),
    ("SMALLINT", 5, 5, False, 0, 0, 5, None, 10),
    ("SMALLINT UNSIGNED", 5, 5, True, 0, 0, 5, None, 10),
    ("FLOAT", 6, 24, False, None, None, 6, None, 2),
    ("REAL", 7, 24, False, None, None, 7, None, 2),
    ("DOUBLE", 8, 53, False, None, None, 8, None, 2),
    ("INTERVAL", 10, None, None, None, None, 10, 0, None),
    ("VARCHAR", 12, 2147483647, None, None, None, 12, None, None),
    ("DATE", 91, 10, None, None, None, 9, 1, None),
    ("TIME", 92, 18, None, 0, 9, 9, 2, None),
    ("TIMESTAMP", 93, 29, None, 0, 9, 9, 3, None),
    ("TIMESTAMP WITH TIME ZONE", 93, 35, None, 0, 9, 9, 5, None),
]
TYPE_INFO_COLUMNS = (
    *("type_name", "data_type", "column_size", "unsigned_attribute", "minimum_scale", "maximum_scale"),
    *("sql_data_type", "datetime_subcode", "num_prec_radix"),
)


def type_info(data_type: int | None = None) -> list[dict[str, Any]]:
    batch = metadata.xdbc_type_info(wire.CommandGetXdbcTypeInfo(data_type))
    batch.validate(full=True)
    return batch.to_pylist()


def test_type_info_has_a_row_for_each_type_by_code_and_name() -> None:
    rows = type_info()
    assert [tuple(row[column] for column in TYPE_INFO_COLUMNS) for row in rows] == TYPE_INFO
    assert [(row["data_type"], row["type_name"]) for row in rows] == sorted((row["data_type"], row["type_name"]) for row in rows)
    assert {(row["nullable"], row["fixed_prec_scale"], row["local_type_name"]) for row in rows} == {(1, False, None)}
    assert {row["type_name"] for row in rows if row["case_sensitive"]} == {"VARCHAR", "TEXT"}
    assert {row["type_name"] for row in rows if row["searchable"] == 3} == {"VARCHAR", "TEXT"}
    assert {row["searchable"] for row in rows} == {2, 3}
    assert {row["auto_increment"] for row in rows if row["num_prec_radix"]} == {False}
    assert {row["interval_precision"] for row in rows if row["type_name"] != "INTERVAL"} == {None}


def test_type_info_of_one_code() -> None:
    assert [row["type_name"] for row in type_info(93)] == ["TIMESTAMP", "TIMESTAMP WITH TIME ZONE"]
    assert [row["type_name"] for row in type_info(-5)] == ["BIGINT", "BIGINT UNSIGNED"]
    assert type_info(0) == []


@pytest.mark.parametrize(
    ("name", "kind", "literal"),
    [
        ("BOOLEAN", pa.bool_(), None),
        ("TINYINT", pa.int8(), None),
        ("TINYINT UNSIGNED", pa.uint8(), None),
        ("BIGINT", pa.int64(), None),
        ("BIGINT UNSIGNED", pa.uint64(), None),
        ("BYTEA", pa.binary(), "00ff"),
        ("TEXT", pa.string(), "a"),
        ("DECIMAL", pa.decimal128(38, 10), None),
        ("INTEGER", pa.int32(), None),
        ("INTEGER UNSIGNED", pa.uint32(), None),
        ("SMALLINT", pa.int16(), None),
        ("SMALLINT UNSIGNED", pa.uint16(), None),
        ("FLOAT", pa.float32(), None),
        ("REAL", pa.float32(), None),
        ("DOUBLE", pa.float64(), None),
        ("INTERVAL", pa.month_day_nano_interval(), "1 month 2 days"),
        ("VARCHAR", pa.string(), "a"),
        ("DATE", pa.date32(), "2026-01-01"),
        ("TIME", pa.time64("ns"), "12:00:00"),
        ("TIMESTAMP", pa.timestamp("ns"), "2026-01-01 00:00:00"),
        ("TIMESTAMP WITH TIME ZONE", pa.timestamp("ns"), "2026-01-01 00:00:00Z"),
    ],
)
def test_type_names_and_literals_are_sql(name: str, kind: pa.DataType, literal: str | None, engine: Engine, log: OpLog) -> None:
    [row, *_] = (row for row in type_info() if row["type_name"] == name)
    assert engine.prepare(f"SELECT CAST(NULL AS {name}) AS v", log.snapshot()).schema.field("v").type == kind
    assert (row["literal_prefix"] is None, row["literal_suffix"] is None) == (literal is None, literal is None)
    if literal is not None:
        found = engine.prepare(f"SELECT {row['literal_prefix']}{literal}{row['literal_suffix']} AS v", log.snapshot())
        assert found.schema.field("v").type == kind


def test_every_named_type_is_tried_above_and_takes_the_parameters_it_is_said_to(works: Callable[[str], bool]) -> None:
    assert {row["type_name"]: row["create_params"] for row in type_info() if row["create_params"] is not None} == {
        "DECIMAL": ["precision", "scale"],
        "TIMESTAMP": ["precision"],
        "VARCHAR": ["length"],
    }
    for name in ("DECIMAL(76, 10)", "TIMESTAMP(0)", "TIMESTAMP(9)", "VARCHAR(10)"):
        assert works(f"SELECT CAST(NULL AS {name})"), name
    for name in ("DECIMAL(77, 10)", "DECIMAL(10, 11)", "TIME(3)"):
        assert not works(f"SELECT CAST(NULL AS {name})"), name
    [mark] = test_type_names_and_literals_are_sql.pytestmark  # type: ignore[attr-defined]
    assert {name for name, *_ in mark.args[1]} == {row["type_name"] for row in type_info()}


@pytest.mark.parametrize(
    ("kind", "name", "precision", "scale"),
    [
        (pa.bool_(), "BOOLEAN", 1, None),
        (pa.int8(), "TINYINT", 3, 0),
        (pa.uint16(), "SMALLINT UNSIGNED", 5, 0),
        (pa.int32(), "INTEGER", 10, 0),
        (pa.int64(), "BIGINT", 19, 0),
        (pa.uint64(), "BIGINT UNSIGNED", 20, 0),
        (pa.float16(), "FLOAT", None, None),
        (pa.float32(), "FLOAT", None, None),
        (pa.float64(), "DOUBLE", None, None),
        (pa.decimal128(10, 2), "DECIMAL", 10, 2),
        (pa.decimal256(70, 5), "DECIMAL", 70, 5),
        (pa.string(), "VARCHAR", None, None),
        (pa.large_string(), "TEXT", None, None),
        (pa.dictionary(pa.int8(), pa.string()), "VARCHAR", None, None),
        (pa.binary(), "BYTEA", None, None),
        (pa.binary(16), "BYTEA", 16, None),
        (pa.large_binary(), "BYTEA", None, None),
        (pa.date32(), "DATE", 10, None),
        (pa.time32("s"), "TIME", 8, 0),
        (pa.time32("ms"), "TIME", 12, 3),
        (pa.time64("ns"), "TIME", 18, 9),
        (pa.timestamp("s"), "TIMESTAMP", 19, 0),
        (pa.timestamp("us"), "TIMESTAMP", 26, 6),
        (pa.timestamp("ns", "UTC"), "TIMESTAMP WITH TIME ZONE", 35, 9),
        (pa.timestamp("s", "UTC"), "TIMESTAMP WITH TIME ZONE", 25, 0),
        (pa.month_day_nano_interval(), "INTERVAL", None, None),
        (pa.duration("s"), "DURATION", None, None),
        (pa.list_(pa.int8()), "ARRAY", None, None),
        (pa.large_list(pa.int8()), "ARRAY", None, None),
        (pa.list_(pa.int8(), 2), "ARRAY", None, None),
        (pa.map_(pa.string(), pa.int8()), "MAP", None, None),
        (pa.struct([("a", pa.int8())]), "STRUCT", None, None),
        (pa.null(), "NULL", None, None),
        (pa.uuid(), "BYTEA", 16, None),
        (pa.dictionary(pa.int8(), pa.decimal128(7, 1)), "DECIMAL", 7, 1),
    ],
    ids=str,
)
def test_columns_are_described_in_sqls_words(kind: pa.DataType, name: str, precision: int | None, scale: int | None) -> None:
    [field] = metadata.described(pa.schema([pa.field("c", kind, nullable=name == "NULL")]), "public", "t", read_only=False)
    text = name in ("VARCHAR", "TEXT")
    expected = {
        "CATALOG_NAME": "oplog",
        "SCHEMA_NAME": "public",
        "TABLE_NAME": "t",
        "TYPE_NAME": name,
        **({} if precision is None else {"PRECISION": str(precision)}),
        **({} if scale is None else {"SCALE": str(scale)}),
        "IS_AUTO_INCREMENT": "0",
        "IS_CASE_SENSITIVE": "1" if text else "0",
        "IS_READ_ONLY": "0",
        "IS_SEARCHABLE": "1",
    }
    assert field.metadata == {f"ARROW:FLIGHT:SQL:{key}".encode(): word.encode() for key, word in expected.items()}
    assert (field.name, field.type, field.nullable) == ("c", kind, name == "NULL")
    drivers_find = {row["type_name"] for row in type_info()}
    assert name in drivers_find or name in ("DURATION", "ARRAY", "MAP", "STRUCT", "NULL")


def test_a_result_tells_the_digits_of_its_decimals() -> None:
    stored = {b"ARROW:extension:name": b"arrow.opaque", b"ARROW:extension:metadata": b""}
    schema = pa.schema([pa.field("d", pa.decimal128(10, 2), metadata=stored), pa.field("n", pa.int64())], metadata={"k": "v"})
    described = metadata.described_result(schema)
    assert described == schema
    assert described.metadata == {b"k": b"v"}
    digits = {b"ARROW:FLIGHT:SQL:PRECISION": b"10", b"ARROW:FLIGHT:SQL:SCALE": b"2"}
    assert described.field("d").metadata == stored | digits
    assert described.field("n").metadata is None


def test_a_description_keeps_what_is_there() -> None:
    stored = {b"ARROW:extension:name": b"arrow.json", b"ARROW:extension:metadata": b""}
    schema = pa.schema([pa.field("j", pa.string(), metadata=stored), pa.field("u", pa.uuid())], metadata={"k": "v"})
    described = metadata.described(schema, "log", "t", read_only=True)
    read = pa.ipc.read_schema(described.serialize())
    assert read.metadata == {b"k": b"v"}
    assert read.field("u").type == pa.uuid()
    assert isinstance(read.field("j").type, pa.JsonType)
    assert described.field("j").metadata.items() >= stored.items()
    assert described.field("j").metadata[b"ARROW:FLIGHT:SQL:IS_READ_ONLY"] == b"1"


# Tables


def test_tables_can_be_views() -> None:
    names = [("public", "t", "TABLE"), ("public", "v", "VIEW"), ("log", "t", "TABLE"), ("system", "topics", "SYSTEM TABLE")]
    schema = pa.schema([("a", pa.int8())])

    def found(*types: str) -> dict[str, bytes]:
        command = wire.CommandGetTables(table_types=types, include_schema=True)
        rows = metadata.tables(command, names, lambda db_schema, name: schema).to_pylist()
        schemas = {f"{row['db_schema_name']}.{row['table_name']}": pa.ipc.read_schema(pa.py_buffer(row["table_schema"])) for row in rows}
        return {name: read.field("a").metadata[b"ARROW:FLIGHT:SQL:IS_READ_ONLY"] for name, read in schemas.items()}

    assert found() == {"public.t": b"0", "public.v": b"1", "log.t": b"1", "system.topics": b"1"}
    assert list(found("view")) == list(found("VIEW")) == ["public.v"]
    assert list(found("BASE TABLE", "View")) == ["public.t", "public.v", "log.t"]
    assert list(found("System Table")) == ["system.topics"]
    assert found("GLOBAL TEMPORARY") == {}
    assert metadata.table_types().to_pydict() == {"table_type": ["SYSTEM TABLE", "TABLE", "VIEW"]}


# SqlInfo

# The leg of each code that JDBC and ODBC cast to; together they are every code of SqlInfo in FlightSql.proto.
LEGS = {
    0: {0, 1, 2, 6, 7, 504, 513, 514, 529, 530, 531},
    1: {3, 4, 5, 9, 10, 11, 500, 501, 502, 506, 515, 516, 518, 519, 520, 521, 523, 524, 527, 532, 536, 537, 539, 556, 563, 565, 566}
    | {572, 573, 574, 575, 576},
    2: {503, 505, 507, *range(541, 556), *range(557, 563)},
    3: {8, 100, 101, 522, 525, 526, 528, 533, 534, 535, 538, 540, 564, 567, 568, 569, 570, 571},
    4: {508, 509, 510, 511, 512},
    5: {517},
}


def infos(*codes: int, **limits: int) -> dict[int, Any]:
    batch = metadata.sql_info(wire.CommandGetSqlInfo(codes), "1.2.3", 300, **limits)
    batch.validate(full=True)
    assert batch.schema.equals(metadata.SQL_INFO, check_metadata=True)
    return {row["info_name"]: row["value"] for row in batch.to_pylist()}


def test_every_code_is_answered_on_the_leg_clients_cast_to() -> None:
    batch = metadata.sql_info(wire.CommandGetSqlInfo(), "1.2.3", 300)
    codes = batch["info_name"].to_pylist()
    legs = dict(zip(codes, batch["value"].type_codes.to_pylist(), strict=True))
    assert codes == [*range(12), 100, 101, *range(500, 577)]
    assert {leg: {code for code in codes if legs[code] == leg} for leg in LEGS} == LEGS
    assert batch["value"].null_count == 0
    assert None not in infos().values()


def test_codes_are_answered_once_and_unknown_ones_not_at_all() -> None:
    assert list(infos(576, 0, 577, 0, 4_000_000_000, 12)) == [576, 0]
    assert infos(577) == {}


def test_infos_say_what_the_server_does() -> None:
    found = infos()
    assert (found[0], found[1], found[2], found[6], found[7]) == ("flight_oplog", "1.2.3", pa.__version__, "", "")
    assert [code for code in (3, 4, 5, 9, 10, 11) if found[code]] == [4, 9, 10, 11]
    assert (found[8], found[563], found[562], found[564], found[573]) == (1, True, 2, 0b100, False)
    assert [found[code] for code in (500, 501, 502)] == [False, False, True]
    assert (found[572], found[574]) == (True, True)
    assert {found[code] for code in range(541, 562) if code not in (543, 556, 559)} == {0}
    assert (found[543], TOPIC_PATTERN.fullmatch("a" * found[559]) is None, TOPIC_PATTERN.fullmatch("a" * (found[559] + 1))) == (
        255,
        False,
        None,
    )


def test_infos_are_the_limits_in_force() -> None:
    assert infos(100, 101, 548, 557, 560, ticket_seconds=3600, sql_bytes=1 << 20, sql_tables=100, columns=2000) == {
        **{100: 3_600_000, 101: 300_000},
        **{548: 2000, 557: 1 << 20, 560: 100},
    }
    assert infos(100, 548, 560, ticket_seconds=1 << 40, sql_tables=1 << 16, columns=1 << 20) == {100: 0x7FFFFFFF, 548: 0xFFFF, 560: 0xFFFF}


# What the codes claim, as statements.
VALUES = "(VALUES (1, 2), (3, 1)) AS t(a, b)"
ONE = "(VALUES (1)) AS u(c)"
CLAIMS = {
    "SELECT FooBar FROM (SELECT 1 AS FOOBAR)": infos()[503] == 3,
    'SELECT "FooBar" FROM (SELECT 1 AS "FooBar")': infos()[504] == '"',
    'SELECT "FooBar" FROM (SELECT 1 AS foobar)': infos()[505] != 0,
    **{f"SELECT x.a{mark}b FROM (SELECT 1 AS a{mark}b) AS x": mark in infos()[514] for mark in "$#@!?%&~"},
    "SELECT 1 AS a": infos()[515],
    f"SELECT x.a FROM {VALUES.replace('t(', 'x(')}": infos()[518],
    f"SELECT a.a FROM {VALUES.replace('t(', 'a(')}": not infos()[519],
    f"SELECT a FROM {VALUES} ORDER BY -a": infos()[520],
    f"SELECT a FROM {VALUES} ORDER BY b": infos()[521],
    f"SELECT count(*) FROM {VALUES} GROUP BY b": bool(infos()[522] & 0b10),
    f"SELECT a FROM {VALUES} GROUP BY a, b": bool(infos()[522] & 0b10),
    f"SELECT a FROM {VALUES} GROUP BY b": bool(infos()[522] & 0b01),
    "SELECT 'a' LIKE 'a!_' ESCAPE '!'": infos()[523],
    f"SELECT * FROM {VALUES} LEFT JOIN {ONE} ON a = c": bool(infos()[528] & 0b010),
    f"SELECT * FROM {VALUES} FULL OUTER JOIN {ONE} ON a = c": bool(infos()[528] & 0b100),
    f"SELECT * FROM {VALUES} WHERE a = (SELECT max(c) FROM {ONE})": bool(infos()[538] & 0b0001),
    f"SELECT * FROM {VALUES} WHERE EXISTS (SELECT 1 FROM {ONE})": bool(infos()[538] & 0b0010),
    f"SELECT * FROM {VALUES} WHERE a IN (SELECT c FROM {ONE})": bool(infos()[538] & 0b0100),
    f"SELECT * FROM {VALUES} WHERE a = ANY (SELECT c FROM {ONE})": bool(infos()[538] & 0b1000),
    f"SELECT * FROM {VALUES} WHERE a > ALL (SELECT c FROM {ONE})": bool(infos()[538] & 0b1000),
    f"SELECT * FROM {VALUES} WHERE EXISTS (SELECT 1 FROM {ONE} WHERE c = a)": infos()[539],
    "SELECT 1 UNION SELECT 1": bool(infos()[540] & 0b01),
    "SELECT 1 UNION ALL SELECT 1": bool(infos()[540] & 0b10),
    "SELECT * FROM oplog.system.topics": infos()[532] and infos()[506],
}


@pytest.mark.parametrize(("sql", "claimed"), CLAIMS.items())
def test_claims_about_sql_hold(sql: str, claimed: bool, works: Callable[[str], bool]) -> None:
    assert works(sql) == claimed


def test_claims_about_nulls_and_escapes_hold(query: Query) -> None:
    [row] = query(r"SELECT NULL || 'a' AS n, 'a_' LIKE 'a\_' AS e, 'ab' LIKE 'a\_' AS f")
    assert (row["n"] is None, row["e"], row["f"]) == (infos()[516], infos()[513] == "\\", infos()[513] != "\\")
    up, down = (query(f"SELECT a FROM (VALUES (1), (NULL)) AS t(a) ORDER BY a {way}") for way in ("ASC", "DESC"))
    assert ([row["a"] for row in up], [row["a"] for row in down]) == ([1, None], [None, 1])
    assert infos()[507] == 0  # the highest


def test_every_function_exists(query: Query) -> None:
    functions = {row["f"] for row in query("SELECT routine_name AS f FROM information_schema.routines WHERE function_type = 'SCALAR'")}
    listed = [name for code in (509, 510, 511, 512) for name in infos()[code]]
    assert [name for name in listed if name.lower() not in functions] == []
    assert len(set(listed)) == len(listed)
    for code in (508, 509, 510, 511, 512):
        assert infos()[code] == sorted(name.upper() for name in infos()[code])


# Everywhere a name can stand; {q} is the name in quotes.
NAMES = (
    "SELECT {n} FROM (SELECT 1 AS {q}) AS t",
    "SELECT 1, {n} FROM (SELECT 1 AS {q}) AS t",
    "SELECT t.{n} FROM (SELECT 1 AS {q}) AS t WHERE {n} = 1",
    "SELECT {n} FROM (SELECT 1 AS {q}) AS t GROUP BY {n} ORDER BY {n}",
    "WITH {n} AS (SELECT 1 AS a) SELECT a FROM {n}",
    "SELECT {n}.a FROM (SELECT 1 AS a) AS {n}",
    "SELECT 1 FROM (SELECT 1 AS a) {n}",
    "SELECT 1 {n} FROM (SELECT 1)",
)


def test_keywords_are_those_that_must_be_quoted(works: Callable[[str], bool]) -> None:
    def stands(name: str, quoted: str) -> bool:
        return all(works(form.format(n=name, q=quoted)) for form in NAMES)

    for keyword in infos()[508]:
        name = keyword.lower()
        assert stands(f'"{name}"', f'"{name}"'), f"{name} in quotes"
        assert not stands(name, f'"{name}"'), f"{name} without quotes"
    for name in ("abort", "events", "key", "name", "offset_", "topic", "type", "value", "version"):
        assert stands(name, f'"{name}"'), name
    assert not {"SELECT", "FROM", "WHERE", "GROUP", "ORDER", "UNION", "TABLE", "OUTER"} & set(infos()[508])  # SQL-92's own


# SqlSupportsConvert: number → a name of that type here, and a value of it that suits the others.
CONVERTED = {
    0: ("BIGINT", "1"),
    1: ("BYTEA", "X'61'"),
    2: ("BOOLEAN", "true"),
    3: ("CHAR", "'1'"),
    4: ("DATE", "DATE '1970-01-01'"),
    5: ("DECIMAL(38, 10)", "1"),
    6: ("FLOAT", "1"),
    7: ("INTEGER", "1"),
    10: ("BYTEA", "X'61'"),
    11: ("TEXT", "'1'"),
    12: ("NUMERIC(38, 10)", "1"),
    13: ("REAL", "1"),
    14: ("SMALLINT", "1"),
    15: ("TIME", "TIME '12:00:00'"),
    16: ("TIMESTAMP", "TIMESTAMP '1970-01-01 00:00:00'"),
    17: ("TINYINT", "1"),
    18: ("BYTEA", "X'61'"),
    19: ("VARCHAR", "'1'"),
}
TEXTS = {4: "'1970-01-01'", 15: "'12:00:00'", 16: "'1970-01-01 00:00:00'"}


def test_conversions_are_what_cast_does(works: Callable[[str], bool]) -> None:
    claimed = dict(infos()[517])
    assert list(claimed) == sorted(CONVERTED)
    for source, (kind, value) in CONVERTED.items():
        values = {target: TEXTS.get(target, value) if source in (3, 11, 19) else value for target in CONVERTED}
        casts = {target: f"SELECT CAST(CAST({values[target]} AS {kind}) AS {CONVERTED[target][0]})" for target in CONVERTED}
        assert claimed[source] == [target for target in sorted(casts) if works(casts[target])], kind


def test_the_tables_of_types_name_no_type_twice() -> None:
    assert len({(row.data_type, row.type_name) for row in dialect.TYPES}) == len(dialect.TYPES)


# A real driver


def test_adbc_reads_infos_and_columns(client: flight.FlightClient, connection: adbc.Connection) -> None:
    columns = {"n": pa.array([1], pa.uint32()), "s": ["a"], "at": pa.array([0], pa.timestamp("us", "UTC")), "l": [[1]]}
    put(client, "events", pa.record_batch(columns))
    info = connection.adbc_get_info()
    assert (info["vendor_name"], info["vendor_version"], info["vendor_arrow_version"]) == ("flight_oplog", __version__, pa.__version__)
    objects = connection.adbc_get_objects(depth="all", db_schema_filter="public").read_all().to_pylist()
    [table] = objects[0]["catalog_db_schemas"][0]["db_schema_tables"]
    assert [(c["column_name"], c["xdbc_type_name"], c["xdbc_is_autoincrement"], c["xdbc_scope_table"]) for c in table["table_columns"]] == [
        ("n", "INTEGER UNSIGNED", False, "events"),
        ("s", "VARCHAR", False, "events"),
        ("at", "TIMESTAMP WITH TIME ZONE", False, "events"),
        ("l", "ARRAY", False, "events"),
    ]
    schema = connection.adbc_get_table_schema("events")
    assert schema.names == list(columns)
    assert schema.field("at").metadata[b"ARROW:FLIGHT:SQL:PRECISION"] == b"32"
