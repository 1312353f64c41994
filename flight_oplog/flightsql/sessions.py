"""Sessions: their options travel with the client, sealed, in a cookie."""

from __future__ import annotations

import base64
import contextlib
import re
from collections.abc import Callable

from flight_oplog.errors import OplogError, RequestError
from flight_oplog.flightsql import wire
from flight_oplog.flightsql.caller import Caller
from flight_oplog.flightsql.handles import Sealer
from flight_oplog.sql.catalog import moment
from flight_oplog.sql.refusals import CATALOG, PUBLIC

AT_VERSION, AT_TIMESTAMP = "oplog-at-version", "oplog-at-timestamp"
SESSION_SECONDS = 30 * 24 * 3600
# CloseSessionResult.Status, SetSessionOptionsResult.ErrorValue
_CLOSED = 1
_INVALID_NAME, _INVALID_VALUE = 1, 2
_DB_SCHEMAS = ("public", "log", "records", "system", "information_schema")


class Sessions:
    """Reads, sets and ends the options of sessions. Keeps nothing."""

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer

    def options(self, caller: Caller) -> dict[str, str]:
        """Return the options of a caller's session. Raises RequestError when they cannot be read any more."""
        if caller.options is None:
            return {}
        try:
            body = self._sealer.open("session", base64.urlsafe_b64decode(caller.options), caller.name)
        except (ValueError, OplogError):
            raise RequestError("the session's options are not readable any more; connect again and set them again") from None
        options: dict[str, str] = body["options"]
        return options

    def set(self, message: wire.SetSessionOptionsRequest, caller: Caller) -> list[bytes]:
        if caller.keep is None:
            raise RequestError(
                "session options are kept in a cookie, and this client keeps none; set adbc.flight.sql.rpc.with_cookie_middleware to true"
            )
        options: dict[str, str] = {}
        with contextlib.suppress(RequestError):  # whoever sets them anew need not be able to read what was there
            options |= self.options(caller)
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
        self._keep(caller, options)
        return [wire.encode(wire.SetSessionOptionsResult(tuple(errors)))]

    def _keep(self, caller: Caller, options: dict[str, str]) -> None:
        assert caller.keep is not None
        caller.keep(base64.urlsafe_b64encode(self._sealer.seal("session", {"options": options}, caller.name, SESSION_SECONDS)).decode())

    def get(self, message: wire.GetSessionOptionsRequest, caller: Caller) -> list[bytes]:
        options = {"catalog": CATALOG, "schema": PUBLIC} | self.options(caller)
        found = tuple(wire.SessionOption(name, wire.SessionOptionValue(string_value=value)) for name, value in options.items())
        return [wire.encode(wire.GetSessionOptionsResult(found))]

    def close(self, message: wire.CloseSessionRequest, caller: Caller) -> list[bytes]:
        if caller.keep is not None and caller.options is not None:
            self._keep(caller, {})
        return [wire.encode(wire.CloseSessionResult(_CLOSED))]


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
