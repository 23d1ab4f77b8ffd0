"""What configurations in files say is checked: types, ranges, contradictions; schedulers are followed or refused."""

import json

import pytest
import torch

import config
import merge
import train
from ldm import SD15, TINY
from weights import CheckpointError, ModelSource, load_model, load_state_dict
from weights.configs import MODEL, RUN, STATE, check_fields, load_json, metadata_config
from weights.reading import load_metadata
from weights.runs import check_checkpoint, list_checkpoints, load_run, load_state, newest_checkpoint
from weights.source import read_model
from weights.writing import save_json, save_safetensors, write_folder, write_safetensors

WRONG = [[], {}, "x", "1", -1, 0.5, 10**9, 10**400, float("nan"), float("inf"), None, True, [[]], [10**9] * 4, ["a"]]


def one_line(error) -> str:
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


def test_every_field_of_a_models_configuration_is_checked():
    """Whatever stands in a field: a model's configuration, or one line that names the file and the field."""
    fields = json.loads(TINY.to_json())
    places = [(None, name) for name in fields] + [(part, k) for part in ("unet", "vae", "text") for k in fields[part]]
    assert {name for part, name in places if part is None} == set(MODEL)
    assert {(part, k) for part in ("unet", "vae", "text") for k in MODEL[part]} == {p for p in places if p[0]}
    for part, name in places:
        for value in WRONG:
            changed = json.loads(TINY.to_json())
            (changed[part] if part else changed)[name] = value
            try:
                read = metadata_config("m.safetensors", json.dumps(changed))
            except CheckpointError as e:
                assert "m.safetensors: its metadata's configuration" in str(e) and name in str(e).replace(" ", "_"), e
            else:
                assert read is not None
    assert metadata_config("m", TINY.to_json()) == TINY


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"unet": {"norm_groups": 0}}, "unet.norm_groups is 0, should be an integer from 1"),
        ({"unet": {"model_channels": -320}}, "unet.model_channels is -320"),
        ({"unet": {"model_channels": 10**9}}, "unet.model_channels is 1000000000"),
        ({"unet": {"num_res_blocks": 10**9}}, "unet.num_res_blocks is 1000000000"),
        ({"unet": {"norm_groups": 7}}, "unet: 320 channels cannot be normed in 7 groups"),
        ({"unet": {"num_heads": 7}}, "cannot be cut into heads"),
        ({"unet": {"num_heads": None}}, "set exactly one of num_heads"),
        ({"unet": {"model_channels": 33, "norm_groups": 1}}, "should be even"),
        ({"unet": {"channel_mult": []}}, "unet.channel_mult is .., should be a list of 1 to 8 values"),
        ({"unet": 3}, "unet is 3, should be an object"),
        ({"unet": {"new": 1}}, "new"),
        ({"text": {"width": 1024, "heads": 16}}, "unet.context_dim is 768, text.width 1024"),
        ({"vae": {"z_channels": 8}}, "the VAE's latents 8"),
        ({"hint_widths": [16, 32, 96]}, "hint_widths is .*, should be a list of 4"),
    ],
)
def test_configurations_of_which_no_model_can_be_built(fields, says, tmp_path, capsys):
    path = tmp_path / "bomb.safetensors"
    first = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)}
    save_safetensors(path, first, {"config": json.dumps({"name": "x"} | fields)})
    with pytest.raises(CheckpointError, match=f"bomb.safetensors: its metadata's configuration: .*{says}") as e:
        load_model(path)
    one_line(e)
    merge.main(["info", str(path)])
    assert "metadata's configuration" in capsys.readouterr().out


def test_the_metadata_of_other_programs_is_left_alone(tmp_path):
    for text in ("", "[", "[" * 100_000, "[]", "3", '"x"', '{"name": 1, "new": 2}', '{"unet": 3}', "{}"):
        assert metadata_config("m", text) is None


def test_blocks_without_number(tmp_path):
    """Keys claim more blocks than there are: the table of names is not made for all of them."""
    for number in ("2000000000", "9" * 5000, "x", "-1", "²"):
        state = {f"down_blocks.{number}.resnets.0.conv1.weight": torch.zeros(1)}
        state |= {"down_blocks.0.resnets.0.time_emb_proj.weight": torch.zeros(1), "conv_in.weight": torch.zeros(2)}
        save_safetensors(tmp_path / "a.safetensors", state)
        assert "model.diffusion_model.input_blocks.0.0.weight" in load_state_dict(tmp_path / "a.safetensors")


@pytest.mark.parametrize("shape", [(), (0,), (3,), (1, 1, 1, 1, 1)])
def test_shapes_that_no_model_has(shape, tmp_path):
    for key in (
        "model.diffusion_model.input_blocks.0.0.weight", "control_model.input_hint_block.0.weight",
        "text_model.embeddings.token_embedding.weight", "cond_stage_model.model.transformer.resblocks.0.x.y",
        "encoder.down_blocks.0.resnets.0.norm1.weight", "model.diffusion_model.input_blocks.1.1.transformer_blocks",
    ):  # fmt: skip
        save_safetensors(tmp_path / "a.safetensors", {key: torch.zeros(shape)})
        with pytest.raises(CheckpointError, match="a.safetensors") as e:
            load_model(tmp_path / "a.safetensors")
        one_line(e)


# -------------------------------------------------------------------------------------------------------- JSON files
def test_json_that_hurts(tmp_path):
    path = tmp_path / "a.json"
    for content in (b"[" * 100_000, b"9" * 5000, b"\xff\xfe{", b"", b'{"a": ', '{"é": 1}'.encode("latin1")):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="a.json: not readable as JSON") as e:
            load_json(path)
        one_line(e)
    path.write_bytes(b"\xef\xbb\xbf" + '{"é": 1}'.encode())
    assert load_json(path) == {"é": 1}
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_json(tmp_path)


def test_every_field_of_run_and_state_is_checked():
    for rules in (RUN, STATE):
        for name, rule in rules.items():
            for value in WRONG:
                if not rule.accepts(value):
                    with pytest.raises(CheckpointError, match=f"f.json: {name} is ") as e:
                        check_fields("f.json", {name: value}, rules)
                    one_line(e)
        with pytest.raises(CheckpointError, match="f.json: is .*, should be an object"):
            check_fields("f.json", [], rules)
    for text in ("a\0b", "\ud800", "a" * 5000):
        assert not RUN["base"].accepts(text)


def diffusers_folder(base, path):
    merge.main(["export", str(base), str(path)])
    return path


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    return diffusers_folder(base, tmp_path_factory.mktemp("scheduler") / "folder")


def test_what_the_scheduler_says_is_followed(exported):
    file = exported / "scheduler" / "scheduler_config.json"
    fields = load_json(file)
    assert read_model(exported)[1] == TINY
    try:
        says = dict(beta_start=0.001, beta_end=0.01, num_train_timesteps=500, rescale_betas_zero_snr=True)
        save_json(file, fields | says)
        config = read_model(exported)[1]
        assert (config.linear_start, config.linear_end, config.timesteps) == (0.001, 0.01, 500)
        assert config.zero_terminal_snr and config.prediction == "v"
        with pytest.raises(CheckpointError, match="predicts eps, .* the schedule with zero terminal SNR of this model"):
            read_model(ModelSource(exported, prediction="eps"))
        save_json(file, {"prediction_type": "epsilon"})
        assert read_model(exported)[1].prediction == "eps"
        for wrong, says in {
            "prediction_type": [("sample", "should be one of epsilon, v_prediction"), (1, "is 1"), (None, "is None")],
            "beta_schedule": [("linear", "should be scaled_linear"), ("squaredcos_cap_v2", "should be"), ([], "is ..")],
            "trained_betas": [([0.1], "should be null")],
            "beta_start": [("0.1", "a number"), (-1, "is -1"), (float("nan"), "is nan"), (True, "is True")],
            "num_train_timesteps": [(0, "is 0"), (10**9, "is 1000000000"), (1000.5, "is 1000.5")],
            "rescale_betas_zero_snr": [("yes", "should be true or false")],
            "_class_name": [("FlowMatchEulerDiscreteScheduler", "of another kind"), (3, "is 3")],
        }.items():
            for value, message in says:
                save_json(file, fields | {wrong: value})
                with pytest.raises(CheckpointError, match=f"scheduler_config.json: .*{message}") as e:
                    load_model(exported)
                one_line(e)
        for content in ([], -1, "x"):
            save_json(file, content)
            with pytest.raises(CheckpointError, match="scheduler_config.json: is .*, should be an object"):
                load_model(exported)
    finally:
        save_json(file, fields)


def test_stable_diffusions_own_scheduler_changes_nothing(tmp_path):
    """As SD 1.5's folder has it."""
    for name in ("unet", "scheduler"):
        (tmp_path / name).mkdir()
    state = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(1, 768),
    }
    save_safetensors(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", state)
    save_json(tmp_path / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    scheduler = {
        "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "trained_betas": None, "clip_sample": False,
    }  # fmt: skip
    save_json(tmp_path / "scheduler" / "scheduler_config.json", scheduler)
    assert read_model(tmp_path)[1] == SD15
    for content in ([], 3):
        save_json(tmp_path / "model_index.json", content)
        with pytest.raises(CheckpointError, match="model_index.json: is .*, should be an object"):
            read_model(tmp_path)


def test_indexes_of_shards(tmp_path):
    for content in ([], {}, {"weight_map": []}, {"weight_map": {"a": []}}, {"weight_map": {"a": {"b": 1}}}, None):
        save_json(tmp_path / "model.safetensors.index.json", content)
        with pytest.raises(CheckpointError, match="index.json: ") as e:
            load_state_dict(tmp_path)
        one_line(e)


# ------------------------------------------------------------------------------------------------ runs, checkpoints
def write_checkpoint(run, step: int, state: dict | None = None, weights: dict | None = None) -> None:
    state = dict(step=step, samples=4, config={}) | (state or {})
    weights = weights or {"control_model.x": torch.full((1000,), float(step))}
    files = {
        "trained.safetensors": lambda path: write_safetensors(path, weights, {}),
        "optimizer.safetensors": lambda path: write_safetensors(path, {"exp_avg:x": torch.ones(3)}, {}),
        "state.json": lambda path: path.write_text(json.dumps(state)),
    }
    write_folder(run / "checkpoints" / f"step-{step:06d}", files)


def test_checkpoints_are_sorted_by_number(tmp_path):
    for step in (1_000_000, 999_999, 2, 10_000_000):
        write_checkpoint(tmp_path, step)
    for name in ("step-000003.partial", "step-000004.replaced", "step-x", "step-", "step--1", "step-²", "other"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "step-000009").write_text("a file")
    names = [p.name for p in list_checkpoints(tmp_path)]
    assert names == ["step-000002", "step-999999", "step-1000000", "step-10000000"]
    assert newest_checkpoint(tmp_path).name == "step-10000000"


@pytest.mark.parametrize("file", ["trained.safetensors", "optimizer.safetensors", "state.json", "checksums.json"])
def test_a_flipped_bit_is_noticed(file, tmp_path, capsys):
    for step in (1, 2):
        write_checkpoint(tmp_path, step)
    assert newest_checkpoint(tmp_path).name == "step-000002"  # checked once already in this process
    path = tmp_path / "checkpoints" / "step-000002" / file
    content = bytearray(path.read_bytes())
    content[-20] ^= 4
    path.write_bytes(content)
    assert newest_checkpoint(tmp_path).name == "step-000001"
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "step-000002: damaged" in said and file in said


def test_files_that_are_gone_are_noticed(tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoints" / "step-000002" / "state.json").unlink()
    assert newest_checkpoint(tmp_path).name == "step-000001"
    sums = tmp_path / "checkpoints" / "step-000001" / "checksums.json"
    for content in ({}, [], {"trained.safetensors": 3}, {"trained.safetensors": {"bytes": 1}}):
        save_json(sums, content)
        with pytest.raises(CheckpointError, match=r"checksums.json: "):
            check_checkpoint(sums.parent)
    sums.unlink()  # as checkpoints were written before there were checksums
    check_checkpoint(sums.parent)


def test_a_state_without_its_step_is_no_checkpoint(tmp_path, capsys):
    write_checkpoint(tmp_path, 1)
    for state in (dict(step=None), dict(step="2"), dict(step=-1), dict(samples=0.5), dict(config=[])):
        write_checkpoint(tmp_path, 2, state)
        assert newest_checkpoint(tmp_path).name == "step-000001" and "state.json: " in capsys.readouterr().out
    save_json(tmp_path / "checkpoints" / "step-000002" / "state.json", {"samples": 1, "config": {}})
    with pytest.raises(CheckpointError, match="state.json: has no step"):
        load_state(tmp_path / "checkpoints" / "step-000002")


def test_a_run_is_read_from_its_intact_checkpoint(base, tmp_path, capsys):
    save_json(tmp_path / "config.json", {"base": str(base)})
    for step in (1, 2):
        write_checkpoint(tmp_path, step, weights={"model.diffusion_model.out.2.bias": torch.full((4,), float(step))})
    assert load_model(tmp_path).unet.out[2].bias[0] == 2
    path = tmp_path / "checkpoints" / "step-000002" / "trained.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert load_model(tmp_path).unet.out[2].bias[0] == 1 and "damaged" in capsys.readouterr().out


def test_settings_of_a_run_with_wrong_types(base, tmp_path):
    for fields in (dict(base=5), dict(vae=[]), dict(ema="yes"), dict(clip_skip="2"), dict(prediction="x0")):
        save_json(tmp_path / "config.json", {"base": str(base)} | fields)
        with pytest.raises(CheckpointError, match="config.json: ") as e:
            load_model(tmp_path)
        one_line(e)
    for content in ([], ["base"], 3, "base", None):
        save_json(tmp_path / "config.json", content)
        with pytest.raises(CheckpointError, match="not the folder of a training run"):
            load_run(tmp_path)
    for fields in (dict(steps="ten"), dict(memory=[]), dict(device=3), dict(batch_size=-1), dict(learning_rate=None)):
        save_json(tmp_path / "config.json", {"base": str(base), "data": "x"} | fields)
        with pytest.raises(config.ConfigError, match="config.json: --") as e:
            train.parse(["--resume", str(tmp_path)])
        one_line(e)


def test_metadata_of_what_is_not_safetensors(tmp_path):
    torch.save({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    assert load_metadata(tmp_path / "a.safetensors") == {}
