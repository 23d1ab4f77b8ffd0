"""Which flags do data.py, merge.py, play.py and bench.py have?

Each function parses the command line of one program. They stand apart from what the programs do, which needs PyTorch:
`--help` and a wrong flag are answered before that is imported. (The flags of train.py are the settings in `config.py`,
those of sampler.py the fields of a request in `drawing/request.py`.)
"""

import argparse
from collections.abc import Callable, Sequence

from config import PRECISIONS, add_flags
from flag_types import device, number
from training.annotators import ANNOTATORS
from training.files import MAX_MEGAPIXELS
from training.layouts import COLUMNS_HELP, DATA_HELP, HINTS_HELP


# ----------------------------------------------------------------------------------------------------------------- data
def parse_data(argv: list[str] | None) -> argparse.Namespace:
    """What a command line of data.py asks for."""
    parser = argparse.ArgumentParser(
        prog="data.py", description="Look at one pair of a data set, check all, or make one of photos."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print one pair's prompt and shapes, and save the pair as a picture")
    check = commands.add_parser("check", help="read every row and report all problems; exit status 1 if any")
    add_hints_flags(commands.add_parser("hints", help="make a folder of photos a data set of hints and photos"))
    for p in (show, check):
        add = p.add_argument
        add("data", help=DATA_HELP)
        add("--hints", default="", metavar="FOLDER", help=HINTS_HELP)
        add("--columns", default="", metavar="ROLE=NAME,...", help=COLUMNS_HELP)
        add("--follow-links", action="store_true", help="follow links that lead out of the folder")
        add("--max-megapixels", type=float, default=MAX_MEGAPIXELS, metavar="N", help="largest image to read")
        add("--hint-scale", type=float, default=0.0, metavar="N", help="value of the hint files that is white")
    add = show.add_argument
    add("number", nargs="?", type=int, default=0, help="number of the pair, counted from 0 (default 0)")
    add("--out", default="pair.png", help="picture file for hint and target side by side (default pair.png)")
    add = check.add_argument
    add("--resolution", default="", metavar="SIZE", help="report what training at this size, N or WxH, cuts off")
    add("--buckets", action="store_true", help="report the sizes that train.py --buckets makes of --resolution (512)")
    add("--multiple", type=int, default=64, metavar="N", help="what the model divides sides by (default 64)")
    add("--sheet", default="", metavar="FILE", help="save a picture of 12 random rows: hint, target, prompt")
    add("--seed", type=int, default=0, metavar="N", help="another seed shows other rows on the sheet (default 0)")
    args = parser.parse_args(argv)
    if args.command != "hints" and not (args.max_megapixels > 0 and 0 <= args.hint_scale < float("inf")):
        parser.error("--max-megapixels must be above 0, --hint-scale at least 0")
    if args.command == "check" and args.multiple < 1:
        parser.error("--multiple must be at least 1")
    return args


def add_hints_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `data.py hints`. Those of the annotators are None unless they are given."""
    add = parser.add_argument
    add("photos", help="a folder of photos and folders (or one photo)")
    add("out", help="the data set to make: a folder beside (for one photo, the picture file of its hint)")
    kinds = "; ".join(f"{kind}: {annotator.help}" for kind, annotator in ANNOTATORS.items())
    add("--kind", required=True, choices=ANNOTATORS, help=kinds)
    uses: dict[str, list[str]] = {}
    for kind, annotator in ANNOTATORS.items():
        for p in annotator.parameters:
            uses.setdefault(p.name, []).append(f"{kind}: {p.help} ({p.low:g} to {p.high:g}, default {p.default:g})")
    for name, lines in uses.items():
        add(f"--{name}", type=float, metavar="N", help="; ".join(lines))
    sizes = "512 or 512x768, the size to train at; 0 keeps all sizes (default 512)"
    add("--size", default="512", metavar="N", help=f"scale larger photos down until they just cover this size: {sizes}")
    captions = "captions: the text beside each photo, a.txt or a.caption for a.jpg; names: the words of the file names"
    add("--prompts", default="captions", metavar="HOW", help=f"{captions}; any other text: the prompt of all photos")
    add(
        "--workers",
        type=int,
        metavar="N",
        help="processes (default: one for each CPU, at most 8; 0: the main one alone)",
    )
    add("--follow-links", action="store_true", help="follow links to folders, and links that lead out of the folder")
    add("--max-megapixels", type=float, default=MAX_MEGAPIXELS, metavar="N", help="largest photo to read")


# ---------------------------------------------------------------------------------------------------------------- merge
def parse_merge(argv: list[str]) -> argparse.Namespace:
    """What a command line of merge.py asks for."""
    commands = ("attach", "extract", "transfer", "export", "info", "-h", "--help")
    if argv and argv[0] not in commands:
        argv = ["attach", *argv]  # python merge.py INPUT OUTPUT
    parser = argparse.ArgumentParser(
        prog="merge.py", description="Attach, extract, carry over and export ControlNets; look into files."
    )
    sub = parser.add_subparsers(dest="command", required=True)
    p = sub.add_parser("attach", help="add a new ControlNet to a Stable Diffusion model (also: merge.py INPUT OUTPUT)")
    p.add_argument("input", help="a Stable Diffusion file or diffusers folder")
    p.add_argument("output", help="the file to write: .safetensors or .ckpt")
    p.add_argument(
        "--hint-channels",
        type=number(int, 1, 1024),
        default=3,
        help="number of channels of the hint images (default 3)",
    )
    p.add_argument(
        "--control-depth", default="",
        help="blocks in the ControlNet's transformers: full (as the UNet), mid, small, or one number for each level of "
        "the UNet, as 0,1,4 (default: full)",
    )  # fmt: skip
    p.add_argument(
        "--seed",
        type=number(int, -(2**63), 2**63 - 1),
        default=0,
        help="seed of the hint encoder's initial weights (default 0)",
    )
    q = sub.add_parser("extract", help="write the ControlNet alone")
    q.add_argument("input", help="a file with a ControlNet, a diffusers folder, or the folder of a run")
    q.add_argument("output", help="the file to write: .safetensors or .ckpt; with --format diffusers a folder")
    q.add_argument(
        "--format", choices=("original", "diffusers"), default="original",
        help="original: keys control_model.* as Automatic1111 and ComfyUI read them (default); diffusers: a folder",
    )  # fmt: skip
    q.add_argument(
        "--difference", metavar="BASE", help="write the difference to the UNet of the model BASE (not for diffusers)"
    )
    q.add_argument(
        "--hint-channels", type=number(int, 1, 1024),
        help="3 widens a ControlNet for gray hints: other programs give every ControlNet images of 3 channels",
    )  # fmt: skip
    q.add_argument("--bare", action="store_true", help="keys without the prefix control_model., as kohya's tools read")
    r = sub.add_parser("transfer", help="carry a ControlNet over to another base model")
    r.add_argument("--from-base", required=True, help="the base model on which the ControlNet was trained")
    r.add_argument("--control", required=True, help="that model with its ControlNet, the ControlNet alone, or a run")
    r.add_argument("--to-base", required=True, help="the base model to which the ControlNet is carried over")
    r.add_argument("output", help="the file to write, the second model with the ControlNet: .safetensors or .ckpt")
    s = sub.add_parser("export", help="write a whole model as a folder for diffusers or as one file")
    s.add_argument("input", help="a Stable Diffusion file with or without ControlNet, a diffusers folder, or a run")
    s.add_argument("output", help="the folder, or the .safetensors or .ckpt file, to write")
    s.add_argument("--base", default="", help="with a run: the base model, if it has moved or another one is wanted")
    s.add_argument("--control", default="", help="file or folder of a ControlNet to put into the model")
    s.add_argument(
        "--prediction",
        choices=("auto", "eps", "v"),
        default="auto",
        help="what the UNet predicts (v: SD 2.1 at 768 px)",
    )
    for each in (p, s):
        each.add_argument("--vae", default="", help="file or folder of a VAE that replaces the model's VAE")
        each.add_argument("--ema", action="store_true", help="use the moving average of the UNet (model_ema.*)")
    for each in (p, q, r, s):
        each.add_argument(
            "--dtype", choices=("fp32", "fp16", "bf16"),
            help="store the weights in this precision (default: that of the inputs; a folder has one for all)",
        )  # fmt: skip
        each.add_argument("--half", action="store_const", dest="dtype", const="fp16", help="short for --dtype fp16")
        each.add_argument("--force", action="store_true", help="replace an existing output")
    sub.add_parser("info", help="say what a file, folder or run holds").add_argument("input", help="where to look")
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------------------------------- play
def parse_play(argv: list[str] | None) -> argparse.Namespace:
    """What a command line of play.py asks for; there is no device in it if none is named."""
    parser = argparse.ArgumentParser(
        prog="play.py", usage="play.py [--model MODEL] [settings]",
        description="Open a page on which one draws hints and sees the ControlNet obey.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", default="runs/demo", help="folder of a training run, Stable Diffusion file, or diffusers folder")
    add("--base", default="", help="with a run: another base model than its own, or where that is now")
    add("--control", action="append", default=[],
        help="a further ControlNet to offer (file, folder or run of the same base); any number of times")  # fmt: skip
    add("--vae", default="", help="file or folder of a VAE that replaces the model's")
    add("--device", type=device, default=argparse.SUPPRESS,
        help="device that computes: cuda, cuda:1, mps or cpu (default: the first of these that is there)")  # fmt: skip
    add("--precision", choices=PRECISIONS, default="fp32", help="number format of weights and computation")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets the whole network draw")
    add("--port", type=number(int, 0, 65535), default=7860, help="port to listen at; 0 takes a free one")
    add("--browser", action=argparse.BooleanOptionalAction, default=True, help="open the page in the browser")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------- bench
MODELS = ("sd15", "sd21", "sd21_v", "sdxl", "tiny")  # the keys of `ldm.MODELS`
STEP_SETTINGS = {  # the settings of train.py on which the time of a step depends
    "device", "batch_size", "accumulate_grad_batches", "precision", "memory", "cache", "channels_last", "compile",
    "cuda_graph", "gradient_checkpointing", "attention_slice", "optimizer_bits", "trained_weights", "optimizer_on_cpu",
    "stream", "ema_decay", "only_mid_control", "sd_locked",
}  # fmt: skip


def parse_bench(argv: list[str] | None, parts: Sequence[str] | None = None) -> argparse.Namespace:
    """What a command line of bench.py asks for. `parts`: the names that --parts may have; None: any."""
    parser = argparse.ArgumentParser(
        prog="bench.py", description="Measure the speed and memory of training and drawing."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add_command(name: str, text: str, **defaults: object) -> Callable[..., argparse.Action]:
        command = commands.add_parser(
            name, help=text, usage=f"bench.py {name} [settings]", formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        command.add_argument(
            "--resolution", type=number(int, 1, 1 << 15), help="side of the images in pixels (default: the model's)"
        )
        command.set_defaults(json=False, **defaults)
        return command.add_argument

    flag = add_command("table", "ours, theirs, ratio and limit of what matters most, in some minutes", model="tiny")
    flag("--device", default=argparse.SUPPRESS, help="device that is measured (default: as for train.py)")
    flag("--minutes", type=number(float, 0), default=5, help="what would take longer is left out")
    as_json = dict(action="store_true", help="print JSON instead of a table")
    models = dict(choices=MODELS, help="model whose shapes are measured, with random weights")
    flag = add_command("step", "a training step: its time, memory, parts, and fraction of the machine's limit")
    flag("--model", default="tiny", **models)
    flag("--json", **as_json)
    flag("--against", choices=("diffusers",), help="measure the step of this library too, in turns with ours")
    flag("--repeat", type=number(int, 1), default=5, help="steps that are measured, after two that are not")
    add_flags(commands.choices["step"], STEP_SETTINGS)
    flag = add_command("sample", "the time of an image of the sampler")
    flag("--model", default="tiny", **models)
    flag("--json", **as_json)
    flag("--against", choices=("diffusers",), help="measure this library's pipeline too, on the same weights")
    flag("--steps", type=number(int, 1, 1000), default=20, dest="log_steps", metavar="N", help="denoising steps")
    add_flags(commands.choices["sample"], {"precision", "device"})
    flag("--repeat", type=number(int, 1), default=3, help="images that are measured, after one that is not")
    flag = add_command("memory", "the presets: memory as predicted and, on a GPU, as measured")
    flag("--model", default="sd15", **models)
    flag("--batch-size", type=number(int, 1), nargs="+", default=[1, 4], help="one or more batch sizes")
    flag("--repeat", type=number(int, 0), default=0, help="steps that are measured with each preset; 0: only predict")
    flag = add_command(
        "data", "the samples that the loader gives in a second, beside what a fast GPU asks for", model="tiny"
    )
    flag("--json", **as_json)
    flag("--workers", type=number(int, 0, 256), nargs="+", default=[0],
        help="numbers of processes that load samples; 0: the main process loads")  # fmt: skip
    flag("--count", type=number(int, 2), default=256, help="pairs that are drawn; each is loaded twice")
    flag("--rows", type=number(int, 0), default=0, help="read them from a list of so many rows, too; 0: of --count")
    flag = add_command("gpu", "all that has to be seen on a GPU: speed, memory, correctness, whole runs")
    flag("--model", default="sd15", **models)
    flag("--device", default=argparse.SUPPRESS, help="cuda, cuda:1, or cpu for a rehearsal with --model tiny")
    flag("--out", default="runs/gpu", help="folder of the results; parts that are finished there are not made again")
    names = "a name that is none is answered with all" if parts is None else ", ".join(parts)
    flag("--parts", nargs="+", choices=parts, metavar="PART", help=f"some of the parts (default: all): {names}")
    flag("--minutes", type=number(float, 0.01), default=10, help="longest time of a part")
    flag("--budget", type=number(float, 0.01), default=1e6, help="minutes after which everything ends")
    return parser.parse_args(argv)
