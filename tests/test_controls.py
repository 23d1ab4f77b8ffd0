"""Several ControlNets at once: loaded for a base, added up, and equal to diffusers' MultiControlNetModel."""

import dataclasses
import json
import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DISABLE_TELEMETRY": "1"}

import diffusers
import pytest
import torch
from diffusers.models.controlnets import MultiControlNetModel
from torch import Tensor

import data
import merge
import sampler
import train
from drawing.loading import load
from drawing.metadata import read_parameters
from drawing.request import parse
from ldm import ControlLDM
from sampler import Control, Sampling
from tests.conftest import distance
from tests.fuzz_inputs import run_flags, save_micro_model
from toy import circles
from unet import UNet
from weights import CheckpointError, ModelSource, load_control, load_controls, load_model
from weights.writing import save_safetensors

CLOSE = 4e-6


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A base model, and three ControlNets for it, of 3, 1 and 3 hint channels: a file, a diffusers folder and a file of
    differences."""
    folder = tmp_path_factory.mktemp("several")
    base = save_micro_model(folder / "base.safetensors")
    paths = [folder / "a.safetensors", folder / "b", folder / "c.safetensors"]
    for seed, (channels, path, flags) in enumerate(
        zip((3, 1, 3), paths, ([], ["--format", "diffusers"], ["--difference", str(base)]), strict=True)
    ):
        model = load_model(ModelSource(base, attach=True, hint_channels=channels, seed=seed))
        torch.manual_seed(seed)
        for p in model.control_model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
        save_safetensors(folder / f"{seed}.safetensors", model.state_dict(), {"config": model.config.to_json()})
        merge.main(["extract", str(folder / f"{seed}.safetensors"), str(path), *flags])
    return load_model(base), base, paths


def steered(model: ControlLDM, controls: list[Control], monkeypatch, scale: float = 1.0, **settings) -> list[Tensor]:
    """The residuals that the UNet gets at timestep 500, for x of 2 images."""
    given, torch_seed = [], torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 8, 8, generator=torch_seed)
    context = torch.randn(2, 77, 32, generator=torch_seed)
    monkeypatch.setattr(UNet, "forward", lambda self, x, t, c, control=None: given.append(control) or x)
    sampler.make_cfg_model(model, context, -context, controls, scale, **settings)(x, torch.tensor([500, 500]))
    monkeypatch.undo()
    return given[0]


def hints(channels: int, size: int = 64) -> Tensor:
    return torch.rand(2, channels, size, size)


@torch.no_grad()
def test_several_are_those_of_diffusers(several, monkeypatch, tmp_path):
    model, _, (a, b, _) = several
    nets = load_controls([a, b], model)
    merge.main(["extract", str(a), str(tmp_path / "a"), "--format", "diffusers"])
    theirs = MultiControlNetModel([diffusers.ControlNetModel.from_pretrained(p).eval() for p in (tmp_path / "a", b)])
    ha, hb = hints(3), hints(1)
    ours = steered(model, [Control(nets[0], ha, 1.0), Control(nets[1], hb, 0.5)], monkeypatch)
    generator = torch.Generator().manual_seed(3)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 32, generator=generator)
    down, mid = theirs(x, torch.tensor([500, 500]), context, [ha, hb], [1.0, 0.5], return_dict=False)
    assert len(ours) == len(down) + 1
    assert max(distance(o, t) for o, t in zip(ours, [*down, mid], strict=True)) < CLOSE
    alone = steered(model, [Control(nets[0], ha, 1.0)], monkeypatch)
    assert distance(alone[0], ours[0]) > 0.01  # the second one counts


@torch.no_grad()
def test_each_has_its_own_settings(several, monkeypatch):
    """Strength, start, end and guess mode of one leave the other as it is."""
    model, _, paths = several
    a, b, _ = load_controls(paths, model)
    ha, hb = hints(3), hints(1)
    add = lambda *parts: [sum(residuals) for residuals in zip(*parts, strict=True)]
    get = lambda *controls, **settings: steered(model, list(controls), monkeypatch, 3.0, **settings)
    same = lambda x, y: all(torch.allclose(p, q, atol=1e-5) for p, q in zip(x, y, strict=True))
    one, two = get(Control(a, ha)), get(Control(b, hb))
    assert one[0].shape[0] == 4 and same(get(Control(a, ha), Control(b, hb)), add(one, two))
    assert same(get(Control(a, ha), Control(b, hb, 0.25)), add(one, [r * 0.25 for r in two]))
    assert same(get(Control(a, ha), Control(b, hb, start=0.6)), one)  # t = 500 is half the way
    assert same(get(Control(a, ha, end=0.4), Control(b, hb)), two)
    guess = get(Control(b, hb, 0.5, guess_mode=True))
    last = len(b.zero_convs)
    for i, (g, r) in enumerate(zip(guess, two, strict=True)):
        assert torch.allclose(g[:2], r[:2] * 0.5 * 0.825 ** (last - i), atol=1e-5) and not g[2:].any()
    assert same(get(Control(a, ha), Control(b, hb, 0.5, guess_mode=True)), add(one, guess))
    assert same(get(Control(a, ha), Control(b, hb), guess_mode=True),
                get(Control(a, ha, guess_mode=True), Control(b, hb, guess_mode=True)))  # fmt: skip


@torch.no_grad()
def test_mid_only_and_pooled_ones_mix_with_full_ones(several, monkeypatch):
    model, _, paths = several
    a, b, c = load_controls(paths, model)
    ha, hb, hc = hints(3), hints(1), hints(3)
    full = steered(model, [Control(a, ha)], monkeypatch)
    b.only_mid_control, c.global_pool = True, True
    (mid,), pooled = (steered(model, [x], monkeypatch) for x in (Control(b, hb), Control(c, hc)))
    assert pooled[0].shape[2:] == (1, 1)
    for order in ((0, 1, 2), (1, 2, 0), (2, 1, 0)):
        controls = [Control(a, ha), Control(b, hb), Control(c, hc)]
        both = steered(model, [controls[i] for i in order], monkeypatch)
        for i, (r, f, p) in enumerate(zip(both, full, pooled, strict=True)):
            assert torch.allclose(r, f + p + (mid if i == len(full) - 1 else 0), atol=1e-5)


@torch.no_grad()
def test_hints_of_other_sizes_are_brought_to_the_pictures(several):
    model, _, paths = several
    net = load_control(paths[0], model)
    context = torch.randn(2, 77, 32)
    large = hints(3, 96)[..., :80]  # 80x96 pixels
    arrays = [data.resize(h.permute(1, 2, 0).numpy(), (64, 32), data.RESAMPLE["area"]) for h in large]
    fitted = torch.stack([data.to_tensor(array) for array in arrays])
    draw = lambda hint: sampler.sample(
        model, context, context, [Control(net, hint)], (64, 32), Sampling(steps=2, scale=1.0)
    )
    assert torch.equal(draw(large), draw(fitted)) and not torch.equal(draw(large), draw(fitted * 0))


# ------------------------------------------------------------------------------------------------------------ loading
@torch.no_grad()
def test_a_controlnet_alone_is_the_one_that_a_whole_model_has(several):
    model, base, paths = several
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for path in paths:
        net, whole = load_control(path, model), load_model(ModelSource(base, control=path)).control_model
        assert net.hint_channels == whole.hint_channels and net.global_pool == whole.global_pool
        ours, theirs = net.state_dict(), whole.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
        assert not net.training and not any(p.requires_grad for p in net.parameters())
    (pooled := paths[0].with_name("a_shuffle.safetensors")).write_bytes(paths[0].read_bytes())
    plain, shuffle = load_controls([paths[0], pooled], model)  # the metadata of our own files comes before their names
    assert not plain.global_pool and not shuffle.global_pool
    settings = json.loads((paths[1] / "config.json").read_text())
    (folder := pooled.with_name("pooled")).mkdir()
    for file in paths[1].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(settings | {"global_pool_conditions": True}))
    assert load_control(folder, model).global_pool
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    half = load_model(base).to(torch.bfloat16)  # a model that is on its device already
    assert next(load_control(paths[0], half).parameters()).dtype == torch.float32


def test_what_is_no_controlnet_of_this_base_is_refused_in_one_line(several, base, tmp_path):
    model, own, paths = several
    tiny = load_model(ModelSource(base, attach=True)).state_dict()
    other = tmp_path / "tiny_control.safetensors"
    save_safetensors(other, {k: v for k, v in tiny.items() if k.startswith("control_model.")}, {})
    with pytest.raises(CheckpointError, match="tiny_control.*another kind of model than the model micro") as e:
        load_control(other, model)
    assert "\n" not in str(e.value)
    with pytest.raises(CheckpointError, match="another kind of model than mine"):
        load_controls([paths[0], other], model, "mine")
    with pytest.raises(CheckpointError, match="a ControlNet is needed here"):
        load_control(own, model)
    with pytest.raises(CheckpointError):
        load_control(tmp_path / "nothing.safetensors", model)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder with the run `run` of one step, its base and its data set."""
    folder = tmp_path_factory.mktemp("run")
    save_micro_model(folder / "base.safetensors")
    circles.make(folder / "data", count=6, size=32, seed=3)
    train.main([*run_flags(folder, steps=1), "--logger-freq", "0", "--only-mid-control", "--no-sd-locked"])
    return folder


@torch.no_grad()
def test_a_run_s_controlnet_joins_another_model(run, capsys, monkeypatch):
    """The moving average, and what its settings say, as where the whole run is loaded."""
    whole, model = load_model(run / "run"), load_model(run / "base.safetensors")
    capsys.readouterr()
    net = load_control(run / "run", model)
    ours, theirs = net.state_dict(), whole.control_model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert net.only_mid_control and "trained the UNet's decoder too" in capsys.readouterr().out
    model.config = dataclasses.replace(model.config, prediction="eps")
    load_control(run / "run", model)
    assert "predicts v; this one predicts eps" in capsys.readouterr().out


def test_further_controlnets_join_that_of_a_run(run, several, tmp_path):
    """On the command line; and a run joins a base."""
    gray = several[2][1]
    hint = str(run / "data" / "source" / "0.png")
    settings = ["--prompt", "p", "--steps", "1", "--num", "1", "--device", "cpu", "--out", str(tmp_path)]
    own, other = ["--hint", hint, "--strength", "0.5"], ["--control", str(gray), "--hint", hint]
    loaded = load(parse(["--model", str(run / "run"), *own, *other, *settings]))
    assert loaded.controls[0].net is loaded.model.control_model and loaded.controls[0].net.only_mid_control
    assert [c.net.hint_channels for c in loaded.controls] == [3, 1]
    assert [c.request.strength for c in loaded.controls] == [0.5, 1.0]
    (alone,) = load(parse(["--model", str(run / "run"), *other, *settings])).controls  # its own has no hint
    assert alone.net.hint_channels == 1
    joined = load(
        parse(["--model", str(run / "base.safetensors"), *other, "--control", str(run / "run"), *own, *settings])
    )
    ours, theirs = joined.controls[1].net.state_dict(), loaded.controls[0].net.state_dict()
    assert joined.controls[1].net.only_mid_control and all(torch.equal(ours[k], theirs[k]) for k in theirs)
    sampler.main(["--model", str(run / "run"), *own, *other, *settings])
    text = read_parameters(tmp_path / "0000.png")
    assert "Weight: 0.5" in text and "Model: b [" in text and "Only Mid Control: True" in text
