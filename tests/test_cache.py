"""Frozen work is done once, and again when what it depends on has changed."""

import errno
import pickle

import pytest
import torch

import data
from data import DataError
from training import cache
from training.cache import RowCache
from weights import load_model


def test_cache_keeps_grows_and_survives_interruption(tmp_path):
    computed = []

    def compute(positions):
        computed.extend(positions)
        return torch.stack([torch.full((2, 3), float(i)) for i in positions])

    keys = [data.digest(i) for i in range(5)]
    RowCache(tmp_path, "c", (2, 3)).fill(keys[:3], compute, 2, "things")
    assert computed == [0, 1, 2]
    # an interruption: a row without its key, and half a row
    with open(tmp_path / "c.bin", "ab") as f:
        f.write(b"\7" * 30)
    row_cache = RowCache(tmp_path, "c", (2, 3))
    row_cache.fill(keys + keys[:2], compute, 2, "things")
    assert computed == [0, 1, 2, 3, 4]
    for i, key in enumerate(keys):
        assert torch.equal(RowCache(tmp_path, "c", (2, 3))[key], torch.full((2, 3), float(i)))

    def interrupted(positions):
        if positions[0] >= 7:
            raise KeyboardInterrupt
        return compute(positions)

    more = keys + [data.digest(i) for i in range(5, 9)]
    with pytest.raises(KeyboardInterrupt):
        row_cache.fill(more, interrupted, 1, "things")
    RowCache(tmp_path, "c", (2, 3)).fill(more, compute, 1, "things")
    assert computed == list(range(9))
    half = RowCache(tmp_path, "h", (4,), torch.bfloat16)
    half.fill([b"k" * 16], lambda at: torch.tensor([[1.5, 2, 3, 4]]), 1, "halves")
    assert torch.equal(half[b"k" * 16], torch.tensor([1.5, 2, 3, 4]).bfloat16())


def test_cache_refuses_what_the_disk_cannot_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("U", (), {"free": 10}))
    with pytest.raises(DataError, match="--no-cache"):
        RowCache(tmp_path, "c", (2, 3)).fill([b"x" * 16], lambda at: None, 1, "things")


def test_frozen_work_is_done_again_when_its_encoder_changed_and_only_then(base, folder, tmp_path, monkeypatch):
    model = load_model(base)
    computed = {"latents": 0, "prompts": 0}
    fill = RowCache.fill

    def counted(self, keys, compute, batch_size, name):
        def count(positions):
            computed[name] += len(positions)
            return compute(positions)

        fill(self, keys, count, batch_size, name)

    monkeypatch.setattr(RowCache, "fill", counted)

    def build(size=(32, 32)):
        computed.update(latents=0, prompts=0)
        with torch.no_grad():
            kept = cache.build_cache(model, data.FolderDataset(folder, size), tmp_path, 4)
        return kept, (computed["latents"] > 0, computed["prompts"] > 0)

    kept, made = build()
    assert made == (True, True) and build()[1] == (False, False)
    pairs = data.FolderDataset(folder, (32, 32))
    with torch.no_grad():
        assert torch.allclose(kept.moments(3), model.vae.moments(data.to_tensor(pairs.target(3))[None])[0], atol=1e-5)
        assert torch.allclose(kept.context(3, pairs.prompt(3)), model.encode_prompts(pairs.prompt(3))[0], atol=1e-5)
    assert build((64, 64))[1] == (True, False)
    model.vae.decoder.conv_in.bias.data += 1  # the decoder makes no latents
    assert build()[1] == (False, False)
    model.vae.encoder.conv_in.bias.data += 1
    assert build()[1] == (True, False)
    model.text.text_model.final_layer_norm.bias.data += 1
    assert build()[1] == (False, True)


def test_writers_wait_for_each_other_on_every_system(tmp_path, monkeypatch):
    """With `fcntl`, with Windows' `msvcrt`, which gives up after ten seconds, and without any file locks."""
    with cache.locked(tmp_path / "a.lock"), pytest.raises(BlockingIOError), open(tmp_path / "a.lock", "a") as file:
        cache.fcntl.flock(file, cache.fcntl.LOCK_EX | cache.fcntl.LOCK_NB)
    calls = []

    class Windows:
        LK_LOCK, LK_UNLCK = 1, 0

        def locking(self, descriptor, mode, size):
            calls.append(mode)
            if len(calls) < 3:
                raise OSError(errno.EDEADLK, "Resource deadlock avoided")

    monkeypatch.setattr(cache, "fcntl", None)
    for system, expected in ((Windows(), [1, 1, 1, 0]), (None, [])):
        calls.clear()
        monkeypatch.setattr(cache, "msvcrt", system)
        row_cache = RowCache(tmp_path, f"of-{system}"[:5], (1,))
        row_cache.fill([b"k" * 16], lambda positions: torch.tensor([[1.5]]), 1, "things")
        assert row_cache[b"k" * 16].item() == 1.5 and calls == expected


def test_a_worker_process_gets_no_copy_of_the_rows(tmp_path):
    row_cache = RowCache(tmp_path, "c", (100_000,))
    row_cache.fill([b"k" * 16], lambda positions: torch.ones(1, 100_000), 1, "things")
    assert row_cache[b"k" * 16].sum() == 100_000
    pickled = pickle.dumps(row_cache)
    assert len(pickled) < 10_000 and pickle.loads(pickled)[b"k" * 16].sum() == 100_000
