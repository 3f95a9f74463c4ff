"""``nabla compare``: dense and sparse videos of one seed, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nabla_attn.cli import options as opt

if TYPE_CHECKING:
    from nabla_attn.evaluation.compare import Run


@opt.with_video_options
def compare(
    video: opt.VideoOptions,
    prompt: opt.Prompt,
    sparse_algo: Annotated[
        list[str] | None,
        typer.Option(
            help="An algorithm to compare with dense; repeat for more.",
            show_default=opt.MODEL_DEFAULT,
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for everything written.")] = Path(
        "out/compare"
    ),
    seed: opt.Seed = 0,
    rounds: Annotated[
        int, typer.Option(min=1, max=100, help="Runs of each, in turn; times are medians.")
    ] = 1,
) -> None:
    """Compare algorithms with dense attention on one seed: picture, videos, records, table."""
    from nabla_attn.cli.progress import generation_bars
    from nabla_attn.evaluation.compare import compare as run_all
    from nabla_attn.files import check_writable

    if not prompt.strip():
        raise ValueError("the prompt is empty. Say what the videos show: --prompt TEXT.")
    asked: list[str | None] = [*sparse_algo] if sparse_algo else [None]
    requests = [video.request(prompt=prompt, seed=seed, sparse_algo=algo) for algo in asked]
    algos = [request.sparse_algo for request in requests]
    rate = video.rate
    check_writable(output / "contact_sheet.png")
    pipeline = video.load()
    with generation_bars() as start:
        runs = run_all(pipeline, requests[0], algos, rounds=rounds, on_progress=start)
    _write(runs, output, rate)
    _print_table(runs, output)


def _write(runs: Sequence["Run"], output: Path, fps: float) -> None:
    from nabla_attn.generation.video import write_video
    from nabla_attn.viz.contact_sheet import draw_contact_sheet
    from nabla_attn.viz.side_by_side import join_side_by_side

    for run in runs:
        write_video(run.frames, output / f"{run.algo}.mp4", fps)
        run.record.save(output / f"{run.algo}.json")
    joined = join_side_by_side([run.frames for run in runs], [run.algo for run in runs])
    write_video(joined, output / "side_by_side.mp4", fps)
    draw_contact_sheet([(run.frames, run.record) for run in runs], output / "contact_sheet.png")


def _print_table(runs: Sequence["Run"], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("algorithm", no_wrap=True, min_width=max(len(run.algo) for run in runs))
    for column in ("pairs kept", "transformer", "speed-up", "PSNR", "SSIM"):
        table.add_column(column, justify="right")
    for run in runs:
        table.add_row(run.algo, *_cells(run.record.numbers, run.algo == "dense"))
    console = Console()
    console.print(table)
    console.print(f"Pictures, videos and records: {output}", highlight=False)


def _cells(numbers: dict[str, Any], is_dense: bool) -> list[str]:
    to_dense, psnr = numbers["to_dense"], numbers["to_dense"]["psnr"]
    cells = [f"{numbers['attention']['density']:.1%}", f"{numbers['seconds']['transformer']:.2f} s"]
    if is_dense:
        return [*cells, "1.00x", "", ""]
    identical = "identical" if psnr is None else f"{psnr:.1f} dB"
    speed = to_dense["speed_up"]
    return [*cells, f"{speed:.2f}x" if speed else "", identical, f"{to_dense['ssim']:.4f}"]
