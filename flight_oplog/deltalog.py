"""Entries of the Delta log, read and written as files: one a table version, one JSON action a line.

delta-rs opens tables and makes checkpoints. What happens at every commit is here, because its commit takes 10 to 20 ms,
most of them to read again what this process knows, and grows with the number of files. Follows
https://github.com/delta-io/delta/blob/master/PROTOCOL.md.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import re
import time
import urllib.parse
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flight_oplog.datafile import StagedFile
from flight_oplog.errors import CorruptLog, OutcomeUnknown
from flight_oplog.files import reason
from flight_oplog.records import DataFile
from flight_oplog.storage import Storage, Unsure

log = logging.getLogger("flight_oplog.deltalog")

FOLDER = "_delta_log"
LAST_CHECKPOINT = f"{FOLDER}/_last_checkpoint"
_ENTRY_NAME = re.compile(r"\d{20}\.json")
_CHECKPOINT_NAME = re.compile(r"(\d{20})\.checkpoint\.parquet")


@dataclass(frozen=True)
class Changes:
    """What one table version changed: data files, and the latest number of each application id."""

    added: Sequence[DataFile] = ()
    removed: frozenset[str] = frozenset()
    numbers: Mapping[str, int] = field(default_factory=dict)
    upgrades: bool = False  # the table's protocol or properties: more than this module follows


def entry_path(table_version: int) -> str:
    return f"{FOLDER}/{table_version:020}.json"


# Reading


def is_there(storage: Storage) -> bool:
    """Whether a Delta log has begun."""
    return any(_ENTRY_NAME.fullmatch(name) or _CHECKPOINT_NAME.fullmatch(name) for name in storage.names(FOLDER))


def checkpoint_path(table_version: int) -> str:
    return f"{FOLDER}/{table_version:020}.checkpoint.parquet"


def checkpointed(storage: Storage) -> int:
    """Return the table version of the newest checkpoint, -1 when there is none."""
    try:
        version = json.loads(storage.read(LAST_CHECKPOINT).to_pybytes())["version"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return -1
    return version if type(version) is int else -1


def up_to(storage: Storage, table_version: int) -> list[str]:
    """Return what tells a table version: the files of the newest checkpoint and the entries after it; without one, all entries."""
    last = checkpointed(storage)
    checkpoint = [f"{FOLDER}/{name}" for name in storage.names(FOLDER) if name.startswith(f"{last:020}.checkpoint.")]
    if not checkpoint or last > table_version:
        last, checkpoint = -1, []
    return [*checkpoint, *map(entry_path, range(last + 1, table_version + 1))]


def read(storage: Storage, table_version: int) -> Changes | None:
    """Return what a table version changed, or None when there is no such entry. Raises CorruptLog for a damaged one."""
    try:
        content = storage.read(entry_path(table_version)).to_pybytes()
    except FileNotFoundError:
        return None
    return _entry(table_version, content)


def made(storage: Storage, table_version: int) -> float | None:
    """Return when a table version was made, in seconds since 1970, as its entry says; None when that is gone or does not."""
    try:
        actions = _actions(storage.read(entry_path(table_version)).to_pybytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CorruptLog(f"table_version {table_version}: its commit file is damaged; restore it") from error
    return next((action["commitInfo"]["timestamp"] / 1000 for action in actions if "timestamp" in action.get("commitInfo", {})), None)


def numbers(storage: Storage, table_version: int) -> dict[str, int]:
    """Return the latest number of every application id as of a table version: from a checkpoint, and the entries after it."""
    checkpoints = [int(found[1]) for name in storage.names(FOLDER) if (found := _CHECKPOINT_NAME.fullmatch(name))]
    start = max((version for version in checkpoints if version <= table_version), default=-1)
    latest: dict[str, int] = {}
    if start >= 0:
        content = storage.read(checkpoint_path(start))
        rows = pq.read_table(pa.BufferReader(content), columns=["txn"]).column("txn").to_pylist()
        latest = {row["appId"]: row["version"] for row in rows if row is not None and row["appId"] is not None}
    for version, content in _contents(storage, range(start + 1, table_version + 1)):
        if content is None:
            raise CorruptLog(f"table_version {version}: its commit file is missing; restore it")
        latest.update(_entry(version, content).numbers)
    return latest


def removed(storage: Storage) -> set[str]:
    """Return the data files that entries still kept take out of the table: older versions of it may be read yet."""
    found: set[str] = set()
    for version, content in _contents(storage, _versions(storage)):
        with contextlib.suppress(CorruptLog):
            found |= _entry(version, content).removed if content is not None else set()
    return found


def damaged(storage: Storage) -> list[int]:
    """Return the versions whose entry is not whole: delta-rs reads an emptied one as a commit of nothing."""
    found = []
    for version, content in _contents(storage, _versions(storage)):
        try:
            if content is not None:
                _actions(content)
        except ValueError:
            found.append(version)
    return found


def _versions(storage: Storage) -> list[int]:
    return sorted(int(name[:20]) for name in storage.names(FOLDER) if _ENTRY_NAME.fullmatch(name))


def _contents(storage: Storage, versions: Sequence[int]) -> Iterator[tuple[int, bytes | None]]:
    return zip(versions, storage.read_each(map(entry_path, versions)), strict=True)


def _entry(table_version: int, content: bytes) -> Changes:
    try:
        return _changes(_actions(content))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptLog(f"table_version {table_version}: its commit file is damaged; restore it") from error


def _actions(content: bytes) -> list[dict[str, Any]]:
    actions = [json.loads(line) for line in content.splitlines() if line]
    if not actions or not all(isinstance(action, dict) for action in actions):
        raise ValueError("not a commit")
    return actions


def _changes(actions: Sequence[dict[str, Any]]) -> Changes:
    added, removed, numbers, upgrades = [], set(), {}, False
    for action in actions:
        if "add" in action:
            added.append(_data_file(action["add"]))
        elif "remove" in action:
            removed.add(urllib.parse.unquote(action["remove"]["path"]))
        elif "txn" in action:
            numbers[str(action["txn"]["appId"])] = int(action["txn"]["version"])
        elif "protocol" in action or "metaData" in action:
            upgrades = True
    return Changes(added, frozenset(removed), numbers, upgrades)


def _data_file(add: Mapping[str, Any]) -> DataFile:
    stats = json.loads(add["stats"])
    low, high = stats["minValues"].get("min_time"), stats["maxValues"].get("max_time")
    nulls = stats.get("nullCount", {})
    if low is None or high is None or nulls.get("min_time") or nulls.get("max_time"):  # the bounds leave out what is unknown
        low = high = None
    return DataFile(
        path=urllib.parse.unquote(add["path"]),
        topic=str(add["partitionValues"]["topic"]),
        size=int(add["size"]),
        records=int(stats["numRecords"]),
        first_offset=int(stats["minValues"]["first_offset"]),
        last_record=int(stats["maxValues"]["first_offset"]),
        min_time=None if low is None else datetime.datetime.fromisoformat(low),
        max_time=None if high is None else end_of_millisecond(datetime.datetime.fromisoformat(high)),
    )


def end_of_millisecond(time: datetime.datetime) -> datetime.datetime:
    """Return the last microsecond of a time's millisecond: Delta writers may cut the statistics of times to that."""
    return time.replace(microsecond=time.microsecond // 1000 * 1000 + 999)


# Writing


def write(storage: Storage, table_version: int, staged: Iterable[StagedFile], numbers: Mapping[str, int]) -> None:
    """Write the entry of a table version, durably, unless somebody else has.

    Raises FileExistsError when another process took that version, OSError when nothing was written, OutcomeUnknown when
    it cannot be told.
    """
    now, mark = int(time.time() * 1000), str(uuid.uuid4())
    actions: list[dict[str, Any]] = [
        {"commitInfo": {"timestamp": now, "operation": "WRITE", "isBlindAppend": True, "engineInfo": "flight_oplog", "txnId": mark}}
    ]
    actions += [{"txn": {"appId": name, "version": number, "lastUpdated": now}} for name, number in numbers.items()]
    actions += [{"add": _add(file, now)} for file in staged]
    content = "".join(json.dumps(action, separators=(",", ":")) + "\n" for action in actions).encode()
    try:
        storage.create(entry_path(table_version), content, mark)
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, Unsure):
            raise
        log.error("the commit of table version %d: %s", table_version, error)
        raise OutcomeUnknown(
            f"the commit of table_version {table_version} may or may not be durable ({reason(error)}); "
            "look whether the entries are there before sending them again"
        ) from error


def _add(staged: StagedFile, now: int) -> dict[str, Any]:
    return {
        "path": staged.done.path,
        "partitionValues": {"topic": staged.topic},
        "size": staged.done.size,
        "modificationTime": now,
        "dataChange": True,
        "stats": staged.stats(),
    }
