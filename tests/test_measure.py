"""What a text weighs: how often its plan has what it names, and how large a value it makes of little."""

import contextlib
import re

import pytest

from flight_oplog.errors import RequestError, Unsupported
from flight_oplog.sql.measure import DEPTH_MAX, Measure, _of_all_alike, measure, measure_with

# Operators, tables and growth.
MEASURED = {
    "SELECT a || b || t.c FROM t": (2, 1, 3),
    "SELECT a + b, c * 2, lower(d) FROM t WHERE e = 'x' AND f LIKE '%y'": (5, 1, 1),
    "SELECT s || CASE WHEN true THEN s END FROM t": (1, 1, 2),
    "SELECT ARRAY[a, a], {'k': a} FROM t": (3, 1, 3),
    "SELECT a IN ('x', 'y', 'z'), coalesce(a, b) FROM t": (1, 1, 2),
    "SELECT x::timestamp with time zone, s || s FROM t": (3, 1, 2),
    "SELECT 'a' || $1": (1, 0, 17),
    "SELECT repeat(a, 10), repeat('x', 3) FROM t": (0, 1, 10),
    "SELECT \"repeat\"(repeat('x', 1000), 1000)": (0, 0, 1_000_000),
    "SELECT lpad(a, 640, '0'), lpad(b, 64) FROM t": (0, 1, 11),
    "SELECT range(0, 800)": (0, 0, 100),
    "SELECT * FROM range(0, 800000000)": (1, 1, 1),
    "SELECT * FROM t JOIN u ON t.a = ANY(range(0, 800))": (3, 2, 100),
    "SELECT replace('xxxx', 'x', '1234567890')": (0, 0, 12),
    "SELECT approx_percentile_cont(a, 0.5, 400) FROM t": (0, 1, 101),
    "SELECT approx_percentile_cont_with_weight(a, b + 1, 0.5) FROM t": (1, 1, 2),
    "SELECT list_resize([a]), repeat(a), lpad(a), arrow_cast(a) FROM t": (1, 1, 1),
    "SELECT arrow_cast(a, 'FixedSizeBinary(6400)') FROM t": (0, 1, 100),
    "SELECT a FROM (SELECT b || c AS a FROM t) AS x, (SELECT 1) AS y": (1, 3, 2),
    "SELECT a || a FROM (SELECT b || c AS a FROM t) AS x": (2, 2, 4),
    "SELECT a FROM t UNION ALL SELECT b || c FROM t UNION ALL SELECT d FROM t": (3, 3, 2),
    "SELECT count(*) FROM t GROUP BY CUBE(a, b, c)": (8, 1, 1),
    "SELECT count(*) FROM t GROUP BY ROLLUP(a, b), GROUPING SETS ((a), (b))": (7, 1, 1),
    "SELECT extract(year FROM ts), substring(s FROM 1 FOR 2) FROM t": (1, 3, 1),
    "WITH c AS (SELECT a FROM t, u) SELECT 1 FROM c AS x, c AS y, \"c\" AS z, 'c', (c)": (0, 10, 1),
    **{
        f"WITH RECURSIVE {name} AS (SELECT a FROM t, u) SELECT 1 FROM {name}, {name}": (0, 4, 1)
        for name in ("recursive", "unnest", "'c'", "`c`", "values")
    },
    "WITH c AS (SELECT a || b AS a FROM t), d AS (SELECT a || a AS a FROM c) SELECT a FROM d": (2, 1, 4),
    "WITH unread AS (SELECT a FROM t, u, v) SELECT 1": (0, 3, 1),
    "WITH c AS (SELECT 1 FROM t, t, t), d AS (WITH c AS (SELECT 1) SELECT 1 FROM c) SELECT 1 FROM c": (0, 6, 1),
    "WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM r) SELECT n FROM r": (2, 1, 1),
    "INSERT INTO t WITH c AS (SELECT 1) SELECT 1 FROM c": (0, 1, 1),
}


@pytest.mark.parametrize("sql", MEASURED)
def test_operators_tables_and_growth_are_as_the_plan_will_have_them(sql: str) -> None:
    found = measure(sql)
    assert (found.operators, found.tables, found.growth) == MEASURED[sql]


@pytest.mark.parametrize(
    "sql",
    [
        *MEASURED,
        "SELECT count(*) FROM t WHERE a >= CAST('2025-01-02 03:04:05.678+00:00' AS TIMESTAMP WITH TIME ZONE) AND b = '17'",
        "SELECT replace('11', '1', '1234567890' || repeat('12', 34)), 'a''12''' - 5 - '6' FROM t WHERE a = '' || '3'",
        "WITH '1' AS (SELECT a || a AS a FROM t, u), '2' AS (SELECT 1) SELECT * FROM '2', '2'",
        "WITH c AS (SELECT 1 FROM '1', '2') SELECT CAST('2' AS TIMESTAMP WITH TIME ZONE) FROM c, c",
        'SELECT "\'12", repeat(a, 34), "\'" FROM t',
        "SELECT 1 -- '\n, repeat(a, 34) -- '\nFROM t",
        "SELECT 1 /* ' */, repeat(a, 34) /* ' */ FROM t",
        "SELECT 1 /* ' */ - 12 /* ' */, repeat(a, 34) FROM t",
        "SELECT e'\\'', repeat(a, 34), '' FROM t",
        "SELECT $$'$$ - 34 - $$'$$ FROM t",
        "SELECT repeat(a, 34), `'` - 34 - `'` FROM t",
    ],
)
def test_a_text_weighs_what_it_does_whatever_was_measured_before(sql: str) -> None:
    for digit in "012":
        with contextlib.suppress(RequestError):
            measure(re.sub("[0-9]", digit, sql))  # which is known then
    found, alone = measure(sql), measure_with(sql, {})
    assert (found.first, found.operators, found.tables, found.growth) == (alone.first, alone.operators, alone.tables, alone.growth)


def test_a_text_with_other_times_is_not_measured_again() -> None:
    def asked(second: int) -> str:
        return f"SELECT count(*) FROM t WHERE a >= CAST('2025-01-02 03:04:{second:02}.678+00:00' AS TIMESTAMP WITH TIME ZONE) AND b = 'x'"

    measure(asked(0))
    before = _of_all_alike.cache_info().misses
    assert len({measure(asked(second)) for second in range(60)}) == 1
    assert _of_all_alike.cache_info().misses == before


def test_what_views_hold_counts_where_they_are_named() -> None:
    views = {"v": Measure("SELECT", 3, 10, 5)}
    assert measure_with("SELECT * FROM v JOIN public.v AS w USING (a)", views).tables == 20
    found = measure_with("WITH c AS (SELECT s || s AS s FROM v) SELECT * FROM c, c AS d", views)
    assert (found.tables, found.growth) == (20, 10)


@pytest.mark.parametrize(
    "call",
    [
        "repeat(a, b)",
        "lpad(a, length(b))",
        "range(1, $1)",
        "array_resize(a, 2 * 2)",
        "repeat(n => 5, str => 'x')",
        "approx_percentile_cont(a, 0.5, 1 + 1)",
    ],
)
def test_a_size_that_is_no_number_in_the_text_is_refused(call: str) -> None:
    with pytest.raises(RequestError) as caught:
        measure(f"SELECT {call} FROM t")
    name = call.partition("(")[0]
    assert str(caught.value) == f"{name} makes a value as large as it is told: write that as a number in the text"


def test_what_gathers_values_is_no_window_function() -> None:
    assert measure("SELECT array_agg(a), sum(b) OVER () FROM t").growth == 64
    for window in ("array_agg(a) OVER ()", "string_agg(a, ',') FILTER (WHERE b) OVER w"):
        with pytest.raises(Unsupported, match="are not served with OVER: every row would hold the values of those before it"):
            measure(f"SELECT 1, {window} FROM t")


def test_brackets_one_deeper_than_their_limit_are_refused() -> None:
    assert measure("(" * (DEPTH_MAX - 1) + ")" * (DEPTH_MAX - 1)).growth == 1
    with pytest.raises(RequestError, match=f"the SQL text has brackets more than {DEPTH_MAX} deep"):
        measure("(" * DEPTH_MAX + ")" * DEPTH_MAX)


HEAVY = (
    "SELECT repeat(repeat('x', 1000), 1000) AS word",
    "SELECT s || s || s AS word FROM t",
    "WITH a AS (SELECT repeat('x', 1000) AS word), b AS (SELECT word || word AS word FROM a), c AS (SELECT word || word AS word FROM b) "
    "SELECT word FROM c, t",
    "SELECT word FROM t, (WITH a AS (SELECT 'x' AS word), b AS (SELECT repeat(word, 1000) AS word FROM a) SELECT word FROM b) AS y",
    "SELECT word FROM t UNION ALL SELECT repeat(word, 1000) FROM t",
    "VALUES (repeat('x', 1000)), ('y')",
    "SELECT a, count(*) FROM t, u GROUP BY CUBE (a, b, c)",
)
HIDDEN = (
    "SELECT * FROM ({})",
    "SELECT * FROM (({}))",
    "SELECT * FROM t, ({}) AS x",
    "SELECT * FROM ({}) AS x, ({}) AS y",
    "SELECT * FROM t JOIN LATERAL ({}) AS x ON true",
    "SELECT * FROM (WITH z AS ({}) SELECT * FROM z)",
    "SELECT * FROM (WITH y AS (SELECT 1), z AS ({}) SELECT * FROM z, y)",
    "WITH z AS ({}), y AS (SELECT * FROM z) SELECT * FROM y",
    "SELECT (SELECT word FROM ({}) AS x)",
    "SELECT a FROM t WHERE a IN ({})",
    "SELECT a FROM t WHERE EXISTS ({}) ORDER BY ({})",
    "({})",
    "SELECT 1 UNION ({})",
    "EXPLAIN {}",
    "INSERT INTO t {}",
    "CREATE VIEW v AS {}",
    "CREATE TABLE v AS ({})",
)


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("heavy", HEAVY)
def test_what_is_within_another_statement_weighs_what_it_does_alone(heavy: str, hidden: str) -> None:
    alone, within = measure(heavy), measure(hidden.replace("{}", heavy))
    assert within.growth >= alone.growth
    assert within.tables >= alone.tables
    assert within.operators >= alone.operators
