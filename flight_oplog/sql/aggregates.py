"""Aggregates that are asked again read only what is new.

Entries never change, so neither does what GROUP BY makes of the run of offsets [first, last) of a topic. Kept as a state
that can be merged with another (counts, sums, least and greatest values by group), it need not be made again: the next
time the same statement comes, the entries since are aggregated, the two states are merged, and the rest of the statement
follows. DataFusion does all of it, with the statement's own expressions; here its plan is taken apart and put together.

A state is of a shape: which entries, by what they are grouped, what is made of them. Statements with other words that have
the same shape share it, whatever they call their columns and however they order, limit or filter what comes out.

Taken are plans with one scan of one topic and a GROUP BY above it, or aggregates of all of it, whatever comes after that.
A statement with anything else, or with a function whose value changes from call to call, runs as it is.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datafusion import Expr, col, lit
from datafusion import functions as f
from datafusion.expr import SortExpr

from flight_oplog import codec
from flight_oplog.sql.plans import chain
from flight_oplog.store import Snapshot
from flight_oplog.topics import Topic

# To merge a state of more rows would cost about as much as to aggregate the entries.
STATE_ROWS_MAX = 200_000
STATEMENTS_MAX = 1000
ANSWER_BYTES_MAX = 1 << 18
VOLATILE = re.compile(r"\b(?:now|random|uuid|current_\w+|today|arrow_typeof)\s*\(", re.IGNORECASE)


@dataclass(frozen=True)
class Measure:
    """One aggregate of a statement: its column, what a state keeps for it, how two states' are merged, and its value."""

    name: str
    kept: tuple[Expr, ...]
    merge: Callable[[Expr], Expr]
    value: Callable[..., Expr]
    function: str = ""  # where records' bounds may tell it: of which column, or of none
    column: str | None = None


@dataclass(frozen=True)
class Aggregation:
    """A plan taken apart at its lowest aggregate."""

    db_schema: str
    topic: str
    relation: str | None  # the name that the nodes above know the groups' columns by, where they are columns
    scan: Any
    groups: tuple[Expr, ...]
    names: tuple[str, ...]
    measures: tuple[Measure, ...]
    above: tuple[Any, ...]  # the nodes above, lowest first
    is_whole: bool  # all entries are aggregated, none is filtered out
    columns: tuple[str, ...]  # that it groups what a scan shows by; empty where it is not by columns alone, or there is more below
    shape: tuple[Any, ...] | None  # what a state of it depends on; None where that cannot be written down

    def state(self, session: Any) -> Any:
        """Return the frame that makes a state of what the scan shows: columns g0, g1, ... and k0, k1, ..."""
        return self._aggregated(session.create_dataframe_from_logical_plan(self.scan), self.groups)

    def by_numbers(self, session: Any, numbers: Sequence[str]) -> Any:
        """Return the frame that makes a state with numbers in the place of the groups' texts, of a session that shows both."""
        scan = self.scan.to_variant()
        frame = session.table(".".join(f'"{part}"' for part in scan.fqn() if part))
        for each in scan.filters():
            frame = frame.filter(Expr(each))
        return self._aggregated(frame, [col(name) for name in numbers])

    def _aggregated(self, frame: Any, groups: Sequence[Expr]) -> Any:
        return frame.aggregate(_numbered("g", groups), _numbered("k", [part for measure in self.measures for part in measure.kept]))

    def merged(self, states: Any) -> Any:
        """Return the frame that makes one state of a frame of several."""
        merges = [measure.merge for measure in self.measures for _ in measure.kept]
        groups = [col(f"g{n}") for n in range(len(self.groups))]
        return states.aggregate(groups, [merge(col(f"k{n}")).alias(f"k{n}") for n, merge in enumerate(merges)])

    def values(self, state: Any) -> Any:
        """Return the frame of what the aggregate gives, under the names it had, of the frame of one state."""
        columns, place = [col(f"g{n}").alias(name) for n, name in enumerate(self.names)], 0
        for measure in self.measures:
            end = place + len(measure.kept)
            columns.append(measure.value(*(col(f"k{n}") for n in range(place, end))).alias(measure.name))
            place = end
        return state.select(*columns)

    def rest(self, frame: Any) -> Any:
        """Return the frame of the whole statement, of the one of the aggregate's values."""
        for node in self.above:
            frame = _AGAIN[type(node).__name__](frame, node)
        return frame


@dataclass(frozen=True)
class State:
    """What a statement's aggregate makes of the entries [first, last) of its topic."""

    first: int
    last: int
    rows: pa.Table


@dataclass(frozen=True)
class Answer:
    """What a statement gave when its topic held the entries [first, last): it gives that until the topic grows."""

    topic: str
    first: int
    last: int
    schema: pa.Schema
    batches: tuple[pa.RecordBatch, ...]


@dataclass(frozen=True)
class Known:
    """What is known of a statement, or of a shape: whether it was slow enough for a state, or cannot have one; a shape's state,
    and a statement's answer."""

    was_slow: bool = False
    is_unfit: bool = False
    state: State | None = None
    answer: Answer | None = None

    @property
    def nbytes(self) -> int:
        of_answer = 0 if self.answer is None else sum(batch.nbytes for batch in self.answer.batches)
        return of_answer + (0 if self.state is None else self.state.rows.nbytes)


class States:
    """States and answers of statements asked before, least recently asked out first, never more than `bytes_max`. Thread-safe."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._lock = threading.Lock()
        self._known: OrderedDict[Any, Known] = OrderedDict()

    def asked(self, key: Any) -> Known:
        """Return what is known of a statement or a shape."""
        with self._lock:
            known = self._known.get(key)
            if known is None:
                return Known()
            self._known.move_to_end(key)
            return known

    def note(self, key: Any) -> None:
        """Remember that a statement or a shape was asked, and that it is worth a state."""
        with self._lock:
            self._known.setdefault(key, Known(was_slow=True))
            self._trim()

    def dismiss(self, key: Any) -> None:
        """Remember that a statement or a shape has no state, or too large a one."""
        self._put(key, Known(is_unfit=True))

    def keep_state(self, key: Any, state: State) -> None:
        self._put(key, Known(was_slow=True, state=state))

    def keep_answer(self, key: Any, answer: Answer) -> None:
        if sum(batch.nbytes for batch in answer.batches) <= ANSWER_BYTES_MAX:
            self._put(key, replace(self.asked(key), answer=answer))

    def _put(self, key: Any, known: Known) -> None:
        if known.nbytes > self._bytes_max:
            known = Known(is_unfit=True)
        with self._lock:
            self._forget(key)
            self._known[key] = known
            self._bytes += known.nbytes
            self._trim()

    def _forget(self, key: Any) -> None:
        known = self._known.pop(key, None)
        if known is not None:
            self._bytes -= known.nbytes

    def _trim(self) -> None:
        while self._known and (self._bytes > self._bytes_max or len(self._known) > STATEMENTS_MAX):
            self._forget(next(iter(self._known)))


# Taking a plan apart


def taken_apart(plan: Any, optimized: Any, schema_of: Callable[[Any], pa.Schema], default_schema: str) -> Aggregation | None:
    """Take a plan apart at its lowest aggregate; None for one that cannot be. `schema_of` tells a plan's schema; names without a
    schema of SQL's are in the default one."""
    nodes, kinds = chain(optimized)
    if "Aggregate" not in kinds or VOLATILE.search(plan.display_indent()):
        return None
    depth = len(kinds) - 1 - kinds[::-1].index("Aggregate")
    if not {*kinds[:depth]} <= _AGAIN.keys() or not {*kinds[depth + 1 : -1]} <= _BELOW:
        return None
    scan, aggregate = nodes[-1].to_variant(), nodes[depth].to_variant()
    _, written, topic = scan.fqn()
    db_schema = written or default_schema
    if db_schema not in ("public", "log") or scan.fetch() is not None:
        return None
    groups = tuple(map(Expr, aggregate.group_by_exprs()))
    if any(group.variant_name() == "GroupingSet" for group in groups):
        return None
    relations = {group.to_variant().relation() for group in groups if group.variant_name() == "Column"}
    schema, names = schema_of(nodes[depth]), aggregate.schema().field_names()
    measures = [
        _measure(Expr(each), name, field.type)
        for each, name, field in zip(aggregate.aggregate_exprs(), names[len(groups) :], list(schema)[len(groups) :], strict=True)
    ]
    if len(relations) > 1 or None in measures:
        return None
    taken = tuple(measure for measure in measures if measure is not None)
    return Aggregation(
        db_schema=db_schema,
        topic=topic,
        relation=next(iter(relations), None),
        scan=nodes[depth + 1],
        groups=groups,
        names=tuple(schema.names[: len(groups)]),
        measures=taken,
        above=tuple(node.to_variant() for node in reversed(nodes[:depth])),
        columns=_columns(groups) if kinds[depth + 1 :] == ["TableScan"] else (),
        is_whole=not scan.filters() and {*kinds[depth + 1 : -1]} <= {"SubqueryAlias"},
        shape=_shape(nodes[depth + 1 :], [*groups, *(part for measure in taken for part in measure.kept)]),
    )


def _columns(groups: Sequence[Expr]) -> tuple[str, ...]:
    """Return the columns that groups are, under whatever names; none where one is something else."""
    found = [Expr(group.to_variant().expr()) if group.variant_name() == "Alias" else group for group in groups]
    return tuple(each.to_variant().name() for each in found) if all(each.variant_name() == "Column" for each in found) else ()


def _shape(nodes: Sequence[Any], made: Sequence[Expr]) -> tuple[Any, ...] | None:
    """Return all that a state depends on, of the nodes below an aggregate and what it makes of their rows; exact, as bytes."""
    try:
        below = [_BELOW_SHAPES[type(variant).__name__](variant) for variant in (node.to_variant() for node in nodes)]
        return (*below, _bytes(made))
    except Exception:  # some expressions cannot be written down
        return None


def _bytes(expressions: Iterable[Expr]) -> tuple[bytes, ...]:
    return tuple(each.to_bytes() for each in expressions)


def _measure(aggregate: Expr, name: str, kind: pa.DataType) -> Measure | None:
    aggregate = bare(aggregate)
    function = aggregate.to_variant()
    arguments = tuple(map(Expr, function.args()))
    what = function.aggregate_type()
    if function.is_distinct() or "ORDER BY" in aggregate.canonical_name():
        return None
    if what == "count":
        return Measure(name, (aggregate,), f.sum, lambda kept: f.coalesce(kept, lit(0)), *simple(aggregate))
    if what in ("min", "max"):
        return Measure(name, (aggregate,), f.min if what == "min" else f.max, lambda kept: kept, *simple(aggregate))
    if what == "sum" and (pa.types.is_int64(kind) or pa.types.is_uint64(kind) or pa.types.is_float64(kind)):
        return Measure(name, (aggregate,), f.sum, lambda kept: kept)
    if what == "avg" and pa.types.is_float64(kind) and aggregate.canonical_name() == f"avg({arguments[0].canonical_name()})":
        kept = (f.sum(arguments[0].cast(pa.float64())), f.count(arguments[0]))
        return Measure(name, kept, f.sum, lambda total, count: total / count.cast(pa.float64()))
    return None


def bare(expression: Expr) -> Expr:
    """Return an expression without its names: the optimizer gives what it rewrote the one that it had."""
    while expression.variant_name() == "Alias":
        expression = Expr(expression.to_variant().expr())
    return expression


def simple(aggregate: Expr) -> tuple[str, str | None] | tuple[()]:
    """Return (function, column) of an aggregate of a column and nothing else; COUNT(*) has no column."""
    aggregate = bare(aggregate)
    function = aggregate.to_variant()
    what, arguments = function.aggregate_type(), tuple(map(Expr, function.args()))
    if function.is_distinct() or len(arguments) != 1 or aggregate.canonical_name() != f"{what}({arguments[0].canonical_name()})":
        return ()  # it has a FILTER, for instance
    if arguments[0].variant_name() == "Literal" and what == "count" and arguments[0].python_value().as_py() is not None:
        return "count", None
    return (what, arguments[0].to_variant().name()) if arguments[0].variant_name() == "Column" else ()


def whole_of(snapshot: Snapshot, topic: Topic, function: str, column: str | None) -> pa.Scalar | None:
    """Return the count, min or max of a column of all of a topic, going by its records alone; None when they do not tell.

    Without a column, the count of its entries. Bounds of numbers and times are values that occur; those of texts are cut.
    """
    if column is None:
        return pa.scalar(topic.entries)
    if column not in topic.schema.names:
        return None
    kind = topic.schema.field(column).type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return None
    limits, present = [], 0
    for file in topic.files:
        for record in snapshot.records_of(topic, file):
            stored = topic.schemas.get(record.schema_id)
            if stored is None:
                return None
            found = record.bounds.get(column, {"nulls": record.entries} if column not in stored.names else {})
            if "nulls" not in found:
                return None
            present += record.entries - found["nulls"]
            if found["nulls"] < record.entries:
                if function != "count" and "min" not in found:
                    return None
                limits.append((stored.field(column).type, found))
    if function == "count":
        return pa.scalar(present)
    values = [codec.bound_scalar(found[function], stored).cast(kind) for stored, found in limits]
    if not values:
        return pa.scalar(None, kind)
    return pc.min_max(pa.array(values, kind))[function]


# Putting it together again


def _numbered(prefix: str, expressions: Sequence[Expr]) -> list[Expr]:
    return [expression.alias(f"{prefix}{n}") for n, expression in enumerate(expressions)]


def _limited(frame: Any, fetch: Expr | None, skip: Expr | None) -> Any:
    count = None if fetch is None else fetch.python_value().as_py()
    return frame.limit((1 << 62) if count is None else count, 0 if skip is None else skip.python_value().as_py())


def _sorted(frame: Any, node: Any) -> Any:
    frame = frame.sort(*(SortExpr(Expr(by.expr()), by.ascending(), by.nulls_first()) for by in node.sort_exprs()))
    return frame if node.get_fetch_val() is None else frame.limit(node.get_fetch_val())


def _aggregated(frame: Any, node: Any) -> Any:
    """Name what is made as the nodes above know it: now that all columns are of one table, DataFusion would name it otherwise."""
    groups, made = list(map(Expr, node.group_by_exprs())), list(map(Expr, node.aggregate_exprs()))
    names = node.schema().field_names()[len(groups) :]
    return frame.aggregate(groups, [each.alias(name) for each, name in zip(made, names, strict=True)])


_BELOW = frozenset(("Projection", "Filter", "SubqueryAlias"))
_BELOW_SHAPES: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "Projection": lambda node: ("Projection", _bytes(map(Expr, node.projections()))),
    "Filter": lambda node: ("Filter", _bytes([Expr(node.predicate())])),
    "SubqueryAlias": lambda node: ("SubqueryAlias", node.alias()),
    "TableScan": lambda node: ("TableScan", node.fqn(), tuple(node.projection()), _bytes(map(Expr, node.filters()))),
}
_AGAIN: dict[str, Callable[[Any, Any], Any]] = {
    "Projection": lambda frame, node: frame.select(*map(Expr, node.projections())),
    "Filter": lambda frame, node: frame.filter(Expr(node.predicate())),
    "Sort": _sorted,
    "Limit": lambda frame, node: _limited(frame, *(None if each is None else Expr(each) for each in (node.fetch(), node.skip()))),
    "Aggregate": _aggregated,
}
