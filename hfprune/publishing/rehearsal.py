"""A Hub on loopback, for a rehearsal of publishing: the real `huggingface_hub` client pushes to it
and downloads from it, over plain HTTP. It can be told to fail at any request, as a network does.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from hfprune.publishing.parcel import RECORD
from hfprune.publishing.rehearsal_api import HUB
from hfprune.publishing.rehearsal_routing import Answer
from hfprune.publishing.rehearsal_store import Store, User

Failure = int | Literal["close", "lose", "cut", "hang"]
"""How a request fails: a status; the connection closes before anything is done; the work is done
but the answer is lost; the answer breaks off in the middle; or it never comes."""


class Hub(Store):
    """The server; a context manager that serves while it is open.

    Attributes:
        endpoint: its address, for HF_ENDPOINT.
        log: every request so far, "METHOD /path".
    """

    def __init__(self, folder: Path, users: dict[str, User]) -> None:
        super().__init__(folder, users)
        self.log: list[str] = []
        self._failures: list[tuple[Callable[[int, str], bool], Failure]] = []
        self._released = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.heal()
        self._server.shutdown()
        self._server.server_close()

    def fail(self, how: Failure, when: Callable[[int, str], bool]) -> None:
        """Fail every request for which `when(its index in the log, "METHOD /path")` holds."""
        self._failures.append((when, how))

    def heal(self) -> None:
        """Fail no longer; requests that hang end."""
        self._failures.clear()
        self._released.set()
        self._released = threading.Event()

    def received(self, request: str) -> tuple[Failure | None, threading.Event]:
        """Write a request to the log; how it is to fail, and what ends its hanging."""
        with self.lock:
            index = len(self.log)
            self.log.append(request)
            how = next((how for when, how in self._failures if when(index, request)), None)
            return how, self._released


def rehearse_push(arguments: Sequence[str], source: Path, repo_id: str) -> int:
    """Run a push of the command line against a Hub on loopback, in a process of its own.

    That process has a token, a cache and an address that are good for nothing else. What the
    source's folder remembers of real publications stays as it was.

    Args:
        arguments: of the `hfprune` command.
        source: the folder that is pushed.
        repo_id: where to.

    Returns:
        The exit status of the process.
    """
    token = f"hf_{secrets.token_hex(20)}"
    owner = repo_id.rpartition("/")[0] or "rehearsal"
    known = source / RECORD
    before = known.read_bytes() if known.is_file() else None
    with (
        TemporaryDirectory(prefix="hfprune-rehearsal-") as folder,
        Hub(Path(folder, "hub"), {token: User(owner)}) as hub,
    ):
        environment = os.environ | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": token,
            "HF_HOME": folder,
            "HF_HUB_CACHE": str(Path(folder, "cache")),
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        print(f"A rehearsal: {hub.endpoint} on this machine stands for the Hub.", flush=True)
        command = [sys.executable, "-c", "from hfprune.cli import main; main()", *arguments]
        try:
            status = subprocess.run(command, env=environment, check=False).returncode
            if status == 0:
                print("The rehearsal went well. Nothing was published, and nothing of it is kept.")
            return status
        finally:
            if before is not None:
                known.write_bytes(before)
            else:
                known.unlink(missing_ok=True)


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, lets it fail if it is to, and answers."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for the client's word

    def log_message(self, *_: Any) -> None:
        """Say nothing: the log of the hub is enough."""

    def answer(self) -> None:
        """Answer a request of any method."""
        body = self._body()
        failure, released = self.hub.received(f"{self.command} {self.path}")
        if failure == "hang":
            released.wait()
        if failure in ("close", "hang") or body is None:
            self.close_connection = True
            return
        if isinstance(failure, int):
            self._send(Answer({"error": "as it was told to fail"}, failure))
            return
        method = "GET" if self.command == "HEAD" else self.command
        answer = HUB.respond(self.hub, method, self.path, self.headers, body)  # type: ignore[arg-type]
        if failure == "lose":
            self.close_connection = True
            return
        self._send(answer, cut=failure == "cut")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def _body(self) -> bytes | None:
        """What the client sent; None if it went away in the middle."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            return body if len(body) == length else None
        chunks = []
        while line := self.rfile.readline():
            size = int(line, 16)
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
            if not size:
                return b"".join(chunks)
        return None

    def _send(self, answer: Answer, *, cut: bool = False) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.close_connection |= cut
        try:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if cut else body)
        except ConnectionError:  # the client is gone
            self.close_connection = True
