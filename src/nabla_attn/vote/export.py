"""Results as CSV, as one HTML page, and as a chart."""

import csv
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from nabla_attn.files import whole_file
from nabla_attn.vote.results import OUTCOMES, read_judgements
from nabla_attn.vote.study import QUESTIONS, Study

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


def outcome_label(outcome: str, baseline: str, method: str) -> str:
    """A reader's name of an outcome."""
    better = {"baseline": f"{baseline} better", "method": f"{method} better"}
    return better.get(outcome, outcome.replace("_", " "))


def votes_csv(study: Study, rows: Sequence[Any]) -> str:
    """Every vote, one line each, exclusions not applied."""
    prompts = {pair.id: pair.prompt for pair in study.pairs}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for item in read_judgements(study, rows):
        kind = "control" if item.is_control else "repeat" if item.is_repeat else "pair"
        first = "method" if item.method_first else "baseline"
        prompt, method = _as_text(prompts[item.pair_id]), _as_text(item.method)
        shown = (item.rater, item.position, item.pair_id, prompt, method, kind, first)
        writer.writerow((*shown, *item.outcomes.values(), item.seconds, item.created))
    return text.getvalue()


def results_page(study: Study, results: dict[str, Any]) -> str:
    """The results as one HTML page without scripts."""
    rows = []
    for method, questions in results["methods"].items():
        for question, shares in questions.items():
            cells = "".join(
                f"<td>{_share(shares, name)}</td>" for name in (*OUTCOMES, "difference")
            )
            alpha = results["agreement"][question]
            rows.append(
                f"<tr><th scope=row>{escape(method)}</th><td>{question}</td>{cells}"
                f"<td>{shares['votes']}</td><td>{'' if alpha is None else alpha}</td></tr>"
            )
    excluded = "".join(
        f"<li>rater {escape(rater)}: {escape(reason)}</li>"
        for rater, reason in results["excluded"].items()
    )
    controls, repeats = results["controls"], results["repeats"]
    notice = f"<p><strong>{escape(study.notice)}</strong></p>" if study.notice else ""
    heads = (study.baseline + " better", "method better", "both good", "both bad")
    header = "".join(f"<th scope=col>{escape(head)}</th>" for head in heads)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Results</title>'
        '<link rel="icon" href="data:,"><link rel="stylesheet" href="/static/vote.css">'
        '<main class="results">'
        f"<h1>{escape(study.title)}</h1>{notice}"
        f"<p>{results['votes_counted']} votes of {results['raters_counted']} raters "
        f"({results['raters']} voted). {escape(results['rule'])}</p>"
        f"<table><thead><tr><th scope=col>method</th><th scope=col>question</th>{header}"
        "<th scope=col>method − baseline</th><th scope=col>votes</th>"
        f"<th scope=col>agreement</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
        "<p>Shares of votes with 95 % intervals over raters; agreement is Krippendorff’s alpha.</p>"
        f"<p>Controls right: {controls['right']} of {controls['of']}. Repeated pairs answered "
        f"alike: {repeats['same']} of {repeats['of']}.</p>"
        f"{f'<h2>Left out</h2><ul>{excluded}</ul>' if excluded else ''}"
        "</main></html>"
    )


def draw_chart(results: dict[str, Any], path: str | Path) -> None:
    """Stacked bars of every method and question, as PNG; whole or not at all."""
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
    for row, question in enumerate(QUESTIONS):
        left = 0.0
        for outcome in ("baseline", "both_good", "both_bad", "method"):
            share = questions[question][outcome][0]
            label = outcome_label(outcome, baseline, method) if row == 0 else None
            axes.barh(row, share, left=left, color=COLOURS[outcome], height=0.7, label=label)
            if share >= 0.06:
                ink = INK if outcome == "both_good" else "white"
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


def _share(shares: dict[str, Any], name: str) -> str:
    if name not in shares:
        return ""
    value, low, high = shares[name]
    interval = "" if low is None else f" <small>[{100 * low:.0f}, {100 * high:.0f}]</small>"
    return f"{100 * value:.1f} %{interval}"


def _as_text(value: str) -> str:
    """Spreadsheets run cells that start like a formula."""
    return f"'{value}" if value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
