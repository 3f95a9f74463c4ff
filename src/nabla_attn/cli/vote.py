"""``nabla vote``: make a blind study, serve it, read its results."""

import socket
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nabla_attn.cli.group import VerbCommand


class ServeByDefault(TyperGroup):
    """``nabla vote STUDY`` is ``nabla vote serve STUDY``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command in where a folder stands in its place."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["serve", *args]
        return super().parse_args(ctx, args)


vote = typer.Typer(
    name="vote",
    cls=ServeByDefault,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Ask people: a blind side-by-side study. `nabla vote STUDY` serves one.",
)
StudyFolder = Annotated[Path, typer.Argument(help="Folder of the study.")]


@vote.command(cls=VerbCommand)
def make(
    study: StudyFolder,
    run: Annotated[Path, typer.Option(help="Folder of `nabla evaluate` or `nabla compare`.")],
    method: Annotated[
        list[str] | None, typer.Option(help="Algorithm to judge; repeat for more; default all.")
    ] = None,
    baseline: Annotated[str, typer.Option(help="What it is compared with.")] = "dense",
    title: Annotated[str, typer.Option(help="What raters read.")] = "Which video is better?",
    pairs_per_rater: Annotated[int, typer.Option(min=1, help="Pairs one rater judges.")] = 20,
    num_repeats: Annotated[int, typer.Option(min=0, help="Pairs shown twice.")] = 2,
    num_controls: Annotated[int, typer.Option(min=0, help="Pairs with a damaged video.")] = 1,
) -> None:
    """Make a study from videos of two or more algorithms."""
    _import_server()
    from nabla_attn.vote.make import make_study

    made = make_study(
        study,
        run,
        methods=method or (),
        baseline=baseline,
        title=title,
        num_controls=num_controls,
        num_repeats=num_repeats,
        pairs_per_rater=pairs_per_rater,
    )
    real = sum(not pair.is_control for pair in made.pairs)
    typer.echo(
        f"{study}: {real} pairs of {made.baseline} with {', '.join(made.methods)}, and "
        f"{len(made.pairs) - real} control pairs. Serve it: nabla vote {study}"
    )


@vote.command(cls=VerbCommand)
def serve(
    study: StudyFolder,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8123,
) -> None:
    """Serve a study until Ctrl-C; votes are on disk before they are acknowledged."""
    server = _import_server()
    from nabla_attn.vote.study import Study

    application = server.create_app(study)
    bound = server.listen(host, port)
    found = Study.load(study)
    address = f"http://{_host_of_links(host)}:{bound.getsockname()[1]}"
    typer.echo(f"For raters:  {address}/s/{found.link_token}")
    typer.echo(f"Results:     {address}/results/{found.admin_token}   (keep this link)")
    try:
        server.serve(application, bound)
    except KeyboardInterrupt:
        typer.echo("Stopped. All votes are stored.")


@vote.command(cls=VerbCommand)
def results(
    study: StudyFolder,
    output: Annotated[
        Path | None, typer.Option(help="Folder for results.json, votes.csv and chart.png.")
    ] = None,
    min_votes: Annotated[int, typer.Option(min=1, help="Pairs a rater must have judged.")] = 1,
    min_controls: Annotated[
        float, typer.Option(min=0, max=1, help="Share of control pairs a rater must get right.")
    ] = 0.5,
) -> None:
    """Print a study's results; with --output also write a record, a CSV and a chart."""
    _import_server()
    from nabla_attn.vote.database import VoteStore
    from nabla_attn.vote.export import draw_chart, votes_csv
    from nabla_attn.vote.results import Exclusion, count_votes
    from nabla_attn.vote.study import Study, database_path

    found = Study.load(study)
    if not database_path(study).is_file():
        raise ValueError(f"{study} has no votes yet. Serve it: nabla vote {study}.")
    store = VoteStore(database_path(study), found)
    rows = store.all_votes()
    counted = count_votes(found, rows, Exclusion(min_votes, min_controls))
    _print(counted)
    if output is None:
        return
    from nabla_attn.files import write_text
    from nabla_attn.record import RunRecord, collect_versions

    record = RunRecord("vote", {"title": found.title}, 0, collect_versions(), "raters", counted)
    record.save(output / "results.json")
    write_text(output / "votes.csv", votes_csv(found, rows))
    if counted["votes_counted"]:
        draw_chart(counted, output / "chart.png")
        typer.echo(f"Written: {output}")
    else:
        typer.echo(f"Written: {output}, without a chart: no vote counts yet.")


def _host_of_links(host: str) -> str:
    """What others type: this machine's name where the server listens on all addresses."""
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def _print(counted: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    # Folded where a terminal is narrow: nothing is cut.
    for name in ("method", "question"):
        table.add_column(name, overflow="fold")
    headings = (f"{counted['baseline']} better", "method better", "both good", "both bad")
    for name in (*headings, "method - baseline, 95 %", "votes", "agreement"):
        table.add_column(name, justify="right", overflow="fold")
    for method, questions in counted["methods"].items():
        for question, shares in questions.items():
            if not shares["votes"]:
                continue
            outcomes = ("baseline", "method", "both_good", "both_bad")
            value, low, high = shares["difference"]
            spread = "" if low is None else f" [{low:+.0%}, {high:+.0%}]"
            alpha = counted["agreement"][question]
            table.add_row(
                method,
                question,
                *(f"{shares[outcome][0]:.1%}" for outcome in outcomes),
                f"{value:+.1%}{spread}",
                str(shares["votes"]),
                "" if alpha is None else f"{alpha:.2f}",
            )
    console = Console(highlight=False)
    if counted["notice"]:
        console.print(counted["notice"], style="bold", markup=False)
    console.print(table)
    controls, repeats = counted["controls"], counted["repeats"]
    console.print(
        f"{counted['raters_counted']} of {counted['raters']} raters count. {counted['rule']} "
        f"Controls right: {controls['right']} of {controls['of']}; repeats answered alike: "
        f"{repeats['same']} of {repeats['of']}."
    )
    for rater, reason in counted["excluded"].items():
        console.print(f"left out: rater {rater}, {reason}")


def _import_server() -> Any:
    try:
        from nabla_attn.vote import server
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is not installed; voting needs it. Run: pip install 'nabla-attn[vote]'."
        ) from None
    return server
