"""The protocol without a socket: messages, handles, fixed schemas, patterns."""

import time

import adbc_driver_flightsql  # noqa: F401  (registers its own copy of the protocol; ours must not clash)
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flight_oplog.errors import NotFound, OplogError, RequestError
from flight_oplog.flightsql import metadata, wire
from flight_oplog.flightsql.handles import Sealer
from flight_oplog.flightsql.service import ACTIONS, ROUTES


def any_of(name: str, body: bytes) -> bytes:
    """A google.protobuf.Any: field 1 the type's URL, field 2 the message."""
    url = f"type.googleapis.com/arrow.flight.protocol.sql.{name}".encode()
    return b"\x0a" + bytes([len(url)]) + url + b"\x12" + bytes([len(body)]) + body


# Messages and their bytes, written out by hand from FlightSql.proto's field numbers.
GOLDEN = [
    (wire.CommandStatementQuery("SELECT 1"), any_of("CommandStatementQuery", b"\x0a\x08SELECT 1")),
    (
        wire.CommandGetTables(catalog="", table_name_filter_pattern="a%", table_types=("TABLE", "VIEW"), include_schema=True),
        any_of("CommandGetTables", b"\x0a\x00\x1a\x02a%\x22\x05TABLE\x22\x04VIEW\x28\x01"),
    ),
    (wire.CommandGetSqlInfo((0, 8, 504)), any_of("CommandGetSqlInfo", b"\x0a\x04\x00\x08\xf8\x03")),
    (
        wire.ActionCreatePreparedStatementResult(b"h", b"", b"p", is_update=False),
        any_of("ActionCreatePreparedStatementResult", b"\x0a\x01h\x1a\x01p\x20\x00"),
    ),
]


@pytest.mark.parametrize(("message", "data"), GOLDEN)
def test_messages_and_their_bytes_go_both_ways(message: object, data: bytes) -> None:
    assert wire.pack(message) == data
    assert wire.unpack(data) == message


def test_absent_and_empty_are_told_apart() -> None:
    assert wire.unpack(wire.pack(wire.CommandGetDbSchemas())).catalog is None
    assert wire.unpack(wire.pack(wire.CommandGetDbSchemas(catalog=""))).catalog == ""


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_clear_error(data: bytes) -> None:
    for candidate in (data, GOLDEN[0][1] + data, GOLDEN[1][1][: len(data)]):
        try:
            wire.unpack(candidate)
        except OplogError as error:
            assert str(error)  # noqa: PT017


def test_a_handle_opens_for_its_kind_and_time_and_only_unaltered() -> None:
    sealer = Sealer(b"k" * 32)
    handle = sealer.seal("statement", {"sql": "SELECT 1"}, "ann", 60)
    body = sealer.open("statement", handle, "ann")
    assert (body["sql"], len(body["id"])) == ("SELECT 1", 16)
    with pytest.raises(RequestError, match="the handle is not a prepared statement handle"):
        sealer.open("prepared statement", handle, "ann")
    for broken in (b"", handle[:-1], handle[:40], b"\x01" + handle[1:], handle + b" ", b"\x03" + b"0" * 32 + handle[33:]):
        with pytest.raises(RequestError, match="was not made by a server of this log for you, or was altered"):
            sealer.open("statement", broken, "ann")
    for other in ("bob", "", None, "ann ", "annx", "1"):
        with pytest.raises(RequestError, match="was not made by a server of this log for you"):
            sealer.open("statement", handle, other)
    with pytest.raises(RequestError, match="was not made by a server of this log"):
        Sealer(b"x" * 32).open("statement", handle, "ann")
    expired = sealer.seal("statement", {}, None, -1)
    with pytest.raises(NotFound, match="the statement handle has expired; ask for a new one"):
        sealer.open("statement", expired, None)


@pytest.mark.parametrize(
    ("pattern", "fits", "others"),
    [
        (None, ["", "a"], []),
        ("%", ["", "a", "a\n"], []),
        ("a", ["a"], ["", "A", "aa"]),
        ("a%", ["a", "ab"], ["ba"]),
        ("%b", ["b", "ab", "bb"], ["ba"]),
        ("%a%b%", ["ab", "xaxbx"], ["ba"]),
        ("a_c", ["abc"], ["ac", "abbc"]),
        ("_%_", ["ab", "abc"], ["a"]),
        (r"a\_c", ["a_c"], ["abc"]),
        (r"a\%", ["a%"], ["ab"]),
        ("a.c", ["a.c"], ["abc"]),
        ("ab%ab", ["abab", "abxab"], ["ab", "aab"]),
    ],
)
def test_patterns_are_sqls_like(pattern: str | None, fits: list[str], others: list[str]) -> None:
    matches = metadata.like(pattern)
    assert [name for name in fits + others if matches(name)] == fits


def test_no_pattern_takes_long() -> None:
    began = time.perf_counter()
    assert not metadata.like("%a" * 30 + "%b")("a" * 128)
    assert time.perf_counter() - began < 0.5


def test_fixed_schemas_are_the_protocols() -> None:
    assert str(metadata.CATALOGS) == "catalog_name: string not null"
    assert str(metadata.DB_SCHEMAS) == "catalog_name: string\ndb_schema_name: string not null"
    assert str(metadata.TABLES_WITH_SCHEMA) == (
        "catalog_name: string\ndb_schema_name: string\ntable_name: string not null\n"
        "table_type: string not null\ntable_schema: binary not null"
    )
    name, value = metadata.SQL_INFO
    assert (str(name), value.nullable) == ("pyarrow.Field<info_name: uint32 not null>", False)
    assert str(value.type) == (
        "dense_union<string_value: string not null=0, bool_value: bool not null=1, bigint_value: int64 not null=2, "
        "int32_bitmask: int32 not null=3, string_list: list<item: string> not null=4, "
        "int32_to_int32_list_map: map<int32, list<item: int32>> not null=5>"
    )


def test_sql_info_answers_the_codes_asked_for_once_each() -> None:
    batch = metadata.sql_info(wire.CommandGetSqlInfo((504, 0, 99999, 0)), "1.2.3", 300)
    batch.validate(full=True)
    assert batch.schema.equals(metadata.SQL_INFO)
    assert batch.to_pylist() == [{"info_name": 504, "value": '"'}, {"info_name": 0, "value": "flight_oplog"}]
    every = metadata.sql_info(wire.CommandGetSqlInfo(), "1.2.3", 300).to_pylist()
    assert {"info_name": 8, "value": 1} in every


def test_tables_are_found_by_catalog_pattern_and_type() -> None:
    names = [("public", "events", "TABLE"), ("log", "events", "TABLE"), ("system", "topics", "SYSTEM TABLE")]

    def found(**filters: object) -> list[str]:
        batch = metadata.tables(wire.CommandGetTables(**filters), names, lambda db_schema, name: pa.schema([("a", pa.int8())]))  # type: ignore[arg-type]
        return [f"{row['db_schema_name']}.{row['table_name']}" for row in batch.to_pylist()]

    assert found() == ["public.events", "log.events", "system.topics"]
    assert found(catalog="oplog", db_schema_filter_pattern="p%") == ["public.events"]
    assert found(catalog="") == []
    assert found(table_types=("BASE TABLE", "table")) == ["public.events", "log.events"]
    assert found(table_name_filter_pattern="topic_") == ["system.topics"]
    batch = metadata.tables(wire.CommandGetTables(include_schema=True), names[:1], lambda db_schema, name: pa.schema([("a", pa.int8())]))
    assert pa.ipc.open_stream(batch["table_schema"][0].as_buffer()).schema == pa.schema([("a", pa.int8())])


def test_every_command_and_action_has_a_message() -> None:
    for command in ROUTES:
        assert wire.unpack(wire.pack(command())) == command()
    for act in ACTIONS.values():
        assert wire.unpack(wire.pack(act.message())) == act.message()
