"""FORMAT.md is enough: a reader written from it alone, without this package, finds every entry.

Nothing of flight_oplog is used to read: only JSON, a Parquet reader and an Arrow IPC reader.
"""

import json
from pathlib import Path
from typing import Any

import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from flight_oplog import Config, OpLog


def live_files(log: Path) -> tuple[list[str], dict[str, int], dict[str, str]]:
    """FORMAT.md, "The Delta log": replay the commits in order; return live files, txn versions, table properties."""
    files: dict[str, None] = {}
    txns: dict[str, int] = {}
    properties: dict[str, str] = {}
    for commit in sorted((log / "_delta_log").glob("*.json")):
        for line in commit.read_text().splitlines():
            action = json.loads(line)
            if "add" in action:
                files[action["add"]["path"]] = None
            elif "remove" in action:
                files.pop(action["remove"]["path"])
            elif "txn" in action:
                txns[action["txn"]["appId"]] = action["txn"]["version"]
            elif "metaData" in action:
                properties = action["metaData"]["configuration"]
    return list(files), txns, properties


def entries_of(log: Path, topic: str) -> list[dict[str, Any]]:
    """FORMAT.md, "Reading a topic"."""
    files, txns, properties = live_files(log)
    assert properties["oplog.formatVersion"] == "1"
    records = []
    for file in files:
        if file.startswith(f"topic={topic}/"):
            records += pq.ParquetFile(log / file).read().to_pylist()
    start = txns.get(f"start/{topic}", 0)
    records = [record for record in records if record["first_offset"] >= start]
    found: list[dict[str, Any]] = []
    for record in sorted(records, key=lambda record: record["first_offset"]):
        assert record["first_offset"] == start + len(found), "runs are dense"
        check(record["content"], record["digest"], record["parts"])
        check_codes(record)
        batches = pa.ipc.open_stream(record["content"]).read_all().to_pylist()
        assert len(batches) == record["entries"] == sum(append["entries"] for append in record["appends"])
        found += batches
    assert txns.get(f"topic/{topic}", 0) == start + len(found)
    return found


def check(content: bytes, digest: str, parts: str | None) -> None:
    """FORMAT.md, "Parts"."""
    if parts is None:
        assert xxhash.xxh3_128_hexdigest(content) == digest
        return
    assert xxhash.xxh3_128_hexdigest(parts.encode()) == digest
    found = json.loads(parts)
    assert found["bytes"] == len(content)
    all_parts = [*found["columns"].values(), found.get("codes", {}).values()]
    spans = sorted((start, end, expected) for spans in all_parts for start, end, expected in spans)
    frame, place = b"", 0
    for start, end, expected in spans:
        assert xxhash.xxh3_64_hexdigest(content[start:end]) == expected
        frame, place = frame + content[place:start], end
    assert xxhash.xxh3_64_hexdigest(frame + content[place:]) == found["frame"]


def check_codes(record: dict[str, Any]) -> None:
    """FORMAT.md, "Codes"."""
    found = json.loads(record["parts"] or "{}").get("codes", {})
    bounds = json.loads(record["bounds"])
    assert {name for name, limits in bounds.items() if "codes" in limits} == {*found}
    table = pa.ipc.open_stream(record["content"]).read_all()
    for name, (start, end, _) in found.items():
        [batch] = pa.ipc.open_stream(record["content"][start:end])
        [coded] = batch.columns
        assert start % 64 == 0
        assert coded.type == pa.dictionary(pa.uint16(), pa.string())
        assert len(coded.dictionary) == bounds[name]["codes"]
        assert coded.dictionary_decode() == table[name].combine_chunks()


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd", "auto"])
def test_a_reader_written_from_the_format_alone_finds_every_entry(tmp_path: Path, compression: str) -> None:
    folder = tmp_path / "log"
    expected: list[dict[str, Any]] = []
    with OpLog.open(str(folder), Config(compression=compression, record_entries_max=30)) as log:
        for number in range(5):
            rows = [{"n": number * 100 + i, "s": f"entry {i}"} for i in range(20 * number)]
            log.append("events", pa.Table.from_pylist(rows, pa.schema([("n", pa.int64()), ("s", pa.string())])))
            expected += rows
        log.append("events", pa.table({"n": [1], "extra": [True]}))
        assert entries_of(folder, "events") == [*expected, {"n": 1, "extra": True}]
        registered = entries_of(folder, "_schemas")
    assert [(row["topic"], row["number"]) for row in registered] == [("events", 1), ("events", 2)]
    assert pa.ipc.read_schema(pa.py_buffer(registered[1]["schema"])) == pa.schema([("n", pa.int64()), ("extra", pa.bool_())])


def test_that_reader_checks_the_parts_of_large_records_too(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    with OpLog.open(str(folder), Config(compression="none")) as log:
        log.append("events", pa.table({"n": range(300_000), "s": ["a text", None, "another text"] * 100_000, "t": ["text"] * 300_000}))
        [record] = log.snapshot().records("events")
        assert all(map(record.has_codes, ["s", "t"]))
        assert len(entries_of(folder, "events")) == 300_000
        [record] = log.snapshot().records("events")
        assert record.parts is not None


def test_polars_reads_the_outer_table_and_five_lines_decode_it(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    with OpLog.open(str(folder)) as log:
        log.append("events", pa.table({"name": ["hello", "world"]}))
        log.append("events", pa.table({"name": ["again"]}))
        # README, "Reading it without us":
        import pyarrow.ipc

        records = polars.read_delta(str(folder)).filter(polars.col("topic") == "events").sort("first_offset")
        tables = [pyarrow.ipc.open_stream(content).read_all() for content in records["content"]]
        entries = pa.concat_tables(tables, promote_options="permissive")
    assert entries["name"].to_pylist() == ["hello", "world", "again"]


def test_a_dropped_topic_ends_for_that_reader_too(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    with OpLog.open(str(folder)) as log:
        log.append("events", pa.table({"name": ["hello", "world"]}))
        log.drop("events")
        assert entries_of(folder, "events") == []
        log.append("events", pa.table({"other": [1]}))
        assert entries_of(folder, "events") == [{"other": 1}]
        registered = [row for row in entries_of(folder, "_schemas") if row["topic"] == "events"]
        assert [(row["number"], row["schema"] is None) for row in registered] == [(1, False), (2, True), (3, False)]


def test_duckdb_reads_the_records_files(tmp_path: Path) -> None:
    """DuckDB's Delta extension is no package and cannot be fetched; its Parquet reader sees the same rows."""
    import duckdb

    folder = tmp_path / "log"
    with OpLog.open(str(folder)) as log:
        log.append("events", pa.table({"name": ["hello", "world"]}))
        log.append("events", pa.table({"name": ["again"]}))
        found = duckdb.sql(
            f"SELECT topic, first_offset, entries, length(digest) FROM read_parquet('{folder}/topic=events/*.parquet', "
            "hive_partitioning = true) ORDER BY first_offset"
        ).fetchall()
    assert found == [("events", 0, 2, 32), ("events", 2, 1, 32)]
