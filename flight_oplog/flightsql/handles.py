"""Sealed handles: what a ticket or a prepared statement stands for, carried by the client itself.

A handle is one version byte, a keyed BLAKE2b tag (RFC 7693) and a JSON body with its kind and expiry. The server keeps nothing,
so no client can make it forget or fill up; a client cannot alter what it carries, and nobody but the principal it was
made for can use it: the tag is of its name too.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from typing import Any

from flight_oplog.errors import NotFound, RequestError

_VERSION = b"\x03"
_TAG_BYTES = 32


class Sealer:
    """Seals and opens handles with one secret key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def seal(self, kind: str, body: dict[str, Any], holder: str | None, seconds: float) -> bytes:
        """Return a handle that `open` accepts from its holder, a principal's name, for `seconds` from now.

        It has an id of its own, but for a body that `open` gave: that one is renewed, and what is said of either is said of both.
        """
        whole = {"id": secrets.token_hex(8), **body, "kind": kind, "expires": time.time() + seconds}
        text = json.dumps(whole, separators=(",", ":")).encode()
        return _VERSION + self._tag(text, holder) + text

    def open(self, kind: str, handle: bytes, holder: str | None) -> dict[str, Any]:
        """Return the body of a handle of a kind, with its `id`.

        Raises RequestError for what was not sealed by a server of this log for this holder, NotFound when it expired.
        """
        found, body = self.open_any(handle, holder, kind)
        if found != kind:
            raise RequestError(f"the handle is not a {kind} handle; ask for a new one")
        return body

    def open_any(self, handle: bytes, holder: str | None, wanted: str = "statement") -> tuple[str, dict[str, Any]]:
        """Return a handle's kind and its body; errors speak of the `wanted` kind, as what was altered has none."""
        tag, text = handle[1 : 1 + _TAG_BYTES], handle[1 + _TAG_BYTES :]
        if handle[:1] != _VERSION or not hmac.compare_digest(tag, self._tag(text, holder)):
            raise RequestError(f"the {wanted} handle was not made by a server of this log for you, or was altered; ask for a new one")
        body: dict[str, Any] = json.loads(text)
        kind = body.pop("kind")
        if body.pop("expires") < time.time():
            raise NotFound(f"the {kind} handle has expired; ask for a new one")
        return kind, body

    def _tag(self, text: bytes, holder: str | None) -> bytes:
        whose = b"" if holder is None else holder.encode()
        said = b"%d %b%b" % (-1 if holder is None else len(whose), whose, text)
        return hashlib.blake2b(said, digest_size=_TAG_BYTES, key=self._key).digest()
