"""report.html: one page, no other file, no network. Works without JavaScript, in light and dark."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from iumad.engine.files import write_text
from iumad.engine.progress import clock
from iumad.report import charts
from iumad.report.load import RunView
from iumad.report.summary import column_titles, summary_rows
from iumad.report.tables import DERIVED, METRICS, Row, means, percent, rows


def write_report(runs: Sequence[RunView], path: Path) -> None:
    """Write the page of one run or of a group of runs to ``path``, atomically."""
    write_text(path, page(runs))


def page(runs: Sequence[RunView]) -> str:
    """The whole HTML document. The first main run is shown in full, the others as summary and matrices."""
    run = next((run for run in runs if run.role == "main"), runs[0])
    title = f"IUMAD: {run.settings['name']}, protocol {run.settings['protocol']}"
    parts = [
        _head(run, is_group=len(runs) > 1),
        _numbers(run),
        _summary(runs) if len(runs) > 1 else "",
        _matrices(run),
        _forgetting(run),
        _others([other for other in runs if other is not run]),
        _training(run),
        _scores(run),
        _cases(run),
        _environment(run),
    ]
    assets = files("iumad.report")
    style, script = ((assets / name).read_text() for name in ("style.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _section(title: str, note: str, body: str) -> str:
    return f'<section><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{body}</section>'


def _table(head: str, body: str) -> str:
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _head(run: RunView, *, is_group: bool) -> str:
    settings = run.settings
    steps = " → ".join(", ".join(names) for names in settings["steps"])
    state = "" if run.is_complete else ' <span class="badge miss">not finished</span>'
    modality = {"both": "RGB + depth", "rgb": "RGB", "depth": "depth"}[run.modality]
    facts = [f"protocol {settings['protocol']}", modality, f"update rule {settings['update_rule']}"]
    config = settings["config"]
    facts += [f"backbone {config['backbone']['name']}", f"seed {config['train']['seed']}"]
    if is_group:
        facts.append(f"shown in full: {run.label}")
    return (
        f"<header><h1>Incremental anomaly detection on {escape(settings['name'])}{state}</h1>"
        f'<div class="soft">{escape(" · ".join(facts))}</div>'
        f'<div class="soft">{escape(steps)}</div></header>'
    )


def _numbers(run: RunView) -> str:
    matrix = run.matrix
    shown = ("i_auroc", "aupro_30")
    cards = [(percent(matrix.final_mean(name)), f"{METRICS[name]}, mean of all classes") for name in shown]
    if len(matrix.steps) > 1:
        for name in shown:
            cards.append((percent(matrix.forgetting_measure(name)), f"forgetting, {METRICS[name]}"))
    seconds = sum(step["train_seconds"] for step in run.results["steps"])
    cards.append((clock(seconds), "training time"))
    body = (f'<div class="number"><b>{value}</b><span>{escape(text)}</span></div>' for value, text in cards)
    return f'<div class="numbers">{"".join(body)}</div>'


def _summary(runs: Sequence[RunView]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in ("run", *column_titles()))
    body = "".join(
        f"<tr{' class=mean' if cells[0].startswith('mean') else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for cells in summary_rows(runs)
    )
    table = _table(head, body)
    return _section("All runs", "Per cent after the last step; FM in points, lower is better.", table)


def _matrices(run: RunView) -> str:
    note = (
        "Each row is a class, each column the state of the model after a step, in per cent. "
        "Dots: the class has not been learned yet. Drop: best earlier value minus the last."
    )
    return _section("Classes and steps", note, _tabbed(run))


def _others(runs: Sequence[RunView]) -> str:
    if not runs:
        return ""
    blocks = (f"<details><summary>{escape(run.label)}</summary>{_tabbed(run)}</details>" for run in runs)
    return _section("Classes and steps of the other runs", "As above.", "".join(blocks))


def _tabbed(run: RunView) -> str:
    matrix = run.matrix
    names = [name for name in METRICS if name in matrix.metrics]
    panels = (f'<div data-tab="{name}" class="scroll">{_matrix(run, name)}</div>' for name in names)
    return f"<div data-tabs>{_tabs(names)}{''.join(panels)}</div>"


def _tabs(names: Iterable[str]) -> str:
    buttons = (f'<button type="button" value="{name}">{escape(METRICS[name])}</button>' for name in names)
    return f'<div class="tabs">{"".join(buttons)}</div>'


def _matrix(run: RunView, metric: str) -> str:
    matrix = run.matrix
    steps = "".join(f"<th>step {t + 1}</th>" for t in range(len(matrix.steps)))
    head = f"<tr><th>{escape(METRICS[metric])}</th>{steps}<th>best</th><th>final</th><th>drop</th></tr>"
    body, previous = [], 0
    for row in rows(matrix, metric):
        body.append(_matrix_row(row, "group" if row.step != previous else ""))
        previous = row.step
    body.append(_matrix_row(means(matrix, metric), "mean"))
    return f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"


def _matrix_row(row: Row, kind: str) -> str:
    cells = []
    for step, value in enumerate(row.values):
        if value is None:
            cells.append('<td class="later">·</td>' if step < row.step else '<td class="later">-</td>')
        else:  # colour from 50 % (chance for an AUROC) to 100 %
            cells.append(f'<td class="value" style="--v:{max(0.0, 2 * value - 1):.3f}">{percent(value)}</td>')
    drop = row.drop if row.name != "mean" else None
    worse = " worse" if drop is not None and drop > 0.05 else ""
    ends = f'<td class="first">{percent(row.best)}</td><td>{percent(row.final)}</td>'
    ends += f'<td class="{worse}">{percent(drop)}</td>'
    return f'<tr class="{kind}"><td>{escape(row.name)}</td>{"".join(cells)}{ends}</tr>'


def _forgetting(run: RunView) -> str:
    matrix = run.matrix
    if len(matrix.steps) < 2:
        return ""
    names = [name for name in METRICS if name in matrix.metrics]
    head = "".join(f"<th>{escape(METRICS[name])}</th>" for name in names)
    summaries = {name: matrix.summary(name) for name in names}
    body = "".join(
        f"<tr><td>{escape(title)}</td>"
        + "".join(f"<td>{percent(summaries[name][key])}</td>" for name in names)
        + "</tr>"
        for key, title in DERIVED.items()
    )
    table = _table(f"<th></th>{head}", body)
    kept = run.results["steps"][-1]["kept_bytes"]
    note = (
        "All derived from the matrices above, in per cent. FM is the paper's forgetting measure; papers "
        "differ in which of these they print. Kept from earlier steps besides the weights: "
        f"{kept / 1e6:.2f} MB, no image among it."
    )
    return _section("Forgetting", note, table)


def _training(run: RunView) -> str:
    lines = [line for line in run.log if line["event"] == "train"]
    if not lines:
        return ""
    offsets, start = {}, 0.0
    for step in run.results["steps"]:
        offsets[step["step"]] = start
        start += step["epochs"]
    names = ["total", *sorted({name for line in lines for name in line["terms"]})]
    series: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for line in lines:
        if line["step"] in offsets:
            x = offsets[line["step"]] + line["epoch"]
            for name, value in {"total": line["loss"], **line["terms"]}.items():
                series[name].append((x, value))
    marks = {offset: f"step {step + 1}" for step, offset in offsets.items()}
    body = charts.legend(names) + charts.curves(series, marks, "epochs")
    facts = " ".join(_training_facts(step) for step in run.results["steps"])
    return _section("Training", f"Loss terms, unweighted, logarithmic. {facts}", body)


def _training_facts(step: dict[str, Any]) -> str:
    """Time of an epoch with the feature cache; where the backbone ran, also what it would be without."""
    epoch = step["train_seconds"] / step["epochs"]
    text = f"Step {step['step'] + 1}: {step['train_images']} images, {step['iterations']} iterations in "
    text += f"{clock(step['train_seconds'])}, {epoch:.2f} s an epoch"
    if step["features_computed"]:
        backbone = step["feature_seconds"] / step["features_computed"] * step["train_images"]
        text += f"; running the backbone in every epoch would add {backbone:.2f} s to each"
    return text + "."


def _scores(run: RunView) -> str:
    last = run.results["steps"][-1]
    blocks = []
    for name, scores in last["scores"].items():
        threshold = run.results["thresholds"].get(name)
        value = threshold["value"] if threshold else None
        chart = charts.histogram(scores["good"], scores["defect"], value)
        rates = f'<div class="soft">{escape(_rates(scores, threshold))}</div>'
        blocks.append(f"<div><h3>{escape(name)}</h3>{chart}{rates}</div>")
    legend = (
        '<div class="legend"><span class="key"><i class="good"></i>normal</span>'
        '<span class="key"><i class="defect"></i>defective</span><span>dashed: threshold</span></div>'
    )
    note = (
        "Image scores of the test set after the last step. A threshold comes from normal images that were "
        "never trained on, in the step that learned the class; the test set has no part in it."
    )
    return _section("Scores and thresholds", note, f'{legend}<div class="charts">{"".join(blocks)}</div>')


def _rates(scores: dict[str, list[float]], threshold: dict[str, Any] | None) -> str:
    if threshold is None:
        return "no threshold: no normal image was held out"
    above = {kind: sum(score > threshold["value"] for score in values) for kind, values in scores.items()}
    source = f"threshold {threshold['value']:.4g} from {threshold['images']} images"
    false, found = (f"{above[kind]} of {len(scores[kind])}" for kind in ("good", "defect"))
    return f"{source}; above it: {false} normal, {found} defective"


def _cases(run: RunView) -> str:
    cases = run.results.get("cases", [])
    if not cases:
        return ""
    blocks = []
    for case in cases:
        data = base64.b64encode((run.directory.root / case["file"]).read_bytes()).decode()
        name = escape(f"{case['class']} / {case['kind']}")
        badge = (
            '<span class="badge hit">best</span>' if case["good"] else '<span class="badge miss">worst</span>'
        )
        picture = f'<img alt="{name}" src="data:image/png;base64,{data}">'
        caption = f"{badge}<b>{name}</b> {escape(case['why'])}"
        blocks.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
    note = (
        f"{run.results['case_columns']}, after the last step. The outline on the map is the ground truth; "
        "one colour scale per class."
    )
    return _section("Best and worst cases", note, f'<div class="cases">{"".join(blocks)}</div>')


def _environment(run: RunView) -> str:
    facts = run.results["environment"]
    body = "".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in facts.items())
    config = escape(json.dumps(run.settings["config"], indent=1))
    command = escape(" ".join(run.settings.get("command", [])))
    return _section(
        "Environment and configuration",
        "What the run was made with.",
        f'<div class="scroll"><table class="facts"><tbody>{body}</tbody></table></div>'
        f"<details><summary>Configuration</summary><pre>{config}</pre></details>"
        + (f"<details><summary>Command</summary><pre>{command}</pre></details>" if command else ""),
    )
