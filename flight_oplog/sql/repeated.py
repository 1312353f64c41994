"""Answering what is asked again: from the records' bounds, from states of aggregates, from small answers. See `aggregates`."""

from __future__ import annotations

import enum
import hashlib
import logging
import math
import re
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
from datafusion import SessionContext

from flight_oplog import codec
from flight_oplog.cache import ScanCounts
from flight_oplog.config import Config
from flight_oplog.errors import OplogError, TooLarge
from flight_oplog.kept import remember
from flight_oplog.provider import codes_kept
from flight_oplog.scans import RowsTable, ScanContext
from flight_oplog.schema import SCHEMAS_TOPIC, VIEWS_TOPIC
from flight_oplog.sql.aggregates import (
    ANSWER_BYTES_MAX,
    STATE_ROWS_MAX,
    VOLATILE,
    Aggregation,
    Answer,
    State,
    States,
    taken_apart,
    whole_of,
)
from flight_oplog.sql.catalog import TIME_TRAVEL, Shelf
from flight_oplog.sql.parameters import Values
from flight_oplog.sql.planner import Asked, Planner, groups, limits, sums_up
from flight_oplog.sql.plans import chain
from flight_oplog.sql.refusals import PUBLIC
from flight_oplog.sql.stream import Running, at_once, paced, schema_of, wire_schema
from flight_oplog.store import Snapshot
from flight_oplog.topics import Topic

log = logging.getLogger("flight_oplog.sql")

# How long the text of a statement may be of which something is remembered.
REMEMBERED_CHARACTERS = 4096
# An aggregate that took so long is worth a state.
STATE_SECONDS = 0.01
# An aggregate that took so long is worth numbers of the texts that it groups by.
NUMBERED_SECONDS = 0.03
NUMBERED_BYTES_MAX = 32 << 20  # of what is made of its groups
_DECIDING = (SCHEMAS_TOPIC, VIEWS_TOPIC)
_OF_ALL = re.compile(r"\b(?:count|min|max)\s*\(", re.IGNORECASE)
_OF_SOME = re.compile(r"\b(?:WHERE|GROUP|JOIN|DISTINCT)\b", re.IGNORECASE)
# Of so many texts without an aggregate it is remembered that they took long.
SLOW_KEPT = 1000
_TELLING = frozenset(("Aggregate", "Distinct", "Filter", "Limit", "Projection", "Sort", "SubqueryAlias", "TableScan"))
# A text that was never asked is looked at more closely where it reads all of a topic of so many entries: its shape may be known.
LARGE_ENTRIES = 1 << 19
_VALUES = re.compile(r"'[^']*'|\b\d[\w.]*")
_PICKS = re.compile(r"\b(?:WHERE|JOIN)\b", re.IGNORECASE)
_FROM = re.compile(r'\bFROM\s+([\w".]+)', re.IGNORECASE)


class _Kind(enum.Enum):
    """What is known of statements that are alike but for their values: whether numbers of texts may help them."""

    SLOW_ONCE = enum.auto()  # with its entries not in memory, which says little
    SLOW = enum.auto()
    UNFIT = enum.auto()


@dataclass(slots=True)
class Key:
    """Under what something is kept of a statement: its answer under its text, the state of its aggregate under its shape.

    Both go with the values bound to it and what the log's names mean by now.
    """

    text: Any
    sums_up: bool
    kind: Any = None  # the text without its values, of one that groups
    shape: Any = None  # once it was looked at


class Repeated:
    """What is kept of statements, and how they are answered from it. Thread-safe."""

    def __init__(self, planner: Planner, config: Config) -> None:
        self._planner = planner
        self._config = config
        self._states = States(config.state_bytes_max)
        self._slow: OrderedDict[Any, bool] = OrderedDict()  # texts without an aggregate that took long
        self._kinds: OrderedDict[Any, _Kind] = OrderedDict()  # texts that group, without their values

    def key(self, asked: Asked) -> Key | None:
        """Return what everything that is kept of a query is kept under, None for one of which nothing is."""
        if asked.offsets is not None or len(asked.sql) > REMEMBERED_CHARACTERS:
            return None
        if TIME_TRAVEL.search(asked.sql):
            return None
        kind = (_VALUES.sub("?", asked.sql), asked.db_schema, asked.snapshot.store.number) if groups(asked.sql) else None
        return Key((asked.sql, asked.db_schema, _packed(asked.values), *registry(asked.snapshot)), sums_up(asked.sql), kind)

    def note(self, key: Key | None, seconds: float, counts: Iterable[ScanCounts] = ()) -> None:
        """Remember that a query took so long until its first batch."""
        if key is None:
            return
        known = self._kinds.get(key.kind)
        if key.kind is not None and known is not _Kind.UNFIT:
            # Of one that picks entries, a slow start says little: a quarter of what it asked for was not in memory.
            is_cold = _PICKS.search(key.kind[0]) and sum(3 * each.cache_misses - each.cache_hits for each in counts) > 0
            if seconds > NUMBERED_SECONDS:
                remember(self._kinds, key.kind, _Kind.SLOW_ONCE if is_cold and known is None else _Kind.SLOW, SLOW_KEPT)
            else:
                self._kinds.pop(key.kind, None)
        if seconds <= STATE_SECONDS:
            return
        if not key.sums_up:
            remember(self._slow, key.text, True, SLOW_KEPT)
        else:
            self._states.note(key.text)
            if key.shape is not None:
                self._states.note(key.shape)

    def _do_not_help(self, key: Key) -> None:
        """Remember that statements of a kind are not made by numbers of texts, now or later."""
        if key.kind is not None:
            remember(self._kinds, key.kind, _Kind.UNFIT, SLOW_KEPT)

    def answer(self, key: Key, asked: Asked) -> tuple[pa.Schema, Sequence[pa.RecordBatch]] | None:
        """Return what a query's answer is known to be; None where it has to be made."""
        known = self._states.asked(key.text).answer
        now = None if known is None else asked.snapshot.topics.get(known.topic)
        if known is None or now is None or (now.first_offset, now.next_offset) != (known.first, known.last):
            return None
        return known.schema, known.batches

    def answered(self, key: Key, asked: Asked) -> Running | None:
        """Answer a query from its records' bounds, or from the state of its aggregate and the entries since.

        None when there is none, or it is not worth one: then it is run as it is.
        """
        if (answer := self.answer(key, asked)) is not None:
            return Running(answer[0], iter(answer[1]))
        known = self._states.asked(key.text)
        is_slow = known.was_slow or self._kinds.get(key.kind) is _Kind.SLOW
        if not key.sums_up or known.is_unfit or not (is_slow or _tells_of_all(asked.sql) or _reads_all_of_much(asked)):
            return None
        session, frame, context = self._planner.plan(asked)
        try:
            apart = _taken_apart(session, frame, asked.db_schema) if context.looks_into else None
            topic = None if apart is None else asked.snapshot.topics.get(apart.topic)
            if apart is None or topic is None:
                self._states.dismiss(key.text)
                self._do_not_help(key)
                return None
            key.shape = key.text if apart.shape is None else (*apart.shape, asked.db_schema, *registry(asked.snapshot))
            rows = _whole(apart, asked.snapshot, topic, context)
            if rows is None:
                rows = self._state_of(key, apart, topic, asked, context)
            if rows is None:
                if self._states.asked(key.shape).is_unfit:
                    self._states.dismiss(key.text)
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
            self._states.dismiss(key.text)
            self._do_not_help(key)
            return None
        schema = schema_of(frame, context)
        # What is left to do is to sort, cut and reckon with a state's rows: it takes no time worth stopping it.
        found = at_once(stream, context, schema) if context.is_plain else self._planner.pulled(stream, context, schema, asked)
        return Running(schema, self.kept(key, topic, schema, paced(found, self._config.message_bytes_max)), context.counts)

    def _state_of(self, key: Key, apart: Aggregation, topic: Topic, asked: Asked, context: ScanContext) -> pa.Table | None:
        """Return a statement's state: the one of its shape, brought up, or one made by numbers. None where there is to be none."""
        of_shape = self._states.asked(key.shape)
        if (self._states.asked(key.text).was_slow or of_shape.was_slow) and not of_shape.is_unfit and self._config.state_bytes_max:
            return self._brought_up(key, apart, of_shape.state, topic, asked, context)
        began = time.monotonic()
        rows = self._by_numbers(key, apart, topic, asked, context)
        if rows is not None:  # it takes half of what it would have taken with texts
            self.note(key, 2 * (time.monotonic() - began))
        return rows

    def lasting(self, key: Key | None, asked: Asked, frame: Any) -> Topic | None:
        """Return the topic of a query that is run as it is, and whose answer is worth keeping until that grows: it came before."""
        if key is None or not self._config.state_bytes_max:
            return None
        known = self._states.asked(key.text)
        comes_again = key.text in self._slow or known.was_slow or known.is_unfit
        return _only_topic(frame.logical_plan(), asked) if comes_again else None

    def kept(self, key: Key, topic: Topic, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield the batches of an answer, and keep it when it was a small one."""
        kept: list[pa.RecordBatch] = []
        size = 0
        for batch in batches:
            size += max(batch.nbytes, batch.num_rows)
            kept = [*kept, batch] if size <= ANSWER_BYTES_MAX else []
            yield batch
        if size <= ANSWER_BYTES_MAX:
            # A copy, as a few rows hold on to all that they were cut out of.
            own = tuple(pa.ipc.read_record_batch(batch.serialize(), schema) for batch in kept)
            self._states.keep_answer(key.text, Answer(topic.name, topic.first_offset, topic.next_offset, schema, own))

    def _brought_up(
        self, key: Key, apart: Aggregation, state: State | None, topic: Topic, asked: Asked, context: ScanContext
    ) -> pa.Table | None:
        """Return a shape's state as of a snapshot: the entries since are aggregated. None when it grows too large."""
        first, last = topic.first_offset, topic.next_offset
        if state is not None and (state.first != first or state.last > last):
            state = None  # some have been removed; or the snapshot is an older one
        if state is not None and state.last == last:
            return state.rows
        rows = self._by_numbers(key, apart, topic, asked, context, is_again=True) if state is None else None
        if rows is None:
            since = asked if state is None else replace(asked, offsets=(state.last, last))

            def shaped(session: SessionContext, frame: Any) -> Any:
                of_session = _taken_apart(session, frame, asked.db_schema)
                assert of_session is not None
                return of_session.state(session)

            frame, stream, scanned = self._planner.start(since, shaped)
            context.counts.update(scanned.counts)
            rows = self._gathered(frame, stream, scanned, asked, self._config.state_bytes_max)
        if rows is not None and state is not None:
            once, _ = self._small_session(pa.concat_tables([state.rows, rows]))
            merged = apart.merged(once.table("rows"))
            rows = self._gathered(merged, merged.execute_stream(), context, asked, self._config.state_bytes_max)
        if rows is None:
            self._states.dismiss(key.shape)
        else:
            self._states.keep_state(key.shape, State(first, last, rows))
        return rows

    def _by_numbers(
        self, key: Key, apart: Aggregation, topic: Topic, asked: Asked, context: ScanContext, is_again: bool = False
    ) -> pa.Table | None:
        """Return the state of an aggregate that groups much by texts, made by grouping by their numbers.

        None where that is not worth it. Numbers are made for a statement of a slow kind, or one that `is_again` asked; codes are numbers as
        good as made.
        """
        kind = self._kinds.get(key.kind)
        if kind is _Kind.UNFIT or topic.entries < LARGE_ENTRIES:
            return None
        types = {f.name: f.type for f in topic.schema}
        names = [f"_number{n}" for n in range(len(apart.columns))]
        are_texts = names and all(types.get(name) == pa.string() for name in apart.columns) and types.keys().isdisjoint(names)
        if not are_texts or (not apart.measures and limits(asked.sql)):
            self._do_not_help(key)
            return None
        may_make = is_again or kind is _Kind.SLOW
        coded = [codes_kept(asked.snapshot, topic, name) for name in apart.columns]
        known = [self._planner.cache.vocabulary(topic, name, may_make or all(coded)) for name in apart.columns]
        vocabularies = [each for each in known if each is not None and not each.is_full]
        if len(vocabularies) < len(known) or math.prod(map(max, map(len, vocabularies), coded)) > STATE_ROWS_MAX:
            return None
        numbered = dict(zip(names, zip(apart.columns, vocabularies, strict=True), strict=True))
        started = self._planner.start_by_numbers(asked, numbered, may_make, lambda session: apart.by_numbers(session, names))
        if started is None:
            return None
        frame, stream, scanned = started
        del started
        try:
            rows = self._gathered(frame, stream, scanned, asked, NUMBERED_BYTES_MAX)
        except TooLarge:
            if not any(each.is_full for each in vocabularies):
                raise
            rows = None
        if rows is None:
            self._do_not_help(key)
            return None
        context.counts.update(scanned.counts)
        columns, fields = list(rows.columns), list(rows.schema)
        for place, vocabulary in enumerate(vocabularies):
            columns[place], fields[place] = vocabulary.texts(columns[place]), fields[place].with_type(pa.string())
        return pa.table(columns, pa.schema(fields))

    def _gathered(self, frame: Any, stream: Any, context: ScanContext, asked: Asked, bytes_max: int) -> pa.Table | None:
        """Return the rows of a state; None when they are too many to be one."""
        schema = wire_schema(frame.schema())
        found: list[pa.RecordBatch] = []
        rows = size = 0
        for batch in self._planner.pulled(stream, context, schema, asked):
            found.append(batch)
            rows, size = rows + batch.num_rows, size + batch.nbytes
            if rows > STATE_ROWS_MAX or size > bytes_max:
                return None
        return pa.Table.from_batches(found, schema)

    def _small_session(self, rows: pa.Table) -> tuple[SessionContext, Shelf]:
        """Return a session whose only table, `rows`, is these, and the shelf it is on."""
        shelf = Shelf()
        batches = rows.combine_chunks().to_batches()
        context = ScanContext(self._planner.cache, 1)
        shelf.tables["rows"] = RowsTable(batches[0] if batches else codec.empty(rows.schema), context)
        return self._planner.small_session(shelf), shelf


def _whole(apart: Aggregation, snapshot: Snapshot, topic: Topic, context: ScanContext) -> pa.Table | None:
    """Return the state of aggregates of all of a topic, when its records' bounds tell it."""
    if apart.groups or not apart.is_whole or not all(measure.function for measure in apart.measures):
        return None
    found = [whole_of(snapshot, topic, measure.function, measure.column) for measure in apart.measures]
    if any(value is None for value in found):
        return None
    records = sum(file.records for file in topic.files)
    context.counts[f"{apart.db_schema}.{topic.name}"] = ScanCounts(files=len(topic.files), records=records)
    return pa.table({f"k{n}": pa.array([value]) for n, value in enumerate(found)})


def _only_topic(plan: Any, asked: Asked) -> Topic | None:
    """Return the topic that a query's answer depends on, if it is one topic's entries, and nothing else but the query's text."""
    nodes, kinds = chain(plan)
    if not nodes or not {*kinds} <= _TELLING or VOLATILE.search(plan.display_indent()):
        return None
    _, db_schema, name = nodes[-1].to_variant().fqn()
    return asked.snapshot.topics.get(name) if (db_schema or asked.db_schema) in (PUBLIC, "log") else None


def _tells_of_all(sql: str) -> bool:
    """Whether a text may ask for what the bounds of a topic's records tell."""
    return _OF_ALL.search(sql) is not None and _OF_SOME.search(sql) is None


def _reads_all_of_much(asked: Asked) -> bool:
    """Whether a text may ask for something of all entries of a large topic."""
    found = None if _PICKS.search(asked.sql) else _FROM.search(asked.sql)
    if found is None:
        return False
    name = found[1].rpartition(".")[2].strip('"')
    topics = asked.snapshot.topics
    return any(topic is not None and topic.entries >= LARGE_ENTRIES for topic in (topics.get(name), topics.get(name.lower())))


def registry(snapshot: Snapshot) -> tuple[Any, ...]:
    """Return what changes when the schema of some topic or view does; it is another for whoever sees others of them."""
    topics = snapshot.whole.topics
    return (snapshot.store.number, snapshot.viewer.rights, *(topic and topic.next_offset for topic in map(topics.get, _DECIDING)))


def _packed(values: Values) -> bytes | None:
    """Return a fingerprint of bound values and their types."""
    if values is None:
        return None
    table = pa.table({name: pa.array([value]) for name, value in values.items()})
    return hashlib.sha256(table.schema.serialize().to_pybytes() + table.to_batches()[0].serialize().to_pybytes()).digest()


def _taken_apart(session: SessionContext, frame: Any, db_schema: str) -> Aggregation | None:
    def schema_of(plan: Any) -> pa.Schema:
        return session.create_dataframe_from_logical_plan(plan).schema()

    return taken_apart(frame.logical_plan(), frame.optimized_logical_plan(), schema_of, db_schema)
