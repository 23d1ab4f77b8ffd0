"""SDXL in files: what is read and refused, what other programs read, and ControlNets smaller than their UNet."""

import copy
import dataclasses
import gzip
import json
import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DISABLE_TELEMETRY": "1"}

import diffusers
import numpy as np
import pytest
import torch

import merge
import sampler
from conditioning import whole_image
from controlnet import ControlNet
from ldm import SD15, SD21, SDXL, TINY, ControlLDM
from tests.conftest import GOLDEN, distance
from tests.test_clients import random_model, said_of, save_model
from tests.test_exchange import HINT, NEGATIVE, PROMPT, equal
from tests.test_sdxl import SMALL_SDXL
from vae import VAEConfig
from weights import CheckpointError, ModelSource, load_model, load_state_dict, source
from weights.clients import modelspec, notes
from weights.control_depth import depth_from_text, depth_of
from weights.detect import distilled, model_of_weights
from weights.reading import load_metadata
from weights.source import merge_sources, read_model
from weights.spelling import CONTROL, TEXT_1, TEXT_2, UNET, control_table, to_diffusers, unet_levels, unet_table
from weights.writing import save_json, save_safetensors

TINIER = dataclasses.replace(
    SMALL_SDXL,
    unet=dataclasses.replace(
        SMALL_SDXL.unet, model_channels=16, num_res_blocks=1, num_head_channels=8, norm_groups=8, context_dim=56,
        adm_in_channels=1568,
    ),
    vae=VAEConfig(ch=8, norm_groups=4), text=dataclasses.replace(SMALL_SDXL.text, width=24, mlp_width=48),
    text2=dataclasses.replace(SMALL_SDXL.text2, width=32, heads=4, mlp_width=64, projection=32),
)  # fmt: skip
SMALLER = (0, 1, 2)  # transformer blocks of a ControlNet for the small SDXL, which has (0, 2, 3)


def listed(name: str) -> dict:
    return json.loads(gzip.decompress((GOLDEN / f"sdxl_{name}.json.gz").read_bytes()))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A small SDXL with ControlNet, and the folder with its file, its base, and its diffusers folder."""
    folder = tmp_path_factory.mktemp("sdxl")
    model = random_model(TINIER)
    save_model(folder / "model.safetensors", model)
    save_model(folder / "base.safetensors", model, without=CONTROL)
    merge.main(["export", str(folder / "model.safetensors"), str(folder / "exported")])
    return model, folder


@pytest.fixture(scope="module")
def pipe(exported):
    pipe = diffusers.StableDiffusionXLControlNetPipeline.from_pretrained(exported[1] / "exported")
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ------------------------------------------------------------------------------------------------- diffusers' folders
@torch.no_grad()
def test_every_part_computes_alike(exported, pipe):
    """In float64: text encoders and pooled vector, residuals, UNet."""
    model, pipe = copy.deepcopy(exported[0]).double(), copy.deepcopy(pipe).to(torch.float64)
    prompts = [PROMPT, "", "many words " * 60]
    theirs, _, pooled, _ = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    context, ours = model.encode_text(prompts)
    assert distance(context, theirs) < 1e-12 and distance(ours, pooled) < 1e-12
    sizes = whole_image((96, 64), 3).double()
    y, x, t, hint = model.make_y(ours, sizes), torch.randn(3, 4, 8, 8).double(), torch.tensor([321]), HINT.double()
    residuals = model.control_model(x, hint.expand(3, -1, -1, -1), t, context, y)
    added = {"added_cond_kwargs": {"text_embeds": pooled.float(), "time_ids": sizes.float()}}
    down, mid = pipe.controlnet(x, t, context, hint.expand(3, -1, -1, -1), return_dict=False, **added)
    assert len(residuals) == len(down) + 1 == 7
    assert max(distance(a, b) for a, b in zip(residuals, [*down, mid], strict=True)) < 1e-6  # y is float32
    more = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    assert distance(model.unet(x, t, context, residuals, y), pipe.unet(x, t, context, **added, **more).sample) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("negative", ["", NEGATIVE], ids=["zeros", "words"])
def test_the_pipeline_draws_the_same_image(exported, pipe, negative):
    """Without a negative prompt diffusers takes zeros, as we do for an empty one."""
    model = exported[0]
    noise, _ = sampler.starting_noise((1, 4, 8, 8), seed=5)
    theirs = pipe(
        PROMPT, image=HINT, latents=noise, num_inference_steps=8, guidance_scale=4.0, output_type="np", width=64,
        height=64, negative_prompt=negative or None, controlnet_conditioning_scale=1.0,
    ).images[0]  # fmt: skip
    (context, pooled), (uncond, uncond_pooled) = model.encode_text(PROMPT), model.encode_negative(negative)
    ys = [model.make_y(p, whole_image((64, 64))) for p in (pooled, uncond_pooled)]
    settings = sampler.Sampling(steps=8, scale=4.0, seed=5)
    controls = [sampler.Control(model.control_model, HINT)]
    latents = sampler.sample(model, context, uncond, controls, (64, 64), settings, y=ys[0], negative_y=ys[1])
    ours = ((model.decode(latents)[0] + 1) / 2).permute(1, 2, 0).numpy()
    assert ours.std() > 0.01 and np.abs(ours - theirs).max() < 1e-3


def test_folders_in_all_their_forms_come_back_as_the_file(exported, pipe, tmp_path):
    model, folder = exported
    state = load_state_dict(folder / "model.safetensors")
    assert equal(load_state_dict(folder / "exported"), state)
    pipe.save_pretrained(tmp_path / "shards", max_shard_size="2MB", safe_serialization=False)
    assert all(list((tmp_path / "shards" / name).glob("*-of-*")) for name in ("unet", "text_encoder_2"))
    assert equal(load_state_dict(tmp_path / "shards"), state)
    copy.deepcopy(pipe).to(torch.float16).save_pretrained(tmp_path / "fp16", variant="fp16")
    assert (tmp_path / "fp16" / "text_encoder_2" / "model.fp16.safetensors").exists()
    assert equal(load_state_dict(tmp_path / "fp16"), {k: v.half() for k, v in state.items()})
    with torch.no_grad():
        context, pooled = model.encode_text([PROMPT])
    again = load_model(ModelSource(folder / "model.safetensors", control=folder / "exported" / "controlnet"))
    assert again.config == model.config and equal(again.state_dict(), model.state_dict())
    assert torch.equal(again.encode_text([PROMPT])[1], pooled) and torch.equal(again.encode_prompts([PROMPT]), context)


FULL_FOLDER = {"unet": UNET, "vae": "first_stage_model.", "text_encoder": TEXT_1, "text_encoder_2": TEXT_2}


def test_a_folder_says_what_its_weights_do_not(exported, tmp_path):
    """As published: Euler's scheduler, leading; and what an empty negative prompt is."""
    for name in FULL_FOLDER:
        (tmp_path / name).mkdir()
    state = {k: torch.zeros(()).expand(v) for k, v in listed("keys").items() if k.startswith(UNET + "input_blocks.")}
    state |= {UNET + "label_emb.0.0.weight": torch.zeros(()).expand(1280, 2816)}
    few = {k: v for k, v in state.items() if k.endswith(("0.0.weight", "norm.weight", "9.norm1.weight"))}
    save_safetensors(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", few)
    save_json(tmp_path / "model_index.json", {"_class_name": "StableDiffusionXLPipeline"})
    for name in ("vae", "text_encoder", "text_encoder_2"):
        source = load_state_dict(exported[1] / "exported" / name)
        save_safetensors(tmp_path / name / "model.safetensors", dict(list(source.items())[:0]) or {"x": torch.ones(1)})
    assert read_config(tmp_path) == SDXL
    for says in (False, True):
        save_json(tmp_path / "model_index.json", {"force_zeros_for_empty_prompt": says})
        assert read_config(tmp_path).zero_empty_negative == says
    (tmp_path / "scheduler").mkdir()
    save_json(tmp_path / "scheduler" / "scheduler_config.json", {
        "_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "interpolation_type": "linear",
        "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "leading",
    })  # fmt: skip
    assert (c := read_config(tmp_path)).prediction == "v" and c.zero_terminal_snr
    save_json(tmp_path / "unet" / "config.json", {
        "_class_name": "UNet2DConditionModel", "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "projection_class_embeddings_input_dim": 2816, "use_linear_projection": True, "upcast_attention": None,
    })  # fmt: skip
    assert read_config(tmp_path).prediction == "v"
    good = json.loads((tmp_path / "unet" / "config.json").read_text())
    for wrong in (
        {"transformer_layers_per_block": [1, 2, 4]}, {"transformer_layers_per_block": 1}, {"attention_head_dim": 8},
        {"projection_class_embeddings_input_dim": 2560}, {"addition_embed_type": None},
        {"addition_embed_type": "image"}, {"addition_time_embed_dim": 128},
    ):  # fmt: skip
        save_json(tmp_path / "unet" / "config.json", good | wrong)
        with pytest.raises(CheckpointError, match=f"config.json: {next(iter(wrong))} is ") as e:
            read_config(tmp_path)
        assert "\n" not in str(e.value)


def read_config(path):
    """The configuration of a model of which most weights are missing."""
    from weights.source import _read_config

    return _read_config(ModelSource(path), load_state_dict(path), None)


# ------------------------------------------------------------------------------------------------- names and detection
def published(control: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of the published file, without their content."""
    shapes = {k: v for k, v in listed("keys").items() if control or not k.startswith(CONTROL)}
    return {k: torch.zeros((), dtype=torch.float16).expand(v) for k, v in shapes.items()}


@pytest.fixture
def files(monkeypatch):
    """A dictionary: name of a file -> its tensors, which are read as if they were in the file."""
    files = {}
    monkeypatch.setattr(source, "load_state_dict", lambda path: dict(files[str(path)]))
    return files


def test_an_attached_file_has_the_published_keys(files, monkeypatch):
    """Key by key and shape by shape, also where the base is a folder, without the unused ones."""
    files["base"] = {k: v for k, v in published().items() if not k.endswith(("position_ids", "logit_scale"))}
    monkeypatch.setattr(merge, "new_weights", lambda *args: meta_weights(*args))
    state, config, new = merge.attach(ModelSource("base", hint_channels=3))
    assert {k: list(v.shape) for k, v in state.items()} == listed("keys") and config == SDXL
    assert sorted({k.split(".")[1] for k in new}) == ["input_hint_block", "middle_block_out", "zero_convs"]


def meta_weights(config, hint_channels, hint_widths, seed, gain):
    with torch.device("meta"):
        control = ControlNet(config, hint_channels, hint_widths).state_dict()
    return {
        k: v for k, v in control.items() if k.split(".")[0] in ("input_hint_block", "middle_block_out", "zero_convs")
    }


def test_names_of_diffusers():
    """One to one the maps that were made independently, at full size; and the keys of a published ControlNet."""
    maps, shape = listed("diffusers_map"), unet_levels(SDXL.unet)
    for prefix, name, table in ((CONTROL, "control", control_table(*shape)), (UNET, "unet", unet_table(*shape))):
        keys = [k.removeprefix(prefix) for k in listed("keys") if k.startswith(prefix)]
        theirs = {k.removeprefix(prefix): v for k, v in maps[name].items()}
        ours = {k: next(iter(to_diffusers({k: torch.zeros(1)}, table))) for k in keys}
        assert ours == theirs and len(set(ours.values())) == len(keys)
    control = {k.removeprefix(CONTROL): v for k, v in published(control=True).items() if k.startswith(CONTROL)}
    shapes = {k: list(v.shape) for k, v in to_diffusers(control, control_table(*shape)).items()}
    assert shapes == listed("control_diffusers_keys")


PREDICTION = "modelspec.prediction_type"
KEY = UNET + "input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({KEY: (384, 4, 3, 3), UNET + "label_emb.0.0.weight": (1536, 2560)}, "the refiner of SDXL"),
        ({KEY: (320, 9, 3, 3)}, "an SDXL inpainting model"),
        ({KEY: (320, 8, 3, 3)}, "an SDXL editing model"),
        ({KEY: (320, 5, 3, 3)}, "of the SDXL kind with 320 and 5 channels"),
        ({"edm_mean": (4,), "edm_std": (4,)}, "Playground 2.5"),
        ({"edm_vpred.sigma_max": ()}, "CosXL"),
        ({UNET + "label_emb.0.0.weight": (1280, 1024)}, "of the SDXL kind with a y of 1024 numbers"),
        ({UNET + "label_emb.0.": None}, "of the SDXL kind with no vector y"),
        ({UNET + "lora_A.weight": (1, 1)}, "a LoRA"),
        ({CONTROL + "control_add_embedding.linear_1.bias": (1280,)}, "a union ControlNet"),
    ],
)
def test_relatives_are_refused_by_name(changes, says, files):
    state = published(control=True)
    for key, shape in changes.items():
        state = {k: v for k, v in state.items() if not k.startswith(key)}
        state |= {key: torch.zeros(()).expand(shape)} if shape is not None else {}
    files["a.safetensors"] = state
    with pytest.raises(CheckpointError, match=f"^a.safetensors: .*{says}") as e:
        read_model("a.safetensors")
    assert "\n" not in str(e.value)


def test_smaller_unets_are_refused_by_name(files):
    """SSD-1B and Segmind Vega have fewer blocks, KOALA fewer transformers."""
    for kept in (".transformer_blocks.[0-3].", "nothing"):
        files["ssd"] = {
            k: v for k, v in published().items() if "input_blocks.7.1." not in k or kept[:22] in k and k[-8] < "4"
        }
        with pytest.raises(CheckpointError, match="ssd: a smaller UNet of the SDXL kind .as SSD-1B"):
            read_model("ssd")


def test_what_a_model_predicts_its_markers_and_metadata_say(files, tmp_path, capsys):
    """And they are written again, for the programs that look for them."""
    for extra, expected in (
        ({}, ("eps", False)), ({"v_pred": ()}, ("v", False)), ({"v_pred": (), "ztsnr": ()}, ("v", True)),
    ):  # fmt: skip
        files["a"] = published() | {k: torch.zeros(v) for k, v in extra.items()}
        config = read_model("a")[1]
        assert (config.prediction, config.zero_terminal_snr) == expected
    assert read_model(ModelSource("a", prediction="v"))[1] == config and config.name == "sdxl"
    files["b"] = published() | {"ztsnr": torch.zeros(())}
    with pytest.raises(CheckpointError, match="predicts eps, which says nothing at zero SNR"):
        read_model("b")
    few = {k: v.contiguous() for k, v in published().items() if k in (KEY, UNET + "label_emb.0.0.weight")}
    few[UNET + "input_blocks.7.1.transformer_blocks.9.x"] = torch.zeros(1)
    for says, prediction in (("epsilon", "eps"), ("v", "v")):
        path = tmp_path / f"{says}_Lightning.safetensors"
        save_safetensors(path, few, {"modelspec.prediction_type": says})
        assert model_of_weights(path, load_state_dict(path)).prediction == prediction
    assert distilled(path) == "lightning" and distilled(tmp_path / "hyperreal_turbot.safetensors") == ""
    source.apply_overrides(path, load_state_dict(path), ModelSource(path))
    assert "a model for few steps without guidance, to judge by `lightning`" in capsys.readouterr().out


def test_a_v_model_is_exported_with_its_markers(exported, tmp_path):
    model, folder = exported
    out = tmp_path / "v.safetensors"
    merge.main(["export", str(folder / "base.safetensors"), str(out), "--prediction", "v"])
    assert "v_pred" in load_state_dict(out) and "ztsnr" not in load_state_dict(out)
    merge.main(["export", str(out), str(tmp_path / "folder")])
    assert read_model(ModelSource(tmp_path / "folder"))[1].prediction == "v"
    merge.main(["export", str(folder / "base.safetensors"), str(tmp_path / "eps.safetensors")])
    assert "v_pred" not in load_state_dict(tmp_path / "eps.safetensors")


def test_clip_skip_of_two_is_what_it_does_anyway(exported):
    path = exported[1] / "base.safetensors"
    assert read_model(ModelSource(path, clip_skip=2))[1] == read_model(path)[1]
    with pytest.raises(CheckpointError, match="--clip-skip is 3; SDXL reads the layer before the last"):
        read_model(ModelSource(path, clip_skip=3))


def test_info_and_what_is_missing(exported, tmp_path, capsys):
    state = load_state_dict(exported[1] / "model.safetensors")
    metadata = load_metadata(exported[1] / "model.safetensors")
    merge.main(["info", str(exported[1] / "model.safetensors")])
    said = capsys.readouterr().out
    assert "text encoder 1 " in said and "text encoder 2 " in said and "none" not in said.split("average")[0]
    assert "small sdxl, eps-prediction" in said
    for prefix, name in ((TEXT_2, "text encoder 2"), (TEXT_1, "text encoder 1")):
        part = {k: v for k, v in state.items() if not k.startswith(prefix)}
        save_safetensors(tmp_path / "part.safetensors", part, metadata)
        with pytest.raises(CheckpointError, match=f"part.safetensors: has no {name}"):
            load_model(tmp_path / "part.safetensors")
        with pytest.raises(CheckpointError, match=f"not a whole model: .* tensors of the {name}"):
            merge.main(["export", str(tmp_path / "part.safetensors"), str(tmp_path / "out")])
    odd = state | {TEXT_2 + "transformer.resblocks.0.adapter.weight": torch.ones(1)}
    save_safetensors(tmp_path / "odd.safetensors", odd, metadata)
    with pytest.raises(CheckpointError, match="1 tensor that this text encoder 2 does not have"):
        load_model(tmp_path / "odd.safetensors")


# --------------------------------------------------------------------------------------------------------- ControlNets
def test_a_controlnet_in_all_its_forms(exported, tmp_path):
    """In diffusers' form, under control_model.*, bare, in half precision: each joins the base and is the ControlNet."""
    model, folder = exported
    base, whole = folder / "base.safetensors", str(folder / "model.safetensors")
    forms = [tmp_path / name for name in ("folder", "control.safetensors", "bare.safetensors", "diff.safetensors")]
    merge.main(["extract", whole, str(forms[0]), "--format", "diffusers"])
    merge.main(["extract", whole, str(forms[1])])
    merge.main(["extract", whole, str(forms[2]), "--bare"])
    merge.main(["extract", whole, str(forms[3]), "--difference", str(base)])
    assert "label_emb.0.0.weight" in load_bare(forms[2])
    config = diffusers.ControlNetModel.from_pretrained(forms[0]).config
    assert config.addition_embed_type == "text_time" and config.transformer_layers_per_block == [1, 2, 3]
    for form in (*forms[:3], forms[0] / "diffusion_pytorch_model.safetensors"):
        assert equal(merge_sources(ModelSource(base, control=form)), model.state_dict())
    sums = merge_sources(ModelSource(base, control=forms[3]))
    assert all(torch.allclose(v, sums[k], atol=1e-6) for k, v in model.state_dict().items())


def load_bare(path) -> dict[str, torch.Tensor]:
    import safetensors.torch

    return safetensors.torch.load_file(path)


def test_a_controlnet_of_another_family_is_named(files):
    """One line that says which is which, whatever the two are."""
    sdxl, unets = published(control=True), {}
    for name, config in (("SD 1.x", SD15), ("SD 2.x", SD21)):
        with torch.device("meta"):
            unets[name] = ControlLDM(config).state_dict()
    unets["SDXL"] = sdxl
    for of_base, base in unets.items():
        for of_control, control in unets.items():
            if of_control != of_base:
                files["base"] = {k: v for k, v in base.items() if not k.startswith(CONTROL)}
                files["control"] = {k: v for k, v in control.items() if k.startswith(CONTROL)}
                with pytest.raises(CheckpointError) as e:
                    merge_sources(ModelSource("base", control="control"))
                said = f"another kind of model than base: the ControlNet is {of_control}, the base {of_base} "
                assert str(e.value).startswith(f"control: a ControlNet of {said}") and "\n" not in str(e.value)


def test_a_small_controlnet_of_another_family_is_named_too(files):
    """The residual blocks of SDXL's and SD's first three levels have equal shapes."""
    with torch.device("meta"):
        control = ControlNet(SDXL.unet.with_depth((0, 0, 0))).state_dict()
        files["base"] = ControlLDM(SD15, None).state_dict()
    files["control"] = {CONTROL + k: v for k, v in control.items()}
    with pytest.raises(CheckpointError, match="the ControlNet is SDXL, the base SD 1.x"):
        merge_sources(ModelSource("base", control="control"))


def test_what_works_where_is_said(tmp_path, capsys):
    state = {k: v for k, v in published(control=True).items() if k.startswith(CONTROL)}
    said = lambda name, config=SDXL: " ".join(notes(name, state, config, False))
    assert "control_sdxl_NAME.safetensors" in said("mine.safetensors")
    assert "control_sdxl_NAME" in said("sdxl_not_sd15.safetensors") and "label_emb" in said("mine.safetensors")
    assert "call it" not in said("control_sdxl_mine.safetensors")
    spec = modelspec(dataclasses.replace(SDXL, prediction="v"), state)
    assert spec["modelspec.architecture"] == "stable-diffusion-xl-v1-base/controlnet"
    assert modelspec(SDXL, published())["modelspec.prediction_type"] == "epsilon" and spec[PREDICTION] == "v"
    assert modelspec(SD15, state) == modelspec(None, state) == {}
    mid, other = (dataclasses.replace(SDXL, control_depth=depth) for depth in ((0, 0, 1), (0, 1, 4)))
    assert "published as `mid`" in said("control_sdxl_mine.safetensors", mid)
    assert "0,1,4 blocks" in (noted := said("control_sdxl_mine.safetensors", other)) and "full copy do not" in noted
    assert "blocks" not in said_of("mine.safetensors", SD15, tmp_path, capsys)


def test_a_rounded_unet_does_not_round_its_copy(exported):
    """The frozen UNet may be kept in 16 bits from the start; everything else is as if it were not."""
    source = ModelSource(exported[1] / "base.safetensors", attach=True)
    whole, rounded = load_model(source), load_model(source, unet_dtype=torch.bfloat16)
    ours, wanted = rounded.state_dict(), whole.state_dict()
    assert equal(ours, {k: v.bfloat16() if k.startswith(UNET) else v for k, v in wanted.items()})
    assert rounded.unet.dtype == torch.bfloat16 and rounded.control_model.dtype == torch.float32


# -------------------------------------------------------------------------------------------------- smaller ControlNets
def test_depths_as_text():
    for text, depth in {
        "full": None, "": None, "mid": (0, 0, 1), "small": (0, 0, 0), "0,1,4": (0, 1, 4), "9 2 10": None,
        "1,0,4": (0, 0, 4),
    }.items():  # fmt: skip
        assert depth_from_text(text, SDXL.unet) == depth
    assert depth_from_text("small", SD15.unet) == (0, 0, 0, 0) and depth_from_text("0,0,1,1", SD15.unet) == (0, 0, 1, 1)
    for text in ("tiny", "1", "0,1", "0,1,2,3", "0,1,-1", "0,,1", "0,1,1e9"):
        with pytest.raises(CheckpointError, match="should be full, mid, small, or 3 numbers as 0,2,10"):
            depth_from_text(text, SDXL.unet)
    with pytest.raises(CheckpointError, match="--control-depth: transformers of 0,3,10 blocks; the UNet's have 0,2,10"):
        depth_from_text("0,3,10", SDXL.unet)


def test_sizes_of_smaller_controls():
    """As published: the smallest has 140 tensors and 160 M weights."""
    sizes = {}
    for text in ("full", "0,2,4", "mid", "small"):
        with torch.device("meta"):
            config = dataclasses.replace(SDXL, control_depth=depth_from_text(text, SDXL.unet))
            control = ControlNet(config.control_unet)
        sizes[text] = round(sum(p.numel() for p in control.parameters()) / 1e6)
        assert depth_of(control.state_dict(), SDXL.unet) == config.control_depth
        assert len(control.zero_convs) == 9
    assert len(control.state_dict()) == 140
    assert sizes == {"full": 1251, "0,2,4": 625, "mid": 271, "small": 160}


@torch.no_grad()
@pytest.mark.parametrize("depth", [SMALLER, (0, 0, 0)])
def test_a_smaller_control_is_attached_saved_and_read_by_diffusers(depth, exported, tmp_path):
    model, folder = exported
    base, text = str(folder / "base.safetensors"), ",".join(map(str, depth))
    whole, out = tmp_path / "whole.safetensors", tmp_path / "folder"
    merge.main(["attach", base, str(whole), "--control-depth", text])
    attached = load_model(ModelSource(base, attach=True, control_depth=text, hint_channels=3))
    assert attached.config.control_depth == depth and equal(load_model(whole).state_dict(), attached.state_dict())
    unet = attached.unet.state_dict()
    assert all(torch.equal(p, unet[name]) for name, p in attached.control_model.state_dict().items() if name in unet)
    y, x, t = torch.randn(1, 1568), torch.randn(1, 4, 8, 8), torch.tensor([3])
    context = torch.randn(1, 77, 56)
    assert torch.equal(attached.predict(x, t, context, HINT, y), attached.predict(x, t, context, y=y))
    for p in attached.control_model.parameters():
        torch.nn.init.normal_(p, std=0.05) if not p.any() else None
    save_model(whole, attached)
    merge.main(["extract", str(whole), str(out), "--format", "diffusers"])
    theirs = diffusers.ControlNetModel.from_pretrained(out)
    pooled, ids = torch.randn(1, 32), whole_image((64, 64))
    ours = attached.control_model(x, HINT, t, context, attached.make_y(pooled, ids))
    added = {"text_embeds": pooled, "time_ids": ids}
    down, mid = theirs(x, t, context, HINT, return_dict=False, added_cond_kwargs=added)
    assert max(distance(a, b) for a, b in zip(ours, [*down, mid], strict=True)) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    merge.main(["extract", str(whole), str(tmp_path / "control.safetensors")])
    control = {CONTROL + k: v for k, v in attached.control_model.state_dict().items()}
    for form in (out, tmp_path / "theirs", tmp_path / "control.safetensors"):
        state, config = read_model(ModelSource(base, control=form))
        assert config == attached.config and equal({k: v for k, v in state.items() if k.startswith(CONTROL)}, control)
    with pytest.raises(CheckpointError, match=f"whole.safetensors: its .* have {text} blocks, not 0,2,3"):
        read_model(ModelSource(whole, control_depth="full"))
    with pytest.raises(CheckpointError, match="smaller than its UNet has no difference"):
        merge.main(["extract", str(whole), str(tmp_path / "d.safetensors"), "--difference", base])
    with pytest.raises(CheckpointError, match="weights under control_model. missing"):
        state = {k: v for k, v in load_state_dict(whole).items() if CONTROL + "middle_block.1.proj_in" not in k}
        save_safetensors(tmp_path / "damaged.safetensors", state, load_metadata(whole))
        load_model(tmp_path / "damaged.safetensors")


def test_a_smaller_control_is_carried_over(exported, tmp_path):
    """To a base with other weights: copies get what the base has more."""
    state, metadata = load_state_dict(exported[1] / "base.safetensors"), load_metadata(exported[1] / "base.safetensors")
    for name, more in (("old", 0.0), ("new", 0.25)):
        moved = {k: v + more if k.startswith(UNET) else v for k, v in state.items()}
        save_safetensors(tmp_path / f"{name}.safetensors", moved, metadata)
    old, new, control, out = (tmp_path / f"{name}.safetensors" for name in ("old", "new", "control", "out"))
    merge.main(["attach", str(old), str(tmp_path / "whole.safetensors"), "--control-depth", "0,1,1"])
    merge.main(["extract", str(tmp_path / "whole.safetensors"), str(control)])
    merge.main(["transfer", "--from-base", str(old), "--control", str(control), "--to-base", str(new), str(out)])
    trained, carried = load_state_dict(control), load_state_dict(out)
    assert {k for k in carried if k.startswith(CONTROL)} == trained.keys()
    key = "middle_block.1.transformer_blocks.0.norm1.bias"
    assert (
        torch.equal(carried[CONTROL + key], carried[UNET + key])
        and CONTROL + key.replace("0.norm", "1.norm") not in carried
    )
    assert read_model(out)[1].control_depth == (0, 1, 1)


def test_a_smaller_control_of_stable_diffusion(tmp_path):
    """Nothing about it is SDXL's alone."""
    save_model(tmp_path / "base.safetensors", random_model(TINY, control=False))
    model = load_model(ModelSource(tmp_path / "base.safetensors", attach=True, control_depth="small"))
    assert model.config.control_depth == (0, 0, 0)
    save_model(tmp_path / "whole.safetensors", model)
    assert load_model(tmp_path / "whole.safetensors").config == model.config
    merge.main(["export", str(tmp_path / "whole.safetensors"), str(tmp_path / "folder")])
    again = load_model(tmp_path / "folder")
    assert again.config == model.config and equal(again.state_dict(), model.state_dict())
    with pytest.raises(CheckpointError, match="already has a ControlNet"):
        merge.main(["attach", str(tmp_path / "whole.safetensors"), str(tmp_path / "x.safetensors")])
