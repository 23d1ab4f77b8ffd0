"""How are the same weights called elsewhere? diffusers' folders and single parts, in both directions.

The project speaks the original names. diffusers cut Stable Diffusion into folders (`unet/`, `vae/`, `text_encoder/`,
`controlnet/`) and gave most modules other names; the numbers are the same, but for the VAE's attention, whose 1x1
convolutions became linear layers. A renaming is one table, original module -> diffusers' module, made from the shape of
a model (levels, blocks a level, which levels attend) and used in both directions. Names inside of transformers are
equal and need no row.

`to_original` takes tensors in any spelling that is found in the world (an original file, one part of it alone, a part
in diffusers' names); `to_diffusers` goes the other way, part by part; the `*_config` functions say what diffusers and
transformers want to find beside the weights.
"""

from typing import Any

from torch import Tensor

from clip_text import TextConfig, clip_spelling, openclip_spelling
from unet import UNetConfig
from vae import VAEConfig

# Where the parts are in a checkpoint.
UNET, CONTROL, VAE, TEXT = "model.diffusion_model.", "control_model.", "first_stage_model.", "cond_stage_model."


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


def _under(original: str, diffusers: str, inner: dict[str, str]) -> dict[str, str]:
    return {f"{original}.{a}": f"{diffusers}.{b}" for a, b in inner.items()}


def unet_table(levels: int, blocks: int, attends: set[int]) -> dict[str, str]:
    """Modules of a UNet: `levels` resolutions, `blocks` residual blocks on each, transformers on levels `attends`."""
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    table |= _under("middle_block.0", "mid_block.resnets.0", RESBLOCK)
    table |= _under("middle_block.2", "mid_block.resnets.1", RESBLOCK)
    n = 1
    for level in range(levels):  # down, from the finest
        for i in range(blocks):
            table |= _under(f"input_blocks.{n}.0", f"down_blocks.{level}.resnets.{i}", RESBLOCK)
            table[f"input_blocks.{n}.1"] = f"down_blocks.{level}.attentions.{i}"
            n += 1
        if level < levels - 1:
            table[f"input_blocks.{n}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            n += 1
    n = 0
    for up, level in enumerate(reversed(range(levels))):  # and up again, from the coarsest
        for i in range(blocks + 1):
            table |= _under(f"output_blocks.{n}.0", f"up_blocks.{up}.resnets.{i}", RESBLOCK)
            if level in attends:
                table[f"output_blocks.{n}.1"] = f"up_blocks.{up}.attentions.{i}"
            n += 1
        if level > 0:
            table[f"output_blocks.{n - 1}.{1 + (level in attends)}.conv"] = f"up_blocks.{up}.upsamplers.0.conv"
    return table


def control_table(levels: int, blocks: int, attends: set[int]) -> dict[str, str]:
    """Modules of a ControlNet: those of the UNet's encoder, and its own."""
    table = unet_table(levels, blocks, attends)
    table |= {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(levels * (blocks + 1))}
    table |= {"middle_block_out.0": "controlnet_mid_block", "input_hint_block.0": "controlnet_cond_embedding.conv_in"}
    table |= {f"input_hint_block.{2 * i + 2}": f"controlnet_cond_embedding.blocks.{i}" for i in range(6)}
    return table | {"input_hint_block.14": "controlnet_cond_embedding.conv_out"}


def vae_table(levels: int, blocks: int) -> dict[str, str]:
    """Modules of the autoencoder. Its decoder numbers levels from the finest; diffusers counts from the coarsest."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    sides = (("encoder", "down", blocks, "downsample"), ("decoder", "up", blocks + 1, "upsample"))
    for side, name, count, resize in sides:
        table |= {f"{side}.{k}": f"{side}.{k}" for k in ("conv_in", "conv_out")}
        table[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        table |= _under(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", VAE_ATTENTION)
        for i in (0, 1):
            table |= _under(f"{side}.mid.block_{i + 1}", f"{side}.mid_block.resnets.{i}", VAE_RESBLOCK)
        for level in range(levels):
            there = f"{side}.{name}_blocks.{level if side == 'encoder' else levels - 1 - level}"
            for i in range(count):
                table |= _under(f"{side}.{name}.{level}.block.{i}", f"{there}.resnets.{i}", VAE_RESBLOCK)
            table[f"{side}.{name}.{level}.{resize}.conv"] = f"{there}.{resize}rs.0.conv"
    return table


def rename(key: str, table: dict[str, str]) -> str | None:
    """`key` with the longest module in `table` that it starts with replaced; None where there is none."""
    parts = key.split(".")
    for n in range(len(parts), 0, -1):
        head = ".".join(parts[:n])
        if head in table:
            return ".".join([table[head], *parts[n:]])
    return None


# -------------------------------------------------------------------------------------------------------- to original
def _count(state: dict[str, Tensor], prefix: str) -> int:
    """How many numbers follow `prefix` in the keys: 1 + the largest."""
    return 1 + max((int(k.removeprefix(prefix).split(".")[0]) for k in state if k.startswith(prefix)), default=-1)


def _unet_shape(state: dict[str, Tensor]) -> tuple[int, int, set[int]]:
    """Levels, blocks and attending levels of a UNet or ControlNet in diffusers' names."""
    levels = _count(state, "down_blocks.")
    attends = {i for i in range(levels) if any(k.startswith(f"down_blocks.{i}.attentions.") for k in state)}
    return levels, _count(state, "down_blocks.0.resnets."), attends


def _renamed(state: dict[str, Tensor], table: dict[str, str], prefix: str) -> dict[str, Tensor]:
    """diffusers' names -> original names under `prefix`. A key that no row has stays as it is, under the prefix."""
    back = {b: a for a, b in table.items()}
    return {prefix + (rename(k, back) or k): v for k, v in state.items()}


def _vae_to_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    table = vae_table(_count(state, "encoder.down_blocks."), _count(state, "encoder.down_blocks.0.resnets."))
    back = {b: a for a, b in table.items()}
    out = {}
    for key, value in state.items():
        for old, new in OLD_VAE_ATTENTION.items():
            key = key.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
        name = rename(key, back) or key
        out[VAE + name] = value[:, :, None, None] if ".attn_1." in name and value.ndim == 2 else value
    return out


def _text_to_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """SD 2.x's tower (1024 wide) gets OpenCLIP's names, any other CLIP's."""
    state = {"text_model." + k.removeprefix("text_model."): v for k, v in state.items()}
    if state["text_model.embeddings.token_embedding.weight"].shape[1] == 1024:
        return {TEXT + "model." + k: v for k, v in openclip_spelling(state).items()}
    return {TEXT + "transformer." + k: v for k, v in state.items()}


DIFFERENCE = "difference"  # the tensor that marks a ControlNet's file as holding differences to the UNet


def _prefixed(prefix: str) -> Any:
    return lambda state: {k if k == DIFFERENCE else prefix + k: v for k, v in state.items()}


# A part is known by one of its keys. The first row that fits is taken; what fits none is original already.
SPELLINGS = [
    ("controlnet_cond_embedding.conv_in.weight", lambda s: _renamed(s, control_table(*_unet_shape(s)), CONTROL)),
    ("down_blocks.0.resnets.0.time_emb_proj.weight", lambda s: _renamed(s, unet_table(*_unet_shape(s)), UNET)),
    ("encoder.down_blocks.0.resnets.0.norm1.weight", _vae_to_original),
    ("text_model.embeddings.token_embedding.weight", _text_to_original),
    ("embeddings.token_embedding.weight", _text_to_original),  # transformers from 5 on
    ("input_hint_block.0.weight", _prefixed(CONTROL)),  # parts in original names, alone in a file
    ("encoder.down.0.block.0.norm1.weight", _prefixed(VAE)),
    ("input_blocks.0.0.weight", _prefixed(UNET)),
]


def to_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their original names: a part alone gets its prefix, diffusers' names are translated; original
    names, and what is not known, stay."""
    for key, translate in SPELLINGS:
        if key in state:
            return translate(state)
    return state


# ------------------------------------------------------------------------------------------------------- to diffusers
def unet_levels(config: UNetConfig) -> tuple[int, int, set[int]]:
    """Levels, blocks and attending levels, for the tables."""
    attends = {i for i in range(len(config.channel_mult)) if 2**i in config.attention_resolutions}
    return len(config.channel_mult), config.num_res_blocks, attends


def to_diffusers(part: dict[str, Tensor], table: dict[str, str]) -> dict[str, Tensor]:
    """One part in original names, without its prefix -> diffusers' names. What no module there has (as a VAE's loss) is
    left out."""
    out = {}
    for key, value in part.items():
        if name := rename(key, table):
            out[name] = value[:, :, 0, 0] if ".attn_1." in key and value.ndim == 4 else value
    return out


def text_to_transformers(part: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A text tower in either original spelling -> transformers' names, its first `layers` layers."""
    keep = tuple(f"encoder.layers.{i}." for i in range(layers))
    keep += ("embeddings.token_embedding.", "embeddings.position_embedding.", "final_layer_norm.")
    return {k: v for k, v in clip_spelling(part).items() if k.removeprefix("text_model.").startswith(keep)}


def unet_config(config: UNetConfig, sample_size: int, upcast_attention: bool = False) -> dict[str, Any]:
    """`unet/config.json`; `sample_size` is the side of the latents. (What diffusers calls the heads' dimension is, for
    these models, the number of heads.) `upcast_attention`: in fp16, as SD 2.1 at 768 px needs it."""
    levels, blocks, attends = unet_levels(config)
    channels = [config.model_channels * m for m in config.channel_mult]
    kinds = lambda order, side: [("CrossAttn" if i in attends else "") + f"{side}Block2D" for i in order]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": channels,
        "layers_per_block": blocks,
        "down_block_types": kinds(range(levels), "Down"),
        "up_block_types": kinds(reversed(range(levels)), "Up"),
        "attention_head_dim": [config.heads(c) for c in channels],
        "cross_attention_dim": config.context_dim,
        "use_linear_projection": config.use_linear_in_transformer,
        "upcast_attention": upcast_attention,
        "norm_num_groups": config.norm_groups,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
    }


def control_config(config: UNetConfig, hint_channels: int, hint_widths: tuple[int, ...]) -> dict[str, Any]:
    """`config.json` of a ControlNet's folder."""
    drop = ("sample_size", "out_channels", "up_block_types")
    return {k: v for k, v in unet_config(config, 0).items() if k not in drop} | {
        "_class_name": "ControlNetModel",
        "conditioning_channels": hint_channels,
        "conditioning_embedding_out_channels": list(hint_widths),
        "controlnet_conditioning_channel_order": "rgb",
    }


def vae_config(config: VAEConfig, scale_factor: float, sample_size: int) -> dict[str, Any]:
    """`vae/config.json`; `sample_size` is the side of the images."""
    levels = len(config.ch_mult)
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": sample_size,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": config.z_channels,
        "block_out_channels": [config.ch * m for m in config.ch_mult],
        "layers_per_block": config.num_res_blocks,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": config.norm_groups,
        "act_fn": "silu",
        "scaling_factor": scale_factor,
    }


def text_config(config: TextConfig) -> dict[str, Any]:
    """`text_encoder/config.json`, for transformers."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers - config.penultimate,
        "num_attention_heads": config.heads,
        "hidden_act": config.activation,
        "projection_dim": config.width,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 1,
        "layer_norm_eps": 1e-5,
    }


def scheduler_config(start: float, end: float, timesteps: int, prediction: str, zero_snr: bool) -> dict[str, Any]:
    """`scheduler/scheduler_config.json`: DDIM with the original's spacing, or what a schedule of zero SNR needs."""
    return {
        "_class_name": "DDIMScheduler",
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": timesteps,
        "prediction_type": {"eps": "epsilon", "v": "v_prediction"}[prediction],
        "timestep_spacing": "trailing" if zero_snr else "leading",
        "rescale_betas_zero_snr": zero_snr,
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
    }


def model_index(control: bool) -> dict[str, Any]:
    """`model_index.json`: which class reads which folder."""
    parts = {
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    } | ({"controlnet": ["diffusers", "ControlNetModel"]} if control else {})
    absent = {"safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None]}
    name = "StableDiffusionControlNetPipeline" if control else "StableDiffusionPipeline"
    return {"_class_name": name, "requires_safety_checker": False} | parts | absent
