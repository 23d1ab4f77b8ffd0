"""What other programs write and expect: buffers, settings beside the weights, tensors of other kinds, names, notes."""

import dataclasses
import gzip
import json
import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DISABLE_TELEMETRY": "1"}

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch

import merge
import sampler
import train
from ldm import SD15, SD21, SD21_V, TINY, ControlLDM
from tests.conftest import GOLDEN, distance, golden
from tests.test_exchange import NEGATIVE, PROMPT, V1
from weights import CheckpointError, ModelSource, load_model, load_state_dict, source
from weights.configs import metadata_config
from weights.reading import load_metadata
from weights.source import merge_sources, read_model
from weights.writing import save_json, save_safetensors

CONTROL, UNET = "control_model.", "model.diffusion_model."
CLOSE = 4e-6


def full_list(name: str) -> dict[str, list[int]]:
    """Every key and shape of the original's model with its ControlNet: the list in tests/golden, and `logvar`."""
    listed = json.loads(gzip.decompress((GOLDEN / f"{name}_keys.json.gz").read_bytes()))
    return listed | {"logvar": [1000]}


def random_model(config, seed: int = 1, control: bool = True) -> ControlLDM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ControlLDM(config, 3 if control else None).eval().requires_grad_(False)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.05) if not p.any() else None
    return model


def save_model(path, model: ControlLDM, without: str = "") -> None:
    state = {k: v for k, v in model.state_dict().items() if not (without and k.startswith(without))}
    save_safetensors(path, state, {"config": model.config.to_json()})


# ---------------------------------------------------------------------------------------------------------- attaching
@pytest.mark.parametrize("lacks", ["logvar", "all buffers"])
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_an_attached_file_has_the_original_s_keys(name, lacks, monkeypatch):
    """Key by key and shape by shape, whatever the base lacks; of SD 2.x also the text weights that nobody computes."""
    wanted = full_list(name)
    unused = (".resblocks.23.", "text_projection", "logit_scale")
    base = {k: torch.zeros(()).expand(v) for k, v in wanted.items() if not k.startswith(CONTROL) and k != "logvar"}
    if lacks == "all buffers":  # as in a diffusers folder, or a file that ComfyUI saved
        base = {k: v for k, v in base.items() if "." in k and not any(w in k for w in (*unused, "position_ids"))}
    monkeypatch.setattr(source, "load_state_dict", lambda path: dict(base))
    state, config, _ = merge.attach(ModelSource("base.ckpt", hint_channels=3))
    assert {k: list(v.shape) for k, v in state.items()} == wanted and config == {"sd15": SD15, "sd21": SD21}[name]
    assert all(state[k] is v for k, v in base.items())


def test_the_buffers_are_the_original_s(tmp_path, base):
    want = golden("schedule_buffers")
    positions = want.pop("positions").tolist()
    config = dataclasses.replace(TINY, linear_end=SD15.linear_end)  # the schedule follows the model's configuration
    save_safetensors(tmp_path / "base.safetensors", load_state_dict(base), {"config": config.to_json()})
    merge.main([str(tmp_path / "base.safetensors"), str(tmp_path / "sd.safetensors"), "--half"])
    merge.main([str(base), str(tmp_path / "tiny.safetensors")])
    sd, tiny = (load_state_dict(tmp_path / f"{name}.safetensors") for name in ("sd", "tiny"))
    buffers = {k: v for k, v in sd.items() if "." not in k}
    assert buffers.keys() == want.keys() and len(buffers) == 13
    for name, values in want.items():
        assert buffers[name].shape == (1000,) and buffers[name].dtype == torch.float32
        assert torch.equal(buffers[name][positions], values), name
    assert torch.equal(tiny["alphas_cumprod"], sampler.alphas_cumprod(TINY))
    assert torch.equal(sd["cond_stage_model.transformer.text_model.embeddings.position_ids"], torch.arange(77)[None])
    own = {"betas": torch.ones(3), "logvar": torch.full((1000,), 2.0)}
    save_safetensors(tmp_path / "own.safetensors", load_state_dict(base) | own, load_metadata(base))
    merge.main([str(tmp_path / "own.safetensors"), str(tmp_path / "out.safetensors")])
    assert all(torch.equal(load_state_dict(tmp_path / "out.safetensors")[k], v) for k, v in own.items())


@pytest.mark.parametrize("zero", [False, True])
def test_one_schedule(zero):
    config = dataclasses.replace(SD21_V, zero_terminal_snr=zero)
    betas, alphas = sampler.noise_schedule(config.linear_start, config.linear_end, config.timesteps, zero)
    assert np.allclose(np.cumprod(1 - betas), alphas, rtol=1e-9, atol=0)
    assert torch.equal(torch.from_numpy(alphas).float(), sampler.alphas_cumprod(config))


# -------------------------------------------------------------------------------------------- a ControlNet's settings
@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of random weights, its base alone as a file, and its ControlNet as diffusers' class and folder."""
    folder, model = tmp_path_factory.mktemp("small"), random_model(V1)
    save_model(folder / "whole.safetensors", model)
    save_model(folder / "base.safetensors", model, without=CONTROL)
    merge.main(["extract", str(folder / "whole.safetensors"), str(folder / "control"), "--format", "diffusers"])
    return model, folder


def changed(small, path, **settings) -> diffusers.ControlNetModel:
    """The ControlNet of `small` with other settings in its config.json, saved by diffusers to `path`."""
    control = diffusers.ControlNetModel.from_pretrained(small[1] / "control", **settings).eval()
    control.save_pretrained(path)
    return control


@torch.no_grad()
def off(model: ControlLDM, control: diffusers.ControlNetModel) -> float:
    """The largest distance of our residuals from those of diffusers."""
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([7, 801]), torch.randn(2, 77, 40)
    hint = torch.rand(2, 3, 64, 64)
    down, mid = control(x, t, context, controlnet_cond=hint, return_dict=False)
    ours = model.control_model(x, hint, t, context)
    assert [r.shape for r in ours] == [r.shape for r in (*down, mid)]
    pairs = zip(ours, [*down, mid], strict=True)
    eps, wanted = (model.unet(x, t, context, residuals) for residuals in (ours, [*down, mid]))
    return max(distance(eps, wanted), *(distance(a, b) for a, b in pairs))


SETTINGS = [
    {"controlnet_conditioning_channel_order": "bgr"},
    {"global_pool_conditions": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_diffusers_controlnet_s_settings_are_followed_and_kept(settings, small, tmp_path):
    theirs, base = changed(small, tmp_path / "theirs", **settings), small[1] / "base.safetensors"
    pooled = settings.get("global_pool_conditions", False)
    weights = tmp_path / "theirs" / "diffusion_pytorch_model.safetensors"
    for control in (tmp_path / "theirs", weights):
        model = load_model(ModelSource(base, control=control))
        assert model.control_model.global_pool == pooled and off(model, theirs) < CLOSE
    export = ["export", str(base), "--control", str(tmp_path / "theirs")]
    merge.main([*export, str(tmp_path / "folder")])
    merge.main([*export, str(tmp_path / "file.safetensors")])
    merge.main(["extract", str(tmp_path / "theirs"), str(tmp_path / "a.safetensors")])
    merge.main(["extract", str(tmp_path / "file.safetensors"), str(tmp_path / "b"), "--format", "diffusers"])
    merge.main(["extract", str(tmp_path / "a.safetensors"), str(tmp_path / "d.safetensors"), "--difference", str(base)])
    merge.main(
        ["transfer", "--from-base", str(base), "--control", str(tmp_path / "a.safetensors"), "--to-base", str(base),
         str(tmp_path / "moved.safetensors")]
    )  # fmt: skip
    for whole in ("folder", "file.safetensors", "moved.safetensors"):
        assert off(load_model(tmp_path / whole), theirs) < CLOSE, whole
    for alone in ("a.safetensors", "b"):
        assert off(load_model(ModelSource(base, control=tmp_path / alone)), theirs) < CLOSE, alone
    model = load_model(ModelSource(base, control=tmp_path / "d.safetensors"))
    assert model.control_model.global_pool == pooled and off(model, theirs) < 1e-4
    for folder in ("folder/controlnet", "b"):
        again = diffusers.ControlNetModel.from_pretrained(tmp_path / folder).eval()
        assert (
            off(model := load_model(tmp_path / "folder"), again) < CLOSE and model.control_model.global_pool == pooled
        )
        assert again.config.controlnet_conditioning_channel_order == "rgb"


@torch.no_grad()
@pytest.mark.parametrize("guess", [False, True])
def test_the_pipeline_draws_a_pooled_controlnet_alike(guess, small, tmp_path):
    changed(small, tmp_path / "pooled", global_pool_conditions=True)
    merge.main(
        ["export", str(small[1] / "base.safetensors"), str(tmp_path / "all"), "--control", str(tmp_path / "pooled")]
    )
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(tmp_path / "all")
    pipe.set_progress_bar_config(disable=True)
    noise, _ = sampler.starting_noise((1, 4, 8, 8), seed=5)
    hint = torch.rand(1, 3, 64, 64)
    theirs = pipe(
        PROMPT, image=hint, latents=noise, num_inference_steps=5, guidance_scale=4.0, negative_prompt=NEGATIVE,
        guess_mode=guess, output_type="latent",
    ).images  # fmt: skip
    model = load_model(tmp_path / "all")
    context, negative = model.encode_prompts([PROMPT]), model.encode_prompts([NEGATIVE])
    settings = sampler.Sampling(steps=5, scale=4.0, seed=5, guess_mode=guess)
    draw = lambda: sampler.sample(
        model, context, negative, [sampler.Control(model.control_model, hint)], (64, 64), settings
    )
    assert distance(draw(), theirs) < 1e-4
    model.control_model.global_pool = False
    assert distance(draw(), theirs) > 1e-2


def test_training_keeps_global_pooling(base, folder, tmp_path):
    """From the folder of diffusers to the run, through a resume, to what is exported."""
    whole = tmp_path / "whole.safetensors"
    merge.main([str(base), str(whole)])
    merge.main(["extract", str(whole), str(tmp_path / "control"), "--format", "diffusers"])
    settings = json.loads((tmp_path / "control" / "config.json").read_text())
    save_json(tmp_path / "control" / "config.json", settings | {"global_pool_conditions": True})
    config = train.Config(
        base=str(base), data=str(folder), control=str(tmp_path / "control"), out=str(tmp_path / "run"), steps=1,
        learning_rate=1e-3, cache_dir=str(tmp_path / "cache"), logger_freq=0, device="cpu", workers=0, batch_size=2,
    )  # fmt: skip
    run = train.train(config)
    assert load_model(run).control_model.global_pool
    run = train.train(train.parse(["--resume", str(run), "--steps", "2"])[0], resume=run)
    model = load_model(run)
    assert model.control_model.global_pool and model.config.global_pool
    merge.main(["extract", str(run), str(tmp_path / "out"), "--format", "diffusers"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["global_pool_conditions"] is True
    merge.main(["extract", str(run), str(tmp_path / "out.safetensors")])
    assert load_model(ModelSource(base, control=tmp_path / "out.safetensors")).control_model.global_pool
    assert not load_model(whole).control_model.global_pool


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"controlnet_conditioning_channel_order": "gbr"}, "controlnet_conditioning_channel_order is 'gbr'.*rgb.*bgr"),
        ({"global_pool_conditions": "yes"}, "global_pool_conditions is 'yes'"),
        ({"global_pool_conditions": 1}, "global_pool_conditions is 1;"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu'"), ({"norm_eps": 1e-6}, "norm_eps is 1e-06"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos is False"), ({"class_embed_type": "x"}, "class_embed_type"),
        ({"transformer_layers_per_block": [1, 2, 10]}, "transformer_layers_per_block"),
        ({"_class_name": "ControlNetUnionModel"}, "ControlNetUnionModel"), ({"_class_name": 3}, "a 3 is not"),
        ({"attention_head_dim": 8}, "attention_head_dim is 8, that of small v1 is .4, 4, 4, 4."),
        ({"norm_num_groups": 16}, "norm_num_groups is 16"), ({"a_new_setting": 0.5}, "'a_new_setting' is not known"),
    ],
)  # fmt: skip
def test_settings_that_are_not_known_are_refused(fields, says, small, tmp_path):
    changed(small, tmp_path / "control")
    settings = json.loads((tmp_path / "control" / "config.json").read_text())
    save_json(tmp_path / "control" / "config.json", settings | {"a_setting_without_effect": None} | fields)
    with pytest.raises(CheckpointError, match=f"control/config.json: .*{says}") as e:
        load_model(ModelSource(small[1] / "base.safetensors", control=tmp_path / "control"))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("network", "fields", "says"),
    [
        ("unet", {"act_fn": "relu"}, "act_fn"), ("unet", {"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256"),
        ("unet", {"attention_head_dim": [8, 8, 8, 8]}, "attention_head_dim"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"), ("vae", {"latents_mean": [1.0]}, "latents_m"),
        ("vae", {"scaling_factor": "x"}, "scaling_factor is 'x', should be a number"),
        ("text_encoder", {"hidden_act": "gelu"}, "hidden_act is 'gelu', that of small v1 is quick_gelu"),
        ("text_encoder", {"num_attention_heads": 8}, "num_attention_heads is 8"),
    ],
)  # fmt: skip
def test_settings_of_the_other_networks(network, fields, says, small, tmp_path):
    merge.main(["export", str(small[1] / "base.safetensors"), str(tmp_path / "folder")])
    file = tmp_path / "folder" / network / "config.json"
    save_json(file, json.loads(file.read_text()) | fields)
    with pytest.raises(CheckpointError, match=f"{network}/config.json: .*{says}"):
        load_model(tmp_path / "folder")


def test_the_scale_of_the_latents_is_the_vae_s(small, tmp_path):
    merge.main(["export", str(small[1] / "base.safetensors"), str(tmp_path / "folder")])
    file = tmp_path / "folder" / "vae" / "config.json"
    save_json(file, json.loads(file.read_text()) | {"scaling_factor": 0.13025})
    assert load_model(tmp_path / "folder").config.scale_factor == 0.13025
    with pytest.raises(
        CheckpointError, match="vae/config.json: scaling_factor is 0.13025, that of small v1 is 0.18215"
    ):
        load_model(ModelSource(small[1] / "base.safetensors", vae=tmp_path / "folder" / "vae"))


def test_an_incomplete_controlnet_or_vae_is_blamed_itself(small, tmp_path):
    model, folder = small
    state, base = model.state_dict(), str(folder / "base.safetensors")
    diff = tmp_path / "diff.safetensors"
    merge.main(["extract", str(folder / "whole.safetensors"), str(diff), "--difference", base])
    cases = {
        "c.safetensors": {k: v for k, v in state.items() if k.startswith(CONTROL) and "zero_convs" not in k},
        "d.safetensors": {k: v for k, v in load_state_dict(diff).items() if "middle_block_out" not in k},
    }
    for name, tensors in cases.items():
        save_safetensors(tmp_path / name, tensors)
        with pytest.raises(CheckpointError, match=f"{name}: .*weights under control_model. missing"):
            merge.main(["export", base, str(tmp_path / "x"), "--control", str(tmp_path / name)])
    vae = {k: v for k, v in state.items() if k.startswith("first_stage_model.decoder.")}
    save_safetensors(tmp_path / "v.safetensors", vae)
    with pytest.raises(CheckpointError, match="v.safetensors: lacks first_stage_model"):
        merge.main(["export", base, str(tmp_path / "x"), "--vae", str(tmp_path / "v.safetensors")])


# -------------------------------------------------------------------------------------------------- differences, hints
def test_a_difference_may_leave_out_what_did_not_change(small, tmp_path):
    """As the extension's extract_controlnet_diff.py writes it, with a mark of no dimension."""
    model, folder = small
    state, base = model.state_dict(), folder / "base.safetensors"
    moved, diff = {}, {"difference": torch.tensor(1.0)}
    for key in (k for k in state if k.startswith(CONTROL)):
        twin = UNET + key.removeprefix(CONTROL)
        moved[key] = state[twin] + 0.1 * ("time_embed" in key) if twin in state else state[key]
        if twin not in state or (moved[key] - state[twin]).abs().max() >= 1e-6:
            diff[key] = moved[key] - state.get(twin, 0)
    assert len(diff) < len(moved) - 50
    nothing = {k: v for k, v in diff.items() if "time_embed" not in k}
    for name, tensors in (("diff", diff), ("bare", {k.removeprefix(CONTROL): v for k, v in diff.items()})):
        save_safetensors(tmp_path / f"{name}.safetensors", tensors)
        got = load_model(ModelSource(base, control=tmp_path / f"{name}.safetensors")).state_dict()
        assert all(torch.allclose(got[k], v, atol=1e-6) for k, v in moved.items())
    save_safetensors(tmp_path / "none.safetensors", nothing)
    got = merge_sources(ModelSource(base, control=tmp_path / "none.safetensors"))
    key = CONTROL + "time_embed.0.weight"
    assert torch.equal(got[key], state[UNET + "time_embed.0.weight"]) and "difference" not in got
    merge.main(
        ["transfer", "--from-base", str(base), "--control", str(tmp_path / "diff.safetensors"), "--to-base", str(base),
         str(tmp_path / "out.safetensors")]
    )  # fmt: skip
    got = load_state_dict(tmp_path / "out.safetensors")
    assert all(torch.allclose(got[k], v, atol=1e-6) for k, v in moved.items())


def test_export_with_a_controlnet_of_other_hint_widths(base, tmp_path):
    """As diffusers' trainer makes on the tiny base, whose own row has narrower ones."""
    control = ControlLDM(dataclasses.replace(TINY, hint_widths=(16, 32, 96, 256)))
    control.config = dataclasses.replace(TINY)
    save_model(tmp_path / "control.safetensors", control)
    out = tmp_path / "out"
    for target in (out, tmp_path / "out.safetensors"):
        merge.main(["export", str(base), str(target), "--control", str(tmp_path / "control.safetensors")])
        model = load_model(target)
        assert model.config.hint_widths == (16, 32, 96, 256)
        wanted = {k: v for k, v in control.state_dict().items() if k.startswith(CONTROL)}
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in wanted.items())
    loaded = diffusers.ControlNetModel.from_pretrained(out / "controlnet")
    assert loaded.config.conditioning_embedding_out_channels == [16, 32, 96, 256]


@torch.no_grad()
def test_a_gray_hint_encoder_is_widened(base, tmp_path, capsys):
    gray, wide = tmp_path / "gray.safetensors", tmp_path / "wide.safetensors"
    merge.main([str(base), str(gray), "--hint-channels", "1"])
    state = load_state_dict(gray)
    state |= {k: torch.randn_like(v) * 0.1 for k, v in state.items() if "zero_convs" in k or "input_hint_block" in k}
    save_safetensors(gray, state, load_metadata(gray))
    merge.main(["extract", str(gray), str(wide), "--hint-channels", "3"])
    assert "hints of 1" not in capsys.readouterr().out.split("wide.safetensors")[-1]
    one, three = load_model(gray), load_model(ModelSource(base, control=wide))
    hint = torch.rand(1, 1, 32, 32)
    a, b = one.control_model.embed_hint(hint), three.control_model.embed_hint(hint.expand(-1, 3, -1, -1))
    assert three.control_model.hint_channels == 3 and distance(b, a) < 1e-6
    merge.main(["extract", str(gray), str(tmp_path / "folder"), "--format", "diffusers", "--hint-channels", "3"])
    assert diffusers.ControlNetModel.from_pretrained(tmp_path / "folder").config.conditioning_channels == 3
    merge.main(["extract", str(wide), str(tmp_path / "same.safetensors"), "--hint-channels", "3"])
    with pytest.raises(CheckpointError, match="takes hints of 3 channels; --hint-channels widens"):
        merge.main(["extract", str(wide), str(tmp_path / "x.safetensors"), "--hint-channels", "4"])


# --------------------------------------------------------------------------------------- eps or v, names of text towers
def sd2(folder, deviation: float, prefix: str = "cond_stage_model.model."):
    """As much of an SD 2.x file as tells its kind; `deviation`: that of the tensor by which eps and v are told."""
    bias = torch.tensor([-deviation, deviation]).repeat(160)
    state = {
        UNET + "input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
        UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, 1024),
        UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias": bias,
        prefix + "ln_final.weight": torch.ones(1024),
    }
    save_safetensors(folder / "sd2.safetensors", state)
    return folder / "sd2.safetensors"


@pytest.mark.parametrize(("deviation", "predicts"), [(0.08, "eps"), (0.1, "v")])
def test_eps_and_v_are_told_by_the_weights(deviation, predicts, tmp_path, capsys):
    file = sd2(tmp_path, deviation)
    config = read_model(file)[1]
    said = capsys.readouterr().out
    assert config == {"eps": SD21, "v": SD21_V}[predicts] and f"predicts {predicts}" in said and "--prediction" in said
    for asked, row in (("eps", SD21), ("v", SD21_V)):
        assert read_model(ModelSource(file, prediction=asked))[1] == row
        said = capsys.readouterr().out
        assert ("to judge by its weights" in said) == (asked != predicts), said
    merge.main(["info", str(file)])
    assert f"{config.name} (to judge by its weights)" in capsys.readouterr().out
    save_safetensors(tmp_path / "own.safetensors", load_state_dict(file), {"config": SD21.to_json()})
    assert read_model(tmp_path / "own.safetensors")[1] == SD21 and capsys.readouterr().out == ""


def test_text_towers_in_the_names_of_stability_s_later_code(small, tmp_path):
    file = sd2(tmp_path, 0.0, "conditioner.embedders.0.model.")
    assert "cond_stage_model.model.ln_final.weight" in load_state_dict(file)
    state = {k.replace("cond_stage_model.", "conditioner.embedders.0."): v for k, v in small[0].state_dict().items()}
    save_safetensors(tmp_path / "sgm.safetensors", state, {"config": V1.to_json()})
    assert torch.equal(load_model(tmp_path / "sgm.safetensors").encode_prompts("x"), small[0].encode_prompts("x"))


# ------------------------------------------------------------------------------------------- precision, names and notes
@pytest.mark.parametrize("flags", [["--dtype", "bf16"], ["--half"], []], ids=str)
def test_every_output_has_the_precision_that_was_asked_for(flags, small, base, tmp_path):
    whole, alone = str(small[1] / "whole.safetensors"), str(small[1] / "base.safetensors")
    dtype = {"bf16": torch.bfloat16, "--half": torch.float16}.get(flags[-1]) if flags else torch.float32
    for i, command in enumerate((
        ["attach", alone, "OUT.safetensors"], ["attach", alone, "OUT.ckpt"], ["extract", whole, "OUT.safetensors"],
        ["extract", whole, "OUT", "--format", "diffusers"], ["export", whole, "OUT"],
        ["export", whole, "OUT.safetensors"], ["extract", whole, "OUT.safetensors", "--difference", alone],
        ["transfer", "--from-base", alone, "--control", whole, "--to-base", alone, "OUT.safetensors"],
    )):  # fmt: skip
        out = str(tmp_path / f"{i}")
        merge.main([*(word.replace("OUT", out) for word in command), *flags])
        for path in tmp_path.glob(f"{i}*"):
            weights = {k: v for k, v in load_state_dict(path).items() if "." in k and v.is_floating_point()}
            assert weights and {v.dtype for v in weights.values()} == {dtype}, command
    merge.main(["extract", str(tmp_path / "2.safetensors"), str(tmp_path / "up.safetensors"), "--dtype", "fp32"])
    assert {v.dtype for v in load_state_dict(tmp_path / "up.safetensors").values()} == {torch.float32}


def test_bare_names(small, tmp_path):
    whole, out = str(small[1] / "whole.safetensors"), tmp_path / "bare.safetensors"
    merge.main(["extract", whole, str(out), "--bare"])
    raw = safetensors.torch.load_file(out)
    assert raw.keys() == {k.removeprefix(CONTROL) for k in small[0].state_dict() if k.startswith(CONTROL)}
    assert all(torch.equal(v, small[0].state_dict()[CONTROL + k]) for k, v in raw.items())
    model = load_model(ModelSource(small[1] / "base.safetensors", control=out))
    assert torch.equal(model.control_model.time_embed[0].weight, small[0].control_model.time_embed[0].weight)
    with pytest.raises(CheckpointError, match="--bare"):
        merge.main(["extract", whole, str(tmp_path / "x"), "--bare", "--format", "diffusers"])


def said_of(name: str, config, folder, capsys, pooled: bool = False, flags=()) -> str:
    """What `extract` says of a ControlNet of the row `config`, the shapes of which are all that is full size."""
    state = {
        CONTROL + "input_hint_block.0.weight": torch.zeros(16, 3, 3, 3), CONTROL + "x": torch.zeros(1),
        CONTROL + "input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
        CONTROL + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(1, config.unet.context_dim),
    }  # fmt: skip
    save_safetensors(folder / "in.safetensors", state, {"global_pool": json.dumps(pooled)})
    capsys.readouterr()
    merge.main(["extract", str(folder / "in.safetensors"), str(folder / name), "--force", *flags])
    return capsys.readouterr().out


def test_what_works_where_is_said(small, base, tmp_path, capsys):
    said = lambda *args, **kwargs: said_of(*args, tmp_path, capsys, **kwargs)
    assert "control_sd15_NAME.safetensors" in said("mine.safetensors", SD15)
    assert "control_sd21_NAME.safetensors" in said("mine.safetensors", SD21)
    assert "note" not in said("control_sd15_mine.safetensors", SD15)
    assert "8 heads" in (noted := said("control_sd21_mine.safetensors", SD21)) and noted.count("note") == 1
    assert "xl" in said("control_sd15_pixl.safetensors", SD15)
    assert "_shuffle" in said("control_sd15_x.safetensors", SD15, pooled=True)
    assert "note" not in said("control_sd15_shuffle.safetensors", SD15, pooled=True)
    assert "choose another name" in said("control_sd15_shuffle.safetensors", SD15)
    merge.main(["extract", str(small[1] / "whole.safetensors"), str(tmp_path / "d.safetensors"), "--difference",
                str(small[1] / "base.safetensors")])  # fmt: skip
    out = capsys.readouterr().out
    assert "Load ControlNet Model (diff)" in out and "Forge" in out and "others have none" in out


def test_names_with_shuffle_pool_as_in_other_programs(small, tmp_path, capsys):
    state = {k: v for k, v in small[0].state_dict().items() if k.startswith(CONTROL)}
    for name in ("control_v11e_sd15_shuffle", "plain"):
        save_safetensors(tmp_path / f"{name}.safetensors", state)
        model = load_model(ModelSource(small[1] / "base.safetensors", control=tmp_path / f"{name}.safetensors"))
        assert model.control_model.global_pool == ("shuffle" in name) == ("shuffle" in capsys.readouterr().out)
    merge.main(["extract", str(tmp_path / "plain.safetensors"), str(tmp_path / "my_shuffle.safetensors")])
    model = load_model(ModelSource(small[1] / "base.safetensors", control=tmp_path / "my_shuffle.safetensors"))
    assert not model.control_model.global_pool  # the file says so itself


def test_a_pickle_says_what_it_loses(small, tmp_path, capsys, monkeypatch):
    merge.main(["export", str(small[1] / "whole.safetensors"), str(tmp_path / "small.ckpt")])
    assert "its shape" in capsys.readouterr().out
    state = load_state_dict(sd2(tmp_path, 0.1))
    lost = lambda config: merge.tell_lost("x.ckpt", state, {"config": config.to_json()}) or capsys.readouterr().out
    assert lost(SD21_V) == "" and "eps-prediction" in lost(SD21)
    state[UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] = torch.zeros(320, 768)
    assert lost(SD15) == ""
    assert "clip-skip" in lost(dataclasses.replace(SD15, text=dataclasses.replace(SD15.text, layers=11)))
    assert "v-prediction" in lost(dataclasses.replace(SD15, prediction="v"))
    assert "global pooling" in lost(dataclasses.replace(SD15, global_pool=True))


def test_sizes_numbers_and_metadata_are_written_for_people(base, tmp_path, capsys):
    merge.main([str(base), str(tmp_path / "a.safetensors")])
    merge.main(["info", str(tmp_path / "a.safetensors")])
    said = capsys.readouterr().out
    assert "0.00 GB" not in said and " MB" in said and '{"' not in said and "tiny" in said
    assert metadata_config("a", load_metadata(tmp_path / "a.safetensors")["config"]) == TINY
    save_safetensors(
        tmp_path / "b.safetensors", {"x": torch.ones(1)}, {"modelspec.title": "it", "n": '{"a": {"b": 3}}'}
    )
    merge.main(["info", str(tmp_path / "b.safetensors")])
    said = capsys.readouterr().out
    assert "1 tensor (" in said and "modelspec.title it" in said and "a.b" in said and "{" not in said


def test_attaching_to_a_folder_keeps_what_it_says(small, tmp_path):
    """The schedule and the prediction stand beside the weights in a folder; the file has them in its metadata."""
    merge.main(["export", str(small[1] / "base.safetensors"), str(tmp_path / "folder"), "--prediction", "v"])
    for file in (tmp_path / "folder").glob("*/*.safetensors"):  # as diffusers saves them
        if file.parent.name != "unet":
            safetensors.torch.save_file({k: v.clone() for k, v in safetensors.torch.load_file(file).items()}, file)
    scheduler = tmp_path / "folder" / "scheduler" / "scheduler_config.json"
    save_json(scheduler, json.loads(scheduler.read_text()) | {"beta_end": 0.02})
    merge.main([str(tmp_path / "folder"), str(tmp_path / "out.safetensors")])
    model, state = load_model(tmp_path / "out.safetensors"), load_state_dict(tmp_path / "out.safetensors")
    assert model.config.prediction == "v" and model.config.linear_end == 0.02
    assert torch.equal(state["alphas_cumprod"], sampler.alphas_cumprod(model.config))
