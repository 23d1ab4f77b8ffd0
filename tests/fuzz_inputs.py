"""What the fuzzer attacks: a corpus of small valid files, the programs that read them, and odd command lines.

An input is a function of (seed, number): `prepare` copies what a reader needs from the corpus (a tiny model, a data
set, a run, a diffusers folder), damages one file of the copy (`tests/mutations.py`) or makes an odd command line, and
returns the call that reads it. `outcome` says how such a call ends.
"""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import random
import re
import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import merge
import sampler
import train
from ldm import TINY, ControlLDM
from tests.mutations import mutate, odd_file
from toy import circles, pretrain
from weights import ModelSource, load_model, load_state_dict
from weights.reading import load_metadata
from weights.writing import save_safetensors


# --------------------------------------------------------------------------------------------------------------- corpus
def save_micro_model(path: Path) -> Path:
    """A Stable Diffusion of random weights, as small as its shapes allow: 2 million of them, images of 16 n pixels."""
    unet = dataclasses.replace(
        TINY.unet, model_channels=32, channel_mult=(1, 2), attention_resolutions=(2,), context_dim=32,
        num_head_channels=16, norm_groups=8,
    )  # fmt: skip
    text = dataclasses.replace(TINY.text, width=32, heads=2, mlp_width=64)
    config = dataclasses.replace(
        TINY, name="micro", unet=unet, text=text, hint_widths=(4, 8, 8, 16), guidance=2.0, resolution=32
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ControlLDM(config, hint_channels=None)
        for p in model.unet.parameters():
            if not p.any():  # what starts at zero in a new UNet does not in a trained one
                torch.nn.init.normal_(p, std=0.05)
    save_safetensors(path, {k: v.half() for k, v in model.state_dict().items()}, {"config": config.to_json()})
    return path


def run_flags(folder: Path, steps: int = 2) -> list[str]:
    """Flags of a short run whose files are all in `folder`."""
    return [
        "--base", f"{folder}/base.safetensors", "--data", f"{folder}/data", "--out", f"{folder}/run", "--steps",
        str(steps), "--batch-size", "1", "--memory", "6gb", "--ema-decay", "0.9", "--logger-freq", "2", "--log-steps",
        "1", "--log-images", "1", "--validation", "2", "--checkpoint-freq", "1", "--cache-dir", f"{folder}/cache",
        "--device", "cpu", "--workers", "0",
    ]  # fmt: skip


def make_corpus(folder: Path) -> Path:
    """One small valid file or folder of each kind that the programs read."""
    folder.mkdir(parents=True)
    save_micro_model(folder / "base.safetensors")
    circles.make(folder / "data", count=6, size=32, seed=3)
    rows = [json.loads(line) for line in (folder / "data" / "prompt.json").read_text().splitlines()]
    for row, side, ending in ((0, "source", "npy"), (1, "source", "jpg"), (1, "target", "jpg"), (2, "target", "npy")):
        picture = folder / "data" / rows[row][side]
        rows[row][side] = f"{side}/{row}.{ending}"
        image = Image.open(picture).convert("RGB")
        if ending == "npy":
            np.save(picture.with_suffix(".npy"), np.asarray(image))
        else:
            image.save(picture.with_suffix(".jpg"))
        picture.unlink()
    (folder / "data" / "prompt.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(run_flags(folder))
        run = str(folder / "run")
        merge.main(["export", run, str(folder / "diffusers")])
        merge.main(["extract", run, str(folder / "control.safetensors")])
    few = dict(list(load_state_dict(folder / "control.safetensors").items())[:6])
    few |= {"control_model.input_hint_block.0.weight": torch.zeros(4, 3, 3, 3)}
    save_safetensors(folder / "few.safetensors", few, {"config": "{}", "note": "a"})
    torch.save({"state_dict": few, "epoch": 1, "shape": torch.Size((1, 2))}, folder / "zip.ckpt")
    torch.save({"model": few}, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save(few, folder / "later.ckpt", pickle_protocol=4)
    (folder / "plain.pth").write_bytes(pickle.dumps({"a": [1, (2, "b")]}, 2))
    return folder


def copy_corpus(corpus: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Copies of some files and folders of the corpus. Large weight files, which nothing writes in place, are links."""

    def copy(source: str, target: str) -> None:
        if source.endswith(".safetensors"):
            os.link(source, target)
        else:
            shutil.copyfile(source, target)

    folder.mkdir(parents=True)
    for name in names:
        if (corpus / name).is_dir():
            shutil.copytree(corpus / name, folder / name, copy_function=copy)
        else:
            copy(str(corpus / name), str(folder / name))
    if (config := folder / "run" / "config.json").exists():  # its paths name the corpus
        config.write_text(config.read_text().replace(str(corpus), str(folder)))


# -------------------------------------------------------------------------------------------------------------- readers
@dataclass(frozen=True)
class Reader:
    """A program and what it reads: `names` are copied from the corpus, `damaged` (patterns) is what may be damaged."""

    names: tuple[str, ...]
    damaged: tuple[str, ...]
    call: Callable[[Path, str], object]  # (folder, the damaged file's path in it)


def _read_weights(folder: Path, file: str) -> None:
    for tensor in load_state_dict(folder / file).values():
        tensor.flatten()[: 1 << 20].float().sum()  # touches the memory
    load_metadata(folder / file)


def _load(folder: Path, file: str) -> None:
    path = folder / file.split("/")[0]
    model = load_model(ModelSource(path, attach=True))
    model.encode_prompts("x")


def _merge(command: str) -> Callable[[Path, str], None]:
    def call(folder: Path, file: str) -> None:
        path = folder / file.split("/")[0]
        outputs = {"info": [], "export": [str(folder / "exported")], "attach": [str(folder / "attached.safetensors")]}
        more = ["--control", str(folder / file)] if file.startswith("control") and command == "export" else []
        path = folder / "base.safetensors" if more else path
        merge.main([command, str(path), *outputs.get(command, [str(folder / "out.ckpt")]), *more])

    return call


def _show(folder: Path, file: str) -> None:
    data.main(["show", str(folder / "data"), "1" if "/1." in file else "0", "--out", str(folder / "pair.png")])


def _sample(folder: Path, file: str) -> None:
    hint = folder / file if file.startswith("data/") else folder / "data" / "source" / "3.png"
    sampler.main(
        ["--model", str(folder / "run"), "--hint", str(hint), "--prompt", "x", "--num", "1", "--steps", "1",
         "--resolution", "32", "--out", str(folder / "samples"), "--device", "cpu"]
    )  # fmt: skip


WEIGHT_FILES = ("few.safetensors", "zip.ckpt", "legacy.pth", "later.ckpt", "plain.pth")
MODELS = ("base.safetensors", "diffusers", "run")
RUN_FILES = ("run/config.json", "run/metrics.jsonl", "run/checkpoints/**/*.json", "run/checkpoints/**/*.safetensors")
FOLDER_FILES = ("diffusers/**/*.json", "diffusers/**/*.safetensors")
RUN_AND_FOLDER_FILES = (*FOLDER_FILES, *RUN_FILES)
READERS = {
    "load_state_dict": Reader(WEIGHT_FILES, WEIGHT_FILES, _read_weights),
    "load_model": Reader(MODELS, ("base.safetensors", *FOLDER_FILES, *RUN_FILES[:3]), _load),
    "info": Reader((*MODELS, *WEIGHT_FILES), ("base.safetensors", *RUN_AND_FOLDER_FILES), _merge("info")),
    "extract": Reader((*MODELS, *WEIGHT_FILES), (*WEIGHT_FILES, *RUN_AND_FOLDER_FILES), _merge("extract")),
    "attach": Reader(("base.safetensors", "diffusers"), ("base.safetensors", *FOLDER_FILES), _merge("attach")),
    "export": Reader(
        (*MODELS, "control.safetensors"), ("base.safetensors", "control.safetensors", *RUN_AND_FOLDER_FILES),
        _merge("export"),
    ),
    "show": Reader(("data",), ("data/prompt.json", "data/*/0.*", "data/*/1.*"), _show),
    "check": Reader(
        ("data",), ("data/prompt.json", "data/*/*"), lambda folder, _: data.main(["check", str(folder / "data")])
    ),
    "train": Reader(
        ("base.safetensors", "data"), ("base.safetensors", "data/prompt.json", "data/*/*"),
        lambda folder, _: train.main(run_flags(folder)),
    ),
    "resume": Reader(
        ("base.safetensors", "data", "run", "cache"), (*RUN_FILES, "cache/**/*", "cache/**/*", "data/**/*"),
        lambda folder, _: train.main(["--resume", str(folder / "run"), "--steps", "4"]),
    ),
    "hint": Reader(("base.safetensors", "run", "data"), ("data/*/*", "run/config.json"), _sample),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- flags
ODD_ARGUMENTS = (
    "", " ", "0", "-1", "1", "2", "0.5", "nan", "inf", "-inf", "1e400", "1e-400", "1e30", "-0", "1_0", "0x10", "١٢",
    "9" * 30, "9" * 5000, "-" + "9" * 30, "2147483648", "9223372036854775808", "18446744073709551616", "1000000000",
    "None", "true", "\udcff", "🦊", "a" * 300, "a" * 5000, ".", "/proc", "{folder}/zeros", "/proc/self/mem",
    "/proc/nowhere/x", "x/../y", "32x", "x32", "32x32x32", "32X32", "0x0", "-32x32", "1000000x1000000",
    "32x1000000000", "cuda", "cuda:99", "meta", "cpu:7", "mps", "auto", "fp16", "fp32", "bf16", "6gb",
    "{folder}/data", "{folder}/base.safetensors", "{folder}/run", "--x",
)  # fmt: skip


class Enough(BaseException):
    """Raised in the place of work that would go on: the odd flag was accepted."""


def _flags(help_of: Callable[[list[str]], object], command: tuple[str, ...]) -> list[str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        help_of([*command, "--help"])
    slow = {"--compile"}  # takes minutes, and may
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]*", out.getvalue())) - {"--help"} - slow)


def flag_commands(folder: Path) -> dict[str, tuple[Callable, tuple[str, ...], list[str]]]:
    """Of each command: its main function, its sub-command, and a command line that works."""
    run, out = str(folder / "run"), str(folder / "out")
    base = str(folder / "base.safetensors")
    fresh = run_flags(folder)
    fresh[fresh.index("--out") + 1] = out
    model = ["--model", run, "--hint", str(folder / "data" / "source" / "3.png"), "--prompt", "x", "--resolution", "32",
             "--steps", "1", "--num", "1", "--out", out, "--device", "cpu"]  # fmt: skip
    several = ["--model", run, "--hints", str(folder / "data"), "--control", run, "--hints", str(folder / "data"),
               "--resolution", "32", "--steps", "1", "--out", out, "--device", "cpu"]  # fmt: skip
    return {
        "flags of train.py": (train.main, (), fresh),
        "flags of train.py --resume": (train.main, (), ["--resume", run, "--steps", "3"]),
        "flags of train.py --plan": (train.main, (), [*fresh, "--plan"]),
        "flags of sampler.py": (sampler.main, (), model),
        "flags of sampler.py --hints": (sampler.main, (), several),
        "flags of merge.py attach": (merge.main, ("attach",), [base, out + ".ckpt"]),
        "flags of merge.py extract": (merge.main, ("extract",), [run, out + ".ckpt"]),
        "flags of merge.py export": (merge.main, ("export",), [run, out]),
        "flags of data.py": (data.main, ("show",), [str(folder / "data"), "0", "--out", out + ".png"]),
        "flags of toy.circles make": (circles.main, ("make",), [out, "--count", "2", "--size", "32"]),
        "flags of toy.circles judge": (circles.main, ("judge",), [run, "--count", "1", "--steps", "1"]),
        "flags of toy.pretrain": (pretrain.main, (), ["--work", out, "--out", out + ".safetensors"]),
    }


FLAG_COMMANDS = tuple(flag_commands(Path("x")))


def call_with_odd_flags(rng: random.Random, folder: Path, command: str) -> tuple[str, Callable[[], object]]:
    """An odd command line, in words and as a call. Work that would take long is cut short."""
    main, subcommand, arguments = flag_commands(folder)[command]
    names = _flags(main, subcommand)
    arguments = list(arguments)
    for _ in range(rng.choice((1, 1, 1, 2))):
        value = rng.choice(ODD_ARGUMENTS).replace("{folder}", str(folder))
        if rng.random() < 0.1:  # the path or number that has no flag
            positions = [i for i, word in enumerate(arguments) if not word.startswith("--")]
            arguments[rng.choice(positions)] = value
            continue
        name = rng.choice(names)
        arguments += [name] if rng.random() < 0.1 else [f"{name}={value}"]
    arguments = [*subcommand, *arguments]

    def call() -> object:
        with cut_short():
            return main(arguments)

    return repr(arguments)[:2000], call


@contextlib.contextmanager
def cut_short() -> Iterator[None]:
    """While entered, training stops in its second step, and drawing in its third."""
    kept = train.training_loop, sampler.make_cfg_model, circles.random_circle, pretrain.Stage.train
    count = Counter()

    def after(calls: int, name: str) -> None:
        count[name] += 1
        if count[name] > calls:
            raise Enough

    def short_loop(trainer, loader, loss_fn, ranks, validation, save, interruption):  # noqa: ANN001, ANN202
        def loss(*arguments, **settings):  # noqa: ANN002, ANN003, ANN202
            count["loss"] += 1
            interruption.requested = interruption.requested or count["loss"] > 1
            return loss_fn(*arguments, **settings)

        return kept[0](trainer, loader, loss, ranks, validation, save, interruption)

    def short_model(*arguments, **settings):  # noqa: ANN002, ANN003, ANN202
        model = kept[1](*arguments, **settings)
        return lambda *x: (after(3, "drawing"), model(*x))[1]

    train.training_loop, sampler.make_cfg_model = short_loop, short_model
    circles.random_circle = lambda *x: (after(100, "circles"), kept[2](*x))[1]
    pretrain.Stage.train = lambda *_, **__: after(0, "stage")
    try:
        yield
    except Enough:
        pass
    finally:
        train.training_loop, sampler.make_cfg_model, circles.random_circle, pretrain.Stage.train = kept


# ---------------------------------------------------------------------------------------------------------------- cases
ALL = (*READERS, *FLAG_COMMANDS)


def prepare(
    corpus: Path, folder: Path, seed: int, number: int, readers: tuple[str, ...]
) -> tuple[str, Callable[[], object]]:
    """Input `number` of `seed` in `folder`: what it is, in words, and the call that reads it."""
    rng = random.Random(f"{seed}/{number}")
    name = rng.choice(readers)
    if name in FLAG_COMMANDS:
        copy_corpus(corpus, folder, ("base.safetensors", "data", "run", "cache"))
        (folder / "zeros").symlink_to("/dev/zero")
        what, call = call_with_odd_flags(rng, folder, name)
        return f"{name}: {what}", call
    reader = READERS[name]
    copy_corpus(corpus, folder, reader.names)
    pattern = rng.choice(reader.damaged)
    files = sorted(p for p in folder.glob(pattern) if p.is_file() and p.suffix != ".lock")
    path = rng.choice(files or [folder / reader.names[0]])
    what = f"{name}: {path.relative_to(folder)}"
    if rng.random() < 0.06:
        what += f", replaced: {odd_file(rng, path)}"
    else:
        content = mutate(rng, path.name, path.read_bytes())
        path.unlink()  # it may be a link to the corpus
        path.write_bytes(content)
    return what, lambda: reader.call(folder, path.relative_to(folder).as_posix())


def outcome(call: Callable[[], object]) -> tuple[str, str]:
    """How a call ends: ("ok" | "error" | "traceback", the message or the traceback)."""
    try:
        call()
    except SystemExit as e:
        if e.code in (None, 0, 1, 2) or (isinstance(e.code, str) and "\n" not in e.code):
            return "ok", ""
        return "traceback", f"SystemExit: {e.code!r}"
    except (ValueError, OSError) as e:
        unforeseen = isinstance(e, UnicodeError) or "the traceback is in" in str(e)
        if unforeseen or "\n" in str(e).strip():
            return "traceback", traceback.format_exc()
        return "error", f"{type(e).__name__}: {e}"
    except BaseException:
        return "traceback", traceback.format_exc()
    return "ok", ""
