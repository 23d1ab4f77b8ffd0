"""What the tests share: golden numbers, and a tiny random Stable Diffusion file to train on."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from ldm import TINY, ControlLDM
from toy import circles
from weights.writing import save_safetensors

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
