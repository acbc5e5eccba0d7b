"""The Hub's HTTP interface, as far as publishing and loading a model, collections, and streaming a data set use it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any, Literal

from hub_server.handler import Handler
from hub_server.repository import Repository

Kind = Literal["status", "drop", "lose", "truncate", "corrupt", "call"]


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests whose "METHOD /path" matches ``pattern``.

    "status": answered with ``status``, and not done. "drop": the connection is closed, the request not done. "lose":
    done, but the connection is closed in place of an answer. "truncate": the connection is closed halfway through the
    body. "corrupt": one byte of the body is another. "call": ``call()`` happens first, then the request is done.
    """

    pattern: str
    kind: Kind
    times: int = 1
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    call: Callable[[], object] = lambda: None


@dataclass
class User:
    name: str
    organisations: list[str] = field(default_factory=list)
    may_write: bool = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class Hub:
    """``requests``: "METHOD /path" of all that arrived. ``users``: by token. ``repositories``: by "org/name".
    ``collections``: by slug, as the Hub answers them."""

    def __init__(self) -> None:
        self.users = {"token-of-ada": User("ada", ["factory"]), "token-of-bob": User("bob")}
        self.users["read-token-of-ada"] = User("ada", ["factory"], may_write=False)
        self.repositories: dict[str, Repository] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.sleeps: list[float] = []
        self.lock = threading.Lock()
        self._server: _Server | None = None
        self.port = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage(self) -> str:
        """Where large files lie: another host name, as on the Hub, so that no token goes there."""
        return f"http://localhost:{self.port}"

    def start(self) -> None:
        self._server = _Server(("127.0.0.1", self.port), Handler)
        self._server.hub = self
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """No more connections; kept ones are answered no longer either."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @property
    def running(self) -> bool:
        return self._server is not None

    def add(self, name: str, **options: Any) -> Repository:
        return self.repositories.setdefault(name, Repository(name, **options))

    def break_next(self, pattern: str, kind: Kind, times: int = 1, **details: object) -> Fault:
        fault = Fault(pattern, kind, times, **details)  # type: ignore[arg-type]
        self.faults.append(fault)
        return fault

    def fault_for(self, request: str) -> Fault | None:
        with self.lock:
            if "agent-harnesses" not in request:  # the client's telemetry, once a process and only in some terminals
                self.requests.append(request)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None

    @property
    def writes(self) -> list[str]:
        """The requests that could have changed something; asking who one is or what to upload changes nothing."""
        harmless = ("validate-yaml", "preupload")
        return [r for r in self.requests if not r.startswith(("GET", "HEAD")) and not any(h in r for h in harmless)]

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        self.stop()
        try:
            yield
        finally:
            self.start()
