"""An S3 server on loopback, in a process of its own, that fails when it is told to.

::

    with store.serving() as server:
        server.fail("deny", at=2)      the second request that changes something is refused

It is moto's server behind a few lines that count requests. ``python -m tests.store`` starts it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

CONTROL = "/control"
CHANGING = ("PUT", "POST", "DELETE")
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class Faulty:
    """Hands requests to an application, but for the one that a fault was ordered for."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self._app = app
        self._plan: dict[str, Any] = {}
        self._count = 0
        self._seen: list[str] = []
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], reply: Any) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        if environ["PATH_INFO"] == CONTROL:
            return self._ordered(environ, reply)
        with self._lock:
            self._seen.append(f"{method} {environ['PATH_INFO']}?{environ['QUERY_STRING']}")
            counted = method in CHANGING or self._plan.get("any", False)
            self._count += counted
            late = self._count - self._plan.get("at", 0)
            due = counted and (late == 0 or (late > 0 and self._plan.get("on", False)))
            what = self._plan.get("what", "") if due else ""
        if what == "kill":
            os.kill(self._plan["pid"], signal.SIGKILL)
            reply("503 Slow Down", [])  # to nobody: a body that has arrived is not stored either
            return []
        if what in ("kill after", "deny after"):
            done = list(self._app(environ, lambda *_: None))
            if what == "kill after":
                os.kill(self._plan["pid"], signal.SIGKILL)
                return done
            reply("403 Forbidden", [("Content-Type", "application/xml")])
            return [DENIED]
        if what == "hang":
            threading.Event().wait(60)
        if what == "deny":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            reply("403 Forbidden", [("Content-Type", "application/xml")])
            return [DENIED]
        return self._app(environ, reply)

    def _ordered(self, environ: dict[str, Any], reply: Any) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        with self._lock:
            seen, self._seen, self._count = self._seen, [], 0
            self._plan = json.loads(body)
        reply("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(seen).encode()]


@dataclass
class Server:
    """The server that runs in ``process``."""

    process: subprocess.Popen[str]
    port: int

    def environment(self) -> dict[str, str]:
        """What finds it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def fail(self, what: str = "", at: int = 0, **more: Any) -> list[str]:
        """Orders a fault, or none; the requests since the last order.

        Args:
            what: ``"deny"``, ``"hang"``, ``"kill"``, or the first and the last with ``" after"``.
            at: number of the request, from 1; those that change something are counted, with
                ``any=True`` all.
            more: ``on=True``: also all later ones; ``pid``: who is killed.
        """
        return order(f"http://127.0.0.1:{self.port}", what, at, **more)


def order(endpoint: str, what: str = "", at: int = 0, **more: Any) -> list[str]:
    """`Server.fail`, of a process that knows the endpoint only."""
    plan = {"what": what, "at": at, **more} if what else {}
    request = urllib.request.Request(endpoint + CONTROL, json.dumps(plan).encode(), method="POST")
    with urllib.request.urlopen(request, timeout=20) as answer:
        return list(json.load(answer))


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server, until the end of the block."""
    command = [sys.executable, "-m", "tests.store"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield Server(process, int(process.stdout.readline()))
        finally:
            process.kill()


def main() -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app = Faulty(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()  # until who started it has ended


if __name__ == "__main__":
    main()
