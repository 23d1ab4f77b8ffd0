"""Images of many shapes: framing, buckets, the order of samples, and that nothing is starved or mixed up."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import ArrayDataset, DataError, FolderDataset
from ldm import TINY
from training import verify
from training.buckets import Framings, assign_buckets, bucket_sizes, describe_buckets, nearest_bucket
from training.images import Framing, fraction_cut, resize
from training.order import BucketOrder, shuffled

SHAPES = [(64, 64), (96, 64), (64, 96), (90, 60), (128, 40), (33, 97)]


def write_pairs(root, shapes, hint_scale=1):
    """A folder in which row i has a random picture of shapes[i] as target and as hint, `hint_scale` times as large."""
    rng, lines = np.random.default_rng(0), []
    root.mkdir()
    for i, (width, height) in enumerate(shapes):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image.save(root / f"t{i}.png")
        image.resize((width * hint_scale, height * hint_scale), Image.Resampling.NEAREST).save(root / f"h{i}.png")
        lines.append(json.dumps({"source": f"h{i}.png", "target": f"t{i}.png", "prompt": f"number {i}"}))
    (root / "prompt.json").write_text("\n".join(lines))
    return root


def framed(root, size=(64, 64), crops=1, flip=False, **settings) -> FolderDataset:
    """The folder with the buckets of `size`, as a run frames it."""
    dataset = FolderDataset(root, size, **settings)
    natives, buckets = dataset.native_sizes(), bucket_sizes(size, 32)
    dataset.framings = Framings(buckets, assign_buckets(natives, buckets), np.array(natives), crops, flip)
    return dataset


# ------------------------------------------------------------------------------------------------------------- framing
def test_what_is_cut_off_is_exactly_the_rest():
    """A picture whose pixels say where they are: 80x40 in 32x32 is scaled by 0.8 and loses 32 of 64 columns."""
    columns = np.arange(80, dtype=np.float32)[None, :, None].repeat(40, 0)
    for position, first in ((0.0, 0.0), (0.25, 10.0), (0.5, 20.0), (1.0, 40.0)):
        cut = resize(columns, (32, 32), Image.Resampling.BOX, position)
        assert cut.shape == (32, 32, 1)
        assert np.allclose(cut[0, :, 0], first + 1.25 * np.arange(32) + 0.125, atol=0.5)
        flipped = resize(columns, (32, 32), Image.Resampling.BOX, position, flipped=True)
        assert np.array_equal(flipped, cut[:, ::-1])
    rows = resize(columns.transpose(1, 0, 2), (32, 32), Image.Resampling.BOX, 1.0)
    assert np.array_equal(rows, resize(columns, (32, 32), Image.Resampling.BOX, 1.0).transpose(1, 0, 2))
    same = columns[:32, :32]
    assert resize(same, (32, 32), Image.Resampling.BOX) is same
    assert np.array_equal(resize(same, (32, 32), Image.Resampling.BOX, flipped=True), same[:, ::-1])


@pytest.mark.parametrize(
    ("framing", "numbers"),
    [
        (Framing((64, 48), (64, 48)), (48, 64, 0, 0, 48, 64)),
        (Framing((80, 40), (32, 32)), (40, 80, 0, 16, 32, 32)),
        (Framing((80, 40), (32, 32), 0.25), (40, 80, 0, 8, 32, 32)),
        (Framing((80, 40), (32, 32), 0.25, True), (40, 80, 0, 24, 32, 32)),
        (Framing((80, 40), (32, 32), 0.0, True), (40, 80, 0, 32, 32, 32)),
        (Framing((40, 80), (32, 32), 0.25), (80, 40, 8, 0, 32, 32)),
        (Framing((40, 80), (32, 32), 0.25, True), (80, 40, 8, 0, 32, 32)),
        (Framing((4000, 3000), (1152, 896)), (3000, 4000, 0, 21, 896, 1152)),
        (Framing((16, 16), (64, 32)), (16, 16, 16, 0, 32, 64)),
    ],
)
def test_the_numbers_that_sdxl_is_told(framing, numbers):
    """Height first; the crop after scaling; in a flipped picture what was cut at the right is missing at the left."""
    assert framing.numbers == numbers


def test_every_picture_fits_into_every_size():
    """Rounding must not put the part that is kept outside of the picture, which Pillow would refuse."""
    for width, height, size in ((246, 235, (224, 64)), (198, 116, (96, 224)), (49, 29, (224, 224)), (1, 1, (32, 32))):
        image = np.zeros((height, width, 3), np.uint8)
        assert resize(image, size, Image.Resampling.BILINEAR).shape == (*size[::-1], 3)
    for width in range(1, 400, 17):
        for height in range(1, 400, 23):
            for size in ((224, 64), (96, 224), (32, 160)):
                for position in (0.0, 0.37, 0.5, 1.0):
                    left, top, right, bottom = Framing((width, height), size, position).box
                    assert 0 <= left < right <= width and 0 <= top < bottom <= height


@pytest.mark.parametrize("hint_scale", [1, 3])
def test_a_hint_is_framed_as_its_target_is(tmp_path, hint_scale):
    """A hint that is a copy of its target, or a larger one, is a copy after framing: in each bucket, flip and crop."""
    dataset = framed(write_pairs(tmp_path / "d", SHAPES, hint_scale), crops=3, flip=True, hint_resample="nearest")
    seen = set()
    for i in range(len(SHAPES)):
        for variant in range(dataset.variants):
            item = dataset.load_item(i, variant=variant)
            width, height = dataset.size_of(i)
            assert item["jpg"].shape == item["hint"].shape == (height, width, 3)
            framing = dataset.framing(i, variant)
            hint = (item["hint"] * 255).round().astype(np.uint8)
            original = np.asarray(Image.open(tmp_path / f"d/t{i}.png"))
            again = resize(original, framing.size, Image.Resampling.NEAREST, framing.position, framing.flipped)
            assert (hint == again).mean() > (0.99 if hint_scale == 1 else 0.5)
            smooth = lambda x: np.asarray(Image.fromarray(x).resize((8, 8), Image.Resampling.BOX)).astype(float)
            target = ((item["jpg"] + 1) * 127.5).round().astype(np.uint8)
            assert abs(smooth(target) - smooth(hint)).mean() < abs(smooth(target) - smooth(hint[:, ::-1])).mean()
            assert item["sizes"].tolist() == list(framing.numbers) and item["sizes"].dtype == torch.float32
            seen.add((framing.position, framing.flipped))
    assert len(seen) > 8 and {(0.5, False), (0.5, True)} <= seen


def test_crops_are_different_parts_and_a_picture_that_fits_has_one():
    framings = Framings([(32, 32)], None, np.array([(80, 40), (40, 80), (50, 50), (50, 49)]), crops=4)
    positions = lambda i: [framings.framing(i, variant).position for variant in range(4)]
    for i in (0, 1):
        assert positions(i)[0] == 0.5
        for k, position in enumerate(positions(i)[1:]):
            assert k / 3 <= position < (k + 1) / 3
    assert positions(0) != positions(1) and positions(0) == positions(0)
    assert positions(2) == positions(3) == [0.5] * 4


# ------------------------------------------------------------------------------------------------------------- buckets
def test_the_sizes_of_buckets():
    sdxl = [(1024, 1024), (1152, 896), (1216, 832), (1344, 768), (1536, 640), (2048, 512), (1728, 576), (1152, 832)]
    sizes = bucket_sizes((1024, 1024), 32)
    assert {*sdxl, *(size[::-1] for size in sdxl)} <= set(sizes)
    for size, multiple in (((1024, 1024), 32), ((512, 512), 64), ((128, 128), 32), ((512, 768), 64), ((64, 32), 32)):
        sizes = bucket_sizes(size, multiple)
        assert size in sizes and len(set(sizes)) == len(sizes)
        for width, height in sizes:
            assert width % multiple == height % multiple == 0
            assert width * height <= size[0] * size[1] and max(width, height) <= 4 * min(width, height)


def test_each_picture_goes_where_least_is_cut():
    sizes, rng = bucket_sizes((512, 512), 64), np.random.default_rng(0)
    for native in rng.integers(100, 4000, (200, 2)).tolist():
        cut = fraction_cut(native, nearest_bucket(native, sizes))
        assert cut == pytest.approx(min(fraction_cut(native, size) for size in sizes), abs=1e-6)
        if max(native) <= 4 * min(native):
            assert cut < 0.1
    assert nearest_bucket((3000, 2000), sizes) == (576, 384) and nearest_bucket((700, 700), sizes) == (512, 512)
    assert nearest_bucket((9000, 100), sizes) == (1024, 256)


def test_what_is_cut_is_told():
    """160x40 in 128x32 loses nothing; 100x80 in 64x64 loses a fifth, and nothing is nearer."""
    natives = [(160, 40), (100, 80), (64, 64), (64, 64)]
    counted, cut = describe_buckets(natives, [(64, 64), (128, 32)], ["a", "b", "c", "d"])
    assert counted == "4 images in 2 of 2 buckets: 64x64: 3, 128x32: 1"
    assert cut == "20.0% of an image is cut off at most (b: 100x80 in 64x64), 5.0% on average"
    assert describe_buckets(natives[2:], [(64, 64)], ["c", "d"])[1] == "nothing of them is cut off"


def test_check_tells_of_buckets_and_of_hints_of_another_size(tmp_path, capsys):
    root = write_pairs(tmp_path / "d", SHAPES, 2)
    assert data.main(["check", str(root), "--resolution", "64", "--buckets", "--multiple", "32"]) == 0
    out = capsys.readouterr().out
    assert "6 images in 5 of 7 buckets: 64x32: 2, 32x64: 1, 32x96: 1, 64x64: 1, 96x32: 1" in out
    assert "is cut off at most" in out and ", line 2: 96x64 in 64x32), " in out
    assert "6 of 6 hints have another size than their target" in out
    assert data.main(["check", str(root), "--resolution", "64"]) == 0
    assert "5 of 6 rows have another aspect ratio than 64x64" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        data.main(["check", str(root), "--multiple", "0"])


# --------------------------------------------------------------------------------------------------------------- order
def epochs_of(buckets, group, epochs, seed=0):
    order = BucketOrder(seed, np.array(buckets), group)
    return [order.epoch(e) for e in range(epochs)]


@pytest.mark.parametrize("group", range(1, 10))
@pytest.mark.parametrize("counts", [(1,), (3, 5), (7, 1, 1, 4), (2,) * 6, (16, 8), (17, 9, 3), (1, 1, 1, 1, 1)])
def test_every_item_comes_exactly_once_an_epoch(counts, group):
    """And after any number of steps no item is more than one ahead of another, whatever its bucket."""
    buckets = [bucket for bucket, count in enumerate(counts) for _ in range(count)]
    epochs = epochs_of(buckets, group, 5)
    assert all(sorted(epoch) == list(range(len(buckets))) for epoch in epochs)
    # full groups: most steps hold one bucket
    whole = np.concatenate(epochs)
    steps = np.array(buckets)[whole[: len(whole) // group * group]].reshape(-1, group)
    mixed = sum(len(set(step)) > 1 for step in steps.tolist())
    remainder = sum(count % group for count in counts)
    assert mixed <= 5 * (remainder // group + 2)


def test_the_order_is_a_function_of_seed_and_epoch():
    buckets = [0] * 21 + [1] * 10 + [2] * 3
    a, b = epochs_of(buckets, 4, 3), epochs_of(buckets, 4, 3)
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True)) and not np.array_equal(a[0], a[1])
    assert not np.array_equal(a[0], epochs_of(buckets, 4, 1, seed=1)[0])
    alone = BucketOrder(0, np.array(buckets), 4).epoch(2)  # without having made the epochs before
    assert np.array_equal(alone, a[2])
    positions = [np.flatnonzero(epoch == 33)[0] for epoch in epochs_of(buckets, 4, 60)]
    assert min(positions) < 6 and max(positions) > 27  # an item of a small bucket comes early or late


def test_without_buckets_the_order_is_what_it_was(folder):
    samples = data.Samples(FolderDataset(folder, (32, 32)), range(24), 5, (4, 4, 4))
    expected = np.random.default_rng(data.derive_seed("order", 5, 2)).permutation(24)
    assert [samples.index(48 + k) for k in range(24)] == expected.tolist()
    assert np.array_equal(shuffled(5, 2, 24), expected)


# ------------------------------------------------------------------------------------------------------------- samples
def samples_of(root, group=4, encodings=None, **framing) -> data.Samples:
    dataset = framed(root, **framing)
    order = BucketOrder(0, dataset.framings.bucket, group)
    return data.Samples(dataset, range(len(dataset)), 0, (4, 8, 8), encodings=encodings, order=order)


@pytest.fixture
def many(tmp_path):
    return write_pairs(tmp_path / "many", [SHAPES[i % len(SHAPES)] for i in range(23)])


def numbers(batches) -> list[str]:
    """The prompts of all samples of loader items."""
    return [prompt for parts in batches for part in parts for prompt in part["prompt"]]


def test_micro_batches_are_grouped_by_size_and_ranks_share_a_step(many):
    samples, group = samples_of(many), data.group_by_size
    load = lambda size, rank=0, ranks=1: list(data.batches(samples, 0, 32, size, rank=rank, ranks=ranks, collate=group))
    one = load(8)
    assert sum(len(parts) for parts in one) > len(one) == 4
    for parts in one:
        shapes = [tuple(part["hint"].shape[1:]) for part in parts]
        assert len(set(shapes)) == len(shapes) and sum(len(part["prompt"]) for part in parts) == 8
        for part in parts:
            count, _, height, width = part["hint"].shape
            assert part["noise"].shape == (count, 4, height // 8, width // 8)
            assert part["sizes"].shape == (count, 6) and (part["sizes"][:, 4:] == torch.tensor([height, width])).all()
    in_steps = lambda items, count: [sorted(numbers(items[k : k + count])) for k in range(0, len(items), count)]
    assert in_steps(one, 1) == in_steps(load(4), 2) == in_steps(load(1), 8)
    by_rank = zip(load(4, 0, 2), load(4, 1, 2), strict=True)
    assert in_steps(one, 1) == [sorted(numbers(pair)) for pair in by_rank]
    homogeneous = sum(len(parts) == 1 for parts in load(4))
    assert homogeneous >= len(load(4)) // 2


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "ranks"), [(1, 1, 1), (8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (3, 1, 1), (1, 9, 1)]
)
def test_counts_are_equal_whatever_the_batches(batch_size, accumulate, ranks):
    """23 items in buckets of 11, 7, 4 and 1: after each epoch, and so after 23 steps, all were seen equally often."""
    step = batch_size * accumulate * ranks
    order = BucketOrder(0, np.array([0] * 11 + [1] * 7 + [2] * 4 + [3]), step)

    class Numbers(torch.utils.data.Dataset):
        def __getitem__(self, n):
            return order.epoch(n // 23)[n % 23]

    loaders = [
        data.batches(Numbers(), 0, 23 * step, batch_size, rank=r, ranks=ranks, collate=list) for r in range(ranks)
    ]
    steps = [sum((next(loader) for loader in loaders for _ in range(accumulate)), []) for _ in range(23)]
    assert (np.bincount(sum(steps, []), minlength=23) == step).all()
    expected = np.concatenate([order.epoch(e) for e in range(step)]).reshape(23, step)
    assert [sorted(found) for found in steps] == [sorted(row) for row in expected.tolist()]


def test_variants_are_drawn_evenly_and_are_functions_of_the_sample(many):
    plain, varied, again = samples_of(many), *(samples_of(many, crops=2, flip=True) for _ in range(2))
    for n in range(8):
        a, b, c = plain[n], varied[n], again[n]
        assert a["prompt"] == b["prompt"] and torch.equal(a["noise"], b["noise"])  # no other random number changes
        assert torch.equal(b["hint"], c["hint"]) and torch.equal(b["sizes"], c["sizes"])
    drawn, asked = [], varied.dataset.load_item
    varied.dataset.load_item = lambda i, variant=0, **how: drawn.append(variant) or asked(0, variant=variant, **how)
    for n in range(100):
        varied[n]
    assert all(15 < drawn.count(variant) < 35 for variant in range(4))


def test_own_data_sets_have_buckets_too():
    rng = np.random.default_rng(0)
    items = []
    for width, height in SHAPES:
        jpg = rng.random((height, width, 3), dtype=np.float32)
        items.append(dict(jpg=2 * jpg - 1, txt="p", hint=jpg))
    buckets = bucket_sizes((64, 64), 32)
    dataset = ArrayDataset(items, (64, 64), hint_resample="nearest")
    assert dataset.native_sizes() == SHAPES and "sizes" not in dataset[0]
    dataset.framings = Framings(buckets, assign_buckets(dataset.native_sizes(), buckets), None, 2, True)
    for i in range(len(SHAPES)):
        width, height = dataset.size_of(i)
        for variant in range(4):
            item = dataset.load_item(i, variant=variant)
            assert item["jpg"].shape == item["hint"].shape == (height, width, 3)
            assert item["sizes"].tolist() == list(dataset.framing(i, variant, SHAPES[i]).numbers)
        straight, flipped = (dataset.hint(i, variant) for variant in (0, 1))
        assert np.array_equal(straight[:, ::-1], flipped) and dataset.key(i, 0) != dataset.key(i, 1)


def test_a_row_cannot_take_the_name_of_the_sizes(tmp_path):
    root = write_pairs(tmp_path / "d", SHAPES[:2])
    rows = [json.loads(line) | {"sizes": 3} for line in (root / "prompt.json").read_text().splitlines()]
    (root / "prompt.json").write_text("\n".join(map(json.dumps, rows)))
    assert framed(root)[0]["sizes"].shape == (6,) and "sizes" not in FolderDataset(root)[0]


def test_workers_get_buckets(many):
    whole, copy = samples_of(many, crops=2), pickle.loads(pickle.dumps(samples_of(many, crops=2)))
    assert all(torch.equal(whole[n]["hint"], copy[n]["hint"]) for n in range(10))
    first = lambda workers: next(data.batches(whole, 0, 8, 8, workers, collate=data.group_by_size))
    for a, b in zip(first(0), first(1), strict=True):
        assert torch.equal(a["hint"], b["hint"]) and a["prompt"] == b["prompt"]


def test_an_image_that_was_verified_is_opened_once_a_sample(many, tmp_path, monkeypatch):
    dataset = verify.verified(FolderDataset(many), tmp_path / "cache", False)
    monkeypatch.setattr(FolderDataset, "sizes", lambda self, i: pytest.fail("read again"))
    copy = pickle.loads(pickle.dumps(dataset))  # as a worker gets it
    assert np.array_equal(copy[3]["jpg"], dataset[3]["jpg"])


def test_the_size_of_a_row_that_was_verified_is_not_read_again(many, monkeypatch):
    dataset = FolderDataset(many)
    verify.find_bad_rows(dataset, workers=0)
    monkeypatch.setattr(FolderDataset, "sizes", lambda self, i: pytest.fail("read again"))
    assert dataset.native_sizes() == [SHAPES[i % len(SHAPES)] for i in range(23)]
    assert TINY.multiple == 32
    with pytest.raises(DataError):
        data.parse_resolution("0")
