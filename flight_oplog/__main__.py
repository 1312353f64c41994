"""python -m flight_oplog: the flight-oplog command."""

from flight_oplog.cli import entry

entry()
