"""flight_oplog: an append-only operation log. Stream Arrow in with Flight, keep it in Delta, query it with SQL."""

from flight_oplog.appends import Origin, Receipt
from flight_oplog.config import Config
from flight_oplog.oplog import OpLog, Problem
from flight_oplog.store import Snapshot
from flight_oplog.topics import Topic

__all__ = ["Config", "OpLog", "Origin", "Problem", "Receipt", "Snapshot", "Topic"]
__version__ = "0.1.0"
