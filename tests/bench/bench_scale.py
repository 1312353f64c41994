"""What a log's size costs: `make bench-scale` (ENTRIES=n ROUNDS=n FILES=n RECORDS=n).

`ten` asks two servers the same in turn, A B A B: one of a log, one of a log ten times larger. Places are others in every
round. A ratio is the larger log's median over the smaller one's. `files` and `records` are in `many.py`.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pyarrow as pa
from bench import BATCH, events
from bench_peers import at, evict, printed
from many import FILE_ENTRIES, FILES, RECORD_ENTRIES, RECORDS, bench_many, many_files, many_records, timed
from peers import ALL, ONE, TABLE, ours
from rich.table import Table

from flight_oplog import OpLog

ENTRIES = int(os.environ.get("ENTRIES", "1000000"))
TIMES = 10
ROUNDS = int(os.environ.get("ROUNDS", "31"))
COLD_ROUNDS = 5
WARMING = 15
FLAGS = ("--cache-bytes-max", str(4 << 30))


@dataclass(frozen=True)
class Question:
    """`sql` makes its text from chance and the number of entries in the log asked; the answer has so many rows.

    `ratio_max` is what the larger log may cost of the smaller one, where we promise it.
    """

    name: str
    sql: Callable[[random.Random, int], str]
    rows: int = 1
    ratio_max: float | None = None


def slice_of(chance: random.Random, entries: int, wanted: int) -> str:
    place = chance.randrange(entries - wanted)
    window = f"timestamp >= {at(place)} AND timestamp < {at(place + wanted)}"
    return f"SELECT count(*) AS n, sum(value) AS total FROM events WHERE {window}"


QUESTIONS = [
    Question("SELECT 1", lambda chance, entries: ONE),
    Question("COUNT(*)", lambda chance, entries: "SELECT count(*) AS n FROM events"),
    Question(f"time slice of {ENTRIES // 100:,}", lambda chance, entries: slice_of(chance, entries, ENTRIES // 100), ratio_max=1.3),
    Question("1 % time slice of each", lambda chance, entries: slice_of(chance, entries, entries // 100)),
    Question(
        "node of one record",
        lambda chance, entries: (
            f"SELECT timestamp, sequence, value FROM events WHERE node_id = '{rare(chance.randrange(ENTRIES // BATCH))}'"
        ),
    ),
    Question("last 10", lambda chance, entries: "SELECT * FROM log.events ORDER BY _offset DESC LIMIT 10", rows=10),
]


def rare(number: int) -> str:
    """A node that one entry has; it lies between others, so no bounds tell which record holds it."""
    return f"8{number:015x}"


def with_rare(entries: int) -> Iterator[pa.RecordBatch]:
    """The event log, but that the first entry of each batch has a node of its own."""
    for number, batch in enumerate(events(entries)):
        place = batch.schema.get_field_index("node_id")
        nodes = pa.concat_arrays([pa.array([rare(number)]), batch.column(place).slice(1)])
        yield batch.set_column(place, "node_id", nodes)


def warm(folders: Sequence[tuple[int, Path]], question: Question) -> list[float]:
    """Return the median of each log, all of it in its server's memory."""
    seconds: list[list[float]] = [[] for _ in folders]
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(ours(folder, folder.with_suffix(".run"), *FLAGS)) for _, folder in folders]
        asks = [stack.enter_context(server.connect()) for server in servers]
        for ask in asks:
            ask(ALL)
        for turn in range(-WARMING, ROUNDS):
            for (entries, _), ask, found in zip(folders, asks, seconds, strict=True):
                sql = question.sql(random.Random(WARMING + turn), entries)  # of no number below 0: -1 gives what 1 does
                if turn == -1:
                    assert ask(sql).num_rows == question.rows, question.name
                found.append(timed(ask, sql))
    return [median(found[WARMING:]) for found in seconds]


def cold(folders: Sequence[tuple[int, Path]], question: Question) -> list[float]:
    """Return the median of each log, as the first question after a start, with nothing of the files in the system's memory."""
    seconds: list[list[float]] = [[] for _ in folders]
    for turn in range(COLD_ROUNDS):
        for (entries, folder), found in zip(folders, seconds, strict=True):
            with ours(folder, folder.with_suffix(".run"), *FLAGS) as server, server.connect() as ask:
                evict(folder)
                found.append(timed(ask, question.sql(random.Random(turn), entries)))
    return [median(found) for found in seconds]


def ten(folder: Path) -> Table:
    folders = [(entries, folder / f"log{entries}") for entries in (ENTRIES, TIMES * ENTRIES)]
    for entries, data in folders:
        schema = next(events(1)).schema
        with OpLog.open(str(data)) as log:
            log.append(TABLE, pa.RecordBatchReader.from_batches(schema, with_rare(entries)))
    table = Table(title=f"{ENTRIES:,} entries against {TIMES} times as many", header_style="bold")
    for heading in ("question", "warm, ms", f"× {TIMES}", "ratio", "cold, ms", f"× {TIMES}", "ratio", "at most"):
        table.add_column(heading, justify="left" if heading == "question" else "right")
    for question in QUESTIONS:
        cells = []
        for small, large in (warm(folders, question), cold(folders, question)):
            cells += [f"{small * 1000:,.1f}", f"{large * 1000:,.1f}", f"{large / small:.2f}"]
        table.add_row(question.name, *cells, "" if question.ratio_max is None else f"{question.ratio_max}")
    return table


def files(folder: Path) -> Table:
    many_files(folder / "files")
    return bench_many(f"{FILES:,} files of {FILE_ENTRIES} entries", folder / "files", FILES * FILE_ENTRIES)


def records(folder: Path) -> Table:
    many_records(folder / "records")
    return bench_many(f"{RECORDS:,} records of {RECORD_ENTRIES} entries", folder / "records", RECORDS * RECORD_ENTRIES)


MODES: dict[str, Callable[[Path], Table]] = {"ten": ten, "files": files, "records": records}


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="oplog-scale-"))
    try:
        for mode in sys.argv[1:] or MODES:
            printed(MODES[mode](folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
