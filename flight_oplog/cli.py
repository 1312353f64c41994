"""The commands a person types. Exit codes: 0 done, 1 refused or damaged, 2 wrong usage; errors are one line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import getpass
import os
import resource
import secrets
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from flight_oplog import __version__, logs
from flight_oplog.accounts import Accounts, add_token, add_user, remove_token, remove_user
from flight_oplog.auth import Gate
from flight_oplog.client import Client, Login
from flight_oplog.config import SETTINGS, Config, load, parse
from flight_oplog.errors import OplogError, RequestError, TryAgain, Unauthenticated
from flight_oplog.listening import check_listen, check_tls, is_private, lacking
from flight_oplog.oplog import OpLog
from flight_oplog.printing import PRINTERS, console, print_json, print_table
from flight_oplog.server import Server
from flight_oplog.sql.engine import Engine
from flight_oplog.store import Store

DEFAULT_SERVER = "grpc://127.0.0.1:8815"
ROWS_SHOWN = 100
TOKEN_DAYS = 90.0
AGAIN_SECONDS = 1.0
GARBAGE_OBJECTS = 50_000
# A file may be published, and its commit not be there yet: twice as long as it is taken to be fresh.
ORPHAN_SECONDS_LEAST = 120


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    logs.begin("text")
    try:
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except OplogError as error:
        print(f"flight-oplog: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # somebody closed our output, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flight-oplog", description="An append-only operation log: Arrow in, Delta underneath, SQL out.")
    parser.add_argument("--version", action="version", version=f"flight-oplog {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve a log over Arrow Flight and Flight SQL")
    _add_settings(serve, [field.name for field in SETTINGS])
    serve.set_defaults(command=_serve)

    sql = commands.add_parser("sql", help="run a query and print its result")
    sql.add_argument("query")
    sql.add_argument("--format", choices=("table", "csv", "json", "arrow"), default="table", help="how to print (default: table)")
    sql.add_argument("--rows", type=int, default=ROWS_SHOWN, help=f"rows a table shows at most (default: {ROWS_SHOWN})")
    _add_where(sql)
    sql.set_defaults(command=_sql)

    ingest = commands.add_parser("ingest", help="append files to a topic: Parquet, CSV, NDJSON, Arrow; each file is one append")
    ingest.add_argument("topic")
    ingest.add_argument("files", nargs="+", metavar="FILE")
    _add_server(ingest, ingest)
    ingest.set_defaults(command=_ingest)

    tail = commands.add_parser("tail", help="print a topic's entries in order, one JSON object a line; --follow waits for more")
    tail.add_argument("topic")
    tail.add_argument("--follow", action="store_true", help="go on with every commit as it lands, across restarts of the server")
    tail.add_argument("--from", dest="start", default="earliest", metavar="PLACE", help="an offset, earliest or latest (default: earliest)")
    tail.add_argument("--columns", metavar="A,B", help="only these columns")
    tail.add_argument("--where", metavar="CONDITION", help="only entries that meet an SQL condition")
    _add_server(tail, tail)
    tail.set_defaults(command=_tail)

    topics = commands.add_parser("topics", help="list the topics")
    _add_where(topics)
    topics.set_defaults(command=_topics)

    verify = commands.add_parser("verify", help="read a whole log and report damage; the server may run meanwhile")
    _add_settings(verify, ["data"])
    verify.add_argument(
        "--remove-orphans",
        type=_orphan_seconds,
        metavar="SECONDS",
        help="also remove data files that no commit names and nobody has written to for so long: what a crash left",
    )
    verify.set_defaults(command=_verify)

    _add_accounts(commands)

    config = commands.add_parser("config", help="show every setting, its value and what it means")
    _add_settings(config, [field.name for field in SETTINGS])
    config.add_argument("--check", action="store_true", help="instead, try the settings and the files they name")
    config.set_defaults(command=_config)
    return parser


def _add_accounts(commands: Any) -> None:
    def action(of: Any, name: str, command: Callable[[argparse.Namespace], int], help: str, *arguments: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = of.add_parser(name, help=help)
        for argument in arguments:
            made.add_argument(argument)
        _add_settings(made, ["users"])
        made.set_defaults(command=command)
        return made

    user = commands.add_parser("user", help="add, remove and list those who log in with a password").add_subparsers(
        required=True, metavar="ACTION"
    )
    action(user, "add", _add_user, "add a user, or give one another password, which is asked for or read from standard input", "name")
    action(user, "remove", _remove_user, "remove a user; a login of theirs is not good any more within a second", "name")
    action(user, "list", _list_users, "list the users")

    token = commands.add_parser("token", help="add, remove and list API tokens").add_subparsers(required=True, metavar="ACTION")
    made = action(token, "add", _add_token, "make a token for a principal, and show it this once", "principal")
    made.add_argument("--days", type=float, default=TOKEN_DAYS, help=f"how long it is good, 0 for ever (default: {TOKEN_DAYS})")
    action(token, "remove", _remove_token, "revoke a token; it is not good any more within a second", "id")
    action(token, "list", _list_tokens, "list the tokens, without what makes them good")


def _add_settings(parser: argparse.ArgumentParser, names: list[str]) -> None:
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings")
    for field in SETTINGS:
        if field.name in names:
            flag = "--" + field.name.replace("_", "-")
            if field.default is False:
                parser.add_argument(flag, dest=field.name, action="store_const", const=True, help=field.metadata["help"])
            else:
                text = f"{field.metadata['help']} (default: {field.default})"
                parser.add_argument(flag, dest=field.name, metavar="VALUE", help=text)


def _settings(options: argparse.Namespace) -> Config:
    flags: dict[str, Any] = {}
    for field in SETTINGS:
        value = getattr(options, field.name, None)
        if value is not None:
            flags[field.name] = parse(field, value) if isinstance(value, str) else value
    return load(flags, file=options.config)


def _orphan_seconds(text: str) -> int:
    if int(text) < ORPHAN_SECONDS_LEAST:
        raise argparse.ArgumentTypeError(f"less than {ORPHAN_SECONDS_LEAST} seconds may take what a server is writing right now")
    return int(text)


def _add_where(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    _add_server(parser, where)
    where.add_argument("--data", help="folder of the log, to read without a server")


def _add_server(parser: argparse.ArgumentParser, where: Any) -> None:
    where.add_argument("--server", default=DEFAULT_SERVER, help=f"address of the server (default: {DEFAULT_SERVER})")
    parser.add_argument("--user", help="log in by this name; the password is asked for, or read from standard input")
    parser.add_argument("--token-file", metavar="FILE", help="file with a bearer to send: an API token or a JWT")
    parser.add_argument(
        "--tls-ca", metavar="FILE", help="PEM file of the authorities that may vouch for the server, instead of the system's"
    )
    parser.add_argument("--tls-cert", dest="client_cert", metavar="FILE", help="PEM file of a certificate to show to the server")
    parser.add_argument("--tls-key", dest="client_key", metavar="FILE", help="PEM file of its key")


def _login(options: argparse.Namespace) -> Login:
    """Return what to show a server. Raises RequestError for a file that cannot be read, or a secret that others could read on its way."""
    login = getattr(options, "login", None)
    if login is None:
        if (options.user is not None or options.token_file is not None) and not is_private(options.server):
            raise RequestError(f"server {options.server}: a password or token is sent over grpc+tls:// only; nothing was sent")
        password = None if options.user is None else _password(f"password of {options.user}: ")
        token = None if options.token_file is None else _file(options.token_file).decode("utf-8", "replace").strip()
        files = (options.tls_ca, options.client_cert, options.client_key)
        login = options.login = Login(options.user, password, token, *(None if file is None else _file(file) for file in files))
    return login


def _file(name: str) -> bytes:
    try:
        with open(name, "rb") as stream:
            return stream.read()
    except OSError as error:
        raise RequestError(f"{name}: {error.strerror}") from None


def _password(words: str) -> str:
    """Ask for a password, unseen, or read the first line of standard input where no person sits."""
    try:
        return getpass.getpass(words) if sys.stdin.isatty() else sys.stdin.readline().rstrip("\r\n")
    except UnicodeDecodeError:
        raise RequestError("the password is not UTF-8") from None


# serve


def _serve(options: argparse.Namespace) -> int:
    config = _settings(options)
    signals: list[int] = []

    def on_signal(number: int, frame: Any) -> None:
        # No lock may be taken here, so no Event either: this runs in the main thread, between any two of its steps,
        # also while it holds the lock of the Event it waits for.
        if signals:
            os._exit(128 + number)  # a second signal ends at once; what was acknowledged is on disk
        signals.append(number)

    wanted: list[int] = []  # reloads
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    signal.signal(signal.SIGHUP, lambda number, frame: wanted.append(number))
    logs.begin(config.log_format)
    check_listen(config)
    with OpLog.open(config.data, config) as oplog:
        server = Server(oplog, config)
        # What is loaded now stays; an append makes dozens of objects that die by themselves, and looking for cycles among
        # them every 700 took a tenth of the time.
        gc.freeze()
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each stream has a connection and perhaps a file
        gc.set_threshold(GARBAGE_OBJECTS)
        print(server.uri, flush=True)
        for file in (config.users, config.secret, config.tls_key):
            if file and os.stat(file).st_mode & stat.S_IROTH:
                print(f"warning: {file} can be read by everybody on this machine; chmod o-r {file}", file=sys.stderr)
        if config.insecure and (missing := lacking(config)):
            print(f"warning: --insecure: there is no {missing}: {_RISKS[missing]}", file=sys.stderr)
        while not signals:
            time.sleep(0.1)
            if wanted:
                wanted.clear()
                server.reload()
        drained = server.drain(config.drain_seconds_max)
    if not drained:
        print("flight-oplog: stopped before every call had ended; nothing acknowledged was lost", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gRPC threads of a stalled client would hold the interpreter up


_RISKS = {
    "authentication and no TLS": "anybody who reaches this address may read and append, and listen to others",
    "authentication": "anybody who reaches this address may read and append",
    "TLS": "anybody on the way may read along, passwords too, and change what is sent",
}


# sql, tail, topics


def _sql(options: argparse.Namespace) -> int:
    with _result(options, options.query) as (schema, batches):
        PRINTERS[options.format](schema, batches, options.rows)
    return 0


def _tail(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # waiting for a batch, Python would not get to see it
    start: int | str = int(options.start) if options.start.isascii() and options.start.isdigit() else options.start
    columns = options.columns.split(",") if options.columns else None
    was_in = False
    while True:
        try:
            with Client(options.server, _login(options)) as client:
                for batch, next_offset in client.follow(options.topic, start, options.follow, columns, options.where):
                    print_json(batch.schema, iter([batch]), 0)
                    sys.stdout.flush()
                    start, was_in = next_offset, True
            return 0
        except (TryAgain, Unauthenticated) as error:
            # A login ends after a while: whoever was let in once may log in again.
            if not options.follow or (isinstance(error, Unauthenticated) and not was_in):
                raise
            print(f"flight-oplog: {error}", file=sys.stderr)
            time.sleep(AGAIN_SECONDS)


def _topics(options: argparse.Namespace) -> int:
    columns = "topic, entries, next_offset, columns, schemas, files, records, file_bytes, min_time, max_time"
    query = f"SELECT {columns} FROM system.topics ORDER BY topic"
    with _result(options, query) as (schema, batches):
        print_table(schema, batches, 1 << 30)
    return 0


@contextlib.contextmanager
def _result(options: argparse.Namespace, query: str) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Run a query, on a server through ADBC as any tool would, or in process on a folder."""
    if options.data is not None:
        config = Config(data=options.data)
        with OpLog(Store.open(options.data, create=False), config) as oplog:
            running = Engine(config).run(query, oplog.snapshot())
            yield running.schema, running.batches
        return
    import adbc_driver_flightsql.dbapi as adbc  # half a second to load, and most commands do without
    from adbc_driver_manager import Error

    try:
        with adbc.connect(options.server, _login(options).adbc(), autocommit=True) as connection, connection.cursor() as cursor:
            cursor.execute(query)
            reader = cursor.fetch_record_batch()
            yield reader.schema, reader
    except BrokenPipeError:
        raise
    except (Error, pa.ArrowException, OSError) as error:
        raise RequestError(_adbc_message(error, options.server)) from None


def _adbc_message(error: Exception, server: str) -> str:
    text = str(error).split(". Detail: ")[0]
    if "connection refused" in text or "Unavailable; " in text:
        return f"no server answers at {server}; start one with: flight-oplog serve"
    return text.split("[FlightSQL] ")[-1]


# ingest


def _ingest(options: argparse.Namespace) -> int:
    with Client(options.server, _login(options)) as client:
        for file in options.files:
            schema, batches = _open_file(file)
            with _progress(file) as advance:
                receipt = client.append(options.topic, schema, batches, advance)
            assert receipt.first_offset is not None
            assert receipt.entries is not None
            last = receipt.first_offset + receipt.entries
            print(f"{file}: {receipt.entries:,} entries in topic {receipt.topic}, offsets [{receipt.first_offset}, {last})")
    return 0


@contextlib.contextmanager
def _progress(file: str) -> Iterator[Callable[[pa.RecordBatch], None]]:
    """Show a bar on a terminal, nothing elsewhere. The end is not known before the file is read, so it counts bytes."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rows]:,} entries"), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task(os.path.basename(file), total=None, rows=0)
        rows = 0

        def advance(batch: pa.RecordBatch) -> None:
            nonlocal rows
            rows += batch.num_rows
            progress.update(task, advance=batch.nbytes, rows=rows)

        yield advance


def _open_file(file: str) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Open a file by its ending. Raises RequestError naming the file when it cannot be read."""
    ending = os.path.splitext(file)[1].lower()
    if ending not in _OPENERS:
        raise RequestError(f"{file}: the ending {ending!r} is not one of {', '.join(_OPENERS)}")
    try:
        schema, batches = _OPENERS[ending](file)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise RequestError(f"{file}: {reason}") from None
    except pa.ArrowException as error:
        raise RequestError(f"{file}: {str(error).splitlines()[0]}") from None
    return schema, _named(file, batches)


def _named(file: str, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    try:
        yield from batches
    except (pa.ArrowException, OSError) as error:
        raise RequestError(f"{file}: {str(error).splitlines()[0]}; nothing of this file was written") from None


def _open_parquet(file: str) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    parquet = pq.ParquetFile(file)
    return parquet.schema_arrow, parquet.iter_batches()


def _open_arrow(file: str) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    source = pa.OSFile(file)
    magic = source.read(6)
    source.seek(0)
    if magic == b"ARROW1":
        reader = pa.ipc.open_file(source)
        return reader.schema, (reader.get_batch(number) for number in range(reader.num_record_batches))
    stream = pa.ipc.open_stream(source)
    return stream.schema, iter(stream)


def _open_text(opener: Callable[[str], Any]) -> Callable[[str], tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    def open_(file: str) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        reader = opener(file)
        return reader.schema, iter(reader)

    return open_


_OPENERS: dict[str, Callable[[str], tuple[pa.Schema, Iterator[pa.RecordBatch]]]] = {
    ".parquet": _open_parquet,
    ".csv": _open_text(pa.csv.open_csv),
    ".ndjson": _open_text(pa.json.open_json),
    ".jsonl": _open_text(pa.json.open_json),
    ".json": _open_text(pa.json.open_json),
    ".arrow": _open_arrow,
    ".arrows": _open_arrow,
    ".feather": _open_arrow,
    ".ipc": _open_arrow,
}


# verify, config


def _verify(options: argparse.Namespace) -> int:
    config = _settings(options)
    with OpLog(Store.open(config.data, create=False), config) as oplog:
        removed = [] if options.remove_orphans is None else oplog.remove_orphans(options.remove_orphans)
        problems = oplog.verify()
        snapshot = oplog.snapshot()
    for path in removed:
        print(f"removed: {path}")
    for problem in problems:
        print(f"{problem.severity}: {problem.where}: {problem.what}")
    errors = sum(problem.severity == "error" for problem in problems)
    topics = snapshot.topics.values()
    records = sum(file.records for topic in topics for file in topic.files)
    print(
        f"table_version {snapshot.table_version}: {len(topics)} topics, {records:,} records, "
        f"{sum(topic.entries for topic in topics):,} entries: " + (f"{errors} errors" if errors else "all as acknowledged")
    )
    return 1 if errors else 0


def _add_user(options: argparse.Namespace) -> int:
    file = _users_file(options)
    password = _password(f"password for {options.name}: ")
    if sys.stdin.isatty() and password != _password("once more: "):
        raise RequestError("the two passwords are not the same; nothing was changed")
    is_new = add_user(file, options.name, password)
    print(f"user {options.name}: " + ("added" if is_new else "has another password"))
    return 0


def _remove_user(options: argparse.Namespace) -> int:
    remove_user(_users_file(options), options.name)
    print(f"user {options.name}: removed")
    return 0


def _list_users(options: argparse.Namespace) -> int:
    for name, user in sorted(Accounts.load(_users_file(options)).users.items()):
        print(f"{name}\tadded {user.added}")
    return 0


def _add_token(options: argparse.Namespace) -> int:
    print(add_token(_users_file(options), options.principal, options.days or None))
    return 0


def _remove_token(options: argparse.Namespace) -> int:
    remove_token(_users_file(options), options.id)
    print(f"token {options.id}: removed")
    return 0


def _list_tokens(options: argparse.Namespace) -> int:
    for name, token in sorted(Accounts.load(_users_file(options)).tokens.items(), key=lambda item: item[1].added):
        until = "for ever" if token.expires is None else f"until {token.expires}" + (", expired" if token.is_expired else "")
        print(f"{name}\t{token.principal}\tadded {token.added}\tgood {until}")
    return 0


def _users_file(options: argparse.Namespace) -> str:
    file = _settings(options).users
    if not file:
        raise RequestError("the setting users names no file: add --users FILE")
    return file


def _config(options: argparse.Namespace) -> int:
    config = _settings(options)
    if options.check:
        check_listen(config)
        check_tls(config)
        # Nothing is signed here, so the log, which keeps the secret where no file does, need not be there.
        gate = Gate(config, secrets.token_bytes(32))
        gate.check()
        print(f"good: {gate}")
        return 0
    values = dataclasses.asdict(config)
    table = Table(header_style="bold")
    for heading in ("setting", "value", "default"):
        table.add_column(heading, no_wrap=True)
    table.add_column("what it means")
    for field in SETTINGS:
        table.add_row(*map(escape, (field.name, str(values[field.name]), str(field.default), field.metadata["help"])))
    console().print(table)
    return 0


def entry() -> None:
    """Run `main` and end the process without waiting for the query engine's threads."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
