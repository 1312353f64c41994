"""The texts of a column, numbered as they are first seen: grouping by numbers takes half of what grouping by texts does."""

from __future__ import annotations

import threading

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flight_oplog.codes import CODE_BYTES, CODED, TEXTS_BYTES_MAX, TEXTS_MAX
from flight_oplog.errors import TooLarge

# As codes are, so that these can be numbers.
NUMBER = CODED.index_type
NUMBER_BYTES = CODE_BYTES


class Vocabulary:
    """Texts and their numbers, which never change once they are given. Thread-safe."""

    def __init__(self) -> None:
        self.is_full = False
        self.bytes_counted = 0  # of its texts, by its owner
        self._texts = pa.array([], pa.string())
        self._last = pa.array([], pa.string()), np.zeros(0, np.uint16)  # what was looked for last, and its numbers
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def nbytes(self) -> int:
        return int(self._texts.nbytes + self._last[0].nbytes)

    def numbers(self, texts: pa.Array) -> pa.Array:
        """Return the numbers of texts, or of codes of them, null for null. Raises TooLarge for too many different ones."""
        coded = texts if pa.types.is_dictionary(texts.type) else texts.dictionary_encode()
        places, indices = self._places(coded.dictionary), coded.indices
        if not indices.null_count:
            are_numbers = indices.type == NUMBER and np.array_equal(places, np.arange(len(places)))
            return indices if are_numbers else pa.array(places.take(indices.to_numpy()))
        found = np.append(places, np.uint16(0)).take(pc.fill_null(indices, 0).to_numpy())
        return pa.Array.from_buffers(NUMBER, len(found), [pc.is_valid(indices).buffers()[1], pa.py_buffer(found)])

    def texts(self, numbers: pa.ChunkedArray) -> pa.ChunkedArray:
        """Return the texts that have these numbers."""
        return self._texts.take(numbers)

    def _places(self, different: pa.Array) -> np.ndarray:
        known = self._last
        if different.equals(known[0]):  # as records of one append have
            return known[1]
        places = pc.index_in(different, self._texts)
        if places.null_count:
            places = self._grown(different)
        found: np.ndarray = places.to_numpy().astype(np.uint16)
        self._last = different.take(pa.array(np.arange(len(different)))), found  # a copy: it may show pages of a file
        return found

    def _grown(self, different: pa.Array) -> pa.Array:
        with self._lock:
            places = pc.index_in(different, self._texts)
            if places.null_count:
                texts = pa.concat_arrays([self._texts, different.filter(pc.is_null(places))])
                if len(texts) > TEXTS_MAX or texts.nbytes > TEXTS_BYTES_MAX:
                    self.is_full = True
                    raise TooLarge(f"a column has more than {TEXTS_MAX} different texts, or {TEXTS_BYTES_MAX} bytes of them")
                self._texts, places = texts, pc.index_in(different, texts)
            return places
