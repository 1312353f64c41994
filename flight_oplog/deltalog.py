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
import os
import re
import time
import urllib.parse
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq

from flight_oplog.datafile import DataFile, StagedFile
from flight_oplog.errors import CorruptLog, OutcomeUnknown
from flight_oplog.files import fsync_folder, reason

log = logging.getLogger("flight_oplog.deltalog")

LEFT_BEHIND_SECONDS = 3600
_ENTRY_NAME = re.compile(r"\d{20}\.json")
_CHECKPOINT_NAME = re.compile(r"(\d{20})\.checkpoint\.parquet")
_STAGED_SUFFIX = ".tmp"


@dataclass(frozen=True)
class Changes:
    """What one table version changed: data files, and the latest number of each application id."""

    added: Sequence[DataFile] = ()
    removed: frozenset[str] = frozenset()
    numbers: Mapping[str, int] = field(default_factory=dict)
    upgrades: bool = False  # the table's protocol or properties: more than this module follows


def folder(root: str) -> str:
    return os.path.join(root, "_delta_log")


def entry_path(root: str, table_version: int) -> str:
    return os.path.join(folder(root), f"{table_version:020}.json")


# Reading


def read(root: str, table_version: int) -> Changes | None:
    """Return what a table version changed, or None when there is no such entry. Raises CorruptLog for a damaged one."""
    try:
        with open(entry_path(root, table_version), "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return None
    try:
        return _changes(_actions(content))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptLog(f"table_version {table_version}: its commit file is damaged; restore it") from error


def numbers(root: str, table_version: int) -> dict[str, int]:
    """Return the latest number of every application id as of a table version: from a checkpoint, and the entries after it."""
    checkpoints = [int(found[1]) for name in os.listdir(folder(root)) if (found := _CHECKPOINT_NAME.fullmatch(name))]
    start = max((version for version in checkpoints if version <= table_version), default=-1)
    latest: dict[str, int] = {}
    if start >= 0:
        rows = pq.read_table(os.path.join(folder(root), f"{start:020}.checkpoint.parquet"), columns=["txn"]).column("txn").to_pylist()
        latest = {row["appId"]: row["version"] for row in rows if row is not None and row["appId"] is not None}
    for version in range(start + 1, table_version + 1):
        changes = read(root, version)
        if changes is None:
            raise CorruptLog(f"table_version {version}: its commit file is missing; restore it")
        latest.update(changes.numbers)
    return latest


def removed(root: str) -> set[str]:
    """Return the data files that entries still kept take out of the table: older versions of it may be read yet."""
    found: set[str] = set()
    for name in os.listdir(folder(root)):
        if _ENTRY_NAME.fullmatch(name):
            with contextlib.suppress(CorruptLog):
                found |= (read(root, int(name[:20])) or Changes()).removed
    return found


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


def damaged(root: str) -> list[int]:
    """Return the versions whose entry is not whole: delta-rs reads an emptied one as a commit of nothing."""
    found = []
    for name in sorted(os.listdir(folder(root))):
        if _ENTRY_NAME.fullmatch(name):
            try:
                with open(os.path.join(folder(root), name), "rb") as file:
                    _actions(file.read())
            except ValueError:
                found.append(int(name[:20]))
    return found


# Writing


def write(root: str, table_version: int, staged: Iterable[StagedFile], numbers: Mapping[str, int]) -> None:
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
    path = entry_path(root, table_version)
    before = os.path.join(folder(root), f".{mark}{_STAGED_SUFFIX}")
    try:
        _write_durably(before, content)
        try:
            os.link(before, path)  # whole or not at all, and only one can
        except OSError as error:
            # A file system over a network may report an error of its own for a link that was made.
            if not _holds(path, mark, table_version, error):
                raise
    finally:
        with contextlib.suppress(OSError):
            os.unlink(before)
    try:
        fsync_folder(folder(root))
    except OSError as error:
        raise _unknown(table_version, error) from error


def _add(staged: StagedFile, now: int) -> dict[str, Any]:
    return {
        "path": staged.done.path,
        "partitionValues": {"topic": staged.topic},
        "size": staged.done.size,
        "modificationTime": now,
        "dataChange": True,
        "stats": staged.stats(),
    }


def _write_durably(path: str, content: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        done = 0
        while done < len(content):
            done += os.write(handle, content[done:])
        os.fsync(handle)
    finally:
        os.close(handle)


def _holds(path: str, mark: str, table_version: int, error: OSError) -> bool:
    """Whether the entry at `path` is the one with `mark`."""
    try:
        with open(path, encoding="utf-8") as file:
            return mark in file.read()
    except FileNotFoundError:
        return False
    except OSError:
        raise _unknown(table_version, error) from error


def _unknown(table_version: int, error: BaseException) -> OutcomeUnknown:
    log.error("the commit of table version %d: %s", table_version, error)
    return OutcomeUnknown(
        f"the commit of table_version {table_version} may or may not be durable ({reason(error)}); "
        "look whether the entries are there before sending them again"
    )


def sweep(root: str) -> None:
    """Remove what a crash left behind between writing an entry and giving it its name."""
    for name in os.listdir(folder(root)):
        path = os.path.join(folder(root), name)
        with contextlib.suppress(OSError):
            if name.startswith(".") and name.endswith(_STAGED_SUFFIX) and os.path.getmtime(path) < time.time() - LEFT_BEHIND_SECONDS:
                os.unlink(path)
