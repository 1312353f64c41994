"""Flight SQL transactions: appends held back, then committed together, across topics, in one commit.

Beginning one costs nothing here: its id carries its own number, and a transaction is kept only from its first append
on, until its end or its deadline. So clients that begin one with every connection, as DB-API drivers do, may stay idle
for as long as they like. Queries see what is committed, whether they are sent in a transaction or not (the isolation is
READ COMMITTED), and not what the transaction holds.

Whose append. Stock ADBC sends a transaction's id with its queries but not with its ingests. A client that is known to do
so is recognised by its session: a cookie, where the driver keeps them, or else its connection, which introduces itself
by asking whether there are transactions. A connection that never did is one made anew by a client whose transaction may
be open: its ingest is refused, rather than committed when nobody asked for it.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from flight_oplog.appends import Append, Receipt
from flight_oplog.config import Config
from flight_oplog.errors import Cancelled, OutcomeUnknown, RequestError, TooLarge, TryAgain
from flight_oplog.kept import remember
from flight_oplog.oplog import AppendWriter, OpLog

log = logging.getLogger("flight_oplog.transactions")

SESSIONS_KEPT = 100_000
# A connection of ADBC's driver that was quiet for longer is not its own any more: gRPC for Go closes it after 30 minutes.
IDLE_SECONDS = 35 * 60
ENDED_KEPT = 100_000
_COMMITTED, _COMMITTING, _UNKNOWN = "is committed", "is being committed", "may or may not have been committed"
_STRANGER = (
    "nothing was written: this connection has been made anew, and nobody can tell whether a transaction is open; connect again, "
    "or set adbc.flight.sql.rpc.with_cookie_middleware to true, which survives that"
)


@dataclass
class _Session:
    """What is known of a client: the transaction it has begun, None when it has none, and the cookie it was offered last."""

    transaction: str | None
    seen: float
    cookie: str | None


@dataclass
class _Open:
    """A transaction that holds appends."""

    principal: str | None
    deadline: float
    appends: list[Append] = field(default_factory=list)


@dataclass
class _Remembered:
    """What is kept of a principal's clients: their sessions, and how their transactions ended. Nobody else's can drive it out."""

    sessions: OrderedDict[str, _Session] = field(default_factory=OrderedDict)
    ended: OrderedDict[str, str] = field(default_factory=OrderedDict)
    forgotten: int = 0  # transactions up to this number may have ended and be remembered no more


class Transactions:
    """The transactions of one server. Thread-safe."""

    def __init__(self, oplog: OpLog, config: Config) -> None:
        self._oplog = oplog
        self._config = config
        self._changed = threading.Condition()
        self._key = secrets.token_bytes(32)
        self._open: dict[str, _Open] = {}
        self._remembered: defaultdict[str | None, _Remembered] = defaultdict(_Remembered)
        self._begun = 0
        self._closed = False
        self._committing: dict[str, Future[list[Receipt]]] = {}
        self._watching = False

    def begin(self, sessions: Sequence[str], principal: str | None = None) -> bytes:
        """Begin a principal's transaction and return its id; an append of one of these sessions may be found to be its own."""
        with self._changed:
            self._begun += 1
            name = self._name(self._begun, principal)
            self._register(sessions, name, principal)
        return name.encode()

    def introduce(self, sessions: Sequence[str], principal: str | None = None) -> None:
        """Take note of a new client: whoever had its connection's name before is gone."""
        with self._changed:
            self._register(sessions, None, principal)

    def _register(self, sessions: Sequence[str], transaction: str | None, principal: str | None) -> None:
        if not sessions:
            return
        kept = self._remembered[principal].sessions
        before = kept.get(sessions[-1])
        if before is not None and before.cookie is not None:
            kept.pop(before.cookie, None)  # offered, and not taken
        session = _Session(transaction, time.monotonic(), sessions[0] if len(sessions) > 1 else None)
        for name in sessions:
            remember(kept, name, session, SESSIONS_KEPT)

    def _session(self, sessions: Sequence[str], principal: str | None) -> _Session | None:
        kept = self._remembered[principal].sessions
        for name in sessions:
            found = kept.get(name)
            is_connection = ":" in name
            if found is not None and not (is_connection and time.monotonic() - found.seen > IDLE_SECONDS):
                kept.move_to_end(name)
                return found
        return None

    def saw(self, sessions: Sequence[str], principal: str | None = None) -> None:
        """Take note of a call of a client's, which keeps its connection alive."""
        with self._changed:
            if (found := self._session(sessions, principal)) is not None:
                found.seen = time.monotonic()

    def of(self, sessions: Sequence[str], principal: str | None = None) -> bytes | None:
        """Return the transaction that a client has begun and not ended, None when it has none.

        Raises TryAgain for one that was never seen: it may have begun its transaction over another connection.
        """
        with self._changed:
            found = self._session(sessions, principal)
            if found is None:
                raise TryAgain(_STRANGER)
            found.seen = time.monotonic()
            return None if found.transaction is None else found.transaction.encode()

    def check(self, transaction_id: bytes, principal: str | None = None) -> None:
        """Raise RequestError for a transaction that takes no more appends, TooLarge when there is no room for one."""
        with self._changed:
            self._checked(transaction_id, principal)

    def _checked(self, transaction_id: bytes, principal: str | None) -> str:
        name = self._known(transaction_id, principal)
        if self._closed:
            raise TryAgain("the server is shutting down; nothing was written; try again when it is back")
        if name in self._committing:
            raise RequestError(f"the transaction {_COMMITTING}; nothing was written; begin another")
        if (ended := self._remembered[principal].ended.get(name)) is not None:
            raise RequestError(f"the transaction {ended}; nothing was written; begin another")
        found = self._open.get(name)
        if found is None and len(self._open) >= self._config.transactions_max:
            raise TooLarge(f"transactions_max ({self._config.transactions_max}) transactions hold appends; nothing was written; try again")
        if found is not None and len(found.appends) >= self._config.transaction_appends_max:
            raise TooLarge(f"the transaction would hold more than transaction_appends_max ({self._config.transaction_appends_max}) appends")
        return name

    def hold(self, transaction_id: bytes, append: AppendWriter, principal: str | None = None) -> int:
        """Take over an append that got all its entries, until the transaction ends; return how many.

        Raises what went wrong with it, or with the transaction; abandon the append then.
        """
        entries = append.complete()
        append.check()
        with self._changed:
            name = self._checked(transaction_id, principal)
            if name not in self._open:
                self._open[name] = _Open(principal, time.monotonic() + self._config.transaction_seconds_max)
                if not self._watching:
                    threading.Thread(target=self._watch, name="transactions", daemon=True).start()
                    self._watching = True
            self._open[name].appends.append(append.hand_over())
        return entries

    def commit(self, transaction_id: bytes, sessions: Sequence[str] = (), principal: str | None = None) -> list[Receipt]:
        """Commit all that the transaction holds, or nothing; return the receipts in the order of its appends.

        Raises what one of its appends is refused for: then nothing of the transaction was written, and it has ended.
        """
        with self._changed:
            name = self._known(transaction_id, principal)
            self._leave(name, sessions, principal)
            under_way = self._committing.get(name)
            ended = self._remembered[principal].ended.get(name)
            if under_way is None:
                if ended == _COMMITTED:  # the client did not get the answer
                    return []
                if ended == _UNKNOWN:
                    raise OutcomeUnknown(f"the transaction {_UNKNOWN}; look whether its entries are there")
                if ended is not None:
                    raise RequestError(f"the transaction {ended}; nothing of it was written")
                found = self._open.pop(name, None)
                if found is None:
                    self._end(name, _COMMITTED, principal)
                    return []
                answer = self._committing[name] = Future()
        if under_way is not None:
            return under_way.result()
        assert found is not None
        try:
            receipts, outcome = self._oplog.commit_together(found.appends), _COMMITTED
            answer.set_result(receipts)
            return receipts
        except BaseException as error:
            outcome = _UNKNOWN if isinstance(error, OutcomeUnknown) else "was rolled back, because its commit failed"
            answer.set_exception(error)
            raise
        finally:
            with self._changed:
                self._end(name, outcome, principal)
                del self._committing[name]

    def rollback(self, transaction_id: bytes, sessions: Sequence[str] = (), principal: str | None = None) -> None:
        """Drop all that the transaction holds. One that this server does not know is no error: nothing of it is held.

        Raises RequestError when it is committed, or being committed.
        """
        with self._changed:
            try:
                name = self._known(transaction_id, principal)
            except RequestError:
                return
            self._leave(name, sessions, principal)
            found = self._open.pop(name, None)
            ended = _COMMITTING if name in self._committing else self._remembered[principal].ended.get(name)
            if ended == _UNKNOWN:
                raise OutcomeUnknown(f"the transaction {_UNKNOWN}; look whether its entries are there")
            if ended in (_COMMITTED, _COMMITTING):
                raise RequestError(f"the transaction {ended}; it cannot be rolled back")
            if ended is None:
                self._end(name, "was rolled back", principal)
        _drop(found)

    def topics(self, transaction_id: bytes, principal: str | None = None) -> set[str]:
        """Return the topics that a transaction holds appends to."""
        with self._changed:
            found = self._open.get(self._known(transaction_id, principal))
            return set() if found is None else {append.topic for append in found.appends}

    def _leave(self, name: str, sessions: Sequence[str], principal: str | None) -> None:
        for session in sessions:
            found = self._remembered[principal].sessions.get(session)
            if found is not None and found.transaction == name:
                found.transaction = None

    def close(self) -> None:
        """Roll back every transaction that is open."""
        with self._changed:
            self._closed = True
            found = list(self._open.items())
            self._open.clear()
            for name, each in found:
                self._end(name, "was rolled back when the server stopped", each.principal)
        for _, each in found:
            _drop(each)

    def _known(self, transaction_id: bytes, principal: str | None) -> str:
        found = re.fullmatch(rb"([0-9]{1,18})/[0-9a-f]{32}", transaction_id)
        number = int(found[1]) if found else 0
        name = self._name(number, principal)
        if not hmac.compare_digest(name.encode(), transaction_id):
            raise RequestError(
                "the transaction was not begun by you at this server, or the server was started again since; nothing of it was written; "
                "roll it back and begin another"
            )
        remembered = self._remembered[principal]
        if number <= remembered.forgotten and name not in self._open and name not in remembered.ended:
            raise RequestError("the transaction is too old to be known; roll it back and begin another")
        return name

    def _name(self, number: int, principal: str | None) -> str:
        """Return the id of a transaction; no other principal can make it out, and none of theirs is valid for this one."""
        return f"{number}/{hmac.digest(self._key, f'{number} {principal!r}'.encode(), hashlib.sha256)[:16].hex()}"

    def _end(self, name: str, outcome: str, principal: str | None) -> None:
        remembered = self._remembered[principal]
        remembered.ended[name] = outcome
        if not self._open:
            self._changed.notify_all()
        while len(remembered.ended) > ENDED_KEPT:
            forgotten, _ = remembered.ended.popitem(last=False)
            remembered.forgotten = max(remembered.forgotten, int(forgotten.partition("/")[0]))

    def _watch(self) -> None:
        """Roll back what is open past its deadline, as long as anything is."""
        while True:
            with self._changed:
                now = time.monotonic()
                late = [name for name, each in self._open.items() if each.deadline <= now]
                dropped = [self._open.pop(name) for name in late]
                too_long = f"was rolled back when it had been open for {self._config.transaction_seconds_max} seconds"
                for name, each in zip(late, dropped, strict=True):
                    self._end(name, too_long, each.principal)
                if not self._open:
                    self._watching = False
            for each in dropped:
                log.warning("a transaction of %d appends was rolled back at its deadline", len(each.appends))
                _drop(each)
            with self._changed:
                if not self._watching:
                    return
                self._changed.wait(max(0.0, min((each.deadline for each in self._open.values()), default=0.0) - time.monotonic()))


def _drop(transaction: _Open | None) -> None:
    for append in transaction.appends if transaction else ():
        append.refuse(Cancelled("the transaction was rolled back"))
