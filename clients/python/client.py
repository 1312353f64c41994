"""A client of flight_oplog in Python, of pyarrow.flight and the ADBC driver for Flight SQL alone.

    python client.py URI            one of everything, on a fresh log
    python client.py URI storm N    N appends through whatever happens to the connection, each written once

Take what you need: `append_each` is the producer, `storm` the retry around it, `ask` the questions, `tail` the follower;
login.py is how to log in.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import adbc_driver_flightsql.dbapi as adbc
import pyarrow as pa
from login import adbc_options, flight_client
from pyarrow import flight

ORDERS = pa.schema({"id": pa.int64(), "customer": pa.string(), "amount": pa.float64(), "placed": pa.timestamp("us", "UTC")})
READINGS = pa.schema({"id": pa.int64(), "value": pa.float64()})
STORM = pa.schema({"n": pa.int64()})

IN_FLIGHT_MAX = 64
PAUSE_SECONDS_MAX = 1.0
PATIENCE_SECONDS = 60


class Refused(Exception):
    """The server answered an append with an error."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(answer["error"])
        # Sending the same thing again can only help where the server says that it is not the request that is wrong.
        self.is_passing = answer["status"] in ("UNAVAILABLE", "CANCELLED", "INTERNAL")


def append_each(
    client: flight.FlightClient, topic: str, producer: str, schema: pa.Schema, appends: Iterable[tuple[int, pa.RecordBatch]]
) -> Iterator[dict[str, Any]]:
    """Send each (sequence, batch) as an append of its own and yield their receipts, in their order.

    Up to IN_FLIGHT_MAX appends are sent ahead of the receipts. Raises Refused for an append that is answered with an
    error, and pyarrow's errors when the stream breaks. After any of them, what has no receipt may or may not have been
    written: send it again with the same sequence numbers, and the server writes it once.
    """
    # The deadline is for a server that neither answers nor closes the connection. Whoever retries just goes on after it.
    options = flight.FlightCallOptions(headers=[(b"oplog-producer", producer.encode())], timeout=PATIENCE_SECONDS)
    writer, answers = client.do_put(flight.FlightDescriptor.for_path(topic), schema, options)

    def receipt() -> dict[str, Any]:
        answer = answers.read()
        if answer is None:
            writer.close()  # raises what the stream ended with
            raise flight.FlightUnavailableError("the stream ended before all appends were acknowledged")
        answered: dict[str, Any] = json.loads(answer.to_pybytes())
        if "error" in answered:
            raise Refused(answered)
        return answered

    try:
        waiting = 0
        for sequence, batch in appends:
            if waiting == IN_FLIGHT_MAX:
                yield receipt()
                waiting -= 1
            writer.write_with_metadata(batch, json.dumps({"sequence": sequence}).encode())
            waiting += 1
        writer.done_writing()
        for _ in range(waiting):
            yield receipt()
        writer.close()
    except BaseException:
        # A stream that failed says so once more when it is closed, and what it failed with is already known.
        with contextlib.suppress(pa.ArrowException, OSError):
            writer.close()
        raise


def offsets(receipt: dict[str, Any]) -> str:
    first = receipt["first_offset"]
    return f"offsets {first} to {first + receipt['entries'] - 1}"


def order_batch(k: int) -> pa.RecordBatch:
    """Return append k: two orders."""
    day = datetime(2026, 1, 1, tzinfo=UTC)
    ids = [2 * k, 2 * k + 1]
    placed = [day + timedelta(minutes=order) for order in ids]
    columns = {"id": ids, "customer": ["ada", "grace"], "amount": [10.0 * k + 0.5, 20.0 * k + 0.25], "placed": placed}
    return pa.RecordBatch.from_pydict(columns, schema=ORDERS)


def produce(client: flight.FlightClient) -> None:
    """Append exactly once: a producer that numbers its appends may send any of them again."""
    orders = [(k, order_batch(k)) for k in range(3)]
    for k, receipt in enumerate(append_each(client, "orders", "till-1", ORDERS, orders)):
        print(f"append {k}: {offsets(receipt)}")

    # Sent again, append 1 is not written again: the receipt is the original one. A gap in the numbers, on the other
    # hand, means that appends were lost on the way here, and the server does not guess which.
    try:
        for receipt in append_each(client, "orders", "till-1", ORDERS, [(1, order_batch(1)), (7, order_batch(7))]):
            print(f"append 1 again: {'duplicate' if receipt['duplicate'] else 'written twice'}, {offsets(receipt)}")
    except Refused as refused:
        expected = re.search(r"expected (\d+)", str(refused))
        print(f"append 7: refused, expected {expected[1] if expected else '?'}")


def ingest(connection: adbc.Connection) -> None:
    """Load a table in bulk: all batches are one append, written whole or not at all."""

    def batches() -> Iterator[pa.RecordBatch]:
        for first in range(0, 10_000, 2500):
            ids = list(range(first, first + 2500))
            yield pa.RecordBatch.from_pydict({"id": ids, "value": [number / 4 for number in ids]}, schema=READINGS)

    with connection.cursor() as cursor:
        entries = cursor.adbc_ingest("readings", pa.RecordBatchReader.from_batches(READINGS, batches()), mode="create")
        print(f"ingest: {entries} entries")


def ask(connection: adbc.Connection) -> None:
    """Ask in SQL; the second question is a prepared statement with bound values."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) AS n, max(value) AS top FROM readings")
        [(n, top)] = cursor.fetchall()
        print(f"readings: {n}, top {top:.2f}")

    totals = """SELECT customer, count(*) AS n, sum(amount) AS total FROM orders
        WHERE amount > ? AND customer <> ? GROUP BY customer ORDER BY customer"""
    with connection.cursor() as cursor:
        cursor.execute(totals, (0.4, "nobody"))
        for row in cursor.fetch_arrow_table().to_pylist():
            print(f"{row['customer']}: {row['n']} orders, {row['total']:.2f}")


def tail(client: flight.FlightClient, topic: str, start: int, entries: int) -> None:
    """Follow a topic from an offset until so many entries came; more would come with every commit."""
    ticket = flight.Ticket(json.dumps({"topic": topic, "from": start, "follow": True}).encode())
    reader = client.do_get(ticket)
    seen, next_offset = 0, start
    while seen < entries:
        chunk = reader.read_chunk()  # a batch without rows is a sign of life
        for order in chunk.data.to_pylist():
            print(f"tail: {order['id']} {order['customer']} {order['amount']:.2f}")
        seen += chunk.data.num_rows
        # Where to come back to. Large runs come in several batches, and only the last of them says it.
        if chunk.app_metadata is not None and chunk.app_metadata.size:
            next_offset = json.loads(chunk.app_metadata.to_pybytes())["next_offset"]
    reader.cancel()
    print(f"tail: next offset {next_offset}")


def storm(uri: str, appends: int) -> None:
    """Append 0 to `appends` - 1, one entry each; whatever breaks on the way, each is written once."""
    acknowledged, pause, last_progress = 0, 0.05, time.monotonic()
    while acknowledged < appends:
        try:
            with flight_client(uri) as client:
                unacknowledged = ((n, pa.RecordBatch.from_pydict({"n": [n]}, schema=STORM)) for n in range(acknowledged, appends))
                for _ in append_each(client, "storm", "storm", STORM, unacknowledged):
                    acknowledged, pause, last_progress = acknowledged + 1, 0.05, time.monotonic()
        except (Refused, pa.ArrowException, OSError) as error:
            if isinstance(error, Refused) and not error.is_passing:
                raise
            if time.monotonic() - last_progress > PATIENCE_SECONDS:
                raise
            time.sleep(pause)
            pause = min(2 * pause, PAUSE_SECONDS_MAX)
    print(f"storm: {acknowledged} appends acknowledged")


def main(arguments: list[str]) -> None:
    match arguments:
        case [uri]:
            with flight_client(uri) as client, adbc.connect(uri, adbc_options(), autocommit=True) as connection:
                produce(client)
                ingest(connection)
                ask(connection)
                tail(client, "orders", start=4, entries=2)
        case [uri, "storm", appends]:
            storm(uri, int(appends))
        case _:
            sys.exit("usage: client.py URI [storm N]")


if __name__ == "__main__":
    main(sys.argv[1:])
