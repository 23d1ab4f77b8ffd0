"""The same weights under other names: diffusers and transformers, in both directions.

This project speaks the original key names. diffusers cut Stable Diffusion into folders (`unet/`, `vae/`,
`text_encoder/`, `controlnet/`) and renamed most modules; the numbers are equal, except that the 1x1 convolutions of
the VAE's attention became linear layers. A renaming is one table, original module -> diffusers' module, made from the
shape of a model (levels, blocks per level, which levels have attention) and used in both directions. Names inside of
transformer blocks are equal and need no row.

`to_original` takes tensors in every spelling found in the world (an original file, one component of it alone, a
component in diffusers' names); `to_diffusers` translates one component at a time. `clip_names` translates the names of
the text encoders.
"""

import re
from collections.abc import Callable

from torch import Tensor

from clip_names import clip_spelling, openclip_spelling
from ldm import ModelConfig
from unet import UNetConfig

# The prefixes of the components in a checkpoint. Stable Diffusion has one text encoder, SDXL has two.
UNET, CONTROL, VAE, TEXT = "model.diffusion_model.", "control_model.", "first_stage_model.", "cond_stage_model."
TEXT_1, TEXT_2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
COMPONENTS = {
    "UNet": UNET, "ControlNet": CONTROL, "VAE": VAE, "text encoder": TEXT, "text encoder 1": TEXT_1,
    "text encoder 2": TEXT_2,
}  # fmt: skip
SGM_TEXT = "conditioner.embedders.0."  # the text encoder in files of Stability's later code, which is SDXL's too
DIFFERENCE = "difference"  # the tensor that marks a ControlNet's file as holding differences to the UNet


def text_prefixes(config: ModelConfig) -> tuple[str, ...]:
    """The prefixes of the text encoders that a model has."""
    return (TEXT,) if config.text2 is None else (TEXT_1, TEXT_2)


# ------------------------------------------------------------------------------------------------------------- tables
RESBLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
VAE_RESBLOCK = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.17


def _rows(original: str, diffusers: str, inner: dict[str, str]) -> dict[str, str]:
    """The rows of a table for the modules inside of one block."""
    return {f"{original}.{a}": f"{diffusers}.{b}" for a, b in inner.items()}


def unet_table(levels: int, blocks: int, attention_levels: set[int]) -> dict[str, str]:
    """Modules of a UNet with `levels` resolutions, `blocks` residual blocks on each, and attention on some levels."""
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    table |= _rows("middle_block.0", "mid_block.resnets.0", RESBLOCK)
    table |= _rows("middle_block.2", "mid_block.resnets.1", RESBLOCK)
    n = 1
    for level in range(levels):  # the encoder, from the finest level
        for i in range(blocks):
            table |= _rows(f"input_blocks.{n}.0", f"down_blocks.{level}.resnets.{i}", RESBLOCK)
            table[f"input_blocks.{n}.1"] = f"down_blocks.{level}.attentions.{i}"
            n += 1
        if level < levels - 1:
            table[f"input_blocks.{n}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            n += 1
    n = 0
    for up, level in enumerate(reversed(range(levels))):  # the decoder, from the coarsest level
        for i in range(blocks + 1):
            table |= _rows(f"output_blocks.{n}.0", f"up_blocks.{up}.resnets.{i}", RESBLOCK)
            if level in attention_levels:
                table[f"output_blocks.{n}.1"] = f"up_blocks.{up}.attentions.{i}"
            n += 1
        if level > 0:
            table[f"output_blocks.{n - 1}.{1 + (level in attention_levels)}.conv"] = f"up_blocks.{up}.upsamplers.0.conv"
    return table


def control_table(levels: int, blocks: int, attention_levels: set[int]) -> dict[str, str]:
    """Modules of a ControlNet: the UNet's encoder, zero convolutions and hint encoder."""
    table = unet_table(levels, blocks, attention_levels)
    table |= {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(levels * (blocks + 1))}
    table |= {"middle_block_out.0": "controlnet_mid_block", "input_hint_block.0": "controlnet_cond_embedding.conv_in"}
    table |= {f"input_hint_block.{2 * i + 2}": f"controlnet_cond_embedding.blocks.{i}" for i in range(6)}
    return table | {"input_hint_block.14": "controlnet_cond_embedding.conv_out"}


def vae_table(levels: int, blocks: int) -> dict[str, str]:
    """Modules of the VAE. The original decoder counts levels from the finest, diffusers from the coarsest."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    halves = (("encoder", "down", blocks, "downsample"), ("decoder", "up", blocks + 1, "upsample"))
    for half, name, count, resize in halves:
        table |= {f"{half}.{k}": f"{half}.{k}" for k in ("conv_in", "conv_out")}
        table[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        table |= _rows(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", VAE_ATTENTION)
        for i in (0, 1):
            table |= _rows(f"{half}.mid.block_{i + 1}", f"{half}.mid_block.resnets.{i}", VAE_RESBLOCK)
        for level in range(levels):
            block = f"{half}.{name}_blocks.{level if half == 'encoder' else levels - 1 - level}"
            for i in range(count):
                table |= _rows(f"{half}.{name}.{level}.block.{i}", f"{block}.resnets.{i}", VAE_RESBLOCK)
            table[f"{half}.{name}.{level}.{resize}.conv"] = f"{block}.{resize}rs.0.conv"
    return table


def rename(key: str, table: dict[str, str]) -> str | None:
    """`key` with the name of its module replaced as `table` says (the longest match counts); None without a match."""
    words = key.split(".")
    for n in range(len(words), 0, -1):
        module = ".".join(words[:n])
        if module in table:
            return ".".join([table[module], *words[n:]])
    return None


# -------------------------------------------------------------------------------------------------------- to original
def _count(state: dict[str, Tensor], prefix: str) -> int:
    """The number of modules named `prefix` + index: 1 + the largest index in the keys. Indices have two digits at most
    (Stable Diffusion's UNet has 4 levels): tables are made for that many modules, and a key may claim any number."""
    index = re.compile(re.escape(prefix) + r"([0-9]{1,2})\.")
    return 1 + max((int(match[1]) for match in map(index.match, state) if match), default=-1)


def _unet_shape(state: dict[str, Tensor]) -> tuple[int, int, set[int]]:
    """Levels, blocks and levels with attention of a UNet or ControlNet in diffusers' names."""
    levels = _count(state, "down_blocks.")
    attention = {i for i in range(levels) if any(k.startswith(f"down_blocks.{i}.attentions.") for k in state)}
    return levels, _count(state, "down_blocks.0.resnets."), attention


def _renamed(state: dict[str, Tensor], table: dict[str, str], prefix: str) -> dict[str, Tensor]:
    """diffusers' names -> original names under `prefix`. A key that no row matches only gets the prefix."""
    inverse = {b: a for a, b in table.items()}
    return {prefix + (rename(k, inverse) or k): v for k, v in state.items()}


def _vae_to_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' VAE -> original names, the linear layers of its attention as 1x1 convolutions again."""
    table = vae_table(_count(state, "encoder.down_blocks."), _count(state, "encoder.down_blocks.0.resnets."))
    inverse = {b: a for a, b in table.items()}
    out = {}
    for key, value in state.items():
        for old, new in OLD_VAE_ATTENTION.items():
            key = key.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
        name = rename(key, inverse) or key
        out[VAE + name] = value[:, :, None, None] if ".attn_1." in name and value.ndim == 2 else value
    return out


def _text_to_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' text encoder -> OpenCLIP's names for the one of SD 2.x (width 1024), otherwise CLIP's names."""
    state = {"text_model." + k.removeprefix("text_model."): v for k, v in state.items()}
    if state["text_model.embeddings.token_embedding.weight"].shape[1] == 1024:
        return {TEXT + "model." + k: v for k, v in openclip_spelling(state).items()}
    return {TEXT + "transformer." + k: v for k, v in state.items()}


def first_text_to_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first text encoder of SDXL, as transformers names it -> original names."""
    return {TEXT_1 + "text_model." + k.removeprefix("text_model."): v for k, v in state.items()}


def second_text_to_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The second text encoder of SDXL, as transformers names it -> original names, which are OpenCLIP's.

    The matrix of the projection is (in, out) there and (out, in) in transformers.
    """
    names = {"text_projection.weight": TEXT_2 + "text_projection"}
    projection = {name: state[k].T for k, name in names.items() if k in state}
    encoder = {"text_model." + k.removeprefix("text_model."): v for k, v in state.items()}
    return {TEXT_2 + k: v for k, v in openclip_spelling(encoder).items()} | projection


def _add_prefix(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {k if k == DIFFERENCE else prefix + k: v for k, v in state.items()}


# Each spelling is recognized by one key. The first row that fits counts; tensors that fit no row are original already.
SPELLINGS = [
    ("controlnet_cond_embedding.conv_in.weight", lambda s: _renamed(s, control_table(*_unet_shape(s)), CONTROL)),
    ("down_blocks.0.resnets.0.time_emb_proj.weight", lambda s: _renamed(s, unet_table(*_unet_shape(s)), UNET)),
    ("encoder.down_blocks.0.resnets.0.norm1.weight", _vae_to_original),
    ("text_model.embeddings.token_embedding.weight", _text_to_original),
    ("embeddings.token_embedding.weight", _text_to_original),  # transformers from 5 on
    ("input_hint_block.0.weight", _add_prefix(CONTROL)),  # components in original names, alone in a file
    ("encoder.down.0.block.0.norm1.weight", _add_prefix(VAE)),
    ("input_blocks.0.0.weight", _add_prefix(UNET)),
]


def to_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their original names.

    diffusers' names are translated, a component alone in its file gets its prefix; original and unknown names stay.
    """
    is_sdxl = UNET + "label_emb.0.0.weight" in state or any(k.startswith("conditioner.embedders.1.") for k in state)
    if not is_sdxl:
        known = (SGM_TEXT + "model.", SGM_TEXT + "transformer.")
        state = {k.replace(SGM_TEXT, TEXT) if k.startswith(known) else k: v for k, v in state.items()}
    for key, translate in SPELLINGS:
        if key in state:
            return translate(state)
    return state


# ------------------------------------------------------------------------------------------------------- to diffusers
def unet_levels(config: UNetConfig) -> tuple[int, int, set[int]]:
    """Levels, blocks and levels with attention: the arguments of `unet_table` and `control_table`."""
    attention = {i for i in range(len(config.channel_mult)) if config.attends(i)}
    return len(config.channel_mult), config.num_res_blocks, attention


def to_diffusers(component: dict[str, Tensor], table: dict[str, str]) -> dict[str, Tensor]:
    """One component in original names without prefix -> diffusers' names.

    Tensors for which diffusers has no module (as those of a VAE's loss) are left out.
    """
    out = {}
    for key, value in component.items():
        if name := rename(key, table):
            out[name] = value[:, :, 0, 0] if ".attn_1." in key and value.ndim == 4 else value
    return out


def text_to_transformers(text_encoder: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The first `layers` layers of a text encoder in either original spelling -> transformers' names."""
    keep = tuple(f"encoder.layers.{i}." for i in range(layers))
    keep += ("embeddings.token_embedding.", "embeddings.position_embedding.", "final_layer_norm.")
    return {k: v for k, v in clip_spelling(text_encoder).items() if k.removeprefix("text_model.").startswith(keep)}


def second_text_to_transformers(text_encoder: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The second text encoder of SDXL, in OpenCLIP's names -> transformers' names, with the projection."""
    names = {"text_projection": "text_projection.weight"}
    projection = {name: text_encoder[k].T for k, name in names.items() if k in text_encoder}
    return text_to_transformers(text_encoder, layers) | projection
