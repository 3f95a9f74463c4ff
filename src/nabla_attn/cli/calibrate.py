"""`nabla calibrate`: an algorithm for each head of each layer, within a budget."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nabla_attn.cli import options as opt
from nabla_attn.cli import output as out

if TYPE_CHECKING:
    from nabla_attn.calibrate.job import Result
    from nabla_attn.calibrate.units import Choice
    from nabla_attn.config import SparseConfig


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
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0, help="Or: most seconds of this machine in the transformer for a video."
        ),
    ] = None,
    speed_up: Annotated[
        float | None,
        typer.Option(min=0, help="Or: seconds of the dense transformer over the schedule's."),
    ] = None,
    sparse_algo: Annotated[
        list[str] | None,
        typer.Option(
            help="Algorithm that heads may use; * is a range of numbers. Repeat for more.",
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
    by: Annotated[str, typer.Option(help="What chooses an algorithm: head or layer.")] = "head",
    ranges: Annotated[
        int, typer.Option(min=1, help="Ranges of steps that choose on their own; 1 is all steps.")
    ] = 3,
    weights: Annotated[
        bool,
        typer.Option(
            "--weights", help="Weight errors by what they do to the final latents: more runs."
        ),
    ] = False,
    check: Annotated[
        int, typer.Option(min=0, help="Check these weights on so many further prompts.")
    ] = 0,
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
    """Measure what heads lose, and write the schedule that loses least within a budget.

    Another budget for the same folder measures nothing again.
    """
    from nabla_attn.calibrate.budget import Budget
    from nabla_attn.calibrate.candidates import DEFAULT, read_candidates
    from nabla_attn.calibrate.job import CalibrateJob
    from nabla_attn.calibrate.run import Calibration
    from nabla_attn.cli.progress import generation_bars
    from nabla_attn.evaluation.prompts import take_prompts
    from nabla_attn.files import check_writable, write_text
    from nabla_attn.moving_shapes.judge import MovingShapesScorer

    if method is not None:
        given = {"--density": density, "--error": error, "--sparse-algo": sparse_algo}
        given |= {"--seconds": seconds, "--speed-up": speed_up}
        if odd := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"--method makes a table and takes no budget: drop {odd[0]}.")
        _make_table(video, method, prompts, num_prompts, seed, output, as_json=as_json)
        return
    budget = Budget(density, error, seconds, speed_up)
    candidates = read_candidates(sparse_algo or DEFAULT)
    texts = take_prompts(prompts, num_prompts + check, MovingShapesScorer())
    if len(texts) < num_prompts + check:
        raise ValueError(
            f"{num_prompts} prompts to measure and {check} to check need {num_prompts + check}: "
            f"got {len(texts)}."
        )
    request = video.base_request(prompt=texts[0], seed=seed)
    target = check_writable(output / "schedule.json")
    with generation_bars(in_logs=True) as start:
        job = CalibrateJob(
            Calibration(video.load_for(request), request, candidates, output, num_rows),
            texts[:num_prompts],
            budget,
            by=by,
            ranges=ranges,
            has_weights=weights,
            held_out=texts[num_prompts:],
            progress=start,
        )
        result = job.run()
    write_text(target, result.schedule.to_json() + "\n")
    if as_json:
        out.print_json({"schedule": target} | _values(result, candidates))
        return
    _print(result, candidates)
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
        schedule = calibrate_method(video.load_for(request), request, config, texts, progress=start)
    write_text(target, schedule.to_json() + "\n")
    if as_json:
        out.print_json({"schedule": target, "algorithm": str(config)})
        return
    out.say(f"Use it: nabla generate --schedule {target}")


def _numbers(choice: "Choice") -> dict[str, float]:
    return {"density": float(choice.density), "error": float(choice.error)}


def _values(result: "Result", candidates: "list[SparseConfig]") -> dict[str, Any]:
    layers = [_most_common(row, candidates) for row in result.choice.picked.swapaxes(0, 1)]
    singles = {str(candidates[each.picked.flat[0]]): _numbers(each) for each in result.singles}
    values: dict[str, Any] = _numbers(result.choice) | {"layers": layers, "one_for_all": singles}
    values["rules"] = [rule.to_dict() for rule in result.schedule.rules]
    if result.distance is not None:
        values["distance"] = result.distance
    if result.timed:
        values["seconds"] = {
            name: {"predicted": each.predicted, "measured": each.measured} | _numbers(each.choice)
            for name, each in result.timed.items()
        }
    if result.fit is not None:
        values["check"] = {each.name: vars(each) for each in result.checked}
        values["fit"] = vars(result.fit)
    return values


def _most_common(picked: Any, candidates: "list[SparseConfig]") -> str:
    from collections import Counter

    return str(candidates[Counter(picked.ravel().tolist()).most_common(1)[0][0]])


def _print(result: "Result", candidates: "list[SparseConfig]") -> None:
    """Print the rules, and the nearest algorithms that serve all heads alike."""
    choice = result.choice
    out.say(f"everywhere else: {result.schedule.algorithm}")
    for rule in result.schedule.rules:
        out.say(str(rule))
    fewer = [single for single in result.singles if single.density <= choice.density]
    closer = [single for single in result.singles if single.error <= choice.error]
    rows = {"this schedule": choice}
    for found, key in ((fewer, "error"), (closer, "density")):
        if found:
            best = min(found, key=lambda single: getattr(single, key))
            rows[f"{candidates[best.picked.flat[0]]} everywhere"] = best
    header = ("algorithm", "pairs kept", "error of attention's output")
    cells = [[name, f"{row.density:.1%}", f"{row.error:.4f}"] for name, row in rows.items()]
    out.print_table(header, cells)
    if result.timed:
        _print_seconds(result)
    if result.fit is not None:
        _print_check(result)


def _print_seconds(result: "Result") -> None:
    header = ("seconds in the transformer", "predicted", "measured", "pairs kept", "error")
    cells = [
        [
            name,
            f"{each.predicted:.2f}",
            f"{each.measured:.2f}",
            f"{each.choice.density:.1%}",
            f"{each.choice.error:.4f}",
        ]
        for name, each in result.timed.items()
    ]
    out.print_table(header, cells)


def _print_check(result: "Result") -> None:
    fit = result.fit
    assert fit is not None
    header = ("distance of the final latents to dense", "predicted", "measured")
    cells = [
        [each.name, f"{each.predicted:.3f}", f"{each.measured:.3f}"] for each in result.checked
    ]
    out.print_table(header, cells)
    rank = "not known" if fit.rank_correlation is None else f"{fit.rank_correlation:.2f}"
    out.say(
        f"The error model on held-out prompts: rank correlation {rank}, measured / predicted "
        f"{fit.ratio:.2f}, within a factor of {fit.spread:.2f}."
    )
