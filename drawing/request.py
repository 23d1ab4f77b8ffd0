"""What can be asked for: a `Request`, and the command line that says it.

`parse` turns flags into a request, `command_line` turns a request into flags. The flags of a ControlNet follow its
`--control`, which begins a group; those before the first `--control` belong to the ControlNet that the model has by
itself, or, where it is no run, to the first one:

    --model RUN  --hint a.png --strength 0.8  --control B --hint b.png  --control C --hint c.png --guess-mode
                 |-- the run's own --------|  |-- B -----------------|  |-- C ------------------------------|
"""

import argparse
import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from config import PRECISIONS
from flag_types import ConfigError, default_device, device, flag_name, flag_words, number
from training.console import shell_line
from training.images import RESAMPLE

SOLVERS = ("ddim", "dpm", "euler", "euler_a")  # the names of `sampler.SOLVERS`, known without PyTorch
SPACINGS = ("leading", "trailing", "linspace", "karras")  # as `sampler.SPACINGS`
MAX_NUMBERS = 300  # of seeds or strengths
MAX_IMAGES = 100_000  # of one command or row


@dataclass(frozen=True)
class ControlRequest:
    """A ControlNet and what it is shown. The fields have the names of the flags; None: as its run was trained."""

    control: str = ""  # its file, folder or run; empty: the model's own
    hint: str | None = None  # one hint for all pictures
    hints: str | None = None  # or a folder of hints, one a picture
    strength: float = 1.0
    strengths: tuple[float, ...] = ()  # the columns of a grid
    guess_mode: bool = False
    control_start: float = 0.0
    control_end: float = 1.0
    only_mid_control: bool | None = None
    hint_resample: str | None = None
    hint_ground: str | None = None
    hint_scale: float | None = None


@dataclass(frozen=True)
class Request:
    """Everything that a command asks for. The fields have the names of the flags."""

    model: str
    prompt: str | None = None
    controls: tuple[ControlRequest, ...] = ()
    base: str = ""
    vae: str = ""
    ema: bool = False
    clip_skip: int | None = None
    negative_prompt: str = ""
    prompts: str | None = None
    init: str | None = None
    denoise: float = 0.75
    num: int | None = None  # None: 4, or 1 of each row of a list
    first: int = 0
    batch_size: int = 4
    steps: int = 20
    solver: str = "ddim"
    spacing: str = "auto"
    eta: float = 0.0
    scale: float | None = None
    resolution: str = ""
    original_size: tuple[int, int] | None = None  # what SDXL is told: (width, height); None: the images' own size
    crop: tuple[int, int] = (0, 0)  # and: pixels cut off on the left and above
    prediction: str = "auto"
    seed: int = 0
    seeds: tuple[int, ...] = ()
    device: str = field(default_factory=default_device)
    precision: str = "fp32"
    out: str = "samples"
    overwrite: bool = False

    @property
    def is_list(self) -> bool:
        """Whether pictures are drawn for the rows of a list."""
        return self.prompts is not None or any(c.hints is not None for c in self.controls)

    @property
    def is_grid(self) -> bool:
        """Whether a grid of seeds and strengths is drawn."""
        return bool(self.seeds) or any(c.strengths for c in self.controls)


# ------------------------------------------------------------------------------------------------------ command line
class _BeginControl(argparse.Action):
    """--control FILE: the flags after it belong to this ControlNet. An empty FILE begins nothing."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option: str | None = None) -> None:
        if value:
            namespace.groups = [*namespace.groups, {"control": value}]


class _OfControl(argparse.Action):
    """A flag of the ControlNet before it. An empty text is as no flag."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option: str | None = None) -> None:
        *before, group = namespace.groups
        if self.nargs == 0:
            value = not (option or "").startswith("--no-")
        elif value == "":
            return
        if self.dest == "hint" and before and "hint" in group:
            raise ConfigError(
                f"--hint {value}: --control {group['control']} has a --hint already ({group['hint']}); each --hint of "
                "several comes after its --control"
            )
        namespace.groups = [*before, group | {self.dest: value}]


def numbers(kind: type, text: str) -> tuple:
    """Parse "0,0.5,1" into numbers of type `kind`; of whole numbers also ranges, as "0-3,8"."""
    values = []
    for part in text.split(","):
        bounds = re.fullmatch(r"\s*(\d{1,18})\s*-\s*(\d{1,18})\s*", part) if kind is int else None
        first, last = map(int, bounds.groups()) if bounds else (0, -1)
        if last - first >= MAX_NUMBERS:
            raise argparse.ArgumentTypeError(f"{part.strip()}: are more than {MAX_NUMBERS}")
        try:
            values += range(first, last + 1) if bounds else [number(kind)(part)]
        except ValueError as e:
            example = "0,1,2 or 0-2" if kind is int else "0,0.5,1"
            raise argparse.ArgumentTypeError(f"is {text[:100]!r}, should be numbers as {example}") from e
    values = tuple(dict.fromkeys(values))
    if not 1 <= len(values) <= MAX_NUMBERS:
        raise argparse.ArgumentTypeError(f"names {len(values)} numbers, should be 1 to {MAX_NUMBERS}")
    return values


def pixels(text: str) -> tuple[int, int]:
    """Parse "WxH" into (W,H), numbers of pixels from 0 on."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"is {text[:100]!r}, should be two numbers of pixels, as 1024x768")
    return int(match[1]), int(match[2])


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help texts end in the default, if there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default not in (None, "") and action.default is not False and "default:" not in action.help
        return super()._get_help_string(action) if told else action.help


def build_parser(solvers: Sequence[str] | None = SOLVERS) -> argparse.ArgumentParser:
    """The flags of sampler.py. `solvers`: see `parse`."""
    parser = argparse.ArgumentParser(
        prog="sampler.py",
        usage="sampler.py --model MODEL --prompt PROMPT [--hint HINT] [settings]",
        description="Draw images with trained ControlNets (or with a Stable Diffusion model alone).",
        formatter_class=_Help,
    )
    parser.set_defaults(groups=[{}])
    count, fraction = number(int, 1), number(float, 0, 1)
    add = parser.add_argument_group("model").add_argument
    add("--model", required=True, help="folder of a training run, Stable Diffusion file, or diffusers folder")
    add("--base", default="", help="with a run: another base model than its own, or where that is now")
    add("--vae", default="", help="file or folder of a VAE that replaces the model's")
    add("--ema", action="store_true", help="use the moving average of the base's UNet (model_ema.*)")
    add("--clip-skip", type=count, help="2 leaves out the last layer of the text encoder")
    add("--prediction", choices=("auto", "eps", "v"), default="auto",
        help="what the UNet predicts: v for SD 2.1 at 768 px, which auto judges by the weights")  # fmt: skip
    add("--device", type=device, default=argparse.SUPPRESS,
        help="device that computes: cuda, cuda:1, mps or cpu (default: the first of these that is there)")  # fmt: skip
    add("--precision", choices=PRECISIONS, default="fp32", help="number format of weights and computation")
    add = parser.add_argument_group("picture").add_argument
    add("--prompt", help="what the images show")
    add("--negative-prompt", default="", help="what guidance leads away from")
    add("--init", metavar="IMAGE", help="picture to start from, in place of noise alone (image to image)")
    add("--denoise", type=fraction, default=argparse.SUPPRESS,
        help="with --init: how much is drawn anew, the fraction of --steps that is made (default: 0.75)")  # fmt: skip
    add("--steps", type=number(int, 1, 999), default=20, help="denoising steps")
    add("--solver", choices=solvers, metavar=f"{{{','.join(solvers or SOLVERS)}}}", default="ddim",
        help="dpm (DPM-Solver++ 2M) needs fewer steps; euler_a (Euler ancestral) adds fresh noise in each")  # fmt: skip
    add("--spacing", choices=("auto", *SPACINGS), default="auto",
        help="where the steps are: karras has more of them at little noise; auto: linspace for euler and euler_a, "
        "otherwise leading, or trailing where the model's noise schedule ends in pure noise")  # fmt: skip
    add("--eta", type=fraction, default=0.0, help="fresh noise in each DDIM step: 0 none, 1 as much as DDPM")
    add("--scale", type=number(float, 0), help="guidance scale, 1 for no guidance (default: the model's own, 9 for SD)")
    add("--resolution", default="", help="size of the images, N or WxH (default: that of --init, or the hint's)")
    add("--original-size", type=pixels, metavar="WxH",
        help="for SDXL: size of the photo that the images seem to be made of (default: their own)")  # fmt: skip
    add("--crop", type=pixels, default=(0, 0), metavar="XxY",
        help="for SDXL: pixels that seem to be cut off on the left and above (default: 0x0)")  # fmt: skip
    add("--seed", type=int, default=0, help="equal seeds draw equal images")
    add = parser.add_argument_group("ControlNets (each flag belongs to the --control before it)").add_argument
    add("--control", metavar="MODEL", default=argparse.SUPPRESS, action=_BeginControl,
        help="a ControlNet: file, folder or run; it joins that of a run, and replaces that of a file")  # fmt: skip
    _add_control_flags(add, fraction)
    add = parser.add_argument_group("many pictures").add_argument
    add("--num", type=number(int, 1, MAX_IMAGES),
        help="number of images (default: 4; 1 of each row with --hints or --prompts)")  # fmt: skip
    add("--first", type=number(int, 0), default=0, help="number of the first of them: 3 begins with the fourth")
    add("--batch-size", type=count, default=4, help="images drawn at once")
    add("--prompts", metavar="FILE",
        help="a prompt for each hint: lines of text, or JSON objects with source and prompt (.json)")  # fmt: skip
    add("--seeds", type=lambda text: numbers(int, text), default=argparse.SUPPRESS, metavar="N-M",
        help="a labelled grid with a row for each of these seeds (0-3, or 1,5,8)")  # fmt: skip
    add("--out", default="samples", help="folder for the images and grid.png, or contact.png with --hints or --prompts")
    add("--overwrite", action="store_true",
        help="with a list or grid: draw again what is there with the same settings")  # fmt: skip
    return parser


def _add_control_flags(add_argument: Callable, fraction: Callable) -> None:
    """The flags that may be given once for each ControlNet. Their defaults are those of `ControlRequest`."""
    add = lambda name, **settings: add_argument(name, default=argparse.SUPPRESS, action=_OfControl, **settings)
    add("--hint", metavar="IMAGE",
        help="hint image (.png, .jpg, ...; .npy for other than 1, 3 or 4 channels); without it no control")  # fmt: skip
    add("--hints", metavar="FOLDER", help="a picture for each hint in this folder; of a data set, with its prompts")
    add("--strength", type=number(float), metavar="S",
        help="factor of the ControlNet's residuals, 0 for no control (default: 1.0)")  # fmt: skip
    add("--strengths", type=lambda text: numbers(float, text), metavar="S,S",
        help="a labelled grid with a column for each of these strengths (0,0.5,1)")  # fmt: skip
    add("--guess-mode", nargs=0, help="let the hint lead, with little or no prompt")
    add("--control-start", type=fraction, metavar="F",
        help="fraction of the steps at which control begins (default: 0.0)")  # fmt: skip
    add("--control-end", type=fraction, metavar="F",
        help="fraction of the steps at which control ends (default: 1.0)")  # fmt: skip
    add_argument("--only-mid-control", "--no-only-mid-control", default=argparse.SUPPRESS, action=_OfControl, nargs=0,
        help="use the residual of the middle block alone (default: as the run was trained)")  # fmt: skip
    add("--hint-resample", choices=tuple(RESAMPLE),
        help="filter that resizes the hint; nearest is for label maps (default: as the run, or area)")  # fmt: skip
    add("--hint-ground", choices=("auto", "black", "white"),
        help="what a transparent hint is laid on (default: as the run, or where it can be seen)")  # fmt: skip
    add("--hint-scale", type=number(float, 0), metavar="N",
        help="value of the hint file that becomes white; 0: its format's largest (default: as the run)")  # fmt: skip


def parse_flags(argv: Sequence[str] | None, solvers: Sequence[str] | None = SOLVERS) -> dict[str, Any]:
    """The flags of a command line and their values, those of ControlNets in `groups`. `solvers`: see `parse`."""
    parser = build_parser(solvers)
    values = vars(parser.parse_args(argv))
    if values["prompt"] is None and not values["prompts"] and not any(group.get("hints") for group in values["groups"]):
        parser.error("the following arguments are required: --prompt (or --prompts, or a data set at --hints)")
    return values


def is_run(path: str) -> bool:
    """Whether `path` is the folder of a training run."""
    from weights.runs import is_run

    return is_run(path)


def parse(argv: Sequence[str] | None = None, solvers: Sequence[str] | None = SOLVERS) -> Request:
    """Flags -> what is asked for. Raises ConfigError for flags that do not go together.

    `solvers`: the names that --solver may have; None: any.
    """
    values = parse_flags(argv, solvers)
    controls = control_requests(values["model"], values.pop("groups"))
    for name in ("prompt", "negative_prompt"):
        if re.search("[\ud800-\udfff]", values[name] or ""):
            raise ConfigError(f"{flag_name(name)} is {values[name]!r}, should be UTF-8 text")
    if "denoise" in values and not values["init"]:
        raise ConfigError("--denoise says how much of the picture at --init is drawn anew; there is no --init")
    empty = {name: None for name in ("init", "prompts") if values[name] == ""}
    request = Request(controls=controls, **values | empty)
    if request.is_grid and request.is_list:
        raise ConfigError(
            "a grid (--seeds, --strengths) is of one hint and one prompt; leave --hints and --prompts out"
        )
    if request.is_grid and request.num is not None:
        raise ConfigError(f"--num {request.num}: a grid has one picture in each cell; --seeds 0-3 gives it four rows")
    if request.seeds and (request.first or request.seed):
        raise ConfigError("--seeds names the seed of each row; leave --seed and --first out")
    if request.prompt is not None and request.prompts is not None:
        raise ConfigError("--prompt is one prompt for all pictures and --prompts a file of them; give one of the two")
    return request


def control_requests(model: str, groups: Sequence[dict[str, Any]]) -> tuple[ControlRequest, ...]:
    """The ControlNets of a command line: the flags before the first --control, then those after each.

    Raises ConfigError, which names the --control, for one without a hint and for flags that exclude each other.
    """
    own, *others = groups
    if others and not is_run(model):  # the first --control takes the place of a ControlNet in the model
        if twice := [flag_name(k) for k in own if k in others[0] and own[k] != others[0][k]]:
            print(
                f"{twice[0]} before --control {others[0]['control']} does not count: that ControlNet takes the place "
                f"of one in {model}, which is no run, and has the flag too; a second --control adds a second ControlNet"
            )
        others[0] = own | others[0]
        own = {}
    controls = [*([own] if own else []), *others]
    for group in controls:
        name = f"--control {group['control']}" if "control" in group else "the ControlNet of --model"
        if "hint" not in group and "hints" not in group:
            flags = [flag_name(k) for k in group if k != "control"]
            what = f"{flags[0]} belongs to a hint, and " if flags else ""
            raise ConfigError(f"{what}{name} has no --hint; each --control is followed by its own")
        for one, many in (("hint", "hints"), ("strength", "strengths")):
            if one in group and many in group:
                raise ConfigError(f"{name} has --{one} and --{many}; give one of the two")
    if sum("strengths" in group for group in controls) > 1:
        raise ConfigError("--strengths are the columns of a grid, which one ControlNet can have, and not several")
    return tuple(ControlRequest(**group) for group in controls)


def command_line(request: Request) -> str:
    """The command that asks for `request`, for a shell; flags at their defaults are left out."""
    words = _flags(request)
    for control in request.controls:
        words += _flags(control)
    return shell_line(["python", "sampler.py", *words])


def _flags(request: Request | ControlRequest) -> list[str]:
    words = []
    for f in dataclasses.fields(request):
        value = getattr(request, f.name)
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if f.name == "controls" or value == default:
            continue
        if isinstance(value, bool):
            words.append(flag_name(f.name) if value else flag_name("no_" + f.name))
            continue
        between = "x" if f.name in ("original_size", "crop") else ","
        text = between.join(map(str, value)) if isinstance(value, tuple) else str(value)
        words += flag_words(flag_name(f.name), text)
    return words
