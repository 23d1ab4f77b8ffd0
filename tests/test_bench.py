"""Claims of speed are made by a command; here it is seen to measure what it says."""

import json
import re

import pytest

import bench


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


def test_settings_of_train_py_shape_the_step(capsys):
    flops = lambda *flags: float(run(capsys, "step", "--resolution", "128", "--repeat", "1", *flags)["TFLOP a step"])
    assert flops("--batch-size", "8", "--no-sd-locked") > flops("--batch-size", "8") > flops("--batch-size", "2") > 0


def test_images_against_the_pipeline(capsys):
    seen = run(capsys, "sample", "--resolution", "32", "--steps", "3", "--repeat", "1", "--against", "diffusers")
    assert all(float(v.split()[0]) > 0 for k, v in seen.items() if k not in ("model", "machine")) and len(seen) == 8


def test_the_loader(capsys):
    seen = run(capsys, "data", "--resolution", "32")
    rates = {k: float(v) for k, v in seen.items() if k.startswith("samples a second")}
    assert len(rates) == 6 and all(rate > 0 for rate in rates.values())
    assert {
        "samples a second from the cache",
        "samples a second from PNG",
        "samples a second from PNG in a tar shard",
    } < {*rates}


def test_what_cannot_be_measured_says_so(monkeypatch):
    with pytest.raises(SystemExit, match="multiple of 32 for tiny"):
        bench.main(["step", "--resolution", "50"])
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install -r requirements-dev.txt"):
        bench.main(["step", "--against", "diffusers"])
