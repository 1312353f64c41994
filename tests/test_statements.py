"""INSERT, CREATE and DROP in process: what they change, once, and what they refuse."""

import datetime
import threading
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from conftest import SEED, rows

from flight_oplog import Config, OpLog
from flight_oplog.appends import Origin
from flight_oplog.errors import NotFound, OplogError, RequestError, TooLarge, Unsupported
from flight_oplog.sql.engine import Engine
from flight_oplog.sql.statements import Statements

Query = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def execute(log: OpLog, engine: Engine) -> Callable[..., int]:
    return Statements(log, engine, log.config).execute


def bound(*columns: list[Any]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array(column) for column in columns], [str(n) for n in range(len(columns))])


def test_an_insert_is_an_append(log: OpLog, execute: Callable[..., int], query: Query) -> None:
    log.append("events", SEED)
    assert execute("INSERT INTO events VALUES ('again', '1'), ('more', '2')") == 2
    assert execute("INSERT INTO public.events (node_id) SELECT upper(name) FROM events WHERE name = 'hello'") == 1
    assert execute("INSERT INTO events SELECT * FROM events WHERE false") == 0
    assert query("SELECT _offset, name, node_id FROM log.events WHERE _offset >= 2 ORDER BY _offset") == [
        {"_offset": 2, "name": "again", "node_id": "1"},
        {"_offset": 3, "name": "more", "node_id": "2"},
        {"_offset": 4, "name": None, "node_id": "HELLO"},
    ]


def test_values_are_bound_and_rows_of_them_are_one_append(log: OpLog, execute: Callable[..., int], query: Query) -> None:
    log.append("events", SEED)
    assert execute("INSERT INTO events VALUES (?, upper(?))", parameters=bound(["a", None], ["b", "c"])) == 2
    assert execute("INSERT INTO events SELECT name, $1 FROM events WHERE name = $2", parameters=bound(["x", "y"], ["a", "hello"])) == 2
    assert execute("INSERT INTO events (name) VALUES ($who)", parameters=bound([7])) == 1
    assert execute("INSERT INTO events VALUES (?, ?)", parameters=bound(["a"], ["b"]).slice(0, 0)) == 0
    found = query("SELECT name, node_id FROM log.events WHERE _offset >= 2 ORDER BY _offset")
    assert [tuple(row.values()) for row in found] == [("a", "B"), (None, "C"), ("a", "x"), ("hello", "y"), ("7", None)]
    assert [record.entries for record in log.snapshot().records("events")] == [2, 2, 2, 1]


@pytest.mark.parametrize(
    ("sql", "parameters", "message"),
    [
        ("INSERT INTO events VALUES (?, ?)", None, "the statement has 2 parameters and none is bound"),
        ("INSERT INTO events VALUES (?, ?)", bound(["a"]), "the statement has 2 parameters, 1 is bound"),
        ("INSERT INTO numbers VALUES (?)", bound(["a"]), r"parameter \$1 of type string is no int64: .*'a'"),
        ("INSERT INTO log.events VALUES (1, 2, 3, 'a', 'b', 'c', 'd')", None, "'log.events' is not in oplog.public"),
        ("INSERT INTO system.topics SELECT * FROM system.topics", None, "'system.topics' is not in oplog.public"),
        ("INSERT INTO seen VALUES ('a', 'b')", None, "'seen' is no topic; entries are inserted into topics"),
        ("SELECT 1", None, "SELECT 1 is not served"),
    ],
)
def test_an_insert_that_cannot_be_says_why_and_writes_nothing(
    log: OpLog, execute: Callable[..., int], sql: str, parameters: pa.RecordBatch | None, message: str
) -> None:
    log.append("events", SEED)
    log.append("numbers", pa.record_batch({"n": [1]}))
    execute("CREATE VIEW seen AS SELECT * FROM events")
    before = log.snapshot().table_version
    with pytest.raises(OplogError, match=message):
        execute(sql, parameters=parameters)
    assert log.snapshot().table_version == before


def test_a_value_is_written_as_it_is_or_refused(log: OpLog, execute: Callable[..., int], query: Query) -> None:
    execute("CREATE TABLE v (i INT, f FLOAT, d DATE, b BOOLEAN, m DECIMAL(10, 2), s VARCHAR, ts TIMESTAMP)")
    day, noon = datetime.date(2026, 1, 1), datetime.datetime(2026, 1, 1, 12)
    for column, value in (("i", 5), ("i", "12"), ("f", 0.1), ("d", day), ("b", True), ("m", 9.5), ("s", 7), ("ts", noon), ("ts", day)):
        assert execute(f"INSERT INTO v ({column}) VALUES (?)", parameters=bound([value])) == 1
    wrong: list[tuple[str, Any]] = [
        *(("i", 2.7), ("i", 2**40), ("i", "1.5"), ("f", 1e300), ("f", 2**40 + 1), ("d", noon), ("d", 5), ("b", 2), ("m", 2.718), ("ts", 5)),
        ("i", day),
    ]
    for column, value in wrong:
        with pytest.raises(RequestError, match=r"parameter \$1 of type .* is no .*; nothing was written"):
            execute(f"INSERT INTO v ({column}) VALUES (?)", parameters=bound([value]))
    assert query("SELECT count(*) AS n FROM v") == [{"n": 9}]


@pytest.mark.parametrize(
    "row",
    ["(?, NULL)", "(?, 'k' -- note\n)", "(upper(?), 'k')", "($1, $1)", "(max(?), 'k')", "(?, (SELECT max(name) FROM events WHERE false))"],
)
def test_many_rows_are_inserted_as_each_alone_would_be(log: OpLog, execute: Callable[..., int], query: Query, row: str) -> None:
    def outcome(topic: str, *batches: pa.RecordBatch) -> list[dict[str, Any]] | str:
        execute(f"CREATE TABLE {topic} (name VARCHAR, other VARCHAR)")
        try:
            for batch in batches:
                execute(f"INSERT INTO {topic} VALUES {row}", parameters=batch)
        except OplogError as error:
            return type(error).__name__
        return query(f"SELECT name, other FROM log.{topic} ORDER BY _offset")

    log.append("events", SEED)
    assert outcome("together", bound(["a", "a", None])) == outcome("each", *(bound([value]) for value in ("a", "a", None)))


def test_a_statement_that_is_refused_leaves_no_work_behind(log: OpLog, execute: Callable[..., int]) -> None:
    log.append("events", SEED)
    heavy = "SELECT count(*) AS n FROM generate_series(1, 100000000000)"
    execute("CREATE VIEW seen AS SELECT 1 AS n")
    assert execute(f"CREATE TABLE IF NOT EXISTS events AS {heavy}") == 0
    for sql in (f"CREATE TABLE events AS {heavy}", f"INSERT INTO seen {heavy}"):
        with pytest.raises(RequestError):
            execute(sql)
    time.sleep(0.3)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.3


def test_an_insert_with_a_producer_is_written_once(log: OpLog, execute: Callable[..., int], query: Query) -> None:
    log.append("events", SEED)
    for _ in range(3):
        assert execute("INSERT INTO events VALUES ('a', 'b')", origin=Origin("p", sequence=0)) == 1
    assert query("SELECT count(*) AS n FROM events") == [{"n": 3}]


def test_create_table_declares_a_topic(log: OpLog, execute: Callable[..., int], query: Query) -> None:
    columns = "i INT, b BIGINT, s VARCHAR, d DOUBLE, p DECIMAL(10, 2), at TIMESTAMP, z TIMESTAMPTZ, day DATE, l BIGINT[], st STRUCT<a INT>"
    assert execute(f"CREATE TABLE things ({columns})") == 0
    schema = log.snapshot().topic("things").schema
    assert schema.field("p").type == pa.decimal128(10, 2)
    assert schema.field("l").type == pa.list_(pa.int64())
    assert query("SELECT * FROM things") == []
    assert execute("CREATE TABLE IF NOT EXISTS things (other INT)") == 0
    assert execute("CREATE TABLE copied AS SELECT 1 AS a, 'x' AS b UNION ALL SELECT 2, 'y'") == 2
    assert query("SELECT a, b FROM copied ORDER BY a") == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    assert log.snapshot().topic("things").schema == schema


REFUSED = {
    "CREATE TABLE events (a INT)": (RequestError, "table 'events' exists already; nothing was written"),
    "CREATE TABLE _own (a INT)": (RequestError, "topic '_own' is reserved"),
    "CREATE TABLE system.x (a INT)": (RequestError, "'system.x' is not in oplog.public"),
    "CREATE TABLE x (a INT NOT NULL)": (Unsupported, "column 'a' is NOT NULL, and a log keeps no constraints"),
    "CREATE TABLE x (a INT PRIMARY KEY)": (Unsupported, "it has PRIMARY, and a log keeps no constraints"),
    "CREATE TABLE x (a INT DEFAULT 5)": (Unsupported, "it has DEFAULT, and a log keeps no constraints or defaults"),
    "CREATE TABLE x (a INT, a INT)": (RequestError, ""),
    "CREATE TEMPORARY TABLE x (a INT)": (Unsupported, "Temporary tables not supported"),
    "create temp view v as select 1 as a": (Unsupported, "view 'v': temporary views are not served"),
    "CREATE OR REPLACE /* of ours */ TEMPORARY VIEW v AS SELECT 1 AS a": (Unsupported, "leave out TEMPORARY"),
    "CREATE OR REPLACE TEMP SECURE VIEW seen AS SELECT 1 AS a": (Unsupported, "leave out TEMPORARY"),
    "CREATE TABLE seen (a INT)": (RequestError, "'seen' is a view"),
    "CREATE EXTERNAL TABLE x STORED AS CSV LOCATION '/etc/passwd'": (Unsupported, "CREATE EXTERNAL is not served"),
    "CREATE SCHEMA x": (Unsupported, "CREATE SCHEMA is not served"),
    "CREATE DATABASE x": (Unsupported, "CREATE DATABASE is not served"),
    "CREATE FUNCTION f() RETURNS INT RETURN 1": (Unsupported, "CREATE FUNCTION"),
    "INSERT OVERWRITE events VALUES ('a', 'b')": (Unsupported, "INSERT OVERWRITE is not served"),
    "INSERT INTO events VALUES ('a', 'b') ON CONFLICT DO NOTHING": (RequestError, "Insert-on clause not supported"),
    "INSERT INTO events VALUES ('a', 'b') RETURNING name": (RequestError, "Insert-returning clause not supported"),
    "INSERT INTO events VALUES ('a', 'b'); DROP TABLE events": (Unsupported, "only supports a single SQL statement"),
    "INSERT INTO nowhere VALUES (1)": (NotFound, "table 'oplog.public.nowhere' does not exist"),
    "DROP TABLE nowhere": (NotFound, "topic 'nowhere' does not exist"),
    "DROP TABLE seen": (RequestError, "'seen' is a view; nothing was written; use DROP VIEW"),
    "DROP TABLE _schemas": (RequestError, "topic '_schemas' is reserved"),
    "DROP VIEW events": (RequestError, "'events' is a table"),
    "DROP VIEW nowhere": (NotFound, "view 'nowhere' does not exist"),
    "DROP SCHEMA public": (Unsupported, "DROP SCHEMA is not served"),
    "CREATE VIEW seen AS SELECT 1": (RequestError, "view 'seen' exists already"),
    "CREATE VIEW events AS SELECT 1": (RequestError, "'events' is a table"),
    "CREATE VIEW x AS SELECT nothing FROM events": (RequestError, "nothing"),
    "CREATE VIEW log.x AS SELECT 1": (RequestError, "'log.x' is not in oplog.public"),
    "CREATE VIEW x AS SELECT $1": (RequestError, "none is bound"),
}


@pytest.mark.parametrize("sql", REFUSED)
def test_what_a_log_does_not_do_is_refused(log: OpLog, execute: Callable[..., int], query: Query, sql: str) -> None:
    log.append("events", SEED)
    execute("CREATE VIEW seen AS SELECT * FROM events")
    before = log.snapshot().table_version
    kind, message = REFUSED[sql]
    with pytest.raises(kind) as caught:
        execute(sql)
    assert message in str(caught.value)
    assert log.snapshot().table_version == before
    assert query("SELECT * FROM seen") == SEED.to_pylist()


def test_dropping_what_may_be_missing_is_no_error(execute: Callable[..., int]) -> None:
    assert execute("DROP TABLE IF EXISTS nowhere") == 0
    assert execute("DROP VIEW IF EXISTS nowhere") == 0


def test_a_dropped_table_is_seen_in_the_past_alone(log: OpLog, engine: Engine, execute: Callable[..., int], query: Query) -> None:
    log.append("events", SEED)
    before = log.snapshot()
    assert execute("DROP TABLE events") == 0
    with pytest.raises(NotFound):
        query("SELECT * FROM events")
    with pytest.raises(NotFound, match="topic 'events' does not exist; nothing was written"):
        execute("DROP TABLE events")
    assert rows(engine, before, "SELECT * FROM events") == SEED.to_pylist()
    assert query(f"SELECT * FROM at_version('events', {before.table_version})") == SEED.to_pylist()
    assert log.verify() == []
    # It may begin again, with another schema, at the offset where it ended.
    assert log.append("events", pa.record_batch({"name": [1, 2, 3]})).first_offset == 2
    assert query("SELECT name FROM events ORDER BY name") == [{"name": 1}, {"name": 2}, {"name": 3}]
    assert query("SELECT min(_offset) AS low, count(*) AS n FROM log.events") == [{"low": 2, "n": 3}]
    assert query("SELECT count(*) AS n FROM records.events") == [{"n": 1}]
    assert execute("CREATE OR REPLACE TABLE events AS SELECT 'x' AS only") == 1
    assert query("SELECT _offset, only FROM log.events") == [{"_offset": 5, "only": "x"}]
    for again in (log.snapshot(), OpLog.open(log.config.data).snapshot()):
        topic = again.topic("events")
        assert (topic.first_offset, topic.next_offset, topic.schema.names) == (5, 6, ["only"])
        assert rows(engine, again, "SELECT * FROM events") == [{"only": "x"}]
    assert log.verify() == []


def test_a_table_dropped_in_many_ways_is_the_same_to_every_reader(log: OpLog, execute: Callable[..., int], query: Query) -> None:
    execute("CREATE TABLE empty (a INT)")
    execute("DROP TABLE empty")
    execute("CREATE TABLE empty (b VARCHAR)")
    for _ in range(3):
        log.append("t", pa.record_batch({"a": [1]}))
        execute("DROP TABLE t")
    log.append("t", pa.record_batch({"a": ["text"]}))
    other = OpLog.open(log.config.data)
    for snapshot in (log.snapshot(), other.snapshot()):
        assert {name: (topic.first_offset, topic.next_offset) for name, topic in snapshot.topics.items() if name[0] != "_"} == {
            "empty": (0, 0),
            "t": (3, 4),
        }
        assert snapshot.topic("empty").schema.names == ["b"]
    assert log.remove_orphans(0) == []
    execute("DROP TABLE t")
    assert "t" not in other.snapshot().topics
    assert other.append("t", pa.record_batch({"n": [1.5]})).first_offset == 4
    assert log.snapshot().topic("t").first_offset == 4
    other.close()


def test_one_group_may_drop_a_topic_between_appends(log: OpLog, monkeypatch: pytest.MonkeyPatch, query: Query) -> None:
    log.append("other", SEED)
    is_committing, going_on = threading.Event(), threading.Event()
    real = log._store.commit

    def commit(*args: Any) -> int:
        is_committing.set()
        going_on.wait(10)
        return real(*args)

    monkeypatch.setattr(log._store, "commit", commit)
    outcomes: dict[str, Any] = {}

    def later(name: str, call: Callable[[], Any]) -> threading.Thread:
        thread = threading.Thread(target=lambda: outcomes.update({name: call()}))
        thread.start()
        return thread

    threads = [later("first", lambda: log.append("other", SEED))]
    assert is_committing.wait(10)
    for name, call in (
        ("a", lambda: log.append("t", pa.record_batch({"a": [1, 2]}))),
        ("drop", lambda: log.drop("t")),
        ("b", lambda: log.append("t", pa.record_batch({"a": ["x"]}))),
    ):
        waiting = log._committer._queue.qsize()
        threads.append(later(name, call))
        while log._committer._queue.qsize() == waiting:
            threading.Event().wait(0.001)
    going_on.set()
    for thread in threads:
        thread.join(10)
    assert (outcomes["a"].first_offset, outcomes["b"].first_offset) == (0, 2)
    assert outcomes["a"].table_version == outcomes["drop"].table_version == outcomes["b"].table_version
    assert query("SELECT _offset, a FROM log.t") == [{"_offset": 2, "a": "x"}]
    assert log.verify() == []
    with OpLog.open(log.config.data) as again:
        assert again.snapshot().topic("t").schema == log.snapshot().topic("t").schema


def test_a_view_lives_in_the_log(log: OpLog, engine: Engine, execute: Callable[..., int], query: Query) -> None:
    log.append("events", SEED)
    execute("CREATE VIEW greetings (word) AS SELECT upper(name) FROM events WHERE name = 'hello'")
    execute("CREATE VIEW loud AS SELECT word || '!' AS word FROM greetings")
    assert query("SELECT * FROM loud") == [{"word": "HELLO!"}]
    earlier = log.snapshot()
    execute("CREATE OR REPLACE VIEW greetings AS SELECT 'bye' AS word")
    assert query("SELECT * FROM loud") == [{"word": "bye!"}]
    assert rows(engine, earlier, "SELECT * FROM loud") == [{"word": "HELLO!"}]
    found = query("SELECT table_name, table_type FROM information_schema.tables WHERE table_schema = 'public' ORDER BY 1")
    assert [tuple(row.values()) for row in found] == [("events", "BASE TABLE"), ("greetings", "VIEW"), ("loud", "VIEW")]
    execute("DROP VIEW greetings")
    with pytest.raises(RequestError, match=r"view 'loud': table 'oplog.public.greetings' does not exist"):
        query("SELECT * FROM loud")
    assert query("SELECT name FROM events WHERE name <> 'loud'")[0] == {"name": "hello"}
    with OpLog.open(log.config.data) as again:
        assert Engine(Config()).views(again.snapshot()).keys() == {"loud"}


def test_views_cannot_be_made_of_themselves_or_grow_without_bound(execute: Callable[..., int], query: Query) -> None:
    execute("CREATE VIEW a AS SELECT 1 AS x")
    execute("CREATE VIEW b AS SELECT * FROM a")
    names = ["b"]
    with pytest.raises(TooLarge, match=r"through its views than sql_tables_max \(100\)|reads \d+ tables; sql_tables_max is 100"):
        for number in range(12):
            execute(f"CREATE VIEW v{number} AS SELECT l.x FROM {names[-1]} AS l JOIN {names[-1]} AS r ON l.x = r.x")
            names.append(f"v{number}")
            query(f"SELECT * FROM {names[-1]}")
    assert 3 < len(names) < 9


def test_operators_add_up_through_views(execute: Callable[..., int], query: Query) -> None:
    execute("CREATE VIEW v0 AS SELECT 1 AS x")
    with pytest.raises(TooLarge, match=r"has \d+ operators; sql_operators_max is 1000"):
        for number in range(1, 20):
            conditions = " AND ".join(["x <> 5"] * 100)
            execute(f"CREATE VIEW v{number} AS SELECT x FROM V{number - 1} WHERE {conditions}")
            query(f"SELECT * FROM v{number}")


def test_letters_are_no_views_and_views_may_look_back(log: OpLog, execute: Callable[..., int], query: Query) -> None:
    log.append("events", SEED)
    execute("CREATE VIEW e AS SELECT * FROM at_version('events', 1)")
    log.append("events", SEED)
    assert query("SELECT count(*) AS n FROM e") == [{"n": 2}]
    assert query(f"SELECT '{'e' * 500}' AS t, count(*) AS n FROM events")[0]["n"] == 4


def test_views_that_came_to_be_made_of_each_other_are_an_error_not_a_loop(log: OpLog, execute: Callable[..., int], query: Query) -> None:
    execute("CREATE VIEW a AS SELECT 1 AS x")
    execute("CREATE VIEW b AS SELECT * FROM a")
    with pytest.raises(RequestError, match="view 'a' would be made of itself; nothing was written"):
        execute("CREATE OR REPLACE VIEW a AS SELECT * FROM b")
    # Two servers that define at the same time could still bring it about.
    rows = [{"view": name, "definition": f"CREATE VIEW {name} AS SELECT * FROM {other}"} for name, other in (("a", "b"), ("b", "a"))]
    known = log.snapshot().topic("_views")
    log.append_own("_views", pa.RecordBatch.from_pylist(rows, known.schema), known.next_offset)
    with pytest.raises(RequestError, match="is made of itself"):
        query("SELECT * FROM a")
    assert query("SELECT 1 AS a") == [{"a": 1}]
    assert query("SHOW TABLES")
    assert execute("DROP VIEW a") == 0
    assert execute("CREATE OR REPLACE VIEW b AS SELECT 2 AS x") == 0
    assert query("SELECT * FROM b") == [{"x": 2}]


def test_one_view_too_many_is_refused(tmp_path: Any) -> None:
    config = Config(data=str(tmp_path / "log"), views_max=2)
    with OpLog.open(config.data, config) as log:
        execute = Statements(log, Engine(config), config).execute
        execute("CREATE VIEW a AS SELECT 1")
        execute("CREATE VIEW b AS SELECT 1")
        with pytest.raises(TooLarge, match=r"view 'c' would be one more than views_max \(2\); nothing was written"):
            execute("CREATE VIEW c AS SELECT 1")
        execute("CREATE OR REPLACE VIEW b AS SELECT 2")
        execute("DROP VIEW a")
        execute("CREATE VIEW c AS SELECT 1")


def test_of_many_who_define_the_same_view_at_once_one_succeeds(execute: Callable[..., int]) -> None:
    outcomes: list[object] = []

    def define() -> None:
        try:
            outcomes.append(execute("CREATE VIEW a AS SELECT 1"))
        except RequestError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=define) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(0) == 1
    assert sum("exists already" in str(outcome) for outcome in outcomes) == 7


def test_what_arrow_cannot_filter_is_inserted_all_the_same(log: OpLog, execute: Callable[..., int], query: Query) -> None:
    halves = pa.array([-1.0, 2.0], pa.float64()).cast(pa.float16())
    log.append("h", pa.record_batch({"h": halves}))
    assert execute("INSERT INTO h SELECT h FROM h WHERE h < 0") == 1
    assert execute("CREATE TABLE negative AS SELECT h FROM h WHERE h < 0") == 2
    assert query("SELECT count(*) AS n FROM negative") == [{"n": 2}]
