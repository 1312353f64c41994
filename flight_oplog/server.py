"""The log on a socket: an adapter from pyarrow.flight's calls to `OpLog`, `Engine` and `Service`.

Who calls, and how errors leave, is seen to in `calls.py` before and after each of them.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import json
import logging
import queue
import re
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import fields, replace
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.flight as fl

from flight_oplog import codec
from flight_oplog.appends import Origin, Receipt, check_data
from flight_oplog.auth import Gate
from flight_oplog.calls import CLASSES, FROM_GET_SCHEMA, OPTIONS_COOKIE, Call, Calls, Handshakes, format_nothing_for_the_wire, rpc, streamed
from flight_oplog.config import Config
from flight_oplog.errors import Cancelled, OplogError, RequestError, TooLarge, TryAgain, Unsupported
from flight_oplog.flightsql import wire
from flight_oplog.flightsql.caller import Caller
from flight_oplog.flightsql.service import Service, Update
from flight_oplog.flightsql.sessions import AT_TIMESTAMP, AT_VERSION
from flight_oplog.follow import Place, TopicRead, is_place
from flight_oplog.listening import check_listen, check_tls
from flight_oplog.oplog import AppendWriter, OpLog
from flight_oplog.schema import TOPIC_PATTERN
from flight_oplog.sql.catalog import moment
from flight_oplog.sql.engine import Engine
from flight_oplog.topics import Topic

log = logging.getLogger("flight_oplog.server")

ACKS_HEADER = "oplog-acks"
COMMIT_HEADER = "oplog-commit"
PRODUCER_HEADER = "oplog-producer"
FOLLOW_HEADER = "oplog-follow"
FROM_HEADER = "oplog-from"
MIN_VERSION_HEADER = "oplog-min-version"
WORDS_BYTES_MAX = 1024


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
        traceback.format_exception = format_nothing_for_the_wire  # type: ignore[assignment]
        host, port = check_listen(config)
        calls = Calls(self._gate, config)
        scheme, tls = "grpc+tls" if config.tls_cert else "grpc", check_tls(config)
        try:
            handshakes = Handshakes(calls) if self._gate.takes_bearers else None
            super().__init__(f"{scheme}://{host}:{port}", auth_handler=handshakes, middleware={"call": calls}, **tls)
        except (pa.ArrowException, OSError) as error:
            log.debug("listening on %s: %s", config.listen, error)
            raise RequestError(f"cannot listen on {config.listen}: the address is in use or is not one of this machine's") from None
        self.uri = f"{scheme}://{host}:{self.port}"
        threading.Thread(target=self._warm, name="warm", daemon=True).start()

    def _warm(self) -> None:
        with contextlib.suppress(OplogError):
            self._engine.warm(self._oplog.snapshot())

    def reload(self) -> None:
        """Read grants and users again; when one of them cannot be used it stays as it was, and the log says so."""
        self._gate.reload()

    def drain(self, seconds: float) -> bool:
        """Take no new calls, let those under way finish for up to `seconds`, then stop queries. True when all ended.

        Followers do not finish: they are told at once to come back.
        """
        done = threading.Thread(target=self.shutdown, daemon=True)
        done.start()
        self._service.follower.end()
        done.join(seconds)
        self._stopping.set()
        self._oplog.wake()
        done.join(1)
        self._service.transactions.close()
        return not done.is_alive()

    def _caller(self, context: Any, topic: str = "") -> Caller:
        call: Call = context.get_middleware("call")
        return call.caller(
            context.peer(),
            origin=_origin_of(topic, call),
            stopped=self._stopped(context),
            at=_at(call.headers),
            keep=None if call.keeps_no_cookies else lambda options: context.add_header("set-cookie", f"{OPTIONS_COOKIE}={options}"),
        )

    def _stopped(self, context: Any) -> Callable[[], bool]:
        return lambda: self._stopping.is_set() or context.is_cancelled()

    # Streaming in

    @rpc
    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        is_command = descriptor.descriptor_type == fl.DescriptorType.CMD and bool(descriptor.command)
        named = "" if is_command else _topic_of(descriptor)
        caller = self._caller(context, named)
        put = self._service.put(descriptor.command, caller) if is_command else self._service.put_into(named, caller)
        if isinstance(put, Update):
            writer.write(put.perform(self._parameters(context, reader, put.bytes_max) if put.takes_parameters else None))
            return
        topic = put.topic
        try:
            schema = reader.schema
        except (pa.ArrowException, OSError, StopIteration):
            raise RequestError(f"topic {topic!r}: the stream does not begin with a readable schema; nothing was written") from None
        headers = context.get_middleware("call").headers
        messages = _received(reader, topic)
        first = next(messages, (None, {}))
        if "sequence" in first[1] and not is_command:
            self._append_each(context, caller, topic, schema, itertools.chain([first], messages), writer)
            return
        append = self._oplog.writer(topic, schema, caller.origin, put.role)
        try:
            self._fill(context, append, itertools.chain([first], messages), headers)
            caller.check_again("append", topic)  # it may have taken hours
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

    def _parameters(self, context: Any, reader: Any, bytes_max: int | None) -> pa.RecordBatch | None:
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
                if bytes_max is not None and size > bytes_max:
                    raise TooLarge(f"the values bound to the query are more than parameter_bytes_max ({bytes_max}) bytes")
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

    def _append_each(self, context: Any, caller: Caller, topic: str, schema: pa.Schema, messages: Iterator[_Message], writer: Any) -> None:
        """Take every batch of the stream as an append of its own; receipts go back in their order, while others arrive."""
        acks = _Acks(writer, self._config.appends_in_flight_max)
        try:
            for batch, words in messages:
                if batch is None or not words.keys() <= {"sequence", "expected_offset"} or "sequence" not in words:
                    raise RequestError(f'topic {topic!r}: after a batch with a sequence, each message is a batch with {{"sequence": n}}')
                self._check_open()
                caller.check_again("append", topic)
                append = self._oplog.writer(topic, schema, replace(caller.origin, **words))
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

    @rpc
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

    @functools.partial(rpc, classes=CLASSES | FROM_GET_SCHEMA)
    def get_schema(self, context: Any, descriptor: Any) -> fl.SchemaResult:
        self._catch_up(context)
        if descriptor.descriptor_type == fl.DescriptorType.PATH:
            return fl.SchemaResult(self._service.newest(self._caller(context)).topic(_topic_of(descriptor)).schema)
        if descriptor.command[:1] == b"{":
            return fl.SchemaResult(self._service.plan_read(TopicRead.parse(descriptor.command), self._caller(context))[0])
        return fl.SchemaResult(self._service.schema(_command_of(descriptor), self._caller(context)))

    @rpc
    def do_get(self, context: Any, ticket: fl.Ticket) -> fl.FlightDataStream:
        self._catch_up(context)
        caller = self._caller(context)
        if ticket.ticket[:1] == b"{":
            result = self._service.read(TopicRead.parse(ticket.ticket), caller)
        else:
            result = self._service.get(ticket.ticket, caller)
        if result.whole is not None:
            return fl.RecordBatchStream(result.whole)
        return fl.GeneratorStream(result.schema, streamed(result.batches, self._stopping, context.get_middleware("call")))

    @rpc
    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        raise Unsupported("DoExchange is not served; append with DoPut, read with DoGet")

    @rpc
    def list_flights(self, context: Any, criteria: bytes) -> Iterator[fl.FlightInfo]:
        self._catch_up(context)
        topics = self._service.newest(self._caller(context)).topics
        return iter([_topic_info(topics[name]) for name in sorted(topics) if not name.startswith("_")])

    @rpc
    def do_action(self, context: Any, action: fl.Action) -> list[bytes]:
        self._catch_up(context)
        return self._service.action(action.type, action.body.to_pybytes(), self._caller(context))

    @rpc
    def list_actions(self, context: Any) -> list[tuple[str, str]]:
        return self._service.actions()


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


def _origin_of(topic: str, call: Call) -> Origin:
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
