"""The log against a plain list: appends, evolution, reopening and SQL in any order must agree."""

import shutil
import tempfile
from typing import Any

import pyarrow as pa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flight_oplog import Config, OpLog
from flight_oplog.errors import SchemaMismatch
from flight_oplog.sql.engine import Engine

TOPICS = st.sampled_from(["a", "b"])
# Each kind of batch: its schema, and whether it can follow the others in one topic. Types widen, columns come and go.
KINDS: dict[str, pa.Schema] = {
    "narrow": pa.schema([("n", pa.int16()), ("s", pa.string())]),
    "wide": pa.schema([("s", pa.large_string()), ("n", pa.int64())]),
    "extra": pa.schema([("n", pa.int32()), ("f", pa.float64())]),
    "only": pa.schema([("s", pa.dictionary(pa.int8(), pa.string()))]),
}
ROW = st.fixed_dictionaries(
    {
        "n": st.none() | st.integers(-(2**15), 2**15 - 1),
        "s": st.none() | st.text(st.characters(codec="utf-8"), max_size=5),
        "f": st.none() | st.floats(allow_nan=False, allow_infinity=False),
    }
)
ENGINE = Engine(Config(cache_bytes_max=10_000))


class LogAgainstList(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp()
        # Tiny limits: records fill up, long appends spill, small ones wait together.
        self.config = Config(data=self.folder, record_entries_max=7, queue_bytes_max=500)
        self.log = OpLog.open(self.folder, self.config)
        self.model: dict[str, list[dict[str, Any]]] = {}
        self.columns: dict[str, list[str]] = {}

    def teardown(self) -> None:
        assert self.log.verify() == []
        self.log.close()
        shutil.rmtree(self.folder)

    @rule(topic=TOPICS, kind=st.sampled_from(sorted(KINDS)), rows=st.lists(ROW, max_size=20), cuts=st.integers(1, 5))
    def append(self, topic: str, kind: str, rows: list[dict[str, Any]], cuts: int) -> None:
        schema = KINDS[kind]
        entries = [{name: row[name] for name in schema.names} for row in rows]
        batches = [pa.RecordBatch.from_pylist(entries[i::cuts], schema) for i in range(cuts)]
        sent = [row for i in range(cuts) for row in entries[i::cuts]]
        receipt = self.log.append(topic, pa.Table.from_batches(batches, schema))
        known = self.model.setdefault(topic, [])
        assert (receipt.first_offset, receipt.entries) == (len(known), len(sent))
        known.extend(sent)
        self.columns.setdefault(topic, []).extend(name for name in schema.names if name not in self.columns[topic])

    @precondition(lambda self: "n" in self.columns.get("a", []))
    @rule()
    def append_what_does_not_fit(self) -> None:
        try:
            self.log.append("a", pa.record_batch({"n": ["text"]}))
        except SchemaMismatch:
            return
        raise AssertionError("text went into a number")

    @rule()
    def reopen(self) -> None:
        self.log.close()
        self.log = OpLog.open(self.folder, self.config)

    @rule(topic=TOPICS, low=st.integers(-(2**15), 2**15), name=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=2))
    def filter(self, topic: str, low: int, name: str) -> None:
        if not {"n", "s"} <= set(self.columns.get(topic, [])):
            return
        quoted = name.replace("'", "''")
        found = self.run(f"SELECT n, s FROM log.{topic} WHERE n >= {low} OR s = '{quoted}' ORDER BY _offset")
        rows = [{"n": row.get("n"), "s": row.get("s")} for row in self.model[topic]]
        assert found == [row for row in rows if (row["n"] is not None and row["n"] >= low) or row["s"] == name]

    @rule(topic=TOPICS, start=st.integers(0, 40), size=st.integers(0, 20))
    def window(self, topic: str, start: int, size: int) -> None:
        if topic in self.model:
            found = self.run(f"SELECT _offset FROM log.{topic} WHERE _offset >= {start} AND _offset < {start + size} ORDER BY 1")
            assert [row["_offset"] for row in found] == list(range(start, min(start + size, len(self.model[topic]))))

    @invariant()
    def everything_reads_back(self) -> None:
        assert [topic.name for topic in self.log.topics() if not topic.name.startswith("_")] == sorted(self.model)
        for topic, rows in self.model.items():
            expected = [{name: row.get(name) for name in self.columns[topic]} for row in rows]
            found = self.run(f"SELECT * FROM log.{topic} ORDER BY _offset")
            assert [{name: row[name] for name in self.columns[topic]} for row in found] == expected
            assert self.run(f"SELECT count(*) AS n FROM {topic}") == [{"n": len(rows)}]

    def run(self, sql: str) -> list[dict[str, Any]]:
        running = ENGINE.run(sql, self.log.snapshot())
        return pa.Table.from_batches(list(running.batches), running.schema).to_pylist()


LogAgainstList.TestCase.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
TestLogAgainstList = LogAgainstList.TestCase
