"""A tiny model of SDXL's shape that learns circles: the tiny base, extended without changing what it draws.

    python -m toy.sdxl                     the base, then three ControlNets (seeds 0, 1, 2), each trained and judged
    python -m toy.sdxl --seeds 5           one ControlNet, of seed 5

Real SDXL takes a large GPU for days. What sets it apart from Stable Diffusion (several blocks in a transformer, a
second text encoder, the vector y) can be trained on in minutes if a tiny base has it. `extend` gives it to the tiny
base so that each new part adds exactly nothing at first:

    second block of a transformer     its three outputs are zero, so it passes on what it gets
    second text encoder               to_k and to_v of the cross-attentions have zeros for its part of the context
    label_emb, which embeds y         its last layer is zero

The ControlNet is a copy of this encoder, so its new parts start at nothing too, and all of them train. Two things are
not SDXL's: the first text encoder keeps its final norm, and an empty negative prompt is encoded, as the tiny base knows
it.
"""

import argparse
import dataclasses
import statistics
from pathlib import Path

import torch
from torch import Tensor

import data
import train
from config import DEMO, TINY_BASE, Config, number
from ldm import TINY, ControlLDM
from toy import circles
from training.console import run_program
from weights import load_model
from weights.spelling import TEXT, TEXT_1, UNET
from weights.writing import save_safetensors

TEXT2 = dataclasses.replace(
    TINY.text, width=48, heads=3, mlp_width=192, activation="gelu", penultimate=True, final_norm=False, projection=32
)
TINY_SDXL = dataclasses.replace(
    TINY,
    name="tiny-sdxl",
    unet=dataclasses.replace(
        TINY.unet, transformer_depth=(0, 1, 2), context_dim=TINY.text.width + TEXT2.width,
        adm_in_channels=TEXT2.projection + 6 * 256, use_linear_in_transformer=True,
    ),
    text=dataclasses.replace(TINY.text, layers=TINY.text.layers + 1, penultimate=True),  # the layer that is left out
    text2=TEXT2,
)  # fmt: skip
SILENT = ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2", "label_emb.0.2")  # the outputs of what is new


def extend(model: ControlLDM, seed: int = 0) -> ControlLDM:
    """A model of the shape TINY_SDXL that draws what `model`, of the shape TINY, draws. `seed`: of the new weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wide = ControlLDM(TINY_SDXL, hint_channels=None)
    first = TEXT + "transformer."  # the text encoder has another name beside a second one
    old = {TEXT_1 + k.removeprefix(first) if k.startswith(first) else k: v for k, v in model.state_dict().items()}
    wide.load_state_dict({k: _extended(k, v, old.get(k)) for k, v in wide.state_dict().items()})
    return wide.requires_grad_(False).eval()


def _extended(key: str, new: Tensor, old: Tensor | None) -> Tensor:
    """The weight `key` of the extended model: `new` where there was none, otherwise `old` in the shape of `new`."""
    if old is None:
        silent = key.startswith(UNET) and key.rpartition(".")[0].endswith(SILENT)
        return torch.zeros_like(new) if silent else new
    if old.shape[1:2] != new.shape[1:2]:  # to_k, to_v: zeros for the context of the second text encoder
        return torch.cat([old, old.new_zeros(len(old), new.shape[1] - old.shape[1])], dim=1)
    return old.view(new.shape)  # the projections of a transformer: 1x1 convolutions become matrices


def settings(base: Path, out: Path, seed: int, steps: int) -> Config:
    """The demo's settings, on the extended base."""
    own = dict(base=str(base), out=str(out), seed=seed, steps=steps, logger_freq=200, checkpoint_freq=steps)
    return Config(**(DEMO | own | dict(device="cpu")))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m toy.sdxl", description="Train ControlNets on a tiny model of SDXL's shape, and judge them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", default="runs/tiny-sdxl", help="folder for the base and the runs")
    parser.add_argument("--seeds", type=number(int, 0, 2**31), nargs="+", default=[0, 1, 2], help="a run for each")
    parser.add_argument("--steps", type=number(int, 1, 1e6), default=700, help="steps of each run, of 8 samples")
    parser.add_argument("--count", type=number(int, 1, 1e4), default=64, help="held-out hints to judge by")
    args = parser.parse_args(argv)
    if not data.is_dataset(DEMO["data"]):
        circles.make(DEMO["data"])
    base = Path(args.out) / "base.safetensors"
    if not base.exists():
        save_safetensors(base, extend(load_model(TINY_BASE)).state_dict(), {"config": TINY_SDXL.to_json()})
    figures = []
    for seed in args.seeds:
        run = train.train(settings(base, base.parent / f"seed-{seed}", seed, args.steps), overwrite=True)
        figures.append(circles.judge(run, args.count))
    ious, colors = ([figure[name] for figure in figures] for name in ("iou", "colors"))
    print(
        f"seeds {', '.join(map(str, args.seeds))}: IoU {', '.join(f'{iou:.3f}' for iou in ious)}, mean "
        f"{statistics.mean(ious):.3f}; both colours right in {', '.join(f'{right:.0%}' for right in colors)}"
    )


if __name__ == "__main__":
    run_program("toy.sdxl", main)
