"""The HTTP server of the page: what reaches it, and what does not.

The server answers whoever can connect to it, and every website in the user's browser can make it connect to
127.0.0.1. So each request is checked before anything else is done:

    Host      has to name this machine (an address or a name of its own). A website that has its own name point to
              127.0.0.1 (DNS rebinding) sends its name.
    Origin    has to be the page's own, where there is one: browsers send it with each POST, and with each request from
    Sec-Fetch-Site    another site's script. Newer browsers say in the second header where a request without an Origin
              comes from; another site may link to the page, and do nothing else.
    Content-Type      of a POST is one that a form of another site cannot send.

Connections, bytes and seconds are bounded: a request has to arrive whole within READ_SECONDS, however slowly its bytes
drip, and an answer has to be taken within WRITE_SECONDS. Every connection carries one request.
"""

import contextlib
import io
import ipaddress
import json
import os
import select
import socket
import socketserver
import sys
import threading
import time
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

MAX_BODY = 16 * 2**20  # bytes of a request's body
LARGE_BODY, LARGE_AT_ONCE = 2**20, 4  # bodies above the first number of bytes: so many are in memory at a time
CONNECTIONS = 64  # at a time; more wait until one ends
READ_SECONDS, WRITE_SECONDS = 30.0, 30.0
JSON, BYTES = "application/json", "application/octet-stream"


class HTTPError(Exception):
    """An answer other than success: the status, and a sentence for the user."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


class Server(socketserver.ThreadingTCPServer):
    """Listens at (host, port); port 0 takes a free one. `routes`: (method, path) -> function of the handler."""

    daemon_threads = True
    allow_reuse_address = os.name != "nt"  # on Windows it would let two servers have one port
    request_queue_size = 256

    def __init__(
        self,
        host: str,
        port: int,
        routes: dict[tuple[str, str], Callable[["Handler"], None]],
        read_seconds: float = READ_SECONDS,
        write_seconds: float = WRITE_SECONDS,
    ):
        self.host, self.routes, self.read_seconds, self.write_seconds = host, routes, read_seconds, write_seconds
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._free, self._large = threading.Semaphore(CONNECTIONS), threading.Semaphore(LARGE_AT_ONCE)
        super().__init__((host, port), Handler)

    @property
    def url(self) -> str:
        """The address of the page for a browser on this machine."""
        name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(
            self.host, f"[{self.host}]" if ":" in self.host else self.host
        )
        return f"http://{name}:{self.server_address[1]}/"

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        """Give a connection a thread. While all CONNECTIONS are busy, further ones wait for the first that ends."""
        if not self._free.acquire(timeout=self.read_seconds + self.write_seconds):
            return self.shutdown_request(request)
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be started
            self._free.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: socket.socket, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def wait_for_threads(self, seconds: float) -> None:
        """Wait until no connection is served any more, `seconds` at most. A thread that Python ends by force, at the
        end of the process, takes the process with it."""
        end = time.monotonic() + seconds
        for _ in range(CONNECTIONS):
            self._free.acquire(timeout=max(0.0, end - time.monotonic()))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that ended in the middle is nothing to tell of; a mistake in the code is."""
        if not isinstance(sys.exception(), OSError):
            traceback.print_exc(file=sys.stderr)

    @contextlib.contextmanager
    def room_for(self, length: int) -> Any:
        """While entered, a body of `length` bytes may be in memory."""
        if length <= LARGE_BODY:
            yield
        elif not self._large.acquire(timeout=self.read_seconds):
            raise HTTPError(503, "Too many large images arrive at once; try again.")
        else:
            try:
                yield
            finally:
                self._large.release()


class _Reader(io.RawIOBase):
    """Reads from a socket until a moment in time, however the bytes are spread over it."""

    def __init__(self, connection: socket.socket, seconds: float):
        self.connection, self.end = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request took too long")
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class Handler(BaseHTTPRequestHandler):
    """One connection with one request."""

    server: Server
    server_version, sys_version = "minControlNet", ""
    query: dict[str, str]

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_Reader(self.connection, self.server.read_seconds), 1 << 16)

    def finish(self) -> None:
        """Close the connection, after taking what the client still sends, within bounds: otherwise the answer to a
        request that was refused in the middle would be lost on its way."""
        with contextlib.suppress(OSError, ValueError):
            super().finish()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(0.5)
            end, taken = time.monotonic() + 2, 0
            while time.monotonic() < end and taken < 2 * MAX_BODY and (piece := self.connection.recv(1 << 16)):
                taken += len(piece)

    def do_GET(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def _route(self, method: str) -> None:
        """Check the request, and let the function of its address answer."""
        try:
            self.connection.settimeout(self.server.write_seconds)
            try:
                self.check()
                place = urlsplit(self.path)
                self.query = {
                    name: values[0] for name, values in parse_qs(place.query[:1000], max_num_fields=16).items()
                }
                route = self.server.routes.get((method, place.path))
            except ValueError as e:
                raise HTTPError(400, "The address is not readable.") from e
            if route is None:
                raise HTTPError(404, "There is nothing at this address.")
            route(self)
        except HTTPError as e:
            self.answer_json({"error": e.message}, e.status)

    # ---------------------------------------------------------------------------------------------------- checks
    def check(self) -> None:
        """HTTPError for a request that does not come from the page itself, or does not ask for it."""
        hosts, origins = (self.headers.get_all(name, []) for name in ("Host", "Origin"))
        if len(hosts) != 1 or not names_this_machine(hosts[0], self.server.host):
            raise HTTPError(403, "This address does not belong to the page; open the one that the terminal shows.")
        if len(origins) > 1 or any(origin.lower() != f"http://{hosts[0].lower()}" for origin in origins):
            raise HTTPError(403, "Requests from other websites are refused.")
        site, mode = (self.headers.get(f"Sec-Fetch-{name}", "") for name in ("Site", "Mode"))
        linked = self.command == "GET" and mode == "navigate" and urlsplit(self.path).path == "/"
        if site not in ("", "same-origin", "none") and not linked:
            raise HTTPError(403, "Requests from other websites are refused.")

    @contextlib.contextmanager
    def body(self, kind: str) -> Any:
        """The body of a POST of Content-Type `kind`, as bytes. HTTPError for a longer, shorter or another one."""
        if self.headers.get_content_type() != kind:
            raise HTTPError(415, f"The request should be of the type {kind}.")
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or len(lengths) != 1 or not lengths[0].strip().isascii():
            raise HTTPError(411, "The request does not say how long it is.")
        length = int(lengths[0]) if lengths[0].strip().isdigit() and len(lengths[0]) < 20 else -1
        if length < 0:
            raise HTTPError(400, "The length of the request is not readable.")
        if length > MAX_BODY:
            raise HTTPError(413, f"That is too large: at most {MAX_BODY // 2**20} MiB can be sent.")
        with self.server.room_for(length):
            content = self.rfile.read(length)
            if len(content) < length:
                raise ConnectionError("the request ended in the middle")
            self.connection.settimeout(self.server.write_seconds)
            yield content

    def json_body(self) -> Any:
        """The body of a POST as JSON."""
        with self.body(JSON) as content:
            try:
                return json.loads(content)
            except (ValueError, RecursionError) as e:
                raise HTTPError(400, "The request is not readable as JSON.") from e

    def is_gone(self) -> bool:
        """Whether the client has closed the connection."""
        try:
            ready, _, _ = select.select([self.connection], [], [], 0)
            return bool(ready) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):
            return True

    # ---------------------------------------------------------------------------------------------------- answers
    def begin(self, status: int, kind: str, length: int | None = None, **headers: str) -> None:
        """Send the status and the headers of an answer."""
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        headers = {"Cache-Control": "no-store", "Connection": "close", "X-Content-Type-Options": "nosniff"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        headers |= {"Cross-Origin-Resource-Policy": "same-origin", "Referrer-Policy": "no-referrer"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def answer(self, content: bytes, kind: str, status: int = 200, **headers: str) -> None:
        self.begin(status, kind, len(content), **headers)
        self.wfile.write(content)

    def answer_json(self, value: Any, status: int = 200) -> None:
        self.answer(json.dumps(value).encode(), f"{JSON}; charset=utf-8", status)

    def write_line(self, value: Any) -> None:
        """Send a line of JSON, of an answer whose length is not known before it ends."""
        self.wfile.write(json.dumps(value).encode() + b"\n")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What `BaseHTTPRequestHandler` says to a request that is no HTTP, as a sentence in JSON."""
        self.answer_json({"error": "The request is not readable."}, int(code))

    def log_message(self, form: str, *values: Any) -> None:
        """Requests are not logged."""


def names_this_machine(host: str, bound: str) -> bool:
    """Whether a Host header names this machine, which serves at the address `bound`.

    A server of the loopback address is called by that address or as localhost. A server of another address is called
    by any address (a website cannot make a browser send one for a name of its own), or by a name of this machine.
    """
    try:
        name = (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return False
    if set(host) & set("/\\@?# \t,") or not name:
        return False
    loopback = is_loopback(bound)
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback or not loopback
    own = socket.gethostname().lower()
    return name == "localhost" or (not loopback and name in (bound.lower(), own, f"{own}.local"))


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
