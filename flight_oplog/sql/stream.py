"""A query's batches on their way out of DataFusion: pulled so that they can be stopped, joined or cut, in types every client reads.

They are pulled through asyncio rather than through DataFusion's C stream, because that one buffers without bound and cannot
be stopped; stopping a query takes cancelling the pull and dropping every reference to its stream and its plan.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from flight_oplog import codec
from flight_oplog.cache import ScanCounts
from flight_oplog.errors import Cancelled, RequestError, TooLarge
from flight_oplog.scans import ScanContext
from flight_oplog.schema import plain_field
from flight_oplog.sql.memory import Watched
from flight_oplog.sql.refusals import out_of_memory, translated

POLL_SECONDS = 0.05
BATCHES_AHEAD = 2
# A batch waits at most this long for company before it goes out.
PACE_SECONDS = 0.05

Stopped = Callable[[], bool]


@dataclass
class Running:
    """A query under way: iterate `batches`; `counts` tells what its scans have touched so far, by table."""

    schema: pa.Schema
    batches: Iterator[pa.RecordBatch]
    counts: dict[str, ScanCounts] = field(default_factory=dict)


def pulled(
    puller: Puller, context: ScanContext, schema: pa.Schema, deadline: float, seconds_max: int, stopped: Stopped
) -> Iterator[pa.RecordBatch]:
    """Yield the batches of a stream as `schema` says, until they end, `stopped` is true or the deadline has come."""
    try:
        while True:
            try:
                batch = puller.next(lambda: stopped() or time.monotonic() > deadline or puller.is_too_large())
            except Cancelled:
                if puller.is_over:
                    raise out_of_memory() from None
                if time.monotonic() > deadline:
                    raise _overdue(seconds_max) from None
                raise
            except Exception as error:
                raise translated(error, context) from error
            if batch is None:
                return
            if batch.num_rows:
                try:
                    yield to_wire(batch, schema)
                except pa.ArrowException as error:
                    raise RequestError(f"the query's values do not fit its columns: {' '.join(str(error).split())[:200]}") from error
    finally:
        puller.close()


def _overdue(seconds_max: int) -> TooLarge:
    return TooLarge(f"the query ran longer than statement_seconds_max ({seconds_max}); ask for less")


def scanned(
    table: ds.Dataset, context: ScanContext, schema: pa.Schema, deadline: float, seconds_max: int, stopped: Stopped
) -> Iterator[pa.RecordBatch]:
    """Yield all of a table as `schema` says, until `stopped` is true or the deadline has come.

    That is asked now and then: gRPC looks at its connections to tell whether a call is still wanted, which takes as long as a batch.
    """
    asked = 0.0
    try:
        for fragment in table.get_fragments():
            for batch in fragment.scanner(columns=schema.names).to_batches():
                now = time.monotonic()
                if now > asked + POLL_SECONDS:
                    asked = now
                    if now > deadline:
                        raise _overdue(seconds_max)
                    if stopped():
                        raise Cancelled("the query was stopped")
                if batch.num_rows:
                    yield to_wire(batch, schema)
    except Exception as error:
        raise translated(error, context) from error


def at_once(stream: Any, context: ScanContext, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield the batches of a stream that takes no time worth stopping, without the detour that stopping takes."""
    try:
        for batch in stream:
            if len(found := batch.to_pyarrow()):
                yield to_wire(found, schema)
    except Exception as error:
        raise translated(error, context) from error


@functools.cache
def _engine_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop that all streams of this process are pulled in, in a thread of its own, which ends with the process."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="engine", daemon=True).start()
    return loop


class Pulled:
    """Batches of a query. Closing them, or losing them before the first was asked for, ends the query as well."""

    def __init__(self, batches: Iterator[pa.RecordBatch], puller: Puller) -> None:
        self._batches = batches
        self._puller = puller

    def __iter__(self) -> Pulled:
        return self

    def __next__(self) -> pa.RecordBatch:
        return next(self._batches)

    def __del__(self) -> None:
        self._puller.close()


class Puller:
    """Pulls one DataFusion stream in the event loop, so that waiting for a batch can be given up.

    It runs a little ahead of whoever takes the batches, so computing overlaps sending.
    """

    def __init__(self, stream: Any, context: ScanContext, watched: Watched) -> None:
        self.is_over = False  # it took too much memory
        self._loop = _engine_loop()
        self._watched = watched
        self._stream = [stream]
        self._context = context
        self._ready: queue.SimpleQueue[pa.RecordBatch | Exception | None] = queue.SimpleQueue()
        self._room = asyncio.Semaphore(BATCHES_AHEAD)
        self._pulling = [asyncio.run_coroutine_threadsafe(self._pull(), self._loop)]

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

    def is_too_large(self) -> bool:
        """Whether the query is to be stopped for the memory it takes."""
        if not self.is_over and self._watched.is_to_stop():
            self._watched.stop()
            self.is_over = True
        return self.is_over

    def close(self) -> None:
        """Stop the query: cancel the pull, then drop it and the stream. Whoever holds either keeps the work going."""
        self._watched.end()
        self._context.stopped.set()
        for pulling in self._pulling:
            pulling.cancel()
        self._pulling.clear()
        self._stream.clear()


def paced(batches: Iterator[pa.RecordBatch], bytes_max: int) -> Iterator[pa.RecordBatch]:
    """Yield batches of a size that travels well: large ones cut, small ones joined unless that would keep them waiting."""
    waiting: list[pa.RecordBatch] = []
    size = 0
    since = time.monotonic() - PACE_SECONDS  # the first batch goes out at once
    for batch in batches:
        sizes = codec.Sizes(batch)
        nbytes = sizes.of(0, batch.num_rows)
        if nbytes > bytes_max // 2:
            if waiting:
                yield codec.joined(waiting)
                waiting, size = [], 0
            yield from codec.cut(batch, bytes_max, batch.num_rows, sizes)
        else:
            waiting.append(batch)
            size += nbytes
            if size > bytes_max // 2 or time.monotonic() - since > PACE_SECONDS:
                yield codec.joined(waiting)
                waiting, size = [], 0
            else:
                continue
        since = time.monotonic()
    if waiting:
        yield codec.joined(waiting)


def schema_of(frame: Any, context: ScanContext) -> pa.Schema:
    try:
        return widened(wire_schema(frame.schema()))
    except Exception as error:
        raise translated(error, context) from error


def widened(schema: pa.Schema) -> pa.Schema:
    """Return the schema with columns of float16 as float32: JDBC refuses a result that has one, and any list of columns with it."""
    return pa.schema([f.with_type(pa.float32()) if f.type == pa.float16() else f for f in schema], schema.metadata)


def wire_schema(schema: pa.Schema) -> pa.Schema:
    """Return the result's schema as every client can read it: no views, no dictionaries, all nullable."""
    return pa.schema([plain_field(field) for field in schema])


def to_wire(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    if batch.schema.equals(schema, check_metadata=True):
        return batch
    columns = [codec.recast(column, f.type) for column, f in zip(batch.columns, schema, strict=True)]
    return codec.with_rows(columns, schema, batch.num_rows)
