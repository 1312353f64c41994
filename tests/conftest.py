"""What the tests share: a log that is verified after every test, and real server processes."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adbc_driver_flightsql.dbapi as adbc
import pyarrow as pa
import pytest
from issuer import PUBLIC, Issuer
from pyarrow import flight
from s3_server import ObjectStore, object_store

from flight_oplog import Config, OpLog, Snapshot, neighbours, provider
from flight_oplog.sql import repeated
from flight_oplog.sql.engine import Engine

SEED = pa.record_batch({"name": ["hello", "world"], "node_id": ["000000000000162e", "00000000000004d2"]})


def assert_clean(folder: str | Path) -> None:
    """The log in `folder` has no damage and no file that no commit names."""
    with OpLog.open(str(folder)) as log:
        assert log.verify() == []


def flip(path: Path, place: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for one log, verified when the test is over."""
    path = tmp_path / "log"
    yield path
    if path.exists():
        assert_clean(path)


@pytest.fixture
def log(folder: Path) -> Iterator[OpLog]:
    with OpLog.open(str(folder)) as opened:
        yield opened


@pytest.fixture(scope="session")
def engine() -> Engine:
    return Engine(Config())


@pytest.fixture(scope="module")
def eager() -> Iterator[None]:
    """Every aggregate is worth a state and numbers, every text an index, and records are as if they were large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeated, "STATE_SECONDS", -1.0)
        patch.setattr(repeated, "NUMBERED_SECONDS", -1.0)
        patch.setattr(provider, "INDEXING_SECONDS", 1e9)
        patch.setattr(repeated, "LARGE_ENTRIES", 0)
        patch.setattr(provider, "SHARED_ENTRIES", 0)
        patch.setattr(provider, "ALONE_ENTRIES", 0)
        patch.setattr(provider, "NUMBERED_ENTRIES", 0)
        yield


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few records are already read as one."""
    monkeypatch.setattr(neighbours, "RECORDS_LEAST", 3)
    monkeypatch.setattr(neighbours, "RANGE_ENTRIES", 16)


@pytest.fixture
def query(engine: Engine, log: OpLog) -> Callable[..., list[dict[str, Any]]]:
    """Run SQL over the log's newest (or a given) snapshot and return its rows."""

    def run(sql: str, snapshot: Snapshot | None = None) -> list[dict[str, Any]]:
        return rows(engine, snapshot or log.snapshot(), sql)

    return run


def rows(engine: Engine, snapshot: Snapshot, sql: str) -> list[dict[str, Any]]:
    running = engine.run(sql, snapshot)
    return pa.Table.from_batches(list(running.batches), running.schema).to_pylist()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs (run as root)")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(scope="session")
def s3_process() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


@pytest.fixture
def s3(s3_process: ObjectStore) -> Iterator[ObjectStore]:
    yield s3_process
    s3_process.misbehave()


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    made = Issuer()
    made.keys = [PUBLIC["RS256"]]
    yield made
    made.server.shutdown()
    made.server.server_close()


class ServerProcess:
    """A real `flight-oplog serve` process on a free port."""

    def __init__(self, folder: Path | str, errors: Path, *flags: str, environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "flight_oplog", "serve", "--data", str(folder), "--listen", "grpc://127.0.0.1:0", *flags]
        self.errors = errors
        with self.errors.open("ab") as stream:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True, env=os.environ | (environment or {}))
        assert self.process.stdout is not None
        ready = select.poll()  # select() takes no number of a file from 1024 on, and there are many by the end of all tests
        ready.register(self.process.stdout, select.POLLIN)
        self.uri = self.process.stdout.readline().strip() if ready.poll(60_000) else ""
        assert self.uri.startswith(("grpc://127.0.0.1:", "grpc+tls://127.0.0.1:")), self.errors.read_text()

    def memory(self) -> int:
        """Resident bytes of the server right now."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmRSS")

    def memory_peak(self) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmHWM")

    def cpu_seconds(self) -> float:
        parts = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(seconds)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Start servers; every one is stopped, and its log verified, when the test is over."""
    started: list[ServerProcess] = []

    def run(*flags: str, folder: Path | str | None = None, environment: dict[str, str] | None = None) -> ServerProcess:
        errors = tmp_path / f"server-{len(started)}.stderr"
        started.append(ServerProcess(folder or tmp_path / "log", errors, *flags, environment=environment))
        return started[-1]

    yield run
    for server in started:
        server.stop()
    for folder in {server.folder for server in started}:
        assert_clean(folder)


@pytest.fixture
def server(start: Callable[..., ServerProcess]) -> ServerProcess:
    return start()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[flight.FlightClient]:
    with flight.connect(server.uri) as connected:
        yield connected


@pytest.fixture
def connection(server: ServerProcess) -> Iterator[adbc.Connection]:
    with adbc.connect(server.uri, autocommit=True) as connected:
        yield connected


def put(client: flight.FlightClient, topic: str, *batches: pa.RecordBatch, schema: pa.Schema | None = None) -> dict[str, Any]:
    """Append batches as one stream and return the receipt."""
    options = flight.FlightCallOptions(headers=[(b"oplog-acks", b"true")])
    writer, acks = client.do_put(flight.FlightDescriptor.for_path(topic), schema or batches[0].schema, options)
    with writer:
        for batch in batches:
            writer.write_batch(batch)
        writer.done_writing()
        ack = acks.read()
    assert ack is not None
    receipt: dict[str, Any] = json.loads(ack.to_pybytes())
    return receipt


def ask(connection: adbc.Connection, sql: str) -> list[dict[str, Any]]:
    """Run SQL through ADBC and return its rows."""
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetch_arrow_table().to_pylist()


def eventually(true: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(AssertionError):
            if true():
                return True
        time.sleep(0.05)
    return true()
