"""Who calls, whatever the call is."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, field

from flight_oplog.appends import Origin
from flight_oplog.grants import ANYBODY, Principal, check_may
from flight_oplog.sql.stream import Stopped


@dataclass(slots=True)
class Caller:
    """Who calls, and for whom: the names of their session, whether their ingests leave out which transaction they belong to,
    where what they append comes from, and as of when they ask, a table_version or a time. `again` gives the principal with
    the rights it has by then, and raises Unauthenticated when it would be admitted no more.

    `session` is the name that the client brought in a cookie, None when it brought none; `options` is the session's, sealed,
    in another cookie; `keep` gives it a new one, and is None for a client that keeps none.
    """

    principal: Principal = ANYBODY
    again: Callable[[], Principal] = lambda: ANYBODY
    sessions: tuple[str, ...] = ()
    leaves_out: bool = False
    origin: Origin = field(default_factory=Origin)
    stopped: Stopped = lambda: False
    at: int | datetime.datetime | None = None
    session: str | None = None
    options: str | None = None
    keep: Callable[[str], None] | None = None

    @property
    def name(self) -> str | None:
        return self.principal.name

    def check(self, permission: str, name: str) -> None:
        """Raise Forbidden unless the caller has a permission for a topic or view, in words that do not tell whether there is one."""
        check_may(self.principal, permission, name)

    def check_again(self, permission: str, name: str) -> None:
        """The same, by the rights they have by now: for a call that takes long."""
        check_may(self.again(), permission, name)
