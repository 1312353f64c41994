"""Every language's client against a real server: one transcript that all reproduce, and a server that is killed under them.

Run by `make clients`. A client whose toolchain is missing is skipped with the sentence that its `run` says.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Mapping
from pathlib import Path

import adbc_driver_flightsql.dbapi as adbc
import pyarrow as pa
import pytest
from pyarrow import flight

HERE = Path(__file__).parent
LANGUAGES = sorted(path.parent.name for path in HERE.glob("*/run"))
MISSING = 77
BUILD_SECONDS = 1200
STORM = 4000
KILLED_AT = (200, 900, 1600, 2300)


class Server:
    """A server process on a port of its own, that can be killed and started again."""

    def __init__(self, folder: Path, *flags: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.uri = f"{'grpc+tls' if '--tls-cert' in flags else 'grpc'}://{self.address}"
        self._command = [sys.executable, "-m", "flight_oplog", "serve", "--data", str(folder), "--listen", self.uri, *flags]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == self.uri

    def entries(self, topic: str) -> int:
        """How many entries a topic has so far."""
        try:
            with flight.connect(self.uri) as asked:
                return int(asked.get_flight_info(flight.FlightDescriptor.for_path(topic)).total_records)
        except KeyError:
            return 0

    def stop(self, how: int = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path / "log")
    yield running
    running.stop()


def client(language: str, *arguments: str, seconds: float = BUILD_SECONDS, login: Mapping[str, str] | None = None) -> str:
    """Run a client and return what it printed; the first run of a compiled one builds it. `login` is for its environment."""
    command = [str(HERE / language / "run"), *arguments]
    environment = os.environ | {"PYTHON": sys.executable} | (login or {})
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, check=False)
    if done.returncode == MISSING:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_client_reproduces_the_transcript(server: Server, language: str) -> None:
    assert client(language, server.uri) == (HERE / "transcript.txt").read_text()


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_client_writes_each_append_once_however_often_the_server_dies(server: Server, language: str) -> None:
    client(language, server.uri)  # builds it
    environment = os.environ | {"PYTHON": sys.executable}
    command = [str(HERE / language / "run"), server.uri, "storm", str(STORM)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    killed = 0
    for mark in KILLED_AT:
        while running.poll() is None and server.entries("storm") < mark:
            time.sleep(0.01)
        if running.poll() is None:
            server.stop(signal.SIGKILL)
            time.sleep(0.3)
            server.start()
            killed += 1
    said, wrong = running.communicate(timeout=180)
    assert running.returncode == 0, wrong[-4000:]
    assert said == f"storm: {STORM} appends acknowledged\n"
    assert killed >= 2, "the storm was over before the server was killed: make it longer"
    with adbc.connect(server.uri, autocommit=True) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*), count(DISTINCT n), max(n) FROM storm")
        assert cursor.fetchall() == [(STORM, STORM, STORM - 1)]


@pytest.mark.skipif(not (HERE / "java" / "run").exists(), reason="there is no Java client")
def test_the_jdbc_driver_crawls_prepares_and_inserts_in_batches(server: Server) -> None:
    assert client("java", server.uri, "jdbc") == (HERE / "java" / "expected-jdbc.txt").read_text()


# Tools of Python people: the recipes of README.md here, as printed

TEXT = (HERE / "README.md").read_text()
RECIPES = dict(re.findall(r"^### (.*?)\n[^#]*?^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE))
DEFAULT = "127.0.0.1:8815"
DRIVER = ("adbc-driver-flightsql==1.13.0", "adbc-driver-manager==1.13.0", "pyarrow==26.0.1")
# What each needs, in an environment of its own: some want versions that others cannot have.
NEEDS: dict[str, tuple[str, ...]] = {
    "pandas": ("pandas==3.1.1", *DRIVER),
    "polars": ("polars==2.1.0", *DRIVER),
    "DuckDB": ("duckdb==2.0.0", *DRIVER),
    "SQLAlchemy 1.4 and Superset": ("flightsql-dbapi==0.2.2", "sqlalchemy==1.4.54", "pandas==3.1.1"),
    "SQLAlchemy 2": ("sqlalchemy-adbc==0.3.0", "sqlalchemy==2.1.9", "pandas==3.1.1", *DRIVER),
    "Ibis": ("ibis-framework[datafusion]==12.0.0", *DRIVER),
}


def environment_with(name: str) -> str:
    """Return the Python of an environment that has what a recipe needs."""
    folder = HERE / ".recipes" / re.sub(r"\W+", "-", name.lower())
    python, ready = str(folder / "bin" / "python"), folder / "ready"
    if not ready.exists() or ready.read_text() != str(NEEDS[name]):
        venv.create(folder, with_pip=True, clear=True)
        done = subprocess.run([python, "-m", "pip", "install", "--quiet", *NEEDS[name]], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        ready.write_text(str(NEEDS[name]))
    return python


@pytest.mark.parametrize("name", NEEDS)
def test_a_recipe_runs_as_printed(server: Server, name: str, tmp_path: Path) -> None:
    with adbc.connect(server.uri, autocommit=True) as connection, connection.cursor() as cursor:
        cursor.adbc_ingest("readings", pa.table({"sensor": ["a", "b"], "celsius": [20.5, 21.0]}), mode="create")
    python, recipe = environment_with(name), RECIPES[name]
    assert DEFAULT in recipe
    program = recipe.replace(DEFAULT, server.uri.removeprefix("grpc://"))
    done = subprocess.run([python, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_every_recipe_is_run() -> None:
    assert RECIPES.keys() == NEEDS.keys()
