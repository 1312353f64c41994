"""The documents are true: sessions run as printed, tables match the code, nothing is promised that is not there."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import test_layout
from conftest import ServerProcess

import flight_oplog
from flight_oplog.config import SETTINGS
from flight_oplog.flightsql.service import ACTIONS, ROUTES
from flight_oplog.schema import APPENDS, RECORD_SCHEMA, SCHEMAS_SCHEMA, VIEWS_SCHEMA

ROOT = Path(__file__).parent.parent
README, ARCHITECTURE, FORMAT, CHANGELOG = (
    (ROOT / name).read_text() for name in ("README.md", "ARCHITECTURE.md", "FORMAT.md", "CHANGELOG.md")
)
DEFAULT = "grpc://127.0.0.1:8815"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_readme_session_runs_as_printed(tmp_path: Path, start: Callable[..., ServerProcess]) -> None:
    [session] = blocks("console")
    server = start(folder=tmp_path / "my-log")
    search = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    steps = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", session, re.MULTILINE)
    assert len(steps) == 6
    for command, expected in steps:
        if " serve " in command:
            assert expected.strip() == DEFAULT
            continue
        if shlex.split(command)[1] in ("ingest", "sql", "topics"):
            command = f"{command} --server {server.uri}"  # noqa: PLW2901
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=search, capture_output=True, text=True, timeout=60, check=False)
        assert (done.stdout, done.stderr, done.returncode) == (expected, "", 0), command


def test_the_readme_programs_run(tmp_path: Path, start: Callable[..., ServerProcess], monkeypatch: pytest.MonkeyPatch) -> None:
    server = start(folder=tmp_path / "my-log")
    monkeypatch.chdir(tmp_path)
    programs = blocks("python")
    assert len(programs) == 8
    for program in programs:
        exec(compile(program.replace(DEFAULT, server.uri), "README.md", "exec"), {})


def settings_table() -> str:
    lines = ["| setting | default | |", "|---|---|---|"]
    for field in SETTINGS:
        lines.append(f"| `{field.name}` | {'none' if field.default == '' else f'`{field.default}`'} | {field.metadata['help']} |")
    return "\n".join(lines)


def test_the_settings_table_is_the_codes() -> None:
    found = re.search(r"<!-- settings -->\n(.*?)\n?<!-- /settings -->", README, re.DOTALL)
    assert found is not None
    assert found[1] == settings_table(), f"replace it by:\n{settings_table()}"


def test_every_command_and_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", README)) <= targets
    done = subprocess.run([sys.executable, "-m", "flight_oplog", "--help"], capture_output=True, text=True, check=True)
    commands = re.findall(r"^    ([a-z]+) ", done.stdout, re.MULTILINE)
    assert commands == ["serve", "sql", "ingest", "tail", "topics", "verify", "user", "token", "config"]
    assert sorted(re.findall(r"^\| `flight-oplog ([a-z]+)", README, re.MULTILINE)) == sorted(commands)


def test_the_format_names_every_column() -> None:
    for name in [*RECORD_SCHEMA.names, *(f.name for f in APPENDS.value_type), *SCHEMAS_SCHEMA.names, *VIEWS_SCHEMA.names]:
        assert f"`{name}`" in FORMAT, name


def test_the_architecture_lists_the_modules_in_order() -> None:
    listed = re.findall(r"^\| `([a-z_./]+)\.py` \|", ARCHITECTURE, re.MULTILINE)
    assert [name.replace("/", ".") for name in listed] == test_layout.ORDER


def test_the_changelog_begins_with_this_version() -> None:
    assert re.findall(r"^## (\S+)", CHANGELOG, re.MULTILINE)[0] == flight_oplog.__version__


def test_the_public_names_are_these() -> None:
    assert sorted(flight_oplog.__all__) == ["Config", "OpLog", "Origin", "Problem", "Receipt", "Snapshot", "Topic"]


def test_the_lock_pins_by_hash_and_names_no_address() -> None:
    for name in ("requirements.txt", "peers.txt"):
        lock = (ROOT / ".ci" / name).read_text()
        assert "://" not in lock
        assert not re.search(r"^-", lock, re.MULTILINE)
        pins = re.findall(r"^\S.*", lock, re.MULTILINE)
        assert all("==" in pin and pin.endswith("\\") for pin in pins)
        assert lock.count("--hash=sha256:") >= len(pins)


def routes_table() -> str:
    """What README.md says of every command and action, made from the tables that the server goes by."""
    lines = ["| command or action | how |", "|---|---|"]
    for message, route in ROUTES.items():
        ways = [way for way, handler in (("GetFlightInfo", route.flight_info), ("DoGet", route.get), ("DoPut", route.put)) if handler]
        lines.append(f"| `{message.__name__}` | {', '.join(ways) if ways else f'UNIMPLEMENTED: {route.refused}'} |")
    for name, act in ACTIONS.items():
        lines.append(f"| `{name}` | {'DoAction' if act.refused is None else f'UNIMPLEMENTED: {act.refused}'} |")
    lines.append("| `PollFlightInfo` | UNIMPLEMENTED: pyarrow has no way to serve it |")
    return "\n".join(lines)


def test_the_table_of_commands_is_the_servers() -> None:
    assert routes_table() in README
