"""What can be told of an SQL text without parsing it: its tokens, its names, its parameters.

DataFusion parses; this looks at the text before it does. It finds out what must not reach the parser, and gives every
parameter the one form that DataFusion binds, `$1`, `$2`, ... Where a string, a name or a comment ends is decided as
sqlparser's generic dialect does; where that cannot be told, the text is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from flight_oplog.errors import RequestError

# One token, each alternative linear in its length. Strings, quoted names and comments are only begun here.
_TOKEN = re.compile(
    r"(?P<space>\s+|--[^\n]*)"
    r"|(?P<comment>/\*)"
    r"|(?P<escaped>[eE]')"
    r"|(?P<string>(?:[nNrRbBxX]|[uU]&)?')"
    r"|(?P<quoted>[\"`])"
    r"|(?P<dollars>\$\$)"
    r"|(?P<parameter>\?|\$(?:[0-9]{1,5}|[A-Za-z_][A-Za-z0-9_]{0,63})(?![\w$]))"
    r"|(?P<number>[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)"
    r"|(?P<word>(?:[^\W\d]|[#@])[\w@$#]*)"
    r"|(?P<point>[(),;.\]}])"
    r"|(?P<operator>[^\s\w\"'`$(),;.#@?\]}]+?(?=/\*|--|[\s\w\"'`$(),;.#@?\]}]|$))"
    r"|(?P<other>.)",
    re.DOTALL,
)
_ESCAPED = re.compile(r"(?:[^'\\]|\\.|'')*'", re.DOTALL)
_COMMENT_END = re.compile(r"/\*|\*/")
_UNENDED = "the SQL text has a string, a quoted name or a comment that does not end"


class Token(NamedTuple):
    """A token: its kind (word, quoted, string, number, parameter, operator, point), its text and where it is."""

    kind: str
    text: str
    start: int
    end: int


def tokens(sql: str) -> Iterator[Token]:
    """Yield the tokens of a text, in time linear in its length. Raises RequestError where they cannot be told apart."""
    place = 0
    while place < len(sql):
        found = _TOKEN.match(sql, place)
        assert found is not None, "the last alternative takes any character"
        kind, start, place = str(found.lastgroup), place, found.end()
        if kind == "space":
            continue
        if kind == "comment":
            place = _after_comment(sql, place)
            continue
        if kind == "other":
            raise RequestError(f"the SQL text has {found[0]!r} where nothing begins with it; quote it, or leave out tags of dollar quotes")
        if kind == "escaped":
            ended = _ESCAPED.match(sql, place)
            if ended is None:
                raise RequestError(_UNENDED)
            kind, place = "string", ended.end()
        elif kind in ("string", "quoted"):
            place = _after_quote(sql, place, found[0][-1])
        elif kind == "dollars":
            kind, place = "string", sql.find("$$", place) + 2
            if place == 1:
                raise RequestError(_UNENDED)
        yield Token(kind, sql[start:place], start, place)


def _after_quote(sql: str, place: int, quote: str) -> int:
    """Return where a string or a quoted name ends; its quote is doubled within it."""
    while (place := sql.find(quote, place) + 1) > 0:
        if sql[place : place + 1] != quote:
            return place
        place += 1
    raise RequestError(_UNENDED)


def _after_comment(sql: str, place: int) -> int:
    depth = 1
    while depth:
        found = _COMMENT_END.search(sql, place)
        if found is None:
            raise RequestError(_UNENDED)
        depth += 1 if found[0] == "/*" else -1
        place = found.end()
    return place


def keywords(sql: str) -> set[str]:
    """Return the words of a text that are not quoted, in upper case."""
    return {token.text.upper() for token in tokens(sql) if token.kind == "word"}


def names(sql: str) -> Counter[str]:
    """Return how often each thing stands that may name a table: words in lower case, quoted names as they are."""
    found: Counter[str] = Counter()
    for token in tokens(sql):
        if token.kind == "word":
            found[token.text.lower()] += 1
        elif token.kind == "quoted":
            found[token.text[1:-1].replace(token.text[0] * 2, token.text[0])] += 1
    return found


def numbered(sql: str) -> tuple[str, list[str]]:
    """Return the text with its parameters as `$1`, `$2`, ..., and the name of each: as written, or its number.

    `?` is the next one; `$name` stands for the same value wherever it is written. Raises RequestError for `?` beside
    others, and for numbers that leave one out.
    """
    if "?" not in sql and "$" not in sql:
        return sql, []
    places: dict[str, int] = {}
    parts, end, marks = [], 0, 0
    for token in tokens(sql):
        if token.kind != "parameter":
            continue
        if token.text == "?":
            marks += 1
            number = marks
        else:
            name = token.text[1:]
            place = places.setdefault(name, len(places) + 1)
            number = int(name) if name.isdigit() else place
        parts += [sql[end : token.start], f"${number}"]
        end = token.end
    if marks and places:
        raise RequestError("the statement mixes ? with other parameters; use one kind")
    numbers = sorted(int(name) for name in places if name.isdigit())
    if numbers and numbers != list(range(1, len(places) + 1)):
        raise RequestError("the statement's parameters are not numbered $1, $2, ... without a gap, or some have names; use one kind")
    parts.append(sql[end:])
    return "".join(parts), [str(number) for number in range(1, marks + 1)] or [str(number) for number in numbers] or list(places)


def alone(sql: str, number: int) -> str:
    """Return a numbered text with one of its parameters, as `$1`, and NULL in place of the others."""
    parts, end = [], 0
    for token in tokens(sql):
        if token.kind == "parameter":
            parts += [sql[end : token.start], "$1" if token.text == f"${number}" else "NULL"]
            end = token.end
    return "".join((*parts, sql[end:]))


def table_options(sql: str) -> tuple[str, dict[str, str]]:
    """Return a CREATE TABLE without its `WITH (name = 'value', ...)`, which DataFusion does not plan, and what is in it.

    Raises RequestError for options that are written otherwise. Any other text is returned as it is.
    """
    found = list(tokens(sql))
    words = [token.text.upper() for token in found]
    if words[:1] != ["CREATE"]:
        return sql, {}
    depth, start = 0, 0
    for place, word in enumerate(words):
        depth += (word == "(") - (word == ")")
        if depth == 0 and word == "AS":
            break
        if depth == 1 and word == "(" and words[place - 1] == "WITH" and "TABLE" in words[:4]:
            start = place
            break
    if not start or ")" not in words[start:]:
        return sql, {}
    end = words.index(")", start)
    options = {}
    for place in range(start + 1, end, 4):
        name, equals, value, comma = (*found[place : min(place + 4, end)], None, None, None)[:4]
        is_last = place + 3 >= end
        if not (name and equals and value and equals.text == "=" and value.kind == "string" and (is_last or (comma and comma.text == ","))):
            raise RequestError("a table's options are written WITH (name = 'value', ...); nothing was written")
        options[name.text.lower()] = value.text[1:-1].replace("''", "'")
    return sql[: found[start - 1].start] + sql[found[end].end :], options


def limits(sql: str) -> list[int]:
    """Return which parameters of a numbered text say how many rows: DataFusion does not infer that they are numbers."""
    found, before = [], ""
    for token in tokens(sql):
        if token.kind == "parameter" and before in ("LIMIT", "OFFSET"):
            found.append(int(token.text[1:]))
        before = token.text.upper()
    return found


def as_select(sql: str, table: str) -> str | None:
    """Return `INSERT INTO t VALUES ($1, 'x', NULL)` as an INSERT of a SELECT from `table`, whose columns p1, p2, ... are the values.

    So one statement inserts any number of rows. None for any other text, whose rows are inserted one by one: what is in a
    row here is a parameter or a constant, so it means the same for each.
    """
    found = list(tokens(sql))
    place = next((n for n, token in enumerate(found) if token.kind == "word" and token.text.upper() == "VALUES"), None)
    while found and found[-1].text == ";":
        found.pop()
    if place is None or found[0].text.upper() != "INSERT" or len(found) < place + 4:
        return None
    row = found[place + 1 :]
    if row[0].text != "(" or row[-1].text != ")" or len(row) % 2 == 0:
        return None
    items = []
    for number, item in enumerate(row[1:-1]):
        if number % 2:
            if item.text != ",":
                return None
        elif item.kind == "parameter":
            items.append(f'"p{item.text[1:]}" AS c{number}')
        elif item.kind in ("string", "number") or item.text.upper() in ("NULL", "TRUE", "FALSE"):
            items.append(f"{item.text} AS c{number}")
        else:
            return None
    return f"{sql[: found[place].start]}\nSELECT {', '.join(items)} FROM {table}"
