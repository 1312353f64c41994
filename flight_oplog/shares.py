"""Places that many want: the last eighth of them is for principals who have no other, so that one cannot take them all."""

from __future__ import annotations

from collections import Counter


class Shares:
    """How many places are taken, and by whom. For use under a lock of its owner's."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._taken: Counter[str | None] = Counter()
        self.all = 0

    def is_free(self, principal: str | None) -> bool:
        """Whether there is a place for a principal; None is whoever calls where nobody is asked who they are."""
        kept = self._places // 8 if principal is not None and self._taken[principal] else 0
        return self.all < self._places - kept

    def has(self, principal: str | None) -> bool:
        """Whether a principal has a place."""
        return principal in self._taken

    def take(self, principal: str | None) -> None:
        self._taken[principal] += 1
        self.all += 1

    def give(self, principal: str | None) -> None:
        """Give back a place that was taken."""
        self.all -= 1
        self._taken[principal] -= 1
        if not self._taken[principal]:
            del self._taken[principal]
