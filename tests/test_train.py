"""The loop: that every setting does what it says, and that a resumed run is the run that was not stopped."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch

import config as config_module
import data
import sampler
import train
import training.validation
from config import Config, ConfigError, resolve
from ldm import SD21_V
from toy import circles
from training.cache import build_cache
from training.records import read_metrics, sudden_convergence
from training.setup import build_trainer, select_trainable
from training.validation import Validation
from vae import AutoencoderKL
from weights import CheckpointError, ModelSource, load_model, load_state_dict
from weights.reading import load_metadata
from weights.runs import list_checkpoints, newest_checkpoint
from weights.writing import save_safetensors


@pytest.fixture
def config(base, folder, tmp_path) -> Config:
    return Config(
        base=str(base), data=str(folder), out=str(tmp_path / "run"), steps=4, batch_size=4, learning_rate=1e-3,
        cache_dir=str(tmp_path / "cache"), logger_freq=0, device="cpu", workers=0, log_steps=2,
    )  # fmt: skip


def weights(run) -> dict[str, torch.Tensor]:
    return load_state_dict(newest_checkpoint(run) / "trained.safetensors")


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(run) -> list[float]:
    return [entry["loss"] for entry in read_metrics(run) if "loss" in entry]


def test_a_run_is_a_folder(config):
    config.logger_freq, config.checkpoint_freq, config.keep_checkpoints, config.log_images = 2, 1, 2, 2
    run = train.train(config)
    assert {p.name for p in run.iterdir()} == {
        "config.json", "metrics.jsonl", "image_log", "checkpoints", "curves.png", "hint.png", "history.jsonl",
        "report.html", "progress.gif",
    }  # fmt: skip
    assert [p.name for p in list_checkpoints(run)] == ["step-000003", "step-000004"]
    assert sorted(p.name for p in (run / "image_log").iterdir()) == [f"step-00000{i}.png" for i in (0, 2, 4)]
    gains = [entry["control_gain"] for entry in read_metrics(run) if "control_gain" in entry]
    assert len(gains) == 3 and gains[0] == 0.0 and gains[-1] != 0.0
    assert json.loads((run / "config.json").read_text())["resolution"] == "32x32"


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"precision": "fp16", "sd_locked": False},
        {"cache": False, "drop_prompt": 0.5, "optimizer_bits": 16},
        {"channels_last": True, "drop_prompt": 0.5, "memory": "8gb", "ema_decay": 0.9},
        {"channels_last": True, "memory": "6gb"},
        {"memory": "4gb", "ema_decay": 0.9, "accumulate_grad_batches": 2, "batch_size": 2},
    ],
)
def test_resumed_equals_never_stopped(config, change, tmp_path):
    """Stopped after 2 of 6 steps, in the middle of an epoch of 22, and continued: the same bits."""
    config = dataclasses.replace(config, **change, logger_freq=3, steps=6, checkpoint_freq=2, keep_checkpoints=0)
    whole = train.train(config)
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    for later in ("step-000004", "step-000006"):
        shutil.rmtree(stopped / "checkpoints" / later)
    resumed, run, *_ = train.parse(["--resume", str(stopped)])
    train.train(resumed, resume=run)
    files = sorted(p.name for p in newest_checkpoint(whole).glob("*.safetensors"))
    assert len(files) == (3 if config.ema_decay else 2)
    for file in files:
        a, b = (load_state_dict(newest_checkpoint(r) / file) for r in (whole, stopped))
        assert equal(a, b), file
    strip = lambda run: [{k: v for k, v in e.items() if k != "images_per_second"} for e in read_metrics(run)]
    assert strip(whole) == strip(stopped)


def test_accumulation_equals_a_large_batch(config, tmp_path):
    """8 x 1 and 2 x 4 draw the same samples and make the same gradients to rounding."""
    config.steps, config.learning_rate = 2, 1e-4
    a = train.train(dataclasses.replace(config, batch_size=8, out=str(tmp_path / "a")))
    b = train.train(dataclasses.replace(config, batch_size=2, accumulate_grad_batches=4, out=str(tmp_path / "b")))
    for x, y in zip(read_metrics(a), read_metrics(b), strict=True):
        assert abs(x["loss"] - y["loss"]) < 1e-5 and abs(x["grad_norm"] / y["grad_norm"] - 1) < 1e-4
    c = train.train(dataclasses.replace(config, batch_size=2, out=str(tmp_path / "c")))
    assert abs(losses(a)[0] - losses(c)[0]) > 1e-4


def test_locked_and_unlocked(config, base, tmp_path):
    before = load_state_dict(base)
    locked = load_model(train.train(config))
    unet = {k: v for k, v in locked.state_dict().items() if k.startswith("model.")}
    assert all(torch.equal(v, before[k]) for k, v in unet.items())
    assert all(k.startswith("control_model.") for k in weights(config.out))
    run = train.train(dataclasses.replace(config, sd_locked=False, out=str(tmp_path / "unlocked")))
    moved = {k for k, v in load_model(run).state_dict().items() if k in before and not torch.equal(v, before[k])}
    assert moved and all(".output_blocks." in k or ".out." in k for k in moved)


def test_unlocking_on_resume_starts_the_decoder_afresh(config, capsys):
    train.train(config)
    resumed, run, *_ = train.parse(
        ["--resume", config.out, "--no-sd-locked", "--steps", "6", "--learning-rate", "2e-6"]
    )
    train.train(resumed, resume=run)
    assert "did not train before" in capsys.readouterr().out
    entries = [e for e in read_metrics(run) if "loss" in e]
    assert [e["step"] for e in entries] == [1, 2, 3, 4, 5, 6] and entries[-1]["learning_rate"] == 2e-6
    assert any(".output_blocks." in k for k in weights(run))


def test_another_batch_size_on_resume_goes_on_with_the_next_samples(config):
    """4 steps of 4 and 2 of 2 have consumed 20 samples; none twice."""
    run = train.train(config)
    for steps in ("5", "6"):
        train.train(train.parse(["--resume", str(run), "--batch-size", "2", "--steps", steps])[0], resume=run)
    state = json.loads((newest_checkpoint(run) / "state.json").read_text())
    assert (state["step"], state["samples"]) == (6, 20)


def test_only_mid_control_trains_no_other_zero_convolution(config):
    config.only_mid_control = True
    trained = weights(train.train(config))
    assert not any(v.any() for k, v in trained.items() if ".zero_convs." in k)
    assert trained["control_model.middle_block_out.0.weight"].any()


def test_only_what_trains_requires_a_gradient(config):
    for change, prefixes in (
        ({}, ("control_model.",)),
        (
            {"sd_locked": False},
            ("control_model.", "model.diffusion_model.output_blocks.", "model.diffusion_model.out."),
        ),
    ):
        model = load_model(ModelSource(config.base, attach=True))
        trained = select_trainable(model, dataclasses.replace(config, **change))
        wants = {k for k, p in model.named_parameters() if p.requires_grad}
        assert wants == set(trained) == {k for k, _ in model.named_parameters() if k.startswith(prefixes)}


def test_the_locked_encoder_leaves_no_graph(config):
    model = load_model(ModelSource(config.base, attach=True))
    select_trainable(model, config)
    h, skips, emb = model.unet.encode(torch.randn(1, 4, 4, 4), torch.tensor([5]), torch.randn(1, 77, 64))
    assert not any(x.requires_grad for x in (h, emb, *skips))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_near_full(config, precision, tmp_path):
    full = losses(train.train(config))
    low = losses(train.train(dataclasses.replace(config, precision=precision, out=str(tmp_path / precision))))
    assert full != low and np.allclose(full, low, rtol=0.05)
    assert all(v.dtype == torch.float32 for v in weights(tmp_path / precision).values())


def test_cached_equals_computed(config, tmp_path):
    cached = train.train(config)
    computed = train.train(dataclasses.replace(config, cache=False, out=str(tmp_path / "b")))
    assert np.allclose(losses(cached), losses(computed), rtol=1e-5)
    assert (tmp_path / "cache").exists()


class Own:
    """A data set as in the tutorial's step 2: your own class."""

    def __init__(self, folder):
        self.folder = data.FolderDataset(folder)

    def __len__(self):
        return len(self.folder)

    def __getitem__(self, i):
        return self.folder[i]


def test_own_data_set_trains_as_the_folder_does(config, folder, tmp_path):
    a = train.train(config)
    b = train.train(dataclasses.replace(config, data="", out=str(tmp_path / "b")), Own(folder))
    assert losses(a) == losses(b)


class Random(Own):
    """Other items at each call, in which hint and target still belong together."""

    def __getitem__(self, i):
        value = np.random.rand()
        return dict(jpg=np.full((32, 32, 3), value), txt=str(value), hint=np.full((32, 32, 3), value))


def test_a_data_set_that_changes_is_not_cached(config):
    with pytest.raises(data.DataError, match="--no-cache"):
        train.train(config, Random(config.data))
    config.cache = False
    train.train(config, Random(config.data))
    item = data.Samples(data.ArrayDataset(Random(config.data), (32, 32)), range(4), 0, (4, 4, 4))[0]
    assert torch.allclose(item["hint"], item["target"]) and float(item["prompt"]) == pytest.approx(
        item["hint"].mean().item()
    )


def test_what_is_encoded_held_out_and_drawn(config, tmp_path, monkeypatch):
    circles.make(tmp_path / "more", count=60, size=32, seed=3)
    config = dataclasses.replace(config, data=str(tmp_path / "more"), steps=1, batch_size=8, logger_freq=1)
    encoded, drawn, moments, sample = [], [], AutoencoderKL.moments, sampler.sample

    def noted(model, context, negative, controls, size, settings, **more):
        drawn.append((len(controls[0].hint), settings.steps, settings.scale))
        return sample(model, context, negative, controls, size, settings, **more)

    monkeypatch.setattr(AutoencoderKL, "moments", lambda vae, x: encoded.append(len(x)) or moments(vae, x))
    monkeypatch.setattr(training.validation, "sample", noted)
    train.train(dataclasses.replace(config, encode_batch_size=7, log_images=5))
    assert max(encoded) == 7 and drawn == [(5, 2, None)] * 2  # before the first step and after the last
    encoded.clear(), drawn.clear()
    other = dict(encode_batch_size=2, log_images=5, validation=3, log_steps=1, guidance=1.5)
    train.train(dataclasses.replace(config, **other, out=str(tmp_path / "b"), cache_dir=str(tmp_path / "again")))
    assert max(encoded) == 2 and drawn == [(3, 1, 1.5)] * 2


def test_a_new_hint_encoder_is_fitted_to_the_hints_once(config, tmp_path, capsys):
    config = dataclasses.replace(config, steps=2, normalize_hint_encoder=True, learning_rate=0.0, checkpoint_freq=1)
    run = train.train(config)
    told = re.search(r"initial weights are multiplied by ([\d., ]+)\n", capsys.readouterr().out)[1]
    plain = train.train(dataclasses.replace(config, normalize_hint_encoder=False, out=str(tmp_path / "plain")))
    name = "control_model.input_hint_block.{}.weight"
    fitted, given = weights(run), weights(plain)
    for number, factor in zip(range(0, 14, 2), map(float, told.split(", ")), strict=True):
        assert torch.equal(fitted[name.format(number)], given[name.format(number)] * factor)
    capsys.readouterr()
    train.train(dataclasses.replace(config, steps=3), resume=run)
    assert "multiplied" not in capsys.readouterr().out and equal(weights(run), fitted)
    with pytest.raises(ConfigError, match="--normalize-hint-encoder cannot change on resume"):
        train.parse(["--resume", str(run), "--no-normalize-hint-encoder"])
    trained = load_state_dict(newest_checkpoint(run) / "trained.safetensors")
    trained["control_model.input_hint_block.14.weight"][0] = 1.0
    save_safetensors(tmp_path / "trained.safetensors", trained, {})
    with pytest.raises(ConfigError, match="--normalize-hint-encoder: the hint encoder is trained already"):
        train.train(dataclasses.replace(config, control=str(tmp_path / "trained.safetensors"), out=str(tmp_path / "c")))


def test_settings_that_shape_the_step(config, tmp_path):
    def run(**change):
        name = "-".join(f"{k}{v}" for k, v in change.items())
        return read_metrics(train.train(dataclasses.replace(config, out=str(tmp_path / name), **change)))

    plain = run(warmup_steps=0)
    assert plain[0]["loss"] == run(seed=0)[0]["loss"] != run(seed=1)[0]["loss"]
    assert plain[0]["loss"] != run(timestep_bias=0.3)[0]["loss"]
    assert [e["learning_rate"] for e in run(warmup_steps=2)] == [5e-4, 1e-3, 1e-3, 1e-3]
    rates = [e["learning_rate"] for e in run(lr_schedule="cosine")]
    assert rates[0] == 1e-3 and rates[2] == pytest.approx(0.51e-3) and rates == sorted(rates, reverse=True)
    assert plain[3]["loss"] != run(clip_grad_norm=1e-6)[3]["loss"]
    assert plain[3]["loss"] != run(weight_decay=100.0)[3]["loss"]
    assert plain[0]["loss"] != run(resolution="64")[0]["loss"]
    for change in (
        dict(drop_prompt=1.0), dict(even_timesteps=True), dict(min_timestep=900), dict(max_timestep=100),
        dict(noise_offset=0.3), dict(min_snr_gamma=1.0), dict(huber=0.1),
    ):  # fmt: skip
        assert plain[0]["loss"] != run(**change)[0]["loss"], change
    assert plain[3]["loss"] != run(drop_hint=1.0)[3]["loss"]  # at step 0 no hint matters yet
    assert run(lr_schedule="linear")[2]["learning_rate"] == pytest.approx(0.51e-3)
    last = [e["loss"] for e in run(channels_last=True)]
    assert np.allclose(last, [e["loss"] for e in plain], rtol=1e-4)


def test_channels_last_weights_lie_so(config):
    model = load_model(ModelSource(config.base, attach=True))
    build_trainer(dataclasses.replace(resolve(config, "fast"), channels_last=True), model)
    assert model.unet.input_blocks[0][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_dropped_prompts_are_the_empty_one(config, folder, tmp_path):
    """Of many samples about a third has the empty prompt's context; the others are as without dropping."""
    model = load_model(config.base)
    pairs = data.FolderDataset(folder, (32, 32))
    with torch.no_grad():
        once = build_cache(model, pairs, tmp_path, 8)
        empty = model.encode_prompts("")[0]
    make = lambda rate, kept: data.Samples(
        pairs, range(24), 0, (4, 4, 4), data.SampleRandomness(drop_prompt=rate), kept
    )
    for kept, name, blank in ((once, "context", empty), (None, "prompt", "")):
        same = lambda a, b: torch.allclose(a, b, atol=1e-5) if isinstance(a, torch.Tensor) else a == b
        never, some = make(0.0, kept), make(0.3, kept)
        dropped = [same(some[n][name], blank) for n in range(200)]
        assert 30 < sum(dropped) < 90
        for n in range(24):
            assert torch.equal(never[n]["noise"], some[n]["noise"]) and (
                dropped[n] or same(never[n][name], some[n][name])
            )


def test_sizes_that_the_unet_cannot_divide(config, tmp_path, capsys):
    circles.make(tmp_path / "odd", 6, 90)
    config.data = str(tmp_path / "odd")
    train.train(config)
    assert "from 90x90 to 96x96" in capsys.readouterr().out


def test_hint_channels_go_from_data_to_checkpoint(config):
    config.hint_channels = 1
    run = train.train(config)
    assert weights(run)["control_model.input_hint_block.0.weight"].shape[1] == 1
    assert load_model(run).control_model.hint_channels == 1


def test_command_line(config, base, folder, tmp_path):
    args = ["--base", str(base), "--data", str(folder)]
    given, resume, overwrite, *_ = train.parse([*args, "--batch-size", "2", "--no-sd-locked", "--only-mid-control"])
    assert resume is None and not overwrite and given.out == "runs/circles"
    assert (given.batch_size, given.sd_locked, given.only_mid_control, given.learning_rate) == (2, False, True, 1e-5)
    demo, *_ = train.parse(["--out", str(tmp_path / "demo"), "--steps", "7"])
    assert demo.data == "data/circles" and demo.steps == 7 and demo.learning_rate == train.DEMO["learning_rate"]
    with pytest.raises(ConfigError, match="both"):
        train.parse(["--base", str(base)])
    for bad, change in (
        ("--steps is 0", {"steps": 0}),
        ("--base is not set", {"base": ""}),
        ("--log-steps", {"log_steps": 0}),
    ):
        with pytest.raises(ConfigError, match=bad):
            train.train(dataclasses.replace(config, **change))
    run = train.train(config)
    with pytest.raises(CheckpointError, match="holds a run .at step-000004.*--resume.*--overwrite"):
        train.train(config)
    with pytest.raises(CheckpointError, match="no such file"):  # a slip does not cost the finished run
        train.train(dataclasses.replace(config, base="nothing"), overwrite=True)
    assert list_checkpoints(run)
    config.steps = 2
    assert newest_checkpoint(train.train(config, overwrite=True)).name == "step-000002"
    assert [e["step"] for e in read_metrics(run) if "loss" in e] == [1, 2]
    shutil.rmtree(run / "checkpoints")  # stopped before its first checkpoint: nothing to lose
    train.train(config)


def test_locking_again_keeps_the_trained_decoder(config):
    config.sd_locked, config.precision = False, "bf16"
    run = train.train(config)
    unlocked = weights(run)
    train.train(train.parse(["--resume", str(run), "--sd-locked", "--steps", "6"])[0], resume=run)
    decoder = [k for k in unlocked if k.startswith("model.")]
    assert decoder and all(torch.equal(weights(run)[k], unlocked[k]) for k in decoder)


def test_precision_may_change_on_resume(config):
    run = train.train(config)
    for steps, precision in (("5", "fp16"), ("6", "bf16"), ("7", "fp32")):
        args = ["--resume", str(run), "--steps", steps, "--precision", precision]
        train.train(train.parse(args)[0], resume=run)
    assert len(losses(run)) == 7


def test_workers_load_the_same_samples(config, tmp_path):
    a = train.train(config)
    b = train.train(dataclasses.replace(config, workers=2, out=str(tmp_path / "b")))
    assert losses(a) == losses(b)


def test_resume_says_what_cannot_change(config, tmp_path):
    run = train.train(config)
    with pytest.raises(ConfigError, match="--seed cannot change.*it was 0"):
        train.parse(["--resume", str(run), "--seed", "1"])
    with pytest.raises(CheckpointError, match="config.json"):
        train.parse(["--resume", str(tmp_path / "nothing")])


def test_a_run_goes_on_where_its_base_and_data_have_moved(config, base, folder, tmp_path):
    run = train.train(config)
    moved = [shutil.copy(base, tmp_path / "moved.safetensors"), shutil.copytree(folder, tmp_path / "data")]
    settings = json.loads((run / "config.json").read_text()) | {"base": "gone", "data": "gone"}
    (run / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="its base gone is not there; --base"):
        load_model(run)
    flags = ["--resume", str(run), "--steps", "5", "--base", str(moved[0]), "--data", str(moved[1])]
    train.train(train.parse(flags)[0], resume=run)
    assert newest_checkpoint(load_model(run) and run).name == "step-000005"  # config.json has the new path
    other = load_state_dict(base) | {}
    other["model.diffusion_model.input_blocks.0.0.weight"] += 1
    save_safetensors(tmp_path / "other.safetensors", other, load_metadata(base))
    circles.make(tmp_path / "more", 30, 32)
    for flag, path in (("--base", tmp_path / "other.safetensors"), ("--data", tmp_path / "more")):
        with pytest.raises(CheckpointError, match=f"{path}: not the {flag[2:]} that"):
            train.train(train.parse(["--resume", str(run), "--steps", "6", flag, str(path)])[0], resume=run)
    load_model(ModelSource(run, base=tmp_path / "other.safetensors"))  # to draw with another base is fine


def test_sudden_convergence():
    assert sudden_convergence([0, 50, 100, 150], [0.0, 0.01, 0.3, 0.4]) == 100
    assert sudden_convergence([0, 50, 100, 150], [0.0, 0.2, 0.01, 0.02]) is None


def test_weights_of_min_snr_and_the_arm_of_huber(config):
    model = load_model(ModelSource(config.base, attach=True))
    t = torch.tensor([10, 400, 990])
    x, noise, context = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4), torch.randn(3, 77, 64)
    hint = torch.rand(3, 3, 32, 32)
    batch = dict(latents=x, context=context, hint=hint, timesteps=t, noise=noise)
    loss = lambda **settings: train.diffusion_loss(model, batch, **settings)
    alphas = sampler.alphas_cumprod(model.config)[t]
    snr = alphas / (1 - alphas)
    assert model.config.prediction == "v"
    assert torch.allclose(loss(min_snr_gamma=5.0), loss() * snr.clamp(max=5) / (snr + 1))
    model.config = dataclasses.replace(model.config, prediction="eps")
    assert torch.allclose(loss(min_snr_gamma=1e9), loss()) and not torch.allclose(loss(min_snr_gamma=5.0), loss())
    assert torch.allclose(loss(min_snr_gamma=5.0), loss() * snr.clamp(max=5) / snr)
    assert torch.allclose(loss(huber=1e3), loss())  # no error is that large: the square
    assert (loss(huber=0.1) < loss()).all()


def test_gradient_checkpointing_keeps_less_and_computes_the_same(config):
    def step(on: bool):
        model, kept = load_model(ModelSource(config.base, attach=True)), [0]
        trainer = build_trainer(dataclasses.replace(resolve(config, "fast"), gradient_checkpointing=on), model)
        torch.manual_seed(0)
        x, noise, hint, context = torch.randn(2, 2, 4, 8, 8).unbind() + (
            torch.rand(2, 3, 64, 64),
            torch.randn(2, 77, 64),
        )

        def keep(t):
            kept[0] += t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            batch = dict(latents=x, context=context, hint=hint, timesteps=torch.tensor([3, 700]), noise=noise)
            loss = train.diffusion_loss(model, batch).sum()
        loss.backward()
        return loss, {k: p.grad for k, p in trainer.trainable.items()}, kept[0]

    plain, again = step(False), step(True)
    assert torch.equal(plain[0], again[0]) and all(
        torch.allclose(g, again[1][k], atol=1e-6) for k, g in plain[1].items()
    )
    assert again[2] < plain[2] / 3


def test_the_moving_average_is_kept_drawn_and_exported(config, monkeypatch):
    """It follows the weights, at first quickly; the meter and what reads the run have it, the run goes on without."""
    seen, real = [], Validation.losses
    config = dataclasses.replace(config, steps=6, checkpoint_freq=1, keep_checkpoints=0, ema_decay=0.5, logger_freq=6)
    name = "control_model.zero_convs.3.0.weight"
    watched = lambda self: seen.append(self.trainer.model.state_dict()[name].clone()) or real(self)
    monkeypatch.setattr(Validation, "losses", watched)
    run = train.train(config)
    mean = torch.zeros_like(weights(run)[name])
    for step, folder in enumerate(list_checkpoints(run)):
        decay = min(0.5, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * load_state_dict(folder / "trained.safetensors")[name]
        kept = load_state_dict(folder / "average.safetensors")
        assert torch.allclose(kept[name], mean, atol=1e-7)
    assert torch.equal(seen[-1], kept[name]) and not torch.equal(kept[name], weights(run)[name])
    assert torch.equal(load_model(run).state_dict()[name], kept[name])
    assert torch.equal(load_model(ModelSource(run, use_run_ema=False)).state_dict()[name], weights(run)[name])


def test_zero_terminal_snr(config, base, tmp_path):
    plain = train.train(config)
    run = train.train(dataclasses.replace(config, zero_terminal_snr=True, out=str(tmp_path / "zero")))
    assert losses(plain)[0] != losses(run)[0]
    model = load_model(run)  # drawing from the run has the schedule that it was trained on
    alphas, before = sampler.alphas_cumprod(model.config), sampler.alphas_cumprod(load_model(plain).config)
    assert alphas[0] == pytest.approx(before[0].item()) and alphas[-1] == 2**-24 < before[-1] / 100
    assert list(sampler.ddim_timesteps(5, 1000, trailing=True)) == [199, 399, 599, 799, 999]
    context = model.encode_prompts(["red circle with blue background"])
    for solver in ("ddim", "dpm"):
        settings = sampler.Sampling(steps=5, scale=2.0, solver=solver)
        drawn = sampler.sample(model, context, context * 0, [], (32, 32), settings)
        assert drawn.isfinite().all() and drawn.abs().max() < 50
    with pytest.raises(CheckpointError, match="predicts eps"):
        load_model(ModelSource(base, prediction="eps", zero_terminal_snr=True))


def test_zero_terminal_snr_is_the_paper_s():
    """Against diffusers, which has it under `rescale_betas_zero_snr`."""
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    ).alphas_cumprod
    ours = sampler.alphas_cumprod(dataclasses.replace(SD21_V, zero_terminal_snr=True))
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_settings_of_the_machine(config, monkeypatch, tmp_path):
    """TF32 and determinism are switches of the process; each is set as asked."""
    seen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: seen.append(name))
    train.train(dataclasses.replace(config, precision="tf32"))
    assert seen[-1] == "high" and torch.backends.cudnn.allow_tf32
    train.set_process_options(dataclasses.replace(config, precision="bf16"))  # for what stays in float32
    assert seen[-1] == "high"
    train.train(dataclasses.replace(config, deterministic=True, out=str(tmp_path / "b")))
    assert seen[-1] == "highest" and not torch.backends.cudnn.allow_tf32
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)


def test_compiled_equals_as_written(config, monkeypatch, tmp_path):
    """The loss is compiled as a whole, into a graph that computes the same. (The kernels that are made of it take
    minutes; here the graph runs as it is.)"""
    plain, real, compiled, whole = train.train(config), torch.compile, [], dict(backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled.append(f) or real(f, **whole, **how))
    made, validation = [], train.Validation
    monkeypatch.setattr(train, "Validation", lambda *parts: made.append(parts) or validation(*parts))
    run = train.train(dataclasses.replace(config, compile=True, out=str(tmp_path / "compiled")))
    assert train.diffusion_loss in made[0]  # which is not compiled once more, without gradients
    assert compiled == [train.diffusion_loss] and np.allclose(losses(plain), losses(run), rtol=1e-4)


def test_tensorboard_gets_the_metrics(config, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train.train(dataclasses.replace(config, tensorboard=True, logger_freq=2))
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses(run))
    assert [e.step for e in events.Scalars("control_gain")] == [0, 2, 4]
    monkeypatch.setattr(config_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--tensorboard.*pip install"):
        train.train(dataclasses.replace(config, tensorboard=True))
