"""`isynet measure`: this machine's rates."""

from pathlib import Path
from typing import Annotated

import typer

from isynet.cli.output import AsJson, Size, print_rows, progress_bar
from nabla_attn.cli.output import print_json, say


def measure(
    networks: Annotated[
        list[str] | None,
        typer.Argument(help="Networks to time.", show_default="all that are known"),
    ] = None,
    size: Size = 224,
    batch: Annotated[int, typer.Option(min=1, help="Images of a batch.")] = 16,
    runtime: Annotated[str, typer.Option(help="onnxruntime or torch.")] = "onnxruntime",
    output: Annotated[
        Path, typer.Option(help="Folder of the records; what is there is not timed again.")
    ] = Path("out/measure"),
    as_json: AsJson = False,
) -> None:
    """Time networks of many families on one thread and fit this machine's rates to them.

    The rates are kept for `--machine here`. The error is of networks whose family was left out of
    the fit.
    """
    from isynet.measuring import NETWORKS, measure_networks, study
    from nabla_attn.cost.rates import rates_file
    from nabla_attn.record import describe_device

    names = tuple(networks or NETWORKS)
    with progress_bar("measuring") as on_progress:
        measured = measure_networks(
            names,
            folder=output,
            size=size,
            batch=batch,
            runtime=runtime,
            on_progress=on_progress,
        )
    source = f"{len(names)} networks, {runtime}, {size} pixels, {describe_device()}"
    result = study(measured, "here", batch=batch, source=source)
    result.rates.save(rates_file())
    summary = {
        "rates": vars(result.rates),
        "plain MEM, rank correlation with the achieved rate": result.plain_spearman,
        "timed MEM, the same": result.timed_spearman,
        "file": str(rates_file()),
    }
    if as_json:
        print_json({**summary, "networks": result.rows})
        return
    rows = [
        {
            "network": row["name"],
            "ms": row["seconds"] * 1e3,
            "predicted": row["predicted_seconds"] * 1e3,
            "GMAC/s": row["macs_per_second"] / 1e9,
            "plain MEM": row["plain_mem"],
            "timed MEM": row["timed_mem"],
        }
        for row in sorted(result.rows, key=lambda row: -row["macs_per_second"])
    ]
    print_rows(rows, as_json=False)
    say(
        f"median error of predicted seconds {result.rates.error:.1%}; rank correlation with the "
        f"achieved rate: plain MEM {result.plain_spearman:.3f}, timed {result.timed_spearman:.3f}"
    )
    say(f"kept for --machine here: {rates_file()}")
