"""One step of training: the loss, what trains, and what moves it.

A step draws latents, noises them to a random timestep, lets the ControlNet steer the locked UNet, and compares what the
UNet says with the noise. `diffusion_loss` is that sentence; `Engine.step` sums its gradient over micro-batches and
ranks and moves the weights; `assemble` makes an engine of a model and the settings. Follows Zhang et al. 2023
(arXiv:2302.05543).
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import frozen
import memory
import sampler
from config import Config
from controlnet import PRECISIONS, ControlLDM, computed_in
from parallel import Ranks
from unet import CrossAttention


# -------------------------------------------------------------------------------------------------------------- loss
def diffusion_loss(
    model: ControlLDM,
    latents: Tensor,
    context: Tensor,
    hint: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    only_mid_control: bool = False,
    min_snr_gamma: float = 0.0,
    huber: float = 0.0,
) -> Tensor:
    """Per-sample loss (B,), float32: the mean square of what the steered UNet gets wrong.

    latents (B,4,h,w), scaled; context (B,77,D); hint (B,C,8h,8w) in [0,1]; timesteps (B,) int64; noise (B,4,h,w). The
    target is the noise, or the velocity for v models. The locked encoder has no parameter that requires a gradient and
    so leaves no graph behind; of the locked decoder only what its activations' gradient needs is kept.
    `min_snr_gamma`: weigh timesteps as Hang et al. 2023 (arXiv:2303.09556), 0 not at all. `huber`: from this error on
    the loss grows linearly (twice Huber's, so that it begins as the square), 0 never.
    """
    alphas = sampler.alphas_cumprod(model.config, latents.device)[timesteps]
    x_t = sampler.q_sample(latents, noise, alphas)
    predicted = model.predict(x_t, timesteps, context, hint, only_mid_control).float()
    v = model.config.prediction == "v"
    target = sampler.velocity(latents, noise, alphas) if v else noise
    wrong = F.mse_loss(predicted, target.float(), reduction="none")
    if huber:
        wrong = 2 * F.huber_loss(predicted, target.float(), reduction="none", delta=huber)
    loss = wrong.flatten(1).mean(1)
    if min_snr_gamma:
        snr = alphas / (1 - alphas)
        loss = loss * snr.clamp(max=min_snr_gamma) / (snr + 1 if v else snr)
    return loss


def learning_rate(config: Config, step: int) -> float:
    """The rate of step `step` (from 0): rises over the warm-up; constant, or down to a fiftieth on a line or a cosine.

    A function of settings and step alone, so a resumed run has the rates of one that was not stopped.
    """
    rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))
    way = step / config.steps
    left = {"constant": 1.0, "linear": 1 - way, "cosine": 0.5 * (1 + math.cos(math.pi * way))}[config.lr_schedule]
    return rate * (0.02 + 0.98 * left)


# ------------------------------------------------------------------------------------------------------- what trains
def choose_trained(model: ControlLDM, config: Config) -> dict[str, torch.nn.Parameter]:
    """The parameters that train, by checkpoint name; they and only they require a gradient.

    The ControlNet, without its 12 outer zero convolutions under `only_mid_control`; with SD unlocked the UNet's
    decoder (`output_blocks`, `out`) too.
    """
    model.requires_grad_(False)
    trained = {}
    for name, p in model.named_parameters():
        control = name.startswith("control_model.")
        idle = config.only_mid_control and name.startswith("control_model.zero_convs.")
        decoder = name.startswith(("model.diffusion_model.output_blocks.", "model.diffusion_model.out."))
        if (control and not idle) or (decoder and not config.sd_locked):
            trained[name] = p.requires_grad_(True)
    return trained


# ---------------------------------------------------------------------------------------------------------- one step
@dataclass
class Engine:
    """What a step needs: the model, which of its parameters train, and what moves them."""

    config: Config
    model: ControlLDM
    trained: dict[str, torch.nn.Parameter]  # where the model computes
    masters: dict[str, torch.nn.Parameter]  # what the optimizer moves: the same, or their fp32 copies on the CPU
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ranks: Ranks
    loss: Callable[..., Tensor]  # `diffusion_loss`, as it is or compiled
    offload: memory.Offload | None = None
    average: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # of the masters over the steps
    steps: int = 0  # that were done

    def step(
        self, batches: Iterator[dict[str, Any]], rate: float, stop: Callable[[], bool] = lambda: False
    ) -> tuple[float, float] | None:
        """One step at learning rate `rate` on `accumulate_grad_batches` of `batches`: mean loss of the samples, norm of
        the gradient. With a loss or gradient that is not finite the weights stay. None, with no trace, if `stop()`."""
        total, count = torch.zeros((), device=self.config.device), self.config.accumulate_grad_batches
        for i in range(count):
            total += self.backward(next(batches), last=i == count - 1)
            if self.ranks.any(stop()):
                self.forget()
                return None
        self.ranks.add_up([*(p.grad for p in self.trained.values() if p.grad is not None), total])
        return total.item(), self.update(rate, total)

    def backward(self, batch: dict[str, Any], last: bool) -> Tensor:
        """Add a micro-batch's gradient to what is there; return its part of the step's loss. With the `last` one the
        gradients are whole and can travel (where ranks need not add them up first)."""
        config = self.config
        inputs = frozen.inputs(self.model, batch, config.device, config.encode_batch_size)
        losses = self.loss(self.model, *inputs, config.only_mid_control, config.min_snr_gamma, config.huber)
        loss = losses.sum() / config.batch
        travel = self.offload and last and self.ranks.count == 1
        with self.offload.arriving() if travel else contextlib.nullcontext():
            # gradients that are on the CPU want the scale there too
            self.scaler.scale(loss.cpu() if self.offload else loss).backward()
        return loss.detach()

    def update(self, rate: float, total: Tensor) -> float:
        """Move the weights along the gradient, unless it or the loss `total` is not finite; return its norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.offload:
            self.offload.arrive()
        self.scaler.unscale_(self.optimizer)
        norm = self.clip()
        if self.scaler.is_enabled() or math.isfinite(total.item() + norm):
            self.scaler.step(self.optimizer)  # an enabled scaler looks for infinities itself, and lowers its scale
        if math.isfinite(total.item() + norm):
            self.follow()
        self.scaler.update()
        if self.offload:
            self.offload.send()
        self.forget()
        self.steps += 1
        return norm

    def clip(self) -> float:
        """Shorten the gradient to `clip_grad_norm` if it is longer; return its norm as it was."""
        moved = [p for p in self.masters.values() if p.grad is not None]
        norm, most = torch.nn.utils.get_total_norm([p.grad for p in moved]), self.config.clip_grad_norm
        if most and not norm.item() <= most:
            torch.nn.utils.clip_grads_with_norm_(moved, most, norm)
        return norm.item()

    @torch.no_grad()
    def follow(self) -> None:
        """The moving average comes along: slowly, but not so slowly that it would remember the first weights."""
        decay = min(self.config.ema_decay, (1 + self.steps) / (10 + self.steps))
        for name, mean in self.average.items():
            mean.lerp_(self.masters[name].float(), 1 - decay)

    def forget(self) -> None:
        """Drop the gradients."""
        for p in (*self.trained.values(), *self.masters.values()):
            p.grad = None

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """While it is entered, the model computes with the moving average, if there is one."""
        kept = {name: self.trained[name].data for name in self.average}
        for name, mean in self.average.items():
            self.trained[name].data = mean.to(kept[name])
        try:
            yield
        finally:
            for name, weights in kept.items():
                self.trained[name].data = weights


def assemble(config: Config, model: ControlLDM, ranks: Ranks | None = None) -> Engine:
    """Make UNet and ControlNet of `model` ready to train on `config.device`, as `config` says. Frozen weights live in
    the precision that they are used in, trained ones in their own."""
    trained, dtype = choose_trained(model, config), PRECISIONS[config.precision]
    fake = memory.is_fake(next(model.parameters()))  # for the prediction of a GPU, which knows all of them
    compute = dtype if fake else computed_in(config.precision, config.device)
    unet, control = model.unet, model.control_model
    if config.channels_last:
        for p in model.parameters():
            p.data = p.data.contiguous(memory_format=torch.channels_last) if p.ndim == 4 else p.data
    offload = memory.Offload(trained) if config.optimizer_on_cpu else None
    for p in (*unet.parameters(), *control.parameters()):
        p.data = p.data.to(PRECISIONS[config.trained_weights] if p.requires_grad else dtype)
    if config.stream:
        blocks = (*unet.input_blocks, unet.middle_block, *unet.output_blocks)
        locked = (block for block in blocks if not next(block.parameters()).requires_grad)
        unet.fetch = memory.Stream(locked, config.device, compute)
    for part in (unet, control):
        part.compute, part.recompute = compute, config.gradient_checkpointing
        for p in part.parameters():
            if not memory.is_on_host(p):
                p.data = p.data.to(config.device)
        for module in part.modules():
            if isinstance(module, CrossAttention):
                module.slice = config.attention_slice
    masters = offload.masters if offload else trained
    if config.optimizer_bits != 32 and dtype != torch.float16 and not offload:
        for p in trained.values():  # the moments lose as much or more; with bf16 computed in, gradients lose nothing
            p.grad_dtype = torch.bfloat16
    if config.optimizer_bits != 32 or (config.trained_weights == "bf16" and not offload):
        optimizer = memory.AdamW(masters, config.learning_rate, config.weight_decay, config.optimizer_bits, config.seed)
    else:
        optimizer = torch.optim.AdamW(
            masters.values(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
    kind = "cpu" if offload else torch.device(config.device).type
    scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)
    loss = torch.compile(diffusion_loss, dynamic=False) if config.compile else diffusion_loss
    average = {k: p.detach().float().clone() for k, p in masters.items()} if config.ema_decay else {}
    return Engine(config, model, trained, masters, optimizer, scaler, ranks or Ranks(), loss, offload, average)
