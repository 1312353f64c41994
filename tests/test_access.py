"""What a principal may not read does not exist for it: a log that hides something answers as one that has never had it."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import rows
from hypothesis import given, settings
from hypothesis import strategies as st

from flight_oplog import Config, OpLog, Snapshot
from flight_oplog.errors import Forbidden, NotFound, OplogError
from flight_oplog.follow import Follower, TopicRead
from flight_oplog.grants import ANYBODY, Principal, Rights
from flight_oplog.sql.engine import Engine
from flight_oplog.sql.statements import Statements

_TIME = re.compile(r"datetime\([^)]*\)")
ALICE = Principal("alice", rights=Rights(read=frozenset(("orders", "web_*", "seen*", "of_seen", "mixed", "hidden_seen", "nothing"))))
OPERATOR = Principal("root")
OPEN = {"orders": "CREATE TABLE orders AS SELECT 1 AS id, 'ann' AS customer", "web_a": "CREATE TABLE web_a AS SELECT 2 AS id"}
HIDDEN = {
    "salaries": "CREATE TABLE salaries AS SELECT 1 AS id, 4711 AS amount",
    "webmaster": "CREATE TABLE webmaster AS SELECT 3 AS id",
}
VIEWS = ("CREATE VIEW seen AS SELECT id FROM orders", "CREATE VIEW of_seen AS SELECT id + 1 AS more FROM seen")
HIDDEN_VIEWS = (
    "CREATE VIEW hidden_seen AS SELECT * FROM salaries",
    "CREATE VIEW mixed AS SELECT orders.id, amount FROM orders JOIN salaries ON orders.id = salaries.id",
    "CREATE VIEW seen_past AS SELECT * FROM at_version('salaries', 3)",
    "CREATE VIEW seen_through AS SELECT * FROM hidden_seen",
    "CREATE VIEW other AS SELECT id FROM orders",
    "CREATE VIEW seen_records AS SELECT topic FROM records.salaries",
)


class Made:
    """A log, and who asks it."""

    def __init__(self, folder: Path, statements: tuple[str, ...], viewer: Principal) -> None:
        self.log = OpLog.open(str(folder))
        self.engine = Engine(Config())
        self.viewer = viewer
        self.statements = Statements(self.log, self.engine, Config())
        for sql in statements:
            self.statements.execute(sql)

    @property
    def snapshot(self) -> Snapshot:
        return self.log.snapshot().seen_by(self.viewer)

    def outcome(self, sql: str) -> object:
        """What a statement comes to: its rows, or its error."""
        try:
            self.engine.prepare(sql, self.snapshot)
            found = rows(self.engine, self.snapshot, sql)
        except OplogError as error:
            return type(error), str(error)
        return sorted(_TIME.sub("", repr(row)) for row in found)

    @property
    def tables(self) -> list[object]:
        return [(found, str(self.engine.table_schema(self.snapshot, *found[:2]))) for found in self.engine.tables(self.snapshot)]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Made, Made]]:
    """A log that hides topics and views from alice, and one that has only what alice may read."""
    folder = tmp_path_factory.mktemp("logs")
    hiding = Made(folder / "hiding", (*OPEN.values(), *HIDDEN.values(), *VIEWS, *HIDDEN_VIEWS), ALICE)
    without = Made(folder / "without", (*OPEN.values(), *VIEWS), Principal("alice", rights=ALICE.rights))
    yield hiding, without
    hiding.log.close()
    without.log.close()


NAMES = [
    *OPEN,
    *HIDDEN,
    "seen",
    "of_seen",
    "hidden_seen",
    "mixed",
    "seen_past",
    "seen_through",
    "seen_records",
    "other",
    "nothing",
    "_views",
    "_schemas",
]
PLACES = ["", "public.", "log.", "records.", "oplog.public.", "oplog.log.", "system.", "information_schema."]
SHAPES = [
    "SELECT * FROM {}",
    "SELECT count(*) AS n FROM {}",
    "EXPLAIN SELECT * FROM {}",
    "DESCRIBE {}",
    "SHOW COLUMNS FROM {}",
    "SELECT 1 WHERE EXISTS (SELECT 1 FROM {})",
    "SELECT id FROM orders WHERE id IN (SELECT id FROM {})",
    "SELECT max(id) AS m FROM orders GROUP BY (SELECT count(*) FROM {})",
    "WITH x AS (SELECT * FROM {}) SELECT count(*) AS n FROM x, orders",
    "SELECT a.id FROM orders a LEFT JOIN {} b ON a.id = b.id",
    "SELECT id FROM orders UNION ALL SELECT id FROM {}",
    "SELECT min(id) AS a, max(id) AS b FROM {}",
    "SELECT * FROM {} ORDER BY 1 DESC LIMIT 1",
    "INSERT INTO orders SELECT id, 'x' FROM {}",
    "CREATE VIEW v AS SELECT * FROM {}",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_hidden_name_is_as_if_it_had_never_been(both: tuple[Made, Made], name: str) -> None:
    hiding, without = both
    for place in PLACES:
        for shape in SHAPES:
            sql = shape.format(place + name)
            assert hiding.outcome(sql) == without.outcome(sql), sql
    for quoted in (f'"{name}"', f'public."{name}"', f'"{name.upper()}"'):
        assert hiding.outcome(f"SELECT * FROM {quoted}") == without.outcome(f"SELECT * FROM {quoted}")


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT table_schema, table_name, table_type FROM information_schema.tables WHERE table_schema <> 'information_schema'",
        "SELECT table_name, column_name, data_type FROM information_schema.columns WHERE table_schema <> 'information_schema'",
        "SELECT * FROM information_schema.views",
        "SELECT * FROM information_schema.schemata",
        "SHOW TABLES",
        "SELECT topic, entries, next_offset FROM system.topics",
        "SELECT * FROM system.metrics",
        "SELECT * FROM system.settings",
        "WITH salaries AS (SELECT 1 AS a) SELECT * FROM salaries",
        "SELECT * FROM at_version('salaries', 2)",
        "SELECT * FROM at_version('seen', 2)",
        "SELECT * FROM at_version('_views', 2)",
        "SELECT * FROM at_version('orders', 2)",
        "SELECT * FROM at_time('salaries', '2999-01-01T00:00:00Z')",
        "SELECT * FROM at_time('orders', '2999-01-01T00:00:00Z')",
        "SELECT salaries.amount FROM orders",
    ],
)
def test_listings_and_the_past_show_nothing_hidden(both: tuple[Made, Made], sql: str) -> None:
    hiding, without = both
    assert hiding.outcome(sql) == without.outcome(sql)


def test_the_listing_of_tables_shows_nothing_hidden(both: tuple[Made, Made]) -> None:
    hiding, without = both
    assert hiding.tables == without.tables
    assert {name for (_, name, _), _ in hiding.tables} >= {"orders", "web_a", "seen", "of_seen"}


def test_the_operator_sees_everything(both: tuple[Made, Made]) -> None:
    hiding = both[0]
    snapshot = hiding.log.snapshot().seen_by(OPERATOR)
    assert {*OPEN, *HIDDEN, "seen", "mixed", "other", "metrics", "_views"} <= {name for _, name, _ in hiding.engine.tables(snapshot)}
    assert rows(hiding.engine, snapshot, "SELECT amount FROM mixed") == [{"amount": 4711}]


WORDS = st.sampled_from(
    [*NAMES, *PLACES, "SELECT", "*", "FROM", "(", ")", ",", "JOIN", "ON", "UNION", "WITH x AS", "id", "amount", "1", "="]
)


@settings(max_examples=300, deadline=None)
@given(words=st.lists(WORDS, max_size=12))
def test_no_statement_tells_the_two_logs_apart(both: tuple[Made, Made], words: list[str]) -> None:
    hiding, without = both
    sql = "SELECT " + " ".join(words)
    assert hiding.outcome(sql) == without.outcome(sql)


def test_what_is_remembered_for_one_is_not_shown_to_another(both: tuple[Made, Made]) -> None:
    """Plans, answers and states are kept for those who may see the same."""
    hiding = both[0]
    for sql in (
        "SELECT count(*) AS n FROM salaries",
        "SELECT amount, count(*) AS n FROM salaries GROUP BY amount",
        "SELECT * FROM salaries",
    ):
        for _ in range(3):
            for viewer in (OPERATOR, ANYBODY):
                snapshot = hiding.log.snapshot().seen_by(viewer)
                hiding.engine.prepare(sql, snapshot)
                assert rows(hiding.engine, snapshot, sql)
            assert hiding.outcome(sql) == both[1].outcome(sql)


def test_queries_are_shown_to_who_asked_them_and_to_the_operator(log: OpLog) -> None:
    engine = Engine(Config())
    seen = {name: log.snapshot().seen_by(Principal(name, rights=Rights())) for name in ("alice", "bob")}
    for name, snapshot in seen.items():
        rows(engine, snapshot, f"SELECT 1 AS of_{name}")
    sql = "SELECT principal, sql FROM system.queries WHERE status <> 'running'"
    for name, snapshot in seen.items():
        engine.prepare(sql, snapshot)
        assert {found["principal"] for found in rows(engine, snapshot, sql)} == {name}
    everybodys = rows(engine, log.snapshot().seen_by(OPERATOR), sql)
    assert {"SELECT 1 AS of_alice", "SELECT 1 AS of_bob"} <= {found["sql"] for found in everybodys}


# What is changed


@pytest.fixture
def change(log: OpLog) -> Callable[..., int]:
    """Carry out a statement as a principal who may append to some topics and administer others."""
    statements = Statements(log, Engine(Config()), Config())
    for sql in (*OPEN.values(), *HIDDEN.values()):
        statements.execute(sql)
    rights = Rights(append=frozenset(("orders", "sink")), read=frozenset(("orders",)), admin=frozenset(("mine_*",)))

    def run(sql: str) -> int:
        return statements.execute(sql, principal=Principal("carol", rights=rights))

    statements.execute("CREATE TABLE sink (id BIGINT)")
    return run


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TABLE orders2 (a BIGINT)",
        "CREATE TABLE orders (a BIGINT)",
        "CREATE OR REPLACE TABLE orders (a BIGINT)",
        "CREATE TABLE IF NOT EXISTS salaries (a BIGINT)",
        "CREATE TABLE salaries AS SELECT 1 AS a",
        "CREATE VIEW salaries AS SELECT 1 AS a",
        "CREATE VIEW sight AS SELECT id FROM orders",
        "DROP TABLE orders",
        "DROP TABLE salaries",
        "DROP TABLE IF EXISTS nowhere",
        "DROP VIEW IF EXISTS nowhere",
    ],
)
def test_declaring_and_dropping_takes_admin_and_tells_nothing(change: Callable[..., int], log: OpLog, sql: str) -> None:
    before = log.snapshot().table_version
    name = re.split(r"\W+", sql.replace("IF NOT EXISTS ", "").replace("IF EXISTS ", "").replace("OR REPLACE ", ""))[2]
    with pytest.raises(Forbidden) as caught:
        change(sql)
    assert str(caught.value) == f"'carol' has no permission 'admin' for '{name}'; nothing was written; ask whoever keeps the grants"
    assert log.snapshot().table_version == before


def test_who_may_append_may_not_read_for_that(change: Callable[..., int], log: OpLog) -> None:
    assert change("INSERT INTO sink VALUES (1), (2)") == 2
    assert change("INSERT INTO sink SELECT id FROM orders") == 1
    with pytest.raises(NotFound, match=r"^table 'oplog.public.sink' does not exist"):
        change("INSERT INTO sink SELECT id FROM sink")
    with pytest.raises(NotFound, match=r"^table 'oplog.public.sink' does not exist"):
        change("INSERT INTO orders SELECT id, 'x' FROM sink")
    for unread in ("sink", "salaries"):
        with pytest.raises(NotFound, match=rf"^table 'oplog.public.{unread}' does not exist"):
            change(f"CREATE TABLE mine_b AS SELECT * FROM {unread}")
    with pytest.raises(NotFound, match=r"^table 'oplog.public.salaries' does not exist"):
        change("INSERT INTO salaries VALUES (1, 2)")
    assert log.snapshot().topic("sink").entries == 3


def test_who_may_read_may_not_append_for_that(log: OpLog, change: Callable[..., int]) -> None:
    reader = Principal("dan", rights=Rights(read=frozenset(("orders",))))
    with pytest.raises(Forbidden, match=r"^'dan' has no permission 'append' for 'orders'; nothing was written"):
        Statements(log, Engine(Config()), Config()).execute("INSERT INTO orders VALUES (1, 'x')", principal=reader)


def test_an_administrator_declares_and_drops_what_is_theirs(change: Callable[..., int], log: OpLog) -> None:
    change("CREATE TABLE mine_a AS SELECT id FROM orders")
    change("CREATE VIEW mine_v AS SELECT id FROM orders")
    change("DROP VIEW mine_v")
    change("DROP TABLE mine_a")
    assert "mine_a" not in log.snapshot().topics


def test_a_follower_is_cut_off_when_its_right_is_taken(log: OpLog) -> None:
    rights = {"now": Rights(read=frozenset(("t",)))}
    log.append("t", pa.record_batch({"n": [1]}))
    follower = Follower(log, Engine(Config()), Config())
    seen = lambda snapshot: snapshot.seen_by(Principal("eve", rights=rights["now"]))  # noqa: E731
    _, runs = follower.read(TopicRead("t", follow=True), lambda: False, None, seen)
    assert next(runs).next_offset == 1
    log.append("t", pa.record_batch({"n": [2]}))
    assert next(runs).next_offset == 2
    rights["now"] = Rights()
    log.append("t", pa.record_batch({"n": [3]}))
    with pytest.raises(NotFound, match=r"^topic 't' does not exist"):
        next(runs)
