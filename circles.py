"""The toy problem: synthetic Fill50K, its colours, and how well a circle was filled.

Fill50K teaches a ControlNet one thing: the hint is a thin circle outline, the target the same circle filled, and the
prompt names both colours ("light golden rod yellow circle with turquoise background"). A base model can paint any
circle in any colour, only not *there*: what is left to learn is to obey the hint, and whether it does can be measured.

    python circles.py make data/circles --count 5000 --size 128 --seed 0     the data set, in Fill50K's own layout
    python circles.py judge runs/demo                                        does the trained ControlNet obey?

The layout and the look follow the `fill50k` data set of the ControlNet tutorial (Zhang et al. 2023, arXiv:2302.05543).
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor
from tqdm import tqdm

import checkpoint
import data
import log
import sampler
from controlnet import ControlLDM

# The 141 colour names of CSS (one spelling of gray), in the words in which Fill50K's prompts say them.
NAMES = """alice blue, antique white, aqua, aqua marine, azure, beige, bisque, black, blanched almond, blue,
blue violet, brown, burly wood, cadet blue, chartreuse, chocolate, coral, cornflower blue, corn silk,
crimson, cyan, dark blue, dark cyan, dark golden rod, dark gray, dark green, dark khaki, dark magenta,
dark olive green, dark orange, dark orchid, dark red, dark salmon, dark sea green, dark slate blue,
dark slate gray, dark turquoise, dark violet, deep pink, deep sky blue, dim gray, dodger blue, fire brick,
floral white, forest green, fuchsia, gainsboro, ghost white, gold, golden rod, gray, green, green yellow,
honey dew, hot pink, indian red, indigo, ivory, khaki, lavender, lavender blush, lawn green, lemon chiffon,
light blue, light coral, light cyan, light golden rod yellow, light gray, light green, light pink,
light salmon, light sea green, light sky blue, light slate gray, light steel blue, light yellow, lime,
lime green, linen, magenta, maroon, medium aqua marine, medium blue, medium orchid, medium purple,
medium sea green, medium slate blue, medium spring green, medium turquoise, medium violet red,
midnight blue, mint cream, misty rose, moccasin, navajo white, navy, old lace, olive, olive drab, orange,
orange red, orchid, pale golden rod, pale green, pale turquoise, pale violet red, papaya whip, peach puff,
peru, pink, plum, powder blue, purple, rebecca purple, red, rosy brown, royal blue, saddle brown, salmon,
sandy brown, sea green, sea shell, sienna, silver, sky blue, slate blue, slate gray, snow, spring green,
steel blue, tan, teal, thistle, tomato, turquoise, violet, wheat, white, white smoke, yellow, yellow green"""
COLORS = {n: ImageColor.getrgb(n.replace(" ", "")) for n in " ".join(NAMES.split()).split(", ")}
PALETTE = np.array(list(COLORS.values()), dtype=np.float32)  # (141,3), RGB 0..255, in the order of COLORS


@dataclass(frozen=True)
class Circle:
    """One item of the toy problem. Lengths are fractions of the image's side, so any size can be drawn from it."""

    x: float
    y: float
    radius: float
    color: str
    background: str

    @property
    def prompt(self) -> str:
        return f"{self.color} circle with {self.background} background"

    def distance(self, size: int) -> np.ndarray:
        """(size,size) float32: each pixel centre's distance from the circle's line in pixels, negative inside."""
        axis = np.arange(size, dtype=np.float32) + 0.5
        return np.hypot(axis[None, :] - self.x * size, axis[:, None] - self.y * size) - self.radius * size

    def disc(self, size: int) -> np.ndarray:
        """(size,size) bool: the pixels whose centres lie in the circle."""
        return self.distance(size) < 0

    def draw(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """hint, target: (size,size,3) uint8, anti-aliased; the hint's line is thin as Fill50K's (5 of 512 pixels)."""
        distance = self.distance(size)
        line = np.clip(max(1.25, size / 100) / 2 - np.abs(distance) + 0.5, 0, 1)
        inside = np.clip(0.5 - distance, 0, 1)[..., None]
        target = inside * COLORS[self.color] + (1 - inside) * COLORS[self.background]
        hint = np.repeat(line[..., None] * 255, 3, axis=2)
        return hint.round().astype(np.uint8), target.round().astype(np.uint8)


def random_circle(seed: int, index: int) -> Circle:
    """Circle `index` of the endless data set `seed`: a function of the two numbers alone.

    Radii are 0.12 to 0.5 of the side and centres lie anywhere with a margin of 0.1, so many circles are cut by the
    border, as in Fill50K; colours may be almost equal, as there.
    """
    rng = np.random.default_rng([seed, index])
    x, y = rng.uniform(0.1, 0.9, 2)
    color, background = rng.choice(list(COLORS), 2, replace=False)
    return Circle(float(x), float(y), float(rng.uniform(0.12, 0.5)), str(color), str(background))


def make(out: str | Path, count: int = 2000, size: int = 128, seed: int = 0) -> None:
    """Write `count` triples at `size` x `size` into `out` in Fill50K's layout; `prompt.json` comes last, when whole."""
    out = Path(out)
    for side in ("source", "target"):
        (out / side).mkdir(parents=True, exist_ok=True)
    (out / "prompt.json").unlink(missing_ok=True)  # of a data set that stood here: never the old words to new pictures
    lines = []
    for i in tqdm(range(count), desc=f"drawing {out}", unit="pair", disable=None):
        circle = random_circle(seed, i)
        names = [f"source/{i}.png", f"target/{i}.png"]
        for name, image in zip(names, circle.draw(size), strict=True):
            Image.fromarray(image).save(out / name, compress_level=1)
        lines.append(json.dumps({"source": names[0], "target": names[1], "prompt": circle.prompt}) + "\n")
    checkpoint.write_atomically(out / "prompt.json", lambda p: p.write_text("".join(lines)))


def distinct(circle: Circle, least: float = 90.0) -> bool:
    """Are the two colours at least `least` apart in RGB (0..441)? Only then can an image be divided into the two."""
    a, b = (np.array(COLORS[name], dtype=np.float32) for name in (circle.color, circle.background))
    return float(np.linalg.norm(a - b)) >= least


def held_out(count: int, seed: int = 987_654_321) -> list[Circle]:
    """`count` circles that no training set of this module holds (another seed), with colours that can be told apart."""
    circles, index = [], 0
    while len(circles) < count:
        circle = random_circle(seed, index)
        circles += [circle] if distinct(circle) else []
        index += 1
    return circles


@dataclass(frozen=True)
class Verdict:
    """How well an image shows a circle: overlap with the wished disc (0..1), and whether each colour is the named."""

    iou: float
    color_right: bool
    background_right: bool


def among_nearest(rgb: np.ndarray, name: str, count: int = 5) -> bool:
    """Is `name` among the `count` colours nearest to `rgb` (3,) 0..255? Aqua and cyan, being equal, count as one."""
    distances = np.linalg.norm(PALETTE - rgb, axis=1)
    nearer = distances < distances[list(COLORS).index(name)]
    return len({tuple(c) for c in PALETTE[nearer]}) < count


def measure(image: np.ndarray, circle: Circle) -> Verdict:
    """Judge `image` (S,S,3) uint8 against the circle it should show.

    The pixels are divided into two colours (2-means, started at the two that the prompt names); the part that started
    at the circle's colour is the drawn circle. Its intersection over union with the wished disc is the overlap, the
    medians of the two parts are the drawn colours; one that is nowhere is wrong.
    """
    pixels = image.reshape(-1, 3).astype(np.float32)
    centers = np.array([COLORS[circle.color], COLORS[circle.background]], dtype=np.float32)
    for _ in range(10):
        first = np.linalg.norm(pixels - centers[0], axis=1) < np.linalg.norm(pixels - centers[1], axis=1)
        if first.all() or not first.any():
            break
        centers = np.stack([np.median(pixels[first], axis=0), np.median(pixels[~first], axis=0)])
    disc = circle.disc(image.shape[0]).reshape(-1)
    iou = (first & disc).sum() / (first | disc).sum()
    right = [
        bool(part.any()) and among_nearest(np.median(pixels[part], axis=0), name)
        for part, name in ((first, circle.color), (~first, circle.background))
    ]
    return Verdict(float(iou), *right)


@torch.no_grad()
def draw_all(
    model: ControlLDM,
    circles: list[Circle],
    control: bool,
    size: int,
    steps: int,
    only_mid_control: bool = False,
    tick: Callable[[int], Any] = lambda n: None,
) -> list[np.ndarray]:
    """An image (size,size,3) uint8 for each circle, from its prompt and, with `control`, its hint; seed 0, the model's
    own guidance scale. `tick(n)` is told of n finished images."""
    images, batch = [], 16
    for first in range(0, len(circles), batch):
        chunk = circles[first : first + batch]
        context, negative = model.encode_prompts([c.prompt for c in chunk]), model.encode_prompts([""])
        hint = None
        if control:
            channels = model.control_model.hint_channels
            hint = torch.stack([data.to_tensor(c.draw(size)[0][..., :1] / np.float32(255)) for c in chunk])
            hint = hint.expand(-1, channels, -1, -1)
        latents = sampler.sample(
            model, context, negative.expand_as(context), hint, (size, size), steps, first=first,
            only_mid_control=only_mid_control,
        )  # fmt: skip
        images += log.to_uint8(model.decode(latents))
        tick(len(chunk))
    return images


def judge(run: str | Path, count: int = 64, steps: int = 20, device: str = "cpu") -> dict[str, float]:
    """Let a trained ControlNet draw `count` held-out circles, print how well it obeys, and return the figures.

    `iou` and `base_iou`: mean overlap with the hint's disc, with control and for the base alone (same prompts, same
    noise); `colors`: the fraction of images in which both named colours are among the five nearest to the drawn ones.
    Saves `judge.png` in the run: hint, base alone, with control, ground truth.
    """
    model = ControlLDM.from_file(run).to(device)
    if model.control_model is None:
        raise checkpoint.CheckpointError(f"{run}: no ControlNet in it")
    settings = checkpoint.load_run(run) if checkpoint.is_run(run) else {}
    size = data.parse_resolution(settings.get("resolution", model.config.resolution))[0]
    only_mid = settings.get("only_mid_control", False)
    circles = held_out(count)
    with tqdm(total=2 * count, desc="drawing", unit="image", disable=None) as bar:
        base = draw_all(model, circles, False, size, steps, tick=bar.update)
        steered = draw_all(model, circles, True, size, steps, only_mid, bar.update)
    verdicts = [measure(image, circle) for image, circle in zip(steered, circles, strict=True)]
    figures = {
        "iou": float(np.mean([v.iou for v in verdicts])),
        "base_iou": float(np.mean([measure(im, c).iou for im, c in zip(base, circles, strict=True)])),
        "colors": float(np.mean([v.color_right and v.background_right for v in verdicts])),
    }
    print(
        f"{run}: {count} held-out hints (in colours that can be told apart): mean IoU {figures['iou']:.3f} "
        f"(base alone {figures['base_iou']:.3f}), colours right in {figures['colors']:.0%}"
    )
    if checkpoint.is_run(run):
        few = circles[:6]
        columns = {
            "hint": [c.draw(size)[0] for c in few],
            "base alone": base[:6],
            "with control": steered[:6],
            "ground truth": [c.draw(size)[1] for c in few],
        }
        log.save_grid(Path(run) / "judge.png", columns, [c.prompt for c in few])
        print(f"picture: {Path(run) / 'judge.png'}")
    return figures


# --------------------------------------------------------------------------------------------------------------- CLI
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make synthetic Fill50K, or judge a ControlNet trained on it.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("make", help="write a data set", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("out", nargs="?", default="data/circles", help="folder to make")
    p.add_argument("--count", type=int, default=2000, help="how many pairs")
    p.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    p.add_argument("--seed", type=int, default=0, help="the same seed makes the same data set")
    p = commands.add_parser("judge", help="measure a run", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("run", help="folder of a training run")
    p.add_argument("--count", type=int, default=64, help="how many held-out hints")
    p.add_argument("--steps", type=int, default=20, help="denoising steps")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    args = parser.parse_args(argv)
    if args.command == "make":
        if args.count < 1 or args.size < 16:
            raise data.DataError("--count is at least 1 and --size at least 16")
        make(args.out, args.count, args.size, args.seed)
        print(f"{args.count} pairs of {args.size}x{args.size} in {args.out}")
    else:
        judge(args.run, args.count, args.steps, args.device)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:  # a bad input: one line, no traceback
        sys.exit(f"circles.py: {e}")
