"""A real server that asks who calls: every call, command and action with every kind of credential, and what is seen of whom."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adbc_driver_flightsql.dbapi as adbc
import adbc_driver_manager
import pyarrow as pa
import pytest
from certificates import Authority
from conftest import ServerProcess, ask, eventually
from issuer import Issuer, claims, signed
from pyarrow import flight

from flight_oplog import Config, OpLog
from flight_oplog.accounts import add_token, add_user, remove_token
from flight_oplog.bearers import Logins
from flight_oplog.errors import RequestError
from flight_oplog.flightsql import wire
from flight_oplog.flightsql.service import ACTIONS, ROUTES
from flight_oplog.listening import check_listen

README = (Path(__file__).parent.parent / "README.md").read_text()
Start = Callable[..., ServerProcess]
ROWS_SCHEMA = pa.schema({"a": pa.int64()})
BATCH = pa.record_batch({"a": [1, 2]})
GRANTS = """
[role.reader]
read = ["open*"]

[principal.root]
append = ["*"]
read = ["*"]
admin = ["*"]

[principal.ann]
roles = ["reader"]
append = ["sink"]
"""


@dataclass
class Secured:
    """A server, and bearers of its principals: root may do everything, ann little, stranger nothing."""

    server: ServerProcess
    folder: Path
    users: str
    grants: Path
    tokens: dict[str, str]

    def options(self, who: str | None) -> flight.FlightCallOptions:
        """What a call by somebody is sent with; None is a call without credentials."""
        return flight.FlightCallOptions(
            headers=[] if who is None else [(b"authorization", f"Bearer {self.tokens[who]}".encode())], timeout=60
        )

    def adbc(self, who: str, **more: str) -> adbc.Connection:
        options = {"adbc.flight.sql.authorization_header": f"Bearer {self.tokens[who]}"} | more
        return adbc.connect(self.server.uri, options, autocommit=True)


def make_users(folder: Path) -> tuple[str, Path, dict[str, str]]:
    folder.mkdir(parents=True, exist_ok=True)
    users, grants = str(folder / "users.json"), folder / "grants.toml"
    grants.write_text(GRANTS)
    add_user(users, "root", "root's password")
    add_user(users, "ann", "ann's password")
    return users, grants, {name: add_token(users, name, 1) for name in ("root", "ann", "stranger")}


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    users, grants, tokens = make_users(folder)
    server = ServerProcess(
        folder / "log", folder / "errors", "--users", users, "--grants", str(grants), "--log-format", "json", "--log-calls", "all"
    )
    made = Secured(server, folder, users, grants, tokens)
    gone = add_token(users, "root", 1)
    remove_token(users, gone.split("_")[1])
    tokens |= {
        "wrong": f"oplog_{'0' * 12}_{'a' * 43}",
        "expired": add_token(users, "root", 0.00001),
        "revoked": gone,
        "malformed": "a.b.c",
        "foreign": Logins(b"another log's secret, of 32 bytes", 600).issue("root", ""),
    }
    with flight.connect(server.uri) as client:
        for topic in ("open_a", "hidden", "sink"):
            writer, _ = client.do_put(flight.FlightDescriptor.for_path(topic), ROWS_SCHEMA, made.options("root"))
            writer.write_batch(BATCH)
            writer.close()
    with made.adbc("root") as connection, connection.cursor() as cursor:
        cursor.execute("CREATE VIEW open_v AS SELECT * FROM hidden")
    time.sleep(2)  # until the short token has expired
    yield made
    server.stop()


Fresh = Callable[..., Secured]


@pytest.fixture
def fresh(start: Start, tmp_path: Path) -> Fresh:
    """Start a server of a test's own, that asks who calls."""

    def run(*flags: str) -> Secured:
        users, grants, tokens = make_users(tmp_path / "of")
        return Secured(start("--users", users, "--grants", str(grants), *flags), tmp_path, users, grants, tokens)

    return run


# The matrix: one row for each call that can be made, and each command and action that is served in it.

Caller = Callable[[flight.FlightClient, flight.FlightCallOptions, "Secured"], Any]
OK, DENIED, NONE, INVALID, UNSERVED = "OK", "PERMISSION_DENIED", "NOT_FOUND", "INVALID_ARGUMENT", "UNIMPLEMENTED"
_STATUS: list[tuple[type[BaseException], str]] = [
    (flight.FlightUnauthenticatedError, "UNAUTHENTICATED"),
    (flight.FlightUnauthorizedError, DENIED),
    (KeyError, NONE),
    (NotImplementedError, UNSERVED),
    (pa.ArrowInvalid, INVALID),
]


def status_of(act: Callable[[], Any]) -> tuple[str, str]:
    """What a call ends with, and its words."""
    try:
        act()
    except tuple(kind for kind, _ in _STATUS) as error:
        return next(name for kind, name in _STATUS if isinstance(error, kind)), str(error)
    except OSError as error:  # what pyarrow makes of a status of Flight's own when it asks for a schema
        assert str(error).endswith("Detail: Unauthenticated"), error  # noqa: PT017
        return "UNAUTHENTICATED", str(error)
    return OK, ""


def descriptor(message: Any) -> flight.FlightDescriptor:
    return flight.FlightDescriptor.for_command(wire.pack(message))


HIDDEN = wire.CommandStatementQuery("SELECT * FROM hidden")
PATH = flight.FlightDescriptor.for_path("hidden")
TICKET = json.dumps({"topic": "hidden"}).encode()


def info(message: Any) -> Caller:
    return lambda client, options, secured: client.get_flight_info(descriptor(message), options)


def schema(message: Any) -> Caller:
    return lambda client, options, secured: client.get_schema(descriptor(message), options)


def fetch(message: Any) -> Caller:
    return lambda client, options, secured: client.do_get(flight.Ticket(wire.pack(message)), options).read_all()


def act(kind: str, message: Any) -> Caller:
    body = wire.pack(message) if ACTIONS[kind].is_sql else wire.encode(message)
    return lambda client, options, secured: list(client.do_action(flight.Action(kind, body), options))


def send(message: Any, batch: pa.RecordBatch = BATCH) -> Caller:
    target = message if isinstance(message, flight.FlightDescriptor) else descriptor(message)

    def call(client: flight.FlightClient, options: flight.FlightCallOptions, secured: Secured) -> None:
        writer, answers = client.do_put(target, batch.schema, options)
        try:
            writer.write_batch(batch)
            writer.done_writing()
            answers.read()
        finally:
            writer.close()

    return call


def roots(make: Callable[[flight.FlightClient, flight.FlightCallOptions], Any], use: Callable[[Any], Caller]) -> Caller:
    """Use what root was given, a ticket or a handle, as somebody else."""

    def call(client: flight.FlightClient, options: flight.FlightCallOptions, secured: Secured) -> Any:
        return use(make(client, secured.options("root")))(client, options, secured)

    return call


def ticket_of(client: flight.FlightClient, options: flight.FlightCallOptions) -> wire.TicketStatementQuery:
    return wire.unpack(client.get_flight_info(descriptor(HIDDEN), options).endpoints[0].ticket.ticket)


def handle_of(client: flight.FlightClient, options: flight.FlightCallOptions, sql: str = "SELECT * FROM hidden") -> bytes:
    asked = wire.ActionCreatePreparedStatementRequest(sql)
    [answer] = client.do_action(flight.Action("CreatePreparedStatement", wire.pack(asked)), options)
    handle: bytes = wire.unpack(answer.body.to_pybytes()).prepared_statement_handle
    return handle


def insert_of(client: flight.FlightClient, options: flight.FlightCallOptions) -> bytes:
    return handle_of(client, options, "INSERT INTO hidden VALUES (1)")


def transaction_of(client: flight.FlightClient, options: flight.FlightCallOptions) -> bytes:
    [answer] = client.do_action(flight.Action("BeginTransaction", wire.pack(wire.ActionBeginTransactionRequest())), options)
    found: bytes = wire.unpack(answer.body.to_pybytes()).transaction_id
    return found


def info_of(client: flight.FlightClient, options: flight.FlightCallOptions) -> wire.FlightInfo:
    return wire.decode(client.get_flight_info(descriptor(HIDDEN), options).serialize(), wire.FlightInfo)


def own_ticket(client: flight.FlightClient, options: flight.FlightCallOptions, secured: Secured) -> Any:
    return fetch(ticket_of(client, options))(client, options, secured)


INGEST = wire.CommandStatementIngest(wire.TableDefinitionOptions(1, 2), "hidden")
FIXED = [
    wire.CommandGetCatalogs(),
    wire.CommandGetDbSchemas(),
    wire.CommandGetTables(include_schema=True),
    wire.CommandGetTableTypes(),
    wire.CommandGetPrimaryKeys(table="hidden"),
    wire.CommandGetImportedKeys(table="hidden"),
    wire.CommandGetExportedKeys(table="hidden"),
    wire.CommandGetCrossReference(pk_table="hidden", fk_table="hidden"),
    wire.CommandGetXdbcTypeInfo(),
    wire.CommandGetSqlInfo(),
]
PREPARED = wire.CommandPreparedStatementQuery
CHANGED = wire.CommandPreparedStatementUpdate

# What a principal without the grant is answered, and what one with it; the call itself.
MATRIX: dict[str, tuple[str, str, Caller]] = {
    "ListFlights": (OK, OK, lambda client, options, secured: list(client.list_flights(options=options))),
    "ListActions": (OK, OK, lambda client, options, secured: client.list_actions(options)),
    "DoExchange": (UNSERVED, UNSERVED, lambda client, options, secured: client.do_exchange(PATH, options)[1].read_all()),
    "GetFlightInfo of a path": (NONE, OK, lambda client, options, secured: client.get_flight_info(PATH, options)),
    "GetSchema of a path": (NONE, OK, lambda client, options, secured: client.get_schema(PATH, options)),
    "GetFlightInfo of a topic's ticket": (
        NONE,
        OK,
        lambda client, options, secured: client.get_flight_info(flight.FlightDescriptor.for_command(TICKET), options),
    ),
    "GetSchema of a topic's ticket": (
        NONE,
        OK,
        lambda client, options, secured: client.get_schema(flight.FlightDescriptor.for_command(TICKET), options),
    ),
    "DoGet of a topic's ticket": (NONE, OK, lambda client, options, secured: client.do_get(flight.Ticket(TICKET), options).read_all()),
    "DoPut to a path": (DENIED, OK, send(PATH)),
    "flight_info CommandStatementQuery": (NONE, OK, info(HIDDEN)),
    "schema CommandStatementQuery": (NONE, OK, schema(HIDDEN)),
    "get TicketStatementQuery": (INVALID, OK, roots(ticket_of, fetch)),
    "put CommandStatementUpdate": (DENIED, OK, send(wire.CommandStatementUpdate("CREATE VIEW sees_a AS SELECT 1 AS a"))),
    "flight_info CommandPreparedStatementQuery": (INVALID, OK, roots(handle_of, lambda handle: info(PREPARED(handle)))),
    "schema CommandPreparedStatementQuery": (INVALID, OK, roots(handle_of, lambda handle: schema(PREPARED(handle)))),
    "put CommandPreparedStatementQuery": (INVALID, OK, roots(handle_of, lambda handle: send(PREPARED(handle)))),
    "put CommandPreparedStatementUpdate": (INVALID, OK, roots(insert_of, lambda handle: send(CHANGED(handle), pa.record_batch({})))),
    "put CommandStatementIngest": (DENIED, OK, send(INGEST)),
    "refused CommandStatementSubstraitPlan": (UNSERVED, UNSERVED, info(wire.CommandStatementSubstraitPlan())),
    **{f"flight_info {type(message).__name__}": (OK, OK, info(message)) for message in FIXED},
    **{f"schema {type(message).__name__}": (OK, OK, schema(message)) for message in FIXED},
    **{f"get {type(message).__name__}": (OK, OK, fetch(message)) for message in FIXED},
    "action CreatePreparedStatement": (
        NONE,
        OK,
        act("CreatePreparedStatement", wire.ActionCreatePreparedStatementRequest("SELECT * FROM hidden")),
    ),
    "action ClosePreparedStatement": (
        OK,
        OK,
        roots(handle_of, lambda handle: act("ClosePreparedStatement", wire.ActionClosePreparedStatementRequest(handle))),
    ),
    "action BeginTransaction": (OK, OK, act("BeginTransaction", wire.ActionBeginTransactionRequest())),
    "action EndTransaction": (
        INVALID,
        OK,
        roots(transaction_of, lambda found: act("EndTransaction", wire.ActionEndTransactionRequest(found, 1))),
    ),
    "action BeginSavepoint": (UNSERVED, UNSERVED, act("BeginSavepoint", wire.ActionBeginSavepointRequest())),
    "action EndSavepoint": (UNSERVED, UNSERVED, act("EndSavepoint", wire.ActionEndSavepointRequest())),
    "action CreatePreparedSubstraitPlan": (
        UNSERVED,
        UNSERVED,
        act("CreatePreparedSubstraitPlan", wire.ActionCreatePreparedSubstraitPlanRequest()),
    ),
    "action CancelQuery": (
        INVALID,
        OK,
        roots(info_of, lambda found: act("CancelQuery", wire.ActionCancelQueryRequest(wire.encode(found)))),
    ),
    "action CancelFlightInfo": (INVALID, OK, roots(info_of, lambda found: act("CancelFlightInfo", wire.CancelFlightInfoRequest(found)))),
    "action RenewFlightEndpoint": (
        INVALID,
        OK,
        roots(info_of, lambda found: act("RenewFlightEndpoint", wire.RenewFlightEndpointRequest(found.endpoint[0]))),
    ),
    "action SetSessionOptions": (OK, OK, act("SetSessionOptions", wire.SetSessionOptionsRequest())),
    "action GetSessionOptions": (OK, OK, act("GetSessionOptions", wire.GetSessionOptionsRequest())),
    "action CloseSession": (OK, OK, act("CloseSession", wire.CloseSessionRequest())),
}


def test_every_command_and_action_has_a_row() -> None:
    served = {f"action {kind}" for kind in ACTIONS}
    for message, route in ROUTES.items():
        served |= {f"{way} {message.__name__}" for way in ("flight_info", "get", "put") if getattr(route, way) is not None}
        served |= {f"schema {message.__name__}" for way in (route.flight_info,) if way is not None}
        served |= {f"refused {message.__name__}" for reason in (route.refused,) if reason is not None}
    rpcs = {name for name in MATRIX if not name.startswith(("action ", "flight_info ", "schema ", "get ", "put ", "refused "))}
    assert served == MATRIX.keys() - rpcs
    handlers = {name for name in dir(flight.FlightServerBase) if name.startswith(("do_", "get_", "list_"))}
    assert handlers == {"do_action", "do_exchange", "do_get", "do_put", "get_flight_info", "get_schema", "list_actions", "list_flights"}


@pytest.mark.parametrize("row", MATRIX)
def test_a_call_ends_as_its_credential_deserves(secured: Secured, row: str) -> None:
    without, with_grant, call = MATRIX[row]
    with flight.connect(secured.server.uri) as client:
        for who in (None, "wrong", "expired", "revoked", "malformed", "foreign"):
            ended = status_of(lambda who=who: call(client, secured.options(who), secured))  # type: ignore[misc]
            assert ended[0] == "UNAUTHENTICATED", (who, ended)
        for who, expected in (("stranger", without), ("ann", without), ("root", with_grant)):
            ended = status_of(lambda who=who: call(client, secured.options(who), secured))  # type: ignore[misc]
            assert ended[0] == expected, (who, ended)
            assert "Traceback" not in ended[1]


def test_a_refusal_does_not_tell_whether_there_is_something(secured: Secured) -> None:
    """The same calls for a topic that is hidden and for one that is nowhere end in the same words."""

    def said(topic: str) -> list[tuple[str, str]]:
        path, ticket = flight.FlightDescriptor.for_path(topic), json.dumps({"topic": topic, "where": "a = 1"}).encode()
        calls: list[Callable[[], Any]] = [
            lambda: client.get_flight_info(path, options),
            lambda: client.get_schema(path, options),
            lambda: client.do_get(flight.Ticket(ticket), options).read_all(),
            lambda: client.get_flight_info(flight.FlightDescriptor.for_command(ticket), options),
            lambda: send(path)(client, options, secured),
            lambda: send(wire.CommandStatementIngest(wire.TableDefinitionOptions(1, 2), topic))(client, options, secured),
            lambda: send(wire.CommandStatementIngest(wire.TableDefinitionOptions(2, 1), topic))(client, options, secured),
            lambda: info(wire.CommandStatementQuery(f"SELECT * FROM {topic}"))(client, options, secured),
            lambda: info(wire.CommandStatementQuery(f"SELECT * FROM at_version('{topic}', 1)"))(client, options, secured),
            lambda: schema(wire.CommandStatementQuery(f"DESCRIBE {topic}"))(client, options, secured),
            lambda: send(wire.CommandStatementUpdate(f"INSERT INTO {topic} VALUES (1)"))(client, options, secured),
            lambda: send(wire.CommandStatementUpdate(f"DROP TABLE {topic}"))(client, options, secured),
            lambda: send(wire.CommandStatementUpdate(f"DROP VIEW {topic}"))(client, options, secured),
            lambda: send(wire.CommandStatementUpdate(f"CREATE TABLE {topic} (a BIGINT)"))(client, options, secured),
            lambda: send(wire.CommandStatementUpdate(f"CREATE OR REPLACE VIEW {topic} AS SELECT 1 AS a"))(client, options, secured),
        ]
        return [(status, words.replace(topic, "*")) for status, words in map(status_of, calls)]

    options = secured.options("ann")
    with flight.connect(secured.server.uri) as client:
        assert said("hidden") == said("nowhere")
        assert all(status in (NONE, DENIED) for status, _ in said("hidden"))


def test_listings_show_what_may_be_read(secured: Secured) -> None:
    with flight.connect(secured.server.uri) as client:
        listed = {
            who: [found.descriptor.path for found in client.list_flights(options=secured.options(who))]
            for who in ("root", "ann", "stranger")
        }
    assert listed["ann"] == [[b"open_a"]]
    assert listed["stranger"] == []
    assert [b"hidden"] in listed["root"]
    for who, names in (("ann", {"open_a"}), ("stranger", set())):
        with secured.adbc(who) as connection:
            objects = connection.adbc_get_objects().read_all().to_pylist()
            tables = {
                (of_schema["db_schema_name"], table["table_name"])
                for catalog in objects
                for of_schema in catalog["catalog_db_schemas"]
                for table in of_schema["db_schema_tables"]
            }
            assert {name for place, name in tables if place != "system"} == names
            assert "hidden" not in str(ask(connection, "SELECT * FROM information_schema.columns"))
            assert {row["topic"] for row in ask(connection, "SELECT topic FROM system.topics")} == names
            with pytest.raises(adbc_driver_manager.ProgrammingError, match=r"table 'oplog\.public\.open_v' does not exist"):
                ask(connection, "SELECT * FROM open_v")


def test_handles_and_tickets_of_somebody_else_are_like_forged_ones(secured: Secured) -> None:
    with flight.connect(secured.server.uri) as client:
        roots_own = ticket_of(client, secured.options("root"))
        forged = wire.TicketStatementQuery(b"\x03" + os.urandom(32) + roots_own.statement_handle[33:])
        answers = {status_of(lambda t=t: fetch(t)(client, secured.options("ann"), secured)) for t in (roots_own, forged)}  # type: ignore[misc]
        assert len(answers) == 1
        assert fetch(roots_own)(client, secured.options("root"), secured).num_rows >= 2


def test_values_bound_by_one_principal_are_not_anothers(secured: Secured) -> None:
    """A client may go on with the handle it had before it bound values: they are kept by handle and principal."""
    with flight.connect(secured.server.uri) as client:
        handle = handle_of(client, secured.options("root"), "SELECT $1 AS secret")
        send(PREPARED(handle), pa.record_batch({"0": ["planted"]}))(client, secured.options("root"), secured)
        act("ClosePreparedStatement", wire.ActionClosePreparedStatementRequest(handle))(client, secured.options("ann"), secured)
        found = client.get_flight_info(descriptor(PREPARED(handle)), secured.options("root"))
        assert client.do_get(found.endpoints[0].ticket, secured.options("root")).read_all().to_pylist() == [{"secret": "planted"}]


def test_transactions_are_their_principals_own(secured: Secured) -> None:
    with flight.connect(secured.server.uri) as client:
        begun = transaction_of(client, secured.options("root"))
        update = wire.CommandStatementUpdate("INSERT INTO sink VALUES (7)", transaction_id=begun)
        status, words = status_of(lambda: send(update)(client, secured.options("ann"), secured))
        assert (status, "the transaction was not begun by you" in words) == (INVALID, True)
        for ending in (1, 2):
            act_of = act("EndTransaction", wire.ActionEndTransactionRequest(begun, ending))
            status_of(lambda act_of=act_of: act_of(client, secured.options("ann"), secured))  # type: ignore[misc]
        send(update)(client, secured.options("root"), secured)
        act("EndTransaction", wire.ActionEndTransactionRequest(begun, 1))(client, secured.options("root"), secured)
    with secured.adbc("root") as connection:
        assert ask(connection, "SELECT count(*) AS n FROM sink WHERE a = 7") == [{"n": 1}]


def test_session_options_in_a_cookie_are_their_principals_own(secured: Secured) -> None:
    headers: dict[str, list[str]] = {}

    class Cookies(flight.ClientMiddleware):
        def received_headers(self, received: dict[str, list[str]]) -> None:
            headers.update(received)

    class Factory(flight.ClientMiddlewareFactory):
        def start_call(self, call: Any) -> Cookies:
            return Cookies()

    options = {"schema": wire.SessionOptionValue(string_value="log")}
    message = wire.SetSessionOptionsRequest(tuple(wire.SessionOption(name, value) for name, value in options.items()))
    read = act("GetSessionOptions", wire.GetSessionOptionsRequest())
    with flight.FlightClient(secured.server.uri, middleware=[Factory()]) as client:
        act("SetSessionOptions", message)(client, secured.options("root"), secured)
        [cookie] = [text for text in headers["set-cookie"] if text.startswith("oplog-options=")]
        with_cookie = {
            who: flight.FlightCallOptions(
                headers=[(b"authorization", f"Bearer {secured.tokens[who]}".encode()), (b"cookie", cookie.encode())]
            )
            for who in ("root", "ann")
        }
        assert status_of(lambda: read(client, with_cookie["root"], secured))[0] == OK
        assert status_of(lambda: read(client, with_cookie["ann"], secured))[0] == INVALID


# Logging in


def test_adbc_logs_in_with_a_password_and_sees_its_own(secured: Secured) -> None:
    with adbc.connect(secured.server.uri, {"username": "ann", "password": "ann's password"}, autocommit=True) as connection:
        assert ask(connection, "SELECT count(*) AS n FROM open_a") == [{"n": 2}]
        queries = ask(connection, "SELECT DISTINCT principal FROM system.queries")
    assert queries == [{"principal": "ann"}]


@pytest.mark.parametrize(("name", "password"), [("nobody at all", "x"), ("root", "wrong"), ("ann", ""), ("", "")])
def test_a_wrong_login_is_refused_in_the_same_words(secured: Secured, name: str, password: str) -> None:
    with flight.connect(secured.server.uri) as client:
        status, words = status_of(lambda: client.authenticate_basic_token(name, password))
    assert status == "UNAUTHENTICATED"
    assert words.startswith("the credentials are not valid; request ")
    with pytest.raises(adbc_driver_manager.ProgrammingError, match="the credentials are not valid; request "):
        adbc.connect(secured.server.uri, {"username": f"{name}, or not", "password": "x"}, autocommit=True)


class Classic(flight.ClientAuthHandler):
    """The handshake of Flight before it had headers."""

    def __init__(self, name: str, password: str) -> None:
        super().__init__()
        self.said, self.token = flight.BasicAuth(name, password).serialize(), b""

    def authenticate(self, outgoing: Any, incoming: Any) -> None:
        outgoing.write(self.said)
        self.token = incoming.read()

    def get_token(self) -> bytes:
        return self.token


def test_the_classic_handshake_logs_in_too(secured: Secured) -> None:
    with flight.connect(secured.server.uri) as client:
        client.authenticate(Classic("ann", "ann's password"))
        assert [found.descriptor.path for found in client.list_flights()] == [[b"open_a"]]
    with flight.connect(secured.server.uri) as client:
        assert status_of(lambda: client.authenticate(Classic("ann", "wrong")))[0] == "UNAUTHENTICATED"
        assert status_of(lambda: list(client.list_flights()))[0] == "UNAUTHENTICATED"


def test_the_classic_handshake_knows_what_changed_while_the_server_runs(start: Start, tmp_path: Path) -> None:
    users, grants, _ = make_users(tmp_path / "of")
    server = start("--users", users, "--grants", str(grants))
    with flight.connect(server.uri) as client:
        client.authenticate(Classic("ann", "ann's password"))
        add_user(users, "ann", "another password")
        time.sleep(1)
        assert status_of(lambda: client.authenticate(Classic("ann", "ann's password")))[0] == "UNAUTHENTICATED"
        client.authenticate(Classic("ann", "another password"))


def test_adbc_may_send_a_password_where_a_bearer_goes(secured: Secured) -> None:
    """No bearer comes back for it: the driver would send that beside the password, and be refused."""
    basic = base64.b64encode(b"ann:ann's password").decode()
    options = {"adbc.flight.sql.authorization_header": f"Basic {basic}"}
    with adbc.connect(secured.server.uri, options, autocommit=True) as connection:
        assert [ask(connection, f"SELECT {n} AS n") for n in range(3)] == [[{"n": n}] for n in range(3)]


def test_a_handshake_that_says_nothing_and_two_credentials_at_once_are_refused(secured: Secured) -> None:
    class Mute(Classic):
        def authenticate(self, outgoing: Any, incoming: Any) -> None:
            outgoing.write(b"junk")
            self.token = incoming.read()

    with flight.connect(secured.server.uri) as client:
        assert status_of(lambda: client.authenticate(Mute("", "")))[0] == "UNAUTHENTICATED"
        twice = [(b"authorization", f"Bearer {secured.tokens[who]}".encode()) for who in ("ann", "root")]
        ended = status_of(lambda: list(client.list_flights(options=flight.FlightCallOptions(headers=twice))))
        assert ended[0] == "UNAUTHENTICATED"


# Who did it


def test_the_principal_stands_in_the_records_and_in_the_queries(secured: Secured) -> None:
    with flight.connect(secured.server.uri) as client:
        send(flight.FlightDescriptor.for_path("sink"))(client, secured.options("ann"), secured)
    with secured.adbc("root") as connection:
        found = ask(connection, "SELECT appends FROM records.sink ORDER BY first_offset DESC LIMIT 1")
        assert found[0]["appends"][-1]["principal"] == "ann"
        assert {"root"} <= {row["principal"] for row in ask(connection, "SELECT principal FROM system.queries")}


def test_a_call_has_a_line_in_the_log_with_the_id_its_client_got(secured: Secured) -> None:
    got: list[str] = []

    class Reads(flight.ClientMiddleware):
        def received_headers(self, headers: dict[str, list[str]]) -> None:
            got.extend(headers.get("x-request-id", []))

    class Factory(flight.ClientMiddlewareFactory):
        def start_call(self, call: Any) -> Reads:
            return Reads()

    with flight.FlightClient(secured.server.uri, middleware=[Factory()]) as client:
        list(client.list_flights(options=secured.options("ann")))
        status_of(lambda: client.get_flight_info(PATH, secured.options("ann")))
        named = flight.FlightCallOptions(
            headers=[(b"authorization", f"Bearer {secured.tokens['ann']}".encode()), (b"x-request-id", b"mine-1")]
        )
        list(client.list_flights(options=named))
        refused = status_of(lambda: list(client.list_flights(options=secured.options("wrong"))))[1]
    assert "mine-1" in got
    said = refused.partition("; request ")[2][:16]
    wanted = {got[0]: "OK", "mine-1": "OK", said: "UNAUTHENTICATED"}
    assert eventually(lambda: wanted.keys() <= lines(secured).keys())
    found = lines(secured)
    assert {name: found[name]["status"] for name in wanted} == wanted
    assert found[got[0]]["principal"] == "ann"
    assert any(line["status"] == "NOT_FOUND" and line["principal"] == "ann" for line in found.values())


def lines(secured: Secured) -> dict[str, dict[str, Any]]:
    """The lines of the server's log about calls, by request."""
    found = [json.loads(line) for line in secured.server.errors.read_text().splitlines() if line.startswith("{")]
    return {line["request"]: line for line in found if "status" in line}


def test_no_secret_is_told(secured: Secured) -> None:
    """Planted in every place where a credential may be; none of it comes out anywhere."""
    planted = ["planted-password-1", "planted-bearer-2", "planted-name-3", *secured.tokens.values(), "root's password", "ann's password"]
    with flight.connect(secured.server.uri) as client:
        for header in (f"Bearer {planted[1]}", "Basic " + base64.b64encode(f"{planted[2]}:{planted[0]}".encode()).decode(), planted[1]):
            status_of(
                lambda header=header: list(
                    client.list_flights(options=flight.FlightCallOptions(headers=[(b"authorization", header.encode())]))
                )
            )  # type: ignore[misc]
        answers = [status_of(lambda: client.authenticate_basic_token("root", planted[0]))[1]]
    with secured.adbc("root") as connection:
        for table in ("topics", "queries", "metrics", "settings"):
            answers.append(str(ask(connection, f"SELECT * FROM system.{table}")))
        answers.append(str(ask(connection, "SHOW ALL")))
        answers.append(str(connection.adbc_get_info()))
    answers.append(secured.server.errors.read_text())
    answers += [Path(f"/proc/{secured.server.process.pid}/{name}").read_bytes().decode(errors="replace") for name in ("cmdline", "environ")]
    settings = subprocess.run(
        [sys.executable, "-m", "flight_oplog", "config", "--users", secured.users], capture_output=True, text=True, check=True
    )
    answers += [settings.stdout, settings.stderr]
    for place, answer in enumerate(answers):
        for secret in planted:
            assert secret not in answer, (place, secret)
            if secret.startswith("oplog_"):
                assert secret.split("_", 2)[2] not in answer, place
    text = (secured.folder / "users.json").read_text()
    assert not any(secret in text for secret in planted)


# Grants that are read again


def test_grants_are_read_again_without_dropping_a_call(fresh: Fresh) -> None:
    made = fresh()
    with flight.connect(made.server.uri) as client:
        for topic in ("open_a", "hidden"):
            send(flight.FlightDescriptor.for_path(topic))(client, made.options("root"), made)
        following = client.do_get(flight.Ticket(json.dumps({"topic": "hidden", "follow": True})), made.options("root"))
        assert following.read_chunk().data.num_rows == 2
        assert status_of(lambda: client.get_flight_info(PATH, made.options("ann")))[0] == NONE
        made.grants.write_text(GRANTS.replace('"open*"', '"open*", "hidden"'))
        made.server.process.send_signal(signal.SIGHUP)
        assert eventually(lambda: status_of(lambda: client.get_flight_info(PATH, made.options("ann")))[0] == OK)
        assert "grants and users were read again" in made.server.errors.read_text()
        made.grants.write_text("[role.reader\n")
        made.server.process.send_signal(signal.SIGHUP)
        assert eventually(lambda: "what was there stays: grants" in made.server.errors.read_text())
        assert status_of(lambda: client.get_flight_info(PATH, made.options("ann")))[0] == OK
        send(PATH)(client, made.options("root"), made)
        assert following.read_chunk().data.num_rows == 2  # the call went on all the while
        following.cancel()


def test_an_answer_in_hand_is_its_principals_and_goes_with_the_right(fresh: Fresh) -> None:
    made = fresh()
    count = flight.FlightDescriptor.for_command(wire.pack(wire.CommandStatementQuery("SELECT count(*) AS n FROM open_a")))
    with flight.connect(made.server.uri) as client:

        def fetch(who: str, ticket: flight.Ticket) -> object:
            return client.do_get(ticket, made.options(who)).read_all().to_pylist()

        def planned(who: str) -> flight.Ticket:
            return client.get_flight_info(count, made.options(who)).endpoints[0].ticket

        send(flight.FlightDescriptor.for_path("open_a"))(client, made.options("root"), made)
        for _ in range(4):
            anns = planned("ann")
            assert fetch("ann", anns) == [{"n": 2}]
        assert planned("ann") == anns, "it is in hand"
        assert planned("root") != anns
        with pytest.raises(pa.ArrowInvalid, match="was not made by a server of this log for you"):
            fetch("root", anns)
        made.grants.write_text(GRANTS.replace('"open*"', '"other*"'))
        made.server.process.send_signal(signal.SIGHUP)
        assert eventually(lambda: "were read again" in made.server.errors.read_text())
        for call in (lambda: planned("ann"), lambda: fetch("ann", anns)):
            with pytest.raises(KeyError, match=r"table 'oplog\.public\.open_a' does not exist"):
                call()


def test_a_stream_of_appends_ends_when_its_right_is_taken(fresh: Fresh) -> None:
    made = fresh()
    headers = [(b"authorization", f"Bearer {made.tokens['ann']}".encode()), (b"oplog-producer", b"p")]
    with flight.connect(made.server.uri) as client:
        writer, answers = client.do_put(flight.FlightDescriptor.for_path("sink"), ROWS_SCHEMA, flight.FlightCallOptions(headers=headers))
        writer.write_with_metadata(BATCH, b'{"sequence": 0}')
        assert json.loads(answers.read().to_pybytes())["entries"] == 2
        made.grants.write_text(GRANTS.replace('append = ["sink"]', ""))
        made.server.process.send_signal(signal.SIGHUP)
        assert eventually(lambda: "were read again" in made.server.errors.read_text())
        writer.write_with_metadata(BATCH, b'{"sequence": 1}')
        with pytest.raises(flight.FlightUnauthorizedError, match="'ann' has no permission 'append' for 'sink'; nothing was written"):
            writer.close()
        assert client.get_flight_info(flight.FlightDescriptor.for_path("sink"), made.options("root")).total_records == 2


def test_a_revoked_token_is_not_good_any_more_within_a_second(fresh: Fresh) -> None:
    made = fresh()
    with flight.connect(made.server.uri) as client:
        assert status_of(lambda: list(client.list_flights(options=made.options("ann"))))[0] == OK
        remove_token(made.users, made.tokens["ann"].split("_")[1])
        time.sleep(1)
        assert status_of(lambda: list(client.list_flights(options=made.options("ann"))))[0] == "UNAUTHENTICATED"


def test_calls_that_are_refused_hold_no_place(fresh: Fresh) -> None:
    made = fresh("--calls-max", "2")
    made.tokens |= {"wrong": "x"}
    with flight.connect(made.server.uri) as client:
        for _ in range(10):
            assert status_of(lambda: list(client.list_flights(options=made.options("wrong"))))[0] == "UNAUTHENTICATED"
        assert status_of(lambda: list(client.list_flights(options=made.options("root"))))[0] == OK


# Where it listens


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"listen": "grpc://0.0.0.0:1"}, "there is no authentication and no TLS; add --insecure"),
        ({"listen": "grpc://0.0.0.0:1", "users": "u"}, "there is no TLS; add --insecure"),
        ({"listen": "grpc://0.0.0.0:1", "jwt_keys": "k"}, "there is no TLS; add --insecure"),
        ({"listen": "grpc://0.0.0.0:1", "tls_cert": "c", "tls_key": "k"}, "there is no authentication; add --insecure"),
        ({"listen": "grpc+tls://127.0.0.1:1"}, "setting listen: it takes TLS; set tls_cert and tls_key"),
        ({"tls_cert": "c"}, "settings tls_cert and tls_key go together"),
        ({"tls_key": "k"}, "settings tls_cert and tls_key go together"),
        ({"client_ca": "a"}, "setting client_ca: it takes TLS; set tls_cert and tls_key"),
    ],
)
def test_half_a_lock_is_refused(given: dict[str, str], said: str) -> None:
    with pytest.raises(RequestError, match=said.replace("+", r"\+")):
        check_listen(Config(**given))


@pytest.mark.parametrize(
    "given",
    [
        {"listen": "grpc://0.0.0.0:1", "insecure": True},
        {"listen": "grpc://0.0.0.0:1", "users": "u", "insecure": True},
        {"listen": "grpc://0.0.0.0:1", "users": "u", "tls_cert": "c", "tls_key": "k"},
        {"listen": "grpc+tls://0.0.0.0:1", "client_ca": "a", "tls_cert": "c", "tls_key": "k"},
        {"listen": "grpc+tls://[::]:1", "jwt_keys": "a", "tls_cert": "c", "tls_key": "k"},
        {"listen": "grpc://localhost:1"},
    ],
)
def test_a_whole_lock_or_none_asked_for_in_words_is_fine(given: dict[str, Any]) -> None:
    check_listen(Config(**given))


def test_a_log_without_words_of_control_cannot_be_made_to_say_what_it_did_not(tmp_path: Path) -> None:
    code = (
        "import logging, sys\nfrom flight_oplog import logs\nlogs.begin(sys.argv[1])\n"
        "with logs.during(logs.Call('r', 'DO_GET', 'ann\\nforged')):\n    logging.getLogger('x').info('one\\ntwo %s', chr(27))\n"
    )
    for form in ("text", "json"):
        done = subprocess.run([sys.executable, "-c", code, form], capture_output=True, text=True, check=True)
        [line] = done.stderr.splitlines()
        assert "\x1b" not in line
        assert "forged" in line
    assert json.loads(line)["principal"] == "ann\nforged"


def test_the_log_of_a_folder_keeps_its_key_to_itself(tmp_path: Path) -> None:
    with OpLog.open(str(tmp_path / "log")) as log:
        log.secret()
    assert (tmp_path / "log" / "_oplog_key").stat().st_mode & 0o077 == 0


def test_a_port_that_speaks_no_grpc_at_all_is_no_way_in(secured: Secured) -> None:
    host, port = secured.server.uri.removeprefix("grpc://").split(":")
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 64, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64):
        with socket.create_connection((host, int(port)), 5) as connected:
            connected.sendall(said)
            connected.settimeout(5)
            with contextlib.suppress(OSError):
                connected.recv(64)
    with flight.connect(secured.server.uri) as client:
        assert status_of(lambda: list(client.list_flights(options=secured.options("root"))))[0] == OK


# README.md, "Securing a server"


def test_a_server_is_secured_as_the_readme_says(tmp_path: Path, issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    section = README.split("\n## Securing a server\n")[1].split("\n## ")[0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def here(text: str) -> str:
        return text.replace("8815", port).replace("https://login.example.com/.well-known/jwks.json", issuer.config.jwt_keys)

    for name, text in re.findall(r"^```toml\n# (\S+)\n(.*?)^```", section, re.DOTALL | re.MULTILINE):
        (tmp_path / name).write_text(here(text))
    locking, using = re.findall(r"^```shell\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    *steps, serve = here(locking).splitlines()
    assert len(steps) + 1 == 5, "five commands"
    search = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    monkeypatch.chdir(tmp_path)

    def run(command: str, said: str = "correct horse\n") -> str:
        done = subprocess.run(["bash", "-c", command], input=said, capture_output=True, text=True, timeout=60, check=False, env=search)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    printed = [run(step) for step in steps]
    assert printed[-1] == "good: 1 users, 1 API tokens, 1 JWT keys; grants for 1 roles and 2 principals\n"
    with subprocess.Popen(["bash", "-c", f"exec {serve}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=search) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == f"grpc+tls://0.0.0.0:{port}\n"
            (tmp_path / "orders.ndjson").write_text('{"id": 1}\n{"id": 2}\n')
            ingest, sql = here(using).splitlines()
            assert run(ingest) == "orders.ndjson: 2 entries in topic orders, offsets [0, 2)\n"
            assert run(sql) == "n\n2\n"
            [program] = re.findall(r"^```py\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
            monkeypatch.setattr("getpass.getpass", lambda: "correct horse")
            exec(compile(here(program), "README.md", "exec"), {})
            options = {"adbc.flight.sql.client_option.tls_root_certs": (tmp_path / "cert.pem").read_text()}
            bearer = signed(claims(sub="eve", iss="https://login.example.com/", roles=["analyst"]))
            options["adbc.flight.sql.authorization_header"] = f"Bearer {bearer}"
            for uri in (f"grpc+tls://localhost:{port}", f"flightsql://localhost:{port}"):
                with adbc.connect(uri, options, autocommit=True) as connection:
                    assert ask(connection, "SELECT sum(id) AS s FROM orders") == [{"s": 3}]
                    with (
                        pytest.raises(adbc_driver_manager.ProgrammingError, match="'eve' has no permission 'append' for 'orders'"),
                        connection.cursor() as cursor,
                    ):
                        cursor.adbc_ingest("orders", pa.table({"id": [3]}), mode="append")
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


# What a stranger, or somebody who may do little, could take from the others


def test_handshakes_that_say_nothing_hold_up_nobody(fresh: Fresh) -> None:
    made = fresh("--calls-max", "8")
    says = threading.Event()

    class Silent(Classic):
        def authenticate(self, outgoing: Any, incoming: Any) -> None:
            says.wait(60)

    def shake() -> None:
        with contextlib.suppress(pa.ArrowException, OSError), flight.connect(made.server.uri) as client:
            client.authenticate(Silent("", ""))

    threads = [threading.Thread(target=shake, daemon=True) for _ in range(30)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    with flight.connect(made.server.uri) as client:
        for _ in range(20):
            assert status_of(lambda: list(client.list_flights(options=made.options("root"))))[0] == OK
        assert client.authenticate_basic_token("ann", "ann's password")
    says.set()
    for thread in threads:
        thread.join(20)


def test_a_handshake_of_any_size_is_not_looked_into(secured: Secured) -> None:
    class Long(Classic):
        def authenticate(self, outgoing: Any, incoming: Any) -> None:
            outgoing.write(b"\x78" * (20 << 20))
            self.token = incoming.read()

    before = secured.server.memory_peak()
    with flight.connect(secured.server.uri) as client:
        status, words = status_of(lambda: client.authenticate(Long("", "")))
    assert (status, "more than 8192 bytes" in words) == ("UNAUTHENTICATED", True)
    assert secured.server.memory_peak() - before < 200 << 20  # 20 MiB of fields that nobody knows would take 260


def test_one_principal_cannot_take_the_last_places(fresh: Fresh) -> None:
    flags = ("--calls-max", "16", "--statements-max", "8", "--statement-wait-seconds-max", "3", "--drain-seconds-max", "1")
    made = fresh(*flags)
    endless = descriptor(wire.CommandStatementQuery("SELECT count(*) AS n FROM generate_series(1, 100000000000)"))
    options = made.options("stranger")

    def take() -> None:
        with flight.connect(made.server.uri) as client, contextlib.suppress(pa.ArrowException, OSError):
            client.do_get(client.get_flight_info(endless, options).endpoints[0].ticket, options).read_all()

    threads = [threading.Thread(target=take, daemon=True) for _ in range(20)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    with made.adbc("root") as connection:
        assert ask(connection, "SELECT 1 + count(*) AS n FROM system.topics")[0]["n"] >= 1


def test_an_append_under_way_when_its_right_is_taken_is_not_written(fresh: Fresh) -> None:
    made = fresh()
    sink = flight.FlightDescriptor.for_path("sink")
    with flight.connect(made.server.uri) as client:
        send(sink)(client, made.options("ann"), made)
        begun = transaction_of(client, made.options("ann"))
        update = wire.CommandStatementUpdate("INSERT INTO sink VALUES (7)", transaction_id=begun)
        send(update)(client, made.options("ann"), made)
        writer, _ = client.do_put(sink, ROWS_SCHEMA, made.options("ann"))
        writer.write_batch(BATCH)
        made.grants.write_text(GRANTS.replace('append = ["sink"]', ""))
        made.server.process.send_signal(signal.SIGHUP)
        assert eventually(lambda: "were read again" in made.server.errors.read_text())
        with pytest.raises(flight.FlightUnauthorizedError, match="'ann' has no permission 'append' for 'sink'; nothing was written"):
            writer.close()
        end = act("EndTransaction", wire.ActionEndTransactionRequest(begun, 1))
        assert status_of(lambda: end(client, made.options("ann"), made))[0] == DENIED
        assert client.get_flight_info(sink, made.options("root")).total_records == 2


def test_a_follower_is_let_go_when_its_token_is_removed(fresh: Fresh) -> None:
    made = fresh()
    opened = flight.FlightDescriptor.for_path("open_a")
    with flight.connect(made.server.uri) as client:
        send(opened)(client, made.options("root"), made)
        following = client.do_get(flight.Ticket(json.dumps({"topic": "open_a", "follow": True})), made.options("ann"))
        assert following.read_chunk().data.num_rows == 2
        remove_token(made.users, made.tokens["ann"].split("_")[1])
        time.sleep(1.5)
        send(opened)(client, made.options("root"), made)
        with pytest.raises(flight.FlightUnauthenticatedError, match="the credentials are not valid"):
            following.read_chunk()


def test_who_may_append_cannot_put_entries_in_the_place_of_a_view(fresh: Fresh) -> None:
    made = fresh()
    with flight.connect(made.server.uri) as client, made.adbc("root") as connection:
        ask(connection, "CREATE VIEW sink AS SELECT 1 AS a")
        for target in (flight.FlightDescriptor.for_path("sink"), wire.CommandStatementIngest(wire.TableDefinitionOptions(1, 2), "sink")):
            status, words = status_of(lambda target=target: send(target)(client, made.options("ann"), made))  # type: ignore[misc]
            assert (status, words.startswith("'sink' is a view; nothing was written")) == (INVALID, True)
        assert ask(connection, "SELECT * FROM sink") == [{"a": 1}]


def test_a_number_that_another_principal_has_taken_is_no_receipt(secured: Secured) -> None:
    """The entries of who comes second would be lost, though acknowledged."""

    def numbered(who: str, sequence: int, batch: pa.RecordBatch) -> None:
        headers = [(b"authorization", f"Bearer {secured.tokens[who]}".encode()), (b"oplog-producer", b"pipeline")]
        options = flight.FlightCallOptions(headers=[*headers, (b"oplog-sequence", str(sequence).encode())])
        writer, _ = client.do_put(flight.FlightDescriptor.for_path("sink"), batch.schema, options)
        writer.write_batch(batch)
        writer.close()

    with flight.connect(secured.server.uri) as client:
        numbered("ann", 0, BATCH)
        numbered("ann", 0, BATCH)  # her own, again
        numbered("root", 1, BATCH)
        status, words = status_of(lambda: numbered("ann", 1, BATCH))
    assert status == INVALID
    assert words.startswith(
        "topic 'sink': sequence 1 of producer 'pipeline' is another principal's; nothing was written; choose another name"
    )


def test_values_bound_to_a_query_are_refused_before_they_are_gathered(secured: Secured) -> None:
    with flight.connect(secured.server.uri) as client:
        handle = handle_of(client, secured.options("stranger"), "SELECT $1 AS a")
        large = pa.record_batch({"0": ["x" * (1 << 20)]})
        status, words = status_of(lambda: send(PREPARED(handle), large)(client, secured.options("stranger"), secured))
    assert (status, "more than parameter_bytes_max" in words) == (INVALID, True)


def test_lines_about_strangers_are_few(fresh: Fresh) -> None:
    made = fresh()
    with flight.connect(made.server.uri) as client:
        for _ in range(300):
            status_of(lambda: list(client.list_flights(options=made.options(None))))
        time.sleep(1.1)
        status_of(lambda: list(client.list_flights(options=made.options(None))))
    assert eventually(lambda: re.search(r"[0-9]+ more calls of strangers were refused", made.server.errors.read_text()) is not None)
    assert made.server.errors.read_text().count("UNAUTHENTICATED") < 100


def test_bytes_in_a_header_that_are_no_text_get_no_traceback(secured: Secured) -> None:
    with flight.connect(secured.server.uri) as client:
        for headers in ([(b"authorization", b"Bearer \xff\xfe")], [(b"x-any", b"\xff")]):
            with pytest.raises((pa.ArrowException, OSError)) as caught:
                list(client.list_flights(options=flight.FlightCallOptions(headers=headers)))
            assert "Traceback" not in str(caught.value)
            assert ".py" not in str(caught.value)


@pytest.mark.parametrize("grows", ["token", "cookie"])
def test_a_header_of_any_size_is_no_way_in(secured: Secured, grows: str) -> None:
    with flight.connect(secured.server.uri) as client:
        for size in (8100, 8300, 20_000, 1 << 20):
            header = (b"authorization", b"Bearer " + b"x" * size) if grows == "token" else (b"cookie", b"x" * size)
            with pytest.raises((pa.ArrowException, OSError)):
                list(client.list_flights(options=flight.FlightCallOptions(headers=[header])))
        assert status_of(lambda: list(client.list_flights(options=secured.options("root"))))[0] == OK


# Certificates of clients


def test_a_certificate_is_its_holders_name_and_nothing_else_is(tmp_path: Path) -> None:
    folder = tmp_path / "of"
    folder.mkdir()
    authority, strangers = Authority(folder), Authority(folder, "strangers")
    certificate, key = map(str, authority.server())
    (folder / "grants.toml").write_text(GRANTS + '[principal."spiffe://example.org/ann"]\nread = ["open_a"]\n')
    flags = (
        "--tls-cert",
        certificate,
        "--tls-key",
        key,
        "--client-ca",
        str(authority.certificate),
        "--grants",
        str(folder / "grants.toml"),
    )
    server = ServerProcess(tmp_path / "log", tmp_path / "errors", *flags)
    try:

        def connected(by: Authority, name: str, *uris: str) -> flight.FlightClient:
            chain, private = by.client(name, *uris)
            trusted = authority.certificate.read_bytes()
            return flight.connect(server.uri, tls_root_certs=trusted, cert_chain=chain.read_bytes(), private_key=private.read_bytes())

        def status(client: flight.FlightClient, headers: list[tuple[bytes, bytes]] | None = None) -> str:
            options = flight.FlightCallOptions(headers=headers or [], timeout=20)
            return status_of(lambda: client.get_flight_info(flight.FlightDescriptor.for_path("open_a"), options))[0]

        with connected(authority, "root") as client:
            for topic in ("open_a", "hidden"):
                writer, _ = client.do_put(flight.FlightDescriptor.for_path(topic), ROWS_SCHEMA)
                writer.write_batch(BATCH)
                writer.close()
            assert status(client) == OK
            found = client.get_flight_info(descriptor(wire.CommandStatementQuery("SELECT appends FROM records.open_a")))
            [row] = client.do_get(found.endpoints[0].ticket).read_all().to_pylist()
            assert row["appends"][0]["principal"] == "root"
        for name, uris, expected in (("ann", (), OK), ("nobody", (), NONE), ("any", ("spiffe://example.org/ann",), OK)):
            with connected(authority, name, *uris) as client:
                assert status(client) == expected, name
                assert status_of(lambda: client.get_flight_info(PATH))[0] == NONE
                assert status(client, [(b"authorization", b"Basic " + base64.b64encode(b"root:root's password"))]) == expected
        with connected(strangers, "root") as client, pytest.raises((pa.ArrowException, OSError)):
            client.get_flight_info(flight.FlightDescriptor.for_path("open_a"), flight.FlightCallOptions(timeout=5))
        trusted = authority.certificate.read_bytes()
        with flight.connect(server.uri, tls_root_certs=trusted) as client, pytest.raises((pa.ArrowException, OSError)):
            client.get_flight_info(flight.FlightDescriptor.for_path("open_a"), flight.FlightCallOptions(timeout=5))
    finally:
        server.stop()
