"""Sequences that only grow, and of which earlier states are kept: what a topic's files are from one snapshot to the next."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, overload

Item = TypeVar("Item")


class Growing(Sequence[Item]):
    """An immutable sequence. The one that it grows into shares its items, so growing costs what is added, not what is there.

    Any thread may read; one at a time may grow those that share their items.
    """

    __slots__ = ("_items", "_length")

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self._items = list(items)
        self._length = len(self._items)

    def grown(self, added: Iterable[Item]) -> Growing[Item]:
        """Return a sequence of these items and some more."""
        found: Growing[Item] = Growing()
        # Only where nothing else has grown out of this one is the end of the list the end of this.
        found._items = self._items if len(self._items) == self._length else self._items[: self._length]
        found._items.extend(added)
        found._length = len(found._items)
        return found

    def upto(self, length: int) -> Growing[Item]:
        """Return a sequence of its first items, shared."""
        found: Growing[Item] = Growing()
        found._items, found._length = self._items, min(length, self._length)
        return found

    def shares(self, other: Growing[Item]) -> bool:
        """Whether the shorter of the two is how the longer one begins, as one grew out of the other or both out of a third."""
        return self._items is other._items

    def taken(self, places: Iterable[int]) -> list[Item]:
        """Return the items at some places, which are all there."""
        return [self._items[place] for place in places]

    @property
    def root(self) -> int:
        """A number that is the same of all that share, and of no others while one of them is there."""
        return id(self._items)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Item]:
        return itertools.islice(self._items, self._length)

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> list[Item]: ...

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            first, last, step = place.indices(self._length)
            return self._items[first:last:step] if step > 0 else [self._items[at] for at in range(first, last, step)]
        if not -self._length <= place < self._length:
            raise IndexError("there is no such item")
        return self._items[place if place >= 0 else place + self._length]
