"""The toy problem: a synthetic Fill50K, and a measure of how well a circle was filled.

Fill50K teaches a ControlNet one thing: the hint is a thin outline of a circle, the target the same circle filled, and
the prompt names both colours ("light golden rod yellow circle with turquoise background"). A base model can paint a
circle in any colour, but not *at the place that the hint shows*: that is what a ControlNet has to learn, and whether it
did can be measured. Layout and look follow the `fill50k` data set of the ControlNet tutorial (Zhang et al. 2023,
arXiv:2302.05543).

    python -m toy.circles make data/circles --count 5000 --size 128 --seed 0     write a data set in Fill50K's layout
    python -m toy.circles make data/shapes --shapes 128x128 160x96 96x160        with pictures of three shapes in turn
    python -m toy.circles judge runs/demo                                        does the trained ControlNet obey?
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor
from tqdm import tqdm

import data
from conditioning import whole_image
from config import default_device, device, number
from ldm import ControlLDM
from sampler import Control, Sampling, sample
from training.console import run_program
from training.images import Size
from training.records import save_grid, to_uint8
from weights import CheckpointError, load_model
from weights.runs import is_run, load_run
from weights.writing import write_atomically

# The 141 colour names of CSS (one spelling of gray), spelled in words as in Fill50K's prompts.
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
COLORS = {name: ImageColor.getrgb(name.replace(" ", "")) for name in " ".join(NAMES.split()).split(", ")}
PALETTE = np.array(list(COLORS.values()), dtype=np.float32)  # (141,3), RGB 0..255, in the order of COLORS


def sides(size: int | Size) -> Size:
    """Width and height of an image whose size is a side in pixels, or (width, height)."""
    return (size, size) if isinstance(size, int) else size


@dataclass(frozen=True)
class Circle:
    """One item of the toy problem. Lengths are fractions of the image's side, so a circle can be drawn at any size: the
    radius one of the shorter side. Sizes are a side in pixels, or (width, height)."""

    x: float
    y: float
    radius: float
    color: str
    background: str

    @property
    def prompt(self) -> str:
        return f"{self.color} circle with {self.background} background"

    def distance(self, size: int | Size) -> np.ndarray:
        """Distance of each pixel's center from the outline, in pixels, negative inside: (height,width) float32."""
        width, height = sides(size)
        xs, ys = (np.arange(side, dtype=np.float32) + 0.5 for side in (width, height))
        distance = np.hypot(xs[None, :] - self.x * width, ys[:, None] - self.y * height)
        return distance - self.radius * min(width, height)

    def disc(self, size: int | Size) -> np.ndarray:
        """The mask of the pixels whose centers lie inside the circle: (height,width) bool."""
        return self.distance(size) < 0

    def draw(self, size: int | Size, kind: str = "outline") -> tuple[np.ndarray, np.ndarray]:
        """Hint and target, (height,width,3) uint8, anti-aliased. `kind` of the hint: a key of HINTS."""
        inside = np.clip(0.5 - self.distance(size), 0, 1)
        target = inside[..., None] * COLORS[self.color] + (1 - inside[..., None]) * COLORS[self.background]
        hint = np.repeat(HINTS[kind](self, size)[..., None] * 255, 3, axis=2)
        return hint.round().astype(np.uint8), target.round().astype(np.uint8)


def outline(circle: Circle, size: int | Size) -> np.ndarray:
    """A thin line around the disc, as thin as Fill50K's (5 of 512 pixels): (height,width) in [0,1]."""
    distance = circle.distance(size)
    return np.clip(max(1.25, min(distance.shape) / 100) / 2 - np.abs(distance) + 0.5, 0, 1)


def layout(circle: Circle, size: int | Size) -> np.ndarray:
    """The part of each of 16 x 16 cells that the disc covers, as a gray: (height,width) in [0,1]."""
    width, height = sides(size)
    across, down = -(-width // 16), -(-height // 16)  # pixels of a cell
    covered = np.clip(0.5 - circle.distance((16 * across, 16 * down)), 0, 1).reshape(16, down, 16, across).mean((1, 3))
    return covered.repeat(down, 0).repeat(across, 1)[:height, :width]


def keypoints(circle: Circle, size: int | Size) -> np.ndarray:
    """Dots at the disc's center and at the four ends of its axes, as far as they lie in the image: (height,width) in
    [0,1]."""
    x, y = (circle.radius * min(sides(size)) / side for side in sides(size))
    offsets = ((0, 0), (x, 0), (-x, 0), (0, y), (0, -y))
    dots = [dataclasses.replace(circle, x=circle.x + dx, y=circle.y + dy, radius=0.02) for dx, dy in offsets]
    return np.max([np.clip(0.5 - dot.distance(size), 0, 1) for dot in dots], axis=0)


HINTS = {"outline": outline, "layout": layout, "keypoints": keypoints}  # what a hint shows of a circle


def random_circle(seed: int, index: int) -> Circle:
    """Circle number `index` of the endless data set `seed`: a function of the two numbers alone.

    Radii are 0.12 to 0.5 of the side and centers keep a margin of 0.1, so that the border cuts many circles, as in
    Fill50K; the two colours may be almost equal, as there.
    """
    rng = np.random.default_rng([seed, index])
    x, y = rng.uniform(0.1, 0.9, 2)
    color, background = rng.choice(list(COLORS), 2, replace=False)
    return Circle(float(x), float(y), float(rng.uniform(0.12, 0.5)), str(color), str(background))


def make(
    out: str | Path,
    count: int = 1000,
    size: int = 128,
    seed: int = 0,
    kind: str = "outline",
    shapes: Sequence[Size] | None = None,
) -> None:
    """Write `count` triples of `size` x `size` pixels, or of `shapes` (width, height) in turn, to the folder `out` in
    Fill50K's layout. `kind`: see HINTS."""
    shapes = shapes or [(size, size)]
    out, rows_file, lines = Path(out), Path(out) / "prompt.json", []
    for side in ("source", "target"):
        (out / side).mkdir(parents=True, exist_ok=True)
    rows_file.unlink(missing_ok=True)  # of an older data set: its prompts must never stand beside the new images
    for i in tqdm(range(count), desc=f"drawing {out}", unit="pair", disable=None):
        circle = random_circle(seed, i)
        names = [f"source/{i}.png", f"target/{i}.png"]
        for name, image in zip(names, circle.draw(shapes[i % len(shapes)], kind), strict=True):
            Image.fromarray(image).save(out / name, compress_level=1)
        lines.append(json.dumps({"source": names[0], "target": names[1], "prompt": circle.prompt}) + "\n")
    write_atomically(rows_file, lambda path: path.write_text("".join(lines)))  # last, when all images are there


# ------------------------------------------------------------------------------------------------------------ judging
def distinct(circle: Circle, threshold: float = 90.0) -> bool:
    """Whether the two colours are `threshold` or more apart in RGB (0..441), as dividing an image by them takes."""
    a, b = (np.array(COLORS[name], dtype=np.float32) for name in (circle.color, circle.background))
    return float(np.linalg.norm(a - b)) >= threshold


def held_out(count: int, seed: int = 987_654_321) -> list[Circle]:
    """`count` circles with distinct colours that are in no training set (their seed is another)."""
    candidates = (random_circle(seed, index) for index in itertools.count())
    return list(itertools.islice(filter(distinct, candidates), count))


@dataclass(frozen=True)
class Verdict:
    """How well an image shows a circle: overlap with the right disc (0..1); whether each colour is the named one."""

    iou: float
    color_right: bool
    background_right: bool


def among_nearest(rgb: np.ndarray, name: str, count: int = 5) -> bool:
    """Whether colour `name` is among the `count` nearest to `rgb` (3,) 0..255; equal ones (aqua, cyan) count as one."""
    distances = np.linalg.norm(PALETTE - rgb, axis=1)
    nearer = distances < distances[list(COLORS).index(name)]
    return len({tuple(c) for c in PALETTE[nearer]}) < count


def measure(image: np.ndarray, circle: Circle) -> Verdict:
    """Judge `image` (H,W,3) uint8 against the circle that it should show.

    2-means, started at the two named colours, divides the pixels into two clusters; the cluster that started at the
    circle's colour is the drawn circle. The overlap is its intersection over union with the disc of `circle`; the drawn
    colours are the medians of the two clusters. The colour of an empty cluster is wrong.
    """
    pixels = image.reshape(-1, 3).astype(np.float32)
    centers = np.array([COLORS[circle.color], COLORS[circle.background]], dtype=np.float32)
    for _ in range(10):
        drawn = np.linalg.norm(pixels - centers[0], axis=1) < np.linalg.norm(pixels - centers[1], axis=1)
        if drawn.all() or not drawn.any():
            break
        centers = np.stack([np.median(pixels[drawn], axis=0), np.median(pixels[~drawn], axis=0)])
    disc = circle.disc(image.shape[1::-1]).reshape(-1)
    iou = (drawn & disc).sum() / (drawn | disc).sum()
    colors_right = [
        bool(cluster.any()) and among_nearest(np.median(pixels[cluster], axis=0), name)
        for cluster, name in ((drawn, circle.color), (~drawn, circle.background))
    ]
    return Verdict(float(iou), *colors_right)


@torch.no_grad()
def draw_all(
    model: ControlLDM,
    circles: list[Circle],
    control: bool,
    size: int | Size,
    steps: int,
    progress: Callable[[int], Any] = lambda count: None,
    kind: str = "outline",
) -> list[np.ndarray]:
    """Draw an image (height,width,3) uint8 of each circle with the model's own guidance scale and seed 0.

    The model gets the circle's prompt and, with `control`, its hint of a `kind` in HINTS. `progress` is called with the
    number of images that were finished since the last call.
    """
    images, batch_size, size, nothing = [], 16, sides(size), model.encode_negative("")
    for first in range(0, len(circles), batch_size):
        batch = circles[first : first + batch_size]
        context, pooled = model.encode_text([c.prompt for c in batch])
        negative, negative_pooled = (x if x is None else x.expand(len(batch), *x.shape[1:]) for x in nothing)
        sizes = whole_image(size, len(batch))
        y = {"y": model.make_y(pooled, sizes), "negative_y": model.make_y(negative_pooled, sizes)}
        controls = []
        if control:
            hint = torch.stack([data.to_tensor(c.draw(size, kind)[0][..., :1] / np.float32(255)) for c in batch])
            hint = hint.expand(-1, model.control_model.hint_channels, -1, -1).to(model.device)
            controls = [Control(model.control_model, hint)]
        latents = sample(model, context, negative, controls, size, Sampling(steps), first, **y)
        images += to_uint8(model.decode(latents))
        progress(len(batch))
    return images


def judge(
    run: str | Path,
    count: int = 64,
    steps: int = 20,
    device: str = "cpu",
    kind: str = "outline",
    size: Size | None = None,
) -> dict[str, float]:
    """Let a trained ControlNet draw `count` held-out circles, print how well it obeys, and return the figures. `size`:
    (width, height) of the images; by itself that at which the run trained.

    `iou` and `base_iou`: mean overlap with the hint's disc, with control and for the base model alone (same prompts and
    noise); `colors`: the fraction of images in which each of the two named colours is among the five nearest to the
    drawn one. Saves `judge.png` in the run's folder: hint, base alone, with control, ground truth.
    """
    model = load_model(run).to(device)
    if model.control_model is None:
        raise CheckpointError(f"{run}: has no ControlNet that could be judged")
    settings = load_run(run) if is_run(run) else {}
    size = size or data.parse_resolution(settings.get("resolution", model.config.resolution))
    size = data.fit_size(size, model.config.multiple)
    circles = held_out(count)
    with tqdm(total=2 * count, desc="drawing", unit="image", disable=None) as bar:
        base_images = draw_all(model, circles, False, size, steps, bar.update, kind)
        control_images = draw_all(model, circles, True, size, steps, bar.update, kind)
    verdicts = [measure(image, circle) for image, circle in zip(control_images, circles, strict=True)]
    base_verdicts = [measure(image, circle) for image, circle in zip(base_images, circles, strict=True)]
    figures = {
        "iou": float(np.mean([v.iou for v in verdicts])),
        "base_iou": float(np.mean([v.iou for v in base_verdicts])),
        "colors": float(np.mean([v.color_right and v.background_right for v in verdicts])),
    }
    print(
        f"{run}: {count} held-out hints of {size[0]}x{size[1]} (in colours that can be told apart): mean IoU "
        f"{figures['iou']:.3f} "
        f"(base alone {figures['base_iou']:.3f}), both colours right in {figures['colors']:.0%}"
    )
    if is_run(run):
        shown = circles[:6]
        columns = {
            "hint": [c.draw(size, kind)[0] for c in shown],
            "base alone": base_images[:6],
            "with control": control_images[:6],
            "ground truth": [c.draw(size)[1] for c in shown],
        }
        save_grid(Path(run) / "judge.png", columns, [c.prompt for c in shown])
        print(f"picture: {Path(run) / 'judge.png'}")
    return figures


# --------------------------------------------------------------------------------------------------------------- CLI
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m toy.circles", description="Make a synthetic Fill50K, or judge a ControlNet that trained on it."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("make", help="write a data set", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("out", nargs="?", default="data/circles", help="folder to write")
    p.add_argument("--count", type=number(int, 1, 1e9), default=1000, help="number of pairs")
    p.add_argument("--size", type=number(int, 16, 16384), default=128, help="side of the images in pixels")
    p.add_argument("--seed", type=number(int, 0), default=0, help="equal seeds make equal data sets")
    p.add_argument("--shapes", nargs="+", metavar="WxH", help="sizes of the images in turn, instead of squares")
    p.add_argument("--hint", choices=tuple(HINTS), default="outline", help="what the hints show of a circle")
    p = commands.add_parser("judge", help="measure a run", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("run", help="folder of a training run")
    p.add_argument("--count", type=number(int, 1), default=64, help="number of held-out hints")
    p.add_argument("--steps", type=number(int, 1, 999), default=20, help="denoising steps")
    p.add_argument("--device", type=device, default=default_device(), help="device that computes")
    p.add_argument("--hint", choices=tuple(HINTS), default="outline", help="what the hints show of a circle")
    p.add_argument("--size", metavar="WxH", help="size of the images, by itself that of the run")
    args = parser.parse_args(argv)
    if args.command == "make":
        shapes = [data.parse_resolution(text) for text in args.shapes or [args.size]]
        make(args.out, args.count, args.size, args.seed, args.hint, shapes)
        print(f"{args.count} pairs of {', '.join(f'{w}x{h}' for w, h in shapes)} in {args.out}")
    else:
        size = data.parse_resolution(args.size) if args.size else None
        judge(args.run, args.count, args.steps, args.device, args.hint, size)


if __name__ == "__main__":
    run_program("toy.circles", main)
