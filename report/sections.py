"""The parts of a run's page that are no curves: figures, pictures, settings, data, machine, commands; as HTML."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from report.charts import COLORS
from report.record import RunRecord


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A table whose rows are texts; the first of each row is its heading."""
    top = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    body = [
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    ]
    if not body:
        return "<p>Nothing is noted.</p>"
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def overview(records: Sequence[RunRecord], names: Sequence[str]) -> str:
    """The figures of one run as tiles; of several runs as a table with the settings in which they differ."""
    figures = [record.figures() for record in records]
    if len(records) == 1:
        tiles = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in figures[0].items())
        return f'<dl class="tiles">{"".join(tiles)}</dl>'
    columns, settings = list(dict.fromkeys(name for row in figures for name in row)), differing_settings(records)
    rows = []
    for record, name, row in zip(records, names, figures, strict=True):
        values = [str(record.settings.get(setting, "")) for setting in settings.values()]
        rows.append([name, *(row.get(column, "") for column in columns), *values])
    keys = "".join(f'<span class="key c{i % COLORS}">{escape(name)}</span>' for i, name in enumerate(names))
    return f'<section><p class="keys">{keys}</p>{table(rows, ["run", *columns, *settings])}</section>'


def differing_settings(records: Sequence[RunRecord]) -> dict[str, str]:
    """Flag -> name of the settings that the runs do not share, beside the folder of the run."""
    flags = {flag: flag[2:].replace("-", "_") for record in records for flag, *_ in record.changed_settings()}
    values = lambda name: {repr(record.settings.get(name)) for record in records}
    return {flag: name for flag, name in flags.items() if name != "out" and len(values(name)) > 1}


def pictures(heading: str, log: dict[str, Any], number: int) -> str:
    """The image log of a run with a slider over its steps. The page's script fills in the predictions."""
    if not log["steps"]:
        return ""
    steps = log["steps"]
    last = len(steps) - 1
    slider = (
        '<div class="slide"><button type="button" aria-label="play the steps">&#9654;</button>'
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="step of the pictures">'
        f"<output>step {steps[-1]:,}</output></div>"
    )
    if "grids" in log:
        body = '<img class="whole" alt="the image log at the chosen step">'
    else:
        body = f'<div class="rows">{"".join(_row(row, i) for i, row in enumerate(log["rows"]))}</div>'
    return f'<section class="log" data-log="{number}"><h2>{escape(heading)}</h2>{slider}{body}</section>'


def _row(row: dict[str, Any], number: int) -> str:
    prompt = escape(row["caption"])
    image = lambda label, source: (
        f'<figure><img alt="{label}: {prompt}" src="{escape(source)}"><figcaption>{label}</figcaption></figure>'
    )
    prediction = (
        f'<figure><img data-row="{number}" alt="prediction: {prompt}"><figcaption>prediction</figcaption></figure>'
    )
    truth = image("ground truth", row["truth"]) if row["truth"] else ""
    return f'<div class="row">{image("control", row["control"])}{prediction}{truth}<p>{prompt}</p></div>'


def facts(record: RunRecord, heading: str, log: dict[str, Any]) -> str:
    """What to do next with a run, its settings, its data and its machine, under a heading."""
    prompt = next((row["caption"] for row in log.get("rows", ())), "")
    commands = "".join(
        f'<h3>{escape(purpose)}</h3><div class="command"><code>{escape(line)}</code>'
        '<button type="button">Copy</button></div>'
        for purpose, line in record.commands(prompt).items()
    )
    starts = [(entry["start"], f"step {entry['step']:,}") for entry in record.starts()]
    parts = {
        "What to do next": commands,
        "Settings that differ from the defaults": table(record.changed_settings(), ("setting", "value", "default")),
        "Data set": table(record.data_facts().items()),
        "Machine": table([*record.machine_facts().items(), *(("started " + when, step) for when, step in starts)]),
    }
    sections = "".join(f"<section><h2>{title}</h2>{body}</section>" for title, body in parts.items())
    return (f"<h2>{escape(heading)}</h2>" if heading else "") + f'<div class="facts">{sections}</div>'
