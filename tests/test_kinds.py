"""Files and tensors of other kinds: what would change the numbers is refused by name, what would not passes."""

import re

import pytest
import torch

import merge
from ldm import SD15, SD21, TINY, ControlLDM
from tests.test_clients import full_list, random_model
from weights import CheckpointError, ModelSource, detect, load_model, source
from weights.diffusers_folder import diffusers_folder
from weights.kinds import HARMLESS, KINDS
from weights.source import read_model
from weights.writing import save_safetensors

CONTROL, UNET = "control_model.", "model.diffusion_model."


@pytest.fixture(scope="module")
def tiny() -> dict[str, torch.Tensor]:
    return random_model(TINY).state_dict()


LAYER = "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight"
CHANGES = [
    (UNET + "time_embedding.cond_proj.weight", "a latent consistency model"),
    (UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k_ip.weight", "an IP-Adapter"),
    (UNET + "input_blocks.1.1.transformer_blocks.0.attn2.processor.to_k_ip.weight", "an IP-Adapter"),
    (UNET + "input_blocks.1.2.motion_module.x", "SparseCtrl or AnimateDiff"),
    (UNET + "scaled_fp8", "quantized weights"), (UNET + "label_emb.0.0.weight", "the SDXL kind"),
    (UNET + "position_net.linears.0.weight", "GLIGEN"), (UNET + "input_blocks.1.7.weight", "this UNet does not have"),
    (UNET + "input_blocks.1.1.proj_in.lora_A.weight", "a LoRA"), (UNET + "out.3.weight", "this UNet does not have"),
    (CONTROL + "input_hint_block.16.weight", "a hint encoder with further layers"),
    (CONTROL + "controlnet_cond_embedding.blocks.6.weight", "a hint encoder with further layers"),
    (CONTROL + "task_embedding", "a union ControlNet"), (CONTROL + "control_add_embedding.linear_1.bias", "a union"),
    (CONTROL + "zero_convs.12.0.weight", "this ControlNet does not have"),
    (CONTROL + "lora_controlnet", "a Control-LoRA"),
    ("first_stage_model.encoder.down.0.attn.0.q.weight", "this VAE does not have"),
    ("first_stage_model.decoder.up.0.time_mix", "this VAE does not have"),
    (LAYER.replace("q_proj", "extra"), "this text encoder does not have"),
    ("cond_stage_model.transformer.text_model.adapter.weight", "this text encoder does not have"),
]  # fmt: skip
PASSES = [
    "model_ema.decay", "model_ema.num_updates", UNET + "num_updates", "first_stage_model.loss.logvar", "logvar",
    "first_stage_model.model_ema.decay", "cond_stage_model.transformer.text_model.embeddings.position_ids",
    "cond_stage_model.logit_scale", "cond_stage_model.transformer.text_projection.weight", "optimizer.state.0",
    "cond_stage_model.transformer.vision_model.embeddings.class_embedding", LAYER.replace("layers.1", "layers.9"),
    "betas", "alphas_cumprod", "lvlb_weights", "epoch",
]  # fmt: skip


@pytest.fixture
def in_memory(monkeypatch):
    """A dictionary: name of a file -> its tensors, which are read as if they were in a file of this project."""
    files = {}
    monkeypatch.setattr(source, "load_state_dict", lambda path: dict(files[str(path)]))
    for module in (source, detect, merge):
        monkeypatch.setattr(module, "load_metadata", lambda path: {"config": TINY.to_json()})
    return files


@pytest.mark.parametrize(("key", "says"), CHANGES)
def test_tensors_that_change_the_numbers_are_refused_by_name(key, says, tiny, in_memory):
    """In a whole file, whatever is made of it; and the file of the ControlNet is blamed for what the ControlNet has."""
    whole = tiny | {key: torch.ones(2, 2)}
    plain = {k: v for k, v in whole.items() if not k.startswith(CONTROL)}
    in_memory |= {"odd": whole, "plain": plain, "base": {k: v for k, v in tiny.items() if k in plain}}
    in_memory["control"] = {k: v for k, v in whole.items() if k.startswith(CONTROL)}
    jobs = [lambda: load_model("odd"), lambda: read_model("odd")]
    if key.startswith(CONTROL):
        jobs += [lambda f=f: f(ModelSource("base", control="control")) for f in (load_model, read_model)]
    else:
        jobs.append(lambda: merge.attach(ModelSource("plain", hint_channels=3)))
    for job, file in zip(
        jobs, ("odd", "odd", "control" if key.startswith(CONTROL) else "plain", "control"), strict=False
    ):
        with pytest.raises(CheckpointError, match=f"^{file}: ") as e:
            job()
        assert says in str(e.value) and "\n" not in str(e.value) and key.rsplit(".", 2)[-1] in str(e.value)


def test_tensors_without_effect_pass(tiny, in_memory):
    in_memory["odd"] = tiny | {key: torch.ones(2, 2) for key in PASSES}
    assert all(torch.equal(v, tiny[k]) for k, v in load_model("odd").state_dict().items())
    state, config = read_model("odd")
    assert PASSES[-1] in state and diffusers_folder("odd", state, config)


def test_no_weight_of_a_known_model_is_taken_for_one_of_another_kind():
    for config in (SD15, SD21, TINY):
        with torch.device("meta"):
            state = ControlLDM(config).state_dict()
        for key in (*state, *full_list("sd15"), *full_list("sd21")):
            assert HARMLESS.fullmatch(key) or not any(re.search(words, key) for words in KINDS), key


def lora(width: int, sdxl: bool) -> dict[str, torch.Tensor]:
    """As much of a Control-LoRA as tells what it is."""
    state = {
        "lora_controlnet": torch.zeros(0), "input_hint_block.0.weight": torch.zeros(16, 3, 3, 3),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.down": torch.zeros(4, width),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.up": torch.zeros(320, 4),
    }  # fmt: skip
    return state | {"label_emb.0.0.up" if sdxl else "input_blocks.11.0.in_layers.2.up": torch.zeros(1280, 4)}


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (lora(768, False), "a Control-LoRA, .*for SD 1.x"), (lora(1024, False), "a Control-LoRA, .*for SD 2.x"),
        (lora(2048, True), "a Control-LoRA, .*for SDXL"),
        ({"down_blocks.0.motion_modules.0.x": torch.ones(1), "controlnet_cond_embedding.weight": torch.ones(1),
          "down_blocks.0.resnets.0.time_emb_proj.weight": torch.ones(1)}, "SparseCtrl"),
        ({"image_proj.norm.weight": torch.ones(1), "ip_adapter.1.to_k_ip.weight": torch.ones(1)}, "an IP-Adapter"),
        ({"body.0.in_conv.weight": torch.ones(1)}, "a T2I-Adapter"),
        ({"lllite_unet_x.down.0.weight": torch.ones(1)}, "a ControlNet-LLLite"),
        ({"input_hint_block.0.weight": torch.ones(1), "label_emb.0.0.weight": torch.ones(1)}, "the SDXL kind"),
    ],
)  # fmt: skip
def test_the_controlnet_s_file_is_blamed(state, says, base, tmp_path):
    save_safetensors(tmp_path / "c.safetensors", state)
    for job in (
        lambda: load_model(ModelSource(base, control=tmp_path / "c.safetensors")),
        lambda: merge.main(["extract", str(tmp_path / "c.safetensors"), str(tmp_path / "x.safetensors")]),
    ):
        with pytest.raises(CheckpointError, match=f"^{tmp_path}/c.safetensors: .*{says}"):
            job()


def test_unclip_is_not_sdxl(tmp_path):
    state = {
        UNET + "input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
        UNET + "label_emb.0.0.weight": torch.zeros(1280, 1536),
        UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, 1024),
    }  # fmt: skip
    save_safetensors(tmp_path / "unclip.safetensors", state)
    with pytest.raises(CheckpointError, match="unclip.safetensors: .*SD 2.1 unCLIP"):
        load_model(tmp_path / "unclip.safetensors")
