"""Appends: where one comes from, what it is to its topic, what it returns, and the records that are made of it."""

from __future__ import annotations

import datetime
import enum
import re
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from flight_oplog import codec, codes
from flight_oplog.datafile import StagedFile
from flight_oplog.errors import RequestError
from flight_oplog.keys import filters_of
from flight_oplog.parts import PARTS_FROM_BYTES, Parts, stored_bytes
from flight_oplog.rows import Record

# Batches this small on average are joined before they are encoded.
JOINED_ENTRIES = 8192
NUMBER_MAX = (1 << 63) - 1
PRODUCER_PATTERN = re.compile(r"[!-~]{1,128}")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an append comes from, so that it can be told from another, and what must hold for it to be taken."""

    producer: str | None = None
    epoch: int = 0
    sequence: int | None = None
    expected_offset: int | None = None
    principal: str | None = None

    def check(self, topic: str) -> None:
        """Raise RequestError for a name or number that cannot be one."""
        for name in ("epoch", "sequence", "expected_offset"):
            number = getattr(self, name)
            if number is not None and not (type(number) is int and 0 <= number <= NUMBER_MAX):
                raise RequestError(f"topic {topic!r}: {name} {str(number)[:80]!r} is not a number from 0 to 2^63 - 1; nothing was written")
        if self.producer is None:
            return
        if not PRODUCER_PATTERN.fullmatch(self.producer):
            raise RequestError(
                f"topic {topic!r}: the producer's name {self.producer[:80]!r} is not 1 to 128 printable ASCII characters; "
                "nothing was written"
            )
        if self.sequence is None:
            raise RequestError(f"topic {topic!r}: producer {self.producer!r} sends no sequence; nothing was written")


class Role(enum.Enum):
    """What an append is to its topic."""

    APPENDS = "goes on, or begins it"
    BEGINS = "begins it: there must be none yet"
    REPLACES = "ends it as it is, if there is one, and begins it again"
    ENDS = "is no append, but its end"


@dataclass(frozen=True, slots=True)
class Receipt:
    """What an append returns once it is durable and visible: its run is [first_offset, first_offset + entries).

    A duplicate has the original's run, or none where that is no longer remembered. Its entries are visible at
    `table_version` in any case: a duplicate of what was dropped since is refused.
    """

    topic: str
    first_offset: int | None
    entries: int | None
    table_version: int
    sequence: int | None = None
    duplicate: bool = False


@dataclass(slots=True, eq=False)
class Append:
    """An append handed to the committer: small ones as batches in memory, larger ones encoded, long ones as a staged file."""

    topic: str
    schema: pa.Schema
    schema_id: str
    event_time: str | None
    started: datetime.datetime
    batches: list[pa.RecordBatch]
    record: Record | None
    staged: StagedFile | None
    entries: int
    nbytes: int
    origin: Origin
    role: Role = Role.APPENDS
    keys: tuple[str, ...] = ()  # that it declares
    unchecked: bool = False  # its batches came from a client, and nobody has looked at what is in them
    receipt: Future[Receipt] = field(default_factory=Future)

    @property
    def owner(self) -> dict[str, Any]:
        """The append's part in the `appends` of a record that holds all of it."""
        return owner_of(self.origin, self.entries, self.started)

    @property
    def key(self) -> tuple[str, str, int, int] | None:
        """What a duplicate of it has in common with it."""
        origin = self.origin
        return None if origin.producer is None or origin.sequence is None else (self.topic, origin.producer, origin.epoch, origin.sequence)

    def drop(self) -> None:
        if self.staged is not None:
            self.staged.abandon()

    def keep(self) -> None:
        if self.staged is not None:
            self.staged.close()

    def refuse(self, error: BaseException) -> None:
        self.drop()
        self.receipt.set_exception(error)

    def bounds(self) -> list[codec.Bounds]:
        if self.staged is not None:
            return self.staged.bounds
        return [codec.bounds(self.batches, self.schema) if self.record is None else self.record.bounds]


def end_of(topic: str) -> Append:
    """Return the end of a topic, to be committed as appends are."""
    now = datetime.datetime.now(datetime.UTC)
    return Append(topic, pa.schema([]), "", None, now, [], None, None, 0, 0, Origin(), Role.ENDS)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def check_data(topic: str, batches: Sequence[pa.RecordBatch], full: bool = True) -> None:
    """Raise RequestError unless the batches, all of one schema, are valid throughout: the network is hostile.

    Without `full`, only that their buffers are as long as their ends say: enough to ask for their size.
    """
    try:
        if sum(batch.num_rows for batch in batches) < JOINED_ENTRIES * len(batches) and len(batches) > 1:
            pa.Table.from_batches(batches).validate(full=full)
            return
        for batch in batches:
            (codec.texts_as_bytes(batch) if full and batch.num_rows >= JOINED_ENTRIES else batch).validate(full=full)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise RequestError(f"topic {topic!r}: a batch is not valid Arrow data ({one_line(error)}); nothing was written") from error


def owner_of(origin: Origin, entries: int, started: datetime.datetime) -> dict[str, Any]:
    """Return one element of a record's `appends`."""
    owner: dict[str, Any] = {"entries": entries, "timestamp": started}
    if origin.principal is not None:
        owner["principal"] = origin.principal
    if origin.producer is not None:
        owner |= {"producer": origin.producer, "epoch": origin.epoch, "sequence": origin.sequence}
    return owner


def make_record(
    batches: list[pa.RecordBatch],
    schema: pa.Schema,
    fingerprint: str,
    appends: list[dict[str, Any]],
    event_time: str | None,
    compression: str,
    keys: tuple[str, ...] = (),
    known: codes.Known | None = None,
) -> Record:
    """Encode batches of one schema as one record, with filters of those columns that are keys.

    A large one has codes of its texts; what is `known` are those of records before, as `codes.codes_of` takes them.
    """
    entries = sum(batch.num_rows for batch in batches)
    if len(batches) > 2 and entries <= JOINED_ENTRIES * len(batches):
        batches = list(codec.cut(codec.joined(batches)))  # many small appends: everything below costs by the batch
    content, coded = _encoded(batches, schema, codec.chosen(batches, schema, compression), known)
    found = Parts.of(content, schema, {name: stream.size for name, (_, stream) in coded.items()})
    if found is None and coded:  # they are read by the parts alone
        content, coded = codec.encode(batches, schema, compression), {}
    different = {name: codes.occurring(of_one) for name, (of_one, _) in coded.items()}
    bounds = codec.bounds(batches, schema, different)
    filters = filters_of(batches, keys, bounds, different)
    for name, (of_one, _) in coded.items():
        bounds[name]["codes"] = len(of_one.dictionary)
    parts = None if found is None else found.written()
    digest = codec.digest(content if parts is None else pa.py_buffer(parts.encode()))
    record = Record(entries, fingerprint, appends, bounds, None, None, digest, parts, filters, content)
    return with_times(record, schema, event_time)


def _encoded(
    batches: list[pa.RecordBatch], schema: pa.Schema, compression: str, known: codes.Known | None
) -> tuple[pa.Buffer, dict[str, tuple[pa.DictionaryArray, pa.Buffer]]]:
    """Return content, and the codes in it, as they are and as they are written; small content has none."""
    plain = codec.encode(batches, schema, compression) if compression != "none" else None
    nbytes = sum(batch.nbytes for batch in batches) if plain is None else plain.size
    made = codes.codes_of(batches, schema, known) if nbytes >= PARTS_FROM_BYTES else {}
    coded = {name: (of_one, codes.written(of_one, compression)) for name, of_one in made.items()}
    if plain is None:
        return codec.encode(batches, schema, compression, [stream for _, stream in coded.values()]), coded
    stored = stored_bytes(plain, schema) if coded else {}
    coded = {name: each for name, each in coded.items() if codes.PART * each[1].size <= stored[name]}
    return codec.followed(plain, [stream for _, stream in coded.values()]), coded


def with_times(record: Record, schema: pa.Schema, event_time: str | None) -> Record:
    """Return the record with the bounds of its topic's event-time column."""
    known = event_time in schema.names and pa.types.is_timestamp(schema.field(event_time).type)
    low, high = codec.time_range(record.bounds, schema, event_time if known else None)
    return replace(record, min_time=low, max_time=high)
