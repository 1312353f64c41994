"""What an SQL text weighs before it is planned: how deep and how wide its plan gets, and how large a value it makes of little.

A plan copies a common table expression into whatever names it, CUBE makes two sets of each of its columns, and some functions
make a value of any size from a number: forty lines of text can ask for more than any machine has. DataFusion's memory limit
knows what sorts, joins and aggregates keep, and neither plans nor the value that a function is making; and such work cannot
be stopped. So it is reckoned here, over the tokens of the text, and refused beforehand.

Growth is how many times as large as an entry's value, or as 64 bytes of the text, a value of the statement may get: `a || b`
is 2, `repeat(a, 10)` is 10, a column of a query in FROM has what that query made of it. It is a bound as far as a text tells;
that a value is long, or that an aggregate gathers many, it does not: those have nominal sizes.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flight_oplog.errors import RequestError, Unsupported
from flight_oplog.sql.lexer import Token, tokens

# What a chain of makes a tree as deep as it is long, before its operand; between operands, any word does that is not below.
_PREFIXES = frozenset(("NOT", "INTERVAL", "JOIN"))
# Words that neither are operands nor make a tree deeper, each by itself.
_PLAIN = frozenset(
    (  # noqa: SIM905
        "SELECT DISTINCT ALL FROM WHERE GROUP BY HAVING ORDER LIMIT OFFSET FETCH WINDOW VALUES AS ON USING INNER LEFT RIGHT FULL "
        "OUTER CROSS NATURAL SEMI ANTI LATERAL WITH RECURSIVE CASE WHEN THEN ELSE END ASC DESC NULLS FIRST LAST OVER PARTITION "
        "ROWS RANGE INTO INSERT CREATE TABLE VIEW EXPLAIN ANALYZE VERBOSE FILTER WITHIN EXISTS IF REPLACE CURRENT ROW"
    ).split()
)
_ENDS_FROM = frozenset(
    ("SELECT", "WHERE", "GROUP", "HAVING", "WINDOW", "ORDER", "LIMIT", "UNION", "INTERSECT", "EXCEPT", "MINUS", "VALUES")
)
REMEMBERED_CHARACTERS = 4096
# What a plain text may have before a parenthesis, and between operands; and what it has nowhere.
_SHORT_CALLS = frozenset(("COUNT", "SUM", "MIN", "MAX", "AVG", "CAST", "IN", "AND", "OR", "NOT", "WHERE", "BETWEEN", "BY", "SELECT"))
_SHORT_OPERATORS = frozenset(("=", "<", ">", "<=", ">=", "<>", "!=", "+", "-", "*", "/", "%"))
_LONG = frozenset(("LIKE", "ILIKE", "SIMILAR", "OVER", "UNION", "INTERSECT", "EXCEPT"))
_HIDES = re.compile(r"[\"`\\$]|--|/\*|\bWITH\b(?!\s+TIME\s+ZONE\b)", re.IGNORECASE)
_STRING = re.compile(r"'[^']*'")
_TIME = re.compile(r"'[0-9 :.+TZ-]*'")
_ZEROS = str.maketrans("123456789", "0" * 9)
# Growth is told in units of so many bytes. A bound parameter and what an aggregate gathers have nominal sizes, in units.
UNIT_BYTES = 64
_PARAMETER_UNITS, _GATHERED_UNITS = 16, 64
_MOST = 1 << 62
# DataFusion's parser gives up much earlier, and no text needs as many.
DEPTH_MAX = 1000
# Between operands, these begin something new; any other operator may join what is on its sides into one value.
_APART = frozenset(
    ("=", "<", ">", "<=", ">=", "<>", "!=", "+", "-", "*", "/", "%", "AND", "OR", "IS", "IN", "LIKE", "ILIKE", "BETWEEN", "NOT")
)
_BEGINS_QUERY = frozenset(("SELECT", "WITH", "VALUES", "FROM", "TABLE"))
_SET_OPERATORS = frozenset(("UNION", "INTERSECT", "EXCEPT", "MINUS"))


@dataclass(frozen=True)
class Measure:
    """What a text looks like: its first word, its operators, the tables it reads, its growth, and whether it is plain.

    Operators and tables count as often as the plan has them: what a common table expression holds, each time it is named. A
    plain text reads one table once, and asks nothing of an entry that could take long: it compares, reckons and sums up.
    """

    first: str
    operators: int
    tables: int
    growth: int = 1
    is_plain: bool = False


def measure(sql: str) -> Measure:
    """Measure a text. Every word that stands where an operator may counts as one, known or not, but for a few.

    Raises RequestError for a function that makes a value of the size it is told, when the text does not say a number.
    """
    return _remembered(sql) if len(sql) <= REMEMBERED_CHARACTERS else _long(sql)


# One call looks at its text several times over.
@functools.lru_cache(maxsize=8)
def _long(sql: str) -> Measure:
    return _measured(tokens(sql))


def measure_with(sql: str, views: Mapping[str, Measure]) -> Measure:
    """Measure a text that reads views, of which each is copied into it wherever it is named."""
    return _measured(tokens(sql), views)


# A dashboard asks the same over and over.
@functools.lru_cache(maxsize=1024)
def _remembered(sql: str) -> Measure:
    return _of_all_alike(alike(sql))


def alike(sql: str) -> str:
    """Return a text that weighs the same, and is the same for other times in it: of a string without letters only its length counts.

    Where quotes may begin within something else, or strings be names, the text itself.
    """
    return _apart(sql)[0]


def times_in(sql: str) -> Sequence[str]:
    """Return the strings of a text that `alike` does not tell from others, with their quotes."""
    return _apart(sql)[1]


def with_times(sql: str, times: Iterable[str]) -> str:
    """Return a text with others of those strings."""
    others = iter(times)
    return _STRING.sub(lambda found: next(others) if _TIME.fullmatch(found[0]) else found[0], sql)


# One call asks for both, several times over.
@functools.lru_cache(maxsize=64)
def _apart(sql: str) -> tuple[str, Sequence[str]]:
    """Return a text with zeros in its times, and those."""
    if _HIDES.search(sql):
        return sql, ()
    times = [found for found in _STRING.findall(sql) if _TIME.fullmatch(found)]
    return with_times(sql, (time.translate(_ZEROS) for time in times)), times


@functools.lru_cache(maxsize=1024)
def _of_all_alike(sql: str) -> Measure:
    found = list(tokens(sql))
    measured = _measured(found)
    return replace(measured, is_plain=_is_plain(found, measured))


# What functions make of their arguments


@dataclass(slots=True)
class _Argument:
    """An argument: its growth, and the number or the characters that it is when it is written out."""

    growth: int = 0
    number: int | None = None
    characters: int | None = None
    written: str = ""
    is_plain: bool = False  # one token, and no parameter


def _sum(name: str, arguments: Sequence[_Argument]) -> int:
    return sum(each.growth for each in arguments)


def _most(name: str, arguments: Sequence[_Argument]) -> int:
    return max((each.growth for each in arguments), default=0)


def _product(name: str, arguments: Sequence[_Argument]) -> int:
    return math.prod(max(1, each.growth) for each in arguments)


def _number(name: str, argument: _Argument) -> int:
    if argument.number is None:
        raise RequestError(f"{name} makes a value as large as it is told: write that as a number in the text")
    return abs(argument.number)


def _repeated(name: str, arguments: Sequence[_Argument]) -> int:
    return _number(name, arguments[1]) * max(1, arguments[0].growth) if len(arguments) > 1 else 1


def _padded(name: str, arguments: Sequence[_Argument]) -> int:
    return arguments[0].growth + _number(name, arguments[1]) // UNIT_BYTES if len(arguments) > 1 else 1


def _counted(name: str, arguments: Sequence[_Argument]) -> int:
    return sum(_number(name, each) for each in arguments) * 8 // UNIT_BYTES


def _sketched(name: str, arguments: Sequence[_Argument]) -> int:
    """A sketch has as many parts of 16 bytes as an argument says, somewhere after what it is made of."""
    told = [each for each in arguments[2 if "weight" in name else 1 :] if each.number is not None or not each.is_plain]
    return _sum(name, arguments) + sum(_number(name, each) for each in told) * 16 // UNIT_BYTES


def _resized(name: str, arguments: Sequence[_Argument]) -> int:
    if len(arguments) < 2:
        return 1
    return arguments[0].growth + _number(name, arguments[1]) * _sum(name, arguments[2:]) + _counted(name, arguments[1:2])


def _replaced(name: str, arguments: Sequence[_Argument]) -> int:
    """Each character of the first may become the last, or be followed by it."""
    with_what = arguments[2 if "replace" in name else 1 :][:1]
    times = [_PARAMETER_UNITS * each.growth if each.characters is None else each.characters for each in with_what]
    return max(1, arguments[0].growth) * max(1, *times, 1) if arguments else 1


def _gathered(name: str, arguments: Sequence[_Argument]) -> int:
    return _GATHERED_UNITS * max(1, _sum(name, arguments))


def _cast(name: str, arguments: Sequence[_Argument]) -> int:
    """A type may have a size, in the text of the second argument."""
    if len(arguments) < 2:
        return 1
    sizes = [int(size) for size in _SIZES.findall(arguments[1].written)]
    if arguments[1].characters is None:
        raise RequestError(f"{name} takes its type as one string in the text")
    return max(1, arguments[0].growth) * max(1, math.prod(sizes) * (8 if "List" in arguments[1].written else 1) // UNIT_BYTES)


def _under(rule: Callable[[str, Sequence[_Argument]], int], *names: str) -> dict[str, Callable[[str, Sequence[_Argument]], int]]:
    return dict.fromkeys(names, rule)


_SIZES = re.compile(r"FixedSize\w*\s*\(\D*(\d+)", re.IGNORECASE)
# By name in lower case; any other function makes at most what its arguments are together. A product is time, not size.
_RULES = {
    **_under(_repeated, "repeat", "array_repeat", "list_repeat"),
    **_under(_padded, "lpad", "rpad"),
    **_under(_counted, "range", "generate_series"),
    **_under(_resized, "array_resize", "list_resize"),
    **_under(_replaced, "replace", "regexp_replace", "array_replace", "array_replace_n", "array_replace_all"),
    **_under(_replaced, "list_replace", "list_replace_n", "list_replace_all"),
    **_under(_replaced, "array_to_string", "list_to_string", "array_join", "list_join"),
    **_under(_sketched, "approx_percentile_cont", "approx_percentile_cont_with_weight"),
    **_under(_gathered, "array_agg", "string_agg"),
    **_under(_product, "levenshtein", "array_has_all", "array_has_any", "list_has_all", "list_has_any", "arrays_overlap"),
    **_under(_cast, "arrow_cast", "arrow_try_cast"),
    **_under(_most, "in", "values"),
    "encode": lambda name, arguments: 2 * _sum(name, arguments),
}
_SETS: dict[str, Callable[[int], int]] = {"cube": lambda n: 1 << min(n, 62), "rollup": lambda n: n + 1, "sets": lambda n: n}


# The walk


@dataclass(slots=True)
class _Part:
    """What stands between two brackets, or CASE and END, or is the whole text; with what is within it, once that has ended."""

    opened: str = ""
    function: str = ""  # in lower case, of a call
    is_query: bool = False
    is_source: bool = False  # it stands where a table may
    defines: str | None = None  # the common table expression that it is
    operators: int = 0
    tables: int = 0
    in_from: bool = False  # a comma here separates tables
    expects_table: bool = False
    chain: int = 0  # growth of the operands joined so far
    joins: bool = False  # the next operand is joined to them
    longest: int = 0
    source: int = 1  # growth of what is read
    sets: int = 1  # grouping sets
    branches: int = 0  # growth of what is before UNION
    items: int = 0  # tokens of the argument under way
    argument: _Argument = field(default_factory=_Argument)
    arguments: list[_Argument] = field(default_factory=list)
    begun: bool = False  # its SELECT has come
    with_names: bool = False  # names of common table expressions may follow
    names: str | None = None
    gathers: bool = False  # array_agg or its like has come

    def operand(self, growth: int) -> None:
        if not self.joins:
            self.longest = max(self.longest, self.chain)
            self.chain = 0
        self.chain = min(_MOST, self.chain + growth)
        self.joins = False

    def end_argument(self) -> None:
        self.argument.growth = max(self.longest, self.chain)
        if self.items != 1:
            self.argument.number = self.argument.characters = None
            self.argument.is_plain = False
        if self.items:
            self.arguments.append(self.argument)
        self.argument = _Argument()
        self.items = self.chain = self.longest = 0
        self.joins = False

    def end_branch(self) -> None:
        self.branches = min(_MOST, max(self.branches, max(self.longest, self.chain, 1) * self.source))
        self.operators += min(self.sets, _MOST) - 1
        self.chain = self.longest = 0
        self.joins = self.in_from = self.expects_table = False
        self.source = self.sets = 1

    def growth(self) -> int:
        """End it; return the growth of the value that it is."""
        if self.is_query:
            self.end_branch()
            return self.branches
        self.end_argument()
        rule = _RULES.get(self.function, _sum) if self.opened == "(" else _sum
        if self.is_source and self.function in ("range", "generate_series"):
            rule = _most  # these have rows, not one value
        return min(_MOST, rule(self.function, self.arguments))


class _Walk:
    """One pass over the tokens of a text."""

    def __init__(self, known: Mapping[str, Measure]) -> None:
        self.first = ""
        self.parts = [_Part(is_query=True)]
        self._known = known
        self._defined: dict[str, Measure] = {}
        self._named: set[str] = set()
        self._after_operand = False
        self._before: Token | None = None
        self._operand: Token | None = None  # the last word or name that is one
        self._source: Token | None = None  # the last that names a table

    def over(self, found: Iterable[Token]) -> Measure:
        for token in found:
            getattr(self, f"_{token.kind}", self._value)(token)
            self._before = token
            if len(self.parts) > DEPTH_MAX:
                raise RequestError(f"the SQL text has brackets more than {DEPTH_MAX} deep")
        while len(self.parts) > 1:
            self._close()
        [whole] = self.parts
        growth = whole.growth()
        unnamed = [each for name, each in self._defined.items() if name not in self._named]
        operators = whole.operators + sum(each.operators for each in unnamed)
        tables = whole.tables + sum(each.tables for each in unnamed)
        return Measure(self.first, min(operators, _MOST), min(tables, _MOST), max([growth, *(each.growth for each in unnamed)]))

    def _operator_counts(self) -> None:
        self.parts[-1].operators += 1
        self._after_operand = False

    def _word(self, token: Token) -> None:
        part, word = self.parts[-1], token.text.upper()
        self.first = self.first or word
        if not part.items and not part.chain and word in _BEGINS_QUERY:
            part.is_query = True
        if self._is_name(token, token.text.lower()):
            return
        part.items += 1
        if word in ("FROM", "JOIN"):
            part.tables += 1
            part.expects_table = part.is_query
        if word == "OVER" and part.gathers:
            raise Unsupported("array_agg and string_agg are not served with OVER: every row would hold the values of those before it")
        part.in_from = word == "FROM" or (part.in_from and word not in _ENDS_FROM and not (word == "WITH" and part.items == 1))
        part.expects_table = part.expects_table and word in ("FROM", "JOIN", "LATERAL")
        if word in _SET_OPERATORS and part.is_query:
            part.end_branch()
        part.begun = part.begun or word in ("SELECT", "VALUES", "FROM")
        part.with_names = part.is_query and not part.begun and (part.with_names or word == "WITH")
        if word in _PLAIN:
            part.operand(0)
            self._after_operand = False
        elif self._after_operand or word in _PREFIXES:
            self._operator_counts()
            part.joins = word not in _APART
        else:
            part.operand(1)
            part.argument.is_plain = True
            self._operand = token
            self._after_operand = True
        if word == "CASE":
            self.parts.append(_Part("CASE"))
        elif word == "END" and part.opened == "CASE":
            self._close()

    def _is_name(self, token: Token, name: str) -> bool:
        """Whether a token is the name of a table, or of a common table expression that is about to be defined.

        Almost any word may be one, and a string too.
        """
        part, word = self.parts[-1], token.text.upper()
        if part.expects_table and word != "LATERAL" and (part.items or word not in _BEGINS_QUERY):
            part.expects_table = False
            part.items += 1
            self._source = token
            self._named.add(name)
            if (known := self._defined.get(name, self._known.get(name))) is not None:
                part.operators = min(_MOST, part.operators + known.operators)
                part.tables = min(_MOST, part.tables + max(known.tables, 1) - 1)
                part.source = max(part.source, known.growth)
            self._after_operand = True
            return True
        before = "" if self._before is None else self._before.text.upper()
        if part.with_names and (before in ("RECURSIVE", ",") or (before == "WITH" and word != "RECURSIVE")):
            part.names = name
            self._after_operand = True
            return True
        return False

    def _value(self, token: Token) -> None:
        quote = token.text[0]
        if token.kind in ("quoted", "string") and self._is_name(token, token.text[1:-1].replace(quote * 2, quote)):
            return
        part = self.parts[-1]
        part.items += 1
        part.argument.is_plain = token.kind != "parameter"
        if token.kind == "number":
            part.argument.number = _whole(token.text)
            part.operand(0)
        elif token.kind == "string":
            part.argument.characters, part.argument.written = len(token.text), token.text
            part.operand(1 + len(token.text) // UNIT_BYTES)
        else:
            part.operand(_PARAMETER_UNITS if token.kind == "parameter" else 1)
            self._operand = token
        self._after_operand = True

    def _operator(self, token: Token) -> None:
        part = self.parts[-1]
        self._operator_counts()
        if token.text in ("-", "+") and not part.items:
            return  # a sign
        part.items += 1
        part.joins = token.text not in _APART
        for bracket in token.text:
            if bracket in "[{":
                self.parts.append(_Part(bracket))

    def _point(self, token: Token) -> None:
        part = self.parts[-1]
        if token.text == "(":
            self._open()
        elif token.text in ")]}":
            while part.opened == "CASE":
                self._close()
                part = self.parts[-1]
            if len(self.parts) > 1:
                self._close()
        elif token.text == ",":
            part.gathers = False
            part.tables += part.in_from
            part.expects_table = part.in_from
            part.operand(0)
            if not part.is_query:
                part.end_argument()
        elif token.text == ".":  # what follows is the same operand
            part.chain = max(0, part.chain - 1)
            part.joins = True
            part.expects_table = self._before is self._source
        self._after_operand = token.text in ")]}"

    def _open(self) -> None:
        part, before = self.parts[-1], self._before
        opened = _Part("(")
        if part.expects_table:
            opened.is_query = opened.is_source = opened.expects_table = True
            opened.in_from, part.expects_table = True, False
        elif part.names is not None and before is not None and before.text.upper() in ("AS", "MATERIALIZED"):
            opened.is_query, opened.defines, part.names = True, part.names, None
        elif before is not None and before.kind in ("word", "quoted"):
            opened.function = before.text.strip('"`').lower()
            opened.is_source = before is self._source
            if before is self._operand:  # it was no operand
                part.chain, part.joins = max(0, part.chain - 1), True
        self.parts.append(opened)

    def _close(self) -> None:
        part = self.parts.pop()
        above = self.parts[-1]
        growth = part.growth()
        if part.defines is not None:
            known = self._defined.get(part.defines, Measure("", 0, 0))
            self._defined[part.defines] = Measure(
                "", max(known.operators, part.operators), max(known.tables, part.tables), max(known.growth, growth)
            )
            return
        above.operators = min(_MOST, above.operators + part.operators)
        above.tables = min(_MOST, above.tables + part.tables)
        if part.function in _SETS:
            above.sets = min(_MOST, above.sets * max(1, _SETS[part.function](len(part.arguments))))
        elif part.is_source:
            above.source = max(above.source, growth)
        else:
            above.items += 1
            above.joins = above.joins or part.opened != "("
            above.operand(growth)
            above.gathers = above.gathers or (_RULES.get(part.function) is _gathered and part.opened == "(")


def _whole(text: str) -> int | None:
    return int(text) if text.isdigit() and len(text) < 20 else None if not text.isdigit() else _MOST


def _measured(found: Iterable[Token], known: Mapping[str, Measure] | None = None) -> Measure:
    return _Walk(known or {}).over(found)


def _is_plain(found: Sequence[Token], measured: Measure) -> bool:
    if measured.first != "SELECT" or measured.tables != 1:
        return False
    words = [token.text.upper() for token in found if token.kind == "word"]
    calls = {one.text.upper() for one, other in itertools.pairwise(found) if one.kind in ("word", "quoted") and other.text == "("}
    operators = {token.text for token in found if token.kind == "operator"}
    return words.count("SELECT") == 1 and calls <= _SHORT_CALLS and operators <= _SHORT_OPERATORS and not _LONG & set(words)
