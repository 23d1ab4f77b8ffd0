"""How the tiny base model was made: a very small Stable Diffusion, trained from scratch on circles.

    python -m toy.pretrain     write models/tiny_sd.safetensors (make pretrain); stages and pictures go to runs/pretrain

Training has the stages of Stable Diffusion's. First the VAE learns to encode images as latents and to decode them. Then
text encoder and UNet learn together to denoise latents from prompts: any circle in any named colour, anywhere. Last,
the VAE's decoder alone is fine-tuned at full size on what the UNet makes of noisy latents, such as a sampler delivers,
while the encoder, and with it the meaning of the latents, stays. The model cannot know *where* the circle goes: a
ControlNet can teach it.

Each stage saves its weights in the work folder and is skipped if they are there already, so an interrupted run goes on
with the stage that it was in.
"""

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
import sampler
from config import default_device, device, number
from ldm import TINY, ControlLDM
from lowvram.muon import Muon
from toy import circles
from training.console import run_program
from training.records import save_grid, to_uint8
from vae import AutoencoderKL, sample_posterior
from weights import load_state_dict
from weights.spelling import TEXT, UNET, VAE
from weights.writing import save_safetensors

SIZE = TINY.resolution
HELD_OUT = circles.held_out(32, seed=77)


def to_images(drawn: Iterable[np.ndarray]) -> Tensor:
    """Stack B pictures (H,W,3) uint8 as images (B,3,H,W) in [-1,1]."""
    return torch.stack([data.to_tensor(picture.astype(np.float32) / 127.5 - 1) for picture in drawn])


def targets(seed: int, start: int, count: int) -> Tensor:
    """Targets of circles start, start + 1, ... of a seed: (count,3,SIZE,SIZE) in [-1,1]."""
    return to_images(circles.random_circle(seed, i).draw(SIZE)[1] for i in range(start, start + count))


@dataclass(frozen=True)
class Stage:
    """One stage of training: the loss of a step, the parameters that move, and a report in words now and then."""

    name: str
    parameters: list[nn.Parameter]
    loss: Callable[[int], Tensor]  # step -> loss
    report: Callable[[int], str]  # called with the number of finished steps
    after_step: Callable[[], None] = lambda: None
    muon: dict[str, nn.Parameter] = field(default_factory=dict)  # parameters that Muon moves, and not AdamW

    def optimizers(self, learning_rate: float, muon_rate: float) -> list[torch.optim.Optimizer]:
        """AdamW for the parameters that are not in `muon`, and Muon for those."""
        others = [p for p in self.parameters if all(p is not other for other in self.muon.values())]
        adamw = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        return [adamw, Muon(self.muon, learning_rate, muon_rate, weight_decay=0.0)] if self.muon else [adamw]

    def train(
        self, steps: int, learning_rate: float, warmup: int = 100, report_every: int = 1000, muon_rate: float = 0.0
    ) -> None:
        """Run `steps` steps with `warmup` steps of rising learning rate and a cosine down to a hundredth."""
        optimizers = self.optimizers(learning_rate, muon_rate)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        highest = [group["lr"] for group in groups]
        mean = None
        with tqdm(total=steps, desc=self.name, unit="step") as bar:
            for step in range(steps):
                cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
                for group, rate in zip(groups, highest, strict=True):
                    group["lr"] = rate * min(1, (step + 1) / warmup) * (0.01 + 0.99 * cosine)
                for p in self.parameters:
                    p.grad = None
                loss = self.loss(step)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
                for optimizer in optimizers:
                    optimizer.step()
                self.after_step()
                mean = loss.detach() if mean is None else mean.lerp(loss.detach(), 0.02)
                if step % 10 == 0:  # reading the number waits for a GPU
                    bar.set_postfix_str(f"loss {mean.item():.4f}")
                bar.update()
                if (step + 1) % report_every == 0 or step + 1 == steps:
                    with torch.no_grad():
                        tqdm.write(f"{self.name}, step {step + 1}: loss {mean.item():.4f}, {self.report(step + 1)}")


# ----------------------------------------------------------------------------------------------------------- the VAE
def initialize_vae(vae: AutoencoderKL) -> None:
    """Set weights with which convolutions keep the scale of their input, residual branches are weak (a factor of 0.3),
    and posteriors are narrow.

    PyTorch's own initialization shrinks activations by a factor of 3 a layer; from there the normalization layers take
    thousands of steps to learn what a flat colour is.
    """
    for name, p in vae.named_parameters():
        if p.ndim == 4:
            nn.init.kaiming_normal_(p, nonlinearity="linear")
            if name.endswith(("conv2.weight", "attn_1.proj_out.weight")):
                p.data *= 0.3
    z = vae.config.z_channels
    vae.quant_conv.weight.data[z:] *= 0.1
    vae.quant_conv.bias.data[z:] = -6.0  # log-variance


def round_trip_report(vae: AutoencoderKL, out: Path, name: str) -> Callable[[int], str]:
    """A report on encoding and decoding held-out circles: their IoU, their error, and the picture `out`/NAME.png."""
    drawn = [circle.draw(SIZE)[1] for circle in HELD_OUT]
    images, captions = to_images(drawn).to(vae.quant_conv.weight.device), [circle.prompt for circle in HELD_OUT[:6]]

    def report(step: int) -> str:
        decoded = torch.cat([vae.decode(vae.moments(few).chunk(2, 1)[0]) for few in images.split(8)])
        pictures = to_uint8(decoded)
        verdicts = [circles.measure(picture, circle) for picture, circle in zip(pictures, HELD_OUT, strict=True)]
        save_grid(out / f"{name}.png", {"target": drawn[:6], "round trip": pictures[:6]}, captions)
        iou = np.mean([v.iou for v in verdicts])
        right = np.mean([v.color_right and v.background_right for v in verdicts])
        error = F.mse_loss(decoded, images).item()
        return f"round trip: IoU {iou:.4f}, {10 * math.log10(4 / error):.1f} dB, both colours right in {right:.0%}"

    return report


def train_vae(vae: AutoencoderKL, out: Path, steps: int) -> None:
    """Train encoder and decoder together, on crops of half the side: four times as many steps in the same time."""
    initialize_vae(vae)
    batch_size, side, device = 8, SIZE // 2, vae.quant_conv.weight.device

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([1, step])
        images = targets(1, step * batch_size, batch_size).to(device)
        corners = rng.integers(0, SIZE - side + 1, (batch_size, 2))
        x = torch.stack([im[:, y : y + side, x : x + side] for im, (y, x) in zip(images, corners, strict=True)])
        mean, log_var = vae.moments(x).chunk(2, 1)
        z = sample_posterior(torch.cat([mean, log_var], 1), torch.randn_like(mean))
        decoded = vae.decode(z)
        kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).mean()
        return F.l1_loss(decoded, x) + F.mse_loss(decoded, x) + 1e-4 * kl

    Stage("VAE", list(vae.parameters()), loss, round_trip_report(vae, out, "vae")).train(steps, 1e-3)


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, images: int = 256) -> None:
    """Fold a shift and a scale into the two 1x1 convolutions before and after the latents, so that each channel of the
    latents has mean 0 and variance 1 and the model's scale factor is 1. Measured on `images` circles."""
    z = vae.config.z_channels
    device = vae.quant_conv.weight.device
    means = torch.cat([vae.moments(targets(2, i, 32).to(device))[:, :z] for i in range(0, images, 32)])
    mu, scale = means.mean((0, 2, 3)), 1 / means.std((0, 2, 3))
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:z] *= scale.view(-1, 1, 1, 1)
    before.bias[:z] = (before.bias[:z] - mu) * scale
    before.bias[z:] += 2 * scale.log()
    after.bias += after.weight[:, :, 0, 0] @ mu
    after.weight /= scale.view(1, -1, 1, 1)


# ----------------------------------------------------------------------------------------------- text encoder and UNet
def spread_evenly(count: int, device: torch.device) -> Tensor:
    """`count` random numbers in [0,1), one in each of as many equal parts of it."""
    return (torch.arange(count, device=device) + torch.rand(count, device=device)) / count


def train_base(
    model: ControlLDM, out: Path, steps: int, bias: float, muon_rate: float, batch_size: int, items: int
) -> None:
    """Train text encoder and UNet together on the latents of `items` circles; a tenth of the prompts is left empty, for
    classifier-free guidance. The result is the moving average of the weights.

    Muon moves the UNet's weights at `muon_rate`, and AdamW the text encoder's. Timesteps are 1000 u^bias: a bias below
    1 prefers high noise, where the base decides how many circles there are, and where.

    The model predicts the velocity, as SD 2.1 at 768 px does, and its schedule ends in more noise than Stable
    Diffusion's: a flat circle shows through a lot of noise, so whatever the prompt (and later the hint) decides is
    decided at the first sampling steps, where a loss on eps has next to no weight.
    """
    drop_prompt, decay, device = 0.1, 0.998, model.device
    embeddings = model.text.text_model.embeddings
    nn.init.normal_(embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(embeddings.position_embedding.weight, std=0.02)
    model.vae.requires_grad_(False)
    moments = []
    with torch.no_grad():
        for start in tqdm(range(0, items, 32), desc="encoding circles", unit="batch"):
            moments.append(model.vae.moments(targets(4, start, 32).to(device)))
    moments = torch.cat(moments)
    ids = model.tokenizer([circles.random_circle(4, i).prompt for i in range(items)]).to(device)
    empty, alphas = model.tokenizer("")[0].to(device), sampler.alphas_cumprod(TINY).to(device)
    trainable = nn.ModuleList([model.unet, model.text])
    ema = {k: v.clone() for k, v in trainable.state_dict().items()}

    def loss(step: int) -> Tensor:
        chosen = torch.randint(items, (batch_size,), device=device)
        x0 = model.sample_latents(moments[chosen], torch.randn_like(moments[chosen][:, :4]))
        tokens = torch.where(torch.rand(batch_size, 1, device=device) < drop_prompt, empty, ids[chosen])
        noise, t = torch.randn_like(x0), (TINY.timesteps * spread_evenly(batch_size, device) ** bias).long()
        v = model.unet(sampler.q_sample(x0, noise, alphas[t]), t, model.text(tokens))
        return F.mse_loss(v, sampler.velocity(x0, noise, alphas[t]))

    def update_ema() -> None:
        torch._foreach_lerp_(list(ema.values()), list(trainable.state_dict().values()), 1 - decay)

    def report(step: int) -> str:
        current = {k: v.clone() for k, v in trainable.state_dict().items()}
        trainable.load_state_dict(ema)
        shown = HELD_OUT[:16]
        pictures = circles.draw_all(model, shown, False, SIZE, 20)
        save_grid(out / f"base-{step:05d}.png", {str(i): pictures[i::4] for i in range(4)})
        trainable.load_state_dict(current)
        verdicts = [circles.measure(picture, circle) for picture, circle in zip(pictures, shown, strict=True)]
        return f"both colours right in {np.mean([v.color_right and v.background_right for v in verdicts]):.0%}"

    stage = Stage("base", list(trainable.parameters()), loss, report, update_ema, dict(model.unet.named_parameters()))
    stage.train(steps, 1e-3, muon_rate=muon_rate)
    trainable.load_state_dict(ema)
    seen = torch.zeros(len(embeddings.token_embedding.weight), dtype=torch.bool, device=device)
    seen[ids.unique()] = True
    embeddings.token_embedding.weight.data[~seen] = 0  # tokens that no circle's prompt has mean nothing


def finetune_decoder(model: ControlLDM, out: Path, steps: int, noisiest: int = 500) -> None:
    """Train the VAE's decoder alone, at full size, on latents such as a sampler delivers: what the UNet takes noisy
    latents of a circle for, at timesteps below `noisiest`. So the decoder learns to make its blurred edges sharp."""
    vae, batch_size, device = model.vae, 4, model.device
    alphas = sampler.alphas_cumprod(TINY).to(device)
    model.requires_grad_(False)
    trainable = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    for p in trainable:
        p.requires_grad_(True)

    def loss(step: int) -> Tensor:
        first = step * batch_size
        x = targets(3, first, batch_size).to(device)
        with torch.no_grad():
            x0, _ = vae.moments(x).chunk(2, 1)
            prompts = [circles.random_circle(3, i).prompt for i in range(first, first + batch_size)]
            context, noise = model.text(model.tokenizer(prompts).to(device)), torch.randn_like(x0)
            t = (noisiest * spread_evenly(batch_size, device)).long()
            x_t, alpha = sampler.q_sample(x0, noise, alphas[t]), alphas[t].view(-1, 1, 1, 1)
            latents = alpha.sqrt() * x_t - (1 - alpha).sqrt() * model.unet(x_t, t, context)
        decoded = vae.decode(latents + 0.02 * torch.randn_like(latents))
        return F.l1_loss(decoded, x) + F.mse_loss(decoded, x)

    Stage("decoder", trainable, loss, round_trip_report(vae, out, "decoder")).train(steps, 5e-4)
    model.requires_grad_(True)


# --------------------------------------------------------------------------------------------------------------- main
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m toy.pretrain", description="Train the tiny base model from scratch on circles.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--out", default="models/tiny_sd.safetensors", help="file of the finished model")
    add("--work", default="runs/pretrain", help="folder for the weights and pictures of the stages")
    add("--vae-steps", type=number(int, 1, 1e9), default=6000, help="training steps of the VAE")
    add("--base-steps", type=number(int, 1, 1e9), default=2400, help="training steps of text encoder and UNet")
    add("--base-bias", type=number(float, 1e-6), default=0.75,
        help="bias of their timesteps 1000 u^bias; below 1 prefers high noise")  # fmt: skip
    add("--muon-rate", type=number(float, 1e-9), default=0.01, help="learning rate of Muon, which moves the UNet")
    add("--batch-size", type=number(int, 1), default=256, help="latents of one of their steps")
    add("--items", type=number(int, 1), default=65536, help="circles that they see")
    add("--decoder-steps", type=number(int, 1, 1e9), default=2000, help="fine-tuning steps of the VAE's decoder")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of weights and noise")
    add("--device", type=device, default=default_device(), help="device that computes")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    model = ControlLDM(TINY, hint_channels=None).to(args.device)

    def run_stage(name: str, prefixes: tuple[str, ...], train: Callable[[], None]) -> None:
        file = work / f"{name}.safetensors"
        if file.exists():
            model.load_state_dict(load_state_dict(file), strict=False)
            print(f"{name}: was finished before ({file})")
            return
        torch.manual_seed(data.derive_seed(name, args.seed))  # so that an interruption does not change the noise
        train()
        save_safetensors(file, {k: v for k, v in model.state_dict().items() if k.startswith(prefixes)})

    def train_and_normalize_vae() -> None:
        train_vae(model.vae, work, args.vae_steps)
        normalize_latents(model.vae)

    run_stage("vae", (VAE,), train_and_normalize_vae)
    base = (args.base_steps, args.base_bias, args.muon_rate, args.batch_size, args.items)
    run_stage("base", (UNET, TEXT), lambda: train_base(model, work, *base))
    run_stage("decoder", (VAE,), lambda: finetune_decoder(model, work, args.decoder_steps))
    weights = {k: v.half() for k, v in model.state_dict().items()}
    save_safetensors(args.out, weights, {"config": TINY.to_json(), "license": "MIT"})
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_program("toy.pretrain", main)
