"""Appends that share a commit: each is checked against the log and those before it, numbered, and put into files."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa

from flight_oplog import codec
from flight_oplog.appends import Append, Role, make_record, with_times
from flight_oplog.config import Config
from flight_oplog.datafile import StagedFile
from flight_oplog.errors import NotFound, OutOfOrder, SchemaMismatch, TooLarge, TryAgain
from flight_oplog.producers import Producers
from flight_oplog.schema import KEYS_METADATA, SCHEMAS_SCHEMA, SCHEMAS_TOPIC, evolve, first_time, schema_id
from flight_oplog.store import Store
from flight_oplog.topics import Topic


def check_room(topic: str, topics: int, config: Config) -> None:
    """Raise TooLarge when a log of `topics` topics has no room for one more."""
    if topics >= config.topics_max:
        raise TooLarge(f"topic {topic!r} would be one more than topics_max ({config.topics_max}); nothing was written")


def merge(topic: str, known: Topic | None, current: pa.Schema | None, incoming: pa.Schema, fingerprint: str, config: Config) -> pa.Schema:
    """Return the topic's schema after an append; `current` is it so far when it differs from the snapshot's.

    Raises SchemaMismatch naming the column, both types and the rule.
    """
    if current is None and known is not None:
        if config.schema_rule == "additive" and fingerprint in known.schemas:
            return known.schema
        current = known.schema
    return evolve(topic, current, incoming, config.schema_rule, config.columns_max)


class Group:
    """Appends that share a commit, numbered from one snapshot. Built again from scratch after a conflict."""

    def __init__(self, store: Store, config: Config, producers: Producers) -> None:
        self.base = store.snapshot()
        self.placed: list[tuple[Append, int]] = []
        self.duplicates: list[Append] = []
        self.numbers: dict[str, int] = {}
        self._producers = producers
        self._last: dict[tuple[str, str], tuple[int, int]] = {}
        self._next_offsets: dict[str, int] = {}
        self._store = store
        self._config = config
        self._schemas: dict[str, pa.Schema] = {}
        self._event_times: dict[str, str | None] = {}
        self._keys: dict[str, tuple[str, ...]] = {}
        self._fitting: dict[str, set[str]] = {}
        self._new_schemas: dict[tuple[str, str, int], pa.Schema | None] = {}
        self._ended: Counter[str] = Counter()
        self._begun: dict[str, int] = {}  # how many were placed before the topic ended in this group
        self._gathering: dict[str, list[Append]] = {}
        self._files: list[tuple[StagedFile, int]] = []
        self._ours: list[StagedFile] = []

    def check(self, append: Append) -> bool:
        """Whether the append is to be placed; a duplicate is not. Raises what is wrong with it: then it is not in the group."""
        topic = append.topic
        exists = topic in self._schemas or self._known(topic) is not None
        if append.role is Role.ENDS:
            if not exists:
                raise NotFound(f"topic {topic!r} does not exist; nothing was written")
            return True
        if self._is_duplicate(append):
            self._check_kept(append)
            self.duplicates.append(append)
            return False
        if append.role is Role.BEGINS and exists:
            raise OutOfOrder(f"topic {topic!r} exists already; nothing was written")
        expected = append.origin.expected_offset
        if expected is not None and expected != self._next(topic):
            raise OutOfOrder(f"topic {topic!r} ends at offset {self._next(topic)}, not at {expected}; nothing was written")
        if append.staged is not None and append.event_time != self._event_time(append):
            raise TryAgain(f"topic {topic!r}: its event-time column was settled meanwhile; nothing was written; try again")
        if append.role is Role.REPLACES:
            self._end(topic)  # nothing is left that it could be refused for, unless there was nothing to end
        if append.schema_id not in self._fitting.get(topic, ()):
            self._fit(append)
        return True

    def _event_time(self, append: Append) -> str | None:
        """Return the topic's event-time column, which this append may be the first to settle."""
        if append.role is Role.REPLACES:
            return first_time(append.schema)
        known = self._known(append.topic)
        return self._event_times.get(append.topic) or (known.event_time if known else None) or first_time(append.schema)

    def place(self, append: Append) -> None:
        """Give an append that was checked its offsets. Raises TryAgain when the storage refuses: then the group is lost."""
        topic = append.topic
        first_offset = self._next(topic)
        self.placed.append((append, first_offset))
        if append.role is Role.ENDS:
            self._end(topic)
            return
        if append.staged is not None:
            self._flush(topic)
            self._files.append((append.staged, first_offset))
        elif append.entries:
            self._gathering.setdefault(topic, []).append(append)
        if append.entries:
            self._advance(topic, first_offset + append.entries)
        if append.origin.producer is not None and append.origin.sequence is not None:
            self._count(topic, append.origin.producer, append.origin.epoch, append.origin.sequence)

    def _known(self, topic: str) -> Topic | None:
        """Return the topic as it was before this group, if it has not ended in it."""
        return None if topic in self._ended else self.base.topics.get(topic)

    def _end(self, topic: str) -> None:
        """End a topic where it is now; whatever comes after it in this group begins it anew."""
        if topic not in self._schemas and self._known(topic) is None:
            return
        self._flush(topic)
        self._ended[topic] += 1
        self._begun[topic] = len(self.placed)
        self.numbers[f"start/{topic}"] = self._next(topic)
        self.numbers[f"drops/{topic}"] = self._drops(topic) + 1
        self._new_schemas[topic, "", self._ended[topic]] = None
        for settled in (self._schemas, self._event_times, self._keys, self._fitting):
            settled.pop(topic, None)

    def _fit(self, append: Append) -> None:
        """Bring the topic's schema and the append's together. Raises SchemaMismatch, or TooLarge for one topic too many."""
        topic = append.topic
        known = self._known(topic)
        current = self._schemas.get(topic) or (known.schema if known else None)
        if current is None:
            others = (self.base.topics.keys() - self._ended.keys()) | self._schemas.keys()
            check_room(topic, sum(not name.startswith("_") for name in others), self._config)
        merged = merge(topic, known, self._schemas.get(topic), append.schema, append.schema_id, self._config)
        self._check_widening(topic, current, append, merged)
        self._schemas[topic], self._event_times[topic] = merged, self._event_time(append)
        self._keys[topic] = self._keys.get(topic) or (known.keys if known else ()) or append.keys
        if known is None or append.schema_id not in known.schemas:
            declared = append.schema.with_metadata({KEYS_METADATA: json.dumps(append.keys)}) if append.keys else append.schema
            self._new_schemas.setdefault((topic, append.schema_id, self._ended[topic]), declared)
        if merged != current:
            self._fitting[topic] = set()
        if not _rescaled(append.schema, merged):  # else every append's values have to be looked at
            self._fitting.setdefault(topic, set()).add(append.schema_id)

    def _is_duplicate(self, append: Append) -> bool:
        """Whether the append is committed already. Raises OutOfOrder when it is neither that nor the next one."""
        origin, topic = append.origin, append.topic
        if origin.producer is None or origin.sequence is None:
            return False
        epoch, last = self._last.get((topic, origin.producer)) or self._producers.last(self.base, topic, origin.producer)
        if origin.epoch < epoch:
            raise OutOfOrder(
                f"topic {topic!r}: epoch {origin.epoch} of producer {origin.producer!r} is fenced off by epoch {epoch}; "
                "nothing was written; another process has taken over"
            )
        if origin.epoch > epoch:
            last = -1
        if origin.sequence > last + 1:
            raise OutOfOrder(
                f"topic {topic!r}: producer {origin.producer!r} sent sequence {origin.sequence}, expected {last + 1}; nothing was written; "
                "send what is missing first"
            )
        return origin.sequence <= last

    def _check_kept(self, append: Append) -> None:
        """Raise OutOfOrder for a duplicate of a producer that has not appended since its topic was dropped.

        A producer's numbers go on when its topic ends; one that counts anew from 0 must not lose what it sends.
        """
        topic, origin = append.topic, append.origin
        if self._drops(topic) > self._number(f"era/{topic}/{origin.producer}"):
            raise OutOfOrder(
                f"topic {topic!r} was dropped or replaced after producer {origin.producer!r} had sent sequence {origin.sequence}; "
                "nothing was written; go on counting, or count from 0 in a higher epoch"
            )

    def _drops(self, topic: str) -> int:
        """Return how often a topic has ended so far."""
        return self._number(f"drops/{topic}")

    def _number(self, name: str) -> int:
        found = self.numbers.get(name)
        return (self._store.numbers(self.base, name)[0] or 0) if found is None else found

    def _count(self, topic: str, producer: str, epoch: int, sequence: int) -> None:
        before, _ = self._last.get((topic, producer)) or self._producers.last(self.base, topic, producer)
        self._last[topic, producer] = epoch, sequence
        self.numbers[f"producer/{topic}/{producer}"] = sequence
        if epoch != before:
            self.numbers[f"epoch/{topic}/{producer}"] = epoch
        if drops := self._drops(topic):
            self.numbers[f"era/{topic}/{producer}"] = drops

    def _next(self, topic: str) -> int:
        known = self.base.topics.get(topic) or self.base.ended.get(topic)
        return self._next_offsets.get(topic, known.next_offset if known else 0)

    def _advance(self, topic: str, next_offset: int) -> None:
        self._next_offsets[topic] = self.numbers[f"topic/{topic}"] = next_offset

    def _check_widening(self, topic: str, current: pa.Schema | None, append: Append, merged: pa.Schema) -> None:
        """Refuse a change of time unit that some value, old or new, would not survive: reading must never fail later."""
        for name in _rescaled(append.schema, merged):
            for found in append.bounds():
                _check_rescale(topic, name, found, append.schema, merged)
        if current is None or not (rescaled := _rescaled(current, merged)):
            return
        placed = self.placed[self._begun.get(topic, 0) :]
        earlier = [(other.schema, found) for other, _ in placed if other.topic == topic for found in other.bounds()]
        for name in rescaled:
            for schema, found in earlier:
                _check_rescale(topic, name, found, schema, merged)
            for record in self.base.records(topic) if self._known(topic) is not None else ():
                _check_rescale(topic, name, record.bounds, self.base.topics[topic].schemas[record.schema_id], merged)

    def _flush(self, topic: str) -> None:
        """Write the topic's gathered small appends as one file, a record for each run of one schema."""
        gathered = self._gathering.pop(topic, [])
        if not gathered:
            return
        staged = self._store.stage(topic)
        self._ours.append(staged)
        first = next(offset for append, offset in self.placed if append is gathered[0])
        self._files.append((staged, first))
        for run in _runs(gathered, self._config):
            schema, event_time = run[0].schema, self._event_times[topic]
            if run[0].record is not None:
                staged.add(with_times(run[0].record, schema, event_time))
                continue
            batches = [batch for append in run for batch in append.batches]
            owners = [append.owner for append in run]
            made = make_record(batches, schema, run[0].schema_id, owners, event_time, self._config.compression, self._keys[topic])
            staged.add(made)

    def finish(self) -> list[StagedFile]:
        """Write what is still in memory, register new schemas, number every file and make it durable."""
        for topic in list(self._gathering):
            self._flush(topic)
        if self._new_schemas:
            self._register()
        self._store.finish(self._files)
        for staged in self._ours:
            staged.close()  # unlike an append's own file, it is never numbered again
        return [staged for staged, _ in self._files]

    def _register(self) -> None:
        now = datetime.datetime.now(datetime.UTC)
        rows = []
        counts = {name: topic.registered for name, topic in (*self.base.topics.items(), *self.base.ended.items())}
        for (topic, fingerprint, _), schema in self._new_schemas.items():
            number = counts[topic] = counts.get(topic, 0) + 1
            rows.append(
                {
                    "topic": topic,
                    "schema_id": fingerprint,
                    "number": number,
                    "schema": None if schema is None else schema.serialize().to_pybytes(),
                    "first_seen": now,
                }
            )
        batch = pa.RecordBatch.from_pylist(rows, SCHEMAS_SCHEMA)
        staged = self._store.stage(SCHEMAS_TOPIC)
        self._ours.append(staged)
        owner = {"entries": len(rows), "timestamp": now}
        staged.add(make_record([batch], SCHEMAS_SCHEMA, schema_id(SCHEMAS_SCHEMA), [owner], "first_seen", self._config.compression))
        first = self._next(SCHEMAS_TOPIC)
        self._files.append((staged, first))
        self._advance(SCHEMAS_TOPIC, first + len(rows))

    def abandon(self) -> None:
        """Remove the files this group made; the appends' own files stay for another try."""
        for staged in self._ours:
            staged.abandon()


def _runs(appends: list[Append], config: Config) -> Iterator[list[Append]]:
    """Split appends into neighbours that one record can hold: same schema, within the record limits, not encoded yet."""
    run: list[Append] = []
    size = entries = 0
    for append in appends:
        over = size + append.nbytes > config.record_bytes_max or entries + append.entries > config.record_entries_max
        is_alone = append.record is not None or (run and run[0].record is not None)
        if run and (append.schema_id != run[0].schema_id or over or is_alone):
            yield run
            run, size, entries = [], 0, 0
        run.append(append)
        size, entries = size + append.nbytes, entries + append.entries
    if run:
        yield run


def _rescaled(narrow: pa.Schema, wide: pa.Schema) -> list[str]:
    """Columns whose time unit the wide schema changes, at the top level."""
    return [f.name for f in narrow if pa.types.is_timestamp(f.type) and wide.field(f.name).type != f.type]


def _check_rescale(topic: str, column: str, found: codec.Bounds, schema: pa.Schema, wide: pa.Schema) -> None:
    limits = found.get(column, {})
    if "min" not in limits or column not in schema.names:
        return
    narrow, target = schema.field(column).type, wide.field(column).type
    try:
        pa.array([limits["min"], limits["max"]], pa.int64()).cast(narrow).cast(target)
    except pa.ArrowInvalid:
        raise SchemaMismatch(
            f"topic {topic!r}: column {column!r} would become {target}, which cannot hold all of its {narrow} values; "
            "the additive rule allows only widening that keeps every value exact; nothing was written"
        ) from None
