"""What the rows of a data file say, but for their content, once more in its footer.

The rows of a file with many row groups lie far apart, each before its content: reading them takes a request or a seek for each.
A footer is read in one anyway. A summary is an Arrow IPC stream, compressed, with a digest before it; offsets in it count from the
file's first entry, as they do until the file is numbered.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import xxhash

from flight_oplog.schema import RECORD_SCHEMA

KEY = "oplog.records"
# A file of fewer row groups is read as fast without; a summary that would be larger is left out.
GROUPS_LEAST = 3
BYTES_MAX = 8 << 20
SCHEMA = pa.schema([RECORD_SCHEMA.field(name) for name in RECORD_SCHEMA.names if name not in ("topic", "filters", "content")])


def written(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return what the footer says of rows, by its key; nothing where that would be too much."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(list(rows), SCHEMA))
    data = sink.getvalue()
    text = f"{xxhash.xxh3_64_hexdigest(data)}:{base64.b64encode(data).decode()}"
    return {KEY: text} if len(text) <= BYTES_MAX else {}


def read(footer: Mapping[bytes, bytes] | None, rows: int) -> pa.Table | None:
    """Return the rows that a footer tells of, None where it has no summary. Raises ValueError when that is damaged."""
    text = (footer or {}).get(KEY.encode())
    if text is None:
        return None
    digest, _, packed = text.partition(b":")
    data = base64.b64decode(packed, validate=True)
    if xxhash.xxh3_64_hexdigest(data).encode() != digest:
        raise ValueError("it is not what its digest says")
    found = pa.ipc.open_stream(data).read_all()
    if found.schema != SCHEMA or len(found) != rows:
        raise ValueError("it has other columns, or rows")
    return found
