"""Real drivers against servers with TLS: how each logs in, and what it is told that it may and may not do.

Run by `make clients`, as test_clients.py is. Every name's rights are those of GRANTS, whatever it shows to prove itself.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import adbc_driver_flightsql.dbapi as adbc
import adbc_driver_manager
import jwt
import pyarrow as pa
import pytest
from certificates import Authority
from cryptography.hazmat.primitives.asymmetric import ec
from pyarrow import flight
from test_clients import HERE, LANGUAGES, Server, client

CAROL = "spiffe://example.org/carol"
GRANTS = f"""
[role.analyst]
read = ["orders"]

[role.till]
read = ["orders", "readings"]
append = ["orders", "readings", "storm"]

[principal.root]
read = ["*"]
append = ["*"]
admin = ["*"]

[principal.alice]
roles = ["analyst"]
append = ["notes"]

[principal.till-1]
roles = ["till"]

[principal."{CAROL}"]
read = ["*"]
"""
ISSUER, AUDIENCE, KEY_ID = "https://login.example.org", "flight-oplog", "key-1"
ORDERS = pa.record_batch({"id": [1, 2], "customer": ["ada", "grace"]})
SALARIES = pa.record_batch({"name": ["ada"], "salary": [5000.0]})
TLS = "adbc.flight.sql.client_option"
AUTHORIZATION = "adbc.flight.sql.authorization_header"
HIDDEN = "table 'oplog.public.salaries' does not exist; SELECT topic FROM system.topics lists them, quote names with capital letters"
INVALID = "the credentials are not valid; request N"
NOBODY = "this server asks who is calling: send a user's name and password, or a bearer token; request N"


def told(error: object) -> str:
    """Return what an error says, with N for the number of the request, which is another each time."""
    return re.sub(r"request [0-9a-f]{16}", "request N", str(error))


def basic(name: str, password: str) -> str:
    return base64.b64encode(f"{name}:{password}".encode()).decode()


class Realm:
    """Who is who: an authority, users, tokens, an issuer of JWTs and grants, in files of one folder. Nothing is fixed but names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority(folder)
        self.passwords = {name: secrets.token_urlsafe() for name in ("root", "alice", "till-1")}
        self.users = self.file("users.json", None)
        for name, password in self.passwords.items():
            self.command("user", "add", name, says=password)
        self._signing = ec.generate_private_key(ec.SECP256R1())

    def file(self, name: str, text: str | None) -> str:
        """Return the path of a file with this text."""
        path = self.folder / name
        if text is not None:
            path.write_text(text)
        return str(path)

    def command(self, *arguments: str, says: str = "") -> str:
        """Run one of the commands for users and tokens, as whoever keeps them does, and return what it printed."""
        command = [sys.executable, "-m", "flight_oplog", *arguments, "--users", self.users]
        done = subprocess.run(command, input=says + "\n", capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def token(self, principal: str) -> str:
        return self.command("token", "add", principal)

    def bearer(self, name: str, *roles: str, seconds: float = 600, **claims: Any) -> str:
        """Return a JWT that the issuer signed."""
        body = {"iss": ISSUER, "aud": AUDIENCE, "sub": name, "exp": int(time.time() + seconds), "roles": list(roles)} | claims
        return jwt.encode(body, self._signing, "ES256", headers={"kid": KEY_ID})

    @cached_property
    def tls(self) -> list[str]:
        """The flags of a server with TLS and grants."""
        certificate, key = map(str, self.authority.server())
        return ["--tls-cert", certificate, "--tls-key", key, "--grants", self.file("grants.toml", GRANTS)]

    @cached_property
    def with_bearers(self) -> list[str]:
        key = jwt.algorithms.ECAlgorithm.to_jwk(self._signing.public_key(), as_dict=True) | {"kid": KEY_ID, "alg": "ES256", "use": "sig"}
        keys = self.file("keys.json", json.dumps({"keys": [key]}))
        return [*self.tls, "--users", self.users, "--jwt-keys", keys, "--jwt-issuer", ISSUER, "--jwt-audience", AUDIENCE]

    @cached_property
    def with_certificates(self) -> list[str]:
        return [*self.tls, "--client-ca", str(self.authority.certificate)]

    @cached_property
    def authorities(self) -> str:
        return self.authority.certificate.read_text()

    def certified(self, name: str, *uris: str) -> tuple[str, str]:
        """Return the texts of a client's certificate and key."""
        certificate, key = self.authority.client(name, *uris)
        return certificate.read_text(), key.read_text()

    def adbc(self, **more: str) -> dict[str, str]:
        """Return the options of an ADBC connection that trusts the authority."""
        return {f"{TLS}.tls_root_certs": self.authorities} | more

    def by_password(self, name: str) -> dict[str, str]:
        return self.adbc(username=name, password=self.passwords[name])

    def by_bearer(self, bearer: str) -> dict[str, str]:
        return self.adbc(**{AUTHORIZATION: f"Bearer {bearer}"})

    def by_certificate(self, name: str, *uris: str) -> dict[str, str]:
        certificate, key = self.certified(name, *uris)
        return self.adbc(**{f"{TLS}.mtls_cert_chain": certificate, f"{TLS}.mtls_private_key": key})

    def flight(self, server: Server, **more: Any) -> flight.FlightClient:
        return flight.connect(server.uri, tls_root_certs=self.authorities, **more)


@pytest.fixture(scope="module")
def realm(tmp_path_factory: pytest.TempPathFactory) -> Realm:
    return Realm(tmp_path_factory.mktemp("realm"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start a server on a log of its own."""
    started: list[Server] = []

    def run(flags: list[str]) -> Server:
        started.append(Server(tmp_path / f"log-{len(started)}", *flags))
        return started[-1]

    yield run
    for server in started:
        server.stop()


def fill(uri: str, options: Mapping[str, str]) -> None:
    """Write what is asked for in these tests, as somebody who may."""
    with adbc.connect(uri, options, autocommit=True) as connection, connection.cursor() as cursor:
        cursor.adbc_ingest("orders", ORDERS, mode="create")
        cursor.adbc_ingest("salaries", SALARIES, mode="create")


@pytest.fixture(scope="module")
def bearers(realm: Realm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that takes passwords, API tokens and JWTs, with topics that it is read from."""
    server = Server(tmp_path_factory.mktemp("bearers") / "log", *realm.with_bearers)
    fill(server.uri, realm.by_password("root"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def certificates(realm: Realm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that takes certificates, with the same topics."""
    server = Server(tmp_path_factory.mktemp("certificates") / "log", *realm.with_certificates)
    fill(server.uri, realm.by_certificate("root"))
    yield server
    server.stop()


# Every language


def by_password(realm: Realm) -> dict[str, str]:
    return {"OPLOG_USER": "till-1", "OPLOG_PASSWORD_FILE": realm.file("password", realm.passwords["till-1"] + "\n")}


def by_token(realm: Realm) -> dict[str, str]:
    return {"OPLOG_TOKEN_FILE": realm.file("token", realm.token("till-1") + "\n")}


def by_jwt(realm: Realm) -> dict[str, str]:
    return {"OPLOG_TOKEN_FILE": realm.file("jwt", realm.bearer("somebody", "till"))}


def by_certificate(realm: Realm) -> dict[str, str]:
    certificate, key = realm.authority.client("till-1")
    return {"OPLOG_CERT": str(certificate), "OPLOG_KEY": str(key)}


@pytest.mark.parametrize("login", [by_password, by_token, by_jwt, by_certificate], ids=lambda login: login.__name__)
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_client_reproduces_the_transcript_when_it_has_logged_in(
    realm: Realm, start: Callable[..., Server], language: str, login: Callable[[Realm], dict[str, str]]
) -> None:
    server = start(realm.with_certificates if login is by_certificate else realm.with_bearers)
    environment = login(realm) | {"OPLOG_CA": str(realm.authority.certificate)}
    assert client(language, server.uri, login=environment) == (HERE / "transcript.txt").read_text()
    assert client(language, server.uri, "storm", "100", login=environment) == "storm: 100 appends acknowledged\n"


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_client_that_shows_nothing_is_told_what_is_missing(realm: Realm, bearers: Server, language: str) -> None:
    with pytest.raises(AssertionError, match="this server asks who is calling"):
        client(language, bearers.uri, login={"OPLOG_CA": str(realm.authority.certificate)})


# JDBC


def connection_properties(realm: Realm, name: str, properties: Mapping[str, str]) -> str:
    """Return the file of a login, as Secured.java reads it."""
    return realm.file(name, "".join(f"{key}={value}\n" for key, value in properties.items()))


@pytest.mark.skipif(not (HERE / "java" / "run").exists(), reason="there is no Java client")
def test_a_jdbc_login_sees_and_does_what_it_is_granted(realm: Realm, start: Callable[..., Server]) -> None:
    server = start(realm.with_bearers)
    fill(server.uri, realm.by_password("root"))
    trusting = {"tlsRootCerts": str(realm.authority.certificate)}
    store_password = secrets.token_urlsafe()
    # The driver asks the system's own trust store, with the password of the other one, unless it is told not to.
    store = {"useSystemTrustStore": "false", "trustStore": str(realm.authority.trust_store(store_password))}
    alice = {"user": "alice", "password": realm.passwords["alice"]}
    logins = {
        "alice-password": alice | trusting,
        "alice-trust-store": alice | store | {"trustStorePassword": store_password},
        "alice-wrong-password": alice | trusting | {"password": realm.passwords["root"]},
        "alice-trusts-others": alice,
        "alice-token": {"token": realm.token("alice")} | trusting,
        "alice-token-as-password": {"user": "alice", "password": realm.token("alice")} | trusting,
        "dora-jwt": {"token": realm.bearer("dora", "analyst")} | trusting,
        "dora-jwt-expired": {"token": realm.bearer("dora", "analyst", seconds=-600)} | trusting,
        "nobody": trusting,
        "root-token": {"token": realm.token("root")} | trusting,
    }
    files = [connection_properties(realm, name, properties) for name, properties in logins.items()]
    assert told(client("java", server.uri, "secured", *files)) == (HERE / "java" / "expected-secured.txt").read_text()


@pytest.mark.skipif(not (HERE / "java" / "run").exists(), reason="there is no Java client")
def test_jdbc_logs_in_as_the_readme_says(realm: Realm, start: Callable[..., Server]) -> None:
    server = start(realm.with_bearers)
    fill(server.uri, realm.by_password("root"))
    expected = (HERE / "java" / "expected-secured.txt").read_text()
    of_alice = expected[expected.index("alice-password\n") : expected.index("alice-trust-store\n")]
    [url] = re.findall(r"^jdbc:\S+$", (HERE.parent / "README.md").read_text(), re.MULTILINE)
    for written, here in (
        ("localhost:8815", server.uri.removeprefix("grpc+tls://")),
        ("cert.pem", str(realm.authority.certificate)),
        ("user=ann", "user=alice"),
        ("...", realm.passwords["alice"]),
    ):
        assert written in url
        url = url.replace(written, here)
    assert client("java", server.uri, "secured", connection_properties(realm, "alice-password", {"url": url})) == of_alice


@pytest.mark.skipif(not (HERE / "java" / "run").exists(), reason="there is no Java client")
def test_a_jdbc_login_may_be_a_certificate(realm: Realm, certificates: Server) -> None:
    certificate, key = map(str, realm.authority.client("alice"))
    trusting = {"tlsRootCerts": str(realm.authority.certificate)}
    alice = connection_properties(realm, "alice-certificate", trusting | {"clientCertificate": certificate, "clientKey": key})
    nobody = connection_properties(realm, "nobody", trusting)
    expected = (HERE / "java" / "expected-secured.txt").read_text()
    of_alice = expected[expected.index("alice-password\n") : expected.index("alice-trust-store\n")]
    printed = client("java", certificates.uri, "secured", alice, nobody)
    assert printed.startswith(of_alice.replace("alice-password", "alice-certificate") + "nobody\n  refused: ")
    assert "entries" not in printed.partition("nobody")[2]


# ADBC


def rows(uri: str, options: Mapping[str, str], sql: str = "SELECT customer FROM orders ORDER BY id") -> list[tuple[Any, ...]]:
    with adbc.connect(uri, options, autocommit=True) as connection, connection.cursor() as cursor:
        cursor.execute(sql)
        found: list[tuple[Any, ...]] = cursor.fetchall()
        return found


@pytest.mark.parametrize("form", ["grpc+tls://{}", "flightsql://{}", "flightsql://{}?transport=tls"])
@pytest.mark.parametrize("kind", ["password", "password in a header", "token", "token as password", "jwt"])
def test_adbc_logs_in(realm: Realm, bearers: Server, form: str, kind: str) -> None:
    options = {
        "password": lambda: realm.by_password("alice"),
        "password in a header": lambda: realm.adbc(**{AUTHORIZATION: f"Basic {basic('alice', realm.passwords['alice'])}"}),
        "token": lambda: realm.by_bearer(realm.token("alice")),
        "token as password": lambda: realm.adbc(username="alice", password=realm.token("alice")),
        "jwt": lambda: realm.by_bearer(realm.bearer("dora", "analyst")),
    }[kind]()
    assert rows(form.format(bearers.address), options) == [("ada",), ("grace",)]


@pytest.mark.parametrize("form", ["grpc+tls://{}", "flightsql://{}"])
def test_adbc_shows_a_certificate(realm: Realm, certificates: Server, form: str) -> None:
    assert rows(form.format(certificates.address), realm.by_certificate("alice")) == [("ada",), ("grace",)]


@pytest.mark.parametrize(
    ("name", "password"), [("alice", "one that it is not"), ("alice", ""), ("nobody of this name", "one that it is not"), ("", "x")]
)
def test_adbc_is_told_no_more_than_that_a_login_is_wrong(realm: Realm, bearers: Server, name: str, password: str) -> None:
    with pytest.raises(adbc.ProgrammingError) as caught:
        rows(bearers.uri, realm.adbc(username=name, password=password))
    assert told(caught.value).startswith(f"UNAUTHENTICATED: [FlightSQL] {INVALID}")


def test_adbc_is_told_what_is_wrong_with_a_bearer(realm: Realm, bearers: Server) -> None:
    other = jwt.encode({"iss": ISSUER, "aud": AUDIENCE, "sub": "root", "exp": int(time.time() + 600)}, secrets.token_bytes(32), "HS256")
    for bearer, words in (
        (realm.bearer("dora", "analyst", seconds=-600), "the bearer has expired; ask its issuer for another; request N"),
        (realm.bearer("dora", "analyst", aud="another"), INVALID),
        (realm.bearer("dora", "analyst", iss="another"), INVALID),
        (other, INVALID),
        (realm.token("alice")[:-1], INVALID),
    ):
        with pytest.raises(adbc.ProgrammingError) as caught:
            rows(bearers.uri, realm.by_bearer(bearer))
        assert told(caught.value).startswith(f"UNAUTHENTICATED: [FlightSQL] {words}")
    with pytest.raises(adbc.ProgrammingError) as caught:
        rows(bearers.uri, realm.adbc())
    assert told(caught.value).startswith(f"UNAUTHENTICATED: [FlightSQL] {NOBODY}")


def test_adbc_does_not_talk_to_a_server_that_nobody_vouches_for(realm: Realm, bearers: Server, tmp_path: Path) -> None:
    another = Authority(tmp_path, "another").certificate.read_text()
    for options in ({}, {f"{TLS}.tls_root_certs": another}):
        with pytest.raises(adbc.OperationalError, match="certificate signed by unknown authority"):
            rows(bearers.uri, options | {"username": "alice", "password": realm.passwords["alice"]})


def test_a_server_does_not_talk_to_a_client_that_nobody_vouches_for(realm: Realm, certificates: Server, tmp_path: Path) -> None:
    certificate, key = Authority(tmp_path, "another").client("root")
    stranger = realm.adbc(**{f"{TLS}.mtls_cert_chain": certificate.read_text(), f"{TLS}.mtls_private_key": key.read_text()})
    for options in (stranger, realm.adbc(), realm.by_password("root"), realm.by_bearer(realm.token("root"))):
        with pytest.raises(adbc.OperationalError):
            rows(certificates.uri, options, "SELECT 1")


@pytest.mark.parametrize("kind", ["password", "certificate"])
def test_adbc_sees_and_does_what_is_granted(realm: Realm, start: Callable[..., Server], kind: str) -> None:
    server = start(realm.with_bearers if kind == "password" else realm.with_certificates)
    login = realm.by_password if kind == "password" else realm.by_certificate
    fill(server.uri, login("root"))
    with adbc.connect(server.uri, login("alice"), autocommit=True) as connection, connection.cursor() as cursor:
        [catalog] = connection.adbc_get_objects(depth="all").read_all().to_pylist()
        seen = {
            table["table_name"]: [column["column_name"] for column in table["table_columns"]]
            for schema in catalog["catalog_db_schemas"]
            if schema["db_schema_name"] == "public"
            for table in schema["db_schema_tables"]
        }
        assert seen == {"orders": ["id", "customer"]}
        with pytest.raises(adbc_driver_manager.ProgrammingError, match=r"(?i)not.?found"):
            connection.adbc_get_table_schema("salaries")

        for sql in ("SELECT * FROM salaries", "INSERT INTO salaries VALUES ('grace', 6000)"):
            with pytest.raises(adbc.ProgrammingError) as caught:
                cursor.execute(sql)
            assert str(caught.value).startswith(f"NOT_FOUND: [FlightSQL] {HIDDEN}")

        def refused(permission: str, topic: str) -> str:
            return f"UNAUTHORIZED: [FlightSQL] 'alice' has no permission {permission!r} for {topic!r}; nothing was written"

        for sql, words in (
            ("INSERT INTO orders VALUES (3, 'edsger')", refused("append", "orders")),
            ("CREATE TABLE notes (text VARCHAR)", refused("admin", "notes")),
            ("DROP TABLE orders", refused("admin", "orders")),
        ):
            with pytest.raises(adbc.ProgrammingError) as caught:
                cursor.execute(sql)
            assert str(caught.value).startswith(words)
        with pytest.raises(adbc.ProgrammingError) as caught:
            cursor.adbc_ingest("salaries", SALARIES, mode="append")
        assert str(caught.value).startswith(refused("append", "salaries"))

        assert cursor.adbc_ingest("notes", pa.table({"text": ["by alice"]}), mode="create") == 1
        with pytest.raises(adbc.ProgrammingError, match="NOT_FOUND"):  # it may write there, and not read
            cursor.execute("SELECT * FROM notes")
    everything = "SELECT topic, entries FROM system.topics WHERE topic NOT LIKE '\\_%' ORDER BY topic"
    assert rows(server.uri, login("root"), everything) == [("notes", 1), ("orders", 2), ("salaries", 1)]
    who = "SELECT appends[1]['principal'] FROM records.notes"
    assert rows(server.uri, login("root"), who) == [("alice",)]


def test_a_certificate_stands_for_the_first_of_its_other_names(realm: Realm, certificates: Server) -> None:
    carol = realm.by_certificate("root", CAROL)
    assert rows(certificates.uri, carol, "SELECT name FROM salaries") == [("ada",)]
    with pytest.raises(adbc.ProgrammingError) as caught:
        rows(certificates.uri, carol, "INSERT INTO salaries VALUES ('grace', 6000)")
    assert str(caught.value).startswith(f"UNAUTHORIZED: [FlightSQL] '{CAROL}' has no permission 'append' for 'salaries'")


def test_a_user_that_is_removed_is_out_where_it_was_logged_in(realm: Realm, bearers: Server) -> None:
    realm.command("user", "add", "erin", says=secrets.token_urlsafe())
    password = secrets.token_urlsafe()
    assert realm.command("user", "add", "erin", says=password) == "user erin: has another password"
    with adbc.connect(bearers.uri, realm.adbc(username="erin", password=password), autocommit=True) as connection:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            assert cursor.fetchall() == [(1,)]
        realm.command("user", "remove", "erin")
        words = "the login is not good any more: the user is gone, or has another password; log in again; request N"
        deadline = time.monotonic() + 30
        with pytest.raises(adbc.ProgrammingError) as caught, connection.cursor() as cursor:
            while time.monotonic() < deadline:
                cursor.execute("SELECT 2")
                cursor.fetchall()
        assert told(caught.value).startswith(f"UNAUTHENTICATED: [FlightSQL] {words}")


# Logins together with what else a connection has

COOKIES = {"adbc.flight.sql.rpc.with_cookie_middleware": "true"}


@pytest.mark.parametrize("kind", ["password", "password and cookies", "token", "certificate"])
def test_a_transaction_of_adbc_is_one_with_a_login(realm: Realm, start: Callable[..., Server], kind: str) -> None:
    server = start(realm.with_certificates if kind == "certificate" else realm.with_bearers)
    root = {
        "password": lambda: realm.by_password("root"),
        "password and cookies": lambda: realm.by_password("root") | COOKIES,
        "token": lambda: realm.by_bearer(realm.token("root")),
        "certificate": lambda: realm.by_certificate("root"),
    }[kind]()
    fill(server.uri, root)
    with adbc.connect(server.uri, root) as connection, connection.cursor() as cursor:
        more = pa.table({"id": [3], "customer": ["edsger"]})
        cursor.adbc_ingest("orders", more, mode="append")
        connection.rollback()
        cursor.adbc_ingest("orders", more, mode="append")
        cursor.adbc_ingest("salaries", SALARIES, mode="append")
        assert rows(server.uri, root) == [("ada",), ("grace",)]
        connection.commit()
    assert rows(server.uri, root) == [("ada",), ("grace",), ("edsger",)]
    assert rows(server.uri, root, "SELECT count(*) FROM salaries") == [(2,)]


def test_options_of_a_session_stay_with_a_login_that_keeps_cookies(realm: Realm, bearers: Server) -> None:
    with adbc.connect(bearers.uri, realm.by_password("root") | COOKIES, autocommit=True) as connection:
        connection.adbc_current_db_schema = "system"
        assert connection.adbc_current_db_schema == "system"
        with connection.cursor() as cursor:
            cursor.execute("SELECT topic FROM topics WHERE topic = 'orders'")
            assert cursor.fetchall() == [("orders",)]


# pyarrow.flight, and the handshake itself


class Handshake(flight.ClientAuthHandler):
    """The older way to log in: the handshake says the name and the password, and is answered with a token."""

    def __init__(self, name: str, password: str) -> None:
        super().__init__()
        self._basic = flight.BasicAuth(name, password)
        self.token = b""

    def authenticate(self, outgoing: Any, incoming: Any) -> None:
        outgoing.write(self._basic.serialize())
        self.token = incoming.read()

    def get_token(self) -> bytes:
        return self.token


class Received(flight.ClientMiddlewareFactory):
    """Keeps what each call was answered in the header `authorization`."""

    def __init__(self) -> None:
        self.bearers: list[str] = []

    def start_call(self, info: Any) -> flight.ClientMiddleware:
        received = self

        class Keeping(flight.ClientMiddleware):
            def received_headers(self, headers: dict[str, list[str]]) -> None:
                received.bearers += headers.get("authorization", [])

        return Keeping()


def sending(authorization: str | bytes) -> flight.FlightCallOptions:
    value = authorization.encode() if isinstance(authorization, str) else authorization
    return flight.FlightCallOptions(headers=[(b"authorization", value)])


def topics(connected: flight.FlightClient, options: flight.FlightCallOptions | None = None) -> list[str]:
    return [info.descriptor.path[0].decode() for info in connected.list_flights(options=options)]


def test_pyarrow_logs_in_by_a_header_that_is_answered_with_a_bearer(realm: Realm, bearers: Server) -> None:
    with realm.flight(bearers) as connected:
        name, bearer = connected.authenticate_basic_token("alice", realm.passwords["alice"])
        assert (name, bearer[:7]) == (b"authorization", b"Bearer ")
        assert topics(connected, sending(bearer)) == ["orders"]
        with pytest.raises(flight.FlightUnauthenticatedError) as caught:
            connected.authenticate_basic_token("alice", realm.passwords["root"])
        assert told(caught.value).startswith(INVALID)


def test_pyarrow_logs_in_by_what_the_handshake_says(realm: Realm, bearers: Server) -> None:
    with realm.flight(bearers) as connected:
        connected.authenticate(Handshake("alice", realm.passwords["alice"]))
        assert topics(connected) == ["orders"]
    with realm.flight(bearers) as connected:
        connected.authenticate(Handshake("anything", realm.token("alice")))
        assert topics(connected) == ["orders"]
    with realm.flight(bearers) as connected:
        with pytest.raises(flight.FlightUnauthenticatedError, match="the credentials are not valid"):
            connected.authenticate(Handshake("alice", realm.passwords["root"]))
        with pytest.raises(flight.FlightUnauthenticatedError, match="this server asks who is calling"):
            topics(connected)


def test_pyarrow_sends_a_bearer_with_each_call(realm: Realm, bearers: Server) -> None:
    received = Received()
    with realm.flight(bearers, middleware=[received]) as connected:
        for bearer in (realm.token("alice"), realm.bearer("dora", "analyst")):
            assert topics(connected, sending(f"Bearer {bearer}")) == ["orders"]
        with pytest.raises(flight.FlightUnauthenticatedError) as caught:
            topics(connected)
        assert told(caught.value).startswith(NOBODY)
    assert received.bearers == []  # whoever sends a bearer is not given another


def test_pyarrow_shows_a_certificate(realm: Realm, certificates: Server) -> None:
    certificate, key = realm.certified("alice")
    with realm.flight(certificates, cert_chain=certificate, private_key=key) as connected:
        assert topics(connected) == ["orders"]
        with pytest.raises(flight.FlightUnauthorizedError, match="'alice' has no permission 'append' for 'orders'"):
            put(connected, "orders")
    with realm.flight(certificates) as connected, pytest.raises(flight.FlightUnavailableError):
        topics(connected)


def put(connected: flight.FlightClient, topic: str) -> None:
    writer, _ = connected.do_put(flight.FlightDescriptor.for_path(topic), ORDERS.schema)
    with writer:
        writer.write_batch(ORDERS)


@pytest.mark.parametrize("padding", ["=", ""], ids=["with padding", "without padding"])
def test_a_password_may_come_with_each_call_as_go_sends_it(realm: Realm, bearers: Server, padding: str) -> None:
    said = basic("alice", realm.passwords["alice"])
    assert said.endswith("="), "there is no padding to leave out"
    received = Received()
    with realm.flight(bearers, middleware=[received]) as connected:
        for _ in range(3):
            assert topics(connected, sending(f"Basic {said if padding else said.rstrip('=')}")) == ["orders"]
    assert received.bearers == []  # ADBC's driver would send it beside the password


def test_a_call_with_two_credentials_is_refused(realm: Realm, bearers: Server) -> None:
    tokens = [f"Bearer {realm.token(name)}".encode() for name in ("alice", "root")]
    options = flight.FlightCallOptions(headers=[(b"authorization", token) for token in tokens])
    with realm.flight(bearers) as connected, pytest.raises(flight.FlightUnauthenticatedError, match="more than one credential"):
        topics(connected, options)
