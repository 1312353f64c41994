"""From credentials to a principal. No gRPC: `server.py` hands over what a call came with.

What is taken: a user's name and password (HTTP Basic), or a bearer, which is an API token, a JWT, or what a login with a
password returned; or the certificate of a TLS connection. Which of them, the settings say: with none of them, nobody is
asked who they are. What was proven is remembered until it expires or what proved it changes, because a query is three or
four calls, and a password takes 50 ms to check.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import os
import secrets
import threading
import time
from collections import OrderedDict
from typing import Any

from flight_oplog.accounts import PASSWORD_BYTES_MAX, TOKEN_PATTERN, Accounts
from flight_oplog.bearers import INVALID, Claimed, Issued, Logins
from flight_oplog.config import Config
from flight_oplog.errors import OplogError, RequestError, TryAgain, Unauthenticated
from flight_oplog.grants import ANYBODY, NAME_CHARACTERS_MAX, Grants, Principal

log = logging.getLogger("flight_oplog.auth")

CREDENTIAL_BYTES_MAX = 8192
SECRET_BYTES_LEAST = 32
PROVEN_KEPT = 10_000
LOOK_SECONDS = 0.5
# Each check of a password takes 64 MiB.
PASSWORDS_AT_ONCE, PASSWORDS_WAITING_MAX = 2, 32
# Wrong passwords for a name that cost nothing; then each one has the next wait, twice as long each time.
FREE_FAILURES = 3
PAUSE_SECONDS, PAUSE_SECONDS_MAX, WAIT_SECONDS_MAX = 0.25, 8.0, 10.0
FAILURES_SECONDS = 900.0
FAILURES_KEPT = 10_000

_NEEDED = "this server asks who is calling: send a user's name and password, or a bearer token"


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
        self._proven: OrderedDict[bytes, tuple[Any, Claimed]] = OrderedDict()
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
        """Read the grants and the users again. Raises RequestError when one of them cannot be used: then it stays as it was."""
        grants = Grants(self._config.grants or None)
        self._look(at_once=True)
        self.grants = grants
        log.info("grants and users were read again: %s", self)

    def again(self, principal: Principal) -> Principal:
        """Return a principal with the rights it has by now."""
        return principal if principal.name is None else self.grants.principal(principal.name, principal.roles)

    def certified(self, name: str) -> Principal:
        """Return the principal that a connection's certificate names."""
        if not 0 < len(name) <= NAME_CHARACTERS_MAX or not name.isprintable():
            raise Unauthenticated("the certificate names nobody")
        return self.grants.principal(name)

    def admit(self, authorization: str | None) -> tuple[Principal, str | None]:
        """Return who sends an `authorization` header, and the bearer to send from then on instead of a password.

        Raises Unauthenticated, in words that do not tell an unknown user from a wrong password, and TryAgain when it cannot
        be told now.
        """
        if not self.takes_bearers:
            return ANYBODY, None
        if not authorization:
            raise Unauthenticated(_NEEDED)
        if len(authorization) > CREDENTIAL_BYTES_MAX:
            raise Unauthenticated(f"the credentials have more than {CREDENTIAL_BYTES_MAX} bytes")
        scheme, _, given = authorization.partition(" ")
        kind = scheme.lower()
        if kind not in ("basic", "bearer"):
            raise Unauthenticated(_NEEDED)
        self._look()
        proven_by = (self._accounts, self._issued and self._issued.keys)
        key = hmac.digest(self._proof_key, f"{kind} {given}".encode("utf-8", "surrogateescape"), hashlib.sha256)
        with self._lock:
            proof, claimed = self._proven.get(key, (None, None))
        if claimed is None or proof != proven_by or claimed.expires < time.time():
            claimed = self.log_in(*_parts(given)) if kind == "basic" else self._borne(given.strip())
            with self._lock:
                self._proven[key] = proven_by, claimed
                while len(self._proven) > PROVEN_KEPT:
                    self._proven.popitem(last=False)
        bearer = None if kind == "bearer" else self._bearer(claimed, _parts(given)[1])
        return self.grants.principal(claimed.name, claimed.roles), bearer

    def log_in(self, name: str, password: str) -> Claimed:
        """Return who a name and a password stand for. An API token may stand for a password, whatever the name is."""
        if TOKEN_PATTERN.fullmatch(password):
            return self._borne(password)
        if not self._config.users or len(name) > NAME_CHARACTERS_MAX or len(password.encode("utf-8", "replace")) > PASSWORD_BYTES_MAX:
            raise Unauthenticated(INVALID)
        accounts = self._accounts
        with self._passwords.turn(name):
            user = accounts.user_of(name, password)
        self._passwords.tried(name, is_right=user is not None)
        if user is None:
            log.warning("a login failed, for %s", f"user {name!r}" if name in accounts.users else "a name that no user has")
            raise Unauthenticated(INVALID)
        return Claimed(name, (), time.time() + self._config.login_seconds_max, user.stamp)

    def log_in_by_handshake(self, name: str, password: str) -> str:
        """Return the bearer for a name and a password."""
        self._look()
        return self._bearer(self.log_in(name, password), password)

    def _bearer(self, claimed: Claimed, password: str) -> str:
        return self._logins.issue(claimed.name, claimed.stamp) if claimed.stamp else password

    def _borne(self, bearer: str) -> Claimed:
        accounts = self._accounts
        if bearer.startswith("oplog_"):
            token = accounts.token_of(bearer)
            if token is None:
                raise Unauthenticated(INVALID)
            if token.is_expired:
                raise Unauthenticated("the API token has expired; ask for another")
            return Claimed(token.principal, (), token.expires_at)
        if self._logins.is_one(bearer):
            claimed = self._logins.open(bearer)
            user = accounts.users.get(claimed.name)
            if user is None or user.stamp != claimed.stamp:
                raise Unauthenticated("the login is not good any more: the user is gone, or has another password; log in again")
            return claimed
        if self._issued is None:
            raise Unauthenticated(INVALID)
        return self._issued.open(bearer)

    def _look(self, at_once: bool = False) -> None:
        """Read the users file again when it has changed; it stays as it was when it cannot be read."""
        now = time.monotonic()
        if not self._config.users or (now - self._looked < LOOK_SECONDS and not at_once):
            return
        with self._lock:
            self._looked = now
            seen = _seen(self._config.users)
            if seen == self._accounts_seen and not at_once:
                return
            self._accounts_seen = seen
            try:
                self._accounts = Accounts.load(self._config.users)
            except OplogError as error:
                if at_once:
                    raise
                log.error("the users stay as they were: %s", error)


def _parts(basic: str) -> tuple[str, str]:
    """Return the name and the password of HTTP Basic credentials."""
    text = basic.strip()
    try:
        name, _, password = (
            base64.b64decode(text + "=" * (-len(text) % 4), validate=True).decode().partition(":")
        )  # Go leaves out the padding
    except (ValueError, binascii.Error):
        raise Unauthenticated(INVALID) from None
    return name, password


class _Passwords:
    """How often passwords are tried: few at once, and ever more slowly for a name whose password was wrong again and again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(PASSWORDS_AT_ONCE)
        self._waiting = 0
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()  # how many, and from when the next may be tried

    def turn(self, name: str) -> threading.BoundedSemaphore:
        """Wait until a password may be tried for a name; hold what is returned meanwhile.

        Raises Unauthenticated when that would take too long, TryAgain when too many wait.
        """
        with self._lock:
            now = time.monotonic()
            failures, free = self._failures.get(name, (0, now))
            if now - free > FAILURES_SECONDS:
                failures = 0
            begin = max(now, free)
            if begin - now > WAIT_SECONDS_MAX:
                raise Unauthenticated("there were too many wrong passwords for this name; wait some seconds")
            if self._waiting >= PASSWORDS_WAITING_MAX:
                raise TryAgain("too many logins are under way; nothing was done; try again")
            if failures:
                self._failures[name] = failures, begin + _pause(failures)
            self._waiting += 1
        try:
            time.sleep(begin - now)
        finally:
            with self._lock:
                self._waiting -= 1
        return self._free

    def tried(self, name: str, is_right: bool) -> None:
        with self._lock:
            if is_right:
                self._failures.pop(name, None)
                return
            failures, free = self._failures.get(name, (0, 0.0))
            self._failures[name] = failures + 1, max(free, time.monotonic() + _pause(failures + 1))
            self._failures.move_to_end(name)
            while len(self._failures) > FAILURES_KEPT:
                self._failures.popitem(last=False)


def _pause(failures: int) -> float:
    return 0.0 if failures < FREE_FAILURES else min(PAUSE_SECONDS * 2 ** (failures - FREE_FAILURES), PAUSE_SECONDS_MAX)


def derived(secret: bytes, purpose: str) -> bytes:
    """Return the key for one purpose: what is signed for one is never good for another."""
    return hmac.digest(secret, purpose.encode(), hashlib.sha256)


def _secret_in(file: str) -> bytes:
    try:
        with open(file, "rb") as stream:
            found = stream.read(4096).strip()
    except OSError as error:
        raise RequestError(f"secret {file}: {error.strerror}") from None
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
