"""Memories of a bounded size."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


def remember(kept: OrderedDict[Key, Value], key: Key, value: Value, most: int) -> None:
    """Keep a value as the newest of at most so many; the oldest go. Other threads may do the same."""
    kept[key] = value
    with contextlib.suppress(KeyError):  # another thread may have been here
        kept.move_to_end(key)
        while len(kept) > most:
            kept.popitem(last=False)
