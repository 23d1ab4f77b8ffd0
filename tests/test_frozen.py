"""Frozen work is done once, and again when what it depends on has changed."""

import pytest
import torch

import data
import frozen
from controlnet import ControlLDM
from data import DataError
from frozen import Cache


def test_cache_keeps_grows_and_survives_interruption(tmp_path):
    computed = []

    def compute(positions):
        computed.extend(positions)
        return torch.stack([torch.full((2, 3), float(i)) for i in positions])

    keys = [data.digest(i) for i in range(5)]
    Cache(tmp_path, "c", (2, 3)).fill(keys[:3], compute, 2, "things")
    assert computed == [0, 1, 2]
    # an interruption: a row without its key, and half a row
    with open(tmp_path / "c.bin", "ab") as f:
        f.write(b"\7" * 30)
    cache = Cache(tmp_path, "c", (2, 3))
    cache.fill(keys + keys[:2], compute, 2, "things")
    assert computed == [0, 1, 2, 3, 4]
    for i, key in enumerate(keys):
        assert torch.equal(Cache(tmp_path, "c", (2, 3))[key], torch.full((2, 3), float(i)))

    def interrupted(positions):
        if positions[0] >= 7:
            raise KeyboardInterrupt
        return compute(positions)

    more = keys + [data.digest(i) for i in range(5, 9)]
    with pytest.raises(KeyboardInterrupt):
        cache.fill(more, interrupted, 1, "things")
    Cache(tmp_path, "c", (2, 3)).fill(more, compute, 1, "things")
    assert computed == list(range(9))
    half = Cache(tmp_path, "h", (4,), torch.bfloat16)
    half.fill([b"k" * 16], lambda at: torch.tensor([[1.5, 2, 3, 4]]), 1, "halves")
    assert torch.equal(half[b"k" * 16], torch.tensor([1.5, 2, 3, 4]).bfloat16())


def test_cache_refuses_what_the_disk_cannot_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(frozen.shutil, "disk_usage", lambda _: type("U", (), {"free": 10}))
    with pytest.raises(DataError, match="--no-cache"):
        Cache(tmp_path, "c", (2, 3)).fill([b"x" * 16], lambda at: None, 1, "things")


def test_frozen_work_is_done_again_when_its_encoder_changed_and_only_then(base, folder, tmp_path, monkeypatch):
    model = ControlLDM.from_file(base)
    computed = {"latents": 0, "prompts": 0}
    fill = Cache.fill

    def counted(self, keys, compute, batch, what):
        def count(positions):
            computed[what] += len(positions)
            return compute(positions)

        fill(self, keys, count, batch, what)

    monkeypatch.setattr(Cache, "fill", counted)

    def freeze(size=(32, 32)):
        computed.update(latents=0, prompts=0)
        with torch.no_grad():
            kept = frozen.freeze(model, data.Fill50K(folder, size), tmp_path, 4)
        return kept, (computed["latents"] > 0, computed["prompts"] > 0)

    kept, made = freeze()
    assert made == (True, True) and freeze()[1] == (False, False)
    pairs = data.Fill50K(folder, (32, 32))
    with torch.no_grad():
        assert torch.allclose(kept.moments(3), model.vae.moments(data.to_tensor(pairs.image(3))[None])[0], atol=1e-5)
        assert torch.allclose(kept.context(3, pairs.prompt(3)), model.encode_prompts(pairs.prompt(3))[0], atol=1e-5)
    assert freeze((64, 64))[1] == (True, False)
    model.vae.decoder.conv_in.bias.data += 1  # the decoder makes no latents
    assert freeze()[1] == (False, False)
    model.vae.encoder.conv_in.bias.data += 1
    assert freeze()[1] == (True, False)
    model.text.text_model.final_layer_norm.bias.data += 1
    assert freeze()[1] == (False, True)
