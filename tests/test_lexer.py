"""What is told of an SQL text without parsing it."""

import contextlib
import time

import pytest

from flight_oplog.errors import RequestError
from flight_oplog.sql import lexer
from flight_oplog.sql.measure import REMEMBERED_CHARACTERS, Measure, measure

NUMBERED = {
    "SELECT ?, '?', \"?\" FROM t -- ?\nWHERE a = ? /* ? */": ("SELECT $1, '?', \"?\" FROM t -- ?\nWHERE a = $2 /* ? */", ["1", "2"]),
    "SELECT $2, $1, $2": ("SELECT $2, $1, $2", ["1", "2"]),
    "a = $x AND b = $y OR c = $x": ("a = $1 AND b = $2 OR c = $1", ["x", "y"]),
    "SELECT 'it''s $1', $$ ? $$, `?`": ("SELECT 'it''s $1', $$ ? $$, `?`", []),
    "SELECT 1": ("SELECT 1", []),
}


@pytest.mark.parametrize("sql", NUMBERED)
def test_parameters_of_every_kind_become_numbered_ones(sql: str) -> None:
    assert lexer.numbered(sql) == NUMBERED[sql]


@pytest.mark.parametrize("sql", ["SELECT ?, $1", "SELECT ?, $x", "SELECT $1, $3", "SELECT $1, $x", "SELECT $0"])
def test_parameters_of_two_kinds_or_with_gaps_are_refused(sql: str) -> None:
    with pytest.raises(RequestError, match="use one kind"):
        lexer.numbered(sql)


def test_an_insert_of_one_row_of_values_becomes_a_select_from_the_bound_rows() -> None:
    def select(sql: str) -> str | None:
        return lexer.as_select(sql, "bound")

    assert select("INSERT INTO t VALUES ($1, $2)") == 'INSERT INTO t \nSELECT "p1" AS c0, "p2" AS c2 FROM bound'
    assert select("insert into public.t (a, b) values ($1, 'it''s', NULL, 5 -- note\n) ; ") == (
        "insert into public.t (a, b) \nSELECT \"p1\" AS c0, 'it''s' AS c2, NULL AS c4, 5 AS c6 FROM bound"
    )
    for other in (
        *(
            "INSERT INTO t VALUES ($1), ($2)",
            "INSERT INTO t SELECT $1",
            "INSERT INTO t VALUES ($1",
            "SELECT ($1)",
            "INSERT INTO t VALUES ()",
        ),
        *("INSERT INTO t VALUES (max($1))", "INSERT INTO t VALUES (DISTINCT $1)", "INSERT INTO t VALUES ($1 + 1)", "", "VALUES ($1)"),
        *("INSERT INTO t VALUES ((SELECT $1))", "INSERT INTO t VALUES ($1, x)", "INSERT INTO t (a) VALUES ($1) RETURNING a"),
    ):
        assert select(other) is None, other


def test_where_strings_and_comments_end_is_as_the_parser_has_it() -> None:
    hidden = "1" + " + 1" * 50
    for text in (
        f"SELECT E'\\'', {hidden}, 'x'",
        f"SELECT e'\\\\', {hidden}",
        f"SELECT /* /* */ ' */ {hidden}, 'x'",
        f"SELECT R'\\', {hidden}, 'x'",
        f"SELECT 'a\\', {hidden}, 'x'",
        f'SELECT "a""b", {hidden}',
        f"SELECT `a'`, {hidden}, 'x'",
        f"SELECT $$ ' $$, {hidden}, 'x'",
        f"SELECT 1 -- '\n, {hidden}",
        f"SELECT a$b, {hidden}",
    ):
        assert measure(text).operators >= 50, text
    assert measure("SELECT E'\\' + 1 + 1', 'x'").operators == 0
    assert lexer.numbered("SELECT a$1, E'\\'?', b") == ("SELECT a$1, E'\\'?', b", [])


@pytest.mark.parametrize(
    "text",
    [
        "SELECT 'a",
        'SELECT "a',
        "SELECT `a",
        "SELECT /* a",
        "SELECT /* /* */",
        "SELECT E'\\'",
        "SELECT $$a",
        "SELECT $a$ ' $a$",
        "SELECT $²",
    ],
)
def test_a_text_whose_end_cannot_be_told_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"that does not end|where nothing begins with it"):
        list(lexer.tokens(text))


@pytest.mark.parametrize(
    "word", ["XOR", "RLIKE", "MINUS SELECT", "MEMBER OF", "AT TIME ZONE", "@@", "INTERVAL", ":", "NEVERHEARD", "#", "||"]
)
def test_any_word_between_operands_counts(word: str) -> None:
    chain = f" {word} ".join(["1"] * 100) if word != "INTERVAL" else "INTERVAL " * 100 + "'1'"
    assert measure(f"SELECT {chain}").operators >= 50
    assert measure("SELECT " + ", ".join(f"t.column{n} AS c{n}" for n in range(2000)) + " FROM t").operators < 10


@pytest.mark.parametrize(
    "text", ["/* a " * 100_000, "'" * 99_999, "$a" + ",$b" * 100_000, "INSERT INTO t" + " " * 500_000 + "x", "((" * 200_000]
)
def test_no_text_takes_long(text: str) -> None:
    began = time.monotonic()
    for look in (measure, lexer.numbered, lexer.names, lambda sql: lexer.as_select(sql, "bound")):
        with contextlib.suppress(RequestError):
            look(text)
    assert time.monotonic() - began < 10


def test_parameters_that_say_how_many_rows_are_told() -> None:
    assert lexer.limits("SELECT $1 FROM t WHERE a = $2 LIMIT $3 OFFSET /* rows */ $4") == [3, 4]
    assert lexer.alone("SELECT $1, '$2', $2 FROM t LIMIT $12", 2) == "SELECT NULL, '$2', $1 FROM t LIMIT NULL"


def test_a_text_is_measured_with_strings_and_comments_aside() -> None:
    assert measure("/* UPDATE */ -- x\n(SELECT a FROM t, u WHERE a = 'b, c' AND NOT d)") == Measure("SELECT", 3, 2)
    assert measure("") == Measure("", 0, 0)
    assert lexer.keywords('CREATE TABLE "check" (a INT) -- UNIQUE') == {"CREATE", "TABLE", "A", "INT"}
    assert lexer.names('SELECT "A""b", c FROM Log.t, LOG.u') == {
        **{"select": 1, 'A"b': 1, "c": 1, "from": 1, "log": 2, "t": 1, "u": 1},
    }


@pytest.mark.parametrize(
    ("sql", "plain"),
    [
        ("SELECT * FROM t WHERE a = 1 AND (b IN ('x', 'y') OR NOT (c < 2 * (d + 1)))", True),
        ("SELECT count(*), sum(a) FROM t WHERE ts >= CAST('2026-01-01' AS TIMESTAMP WITH TIME ZONE)", True),
        ("SELECT a, avg(b) FROM log.t GROUP BY a ORDER BY a LIMIT 3", True),
        ("SELECT 'a LIKE b, repeat(c)' FROM t -- regexp_like(x)", True),
        ("SELECT a FROM t WHERE b LIKE '%a%b%'", False),
        ("SELECT a FROM t WHERE b ~ '(a+)+$'", False),
        ("SELECT regexp_replace(a, 'x', 'y') FROM t", False),
        ('SELECT "repeat" (a, 1000000000) FROM t', False),
        ("SELECT repeat(a, 1000000000) FROM t", False),
        ("SELECT sum(a) OVER (ORDER BY b) FROM t", False),
        ("SELECT count(DISTINCT a) FROM t, u", False),
        ("SELECT a FROM t JOIN u USING (a)", False),
        ("SELECT a FROM (SELECT a FROM t)", False),
        ("WITH u AS (SELECT a FROM t) SELECT a FROM u", False),
        ("SELECT value FROM generate_series(1, 1000000000)", False),
        ("SELECT a FROM t UNION SELECT a FROM t", False),
        ("SELECT 1", False),
        ("EXPLAIN SELECT a FROM t", False),
        ("SELECT a FROM t" + " " * REMEMBERED_CHARACTERS, False),
    ],
)
def test_a_plain_text_can_only_take_long_over_many_entries(sql: str, plain: bool) -> None:
    assert measure(sql).is_plain is plain
