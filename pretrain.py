"""Where the tiny base model comes from: Stable Diffusion, very small, trained from scratch on circles.

    python pretrain.py        makes models/tiny_sd.safetensors (make pretrain); pictures and parts in runs/pretrain

It goes the way Stable Diffusion went. First the VAE learns to fold images into latents and back. Then text tower and
UNet learn together, from prompts, to denoise latents: any circle in any named colour, anywhere. Last the decoder alone
is polished at full size on slightly noisy latents, as a sampler delivers them, while the encoder, and with it the
meaning of the latents, stays. What the model lacks is what a ControlNet can teach it: *where* the circle goes.

Each stage leaves its weights in the work folder, and is skipped when they are there: an interrupted run goes on with
the stage that it was in.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import circles
import data
import log
import sampler
from controlnet import TEXT, TINY, UNET, VAE, ControlLDM
from vae import AutoencoderKL, sample_posterior

SIZE = TINY.resolution
EVAL = circles.held_out(32, seed=77)


def targets(seed: int, start: int, count: int) -> Tensor:
    """Targets of circles start, start + 1, ... of a seed: (count,3,SIZE,SIZE) in [-1,1]."""
    drawn = (circles.random_circle(seed, i).draw(SIZE)[1] for i in range(start, start + count))
    return torch.stack([data.to_tensor(image.astype(np.float32) / 127.5 - 1) for image in drawn])


def optimize(
    parameters: Iterator[nn.Parameter],
    loss: Callable[[int], Tensor],
    steps: int,
    rate: float,
    name: str,
    every: int,
    look: Callable[[int], str],
    warmup: int = 100,
    after: Callable[[], None] = lambda: None,
) -> None:
    """The loop of every stage: AdamW on `loss(step)` with warm-up and cosine; `look` reports now and then."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    mean = None
    with tqdm(total=steps, desc=name, unit="step") as bar:
        for step in range(steps):
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (step + 1) / warmup) * (0.01 + 0.99 * cosine)
            value = loss(step)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            after()
            mean = value.item() if mean is None else 0.98 * mean + 0.02 * value.item()
            bar.set_postfix_str(f"loss {mean:.4f}")
            bar.update()
            if (step + 1) % every == 0 or step + 1 == steps:
                with torch.no_grad():
                    tqdm.write(f"{name}, step {step + 1}: loss {mean:.4f}, {look(step + 1)}")


# ----------------------------------------------------------------------------------------------------------- the VAE
def initialize_vae(vae: AutoencoderKL) -> None:
    """Convolutions that keep the scale of what they pass on, residual branches at 0.3, and quiet posteriors.

    torch's default shrinks activations by a factor of 3 a layer; from there the norms take thousands of steps to learn
    what a flat colour is.
    """
    for name, p in vae.named_parameters():
        if p.ndim == 4:
            nn.init.kaiming_normal_(p, nonlinearity="linear")
            if name.endswith(("conv2.weight", "attn_1.proj_out.weight")):
                p.data *= 0.3
    z = vae.config.z_channels
    vae.quant_conv.weight.data[z:] *= 0.1
    vae.quant_conv.bias.data[z:] = -6.0  # log-variance


def look_vae(vae: AutoencoderKL, out: Path, name: str) -> Callable[[int], str]:
    """Round trips of held-out circles: their IoU, their error, and a picture."""
    images = [circle.draw(SIZE)[1] for circle in EVAL]
    batch = torch.stack([data.to_tensor(im.astype(np.float32) / 127.5 - 1) for im in images])

    def look(step: int) -> str:
        trip = torch.cat([vae.decode(vae.moments(part).chunk(2, 1)[0]) for part in batch.split(8)])
        back = log.to_uint8(trip)
        verdicts = [circles.measure(im, circle) for im, circle in zip(back, EVAL, strict=True)]
        log.save_grid(out / f"{name}.png", {"target": images[:6], "round trip": back[:6]}, [c.prompt for c in EVAL[:6]])
        iou = np.mean([v.iou for v in verdicts])
        right = np.mean([v.color_right and v.background_right for v in verdicts])
        error = F.mse_loss(trip, batch).item()
        return f"round trip: IoU {iou:.4f}, {10 * math.log10(4 / error):.1f} dB, colours right {right:.0%}"

    return look


def train_vae(vae: AutoencoderKL, out: Path, steps: int) -> None:
    """Encoder and decoder together, on crops of half the side: four times as many steps in the same time."""
    initialize_vae(vae)
    batch, side = 8, SIZE // 2

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([1, step])
        images = targets(1, step * batch, batch)
        corners = rng.integers(0, SIZE - side + 1, (batch, 2))
        x = torch.stack([im[:, y : y + side, x : x + side] for im, (y, x) in zip(images, corners, strict=True)])
        mean, log_var = vae.moments(x).chunk(2, 1)
        z = sample_posterior(torch.cat([mean, log_var], 1), torch.randn_like(mean))
        y = vae.decode(z)
        kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).mean()
        return F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-4 * kl

    optimize(vae.parameters(), loss, steps, 1e-3, "VAE", 500, look_vae(vae, out, "vae"))


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, images: int = 256) -> None:
    """Fold a shift and a scale into the two 1x1 convolutions around the latents, so that each of their channels has
    mean 0 and variance 1 and the scale factor is 1."""
    z = vae.config.z_channels
    means = torch.cat([vae.moments(targets(2, i, 32))[:, :z] for i in range(0, images, 32)])
    mu, scale = means.mean((0, 2, 3)), 1 / means.std((0, 2, 3))
    q, p = vae.quant_conv, vae.post_quant_conv
    q.weight[:z] *= scale.view(-1, 1, 1, 1)
    q.bias[:z] = (q.bias[:z] - mu) * scale
    q.bias[z:] += 2 * scale.log()
    p.bias += p.weight[:, :, 0, 0] @ mu
    p.weight /= scale.view(1, -1, 1, 1)


def polish_decoder(vae: AutoencoderKL, out: Path, steps: int) -> None:
    """The decoder alone, at full size, on latents with a little noise."""
    vae.requires_grad_(False)
    trained = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    for p in trained:
        p.requires_grad_(True)
    batch = 4

    def loss(step: int) -> Tensor:
        x = targets(3, step * batch, batch)
        with torch.no_grad():
            mean, _ = vae.moments(x).chunk(2, 1)
        y = vae.decode(mean + 0.05 * torch.randn_like(mean))
        return F.l1_loss(y, x) + F.mse_loss(y, x)

    optimize(iter(trained), loss, steps, 5e-4, "decoder", 500, look_vae(vae, out, "decoder"))
    vae.requires_grad_(True)


# -------------------------------------------------------------------------------------------------- text tower and UNet
def train_base(model: ControlLDM, out: Path, steps: int, cycle: int, bias: float, items: int = 8192) -> None:
    """Text tower and UNet together, on the latents of `items` circles; a tenth of the prompts is dropped, for guidance.

    Cycle 0 begins with new weights; each later one goes on from the last one's average with circles of its own and the
    learning rate up again (warm restarts: Loshchilov & Hutter 2017, arXiv:1608.03983). Timesteps are 1000 u^bias: a
    bias below 1 dwells on high noise, where the base decides how many circles there are, and where.

    The model says the velocity, as SD 2.1 at 768 px does, and its schedule ends in more noise than Stable Diffusion's:
    a flat circle shows through a lot of noise, so what the prompt (and later the hint) decides is decided at the very
    beginning, where a loss on eps has next to no weight. The result is the moving average of the weights.
    """
    batch, dropped, decay = 32, 0.1, 0.998
    if cycle == 0:
        nn.init.normal_(model.text.text_model.embeddings.token_embedding.weight, std=0.02)
        nn.init.normal_(model.text.text_model.embeddings.position_embedding.weight, std=0.02)
    model.vae.requires_grad_(False)
    moments = []
    with torch.no_grad():
        for start in tqdm(range(0, items, batch), desc="encoding circles", unit="batch"):
            moments.append(model.vae.moments(targets(4 + cycle, start, batch)))
    moments = torch.cat(moments)
    prompts = [circles.random_circle(4 + cycle, i).prompt for i in range(items)]
    ids, empty = model.tokenizer(prompts), model.tokenizer("")[0]
    alphas = sampler.alphas_cumprod(TINY)
    modules = nn.ModuleList([model.unet, model.text])
    average = {k: v.clone() for k, v in modules.state_dict().items()}

    def loss(step: int) -> Tensor:
        chosen = torch.randint(items, (batch,))
        x0 = model.latents(moments[chosen], torch.randn(batch, 4, *moments.shape[2:]))
        tokens = torch.where(torch.rand(batch, 1) < dropped, empty, ids[chosen])
        noise, t = torch.randn_like(x0), (TINY.timesteps * torch.rand(batch) ** bias).long()
        v = model.unet(sampler.q_sample(x0, noise, alphas[t]), t, model.text(tokens))
        return F.mse_loss(v, sampler.velocity(x0, noise, alphas[t]))

    def track() -> None:
        for k, v in modules.state_dict().items():
            average[k].lerp_(v, 1 - decay)

    def look(step: int) -> str:
        current = {k: v.clone() for k, v in modules.state_dict().items()}
        modules.load_state_dict(average)
        shown = EVAL[:16]
        context = model.encode_prompts([c.prompt for c in shown])
        negative = model.encode_prompts([""]).expand_as(context)
        drawn = log.to_uint8(model.decode(sampler.sample(model, context, negative, None, (SIZE, SIZE), 20)))
        log.save_grid(out / f"base-{cycle}-{step:05d}.png", {str(i): drawn[i::4] for i in range(4)})
        modules.load_state_dict(current)
        verdicts = [circles.measure(im, circle) for im, circle in zip(drawn, shown, strict=True)]
        return f"colours right {np.mean([v.color_right and v.background_right for v in verdicts]):.0%}"

    optimize(modules.parameters(), loss, steps, 1e-3, "base", 500, look, after=track)
    modules.load_state_dict(average)
    # words that no circle taught mean nothing
    seen = torch.zeros(len(model.text.text_model.embeddings.token_embedding.weight), dtype=torch.bool)
    seen[ids.unique()] = True
    model.text.text_model.embeddings.token_embedding.weight.data[~seen] = 0


# --------------------------------------------------------------------------------------------------------------- main
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", default="models/tiny_sd.safetensors", help="the finished model")
    parser.add_argument("--work", default="runs/pretrain", help="folder for the stages' weights and pictures")
    parser.add_argument("--vae-steps", type=int, default=6000, help="steps of the VAE")
    parser.add_argument(
        "--base-steps", type=int, nargs="+", default=[4000, 7000, 7000], help="of text tower and UNet, cycle by cycle"
    )
    parser.add_argument(
        "--base-bias", type=float, nargs="+", default=[1.0, 1.0, 0.75], help="of their timesteps, t = 1000 u^bias"
    )
    parser.add_argument("--decoder-steps", type=int, default=600, help="steps of the decoder's polish")
    parser.add_argument("--seed", type=int, default=0, help="of weights and noise")
    args = parser.parse_args(argv)
    if len(args.base_bias) != len(args.base_steps):
        parser.error(f"--base-steps has {len(args.base_steps)} cycles, --base-bias {len(args.base_bias)}")
    torch.manual_seed(args.seed)
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    model = ControlLDM(TINY, hint_channels=None)

    def stage(name: str, prefixes: tuple[str, ...], run: Callable[..., None], *settings: float) -> None:
        file = work / f"{name}.safetensors"
        if file.exists():
            model.load_state_dict(checkpoint.load_state_dict(file), strict=False)
            print(f"{name}: done before ({file})")
            return
        torch.manual_seed(data.mix(name, args.seed))  # each stage's noise is its own, also after an interruption
        run(*settings)
        checkpoint.save_safetensors(file, {k: v for k, v in model.state_dict().items() if k.startswith(prefixes)})

    def vae(steps: int) -> None:
        train_vae(model.vae, work, steps)
        normalize_latents(model.vae)

    stage("vae", (VAE,), vae, args.vae_steps)
    for cycle, settings in enumerate(zip(args.base_steps, args.base_bias, strict=True)):
        stage(f"base-{cycle}", (UNET, TEXT), partial(train_base, model, work), settings[0], cycle, settings[1])
    stage("decoder", (VAE,), partial(polish_decoder, model.vae, work), args.decoder_steps)
    weights = {k: v.half() for k, v in model.state_dict().items()}
    checkpoint.save_safetensors(args.out, weights, {"config": TINY.to_json(), "license": "MIT"})
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
