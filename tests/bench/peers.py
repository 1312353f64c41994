"""Peer servers that answer SQL over one Delta table: started on a free loopback port, stopped at the end.

Programs come from the PyPI packages roapi, pysail and flydelta, in the environment that `make bench-peers` makes for
them (PEERS_BIN), as flydelta wants an older pyarrow than ours.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from adbc_driver_flightsql import DatabaseOptions, dbapi
from pyarrow import flight

TABLE = "events"
ONE = "SELECT 1 AS one"
ALL = f"SELECT * FROM {TABLE}"
HOST = "127.0.0.1"
BIN = Path(os.environ.get("PEERS_BIN", ".venv/peers/bin"))
START_SECONDS = 300.0
# Lifts the ADBC driver's limit of 16 MiB on one received message.
ADBC_OPTIONS = {DatabaseOptions.WITH_MAX_MSG_SIZE.value: str(2**31 - 1)}

Query = Callable[[str], pa.Table]


class Asked(Protocol):
    """Whatever answers SQL: every statement, or only some."""

    @property
    def name(self) -> str: ...

    @property
    def statements(self) -> frozenset[str] | None: ...

    def connect(self) -> contextlib.AbstractContextManager[Query]: ...


@dataclass(frozen=True)
class Peer:
    """A server that runs: where it answers, whether it speaks Flight SQL or only plain Flight, and if not all statements, which."""

    name: str
    uri: str
    process: int
    speaks_flight_sql: bool = True
    statements: frozenset[str] | None = None

    @contextlib.contextmanager
    def connect(self) -> Iterator[Query]:
        """Open a connection; yield a function from SQL to the whole answer."""
        if self.speaks_flight_sql:
            with dbapi.connect(self.uri, db_kwargs=ADBC_OPTIONS, autocommit=True) as connection, connection.cursor() as cursor:

                def by_adbc(sql: str) -> pa.Table:
                    cursor.execute(sql)
                    return cursor.fetch_arrow_table()

                yield by_adbc
            return
        with flight.connect(self.uri) as client:

            def by_flight(sql: str) -> pa.Table:
                info = client.get_flight_info(flight.FlightDescriptor.for_command(sql.encode()))
                return pa.concat_tables([client.do_get(endpoint.ticket).read_all() for endpoint in info.endpoints])

            yield by_flight

    def peak_mib(self) -> tuple[float, float]:
        """The most memory the process has had resident, and how much of it are pages of files, which are the system's to take back."""
        status = Path(f"/proc/{self.process}/status").read_text()
        peak, files = (int(status.split(f"{name}:")[1].split()[0]) / 1024 for name in ("VmHWM", "RssFile"))
        return peak, files


def has(program: str) -> bool:
    return (BIN / program).exists()


def free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def running(name: str, command: list[str], folder: Path, port: int, then: str | None = None, **options: Any) -> Iterator[Peer]:
    """Run a server until the end; it is up when it answers `SELECT 1`, and then the statement `then`."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"TZ": "UTC"} | options.pop("environment", {})
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    peer = Peer(name, f"grpc://{HOST}:{port}", process.pid, **options)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None, (folder / "output").read_text()[-2000:]
            try:
                socket.create_connection((HOST, port), 1).close()  # else gRPC would wait longer and longer
                with peer.connect() as ask:
                    ask(ONE)
                    if then is not None:
                        ask(then)
                break
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield peer
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def roapi(table: Path, folder: Path, in_memory: bool) -> contextlib.AbstractContextManager[Peer]:
    """ROAPI: the table copied into memory at start, or read from its files."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    option = f"{{format: delta, use_memory_table: {str(in_memory).lower()}}}"
    (folder / "roapi.yml").write_text(
        f"addr: {{http: '{HOST}:0', postgres: '{HOST}:0', flight_sql: '{HOST}:{port}'}}\n"
        f"tables:\n  - {{name: {TABLE}, uri: '{table}', option: {option}}}\n"
    )
    name = "ROAPI in memory" if in_memory else "ROAPI from files"
    command = [str(BIN / "roapi"), "-c", "roapi.yml"]
    return running(name, command, folder, port, environment={"RUST_LOG": "off"})


def sail(table: Path, folder: Path) -> contextlib.AbstractContextManager[Peer]:
    """Sail: the table named in its one session, read from its files."""
    port = free_port()
    command = [str(BIN / "sail"), "flight", "server", "--ip", HOST, "--port", str(port)]
    environment = {"RUST_LOG": "error", "SAIL_MODE": "local", "SAIL_FLIGHT__SESSION_TIMEOUT_SECS": "86400"}
    return running("Sail", command, folder, port, f"CREATE TABLE {TABLE} USING delta LOCATION '{table.as_uri()}'", environment=environment)


def flydelta(table: Path, folder: Path) -> contextlib.AbstractContextManager[Peer]:
    """flydelta: DuckDB over the table's files, by plain Flight, as it does not speak Flight SQL."""
    port = free_port()
    command = [str(BIN / "flydelta"), "serve", "--host", HOST, "--port", str(port), "--table", f"{TABLE}={table}"]
    return running("flydelta", command, folder, port, speaks_flight_sql=False)


def ours(data: Path, folder: Path, *flags: str) -> contextlib.AbstractContextManager[Peer]:
    port = free_port()
    command = [sys.executable, "-m", "flight_oplog", "serve", "--data", str(data), "--listen", f"grpc://{HOST}:{port}", *flags]
    return running("flight_oplog", command, folder, port)


def all_peers(table: Path, folder: Path) -> list[Callable[[], contextlib.AbstractContextManager[Peer]]]:
    """Every peer whose program is there."""
    found: list[Callable[[], contextlib.AbstractContextManager[Peer]]] = []
    if has("roapi"):
        found += [
            lambda: roapi(table, folder / "roapi-memory", in_memory=True),
            lambda: roapi(table, folder / "roapi-files", in_memory=False),
        ]
    if has("sail"):
        found.append(lambda: sail(table, folder / "sail"))
    if has("flydelta"):
        found.append(lambda: flydelta(table, folder / "flydelta"))
    return found
