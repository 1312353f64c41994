"""The names SQL knows: one catalog, whose schemas are `public`, `log`, `records` and `system`, and topics as they once were."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
from datafusion import Expr, SessionContext, udtf
from datafusion import Table as DataTable
from datafusion.catalog import CatalogProvider, SchemaProvider

from flight_oplog.errors import NotFound, OplogError, RequestError
from flight_oplog.outer import RecordsTable
from flight_oplog.provider import EntriesTable
from flight_oplog.scans import RowsTable, ScanContext
from flight_oplog.sql.refusals import CATALOG, PUBLIC, no_table
from flight_oplog.store import Snapshot

SYSTEM = ("topics", "queries", "metrics", "settings")
# Those that only an operator sees: they tell of what others do, and how the server is kept.
OVERSEEN = ("metrics", "settings")
# What `system` shows, by table.
System = Mapping[str, Callable[[Snapshot], pa.RecordBatch]]


def tables(snapshot: Snapshot) -> Iterator[tuple[str, str, str]]:
    """Yield (SQL schema, table, type) of every table of the log, `information_schema` and views aside; the default schema first."""
    own = sorted(snapshot.topics)
    for db_schema, kind in (("public", "TABLE"), ("log", "TABLE"), ("records", "TABLE"), ("system", "SYSTEM TABLE")):
        names = SYSTEM if db_schema == "system" else own
        yield from ((db_schema, name, kind) for name in names if has(snapshot, db_schema, name))


def has(snapshot: Snapshot, db_schema: str, name: str) -> bool:
    """Whether there is such a table, for whoever looks at the snapshot."""
    if db_schema == "system":
        return name in SYSTEM and (name not in OVERSEEN or snapshot.viewer.rights.oversees)
    return name in snapshot.topics and not (db_schema == PUBLIC and name.startswith("_"))


def table_of(snapshot: Snapshot, db_schema: str, name: str, context: ScanContext, system: System) -> ds.Dataset:
    if db_schema == "system":
        return RowsTable(system[name](snapshot), context)
    topic = snapshot.topic(name)
    if db_schema == "records":
        return RecordsTable(snapshot, topic, context)
    return EntriesTable(snapshot, topic, context, with_log_columns=db_schema == "log")


class UnreadTable(EntriesTable):
    """A topic that may be appended to and not be read: to whoever would read it, it does not exist."""

    def __init__(self, snapshot: Snapshot, name: str, context: ScanContext) -> None:
        super().__init__(snapshot.whole, snapshot.writable[name], context, with_log_columns=False)
        self._unread = name

    def get_fragments(self, filter: Any = None) -> Any:
        error = no_table(f"{CATALOG}.{PUBLIC}.{self._unread}")
        self.context.failures.append(error)
        raise error


BOUND = "_bound"


class Catalog(CatalogProvider):
    """What one statement sees of a snapshot. One that inserts also names topics that may only be appended to."""

    def __init__(
        self, snapshot: Snapshot, context: ScanContext, system: System, bound: pa.RecordBatch | None = None, inserts: bool = False
    ) -> None:
        self.inserts = inserts
        self.hides = not snapshot.viewer.may("read", "*")
        self.views: dict[str, Any] = {}
        self.broken: dict[str, RequestError] = {}
        self._schemas: dict[str, Any] = {
            PUBLIC: _PublicSchema(snapshot, context, self),
            **{db_schema: _Schema(snapshot, db_schema, context, system) for db_schema in ("log", "records", "system")},
        }
        if bound is not None:
            self._schemas[BOUND] = _BoundSchema(RowsTable(bound, context))

    def schema_names(self) -> set[str]:
        return set(self._schemas)

    def schema(self, name: str) -> Any:
        return self._schemas.get(name)


class _Schema(SchemaProvider):
    """One SQL schema; its tables are made when a statement names them, and listed when it asks for them: there may be thousands."""

    owner_name = None  # information_schema reads it as an attribute too, and would show a method

    def __init__(self, snapshot: Snapshot, db_schema: str, context: ScanContext, system: System) -> None:
        self._snapshot = snapshot
        self._db_schema = db_schema
        self._context = context
        self._system = system

    @property
    def table_names(self) -> list[str]:  # type: ignore[override]
        # Declared a method upstream, yet information_schema reads it as an attribute that holds a sequence.
        return [name for db_schema, name, _ in tables(self._snapshot) if db_schema == self._db_schema]

    def table(self, name: str) -> Any:
        return table_of(self._snapshot, self._db_schema, name, self._context, self._system) if self._has(name) else None

    def table_exist(self, name: str) -> bool:
        return self._has(name)

    def _has(self, name: str) -> bool:
        return has(self._snapshot, self._db_schema, name)


class _PublicSchema(_Schema):
    """`public`: topics and views; a topic goes before a view of its name."""

    def __init__(self, snapshot: Snapshot, context: ScanContext, catalog: Catalog) -> None:
        super().__init__(snapshot, PUBLIC, context, {})
        self._catalog = catalog

    @property
    def table_names(self) -> list[str]:  # type: ignore[override]
        return [*super().table_names, *(name for name in self._catalog.views if not self._has(name))]

    def table(self, name: str) -> Any:
        found = super().table(name)
        if found is None and self._catalog.inserts and name in self._snapshot.writable:
            return UnreadTable(self._snapshot, name, self._context)
        if found is None and name in self._catalog.broken:
            self._context.failures.append(self._catalog.broken[name])
            raise self._catalog.broken[name]
        return self._catalog.views.get(name) if found is None else found

    def table_exist(self, name: str) -> bool:
        known = self._has(name) or name in self._catalog.views or name in self._catalog.broken
        return known or (self._catalog.inserts and name in self._snapshot.writable)


class _BoundSchema(SchemaProvider):
    """The rows bound to an INSERT's parameters, as a table."""

    table_names = ["values"]  # type: ignore[assignment]  # noqa: RUF012

    def __init__(self, rows: ds.Dataset) -> None:
        self._rows = rows

    def table(self, name: str) -> Any:
        return self._rows if name == "values" else None

    def table_exist(self, name: str) -> bool:
        return name == "values"


class Shelf(CatalogProvider):
    """A few tables, known by their name alone in whatever schema they are asked for."""

    def __init__(self) -> None:
        self.tables: dict[str, Any] = {}

    def schema_names(self) -> set[str]:
        return {PUBLIC}

    def schema(self, name: str) -> Any:
        return _ShelfSchema(self.tables)


class _ShelfSchema(SchemaProvider):
    table_names: list[str] = []  # type: ignore[assignment]  # noqa: RUF012

    def __init__(self, tables: dict[str, Any]) -> None:
        self._tables = tables

    def table(self, name: str) -> Any:
        return self._tables.get(name)

    def table_exist(self, name: str) -> bool:
        return name in self._tables


# Time travel

TIME_TRAVEL = re.compile(r"\bat_(?:version|time)\s*\(", re.IGNORECASE)


def register_time_travel(session: SessionContext, snapshot: Snapshot, context: ScanContext) -> None:
    """Let a statement name a topic as of another commit: at_version('events', 12), at_time('events', '2026-01-01T00:00:00Z')."""

    def table(find: Callable[[Any], Snapshot], wanted: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            try:
                values = [Expr(argument).python_value().as_py() for argument in arguments]
                if len(values) != 2 or not isinstance(values[0], str):
                    raise RequestError(f"time travel takes a topic's name in quotes and {wanted}")
                return DataTable(table_of(find(values[1]), PUBLIC, values[0], context, {}))
            except Exception as error:
                context.failures.append(error if isinstance(error, OplogError) else RequestError(f"time travel takes a topic and {wanted}"))
                raise

        return call

    def version(value: Any) -> Snapshot:
        if type(value) is not int or value < 0:
            raise RequestError("at_version takes a table_version, a number from 0 up")
        if value > snapshot.table_version:
            raise NotFound(f"table_version {value} is not committed yet")
        return snapshot.store.snapshot_at(value).seen_by(snapshot.viewer)

    def time_of(text: Any) -> Snapshot:
        found = snapshot.store.snapshot_as_of(moment(text))
        return found.seen_by(snapshot.viewer) if found.table_version <= snapshot.table_version else snapshot

    session.register_udtf(udtf(table(version, "a table_version"), "at_version"))
    session.register_udtf(udtf(table(time_of, "a time"), "at_time"))


def moment(text: Any) -> datetime.datetime:
    """Return a time written as ISO 8601; without a zone it is in UTC. Raises RequestError for what is none."""
    try:
        found = datetime.datetime.fromisoformat(text)
        return found.astimezone(datetime.UTC) if found.tzinfo else found.replace(tzinfo=datetime.UTC)
    except (TypeError, ValueError, OverflowError):
        raise RequestError(f"{str(text)[:80]!r} is not a time such as 2026-01-01T00:00:00Z") from None
