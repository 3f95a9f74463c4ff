"""``nabla bench``: check, time and record."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from nabla_attn.record import RunRecord


def bench(
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
    base: Annotated[str | None, typer.Option(help="Compare with another commit.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List contenders and why some cannot run.")
    ] = False,
    docs: Annotated[
        Path | None,
        typer.Option(help="Write the generated pages and charts into this folder."),
    ] = None,
) -> None:
    """Benchmark attention and maps: outputs are checked before anything is timed."""
    from nabla_attn.bench.suite import default_suite, make_record, run_suite
    from nabla_attn.generation.pipeline import resolve_device

    shapes = [
        name
        for name, is_on in {
            "--scaling": scaling,
            "--crossover": crossover,
            "--model": model,
        }.items()
        if is_on
    ]
    if shapes and (workload or base or dry_run):
        raise ValueError(
            f"{' and '.join(shapes)} measure shapes of their own: drop --workload, --base and "
            "--dry-run."
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
        _list_contenders(names, where)
    elif shapes:
        from nabla_attn.bench.scaling import measure_crossover, measure_scaling
        from nabla_attn.bench.whole_model import measure_model
        from nabla_attn.crossover import crossover_file

        if scaling:
            results = measure_scaling(where, rounds=rounds, on_job=_say)
            _save(make_record("bench-scaling", {"rounds": rounds}, results, where), output)
        if crossover:
            results = measure_crossover(where, rounds=rounds, on_job=_say)
            record = make_record("bench-crossover", {"rounds": rounds}, results, where)
            _save(record, output)
            record.save(crossover_file(where))
            typer.echo(f"for min_tokens='auto': {crossover_file(where)}")
        if model:
            results = [
                measure_model(where, density, num_layers=layers, rounds=rounds)
                for density in (0.1, 0.2)
            ]
            _save(
                make_record("bench-model", {"layers": layers, "rounds": rounds}, results, where),
                output,
            )
    elif docs is None or workload:
        paths = run_suite(names, where, output, rounds=rounds, on_job=_say)
        for path in paths:
            _print_record(path)
        if base is not None:
            _compare_with(base, dict(zip(names, paths, strict=True)), str(where), rounds)
    if docs is not None:
        from nabla_attn.bench import correctness_page, training_page
        from nabla_attn.bench.tables import build_docs
        from nabla_attn.files import write_text

        write_text(docs / "benchmarks.md", build_docs(output, docs))
        write_text(docs / "correctness.md", correctness_page.build_page(output))
        write_text(docs / "training_study.md", training_page.build_page(output))


def _say(title: str) -> None:
    typer.echo(f"measuring {title}", err=True)


def _save(record: "RunRecord", output: Path) -> None:
    path = output / f"{record.kind.replace('-', '_')}.json"
    record.save(path)
    _print_record(path)


def _print_record(path: Path) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    from nabla_attn.bench.tables import section
    from nabla_attn.record import RunRecord

    Console().print(Markdown(section(RunRecord.load(path))))
    typer.echo(f"record: {path}")


def _list_contenders(names: tuple[str, ...], where: "torch.device") -> None:
    from rich.console import Console
    from rich.table import Table

    from nabla_attn.bench.contenders import list_contenders
    from nabla_attn.bench.workloads import workload

    table = Table("workload", "contender", "forward", "forward + backward")
    for name in names:
        for contender, reasons in list_contenders(workload(name), where).items():
            table.add_row(name, contender, *(reason or "runs" for reason in reasons))
    Console().print(table)


def _compare_with(base: str, records: dict[str, Path], device: str, rounds: int) -> None:
    from nabla_attn.bench.revisions import measure_revision, only_in, ratios
    from nabla_attn.record import RunRecord

    for name, path in records.items():
        ours, theirs = RunRecord.load(path), measure_revision(base, name, device, rounds)
        for row in ratios(ours, theirs):
            *case, ratio = row.values()
            typer.echo(f"{' '.join(map(str, case))}: {ratio:.2f}x the share of ideal at {base}")
        for line in only_in(ours, theirs):
            typer.echo(f"{line}: not measured at {base}")
        for line in only_in(theirs, ours):
            typer.echo(f"{line}: measured at {base} alone")
