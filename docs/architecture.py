"""Draw UNet and ControlNet of Stable Diffusion 1.5 from the code's own modules.

    python docs/architecture.py        writes docs/architecture.svg

The model is built on the meta device, where tensors have shapes and no content, and makes one forward pass. Hooks note
the layers, the channels and the map sizes of every block, so the picture shows what the code does. Which convolutions
are zero convolutions is read from the weights of a new ControlNet (a narrow one, whose modules have the same names).
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from controlnet import ControlNet  # noqa: E402
from ldm import SD15, ControlLDM  # noqa: E402

FILE = Path(__file__).with_suffix(".svg")
LAYERS = {
    "Conv3x3": "Conv", "Conv2d": "Conv", "ResBlock": "Res", "SpatialTransformer": "Attn", "Downsample": "Down",
    "Upsample": "Up", "GroupNorm": "Norm", "SiLU": "SiLU", "ZeroConv": "zero conv",
}  # fmt: skip
INK, FAINT, PAPER, BORDER = "#1f2328", "#59636e", "#ffffff", "#d1d9e0"
LOCKED = ("#e4e9ef", "#7d8793")  # fill and stroke
COPY = ("#ffe3cc", "#c4570a")
RANDOM = ("#fff6c9", "#a47a00")
ZERO = ("#b3390b", "#7a2405")
SKIP, RESIDUAL = "#59636e", "#b3390b"

WIDTH, TOP, PITCH, HEIGHT = 1072, 300, 72, 46  # pixels: the picture, the first row, rows, boxes
ENCODER, DECODER, ZEROS, CONTROL, HINT = 178, 432, 624, 800, 976  # centres of the columns
ENCODER_WIDTH, DECODER_WIDTH, ZERO_WIDTH, HINT_WIDTH = 140, 156, 132, 130
SUMS = 304  # the column in which residuals are added to skips
PANELS = ((90, 526, "#f4f6f8"), (540, WIDTH - 14, "#fffaf5"))  # left, right, colour
BOLD = ' font-weight="600"'


# ------------------------------------------------------------------------------------------------------- the modules
@dataclass(frozen=True)
class Box:
    """What a module did in the forward pass: its layers in words, channels, and the sides of the maps in pixels."""

    layers: str
    c_in: int
    c_out: int
    side_in: int
    side_out: int

    @property
    def channels(self) -> str:
        return f"{self.c_in}" if self.c_in == self.c_out else f"{self.c_in} → {self.c_out}"


def trace(model: ControlLDM) -> dict[str, Box]:
    """Make a forward pass of `model` (on the meta device). Returns the boxes by the names of their modules."""
    side, config = model.config.resolution, model.config
    latent_side = side // config.vae_factor
    boxes: dict[str, Box] = {}

    def note(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            layers = list(module.children()) or [module]
            label = ", ".join(LAYERS[type(layer).__name__] for layer in layers)
            x = inputs[0]
            boxes[name] = Box(label, x.shape[1], output.shape[1], x.shape[-1], output.shape[-1])

        module.register_forward_hook(hook)

    for prefix, network in (("unet", model.unet), ("control", model.control_model)):
        for name, module in network.named_children():
            if isinstance(module, nn.ModuleList):
                for i, block in enumerate(module):
                    note(f"{prefix}.{name}.{i}", block)
            elif name == "input_hint_block":
                for i, layer in enumerate(module):
                    if isinstance(layer, nn.Conv2d):
                        note(f"{prefix}.{name}.{i}", layer)
            elif name != "time_embed":
                note(f"{prefix}.{name}", module)
    empty = lambda *shape: torch.empty(1, *shape, device="meta")
    context = empty(77, config.unet.context_dim)
    timesteps = torch.zeros(1, dtype=torch.int64, device="meta")
    with torch.no_grad():
        x, hint = empty(config.unet.in_channels, latent_side, latent_side), empty(3, side, side)
        model.predict(x, timesteps, context, hint)
    return boxes


def zero_convolutions() -> set[str]:
    """The names of the ControlNet's own convolutions whose weights and biases are zero in a new ControlNet."""
    own, zeros = ("input_hint_block.", "zero_convs.", "middle_block_out."), set()
    for name, module in ControlNet(dataclasses.replace(SD15.unet, model_channels=32)).named_modules():
        if name.startswith(own) and isinstance(module, nn.Conv2d) and not any(p.any() for p in module.parameters()):
            zeros.add(name if name.startswith("input_hint_block.") else name.removesuffix(".0"))
    return zeros


# ----------------------------------------------------------------------------------------------------------- the pen
class Pen:
    """Collects the elements of an SVG picture."""

    def __init__(self):
        self.elements: list[str] = []

    def text(
        self, x: float, y: float, words: str, size: int = 15, anchor: str = "middle", color: str = INK, style: str = ""
    ) -> None:
        """Words whose middle line is at y."""
        self.elements.append(
            f'<text x="{x:g}" y="{y + 0.35 * size:g}" font-size="{size}" text-anchor="{anchor}" fill="{color}"{style}>'
            f"{words}</text>"
        )

    def box(self, x: float, y: float, width: float, height: float, colors: tuple[str, str], radius: int = 6) -> None:
        """A rectangle around the middle (x, y)."""
        fill, stroke = colors
        self.elements.append(
            f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}" rx="{radius}" '
            f'fill="{fill}" stroke="{stroke}" stroke-width="1.5"/>'
        )

    def panel(self, left: float, right: float, top: float, bottom: float, fill: str) -> None:
        self.box((left + right) / 2, (top + bottom) / 2, right - left, bottom - top, (fill, BORDER), 14)

    def arrow(self, path: str, color: str) -> None:
        """An arrow along an SVG path."""
        head = f'marker-end="url(#head{color[1:]})"'
        self.elements.append(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2" {head}/>')

    def plus(self, x: float, y: float, color: str) -> None:
        """The sign of a sum."""
        self.elements.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="10" fill="{PAPER}" stroke="{color}" stroke-width="2"/>'
            f'<path d="M{x - 5:g} {y:g}H{x + 5:g}M{x:g} {y - 5:g}V{y + 5:g}" stroke="{color}" stroke-width="2"/>'
        )

    def svg(self, height: float) -> str:
        heads = "".join(
            f'<marker id="head{color[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="9" markerHeight="9" '
            f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" fill="{color}"/></marker>'
            for color in dict.fromkeys((SKIP, RESIDUAL, LOCKED[1], COPY[1], RANDOM[1], INK))
        )
        font = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" font-family="{font}">',
                "<title>The UNet of Stable Diffusion and its ControlNet</title>",
                f"<defs>{heads}</defs>",
                f'<rect width="{WIDTH}" height="{height:g}" rx="16" fill="{PAPER}"/>',
                *self.elements,
                "</svg>\n",
            ]
        )


# ------------------------------------------------------------------------------------------------------- the picture
def row(i: int) -> float:
    """The middle of row i, in which input block i and its output block stand."""
    return TOP + PITCH * i


def gap(i: int) -> float:
    """The middle of the gap under row i, where the output of input block i leaves."""
    return row(i) + PITCH / 2


def draw_block(pen: Pen, x: float, y: float, width: float, number: str, box: Box, colors: tuple[str, str]) -> None:
    """A box with the number of the block at the left, its layers, and under them its channels."""
    pen.box(x, y, width, HEIGHT, colors)
    pen.text(x - width / 2 + 19, y, number, 14, color=FAINT)
    pen.text(x - width / 2 + 38, y - 9, box.layers, 15, "start")
    pen.text(x - width / 2 + 38, y + 11, box.channels, 14, "start", FAINT)


def draw_encoder(pen: Pen, boxes: dict[str, Box], prefix: str, x: float, colors: tuple[str, str], count: int) -> None:
    """The noisy latents, the input blocks from top to bottom, and the middle block under them."""
    for i in range(count):
        top = row(i - 1) + HEIGHT / 2 if i else 150
        pen.arrow(f"M{x} {top}V{row(i) - HEIGHT / 2 - 1}", colors[1])
        draw_block(pen, x, row(i), ENCODER_WIDTH, str(i), boxes[f"{prefix}.input_blocks.{i}"], colors)
    first, middle, y = boxes[f"{prefix}.input_blocks.0"], boxes[f"{prefix}.middle_block"], middle_row(count)
    pen.box(x, 150, ENCODER_WIDTH, 34, (PAPER, INK), 17)
    pen.text(x, 150, f"x_t {first.c_in} × {first.side_in} × {first.side_in}", 15)
    pen.text(x + 12, row(0) - HEIGHT / 2 - 16, "input_blocks", 14, "start", FAINT)
    pen.arrow(f"M{x} {row(count - 1) + HEIGHT / 2}V{y - HEIGHT / 2 - 1}", colors[1])
    pen.box(x, y, ENCODER_WIDTH, HEIGHT, colors)
    pen.text(x, y - 9, middle.layers, 15)
    pen.text(x, y + 11, middle.channels, 14, color=FAINT)
    pen.text(x, y + HEIGHT / 2 + 16, "middle_block", 14, color=FAINT)


def middle_row(count: int) -> float:
    """The middle of the row of the middle blocks, a little below the rows of the `count` input blocks."""
    return row(count) + 20


def draw_decoder(pen: Pen, boxes: dict[str, Box], count: int) -> None:
    """The output blocks from bottom to top, and the layers that end in eps."""
    out, y = boxes["unet.out"], 216
    for i in range(count):
        bottom = middle_row(count) if i == 0 else row(count - i) - HEIGHT / 2
        pen.arrow(f"M{DECODER} {bottom}V{row(count - 1 - i) + HEIGHT / 2 + 1}", LOCKED[1])
        block = boxes[f"unet.output_blocks.{i}"]
        draw_block(pen, DECODER, row(count - 1 - i), DECODER_WIDTH, str(i), block, LOCKED)
    pen.arrow(f"M{DECODER} {row(0) - HEIGHT / 2}V{y + HEIGHT / 2 + 1}", LOCKED[1])
    pen.arrow(f"M{DECODER} {y - HEIGHT / 2}V168", LOCKED[1])
    pen.box(DECODER, y, DECODER_WIDTH, HEIGHT, LOCKED)
    pen.text(DECODER, y - 9, out.layers, 15)
    pen.text(DECODER, y + 11, out.channels, 14, color=FAINT)
    pen.box(DECODER, 150, DECODER_WIDTH, 34, (PAPER, INK), 17)
    pen.text(DECODER, 150, f"eps {out.c_out} × {out.side_out} × {out.side_out}", 15)
    pen.text(DECODER - 12, row(0) - HEIGHT / 2 - 16, "output_blocks", 14, "end", FAINT)
    pen.text(DECODER - DECODER_WIDTH / 2 - 8, y, "out", 14, "end", FAINT)


def draw_hint_encoder(pen: Pen, boxes: dict[str, Box], zeros: set[str]) -> None:
    """The convolutions of the hint encoder, from the hint at the bottom to the first gap of the ControlNet."""
    names = [name for name in boxes if name.startswith("control.input_hint_block.")]
    place = lambda k: gap(0) + 62 * (len(names) - 1 - k)
    for k, name in enumerate(names):
        box, zero = boxes[name], name.removeprefix("control.") in zeros
        pen.arrow(f"M{HINT} {place(k - 1) - 20}V{place(k) + 21}", RANDOM[1])
        pen.box(HINT, place(k), HINT_WIDTH, 40, ZERO if zero else RANDOM)
        left = HINT - HINT_WIDTH / 2
        pen.text(left + 17, place(k), name.split(".")[-1], 14, color="#ffd9c9" if zero else FAINT)
        pen.text(left + 36, place(k) - 8, "zero conv" if zero else box.layers, 14, "start", PAPER if zero else INK)
        pen.text(left + 36, place(k) + 10, box.channels, 13, "start", PAPER if zero else FAINT)
        if box.side_in != box.side_out:
            pen.text(HINT + 10, place(k) + 31, f"{box.side_in} to {box.side_out}", 12, "start", FAINT)
    first = boxes[names[0]]
    pen.box(HINT, place(-1), HINT_WIDTH + 20, 34, (PAPER, INK), 17)
    pen.text(HINT, place(-1), f"hint {first.c_in} × {first.side_in} × {first.side_in}", 13)
    pen.text(HINT, gap(0) - 36, "input_hint_block", 14, color=FAINT)
    pen.arrow(f"M{HINT - HINT_WIDTH / 2} {gap(0)}H{CONTROL + 11}", RANDOM[1])
    pen.plus(CONTROL, gap(0), COPY[1])


def draw_residuals(pen: Pen, boxes: dict[str, Box], zeros: set[str], count: int) -> None:
    """Skips to the right, residuals through zero convolutions to the left, and the sums that the decoder reads."""
    for i in range(count):
        y = gap(i)
        pen.arrow(f"M{ENCODER} {y}H{SUMS - 11}", SKIP)
        pen.arrow(f"M{CONTROL} {y}H{ZEROS + ZERO_WIDTH / 2 + 1}", COPY[1])
        bridge = f'stroke="{PANELS[0][2]}" stroke-width="8"'  # over the line of the decoder
        pen.elements.append(f'<path d="M{DECODER - 8} {y:g}H{DECODER + 8}" {bridge}/>')
        pen.arrow(f"M{ZEROS - ZERO_WIDTH / 2} {y}H{SUMS + 11}", RESIDUAL)
        pen.arrow(f"M{SUMS} {y - 10}V{row(i)}H{DECODER - DECODER_WIDTH / 2 - 1}", INK)
        pen.plus(SUMS, y, RESIDUAL)
        draw_zero_conv(pen, y, f"zero_convs.{i}", boxes, zeros)
    y = middle_row(count)
    pen.arrow(f"M{ENCODER + ENCODER_WIDTH / 2} {y}H{DECODER - 11}", SKIP)
    pen.arrow(f"M{CONTROL - ENCODER_WIDTH / 2} {y}H{ZEROS + ZERO_WIDTH / 2 + 1}", COPY[1])
    pen.arrow(f"M{ZEROS - ZERO_WIDTH / 2} {y}H{DECODER + 11}", RESIDUAL)
    pen.plus(DECODER, y, RESIDUAL)
    draw_zero_conv(pen, y, "middle_block_out", boxes, zeros)


def draw_zero_conv(pen: Pen, y: float, name: str, boxes: dict[str, Box], zeros: set[str]) -> None:
    assert name in zeros, f"{name} does not start at zero"
    pen.box(ZEROS, y, ZERO_WIDTH, 38, ZERO)
    pen.text(ZEROS, y - 8, name, 13, color=PAPER)
    pen.text(ZEROS, y + 9, boxes[f"control.{name}"].channels, 13, color=PAPER)


def draw_levels(pen: Pen, boxes: dict[str, Box], count: int) -> None:
    """The map size of each group of rows, at the left, and dotted lines between the groups."""
    sides = [boxes[f"unet.input_blocks.{i}"].side_out for i in range(count)]
    for i, side in enumerate(sides):
        if i == 0 or side != sides[i - 1]:
            pen.text(46, row(i), f"{side} × {side}", 15, style=BOLD)
            if i:
                dotted = f'stroke="{FAINT}" stroke-width="1.5" stroke-dasharray="2 5"'
                pen.elements.append(f'<path d="M12 {gap(i - 1):g}H{ENCODER - 14:g}" {dotted}/>')


def draw_legend(pen: Pen, y: float, model: ControlLDM) -> None:
    """What the colours mean, and what the picture leaves out."""
    entries = (
        (40, y, LOCKED, "locked"),
        (400, y, COPY, "trains; starts as a copy of the UNet's encoder"),
        (40, y + 32, RANDOM, "trains; starts at random"),
        (400, y + 32, ZERO, "zero convolution: trains; its weights and biases start at zero"),
    )
    for x, middle, colors, words in entries:
        pen.box(x + 13, middle, 26, 18, colors, 4)
        pen.text(x + 36, middle, words, 15, "start")
    emb, context = model.unet.emb_dim, model.config.unet.context_dim
    notes = (
        "The numbers under the layers are channels. A decoder block concatenates the map from below and the sum at its "
        "left.",
        f"Every Res also reads the embedding of the timestep ({emb} values), every Attn the context of the prompt "
        f"(77 × {context}).",
    )
    for i, words in enumerate(notes):
        pen.text(40, y + 72 + 26 * i, words, 15, "start", FAINT)


def draw() -> str:
    """The picture, as the text of an SVG file."""
    with torch.device("meta"):
        model = ControlLDM(SD15)
    boxes, zeros, count = trace(model), zero_convolutions(), len(model.unet.input_blocks)
    bottom = middle_row(count) + 62
    millions = lambda network: f"{sum(p.numel() for p in network.parameters()) / 1e6:.0f} M parameters"
    titles = f"UNet, locked: {millions(model.unet)}", f"ControlNet, trains: {millions(model.control_model)}"
    pen = Pen()
    side = model.config.resolution
    pen.text(WIDTH / 2, 40, f"Stable Diffusion 1.5 and its ControlNet, for an image of {side} × {side}", 22, style=BOLD)
    for (left, right, color), title in zip(PANELS, titles, strict=True):
        pen.panel(left, right, 76, bottom, color)
        pen.text(left + 20, 104, title, 18, "start", style=BOLD)
    draw_levels(pen, boxes, count)
    draw_encoder(pen, boxes, "unet", ENCODER, LOCKED, count)
    draw_encoder(pen, boxes, "control", CONTROL, COPY, count)
    draw_decoder(pen, boxes, count)
    draw_residuals(pen, boxes, zeros, count)
    draw_hint_encoder(pen, boxes, zeros)
    draw_legend(pen, bottom + 34, model)
    return pen.svg(bottom + 156)


if __name__ == "__main__":
    FILE.write_text(draw(), encoding="utf-8")
    print(f"wrote {FILE}")
