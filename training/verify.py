"""Every file of a data set is decoded once before training, so that no bad file ends a run days later.

`find_bad_rows` decodes hints and targets in several processes and finds everything that reading them in the loop could
find. What it found is remembered under the cache folder by the content of the files, and which content a file has by
the file's size, times and place on the disk: a second start opens no file, and a changed file is looked at again.
On the way the pass learns what one should know of a data set (`remarks`): transparency, ranges of numbers, aspect
ratios, long prompts.

    data/.cache/verified.jsonl      a line for each entry: checksum, key, value
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from tqdm import tqdm

from clip_text import MAX_TOKENS, Tokenizer
from training.buckets import describe_buckets
from training.files import DataError, File, Member, one_line, read_bytes
from training.images import Reading, Size, decode, fraction_cut, same_aspect, visible_ground
from training.loading import load, start_method
from training.locks import locked
from training.memory import FRESH, Memory, hexdigest
from training.memory import identity as path_identity
from training.rows import Row, check_aspects

MANY = 128  # files; fewer are decoded sooner than processes have started
VERSION = f"2 {PIL.__version__}"  # of what decoding finds


class FileFacts(NamedTuple):
    """What is known of a file: a digest of its content, what is wrong with it (or ""), its size, the largest of its
    numbers and the one that counts as full, how bright what is not transparent is (-1: all is opaque), a digest of its
    pixels, whether they are all of one colour, and what it is beyond RGB of 8 bits (keys of images.KINDS, by commas).
    """

    content: str
    problem: str = ""
    width: int = 0
    height: int = 0
    largest: float = 0.0
    full: float = 255.0
    brightness: float = -1.0
    pixels: str = ""
    one_colour: bool = False
    kinds: str = ""


def identity(file: File) -> str:
    """A digest of what changes when a file changes: place, size, times. "" for a file that is not there, or so new that
    a change could leave no trace. That of a member of an archive changes with the archive."""
    if not isinstance(file, Member):
        return path_identity(file, FRESH)
    archive = path_identity(file.archive.path, FRESH)
    return archive and hexdigest(archive, file.inner, file.offset, file.size)


def fact_name(content: str, file: File, reading: Reading) -> str:
    """The name under which facts are remembered: the content and all else that they depend on."""
    kind = file.suffix.lower() == ".npy"
    how = (VERSION, kind, reading.channels, reading.scale, reading.class_numbers, reading.max_pixels)
    return f"facts {content} {hexdigest(*how, size=4)}"


# ------------------------------------------------------------------------------------------------------------- the pass
class _Jobs:
    """Item k examines the k-th (path, reading): a tuple (identity, facts).

    The facts are those of `examine`, or the content's `fact_name` if that is among the `known`.
    """

    def __init__(self, jobs: list[tuple[File, Reading]], known: set[str]):
        self.jobs, self.known = jobs, known

    def __getitem__(self, k: int) -> tuple[str, FileFacts | str]:
        path, reading = self.jobs[k]
        before = identity(path)
        try:
            content = read_bytes(path, reading.max_pixels)
        except DataError as e:
            return "", FileFacts("", _without(path, e))
        digest = hexdigest(content)
        name = fact_name(digest, path, reading)
        unchanged = before if before == identity(path) else ""
        return unchanged, name if name in self.known else examine(path, reading, content, digest)


def examine(path: File, reading: Reading, content: bytes, digest: str) -> FileFacts:
    """Decode the `content` of a file as training would."""
    try:
        decoded = decode(path, reading, content)
    except DataError as e:
        passing = isinstance(e.__cause__, MemoryError)  # nothing to remember of the file
        return FileFacts("" if passing else digest, _without(path, e))
    array = np.ascontiguousarray(decoded.array)
    height, width = array.shape[:2]
    one_colour = bool((array[0] == array[0, 0]).all() and (array == array[0]).all())
    return FileFacts(
        digest, "", width, height, decoded.largest, decoded.full, decoded.brightness,
        hexdigest(array.shape, array.reshape(-1).data), one_colour, ",".join(decoded.kinds),
    )  # fmt: skip


def _without(path: File, error: DataError) -> str:
    """The message without the path: another file of this content has the problem too."""
    return str(error).removeprefix(f"{one_line(path)}: ")


def processes(guarded: bool = False) -> int:
    """How many processes decode: the CPUs that this process may use, at most 8. Only forked ones, which need nothing of
    the script that trains, unless the main script is `guarded` by `if __name__ == "__main__"`."""
    if start_method() != "fork" and not guarded:
        return 0
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def find_bad_rows(dataset: Any, cache_dir: str | Path | None = None, workers: int | None = None) -> dict[int, str]:
    """Decode all files of a `data.FolderDataset`. Returns the number and the problem, one line, of every bad row.

    Leaves what was found in `dataset.facts`: for each row None or (facts of the hint, facts of the target).
    `cache_dir`: where it is remembered (None: nowhere). `workers`: processes that decode (None: `processes`).
    """
    with _alone(cache_dir):
        return _find_bad_rows(dataset, cache_dir, processes() if workers is None else workers)


def _find_bad_rows(dataset: Any, cache_dir: str | Path | None, workers: int) -> dict[int, str]:
    memory = Memory(Path(cache_dir) / "verified.jsonl" if cache_dir else None)
    hint, target = dataset.readings()
    found: dict[tuple[File, Reading], FileFacts] = {}
    jobs = list({(path, how): None for row in dataset.rows if row.readable
                 for path, how in ((row.hint, hint), (row.target, target))})  # fmt: skip
    unknown = []
    for path, how in jobs:
        content = memory.get(f"file {identity(path)}")
        facts = memory.get(fact_name(content, path, how)) if content else None
        if facts:
            found[path, how] = FileFacts(*facts)
        else:
            unknown.append((path, how))
    found |= _examine_all(unknown, memory, workers, str(dataset.root))
    dataset.facts = [
        (found[row.hint, hint], found[row.target, target]) if row.readable else None for row in dataset.rows
    ]
    problems = (row_problem(row, facts) for row, facts in zip(dataset.rows, dataset.facts, strict=True))
    return {i: problem for i, problem in enumerate(problems) if problem}


@contextlib.contextmanager
def _alone(cache_dir: str | Path | None) -> Iterator[None]:
    """Let one process after the other verify: of several ranks the first decodes, and the others find its memory."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a folder that cannot be written is no reason to stop
            if cache_dir:
                Path(cache_dir).mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(Path(cache_dir) / "verified.lock"))
        yield


def _examine_all(
    jobs: list[tuple[File, Reading]], memory: Memory, workers: int, root: str
) -> Iterator[tuple[tuple[File, Reading], FileFacts]]:
    """Examine files, in processes if they are more than a few. Yields each job with its facts."""
    known = {key for key in memory.entries if key.startswith("facts ")}
    chunks = [range(i, min(i + 16, len(jobs))) for i in range(0, len(jobs), 16)]
    workers = workers if len(jobs) >= MANY else 0
    bar = tqdm(total=len(jobs), desc=f"checking {root}", unit="file", disable=None if jobs else True)
    try:
        results = load(_Jobs(jobs, known), chunks, workers, collate=list)
        for chunk, answers in zip(chunks, results, strict=True):
            for k, (file, facts) in zip(chunk, answers, strict=True):
                path, how = jobs[k]
                facts = FileFacts(*memory.get(facts)) if isinstance(facts, str) else facts
                if facts.content:
                    memory.add(fact_name(facts.content, path, how), list(facts))
                if facts.content and file:
                    memory.add(f"file {file}", facts.content)
                yield (path, how), facts
            bar.update(len(chunk))
    finally:
        memory.flush()
        bar.close()


def row_problem(row: Row, facts: tuple[FileFacts, FileFacts] | None) -> str:
    """What is wrong with a row, in one line that names its place; "" if nothing is."""
    try:
        if not row.readable:
            raise DataError(row.problem)
        for path, fact in zip((row.hint, row.target), facts, strict=True):
            if fact.problem:
                raise DataError(f"{one_line(path)}: {fact.problem}")
        check_aspects(row, *((fact.width, fact.height) for fact in facts))
    except DataError as e:
        return f"{row.where}: {e}"
    return ""


def verified(dataset: Any, cache_dir: str | Path, skip_bad_rows: bool) -> Any:
    """`dataset` (a `data.FolderDataset`) with every file of its rows known to be readable.

    Bad rows are printed. Then DataError, or with `skip_bad_rows` the data set without them. If hints are transparent
    and their ground is to be chosen, it is chosen here, for all hints alike.
    """
    bad = find_bad_rows(dataset, cache_dir)
    for problem in list(bad.values())[:20]:
        print(problem)
    if len(bad) > 20:
        print(f"... and {len(bad) - 20} more bad rows: {dataset.check_command}")
    if bad and not skip_bad_rows:
        more = f" (and {len(bad) - 1} more bad rows)" if len(bad) > 1 else ""
        raise DataError(f"{next(iter(bad.values()))}{more}; --skip-bad-rows trains without")
    if bad:
        print(f"--skip-bad-rows: {len(bad)} of {len(dataset)} rows are left out")
        dataset = dataset.without(bad)
        if not len(dataset):
            raise DataError(f"{dataset.root}: all {len(bad)} rows are bad, the first: {next(iter(bad.values()))}")
    transparent = [hint.brightness for hint, _ in dataset.facts if hint.brightness >= 0]
    if transparent and dataset.hint_ground == "auto":
        dataset.hint_ground = visible_ground(sum(transparent) / len(transparent))
    dataset.compared.update(row.target for row in dataset.rows)
    return dataset


# ------------------------------------------------------------------------------------------------ what one should know
def good_rows(dataset: Any) -> list[tuple[Row, FileFacts, FileFacts]]:
    """The rows that nothing is wrong with after `find_bad_rows`, with the facts of hint and target."""
    rows = zip(dataset.rows, dataset.facts, strict=True)
    return [(row, *facts) for row, facts in rows if not row_problem(row, facts)]


def remarks(dataset: Any, size: Size, buckets: Sequence[Size] = ()) -> list[str]:
    """Lines about a data set after `find_bad_rows`, for images of `size`, or of the sizes `buckets` if there are any:
    nothing is wrong, but may not be meant."""
    if not dataset.facts:  # a folder that was not verified
        return []
    rows = good_rows(dataset)
    lines = []
    hints = [(row, hint) for row, hint, _ in rows]
    transparent = [hint.brightness for _, hint in hints if hint.brightness >= 0]
    if transparent:
        chosen = dataset.hint_ground
        chosen = visible_ground(sum(transparent) / len(transparent)) if chosen == "auto" else chosen
        lines.append(
            f"{len(transparent)} of {len(rows)} hints are transparent in places: laid on {chosen} (--hint-ground "
            "black or white sets it; --hint-channels 4 trains with the transparency)"
        )
    if count := sum(target.brightness >= 0 for *_, target in rows):
        lines.append(f"{count} of {len(rows)} targets are transparent in places: laid on white")
    if not dataset.hint_scale:
        lines += _about_ranges(hints)
    if buckets and rows:
        natives = [(target.width, target.height) for *_, target in rows]
        lines += describe_buckets(natives, buckets, [row.where for row, *_ in rows])
    else:
        lines += _about_aspects(rows, size)
    return lines + _about_prompts([row for row, *_ in rows])


def _about_ranges(hints: list[tuple[Row, FileFacts]]) -> list[str]:
    """Hints whose numbers use less than half of their format's range. Among files of 8 bits dark ones are normal, so
    they count only where all are."""
    low = [(row, hint) for row, hint in hints if 0 < hint.largest < hint.full / 2]
    if all(hint.full == 255 for _, hint in low) and len(low) < len(hints):
        return []
    if not low:
        return []
    row, most = max(low, key=lambda one: one[1].largest / one[1].full)
    where = f"in {one_line(row.hint)}: {most.largest:g} of {most.full:g}"
    return [
        f"{len(low)} of {len(hints)} hints use less than half of the range of their numbers (at most, {where}); for "
        f"depth in mm or class numbers, --hint-scale {most.largest:g} makes this value white"
    ]


def _about_aspects(rows: list[tuple[Row, FileFacts, FileFacts]], size: Size) -> list[str]:
    """Rows that lose a part of their images because they have another shape than `size`."""
    cut = [
        (fraction_cut((target.width, target.height), size), row)
        for row, _, target in rows
        if not same_aspect((target.width, target.height), size)
    ]
    if not cut:
        return []
    most, row = max(cut, key=lambda one: one[0])
    return [
        f"{len(cut)} of {len(rows)} rows have another aspect ratio than {size[0]}x{size[1]}: {most:.0%} of the image "
        f"is cut off at most ({row.where}), {sum(part for part, _ in cut) / len(cut):.0%} on average; --buckets cuts "
        "less, --resolution chooses the size"
    ]


def resized_hints(dataset: Any) -> list[str]:
    """A line about hints that are larger or smaller than their targets, after `find_bad_rows`."""
    rows = [
        (row, *facts) for row, facts in zip(dataset.rows, dataset.facts, strict=False) if not row_problem(row, facts)
    ]
    other = [(row, a, b) for row, a, b in rows if (a.width, a.height) != (b.width, b.height)]
    if not other:
        return []
    row, hint, target = other[0]
    return [
        f"{len(other)} of {len(rows)} hints have another size than their target and are resized to it; the first: "
        f"{row.where}, {hint.width}x{hint.height} for {target.width}x{target.height}"
    ]


def _about_prompts(rows: list[Row]) -> list[str]:
    """Prompts of more tokens than the text encoder reads, and the words that the first few lose."""
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    counts = dict(zip(prompts, Tokenizer().count(prompts), strict=True))
    long = [row for row in rows if counts[row.prompt] > MAX_TOKENS - 2]
    if not long:
        return []
    first = []
    for row in long[:3]:
        start, lost = one_line(row.prompt)[:60], one_line(lost_words(row.prompt))
        first.append(f"{row.where}, {counts[row.prompt]} tokens: {start}... loses {lost}")
    return [
        f"{len(long)} of {len(rows)} prompts have more than {MAX_TOKENS - 2} tokens, and the rest is cut off; the "
        f"first: {'; '.join(first)}"
    ]


def lost_words(prompt: str, most: int = 8) -> str:
    """What of a prompt the text encoder does not read, in quotes: at most so many words, and 80 characters. The first
    may be the end of a word."""
    lost = Tokenizer().bpe.encode(prompt, add_special_tokens=False).offsets[MAX_TOKENS - 2 :]
    words = prompt[lost[0][0] :].split() if lost else []
    text = " ".join(words[:most])
    return f'"{text[:80]}{" ..." if len(words) > most or len(text) > 80 else ""}"'
