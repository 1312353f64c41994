"""A disk that is read-only, slow, or errs now and then: nothing lost, nothing doubled, and a clear status."""

import errno
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adbc_driver_flightsql.dbapi as adbc
import pyarrow as pa
import pytest
from conftest import SEED, ServerProcess, ask, put
from pyarrow import flight
from test_producers import batch
from test_server import refused
from test_servers import marks

from flight_oplog import Config, OpLog, Origin
from flight_oplog.errors import OutcomeUnknown, TryAgain


def remount(place: Path, how: str) -> None:
    if subprocess.run(["mount", "-o", f"remount,{how}", str(place)], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to remount a tmpfs (run as root)")


def test_a_read_only_folder_refuses_appends_and_serves_queries(start: Callable[..., ServerProcess], small_disk: Path) -> None:
    server = start(folder=small_disk / "log")
    with flight.connect(server.uri) as client, adbc.connect(server.uri, autocommit=True) as connection:
        put(client, "t", SEED)
        remount(small_disk, "ro")
        for topic in ("t", "new"):
            with refused(
                flight.FlightUnavailableError,
                "writing a data file failed: the file system is read-only; nothing was written; try again when that is mended",
            ):
                put(client, topic, SEED)
        assert ask(connection, "SELECT count(*) AS n FROM t") == [{"n": 2}]
        remount(small_disk, "rw")
        assert put(client, "t", SEED)["first_offset"] == 2
    server.stop()


def test_an_ack_waits_for_a_slow_fsync_and_nobody_else_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def slow(handle: int) -> None:
        time.sleep(0.1)
        real(handle)

    with OpLog.open(str(folder)) as log:
        log.append("t", batch(0))
        monkeypatch.setattr(os, "fsync", slow)
        began = time.monotonic()
        receipts: list[Any] = []
        threads = [threading.Thread(target=lambda n=n: receipts.append(log.append("t", batch(n)))) for n in range(1, 21)]
        for thread in threads:
            thread.start()
        time.sleep(0.15)
        since = time.monotonic()
        assert log.snapshot_at(1).topic("t").next_offset == 1
        assert time.monotonic() - since < 0.05, "who reads does not wait"
        for thread in threads:
            thread.join()
        took = time.monotonic() - began
        assert took >= 0.4, "file, its folder, the entry and its folder"
        assert took < 2, "twenty appends shared a few commits"
        assert len({receipt.table_version for receipt in receipts}) <= 4
        assert sorted(marks(log)) == list(range(21))
        monkeypatch.undo()


@pytest.mark.parametrize("done", [False, True], ids=["instead", "after it was done"])
@pytest.mark.parametrize("every", [3, 10])
def test_a_disk_that_errs_now_and_then(folder: Path, monkeypatch: pytest.MonkeyPatch, every: int, done: bool) -> None:
    chance = random.Random(every)
    real = {name: getattr(os, name) for name in ("link", "fsync", "write", "open")}

    def erring(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            fails = chance.randrange(every) == 0
            result = real[name](*args, **kwargs) if done or not fails else None
            if fails:
                raise OSError(errno.EIO, "Input/output error")
            return result

        return call

    names = ("link", "fsync") if done else ("link", "fsync", "write", "open")
    with OpLog.open(str(folder), Config(record_entries_max=20)) as log:
        told: set[str] = set()
        for name in names:
            monkeypatch.setattr(os, name, erring(name))
        for sequence in range(40):
            data = pa.record_batch({"mark": pa.array([sequence] * (30 if sequence % 7 == 0 else 1), pa.int64())})
            while True:
                try:
                    log.append("t", data, Origin("p", 0, sequence))
                    break
                except (TryAgain, OutcomeUnknown) as error:
                    told.add(str(error))
        monkeypatch.undo()
        expected = [sequence for sequence in range(40) for _ in range(30 if sequence % 7 == 0 else 1)]
        assert marks(log) == expected
        assert told
        assert all("nothing was written; try again" in each or "may or may not" in each or "cannot be read" in each for each in told), told
        log.remove_orphans(0)
