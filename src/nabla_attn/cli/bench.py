"""`nabla bench`: check, time and record."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from nabla_attn.cli.bench_methods import judged, matrix, methods
from nabla_attn.cli.group import RunByDefault, VerbCommand

ROOT = Path(__file__).parents[3]


bench = typer.Typer(
    name="bench",
    cls=RunByDefault,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Check, time and record: `nabla bench` attention and maps, `nabla bench methods` sparse "
    "attention methods. Options: `nabla bench run --help`.",
)
for each in (methods, matrix, judged):
    bench.command(cls=VerbCommand)(each)


@bench.command(cls=VerbCommand)
def run(
    workload: Annotated[
        list[str] | None, typer.Option(help="A workload; repeat for more. Default: the device's.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Timed rounds.")] = 3,
    output: Annotated[Path, typer.Option(help="Folder of the records.")] = Path(
        "benchmarks/results"
    ),
    scaling: Annotated[bool, typer.Option("--scaling", help="Time against tokens.")] = False,
    crossover: Annotated[
        bool, typer.Option("--crossover", help="Where dense attention is faster.")
    ] = False,
    model: Annotated[bool, typer.Option("--model", help="A whole transformer forward.")] = False,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of --model.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Compare with another commit of the checkout.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List contenders and why some cannot run.")
    ] = False,
    docs: Annotated[
        Path | None,
        typer.Option(help="Write the generated pages and charts of a checkout into this folder."),
    ] = None,
) -> None:
    """Benchmark attention and maps: outputs are checked before anything is timed."""
    from nabla_attn.bench.report import contender_table
    from nabla_attn.bench.suite import default_suite, run_shapes, run_suite
    from nabla_attn.generation.placement import resolve_device

    is_on = {"bench-scaling": scaling, "bench-crossover": crossover, "bench-model": model}
    shapes = [kind for kind, wanted in is_on.items() if wanted]
    if shapes and (workload or base or dry_run):
        raise ValueError(
            "--scaling, --crossover and --model measure shapes of their own: drop --workload, "
            "--base and --dry-run."
        )
    if docs and base and not workload:
        raise ValueError("--docs alone measures nothing: add --workload, or drop --base.")
    if layers and not model:
        raise ValueError("--layers is the depth of --model: add --model, or drop it.")
    where = resolve_device(device)
    if device == "auto" and where.type != "cuda":
        # Only these two have workloads of their own; others must be asked for.
        where = resolve_device("cpu")
    names = tuple(workload or default_suite(where))
    if dry_run:
        _print(contender_table(names, where))
    elif shapes:
        for path in run_shapes(
            shapes, where, output, rounds=rounds, num_layers=layers, on_progress=_say
        ):
            _print_record(path)
    elif docs is None or workload:
        paths = run_suite(names, where, output, rounds=rounds, on_progress=_say)
        for path in paths:
            _print_record(path)
        if base is not None:
            records = [str(path) for path in paths]
            _run_in_checkout("revisions", base, "--device", str(where), *records)
    if docs is not None:
        _run_in_checkout("pages", "--docs", str(docs), "--records", str(output))


def _say(stage: str, done: int, total: int) -> None:
    typer.echo(f"measuring {stage}", err=True)


def _print_record(path: Path) -> None:
    from nabla_attn.bench.report import section
    from nabla_attn.machine import CROSSOVER
    from nabla_attn.record import RunRecord

    record = RunRecord.load(path)
    _print(section(record))
    typer.echo(f"record: {path}")
    if record.kind == CROSSOVER:
        typer.echo("min_tokens='auto' uses it on this machine.")


def _print(markdown: str) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(markdown))


def _run_in_checkout(module: str, *arguments: str) -> None:
    """Run a tool of `benchmarks/`, which stays in the checkout when the package is installed."""
    if not (ROOT / "benchmarks" / "pages").is_dir():
        raise ValueError(
            f"--docs and --base need a checkout of nabla-attn, got a package in {ROOT}. Clone it "
            "and install it with `pip install -e`."
        )
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        env=os.environ | {"PYTHONPATH": path},
    )
    if process.returncode:
        raise typer.Exit(process.returncode)
