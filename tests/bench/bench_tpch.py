"""TPC-H at our server and at DataFusion in process, on the same tables: `make bench-tpch` (SCALE=n).

Ours answers through ADBC; DataFusion reads the generator's Parquet files, and Delta tables by deltalake's own provider.
Every round asks each in turn, warm; a ratio is a peer's time over ours in one round, and the middle one counts. Answers
are compared. What our server keeps of aggregates with conditions goes by their text, so each round's is a new one by its comment;
"asked again" is the same text every time.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from bench import BATCH, put
from datafusion import SessionConfig, SessionContext
from deltalake import DeltaTable, write_deltalake
from peers import Query, ours
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

import tpch

SCALE = float(os.environ.get("SCALE", "1"))
ROUNDS = 5
WARMING = 3  # by then an aggregate asked again is answered from what is kept of it
CACHE = 4 << 30
OURS, AGAIN, PARQUET, DELTA = "flight_oplog", "asked again", "DataFusion on Parquet", "DataFusion on Delta"

Seconds = dict[str, list[float]]


@contextlib.contextmanager
def our_server(files: dict[str, Path], folder: Path) -> Iterator[Query]:
    """Stream the tables into a server of ours; yield how to ask it."""
    with ours(folder / "log", folder / "ours", "--cache-bytes-max", str(CACHE)) as server, server.connect() as ask:
        for table, file in files.items():
            put(server.uri, table, list(pq.ParquetFile(file).iter_batches(BATCH)))
        yield ask


def session() -> SessionContext:
    settings = {"datafusion.execution.parquet.pushdown_filters": "true"}
    return SessionContext(SessionConfig(settings).with_target_partitions(os.cpu_count() or 1))


def on_parquet(files: dict[str, Path]) -> Query:
    tables = session()
    for table, file in files.items():
        tables.register_parquet(table, str(file))
    return lambda sql: tables.sql(sql).to_arrow_table()


def on_delta(files: dict[str, Path], folder: Path) -> Query:
    tables = session()
    for table, file in files.items():
        source, place = pq.ParquetFile(file), str(folder / table)
        write_deltalake(place, pa.RecordBatchReader.from_batches(source.schema_arrow, source.iter_batches(BATCH)))
        tables.register_table(table, DeltaTable(place))
    return lambda sql: tables.sql(sql).to_arrow_table()


def ask_all(asks: dict[str, Query]) -> dict[str, Seconds]:
    """Return the seconds of each query's rounds at each of those asked; check their answers against ours."""
    numbers = itertools.count()
    found: dict[str, Seconds] = {}
    for query, sql in tpch.queries(SCALE).items():
        found[query] = {name: [] for name in asks}
        for turn in range(-WARMING, ROUNDS):
            anew, answers = f"{sql} -- {next(numbers)}", {}
            for name, ask in asks.items():
                began = time.perf_counter()
                answers[name] = ask(sql if name == AGAIN else anew)
                seconds = time.perf_counter() - began
                if turn >= 0:
                    found[query][name].append(seconds)
            for name, answer in answers.items():
                difference = tpch.difference(query, answers[OURS], answer)
                assert difference is None, (query, name, difference)
    return found


def ratio(seconds: Seconds, theirs: str, mine: str = OURS) -> float:
    return statistics.median(their / my for their, my in zip(seconds[theirs], seconds[mine], strict=True))


def show(found: dict[str, Seconds]) -> None:
    table = Table(title=f"TPC-H, scale {SCALE:g}: DataFusion's time over ours, above 1 we are faster", header_style="bold")
    table.add_column("query")
    for heading in ("ours, ms", PARQUET, DELTA, f"{AGAIN}, on Parquet"):
        table.add_column(heading, justify="right")
    ratios = {query: [ratio(seconds, PARQUET), ratio(seconds, DELTA), ratio(seconds, PARQUET, AGAIN)] for query, seconds in found.items()}
    for query, row in ratios.items():
        middle = statistics.median(found[query][OURS]) * 1000
        table.add_row(query, f"{middle:,.1f}", *(f"[{'green' if each >= 1 else 'red'}]{each:.2f}[/]" for each in row))
    table.add_section()
    means = (statistics.geometric_mean(column) for column in zip(*ratios.values(), strict=True))
    table.add_row("geometric mean", "", *(f"{mean:.2f}" for mean in means), style="bold")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="oplog-tpch-") as name:
        folder = Path(name)
        files = tpch.generate(SCALE, folder / "tables")
        with our_server(files, folder) as ask:
            show(ask_all({OURS: ask, PARQUET: on_parquet(files), DELTA: on_delta(files, folder / "delta"), AGAIN: ask}))


if __name__ == "__main__":
    main()
