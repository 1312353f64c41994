"""The cases in conformance/ (see its README), each over real ADBC and Flight against a server of its own."""

import datetime
import decimal
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import adbc_driver_flightsql.dbapi as adbc
import adbc_driver_manager
import pyarrow as pa
import pytest
from conftest import ServerProcess, ask, put
from pyarrow import flight

CASES = sorted(Path(__file__).parent.glob("conformance/*.case"))


@dataclass
class Step:
    verb: str
    text: str
    expected: list[Any] = field(default_factory=list)
    line: int = 0


def steps(path: Path) -> Iterator[Step]:
    current: Step | None = None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        verb, _, text = line.partition(" ")
        if line.startswith("#") or not line:
            continue
        if line.startswith("  ") and current:
            current.text += line
        elif verb == "=":
            assert current
            current.expected.append(json.loads(text))
        elif verb == "error" or (current and current.verb == "refused" and not current.expected):
            assert current
            current.expected.append(text if verb == "error" else line)
            current.verb = "error" if verb == "error" else current.verb
        elif verb == "append" and current and current.verb == "append" and current.text.split(" ")[0] == text.split(" ")[0]:
            current.text += "\n" + text
        else:
            if current:
                yield current
            current = Step(verb, text, line=number)
    if current:
        yield current


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, datetime.datetime | decimal.Decimal) else value


TYPES = {"timestamp[us, tz=UTC]": pa.timestamp("us", "UTC"), "decimal128(38, 10)": pa.decimal128(38, 10)}


def batch(rows: list[dict[str, Any]], types: dict[str, str] | None) -> pa.RecordBatch:
    if types is None:
        return pa.RecordBatch.from_pylist(rows)
    schema = pa.schema([(name, TYPES.get(kind) or pa.type_for_alias(kind)) for name, kind in types.items()])
    made = {
        f.name: [
            datetime.datetime.fromisoformat(row[f.name])
            if pa.types.is_timestamp(f.type)
            else decimal.Decimal(row[f.name])
            if pa.types.is_decimal(f.type)
            else row[f.name]
            for row in rows
        ]
        for f in schema
    }
    return pa.record_batch(made, schema)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(path: Path, start: Callable[..., ServerProcess]) -> None:
    server = start()
    types: dict[str, dict[str, str]] = {}
    with flight.connect(server.uri) as client, adbc.connect(server.uri, autocommit=True) as connection:
        for step in steps(path):
            where = f"{path.name}:{step.line}"
            if step.verb == "schema":
                topic, _, text = step.text.partition(" ")
                types[topic] = json.loads(text)
            elif step.verb in ("append", "refused"):
                topic = step.text.split(" ")[0]
                rows = [json.loads(line.split(" ", 1)[1]) for line in step.text.split("\n")]
                if step.verb == "append":
                    assert put(client, topic, batch(rows, types.get(topic)))["entries"] == len(rows), where
                else:
                    with pytest.raises(pa.ArrowInvalid) as caught:
                        put(client, topic, batch(rows, None))
                    assert step.expected[0] in str(caught.value), where
            elif step.verb == "query":
                assert plain(ask(connection, step.text)) == step.expected, where
            else:
                assert step.verb == "error", where
                status, _, text = step.expected[0].partition(" ")
                with pytest.raises(adbc_driver_manager.Error) as failed:
                    ask(connection, step.text)
                assert failed.value.status_code.name == status, where
                assert text in str(failed.value), where


def test_there_are_cases() -> None:
    assert len(CASES) >= 9
