"""A model as diffusers and transformers read it from a folder.

    model_index.json                  which class reads which folder
    scheduler/scheduler_config.json   the noise schedule
    unet/ vae/ controlnet/            config.json, diffusion_pytorch_model.safetensors
    text_encoder/ tokenizer/          config.json, model.safetensors; vocab.json, merges.txt, ...
    text_encoder_2/ tokenizer_2/      the same, of SDXL's second text encoder

The `*_config` functions return the JSON beside the weights, in diffusers' words (what diffusers calls the dimension of
the attention heads is, for these models, their number). `diffusers_folder` and `control_folder` return whole folders
as dictionaries: file name -> JSON, text, or tensors.
"""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_bpe import tokenizer_files
from clip_text import TextConfig
from conditioning import SIZE_WIDTH
from ldm import ModelConfig
from unet import UNetConfig
from vae import VAEConfig
from weights.configs import CheckpointError
from weights.detect import hint_channels_of, hint_widths_of
from weights.source import check_networks, missing_weights, strip_prefix
from weights.spelling import (
    CONTROL,
    TEXT,
    TEXT_1,
    TEXT_2,
    UNET,
    VAE,
    control_table,
    second_text_to_transformers,
    text_prefixes,
    text_to_transformers,
    to_diffusers,
    unet_levels,
    unet_table,
    vae_table,
)

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def diffusers_folder(path: str | Path, state: dict[str, Tensor], config: ModelConfig) -> dict[str, Any]:
    """The diffusers folder of a whole model, with or without ControlNet: file name -> JSON, text, or tensors.

    `path`: where `state` comes from. Raises CheckpointError if weights are missing.
    """
    check_networks(state, config, lambda prefix: path)
    if missing := missing_weights(path, state, config, whole=True):
        raise CheckpointError(f"{path}: not a whole model: {missing[0]}")
    control = {k: v for k, v in state.items() if k.startswith(CONTROL)}
    side = config.resolution
    upcast_attention = config.unet.use_linear_in_transformer and config.prediction == "v"
    files = {
        "model_index.json": model_index(config, bool(control)),
        "scheduler/scheduler_config.json": scheduler_config(config),
        "unet/config.json": unet_config(config.unet, side // config.vae_factor, upcast_attention),
        f"unet/{WEIGHTS_FILE}": to_diffusers(strip_prefix(state, UNET), unet_table(*unet_levels(config.unet))),
        "vae/config.json": vae_config(config.vae, config.scale_factor, side, not config.vae_fp16_safe),
        f"vae/{WEIGHTS_FILE}": to_diffusers(
            strip_prefix(state, VAE), vae_table(len(config.vae.ch_mult), config.vae.num_res_blocks)
        ),
    } | text_files(state, config)
    return files | ({f"controlnet/{k}": v for k, v in control_folder(path, control, config).items()} if control else {})


def text_files(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Any]:
    """The folders of the text encoders, one or two, and of their tokenizers."""
    encoders, pads = (config.text, config.text2), (config.pad, config.pad2)
    translate = {TEXT: text_to_transformers, TEXT_1: text_to_transformers, TEXT_2: second_text_to_transformers}
    files = {}
    for prefix, encoder, pad, number in zip(text_prefixes(config), encoders, pads, ("", "_2"), strict=False):
        weights = translate[prefix](strip_prefix(state, prefix), kept_layers(encoder))
        files[f"text_encoder{number}/config.json"] = text_config(encoder)
        files[f"text_encoder{number}/model.safetensors"] = weights
        files |= {f"tokenizer{number}/{name}": text for name, text in tokenizer_files(pad).items()}
    return files


def kept_layers(config: TextConfig) -> int:
    """The layers of a text encoder in the folder. Of SDXL's diffusers reads the last but one itself; of SD 2.x's the
    last, so it has to be the one that is used."""
    return config.layers - (config.penultimate and config.final_norm)


def control_folder(path: str | Path, control: dict[str, Tensor], config: ModelConfig) -> dict[str, Any]:
    """The diffusers folder of a ControlNet (keys `control_model.*`) from `path`: file name -> JSON or tensors."""
    check_networks(control, config, lambda prefix: path)
    control = strip_prefix(control, CONTROL)
    channels, widths = hint_channels_of(control, path), hint_widths_of(control, path)
    return {
        "config.json": control_config(config.control_unet, channels, widths, config.global_pool),
        WEIGHTS_FILE: to_diffusers(control, control_table(*unet_levels(config.control_unet))),
    }


def unet_config(config: UNetConfig, sample_size: int, upcast_attention: bool = False) -> dict[str, Any]:
    """`unet/config.json`. `sample_size`: the side of the latents.

    `upcast_attention`: attention computes in float32 also in an fp16 model, as SD 2.1 at 768 px needs it.
    """
    levels, blocks, attention_levels = unet_levels(config)
    channels = [config.model_channels * m for m in config.channel_mult]
    block_types = lambda order, direction: [
        ("CrossAttn" if i in attention_levels else "") + f"{direction}Block2D" for i in order
    ]
    further: dict[str, Any] = {}
    if config.depths != UNetConfig().depths[:levels]:  # the last number is the middle block's too
        depths = [config.depth(i) or 1 for i in range(levels - 1)]
        further["transformer_layers_per_block"] = [*depths, config.transformer_depth[-1]]
    if config.adm_in_channels:
        further["addition_embed_type"], further["addition_time_embed_dim"] = "text_time", SIZE_WIDTH
        further["projection_class_embeddings_input_dim"] = config.adm_in_channels
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": channels,
        "layers_per_block": blocks,
        "down_block_types": block_types(range(levels), "Down"),
        "up_block_types": block_types(reversed(range(levels)), "Up"),
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
    } | further


def control_config(
    config: UNetConfig, hint_channels: int, hint_widths: tuple[int, ...], global_pool: bool = False
) -> dict[str, Any]:
    """`config.json` of a ControlNet's folder. `global_pool`: see `controlnet.ControlNet`."""
    decoder_only = ("sample_size", "out_channels", "up_block_types")
    return {k: v for k, v in unet_config(config, 0).items() if k not in decoder_only} | {
        "_class_name": "ControlNetModel",
        "conditioning_channels": hint_channels,
        "conditioning_embedding_out_channels": list(hint_widths),
        "controlnet_conditioning_channel_order": "rgb",
        "global_pool_conditions": global_pool,
    }


def vae_config(
    config: VAEConfig, scale_factor: float, sample_size: int, force_upcast: bool | None = None
) -> dict[str, Any]:
    """`vae/config.json`. `sample_size`: the side of the images in pixels. `force_upcast`: a pipeline in float16
    computes the VAE in float32, for which SDXL's asks."""
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
    } | ({"force_upcast": True} if force_upcast else {})


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The narrowest floating-point dtype that holds all floating-point tensors without rounding."""
    dtypes = {t.dtype if t.itemsize > 1 else torch.float16 for t in tensors if t.is_floating_point()}
    return functools.reduce(torch.promote_types, dtypes or {torch.float32})


def text_config(config: TextConfig) -> dict[str, Any]:
    """`text_encoder/config.json`, for transformers."""
    return {
        "architectures": [text_class(config)],
        # Unless from_pretrained is given a dtype, transformers takes the one that stands here (or the file's), and
        # diffusers takes float32 whatever the file has: the parts of a pipeline must agree.
        "dtype": "float32",
        "torch_dtype": "float32",  # the name before transformers 4.56
        "model_type": "clip_text_model",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": kept_layers(config),
        "num_attention_heads": config.heads,
        "hidden_act": config.activation,
        "projection_dim": config.projection or config.width,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 1,
        "layer_norm_eps": 1e-5,
    }


def scheduler_config(config: ModelConfig) -> dict[str, Any]:
    """`scheduler/scheduler_config.json`: DDIM with the original's spacing, or with the one that zero SNR needs."""
    return {
        "_class_name": "DDIMScheduler",
        "beta_start": config.linear_start,
        "beta_end": config.linear_end,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": config.timesteps,
        "prediction_type": {"eps": "epsilon", "v": "v_prediction"}[config.prediction],
        "timestep_spacing": "trailing" if config.zero_terminal_snr else "leading",
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
    }


def text_class(config: TextConfig) -> str:
    """The class of transformers for a text encoder."""
    return "CLIPTextModelWithProjection" if config.projection else "CLIPTextModel"


def model_index(config: ModelConfig, control: bool) -> dict[str, Any]:
    """`model_index.json`: which class reads which folder. `control`: the folder has a ControlNet."""
    components = {
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", text_class(config.text)],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    } | ({"controlnet": ["diffusers", "ControlNetModel"]} if control else {})
    absent = {"feature_extractor": [None, None], "image_encoder": [None, None]}
    name = "StableDiffusion{}{}Pipeline".format("XL" * bool(config.text2), "ControlNet" * control)
    if config.text2:
        settings = {"force_zeros_for_empty_prompt": config.zero_empty_negative}
        components["text_encoder_2"] = ["transformers", text_class(config.text2)]
        components["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
    else:
        settings, absent = {"requires_safety_checker": False}, {"safety_checker": [None, None]} | absent
    return {"_class_name": name} | settings | components | absent
