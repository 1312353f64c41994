"""What the log knows of its producers.

A producer names itself and counts its appends to a topic: 0, 1, 2, ... The rules are Kafka's: the next
number is accepted; one already committed is answered again with the original receipt and writes nothing; a gap is an
error that names the number expected; a number from an older epoch is fenced off; a newer epoch begins again at 0. The
last number and epoch ride in the same Delta commit as the entries (`txn` actions), so they survive whatever the
entries survive, and racing servers agree on them. Original receipts are remembered for a while, and found again in the
records themselves after that.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from dataclasses import replace

from flight_oplog.appends import Append, Receipt
from flight_oplog.errors import OplogError, OutOfOrder
from flight_oplog.kept import remember
from flight_oplog.store import Snapshot, Store

RECEIPTS_KEPT = 65_536
# How far back in a topic an original receipt is looked for when it is no longer remembered.
RECORDS_SEARCHED_MAX = 256


class Producers:
    """The newest number and epoch are the table's; receipts are remembered here."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._receipts: OrderedDict[tuple[str, str, int, int], tuple[Receipt, str | None]] = OrderedDict()

    def last(self, base: Snapshot, topic: str, producer: str) -> tuple[int, int]:
        """Return (epoch, sequence) of the producer's newest append to the topic; the sequence is -1 before the first."""
        epoch, sequence = self._store.numbers(base, f"epoch/{topic}/{producer}", f"producer/{topic}/{producer}")
        return epoch or 0, -1 if sequence is None else sequence

    def remember(self, key: tuple[str, str, int, int], receipt: Receipt, principal: str | None) -> None:
        remember(self._receipts, key, (receipt, principal), RECEIPTS_KEPT)

    def original(self, append: Append, snapshot: Snapshot, table_version: int) -> Receipt:
        """Return the receipt of the append that this one repeats, as far as it can still be told.

        Raises OutOfOrder when another principal wrote it under the producer's name: then it is no repetition, and is not written.
        """
        assert append.key is not None
        receipt, principal = self._receipts.get(append.key, (None, None))
        if receipt is None:
            first_offset, entries = None, None
            with contextlib.suppress(OplogError):  # that it is a duplicate stands, whatever can be read of it
                first_offset, entries, principal = _find_run(append.key, snapshot) or (None, None, None)
            receipt = Receipt(append.topic, first_offset, entries, table_version, append.origin.sequence)
        if principal is not None and principal != append.origin.principal:
            raise OutOfOrder(
                f"topic {append.topic!r}: sequence {append.origin.sequence} of producer {append.origin.producer!r} is another principal's; "
                "nothing was written; choose another name for the producer"
            )
        return replace(receipt, duplicate=True)


def _find_run(key: tuple[str, str, int, int], snapshot: Snapshot) -> tuple[int, int, str | None] | None:
    """Look the newest records through, backwards, for the run of entries that an append wrote: (first offset, entries, principal)."""
    topic, *wanted = key
    found: tuple[int, int, str | None] | None = None
    left = RECORDS_SEARCHED_MAX
    for file in reversed(snapshot.topics[topic].files if topic in snapshot.topics else ()):
        for record in reversed(snapshot.store.reader.records(file)):
            end = record.first_offset + record.entries
            for owner in reversed(record.appends):
                start = end - owner["entries"]
                if [owner["producer"], owner["epoch"], owner["sequence"]] == wanted:
                    found = (start, (found[1] if found else 0) + owner["entries"], owner["principal"])
                elif found is not None:
                    return found
                end = start
            left -= 1
            if left == 0 and found is None:
                return None
    return found
