"""Results as a person or a script reads them: tables, CSV, JSON, Arrow."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_table(schema: pa.Schema, batches: Iterator[pa.RecordBatch], rows_max: int) -> None:
    terminal = console()
    table = Table(header_style="bold", row_styles=None)
    for f in schema:
        right = pa.types.is_integer(f.type) or pa.types.is_floating(f.type) or pa.types.is_decimal(f.type)
        table.add_column(escape(f.name), justify="right" if right else "left", overflow="fold")
    shown = total = 0
    for batch in batches:
        total += batch.num_rows
        for row in _rows(batch.slice(0, max(0, rows_max - shown))):
            table.add_row(*(escape(_cell(value)) for value in row))
            shown += 1
    terminal.print(table)
    rows = f"{total:,} row" + ("" if total == 1 else "s")
    terminal.print(rows if shown == total else f"{rows}, the first {shown} shown; --format csv prints all", style="dim")


def _rows(batch: pa.RecordBatch) -> Iterator[tuple[Any, ...]]:
    """Yield rows as tuples, since names may repeat; a value Python has no type for comes as its text."""
    return zip(*(_values(column) for column in batch.columns), strict=True)


def _values(column: pa.Array) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        values = column.cast(pa.string()).to_pylist()
    return values


def _json(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console() -> Console:
    """A console as wide as the terminal, or as its content where there is none."""
    return Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)


def _cell(value: Any) -> str:
    if value is None:
        return "∅"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.1f}"
    if isinstance(value, bytes):
        return value[:32].hex() + ("…" if len(value) > 32 else "")
    return str(value)


def print_csv(schema: pa.Schema, batches: Iterator[pa.RecordBatch], rows_max: int) -> None:
    writer = csv.writer(sys.stdout)
    writer.writerow(schema.names)
    for batch in batches:
        for row in _rows(batch):
            writer.writerow("" if value is None else value for value in row)


def print_json(schema: pa.Schema, batches: Iterator[pa.RecordBatch], rows_max: int) -> None:
    names = [name if schema.names.index(name) == place else f"{name}:{place}" for place, name in enumerate(schema.names)]
    for batch in batches:
        for row in _rows(batch):
            print(json.dumps(dict(zip(names, map(_json, row), strict=True)), default=str, ensure_ascii=False))


def print_arrow(schema: pa.Schema, batches: Iterator[pa.RecordBatch], rows_max: int) -> None:
    with pa.ipc.new_stream(sys.stdout.buffer, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


PRINTERS = {"table": print_table, "csv": print_csv, "json": print_json, "arrow": print_arrow}
