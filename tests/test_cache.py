"""Frozen work is done once, and again when what it depends on has changed."""

import errno
import os
import pickle
import shutil

import numpy as np
import pytest
import torch

import data
from data import DataError
from training import cache, locks
from training.buckets import Framings
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

    def counted(self, keys, compute, batch_size, name, **read):
        def count(some):
            rows = compute(some)
            computed[name] += len(rows)
            return rows

        fill(self, keys, count, batch_size, name, **read)

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
    with locks.locked(tmp_path / "a.lock"), pytest.raises(BlockingIOError), open(tmp_path / "a.lock", "a") as file:
        locks.fcntl.flock(file, locks.fcntl.LOCK_EX | locks.fcntl.LOCK_NB)
    calls = []

    class Windows:
        LK_LOCK, LK_UNLCK = 1, 0

        def locking(self, descriptor, mode, size):
            calls.append(mode)
            if len(calls) < 3:
                raise OSError(errno.EDEADLK, "Resource deadlock avoided")

    monkeypatch.setattr(locks, "fcntl", None)
    for system, expected in ((Windows(), [1, 1, 1, 0]), (None, [])):
        calls.clear()
        monkeypatch.setattr(locks, "msvcrt", system)
        row_cache = RowCache(tmp_path, f"of-{system}"[:5], (1,))
        row_cache.fill([b"k" * 16], lambda positions: torch.tensor([[1.5]]), 1, "things")
        assert row_cache[b"k" * 16].item() == 1.5 and calls == expected


def test_a_worker_process_gets_no_copy_of_the_rows(tmp_path):
    row_cache = RowCache(tmp_path, "c", (100_000,))
    row_cache.fill([b"k" * 16], lambda positions: torch.ones(1, 100_000), 1, "things")
    assert row_cache[b"k" * 16].sum() == 100_000
    pickled = pickle.dumps(row_cache)
    assert len(pickled) < 10_000 and pickle.loads(pickled)[b"k" * 16].sum() == 100_000


def filled(folder, count=6, shape=(2, 3)) -> tuple[RowCache, list[bytes], list[int]]:
    """A cache of `count` rows, row i full of i, its keys, and a list of the positions that were computed."""
    computed, keys = [], [data.digest(i) for i in range(count)]

    def compute(positions):
        computed.extend(positions)
        return torch.stack([torch.full(shape, float(i)) for i in positions])

    row_cache = RowCache(folder, "c", shape)
    row_cache.fill(keys, compute, 4, "things")
    row_cache.compute = compute
    return row_cache, keys, computed


def flip(path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["bin", "sums", "keys"])
def test_a_damaged_row_is_noticed_when_it_is_read_and_computed_anew_at_the_next_start(tmp_path, capsys, file):
    row_cache, keys, computed = filled(tmp_path)
    flip(tmp_path / f"c.{file}", {"bin": 3 * 24 + 9, "sums": 3 * 4 + 1, "keys": 3 * 16 + 5}[file])
    if file == "bin":
        with pytest.raises(DataError, match=r"c.bin: row 3 is damaged .*; the next start \(--resume RUN\) computes"):
            row_cache[keys[3]]
    computed.clear()
    again = RowCache(tmp_path, "c", (2, 3))
    again.fill(keys, row_cache.compute, 4, "things")
    assert computed == [3] and all(torch.equal(again[key], torch.full((2, 3), float(i))) for i, key in enumerate(keys))
    assert ("1 rows are damaged" in capsys.readouterr().out) == (file != "keys")
    computed.clear()
    RowCache(tmp_path, "c", (2, 3)).fill(keys, row_cache.compute, 4, "things")
    assert computed == []


def test_a_cache_without_checksums_is_trusted_once(tmp_path):
    """As it was written before there were checksums, and as a program of that time goes on with it."""
    row_cache, keys, computed = filled(tmp_path)
    whole = (tmp_path / "c.sums").read_bytes()
    assert len(whole) == 6 * 4
    for left in (b"", whole[:8], whole[:9]):
        (tmp_path / "c.sums").write_bytes(left)
        old = RowCache(tmp_path, "c", (2, 3))
        assert torch.equal(old[keys[5]], torch.full((2, 3), 5.0))
        computed.clear()
        old.fill(keys, row_cache.compute, 4, "things")
        assert computed == [] and (tmp_path / "c.sums").read_bytes() == whole


def test_a_cache_that_shrinks_under_a_run_is_one_line(tmp_path):
    row_cache, keys, computed = filled(tmp_path, 6, (64, 64))
    assert row_cache[keys[0]].sum() == 0
    with open(tmp_path / "c.bin", "r+b") as file:
        file.truncate(5 * 64 * 64 * 4 - 1)
    for row in (4, 5):
        with pytest.raises(
            DataError, match=f"row {row} is gone, the file was cut under the run; the next start"
        ) as told:
            row_cache[keys[row]]
        assert "\n" not in str(told.value)
    computed.clear()
    row_cache.fill(keys, row_cache.compute, 4, "things")
    assert computed == [4, 5] and row_cache[keys[5]][0, 0] == 5
    (tmp_path / "c.bin").unlink()
    with pytest.raises(DataError, match="c.bin: row 0 cannot be read"):
        pickle.loads(pickle.dumps(row_cache)).__class__._read_row(RowCache(tmp_path, "c", (64, 64)), 0)


def test_rows_are_read_without_pread_too(tmp_path, monkeypatch):
    row_cache, keys, _ = filled(tmp_path)
    monkeypatch.delattr(cache.os, "pread")
    assert [row_cache[key][0, 0].item() for key in keys[::-1]] == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_latent_does_not_depend_on_what_else_is_cached(base, folder, tmp_path, threads, layout):
    """The same bits with each rest that fills no batch, and another file for each batch size."""
    model, dataset = load_model(base), data.FolderDataset(folder, (32, 32))
    model.vae.to(memory_format=layout)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with torch.no_grad():
        for size in (3, 8):
            whole = cache.build_cache(model, dataset, tmp_path / "whole", size)
            for rest in (1, 2, 5, 7):
                few = cache.build_cache(model, dataset.without(range(rest, 24)), tmp_path / f"{size} {rest}", size)
                assert all(torch.equal(few.moments(i), whole.moments(i)) for i in range(rest)), (size, rest)
    torch.set_num_threads(before)
    assert {file.name for file in tmp_path.glob("whole/latents-*/*.bin")} == {"32x32.bin", "32x32-3.bin"}


@pytest.mark.parametrize("flip", [False, True])
def test_samples_carry_bytes_which_become_the_data_sets_numbers(base, folder, monkeypatch, flip):
    """Between processes and on the way to a GPU a pixel is one byte; the loss and the VAE get the data set's floats, to
    the bit. Own data sets have no bytes."""
    dataset = data.FolderDataset(folder, (32, 32))
    dataset.framings = Framings([(32, 32)], None, np.array([(32, 32)] * 24), flip=flip)
    samples, model = data.Samples(dataset, range(24), 0, (4, 4, 4)), load_model(base)
    images, encode = [], model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda few: images.append(few) or encode(few))
    batch = next(data.batches(samples, 0, 5, 5))
    assert batch["hint"].dtype == batch["target"].dtype == torch.uint8
    prepared = cache.prepare_batch(model, batch | {"other_hint": batch["hint"].flip(0)}, "cpu", 2)
    assert torch.equal(prepared["other_hint"], prepared["hint"].flip(0))  # of validation
    variants = [data.derive_seed("variant", 0, n) % dataset.variants for n in range(5)]
    items = [dataset.load_item(samples.index(n), variant=variants[n]) for n in range(5)]
    assert torch.equal(prepared["hint"], torch.stack([data.to_tensor(item["hint"]) for item in items]))
    assert torch.equal(torch.cat(images), torch.stack([data.to_tensor(item["jpg"]) for item in items]))
    values = torch.arange(256, dtype=torch.uint8)  # all there are
    of_numpy = values.numpy().astype(np.float32)
    every = {"hint": values.expand(5, 3, 8, 256), "target": values.expand(5, 3, 8, 256)}
    every |= {"posterior_noise": torch.zeros(5, 4, 1, 32), "prompt": batch["prompt"]}
    images.clear()
    assert np.array_equal(cache.prepare_batch(model, every, "cpu", 5)["hint"][0, 0, 0].numpy(), of_numpy / 255)
    assert np.array_equal(images[0][0, 0, 0].numpy(), of_numpy / 127.5 - 1)
    own = data.Samples(data.ArrayDataset(dataset, (32, 32)), range(24), 0, (4, 4, 4))
    assert own[0]["hint"].dtype == torch.float32 and torch.equal(own[0]["hint"] * 255, samples[0]["hint"].float())


def test_a_second_start_reads_no_target(base, folder, tmp_path, monkeypatch):
    model, dataset = load_model(base), data.FolderDataset(folder, (32, 32))
    data.verify.find_bad_rows(dataset, workers=0)
    with torch.no_grad():
        keys = cache.build_cache(model, dataset, tmp_path, 8).keys
        asked, key = [], data.FolderDataset.key
        monkeypatch.setattr(data.FolderDataset, "key", lambda self, i: asked.append(i) or key(self, i))
        assert cache.build_cache(model, dataset, tmp_path, 8).keys == keys
        assert asked == list(range(8))  # the look at whether items are random
        dataset.size = (64, 64)
        assert cache.build_cache(model, dataset, tmp_path, 8).keys[20] != keys[20]


def test_workers_read_what_is_encoded(base, folder, tmp_path, monkeypatch):
    """With worker processes the same bits, and a target that cannot be read is named as without them."""
    started, load = [], cache.load
    monkeypatch.setattr(cache, "MANY", 24)
    monkeypatch.setattr(cache, "load", lambda *args: started.append(args[2]) or load(*args))
    own = shutil.copytree(folder, tmp_path / "own")
    model, dataset = load_model(base), data.FolderDataset(own, (32, 32))
    with torch.no_grad():
        alone = cache.build_cache(model, dataset, tmp_path / "alone", 8)
        helped = cache.build_cache(model, dataset, tmp_path / "helped", 8, workers=2)
        assert all(torch.equal(alone.moments(i), helped.moments(i)) for i in range(len(dataset)))
        (bad := dataset._files(7)[1]).write_bytes(bad.read_bytes()[:90])
        for workers in (0, 2):
            with pytest.raises(DataError, match=f"line 8: {bad}"):
                cache.build_cache(model, dataset, tmp_path / f"bad{workers}", 8, workers)
        cache.build_cache(model, dataset.without(range(5, 24)), tmp_path / "few", 8, workers=2)
    assert started == [0, 2, 0, 2, 0]  # few are read sooner than processes have started


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked on Linux and macOS alone")
@pytest.mark.parametrize("how", ["locked", "take_lock"])
def test_a_forked_process_keeps_no_lock(tmp_path, how):
    """A worker may outlive the process that started it, and must not keep its locks."""
    ready, told = os.pipe()
    wait, go = os.pipe()
    with locks.locked(tmp_path / "lock") if how == "locked" else locks.take_lock(tmp_path / "lock"):
        if (pid := os.fork()) == 0:
            os.close(go)
            os.write(told, b"1")
            os.read(wait, 1)  # returns when the parent closes its end
            os._exit(0)
        os.read(ready, 1)
    again = locks.take_lock(tmp_path / "lock")
    os.close(go)
    os.waitpid(pid, 0)
    assert again is not None
