"""Credentials: users and API tokens in their file, JWTs and their keys, logins, grants, and what becomes of wrong ones."""

import base64
import json
import os
import re
import stat
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from issuer import PRIVATE, PUBLIC, Issuer, claims, signed
from jwt.algorithms import HMACAlgorithm

from flight_oplog import Config, auth, bearers
from flight_oplog.accounts import Accounts, add_token, add_user, remove_token, remove_user
from flight_oplog.auth import Admission, Gate
from flight_oplog.errors import NotFound, RequestError, TryAgain, Unauthenticated
from flight_oplog.grants import ANYBODY, EVERYTHING, Grants, Principal, Rights

SECRET = b"the log's own, of 32 bytes or more"


def basic(name: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


@pytest.fixture
def users(tmp_path: Path) -> str:
    """A users file with ann, whose password is "correct horse"."""
    file = str(tmp_path / "users.json")
    add_user(file, "ann", "correct horse")
    return file


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "LOOK_SECONDS", 0.0)


# Grants


def test_permissions_say_nothing_of_one_another_and_patterns_match_whole_names() -> None:
    rights = Rights(frozenset(("a_*",)), frozenset(("b", "*_c")), frozenset())
    assert [rights.may("append", name) for name in ("a_", "a_x", "xa_x", "a")] == [True, True, False, False]
    assert [rights.may("read", name) for name in ("b", "bb", "_c", "x_c", "x_cx", "B")] == [True, False, True, True, False, False]
    assert not any(rights.may("admin", name) for name in ("a_x", "b", "x_c"))
    assert all(EVERYTHING.may(permission, "_schemas") for permission in ("append", "read", "admin"))
    assert EVERYTHING.oversees
    assert not Rights(admin=frozenset(("a*",))).oversees


@given(pattern=st.text("ab_*", max_size=6), name=st.text("ab_", max_size=6))
def test_a_pattern_matches_as_its_stars_say(pattern: str, name: str) -> None:
    def fits(pattern: str, name: str) -> bool:
        if not pattern:
            return not name
        if pattern[0] == "*":
            return any(fits(pattern[1:], name[place:]) for place in range(len(name) + 1))
        return name[:1] == pattern[0] and fits(pattern[1:], name[1:])

    assert Rights(read=frozenset((pattern,))).may("read", name) == fits(pattern, name)


def test_a_principal_has_its_own_rights_its_roles_and_those_its_credential_names(tmp_path: Path) -> None:
    file = tmp_path / "grants.toml"
    file.write_text(
        '[role.reader]\nread = ["web_*"]\n[role.writer]\nappend = ["web_*"]\n'
        '[principal.ann]\nroles = ["reader"]\nadmin = ["anns_*"]\n[principal."spiffe://x/y z"]\nread = ["t"]\n'
    )
    grants = Grants(str(file))
    assert grants.principal("ann").rights == Rights(read=frozenset(("web_*",)), admin=frozenset(("anns_*",)))
    assert grants.principal("ann", ("writer", "unknown")).rights.append == {"web_*"}
    assert grants.principal("nobody").rights == Rights()
    assert grants.principal("nobody", ("writer",)).rights == Rights(append=frozenset(("web_*",)))
    assert grants.principal("spiffe://x/y z").may("read", "t")
    assert Grants().principal("anybody").rights == EVERYTHING


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[role.a\n", "Expected ']'"),
        ("[group.a]\nread = []\n", "there is no 'group'; tables are [role.NAME] and [principal.NAME]"),
        ("role = 1\n", "'role' is no table; write [role.NAME]"),
        ("[role]\na = 1\n", "'role' is no table; write [role.NAME]"),
        ("[role.a]\nwrite = ['t']\n", "[role.a]: there is no 'write'; known are append, read, admin"),
        ("[role.a]\nroles = ['b']\n", "[role.a]: there is no 'roles'; known are append, read, admin"),
        ("[role.a]\nread = 't'\n", "[role.a]: read is no list of texts"),
        ("[role.a]\nread = [1]\n", "[role.a]: read is no list of texts"),
        ("[role.a]\nread = ['a.b']\n", "[role.a]: 'a.b' is no pattern of topics' names: letters, digits, _ and *"),
        ("[role.a]\nread = ['']\n", "[role.a]: '' is no pattern of topics' names: letters, digits, _ and *"),
        ("[principal.a]\nroles = ['b']\n", "[principal.a]: there is no role 'b'"),
        ('[principal."a\\u0000"]\n', "is not a name of 1 to 256 printable characters"),
        (f"[principal.{'a' * 257}]\n", "is not a name of 1 to 256 printable characters"),
    ],
)
def test_a_broken_grants_file_is_refused_in_a_sentence(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "grants.toml"
    file.write_text(text)
    with pytest.raises(RequestError) as caught:
        Grants(str(file))
    assert str(caught.value).startswith(f"grants {file}: ")
    assert said in str(caught.value)


def test_a_grants_file_one_byte_too_long_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "grants.toml"
    file.write_text("#" * (1 << 20))
    assert Grants(str(file)).roles == {}
    file.write_text("#" * ((1 << 20) + 1))
    with pytest.raises(RequestError, match="more than 1048576 bytes"):
        Grants(str(file))
    with pytest.raises(RequestError, match="No such file or directory"):
        Grants(str(tmp_path / "none"))


# The users file


def test_users_are_kept_hashed_privately_and_whole(users: str) -> None:
    assert not add_user(users, "ann", "another one")
    assert add_user(users, "bob", "long enough")
    text = Path(users).read_text()
    assert "another one" not in text
    assert "$argon2id$" in text
    assert stat.S_IMODE(os.stat(users).st_mode) == 0o600
    loaded = Accounts.load(users)
    assert loaded.user_of("ann", "another one") is not None
    for name, password in (("ann", "correct horse"), ("ann", ""), ("bob", "another one"), ("nobody", "another one"), ("", "")):
        assert loaded.user_of(name, password) is None
    remove_user(users, "ann")
    assert Accounts.load(users).users.keys() == {"bob"}
    with pytest.raises(NotFound, match="user 'ann' is not in"):
        remove_user(users, "ann")


def test_a_users_file_behind_a_link_stays_there_and_as_readable_as_it_was(users: str, tmp_path: Path) -> None:
    link = tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(users)
    os.chmod(users, 0o666)
    assert add_user(str(link), "bob", "long enough")
    assert link.is_symlink()
    assert os.listdir(link.parent) == ["link"]
    assert Accounts.load(users).users.keys() == {"ann", "bob"}
    assert stat.S_IMODE(os.stat(users).st_mode) == 0o660  # a group that may read it still may; others, never


def test_a_link_planted_beside_the_users_file_is_not_followed(users: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    os.unlink(f"{users}.lock")
    os.symlink(victim, f"{users}.lock")
    before = Path(users).read_text()
    with pytest.raises(RequestError, match="nothing was changed"):
        add_user(users, "bob", "long enough")
    assert not victim.exists()
    assert Path(users).read_text() == before


@pytest.mark.parametrize(
    ("name", "password", "said"),
    [
        ("", "long enough", "is not a name of 1 to 256 printable characters"),
        ("a\nb", "long enough", "is not a name of 1 to 256 printable characters"),
        ("a" * 257, "long enough", "is not a name of 1 to 256 printable characters"),
        ("a:b", "long enough", "a user's name has no colon"),
        ("a", "1234567", "fewer than 8 characters"),
        ("a", "x" * 1025, "more than 1024 bytes"),
        ("a", "ß" * 513, "more than 1024 bytes"),
    ],
)
def test_names_and_passwords_that_cannot_be_are_refused(users: str, name: str, password: str, said: str) -> None:
    before = Path(users).read_text()
    with pytest.raises(RequestError, match=said):
        add_user(users, name, password)
    assert Path(users).read_text() == before


def test_limits_of_names_and_passwords_are_theirs_to_use(users: str) -> None:
    add_user(users, "a" * 256, "x" * 1024)
    add_user(users, "b", "12345678")
    assert Accounts.load(users).user_of("a" * 256, "x" * 1024) is not None


def test_commands_at_the_same_time_lose_nothing(users: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: add_token(users, f"p{n}", None), range(40)))
    assert len(Accounts.load(users).tokens) == 40


def test_a_file_that_a_server_of_another_user_reads_stays_readable(users: str) -> None:
    os.chmod(users, 0o640)
    add_user(users, "bob", "long enough")
    assert stat.S_IMODE(os.stat(users).st_mode) == 0o640


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"users": []}',
        '{"users": {"a": {}}}',
        '{"users": {"a": {"password": "x", "added": "y", "more": 1}}}',
        '{"tokens": {"a": {"principal": "p", "digest": "d", "added": "x", "expires": "soon"}}}',
        '{"tokens": {"a": {"principal": 1, "digest": "d", "added": "x"}}}',
        '{"more": 1}',
        "[" * 100_000,
    ],
)
def test_a_damaged_users_file_is_refused_and_never_written_over(tmp_path: Path, text: str) -> None:
    file = tmp_path / "users.json"
    file.write_text(text)
    for act in (lambda: Accounts.load(str(file)), lambda: add_user(str(file), "a", "long enough")):
        with pytest.raises(RequestError, match="it is damaged; restore it, or remove it and add the users again"):
            act()
    assert file.read_text() == text


def test_tokens_expire_are_revoked_and_only_their_digest_is_kept(users: str) -> None:
    for_ever, short, gone = add_token(users, "svc", None), add_token(users, "svc", 0.5 / 86400), add_token(users, "svc", 1)
    loaded = Accounts.load(users)
    text = Path(users).read_text()
    for token in (for_ever, short, gone):
        assert (found := loaded.token_of(token)) is not None
        assert found.principal == "svc"
        assert token.split("_", 2)[2] not in text
    assert loaded.token_of(for_ever[:-1] + ("A" if for_ever[-1] != "A" else "B")) is None
    assert loaded.token_of(for_ever.replace(for_ever.split("_")[1], short.split("_")[1])) is None
    gate = Gate(Config(users=users), SECRET)
    assert gate.admit(f"Bearer {for_ever}").principal == gate.admit(f"bearer {gone}").principal == Principal("svc")
    time.sleep(1.6)  # a time of expiry is kept in whole seconds
    with pytest.raises(Unauthenticated, match=r"^the API token has expired; ask for another$"):
        gate.admit(f"Bearer {short}")
    remove_token(users, gone.split("_")[1])
    with pytest.raises(Unauthenticated, match=r"^the credentials are not valid$"):
        gate.admit(f"Bearer {gone}")
    assert gate.admit(f"Bearer {for_ever}").principal.name == "svc"
    with pytest.raises(NotFound):
        remove_token(users, gone.split("_")[1])


# Logins with a password


def test_a_login_returns_a_bearer_that_every_server_with_the_secret_takes(users: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x" * 32)
    config = Config(users=users, secret=str(tmp_path / "secret"))
    bearer = logged_in(Gate(config, b"one"), "ann", "correct horse")
    again = Gate(config, b"another").admit(f"Bearer {bearer}")
    assert again.principal == Principal("ann")
    with pytest.raises(Unauthenticated):
        Gate(Config(users=users), SECRET).admit(f"Bearer {bearer}")


def test_a_bearer_of_a_login_ends_with_its_time_its_password_and_its_user(users: str) -> None:
    gate = Gate(Config(users=users, login_seconds_max=1), SECRET)
    bearer = logged_in(gate, "ann", "correct horse")
    assert gate.admit(f"Bearer {bearer}").principal.name == "ann"
    time.sleep(2.1)
    with pytest.raises(Unauthenticated, match=r"^the login has expired; log in again$"):
        gate.admit(f"Bearer {bearer}")
    gate = Gate(Config(users=users), SECRET)
    bearer = logged_in(gate, "ann", "correct horse")
    add_user(users, "ann", "battery staple")
    for credential in (f"Bearer {bearer}", basic("ann", "correct horse")):
        with pytest.raises(Unauthenticated):
            gate.admit(credential)
    bearer = logged_in(gate, "ann", "battery staple")
    remove_user(users, "ann")
    with pytest.raises(Unauthenticated, match="the login is not good any more"):
        gate.admit(f"Bearer {bearer}")


def test_go_leaves_out_the_padding_and_a_token_may_stand_for_a_password(users: str) -> None:
    gate = Gate(Config(users=users), SECRET)
    assert gate.admit(basic("ann", "correct horse").rstrip("=")).principal.name == "ann"
    token = add_token(users, "svc", 1)
    admitted = gate.admit(basic("whoever", token))
    assert (admitted.principal, gate.bearer(admitted)) == (Principal("svc"), token)


WRONG = [
    "Basic",
    "Basic ",
    "Basic !!!!",
    "Basic " + base64.b64encode(b"\xff\xfe").decode(),
    basic("ann", "wrong horse"),
    basic("ann", ""),
    basic("ANN", "correct horse"),
    basic("", ""),
    basic("a" * 257, "correct horse"),
    basic("ann", "x" * 1025),
    "Bearer ",
    "Bearer oplog_000000000000_" + "a" * 43,
    "Bearer oplog_",
    "Bearer not a token",
    "Bearer a.b.c",
    "Bearer " + "x" * 8000,
    "Digest abc",
    "correct horse",
    "Bearer \udcff",
    "Bearer " + jwt.encode({"sub": "ann", "exp": 1 << 40, "stamp": ""}, "k" * 32, "HS256", headers={"kid": "flight-oplog-login"}),
    "Bearer " + jwt.encode({"sub": "ann", "exp": 1 << 40, "stamp": ""}, None, "none", headers={"kid": "flight-oplog-login"}),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_and_malformed_credentials_are_refused_without_a_word_of_why(users: str, wrong: str) -> None:
    gate = Gate(Config(users=users), SECRET)
    with pytest.raises(Unauthenticated) as caught:
        gate.admit(wrong)
    assert str(caught.value) in ("the credentials are not valid", auth._NEEDED)


def test_a_credential_one_byte_too_long_is_refused(users: str) -> None:
    gate = Gate(Config(users=users), SECRET)
    with pytest.raises(Unauthenticated, match=r"^the credentials are not valid$"):
        gate.admit("Bearer " + "x" * (8192 - 7))
    with pytest.raises(Unauthenticated, match=r"^the credentials have more than 8192 bytes$"):
        gate.admit("Bearer " + "x" * (8192 - 6))


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60), prefix=st.sampled_from(["", "Basic ", "Bearer ", "Bearer oplog_", "bearer eyJ"]))
def test_no_credential_makes_the_gate_fail(tmp_path_factory: pytest.TempPathFactory, text: str, prefix: str) -> None:
    gate = _gate(tmp_path_factory)
    with pytest.raises(Unauthenticated):
        gate.admit(prefix + text)


_MADE: list[Gate] = []


def _gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    if not _MADE:
        folder = tmp_path_factory.mktemp("gate")
        keys = folder / "keys.json"
        keys.write_text(json.dumps({"keys": [PUBLIC["RS256"]]}))
        add_user(str(folder / "users.json"), "ann", "correct horse")
        _MADE.append(Gate(Config(users=str(folder / "users.json"), jwt_keys=str(keys), jwt_issuer="i", jwt_audience="a"), SECRET))
    return _MADE[0]


def test_an_unknown_user_takes_as_long_as_a_wrong_password(users: str) -> None:
    loaded = Accounts.load(users)

    def seconds(name: str) -> float:
        began = time.perf_counter()
        assert loaded.user_of(name, "wrong") is None
        return time.perf_counter() - began

    pairs = [(seconds("ann"), seconds("nobody")) for _ in range(9)]
    known, unknown = (statistics.median(column) for column in zip(*pairs, strict=True))
    assert 0.5 < known / unknown < 2


def guesses(gate: Gate, name: str, number: int) -> list[str]:
    """What so many wrong passwords for a name are answered, one right after the other."""
    said = []
    for each in range(number):
        with pytest.raises(Unauthenticated) as caught:
            gate.admit(basic(name, f"wrong {each}"))
        said.append(re.sub(r"[0-9]+", "N", str(caught.value)))
    return said


PAUSE = "there were too many wrong passwords for this name; wait N seconds"


@pytest.mark.parametrize("name", ["ann", "nobody"])
def test_wrong_passwords_make_a_name_pause_and_nobody_else(users: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(auth, "PAUSE_SECONDS", 3.0)
    add_user(users, "bob", "long enough")
    gate = Gate(Config(users=users), SECRET)
    remembered = gate.admit(basic("ann", "correct horse")).principal
    assert guesses(gate, name, 5) == ["the credentials are not valid"] * 3 + [PAUSE] * 2
    assert gate.admit(basic("bob", "long enough")).principal.name == "bob"
    assert gate.admit(basic("ann", "correct horse")).principal == remembered  # who was let in before is not locked out
    time.sleep(3.1)
    assert guesses(gate, name, 2) == ["the credentials are not valid", PAUSE]


def test_who_is_right_begins_anew(users: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "PAUSE_SECONDS", 60.0)
    gate = Gate(Config(users=users), SECRET)
    assert guesses(gate, "ann", 2) == ["the credentials are not valid"] * 2
    gate.admit(basic("ann", "correct horse"))
    assert guesses(gate, "ann", 2) == ["the credentials are not valid"] * 2


def test_a_burst_of_guesses_is_no_way_around_the_pause(users: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "PAUSE_SECONDS", 60.0)
    gate = Gate(Config(users=users), SECRET)
    with ThreadPoolExecutor(50) as pool:
        said = [found for each in pool.map(lambda n: guesses_of(gate, n), range(50)) for found in each]
    assert said.count("the credentials are not valid") == 3
    assert said.count(PAUSE) == 47


def guesses_of(gate: Gate, number: int) -> list[str]:
    with pytest.raises(Unauthenticated) as caught:
        gate.admit(basic("ann", f"guess {number}"))
    return [re.sub(r"[0-9]+", "N", str(caught.value))]


def test_the_same_password_shown_many_times_at_once_is_checked_once(users: str) -> None:
    gate = Gate(Config(users=users), SECRET)
    with ThreadPoolExecutor(50) as pool:
        found = set(pool.map(lambda n: gate.admit(basic("ann", "correct horse")).principal.name, range(50)))
    assert found == {"ann"}


def test_one_login_too_many_at_once_is_told_to_try_again(users: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "PASSWORDS_WAITING_MAX", 0)
    with pytest.raises(TryAgain, match="too many logins are under way"):
        Gate(Config(users=users), SECRET).admit(basic("bob", "wrong"))


def test_what_was_admitted_is_so_no_more_when_its_proof_is_gone(users: str, issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that take long ask again: it is as with a new call, whatever was shown."""
    monkeypatch.setattr(bearers, "KEYS_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(bearers, "KEYS_SECONDS", 0.0)
    token, short = add_token(users, "svc", 1), add_token(users, "svc", 2 / 86400)
    gate = Gate(replace(issuer.config, users=users), SECRET)
    shown = [basic("ann", "correct horse"), f"Bearer {logged_in(gate, 'ann', 'correct horse')}", f"Bearer {token}", f"Bearer {short}"]
    admitted = [gate.admit(each) for each in (*shown, "Bearer " + signed(claims()))]
    assert [gate.again(each).name for each in admitted] == ["ann", "ann", "svc", "svc", "ann"]
    remove_user(users, "ann")
    remove_token(users, token.split("_")[1])
    issuer.keys = [PUBLIC["ES256"]]
    with pytest.raises(Unauthenticated):  # a bearer of an unknown key has the keys fetched
        gate.admit("Bearer " + signed(claims(), kid="unknown"))
    time.sleep(2.1)
    for each in admitted:
        with pytest.raises(Unauthenticated):
            gate.again(each)


def logged_in(gate: Gate, name: str, password: str) -> str:
    """The bearer that a login is answered with."""
    found = gate.bearer(gate.admit(basic(name, password)))
    assert found is not None
    return found


def test_what_was_proven_is_remembered_and_costs_nothing(users: str) -> None:
    gate = Gate(Config(users=users), SECRET)
    gate.admit(basic("ann", "correct horse"))
    began = time.monotonic()
    for _ in range(100):
        gate.admit(basic("ann", "correct horse"))
    assert time.monotonic() - began < 0.5  # a password takes 50 ms


def test_a_users_file_that_breaks_or_goes_leaves_the_users_as_they_were(users: str) -> None:
    gate = Gate(Config(users=users), SECRET)
    Path(users).write_text("{")
    assert gate.admit(basic("ann", "correct horse")).principal.name == "ann"
    gate.reload()
    assert gate.admit(basic("ann", "correct horse")).principal.name == "ann"
    Path(users).unlink()
    assert gate.admit(basic("ann", "correct horse")).principal.name == "ann"


# JWT bearers


@pytest.fixture
def config(tmp_path: Path) -> Config:
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": [*PUBLIC.values(), {"kty": "of a kind to come", "kid": "x"}]}))
    return Config(jwt_keys=str(keys), jwt_issuer="https://idp", jwt_audience="oplog")


@pytest.mark.parametrize("kind", bearers.ALGORITHMS)
def test_a_jwt_of_each_algorithm_names_its_principal_and_roles(config: Config, kind: str) -> None:
    gate = Gate(config, SECRET)
    bearer = signed(claims(roles=["b", "a", "b"]), kind)
    admitted = gate.admit("Bearer " + bearer)
    assert (admitted.principal.name, admitted.principal.roles, gate.bearer(admitted)) == ("ann", ("a", "b"), bearer)
    unnamed = jwt.encode(claims(), PRIVATE[kind], kind)
    assert gate.admit(f"Bearer {unnamed}").principal.name == "ann"


def test_claims_may_have_other_names_and_be_within_others(config: Config) -> None:
    keys = {"jwt_keys": config.jwt_keys, "jwt_issuer": "https://idp", "jwt_audience": "oplog"}
    gate = Gate(Config(**keys, jwt_principal_claim="preferred_username", jwt_roles_claim="realm_access.roles"), SECRET)
    body = claims(preferred_username="eve", realm_access={"roles": ["r"]})
    assert gate.admit("Bearer " + signed(body)).principal.roles == ("r",)
    assert gate.admit("Bearer " + signed(body)).principal.name == "eve"
    spaced = Gate(Config(**keys, jwt_roles_claim="scope"), SECRET)
    assert spaced.admit("Bearer " + signed(claims(scope="one two"))).principal.roles == ("one", "two")
    dotted = Gate(Config(**keys, jwt_roles_claim="https://x.y/roles"), SECRET)
    assert dotted.admit("Bearer " + signed(claims(**{"https://x.y/roles": ["z"]}))).principal.roles == ("z",)


OTHER = rsa.generate_private_key(65537, 2048)
PEM = PRIVATE["RS256"].public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def by_hand(header: dict[str, Any], body: dict[str, Any], key: bytes) -> str:
    """An HS256 JWT whatever its header says and whatever its key is; the library refuses to make such."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, body)]
    tag = HMACAlgorithm(HMACAlgorithm.SHA256).sign(b".".join(parts), key)
    return b".".join([*parts, base64.urlsafe_b64encode(tag).rstrip(b"=")]).decode()


WRONG_JWTS: dict[str, Callable[[], str]] = {
    "signed by another": lambda: signed(claims(), key=OTHER),
    "of another issuer": lambda: signed(claims(iss="https://evil")),
    "of no issuer": lambda: signed(claims(iss=None)),
    "for another audience": lambda: signed(claims(aud="others")),
    "for no audience": lambda: signed(claims(aud=None)),
    "that never expires": lambda: signed(claims(exp=None)),
    "not good yet": lambda: signed(claims(nbf=int(time.time()) + 120)),
    "issued in the future": lambda: signed(claims(iat=int(time.time()) + 120)),
    "that names nobody": lambda: signed(claims(sub=None)),
    "that names nothing": lambda: signed(claims(sub="")),
    "whose name is too long": lambda: signed(claims(sub="a" * 257)),
    "whose name is no text": lambda: jwt.encode(claims() | {"sub": 7}, PRIVATE["RS256"], "RS256"),
    "whose roles are a number": lambda: signed(claims(roles=7)),
    "whose roles are numbers": lambda: signed(claims(roles=[7])),
    "with one role too many": lambda: signed(claims(roles=[str(n) for n in range(101)])),
    "unsigned": lambda: jwt.encode(claims(), None, "none"),
    "of an unknown key": lambda: signed(claims(), kid="unknown"),
    "of a key of another kind": lambda: signed(claims(), kid="es256"),
    "with the public key as a shared secret": lambda: by_hand({"alg": "HS256", "kid": "rs256"}, claims(), PEM),
    "with the public key as a shared secret, unnamed": lambda: by_hand({"alg": "HS256"}, claims(), PEM),
    "that says RS256 and is HS256": lambda: by_hand({"alg": "RS256", "kid": "rs256"}, claims(), PEM),
    "in an algorithm not served": lambda: jwt.encode(claims(), PRIVATE["RS256"], "RS512", headers={"kid": "rs256"}),
    "cut short": lambda: signed(claims())[:-3],
    "with a body changed": lambda: ".".join([(p := signed(claims()).split("."))[0], signed(claims(sub="eve")).split(".")[1], p[2]]),
}


@pytest.mark.parametrize("wrong", WRONG_JWTS)
def test_a_jwt_that_is_not_right_is_refused(config: Config, wrong: str) -> None:
    with pytest.raises(Unauthenticated, match=r"^the credentials are not valid$"):
        Gate(config, SECRET).admit("Bearer " + WRONG_JWTS[wrong]())


def test_clocks_may_differ_by_the_skew_and_no_more(config: Config) -> None:
    gate = Gate(config, SECRET)
    now = int(time.time())
    for body in (claims(exp=now - 50), claims(nbf=now + 50), claims(iat=now + 50)):
        assert gate.admit("Bearer " + signed(body)).principal.name == "ann"
    with pytest.raises(Unauthenticated, match=r"^the bearer has expired; ask its issuer for another$"):
        gate.admit("Bearer " + signed(claims(exp=now - 62)))


def test_what_is_remembered_of_a_jwt_ends_when_it_expires(config: Config) -> None:
    gate = Gate(Config(jwt_keys=config.jwt_keys, jwt_issuer="https://idp", jwt_audience="oplog", jwt_skew_seconds=0), SECRET)
    bearer = "Bearer " + signed(claims(exp=int(time.time()) + 2))
    assert gate.admit(bearer).principal.name == "ann"
    time.sleep(3)
    with pytest.raises(Unauthenticated, match="has expired"):
        gate.admit(bearer)


@pytest.mark.parametrize("expires", [10**400, -1, 1e308, "soon", [], {}, None, True])
def test_strange_times_of_expiry_are_refused_or_taken_and_nothing_fails(config: Config, expires: Any) -> None:
    body = claims() | {"exp": expires}
    with_it = by_hand({"alg": "HS256", "kid": "hs256"}, body, PRIVATE["HS256"])
    try:
        assert Gate(config, SECRET).admit(f"Bearer {with_it}").principal.name == "ann"
    except Unauthenticated as error:
        assert expires != 10**400
        assert str(error) in ("the credentials are not valid", "the bearer has expired; ask its issuer for another")  # noqa: PT017


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"jwt_issuer": ""}, "settings jwt_issuer and jwt_audience are needed beside jwt_keys"),
        ({"jwt_audience": ""}, "settings jwt_issuer and jwt_audience are needed beside jwt_keys"),
        ({"jwt_keys": "http://idp.example/keys"}, "is read without TLS, and whoever is between may answer; use https://"),
        ({"jwt_keys": "/nowhere"}, "jwt_keys /nowhere: No such file or directory"),
        ({"client_ca": "/ca.pem"}, "settings client_ca and users or jwt_keys exclude each other"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(config: Config, changed: dict[str, str], said: str) -> None:
    whole = {"jwt_keys": config.jwt_keys, "jwt_issuer": "i", "jwt_audience": "a"} | changed
    with pytest.raises(RequestError, match=said):
        Gate(Config(**whole), SECRET)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not a JSON Web Key Set"),
        ("[]", "not a JSON Web Key Set"),
        ('{"keys": 1}', "not 1 to 100 keys"),
        ('{"keys": []}', "it has no key for RS256, ES256, EdDSA, HS256"),
        ('{"keys": [{}, 7, null, {"kty": "RSA"}, {"kty": "oct"}]}', "it has no key for RS256, ES256, EdDSA, HS256"),
        (json.dumps({"keys": [HMACAlgorithm.to_jwk(b"x" * 31, as_dict=True)]}), "an HS256 key has fewer than 32 bytes, and can be guessed"),
        (json.dumps({"keys": [PUBLIC["RS256"]] * 101}), "not 1 to 100 keys"),
        (json.dumps({"keys": [PUBLIC["RS256"] | {"use": "enc"}]}), "it has no key for"),
    ],
)
def test_a_key_set_that_cannot_be_used_is_refused(tmp_path: Path, text: str, said: str) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(text)
    with pytest.raises(RequestError, match=said):
        Gate(Config(jwt_keys=str(keys), jwt_issuer="i", jwt_audience="a"), SECRET)


def test_keys_behind_an_address_are_fetched_once_and_again_when_they_are_rotated(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bearers, "KEYS_PAUSE_SECONDS", 0.3)
    gate = Gate(issuer.config, SECRET)
    for _ in range(20):
        assert gate.admit("Bearer " + signed(claims())).principal.name == "ann"
    assert issuer.asked == 1
    issuer.keys = [PUBLIC["ES256"]]
    time.sleep(0.4)
    assert gate.admit("Bearer " + signed(claims(), "ES256")).principal.name == "ann"
    assert issuer.asked == 2
    with pytest.raises(Unauthenticated):  # it was withdrawn, and what was remembered of it is not good any more
        gate.admit("Bearer " + signed(claims()))


def test_unknown_keys_cannot_make_the_server_ask_its_issuer_all_the_time(issuer: Issuer) -> None:
    gate = Gate(issuer.config, SECRET)
    for number in range(50):
        with pytest.raises(Unauthenticated):
            gate.admit("Bearer " + signed(claims(), kid=f"unknown {number}"))
    assert issuer.asked == 1


def test_an_issuer_out_of_order_leaves_the_keys_as_they_were_for_an_hour(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bearers, "KEYS_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(bearers, "KEYS_SECONDS", 0.0)
    gate = Gate(issuer.config, SECRET)
    assert gate.admit("Bearer " + signed(claims())).principal.name == "ann"
    for status in (500, 302):
        issuer.status = status
        assert gate.admit("Bearer " + signed(claims(sub=f"at {status}"))).principal.name == f"at {status}"
    issuer.status, issuer.keys = 200, []
    assert gate.admit("Bearer " + signed(claims(sub="bob"))).principal.name == "bob"
    monkeypatch.setattr(bearers, "KEYS_STALE_SECONDS", 0.0)
    with pytest.raises(TryAgain, match="cannot be fetched; nothing was done; try again later"):
        gate.admit("Bearer " + signed(claims(sub="carol")))


def test_an_issuer_that_never_answered_makes_nobody_wrong(issuer: Issuer) -> None:
    issuer.status = 500
    gate = Gate(issuer.config, SECRET)
    with pytest.raises(TryAgain, match="cannot be fetched; nothing was done; try again later"):
        gate.admit("Bearer " + signed(claims()))
    with pytest.raises(RequestError, match=r"jwt_keys http://127.0.0.1:[0-9]+/keys: Internal Server Error"):
        gate.check()


# Together


def test_nobody_is_asked_where_no_credentials_are_set() -> None:
    gate = Gate(Config(), SECRET)
    assert gate.is_open
    for credential in (None, "Bearer x", basic("a", "b"), "junk"):
        assert gate.admit(credential).principal is ANYBODY


def test_grants_without_credentials_are_refused(tmp_path: Path) -> None:
    (tmp_path / "grants.toml").write_text("")
    with pytest.raises(RequestError, match="setting grants: nobody is asked who they are; set users, jwt_keys or client_ca too"):
        Gate(Config(grants=str(tmp_path / "grants.toml")), SECRET)


def test_users_and_jwts_are_taken_side_by_side_and_grants_are_read_again(users: str, config: Config, tmp_path: Path) -> None:
    grants = tmp_path / "grants.toml"
    grants.write_text('[principal.ann]\nread = ["t"]\n[role.r]\nappend = ["u"]\n')
    whole = Config(users=users, jwt_keys=config.jwt_keys, jwt_issuer="https://idp", jwt_audience="oplog", grants=str(grants))
    gate = Gate(whole, SECRET)
    by_password, by_jwt = gate.admit(basic("ann", "correct horse")), gate.admit("Bearer " + signed(claims(roles=["r"])))
    found = [(who.principal.may("read", "t"), who.principal.may("append", "u")) for who in (by_password, by_jwt)]
    assert found == [(True, False), (True, True)]
    grants.write_text("[principal.ann]\nread = 't'\n")
    gate.reload()
    assert gate.again(by_password).may("read", "t")
    grants.write_text('[principal.ann]\nread = ["v"]\n')
    gate.reload()
    assert (gate.again(by_password).may("read", "t"), gate.again(by_password).may("read", "v")) == (False, True)
    Path(users).write_text("{")  # one that is broken does not keep the other from being read
    grants.write_text('[principal.ann]\nread = ["w"]\n')
    gate.reload()
    assert gate.again(by_password).may("read", "w")
    assert gate.again(Admission(ANYBODY)) is ANYBODY


def test_a_secret_that_can_be_guessed_is_refused(users: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x" * 31 + "\n")
    with pytest.raises(RequestError, match="fewer than 32 bytes, and can be guessed; make one with: openssl rand -hex 32"):
        Gate(Config(users=users, secret=str(tmp_path / "secret")), SECRET)
    with pytest.raises(RequestError, match="No such file or directory"):
        Gate(Config(users=users, secret=str(tmp_path / "none")), SECRET)


def test_certificates_name_principals() -> None:
    gate = Gate(Config(client_ca="/ca.pem", tls_cert="/c", tls_key="/k"), SECRET)
    assert gate.certified("svc") == Admission(Principal("svc"))
    for name in ("", "a\nb", "a" * 257):
        with pytest.raises(Unauthenticated, match=r"^the certificate names nobody$"):
            gate.certified(name)
