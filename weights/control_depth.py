"""ControlNets that are smaller than their UNet's encoder: fewer blocks in the transformers, or none.

Most of SDXL's weights are blocks of transformers: the full copy of its encoder has 1.25 billion weights, without any
block it has 0.16. A smaller ControlNet has the same residual blocks, zero convolutions and residuals; of each
transformer it keeps the first blocks, and a level that keeps none has no transformers. The middle block, which keeps as
many as the last level, then has a transformer without blocks. diffusers published two of this kind for SDXL, under the
names that stand in NAMED.

    full    (0, 2, 10)   the UNet's own
    mid     (0, 0, 1)
    small   (0, 0, 0)
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm import ModelConfig
from unet import UNetConfig
from weights.configs import CheckpointError

NAMED = {"mid": 1, "small": 0}  # the blocks that each transformer of the last level keeps; the others keep none


def depth_from_text(text: str, unet: UNetConfig) -> tuple[int, ...] | None:
    """What `text` asks for, as `ModelConfig.control_depth`: "full" (None), "mid", "small", or the blocks in each
    transformer, one number for each level from the finest, as "0,1,4". Raises CheckpointError."""
    levels = len(unet.channel_mult)
    if text in ("", "full"):
        return None
    if text in NAMED:
        return normalised((0,) * (levels - 1) + (NAMED[text],), unet)
    numbers = re.split(r"[,\s]+", text.strip())
    if len(numbers) != levels or not all(re.fullmatch("[0-9]{1,3}", n) for n in numbers):
        raise CheckpointError(
            f"--control-depth is {text!r}, should be full, mid, small, or {levels} numbers as {written(unet.depths)}"
        )
    depth = tuple(map(int, numbers))
    check_depth("--control-depth", depth, unet)
    return normalised(depth, unet)


def written(depth: tuple[int, ...]) -> str:
    """As one types it: "0,2,10"."""
    return ",".join(map(str, depth))


def normalised(depth: tuple[int, ...], unet: UNetConfig) -> tuple[int, ...] | None:
    """`depth` with zeros where the UNet has no transformers; None if it is the UNet's own."""
    own = unet.with_depth(depth).depths
    return None if own == unet.depths else own


def check_depth(where: str | Path, depth: tuple[int, ...], unet: UNetConfig) -> None:
    """Raise CheckpointError, which begins with `where`, if a ControlNet would have more blocks than its UNet."""
    own, wanted = unet.depths, unet.with_depth(depth).depths
    if any(a > b for a, b in zip(wanted, own, strict=True)):
        raise CheckpointError(f"{where}: transformers of {written(depth)} blocks; the UNet's have {written(own)}")


def check_control_depth(where: str | Path, config: ModelConfig, asked: str) -> None:
    """Raise CheckpointError if the ControlNet of a model, which comes from `where`, does not go with the UNet, or has
    not the depth that was asked for ("": any)."""
    check_depth(where, config.control_unet.depths, config.unet)
    wanted = dataclasses.replace(config, control_depth=depth_from_text(asked, config.unet)).control_unet.depths
    if asked and wanted != config.control_unet.depths:
        own = written(config.control_unet.depths)
        raise CheckpointError(f"{where}: its ControlNet's transformers have {own} blocks, not {written(wanted)}")


def depth_of(control: Mapping[str, Tensor], unet: UNetConfig) -> tuple[int, ...] | None:
    """The `ModelConfig.control_depth` of a ControlNet for `unet`, from its keys (without prefix).

    The level's first transformer counts; if another one differs, loading says which weights are missing. None for a
    ControlNet that is not whole: every whole one has a transformer in its middle block.
    """
    if "middle_block.1.proj_in.weight" not in control:
        return None
    found: dict[str, int] = {}  # module with a transformer -> its blocks
    block = re.compile(r"(input_blocks\.[0-9]{1,3}|middle_block)\.1\.transformer_blocks\.([0-9]{1,3})\.")
    for match in filter(None, map(block.match, control)):
        found[match[1]] = max(found.get(match[1], 0), 1 + int(match[2]))
    names = [f"input_blocks.{1 + level * (unet.num_res_blocks + 1)}" for level in range(len(unet.channel_mult) - 1)]
    return normalised(tuple(found.get(name, 0) for name in (*names, "middle_block")), unet)


def with_control_depth(config: ModelConfig, control: Mapping[str, Tensor]) -> ModelConfig:
    """The configuration of a model with this ControlNet (keys without prefix)."""
    return dataclasses.replace(config, control_depth=depth_of(control, config.unet))
