"""What README and the tour say about the code is so: names, files, line counts, make targets, flags, shapes, figure."""

import contextlib
import importlib
import io
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

import bench
import config
import data
import merge
import play
import sampler
from ldm import SD15, ControlLDM
from toy import circles, convergence, pretrain, sdxl

ROOT = Path(__file__).parent.parent
README, TOUR, MAKEFILE = (ROOT / name for name in ("README.md", "docs/tour.md", "Makefile"))
DOCUMENTS = pytest.mark.parametrize("document", [README, TOUR], ids=lambda path: path.name)
ROOMS = {p.stem for p in ROOT.glob("*.py")} | {p.parent.name for p in ROOT.glob("*/__init__.py")} - {"tests"}
FILE = r"(?<![\w/*.-])(?:[\w-]+/)*[\w-]+\.(?:py|md|toml|txt|svg)\b(?![\w/(])"


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def named_in_code(text: str) -> set[str]:
    """The dotted names in backticks that begin with a module or package of the repository."""
    names = re.findall(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)`", text)
    return {name for name in names if name.split(".")[0] in ROOMS and not name.endswith(".py")}


def find(name: str) -> object:
    """The object with this dotted name: import as much of the name as is a module, then follow attributes."""
    parts = name.split(".")
    modules = 2 if (ROOT / parts[0] / f"{parts[1]}.py").exists() else 1
    found = importlib.import_module(".".join(parts[:modules]))
    for part in parts[modules:]:
        found = getattr(found, part)
    return found


@DOCUMENTS
def test_functions_and_classes_exist(document):
    names = named_in_code(read(document))
    assert len(names) >= 10
    for name in sorted(names):
        find(name)


def test_a_name_that_does_not_exist_is_noticed():
    assert named_in_code("`train.diffusion_loss`, `train.py`, `torch.nn`") == {"train.diffusion_loss"}
    with pytest.raises(AttributeError):
        find("train.no_such_loss")


@DOCUMENTS
def test_files_exist(document):
    text = read(document)
    files = sorted(set(re.findall(FILE, text)))
    assert files
    for file in files:
        assert (ROOT / file).exists() or (document.parent / file).exists(), file
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            headings = [re.sub(r"[^\w -]", "", h).strip().lower() for h in re.findall(r"^#+ (.*)$", text, re.M)]
            assert target[1:] in [h.replace(" ", "-") for h in headings], target
        elif not target.startswith("http"):
            assert (document.parent / target).exists(), target


def test_every_room_is_in_the_table():
    table = set(re.findall(r"^\| `([\w/]+\.py)`", read(README), re.M))
    rooms = [p for p in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")) if p.parent.name != "tests" and read(p)]
    rooms = {p.relative_to(ROOT).as_posix() for p in rooms if p.name != "__init__.py"}
    assert table == {name for name in rooms if name.split("/")[0] not in ("data", "runs", ".venv")}


def test_line_counts_of_the_reading_order():
    text = read(README)
    stops = re.findall(r"^\d+\. \[`(\w+\.py)`\]\(\1\), (\d+) lines: ", text, re.M)
    assert 6 <= len(stops) <= 10
    truth = {file: len(read(ROOT / file).splitlines()) for file, _ in stops}
    for file, lines in stops:
        assert abs(int(lines) - truth[file]) <= 0.15 * truth[file], f"{file} has {truth[file]} lines"
    limit = int(re.search(r"together under ([\d,]+) lines", text)[1].replace(",", ""))
    assert limit <= 2500 and sum(truth.values()) < limit
    story = text.split("| **the story** | |\n")[1].split("| **")[0]
    assert re.findall(r"^\| `(\w+\.py)`", story, re.M) == [file for file, _ in stops]


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z0-9]+):", read(MAKEFILE), re.M))
    named = set(re.findall(r"(?:`|^)make ([a-z0-9]+)", read(README), re.M))
    assert {"train", "test", "sample", "fill50k", "sd15", "bench"} <= named <= targets


def test_modules_that_make_runs_exist():
    for module in re.findall(r"-m (toy\.\w+)", read(MAKEFILE) + read(README) + read(ROOT / "BENCHMARKS.md")):
        assert hasattr(find(module), "main")
    for script in re.findall(r"\$\(PY\) (\w+\.py)", read(MAKEFILE)):
        assert (ROOT / script).exists()


def test_the_example_of_a_data_set_class():
    (example,) = re.findall(r"```python\n(.*?)```", read(README), re.S)
    assert 'if __name__ == "__main__":' in example  # workers that are spawned import the file
    names = {"__name__": "example"}
    exec(example, names)
    items = data.ArrayDataset(names["Gradients"](), (64, 64), hint_channels=1)
    assert len(items) == 1000 and items[999]["jpg"].shape == (64, 64, 3)
    settings = re.findall(r"(\w+)=", re.search(r"train\.Config\((.*)\)", example)[1])
    assert settings and set(settings) <= set(config.Config.__dataclass_fields__)


# ------------------------------------------------------------------------------------------------------------- flags
COMMANDS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "train.py": (config.parse, ("",)),
    "sampler.py": (sampler.parse, ("",)),
    "data.py": (data.main, ("show", "check", "hints")),
    "play.py": (play.parse, ("",)),
    "merge.py": (merge.parse, ("attach", "extract", "transfer", "export", "info")),
    "bench.py": (bench.parse, ("step", "sample", "memory", "data", "gpu", "table")),
    "toy.circles": (circles.main, ("make", "judge")),
    "toy.convergence": (convergence.main, ("run", "table", "figure", "curves", "events")),
    "toy.pretrain": (pretrain.main, ("",)),
    "toy.sdxl": (sdxl.main, ("",)),
}


@cache
def flags_of(command: str, subcommand: str) -> set[str]:
    """The flags in the --help of a command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        COMMANDS[command][0]([*filter(None, [subcommand]), "--help"])
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", out.getvalue()))


@pytest.mark.parametrize("document", [README, TOUR, ROOT / "docs/clients.md"], ids=lambda path: path.name)
def test_flags_exist(document):
    known = {"--nproc-per-node"}.union(*(flags_of(c, sub) for c, (_, subs) in COMMANDS.items() for sub in subs))
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", read(document)))
    assert len(named) > 5 and named <= known, named - known


def test_commands_have_their_flags():
    pattern = r"(?:python (?:-m )?|torchrun .*?)((?:train|sampler|play|data|merge|bench)\.py|toy\.\w+)([^`#\n]*)"
    commands = re.findall(pattern, re.sub(r"\n\s*(?=diffusers|--)", " ", read(README)))
    assert len(commands) > 15
    for command, rest in commands:
        words = rest.split()
        subcommands = COMMANDS[command][1]
        sub = words[0] if words and words[0] in subcommands else subcommands[0]
        if words and subcommands != ("",):
            assert words[0] in subcommands or (command, words[0]) == ("merge.py", "INPUT"), f"{command} {rest}"
        unknown = {word for word in words if word.startswith("--")} - flags_of(command, sub)
        assert not unknown, f"{command} {rest}: {unknown}"


# ------------------------------------------------------------------------------------------------- shapes and figure
def test_shapes_of_the_tour():
    """The shapes that the tour gives for SD 1.5 are those that the networks compute, on the meta device."""
    with torch.device("meta"), torch.no_grad():
        model = ControlLDM(SD15)
        image, x = torch.empty(1, 3, 512, 512), torch.empty(1, 4, 64, 64)
        timesteps, ids = torch.zeros(1, dtype=torch.int64), torch.zeros((1, 77), dtype=torch.int64)
        context = model.text(ids)
        middle, skips, emb = model.unet.encode(x, timesteps, context)
        residuals = model.control_model(x, image, timesteps, context)
        shapes = {
            "vae.AutoencoderKL.moments": [model.vae.moments(image)],
            "clip_text.Tokenizer": [model.tokenizer("a circle")],
            "clip_text.CLIPTextModel": [context],
            "ldm.ControlLDM.sample_latents": [model.sample_latents(torch.empty(1, 8, 64, 64), x)],
            "controlnet.ControlNet.embed_hint": [model.control_model.embed_hint(image)],
            "unet.timestep_embedding": [emb],
            "unet.UNetEncoder.encode": [skips[0], skips[-1], middle],
            "controlnet.ControlNet.residuals": residuals,
            "unet.UNet.decode": [model.unet(x, timesteps, context, residuals)],
            "vae.AutoencoderKL.decode": [model.decode(x)],
        }
    tour = read(TOUR)
    for name, tensors in shapes.items():
        row = next(line for line in tour.splitlines() if line.startswith("|") and f"`{name}`" in line)
        for tensor in tensors:
            shape = f"({','.join(map(str, tensor.shape))})"
            assert shape in row, f"{name}: {shape} is not in {row}"
    in_words = {1: "one", 2: "two", 3: "three", 4: "four"}
    counted: dict[tuple[int, ...], int] = {}
    for r in residuals:
        counted[tuple(r.shape)] = counted.get(tuple(r.shape), 0) + 1
    listed = [f"{in_words[n]} ({','.join(map(str, shape))})" for shape, n in counted.items()]
    assert f"13 residuals, {', '.join(listed)}" in tour and len(residuals) == 13


def test_the_figure_is_what_the_script_draws(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    architecture = importlib.import_module("architecture")
    picture = architecture.draw()
    assert read(architecture.FILE) == picture, "run: python docs/architecture.py"
    zeros = architecture.zero_convolutions()
    assert len(zeros) == 14 and all(f">{name}<" in picture for name in zeros if "hint" not in name)
