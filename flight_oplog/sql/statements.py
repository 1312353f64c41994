"""Statements that change the log: INSERT, CREATE TABLE, CREATE VIEW and DROP, carried out once each time they are asked for.

An INSERT is an append like any other, with the same receipts, limits and rules. A table is a topic: CREATE TABLE declares
its columns with an append of no entries, and DROP TABLE ends it: its entries stay in the log's earlier snapshots. Views
are entries of the log's own topic `_views`, so they travel with the log, and an earlier snapshot shows the views it had.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable

import pyarrow as pa

from flight_oplog.appends import Origin, Role
from flight_oplog.config import Config
from flight_oplog.errors import NotFound, OutOfOrder, RequestError, TooLarge, TryAgain, Unsupported
from flight_oplog.grants import ANYBODY, Principal, check_may
from flight_oplog.oplog import AppendWriter, OpLog
from flight_oplog.schema import TOPIC_PATTERN, VIEWS_SCHEMA, VIEWS_TOPIC, check_topic
from flight_oplog.sql import lexer
from flight_oplog.sql.engine import Change, Engine
from flight_oplog.sql.stream import Stopped

VIEW_TRIES = 20

Hold = Callable[[AppendWriter], int]


class Statements:
    """Carries changes out on one log. Thread-safe."""

    def __init__(self, oplog: OpLog, engine: Engine, config: Config) -> None:
        self._oplog = oplog
        self._engine = engine
        self._config = config

    def execute(
        self,
        sql: str,
        stopped: Stopped = lambda: False,
        parameters: pa.RecordBatch | None = None,
        origin: Origin | None = None,
        hold: Hold | None = None,
        principal: Principal = ANYBODY,
    ) -> int:
        """Carry out a statement that is no query; return how many entries it appended.

        With `origin` an INSERT is written exactly once. With `hold` its append is handed over instead of committed: it
        belongs to a transaction.

        Raises what `Engine.change` and `OpLog.append` raise, Forbidden for what the principal may not do, NotFound for what
        is to be dropped and is not there; then nothing was written.
        """
        snapshot = self._oplog.snapshot().seen_by(principal)
        change = self._engine.change(sql, snapshot, stopped, parameters)
        check_may(principal, "append" if change.what == "INSERT" else "admin", change.name)
        if change.tolerant and change.what.startswith("DROP") and not TOPIC_PATTERN.fullmatch(change.name):
            return 0  # nothing can have such a name
        if change.what == "INSERT":
            return self._insert(change, origin or Origin(), hold)
        if hold is not None:
            raise Unsupported(f"{change.what} is not served within a transaction; nothing was written; send it outside")
        if change.what == "CREATE TABLE":
            return self._create_table(change)
        if change.what == "DROP TABLE":
            return self._drop_table(change)
        for _ in range(VIEW_TRIES):
            try:
                return self._define_view(change, principal)
            except OutOfOrder:  # somebody else defined or dropped one meanwhile
                continue
        raise TryAgain(f"view {change.name!r}: others define views at the same time; nothing was written; try again")

    def _insert(self, change: Change, origin: Origin, hold: Hold | None = None) -> int:
        assert change.schema is not None
        if change.name not in self._oplog.snapshot().topics:
            raise RequestError(f"{change.name!r} is no topic; entries are inserted into topics; nothing was written")
        return self._append(change, origin, hold)

    def _append(self, change: Change, origin: Origin, hold: Hold | None = None, role: Role = Role.APPENDS) -> int:
        assert change.schema is not None
        writer = self._oplog.writer(change.name, change.schema, origin, role, change.keys)
        try:
            for batch in change.batches or ():
                writer.write(batch)
            return writer.commit().entries or 0 if hold is None else hold(writer)
        finally:
            writer.abandon()

    def _create_table(self, change: Change) -> int:
        name = check_topic(change.name)
        snapshot = self._oplog.snapshot()
        if name in self._engine.views(snapshot) and name not in snapshot.topics:
            raise RequestError(f"{name!r} is a view; nothing was written; choose another name or drop it first")
        if name in snapshot.topics:
            if change.tolerant:
                return 0
            if not change.replaces:
                raise RequestError(f"table {name!r} exists already; nothing was written; INSERT into it, or say IF NOT EXISTS")
        if change.replaces:
            return self._append(change, Origin(), role=Role.REPLACES)
        try:
            return self._append(change, Origin(), role=Role.BEGINS)
        except OutOfOrder:
            if change.tolerant:
                return 0
            raise RequestError(f"table {name!r} was created by another meanwhile; nothing was written") from None

    def _drop_table(self, change: Change) -> int:
        snapshot = self._oplog.snapshot()
        if change.name in self._engine.views(snapshot) and change.name not in snapshot.topics:
            raise RequestError(f"{change.name!r} is a view; nothing was written; use DROP VIEW")
        try:
            self._oplog.drop(change.name)
        except NotFound:
            if not change.tolerant:
                raise
        return 0

    def _define_view(self, change: Change, principal: Principal) -> int:
        name = check_topic(change.name)
        snapshot = self._oplog.snapshot()
        views = self._engine.views(snapshot)
        exists = name in views and name not in snapshot.topics
        is_dropped = change.what == "DROP VIEW"
        if name in snapshot.topics:
            raise RequestError(f"{name!r} is a table; nothing was written; choose another name")
        if is_dropped and not exists:
            if change.tolerant:
                return 0
            raise NotFound(f"view {name!r} does not exist; nothing was written")
        if not is_dropped:
            if exists and not change.replaces:
                raise RequestError(f"view {name!r} exists already; nothing was written; say CREATE OR REPLACE VIEW")
            if not exists and len(views) >= self._config.views_max:
                raise TooLarge(f"view {name!r} would be one more than views_max ({self._config.views_max}); nothing was written")
        # Of the views that the principal sees: that one which is hidden is made of this one is nothing to be told. The limit of
        # how deep views may be made of one another ends a circle through it.
        seen = self._engine.views(snapshot.seen_by(principal))
        if not is_dropped and _is_made_of_itself(name, dict(seen) | {name: change.definition}):
            raise RequestError(f"view {name!r} would be made of itself; nothing was written")
        now = datetime.datetime.now(datetime.UTC)
        row = {"view": name, "definition": None if is_dropped else change.definition, "defined": now}
        known = snapshot.topics.get(VIEWS_TOPIC)
        self._oplog.append_own(VIEWS_TOPIC, pa.RecordBatch.from_pylist([row], VIEWS_SCHEMA), known.next_offset if known else 0)
        return 0


def _is_made_of_itself(name: str, definitions: dict[str, str]) -> bool:
    """Whether a view names itself, or a view that does; the first time a definition names it is where it is defined."""
    if lexer.names(definitions[name])[name] > 1:
        return True
    seen, left = {name}, [name]
    while left:
        parts = lexer.names(definitions[left.pop()]).keys() & definitions.keys() - seen
        seen |= parts
        left += parts
    return any(lexer.names(definitions[other])[name] for other in seen - {name})
