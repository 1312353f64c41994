"""An S3 API on loopback, in memory: python s3_server.py. Prints its address when it takes requests.

It misbehaves when told to: PUT /_faults with {"every": n, "method": "PUT", "done": bool} lets about every n-th such
request fail with a 500, instead of being done or after it was; {} ends that.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class ObjectStore:
    """A running server, which can be told to misbehave."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    def new_log(self) -> str:
        """Return the URI of a place where nothing is."""
        return f"s3://logs/{uuid.uuid4()}"

    def misbehave(self, **order: Any) -> None:
        """Let some requests fail, as the top of this file says; without arguments, behave again."""
        self.put("_faults", json.dumps(order).encode())

    def put(self, path: str, content: bytes = b"") -> None:
        with urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/{path}", content, method="PUT"), timeout=10):
            pass


@contextlib.contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Start the server, and tell this process and those it starts where it is."""
    with subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        endpoint = process.stdout.readline().strip()
        os.environ |= {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }
        running = ObjectStore(endpoint)
        running.put("logs")
        yield running
        process.kill()


class Faults:
    """Stands before the API and lets some requests fail."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._order: dict[str, Any] = {}
        self._chance = random.Random(0)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/_faults":
            self._order = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
            start_response("200 OK", [("Content-Length", "0")])
            return []
        order = self._order
        if not order or environ["REQUEST_METHOD"] != order["method"] or self._chance.randrange(order["every"]):
            return self._app(environ, start_response)
        if order["done"]:
            list(self._app(environ, lambda *_: None))
        else:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response("500 Internal Server Error", [("Content-Length", "0")])
        return []


def main() -> None:
    import moto.server
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = moto.server.DomainDispatcherApplication(moto.server.create_backend_app)
    server = make_server("127.0.0.1", 0, Faults(app), threaded=True)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
