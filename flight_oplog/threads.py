"""Threads that Python did not begin, kept from being introduced to it over and over.

Whenever a thread of gRPC's or of DataFusion's calls into Python, CPython makes a thread state for it, and takes it apart when
the thread leaves again: memory is mapped and unmapped, which all cores hear of. That was most of what it took to hand a batch
to DataFusion, and a tenth of a short call. States nest (PyGILState_Ensure of the C API): a thread that holds one while it is
away is known when it comes back.
"""

from __future__ import annotations

import ctypes
import sys
import threading

# Threads that may stay: those of DataFusion's pool, one for each core. It may have others that come and go.
STAYING_MAX = 256

_enter, _leave = ctypes.pythonapi.PyGILState_Ensure, ctypes.pythonapi.PyGILState_Release
_WAS_INSIDE = 0  # PyGILState_LOCKED
_places = threading.BoundedSemaphore(STAYING_MAX)
_here = threading.local()


def stay() -> None:
    """Let the calling thread be known to Python for as long as it lasts, if the caller was called by nothing in Python: then it is
    one of a pool's. Does nothing for any other, nor for too many."""
    if not hasattr(_here, "stays") and sys._getframe(1).f_back is None:
        _here.stays = _places.acquire(blocking=False)
        if _here.stays:
            _enter()


class Visit:
    """Lets the calling thread be known to Python from now until it calls `end`."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        _enter()

    def end(self) -> None:
        """End the visit. Another thread cannot: then the first one stays."""
        if threading.get_ident() == self._thread:
            _leave(_WAS_INSIDE)
