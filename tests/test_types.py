"""Any Arrow type a client may send comes back with the same values: by plain ticket, by SQL, after a restart."""

import datetime
import decimal
import json
from collections.abc import Callable, Iterator

import adbc_driver_flightsql.dbapi as adbc
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from conftest import ServerProcess, put
from pyarrow import flight

D = decimal.Decimal
WORDS = pa.array(["a", None, "long enough for a view's own buffer", ""])
ARRAYS: dict[str, pa.Array] = {
    "bool": pa.array([True, None, False, True]),
    **{str(kind): pa.array([1, None, 0, 100], kind) for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64())},
    **{str(kind): pa.array([1, None, 0, 200], kind) for kind in (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())},
    "float16": pa.array(np.array([1.5, 0, -2, 3], np.float16)),
    "float32": pa.array([1.5, None, float("inf"), -0.0], pa.float32()),
    "float64": pa.array([1.5, None, float("-inf"), 1e300]),
    "string": WORDS,
    "large_string": WORDS.cast(pa.large_string()),
    "string_view": WORDS.cast(pa.string_view()),
    "binary": WORDS.cast(pa.binary()),
    "large_binary": WORDS.cast(pa.large_binary()),
    "binary_view": WORDS.cast(pa.binary()).cast(pa.binary_view()),
    "fixed_binary": pa.array([b"abc", None, b"\0\0\0", b"xyz"], pa.binary(3)),
    "decimal32": pa.array([D("1.25"), None, D("-3.00"), D("0.01")], pa.decimal32(5, 2)),
    "decimal64": pa.array([D("1.25"), None, D("-3.00"), D("0.01")], pa.decimal64(15, 2)),
    "decimal128": pa.array([D("1.25"), None, D("-3.00"), D("0.01")], pa.decimal128(38, 2)),
    "decimal256": pa.array([D("1.25"), None, D("-3.00"), D("0.01")], pa.decimal256(60, 2)),
    "date32": pa.array([datetime.date(1900, 1, 1), None, datetime.date(2024, 2, 29), datetime.date(1970, 1, 1)]),
    "date64": pa.array([datetime.date(1900, 1, 1), None, datetime.date(2024, 2, 29), datetime.date(1970, 1, 1)], pa.date64()),
    "time32": pa.array([1, None, 0, 86_399], pa.time32("s")),
    "time64": pa.array([1, None, 0, 86_399], pa.time64("ns")),
    **{f"timestamp_{unit}": pa.array([1, None, -1, 10**9], pa.timestamp(unit)) for unit in ("s", "ms", "us", "ns")},
    "timestamp_zone": pa.array([1, None, -1, 10**9], pa.timestamp("ms", "Europe/Berlin")),
    "duration": pa.array([1, None, -1, 10**9], pa.duration("us")),
    "interval": pa.array([(1, 2, 3), None, (0, 0, 0), (-1, 5, 7)], pa.month_day_nano_interval()),
    "null": pa.nulls(4),
    "dictionary": WORDS.dictionary_encode(),
    "dictionary_of_numbers": pa.array([7, None, 7, 8]).dictionary_encode(),
    "run_ends": pc.run_end_encode(pa.array([1, 1, None, 2])),
    "list": pa.array([[1], None, [], [2, None]]),
    "large_list": pa.array([[1], None, [], [2, None]], pa.large_list(pa.int64())),
    "list_view": pa.array([[1], None, [], [2, None]], pa.list_view(pa.int64())),
    "fixed_list": pa.array([[1, 2], None, [3, None], [4, 5]], pa.list_(pa.int64(), 2)),
    "struct": pa.array([{"x": 1, "y": "a"}, None, {"x": None, "y": None}, {"x": 2, "y": "b"}]),
    "map": pa.array([[("k", 1)], None, [], [("l", None), ("m", 2)]], pa.map_(pa.string(), pa.int64())),
    "deep": pa.array([[{"x": [["a"]]}], None, [], [{"x": None}]]),
    "list_of_dictionaries": pa.ListArray.from_arrays([0, 1, 1, 3, 4], WORDS.dictionary_encode()),
    "struct_of_views": pa.StructArray.from_arrays([WORDS.cast(pa.string_view())], ["v"]),
    "not_null": pa.array([{"x": 1}, {"x": 2}, {"x": 3}, {"x": 4}], pa.struct([pa.field("x", pa.int8(), nullable=False)])),
    "uuid": pa.array([b"0" * 16, None, b"1" * 16, b"2" * 16], pa.uuid()),
    "json": pa.array(['{"a": 1}', None, "[]", "1"], pa.json_()),
    "bool8": pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, None, 0, 1], pa.int8())),
    "opaque": pa.ExtensionArray.from_storage(pa.opaque(pa.binary(), "geometry", "postgis"), pa.array([b"a", None, b"b", b"c"])),
}


def values(array: pa.Array | pa.ChunkedArray) -> list[object]:
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0)
    return array.storage.to_pylist() if isinstance(array, pa.ExtensionArray) else array.to_pylist()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("types")
    server = ServerProcess(folder / "log", folder / "stderr")
    yield server
    server.stop()


@pytest.mark.parametrize("name", ARRAYS)
def test_a_type_comes_back_with_its_values(name: str, running: ServerProcess) -> None:
    array = ARRAYS[name]
    topic = f"t_{name}"
    field = pa.field("c", array.type, nullable=name != "not_null")
    whole = pa.RecordBatch.from_arrays([array, pa.array([0, 1, 2, 3])], schema=pa.schema([field, ("i", pa.int64())]))
    expected = values(array) + values(array.slice(1, 2))
    with flight.connect(running.uri) as client:
        put(client, topic, whole, whole.slice(1, 2), whole.slice(4))
        assert values(client.do_get(flight.Ticket(json.dumps({"topic": topic}))).read_all()["c"]) == expected
        with adbc.connect(running.uri, autocommit=True) as connection, connection.cursor() as cursor:
            cursor.execute(f"SELECT c FROM log.{topic} ORDER BY _offset")
            table = cursor.fetch_arrow_table()
            assert values(table["c"]) == expected
            cursor.execute(f"SELECT c FROM {topic} WHERE i = 3")
            assert values(cursor.fetch_arrow_table()["c"]) == expected[3:4]
            cursor.execute(f"SELECT count(*), count(c) FROM {topic}")
            assert cursor.fetchone() == (6, sum(value is not None for value in expected))
    if isinstance(array.type, pa.BaseExtensionType):
        assert table["c"].type == array.type, "an extension type keeps its name"


def test_sql_gives_columns_of_float16_as_float32(running: ServerProcess) -> None:
    batch = pa.RecordBatch.from_arrays([ARRAYS["float16"], pa.array([[value] for value in ARRAYS["float16"]])], ["h", "l"])
    with flight.connect(running.uri) as client, adbc.connect(running.uri, autocommit=True) as connection, connection.cursor() as cursor:
        put(client, "halves", batch)
        cursor.execute("CREATE VIEW seen_halves AS SELECT * FROM halves")
        for name in ("halves", "seen_halves"):
            cursor.execute(f"SELECT * FROM {name} WHERE h = ?", [1.5])
            found = cursor.fetch_arrow_table()
            assert found.schema.types == connection.adbc_get_table_schema(name).types == [pa.float32(), pa.list_(pa.float16())]
            assert found.to_pylist() == [{"h": 1.5, "l": [1.5]}]
        cursor.execute("INSERT INTO halves (h) VALUES (?)", [0.25])
        cursor.execute("INSERT INTO halves SELECT * FROM halves WHERE l IS NULL")
        stored = client.do_get(flight.Ticket(json.dumps({"topic": "halves"}))).read_all()
    assert stored["h"].type == pa.float16()
    assert stored["h"].to_pylist() == [1.5, 0, -2, 3, 0.25, 0.25]


def test_all_of_it_survives_a_restart(tmp_path_factory: pytest.TempPathFactory, start: Callable[..., ServerProcess]) -> None:
    first = start()
    batch = pa.RecordBatch.from_arrays(list(ARRAYS.values()), names=list(ARRAYS))
    with flight.connect(first.uri) as client:
        put(client, "everything", batch)
    first.stop()
    second = start()
    with flight.connect(second.uri) as client:
        table = client.do_get(flight.Ticket(json.dumps({"topic": "everything"}))).read_all()
    for name, array in ARRAYS.items():
        assert values(table[name]) == values(array), name
