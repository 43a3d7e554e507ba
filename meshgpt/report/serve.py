"""`meshgpt report --serve`: the page of a run on this machine alone, read anew from the run's folder as it trains."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from meshgpt.errors import UserError
from meshgpt.report.card import CardOptions
from meshgpt.report.html import data, page
from meshgpt.report.write import document, read_runs
from meshgpt.settings import json_text

HOST = "127.0.0.1"
POLL_SECONDS = 5.0


class Server(http.server.ThreadingHTTPServer):
    """Serves `/` and `/data.json`, and nothing from the disk, on the loopback interface."""

    daemon_threads = True

    def __init__(self, paths: Sequence[Path], options: CardOptions, port: int, poll: float = POLL_SECONDS) -> None:
        """Binds at once; port 0 takes a free one.

        Raises:
          UserError: no run at one of the paths, or the port is taken.
        """
        self._paths, self._options, self._poll = tuple(paths), options, poll
        self._lock = threading.Lock()
        read_runs(paths)
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise UserError(f"cannot listen on {HOST}:{port}: {error.strerror}; give another --port") from error

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"

    def page(self) -> str:
        with self._lock:
            return page(*document(read_runs(self._paths), self._options), self._poll)

    def data(self) -> str:
        with self._lock:
            _, blocks, drawn = document(read_runs(self._paths), self._options)
            return json_text(data(blocks, drawn, self._poll))


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        # A page elsewhere could point a name of its own at this machine (DNS rebinding): only our own names are served.
        port = self.server.server_address[1]
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            self._answer(403, "text/plain", "this server answers to its own address only")
            return
        pages: dict[str, tuple[str, Callable[[], str]]] = {
            "/": ("text/html", self.server.page),
            "/data.json": ("application/json", self.server.data),
        }
        if self.path not in pages:
            self._answer(404, "text/plain", "there is / and /data.json")
            return
        kind, make = pages[self.path]
        try:
            self._answer(200, kind, make())
        except UserError as error:
            self._answer(503, "text/plain", str(error))

    def _answer(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Nothing: the terminal may belong to a run."""
