"""What would a step hold and compute? A step on fake tensors, which have shapes and no content.

The trainer that would train is built as `train.py` builds it. It makes a forward pass, a backward pass and an update,
while `lowvram/tracking.py` counts the bytes that are alive and notes the operations, from which `lowvram/speed.py`
reckons the speed. Neither a GPU nor weights are needed. What CUDA allocates for itself is allowed for by a constant.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from config import PRESETS, Config, resolve
from ldm import PRECISIONS, ControlLDM, ModelConfig
from lowvram.muon import is_matrix, muon_flops
from lowvram.optimizer import AdamW
from lowvram.process import GIB
from lowvram.tracking import MemoryTracker, Peak, measure
from training.cache import PROMPTS_AT_ONCE, prepare_batch, text_shape
from training.graph import is_recorded
from training.setup import Trainer, build_trainer, ema_weights, resting_weights, zero_grad

WORKSPACE = 0.15 * GIB  # of cuBLAS and cuDNN, part of what PyTorch allocates; 0.01 to 0.13 GiB were seen on an H200

BESIDE_GRAPH = "beside the CUDA graph"  # this kind of memory


def fake_batch(config: Config, model_config: ModelConfig, size: tuple[int, int]) -> dict[str, Tensor]:
    """A micro-batch as the loader would give it, uninitialised, of images of `size` (width, height)."""
    b, (w, h), z = config.batch_size, size, model_config.vae.z_channels
    latent_h, latent_w = h // model_config.vae_factor, w // model_config.vae_factor
    batch = {
        "hint": torch.empty(b, config.hint_channels, h, w),
        "timesteps": torch.zeros(b, dtype=torch.int64),
        "noise": torch.empty(b, z, latent_h, latent_w),
        "posterior_noise": torch.empty(b, z, latent_h, latent_w),
        "context": torch.empty(b, *text_shape(model_config)),
        "sizes": torch.empty(b, 6),
    }
    if config.cache:
        return batch | {"moments": torch.empty(b, 2 * z, latent_h, latent_w)}
    return batch | {"target": torch.empty(b, 3, h, w)}


def backward(trainer: Trainer, batch: dict[str, Tensor], last: bool = True) -> None:
    """The forward and backward pass of a micro-batch, the `last` of its step, as far as memory and arithmetic go."""
    config, model = trainer.config, trainer.model
    batch = prepare_batch(model, batch, config.device, config.encode_batch_size)
    eps = model.predict(batch["latents"], batch["timesteps"], batch["context"], batch["hint"], batch.get("y"))
    loss = F.mse_loss(eps.float(), batch["noise"])
    with trainer.home.offload_grads(last):
        trainer.scaler.scale(loss.to(trainer.home.device)).backward()


def predict(config: Config, model_config: ModelConfig, size: tuple[int, int]) -> dict[str, Peak]:
    """The most GPU memory that a run holds: "training", "drawing" and, with a cache, "caching" -> peak.

    config: with a preset filled in (`resolve`). size: (width, height) of the images.
    """
    records_graph = is_recorded(config)
    fake = lambda name: {"tf32": "fp32", "fp16": "bf16"}.get(name, name)  # of the same size, and known to every CPU
    precision, trained_weights = fake(config.precision), fake(config.trained_weights)
    config = dataclasses.replace(
        config, device="cpu", precision=precision, trained_weights=trained_weights, compile=False
    )
    with FakeTensorMode():
        model = ControlLDM(model_config, config.hint_channels).requires_grad_(False)
        encoders = [*model.vae.parameters(), *model.text.parameters()]
        for p in encoders:
            p.data = p.data.to(PRECISIONS[precision])
        trainer = build_trainer(config, model)
        init_state(trainer.optimizer)
        weights = lambda: weights_by_kind(trainer)
        state = {} if config.optimizer_on_cpu else optimizer_memory(trainer)
        make_batch = lambda: fake_batch(config, model_config, size)
        for _ in range(2 if config.stream else 0):  # after two passes the streamer knows which block comes next
            backward(trainer, make_batch())
            zero_grad(trainer)
        always = {} if config.cache else {"VAE and text encoder": encoders}
        step = lambda tracker: fake_step(trainer, make_batch, tracker)
        peaks = {"training": measure(step, weights() | always | state)}
        if records_graph:
            beside = beside_graph(trainer, make_batch)
            peaks["training"].total += beside
            peaks["training"].parts[BESIDE_GRAPH] = beside
        if config.cache:
            images = torch.empty(config.encode_batch_size, 3, size[1], size[0], dtype=PRECISIONS[precision])
            peaks["caching"] = max(
                peak_without_grad(lambda: read_prompts(model), {"VAE and text encoder": encoders}),
                peak_without_grad(lambda: model.vae.moments(images), {"VAE": list(model.vae.parameters())}),
                key=lambda peak: peak.total,
            )
        z = torch.empty(1, *make_batch()["noise"].shape[1:])

        def draw() -> Tensor:
            with ema_weights(trainer):
                return model.decode(z)

        decoder = [p for module in model.vae.decoding for p in module.parameters()]
        with resting_weights(trainer):
            peaks["drawing"] = peak_without_grad(draw, weights() | state | {"VAE": decoder})
    for peak in peaks.values():
        peak.total += int(WORKSPACE)
        peak.parts["CUDA's workspaces (allowed)"] = int(WORKSPACE)
    return peaks


def read_prompts(model: ControlLDM) -> None:
    """Encode as many prompts as are encoded at once for the cache."""
    for encoder in model.text_encoders:
        encoder.encode(torch.zeros(PROMPTS_AT_ONCE, 77, dtype=torch.int64))


def weights_by_kind(trainer: Trainer) -> dict[str, list[Tensor]]:
    """The weights of UNet and ControlNet, asked one by one whether they train: a block may have both kinds."""
    kinds = {}
    for name, module in (("ControlNet", trainer.model.control_model), ("UNet", trainer.model.unet)):
        parameters = list(module.parameters())
        kinds[f"trained {name}"] = [p for p in parameters if p.requires_grad]
        kinds[f"frozen {name}"] = [p for p in parameters if not p.requires_grad]
    return kinds


def optimizer_memory(trainer: Trainer) -> dict[str, list[Tensor]]:
    """What lies beside the weights for the sake of the optimizer's step."""
    states = trainer.optimizer.state.values()
    return {
        "moving average": list(trainer.ema.values()),
        "optimizer state": [v for state in states for v in state.values() if isinstance(v, Tensor)],
    }


def init_state(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make its state, as its first step does."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if isinstance(optimizer, AdamW):
        for p in parameters:
            optimizer.init_state(p)
    else:
        for p in parameters:
            p.grad = torch.empty_like(p)
        optimizer.step()
        optimizer.zero_grad()


def fake_step(trainer: Trainer, make_batch: Callable[[], dict[str, Tensor]], tracker: MemoryTracker) -> None:
    """A step of training as far as memory is concerned."""
    for p in trainer.trainable.values():
        p.register_post_accumulate_grad_hook(lambda p: tracker.label(p.grad, "gradients"))
    micro_batches = min(2, trainer.config.accumulate_grad_batches)  # the second finds the gradients of the first
    tracker.times = trainer.config.accumulate_grad_batches / micro_batches
    for i in range(micro_batches):
        backward(trainer, make_batch(), last=i + 1 == micro_batches)
    trainer.home.wait_for_grads()
    update_largest(trainer.optimizer, tracker)
    trainer.home.upload_weights()
    zero_grad(trainer)


def beside_graph(trainer: Trainer, make_batch: Callable[[], dict[str, Tensor]]) -> int:
    """The bytes that are needed while the memory of activations and gradients belongs to a CUDA graph: of its inputs,
    and for the optimizer's step or, if that is more, for the loss of validation samples."""
    config, model = trainer.config, trainer.model
    for p in trainer.trainable.values():
        p.grad = torch.empty_like(p, dtype=p.grad_dtype)
    known = {"weights": [*model.parameters(), *(p.grad for p in trainer.trainable.values())]}
    known |= optimizer_memory(trainer)
    update = measure(lambda tracker: update_largest(trainer.optimizer, tracker), known)
    zero_grad(trainer)
    batch = prepare_batch(model, make_batch(), config.device, config.encode_batch_size)
    inputs = [batch[name] for name in ("latents", "timesteps", "context", "hint")]
    predicted = peak_without_grad(lambda: model.predict(*inputs, batch.get("y")), known | {"inputs": batch.values()})
    needed = max(peak.parts["activations"] for peak in (update, predicted))
    return needed + sum(t.nbytes for t in batch.values())


@torch.no_grad()
def update_largest(optimizer: torch.optim.Optimizer, tracker: MemoryTracker) -> None:
    """The optimizer's step as far as memory is concerned: our optimizers move as much at once as the largest parameter
    of a group, or a few MB, so the largest one will do. `tracker` is told for how many it stands."""
    tracker.times = 1.0
    if not isinstance(optimizer, AdamW):
        return optimizer.step()
    for group in optimizer.param_groups:
        if not group["params"]:
            continue
        largest = max(group["params"], key=lambda p: p.numel())
        tracker.times = share_of_largest(group, largest)
        optimizer.update([largest], group["lr"], group["weight_decay"], group["betas"], group["eps"])


def share_of_largest(group: dict[str, Any], largest: Tensor) -> float:
    """How many times as much as for the `largest` of its parameters an optimizer computes for a whole group: by the
    products with which Muon makes matrices orthogonal, otherwise by what is read and written."""
    if "rate_factor" in group and is_matrix(largest):  # fake tensors iterate in float32, a GPU in bfloat16
        return muon_flops(p.shape for p in group["params"]) / muon_flops([largest.shape], torch.float32)
    return sum(p.numel() for p in group["params"]) / largest.numel()


def peak_without_grad(function: Callable[[], Tensor], known: Mapping[str, Iterable[Tensor]]) -> Peak:
    """The peak memory of `function` beside the tensors `known`, without a backward pass."""
    with torch.no_grad():
        return measure(lambda tracker: function(), known)


def largest_peak(peaks: Mapping[str, Peak]) -> int:
    """The most bytes that any part of a run takes."""
    return max(peak.total for peak in peaks.values())


def flops(config: Config, model_config: ModelConfig, size: tuple[int, int]) -> int:
    """Floating-point operations of one image's part of a step: what the mathematics needs, with nothing computed twice,
    without VAE and text encoder."""
    plain = dict(batch_size=1, device="cpu", cache=True, compile=False, memory="exact", accumulate_grad_batches=1)
    config = resolve(dataclasses.replace(config, **plain, **dict.fromkeys(PRESETS["exact"])), "exact")
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        trainer = build_trainer(config, ControlLDM(model_config, config.hint_channels).requires_grad_(False))
        with FlopCounterMode(display=False) as counter:
            backward(trainer, fake_batch(config, model_config, size))
    return counter.get_total_flops()
