"""How many samples a second does the loader give, and is that enough for a fast GPU?

What is enough follows from an assumption, since such a GPU is seldom at hand: an H100 that makes a step of SD 1.5 at
half of its bf16 rate takes 218 samples of 512 px a second. The loader should give half as many again.
"""

import json
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import data
from config import Config
from ldm import MODELS, ControlLDM
from lowvram import estimate
from lowvram.process import disable_malloc_trim
from toy import circles
from training import cache, verify

H100_FLOPS = 0.5 * 989e12  # a second: half of the dense bf16 rate in the data sheet of the H100 SXM
ENOUGH = 1.5  # times what the GPU takes


def measure_data(side: int, workers: Sequence[int], count: int = 256, rows: int = 0) -> dict[str, str]:
    """Samples of circles that the loader gives in a second, from PNG in each layout (a run without cache) and from the
    cache (a run with it, which reads hints alone), for each number of worker processes; and what a fast GPU asks for.

    `count` pairs are drawn. `rows`: how many rows a further list has, which share them.
    """
    disable_malloc_trim()  # as train.py does
    result = {"images": f"{count} of {side} px, {' or '.join(map(str, workers))} workers"}
    fastest: dict[str, float] = {}  # samples a second of one process
    with tempfile.TemporaryDirectory() as folder:
        for source, samples in sources(Path(folder), side, count, rows).items():
            for w in workers:
                rate = samples_per_second(samples, 2 * count, w)
                each = f", {w} workers" if len(workers) > 1 else ""
                result[f"samples a second from {source}{each}"] = f"{rate:.0f}"
                fastest[source] = max(rate / max(w, 1), fastest.get(source, 0.0))
    needed = samples_needed(side)
    result["samples a second that SD 1.5 needs on an H100 at half of its bf16 rate"] = f"{needed:.0f}"
    for source in ("PNG", "the cache"):
        cores = f"{ENOUGH * needed / fastest[source]:.1f}"
        result[f"CPU cores like these that give {ENOUGH} times as many from {source}"] = cores
    return result


def samples_needed(side: int) -> float:
    """Samples of `side` px that an H100 takes in a second, by the assumption above."""
    size = data.fit_size((side, side), MODELS["sd15"].multiple)
    return H100_FLOPS / estimate.flops(Config(base="sd15", out="-"), MODELS["sd15"], size)


def write_layouts(folder: Path, count: int, side: int, rows: int = 0) -> dict[str, dict[str, str]]:
    """The same circles in each layout under `folder`: words for the layout -> arguments of `data.FolderDataset`; with
    `rows` also a list of so many rows, which share the circles."""
    circles.make(folder, count, side)
    entries = [json.loads(line) for line in (folder / "prompt.json").read_text().splitlines()]
    table = "".join(f"{row['target']},{row['source']},{row['prompt']}\n" for row in entries)
    (folder / "pairs.csv").write_text("target,hint,prompt\n" + table)
    with tarfile.open(folder / "shard.tar", "w") as shard:
        for i, row in enumerate(entries):
            caption = (folder / row["target"]).with_suffix(".txt")
            caption.write_text(row["prompt"])
            for name, file in ((f"{i}.png", row["target"]), (f"{i}.hint.png", row["source"]), (f"{i}.txt", caption)):
                shard.add(folder / file, name)
    layouts = {
        "": dict(root=str(folder)),
        " in a table (CSV)": dict(root=str(folder / "pairs.csv")),
        " in two folders": dict(root=str(folder / "target"), hints=str(folder / "source")),
        " in a tar shard": dict(root=str(folder / "shard.tar")),
    }
    if rows:
        long = (entries[i % count] | {"prompt": f"{i // count} {i % count}"} for i in range(rows))
        (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
        layouts[f" in a list of {rows} rows"] = dict(
            root=str(folder / "long.jsonl"), columns="target=target,hint=source,prompt=prompt"
        )
    return layouts


def sources(folder: Path, side: int, count: int, rows: int = 0) -> dict[str, data.Samples]:
    """Where samples come from, in words -> samples: PNG files in each layout of `write_layouts`, and the cache."""
    layouts = write_layouts(folder, count, side, rows)
    open_verified = lambda arguments: verify.verified(data.FolderDataset(size=(side, side), **arguments), folder, False)
    datasets = {name: open_verified(arguments) for name, arguments in layouts.items()}
    model = ControlLDM(MODELS["tiny"], hint_channels=None).requires_grad_(False)
    with torch.no_grad():
        cached = cache.build_cache(model, datasets[""], str(folder / "cache"), 8)
    samples = lambda over, encodings=None: data.Samples(
        over, range(len(over)), 0, (4, side // 8, side // 8), encodings=encodings
    )
    found = {f"PNG{name}": samples(dataset) for name, dataset in datasets.items()}
    return found | {"the cache": samples(datasets[""], cached)}


def samples_per_second(samples: data.Samples, count: int, workers: int, batch_size: int = 8) -> float:
    """The rate at which `count` samples come, after the first batch: processes need seconds to start."""
    loader = data.batches(samples, 0, count + batch_size, batch_size, workers)
    next(loader)
    start = time.perf_counter()
    loaded = sum(len(batch["timesteps"]) for batch in loader)
    return loaded / (time.perf_counter() - start)
