"""The settings table. Flags, environment variables, file keys, `flight-oplog config` and the README's table derive
from the fields of `Config`; nothing else in the package reads the environment.

A setting comes from, first match wins: a command-line flag, `FLIGHT_OPLOG_<NAME>`, the TOML file, the default.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flight_oplog.errors import RequestError

MIB = 1 << 20
NUMBER_MAX = 1 << 40  # no limit needs more, and seconds beyond it overflow the system's clocks
FILE_BYTES_MAX = 1 * MIB
ENVIRONMENT_PREFIX = "FLIGHT_OPLOG_"


def setting(default: Any, help: str, *, least: int | None = None, choices: tuple[str, ...] | None = None, is_place: bool = False) -> Any:
    """Declare a setting; one that is a place on the server's disk is not shown to its clients."""
    return dataclasses.field(default=default, metadata={"help": help, "least": least, "choices": choices, "is_place": is_place})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting, its default and what it means. Immutable; a change is `dataclasses.replace`."""

    data: str = setting("oplog-data", "folder or s3://bucket/prefix that holds the log; created when it does not exist", is_place=True)
    listen: str = setting("grpc://127.0.0.1:8815", "address to serve on; port 0 picks a free one")
    tls_cert: str = setting("", "PEM file of the certificate, and those above it, to serve TLS with", is_place=True)
    tls_key: str = setting("", "PEM file of the certificate's key", is_place=True)
    client_ca: str = setting(
        "", "PEM file of authorities: every client shows a certificate of theirs, whose name is its principal", is_place=True
    )
    users: str = setting("", "file of users and API tokens; see flight-oplog user, flight-oplog token", is_place=True)
    jwt_keys: str = setting("", "file or https:// address of the keys (JWKS) that JWT bearers are signed with", is_place=True)
    jwt_issuer: str = setting("", "whom JWT bearers must be from: their claim iss")
    jwt_audience: str = setting("", "for whom JWT bearers must be: their claim aud")
    jwt_principal_claim: str = setting("sub", "claim of a JWT bearer that names its principal")
    jwt_roles_claim: str = setting("roles", "claim of a JWT bearer that names its roles, a.b for one within another")
    jwt_skew_seconds: int = setting(60, "how far the clock of who signs JWT bearers may be from this one's", least=0)
    login_seconds_max: int = setting(12 * 3600, "the bearer that a login with a password returns is good this long", least=1)
    secret: str = setting(
        "", "file of the secret that tickets, handles and logins are signed with; without one, the log's own", is_place=True
    )
    grants: str = setting("", "TOML file of who may do what; without one, who has credentials may do everything", is_place=True)
    insecure: bool = setting(False, "serve beyond loopback without TLS or without credentials")
    compression: str = setting(
        "auto", "compression inside new records; auto is lz4 where it saves at least a fifth", choices=("auto", "none", "lz4", "zstd")
    )
    schema_rule: str = setting("additive", "how topics evolve", choices=("additive", "strict"))
    record_bytes_max: int = setting(16 * MIB, "entries gathered in one record, bytes in memory", least=1)
    record_entries_max: int = setting(1 << 20, "entries gathered in one record", least=1)
    batch_bytes_max: int = setting(256 * MIB, "one batch a client may send, bytes in memory", least=1)
    batch_entries_max: int = setting(1 << 24, "one batch a client may send, entries", least=1)
    append_bytes_max: int = setting(64 << 30, "one append, bytes in memory summed over its batches", least=1)
    queue_bytes_max: int = setting(256 * MIB, "entries held in memory for appends under way; past it they spill", least=1)
    appends_in_flight_max: int = setting(1024, "appends of one stream under way before reading goes on", least=1)
    columns_max: int = setting(2000, "columns of one topic, nested fields counted", least=1)
    topics_max: int = setting(10_000, "topics of one log", least=1)
    sql_bytes_max: int = setting(1 * MIB, "one SQL text", least=1)
    sql_operators_max: int = setting(1000, "operators and joining words of one SQL text; deeper trees overflow the stack", least=1)
    sql_tables_max: int = setting(100, "tables that one SQL text may read or join; planning time grows with their square", least=1)
    views_max: int = setting(1000, "views of one log", least=1)
    parameter_bytes_max: int = setting(1 * MIB, "values bound to one query, which travel in its handle", least=1)
    parameter_rows_max: int = setting(1000, "rows of values bound to one query, which runs once for each", least=1)
    calls_max: int = setting(256, "calls served at once; the next one is refused as UNAVAILABLE", least=1)
    statement_seconds_max: int = setting(3600, "one query, first batch to last", least=1)
    statement_bytes_max: int = setting(2048 * MIB, "memory of one query's sorts, joins and aggregates; past it they spill", least=1)
    spill_bytes_max: int = setting(16384 * MIB, "disk that one query may spill to, in the temporary folder; more is refused", least=0)
    statements_max: int = setting(64, "statements that run at once; the next ones wait", least=1)
    statements_waiting_max: int = setting(128, "statements that wait for their turn; the next one is refused as UNAVAILABLE", least=0)
    statement_wait_seconds_max: int = setting(30, "a statement waits this long for its turn", least=0)
    transactions_max: int = setting(1000, "transactions that hold appends at once", least=1)
    transaction_appends_max: int = setting(10_000, "appends of one transaction", least=1)
    transaction_seconds_max: int = setting(300, "a transaction that holds appends is rolled back after this long", least=1)
    ticket_seconds_max: int = setting(3600, "a query's ticket can be redeemed this long", least=1)
    keep_alive_seconds: int = setting(20, "a follower with nothing to send says so this often", least=1)
    message_bytes_max: int = setting(3 * MIB, "one result batch on the wire; clients refuse more than 4 MiB", least=1)
    cache_bytes_max: int = setting(
        256 * MIB, "decoded columns and indexes kept in memory; columns of mapped files take next to none", least=0
    )
    state_bytes_max: int = setting(64 * MIB, "what is kept of aggregates that were asked before", least=0)
    mapped_bytes_max: int = setting(
        384 * MIB,
        "files of a local disk mapped into memory; 0 reads them: a mapped disk that fails in use ends the server",
        least=0,
    )
    refresh_ms: int = setting(500, "what another server committed to an object store is seen this much later at most", least=0)
    log_format: str = setting("text", "how the server's log is written: for people, or as one JSON object a line", choices=("text", "json"))
    log_calls: str = setting("failed", "calls that the server's log has a line for", choices=("none", "failed", "all"))
    drain_seconds_max: int = setting(30, "calls under way may finish this long after SIGTERM", least=0)

    def __post_init__(self) -> None:
        for field in SETTINGS:
            _check(field, getattr(self, field.name))


SETTINGS: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(Config)
_NAMES = frozenset(field.name for field in SETTINGS)


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    wanted = type(field.default)
    if type(value) is not wanted:
        raise RequestError(f"setting {field.name}: {value!r} is not of type {wanted.__name__}")
    least, choices = field.metadata["least"], field.metadata["choices"]
    if least is not None and value < least:
        raise RequestError(f"setting {field.name}: {value} is less than {least}")
    if isinstance(value, int) and value > NUMBER_MAX:
        raise RequestError(f"setting {field.name}: {value} is more than {NUMBER_MAX}")
    if choices is not None and value not in choices:
        raise RequestError(f"setting {field.name}: {value!r} is not one of {', '.join(choices)}")


def parse(field: dataclasses.Field[Any], text: str) -> Any:
    """Read one setting from text, as a flag or an environment variable gives it."""
    try:
        if isinstance(field.default, bool):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        return int(text) if isinstance(field.default, int) else text
    except (KeyError, ValueError):
        raise RequestError(f"setting {field.name}: {text!r} is not of type {type(field.default).__name__}") from None


def load(flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ, file: str | None = None) -> Config:
    """Resolve the settings. `flags` holds only what was given on the command line.

    Raises RequestError that names the setting for an unknown key, a wrong type or a value out of range.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values.update(_read_file(file))
    for field in SETTINGS:
        if (text := environment.get(ENVIRONMENT_PREFIX + field.name.upper())) is not None:
            values[field.name] = parse(field, text)
    for name in environment:
        if name.startswith(ENVIRONMENT_PREFIX) and name.removeprefix(ENVIRONMENT_PREFIX).lower() not in _NAMES:
            raise RequestError(f"environment variable {name}: there is no such setting")
    values.update(flags)
    return Config(**values)


def provide_engine_threads() -> None:
    """Give DataFusion more threads than there are cores. Call before its first use; a number already set stands.

    A nested-loop join may run for minutes without a pause in which it could be stopped, and keeps its thread that
    long. With a thread for each core, DataFusion's default, two such queries would hold up everybody.
    """
    os.environ.setdefault("TOKIO_WORKER_THREADS", str(16 + 2 * (os.cpu_count() or 1)))


def read_bytes(what: str, file: str, most: int = FILE_BYTES_MAX) -> bytes:
    """Read a file that a setting names; `what` says what it is. Raises RequestError when it cannot be read or has more bytes."""
    try:
        with open(file, "rb") as stream:
            found = stream.read(most + 1)
    except OSError as error:
        raise RequestError(f"{what} {file}: {error.strerror}") from None
    if len(found) > most:
        raise RequestError(f"{what} {file}: more than {most} bytes")
    return found


def read_toml(what: str, file: str) -> dict[str, Any]:
    """Read a TOML file that a setting names. Raises RequestError that says what is wrong with it."""
    try:
        return tomllib.loads(read_bytes(what, file).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"{what} {file}: {error}") from None


def _read_file(file: str) -> dict[str, Any]:
    values = read_toml("settings file", file)
    for name in values:
        if name not in _NAMES:
            raise RequestError(f"settings file {file}: there is no setting {name!r}")
    return values
