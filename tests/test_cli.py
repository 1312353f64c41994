"""The command line as a person and a script meet it: output, exit codes, errors in one line."""

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from conftest import SEED, ServerProcess, put
from pyarrow import flight

from flight_oplog import OpLog
from flight_oplog.config import SETTINGS
from flight_oplog.listening import is_private

Start = Callable[..., ServerProcess]


def run(*arguments: str, said: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command, with something said to its standard input."""
    command = [sys.executable, "-m", "flight_oplog", *arguments]
    return subprocess.run(command, input=said, capture_output=True, text=True, timeout=60, check=False, env=os.environ | environment)


def fails(done: subprocess.CompletedProcess[str], expected: str) -> None:
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"flight-oplog: error: {expected}\n"


def write_files(folder: Path) -> dict[str, Path]:
    table = pa.table({"n": [1, 2, 3], "s": ["a", None, "c"]})
    files = {ending: folder / f"data.{ending}" for ending in ("parquet", "csv", "ndjson", "arrow", "arrows")}
    pq.write_table(table, files["parquet"])
    pa.csv.write_csv(table.slice(0, 1), files["csv"])
    files["ndjson"].write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    with pa.OSFile(str(files["arrow"]), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(files["arrows"]), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return files


def test_ingest_takes_every_kind_of_file_and_sql_shows_it(server: ServerProcess, tmp_path: Path) -> None:
    files = write_files(tmp_path)
    done = run("ingest", "t", *map(str, files.values()), "--server", server.uri)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.splitlines() == [
        f"{files['parquet']}: 3 entries in topic t, offsets [0, 3)",
        f"{files['csv']}: 1 entries in topic t, offsets [3, 4)",
        f"{files['ndjson']}: 3 entries in topic t, offsets [4, 7)",
        f"{files['arrow']}: 3 entries in topic t, offsets [7, 10)",
        f"{files['arrows']}: 3 entries in topic t, offsets [10, 13)",
    ]
    query = "SELECT n, count(*) AS c, count(s) AS s FROM t GROUP BY n ORDER BY n"
    done = run("sql", query, "--server", server.uri, "--format", "csv")
    assert done.stdout.splitlines() == ["n,c,s", "1,5,5", "2,4,0", "3,4,4"]
    done = run("sql", query, "--server", server.uri, "--format", "json")
    assert json.loads(done.stdout.splitlines()[0]) == {"n": 1, "c": 5, "s": 5}
    done = run("sql", query, "--server", server.uri)
    assert done.stdout.splitlines() == [
        "┏━━━┳━━━┳━━━┓",
        "┃ n ┃ c ┃ s ┃",
        "┡━━━╇━━━╇━━━┩",
        "│ 1 │ 5 │ 5 │",
        "│ 2 │ 4 │ 0 │",
        "│ 3 │ 4 │ 4 │",
        "└───┴───┴───┘",
        "3 rows",
    ]
    with_folder = run("sql", query, "--data", str(server.folder))
    assert with_folder.stdout == done.stdout
    arrow = subprocess.run(
        [sys.executable, "-m", "flight_oplog", "sql", query, "--server", server.uri, "--format", "arrow"], capture_output=True, check=True
    )
    assert pa.ipc.open_stream(arrow.stdout).read_all()["c"].to_pylist() == [5, 4, 4]


def test_topics_lists_them(server: ServerProcess, tmp_path: Path) -> None:
    run("ingest", "t", str(write_files(tmp_path)["csv"]), "--server", server.uri)
    done = run("topics", "--server", server.uri)
    assert done.returncode == 0
    assert "│ t " in done.stdout
    assert done.stdout.splitlines()[-1] == "2 rows"


def test_files_that_cannot_be_read_are_named(server: ServerProcess, tmp_path: Path) -> None:
    missing, text, broken, changes = (tmp_path / name for name in ("missing.csv", "x.txt", "broken.parquet", "changes.csv"))
    text.write_text("x")
    broken.write_text("not parquet")
    changes.write_text("a\n" + "1\n" * 600_000 + "x\n")
    fails(run("ingest", "t", str(missing), "--server", server.uri), f"{missing}: No such file or directory")
    endings = ".parquet, .csv, .ndjson, .jsonl, .json, .arrow, .arrows, .feather, .ipc"
    fails(run("ingest", "t", str(text), "--server", server.uri), f"{text}: the ending '.txt' is not one of {endings}")
    done = run("ingest", "t", str(broken), "--server", server.uri)
    assert done.stderr.startswith(f"flight-oplog: error: {broken}: Parquet magic bytes not found")
    done = run("ingest", "t", str(changes), "--server", server.uri)
    assert done.returncode == 1
    assert done.stderr.startswith(f"flight-oplog: error: {changes}: ")
    assert done.stderr.endswith("nothing of this file was written\n")
    assert done.stderr.count("\n") == 1
    assert run("topics", "--server", server.uri).stdout.splitlines()[-1] == "0 rows"


def test_errors_are_one_line_and_exit_1(server: ServerProcess, tmp_path: Path) -> None:
    fails(
        run("sql", "SELECT * FROM nope", "--server", server.uri),
        "table 'oplog.public.nope' does not exist; SELECT topic FROM system.topics lists them, quote names with capital letters",
    )
    gone = "grpc://127.0.0.1:1"
    fails(run("sql", "SELECT 1", "--server", gone), f"no server answers at {gone}; start one with: flight-oplog serve")
    parquet = write_files(tmp_path)["parquet"]
    fails(run("ingest", "t", str(parquet), "--server", gone), f"no server answers at {gone}; start one with: flight-oplog serve")
    fails(
        run("ingest", "_t", str(parquet), "--server", server.uri),
        "topic '_t' is reserved: names that begin with _ belong to the log itself",
    )
    fails(run("verify", "--data", str(tmp_path / "nowhere")), f"{tmp_path / 'nowhere'}: there is no log here")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("arguments", [(), ("nope",), ("sql",), ("serve", "--nope")])
def test_wrong_usage_exits_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).returncode == 2


def test_verify_says_what_it_read_and_what_is_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    with OpLog.open(str(folder)) as log:
        log.append("events", SEED)
    done = run("verify", "--data", str(folder))
    assert (done.returncode, done.stdout) == (0, "table_version 1: 2 topics, 2 records, 3 entries: all as acknowledged\n")
    [path] = (folder / "topic=events").glob("*.parquet")
    left = folder / "topic=events" / "left.parquet"
    left.write_bytes(path.read_bytes())
    orphan = "topic=events/left.parquet"
    whole = "table_version 1: 2 topics, 2 records, 3 entries: all as acknowledged\n"
    done = run("verify", "--data", str(folder), "--remove-orphans", "1000")
    assert done.stdout == f"note: {orphan}: no commit names this data file: left by a crash, or being written right now\n" + whole
    done = run("verify", "--data", str(folder), "--remove-orphans", "119")
    assert (done.returncode, "--remove-orphans: less than 120 seconds" in done.stderr) == (2, True)
    os.utime(left, (0, 0))
    done = run("verify", "--data", str(folder), "--remove-orphans", "120")
    assert (done.returncode, done.stdout) == (0, f"removed: {orphan}\n" + whole)
    path.unlink()
    done = run("verify", "--data", str(folder))
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        f"error: topic 'events': topic 'events': file {path.name} is missing; restore it",
        "table_version 1: 2 topics, 2 records, 3 entries: 1 errors",
    ]


def test_config_shows_every_setting_and_where_values_come_from_in_order(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('calls_max = 5\ndata = "from-file"\n')
    done = run("config", "--config", str(file), "--calls-max", "7", FLIGHT_OPLOG_DATA="from-environment", FLIGHT_OPLOG_TOPICS_MAX="9")
    assert done.returncode == 0
    shown = {parts[1].strip(): parts[2].strip() for line in done.stdout.splitlines() if len(parts := line.split("│")) > 3}
    assert set(shown) == {field.name for field in SETTINGS}
    assert (shown["calls_max"], shown["data"], shown["topics_max"], shown["record_entries_max"]) == (
        "7",
        "from-environment",
        "9",
        "1048576",
    )


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    fails(run("config", "--calls-max", "0"), "setting calls_max: 0 is less than 1")
    fails(run("config", "--calls-max", "x"), "setting calls_max: 'x' is not of type int")
    fails(run("config", "--compression", "gzip"), "setting compression: 'gzip' is not one of auto, none, lz4, zstd")
    fails(run("config", FLIGHT_OPLOG_INSECURE="maybe"), "setting insecure: 'maybe' is not of type bool")
    file = tmp_path / "settings.toml"
    for text, expected in (
        ("nope = 1", f"settings file {file}: there is no setting 'nope'"),
        ('calls_max = "5"', "setting calls_max: '5' is not of type int"),
    ):
        file.write_text(text)
        fails(run("config", "--config", str(file)), expected)
    fails(run("config", "--config", str(tmp_path / "gone")), f"settings file {tmp_path / 'gone'}: No such file or directory")


def test_output_may_be_cut_by_its_reader(server: ServerProcess) -> None:
    sql = "SELECT value FROM generate_series(1, 300000)"
    command = f"{sys.executable} -m flight_oplog sql '{sql}' --server {server.uri} --format csv | head -2"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.split(), done.stderr) == (["value", "1"], "")


def test_a_terminal_sees_a_progress_bar(server: ServerProcess, tmp_path: Path) -> None:
    file = tmp_path / "data.parquet"
    pq.write_table(pa.table({"n": list(range(1_000_000))}), file, row_group_size=10_000)
    outer, inner = pty.openpty()
    command = [sys.executable, "-m", "flight_oplog", "ingest", "t", str(file), "--server", server.uri]
    with subprocess.Popen(command, stdout=inner, stderr=inner, env=os.environ | {"TERM": "xterm", "COLUMNS": "100"}) as process:
        os.close(inner)
        seen = b""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                seen += os.read(outer, 10_000)
            except OSError:
                break
        assert process.wait(10) == 0
    os.close(outer)
    assert b"data.parquet" in seen
    assert b"entries" in seen
    assert "━".encode() in seen
    assert b"1,000,000 entries in topic t, offsets [0, 1000000)" in seen


def test_serve_prints_its_address_first_and_warns_when_insecure(start: Start) -> None:
    server = start("--insecure")
    assert server.uri.startswith("grpc://127.0.0.1:")
    server.stop()
    assert (
        "warning: --insecure: there is no authentication and no TLS: anybody who reaches this address may read and append"
        in server.errors.read_text()
    )


def test_columns_of_one_name_are_all_shown(tmp_path: Path) -> None:
    with OpLog.open(str(tmp_path / "log")) as log:
        log.append("t", pa.table({"a": [1]}))
    query = "SELECT x.a, y.a FROM t x, (SELECT a + 10 AS a FROM t) y"
    data = str(tmp_path / "log")
    assert run("sql", query, "--data", data, "--format", "csv").stdout.splitlines() == ["a,a", "1,11"]
    assert json.loads(run("sql", query, "--data", data, "--format", "json").stdout) == {"a": 1, "a:1": 11}


def test_a_query_that_fails_midway_is_one_line(server: ServerProcess) -> None:
    query = "SELECT 1 / (value - 50000) FROM generate_series(1, 100000)"
    done = run("sql", query, "--server", server.uri)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "Divide by zero" in done.stderr
    fails(run("config", FLIGHT_OPLOG_NOPE="1"), "environment variable FLIGHT_OPLOG_NOPE: there is no such setting")


def test_tail_prints_entries_and_goes_on_across_a_restart(start: Callable[..., ServerProcess]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"grpc://127.0.0.1:{free.getsockname()[1]}"
    server = start("--listen", address)
    with flight.connect(server.uri) as client:
        put(client, "events", SEED)
    done = run("tail", "events", "--server", address)
    assert [json.loads(line) for line in done.stdout.splitlines()] == SEED.to_pylist()
    done = run("tail", "events", "--server", address, "--from", "1", "--columns", "name,node_id", "--where", "name <> 'x'")
    assert [json.loads(line) for line in done.stdout.splitlines()] == SEED.to_pylist()[1:]
    done = run("tail", "nothing", "--server", address)
    assert (done.returncode, done.stderr) == (1, "flight-oplog: error: topic 'nothing' does not exist; append to it to create it\n")
    command = [sys.executable, "-m", "flight_oplog", "tail", "events", "--follow", "--from", "latest", "--server", address]
    tail = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert tail.stdout is not None
        time.sleep(1.5)
        with flight.connect(server.uri) as client:
            put(client, "events", SEED.slice(1))
        assert json.loads(tail.stdout.readline())["name"] == "world"
        server.stop(signal.SIGKILL)
        server = start("--listen", address, folder=server.folder)
        with flight.connect(server.uri) as client:
            put(client, "events", SEED)
        assert [json.loads(tail.stdout.readline())["name"] for _ in range(2)] == ["hello", "world"]
    finally:
        tail.send_signal(signal.SIGINT)
        _, errors = tail.communicate(timeout=20)
    assert "flight-oplog: " in errors
    assert "Traceback" not in errors


def test_users_and_tokens_are_kept_by_commands(tmp_path: Path) -> None:
    users = str(tmp_path / "users.json")
    done = run("user", "add", "ann", "--users", users, said="correct horse\n")
    assert (done.stdout, done.stderr, done.returncode) == ("user ann: added\n", "", 0)
    assert run("user", "add", "ann", "--users", users, said="another one\n").stdout == "user ann: has another password\n"
    done = run("user", "add", "bob", "--users", users, said="short\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "flight-oplog: error: the password has fewer than 8 characters; nothing was changed\n"
    assert [line.split("\t")[0] for line in run("user", "list", "--users", users).stdout.splitlines()] == ["ann"]
    token = run("token", "add", "svc", "--users", users).stdout.strip()
    name = token.split("_")[1]
    listed = run("token", "list", "--users", users).stdout
    assert listed.split("\t")[:2] == [name, "svc"]
    assert token.split("_", 2)[2] not in listed
    assert run("token", "add", "svc", "--days", "0", "--users", users).returncode == 0
    assert "good for ever" in run("token", "list", "--users", users).stdout
    assert run("token", "remove", name, "--users", users).stdout == f"token {name}: removed\n"
    assert run("user", "remove", "ann", "--users", users).stdout == "user ann: removed\n"
    assert run("user", "remove", "ann", "--users", users).stderr == f"flight-oplog: error: user 'ann' is not in {users}\n"
    assert run("user", "list").stderr == "flight-oplog: error: the setting users names no file: add --users FILE\n"


@pytest.mark.parametrize(
    ("uri", "private"),
    [
        ("grpc+tls://db.example:8815", True),
        ("grpc+unix:///run/oplog", True),
        ("grpc://127.0.0.1:8815", True),
        ("grpc://[::1]:8815", True),
        ("grpc://localhost:8815", True),
        ("grpc://db.example:8815", False),
        ("grpc+tcp://db.example:8815", False),
        ("grpc://localhost.example:8815", False),
        ("grpc://127.0.0.1.example", False),
        ("db.example:8815", False),
        ("", False),
    ],
)
def test_a_secret_is_sent_where_nobody_else_can_read_it(uri: str, private: bool) -> None:
    assert is_private(uri) == private


def test_a_token_is_not_sent_in_the_clear(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("oplog_secret")
    done = run("topics", "--server", "grpc://192.0.2.1:8815", "--token-file", str(tmp_path / "token"))
    fails(done, "server grpc://192.0.2.1:8815: a password or token is sent over grpc+tls:// only; nothing was sent")


def test_a_password_is_asked_for_unseen_on_a_terminal(tmp_path: Path) -> None:
    terminal, other = pty.openpty()
    command = [sys.executable, "-m", "flight_oplog", "user", "add", "ann", "--users", str(tmp_path / "users.json")]
    with subprocess.Popen(command, stdin=other, stdout=other, stderr=other, start_new_session=True, close_fds=True):
        os.close(other)
        seen = b""
        for question in (b"password for ann: ", b"once more: "):
            while question not in seen:
                seen += os.read(terminal, 1024)
            os.write(terminal, b"correct horse\n")
        with contextlib.suppress(OSError):
            while piece := os.read(terminal, 1024):
                seen += piece
        os.close(terminal)
    assert b"user ann: added" in seen
    assert b"correct" not in seen


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "good: 0 users, 0 API tokens, 0 JWT keys; grants for 0 roles and 0 principals"),
        (("--grants", "GRANTS"), "setting grants: nobody is asked who they are; set users, jwt_keys or client_ca too"),
        (("--users", "nowhere"), "users file nowhere: No such file or directory"),
        (("--tls-cert", "GRANTS", "--tls-key", "GRANTS"), "settings tls_cert GRANTS, tls_key GRANTS: "),
        (("--listen", "grpc://0.0.0.0:1"), "there is no authentication and no TLS; add --insecure"),
        (("--jwt-keys", "GRANTS", "--jwt-issuer", "i", "--jwt-audience", "a"), "jwt_keys GRANTS: not a JSON Web Key Set"),
        (("--jwt-keys", "https://127.0.0.1:1/keys", "--jwt-issuer", "i", "--jwt-audience", "a"), "jwt_keys https://127.0.0.1:1/keys: "),
    ],
)
def test_a_check_tries_the_settings_and_the_files_they_name(tmp_path: Path, flags: tuple[str, ...], said: str) -> None:
    grants = tmp_path / "grants.toml"
    grants.write_text("")
    flags = tuple(str(grants) if flag == "GRANTS" else flag for flag in flags)
    done = run("config", "--check", *flags)
    said = said.replace("GRANTS", str(grants))
    assert (
        (said in done.stdout, done.returncode) == (True, 0)
        if said.startswith("good")
        else (said in done.stderr, done.returncode) == (True, 1)
    )
    assert "Traceback" not in done.stderr
