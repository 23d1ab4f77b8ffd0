"""What is measured: a training step and an image, of this project and of diffusers.

Models have random weights of the real shapes, so nothing is downloaded. Our step is that of train.py, on cached latents
and contexts; diffusers' step is that of its train_controlnet.py: VAE and text encoder at every step, AdamW, clipping.
"""

import contextlib
import io
import itertools
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import merge
import train
from conditioning import whole_image
from config import Config
from ldm import MODELS, PRECISIONS, ControlLDM, compute_dtype_for
from lowvram import prediction
from lowvram.process import disable_malloc_trim
from sampler import Control, Sampling, sample
from training import cache
from training.distributed import Ranks
from training.interruption import Interruption
from training.records import to_uint8
from training.setup import build_trainer
from weights import diffusers_folder

GUIDANCE = 7.5


def random_model(name: str, device: str = "cpu") -> ControlLDM:
    """A model of MODELS on `device`, with small random weights, none of them zero."""
    with torch.device("meta"):
        model = ControlLDM(MODELS[name])
    model.to_empty(device=device).requires_grad_(False)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02) if p.ndim > 1 else nn.init.ones_(p)
    return model


class OurStep:
    """A step of the loop in train.py, on one batch again and again, as the loader gives it."""

    def __init__(self, config: Config, name: str):
        model, side = random_model(name, config.device), int(config.resolution)
        if config.cache:
            cache.release_encoders(model)
        else:
            for part in (model.vae, model.text):
                part.to(config.device, compute_dtype_for(config.precision, config.device))
        batch = prediction.fake_batch(config, MODELS[name], (side, side))
        batch = {k: torch.rand(v.shape) if v.is_floating_point() else v for k, v in batch.items()}
        batch["hint"] = (255 * batch["hint"]).byte()
        if not config.cache:
            batch = {k: v for k, v in batch.items() if k != "context"} | {"prompt": ["a circle"] * config.batch_size}
        if "cuda" in config.device:
            batch = {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in batch.items()}
        self.trainer, self.batches = build_trainer(config, model), itertools.repeat(batch)
        disable_malloc_trim()  # as train.py does, which reads the weights in the formats that they have now
        self.loss = train.compiled_loss(config.buckets) if config.compile else train.diffusion_loss

    def __call__(self) -> None:
        self.trainer.config.steps = self.trainer.step + 1
        with contextlib.redirect_stderr(io.StringIO()):  # where the loop shows no progress bar
            train.training_loop(self.trainer, self.batches, self.loss, Ranks(), None, lambda: True, Interruption())


def diffusers_step(config: Config, name: str) -> Callable[[], None]:
    """The step of diffusers' train_controlnet.py, with its defaults, on images and prompts that are made beforehand."""
    from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel

    shapes, side, dtype, device = MODELS[name], int(config.resolution), PRECISIONS[config.precision], config.device
    control_config = diffusers_folder.control_config(shapes.unet, 3, shapes.hint_widths)
    with torch.device(device):
        unet = UNet2DConditionModel.from_config(diffusers_folder.unet_config(shapes.unet, side // 8, False))
        control = ControlNetModel.from_config(control_config).train()
        vae = AutoencoderKL.from_config(diffusers_folder.vae_config(shapes.vae, shapes.scale_factor, side))
        encoders = diffusers_encoders(name)
    for part in (unet, vae, *encoders):
        part.requires_grad_(False).to(device, dtype)
    control.to(device)
    if config.gradient_checkpointing:
        control.enable_gradient_checkpointing()
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    optimizer = torch.optim.AdamW(control.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    images, hints = (torch.rand(config.batch_size, 3, side, side, device=device) for _ in range(2))
    ids = torch.randint(1000, (config.batch_size, 77), device=device)
    sizes = torch.tensor([[side, side, 0, 0, side, side]], device=device).expand(config.batch_size, -1)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=dtype == torch.float16)

    def step() -> None:
        for _ in range(config.accumulate_grad_batches):
            latents = vae.encode(images.to(dtype)).latent_dist.sample() * shapes.scale_factor
            noise = torch.randn_like(latents)
            t = torch.randint(0, 1000, (len(images),), device=device)
            x_t = scheduler.add_noise(latents.float(), noise.float(), t).to(dtype)
            prompt = diffusers_prompt(encoders, ids, sizes)
            with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
                down, mid = control(x_t, t, controlnet_cond=hints.to(dtype), return_dict=False, **prompt)
            eps = unet(
                x_t, t, down_block_additional_residuals=[d.to(dtype) for d in down],
                mid_block_additional_residual=mid.to(dtype), return_dict=False, **prompt,
            )[0]  # fmt: skip
            loss = F.mse_loss(eps.float(), noise.float()) / config.accumulate_grad_batches
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(control.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        loss.item()

    return step


def diffusers_encoders(name: str) -> list[nn.Module]:
    """The text encoders of transformers, one or SDXL's two, in the shapes of a model."""
    import transformers

    shapes = MODELS[name]
    return [
        getattr(transformers, diffusers_folder.text_class(text))(
            transformers.CLIPTextConfig(**diffusers_folder.text_config(text))
        )
        for text in (shapes.text, shapes.text2)
        if text
    ]


def diffusers_prompt(encoders: list[nn.Module], ids: Tensor, sizes: Tensor) -> dict[str, Any]:
    """What diffusers' networks are told of prompts (B,77), and for SDXL of the sizes (B,6), as its train_controlnet.py
    and train_controlnet_sdxl.py do."""
    if len(encoders) == 1:
        return {"encoder_hidden_states": encoders[0](ids, return_dict=False)[0]}
    encoded = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    return {
        "encoder_hidden_states": torch.cat([e.hidden_states[-2] for e in encoded], dim=-1),
        "added_cond_kwargs": {"text_embeds": encoded[-1].text_embeds, "time_ids": sizes},
    }


def our_image(config: Config, name: str) -> Callable[[], None]:
    """An image of our sampler: DDIM in `config.log_steps` steps, with guidance and control."""
    side = int(config.resolution)
    model, hint = random_model(name, config.device), torch.rand(1, 3, side, side).to(config.device)
    model.to(config.device, compute_dtype_for(config.precision, config.device))
    disable_malloc_trim()  # as sampler.py does
    settings = Sampling(config.log_steps, scale=GUIDANCE)

    def draw() -> None:
        (context, pooled), (negative, negative_pooled) = model.encode_text("a circle"), model.encode_negative("")
        controls = [Control(model.control_model, hint)]
        y, negative_y = (model.make_y(p, whole_image((side, side))) for p in (pooled, negative_pooled))
        latents = sample(model, context, negative, controls, (side, side), settings, y=y, negative_y=negative_y)
        to_uint8(model.decode(latents))

    return torch.no_grad()(draw)


def fake_image(name: str, side: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """One denoising step of an image with guidance and control, and the decoder, as functions; on fake tensors."""
    shapes = MODELS[name]
    model, latent = ControlLDM(shapes), side // shapes.vae_factor
    x, embedding = (torch.empty(2, c, latent, latent) for c in (shapes.unet.in_channels, shapes.unet.model_channels))
    t, context = torch.zeros(2), torch.empty(2, 77, shapes.unet.context_dim)
    y = torch.empty(2, shapes.unet.adm_in_channels) if shapes.unet.adm_in_channels else None

    def step() -> None:
        model.unet(x, t, context, control=model.control_model.residuals(x, embedding, t, context, y), y=y)

    return torch.no_grad()(step), torch.no_grad()(lambda: model.decode(x[:1]))


def diffusers_image(config: Config, name: str) -> Callable[[], None]:
    """An image of diffusers' pipeline, with the same weights."""
    import diffusers

    family = "XL" if MODELS[name].text2 else ""
    pipeline_class = getattr(diffusers, f"StableDiffusion{family}ControlNetPipeline")
    side, dtype = int(config.resolution), PRECISIONS[config.precision]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        files = diffusers_folder.diffusers_folder(name, random_model(name).state_dict(), MODELS[name])
        merge.save_folder(f"{folder}/model", files, {}, False)
        pipeline = pipeline_class.from_pretrained(f"{folder}/model", dtype=dtype)
    pipeline.to(config.device).set_progress_bar_config(disable=True)
    settings = dict(num_inference_steps=config.log_steps, guidance_scale=GUIDANCE, width=side, height=side)
    hint = torch.rand(1, 3, side, side)
    return lambda: pipeline("a circle", image=hint, **settings)


TASKS = {
    "step": {"ours": OurStep, "diffusers": diffusers_step},
    "image": {"ours": our_image, "diffusers": diffusers_image},
}
