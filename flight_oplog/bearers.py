"""Signed bearers: JWTs that others issue, and those that a login here returns. RFC 7519, keys as RFC 7517 has them."""

from __future__ import annotations

import json
import logging
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jwt

from flight_oplog.config import Config, read_bytes
from flight_oplog.errors import OplogError, RequestError, TryAgain, Unauthenticated
from flight_oplog.grants import check_name
from flight_oplog.listening import is_loopback

log = logging.getLogger("flight_oplog.auth")

ALGORITHMS = ("RS256", "ES256", "EdDSA", "HS256")
KEYS_MAX = 100
KEYS_BYTES_MAX = 1 << 20
ROLES_MAX = 100
HMAC_BYTES_LEAST = 32
# Keys are fetched again after this long; sooner for one that is not known, but no more often than that.
KEYS_SECONDS, KEYS_PAUSE_SECONDS = 300.0, 10.0
# Without news for so long, keys are not trusted any more: one of them may have been withdrawn.
KEYS_STALE_SECONDS = 3600.0
FETCH_SECONDS = 5.0
_LOGIN = "flight-oplog-login"

INVALID = "the credentials are not valid"
LOGIN_EXPIRED = "the login has expired; log in again"
BEARER_EXPIRED = "the bearer has expired; ask its issuer for another"
TOKEN_EXPIRED = "the API token has expired; ask for another"


@dataclass(frozen=True)
class Claimed:
    """What a bearer says, proven: who its holder is, and until when, by the clock on the wall."""

    name: str
    roles: tuple[str, ...]
    expires: float
    stamp: str = ""  # of the user's password, where one was shown, or a login's bearer
    token: str = ""  # the id of an API token
    key: jwt.PyJWK | None = None  # that signed a JWT


class Logins:
    """Bearers for those who logged in with a password, good at every server with the same secret."""

    def __init__(self, key: bytes, seconds: int) -> None:
        self._key = key
        self._seconds = seconds

    def issue(self, name: str, stamp: str) -> str:
        now = int(time.time())
        body = {"sub": name, "iat": now, "exp": now + self._seconds, "stamp": stamp}
        return jwt.encode(body, self._key, "HS256", headers={"kid": _LOGIN})

    def is_one(self, bearer: str) -> bool:
        """Whether a bearer claims to be one of these."""
        return _header(bearer).get("kid") == _LOGIN

    def open(self, bearer: str) -> Claimed:
        """Raises Unauthenticated for what is none, or has expired."""
        try:
            body = jwt.decode(bearer, self._key, ["HS256"], options={"require": ["sub", "exp", "stamp"], "verify_iat": False})
        except jwt.ExpiredSignatureError:
            raise Unauthenticated(LOGIN_EXPIRED) from None
        except jwt.PyJWTError:
            raise Unauthenticated(INVALID) from None
        return Claimed(body["sub"], (), body["exp"], body["stamp"])


class Issued:
    """JWT bearers of an issuer whose public keys are in a file or behind an address. Thread-safe."""

    def __init__(self, config: Config) -> None:
        """Raises RequestError for settings that do not go together, or a file that cannot be used."""
        if not config.jwt_issuer or not config.jwt_audience:
            raise RequestError("settings jwt_issuer and jwt_audience are needed beside jwt_keys: a key alone does not say whom to trust")
        self._config = config
        self._source = config.jwt_keys
        address = urllib.parse.urlsplit(self._source)
        self._is_remote = address.scheme in ("http", "https")
        if address.scheme == "http" and not is_loopback(address.hostname or ""):
            raise RequestError(f"setting jwt_keys: {self._source} is read without TLS, and whoever is between may answer; use https://")
        self._lock = threading.Lock()
        self.keys: dict[str, jwt.PyJWK] = {}  # by all that they say; replaced, never changed
        self._fetched = self._tried = float("-inf")
        if not self._is_remote:
            self._fetch()

    def fetch(self) -> None:
        """Read the keys now. Raises RequestError when that cannot be done."""
        with self._lock:
            self._fetch()

    def open(self, bearer: str) -> Claimed:
        """Raises Unauthenticated for a bearer that is not valid, TryAgain when nobody can tell because the keys are not to be had."""
        header = _header(bearer)
        for key in self._candidates(header.get("kid"), header.get("alg")):
            try:
                body = jwt.decode(
                    bearer,
                    key,
                    [key.algorithm_name],
                    audience=self._config.jwt_audience,
                    issuer=self._config.jwt_issuer,
                    leeway=self._config.jwt_skew_seconds,
                    options={"require": ["exp", "iss", "aud"]},
                )
            except jwt.ExpiredSignatureError:
                raise Unauthenticated(BEARER_EXPIRED) from None
            except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
                continue
            return self._claimed(body, key)
        raise Unauthenticated(INVALID)

    def check(self, key: jwt.PyJWK) -> None:
        """Raise Unauthenticated for a key that has been withdrawn, TryAgain when nobody has said for long whether it was."""
        self._refresh()
        self._check_fresh()
        if not any(key is each for each in self.keys.values()):
            raise Unauthenticated(INVALID)

    def _claimed(self, body: Mapping[str, Any], key: jwt.PyJWK) -> Claimed:
        roles = _claim(body, self._config.jwt_roles_claim) or ()
        named = roles.split() if isinstance(roles, str) else roles
        if not isinstance(named, list | tuple) or len(named) > ROLES_MAX or not all(isinstance(role, str) for role in named):
            raise Unauthenticated(INVALID)
        try:
            name = check_name("principal", _claim(body, self._config.jwt_principal_claim))
        except RequestError:
            raise Unauthenticated(INVALID) from None
        return Claimed(name, tuple(sorted(set(named))), min(int(body["exp"]), 1 << 50) + self._config.jwt_skew_seconds, key=key)

    def _candidates(self, name: object, algorithm: object) -> list[jwt.PyJWK]:
        """Return the keys that a bearer may be signed with. Which algorithm a key is for, the key says, never the bearer."""
        if algorithm not in ALGORITHMS:
            return []
        for is_last in (False, True):
            self._refresh(wanted=is_last)
            found = [key for key in self.keys.values() if key.algorithm_name == algorithm and (name is None or key.key_id in (None, name))]
            if found:
                break
        self._check_fresh()
        return found

    def _check_fresh(self) -> None:
        if self._is_remote and time.monotonic() - self._fetched > KEYS_STALE_SECONDS:
            raise TryAgain("the keys that bearers are signed with cannot be fetched; nothing was done; try again later")

    def _refresh(self, wanted: bool = False) -> None:
        """Read the keys again: when it is time to, while others go on, or at once when one is wanted that is not known."""
        age, since = (time.monotonic() - moment for moment in (self._fetched, self._tried))
        if since < KEYS_PAUSE_SECONDS or not (wanted or age > KEYS_SECONDS):
            return
        if wanted or not self.keys:
            self._refetch()
        else:
            threading.Thread(target=self._refetch, name="keys", daemon=True).start()

    def _refetch(self) -> None:
        """Read the keys again; the old ones stay if that fails. Whoever comes meanwhile waits only where there are none."""
        if self._lock.acquire(blocking=not self.keys):
            try:
                if time.monotonic() - self._tried >= KEYS_PAUSE_SECONDS:
                    self._fetch()
            except OplogError as error:
                log.warning("the keys stay as they were: %s", error)
            finally:
                self._lock.release()

    def _fetch(self) -> None:
        self._tried = time.monotonic()
        found = _keys_in(self._source, _fetched(self._source) if self._is_remote else read_bytes("jwt_keys", self._source, KEYS_BYTES_MAX))
        # A key that goes on is the same object, so that what it has signed need not be looked at again.
        self.keys = {text: self.keys.get(text, key) for text, key in found.items()}
        self._fetched = time.monotonic()


def _header(bearer: str) -> dict[str, Any]:
    try:
        return jwt.get_unverified_header(bearer)
    except (jwt.PyJWTError, ValueError, RecursionError):
        return {}


def _claim(body: Mapping[str, Any], path: str) -> Any:
    """Return a claim by its name, or by the names it is within: "realm_access.roles"."""
    if path in body:
        return body[path]
    found: Any = body
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _keys_in(source: str, text: bytes) -> dict[str, jwt.PyJWK]:
    """Return the keys of a JWKS that are of a kind served, by all that they say. Raises RequestError when there is none, or too many."""
    try:
        listed = json.loads(text)["keys"]
        if not isinstance(listed, list) or len(listed) > KEYS_MAX:
            raise RequestError(f"jwt_keys {source}: not 1 to {KEYS_MAX} keys")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RequestError(f"jwt_keys {source}: not a JSON Web Key Set") from None
    found = {}
    for each in listed:
        try:
            key = jwt.PyJWK(each)
        except (jwt.PyJWTError, ValueError, TypeError, AttributeError, KeyError):
            continue  # of a kind that is not known; a set may have such (RFC 7517, section 5)
        if isinstance(key.key, bytes) and len(key.key) < HMAC_BYTES_LEAST:
            raise RequestError(f"jwt_keys {source}: an HS256 key has fewer than {HMAC_BYTES_LEAST} bytes, and can be guessed")
        if key.algorithm_name in ALGORITHMS and each.get("use", "sig") == "sig":
            found[json.dumps(each, sort_keys=True)] = key
    if not found:
        raise RequestError(f"jwt_keys {source}: it has no key for {', '.join(ALGORITHMS)}")
    return found


def _fetched(address: str) -> bytes:
    try:
        request = urllib.request.Request(address, headers={"Accept": "application/json"})  # noqa: S310
        with _OPENER.open(request, timeout=FETCH_SECONDS) as answer:
            text: bytes = answer.read(KEYS_BYTES_MAX)
            return text
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise RequestError(f"jwt_keys {address}: {getattr(error, 'reason', None) or error}") from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """An address that is answered with another one may lead anywhere, to one without TLS as well."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)
