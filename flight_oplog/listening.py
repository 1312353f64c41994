"""Where a server listens, and how it is locked there."""

from __future__ import annotations

import ipaddress
import re
import ssl
from typing import Any

from flight_oplog.config import Config, read_bytes
from flight_oplog.errors import RequestError

_LISTEN = re.compile(r"grpc(\+tls)?://(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})")


def check_listen(config: Config) -> tuple[str, int]:
    """Return the host and the port to listen on.

    Raises RequestError for a malformed address, half of what TLS takes, or an address beyond loopback without TLS or credentials
    that nobody has asked for in so many words.
    """
    found = _LISTEN.fullmatch(config.listen)
    if found is None or int(found[3]) > 65535:
        raise RequestError(f"setting listen: {config.listen!r} is not of the form grpc://host:port or grpc+tls://host:port")
    if bool(config.tls_cert) != bool(config.tls_key):
        raise RequestError("settings tls_cert and tls_key go together: a certificate is served with its key")
    if not config.tls_cert and (found[1] or config.client_ca):
        raise RequestError(f"setting {'listen' if found[1] else 'client_ca'}: it takes TLS; set tls_cert and tls_key")
    host = found[2]
    missing = lacking(config)
    if not is_loopback(host) and missing and not config.insecure:
        raise RequestError(
            f"{config.listen} is reachable from other machines and there is no {missing}; add --insecure to serve there all the same"
        )
    return host, int(found[3])


def is_private(uri: str) -> bool:
    """Whether what is sent to a server at an address is nobody else's to read."""
    scheme, _, place = uri.partition("://")
    found = re.match(r"(\[[^\]]*\]|[^:/?]*)", place)
    return scheme in ("grpc+tls", "grpc+unix") or (found is not None and is_loopback(found[1]))


def is_loopback(host: str) -> bool:
    """Whether a host, by its name or address, is this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def lacking(config: Config) -> str:
    """Return what a server on a network should have and this one has not, in words."""
    has_credentials = config.users or config.jwt_keys or config.client_ca
    return " and no ".join(word for word, is_there in (("authentication", has_credentials), ("TLS", config.tls_cert)) if not is_there)


def check_tls(config: Config) -> dict[str, Any]:
    """Return how to listen with TLS, nothing without it. Raises RequestError that names the file which cannot be used."""
    if not config.tls_cert:
        return {}
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert, config.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise RequestError(f"settings tls_cert {config.tls_cert}, tls_key {config.tls_key}: {error.strerror or error}") from None
    found: dict[str, Any] = {"tls_certificates": [(read_bytes("tls_cert", config.tls_cert), read_bytes("tls_key", config.tls_key))]}
    if config.client_ca:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(config.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise RequestError(f"setting client_ca {config.client_ca}: {error.strerror or error}") from None
        found |= {"verify_client": True, "root_certificates": read_bytes("client_ca", config.client_ca)}
    return found
