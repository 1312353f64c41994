"""Somebody who issues JWTs: keys of each kind, bearers signed with them, and an address that tells the public ones."""

from __future__ import annotations

import http.server
import json
import threading
import time
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, HMACAlgorithm, OKPAlgorithm, RSAAlgorithm

from flight_oplog import Config

PRIVATE: dict[str, Any] = {
    "RS256": rsa.generate_private_key(65537, 2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
    "HS256": b"a secret of 32 bytes, at the least",
}
PUBLIC: dict[str, dict[str, Any]] = {
    "RS256": RSAAlgorithm.to_jwk(PRIVATE["RS256"].public_key(), as_dict=True),
    "ES256": ECAlgorithm.to_jwk(PRIVATE["ES256"].public_key(), as_dict=True),
    "EdDSA": OKPAlgorithm.to_jwk(PRIVATE["EdDSA"].public_key(), as_dict=True),
    "HS256": HMACAlgorithm.to_jwk(PRIVATE["HS256"], as_dict=True),
}
for _kind, _key in PUBLIC.items():
    _key["kid"] = _kind.lower()


def claims(**changed: Any) -> dict[str, Any]:
    """A good bearer's claims, some of them changed; None leaves one out."""
    body = {"sub": "ann", "iss": "https://idp", "aud": "oplog", "exp": int(time.time()) + 600} | changed
    return {name: value for name, value in body.items() if value is not None}


def signed(body: dict[str, Any], kind: str = "RS256", key: Any = None, **header: Any) -> str:
    return jwt.encode(body, PRIVATE[kind] if key is None else key, kind, headers={"kid": kind.lower()} | header)


class Issuer:
    """An address that answers with keys, counts how often it is asked, and may be out of order."""

    def __init__(self) -> None:
        self.keys: list[dict[str, Any]] = []
        self.asked = 0
        self.status = 200
        issuer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked += 1
                self.send_response(issuer.status)
                if issuer.status == 302:
                    self.send_header("Location", "/keys2")
                self.end_headers()
                self.wfile.write(json.dumps({"keys": issuer.keys}).encode())

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def config(self) -> Config:
        address = f"http://127.0.0.1:{self.server.server_port}/keys"
        return Config(jwt_keys=address, jwt_issuer="https://idp", jwt_audience="oplog")
