"""Sums over a range of time, without a plan.

A dashboard asks how many entries there are between two times, and what they add up to, again and again, each time with other
times. Planning such a text takes longer than reading the few entries it asks for. So the plan of one that comes again is looked
at, and texts that are the same but for their times are answered as that plan says: the topic is scanned, and Arrow sums up.

Taken is a text whose plan counts or adds up columns of one topic and compares one column of times with the text's own, each
of them once and to its last digit. That is tried with times that have no round parts: a text that cuts them off, as a CAST to
DATE does, is planned. So is whatever reads more than few entries.
"""

from __future__ import annotations

import datetime
import logging
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datafusion import Expr

from flight_oplog.filters import COMPARES, Filter
from flight_oplog.kept import remember
from flight_oplog.provider import EntriesTable
from flight_oplog.scans import ScanContext
from flight_oplog.sql.aggregates import bare, simple
from flight_oplog.sql.catalog import System, table_of
from flight_oplog.sql.measure import REMEMBERED_CHARACTERS, alike, measure, times_in, with_times
from flight_oplog.sql.planner import DATED, SHORT_ENTRIES, Asked, Planner, sums_up
from flight_oplog.sql.plans import chain
from flight_oplog.sql.refusals import PUBLIC, translated
from flight_oplog.sql.repeated import registry
from flight_oplog.sql.stream import Running
from flight_oplog.store import Snapshot

log = logging.getLogger("flight_oplog.sql")

FORMS_KEPT = 1000
_TIME = re.compile(r"'(\d{4}-\d\d-\d\d)([ T])(\d\d:\d\d:\d\d)(\.\d{1,6})?(\+00:00|Z)?'")
_SUMS = {"sum": pc.sum, "avg": pc.mean, "min": pc.min, "max": pc.max}
_ADDED = {"sum": (pa.int64(), pa.uint64(), pa.float64()), "avg": (pa.float64(),)}
# In any other zone a time without one is not always as far from UTC.
_UTC = (None, "UTC", "+00:00")
_MOVES = re.compile(r"\bAT\b", re.IGNORECASE)  # AT TIME ZONE, by hours that the time of year decides
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROS = {"us": 1, "ms": 1000, "s": 1_000_000}
# DataFusion's own times have nanoseconds: it refuses what these cannot say.
_MICROS_MAX = (1 << 63) // 1000 - 1
_TRIED = datetime.datetime(1987, 10, 23, 17, 49, 58, 765432, datetime.UTC)
_NEXT_TRIED = datetime.timedelta(days=1, hours=1, minutes=1, seconds=1, microseconds=11111)


@dataclass(frozen=True)
class Form:
    """What texts ask for that are alike but for their times."""

    db_schema: str
    topic: str
    column: str  # of times
    ends: tuple[tuple[str, int], ...]  # how it is compared with which of the text's times
    sums: tuple[tuple[str, str | None], ...]  # functions and their columns; COUNT(*) has none
    schema: pa.Schema


class Sums:
    """Answers texts of known forms. Thread-safe."""

    def __init__(self, planner: Planner, system: System) -> None:
        self._planner = planner
        self._system = system
        self._once: OrderedDict[Any, None] = OrderedDict()  # asked once: looking at a form takes as long as a plan
        self._forms: OrderedDict[Any, Form | None] = OrderedDict()  # none for what has to be planned

    def schema(self, sql: str, snapshot: Snapshot, db_schema: str) -> pa.Schema | None:
        """Return the schema of what a text asks for, if its form is known."""
        known = self._known(sql, snapshot, db_schema)
        return None if known is None else known[0].schema

    def answered(self, asked: Asked) -> Running | None:
        """Return a query's answer, if its form is known and the entries it asks for are few."""
        if asked.values is not None or asked.offsets is not None or not asked.snapshot.store.is_local:
            return None
        known = self._known(asked.sql, asked.snapshot, asked.db_schema)
        if known is None:
            return None
        form, times = known
        context = ScanContext(self._planner.cache, 1, sums_up=True)
        try:
            table = table_of(asked.snapshot, form.db_schema, form.topic, context, self._system)
            assert isinstance(table, EntriesTable)
            fragments = tuple(table.fragments(_filter(form, times, table.schema.field(form.column).type)))
        except Exception as error:  # planning will tell
            log.debug("planned after all: %s", error)
            return None
        return None if context.entries > SHORT_ENTRIES else Running(form.schema, _summed(form, fragments, context), context.counts)

    def note(self, asked: Asked, schema: pa.Schema) -> None:
        """Look at the form of a query that was planned, reads few entries and gives this schema, if it comes again."""
        times = _times(asked.sql)
        if times is None or asked.values is not None or asked.offsets is not None or len({*times}) < len(times):
            return
        key, form = _key(asked.sql, asked.snapshot, asked.db_schema), None
        if key in self._forms:
            return
        if key not in self._once:
            remember(self._once, key, None, FORMS_KEPT)
            return
        if sums_up(asked.sql) and not DATED.search(asked.sql) and not _MOVES.search(asked.sql):
            try:
                form = self._form(asked, times, schema)
            except Exception as error:  # plans have more kinds of expressions than are known here
                log.debug("has no form: %s", error)
        remember(self._forms, key, form, FORMS_KEPT)

    def _known(self, sql: str, snapshot: Snapshot, db_schema: str) -> tuple[Form, list[int]] | None:
        """Return the form of a text, and its times."""
        times = _times(sql)
        form = None if times is None else self._forms.get(_key(sql, snapshot, db_schema))
        return None if form is None or times is None else (form, times)

    def _form(self, asked: Asked, times: Sequence[int], schema: pa.Schema) -> Form | None:
        tried = [_TRIED + _NEXT_TRIED * sorted(times).index(time) for time in times]
        sql = with_times(asked.sql, [_written(time, like) for time, like in zip(tried, times_in(asked.sql), strict=True)])
        _, frame, _ = self._planner.plan(replace(asked, sql=sql))
        nodes, kinds = chain(frame.optimized_logical_plan())
        if kinds not in (["Projection", "Aggregate", "TableScan"], ["Aggregate", "TableScan"]):
            return None
        scan, aggregate = nodes[-1].to_variant(), nodes[-2].to_variant()
        _, db_schema, topic = scan.fqn()
        db_schema = db_schema or asked.db_schema
        if aggregate.group_by_exprs() or scan.fetch() is not None or db_schema not in (PUBLIC, "log"):
            return None
        made = [simple(Expr(each)) for each in aggregate.aggregate_exprs()]
        shown = list(range(len(made)))
        if kinds[0] == "Projection":
            names = aggregate.schema().field_names()
            shown = [names.index(bare(Expr(each)).to_variant().name()) for each in nodes[0].to_variant().projections()]
        of_topic = asked.snapshot.topics[topic].schema
        sums = [made[place] for place in shown]
        compared = [_compared(Expr(each)) for each in scan.filters()]
        if not all(each and _can_sum(*each, of_topic) for each in sums) or len({column for column, _, _ in compared}) != 1:
            return None
        column, kind = compared[0][0], of_topic.field(compared[0][0]).type
        micros = _times(sql) or []
        exact = [_in_unit(time, kind) for time in micros]
        if any(time % _MICROS.get(kind.unit, 1) for time in micros):  # DataFusion cuts off digits that the column does not have
            return None
        if kind.tz not in _UTC or sorted(value for _, _, value in compared) != sorted(exact):
            return None
        ends = tuple((how, exact.index(value)) for _, how, value in compared)
        return Form(db_schema, topic, column, ends, tuple(each for each in sums if each), schema)


def _key(sql: str, snapshot: Snapshot, db_schema: str) -> Any:
    return (alike(sql), db_schema, *registry(snapshot))


# Times


def _times(sql: str) -> list[int] | None:
    """Return the times in a text, in microseconds since 1970; None where there are none, or `alike` leaves others out too."""
    if len(sql) > REMEMBERED_CHARACTERS or not measure(sql).is_plain:
        return None
    found = [_micros(text) for text in times_in(sql)]
    times = [micros for micros in found if micros is not None]
    return times if times and len(times) == len(found) else None


def _micros(text: str) -> int | None:
    """Return a time as it is written in UTC; None for what is none, or not one of DataFusion's."""
    if _TIME.fullmatch(text) is None:
        return None
    try:
        moment = datetime.datetime.fromisoformat(text[1:-1])
    except ValueError:
        return None
    micros = (moment.replace(tzinfo=datetime.UTC) - _EPOCH) // datetime.timedelta(microseconds=1)
    return micros if abs(micros) <= _MICROS_MAX else None


def _written(time: datetime.datetime, like: str) -> str:
    """Write a time as another one is, with as many digits."""
    found = _TIME.fullmatch(like)
    assert found is not None
    _, between, _, fraction, zone = found.groups("")
    return f"'{time:%Y-%m-%d}{between}{time:%H:%M:%S}{f'.{time.microsecond:06}'[: len(fraction)]}{zone}'"


def _in_unit(micros: int, kind: pa.DataType) -> int:
    """Return a time as a column's values are: texts of a form have no more digits than these."""
    return micros * 1000 if kind.unit == "ns" else micros // _MICROS[kind.unit]


# Plans


def _compared(expression: Expr) -> tuple[str, str, int]:
    """Return the column of times that a condition compares, how, and with which value, as its values are."""
    found = expression.to_variant()
    column, value = Expr(found.left()), Expr(found.right()).python_value()
    if column.variant_name() != "Column" or found.op() not in COMPARES or not pa.types.is_timestamp(value.type):
        raise ValueError(f"{expression.canonical_name()} is another condition")
    return column.to_variant().name(), found.op(), value.value


def _can_sum(function: str, column: str | None, schema: pa.Schema) -> bool:
    """Whether Arrow makes of a column what DataFusion does."""
    if column is None or function == "count":
        return column is None or column in schema.names
    kind = schema.field(column).type
    if function in ("min", "max"):  # of what has no NaN
        return pa.types.is_integer(kind) or pa.types.is_timestamp(kind) or pa.types.is_date32(kind)
    return kind in _ADDED[function]


# Answers


def _filter(form: Form, times: Sequence[int], kind: pa.DataType) -> Filter:
    values = [_in_unit(times[place], kind) for _, place in form.ends]
    return Filter.of_range(form.column, [how for how, _ in form.ends], pa.array(values, pa.int64()).cast(kind))


def _summed(form: Form, fragments: Sequence[Any], context: ScanContext) -> Iterator[pa.RecordBatch]:
    """Yield the one row of an answer."""
    columns = [*dict.fromkeys(column for _, column in form.sums if column is not None)]
    try:
        batches = [batch for fragment in fragments for batch in fragment.scanner(columns=columns).to_batches()]
        rows = sum(batch.num_rows for batch in batches)
        found = []
        for (function, column), field in zip(form.sums, form.schema, strict=True):
            values = None if column is None or not batches else pa.chunked_array([batch.column(column) for batch in batches])
            found.append(_sum(function, values, rows if column is None else 0, field.type))
        yield pa.RecordBatch.from_arrays(found, schema=form.schema)
    except Exception as error:
        raise translated(error, context) from error


def _sum(function: str, values: pa.ChunkedArray | None, rows: int, kind: pa.DataType) -> pa.Array:
    """Return one sum; of no values it is null, or how many rows there are."""
    if function == "count":
        return pa.array([rows if values is None else len(values) - values.null_count], kind)
    if values is None:
        return pa.nulls(1, kind)
    return pa.repeat(_SUMS[function](values).cast(kind), 1)
