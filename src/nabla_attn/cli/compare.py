"""`nabla compare`: dense and sparse videos of one seed, side by side."""

from pathlib import Path
from typing import Annotated, Any

import typer

from nabla_attn.cli import options as opt
from nabla_attn.cli import output as out


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
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
) -> None:
    """Compare algorithms with dense attention on one seed: a page, pictures, videos, records."""
    from nabla_attn.cli.progress import generation_bars
    from nabla_attn.evaluation.compare import compare as run_all
    from nabla_attn.evaluation.compare import sparse_names
    from nabla_attn.files import check_writable
    from nabla_attn.viz.side_by_side import PAGE, write_comparison

    if not prompt.strip():
        raise ValueError("the prompt is empty. Say what the videos show: --prompt TEXT.")
    asked: list[str | None] = [*sparse_algo] if sparse_algo else [None]
    requests = [video.request(prompt=prompt, seed=seed, sparse_algo=algo) for algo in asked]
    algos, rate = [request.sparse_algo for request in requests], video.rate
    sparse_names(algos)  # refuses before the model is loaded
    folder = out.free_path(output, overwrite=overwrite)
    check_writable(folder / "contact_sheet.png")
    memory = video.foresee(requests[0])
    pipeline = video.load()
    video.check(pipeline, requests[0], memory)
    with generation_bars() as start:
        compared = run_all(pipeline, requests[0], algos, rounds=rounds, on_progress=start)
    write_comparison([(each.frames, each.record) for each in compared], folder, rate)
    if as_json:
        numbers = {each.algo: each.record.numbers for each in compared}
        place = {"folder": folder, "page": folder / PAGE, "memory": memory.to_dict()}
        out.print_json(place | {"algorithms": numbers})
        return
    header = ("algorithm", "pairs kept", "transformer", "speed-up", "PSNR", "SSIM")
    out.print_table(header, [[each.algo, *_cells(each.record.numbers)] for each in compared])
    out.say(f"Open {folder / PAGE} in a browser; pictures, videos and records are beside it.")


def _cells(numbers: dict[str, Any]) -> list[str]:
    to_dense = numbers["to_dense"]
    cells = [f"{numbers['attention']['density']:.1%}", f"{numbers['seconds']['transformer']:.2f} s"]
    speed, psnr = to_dense["speed_up"], to_dense["psnr"]
    identical = "identical" if psnr is None else f"{psnr:.1f} dB"
    return [*cells, f"{speed:.2f}x" if speed else "", identical, f"{to_dense['ssim']:.4f}"]
