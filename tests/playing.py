"""A server of the page in the test's own process, and a client that says what it likes."""

import base64
import http.client
import io
import json
import socket
import threading
import time

import numpy as np
from PIL import Image

from playground.routes import Routes
from playground.server import Server


class Page:
    """A server in this process, with short patience, and a client of it."""

    def __init__(self, loaded, host: str = "127.0.0.1", **settings):
        self.routes = Routes(loaded)
        self.server = Server(host, 0, self.routes.table(), **{"read_seconds": 5.0, "write_seconds": 5.0, **settings})
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.routes.line.close()

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes, dict]:
        """Status, body and headers of the answer to a request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.putrequest(method, path, skip_host=True)
        sent = {"Host": f"127.0.0.1:{self.port}", **{k.replace("_", "-"): v for k, v in headers.items()}}
        if body is not None and "Content-Length" not in sent:
            sent["Content-Length"] = str(len(body))
        for name, value in sent.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        try:
            return answer.status, answer.read(), dict(answer.headers)
        finally:
            connection.close()

    def raw(self, content: bytes, seconds: float = 60.0) -> bytes:
        """What the server answers to bytes on a connection."""
        with socket.create_connection(("127.0.0.1", self.port), seconds) as connection:
            return talk(connection, content)

    def post(self, fields: dict, path: str = "/api/draw") -> tuple[int, list[dict]]:
        """Status and the lines of JSON of the answer to a drawing."""
        status, body, _ = self.ask("POST", path, json.dumps(fields).encode(), Content_Type="application/json")
        return status, [json.loads(line) for line in body.splitlines()]

    def works(self) -> bool:
        return self.ask("GET", "/api/model")[0] == 200


def talk(connection: socket.socket, content: bytes) -> bytes:
    answer = b""
    try:
        connection.sendall(content)
        while piece := connection.recv(1 << 16):
            answer += piece
    except ConnectionError:
        pass
    return answer


def png(array: np.ndarray, **settings) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG", **settings)
    return stream.getvalue()


def circle(size: int = 64) -> bytes:
    y, x = np.mgrid[:size, :size]
    ring = abs(np.hypot(x - size / 2, y - size / 2) - size / 4) < 1.5
    return png(np.repeat((ring * 255).astype(np.uint8)[..., None], 3, 2))


def draw_request(fields: dict) -> bytes:
    """The bytes of a request for a drawing."""
    body = json.dumps(fields).encode()
    lines = ["POST /api/draw HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def drawing(**more) -> dict:
    return {"prompt": "gold circle", "size": "64x64", "steps": 2, **more}


def control(hint: bytes | None = None, **more) -> dict:
    return {"hint": base64.b64encode(circle() if hint is None else hint).decode(), **more}


def wait_until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def npy(array: np.ndarray, **settings) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **settings)
    return stream.getvalue()
