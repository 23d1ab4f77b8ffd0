"""What trains, in which number format, on which device, and what moves it.

    part                      kept in              computed in     gradient in
    frozen weights            precision            precision       (none)
    trained weights           trained_weights      precision       trained_weights; bf16 with optimizer_bits 16 or 8
    masters (optimizer)       trained weights themselves, or with optimizer_on_cpu float32 copies of them on the CPU
    latents, noise, loss      float32              float32
    moments of the optimizer  optimizer_bits (32, 16 or 8)

`precision` is float16 or bfloat16 where the GPU has instructions for it; what stays in float32 is then multiplied as
TF32, as under the precision of this name. Layers cast their own weights to the dtype of
their input (`layers.py`), so autograd casts the gradient of a float32 weight back to float32 (Micikevicius et al. 2018,
arXiv:1710.03740). float16 has a short exponent: the loss is scaled up before the backward pass and the gradients are
scaled down after it (`torch.amp.GradScaler`); the other formats need no scale.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from config import Config
from ldm import PRECISIONS, ControlLDM, compute_dtype_for
from lowvram.muon import Muon
from lowvram.offload import OptimizerInPlace, OptimizerOnCPU, is_fake, is_kept_on_cpu, to_pinned_cpu
from lowvram.optimizer import AdamW, FusedAdamW
from lowvram.streaming import BlockStreamer
from training.graph import GradientGraph
from training.health import Health
from unet import CrossAttention, parts


@dataclass
class Trainer:
    """The parts of a training step, and how far the run is."""

    config: Config
    model: ControlLDM
    trainable: dict[str, nn.Parameter]  # the parameters that train, by checkpoint name, where the model computes
    home: OptimizerInPlace | OptimizerOnCPU  # where the optimizer works, with its `masters`
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: dict[str, Tensor]  # moving average of the masters; empty without --ema-decay
    locked_weights: dict[str, Tensor]  # of the ControlNet and what trained before, as they are saved; they do not train
    rows: list[str] = dataclasses.field(default_factory=list)  # digests of the data set's rows, if it is a folder
    step: int = 0  # steps that are done
    samples: int = 0  # samples that they consumed
    health: Health = dataclasses.field(default_factory=Health)  # whether checkpoints may be written
    graph: GradientGraph | None = None  # the gradient as a CUDA graph, where it is recorded
    between_steps: bool = True  # False while the optimizer moves the weights, which then belong to no step


def select_trainable(model: ControlLDM, config: Config) -> dict[str, nn.Parameter]:
    """The parameters that train, by checkpoint name. They and only they require a gradient afterwards.

    They are the ControlNet's, without the 12 outer zero convolutions under `only_mid_control`; with `sd_locked` off
    those of the UNet's decoder (`output_blocks`, `out`) too.
    """
    model.requires_grad_(False)
    trainable = {}
    for name, p in model.named_parameters():
        in_control = name.startswith("control_model.")
        unused = config.only_mid_control and name.startswith("control_model.zero_convs.")
        in_decoder = name.startswith(("model.diffusion_model.output_blocks.", "model.diffusion_model.out."))
        if (in_control and not unused) or (in_decoder and not config.sd_locked):
            trainable[name] = p.requires_grad_(True)
    return trainable


def loading_formats(config: Config) -> dict[str, Any]:
    """The arguments with which `weights.load_model` loads the model that `config` (resolved) trains: frozen weights in
    the formats to which `build_trainer` and the cache round them anyway. SDXL then takes half of the CPU's memory.

    The ControlNet stays float32 where that many bits are kept of it: of masters, and of a part that does not train.
    """
    kept_in_full = config.optimizer_on_cpu or config.only_mid_control
    return dict(
        unet_dtype=PRECISIONS[config.precision],
        control_dtype=torch.float32 if kept_in_full else PRECISIONS[config.trained_weights],
        text_dtype=compute_dtype_for(config.precision, config.device),
        in_full=lambda model: select_trainable(model, config),
    )


def build_trainer(config: Config, model: ControlLDM) -> Trainer:
    """Bring UNet and ControlNet of `model` to `config.device` in their number formats, and make the optimizer.

    `config` is resolved. VAE and text encoder are left where they are.
    """
    model.control_model.only_mid_control = config.only_mid_control
    trainable = select_trainable(model, config)
    if config.channels_last:
        for p in model.parameters():
            p.data = p.data.contiguous(memory_format=torch.channels_last) if p.ndim == 4 else p.data
    # masters and locked weights are copied before the model's weights are rounded
    named = model.control_model.named_parameters(prefix="control_model")
    locked_weights = {name: p.detach().clone() for name, p in named if not p.requires_grad}
    home = OptimizerOnCPU(trainable) if config.optimizer_on_cpu else OptimizerInPlace(trainable, config.device)
    place_weights(config, model)
    if config.optimizer_bits != 32 and config.precision != "fp16" and not config.optimizer_on_cpu:
        for p in trainable.values():  # the moments are less precise than these gradients
            p.grad_dtype = torch.bfloat16
    optimizer = build_optimizer(config, home)
    scaled_on = "cpu" if config.optimizer_on_cpu else torch.device(config.device).type
    scaler = torch.amp.GradScaler(scaled_on, enabled=config.precision == "fp16")
    ema = {name: p.detach().float().clone() for name, p in home.masters.items()} if config.ema_decay else {}
    return Trainer(config, model, trainable, home, optimizer, scaler, ema, locked_weights)


def place_weights(config: Config, model: ControlLDM) -> None:
    """Cast the weights of UNet and ControlNet to the formats in which they are kept, and move them to the device.

    With `stream` the frozen weights of the UNet's blocks stay in CPU memory.
    """
    unet, control_model = model.unet, model.control_model
    frozen_dtype, trained_dtype = PRECISIONS[config.precision], PRECISIONS[config.trained_weights]
    # a prediction on fake tensors is for a GPU, which computes in every format
    fake = is_fake(next(model.parameters()))
    compute_dtype = frozen_dtype if fake else compute_dtype_for(config.precision, config.device)
    for p in (*unet.parameters(), *control_model.parameters()):
        p.data = p.data.to(trained_dtype if p.requires_grad else frozen_dtype)
    if config.stream:
        blocks = (*unet.input_blocks, unet.middle_block, *unet.output_blocks)
        unet.weight_streamer = BlockStreamer([p for b in blocks for p in parts(b)], config.device, compute_dtype)
    for network in (unet, control_model):
        network.compute_dtype, network.gradient_checkpointing = compute_dtype, config.gradient_checkpointing
        for p in network.parameters():
            p.data = p.data if is_kept_on_cpu(p) else p.data.to(config.device)
        for module in network.modules():
            if isinstance(module, CrossAttention):
                module.query_chunk = config.attention_slice


def build_optimizer(config: Config, home: OptimizerInPlace | OptimizerOnCPU) -> torch.optim.Optimizer:
    """The optimizer of the masters. AdamW is PyTorch's fused one where moments and weights are float32, otherwise our
    own."""
    if config.optimizer == "muon":
        rates = config.learning_rate, config.muon_rate
        return Muon(home.masters, *rates, config.weight_decay, config.optimizer_bits, config.seed)
    bf16_masters = config.trained_weights == "bf16" and not config.optimizer_on_cpu
    if config.optimizer_bits != 32 or bf16_masters:
        return AdamW(home.masters, config.learning_rate, config.weight_decay, config.optimizer_bits, config.seed)
    return FusedAdamW(home.masters.values(), config.learning_rate, config.weight_decay)


def zero_grad(trainer: Trainer) -> None:
    """Drop the gradients of the model's parameters and of the masters."""
    for p in (*trainer.trainable.values(), *trainer.home.masters.values()):
        p.grad = None


# ------------------------------------------------------------------------------------------ average of the weights
@torch.no_grad()
def update_ema(trainer: Trainer) -> None:
    """Move the average towards the masters. Its decay rises from 0.1 at the first step to `ema_decay`, so that the
    average forgets the initial weights soon."""
    decay = min(trainer.config.ema_decay, (1 + trainer.step) / (10 + trainer.step))
    for name, average in trainer.ema.items():
        average.lerp_(trainer.home.masters[name].float(), 1 - decay)


@contextlib.contextmanager
def ema_weights(trainer: Trainer) -> Iterator[None]:
    """While entered, the model computes with the moving average of its weights, if the run keeps one."""
    kept = {name: trainer.trainable[name].data for name in trainer.ema}
    for name, average in trainer.ema.items():
        trainer.trainable[name].data = average.to(kept[name])
    try:
        yield
    finally:
        for name, weights in kept.items():
            trainer.trainable[name].data = weights


@contextlib.contextmanager
def resting_weights(trainer: Trainer) -> Iterator[None]:
    """While entered, the ControlNet of a run with `stream` is in CPU memory: on a small GPU the VAE's decoder needs the
    room. The numbers stay the same."""
    weights = list(trainer.model.control_model.parameters()) if trainer.config.stream else []
    for p in weights:
        p.data = to_pinned_cpu(p.data)
    try:
        yield
    finally:
        for p in weights:
            p.data = p.data.to(trainer.config.device, copy=True)
