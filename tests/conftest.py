"""What the tests share: golden numbers, and a tiny random Stable Diffusion file to train on."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from config import Config
from ldm import TINY, ControlLDM
from playground.model import Choices, LoadedModel, load
from tests.playing import Page
from toy import circles
from weights import ModelSource, load_model
from weights.writing import save_safetensors

# A prompt that would be a script, if a page took it for markup.
EVIL = "<script>document.title='evil'</script><img src=x onerror=document.title='evil'> & \"'"
GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {k: torch.from_numpy(file[k]) for k in file.files}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative 2-norm of the difference."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Whichever tests ran before in this process, a test draws the same numbers."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A file with a tiny Stable Diffusion of random weights, in the published key names."""
    path = tmp_path_factory.mktemp("base") / "tiny.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ControlLDM(TINY, hint_channels=None)
        for p in model.unet.parameters():
            if not p.any():  # what starts at zero in a new UNet does not in a trained one
                torch.nn.init.normal_(p, std=0.05)
    save_safetensors(path, model.state_dict(), {"config": TINY.to_json()})
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A small data set in Fill50K's layout: 24 pairs of 32x32."""
    path = tmp_path_factory.mktemp("data") / "circles"
    circles.make(path, count=24, size=32, seed=3)
    return path


def settings(base, data, out, **more) -> Config:
    """A run of four steps with three image logs, on a small data set."""
    return Config(
        base=str(base), data=str(data), out=str(out), batch_size=4, learning_rate=1e-3, workers=0, device="cpu",
        cache_dir=str(out) + "-cache", log_steps=2, **{"steps": 4, "logger_freq": 2, "log_images": 2, **more},
    )  # fmt: skip


@pytest.fixture(scope="session")
def evil_run(base, tmp_path_factory) -> Path:
    """A run whose prompts and folder try to be markup."""
    root = tmp_path_factory.mktemp("evil")
    circles.make(root / "data", count=24, size=32, seed=3)
    rows = [json.loads(line) for line in (root / "data/prompt.json").read_text().splitlines()]
    lines = [json.dumps(row | {"prompt": EVIL}) + "\n" for row in rows]
    (root / "data/prompt.json").write_text("".join(lines))
    return train.train(settings(base, root / "data", root / "<b>run & co</b>"))


@pytest.fixture(scope="session")
def model_file(base, tmp_path_factory) -> Path:
    """A whole model whose ControlNet says something."""
    model = load_model(ModelSource(base, attach=True))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for p in model.control_model.parameters():
            if not p.any():
                p.normal_(std=0.05)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_safetensors(path, model.state_dict(), {"config": TINY.to_json()})
    return path


@pytest.fixture(scope="session")
def loaded(model_file) -> LoadedModel:
    """The same model, as `play.py` loads it."""
    return load(Choices(str(model_file)))


@pytest.fixture(scope="session")
def page(loaded) -> Iterator[Page]:
    """A server that offers this model."""
    page = Page(loaded)
    yield page
    page.close()
