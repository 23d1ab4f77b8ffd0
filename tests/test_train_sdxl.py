"""Training on SDXL: two contexts, a pooled vector and the sizes reach the loss, cached or not, stopped or not."""

import base64
import dataclasses
import io
import shlex
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import data
import merge
import playground.model
import sampler
import train
from config import Config, resolve
from ldm import TINY, ControlLDM
from lowvram.estimate import model_and_size
from playground.model import Choices, load
from tests.playing import Page, drawing
from tests.test_train import equal, losses, weights
from training.cache import build_cache, prepare_batch
from training.preparation import build_samples
from training.records import read_metrics
from weights import CheckpointError, ModelSource, load_control, load_model, load_state_dict
from weights.runs import load_state, newest_checkpoint
from weights.writing import save_safetensors

SMALL = dataclasses.replace(
    TINY,
    name="tiny-sdxl",
    unet=dataclasses.replace(
        TINY.unet, model_channels=16, channel_mult=(1, 2, 2), attention_resolutions=(2, 4), transformer_depth=(0, 1, 2),
        num_head_channels=8, context_dim=64 + 48, adm_in_channels=32 + 6 * 256, use_linear_in_transformer=True,
    ),
    text=dataclasses.replace(TINY.text, penultimate=True, final_norm=False),
    text2=dataclasses.replace(
        TINY.text, width=48, heads=3, mlp_width=96, layers=2, activation="gelu", penultimate=True, final_norm=False,
        projection=32,
    ),
    zero_empty_negative=True,
    vae_fp16_safe=False,
    prediction="eps",
)  # fmt: skip


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """A file with a tiny SDXL of random weights."""
    path = tmp_path_factory.mktemp("base") / "tiny_xl.safetensors"
    torch.manual_seed(0)
    model = ControlLDM(SMALL, hint_channels=None)
    for p in model.unet.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    save_safetensors(path, model.state_dict(), {"config": SMALL.to_json()})
    return path


@pytest.fixture
def config(sdxl, folder, tmp_path) -> Config:
    return Config(
        base=str(sdxl), data=str(folder), out=str(tmp_path / "run"), steps=4, batch_size=4, learning_rate=1e-3,
        cache_dir=str(tmp_path / "cache"), logger_freq=0, device="cpu", workers=0, log_steps=2, drop_prompt=0.3,
    )  # fmt: skip


@pytest.mark.parametrize("change", [{"cache": False}, {"precision": "fp16", "cache": False}])
def test_cached_equals_computed(config, change, tmp_path):
    plain = dataclasses.replace(config, **{k: v for k, v in change.items() if k == "precision"})
    a = train.train(dataclasses.replace(plain, out=str(tmp_path / "a")))
    b = train.train(dataclasses.replace(config, **change, out=str(tmp_path / "b")))
    assert losses(a) == pytest.approx(losses(b), rel=1e-3 if "precision" in change else 1e-5)


@pytest.mark.parametrize("change", [{"memory": "4gb", "ema_decay": 0.9}, {"buckets": True, "flip": True, "crops": 2}])
def test_resumed_equals_never_stopped(config, change, tmp_path):
    config = dataclasses.replace(config, **change, logger_freq=2, checkpoint_freq=2, keep_checkpoints=0, log_images=1)
    whole, stopped = train.train(config), tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-000004")
    train.train(train.parse(["--resume", str(stopped)]).config, resume=stopped)
    assert equal(weights(whole), weights(stopped))
    assert (whole / "image_log" / "step-000004.png").exists()
    strip = lambda run: [{k: v for k, v in e.items() if k != "images_per_second"} for e in read_metrics(run)]
    assert strip(whole) == strip(stopped)


def test_prompts_sizes_and_their_drop_reach_y(config, sdxl, folder):
    model, dataset = load_model(ModelSource(sdxl, attach=True)), data.FolderDataset(folder, (32, 32))
    config = resolve(dataclasses.replace(config, cache=False), "fast")
    samples, _, (negative, pooled) = build_samples(config, model, dataset)
    assert not negative.any() and not pooled.any() and negative.shape == (1, 77, 112) and pooled.shape == (1, 32)
    batch = torch.utils.data.default_collate([samples[n] for n in range(4)])
    prepared = prepare_batch(model, batch, "cpu", 2)
    context, pooled = model.encode_text(batch["prompt"])
    assert "" in batch["prompt"] and torch.equal(prepared["context"], context)
    assert torch.equal(prepared["y"], model.make_y(pooled, torch.tensor([[32, 32, 0, 0, 32, 32.0]] * 4)))
    moved = prepare_batch(model, batch | {"sizes": batch["sizes"] + 1}, "cpu", 2)
    prepared |= {"timesteps": torch.tensor([10, 300, 600, 900])}
    assert not torch.equal(*(train.diffusion_loss(model, prepared | {"y": b["y"]}) for b in (prepared, moved)))


def test_the_label_embedding_trains_and_is_saved(config):
    run = train.train(config)
    trained, base = weights(run), load_state_dict(config.base)
    key = "label_emb.0.0.weight"
    assert not torch.equal(trained[f"control_model.{key}"], base[f"model.diffusion_model.{key}"])
    model = load_model(run)
    assert torch.equal(model.control_model.state_dict()[key], trained[f"control_model.{key}"])


def test_the_page_draws_what_its_command_draws(sdxl, tmp_path, monkeypatch):
    """With sizes and pooled vectors, zeros for an empty negative prompt, and the VAE in fp32 beside fp16."""
    page = Page(load(Choices(str(sdxl), precision="bf16")))
    monkeypatch.chdir(tmp_path)
    try:
        assert page.routes.loaded.model.unet.dtype == torch.bfloat16
        for negative in ("", "blue"):
            picture = page.post(drawing(negative=negative, steps=2))[1][-2]
            sampler.main([*shlex.split(picture["command"])[2:], "--out", f"out{negative}"])
            image = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["image"].split(",")[1]))))
            assert np.array_equal(image, np.asarray(Image.open(f"out{negative}/0000.png")))
    finally:
        page.close()
    monkeypatch.setattr(playground.model, "compute_dtype_for", lambda precision, device: torch.float16)  # of a GPU
    half = load(Choices(str(sdxl), precision="fp16")).model
    assert half.unet.dtype == torch.float16 and half.vae.quant_conv.weight.dtype == torch.float32


def test_the_plan_knows_the_size_of_the_control_that_is_trained(sdxl, config, tmp_path):
    merge.main(["attach", str(sdxl), str(tmp_path / "small.safetensors"), "--control-depth", "mid"])
    merge.main(["extract", str(tmp_path / "small.safetensors"), str(tmp_path / "control.safetensors")])
    planned = lambda **change: model_and_size(dataclasses.replace(config, **change))[0].control_depth
    small = planned(control=str(tmp_path / "control.safetensors"))
    assert small == planned(control_depth="mid") == planned(base=str(tmp_path / "small.safetensors")) != planned()
    assert planned(control=str(tmp_path / "gone.safetensors")) is None  # of a resumed run, which needs it no more


def test_latents_that_overflow_are_refused(config, sdxl, folder, monkeypatch):
    model, dataset = load_model(sdxl), data.FolderDataset(folder, (32, 32))
    model.vae.quant_conv.bias.data[0] = torch.inf
    with pytest.raises(data.DataError, match="targets 0, .*not finite"):
        build_cache(model, dataset, config.cache_dir, 4)


@pytest.mark.parametrize("depth", ["0,1,1", "small"])
def test_a_smaller_control_trains_resumes_and_draws(config, depth, tmp_path):
    config = dataclasses.replace(config, control_depth=depth, steps=2, checkpoint_freq=1, keep_checkpoints=0)
    run, whole = train.train(config), load_model(ModelSource(config.base, attach=True))
    count = lambda net: sum(p.numel() for p in net.parameters())
    small = load_model(run).control_model
    assert count(small) < count(whole.control_model) and len(small.zero_convs) == len(whole.control_model.zero_convs)
    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-000002")
    train.train(train.parse(["--resume", str(stopped)]).config, resume=stopped)
    assert equal(weights(run), weights(stopped))
    joined = load_control(run, whole)
    assert equal(joined.state_dict(), small.state_dict())
    with pytest.raises(CheckpointError, match="transformers have"):
        train.train(
            dataclasses.replace(
                config,
                control=str(newest_checkpoint(run) / "trained.safetensors"),
                control_depth="full",
                out=str(tmp_path / "other"),
            )
        )


@pytest.mark.parametrize(
    "change", [{"memory": "6gb"}, {"memory": "4gb", "sd_locked": False}, {"only_mid_control": True}]
)
def test_weights_that_are_rounded_are_loaded_rounded_with_the_same_numbers(config, change, tmp_path, monkeypatch):
    """Where a model was loaded in float32 and rounded afterwards, as before, nothing differs in what is saved."""
    config = dataclasses.replace(config, **{"memory": "8gb", "optimizer_bits": 32} | change, steps=2)
    seen, build = [], train.build_trainer
    monkeypatch.setattr(train, "build_trainer", lambda c, model: seen.append(dtypes(model)) or build(c, model))
    short = train.train(config)
    monkeypatch.setattr(train, "loading_formats", lambda config: {})
    long = train.train(dataclasses.replace(config, out=str(tmp_path / "long")))
    bf16, fp32 = torch.bfloat16, torch.float32
    trains_short = "only_mid_control" not in change and change["memory"] == "6gb"
    assert seen[0] == {"encoder": bf16, "decoder": bf16 if config.sd_locked else fp32,
                       "control": bf16 if trains_short else fp32}  # fmt: skip
    assert set(seen[1].values()) == {fp32}
    for name in ("trained.safetensors", "optimizer.safetensors"):
        a, b = (load_state_dict(newest_checkpoint(run) / name) for run in (short, long))
        assert equal(a, b)
    states = [load_state(newest_checkpoint(run)) for run in (short, long)]
    assert states[0]["base"] == states[1]["base"] and states[0]["vae"] == states[1]["vae"]


def dtypes(model: ControlLDM) -> dict[str, torch.dtype]:
    unet = model.unet
    parts = {"encoder": unet.input_blocks, "decoder": unet.output_blocks, "control": model.control_model}
    return {name: next(part.parameters()).dtype for name, part in parts.items()}
