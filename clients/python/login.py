"""How to log in: what the environment says of it, for pyarrow.flight and for ADBC. Secrets come from files.

OPLOG_CA                            PEM file of the authorities that may vouch for a server (grpc+tls://)
OPLOG_USER and OPLOG_PASSWORD_FILE  a user's name and password
OPLOG_TOKEN_FILE                    or a bearer: an API token or a JWT
OPLOG_CERT and OPLOG_KEY            or PEM files of a certificate and its key, where the server takes those
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pyarrow import flight


def flight_client(uri: str) -> flight.FlightClient:
    """Connect, and log in where there is a user."""
    authorization = _Authorization()
    tls = {"tls_root_certs": _text("OPLOG_CA"), "cert_chain": _text("OPLOG_CERT"), "private_key": _text("OPLOG_KEY")}
    client = flight.connect(uri, middleware=[authorization], **{name: text for name, text in tls.items() if text is not None})
    if (user := os.environ.get("OPLOG_USER")) is not None:
        _, bearer = client.authenticate_basic_token(user, _text("OPLOG_PASSWORD_FILE") or "")
        authorization.header = bearer.decode()
    elif (token := _text("OPLOG_TOKEN_FILE")) is not None:
        authorization.header = f"Bearer {token}"
    return client


def adbc_options() -> dict[str, str]:
    """Return what `adbc_driver_flightsql.dbapi.connect` takes beside the address."""
    token = _text("OPLOG_TOKEN_FILE")
    options = {
        "username": os.environ.get("OPLOG_USER"),
        "password": _text("OPLOG_PASSWORD_FILE"),
        "adbc.flight.sql.authorization_header": None if token is None else f"Bearer {token}",
        "adbc.flight.sql.client_option.tls_root_certs": _text("OPLOG_CA"),
        "adbc.flight.sql.client_option.mtls_cert_chain": _text("OPLOG_CERT"),
        "adbc.flight.sql.client_option.mtls_private_key": _text("OPLOG_KEY"),
    }
    return {name: value for name, value in options.items() if value is not None}


def _text(variable: str) -> str | None:
    """Return what is in the file that a variable names."""
    file = os.environ.get(variable)
    return None if file is None else Path(file).read_text().strip()


class _Authorization(flight.ClientMiddlewareFactory):
    """Sends a header with every call."""

    header: str | None = None

    def start_call(self, info: Any) -> flight.ClientMiddleware | None:
        return None if self.header is None else _Header(self.header)


class _Header(flight.ClientMiddleware):
    def __init__(self, header: str) -> None:
        self._header = header

    def sending_headers(self) -> dict[str, str]:
        return {"authorization": self._header}
