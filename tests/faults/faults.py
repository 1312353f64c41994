"""Kill the server, make its disk fail, and look whether every acknowledged append is there once: `make faults SEED=1`.

A real server process serves producers that retry after any error. It is killed at random moments and at every named
point of a commit, and started again; at the end everything ever acknowledged is looked up in the log.
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

import pyarrow as pa
from faulty_server import POINTS
from pyarrow import flight

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

    def __init__(self, folder: Path, fault: str, *flags: str) -> None:
        self.fault = fault
        script = str(Path(__file__).with_name("faulty_server.py"))
        command = [sys.executable, script, fault, "--data", str(folder), "--listen", "grpc://127.0.0.1:0", *flags]
        self.errors = (folder.parent / "stderr").open("ab")
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
            server = self.run.server
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
    """Producers and a server that does not last."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder / "log"
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
        self.server = Server(self.folder, fault, *flags)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.server.process.wait(seconds)
        died = self.server.process.poll() is not None
        self.server.stop()
        kind = fault.partition(":")[0] + ("" if died else " (killed from outside)")
        self.deaths[kind] = self.deaths.get(kind, 0) + 1

    def finish(self) -> str:
        """End with a healthy server, so that every producer gets its last receipts; then check, and say what was seen."""
        self.server = Server(self.folder, "none")
        goals = {producer.name: len(producer.receipts) + 5 for producer in self.producers}
        deadline = time.monotonic() + 60
        while any(len(producer.receipts) < goals[producer.name] for producer in self.producers):
            assert time.monotonic() < deadline, "producers do not get on with a healthy server"
            time.sleep(0.05)
        self.over.set()
        for thread in self._threads:
            thread.join()
        self.server.stop()
        return self.check()

    def check(self) -> str:
        with OpLog.open(str(self.folder)) as log:
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


def run(folder: Path, seed: int, kills: int, say: Any = lambda words: None) -> str:
    """Live through every point once and then through `kills` random deaths."""
    live = Run(folder, seed)
    live.start()
    try:
        for point in POINTS:
            at_checkpoint = "checkpoint" in point
            flags = () if at_checkpoint else ("--record-bytes-max", "50000")
            live.live_through(f"{point}:{1 if at_checkpoint else live.chance.randrange(1, 12)}", 60, *flags)
            say(f"{point}: lived through")
        for number in range(kills):
            kind = live.chance.choice(["none", "none", *POINTS, "errors:20", "errors-after-success:20", "slow:0.1"])
            times = live.chance.randrange(1, 40)
            fault = f"{kind}:{times}" if kind in POINTS else kind
            live.live_through(fault, live.chance.uniform(0.3, 2.5))
            say(f"{number + 1} of {kills}: {fault}")
        return live.finish()
    finally:
        live.over.set()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=300)
    options = parser.parse_args()
    random.seed(options.seed)
    with tempfile.TemporaryDirectory(prefix="oplog-faults-") as folder:
        print(run(Path(folder), options.seed, options.kills, lambda words: print(words, flush=True)))


if __name__ == "__main__":
    main()
