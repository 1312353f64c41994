"""A sequence that grows and keeps what it was, against a tuple that does the same."""

import bisect
import random
import threading
import time

import pytest

from flight_oplog.growing import Growing

SEEDS = 20


@pytest.mark.parametrize("seed", range(SEEDS))
def test_it_is_a_tuple_that_shares(seed: int) -> None:
    some = random.Random(seed)
    states = [(Growing(range(3)), tuple(range(3))), (Growing(), ())]
    for _ in range(60):
        growing, known = some.choice(states)  # an earlier one grows too, and away from those that it grew into
        added = [some.randrange(100) for _ in range(some.randrange(4))]
        states.append((growing.grown(added), (*known, *added)))
    for growing, known in states:
        assert tuple(growing) == known
        assert len(growing) == len(known)
        assert bool(growing) == bool(known)
        assert tuple(reversed(growing)) == known[::-1]
        for first in range(-6, 7):
            for last in (None, *range(-6, 7)):
                for step in (None, 2, -1):
                    assert tuple(growing[first:last:step]) == known[first:last:step]
        for place in range(-len(known) - 2, len(known) + 2):
            if -len(known) <= place < len(known):
                assert growing[place] == known[place]
            else:
                with pytest.raises(IndexError, match="there is no such item"):
                    growing[place]
    ordered = Growing(range(0, 100, 2)).grown(range(100, 200, 2))
    assert all(bisect.bisect_right(ordered, each) == each // 2 + 1 for each in range(199))


def test_growing_costs_what_is_added() -> None:
    def seconds(length: int) -> float:
        growing, began = Growing(range(length)), time.perf_counter()
        for _ in range(2000):
            growing = growing.grown([1])
        return time.perf_counter() - began

    assert min(seconds(1_000_000) for _ in range(3)) < 10 * min(seconds(1_000) for _ in range(3))


def test_readers_see_what_was_there_while_it_grows() -> None:
    newest, wrong = [Growing([0])], []

    def read() -> None:
        while newest[0][-1] < 20_000:
            seen = newest[0]
            if list(seen) != list(range(len(seen))):
                wrong.append(len(seen))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(1, 20_001):
        newest[0] = newest[0].grown([number])
    for reader in readers:
        reader.join()
    assert not wrong
