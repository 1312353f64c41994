"""Threads of DataFusion's and gRPC's: which of them Python still knows when they come back."""

import threading
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
from datafusion import SessionConfig, SessionContext
from pyarrow import dataset, flight

from flight_oplog import threads

ONE = pa.record_batch({"a": [1]})
NUMBERS = {"sum": 6}


class Fragment:
    """One partition, that notes whether its thread has been here before and has kept what it had."""

    projected_schema = ONE.schema

    def __init__(self, found: list[bool], local: threading.local) -> None:
        self._found, self._local = found, local

    def scanner(self, *_: Any, **__: Any) -> "Fragment":
        return self

    def to_batches(self) -> Iterator[pa.RecordBatch]:
        threads.stay()
        self._found.append(hasattr(self._local, "was_here"))
        self._local.was_here = True
        yield from [ONE] * 3


class Table(dataset.Dataset):
    def __init__(self, fragments: list[Fragment]) -> None:
        self._fragments = fragments

    @property
    def schema(self) -> pa.Schema:
        return ONE.schema

    def scanner(self, *_: Any, **__: Any) -> Fragment:
        return self._fragments[0]

    def get_fragments(self, filter: Any = None) -> Iterator[Fragment]:
        return iter(self._fragments)


def ask(times: int) -> list[bool]:
    found: list[bool] = []
    local = threading.local()
    context = SessionContext(SessionConfig().with_target_partitions(2))
    context.register_dataset("t", Table([Fragment(found, local), Fragment(found, local)]))
    for _ in range(times):
        assert context.sql("SELECT sum(a) AS sum FROM t").to_pylist() == [NUMBERS]
    return found


def test_threads_of_the_pool_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    ask(20)  # whichever threads there are, they stay from now on
    assert any(ask(20)[2:])
    monkeypatch.setattr(threads, "_here", threading.local())
    monkeypatch.setattr(threads, "_places", threading.BoundedSemaphore(1))
    ask(20)
    assert not threads._places.acquire(blocking=False), "one more may stay, and no more than that"


def test_a_thread_that_python_called_from_does_not_stay() -> None:
    before = threads._places._value
    threads.stay()

    def staying() -> None:
        threads.stay()

    thread = threading.Thread(target=staying)
    thread.start()
    thread.join()
    assert threads._places._value == before
    assert not hasattr(threads._here, "stays")


class Visits(flight.ServerMiddlewareFactory):
    """A visit for each call; notes what its thread still had of an earlier call, and of this call when it came back."""

    def __init__(self) -> None:
        self.local = threading.local()
        self.of_earlier: list[bool] = []
        self.of_this: list[bool] = []
        self.by_another: list[bool] = []

    def start_call(self, info: Any, headers: Any) -> flight.ServerMiddleware:
        visits = self
        self.of_earlier.append(hasattr(self.local, "was_here"))
        self.local.was_here = True
        visit, thread = threads.Visit(), threading.get_ident()

        class Call(flight.ServerMiddleware):
            def call_completed(self, exception: Any) -> None:
                visits.by_another.append(threading.get_ident() != thread)
                visit.end()

        return Call()

    def look(self) -> None:
        self.of_this.append(hasattr(self.local, "was_here"))


class Server(flight.FlightServerBase):
    def __init__(self, visits: Visits) -> None:
        super().__init__("grpc://127.0.0.1:0", middleware={"visits": visits})
        self._visits = visits

    def do_get(self, context: Any, ticket: Any) -> flight.GeneratorStream:
        def batches() -> Iterator[pa.RecordBatch]:
            for _ in range(3):
                self._visits.look()
                yield ONE

        return flight.GeneratorStream(ONE.schema, batches())

    def do_action(self, context: Any, action: Any) -> Iterator[bytes]:
        self._visits.look()
        yield b"a"
        self._visits.look()

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        self._visits.look()
        reader.read_all()


def test_a_call_of_grpc_is_one_visit() -> None:
    visits = Visits()
    with Server(visits) as server, flight.connect(f"grpc://127.0.0.1:{server.port}") as client:
        for _ in range(20):
            assert client.do_get(flight.Ticket(b"")).read_all().num_rows == 3
            assert len(list(client.do_action(flight.Action("a", b"")))) == 1
            writer, _ = client.do_put(flight.FlightDescriptor.for_path("a"), ONE.schema)
            writer.write_batch(ONE)
            writer.close()
    assert len(visits.of_this) == 20 * (3 + 2 + 1)
    assert all(visits.of_this)
    assert not any(visits.of_earlier), "and it is over with the call: threads that go leave nothing behind"
    assert not any(visits.by_another)
