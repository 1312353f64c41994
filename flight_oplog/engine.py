"""SQL over one snapshot, in DataFusion. The only importer of datafusion.

Each statement gets a session of its own: 0.2 ms, and nothing a client says can outlive its statement. Results are
pulled through asyncio rather than through DataFusion's C stream, because that one buffers without bound and cannot be
stopped; stopping a query takes cancelling the pull and dropping every reference to its stream and its plan.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
from datafusion import RuntimeEnvBuilder, SessionConfig, SessionContext, SQLOptions
from datafusion.catalog import CatalogProvider, SchemaProvider

from flight_oplog import codec
from flight_oplog.config import Config, provide_engine_threads
from flight_oplog.errors import Cancelled, NotFound, OplogError, RequestError, TooLarge, TryAgain, Unsupported
from flight_oplog.provider import CannotFilter, ColumnCache, EntriesTable, RecordsTable, RowsTable, ScanContext, ScanCounts, topics_table
from flight_oplog.schema import plain_field
from flight_oplog.store import Snapshot

log = logging.getLogger("flight_oplog.engine")

CATALOG = "oplog"
POLL_SECONDS = 0.05
BATCHES_AHEAD = 2
# A batch waits at most this long for company before it goes out.
PACE_SECONDS = 0.05

_READ_ONLY = SQLOptions().with_allow_ddl(False).with_allow_dml(False).with_allow_statements(False)
_SETTINGS = {
    "datafusion.execution.batch_size": "32768",
    "datafusion.execution.parquet.schema_force_view_types": "false",
    "datafusion.sql_parser.map_string_types_to_utf8view": "false",
    "datafusion.catalog.information_schema": "true",
    "datafusion.catalog.create_default_catalog_and_schema": "false",
    "datafusion.catalog.default_catalog": CATALOG,
    "datafusion.catalog.default_schema": "public",
}

Stopped = Callable[[], bool]


@dataclass(frozen=True)
class Statement:
    """A planned query: its text, the snapshot it is pinned to and the schema of its result."""

    sql: str
    snapshot: Snapshot
    schema: pa.Schema


@dataclass
class Running:
    """A query under way: iterate `batches`; `counts` tells what its scans have touched so far, by table."""

    schema: pa.Schema
    batches: Iterator[pa.RecordBatch]
    counts: dict[str, ScanCounts] = field(default_factory=dict)


class Engine:
    """Plans and runs statements. Thread-safe."""

    def __init__(self, config: Config) -> None:
        provide_engine_threads()
        self._config = config
        self._cache = ColumnCache(config.cache_bytes_max)
        self._partitions = os.cpu_count() or 1
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="engine", daemon=True).start()

    def prepare(self, sql: str, snapshot: Snapshot) -> Statement:
        """Plan `sql` against `snapshot` without running anything and return its schema.

        Raises RequestError for bad SQL, NotFound for an unknown table, Unsupported for what the log does not do.
        """
        return Statement(sql, snapshot, _wire_schema(self._plan(sql, snapshot)[0].schema()))

    def prepare_run(self, sql: str, snapshot: Snapshot) -> tuple[Statement, str]:
        """Plan a statement that can be run over each new run of a topic's entries; return it and the topic's name.

        Such a statement makes something of each entry by itself: it reads one topic, and has projections and filters.
        Raises RequestError that says why another one cannot be followed, and what `prepare` raises.
        """
        frame, _ = self._plan(sql, snapshot)
        topic = _followed(sql, frame.logical_plan())
        return Statement(sql, snapshot, _wire_schema(frame.schema())), topic

    def run(self, sql: str, snapshot: Snapshot, stopped: Stopped = lambda: False, offsets: tuple[int, int] | None = None) -> Running:
        """Start `sql` against `snapshot`. Batches hold at most `message_bytes_max` bytes; their schema is `prepare`'s.

        With `offsets`, topics show only the entries within [first, last), and rows keep the entries' order.

        `stopped` is asked about every 50 ms; once it is true the work ends and the iterator raises Cancelled. Closing
        the iterator, or losing it, ends the work too.
        """
        frame, stream, context = self._start(sql, snapshot, offsets)
        schema = _wire_schema(frame.schema())
        deadline = time.monotonic() + self._config.statement_seconds_max
        puller = _Puller(self._loop, stream, context)
        del frame, stream  # the frame holds the plan, the plan holds running tasks
        batches = self._pull(puller, context, schema, deadline, stopped)
        return Running(schema, _paced(batches, self._config.message_bytes_max), context.counts)

    def _start(self, sql: str, snapshot: Snapshot, offsets: tuple[int, int] | None) -> tuple[Any, Any, ScanContext]:
        """Start a statement in the fastest way its filters allow; the last way allows any."""
        ways = [(False, True), (False, False)]
        if _GROUPS.search(sql):
            ways.insert(0, (True, True))
        for views, push_filters in ways:
            frame, context = self._plan(sql, snapshot, views, push_filters, offsets)
            try:
                return frame, frame.execute_stream(), context
            except Exception as error:
                if not any(isinstance(failure, CannotFilter) for failure in context.failures):
                    raise _translated(error, context) from error
        raise AssertionError("a statement whose filters stay in DataFusion cannot fail for them")

    def _plan(
        self, sql: str, snapshot: Snapshot, views: bool = False, push_filters: bool = True, offsets: tuple[int, int] | None = None
    ) -> tuple[Any, ScanContext]:
        self._check(sql)
        partitions = self._partitions if offsets is None else 1
        context = ScanContext(self._cache, partitions, views, offsets)
        # A spill pool of its own bounds each statement; spilled runs go to the system's temporary folder.
        runtime = RuntimeEnvBuilder().with_disk_manager_os().with_fair_spill_pool(self._config.statement_bytes_max)
        session = SessionContext(SessionConfig(_SETTINGS).with_target_partitions(partitions), runtime)
        session.register_catalog_provider(CATALOG, _Catalog(snapshot, context))
        if not push_filters:
            session.remove_optimizer_rule("push_down_filter")
        try:
            return session.sql(sql, options=_READ_ONLY), context
        except Exception as error:
            raise _translated(error, context) from error

    def _check(self, sql: str) -> None:
        """Refuse what must not reach the parser: too long, too deep, or a statement that does more than read."""
        try:
            size = len(sql.encode())
        except UnicodeEncodeError:
            raise RequestError("the SQL text is not UTF-8") from None
        if size > self._config.sql_bytes_max:
            raise TooLarge(f"the SQL text has {size} bytes; sql_bytes_max is {self._config.sql_bytes_max}")
        first, operators, tables = _measure(sql)
        if operators > self._config.sql_operators_max:
            raise TooLarge(f"the SQL text has {operators} operators; sql_operators_max is {self._config.sql_operators_max}")
        if tables > self._config.sql_tables_max:
            raise TooLarge(f"the SQL text reads {tables} tables; sql_tables_max is {self._config.sql_tables_max}")
        if first in _CHANGING:
            raise Unsupported(_APPEND_ONLY)
        if first in _REFUSED:
            raise Unsupported(f"{first} is not served: {_READING}")

    def _pull(
        self, puller: _Puller, context: ScanContext, schema: pa.Schema, deadline: float, stopped: Stopped
    ) -> Iterator[pa.RecordBatch]:
        try:
            while True:
                try:
                    batch = puller.next(lambda: stopped() or time.monotonic() > deadline)
                except Cancelled:
                    if time.monotonic() > deadline:
                        raise TooLarge(
                            f"the query ran longer than statement_seconds_max ({self._config.statement_seconds_max}); ask for less"
                        ) from None
                    raise
                except Exception as error:
                    raise _translated(error, context) from error
                if batch is None:
                    return
                if batch.num_rows:
                    yield _to_wire(batch, schema)
        finally:
            puller.close()


class _Puller:
    """Pulls one DataFusion stream in the event loop, so that waiting for a batch can be given up.

    It runs a little ahead of whoever takes the batches, so computing overlaps sending.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, stream: Any, context: ScanContext) -> None:
        self._loop = loop
        self._stream = [stream]
        self._context = context
        self._ready: queue.SimpleQueue[pa.RecordBatch | Exception | None] = queue.SimpleQueue()
        self._room = asyncio.Semaphore(BATCHES_AHEAD)
        self._pulling = [asyncio.run_coroutine_threadsafe(self._pull(), loop)]

    async def _pull(self) -> None:
        try:
            while True:
                await self._room.acquire()
                self._ready.put((await self._stream[0].__anext__()).to_pyarrow())
        except StopAsyncIteration:
            self._ready.put(None)
        except Exception as error:
            self._ready.put(error)

    def next(self, stopped: Stopped) -> pa.RecordBatch | None:
        while True:
            if stopped():
                self.close()
                raise Cancelled("the query was stopped")
            with contextlib.suppress(queue.Empty):
                batch = self._ready.get(timeout=POLL_SECONDS)
                break
        if isinstance(batch, Exception):
            raise batch
        if batch is not None:
            self._loop.call_soon_threadsafe(self._room.release)
        return batch

    def close(self) -> None:
        """Stop the query: cancel the pull, then drop it and the stream. Whoever holds either keeps the work going."""
        self._context.stopped.set()
        for pulling in self._pulling:
            pulling.cancel()
        self._pulling.clear()
        self._stream.clear()


def _paced(batches: Iterator[pa.RecordBatch], bytes_max: int) -> Iterator[pa.RecordBatch]:
    """Yield batches of a size that travels well: large ones cut, small ones joined unless that would keep them waiting."""
    waiting: list[pa.RecordBatch] = []
    size = 0
    since = time.monotonic() - PACE_SECONDS  # the first batch goes out at once
    for batch in batches:
        if batch.nbytes > bytes_max // 2:
            if waiting:
                yield codec.joined(waiting)
                waiting, size = [], 0
            yield from codec.cut(batch, bytes_max, batch.num_rows)
        else:
            waiting.append(batch)
            size += batch.nbytes
            if size > bytes_max // 2 or time.monotonic() - since > PACE_SECONDS:
                yield codec.joined(waiting)
                waiting, size = [], 0
            else:
                continue
        since = time.monotonic()
    if waiting:
        yield codec.joined(waiting)


def _wire_schema(schema: pa.Schema) -> pa.Schema:
    """Return the result's schema as every client can read it: no views, no dictionaries, all nullable."""
    return pa.schema([plain_field(field) for field in schema])


def _to_wire(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    if batch.schema.equals(schema, check_metadata=True):
        return batch
    columns = [codec.recast(column, f.type) for column, f in zip(batch.columns, schema, strict=True)]
    return codec.with_rows(columns, schema, batch.num_rows)


# Names


_SYSTEM = {"topics": topics_table}


def tables(snapshot: Snapshot) -> Iterator[tuple[str, str, str]]:
    """Yield (SQL schema, table, type) of every table SQL can name, `information_schema` aside; the default schema first."""
    own = sorted(snapshot.topics)
    yield from (("public", name, "TABLE") for name in own if not name.startswith("_"))
    yield from ((db_schema, name, "TABLE") for db_schema in ("log", "records") for name in own)
    yield from (("system", name, "SYSTEM TABLE") for name in _SYSTEM)


def table_schema(snapshot: Snapshot, db_schema: str, name: str) -> pa.Schema:
    """Return the schema of one of `tables`."""
    return _table(snapshot, db_schema, name, ScanContext(ColumnCache(0), 1)).schema


def _table(snapshot: Snapshot, db_schema: str, name: str, context: ScanContext) -> ds.Dataset:
    if db_schema == "system":
        return RowsTable(_SYSTEM[name](snapshot), context)
    topic = snapshot.topic(name)
    if db_schema == "records":
        return RecordsTable(snapshot, topic, context)
    return EntriesTable(snapshot, topic, context, with_log_columns=db_schema == "log")


class _Catalog(CatalogProvider):
    def __init__(self, snapshot: Snapshot, context: ScanContext) -> None:
        names: dict[str, list[str]] = {"public": [], "log": [], "records": [], "system": []}
        for db_schema, name, _ in tables(snapshot):
            names[db_schema].append(name)
        self._schemas = {db_schema: _Schema(snapshot, db_schema, of_schema, context) for db_schema, of_schema in names.items()}

    def schema_names(self) -> set[str]:
        return set(self._schemas)

    def schema(self, name: str) -> Any:
        return self._schemas.get(name)


class _Schema(SchemaProvider):
    """One SQL schema; its tables are made when a statement names them."""

    def __init__(self, snapshot: Snapshot, db_schema: str, names: list[str], context: ScanContext) -> None:
        self._snapshot = snapshot
        self._db_schema = db_schema
        self._names = names
        self._context = context

    @property
    def table_names(self) -> list[str]:  # type: ignore[override]
        # Declared a method upstream, yet information_schema reads it as an attribute that holds a sequence.
        return self._names

    def table(self, name: str) -> Any:
        return _table(self._snapshot, self._db_schema, name, self._context) if name in self._names else None

    def table_exist(self, name: str) -> bool:
        return name in self._names


_GROUPS = re.compile(r"\b(?:GROUP\s+BY|DISTINCT)\b", re.IGNORECASE)

# Refusals, before and after planning

# Strings, quoted names and comments are passed over; what is left in group 1 is a word, an operator or punctuation.
_TOKEN = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|--[^\n]*|/\*.*?\*/|([A-Za-z]\w*|[(),;]|::|[-+*/%<>=!&|^~\[]+)""", re.DOTALL)
# A chain of these makes a tree as deep as it is long, and walking a deep tree overflows the stack: the process dies.
_OPERATORS = frozenset(("AND", "OR", "NOT", "IS", "LIKE", "ILIKE", "SIMILAR", "BETWEEN", "COLLATE", "UNION", "INTERSECT", "EXCEPT", "JOIN"))
_ENDS_FROM = frozenset(("SELECT", "WHERE", "GROUP", "HAVING", "WINDOW", "ORDER", "LIMIT", "UNION", "INTERSECT", "EXCEPT", "VALUES"))
_CHANGING = frozenset(("DELETE", "UPDATE", "MERGE", "TRUNCATE"))
_REFUSED = frozenset(
    (
        *("ALTER", "ANALYZE", "BEGIN", "CALL", "COMMIT", "COPY", "CREATE", "DEALLOCATE", "DROP", "EXECUTE", "GRANT", "INSERT", "LOAD"),
        *("PREPARE", "RELEASE", "RESET", "REVOKE", "ROLLBACK", "SAVEPOINT", "SET", "START", "UNLOAD", "USE", "VACUUM"),
    )
)
_READING = "statements may only read (SELECT, EXPLAIN, SHOW, DESCRIBE)"
_APPEND_ONLY = "the log is append-only: rows are never updated, deleted, merged or truncated"


def _measure(sql: str) -> tuple[str, int, int]:
    """Return the first word, the number of operators and the number of tables read, without parsing."""
    first, operators, tables = "", 0, 0
    in_from = [False]  # for each open parenthesis: whether a comma there separates tables
    for found in _TOKEN.finditer(sql):
        token = (found[1] or "").upper()
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
    return first, operators, tables


_EACH_BY_ITSELF = frozenset(("Projection", "Filter", "SubqueryAlias", "TableScan"))


def _followed(sql: str, plan: Any) -> str:
    """Return the one topic that a statement reads; raise RequestError when it does not take each entry by itself."""
    kind = ""
    while plan is not None:
        variant, inputs = plan.to_variant(), plan.inputs()
        kind = type(variant).__name__
        if kind == "EmptyRelation":
            break
        if kind not in _EACH_BY_ITSELF or len(inputs) > 1:
            raise RequestError(f"the statement cannot be followed: {kind} needs more than one entry at a time; use columns and WHERE alone")
        plan = inputs[0] if inputs else None
    if kind != "TableScan" or _measure(sql)[2] != 1:
        raise RequestError("the statement cannot be followed: it has to read one topic, once")
    _, db_schema, name = variant.fqn()
    if db_schema not in (None, "public", "log"):
        raise RequestError(f"the statement cannot be followed: {db_schema}.{name} is no topic's entries")
    return str(name)


# DataFusion tells its kinds of error apart only by the words they begin with.
_PREFIX = re.compile(
    r"^(DataFusion error: |Error during planning: |Execution error: |Schema error: |External error: |Arrow error: |SQL error: |"
    r"Optimizer rule '\w+' failed\s*|This feature is not implemented: |[Cc]aused by:?\s*)+"
)
_NO_TABLE = re.compile(r"table '?([^']*)'? not found", re.IGNORECASE)
_NOT_READING = re.compile(r"(?:DDL|DML|Statement) not supported: *(\w*)")


def _translated(error: Exception, context: ScanContext) -> OplogError:
    if isinstance(error, OplogError):
        return error
    for failure in context.failures:
        if isinstance(failure, OplogError):
            return failure
    text = " ".join(str(error).split())
    prefix = found[0] if (found := _PREFIX.match(text)) else ""
    words = text[len(prefix) :][:1000]
    strange = context.failures and not isinstance(context.failures[0], pa.ArrowInvalid | pa.ArrowNotImplementedError)
    if strange or "Traceback" in text:  # a fault of this program; its text would show the server's insides
        log.error("a scan failed: %s", text, exc_info=context.failures[0] if context.failures else None)
        return OplogError("the query failed while reading; the server's log says why")
    if (missing := _NO_TABLE.match(words)) is not None:
        return NotFound(
            f"table {missing[1]!r} does not exist; SELECT topic FROM system.topics lists them, quote names with capital letters"
        )
    if (refused := _NOT_READING.match(words)) is not None:
        changing = refused[1].upper() in _CHANGING
        return Unsupported(_APPEND_ONLY if changing else f"{refused[1] or 'this'} is not served: {_READING}")
    if words.startswith("Resources exhausted"):
        return TryAgain("the query needs more memory than statement_bytes_max and could not spill; ask for less or raise it")
    if words.startswith("Internal error") or "panicked" in words[:40]:
        log.error("DataFusion: %s", text)
        return OplogError(f"the query failed inside the engine: {words}")
    if "not implemented" in prefix:
        return Unsupported(f"the query uses something that is not implemented: {words}")
    return RequestError(f"the query cannot be answered: {words}")
