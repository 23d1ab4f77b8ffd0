"""Our models against numbers of the original implementations, on weights that are functions of their names.

The VAE runs in float64: what remains then is the rounding of the original's float32, below 4e-6, and not that of this
machine's convolutions, whose sum over the VAE's many layers can pass 1e-5.
"""

import gzip
import json

import pytest
import torch

import sampler
import train
from clip_text import CLIPTextModel, TextConfig, Tokenizer
from controlnet import ControlNet
from ldm import MODELS, SD15, ControlLDM, ModelConfig
from tests.conftest import GOLDEN, distance, golden
from tests.golden.fill import arr, fill
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig

CLOSE = 4e-6
V1 = UNetConfig(model_channels=32, num_heads=4, context_dim=40)
V2 = UNetConfig(model_channels=32, num_heads=None, num_head_channels=16, use_linear_in_transformer=True, context_dim=48)


def filled(module: torch.nn.Module, prefix: str, scale: float = 1.0) -> torch.nn.Module:
    module.load_state_dict({k: fill(prefix + k, v.shape, scale) for k, v in module.state_dict().items()})
    return module


def pair(config: UNetConfig, scale: float = 1.0) -> tuple[UNet, ControlNet]:
    unet = filled(UNet(config), "model.diffusion_model.", scale)
    return unet, filled(ControlNet(config), "control_model.", scale)


def inputs(tag: str, batch: int, h: int, w: int, dim: int) -> tuple[torch.Tensor, ...]:
    x, context = arr(tag + ".x", batch, 4, h, w), arr(tag + ".context", batch, 77, dim)
    return x, torch.sigmoid(arr(tag + ".hint", batch, 3, 8 * h, 8 * w)), context


CASES = {"unet_v1_small": (V1, 16, 24, [7, 801], 40), "unet_v2_small": (V2, 8, 16, [0, 999], 48)}


@pytest.mark.parametrize("tag", CASES)
@torch.no_grad()
def test_unet_and_control(tag):
    config, h, w, t, dim = CASES[tag]
    unet, control = pair(config)
    x, hint, context = inputs(tag, 2, h, w, dim)
    t, want = torch.tensor(t), golden(tag)
    residuals = control(x, hint, t, context)
    assert len(residuals) == 13
    assert distance(torch.stack([r.abs().mean() for r in residuals]), want["control_abs_mean"]) < CLOSE
    assert distance(residuals[-1], want["control_last"]) < CLOSE
    assert distance(unet(x, t, context), want["eps_uncontrolled"]) < CLOSE
    assert distance(unet(x, t, context, residuals), want["eps_controlled"]) < CLOSE
    assert distance(unet(x, t, context, [r * 0.5 for r in residuals]), want["eps_half"]) < CLOSE
    control.only_mid_control = True
    only = control(x, hint, t, context)
    assert len(only) == 1
    assert distance(unet(x, t, context, control=only), want["eps_only_mid"]) < CLOSE


@torch.no_grad()
def test_unet_epsilons():
    """Small activations make the norms' epsilons visible."""
    unet, control = pair(V1, scale=0.03)
    x, hint, context = inputs("unet_v1_lowvar", 1, 16, 8, 40)
    t, want = torch.tensor([321]), golden("unet_v1_lowvar")
    residuals = control(x, hint, t, context)
    assert distance(torch.stack([r.abs().mean() for r in residuals]), want["control_abs_mean"]) < CLOSE
    assert distance(unet(x, t, context, residuals), want["eps_controlled"]) < CLOSE


@pytest.mark.parametrize("tag", CASES)
def test_training_loss_and_gradients(tag):
    config, h, w, t, dim = CASES[tag]
    model = ControlLDM(ModelConfig("golden", config, VAEConfig(ch=32), TextConfig(64, 1, 4, 64)))
    model.model.diffusion_model, model.control_model = pair(config)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(("control_model.", "model.diffusion_model.out")))
    _, hint, context = inputs(tag, 2, h, w, dim)
    x0, noise = arr(tag + ".x0", 2, 4, h, w), arr(tag + ".noise", 2, 4, h, w)
    batch = dict(latents=x0, context=context, hint=hint, timesteps=torch.tensor(t), noise=noise)
    loss = train.diffusion_loss(model, batch).mean()
    loss.backward()
    want = golden(tag)
    assert distance(loss, want["train_loss"]) < CLOSE
    names = json.loads((GOLDEN / "control_param_names.json").read_text())
    control = dict(model.control_model.named_parameters())
    assert sorted(names) == sorted(control)
    assert distance(torch.stack([control[k].grad.norm() for k in names]), want["grad_norms"]) < 1e-4
    decoder = [p.grad.norm() for k, p in model.unet.named_parameters() if k.startswith(("output_blocks.", "out."))]
    assert distance(torch.stack(decoder), want["decoder_grad_norms"]) < 1e-4
    assert all(p.grad is None for k, p in model.unet.named_parameters() if not k.startswith("out"))


VAES = {"vae_small": (1.0, (2, 3, 64, 96), (2, 4, 8, 12)), "vae_lowvar": (0.03, (1, 3, 64, 64), (1, 4, 8, 8))}


@pytest.mark.parametrize("tag", VAES)
@torch.no_grad()
def test_vae(tag):
    scale, image, z = VAES[tag]
    vae, want = filled(AutoencoderKL(VAEConfig(ch=32)), "first_stage_model.", scale).double(), golden(tag)
    assert distance(vae.moments(torch.tanh(arr(tag + ".image", *image)).double()), want["moments"]) < CLOSE
    assert distance(vae.decode(arr(tag + ".z", *z).double()), want["decoded"]) < CLOSE
    vae.float()  # and in the precision of real use, with this machine's convolutions
    assert distance(vae.decode(arr(tag + ".z", *z)), want["decoded"]) < 3e-5


@torch.no_grad()
def test_clip_text():
    want, prefix = golden("clip_l_small"), "cond_stage_model.transformer."
    full = CLIPTextModel(TextConfig(64, 3, 4, 256))
    weights = {prefix + k: fill(prefix + k, v.shape) for k, v in full.state_dict().items()}
    for penultimate, name in ((False, "last_hidden_state"), (True, "penultimate")):
        model = CLIPTextModel(TextConfig(64, 3, 4, 256, penultimate=penultimate))
        model.load_state_dict(weights)
        assert distance(model(want["ids"])[:, ::7], want[name]) < CLOSE


@torch.no_grad()
def test_openclip_text():
    want, narrow = golden("openclip_small"), {1024: 64, 3072: 192, 4096: 256}
    weights = {}
    for key, shape in keys("sd21").items():
        if key.startswith("cond_stage_model.") and not ("resblocks." in key and int(key.split(".")[4]) >= 4):
            weights[key] = fill(key, tuple(narrow.get(n, n) for n in shape))
    model = CLIPTextModel(TextConfig(64, 4, 4, 256, "gelu", penultimate=True))
    model.load_state_dict(weights)
    assert distance(model(want["ids"])[:, ::7], want["penultimate"]) < CLOSE
    last = [k for k in weights if "resblocks.3." in k or "projection" in k or "logit" in k]
    assert last  # a file of 23 layers lacks these, and loads as well
    again = CLIPTextModel(TextConfig(64, 4, 4, 256, "gelu", penultimate=True))
    again.load_state_dict({k: v for k, v in weights.items() if k not in last})
    assert torch.equal(model(want["ids"]), again(want["ids"]))


def test_tokens():
    want = json.loads((GOLDEN / "tokens.json").read_text())
    assert Tokenizer()(list(want)).tolist() == list(want.values())
    zero = Tokenizer("zero")(list(want))
    for row, ids in zip(zero.tolist(), want.values(), strict=True):
        end = ids.index(49407)
        assert row == ids[: end + 1] + [0] * (76 - end)


def test_schedule():
    assert distance(sampler.alphas_cumprod(SD15), golden("schedule_sd")["alphas_cumprod"]) < 1e-6


@pytest.mark.parametrize(
    "tag,scale,strength,guess", [("ddim_small", 9, 1.0, False), ("ddim_guess_small", 4, 0.8, True)]
)
@torch.no_grad()
def test_ddim(tag, scale, strength, guess):
    model = ControlLDM(ModelConfig("golden", V1, VAEConfig(ch=32), TextConfig(64, 1, 4, 64)))
    model.model.diffusion_model, model.control_model = pair(V1)
    want = golden(tag)
    hint = torch.sigmoid(arr(tag + ".hint", 2, 3, 64, 64))
    context, uncond = arr(tag + ".context", 2, 77, 40), arr(tag + ".uncond", 2, 77, 40)
    controls = [sampler.Control(model.control_model, hint, strength)]
    eps = sampler.make_cfg_model(model, context, uncond, controls, scale, guess)
    result = sampler.ddim(eps, arr(tag + ".x_T", 2, 4, 8, 8), 10)
    name = next(k for k in want if want[k].shape == result.shape)
    assert distance(result, want[name]) < CLOSE
    assert sampler.ddim_timesteps(10).tolist() == want["timesteps"].tolist()


def keys(model: str) -> dict[str, list[int]]:
    return json.loads(gzip.decompress((GOLDEN / f"{model}_keys.json.gz").read_bytes()))


@pytest.mark.parametrize("name,control,unet", [("sd15", 361_279_120, 859_520_964), ("sd21", 364_228_240, 865_910_724)])
def test_full_size_keys(name, control, unet):
    """Key for key and shape for shape the published files (the text tower of SD 2.x is spelled in OpenCLIP's names)."""
    with torch.device("meta"):
        model = ControlLDM(MODELS[name])
    ours = {k: list(v.shape) for k, v in model.state_dict().items()}
    prefixes = ("model.", "control_model.", "first_stage_model.")
    prefixes += ("cond_stage_model.",) if name == "sd15" else ()
    theirs = {k: v for k, v in keys(name).items() if k.startswith(prefixes) and not k.endswith("position_ids")}
    assert {k: v for k, v in ours.items() if k.startswith(prefixes)} == theirs
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert (count(model.control_model), count(model.unet), count(model.vae)) == (control, unet, 83_653_863)
