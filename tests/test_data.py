"""Data sets: what is read and what is refused; the cache; samples as functions of their number."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import ArrayDataset, DataError, FolderDataset
from toy import circles
from training.buckets import Framings


def picture(path, width, height, value=128):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(path)


def write(root, *rows):
    root.mkdir(exist_ok=True)
    (root / "prompt.json").write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")


def row(i, prompt="p"):
    return {"source": f"source/{i}.png", "target": f"target/{i}.png", "prompt": prompt}


def test_items_have_the_tutorials_ranges_and_shapes(folder):
    dataset = FolderDataset(folder)
    item = dataset[3]
    circle = circles.random_circle(3, 3)
    hint, target = circle.draw(32)
    assert len(dataset) == 24 and item["txt"] == circle.prompt
    assert item["jpg"].dtype == item["hint"].dtype == np.float32
    assert np.allclose(item["jpg"], target / 127.5 - 1, atol=1e-6) and np.allclose(item["hint"], hint / 255)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_hint_channels(folder, channels):
    assert FolderDataset(folder, hint_channels=channels)[0]["hint"].shape == (32, 32, channels)


def test_hints_of_any_channels_from_npy(tmp_path):
    write(tmp_path, {"source": "h.npy", "target": "t.png", "prompt": "p"})
    np.save(tmp_path / "h.npy", np.random.rand(40, 60, 7).astype(np.float32))
    picture(tmp_path / "t.png", 60, 40)
    assert FolderDataset(tmp_path, size=(64, 32), hint_channels=7)[0]["hint"].shape == (32, 64, 7)
    assert data.check(str(tmp_path)) == (1, [])
    with pytest.raises(DataError, match=r"should be \(height, width, 3\)"):
        FolderDataset(tmp_path)[0]


def test_resize_cuts_the_same_middle_from_both(tmp_path):
    """A 2:1 pair brought to a square: what is left is the middle, in hint and target alike."""
    write(tmp_path, row(0))
    stripes = np.zeros((40, 80, 3), np.uint8)
    stripes[:, 20:60] = 255
    for side, scale in (("source", 2), ("target", 1)):
        (tmp_path / side).mkdir()
        Image.fromarray(stripes).resize((80 * scale, 40 * scale), Image.Resampling.NEAREST).save(
            tmp_path / side / "0.png"
        )
    item = FolderDataset(tmp_path, size=(32, 32))[0]
    assert item["jpg"].shape == item["hint"].shape == (32, 32, 3)
    assert item["jpg"].min() > 0.9 and item["hint"].min() > 0.9


def test_nearest_keeps_labels(tmp_path):
    write(tmp_path, row(0))
    labels = (np.random.RandomState(0).randint(0, 2, (40, 40, 1)) * 255).astype(np.uint8).repeat(3, 2)
    for side in ("source", "target"):
        (tmp_path / side).mkdir()
        Image.fromarray(labels).save(tmp_path / side / "0.png")
    assert set(np.unique(FolderDataset(tmp_path, (24, 24), hint_resample="nearest")[0]["hint"])) == {0.0, 1.0}
    assert len(np.unique(FolderDataset(tmp_path, (24, 24))[0]["hint"])) > 2


def test_check_reports_every_problem_at_once(tmp_path, capsys):
    write(
        tmp_path,
        row(0),
        "{not json",
        row(2),  # no files
        row(3),
        row(4, prompt="  "),
        {"source": "../outside.png", "target": "target/0.png", "prompt": "p"},
        {"source": "source/0.png", "prompt": "p"},
        row(7),
        "[1, 2]",
    )
    for i in (0, 3, 4, 7):
        picture(tmp_path / f"source/{i}.png", 64, 64)
        picture(tmp_path / f"target/{i}.png", 64, 48 if i == 3 else 64)
    (tmp_path / "target/7.png").write_bytes((tmp_path / "target/0.png").read_bytes()[:60])
    assert data.main(["check", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    told = {int(s.split("line ")[1].split(":")[0]): s for s in lines if "line " in s}
    assert sorted(told) == [2, 3, 4, 5, 6, 7, 8, 9]
    for number, words in {2: "not JSON", 3: "no such image", 5: "empty", 6: "leaves the folder", 7: "target"}.items():
        assert words in told[number]
    assert all(words in told[4] for words in ("3.png", "64x64", "64x48", "aspect ratio"))
    assert "not a readable image" in told[8]
    assert "8 problems" in lines[-1]
    write(tmp_path, row(0))
    assert data.main(["check", str(tmp_path)]) == 0
    with pytest.raises(DataError, match="no prompt.json"):
        data.check(str(tmp_path / "source"))


def test_bad_rows_stop_training_early_and_empty_prompts_do_not(tmp_path):
    write(tmp_path, row(0, prompt=""))
    picture(tmp_path / "source/0.png", 8, 8)
    picture(tmp_path / "target/0.png", 8, 8)
    assert FolderDataset(tmp_path)[0]["txt"] == ""
    write(tmp_path, row(0), "x", "y")
    with pytest.raises(DataError, match="line 2: not JSON.*and 1 more"):
        FolderDataset(tmp_path)


def test_show_prints_what_the_tutorial_prints(folder, tmp_path, capsys):
    data.main(["show", str(folder), "5", "--out", str(tmp_path / "pair.png")])
    assert capsys.readouterr().out.splitlines()[:4] == [
        "24",
        FolderDataset(folder).prompt(5),
        "(32, 32, 3)",
        "(32, 32, 3)",
    ]
    with Image.open(tmp_path / "pair.png") as image:
        assert image.size == (64, 32)
    with pytest.raises(DataError, match="rows 0..23"):
        data.main(["show", str(folder), "24"])


def test_own_data_sets_are_checked():
    good = {"jpg": np.zeros((48, 48, 3), np.float32), "txt": "p", "hint": np.zeros((48, 48, 3), np.float32)}
    assert ArrayDataset([good], (32, 32))[0]["jpg"].shape == (32, 32, 3)
    cases = {
        "lacks 'hint'": {k: v for k, v in good.items() if k != "hint"},
        r"should be \(height, width, 3\)": good | {"jpg": np.zeros((3, 48, 48), np.float32)},
        r"should lie in \[-1, 1\]": good | {"jpg": good["jpg"] + 200},
        r"should lie in \[0, 1\]": good | {"hint": good["hint"] - 1},
        "48x48 but hint is 48x24": good | {"hint": np.zeros((24, 48, 3), np.float32)},
    }
    for message, item in cases.items():
        with pytest.raises(DataError, match=f"item 1 .*{message}"):
            ArrayDataset([good, item], (32, 32))[1]


def test_sizes():
    assert data.parse_resolution("512x768") == (512, 768) and data.parse_resolution("64") == (64, 64)
    for bad in ("", "x", "12xy", "1x2x3", "0"):
        with pytest.raises(DataError):
            data.parse_resolution(bad)
    assert data.fit_size((90, 20), 32) == (96, 32)
    assert data.same_aspect((512, 512), (90, 90)) and data.same_aspect((1000, 667), (500, 333))
    assert not data.same_aspect((64, 64), (64, 48))


def test_keys_follow_the_content(tmp_path):
    write(tmp_path, row(0))
    for side in ("source", "target"):
        picture(tmp_path / side / "0.png", 16, 16, 10)
    before = FolderDataset(tmp_path, (16, 16)).key(0)
    assert FolderDataset(tmp_path, (16, 16)).key(0) == before != FolderDataset(tmp_path, (8, 8)).key(0)
    picture(tmp_path / "target/0.png", 16, 16, 11)
    assert FolderDataset(tmp_path, (16, 16)).key(0) != before


def test_samples_are_functions_of_their_number(folder):
    make = lambda seed: data.Samples(FolderDataset(folder, (32, 32)), range(10), seed, (4, 4, 4))
    samples = make(0)
    flat = lambda batches: [(t, n) for b in batches for t, n in zip(b["timesteps"].tolist(), b["noise"], strict=True)]
    whole, split = flat(data.batches(samples, 0, 24, 8)), flat(data.batches(make(0), 12, 24, 3, workers=1))
    for (t, n), (t2, n2) in zip(whole[12:], split, strict=True):
        assert t == t2 and torch.equal(n, n2)
    assert not torch.equal(make(1)[0]["noise"], samples[0]["noise"])
    for epoch in (0, 1, 2):
        assert sorted(samples.index(n) for n in range(10 * epoch, 10 * epoch + 10)) == list(range(10))
    assert [samples.index(n) for n in range(10)] != [samples.index(n) for n in range(10, 20)]
    assert not torch.equal(samples[0]["noise"], samples[0]["posterior_noise"])


def test_pictures_of_every_kind(tmp_path):
    """16 bits a pixel keep their shades; the camera's orientation is applied; what is not uint8 or [0,1] is refused."""
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(48, 0)
    Image.fromarray(ramp).save(tmp_path / "depth.png")
    for channels in (1, 3):
        read = data.read_image(tmp_path / "depth.png", channels)
        assert abs(read[0, :, 0].astype(int) - ramp[0] // 257).max() <= 1
    turned = Image.new("RGB", (60, 40))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert data.read_image(tmp_path / "turned.jpg").shape == (60, 40, 3)
    write(tmp_path, {"source": "turned.jpg", "target": "turned.jpg", "prompt": "p"})
    assert FolderDataset(tmp_path).sizes(0) == ((40, 60), (40, 60))
    np.save(tmp_path / "labels.npy", np.arange(12).reshape(2, 2, 3))
    with pytest.raises(DataError, match="int64 from 0 to 11; give uint8"):
        data.read_image(tmp_path / "labels.npy")
    for channels in (1, 2, 3, 4):
        hint = np.random.RandomState(0).randint(0, 256, (6, 5, channels)) / 255
        assert np.array_equal(data.read_image(data.save_hint(tmp_path / "h", hint), channels), (hint * 255).round())


def test_timesteps_keep_to_their_range_and_spread_evenly(folder):
    pairs = FolderDataset(folder, (32, 32))
    drawn = lambda **randomness: [
        s["timesteps"].item()
        for s in map(
            data.Samples(pairs, range(20), 0, (4, 4, 4), data.SampleRandomness(**randomness)).__getitem__, range(300)
        )
    ]
    plain = drawn()
    assert min(plain) >= 0 and max(plain) <= 999 and 400 < np.mean(plain) < 600
    assert np.mean(drawn(timestep_bias=0.5)) > 600 > np.mean(drawn(timestep_bias=2.0))
    assert all(200 <= t <= 210 for t in drawn(min_timestep=200, max_timestep=210))
    assert set(drawn(min_timestep=999)) == {999}
    even = np.sort(drawn(even_timesteps=True)[100:116])  # any 16 in a row
    assert np.diff(even).max() < 125 and even[0] < 125 and even[-1] > 875
    assert all(t != u for t, u in zip(drawn(even_timesteps=True)[:5], plain[:5], strict=True))


def test_dropped_hints_are_black_and_offset_noise_has_a_mean(folder):
    pairs = FolderDataset(folder, (32, 32))
    make = lambda **randomness: data.Samples(pairs, range(20), 0, (4, 8, 8), data.SampleRandomness(**randomness))
    black = [not make(drop_hint=0.3)[n]["hint"].any() for n in range(100)]
    assert 15 < sum(black) < 45
    mean = lambda samples: np.std([samples[n]["noise"].mean((1, 2)).numpy() for n in range(50)])
    assert mean(make()) < 0.2 < 0.4 < mean(make(noise_offset=0.5))


@pytest.fixture
def two_rows(tmp_path):
    """A folder of two pairs whose prompt.json also has classes, weights, a note in one row alone, and lists."""
    rows = [row(i) | {"class": 3 + i, "weight": i / 2, "name": f"n{i}", "size": [8, 8]} for i in range(2)]
    write(tmp_path, rows[0], rows[1] | {"note": 1})
    for i in range(2):
        for side in ("source", "target"):
            picture(tmp_path / side / f"{i}.png", 8, 8)
    return tmp_path


def test_further_keys_of_an_item_reach_the_batch(two_rows):
    class Own:
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return dict(
                jpg=np.zeros((8, 8, 3)), txt="p", hint=np.zeros((8, 8, 3)), depth=torch.full((2,), i), path=None
            )

    class Kept:
        def moments(self, i):
            return torch.zeros(8, 1, 1)

        def context(self, i, prompt):
            return torch.zeros(77, 4)

    for encodings, own in ((None, {"target", "prompt"}), (Kept(), {"moments", "context"})):
        own = own | {"hint", "noise", "posterior_noise", "timesteps"}
        samples = data.Samples(FolderDataset(two_rows), range(2), 0, (4, 1, 1), encodings=encodings)
        batch = next(data.batches(samples, 0, 2, 2))
        order = [samples.index(n) for n in range(2)]
        assert batch.keys() == own | {"class", "weight", "name"}
        assert batch["class"].tolist() == [3 + i for i in order] and batch["class"].dtype == torch.int64
        assert batch["weight"].tolist() == [i / 2 for i in order] and batch["name"] == [f"n{i}" for i in order]
        samples = data.Samples(ArrayDataset(Own(), (8, 8)), range(2), 0, (4, 1, 1), encodings=encodings)
        batch = next(data.batches(samples, 0, 2, 2))
        assert batch.keys() == own | {"depth"} and batch["depth"].tolist() == [[samples.index(n)] * 2 for n in range(2)]


@pytest.mark.parametrize("flipped", [False, True])
def test_further_images_of_an_item_are_framed_as_its_hint_is(flipped):
    """A second condition that stays as it was while hint and target are mirrored or cut trains on other pixels."""
    rng, (h, w) = np.random.default_rng(0), (24, 40)
    hint = rng.random((h, w, 3), dtype=np.float32)
    keys = {
        "last": hint, "first": torch.from_numpy(hint).permute(2, 0, 1), "half": torch.from_numpy(hint).bfloat16(),
        "flat": hint[..., 0], "leaf": torch.from_numpy(hint).requires_grad_(),
        "ids": rng.integers(2**40, 2**62, (h, w)),
        "bytes": (hint * 255).astype(np.uint8), "classes": rng.integers(0, 5, (h, w)),
        "mask": torch.from_numpy(hint[..., 0] > 0.5), "vector": np.arange(4.0), "square": np.eye(4), "number": 3,
        "y": np.zeros(3), "context": np.zeros(3),
    }  # fmt: skip
    for size in ((40, 24), (20, 12), (16, 16)):
        dataset = ArrayDataset([dict(jpg=2 * hint - 1, txt="p", hint=hint, **keys)], size)
        dataset.framings = Framings([size], None, np.array([(w, h)]), flip=True)
        item = dataset.load_item(0, variant=int(flipped))
        expected = item["hint"]
        assert np.array_equal(item["last"], expected) and np.array_equal(item["flat"], expected[..., 0])
        assert torch.equal(item["first"], torch.from_numpy(expected.transpose(2, 0, 1).copy()))
        assert item["half"].dtype == torch.bfloat16 and np.allclose(item["half"].float(), expected, atol=0.01)
        assert item["bytes"].dtype == np.uint8 and np.allclose(item["bytes"] / 255, expected, atol=0.01)
        assert np.array_equal(item["leaf"].detach().numpy(), expected)
        assert item["ids"].shape == expected.shape[:2] and np.isin(item["ids"], keys["ids"]).all()
        assert item["classes"].dtype == np.int64 and set(np.unique(item["classes"])) <= set(range(5))
        assert item["mask"].dtype == torch.bool and item["mask"].shape == expected.shape[:2]
        assert item["vector"].shape == (4,) and item["square"].shape == (4, 4) and item["number"] == 3
        assert "y" not in item and "context" not in item  # names of what the loop puts into a batch are not free
        labels = ArrayDataset(dataset.dataset, size, hint_resample="nearest")
        labels.framings = dataset.framings
        assert np.isin(labels.load_item(0, variant=int(flipped))["bytes"], keys["bytes"]).all()
    whole = [ArrayDataset([dict(jpg=hint, txt="p", hint=hint, **keys)], size)[0] for size in ((40, 24), (20, 12))]
    assert whole[0]["classes"] is keys["classes"] and whole[1]["classes"].shape == (12, 20)


def test_a_layout_is_a_row_of_a_table(two_rows, monkeypatch, capsys):
    """Triples from a CSV file: read, shown, checked, and named in messages as those of prompt.json are."""

    def read_csv(file):
        with open(file, newline="", encoding="utf-8") as f:
            for number, entry in enumerate(csv.DictReader(f), 2):
                yield f"line {number}", entry

    monkeypatch.setitem(data.LAYOUTS, "triples.csv", (read_csv, "columns source, target and prompt"))
    (two_rows / "prompt.json").unlink()
    with pytest.raises(DataError, match="no prompt.json in it: one JSON.* or triples.csv in it: columns source"):
        FolderDataset(two_rows)
    assert not data.is_dataset(two_rows)
    lines = ["source,target,prompt,style", *(f'source/{i}.png,target/{i}.png,"a, {i}",s{i}' for i in range(2))]
    (two_rows / "triples.csv").write_text("\n".join(lines) + "\n")
    assert data.is_dataset(two_rows)
    item = FolderDataset(two_rows, (16, 16))[1]
    assert (item["txt"], item["style"], item["jpg"].shape) == ("a, 1", "s1", (16, 16, 3))
    data.main(["show", str(two_rows), "1", "--out", str(two_rows / "pair.png")])
    assert capsys.readouterr().out.splitlines()[:2] == ["2", "a, 1"]
    (two_rows / "source/1.png").unlink()
    assert data.check(str(two_rows))[0] == 2
    with pytest.raises(DataError, match=r"triples.csv, line 3: .*1.png: no such image"):
        FolderDataset(two_rows)[1]


def test_sizes_that_the_unet_cannot_divide_are_told_of(capsys):
    assert data.choose_size("", (64, 32), 32) == (64, 32) and data.choose_size("64", (8, 8), 32) == (64, 64)
    assert not capsys.readouterr().out
    assert data.choose_size("70x50", (64, 64), 32) == (64, 64)
    assert "70x50 becomes 64x64" in capsys.readouterr().out
