"""The command line that draws: what its flags mean, lists and grids, and the settings in the pictures."""

import dataclasses
import json
import os
import re
import shlex
import tarfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import drawing.draw
import drawing.request
import drawing.sheets
import sampler
from config import ConfigError
from drawing.command import run_command
from drawing.loading import ImageFile, load, weights_digest
from drawing.metadata import parameters, read_parameters
from drawing.pictures import plan, read_prompts, request_of, unique
from drawing.request import ControlRequest, Request, command_line, parse
from ldm import ModelConfig
from tests.fuzz_inputs import save_micro_model
from toy import circles
from training.console import shell_line
from training.images import DataError
from weights import CheckpointError, ModelSource, load_control, load_model
from weights.writing import save_safetensors

MODEL = ["--model", "m", "--prompt", "p"]


# -------------------------------------------------------------------------------------------------------------- flags
@pytest.fixture
def runs(monkeypatch):
    """Models of the name `run` are runs."""
    monkeypatch.setattr(drawing.request, "is_run", lambda path: path == "run")


def controls(*flags: str, model: str = "m") -> list[dict]:
    """The ControlNets that flags name: what is not at its default of each."""
    default = ControlRequest()
    request = parse(["--model", model, "--prompt", "p", *flags])
    return [{k: v for k, v in dataclasses.asdict(c).items() if v != getattr(default, k)} for c in request.controls]


def test_flags_belong_to_the_control_before_them(runs):
    a, b = {"control": "A", "hint": "a"}, {"control": "B", "hint": "b"}
    assert controls() == [] and controls("--hint", "x", "--strength", "0.5") == [{"hint": "x", "strength": 0.5}]
    assert controls("--control", "A", "--hint", "a", "--control", "B", "--hint", "b") == [a, b]
    flags = ["--guess-mode", "--control-start", "0.2", "--control-end", "0.6", "--no-only-mid-control"]
    settings = dict(guess_mode=True, control_start=0.2, control_end=0.6, only_mid_control=False)
    assert controls("--control", "A", "--hint", "a", *flags, "--control", "B", "--hint", "b") == [a | settings, b]
    assert controls("--control", "A", "--hint", "a", "--control", "B", *flags, "--hint", "b") == [a, b | settings]
    # what stands before the first --control is the first one's, or that of the run's own ControlNet
    before = ["--hint", "x", "--strength", "0.5", "--control", "A"]
    assert controls(*before) == [{"control": "A", "hint": "x", "strength": 0.5}]
    assert controls(*before, "--hint", "a", model="run") == [{"hint": "x", "strength": 0.5}, a]
    assert controls("--control", "A", "--hint", "a", model="run") == [a]
    # as before there were several: the last of two counts, and empty texts are no flags
    assert controls("--hint", "x", "--hint", "y") == [{"hint": "y"}]
    assert controls("--hint", "x", "--control", "A", "--hint", "y") == [{"control": "A", "hint": "y"}]
    assert controls("--hint", "", "--control", "") == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--control A", "--control A has no --hint"),
        ("--control A --hint a --control B", "--control B has no --hint"),
        ("--control A --control B --hint b", "--control A has no --hint"),
        ("--control A --hint a --control B --strength 0.5", "--strength belongs to a hint, and --control B has no"),
        ("--strength 0.5", "--strength belongs to a hint, and the ControlNet of --model has no --hint"),
        ("--guess-mode --model run --control A --hint a", "--guess-mode belongs to a hint, and the ControlNet of --mo"),
        ("--control A --hint a --hint b --control B", "--hint b: --control A has a --hint already (a)"),
        ("--hint a --hints f", "the ControlNet of --model has --hint and --hints"),
        ("--hint a --strength 1 --strengths 0,1", "has --strength and --strengths"),
        ("--control A --hint a --strengths 0,1 --control B --hint b --strengths 0,1", "one ControlNet can have"),
        ("--prompt \udcff", "--prompt is '\\udcff', should be UTF-8 text"),
        ("--denoise 0.5", "--denoise says how much of the picture at --init"),
        ("--hints f --seeds 0-3", "a grid (--seeds, --strengths) is of one hint"),
        ("--seeds 0-3 --num 2", "a grid has one picture in each cell"),
        ("--seeds 0-3 --seed 2", "leave --seed and --first out"),
        ("--prompts f", "--prompt is one prompt for all pictures and --prompts a file of them"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(runs, flags, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as e:
        parse([*MODEL, *flags.split()])
    assert "\n" not in str(e.value)


def test_a_prompt_is_needed_and_lists_of_numbers_are_checked(capsys):
    for flags in ([], ["--hint", "x"], ["--prompts", ""]):
        with pytest.raises(SystemExit):
            parse(["--model", "m", *flags])
        assert "required: --prompt" in capsys.readouterr().err
    assert parse([*MODEL, "--seeds", "0-3,8, 5"]).seeds == (0, 1, 2, 3, 8, 5)
    assert parse([*MODEL, "--seeds=-3"]).seeds == (-3,)
    assert parse([*MODEL, "--hint", "x", "--strengths", "0,0.5,1,1"]).controls[0].strengths == (0, 0.5, 1)
    for flag in ("--seeds=0-99999999", "--seeds=", "--seeds=a", "--seeds=3-1", "--strengths=nan", "--strengths=1,"):
        with pytest.raises(SystemExit):
            parse([*MODEL, "--hint", "x", flag])
        assert f"argument {flag.split('=')[0]}" in capsys.readouterr().err


def test_the_command_line_says_what_was_asked_for(runs):
    lines = [
        [*MODEL],
        ["--model", "run", "--prompt", "-5 degrees, \"cold\" it's", "--negative-prompt=--x", "--hint", "a b.png",
         "--strength=-0.5", "--control", "B", "--hint", "b", "--guess-mode", "--control", "C", "--hint", "c",
         "--only-mid-control", "--hint-scale", "0", "--seed=-3", "--eta", "0.1", "--ema", "--clip-skip", "2"],
        ["--model", "m", "--hints", "f", "--prompts", "g", "--num", "2", "--spacing", "karras", "--solver", "euler"],
        [*MODEL, "--hint", "x", "--strengths=-1,0,0.1", "--no-only-mid-control", "--seeds", "0-3", "--overwrite"],
        [*MODEL, "--init", "i", "--denoise", "0.6", "--first", "3", "--scale", "0.0", "--resolution", "64x32"],
        ["--model", "m", "--prompt", ""],
    ]  # fmt: skip
    for line in lines:
        request = parse(line)
        words = shlex.split(command_line(request))
        assert words[:2] == ["python", "sampler.py"] and parse(words[2:]) == request, line
    every = {f.name for kind in (Request, ControlRequest) for f in dataclasses.fields(kind)} - {"controls"}
    assert all(drawing.request.flag_name(name) in drawing.request.build_parser().format_help() for name in every)


# ------------------------------------------------------------------------------------------------------ small pictures
@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A model with a ControlNet of 3 channels and one of 1 alone, both of random weights, hints, and a data set."""
    folder = tmp_path_factory.mktemp("drawing")
    save_micro_model(folder / "base.safetensors")
    for seed, channels in enumerate((3, 1)):
        model = load_model(ModelSource(folder / "base.safetensors", attach=True, hint_channels=channels))
        torch.manual_seed(seed)
        for p in model.control_model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
        state = {k: v for k, v in model.state_dict().items() if not seed or k.startswith("control_model.")}
        whole = model.state_dict() if not seed else {k: v for k, v in state.items() if k.startswith("control_model.")}
        save_safetensors(folder / ("m.safetensors", "gray.safetensors")[seed], whole,
                         {"config": model.config.to_json()})  # fmt: skip
    (folder / "hints").mkdir()
    (folder / "gray").mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("2", (32, 32)), ("10", (32, 32)), ("b", (32, 48)), ("a", (32, 32)), ("c", (32, 32))):
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(folder / f"hints/{name}.png")
        Image.fromarray(rng.integers(0, 255, size[::-1], np.uint8)).save(folder / f"gray/{name}.png")
    (folder / "hints/notes.txt").write_text("no hint")
    (folder / "prompts.txt").write_text("one\n\ntwo\nthree, with: marks\nfour été 圆\nfive\n", encoding="utf-8")
    circles.make(folder / "data", count=3, size=32, seed=3)
    return folder


@lru_cache
def config_of(files: Path) -> ModelConfig:
    return load_model(files / "m.safetensors").config


def flags(files: Path, out: Path, *more: str) -> list[str]:
    return ["--model", f"{files}/m.safetensors", "--out", str(out), "--steps", "2", "--device", "cpu", *more]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """How many pictures each call of `sample` drew."""
    counts, sample = [], sampler.sample
    monkeypatch.setattr(
        drawing.draw,
        "sample",
        lambda model, context, *a, **k: counts.append(len(context)) or sample(model, context, *a, **k),
    )
    return counts


def test_several_controlnets_from_the_command_line(files, tmp_path):
    hint = files / "hints" / "b.png"
    sampler.main(flags(
        files, tmp_path, "--prompt", "p", "--num", "2", "--control", f"{files}/m.safetensors", "--hint",
        str(files / "hints/a.png"), "--strength", "0.7", "--control", f"{files}/gray.safetensors", "--hint", str(hint),
        "--control-end", "0.5", "--guess-mode",
    ))  # fmt: skip
    loaded = load_model(files / "m.safetensors")
    gray = load_control(files / "gray.safetensors", loaded)
    context, negative = loaded.encode_prompts(["p", ""]).split(1)
    a = torch.from_numpy(pixels(files / "hints/a.png").copy()).permute(2, 0, 1)[None] / 255
    b = pixels(hint)  # 32x48 in colour: becomes gray, and the middle of its height
    b = torch.from_numpy(np.asarray(Image.fromarray(b).convert("L"))[8:40].copy())[None, None] / 255
    twice = lambda x: x.expand(2, *x.shape[1:])
    asked = [
        sampler.Control(loaded.control_model, twice(a), 0.7),
        sampler.Control(gray, twice(b), end=0.5, guess_mode=True),
    ]
    settings = sampler.Sampling(steps=2)
    with torch.no_grad():
        latents = sampler.sample(loaded, twice(context), twice(negative), asked, (32, 32), settings)
        wanted = drawing.draw.to_uint8(loaded.decode(latents))
    for i in range(2):
        assert np.array_equal(pixels(tmp_path / f"000{i}.png"), wanted[i])
    text = read_parameters(tmp_path / "0000.png")
    assert "ControlNet 1" in text and "Control Mode: ControlNet is more important" in text


def test_a_second_controlnet_joins_the_first_on_its_device(files):
    request = parse(["--model", f"{files}/base.safetensors", "--prompt", "p", "--precision", "bf16", "--device", "cpu",
                     "--control", f"{files}/gray.safetensors", "--hint", "x", "--hint-resample", "nearest",
                     "--control", f"{files}/m.safetensors", "--hint", "y", "--only-mid-control",
                     "--control", f"{files}/m.safetensors", "--hint", "z"])  # fmt: skip
    loaded = load(request)
    gray, mid, full = loaded.controls
    assert gray.net is loaded.model.control_model and gray.reading.class_numbers and gray.resample == "nearest"
    assert mid.net is not full.net and mid.net.only_mid_control and not full.net.only_mid_control
    assert len({c.weights for c in loaded.controls}) == 3
    assert len({next(c.net.parameters()).dtype for c in loaded.controls}) == 1
    with pytest.raises(CheckpointError, match="has no ControlNet, so a hint has no effect"):
        load(parse(["--model", f"{files}/base.safetensors", "--prompt", "p", "--hint", "x"]))


# --------------------------------------------------------------------------------------------------- lists and grids
def test_a_list_keeps_names_and_is_continued(files, tmp_path, drawn, capsys):
    command = flags(
        files, tmp_path, "--hints", f"{files}/hints", "--prompts", f"{files}/prompts.txt", "--batch-size", "2"
    )
    sampler.main(command)
    assert names(tmp_path) == ["10.png", "2.png", "a.png", "b.png", "c.png", "contact.png"]
    assert drawn == [2, 2, 1] and pixels(tmp_path / "b.png").shape == (48, 32, 3)
    assert "5 images and contact.png" in capsys.readouterr().out
    prompts = [read_parameters(tmp_path / f"{name}.png").splitlines()[0] for name in ("2", "10", "a", "b", "c")]
    assert prompts == ["one", "two", "three, with: marks", "four été 圆", "five"]
    first = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    drawn.clear()
    sampler.main(command)
    assert drawn == [] and "0 images and contact.png" in (said := capsys.readouterr().out) and "replaced" not in said
    (tmp_path / "a.png").unlink()
    (tmp_path / "10.png").write_bytes(first["10.png"][:1000])  # half a file is no picture with these settings
    sampler.main(command)
    assert drawn == [2, 2]  # whole batches, so that the bits are those of the first time
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == first
    capsys.readouterr()
    sampler.main([*command, "--overwrite"])
    assert drawn == [2, 2, 2, 2, 1] and "replaced" not in capsys.readouterr().out
    sampler.main([*command, "--steps", "1"])
    assert "2.png and 5 others of other settings are replaced" in capsys.readouterr().out
    assert not np.array_equal(pixels(tmp_path / "c.png"), pixels_of(first["c.png"], tmp_path))


def pixels_of(content: bytes, folder: Path) -> np.ndarray:
    (folder / "some.png").write_bytes(content)
    return pixels(folder / "some.png")


def test_what_decides_about_the_pixels_decides_whether_a_picture_is_drawn_again(files, tmp_path, drawn):
    """Another hint under the same name, other weights under the same name, another setting."""
    for name in ("m.safetensors", "hints/a.png", "hints/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((files / name).read_bytes())
    command = flags(tmp_path, tmp_path / "out", "--hints", f"{tmp_path}/hints", "--prompt", "p", "--batch-size", "1")
    sampler.main(command)
    drawn.clear()
    Image.new("RGB", (32, 32)).save(tmp_path / "hints" / "a.png")
    sampler.main(command)
    assert drawn == [1]
    model, texts = load_model(tmp_path / "m.safetensors"), set()
    settings = [
        "--guess-mode", "--negative-prompt=x", "--solver=dpm", "--hint-ground=white", "--eta=0.5", "--control-end=0.5",
        "--scale=3", "--precision=tf32", "--strength=0.3", "--spacing=karras", "--hint-resample=nearest",
        "--hint-scale=9", "--first=1", "--seed=3", "--control-start=0.1", "--resolution=16", "--only-mid-control",
    ]  # fmt: skip
    for more in ("--num=1", f"--init={files}/hints/a.png", *settings):
        request = parse([*flags(files, tmp_path), "--hint", f"{files}/hints/a.png", "--prompt", "p", more])
        control = drawing.loading._with_reading(request.controls[0], model.control_model, request.model)
        loaded = drawing.loading.Loaded(model, "", (control,))
        texts.add(parameters(request, loaded, plan(request, model.config)[0]))
    assert len(texts) == 2 + len(settings)
    before = weights_digest(model.control_model), weights_digest(model.unet)
    with torch.no_grad():
        model.control_model.zero_convs[0][0].weight.add_(1e-3)
        model.vae.post_quant_conv.bias.add_(1e-3)
    assert weights_digest(model.control_model) != before[0] and weights_digest(model.unet) == before[1]


def test_a_flag_that_does_not_count_is_told(runs, capsys):
    """In a model that is no run the first --control takes the place of its ControlNet, with the flags before it."""
    controls("--hint", "x", "--strength", "0.5", "--control", "A", "--hint", "y")
    assert capsys.readouterr().out.startswith("--hint before --control A does not count: that ControlNet takes the ")
    controls("--hint", "x", "--control", "A", "--hint", "x", "--control", "B", "--hint", "y")
    controls("--hint", "x", "--control", "A", "--hint", "y", model="run")
    assert not capsys.readouterr().out


def test_command_lines_can_be_pasted_on_windows_too(monkeypatch):
    words = ["python", "sampler.py", "--prompt", "a red & blue circle", "--model", "C:\\my runs\\", "--out", "C:\\x"]
    prompts = ['a "red" circle', "%PATH%", "$(calc)", "two\nlines"]
    assert shlex.split(shell_line([*words, *prompts])) == words + prompts
    monkeypatch.setattr(os, "name", "nt")
    line = 'python sampler.py --prompt "a red & blue circle" --model "C:\\my runs\\\\" --out C:\\x'
    assert shell_line(words) == line and shell_line(prompts) == " ".join(['"..."'] * 4)


def test_a_data_set_gives_hints_and_prompts(files, tmp_path):
    sampler.main(flags(files, tmp_path, "--hints", f"{files}/data", "--num", "2"))
    rows = [json.loads(line) for line in (files / "data" / "prompt.json").read_text().splitlines()]
    assert names(tmp_path) == sorted(["contact.png", *(f"{i}-{k}.png" for i in range(3) for k in range(2))])
    for i, row in enumerate(rows):
        assert read_parameters(tmp_path / f"{i}-0.png").splitlines()[0] == row["prompt"]
    texts = [read_parameters(tmp_path / f"0-{k}.png") for k in range(2)]
    assert "Image number: 1" in texts[1] and texts[0] == texts[1].replace("Image number: 1, ", "")


def test_a_tar_archive_gives_hints_and_prompts(files, tmp_path):
    """Those of a WebDataset lie in the archive, and are drawn as those of files are."""
    rows = [json.loads(line) for line in (files / "data" / "prompt.json").read_text().splitlines()]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i, row in enumerate(rows):
            (tmp_path / "prompt.txt").write_text(row["prompt"])
            archive.add(files / "data" / row["target"], f"{i}.png")
            archive.add(files / "data" / row["source"], f"{i}.hint.png")
            archive.add(tmp_path / "prompt.txt", f"{i}.txt")
    for hints in (tmp_path / "a.tar", files / "data"):
        sampler.main(flags(files, tmp_path / "out", "--hints", str(hints), "--num", "1"))
    for i in range(len(rows)):
        drawn = [np.asarray(Image.open(tmp_path / f"out/{name}.png")) for name in (f"{i}.hint", str(i))]
        assert np.array_equal(*drawn)
    text = read_parameters(tmp_path / "out/1.hint.png")
    assert text.splitlines()[0] == rows[1]["prompt"] and "1.hint.png [" in text


def rows_of(files: Path, *more: str) -> list[tuple]:
    """(name, prompt, names of the hints) of the pictures that flags ask for."""
    request = parse(["--model", f"{files}/m.safetensors", *more])
    pictures = plan(request, config_of(files))
    return [(p.name, p.prompt, *(f"{h.path.parent.name}/{h.path.name}" for h in p.hints)) for p in pictures]


def test_how_hints_and_prompts_come_together(files, tmp_path):
    hints = ["--hints", f"{files}/hints"]
    assert [row[0] for row in rows_of(files, *hints, "--prompt", "p")] == ["2", "10", "a", "b", "c"]
    (tmp_path / "one.txt").write_text("\ufeffthe same\n", encoding="utf-8")
    assert {row[1] for row in rows_of(files, *hints, "--prompts", f"{tmp_path}/one.txt")} == {"the same"}
    objects = [
        {"source": "source/a.png", "prompt": "x"},
        {"source": "b.jpg", "prompt": "y"},
        {"source": "a", "prompt": "z"},
    ]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, objects)))
    by_name = rows_of(files, *hints, "--prompts", f"{tmp_path}/rows.json")
    assert by_name == [("a", "x", "hints/a.png"), ("b", "y", "hints/b.png"), ("a-2", "z", "hints/a.png")]
    # each ControlNet takes the hint of the name from its own folder, or has one hint for all
    gray = ["--control", f"{files}/m.safetensors", *hints, "--control", f"{files}/gray.safetensors"]
    assert rows_of(files, *gray, "--hints", f"{files}/gray", "--prompt", "p")[1] == (
        "10",
        "p",
        "hints/10.png",
        "gray/10.png",
    )
    assert rows_of(files, *gray, "--hint", f"{files}/gray/c.png", "--prompt", "p")[0] == (
        "2",
        "p",
        "hints/2.png",
        "gray/c.png",
    )
    # prompts alone
    assert rows_of(files, "--prompts", f"{files}/prompts.txt")[4] == ("0004", "five")
    assert rows_of(files, "--prompts", f"{files}/prompts.txt", "--hint", f"{files}/hints/a.png")[1] == (
        "0001", "two", "hints/a.png",
    )  # fmt: skip
    assert rows_of(files, "--hints", f"{files}/data", "--prompt", "p")[2] == ("2", "p", "source/2.png")


def test_names_are_unique_and_no_sheet_s():
    assert unique(["a", "A", "b", "a", "a-2"]) == ["a", "A-2", "b", "a-3", "a-2-2"]
    assert unique(["grid", "Contact"], taken=("grid", "contact")) == ["grid-2", "Contact-2"]
    assert len(set(unique(["x"] * 3000))) == 3000


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--hints", "{files}/nothing", "--prompt", "p"], "no such folder of hints"),
        (["--hints", "{tmp}", "--prompt", "p"], "no images in it"),
        (["--hints", "{files}/hints"], "is no data set"),
        (["--hints", "{files}/hints", "--prompts", "{tmp}/two.txt"], "has 2 prompts for 5 hints"),
        (["--hints", "{files}/hints", "--prompts", "{tmp}/nothing.txt"], "no such file of prompts"),
        (["--hints", "{files}/hints", "--prompts", "{tmp}/empty.txt"], "no prompts in it"),
        (["--hints", "{files}/hints", "--prompts", "{tmp}/latin.txt"], "not UTF-8 text (byte 0 is wrong)"),
        (["--hints", "{files}/hints", "--prompts", "{tmp}/bad.json"], "bad.json, line 2: lacks the text prompt"),
        (["--hints", "{files}/hints", "--prompts", "{tmp}/broken.json"], "broken.json, line 1: not JSON"),
        (["--hints", "{files}/hints", "--prompts", "{tmp}/half.json"], "half.json, line 1: the prompt has half of a"),
        (["--hints", "{files}/hints", "--prompts", "{tmp}/mixed.json"], "some rows have a source"),
        (["--hints", "{files}/hints", "--prompts", "{tmp}/other.json"], "names the hint zz, which is not among"),
        (["--hints", "{tmp}/damaged", "--prompt", "p"], "x.png: not a readable image"),
        (["--control", "{files}/m.safetensors", "--hints", "{files}/hints", "--control", "{files}/gray.safetensors",
          "--hints", "{files}/data", "--prompt", "p"], "data: has no hint of the name 10"),
        (["--prompt", "p", "--init", "{tmp}/nothing.png"], "nothing.png: no such image"),
    ],
)  # fmt: skip
def test_a_list_that_cannot_be_drawn_is_one_line(files, tmp_path, more, message):
    (tmp_path / "two.txt").write_text("a\nb")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "bad.json").write_text('{"prompt": "x", "source": "a"}\n{"prompt": 3}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "half.json").write_text('{"prompt": "\\ud800"}')
    (tmp_path / "mixed.json").write_text('{"prompt": "x", "source": "a"}\n{"prompt": "y"}')
    (tmp_path / "other.json").write_text('{"prompt": "x", "source": "zz.png"}')
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "x.png").write_bytes(b"no picture")
    more = [word.format(files=files, tmp=tmp_path) for word in more]
    with pytest.raises(DataError, match=re.escape(message)) as e:
        rows_of(files, *more)
    assert "\n" not in str(e.value)


def test_a_labelled_grid(files, tmp_path, drawn, monkeypatch, capsys):
    tables, save_grid = [], drawing.sheets.save_grid
    monkeypatch.setattr(drawing.sheets, "save_grid", lambda *a: tables.append(a) or save_grid(*a))
    hint = ["--hint", f"{files}/hints/a.png"]
    command = flags(files, tmp_path, "--prompt", "p", *hint, "--strengths", "0,0.5,1", "--seeds", "0-3")
    sampler.main(command)
    assert drawn == [4, 4, 4]  # each strength is a batch
    ((_, columns, captions, text),) = tables
    assert list(columns) == ["hint", "strength 0", "strength 0.5", "strength 1"]
    assert captions == ["seed 0: p", "seed 1", "seed 2", "seed 3"] and "Seed: 0" in text["parameters"]
    for strength, seed in ((0, 3), (0.5, 0), (1, 2)):
        cell = columns[f"strength {strength}"][seed]
        assert np.array_equal(cell, pixels(tmp_path / f"seed{seed}_strength{strength}.png"))
        text = read_parameters(tmp_path / f"seed{seed}_strength{strength}.png")
        assert f"Weight: {strength}," in text and f"Seed: {seed}," in text
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.width > 4 * 96 and sheet.height > 4 * 32
    alone = ["--strength", "0.5", "--seed", "3", "--num", "1"]
    sampler.main([*flags(files, tmp_path / "alone", "--prompt", "p", *hint, *alone)])
    difference = pixels(tmp_path / "alone" / "0000.png").astype(int) - columns["strength 0.5"][3]
    assert np.abs(difference).max() <= 1  # the number of pictures at once decides about the last bits
    drawn.clear()
    sampler.main(command)
    assert drawn == [] and "12 were there" in capsys.readouterr().out
    sampler.main(flags(files, tmp_path / "seeds", "--prompt", "p", "--seeds", "4,2"))
    assert list(tables[-1][1]) == ["picture"] and tables[-1][2] == ["seed 4: p", "seed 2"]
    assert names(tmp_path / "seeds") == ["grid.png", "seed2.png", "seed4.png"]


def test_long_lists_have_several_contact_sheets(files, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing.pictures, "CELLS", 2)
    monkeypatch.setattr(drawing.sheets, "CELLS", 2)
    sampler.main(flags(files, tmp_path, "--prompts", f"{files}/prompts.txt", "--resolution", "16", "--steps", "1"))
    sheets = [name for name in names(tmp_path) if name.startswith("contact")]
    assert sheets == ["contact-2.png", "contact-3.png", "contact.png"]
    widths = [pixels(tmp_path / name).shape[1] for name in sheets]
    assert widths[0] == widths[2] > widths[1]  # two cells, two cells, one cell


# ------------------------------------------------------------------------------------------------- single pictures
def test_other_pictures_are_not_replaced_without_a_word(files, tmp_path, drawn, capsys):
    command = flags(files, tmp_path, "--prompt", "p", "--num", "2")
    sampler.main(command)
    sampler.main(command)
    assert drawn == [2, 2] and "replaced" not in capsys.readouterr().out  # the same pictures, drawn again
    sampler.main([*command, "--seed", "1"])
    assert f"{tmp_path}: 0000.png and 2 others of other settings are replaced" in capsys.readouterr().out
    Image.new("RGB", (8, 8)).save(tmp_path / "0003.png")  # somebody else's picture
    sampler.main([*command, "--seed", "1", "--first", "2"])
    assert "0003.png and 1 other of" in capsys.readouterr().out


def test_first_goes_on_where_other_pictures_end(files, tmp_path):
    one = ["--prompt", "p", "--eta", "1", "--batch-size", "1"]
    sampler.main(flags(files, tmp_path / "all", *one, "--num", "3"))
    sampler.main(flags(files, tmp_path / "rest", *one, "--num", "1", "--first", "2"))
    assert names(tmp_path / "rest") == ["0002.png", "grid.png"]
    assert (tmp_path / "all/0002.png").read_bytes() == (tmp_path / "rest/0002.png").read_bytes()


def test_the_command_line_of_a_picture_makes_it_again(files, tmp_path):
    """For a picture of a list and one of a grid, drawn one at a time, bit for bit."""
    hints = ["--hints", f"{files}/hints", "--prompts", f"{files}/prompts.txt", "--seed", "4", "--solver", "euler_a"]
    grid = ["--prompt", 'it\'s -a "p"', "--hint", f"{files}/hints/b.png", "--strengths=-0.5,1", "--seeds", "3-4"]
    for i, more in enumerate((hints, grid)):
        out = tmp_path / str(i)
        request = parse(flags(files, out, *more, "--batch-size", "1"))
        sampler.main(flags(files, out, *more, "--batch-size", "1"))
        picture = plan(request, config_of(files))[2]
        again = dataclasses.replace(request_of(request, picture), out=str(tmp_path / "again"))
        sampler.main(shlex.split(command_line(again))[2:])
        assert (tmp_path / "again/0000.png").read_bytes() == (out / f"{picture.name}.png").read_bytes()


def test_image_to_image(files, tmp_path, capsys):
    init = files / "hints" / "b.png"  # 32x48
    sampler.main(flags(files, tmp_path, "--prompt", "p", "--init", str(init), "--denoise", "0.01", "--num", "1"))
    model = load_model(files / "m.safetensors")
    with torch.no_grad():
        x = torch.from_numpy(pixels(init).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        latents = model.sample_latents(model.vae.moments(x), torch.zeros(1, 4, 6, 4))
        context, negative = model.encode_prompts(["p", ""]).split(1)
        settings = sampler.Sampling(steps=2, denoise=0.01)
        drawn = sampler.sample(model, context, negative, [], (32, 48), settings, init=latents)
        wanted = drawing.draw.to_uint8(model.decode(drawn))[0]
    assert np.array_equal(pixels(tmp_path / "0000.png"), wanted)
    text = read_parameters(tmp_path / "0000.png")
    assert "Denoising strength: 0.01, Init image: b.png [" in text
    square = ["--init", str(init), "--hint", f"{files}/hints/a.png", "--num", "1"]
    sampler.main(flags(files, tmp_path, "--prompt", "p", *square))
    assert "a.png: is 32x32, the images 32x48: 33% of the hint is cut off" in capsys.readouterr().out
    sampler.main(flags(files, tmp_path, "--prompt", "p", *square, "--resolution", "32"))
    assert "b.png: is 32x48, the images 32x32: 33% of the picture is cut off" in capsys.readouterr().out


def test_settings_are_in_the_form_of_the_web_ui(files, tmp_path):
    """As Automatic1111's parse_generation_parameters reads them, with its own pattern."""
    prompt = "a circle, (red:1.2)\nsecond line\0 圆"
    request = parse(flags(files, tmp_path, "--prompt", prompt, "--negative-prompt", "blue: \"x\"", "--hint",
                          f"{files}/hints/a.png", "--solver", "dpm", "--spacing", "karras", "--scale", "7.5", "--num",
                          "1", "--seed", "12"))  # fmt: skip
    loaded = load(request)
    (picture,) = plan(request, loaded.model.config)
    text = parameters(request, loaded, picture)
    *lines, last = text.strip().split("\n")
    pattern = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    found = {k: json.loads(v) if v.startswith('"') else v for k, v in pattern.findall(last)}
    expected = {"Steps": "2", "Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": "7.5", "Seed": "12",
                "Size": "32x32", "Model": "m", "Version": "minControlNet"}  # fmt: skip
    assert expected.items() <= found.items() and lines[-1] == 'Negative prompt: blue: "x"'
    assert lines[:-1] == ["a circle, (red:1.2)", "second line\\0 圆"]
    control = dict(part.split(": ") for part in found["ControlNet 0"].split(", "))
    assert control["Weight"] == "1" and control["Model"].startswith("m [") and control["Guidance End"] == "1"
    sampler.main(flags(files, tmp_path, "--prompt", prompt, "--num", "1", "--seed", "3"))
    assert "second line\\0 圆\nSteps: 2" in read_parameters(tmp_path / "0000.png")
    assert read_parameters(tmp_path / "nothing.png") is None and read_parameters(tmp_path) is None
    (tmp_path / "0000.png").write_bytes(b"no picture")
    assert read_parameters(tmp_path / "0000.png") is None


def test_what_is_wrong_is_one_line_for_a_shell(files, tmp_path, monkeypatch):
    assert run_command(["--model", str(tmp_path / "no\nfile"), "--prompt", "p"]).startswith("sampler.py: ")
    assert "\n" not in run_command(["--model", str(tmp_path / "no\nfile"), "--prompt", "p"])
    assert run_command(flags(files, tmp_path, "--prompt", "p", "--num", "1")) == 0

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(drawing.draw, "sample", stop)
    assert "stopped" in run_command(flags(files, tmp_path, "--prompt", "p"))


def test_prompts_that_are_too_long_are_told(files, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("fine\n" + "many " * 80 + "\n" + "more " * 90)
    small = ["--resolution", "16", "--steps", "1"]
    sampler.main(flags(files, tmp_path / "out", "--prompts", f"{tmp_path}/p.txt", *small))
    said = capsys.readouterr().out
    assert "the prompt of 0001 has 80 tokens; the text encoder reads 75, the rest is cut off (2 prompts are" in said


def test_files_are_looked_at_once(files, monkeypatch):
    """One hint for all rows of a list is not read anew for each."""
    looked, look_at = [], ImageFile.look_at.__func__
    monkeypatch.setattr(ImageFile, "look_at", classmethod(lambda cls, path: looked.append(path) or look_at(cls, path)))
    rows_of(files, "--prompts", f"{files}/prompts.txt", "--hint", f"{files}/hints/a.png")
    assert len(looked) == 1
    assert read_prompts(f"{files}/prompts.txt")[0] == ("", "one")
