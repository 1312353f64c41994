"""Kill the server, make its storage fail, and look whether every acknowledged append is there once: `make faults SEED=1`.

A real server process serves producers that retry after any error. It is killed at random moments and at every named
point of a commit, and started again; at the end everything ever acknowledged is looked up in the log. On an object
store a second server serves the same log all the while, and producers go from one to the other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import select
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import pyarrow as pa
from faulty_server import BUCKET_POINTS, FOLDER_POINTS
from pyarrow import flight
from s3_server import object_store

from flight_oplog import OpLog
from flight_oplog.provider import topic_batches

TOPICS = ("orders", "clicks")
IN_FLIGHT = 20
SCHEMA = pa.schema([("producer", pa.string()), ("sequence", pa.int64()), ("place", pa.int64()), ("payload", pa.binary())])


def entries(producer: str, sequence: int) -> pa.RecordBatch:
    """The entries of an append: its name and number decide how many there are and what is in them."""
    chance = random.Random(f"{producer}/{sequence}")
    count = chance.choice([0, 1, 3, 10, 100, 2000])
    payloads = [chance.randbytes(chance.choice([0, 20, 400])) for _ in range(count)]
    return pa.record_batch([[producer] * count, [sequence] * count, list(range(count)), payloads], schema=SCHEMA)


class Server:
    """The server process, with a fault built in."""

    def __init__(self, data: str, errors: Path, fault: str, *flags: str) -> None:
        self.fault = fault
        script = str(Path(__file__).with_name("faulty_server.py"))
        command = [sys.executable, script, fault, "--data", data, "--listen", "grpc://127.0.0.1:0", *flags]
        self.errors = errors.open("ab")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.errors, text=True)
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 60)
        self.uri = self.process.stdout.readline().strip() if ready else ""  # empty when it was killed before it served

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.errors.close()


@dataclass
class Producer:
    """Sends appends 0, 1, 2, ... to one topic, keeps some under way, and sends again what was not acknowledged."""

    name: str
    topic: str
    run: Run
    receipts: list[dict[str, Any]] = field(default_factory=list)
    refusals: set[str] = field(default_factory=set)

    def work(self) -> None:
        while not self.run.over.is_set():
            server = random.choice([self.run.server, self.run.other or self.run.server])
            if server is None or not server.uri:
                time.sleep(0.02)
                continue
            try:
                self._stream(server.uri)
            except (pa.ArrowException, OSError, EOFError) as error:
                self.refusals.add(str(error).split(". Detail")[0].split(". gRPC")[0][:160])
                time.sleep(0.02)

    def _stream(self, uri: str) -> None:
        with flight.connect(uri) as client:
            if random.random() < 0.3:
                self._as_one_stream(client)
                return
            options = flight.FlightCallOptions(headers=[(b"oplog-producer", self.name.encode())], timeout=20)
            writer, acks = client.do_put(flight.FlightDescriptor.for_path(self.topic), SCHEMA, options)
            with contextlib.closing(writer):
                first = sent = len(self.receipts)
                while sent - first < 200 and not self.run.over.is_set():
                    while sent - len(self.receipts) < IN_FLIGHT:
                        writer.write_with_metadata(entries(self.name, sent), json.dumps({"sequence": sent}).encode())
                        sent += 1
                    self._take(acks)
                while len(self.receipts) < sent:
                    self._take(acks)
                writer.done_writing()

    def _as_one_stream(self, client: flight.FlightClient) -> None:
        """One append in pieces, numbered by a header, as clients send that know no metadata."""
        sequence = len(self.receipts)
        headers = [(b"oplog-producer", self.name.encode()), (b"oplog-sequence", str(sequence).encode()), (b"oplog-acks", b"true")]
        options = flight.FlightCallOptions(headers=headers, timeout=20)
        writer, acks = client.do_put(flight.FlightDescriptor.for_path(self.topic), SCHEMA, options)
        with contextlib.closing(writer):
            batch = entries(self.name, sequence)
            for start in range(0, batch.num_rows, 100):
                writer.write_batch(batch.slice(start, 100))
            writer.done_writing()
            self._take(acks)

    def _take(self, acks: Any) -> None:
        ack = acks.read()
        if ack is None:
            raise EOFError("the stream ended without an ack")
        receipt = json.loads(ack.to_pybytes())
        if "error" in receipt:
            raise EOFError(receipt["error"])
        assert receipt["sequence"] == len(self.receipts), receipt
        self.receipts.append(receipt)


class Run:
    """Producers and a server that does not last; `misbehave` is how to tell an object store to."""

    def __init__(self, folder: Path, seed: int, uri: str | None = None, misbehave: Any = None) -> None:
        self.data = uri or str(folder / "log")
        self.points = BUCKET_POINTS if uri else FOLDER_POINTS
        self._errors = folder / "stderr"
        self._misbehave = misbehave
        self.other = Server(uri, self._errors, "none", "--refresh-ms", "100") if uri else None
        self.chance = random.Random(seed)
        self.over = threading.Event()
        self.server: Server | None = None
        self.deaths: dict[str, int] = {}
        self.producers = [Producer(f"p{number}", TOPICS[number % 2], self) for number in range(4)]
        self._threads = [threading.Thread(target=producer.work) for producer in self.producers]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def live_through(self, fault: str, seconds: float, *flags: str) -> None:
        """Serve with a fault until the server dies of it, or for so long, and then kill it."""
        if self._misbehave and fault.startswith("errors"):
            every = int(fault.partition(":")[2])
            self._misbehave(every=every, method=self.chance.choice(["PUT", "PUT", "GET", "HEAD"]), done="after-success" in fault)
            self.server = Server(self.data, self._errors, "none", *flags)
        else:
            self.server = Server(self.data, self._errors, fault, *flags)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.server.process.wait(seconds)
        died = self.server.process.poll() is not None
        self.server.stop()
        if self._misbehave:
            self._misbehave()
        kind = fault.partition(":")[0] + ("" if died else " (killed from outside)")
        self.deaths[kind] = self.deaths.get(kind, 0) + 1

    def finish(self) -> str:
        """End with a healthy server, so that every producer gets its last receipts; then check, and say what was seen."""
        self.server = Server(self.data, self._errors, "none")
        goals = {producer.name: len(producer.receipts) + 5 for producer in self.producers}
        deadline = time.monotonic() + 60
        while any(len(producer.receipts) < goals[producer.name] for producer in self.producers):
            assert time.monotonic() < deadline, "producers do not get on with a healthy server"
            time.sleep(0.05)
        self.over.set()
        for thread in self._threads:
            thread.join()
        self.stop()
        return self.check()

    def stop(self) -> None:
        self.over.set()
        for server in (self.server, self.other):
            if server is not None:
                server.stop()

    def check(self) -> str:
        with OpLog.open(self.data) as log:
            orphans = [problem.where for problem in log.verify() if problem.severity == "note"]
            assert [problem for problem in log.verify() if problem.severity == "error"] == []
            assert sorted(log.remove_orphans(0)) == sorted(orphans)
            assert log.verify() == []
            snapshot = log.snapshot()
            for topic in TOPICS:
                self._check_topic(pa.Table.from_batches(topic_batches(snapshot, snapshot.topic(topic), 0, 1 << 22), SCHEMA), topic)
        acked = sum(len(producer.receipts) for producer in self.producers)
        again = sum(receipt["duplicate"] for producer in self.producers for receipt in producer.receipts)
        deaths = ", ".join(f"{kind} {times}" for kind, times in sorted(self.deaths.items()))
        return (
            f"deaths: {deaths}\n{acked} appends acknowledged, {again} of them when sent again; {sum(self.deaths.values())} deaths; "
            f"{len(orphans)} orphans removed; table_version {snapshot.table_version}"
        )

    def _check_topic(self, stored: pa.Table, topic: str) -> None:
        """Every acknowledged append is at its offset with its entries; whatever else is there is whole, once, in order."""
        covered = 0
        for producer in self.producers:
            if producer.topic != topic:
                continue
            for sequence, receipt in enumerate(producer.receipts):
                expected = entries(producer.name, sequence)
                first = receipt["first_offset"]
                if first is None:  # an append without entries, or one no longer remembered
                    assert receipt["duplicate"]
                    continue
                assert receipt["entries"] == expected.num_rows, receipt
                found = stored.slice(first, expected.num_rows)
                assert found.equals(pa.Table.from_batches([expected])), f"{producer.name}/{sequence} is not at offset {first}"
        runs: dict[str, int] = {}
        while covered < stored.num_rows:
            name, sequence = stored["producer"][covered].as_py(), stored["sequence"][covered].as_py()
            while runs.setdefault(name, -1) + 1 < sequence:  # those between had no entries
                runs[name] += 1
                assert entries(name, runs[name]).num_rows == 0, f"{name}/{runs[name]} is missing"
            assert sequence == runs[name] + 1, f"{name}/{sequence} is there again"
            expected = entries(name, sequence)
            assert stored.slice(covered, expected.num_rows).equals(pa.Table.from_batches([expected])), f"{name}/{sequence} is not whole"
            runs[name] = sequence
            covered += expected.num_rows


def run(live: Run, kills: int, say: Any = lambda words: None) -> str:
    """Live through every point once and then through `kills` random deaths."""
    live.start()
    try:
        for point in live.points:
            at_checkpoint = "checkpoint" in point
            flags = () if at_checkpoint else ("--record-bytes-max", "50000")
            live.live_through(f"{point}:{1 if at_checkpoint else live.chance.randrange(1, 12)}", 60, *flags)
            say(f"{point}: lived through")
        for number in range(kills):
            kind = live.chance.choice(["none", "none", *live.points, "errors:20", "errors-after-success:20", "slow:0.1"])
            times = live.chance.randrange(1, 40)
            fault = f"{kind}:{times}" if kind in live.points else kind
            live.live_through(fault, live.chance.uniform(0.3, 2.5))
            say(f"{number + 1} of {kills}: {fault}")
        return live.finish()
    finally:
        live.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--s3", action="store_true", help="on an object store, with a second server")
    options = parser.parse_args()
    random.seed(options.seed)
    with tempfile.TemporaryDirectory(prefix="oplog-faults-") as folder, contextlib.ExitStack() as stack:
        s3 = stack.enter_context(object_store()) if options.s3 else None
        live = Run(Path(folder), options.seed, s3.new_log(), s3.misbehave) if s3 else Run(Path(folder), options.seed)
        print(run(live, options.kills, lambda words: print(words, flush=True)))


if __name__ == "__main__":
    main()
