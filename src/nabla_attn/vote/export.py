"""The results of a study as a table, a CSV file, an HTML page, a chart and a record."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from rich.console import Console
from rich.table import Table

from nabla_attn.files import whole_file, write_text
from nabla_attn.record import RunRecord, collect_versions
from nabla_attn.vote.analysis import PREFERENCES, Exclusion, count_votes, read_judgements
from nabla_attn.vote.study import QUESTIONS, Study, database_path
from nabla_attn.vote.tables import read_votes

COLOURS = {
    "baseline": "#b45309",
    "method": "#0f766e",
    "both_good": "#cbd5e1",
    "both_bad": "#64748b",
}
CSV_COLUMNS = (
    *("rater", "position", "pair", "prompt", "method", "kind", "first_video"),
    *QUESTIONS,
    *("seconds", "created"),
)
INK, MUTED = "#1b1f24", "#667080"
TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent / "page"), autoescape=True)


def export_results(folder: Path, output: Path | None, rule: Exclusion) -> list[Any]:
    """Count the votes of the study in a folder, and write the files of an output folder.

    Args:
        folder: The folder of the study; nothing is written in it.
        output: The folder for `results.json`, `votes.csv` and `chart.png`, or None for none.
        rule: The rule for raters who do not count.

    Returns:
        What to print: texts and tables of Rich.

    Raises:
        ValueError: There is no study, or it has no votes.
    """
    study = Study.load(folder)
    if not database_path(folder).is_file():
        raise ValueError(f"{folder} has no votes yet. Serve it: nabla vote {folder}.")
    rows = read_votes(database_path(folder), study)
    results = count_votes(study, rows, rule)
    lines = _describe(results)
    if output is None:
        return lines
    record = RunRecord("vote", {"title": study.title}, 0, collect_versions(), "raters", results)
    record.save(output / "results.json")
    write_text(output / "votes.csv", votes_csv(study, rows))
    if not results["votes_counted"]:
        return [*lines, f"Written: {output}, without a chart, because no vote counts yet."]
    draw_chart(results, output / "chart.png")
    return [*lines, f"Written: {output}"]


def print_lines(lines: Sequence[Any]) -> None:
    """Print texts and tables; nothing is cut where a terminal is narrow."""
    console = Console(highlight=False, markup=False)
    for line in lines:
        console.print(line)


def votes_csv(study: Study, rows: Sequence[Any]) -> str:
    """Return every vote, one record each, without exclusions (RFC 4180)."""
    prompts = {pair.id: pair.prompt for pair in study.pairs}
    text = io.StringIO()
    # With these line ends, Python quotes every kind of line end inside a cell.
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(CSV_COLUMNS)
    for item in read_judgements(study, rows):
        kind = "control" if item.is_control else "repeat" if item.is_repeat else "pair"
        first = "method" if item.method_first else "baseline"
        prompt, method = _as_text(prompts[item.pair_id]), _as_text(item.method)
        described = (item.rater, item.position, item.pair_id, prompt, method, kind, first)
        writer.writerow((*described, *item.preferences.values(), item.seconds, item.created))
    return text.getvalue()


def results_page(study: Study, results: dict[str, Any]) -> str:
    """Return the results as one HTML page without scripts."""
    columns = (*PREFERENCES, "difference")
    return TEMPLATES.get_template("results.html").render(
        study=study, results=results, columns=columns
    )


def draw_chart(results: dict[str, Any], path: str | Path) -> None:
    """Draw stacked bars of every method and question as PNG; whole or not at all.

    Raises:
        ValueError: There are no votes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    methods = {m: q for m, q in results["methods"].items() if q["overall"]["votes"]}
    if not methods:
        raise ValueError("there are no votes to draw yet.")
    figure = Figure(figsize=(8, 1.1 + 1.7 * len(methods)), dpi=150, layout="constrained")
    for axes, (method, questions) in zip(
        figure.subplots(len(methods), squeeze=False)[:, 0], methods.items(), strict=True
    ):
        _draw_bars(axes, results["baseline"], method, questions)
    if results["notice"]:
        figure.supxlabel(results["notice"], fontsize=8, color=MUTED)
    with whole_file(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary), metadata={"Software": None})


def _draw_bars(axes: Any, baseline: str, method: str, questions: dict[str, Any]) -> None:
    names = {"baseline": f"{baseline} better", "method": f"{method} better"}
    for row, question in enumerate(QUESTIONS):
        left = 0.0
        for preference in ("baseline", "both_good", "both_bad", "method"):
            share = questions[question][preference][0]
            name = names.get(preference, preference.replace("_", " "))
            label = name if row == 0 else None
            axes.barh(row, share, left=left, color=COLOURS[preference], height=0.7, label=label)
            if share >= 0.06:
                ink = INK if preference == "both_good" else "white"
                axes.text(
                    left + share / 2, row, f"{share:.0%}", ha="center", va="center", color=ink
                )
            left += share
    axes.set(xlim=(0, 1), yticks=range(len(QUESTIONS)), yticklabels=QUESTIONS, xticks=[])
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    votes = questions["overall"]["votes"]
    axes.set_title(f"{method} against {baseline}, {votes} votes", loc="left", fontsize=10)
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, 0), frameon=False, fontsize=8)


def _describe(results: dict[str, Any]) -> list[Any]:
    controls, repeats = results["controls"], results["repeats"]
    summary = (
        f"{results['raters_counted']} of {results['raters']} raters count. {results['rule']} "
        f"Control pairs right: {controls['right']} of {controls['of']}; repeated pairs answered "
        f"alike: {repeats['same']} of {repeats['of']}."
    )
    excluded = [f"left out: rater {name}, {why}" for name, why in results["excluded"].items()]
    return [*filter(None, [results["notice"]]), _table(results), summary, *excluded]


def _table(results: dict[str, Any]) -> Table:
    table = Table()
    for name in ("method", "question"):
        table.add_column(name, overflow="fold")
    headings = (f"{results['baseline']} better", "method better", "both good", "both bad")
    for name in (*headings, "method - baseline, 95 %", "votes", "agreement"):
        table.add_column(name, justify="right", overflow="fold")
    for method, questions in results["methods"].items():
        for question, shares in questions.items():
            if not shares["votes"]:
                continue
            value, low, high = shares["difference"]
            spread = "" if low is None else f" [{low:+.0%}, {high:+.0%}]"
            alpha = results["agreement"][question]
            table.add_row(
                method,
                question,
                *(f"{shares[preference][0]:.1%}" for preference in PREFERENCES),
                f"{value:+.1%}{spread}",
                str(shares["votes"]),
                "" if alpha is None else f"{alpha:.2f}",
            )
    return table


def _as_text(value: str) -> str:
    """Return a cell that spreadsheets do not run as a formula."""
    return f"'{value}" if value[:1] in ("=", "+", "-", "@", "\t", "\r", "\n") else value
