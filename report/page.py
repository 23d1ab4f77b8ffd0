"""The page of a run, `RUN/report.html`, and the page that compares several runs.

One HTML file with everything inside: curves as SVG, pictures as data URIs, a script of a few lines for hovering and for
the slider. It opens offline and can be sent.

    config.json, metrics.jsonl, history.jsonl --record.py--> RunRecord --charts.py--> curves --+
    image_log/ --pictures.py--> small pictures, animation -------------------------------------+--> page.html, filled
"""

import html
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report.charts import Chart, Curve, running_mean, thin
from report.markup import content_policy, fill, script_json
from report.pictures import ImageLog, save_animation
from report.record import RunRecord, read_record
from report.sections import facts, overview, pictures
from training.images import save_whole
from training.records import Metrics

TEMPLATE = Path(__file__).with_name("page.html")
LOSS, AVERAGE, VALIDATION, OTHERS, GAIN, GRADIENT, RATE, SPEED, MEMORY, MORE = 7, 0, 0, 7, 1, 2, 3, 4, 5, 6  # colours


class RunPage:
    """The page of a run that trains. `metrics`: its measurements, which are in memory."""

    def __init__(self, run: str | Path, metrics: Metrics):
        self.run, self.metrics, self.log = Path(run), metrics, ImageLog(run)

    def write(self, last: bool = False) -> None:
        """Write `report.html` of the run's folder; with `last` the animation `progress.gif`, too. Raises OSError, and
        nothing else: whatever is wrong with a page must not end a training."""
        try:
            log = self.log.read()
            write_page([read_record(self.run, self.metrics.lines)], self.run / "report.html", [log])
            if last:
                save_animation(log, self.run / "progress.gif")
        except OSError:
            raise
        except Exception as e:  # a training of days weighs more than a mistake in here
            raise OSError(f"{type(e).__name__}: {' '.join(str(e).split())[:200]}") from e


def write_report(runs: Sequence[str], out: str = "") -> Path:
    """`train.py --report`: write the page of one run (and its animation), or the page that compares several. Returns
    its path: `out`, or RUN/report.html, or compare.html."""
    records, logs = [read_record(run) for run in runs], [ImageLog(run).read() for run in runs]
    path = Path(out) if out else records[0].path / "report.html" if len(records) == 1 else Path("compare.html")
    write_page(records, path, logs)
    if len(records) == 1:
        save_animation(logs[0], path.with_name("progress.gif"))
    return path


def write_page(records: Sequence[RunRecord], path: Path, logs: Sequence[dict[str, Any]]) -> None:
    """Write the page of `records` as the file `path`, whole or not at all. `logs`: of `ImageLog.read`."""
    text = page(records, logs)
    save_whole(path, lambda partial: partial.write_text(text, encoding="utf-8", errors="replace"))


def page(records: Sequence[RunRecord], logs: Sequence[dict[str, Any]]) -> str:
    """The page of one run, or of several that are compared, as HTML. `logs`: of `ImageLog.read`."""
    several, end, names = len(records) > 1, max(record.end for record in records), short_names(records)
    charts = compared_charts(records, names) if several else run_charts(records[0])
    charts = [chart for chart in charts if chart.curves]
    runs = list(zip(records, names, logs, strict=True))
    shown = [
        {
            "steps": log["steps"],
            "grids": log.get("grids", []),
            "rows": [row["predictions"] for row in log.get("rows", ())],
        }
        for log in logs
    ]
    parts = {
        "title": html.escape(" and ".join(names) if len(names) < 4 else f"{len(names)} runs"),
        "kind": "Comparison" if several else "Run",
        "overview": overview(records, names),
        "charts": "".join(chart.html(i, end) for i, chart in enumerate(charts)) or "<p>Nothing was measured yet.</p>",
        "pictures": "".join(
            pictures(f"Pictures of {name}" if several else "Pictures", log, i) for i, (_, name, log) in enumerate(runs)
        ),
        "facts": "".join(facts(record, name if several else "", log) for record, name, log in runs),
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "data": script_json({"end": end, "charts": [chart.points() for chart in charts], "logs": shown}),
        "policy": "",
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return fill(template, parts | {"policy": html.escape(content_policy(template))})


def short_names(records: Sequence[RunRecord]) -> list[str]:
    """The names of the runs' folders, or their paths where two have the same name."""
    names = [record.name for record in records]
    return names if len(set(names)) == len(names) else [str(record.path) for record in records]


# ------------------------------------------------------------------------------------------------------------ charts
def run_charts(record: RunRecord) -> list[Chart]:
    """The charts of one run. Those without any value have no curves."""
    curve = lambda label, color, name, **style: Curve(label, color, thin(*record.series(name)), **style)
    steps, losses = record.series("loss")
    lost = sum(1 for loss in losses if loss - loss != 0)  # NaN or infinite
    jump = record.converged()
    marks = [] if jump is None else [(jump, f"sudden convergence, step {jump:,}", GAIN)]
    average = Curve("running mean", AVERAGE, thin(steps, running_mean(losses)))
    charts = [
        Chart("Loss", [curve("each step", LOSS, "loss", spread=True), average], False, note=_skipped(lost)),
        Chart(
            "Control gain", [curve("gain", GAIN, "control_gain")], marks=marks,
            note="1 - loss(right hints) / loss(hints of other samples)",
        ),
        Chart(
            "Validation loss",
            [
                curve("right hints", VALIDATION, "val_loss"),
                curve("hints of other samples", OTHERS, "val_loss_other_hints", dashed=True),
            ],
            False,
        ),
        Chart("Gradient norm", [curve("norm", GRADIENT, "grad_norm")]),
        Chart("Learning rate", [curve("rate", RATE, "learning_rate")]),
        Chart("Images a second", [curve("speed", SPEED, "images_per_second")]),
        Chart("Memory", [curve("peak, GiB", MEMORY, "memory_gib")]),
    ]  # fmt: skip
    return charts + [Chart(name[:60], [curve("value", MORE, name)], False) for name in record.further_names()]


def compared_charts(records: Sequence[RunRecord], names: Sequence[str]) -> list[Chart]:
    """The same charts with one curve a run."""
    series = lambda name: [
        Curve(label, i, thin(*record.series(name)))
        for i, (record, label) in enumerate(zip(records, names, strict=True))
    ]
    means = []
    for i, (record, label) in enumerate(zip(records, names, strict=True)):
        steps, losses = record.series("loss")
        means.append(Curve(label, i, thin(steps, running_mean(losses))))
    jumps = [(i, record.converged()) for i, record in enumerate(records)]
    marks = [(jump, f"{jump:,}", i) for i, jump in jumps if jump is not None]
    further = dict.fromkeys(name for record in records for name in record.further_names())
    return [
        Chart("Loss", means, False, note="running mean"),
        Chart("Control gain", series("control_gain"), marks=marks, note="with the step of the sudden convergence"),
        Chart("Validation loss", series("val_loss"), False, note="right hints"),
        Chart("Gradient norm", series("grad_norm")),
        Chart("Learning rate", series("learning_rate")),
        Chart("Images a second", series("images_per_second")),
        Chart("Memory", series("memory_gib"), note="peak, GiB"),
        *(Chart(name[:60], series(name), False) for name in list(further)[:12]),
    ]


def _skipped(count: int) -> str:
    return f"{count:,} values are not finite and left out" if count else ""
