"""What each Flight SQL command does: ROUTES has one row for each. No sockets, no threads, no gRPC.

`flight_info` plans a command and answers with the result's schema and a ticket; `get` redeems a ticket. A query's
ticket names its SQL, the values bound to it and the snapshot it was planned on, so what comes back is what was promised,
whatever was committed in between, and any server of the log can redeem it. A statement that changes something is carried
out by `flight_info` or by `put`, whichever way a client chooses to send it; its ticket only says what came of it.
"""

from __future__ import annotations

import base64
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from flight_oplog import __version__, codec
from flight_oplog.committer import Origin
from flight_oplog.config import Config
from flight_oplog.engine import CATALOG, CHANGED, PUBLIC, Engine, Stopped
from flight_oplog.errors import NotFound, OplogError, RequestError, TooLarge, Unsupported
from flight_oplog.flightsql import metadata, wire
from flight_oplog.flightsql.handles import Sealer
from flight_oplog.follow import Follower, Place, TopicRead, words
from flight_oplog.oplog import OpLog
from flight_oplog.schema import check_topic
from flight_oplog.statements import Statements
from flight_oplog.store import Topic
from flight_oplog.transactions import Transactions

# TableDefinitionOptions of FlightSql.proto
_IF_NOT_EXIST_FAIL = 2
_IF_EXISTS_FAIL, _IF_EXISTS_REPLACE = 1, 3
# EndTransaction of FlightSql.proto
_COMMIT, _ROLLBACK = 1, 2
_TRANSACTION_SUPPORT = 8


@dataclass(frozen=True)
class Caller:
    """Who calls: the names of their session, whether their ingests leave out which transaction they belong to, and where
    what they append comes from."""

    sessions: tuple[str, ...] = ()
    leaves_out: bool = False
    origin: Origin = field(default_factory=Origin)
    stopped: Stopped = lambda: False


@dataclass(frozen=True)
class Put:
    """Where entries that are sent after a command go: to a topic, at once or with a transaction."""

    topic: str
    transaction_id: bytes | None = None


@dataclass(frozen=True)
class Update:
    """A statement to be carried out with what is sent after a command: the values of its parameters, if there are any.

    `perform` returns the protocol's answer.
    """

    takes_parameters: bool
    perform: Callable[[pa.RecordBatch | None], bytes]


@dataclass(frozen=True)
class Planned:
    """The answer to a command: the exact schema of its result, and the ticket that fetches it."""

    schema: pa.Schema
    ticket: bytes


@dataclass(frozen=True)
class Result:
    """A result on its way: batches of exactly `schema`, none over `message_bytes_max`, some with app_metadata."""

    schema: pa.Schema
    batches: Iterator[tuple[pa.RecordBatch, bytes | None]]


# Values bound by clients that then go on with the handle they had, instead of the new one they were given.
BOUND_KEPT = 1000
BOUND_BYTES = 16 << 20


class Service:
    """Flight SQL over one open log. Thread-safe; keeps nothing between calls but what transactions hold, and a little
    for clients that ignore the handles they are given."""

    def __init__(self, oplog: OpLog, engine: Engine, config: Config) -> None:
        self._oplog = oplog
        self._engine = engine
        self.config = config
        self._sealer = Sealer(oplog.secret())
        self._statements = Statements(oplog, engine, config)
        self._bound: OrderedDict[bytes, str] = OrderedDict()
        self._bound_bytes = 0
        self._lock = threading.Lock()
        self._follower = Follower(oplog, engine, config)
        self.transactions = Transactions(oplog, config)

    def flight_info(self, command: bytes, caller: Caller, follow: Place | None = None) -> Planned:
        """Plan the command in a descriptor; with `follow`, a statement to be run over a topic as it grows, from there."""
        message = wire.unpack(command)
        if caller.leaves_out and isinstance(message, wire.CommandGetSqlInfo) and tuple(message.info) == (_TRANSACTION_SUPPORT,):
            self.transactions.introduce(caller.sessions)
        elif caller.leaves_out:
            self.transactions.saw(caller.sessions)
        if follow is not None:
            return self._follow_sql(self._sql_of(message), follow)
        return self._route(message, "flight_info")(self, message, command, caller)

    def schema(self, command: bytes) -> pa.Schema:
        """Return the schema of a command's result; nothing is carried out."""
        message = wire.unpack(command)
        if isinstance(message, wire.CommandStatementQuery):
            return self._engine.prepare(message.query, self._oplog.snapshot()).schema
        if isinstance(message, wire.CommandPreparedStatementQuery):
            return self._engine.prepare(self._prepared(message.prepared_statement_handle)["sql"], self._oplog.snapshot()).schema
        planned: Planned = self._route(message, "flight_info")(self, message, command, Caller())
        return planned.schema

    def get(self, ticket: bytes, stopped: Stopped) -> Result:
        """Fetch what a ticket stands for; see `Engine.run` for `stopped`."""
        message = wire.unpack(ticket)
        return self._route(message, "get")(self, message, stopped)

    def put(self, command: bytes, caller: Caller) -> Put | Update:
        """Return where the entries after the command in a DoPut descriptor go, or what is done with the values there."""
        message = wire.unpack(command)
        found: Put | Update = self._route(message, "put")(self, message, caller)
        return found

    def action(self, kind: str, body: bytes, caller: Caller) -> list[bytes]:
        """Perform one of the protocol's actions and return its results."""
        if kind not in ACTIONS:
            raise Unsupported(f"the action {kind[:100]!r} is not served")
        message = wire.unpack(body)
        if type(message) is not ACTIONS[kind].message:
            raise RequestError(f"the action {kind} takes another message than {type(message).__name__}")
        result: list[bytes] = ACTIONS[kind].perform(self, message, caller)
        return result

    def actions(self) -> list[tuple[str, str]]:
        """Return (type, description) of every action served."""
        return [(name, f"Flight SQL: takes {act.message.__name__}") for name, act in ACTIONS.items()]

    def _route(self, message: Any, way: str) -> Callable[..., Any]:
        route = ROUTES.get(type(message))
        handler = getattr(route, way) if route else None
        if handler is None:
            raise Unsupported(f"{type(message).__name__} is not served here")
        found: Callable[..., Any] = handler
        return found

    # Queries

    def _plan_sql(self, sql: str, caller: Caller, parameters: str | None = None, transaction: str | None = None) -> Planned:
        """Plan a query, or carry out what is none; `parameters` and `transaction` are as handles carry them."""
        snapshot = self._oplog.snapshot()
        statement = self._engine.prepare(sql, snapshot, _loaded(parameters))
        if statement.is_update:
            count = self._execute(sql, caller, _loaded(parameters), None if transaction is None else transaction.encode())
            handle = self._sealer.seal("count", {"count": count}, self.config.ticket_seconds_max)
        else:
            body = {"sql": sql, "table_version": snapshot.table_version, "parameters": parameters}
            handle = self._sealer.seal("statement", body, self.config.ticket_seconds_max)
        return Planned(statement.schema, wire.pack(wire.TicketStatementQuery(handle)))

    def _execute(self, sql: str, caller: Caller, parameters: pa.RecordBatch | None, transaction_id: bytes | None) -> int:
        if transaction_id is not None:
            self.transactions.check(transaction_id)
        hold = None if transaction_id is None else lambda append: self.transactions.hold(transaction_id, append)
        return self._statements.execute(sql, caller.stopped, parameters, origin=caller.origin, hold=hold)

    def _sql_of(self, message: Any) -> str:
        """Return the text of a statement that may be followed."""
        if isinstance(message, wire.CommandStatementQuery):
            return message.query
        if isinstance(message, wire.CommandPreparedStatementQuery):
            sql: str = self._prepared(message.prepared_statement_handle)["sql"]
            return sql
        raise Unsupported(f"{type(message).__name__} cannot be followed: only a SELECT can")

    def _follow_sql(self, sql: str, start: Place) -> Planned:
        statement, topic = self._engine.prepare_run(sql, self._oplog.snapshot())
        body = {"sql": sql, "topic": topic, "from": start}
        handle = self._sealer.seal("follow", body, self.config.ticket_seconds_max)
        return Planned(statement.schema, wire.pack(wire.TicketStatementQuery(handle)))

    def _plan_statement(self, message: wire.CommandStatementQuery, command: bytes, caller: Caller) -> Planned:
        transaction = message.transaction_id.decode("utf-8", "replace") if message.transaction_id else None
        return self._plan_sql(message.query, caller, transaction=transaction)

    def _plan_prepared(self, message: wire.CommandPreparedStatementQuery, command: bytes, caller: Caller) -> Planned:
        handle = message.prepared_statement_handle
        body = self._prepared(handle)
        return self._plan_sql(body["sql"], caller, body.get("parameters") or self._kept(handle), body.get("transaction"))

    def _get_statement(self, message: wire.TicketStatementQuery, stopped: Stopped) -> Result:
        kind = self._sealer.kind(message.statement_handle)
        if kind == "follow":
            body = self._sealer.open("follow", message.statement_handle)
            return self.read(TopicRead(body["topic"], body["from"], follow=True), stopped, body["sql"])
        if kind == "count":
            count = self._sealer.open("count", message.statement_handle)["count"]
            return Result(CHANGED, iter([(pa.RecordBatch.from_pydict({"count": [count]}, CHANGED), None)]))
        body = self._sealer.open("statement", message.statement_handle)
        snapshot = self._oplog.snapshot_at(body["table_version"])
        running = self._engine.run(body["sql"], snapshot, stopped, parameters=_loaded(body.get("parameters")))
        return Result(running.schema, ((batch, None) for batch in running.batches))

    def plan_read(self, request: TopicRead) -> tuple[pa.Schema, Topic]:
        """Return what the batches of a topic's ticket will look like, and the topic."""
        snapshot = self._oplog.snapshot()
        return self._follower.schema(request, snapshot), snapshot.topic(request.topic)

    def read(self, request: TopicRead, stopped: Stopped, sql: str | None = None) -> Result:
        """Read a topic in offset order; each batch says in its app_metadata which offset comes next."""
        schema, runs = self._follower.read(request, stopped, sql)
        return Result(schema, ((run.batch, words(run)) for run in runs))

    def _create_prepared(self, message: wire.ActionCreatePreparedStatementRequest, caller: Caller) -> list[bytes]:
        statement = self._engine.prepare(message.query, self._oplog.snapshot())
        body = {"sql": message.query}
        if message.transaction_id:
            body["transaction"] = message.transaction_id.decode("utf-8", "replace")
        handle = self._sealer.seal("prepared statement", body, self.config.ticket_seconds_max)
        schema, parameters = (s.serialize().to_pybytes() for s in (statement.schema, statement.parameters))
        # JDBC takes a statement with an empty dataset schema for an update, and others look at is_update alone.
        answer = wire.ActionCreatePreparedStatementResult(handle, b"" if statement.is_update else schema, parameters, statement.is_update)
        return [wire.pack(answer)]

    def _close_prepared(self, message: wire.ActionClosePreparedStatementRequest, caller: Caller) -> list[bytes]:
        self._keep(message.prepared_statement_handle, None)
        return []  # the client carries the statement; there is nothing else to free

    def _prepared(self, handle: bytes) -> dict[str, Any]:
        return self._sealer.open("prepared statement", handle)

    def _bind(self, message: wire.CommandPreparedStatementQuery, caller: Caller) -> Update:
        """Values for a query ride in the handle that is given in answer."""
        body = self._prepared(message.prepared_statement_handle)

        def perform(parameters: pa.RecordBatch | None) -> bytes:
            handle = message.prepared_statement_handle
            packed = None if parameters is None else _packed(parameters, self.config)
            self._keep(handle, packed)
            bound = {name: value for name, value in body.items() if name != "parameters"} | ({"parameters": packed} if packed else {})
            renewed = self._sealer.seal("prepared statement", bound, self.config.ticket_seconds_max)
            return wire.encode(wire.DoPutPreparedStatementResult(renewed))

        return Update(True, perform)

    def _keep(self, handle: bytes, packed: str | None) -> None:
        key = hashlib.sha256(handle).digest()
        with self._lock:
            self._bound_bytes -= len(self._bound.pop(key, ""))
            if packed is not None:
                self._bound[key] = packed
                self._bound_bytes += len(packed)
            while len(self._bound) > BOUND_KEPT or self._bound_bytes > BOUND_BYTES:
                self._bound_bytes -= len(self._bound.popitem(last=False)[1])

    def _kept(self, handle: bytes) -> str | None:
        with self._lock:
            return self._bound.get(hashlib.sha256(handle).digest())

    def _update(self, message: wire.CommandStatementUpdate, caller: Caller) -> Update:
        transaction_id = message.transaction_id or None
        return Update(False, lambda parameters: self._changed(message.query, caller, None, transaction_id))

    def _update_prepared(self, message: wire.CommandPreparedStatementUpdate, caller: Caller) -> Update:
        body = self._prepared(message.prepared_statement_handle)
        transaction = body.get("transaction")
        transaction_id = None if transaction is None else transaction.encode()
        return Update(True, lambda parameters: self._changed(body["sql"], caller, parameters, transaction_id))

    def _changed(self, sql: str, caller: Caller, parameters: pa.RecordBatch | None, transaction_id: bytes | None) -> bytes:
        if not self._engine.prepare(sql, self._oplog.snapshot()).is_update:
            raise RequestError("the statement is a query: send it as one")
        return wire.encode(wire.DoPutUpdateResult(self._execute(sql, caller, parameters, transaction_id)))

    # Appends

    def _begin(self, message: wire.ActionBeginTransactionRequest, caller: Caller) -> list[bytes]:
        return [wire.pack(wire.ActionBeginTransactionResult(self.transactions.begin(caller.sessions)))]

    def _end(self, message: wire.ActionEndTransactionRequest, caller: Caller) -> list[bytes]:
        if message.action == _COMMIT:
            self.transactions.commit(message.transaction_id, caller.sessions)
        elif message.action == _ROLLBACK:
            self.transactions.rollback(message.transaction_id, caller.sessions)
        else:
            raise RequestError("EndTransaction says neither commit nor rollback; the transaction is as it was")
        return []

    def _ingest(self, message: wire.CommandStatementIngest, caller: Caller) -> Put:
        name = message.table
        check_topic(name)
        transaction_id = message.transaction_id or (self.transactions.of(caller.sessions) if caller.leaves_out else None)
        if transaction_id is not None:
            self.transactions.check(transaction_id)
        if message.temporary:
            raise Unsupported(f"topic {name!r}: temporary tables are not served; nothing was written")
        if message.catalog not in (None, "", CATALOG) or message.schema not in (None, "", "public"):
            raise RequestError(f"topic {name!r}: entries go to {CATALOG}.public, not to another catalog or schema; nothing was written")
        options = message.table_definition_options or wire.TableDefinitionOptions()
        exists = name in self._oplog.snapshot().topics
        if exists and options.if_exists == _IF_EXISTS_FAIL:
            raise RequestError(f"topic {name!r} exists already; nothing was written; append to it instead")
        if exists and options.if_exists == _IF_EXISTS_REPLACE:
            raise Unsupported(f"topic {name!r}: the log is append-only, a topic is never replaced; nothing was written")
        if not exists and options.if_not_exist == _IF_NOT_EXIST_FAIL:
            raise NotFound(f"topic {name!r} does not exist; nothing was written; create it with the first append")
        return Put(name, transaction_id)

    # Metadata

    def _db_schemas(self, message: wire.CommandGetDbSchemas) -> pa.RecordBatch:
        names = {db_schema for db_schema, _, _ in self._engine.tables(self._oplog.snapshot())}
        return metadata.db_schemas(message, names | {PUBLIC})

    def _tables(self, message: wire.CommandGetTables) -> pa.RecordBatch:
        snapshot = self._oplog.snapshot()

        def schema_of(db_schema: str, name: str) -> pa.Schema:
            try:
                return self._engine.table_schema(snapshot, db_schema, name)
            except OplogError:  # a view of something that is no more: it is listed all the same
                return pa.schema([])

        return metadata.tables(message, self._engine.tables(snapshot), schema_of)


@dataclass(frozen=True)
class Route:
    """How a command is served; None where the protocol has no such use of it."""

    flight_info: Callable[[Service, Any, bytes, Caller], Planned] | None = None
    get: Callable[[Service, Any, Stopped], Result] | None = None
    put: Callable[[Service, Any, Caller], Put | Update] | None = None


@dataclass(frozen=True)
class Act:
    """How an action is served, and the message its body holds."""

    message: type[Any]
    perform: Callable[[Service, Any, Caller], list[bytes]]


def _fixed(answer: Callable[[Service, Any], pa.RecordBatch]) -> Route:
    """Route of a command whose ticket is the command itself and whose result is one small batch."""

    def get(service: Service, message: Any, stopped: Stopped) -> Result:
        batch = answer(service, message)
        pieces = codec.cut(batch, service.config.message_bytes_max, batch.num_rows) if batch.num_rows else iter([batch])
        return Result(batch.schema, ((piece, None) for piece in pieces))

    return Route(lambda service, message, command, caller: Planned(answer(service, message).schema, command), get)


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


ROUTES: dict[type[Any], Route] = {
    wire.CommandStatementQuery: Route(Service._plan_statement),
    wire.TicketStatementQuery: Route(get=Service._get_statement),
    wire.CommandStatementUpdate: Route(put=Service._update),
    wire.CommandPreparedStatementQuery: Route(Service._plan_prepared, put=Service._bind),
    wire.CommandPreparedStatementUpdate: Route(put=Service._update_prepared),
    wire.CommandStatementIngest: Route(put=Service._ingest),
    wire.CommandGetCatalogs: _fixed(lambda service, message: metadata.catalogs()),
    wire.CommandGetDbSchemas: _fixed(Service._db_schemas),
    wire.CommandGetTables: _fixed(Service._tables),
    wire.CommandGetTableTypes: _fixed(lambda service, message: metadata.table_types()),
    wire.CommandGetSqlInfo: _fixed(
        lambda service, message: metadata.sql_info(message, __version__, service.config.transaction_seconds_max)
    ),
}
ACTIONS: dict[str, Act] = {
    "CreatePreparedStatement": Act(wire.ActionCreatePreparedStatementRequest, Service._create_prepared),
    "ClosePreparedStatement": Act(wire.ActionClosePreparedStatementRequest, Service._close_prepared),
    "BeginTransaction": Act(wire.ActionBeginTransactionRequest, Service._begin),
    "EndTransaction": Act(wire.ActionEndTransactionRequest, Service._end),
}
