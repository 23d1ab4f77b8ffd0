"""The page: what is drawn, how its hints are read, in which order drawings are made, and the command that serves it."""

import base64
import http.client
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import drawing.draw as drawing_draw
import play
import playground.routes
import sampler
import train
from ldm import TINY
from playground.hints import RequestError, ValidationHints, read_hint
from playground.jobs import Cancelled, Job, Line
from playground.model import Choices, load
from tests.conftest import settings
from tests.playing import Page, circle, control, draw_request, drawing, npy, png, wait_until
from toy import circles
from training.annotators import ANNOTATORS, annotate
from training.images import Reading
from weights import CheckpointError, ModelSource, load_model
from weights.writing import save_safetensors

ROOT = Path(__file__).parent.parent


# ----------------------------------------------------------------------------------------------------- what is drawn
SAME = {
    "without control": drawing(negative="blue"),
    "several pictures": drawing(num=2, seed=7, controls=[control()]),
    "solver, guidance, guess mode": drawing(solver="dpm", scale=1.5, controls=[control(strength=0.7, guess_mode=True)]),
    "a part of the way": drawing(controls=[control(start=0.3, end=0.8)], size="96x64"),
    "spacing": drawing(solver="euler_a", spacing="karras", steps=3, controls=[control()]),
    "compared": drawing(controls=[control()], strengths=[0, 0.5, -1]),
    "a prompt that looks like a flag": drawing(prompt="--seed 3 'x' $HOME", controls=[control()]),
}


@pytest.mark.parametrize("fields", SAME.values(), ids=SAME.keys())
def test_the_page_draws_what_its_command_draws(page, tmp_path, monkeypatch, fields):
    status, events = page.post(fields)
    pictures = [event for event in events if event["event"] == "picture"]
    assert status == 200 and events[-1] == {"event": "done"}
    assert len(pictures) == fields.get("num", 1) * len(fields.get("strengths", [0]))
    monkeypatch.chdir(tmp_path)
    for i, entry in enumerate(fields.get("controls", [])):
        Path(f"hint-{i + 1}.png" if i else "hint.png").write_bytes(base64.b64decode(entry["hint"]))
    seen = []
    for picture in pictures:
        words = shlex.split(picture["command"])
        assert words[:2] == ["python", "sampler.py"]
        sampler.main([*words[2:], "--out", "out"])
        drawn = sorted(p for p in Path("out").glob("0*.png"))[-1]
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["image"].split(",")[1]))))
        assert np.array_equal(image, np.asarray(Image.open(drawn)))
        assert not any(np.array_equal(image, other) for other in seen)
        seen.append(image)


def test_several_hints_are_drawn_as_their_command_draws_them(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = png(np.eye(64, dtype=np.uint8)[..., None].repeat(3, 2) * 255)
    Path("hint.png").write_bytes(circle())
    Path("hint-2.png").write_bytes(other)
    controls = [control(end=0.9), control(other, strength=0.4, guess_mode=True)]
    picture = page.post(drawing(controls=controls, num=2))[1][-2]
    sampler.main([*shlex.split(picture["command"])[2:], "--out", "out"])
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["image"].split(",")[1]))))
    assert np.array_equal(image, np.asarray(Image.open("out/0001.png")))


def test_a_picture_is_seen_while_it_forms(page):
    _, events = page.post(drawing(steps=3, num=2, controls=[control()]))
    steps = [event for event in events if event["event"] == "step"]
    made = [event["picture"] * 3 + event["step"] for event in steps]
    assert made == sorted(set(made)) and made[-1] == 6 and steps[-1]["seconds"] == 0
    preview = next(event["preview"] for event in steps if event.get("preview"))
    with Image.open(io.BytesIO(base64.b64decode(preview.split(",")[1]))) as image:
        assert image.size == (64, 64)


def test_several_controlnets(page, model_file, base):
    """Two hints of one ControlNet change the picture, and the command names both."""
    left, right = circle(), png(np.eye(64, dtype=np.uint8)[..., None].repeat(3, 2) * 255)
    one = page.post(drawing(controls=[control(left)]))[1]
    both = page.post(drawing(controls=[control(left), control(right, strength=0.5)]))[1]
    none = page.post(drawing(controls=[control(left), control(right, strength=0.5)], strengths=[0, 1]))[1]
    image = lambda events: [event for event in events if event["event"] == "picture"][-1]
    assert image(one)["image"] != image(both)["image"] == image(none)["image"]
    words = shlex.split(image(both)["command"])
    assert words[-8:] == ["1.0", "--control", str(model_file), "--hint", "hint-2.png", "--strength", "0.5"][-8:] or (
        words[words.index("--control") + 1] == str(model_file) and words[-3:] == ["hint-2.png", "--strength", "0.5"]
    )
    further = load(Choices(str(model_file), controls=(str(model_file), str(model_file))))
    assert [c.path for c in further.controls] == [str(model_file)] * 2


def test_a_model_without_controlnet(base):
    page = Page(load(Choices(str(base))))
    try:
        assert json.loads(page.ask("GET", "/api/model")[1])["controls"] == []
        assert page.post(drawing())[1][-1] == {"event": "done"}
        status, (answer,) = page.post(drawing(controls=[control()]))
        assert status == 400 and "no ControlNet" in answer["error"]
        status, body, _ = page.ask("POST", "/api/hint?net=0&size=64", circle(), Content_Type="application/octet-stream")
        assert status == 400 and b"no such ControlNet" in body
    finally:
        page.close()


# -------------------------------------------------------------------------------------------------------------- hints
def test_hints_of_the_validation_set(evil_run):
    loaded = load(Choices(str(evil_run)))
    assert loaded.hints.numbers == [22, 23] and loaded.size == (32, 32)
    assert loaded.describe()["paper"] == "black" and "<script>" in loaded.describe()["hints"][0]["prompt"]
    settings = json.loads((evil_run / "config.json").read_text())
    truth = np.asarray(Image.open(Path(settings["data"]) / "source/23.png"))
    page = Page(loaded)
    try:
        status, body, _ = page.ask("GET", "/api/hint?number=23")
        assert status == 200 and np.array_equal(np.asarray(Image.open(io.BytesIO(body))), truth)
        assert Image.open(io.BytesIO(page.ask("GET", "/api/hint?number=22&size=96x64")[1])).size == (96, 64)
        for number in ("0", "24", "-1", "1e3", "%D9%A2%D9%A2", "", "22/../../config.json", "9" * 5000):
            assert page.ask("GET", f"/api/hint?number={number}")[0] == 400
    finally:
        page.close()


@pytest.mark.parametrize(
    "change",
    [{"data": "nowhere"}, {"data": ""}, {"resolution": "x"}, {"validation": None}, {"data": 3}],
)
def test_a_data_set_that_is_not_there_costs_its_hints_alone(evil_run, change):
    hints = ValidationHints(json.loads((evil_run / "config.json").read_text()) | change)
    assert hints.numbers == [] and hints.note.endswith(".") and "\n" not in hints.note
    with pytest.raises(RequestError):
        hints.read(22)


def test_images_are_read_as_training_reads_them(page):
    """16 bits, palettes, transparency, turned and of another size: the hint is what `data.read_image` gives."""
    gradient = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    ink = np.zeros((96, 48, 4), np.uint8)
    ink[20:70, 10:30, 3] = 255
    for content in (npy(np.random.rand(64, 64, 3).astype(np.float32)), png(gradient), png(ink)):
        status, body, headers = page.ask(
            "POST", "/api/hint?net=0&size=64", content, Content_Type="application/octet-stream"
        )
        got = np.asarray(Image.open(io.BytesIO(body)))
        assert status == 200 and got.shape == (64, 64, 3)
        assert np.array_equal(got, read_hint(content, Reading(3), "area", (64, 64)))
    assert got.std() > 50 and headers["Fraction-Cut"] == "0.5000"


def test_photos_become_hints(page):
    """Each annotator of the table, with its defaults and with numbers of the page."""
    photo = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    described = page.routes.description["annotators"]
    assert [entry["name"] for entry in described] == list(ANNOTATORS)
    ask = lambda query: page.ask(
        "POST", f"/api/hint?net=0&size=64&{query}", png(photo), Content_Type="application/octet-stream"
    )
    for entry in described:
        numbers = {p["name"]: p["low"] + 1 for p in entry["parameters"]}
        for given in ({}, numbers):
            status, body, _ = ask("&".join([f"kind={entry['name']}", *(f"{k}={v}" for k, v in given.items())]))
            truth = annotate(entry["name"], photo, **given)
            assert status == 200 and np.array_equal(
                np.asarray(Image.open(io.BytesIO(body))), truth.repeat(3 // truth.shape[2], 2)
            )
    for query in (
        "kind=x",
        "kind=canny&low=-1",
        "kind=canny&low=a",
        "kind=canny&low=nan",
        "kind=blur&sigma=3",
        "kind=canny&low=1e9",
    ):
        status, body, _ = ask(query)
        assert status == 400 and json.loads(body)["error"].endswith(".")


def test_hints_of_other_channels_are_files(base, tmp_path):
    model = load_model(ModelSource(base, attach=True, hint_channels=5))
    save_safetensors(tmp_path / "m.safetensors", model.state_dict(), {"config": TINY.to_json()})
    page = Page(load(Choices(str(tmp_path / "m.safetensors"))))
    try:
        assert page.routes.description["controls"][0] | {"name": ""} == {"name": "", "channels": 5, "drawable": False}
        content = npy(np.random.rand(32, 32, 5).astype(np.float32))
        status, body, _ = page.ask("POST", "/api/hint?net=0&size=64", content, Content_Type="application/octet-stream")
        assert status == 200 and Image.open(io.BytesIO(body)).mode == "RGB"
        events = page.post(drawing(controls=[control(content)]))[1]
        assert events[-1] == {"event": "done"} and "hint.npy" in events[-2]["command"]
    finally:
        page.close()


def test_hints_of_a_scale_are_scaled_once(base, tmp_path, monkeypatch, capsys):
    """What a run saves, and what the page draws with, are 0 to 255 already: read once more as files of the run are,
    depth of up to 8000 would become black, and class numbers of up to 20 an error."""
    circles.make(tmp_path / "data", 24, 32, seed=3)
    for path in (tmp_path / "data/source").iterdir():
        gray = np.asarray(Image.open(path).convert("L"))
        Image.fromarray(gray.astype(np.uint16) * 20).save(path)  # at most 5100
    run = train.train(settings(base, tmp_path / "data", tmp_path / "run", hint_channels=1, hint_scale=5100.0, steps=1))
    words = shlex.split(capsys.readouterr().out.split("draw:")[1].splitlines()[0])
    sampler_words = [*words[words.index("sampler.py") + 1 :], "--steps", "2", "--num", "1"]
    seen, real = [], drawing_draw.read_hint
    monkeypatch.setattr(drawing_draw, "read_hint", lambda *a: seen.append(real(*a)) or seen[-1])
    sampler.main([*sampler_words, "--out", str(tmp_path / "out")])
    assert seen[0].max() == 1 and seen[0].mean() > 0.02
    page = Page(load(Choices(str(run))))
    monkeypatch.chdir(tmp_path)
    try:
        hint = page.ask("GET", "/api/hint?number=23")[1]
        assert np.asarray(Image.open(io.BytesIO(hint))).max() == 255
        file = (tmp_path / "data/source/23.png").read_bytes()
        assert page.ask("POST", "/api/hint?net=0&size=32", file, Content_Type="application/octet-stream")[1] == hint
        picture = page.post(drawing(controls=[control(hint)], size="32", steps=2))[1][-2]
    finally:
        page.close()
    Path("hint.png").write_bytes(hint)
    sampler.main([*shlex.split(picture["command"])[2:], "--out", "out"])
    assert torch.equal(seen[-1][0] * 255, torch.tensor(np.asarray(Image.open(io.BytesIO(hint)))).float())
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["image"].split(",")[1]))))
    assert np.array_equal(image, np.asarray(Image.open(sorted(Path("out").glob("0*.png"))[-1])))


def test_a_run_on_two_folders_offers_its_hints(base, tmp_path):
    circles.make(tmp_path / "data", 24, 32, seed=3)
    for i in range(24):
        (tmp_path / f"data/target/{i}.txt").write_text("a circle")
    run = train.train(
        settings(base, tmp_path / "data/target", tmp_path / "run", hints=str(tmp_path / "data/source"), steps=1)
    )
    hints = ValidationHints(json.loads((run / "config.json").read_text()))
    assert hints.numbers == [22, 23] and not hints.note and hints.read(22).shape == (32, 32, 3)


def test_hints_of_a_run_that_skipped_rows_are_those_it_held_out(base, tmp_path):
    circles.make(tmp_path / "data", 40, 32, seed=3)
    (tmp_path / "data/target/39.png").write_bytes(b"no picture")
    for i in (*range(11), 37):
        (tmp_path / f"data/source/{i}.png").unlink()
    run = train.train(settings(base, tmp_path / "data", tmp_path / "run", skip_bad_rows=True, steps=1))
    assert load(Choices(str(run))).hints.numbers == [36, 38]  # a tenth of the 27 good ones, not of 40
    shutil.rmtree(tmp_path / "data/target")
    assert load(Choices(str(run))).hints.note == "None of the pairs of the run can be read."


# ------------------------------------------------------------------------------------------------------------- the line
class Slow:
    """Draws by waiting for permission, and notes what it drew."""

    def __init__(self):
        self.go, self.drawn = threading.Semaphore(0), []

    def __call__(self, drawing, show) -> None:
        for step in range(3):
            self.go.acquire()
            show({"event": "step", "step": step})
        self.drawn.append(drawing)
        if isinstance(drawing, Exception):
            raise drawing


def drain(job: Job) -> list[dict]:
    events = []
    while not events or events[-1]["event"] not in ("done", "error"):
        event = job.next(10)
        assert event, events
        events.append(event)
    return events


def test_one_drawing_after_the_other():
    slow = Slow()
    line = Line(slow, most=3)
    first, second, third, fourth = (line.submit(name) for name in "abcd")
    assert [line.place(job) for job in (first, second, third, fourth)] == [0, 1, 2, 3] and len(line) == 4
    with pytest.raises(RequestError, match="3 drawings are waiting already"):
        line.submit("e")
    second.cancel()
    assert [line.place(job) for job in (first, third, fourth)] == [0, 1, 2]
    fifth = line.submit("e")
    first.cancel()  # ends with its next step
    slow.go.release(10)
    assert drain(third)[-1] == drain(fourth)[-1] == drain(fifth)[-1] == {"event": "done"}
    assert slow.drawn == ["c", "d", "e"] and line.place(fifth) == 0
    line.close()


ERRORS = [
    (ValueError("two\nlines"), "two\\nlines"),
    (OSError("gone"), "gone"),
    (RuntimeError("secret"), "failed (RuntimeError)"),
    (torch.OutOfMemoryError("x"), "out of memory"),
    (KeyError("secret"), "failed (KeyError)"),
    (MemoryError(), "failed"),
]


@pytest.mark.parametrize(("error", "sentence"), ERRORS)
def test_what_goes_wrong_is_told_and_the_next_is_drawn(error, sentence, capsys):
    slow = Slow()
    line, _ = Line(slow), slow.go.release(6)
    bad, good = line.submit(error), line.submit("good")
    told = drain(bad)[-1]
    assert told["event"] == "error" and sentence in told["message"] and "secret" not in told["message"]
    assert "\n" not in told["message"] and drain(good)[-1] == {"event": "done"}
    assert ("Traceback" in capsys.readouterr().err) == (
        not isinstance(error, (ValueError, OSError, torch.OutOfMemoryError))
    )
    line.close()


def test_a_slow_browser_gets_the_newest_step_and_every_picture():
    job = Job("x")
    for event in (
        {"event": "step", "step": 1, "preview": "p"}, {"event": "step", "step": 2}, {"event": "picture", "picture": 0},
        {"event": "step", "step": 1}, {"event": "step", "step": 2, "preview": "q"}, {"event": "picture", "picture": 1},
    ):  # fmt: skip
        job.show(event)
    got = [job.next(0) for _ in range(5)]
    assert [e and (e["event"], e.get("step"), e.get("preview")) for e in got] == [
        ("step", 2, "p"), ("picture", None, None), ("step", 2, "q"), ("picture", None, None), None,
    ]  # fmt: skip
    job.cancel()
    assert job.drawing is None
    with pytest.raises(Cancelled):
        job.show({"event": "step"})


def test_closing_the_line_ends_it():
    slow = Slow()
    line = Line(slow)
    running, waiting = line.submit("a"), line.submit("b")
    wait_until(lambda: line.place(running) == 0)
    threading.Timer(0.05, slow.go.release, (5,)).start()
    line.close()
    assert not line._worker.is_alive() and slow.drawn == [] and running.cancelled and waiting.cancelled


def test_a_closed_tab_frees_the_line(loaded, monkeypatch):
    """Of two drawings of 999 steps the second tells its place; when both browsers are gone, a third is drawn."""
    monkeypatch.setattr(playground.routes, "HEARTBEAT", 0.02)
    page = Page(loaded)
    try:
        tabs = []
        for place in (b'"place": 0', b'"place": 1'):
            tabs.append(socket.create_connection(("127.0.0.1", page.port)))
            tabs[-1].sendall(draw_request(drawing(steps=999)))
            answer = b""
            while place not in answer:
                answer += tabs[-1].recv(1 << 16)
        assert len(page.routes.line) == 2
        tabs[1].close()
        wait_until(lambda: len(page.routes.line) == 1)
        tabs[0].close()
        assert page.post(drawing(steps=1))[1][-1] == {"event": "done"}
    finally:
        page.close()


# --------------------------------------------------------------------------------------------------------- the command
def test_where_there_is_no_model_the_way_out_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="there is no run yet; `make train`"):
        play.main([])
    with pytest.raises(CheckpointError, match="x.safetensors: there is no such run"):
        play.main(["--model", "x.safetensors"])


def test_a_port_that_is_taken(page, loaded):
    with pytest.raises(OSError, match=f"{page.port} cannot be listened at .*--port 0 takes a free one"):
        play.listen("127.0.0.1", page.port, page.routes)


def test_the_defaults_listen_to_this_machine_alone():
    args = play.parse([])
    assert args.host == "127.0.0.1" and args.model == "runs/demo" and args.port == 7860


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_the_command_serves_until_a_signal(model_file):
    flags = ["--model", str(model_file), "--port", "0", "--no-browser", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "play.py", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        line = next(line for line in process.stdout if "http://" in line)
        port = int(re.search(r"127\.0\.0\.1:(\d+)/", line)[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=20)[0]
        assert process.returncode == 0 and said.strip() == "the page is closed"
    finally:
        process.kill()
