"""SQL over one snapshot, in DataFusion.

What a statement is, DataFusion's own parser says: it plans INSERT, CREATE and DROP under an EXPLAIN, which performs
nothing, and what they would change is returned as a `Change` for the log to carry out. Each statement gets a session of
its own: 0.2 ms, and nothing a client says can outlive its statement.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
from datafusion import RuntimeEnvBuilder, SessionConfig, SessionContext, SQLOptions

from flight_oplog import codec
from flight_oplog.cache import ColumnCache, ScanCounts
from flight_oplog.config import Config, provide_engine_threads
from flight_oplog.errors import OplogError, RequestError, TooLarge, Unsupported
from flight_oplog.provider import RowsTable, ScanContext, topics_table, whole_of
from flight_oplog.schema import SCHEMAS_TOPIC, VIEWS_TOPIC
from flight_oplog.sql import lexer
from flight_oplog.sql.aggregates import ANSWER_BYTES_MAX, STATE_ROWS_MAX, Aggregation, Answer, State, States, taken_apart
from flight_oplog.sql.catalog import BOUND, TIME_TRAVEL, Catalog, Shelf, System, register_time_travel, table_of, tables
from flight_oplog.sql.parameters import Values, bound_to, counted, nulls_of, parameters_of, row_of
from flight_oplog.sql.plans import followed, is_constant, top_of
from flight_oplog.sql.queries import Queries, explained
from flight_oplog.sql.refusals import (
    APPEND_ONLY,
    CATALOG,
    CHANGES,
    CHANGING,
    PUBLIC,
    REFUSED,
    SERVED,
    cannot_filter,
    check_declared,
    in_public,
    translated,
)
from flight_oplog.sql.stream import Pulled, Puller, Stopped, at_once, paced, pulled, schema_of, to_wire, widened, wire_schema
from flight_oplog.sql.views import Views
from flight_oplog.store import Snapshot, Topic

log = logging.getLogger("flight_oplog.sql")

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

NO_PARAMETERS = pa.schema([])
# Statements whose result's schema is remembered, and how long their text may be.
PREPARED_KEPT = 1000
PREPARED_CHARACTERS = 4096
_DECIDING = (SCHEMAS_TOPIC, VIEWS_TOPIC)
# An aggregate that took so long is worth a state.
STATE_SECONDS = 0.01
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
        self._views = Views(config)
        self._states = States(config.state_bytes_max)
        self._prepared: OrderedDict[tuple[Any, ...], tuple[pa.Schema, pa.Schema, bool]] = OrderedDict()
        self._queries = Queries()
        self._system: System = {"topics": topics_table, "queries": lambda snapshot: self._queries.table()}
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="engine", daemon=True).start()

    def prepare(self, sql: str, snapshot: Snapshot, values: pa.RecordBatch | None = None, db_schema: str = PUBLIC) -> Statement:
        """Plan `sql` against `snapshot` without running anything; return the schemas of its result and its parameters.

        A parameter whose type the statement leaves open has the type null, until `values` are bound to it.

        Raises RequestError for bad SQL, NotFound for an unknown table, Unsupported for what the log does not do.
        """
        if values is not None or len(sql) > PREPARED_CHARACTERS or TIME_TRAVEL.search(sql):
            return self._prepare(sql, snapshot, values, db_schema)
        # Drivers ask up to three times for one statement, dashboards for ever. What comes of it depends on nothing but these.
        key = (sql, db_schema, *_registry(snapshot))
        found = self._prepared.pop(key, None)
        if found is None:
            made = self._prepare(sql, snapshot, None, db_schema)
            found = made.schema, made.parameters, made.is_update
        self._prepared[key] = found
        while len(self._prepared) > PREPARED_KEPT:
            with contextlib.suppress(KeyError):  # another thread may have been here
                self._prepared.popitem(last=False)
        return Statement(snapshot, *found)

    def _prepare(self, sql: str, snapshot: Snapshot, values: pa.RecordBatch | None, db_schema: str) -> Statement:
        is_update = self._check(sql)
        text, names = lexer.numbered(sql)
        session, context = self._session(text, snapshot, PUBLIC if is_update else db_schema)
        parameters = parameters_of(session, text, names)
        if is_update:
            self._change(session, context, text, nulls_of(parameters))
            return Statement(snapshot, CHANGED, parameters, is_update)
        bound = bound_to(text, names, parameters, values, is_update)
        try:
            frame = self._frame(session, context, text, row_of(bound, 0) if bound is not None and bound.num_rows else None)
        except OplogError:
            if not names:
                raise
            frame = self._frame(session, context, text, nulls_of(parameters))  # some texts need to know every type
        return Statement(snapshot, schema_of(frame, context), parameters)

    def views(self, snapshot: Snapshot) -> dict[str, str]:
        """Return the views of a snapshot and their definitions."""
        return self._views.of(snapshot)

    def tables(self, snapshot: Snapshot) -> Iterator[tuple[str, str, str]]:
        """Yield (SQL schema, table, type) of every table SQL can name, `information_schema` aside; the default schema first."""
        yield from (found for found in tables(snapshot) if found[0] == PUBLIC)
        yield from ((PUBLIC, name, "VIEW") for name in sorted(self._views.of(snapshot)) if name not in snapshot.topics)
        yield from (found for found in tables(snapshot) if found[0] != PUBLIC)

    def table_schema(self, snapshot: Snapshot, db_schema: str, name: str) -> pa.Schema:
        """Return the schema of one of `tables`."""
        if db_schema == PUBLIC and name not in snapshot.topics:
            return self.prepare(f'SELECT * FROM {CATALOG}.{PUBLIC}."{name}"', snapshot).schema
        return widened(table_of(snapshot, db_schema, name, ScanContext(ColumnCache(0), 1), self._system).schema)

    def prepare_run(self, sql: str, snapshot: Snapshot) -> tuple[Statement, str]:
        """Plan a statement that can be run over each new run of a topic's entries; return it and the topic's name.

        Such a statement makes something of each entry by itself: it reads one topic, and has projections and filters.
        Raises RequestError that says why another one cannot be followed, and what `prepare` raises.
        """
        _, frame, _ = self._plan(sql, snapshot)
        topic = followed(sql, frame.logical_plan())
        return Statement(snapshot, wire_schema(frame.schema())), topic

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
        if offsets is not None:  # a run of a follower's, one of very many
            return self._run_each(sql, snapshot, stopped, offsets, parameters, db_schema)
        query = self._queries.begin(sql)
        try:
            running = self._run_each(sql, snapshot, stopped, None, parameters, db_schema)
        except BaseException as error:
            query.end("failed", error)
            raise
        query.counts = running.counts
        return replace(running, batches=query.watched(running.batches))

    def _run_each(
        self,
        sql: str,
        snapshot: Snapshot,
        stopped: Stopped,
        offsets: tuple[int, int] | None,
        parameters: pa.RecordBatch | None,
        db_schema: str,
    ) -> Running:
        self._check(sql)
        deadline = time.monotonic() + self._config.statement_seconds_max
        text, names = lexer.numbered(sql)
        if parameters is None or not parameters.num_columns:
            return self._run(text, snapshot, stopped, offsets, deadline, None, db_schema)
        session, context = self._session(text, snapshot, db_schema)
        wanted = parameters_of(session, text, names)
        bound = bound_to(text, names, wanted, parameters, is_update=False)
        assert bound is not None
        if not bound.num_rows:
            return Running(schema_of(self._frame(session, context, text, nulls_of(wanted)), context), iter(()))
        first = self._run(text, snapshot, stopped, offsets, deadline, row_of(bound, 0), db_schema)

        def each() -> Iterator[pa.RecordBatch]:
            yield from first.batches
            for row in range(1, bound.num_rows):
                running = self._run(text, snapshot, stopped, offsets, deadline, row_of(bound, row), db_schema)
                for batch in running.batches:
                    yield to_wire(batch, first.schema)

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
        key = None
        if offsets is None and _AGGREGATES.search(sql) and len(sql) <= PREPARED_CHARACTERS and not TIME_TRAVEL.search(sql):
            key = (sql, db_schema, _packed(values), *_registry(snapshot))
            if (answered := self._from_state(key, sql, snapshot, stopped, deadline, values, db_schema)) is not None:
                return answered
        began = time.monotonic()
        frame, stream, context = self._start(sql, snapshot, offsets, values, db_schema)
        schema = schema_of(frame, context)
        if not _READS.search(sql) and is_constant(frame.logical_plan()):
            return Running(schema, paced(at_once(stream, context, schema), self._config.message_bytes_max))
        puller = Puller(self._loop, stream, context)
        del frame, stream  # the frame holds the plan, the plan holds running tasks
        batches = Pulled(pulled(puller, context, schema, deadline, self._config.statement_seconds_max, stopped), puller)

        def noted() -> Iterator[pa.RecordBatch]:
            first = next(batches, None)
            if key is not None and time.monotonic() - began > STATE_SECONDS:
                self._states.note(key)
            if first is not None:
                yield first
                yield from batches
            if lexer.measure(sql).first == "EXPLAIN":
                yield from explained(context.counts, schema)

        return Running(schema, paced(noted(), self._config.message_bytes_max), context.counts)

    def _from_state(
        self, key: Any, sql: str, snapshot: Snapshot, stopped: Stopped, deadline: float, values: Values, db_schema: str
    ) -> Running | None:
        """Answer a statement from its records' bounds, or from the state of its aggregate and the entries since.

        None when there is none, or it is not worth one: then it is run as it is. See `aggregates`.
        """
        known = self._states.asked(key)
        if (answer := known.answer) is not None:
            now = snapshot.topics.get(answer.topic)
            if now is not None and (now.first_offset, now.next_offset) == (answer.first, answer.last):
                return Running(answer.schema, iter(answer.batches))
        if known.is_unfit or not (known.was_slow or (_OF_ALL.search(sql) and not _OF_SOME.search(sql))):
            return None
        session, frame, context = self._plan(sql, snapshot, values=values, db_schema=db_schema)
        try:
            apart = _taken_apart(session, frame)
            topic = None if apart is None else snapshot.topics.get(apart.topic)
            if apart is None or topic is None:
                self._states.dismiss(key)
                return None
            rows = self._whole(apart, snapshot, topic, context)
            if rows is None and known.was_slow and self._config.state_bytes_max:
                rows = self._brought_up(key, apart, known.state, topic, (sql, snapshot, values, db_schema), stopped, deadline, context)
            if rows is None:
                return None
            once, shelf = self._small_session(rows)
            made = apart.values(once.table("rows"))
            if apart.relation is not None:
                *_, name = parts = apart.relation.split(".")
                shelf.tables[name] = made.into_view()
                made = once.table(".".join(f'"{part}"' for part in parts))
            stream = apart.rest(made).execute_stream()
        except OplogError:
            raise
        except Exception as error:
            log.info("a statement's aggregate is not kept: %s", error)
            self._states.dismiss(key)
            return None
        schema = schema_of(frame, context)
        puller = Puller(self._loop, stream, context)
        del stream
        batches = Pulled(pulled(puller, context, schema, deadline, self._config.statement_seconds_max, stopped), puller)
        return Running(schema, self._kept(key, topic, schema, paced(batches, self._config.message_bytes_max)), context.counts)

    def _kept(self, key: Any, topic: Topic, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield the batches of an answer, and keep it when it was a small one."""
        kept: list[pa.RecordBatch] = []
        size = 0
        for batch in batches:
            size += batch.nbytes
            kept = [*kept, batch] if size <= ANSWER_BYTES_MAX else []
            yield batch
        if size <= ANSWER_BYTES_MAX:
            self._states.keep_answer(key, Answer(topic.name, topic.first_offset, topic.next_offset, schema, tuple(kept)))

    def _whole(self, apart: Aggregation, snapshot: Snapshot, topic: Topic, context: ScanContext) -> pa.Table | None:
        """Return the state of aggregates of all of a topic, when its records' bounds tell it."""
        if apart.groups or not apart.is_whole or not all(measure.function for measure in apart.measures):
            return None
        found = [whole_of(snapshot, topic, measure.function, measure.column) for measure in apart.measures]
        if any(value is None for value in found):
            return None
        records = sum(file.records for file in topic.files)
        context.counts[f"{apart.db_schema}.{topic.name}"] = ScanCounts(files=len(topic.files), records=records)
        return pa.table({f"k{n}": pa.array([value]) for n, value in enumerate(found)})

    def _brought_up(
        self,
        key: Any,
        apart: Aggregation,
        state: State | None,
        topic: Topic,
        statement: tuple[str, Snapshot, Values, str],
        stopped: Stopped,
        deadline: float,
        context: ScanContext,
    ) -> pa.Table | None:
        """Return a statement's state as of its snapshot: the entries since are aggregated. None when it grows too large."""
        first, last = topic.first_offset, topic.next_offset
        if state is not None and (state.first != first or state.last > last):
            state = None  # some have been removed; or the snapshot is an older one
        rows = None if state is None else state.rows
        if state is None or state.last < last:
            sql, snapshot, values, db_schema = statement
            offsets = None if state is None else (state.last, last)
            frame, stream, scanned = self._start(sql, snapshot, offsets, values, db_schema, _state_of)
            context.counts.update(scanned.counts)
            made = self._gathered(frame, stream, scanned, deadline, stopped)
            if made is not None and rows is not None:
                once, _ = self._small_session(pa.concat_tables([rows, made]))
                merged = apart.merged(once.table("rows"))
                made = self._gathered(merged, merged.execute_stream(), context, deadline, stopped)
            if made is None:
                self._states.dismiss(key)
                return None
            rows = made
            self._states.keep_state(key, State(first, last, rows))
        return rows

    def _gathered(self, frame: Any, stream: Any, context: ScanContext, deadline: float, stopped: Stopped) -> pa.Table | None:
        """Return the rows of a state; None when they are too many to be one."""
        schema = wire_schema(frame.schema())
        puller = Puller(self._loop, stream, context)
        del frame, stream
        found: list[pa.RecordBatch] = []
        rows = size = 0
        for batch in pulled(puller, context, schema, deadline, self._config.statement_seconds_max, stopped):
            found.append(batch)
            rows, size = rows + batch.num_rows, size + batch.nbytes
            if rows > STATE_ROWS_MAX or size > self._config.state_bytes_max:
                return None
        return pa.Table.from_batches(found, schema)

    def _small_session(self, rows: pa.Table) -> tuple[SessionContext, Shelf]:
        """Return a session whose only table, `rows`, is these, and the shelf it is on."""
        shelf = Shelf()
        batches = rows.combine_chunks().to_batches()
        shelf.tables["rows"] = RowsTable(batches[0] if batches else codec.empty(rows.schema), ScanContext(self._cache, 1))
        return _new_session(PUBLIC, 1, self._runtime(), shelf), shelf

    def _runtime(self) -> RuntimeEnvBuilder:
        """A spill pool of its own bounds each statement; spilled runs go to the system's temporary folder."""
        return RuntimeEnvBuilder().with_disk_manager_os().with_fair_spill_pool(self._config.statement_bytes_max)

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
        text, names = lexer.numbered(sql)
        deadline = time.monotonic() + self._config.statement_seconds_max
        session, context = self._session(text, snapshot, PUBLIC)
        wanted = parameters_of(session, text, names)
        bound = bound_to(text, names, wanted, parameters, is_update=True)
        if bound is None:
            if names:
                raise RequestError(f"{counted(names)} and none is bound; nothing was written")
            return self._changing(lambda: self._session(text, snapshot, PUBLIC), text, None, deadline, stopped)
        if bound.num_rows > 1 and (together := lexer.as_select(text, f'"{BOUND}"."values"')) is not None:
            return self._changing(lambda: self._session(text, snapshot, PUBLIC, bound=bound), together, None, deadline, stopped)
        if not bound.num_rows:
            found = self._change(session, context, text, nulls_of(wanted))[0]
            found.batches = iter(())
            return found
        found = self._changing(lambda: self._session(text, snapshot, PUBLIC), text, row_of(bound, 0), deadline, stopped)
        first = found.batches

        def each() -> Iterator[pa.RecordBatch]:
            yield from first or ()
            for row in range(1, bound.num_rows):
                made = self._changing(lambda: self._session(text, snapshot, PUBLIC), text, row_of(bound, row), deadline, stopped)
                yield from made.batches or ()

        if first is not None:
            found.batches = each()
        return found

    def _changing(
        self,
        opened: Callable[[], tuple[SessionContext, ScanContext]],
        sql: str,
        values: Values,
        deadline: float,
        stopped: Stopped,
    ) -> Change:
        """Return what a statement would change; `opened` makes a session for it."""
        session, context = opened()
        found, plan = self._change(session, context, sql, values)
        schema = found.schema

        def started() -> tuple[Any, ScanContext]:
            try:
                return session.create_dataframe_from_logical_plan(plan).execute_stream(), context
            except Exception as error:
                if not cannot_filter(error, context):
                    raise translated(error, context) from error
            plain, again = opened()
            plain.remove_optimizer_rule("push_down_filter")
            try:
                return plain.create_dataframe_from_logical_plan(self._change(plain, again, sql, values)[1]).execute_stream(), again
            except Exception as error:
                raise translated(error, again) from error

        def entries() -> Iterator[pa.RecordBatch]:
            """Begin only when somebody wants them: a statement that is refused first must leave no work behind."""
            assert schema is not None
            stream, context = started()
            puller = Puller(self._loop, stream, context)
            del stream
            yield from pulled(puller, context, schema, deadline, self._config.statement_seconds_max, stopped)

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
            raise translated(error, context) from error
        kind = type(found).__name__
        if kind == "DmlStatement" and str(found.op()) == "WriteOp.Append" and schema is not None:
            return Change("INSERT", in_public(found.table_name()), wire_schema(schema)), inputs[0]
        if kind == "CreateMemoryTable" and schema is not None:
            name = in_public(found.name())
            is_empty = type(inputs[0].to_variant()).__name__ == "EmptyRelation" and not inputs[0].to_variant().produce_one_row()
            if is_empty:
                check_declared(sql, name, schema)
            change = Change("CREATE TABLE", name, wire_schema(schema), tolerant=found.if_not_exists(), replaces=found.or_replace())
            return change, None if is_empty else inputs[0]
        if kind == "CreateView" and schema is not None:
            if values:
                raise RequestError("a view has no parameters; nothing was written")
            name = in_public(found.name())
            return Change("CREATE VIEW", name, wire_schema(schema), replaces=found.or_replace(), definition=found.definition()), None
        if kind in ("DropTable", "DropView"):
            return Change("DROP TABLE" if kind == "DropTable" else "DROP VIEW", in_public(found.name()), tolerant=found.if_exists()), None
        raise Unsupported(f"{' '.join(sql.split()[:2]).upper()[:40]} is not served: {SERVED}")

    def _start(
        self,
        sql: str,
        snapshot: Snapshot,
        offsets: tuple[int, int] | None,
        values: Values,
        db_schema: str,
        shaped: Callable[[SessionContext, Any], Any] = lambda session, frame: frame,
    ) -> tuple[Any, Any, ScanContext]:
        """Start a statement, or what `shaped` makes of it, in the fastest way its filters allow; the last way allows any."""
        ways = [(False, True), (False, False)]
        if _GROUPS.search(sql):
            ways.insert(0, (True, True))
        for views, push_filters in ways:
            session, frame, context = self._plan(sql, snapshot, views, push_filters, offsets, values, db_schema)
            try:
                frame = shaped(session, frame)
                if offsets is None and _SORTS.search(sql):
                    context.top = top_of(frame.optimized_logical_plan())
                return frame, frame.execute_stream(), context
            except Exception as error:
                if not cannot_filter(error, context):
                    raise translated(error, context) from error
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
    ) -> tuple[SessionContext, Any, ScanContext]:
        if self._check(sql):
            raise RequestError("the statement is no query; nothing was written")
        session, context = self._session(sql, snapshot, db_schema, views, offsets)
        if not push_filters:
            session.remove_optimizer_rule("push_down_filter")
        return session, self._frame(session, context, sql, values), context

    def _frame(self, session: SessionContext, context: ScanContext, sql: str, values: Values = None) -> Any:
        try:
            return session.sql(sql, options=_READ_ONLY, param_values=values)
        except Exception as error:
            raise translated(error, context) from error

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
        catalog = Catalog(snapshot, context, self._system, bound)
        session = _new_session(db_schema, partitions, self._runtime(), catalog)
        defined = self._views.of(snapshot)
        travels = TIME_TRAVEL.search(sql) or any(TIME_TRAVEL.search(definition) for definition in defined.values())
        if travels:
            register_time_travel(session, snapshot, context)
        if defined and lexer.measure(sql).first != "DROP":
            of_views = session
            if db_schema != PUBLIC:
                of_views = _new_session(PUBLIC, partitions, RuntimeEnvBuilder(), catalog)
                if travels:
                    register_time_travel(of_views, snapshot, context)
            self._views.plan(sql, defined, catalog, context, of_views)
        return session, context

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
        found = lexer.measure(sql)
        self._views.check_weight(found, "the SQL text")
        if found.first in CHANGING:
            raise Unsupported(APPEND_ONLY)
        if found.first in REFUSED:
            raise Unsupported(f"{found.first} is not served: {SERVED}")
        return found.first in CHANGES


def _registry(snapshot: Snapshot) -> tuple[Any, ...]:
    """Return what changes when the schema of some topic or view does."""
    return (snapshot.store.number, *(topic and topic.next_offset for topic in map(snapshot.topics.get, _DECIDING)))


def _packed(values: Values) -> bytes | None:
    """Return a fingerprint of bound values and their types."""
    if values is None:
        return None
    table = pa.table({name: pa.array([value]) for name, value in values.items()})
    return hashlib.sha256(table.schema.serialize().to_pybytes() + table.to_batches()[0].serialize().to_pybytes()).digest()


def _taken_apart(session: SessionContext, frame: Any) -> Aggregation | None:
    return taken_apart(
        frame.logical_plan(), frame.optimized_logical_plan(), lambda plan: session.create_dataframe_from_logical_plan(plan).schema()
    )


def _state_of(session: SessionContext, frame: Any) -> Any:
    apart = _taken_apart(session, frame)
    assert apart is not None
    return apart.state(session)


_SORTS = re.compile(r"\bORDER\s+BY\b.*\bLIMIT\b", re.IGNORECASE | re.DOTALL)
_READS = re.compile(r"\b(?:FROM|SHOW|DESCRIBE|DESC|EXPLAIN)\b", re.IGNORECASE)
_AGGREGATES = re.compile(r"\b(?:GROUP\s+BY|DISTINCT|(?:count|sum|min|max|avg)\s*\()", re.IGNORECASE)
_OF_ALL = re.compile(r"\b(?:count|min|max)\s*\(", re.IGNORECASE)
_OF_SOME = re.compile(r"\b(?:WHERE|GROUP|JOIN|DISTINCT)\b", re.IGNORECASE)
_GROUPS = re.compile(r"\b(?:GROUP\s+BY|DISTINCT)\b", re.IGNORECASE)


def _new_session(db_schema: str, partitions: int, runtime: RuntimeEnvBuilder, catalog: Catalog | Shelf) -> SessionContext:
    settings = _SETTINGS | {"datafusion.catalog.default_schema": db_schema}
    session = SessionContext(SessionConfig(settings).with_target_partitions(partitions), runtime)
    session.register_catalog_provider(CATALOG, catalog)
    return session
