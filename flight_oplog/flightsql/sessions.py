"""Sessions: their options travel with the client, sealed, in a cookie."""

from __future__ import annotations

import base64
import contextlib
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from flight_oplog.errors import OplogError, RequestError
from flight_oplog.flightsql import wire
from flight_oplog.flightsql.caller import Caller
from flight_oplog.flightsql.handles import Sealer
from flight_oplog.kept import remember
from flight_oplog.sql.catalog import moment
from flight_oplog.sql.refusals import CATALOG, PUBLIC

AT_VERSION, AT_TIMESTAMP = "oplog-at-version", "oplog-at-timestamp"
SESSION_SECONDS = 30 * 24 * 3600
GIVEN_KEPT = 1_000
# CloseSessionResult.Status, SetSessionOptionsResult.ErrorValue
_CLOSED = 1
_INVALID_NAME, _INVALID_VALUE = 1, 2
_NONE: dict[str, Any] = {"options": {}, "set": 0.0}
_DB_SCHEMAS = ("public", "log", "records", "system", "information_schema")


class Sessions:
    """Reads, sets and ends the options of sessions. Thread-safe.

    Keeps of a session what it was given last: the Flight client of Go, which ADBC is made on, now and then loses a cookie that
    came with an action (a race at the end of a stream, seen with arrow-go 18). It is given again with each call that does not
    bring it, and the call is answered as if it had.
    """

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer
        self._given: OrderedDict[tuple[str | None, str], tuple[str, dict[str, Any]]] = OrderedDict()

    def options(self, caller: Caller) -> dict[str, str]:
        """Return the options of a caller's session. Raises RequestError when they cannot be read any more."""
        return dict(self._newest(caller)["options"])

    def _newest(self, caller: Caller) -> dict[str, Any]:
        """Return the options that a session has, and when they were set: those that it brought, or the newer ones it was given."""
        whose = _session(caller)
        cookie, given = (None, _NONE) if whose is None else self._given.get(whose, (None, _NONE))
        if cookie is None or cookie == caller.options:
            return self._open(caller.options, caller)
        brought = _NONE
        with contextlib.suppress(RequestError):
            brought = self._open(caller.options, caller)
        if brought["set"] > given["set"]:  # another server of the log has set them
            return brought
        assert caller.keep is not None
        caller.keep(cookie)
        return given

    def _open(self, cookie: str | None, caller: Caller) -> dict[str, Any]:
        if cookie is None:
            return _NONE
        try:
            return _NONE | self._sealer.open("session", base64.urlsafe_b64decode(cookie), caller.name)
        except (ValueError, OplogError):
            raise RequestError("the session's options are not readable any more; connect again and set them again") from None

    def set(self, message: wire.SetSessionOptionsRequest, caller: Caller) -> list[bytes]:
        if caller.keep is None:
            raise RequestError(
                "session options are kept in a cookie, and this client keeps none; set adbc.flight.sql.rpc.with_cookie_middleware to true"
            )
        before = _NONE
        with contextlib.suppress(RequestError):  # whoever sets them anew need not be able to read what was there
            before = self._newest(caller)
        options = dict(before["options"])
        errors = []
        for option in message.session_options:
            value = option.value.string_value if option.value else None
            if option.value and value is None and option.value.int64_value is not None:
                value = str(option.value.int64_value)
            problem = _problem(option.key, value, is_unset=option.value is None or option.value == wire.SessionOptionValue())
            if problem:
                errors.append(wire.SessionOptionErrors(option.key, wire.SessionOptionError(problem)))
            elif value is None:
                options.pop(option.key, None)
            else:
                options[option.key] = value
        options.pop("catalog", None)  # there is one
        self._keep(caller, options, before["set"])
        return [wire.encode(wire.SetSessionOptionsResult(tuple(errors)))]

    def _keep(self, caller: Caller, options: dict[str, str], after: float) -> None:
        assert caller.keep is not None
        body = {"options": options, "set": max(time.time(), math.nextafter(after, math.inf))}  # the clock may have been set back
        cookie = base64.urlsafe_b64encode(self._sealer.seal("session", body, caller.name, SESSION_SECONDS)).decode()
        if (whose := _session(caller)) is not None:
            remember(self._given, whose, (cookie, body), GIVEN_KEPT)
        caller.keep(cookie)

    def get(self, message: wire.GetSessionOptionsRequest, caller: Caller) -> list[bytes]:
        options = {"catalog": CATALOG, "schema": PUBLIC} | self.options(caller)
        found = tuple(wire.SessionOption(name, wire.SessionOptionValue(string_value=value)) for name, value in options.items())
        return [wire.encode(wire.GetSessionOptionsResult(found))]

    def close(self, message: wire.CloseSessionRequest, caller: Caller) -> list[bytes]:
        if caller.keep is not None and (caller.options is not None or _session(caller) in self._given):
            after = 0.0
            with contextlib.suppress(RequestError):
                after = self._newest(caller)["set"]
            self._keep(caller, {}, after)
        return [wire.encode(wire.CloseSessionResult(_CLOSED))]


def _session(caller: Caller) -> tuple[str | None, str] | None:
    """Return the name of a caller's session, and whose it is; None for a client that brought none."""
    return None if caller.session is None else (caller.name, caller.session)


def _problem(name: str, value: str | None, is_unset: bool) -> int | None:
    """Return the protocol's number for what is wrong with a session option, None when nothing is."""
    checks: dict[str, Callable[[str], bool]] = {
        "catalog": lambda text: text == CATALOG,
        "schema": lambda text: text in _DB_SCHEMAS,
        AT_VERSION: lambda text: re.fullmatch(r"[0-9]{1,18}", text, re.ASCII) is not None,
        AT_TIMESTAMP: lambda text: moment(text) is not None,
    }
    allowed = checks.get(name)
    if allowed is None:
        return _INVALID_NAME
    try:
        return None if is_unset or (value is not None and allowed(value)) else _INVALID_VALUE
    except RequestError:
        return _INVALID_VALUE
