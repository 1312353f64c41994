"""The users file: who may log in with a password, and which API tokens are good. One JSON object:

    {"users": {name: {"password": argon2 hash, "added": time}},
     "tokens": {id: {"principal": name, "digest": SHA-256 of the token's secret, "added": time, "expires": time or null}}}

Passwords are hashed with argon2id, because people choose them; a token's secret is 32 random bytes, which no one can try out,
so SHA-256 is enough and a call with a token stays cheap. The file is replaced whole, by one command at a time, and a server
notices within a second.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import hmac
import json
import math
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError

from flight_oplog.config import read_bytes
from flight_oplog.errors import NotFound, RequestError
from flight_oplog.grants import check_name

PASSWORD_CHARACTERS_LEAST, PASSWORD_BYTES_MAX = 8, 1024
FILE_BYTES_MAX = 16 << 20
DAYS_MAX = 36_525
TOKEN_PATTERN = re.compile(r"oplog_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_HASHER = PasswordHasher()
# Checked where there is no such user, so that it takes as long as where there is.
_NOBODYS = _HASHER.hash(secrets.token_hex(32))


@dataclass(frozen=True)
class User:
    password: str = field(repr=False)
    added: str

    @property
    def stamp(self) -> str:
        """What becomes another when the password does; it tells nothing of it."""
        return hashlib.sha256(self.password.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Token:
    principal: str
    digest: str = field(repr=False)
    added: str
    expires: str | None = None

    @property
    def expires_at(self) -> float:
        """Until when it is good, by the clock on the wall."""
        return math.inf if self.expires is None else datetime.datetime.fromisoformat(self.expires).timestamp()

    @property
    def is_expired(self) -> bool:
        return self.expires_at <= time.time()


@dataclass(frozen=True)
class Accounts:
    """What a users file holds. Immutable."""

    users: dict[str, User] = field(default_factory=dict)
    tokens: dict[str, Token] = field(default_factory=dict)

    @classmethod
    def load(cls, file: str) -> Accounts:
        """Raises RequestError that says what is wrong with the file."""
        text = read_bytes("users file", file, FILE_BYTES_MAX)
        try:
            body = json.loads(text)
            found = cls(
                {check_name("user", name): User(**given) for name, given in body.pop("users", {}).items()},
                {name: Token(**given) for name, given in body.pop("tokens", {}).items()},
            )
            for token in found.tokens.values():
                _ = token.expires_at
                check_name("principal", token.principal)
            if body:
                raise ValueError
        except (ValueError, TypeError, AttributeError, RecursionError, RequestError):
            raise RequestError(f"users file {file}: it is damaged; restore it, or remove it and add the users again") from None
        return found

    def user_of(self, name: str, password: str) -> User | None:
        """Return the user whose password this is; it takes the same time whether or not there is one. About 50 ms and 64 MiB."""
        user = self.users.get(name)
        try:
            _HASHER.verify(_NOBODYS if user is None else user.password, password)
        except (Argon2Error, InvalidHashError):
            return None
        return user

    def token_of(self, text: str) -> Token | None:
        """Return the token that a bearer is, expired or not."""
        found = TOKEN_PATTERN.fullmatch(text)
        token = self.tokens.get(found[1]) if found else None
        if found is None or token is None or not hmac.compare_digest(token.digest, _digest(found[2])):
            return None
        return token


def add_user(file: str, name: str, password: str) -> bool:
    """Add a user, or give it another password; return whether it is new. Raises RequestError for a name or password that cannot be."""
    check_name("user", name)
    if ":" in name:
        raise RequestError(f"user {name!r}: a user's name has no colon, which ends it where it is sent")
    if len(password) < PASSWORD_CHARACTERS_LEAST:
        raise RequestError(f"the password has fewer than {PASSWORD_CHARACTERS_LEAST} characters; nothing was changed")
    if len(password.encode()) > PASSWORD_BYTES_MAX:
        raise RequestError(f"the password has more than {PASSWORD_BYTES_MAX} bytes; nothing was changed")
    with _changing(file) as body:
        is_new = name not in body["users"]
        body["users"][name] = {"password": _HASHER.hash(password), "added": _now().isoformat(timespec="seconds")}
    return is_new


def remove_user(file: str, name: str) -> None:
    """Raises NotFound when there is no such user."""
    with _changing(file) as body:
        if body["users"].pop(name, None) is None:
            raise NotFound(f"user {name!r} is not in {file}")


def add_token(file: str, principal: str, days: float | None) -> str:
    """Make a token for a principal, good for so many days or, with None, until it is removed. It is shown here and never again."""
    check_name("principal", principal)
    if days is not None and not 0 < days < DAYS_MAX:
        raise RequestError(f"a token is good for more than 0 and less than {DAYS_MAX} days; no token was made")
    name, secret, now = secrets.token_hex(6), secrets.token_urlsafe(32), _now()
    expires = None if days is None else (now + datetime.timedelta(days=days)).isoformat(timespec="seconds")
    with _changing(file) as body:
        body["tokens"][name] = {
            "principal": principal,
            "digest": _digest(secret),
            "added": now.isoformat(timespec="seconds"),
            "expires": expires,
        }
    return f"oplog_{name}_{secret}"


def remove_token(file: str, name: str) -> None:
    """Revoke a token by its id. Raises NotFound when there is no such token."""
    with _changing(file) as body:
        if body["tokens"].pop(name, None) is None:
            raise NotFound(f"token {name!r} is not in {file}")


@contextlib.contextmanager
def _changing(file: str) -> Iterator[dict[str, Any]]:
    """Read the file, let its content be changed, and put it in place of the old one, while nobody else does."""
    named, file = file, os.path.realpath(file)  # a link stays one
    try:
        lock = os.open(f"{file}.lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            body: dict[str, Any] = {"users": {}, "tokens": {}}
            if os.path.exists(file):
                Accounts.load(file)
                with open(file, encoding="utf-8") as stream:
                    body |= json.load(stream)
            yield body
            _replace(file, json.dumps(body, indent=1).encode())
        finally:
            os.close(lock)
    except OSError as error:
        raise RequestError(f"users file {named}: {error.strerror}; nothing was changed") from None


def _replace(file: str, content: bytes) -> None:
    """Put content in place of a file's, whole and durably; whoever could read it still can, as a server that runs as somebody else."""
    written = f"{file}.{secrets.token_hex(8)}"
    handle = os.open(written, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        with open(handle, "wb") as stream:
            if os.path.exists(file):
                before = os.stat(file)
                os.fchown(handle, before.st_uid, before.st_gid)
                os.fchmod(handle, before.st_mode & 0o660)
            stream.write(content)
            stream.flush()
            os.fsync(handle)
        os.replace(written, file)
    except BaseException:
        os.unlink(written)
        raise
    folder = os.open(os.path.dirname(file), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
