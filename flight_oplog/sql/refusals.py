"""What SQL may not do here, told before planning and after, and DataFusion's errors in this program's words."""

from __future__ import annotations

import logging
import re

import pyarrow as pa

from flight_oplog.errors import NotFound, OplogError, RequestError, TooLarge, TryAgain, Unsupported
from flight_oplog.filters import CannotFilter
from flight_oplog.scans import ScanContext
from flight_oplog.sql import lexer

log = logging.getLogger("flight_oplog.sql")

CATALOG = "oplog"
PUBLIC = "public"

CHANGING = frozenset(("DELETE", "UPDATE", "MERGE", "TRUNCATE"))
CHANGES = frozenset(("INSERT", "CREATE", "DROP"))
REFUSED = frozenset(
    (
        *("ALTER", "ANALYZE", "BEGIN", "CALL", "COMMIT", "COPY", "DEALLOCATE", "EXECUTE", "GRANT", "LOAD", "PREPARE", "RELEASE"),
        *("RESET", "REVOKE", "ROLLBACK", "SAVEPOINT", "SET", "START", "UNLOAD", "USE", "VACUUM"),
    )
)
SERVED = "statements may read (SELECT, EXPLAIN, SHOW, DESCRIBE), INSERT, and define tables and views (CREATE, DROP)"
_READING = "it may only read: SELECT, SHOW, DESCRIBE"
APPEND_ONLY = "the log is append-only: rows are never updated, deleted, merged or truncated"


def in_public(name: str) -> str:
    """Return the topic or view that a statement names. Raises RequestError when it is not in `public`."""
    *above, topic = name.split(".")
    if above not in ([], [PUBLIC], [CATALOG, PUBLIC]):
        raise RequestError(f"{name[:200]!r} is not in {CATALOG}.{PUBLIC}, where topics and views are; nothing was written")
    return topic


def check_declared(sql: str, name: str, schema: pa.Schema) -> None:
    """Refuse what a CREATE TABLE promises and the log does not keep."""
    promised = sorted(lexer.keywords(sql) & {"PRIMARY", "UNIQUE", "FOREIGN", "REFERENCES", "CHECK", "DEFAULT"})
    required = next((field.name for field in schema if not field.nullable), None)
    if promised or required is not None:
        what = f"column {required!r} is NOT NULL" if not promised else f"it has {promised[0]}"
        raise Unsupported(f"table {name!r}: {what}, and a log keeps no constraints or defaults; nothing was written; leave it out")


def keys_of(options: dict[str, str]) -> tuple[str, ...]:
    """Return the keys that a CREATE TABLE names: `WITH (keys = 'a, b')`. Raises RequestError for any other option."""
    other = next((name for name in options if name != "keys"), None)
    if other is not None:
        raise RequestError(f"option {other[:80]!r} is not known; nothing was written; a table has WITH (keys = 'column, ...')")
    return tuple(dict.fromkeys(name.strip() for name in options.get("keys", "").split(",") if name.strip()))


def cannot_filter(error: Exception, context: ScanContext) -> bool:
    """Whether a statement failed for a filter that Arrow cannot apply, or that DataFusion cannot put into Arrow's words."""
    return any(isinstance(failure, CannotFilter) for failure in context.failures) or "unsupported operand type(s) for" in str(error)


def no_table(name: str) -> NotFound:
    return NotFound(f"table {name!r} does not exist; SELECT topic FROM system.topics lists them, quote names with capital letters")


def out_of_memory() -> TryAgain:
    return TryAgain("the query needs more memory than statement_bytes_max and could not spill; ask for less or raise it")


# DataFusion tells its kinds of error apart only by the words they begin with.
_PREFIX = re.compile(
    r"^(DataFusion error: |Error during planning: |Execution error: |Schema error: |External error: |Arrow error: |SQL error: |"
    r"Optimizer rule '\w+' failed\s*|This feature is not implemented: |[Cc]aused by:?\s*)+"
)
_NO_TABLE = re.compile(r"table '?([^']*)'? not found", re.IGNORECASE)
_NO_REGEX = re.compile(r"Regular expression did not compile: \w+(?:\(\d+\))?")
_NO_SIGNATURE = re.compile(r"No function matches the given name and argument types '[^']*'")
_OS_ERROR = re.compile(r"(\w[\w ]*) \(os error \d+\)")
_NOT_READING = re.compile(r"(?:DDL|DML|Statement) not supported: *(\w*)")


def translated(error: Exception, context: ScanContext) -> OplogError:
    if isinstance(error, OplogError):
        return error
    for failure in context.failures:
        if isinstance(failure, OplogError):
            return failure
    text = " ".join(str(error).split())
    prefix = found[0] if (found := _PREFIX.match(text)) else ""
    words = text[len(prefix) :][:1000].rstrip(".")
    strange = context.failures and not isinstance(context.failures[0], pa.ArrowInvalid | pa.ArrowNotImplementedError)
    if strange or "Traceback" in text:  # a fault of this program; its text would show the server's insides
        log.error("a scan failed: %s", text, exc_info=context.failures[0] if context.failures else None)
        return OplogError("the query failed while reading; the server's log says why")
    if (missing := _NO_TABLE.match(words)) is not None:
        return no_table(missing[1])
    if (refused := _NOT_READING.match(words)) is not None:
        changing = refused[1].upper() in CHANGING
        return Unsupported(APPEND_ONLY if changing else f"{refused[1] or 'this'} is not served here: {_READING}")
    if words.startswith("Resources exhausted") or "caused by Resources exhausted" in words:
        return out_of_memory()
    if "max_temp_directory_size" in words:
        return TooLarge("the query would spill more than spill_bytes_max to disk; ask for less or raise it")
    if words.startswith("Io error"):  # of what is spilled alone: DataFusion reads no files
        log.error("a query could not spill: %s", text)
        why = found[1] if (found := _OS_ERROR.search(words)) is not None else "the server's log says why"
        return TryAgain(f"the query could not spill to the system's temporary folder: {why}; make room there, or ask for less")
    if (wrong := _NO_REGEX.search(words) or _NO_SIGNATURE.search(words)) is not None:
        return RequestError(f"the query cannot be answered: {wrong[0]}")
    if words.startswith("Internal error") or "panicked" in words[:40]:
        log.error("DataFusion: %s", text)
        return OplogError(f"the query failed inside the engine: {words}")
    if "not implemented" in prefix:
        return Unsupported(f"the query uses something that is not implemented: {words}")
    return RequestError(f"the query cannot be answered: {words}")
