"""python -m flight_oplog: the flight-oplog command."""

import sys

from flight_oplog.cli import main

sys.exit(main())
