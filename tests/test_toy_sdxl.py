"""The tiny model of SDXL's shape: it draws what the tiny base draws, and its new parts train."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import unet
from conditioning import whole_image
from config import TINY_BASE, Config, resolve
from controlnet import ControlNet
from ldm import TINY
from lowvram import estimate
from lowvram.offload import is_kept_on_cpu
from toy import circles, sdxl
from training import cache
from training.setup import build_trainer, resting_weights
from weights import ModelSource, load_model
from weights.writing import save_safetensors


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The extended base, written to a file and read again."""
    path = tmp_path_factory.mktemp("wide") / "base.safetensors"
    save_safetensors(path, sdxl.extend(load_model(TINY_BASE)).state_dict(), {"config": sdxl.TINY_SDXL.to_json()})
    return load_model(ModelSource(path, attach=True))


@torch.no_grad()
def test_the_extension_draws_what_the_tiny_base_draws(wide):
    tiny, prompts = load_model(TINY_BASE), ["navy circle with plum background", ""]
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([100, 900])
    context, pooled = wide.encode_text(prompts)
    y = wide.make_y(pooled, whole_image((64, 64), 2))
    assert context.shape == (2, 77, 112) and pooled.any() and context[..., 64:].any()
    wanted = tiny.unet(x, t, tiny.encode_prompts(prompts))
    found = wide.unet(x, t, context, y=y)
    assert torch.allclose(found, wanted, atol=1e-5) and wanted.abs().max() > 1
    pictures = [circles.draw_all(m, circles.held_out(2), False, 32, 2) for m in (tiny, wide)]
    assert np.abs(np.subtract(*np.array(pictures, dtype=int))).max() <= 1


def test_what_is_new_trains(wide):
    """Second blocks, the second encoder's part of the context, and label_emb get a gradient from their zeros."""
    control = ControlNet.from_unet(wide.unet)
    for conv in (*control.zero_convs, control.middle_block_out):
        torch.nn.init.normal_(conv[0].weight)
    context, pooled = wide.encode_text(["a", "b"])
    y = wide.make_y(pooled, whole_image((64, 64), 2))
    residuals = control(torch.randn(2, 4, 8, 8), torch.rand(2, 3, 64, 64), torch.tensor([9, 700]), context, y)
    sum(F.mse_loss(r, torch.randn_like(r)) for r in residuals).backward()
    attention = control.input_blocks[3][1].transformer_blocks[0].attn2
    assert not attention.to_v.weight[:, 64:].any() and attention.to_v.weight.grad[:, 64:].any()
    second = control.middle_block[1].transformer_blocks[1]
    assert not second.ff.net[2].weight.any() and second.ff.net[2].weight.grad.any()
    assert not control.label_emb[0][2].weight.any() and control.label_emb[0][2].weight.grad.any()


# --------------------------------------------------------------------------------------- memory of models of this shape
SMALL_VAE = dataclasses.replace(sdxl.TINY_SDXL, vae=dataclasses.replace(TINY.vae, ch=8, ch_mult=(1, 1, 1, 1)))


def lean() -> Config:
    return resolve(Config(device="cpu", batch_size=1, workers=0), "4gb")


def test_the_plan_sees_single_blocks_on_the_gpu_and_a_control_that_rests(monkeypatch):
    """Of a deep transformer one block at a time is there, and the VAE decodes without the ControlNet."""
    shape = dict(transformer_depth=(0, 2), channel_mult=(1, 4), attention_resolutions=(2,), model_channels=96)
    wide = dataclasses.replace(sdxl.TINY_SDXL.unet, **shape)
    predicted = lambda: estimate.predict(lean(), dataclasses.replace(SMALL_VAE, unet=wide), (32, 32))
    peaks = predicted()
    monkeypatch.setattr(unet, "is_deep", lambda block: False)
    assert peaks["training"].total + 4e6 < predicted()["training"].total
    assert "trained ControlNet" not in peaks["drawing"].parts and peaks["drawing"].parts["frozen UNet"] > 0


def test_resting_weights_come_back(base):
    trainer = build_trainer(lean(), load_model(ModelSource(base, attach=True)))
    before = {k: v.clone() for k, v in trainer.model.control_model.state_dict().items()}
    with resting_weights(trainer):
        assert all(is_kept_on_cpu(p) for p in trainer.model.control_model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.control_model.state_dict().items())
    assert not any(is_kept_on_cpu(p) for p in trainer.model.control_model.parameters())


def test_images_are_cached_without_the_text_encoders(wide, monkeypatch, tmp_path, folder):
    done, real = [], cache.cache_latents
    monkeypatch.setattr(wide.text, "cpu", lambda: done.append("text leaves"))
    monkeypatch.setattr(cache, "cache_latents", lambda *args: done.append("latents") or real(*args))
    cache.build_cache(wide, data.FolderDataset(folder, (32, 32)), tmp_path, 8)
    assert done == ["text leaves", "latents"]


def test_the_memory_of_the_cpu_follows_the_formats_in_which_weights_are_loaded():
    loaded = lambda **flags: estimate.cpu_memory(resolve(Config(device="cuda", **flags), "6gb"), sdxl.TINY_SDXL)
    assert loaded(precision="fp32", trained_weights="fp32") > 1.5 * loaded()
