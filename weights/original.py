"""What the original's files hold beside weights: buffers that its code computes and its strict loading asks for.

The original registers the noise schedule as buffers (`register_schedule` and `logvar` in ldm/models/diffusion/ddpm.py),
and its CLIP text encoder the numbers of the positions. A base that another program saved may lack them. Of the OpenCLIP
text tower the original also holds what Stable Diffusion 2 never computes: its last layer, `text_projection`, and
`logit_scale`, which diffusers leaves out. SDXL's published file has no buffers of the schedule; of a fine-tuned model
that predicts the velocity a tensor `v_pred` tells other programs (and `weights.detect`). Nothing else here is read.
"""

import numpy as np
import torch
from torch import Tensor

from clip_bpe import MAX_TOKENS
from ldm import ModelConfig
from weights.spelling import TEXT, TEXT_1, TEXT_2

CLIP, OPENCLIP = TEXT + "transformer.text_model.", TEXT + "model."


def missing_buffers(state: dict[str, Tensor], betas: np.ndarray, alphas: np.ndarray) -> dict[str, Tensor]:
    """The tensors that a Stable Diffusion model with the weights `state` lacks of the original's list of keys.

    betas, alphas: the two results of `sampler.noise_schedule`.
    """
    is_sdxl = any(k.startswith(TEXT_2) for k in state)
    wanted = {TEXT_2 + "logit_scale": torch.tensor(100.0).log()} if is_sdxl else schedule_buffers(betas, alphas)
    for clip in (CLIP, TEXT_1 + "text_model."):
        if clip + "embeddings.token_embedding.weight" in state:
            wanted[clip + "embeddings.position_ids"] = torch.arange(MAX_TOKENS)[None]
    wanted |= _unused_text_weights(state)
    return {k: v for k, v in wanted.items() if k not in state}


def markers(config: ModelConfig) -> dict[str, Tensor]:
    """The tensors by which other programs see that an SDXL model predicts the velocity, and with zero terminal SNR."""
    wanted = {"v_pred": config.prediction == "v", "ztsnr": config.zero_terminal_snr}
    return {name: torch.tensor([]) for name, there in wanted.items() if there and config.text2}


def schedule_buffers(betas: np.ndarray, alphas: np.ndarray) -> dict[str, Tensor]:
    """The 13 buffers of the original's noise schedule, each (timesteps,): computed in float64, stored in float32."""
    alphas_prev = np.append(1.0, alphas[:-1])
    variance = betas * (1 - alphas_prev) / (1 - alphas)  # of q(x_{t-1} | x_t, x_0)
    buffers = {
        "betas": betas,
        "alphas_cumprod": alphas,
        "alphas_cumprod_prev": alphas_prev,
        "sqrt_alphas_cumprod": np.sqrt(alphas),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alphas),
        "log_one_minus_alphas_cumprod": np.log(1 - alphas),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / alphas),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alphas - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),  # the first variance is 0
        "posterior_mean_coef1": betas * np.sqrt(alphas_prev) / (1 - alphas),
        "posterior_mean_coef2": (1 - alphas_prev) * np.sqrt(1 - betas) / (1 - alphas),
        "logvar": np.zeros(len(betas)),  # a learnt variance, which Stable Diffusion does not learn
    }
    return {name: torch.from_numpy(values).float() for name, values in buffers.items()}


def _unused_text_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The last layer of an OpenCLIP text tower of 23 layers, and its projection: zeros, with which the layer returns
    what it is given. SD 2.x reads the output of layer 23 of 24."""
    layers = OPENCLIP + "transformer.resblocks."
    if layers + "22.ln_1.weight" not in state:
        return {}
    last = {k: v for k, v in state.items() if k.startswith(f"{layers}22.")}
    width = state[layers + "22.ln_1.weight"].shape[0]
    return {k.replace(".resblocks.22.", ".resblocks.23."): torch.zeros_like(v) for k, v in last.items()} | {
        OPENCLIP + "text_projection": torch.zeros(width, width),
        OPENCLIP + "logit_scale": torch.tensor(100.0).log(),
    }
