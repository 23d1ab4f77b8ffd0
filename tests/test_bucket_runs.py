"""Runs on images of many shapes: resumed, cached, accumulated, validated and planned as runs on one size are."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
from config import Config, ConfigError, resolve, validate
from ldm import TINY
from lowvram import estimate
from tests.test_buckets import SHAPES, write_pairs
from tests.test_train import equal, losses, weights
from training.cache import build_cache
from training.preparation import frame_items
from training.records import hint_image, read_metrics
from training.validation import Validation
from weights import load_model
from weights.runs import list_checkpoints


@pytest.fixture
def config(base, tmp_path) -> Config:
    shapes = [SHAPES[i % len(SHAPES)] for i in range(21)]
    return Config(
        base=str(base), data=str(write_pairs(tmp_path / "many", shapes)), out=str(tmp_path / "run"), steps=4,
        batch_size=4, learning_rate=1e-3, cache_dir=str(tmp_path / "cache"), logger_freq=0, device="cpu", workers=0,
        log_steps=1, resolution="64", buckets=True, flip=True, crops=2, validation=2,
    )  # fmt: skip


@pytest.mark.parametrize("cache", [True, False])
def test_resumed_in_the_middle_of_an_epoch_equals_never_stopped(config, cache, tmp_path):
    """19 items and steps of 4: the run stops after step 3, and the second epoch begins in step 5."""
    config = dataclasses.replace(config, cache=cache, steps=6, checkpoint_freq=3, keep_checkpoints=0)
    whole, stopped = train.train(config), tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    shutil.rmtree(list_checkpoints(stopped)[-1])
    train.train(train.parse(["--resume", str(stopped)])[0], resume=stopped)
    assert equal(weights(whole), weights(stopped)) and losses(whole) == losses(stopped)


def test_cached_equals_computed_and_one_batch_equals_many(config, tmp_path):
    config = dataclasses.replace(config, batch_size=8, steps=3, learning_rate=1e-4)
    plain = train.train(config)
    change = dict(cache=False, batch_size=2, accumulate_grad_batches=4, optimizer_on_cpu=True, workers=1)
    run = train.train(dataclasses.replace(config, out=str(tmp_path / "other"), **change))
    for a, b in zip(read_metrics(plain), read_metrics(run), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5 and abs(a["grad_norm"] / b["grad_norm"] - 1) < 1e-3


def test_the_compiled_loss_takes_images_of_any_size(config, monkeypatch):
    """One graph for all sizes. (Making real graphs takes minutes.)"""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, **how: asked.append(how) or f)
    train.train(dataclasses.replace(config, steps=1, compile=True))
    assert asked == [dict(dynamic=True)]


def test_another_batch_size_on_resume_still_sees_every_item_once_an_epoch(config, monkeypatch):
    """The groups of one size stay as long as they were, so the order is the same; 2 x 4 + 5 x 6 = 2 epochs of 19."""
    seen, index = [], data.Samples.index
    monkeypatch.setattr(data.Samples, "index", lambda self, n: seen.append(index(self, n)) or seen[-1])
    run = train.train(dataclasses.replace(config, steps=2))
    resumed = train.parse(["--resume", str(run), "--batch-size", "6", "--steps", "7"])[0]
    assert (resumed.batch_size, resumed.bucket_batch) == (6, 4)
    train.train(dataclasses.replace(resumed, bucket_batch=0), resume=run)  # as a script would call it
    assert json.loads((run / "config.json").read_text())["bucket_batch"] == 4
    assert sorted(seen[:19]) == sorted(seen[19:38]) == list(range(19)) and len(seen) == 38
    for flags, name in ((["--no-buckets"], "buckets"), (["--bucket-batch", "6"], "bucket-batch")):
        with pytest.raises(ConfigError, match=f"--{name} cannot change on resume; it was"):
            train.parse(["--resume", str(run), *flags])
    path = run / "config.json"
    old = {k: v for k, v in json.loads(path.read_text()).items() if "bucket" not in k}  # of before there were any
    path.write_text(json.dumps(old))
    assert not train.parse(["--resume", str(run)])[0].buckets
    with pytest.raises(ConfigError, match="--buckets cannot change on resume; it was False"):
        train.parse(["--resume", str(run), "--buckets"])


def test_settings_that_exclude_each_other(config):
    for change, words in (
        (dict(directional_hints=True), "--flip would exchange left and right .*--directional-hints"),
        (dict(buckets=False, bucket_batch=2), "--bucket-batch 2 belongs to --buckets"),
    ):
        with pytest.raises(ConfigError, match=words):
            train.train(dataclasses.replace(config, **change))
    validate(resolve(dataclasses.replace(config, flip=False, directional_hints=True), "fast"))


def test_each_variant_is_cached_once_and_old_caches_are_used(config, tmp_path, monkeypatch):
    model = load_model(config.base)
    encoded, moments = [], type(model.vae).moments
    monkeypatch.setattr(type(model.vae), "moments", lambda vae, x: encoded.append(len(x)) or moments(vae, x))

    def cached(**change):
        encoded.clear()
        dataset = frame_items(dataclasses.replace(config, **change), TINY, data.FolderDataset(config.data))
        with torch.no_grad():
            kept = build_cache(model, dataset, tmp_path / "kept", 8)
        return kept, dataset, sum(encoded)

    kept, dataset, count = cached(flip=False, crops=1)
    keys = [data.digest((tmp_path / f"many/t{i}.png").read_bytes(), dataset.size_of(i)) for i in range(21)]
    assert kept.keys == keys and 21 <= count <= 21 + 7 * len(kept.latents)  # the last batch is filled up
    varied, dataset, count = cached()
    assert varied.keys[::4] == keys and len(varied.keys) == 84
    different = len(set(varied.keys)) - 21
    assert different <= count <= different + 7 * len(varied.latents) and different < 63  # squares have no second crop
    for i in (1, 4):
        with torch.no_grad():
            for variant in range(4):
                target = data.to_tensor(dataset.target(i, variant))[None]
                assert torch.allclose(varied.moments(i, variant), moments(model.vae, target)[0], atol=1e-5)
    assert cached()[2] == 0


# ---------------------------------------------------------------------------------------------------------- validation
def test_validation_of_mixed_sizes(config, tmp_path, monkeypatch):
    """Each size has batches of its own; every sample meets another's hint; nothing is flipped or cut aside."""
    shapes = [(64, 64)] * 54 + [(64, 64), (90, 60), (64, 64), (128, 40), (96, 64), (64, 64)]
    config = dataclasses.replace(config, data=str(write_pairs(tmp_path / "held", shapes)), validation=6, steps=1)
    made, real = [], Validation.losses
    monkeypatch.setattr(Validation, "losses", lambda self: made.append(self) or real(self))
    run = train.train(dataclasses.replace(config, log_images=5, logger_freq=1))
    validation = made[0]
    assert validation.items == list(range(54, 60)) and validation.groups == [[0, 2, 5], [1, 4], [3]]
    items, rounds = [validation.samples.item(i) for i in validation.items], 3
    assert [len(batch["hint"]) for batch in validation.batches] == [3, 2, 1] * rounds
    for batch, positions in zip(validation.batches, validation.groups * rounds, strict=True):
        for k, position in enumerate(positions):
            assert torch.equal(batch["hint"][k], items[position]["hint"])
            original, cut, size = batch["sizes"][k].view(3, 2)
            scale = (original / size).min()
            assert torch.allclose(cut, ((original / scale - size) / 2), atol=0.51)
    timesteps = sorted(torch.cat([batch["timesteps"] for batch in validation.batches]).tolist())
    assert timesteps == [int((k + 0.5) * 1000 / 18) for k in range(18)]
    lone = validation.batches[2]
    nearest = data.resize(items[4]["hint"].permute(1, 2, 0).numpy(), (96, 32), data.RESAMPLE["area"])
    assert torch.equal(lone["other_hint"][0], data.to_tensor(nearest))
    for a, b in zip(validation.batches, validation._fixed_batches(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a if isinstance(a[name], torch.Tensor))
    # the meter is 0 where the hint makes no difference, and each hint meets another one where it does
    assert [e["control_gain"] for e in read_metrics(run) if e["step"] == 0] == [0.0]
    grid = np.asarray(Image.open(run / "image_log/step-000001.png").convert("RGB"))
    hints = [hint_image(items[k]["hint"]) for k in (0, 2, 1, 4, 3)]  # images of one size stand together
    found = [
        [y for y in range(len(grid)) if np.array_equal(grid[y : y + len(hint), 6 : 6 + hint.shape[1]], hint)]
        for hint in hints
    ]
    assert all(len(places) == 1 for places in found) and found == sorted(found)


# ---------------------------------------------------------------------------------------------------------------- plan
def test_the_plan_is_for_the_bucket_that_takes_most(config):
    config = resolve(dataclasses.replace(config, resolution="96"), "fast")
    model_config, size = estimate.model_and_size(config)
    assert (model_config, size) == (TINY, (96, 96))
    disk = lambda **change: estimate.cache_size(dataclasses.replace(config, **change), TINY, size)[0]
    assert disk() == 2 * disk(crops=1) == 4 * disk(crops=1, flip=False)
    config = dataclasses.replace(config, resolution="")
    assert estimate.model_and_size(config)[1] == (128, 128)  # the model's own, not that of the first picture


# ----------------------------------------------------------------------------------------------------- own data sets
def test_own_data_sets_train_in_buckets(config, tmp_path, capsys):
    class Own:
        def __init__(self, folder):
            self.folder = data.FolderDataset(folder)

        def __len__(self):
            return len(self.folder)

        def __getitem__(self, i):
            return self.folder[i]

    config = dataclasses.replace(config, steps=2)
    a = train.train(config)
    told = capsys.readouterr().out
    b = train.train(dataclasses.replace(config, data="", out=str(tmp_path / "b")), Own(config.data))
    assert "hints have another size" not in told
    assert losses(a) == pytest.approx(losses(b), rel=1e-3)  # files are scaled as whole numbers
    assert "21 images in 5 of 7 buckets: 64x32: 7" in told and "21 images in 5 of 7 buckets" in capsys.readouterr().out
    with pytest.raises(data.DataError, match="item 1 of the data set lacks 'jpg'"):
        train.train(dataclasses.replace(config, data="", out=str(tmp_path / "d")), [Own(config.data)[0], dict(txt="p")])
    small = dataclasses.replace(config, resolution="")
    frame_items(small, TINY, Own(config.data))
    assert small.resolution == "128x128"  # the model's, not that of the first image
