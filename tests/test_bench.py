"""Claims of speed are made by a command; here it is seen to measure what it says."""

import dataclasses
import json
import re

import pytest

import bench
from benchmarks import figures, loader, table, tasks
from benchmarks.figures import Row, measure_row, task_flops
from benchmarks.workers import Comparison
from config import Config, resolve
from ldm import MODELS
from tests.test_sdxl_files import TINIER


def run(capsys, *arguments: str) -> dict[str, str]:
    bench.main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_step_against_diffusers(capsys):
    seen = run(capsys, "step", "--resolution", "32", "--repeat", "2", "--against", "diffusers", "--no-cache")
    number = lambda key: float(seen[key].split()[0])
    assert number("seconds a step") > 0 and number("times as fast") > 0 and 0 < number("fraction of their memory") < 10
    slowest, fastest = map(float, re.findall(r"[\d.]+", seen["times as fast"])[1:])  # pair by pair
    assert slowest * 0.95 < number("diffusers, seconds") / number("seconds a step") < fastest * 1.05  # of the medians
    spent = {k.strip(): float(v) for k, v in seen.items() if k.startswith("    ")}
    assert spent["of which VAE"] > 0
    assert spent["of which VAE"] + spent["of which text encoder"] <= spent["batch to the device"] + 0.002
    assert {"ControlNet", "UNet, encoder", "UNet, decoder", "backward", "optimizer and clipping"} <= spent.keys()
    assert 0 < number("fraction of the limit") < 1 and float(seen["TFLOP a step"]) >= 0


def test_settings_of_train_py_shape_the_step(capsys, monkeypatch):
    """The step that is measured, and its arithmetic, are those of the settings."""
    asked = []

    def compare(task, config, *_):
        asked.append(config)
        return Comparison({"ours": [1.0]}, {"ours": 1.0}, [1e12], {})

    monkeypatch.setattr(figures, "compare", compare)
    flops = lambda *flags: float(run(capsys, "step", "--resolution", "128", "--repeat", "1", *flags)["TFLOP a step"])
    assert flops("--batch-size", "8", "--no-sd-locked") > flops("--batch-size", "8") > flops("--batch-size", "2") > 0
    assert [(c.batch_size, c.sd_locked, c.memory) for c in asked] == [
        (8, False, "exact"), (8, True, "exact"), (2, True, "exact"),
    ]  # fmt: skip


def test_images_against_the_pipeline(capsys):
    seen = run(capsys, "sample", "--resolution", "32", "--steps", "3", "--repeat", "1", "--against", "diffusers")
    assert all(float(v.split()[0]) > 0 for k, v in seen.items() if k not in ("model", "machine")) and len(seen) == 8


@pytest.mark.parametrize(
    "words",
    ["step --resolution -64", "step --repeat 0", "memory --batch-size 0", "memory --repeat -1", "sample --steps 0"],
)
def test_numbers_out_of_their_range_are_one_line(words, capsys):
    with pytest.raises(SystemExit):
        bench.main(words.split())
    assert f"{words.split()[1]}: is {words.split()[2]}, should be" in " ".join(capsys.readouterr().err.split())


def test_the_loader(capsys):
    """Each layout, many rows that share a few images, and what an H100 takes, which falls with the size."""
    seen = run(capsys, "data", "--resolution", "32", "--count", "16")
    rates = {k: float(v) for k, v in seen.items() if k.startswith("samples a second")}
    assert len(rates) == 6 and all(rate > 0 for rate in rates.values())
    assert {
        "samples a second from the cache",
        "samples a second from PNG",
        "samples a second from PNG in a tar shard",
    } < {*rates}
    assert float(seen["CPU cores like these that give 1.5 times as many from PNG"]) > 0


def test_many_rows_and_several_numbers_of_workers(tmp_path, monkeypatch):
    found = loader.sources(tmp_path, 32, 4, rows=50)
    assert [len(samples.dataset) for samples in found.values()] == [4, 4, 4, 4, 50, 4]
    assert loader.samples_per_second(found["PNG in a list of 50 rows"], 16, 1) > 0
    monkeypatch.setattr(loader, "samples_per_second", lambda samples, count, workers: 100.0 * (workers or 1))
    monkeypatch.setattr(loader, "samples_needed", lambda side: 1000.0)
    seen = loader.measure_data(32, [0, 2], 4)
    assert seen["samples a second from PNG, 0 workers"] == "100" and len(seen) == 1 + 10 + 1 + 2
    assert seen["CPU cores like these that give 1.5 times as many from the cache"] == "15.0"


def test_sdxl_has_its_inputs(monkeypatch):
    """Both steps, both images and the count of their arithmetic take what SDXL is told besides."""
    monkeypatch.setitem(MODELS, "tinier", TINIER)
    config = Config(base="tinier", out="none", resolution="64", device="cpu", batch_size=1, log_steps=1)
    config = resolve(config, "exact")
    for make in (tasks.OurStep, tasks.diffusers_step, tasks.our_image, tasks.diffusers_image):
        make(config, "tinier")()
    assert task_flops("image", config, "tinier") > 0
    tasks.OurStep(dataclasses.replace(config, cache=False), "tinier")()


def test_the_table(monkeypatch, capsys):
    """Rows of what is measured, in order; what there is no time for is named, and so is a missing package."""
    told = []

    def measure(config, seconds: float) -> list[Row]:
        told.append(config)
        monkeypatch.setattr(table.time, "monotonic", lambda: seconds)
        return [Row("a step", "1 s", "2 s", "2.00", "0.5")]

    monkeypatch.setattr(table, "measure_row", lambda task, config, *_: measure(config, 100.0))
    monkeypatch.setattr(table, "loader_rows", lambda: measure(None, 1000.0))
    monkeypatch.setattr(table, "available_memory", lambda: 64.0)
    monkeypatch.setattr(table.time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    bench.main(["table", "--device", "cpu"])
    said = capsys.readouterr().out
    assert said.count("| a step | 1 s | 2 s | 2.00 | 0.5 |") == 3 and "pip install -r requirements-dev.txt" in said
    assert "left out for want of time (--minutes): " in said and "a step of SD 1.5, fp32" in said
    assert (told[0].batch_size, told[0].channels_last, told[0].precision, told[2]) == (8, True, "fp32", None)


def test_the_row_of_an_image(monkeypatch):
    monkeypatch.setattr(figures, "compare", lambda *_: Comparison({"ours": [2.0]}, {"ours": 1.0}, [1e9], {}))
    config = resolve(Config(base="tiny", out="none", resolution="32", device="cpu", log_steps=2), "exact")
    speed, memory = measure_row("image", config, "tiny", 1, False)
    assert speed.what == "image: tiny, 32 px, 2 steps, fp32" and memory.what == f"{speed.what}: memory"
    assert speed.ours == "2.000 s" and 0 < float(speed.limit.split()[0]) < 1 and speed.theirs == ""
    one, two = (task_flops("image", dataclasses.replace(config, log_steps=n), "tiny") for n in (1, 2))
    assert 1 < two / one < 2  # the decoder is asked once


def test_what_cannot_be_measured_says_so(monkeypatch):
    with pytest.raises(SystemExit, match="multiple of 32 for tiny"):
        bench.main(["step", "--resolution", "50"])
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install -r requirements-dev.txt"):
        bench.main(["step", "--against", "diffusers"])
