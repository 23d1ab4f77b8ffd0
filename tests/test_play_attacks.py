"""The page's server under attack: bad requests, other websites, traversals, sizes, patience, garbage, and crowds."""

import gc
import io
import json
import os
import re
import socket
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import playground.routes
from playground.hints import RequestError, read_hint
from playground.request import MOST_PICTURES, parse_drawing
from playground.server import CONNECTIONS, MAX_BODY, names_this_machine
from tests.playing import Page, circle, control, draw_request, drawing, npy, png, wait_until
from training.images import Reading

# ---------------------------------------------------------------------------------------------------------- bad images
HUGE = (
    b"\x93NUMPY\x01\x00v\x00"
    + b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999, 99999, 3), }".ljust(117)
    + b"\n"
)
BAD_IMAGES = {
    "nothing": b"",
    "garbage": os.urandom(2000),
    "text": b"hello",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
    "half a png": circle()[:120],
    "many pixels": png(np.zeros((5000, 4000), np.uint8)),
    "far too many pixels": png(np.zeros((20_000, 20_000), bool)),
    "an array of objects": npy(np.array([[{}]], dtype=object), allow_pickle=True),
    "a huge array": HUGE,
    "an array of nan": npy(np.full((8, 8, 3), np.nan)),
    "an array of another shape": npy(np.zeros((8, 8, 5), np.uint8)),
}


@pytest.mark.parametrize("content", BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_images_that_cannot_be_used(page, content):
    status, body, _ = page.ask("POST", "/api/hint?net=0&size=64", content, Content_Type="application/octet-stream")
    sentence = json.loads(body)["error"]
    assert status == 400 and sentence[0].isupper() and sentence.endswith(".") and "Traceback" not in sentence
    assert "/tmp" not in sentence and "--" not in sentence
    status, (answer,) = page.post(drawing(controls=[control(content)]))
    assert status == 400 and answer["error"].endswith(".")


# -------------------------------------------------------------------------------------------------------- bad requests
NAN, INF = float("nan"), float("inf")
BAD_FIELDS = {
    "no object": [],
    "no size": {"prompt": ""},
    **{f"size {value!r}"[:30]: drawing(size=value) for value in ("", "x", "1e3", "-64", "64x64x64", 64, None)},
    **{f"large {value}": drawing(size=value) for value in ("99999", "4000x4000", "16384x1024", "9" * 5000)},
    **{f"steps {value!r}": drawing(steps=value) for value in (0, 1000, 2.5, NAN, INF, "3", True, None, 10**400)},
    **{f"seed {value!r}": drawing(seed=value) for value in (-1, 2**53, 1.5, "a", [])},
    **{f"scale {value!r}": drawing(scale=value) for value in (-1, 101, NAN, INF, "9", False)},
    **{f"num {value!r}": drawing(num=value) for value in (0, MOST_PICTURES + 1, "x")},
    **{f"solver {value!r}": drawing(solver=value) for value in ("euler9", None, 3, ["ddim"], "__class__")},
    **{f"spacing {value!r}": drawing(spacing=value) for value in ("even", None, 3)},
    **{f"prompt {value!r}"[:30]: drawing(prompt=value) for value in (None, 3, ["a"], "a" * 4001)},
    **{f"controls {value!r}"[:40]: drawing(controls=value) for value in ({}, "x", [3], [{}], [control()] * 5, None)},
    **{f"net {value!r}": drawing(controls=[control(net=value)]) for value in (-1, 1, 0.5, "../model", None)},
    **{f"hint {value!r}": drawing(controls=[{"hint": value}]) for value in ("", "???", 3, "/etc/passwd", "é")},
    **{f"strength {value!r}": drawing(controls=[control(strength=value)]) for value in (NAN, 11, "1", None)},
    "ends before it starts": drawing(controls=[control(start=0.9, end=0.1)]),
    "strengths": drawing(strengths=[NAN]),
    "strengths of texts": drawing(strengths=["1"]),
    "many strengths": drawing(strengths=[1.0] * 17),
    "strengths times pictures": drawing(strengths=[1, 2, 3], num=6),
}  # fmt: skip


@pytest.mark.parametrize("fields", BAD_FIELDS.values(), ids=BAD_FIELDS.keys())
def test_fields_that_cannot_be(fields):
    with pytest.raises(RequestError) as e:
        order = parse_drawing(json.loads(json.dumps(fields)), 32, 1)
        [read_hint(c.hint, Reading(3), "area", order.size) for c in order.controls]
    assert str(e.value)[0].isupper() and str(e.value).endswith(".") and len(str(e.value)) < 400


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 200_000, b"\xff\xfe", b'{"a":' * 50_000, b"9" * 10_000, b"NaN", b"null"]
)
def test_bodies_that_are_no_drawing(page, body):
    status, answer, _ = page.ask("POST", "/api/draw", body, Content_Type="application/json")
    assert status == 400 and json.loads(answer)["error"].endswith(".")
    assert page.works()


def test_half_characters_in_a_prompt(page):
    _, events = page.post(drawing(prompt="a\ud800b\0"))
    assert events[-1] == {"event": "done"} and "\ud800" not in events[-2]["command"]


# -------------------------------------------------------------------------------------------------- other websites
FOREIGN = {
    "another name": {"Host": "evil.example"},
    "another name with our port": {"Host": "evil.example:7860"},
    "a name that begins like ours": {"Host": "localhost.evil.example"},
    "an address that is not loopback": {"Host": "192.168.0.7"},
    "no host": {"Host": ""},
    "odd hosts": {"Host": "127.0.0.1@evil.example"},
    "a path in the host": {"Host": "127.0.0.1/x"},
    "another origin": {"Origin": "http://evil.example"},
    "an origin of another port": {"Origin": "http://127.0.0.1:1"},
    "an origin without a name": {"Origin": "null"},
    "our origin by https": {"Origin": "https://127.0.0.1:PORT"},
    "another site": {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    "another port's site": {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
}


@pytest.mark.parametrize("headers", FOREIGN.values(), ids=FOREIGN.keys())
def test_other_websites_are_refused(page, headers):
    headers = {name: value.replace("PORT", str(page.port)) for name, value in headers.items()}
    for method, path in (("GET", "/"), ("GET", "/api/model"), ("GET", "/api/hint?number=1"), ("POST", "/api/draw")):
        body = json.dumps(drawing()).encode() if method == "POST" else None
        status, answer, _ = page.ask(method, path, body, Content_Type="application/json", **headers)
        assert status == 403 and json.loads(answer)["error"].endswith(".")
    assert len(page.routes.line) == 0


def test_the_page_itself_is_served(page):
    own = {"Origin": f"http://127.0.0.1:{page.port}", "Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}
    body = json.dumps(drawing()).encode()
    assert page.ask("POST", "/api/draw", body, Content_Type="application/json", **own)[0] == 200
    assert page.ask("GET", "/", Host="LOCALHOST")[0] == 200
    linked = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert page.ask("GET", "/", **linked)[0] == 200 and page.ask("GET", "/api/model", **linked)[0] == 403
    status, text, headers = page.ask("GET", "/")
    policy = headers["Content-Security-Policy"]
    assert (
        status == 200 and "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "sha256-" in policy
    )
    assert not re.search(
        rb"""(src|href)=["'](?!data:)|https?://(?!www\.w3\.org)|@import|url\(""", text
    )  # works offline


def test_what_a_form_of_another_site_can_send_is_refused(page):
    body = json.dumps(drawing()).encode()
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
        "application/jsonx",
    ):
        assert page.ask("POST", "/api/draw", body, Content_Type=kind)[0] == 415
    assert page.ask("POST", "/api/hint?net=0&size=64", circle(), Content_Type="image/png")[0] == 415


def test_two_hosts_or_origins_are_refused(page):
    host = f"Host: 127.0.0.1:{page.port}\r\n"
    for headers in (
        host * 2,
        host + "Host: evil.example\r\n",
        "",
        host + f"Origin: http://127.0.0.1:{page.port}\r\n" * 2,
    ):
        assert b" 403 " in page.raw(f"GET /api/model HTTP/1.1\r\n{headers}\r\n".encode()).split(b"\r\n")[0]


@pytest.mark.parametrize(
    ("host", "bound", "answer"),
    [
        ("127.0.0.1:7860", "127.0.0.1", True), ("localhost", "127.0.0.1", True), ("[::1]:7860", "::1", True),
        ("127.9.9.9", "127.0.0.1", True), ("10.0.0.5", "127.0.0.1", False), ("example.org", "127.0.0.1", False),
        ("10.0.0.5:7860", "0.0.0.0", True), ("[fe80::1]", "::", True), ("example.org", "0.0.0.0", False),
        (socket.gethostname() + ":80", "0.0.0.0", True), (socket.gethostname() + ".evil.org", "0.0.0.0", False),
        ("box.lan", "box.lan", True), ("127.0.0.1.nip.io", "0.0.0.0", False), ("[::1", "::1", False),
        ("localhost:99999999", "127.0.0.1", True), ("0x7f.1", "127.0.0.1", False), ("", "0.0.0.0", False),
    ],
)  # fmt: skip
def test_names_of_this_machine(host, bound, answer):
    assert names_this_machine(host, bound) is answer


TRAVERSALS = (
    "/../config.json", "/..%2f..%2fetc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/etc/passwd",
    "/page.html", "/playground/page.html", "/static/../play.py", "/api/../play.py", "/api/hint/../../play.py",
    "/\\..\\play.py", "/.", "/%00", "/api/hint%00.png", "http://127.0.0.1/play.py", "/;/play.py",
    "/api/model/", "/API/MODEL",
)  # fmt: skip


@pytest.mark.parametrize("path", TRAVERSALS)
def test_no_path_reaches_the_file_system(page, monkeypatch, path):
    opened, real = [], io.open
    monkeypatch.setattr("builtins.open", lambda *a, **k: opened.append(a) or real(*a, **k))
    monkeypatch.setattr(Path, "read_bytes", lambda self: opened.append(self))
    answer = page.raw(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    assert re.match(rb"HTTP/1.[01] 40[04] ", answer) and b"root:" not in answer and not opened


# ------------------------------------------------------------------------------------------------ sizes and patience
LENGTHS = {
    "none": ("", 411), "two": ("Content-Length: 2\r\nContent-Length: 3\r\n", 411),
    "negative": ("Content-Length: -1\r\n", 400), "a word": ("Content-Length: many\r\n", 400),
    "a fraction": ("Content-Length: 1e3\r\n", 400), "endless": (f"Content-Length: {'9' * 40}\r\n", 400),
    "too large": (f"Content-Length: {MAX_BODY + 1}\r\n", 413), "terabytes": ("Content-Length: 9999999999999\r\n", 413),
    "chunked": ("Transfer-Encoding: chunked\r\n", 411),
    "both": ("Transfer-Encoding: chunked\r\nContent-Length: 2\r\n", 411),
}  # fmt: skip


@pytest.mark.parametrize(("lengths", "status"), LENGTHS.values(), ids=LENGTHS.keys())
def test_lengths_that_cannot_be(page, lengths, status):
    head = f"POST /api/draw HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{lengths}\r\n"
    assert page.raw(head.encode() + b"{}").startswith(f"HTTP/1.0 {status} ".encode())


def test_a_body_that_is_too_large_gets_its_sentence(page):
    """The whole body is sent before the answer is read, as browsers do."""
    for kind, path in (("application/json", "/api/draw"), ("application/octet-stream", "/api/hint?net=0&size=64")):
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nContent-Length: {MAX_BODY + 9}\r\n\r\n"
        )
        answer = page.raw(head.encode() + b" " * (MAX_BODY + 9))
        assert b" 413 " in answer and b"at most 16 MiB" in answer


@pytest.fixture
def hasty(loaded):
    page = Page(loaded, read_seconds=0.3, write_seconds=0.3)
    yield page
    page.close()


def test_slow_clients_are_cut_off(hasty):
    """A byte now and then is not enough, in the first line, in the headers and in the body. Others are served."""
    head = (
        b"POST /api/draw HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
    )
    slow = [socket.create_connection(("127.0.0.1", hasty.port)) for _ in range(6)]
    for connection, begin in zip(slow, (b"", b"GE", head[:40], head[:-2], head, head + b"{"), strict=True):
        connection.sendall(begin)
    began, closed = time.monotonic(), set()
    while len(closed) < len(slow) and time.monotonic() < began + 15:
        assert hasty.works()
        for connection in set(slow) - closed:
            try:
                connection.sendall(b"x")
                connection.settimeout(0.01)
                if connection.recv(100) == b"":
                    closed.add(connection)
            except TimeoutError:
                pass
            except OSError:
                closed.add(connection)
    assert len(closed) == len(slow)
    for connection in slow:
        connection.close()
    wait_until(lambda: hasty.server._free._value == CONNECTIONS)


def test_a_client_that_does_not_read_its_answer_is_cut_off(hasty, monkeypatch):
    """A drawing of many large pictures ends when its browser takes nothing any more."""
    monkeypatch.setattr(playground.routes, "HEARTBEAT", 0.05)
    shown = []

    def endless(order, show):
        while True:
            show({"event": "picture", "image": "x" * 500_000})
            shown.append(1)
            time.sleep(0.001)

    hasty.routes.line._draw = endless
    with socket.create_connection(("127.0.0.1", hasty.port)) as connection:
        connection.sendall(draw_request(drawing()))
        wait_until(lambda: shown)
        wait_until(lambda: len(hasty.routes.line) == 0)


GARBAGE = {
    "nothing": b"",
    "zeros": bytes(5000),
    "noise": np.random.default_rng(0).bytes(20_000),
    "a long line": b"A" * 200_000,
    "a long path": b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 500 + b"\r\n",
    "a long header": b"GET / HTTP/1.1\r\na: " + b"b" * 100_000 + b"\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "another version": b"GET / HTTP/9.9\r\n\r\n",
    "no version": b"GET /\r\n",
    "another method": b"BREW / HTTP/1.1\r\n\r\n",
    "a word": b"hello\r\n\r\n",
    "connect": b"CONNECT evil:80 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "brackets": b"GET //[/ HTTP/1.1\r\nHost: [\r\n\r\n",
    "brackets at home": b"GET http://[/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "newlines": b"\n" * 1000,
    "letters beyond ascii": "GET /é HTTP/1.1\r\nHost: é\r\n\r\n".encode(),
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage(hasty, capfd, content):
    answer = hasty.raw(content)
    assert b"Traceback" not in answer and (not answer or b" 200 " not in answer.split(b"\r\n")[0])
    assert hasty.works() and "Traceback" not in capfd.readouterr().err


def test_many_requests_at_once(loaded):
    """200 at once, of all kinds: each gets an answer, and afterwards threads and memory are as before."""
    page = Page(loaded)
    assert page.post(drawing(steps=1))[0] == 200
    threads = threading.active_count()
    large, image = json.dumps(drawing(prompt="a" * 2**21)).encode(), circle(256)
    kinds = [
        lambda: page.ask("GET", "/")[0] == 200,
        lambda: page.ask("GET", "/api/model")[0] == 200,
        lambda: page.ask("POST", "/api/draw", large, Content_Type="application/json")[0] == 400,
        lambda: page.ask("POST", "/api/hint?net=0&size=64", image, Content_Type="application/octet-stream")[0] == 200,
        lambda: page.post(drawing(steps=1, size="32"))[0] in (200, 400),  # 400: too many wait
        lambda: page.raw(b"GET / HTTP/1.1\r\nHost: evil\r\n\r\n").startswith(b"HTTP/1.0 403"),
        lambda: page.raw(os.urandom(3000)) is not None,
    ]
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        with ThreadPoolExecutor(200) as pool:
            answers = list(pool.map(lambda i: kinds[i % len(kinds)](), range(200)))
        assert all(answers) and page.works()
        wait_until(lambda: len(page.routes.line) == 0 and page.server._free._value == CONNECTIONS)
        wait_until(lambda: threading.active_count() <= threads + 1)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 4e6
    finally:
        tracemalloc.stop()
        page.close()
