"""Independent programs: diffusers and transformers read what we write, we read theirs, and both compute alike."""

import copy
import dataclasses
import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DISABLE_TELEMETRY": "1"}

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import merge
import sampler
from clip_text import TextConfig, Tokenizer, clip_spelling, openclip_spelling
from ldm import SD15, SD21_V, TINY, ControlLDM
from tests.conftest import distance
from unet import UNetConfig
from vae import VAEConfig
from weights import CheckpointError, ModelSource, load_model, load_state_dict
from weights.diffusers_folder import common_dtype
from weights.source import merge_sources
from weights.writing import save_safetensors

SMALL = dict(vae=VAEConfig(ch=32), hint_widths=(8, 8, 16, 16), resolution=64)
V1 = dataclasses.replace(
    SD15, **SMALL, name="small v1", unet=UNetConfig(model_channels=32, num_heads=4, context_dim=40),
    text=TextConfig(width=40, layers=3, heads=4, mlp_width=80),
)  # fmt: skip
V2 = dataclasses.replace(
    SD21_V, **SMALL, name="small v2",
    unet=UNetConfig(
        model_channels=32, num_heads=None, num_head_channels=16, context_dim=48, use_linear_in_transformer=True
    ),
    text=TextConfig(width=48, layers=4, heads=4, mlp_width=96, activation="gelu", penultimate=True),
)  # fmt: skip
HINT = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
PROMPT, NEGATIVE = "a red  Circle, with café background", "blue"


@pytest.fixture(scope="module", params=[V1, V2, TINY], ids=lambda config: config.name)
def exported(request, tmp_path_factory):
    """A model of random weights without zeros, its file, and its diffusers folder."""
    folder = tmp_path_factory.mktemp("exchange")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = ControlLDM(request.param).eval().requires_grad_(False)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.05) if not p.any() else None
    save_safetensors(folder / "model.safetensors", model.state_dict(), {"config": model.config.to_json()})
    merge.main(["export", str(folder / "model.safetensors"), str(folder / "exported")])
    return model, folder


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@torch.no_grad()
def test_every_part_computes_alike(exported):
    """In float64, where the order of a sum does not count; of float32, only the pipeline below."""
    model, folder = copy.deepcopy(exported[0]).double(), exported[1]
    there = folder / "exported"
    unet = diffusers.UNet2DConditionModel.from_pretrained(there / "unet").eval().double()
    control = diffusers.ControlNetModel.from_pretrained(there / "controlnet").eval().double()
    vae = diffusers.AutoencoderKL.from_pretrained(there / "vae").eval().double()
    text = transformers.CLIPTextModel.from_pretrained(there / "text_encoder").eval().double()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(there / "tokenizer")
    ids = tokenizer([PROMPT, "", "many words " * 60], padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(ids.input_ids, model.tokenizer([PROMPT, "", "many words " * 60]))
    context = model.encode_prompts([PROMPT])
    assert distance(context, text(model.tokenizer(PROMPT)).last_hidden_state) < 1e-12
    x, t, hint = torch.randn(1, 4, 8, 8).double(), torch.tensor([321]), HINT.double()
    residuals = model.control_model(x, hint, t, context)
    down, mid = control(x, t, context, controlnet_cond=hint, return_dict=False)
    assert len(residuals) == len(down) + 1
    assert max(distance(a, b) for a, b in zip(residuals, [*down, mid], strict=True)) < 1e-12
    ours = model.unet(x, t, context, residuals)
    theirs = unet(x, t, context, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
    assert distance(ours, theirs) < 1e-12
    image = torch.rand(1, 3, 64, 64).double() * 2 - 1
    assert distance(model.vae.moments(image), vae.encode(image).latent_dist.parameters) < 1e-12
    assert distance(model.vae.decode(x), vae.decode(x).sample) < 1e-12


@torch.no_grad()
def test_the_pipeline_draws_the_same_image(exported):
    model, folder = exported
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(folder / "exported")
    pipe.set_progress_bar_config(disable=True)
    noise, _ = sampler.starting_noise((1, 4, 8, 8), seed=5)
    theirs = pipe(
        PROMPT, image=HINT, latents=noise, num_inference_steps=10, guidance_scale=4.0, negative_prompt=NEGATIVE,
        output_type="np",
    ).images[0]  # fmt: skip
    context, negative = model.encode_prompts([PROMPT]), model.encode_prompts([NEGATIVE])
    controls = [sampler.Control(model.control_model, HINT)]
    settings = sampler.Sampling(steps=10, scale=4.0, seed=5)
    latents = sampler.sample(model, context, negative, controls, (64, 64), settings)
    ours = ((model.decode(latents)[0] + 1) / 2).permute(1, 2, 0).numpy()
    assert ours.std() > 0.01 and np.abs(ours - theirs).max() < 1e-3


def test_folders_in_all_their_forms_come_back_as_the_file(exported, tmp_path):
    model, folder = exported
    state = load_state_dict(folder / "model.safetensors")
    assert equal(load_state_dict(folder / "exported"), state)
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(folder / "exported")
    pipe.save_pretrained(tmp_path / "plain")
    assert equal(load_state_dict(tmp_path / "plain"), state)
    pipe.save_pretrained(tmp_path / "shards", max_shard_size="2MB", safe_serialization=False)
    assert list((tmp_path / "shards" / "unet").glob("*-of-*.bin"))
    assert equal(load_state_dict(tmp_path / "shards"), state)
    pipe.unet.save_pretrained(tmp_path / "fp16" / "unet", max_shard_size="2MB", variant="fp16")
    assert list((tmp_path / "fp16" / "unet").glob("*.fp16-*-of-*"))
    unet = {k: v for k, v in state.items() if k.startswith("model.")}
    assert equal(load_state_dict(tmp_path / "fp16" / "unet"), unet)
    with pytest.raises(CheckpointError, match="without weights"):
        load_state_dict(tmp_path / "fp16")


def test_old_names_of_the_vaes_attention(exported, tmp_path):
    """As diffusers wrote them before 0.17, and as SD 1.5's folder still has them."""
    model, folder = exported
    state = load_state_dict(folder / "model.safetensors")
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    with safetensors.safe_open(folder / "exported" / "vae" / "diffusion_pytorch_model.safetensors", "pt") as file:
        old = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
    for a, b in new.items():
        old = {k.replace(f"attentions.0.{a}.", f"attentions.0.{b}."): v for k, v in old.items()}
    torch.save(old, tmp_path / "vae.bin")
    vae = {k: v for k, v in state.items() if k.startswith("first_stage_model.")}
    assert equal(load_state_dict(tmp_path / "vae.bin"), vae)


@torch.no_grad()
def test_a_model_without_controlnet_draws_at_its_own_size(exported, tmp_path):
    model, folder = exported
    plain = {k: v for k, v in model.state_dict().items() if not k.startswith("control_model.")}
    metadata = {"config": model.config.to_json()}
    save_safetensors(tmp_path / "plain.safetensors", plain, metadata)
    merge.main(["export", str(tmp_path / "plain.safetensors"), str(tmp_path / "plain")])
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "plain")
    pipe.set_progress_bar_config(disable=True)
    side = model.config.resolution
    assert pipe(PROMPT, num_inference_steps=1).images[0].size == (side, side)


def test_folder_becomes_a_model(exported):
    model, folder = exported
    again = load_model(folder / "exported")
    assert again.config == model.config and equal(again.state_dict(), model.state_dict())


def test_controlnet_alone_in_three_forms(exported, tmp_path):
    """Extracted for diffusers, extracted as a file, and saved by diffusers: each joins a base and is the ControlNet."""
    model, folder = exported
    source, base = str(folder / "model.safetensors"), tmp_path / "base.safetensors"
    plain = {k: v for k, v in model.state_dict().items() if not k.startswith("control_model.")}
    save_safetensors(base, plain, {"config": model.config.to_json()})
    forms = [tmp_path / name for name in ("ours", "control.safetensors", "theirs", "difference.safetensors")]
    merge.main(["extract", source, str(forms[0]), "--format", "diffusers"])
    merge.main(["extract", source, str(forms[1])])
    diffusers.ControlNetModel.from_pretrained(forms[0]).save_pretrained(forms[2])
    merge.main(["extract", source, str(forms[3]), "--difference", source])
    for form in forms[:3]:
        assert equal(merge_sources(ModelSource(base, control=form)), model.state_dict())
    state = load_state_dict(forms[3])
    assert "difference" in state and state["control_model.zero_convs.0.0.weight"].any()
    again = merge_sources(ModelSource(base, control=forms[3]))
    assert again.keys() == model.state_dict().keys()
    assert all(torch.allclose(v, again[k], atol=1e-6) for k, v in model.state_dict().items())
    assert not torch.equal(state["control_model.time_embed.0.weight"], again["control_model.time_embed.0.weight"])
    assert not equal(load_model(base).state_dict(), model.state_dict())
    with pytest.raises(CheckpointError, match="a ControlNet alone"):
        load_model(forms[2])


def test_openclip_spelling_there_and_back():
    state, layer = {}, [f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")]
    for name in (*layer, "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"):
        state |= {f"text_model.encoder.layers.3.{name}.{k}": torch.randn(8) for k in ("weight", "bias")}
    state |= {f"text_model.embeddings.{k}_embedding.weight": torch.randn(8) for k in ("token", "position")}
    state |= {f"text_model.final_layer_norm.{k}": torch.randn(8) for k in ("weight", "bias")}
    there = openclip_spelling(state)
    assert "transformer.resblocks.3.attn.in_proj_weight" in there and len(there) == len(state) - 4
    assert equal(clip_spelling(there), state)


def test_tokenizer_files_of_both_paddings(tmp_path):
    from clip_text import tokenizer_files

    for pad in ("end", "zero"):
        (tmp_path / pad).mkdir()
        for name, text in tokenizer_files(pad).items():
            (tmp_path / pad / name).write_text(text)
        theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / pad)
        prompts = ["Two  WORDS", "it's 42 naïve £ 🙂", ""]
        ids = theirs(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        assert torch.equal(ids, Tokenizer(pad)(prompts))


@torch.no_grad()
@pytest.mark.parametrize("half", [False, True], ids=["", "half"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_exports_of_bases_in_every_precision_draw(dtype, half, tmp_path, capsys):
    """diffusers loads float32 unless told a dtype, transformers what its configuration says: the parts must agree."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        state = ControlLDM(TINY).state_dict()
    short = {k: v if k.startswith("control_model.") else v.to(dtype) for k, v in state.items()}  # trained in float32
    save_safetensors(tmp_path / "mixed.safetensors", short, {"config": TINY.to_json()})
    merge.main(["export", str(tmp_path / "mixed.safetensors"), str(tmp_path / "out"), *(["--half"] if half else [])])
    stored = torch.float16 if half else torch.float32
    assert str(stored).removeprefix("torch.") in capsys.readouterr().out
    for file in (tmp_path / "out").glob("*/*.safetensors"):
        assert {v.dtype for v in safetensors.torch.load_file(file).values() if v.is_floating_point()} == {stored}, file
    for asked in ({}, {"torch_dtype": torch.bfloat16}):
        pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(tmp_path / "out", **asked)
        pipe.set_progress_bar_config(disable=True)
        parts = (pipe.unet, pipe.controlnet, pipe.vae, pipe.text_encoder)
        assert {part.dtype for part in parts} == {asked.get("torch_dtype", torch.float32)}
        image = pipe(PROMPT, image=HINT, num_inference_steps=1, output_type="np").images[0]
        assert image.shape == (64, 64, 3) and np.isfinite(image).all()


def test_one_precision_holds_all_weights(tmp_path):
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int64)
    one = {dtype: torch.zeros(2).to(dtype) for dtype in dtypes}
    for wanted, given in {
        torch.float16: (torch.float16, torch.int64),
        torch.bfloat16: (torch.bfloat16,),
        torch.float32: (torch.float16, torch.bfloat16),
    }.items():
        assert common_dtype(one[dtype] for dtype in given) == wanted
    assert common_dtype([one[torch.float8_e4m3fn]]) == torch.float16
    assert common_dtype([one[torch.int64]]) == torch.float32


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_hints_that_other_programs_do_not_give_are_told(channels, tmp_path, capsys):
    save_safetensors(tmp_path / "base.safetensors", ControlLDM(TINY, None).state_dict(), {"config": TINY.to_json()})
    whole = str(tmp_path / "whole.safetensors")
    merge.main([str(tmp_path / "base.safetensors"), whole, "--hint-channels", str(channels)])
    capsys.readouterr()
    for command in (
        ["export", whole, str(tmp_path / "folder")],
        ["export", whole, str(tmp_path / "file.ckpt")],
        ["extract", whole, str(tmp_path / "control.safetensors")],
        ["extract", whole, str(tmp_path / "control"), "--format", "diffusers"],
    ):
        merge.main(command)
        said = capsys.readouterr().out
        assert (f"hints of {channels} channel" in said) == (channels != 3), said
