"""Drawing pictures in batches, and saving each when it is finished.

Pictures of equal size and equal strengths are drawn together. The batches depend on the whole list and not on what is
already there: a batch of which one picture is missing is drawn whole, and the missing one saved. So a list that was
stopped and continued gives the bits of a list that was not, although the last bits of a picture depend on the number of
pictures that a processor computes at once.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from drawing.loading import ImageFile, Loaded, encode_init, read_hint
from drawing.metadata import KEY
from drawing.pictures import Picture
from drawing.request import Request
from ldm import ControlLDM
from sampler import Control, Sampling, sample
from training.images import Size, read_image, save_picture
from training.records import to_uint8


def batches_of(pictures: Sequence[Picture], batch_size: int) -> list[list[Picture]]:
    """The pictures in batches, each of one size and one list of strengths, in the order of their first pictures."""
    groups: dict[tuple, list[Picture]] = {}
    for picture in pictures:
        groups.setdefault((picture.size, picture.strengths), []).append(picture)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]


@torch.no_grad()
def draw(
    request: Request, loaded: Loaded, pictures: Sequence[Picture], texts: Mapping[str, str], there: Collection[str],
    show: Callable[[Picture, np.ndarray], object],
) -> None:  # fmt: skip
    """Draw `pictures` into the folder `request.out`, each with its text of `texts` (name -> text).

    Those whose names are in `there` are in the folder already. `show` gets every picture with its pixels (H,W,3)
    uint8, when it is drawn or read.
    """
    out = Path(request.out)
    missing = sum(p.name not in there for p in pictures)
    encoded = lru_cache(maxsize=64)(lambda prompt: encode(loaded.model, prompt, request.negative_prompt))
    start = lru_cache(maxsize=8)(lambda file, size: encode_init(loaded.model, file, size))
    with tqdm(total=missing * _steps(request), desc="drawing", unit="step", disable=None) as bar:
        for batch in batches_of(pictures, request.batch_size):
            fresh = [p for p in batch if p.name not in there]
            drawn = _draw_batch(request, loaded, batch, encoded, start, bar, len(fresh)) if fresh else {}
            for picture in batch:
                path = out / f"{picture.name}.png"
                if picture in fresh:
                    save_picture(path, drawn[picture.name], {KEY: texts[picture.name]})
                show(picture, drawn[picture.name] if drawn else read_image(path))


def _steps(request: Request) -> int:
    """How many steps a picture takes."""
    return request.steps if request.init is None else max(1, round(request.denoise * request.steps))


def encode(model: ControlLDM, prompt: str, negative: str) -> tuple[Tensor, ...]:
    """The contexts (1,77,D) of a prompt and of the negative prompt; of SDXL also their pooled vectors (1,P)."""
    if not model.config.pooled:  # both in one batch, as ever: its last bits depend on that
        return model.encode_prompts([prompt, negative]).split(1)
    (context, pooled), (negative_context, negative_pooled) = model.encode_text(prompt), model.encode_negative(negative)
    return context, negative_context, pooled, negative_pooled


def make_y(
    model: ControlLDM, pooled: Sequence[Tensor], size: Size, original: Size | None = None, crop: Size = (0, 0)
) -> dict[str, Tensor]:
    """`y` and `negative_y` of pictures of `size` from the pooled vectors (B,P) of both prompts; nothing for a model
    that takes none. The model is told that a picture was cut out at `crop` (left, top) of one of the size `original`
    (by itself `size`)."""
    sizes = [*(original or size)[::-1], *crop[::-1], *size[::-1]]
    return {
        name: model.make_y(vector, torch.tensor([sizes], dtype=torch.float32).expand(len(vector), -1))
        for name, vector in zip(("y", "negative_y"), pooled, strict=False)
    }


def _draw_batch(
    request: Request,
    loaded: Loaded,
    batch: Sequence[Picture],
    encoded: Callable[[str], tuple[Tensor, ...]],
    start: Callable[[ImageFile, Size], Tensor],
    bar: tqdm,
    count: int,
) -> dict[str, np.ndarray]:
    """Draw a batch: name -> pixels (H,W,3) uint8. The bar advances by `count` with each step."""

    def progress(steps: Iterable) -> Iterable:
        for step in steps:
            yield step
            bar.update(count)

    model, size = loaded.model, batch[0].size
    context, negative, *pooled = (torch.cat(part) for part in zip(*(encoded(p.prompt) for p in batch), strict=True))
    controls = []
    for i, control in enumerate(loaded.controls):
        hints = torch.stack([read_hint(p.hints[i], control.reading, control.resample, size) for p in batch])
        asked = control.request
        controls.append(
            Control(
                control.net, hints.to(model.device), batch[0].strengths[i], asked.control_start, asked.control_end,
                asked.guess_mode,
            )
        )  # fmt: skip
    init = torch.stack([start(p.init, size) for p in batch]) if batch[0].init else None
    settings = Sampling(
        request.steps, request.solver, request.eta, request.scale, spacing=request.spacing, denoise=request.denoise
    )
    images = [(p.seed, p.number) for p in batch]
    latents = sample(
        model, context, negative, controls, size, settings, progress=progress, images=images, init=init,
        **make_y(model, pooled, size, request.original_size, request.crop),
    )  # fmt: skip
    return dict(zip((p.name for p in batch), to_uint8(model.decode(latents)), strict=True))
