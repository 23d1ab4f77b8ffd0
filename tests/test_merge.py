"""Attaching, extracting, and what the tool says."""

import json

import pytest
import torch

import merge
import train
from config import ConfigError
from ldm import TINY
from weights import CheckpointError, ModelSource, load_model, load_state_dict
from weights.reading import load_metadata
from weights.runs import newest_checkpoint
from weights.source import merge_sources, read_model
from weights.writing import save_json, save_safetensors


def test_attach_equals_attaching_on_the_fly(base, tmp_path, capsys):
    out = tmp_path / "merged.safetensors"
    merge.main([str(base), str(out), "--seed", "3"])
    said = capsys.readouterr().out
    assert "are new (input_hint_block, middle_block_out, zero_convs)" in said
    merged, fly = load_model(out), load_model(ModelSource(base, attach=True, seed=3))
    assert all(torch.equal(v, fly.state_dict()[k]) for k, v in merged.state_dict().items())
    with pytest.raises(CheckpointError, match="exists; --force"):
        merge.main(["attach", str(base), str(out)])
    with pytest.raises(CheckpointError, match="already has a ControlNet"):
        merge.main([str(out), str(tmp_path / "twice.safetensors")])
    with pytest.raises(CheckpointError, match="no such folder"):
        merge.main([str(base), str(tmp_path / "no" / "x.safetensors")])
    with pytest.raises(CheckpointError, match="no such file"):
        merge.main([str(tmp_path / "no.safetensors"), str(tmp_path / "x.safetensors")])


def test_extract_half_ckpt_and_info(base, tmp_path, capsys):
    merged, alone = tmp_path / "merged.ckpt", tmp_path / "control.safetensors"
    merge.main(["attach", str(base), str(merged), "--half", "--hint-channels", "1"])
    assert torch.load(merged, weights_only=True)["state_dict"]
    merge.main(["extract", str(merged), str(alone)])
    control = load_state_dict(alone)
    assert all(k.startswith("control_model.") and v.dtype == torch.float16 for k, v in control.items())
    assert control["control_model.input_hint_block.0.weight"].shape[1] == 1
    with pytest.raises(CheckpointError, match="without a ControlNet; a ControlNet is needed"):
        merge.main(["extract", str(base), str(tmp_path / "x.safetensors")])
    capsys.readouterr()
    merge.main(["info", str(base)])
    said = capsys.readouterr().out
    assert "ControlNet   none" in said and "model        tiny" in said and "float32" in said


def other(base, path, seed: int):
    """Another model of the same kind: every weight of `base` moved a little."""
    generator = torch.Generator().manual_seed(seed)
    state = {k: v + 0.01 * torch.randn(v.shape, generator=generator) for k, v in load_state_dict(base).items()}
    save_safetensors(path, state, load_metadata(base))
    return path


def test_transfer_adds_what_the_other_base_has_more(base, tmp_path):
    a, b = base, other(base, tmp_path / "b.safetensors", 1)
    whole, alone, out = (tmp_path / f"{name}.safetensors" for name in ("whole", "alone", "out"))
    merge.main([str(a), str(whole)])
    trained = {k: v + 0.1 * k.startswith("control_model.") for k, v in load_state_dict(whole).items()}
    save_safetensors(whole, trained, load_metadata(a))
    merge.main(["extract", str(whole), str(alone)])
    merge.main(["transfer", "--from-base", str(a), "--control", str(whole), "--to-base", str(b), str(out)])
    left, right, got = load_state_dict(a), load_state_dict(b), load_state_dict(out)
    for key, value in trained.items():
        if key.startswith("control_model."):
            twin = key.replace("control_model.", "model.diffusion_model.")
            wanted = value + right[twin] - left[twin] if twin in left else value
        elif key in right:  # otherwise it is one of the buffers that attach adds
            wanted = right[key]
        assert key not in got or torch.allclose(got[key], wanted, atol=1e-6), key
    assert got.keys() == right.keys() | {k for k in trained if k.startswith("control_model.")}
    merge.main(["transfer", "--from-base", str(a), "--control", str(alone), "--to-base", str(b), str(out), "--force"])
    assert all(torch.allclose(v, got[k], atol=1e-6) for k, v in load_state_dict(out).items())
    with pytest.raises(CheckpointError, match="no ControlNet in it"):
        merge.main(["transfer", "--from-base", str(a), "--control", str(b), "--to-base", str(b), str(out), "--force"])


def test_another_vae_the_moving_average_and_clip_skip(base, tmp_path):
    state, b = load_state_dict(base), load_state_dict(other(base, tmp_path / "b.safetensors", 2))
    bare = {k.removeprefix("first_stage_model."): v for k, v in b.items() if k.startswith("first_stage_model.")}
    torch.save({"state_dict": bare}, tmp_path / "vae.ckpt")  # as vae-ft-mse-840000-ema-pruned.ckpt
    model = load_model(ModelSource(base, vae=tmp_path / "vae.ckpt"))
    for key, value in model.state_dict().items():
        assert torch.equal(value, (b if key.startswith("first_stage_model.") else state)[key])
    narrow = {k: v[:1] for k, v in bare.items()}
    torch.save(narrow, tmp_path / "narrow.pt")
    with pytest.raises(CheckpointError, match="narrow.pt: a VAE of another shape"):
        load_model(ModelSource(base, vae=tmp_path / "narrow.pt"))
    with pytest.raises(CheckpointError, match="without a ControlNet; a ControlNet is needed"):
        load_model(ModelSource(base, control=base))

    average = {
        "model_ema." + k.removeprefix("model.").replace(".", ""): v for k, v in b.items() if k.startswith("model.")
    }
    with_ema = tmp_path / "ema.safetensors"
    save_safetensors(with_ema, state | average, load_metadata(base))
    plain, averaged = (load_model(ModelSource(with_ema, ema=ema)).unet.state_dict() for ema in (False, True))
    assert all(torch.equal(v, state["model.diffusion_model." + k]) for k, v in plain.items())
    assert all(torch.equal(v, b["model.diffusion_model." + k]) for k, v in averaged.items())
    with pytest.raises(CheckpointError, match="no moving average"):
        load_model(ModelSource(base, ema=True))

    skipping = load_model(ModelSource(base, clip_skip=2))
    assert len(skipping.text.text_model.encoder.layers) == TINY.text.layers - 1
    full = load_model(base)
    del full.text.text_model.encoder.layers[-1]
    assert torch.equal(skipping.encode_prompts("red"), full.encode_prompts("red"))
    with pytest.raises(CheckpointError, match="--clip-skip is 3"):
        load_model(ModelSource(base, clip_skip=3))


def test_unknown_keys_pass_through(base, tmp_path):
    state = load_state_dict(base) | {"cond_stage_model.model.logit_scale": torch.tensor(4.6), "betas": torch.ones(3)}
    odd, out = tmp_path / "odd.safetensors", tmp_path / "out.safetensors"
    save_safetensors(odd, state, load_metadata(base))
    merge.main([str(odd), str(out)])
    written = load_state_dict(out)
    assert all(torch.equal(written[k], v) for k, v in state.items())


def unet(channels: int, context: int, inputs: int = 4) -> dict[str, torch.Tensor]:
    """As much of a UNet as tells its family."""
    return {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(channels, inputs, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(1, context),
    }


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (unet(320, 768, 9), "9 input channels .inpainting has 9"),
        (unet(128, 768), "128 channels with prompts of width 768; supported are SD 1.x"),
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)}, "SDXL"),
        (unet(320, 768) | {"model.diffusion_model.label_emb.0.0.weight": torch.zeros(1)}, "SDXL"),
        ({"conditioner.embedders.0.x": torch.zeros(1)}, "an SDXL model; a Stable Diffusion 1.x or 2.x"),
        ({"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(1)}, "a LoRA"),
        ({"model.diffusion_model.double_blocks.0.x": torch.zeros(1)}, "a diffusion transformer"),
        ({"encoder.down.0.block.0.norm1.weight": torch.zeros(1)}, "a VAE alone; a Stable Diffusion 1.x"),
        ({"zero_convs.0.0.weight": torch.zeros(1), "input_hint_block.0.weight": torch.zeros(1)}, "a ControlNet alone"),
        ({"text_model.embeddings.token_embedding.weight": torch.zeros(1, 1)}, "a text encoder alone"),
        ({"x": torch.zeros(1)}, "no Stable Diffusion UNet in it .keys like .*, but x and others"),
    ],
)
def test_what_cannot_be_used_is_named(state, says, tmp_path):
    save_safetensors(tmp_path / "file.safetensors", state)
    with pytest.raises(CheckpointError, match=f"file.safetensors: .*{says}"):
        load_model(tmp_path / "file.safetensors")


def test_sd2_says_how_to_ask_for_v(tmp_path, capsys):
    save_safetensors(tmp_path / "sd2.safetensors", unet(320, 1024))
    assert read_model(tmp_path / "sd2.safetensors")[1].name == "sd21"
    assert "--prediction v" in capsys.readouterr().out
    assert read_model(ModelSource(tmp_path / "sd2.safetensors", prediction="v"))[1].name == "sd21_v"
    assert capsys.readouterr().out == ""
    folder = tmp_path / "folder"  # a diffusers folder says which
    for name in ("unet", "scheduler"):
        (folder / name).mkdir(parents=True)
    save_safetensors(folder / "unet" / "diffusion_pytorch_model.safetensors", unet(320, 1024))
    save_json(folder / "scheduler" / "scheduler_config.json", {"prediction_type": "v_prediction"})
    save_json(folder / "model_index.json", {})
    assert read_model(folder)[1].name == "sd21_v" and capsys.readouterr().out == ""


@pytest.fixture
def run(base, folder, tmp_path):
    """A run of two steps with the decoder unlocked."""
    return train.train(
        train.Config(
            base=str(base),
            data=str(folder),
            out=str(tmp_path / "run"),
            steps=2,
            learning_rate=1e-3,
            sd_locked=False,
            cache_dir=str(tmp_path / "cache"),
            logger_freq=0,
            device="cpu",
            workers=0,
        )  # fmt: skip
    )


def test_a_run_is_exported_whole_and_extracted_with_a_warning(run, base, tmp_path, capsys):
    trained = load_model(run).state_dict()
    for out in ("whole.safetensors", "whole.ckpt", "folder"):
        merge.main(["export", str(run), str(tmp_path / out)])
        assert all(torch.equal(v, trained[k]) for k, v in load_state_dict(tmp_path / out).items())
    assert all(torch.equal(v, trained[k]) for k, v in load_model(tmp_path / "folder").state_dict().items())
    capsys.readouterr()
    merge.main(["extract", str(run), str(tmp_path / "control.safetensors")])
    assert "decoder" in capsys.readouterr().out
    merge.main(["extract", str(run), str(tmp_path / "control"), "--format", "diffusers"])
    control = {k: v for k, v in trained.items() if k.startswith("control_model.")}
    joined = merge_sources(ModelSource(base, control=tmp_path / "control"))
    assert all(torch.equal(v, joined[k]) for k, v in control.items())
    merge.main(["extract", str(run), str(tmp_path / "d.safetensors"), "--difference", str(base)])
    assert any("its difference to the UNet of a base" in line for line in merge.info(tmp_path / "d.safetensors"))
    assert "difference" in load_state_dict(tmp_path / "d.safetensors")
    with pytest.raises(CheckpointError, match="diffusers has none"):
        merge.main(["extract", str(run), str(tmp_path / "d"), "--format", "diffusers", "--difference", str(base)])
    merge.main(["info", str(run)])
    said = capsys.readouterr().out
    assert "step 2, 8 samples" in said and "learning_rate" in said and "ControlNet" in said
    assert "missing" in said  # of the UNet only the decoder is in a run's checkpoint


def test_the_moving_average_of_a_run_is_extracted(base, folder, tmp_path):
    """What draws is what is exported and extracted."""
    config = train.Config(
        base=str(base), data=str(folder), out=str(tmp_path / "run"), steps=2, learning_rate=1e-3, logger_freq=0,
        cache_dir=str(tmp_path / "cache"), device="cpu", workers=0, ema_decay=0.9,
    )  # fmt: skip
    run = train.train(config)
    drawn = load_model(run).control_model.state_dict()
    raw = load_model(ModelSource(run, use_run_ema=False)).control_model.state_dict()
    merge.main(["extract", str(run), str(tmp_path / "control.safetensors")])
    got = {k.removeprefix("control_model."): v for k, v in load_state_dict(tmp_path / "control.safetensors").items()}
    assert got.keys() == drawn.keys() and all(torch.equal(v, drawn[k]) for k, v in got.items())
    assert not all(torch.equal(v, raw[k]) for k, v in got.items())


def test_a_run_is_no_base(run, folder, tmp_path):
    """What trains on it could be neither resumed nor drawn with."""
    config = train.Config(base=str(run), data=str(folder), out=str(tmp_path / "second"), device="cpu", workers=0)
    with pytest.raises(ConfigError, match=f"--base {run} is the folder of a run: `python merge.py export {run} FILE`"):
        train.train(config)
    assert not (tmp_path / "second").exists()


def test_a_control_takes_the_place_of_another_as_a_whole(base, tmp_path):
    """A smaller one must not be completed from the one that was there, on a file, in a run's base, or in a transfer."""
    full, small, out = (tmp_path / f"{name}.safetensors" for name in ("full", "small", "out"))
    merge.main(["attach", str(base), str(full)])
    merge.main(["attach", str(base), str(small), "--control-depth", "mid"])
    merge.main(["extract", str(small), str(tmp_path / "control.safetensors")])
    wanted = {k for k in load_state_dict(small) if k.startswith("control_model.")}
    of = lambda state: {k for k in state if k.startswith("control_model.")}
    source = ModelSource(full, control=tmp_path / "control.safetensors")
    assert load_model(source).config.control_depth == load_model(small).config.control_depth != None  # noqa: E711
    assert of(merge_sources(source)) == wanted < of(load_state_dict(full))
    merge.main(["transfer", "--from-base", str(base), "--control", str(small), "--to-base", str(full), str(out)])
    assert of(load_state_dict(out)) == wanted
    incomplete = {k: v for k, v in load_state_dict(full).items() if k.startswith("control_model.") and "zero" not in k}
    save_safetensors(tmp_path / "control.safetensors", incomplete)
    with pytest.raises(CheckpointError, match="missing"):
        load_model(source)


def test_a_transfer_keeps_what_a_folder_says_beside_its_weights(base, tmp_path):
    whole, to, out = tmp_path / "whole.safetensors", tmp_path / "to", tmp_path / "out.safetensors"
    merge.main(["attach", str(base), str(whole)])
    merge.main(["export", str(base), str(to)])
    scheduler = json.loads((to / "scheduler/scheduler_config.json").read_text())
    changed = {"prediction_type": "epsilon", "beta_end": 0.015}
    (to / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler | changed))
    expected = read_model(to)[1]
    merge.main(["transfer", "--from-base", str(base), "--control", str(whole), "--to-base", str(to), str(out)])
    got = read_model(out)[1]
    assert (got.prediction, got.linear_end) == (expected.prediction, expected.linear_end) == ("eps", 0.015)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_a_transfer_between_formats(base, tmp_path, dtype):
    small, whole, out = (tmp_path / f"{name}.safetensors" for name in ("small", "whole", "out"))
    save_safetensors(small, {k: v.to(dtype) for k, v in load_state_dict(base).items()}, load_metadata(base))
    merge.main(["attach", str(base), str(whole)])
    merge.main(["transfer", "--from-base", str(base), "--control", str(whole), "--to-base", str(small), str(out)])
    assert load_model(out).control_model is not None


def test_training_goes_on_from_a_controlnet_alone(run, base, folder, tmp_path):
    merge.main(["extract", str(run), str(tmp_path / "control.safetensors")])
    again = train.train(
        train.Config(
            base=str(base),
            data=str(folder),
            out=str(tmp_path / "again"),
            steps=1,
            learning_rate=0.0,
            control=str(tmp_path / "control.safetensors"),
            vae=str(base),
            cache_dir=str(tmp_path / "cache"),
            logger_freq=0,
            device="cpu",
            workers=0,
            weight_decay=0.0,
        )  # fmt: skip
    )
    before, after = (load_state_dict(newest_checkpoint(r) / "trained.safetensors") for r in (run, again))
    assert all(torch.equal(v, before[k]) for k, v in after.items()) and after.keys() < before.keys()
    (tmp_path / "control.safetensors").unlink()  # the run is whole without it
    load_model(again)
    assert json.loads((again / "config.json").read_text())["vae"] == str(base)
    with pytest.raises(CheckpointError, match="a run has its own ControlNet"):
        merge_sources(ModelSource(again, control=base))


def test_what_stands_in_the_way_is_not_removed(run, base, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    whole = tmp_path / "whole.safetensors"
    merge.main(["export", str(run), str(whole)])
    for out in (tmp_path / "mine", run):
        with pytest.raises(CheckpointError, match="not of diffusers' kind|is an input"):
            merge.main(["export", str(whole), str(out), "--force"])
    with pytest.raises(CheckpointError, match="is an input"):
        merge.main(["export", str(whole), str(whole), "--force"])
    folder = tmp_path / "sd1.5"  # a name with a dot is a folder's too
    merge.main(["export", str(whole), str(folder)])
    merge.main(["export", str(whole), str(folder), "--force"])  # ours to replace
    with pytest.raises(CheckpointError, match="is an input"):
        merge.main(["extract", str(folder), str(folder), "--format", "diffusers", "--force"])
    with pytest.raises(CheckpointError, match="the output is a folder"):
        merge.main(["extract", str(whole), str(tmp_path / "x.safetensors"), "--format", "diffusers"])
    with pytest.raises(CheckpointError, match="--base goes with the folder of a run"):
        merge.main(["export", str(whole), str(tmp_path / "new"), "--base", "nothing"])
    assert (tmp_path / "mine" / "thesis.txt").exists() and newest_checkpoint(run)


def test_differences_are_not_taken_for_weights(base, tmp_path):
    """Also in bare names, and neither twice nor of another kind of model."""
    whole, diff, bare = (tmp_path / f"{name}.safetensors" for name in ("whole", "diff", "bare"))
    merge.main([str(base), str(whole)])
    merge.main(["extract", str(whole), str(diff), "--difference", str(base)])
    state = {k.removeprefix("control_model."): v for k, v in load_state_dict(diff).items()}
    save_safetensors(bare, state)
    for form in (diff, bare):
        joined = merge_sources(ModelSource(base, control=form))
        wanted = {k: v for k, v in load_state_dict(whole).items() if k.startswith("control_model.")}
        assert all(torch.allclose(v, joined[k]) for k, v in wanted.items()) and joined.keys() > wanted.keys()
    with pytest.raises(CheckpointError, match="holds differences already"):
        merge.main(["extract", str(diff), str(tmp_path / "x.safetensors"), "--difference", str(base)])
    wide = {k: v.repeat(2, *[1] * (v.ndim - 1)) if v.ndim else v for k, v in load_state_dict(diff).items()}
    save_safetensors(tmp_path / "wide.safetensors", wide)
    with pytest.raises(CheckpointError, match="wide.safetensors: a ControlNet of another kind of model"):
        merge_sources(ModelSource(base, control=tmp_path / "wide.safetensors"))


def test_a_model_that_is_not_whole_is_not_exported(base, tmp_path):
    state = {k: v for k, v in load_state_dict(base).items() if not k.startswith("first_stage_model.decoder.")}
    save_safetensors(tmp_path / "part.safetensors", state, load_metadata(base))
    with pytest.raises(CheckpointError, match="not a whole model: .* tensors of the VAE"):
        merge.main(["export", str(tmp_path / "part.safetensors"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    for a, b in (("part", "vae"), ("vae", "part")):
        vae = {k: v for k, v in state.items() if k.startswith("first_stage_model.")}
        save_safetensors(tmp_path / "vae.safetensors", vae)
        merge.main([str(base), str(tmp_path / "whole.safetensors"), "--force"])
        with pytest.raises(CheckpointError, match="vae.safetensors: a VAE alone"):
            merge.main(
                ["transfer", "--from-base", str(tmp_path / f"{a}.safetensors"), "--control",
                 str(tmp_path / "whole.safetensors"), "--to-base", str(tmp_path / f"{b}.safetensors"),
                 str(tmp_path / "y.safetensors")]
            )  # fmt: skip


def test_spellings_of_the_wild(base, tmp_path):
    """A text tower without `text_model.`, a VAE with its loss, another program's `config` in the metadata."""
    state = load_state_dict(base)
    odd = {k.replace("transformer.text_model.", "transformer."): v for k, v in state.items()}
    odd |= {"first_stage_model.loss.logvar": torch.zeros(()), "betas": torch.ones(3)}
    save_safetensors(tmp_path / "odd.safetensors", odd, load_metadata(base))
    model = load_model(ModelSource(tmp_path / "odd.safetensors", vae=tmp_path / "odd.safetensors"))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert "first_stage_model.loss.logvar" not in merge_sources(ModelSource(base, vae=tmp_path / "odd.safetensors"))
    merge.main(["export", str(tmp_path / "odd.safetensors"), str(tmp_path / "folder")])
    again = load_model(tmp_path / "folder").state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.items())
    merge.main([str(tmp_path / "odd.safetensors"), str(tmp_path / "half.safetensors"), "--half"])
    half = load_state_dict(tmp_path / "half.safetensors")
    assert half["betas"].dtype == torch.float32  # the schedule's buffers keep their precision
    assert half["model.diffusion_model.out.2.bias"].dtype == torch.float16
    for config in ("{}", "not json", '{"unet": 3}', '{"name": "x", "new": 1}'):
        save_safetensors(tmp_path / "foreign.safetensors", {"x": torch.ones(1)}, {"config": config})
        with pytest.raises(CheckpointError):
            load_model(tmp_path / "foreign.safetensors")
        merge.main(["info", str(tmp_path / "foreign.safetensors")])


def test_export_keeps_what_weights_cannot_tell(base, tmp_path):
    merge.main(["export", str(base), str(tmp_path / "eps.safetensors"), "--prediction", "eps"])
    assert read_model(tmp_path / "eps.safetensors")[1].prediction == "eps" != TINY.prediction
