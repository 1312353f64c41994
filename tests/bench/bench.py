"""Ratios to what the same machine does without us, all in one run: `make bench` (ENTRIES=n for another size).

Peers run interleaved with ours, A B A B, and the best of the rounds counts, so that a machine whose speed drifts
harms both alike. Servers are processes of their own. Only ratios mean anything.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from appends import bench_appends
from deltalake import write_deltalake
from followers import bench_followers
from pyarrow import flight
from references import datafusion_over
from rich.console import Console
from rich.table import Table

from flight_oplog import Config, OpLog
from flight_oplog.flightsql import wire
from flight_oplog.sql.engine import Engine

ENTRIES = int(os.environ.get("ENTRIES", "10000000"))
BATCH = 65_536
ROUNDS = 3
PUT_ROUNDS = 7
CACHE = 8 << 30
KINDS = pa.array(["put", "get", "delete", "scan"])
START = 1_700_000_000_000_000
HEX = np.frombuffer(b"0123456789abcdef", np.uint8)


def text(digits: np.ndarray) -> pa.Array:
    """A string array from a matrix of hex digits, one row a string."""
    rows, width = digits.shape
    offsets = pa.py_buffer(np.arange(0, (rows + 1) * width, width, dtype=np.int32))
    return pa.Array.from_buffers(pa.string(), rows, [None, offsets, pa.py_buffer(np.ascontiguousarray(HEX[digits]))])


def events(entries: int) -> Iterator[pa.RecordBatch]:
    """The event log: timestamp, 16-hex node_id, kind, sequence, value, 60-byte payload; 10,000 nodes."""
    random = np.random.default_rng(7)
    nodes = text(random.integers(0, 16, (10_000, 16), dtype=np.uint8))
    for start in range(0, entries, BATCH):
        rows = min(BATCH, entries - start)
        yield pa.record_batch(
            {
                "timestamp": pa.array(START + 1000 * np.arange(start, start + rows), pa.timestamp("us", "UTC")),
                "node_id": nodes.take(pa.array(random.integers(0, len(nodes), rows))),
                "kind": KINDS.take(pa.array(random.integers(0, len(KINDS), rows))),
                "sequence": pa.array(np.arange(start, start + rows)),
                "value": pa.array(random.random(rows)),
                "payload": text(random.integers(0, 16, (rows, 60), dtype=np.uint8)),
            }
        )


class Peer(flight.FlightServerBase):
    """pyarrow.flight itself: swallows what it is sent, and serves what it was told to hold from memory."""

    held: pa.Table | None = None

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        kept = [chunk.data for chunk in reader] if descriptor.path == [b"hold"] else [None for chunk in reader if chunk is None]
        if kept:
            Peer.held = pa.Table.from_batches(kept)

    def do_get(self, context: Any, ticket: Any) -> flight.RecordBatchStream:
        return flight.RecordBatchStream(Peer.held)


def serve_peer() -> None:
    server = Peer("grpc://127.0.0.1:0")
    print(f"grpc://127.0.0.1:{server.port}", flush=True)
    server.serve()


def process(*command: str) -> tuple[subprocess.Popen[str], str]:
    started = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    return started, started.stdout.readline().strip()


def put(uri: str, topic: str, batches: list[pa.RecordBatch]) -> None:
    with flight.connect(uri) as client:
        writer, _ = client.do_put(flight.FlightDescriptor.for_path(topic), batches[0].schema)
        for batch in batches:
            writer.write_batch(batch)
        writer.close()


def drain(reader: flight.FlightStreamReader) -> int:
    return sum(chunk.data.num_rows for chunk in reader)


def best(rounds: int, *runs: Callable[[], object]) -> list[float]:
    """Seconds of each, the best of `rounds` interleaved rounds."""
    return [min(seconds) for seconds in timed(rounds, *runs)]


def timed(rounds: int, *runs: Callable[[], object]) -> list[list[float]]:
    """Seconds of each in every one of `rounds` interleaved rounds."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, seconds in zip(runs, times, strict=True):
            os.sync()  # nobody pays for what another left unwritten
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
    return times


def bench_put(folder: Path, ours: str, peer: str, batches: list[pa.RecordBatch]) -> list[tuple[str, str, float, float]]:
    schema, numbers = batches[0].schema, iter(range(100))

    def delta() -> None:
        write_deltalake(str(folder / "puts"), pa.RecordBatchReader.from_batches(schema, iter(batches)), mode="append")

    def ipc() -> None:
        with open(folder / f"raw{next(numbers)}.arrows", "wb") as file:
            with pa.ipc.new_stream(file, schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())

    # A disk's rate jumps between rounds, by itself: each round is a ratio, and the middle one counts.
    mine, *peers = timed(
        PUT_ROUNDS,
        lambda: put(ours, f"put{next(numbers)}", batches),
        lambda: put(peer, "null", batches),
        delta,
        ipc,
    )
    size = sum(batch.nbytes for batch in batches) / 1e6
    marks = [
        ("pyarrow.flight into a null sink", 0.3),
        ("write_deltalake append, not fsynced", 2.0),
        ("one Arrow IPC stream, in process, fsynced", 0.8),
    ]
    results = []
    for (name, mark), peer_seconds in zip(marks, peers, strict=True):
        ratios = sorted(theirs / ours for theirs, ours in zip(peer_seconds, mine, strict=True))
        rate = size / sorted(peer_seconds)[PUT_ROUNDS // 2]
        what = f"do_put, 64 K-row batches, durable ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        results.append((what, f"{name} ({rate:,.0f} MB/s)", ratios[PUT_ROUNDS // 2], mark))
    return results


def bench_stream(ours: str, peer: str) -> list[tuple[str, str, float, float]]:
    mine_client, peer_client = flight.connect(ours), flight.connect(peer)
    descriptor = flight.FlightDescriptor.for_command(wire.pack(wire.CommandStatementQuery("SELECT * FROM events")))

    def mine() -> None:
        assert drain(mine_client.do_get(mine_client.get_flight_info(descriptor).endpoints[0].ticket)) == ENTRIES

    def theirs() -> None:
        assert drain(peer_client.do_get(flight.Ticket(b""))) == ENTRIES

    mine()  # warm
    us, them = best(ROUNDS, mine, theirs)
    return [
        ("SELECT * over Flight, warm", f"pyarrow.flight, the same batches in memory ({ENTRIES / them / 1e6:.1f} M rows/s)", them / us, 0.7)
    ]


def queries() -> dict[str, str]:
    node = next(events(1))["node_id"][0].as_py()
    middle = START + 1000 * (ENTRIES // 2)
    window = f"timestamp >= to_timestamp_micros({middle}) AND timestamp < to_timestamp_micros({middle + 10 * ENTRIES})"
    return {
        "COUNT(*)": "SELECT count(*) FROM events",
        "group by kind": "SELECT kind, count(*), sum(value) FROM events GROUP BY kind",
        "group by node_id, top 10": "SELECT node_id, count(*) AS n, avg(value) FROM events GROUP BY node_id ORDER BY n DESC LIMIT 10",
        "filter node_id = …": f"SELECT * FROM events WHERE node_id = '{node}'",
        "filter 1 % time slice, sum": f"SELECT sum(value) FROM events WHERE {window}",
        "top 10 by value": "SELECT * FROM events ORDER BY value DESC LIMIT 10",
    }


def bench_queries(log: OpLog, delta: Path) -> list[tuple[str, str, float, float]]:
    plain = datafusion_over(delta)
    engine, of_nothing = Engine(Config(cache_bytes_max=CACHE)), Engine(Config(cache_bytes_max=CACHE, state_bytes_max=0))
    snapshot, numbers = log.snapshot(), iter(range(1 << 30))
    results = []
    for name, sql in queries().items():

        def anew(sql: str = sql) -> int:
            """A text that was never asked, of which nothing is kept, nor of what it is made of."""
            return sum(batch.num_rows for batch in of_nothing.run(f"{sql} -- {next(numbers)}", snapshot).batches)

        def again(sql: str = sql) -> int:
            return sum(batch.num_rows for batch in engine.run(sql, snapshot).batches)

        def theirs(sql: str = sql) -> int:
            return sum(batch.to_pyarrow().num_rows for batch in plain.sql(sql).execute_stream())

        assert anew() == again() == theirs()
        fresh, repeated, them = best(7, anew, again, theirs)
        peer = f"DataFusion on Parquet in process ({them * 1000:,.1f} ms)"
        mark = 0 if name == "COUNT(*)" else 1.0
        results += [(f"{name}, warm", peer, them / fresh, mark), (f"{name}, asked again", peer, them / repeated, 0)]
    return results


def show(results: list[tuple[str, str, float, float]]) -> None:
    table = Table(title=f"{ENTRIES:,} entries, ratios in one run: above 1 we are faster", header_style="bold")
    for heading in ("what", "against", "ratio", "mark"):
        table.add_column(heading, justify="right" if heading in ("ratio", "mark") else "left")
    for what, against, ratio, mark in results:
        table.add_row(what, against, f"[{'green' if ratio >= mark else 'red'}]{ratio:.2f}[/]", f"{mark:.1f}" if mark else "")
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="oplog-bench-"))
    only = sys.argv[1:] or ["put", "stream", "query", "appends", "followers"]
    flags = ("--data", str(folder / "log"), "--listen", "grpc://127.0.0.1:0", "--cache-bytes-max", str(CACHE))
    server, ours = process("-m", "flight_oplog", "serve", *flags, "--batch-bytes-max", str(64 << 20))
    other, peer = process(__file__, "--peer")
    results = []
    try:
        batches = list(events(ENTRIES if {*only} - {"appends", "followers"} else BATCH))
        if "put" in only:
            results += bench_put(folder, ours, peer, batches[: max(1, len(batches) // 4)])
        put(ours, "events", batches)
        if "stream" in only:
            put(peer, "hold", batches)
            results += bench_stream(ours, peer)
        for stopped in (server, other):
            stopped.terminate()
            stopped.wait()
        if "query" in only:
            write_deltalake(str(folder / "plain"), pa.RecordBatchReader.from_batches(batches[0].schema, iter(batches)))
            del batches
            with OpLog.open(str(folder / "log")) as log:
                results += bench_queries(log, folder / "plain")
        if "appends" in only:
            results += bench_appends(list(events(40 * BATCH)))
        if "followers" in only:
            results += bench_followers()
        show(results)
    finally:
        for stopped in (server, other):
            stopped.kill()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    serve_peer() if sys.argv[1:] == ["--peer"] else main()
