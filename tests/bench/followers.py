"""From an append to its delivery at 1 and 100 followers, beside Redis Streams; the cost of a thousand idle ones.

A producer appends 100 entries, waits for the ack, and pauses so that followers on two cores keep up. Followers are
threads of other processes; entries carry the time they were sent, so a delivery's time begins before the append and
includes its durability. Part of `make bench`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from appends import Result, our_server, redis_server
from pyarrow import flight

APPENDS = 100
ENTRIES = 100
PROCESSES = 4
IDLE = 1000
TICKET = flight.Ticket(json.dumps({"topic": "events", "from": "latest", "follow": True, "columns": ["sent"]}).encode())
PAYLOAD = "x" * 60


def follow_ours(uri: str, ready: threading.Semaphore, delays: list[float]) -> None:
    with flight.connect(uri) as client:
        reader = client.do_get(TICKET)
        reader.read_chunk()  # the place, before anything else
        ready.release()
        seen = 0
        while seen < APPENDS * ENTRIES:
            batch = reader.read_chunk().data
            now = time.monotonic()
            delays += [now - sent for sent in dict.fromkeys(batch["sent"].to_pylist())]
            seen += batch.num_rows
        reader.cancel()


def follow_redis(socket: str, ready: threading.Semaphore, delays: list[float]) -> None:
    from redis import Redis

    client = Redis(unix_socket_path=socket)
    ready.release()
    seen, last = 0, "0"
    while seen < APPENDS * ENTRIES:
        [[_, found]] = client.xread({"events": last}, block=0)
        now = time.monotonic()
        last, seen = found[-1][0], seen + len(found)
        delays += [now - sent for sent in dict.fromkeys(float(fields[b"sent"]) for _, fields in found)]


def follow(kind: str, address: str, followers: int) -> None:
    """Run in a process of its own: follow with so many threads, and print how long deliveries took."""
    ready, delays = threading.Semaphore(0), [[] for _ in range(followers)]  # type: ignore[var-annotated]
    target: Callable[..., None] = {"ours": follow_ours, "redis": follow_redis}[kind]
    threads = [threading.Thread(target=target, args=(address, ready, found)) for found in delays]
    for thread in threads:
        thread.start()
    for _ in threads:
        ready.acquire()
    print("ready", flush=True)
    for thread in threads:
        thread.join()
    print(json.dumps([delay for found in delays for delay in found]), flush=True)


def deliveries(kind: str, address: str, followers: int, append: Callable[[float], None]) -> list[float]:
    shares = [followers // PROCESSES + (number < followers % PROCESSES) for number in range(PROCESSES)]
    commands = [[sys.executable, __file__, kind, address, str(share)] for share in shares if share]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    found: list[float] = []
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for _ in range(APPENDS):
        append(time.monotonic())
        time.sleep(0.02 if followers == 1 else 0.25)
    for process in processes:
        assert process.stdout is not None
        found += json.loads(process.stdout.readline())
        process.wait()
    return sorted(found)


def p(delays: list[float], share: float) -> float:
    """A percentile, in milliseconds."""
    return delays[int(len(delays) * share)] * 1000


def at_ours(folder: Path, followers: int) -> list[float]:
    payload = pa.array([PAYLOAD] * ENTRIES)
    with our_server(folder, "--calls-max", "2000") as uri, flight.connect(uri) as client:
        schema = pa.schema([("sent", pa.float64()), ("payload", pa.string())])
        writer, acks = client.do_put(flight.FlightDescriptor.for_path("events"), schema)

        def append(sent: float) -> None:
            batch = pa.record_batch([pa.array([sent] * ENTRIES), payload], schema=schema)
            writer.write_with_metadata(batch, b'{"sequence": 0}')
            acks.read()

        append(0.0)
        found = deliveries("ours", uri, followers, append)
        writer.close()
        return found


def at_redis(socket: str, followers: int) -> list[float]:
    from redis import Redis

    client = Redis(unix_socket_path=socket)
    client.delete("events")

    def append(sent: float) -> None:
        with client.pipeline(transaction=True) as pipeline:
            for _ in range(ENTRIES):
                pipeline.xadd("events", {"sent": sent, "payload": PAYLOAD})
            pipeline.execute()

    return deliveries("redis", socket, followers, append)


def idle(folder: Path) -> Result:
    """What a thousand followers cost that have nothing to receive."""
    with our_server(folder, "--calls-max", "2000") as uri, flight.connect(uri) as client:
        writer, _ = client.do_put(flight.FlightDescriptor.for_path("events"), pa.schema([("sent", pa.float64())]))
        writer.write_batch(pa.record_batch({"sent": [0.0]}))
        writer.close()
        server = int(
            subprocess.run(["pgrep", "-f", f"serve --data {folder}"], capture_output=True, text=True, check=True).stdout.split()[0]
        )
        before = memory(server)
        readers = [client.do_get(TICKET) for _ in range(IDLE)]
        for reader in readers:
            reader.read_chunk()
        began, used = time.monotonic(), cpu(server)
        time.sleep(10)
        share = (cpu(server) - used) / (time.monotonic() - began)
        each = (memory(server) - before) / IDLE
        began = time.monotonic()
        client.do_get(flight.Ticket(b'{"topic": "events"}')).read_all()
        answer = time.monotonic() - began
        for reader in readers:
            reader.cancel()
    return (
        f"{IDLE} idle followers",
        f"{share * 100:.0f} % of a core, {each / 1024:.0f} KiB each, a read takes {answer * 1000:.1f} ms",
        1 - share,
        0.0,
    )


def cpu(process: int) -> float:
    parts = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")


def memory(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def bench_followers() -> list[Result]:
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="oplog-followers-") as name, redis_server(Path(name)) as socket:
        for followers in (1, 100):
            mine = at_ours(Path(name) / f"log{followers}", followers)
            what = f"append to delivery, {followers} followers: p50 {p(mine, 0.5):.1f} ms, p95 {p(mine, 0.95):.1f} ms"
            if socket is None:
                print("Redis Streams: skipped, needs redis-server (apt-get install redis-server)", file=sys.stderr)
                results.append((what, "", 0.0, 0.0))
                continue
            peer = at_redis(socket, followers)
            against = f"Redis Streams, fsync always: p50 {p(peer, 0.5):.1f} ms, p95 {p(peer, 0.95):.1f} ms"
            results.append((what, against, p(peer, 0.5) / p(mine, 0.5), 0.0))
        results.append(idle(Path(name) / "idle"))
    return results


if __name__ == "__main__":
    follow(sys.argv[1], sys.argv[2], int(sys.argv[3]))
