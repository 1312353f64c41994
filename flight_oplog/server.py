"""The log on a socket: an adapter from pyarrow.flight's calls to `OpLog`, `Engine` and `Service`.

The only importer of pyarrow.flight on the serving side, and the one place where errors become Flight statuses.
pyarrow derives the status from the Python class of an exception and appends a traceback to everything that is not a
FlightError, so errors leave here as the classes below, and their formatting is kept to a bare name.
"""

from __future__ import annotations

import datetime
import functools
import ipaddress
import itertools
import json
import logging
import queue
import re
import secrets
import ssl
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import fields, replace
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.flight as fl

from flight_oplog import codec, logs
from flight_oplog.auth import Gate
from flight_oplog.committer import Origin, Receipt, check_data
from flight_oplog.config import Config
from flight_oplog.errors import Cancelled, OplogError, RequestError, TooLarge, TryAgain, Unauthenticated, Unsupported
from flight_oplog.flightsql import wire
from flight_oplog.flightsql.service import AT_TIMESTAMP, AT_VERSION, Caller, Put, Service, Update
from flight_oplog.follow import Place, TopicRead, is_place
from flight_oplog.grants import ANYBODY, Principal
from flight_oplog.oplog import AppendWriter, OpLog
from flight_oplog.schema import TOPIC_PATTERN
from flight_oplog.sql.catalog import moment
from flight_oplog.sql.engine import Engine
from flight_oplog.store import Topic

log = logging.getLogger("flight_oplog.server")

# gRPC carries a message several times over, percent-encoded, in trailers of at most 16 KiB.
MESSAGE_BYTES_MAX = 1200
ACKS_HEADER = "oplog-acks"
COMMIT_HEADER = "oplog-commit"
PRODUCER_HEADER = "oplog-producer"
FOLLOW_HEADER = "oplog-follow"
FROM_HEADER = "oplog-from"
MIN_VERSION_HEADER = "oplog-min-version"
REQUEST_HEADER = "x-request-id"
_REQUEST = re.compile(r"[A-Za-z0-9._-]{1,64}")
OPTIONS_COOKIE = "oplog-options"
SESSION_OPTIONS = re.compile(rf"(?:^|; *){OPTIONS_COOKIE}=([A-Za-z0-9_=-]{{1,4096}})(?:;|$)")
SESSION_COOKIE = re.compile(r"(?:^|; *)oplog-session=([0-9a-f]{32})(?:;|$)")
# ADBC's driver, in whatever language it is used. It never says that an ingest belongs to the transaction it has open.
LEAVES_OUT_TRANSACTION = "ADBC Flight SQL Driver"
WORDS_BYTES_MAX = 1024


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
    "UNAUTHENTICATED": fl.FlightUnauthenticatedError,
    "PERMISSION_DENIED": fl.FlightUnauthorizedError,
    "UNAVAILABLE": fl.FlightUnavailableError,
    "CANCELLED": fl.FlightCancelledError,
    "INTERNAL": fl.FlightInternalError,
}
# pyarrow turns a FlightError out of get_schema into UNKNOWN with a traceback: only these survive there.
_FROM_GET_SCHEMA = dict.fromkeys(("UNAUTHENTICATED", "PERMISSION_DENIED", "UNAVAILABLE", "INTERNAL", "CANCELLED"), _InvalidArgument)

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
    def call(server: Server, context: Any, *args: Any) -> Any:
        under_way: _Call = context.get_middleware("call")
        with logs.during(under_way.words):
            try:
                under_way.identify(context)
                return method(server, context, *args)
            except BaseException as error:  # a panic in Rust is no Exception, and would leak its traceback and the call's slot
                under_way.failed = error
                raise _to_wire(error, classes) from None

    return call


def _streamed(items: Iterator[Any], stopping: threading.Event, call: _Call) -> Iterator[Any]:
    """Translate errors that come up while a stream is under way."""
    try:
        yield from items
    except GeneratorExit:
        raise
    except BaseException as error:
        if isinstance(error, Cancelled) and stopping.is_set():
            error = TryAgain("the server is shutting down; try again when it is back")
        call.failed = error
        with logs.during(call.words):
            raise _to_wire(error) from None


# Calls


class _Calls(fl.ServerMiddlewareFactory):
    """Finds out who calls, counts calls under way, refuses one too many, and keeps each call's headers for its handler."""

    def __init__(self, gate: Gate, config: Config) -> None:
        self.gate = gate
        self.logged = config.log_calls
        self.free = threading.BoundedSemaphore(config.calls_max)
        self._calls_max = config.calls_max
        self.admitted: dict[int, bool] = {}  # whether the handshake that a thread is about to make is by a header, and done

    def start_call(self, info: Any, headers: dict[str, list[str]]) -> _Call:
        first = {name.lower(): values[0] for name, values in headers.items()}
        call = _Call(self, info.method, first)
        try:
            if not self.gate.takes_certificates:
                with logs.during(call.words):
                    self._admit(call, info.method, headers)
            if not self.free.acquire(blocking=False):
                raise TryAgain(f"the server is busy: calls_max ({self._calls_max}) calls are under way; try again")
        except BaseException as error:
            call.failed = error
            call.end()
            refused = (
                error
                if isinstance(error, TryAgain) or not isinstance(error, OplogError)
                else type(error)(f"{error}; request {call.words.request}")
            )
            with logs.during(call.words):
                raise _to_wire(refused) from None
        return call

    def _admit(self, call: _Call, method: Any, headers: dict[str, list[str]]) -> None:
        found = [*headers.get("authorization", ()), *(f"Bearer {_text(token)}" for token in headers.get("auth-token-bin", ()) if token)]
        if len(found) > 1:
            raise Unauthenticated("the call has more than one credential: send one")
        is_handshake = method == fl.FlightMethod.HANDSHAKE
        if is_handshake:
            self.admitted[threading.get_ident()] = bool(found)
            if not found:
                return  # what it says comes later: see _Handshakes
        principal, bearer = self.gate.admit(_text(found[0]) if found else None)
        if bearer is None and is_handshake and found:
            bearer = _text(found[0]).partition(" ")[2]
        call.admitted(principal, bearer)


def _text(header: str | bytes) -> str:
    return header.decode("utf-8", "replace") if isinstance(header, bytes) else header


class _Handshakes(fl.ServerAuthHandler):
    """Lets clients log in by a handshake: with a header, which is seen to before, or by what the handshake says."""

    def __init__(self, calls: _Calls) -> None:
        super().__init__()
        self._calls = calls

    def authenticate(self, outgoing: Any, incoming: Any) -> None:
        try:
            said = incoming.read()
        except OSError:  # it says nothing
            said = b""
        if self._calls.admitted.pop(threading.get_ident(), False):
            return
        try:
            try:
                given = fl.BasicAuth.deserialize(said)
                name, password = given.username.decode(), given.password.decode()
            except (pa.ArrowException, OSError, UnicodeDecodeError):
                raise Unauthenticated("a handshake has a user's name and password, or an authorization header") from None
            outgoing.write(self._calls.gate.log_in_by_handshake(name, password).encode())
        except BaseException as error:
            raise _to_wire(error) from None

    def is_valid(self, token: bytes) -> bytes:
        """What is sent with each call, the middleware has seen already."""
        return b""


class _Call(fl.ServerMiddleware):
    """One call: who makes it, its headers, and the session it belongs to where its client keeps cookies."""

    def __init__(self, calls: _Calls, method: Any, headers: dict[str, str]) -> None:
        self.headers = headers
        self.principal = ANYBODY
        self.failed: BaseException | None = None
        self._calls = calls
        self._began = time.monotonic()
        self._bearer: str | None = None
        asked = headers.get(REQUEST_HEADER, "")
        self.words = logs.Call(asked if _REQUEST.fullmatch(asked) else secrets.token_hex(8), method.name)
        cookie = SESSION_COOKIE.search(headers.get("cookie", ""))
        self._session = cookie[1] if cookie else None
        options = SESSION_OPTIONS.search(headers.get("cookie", ""))
        self._options = options[1] if options else None
        is_first = method in (fl.FlightMethod.DO_ACTION, fl.FlightMethod.GET_FLIGHT_INFO)
        self._offered = uuid.uuid4().hex if is_first and self._leaves_out and cookie is None else None

    @property
    def _leaves_out(self) -> bool:
        return self.headers.get("user-agent", "").startswith(LEAVES_OUT_TRANSACTION)

    def admitted(self, principal: Principal, bearer: str | None = None) -> None:
        """Take note of who calls, and what bearer the answer tells them to use from then on."""
        self.principal, self.words.principal, self._bearer = principal, principal.name, bearer

    def identify(self, context: Any) -> None:
        """Take note of who calls by a certificate, which only a handler gets to see."""
        if self._calls.gate.takes_certificates:
            self.admitted(self._calls.gate.certified(context.peer_identity().decode("utf-8", "replace")))

    def sending_headers(self) -> dict[str, str]:
        headers = {REQUEST_HEADER: self.words.request}
        if self._offered:
            headers["set-cookie"] = f"oplog-session={self._offered}"
        if self._bearer:
            headers["authorization"] = f"Bearer {self._bearer}"
        return headers

    @property
    def keeps_no_cookies(self) -> bool:
        """Whether the client is one that was offered a cookie before this call and did not bring it."""
        return self._session is None and self._leaves_out

    def caller(self, peer: str) -> Caller:
        names = (self._session,) if self._session is not None else (peer,) if self._offered is None else (self._offered, peer)
        return Caller(self.principal, names, self._leaves_out, options=self._options)

    def call_completed(self, exception: Any) -> None:
        self._calls.free.release()
        self.end()

    def end(self) -> None:
        """Log the call, where such calls are logged."""
        wanted = self._calls.logged
        if wanted == "none" or (wanted == "failed" and self.failed is None):
            return
        seconds = time.monotonic() - self._began
        status = "OK" if self.failed is None else self.failed.status if isinstance(self.failed, OplogError) else "INTERNAL"
        why = f": {self.failed}" if isinstance(self.failed, OplogError) else ""
        with logs.during(self.words):
            log.info("%s after %.4f s%s", status, seconds, why, extra={"fields": {"status": status, "seconds": round(seconds, 6)}})


class _Acks:
    """Sends receipts of one stream back in the order of its appends, from a thread of its own.

    The stream's handler reads meanwhile, so a client may have many appends under way; one that does not read its acks
    holds up nobody but itself. An append that failed is answered in its place, and ends the stream at its next message.
    """

    def __init__(self, writer: Any, in_flight_max: int) -> None:
        self._writer = writer
        self._room = threading.Semaphore(in_flight_max)
        self._under_way: deque[tuple[Future[Receipt], int]] = deque()
        # The thread is woken when receipts come, not when appends go: waking costs more than all else here.
        self._news: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="acks", daemon=True)
        self._thread.start()

    def expect(self, receipt: Future[Receipt], sequence: int) -> None:
        """Send the receipt when it comes. Waits while too many are under way; raises what an earlier append failed with."""
        self._room.acquire()
        self._under_way.append((receipt, sequence))
        receipt.add_done_callback(lambda receipt: self._news.put(True))
        self.check()

    def check(self) -> None:
        if self._failed is not None:
            raise self._failed

    def finish(self) -> None:
        """Wait until every receipt is sent."""
        self._news.put(False)
        self._thread.join()

    def _run(self) -> None:
        is_ending = False
        while not (is_ending and not self._under_way):
            is_ending = not self._news.get() or is_ending
            while self._under_way and self._under_way[0][0].done():
                self._send(*self._under_way.popleft())
                self._room.release()

    def _send(self, receipt: Future[Receipt], sequence: int) -> None:
        try:
            answer = _ack(receipt.result())
        except BaseException as error:
            self._failed = self._failed or error
            answer = _refusal(error, sequence)
        if self._writer is not None:
            try:
                self._writer.write(answer)
            except (pa.ArrowException, OSError):  # the client is gone; its appends are committed all the same
                self._writer = None


def _ack(receipt: Receipt) -> bytes:
    return json.dumps({name: getattr(receipt, name) for name in _RECEIPT_FIELDS}).encode()


_RECEIPT_FIELDS = [column.name for column in fields(Receipt)]


def _refusal(error: BaseException, sequence: int) -> bytes:
    shown = error if isinstance(error, OplogError) else OplogError("the append failed; the server's log says more")
    return json.dumps({"sequence": sequence, "status": shown.status, "error": str(shown)}).encode()


class Server(fl.FlightServerBase):
    """Serves a log until `drain`. It listens, on `uri`, as soon as it is constructed."""

    def __init__(self, oplog: OpLog, config: Config) -> None:
        self._oplog = oplog
        self._config = config
        self._stopping = threading.Event()
        self._engine = Engine(config)
        self._gate = Gate(config, oplog.secret())
        self._service = Service(oplog, self._engine, config, self._gate)
        traceback.format_exception = _format_without_wire_errors  # type: ignore[assignment]
        host, port = check_listen(config)
        calls = _Calls(self._gate, config)
        scheme, tls = "grpc+tls" if config.tls_cert else "grpc", check_tls(config)
        try:
            handshakes = _Handshakes(calls) if self._gate.takes_bearers else None
            super().__init__(f"{scheme}://{host}:{port}", auth_handler=handshakes, middleware={"call": calls}, **tls)
        except (pa.ArrowException, OSError) as error:
            log.debug("listening on %s: %s", config.listen, error)
            raise RequestError(f"cannot listen on {config.listen}: the address is in use or is not one of this machine's") from None
        self.uri = f"{scheme}://{host}:{self.port}"

    def reload(self) -> None:
        """Read grants and users again; when one of them cannot be used it stays as it was, and the log says so."""
        try:
            self._gate.reload()
        except OplogError as error:
            log.error("grants and users stay as they were: %s", error)

    def drain(self, seconds: float) -> bool:
        """Take no new calls, let those under way finish for up to `seconds`, then stop queries. True when all ended."""
        done = threading.Thread(target=self.shutdown, daemon=True)
        done.start()
        done.join(seconds)
        self._stopping.set()
        self._oplog.wake()
        done.join(1)
        self._service.transactions.close()
        return not done.is_alive()

    def _caller(self, context: Any) -> Caller:
        call = context.get_middleware("call")
        caller: Caller = call.caller(context.peer())
        return replace(
            caller,
            origin=_origin_of("", call),
            stopped=self._stopped(context),
            at=_at(call.headers),
            keep=None if call.keeps_no_cookies else lambda options: context.add_header("set-cookie", f"{OPTIONS_COOKIE}={options}"),
        )

    def _stopped(self, context: Any) -> Callable[[], bool]:
        return lambda: self._stopping.is_set() or context.is_cancelled()

    # Streaming in

    @_rpc
    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        is_command = descriptor.descriptor_type == fl.DescriptorType.CMD and bool(descriptor.command)
        caller = self._caller(context)
        put = self._service.put(descriptor.command, caller) if is_command else Put(_topic_of(descriptor))
        if isinstance(put, Update):
            writer.write(put.perform(self._parameters(context, reader) if put.takes_parameters else None))
            return
        topic = put.topic
        caller.check("append", topic)
        try:
            schema = reader.schema
        except (pa.ArrowException, OSError, StopIteration):
            raise RequestError(f"topic {topic!r}: the stream does not begin with a readable schema; nothing was written") from None
        headers = context.get_middleware("call").headers
        origin = _origin_of(topic, context.get_middleware("call"))
        messages = _received(reader, topic)
        first = next(messages, (None, {}))
        if "sequence" in first[1] and not is_command:
            self._append_each(context, caller, topic, schema, origin, itertools.chain([first], messages), writer)
            return
        append = self._oplog.writer(topic, schema, origin, put.role)
        try:
            self._fill(context, append, itertools.chain([first], messages), headers)
            answer: bytes | None = None
            if put.transaction_id is not None:
                answer = wire.encode(wire.DoPutUpdateResult(self._service.transactions.hold(put.transaction_id, append, caller.name)))
            else:
                receipt = append.commit()
                if is_command:
                    answer = wire.encode(wire.DoPutUpdateResult(receipt.entries or 0))
                elif headers.get(ACKS_HEADER) == "true":
                    answer = _ack(receipt)
        finally:
            append.abandon()
        if answer is not None:
            writer.write(answer)

    def _parameters(self, context: Any, reader: Any) -> pa.RecordBatch | None:
        """Return the values a client binds, as one batch; None for a stream without columns or a schema, as drivers send for none."""
        try:
            schema = reader.schema
        except (pa.ArrowException, OSError, StopIteration):
            if context.is_cancelled():
                raise Cancelled("the client broke off; nothing was written") from None
            return None
        batches, size, rows = [], 0, 0
        for batch, _ in _received(reader, "parameters"):
            if batch is not None:
                check_data("parameters", [batch])
                size += codec.expanded_nbytes_of(batch)
                rows += batch.num_rows
                if rows > self._config.batch_entries_max:
                    raise TooLarge(f"more than batch_entries_max ({self._config.batch_entries_max}) rows are bound; nothing was written")
                if size > self._config.batch_bytes_max:
                    raise TooLarge(f"the bound values are over batch_bytes_max ({self._config.batch_bytes_max}); nothing was written")
                batches.append(batch)
        if context.is_cancelled():
            raise Cancelled("the client broke off; nothing was written")
        self._check_open()
        if not len(schema):
            return None
        try:
            return codec.joined(batches) if batches else pa.RecordBatch.from_arrays([pa.array([], f.type) for f in schema], schema=schema)
        except (pa.ArrowException, NotImplementedError):
            raise RequestError("values of these types cannot be bound; send plain ones in one batch; nothing was written") from None

    def _fill(self, context: Any, append: AppendWriter, messages: Iterator[_Message], headers: dict[str, str]) -> None:
        """Take the whole stream into one append."""
        topic, is_explicit = append.topic, headers.get(COMMIT_HEADER) == "explicit"
        committed = not is_explicit
        for batch, words in messages:
            if is_explicit and committed:
                raise RequestError(f"topic {topic!r}: a message came after the commit; nothing was written")
            if "sequence" in words:
                raise RequestError(f"topic {topic!r}: a batch has a sequence where the first had none; nothing was written")
            if batch is not None:
                append.write(batch)
            committed = committed or words == {"commit": True}
        # A client that died or cancelled looks exactly like one that finished; only this tells them apart. And
        # pyarrow's own client cannot break off at all, so it may ask that the end of the stream be not enough.
        if context.is_cancelled() or not committed:
            raise Cancelled(f"topic {topic!r}: the client broke off; nothing was written")
        self._check_open()

    def _append_each(
        self, context: Any, caller: Caller, topic: str, schema: pa.Schema, origin: Origin, messages: Iterator[_Message], writer: Any
    ) -> None:
        """Take every batch of the stream as an append of its own; receipts go back in their order, while others arrive."""
        acks = _Acks(writer, self._config.appends_in_flight_max)
        try:
            for batch, words in messages:
                if batch is None or not words.keys() <= {"sequence", "expected_offset"} or "sequence" not in words:
                    raise RequestError(f'topic {topic!r}: after a batch with a sequence, each message is a batch with {{"sequence": n}}')
                self._check_open()
                replace(caller, principal=self._gate.again(caller.principal)).check("append", topic)
                append = self._oplog.writer(topic, schema, replace(origin, **words))
                try:
                    append.write(batch)
                    if context.is_cancelled():
                        raise Cancelled(f"topic {topic!r}: the client broke off")
                    acks.expect(append.submit(), words["sequence"])
                finally:
                    append.abandon()
        finally:
            acks.finish()
        acks.check()

    def _check_open(self) -> None:
        if self._stopping.is_set():
            raise TryAgain("the server is shutting down; nothing was written; try again when it is back")

    # Reading

    def _catch_up(self, context: Any) -> None:
        """See to it that the call is answered from what the caller knows to be committed, by whichever server."""
        text = context.get_middleware("call").headers.get(MIN_VERSION_HEADER)
        if text is not None:
            self._oplog.at_least(_number_in(MIN_VERSION_HEADER, text))

    @_rpc
    def get_flight_info(self, context: Any, descriptor: Any) -> fl.FlightInfo:
        self._catch_up(context)
        if descriptor.descriptor_type == fl.DescriptorType.PATH:
            return _topic_info(self._service.newest(self._caller(context)).topic(_topic_of(descriptor)))
        if descriptor.command[:1] == b"{":
            schema, topic = self._service.plan_read(TopicRead.parse(descriptor.command), self._caller(context))
            return fl.FlightInfo(schema, descriptor, [fl.FlightEndpoint(descriptor.command, [])], topic.entries, -1)
        follow = _follow_of(context.get_middleware("call").headers)
        planned = self._service.flight_info(_command_of(descriptor), self._caller(context), follow)
        # No location: the client comes back over the connection it has, whatever name or port led it here.
        return fl.FlightInfo(planned.schema, descriptor, [fl.FlightEndpoint(planned.ticket, [])], -1, -1)

    @functools.partial(_rpc, classes=_CLASSES | _FROM_GET_SCHEMA)
    def get_schema(self, context: Any, descriptor: Any) -> fl.SchemaResult:
        self._catch_up(context)
        if descriptor.descriptor_type == fl.DescriptorType.PATH:
            return fl.SchemaResult(self._service.newest(self._caller(context)).topic(_topic_of(descriptor)).schema)
        if descriptor.command[:1] == b"{":
            return fl.SchemaResult(self._service.plan_read(TopicRead.parse(descriptor.command), self._caller(context))[0])
        return fl.SchemaResult(self._service.schema(_command_of(descriptor), self._caller(context)))

    @_rpc
    def do_get(self, context: Any, ticket: fl.Ticket) -> fl.GeneratorStream:
        self._catch_up(context)
        caller = self._caller(context)
        if ticket.ticket[:1] == b"{":
            result = self._service.read(TopicRead.parse(ticket.ticket), caller)
        else:
            result = self._service.get(ticket.ticket, caller)
        return fl.GeneratorStream(result.schema, _streamed(result.batches, self._stopping, context.get_middleware("call")))

    @_rpc
    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        raise Unsupported("DoExchange is not served; append with DoPut, read with DoGet")

    @_rpc
    def list_flights(self, context: Any, criteria: bytes) -> Iterator[fl.FlightInfo]:
        self._catch_up(context)
        topics = self._service.newest(self._caller(context)).topics
        return iter([_topic_info(topics[name]) for name in sorted(topics) if not name.startswith("_")])

    @_rpc
    def do_action(self, context: Any, action: fl.Action) -> list[bytes]:
        self._catch_up(context)
        return self._service.action(action.type, action.body.to_pybytes(), self._caller(context))

    @_rpc
    def list_actions(self, context: Any) -> list[tuple[str, str]]:
        return self._service.actions()


_LISTEN = re.compile(r"grpc(\+tls)?://(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):(\d{1,5})")


def check_listen(config: Config) -> tuple[str, int]:
    """Return the host and the port to listen on.

    Raises RequestError for a malformed address, half of what TLS takes, or an address beyond loopback without TLS or credentials
    that nobody has asked for in so many words.
    """
    found = _LISTEN.fullmatch(config.listen)
    if found is None or int(found[3]) > 65535:
        raise RequestError(f"setting listen: {config.listen!r} is not of the form grpc://host:port or grpc+tls://host:port")
    if bool(config.tls_cert) != bool(config.tls_key):
        raise RequestError("settings tls_cert and tls_key go together: a certificate is served with its key")
    if not config.tls_cert and (found[1] or config.client_ca):
        raise RequestError(f"setting {'listen' if found[1] else 'client_ca'}: it takes TLS; set tls_cert and tls_key")
    host = found[2]
    try:
        loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = host == "localhost"
    missing = lacking(config)
    if not loopback and missing and not config.insecure:
        raise RequestError(
            f"{config.listen} is reachable from other machines and there is no {missing}; add --insecure to serve there all the same"
        )
    return host, int(found[3])


def lacking(config: Config) -> str:
    """Return what a server on a network should have and this one has not, in words."""
    has_credentials = config.users or config.jwt_keys or config.client_ca
    return " and no ".join(word for word, is_there in (("authentication", has_credentials), ("TLS", config.tls_cert)) if not is_there)


def check_tls(config: Config) -> dict[str, Any]:
    """Return how to listen with TLS, nothing without it. Raises RequestError that names the file which cannot be used."""
    if not config.tls_cert:
        return {}
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert, config.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise RequestError(f"settings tls_cert {config.tls_cert}, tls_key {config.tls_key}: {error.strerror or error}") from None
    found: dict[str, Any] = {"tls_certificates": [(_pem(config.tls_cert), _pem(config.tls_key))]}
    if config.client_ca:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(config.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise RequestError(f"setting client_ca {config.client_ca}: {error.strerror or error}") from None
        found |= {"verify_client": True, "root_certificates": _pem(config.client_ca)}
    return found


def _pem(file: str) -> bytes:
    with open(file, "rb") as stream:
        return stream.read()


def _command_of(descriptor: Any) -> bytes:
    if descriptor.descriptor_type != fl.DescriptorType.CMD or not descriptor.command:
        raise RequestError("the descriptor is empty: send a path with one topic, or a Flight SQL command")
    command: bytes = descriptor.command
    return command


def _topic_of(descriptor: Any) -> str:
    if descriptor.descriptor_type != fl.DescriptorType.PATH:
        raise RequestError("the descriptor is empty: send a path with one topic")
    if len(descriptor.path) != 1:
        raise RequestError(f"the descriptor's path has {len(descriptor.path)} parts: send one, the topic")
    name = descriptor.path[0].decode(errors="replace")
    if not TOPIC_PATTERN.fullmatch(name):
        raise RequestError(f"topic {name[:200]!r} is not a topic name: a letter, then letters, digits and _, at most 128")
    return name


_Message: TypeAlias = tuple[pa.RecordBatch | None, dict[str, Any]]
_ORIGIN_HEADERS = {"oplog-epoch": "epoch", "oplog-sequence": "sequence", "oplog-expected-offset": "expected_offset"}


def _origin_of(topic: str, call: _Call) -> Origin:
    """Return where a call's appends come from: who makes it, and what its headers say."""
    headers = call.headers
    try:
        numbers = {name: _number_in(header, headers[header]) for header, name in _ORIGIN_HEADERS.items() if header in headers}
    except RequestError as error:
        raise RequestError(f"topic {topic!r}: {error}; nothing was written") from None
    return Origin(headers.get(PRODUCER_HEADER), principal=call.principal.name, **numbers)


def _at(headers: dict[str, str]) -> int | datetime.datetime | None:
    """Return as of when a call asks."""
    if AT_VERSION in headers:
        return _number_in(AT_VERSION, headers[AT_VERSION])
    return moment(headers[AT_TIMESTAMP]) if AT_TIMESTAMP in headers else None


def _number_in(header: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text, re.ASCII):
        raise RequestError(f"header {header} is not a number: {text[:80]!r}")
    return int(text)


def _received(reader: Any, topic: str) -> Iterator[_Message]:
    """Yield the batch and the words of each message; what the wire sends is hostile until proven otherwise."""
    while True:
        try:
            chunk = reader.read_chunk()
        except StopIteration:
            return
        except fl.FlightError as error:
            raise Cancelled(f"topic {topic!r}: the stream broke off; nothing was written") from error
        except (pa.ArrowException, OSError) as error:
            raise RequestError(f"topic {topic!r}: the stream is not valid Arrow data; nothing was written") from error
        yield chunk.data, _words(chunk.app_metadata)


def _words(metadata: pa.Buffer | None) -> dict[str, Any]:
    """Return the JSON object in a message's app_metadata; what is none says nothing to us."""
    if metadata is None or metadata.size > WORDS_BYTES_MAX:
        return {}
    try:
        words = json.loads(metadata.to_pybytes())
    except (ValueError, RecursionError):
        return {}
    return words if isinstance(words, dict) else {}


def _topic_info(topic: Topic) -> fl.FlightInfo:
    ticket = json.dumps({"topic": topic.name}).encode()
    size = sum(file.size for file in topic.files)
    return fl.FlightInfo(topic.schema, fl.FlightDescriptor.for_path(topic.name), [fl.FlightEndpoint(ticket, [])], topic.entries, size)


def _follow_of(headers: dict[str, str]) -> Place | None:
    """Return from where a statement is to be followed, or None when it is to be run once."""
    if headers.get(FOLLOW_HEADER) != "true":
        return None
    text = headers.get(FROM_HEADER, "earliest")
    place: Place = int(text) if re.fullmatch(r"[0-9]{1,19}", text, re.ASCII) else text
    if not is_place(place):
        raise RequestError(f'header {FROM_HEADER} is {text[:80]!r}, not an offset, "earliest" or "latest"')
    return place
