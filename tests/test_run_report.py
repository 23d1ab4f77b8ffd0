"""The page of a run: what it holds, what it survives, and that it works in a browser."""

import base64
import io
import json
import math
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import config as config_module
import report.page
import train
from config import Config, ConfigError
from drawing.request import parse
from report.charts import nice_ticks, running_mean, short, thin
from report.page import write_report
from report.pictures import ImageLog, list_grids, save_animation
from report.record import read_record
from tests.browser import Browser
from tests.conftest import settings
from training.history import read_history
from training.records import GRID, Metrics, save_grid
from training.run_folder import RunFolder
from weights import CheckpointError


def fake_run(path: Path, lines: list | None = None, grids: int = 0, **more) -> Path:
    """The folder of a run with these metrics and an image log of `grids` grids."""
    path.mkdir(parents=True)
    config = dict(base="b.safetensors", data="data/x", steps=500, resolution="16x16") | more
    (path / "config.json").write_text(json.dumps(config))
    if lines is not None:
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for i in range(grids):
        grid(path, 10 * i)
    return path


def grid(run: Path, step: int, side: int = 16) -> None:
    """An image grid whose prediction is a shade of gray that is the step."""
    flat = lambda value: [np.full((side, side, 3), value, np.uint8)] * 2
    columns = {"control": flat(0), "prediction": flat(step % 256), "ground truth": flat(255), "reconstruction": flat(9)}
    save_grid(run / f"image_log/step-{step:06d}.png", columns, ["first prompt", "second prompt"])


def data_of(path: Path) -> dict:
    """What the page gives its script."""
    text = path.read_text()
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def tags(text: str) -> list[tuple[str, dict]]:
    """The elements of a page as a browser sees them: name and attributes."""
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda name, attributes: found.append((name, dict(attributes)))
    parser.feed(text)
    return found


def shade(uri: str) -> int:
    image = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    return round(float(np.asarray(image.convert("L")).mean()))


def gains(*values) -> list[dict]:
    return [
        {"step": 100 * i, "control_gain": v, "val_loss": 0.1, "val_loss_other_hints": 0.2} for i, v in enumerate(values)
    ]


# ------------------------------------------------------------------------------------------------------- what it holds
def test_a_training_leaves_its_page(evil_run):
    text = (evil_run / "report.html").read_text()
    for title in (
        "Loss",
        "Control gain",
        "Validation loss",
        "Gradient norm",
        "Learning rate",
        "Images a second",
        "Memory",
    ):
        assert f"<h3>{title}</h3>" in text
    assert text.count("<svg") == 7 and "4 of 4" in text
    assert "--learning-rate" in text and "<td>0.001</td><td>1e-05</td>" in text  # a setting beside its default
    assert '<th scope="row">trained on</th><td>22</td>' in text and '<th scope="row">PyTorch</th>' in text
    for command in ("train.py --resume", "sampler.py --model", "merge.py export"):
        assert f"python {command}" in text
    log = data_of(evil_run / "report.html")["logs"][0]
    assert log["steps"] == [0, 2, 4] and len(log["rows"]) == 2 and len(log["rows"][0]) == 3
    places = [v for _, attributes in tags(text) for k, v in attributes.items() if k in ("src", "href", "srcset")]
    assert places and all(place.startswith("data:image/jpeg;") for place in places) and "url(" not in text
    history = read_history(evil_run)
    assert [e["step"] for e in history if "memory_gib" in e] == [0, 2, 4] and "start" in history[0]
    with Image.open(evil_run / "progress.gif") as animation:
        assert animation.n_frames == 3 and animation.info["loop"] == 0


def test_nothing_becomes_markup(evil_run):
    text = (evil_run / "report.html").read_text()
    assert "<script>document" not in text and "<img src=x" not in text and "<b>run" not in text
    assert text.count("<script") == 2
    assert (
        "&lt;script&gt;document.title=&#x27;evil" in text
        and "&lt;b&gt;run &amp; co" not in text.split("<style>")[1][:9]
    )


def test_report_makes_the_same_page_later(evil_run, tmp_path, capsys):
    out = tmp_path / "page.html"
    train.main(["--report", str(evil_run), "--out", str(out)])
    assert str(out) in capsys.readouterr().out
    undated = lambda path: re.sub(r"written [\d: -]+", "", path.read_text())
    assert undated(out) == undated(evil_run / "report.html")


def test_an_anew_run_does_not_keep_the_page_of_the_one_before(tmp_path):
    run = fake_run(tmp_path / "run", [], 1)
    made = ("report.html", "progress.gif", "history.jsonl")
    for name in made:
        (run / name).write_text("x")
    run_folder = RunFolder(run, Config(out=str(run)), "cpu")
    run_folder.prepare(anew=False)
    assert all((run / name).exists() for name in made)
    run_folder.prepare(anew=True)
    assert not any((run / name).exists() for name in made)


def test_the_sudden_convergence_is_marked(tmp_path):
    run = fake_run(tmp_path / "a", gains(0, 0.05, 0.3, 0.4))
    text = write_report([run]).read_text()
    assert "sudden convergence, step 200" in text and 'class="mark c1" d="M666.7 0' in text
    text = write_report([fake_run(tmp_path / "b", gains(0, 0.05, 0.3, 0.05))]).read_text()
    assert "sudden convergence, step" not in text and "not yet" in text


def test_several_runs_lie_over_one_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [{"step": s, "loss": 1 / s, "mine": 2.0} for s in range(1, 20)]
    runs = [
        fake_run(Path("x/run"), lines + gains(0, 0.2, 0.3), learning_rate=1e-5),
        fake_run(Path("y/run"), lines, learning_rate=3e-5, grids=2),
    ]
    path = write_report([str(run) for run in runs])
    assert path == Path("compare.html") and not list(tmp_path.glob("*.gif"))
    text, page = path.read_text(), data_of(path)
    assert [curve["label"] for curve in page["charts"][0]] == ["x/run", "y/run"]  # the same name twice
    assert {curve["color"] for curve in page["charts"][0]} == {0, 1}
    assert "--learning-rate" in text and "<td>3e-05</td>" in text and "<h3>mine</h3>" in text
    assert page["logs"][0]["steps"] == [] and page["logs"][1]["steps"] == [0, 10]


@pytest.mark.parametrize(
    "more", [["--steps", "5"], ["--resume", "r"], ["--overwrite"], ["--plan"], ["--data", "d"], ["--data-changed"]]
)
def test_report_goes_with_no_flag_that_would_be_ignored(more):
    with pytest.raises(ConfigError, match="trains nothing"):
        config_module.parse(["--report", "runs/x", *more])
    command = config_module.parse(["--report", "a", "b", "--out", "c.html"])
    assert command.report == ["a", "b"] and command.config.out == "c.html"


def test_what_is_no_run_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="not the folder of a training run") as e:
        write_report([str(tmp_path)])
    assert "\n" not in str(e.value)


# ---------------------------------------------------------------------------------------------------- what it survives
NAN, INF = float("nan"), float("inf")
ODD = {
    "nothing measured": [],
    "one line": [{"step": 1, "loss": 0.5}],
    "nan throughout": [{"step": s, "loss": NAN, "grad_norm": INF, "control_gain": NAN} for s in range(9)],
    "nan in between": [{"step": s, "loss": NAN if s % 3 else 0.1 * s, "grad_norm": 1e300} for s in range(50)],
    "equal values": [{"step": s, "loss": 0.25, "learning_rate": 0.0} for s in range(50)],
    "huge and tiny": [{"step": 10**15, "loss": 1e308}, {"step": 5, "loss": -1e308}, {"step": 6, "loss": 5e-324}],
    "unknown keys": [{"step": s, "<b>mine</b>": s / 2, "epoch": 1, "words": "x", "list": [1]} for s in range(5)],
    "steps in disorder": [{"step": s, "loss": float(s)} for s in (5, 3, 9, 3, -4)],
    "lines of another kind": [[], 3, {"loss": 1.0}, {"step": "x"}, {"step": True, "loss": 1.0}],
}


@pytest.mark.parametrize("lines", ODD.values(), ids=ODD.keys())
def test_odd_metrics(tmp_path, monkeypatch, lines):
    monkeypatch.chdir(tmp_path)
    run = fake_run(Path("run"), lines)
    for path in (write_report([run]), write_report([run, fake_run(Path("b"), gains(0, 1, 1))], "c.html")):
        page = data_of(path)
        assert all(math.isfinite(v) for chart in page["charts"] for curve in chart for v in curve["x"] + curve["y"])
        assert all(curve["x"] == sorted(curve["x"]) for chart in page["charts"] for curve in chart)
        shown = re.sub(r"<(script|style).*?</\1>", "", path.read_text(), flags=re.S)
        assert not re.search(r"\b(nan|inf)\b", shown, re.I)


def test_what_is_not_finite_is_told(tmp_path):
    text = write_report([fake_run(tmp_path / "run", ODD["nan in between"])]).read_text()
    assert "33 values are not finite and left out" in text


def _without_mark(run: Path) -> None:
    for path in (run / "image_log").iterdir():
        Image.open(path).convert("RGB").save(path)


def _with_mark(places) -> None:
    def change(run: Path) -> None:
        for path in (run / "image_log").iterdir():
            image, chunks = Image.open(path).convert("RGB"), PngImagePlugin.PngInfo()
            chunks.add_text(GRID, places if isinstance(places, str) else json.dumps(places))
            image.save(path, pnginfo=chunks)

    return change


GOOD = {"size": [16, 16], "rows": [30], "columns": {"control": 6, "prediction": 110}, "captions": ["a"]}
DAMAGE = {
    "without the mark": _without_mark,
    "no json": _with_mark("{"),
    "deep json": _with_mark("[" * 100_000),
    "another type": _with_mark([1, 2]),
    "no prediction": _with_mark(GOOD | {"columns": {"control": 6}}),
    "outside": _with_mark(GOOD | {"rows": [10_000]}),
    "before the edge": _with_mark(GOOD | {"columns": {"control": -6, "prediction": 110}}),
    "nothing in it": _with_mark(GOOD | {"size": [0, 16]}),
    "no rows": _with_mark(GOOD | {"rows": []}),
    "infinite": _with_mark(json.dumps(GOOD | {"rows": [INF]})),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_grids_that_do_not_say_where_their_pictures_are_are_shown_whole(tmp_path, damage):
    run = fake_run(tmp_path / "run", gains(0, 1), 3)
    damage(run)
    grid(run, 900)  # a later version went on with the run
    log = data_of(write_report([run]))["logs"][0]
    assert log["steps"] == [0, 10, 20, 900] and len(log["grids"]) == 4 and not log["rows"]
    assert not (run / "progress.gif").exists()


def test_grids_that_cannot_be_read_are_left_out(tmp_path):
    run = fake_run(tmp_path / "run", gains(0, 1), 3)
    log = run / "image_log"
    (log / "step-000010.png").write_bytes((log / "step-000010.png").read_bytes()[:150])
    (log / "step-000011.png").write_bytes(b"")
    (log / "step-000012.png").mkdir()
    (log / "step-abc.png").write_bytes(b"x")
    Image.new("RGB", (8, 8)).save(log / "step-000013.png", "GIF")
    Image.new("1", (20_000, 20_000)).save(log / "step-000014.png")
    assert data_of(write_report([run]))["logs"][0]["steps"] == [0, 20]


def test_the_commands_of_a_run_whose_hints_have_a_scale(evil_run, tmp_path):
    """Its hint.png is scaled already; and a prompt may look like a flag."""
    run = shutil.copytree(evil_run, tmp_path / "run")
    drawing = lambda: shlex.split(read_record(run).commands("-x")["draw"])
    assert "--hint-scale" not in drawing() and "--prompt=-x" in drawing()
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"hint_scale": 20.0}))
    request = parse(drawing()[2:])
    assert request.controls[0].hint_scale == 0 and request.prompt == "-x"
    (run / "hint.png").unlink()  # it stops before its end: the hint is one of the user's
    assert "--hint-scale" not in drawing() and "hint.png" in drawing()


def test_what_a_resume_gave_up_is_not_in_the_report(tmp_path):
    """Resumed at 300 after 1000 steps, and stopped at 400: memory measured on the other way is not the run's."""
    (tmp_path / "config.json").write_text(json.dumps({"base": "b", "steps": 1000}))
    entries = [{"step": 0, "start": "a"}, *({"step": s, "memory_gib": s / 1000} for s in (300, 600, 1000))]
    entries += [{"step": 300, "start": "b"}, {"step": 400, "memory_gib": 0.5}]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (tmp_path / "metrics.jsonl").write_text('{"step": 400, "loss": 0.1}\n')
    record = read_record(tmp_path)
    assert record.end == 400 and record.series("memory_gib") == ([300, 400], [0.3, 0.5])
    assert "resume" in record.commands("p")


def test_a_run_of_which_only_the_settings_are_there(tmp_path):
    run = fake_run(tmp_path / "run", precision=None, unheard_of={"a": [1]}, memory="fast")
    (run / "history.jsonl").write_text(
        '{"step": 1, "start": "x", "machine": 3, "data": {"rows": [1]}}\n{"st\n[1]\n' + "[" * 99999
    )
    text = write_report([run]).read_text()
    assert "Nothing was measured yet" in text and "1 of 500" in text and "started x" in text


def test_a_page_that_cannot_be_written_costs_the_page_alone(base, folder, tmp_path, monkeypatch, capsys):
    errors = iter([OSError(28, "No space left on device"), RuntimeError("a mistake"), KeyError("x"), ValueError("y")])

    def fail(*_):
        raise next(errors)

    monkeypatch.setattr(report.page, "page", fail)
    run = train.train(settings(base, folder, tmp_path / "run"))
    said = capsys.readouterr().out
    assert said.count("report.html could not be written") == 1 and not (run / "report.html").exists()
    assert not [p for p in run.iterdir() if "partial" in p.name] and (run / "checkpoints/step-000004").is_dir()
    assert not list(errors)  # each measurement and the end tried


def test_a_history_that_lost_half_a_line_goes_on(tmp_path):
    from training.history import History

    history = History(tmp_path)
    history.start(0, data={"rows": 3})
    with open(history.path, "ab") as f:
        f.write(b'{"step": 5, "memo')
    history.measure(7, "cpu")
    assert [entry["step"] for entry in read_history(tmp_path)] == [0, 7]


# ----------------------------------------------------------------------------------------------------------- its parts
def test_thinning_keeps_means_and_extremes():
    values = np.sin(np.arange(10_007) / 50).tolist()
    values[5000], values[7000] = 9.0, NAN
    points = thin(range(10_007), values, 400)
    assert len(points.steps) == 400 and points.steps[-1] == 10_006 and points.highs.max() == 9
    assert np.all(points.lows <= points.means) and np.all(points.means <= points.highs)
    assert abs(np.average(points.means) - np.nanmean(values)) < 1e-3
    few = thin([1, 2, 3], [1.0, INF, 3.0])
    assert few.steps.tolist() == [1, 3] and few.means.tolist() == [1, 3]


def test_the_running_mean_passes_over_what_is_not_finite():
    means = running_mean([NAN, 1.0, NAN, INF, 1.0, 2.0], decay=0.5)
    assert math.isnan(means[0]) and means[1:] == [1, 1, 1, 1, 1.5]


@pytest.mark.parametrize("low, high", [(0, 1), (-3.2, 7.9), (1e-9, 2e-9), (0, 1e15), (0.25, 0.26), (-1e300, 1e300)])
def test_ticks_are_round_and_inside(low, high):
    ticks = nice_ticks(low, high, 5)
    assert 2 <= len(ticks) <= 6 and all(low - 1e-6 * abs(low) <= t <= high * (1 + 1e-6) for t in ticks)
    assert all(len(short(t)) <= 20 for t in ticks)


def test_a_long_image_log_is_thinned_and_each_grid_opened_once(tmp_path, monkeypatch):
    run = fake_run(tmp_path / "run", [])
    for step in range(100):
        grid(run, step, side=4)
    opened, real = [], report.pictures.cut
    monkeypatch.setattr(report.pictures, "cut", lambda path: opened.append(path.name) or real(path))
    log = ImageLog(run)
    shown = log.read()
    assert 20 <= len(shown["steps"]) <= 41 and shown["steps"][0] == 0 and shown["steps"][-1] == 99
    assert list(list_grids(run)) == shown["steps"]
    grid(run, 100, side=4)
    count = len(opened)
    assert log.read()["steps"][-1] == 100 and len(opened) == count + 1
    grid(run, 100, side=4)  # drawn again, as after a resume
    log.read()
    assert opened[count:] == ["step-000100.png"] * 2


def test_pictures_are_those_of_their_step(tmp_path):
    run = fake_run(tmp_path / "run", [], 5)
    log = ImageLog(run).read()
    assert [shade(uri) for uri in log["rows"][1]["predictions"]] == [0, 10, 20, 30, 40]
    assert shade(log["rows"][0]["control"]) == 0 and shade(log["rows"][0]["truth"]) == 255
    assert [row["caption"] for row in log["rows"]] == ["first prompt", "second prompt"]
    assert save_animation(log, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames == 5
        animation.seek(4)
        assert animation.info["duration"] > 2000
        assert abs(int(np.asarray(animation.convert("L"))[50, 110]) - 40) < 12


def test_metrics_in_memory_are_taken(tmp_path):
    run = fake_run(tmp_path / "run")
    metrics = Metrics(run)
    metrics.lines += [{"step": 3, "loss": 0.5}]
    assert read_record(run, metrics.lines).end == 3 and read_record(run).end == 1


# ------------------------------------------------------------------------------------------------------- in a browser
def test_in_a_browser(evil_run, tmp_path):
    with Browser(tmp_path) as browser:
        browser.open((evil_run / "report.html").as_uri())
        left, top, width, height = browser.box(".chart .plot")
        browser.mouse("mouseMoved", left + width / 2, top + height / 2)
        assert "step 2" in browser.run("document.querySelector('.tip:not([hidden])').textContent")
        browser.run("document.querySelector('.chart').focus()")
        browser.key("ArrowRight")
        assert "step 3" in browser.run("document.querySelector('.tip:not([hidden])').textContent")
        source = "document.querySelector('[data-row]').src"
        browser.run("document.querySelector('.slide input').focus()")
        newest = browser.run(source)
        browser.key("ArrowLeft")
        assert browser.run(source) != newest and browser.run("document.querySelector('output').textContent") == "step 2"
        for page, runs in ((evil_run / "report.html", None), (tmp_path / "both.html", [evil_run, evil_run])):
            if runs:
                write_report([str(run) for run in runs], str(page))
            for size in (390, 1280):
                browser.resize(size, 900)
                browser.open(page.as_uri())
                assert browser.run("document.documentElement.scrollWidth") <= size
                assert "evil" not in browser.run("document.title.split('-')[0]") and not browser.run(
                    "document.images.x"
                )
        assert not browser.problems() and all(url.startswith("file:") for url in browser.requests())
