"""A small Python client: append to a topic over plain Flight, query over Flight SQL.

Any Arrow Flight or ADBC client does the same; this one serves the command line and shows how little it takes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.flight as fl

from flight_oplog import codec
from flight_oplog.appends import Receipt
from flight_oplog.errors import Forbidden, NotFound, OplogError, RequestError, TryAgain, Unauthenticated, Unsupported

# Room under the 16 MiB that other servers and proxies on the way accept.
MESSAGE_BYTES = 8 << 20

_ERRORS: tuple[tuple[type[Exception], type[OplogError]], ...] = (
    (pa.ArrowKeyError, NotFound),
    (pa.ArrowNotImplementedError, Unsupported),
    (fl.FlightUnavailableError, TryAgain),
    (fl.FlightUnauthenticatedError, Unauthenticated),
    (fl.FlightUnauthorizedError, Forbidden),
    (pa.ArrowInvalid, RequestError),
)


@dataclass(frozen=True)
class Login:
    """What a client shows a server: a name and a password, or a bearer; and for TLS, PEM texts of whom to trust and who it is."""

    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    authorities: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)

    def flight(self) -> dict[str, Any]:
        """Return the arguments of a Flight connection."""
        found = {"tls_root_certs": self.authorities, "cert_chain": self.certificate, "private_key": self.key}
        return {name: value for name, value in found.items() if value is not None}

    def adbc(self) -> dict[str, str]:
        """Return the options of an ADBC connection."""
        tls = "adbc.flight.sql.client_option"
        found = {
            "username": self.user,
            "password": self.password,
            "adbc.flight.sql.authorization_header": None if self.token is None else f"Bearer {self.token}",
            f"{tls}.tls_root_certs": self.authorities,
            f"{tls}.mtls_cert_chain": self.certificate,
            f"{tls}.mtls_private_key": self.key,
        }
        return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items() if value is not None}


class Client:
    """A connection to a server. Thread-safe; close it or use it as a context manager."""

    def __init__(self, uri: str, login: Login | None = None) -> None:
        self._uri = uri
        login = login or Login()
        self._headers = [] if login.token is None else [(b"authorization", f"Bearer {login.token}".encode())]
        try:
            self._flight = fl.connect(uri, **login.flight())
        except (pa.ArrowException, ValueError) as error:
            raise RequestError(f"server {uri!r}: not an address of the form grpc://host:port or grpc+tls://host:port") from error
        if login.user is not None:
            try:
                self._headers.append(self._flight.authenticate_basic_token(login.user, login.password or ""))
            except (pa.ArrowException, OSError) as error:
                raise self._translated(error) from None

    def append(
        self, topic: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch], sent: Callable[[pa.RecordBatch], None] = lambda batch: None
    ) -> Receipt:
        """Send all batches as one append and return its receipt: whole and durable, or an error and nothing written.

        `sent` is called after each piece went out, for progress.
        """
        options = fl.FlightCallOptions(headers=[*self._headers, (b"oplog-acks", b"true"), (b"oplog-commit", b"explicit")])
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
            for chunk in self._flight.do_get(ticket, fl.FlightCallOptions(headers=self._headers)):
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
