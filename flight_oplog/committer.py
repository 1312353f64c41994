"""The one thread that commits: takes every append that waits, numbers them, makes one Delta commit of them all.

While that commit is on its way the next group gathers: a quiet log answers at once, a busy one makes bigger commits.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
from concurrent.futures import Future

from flight_oplog.appends import Append, Receipt, check_data
from flight_oplog.config import Config
from flight_oplog.errors import NotFound, OplogError, OutcomeUnknown, OutOfOrder, RequestError, TryAgain
from flight_oplog.group import Group
from flight_oplog.producers import Producers
from flight_oplog.store import Conflict, Store

log = logging.getLogger("flight_oplog.committer")

CONFLICTS_MAX = 50
CLOSED = "the log is closed; nothing was written; try again when the server is back"


class Committer:
    """The one thread that commits. Strategy at the top of this module."""

    def __init__(self, store: Store, config: Config) -> None:
        self._store = store
        self._config = config
        self._producers = Producers(store)
        self._queue: queue.SimpleQueue[list[Append] | None] = queue.SimpleQueue()
        self._gate = threading.Lock()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
        self._thread.start()

    def submit(self, appends: list[Append]) -> list[Future[Receipt]]:
        """Take appends that are to be committed together, all or none; return their receipts to come."""
        for append in appends:
            append.receipt.set_running_or_notify_cancel()  # whoever waits may go away, the append may not
        with self._gate:
            if not self._stopped:
                self._queue.put(appends)
                return [append.receipt for append in appends]
        for append in appends:
            append.refuse(TryAgain(CLOSED))
        raise TryAgain(CLOSED)

    def stop(self) -> None:
        with self._gate:
            if not self._stopped:
                self._stopped = True
                self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        open_ = True
        while open_:
            waiting = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    waiting.append(self._queue.get_nowait())
            open_ = None not in waiting
            self._commit_waiting([bundle for bundle in waiting if bundle])
            del waiting  # an idle log holds on to nothing

    def _commit_waiting(self, waiting: list[list[Append]]) -> None:
        wrong = self._invalid([append for bundle in waiting for append in bundle if append.unchecked])
        for bundle in waiting if wrong else ():
            if (error := next((wrong[append] for append in bundle if append in wrong), None)) is not None:
                for append in bundle:
                    append.refuse(error)
        waiting = [bundle for bundle in waiting if not bundle[0].receipt.done()]
        for is_single, bundles in itertools.groupby(waiting, lambda bundle: len(bundle) == 1):
            if is_single:
                self._commit_group([append for bundle in bundles for append in bundle])
            else:
                for bundle in bundles:
                    self._commit_group(bundle, as_one=True)

    def _invalid(self, appends: list[Append]) -> dict[Append, Exception]:
        """Look at the data of many small appends at once; return those whose data is not valid, and why."""
        found: dict[Append, Exception] = {}
        for _, of_schema in itertools.groupby(sorted(appends, key=_schema_id), key=_schema_id):
            together = list(of_schema)
            try:
                check_data("", [batch for append in together for batch in append.batches])
            except Exception:
                for append in together:
                    try:
                        check_data(append.topic, append.batches)
                    except RequestError as error:
                        found[append] = error
                    except Exception:
                        log.exception("looking at an append to topic %r", append.topic)
                        found[append] = TryAgain("the append failed, see the server's log; nothing was written; try again")
        return found

    def _commit_group(self, appends: list[Append], as_one: bool = False) -> None:
        """Give every append of the group its receipt or its error; never raises."""
        try:
            for _ in range(CONFLICTS_MAX):
                try:
                    self._try_commit(appends, as_one)
                    return
                except Conflict:
                    self._store.refresh()
            raise TryAgain(f"other servers committed first {CONFLICTS_MAX} times; nothing was written; try again")
        except BaseException as error:
            if not isinstance(error, OplogError):
                log.exception("committing a group of %d appends", len(appends))
                error = TryAgain("the commit failed, see the server's log; nothing was written; try again")
            for append in appends:
                if not append.receipt.done():
                    if isinstance(error, OutcomeUnknown):
                        append.keep()
                    else:
                        append.drop()
                    append.receipt.set_exception(error)

    def _try_commit(self, appends: list[Append], as_one: bool) -> None:
        """Number the appends after the newest snapshot and commit them as its next version; none of them when one is refused `as_one`."""
        group = Group(self._store, self._config, self._producers)
        refused: list[tuple[Append, Exception]] = []
        try:
            for append in appends:
                try:
                    takes = group.check(append)
                except (RequestError, NotFound, TryAgain) as error:
                    # It may be refused for what came before it in this group: it is told when that is committed.
                    refused.append((append, error))
                    continue
                if takes:
                    group.place(append)
            staged = [] if refused and as_one else group.finish()
            version = group.base.table_version
            if staged or (group.numbers and not (refused and as_one)):
                version = self._store.commit(group.base, staged, group.numbers)
            elif refused and self._store.refresh() is not group.base:
                raise Conflict("another server has committed meanwhile")  # which may be just what was missing
            elif refused and as_one:
                raise refused[0][1]
        except BaseException as error:
            if isinstance(error, OutcomeUnknown):
                for append in group.duplicates:
                    append.drop()
            else:
                group.abandon()
            raise
        try:
            self._answer(group, version, refused)
        except Exception as error:  # everything is durable, and no file may go
            log.exception("answering appends of table version %d", version)
            raise OutcomeUnknown(f"the commit of table_version {version} was made; its receipts are lost") from error

    def _answer(self, group: Group, version: int, refused: list[tuple[Append, Exception]]) -> None:
        for append, first_offset in group.placed:
            append.keep()
            receipt = Receipt(append.topic, first_offset, append.entries, version, append.origin.sequence)
            if append.key is not None:
                self._producers.remember(append.key, receipt, append.origin.principal)
            append.receipt.set_result(receipt)
        for append in group.duplicates:
            append.drop()
            try:
                append.receipt.set_result(self._producers.original(append, group.base, version))
            except OutOfOrder as error:
                append.receipt.set_exception(error)
        for append, reason in refused:
            append.refuse(reason)


def _schema_id(append: Append) -> str:
    return append.schema_id
