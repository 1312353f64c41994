"""A small Python client: append to a topic over plain Flight, query over Flight SQL.

Any Arrow Flight or ADBC client does the same; this one serves the command line and shows how little it takes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.flight as fl

from flight_oplog import codec
from flight_oplog.committer import Receipt
from flight_oplog.errors import NotFound, OplogError, RequestError, TryAgain, Unsupported

# Room under the 16 MiB that other servers and proxies on the way accept.
MESSAGE_BYTES = 8 << 20

_ERRORS: tuple[tuple[type[Exception], type[OplogError]], ...] = (
    (pa.ArrowKeyError, NotFound),
    (pa.ArrowNotImplementedError, Unsupported),
    (fl.FlightUnavailableError, TryAgain),
    (pa.ArrowInvalid, RequestError),
)


class Client:
    """A connection to a server. Thread-safe; close it or use it as a context manager."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        try:
            self._flight = fl.connect(uri)
        except (pa.ArrowException, ValueError) as error:
            raise RequestError(f"server {uri!r}: not an address of the form grpc://host:port") from error

    def append(
        self, topic: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch], sent: Callable[[pa.RecordBatch], None] = lambda batch: None
    ) -> Receipt:
        """Send all batches as one append and return its receipt: whole and durable, or an error and nothing written.

        `sent` is called after each piece went out, for progress.
        """
        options = fl.FlightCallOptions(headers=[(b"oplog-acks", b"true"), (b"oplog-commit", b"explicit")])
        try:
            writer, acks = self._flight.do_put(fl.FlightDescriptor.for_path(topic), schema, options)
            try:
                for batch in batches:
                    for piece in codec.cut(batch, MESSAGE_BYTES, batch.num_rows):
                        writer.write_batch(piece)
                        sent(piece)
                # pyarrow cannot abort a stream: however a writer goes, the server sees a good end. Hence a last word.
                writer.write_metadata(b'{"commit": true}')
                writer.done_writing()
                ack = acks.read()
            except BaseException:
                with contextlib.suppress(pa.ArrowException, OSError):
                    writer.close()
                raise
            writer.close()
        except (pa.ArrowException, OSError) as error:
            raise self._translated(error) from None
        if ack is None:
            raise OplogError(f"topic {topic!r}: the server ended the stream without a receipt; look whether the entries are there")
        return Receipt(**json.loads(ack.to_pybytes()))

    def follow(
        self, topic: str, start: int | str = "earliest", follow: bool = True, columns: Sequence[str] | None = None, where: str | None = None
    ) -> Iterator[tuple[pa.RecordBatch, int]]:
        """Yield a topic's entries in offset order as (batch, offset to come back to); with `follow`, for ever.

        `start` is an offset, "earliest" or "latest"; `where` is an SQL condition.
        """
        body = {"topic": topic, "from": start, "follow": follow, "columns": columns, "where": where}
        ticket = fl.Ticket(json.dumps({name: value for name, value in body.items() if value is not None}).encode())
        waiting: list[pa.RecordBatch] = []  # a run that goes on: none of it counts before all of it is here
        try:
            for chunk in self._flight.do_get(ticket):
                waiting.append(chunk.data)
                if chunk.app_metadata is not None and chunk.app_metadata.size:
                    yield codec.joined(waiting), json.loads(chunk.app_metadata.to_pybytes())["next_offset"]
                    waiting = []
        except (pa.ArrowException, OSError) as error:
            raise self._translated(error) from None

    def _translated(self, error: Exception) -> OplogError:
        message = str(error.args[0] if error.args else error).split(". Detail: ")[0].split(". gRPC client debug context")[0]
        if isinstance(error, fl.FlightUnavailableError) and "failed to connect" in message:
            return TryAgain(f"no server answers at {self._uri}; start one with: flight-oplog serve")
        return next((ours(message) for theirs, ours in _ERRORS if isinstance(error, theirs)), OplogError(message))

    def close(self) -> None:
        self._flight.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
