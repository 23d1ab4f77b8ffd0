"""The same circles in each of the five layouts are the same data set: tensors, cache keys, losses, resume, commands."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

import config as config_module
import data
import train
from config import DEMO, Config, resolve
from lowvram import estimate
from tests.fuzz_inputs import save_micro_model
from tests.test_train import losses
from toy import circles
from training import verify
from training.cache import target_keys
from training.checkpoints import find_changed_rows
from training.layouts import short_name
from weights import CheckpointError, load_model

COUNT = 64
KINDS = ["Fill50K", "imagefolder", "table", "folder pairs", "WebDataset"]


def copy(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def five(tmp_path_factory) -> dict[str, dict[str, str]]:
    """Of each layout the settings `data`, `hints` and `columns` that name the same circles in it."""
    root = tmp_path_factory.mktemp("five")
    circles.make(root / "fill50k", COUNT, 32, seed=3)
    rows = [json.loads(line) for line in (root / "fill50k/prompt.json").read_text().splitlines()]
    metadata, table = [], ["picture;edges;words"]
    (root / "shards").mkdir()
    shards = [tarfile.open(root / "shards" / f"{k:03}.tar", "w") for k in range(4)]  # noqa: SIM115
    for i, row in enumerate(rows):
        hint, target = root / "fill50k" / row["source"], root / "fill50k" / row["target"]
        copy(hint, root / "imagefolder/edges" / hint.name)
        copy(target, root / "imagefolder" / target.name)
        metadata.append(dict(file_name=target.name, conditioning_image=f"edges/{hint.name}", text=row["prompt"]))
        table.append(f'fill50k\\{row["target"]};"fill50k/{row["source"]}";{row["prompt"]}')
        folder = "a/" if i < 9 else "b/"  # in the order of names as people sort them: a/0, ..., a/8, b/9, b/10
        copy(target, root / "photos" / f"{folder}{i}.PNG")
        copy(hint, root / "hints" / f"{folder}{i}.png")
        (root / "photos" / f"{folder}{i}.txt").write_text(f"{row['prompt']}\r\n")
        add(shards[i // 16], f"{i:05}.hint.png", hint.read_bytes())
        add(shards[i // 16], f"{i:05}.png", target.read_bytes())
        text = json.dumps({"prompt": row["prompt"]}) if i % 2 else row["prompt"]
        add(shards[i // 16], f"{i:05}.{'json' if i % 2 else 'txt'}", text.encode())
    (root / "imagefolder/metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metadata))
    (root / "pairs.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(table).encode() + b"\r\n")
    for shard in shards:
        shard.close()
    for path in root.rglob("*"):
        os.utime(path, (1e9, 1e9))
    columns = "target=picture,hint=edges,prompt=words"
    return {
        "Fill50K": dict(data=str(root / "fill50k")),
        "imagefolder": dict(data=str(root / "imagefolder")),
        "table": dict(data=str(root / "pairs.csv"), columns=columns),
        "folder pairs": dict(data=str(root / "photos"), hints=str(root / "hints")),
        "WebDataset": dict(data=str(root / "shards" / "{000..003}.tar")),
    }


def opened(settings: dict[str, str], **more) -> data.FolderDataset:
    return data.FolderDataset(
        settings["data"], columns=settings.get("columns", ""), hints=settings.get("hints", ""), **more
    )


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_keys_and_digests_are_those_of_the_first_layout(kind, five, tmp_path):
    first, this = (opened(five[name], size=(32, 32), index_dir=tmp_path) for name in ("Fill50K", kind))
    assert len(this) == COUNT and str(this).startswith(f"{five[kind]['data']}: {kind} (") and "64 rows" in str(this)
    batches = [data.batches(data.Samples(each, range(COUNT), 5, (4, 4, 4)), 0, 16, 8, workers) for each, workers in
               ((first, 0), (this, 2))]  # fmt: skip
    for a, b in zip(*batches, strict=True):
        assert a.keys() == b.keys() and a["prompt"] == b["prompt"]
        assert all(torch.equal(a[name], b[name]) for name in a if name != "prompt")
    assert verify.find_bad_rows(this, workers=0) == {} == verify.find_bad_rows(first, workers=0)
    assert target_keys(this, tmp_path) == target_keys(first, tmp_path)
    assert this.row_digests() == first.row_digests() and len(set(this.row_digests())) == COUNT
    again = pickle.loads(pickle.dumps(this))  # as spawned processes get it
    assert (again[7]["jpg"] == first[7]["jpg"]).all() and again.sizes(7) == ((32, 32), (32, 32))


@pytest.fixture(scope="module")
def trained(five, tmp_path_factory) -> dict[str, list[float]]:
    """The losses of five steps on each layout, all with one cache; and the bytes of the cached latents after each."""
    root = tmp_path_factory.mktemp("trained")
    base, found = str(save_micro_model(root / "micro.safetensors")), {}
    for kind in KINDS:
        config = Config(
            base=base, **five[kind], out=str(root / kind), steps=5, batch_size=2, learning_rate=1e-3,
            cache_dir=str(root / "cache"), logger_freq=0, device="cpu", workers=0, resolution="32",
        )  # fmt: skip
        run = train.train(config)
        cached = {p.name: p.stat().st_size for p in (root / "cache").rglob("*.bin")}
        found[kind] = (losses(run), cached, run)
    return found


@pytest.mark.parametrize("kind", KINDS[1:])
def test_losses_are_those_of_the_first_layout_and_nothing_is_encoded_again(kind, trained):
    assert len(trained[kind][0]) == 5 and trained[kind][:2] == trained["Fill50K"][:2]


def test_a_run_goes_on_with_another_layout_of_the_same_rows(trained, five, capsys):
    """The rows are the same, so the run does not mind; another list of rows it refuses, as ever."""
    run = str(trained["folder pairs"][2])
    moved = ["--resume", run, "--data", five["WebDataset"]["data"], "--hints", "", "--steps", "6"]
    command = train.parse(moved)
    train.train(command.config, resume=run)
    assert "WebDataset (4 shards), 64 rows" in capsys.readouterr().out and len(losses(run)) == 6
    fewer = five["WebDataset"]["data"].replace("..003", "..002")
    with pytest.raises(ValueError, match="16 rows were removed and 0 added"):
        train.train(dataclasses.replace(command.config, data=fewer, steps=7), resume=run)


def test_rows_as_older_checkpoints_have_them(trained, five):
    """Digests of 16 digits, in which paths count."""
    run = trained["Fill50K"][2]
    dataset = opened(five["Fill50K"])
    older = dataset.row_digests(with_paths=True)
    row, contents = dataset.rows[3], dataset.contents(3)
    assert older[3] == data.digest("source/3.png", contents[0], "target/3.png", contents[1], row.prompt, []).hex()[:16]
    (file,) = (run / "checkpoints").glob("*/rows.txt")
    assert file.read_text().split() == dataset.row_digests()
    state = json.loads(file.with_name("state.json").read_text())
    file.write_text("\n".join(older) + "\n")
    arguments = (file.parent, state, {"data": ""}, dataset.row_digests())
    assert find_changed_rows(*arguments, lambda: dataset.row_digests(True)) == ""
    assert "64 rows were removed" in find_changed_rows(*arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_commands_work_alike(kind, five, tmp_path, capsys):
    settings = five[kind]
    flags = [word for name in ("hints", "columns") if name in settings for word in (f"--{name}", settings[name])]
    out, sheet = tmp_path / "pair.png", tmp_path / "sheet.png"
    assert data.main(["show", settings["data"], "10", "--out", str(out), *flags]) == 0
    assert data.main(["check", settings["data"], "--sheet", str(sheet), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["64", circles.random_circle(3, 10).prompt, "(32, 32, 3)", "(32, 32, 3)"]
    assert sum(f"{settings['data']}: {kind} (" in line for line in lines) == 2
    assert lines[-1] == f"{settings['data']}: 64 rows, 0 problems" and out.exists() and sheet.exists()
    assert data.is_dataset(settings["data"], settings.get("hints", ""))


def test_the_name_of_a_run_follows_the_data(five, tmp_path):
    names = {kind: short_name(settings["data"]) for kind, settings in five.items()}
    assert names == {"Fill50K": "fill50k", "imagefolder": "imagefolder", "table": "pairs", "folder pairs": "photos",
                     "WebDataset": "shards"}  # fmt: skip
    parse = lambda path: config_module.parse(["--base", "x", "--data", str(path)]).config.out
    assert parse(five["imagefolder"]["data"] + "/metadata.jsonl") == "runs/imagefolder"
    assert parse(five["WebDataset"]["data"]) == "runs/shards"
    assert parse(tmp_path / "s-{a,b}" / "*.tar") == f"runs/{tmp_path.name}" and parse("{a,b}.tar") != "runs/"
    assert parse(tmp_path / "not there") == "runs/not there"


def test_a_folder_that_is_no_data_set_is_told_what_to_name(five, tmp_path):
    """The layout that was meant is mostly clear from what is there."""
    root = tmp_path / "my data"
    folders = [root / name for name in ("tables", "two", "photos", "nothing")]
    for folder in folders:
        folder.mkdir(parents=True)
    shutil.copytree(Path(five["Fill50K"]["data"]) / "target", root / "two/photos")
    shutil.copytree(Path(five["Fill50K"]["data"]) / "source", root / "two/edges")
    shutil.copy(root / "two/photos/0.png", root / "photos")
    (root / "photos/0.json").touch()  # a caption of it, and no table
    (root / "two/empty").mkdir()
    for name in ("b.csv", "a.csv", "0.png"):
        (root / "tables" / name).touch()
    advice = [
        "; '{0}/a.csv', named itself, would be read as a table",
        "; of '{0}/edges' and '{0}/photos' name the targets, and",
        "; `python data.py hints '{0}' OUT --kind canny`", "",
    ]  # fmt: skip
    for folder, words in zip(folders, advice, strict=True):
        with pytest.raises(data.DataError) as e:
            data.FolderDataset(folder)
        assert words.format(folder) in str(e.value) and (words or str(e.value).endswith("(found nothing)"))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("models/v1-5-pruned.ckpt", "no such file; `make sd15` downloads it"),
        ("sd15", "no such file; the names of models are for --plan and bench.py"),
        ("sdxl", "no such file; the names of models are for --plan and bench.py"),
        ("models/other.ckpt", "other.ckpt: no such file$"),
        ("data/fill50k", "no such folder or file; `make fill50k` downloads it"),
        ("data/other", "no such folder or file$"),
    ],
)
def test_what_the_tutorial_downloads_is_named_where_it_lacks(path, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((CheckpointError, data.DataError), match=words):
        data.FolderDataset(path) if path.startswith("data") else load_model(path)


def test_a_plan_for_data_that_is_not_there_says_so(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("nowhere", str(tmp_path / "nowhere"), "data/circlez"):
        with pytest.raises(data.DataError, match=f"{path}: no such folder or file"):
            estimate.model_and_size(Config(base=str(base), data=path))
    assert estimate.model_and_size(Config(base=str(base)))[1] == (128, 128)
    assert estimate.model_and_size(Config(**DEMO | {"base": str(base)}))[1] == (128, 128)  # drawn when it is trained on


def test_the_plan_reads_every_layout(five, base):
    for kind in ("folder pairs", "WebDataset"):
        config = resolve(Config(base=str(base), device="cpu", **five[kind]), "fast")
        model_config, size = estimate.model_and_size(config)
        assert size == (32, 32) and estimate.cache_size(config, model_config, size)[0] == COUNT * 4 * 4 * 8 * 4


def test_the_plan_and_the_choice_of_a_preset_skip_what_training_skips(five, base, tmp_path):
    """A GPU's preset is chosen before the data set is verified: bad rows and links that are allowed must not end it."""
    root = tmp_path / "data"
    shutil.copytree(five["Fill50K"]["data"], root)
    lines = (root / "prompt.json").read_text().splitlines()
    (root / json.loads(lines[1])["target"]).write_bytes(b"no picture")
    moved = tmp_path / "elsewhere.png"
    (root / json.loads(lines[2])["target"]).rename(moved)
    (root / json.loads(lines[2])["target"]).symlink_to(moved)
    (root / "prompt.json").write_text("\n".join(["{", *lines[1:]]) + "\n")
    config = resolve(Config(base=str(base), data=str(root), device="cpu", cache_dir=str(tmp_path / "c")), "exact")
    skipping = dataclasses.replace(config, skip_bad_rows=True)
    assert estimate.model_and_size(skipping)[1] == (32, 32)
    assert estimate.first_size(dataclasses.replace(skipping, follow_links=True)) == (32, 32)
    assert estimate.cache_size(skipping, *estimate.model_and_size(skipping)) > (0, 0)
    with pytest.raises(data.DataError, match="prompt.json, line 1"):
        estimate.model_and_size(config)
    (root / "prompt.json").write_text("{\n")
    with pytest.raises(data.DataError, match="none of its rows can be used; python data.py check"):
        estimate.first_size(skipping)
