"""Views: kept in the log's own topic `_views`, planned before the statement that names them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from flight_oplog.config import Config
from flight_oplog.errors import NotFound, RequestError, TooLarge
from flight_oplog.grants import ANYBODY
from flight_oplog.provider import topic_batches
from flight_oplog.scans import ScanContext
from flight_oplog.schema import VIEWS_TOPIC
from flight_oplog.sql import lexer
from flight_oplog.sql.catalog import Catalog
from flight_oplog.sql.measure import UNIT_BYTES, Measure, measure, measure_with
from flight_oplog.sql.refusals import translated
from flight_oplog.store import Snapshot

VIEW_DEPTH_MAX = 16
# One value may take this part of a statement's memory, going by its text.
VALUE_SHARE = 16


class Views:
    """The views of one log. Thread-safe."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._defined: dict[tuple[int, int], dict[str, str]] = {}  # of the newest snapshot that was asked for

    def of(self, snapshot: Snapshot) -> dict[str, str]:
        """Return the views of a snapshot that whoever looks at it may read, by their names at least, and their definitions."""
        found, viewer = self._of(snapshot.whole), snapshot.viewer
        return found if viewer is ANYBODY else {name: text for name, text in found.items() if viewer.may("read", name)}

    def _of(self, snapshot: Snapshot) -> dict[str, str]:
        topic = snapshot.topics.get(VIEWS_TOPIC)
        if topic is None:
            return {}
        key = (snapshot.store.number, topic.next_offset)
        if key not in self._defined:
            found: dict[str, str] = {}
            for batch in topic_batches(snapshot, topic, 0, self._config.message_bytes_max):
                for row in batch.to_pylist():
                    found.pop(row["view"], None)
                    if row["definition"] is not None:
                        found[row["view"]] = row["definition"]
            self._defined.clear()
            self._defined[key] = found
        return self._defined[key]

    def plan(self, sql: str, defined: dict[str, str], catalog: Catalog, context: ScanContext, session: Any) -> Measure:
        """Plan the views that a statement may name, those first that others are made of; their names are looked up in `public`.

        Return what the statement measures with them.

        DataFusion cannot plan one while it plans the statement. One that cannot be planned fails the statement that reads it.
        Each is planned once and copied into whatever names it, so what it reads and its operators add up: they are limited.
        """
        weights: dict[str, Measure] = {}

        def weigh(text: str, above: tuple[str, ...]) -> Measure:
            """Plan the views that a text names, but for itself, and return what it measures with them."""
            found = measure(text)
            tables, operators = found.tables, found.operators
            views: dict[str, Measure] = {}
            for name, times in (lexer.names(text) - Counter(above[-1:])).items():
                if name in defined:
                    of_view = views[name] = plan(name, above)
                    tables, operators = tables + times * of_view.tables, operators + times * of_view.operators
            if views:  # and they may be within what is copied itself
                copied = measure_with(text, views)
                return Measure(found.first, max(operators, copied.operators), max(tables, copied.tables), copied.growth)
            return found

        def plan(name: str, above: tuple[str, ...]) -> Measure:
            if name in weights:
                return weights[name]
            nothing = Measure("", 0, 0)
            if name in above or len(above) >= VIEW_DEPTH_MAX:
                catalog.broken[name] = RequestError(f"view {name!r} is made of itself, or of views more than {VIEW_DEPTH_MAX} deep")
                return nothing
            weight = weigh(defined[name], (*above, name))
            weights[name] = weight
            try:
                self.check_weight(weight, f"view {name!r}")
                planned = session.sql(f"EXPLAIN {defined[name]}").logical_plan().inputs()[0].inputs()[0]
                catalog.views[name] = session.create_dataframe_from_logical_plan(planned).into_view()
            except Exception as error:
                why = translated(error, context)
                if not (isinstance(why, NotFound) and catalog.hides):  # else it is a view of something that does not exist for this viewer
                    catalog.broken[name] = RequestError(f"view {name!r}: {why}")
                context.failures.clear()
                weights[name] = nothing
            return weights[name]

        total = weigh(sql, ())
        self.check_weight(total, "the SQL text, with its views,")
        if "INFORMATION_SCHEMA" in lexer.keywords(sql) or total.first in ("SHOW", "DESCRIBE", "DESC"):
            for name in defined:
                plan(name, ())
        return total

    def check_weight(self, found: Measure, what: str) -> None:
        """Raise TooLarge for a text, or what it measures with its views, that would make too deep or too wide a plan."""
        if found.operators > self._config.sql_operators_max:
            raise TooLarge(f"{what} has {found.operators} operators; sql_operators_max is {self._config.sql_operators_max}")
        if found.tables > self._config.sql_tables_max:
            raise TooLarge(f"{what} reads {found.tables} tables; sql_tables_max is {self._config.sql_tables_max}")
        if found.growth * UNIT_BYTES > self._config.statement_bytes_max // VALUE_SHARE:
            raise TooLarge(
                f"{what} may make values {found.growth} times as large as what they are made of, by its functions; "
                f"with statement_bytes_max ({self._config.statement_bytes_max}) that is too much"
            )
