"""Sessions and plans: how a statement becomes a stream of DataFusion's.

Each statement gets a session of its own: 0.2 ms, and nothing a client says can outlive its statement.
"""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from datafusion import RuntimeEnvBuilder, SessionConfig, SessionContext, SQLOptions

from flight_oplog.cache import ColumnCache
from flight_oplog.config import Config, provide_engine_threads
from flight_oplog.errors import RequestError, TooLarge, Unsupported
from flight_oplog.gathering import TOGETHER_ROWS
from flight_oplog.scans import ScanContext
from flight_oplog.sql.catalog import TIME_TRAVEL, Catalog, Shelf, System, register_time_travel, table_of
from flight_oplog.sql.measure import REMEMBERED_CHARACTERS, UNIT_BYTES, measure
from flight_oplog.sql.memory import Watch
from flight_oplog.sql.parameters import Values
from flight_oplog.sql.plans import chain, top_of
from flight_oplog.sql.refusals import APPEND_ONLY, CATALOG, CHANGES, CHANGING, PUBLIC, REFUSED, SERVED, cannot_filter, translated
from flight_oplog.sql.stream import Pulled, Puller, Stopped, pulled, scanned, schema_of
from flight_oplog.sql.views import Views
from flight_oplog.store import Snapshot
from flight_oplog.vocabulary import Vocabulary

log = logging.getLogger("flight_oplog.sql")

# A plain query over so many entries takes milliseconds.
SHORT_ENTRIES = 1 << 19
# Plans of statements that were prepared, until they are run.
PLANS_KEPT = 32
PLAN_SECONDS = 1.0
BATCH_ROWS = 32_768
# A statement's batches that are in memory at once, as a guess, where its functions make large values.
BATCHES_AT_ONCE = 8
# One cross join of two tables keeps no more than a table.
CROSSED_TABLES = 3
# DataFusion optimizes a plan for us without letting go of the interpreter: only a small one, or everybody would wait.
LOOKED_INTO_OPERATORS, LOOKED_INTO_GROWTH = 100, 10_000

_READ_ONLY = SQLOptions().with_allow_ddl(False).with_allow_dml(False).with_allow_statements(False)
_SETTINGS = {
    "datafusion.execution.batch_size": str(BATCH_ROWS),
    # Records are dealt out over the partitions of a scan already; dealing out again costs a short query a tenth of its time.
    "datafusion.optimizer.enable_round_robin_repartition": "false",
    "datafusion.execution.parquet.schema_force_view_types": "false",
    "datafusion.sql_parser.map_string_types_to_utf8view": "false",
    "datafusion.catalog.information_schema": "true",
    "datafusion.catalog.create_default_catalog_and_schema": "false",
    "datafusion.catalog.default_catalog": CATALOG,
    "datafusion.catalog.default_schema": "public",
}
_GROUPS = re.compile(r"\b(?:GROUP\s+BY|DISTINCT)\b", re.IGNORECASE)
_SUMS_UP = re.compile(r"\b(?:GROUP\s+BY|DISTINCT|(?:count|sum|min|max|avg)\s*\()", re.IGNORECASE)
_WHOLE = re.compile(r"\s*SELECT\s+\*\s+FROM\s+([\w.\"]+)\s*;?\s*", re.IGNORECASE)
# What a plan takes the time of its making for, or who asks.
DATED = re.compile(r"\b(?:now|today|current_\w+|system|queries)\b", re.IGNORECASE)
_CROSSES = re.compile(r"\b(?:CrossJoin|NestedLoopJoin)Exec\b")
_LIMITS = re.compile(r"\b(?:LIMIT|FETCH)\b", re.IGNORECASE)
_SPILLS = re.compile(r"\b(?:ORDER|GROUP|DISTINCT|JOIN|OVER|UNION|INTERSECT|EXCEPT)\b", re.IGNORECASE)
_SORTS = re.compile(r"\bORDER\s+BY\b.*\bLIMIT\b", re.IGNORECASE | re.DOTALL)


# A statement's session, its plan as a frame of DataFusion's, and what its scans share.
Plan = tuple[SessionContext, Any, ScanContext]


@dataclass(frozen=True)
class Asked:
    """A query to be run: its text with numbered parameters and their values, of which snapshot, and until when.

    With `offsets`, topics show only the entries within [first, last). Names without a schema are in `db_schema`.
    """

    sql: str
    snapshot: Snapshot
    stopped: Stopped
    deadline: float
    values: Values = None
    db_schema: str = PUBLIC
    offsets: tuple[int, int] | None = None


class Planner:
    """Plans and starts statements. Thread-safe."""

    def __init__(self, config: Config, system: System) -> None:
        provide_engine_threads()
        self.cache = ColumnCache(config.cache_bytes_max)
        self.views = Views(config)
        self._config = config
        self._watch = Watch(config.statement_bytes_max)
        self._system = system
        self._partitions = os.cpu_count() or 1
        self._lock = threading.Lock()
        self._planned: OrderedDict[tuple[str, str], tuple[float, Snapshot, Plan]] = OrderedDict()

    def start(
        self, asked: Asked, shaped: Callable[[SessionContext, Any], Any] = lambda session, frame: frame
    ) -> tuple[Any, Any, ScanContext]:
        """Start a query, or what `shaped` makes of it, in the fastest way its filters allow; the last way allows any."""
        ways = [(False, True), (False, False)]
        if groups(asked.sql):
            ways.insert(0, (True, True))
        for views, push_filters in ways:
            session, frame, context = self.plan(asked, views, push_filters)
            try:
                frame = accountable(session, shaped(session, frame), context)
                if asked.offsets is None and _SORTS.search(asked.sql) and context.looks_into:
                    context.top = top_of(frame.optimized_logical_plan())
                stream = frame.execute_stream()
                if context.failures:  # an EXPLAIN shows what went wrong as a row, as Python prints it
                    raise context.failures[0]
                return frame, stream, context
            except Exception as error:
                if not cannot_filter(error, context):
                    raise translated(error, context) from error
        raise AssertionError("a statement whose filters stay in DataFusion cannot fail for them")

    def start_by_numbers(
        self, asked: Asked, numbered: dict[str, tuple[str, Vocabulary]], may_make: bool, shaped: Callable[[SessionContext], Any]
    ) -> tuple[Any, Any, ScanContext] | None:
        """Start what `shaped` makes of a session whose topics show the numbers of texts too. None where the scan finds them not worth
        it, or planning fails for whatever reason: then the statement as it is will tell."""
        session, context = self.session(asked.sql, asked.snapshot, asked.db_schema)
        context.numbered, context.makes_numbers = numbered, may_make
        try:
            frame = shaped(session)
            return frame, frame.execute_stream(), context
        except Exception as error:
            log.debug("not by numbers: %s", error)
            return None

    def whole(self, asked: Asked) -> tuple[pa.Schema, Iterator[pa.RecordBatch], ScanContext] | None:
        """Return what `SELECT * FROM topic` asks for, read without DataFusion, which only would hand each batch on; None for any other.

        From a folder alone: there is no giving up on a read here, and a folder's takes no time worth it.
        """
        found = _WHOLE.fullmatch(asked.sql)
        if asked.offsets is not None or found is None or not asked.snapshot.store.is_local:
            return None
        written = found[1].rpartition(".")[2].strip('"')
        if not {written, written.lower()} & asked.snapshot.topics.keys():
            return None  # a view, perhaps, or a table of the log's own: it is planned once
        _, frame, context = self.plan(asked)
        nodes, kinds = chain(frame.logical_plan())
        if kinds != ["Projection", "TableScan"]:
            return None
        _, db_schema, name = nodes[-1].to_variant().fqn()
        db_schema = db_schema or asked.db_schema
        if db_schema not in (PUBLIC, "log") or name not in asked.snapshot.topics:
            return None
        context = ScanContext(self.cache, 1)
        table = table_of(asked.snapshot, db_schema, name, context, self._system)
        schema = schema_of(frame, context)
        return schema, scanned(table, context, schema, asked.deadline, self._config.statement_seconds_max, asked.stopped), context

    def plan(self, asked: Asked, views: bool = False, push_filters: bool = True) -> Plan:
        """Return a query's plan as a frame, the session it is of, and what its scans share. Raises what planning raises."""
        if push_filters and (planned := self._taken(asked, views)) is not None:
            return planned
        if self.check(asked.sql):
            raise RequestError("the statement is no query; nothing was written")
        session, context = self.session(asked.sql, asked.snapshot, asked.db_schema, views, asked.offsets)
        if not push_filters:
            session.remove_optimizer_rule("push_down_filter")
        return session, self.frame(session, context, asked.sql, asked.values), context

    def keep(self, sql: str, snapshot: Snapshot, db_schema: str, planned: Plan) -> None:
        """Keep the plan of a statement that was prepared, in the way it is first run, for the run that is about to follow."""
        if not any(map(DATED.search, (sql, *self.views.of(snapshot).values()))):
            now = time.monotonic()
            with self._lock:
                self._planned.pop((sql, db_schema), None)
                self._planned[sql, db_schema] = now, snapshot, planned
                while self._planned and (len(self._planned) > PLANS_KEPT or next(iter(self._planned.values()))[0] < now - PLAN_SECONDS):
                    self._planned.popitem(last=False)

    def _taken(self, asked: Asked, views: bool) -> Plan | None:
        """Return the plan that was kept of a statement, for this use alone."""
        if asked.values is not None or asked.offsets is not None:
            return None
        with self._lock:
            made, snapshot, planned = self._planned.get((asked.sql, asked.db_schema), (-math.inf, None, None))
            if planned is None or snapshot is not asked.snapshot or planned[2].views != views:
                return None
            del self._planned[asked.sql, asked.db_schema]
        return planned if time.monotonic() - made < PLAN_SECONDS else None

    def pulled(self, stream: Any, context: ScanContext, schema: pa.Schema, asked: Asked) -> Pulled:
        """Return the batches of a stream, as they come. Let go of the stream and of its frame: they hold running tasks."""
        puller = Puller(stream, context, self._watch.begin())
        seconds_max = self._config.statement_seconds_max
        return Pulled(pulled(puller, context, schema, asked.deadline, seconds_max, asked.stopped), puller)

    def small_session(self, shelf: Shelf) -> SessionContext:
        """Return a session that knows nothing but what is on a shelf."""
        return _new_session(PUBLIC, 1, self._runtime(), shelf)

    def frame(self, session: SessionContext, context: ScanContext, sql: str, values: Values = None) -> Any:
        try:
            return session.sql(sql, options=_READ_ONLY, param_values=values)
        except Exception as error:
            raise translated(error, context) from error

    def session(
        self,
        sql: str,
        snapshot: Snapshot,
        db_schema: str,
        views: bool = False,
        offsets: tuple[int, int] | None = None,
        bound: pa.RecordBatch | None = None,
    ) -> tuple[SessionContext, ScanContext]:
        partitions = self._partitions if offsets is None else 1
        context = ScanContext(self.cache, partitions, views, offsets)
        measured = measure(sql)
        catalog = Catalog(snapshot, context, self._system, bound, inserts=measured.first == "INSERT")
        session = _new_session(db_schema, partitions, self._runtime(), catalog)
        defined = self.views.of(snapshot)
        if defined or measured.tables > 1 or _SPILLS.search(sql):
            session.sql(f"SET datafusion.runtime.max_temp_directory_size = '{self._config.spill_bytes_max >> 10}K'")
        travels = TIME_TRAVEL.search(sql) or any(TIME_TRAVEL.search(definition) for definition in defined.values())
        if travels:
            register_time_travel(session, snapshot, context)
        if defined and measured.first != "DROP":
            of_views = session
            if db_schema != PUBLIC:
                of_views = _new_session(PUBLIC, partitions, RuntimeEnvBuilder(), catalog)
                if travels:
                    register_time_travel(of_views, snapshot, context)
            measured = self.views.plan(sql, defined, catalog, context, of_views)
        characters = len(sql) + sum(len(defined[name]) for name in catalog.views)
        context.looks_into = (
            measured.operators <= LOOKED_INTO_OPERATORS and measured.growth <= LOOKED_INTO_GROWTH and characters <= REMEMBERED_CHARACTERS
        )
        context.tables, context.is_plain = measured.tables, measured.is_plain
        rows = self._config.statement_bytes_max // (BATCHES_AT_ONCE * UNIT_BYTES * measured.growth)
        does_sum_up = sums_up(sql)
        context.sums_up = does_sum_up and rows >= TOGETHER_ROWS
        context.begins_with_several = not any(map(limits, (sql, *(defined[name] for name in catalog.views))))
        context.reads_all = does_sum_up or not limits(sql) or _SORTS.search(sql) is not None
        if rows < BATCH_ROWS:  # what a function makes of a batch is in memory as a whole
            session.sql(f"SET datafusion.execution.batch_size = {max(rows, 1)}")
        return session, context

    def _runtime(self) -> RuntimeEnvBuilder:
        """A spill pool of its own bounds each statement; spilled runs go to the system's temporary folder."""
        return RuntimeEnvBuilder().with_disk_manager_os().with_fair_spill_pool(self._config.statement_bytes_max)

    def check(self, sql: str) -> bool:
        """Refuse what must not reach the parser: too long, too deep, or a statement that is not served.

        Return whether it would change something.
        """
        try:
            size = len(sql.encode())
        except UnicodeEncodeError:
            raise RequestError("the SQL text is not UTF-8") from None
        if size > self._config.sql_bytes_max:
            raise TooLarge(f"the SQL text has {size} bytes; sql_bytes_max is {self._config.sql_bytes_max}")
        found = measure(sql)
        self.views.check_weight(found, "the SQL text")
        if found.first in CHANGING:
            raise Unsupported(APPEND_ONLY)
        if found.first in REFUSED:
            raise Unsupported(f"{found.first} is not served: {SERVED}")
        return found.first in CHANGES


def accountable(session: SessionContext, frame: Any, context: ScanContext) -> Any:
    """Return a frame that does the same and whose joins hold batches with columns.

    A cross join keeps all of its left side. COUNT(*) needs no column of it, and batches without columns take no memory that
    DataFusion counts: five topics of a thousand entries took all there was, and the join never pauses to be stopped. With their
    columns it is refused as soon as it is too large.
    """
    if context.tables < CROSSED_TABLES:
        return frame
    crossed = len(_CROSSES.findall(frame.execution_plan().display_indent()))
    context.begin_anew()
    if crossed < CROSSED_TABLES - 1:
        return frame
    session.remove_optimizer_rule("optimize_projections")
    return session.create_dataframe_from_logical_plan(frame.logical_plan())


def groups(sql: str) -> bool:
    """Whether a statement groups: then it is planned with short texts as views first."""
    return _GROUPS.search(sql) is not None


def sums_up(sql: str) -> bool:
    """Whether a statement may make little of many entries."""
    return _SUMS_UP.search(sql) is not None


def limits(sql: str) -> bool:
    """Whether a statement may end before it has looked at all that it reads."""
    return _LIMITS.search(sql) is not None


def _new_session(db_schema: str, partitions: int, runtime: RuntimeEnvBuilder, catalog: Catalog | Shelf) -> SessionContext:
    settings = _SETTINGS | {"datafusion.catalog.default_schema": db_schema}
    session = SessionContext(SessionConfig(settings).with_target_partitions(partitions), runtime)
    session.register_catalog_provider(CATALOG, catalog)
    return session
