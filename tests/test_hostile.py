"""SQL from a client stays inside: it touches no file, changes no setting, and takes no more than a statement may.

FUZZ_SECONDS says how long statements are made at random, FUZZ_SEED which: another one makes others.
"""

import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import adbc_driver_flightsql.dbapi as adbc
import pyarrow as pa
import pytest
from conftest import ServerProcess, ask, eventually, put
from pyarrow import flight

from flight_oplog.flightsql import wire

FUZZ_SECONDS = float(os.environ.get("FUZZ_SECONDS", "8"))
STATEMENT_SECONDS, STATEMENT_BYTES = 1, 64 << 20
FLAGS = ("--statement-seconds-max", str(STATEMENT_SECONDS), "--statement-bytes-max", str(STATEMENT_BYTES))
# What is planned before the clock of a statement begins takes time too, and so does a machine that others use.
ANSWER_SECONDS, NEIGHBOUR_SECONDS = STATEMENT_SECONDS + 12, 5
SERVER_BYTES = 2048 << 20
SECRET = "xyzzy-plugh"
ENTRIES = pa.record_batch({"a": list(range(1000)), "s": [f"{'x' * 50}{n}" for n in range(1000)]})

Ways = dict[str, Callable[[str], Any]]


@contextmanager
def ways(server: ServerProcess) -> Iterator[Ways]:
    """The ways a client may send a statement."""
    with flight.connect(server.uri) as client, adbc.connect(server.uri, autocommit=True) as connection:

        def execute(sql: str) -> Any:
            return ask(connection, sql)

        def prepare(sql: str) -> None:  # ADBC's own keeps UNIMPLEMENTED to itself
            body = wire.pack(wire.ActionCreatePreparedStatementRequest(sql))
            list(client.do_action(flight.Action("CreatePreparedStatement", body)))

        def command(sql: str) -> list[dict[str, Any]]:
            info = client.get_flight_info(flight.FlightDescriptor.for_command(wire.pack(wire.CommandStatementQuery(sql))))
            return client.do_get(info.endpoints[0].ticket).read_all().to_pylist()

        yield {"execute": execute, "prepare": prepare, "command": command}


STATUSES = (
    (flight.FlightUnavailableError, "Unavailable"),
    (flight.FlightCancelledError, "Cancelled"),
    (flight.FlightInternalError, "Internal"),
    (NotImplementedError, "Unimplemented"),
    (KeyError, "NotFound"),
    (pa.ArrowInvalid, "InvalidArgument"),
)


def ended(way: Callable[[str], Any], sql: str) -> tuple[str, str]:
    """Return the status and the words that a statement ended with; OK and its rows for one that was answered."""
    try:
        return "OK", str(way(sql))
    except Exception as error:
        text = str(error)
        told = re.findall(r"\((\w+); [A-Z]\w+", text)  # as ADBC says it
        return told[-1] if told else next((name for kind, name in STATUSES if isinstance(error, kind)), type(error).__name__), text


def leaks(text: str, server: ServerProcess) -> list[str]:
    """What of the server's insides a text tells."""
    return [part for part in (SECRET, str(server.folder), "Traceback", "site-packages", "the server's log") if part in text]


class Files:
    """The files beside a log: one that holds a secret, what DataFusion spills, and whatever statements may have made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.canary = folder / "canary.csv"
        self.canary.write_text(f"word\n{SECRET}\n")
        self.spill = folder / "spill"
        self.spill.mkdir()
        self._before = self._names()

    def _names(self) -> set[str]:
        beside = [path for path in self.folder.rglob("*") if not {self.folder / "log", self.spill} & {path, *path.parents}]
        return {str(path) for path in beside if path.suffix != ".stderr"} | {path.name for path in Path.cwd().glob("hostile*")}

    def made(self) -> set[str]:
        return self._names() - self._before

    def spilled(self) -> list[Path]:
        return list(self.spill.rglob("*"))

    def named_in(self, sql: str) -> str:
        return sql.replace("{csv}", str(self.canary)).replace("{out}", str(self.folder / "out"))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def server(start: Callable[..., ServerProcess], files: Files) -> ServerProcess:
    server = start(*FLAGS, environment={"TMPDIR": str(files.spill)})
    with flight.connect(server.uri) as client:
        put(client, "t", ENTRIES)
        put(client, "neighbours", ENTRIES)  # which no statement here names, so none appends to it
    return server


# Refused: with which status and words.
NOT_SERVED = ("Unimplemented", "is not served: statements may read")
ONLY_READS = ("Unimplemented", "is not served here: it may only read")
APPEND_ONLY = ("Unimplemented", "the log is append-only")
NOT_IMPLEMENTED = ("Unimplemented", "the query uses something that is not implemented")
NO_SQL = ("InvalidArgument", "the query cannot be answered: ParserError")
NO_TABLE = ("NotFound", "does not exist")
NO_FUNCTION = ("InvalidArgument", "not found")
INVALID_FUNCTION = ("InvalidArgument", "Invalid function")
ONE_STATEMENT = ("Unimplemented", "only supports a single SQL statement")
ELSEWHERE = ("InvalidArgument", "is not in oplog.public, where topics and views are")
NO_FORMAT = ("InvalidArgument", "There is no registered file format")
TOO_DEEP = ("InvalidArgument", "RecursionLimitExceeded")
BRACKETS = ("InvalidArgument", "the SQL text has brackets more than 1000 deep")
OPERATORS = ("InvalidArgument", "operators; sql_operators_max is 1000")
TABLES = ("InvalidArgument", "tables; sql_tables_max is 100")
LONG = ("InvalidArgument", "bytes; sql_bytes_max is 1048576")
GROWS = (
    "InvalidArgument",
    "times as large as what they are made of, by its functions; with statement_bytes_max (67108864) that is too much",
)
UNTOLD = ("InvalidArgument", "makes a value as large as it is told: write that as a number in the text")
NO_REGEX = ("InvalidArgument", "Regular expression did not compile")
NO_TOPIC = ("InvalidArgument", "is not a topic name")
OF_A_SOURCE = ("InvalidArgument", "source dependent")
OVERFLOWS = ("InvalidArgument", "verflow happened on")
# What comes up only when a statement is run.
WHEN_RUN = (NO_REGEX, NO_TOPIC, OF_A_SOURCE, OVERFLOWS)

OF_FILES = {
    "COPY t TO '{out}.csv'": NOT_SERVED,
    "COPY (SELECT * FROM t) TO 'hostile.csv' STORED AS CSV": NOT_SERVED,
    "copy t to stdout": NOT_SERVED,
    "COPY t FROM '{csv}'": NOT_SERVED,
    "COPY INTO t FROM '{csv}'": NOT_SERVED,
    "EXPLAIN COPY t TO '{out}.csv' STORED AS CSV": ONLY_READS,
    "EXPLAIN ANALYZE COPY t TO '{out}.csv' STORED AS CSV": ONLY_READS,
    "EXPLAIN COPY t TO '{out}.strange'": NO_FORMAT,
    "CREATE VIEW hidden AS COPY t TO '{out}.csv'": NO_SQL,
    "WITH c AS (COPY t TO '{out}.csv') SELECT 1": NO_SQL,
    "SELECT * FROM (COPY t TO '{out}.csv')": NO_SQL,
    "INSERT INTO t COPY t TO '{out}.csv'": NO_SQL,
    "CREATE EXTERNAL TABLE x STORED AS CSV LOCATION '{csv}'": NOT_SERVED,
    "CREATE EXTERNAL TABLE x (word VARCHAR) STORED AS CSV LOCATION '{csv}' OPTIONS ('format.has_header' 'true')": NOT_SERVED,
    "CREATE OR REPLACE EXTERNAL TABLE x STORED AS PARQUET LOCATION 's3://bucket/x'": NOT_SERVED,
    "CREATE UNBOUNDED EXTERNAL TABLE x STORED AS CSV LOCATION '{csv}'": NOT_SERVED,
    "CREATE EXTERNAL TABLE IF NOT EXISTS t STORED AS DELTATABLE LOCATION 'file:///'": NOT_SERVED,
    "EXPLAIN CREATE EXTERNAL TABLE x STORED AS CSV LOCATION '{csv}'": ONLY_READS,
    "EXPLAIN ANALYZE CREATE EXTERNAL TABLE x STORED AS CSV LOCATION '{csv}'": ONLY_READS,
    "CREATE TABLE x STORED AS CSV LOCATION '{csv}'": NO_SQL,
    "CREATE TABLE x (a INT) WITH (location = '{csv}')": ("InvalidArgument", "option 'location' is not known"),
    "INSERT INTO '{csv}' VALUES (1)": NO_TABLE,
    "INSERT OVERWRITE DIRECTORY '{out}' SELECT 1": NOT_IMPLEMENTED,
    "SELECT * INTO OUTFILE '{out}' FROM t": NO_SQL,
    "SELECT * INTO x FROM t": ONLY_READS,
    "UNLOAD (SELECT 1) TO '{out}'": NOT_SERVED,
    "LOAD DATA INPATH '{csv}' INTO TABLE t": NOT_SERVED,
    "ATTACH '{csv}' AS x": NOT_IMPLEMENTED,
    "DESCRIBE '{csv}'": NO_TABLE,
    "FROM '{csv}'": NO_TABLE,
    "SELECT read_text('{csv}')": INVALID_FUNCTION,
    "SELECT pg_read_file('{csv}')": INVALID_FUNCTION,
    "SELECT input_file_name() FROM t": OF_A_SOURCE,
    "SELECT * FROM at_version('{csv}', 1)": NO_TABLE,
    "SELECT * FROM at_time('t', '{csv}')": ("InvalidArgument", "is not a time such as"),
    'CREATE TABLE "../hostile" (a INT)': ELSEWHERE,
    'CREATE TABLE "{out}" (a INT)': NO_TOPIC,
    'CREATE VIEW "../hostile" AS SELECT 1': ELSEWHERE,
    'DROP TABLE "../log"': ELSEWHERE,
    'INSERT INTO "../hostile" VALUES (1)': NO_TABLE,
}

# Each of these in each of those.
SOURCES = {
    **dict.fromkeys(("'{csv}'", '"{csv}"', "`{csv}`", 'oplog.public."{csv}"', "'file://{csv}'", '"/etc"."passwd"'), NO_TABLE),
    **dict.fromkeys(("'http://127.0.0.1:9/x.csv'", "'s3://bucket/x.parquet'", "datafusion.public.t"), NO_TABLE),
    **{f"{name}('{{csv}}')": NO_FUNCTION for name in ("read_csv", "READ_PARQUET", "read_json", "parquet_metadata", "glob", "delta_scan")},
    **{f"{name}()": NO_FUNCTION for name in ("list_files_cache", "statistics_cache", "metadata_cache")},
}
READERS = (
    "SELECT * FROM {}",
    "SELECT s FROM t UNION ALL SELECT word FROM {}",
    "SELECT (SELECT word FROM {})",
    "SELECT * FROM t WHERE s IN (SELECT word FROM {})",
    "WITH c AS (SELECT * FROM {}) SELECT * FROM c",
    "VALUES ((SELECT word FROM {}))",
    "EXPLAIN SELECT * FROM {}",
    "EXPLAIN ANALYZE VERBOSE SELECT * FROM {}",
    "CREATE VIEW hidden AS SELECT * FROM {}",
    "CREATE TABLE hidden AS SELECT * FROM {}",
    "INSERT INTO t SELECT 1, word FROM {}",
)

OF_THE_SERVER = {
    **{f"SET {what}": NOT_SERVED for what in ("datafusion.runtime.temp_directory = '/'", "datafusion.runtime.memory_limit = '1T'")},
    **{
        f"SET {what}": NOT_SERVED
        for what in ("datafusion.catalog.location = '/'", "datafusion.execution.batch_size TO 1", "VARIABLE x = 1")
    },
    **{f"RESET {what}": NOT_SERVED for what in ("datafusion.runtime.memory_limit", "ALL")},
    **dict.fromkeys(("USE public", "SET TIME ZONE 'UTC'", "LOAD httpfs", "VACUUM", "ANALYZE TABLE t", "CALL f()"), NOT_SERVED),
    **dict.fromkeys(("PREPARE p AS SELECT 1", "EXECUTE p", "EXECUTE IMMEDIATE 'SELECT 1'", "DEALLOCATE p", "DEALLOCATE ALL"), NOT_SERVED),
    **dict.fromkeys(("EXPLAIN SET x = 1", "EXPLAIN PREPARE p AS SELECT 1", "EXPLAIN CREATE SCHEMA x", "EXPLAIN DROP TABLE t"), ONLY_READS),
    **dict.fromkeys(("CREATE SCHEMA x", "CREATE SCHEMA IF NOT EXISTS oplog.x", "CREATE DATABASE x", "CREATE INDEX i ON t (a)"), NOT_SERVED),
    **dict.fromkeys(
        ("DROP SCHEMA public CASCADE", "DROP FUNCTION abs", "ALTER TABLE t ADD COLUMN x INT", "GRANT ALL ON t TO u"), NOT_SERVED
    ),
    **dict.fromkeys(("CREATE FUNCTION f(BIGINT) RETURNS BIGINT RETURN 1", "BEGIN", "COMMIT", "ROLLBACK"), NOT_SERVED),
    **dict.fromkeys(("CREATE CATALOG x", "DROP CATALOG oplog", "DO $$ SELECT 1 $$", "CREATE STAGE s URL='file:///'"), NO_SQL),
    **dict.fromkeys(
        ("DROP DATABASE oplog", "CREATE ROLE r", "CREATE EXTENSION e", "CREATE SECRET (TYPE s3)", "INSTALL httpfs"), NOT_IMPLEMENTED
    ),
    **dict.fromkeys(
        ("PRAGMA version", "KILL 1", "CREATE TEMPORARY TABLE x AS SELECT 1", "CREATE PROCEDURE p() AS BEGIN SELECT 1; END"), NOT_IMPLEMENTED
    ),
    **dict.fromkeys(
        ("DELETE FROM t", "UPDATE t SET a = 1", "TRUNCATE t", "MERGE INTO t USING t u ON t.a = u.a WHEN MATCHED THEN DELETE"), APPEND_ONLY
    ),
    **dict.fromkeys(
        ("WITH c AS (DELETE FROM t) SELECT 1", "WITH c AS (INSERT INTO t VALUES (1, 'x') RETURNING a) SELECT * FROM c"), NOT_IMPLEMENTED
    ),
    "REPLACE INTO t VALUES (1, 'x')": ONLY_READS,
    "INSERT OVERWRITE t SELECT * FROM t": NOT_SERVED,
    "SELECT current_setting('x')": INVALID_FUNCTION,
    "SELECT getenv('HOME')": INVALID_FUNCTION,
    "SELECT date_trunc(now())": ("InvalidArgument", "No function matches the given name and argument types 'date_trunc(Timestamp(ns))'"),
}

DISGUISED = {
    **dict.fromkeys(("/* a */ COPY t TO '{out}.csv'", "-- a\nCOPY t TO '{out}.csv'", "/* /* */ */ cOpY\tt TO '{out}.csv'"), NOT_SERVED),
    **dict.fromkeys(("\u00a0COPY t TO '{out}.csv'", "\ufeffCOPY t TO '{out}.csv'", "\u2003SET x = 1", "\x0b\rSET x = 1"), NOT_SERVED),
    **dict.fromkeys(("(COPY t TO '{out}.csv')", "((SET x = 1))", ";COPY t TO '{out}.csv'", "COPY t TO '{out}.csv'; SELECT 1"), NOT_SERVED),
    **dict.fromkeys(
        ("\"COPY\" t TO '{out}.csv'", "ＣＯＰＹ t TO '{out}.csv'", "C/**/OPY t TO '{out}.csv'", "$$COPY$$ t TO '{out}.csv'"), NO_SQL
    ),
    **dict.fromkeys(("SELECT 1; COPY t TO '{out}.csv'", "SELECT 1;; SELECT 2", "INSERT INTO t VALUES (1, 'x'); SET x = 1"), ONE_STATEMENT),
    **dict.fromkeys(("CREATE TABLE x AS SELECT 1; COPY t TO '{out}.csv'", "CREATE VIEW v AS SELECT 1; SET x = 1"), ONE_STATEMENT),
    "SELECT $a$x$a$": ("InvalidArgument", "where nothing begins with it"),
    "SELECT 'a": ("InvalidArgument", "that does not end"),
    "SELECT /* /* */ 1": ("InvalidArgument", "that does not end"),
}

# Only a command carries these: ADBC's texts end at a NUL.
WITH_NUL = {
    "\x00COPY t TO '{out}.csv'": NOT_SERVED,
    "SEL\x00ECT 1": NO_SQL,
    "COPY\x00 t TO '{out}.csv'": NOT_SERVED,
    "SELECT * FROM '{csv}\x00'": NO_TABLE,
}


def chain(levels: int, first: str, level: str, last: str) -> str:
    """A statement whose common table expressions c0, c1, ... are each made of the one before."""
    parts = [f"c0 AS ({first})", *(f"c{n} AS ({level.format(f'c{n - 1}')})" for n in range(1, levels))]
    return f"WITH {', '.join(parts)} {last.format(f'c{levels - 1}')}"


def nested(before: str, after: str, times: int, within: str = "1") -> str:
    return f"SELECT {before * times}{within}{after * times}"


OVERSIZED = {
    **{nested("(", ")", n): end for n, end in ((200, TOO_DEEP), (100_000, BRACKETS))},
    **{nested(*around, 900): TOO_DEEP for around in (("abs(", ")"), ("[", "]"), ("(SELECT ", ")"), ("- ", ""))},
    **{nested("(SELECT * FROM ", ") AS x", 90, "t").replace("SELECT (", "SELECT * FROM (", 1): TOO_DEEP},
    **{nested("CASE WHEN true THEN ", " END", n): end for n, end in ((300, NO_SQL), (20_000, BRACKETS))},
    **{nested("NOT ", "", 999, "true"): NO_SQL, nested("NOT ", "", 2000, "true"): OPERATORS},
    **{f"SELECT true{' AND true' * 100_000}": OPERATORS, f"SELECT 'a'{' || s' * 100_000} FROM t": OPERATORS},
    **{f"SELECT * FROM t{' UNION ALL SELECT * FROM t' * 200}": TABLES, f"SELECT * FROM t{', t' * 200}": TABLES},
    **{f"SELECT '{'a' * 1_100_000}'": LONG, f"SELECT 1 IN ({'1,' * 600_000}1)": LONG},
    "SELECT count(*) FROM t GROUP BY CUBE(" + ", ".join(f"a + {n}" for n in range(30)) + ")": OPERATORS,
    "SELECT count(*) FROM t GROUP BY CUBE(a, s), CUBE(a % 2, a % 3, a % 4, a % 5), CUBE(a % 6, a % 7, a % 8, a % 9)": OPERATORS,
    "SELECT count(*) FROM t GROUP BY GROUPING SETS (" + ", ".join(["(a)"] * 20_000) + ")": OPERATORS,
    chain(8, "SELECT a FROM t", "SELECT x.a FROM {0} AS x, {0} AS y", "SELECT count(*) FROM {}"): TABLES,
    chain(40, "SELECT a FROM t", "SELECT x.a FROM {0} AS x JOIN {0} AS y USING (a)", "SELECT count(*) FROM {}"): OPERATORS,
}

GROWING = {
    **{f"SELECT {call}": GROWS for call in ("repeat('x', 1000000000)", "length(\"repeat\"(repeat('x', 50000), 50000))")},
    **{f"SELECT length({call})": GROWS for call in ("lpad('x', 1000000000)", "rpad('x', 1000000000, 'ab')")},
    "SELECT length(repeat(arrow_cast('x', 'LargeUtf8'), 1000000000000))": GROWS,
    "SELECT range(1, 1000000000000)": GROWS,
    "SELECT cardinality(generate_series(-1000000000, 1))": GROWS,
    "SELECT count(*) FROM (SELECT unnest(range(1, 1000000000)) FROM t)": GROWS,
    "SELECT * FROM t JOIN t AS u ON t.a = ANY(range(1, 1000000000))": GROWS,
    "SELECT * FROM unnest(range(1, 1000000000))": GROWS,
    "SELECT array_length(array_repeat(1, 300000000))": GROWS,
    "SELECT array_length(list_resize([1], 300000000, 0))": GROWS,
    f"SELECT replace('{'x' * 100_000}', 'x', '{'y' * 100_000}')": GROWS,
    f"SELECT regexp_replace('{'x' * 100_000}', 'x', '{'y' * 100_000}', 'g')": GROWS,
    f"SELECT levenshtein('{'a' * 400_000}', '{'b' * 400_000}')": GROWS,
    "SELECT array_to_string(range(1, 100000), repeat('x', 10000))": GROWS,
    "SELECT array_has_any(range(1, 500000), range(500001, 1000000))": GROWS,
    "SELECT arrow_cast(NULL, 'FixedSizeBinary(2000000000)')": GROWS,
    "SELECT count(x) FROM (SELECT arrow_cast(NULL, 'FixedSizeList(1000000, Int64)') AS x FROM t)": GROWS,
    chain(40, "SELECT 'x' AS s", "SELECT s || s AS s FROM {}", "SELECT length(s) FROM {}"): GROWS,
    chain(40, "SELECT s FROM t", "SELECT concat(s, '-', s) AS s FROM {}", "SELECT sum(length(s)) FROM {}"): GROWS,
    chain(40, "SELECT s FROM t", "SELECT s || CASE WHEN true THEN s END AS s FROM {}", "SELECT sum(length(s)) FROM {}"): GROWS,
    chain(40, "SELECT [a] AS l FROM t", "SELECT array_concat(l, l) AS l FROM {}", "SELECT sum(cardinality(l)) FROM {}"): GROWS,
    chain(40, "SELECT a AS l FROM t", "SELECT [l, l] AS l FROM {}", "SELECT count(l) FROM {}"): GROWS,
    "SELECT length(s || s || s || s) FROM (SELECT repeat(s, 50000) AS s FROM t)": GROWS,
    "SELECT approx_percentile_cont(a, 0.5, 1000000000000000) FROM t": GROWS,
    "SELECT approx_percentile_cont(0.5, 1000000000000000) WITHIN GROUP (ORDER BY a) FROM t": GROWS,
    "SELECT approx_percentile_cont_with_weight(a, 1, 0.5, 1000000000000000) FROM t": GROWS,
    "CREATE VIEW large AS SELECT repeat(s, 1000000) AS s FROM t": GROWS,
    "CREATE TABLE large AS SELECT repeat(s, 1000000) AS s FROM t": GROWS,
    "INSERT INTO t SELECT a, repeat(s, 1000000) FROM t": GROWS,
    "EXPLAIN SELECT repeat('x', 1000000000)": GROWS,
    **{f"SELECT {call} FROM t": UNTOLD for call in ("repeat(s, a)", "lpad(s, a * 1000000)", "range(a)", "array_repeat(s, 1000 * 1000)")},
    "SELECT repeat(n => 1000000000, str => 'x')": UNTOLD,
    "SELECT arrow_cast(NULL, concat('FixedSizeBinary(', '2000000000)'))": ("InvalidArgument", "takes its type as one string in the text"),
    "SELECT array_agg(a) OVER (ORDER BY a) FROM t": ("Unimplemented", "array_agg and string_agg are not served with OVER"),
    "SELECT string_agg(s, ',') FILTER (WHERE a > 1) OVER w FROM t WINDOW w AS (ORDER BY a)": ("Unimplemented", "are not served with OVER"),
    **{f"SELECT regexp_like({what}, '(a{{1000}}){{1000}}') FROM t": NO_REGEX for what in ("'a'", "s")},
    "SELECT 99999999999999999999999999999999999999::decimal(38, 0) * 99999999999999999999999999999999999999::decimal(38, 0)": OVERFLOWS,
    "SELECT factorial(1000000000)": OVERFLOWS,
}

REFUSED = OF_FILES | OF_THE_SERVER | DISGUISED | OVERSIZED | GROWING
"""Each with the end it comes to, however it is sent."""


def test_statements_that_would_reach_out_are_refused(server: ServerProcess, files: Files) -> None:
    reading = {reader.format(source): end for reader in READERS for source, end in SOURCES.items()}
    with ways(server) as sent:
        cases = [(sql, end, way) for sql, end in (REFUSED | reading).items() for way in sent]
        for template, (status, words), way in (*cases, *((sql, end, "command") for sql, end in WITH_NUL.items())):
            sql = files.named_in(template)
            found, text = ended(sent[way], sql)
            if way == "prepare" and (status, words) in WHEN_RUN:
                assert found == "OK", (template[:200], found, text[:400])
            else:
                assert (found, words in text) == (status, True), (way, template[:200], found, text[:400])
            assert leaks(text, server) == [], (way, template[:200], text[:400])
        assert sent["command"]("SELECT count(*) AS n, max(a) AS a FROM t") == [{"n": 1000, "a": 999}]
        listed = sent["command"]("SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'")
        assert [row["table_name"] for row in listed] == ["neighbours", "t"]
    assert files.made() == set()
    assert server.memory_peak() < SERVER_BYTES
    assert server.process.poll() is None


# Stopped by a limit: which of them comes first is the machine's business where there are two.
LATE = ("InvalidArgument", f"the query ran longer than statement_seconds_max ({STATEMENT_SECONDS}); ask for less")
LARGE = ("Unavailable", "the query needs more memory than statement_bytes_max and could not spill; ask for less or raise it")
SERIES = "generate_series(1, 1000000000000)"
LIMITED = {
    f"SELECT sum(value % 7) FROM {SERIES}": {LATE},
    f"SELECT value FROM {SERIES}": {LATE},
    f"EXPLAIN ANALYZE SELECT count(*) FROM {SERIES} WHERE value % 7 = 8": {LATE},
    f"SELECT count(*) FROM {SERIES} AS x, {SERIES} AS y": {LATE},
    f"SELECT count(*) FROM {SERIES} AS x, range(1000000000000) AS y WHERE x.value + y.value < 0": {LATE},
    f"INSERT INTO t SELECT value, 'x' FROM {SERIES} WHERE value < 0": {LATE},
    "SELECT unnest(range(1, 1000)) FROM generate_series(1, 1000000000)": {LATE},
    "SELECT count(*) FROM (SELECT repeat(s || value, 1000) AS x FROM t, generate_series(1, 1000000)) WHERE x LIKE '%y%'": {LATE},
    "SELECT count(*) FROM (SELECT repeat(s, 1000) AS x FROM t, generate_series(1, 1000000)) GROUP BY x": {LATE, LARGE},
    "WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM r) SELECT * FROM r": {LATE},
    "WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n FROM r, generate_series(1, 10)) SELECT count(*) FROM r": {LATE, LARGE},
    "WITH RECURSIVE r AS (SELECT s FROM t UNION ALL SELECT s || s FROM r) SELECT count(*) FROM r": {LATE, LARGE},
    "WITH RECURSIVE r AS (SELECT [1] AS l UNION ALL SELECT array_concat(l, l) FROM r) SELECT count(*) FROM r": {LATE, LARGE},
    f"SELECT count(*) FROM {SERIES} WHERE repeat(value::varchar, 100) LIKE '{'%1%2%3%4%5' * 20}z'": {LATE},
    f"SELECT count(*) FROM {SERIES} WHERE repeat(value::varchar, 100) SIMILAR TO '{'%(1|2)+%' * 10}z'": {LATE},
    f"SELECT count(*) FROM {SERIES} WHERE repeat(value::varchar, 100) ~ '((1+)+)+((.*)*)*z$'": {LATE},
    f"SELECT count(regexp_replace(repeat(value::varchar, 100), '(.*?){{1,50}}', 'x', 'g')) FROM {SERIES}": {LATE},
    f"SELECT count(DISTINCT value) FROM {SERIES}": {LATE, LARGE},
    f"SELECT value, count(*) FROM {SERIES} GROUP BY value": {LATE, LARGE},
    f"SELECT value FROM {SERIES} ORDER BY value % 1000003, value": {LATE, LARGE},
    f"SELECT count(*) FROM {SERIES} AS x JOIN {SERIES} AS y ON x.value = y.value": {LATE, LARGE},
    f"SELECT array_agg(value) FROM {SERIES}": {LATE, LARGE},
    f"SELECT string_agg(value::varchar, ',') FROM {SERIES}": {LATE, LARGE},
    f"SELECT median(value) FROM {SERIES}": {LATE, LARGE},
    f"SELECT approx_percentile_cont(value, 0.5, 100000) FROM {SERIES}": {LATE, LARGE},
    f"SELECT sum(value) OVER () FROM {SERIES}": {LATE, LARGE},
    f"SELECT sum(value) OVER (ORDER BY value ROWS BETWEEN 100000000 PRECEDING AND 100000000 FOLLOWING) FROM {SERIES}": {LATE, LARGE},
    f"SELECT lag(value, 1000000000) OVER (ORDER BY value) FROM {SERIES}": {LATE, LARGE},
    "SELECT x.s, y.s, z.s FROM t AS x, t AS y, t AS z ORDER BY x.s || y.s || z.s": {LATE, LARGE},
    "SELECT count(*) FROM t AS v, t AS w, t AS x, t AS y, t AS z": {LARGE},
    "INSERT INTO t SELECT count(*), 'x' FROM t AS v CROSS JOIN t AS w CROSS JOIN t AS x CROSS JOIN t AS y CROSS JOIN t AS z": {LARGE},
}
# Joins that do not pause: their answer comes at the limit, and they keep a thread, and what they spilled, for a while.
STUBBORN = {
    "SELECT count(*) FROM t AS v LEFT JOIN t AS w ON true LEFT JOIN t AS x ON true LEFT JOIN t AS y ON true LEFT JOIN t AS z ON true": {
        *(LATE, LARGE),
    },
    "SELECT count(*) FROM t, generate_series(1, 1000000) WHERE value::varchar || s ~ s": {LATE},
    "SELECT count(*) FROM t, generate_series(1, 1000000) WHERE levenshtein(repeat(s, 20), repeat(value::varchar, 100)) = 1": {LATE},
}


class Neighbour(threading.Thread):
    """Another client of the server: it asks short questions, and notes how long each answer took and what went wrong."""

    def __init__(self, server: ServerProcess) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._over = threading.Event()
        self.seconds: list[float] = []
        self.wrong: list[str] = []
        self._asked = time.monotonic()

    def run(self) -> None:
        with adbc.connect(self._server.uri, autocommit=True) as connection:
            for number in range(1, 1_000_000):
                if self._over.wait(0.02):
                    return
                self._asked = time.monotonic()
                try:
                    assert ask(connection, f"SELECT {number} AS n") == [{"n": number}]
                    [found] = ask(connection, f"SELECT count(*) AS n FROM neighbours WHERE a < {number % 1000}")
                    assert found == {"n": number % 1000}
                except BaseException as error:
                    self.wrong.append(str(error))
                    return
                self.seconds.append(time.monotonic() - self._asked)

    def longest(self) -> float:
        """Return how long the slowest answer took, and one that has not come yet."""
        return max([*self.seconds, time.monotonic() - self._asked])

    def end(self) -> None:
        self._over.set()
        self.join(60)


PARTS = (list(LIMITED.items())[::2], list(LIMITED.items())[1::2], list(STUBBORN.items()))


@pytest.mark.parametrize("part", range(len(PARTS)))
def test_statements_without_end_are_stopped_while_others_are_answered(server: ServerProcess, files: Files, part: int) -> None:
    process = server.process.pid
    with ways(server) as sent:
        for number, (sql, ends) in enumerate(PARTS[part]):
            neighbour = Neighbour(server)
            neighbour.start()
            began = time.monotonic()
            status, text = ended(sent[("execute", "command")[number % 2]], sql)
            seconds, longest = time.monotonic() - began, neighbour.longest()
            neighbour.end()
            assert any(status == end and words in text for end, words in ends), (sql, status, text[:400])
            assert leaks(text, server) == [], (sql, text[:400])
            assert seconds < ANSWER_SECONDS, (sql, seconds)
            assert neighbour.wrong == [], sql
            assert longest < NEIGHBOUR_SECONDS, (sql, longest)
            assert server.memory_peak() < SERVER_BYTES, (sql, server.memory_peak())
        assert sent["execute"]("SELECT count(*) AS n FROM t") == [{"n": 1000}]
    assert (server.process.poll(), server.process.pid) == (None, process)
    assert files.made() == set()
    assert PARTS[part][0][0] in STUBBORN or eventually(lambda: files.spilled() == [])


def test_planning_a_large_text_holds_up_nobody(server: ServerProcess) -> None:
    conditions = " OR ".join(f"(a + {n}) * 2 <> {n}" for n in range(240))
    neighbour = Neighbour(server)
    neighbour.start()
    with ways(server) as sent:
        for what in ("count(*) AS n", "max(a) AS n"):
            for order in ("", " ORDER BY n LIMIT 1"):
                assert ended(sent["execute"], f"SELECT {what} FROM t WHERE {conditions}{order}")[0] == "OK"
    longest = neighbour.longest()
    neighbour.end()
    assert neighbour.wrong == []
    assert longest < NEIGHBOUR_SECONDS


def test_what_a_text_may_make_is_measured_through_views(server: ServerProcess) -> None:
    with ways(server) as sent:
        execute = sent["execute"]
        execute("CREATE VIEW v0 AS SELECT s FROM t")
        for number in range(1, 5):
            execute(f"CREATE VIEW v{number} AS SELECT repeat(s, 10) AS s FROM v{number - 1}")
        assert execute("SELECT max(length(s)) AS n FROM v3") == [{"n": 53_000}]
        status, text = ended(execute, "WITH c AS (SELECT s || s AS s FROM v4) SELECT s || s || s || s FROM c")
        assert (status, GROWS[1] in text) == (GROWS[0], True), text
        execute("CREATE VIEW wide AS " + " UNION ALL ".join(["SELECT s FROM t"] * 30))
        status, text = ended(execute, "WITH c AS (SELECT s FROM public.wide) SELECT count(*) FROM c, c AS d, c AS e, c AS f")
        assert (status, TABLES[1] in text) == (TABLES[0], True), text


ORDINARY = (
    *("SELECT 1", "SELECT a, s FROM t WHERE a = 7", "SELECT s, count(*) AS n FROM t GROUP BY s ORDER BY n DESC LIMIT 3"),
    *(
        "WITH c AS (SELECT a FROM t) SELECT x.a FROM c AS x JOIN c AS y USING (a) WHERE x.a < 3",
        "EXPLAIN SELECT a FROM t WHERE s LIKE '%1%'",
    ),
    *("SELECT CASE WHEN a > 3 THEN upper(s) ELSE lpad(s, 60, '-') END FROM t LIMIT 5", "SELECT a FROM log.t ORDER BY _offset LIMIT 2"),
    *("SELECT sum(a) OVER (PARTITION BY a % 3 ORDER BY a) FROM t LIMIT 5", "SELECT * FROM system.topics", "SHOW TABLES", "DESCRIBE t"),
    *("INSERT INTO u SELECT a, s FROM t LIMIT 2", "CREATE OR REPLACE VIEW v AS SELECT a FROM t", "DROP VIEW IF EXISTS v", "SHOW ALL"),
    *("SELECT array_to_string([a, a + 1], ','), struct(a, s), {'k': s} FROM t LIMIT 3", "VALUES (1, 'x'), (2, NULL)"),
    *(
        "SELECT date_trunc('day', now()), interval '1 day', arrow_cast(1, 'Decimal128(38, 10)')",
        "SELECT approx_distinct(s), median(a) FROM t",
    ),
    *("SELECT * FROM generate_series(1, 3)", "SELECT * FROM at_version('t', 1) LIMIT 1", "SELECT * FROM information_schema.df_settings"),
)
SPLINTERS = (
    *(
        "(",
        ")",
        "[",
        "]",
        "'",
        '"',
        "`",
        "$$",
        "/*",
        "*/",
        "--",
        ";",
        ",",
        ".",
        "::",
        "||",
        "?",
        "$1",
        "\x00",
        "\ufeff",
        "\u2028",
        "é",
        "𝒳",
    ),
    *(
        "NULL",
        "1e308",
        "-9223372036854775808",
        "18446744073709551616",
        "0x",
        "NaN",
        "''",
        "E'\\'",
        "X'zz'",
        "INTERVAL '1' YEAR",
        "DISTINCT",
    ),
    *(
        "UNION ALL",
        "CROSS JOIN t",
        "LATERAL",
        "RECURSIVE",
        "QUALIFY",
        "OVER ()",
        "FILTER (WHERE true)",
        "WITHIN GROUP (ORDER BY a)",
        "~",
        "->",
    ),
    *(
        "repeat",
        "regexp_like",
        "arrow_cast",
        "unnest",
        "array_agg",
        "to_char",
        "overlay",
        "map",
        "get_field",
        "percentile_cont",
        "nth_value",
    ),
    *(
        "'FixedSizeList(9999999, Utf8)'",
        "'Timestamp(Second, Some(\"x\"))'",
        "TABLESAMPLE",
        "PIVOT",
        "GROUPING SETS ((a), ())",
        "CUBE (a, s)",
    ),
)
_PIECES = re.compile(r"\s+|\w+|'[^']*'|.", re.DOTALL)


class Fuzzer:
    """Makes statements of those above: parts of two, put together, bent and hidden in others."""

    def __init__(self, seed: int, files: Files) -> None:
        self.random = random.Random(seed)
        hostile = [sql for sql in (*REFUSED, *WITH_NUL, *LIMITED, *STUBBORN) if len(sql) < 2000]
        self._known = [*(files.named_in(sql) for sql in hostile), *ORDINARY * 16]

    def statement(self) -> str:
        pieces = _PIECES.findall(self.random.choice(self._known))
        for _ in range(self.random.choice((0, 1, 1, 2, 3, 8))):
            pieces = self._bent(pieces)
        sql = "".join(pieces)
        if self.random.random() < 0.2:
            sql = self.random.choice(READERS).replace("{}", f"({sql})")
        if self.random.random() < 0.05:
            sql = self.random.choice(("EXPLAIN ", "EXPLAIN ANALYZE ", "\n/* */", "(", "CREATE VIEW w AS ", "INSERT INTO u ")) + sql
        return sql

    def _bent(self, pieces: list[str]) -> list[str]:
        place = self.random.randrange(len(pieces) + 1)
        how = self.random.randrange(7)
        if how == 0:
            other = _PIECES.findall(self.random.choice(self._known))
            return pieces[:place] + other[self.random.randrange(len(other) + 1) :]
        if how == 1:
            return pieces[:place] + pieces[place + self.random.randrange(1, 4) :]
        if how == 2:
            return [*pieces[:place], " ", self.random.choice(SPLINTERS), " ", *pieces[place:]]
        if how == 3:
            number = str(self.random.choice((0, 1, -1, 2**31, 2**63 - 1, 2**64, 10**38, 0.5)))
            return [number if piece.isdigit() and self.random.random() < 0.5 else piece for piece in pieces]
        if how == 4:
            return [*pieces[:place], *pieces[place : place + 6] * self.random.randrange(2, 6), *pieces[place + 6 :]]
        if how == 5:
            words = [piece for piece in pieces if piece.isalpha()] or ["x"]
            return [self.random.choice(words) if piece.isalpha() and self.random.random() < 0.2 else piece for piece in pieces]
        text = self.random.randbytes(self.random.randrange(1, 12)).decode("utf-8", "ignore")
        return [*pieces[:place], text, *pieces[place:]]


ANSWERS = {"OK", "InvalidArgument", "NotFound", "Unimplemented", "Unavailable"}


def test_no_statement_made_at_random_makes_the_server_fail(server: ServerProcess, files: Files) -> None:
    seed = int(os.environ.get("FUZZ_SEED", "1"))
    fuzzer = Fuzzer(seed, files)
    counts: dict[str, int] = {}
    neighbour = Neighbour(server)
    neighbour.start()
    with ways(server) as sent:
        sent["execute"]("CREATE TABLE u AS SELECT * FROM t LIMIT 0")
        until = time.monotonic() + FUZZ_SECONDS
        while time.monotonic() < until:
            sql = fuzzer.statement()
            began = time.monotonic()
            status, text = ended(sent["command"], sql)
            seconds = time.monotonic() - began
            counts[status] = counts.get(status, 0) + 1
            assert status in ANSWERS, (seed, sql, status, text[:1000])
            if status != "OK":
                assert leaks(text, server) == [], (seed, sql, text[:1000])
            assert SECRET not in text, (seed, sql)
            assert seconds < ANSWER_SECONDS, (seed, sql, seconds)
        assert sent["command"]("SELECT 7 AS n") == [{"n": 7}], seed
    longest = neighbour.longest()
    neighbour.end()
    assert neighbour.wrong == [], seed
    assert longest < NEIGHBOUR_SECONDS, (seed, longest)
    assert counts["OK"] > 5, (seed, counts)
    assert sum(counts.values()) > 50, (seed, counts)
    assert files.made() == set(), seed
    assert server.process.poll() is None, seed
    assert server.memory_peak() < SERVER_BYTES, (seed, server.memory_peak())
    assert "Traceback" not in server.errors.read_text(), (seed, server.errors.read_text()[-3000:])
