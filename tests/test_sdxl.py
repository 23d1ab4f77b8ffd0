"""SDXL: our networks against numbers of Stability's code, its text side, its sizes, and what is special in its VAE.

How the numbers were made: `golden/README.md`.
"""

import copy
import dataclasses
import gzip
import json

import pytest
import torch

import sampler
from clip_text import CLIPTextModel, TextConfig, Tokenizer
from conditioning import OpenCLIPTextModel, embed_sizes, whole_image
from controlnet import ControlNet
from layers import config_repr
from ldm import MODELS, SD15, SD21, SDXL, TINY, ControlLDM, ModelConfig, NotFiniteError
from lowvram.streaming import BlockStreamer
from tests.conftest import GOLDEN, distance, golden
from tests.golden.fill import arr, fill
from tests.test_golden import CLOSE, filled, pair
from unet import UNet, UNetConfig, parts
from vae import VAEConfig

SMALL = UNetConfig(
    model_channels=32, channel_mult=(1, 2, 4), attention_resolutions=(4, 2), transformer_depth=(1, 2, 3),
    context_dim=48, num_heads=None, num_head_channels=16, use_linear_in_transformer=True, adm_in_channels=96,
)  # fmt: skip
TEXT = TextConfig(64, 3, 4, 256, penultimate=True, final_norm=False)
TEXT2 = TextConfig(80, 4, 5, 320, "gelu", penultimate=True, final_norm=False, projection=80)
SMALL_SDXL = dataclasses.replace(
    SDXL, name="small sdxl", unet=dataclasses.replace(SMALL, context_dim=144, adm_in_channels=1616), text=TEXT,
    text2=TEXT2, vae=VAEConfig(ch=32), hint_widths=(8, 8, 16, 16), resolution=64,
)  # fmt: skip


def inputs(tag: str, batch: int, h: int, w: int) -> tuple[torch.Tensor, ...]:
    """x, hint, context and y of a golden file."""
    hint = torch.sigmoid(arr(tag + ".hint", batch, 3, 8 * h, 8 * w))
    return arr(tag + ".x", batch, 4, h, w), hint, arr(tag + ".context", batch, 77, 48), arr(tag + ".y", batch, 96)


@torch.no_grad()
def test_unet_and_control():
    tag = "sdxl_unet_small"
    (unet, control), want, t = pair(SMALL), golden(tag), torch.tensor([7, 801])
    x, hint, context, y = inputs(tag, 2, 16, 24)
    residuals = control(x, hint, t, context, y=y)
    assert len(residuals) == 10
    assert distance(torch.stack([r.abs().mean() for r in residuals]), want["control_abs_mean"]) < CLOSE
    assert distance(residuals[-1], want["control_last"]) < CLOSE
    assert distance(unet(x, t, context, y=y), want["eps_uncontrolled"]) < CLOSE
    assert distance(unet(x, t, context, y=torch.zeros_like(y)), want["eps_zero_y"]) < CLOSE
    assert distance(unet(x, t, context, control=residuals, y=y), want["eps_controlled"]) < CLOSE
    assert distance(unet(x, t, context, [r * 0.5 for r in residuals], y), want["eps_half"]) < CLOSE
    control.only_mid_control = True
    only = control(x, hint, t, context, y)
    assert len(only) == 1 and distance(unet(x, t, context, only, y), want["eps_only_mid"]) < CLOSE


@torch.no_grad()
def test_unet_epsilons():
    unet, control = pair(SMALL, scale=0.03)
    x, hint, context, y = inputs("sdxl_unet_lowvar", 1, 16, 8)
    t, want = torch.tensor([321]), golden("sdxl_unet_lowvar")
    residuals = control(x, hint, t, context, y)
    assert distance(torch.stack([r.abs().mean() for r in residuals]), want["control_abs_mean"]) < CLOSE
    assert distance(unet(x, t, context, y=y), want["eps_uncontrolled"]) < CLOSE
    assert distance(unet(x, t, context, residuals, y), want["eps_controlled"]) < CLOSE


def gradients(unet: UNet, control: ControlNet) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of the golden file, and the gradient of every parameter that has one."""
    tag = "sdxl_unet_small"
    unet.requires_grad_(False)
    for block in (unet.output_blocks, unet.out):
        block.requires_grad_(True)
    _, hint, context, y = inputs(tag, 2, 16, 24)
    x0, noise, t = arr(tag + ".x0", 2, 4, 16, 24), arr(tag + ".noise", 2, 4, 16, 24), torch.tensor([7, 801])
    x_t = sampler.q_sample(x0, noise, sampler.alphas_cumprod(SDXL)[t])
    loss = torch.nn.functional.mse_loss(unet(x_t, t, context, control(x_t, hint, t, context, y), y), noise)
    loss.backward()
    named = {f"control.{k}": p for k, p in control.named_parameters()} | dict(unet.named_parameters())
    return loss.detach(), {k: p.grad for k, p in named.items() if p.grad is not None}


def test_training_loss_and_gradients():
    unet, control = pair(SMALL)
    loss, grads = gradients(unet, control)
    want, names = golden("sdxl_unet_small"), json.loads((GOLDEN / "sdxl_unet_small.names.json").read_text())
    assert distance(loss, want["train_loss"]) < CLOSE
    assert sorted(names["control"]) == sorted(k for k, _ in control.named_parameters())
    assert len(grads) == len(names["control"]) + len(names["decoder"])
    norms = lambda keys: torch.stack([grads[k].norm() for k in keys])
    assert distance(norms([f"control.{k}" for k in names["control"]]), want["grad_norms"]) < 1e-4
    assert distance(norms(names["decoder"]), want["decoder_grad_norms"]) < 1e-4


def test_checkpointing_and_streaming_change_nothing():
    """Also where label_emb itself is called through a streamer, and where a transformer has several blocks."""
    unet, control = pair(SMALL)
    plain = gradients(unet, control)[1]
    again = pair(SMALL)
    for network in again:
        network.gradient_checkpointing = True
    frozen = again[0].requires_grad_(False)
    blocks = [frozen.label_emb]
    blocks += [part for block in (*frozen.input_blocks, frozen.middle_block) for part in parts(block)]
    streamer = frozen.weight_streamer = BlockStreamer(blocks, "cpu", torch.float32)
    recomputed = gradients(*again)[1]
    assert plain.keys() == recomputed.keys() and len(streamer.weights) == len(blocks)
    assert all(torch.equal(v, recomputed[k]) for k, v in plain.items())
    assert {key for pair in streamer.next_block for key in pair} >= {id(part) for part in blocks[:-1]}


def test_the_parts_of_a_block_are_all_of_it_and_small():
    with torch.device("meta"):
        unet, deep = UNet(SDXL.unet), UNet(SMALL)
    count = lambda module: sum(p.numel() for p in module.parameters())
    for block in (*unet.input_blocks, unet.middle_block, *unet.output_blocks, *deep.output_blocks):
        ids = [id(p) for part in parts(block) for p in part.parameters()]
        assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in block.parameters()}
    middle = parts(unet.middle_block)
    assert len(middle) == 1 + 13 + 1 and 10 * max(map(count, middle[2:-2])) < count(unet.middle_block)
    assert parts(unet.input_blocks[1]) == [unet.input_blocks[1]]  # as all of Stable Diffusion's blocks


def test_y_is_neither_forgotten_nor_ignored():
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 77, 48)
    hint = torch.rand(1, 3, 64, 64)
    with pytest.raises(ValueError, match="needs a vector y of 96 numbers"):
        UNet(SMALL)(x, t, context)
    with pytest.raises(ValueError, match="needs a vector y"):
        ControlNet(SMALL)(x, hint, t, context)
    with pytest.raises(ValueError, match="has no y"):
        UNet(dataclasses.replace(SMALL, adm_in_channels=None))(x, t, context, y=torch.randn(1, 96))


def test_depth_zero_is_no_attention():
    """(0, 2, 3) with attention everywhere is (1, 2, 3) with attention below the first level."""
    other = dataclasses.replace(SMALL, transformer_depth=(0, 2, 3), attention_resolutions=(4, 2, 1))
    with torch.device("meta"):
        shapes = [{k: v.shape for k, v in UNet(config).state_dict().items()} for config in (SMALL, other)]
    assert shapes[0] == shapes[1]
    assert [other.depth(i) for i in range(3)] == [0, 2, 3] and not other.attends(0)
    assert UNetConfig(transformer_depth=2) == UNetConfig(transformer_depth=(2,)) and UNetConfig(
        transformer_depth=2
    ).depth(0) == 2  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- text
@pytest.fixture(scope="module")
def model() -> ControlLDM:
    """The small SDXL of the golden file of the text side: all weights filled by name."""
    model = ControlLDM(dataclasses.replace(SMALL_SDXL, hint_widths=SDXL.hint_widths))
    model.load_state_dict({k: fill(k, v.shape) for k, v in model.state_dict().items()})
    return model.eval().requires_grad_(False)


PROMPTS = json.loads((GOLDEN / "sdxl_text_small.prompts.json").read_text())["prompts"]


@torch.no_grad()
def test_from_prompts_to_eps(model):
    """Both tokenizers, both encoders, the pooled vector, the sizes, and the networks fed with all of it."""
    tag, want = "sdxl_text_small", golden("sdxl_text_small")
    for tokenizer, ids in zip(model.tokenizers, (want["ids_l"], want["ids_g"]), strict=True):
        assert torch.equal(tokenizer(PROMPTS), ids)
    context, pooled = model.encode_text(PROMPTS)
    assert context.shape == (3, 77, 144) and torch.equal(context, model.encode_prompts(PROMPTS))
    assert distance(context[:, ::7, :64], want["hidden_l"]) < CLOSE
    assert distance(context[:, ::7, 64:], want["hidden_g"]) < CLOSE
    assert distance(pooled, want["pooled"]) < CLOSE
    assert distance(embed_sizes(want["sizes"]), want["size_embedding"]) < 1e-4
    y = model.make_y(pooled, want["sizes"])
    assert y.shape == (3, 1616) and torch.equal(y[:, :80], pooled)
    x, hint = arr(tag + ".x", 3, 4, 8, 8), torch.sigmoid(arr(tag + ".hint", 3, 3, 64, 64))
    t = torch.full((3,), 601)
    residuals = model.control_model(x, hint, t, context, y)
    assert distance(torch.stack([r.abs().mean() for r in residuals]), want["control_abs_mean"]) < CLOSE
    assert distance(model.predict(x, t, context, hint, y), want["eps_end_to_end"]) < CLOSE


@torch.no_grad()
def test_the_sizes_are_exact_in_every_precision(model):
    """In bfloat16 1365 would be 1368, and its embedding another one."""
    pooled, sizes = torch.zeros(1, 80), torch.tensor([[1365.0, 2048.0, 0.0, 77.0, 832.0, 1216.0]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = model.make_y(pooled.to(dtype), sizes.to(torch.float64))
        assert y.dtype == torch.float32 and torch.equal(y[:, 80:], embed_sizes(sizes))
    assert torch.equal(whole_image((1216, 832), 2), torch.tensor([[832.0, 1216.0, 0.0, 0.0, 832.0, 1216.0]] * 2))
    assert ControlLDM(TINY, None).make_y(None, sizes) is None


@torch.no_grad()
def test_an_empty_negative_prompt_is_zeros_where_the_model_says_so(model):
    context, pooled = model.encode_negative(["", "blue"])
    plain, plain_pooled = model.encode_text(["", "blue"])
    assert not context[0].any() and not pooled[0].any() and plain[0].any() and plain_pooled[0].any()
    assert torch.equal(context[1], plain[1]) and torch.equal(pooled[1], plain_pooled[1])
    tiny = ControlLDM(TINY, None)
    context, pooled = tiny.encode_negative("")
    assert pooled is None and torch.equal(context, tiny.encode_prompts(""))


def test_the_first_end_token_counts():
    """Also where a prompt itself holds the end token."""
    encoder = OpenCLIPTextModel(TEXT2).requires_grad_(False)
    ids = Tokenizer("zero")(["a b", "a b c"])
    ids[0, 6] = 49407  # a second end
    same = ids.clone()
    same[0, 7:] = 5  # what comes after the first end is not seen
    assert torch.allclose(encoder.encode(ids)[1], encoder.encode(same)[1], atol=1e-6)
    moved = ids.clone()
    moved[0, 1] = 999
    assert not torch.allclose(encoder.encode(ids)[1][0], encoder.encode(moved)[1][0], atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- sampling
def schedule(timesteps) -> list[tuple[int, float]]:
    """These timesteps from high to low, and the end without noise."""
    alphas = sampler.alphas_cumprod().double()
    return [*((int(t), float(alphas[t])) for t in sorted(timesteps, reverse=True)), (0, 1.0)]


@torch.no_grad()
def test_sampling():
    """DDIM as for SD, and the two usual Eulers, which are DDIM over other timesteps with an end without noise."""
    tag, want = "sdxl_sample_small", golden("sdxl_sample_small")
    config = ModelConfig("golden", SMALL, VAEConfig(ch=32), TextConfig(64, 1, 4, 64), guidance=5.0)
    whole = ControlLDM(config)
    whole.model.diffusion_model, whole.control_model = pair(SMALL)
    named = {name: arr(f"{tag}.{name}", 2, 77, 48) for name in ("context", "uncond")}
    ys = {name: arr(f"{tag}.{name}", 2, 96) for name in ("y", "y_uncond")}
    hint, x_T = torch.sigmoid(arr(tag + ".hint", 2, 3, 64, 64)), arr(tag + ".x_T", 2, 4, 8, 8)
    controls = [sampler.Control(whole.control_model, hint)]
    eps = sampler.make_cfg_model(
        whole, named["context"], named["uncond"], controls, 5.0, y=ys["y"], negative_y=ys["y_uncond"]
    )
    assert sampler.ddim_timesteps(10).tolist() == want["ddim_timesteps"].tolist()
    assert distance(sampler.ddim(eps, x_T, 10), want["ddim"]) < 2e-4
    sgm = sampler.ddim_timesteps(10, trailing=True)
    assert sgm.tolist() == sorted(want["euler_sgm_timesteps"].tolist())
    assert distance(sampler.ddim(eps, x_T, 10, schedule=schedule(sgm)), want["euler_sgm"]) < 2e-4
    leading = sampler.ddim_timesteps(10)
    assert distance(sampler.ddim(eps, x_T, 10, schedule=schedule(leading)), want["euler_leading"]) < 2e-4
    # sample() hands both vectors on, and the negative side is the prompt's own without one
    settings = sampler.Sampling(steps=1, seed=3)
    draw = lambda **y: sampler.sample(whole, *named.values(), controls, (64, 64), settings, **y)
    a, b, c = draw(**dict(y=ys["y"], negative_y=ys["y_uncond"])), draw(y=ys["y"]), draw(y=ys["y"], negative_y=ys["y"])
    assert torch.equal(b, c) and not torch.equal(a, b)


def test_steps():
    """Where the steps divide 1000 our two spacings are the original's and Stability's (which diffusers calls trailing);
    elsewhere there are as many as were asked for, and Stability's list can be given."""
    steps = json.loads((GOLDEN / "sdxl_steps.json").read_text())
    for count, lists in steps.items():
        ours = {trailing: sampler.ddim_timesteps(int(count), trailing=trailing)[::-1].tolist() for trailing in (0, 1)}
        assert ours[1] == lists["diffusers_ddim_trailing"] == [round(t) for t in lists["diffusers_euler_trailing"]]
        if 1000 % int(count) == 0:
            assert ours[0] == lists["original_ddim"] == lists["diffusers_ddim_leading"]
            assert ours[1] == lists["sgm"]
        seen = []
        predict = lambda x, t: seen.append(t[0].item()) or x  # noqa: B023
        sampler.ddim(predict, torch.randn(1, 4, 2, 2), int(count), schedule=schedule(lists["sgm"]))
        assert seen == lists["sgm"]


# --------------------------------------------------------------------------------------------------- shapes and names
def test_full_size_keys():
    """Key for key and shape for shape the published file with a ControlNet attached."""
    with torch.device("meta"):
        whole = ControlLDM(MODELS["sdxl"])
    published = json.loads(gzip.decompress((GOLDEN / "sdxl_keys.json.gz").read_bytes()))
    unused = {k for k in published if k.endswith(("position_ids", "logit_scale"))}
    assert len(published) == 2515 + 844 and len(unused) == 2
    assert {k: list(v.shape) for k, v in whole.state_dict().items()} == {
        k: v for k, v in published.items() if k not in unused
    }
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert [count(part) for part in (whole.unet, whole.control_model, whole.vae, *whole.text.encoders())] == [
        2_567_463_684, 1_251_014_160, 83_653_863, 123_060_480, 694_659_840  # the last without logit_scale
    ]  # fmt: skip
    assert (SDXL.multiple, SDXL.vae_factor, SDXL.unet.context_dim) == (32, 8, 768 + 1280)


def test_configurations_there_and_back_and_as_they_were():
    for config in (SDXL, SMALL_SDXL, SD21, TINY):
        assert ModelConfig.from_json(config.to_json()) == config
    # names of caches, and what a resumed run compares, are digests of these texts
    assert repr(SD15.text) == (
        "TextConfig(width=768, layers=12, heads=12, mlp_width=3072, activation='quick_gelu', penultimate=False)"
    )
    assert repr(SD15.unet) == (
        "UNetConfig(in_channels=4, out_channels=4, model_channels=320, channel_mult=(1, 2, 4, 4), num_res_blocks=2, "
        "attention_resolutions=(4, 2, 1), context_dim=768, num_heads=8, num_head_channels=None, "
        "use_linear_in_transformer=False, norm_groups=32)"
    )
    assert "transformer_depth=(1, 2, 10), adm_in_channels=2816" in repr(SDXL.unet)
    assert "final_norm=False" in repr(SDXL.text) and config_repr("scale_factor")(SD15).startswith("ModelConfig(name=")


# ---------------------------------------------------------------------------------------------------------------- VAE
def test_the_vae_is_never_float16():
    assert [SDXL.vae_dtype(d) for d in (torch.float16, torch.bfloat16, torch.float32)] == [
        torch.float32, torch.bfloat16, torch.float32
    ]  # fmt: skip
    assert SD15.vae_dtype(torch.float16) == torch.float16


@torch.no_grad()
def test_numbers_that_overflow_are_refused_and_not_drawn(model):
    overflowing = copy.deepcopy(model)
    overflowing.vae.encoder.conv_out.bias.fill_(torch.inf)
    overflowing.vae.decoder.conv_out.weight.fill_(torch.nan)
    image, latents = torch.rand(1, 3, 64, 64), torch.randn(1, 4, 8, 8)
    for job, says in (
        (lambda m: m.encode_images(image), "the latents of an image .float32.: not finite"),
        (lambda m: m.decode(latents), "an image that the VAE decoded .float32.: not finite"),
    ):
        job(model)
        with pytest.raises(NotFiniteError, match=says) as e:
            job(overflowing)
        assert "\n" not in str(e.value)
    assert not torch.isfinite(model.decode(latents * torch.nan)).all()  # of a run that diverged: not the VAE's fault


def test_the_overflow_of_float16_names_the_way_out():
    from ldm import check_finite

    with pytest.raises(NotFiniteError, match="x .float16.: not finite; .* 65504, .*--precision bf16 or fp32"):
        check_finite(torch.tensor([70000.0]).half(), "x")
    check_finite(torch.ones(3), "x")


def test_second_encoder_loads_like_the_first():
    encoder = CLIPTextModel(TEXT)
    assert len(encoder.text_model.encoder.layers) == 3  # all are kept, as in the file, and the last is not computed
    before = encoder(torch.zeros(1, 77, dtype=torch.int64))
    filled(encoder.text_model.encoder.layers[2], "other.")
    filled(encoder.text_model.final_layer_norm, "other.")
    assert torch.equal(before, encoder(torch.zeros(1, 77, dtype=torch.int64)))
