"""Columns of numbers and times as numpy sees them: without a copy, without nulls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa

_NUMBERS = (pa.types.is_integer, pa.types.is_float32, pa.types.is_float64, pa.types.is_timestamp, pa.types.is_date32)

# Where values are among others, rising.
Places: TypeAlias = range | np.ndarray


class Ends(NamedTuple):
    """The least and the greatest value of an array, and whether none is less than the one before it, as with times of a log."""

    least: Any
    greatest: Any
    are_rising: bool


@dataclass(frozen=True, slots=True)
class Noted:
    """What was found out of a record's stored columns when it was asked for: ends, and the values of those that have no nulls."""

    ends: dict[tuple[str, pa.DataType], list[Ends]] = field(default_factory=dict)
    numbers: dict[str, list[np.ndarray] | None] = field(default_factory=dict)


def is_number(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in _NUMBERS)


def numbers(column: Sequence[pa.Array]) -> np.ndarray:
    """Return the values of a column of numbers or times as numbers; anything where it is null."""
    parts = []
    for part in column:
        if len(part):
            kind = part.type
            dtype = np.dtype(kind.to_pandas_dtype() if not pa.types.is_temporal(kind) else f"i{kind.bit_width // 8}")
            parts.append(np.frombuffer(part.buffers()[1], dtype, len(part), part.offset * dtype.itemsize))
    return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0)])


def ends(part: pa.Array) -> Ends:
    """Return the least and the greatest of an array's values, and of what is where it is null; with a NaN it may have any."""
    values = numbers([part])
    if not len(values):
        return Ends(0, 0, True)
    if (values[:-1] <= values[1:]).all():
        return Ends(values[0].item(), values[-1].item(), True)
    least, greatest = values.min().item(), values.max().item()
    return Ends(-math.inf, math.inf, False) if math.isnan(least) else Ends(least, greatest, False)
