"""Calls as pyarrow.flight hands them over: who makes them, how many there are, and in which words their errors leave.

The one place where errors become Flight statuses. pyarrow derives the status from the Python class of an exception and appends a
traceback to everything that is not a FlightError, so errors leave here as the classes below, and their formatting is kept to a bare name.
"""

from __future__ import annotations

import functools
import logging
import re
import secrets
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.flight as fl

from flight_oplog import logs
from flight_oplog.auth import OPEN, Admission, Gate, check_size
from flight_oplog.config import Config
from flight_oplog.errors import SHUTTING_DOWN, Cancelled, OplogError, TryAgain, Unauthenticated
from flight_oplog.flightsql.caller import Caller
from flight_oplog.grants import NOBODY, Principal
from flight_oplog.shares import Shares
from flight_oplog.threads import Visit

log = logging.getLogger("flight_oplog.server")

# gRPC carries a message several times over, percent-encoded, in trailers of at most 16 KiB.
MESSAGE_BYTES_MAX = 1200
HANDSHAKES_MAX = 16
STRANGERS_LINES = 20
LOOK_SECONDS = 1.0
REQUEST_HEADER = "x-request-id"
_REQUEST = re.compile(r"[A-Za-z0-9._-]{1,64}")
OPTIONS_COOKIE = "oplog-options"
SESSION_OPTIONS = re.compile(rf"(?:^|; *){OPTIONS_COOKIE}=([A-Za-z0-9_=-]{{1,4096}})(?:;|$)")
SESSION_COOKIE = re.compile(r"(?:^|; *)oplog-session=([0-9a-f]{32})(?:;|$)")
# ADBC's driver, in whatever language it is used. It never says that an ingest belongs to the transaction it has open.
LEAVES_OUT_TRANSACTION = "ADBC Flight SQL Driver"


# Errors


class _WireError(Exception):
    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


class _InvalidArgument(_WireError, ValueError):
    pass


class _NotFound(_WireError, KeyError):
    pass


class _Unimplemented(_WireError, NotImplementedError):
    pass


CLASSES: dict[str, type[Exception]] = {
    "INVALID_ARGUMENT": _InvalidArgument,
    "NOT_FOUND": _NotFound,
    "UNIMPLEMENTED": _Unimplemented,
    "UNAUTHENTICATED": fl.FlightUnauthenticatedError,
    "PERMISSION_DENIED": fl.FlightUnauthorizedError,
    "UNAVAILABLE": fl.FlightUnavailableError,
    "CANCELLED": fl.FlightCancelledError,
    "INTERNAL": fl.FlightInternalError,
}
# pyarrow turns a FlightError out of get_schema into UNKNOWN with a traceback: only these survive there.
FROM_GET_SCHEMA = dict.fromkeys(("UNAUTHENTICATED", "PERMISSION_DENIED", "UNAVAILABLE", "INTERNAL", "CANCELLED"), _InvalidArgument)

_format_exception = traceback.format_exception


def format_nothing_for_the_wire(*args: Any, **kwargs: Any) -> list[str]:
    """Stand in for traceback.format_exception, which pyarrow's C++ calls by name to build the text it sends."""
    try:
        sys._getframe(1)
    except ValueError:  # nobody in Python calls: it is pyarrow
        return [type(args[1] if len(args) > 1 else args[0]).__name__.lstrip("_")]
    return _format_exception(*args, **kwargs)


def to_wire(error: BaseException, classes: dict[str, type[Exception]] = CLASSES) -> Exception:
    """Return what to raise so that the client sees the right status, one clear sentence and nothing of the server."""
    if isinstance(error, OplogError):
        status, message = error.status, str(error)
    else:
        number = uuid.uuid4().hex[:8]
        log.error("internal error %s", number, exc_info=error)
        status, message = "INTERNAL", f"internal error {number}; the server's log says more"
    text = message.replace("\0", "\\0").encode("utf-8", "backslashreplace")
    if len(text) > MESSAGE_BYTES_MAX:
        text = text[:MESSAGE_BYTES_MAX] + b"..."
    return classes[status](text.decode("utf-8", "ignore"))


def rpc(method: Callable[..., Any], classes: dict[str, type[Exception]] = CLASSES) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(server: Any, context: Any, *args: Any) -> Any:
        under_way: Call = context.get_middleware("call")
        with logs.during(under_way.words):
            try:
                under_way.identify(context)
                return method(server, context, *args)
            except BaseException as error:  # a panic in Rust is no Exception, and would leak its traceback and the call's slot
                under_way.failed = error
                raise to_wire(error, classes) from None

    return call


def streamed(items: Iterator[Any], stopping: threading.Event, call: Call) -> Iterator[Any]:
    """Translate errors that come up while a stream is under way, and end it when its caller would be admitted no more."""
    looked = time.monotonic()
    try:
        for item in items:
            if time.monotonic() - looked > LOOK_SECONDS:
                call.again()
                looked = time.monotonic()
            yield item
    except GeneratorExit:
        raise
    except BaseException as error:
        if isinstance(error, Cancelled) and stopping.is_set():
            error = TryAgain(SHUTTING_DOWN)
        call.failed = error
        with logs.during(call.words):
            raise to_wire(error) from None


# Calls


class Calls(fl.ServerMiddlewareFactory):
    """Finds out who calls, counts calls under way, refuses one too many, and keeps each call's headers for its handler."""

    def __init__(self, gate: Gate, config: Config) -> None:
        self.gate = gate
        self.logged = config.log_calls
        self._calls_max = config.calls_max
        self._lock = threading.Lock()
        self._under_way = Shares(config.calls_max)
        # Handshakes that have said nothing yet: whoever says nothing at all holds up nobody but others of their kind.
        self._silent = threading.BoundedSemaphore(HANDSHAKES_MAX)
        self.shaking: dict[int, Call] = {}  # by the thread that is about to make it
        self._lines = 0  # about strangers, within this second
        self._second = 0

    def start_call(self, info: Any, headers: dict[str, list[str]]) -> Call:
        first = {name.lower(): values[0] for name, values in headers.items()}
        call = Call(self, info.method, first)
        with logs.during(call.words):
            try:
                if self.gate.takes_bearers:
                    self._admit(call, info.method, headers)
                self._begin(call)
            except BaseException as error:
                call.failed = error
                call.end()
                # Its client gets no headers of ours, so the words have to name the request.
                named = Unauthenticated(f"{error}; request {call.words.request}") if isinstance(error, Unauthenticated) else error
                raise to_wire(named) from None
        call.visit = Visit()
        return call

    def _admit(self, call: Call, method: Any, headers: dict[str, list[str]]) -> None:
        found = [*headers.get("authorization", ()), *(f"Bearer {_text(token)}" for token in headers.get("auth-token-bin", ()) if token)]
        if len(found) > 1:
            raise Unauthenticated("the call has more than one credential: send one")
        is_handshake = method == fl.FlightMethod.HANDSHAKE
        if is_handshake:
            self.shaking[threading.get_ident()] = call
            if not found:
                call.is_silent = True
                return  # what it says comes later: see Handshakes
        call.admitted(self.gate.admit(_text(found[0]) if found else None))
        if is_handshake:
            call.bearer = self.gate.bearer(call.admission)

    def _begin(self, call: Call) -> None:
        """Count a call in. Raises TryAgain for one too many."""
        if call.is_silent:
            if not self._silent.acquire(blocking=False):
                raise TryAgain(f"{HANDSHAKES_MAX} handshakes have said nothing yet; try again")
            return
        call.counted = call.principal.name
        with self._lock:
            if not self._under_way.is_free(call.counted):
                raise TryAgain(f"the server is busy: calls_max ({self._calls_max}) calls are under way; try again")
            self._under_way.take(call.counted)

    def end(self, call: Call) -> None:
        """Count a call out."""
        if call.is_silent:
            self._silent.release()
            return
        with self._lock:
            self._under_way.give(call.counted)

    def may_log(self, call: Call) -> bool:
        """Whether there is to be a line about a call; strangers, of whom anybody can be any number, get a few a second."""
        if self.logged == "none" or (self.logged == "failed" and call.failed is None):
            return False
        if call.principal.name is not None or self.gate.is_open:
            return True
        with self._lock:
            now = int(time.monotonic())
            if now != self._second:
                if self._lines > STRANGERS_LINES:
                    log.warning("%d more calls of strangers were refused", self._lines - STRANGERS_LINES)
                self._second, self._lines = now, 0
            self._lines += 1
            return self._lines <= STRANGERS_LINES


def _text(header: str | bytes) -> str:
    return header.decode("utf-8", "replace") if isinstance(header, bytes) else header


class Handshakes(fl.ServerAuthHandler):
    """Lets clients log in by a handshake: with a header, which is seen to before, or by what the handshake says."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._calls = calls

    def authenticate(self, outgoing: Any, incoming: Any) -> None:
        try:
            said = incoming.read()
        except OSError:  # it says nothing
            said = b""
        call = self._calls.shaking.pop(threading.get_ident())
        if not call.is_silent:
            return
        with logs.during(call.words):
            try:
                outgoing.write(self._bearer_for(said).encode())
            except BaseException as error:
                call.failed = error
                raise to_wire(error) from None

    def _bearer_for(self, said: bytes) -> str:
        gate = self._calls.gate
        try:
            check_size(said)
            given = fl.BasicAuth.deserialize(said)
            name, password = given.username.decode(), given.password.decode()
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            raise Unauthenticated("a handshake has a user's name and password, or an authorization header") from None
        bearer = gate.bearer(gate.log_in(name, password))
        assert bearer is not None
        return bearer

    def is_valid(self, token: bytes) -> bytes:
        """What is sent with each call, the middleware has seen already."""
        return b""


_UNKNOWN = Admission(NOBODY)
# A client's first call is one of these: it is offered a session.
_OFFERED_WITH = frozenset((fl.FlightMethod.DO_ACTION, fl.FlightMethod.GET_FLIGHT_INFO))


class Call(fl.ServerMiddleware):
    """One call: who makes it, its headers, and the session it belongs to where its client keeps cookies."""

    def __init__(self, calls: Calls, method: Any, headers: dict[str, str]) -> None:
        self.headers = headers
        self.admission = OPEN if calls.gate.is_open else _UNKNOWN
        self.failed: BaseException | None = None
        self.bearer: str | None = None  # that the answer tells the client to use from then on
        self.is_silent = False
        self.visit: Visit | None = None  # its thread's, which comes in and goes out several times
        self.counted: str | None = None  # the principal whose calls it is counted among; a certificate's is known too late
        self._calls = calls
        self._began = time.monotonic()
        self._leaves_out = headers.get("user-agent", "").startswith(LEAVES_OUT_TRANSACTION)
        asked, chance = headers.get(REQUEST_HEADER), secrets.token_hex(24)  # asking the system for some takes longer than a few more
        self.words = logs.Call(asked if asked and _REQUEST.fullmatch(asked) else chance[:16], method.name)
        cookies = headers.get("cookie")
        cookie = SESSION_COOKIE.search(cookies) if cookies else None
        self._session = cookie[1] if cookie else None
        options = SESSION_OPTIONS.search(cookies) if cookies else None
        self._options = options[1] if options else None
        is_offered = cookie is None and self._leaves_out and method in _OFFERED_WITH
        self._offered = chance[16:] if is_offered else None

    @property
    def principal(self) -> Principal:
        return self.admission.principal

    def admitted(self, admission: Admission) -> None:
        """Take note of who calls."""
        self.admission, self.words.principal = admission, admission.principal.name

    def again(self) -> Principal:
        """Return who calls with the rights they have by now. Raises Unauthenticated when they would be admitted no more."""
        return self._calls.gate.again(self.admission)

    def identify(self, context: Any) -> None:
        """Take note of who calls by a certificate, which only a handler gets to see."""
        if self._calls.gate.takes_certificates:
            self.admitted(self._calls.gate.certified(context.peer_identity().decode("utf-8", "replace")))

    def sending_headers(self) -> dict[str, str]:
        headers = {REQUEST_HEADER: self.words.request}
        if self._offered:
            headers["set-cookie"] = f"oplog-session={self._offered}"
        if self.bearer:
            headers["authorization"] = f"Bearer {self.bearer}"
        return headers

    @property
    def keeps_no_cookies(self) -> bool:
        """Whether the client is one that was offered a cookie before this call and did not bring it."""
        return self._session is None and self._leaves_out

    def caller(self, peer: str, **of_call: Any) -> Caller:
        """Return who calls, with what the server knows of the call beside."""
        names = (self._session,) if self._session is not None else (peer,) if self._offered is None else (self._offered, peer)
        return Caller(self.principal, self.again, names, self._leaves_out, session=self._session, options=self._options, **of_call)

    def call_completed(self, exception: Any) -> None:
        if self.visit is not None:
            self.visit.end()
        self._calls.end(self)
        self.end()

    def end(self) -> None:
        """Log the call, where such calls are logged."""
        if not self._calls.may_log(self):
            return
        seconds = time.monotonic() - self._began
        status = "OK" if self.failed is None else self.failed.status if isinstance(self.failed, OplogError) else "INTERNAL"
        why = f": {self.failed}" if isinstance(self.failed, OplogError) else ""
        with logs.during(self.words):
            log.info("%s after %.4f s%s", status, seconds, why, extra={"fields": {"status": status, "seconds": round(seconds, 6)}})
