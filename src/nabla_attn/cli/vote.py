"""`nabla vote`: create a blind study, serve it, read its results."""

import socket
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nabla_attn.cli.group import VerbCommand
from nabla_attn.errors import explain_missing


class ServeByDefault(TyperGroup):
    """Makes `nabla vote STUDY` mean `nabla vote serve STUDY`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the command where a folder stands in its place."""
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


@vote.command("make", cls=VerbCommand)
def make_from_run(
    study: StudyFolder,
    run: Annotated[Path, typer.Option(help="Folder of `nabla evaluate` or `nabla compare`.")],
    method: Annotated[
        list[str] | None,
        typer.Option(help="Algorithm to judge; repeat for more.", show_default="all in the run"),
    ] = None,
    baseline: Annotated[str, typer.Option(help="Algorithm it is compared with.")] = "dense",
    title: Annotated[str, typer.Option(help="Heading for raters.")] = "Which video is better?",
    pairs_per_rater: Annotated[int, typer.Option(min=1, help="Pairs one rater judges.")] = 20,
    num_repeats: Annotated[int, typer.Option(min=0, help="Pairs shown twice.")] = 2,
    num_controls: Annotated[int, typer.Option(min=0, help="Pairs with a damaged video.")] = 1,
) -> None:
    """Make a study from videos of two or more algorithms."""
    with explain_missing("vote"):
        from nabla_attn.vote.create import make_study

    created = make_study(
        study,
        run,
        methods=method or (),
        baseline=baseline,
        title=title,
        num_controls=num_controls,
        num_repeats=num_repeats,
        pairs_per_rater=pairs_per_rater,
    )
    num_real = sum(not pair.is_control for pair in created.pairs)
    typer.echo(
        f"{study}: {num_real} pairs of {created.baseline} with {', '.join(created.methods)}, and "
        f"{len(created.pairs) - num_real} control pairs. Serve it: nabla vote {study}"
    )


@vote.command("serve", cls=VerbCommand)
def serve_study(
    study: StudyFolder,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8123,
) -> None:
    """Serve a study until Ctrl-C; votes are on the disk before they are acknowledged."""
    with explain_missing("vote"):
        from nabla_attn.vote import app, server
        from nabla_attn.vote.study import Study

    application = app.create_app(study)
    bound = server.listen(host, port)
    tokens = Study.load(study)
    address = f"http://{_name_in_links(host)}:{bound.getsockname()[1]}"
    typer.echo(f"For raters:  {address}/s/{tokens.link_token}")
    typer.echo(f"Results:     {address}/results/{tokens.admin_token}   (keep this link)")
    try:
        server.run_server(application, bound)
    except KeyboardInterrupt:
        typer.echo("Stopped. All votes are stored.")


@vote.command("results", cls=VerbCommand)
def show_results(
    study: StudyFolder,
    output: Annotated[
        Path | None, typer.Option(help="Folder for results.json, votes.csv and chart.png.")
    ] = None,
    min_votes: Annotated[int, typer.Option(min=1, help="Pairs a rater must have judged.")] = 1,
    min_controls: Annotated[
        float, typer.Option(min=0, max=1, help="Share of control pairs a rater must get right.")
    ] = 0.5,
) -> None:
    """Print a study's results; with --output also write a record, a CSV file and a chart."""
    with explain_missing("vote"):
        from nabla_attn.vote.analysis import Exclusion
        from nabla_attn.vote.export import export_results, print_lines

    print_lines(export_results(study, output, Exclusion(min_votes, min_controls)))


def _name_in_links(host: str) -> str:
    """Return what others type: this machine's name where the server listens on all addresses."""
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
