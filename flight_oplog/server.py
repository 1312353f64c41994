"""The log on a socket: an adapter from pyarrow.flight's calls to `OpLog`, `Engine` and `Service`.

The only importer of pyarrow.flight on the serving side, and the one place where errors become Flight statuses.
pyarrow derives the status from the Python class of an exception and appends a traceback to everything that is not a
FlightError, so errors leave here as the classes below, and their formatting is kept to a bare name.
"""

from __future__ import annotations

import functools
import ipaddress
import json
import logging
import re
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.flight as fl

from flight_oplog.config import Config
from flight_oplog.engine import Engine
from flight_oplog.errors import Cancelled, NotFound, OplogError, RequestError, TryAgain, Unsupported
from flight_oplog.flightsql.service import Planned, Result, Service
from flight_oplog.oplog import OpLog
from flight_oplog.provider import topic_batches
from flight_oplog.schema import TOPIC_PATTERN
from flight_oplog.store import Topic

log = logging.getLogger("flight_oplog.server")

# gRPC carries a message several times over, percent-encoded, in trailers of at most 16 KiB.
MESSAGE_BYTES_MAX = 1200
ACKS_HEADER = "oplog-acks"
COMMIT_HEADER = "oplog-commit"


# Errors


class _WireError(Exception):
    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


class _InvalidArgument(_WireError, ValueError):
    pass


class _NotFound(_WireError, KeyError):
    pass


class _Unimplemented(_WireError, NotImplementedError):
    pass


_CLASSES: dict[str, type[Exception]] = {
    "INVALID_ARGUMENT": _InvalidArgument,
    "NOT_FOUND": _NotFound,
    "UNIMPLEMENTED": _Unimplemented,
    "UNAVAILABLE": fl.FlightUnavailableError,
    "CANCELLED": fl.FlightCancelledError,
    "INTERNAL": fl.FlightInternalError,
}
# pyarrow turns a FlightError out of get_schema into UNKNOWN with a traceback: only these survive there.
_FROM_GET_SCHEMA = {"UNAVAILABLE": _InvalidArgument, "INTERNAL": _InvalidArgument, "CANCELLED": _InvalidArgument}

_format_exception = traceback.format_exception


def _format_without_wire_errors(*args: Any, **kwargs: Any) -> list[str]:
    """Stand in for traceback.format_exception, which pyarrow's C++ calls by name to build the text it sends."""
    error = args[0] if len(args) == 1 else args[1] if len(args) > 1 else None
    return [type(error).__name__.lstrip("_")] if isinstance(error, _WireError) else _format_exception(*args, **kwargs)


def _to_wire(error: BaseException, classes: dict[str, type[Exception]] = _CLASSES) -> Exception:
    """Return what to raise so that the client sees the right status, one clear sentence and nothing of the server."""
    if isinstance(error, OplogError):
        status, message = error.status, str(error)
    else:
        number = uuid.uuid4().hex[:8]
        log.error("internal error %s", number, exc_info=error)
        status, message = "INTERNAL", f"internal error {number}; the server's log says more"
    text = message.replace("\0", "\\0").encode("utf-8", "backslashreplace")
    if len(text) > MESSAGE_BYTES_MAX:
        text = text[:MESSAGE_BYTES_MAX] + b"..."
    return classes[status](text.decode("utf-8", "ignore"))


def _rpc(method: Callable[..., Any], classes: dict[str, type[Exception]] = _CLASSES) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any) -> Any:
        try:
            return method(*args)
        except BaseException as error:  # a panic in Rust is no Exception, and would leak its traceback and the call's slot
            raise _to_wire(error, classes) from None

    return call


def _streamed(items: Iterator[Any], stopping: threading.Event) -> Iterator[Any]:
    """Translate errors that come up while a stream is under way."""
    try:
        yield from items
    except GeneratorExit:
        raise
    except BaseException as error:
        if isinstance(error, Cancelled) and stopping.is_set():
            error = TryAgain("the server is shutting down; try again when it is back")
        raise _to_wire(error) from None


# Calls


class _Calls(fl.ServerMiddlewareFactory):
    """Counts calls under way, refuses one too many, and keeps each call's headers for its handler."""

    def __init__(self, calls_max: int) -> None:
        self._free = threading.BoundedSemaphore(calls_max)
        self._calls_max = calls_max

    def start_call(self, info: Any, headers: dict[str, list[str]]) -> _Call:
        if not self._free.acquire(blocking=False):
            raise fl.FlightUnavailableError(f"the server is busy: calls_max ({self._calls_max}) calls are under way; try again")
        return _Call(self._free, {name.lower(): values[0] for name, values in headers.items()})


class _Call(fl.ServerMiddleware):
    def __init__(self, free: threading.BoundedSemaphore, headers: dict[str, str]) -> None:
        self.headers = headers
        self._free = free

    def call_completed(self, exception: Any) -> None:
        self._free.release()


class Server(fl.FlightServerBase):
    """Serves a log until `drain`. It listens, on `uri`, as soon as it is constructed."""

    def __init__(self, oplog: OpLog, config: Config) -> None:
        self._oplog = oplog
        self._config = config
        self._stopping = threading.Event()
        self._engine = Engine(config)
        self._service = Service(oplog, self._engine, config)
        traceback.format_exception = _format_without_wire_errors  # type: ignore[assignment]
        host = check_listen(config)
        try:
            super().__init__(config.listen, middleware={"call": _Calls(config.calls_max)})
        except (pa.ArrowException, OSError) as error:
            log.debug("listening on %s: %s", config.listen, error)
            raise RequestError(f"cannot listen on {config.listen}: the address is in use or is not one of this machine's") from None
        self.uri = f"grpc://{host}:{self.port}"

    def drain(self, seconds: float) -> bool:
        """Take no new calls, let those under way finish for up to `seconds`, then stop queries. True when all ended."""
        done = threading.Thread(target=self.shutdown, daemon=True)
        done.start()
        done.join(seconds)
        self._stopping.set()
        done.join(1)
        return not done.is_alive()

    def _stopped(self, context: Any) -> Callable[[], bool]:
        return lambda: self._stopping.is_set() or context.is_cancelled()

    # Streaming in

    @_rpc
    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        topic = _topic_of(descriptor)
        try:
            schema = reader.schema
        except (pa.ArrowException, OSError, StopIteration):
            raise RequestError(f"topic {topic!r}: the stream does not begin with a readable schema; nothing was written") from None
        headers = context.get_middleware("call").headers
        explicit = headers.get(COMMIT_HEADER) == "explicit"
        append = self._oplog.writer(topic, schema)
        try:
            committed = not explicit
            for batch, word in _received(reader, topic):
                if batch is not None:
                    append.write(batch)
                committed = committed or _says_commit(word)
            # A client that died or cancelled looks exactly like one that finished; only this tells them apart. And
            # pyarrow's own client cannot break off at all, so it may ask that the end of the stream be not enough.
            if context.is_cancelled() or not committed:
                raise Cancelled(f"topic {topic!r}: the client broke off; nothing was written")
            if self._stopping.is_set():
                raise TryAgain("the server is shutting down; nothing was written; try again when it is back")
            receipt = append.commit()
        finally:
            append.abandon()
        if headers.get(ACKS_HEADER) == "true":
            ack = {name: getattr(receipt, name) for name in ("topic", "first_offset", "entries", "table_version")}
            writer.write(json.dumps(ack).encode())

    # Reading

    @_rpc
    def get_flight_info(self, context: Any, descriptor: Any) -> fl.FlightInfo:
        if descriptor.descriptor_type == fl.DescriptorType.PATH:
            return _topic_info(self._oplog.snapshot().topic(_topic_of(descriptor)))
        planned = self._planned(descriptor)
        # No location: the client comes back over the connection it has, whatever name or port led it here.
        return fl.FlightInfo(planned.schema, descriptor, [fl.FlightEndpoint(planned.ticket, [])], -1, -1)

    @functools.partial(_rpc, classes=_CLASSES | _FROM_GET_SCHEMA)
    def get_schema(self, context: Any, descriptor: Any) -> fl.SchemaResult:
        if descriptor.descriptor_type == fl.DescriptorType.PATH:
            return fl.SchemaResult(self._oplog.snapshot().topic(_topic_of(descriptor)).schema)
        return fl.SchemaResult(self._planned(descriptor).schema)

    def _planned(self, descriptor: Any) -> Planned:
        if descriptor.descriptor_type != fl.DescriptorType.CMD or not descriptor.command:
            raise RequestError("the descriptor is empty: send a path with one topic, or a Flight SQL command")
        return self._service.flight_info(descriptor.command)

    @_rpc
    def do_get(self, context: Any, ticket: fl.Ticket) -> fl.GeneratorStream:
        stopped = self._stopped(context)
        result = self._topic_result(ticket.ticket, stopped) if ticket.ticket[:1] == b"{" else self._service.get(ticket.ticket, stopped)
        return fl.GeneratorStream(result.schema, _streamed(result.batches, self._stopping))

    def _topic_result(self, ticket: bytes, stopped: Callable[[], bool]) -> Result:
        name, start = _parse_topic_ticket(ticket)
        snapshot = self._oplog.snapshot()
        topic = snapshot.topic(name)
        return Result(topic.schema, topic_batches(snapshot, topic, start, self._config.message_bytes_max, stopped))

    @_rpc
    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        raise Unsupported("DoExchange is not served; append with DoPut, read with DoGet")

    @_rpc
    def list_flights(self, context: Any, criteria: bytes) -> Iterator[fl.FlightInfo]:
        return iter([_topic_info(topic) for topic in self._oplog.topics() if not topic.name.startswith("_")])

    @_rpc
    def do_action(self, context: Any, action: fl.Action) -> list[bytes]:
        return self._service.action(action.type, action.body.to_pybytes())

    @_rpc
    def list_actions(self, context: Any) -> list[tuple[str, str]]:
        return self._service.actions()


_LISTEN = re.compile(r"grpc://(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):(\d{1,5})")


def check_listen(config: Config) -> str:
    """Return the host to listen on. Raises RequestError for a malformed address, or one beyond loopback unasked."""
    found = _LISTEN.fullmatch(config.listen)
    if found is None or int(found[2]) > 65535:
        raise RequestError(f"setting listen: {config.listen!r} is not of the form grpc://host:port")
    host = found[1]
    try:
        loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not config.insecure:
        raise RequestError(
            f"{config.listen} is reachable from other machines and there is no authentication; add --insecure to serve there all the same"
        )
    return host


def _topic_of(descriptor: Any) -> str:
    if descriptor.descriptor_type != fl.DescriptorType.PATH:
        if descriptor.command:
            raise Unsupported("do_put takes a descriptor with the path [topic]; Flight SQL commands are not served there")
        raise RequestError("the descriptor is empty: send a path with one topic")
    if len(descriptor.path) != 1:
        raise RequestError(f"the descriptor's path has {len(descriptor.path)} parts: send one, the topic")
    name = descriptor.path[0].decode(errors="replace")
    if not TOPIC_PATTERN.fullmatch(name):
        raise RequestError(f"topic {name[:200]!r} is not a topic name: a letter, then letters, digits and _, at most 128")
    return name


def _says_commit(word: pa.Buffer | None) -> bool:
    """Whether a message's app_metadata is {"commit": true}."""
    try:
        return word is not None and json.loads(word.to_pybytes()) == {"commit": True}
    except (ValueError, RecursionError):
        return False


def _received(reader: Any, topic: str) -> Iterator[tuple[pa.RecordBatch | None, pa.Buffer | None]]:
    """Yield the batch and the app_metadata of each message; what the wire sends is hostile until proven otherwise."""
    while True:
        try:
            chunk = reader.read_chunk()
        except StopIteration:
            return
        except fl.FlightError as error:
            raise Cancelled(f"topic {topic!r}: the stream broke off; nothing was written") from error
        except (pa.ArrowException, OSError) as error:
            raise RequestError(f"topic {topic!r}: the stream is not valid Arrow data; nothing was written") from error
        yield chunk.data, chunk.app_metadata


def _topic_info(topic: Topic) -> fl.FlightInfo:
    ticket = json.dumps({"topic": topic.name}).encode()
    size = sum(file.size for file in topic.files)
    return fl.FlightInfo(topic.schema, fl.FlightDescriptor.for_path(topic.name), [fl.FlightEndpoint(ticket, [])], topic.entries, size)


def _parse_topic_ticket(ticket: bytes) -> tuple[str, int]:
    try:
        body = json.loads(ticket)
        name, start = body.pop("topic"), body.pop("from", 0)
    except (ValueError, KeyError, AttributeError, RecursionError):
        raise RequestError('the ticket is not of the form {"topic": name, "from": offset}') from None
    if body or type(name) is not str or not TOPIC_PATTERN.fullmatch(name) or type(start) is not int or start < 0:
        raise RequestError('the ticket is not of the form {"topic": name, "from": offset}')
    if name.startswith("_"):
        raise NotFound(f"topic {name!r} is the log's own; read it with SQL as log.{name}")
    return name, start
