"""pyarrow.flight with just enough of Flight SQL that ADBC can ask two statements, answered from memory.

It neither parses, plans nor reads a file, so `ONE` takes here what four calls to a server in Python cost, and `ALL` what
pyarrow needs to send so many batches. A statement's handle and its ticket are its own text.

    python memory_server.py TABLE ADDRESS        # the folder of a Delta table; grpc://127.0.0.1:8815
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable
from peers import ALL, ONE
from pyarrow import dataset, flight

from flight_oplog.flightsql import wire

BATCH = 21_500  # rows of the event log in 2.5 MB


class MemoryServer(flight.FlightServerBase):
    """Serves `answers`, by the text of their statements; a KeyError, NOT_FOUND to the client, for any other."""

    def __init__(self, address: str, answers: Mapping[str, pa.Table]) -> None:
        super().__init__(address)
        self._answers = answers

    def do_action(self, context: Any, action: flight.Action) -> list[bytes]:
        if action.type != "CreatePreparedStatement":
            return []  # one that is closed held nothing
        query = wire.unpack(action.body.to_pybytes()).query
        schema = self._answers[query].schema.serialize().to_pybytes()
        return [wire.pack(wire.ActionCreatePreparedStatementResult(query.encode(), schema))]

    def get_flight_info(self, context: Any, descriptor: flight.FlightDescriptor) -> flight.FlightInfo:
        handle = wire.unpack(descriptor.command).prepared_statement_handle
        return flight.FlightInfo(self._answers[handle.decode()].schema, descriptor, [flight.FlightEndpoint(handle, [])])

    def do_get(self, context: Any, ticket: flight.Ticket) -> flight.RecordBatchStream:
        return flight.RecordBatchStream(self._answers[ticket.ticket.decode()])


def main() -> None:
    table, address = sys.argv[1:]
    files = dataset.dataset([uri.removeprefix("file://") for uri in DeltaTable(table).file_uris()])
    batches = files.to_batches(batch_size=BATCH)
    answers = {ONE: pa.table({"one": [1]}), ALL: pa.Table.from_batches(batches, files.schema)}
    MemoryServer(address, answers).serve()


if __name__ == "__main__":
    main()
