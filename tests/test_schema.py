import pyarrow as pa
import pytest

from flight_oplog.errors import RequestError, SchemaMismatch
from flight_oplog.schema import check_topic, evolve, join_types, normal_schema, schema_id


@pytest.mark.parametrize("name", ["a", "Events", "a1_b", "x" * 128])
def test_a_topic_name_is_a_letter_then_letters_digits_and_underscores(name: str) -> None:
    assert check_topic(name) == name


@pytest.mark.parametrize("name", ["", "1a", "a-b", "a.b", "ä", "x" * 129, "a b", "a\n", "../x"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match="is not a topic name"):
        check_topic(name)


def test_names_that_begin_with_an_underscore_belong_to_the_log() -> None:
    with pytest.raises(RequestError) as caught:
        check_topic("_schemas")
    assert str(caught.value) == "topic '_schemas' is reserved: names that begin with _ belong to the log itself"


def test_normal_form_keeps_meaning_and_drops_layout() -> None:
    sent = pa.schema(
        [
            pa.field("d", pa.dictionary(pa.int8(), pa.string()), nullable=False, metadata={"comment": "x"}),
            pa.field("v", pa.string_view()),
            pa.field("bv", pa.binary_view()),
            pa.field("lv", pa.list_view(pa.dictionary(pa.int32(), pa.int64()))),
            pa.field("r", pa.run_end_encoded(pa.int32(), pa.date32())),
            pa.field("s", pa.struct([pa.field("x", pa.string_view(), nullable=False)])),
            pa.field("dec", pa.decimal32(5, 2)),
            pa.field("u", pa.uuid()),
            pa.field("large", pa.large_string()),
        ],
        metadata={"pandas": "x"},
    )
    uuid = {b"ARROW:extension:name": b"arrow.uuid", b"ARROW:extension:metadata": b""}
    expected = pa.schema(
        [
            ("d", pa.string()),
            ("v", pa.string()),
            ("bv", pa.binary()),
            ("lv", pa.list_(pa.int64())),
            ("r", pa.date32()),
            ("s", pa.struct([("x", pa.string())])),
            ("dec", pa.decimal128(5, 2)),
            pa.field("u", pa.binary(16), metadata=uuid),
            ("large", pa.large_string()),
        ]
    )
    assert normal_schema(sent).equals(expected, check_metadata=True)
    assert normal_schema(expected).equals(expected, check_metadata=True)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (pa.schema([]), "the schema has no columns: send at least one"),
        (pa.schema([("a", pa.int8()), ("a", pa.int8())]), "column 'a' appears twice: SQL could not tell them apart"),
        (
            pa.schema([("_offset", pa.int64())]),
            "column '_offset' is reserved: the log adds _offset, _timestamp, _producer, _sequence, _schema_id itself",
        ),
        (
            pa.schema([("t", pa.timestamp("us", "Nope/Nope"))]),
            "a timestamp's time zone is neither a known name nor an offset like +01:00",
        ),
        (
            pa.schema([("s", pa.struct([("x", pa.int8()), ("x", pa.int8())]))]),
            "a struct has two fields of one name: SQL could not tell them apart",
        ),
        (pa.schema([("", pa.int8())]), "column '': a name has 1 to 255 bytes, none of them NUL"),
        (pa.schema([("n" * 256, pa.int8())]), f"column {'n' * 80!r}: a name has 1 to 255 bytes, none of them NUL"),
        (
            pa.schema([("u", pa.dense_union([pa.field("a", pa.int8())]))]),
            "type dense_union<a: int8=0> cannot be stored: send a struct with one field per case",
        ),
        (pa.schema([(f"c{i}", pa.int8()) for i in range(4)]), "the schema has 4 fields, nested ones counted; columns_max is 3"),
        (
            pa.schema([("s", pa.struct([("a", pa.int8()), ("b", pa.int8()), ("c", pa.int8())]))]),
            "the schema has 4 fields, nested ones counted; columns_max is 3",
        ),
    ],
)
def test_schemas_that_cannot_be_stored_are_refused(schema: pa.Schema, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        normal_schema(schema, columns_max=3)
    assert str(caught.value) == message


def test_types_may_nest_as_deep_as_the_limit_and_no_deeper() -> None:
    kind = pa.int8()
    for _ in range(31):
        kind = pa.list_(kind)
    normal_schema(pa.schema([("a", kind)]))
    with pytest.raises(RequestError, match="column types may nest 32 deep"):
        normal_schema(pa.schema([("a", pa.list_(kind))]))


def test_schema_id_depends_on_the_normal_schema_alone() -> None:
    first = normal_schema(pa.schema([("a", pa.dictionary(pa.int8(), pa.string()))], metadata={"k": "v"}))
    second = normal_schema(pa.schema([pa.field("a", pa.string_view(), nullable=False)]))
    assert schema_id(first) == schema_id(second)
    assert schema_id(first) != schema_id(pa.schema([("a", pa.large_string())]))
    assert len(schema_id(first)) == 32


WIDENING = [
    (pa.int8(), pa.int64(), pa.int64()),
    (pa.uint8(), pa.int8(), pa.int16()),
    (pa.uint32(), pa.int32(), pa.int64()),
    (pa.uint64(), pa.int8(), None),
    (pa.uint8(), pa.uint32(), pa.uint32()),
    (pa.int16(), pa.float32(), pa.float32()),
    (pa.int32(), pa.float32(), pa.float64()),
    (pa.int64(), pa.float64(), None),
    (pa.uint32(), pa.float64(), pa.float64()),
    (pa.float16(), pa.float64(), pa.float64()),
    (pa.timestamp("s"), pa.timestamp("us"), pa.timestamp("us")),
    (pa.timestamp("ns", "UTC"), pa.timestamp("ms", "UTC"), pa.timestamp("ns", "UTC")),
    (pa.timestamp("us"), pa.timestamp("us", "UTC"), None),
    (pa.decimal128(5, 2), pa.decimal128(10, 4), pa.decimal128(10, 4)),
    (pa.decimal128(38, 0), pa.decimal128(38, 10), pa.decimal256(48, 10)),
    (pa.null(), pa.struct([("a", pa.int8())]), pa.struct([("a", pa.int8())])),
    (pa.string(), pa.large_string(), pa.large_string()),
    (pa.string(), pa.int64(), None),
    (pa.bool_(), pa.int8(), None),
    (pa.date32(), pa.timestamp("s"), None),
    (pa.list_(pa.int8()), pa.list_(pa.int16()), pa.list_(pa.int16())),
    (pa.struct([("a", pa.int8())]), pa.struct([("b", pa.string())]), pa.struct([("a", pa.int8()), ("b", pa.string())])),
    (pa.map_(pa.string(), pa.int8()), pa.map_(pa.string(), pa.int64()), pa.map_(pa.string(), pa.int64())),
    (pa.map_(pa.int8(), pa.int8()), pa.map_(pa.int16(), pa.int8()), None),
    (pa.list_(pa.int8(), 2), pa.list_(pa.int8(), 3), None),
    (pa.list_(pa.timestamp("s")), pa.list_(pa.timestamp("ns")), None),
]


@pytest.mark.parametrize(("a", "b", "joined"), WIDENING)
def test_two_types_join_to_the_least_that_holds_both_exactly(a: pa.DataType, b: pa.DataType, joined: pa.DataType | None) -> None:
    assert join_types(a, b) == joined
    if not pa.types.is_struct(a):
        assert join_types(b, a) == joined


def test_additive_rule_adds_columns_at_the_end_and_ignores_order() -> None:
    current = pa.schema([("a", pa.int32()), ("b", pa.string())])
    incoming = pa.schema([("c", pa.bool_()), ("a", pa.int64())])
    assert evolve("t", current, incoming, "additive") == pa.schema([("a", pa.int64()), ("b", pa.string()), ("c", pa.bool_())])


def test_additive_rule_names_column_types_and_rule_when_it_refuses() -> None:
    with pytest.raises(SchemaMismatch) as caught:
        evolve("t", pa.schema([("a", pa.int64())]), pa.schema([("a", pa.string())]), "additive")
    assert str(caught.value) == (
        "topic 't': column 'a' is int64 in the topic and string in this append; "
        "the additive rule allows only widening that keeps every value exact; nothing was written"
    )


STRICT = pa.schema([("a", pa.int64()), ("b", pa.string())])


@pytest.mark.parametrize(
    ("incoming", "message"),
    [
        (
            pa.schema([("a", pa.int64()), ("b", pa.string()), ("c", pa.int8())]),
            "topic 't': column 'c' (int8) is not in the topic; the strict rule allows no new columns; nothing was written",
        ),
        (
            pa.schema([("a", pa.int64())]),
            "topic 't': column 'b' (string) is missing from this append; the strict rule wants every column; nothing was written",
        ),
        (
            pa.schema([("a", pa.string()), ("b", pa.string())]),
            "topic 't': column 'a' is int64 in the topic and string in this append; "
            "the strict rule allows no change of type; nothing was written",
        ),
        (
            pa.schema([("a", pa.int32()), ("b", pa.string())]),
            "topic 't': column 'a' is int64 in the topic and int32 in this append; "
            "the strict rule allows no change of type; nothing was written",
        ),
    ],
)
def test_strict_rule_refuses_any_change(incoming: pa.Schema, message: str) -> None:
    assert evolve("t", STRICT, pa.schema([("b", pa.string()), ("a", pa.int64())]), "strict") == STRICT
    with pytest.raises(SchemaMismatch) as caught:
        evolve("t", STRICT, incoming, "strict")
    assert str(caught.value) == message
