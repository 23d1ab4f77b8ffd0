"""What must hold of the models beyond the golden numbers."""

import pytest
import torch
from torch import nn

import train
from clip_text import Tokenizer
from controlnet import ControlNet
from layers import Addition, Conv1x1, Conv3x3, GatedGELU
from ldm import SD21_V, TINY, ModelConfig
from training.preparation import normalize_hint_encoder
from unet import UNetConfig
from weights import CheckpointError, ModelSource, load_model, load_state_dict
from weights.source import load_trained
from weights.writing import save_safetensors


@pytest.mark.parametrize("hint_channels", [1, 3, 5])
@torch.no_grad()
def test_attached_model_equals_base_bit_for_bit(base, hint_channels):
    model = load_model(ModelSource(base, attach=True, hint_channels=hint_channels))
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 77, 64)
    hint = torch.rand(2, hint_channels, 64, 64)
    plain = model.predict(x, t, context)
    assert torch.equal(model.predict(x, t, context, hint), plain)
    model.control_model.only_mid_control = True
    assert torch.equal(model.predict(x, t, context, hint), plain)
    model.control_model.only_mid_control = False
    model.control_model.middle_block_out[0].weight.fill_(0.1)
    assert not torch.equal(model.predict(x, t, context, hint), plain)


def test_control_copies_the_encoder_and_its_seed_fixes_the_rest(base):
    model = load_model(ModelSource(base, attach=True, seed=1))
    for name, p in model.unet.named_parameters():
        if not name.startswith(("output_blocks", "out.")):
            assert torch.equal(dict(model.control_model.named_parameters())[name], p)
    again, other = (ControlNet.from_unet(model.unet, 3, TINY.hint_widths, seed).input_hint_block[0] for seed in (1, 2))
    assert TINY.hint_gain == 3.0  # its own; PyTorch's default otherwise, as for Stable Diffusion
    assert torch.equal(again.weight * 3, model.control_model.input_hint_block[0].weight)
    assert not torch.equal(other.weight, again.weight)


@pytest.mark.parametrize(("batch", "side", "stride"), [(1, 4, 1), (3, 3, 1), (2, 4, 2), (1, 5, 2)])
def test_a_convolution_as_one_product_is_the_convolution(monkeypatch, batch, side, stride):
    conv, x = Conv3x3(6, 80, stride), torch.randn(batch, 6, side, side, requires_grad=True)
    wanted = torch.nn.functional.conv2d(x, conv.weight, conv.bias, stride, 1)
    with monkeypatch.context() as m:  # it does without the library's convolution
        m.delattr(torch.nn.Conv2d, "forward")
        out = conv(x)
    assert out.shape == wanted.shape and torch.allclose(out, wanted, atol=1e-5)
    upstream, weights = torch.randn_like(out), (x, conv.weight, conv.bias)
    for a, b in zip(*(torch.autograd.grad(y, weights, upstream) for y in (out, wanted)), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    large = torch.randn(1, 6, 16, 16)  # many positions, few channels: the library's
    assert torch.equal(conv(large), torch.nn.functional.conv2d(large, conv.weight, conv.bias, stride, 1))


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_a_1x1_convolution_as_a_product_is_the_convolution(monkeypatch, format):
    conv, x = Conv1x1(6, 10), torch.randn(2, 6, 5, 3).contiguous(memory_format=format)
    wanted = torch.nn.functional.conv2d(x, conv.weight, conv.bias)
    with torch.no_grad(), monkeypatch.context() as m:
        m.delattr(torch.nn.Conv2d, "forward")
        out = conv(x)
    assert torch.allclose(out, wanted, atol=1e-5) and out.is_contiguous(memory_format=format)
    assert torch.equal(conv(x), wanted)  # where a gradient is asked for: the library's


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", [lambda: Conv3x3(3, 5), lambda: Conv3x3(3, 5, stride=2), lambda: Conv1x1(3, 5)])
def test_a_frozen_convolution_has_the_same_gradient_and_keeps_nothing(make, format):
    conv = make().to(memory_format=format)
    x = torch.randn(4, 3, 8, 6).to(memory_format=format).requires_grad_()
    kept = []

    def through() -> tuple[torch.Tensor, torch.Tensor]:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            y = conv(x)
        torch.manual_seed(0)
        return y, torch.autograd.grad(y, x, torch.randn_like(y))[0]

    trained = through()
    assert x.shape in kept
    conv.requires_grad_(False)
    frozen = through()
    assert kept == [conv.weight.shape]
    assert torch.equal(trained[0], frozen[0])
    assert torch.equal(trained[1], frozen[1])


def test_the_gate_has_the_same_gradient_and_keeps_only_what_came_in():
    x, kept = torch.randn(2, 5, 16, requires_grad=True), []
    value, gate = x.chunk(2, dim=-1)
    plain = value * torch.nn.functional.gelu(gate)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = GatedGELU.apply(x)
    assert torch.equal(out, plain) and len(kept) == 1 and kept[0].data_ptr() == x.data_ptr()
    grad = torch.randn_like(out)
    assert torch.equal(torch.autograd.grad(out, x, grad)[0], torch.autograd.grad(plain, x, grad)[0])


class Label(Addition):
    """As somebody adds it: an embedding of a class number."""

    def __init__(self, width: int):
        super().__init__()
        self.table = nn.Embedding(10, width)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.table.weight, 0.5)


def test_additions_start_train_and_come_back(base, folder, tmp_path, monkeypatch):
    """A module of one's own in the ControlNet: older files load, a run keeps it, other code says what it lacks."""
    old = tmp_path / "old.safetensors"
    save_safetensors(old, load_model(ModelSource(base, attach=True)).state_dict(), {"config": TINY.to_json()})
    plain = ControlNet.__init__

    def with_label(self, *args):
        plain(self, *args)
        self.label = Label(self.config.model_channels)

    name = "control_model.label.table.weight"
    with monkeypatch.context() as m:
        m.setattr(ControlNet, "__init__", with_label)
        for source in (ModelSource(base, attach=True), ModelSource(old)):
            assert (load_model(source).state_dict()[name] == 0.5).all()
        real = ControlNet.embed_hint
        label = lambda self, hint: real(self, hint) + self.label.table.weight[3][:, None, None]
        m.setattr(ControlNet, "embed_hint", label)
        settings = dict(steps=3, batch_size=2, learning_rate=1e-2, logger_freq=0, weight_decay=0.0, device="cpu")
        paths = dict(base=str(old), data=str(folder), out=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"))
        run = train.train(train.Config(**paths, **settings))
        table = load_model(run).state_dict()[name]
        assert (table[3] != 0.5).any() and (table[4] == 0.5).all()
    with pytest.raises(CheckpointError, match=f"1 tensor that this ControlNet does not have, as {name}"):
        load_model(run)
    with pytest.raises(CheckpointError, match="1 trained tensors have no place in this model, as model.*lora_up"):
        load_trained("run", load_model(old), {"model.diffusion_model.out.2.lora_up": torch.ones(1)})


def test_config_fields():
    with pytest.raises(ValueError, match="exactly one"):
        UNetConfig(num_heads=8, num_head_channels=64)
    assert ModelConfig.from_json(SD21_V.to_json()) == SD21_V
    assert (SD21_V.multiple, TINY.multiple) == (64, 32)


def test_from_file_says_what_is_wrong(base, tmp_path):
    state = load_state_dict(base)

    def message(change: dict, drop: str = "-", config: bool = True) -> str:
        path = tmp_path / "changed.safetensors"
        kept = {k: v for k, v in (state | change).items() if not k.startswith(drop)}
        save_safetensors(path, kept, {"config": TINY.to_json()} if config else {})
        with pytest.raises(CheckpointError) as e:
            load_model(path)
        assert str(e.value).startswith(str(path)) and "\n" not in str(e.value)
        return str(e.value)

    first = "model.diffusion_model.input_blocks.0.0.weight"
    assert "first_stage_model." in message({}, drop="first_stage_model.decoder")
    assert "should be [48, 4, 3, 3]" in message({first: torch.zeros(48, 9, 3, 3)})
    assert "a UNet of 48 channels" in message({}, config=False)
    wide = {
        first: torch.zeros(320, 9, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, 768),
    }
    assert "inpainting" in message(wide, config=False)
    with pytest.raises(CheckpointError, match="no such file"):
        load_model(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match="a folder without weights"):
        load_model(tmp_path)


def test_control_in_file_sets_hint_channels_and_widths(base, tmp_path):
    model = load_model(ModelSource(base, attach=True))
    model.control_model = ControlNet.from_unet(model.unet, 2, (4, 5, 6, 7))
    path = tmp_path / "with_control.safetensors"
    save_safetensors(path, model.state_dict(), {"config": TINY.to_json()})
    loaded = load_model(path)
    assert loaded.control_model.hint_channels == 2
    assert loaded.config.hint_widths == (4, 5, 6, 7)
    with pytest.raises(CheckpointError, match="hints of 2 channels, not 3"):
        load_model(ModelSource(path, hint_channels=3))


def test_tokenizer_normalises_and_cuts():
    tokens = Tokenizer()
    same = tokens(["a photo of a café", "A  Photo\tOF\n a cafe\u0301 "])
    assert torch.equal(same[0], same[1])
    assert tokens("it's 42!")[0, :7].tolist() == tokens("IT'S  4 2 !")[0, :7].tolist()
    long = tokens("word " * 200)
    assert long.shape == (1, 77) and long[0, 0] == 49406 and long[0, -1] == 49407
    assert tokens("\U0001f600 δ")[0, -1] == 49407
    with pytest.raises(ValueError, match="pad"):
        Tokenizer("left")


def test_a_normalized_hint_encoder_passes_hints_on_with_variance_1(base):
    """Each convolution but the last; with 4 channels and hints of few pixels. A trained one, and blank hints, are
    refused."""
    unet = load_model(base).unet
    hints = torch.zeros(6, 4, 64, 64)
    hints[:, :, 20:23] = 1.0
    control_model = ControlNet.from_unet(unet, 4, (4, 5, 6, 7), seed=1)
    before = control_model.input_hint_block[4].weight.clone()
    factors = normalize_hint_encoder(control_model, hints)
    h, layers = hints, 0
    for layer in control_model.input_hint_block[:-1]:
        h = layer(h)
        if isinstance(layer, torch.nn.Conv2d):
            assert h.std().item() == pytest.approx(1, rel=0.006) and not layer.bias.any()  # three digits
            layers += 1
    assert layers == len(factors) == 7
    assert torch.equal(control_model.input_hint_block[4].weight, before * factors[2])
    assert not control_model.embed_hint(hints).any()
    again = ControlNet.from_unet(unet, 4, (4, 5, 6, 7), seed=1)
    with pytest.raises(ValueError, match="the first 6 hints show nothing"):
        normalize_hint_encoder(again, hints * 0)
    again.input_hint_block[-1].weight.data[0, 0, 0, 0] = 1e-3
    with pytest.raises(ValueError, match="trained already"):
        normalize_hint_encoder(again, hints)
