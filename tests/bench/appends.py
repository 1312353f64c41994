"""Acknowledged appends: many producers, small appends, every one durable. Part of `make bench`.

Every peer gets the same entries from the same kind of client, threads of one Python process, and answers each append
only when it is on disk: Redis Streams with `appendfsync always`, PostgreSQL with `fsync` and `synchronous_commit` on,
a COPY and a commit for each append. Ours and Redis are pipelined (PostgreSQL's COPY cannot be). `write_deltalake` does
not fsync; it is what one would do without a server.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import write_deltalake
from deltalake.exceptions import DeltaError
from pyarrow import flight

from flight_oplog import Config, OpLog

SECONDS = 3.0
UNDER_WAY = 1000  # appends that all producers of a pipelined peer have under way together, at most
SHAPES = [(1, 1), (1, 100), (1, 10_000), (8, 1), (8, 100), (8, 10_000), (64, 1), (64, 100), (64, 10_000)]
Result = tuple[str, str, float, float]


@dataclass
class Measured:
    """What the producers of one peer got done together."""

    appends: int
    seconds: float
    latencies: list[float]

    @property
    def rate(self) -> float:
        return self.appends / self.seconds


def measure(producers: int, work: Callable[[int, Callable[[], bool], list[float]], None]) -> Measured:
    """Run `work(number, on, latencies)` in a thread for each producer for SECONDS; it adds one latency an append."""
    latencies: list[list[float]] = [[] for _ in range(producers)]
    ready = threading.Barrier(producers + 1)
    end = [0.0]

    def run(number: int) -> None:
        ready.wait()
        work(number, lambda: time.perf_counter() < end[0], latencies[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(producers)]
    for thread in threads:
        thread.start()
    began = time.perf_counter()
    end[0] = began + SECONDS
    ready.wait()
    for thread in threads:
        thread.join()
    found = sorted(seconds for of_producer in latencies for seconds in of_producer)
    return Measured(len(found), time.perf_counter() - began, found)


# Ours


@contextlib.contextmanager
def our_server(folder: Path, *flags: str) -> Iterator[str]:
    command = [sys.executable, "-m", "flight_oplog", "serve", "--data", str(folder), "--listen", "grpc://127.0.0.1:0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


def ours(uri: str, producers: int, batch: pa.RecordBatch, depth: int) -> Measured:
    names = iter(range(1 << 30))
    run = f"{time.time_ns()}"

    def work(number: int, on: Callable[[], bool], latencies: list[float]) -> None:
        with flight.connect(uri) as client:
            options = flight.FlightCallOptions(headers=[(b"oplog-producer", f"{run}-{next(names)}".encode())])
            writer, acks = client.do_put(flight.FlightDescriptor.for_path("events"), batch.schema, options)
            sent: list[float] = []
            while on() or len(latencies) < len(sent):
                while on() and len(sent) - len(latencies) < depth:
                    writer.write_with_metadata(batch, b'{"sequence": %d}' % len(sent))
                    sent.append(time.perf_counter())
                if len(latencies) < len(sent):
                    assert json.loads(acks.read().to_pybytes())["entries"] == batch.num_rows
                    latencies.append(time.perf_counter() - sent[len(latencies)])
            writer.close()

    return measure(producers, work)


# Peers


def delta(folder: Path, producers: int, batch: pa.RecordBatch) -> Measured:
    """Racing writers fail now and then; they try again, as a user's code would."""
    write_deltalake(str(folder), batch)

    def work(number: int, on: Callable[[], bool], latencies: list[float]) -> None:
        while on():
            began = time.perf_counter()
            with contextlib.suppress(DeltaError):
                write_deltalake(str(folder), batch, mode="append")
                latencies.append(time.perf_counter() - began)

    return measure(producers, work)


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str | None]:
    """A Redis on a socket of its own, or None when there is none (apt-get install redis-server)."""
    if shutil.which("redis-server") is None:
        yield None
        return
    socket = str(folder / "redis.sock")
    flags = ("--port", "0", "--unixsocket", socket, "--dir", str(folder), "--appendonly", "yes", "--appendfsync", "always", "--save", "")
    process = subprocess.Popen(["redis-server", *flags], stdout=subprocess.DEVNULL)
    try:
        while not os.path.exists(socket):
            time.sleep(0.05)
        yield socket
    finally:
        process.terminate()
        process.wait()


def redis_streams(socket: str, producers: int, rows: list[dict[str, Any]], depth: int) -> Measured:
    """An append is one XADD an entry; as many appends as ours has under way go in one round trip, packed beforehand."""
    from redis import UnixDomainSocketConnection

    commands = [("XADD", "events", "*", *(part for pair in row.items() for part in pair)) for row in rows]
    depth = min(depth, max(1, 10_000 // len(rows)))
    packed = UnixDomainSocketConnection(path=socket).pack_commands(commands) * depth

    def work(number: int, on: Callable[[], bool], latencies: list[float]) -> None:
        connection = UnixDomainSocketConnection(path=socket)
        connection.connect()
        while on():
            began = time.perf_counter()
            connection.send_packed_command(packed)
            for _ in range(len(commands) * depth):
                connection.read_response()
            latencies += [time.perf_counter() - began] * depth
        connection.disconnect()

    return measure(producers, work)


@contextlib.contextmanager
def postgres_server(folder: Path) -> Iterator[str | None]:
    """A PostgreSQL on a socket of its own, or None when there is none (apt-get install postgresql)."""
    if shutil.which("initdb") is None or shutil.which("postgres") is None:
        yield None
        return
    data = folder / "data"
    data.mkdir()
    user = "nobody" if os.getuid() == 0 else None  # it refuses to run as root
    if user is not None:
        shutil.chown(data, user)
        for place in (folder, folder.parent):
            place.chmod(0o755)
        shutil.chown(folder, user)
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "user": user, "cwd": folder}
    subprocess.run(["initdb", "-D", str(data), "-U", "bench", "--auth=trust"], check=True, **quiet)
    process = subprocess.Popen(["postgres", "-D", str(data), "-k", str(folder), "-h", "", "-c", "max_connections=100"], **quiet)
    try:
        while not (folder / ".s.PGSQL.5432").exists():
            time.sleep(0.05)
        yield f"host={folder} user=bench dbname=postgres"
    finally:
        process.terminate()
        process.wait()


def postgres(address: str, producers: int, rows: list[tuple[Any, ...]]) -> Measured:
    import psycopg

    columns = "at timestamptz, node_id text, kind text, sequence bigint, value float8, payload text"
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(f"CREATE TABLE IF NOT EXISTS events ({columns})")
    block = "".join("\t".join(map(str, row)) + "\n" for row in rows).encode()

    def work(number: int, on: Callable[[], bool], latencies: list[float]) -> None:
        with psycopg.connect(address) as connection, connection.cursor() as cursor:
            while on():
                began = time.perf_counter()
                with cursor.copy("COPY events FROM STDIN") as copy:
                    copy.write(block)
                connection.commit()
                latencies.append(time.perf_counter() - began)

    return measure(producers, work)


# The figures


def per_second(folder: Path, batch: pa.RecordBatch) -> list[Result]:
    results: list[Result] = []
    with contextlib.ExitStack() as stack:
        uri = stack.enter_context(our_server(folder / "log"))
        for name in ("redis", "postgres"):
            (folder / name).mkdir()
        socket = stack.enter_context(redis_server(folder / "redis"))
        address = stack.enter_context(postgres_server(folder / "postgres"))
        for number, (producers, entries) in enumerate(SHAPES):
            part = batch.slice(0, entries)
            depth = max(1, min(64, UNDER_WAY // producers, 200_000 // (entries * producers)))
            what = f"{producers} producers × {entries:,} entries, {depth} under way each"
            mine = ours(uri, producers, part, depth)
            name = "write_deltalake an append, not fsynced"
            results.append(
                _against(
                    what, name, mine, delta(folder / f"delta{number}", producers, part), 10 if (producers, entries) == (64, 100) else 0
                )
            )
            ahead = 1.0 if entries >= 100 and producers >= 8 else 0
            if socket is not None:
                rows = [{key: str(value) for key, value in row.items()} for row in part.to_pylist()]
                results.append(_against(what, "Redis Streams, fsync always", mine, redis_streams(socket, producers, rows, depth), ahead))
            if address is not None:
                peer = postgres(address, producers, [tuple(row.values()) for row in part.to_pylist()])
                results.append(_against(what, "PostgreSQL, COPY and commit", mine, peer, ahead))
    return results


def _against(what: str, name: str, mine: Measured, peer: Measured, mark: float) -> Result:
    return what, f"{name} ({peer.rate:,.0f} appends/s)", mine.rate / peer.rate, mark


def latency(folder: Path, batch: pa.RecordBatch) -> list[Result]:
    """A lone producer that waits for each ack; the ratio is to PostgreSQL's commit, where above 1 we are faster."""
    part = batch.slice(0, 100)
    with our_server(folder / "latency") as uri:
        mine = ours(uri, 1, part, 1)
    p50, p95, p99 = (mine.latencies[int(len(mine.latencies) * share)] * 1000 for share in (0.5, 0.95, 0.99))
    what = f"ack of 100 entries, lone producer: p50 {p50:.1f}, p95 {p95:.1f}, p99 {p99:.1f} ms"
    (folder / "pg").mkdir()
    with postgres_server(folder / "pg") as address:
        if address is None:
            return [(what, "nothing: PostgreSQL is not installed", 1.0, 0)]
        peer = postgres(address, 1, [tuple(row.values()) for row in part.to_pylist()])
    middle = peer.latencies[len(peer.latencies) // 2] * 1000
    return [(what, f"PostgreSQL, COPY and commit (p50 {middle:.1f} ms)", middle / p50, 0.25)]


def growth(folder: Path, batch: pa.RecordBatch) -> list[Result]:
    """What an append costs when so many commits came before, in process: the median of a hundred.

    They alternate with appends to a log with ten commits, as the disk is not as fast at the end as it was at the start.
    """
    part = batch.slice(0, 100)

    def cost(log: OpLog) -> float:
        began = time.perf_counter()
        log.append("events", part)
        return time.perf_counter() - began

    results = []
    with OpLog.open(str(folder / "growth")) as log:
        done = 0
        for commits in (1000, 10_000):
            for _ in range(commits - done):
                log.append("events", part)
            with OpLog.open(str(folder / f"young{commits}")) as young:
                for _ in range(10):
                    young.append("events", part)
                pairs = [(cost(log), cost(young)) for _ in range(100)]
            done = commits + len(pairs)
            mine, first = (sorted(costs)[50] * 1000 for costs in zip(*pairs, strict=True))
            results.append((f"commit after {commits:,} commits: {mine:.1f} ms", f"after 10 ({first:.1f} ms)", first / mine, 1 / 1.5))
    return results


def sizes(folder: Path, batches: list[pa.RecordBatch]) -> list[Result]:
    """Bytes on disk an entry, and the cost of writing them, by compression; in process, against none."""
    results: list[Result] = []
    entries = sum(batch.num_rows for batch in batches)
    none = 0.0
    for compression in ("none", "auto", "lz4", "zstd"):
        times = []
        for turn in range(3):
            place = folder / f"{compression}{turn}"
            with OpLog.open(str(place), Config(compression=compression)) as log:
                began = time.perf_counter()
                log.append("events", pa.Table.from_batches(batches))
                times.append(time.perf_counter() - began)
                size = sum(file.size for file in log.snapshot().topic("events").files) / entries
            shutil.rmtree(place)
        none = none or min(times)
        results.append((f"compression {compression}: {size:.0f} bytes an entry", "none, time to write", none / min(times), 0))
    return results


def bench_appends(batches: list[pa.RecordBatch]) -> list[Result]:
    """`batches` of the event log; the first one's rows make the small appends."""
    folder = Path(tempfile.mkdtemp(prefix="oplog-appends-"))
    try:
        return [*latency(folder, batches[0]), *per_second(folder, batches[0]), *growth(folder, batches[0]), *sizes(folder, batches[:30])]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
