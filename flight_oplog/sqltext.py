"""What can be told of an SQL text without parsing it: its kind, its size, its parameters.

DataFusion parses; this looks at the text before it does. It finds out what must not reach the parser, and gives every
parameter the one form that DataFusion binds, `$1`, `$2`, ...
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from flight_oplog.errors import RequestError

# Strings, quoted names and comments are passed over; what is left is a parameter, or in group 2 a word, an operator or punctuation.
_TOKEN = re.compile(
    r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|`[^`]*`|--[^\n]*|/\*.*?\*/|\$\$.*?\$\$|(\?|\$\w+)|([A-Za-z_]\w*|[(),;]|::|[-+*/%<>=!&|^~\[]+)""",
    re.DOTALL,
)
# A chain of these makes a tree as deep as it is long, and walking a deep tree overflows the stack: the process dies.
_OPERATORS = frozenset(("AND", "OR", "NOT", "IS", "LIKE", "ILIKE", "SIMILAR", "BETWEEN", "COLLATE", "UNION", "INTERSECT", "EXCEPT", "JOIN"))
_ENDS_FROM = frozenset(("SELECT", "WHERE", "GROUP", "HAVING", "WINDOW", "ORDER", "LIMIT", "UNION", "INTERSECT", "EXCEPT", "VALUES"))


@dataclass(frozen=True)
class Measure:
    """What a text looks like: its first word, how many operators it has and how many tables it reads."""

    first: str
    operators: int
    tables: int


def measure(sql: str) -> Measure:
    first, operators, tables = "", 0, 0
    in_from = [False]  # for each open parenthesis: whether a comma there separates tables
    for found in _TOKEN.finditer(sql):
        token = (found[2] or "").upper()
        if token[:1].isalpha():
            first = first or token
            operators += token in _OPERATORS
            tables += token in ("FROM", "JOIN")
            in_from[-1] = token == "FROM" or (in_from[-1] and token not in _ENDS_FROM)
        elif token == "(":
            in_from.append(False)
        elif token == ")":
            in_from[-1:] = [] if len(in_from) > 1 else in_from
        elif token == ",":
            tables += in_from[-1]
        elif token and token != ";":
            operators += 1
    return Measure(first, operators, tables)


def keywords(sql: str) -> set[str]:
    """Return the words of a text that are not quoted, in upper case."""
    return {token[2].upper() for token in _TOKEN.finditer(sql) if token[2] and (token[2][0].isalpha() or token[2][0] == "_")}


def names(sql: str) -> set[str]:
    """Return whatever may name a table: words in lower case, and quoted names as they are."""
    quoted = {token[0][1:-1].replace('""', '"') for token in _TOKEN.finditer(sql) if token[0][0] in '"`'}
    return quoted | {word.lower() for word in keywords(sql)}


def numbered(sql: str) -> tuple[str, list[str]]:
    """Return the text with its parameters as `$1`, `$2`, ..., and the name of each: as written, or its number.

    `?` is the next one; `$name` stands for the same value wherever it is written. Raises RequestError for `?` beside
    others, and for numbers that leave one out.
    """
    names: list[str] = []
    parts, end, marks, named = [], 0, 0, 0
    for found in _TOKEN.finditer(sql):
        if (written := found[1]) is None:
            continue
        if written == "?":
            marks += 1
            names.append(str(marks))
            number = marks
        else:
            named += 1
            name = written[1:]
            if name not in names:
                names.append(name)
            number = int(name) if name.isdigit() else names.index(name) + 1
        parts += [sql[end : found.start()], f"${number}"]
        end = found.end()
    if marks and (named or marks != len(names)):
        raise RequestError("the statement mixes ? with other parameters; use one kind")
    numbers = [int(name) for name in names if name.isdigit()]
    if numbers and sorted(numbers) != list(range(1, len(names) + 1)):
        raise RequestError("the statement's parameters are not numbered $1, $2, ... without a gap, or some have names; use one kind")
    parts.append(sql[end:])
    return "".join(parts), sorted(names, key=int) if numbers else names


def alone(sql: str, number: int) -> str:
    """Return a numbered text with one of its parameters, as `$1`, and NULL in place of the others."""
    parts, end = [], 0
    for found in _TOKEN.finditer(sql):
        if found[1] is not None:
            parts += [sql[end : found.start()], "$1" if found[1] == f"${number}" else "NULL"]
            end = found.end()
    return "".join((*parts, sql[end:]))


def limits(sql: str) -> list[int]:
    """Return which parameters of a numbered text say how many rows: DataFusion does not infer that they are numbers."""
    found, before = [], ""
    for token in _TOKEN.finditer(sql):
        if token[1] is not None and before in ("LIMIT", "OFFSET"):
            found.append(int(token[1][1:]))
        if token[1] is not None or token[2] is not None:
            before = (token[2] or "").upper()
    return found


def as_select(sql: str, table: str) -> str | None:
    """Return `INSERT INTO t VALUES ($1, ...)` as an INSERT of a SELECT from `table`, whose columns are the parameters' values.

    So one statement inserts any number of rows. None for any other text: it is run once for each row.
    """
    head = _VALUES.match(sql)
    if head is None:
        return None
    depth, parts, end = 0, [], head.end() - 1
    for found in _TOKEN.finditer(sql, end):
        if found[1] is not None:
            parts += [sql[end : found.start()], f'"{found[1][1:]}"']
            end = found.end()
        depth += {"(": 1, ")": -1}.get(found[2] or "", 0)
        if depth == 0:
            break
    else:
        return None
    row = "".join((*parts, sql[end : found.start()])).strip()[1:]
    if sql[found.end() :].strip(" \t\r\n;"):
        return None
    return f"{head[1].rstrip()} SELECT {row} FROM {table}"


_NAME = r'(?:[A-Za-z_]\w*|"[^"]+")'
_VALUES = re.compile(rf"(\s*INSERT\s+INTO\s+{_NAME}(?:\.{_NAME})*\s*(?:\([^()]*\))?)\s*VALUES\s*\(", re.IGNORECASE)
