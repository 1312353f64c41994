"""Filters as DataFusion hands them over, applied to a record's entries by Arrow: only where Arrow answers as SQL does."""

from __future__ import annotations

import functools
import itertools
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow import acero
from pyarrow.fs import LocalFileSystem

from flight_oplog.numbers import Ends, Places, is_number, numbers

_FORMAT = ds.IpcFileFormat()
_FILESYSTEM = LocalFileSystem()
_EQUALS_TEXT = re.compile(r'\((\w+) == "([^"\\]*)"\)')


class CannotFilter(Exception):
    """DataFusion pushed a filter that Arrow has no kernel for; plan again and let DataFusion apply it itself."""


@dataclass(frozen=True)
class Filter:
    """One scan's filter: `keys` are the columns it reads; `wanted` is a column of texts and what it has to be for a row to pass.

    `range` holds the comparisons that are all there is to it, of its only column with a number.
    """

    expression: pc.Expression
    keys: tuple[str, ...]
    wanted: tuple[str, str] | None = None
    range: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, expression: Any, schema: pa.Schema) -> Filter:
        """Look at a filter of columns of `schema`. Raises CannotFilter when Arrow cannot apply it.

        An expression cannot be walked from Python; it can only fail to bind, to all columns or to all but one.
        """
        if not isinstance(expression, pc.Expression):  # DataFusion hands a filter that folded to a constant over as a scalar
            raise CannotFilter(str(expression))
        text = str(expression)
        if (found := _range_of(expression, text, schema)) is not None:
            return found
        named = [column for column in schema if column.name in text]
        try:
            _bind(expression, pa.schema(named))
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise CannotFilter(text) from error
        keys = [column.name for column in named]
        if len(named) > 1:
            keys = [column.name for column in named if not _binds(expression, pa.schema([other for other in named if other != column]))]
        return cls(expression, tuple(keys), _text_wanted(expression, text, schema, keys))

    @classmethod
    def of_range(cls, key: str, compared: Sequence[str], values: pa.Array) -> Filter:
        """Return the filter of numbers or times that have to compare so (">=", "<", ..., "==") with each of some values of their type."""
        parts = [_OPERATORS[each](pc.field(key), value) for each, value in zip(compared, values, strict=True)]
        ends = [(how, value) for each, value in zip(compared, numbers([values]).tolist(), strict=True) for how in _ENDS.get(each, (each,))]
        return cls(functools.reduce(operator.and_, parts), (key,), range=tuple(ends))

    def check(self, schema: pa.Schema, may_hold_nan: Callable[[str], bool]) -> None:
        """Raise CannotFilter where Arrow would answer otherwise than SQL does, going by which columns may hold a NaN.

        Arrow's IN says false for null, so its negation keeps nulls; and Arrow's NaN is unequal to and unordered with
        everything, while DataFusion's is the largest value.
        """
        text = str(self.expression)
        if "is_in(" in text and "invert(" in text:
            raise CannotFilter(text)
        floats = [name for name in self.keys if pa.types.is_floating(schema.field(name).type)]
        if floats and ("nan" in text.lower() or any(map(may_hold_nan, floats))):
            raise CannotFilter(text)

    def spans(self, schema: pa.Schema) -> dict[str, tuple[Any, Any]]:
        """Return (least, greatest) for columns of numbers or times outside of which nothing passes, None for an open end.

        Each number that a column is compared with may be such an end; Arrow has to find that nothing passes beyond it.
        """
        if self.range:
            lows = [_beside(value, 1) if compared == ">" else value for compared, value in self.range if compared in (">", ">=")]
            highs = [_beside(value, -1) if compared == "<" else value for compared, value in self.range if compared in ("<", "<=")]
            return {self.keys[0]: (max(lows, default=None), min(highs, default=None))}
        found: dict[str, tuple[Any, Any]] = {}
        for name, _, text in _COMPARISON.findall(str(self.expression))[:COMPARISONS_MAX]:
            if name not in self.keys or not is_number(schema.field(name).type):
                continue
            column, kind = pc.field(name), schema.field(name).type
            try:
                value = pa.array([text]).cast(kind)
            except pa.ArrowInvalid:
                continue
            if _may_pass(self.expression, schema, column.is_null()):
                continue
            low, high = found.get(name, (None, None))
            end = numbers([value])[0].item()
            if not _may_pass(self.expression, schema, column < value[0]):
                low = end if low is None else max(low, end)
            if not _may_pass(self.expression, schema, column > value[0]):
                high = end if high is None else min(high, end)
            found[name] = (low, high)
        return {name: span for name, span in found.items() if span != (None, None)}

    def among(self, schema: pa.Schema, name: str) -> list[pa.Scalar] | None:
        """Return values of which a column has to have one for a row to pass; None where that is not known of it.

        Guessed from the filter's words. Then Arrow has to find that nothing passes that is less, between them, greater or null.
        """
        kind, text = schema.field(name).type, str(self.expression)
        words = [value for column, value in _EQUALS_TEXT.findall(text) if column == name]
        words += [value for column, compared, value in _COMPARISON.findall(text) if (column, compared) == (name, "==")]
        for column, listed in _IN_LIST.findall(text):
            words += [word.strip().strip('"') for word in listed.split(",")] if column == name else []
        try:
            values = pa.array(sorted({*words[:COMPARISONS_MAX]})).cast(kind).unique().sort() if words else []
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return None
        if not len(values) or len(words) > COMPARISONS_MAX:
            return None
        column = pc.field(name)
        others = [column.is_null(), column < values[0], column > values[-1]]
        others += [(column > low) & (column < high) for low, high in itertools.pairwise(values)]
        return None if any(_may_pass(self.expression, schema, other) for other in others) else list(values)

    def within(self, column: Sequence[pa.Array], ends: Sequence[Ends]) -> np.ndarray:
        """Return the places of the values of the filter's only column that are in its range; `ends` are those of its parts."""
        return _joined(self._within_each(column, ends))

    def _within_each(self, column: Sequence[pa.Array], ends: Sequence[Ends]) -> Iterator[Places]:
        start, compares = 0, [(COMPARES[compared], value) for compared, value in self.range]
        for part, (least, greatest, are_rising) in zip(column, ends, strict=True):
            of_least, of_greatest = ([compare(end, value) for compare, value in compares] for end in (least, greatest))
            if all(of_least) and all(of_greatest) and not part.null_count:
                yield range(start, start + len(part))
            elif all(map(operator.or_, of_least, of_greatest)):  # else all are on the wrong side of one
                values = numbers([part])
                if are_rising and not part.null_count:
                    first, end = self._run_in(values)
                    yield range(start + first, start + end)
                else:
                    passes = self._passing_numbers(values)
                    if part.null_count:
                        passes &= part.is_valid().to_numpy(zero_copy_only=False)
                    yield np.flatnonzero(passes) + start
            start += len(part)

    def _passing_numbers(self, values: np.ndarray) -> np.ndarray:
        """Return which of some values are in the range."""
        one = self.range[0][1]
        if {*self.range} == {(">=", one), ("<=", one)}:
            return np.asarray(values == one)
        return functools.reduce(operator.and_, (COMPARES[compared](values, value) for compared, value in self.range))

    def _run_in(self, rising: np.ndarray) -> tuple[int, int]:
        """Return where the values that are in the range begin and end, of ones that rise."""
        low, high = 0, len(rising)
        for compared, value in self.range:
            place = int(np.searchsorted(rising, rising.dtype.type(value), _SIDES[compared]))
            low, high = (max(low, place), high) if compared in (">", ">=") else (low, min(high, place))
        return low, max(low, high)

    def passing_codes(self, coded: pa.DictionaryArray, kind: pa.DataType) -> np.ndarray:
        """Return the places of the codes of texts that pass, of the filter's only column, of type `kind`; looks at each text once."""
        texts = pa.concat_arrays([coded.dictionary, pa.nulls(1, pa.string())]).cast(kind)
        found = self.passing([pa.RecordBatch.from_arrays([texts], [self.keys[0]])])
        passes = np.zeros(len(texts), bool)
        passes[slice(None) if found is None else found] = True
        codes, null = coded.indices, len(texts) - 1
        return np.flatnonzero(passes[pc.fill_null(codes.cast(pa.uint32()), null).to_numpy() if codes.null_count else codes.to_numpy()])

    def passing(self, batches: Iterable[pa.RecordBatch]) -> np.ndarray | None:
        """Return the places of the rows that pass, in batches of the filter's columns counted through; None where all do."""
        found = list(batches)
        if not found:
            return np.zeros(0, np.int64)
        plan = [acero.Declaration("table_source", acero.TableSourceNodeOptions(pa.Table.from_batches(found)))]
        plan.append(acero.Declaration("project", acero.ProjectNodeOptions([self.expression], ["passes"])))
        passes = acero.Declaration.from_sequence(plan).to_table(use_threads=False).column("passes")
        chunks = pc.fill_null(passes, False).chunks
        count = sum(chunk.true_count for chunk in chunks)
        if 0 < count == len(passes):
            return None
        return np.flatnonzero(np.concatenate([_truths(chunk) for chunk in chunks])) if count else np.zeros(0, np.int64)


def fragment(name: str, guarantee: pc.Expression | None) -> ds.Fragment:
    """Return a fragment of no real file, of whose rows `guarantee` holds; its path is `name`."""
    return _FORMAT.make_fragment(name, _FILESYSTEM, pc.scalar(True) if guarantee is None else guarantee)


def passing(fragments: Sequence[ds.Fragment], schema: pa.Schema, expression: pc.Expression) -> Iterator[ds.Fragment]:
    """Return those fragments whose guarantee does not rule out a filter, by Arrow's own simplification of expressions.

    Arrow offers it only through the fragments of a file system dataset.
    """
    return ds.FileSystemDataset(fragments, schema, _FORMAT, _FILESYSTEM).get_fragments(expression)  # type: ignore[no-any-return]


def _beside(value: Any, direction: int) -> Any:
    """Return the next number, or the one before."""
    if isinstance(value, float):
        return math.nextafter(value, direction * math.inf)
    return min(max(value + direction, -(1 << 63)), (1 << 63) - 1)


def _bind(filter: pc.Expression, schema: pa.Schema) -> None:
    """Raise when the filter does not bind to the schema; Arrow offers binding only as part of something else."""
    next(passing([], schema, filter), None)


def _binds(filter: pc.Expression, schema: pa.Schema) -> bool:
    try:
        _bind(filter, schema)
    except pa.ArrowInvalid:
        return False
    return True


def _text_wanted(expression: pc.Expression, text: str, schema: pa.Schema, keys: Sequence[str]) -> tuple[str, str] | None:
    """Return a column of texts, and what it must be where the filter is to pass; None where there is none.

    Guessed from the filter's words. Then Arrow has to find that nothing passes that is less, or greater, or null.
    """
    for name, value in _EQUALS_TEXT.findall(text):
        if name in keys and schema.field(name).type == pa.string():
            column = pc.field(name)
            if not any(_may_pass(expression, schema, other) for other in (column < value, column > value, column.is_null())):
                return name, value
    return None


def _joined(found: Iterable[Places]) -> np.ndarray:
    """Return places as one array; of ranges that follow one another, it is made at once."""
    joined: list[Places] = [range(0)]
    for each in found:
        last = joined[-1]
        if isinstance(last, range) and isinstance(each, range) and (last.stop == each.start or not last):
            joined[-1] = range(last.start if last else each.start, each.stop)
        else:
            joined.append(each)
    arrays = [np.arange(each.start, each.stop) if isinstance(each, range) else each for each in joined]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


COMPARES = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
_OPERATORS, _ENDS = COMPARES | {"==": operator.eq}, {"==": (">=", "<=")}
_SIDES: dict[str, Literal["left", "right"]] = {">=": "left", ">": "right", "<": "left", "<=": "right"}
_COMPARISON = re.compile(r"\((\w+) (>=|>|<=|<|==) ([^()\"]+)\)")
_IN_LIST = re.compile(r"is_in\((\w+), \{value_set=[^\n]+:\[\n([^\]]*)\n\]")
COMPARISONS_MAX = 20


def _range_of(expression: pc.Expression, text: str, schema: pa.Schema) -> Filter | None:
    """Return a filter that compares one column of numbers or times, and nothing else.

    Guessed from the filter's words, then compared with it; None for any other. What is compared is of the column's type: Arrow can.
    """
    found = _COMPARISON.findall(text)
    if len({name for name, _, _ in found}) != 1 or any(compared not in _OPERATORS for _, compared, _ in found):
        return None
    place = schema.get_field_index(key := found[0][0])
    if place < 0 or not is_number(kind := schema.field(place).type):
        return None
    try:
        values = pa.array([value for _, _, value in found]).cast(kind)
    except pa.ArrowInvalid:
        return None
    guessed = Filter.of_range(key, [compared for _, compared, _ in found], values)
    return guessed if expression.equals(guessed.expression) else None


def _may_pass(expression: pc.Expression, schema: pa.Schema, guarantee: pc.Expression) -> bool:
    """Whether a row may pass of which `guarantee` holds, as far as Arrow sees."""
    return any(True for _ in passing([fragment("", guarantee)], schema, expression))


# Texts by their beginning

_HEAD_BYTES = 8
_MASKS = np.array([(1 << 8 * size) - 1 for size in range(_HEAD_BYTES)] + [(1 << 64) - 1], np.uint64)
INDEXED_FROM = 16  # fewer different beginnings tell too little


def _heads(texts: pa.Array) -> np.ndarray:
    """Return the first eight bytes of each text as a number; shorter ones end in zeros, null ones are anything."""
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int32, len(texts) + 1, texts.offset * 4)
    sizes = np.diff(ends)
    if len(sizes) and sizes[0] >= _HEAD_BYTES and (sizes == sizes[0]).all():  # as ids are: they lie in a row
        return np.ndarray((len(sizes),), "<u8", data, int(ends[0]), (int(sizes[0]),))
    held = np.frombuffer(data, np.uint8)[ends[0] : ends[-1]] if data is not None else np.zeros(0, np.uint8)
    held = np.concatenate([held, np.zeros(_HEAD_BYTES, np.uint8)])
    heads: np.ndarray = np.ndarray((len(held) - _HEAD_BYTES + 1,), "<u8", held, 0, (1,))[ends[:-1] - ends[0]]
    return heads & _MASKS[np.minimum(sizes, _HEAD_BYTES)]


def _head(text: str) -> int:
    return int.from_bytes(text.encode()[:_HEAD_BYTES], "little")


@dataclass(frozen=True, slots=True)
class TextIndex:
    """Where in a record which texts are, by their first eight bytes. About six bytes a row and twenty for each beginning."""

    heads: np.ndarray  # rising, none twice
    starts: np.ndarray  # of each one's places in `places`; one more than there are heads
    places: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[pa.Array]) -> TextIndex | None:
        """Index the texts of a record, or codes of them; None where too few begin differently."""
        of_record = _codes_in(texts)
        different = texts if of_record is None else [of_record.dictionary]
        coded = pa.array(np.concatenate([_heads(part) for part in different])).dictionary_encode()
        heads, codes = coded.dictionary.to_numpy(), coded.indices.to_numpy()
        if len(heads) < INDEXED_FROM:
            return None
        if of_record is not None:
            codes = codes[pc.fill_null(of_record.indices, 0).to_numpy()]  # null may be found: it is no answer
        ranks = np.empty(len(heads), np.uint16 if len(heads) <= 1 << 16 else np.uint32)
        rising = np.argsort(heads)
        ranks[rising] = np.arange(len(heads))
        ranked = ranks[codes]
        starts = np.concatenate([[0], np.cumsum(np.bincount(ranked, minlength=len(heads)))])
        return cls(heads[rising], starts, np.argsort(ranked, kind="stable").astype(np.uint32))  # 16 bits are sorted by radix

    @property
    def nbytes(self) -> int:
        return int(self.heads.nbytes + self.starts.nbytes + self.places.nbytes)

    def candidates(self, text: str) -> np.ndarray:
        """Return the places, rising, of the texts that begin as `text` does."""
        head = np.uint64(_head(text))
        rank = int(np.searchsorted(self.heads, head))
        if rank == len(self.heads) or self.heads[rank] != head:
            return self.places[:0]
        return self.places[self.starts[rank] : self.starts[rank + 1]]


def candidates(texts: Sequence[pa.Array], text: str) -> np.ndarray:
    """Return the places of texts of the same length that begin as `text` does, or that codes say are it, without an index."""
    coded = _codes_in(texts)
    if coded is not None:
        code = pc.index(coded.dictionary, pa.scalar(text)).as_py()
        return np.zeros(0, np.int64) if code < 0 else _places_of(coded.indices, np.uint16(code))
    found, start, size = [], 0, len(text.encode())
    for part in texts:
        ends = np.frombuffer(part.buffers()[1], np.int32, len(part) + 1, part.offset * 4) if len(part) else np.zeros(1, np.int32)
        fitting = np.flatnonzero(np.diff(ends) == size)
        if len(fitting):
            found.append(fitting[_heads(part)[fitting] == np.uint64(_head(text))] + start)
        start += len(part)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _codes_in(texts: Sequence[pa.Array]) -> pa.DictionaryArray | None:
    """Return the codes that stand in the place of texts, if they do."""
    return texts[0] if len(texts) == 1 and pa.types.is_dictionary(texts[0].type) else None


def _places_of(codes: pa.Array, code: np.uint16) -> np.ndarray:
    found = np.flatnonzero(numbers([codes]) == code)
    return found[codes.take(pa.array(found)).is_valid().to_numpy(zero_copy_only=False)] if codes.null_count else found


def _truths(mask: pa.BooleanArray) -> np.ndarray:
    """Return a mask without nulls as one byte a row; pyarrow's own way takes six times as long."""
    bits = np.unpackbits(np.frombuffer(mask.buffers()[1], np.uint8), count=mask.offset + len(mask), bitorder="little")
    return bits[mask.offset :].view(bool)
