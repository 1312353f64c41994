"""What each Flight SQL command does: ROUTES has one row for each. No sockets, no threads, no gRPC.

`flight_info` plans a command and answers with the result's schema and a ticket; `get` redeems a ticket. A query's
ticket names its SQL and the snapshot it was planned on, so what comes back is what was promised, whatever was
committed in between.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from flight_oplog import __version__, codec
from flight_oplog.config import Config
from flight_oplog.engine import CATALOG, Engine, Stopped, table_schema, tables
from flight_oplog.errors import NotFound, RequestError, Unsupported
from flight_oplog.flightsql import metadata, wire
from flight_oplog.flightsql.handles import Sealer
from flight_oplog.follow import Follower, Place, TopicRead, words
from flight_oplog.oplog import OpLog
from flight_oplog.schema import check_topic
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
    """Who calls: the names of their session, and whether their ingests leave out which transaction they belong to."""

    sessions: tuple[str, ...] = ()
    leaves_out: bool = False


@dataclass(frozen=True)
class Put:
    """Where entries that are sent after a command go: to a topic, at once or with a transaction."""

    topic: str
    transaction_id: bytes | None = None


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


class Service:
    """Flight SQL over one open log. Thread-safe; keeps nothing between calls but what transactions hold."""

    def __init__(self, oplog: OpLog, engine: Engine, config: Config) -> None:
        self._oplog = oplog
        self._engine = engine
        self.config = config
        self._sealer = Sealer(secrets.token_bytes(32))
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
        return self._route(message, "flight_info")(self, message, command)

    def get(self, ticket: bytes, stopped: Stopped) -> Result:
        """Fetch what a ticket stands for; see `Engine.run` for `stopped`."""
        message = wire.unpack(ticket)
        return self._route(message, "get")(self, message, stopped)

    def put(self, command: bytes, caller: Caller) -> Put:
        """Return where the entries after the command in a DoPut descriptor go."""
        message = wire.unpack(command)
        found: Put = self._route(message, "put")(self, message, caller)
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

    def _plan_sql(self, sql: str) -> Planned:
        statement = self._engine.prepare(sql, self._oplog.snapshot())
        body = {"sql": sql, "table_version": statement.snapshot.table_version}
        handle = self._sealer.seal("statement", body, self.config.ticket_seconds_max)
        return Planned(statement.schema, wire.pack(wire.TicketStatementQuery(handle)))

    def _sql_of(self, message: Any) -> str:
        """Return the text of a statement that may be followed."""
        if isinstance(message, wire.CommandStatementQuery):
            return message.query
        if isinstance(message, wire.CommandPreparedStatementQuery):
            sql: str = self._sealer.open("prepared statement", message.prepared_statement_handle)["sql"]
            return sql
        raise Unsupported(f"{type(message).__name__} cannot be followed: only a SELECT can")

    def _follow_sql(self, sql: str, start: Place) -> Planned:
        statement, topic = self._engine.prepare_run(sql, self._oplog.snapshot())
        body = {"sql": sql, "topic": topic, "from": start}
        handle = self._sealer.seal("follow", body, self.config.ticket_seconds_max)
        return Planned(statement.schema, wire.pack(wire.TicketStatementQuery(handle)))

    def _plan_statement(self, message: wire.CommandStatementQuery, command: bytes) -> Planned:
        return self._plan_sql(message.query)

    def _plan_prepared(self, message: wire.CommandPreparedStatementQuery, command: bytes) -> Planned:
        return self._plan_sql(self._sealer.open("prepared statement", message.prepared_statement_handle)["sql"])

    def _get_statement(self, message: wire.TicketStatementQuery, stopped: Stopped) -> Result:
        if self._sealer.kind(message.statement_handle) == "follow":
            body = self._sealer.open("follow", message.statement_handle)
            return self.read(TopicRead(body["topic"], body["from"], follow=True), stopped, body["sql"])
        body = self._sealer.open("statement", message.statement_handle)
        snapshot = self._oplog.snapshot_at(body["table_version"])
        running = self._engine.run(body["sql"], snapshot, stopped)
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
        handle = self._sealer.seal("prepared statement", {"sql": message.query}, self.config.ticket_seconds_max)
        schema, no_parameters = (s.serialize().to_pybytes() for s in (statement.schema, pa.schema([])))
        return [wire.pack(wire.ActionCreatePreparedStatementResult(handle, schema, no_parameters, is_update=False))]

    def _close_prepared(self, message: wire.ActionClosePreparedStatementRequest, caller: Caller) -> list[bytes]:
        return []  # the client carries the statement; there is nothing to free

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
        return metadata.db_schemas(message, {db_schema for db_schema, _, _ in tables(self._oplog.snapshot())})

    def _tables(self, message: wire.CommandGetTables) -> pa.RecordBatch:
        snapshot = self._oplog.snapshot()
        return metadata.tables(message, tables(snapshot), lambda db_schema, name: table_schema(snapshot, db_schema, name))


@dataclass(frozen=True)
class Route:
    """How a command is served; None where the protocol has no such use of it."""

    flight_info: Callable[[Service, Any, bytes], Planned] | None
    get: Callable[[Service, Any, Stopped], Result] | None
    put: Callable[[Service, Any, Caller], Put] | None = None


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

    return Route(lambda service, message, command: Planned(answer(service, message).schema, command), get)


ROUTES: dict[type[Any], Route] = {
    wire.CommandStatementQuery: Route(Service._plan_statement, None),
    wire.TicketStatementQuery: Route(None, Service._get_statement),
    wire.CommandPreparedStatementQuery: Route(Service._plan_prepared, None),
    wire.CommandStatementIngest: Route(None, None, Service._ingest),
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
