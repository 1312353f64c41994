"""What each Flight SQL command does: ROUTES has one row for each. No sockets, no threads, no gRPC.

`flight_info` plans a command and answers with the result's schema and a ticket; `get` redeems a ticket. A query's
ticket names its SQL, the values bound to it and the snapshot it was planned on, so what comes back is what was promised,
whatever was committed in between, and any server of the log can redeem it. A statement that changes something is carried
out by `flight_info` or by `put`, whichever way a client chooses to send it; its ticket only says what came of it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from flight_oplog import __version__, codec
from flight_oplog.appends import Role
from flight_oplog.auth import Gate, derived
from flight_oplog.config import Config
from flight_oplog.errors import NotFound, OplogError, RequestError, TooLarge, TryAgain, Unsupported
from flight_oplog.flightsql import metadata, wire
from flight_oplog.flightsql.answers import IN_HAND_BYTES, Answers, Planned, Result
from flight_oplog.flightsql.caller import Caller
from flight_oplog.flightsql.cancelling import UnderWay
from flight_oplog.flightsql.handles import Sealer
from flight_oplog.flightsql.sessions import AT_TIMESTAMP, AT_VERSION, Sessions
from flight_oplog.follow import Follower, Place, TopicRead, words
from flight_oplog.oplog import OpLog
from flight_oplog.schema import check_topic, schema_id
from flight_oplog.sql.catalog import moment
from flight_oplog.sql.engine import CHANGED, Engine, Statement
from flight_oplog.sql.refusals import CATALOG, PUBLIC
from flight_oplog.sql.statements import Statements
from flight_oplog.sql.turns import Held, Turns
from flight_oplog.store import Snapshot
from flight_oplog.topics import Topic
from flight_oplog.transactions import Transactions

# TableDefinitionOptions of FlightSql.proto
_IF_NOT_EXIST_FAIL = 2
_IF_EXISTS_FAIL, _IF_EXISTS_REPLACE = 1, 3
_ROLES = {_IF_EXISTS_FAIL: Role.BEGINS, _IF_EXISTS_REPLACE: Role.REPLACES}
# EndTransaction of FlightSql.proto
_COMMIT, _ROLLBACK = 1, 2
_TRANSACTION_SUPPORT = 8


@dataclass(frozen=True)
class Put:
    """Where entries that are sent after a command go: to a topic, at once or with a transaction."""

    topic: str
    transaction_id: bytes | None = None
    role: Role = Role.APPENDS


@dataclass(frozen=True)
class Update:
    """A statement to be carried out with what is sent after a command: the values of its parameters, if there are any.

    `perform` returns the protocol's answer. `bytes_max` is how much the values may be, None for as much as a batch.
    """

    takes_parameters: bool
    perform: Callable[[pa.RecordBatch | None], bytes]
    bytes_max: int | None = None


# FlightInfo.CancelStatus
_CANCELLED, _CANCELLING, _NOT_CANCELLABLE = 1, 2, 3
# Values bound by clients that then go on with the handle they had, instead of the new one they were given.
BOUND_KEPT = 1000
BOUND_BYTES = 16 << 20


class Service:
    """Flight SQL over one open log. Thread-safe; keeps nothing between calls but what transactions hold, and a little
    for clients that ignore the handles they are given."""

    def __init__(self, oplog: OpLog, engine: Engine, config: Config, gate: Gate) -> None:
        self._oplog = oplog
        self._engine = engine
        self.config = config
        self._sealer = Sealer(derived(gate.secret, "handles"))
        self._statements = Statements(oplog, engine, config)
        self._bound: OrderedDict[bytes, str] = OrderedDict()
        self._bound_bytes = 0
        self._lock = threading.Lock()
        self._sessions = Sessions(self._sealer)
        self._answers = Answers(config.ticket_seconds_max)
        self._under_way = UnderWay()
        self._turns = Turns(config.statements_max, config.statements_waiting_max, config.statement_wait_seconds_max)
        self.follower = Follower(oplog, engine, config)
        self.transactions = Transactions(oplog, config)

    def flight_info(self, command: bytes, caller: Caller, follow: Place | None = None) -> Planned:
        """Plan the command in a descriptor; with `follow`, a statement to be run over a topic as it grows, from there."""
        if follow is None and (again := self._again(command, caller)) is not None:
            return again
        message = wire.unpack(command)
        if caller.leaves_out and isinstance(message, wire.CommandGetSqlInfo) and tuple(message.info) == (_TRANSACTION_SUPPORT,):
            self.transactions.introduce(caller.sessions, caller.name)
        elif caller.leaves_out:
            self.transactions.saw(caller.sessions, caller.name)
        if follow is not None:
            return self._follow_sql(self._sql_of(message, caller), follow, caller)
        planned: Planned = self._route(message, "flight_info")(self, message, command, caller)
        if planned.at_once is not None:
            self._answers.keep(command, caller, planned)
        return planned

    def _again(self, command: bytes, caller: Caller) -> Planned | None:
        """Return what a command was answered with, where that is in hand; its session has no options, nor handles values since."""
        planned = self._answers.planned(command, caller, self._oplog.snapshot)
        if planned is None or self._bound or self._sessions.options(caller):
            return None
        if caller.leaves_out:
            self.transactions.saw(caller.sessions, caller.name)
        return planned

    def schema(self, command: bytes, caller: Caller) -> pa.Schema:
        """Return the schema of a command's result; nothing is carried out."""
        message = wire.unpack(command)
        if isinstance(message, wire.CommandStatementQuery):
            return self._prepare(message.query, caller).schema
        if isinstance(message, wire.CommandPreparedStatementQuery):
            body = self._prepared(message.prepared_statement_handle, caller)
            return self._prepare(body["sql"], caller, self._values(message.prepared_statement_handle, body, caller)).schema
        planned: Planned = self._route(message, "flight_info")(self, message, command, caller)
        return planned.schema

    def get(self, ticket: bytes, caller: Caller) -> Result:
        """Fetch what a ticket stands for; see `Engine.run` for the caller's `stopped`."""
        if (in_hand := self._answers.result(ticket, caller)) is not None:
            return in_hand
        message = wire.unpack(ticket)
        found: Result = self._route(message, "get")(self, message, caller)
        return found

    def put(self, command: bytes, caller: Caller) -> Put | Update:
        """Return where the entries after the command in a DoPut descriptor go, or what is done with the values there."""
        message = wire.unpack(command)
        found: Put | Update = self._route(message, "put")(self, message, caller)
        return found

    def action(self, kind: str, body: bytes, caller: Caller) -> list[bytes]:
        """Perform one of the protocol's actions and return its results."""
        if kind not in ACTIONS:
            raise Unsupported(f"the action {kind[:100]!r} is not served")
        act = ACTIONS[kind]
        message = wire.unpack(body) if act.is_sql else wire.decode(body, act.message)
        if type(message) is not act.message:
            raise RequestError(f"the action {kind} takes another message than {type(message).__name__}")
        result: list[bytes] = act.perform(self, message, caller)
        return result

    def actions(self) -> list[tuple[str, str]]:
        """Return (type, description) of every action served."""
        served = ((name, act) for name, act in ACTIONS.items() if act.refused is None)
        return [(name, f"{'Flight SQL' if act.is_sql else 'Flight'}: takes {act.message.__name__}") for name, act in served]

    def _route(self, message: Any, way: str) -> Callable[..., Any]:
        route = ROUTES.get(type(message))
        handler = getattr(route, way) if route else None
        if handler is None:
            raise Unsupported((route and route.refused) or f"{type(message).__name__} is not served here")
        found: Callable[..., Any] = handler
        return found

    # Queries

    def _prepare(self, sql: str, caller: Caller, parameters: str | None = None, options: dict[str, str] | None = None) -> Statement:
        options = self._sessions.options(caller) if options is None else options
        found = self._engine.prepare(sql, self._snapshot(caller, options), _loaded(parameters), options.get("schema", PUBLIC))
        return replace(found, schema=metadata.described_result(found.schema))

    def _snapshot(self, caller: Caller, options: dict[str, str]) -> Snapshot:
        """Return the snapshot that a caller's statements see: as of when its headers say, or its session's options."""
        at = caller.at
        if at is None and AT_VERSION in options:
            at = int(options[AT_VERSION])
        if at is None and AT_TIMESTAMP in options:
            at = moment(options[AT_TIMESTAMP])
        if at is None:
            return self.newest(caller)
        found = self._oplog.snapshot_at(at) if isinstance(at, int) else self._oplog.snapshot_as_of(at)
        return found.seen_by(caller.principal)

    def newest(self, caller: Caller) -> Snapshot:
        """Return the log as of now, as a caller may see it."""
        return self._oplog.snapshot().seen_by(caller.principal)

    def _plan_sql(self, sql: str, caller: Caller, parameters: str | None = None, transaction: str | None = None) -> Planned:
        """Plan a query, or carry out what is none; `parameters` and `transaction` are as handles carry them."""
        options, at_once = self._sessions.options(caller), None
        statement = self._prepare(sql, caller, parameters, options)
        if statement.is_update:
            count = self._execute(sql, caller, _loaded(parameters), None if transaction is None else transaction.encode())
            handle = self._sealer.seal("count", {"count": count}, caller.name, self.config.ticket_seconds_max)
        else:
            if statement.parameters and parameters is None:
                raise RequestError("the statement has parameters and none is bound")
            body = {"sql": sql, "table_version": statement.snapshot.table_version}
            if parameters is not None:
                body["parameters"] = parameters
            if (db_schema := options.get("schema", PUBLIC)) != PUBLIC:
                body["schema"] = db_schema
            handle = self._sealer.seal("statement", body, caller.name, self.config.ticket_seconds_max)
            if parameters is None and transaction is None and caller.at is None and not options:
                at_once = self._engine.at_once(sql, statement.snapshot, IN_HAND_BYTES)
        ticket = wire.pack(wire.TicketStatementQuery(handle))
        return Planned(statement.schema, ticket, caller.principal, statement.snapshot.table_version, at_once)

    def _execute(self, sql: str, caller: Caller, parameters: pa.RecordBatch | None, transaction_id: bytes | None) -> int:
        if transaction_id is not None:
            self.transactions.check(transaction_id, caller.name)
        hold = None if transaction_id is None else lambda append: self.transactions.hold(transaction_id, append, caller.name)
        options = self._sessions.options(caller)
        if caller.at is not None or options.keys() & {AT_VERSION, AT_TIMESTAMP}:
            raise RequestError("the past is not changed: leave out oplog-at-version and oplog-at-timestamp; nothing was written")
        with self._turns.turn(caller.stopped, caller.name):
            return self._statements.execute(sql, caller.stopped, parameters, caller.origin, hold, caller.principal)

    def _sql_of(self, message: Any, caller: Caller) -> str:
        """Return the text of a statement that may be followed."""
        if isinstance(message, wire.CommandStatementQuery):
            return message.query
        if isinstance(message, wire.CommandPreparedStatementQuery):
            sql: str = self._prepared(message.prepared_statement_handle, caller)["sql"]
            return sql
        raise Unsupported(f"{type(message).__name__} cannot be followed: only a SELECT can")

    def _follow_sql(self, sql: str, start: Place, caller: Caller) -> Planned:
        statement, topic = self._engine.prepare_run(sql, self.newest(caller))
        body = {"sql": sql, "topic": topic, "from": start, "schema_id": schema_id(statement.schema)}
        handle = self._sealer.seal("follow", body, caller.name, self.config.ticket_seconds_max)
        return Planned(statement.schema, wire.pack(wire.TicketStatementQuery(handle)))

    def _plan_statement(self, message: wire.CommandStatementQuery, command: bytes, caller: Caller) -> Planned:
        transaction = message.transaction_id.decode("utf-8", "replace") if message.transaction_id else None
        return self._plan_sql(message.query, caller, transaction=transaction)

    def _plan_prepared(self, message: wire.CommandPreparedStatementQuery, command: bytes, caller: Caller) -> Planned:
        handle = message.prepared_statement_handle
        body = self._prepared(handle, caller)
        return self._plan_sql(body["sql"], caller, self._values(handle, body, caller), body.get("transaction"))

    def _get_statement(self, message: wire.TicketStatementQuery, caller: Caller) -> Result:
        kind, body = self._sealer.open_any(message.statement_handle, caller.name)
        if kind == "follow":
            followed = self.read(TopicRead(body["topic"], body["from"], follow=True), caller, body["sql"])
            if schema_id(followed.schema) != body["schema_id"]:
                raise TryAgain(f"topic {body['topic']!r}: its schema has changed since the statement was planned; plan it again")
            return followed
        if kind == "count":
            return Result(CHANGED, iter([(pa.RecordBatch.from_pydict({"count": [body["count"]]}, CHANGED), None)]))
        if kind != "statement":
            raise RequestError("the handle is not a statement handle; ask for a new one")
        snapshot = self._oplog.snapshot_at(body["table_version"]).seen_by(caller.principal)
        stopped = caller.stopped
        held = contextlib.ExitStack()
        try:
            cancelled = held.enter_context(self._under_way.run(body["id"]))
            turn = held.enter_context(self._turns.turn(lambda: stopped() or cancelled.is_set(), caller.name))
            values, db_schema = _loaded(body.get("parameters")), body.get("schema", PUBLIC)
            running = self._engine.run(
                body["sql"], snapshot, lambda: stopped() or cancelled.is_set(), parameters=values, db_schema=db_schema
            )
        except BaseException:
            held.close()
            raise
        return Result(metadata.described_result(running.schema), Held(running.batches, held, turn))

    # Cancelling

    def _cancel(self, tickets: Sequence[bytes], caller: Caller) -> int:
        """Stop what the tickets stand for; return a CancelStatus. One that has not begun here will not begin."""
        names = []
        for ticket in tickets:
            message = wire.unpack(ticket)
            if not isinstance(message, wire.TicketStatementQuery) or self._answers.has(ticket):
                return _NOT_CANCELLABLE
            kind, body = self._sealer.open_any(message.statement_handle, caller.name)
            if kind != "statement":
                return _NOT_CANCELLABLE
            names.append(body["id"])
        was_running, is_unknown = self._under_way.cancel(names)
        if was_running:
            return _CANCELLED
        return _CANCELLING if is_unknown else _NOT_CANCELLABLE

    def _cancel_info(self, message: wire.CancelFlightInfoRequest, caller: Caller) -> list[bytes]:
        return [wire.encode(wire.CancelFlightInfoResult(self._cancel(_tickets(message.info), caller)))]

    def _cancel_query(self, message: wire.ActionCancelQueryRequest, caller: Caller) -> list[bytes]:
        status = self._cancel(_tickets(wire.decode(message.info, wire.FlightInfo)), caller)
        return [wire.pack(wire.ActionCancelQueryResult(status))]

    def _renew(self, message: wire.RenewFlightEndpointRequest, caller: Caller) -> list[bytes]:
        """Answer with the endpoint and a ticket for the same statement that lasts as long as a new one."""
        endpoint = message.endpoint or wire.FlightEndpoint()
        ticket = wire.unpack(endpoint.ticket.ticket if endpoint.ticket else b"")
        if not isinstance(ticket, wire.TicketStatementQuery):
            return [wire.encode(endpoint)]  # a command is its own ticket, and lasts
        kind, body = self._sealer.open_any(ticket.statement_handle, caller.name)
        seconds = self.config.ticket_seconds_max
        renewed = wire.pack(wire.TicketStatementQuery(self._sealer.seal(kind, body, caller.name, seconds)))
        until = wire.Timestamp(int(time.time() + seconds), 0)
        return [wire.encode(replace(endpoint, ticket=wire.Ticket(renewed), expiration_time=until))]

    # Topics

    def plan_read(self, request: TopicRead, caller: Caller) -> tuple[pa.Schema, Topic]:
        """Return what the batches of a topic's ticket will look like, and the topic."""
        snapshot = self.newest(caller)
        return self.follower.schema(request, snapshot), snapshot.topic(request.topic)

    def read(self, request: TopicRead, caller: Caller, sql: str | None = None) -> Result:
        """Read a topic in offset order; each batch says in its app_metadata which offset comes next.

        Whoever follows it for long sees it for as long as they have the right to.
        """
        schema, runs = self.follower.read(request, caller.stopped, sql, lambda snapshot: snapshot.seen_by(caller.again()))
        return Result(schema, ((run.batch, words(run)) for run in runs))

    def _create_prepared(self, message: wire.ActionCreatePreparedStatementRequest, caller: Caller) -> list[bytes]:
        statement = self._prepare(message.query, caller)
        body = {"sql": message.query}
        if message.transaction_id:
            body["transaction"] = message.transaction_id.decode("utf-8", "replace")
        handle = self._sealer.seal("prepared statement", body, caller.name, self.config.ticket_seconds_max)
        schema, parameters = (s.serialize().to_pybytes() for s in (statement.schema, _as_asked_for(statement.parameters)))
        # JDBC takes a statement with an empty dataset schema for an update, and others look at is_update alone.
        answer = wire.ActionCreatePreparedStatementResult(handle, b"" if statement.is_update else schema, parameters, statement.is_update)
        return [wire.pack(answer)]

    def _close_prepared(self, message: wire.ActionClosePreparedStatementRequest, caller: Caller) -> list[bytes]:
        self._keep(message.prepared_statement_handle, None, caller)
        return []  # the client carries the statement; there is nothing else to free

    def _prepared(self, handle: bytes, caller: Caller) -> dict[str, Any]:
        return self._sealer.open("prepared statement", handle, caller.name)

    def _bind(self, message: wire.CommandPreparedStatementQuery, caller: Caller) -> Update:
        """Values for a query ride in the handle that is given in answer."""
        body = self._prepared(message.prepared_statement_handle, caller)

        def perform(parameters: pa.RecordBatch | None) -> bytes:
            handle = message.prepared_statement_handle
            packed = None if parameters is None else _packed(parameters, self.config)
            self._keep(handle, packed, caller)
            bound = {name: value for name, value in body.items() if name != "parameters"} | ({"parameters": packed} if packed else {})
            renewed = self._sealer.seal("prepared statement", bound, caller.name, self.config.ticket_seconds_max)
            return wire.encode(wire.DoPutPreparedStatementResult(renewed))

        return Update(True, perform, self.config.parameter_bytes_max)

    def _keep(self, handle: bytes, packed: str | None, caller: Caller) -> None:
        key = _key_of(handle, caller)
        with self._lock:
            self._bound_bytes -= len(self._bound.pop(key, ""))
            if packed is not None:
                self._bound[key] = packed
                self._bound_bytes += len(packed)
            while len(self._bound) > BOUND_KEPT or self._bound_bytes > BOUND_BYTES:
                self._bound_bytes -= len(self._bound.popitem(last=False)[1])

    def _values(self, handle: bytes, body: dict[str, Any], caller: Caller) -> str | None:
        """Return what is bound to a prepared statement: what came last for this handle, or what rides in it."""
        if not self._bound:
            return body.get("parameters")
        with self._lock:
            return self._bound.get(_key_of(handle, caller)) or body.get("parameters")

    def _update(self, message: wire.CommandStatementUpdate, caller: Caller) -> Update:
        transaction_id = message.transaction_id or None
        return Update(False, lambda parameters: self._changed(message.query, caller, None, transaction_id))

    def _update_prepared(self, message: wire.CommandPreparedStatementUpdate, caller: Caller) -> Update:
        handle = message.prepared_statement_handle
        body = self._prepared(handle, caller)
        transaction = body.get("transaction")
        transaction_id = None if transaction is None else transaction.encode()

        def perform(parameters: pa.RecordBatch | None) -> bytes:
            """Values come with the command, or were bound before it, as for a query."""
            bound = parameters if parameters is not None else _loaded(self._values(handle, body, caller))
            return self._changed(body["sql"], caller, bound, transaction_id)

        return Update(True, perform)

    def _changed(self, sql: str, caller: Caller, parameters: pa.RecordBatch | None, transaction_id: bytes | None) -> bytes:
        if not self._prepare(sql, caller).is_update:
            raise RequestError("the statement is a query: send it as one")
        return wire.encode(wire.DoPutUpdateResult(self._execute(sql, caller, parameters, transaction_id)))

    # Appends

    def put_into(self, name: str, caller: Caller) -> Put:
        """Return where entries for a topic go. Raises Forbidden or RequestError where the caller may not append to it, or begin it."""
        caller.check("append", name)
        if not self._oplog.knows(name):  # else it is no view's name, and the log need not be looked at
            snapshot = self._oplog.snapshot()
            if name not in snapshot.topics and name in self._engine.views(snapshot):
                raise RequestError(f"{name!r} is a view; nothing was written; choose another name or drop it first")
        return Put(name)

    def _begin(self, message: wire.ActionBeginTransactionRequest, caller: Caller) -> list[bytes]:
        return [wire.pack(wire.ActionBeginTransactionResult(self.transactions.begin(caller.sessions, caller.name)))]

    def _end(self, message: wire.ActionEndTransactionRequest, caller: Caller) -> list[bytes]:
        if message.action == _COMMIT:
            for topic in self.transactions.topics(message.transaction_id, caller.name):
                caller.check_again("append", topic)
            self.transactions.commit(message.transaction_id, caller.sessions, caller.name)
        elif message.action == _ROLLBACK:
            self.transactions.rollback(message.transaction_id, caller.sessions, caller.name)
        else:
            raise RequestError("EndTransaction says neither commit nor rollback; the transaction is as it was")
        return []

    def _ingest(self, message: wire.CommandStatementIngest, caller: Caller) -> Put:
        name = message.table
        check_topic(name)
        put = self.put_into(name, caller)
        transaction_id = message.transaction_id or (self.transactions.of(caller.sessions, caller.name) if caller.leaves_out else None)
        if transaction_id is not None:
            self.transactions.check(transaction_id, caller.name)
        if message.temporary:
            raise Unsupported(f"topic {name!r}: temporary tables are not served; nothing was written")
        if message.catalog not in (None, "", CATALOG) or message.schema not in (None, "", "public"):
            raise RequestError(f"topic {name!r}: entries go to {CATALOG}.public, not to another catalog or schema; nothing was written")
        options = message.table_definition_options or wire.TableDefinitionOptions()
        if options.if_exists == _IF_EXISTS_REPLACE:
            caller.check("admin", name)
        snapshot = self._oplog.snapshot()
        exists = name in snapshot.topics
        creates = options.if_exists == _IF_EXISTS_FAIL
        if exists and creates and caller.origin.producer is None:  # else it may have created it itself
            raise RequestError(f"topic {name!r} exists already; nothing was written; append to it instead")
        if not exists and options.if_not_exist == _IF_NOT_EXIST_FAIL:
            raise NotFound(f"topic {name!r} does not exist; nothing was written; create it with the first append")
        return replace(put, transaction_id=transaction_id, role=_ROLES.get(options.if_exists, Role.APPENDS))

    # Metadata

    def _db_schemas(self, message: wire.CommandGetDbSchemas, caller: Caller) -> pa.RecordBatch:
        names = {db_schema for db_schema, _, _ in self._engine.tables(self.newest(caller))}
        return metadata.db_schemas(message, names | {PUBLIC})

    def _tables(self, message: wire.CommandGetTables, caller: Caller) -> pa.RecordBatch:
        snapshot = self.newest(caller)

        def schema_of(db_schema: str, name: str) -> pa.Schema:
            try:
                return self._engine.table_schema(snapshot, db_schema, name)
            except OplogError:  # a view of something that is no more: it is listed all the same
                return pa.schema([])

        return metadata.tables(message, self._engine.tables(snapshot), schema_of)

    def _sql_info(self, message: wire.CommandGetSqlInfo, caller: Caller) -> pa.RecordBatch:
        config = self.config
        return metadata.sql_info(
            message,
            __version__,
            config.transaction_seconds_max,
            ticket_seconds=config.ticket_seconds_max,
            sql_bytes=config.sql_bytes_max,
            sql_tables=config.sql_tables_max,
            columns=config.columns_max,
        )


@dataclass(frozen=True)
class Route:
    """How a command is served; None where the protocol has no such use of it."""

    flight_info: Callable[[Service, Any, bytes, Caller], Planned] | None = None
    get: Callable[[Service, Any, Caller], Result] | None = None
    put: Callable[[Service, Any, Caller], Put | Update] | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Act:
    """How an action is served, and the message its body holds: in an Any where it is Flight SQL's, as it is where it is Flight's."""

    message: type[Any]
    perform: Callable[[Service, Any, Caller], list[bytes]]
    is_sql: bool = True
    refused: str | None = None


def _refusing(message: type[Any], sentence: str) -> Act:
    def refuse(service: Service, message: Any, caller: Caller) -> list[bytes]:
        raise Unsupported(sentence)

    return Act(message, refuse, refused=sentence)


def _key_of(handle: bytes, caller: Caller) -> bytes:
    """Return what values bound to a handle are kept under: nobody else's reach them."""
    return hashlib.sha256(repr(caller.name).encode() + handle).digest()


def _tickets(info: wire.FlightInfo | None) -> list[bytes]:
    found = [endpoint.ticket.ticket for endpoint in (info.endpoint if info else ()) if endpoint.ticket]
    if not found:
        raise RequestError("the FlightInfo to cancel has no ticket")
    return found


def _fixed(answer: Callable[[Service, Any, Caller], pa.RecordBatch]) -> Route:
    """Route of a command whose ticket is the command itself and whose result is one small batch."""

    def get(service: Service, message: Any, caller: Caller) -> Result:
        batch = answer(service, message, caller)
        pieces = codec.cut(batch, service.config.message_bytes_max, batch.num_rows) if batch.num_rows else iter([batch])
        return Result(batch.schema, ((piece, None) for piece in pieces))

    return Route(lambda service, message, command, caller: Planned(answer(service, message, caller).schema, command), get)


def _as_asked_for(parameters: pa.Schema) -> pa.Schema:
    """Return the parameters in the types that clients are asked to send them in; they are cast where the statement wants another.

    JDBC writes milliseconds into whatever unit it is asked for, knows no float16, and can bind nothing to a type of null.
    """

    def kind(wanted: pa.DataType) -> pa.DataType:
        if pa.types.is_timestamp(wanted):
            return pa.timestamp("ms", wanted.tz)
        if pa.types.is_time(wanted):
            return pa.time32("ms")
        if wanted == pa.float16():
            return pa.float32()
        return pa.string() if pa.types.is_null(wanted) else wanted

    return pa.schema([pa.field(field.name, kind(field.type)) for field in parameters])


def _packed(parameters: pa.RecordBatch, config: Config) -> str:
    """Return bound values as text that a handle can carry."""
    if parameters.num_rows > config.parameter_rows_max:
        raise TooLarge(f"{parameters.num_rows} rows of values are bound to a query; parameter_rows_max is {config.parameter_rows_max}")
    if codec.expanded_nbytes_of(parameters) > config.parameter_bytes_max:
        raise TooLarge(f"the values bound to the query are more than parameter_bytes_max ({config.parameter_bytes_max}) bytes")
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, parameters.schema) as writer:
        writer.write_batch(parameters)
    return base64.b64encode(sink.getvalue()).decode()


def _loaded(packed: str | None) -> pa.RecordBatch | None:
    if packed is None:
        return None
    found: pa.RecordBatch = next(iter(pa.ipc.open_stream(base64.b64decode(packed))))
    return found


_NO_SUBSTRAIT = "Substrait plans are not served: send it as SQL"
_NO_SAVEPOINTS = "savepoints are not served: a transaction is committed or rolled back as a whole"
ROUTES: dict[type[Any], Route] = {
    wire.CommandStatementQuery: Route(Service._plan_statement),
    wire.TicketStatementQuery: Route(get=Service._get_statement),
    wire.CommandStatementUpdate: Route(put=Service._update),
    wire.CommandPreparedStatementQuery: Route(Service._plan_prepared, put=Service._bind),
    wire.CommandPreparedStatementUpdate: Route(put=Service._update_prepared),
    wire.CommandStatementIngest: Route(put=Service._ingest),
    wire.CommandStatementSubstraitPlan: Route(refused=_NO_SUBSTRAIT),
    wire.CommandGetCatalogs: _fixed(lambda service, message, caller: metadata.catalogs()),
    wire.CommandGetDbSchemas: _fixed(Service._db_schemas),
    wire.CommandGetTables: _fixed(Service._tables),
    wire.CommandGetTableTypes: _fixed(lambda service, message, caller: metadata.table_types()),
    wire.CommandGetPrimaryKeys: _fixed(lambda service, message, caller: metadata.primary_keys()),
    wire.CommandGetImportedKeys: _fixed(lambda service, message, caller: metadata.foreign_keys()),
    wire.CommandGetExportedKeys: _fixed(lambda service, message, caller: metadata.foreign_keys()),
    wire.CommandGetCrossReference: _fixed(lambda service, message, caller: metadata.foreign_keys()),
    wire.CommandGetXdbcTypeInfo: _fixed(lambda service, message, caller: metadata.xdbc_type_info(message)),
    wire.CommandGetSqlInfo: _fixed(Service._sql_info),
}
ACTIONS: dict[str, Act] = {
    "CreatePreparedStatement": Act(wire.ActionCreatePreparedStatementRequest, Service._create_prepared),
    "ClosePreparedStatement": Act(wire.ActionClosePreparedStatementRequest, Service._close_prepared),
    "BeginTransaction": Act(wire.ActionBeginTransactionRequest, Service._begin),
    "EndTransaction": Act(wire.ActionEndTransactionRequest, Service._end),
    "BeginSavepoint": _refusing(wire.ActionBeginSavepointRequest, _NO_SAVEPOINTS),
    "EndSavepoint": _refusing(wire.ActionEndSavepointRequest, _NO_SAVEPOINTS),
    "CreatePreparedSubstraitPlan": _refusing(wire.ActionCreatePreparedSubstraitPlanRequest, _NO_SUBSTRAIT),
    "CancelQuery": Act(wire.ActionCancelQueryRequest, Service._cancel_query),
    "CancelFlightInfo": Act(wire.CancelFlightInfoRequest, Service._cancel_info, is_sql=False),
    "RenewFlightEndpoint": Act(wire.RenewFlightEndpointRequest, Service._renew, is_sql=False),
    "SetSessionOptions": Act(wire.SetSessionOptionsRequest, lambda service, *call: service._sessions.set(*call), is_sql=False),
    "GetSessionOptions": Act(wire.GetSessionOptionsRequest, lambda service, *call: service._sessions.get(*call), is_sql=False),
    "CloseSession": Act(wire.CloseSessionRequest, lambda service, *call: service._sessions.close(*call), is_sql=False),
}
