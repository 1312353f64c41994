"""A short run of the fault harness; `make faults SEED=1 KILLS=300` is the long one."""

import sys
from pathlib import Path

import pytest
from conftest import ObjectStore

sys.path.insert(0, str(Path(__file__).parent / "faults"))

import faults


@pytest.mark.timeout(280)
def test_every_acknowledged_append_is_there_once_however_the_server_dies(tmp_path: Path) -> None:
    live = faults.Run(tmp_path, seed=7)
    live.start()
    try:
        for point in live.points:
            at_checkpoint = "checkpoint" in point
            flags = () if at_checkpoint else ("--record-bytes-max", "50000")
            live.live_through(f"{point}:{1 if at_checkpoint else 3}", 60, *flags)
        assert live.deaths == dict.fromkeys(live.points, 1), "each died at its point, of its own"
        for fault in ("none", "errors:15", "errors-after-success:15", "slow:0.05"):
            live.live_through(fault, 1.5)
        print(live.finish())
    finally:
        live.stop()
    assert all(producer.receipts for producer in live.producers)
    assert any(receipt["duplicate"] for producer in live.producers for receipt in producer.receipts)


@pytest.mark.timeout(280)
def test_two_servers_on_an_object_store_lose_nothing_either(tmp_path: Path, s3: ObjectStore) -> None:
    live = faults.Run(tmp_path, 5, s3.new_log(), s3.misbehave)
    live.start()
    try:
        points = ("after-an-upload", "before-the-put", "after-the-put")
        for point in points:
            live.live_through(f"{point}:3", 60, "--record-bytes-max", "50000")
        assert live.deaths == dict.fromkeys(points, 1), "each died at its point, of its own"
        live.live_through("errors-after-success:15", 1.5)
        print(live.finish())
    finally:
        live.stop()
    assert all(producer.receipts for producer in live.producers)


@pytest.mark.timeout(280)
def test_the_check_would_notice(tmp_path: Path) -> None:
    """A receipt that promises what is not there, a lost append and one written twice: the harness sees each."""
    live = faults.Run(tmp_path, seed=1)
    live.start()
    try:
        live.live_through("none", 1.5)
        live.finish()
    finally:
        live.stop()
    producer = next(producer for producer in live.producers if producer.receipts)
    sequence = next(n for n, receipt in enumerate(producer.receipts) if receipt["entries"])
    producer.receipts[sequence]["first_offset"] += 1
    with pytest.raises(AssertionError, match=f"{producer.name}/{sequence} is not at offset"):
        live.check()
    producer.receipts[sequence]["first_offset"] -= 1
    live.check()
    batch = faults.entries(producer.name, sequence)
    with faults.OpLog.open(live.data) as log:
        log.append(producer.topic, batch)
    with pytest.raises(AssertionError, match=f"{producer.name}/{sequence} is there again"):
        live.check()
