"""What is told of an SQL text without parsing it."""

import pytest

from flight_oplog import sqltext
from flight_oplog.errors import RequestError

NUMBERED = {
    "SELECT ?, '?', \"?\" FROM t -- ?\nWHERE a = ? /* ? */": ("SELECT $1, '?', \"?\" FROM t -- ?\nWHERE a = $2 /* ? */", ["1", "2"]),
    "SELECT $2, $1, $2": ("SELECT $2, $1, $2", ["1", "2"]),
    "a = $x AND b = $y OR c = $x": ("a = $1 AND b = $2 OR c = $1", ["x", "y"]),
    "SELECT 'it''s $1', $$ ? $$, `?`": ("SELECT 'it''s $1', $$ ? $$, `?`", []),
    "SELECT 1": ("SELECT 1", []),
}


@pytest.mark.parametrize("sql", NUMBERED)
def test_parameters_of_every_kind_become_numbered_ones(sql: str) -> None:
    assert sqltext.numbered(sql) == NUMBERED[sql]


@pytest.mark.parametrize("sql", ["SELECT ?, $1", "SELECT ?, $x", "SELECT $1, $3", "SELECT $1, $x", "SELECT $0"])
def test_parameters_of_two_kinds_or_with_gaps_are_refused(sql: str) -> None:
    with pytest.raises(RequestError, match="use one kind"):
        sqltext.numbered(sql)


def test_an_insert_of_one_row_of_values_becomes_a_select_from_the_bound_rows() -> None:
    def select(sql: str) -> str | None:
        return sqltext.as_select(sql, "bound")

    assert select("INSERT INTO t VALUES ($1, $2)") == 'INSERT INTO t SELECT "1", "2" FROM bound'
    assert select("insert into public.t (a, b) values (lower($1), ')' || $2) ; ") == (
        'insert into public.t (a, b) SELECT lower("1"), \')\' || "2" FROM bound'
    )
    for other in ("INSERT INTO t VALUES ($1), ($2)", "INSERT INTO t SELECT $1", "INSERT INTO t VALUES ($1", "SELECT ($1)"):
        assert select(other) is None


def test_parameters_that_say_how_many_rows_are_told() -> None:
    assert sqltext.limits("SELECT $1 FROM t WHERE a = $2 LIMIT $3 OFFSET /* rows */ $4") == [3, 4]
    assert sqltext.alone("SELECT $1, '$2', $2 FROM t LIMIT $12", 2) == "SELECT NULL, '$2', $1 FROM t LIMIT NULL"


def test_a_text_is_measured_with_strings_and_comments_aside() -> None:
    assert sqltext.measure("/* UPDATE */ -- x\n(SELECT a FROM t, u WHERE a = 'b, c' AND NOT d)") == sqltext.Measure("SELECT", 3, 2)
    assert sqltext.measure("") == sqltext.Measure("", 0, 0)
    assert sqltext.keywords('CREATE TABLE "check" (a INT) -- UNIQUE') == {"CREATE", "TABLE", "A", "INT"}
    assert sqltext.names('SELECT "A""b", c FROM Log.t') == {"select", 'A"b', "c", "from", "log", "t"}
