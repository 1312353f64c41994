"""From credentials to a principal. No gRPC: `calls.py` hands over what a call came with.

What is taken: a user's name and password (HTTP Basic), or a bearer, which is an API token, a JWT, or what a login with a
password returned; or the certificate of a TLS connection. Which of them, the settings say: with none of them, nobody is
asked who they are. What was proven is remembered until it expires or what proved it changes, because a query is three or
four calls, and a password takes 50 ms to check.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import logging
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from flight_oplog.accounts import PASSWORD_BYTES_MAX, TOKEN_PATTERN, Accounts
from flight_oplog.bearers import BEARER_EXPIRED, INVALID, LOGIN_EXPIRED, TOKEN_EXPIRED, Claimed, Issued, Logins
from flight_oplog.config import Config, read_bytes
from flight_oplog.errors import OplogError, RequestError, TryAgain, Unauthenticated
from flight_oplog.grants import ANYBODY, NAME_CHARACTERS_MAX, Grants, Principal, is_name
from flight_oplog.kept import remember

log = logging.getLogger("flight_oplog.auth")

CREDENTIAL_BYTES_MAX = 8192
SECRET_BYTES_LEAST = 32
PROVEN_KEPT = 10_000
LOOK_SECONDS = 0.5
# Each check of a password takes 64 MiB.
PASSWORDS_AT_ONCE, PASSWORDS_WAITING_MAX = 2, 16
# Wrong passwords for a name that cost nothing; after each further one its next has to wait, twice as long each time.
FREE_FAILURES = 3
PAUSE_SECONDS, PAUSE_SECONDS_MAX = 0.5, 8.0
FAILURES_SECONDS = 900.0
FAILURES_KEPT = 10_000

_NEEDED = "this server asks who is calling: send a user's name and password, or a bearer token"


@dataclass(frozen=True)
class Admission:
    """Who calls, and what they have shown for it; None where nothing had to be, or it is their connection's certificate.

    `shown` is the bearer or the API token that they sent, in whatever place.
    """

    principal: Principal
    claimed: Claimed | None = None
    shown: str | None = field(default=None, repr=False)


# How everybody is admitted where nobody is asked who they are.
OPEN = Admission(ANYBODY)


class Gate:
    """Tells who calls and what they may do. Thread-safe."""

    def __init__(self, config: Config, secret: bytes) -> None:
        """`secret` is the log's own. Raises RequestError for settings that do not go together, or files that cannot be used."""
        if config.client_ca and (config.users or config.jwt_keys):
            raise RequestError(
                "settings client_ca and users or jwt_keys exclude each other: on one port a client is its certificate, or what it sends"
            )
        self.takes_certificates = bool(config.client_ca)
        self.takes_bearers = bool(config.users or config.jwt_keys)
        self.is_open = not self.takes_certificates and not self.takes_bearers
        if config.grants and self.is_open:
            raise RequestError("setting grants: nobody is asked who they are; set users, jwt_keys or client_ca too")
        self.secret = _secret_in(config.secret) if config.secret else secret
        self.grants = Grants(config.grants or None)
        self._config = config
        self._lock = threading.Lock()
        self._accounts = Accounts.load(config.users) if config.users else Accounts()
        self._accounts_seen = _seen(config.users)
        self._looked = time.monotonic()
        self._logins = Logins(derived(self.secret, "logins"), config.login_seconds_max)
        self._issued = Issued(config) if config.jwt_keys else None
        self._proven: OrderedDict[bytes, Claimed] = OrderedDict()
        self._proving: dict[bytes, Future[Claimed]] = {}
        self._proof_key = secrets.token_bytes(32)
        self._passwords = _Passwords()

    def check(self) -> None:
        """Try what was not tried yet of what the settings name. Raises RequestError when something fails."""
        if self._issued is not None:
            self._issued.fetch()

    def __str__(self) -> str:
        """What there is, in a sentence."""
        keys = len(self._issued.keys) if self._issued else 0
        roles, named = len(self.grants.roles), len(list(self.grants.principals))
        return (
            f"{len(self._accounts.users)} users, {len(self._accounts.tokens)} API tokens, {keys} JWT keys; "
            f"grants for {roles} roles and {named} principals"
        )

    def reload(self) -> None:
        """Read the grants and the users again; what cannot be used stays as it was, and the log says so."""
        for read in (self._read_grants, self._read_users):
            try:
                read()
            except OplogError as error:
                log.error("what was there stays: %s", error)
        log.info("grants and users were read again: %s", self)

    def certified(self, name: str) -> Admission:
        """Admit whom a connection's certificate names."""
        if not is_name(name):
            raise Unauthenticated("the certificate names nobody")
        return Admission(self.grants.principal(name))

    def admit(self, authorization: str | None) -> Admission:
        """Admit who sends an `authorization` header.

        Raises Unauthenticated, in words that do not tell an unknown user from a wrong password, and TryAgain when it cannot
        be told now.
        """
        if not self.takes_bearers:
            return OPEN
        if not authorization:
            raise Unauthenticated(_NEEDED)
        check_size(authorization)
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() == "basic":
            return self.log_in(*_basic_parts(given))
        if scheme.lower() == "bearer":
            return self._bearing(given.strip())
        raise Unauthenticated(_NEEDED)

    def log_in(self, name: str, password: str) -> Admission:
        """Admit whom a name and a password stand for. An API token may stand for a password, whatever the name is."""
        if TOKEN_PATTERN.fullmatch(password):
            return self._bearing(password)
        if not self._config.users or len(name) > NAME_CHARACTERS_MAX or len(password.encode("utf-8", "replace")) > PASSWORD_BYTES_MAX:
            raise Unauthenticated(INVALID)
        return self._admitted(self._proven_by((name, password), lambda: self._passworded(name, password)))

    def _bearing(self, bearer: str) -> Admission:
        return self._admitted(self._proven_by(("bearer", bearer), lambda: self._borne(bearer)), bearer)

    def _admitted(self, claimed: Claimed, shown: str | None = None) -> Admission:
        return Admission(self.grants.principal(claimed.name, claimed.roles), claimed, shown)

    def again(self, admission: Admission) -> Principal:
        """Return who was admitted, with the rights they have by now. Raises Unauthenticated when they would be admitted no more."""
        if admission.claimed is not None:
            self._look()
            self._check(admission.claimed)
        was = admission.principal
        return was if was.name is None else self.grants.principal(was.name, was.roles)

    def bearer(self, admission: Admission) -> str | None:
        """Return the bearer to send from then on, in place of a name and a password where those were shown."""
        claimed = admission.claimed
        return self._logins.issue(claimed.name, claimed.stamp) if claimed is not None and admission.shown is None else admission.shown

    def _proven_by(self, shown: tuple[str, str], prove: Callable[[], Claimed]) -> Claimed:
        """Return what is remembered of what somebody shows, or prove it: once, however many show it at the same time."""
        self._look()
        key = hmac.digest(self._proof_key, "\0".join(shown).encode("utf-8", "surrogatepass"), hashlib.sha256)
        with contextlib.suppress(KeyError, Unauthenticated):  # it may be good again, by another proof
            claimed = self._proven[key]
            self._check(claimed)
            return claimed
        mine: Future[Claimed] = Future()
        with self._lock:
            proving = self._proving.setdefault(key, mine)
        if proving is not mine:
            return proving.result()
        try:
            claimed = prove()
            remember(self._proven, key, claimed, PROVEN_KEPT)
            mine.set_result(claimed)
            return claimed
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._proving[key]

    def _passworded(self, name: str, password: str) -> Claimed:
        accounts = self._accounts
        with self._passwords.turn(name):
            user = accounts.user_of(name, password)
        if user is None:
            log.warning("a login failed, for %s", f"user {name!r}" if name in accounts.users else "a name that no user has")
            raise Unauthenticated(INVALID)
        self._passwords.was_right(name)
        return Claimed(name, (), time.time() + self._config.login_seconds_max, user.stamp)

    def _borne(self, bearer: str) -> Claimed:
        if (found := TOKEN_PATTERN.fullmatch(bearer)) is not None:
            token = self._accounts.token_of(bearer)
            if token is None:
                raise Unauthenticated(INVALID)
            claimed = Claimed(token.principal, (), token.expires_at, token=found[1])
        elif self._logins.is_one(bearer):
            claimed = self._logins.open(bearer)
        elif self._issued is not None:
            claimed = self._issued.open(bearer)
        else:
            raise Unauthenticated(INVALID)
        self._check(claimed)
        return claimed

    def _check(self, claimed: Claimed) -> None:
        """Raise Unauthenticated for what was proven once and is not good any more."""
        accounts = self._accounts
        if claimed.token and claimed.token not in accounts.tokens:
            raise Unauthenticated(INVALID)
        if claimed.expires < time.time():
            raise Unauthenticated(TOKEN_EXPIRED if claimed.token else BEARER_EXPIRED if claimed.key else LOGIN_EXPIRED)
        if claimed.key is not None and self._issued is not None:
            self._issued.check(claimed.key)
        if claimed.stamp and ((user := accounts.users.get(claimed.name)) is None or user.stamp != claimed.stamp):
            raise Unauthenticated("the login is not good any more: the user is gone, or has another password; log in again")

    def _read_grants(self) -> None:
        self.grants = Grants(self._config.grants or None)

    def _read_users(self) -> None:
        if self._config.users:
            self._accounts = Accounts.load(self._config.users)

    def _look(self) -> None:
        """Read the users file again when it has changed; it stays as it was when it cannot be read."""
        now = time.monotonic()
        if not self._config.users or now - self._looked < LOOK_SECONDS:
            return
        with self._lock:
            self._looked = now
            seen = _seen(self._config.users)
            if seen == self._accounts_seen:
                return
            self._accounts_seen = seen
            try:
                self._read_users()
            except OplogError as error:
                log.error("the users stay as they were: %s", error)


def check_size(credential: str | bytes) -> None:
    """Raise Unauthenticated for a credential that is too long to be looked into."""
    if len(credential) > CREDENTIAL_BYTES_MAX:
        raise Unauthenticated(f"the credentials have more than {CREDENTIAL_BYTES_MAX} bytes")


def _basic_parts(basic: str) -> tuple[str, str]:
    """Return the name and the password of HTTP Basic credentials, whose padding Go leaves out."""
    text = basic.strip()
    try:
        name, _, password = base64.b64decode(text + "=" * (-len(text) % 4), validate=True).decode().partition(":")
    except (ValueError, binascii.Error):
        raise Unauthenticated(INVALID) from None
    return name, password


class _Passwords:
    """How often passwords are tried: few at once, and ever more slowly for a name whose password was wrong again and again.

    Nobody is kept waiting for long: a name that has to pause is told so at once, known or not.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(PASSWORDS_AT_ONCE)
        self._waiting = 0
        self._tries: OrderedDict[str, tuple[int, float]] = OrderedDict()  # how many, and from when there may be another

    @contextlib.contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Wait for a place to try a password for a name in.

        Raises Unauthenticated when the name has to pause, TryAgain when too many wait. A try counts as wrong until `was_right`.
        """
        with self._lock:
            now = time.monotonic()
            tries, free = self._tries.get(name, (0, now))
            if free > now:
                raise Unauthenticated(f"there were too many wrong passwords for this name; wait {free - now:.0f} seconds")
            if self._waiting >= PASSWORDS_WAITING_MAX:
                raise TryAgain("too many logins are under way; nothing was done; try again")
            tries = 1 if now - free > FAILURES_SECONDS else tries + 1
            remember(self._tries, name, (tries, now + _pause(tries)), FAILURES_KEPT)
            self._waiting += 1
        try:
            with self._free:
                yield
        finally:
            with self._lock:
                self._waiting -= 1

    def was_right(self, name: str) -> None:
        with self._lock:
            self._tries.pop(name, None)


def _pause(tries: int) -> float:
    """How long after so many wrong tries the next one has to wait."""
    return 0.0 if tries < FREE_FAILURES else min(PAUSE_SECONDS * 2 ** (tries - FREE_FAILURES), PAUSE_SECONDS_MAX)


def derived(secret: bytes, purpose: str) -> bytes:
    """Return the key for one purpose: what is signed for one is never good for another."""
    return hmac.digest(secret, purpose.encode(), hashlib.sha256)


def _secret_in(file: str) -> bytes:
    found = read_bytes("secret", file).strip()
    if len(found) < SECRET_BYTES_LEAST:
        raise RequestError(f"secret {file}: fewer than {SECRET_BYTES_LEAST} bytes, and can be guessed; make one with: openssl rand -hex 32")
    return found


def _seen(file: str) -> tuple[int, ...] | None:
    """Return what is another when a file is."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
