import datetime
import decimal
import hashlib
import json
import random

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flight_oplog import codec
from flight_oplog.errors import CorruptLog
from flight_oplog.schema import normal_schema

DICTIONARY = pa.array(["a", "b", None, "a"]).dictionary_encode()
ARRAYS = {
    "dictionary": DICTIONARY,
    "string view": pa.array(["a", None, "x" * 40, ""], pa.string_view()),
    "binary view": pa.array([b"a", None, b"x" * 40, b""], pa.binary_view()),
    "list view": pa.array([[1], None, [2, 3], []], pa.list_view(pa.int64())),
    "large list view": pa.array([[1], None, [2, 3], []], pa.large_list_view(pa.int64())),
    "list view of dictionaries": pa.ListViewArray.from_arrays([0, 1, 2, 2], [1, 1, 2, 0], DICTIONARY),
    "list of list views": pa.array([[[1], []], None, [], [[2, 3]]], pa.list_(pa.list_view(pa.int64()))),
    "fixed list of list views": pa.array([[[1], []], None, [None, [7]], [[2], [3]]], pa.list_(pa.list_view(pa.int64()), 2)),
    "struct of list views": pa.array([{"x": [1]}, None, {"x": None}, {"x": []}], pa.struct([("x", pa.list_view(pa.int64()))])),
    "map of list views": pa.array([[("k", [1])], None, [], [("l", None), ("m", [2])]], pa.map_(pa.string(), pa.list_view(pa.int64()))),
    "run ends": pc.run_end_encode(pa.array([1, 1, None, 2])),
    "dictionary of views": pa.DictionaryArray.from_arrays(pa.array([0, None, 1, 0]), pa.array(["a", "b"], pa.string_view())),
    "dictionary of lists": pa.DictionaryArray.from_arrays(pa.array([0, None, 1, 0]), pa.array([[1], [2, 3]])),
    "run ends of views": pa.RunEndEncodedArray.from_arrays(pa.array([1, 3, 4]), pa.array(["a", None, "b"], pa.string_view())),
    "run ends of dictionaries": pa.RunEndEncodedArray.from_arrays(pa.array([1, 3, 4]), pa.array(["a", None, "b"]).dictionary_encode()),
    "opaque": pa.ExtensionArray.from_storage(pa.opaque(pa.string(), "t", "v"), pa.array(["a", None, "b", "c"])),
    "uuid": pa.array([b"0" * 16, None, b"1" * 16, b"2" * 16], pa.uuid()),
    "list of uuids": pa.ListArray.from_arrays([0, 1, 1, 3, 4], pa.array([b"0" * 16, None, b"1" * 16, b"2" * 16], pa.uuid())),
    "bool8": pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, None, 0, 1], pa.int8())),
    "decimal32": pa.array([decimal.Decimal("1.25"), None, decimal.Decimal("-3.00"), decimal.Decimal("0.01")], pa.decimal32(5, 2)),
    "not null": pa.array([{"x": 1}, {"x": 2}, {"x": 3}, {"x": 4}], pa.struct([pa.field("x", pa.int8(), nullable=False)])),
}


def plain_list(array: pa.Array) -> list[object]:
    """The values of an array, whatever its layout."""
    if isinstance(array, pa.ExtensionArray):
        return array.storage.to_pylist()
    return [value.bytes if hasattr(value, "bytes") else value for value in array.to_pylist()]


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("window", [(0, 4), (1, 3), (1, 2), (4, 0)])
def test_any_layout_becomes_its_normal_form_with_the_same_values(name: str, window: tuple[int, int]) -> None:
    array = ARRAYS[name].slice(*window)
    batch = pa.RecordBatch.from_arrays([array], ["c"])
    normal = normal_schema(batch.schema)
    found = codec.conform(batch, normal)
    found.validate(full=True)
    assert found.schema.equals(normal, check_metadata=True)
    if "uuid" not in name:
        assert found.column(0).to_pylist() == plain_list(array)
    else:
        assert found.column(0).null_count == array.null_count


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("name", ARRAYS)
def test_content_decodes_to_what_was_encoded(name: str, compression: str) -> None:
    batch = pa.RecordBatch.from_arrays([ARRAYS[name]], ["c"])
    normal = normal_schema(batch.schema)
    plain = codec.conform(batch, normal)
    content = codec.encode([plain, plain.slice(1)], normal, compression)
    decoded = codec.decode(content, 7, "here")
    assert all(part.schema.equals(normal, check_metadata=True) for part in decoded)
    assert [value for part in decoded for value in part.column(0).to_pylist()] == [
        *plain.column(0).to_pylist(),
        *plain.column(0).to_pylist()[1:],
    ]


def test_any_arrow_reader_decodes_content_by_itself() -> None:
    batch = pa.record_batch({"a": [1, 2], "b": ["x", None]})
    assert pa.ipc.open_stream(codec.encode([batch], batch.schema, "zstd")).read_all().to_pylist() == batch.to_pylist()


def test_only_the_columns_asked_for_are_decoded() -> None:
    batch = pa.record_batch({"a": [1], "b": ["x"], "c": [2.0]})
    content = codec.encode([batch], batch.schema, "lz4")
    [part] = codec.decode(content, 1, "here", ["c", "a"])
    assert part.to_pylist() == [{"a": 1, "c": 2.0}]
    [part] = codec.decode(content, 1, "here", ["nowhere"])
    assert (part.num_rows, part.num_columns) == (1, 0)


@pytest.mark.parametrize("compression", ["none", "lz4"])
def test_content_cut_short_anywhere_is_an_error_never_fewer_rows(compression: str) -> None:
    batch = pa.record_batch({"a": list(range(100)), "b": ["x" * 20] * 100})
    schema = batch.schema
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=None if compression == "none" else compression)
    with pa.ipc.new_stream(sink, schema, options=options) as writer:
        writer.write_batch(batch)
        writer.write_batch(batch)
    content = sink.getvalue()
    assert sum(part.num_rows for part in codec.decode(content, 200, "here")) == 200
    for size in range(content.size):
        with pytest.raises(CorruptLog, match=r"^here: content "):
            codec.decode(content.slice(0, size), 200, "here")


def test_content_with_another_number_of_entries_is_an_error() -> None:
    batch = pa.record_batch({"a": [1, 2]})
    with pytest.raises(CorruptLog) as caught:
        codec.decode(codec.encode([batch], batch.schema, "none"), 3, "topic 't', file f, offset 0")
    assert str(caught.value) == "topic 't', file f, offset 0: content holds 2 of 3 entries; restore the file"


def test_small_batches_are_joined_and_large_ones_cut() -> None:
    small = pa.record_batch({"a": pa.array(range(1000), pa.int64())})
    gathered = list(codec.gather([small] * 1000))
    assert sum(batch.num_rows for batch in gathered) == 1_000_000
    assert {batch.num_rows for batch in gathered[:-1]} == {65_000}
    large = pa.record_batch({"a": ["x" * 100] * 200_000})
    cut = list(codec.gather([large]))
    assert len(cut) > 1
    assert max(batch.nbytes for batch in cut) <= codec.BATCH_BYTES
    assert pa.Table.from_batches(cut)["a"].combine_chunks().equals(large["a"])


def test_what_is_large_is_not_copied_to_be_joined_but_with_what_came_before() -> None:
    small, large = (pa.record_batch({"a": pa.array(bytes(size), pa.uint8())}) for size in (5_000, codec.JOINED_BYTES_MAX + 1))
    gathered = list(codec.gather([large, large, small, large, small, large], codec.BATCH_BYTES, 2 * large.num_rows))
    assert [batch.num_rows for batch in gathered] == [large.num_rows, large.num_rows, large.num_rows + 10_000, large.num_rows]
    address = large["a"].buffers()[1].address
    assert [batch["a"].buffers()[1].address == address for batch in gathered] == [True, True, False, True]


def test_bounds_hold_minimum_maximum_and_nulls_of_each_column() -> None:
    batch = pa.record_batch(
        {
            "i": [3, None, -5],
            "f": [1.5, 2.5, 0.5],
            "nan": [1.0, float("nan"), 2.0],
            "s": ["b", "a", None],
            "n": pa.nulls(3),
            "t": pa.array([10, None, 5], pa.timestamp("ms")),
            "d": pa.array([decimal.Decimal("1.20"), None, decimal.Decimal("-7.00")]),
            "l": [[1], [2], None],
            "b": [True, False, None],
        }
    )
    found = codec.bounds([batch.slice(0, 1), batch.slice(1)], batch.schema)
    assert found == {
        "i": {"nulls": 1, "min": -5, "max": 3},
        "f": {"nulls": 0, "min": 0.5, "max": 2.5},
        "nan": {"nulls": 0},
        "s": {"nulls": 1, "min": "a", "max": "b"},
        "n": {"nulls": 3},
        "t": {"nulls": 1, "min": 5, "max": 10},
        "d": {"nulls": 1, "min": "-7.00", "max": "1.20"},
        "l": {"nulls": 1},
        "b": {"nulls": 1, "min": False, "max": True},
    }
    assert json.loads(codec.bounds_json(found)) == found


@given(st.lists(st.text(max_size=200), min_size=1))
def test_bounds_of_strings_are_sound_however_long_they_are(texts: list[str]) -> None:
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    batch = pa.record_batch({"s": pa.array(texts, pa.string())})
    limits = codec.bounds([batch], batch.schema)["s"]
    if "min" in limits:
        assert len(limits["min"]) <= 64
        assert len(limits["max"]) <= 64
        assert all(limits["min"].encode() <= text.encode() <= limits["max"].encode() for text in texts)
    else:
        assert any(len(text) > 64 for text in texts)


@given(st.integers(0, 2**32), st.sampled_from(["abc", "a\0", "aé", "\0\x7f"]), st.integers(7, 12), st.integers(0, 5))
def test_bounds_of_many_texts_of_one_length_are_their_least_and_greatest(seed: int, letters: str, width: int, skipped: int) -> None:
    chosen = random.Random(seed)
    texts = ["".join(chosen.choices(letters, k=width)) for _ in range(codec.OUTER_TEXTS_FROM + 9)]
    batch = pa.record_batch({"s": texts, "alike": ["in front" + text for text in texts]}).slice(skipped)
    assert codec.bounds([batch], batch.schema) == {
        name: {"nulls": 0, "min": min(column), "max": max(column)} for name, column in batch.to_pydict().items()
    }


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_in_any_batch_leaves_the_column_without_bounds(strange: float) -> None:
    batches = [pa.record_batch({"f": [value, None]}) for value in (1.0, 2.0, strange, 0.5)]
    assert codec.bounds(batches, batches[0].schema) == {"f": {"nulls": 4}}
    assert codec.bounds(batches[:2], batches[0].schema) == {"f": {"nulls": 2, "min": 1.0, "max": 2.0}}


def test_a_digest_is_xxh3_or_the_sha256_of_another_writer() -> None:
    content = pa.py_buffer(b"content")
    assert codec.digest(content) == "917e1274274fc195b27a2d2388d9568c"
    assert codec.has_digest(content, codec.digest(content))
    assert codec.has_digest(content, hashlib.sha256(b"content").hexdigest())
    for wrong in ("", "0" * 32, "0" * 64, codec.digest(content).upper()):
        assert not codec.has_digest(content, wrong)


def test_an_upper_bound_steps_over_surrogates_and_gives_up_at_the_last_character() -> None:
    def upper(text: str) -> object:
        batch = pa.record_batch({"s": [text]})
        return codec.bounds([batch], batch.schema)["s"].get("max")

    assert upper("a" * 65) == "a" * 63 + "b"
    assert upper("a" * 63 + "\ud7ff" + "x") == "a" * 63 + "\ue000"
    assert upper("a" + "\U0010ffff" * 64) == "b"
    assert upper("\U0010ffff" * 65) is None


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.int64(), 2**63 - 1),
        (pa.uint64(), 2**64 - 1),
        (pa.float32(), 0.5),
        (pa.string(), "é"),
        (pa.bool_(), True),
        (pa.date32(), datetime.date(1960, 2, 3)),
        (pa.date64(), datetime.date(2020, 2, 3)),
        (pa.time32("s"), datetime.time(1, 2, 3)),
        (pa.time64("us"), datetime.time(1, 2, 3, 4)),
        (pa.timestamp("s", "UTC"), datetime.datetime(1960, 2, 3, tzinfo=datetime.UTC)),
        (pa.timestamp("ns"), datetime.datetime(2020, 2, 3, 4, 5, 6, 7)),
        (pa.decimal128(10, 3), decimal.Decimal("-123.456")),
        (pa.decimal256(50, 3), decimal.Decimal("123.456")),
    ],
)
def test_a_bound_reads_back_as_the_value_it_was(kind: pa.DataType, value: object) -> None:
    batch = pa.RecordBatch.from_arrays([pa.array([value], kind)], ["c"])
    limits = json.loads(codec.bounds_json(codec.bounds([batch], batch.schema)))["c"]
    assert codec.bound_scalar(limits["min"], kind) == pa.scalar(value, kind)


def test_the_time_range_is_widened_to_whole_microseconds_and_unknown_when_out_of_range() -> None:
    schema = pa.schema([("t", pa.timestamp("ns"))])
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    micro = datetime.timedelta(microseconds=1)
    assert codec.time_range({"t": {"min": 1, "max": 1001, "nulls": 0}}, schema, "t") == (epoch, epoch + 2 * micro)
    assert codec.time_range({"t": {"nulls": 3}}, schema, "t") == (None, None)
    assert codec.time_range({}, schema, None) == (None, None)
    seconds = pa.schema([("t", pa.timestamp("s"))])
    assert codec.time_range({"t": {"min": 0, "max": 10**12, "nulls": 0}}, seconds, "t") == (None, None)


def test_rows_of_unequal_size_are_cut_by_their_bytes_not_their_number() -> None:
    batch = pa.record_batch({"s": ["x" * 100_000] * 30 + ["y"] * 10_000})
    pieces = list(codec.cut(batch, 1_000_000, batch.num_rows))
    assert max(piece.nbytes for piece in pieces) <= 1_000_000
    assert pa.Table.from_batches(pieces).combine_chunks().to_batches()[0].equals(batch)
    alone = list(codec.cut(pa.record_batch({"s": ["x" * 100, "y" * 100]}), 10, 10))
    assert [piece.num_rows for piece in alone] == [1, 1], "a row over the limit goes alone"


@given(st.lists(st.one_of(st.none(), st.text(max_size=20)), min_size=1, max_size=50), st.data())
def test_sizes_are_what_arrow_says_a_slice_takes(texts: list[str | None], data: st.DataObject) -> None:
    columns: dict[str, pa.Array] = {
        "text": pa.array(texts, pa.string()),
        "large": pa.array(texts, pa.large_string()),
        "bytes": pa.array([None if text is None else text.encode() for text in texts], pa.binary()),
        "flag": pa.array([text is None for text in texts]),
        "number": pa.array([None if text is None else len(text) for text in texts], pa.int64()),
        "decimal": pa.array([None if text is None else decimal.Decimal(len(text)) for text in texts], pa.decimal128(9, 2)),
        "fixed": pa.array([b"0123456789"] * len(texts), pa.binary(10)),
        "list": pa.array([[text, "x"] for text in texts], pa.list_(pa.string())),
    }
    names = data.draw(st.lists(st.sampled_from([*columns]), min_size=1, unique=True))
    first = data.draw(st.integers(0, len(texts) - 1))
    batch = pa.record_batch({name: columns[name] for name in names}).slice(first)
    start = data.draw(st.integers(0, batch.num_rows - 1))
    rows = data.draw(st.integers(0, batch.num_rows - start))
    beside = len(names) * 2  # what is kept beside values begins within a byte, and may be there for nothing
    assert abs(codec.Sizes(batch).of(start, rows) - batch.slice(start, rows).nbytes) <= beside + rows // 8 * len(names)
