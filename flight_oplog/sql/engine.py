"""SQL over one snapshot, in DataFusion.

What a statement is, DataFusion's own parser says: it plans INSERT, CREATE and DROP under an EXPLAIN, which performs
nothing, and what they would change is returned as a `Change` for the log to carry out.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
from datafusion import SessionContext

from flight_oplog.cache import ColumnCache
from flight_oplog.config import Config
from flight_oplog.errors import NotFound, OplogError, RequestError, Unsupported
from flight_oplog.kept import remember
from flight_oplog.scans import ScanContext
from flight_oplog.sql import lexer
from flight_oplog.sql.catalog import BOUND, TIME_TRAVEL, System, table_of, tables
from flight_oplog.sql.measure import measure
from flight_oplog.sql.parameters import Values, bound_to, counted, nulls_of, parameters_of, row_of
from flight_oplog.sql.planner import SHORT_ENTRIES, Asked, Planner, accountable, groups
from flight_oplog.sql.plans import followed, is_constant, is_literal
from flight_oplog.sql.queries import Queries, explained, metrics_table, settings_table, topics_table
from flight_oplog.sql.refusals import CATALOG, PUBLIC, SERVED, cannot_filter, check_declared, in_public, keys_of, translated
from flight_oplog.sql.repeated import REMEMBERED_CHARACTERS, Repeated, registry
from flight_oplog.sql.stream import Running, Stopped, at_once, paced, schema_of, to_wire, widened, wire_schema
from flight_oplog.sql.sums import Sums
from flight_oplog.store import Snapshot

NO_PARAMETERS = pa.schema([])
# Statements whose result's schema is remembered.
PREPARED_KEPT = 1000
# Answers of statements that say them themselves, as SELECT 1 does: pools of connections ask such before each use.
CONSTANTS_KEPT = 100
CONSTANT_CHARACTERS = 200
# Files that are looked into before anybody asks: a fifth of a second's work.
WARMED_FILES = 1000
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
    keys: tuple[str, ...] = ()  # of the topic that a CREATE TABLE declares


class Engine:
    """Plans and runs statements. Thread-safe."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._queries = Queries()
        self._system: System = {
            "topics": topics_table,
            "queries": lambda snapshot: self._queries.table(snapshot.viewer),
            "settings": lambda snapshot: settings_table(config),
            "metrics": lambda snapshot: metrics_table(self._planner.cache.metrics() | {"queries": self._queries.begun}),
        }
        self._planner = Planner(config, self._system)
        self._repeated = Repeated(self._planner, config)
        self._sums = Sums(self._planner, self._system)
        self._constants: OrderedDict[str, tuple[pa.Schema, list[pa.RecordBatch]]] = OrderedDict()
        self._prepared: OrderedDict[tuple[Any, ...], tuple[pa.Schema, pa.Schema, bool]] = OrderedDict()

    def warm(self, snapshot: Snapshot) -> None:
        """Look at what the first questions would have to look at before they read entries; nothing is shown of what is wrong there."""
        self.prepare("SELECT 1", snapshot)
        room = WARMED_FILES
        for topic in sorted(snapshot.topics.values(), key=lambda topic: len(topic.files)):
            room -= len(topic.files)
            if room < 0:
                return
            with contextlib.suppress(OplogError):
                self._planner.cache.overview(snapshot, topic)

    def prepare(self, sql: str, snapshot: Snapshot, values: pa.RecordBatch | None = None, db_schema: str = PUBLIC) -> Statement:
        """Plan `sql` against `snapshot` without running anything; return the schemas of its result and its parameters.

        A parameter whose type the statement leaves open has the type null, until `values` are bound to it.

        Raises RequestError for bad SQL, NotFound for an unknown table, Unsupported for what the log does not do.
        """
        if values is not None or len(sql) > REMEMBERED_CHARACTERS or TIME_TRAVEL.search(sql):
            return self._prepare(sql, snapshot, values, db_schema)
        # Drivers ask up to three times for one statement, dashboards for ever. What comes of it depends on nothing but these.
        key = (sql, db_schema, *registry(snapshot))
        found = self._prepared.pop(key, None)
        if found is None:
            schema = self._sums.schema(sql, snapshot, db_schema)
            made = self._prepare(sql, snapshot, None, db_schema) if schema is None else Statement(snapshot, schema)
            found = made.schema, made.parameters, made.is_update
        remember(self._prepared, key, found, PREPARED_KEPT)
        return Statement(snapshot, *found)

    def _prepare(self, sql: str, snapshot: Snapshot, values: pa.RecordBatch | None, db_schema: str) -> Statement:
        is_update = self._planner.check(sql)
        text, names = lexer.numbered(sql)
        views = not is_update and groups(text)
        session, context = self._planner.session(text, snapshot, PUBLIC if is_update else db_schema, views)
        parameters = parameters_of(session, text, names)
        if is_update:
            self._change(session, context, text, nulls_of(parameters))
            return Statement(snapshot, CHANGED, parameters, is_update)
        bound = bound_to(text, names, parameters, values, is_update)
        try:
            frame = self._planner.frame(session, context, text, row_of(bound, 0) if bound is not None and bound.num_rows else None)
        except OplogError:
            if not names:
                raise
            frame = self._planner.frame(session, context, text, nulls_of(parameters))  # some texts need to know every type
        if not names:
            self._planner.keep(text, snapshot, db_schema, (session, frame, context))
        return Statement(snapshot, schema_of(frame, context), parameters)

    def views(self, snapshot: Snapshot) -> dict[str, str]:
        """Return the views of a snapshot and their definitions."""
        return self._planner.views.of(snapshot)

    def tables(self, snapshot: Snapshot) -> Iterator[tuple[str, str, str]]:
        """Yield (SQL schema, table, type) of every table SQL can name, `information_schema` aside; the default schema first."""
        yield from (found for found in tables(snapshot) if found[0] == PUBLIC)
        yield from ((PUBLIC, name, "VIEW") for name in self._readable_views(snapshot) if name not in snapshot.topics)
        yield from (found for found in tables(snapshot) if found[0] != PUBLIC)

    def _readable_views(self, snapshot: Snapshot) -> Iterator[str]:
        """Yield the views that whoever looks at a snapshot may read: a view of what does not exist for them does not either."""
        names = sorted(self._planner.views.of(snapshot))
        yield from names if snapshot.viewer.may("read", "*") else filter(lambda name: self._is_there(snapshot, name), names)

    def _is_there(self, snapshot: Snapshot, view: str) -> bool:
        try:
            self.table_schema(snapshot, PUBLIC, view)
        except OplogError as error:
            return not isinstance(error, NotFound)
        return True

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
        _, frame, _ = self._planner.plan(Asked(sql, snapshot, lambda: False, math.inf))
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
        query = self._queries.begin(sql, snapshot.viewer.name)
        try:
            running = self._run_each(sql, snapshot, stopped, None, parameters, db_schema)
        except BaseException as error:
            query.end("failed", error)
            raise
        query.counts = running.counts
        return replace(running, batches=query.watched(running.batches))

    def at_once(self, sql: str, snapshot: Snapshot, bytes_max: int) -> Callable[[], Running] | None:
        """Return what answers a query without running it, as long as `snapshot` is the newest; None where the answer is not in hand.

        The answer has no more than so many bytes. It is a query of this server's like any other.
        """
        text, names = lexer.numbered(sql)
        if names or len(sql) > REMEMBERED_CHARACTERS:
            return None
        known: tuple[pa.Schema, Sequence[pa.RecordBatch]] | None = self._constants.get(text)
        asked = Asked(text, snapshot, lambda: False, math.inf)
        if known is None and (key := self._repeated.key(asked)) is not None:
            known = self._repeated.answer(key, asked)
        if known is None or sum(batch.nbytes for batch in known[1]) > bytes_max:
            return None
        schema, batches = known
        principal = snapshot.viewer.name

        def again() -> Running:
            return Running(schema, self._queries.begin(sql, principal).watched(iter(batches)))

        return again

    def _run_each(
        self,
        sql: str,
        snapshot: Snapshot,
        stopped: Stopped,
        offsets: tuple[int, int] | None,
        parameters: pa.RecordBatch | None,
        db_schema: str,
    ) -> Running:
        self._planner.check(sql)
        deadline = time.monotonic() + self._config.statement_seconds_max
        text, names = lexer.numbered(sql)
        asked = Asked(text, snapshot, stopped, deadline, None, db_schema, offsets)
        if parameters is None or not parameters.num_columns:
            return self._run(asked)
        session, context = self._planner.session(text, snapshot, db_schema)
        wanted = parameters_of(session, text, names)
        bound = bound_to(text, names, wanted, parameters, is_update=False)
        assert bound is not None
        if not bound.num_rows:
            return Running(schema_of(self._planner.frame(session, context, text, nulls_of(wanted)), context), iter(()))
        first = self._run(replace(asked, values=row_of(bound, 0)))

        def each() -> Iterator[pa.RecordBatch]:
            yield from first.batches
            for row in range(1, bound.num_rows):
                for batch in self._run(replace(asked, values=row_of(bound, row))).batches:
                    yield to_wire(batch, first.schema)

        return Running(first.schema, each() if bound.num_rows > 1 else first.batches, first.counts)

    def _run(self, asked: Asked) -> Running:
        if (constant := self._constants.get(asked.sql)) is not None and asked.values is None:
            return Running(constant[0], iter(constant[1]))
        key = self._repeated.key(asked)
        if key is not None and (answered := self._repeated.answered(key, asked)) is not None:
            return answered
        if (summed := self._sums.answered(asked)) is not None:
            return summed
        if (whole := self._planner.whole(asked)) is not None:
            schema, batches, context = whole
            return Running(schema, paced(batches, self._config.message_bytes_max), context.counts)
        began = time.monotonic()
        frame, stream, context = self._planner.start(asked)
        schema = schema_of(frame, context)
        if not _READS.search(asked.sql) and is_constant(frame.logical_plan()):
            batches = paced(at_once(stream, context, schema), self._config.message_bytes_max)
            if asked.values is None and len(asked.sql) <= CONSTANT_CHARACTERS and is_literal(frame.logical_plan()):
                kept = list(batches)
                remember(self._constants, asked.sql, (schema, kept), CONSTANTS_KEPT)
                batches = iter(kept)
            return Running(schema, batches)
        if self._is_short(asked, context):
            batches = at_once(stream, context, schema)
            self._sums.note(asked, schema)
        else:
            batches = self._planner.pulled(stream, context, schema, asked)
        lasting = self._repeated.lasting(key, asked, frame)
        del frame, stream  # the frame holds the plan, the plan holds running tasks

        def noted() -> Iterator[pa.RecordBatch]:
            first = next(batches, None)
            self._repeated.note(key, time.monotonic() - began, context.counts.values())
            if first is not None:
                yield first
                yield from batches
            if measure(asked.sql).first == "EXPLAIN":
                yield from explained(context.counts, schema)

        found = paced(noted(), self._config.message_bytes_max)
        if key is not None and lasting is not None:
            found = self._repeated.kept(key, lasting, schema, found)
        return Running(schema, found, context.counts)

    def _is_short(self, asked: Asked, context: ScanContext) -> bool:
        """Whether a query that has begun takes no time worth stopping it, which takes a detour of a millisecond."""
        return context.entries <= SHORT_ENTRIES and asked.snapshot.store.is_local and context.is_plain

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
        self._planner.check(sql)
        text, names = lexer.numbered(sql)
        asked = Asked(text, snapshot, stopped, time.monotonic() + self._config.statement_seconds_max)

        def opened() -> tuple[SessionContext, ScanContext]:
            return self._planner.session(text, snapshot, PUBLIC)

        session, context = opened()
        wanted = parameters_of(session, text, names)
        bound = bound_to(text, names, wanted, parameters, is_update=True)
        if bound is None:
            if names:
                raise RequestError(f"{counted(names)} and none is bound; nothing was written")
            return self._changing(asked, opened)
        if bound.num_rows > 1 and (together := lexer.as_select(text, f'"{BOUND}"."values"')) is not None:
            return self._changing(replace(asked, sql=together), lambda: self._planner.session(text, snapshot, PUBLIC, bound=bound))
        if not bound.num_rows:
            found = self._change(session, context, text, nulls_of(wanted))[0]
            found.batches = iter(())
            return found
        found = self._changing(replace(asked, values=row_of(bound, 0)), opened)
        first = found.batches

        def each() -> Iterator[pa.RecordBatch]:
            yield from first or ()
            for row in range(1, bound.num_rows):
                yield from self._changing(replace(asked, values=row_of(bound, row)), opened).batches or ()

        if first is not None:
            found.batches = each()
        return found

    def _changing(self, asked: Asked, opened: Callable[[], tuple[SessionContext, ScanContext]]) -> Change:
        """Return what a statement would change; `opened` makes a session for it."""
        session, context = opened()
        found, plan = self._change(session, context, asked.sql, asked.values)
        schema = found.schema

        def started() -> tuple[Any, ScanContext]:
            try:
                frame = session.create_dataframe_from_logical_plan(plan)
                return accountable(session, frame, context).execute_stream(), context
            except Exception as error:
                if not cannot_filter(error, context):
                    raise translated(error, context) from error
            plain, again = opened()
            plain.remove_optimizer_rule("push_down_filter")
            try:
                frame = plain.create_dataframe_from_logical_plan(self._change(plain, again, asked.sql, asked.values)[1])
                return accountable(plain, frame, again).execute_stream(), again
            except Exception as error:
                raise translated(error, again) from error

        def entries() -> Iterator[pa.RecordBatch]:
            """Begin only when somebody wants them: a statement that is refused first must leave no work behind."""
            assert schema is not None
            stream, context = started()
            batches = self._planner.pulled(stream, context, schema, asked)
            del stream
            yield from batches

        if plan is not None and schema is not None:
            found.batches = entries()
        return found

    def _change(self, session: SessionContext, context: ScanContext, sql: str, values: Values) -> tuple[Change, Any]:
        """Plan a statement that is no query; return what it would change, and the plan of its entries."""
        text, options = lexer.table_options(sql)
        keys = keys_of(options)
        try:
            plan = session.sql(f"EXPLAIN {text}", param_values=values).logical_plan().inputs()[0]
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
            return replace(change, keys=keys), None if is_empty else inputs[0]
        if kind == "CreateView" and schema is not None:
            if values:
                raise RequestError("a view has no parameters; nothing was written")
            name, definition = in_public(found.name()), found.definition()
            before = itertools.takewhile("VIEW".__ne__, (token.text.upper() for token in lexer.tokens(sql)))
            if not {"TEMP", "TEMPORARY"}.isdisjoint(before):
                raise Unsupported(f"view {name!r}: temporary views are not served, it would last; nothing was written; leave out TEMPORARY")
            return Change("CREATE VIEW", name, wire_schema(schema), replaces=found.or_replace(), definition=definition), None
        if kind in ("DropTable", "DropView"):
            return Change("DROP TABLE" if kind == "DropTable" else "DROP VIEW", in_public(found.name()), tolerant=found.if_exists()), None
        raise Unsupported(f"{' '.join(sql.split()[:2]).upper()[:40]} is not served: {SERVED}")


_READS = re.compile(r"\b(?:FROM|SHOW|DESCRIBE|DESC|EXPLAIN)\b", re.IGNORECASE)
