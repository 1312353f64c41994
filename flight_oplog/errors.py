"""One error tree, by who must act. Nothing here knows about gRPC; `server.py` turns `status` into a Flight error once.

    OplogError
    ├── RequestError        the caller must change the request; nothing was written
    │   ├── SchemaMismatch  the append's schema is refused by the topic's rule
    │   ├── TooLarge        a limit from the settings table was passed
    │   └── OutOfOrder      the append does not follow what is there: a gap, an older epoch, another end
    ├── Unauthenticated     nobody knows who is calling: no credentials, or wrong ones
    ├── Forbidden           it is known who is calling, and they may not do this
    ├── NotFound            the topic, table or handle does not exist, for this caller at least
    ├── Unsupported         well formed, and this server does not do it
    ├── TryAgain            nothing was written; the same request may succeed later
    ├── Cancelled           the caller went away or asked to stop; nothing was written
    ├── OutcomeUnknown      the commit may have been written; look before you retry
    ├── CorruptLog          stored bytes are not what was written; an operator must act
    └── NotALog             the folder is not a flight_oplog log this version can open

Messages name what failed and what to do. They never hold a server path: text from the operating system and from
libraries goes to the server's own log, not into a message.
"""

from __future__ import annotations


class OplogError(Exception):
    """Base of every error the package raises on purpose; `status` is the gRPC status a client sees."""

    status = "INTERNAL"


class RequestError(OplogError):
    status = "INVALID_ARGUMENT"


class SchemaMismatch(RequestError):
    pass


class TooLarge(RequestError):
    pass


class OutOfOrder(RequestError):
    pass


class Unauthenticated(OplogError):
    status = "UNAUTHENTICATED"


class Forbidden(OplogError):
    status = "PERMISSION_DENIED"


class NotFound(OplogError):
    status = "NOT_FOUND"


class Unsupported(OplogError):
    status = "UNIMPLEMENTED"


SHUTTING_DOWN = "the server is shutting down; try again when it is back"


class TryAgain(OplogError):
    status = "UNAVAILABLE"


class Cancelled(OplogError):
    status = "CANCELLED"


class OutcomeUnknown(OplogError):
    status = "INTERNAL"


class CorruptLog(OplogError):
    status = "INTERNAL"


class NotALog(OplogError):
    status = "INVALID_ARGUMENT"
