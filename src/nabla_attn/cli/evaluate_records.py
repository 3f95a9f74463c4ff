"""What `nabla evaluate` does with a finished run: summary, pack, and the exchange with VBench."""

from pathlib import Path
from typing import Annotated

import typer

from nabla_attn.cli import options as opt
from nabla_attn.cli import output as out


def summary(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")], as_json: opt.AsJson = False
) -> None:
    """Write and print the summary of a run again, such as after its last process."""
    print_summary(run, as_json=as_json)


def pack(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    output: Annotated[Path, typer.Argument(help="Where the packed run goes.")],
) -> None:
    """Write a run's records as one file an algorithm, to publish; `nabla report` reads them."""
    from nabla_attn.evaluation.records import pack_run

    out.say(f"{output}: {pack_run(run, output)} items that every algorithm has made.")


def vbench_write(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    output: Annotated[Path, typer.Argument(help="Where the copies go.")],
) -> None:
    """Copy a run's videos under the names that VBench expects, and say how to score them."""
    from nabla_attn.evaluation.vbench import write_layout

    for algo, count in write_layout(run, output).items():
        out.say(
            f"{output / algo}: {count} videos. In VBench's own environment: vbench evaluate "
            f"--videos_path {output / algo} --output_path {output / algo}-results --dimension NAME"
        )


def vbench_read(
    results: Annotated[Path, typer.Argument(help="Folder of *_eval_results.json files.")],
) -> None:
    """Recompute VBench's totals from its result files."""
    from nabla_attn.evaluation.vbench import compute_totals, read_results

    scores = read_results(results)
    for name, score in scores.items():
        out.say(f"{name:24s} {100 * score:6.2f}")
    for name, score in compute_totals(scores).items():
        out.say(f"{name:24s} {score:6.2f}")


def print_summary(output: Path, *, as_json: bool) -> None:
    """Write the summary and the curves of a run, and print the means."""
    from nabla_attn.evaluation.curves import write_summary
    from nabla_attn.evaluation.records import means_table

    record = write_summary(output)
    if as_json:
        out.print_json({"folder": output, "algorithms": record.numbers["algorithms"]})
        return
    out.print_table(*means_table(record.numbers["algorithms"]))
    out.say(f"Records, videos, summary.json, curves.png: {output}")
