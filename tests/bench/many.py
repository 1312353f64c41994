"""One topic in very many files, or in very many records: what opening, planning and scanning cost. Part of `make bench-scale`.

A small append that is committed alone makes a file of one record. Appends that are committed together are joined, as are
the batches of one append, until a record is full: so 10,000 files are 10,000 commits, one after the other, and many
records in one file are made here by a small `record_entries_max`.

A server starts with nothing of the files in the system's memory. The rows of the Delta table, which are the records, are
asked of deltalake too: in a process of its own, as it has no server.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import pyarrow as pa
from bench import events
from bench_peers import at, evict
from peers import ONE, TABLE, Query, ours
from rich.table import Table

from flight_oplog import Config, OpLog

FILES = int(os.environ.get("FILES", "10000"))
FILE_ENTRIES = 100
RECORDS = int(os.environ.get("RECORDS", "100000"))
RECORD_ENTRIES = 10
STARTS = 3
ROUNDS = 30
SCANS = 5
SCAN = "SELECT kind, count(*) AS n, sum(value + {}) AS total FROM events GROUP BY kind"
SCAN_RECORDS = "SELECT sum(entries) AS entries, max(max_time) AS last, {} AS anew FROM {} WHERE topic = 'events'"
Seconds = Callable[[str], float]


def timed(ask: Query, sql: str) -> float:
    """Seconds that an answer takes."""
    began = time.perf_counter()
    ask(sql)
    return time.perf_counter() - began


def whole(entries: int) -> pa.Table:
    return pa.Table.from_batches(events(entries)).combine_chunks()


def many_files(data: Path) -> None:
    with OpLog.open(str(data)) as log:
        for batch in whole(FILES * FILE_ENTRIES).to_batches(FILE_ENTRIES):
            log.append(TABLE, batch)


def many_records(data: Path) -> None:
    with OpLog.open(str(data), Config(record_entries_max=RECORD_ENTRIES)) as log:
        log.append(TABLE, whole(RECORDS * RECORD_ENTRIES))


def slices(entries: int) -> Iterator[tuple[str, str]]:
    """Yield the ends of one random 1 % after the other."""
    chance = random.Random(7)
    while True:
        place = chance.randrange(entries * 99 // 100)
        yield at(place), at(place + entries // 100)


def of_entries(start: str, end: str) -> str:
    return f"SELECT count(*) AS n, max(value) AS most FROM events WHERE timestamp >= {start} AND timestamp < {end}"


def of_records(start: str, end: str, table: str) -> str:
    window = f"max_time >= {start} AND min_time < {end}"
    return f"SELECT count(*) AS n, max(max_time) AS last FROM {table} WHERE topic = 'events' AND {window}"


@contextlib.contextmanager
def by_us(data: Path) -> Iterator[Seconds]:
    """Start a server; yield what tells how long a statement takes."""
    with ours(data, data.with_suffix(".run"), "--cache-bytes-max", str(4 << 30)) as server, server.connect() as ask:
        yield lambda sql: timed(ask, sql)


@contextlib.contextmanager
def by_deltalake(data: Path) -> Iterator[Seconds]:
    """Start deltalake; yield the same."""
    script = Path(__file__).with_name("deltalake_process.py")
    process = subprocess.Popen([sys.executable, str(script), str(data)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None

    def seconds(sql: str) -> float:
        print(sql, file=process.stdin, flush=True)
        return float(process.stdout.readline())

    try:
        yield seconds
    finally:
        process.stdin.close()
        process.wait()


def entries_asked(data: Path, entries: int) -> Iterator[tuple[str, float]]:
    """Yield what was asked of the entries, and its seconds."""
    windows, starts = slices(entries), []
    for _ in range(STARTS):
        evict(data)
        began = time.perf_counter()
        with by_us(data) as seconds:
            starts.append([time.perf_counter() - began, seconds(of_entries(*next(windows)))])
    yield from zip(("from the start of the process to SELECT 1", "1 % time slice, the first"), medians(starts), strict=True)
    evict(data)
    with by_us(data) as seconds:
        yield "group by kind, cold", seconds(SCAN.format(0))
        rounds = [
            [seconds(ONE), seconds(f"EXPLAIN {of_entries(*window)}"), seconds(of_entries(*window))]
            for window in itertools.islice(windows, ROUNDS)
        ]
        yield from zip(("SELECT 1", "1 % time slice, EXPLAIN", "1 % time slice"), medians(rounds), strict=True)
        yield "group by kind, never asked", median(seconds(SCAN.format(number)) for number in range(1, SCANS + 1))


def records_asked(data: Path, entries: int) -> Iterator[tuple[str, list[float]]]:
    """Yield what was asked of the records, of us and of deltalake in turn, and the seconds of each."""
    windows, starts = slices(entries), []
    sides = (("records.events", by_us), ("records", by_deltalake))
    for _ in range(STARTS):
        window, found = next(windows), []
        for table, start in sides:
            evict(data)
            began = time.perf_counter()
            with start(data) as seconds:
                seconds(of_records(*window, table))
                found.append(time.perf_counter() - began)
        starts.append(found)
    yield "records: from the start to the first 1 % time slice", medians(starts)
    with contextlib.ExitStack() as stack:
        asks = [(table, stack.enter_context(start(data))) for table, start in sides]
        rounds = [[seconds(of_records(*window, table)) for table, seconds in asks] for window in itertools.islice(windows, ROUNDS)]
        yield "records: 1 % time slice", medians(rounds)
        scans = [[seconds(SCAN_RECORDS.format(number, table)) for table, seconds in asks] for number in range(SCANS)]
        yield "records: sum and max of all", medians(scans)


def medians(rounds: list[list[float]]) -> list[float]:
    return [median(column) for column in zip(*rounds, strict=True)]


def bench_many(title: str, data: Path, entries: int) -> Table:
    """Ask a log of so many entries; a ratio is deltalake's time over ours."""
    table = Table(title=title, header_style="bold")
    table.add_column("what, the median")
    for heading in ("ours, ms", "deltalake, ms", "ratio"):
        table.add_column(heading, justify="right")
    for what, seconds in entries_asked(data, entries):
        table.add_row(what, f"{seconds * 1000:,.1f}")
    for what, (mine, theirs) in records_asked(data, entries):
        table.add_row(what, f"{mine * 1000:,.1f}", f"{theirs * 1000:,.1f}", f"{theirs / mine:.2f}")
    return table
