"""Who may do what to which topics: principals, roles, and a TOML file that grants them permissions.

    [role.analyst]
    read = ["orders", "web_*"]

    [principal.alice]
    roles = ["analyst"]
    append = ["notes"]

A permission says nothing of another one: who may append may not read for that. `append` writes entries, and begins a
topic by its first; `read` sees a topic, or a view, in whatever way; `admin` declares, replaces and drops topics and
views. Who may `admin` `*` also sees what the server counts and what others ask. What a principal may not read does not
exist for it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flight_oplog.config import read_toml
from flight_oplog.errors import Forbidden, RequestError

PERMISSIONS = ("append", "read", "admin")
NAME_CHARACTERS_MAX = 256
PRINCIPALS_KEPT = 10_000
_PATTERN = re.compile(r"[A-Za-z0-9_*]{1,128}")


@dataclass(frozen=True)
class Rights:
    """For each permission, patterns of the names it is granted for: `*` stands for any characters."""

    append: frozenset[str] = frozenset()
    read: frozenset[str] = frozenset()
    admin: frozenset[str] = frozenset()

    def may(self, permission: str, name: str) -> bool:
        patterns: frozenset[str] = getattr(self, permission)
        return name in patterns or "*" in patterns or _matches(patterns, name)

    @property
    def oversees(self) -> bool:
        """Whether they are an operator's, who may see what the server does for others."""
        return "*" in self.admin

    def __or__(self, other: Rights) -> Rights:
        return Rights(*(getattr(self, name) | getattr(other, name) for name in PERMISSIONS))


@functools.lru_cache(1 << 16)
def _matches(patterns: frozenset[str], name: str) -> bool:
    return any(_fits(pattern, name) for pattern in patterns)


def _fits(pattern: str, name: str) -> bool:
    """Whether a name fits a pattern; never goes back over it, as a regular expression of many stars would."""
    first, *others = pattern.split("*")
    if not others:
        return name == pattern
    *middle, last = others
    if not name.startswith(first):
        return False
    place = len(first)
    for part in middle:
        place = name.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return name.endswith(last) and place + len(last) <= len(name)


EVERYTHING, NOTHING = Rights(*[frozenset("*")] * 3), Rights()


@dataclass(frozen=True)
class Principal:
    """Somebody who calls: by what name, in which roles that their credential names, and what they may do."""

    name: str | None
    roles: tuple[str, ...] = ()
    rights: Rights = EVERYTHING

    def may(self, permission: str, name: str) -> bool:
        return self.rights.may(permission, name)


def check_may(principal: Principal, permission: str, name: str) -> None:
    """Raise Forbidden where a principal has no permission, in words that do not tell whether there is a topic or view of the name."""
    if not principal.may(permission, name):
        raise Forbidden(
            f"{principal.name!r} has no permission {permission!r} for {name!r}; nothing was written; ask whoever keeps the grants"
        )


# Where nobody is asked who they are; and who has not been told from others yet.
ANYBODY, NOBODY = Principal(None), Principal(None, rights=NOTHING)


class Grants:
    """What a file grants; without one, every principal may do everything. Immutable but for what it remembers; thread-safe."""

    def __init__(self, file: str | None = None) -> None:
        """Raises RequestError that says what is wrong with the file."""
        self._file = file
        self.roles: dict[str, Rights] = {}
        self._own: dict[str, tuple[tuple[str, ...], Rights]] = {}
        self._known: dict[tuple[str, tuple[str, ...]], Principal] = {}
        if file is not None:
            self._read(file)

    @property
    def principals(self) -> Iterable[str]:
        """The principals that the file names."""
        return self._own.keys()

    def principal(self, name: str, roles: tuple[str, ...] = ()) -> Principal:
        """Return a principal with its rights; `roles` are those its credential names, of which unknown ones grant nothing."""
        found = self._known.get((name, roles))
        if found is None:
            of_file, rights = self._own.get(name, ((), Rights()))
            for role in (*of_file, *roles):
                rights |= self.roles.get(role, Rights())
            found = Principal(name, roles, EVERYTHING if self._file is None else rights)
            if len(self._known) >= PRINCIPALS_KEPT:
                self._known.clear()
            self._known[name, roles] = found
        return found

    def _read(self, file: str) -> None:
        body = read_toml("grants", file)
        for kind in body:
            if kind not in ("role", "principal"):
                raise RequestError(f"grants {file}: there is no {kind!r}; tables are [role.NAME] and [principal.NAME]")
        for name, given in _tables(file, body, "role"):
            self.roles[name] = _rights(f"grants {file}: [role.{name}]", given, ())
        for name, given in _tables(file, body, "principal"):
            where = f"grants {file}: [principal.{name}]"
            roles = _texts(where, given, "roles")
            for role in roles:
                if role not in self.roles:
                    raise RequestError(f"{where}: there is no role {role!r}")
            self._own[name] = roles, _rights(where, given, ("roles",))


def _tables(file: str, body: Mapping[str, Any], kind: str) -> Iterable[tuple[str, dict[str, Any]]]:
    found = body.get(kind, {})
    if not isinstance(found, dict) or not all(isinstance(given, dict) for given in found.values()):
        raise RequestError(f"grants {file}: {kind!r} is no table; write [{kind}.NAME]")
    for name in found:
        check_name(f"grants {file}: {kind}", name)
    return found.items()


def _rights(where: str, given: Mapping[str, Any], other: tuple[str, ...]) -> Rights:
    for name in given:
        if name not in (*PERMISSIONS, *other):
            raise RequestError(f"{where}: there is no {name!r}; known are {', '.join((*PERMISSIONS, *other))}")
    patterns = [frozenset(_texts(where, given, permission)) for permission in PERMISSIONS]
    for pattern in frozenset().union(*patterns):
        if not _PATTERN.fullmatch(pattern):
            raise RequestError(f"{where}: {pattern[:200]!r} is no pattern of topics' names: letters, digits, _ and *")
    return Rights(*patterns)


def _texts(where: str, given: Mapping[str, Any], name: str) -> tuple[str, ...]:
    found = given.get(name, [])
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise RequestError(f"{where}: {name} is no list of texts")
    return tuple(found)


def is_name(name: str) -> bool:
    """Whether a text may be the name of a principal or role."""
    return 0 < len(name) <= NAME_CHARACTERS_MAX and name.isprintable()


def check_name(what: str, name: object) -> str:
    """Return the name of a principal or role. Raises RequestError for what cannot be one."""
    if not isinstance(name, str) or not is_name(name):
        raise RequestError(f"{what} {str(name)[:80]!r} is not a name of 1 to {NAME_CHARACTERS_MAX} printable characters")
    return name
