"""deltalake as a process: opens the table in a folder, then answers statements about it, one a line, by how long each took.

python deltalake_process.py FOLDER        # the table's name is `records`
"""

from __future__ import annotations

import sys
import time

import pyarrow as pa
from deltalake import DeltaTable, QueryBuilder


def main() -> None:
    builder = QueryBuilder().register("records", DeltaTable(sys.argv[1]))
    for sql in sys.stdin:
        began = time.perf_counter()
        pa.table(builder.execute(sql))
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
