"""SQL over one snapshot, in DataFusion. The only importer of datafusion.

What a statement is, DataFusion's own parser says: it plans INSERT, CREATE and DROP under an EXPLAIN, which performs
nothing, and what they would change is returned as a `Change` for the log to carry out.

Each statement gets a session of its own: 0.2 ms, and nothing a client says can outlive its statement. Results are
pulled through asyncio rather than through DataFusion's C stream, because that one buffers without bound and cannot be
stopped; stopping a query takes cancelling the pull and dropping every reference to its stream and its plan.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import os
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
from datafusion import Expr, RuntimeEnvBuilder, SessionConfig, SessionContext, SQLOptions, udtf
from datafusion import Table as DataTable
from datafusion.catalog import CatalogProvider, SchemaProvider

from flight_oplog import codec, sqltext
from flight_oplog.config import Config, provide_engine_threads
from flight_oplog.errors import Cancelled, NotFound, OplogError, RequestError, TooLarge, TryAgain, Unsupported
from flight_oplog.provider import (
    CannotFilter,
    ColumnCache,
    EntriesTable,
    RecordsTable,
    RowsTable,
    ScanContext,
    ScanCounts,
    topic_batches,
    topics_table,
)
from flight_oplog.schema import VIEWS_TOPIC, plain_field
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
    # Records are dealt out over the partitions of a scan already; dealing out again costs a short query a tenth of its time.
    "datafusion.optimizer.enable_round_robin_repartition": "false",
    "datafusion.execution.parquet.schema_force_view_types": "false",
    "datafusion.sql_parser.map_string_types_to_utf8view": "false",
    "datafusion.catalog.information_schema": "true",
    "datafusion.catalog.create_default_catalog_and_schema": "false",
    "datafusion.catalog.default_catalog": CATALOG,
    "datafusion.catalog.default_schema": "public",
}

Stopped = Callable[[], bool]


PUBLIC = "public"
NO_PARAMETERS = pa.schema([])
VIEW_DEPTH_MAX = 16
PARAMETERS_ASKED_MAX = 100
# What a statement that changes something returns: how many entries it appended.
CHANGED = pa.schema([pa.field("count", pa.int64())])


@dataclass(frozen=True)
class Statement:
    """A planned statement: the snapshot it is pinned to, the schemas of its result and of its parameters."""

    snapshot: Snapshot
    schema: pa.Schema
    parameters: pa.Schema = NO_PARAMETERS
    is_update: bool = False


@dataclass
class Change:
    """What a statement would change. `what` is its words: INSERT, CREATE TABLE, CREATE VIEW, DROP TABLE or DROP VIEW.

    `batches` are the entries of an INSERT or a CREATE TABLE AS, and None where there are none. `tolerant` is IF EXISTS
    or IF NOT EXISTS, `replaces` OR REPLACE; `definition` is a view's whole text.
    """

    what: str
    name: str
    schema: pa.Schema | None = None
    batches: Iterator[pa.RecordBatch] | None = None
    tolerant: bool = False
    replaces: bool = False
    definition: str = ""


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
        self._views: dict[tuple[int, int], dict[str, str]] = {}  # of the newest snapshot that was asked for
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="engine", daemon=True).start()

    def prepare(self, sql: str, snapshot: Snapshot, values: pa.RecordBatch | None = None, db_schema: str = PUBLIC) -> Statement:
        """Plan `sql` against `snapshot` without running anything; return the schemas of its result and its parameters.

        A parameter whose type the statement leaves open has the type null, until `values` are bound to it.

        Raises RequestError for bad SQL, NotFound for an unknown table, Unsupported for what the log does not do.
        """
        is_update = self._check(sql)
        text, names = sqltext.numbered(sql)
        session, context = self._session(text, snapshot, PUBLIC if is_update else db_schema)
        parameters = _parameters(session, text, names)
        if is_update:
            self._change(session, context, text, _nulls(parameters))
            return Statement(snapshot, CHANGED, parameters, is_update)
        bound = self._bound(text, names, parameters, values, is_update)
        try:
            frame = self._frame(session, context, text, _row(bound, 0) if bound is not None and bound.num_rows else None)
        except OplogError:
            if not names:
                raise
            frame = self._frame(session, context, text, _nulls(parameters))  # some texts need to know every type
        return Statement(snapshot, _schema_of(frame, context), parameters)

    def tables(self, snapshot: Snapshot) -> Iterator[tuple[str, str, str]]:
        """Yield (SQL schema, table, type) of every table SQL can name, `information_schema` aside; the default schema first."""
        yield from (found for found in tables(snapshot) if found[0] == PUBLIC)
        yield from ((PUBLIC, name, "VIEW") for name in sorted(self.views(snapshot)) if name not in snapshot.topics)
        yield from (found for found in tables(snapshot) if found[0] != PUBLIC)

    def table_schema(self, snapshot: Snapshot, db_schema: str, name: str) -> pa.Schema:
        """Return the schema of one of `tables`."""
        if db_schema == PUBLIC and name not in snapshot.topics:
            return self.prepare(f'SELECT * FROM {CATALOG}.{PUBLIC}."{name}"', snapshot).schema
        return _table(snapshot, db_schema, name, ScanContext(ColumnCache(0), 1)).schema

    def prepare_run(self, sql: str, snapshot: Snapshot) -> tuple[Statement, str]:
        """Plan a statement that can be run over each new run of a topic's entries; return it and the topic's name.

        Such a statement makes something of each entry by itself: it reads one topic, and has projections and filters.
        Raises RequestError that says why another one cannot be followed, and what `prepare` raises.
        """
        frame, _ = self._plan(sql, snapshot)
        topic = _followed(sql, frame.logical_plan())
        return Statement(snapshot, _wire_schema(frame.schema())), topic

    def run(
        self,
        sql: str,
        snapshot: Snapshot,
        stopped: Stopped = lambda: False,
        offsets: tuple[int, int] | None = None,
        parameters: pa.RecordBatch | None = None,
        db_schema: str = PUBLIC,
    ) -> Running:
        """Start the query `sql` against `snapshot`. Batches hold at most `message_bytes_max` bytes; their schema is `prepare`'s.

        With `offsets`, topics show only the entries within [first, last), and rows keep the entries' order. With
        `parameters`, a column for each, it runs once for each of their rows, one after the other.

        `stopped` is asked about every 50 ms; once it is true the work ends and the iterator raises Cancelled. Closing
        the iterator, or losing it, ends the work too.
        """
        self._check(sql)
        deadline = time.monotonic() + self._config.statement_seconds_max
        text, names = sqltext.numbered(sql)
        if parameters is None or not parameters.num_columns:
            return self._run(text, snapshot, stopped, offsets, deadline, None, db_schema)
        session, context = self._session(text, snapshot, db_schema)
        wanted = _parameters(session, text, names)
        bound = self._bound(text, names, wanted, parameters, is_update=False)
        assert bound is not None
        if not bound.num_rows:
            return Running(_schema_of(self._frame(session, context, text, _nulls(wanted)), context), iter(()))
        first = self._run(text, snapshot, stopped, offsets, deadline, _row(bound, 0), db_schema)

        def each() -> Iterator[pa.RecordBatch]:
            yield from first.batches
            for row in range(1, bound.num_rows):
                running = self._run(text, snapshot, stopped, offsets, deadline, _row(bound, row), db_schema)
                for batch in running.batches:
                    yield _to_wire(batch, first.schema)

        return Running(first.schema, each() if bound.num_rows > 1 else first.batches, first.counts)

    def _run(
        self,
        sql: str,
        snapshot: Snapshot,
        stopped: Stopped,
        offsets: tuple[int, int] | None,
        deadline: float,
        values: Values,
        db_schema: str,
    ) -> Running:
        frame, stream, context = self._start(sql, snapshot, offsets, values, db_schema)
        schema = _schema_of(frame, context)
        puller = _Puller(self._loop, stream, context)
        del frame, stream  # the frame holds the plan, the plan holds running tasks
        batches = _Pulled(self._pull(puller, context, schema, deadline, stopped), puller)
        return Running(schema, _paced(batches, self._config.message_bytes_max), context.counts)

    def change(
        self,
        sql: str,
        snapshot: Snapshot,
        stopped: Stopped = lambda: False,
        parameters: pa.RecordBatch | None = None,
    ) -> Change:
        """Return what `sql`, which is no query, would change; nothing is changed here. Names without a schema are in `public`.

        Its entries are computed as they are asked for. With `parameters`, an INSERT inserts the entries of all their rows.
        """
        self._check(sql)
        text, names = sqltext.numbered(sql)
        deadline = time.monotonic() + self._config.statement_seconds_max
        session, context = self._session(text, snapshot, PUBLIC)
        wanted = _parameters(session, text, names)
        bound = self._bound(text, names, wanted, parameters, is_update=True)
        if bound is None:
            if names:
                raise RequestError(f"{_count(names)} and none is bound; nothing was written")
            return self._changing(session, context, text, None, deadline, stopped)
        if bound.num_rows > 1 and (together := sqltext.as_select(text, f'"{_BOUND}"."values"')) is not None:
            session, context = self._session(text, snapshot, PUBLIC, bound=bound)
            return self._changing(session, context, together, None, deadline, stopped)
        if not bound.num_rows:
            found = self._change(session, context, text, _nulls(wanted))[0]
            found.batches = iter(())
            return found
        found = self._changing(session, context, text, _row(bound, 0), deadline, stopped)
        first = found.batches

        def each() -> Iterator[pa.RecordBatch]:
            yield from first or ()
            for row in range(1, bound.num_rows):
                session, context = self._session(text, snapshot, PUBLIC)
                yield from self._changing(session, context, text, _row(bound, row), deadline, stopped).batches or ()

        if first is not None:
            found.batches = each()
        return found

    def _changing(
        self, session: SessionContext, context: ScanContext, sql: str, values: Values, deadline: float, stopped: Stopped
    ) -> Change:
        found, plan = self._change(session, context, sql, values)
        schema = found.schema

        def entries() -> Iterator[pa.RecordBatch]:
            """Begin only when somebody wants them: a statement that is refused first must leave no work behind."""
            assert schema is not None
            try:
                stream = session.create_dataframe_from_logical_plan(plan).execute_stream()
            except Exception as error:
                raise _translated(error, context) from error
            puller = _Puller(self._loop, stream, context)
            del stream
            yield from self._pull(puller, context, schema, deadline, stopped)

        if plan is not None and schema is not None:
            found.batches = entries()
        return found

    def _change(self, session: SessionContext, context: ScanContext, sql: str, values: Values) -> tuple[Change, Any]:
        """Plan a statement that is no query; return what it would change, and the plan of its entries."""
        try:
            plan = session.sql(f"EXPLAIN {sql}", param_values=values).logical_plan().inputs()[0]
            found = plan.to_variant()
            inputs = plan.inputs()
            frame = session.create_dataframe_from_logical_plan(inputs[0]) if inputs else None
            schema = None if frame is None else frame.schema()
        except Exception as error:
            raise _translated(error, context) from error
        kind = type(found).__name__
        if kind == "DmlStatement" and str(found.op()) == "WriteOp.Append" and schema is not None:
            return Change("INSERT", _public(found.table_name()), _wire_schema(schema)), inputs[0]
        if kind == "CreateMemoryTable" and schema is not None:
            name = _public(found.name())
            is_empty = type(inputs[0].to_variant()).__name__ == "EmptyRelation" and not inputs[0].to_variant().produce_one_row()
            if is_empty:
                _check_declared(sql, name, schema)
            change = Change("CREATE TABLE", name, _wire_schema(schema), tolerant=found.if_not_exists(), replaces=found.or_replace())
            return change, None if is_empty else inputs[0]
        if kind == "CreateView" and schema is not None:
            if values:
                raise RequestError("a view has no parameters; nothing was written")
            name = _public(found.name())
            return Change("CREATE VIEW", name, _wire_schema(schema), replaces=found.or_replace(), definition=found.definition()), None
        if kind in ("DropTable", "DropView"):
            return Change("DROP TABLE" if kind == "DropTable" else "DROP VIEW", _public(found.name()), tolerant=found.if_exists()), None
        raise Unsupported(f"{' '.join(sql.split()[:2]).upper()[:40]} is not served: {_SERVED}")

    def _bound(
        self, text: str, names: Sequence[str], wanted: pa.Schema, parameters: pa.RecordBatch | None, is_update: bool
    ) -> pa.RecordBatch | None:
        """Return the values bound, in the types that the statement wants, as columns p1, p2, ...; None without parameters.

        A value that would not be the same in that type is refused where it would be written; a query is left to coerce it.
        """
        if parameters is None or not parameters.num_columns:
            return None
        written = "; nothing was written" if is_update else ""
        if len(names) != parameters.num_columns:
            are = "is" if parameters.num_columns == 1 else "are"
            raise RequestError(f"{_count(names)}, {parameters.num_columns} {are} bound{written}")
        columns = []
        for number, (kind, column) in enumerate(zip(wanted.types, parameters.columns, strict=True), 1):
            try:
                plain = codec.recast(column, plain_field(pa.field("", column.type)).type)
                fitting = plain if pa.types.is_null(kind) else codec.fitted(plain, kind)
            except (pa.ArrowException, RequestError) as error:
                if not is_update and isinstance(error, pa.ArrowException):
                    columns.append(column)
                    continue
                why = " ".join(str(error).split())[:200]
                raise RequestError(f"parameter ${number} of type {column.type} is no {kind}: {why}{written}") from error
            columns.append(fitting)
        return pa.RecordBatch.from_arrays(columns, [f"p{number}" for number in range(1, len(columns) + 1)])

    def _start(
        self, sql: str, snapshot: Snapshot, offsets: tuple[int, int] | None, values: Values, db_schema: str
    ) -> tuple[Any, Any, ScanContext]:
        """Start a statement in the fastest way its filters allow; the last way allows any."""
        ways = [(False, True), (False, False)]
        if _GROUPS.search(sql):
            ways.insert(0, (True, True))
        for views, push_filters in ways:
            frame, context = self._plan(sql, snapshot, views, push_filters, offsets, values, db_schema)
            try:
                return frame, frame.execute_stream(), context
            except Exception as error:
                if not any(isinstance(failure, CannotFilter) for failure in context.failures):
                    raise _translated(error, context) from error
        raise AssertionError("a statement whose filters stay in DataFusion cannot fail for them")

    def _plan(
        self,
        sql: str,
        snapshot: Snapshot,
        views: bool = False,
        push_filters: bool = True,
        offsets: tuple[int, int] | None = None,
        values: Values = None,
        db_schema: str = PUBLIC,
    ) -> tuple[Any, ScanContext]:
        if self._check(sql):
            raise RequestError("the statement is no query; nothing was written")
        session, context = self._session(sql, snapshot, db_schema, views, offsets)
        if not push_filters:
            session.remove_optimizer_rule("push_down_filter")
        return self._frame(session, context, sql, values), context

    def _frame(self, session: SessionContext, context: ScanContext, sql: str, values: Values = None) -> Any:
        try:
            return session.sql(sql, options=_READ_ONLY, param_values=values)
        except Exception as error:
            raise _translated(error, context) from error

    def _session(
        self,
        sql: str,
        snapshot: Snapshot,
        db_schema: str,
        views: bool = False,
        offsets: tuple[int, int] | None = None,
        bound: pa.RecordBatch | None = None,
    ) -> tuple[SessionContext, ScanContext]:
        partitions = self._partitions if offsets is None else 1
        context = ScanContext(self._cache, partitions, views, offsets)
        # A spill pool of its own bounds each statement; spilled runs go to the system's temporary folder.
        runtime = RuntimeEnvBuilder().with_disk_manager_os().with_fair_spill_pool(self._config.statement_bytes_max)
        catalog = _Catalog(snapshot, context, bound)
        session = _new_session(db_schema, partitions, runtime, catalog)
        defined = self.views(snapshot)
        travels = _TIME_TRAVEL.search(sql) or any(_TIME_TRAVEL.search(definition) for definition in defined.values())
        if travels:
            _register_time_travel(session, snapshot, context)
        if defined and sqltext.measure(sql).first != "DROP":
            of_views = session
            if db_schema != PUBLIC:
                of_views = _new_session(PUBLIC, partitions, RuntimeEnvBuilder(), catalog)
                if travels:
                    _register_time_travel(of_views, snapshot, context)
            self._plan_views(sql, defined, catalog, context, of_views)
        return session, context

    def views(self, snapshot: Snapshot) -> dict[str, str]:
        """Return the views of a snapshot and their definitions."""
        topic = snapshot.topics.get(VIEWS_TOPIC)
        if topic is None:
            return {}
        key = (id(snapshot.store), topic.next_offset)
        if key not in self._views:
            found: dict[str, str] = {}
            for batch in topic_batches(snapshot, topic, 0, self._config.message_bytes_max):
                for row in batch.to_pylist():
                    found.pop(row["view"], None)
                    if row["definition"] is not None:
                        found[row["view"]] = row["definition"]
            self._views.clear()
            self._views[key] = found
        return self._views[key]

    def _plan_views(self, sql: str, defined: dict[str, str], catalog: _Catalog, context: ScanContext, session: SessionContext) -> None:
        """Plan the views that a statement may name, those first that others are made of; their names are looked up in `public`.

        DataFusion cannot plan one while it plans the statement. One that cannot be planned fails the statement that reads it.
        Each is planned once and copied into whatever names it, so what it reads and its operators add up: they are limited.
        """
        weights: dict[str, sqltext.Measure] = {}

        def weigh(text: str, above: tuple[str, ...]) -> sqltext.Measure:
            """Plan the views that a text names, but for itself, and return what it measures with them."""
            found = sqltext.measure(text)
            tables, operators = found.tables, found.operators
            for name, times in (sqltext.names(text) - Counter(above[-1:])).items():
                if name in defined:
                    of_view = plan(name, above)
                    tables, operators = tables + times * of_view.tables, operators + times * of_view.operators
            return sqltext.Measure(found.first, operators, tables)

        def plan(name: str, above: tuple[str, ...]) -> sqltext.Measure:
            if name in weights:
                return weights[name]
            nothing = sqltext.Measure("", 0, 0)
            if name in above or len(above) >= VIEW_DEPTH_MAX:
                catalog.broken[name] = RequestError(f"view {name!r} is made of itself, or of views more than {VIEW_DEPTH_MAX} deep")
                return nothing
            weight = weigh(defined[name], (*above, name))
            weights[name] = weight
            try:
                self._check_weight(weight, f"view {name!r}")
                planned = session.sql(f"EXPLAIN {defined[name]}").logical_plan().inputs()[0].inputs()[0]
                catalog.views[name] = session.create_dataframe_from_logical_plan(planned).into_view()
            except Exception as error:
                catalog.broken[name] = RequestError(f"view {name!r}: {_translated(error, context)}")
                context.failures.clear()
                weights[name] = nothing
            return weights[name]

        total = weigh(sql, ())
        self._check_weight(total, "the SQL text, with its views,")
        if "INFORMATION_SCHEMA" in sqltext.keywords(sql) or total.first in ("SHOW", "DESCRIBE", "DESC"):
            for name in defined:
                plan(name, ())

    def _check_weight(self, found: sqltext.Measure, what: str) -> None:
        if found.operators > self._config.sql_operators_max:
            raise TooLarge(f"{what} has {found.operators} operators; sql_operators_max is {self._config.sql_operators_max}")
        if found.tables > self._config.sql_tables_max:
            raise TooLarge(f"{what} reads {found.tables} tables; sql_tables_max is {self._config.sql_tables_max}")

    def _check(self, sql: str) -> bool:
        """Refuse what must not reach the parser: too long, too deep, or a statement that is not served.

        Return whether it would change something.
        """
        try:
            size = len(sql.encode())
        except UnicodeEncodeError:
            raise RequestError("the SQL text is not UTF-8") from None
        if size > self._config.sql_bytes_max:
            raise TooLarge(f"the SQL text has {size} bytes; sql_bytes_max is {self._config.sql_bytes_max}")
        found = sqltext.measure(sql)
        self._check_weight(found, "the SQL text")
        if found.first in _CHANGING:
            raise Unsupported(_APPEND_ONLY)
        if found.first in _REFUSED:
            raise Unsupported(f"{found.first} is not served: {_SERVED}")
        return found.first in _CHANGES

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
                    try:
                        yield _to_wire(batch, schema)
                    except pa.ArrowException as error:
                        raise RequestError(f"the query's values do not fit its columns: {' '.join(str(error).split())[:200]}") from error
        finally:
            puller.close()


class _Pulled:
    """Batches of a query. Closing them, or losing them before the first was asked for, ends the query as well."""

    def __init__(self, batches: Iterator[pa.RecordBatch], puller: _Puller) -> None:
        self._batches = batches
        self._puller = puller

    def __iter__(self) -> _Pulled:
        return self

    def __next__(self) -> pa.RecordBatch:
        return next(self._batches)

    def __del__(self) -> None:
        self._puller.close()


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


def _schema_of(frame: Any, context: ScanContext) -> pa.Schema:
    try:
        return _wire_schema(frame.schema())
    except Exception as error:
        raise _translated(error, context) from error


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


def _new_session(db_schema: str, partitions: int, runtime: RuntimeEnvBuilder, catalog: _Catalog) -> SessionContext:
    settings = _SETTINGS | {"datafusion.catalog.default_schema": db_schema}
    session = SessionContext(SessionConfig(settings).with_target_partitions(partitions), runtime)
    session.register_catalog_provider(CATALOG, catalog)
    return session


def tables(snapshot: Snapshot) -> Iterator[tuple[str, str, str]]:
    """Yield (SQL schema, table, type) of every table of the log, `information_schema` and views aside; the default schema first."""
    own = sorted(snapshot.topics)
    yield from (("public", name, "TABLE") for name in own if not name.startswith("_"))
    yield from ((db_schema, name, "TABLE") for db_schema in ("log", "records") for name in own)
    yield from (("system", name, "SYSTEM TABLE") for name in _SYSTEM)


def _table(snapshot: Snapshot, db_schema: str, name: str, context: ScanContext) -> ds.Dataset:
    if db_schema == "system":
        return RowsTable(_SYSTEM[name](snapshot), context)
    topic = snapshot.topic(name)
    if db_schema == "records":
        return RecordsTable(snapshot, topic, context)
    return EntriesTable(snapshot, topic, context, with_log_columns=db_schema == "log")


_BOUND = "_bound"


class _Catalog(CatalogProvider):
    def __init__(self, snapshot: Snapshot, context: ScanContext, bound: pa.RecordBatch | None = None) -> None:
        names: dict[str, list[str]] = {"public": [], "log": [], "records": [], "system": []}
        for db_schema, name, _ in tables(snapshot):
            names[db_schema].append(name)
        self.views: dict[str, Any] = {}
        self.broken: dict[str, RequestError] = {}
        self._schemas: dict[str, Any] = {
            db_schema: _Schema(snapshot, db_schema, of_schema, context) for db_schema, of_schema in names.items()
        }
        self._schemas[PUBLIC] = _PublicSchema(snapshot, PUBLIC, names[PUBLIC], context, self)
        if bound is not None:
            self._schemas[_BOUND] = _BoundSchema(RowsTable(bound, context))

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


class _PublicSchema(_Schema):
    """`public`: topics and views; a topic goes before a view of its name."""

    def __init__(self, snapshot: Snapshot, db_schema: str, names: list[str], context: ScanContext, catalog: _Catalog) -> None:
        super().__init__(snapshot, db_schema, names, context)
        self._catalog = catalog

    @property
    def table_names(self) -> list[str]:  # type: ignore[override]
        return [*self._names, *(name for name in self._catalog.views if name not in self._names)]

    def table(self, name: str) -> Any:
        found = super().table(name)
        if found is None and name in self._catalog.broken:
            self._context.failures.append(self._catalog.broken[name])
            raise self._catalog.broken[name]
        return self._catalog.views.get(name) if found is None else found

    def table_exist(self, name: str) -> bool:
        return super().table_exist(name) or name in self._catalog.views or name in self._catalog.broken


class _BoundSchema(SchemaProvider):
    """The rows bound to an INSERT's parameters, as a table."""

    table_names = ["values"]  # type: ignore[assignment]  # noqa: RUF012

    def __init__(self, rows: ds.Dataset) -> None:
        self._rows = rows

    def table(self, name: str) -> Any:
        return self._rows if name == "values" else None

    def table_exist(self, name: str) -> bool:
        return name == "values"


# Time travel

_TIME_TRAVEL = re.compile(r"\bat_(?:version|time)\s*\(", re.IGNORECASE)


def _register_time_travel(session: SessionContext, snapshot: Snapshot, context: ScanContext) -> None:
    """Let a statement name a topic as of another commit: at_version('events', 12), at_time('events', '2026-01-01T00:00:00Z')."""

    def table(find: Callable[[Any], Snapshot], wanted: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            try:
                values = [Expr(argument).python_value().as_py() for argument in arguments]
                if len(values) != 2 or not isinstance(values[0], str):
                    raise RequestError(f"time travel takes a topic's name in quotes and {wanted}")
                return DataTable(_table(find(values[1]), PUBLIC, values[0], context))
            except Exception as error:
                context.failures.append(error if isinstance(error, OplogError) else RequestError(f"time travel takes a topic and {wanted}"))
                raise

        return call

    def version(value: Any) -> Snapshot:
        if type(value) is not int or value < 0:
            raise RequestError("at_version takes a table_version, a number from 0 up")
        if value > snapshot.table_version:
            raise NotFound(f"table_version {value} is not committed yet")
        return snapshot.store.snapshot_at(value)

    def time_of(text: Any) -> Snapshot:
        found = snapshot.store.snapshot_as_of(moment(text))
        return found if found.table_version <= snapshot.table_version else snapshot

    session.register_udtf(udtf(table(version, "a table_version"), "at_version"))
    session.register_udtf(udtf(table(time_of, "a time"), "at_time"))


def moment(text: Any) -> datetime.datetime:
    """Return a time written as ISO 8601; without a zone it is in UTC. Raises RequestError for what is none."""
    try:
        found = datetime.datetime.fromisoformat(text)
        return found.astimezone(datetime.UTC) if found.tzinfo else found.replace(tzinfo=datetime.UTC)
    except (TypeError, ValueError, OverflowError):
        raise RequestError(f"{str(text)[:80]!r} is not a time such as 2026-01-01T00:00:00Z") from None


_GROUPS = re.compile(r"\b(?:GROUP\s+BY|DISTINCT)\b", re.IGNORECASE)

# Refusals, before and after planning

_CHANGING = frozenset(("DELETE", "UPDATE", "MERGE", "TRUNCATE"))
_CHANGES = frozenset(("INSERT", "CREATE", "DROP"))
_REFUSED = frozenset(
    (
        *("ALTER", "ANALYZE", "BEGIN", "CALL", "COMMIT", "COPY", "DEALLOCATE", "EXECUTE", "GRANT", "LOAD", "PREPARE", "RELEASE"),
        *("RESET", "REVOKE", "ROLLBACK", "SAVEPOINT", "SET", "START", "UNLOAD", "USE", "VACUUM"),
    )
)
_SERVED = "statements may read (SELECT, EXPLAIN, SHOW, DESCRIBE), INSERT, and define tables and views (CREATE, DROP)"
_READING = "it may only read: SELECT, SHOW, DESCRIBE"
_APPEND_ONLY = "the log is append-only: rows are never updated, deleted, merged or truncated"


def _public(name: str) -> str:
    """Return the topic or view that a statement names. Raises RequestError when it is not in `public`."""
    *above, topic = name.split(".")
    if above not in ([], [PUBLIC], [CATALOG, PUBLIC]):
        raise RequestError(f"{name[:200]!r} is not in {CATALOG}.{PUBLIC}, where topics and views are; nothing was written")
    return topic


def _check_declared(sql: str, name: str, schema: pa.Schema) -> None:
    """Refuse what a CREATE TABLE promises and the log does not keep."""
    promised = sorted(sqltext.keywords(sql) & {"PRIMARY", "UNIQUE", "FOREIGN", "REFERENCES", "CHECK", "DEFAULT"})
    required = next((field.name for field in schema if not field.nullable), None)
    if promised or required is not None:
        what = f"column {required!r} is NOT NULL" if not promised else f"it has {promised[0]}"
        raise Unsupported(f"table {name!r}: {what}, and a log keeps no constraints or defaults; nothing was written; leave it out")


# Parameters

Values = dict[str, pa.Scalar] | None


def _parameters(session: SessionContext, sql: str, names: Sequence[str]) -> pa.Schema:
    """Return the parameters of a statement with the types that DataFusion infers; null where it cannot.

    It tells them only when it prepares a statement, and leaves out those that it does not know: then each is asked about
    by itself.
    """

    def inferred(text: str) -> list[pa.DataType]:
        try:
            plan = session.sql(f"EXPLAIN PREPARE parameters AS {text}").logical_plan().inputs()[0]
            return [plain_field(field).type for field in plan.to_variant().fields()]
        except Exception:  # what is wrong with the statement comes up when it is planned
            return []

    kinds = inferred(sql) if names else []
    if 0 < len(names) <= PARAMETERS_ASKED_MAX and len(kinds) != len(names):
        kinds = [(inferred(sqltext.alone(sql, number)) or [pa.null()])[0] for number in range(1, len(names) + 1)]
    kinds = kinds if len(kinds) == len(names) else [pa.null()] * len(names)
    for number in sqltext.limits(sql) if names else ():
        kinds[number - 1] = pa.int64()
    return pa.schema([pa.field(name, kind) for name, kind in zip(names, kinds, strict=True)])


def _count(names: Sequence[str]) -> str:
    return f"the statement has {len(names)} parameter{'' if len(names) == 1 else 's'}"


def _row(bound: pa.RecordBatch, row: int) -> Values:
    return {str(number): column[row] for number, column in enumerate(bound.columns, 1)}


def _nulls(parameters: pa.Schema) -> Values:
    return {str(number): pa.scalar(None, field.type) for number, field in enumerate(parameters, 1)} or None


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
    if kind != "TableScan" or sqltext.measure(sql).tables != 1:
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
    words = text[len(prefix) :][:1000].rstrip(".")
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
        return Unsupported(_APPEND_ONLY if changing else f"{refused[1] or 'this'} is not served here: {_READING}")
    if words.startswith("Resources exhausted"):
        return TryAgain("the query needs more memory than statement_bytes_max and could not spill; ask for less or raise it")
    if words.startswith("Internal error") or "panicked" in words[:40]:
        log.error("DataFusion: %s", text)
        return OplogError(f"the query failed inside the engine: {words}")
    if "not implemented" in prefix:
        return Unsupported(f"the query uses something that is not implemented: {words}")
    return RequestError(f"the query cannot be answered: {words}")
