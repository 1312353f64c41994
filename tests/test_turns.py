"""Whose turn it is: so many statements at once, in the order they came, and always a place for who has none."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest
from conftest import eventually

from flight_oplog.errors import Cancelled, TryAgain
from flight_oplog.sql.turns import Turns

Take = Callable[..., threading.Event]


def never() -> bool:
    return False


@pytest.fixture
def held() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def test_the_last_eighth_is_for_who_has_none(held: contextlib.ExitStack) -> None:
    turns = Turns(8, 0, 0.2)
    for _ in range(7):
        held.enter_context(turns.turn(never, "ann"))
    with pytest.raises(TryAgain):
        held.enter_context(turns.turn(never, "ann"))
    with turns.turn(never, "bob"), pytest.raises(TryAgain), turns.turn(never, "bob"):
        pass
    held.enter_context(turns.turn(never, "carol"))
    with pytest.raises(TryAgain):
        held.enter_context(turns.turn(never, "dan"))


def test_where_nobody_is_asked_who_they_are_all_have_every_place(held: contextlib.ExitStack) -> None:
    turns = Turns(8, 0, 0.2)
    for _ in range(8):
        held.enter_context(turns.turn(never))
    with pytest.raises(TryAgain):
        held.enter_context(turns.turn(never))


def test_who_waits_for_a_place_of_their_own_holds_up_nobody(held: contextlib.ExitStack) -> None:
    turns = Turns(8, 8, 30)
    mine = [held.enter_context(turns.turn(never, "ann")) for _ in range(7)]
    got: list[str] = []

    def take(name: str) -> None:
        with contextlib.suppress(Cancelled), turns.turn(never, name):
            got.append(name)

    waiting = threading.Thread(target=take, args=("ann",), daemon=True)
    waiting.start()
    assert eventually(lambda: len(turns._waiting) == 1)
    take("bob")  # came later, and has a place at once
    assert got == ["bob"]
    mine[0].end()
    waiting.join(10)
    assert got == ["bob", "ann"]


def test_the_last_places_of_those_that_wait_are_for_who_has_none_too(held: contextlib.ExitStack) -> None:
    turns = Turns(1, 8, 30)
    held.enter_context(turns.turn(never, "ann"))
    over = threading.Event()

    def take(name: str) -> None:
        with contextlib.suppress(Cancelled, TryAgain), turns.turn(over.is_set, name):
            pass

    threads = [threading.Thread(target=take, args=("ann",), daemon=True) for _ in range(7)]
    for thread in threads:
        thread.start()
    assert eventually(lambda: len(turns._waiting) == 7)
    with pytest.raises(TryAgain, match="statements run and 7 wait"):
        held.enter_context(turns.turn(never, "ann"))
    threads.append(threading.Thread(target=take, args=("bob",), daemon=True))
    threads[-1].start()
    assert eventually(lambda: len(turns._waiting) == 8)
    over.set()
    for thread in threads:
        thread.join(10)
