"""The command line that draws, from flags to files.

flags --parse--> Request --load--> model and ControlNets
                    +------plan--> pictures --draw--> PNG files, and a sheet of them
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import data
from clip_text import MAX_TOKENS
from drawing.draw import draw
from drawing.loading import Loaded, load
from drawing.metadata import KEY, parameters, read_parameters
from drawing.pictures import Picture, plan
from drawing.request import Request, parse
from drawing.sheets import Sheet
from sampler import SOLVERS
from training.console import exit_status
from weights.runs import is_run, load_run


def run_command(argv: Sequence[str] | None = None) -> str | int:
    """`main` for a shell. Returns what `sys.exit` takes (see `exit_status`)."""
    return exit_status(
        "sampler.py",
        lambda: main(argv),
        interrupted="stopped; the pictures that were finished are there",
        leaner="a smaller --resolution or --batch-size, or --precision bf16, takes less",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Draw what the command line asks for."""
    request = parse(argv, tuple(SOLVERS))
    loaded = load(request)
    pictures = plan(request, loaded.model.config)
    tell_long_prompts(request, loaded, pictures)
    tell_large_pictures(request, pictures)
    texts = {p.name: parameters(request, loaded, p) for p in pictures}
    sheet = Sheet(request, loaded, pictures)
    texts |= dict.fromkeys(sheet.names, texts[pictures[0].name])
    there = find_existing(request, texts) - set(sheet.names)
    Path(request.out).mkdir(parents=True, exist_ok=True)
    draw(request, loaded, pictures, texts, there, sheet.add)
    sheet.save({KEY: texts[pictures[0].name]})
    drawn, last = len(pictures) - len(there), f" to {sheet.names[-1]}.png" * (len(sheet.names) > 1)
    kept = f" ({len(there)} were there, with the same settings)" if there else ""
    print(f"{drawn} image{'s' * (drawn != 1)} and {sheet.names[0]}.png{last} in {request.out}{kept}")


def tell_long_prompts(request: Request, loaded: Loaded, pictures: Sequence[Picture]) -> None:
    """Print a line for a prompt of which the text encoder does not read the end."""
    limit, prompts = MAX_TOKENS - 2, {p.prompt: p for p in pictures}
    first = "--prompt" if request.prompt is not None else "the prompt"
    for name, texts in ((first, list(prompts)), ("--negative-prompt", [request.negative_prompt])):
        long = [(text, n) for text, n in zip(texts, loaded.model.tokenizer.count(texts), strict=True) if n > limit]
        if long:
            of = f" of {prompts[long[0][0]].name}" if name == "the prompt" else ""
            more = f" ({len(long)} prompts are too long)" if len(long) > 1 else ""
            print(f"{name}{of} has {long[0][1]} tokens; the text encoder reads {limit}, the rest is cut off{more}")


def tell_large_pictures(request: Request, pictures: Sequence[Picture]) -> None:
    """Print a line where pictures become much larger than the images of the run that is drawn with, and nobody chose
    that: their size is that of a hint, of the first picture or of the model."""
    trained = load_run(request.model).get("resolution") if is_run(request.model) else None
    if request.resolution or not trained:
        return
    area = math.prod(data.parse_resolution(trained))
    largest = max(pictures, key=lambda picture: math.prod(picture.size))
    if math.prod(largest.size) > 2 * area:
        size = "x".join(map(str, largest.size))
        of = "--init" if largest.init else "the hint" if largest.hints else "the model"
        print(f"drawn at {size}, the size of {of}, though trained at {trained}: --resolution {trained} takes less")


def find_existing(request: Request, texts: Mapping[str, str]) -> set[str]:
    """The names of pictures that need not be drawn, since they are there with their text of `texts` (name -> text).

    There are none without a list or grid, and with --overwrite. Prints a line if files of other settings are replaced.
    """
    paths = {name: Path(request.out) / f"{name}.png" for name in texts}
    same = {name for name, path in paths.items() if path.exists() and read_parameters(path) == texts[name]}
    others = [path.name for name, path in paths.items() if path.exists() and name not in same]
    if others:
        more = f" and {len(others) - 1} other{'s' * (len(others) > 2)}" if len(others) > 1 else ""
        print(f"{request.out}: {others[0]}{more} of other settings are replaced")
    resumable = (request.is_list or request.is_grid) and not request.overwrite
    return same if resumable else set()
