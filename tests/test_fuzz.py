"""Commands, tickets, handles and bodies of actions that nobody would send: the server answers each with a clear refusal.

FUZZ_SECONDS says how long; FUZZ_SEED makes a run again.
"""

import dataclasses
import os
import random
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from conftest import SEED, ServerProcess, put
from pyarrow import flight

from flight_oplog.flightsql import wire
from flight_oplog.flightsql.service import ACTIONS

SECONDS = float(os.environ.get("FUZZ_SECONDS", "8"))
TEXTS = (
    *(
        "",
        "SELECT 1",
        "SELECT * FROM t",
        "INSERT INTO t VALUES (?, ?)",
        "SELECT ?",
        "CREATE VIEW v AS SELECT 1",
        "DROP VIEW v",
        "%",
        "_",
        "t",
    ),
    *(
        "SELECT '" + "x" * 70_000,
        "(" * 3000,
        "SELECT " + "- " * 3000 + "1",
        "\0",
        "SELECT $1, ?",
        "é" * 500,
        "DELETE FROM t",
        "public",
        "oplog",
    ),
)
# What a client may see. UNKNOWN and INTERNAL would be a fault of the server's.
EXPECTED = (pa.ArrowInvalid, KeyError, NotImplementedError, flight.FlightUnavailableError, flight.FlightCancelledError)


class Fuzzer:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.known: list[bytes] = [b"h", b""]  # handles and tickets that the server gave out

    def value(self, kind: str) -> Any:
        inner = kind.rstrip("?*")
        if kind.endswith("?") and self.random.random() < 0.3:
            return None
        if kind.endswith("*"):
            return tuple(self.value(inner) for _ in range(self.random.randrange(4)))
        if inner in wire._CLASSES:
            return self.message(wire._CLASSES[inner])
        number = self.random.choice((0, 1, 2, 3, 8, 504, 2**31 - 1))
        return {"string": self.random.choice(TEXTS), "bytes": self.random.choice(self.known), "bool": number % 2 == 0, "double": 0.5}.get(
            inner, number
        )

    def message(self, kind: type[Any]) -> Any:
        return kind(**{field.name: self.value(field.metadata["kind"]) for field in dataclasses.fields(kind)})

    def broken(self, data: bytes) -> bytes:
        how = self.random.randrange(8)
        place = self.random.randrange(len(data) + 1)
        if how == 0:
            return data[:place]
        if how == 1 and data:
            changed = bytearray(data)
            changed[place % len(data)] ^= 1 << self.random.randrange(8)
            return bytes(changed)
        if how == 2:
            return data[:place] + self.random.randbytes(self.random.randrange(1, 40)) + data[place:]
        if how == 3:
            return b"\x0a\xff\xff\xff\xff\x0f" + data  # a length that is not there
        if how == 4:
            for _ in range(self.random.randrange(1, 60)):  # a message in a message in a message
                data = b"\x0a" + bytes([min(len(data), 127)]) + data[:127]
            return data
        return data


@pytest.mark.parametrize("part", range(2))
def test_no_bytes_make_the_server_fail(start: Callable[..., ServerProcess], part: int) -> None:
    seed = int(os.environ.get("FUZZ_SEED", time.time_ns() % 1_000_000)) + part
    fuzzer = Fuzzer(seed)
    server = start("--calls-max", "4", "--statements-max", "2")
    commands = [kind for name, kind in wire._CLASSES.items() if name.startswith(("Command", "Ticket"))]
    sent = answered = 0
    with flight.connect(server.uri) as client:
        put(client, "t", SEED)
        memory = 0
        until = time.monotonic() + SECONDS / 2
        while time.monotonic() < until:
            kind = fuzzer.random.choice(commands)
            data = fuzzer.broken(wire.pack(fuzzer.message(kind)))
            action = fuzzer.random.choice(list(ACTIONS))
            body = fuzzer.message(ACTIONS[action].message)
            body = fuzzer.broken(wire.pack(body) if ACTIONS[action].is_sql else wire.encode(body))
            for call in (_info, _schema, _get, _put, lambda client, _, action=action, body=body: _act(client, action, body)):
                sent += 1
                try:
                    fuzzer.known += call(client, data)
                    answered += 1
                except EXPECTED as error:
                    text = str(error)
                    assert "Traceback" not in text, (seed, text)
                    assert "internal error" not in text, (seed, text)
            fuzzer.known = fuzzer.known[-100:]
            if sent == 500:
                memory = server.memory()
        assert client.do_get(flight.Ticket(b'{"topic": "t"}')).read_all().num_rows >= 2, seed
        assert server.process.poll() is None
        assert sent < 1000 or server.memory() < memory + (150 << 20), (seed, sent)
    assert sent > 200
    assert answered > 20
    assert "Traceback" not in server.errors.read_text(), (seed, server.errors.read_text()[-3000:])


def _info(client: flight.FlightClient, data: bytes) -> list[bytes]:
    return [client.get_flight_info(flight.FlightDescriptor.for_command(data)).endpoints[0].ticket.ticket]


def _schema(client: flight.FlightClient, data: bytes) -> list[bytes]:
    client.get_schema(flight.FlightDescriptor.for_command(data))
    return []


def _get(client: flight.FlightClient, data: bytes) -> list[bytes]:
    client.do_get(flight.Ticket(data)).read_all()
    return []


def _act(client: flight.FlightClient, action: str, body: bytes) -> list[bytes]:
    results = [result.body.to_pybytes() for result in client.do_action(flight.Action(action, body))]
    found = []
    for result in results:
        try:
            message = wire.unpack(result)
        except Exception:
            continue
        found += [value for value in vars(message).values() if isinstance(value, bytes) and value]
    return found


def _put(client: flight.FlightClient, data: bytes) -> list[bytes]:
    batch = SEED.slice(0, 1)
    writer, answers = client.do_put(flight.FlightDescriptor.for_command(data), batch.schema)
    try:
        writer.write_batch(batch)
        writer.done_writing()
        answer = answers.read()
    finally:
        writer.close()
    return [answer.to_pybytes()] if answer is not None else []
