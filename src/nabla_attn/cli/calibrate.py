"""`nabla calibrate`: an algorithm for each layer, within a budget of density or error."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nabla_attn.cli import options as opt
from nabla_attn.cli import output as out

if TYPE_CHECKING:
    from nabla_attn.calibrate.candidates import Choice


@opt.with_video_options
def calibrate(
    video: opt.VideoOptions,
    density: Annotated[
        float | None, typer.Option(min=0, max=1, help="Keep at most this share of token pairs.")
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(min=0, help="Or: greatest mean relative error of attention's output."),
    ] = None,
    sparse_algo: Annotated[
        list[str] | None,
        typer.Option(
            help="Algorithm that layers may use; * is a range of numbers. Repeat for more.",
            show_default="nabla-*, topk-*, nabla-*_sta-3-3-3",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Instead: make the table that a calibrated method needs, such as paro-0.3.",
            show_default=False,
        ),
    ] = None,
    prompts: opt.Prompts = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts taken, from the first.")] = 2,
    seed: opt.Seed = 0,
    num_rows: Annotated[
        int, typer.Option(min=1, help="Query tokens sampled in each attention call.")
    ] = 16,
    output: Annotated[
        Path, typer.Option(help="Folder of measurements, which are kept, and schedule.json.")
    ] = Path("out/calibrate"),
    as_json: opt.AsJson = False,
) -> None:
    """Measure what layers lose, and write the schedule that loses least within a budget.

    Another budget for the same folder measures nothing again.
    """
    from nabla_attn.calibrate.candidates import DEFAULT, choose_within, one_for_all, read_candidates
    from nabla_attn.calibrate.run import Calibration
    from nabla_attn.cli.progress import generation_bars
    from nabla_attn.evaluation.prompts import take_prompts
    from nabla_attn.files import check_writable, write_text
    from nabla_attn.moving_shapes.judge import MovingShapesScorer

    if method is not None:
        given = {"--density": density, "--error": error, "--sparse-algo": sparse_algo}
        if odd := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"--method makes a table and takes no budget: drop {odd[0]}.")
        _make_table(video, method, prompts, num_prompts, seed, output, as_json=as_json)
        return
    if (density is None) == (error is None):
        raise ValueError("calibration takes one budget: --density 0.2, or --error 0.1.")
    candidates = read_candidates(sparse_algo or DEFAULT)
    texts = take_prompts(prompts, num_prompts, MovingShapesScorer())
    request = video.base_request(prompt=texts[0], seed=seed)
    target = check_writable(output / "schedule.json")
    calibration = Calibration(video.load(), request, candidates, output, num_rows)
    with generation_bars(in_logs=True) as start:
        losses = calibration.measure(texts, progress=start)
    choice = choose_within(losses, candidates, density=density, error=error)
    write_text(target, calibration.schedule(choice).to_json() + "\n")
    singles = one_for_all(losses, candidates)
    if as_json:
        out.print_json(
            {"schedule": target}
            | _numbers(choice)
            | {"layers": list(map(str, choice.layers))}
            | {"one_for_all": {str(each.layers[0]): _numbers(each) for each in singles}}
        )
        return
    _print(choice, singles)
    out.say(f"Use it: nabla generate --schedule {target}")


def _make_table(
    video: opt.VideoOptions,
    method: str,
    prompts: "Path | None",
    num_prompts: int,
    seed: int,
    output: Path,
    *,
    as_json: bool,
) -> None:
    """Write the schedule of a method with the table that it needs."""
    from nabla_attn.calibrate.tables import TableProbe, calibrate_method
    from nabla_attn.cli.progress import generation_bars
    from nabla_attn.config import parse
    from nabla_attn.evaluation.prompts import take_prompts
    from nabla_attn.files import check_writable, write_text
    from nabla_attn.moving_shapes.judge import MovingShapesScorer

    config = parse(method)
    texts = take_prompts(prompts, num_prompts, MovingShapesScorer())
    request = video.base_request(prompt=texts[0], seed=seed)
    TableProbe(config, request.steps)  # refuses before the model is loaded
    target = check_writable(output / "schedule.json")
    with generation_bars(in_logs=True) as start:
        schedule = calibrate_method(video.load(), request, config, texts, progress=start)
    write_text(target, schedule.to_json() + "\n")
    if as_json:
        out.print_json({"schedule": target, "algorithm": str(config)})
        return
    out.say(f"Use it: nabla generate --schedule {target}")


def _numbers(choice: "Choice") -> dict[str, float]:
    return {"density": float(choice.density), "error": float(choice.error)}


def _print(choice: "Choice", singles: "list[Choice]") -> None:
    """Print the choice by layer, and the nearest algorithms that serve all layers alike."""
    fewer = [single for single in singles if single.density <= choice.density]
    closer = [single for single in singles if single.error <= choice.error]
    rows = {"this schedule": choice}
    if fewer:
        best = min(fewer, key=lambda single: single.error)
        rows[f"{best.layers[0]} in all layers"] = best
    best = min(closer, key=lambda single: single.density)
    rows[f"{best.layers[0]} in all layers"] = best
    for layer, config in enumerate(choice.layers):
        out.say(f"layer {layer}: {config}")
    header = ("algorithm", "pairs kept", "error of attention's output")
    cells = [[name, f"{row.density:.1%}", f"{row.error:.4f}"] for name, row in rows.items()]
    out.print_table(header, cells)
