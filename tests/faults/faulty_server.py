"""`flight-oplog serve` with one fault built in: python faulty_server.py FAULT [serve's flags].

A fault is a point of the commit at which the process kills itself, `point:n` for the n-th time it gets there, or a
misbehaving disk. Nothing of this is in the package: the points are wrapped around its functions from outside.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from flight_oplog import cli, datafile, files, producers, storage, store

# Where the server can be killed: the object and the function that is the point, and whether before or after it.
ANYWHERE: dict[str, tuple[Any, str, bool]] = {
    "before-files": (datafile.StagedFile, "finish", False),
    "in-a-file": (files.OutputFile, "write", False),
    "after-files": (datafile.StagedFile, "finish", True),
    "before-receipts": (store.Store, "commit", True),
    "between-receipts": (producers.Producers, "remember", True),
    "before-a-checkpoint": (store.Store, "_checkpoint", False),
    "after-a-checkpoint": (store.Store, "_checkpoint", True),
}
FOLDER_POINTS = ANYWHERE | {
    "before-the-entry": (storage, "_write_durably", False),
    "before-the-name": (os, "link", False),
    "after-the-name": (os, "link", True),
}
BUCKET_POINTS = ANYWHERE | {
    "before-an-upload": (storage.Bucket, "publish", False),
    "after-an-upload": (storage.Bucket, "publish", True),
    "before-the-put": (storage.Bucket, "create", False),
    "after-the-put": (storage.Bucket, "create", True),
}
POINTS = FOLDER_POINTS | BUCKET_POINTS


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wrap(owner: Any, name: str, around: Callable[[Callable[[], Any]], Any]) -> None:
    real = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: around(lambda: real(*args, **kwargs)))


def kill_at(point: str, times: int) -> None:
    owner, name, after = POINTS[point]
    left = [times]

    def around(call: Callable[[], Any]) -> Any:
        result = call() if after else None
        left[0] -= 1
        if left[0] == 0:
            die()
        return result if after else call()

    wrap(owner, name, around)


def refuse_some(every: int, done: bool) -> None:
    """Let about every n-th write to the disk fail, before it is done or after."""
    chance = random.Random(every)

    def around(call: Callable[[], Any]) -> Any:
        fails = chance.randrange(every) == 0
        result = call() if done or not fails else None
        if fails:
            raise OSError(errno.EIO, "Input/output error")
        return result

    for name in ("link", "fsync", "write"):
        if not (done and name == "write"):  # who is told that a write failed may write it again: that is another fault
            wrap(os, name, around)


def sync_slowly(seconds: float) -> None:
    def around(call: Callable[[], Any]) -> Any:
        time.sleep(seconds)
        return call()

    wrap(os, "fsync", around)


def main() -> int:
    kind, _, number = sys.argv[1].partition(":")
    if kind in POINTS:
        kill_at(kind, int(number))
    elif kind == "errors":
        refuse_some(int(number), done=False)
    elif kind == "errors-after-success":
        refuse_some(int(number), done=True)
    elif kind == "slow":
        sync_slowly(float(number))
    else:
        assert kind == "none", kind
    return cli.main(["serve", *sys.argv[2:]])


if __name__ == "__main__":
    sys.exit(main())
